"""Turn text into data/<name>/{train,val}.bin and meta.json, ready for train_teacher.py.

    python prepare_data.py pydocs          # offline default: the prose inside your own Python
    python prepare_data.py dates           # ISO date -> one of eight written forms, checkable
    python prepare_data.py shakespeare     # tiny Shakespeare, over `datasets`
    python prepare_data.py mine --input a.txt b.jsonl.gz --tokenizer gpt2 --length 128

The .bin files are flat little-endian uint16 token ids, to be memory-mapped. meta.json says how to
read them and holds the complete tokenizer. Two kinds:
    rows    row after row of exactly `length` ids: [source <sep>] text <eos> <pad> ...
    stream  one long stream, documents ended by <eos>; a training row is any window of it
Needs neither torch nor the network; the other scripts borrow the small helpers from here.
"""
import argparse
import ast
import dataclasses
import datetime
import functools
import gzip
import json
import os
import platform
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

FORMAT = 1
SPECIAL = ['<eos>', '<pad>', '<sep>', '<bos>']      # ids V-4 ... V-1 of every tokenizer


@dataclass
class Options:
    name: str = 'pydocs'    # pydocs | dates | shakespeare, or any name together with --input
    input: tuple = ()       # local .txt, .jsonl (text, or src and trg) or .parquet, plain or .gz
    tokenizer: str = 'bpe:2048'     # gpt2 | bpe:N | byte (dates has its own)
    length: int = 32        # tokens per row (dates: as long as needed)
    val: float = 0.05       # share held out for validation, from the end of a stream
    kind: str = ''          # rows (a sentence, line or pair each) | stream; default by the data
    data: str = 'data'      # folder that receives <name>/
    seed: int = 0           # of the shuffle before rows are split


# -------------------------------------------------------------------------------------------------
# Small helpers every script uses

def fail(message):
    """End with one line on stderr and exit status 2, argparse's own."""
    print(f'{Path(sys.argv[0]).name}: {message}', file=sys.stderr)
    raise SystemExit(2)


def parse(options, positional='', presets=None, argv=None):
    """A dataclass of defaults -> its instance from the command line.

    The comment behind each field is its help text; the field named `positional` needs no dashes.
    """
    module = sys.modules[options.__module__]
    source = Path(module.__file__).read_text(encoding='utf-8')
    source = source.split(f'class {options.__name__}:')[1].split('\n\n\n')[0]
    told = dict(re.findall(r'^    (\w+): .*?# (.*)$', source, re.M))
    parser = argparse.ArgumentParser(description=module.__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f'{message} (-h lists the options)')
    for f in dataclasses.fields(options):
        how = {bool: dict(action=argparse.BooleanOptionalAction),
               tuple: dict(nargs='+')}.get(f.type, dict(type=f.type))
        if f.name == positional:
            how['nargs'] = '?'
        parser.add_argument(f.name if f.name == positional else '--' + f.name.replace('_', '-'),
                            default=f.default, help=f'{told[f.name]} [{f.default}]', **how)
    if presets:                         # a preset changes the defaults; explicit options still win
        preset = parser.parse_known_args(argv)[0].preset
        if preset not in presets:
            fail(f'--preset {preset}: use {" or ".join(presets)}')
        parser.set_defaults(**presets[preset])
    return options(**vars(parser.parse_args(argv)))


