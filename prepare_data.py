"""Turn text into data/<name>/{train,val}.bin and meta.json, ready for train_teacher.py.

    python prepare_data.py              # stories: small sums told in English, each one checkable
    python prepare_data.py dates        # pairs: an ISO date and one of its eight written forms
    python prepare_data.py pydocs       # the prose inside your own Python; needs no network either
    python prepare_data.py captions     # from the Hugging Face hub, as are the others; see -h
    python prepare_data.py mine --input a.txt b.txt.gz --tokenizer gpt2 --length 128
    python prepare_data.py names --input names.txt --rows
    python prepare_data.py en-fr --input a.en a.fr --parallel

The .bin files are flat uint16 ids, to be memory-mapped; meta.json holds the complete tokenizer and
    kind: rows    of `length` ids: text <eos> <pad> ..., of pairs source <sep> <pad> ... text <eos>
    kind: stream  documents one after the other, each ended by <eos>; any window of it is a row
"""
import argparse
import ast
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
import pydoc_data.topics
import random
import re
import shlex
import sys
import sysconfig
import tempfile
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from contextlib import suppress
from itertools import chain
from pathlib import Path

import numpy as np
import regex        # comes with tiktoken; unlike re it knows Unicode's letters and marks

SPECIAL = ['<eos>', '<pad>', '<sep>', '<bos>']      # ids V-4 ... V-1 of every tokenizer
FORMAT = 1                                          # of data folders
LONGEST_ROW = 65536                                 # tokens


# -----------------------------------------------------------------------------
# What every script needs: one-line errors, a command line, whole files


def fail(message):
    """End with one line on stderr and exit status 2, argparse's own."""
    line = ' '.join(str(message).splitlines())
    # of the processes that torchrun starts the first one speaks for all
    if os.environ.get('RANK', '0') == '0':
        print(f'{Path(sys.argv[0]).name}: {line}', file=sys.stderr)
    raise SystemExit(2)


def run_script(main):
    """Call a script's main(); what ends it from outside is one line at most, and no traceback."""
    # a Windows console knows a few hundred characters and raises at any other
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='replace')
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        say_stopped()
        raise SystemExit(130) from None
    except BrokenPipeError:
        # a reader that stops, such as `| head`, ends a script without a word, as it does cat
        mute_stdout()
        raise SystemExit(128 + 13) from None
    except (MemoryError, RuntimeError, OSError) as error:
        if out_of_memory(error):
            fail('out of memory; give less text, write fewer rows, or train with a smaller --batch '
                 'or more --micro-batches, the parts that a batch is computed in')
        if getattr(error, 'errno', None) != errno.ENOSPC or error.filename:
            raise
        mute_stdout()
        fail(f'stdout: {why_not(error)}')


def out_of_memory(error):
    """Whether Python, numpy or torch ran out of memory, on a CPU or a GPU."""
    # torch is not imported here, and has a class of its own only for GPUs
    if isinstance(error, MemoryError) or type(error).__name__ == 'OutOfMemoryError':
        return True
    return "can't allocate memory" in str(error) or 'DefaultCPUAllocator' in str(error)


def say_stopped():
    print(f'{Path(sys.argv[0]).name}: stopped', file=sys.stderr)


def uncaught(kind, error, trace):
    """What Python calls for an error that nobody caught: Ctrl-C while modules are being loaded."""
    if issubclass(kind, KeyboardInterrupt):
        say_stopped()
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = uncaught


def as_command(words):
    """Words as a command line. Windows takes / in a path, too, and no quotes as a \\ would need."""
    return shlex.join(word.replace(os.sep, '/') for word in words)


def as_word(path):
    """A path as a word of a command: one that begins with "-" would be taken for an option."""
    return f'./{path}' if str(path).startswith('-') else str(path)


def mute_stdout():
    """What is printed from here on goes nowhere, without an error, even when Python exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tell(message):
    """A line on stderr, where it does not mix with what a script writes."""
    print(message, file=sys.stderr, flush=True)


def say(text):
    """Print a line of a long run, which goes on if nobody reads it, or the disk is full."""
    try:
        print(text, flush=True)
    except OSError as error:
        mute_stdout()
        with suppress(OSError):
            print(f'{Path(sys.argv[0]).name}: stdout: {error.strerror}; going on without it',
                  file=sys.stderr)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and ends each option's help with its default."""

    def _get_help_string(self, action):
        # 0 is a default worth showing, and equals False
        if action.default is False or action.default in (None, '', argparse.SUPPRESS):
            return action.help
        return f'{action.help} [%(default)s]'


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors; options cannot be abbreviated, `-h` shows the defaults."""

    def __init__(self, **how):
        # an abbreviation that works today may mean another option tomorrow
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **how)

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


nonnegative_int = number(int, 0, 10 ** 9)
positive_int = number(int, 1, 10 ** 9)
fraction = number(float, 0, 1)
nonnegative = number(float, 0, 10 ** 9)


def progress(what):
    """A function to call with the fraction that is done; it prints a line every few seconds."""
    start = time.time()
    last = start

    def tell(done):
        nonlocal last
        now = time.time()
        if now - last > 4:
            last = now
            left = (now - start) * (1 - done) / done
            say(f'{what}: {done:.0%}, {left:.0f} s left')

    return tell


def why_not(error):
    """What an OSError on writing means, and what to do about it."""
    # some have no text of their own
    reason = error.strerror or type(error).__name__
    if error.errno == errno.ENOSPC:
        return f'{reason}; make room on the disk'
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f'{reason}; name a folder that you may write to'
    return f'{reason}; name another folder'


def check_output(flag, path, suffix, overwrite):
    """Stop at a path that cannot be a file to write, or whose file would be replaced unasked."""
    # a slip such as `--film model.pt` would replace a model by a picture
    if Path(path).suffix != suffix:
        fail(f'{flag} {path}: the name must end in {suffix}')
    if os.path.isdir(path):
        fail(f'{flag} {path}: is a folder; give the name of a file')
    check_replace(path, overwrite, 'nothing is replaced unasked')


def need(package, what):
    """Stop where an optional package is missing."""
    if importlib.util.find_spec(package.replace('-', '_')) is None:
        fail(f'{what} needs a package: pip install {package}')


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
            # on the disk before it gets its name, or a power cut would leave an empty file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        fail(f'{path}: cannot be written: {why_not(error)}')
    finally:
        # after Ctrl-C, too
        if os.path.exists(temporary):
            temporary.unlink()


# -----------------------------------------------------------------------------
# Tokenizers: a dict {name, pattern, tokens as latin-1 strings in rank order}

# BPE merges within a word, a digit or a run of punctuation, each with at most one space before it.
# Combining marks and joiners count as letters, or vowel signs would split the words of Hindi, Thai
# or Arabic
BPE_PIECES = (r' ?[\p{L}\p{M}\u200c\u200d]+| ?\p{N}|'
              r' ?[^\s\p{L}\p{M}\p{N}\u200c\u200d][^\s\p{L}\p{N}]*|\s+')
LONGEST_PIECE = 64
CHUNK = 1_000_000       # characters that are encoded at once
# tokenizers of whole words have no bytes to fall back on
DATE_PIECES = r'[A-Z][a-z]{2,}|the | of |, |st|nd|rd|th|[-./ ]|\d'       # V is 48, L is 23
STORY_PIECES = r' [A-Za-z]+|\.'                                         # V is 109, L is 21
# a word, with the marks, apostrophes and hyphens inside it, or else a single character
WORD_PIECES = (r" ?(?:[\p{L}\p{M}\p{N}\u200c\u200d]+(?:['\u2019\u2010-][\p{L}\p{M}\p{N}]+)*"
               r"|[^ ])")
WHOLE_WORDS = {'dates': DATE_PIECES, 'stories': STORY_PIECES, 'words': WORD_PIECES}


def as_latin(token):
    """A token as JSON can hold it: each of its bytes as the character of the same number."""
    return token.encode().decode('latin-1')


def count_pieces(texts):
    """How often each piece of BPE_PIECES occurs; longer ones are cut at LONGEST_PIECE."""
    tell = progress('counting words')
    counts = Counter()
    for chunk, _, done in chunks_of(texts):
        counts.update(regex.findall(BPE_PIECES, chunk))
        tell(done)
    pieces = Counter()
    for piece, n in counts.items():
        # a line of ten million letters is no word: every merge would go through all of it
        for start in range(0, len(piece), LONGEST_PIECE):
            pieces[piece[start:start + LONGEST_PIECE]] += n
    return pieces


def train_bpe(texts, size):
    """Byte-level BPE (arXiv:1508.07909): merge the most frequent pair of neighbors until there
    are `size` tokens, or no pair is left. Returns a tokenizer dict."""
    # the same pieces that tiktoken will merge within, or merges would be learned in vain
    counts = count_pieces(texts)
    times = list(counts.values())
    # fast in plain Python: a merge is one str.replace in each word that has the pair.
    # a word is a string of symbols, each between two bars of its own; its bytes are the
    # characters 0-255
    bar = '\u0100'
    words = [bar + (bar + bar).join(as_latin(word)) + bar for word in counts]
    pairs = Counter()               # pair of neighboring symbols -> how often it occurs
    where = defaultdict(set)        # pair -> the words that have it

    def count_pairs(i, sign):
        symbols = words[i][1:-1].split(bar + bar)
        for pair in zip(symbols, symbols[1:]):
            pairs[pair] += sign * times[i]
            where[pair].add(i)

    # all words once; after that a merge touches only the words that it changes
    for i in range(len(words)):
        count_pairs(i, 1)
    tokens = dict.fromkeys(map(chr, range(256)))        # a set that keeps its order
    tell = progress('learning tokens')
    while len(tokens) + len(SPECIAL) < size and pairs:
        # ties go to the pair that was seen first
        best = max(pairs, key=pairs.get)
        # every word is one token already
        if pairs[best] == 0:
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
        tell((len(tokens) - 256) / (size - 256))
    name = f'bpe:{len(tokens) + len(SPECIAL)}'
    return {'name': name, 'pattern': BPE_PIECES, 'tokens': list(tokens)}


def learn_words(how, texts):
    """The tokenizer dict of dates, stories or words:N: all words and marks that occur, or the most
    frequent ones, N with the special tokens."""
    name, _, size = how.partition(':')
    counts = Counter()
    for text in texts:
        counts.update(split_words(name, text))
    wanted = int(size) - len(SPECIAL) if size else None
    tokens = sorted(piece for piece, _ in counts.most_common(wanted))
    if size:
        how = f'words:{len(tokens) + len(SPECIAL)}'
    return {'name': how, 'pattern': WHOLE_WORDS[name], 'tokens': [as_latin(t) for t in tokens]}


def read_bert(path):
    """BERT's vocabulary file, a word or '##piece' per line, as a tokenizer dict."""
    words = read_bytes(Path(path)).decode('utf-8', 'replace').split()
    if not 0 < len(words) < 2 ** 16 - len(SPECIAL):
        fail(f'--tokenizer bert:{path}: {len(words)} words; there must be from 1 to 65531')
    tokens = {}
    for word in words:
        # '##ing' goes on with a word, 'the' begins one, here as ' the'
        token = word[2:] if word.startswith('##') else ' ' + word
        tokens[token] = None
    # a regular expression takes the first that fits: here the longest
    pattern = '|'.join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
    return {'name': 'bert', 'pattern': pattern, 'tokens': [as_latin(token) for token in tokens]}


