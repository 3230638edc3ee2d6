"""Turn text into data/<name>/{train,val}.bin and meta.json, ready for train_teacher.py.

    python prepare_data.py              # stories: small sums told in English, each one checkable
    python prepare_data.py dates        # pairs: an ISO date and one of its eight written forms
    python prepare_data.py captions     # from the Hugging Face hub; -h lists the others
    python prepare_data.py mine --input a.txt b.txt.gz --tokenizer gpt2 --length 128
    python prepare_data.py names --input names.txt --rows
    python prepare_data.py en-fr --input pairs.tsv      # made by: paste a.en a.fr > pairs.tsv

The .bin files are flat uint16 ids, to be memory-mapped; meta.json holds the complete tokenizer and
    kind: rows    of `length` ids: text <eos> <pad> ..., for pairs source <sep> <pad> ... text <eos>
    kind: stream  documents one after another, each ended by <eos>; any window of it is a row
"""
import argparse
import bz2
import calendar
import codecs
import csv
import datetime
import errno
import functools
import gzip
import importlib.util
import io
import json
import logging
import lzma
import math
import os
import random
import re
import shlex
import sys
import tempfile
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from contextlib import suppress
from itertools import chain, islice, product
from pathlib import Path

import numpy as np
import regex        # comes with tiktoken; unlike re it knows Unicode's letters and marks

SPECIAL = ['<eos>', '<pad>', '<sep>', '<bos>']      # ids V-4 ... V-1 of every tokenizer
FORMAT = 1                                          # of data folders


# -----------------------------------------------------------------------------
# Shared by all scripts: one-line errors, a command line, whole files

def tell(message):
    """A line on stderr, where it does not mix with a script's output."""
    # what is printed never costs what is computed
    with suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def tell_name(message):
    """A line on stderr after the script's name, like argparse's errors."""
    tell(f'{Path(sys.argv[0]).name}: {message}')


def fail(message):
    """End with one line on stderr and exit status 2, like argparse."""
    # under torchrun the first process speaks for all
    if os.environ.get('RANK', '0') == '0':
        tell_name(' '.join(str(message).splitlines()))
    raise SystemExit(2)


def run_script(main):
    """Call a script's main(); an interruption or a lack of memory or disk is one line at most."""
    # a Windows console raises at characters that it cannot show
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='replace')
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        tell_name('stopped')
        raise SystemExit(130) from None
    except BrokenPipeError:
        # like cat, a script ends silently when its reader does (`| head`)
        mute_stdout()
        raise SystemExit(141) from None
    except (MemoryError, RuntimeError, OSError) as error:
        if out_of_memory(error):
            fail('out of memory; give less text or fewer rows, or train with a smaller --batch or '
                 'more --micro-batches')
        if getattr(error, 'errno', None) == errno.ENOSPC:
            mute_stdout()
            fail(why_not(error))
        raise


def out_of_memory(error):
    """Whether an error of Python, numpy, or torch on a GPU or a CPU says so."""
    words = 'MemoryError|DefaultCPUAllocator|Cannot allocate memory|unable to mmap'
    return re.search(words, f'{type(error).__name__} {error}') is not None


def uncaught(kind, error, trace):
    """Python's hook for uncaught errors: Ctrl-C while modules are being imported."""
    if issubclass(kind, KeyboardInterrupt):
        tell_name('stopped')
    else:
        sys.__excepthook__(kind, error, trace)


def open_streams():
    """Let stdin, stdout and stderr lead nowhere where the shell has closed them (`>&-`)."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # takes the lowest free number, which a file opened later would get
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(1, 'w')
    sys.stderr = sys.stderr or open(2, 'w')


sys.excepthook = uncaught
open_streams()


def mute_stdout():
    """Discard what is printed from here on, without an error even when Python exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())


def say(text):
    """Print a line of a long run, which goes on if nobody reads it or the disk is full."""
    try:
        print(text, flush=True)
    except OSError as error:
        mute_stdout()
        tell_name(f'stdout: {error.strerror}; going on without it')


def progress(what, items):
    """Yield the items, and print a line every few seconds."""
    start = time.time()
    last = start
    for n, item in enumerate(items, 1):
        yield item
        now = time.time()
        if now - last > 4:
            last = now
            left = (now - start) * (len(items) - n) / n
            say(f'{what}: {n / len(items):.0%}, {left:.0f} s left')


