"""Turn text into data/<name>/{train,val}.bin and meta.json, ready for train_teacher.py.

    python prepare_data.py           # stories: small sums told in English, each text checkable
    python prepare_data.py pydocs    # the prose inside your own Python; needs no network either
    python prepare_data.py dates     # ISO date -> one of eight written forms, checkable
    python prepare_data.py lm1b      # from the hub, as are owt, qqp, shakespeare, ...; see -h
    python prepare_data.py mine --input a.txt b.txt.gz --tokenizer gpt2 --length 128
    python prepare_data.py names --input names.txt --rows --tokenizer byte --length 16

The .bin files are flat uint16 ids, to be memory-mapped; meta.json holds the complete tokenizer and
    kind: rows    of `length` ids: text <eos> <pad> ..., of pairs source <sep> <pad> ... text <eos>
    kind: stream  documents one after the other, each ended by <eos>; any window of it is a row
"""
import argparse
import ast
import calendar
import datetime
import errno
import functools
import gzip
import io
import json
import logging
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
from pathlib import Path

import numpy as np

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
    except MemoryError:
        fail(OUT_OF_MEMORY)
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename:
            raise
        mute_stdout()
        fail(f'stdout: {why_not(error)}')
    except RuntimeError as error:
        # torch's, which is not imported here: of a GPU, and of a CPU
        if type(error).__name__ != 'OutOfMemoryError' and 'allocate memory' not in str(error):
            raise
        fail(OUT_OF_MEMORY)


OUT_OF_MEMORY = ('out of memory; write fewer rows, or train with a smaller --batch, or with more '
                 '--micro-batches, the parts that a batch is computed in')


def mute_stdout():
    """What is printed from here on goes nowhere, without an error, even when Python exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text):
    """Print a line of a long run, which goes on if nobody reads it, or the disk is full."""
    try:
        print(text, flush=True)
    except OSError as error:
        mute_stdout()
        with suppress(OSError):
            print(f'{Path(sys.argv[0]).name}: stdout: {error.strerror}; going on without it',
                  file=sys.stderr)


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


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and ends each option's help with its default."""

    def _get_help_string(self, action):
        # nothing, no and empty are no defaults worth a word
        # (0 is one, and equals False)
        if action.default is False or action.default in (None, '', argparse.SUPPRESS):
            return action.help
        return f'{action.help} [%(default)s]'


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors; options cannot be abbreviated, `-h` shows the defaults."""

    def __init__(self, **how):
        # an abbreviation that works today may mean another option tomorrow
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **how)

    def error(self, message):
        fail(f'{message}  (-h lists the options)')


def in_range(text, kind, low, high, what):
    """The number that an option's text stands for; outside [low, high] an error that says so."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    # every comparison with nan is false, so nan is refused too
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f'{text[:40]!r} is not {what}')
    return value


def number(kind, low, high):
    """An argparse type: a number from low to high."""
    name = 'a whole number' if kind is int else 'a number'
    return lambda text: in_range(text, kind, low, high, f'{name} from {low:,} to {high:,}')


def nonnegative_int(text):
    """argparse type: a whole number from 0 to 1e9."""
    return in_range(text, int, 0, 10 ** 9, 'a whole number from 0 to 1,000,000,000')


def positive_int(text):
    """argparse type: a whole number from 1 to 1e9."""
    return in_range(text, int, 1, 10 ** 9, 'a whole number from 1 to 1,000,000,000')


def fraction(text):
    """argparse type: a number from 0 to 1."""
    return in_range(text, float, 0, 1, 'a number from 0 to 1')


def nonnegative(text):
    """argparse type: a finite number from 0."""
    return in_range(text, float, 0, sys.float_info.max, 'a finite number from 0 up')


def why_not(error):
    """What an OSError on writing means, and what to do about it."""
    # some have no text of their own
    reason = error.strerror or type(error).__name__
    if error.errno == errno.ENOSPC:
        return f'{reason}; make room on the disk'
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f'{reason}; name a folder that you may write to'
    return f'{reason}; name another folder'


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

# a word, a digit or a run of punctuation, each with at most one space before it
WORDS = r' ?[^\W\d_]+| ?\d| ?(?:[^\s\w]|_)+|\s+'
LONGEST_WORD = 64
DATE_TOKENS = r'[A-Z][a-z]{2,}|the | of |, |st|nd|rd|th|[-./ ]|\d'       # V is 48, L is 23
STORY_TOKENS = r' [A-Za-z]+|\.'                                         # V is 109, L is 21


def count_words(texts):
    """How often each word of WORDS occurs; longer ones are cut into pieces of LONGEST_WORD."""
    counts = Counter()
    for text in texts:
        counts.update(match[0] for match in re.finditer(WORDS, text))
    pieces = Counter()
    for word, n in counts.items():
        # a line of ten million letters is no word: every merge would go through all of it
        for start in range(0, len(word), LONGEST_WORD):
            pieces[word[start:start + LONGEST_WORD]] += n
    return pieces