def read_gpt2():
    """GPT-2's vocabulary, which tiktoken downloads once, as a tokenizer dict."""
    import tiktoken
    try:
        gpt2 = tiktoken.get_encoding('gpt2')
    except Exception as error:      # requests, urllib3 and tiktoken raise dozens of kinds
        fail(f'gpt2 cannot be fetched: there is no network, or it failed ({type(error).__name__}); '
             f'fill TIKTOKEN_CACHE_DIR, or use --tokenizer bpe:8192')
    tokens = [gpt2.decode_single_token_bytes(i).decode('latin-1') for i in range(50256)]
    return {'name': 'gpt2', 'pattern': gpt2._pat_str, 'tokens': tokens}


def check_tokenizer(how):
    """Stop at a --tokenizer that cannot be made, before any text is read."""
    if not re.fullmatch('gpt2|byte|bert:.+|(bpe|words):[0-9]+', how):
        fail(f'--tokenizer {how}: must be gpt2, byte, bpe:N, words:N or bert:vocab.txt')
    name, _, rest = how.partition(':')
    # a folder of BERT's weights has a vocab.txt
    if name == 'bert' and not os.path.isfile(rest):
        fail(f'--tokenizer {how}: there is no such file of BERT\'s vocabulary')
    # bytes and special tokens are there anyway, and uint16 ends at 65535
    low = {'bpe': 300, 'words': 10}.get(name)
    if low and not low <= int(rest[:10]) <= 60000:
        fail(f'--tokenizer {how}: N must be from {low} to 60000')


def make_tokenizer(how, texts):
    """The tokenizer dict for gpt2, byte, bpe:N, words:N, bert:FILE, dates or stories."""
    if how == 'gpt2':
        return read_gpt2()
    if how == 'byte':
        # the 256 bytes, and no merge
        return {**train_bpe([], 0), 'name': 'byte'}
    if how.startswith('bpe:'):
        return train_bpe(texts, int(how[4:]))
    if how.startswith('bert:'):
        return read_bert(how[5:])
    return learn_words(how, texts)


def make_encoding(spec):
    """The tiktoken.Encoding of a tokenizer dict; SPECIAL are its last four ids."""
    import tiktoken
    # a lower rank is merged earlier, so the order of the tokens is the order of the merges
    ranks = {token.encode('latin-1'): i for i, token in enumerate(spec['tokens'])}
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL)}
    return tiktoken.Encoding(spec['name'], pat_str=spec['pattern'], mergeable_ranks=ranks,
                             special_tokens=special)


def split_words(name, text):
    """The pieces of a text that a tokenizer of WHOLE_WORDS knows, or does not know; together they
    are the text, but for runs of spaces."""
    if name == 'dates':
        return re.findall(DATE_PIECES + '|.', text, re.DOTALL)
    pieces = regex.findall(WORD_PIECES, text)
    # the first word is the same token as any other, which has a space before it
    if pieces and pieces[0][0].isalnum():
        pieces[0] = ' ' + pieces[0]
    return pieces


def encode(encoding, text, unknown=None):
    """A text's token ids. What the tokenizer cannot write is an error that names it, unless it is
    to be counted in the Counter `unknown`."""
    name = encoding.name.partition(':')[0]
    missing = Counter()
    if name in WHOLE_WORDS:
        ids = []
        for piece in split_words(name, text):
            try:
                ids.append(encoding.encode_single_token(piece))
            except KeyError:
                missing[piece.strip() or piece] += 1
    elif name == 'bert':
        ids, missing = encode_bert(encoding, text)
    else:
        # of bytes any text can be made
        return encoding.encode_ordinary(text)
    if missing and unknown is None:
        fail(f'{next(iter(missing))!r} is not in the vocabulary of {encoding.name}')
    if missing:
        unknown.update(missing)
    return ids


def encode_bert(encoding, text):
    """(ids, Counter of the characters that are dropped) with BERT's vocabulary."""
    # BERT knows lower case without accents, which NFD sets apart, and each mark as a word
    plain = re.sub('[\u0300-\u036f]', '', unicodedata.normalize('NFD', text.lower()))
    words = re.findall(r'[^\W_]+|[^\w\s]|_', plain)
    spaced = ''.join(' ' + word for word in words)
    ids = encoding.encode_ordinary(spaced)
    # tiktoken drops in silence what fits no token
    dropped = Counter(spaced) - Counter(encoding.decode(ids))
    # a mark that begins no word of the vocabulary is written without its space
    del dropped[' ']
    return ids, dropped


def decode(encoding, ids):
    """The text of token ids, without the space that `encode` has put before the first word."""
    text = encoding.decode(ids)
    if encoding.name.partition(':')[0] in ('bert', 'stories', 'words'):
        return text.removeprefix(' ')
    return text


# -----------------------------------------------------------------------------
# dates: pairs with an exact measure. Each source has eight right answers, so every sample can be
# checked
# ours: in no paper; it exposes a model that writes only one of the forms, or mixes two