def as_command(script, *words):
    """A script of this project, which lies beside the one that runs, with words and paths after it,
    as a command line."""
    parts = []
    for word in ['python', Path(sys.argv[0]).parent / script, *words]:
        # Windows takes / in a path too, which needs no quotes
        part = str(word).replace(os.sep, '/')
        # a path that begins with "-" would be taken for an option
        if isinstance(word, Path) and part.startswith('-'):
            part = f'./{part}'
        parts.append(part)
    return shlex.join(parts)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, defaults in the help, and no abbreviated options."""

    def __init__(self, **how):
        # an abbreviation that works today may be ambiguous tomorrow
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                         **how)

    def add_argument(self, *flags, **how):
        if how.get('default') not in (None, '', argparse.SUPPRESS):
            how['help'] += ' [%(default)s]'
        return super().add_argument(*flags, **how)

    def error(self, message):
        if 'expected' in message and 'argument' in message:
            message += '; a value that begins with "-" is written with "=", as in --prompt=-x'
        elif message.startswith('unrecognized arguments') and ' -' not in message:
            message += '; each value goes after its option, as in --input FILE'
        fail(f'{message}  (-h lists the options)')


def number(kind, low, high):
    """An argparse type: an int or a float from low to high."""
    name = 'a whole number' if kind is int else 'a number'

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        # every comparison with nan is false, so nan is refused too
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f'{text[:40]!r} is not {name} from {low:,} to {high:,}')
        return value

    return parse


nonnegative_int = number(int, 0, 1_000_000_000)
positive_int = number(int, 1, 1_000_000_000)
fraction = number(float, 0, 1)
nonnegative = number(float, 0, 1_000_000_000)


def why_not(error):
    """Why an OSError kept a file from being written, and what to do about it."""
    reason = error.strerror or type(error).__name__
    if error.errno == errno.ENOSPC:
        return f'{reason}; make room on the disk'
    return f'{reason}; name another folder, one that you may write to'


def need(package, what):
    """Stop where an optional package is missing."""
    if importlib.util.find_spec(package.replace('-', '_')) is None:
        fail(f'{what} needs a package: pip install {package}')


def check_output(flag, path, suffix, overwrite):
    """Stop at a path that cannot be a file to write, or whose file would be replaced unasked."""
    # a slip such as `--film model.pt` would replace a model by a picture
    if Path(path).suffix != suffix:
        fail(f'{flag} {path}: the name must end in {suffix}')
    if os.path.isdir(path):
        fail(f'{flag} {path}: is a folder; give the name of a file')
    check_replace(path, overwrite, 'it would be overwritten')


def check_replace(path, overwrite, what):
    """Stop if `path` exists, unless --overwrite was given; `what` says what would be lost."""
    if os.path.exists(path) and not overwrite:
        fail(f'{path} exists: {what}; add --overwrite to replace it, or choose another name')


def write_whole(path, data):
    """Write bytes or an array completely or not at all: to a file beside it, then os.replace."""
    # in the same folder, as a rename is atomic only within one disk
    temporary = Path(f'{path}.tmp')
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, 'wb') as file:
            file.write(data)
            # flushed before the rename, or a power cut could leave an empty file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        fail(f'{path}: cannot be written: {why_not(error)}')
    finally:
        if os.path.exists(temporary):
            temporary.unlink()


# -----------------------------------------------------------------------------
# Tokenizers: a dict {name, pattern, tokens as latin-1 strings in rank order}

# BPE merges within a word, a digit or a run of punctuation, with at most one space before it; marks
# count as letters, or vowel signs would split the words of Hindi, Thai or Arabic, and so do joiners
# and soft hyphens
BPE_PIECES = (r' ?[\p{L}\p{M}\u00ad\u200c\u200d]+| ?\p{N}|'
              r' ?[^\s\p{L}\p{M}\p{N}\u00ad\u200c\u200d][^\s\p{L}\p{N}]*|\s+')
LONGEST_PIECE = 64
BYTES = [chr(i) for i in range(256)]
CHUNK = 1_000_000       # characters to encode at once
# the pieces that tokenizers of whole words split a text into; any other piece is unknown
WORDS = {
    'stories': r' [A-Za-z]+|\.',                                            # V is 109, L is 21
    'dates': r'[A-Z][a-z]{2,}|the | of |, |st|nd|rd|th|[-./ ]|\d',          # V is 48, L is 23
    # a word with the marks, apostrophes and hyphens inside it, or else a single character
    'words': (r" ?(?:[\p{L}\p{M}\p{N}\u00ad\u200c\u200d]+(?:['\u2019\u2010-][\p{L}\p{M}\p{N}]+)*"
              r"|[^ ])"),
    # pieces that may be several tokens each
    'bert': r'[^\W_]+|[^\w\s]|_',
}
PIECES = {name: regex.compile(pattern + '|[^ ]') for name, pattern in WORDS.items()}


def as_latin(token):
    """A token as JSON can hold it: each of its bytes as the character of the same number."""
    return token.encode().decode('latin-1')


def train_bpe(texts, size):
    """The tokens of byte-level BPE (arXiv:1508.07909), which merges the most frequent neighbors."""
    pieces = Counter()
    for chunk, _ in chunks_of(texts, 'counting words'):
        # tiktoken merges within the same pieces, and nowhere else
        pieces.update(regex.findall(BPE_PIECES, chunk))
    counts = Counter()
    for piece, n in pieces.items():
        # a line of ten million letters is not a word: every merge would scan all of it
        for start in range(0, len(piece), LONGEST_PIECE):
            counts[piece[start:start + LONGEST_PIECE]] += n
    times = list(counts.values())
    # a word is a string of symbols, each between two bars, so that a merge is a single str.replace
    bar = '\u0100'
    words = [bar + (bar + bar).join(as_latin(word)) + bar for word in counts]
    pairs = Counter()               # pair of neighboring symbols -> how often it occurs
    where = defaultdict(set)        # pair -> the words that have it

    def count_pairs(i, sign):
        symbols = words[i][1:-1].split(bar + bar)
        for pair in zip(symbols, symbols[1:]):
            pairs[pair] += sign * times[i]
            where[pair].add(i)

    for i in range(len(words)):
        count_pairs(i, 1)
    tokens = dict.fromkeys(BYTES)   # a set that keeps its order
    for wanted in progress('learning tokens', range(257, size - len(SPECIAL) + 1)):
        # different pairs may join to the same token
        while len(tokens) < wanted and pairs:
            best = max(pairs, key=pairs.get)
            # every word is one token already
            if pairs[best] == 0:
                pairs.clear()
                break
            # the bars tell |a|b| from a symbol that only ends in a, or begins with b
            first, second = best
            tokens[first + second] = None
            apart = f'{bar}{first}{bar}{bar}{second}{bar}'
            joined = f'{bar}{first}{second}{bar}'
            for i in where.pop(best):
                count_pairs(i, -1)
                words[i] = words[i].replace(apart, joined)
                count_pairs(i, 1)
            del pairs[best]
    return list(tokens)


def learn_words(name, texts, size):
    """The pieces of WORDS[name] that occur in texts, or the `size` most frequent ones."""
    counts = Counter()
    for text in texts:
        counts.update(split_words(name, text))
    return sorted(piece for piece, _ in counts.most_common(size))


def read_bert(path):
    """(pattern, tokens) of BERT's vocabulary file, a word or '##piece' per line."""
    tokens = {}
    for word in read_text(Path(path)).split():
        # '##ing' continues a word, 'the' begins one, here as ' the'
        token = word[2:] if word.startswith('##') else ' ' + word
        tokens[token] = None
    if not 0 < len(tokens) < 65532:
        fail(f'--tokenizer bert:{path}: {len(tokens)} words; there must be from 1 to 65531')
    # a regular expression takes the first alternative that fits: here the longest
    longest_first = sorted(tokens, key=len, reverse=True)
    return '|'.join(map(re.escape, longest_first)), list(tokens)


def read_gpt2():
    """(pattern, tokens) of GPT-2, which tiktoken downloads once."""
    import tiktoken
    try:
        gpt2 = tiktoken.get_encoding('gpt2')
    except Exception as error:      # requests, urllib3 and tiktoken raise dozens of kinds
        fail(f'gpt2 cannot be downloaded ({type(error).__name__}); check the network, '
             f'set TIKTOKEN_CACHE_DIR, or use --tokenizer bpe:8192')
    tokens = [gpt2.decode_single_token_bytes(i).decode('latin-1') for i in range(50256)]
    return gpt2._pat_str, tokens


def tokenizer_name(text):
    """An argparse type: a tokenizer for any text."""
    # ids are uint16, which ends at 65535
    if not re.fullmatch('gpt2|byte|bert:.+|(bpe|words):([1-9][0-9]{1,3}|[1-5][0-9]{4})', text):
        raise argparse.ArgumentTypeError(
            f'{text[:40]!r} is not gpt2, byte, bpe:N, words:N (N: 10 to 59999) or bert:vocab.txt')
    return text


def make_tokenizer(how, texts):
    """The tokenizer dict for gpt2, byte, bpe:N, words:N, bert:FILE, dates or stories."""
    name, _, size = how.partition(':')
    if name == 'gpt2':
        pattern, tokens = read_gpt2()
    elif name in ('byte', 'bpe'):
        pattern = BPE_PIECES
        tokens = train_bpe(texts, int(size)) if size else BYTES
    elif name == 'bert':
        pattern, words = read_bert(size)
        tokens = list(map(as_latin, words))
    else:
        # N counts the special tokens; stories and dates keep all of their pieces
        wanted = int(size) - len(SPECIAL) if size else None
        pattern = WORDS[name]
        tokens = list(map(as_latin, learn_words(name, texts, wanted)))
    return {'name': how, 'pattern': pattern, 'tokens': tokens}


def make_encoding(spec):
    """The tiktoken.Encoding of a tokenizer dict; SPECIAL are its last four ids."""
    import tiktoken
    # a lower rank is merged earlier, so the order of the tokens is the order of the merges
    ranks = {token.encode('latin-1'): i for i, token in enumerate(spec['tokens'])}
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL)}
    return tiktoken.Encoding(spec['name'], pat_str=spec['pattern'], mergeable_ranks=ranks,
                             special_tokens=special)