def train_bpe(texts, size):
    """Byte-level BPE (arXiv:1508.07909): merge the most frequent pair of neighbours until there
    are `size` tokens, or no pair is left. Returns a tokenizer dict."""
    counts = count_words(texts)
    times = list(counts.values())
    # fast in plain Python: a merge is one str.replace in each word that has the pair.
    # a word is a string of pieces, each between two bars of its own; its bytes are the characters
    # 0-255
    bar = '\u0100'
    words = []
    for word in counts:
        words.append(bar + (bar + bar).join(word.encode().decode('latin-1')) + bar)
    pairs = Counter()               # pair of neighbouring pieces -> how often it occurs
    where = defaultdict(set)        # pair -> the words that have it

    def count_pairs(i, sign):
        pieces = words[i][1:-1].split(bar + bar)
        for pair in zip(pieces, pieces[1:]):
            pairs[pair] += sign * times[i]
            where[pair].add(i)

    # all words once; after that a merge touches only the words that it changes
    for i in range(len(words)):
        count_pairs(i, 1)
    tokens = dict.fromkeys(map(chr, range(256)))        # a set that keeps its order
    while len(tokens) + len(SPECIAL) < size and pairs:
        # ties go to the pair that was seen first
        best = max(pairs, key=pairs.get)
        # every word is one token already
        if pairs[best] == 0:
            break
        # the bars tell |a|b| from a piece that only ends in a, or begins with b
        first, second = best
        tokens[first + second] = None
        apart = f'{bar}{first}{bar}{bar}{second}{bar}'
        joined = f'{bar}{first}{second}{bar}'
        for i in where.pop(best):
            count_pairs(i, -1)
            words[i] = words[i].replace(apart, joined)
            count_pairs(i, 1)
        del pairs[best]
    return {'name': f'bpe:{len(tokens) + len(SPECIAL)}', 'pattern': WORDS, 'tokens': list(tokens)}


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
    # JSON has no bytes: each is written as the character of the same number
    latin = [token.encode().decode('latin-1') for token in tokens]
    return {'name': 'bert', 'pattern': pattern, 'tokens': latin}


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
    if how in ('gpt2', 'byte', 'dates', 'stories'):
        return
    # a folder of BERT's weights has a vocab.txt
    if how.startswith('bert:'):
        if not os.path.isfile(how[5:]):
            fail(f'--tokenizer {how}: there is no such file of BERT\'s vocabulary')
        return
    if not re.fullmatch('bpe:[0-9]+', how):
        fail(f'--tokenizer {how}: must be gpt2, byte, bpe:N or bert:vocab.txt')
    # 256 bytes and four special tokens are there anyway, and uint16 ends at 65535
    if not 300 <= int(how[4:][:10]) <= 60000:
        fail(f'--tokenizer {how}: N must be from 300 to 60000')


def make_tokenizer(how, texts):
    """The tokenizer dict for gpt2, byte, bpe:N, bert:FILE, or the words of dates or stories."""
    check_tokenizer(how)
    if how == 'gpt2':
        return read_gpt2()
    if how == 'byte':
        # the 256 bytes, and no merge
        return {**train_bpe([], 0), 'name': 'byte'}
    if how.startswith('bpe:'):
        return train_bpe(texts, int(how[4:]))
    if how.startswith('bert:'):
        return read_bert(how[5:])
    # dates and stories: the pieces that occur
    pattern = DATE_TOKENS if how == 'dates' else STORY_TOKENS
    before = '' if how == 'dates' else ' '
    pieces = set()
    for text in texts:
        pieces.update(re.findall(pattern, before + text))
    return {'name': how, 'pattern': pattern, 'tokens': sorted(pieces)}


def make_encoding(spec):
    """The tiktoken.Encoding of a tokenizer dict; SPECIAL are its last four ids."""
    import tiktoken
    # a lower rank is merged earlier, so the order of the tokens is the order of the merges
    ranks = {token.encode('latin-1'): i for i, token in enumerate(spec['tokens'])}
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL)}
    return tiktoken.Encoding(spec['name'], pat_str=spec['pattern'], mergeable_ranks=ranks,
                             special_tokens=special)


def encode(encoding, text, unknown=None):
    """A text's token ids. A word of dates and stories, or a character of BERT, that is unknown is
    an error that names it; those of BERT are counted instead in the Counter `unknown`, if given."""
    if encoding.name == 'bert':
        # BERT knows lower case without accents, and each punctuation mark as a word; in the form
        # NFD an accent is a character of its own
        plain = re.sub('[\u0300-\u036f]', '', unicodedata.normalize('NFD', text.lower()))
        words = re.findall(r'[^\W_]+|[^\w\s]|_', plain)
        spaced = ''.join(' ' + word for word in words)
        ids = encoding.encode_ordinary(spaced)
        # tiktoken drops in silence what fits no token; what comes back has only the rest
        written = encoding.decode(ids)
        dropped = Counter()
        if written != spaced:
            dropped = Counter(spaced) - Counter(written)
        # a mark that begins no word of the vocabulary is written without its space
        del dropped[' ']
        if dropped and unknown is None:
            fail(f'{next(iter(dropped))!r} is not in the vocabulary of bert')
        if dropped:
            unknown.update(dropped)
        return ids
    if encoding.name == 'dates':
        # any other character is a piece, too, so that it is found to be unknown
        return known_pieces(encoding, re.findall(DATE_TOKENS + '|.', text, re.DOTALL))
    if encoding.name == 'stories':
        # each word takes the space before it along, however many there are
        words = re.findall(r'[^\s.]+|\.', text)
        pieces = [word if word == '.' else ' ' + word for word in words]
        return known_pieces(encoding, pieces)
    return encoding.encode_ordinary(text)


def known_pieces(encoding, pieces):
    """The ids of pieces that are tokens; these tokenizers have no bytes to fall back on."""
    ids = []
    for piece in pieces:
        try:
            ids.append(encoding.encode_single_token(piece))
        except KeyError:
            fail(f'{piece.strip()!r} is not in the vocabulary of {encoding.name}')
    return ids


def decode(encoding, ids):
    """The text of token ids, without the space that `encode` has put before the first word."""
    text = encoding.decode(ids)
    if encoding.name in ('bert', 'stories'):
        return text.removeprefix(' ')
    return text


# -----------------------------------------------------------------------------
# dates: the exact yardstick of pairs. One source, eight right answers, all samples checkable
# ours: in no paper; a model that writes only one of the forms, or mixes two, is found out


def date_forms(iso):
    """The eight written forms of an ISO date: '1987-03-23' -> ('March 23, 1987', ...); of any
    other text none."""
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
# stories: the exact yardstick of text. 7.9 million texts, each with a known probability
#   Nora has four old books. She gives one to Ben. Now she has three books.
#   Tom has three coins in the boat. He finds five more. Now he has eight coins.
#   Sam and Ben have three cakes each. Together they have six cakes. Sam is happy.
#   There are eight big books in the drawer. Paul takes seven for Anna. One book is left.
# ours: in no paper; of real text nobody knows the law, so no figure can say how far a model is off