def date_forms(iso):
    """The eight written forms of an ISO date, '1987-03-23' -> ('March 23, 1987', ...); none of
    any other text."""
    try:
        date = datetime.date.fromisoformat(iso)
    except ValueError:
        return ()
    y = date.year
    m = date.month
    d = date.day
    month = calendar.month_name[m]
    short = calendar.month_abbr[m]
    # 11th, 12th and 13th are the exceptions
    ending = 'th' if 10 <= d <= 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(d % 10, 'th')
    nth = f'{d}{ending}'
    forms = [f'{month} {d}, {y}', f'the {nth} of {month} {y}', f'{d} {short} {y}', f'{m}/{d}/{y}']
    forms += [f'{d}.{m}.{y}', f'{month} {nth}, {y}', f'{d}-{short}-{y}', f'{month} the {nth}, {y}']
    return tuple(forms)


def dates():
    """(source, target) pairs: each day of 1900-2099 in each of its eight forms."""
    pairs = []
    for n in range(73049):
        day = str(datetime.date(1900, 1, 1) + datetime.timedelta(n))
        for form in date_forms(day):
            pairs.append((day, form))
    return pairs


# -----------------------------------------------------------------------------
# stories: text with an exact measure. 7.9 million texts, each with a known probability
#   Nora has four old books. She gives one to Ben. Now she has three books.
#   Tom has three coins in the boat. He finds five more. Now he has eight coins.
#   Sam and Ben have three cakes each. Together they have six cakes. Sam is happy.
#   There are eight big books in the drawer. Paul takes seven for Anna. One book is left.
# ours: in no paper; the distribution of real text is unknown, so no metric can be exact there

GIRLS = ['Anna', 'Clara', 'Emma', 'Julia', 'Lucy', 'Mary', 'Nora', 'Ruth']
BOYS = ['Ben', 'Jack', 'Leo', 'Max', 'Paul', 'Peter', 'Sam', 'Tom']
THINGS = {'apple': 'apples', 'ball': 'balls', 'berry': 'berries', 'book': 'books', 'box': 'boxes',
          'cake': 'cakes', 'coin': 'coins', 'egg': 'eggs', 'key': 'keys', 'leaf': 'leaves',
          'pear': 'pears', 'stone': 'stones'}
QUALITIES = ['big', 'good', 'new', 'old', 'small']
COLORS = ['black', 'blue', 'brown', 'green', 'red', 'white']
NUMBERS = ['zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten',
           'eleven', 'twelve']      # zero is never written

# the slots that are drawn uniformly
CHOICES = {
    'name': GIRLS + BOYS,
    'thing': list(THINGS),
    'adjective': QUALITIES + COLORS,
    'quality': QUALITIES,
    'place': ['bag', 'boat', 'drawer', 'garden', 'kitchen', 'shed'],
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


def story_result(plot, number, change):
    """How many things there are at the end of a story."""
    # one finds more, or the other's are added; the other plots give away
    if plot in ('find', 'share'):
        return number + change
    return number - change


def story_changes(plot, number):
    """The second numbers that may follow the first; all results are from one to twelve."""
    if plot == 'find':
        return list(range(1, 13 - number))
    if plot == 'share':
        # the other one has as many
        return [number] if number <= 6 else []
    return list(range(1, number))


def number_distribution(plot):
    """{(number, change): probability}: the first number is uniform, then the second is."""
    # one thing cannot be given away such that some is left
    first = [number for number in range(1, 13) if story_changes(plot, number)]
    distribution = {}
    for number in first:
        changes = story_changes(plot, number)
        for change in changes:
            distribution[number, change] = 1 / len(first) / len(changes)
    return distribution


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
    words['things'] = thing if story['number'] == 1 else THINGS[thing]
    words['are'] = 'is' if story['number'] == 1 else 'are'
    words['rest'] = thing if story['result'] == 1 else THINGS[thing]
    words['remain'] = 'is' if story['result'] == 1 else 'are'
    return PLOTS[story['plot']].format(**words)


def draw_story(rng):
    """Sample one text, rng a random.Random: the four plots are equally likely, each slot of CHOICES
    is uniform, two names differ, either may be happy, numbers follow `number_distribution`."""
    plot = rng.choice(list(PLOTS))
    numbers = [number for number in range(1, 13) if story_changes(plot, number)]
    number = rng.choice(numbers)
    change = rng.choice(story_changes(plot, number))
    # slots that the plot does not have are drawn in vain
    story = {slot: rng.choice(choices) for slot, choices in CHOICES.items()}
    name, other = rng.sample(CHOICES['name'], 2)
    story.update(plot=plot, name=name, other=other, happy=rng.choice([name, other]))
    story.update(number=number, change=change, result=story_result(plot, number, change))
    return write_story(story)


def story_reader(template):
    """The regular expression that parses a plot; a slot matches only its own words."""
    names, numbers = GIRLS + BOYS, NUMBERS[1:]
    things = [*THINGS, *THINGS.values()]
    words = {**CHOICES, 'other': names, 'happy': names, 'number': numbers, 'change': numbers,
             'result': numbers, 'Result': [number.title() for number in numbers],
             'things': things, 'rest': things, 'she': ['she', 'he'], 'She': ['She', 'He'],
             'are': ['is', 'are'], 'remain': ['is', 'are']}
    pattern = template.replace('.', r'\.')
    for slot, choices in words.items():
        pattern = pattern.replace(f'{{{slot}}}', f'(?P<{slot}>{"|".join(choices)})')
    return re.compile(pattern)


STORY_READERS = {plot: story_reader(template) for plot, template in PLOTS.items()}
SINGULAR = {plural: thing for thing, plural in THINGS.items()}


def read_story(text):
    """The slots of a well-formed story as a dict: plot, name, thing, number (the first), change,
    result, ..., and `right`: whether the sum is. None where words or their agreement are wrong."""
    for plot, reader in STORY_READERS.items():
        found = reader.fullmatch(text)
        if found:
            story = story_slots(plot, found.groupdict())
            # written anew it is the same text, if pronoun, plurals and verbs agree
            return story if story and write_story(story) == text else None
    return None


def story_slots(plot, words):
    """The slots that the words of a plot stand for, see read_story; None if a name is wrong."""
    story = {'plot': plot, **words}
    name = story['name']
    # two different people, and one of them is happy
    if story.get('other') == name:
        return None
    if story.get('happy', name) not in (name, story.get('other')):
        return None
    story['thing'] = SINGULAR.get(story['things'], story['things'])
    # in `share` the other one has as many; in `take` the result begins a sentence
    story.setdefault('change', story['number'])
    story.setdefault('result', story.get('Result', '').lower())
    for slot in ('number', 'change', 'result'):
        story[slot] = NUMBERS.index(story[slot])
    story['right'] = story['result'] == story_result(plot, story['number'], story['change'])
    return story


def story_ways(plot):
    """In how many ways a plot's slots other than its numbers can be filled."""
    template = PLOTS[plot]
    # {things} is the slot `thing`
    ways = math.prod(len(words) for slot, words in CHOICES.items() if '{' + slot in template)
    if '{other}' in template:
        ways *= len(CHOICES['name']) - 1
    # either of the two may be happy
    if '{happy}' in template:
        ways *= 2
    return ways


def story_probability(text):
    """The exact probability that `draw_story` writes this text; 0 where it is not right."""
    story = read_story(text)
    if story is None or not story['right']:
        return 0.0
    plot = story['plot']
    numbers = number_distribution(plot)[story['number'], story['change']]
    return numbers / len(PLOTS) / story_ways(plot)


def expected_seen(n_train):
    """The fraction of samples that also occur among n_train independent ones: the sum over all
    texts of p (1 - (1 - p)^n). Texts of one plot and the same numbers are equally likely."""
    seen = 0.0
    for plot in PLOTS:
        for p in number_distribution(plot).values():
            # the probability of each of these texts
            each = p / len(PLOTS) / story_ways(plot)
            seen += p / len(PLOTS) * -math.expm1(n_train * math.log1p(-each))
    return seen


def story_distribution(slot):
    """The exact joint distribution of plot and one slot: {(plot, value): probability}."""
    distribution = defaultdict(float)
    for plot in PLOTS:
        if slot == 'number':
            for (number, _), p in number_distribution(plot).items():
                distribution[plot, number] += p / len(PLOTS)
        else:
            for value in CHOICES[slot]:
                distribution[plot, value] += 1 / len(PLOTS) / len(CHOICES[slot])
    return distribution


def entropy(weights):
    """Entropy in nats of counts or probabilities."""
    total = sum(weights)
    return sum(w / total * math.log(total / w) for w in weights if w > 0)


def entropy_of(items):
    """Entropy in nats of how often each item occurs."""
    return entropy(Counter(items).values())


def jensen_shannon(p, q):
    """Jensen-Shannon divergence in nats of two distributions, dicts of counts or probabilities."""
    p_total = sum(p.values())
    q_total = sum(q.values())
    # H((p + q) / 2) - (H(p) + H(q)) / 2
    keys = {*p, *q}
    middle = [p.get(k, 0) / p_total / 2 + q.get(k, 0) / q_total / 2 for k in keys]
    return entropy(middle) - (entropy(p.values()) + entropy(q.values())) / 2


def story_metrics(texts):
    """Exact metrics of a list of texts, a dict of floats.
    well_formed, valid, unique: fractions of all texts. Over the valid ones, slot_entropy: entropy
    of plot, name, thing and number relative to the true one, averaged; slot_divergence:
    Jensen-Shannon to the true (plot, number) and (plot, thing) in nats, averaged."""
    parsed = [story for story in map(read_story, texts) if story]
    valid = [story for story in parsed if story['right']]
    n = max(1, len(texts))
    metrics = {'well_formed': len(parsed) / n, 'valid': len(valid) / n, 'slot_entropy': 0.0,
               'slot_divergence': math.log(2), 'unique': len(set(texts)) / n}
    # without any text: entropy 0, and the largest divergence there is
    if not valid:
        return metrics
    # plots are equally likely
    ratios = [entropy_of(story['plot'] for story in valid) / math.log(len(PLOTS))]
    for slot in ('name', 'thing', 'number'):
        # of the slot alone, whatever the plot
        marginal = defaultdict(float)
        for (_, value), p in story_distribution(slot).items():
            marginal[value] += p
        ratios.append(entropy_of(story[slot] for story in valid) / entropy(marginal.values()))
    metrics['slot_entropy'] = sum(ratios) / len(ratios)
    # at most 48 cells each, few enough for 500 samples
    gaps = []
    for slot in ('number', 'thing'):
        found = Counter((story['plot'], story[slot]) for story in valid)
        gaps.append(jensen_shannon(found, story_distribution(slot)))
    metrics['slot_divergence'] = sum(gaps) / len(gaps)
    return metrics


def stories(n=150_000):
    """n sampled texts, always the same ones; frequent texts occur more than once."""
    rng = random.Random(0)
    return [draw_story(rng) for _ in range(n)]


# -----------------------------------------------------------------------------
# pydocs: the prose in every Python


def docstrings():
    """Yield the docstrings of the standard library without its tests, then the help topics."""
    library = Path(sysconfig.get_path('stdlib'))
    skip = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(library.rglob('*.py')):
        if not skip.isdisjoint(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding='utf-8'))
        except (SyntaxError, ValueError):
            continue                # a few are templates or not UTF-8
        for node in ast.walk(tree):
            if isinstance(node, documented):
                yield ast.get_docstring(node) or ''
    for _, text in sorted(pydoc_data.topics.topics.items()):
        yield text