def split_words(name, text):
    """The pieces of a text, known or unknown, for a tokenizer of WORDS."""
    if name == 'bert':
        # lower case without accents, which NFD sets apart; each mark is a word, too
        text = unicodedata.normalize('NFD', text.lower())
        text = re.sub('[\u0300-\u036f]', '', text)
        return [' ' + word for word in re.findall(WORDS[name], text)]
    # the first word is the same token as any other, which has a space before it
    if name != 'dates' and text[:1].isalnum():
        text = ' ' + text
    return PIECES[name].findall(text)


def encode(encoding, text, unknown=None):
    """A text's token ids. What the tokenizer cannot write is an error that names it, unless it is
    to be counted in the Counter `unknown`."""
    name = encoding.name.partition(':')[0]
    if name not in WORDS:
        # bytes can write any text
        return encoding.encode_ordinary(text)
    ids = []
    for piece in split_words(name, text):
        try:
            ids.append(encoding.encode_single_token(piece))
            continue
        except KeyError:
            parts = encoding.encode_ordinary(piece) if name == 'bert' else []
        # tiktoken silently drops what fits no token; a mark may be one without its space
        if parts and encoding.decode(parts).strip() == piece.strip():
            ids += parts
        elif unknown is None:
            fail(f'{piece.strip() or piece!r} is not in the vocabulary of {encoding.name}')
        else:
            unknown[piece] += 1
    return ids


def decode(encoding, ids):
    """The text of token ids, without the space that `encode` put before the first word."""
    text = encoding.decode(ids)
    if encoding.name.partition(':')[0] in ('stories', 'words', 'bert'):
        return text.removeprefix(' ')
    return text


# -----------------------------------------------------------------------------
# dates: pairs with an exact metric, as each source has eight right answers
# ours: in no paper; it exposes a model that writes only one of the forms, or mixes two

def date_forms(iso):
    """The eight written forms of an ISO date; none of any other text."""
    try:
        date = datetime.date.fromisoformat(iso)
    except ValueError:
        return ()
    y = date.year
    m = date.month
    d = date.day
    month = calendar.month_name[m]
    short = calendar.month_abbr[m]
    ending = {1: 'st', 2: 'nd', 3: 'rd'}.get(d % 10, 'th')
    if d in (11, 12, 13):
        ending = 'th'
    nth = f'{d}{ending}'
    forms = [f'{month} {d}, {y}', f'the {nth} of {month} {y}', f'{d} {short} {y}', f'{m}/{d}/{y}']
    forms += [f'{d}.{m}.{y}', f'{month} {nth}, {y}', f'{d}-{short}-{y}', f'{month} the {nth}, {y}']
    return tuple(forms)


def dates():
    """(source, target) pairs: each day of 1900-2099 in each of its eight forms."""
    pairs = []
    for n in range(73049):
        day = datetime.date(1900, 1, 1) + datetime.timedelta(n)
        for form in date_forms(str(day)):
            pairs.append((str(day), form))
    return pairs


# -----------------------------------------------------------------------------
# stories: text with exact metrics; 7.9 million texts, each with a known probability
# ours: in no paper; the distribution of real text is unknown, so no metric can be exact there

GIRLS = 'Anna Clara Emma Julia Lucy Mary Nora Ruth'.split()
BOYS = 'Ben Jack Leo Max Paul Peter Sam Tom'.split()
THINGS = dict(zip(
    'apple ball berry book box cake coin egg key leaf pear stone'.split(),
    'apples balls berries books boxes cakes coins eggs keys leaves pears stones'.split()))
SINGULAR = {plural: thing for thing, plural in THINGS.items()}
QUALITIES = 'big good new old small'.split()
COLORS = 'black blue brown green red white'.split()
NUMBERS = ['', *'one two three four five six seven eight nine ten eleven twelve'.split()]

# the slots that are drawn uniformly
CHOICES = {
    'name': GIRLS + BOYS,
    'thing': list(THINGS),
    'adjective': QUALITIES + COLORS,
    'quality': QUALITIES,
    'place': 'bag boat drawer garden kitchen shed'.split(),
}
PLOTS = {
    'give': '{name} has {number} {adjective} {things}. {She} gives {change} to {other}. '
            'Now {she} has {result} {rest}.',
    'find': '{name} has {number} {things} in the {place}. {She} finds {change} more. '
            'Now {she} has {result} {rest}.',
    'share': '{name} and {other} have {number} {things} each. Together they have {result} {rest}. '
             '{happy} is happy.',
    'take': 'There {are} {number} {quality} {things} in the {place}. '
            '{name} takes {change} for {other}. {Result} {rest} {remain} left.',
}
STORY_PATTERNS = {plot: re.sub('{(.+?)}', r'(?P<\1>[A-Za-z]+)', template.replace('.', r'\.'))
                  for plot, template in PLOTS.items()}
# for each plot {number: {change: result}}, all of them from one to twelve
SUMS = {plot: {} for plot in PLOTS}
for first, second in product(range(1, 13), repeat=2):
    results = {'give': first - second, 'find': first + second, 'take': first - second}
    # the other one has as many
    if first == second:
        results['share'] = first + second
    for plot, result in results.items():
        if 1 <= result <= 12:
            SUMS[plot].setdefault(first, {})[second] = result


def write_story(story):
    """The text of a dict of slots, such as `read_story` returns."""
    words = dict(story)
    for slot in ('number', 'change', 'result'):
        words[slot] = NUMBERS[story[slot]]
    # what has to agree: pronoun, plurals and verbs
    words['she'] = 'she' if story['name'] in GIRLS else 'he'
    words['She'] = words['she'].title()
    words['Result'] = words['result'].title()
    thing = story['thing']
    for slot, noun, verb in (('number', 'things', 'are'), ('result', 'rest', 'remain')):
        one = story[slot] == 1
        words[noun] = thing if one else THINGS[thing]
        words[verb] = 'is' if one else 'are'
    return PLOTS[story['plot']].format(**words)


def draw_story(rng):
    """Sample one text, rng a random.Random. All that is drawn is drawn uniformly: the plot, its
    first number, then the second, each slot of CHOICES, two different names, who is happy."""
    plot = rng.choice(list(PLOTS))
    number, results = rng.choice(list(SUMS[plot].items()))
    change, result = rng.choice(list(results.items()))
    # slots that the plot does not have are drawn and ignored
    story = {slot: rng.choice(choices) for slot, choices in CHOICES.items()}
    story.update(plot=plot, number=number, change=change, result=result)
    people = rng.sample(CHOICES['name'], 2)
    story['name'], story['other'] = people
    story['happy'] = rng.choice(people)
    return write_story(story)