def write_whole(path, data):
    """Write bytes completely or not at all: to a temporary file beside `path`, then os.replace."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'wb') as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------
# Tokenizers: a plain dict for JSON and checkpoints <-> a tiktoken.Encoding

# a word, a digit or a run of punctuation, each with at most one space before it
WORDS = r' ?[^\W\d_]+| ?\d| ?(?:[^\s\w]|_)+|\s+'


def encoding(spec):
    """The tiktoken.Encoding of a dict {name, pattern, tokens as latin-1 strings in rank order}."""
    import tiktoken
    ranks = {token.encode('latin-1'): i for i, token in enumerate(spec['tokens'])}
    return tiktoken.Encoding(spec['name'], pat_str=spec['pattern'], mergeable_ranks=ranks,
                             special_tokens={s: len(ranks) + i for i, s in enumerate(SPECIAL)})


def encode(enc, spec, text):
    """Token ids of `text`; ValueError names the first piece that the tokenizer lacks."""
    if spec['name'] == 'dates':         # no byte fallback here: every piece must be a token itself
        for piece in re.findall(spec['pattern'] + '|.', text, re.S):
            if piece not in spec['tokens']:
                raise ValueError(f'{piece!r} is not in the vocabulary of this model')
    return enc.encode_ordinary(text)


def train_bpe(texts, size):
    """Byte-level BPE: merge the most frequent pair of neighbours until there are `size` tokens.

    Words are counted once and a pair remembers the words it occurs in, so that a merge touches
    only those: a megabyte of text takes seconds in plain Python.
    """
    counts = {}
    for text in texts:
        for word in re.findall(WORDS, text):
            counts[word] = counts.get(word, 0) + 1
    words, times = [[bytes([b]) for b in word.encode()] for word in counts], list(counts.values())
    pairs, where = {}, {}

    def count(i, sign):
        for pair in zip(words[i], words[i][1:]):
            pairs[pair] = pairs.get(pair, 0) + sign * times[i]
            where.setdefault(pair, set()).add(i)

    for i in range(len(words)):
        count(i, 1)
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) + len(SPECIAL) < size and pairs:
        a, b = max(pairs, key=pairs.get)        # ties go to the pair that was seen first
        tokens.append(a + b)
        for i in where[a, b]:
            count(i, -1)
            merged, joined = [], False
            for piece in words[i]:
                if merged[-1:] == [a] and piece == b and not joined:
                    merged[-1], joined = a + b, True
                else:
                    merged, joined = merged + [piece], False
            words[i] = merged
            count(i, 1)
        del pairs[a, b]
    return {'name': f'bpe:{len(tokens) + len(SPECIAL)}', 'pattern': WORDS,
            'tokens': [token.decode('latin-1') for token in tokens]}


def make_tokenizer(how, texts):
    """The tokenizer dict for gpt2, byte or bpe:N."""
    if how == 'byte':
        return {**train_bpe([], 0), 'name': 'byte'}
    if re.fullmatch(r'bpe:\d{1,6}', how) and 300 <= int(how[4:]) <= 60000:
        return train_bpe(texts, int(how[4:]))
    if how != 'gpt2':
        fail(f'--tokenizer {how}: use gpt2, byte or bpe:N with N from 300 to 60000')
    import tiktoken
    try:
        gpt2 = tiktoken.get_encoding('gpt2')
    except Exception as e:              # tiktoken downloads it once
        fail(f'the gpt2 tokenizer cannot be fetched ({type(e).__name__}); set TIKTOKEN_CACHE_DIR '
             'to a filled cache, or use --tokenizer bpe:8192')
    tokens = [gpt2.decode_single_token_bytes(i).decode('latin-1') for i in range(50256)]
    return {'name': 'gpt2', 'pattern': gpt2._pat_str, 'tokens': tokens}


# -------------------------------------------------------------------------------------------------
# dates: the exact yardstick. One source, eight right answers, and every sample can be checked.

MONTHS = ('January February March April May June July August September October November '
          'December').split()
# names keep the spaces around them: a date is at most eleven tokens, and V is 49
DATE_TOKENS = re.compile(r' [A-Z][a-z]{2} |[A-Z][a-z]{2,} |the | of |, |st|nd|rd|th|[-./ ]|\d')


@functools.lru_cache(maxsize=None)
def date_forms(iso):
    """The eight written forms of an ISO date: '1987-03-23' -> ('March 23, 1987', ...)."""
    y, m, d = map(int, iso.split('-'))
    month, short = MONTHS[m - 1], MONTHS[m - 1][:3]
    nth = str(d) + ('th' if 10 <= d <= 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(d % 10, 'th'))
    return (f'{month} {d}, {y}', f'the {nth} of {month} {y}', f'{d} {short} {y}', f'{m}/{d}/{y}',
            f'{d}.{m}.{y}', f'{month} {nth}, {y}', f'{y} {month} {d}', f'{y}/{m}/{d}')


def dates(seed):
    """All days of 1900-2099 as (source, target) pairs: train, and 10 % of the days held out."""
    first = datetime.date(1900, 1, 1)
    number = (datetime.date(2100, 1, 1) - first).days
    days = [(first + datetime.timedelta(i)).isoformat() for i in range(number)]
    random.Random(seed).shuffle(days)
    return [[(day, form) for day in part for form in date_forms(day)]
            for part in (days[number // 10:], days[:number // 10])]


def date_tokenizer(pairs):
    """Words and single digits as tokens."""
    pieces = {piece for pair in pairs for text in pair for piece in DATE_TOKENS.findall(text)}
    return {'name': 'dates', 'pattern': DATE_TOKENS.pattern, 'tokens': sorted(pieces)}


# -------------------------------------------------------------------------------------------------
# pydocs: real prose that every Python ships

def docstrings():
    """Yield the docstrings of the standard library without its tests, then the help topics."""
    import pydoc_data.topics
    import sysconfig
    library = Path(sysconfig.get_path('stdlib'))
    skip = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
    for path in sorted(library.rglob('*.py')):
        if skip & set(path.relative_to(library).parts):
            continue
        try:
            nodes = ast.walk(ast.parse(path.read_text(encoding='utf-8')))
        except (SyntaxError, ValueError):
            continue                    # a few library files are templates or not UTF-8
        for node in nodes:
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield ast.get_docstring(node) or ''
    yield from (pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))


def sentences(texts):
    """Unique sentences in order of appearance: prose only, no doctests, tables or signatures."""
    seen = {}
    for text in texts:
        for paragraph in re.split(r'\n\s*\n|\n(?=\s*[-*]\s)', text):
            flat = ' '.join(re.sub(r'[*`]+|^\s*-\s+', '', paragraph).split())
            for s in re.split(r'(?<=[.!?])\s+(?=[A-Z])', flat):
                words = s.split()
                plain = sum(word.strip('.,;:()"\'!?').isalpha() for word in words)
                if (4 <= len(words) <= 60 and s[0].isupper() and s[-1] in '.!?' and s.isascii()
                        and plain >= 0.75 * len(words) and '>>>' not in s):
                    seen[s] = None
    return list(seen)


# -------------------------------------------------------------------------------------------------
# Local files and the hub

def read_file(path):
    """Yield the documents of a file: str, or (source, target) from src/trg records."""
    name, where = path.name.removesuffix('.gz'), f'--input {path}'
    try:
        if name.endswith('.parquet'):
            import pyarrow.parquet
            yield from (document(r, where) for r in pyarrow.parquet.read_table(path).to_pylist())
            return
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == '.gz' else raw).decode()
        text = text.replace('\r\n', '\n')
        if '\0' in text:
            raise ValueError('it holds NUL characters')
        if name.endswith(('.jsonl', '.json')):
            lines = [line for line in text.split('\n') if line.strip()]
            yield from (document(json.loads(line), where) for line in lines)
        else:
            yield from (t for t in text.split('<|endoftext|>') if t.strip())
    except FileNotFoundError:
        fail(f'{where}: no such file')
    except (OSError, EOFError, ValueError) as e:        # covers bad gzip, UTF-8, JSON and parquet
        fail(f'{where}: cannot be read ({e}); give UTF-8 .txt, .jsonl or .parquet, plain or .gz')


def document(record, where):
    """One JSON or parquet record -> its text, or its (source, target) pair."""
    if isinstance(record, dict):
        if isinstance(record.get('src'), str) and isinstance(record.get('trg'), str):
            return record['src'], record['trg']
        if isinstance(record.get('text'), str):
            return record['text']
    fail(f'{where}: every record needs a string "text", or strings "src" and "trg"')


def shakespeare():
    """Tiny Shakespeare over the hub."""
    try:
        import datasets
        table = datasets.load_dataset('karpathy/tiny_shakespeare', revision='refs/convert/parquet')
        return [text for split in ('train', 'validation', 'test') for text in table[split]['text']]
    except Exception as e:              # the hub's client raises many kinds
        fail(f'the hub cannot be reached ({type(e).__name__}); fetch the text yourself and run: '
             'python prepare_data.py shakespeare --input input.txt')


# -------------------------------------------------------------------------------------------------
# Writing

def pack_rows(enc, items, length):
    """Documents -> (flat ids of rows `[source <sep>] text <eos> <pad>...`, rows too long, length).

    length 0 takes the longest row.
    """
    import numpy as np
    eos, pad, sep = (enc._special_tokens[s] for s in SPECIAL[:3])
    rows = []
    for item in items:
        source, text = item if isinstance(item, tuple) else (None, item)
        rows.append([] if source is None else enc.encode_ordinary(source) + [sep])
        rows[-1] += enc.encode_ordinary(text) + [eos]
    length = length or max(map(len, rows))
    kept = [row + [pad] * (length - len(row)) for row in rows if len(row) <= length]
    return np.array(kept, dtype='<u2').reshape(-1), len(rows) - len(kept), length


def write_dataset(folder, arrays, spec, **about):
    """folder/{train,val}.bin, then meta.json: a folder that has a meta.json is complete."""
    V = len(spec['tokens'])
    meta = {'format': FORMAT, 'name': Path(folder).name, 'vocab': V + len(SPECIAL),
            'special': {name: V + i for i, name in enumerate(SPECIAL)}, **about,
            'train_tokens': len(arrays[0]), 'val_tokens': len(arrays[1]),
            'python': platform.python_version(), 'tokenizer': spec}
    for split, array in zip(('train', 'val'), arrays):
        write_whole(Path(folder) / f'{split}.bin', array.astype('<u2').tobytes())
    write_whole(Path(folder) / 'meta.json', json.dumps(meta).encode())


def main(o):
    import numpy as np
    start = time.time()
    if not re.fullmatch(r'\w[\w.-]*', o.name):
        fail(f'{o.name!r} cannot name a folder: use letters, digits, "_", "-" and "."')
    if not (0 < o.val < 1 and 4 <= o.length <= 65536 and o.kind in ('', 'rows', 'stream')):
        fail('--val lies between 0 and 1, --length between 4 and 65536, --kind is rows or stream')

    # 1. documents; dates come with a split of their own
    parts = None
    if o.input:
        items = [item for path in o.input for item in read_file(Path(path))]
        source = ' '.join(Path(path).name for path in o.input)
    elif o.name == 'dates':
        parts, source = dates(o.seed), 'all days of 1900-2099'
        items = parts[0] + parts[1]
    elif o.name == 'pydocs':
        items, source = sentences(docstrings()), f'docstrings of Python {platform.python_version()}'
    elif o.name == 'shakespeare':
        items, source = shakespeare(), 'karpathy/tiny_shakespeare'
    else:
        fail(f'unknown dataset {o.name!r}: use pydocs, dates or shakespeare, or your own files: '
             f'python prepare_data.py {o.name} --input FILES')
    pairs = {isinstance(item, tuple) for item in items}
    if len(pairs) != 1:
        fail('--input mixes text with src/trg pairs: prepare them under two names' if items else
             'the input is empty')
    pairs = pairs.pop()
    kind = o.kind or ('rows' if pairs or not o.input and o.name != 'shakespeare' else 'stream')
    if pairs and kind == 'stream':
        fail('--kind stream: src/trg pairs are always rows')
    if kind == 'rows' and not pairs:    # a line each
        items = [line.strip() for item in items for line in item.split('\n') if line.strip()]

    # 2. tokens
    own = o.name == 'dates' and not o.input
    texts = (text for item in items for text in (item if pairs else [item]))
    spec = date_tokenizer(items) if own else make_tokenizer(o.tokenizer, texts)
    enc, length, left_out = encoding(spec), o.length, 0
    if kind == 'rows':
        if parts is None:
            random.Random(o.seed).shuffle(items)
            held = max(1, int(o.val * len(items)))
            parts = items[held:], items[:held]
        train, left_out, length = pack_rows(enc, parts[0] or parts[1], 0 if own else o.length)
        val, more, length = pack_rows(enc, parts[1], length)
        left_out += more
    else:
        eos = [enc._special_tokens['<eos>']]
        ids = np.array([i for item in items for i in enc.encode_ordinary(item) + eos], dtype='<u2')
        train, val = np.split(ids, [len(ids) - int(o.val * len(ids))])
    if min(len(train), len(val)) < length:
        fail(f'too little text for rows of {length} tokens: {len(train)} tokens to train on, '
             f'{len(val)} to validate; give more text, or a smaller --length')

    # 3. files
    folder = Path(o.data) / o.name
    try:
        write_dataset(folder, (train, val), spec, kind=kind, pairs=pairs, length=length,
                      source=source, left_out=left_out)
    except OSError as e:
        fail(f'{folder}: cannot be written ({e.strerror}); choose another folder with --data')
    for split, array in zip(('train', 'val'), (train, val)):
        rows = f' = {len(array) // length:,} rows' if kind == 'rows' else ''
        print(f'{folder}/{split}.bin: {len(array):,} tokens{rows}')
    print(f'{folder}/meta.json: tokenizer {spec["name"]}, {enc.n_vocab:,} tokens; {kind} of length '
          f'{length}; {left_out:,} rows too long, left out; {time.time() - start:.1f} s')
    print(f'next: python train_teacher.py --data {folder}')


if __name__ == '__main__':
    main(parse(Options, positional='name'))