def is_prose(sentence):
    """Whether it is a whole sentence in plain words: no doctest, table or signature."""
    words = sentence.split()
    if not 4 <= len(words) <= 60:
        return False
    if not sentence[0].isupper() or sentence[-1] not in '.!?':
        return False
    if not sentence.isascii() or '>>>' in sentence:
        return False
    # three of four words without digits, dots, underscores or brackets inside
    plain = sum(word.strip('.,;:()"\'!?').isalpha() for word in words)
    return plain >= 0.75 * len(words)


def sentences(texts):
    """Yield the sentences of texts that are prose, in order of appearance."""
    for text in texts:
        # a blank line ends a paragraph, and so does the next item of a list
        for paragraph in re.split(r'\n\s*\n|\n(?=\s*[-*]\s)', text):
            # marks of reStructuredText and of lists, then all white space
            flat = ' '.join(re.sub(r'[*`]+|^\s*-\s+', '', paragraph).split())
            # a sentence ends where a capital letter follows
            for sentence in re.split(r'(?<=[.!?])\s+(?=[A-Z])', flat):
                if is_prose(sentence):
                    yield sentence


# -----------------------------------------------------------------------------
# Data sets that need no network, and those of the hub; what is not set is chosen to suit the text

BUILT_IN = {
    'stories': dict(tokenizer='stories', length=21),
    'dates': dict(tokenizer='dates', length=23),
    'pydocs': dict(tokenizer='bpe:2048', length=32),
}
PARQUET = 'refs/convert/parquet'    # a branch; `datasets` runs no scripts any more
# the columns of texts or of pairs
HUB_ROWS = {
    'captions': dict(path='sentence-transformers/flickr30k-captions', config='pair',
                     columns=['caption1', 'caption2'], tokenizer='words:2000'),
    'snli': dict(path='stanfordnlp/snli', columns=['hypothesis'], tokenizer='words:2000'),
    # asked on Quora
    'qqp': dict(path='nyu-mll/glue', config='qqp', columns=['question1', 'question2'],
                tokenizer='bpe:2048', length=40),
}
# the column `text`; the last documents are the usual test set, and at most `test` are held out.
# lm1b and owt have the lengths of FLM, which takes BERT's tokenizer for lm1b (--tokenizer
# bert:vocab.txt); ours: the others, small enough for a laptop
HUB_STREAMS = {
    'shakespeare': dict(path='karpathy/tiny_shakespeare', revision=PARQUET, tokenizer='bpe:2048'),
    'tinystories': dict(path='roneneldan/TinyStories', test=21_990,
                        tokenizer='bpe:4096', length=128),
    'text8': dict(path='afmck/text8', split='train+validation+test', test=1,
                  tokenizer='byte', length=256),
    'wikitext': dict(path='Salesforce/wikitext', config='wikitext-103-raw-v1',
                     split='train+validation', test=3_760,
                     tokenizer='gpt2', length=128),
    'lm1b': dict(path='billion-word-benchmark/lm1b', revision=PARQUET, test=306_688,
                 tokenizer='gpt2', length=128),
    'owt': dict(path='Skylion007/openwebtext', test=100_000,
                tokenizer='gpt2', length=1024),
}
HUB = {**HUB_ROWS, **HUB_STREAMS}
SETS = {**BUILT_IN, **HUB}


def load_hub(name, cache, left_out):
    """The texts or pairs of one of HUB, or a column of documents, which stays on the disk."""
    hub = HUB[name]
    try:
        import datasets
    except ImportError:
        fail('this needs one more package; run: pip install datasets')
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f'{cache}: the cache cannot be written: {why_not(error)}')
    say(f'reading {hub["path"]}, from the hub or from {cache} ...')
    logging.disable()               # the hub's client reports each of its retries
    try:
        # all splits are put together: held out is the end
        table = datasets.load_dataset(
            hub['path'], hub.get('config'), split=hub.get('split', 'all'),
            revision=hub.get('revision'), cache_dir=str(cache))
    except Exception as error:      # the library and the hub's client raise dozens of kinds
        # what went wrong below it says whether the disk was full
        for cause in (error, error.__cause__, error.__context__):
            if getattr(cause, 'errno', None) == errno.ENOSPC:
                fail(f'{cache}: {why_not(cause)}')
        fail(f'{hub["path"]} cannot be loaded from the hub ({type(error).__name__}); check the '
             f'network, or give files of your own with --input')
    if name == 'lm1b':
        # a small table is done before other processes have started
        many = os.cpu_count() if len(table) > 10_000 else None
        table = table.map(lambda row: {'text': detokenize(row['text'] or '')}, num_proc=many)
    if name in HUB_STREAMS:
        return table['text']
    records = ((hub['path'], row) for row in table)
    items = read_records(records, hub['columns'], left_out)
    if name == 'captions':
        # two captions of an image are two texts
        items = list(chain.from_iterable(items))
    return items