def read_story(text):
    """The slots of a well-formed story as a dict: plot, name, thing, number (the first), change,
    result, ..., and `right`: whether the sum is. None where words or their agreement are wrong."""
    for plot, pattern in STORY_PATTERNS.items():
        found = re.fullmatch(pattern, text)
        if not found:
            continue
        story = {'plot': plot, **found.groupdict()}
        story['thing'] = SINGULAR.get(story['things'], story['things'])
        # in `share` the second number is not written; in `take` the result begins a sentence
        story.setdefault('change', story['number'])
        story.setdefault('result', story.get('Result', '').lower())
        others = set(CHOICES['name']) - {story['name']}
        allowed = {**CHOICES, 'other': others, 'happy': [story['name'], story.get('other')],
                   'number': NUMBERS, 'change': NUMBERS, 'result': NUMBERS}
        for slot, choices in allowed.items():
            if slot in story and story[slot] not in choices:
                return None
        for slot in ('number', 'change', 'result'):
            story[slot] = NUMBERS.index(story[slot])
        results = SUMS[plot].get(story['number'], {})
        story['right'] = results.get(story['change']) == story['result']
        # if pronouns, plurals and verbs agree, writing the slots gives the same text
        return story if write_story(story) == text else None
    return None


def story_ways(plot):
    """In how many ways a plot's slots other than its numbers can be filled."""
    ways = {slot: len(words) for slot, words in CHOICES.items()}
    ways.update(other=ways['name'] - 1, happy=2)
    # {things} is the slot `thing`
    return math.prod(n for slot, n in ways.items() if '{' + slot in PLOTS[plot])


def story_probability(plot, number):
    """The exact probability of each right text of this plot and first number."""
    numbers = len(SUMS[plot])
    changes = len(SUMS[plot][number])
    return 1 / numbers / changes / len(PLOTS) / story_ways(plot)


def expected_seen(n_train):
    """The fraction of samples that also occur among n_train independent ones: the sum over all
    texts of p (1 - (1 - p)^n)."""
    seen = 0.0
    for plot, sums in SUMS.items():
        for number, results in sums.items():
            p = story_probability(plot, number)
            texts = len(results) * story_ways(plot)
            seen += texts * p * -math.expm1(n_train * math.log1p(-p))
    return seen


def entropy(weights):
    """Entropy in nats of a dict of counts or probabilities."""
    total = sum(weights.values())
    return sum(w / total * math.log(total / w) for w in weights.values() if w > 0)


def jensen_shannon(p, q):
    """Jensen-Shannon divergence in nats of two dicts of counts or probabilities."""
    # H((p + q) / 2) - (H(p) + H(q)) / 2
    middle = Counter()
    for weights in (p, q):
        total = sum(weights.values())
        for key, weight in weights.items():
            middle[key] += weight / total / 2
    return entropy(middle) - (entropy(p) + entropy(q)) / 2


def story_metrics(texts):
    """Exact metrics of a list of texts, a dict of floats.
    well_formed, valid, unique: fractions of all texts. Over the valid ones, slot_entropy: entropy
    of plot, name, thing and number relative to the true one, averaged; slot_divergence:
    Jensen-Shannon to the true (plot, number) and (plot, thing) in nats, averaged."""
    parsed = [story for story in map(read_story, texts) if story]
    valid = [story for story in parsed if story['right']]
    n = max(1, len(texts))
    metrics = {
        'well_formed': len(parsed) / n,
        'valid': len(valid) / n,
        'slot_entropy': 0.0,
        'slot_divergence': math.log(2),
        'unique': len(set(texts)) / n,
    }
    # without any text: entropy 0, and the largest divergence there is
    if not valid:
        return metrics
    plots = [story['plot'] for story in valid]
    ratios = [entropy(Counter(plots)) / math.log(len(PLOTS))]
    divergence = {}
    for slot in ('name', 'thing', 'number'):
        # the exact distributions of the slot, and of plot and slot
        true = Counter()
        joint = {}
        for plot in PLOTS:
            values = SUMS[plot] if slot == 'number' else CHOICES[slot]
            for value in values:
                joint[plot, value] = 1 / len(PLOTS) / len(values)
                true[value] += joint[plot, value]
        found = [story[slot] for story in valid]
        ratio = entropy(Counter(found)) / entropy(true)
        ratios.append(ratio)
        divergence[slot] = jensen_shannon(Counter(zip(plots, found)), joint)
    metrics['slot_entropy'] = sum(ratios) / len(ratios)
    metrics['slot_divergence'] = (divergence['number'] + divergence['thing']) / 2
    return metrics


def stories(n=150_000):
    """n sampled texts, always the same ones; frequent texts occur more than once."""
    rng = random.Random(0)
    return [draw_story(rng) for _ in range(n)]


# -----------------------------------------------------------------------------
# Data sets; what is not set here is chosen to suit the text

PARQUET = 'refs/convert/parquet'    # a branch of the hub; `datasets` no longer runs scripts
SETS = {
    # these need no network
    'stories': dict(source='draw_story of prepare_data.py', rows=True, tokenizer='stories',
                    length=21),
    'dates': dict(source='all days of 1900-2099', rows=True, tokenizer='dates', length=23),
    # rows of these columns
    'captions': dict(source='sentence-transformers/flickr30k-captions', config='pair', rows=True,
                     columns=('caption1', 'caption2'), tokenizer='words:2000'),
    'snli': dict(source='stanfordnlp/snli', rows=True, columns=('hypothesis',),
                 tokenizer='words:2000'),
    'qqp': dict(source='nyu-mll/glue', config='qqp', rows=True, columns=('question1', 'question2'),
                tokenizer='words:2000'),
    # rows of the lines of the column `text`
    'shakespeare': dict(source='karpathy/tiny_shakespeare', revision=PARQUET, rows=True,
                        tokenizer='words:2000'),
}
SETS |= {
    # documents of the column `text`; `val` is about the usual test set. lm1b and owt have FLM's
    # lengths, but not its tokenizer for lm1b, bert:vocab.txt; ours: the others, for a laptop
    'tinystories': dict(source='roneneldan/TinyStories', val=0.01, tokenizer='bpe:4096',
                        length=128),
    'text8': dict(source='afmck/text8', split='train+validation+test', val=0.05,
                  tokenizer='byte', length=256),
    'wikitext': dict(source='Salesforce/wikitext', config='wikitext-103-raw-v1',
                     split='train+validation', val=0.002, tokenizer='gpt2', length=128),
    'lm1b': dict(source='billion-word-benchmark/lm1b', revision=PARQUET, val=0.01,
                 tokenizer='gpt2', length=128),
    'owt': dict(source='Skylion007/openwebtext', val=0.01, tokenizer='gpt2', length=1024),
}


def load_hub(name, cache, left_out):
    """The texts or pairs of a set of the hub, or a column of documents, which stays on the disk."""
    need('datasets', name)
    import datasets
    hub = SETS[name]
    say(f'reading {hub["source"]}, from the hub or from {cache} ...')
    logging.disable()               # the hub's client reports each of its retries
    try:
        table = datasets.load_dataset(
            hub['source'], hub.get('config'), split=hub.get('split', 'all'),
            revision=hub.get('revision'), cache_dir=str(cache))
    except Exception as error:      # the library and the hub's client raise dozens of kinds
        fail(f'{hub["source"]} cannot be loaded from the hub ({type(error).__name__}: '
             f'{str(error)[:200]}); check network and disk, or give files of your own with --input')
    if 'columns' in hub:
        items = read_records(hub['source'], table, [hub['columns']], left_out)
        # two captions of an image are two texts
        return list(chain.from_iterable(items)) if name == 'captions' else items
    if name == 'lm1b':
        # a small table is done before other processes have started
        many = os.cpu_count() if len(table) > 10_000 else None
        table = table.map(lambda row: {'text': detokenize(row['text'] or '')}, num_proc=many)
    if hub.get('rows'):
        return [line for text in table['text'] for line in text.split('\n')]
    return table['text']