GIRLS = ['Anna', 'Clara', 'Emma', 'Julia', 'Lucy', 'Mary', 'Nora', 'Ruth']
BOYS = ['Ben', 'Jack', 'Leo', 'Max', 'Paul', 'Peter', 'Sam', 'Tom']
THINGS = {'apple': 'apples', 'ball': 'balls', 'berry': 'berries', 'book': 'books', 'box': 'boxes',
          'cake': 'cakes', 'coin': 'coins', 'egg': 'eggs', 'key': 'keys', 'leaf': 'leaves',
          'pear': 'pears', 'stone': 'stones'}
QUALITIES = ['big', 'good', 'new', 'old', 'small']
COLOURS = ['black', 'blue', 'brown', 'green', 'red', 'white']
NUMBERS = ['zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten',
           'eleven', 'twelve']      # zero is never written

# the slots that are drawn uniformly
CHOICES = {
    'name': GIRLS + BOYS,
    'thing': list(THINGS),
    'adjective': QUALITIES + COLOURS,
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


def number_law(plot):
    """{(number, change): probability}: the first number is uniform, then the second is."""
    # of one thing nothing can be given away such that some is left
    first = [number for number in range(1, 13) if story_changes(plot, number)]
    law = {}
    for number in first:
        changes = story_changes(plot, number)
        for change in changes:
            law[number, change] = 1 / len(first) / len(changes)
    return law


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
    """One text by the law, rng a random.Random: the four plots are equally likely, each slot of
    CHOICES is uniform, two names differ, either may be happy, numbers are as in `number_law`."""
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
    """The regular expression that reads a plot; in each slot only its own words are read."""
    names, numbers = GIRLS + BOYS, NUMBERS[1:]
    things = [*THINGS, *THINGS.values()]
    words = {**CHOICES, 'other': names, 'happy': names, 'number': numbers, 'change': numbers,
             'result': numbers, 'Result': [number.title() for number in numbers],
             'things': things, 'rest': things, 'she': ['she', 'he'], 'She': ['She', 'He'],
             'are': ['is', 'are'], 'remain': ['is', 'are']}
    pattern = template.replace('.', r'\.')
    for slot, known in words.items():
        pattern = pattern.replace(f'{{{slot}}}', f'(?P<{slot}>{"|".join(known)})')
    return re.compile(pattern)


READERS = {plot: story_reader(template) for plot, template in PLOTS.items()}
SINGULAR = {plural: thing for thing, plural in THINGS.items()}


def read_story(text):
    """The slots of a well-formed story as a dict: plot, name, thing, number (the first), change,
    result, ..., and `right`: whether the sum is. None where words or their agreement are wrong."""
    for plot, reader in READERS.items():
        found = reader.fullmatch(text)
        if found:
            story = story_slots(plot, found.groupdict())
            # written anew it is the same text, if pronoun, plurals and verbs agree
            if story is None or write_story(story) != text:
                return None
            return story
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
    names = len(CHOICES['name'])
    pairs = names * (names - 1)
    things = len(CHOICES['thing'])
    places = len(CHOICES['place'])
    if plot == 'give':
        return pairs * things * len(CHOICES['adjective'])
    if plot == 'find':
        return names * things * places
    if plot == 'share':
        return pairs * things * 2       # either is happy
    return pairs * things * places * len(CHOICES['quality'])


def story_probability(text):
    """The exact probability that `draw_story` writes this text; 0 where it is not right."""
    story = read_story(text)
    if story is None or not story['right']:
        return 0.0
    plot = story['plot']
    numbers = number_law(plot)[story['number'], story['change']]
    return numbers / len(PLOTS) / story_ways(plot)


def expected_seen(n_train):
    """The share of the law's samples that are among n_train independent draws: the sum over all
    texts of p (1 - (1 - p)^n). Texts of one plot and the same numbers are equally likely."""
    seen = 0.0
    for plot in PLOTS:
        for p in number_law(plot).values():
            # the probability of each of these texts
            each = p / len(PLOTS) / story_ways(plot)
            seen += p / len(PLOTS) * -math.expm1(n_train * math.log1p(-each))
    return seen


def story_law(slot):
    """The exact law of a plot and one slot: {(plot, value): probability}."""
    law = defaultdict(float)
    for plot in PLOTS:
        if slot == 'number':
            for (number, _), p in number_law(plot).items():
                law[plot, number] += p / len(PLOTS)
        else:
            for value in CHOICES[slot]:
                law[plot, value] += 1 / len(PLOTS) / len(CHOICES[slot])
    return law


def entropy(weights):
    """Entropy in nats of counts or probabilities."""
    total = sum(weights)
    return sum(w / total * math.log(total / w) for w in weights if w > 0)


def divergence(p, q):
    """Jensen-Shannon divergence in nats of two laws, dicts of counts or probabilities."""
    p_total = sum(p.values())
    q_total = sum(q.values())
    # H((p + q) / 2) - (H(p) + H(q)) / 2
    keys = {*p, *q}
    middle = [p.get(k, 0) / p_total / 2 + q.get(k, 0) / q_total / 2 for k in keys]
    return entropy(middle) - (entropy(p.values()) + entropy(q.values())) / 2


def story_figures(texts):
    """Exact figures of a list of texts, a dict of floats.
    well_formed, valid, unique: shares of all texts. Of the valid ones slot_entropy: that of plot,
    name, thing and number over the law's own, mean of the four; slot_divergence: Jensen-Shannon in
    nats between theirs and the law of (plot, number) and (plot, thing), mean of the two."""
    stories = [story for story in map(read_story, texts) if story]
    valid = [story for story in stories if story['right']]
    figures = {'well_formed': len(stories) / max(1, len(texts)),
               'valid': len(valid) / max(1, len(texts)), 'slot_entropy': 0.0,
               'slot_divergence': math.log(2), 'unique': len(set(texts)) / max(1, len(texts))}
    # of no text at all: entropy 0, the largest divergence there is
    if not valid:
        return figures
    # a plot is uniform, whatever the slot beside it
    ratios = [entropy(Counter(s['plot'] for s in valid).values()) / math.log(len(PLOTS))]
    for slot in ('name', 'thing', 'number'):
        # of the slot alone, whatever the plot
        law = defaultdict(float)
        for (_, value), p in story_law(slot).items():
            law[value] += p
        found = Counter(s[slot] for s in valid)
        ratios.append(entropy(found.values()) / entropy(law.values()))
    figures['slot_entropy'] = sum(ratios) / len(ratios)
    # at most 48 cells each, so that 500 samples say something
    gaps = []
    for slot in ('number', 'thing'):
        found = Counter((s['plot'], s[slot]) for s in valid)
        gaps.append(divergence(found, story_law(slot)))
    figures['slot_divergence'] = sum(gaps) / len(gaps)
    return figures


def stories(n=150_000):
    """n texts by the law, always the same. Frequent ones are there more than once."""
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
# Texts of the hub, read by `datasets`

# tokenizer and length of the texts that need no network
BUILT_IN = {'stories': ('stories', 21), 'dates': ('dates', 23), 'pydocs': ('bpe:2048', 32)}
PARQUET = 'refs/convert/parquet'    # a branch; `datasets` runs no scripts any more
# lm1b and owt as long as in FLM, whose tokenizer of lm1b is BERT's (--tokenizer bert:vocab.txt);
# ours: the others, small enough for a laptop. Of a stream so many documents at its end are held
# out, 0: --val
HUB = {     # tokenizer, length, documents held out, where
    'lm1b': ('gpt2', 128, 306_688, dict(path='billion-word-benchmark/lm1b', revision=PARQUET)),
    'owt': ('gpt2', 1024, 100_000, dict(path='Skylion007/openwebtext')),
    'shakespeare': ('bpe:2048', 32, 0, dict(path='karpathy/tiny_shakespeare', revision=PARQUET)),
    'qqp': ('bpe:2048', 40, 0, dict(path='nyu-mll/glue', name='qqp')),      # asked on Quora
    'tinystories': ('bpe:4096', 128, 21_990, dict(path='roneneldan/TinyStories')),
    'wikitext': ('gpt2', 128, 3_760, dict(path='Salesforce/wikitext', name='wikitext-103-raw-v1',
                                          split='train+validation')),
}
# the columns of a pair, source and text; otherwise one column `text` is needed
PAIRS = [('src', 'trg'), ('src', 'tgt'), ('source', 'target'), ('question1', 'question2')]


def pick_columns(found, where):
    """Of the columns found those that are needed: a pair's two, or ('text',)."""
    for pair in PAIRS:
        if set(pair) <= set(found):
            return pair
    if 'text' in found:
        return ('text',)
    names = ', '.join(map(str, found)) or 'none'
    fail(f'{where}: has the columns {names}; needs "text", or two such as "src" and "trg"')


def make_cache(cache):
    """The folder of `datasets`, made here so that one that cannot be written to is told apart."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        fail(f'{cache}: the cache cannot be written: {why_not(error)}')


def load_hub(name, cache):
    """A table with a column `text`, or of qqp the list of pairs that ask the same."""
    # its own splits are put together; held out is the end, where its test split stands
    how = {'split': 'all', **HUB[name][3]}
    make_cache(cache)
    try:
        import datasets
    except ImportError:
        fail('this needs a package more; run: pip install datasets')
    datasets.disable_progress_bars()
    logging.disable()               # of the hub's client: it tells of each of its retries
    try:
        table = datasets.load_dataset(**how, cache_dir=str(cache))
    except Exception as error:      # the library and the hub's client raise dozens of kinds
        # what went wrong below it says whether the disk was full
        for cause in (error, error.__cause__, error.__context__):
            if getattr(cause, 'errno', None) == errno.ENOSPC:
                fail(f'{cache}: {why_not(cause)}')
        fail(f'{how["path"]} cannot be had from the hub ({type(error).__name__}); see to the '
             f'network, or name files of yours behind --input')
    columns = pick_columns(table.column_names, how['path'])
    if columns == ('text',):
        return table.select_columns('text')
    # only those labelled as asking the same
    table = table.filter(lambda same: same == 1, input_columns='label')
    return list(zip(table[columns[0]], table[columns[1]]))


# -----------------------------------------------------------------------------
# Files: text of any extension, .jsonl, .parquet, .tsv, each plain or .gz

KINDS = {'.jsonl': 'jsonl', '.ndjson': 'jsonl', '.json': 'jsonl', '.parquet': 'parquet',
         '.tsv': 'tsv', '.csv': 'csv'}


def kind_of(path):
    """text, jsonl, parquet, tsv or csv, by the extension before .gz; what is unknown is text."""
    name = path.name.lower().removesuffix('.gz')
    return KINDS.get(Path(name).suffix, 'text')


def list_files(names):
    """The files that --input names, all of one kind, each once; a folder stands for all files in
    it that are not hidden."""
    files = []
    for name in names:
        if os.path.isdir(name):
            inside = []
            for path in sorted(Path(name).rglob('*')):
                # such as .DS_Store, or what is in .git
                hidden = any(part.startswith('.') for part in path.relative_to(name).parts)
                if path.is_file() and not hidden:
                    inside.append(path)
            if not inside:
                fail(f'--input {name}: a folder without files')
            files.extend(inside)
        elif os.path.exists(name):
            files.append(Path(name))
        else:
            fail(f'--input {name}: there is no such file')
    # a folder and a file in it may both be named
    files = list({path.resolve(): path for path in files}.values())
    # a README beside records would be read as text
    first = files[0]
    for path in files:
        if kind_of(path) == 'csv':
            fail(f'--input {path}: a .csv is not read; save it as .tsv or .jsonl')
        if kind_of(path) != kind_of(first):
            fail(f'--input: mixes {kind_of(first)} ({first}) and {kind_of(path)} ({path}); '
                 f'give files of one kind')
    return files


def read_bytes(path):
    """What a file holds, unpacked if it is a .gz."""
    try:
        data = path.read_bytes()
    except OSError as error:
        fail(f'{path}: cannot be read ({error.strerror})')
    # names decide, not contents: a text may begin with the same two bytes
    if path.suffix.lower() != '.gz':
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        fail(f'{path}: not a whole .gz file; fetch or make it anew')


def read_text(path):
    """A file's text, without a byte-order mark, all line ends as \\n."""
    data = read_bytes(path)
    # no UTF-8 begins with these two bytes; a text may begin with PAR1, but not end with it, too
    if data.startswith(b'\x1f\x8b'):
        fail(f'{path}: is packed with gzip; its name must end in .gz')
    if data.startswith(b'PAR1') and data.endswith(b'PAR1'):
        fail(f'{path}: is parquet; its name must end in .parquet')
    # utf-8-sig is UTF-8 that may begin with such a mark
    try:
        text = data.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        # of what stands behind such a mark
        line = error.object[:error.start].count(b'\n') + 1
        fail(f'{path}, line {line}: not UTF-8; convert it, with iconv for example')
    if '\0' in text:
        line = text[:text.index('\0')].count('\n') + 1
        fail(f'{path}, line {line}: has a NUL character, so it is not text')
    return text.replace('\r\n', '\n').replace('\r', '\n')


def lines_of(text):
    """The lines of a text; the end of the last one begins no other."""
    return text.removesuffix('\n').split('\n')


def read_jsonl(path):
    """Yield (where it stands, record) for each line that is not blank."""
    for n, line in enumerate(lines_of(read_text(path)), 1):
        if not line.strip():
            continue
        where = f'{path}, line {n}'
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            fail(f'{where}: not JSON; each line must be one record, so write an array one '
                 f'record a line')
        if not isinstance(record, dict):
            fail(f'{where}: not a record; each line must be like {{"text": "..."}}, so write an '
                 f'array one record a line')
        yield where, record


def read_parquet(path):
    """Yield (where it stands, record of the needed columns) for each row."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        fail('this needs a package more; run: pip install datasets')
    data = read_bytes(path)
    try:
        file = parquet.ParquetFile(io.BytesIO(data))
        names = file.schema_arrow.names
        # other columns are not even read, whatever they hold
        columns = [*pick_columns(names, path)]
        if 'label' in names:
            columns.append('label')
        records = file.read(columns=columns).to_pylist()
    except (ArrowException, OSError):
        fail(f'{path}: damaged, or no parquet; fetch or make it anew')
    for n, record in enumerate(records, 1):
        yield f'{path}, row {n}', record


def text_in(record, column, where):
    """The text in a record's column; null is an empty one."""
    if column not in record:
        names = ', '.join(record) or 'none'
        fail(f'{where}: has the columns {names}; needs "{column}", as the records before it')
    text = '' if record[column] is None else record[column]
    if not isinstance(text, str):
        fail(f'{where}: "{column}" is not a text but of the type {type(text).__name__}')
    # JSON can write these: "\\u0000", or half of an emoji, "\\ud83d"
    if '\0' in text:
        fail(f'{where}: "{column}" has a NUL character, so it is not text')
    if re.search('[\ud800-\udfff]', text):
        fail(f'{where}: "{column}" has half of a surrogate pair, which is no character')
    return text


def read_records(path, left_out):
    """The texts, or pairs of texts, of a .jsonl or .parquet file; only needed columns count."""
    reader = read_parquet if kind_of(path) == 'parquet' else read_jsonl
    items = []
    columns = None
    for where, record in reader(path):
        # the first record says what there is
        if columns is None:
            columns = pick_columns(record, where)
        texts = [text_in(record, column, where) for column in columns]
        # of Quora's pairs only those labelled as asking the same
        if columns[0] == 'question1' and str(record.get('label', 1)) not in ('1', 'True'):
            left_out['labelled as different'] += 1
        else:
            items.append(tuple(texts) if len(texts) == 2 else texts[0])
    return items


def read_tsv(path):
    """The pairs of a text of two columns; None if there is no tab in it, so that it is prose."""
    lines = [line.split('\t') for line in lines_of(read_text(path))]
    if all(len(columns) == 1 for columns in lines):
        return None
    pairs = []
    for n, columns in enumerate(lines, 1):
        # a blank line is none, and the first may name the columns
        if columns == [''] or (n == 1 and tuple(columns) in PAIRS):
            continue
        if len(columns) != 2:
            fail(f'{path}, line {n}: columns: {len(columns)}; a .tsv of pairs has two in each line')
        pairs.append(tuple(columns))
    return pairs


def read_files(names, by_line, left_out):
    """The documents of --input: a list of texts, or of pairs of texts. A text file is one document
    (<|endoftext|> in it ends one, too); `by_line`: each of its lines is one."""
    items = []
    for path in list_files(names):
        found = None
        if kind_of(path) in ('jsonl', 'parquet'):
            found = read_records(path, left_out)
        elif kind_of(path) == 'tsv':
            found = read_tsv(path)
        if found is None:
            text = read_text(path)
            found = [text]
            if by_line:
                found = []
                for line in lines_of(text):
                    # one that is blank is counted, see left_out
                    found.extend(split_documents(line) or [''])
        items.extend(found)
    if len({type(item) for item in items}) > 1:
        fail('--input: mixes pairs and texts; give files of one kind')
    # documents end where <|endoftext|> stands, which is no text itself
    if not any(split_documents(''.join(item)) for item in items):
        fail(f'--input {" ".join(names)}: holds no text')
    return items


def untokenise(text):
    """LM1B's words as running text: 'It \'s " $ 5 " ( not 6 ) .' -> It's "$5" (not 6)."""
    # a clitic, then marks that follow a word, those that come before one, quotes, fractions
    text = re.sub(r" '(?=\w)", "'", text)
    text = re.sub(r' (?=[,.;:?!%)\]])', '', text)
    text = re.sub(r'(?<=[(\[$£]) ', '', text)
    text = re.sub(r'" ([^"]*?) "', r'"\1"', text)
    return re.sub(r' / ', '/', text)


# -----------------------------------------------------------------------------
# Rows: one document each, padded. Layouts: see the top of this file


def clean_items(items, keep_duplicates, left_out):
    """The items without empty ones and, unless they are wanted, duplicates, which are counted."""
    full = [item for item in items if all(map(str.strip, as_texts(item)))]
    left_out['empty'] += len(items) - len(full)
    if keep_duplicates:
        return full
    unique = list(dict.fromkeys(full))
    left_out['duplicate'] += len(full) - len(unique)
    return unique


def as_texts(item):
    """The texts of an item: of a pair both."""
    return item if isinstance(item, tuple) else (item,)


def split_items(items, held_share, left_out):
    """(train, val) of documents or pairs, a random share of the different texts or sources held
    out. No document is in both, and no text of a pair; a pair that would be in both is left out."""
    # all targets of a source stay together
    sources = [as_texts(item)[0] for item in items]
    unique = list(dict.fromkeys(sources))
    random.Random(0).shuffle(unique)
    held = set(unique[:max(1, int(held_share * len(unique)))])
    train = [item for item, source in zip(items, sources) if source not in held]
    val = [item for item, source in zip(items, sources) if source in held]
    # the text of a pair held out may be in other pairs too
    seen = set()
    for item in val:
        seen.update(as_texts(item))
    apart = [item for item in train if seen.isdisjoint(as_texts(item))]
    left_out['with a text that is held out'] += len(train) - len(apart)
    return apart, val


def known_items(items, encoding, left_out):
    """The documents or pairs that the tokenizer can write; the others, with BERT's, are counted."""
    known = []
    for item in items:
        unknown = Counter()
        for text in as_texts(item):
            encode(encoding, text, unknown)
        if not unknown:
            known.append(item)
    left_out['with characters that bert does not know'] += len(items) - len(known)
    return known


def pack_rows(encoding, items, length):
    """Documents or pairs -> (flat ids of whole rows of `length`, how many tokens each item has).
    Those that are longer get no row."""
    eos, pad, sep = (encoding.encode_single_token(name) for name in SPECIAL[:3])
    rows = []
    sizes = []
    for item in items:
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


def advise_length(sizes, too_long):
    """The --length that holds 95 % of texts of so many tokens; '' if few of them are too long."""
    if too_long <= 0.1 * len(sizes):
        return ''
    enough = int(np.quantile(sizes, 0.95, method='higher'))
    # whole books are for a stream, and not for rows
    if enough > LONGEST_ROW:
        return ''
    return f'--length {enough} would hold 95 % of them'


# -----------------------------------------------------------------------------
# Streams: documents one after the other


def split_documents(text):
    """The documents of a text, which <|endoftext|> ends; blank ones are none."""
    parts = (text or '').split('<|endoftext|>')
    return [part for part in parts if part.strip()]


def to_ids(batch, encoding, clean):
    """Texts of a table -> of each document its token ids, ended by <eos>, how many these are, and
    how many of its characters BERT does not know."""
    eos = encoding.n_vocab - len(SPECIAL)
    ids = []
    dropped = []
    for text in batch['text']:
        for document in split_documents(text):
            unknown = Counter()
            ids.append(np.array(encode(encoding, clean(document), unknown) + [eos], np.uint16))
            dropped.append(unknown.total())
    return {'ids': ids, 'n': [len(x) for x in ids], 'dropped': dropped}


def pack_texts(texts, encoding, clean):
    """A list of texts -> (flat ids, number of tokens of each document, characters dropped)."""
    done = to_ids({'text': texts}, encoding, clean)
    return np.concatenate(done['ids']).astype('<u2'), np.array(done['n']), sum(done['dropped'])


def pack_table(table, encoding, clean, cache):
    """A table of the hub -> the same, the ids in a file; `datasets` caches what is done."""
    # starting processes takes longer than a small table
    many = os.cpu_count() if len(table) > 10_000 else None
    table = table.map(to_ids, batched=True, remove_columns='text', num_proc=many,
                      fn_kwargs=dict(encoding=encoding, clean=clean))
    sizes = np.array(table.with_format('numpy')['n'][:])
    dropped = int(np.sum(table.with_format('numpy')['dropped'][:]))
    # without a name: it is gone when this script ends
    file = tempfile.TemporaryFile(dir=cache)
    try:
        for batch in table.iter(1000):
            file.write(np.concatenate(batch['ids']).astype('<u2').tobytes())
        file.flush()
    except OSError as error:
        fail(f'{cache}: {why_not(error)}')
    return np.memmap(file, '<u2', 'r', shape=int(sizes.sum())), sizes, dropped


def split_stream(ids, sizes, held_share, documents):
    """(train, val) of flat ids: held out is the end, a share of the tokens, or only so
    many documents if these are fewer tokens (0: no such bound)."""
    held = int(held_share * sizes.sum())
    if documents:
        held = min(held, int(sizes[-documents:].sum()))
    return ids[:len(ids) - held], ids[len(ids) - held:]


# -----------------------------------------------------------------------------
# Data folders


def checksum(meta, *ids):
    """Of all that a data folder holds; of files from 256 MB on only the length, to start fast."""
    # of the description without the checksum itself
    about = json.dumps({**meta, 'crc': 0}).encode()
    sums = [zlib.crc32(about)]
    for x in ids:
        sums.append(zlib.crc32(x if len(x) < 2 ** 27 else str(len(x)).encode()))
    return sums


def save_dataset(folder, train, val, spec, kind, pairs, length, source):
    """folder/{train,val}.bin, then meta.json: a folder that has a meta.json is complete.
    train, val: flat ids; spec: the tokenizer dict."""
    train = np.ascontiguousarray(train, '<u2')
    val = np.ascontiguousarray(val, '<u2')
    V = len(spec['tokens'])
    meta = {
        'format': FORMAT,
        'name': Path(folder).name,
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
    # meta.json last: without it, or if it does not fit, the folder does not count
    write_whole(Path(folder) / 'train.bin', train)
    write_whole(Path(folder) / 'val.bin', val)
    write_whole(Path(folder) / 'meta.json', json.dumps(meta).encode())


def command_for(folder):
    """The command that prepares a folder; of a text that is not ours, what lists the ways to."""
    if folder.name not in BUILT_IN and folder.name not in HUB:
        return 'python prepare_data.py -h'
    words = ['python', 'prepare_data.py', folder.name]
    if folder.parent != Path('data'):
        words += ['--data', as_word(folder.parent)]
    return as_command(words)


def load_dataset(folder):
    """data/<name> -> (meta dict, train ids, val ids), ids memory-mapped uint16."""
    folder = Path(folder)
    # a text given to train_teacher.py
    if os.path.isfile(folder):
        command = as_command(['python', 'prepare_data.py', 'mine', '--input', as_word(folder)])
        fail(f'{folder} is a file, not a folder of prepared data; run: {command}')
    if not os.path.isfile(folder / 'meta.json'):
        fail(f'{folder} holds no prepared data; run: {command_for(folder)}')
    damaged = f'{folder} is damaged; prepare it again: {command_for(folder)}'
    try:
        meta = json.loads((folder / 'meta.json').read_bytes())
        version = meta['format']
    except (OSError, ValueError, KeyError, TypeError):
        fail(damaged)
    if version != FORMAT:
        fail(f'{folder} is of another version (format {version}, here {FORMAT}); '
             f'prepare it again: {command_for(folder)}')
    try:
        train = np.memmap(folder / 'train.bin', dtype='<u2', mode='r')
        val = np.memmap(folder / 'val.bin', dtype='<u2', mode='r')
    except (OSError, ValueError):
        fail(damaged)
    # a bit that has flipped would be trained on in silence
    if meta.get('crc') != checksum(meta, train, val):
        fail(damaged)
    return meta, train, val


def newest_dataset():
    """The folder of the data set that was prepared last."""
    found = list(Path('data').glob('*/meta.json'))
    if not found:
        fail('data holds no prepared data; first run: python prepare_data.py stories')
    # of two from the same moment the last by name
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path)).parent