def detokenize(text):
    """LM1B's words as running text: 'It \'s " $ 5 " ( not 6 ) .' -> It's "$5" (not 6)."""
    # a clitic, then marks that follow a word, those that come before one, quotes, fractions
    text = re.sub(r" '(?=\w)", "'", text)
    text = re.sub(r' (?=[,.;:?!%)\]])', '', text)
    text = re.sub(r'(?<=[(\[$£]) ', '', text)
    text = re.sub(r'" ([^"]*?) "', r'"\1"', text)
    return re.sub(r' / ', '/', text)


# -----------------------------------------------------------------------------
# Files: text by any name, .json, .jsonl, .csv, .tsv, .parquet, each plain or compressed. Not read
# by `datasets`, which turns the text "1987-03-23" into a timestamp and "007" into a number

COMPRESSED = {'.gz': gzip, '.bz2': bz2, '.xz': lzma}
# what a file is that begins with these bytes, whatever its name
SIGNATURES = {b'\x1f\x8b': 'compressed with gzip; its name must end in .gz',
              b'BZh': 'compressed with bzip2; its name must end in .bz2',
              b'\xfd7zXZ': 'compressed with xz; its name must end in .xz',
              b'(\xb5/\xfd': 'compressed with zstd; unpack it first',
              b'PK\3\4': 'a zip; unpack it first, or save it as text',
              b'%PDF': 'a PDF; save it as text',
              b'PAR1': 'parquet; its name must end in .parquet'}
# the columns that are read where --columns names none: source and target, or texts
COLUMNS = [('src', 'trg'), ('src', 'tgt'), ('source', 'target'), ('question1', 'question2'),
           ('prompt', 'completion'), ('prompt', 'response'), ('query', 'response'),
           ('question', 'answer'), ('text',)]


def suffix_of(path):
    """The extension of a file's name in small letters, that before .gz and its like."""
    if path.suffix.lower() in COMPRESSED:
        path = path.with_suffix('')
    return path.suffix.lower()


def list_files(names):
    """The files that an option names, all of one kind, each once; a folder stands for all files in
    it that are not hidden."""
    def stop(error):
        fail(f'--input {error.filename}: cannot be read ({error.strerror})')

    files = []
    for name in names:
        if not os.path.exists(name):
            fail(f'--input {name}: there is no such file')
        if not os.path.isdir(name):
            files.append(Path(name))
            continue
        found = []
        for place, folders, inside in os.walk(name, onerror=stop):
            # hidden are .git, for example, and .DS_Store
            folders[:] = [folder for folder in folders if not folder.startswith('.')]
            found += [Path(place, file) for file in inside if not file.startswith('.')]
        if not found:
            fail(f'--input {name}: a folder without files')
        files += sorted(found)
    # a folder and a file in it may both be named
    files = list({path.resolve(): path for path in files}.values())
    # a README among records would be read as text
    readers = {READERS.get(suffix_of(path)): path for path in files}
    if len(readers) > 1:
        fail(f'--input: mixes {" and ".join(map(str, readers.values()))}; give files of one kind')
    return files


def read_bytes(path):
    """The bytes of a file, decompressed if its name says so."""
    try:
        data = path.read_bytes()
    except OSError as error:
        fail(f'{path}: cannot be read ({error.strerror})')
    # names decide, not contents: a text may begin with the same two bytes
    suffix = path.suffix.lower()
    if suffix not in COMPRESSED:
        return data
    try:
        return COMPRESSED[suffix].decompress(data)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError):
        fail(f'{path}: not a whole {suffix} file; fetch or make it anew')


def read_text(path):
    """A file's text, without a byte-order mark, all line ends as \\n."""
    data = read_bytes(path)
    # Windows marks UTF-16, and may mark UTF-8
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode('utf-16' if marked else 'utf-8-sig')
        at = text.find('\0')
        before = text[:at]
    except UnicodeDecodeError as error:
        at = error.start
        before = error.object[:at].decode('latin-1')
    if at < 0:
        return text.replace('\r\n', '\n').replace('\r', '\n')
    for start, what in SIGNATURES.items():
        if data.startswith(start):
            fail(f'{path}: is {what}')
    problem = 'not UTF-8; convert it, with iconv for example'
    if b'\0' in data:
        problem = 'has a NUL character, so it is not text in UTF-8'
    line = before.count('\n') + 1
    fail(f'{path}, line {line}: {problem}')


def lines_of(text):
    """The lines of a text; the end of the last one begins no other."""
    return text.removesuffix('\n').split('\n')


def read_json(path, wanted):
    """Yield (where it is, record) of JSON Lines, or of one array."""
    text = read_text(path)
    # an array is read at once, as if it were one line
    parts = [text] if text.lstrip().startswith('[') else lines_of(text)
    for n, part in enumerate(parts, 1):
        if not part.strip():
            continue
        try:
            value = json.loads(part)
        except (ValueError, RecursionError) as error:
            line = n + getattr(error, 'lineno', 1) - 1
            fail(f'{path}, line {line}: not JSON; give one record a line, or an array of them')
        for record in value if isinstance(value, list) else [value]:
            # a bare text is a record, too
            if isinstance(record, str):
                record = {'text': record}
            if not isinstance(record, dict):
                fail(f'{path}, line {n}: not a record, such as {{"text": "..."}}')
            yield f'{path}, line {n}', record


def read_table(path, wanted):
    """Yield (where it is, record) of a .csv or .tsv. The first line names the columns; a .tsv of
    pairs may do without."""
    text = read_text(path)
    tabs = suffix_of(path) == '.tsv'
    # where the comma is a decimal point, cells are separated by semicolons
    delimiter = '\t' if tabs else max(',;', key=text.partition('\n')[0].count)
    # spreadsheets quote whole cells; any other quote in a .tsv is a character of the text
    marked = [cell for cell in re.split('[\t\n]', text) if '"' in cell]
    whole = all(re.fullmatch('"([^"]|"")*"', cell) for cell in marked)
    quoting = csv.QUOTE_NONE if tabs and not whole else csv.QUOTE_MINIMAL
    csv.field_size_limit(10 ** 9)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, quoting=quoting)
    names = next(reader, [])
    rows = reader
    named = wanted or any(set(columns) <= set(names) for columns in COLUMNS)
    if tabs and len(names) == 2 and not named:
        rows = chain([names], reader)
        names = ['source', 'target']
    for cells in rows:
        where = f'{path}, line {reader.line_num}'
        # a blank line is counted as empty
        cells = cells or [''] * len(names)
        if len(cells) != len(names):
            fail(f'{where}: columns: {len(cells)}, but there are {len(names)}')
        yield where, dict(zip(names, cells))


def read_parquet(path, wanted):
    """Yield (where it is, record of the needed columns) for each row."""
    data = read_bytes(path)
    try:
        from pyarrow import ArrowException, parquet
        file = parquet.ParquetFile(io.BytesIO(data))
        names = file.schema_arrow.names
        # other columns are not even read, whatever they hold
        needed = {*pick_columns(names, wanted, path), 'label', 'is_duplicate'}
        records = file.read(columns=[name for name in names if name in needed]).to_pylist()
    except ImportError:
        fail('this needs one more package; run: pip install datasets')
    except (ArrowException, OSError):
        fail(f'{path}: damaged, or no parquet; fetch or make it anew')
    for n, record in enumerate(records, 1):
        yield f'{path}, row {n}', record


READERS = {'.jsonl': read_json, '.ndjson': read_json, '.json': read_json, '.csv': read_table,
           '.tsv': read_table, '.parquet': read_parquet}


def pick_columns(found, wanted, where):
    """The columns to read of those found, one of texts or two of pairs."""
    for columns in [wanted] if wanted else COLUMNS:
        if set(columns) <= set(found):
            return columns
    names = ', '.join(map(str, found)) or 'none'
    fail(f'{where}: has the columns {names}; needs {" and ".join(wanted or ["text"])}, or name one '
         f'or two with --columns')