def detokenize(text):
    """LM1B's words as running text: 'It \'s " $ 5 " ( not 6 ) .' -> It's "$5" (not 6)."""
    # no space before a clitic or a mark that follows a word, nor after one that comes before a word
    text = re.sub(r" (?='\w|[,.;:?!%)\]])|(?<=[(\[$£]) ", '', text)
    text = re.sub(r'" ([^"]*?) "', r'"\1"', text)
    return text.replace(' / ', '/')


# -----------------------------------------------------------------------------
# Files: text by any name, .json, .jsonl, .csv, .tsv, .parquet, each plain or compressed. Not read
# by `datasets`, which turns the text "1987-03-23" into a timestamp and "007" into a number

# files that begin with these bytes are decompressed, whatever their names
COMPRESSED = {b'\x1f\x8b': gzip, b'BZh9': bz2, b'\xfd7zXZ': lzma}
# what is not UTF-8 is known by its mark; the mark of UTF-32 begins with that of UTF-16
MARKS = {codecs.BOM_UTF32_LE: 'utf-32', codecs.BOM_UTF32_BE: 'utf-32',
         codecs.BOM_UTF16_LE: 'utf-16', codecs.BOM_UTF16_BE: 'utf-16'}
# and these are not text
SIGNATURES = {b'(\xb5/\xfd': 'compressed with zstd; unpack it',
              b'PK\3\4': 'a zip; unpack it, or save it as text',
              b'%PDF': 'a PDF; save it as text',
              b'PAR1': 'parquet; let its name end in .parquet'}
# the columns that are read where --columns names none: source and target, or texts
COLUMNS = [names.split() for names in (
    'src trg', 'src tgt', 'source target', 'question1 question2', 'prompt completion',
    'prompt response', 'query response', 'question answer', 'text')]


def list_files(names):
    """The files of --input, each once; a folder stands for the files in it that are not hidden."""
    def stop(error):
        fail(f'{error.filename}: cannot be read ({error.strerror})')

    files = []
    for name in names:
        if not os.path.isdir(name):
            files.append(Path(name))
            continue
        found = []
        for place, folders, inside in os.walk(name, onerror=stop):
            folders[:] = [folder for folder in folders if not folder.startswith('.')]
            found += [Path(place, file) for file in inside if not file.startswith('.')]
        files += sorted(found)
    return list(dict.fromkeys(files))


def suffix_of(path):
    """The extension of a file's name in lower case, that before .gz and the like."""
    name = re.sub(r'\.(gz|bz2|xz)$', '', path.name.lower())
    return Path(name).suffix


def read_bytes(path):
    """The bytes of a file, decompressed if they are compressed."""
    try:
        data = path.read_bytes()
        for start, module in COMPRESSED.items():
            if data.startswith(start):
                data = module.decompress(data)
        return data
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, 'strerror', None) or 'not a whole compressed file'
        fail(f'{path}: cannot be read ({reason})')


def read_text(path):
    """A file's text, without a byte-order mark, all line ends as \\n."""
    data = read_bytes(path)
    marked = (name for mark, name in MARKS.items() if data.startswith(mark))
    try:
        # Windows may mark UTF-8, too
        text = data.decode(next(marked, 'utf-8-sig'))
        if '\0' not in text:
            return text.replace('\r\n', '\n').replace('\r', '\n')
        before = data[:data.index(0)]
    except UnicodeDecodeError as error:
        before = error.object[:error.start]
    for start, what in SIGNATURES.items():
        if data.startswith(start):
            fail(f'{path}: is {what}')
    problem = 'not UTF-8; convert it, with iconv for example'
    if b'\0' in data:
        problem = 'has a NUL character, so it is not text in UTF-8'
    line = before.count(b'\n') + 1
    fail(f'{path}, line {line}: {problem}')


def read_json(path, known):
    """The records of JSON Lines, or of one array."""
    text = read_text(path).strip()
    # lines are joined to an array, in which the position of an error has its line
    if not text.startswith('['):
        text = '[' + re.sub(r'\n(\s*)', r',\n\1', text) + ']'
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, 'lineno', 1)
        fail(f'{path}, line {line}: not JSON; give one record a line, or an array of them')


def read_table(path, known):
    """The records of a .csv or .tsv; without names of columns a .tsv holds sources and targets."""
    text = read_text(path)
    first = text.partition('\n')[0]
    # where the comma is a decimal point, cells are separated by semicolons
    delimiter = '\t' if suffix_of(path) == '.tsv' else max(',;', key=first.count)
    # spreadsheets quote whole cells; any other quote in a .tsv is a character of the text
    quoted = [cell for cell in re.split('[\t\n]', text) if '"' in cell]
    whole = all(re.fullmatch('"([^"]|"")*"', cell) for cell in quoted)
    quoting = csv.QUOTE_MINIMAL if whole or delimiter != '\t' else csv.QUOTE_NONE
    names = None
    cells = first.replace('"', '').split('\t')
    if delimiter == '\t' and len(cells) == 2 and not find_columns(cells, known):
        names = ['source', 'target']
    csv.field_size_limit(10 ** 9)
    reader = csv.DictReader(io.StringIO(text), names, delimiter=delimiter, quoting=quoting)
    records = []
    for record in reader:
        # DictReader puts cells that are too many under None, and None for those that are missing
        if None in record or None in record.values():
            names = ', '.join(reader.fieldnames)
            fail(f'{path}, line {reader.line_num}: needs one cell per column: {names}')
        records.append(record)
    return records


def read_parquet(path, known):
    """The records of a .parquet."""
    need('pyarrow', path)
    from pyarrow import ArrowException, parquet
    try:
        return parquet.read_table(io.BytesIO(read_bytes(path))).to_pylist()
    except (ArrowException, OSError):
        fail(f'{path}: damaged, or not parquet; download it again')


READERS = {'.jsonl': read_json, '.ndjson': read_json, '.json': read_json, '.csv': read_table,
           '.tsv': read_table, '.parquet': read_parquet}


def find_columns(names, known):
    """The first of the known columns, one of texts or two of pairs, that are all among names."""
    return next((columns for columns in known if set(columns) <= set(names)), None)


def read_records(source, records, known, left_out):
    """The texts, or the pairs of texts, in the records of a file or a table."""
    items = []
    columns = None
    for n, record in enumerate(records, 1):
        where = f'{source}, record {n}'
        if not isinstance(record, dict):
            fail(f'{where}: not a record, such as {{"text": "..."}}')
        # the first record decides
        columns = columns or find_columns(record, known)
        if not columns:
            found = ', '.join(map(str, record))
            wanted = ' and '.join(known[-1])
            fail(f'{where}: has the columns {found}; needs {wanted}, or name one or two with '
                 f'--columns')
        # null is an empty text
        texts = ['' if record.get(column) is None else record[column] for column in columns]
        for text in texts:
            # JSON can write "\\u0000", and half of an emoji, "\\ud83d"
            if not isinstance(text, str) or re.search('[\0\ud800-\udfff]', text):
                fail(f'{where}: has a value that is not text: {text!r:.60}')
        # of Quora's pairs only those labeled as asking the same
        label = record.get('label', record.get('is_duplicate', 1))
        if columns[0] == 'question1' and str(label) not in ('1', 'True'):
            left_out['labeled as different'] += 1
        else:
            items.append(tuple(texts) if len(texts) == 2 else texts[0])
    return items