# -----------------------------------------------------------------------------
# Rows -> texts


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
    """Runs of letters, without regard to case; the names of special tokens are none."""
    text = re.sub('|'.join(SPECIAL), ' ', text)
    return re.findall(r'[^\W\d_]+', text.casefold())


# characters of scripts that put no spaces between words: Thai and Lao, Burmese, Khmer, kana and the
# signs beside them, Chinese, wide signs, rarer Chinese
UNSPACED = (r'[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3001-\u30ff\u31f0-\u31ff\u3400-\u9fff'
            r'\uf900-\ufaff\uff01-\uff9f\U00020000-\U0003ffff]')


def has_spaces(words):
    """
    Whether words are words, and not whole sentences of a script that has no spaces, or DNA, nor the
    bits between signs that Python takes for no letters, such as the vowels of Hindi.
    """
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


def entropy_of(items):
    """Entropy in nats of how often each item occurs."""
    return entropy(Counter(items).values())


def sanity_metrics(rows, meta, data=''):
    """Figures that tell text from noise, for rows (B, L): a dict of floats.
    dates: share of valid rows (one of the eight forms of their source), entropy of these over ln 8.
    stories: see story_figures. Else: entropy of a row's tokens (nats), share of unique rows, and of
    words known from the folder `data`, unless it is gone or its text has no words."""
    texts = to_texts(rows, meta)
    if meta['tokenizer']['name'] == 'dates':
        forms = [(date_forms(source), text) for source, text in texts]
        used = [known.index(text) for known, text in forms if text in known]
        return {'valid': len(used) / len(texts), 'form_entropy': entropy_of(used) / math.log(8)}
    if meta['tokenizer']['name'] == 'stories':
        figures = story_figures([text for _, text in texts])
        del figures['slot_divergence']
        return figures
    entropies = [entropy_of(ids) for _, ids in split_rows(rows, meta)]
    figures = {'entropy': sum(entropies) / len(entropies), 'unique': len(set(texts)) / len(texts)}
    if data and os.path.isfile(Path(data) / 'meta.json'):
        known = corpus_words(str(data))
        # a text of digits or signs only has no words to know
        if known:
            words = words_of(' '.join(text for _, text in texts))
            figures['words'] = sum(word in known for word in words) / max(1, len(words))
    return figures