def read_records(records, wanted, left_out):
    """The texts, or the pairs of texts, of (where it is, dict)."""
    items = []
    columns = None
    for where, record in records:
        # the first record decides
        columns = columns or pick_columns(record, wanted, where)
        texts = []
        for column in columns:
            text = record.get(column)
            # null is an empty text
            if text is None:
                text = ''
            # JSON can write "\\u0000", and half of an emoji, "\\ud83d"
            if not isinstance(text, str) or re.search('[\0\ud800-\udfff]', text):
                fail(f'{where}: {column} is not text: {text!r:.60}')
            texts.append(text)
        # of Quora's pairs only those labeled as asking the same
        label = record.get('label', record.get('is_duplicate', 1))
        if columns[0] == 'question1' and str(label) not in ('1', 'True'):
            left_out['labeled as different'] += 1
        else:
            items.append(tuple(texts) if len(texts) == 2 else texts[0])
    return items


def wants_rows(args):
    """Whether a text is a row of its own, and not a part of a stream."""
    return args.rows or args.name in BUILT_IN or args.name in HUB_ROWS


def read_files(names, args, left_out):
    """The documents, texts or pairs of the files that an option names."""
    files = list_files(names)
    if args.parallel:
        if len(files) != 2:
            fail(f'--parallel: takes two files, sources and targets, not {len(files)}')
        sources, targets = [lines_of(read_text(path)) for path in files]
        if len(sources) != len(targets):
            fail(f'--parallel: {files[0]} has {len(sources):,} lines, {files[1]} {len(targets):,}')
        return list(zip(sources, targets))
    # with --rows a text is a line of a file, or a whole file of a folder
    folders = any(map(os.path.isdir, names))
    by_line = args.name == 'lm1b' or wants_rows(args) and not folders
    items = []
    for path in files:
        reader = READERS.get(suffix_of(path))
        # a .tsv without tabs is prose
        if reader and not (suffix_of(path) == '.tsv' and '\t' not in read_text(path)):
            items += read_records(reader(path, args.columns), args.columns, left_out)
            continue
        if args.columns:
            fail(f'{path}: is text, which has no columns; leave out --columns')
        text = read_text(path)
        for part in lines_of(text) if by_line else [text]:
            # one that is blank is counted, see left_out
            items += split_documents(part) or ['']
    if len({type(item) for item in items}) > 1:
        fail('--input: mixes pairs and texts; give files of one kind')
    if args.name == 'lm1b':
        items = list(map(detokenize, items))
    if not ''.join(map(''.join, items)).strip():
        fail(f'{" ".join(map(str, names))}: holds no text')
    return items


# -----------------------------------------------------------------------------
# Rows: one text or pair each, padded. Layouts: see the top of this file


def as_texts(item):
    """The texts of an item: of a pair both."""
    return item if isinstance(item, tuple) else (item,)


def clean_items(items, keep_duplicates, left_out):
    """The items without empty ones and, unless they are wanted, duplicates, which are counted."""
    full = [item for item in items if all(map(str.strip, as_texts(item)))]
    left_out['empty'] += len(items) - len(full)
    if keep_duplicates:
        return full
    unique = list(dict.fromkeys(full))
    left_out['duplicate'] += len(full) - len(unique)
    return unique


def choose_tokenizer(items, kind):
    """(a tokenizer that suits the text, why) for those who name none."""
    texts = list(chain.from_iterable(map(as_texts, items)))
    if kind == 'rows' and len(texts) == len(items):
        words = set(learn_words('words:2000', texts)['tokens'])
        kept = 0
        for text in texts:
            kept += words.issuperset(map(as_latin, split_words('words', text)))
        # ours: a small network learns whole words better than parts of words, if enough is left: a
        # third of the texts, and ten for each word, so that it occurs in several contexts
        if kept >= len(texts) / 3 and kept >= 10 * len(words):
            return 'words:2000', (f'{kept / len(texts):.0%} of the texts have no other words; '
                                  f'bpe:2048 would keep all of them')
    # ours: a vocabulary so small that even its rarest tokens occur a few dozen times
    characters = sum(map(len, texts))
    for size in (2048, 1024, 512):
        if characters >= 400 * size:
            return f'bpe:{size}', f'{characters:,} characters; a large network may take gpt2'
    return 'byte', f'{characters:,} characters; bpe:512 would learn parts of words from them'


def choose_length(sizes):
    """The length of rows that suits texts of so many tokens."""
    # ours: up to 32 tokens cost little; beyond that the longest 5 % are not worth what they cost
    longest = max(sizes, default=0)
    if longest > 32:
        longest = min(128, int(np.quantile(sizes, 0.95, method='higher')))
    return max(4, longest)


def measure(items, encoding, left_out):
    """(the items that the tokenizer can write, how many tokens each of their rows needs)."""
    writable = []
    sizes = []
    tell = progress('measuring')
    for n, item in enumerate(items, 1):
        tell(n / len(items))
        unknown = Counter()
        size = 0
        for text in as_texts(item):
            # and the <sep> or <eos> after it
            size += len(encode(encoding, text, unknown)) + 1
        if not unknown:
            writable.append(item)
            sizes.append(size)
    left_out['with unknown words or characters'] += len(items) - len(writable)
    return writable, sizes


def of_one_kind(items):
    """Whether both sides of pairs are of one kind, as in paraphrases: some texts are on both."""
    pairs = [item for item in items if isinstance(item, tuple) and item[0] != item[1]]
    sources = {source for source, _ in pairs}
    targets = {target for _, target in pairs}
    # those of labels, answers and translations hardly ever are
    return len(sources & targets) > 0.01 * max(len(sources), len(targets))


def split_items(items, held_out, val_items, left_out):
    """(train, val) of texts or pairs: val_items, or else a random fraction of the different ones.
    No text or source is in both, and of paraphrases no target either."""
    # all targets of a source stay together, so that targets are distributed alike in both
    sources = [as_texts(item)[0] for item in items]
    held = {as_texts(item)[0] for item in val_items}
    if not val_items:
        unique = list(dict.fromkeys(sources))
        random.Random(0).shuffle(unique)
        held = set(unique[:max(1, int(held_out * len(unique)))])
    own = [item for item, source in zip(items, sources) if source in held]
    train = [item for item, source in zip(items, sources) if source not in held]
    val = val_items or own
    seen = set(chain.from_iterable(map(as_texts, val)))
    apart = [item for item in train if seen.isdisjoint(as_texts(item))]
    # in chats an "ok" links nearly all pairs, and too few would be left
    if of_one_kind(items) and len(apart) > 0.7 * len(train):
        train = apart
    in_both = len(items) - len(train) - (0 if val_items else len(own))
    left_out['with a text that is held out'] += in_both
    return train, val


def pack_rows(encoding, items, length):
    """Documents or pairs -> (flat ids of whole rows of `length`, how many tokens each item has).
    Those that are longer get no row."""
    eos, pad, sep = (encoding.encode_single_token(name) for name in SPECIAL[:3])
    rows = []
    sizes = []
    tell = progress('encoding')
    for n, item in enumerate(items, 1):
        tell(n / len(items))
        text = encode(encoding, as_texts(item)[-1]) + [eos]
        if isinstance(item, tuple):
            given = encode(encoding, item[0]) + [sep]
            # the texts of pairs end alike, whatever the length of their source
            row = given + [pad] * (length - len(given) - len(text)) + text
        else:
            row = text + [pad] * (length - len(text))
        # [pad] times a negative number is empty: such a row is too long
        if len(row) == length:
            rows.append(row)
        sizes.append(len(row) - row.count(pad))
    ids = np.array(rows, dtype='<u2').reshape(-1)
    return ids, sizes


# -----------------------------------------------------------------------------
# Streams: documents one after the other


def split_documents(text):
    """The documents of a text, which <|endoftext|> ends; blank ones are none."""
    parts = (text or '').split('<|endoftext|>')
    return [part for part in parts if part.strip()]


def chunks_of(texts):
    """Yield (some CHUNK characters, whether a document ends there, the fraction that is done), and
    of a blank text an empty chunk."""
    for i, text in enumerate(texts):
        for document in split_documents(text) or ['']:
            # cut before white space, where no piece goes across
            chunks = re.findall(rf'.{{1,{CHUNK}}}\s*\S*', document, re.DOTALL) or ['']
            for j, chunk in enumerate(chunks, 1):
                ends = j == len(chunks) and document != ''
                yield chunk, ends, (i + j / len(chunks)) / len(texts)