def read_files(args, left_out):
    """The documents, texts or pairs of --input."""
    files = list_files(args.input)
    # a README among records would be read as text
    kinds = {READERS.get(suffix_of(path)) for path in files}
    if len(kinds) > 1:
        fail('--input: mixes text and tables, or tables of two kinds; give files of one kind')
    reader = next(iter(kinds), None)
    known = [args.columns] if args.columns else COLUMNS
    # with --rows a text is a line of a file, or a whole file of a folder
    by_line = args.rows and not any(map(os.path.isdir, args.input))
    items = []
    for path in files:
        if reader:
            items += read_records(path, reader(path, known), known, left_out)
            continue
        if args.columns:
            fail(f'--columns: {path} is text, which has no columns')
        text = read_text(path)
        for part in text.removesuffix('\n').split('\n') if by_line else [text]:
            # blank ones are counted
            items += split_documents(part) or ['']
    if len({type(item) for item in items}) > 1:
        fail('--input: mixes pairs and texts; give files of one kind')
    return items


# -----------------------------------------------------------------------------
# Rows, one text or pair each, and streams, documents one after another

def as_texts(item):
    """The texts of an item: of a pair both; the hub's null is an empty text."""
    return item if isinstance(item, tuple) else (item or '',)


def all_texts(items):
    """Yield the texts of all items."""
    return chain.from_iterable(map(as_texts, items))


def clean_items(items, keep_duplicates, left_out):
    """The items without empty ones and, unless they are wanted, duplicates, which are counted."""
    full = [item for item in items if all(map(str.strip, as_texts(item)))]
    left_out['empty'] = len(items) - len(full)
    if keep_duplicates:
        return full
    unique = list(dict.fromkeys(full))
    left_out['duplicate'] = len(full) - len(unique)
    return unique


def choose_tokenizer(items, kind):
    """The --tokenizer that suits the text, for those who name none."""
    texts = list(all_texts(items))
    if kind == 'rows':
        words = set(learn_words('words', texts, 2000 - len(SPECIAL)))
        kept = sum(all(words.issuperset(split_words('words', text)) for text in as_texts(item))
                   for item in items)
        # ours: a small network learns whole words better than subwords, if enough is left: a
        # quarter of the texts or pairs, and four for each word, so that it has several contexts
        if kept >= max(len(items) / 4, 4 * len(words)):
            return 'words:2000'
    # ours: a vocabulary so small that even its rarest tokens occur a few dozen times
    characters = sum(map(len, texts))
    for size in (2048, 1024, 512):
        if characters >= 400 * size:
            return f'bpe:{size}'
    return 'byte'


def has_short_lines(texts):
    """Whether the lines of these texts are those of verse, names or messages, not of prose."""
    lines = chain.from_iterable(text[:100_000].split('\n') for text in texts)
    sizes = [len(line) for line in islice(lines, 10_000) if line.strip()]
    # prose is wrapped at some seventy characters, or not at all
    return bool(sizes) and np.median(sizes) < 55


def choose_length(sizes):
    """The length of rows that suits texts of so many tokens."""
    # ours: up to 32 tokens cost little; beyond that the longest 5% are not worth what they cost
    longest = max(sizes, default=0)
    if longest > 32:
        longest = min(128, int(np.quantile(sizes, 0.95, method='higher')))
    return max(4, longest)


def of_one_kind(items):
    """Whether both sides of pairs are of one kind, as in paraphrases: some texts are on both."""
    pairs = [item for item in items if isinstance(item, tuple) and item[0] != item[1]]
    sources = {source for source, _ in pairs}
    targets = {target for _, target in pairs}
    # those of labels, answers and translations hardly ever are
    return len(sources & targets) > 0.01 * max(len(sources), len(targets))


def split_items(items, held_out, left_out):
    """(train, val) of texts or pairs: held out is a random fraction of the different ones. No text
    or source is in both, and of paraphrases no target either, unless it is very common."""
    # all targets of a source stay together, so that targets are distributed alike in both
    groups = [as_texts(item)[0] for item in items]
    # of a few labels as sources none can be spared: single pairs are held out
    if len(items) > 20 * len(set(groups)):
        groups = items
    different = list(dict.fromkeys(groups))
    random.Random(0).shuffle(different)
    n_held = max(1, int(held_out * len(different)))
    held = set(different[:n_held])
    val = [item for item, group in zip(items, groups) if group in held]
    train = [item for item, group in zip(items, groups) if group not in held]
    if of_one_kind(items):
        # replies as common as an "ok" stay in both
        common = max(10, 0.001 * len(items))
        counts = Counter(all_texts(items))
        seen = {text for text in all_texts(val) if counts[text] <= common}
        apart = [item for item in train if seen.isdisjoint(item)]
        # where nearly all pairs are linked, as in some chats, too few would be left
        if len(apart) > 0.7 * len(train):
            train = apart
    left_out['with a text that is held out'] = len(items) - len(train) - len(val)
    return train, val


def pack_rows(encoding, items, length=0):
    """Texts or pairs -> (flat ids of whole rows, how many tokens each item needs), without those
    that are longer or that the tokenizer cannot write; length 0: what suits."""
    eos, pad, sep = (encoding.encode_single_token(name) for name in SPECIAL[:3])
    parts = []
    for item in progress('encoding', items):
        unknown = Counter()
        ids = [encode(encoding, text, unknown) for text in as_texts(item)]
        given = ids[0] + [sep] if len(ids) == 2 else []
        if not unknown:
            parts.append((given, ids[-1] + [eos]))
    sizes = [len(given) + len(text) for given, text in parts]
    length = length or choose_length(sizes)
    parts = [part for part, size in zip(parts, sizes) if size <= length]
    rows = np.full((len(parts), length), pad, '<u2')
    for row, (given, text) in zip(rows, parts):
        row[:len(given)] = given
        # the texts of pairs end alike, whatever the length of their source
        end = length if given else len(text)
        row[end - len(text):end] = text
    return rows.reshape(-1), sizes


def prepare_rows(args, items, encoding, left_out):
    """Texts or pairs, each in a row -> (train ids, val ids, length)."""
    train_items, val_items = split_items(items, args.val, left_out)
    train, sizes = pack_rows(encoding, train_items, args.length)
    length = args.length or choose_length(sizes)
    val, val_sizes = pack_rows(encoding, val_items, length)
    sizes += val_sizes
    left_out['with unknown words or characters'] = len(train_items + val_items) - len(sizes)
    left_out['too long'] = sum(size > length for size in sizes)
    return train, val, length


def split_documents(text):
    """The documents of a text, each ended by <|endoftext|>, without blank ones."""
    return [part for part in text.split('<|endoftext|>') if part.strip()]