# -----------------------------------------------------------------------------
# The script

def parse(argv=None):
    """The options."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    # what to read
    add('name', nargs='?', default='stories', metavar='NAME',
        help=f'{", ".join([*BUILT_IN, *HUB])}, or any name for your own --input')
    add('--input', nargs='+', metavar='FILE',
        help='UTF-8 text, .jsonl or .parquet (text, or src and trg), .tsv (pairs), .gz; or folders')
    add('--rows', action='store_true', help='own text: each line or record is a row of its own')
    # how to write it
    add('--tokenizer', help='gpt2, bpe:N, byte, or bert:vocab.txt, which is lower case without '
        'line breaks; bpe:2048, of lm1b and owt gpt2')
    add('--length', type=positive_int, help='tokens per row; 32, or as in the papers')
    add('--val', type=fraction, default=0.1,
        help='share held out, of a stream its end; of lm1b, owt, tinystories and wikitext at most '
             'what is usual')
    add('--data', default='data', help='the folder that receives NAME/')
    return parser.parse_args(argv)


def check(args):
    """Stop at options that cannot be, before anything is read."""
    ours = args.name in BUILT_IN or args.name in HUB
    if not ours and not args.input and os.path.exists(args.name):
        command = as_command(['python', 'prepare_data.py', 'mine', '--input', as_word(args.name)])
        fail(f'{args.name} is a file or a folder; give your text a name: {command}')
    if not re.fullmatch(r'\w[\w.-]*', args.name):
        fail(f'NAME {args.name!r}: must be of letters, digits, "_", "-" and "."')
    if args.name.lower() == 'cache':
        fail('NAME cache: that folder is for downloads; choose another name')
    if args.input and args.name in BUILT_IN:
        files = [as_word(name) for name in args.input]
        command = as_command(['python', 'prepare_data.py', 'mine', '--input', *files])
        fail(f'{args.name} needs no --input; give your text a name: {command}')
    if not args.input and not ours:
        names = ', '.join([*BUILT_IN, *HUB])
        fail(f'{args.name}: not one of {names}; for your own text add --input FILE')
    if args.rows and not args.input:
        fail('--rows is for your own text; add --input FILE')
    if args.rows and args.name == 'lm1b':
        fail('--rows: lm1b is a stream, as in the paper; choose another name')
    if args.tokenizer and args.name in ('stories', 'dates'):
        fail(f'{args.name} has a tokenizer of its own; leave out --tokenizer')
    if args.tokenizer:
        check_tokenizer(args.tokenizer)
    if args.length and not 4 <= args.length <= LONGEST_ROW:
        fail(f'--length {args.length}: must be from 4 to {LONGEST_ROW}')
    if not 0 < args.val < 1:
        fail(f'--val {args.val}: must be more than 0 and less than 1')


def read_items(args, left_out):
    """(items, where they are from): a list of texts or pairs, or a table of the hub."""
    if args.input:
        by_line = args.rows or args.name == 'lm1b'
        names = ' '.join(Path(name).name for name in args.input)
        return read_files(args.input, by_line, left_out), names
    if args.name == 'stories':
        return stories(), 'draw_story of prepare_data.py'
    if args.name == 'dates':
        return dates(), 'all days of 1900-2099'
    if args.name == 'pydocs':
        return list(sentences(docstrings())), f'Python {sys.version.split()[0]}'
    return load_hub(args.name, Path(args.data) / 'cache'), HUB[args.name][3]['path']


def prepare_rows(args, items, tokenizer, length, left_out):
    """Documents or pairs -> (train, val, tokenizer dict, advice on --length), each text in a row of
    its own."""
    items = clean_items(items, args.name == 'stories', left_out)
    texts = []
    for item in items:
        texts.extend(as_texts(item))
    # from all texts, those held out too: it is a code, and has to be able to write them
    spec = make_tokenizer(tokenizer, texts)
    encoding = make_encoding(spec)
    if encoding.name == 'bert':
        items = known_items(items, encoding, left_out)
    train_items, val_items = split_items(items, args.val, left_out)
    train, train_sizes = pack_rows(encoding, train_items, length)
    val, val_sizes = pack_rows(encoding, val_items, length)
    sizes = train_sizes + val_sizes
    too_long = sum(size > length for size in sizes)
    left_out[f'of {len(sizes):,} too long for a row of {length} tokens'] += too_long
    advice = advise_length(sizes, too_long)
    if too_long and not (len(train) and len(val)):
        fail(f'{too_long:,} of {len(sizes):,} texts are longer than a row of {length} tokens; '
             f'{advice or "give a larger --length"}')
    return train, val, spec, advice


def prepare_stream(args, items, tokenizer, left_out):
    """Documents, a list or a table -> (train, val, tokenizer dict), one after the other."""
    documents = HUB[args.name][2] if args.name in HUB else 0
    clean = untokenise if args.name == 'lm1b' else str
    if isinstance(items, list):
        left_out['empty'] += sum(not split_documents(text) for text in items)
        texts = items
    else:
        # so many documents say enough of what is frequent
        some = items.select(range(min(len(items), 100_000)))
        texts = [row['text'] for row in some if row['text']]
    spec = make_tokenizer(tokenizer, [clean(text).replace('<|endoftext|>', '') for text in texts])
    encoding = make_encoding(spec)
    if isinstance(items, list):
        ids, sizes, dropped = pack_texts(items, encoding, clean)
    else:
        print(f'{len(items):,} documents, now into tokens ...', flush=True)
        ids, sizes, dropped = pack_table(items, encoding, clean, Path(args.data) / 'cache')
        # only blank documents have no tokens
        left_out['empty'] += max(0, len(items) - len(sizes))
    left_out['characters that bert does not know'] += dropped
    train, val = split_stream(ids, sizes, args.val, documents)
    return train, val, spec


def tell_replaced(folder):
    """Say what a folder holds that is about to be replaced."""
    if not os.path.isfile(folder / 'meta.json'):
        return
    try:
        old = json.loads((folder / 'meta.json').read_bytes())
        held = (f'{old["train_tokens"]:,} tokens, {old["kind"]} of {old["length"]}, '
                f'{old["tokenizer"]["name"]}, from {old["source"]}')
    except (OSError, ValueError, KeyError, TypeError):
        held = 'data that are damaged'
    print(f'{folder} is replaced; it held {held}')


def main(argv=None):
    args = parse(argv)
    check(args)
    start = time.time()
    folder = Path(args.data) / args.name
    tokenizer, length, *_ = BUILT_IN.get(args.name) or HUB.get(args.name) or ('bpe:2048', 32)
    tokenizer = args.tokenizer or tokenizer
    length = args.length or length

    # read, encode and split; what is left out is counted by its reason
    left_out = Counter()
    items, source = read_items(args, left_out)
    if len(items) == 0:
        fail(f'{source}: holds no text')
    pairs = isinstance(items, list) and isinstance(items[0], tuple)
    # own text is a stream, unless --rows; so are tables of the hub
    stream = not isinstance(items, list) or (args.input and not args.rows and not pairs)
    kind = 'stream' if stream else 'rows'
    advice = ''
    if stream:
        train, val, spec = prepare_stream(args, items, tokenizer, left_out)
    else:
        train, val, spec, advice = prepare_rows(args, items, tokenizer, length, left_out)
    reasons = ', '.join(f'{n:,} {reason}' for reason, n in left_out.items() if n) or 'nothing'
    if min(len(train), len(val)) < length:
        fail(f'{source}: too little text for rows of {length} tokens: {len(train):,} to train on, '
             f'{len(val):,} held out, left out: {reasons}; give more, or a smaller --length')

    # write, and say what became of it
    tell_replaced(folder)
    save_dataset(folder, train, val, spec, kind=kind, pairs=pairs, length=length, source=source)
    if tokenizer.startswith('bpe:') and spec['name'] != tokenizer:
        print(f'{tokenizer}: only {spec["name"][4:]}, as each word of the text is one token then')
    V = len(spec['tokens']) + len(SPECIAL)
    print(f'left out: {reasons}')
    if advice:
        print(advice)
    print(f'{folder}: {len(train):,} tokens to train on, {len(val):,} held out; '
          f'{kind} of {length}; {tokenizer}, {V:,} tokens; {time.time() - start:.0f} s')
    if args.name != 'stories':
        better = '--stagger 0' if pairs else '--channels 8 --stagger 0 --axis loss'
        print(f'the settings of a laptop are for stories; a flow of other text needs {better}')
    # the newest in data/ is what train_teacher.py takes anyway
    command = ['python', 'train_teacher.py']
    if Path(args.data) != Path('data'):
        command += ['--data', as_word(folder)]
    print(f'next: {as_command(command)}')


if __name__ == '__main__':
    run_script(main)