def pack_stream(texts, encoding, cache, left_out):
    """A list or a column of the hub -> (flat ids, memory-mapped; tokens of each document)."""
    eos = encoding.encode_single_token('<eos>')
    sizes = [0]
    unknown = Counter()
    tell = progress('encoding')
    # without a name: it is gone when this script ends
    folder = cache if cache.is_dir() else tempfile.gettempdir()
    try:
        file = tempfile.TemporaryFile(dir=folder)
        for chunk, ends, done in chunks_of(texts):
            ids = encode(encoding, chunk, unknown)
            if ends:
                ids.append(eos)
            file.write(np.array(ids, '<u2').tobytes())
            sizes[-1] += len(ids)
            left_out['empty'] += not chunk
            if ends:
                sizes.append(0)
            tell(done)
        file.flush()
    except OSError as error:
        fail(f'{folder}: cannot be written: {why_not(error)}')
    left_out['unknown characters'] += unknown.total()
    sizes = np.array(sizes[:-1])
    return np.memmap(file, '<u2', 'r', shape=int(sizes.sum())), sizes


def split_stream(ids, sizes, held_out, documents):
    """(train, val) of flat ids: held out is the end, a fraction of the tokens, or only so many
    documents if these are fewer tokens (0: no such bound)."""
    held = int(held_out * sizes.sum())
    if documents:
        held = min(held, int(sizes[-documents:].sum()))
    return ids[:len(ids) - held], ids[len(ids) - held:]


# -----------------------------------------------------------------------------
# Data folders


def checksum(meta, *ids):
    """CRCs of what a data folder holds; of files from 256 MB on of their length, to start fast."""
    # of the description without the checksum itself
    about = json.dumps({**meta, 'crc': 0}).encode()
    sums = [zlib.crc32(about)]
    for x in ids:
        sums.append(zlib.crc32(x if len(x) < 2 ** 27 else str(len(x)).encode()))
    return sums


def save_dataset(folder, train, val, spec, kind, pairs, length, source, overwrite=True):
    """folder/{train,val}.bin, then meta.json: a folder that has a meta.json is complete.
    train, val: flat ids; spec: the tokenizer dict. Other data are replaced only with `overwrite`;
    False if the same are there already, so that nothing was written."""
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
    old = read_dataset(folder)[0]
    if old.get('crc') == meta['crc']:
        # now it is the newest again
        os.utime(folder / 'meta.json')
        return False
    if old:
        check_replace(folder, overwrite, f'{old["train_tokens"]:,} tokens, {old["kind"]} of '
                      f'{old["length"]}, {old["tokenizer"]["name"]}, from {old["source"]}')
    # meta.json last: without it, or if it does not fit, the folder does not count
    write_whole(folder / 'train.bin', train)
    write_whole(folder / 'val.bin', val)
    write_whole(folder / 'meta.json', json.dumps(meta).encode())
    return True


def command_for(folder):
    """The command that prepares a folder; of a text that is not ours, what lists the ways to."""
    if folder.name not in SETS:
        return 'python prepare_data.py -h'
    words = ['python', 'prepare_data.py', folder.name]
    if folder.parent != Path('data'):
        words += ['--data', as_word(folder.parent)]
    return as_command(words)


def read_dataset(folder):
    """(meta dict, train ids, val ids, '') of a folder, or ({}, None, None, what is wrong)."""
    try:
        meta = json.loads((folder / 'meta.json').read_bytes())
        if meta['format'] != FORMAT:
            version = f'is of another version (format {meta["format"]}, here {FORMAT})'
            return {}, None, None, version
        train = np.memmap(folder / 'train.bin', dtype='<u2', mode='r')
        val = np.memmap(folder / 'val.bin', dtype='<u2', mode='r')
        # a bit that has flipped would be trained on in silence
        if meta['crc'] == checksum(meta, train, val):
            return meta, train, val, ''
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {}, None, None, 'is damaged'


def load_dataset(folder):
    """data/<name> -> (meta dict, train ids, val ids), ids memory-mapped uint16."""
    folder = Path(folder)
    # a text given to train_teacher.py
    if os.path.isfile(folder):
        command = as_command(['python', 'prepare_data.py', 'mine', '--input', as_word(folder)])
        fail(f'{folder} is a file, not a folder of prepared data; run: {command}')
    if not os.path.isfile(folder / 'meta.json'):
        # a name without its folder, or a path that was right in another folder
        near = Path('data') / folder.name
        if os.path.isfile(near / 'meta.json'):
            fail(f'{folder} holds no prepared data, but {near} does; add --data {near}')
        fail(f'{folder} holds no prepared data; name another folder with --data, or run: '
             f'{command_for(folder)}')
    meta, train, val, problem = read_dataset(folder)
    if problem:
        fail(f'{folder} {problem}; prepare it again: {command_for(folder)}')
    return meta, train, val


def newest_dataset():
    """The folder of the data set that was prepared last."""
    found = list(Path('data').glob('*/meta.json'))
    if not found:
        fail('data holds no prepared data; first run: python prepare_data.py stories')
    # of two from the same moment the last by name
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path)).parent


# -----------------------------------------------------------------------------
# Rows -> texts, and metrics of them


def as_rows(ids, length):
    """Flat ids of a .bin file -> its whole rows (n, L), int64."""
    # what is left at the end fills no row
    n = len(ids) // length
    return np.array(ids[:n * length], dtype=np.int64).reshape(n, length)


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
            # <pad> stands between a source and its text
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


def words_of(text):
    """Runs of letters and their marks, without regard to case; names of special tokens are none."""
    text = re.sub('|'.join(SPECIAL), ' ', text)
    return regex.findall(r'[\p{L}\p{M}]+', text.casefold())


# characters of scripts that put no spaces between words: Thai and Lao, Burmese, Khmer, kana and the
# signs beside them, Chinese, wide signs, rarer Chinese
UNSPACED = (r'[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3001-\u30ff\u31f0-\u31ff\u3400-\u9fff'
            r'\uf900-\ufaff\uff01-\uff9f\U00020000-\U0003ffff]')


def has_spaces(words):
    """Whether words are words, and not DNA or whole sentences of a script without spaces."""
    letters = ''.join(words)
    unspaced = len(letters) - len(re.sub(UNSPACED, '', letters))
    if unspaced > 0.5 * len(letters):
        return False
    # words of a text have 4 to 8 letters on average, from English to Finnish, in Korean 2 to 3
    return 2 * len(words) <= len(letters) <= 12 * len(words)


@functools.lru_cache(maxsize=4)
def corpus_words(folder, limit=5_000_000):
    """The set of words in the first `limit` training tokens of a data folder; it is empty for a
    text without spaces."""
    meta, train, _ = load_dataset(folder)
    words = words_of(decode(make_encoding(meta['tokenizer']), train[:limit]))
    return set(words) if has_spaces(words) else set()


def sanity_metrics(rows, meta, data=''):
    """Metrics that tell text from noise, for rows (B, L): a dict of floats.
    dates: fraction of valid rows (one of the eight forms of their source), entropy of the forms
    over ln 8. stories: see story_metrics. Else: entropy of a row's tokens (nats), fractions of
    unique rows and of words that occur in the folder `data`, if it exists and has words."""
    texts = to_texts(rows, meta)
    if meta['tokenizer']['name'] == 'dates':
        forms = [(date_forms(source), text) for source, text in texts]
        used = [allowed.index(text) for allowed, text in forms if text in allowed]
        return {'valid': len(used) / len(texts), 'form_entropy': entropy_of(used) / math.log(8)}
    if meta['tokenizer']['name'] == 'stories':
        metrics = story_metrics([text for _, text in texts])
        del metrics['slot_divergence']
        return metrics
    entropies = [entropy_of(ids) for _, ids in split_rows(rows, meta)]
    metrics = {'entropy': sum(entropies) / len(entropies), 'unique': len(set(texts)) / len(texts)}
    if data and os.path.isfile(Path(data) / 'meta.json'):
        vocabulary = corpus_words(str(data))
        # a text of digits or signs only has no words
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
    # what to read
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
    add('--parallel', action='store_true', help='pairs: of two files line n belongs to line n')
    add('--val-input', nargs='+', metavar='FILE', help='hold out these, in place of --val')
    # how to write it
    add('--tokenizer', help='gpt2, bpe:N, words:N (rows with other words are left out), byte, or '
        'bert:vocab.txt (lower case without line breaks); what suits the text')
    add('--length', type=number(int, 4, LONGEST_ROW),
        help='tokens per row; what holds most texts, of a stream 32, or as in the papers')
    add('--val', type=number(float, 0.0001, 0.9999), default=0.1,
        help='fraction held out, of a stream its end; of a set with a test split at most that')
    add('--data', default='data', help='the folder that receives NAME/')
    add('--overwrite', action='store_true', help='replace other data in NAME/')
    return parser.parse_args(argv)