def chunks_of(texts, what):
    """Yield (some CHUNK characters, whether they end a document); of a blank text ('', False)."""
    for text in progress(what, texts):
        for document in split_documents(text or '') or ['']:
            # cut before white space, which no piece crosses
            chunks = re.findall(rf'.{{1,{CHUNK}}}\s*\S*', document, re.DOTALL) or ['']
            for n, chunk in enumerate(progress(f'{what} of one document', chunks), 1):
                yield chunk, chunk != '' and n == len(chunks)


def prepare_stream(args, texts, encoding, left_out):
    """A list or a column of documents -> (train ids, val ids: the end, length), memory-mapped."""
    eos = encoding.encode_single_token('<eos>')
    unknown = Counter()
    file = tempfile.TemporaryFile()
    for chunk, is_end in chunks_of(texts, 'encoding'):
        left_out['empty'] += not chunk
        ids = encode(encoding, chunk, unknown)
        if is_end:
            ids.append(eos)
        file.write(np.array(ids, '<u2').tobytes())
    file.flush()
    left_out['unknown words or characters'] = unknown.total()
    ids = np.memmap(file, '<u2', 'r')
    start = len(ids) - int(args.val * len(ids))
    return ids[:start], ids[start:], args.length or 32


# -----------------------------------------------------------------------------
# Data folders

def checksum(meta, *ids):
    """CRCs of what a data folder holds; of files from 256 MB on of their length, to start fast."""
    about = json.dumps({**meta, 'crc': 0})
    sums = [zlib.crc32(about.encode())]
    for x in ids:
        small = len(x) < 134_217_728
        sums.append(zlib.crc32(x if small else str(len(x)).encode()))
    return sums


def save_dataset(folder, train, val, spec, kind, pairs, length, source, overwrite=True):
    """folder/{train,val}.bin, then meta.json: a folder that has a meta.json is complete.
    train, val: flat ids; spec: the tokenizer dict. Only `overwrite` replaces other data."""
    folder = Path(folder)
    train = np.ascontiguousarray(train, '<u2')
    val = np.ascontiguousarray(val, '<u2')
    V = len(spec['tokens'])
    meta = {
        'format': FORMAT,
        'name': folder.name,
        'vocab': V + len(SPECIAL),
        'kind': kind,
        'pairs': pairs,
        'length': length,
        'source': source,
        'special': {name: V + i for i, name in enumerate(SPECIAL)},
        'train_tokens': len(train),
        'val_tokens': len(val),
        'tokenizer': spec,
    }
    meta['crc'] = checksum(meta, train, val)
    old = read_dataset(folder)
    if old and old[0]['crc'] != meta['crc']:
        about = '{train_tokens:,} tokens, {kind} of {length}, from {source}'.format(**old[0])
        check_replace(folder, overwrite, about)
    # meta.json is last: a folder without it, or with one that does not fit, does not count
    write_whole(folder / 'train.bin', train)
    write_whole(folder / 'val.bin', val)
    write_whole(folder / 'meta.json', json.dumps(meta).encode())


def command_for(folder):
    """The command that prepares a folder, or for own text the help."""
    if folder.name not in SETS:
        return as_command('prepare_data.py', '-h')
    return as_command('prepare_data.py', folder.name, '--data', folder.parent)


def read_dataset(folder):
    """(meta dict, train ids, val ids) of a folder; None if it is damaged or of another format."""
    try:
        meta = json.loads((folder / 'meta.json').read_bytes())
        train = np.memmap(folder / 'train.bin', dtype='<u2', mode='r')
        val = np.memmap(folder / 'val.bin', dtype='<u2', mode='r')
        # a flipped bit would be trained on silently
        if meta['format'] == FORMAT and meta['crc'] == checksum(meta, train, val):
            return meta, train, val
    except (OSError, ValueError, KeyError, TypeError) as error:
        if out_of_memory(error):
            raise
    return None


def load_dataset(folder):
    """data/<name> -> (meta dict, train ids, val ids), ids memory-mapped uint16."""
    folder = Path(folder)
    if os.path.isfile(folder):
        command = as_command('prepare_data.py', 'mine', '--input', folder)
        fail(f'{folder} is a file, not a folder of prepared data; run: {command}')
    if not os.path.isfile(folder / 'meta.json'):
        # a name without its folder, or a path that was right in another folder
        near = Path('data') / folder.name
        if os.path.isfile(near / 'meta.json'):
            fail(f'{folder} holds no prepared data, but {near} does; add --data {near}')
        fail(f'{folder} holds no prepared data; name another folder with --data, or run: '
             f'{command_for(folder)}')
    dataset = read_dataset(folder)
    if dataset is None:
        fail(f'{folder} is damaged or of another version; prepare it again: {command_for(folder)}')
    return dataset


def newest_dataset():
    """The folder of the data set that was prepared last."""
    found = list(Path('data').glob('*/meta.json'))
    if not found:
        command = as_command('prepare_data.py', 'stories')
        fail(f'data holds no prepared data; first run: {command}')
    return max(found, key=os.path.getmtime).parent


# -----------------------------------------------------------------------------
# Rows -> texts, and metrics of them

def as_rows(ids, length):
    """Flat ids of a .bin file -> its whole rows (n, L), int64."""
    # what is left at the end fills no row
    whole = ids[:len(ids) // length * length]
    return np.array(whole, dtype=np.int64).reshape(-1, length)


def split_rows(rows, meta):
    """Rows (B, L), with .tolist() -> per row (ids of the source, ids of the text). The text ends
    before its <eos> or <pad>; that of a stream goes on to the end of the row."""
    eos, pad, sep, _ = meta['special'].values()
    parts = []
    for row in rows.tolist():
        source = []
        if meta['pairs']:
            source = row[:row.index(sep)]
            row = row[len(source) + 1:]
            while row[:1] == [pad]:
                row = row[1:]
        if meta['kind'] == 'rows':
            ends = [row.index(end) for end in (eos, pad) if end in row]
            row = row[:min(ends, default=len(row))]
        parts.append((source, row))
    return parts


def to_texts(rows, meta, encoding=None):
    """Rows (B, L), with .tolist() -> list of (source, text); the source is '' but for pairs."""
    encoding = encoding or make_encoding(meta['tokenizer'])
    parts = split_rows(rows, meta)
    return [(decode(encoding, source), decode(encoding, text)) for source, text in parts]


# scripts without spaces: Thai, Lao, Burmese, Khmer, kana and signs beside them, Chinese, wide signs
UNSPACED = (r'[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3001-\u30ff\u31f0-\u31ff\u3400-\u9fff'
            r'\uf900-\ufaff\uff01-\uff9f\U00020000-\U0003ffff]')


def words_of(text):
    """Runs of letters in lower case, each character of scripts without spaces; not <eos>."""
    text = re.sub('|'.join(SPECIAL), ' ', text.casefold())
    text = re.sub(UNSPACED, r' \g<0> ', text)
    return regex.findall(r'[\p{L}\p{M}]+', text)


@functools.lru_cache(maxsize=4)
def corpus_words(folder, limit=5_000_000):
    """The words in the first training tokens of a data folder; none of a text without spaces."""
    meta, train, _ = load_dataset(folder)
    encoding = make_encoding(meta['tokenizer'])
    words = words_of(decode(encoding, train[:limit]))
    # words have 2 to 8 letters on average, from Korean to Finnish; DNA has more, Chinese one
    letters = sum(map(len, words))
    return set(words) if 2 * len(words) <= letters <= 12 * len(words) else set()


def is_stories(meta):
    """Whether data are the set `stories`: each text can be checked, and settings are its own."""
    return meta['tokenizer']['name'] == 'stories'


def sanity_metrics(rows, meta, data=''):
    """Metrics that tell text from noise, for rows (B, L): a dict of floats.
    dates: fraction of valid rows (one of the eight forms of their source), entropy of the forms
    over ln 8. stories: see story_metrics. Else: entropy of a row's tokens (nats), fractions of
    unique rows and of words that occur in the folder `data`, if it exists and has words."""
    texts = to_texts(rows, meta)
    if meta['tokenizer']['name'] == 'dates':
        forms = [(date_forms(source), text) for source, text in texts]
        used = Counter(allowed.index(text) for allowed, text in forms if text in allowed)
        valid = used.total() / len(texts)
        return {'valid': valid, 'form_entropy': entropy(used) / math.log(8)}
    if is_stories(meta):
        metrics = story_metrics([text for _, text in texts])
        del metrics['slot_divergence']
        return metrics
    entropies = [entropy(Counter(ids)) for _, ids in split_rows(rows, meta)]
    metrics = {'entropy': sum(entropies) / len(entropies)}
    metrics['unique'] = len(set(texts)) / len(texts)
    if data and os.path.isfile(Path(data) / 'meta.json'):
        vocabulary = corpus_words(str(data))
        if vocabulary:
            words = words_of(' '.join(text for _, text in texts))
            found = sum(word in vocabulary for word in words)
            metrics['words'] = found / max(1, len(words))
    return metrics


# -----------------------------------------------------------------------------
# The script

def parse(argv=None):
    """The options."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add('name', nargs='?', default='stories', metavar='NAME',
        help=f'{", ".join(SETS)}, or any name for your own --input')
    add('--input', nargs='+', metavar='FILE',
        help='text by any name, .json, .jsonl, .csv, .tsv or .parquet, each also as .gz, .bz2 or '
             '.xz, or folders of them')
    add('--columns', nargs='+', metavar='NAME',
        help='of records, one column of texts, or two of sources and targets; "text", or two of '
             'usual names, such as src and trg')
    add('--rows', action='store_true',
        help='each line or record is a text of its own, or each text file of a folder')
    add('--tokenizer', type=tokenizer_name,
        help='gpt2, bpe:N, words:N (rows with other words are left out), byte, or bert:vocab.txt '
             '(lower case without line breaks); default: what suits the text')
    add('--length', type=number(int, 4, 65536),
        help='tokens per row; default: 32, for rows, what fits 95%% of the texts, at most 128')
    add('--val', type=number(float, 0.0001, 0.9999),
        help='fraction held out, of a stream its end; default: 0.1, for most sets of the hub less')
    add('--data', default='data', help='the folder that receives NAME/')
    add('--overwrite', action='store_true', help='replace other data in NAME/')
    args = parser.parse_args(argv)
    # a data set's own settings, unless others were given
    own = SETS.get(args.name, {})
    args.rows = args.rows or own.get('rows', False)
    args.tokenizer = args.tokenizer or own.get('tokenizer', '')
    args.length = args.length or own.get('length', 0)
    args.val = args.val or own.get('val', 0.1)
    return args


def check(args):
    """Reject invalid options before anything is read."""
    # a file's name may stand where NAME belongs
    files = args.input or [args.name if os.path.exists(args.name) else 'FILE']
    mine = as_command('prepare_data.py', 'mine', '--input', *map(Path, files))
    if args.name not in SETS and not args.input:
        fail(f'{args.name}: not one of {", ".join(SETS)}; for your own text: {mine}')
    if args.name in ('stories', 'dates') and (
            args.input or args.columns or args.tokenizer != args.name):
        fail(f'{args.name} takes no --input, --columns or --tokenizer; for your own text: {mine}')
    if not re.fullmatch(r'(?!cache$)\w[\w.-]*', args.name, re.IGNORECASE):
        fail(f'NAME {args.name!r}: use letters, digits, "_", "-" and "."; "cache" is reserved')
    if args.columns and (len(args.columns) > 2 or not args.input):
        fail('--columns: needs --input, and one column (texts) or two (pairs)')


def main(argv=None):
    args = parse(argv)
    check(args)
    start = time.time()
    folder = Path(args.data) / args.name

    left_out = Counter()            # how many items, by the reason
    source = SETS.get(args.name, {}).get('source')
    if args.input:
        source = ' '.join(Path(name).name for name in args.input)
        items = read_files(args, left_out)
    elif args.name == 'stories':
        items = stories()
    elif args.name == 'dates':
        items = dates()
    else:
        items = load_hub(args.name, Path(args.data) / 'cache', left_out)
    if not any(map(str.strip, all_texts(items))):
        fail(f'{source}: holds no text')
    pairs = isinstance(items[0], tuple)
    kind = 'rows' if pairs or args.rows else 'stream'
    if kind == 'rows':
        items = clean_items(items, args.name == 'stories', left_out)

    tokenizer = args.tokenizer or choose_tokenizer(items, kind)
    if kind == 'stream' and tokenizer.startswith('words:'):
        fail(f'--tokenizer {tokenizer}: needs rows, as it drops those with other words; '
             f'add --rows, or take bpe:2048')
    # of a column of the hub so many documents show what is frequent
    seen = items if isinstance(items, list) else items[:100_000]
    spec = make_tokenizer(tokenizer, list(all_texts(seen)))
    prepare = prepare_rows if kind == 'rows' else prepare_stream
    train, val, length = prepare(args, items, make_encoding(spec), left_out)
    left_out = +left_out            # those that are not 0
    reasons = ', '.join(f'{n:,} {reason}' for reason, n in left_out.items()) or 'nothing'
    if min(len(train), len(val)) < length:
        advice = '' if left_out else '; give more text, or a smaller --length'
        fail(f'{source}: too little text for rows of {length} tokens: {len(train):,} to train on, '
             f'{len(val):,} held out; left out: {reasons}{advice}')

    save_dataset(folder, train, val, spec, kind, pairs, length, source, args.overwrite)
    say(f'left out: {reasons}')
    unknown = left_out['with unknown words or characters']
    if unknown and not args.tokenizer and tokenizer.startswith('words:'):
        say('--tokenizer bpe:2048 keeps texts with other words, in pieces')
    V = len(spec['tokens']) + len(SPECIAL)
    say(f'{folder}: {len(train):,} tokens to train on, {len(val):,} held out; {kind} of {length}; '
        f'{spec["name"]}, {V:,} tokens; {time.time() - start:.0f} s')
    if args.input and kind == 'stream' and has_short_lines(items):
        say('its lines are short: with --rows each is a text of its own, which is easier to learn')
    command = as_command('train_teacher.py', '--data', folder)
    say(f'next: {command}')
    if pairs:
        say(f'or:   {command} --model diffuseq')


if __name__ == '__main__':
    run_script(main)