def check(args):
    """Stop at options that cannot be, before anything is read."""
    ours = args.name in SETS
    files = args.input or [args.name]
    mine = as_command(['python', 'prepare_data.py', 'mine', '--input', *map(as_word, files)])
    if args.input and args.name in BUILT_IN:
        fail(f'{args.name} needs no --input; give your text a name: {mine}')
    if not ours and not args.input and os.path.exists(args.name):
        fail(f'{args.name} is a file or a folder; give your text a name: {mine}')
    if not re.fullmatch(r'\w[\w.-]*', args.name) or args.name.lower() == 'cache':
        fail(f'NAME {args.name!r}: must be of letters, digits, "_", "-" and ".", and not cache')
    if not ours and not args.input:
        names = ', '.join(SETS)
        fail(f'{args.name}: not one of {names}; for your own text add --input FILE')
    if (args.columns or args.parallel) and not args.input:
        fail(f'--columns and --parallel are for your own text; leave them out of {args.name}')
    if args.columns and (args.parallel or len(args.columns) > 2):
        fail('--columns: name one of texts, or two of pairs; of --parallel files none')
    if args.tokenizer and args.name in ('stories', 'dates'):
        fail(f'{args.name} has a tokenizer of its own; leave out --tokenizer')
    if args.tokenizer:
        check_tokenizer(args.tokenizer)


def read_items(args, left_out):
    """(items, where they are from): a list of texts or pairs, or a column of the hub."""
    if args.input:
        names = ' '.join(Path(name).name for name in args.input)
        return read_files(args.input, args, left_out), names
    if args.name == 'stories':
        return stories(), 'draw_story of prepare_data.py'
    if args.name == 'dates':
        return dates(), 'all days of 1900-2099'
    if args.name == 'pydocs':
        return list(sentences(docstrings())), f'Python {sys.version.split()[0]}'
    items = load_hub(args.name, Path(args.data) / 'cache', left_out)
    if args.rows:
        # rows are held in memory
        items = [text or '' for text in items]
    return items, HUB[args.name]['path']


def prepare_rows(args, items, val_items, tokenizer, length, left_out):
    """Texts or pairs, each in a row -> (train, val, tokenizer dict, length, advice on length)."""
    items = clean_items(items, args.name == 'stories', left_out)
    val_items = clean_items(val_items, False, left_out)
    # from all texts, held out or not: a code has to be able to write them
    texts = list(chain.from_iterable(map(as_texts, items + val_items)))
    spec = make_tokenizer(tokenizer, texts)
    encoding = make_encoding(spec)
    # stories and dates are known to fit
    if args.name not in ('stories', 'dates'):
        items, sizes = measure(items, encoding, left_out)
        val_items, val_sizes = measure(val_items, encoding, left_out)
        length = length or choose_length(sizes + val_sizes)
    train_items, val_items = split_items(items, args.val, val_items, left_out)
    train, train_sizes = pack_rows(encoding, train_items, length)
    val, val_sizes = pack_rows(encoding, val_items, length)
    sizes = train_sizes + val_sizes
    too_long = sum(size > length for size in sizes)
    left_out['too long'] += too_long
    advice = ''
    if too_long > 0.1 * len(sizes):
        enough = int(np.quantile(sizes, 0.95, method='higher'))
        # whole books are for a stream, and not for rows
        option = f'--length {enough}' if enough <= LONGEST_ROW else 'a stream, without --rows,'
        advice = f'{option} would hold 95 % of them'
    return train, val, spec, length, advice


def prepare_stream(args, texts, val_texts, tokenizer, length, left_out):
    """Documents, one after the other -> (train, val, tokenizer dict, length, no advice)."""
    if tokenizer.startswith('words:'):
        fail(f'--tokenizer {tokenizer}: leaves out rows with other words, which a stream lacks; '
             f'add --rows, or take bpe:2048')
    # of a column of the hub so many documents show what is frequent
    spec = make_tokenizer(tokenizer, texts if isinstance(texts, list) else texts[:100_000])
    encoding = make_encoding(spec)
    cache = Path(args.data) / 'cache'
    train, sizes = pack_stream(texts, encoding, cache, left_out)
    if val_texts:
        val, _ = pack_stream(val_texts, encoding, cache, left_out)
    else:
        documents = SETS.get(args.name, {}).get('test', 0)
        train, val = split_stream(train, sizes, args.val, documents)
    return train, val, spec, length or 32, ''


# what helps if too little is left, by the reason why most was left out
REMEDIES = {'duplicate': 'give texts that differ',
            'labeled as different': 'give pairs that are labeled as asking the same',
            'with unknown words or characters': 'take --tokenizer bpe:2048, which writes any text',
            'with a text that is held out': 'give other texts to train on'}


def main(argv=None):
    args = parse(argv)
    check(args)
    start = time.time()
    folder = Path(args.data) / args.name
    settings = SETS.get(args.name, {})

    # read, encode and split; what is left out is counted by its reason
    left_out = Counter()
    items, source = read_items(args, left_out)
    if len(items) == 0:
        fail(f'{source}: holds no text')
    val_items = read_files(args.val_input, args, left_out) if args.val_input else []
    pairs = isinstance(items[0], tuple)
    if val_items and isinstance(val_items[0], tuple) != pairs:
        fail('--val-input: has texts where --input has pairs, or the other way round')
    kind = 'rows' if pairs or wants_rows(args) else 'stream'
    notes = []
    tokenizer = args.tokenizer or settings.get('tokenizer')
    if not tokenizer:
        tokenizer, why = choose_tokenizer(items, kind)
        notes.append(f'--tokenizer {tokenizer}: {why}')
    make = prepare_rows if kind == 'rows' else prepare_stream
    train, val, spec, length, advice = make(
        args, items, val_items, tokenizer, args.length or settings.get('length'), left_out)
    reasons = ', '.join(f'{n:,} {reason}' for reason, n in left_out.items() if n) or 'nothing'
    if min(len(train), len(val)) < length:
        # what helps depends on why most of it was left out
        remedy = 'give more texts' if kind == 'rows' else 'give more text, or a smaller --length'
        reason, n = left_out.most_common(1)[0]
        if n:
            remedy = advice or REMEDIES.get(reason, remedy)
        fail(f'{source}: too little text for rows of {length} tokens: {len(train):,} to train on, '
             f'{len(val):,} held out, left out: {reasons}; {remedy}')

    # write, and say what became of it
    written = save_dataset(folder, train, val, spec, kind=kind, pairs=pairs, length=length,
                           source=source, overwrite=args.overwrite)
    notes += [f'left out: {reasons}', advice]
    if re.match('bpe|words', tokenizer) and spec['name'] != tokenizer:
        notes.append(f'{tokenizer}: only {spec["name"]}, as the text has no more to learn')
    if not written:
        notes.append(f'{folder} already holds exactly these data, and was left as it is')
    V = len(spec['tokens']) + len(SPECIAL)
    notes.append(f'{folder}: {len(train):,} tokens to train on, {len(val):,} held out; {kind} of '
                 f'{length}; {spec["name"]}, {V:,} tokens; {time.time() - start:.0f} s')
    # the newest in data/ is what train_teacher.py takes anyway
    command = ['python', 'train_teacher.py']
    if Path(args.data) != Path('data'):
        command += ['--data', as_word(folder)]
    notes.append(f'next: {as_command(command)}')
    if pairs:
        notes.append(f'or:   {as_command([*command, "--model", "diffuseq"])}')
    for note in filter(None, notes):
        say(note)


if __name__ == '__main__':
    run_script(main)
