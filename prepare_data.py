"""Turn text into data/<name>/{train,val}.bin and meta.json, ready for train_teacher.py.

    python prepare_data.py pydocs          # offline default: the prose inside your own Python
    python prepare_data.py dates           # ISO date -> one of eight written forms, checkable
    python prepare_data.py lm1b            # from the hub; so are owt, shakespeare, qqp
    python prepare_data.py mine --input a.txt b.txt.gz --tokenizer gpt2 --length 128

The .bin files are flat uint16 ids, to be memory-mapped; meta.json holds the complete tokenizer and
    kind: rows    of `length` ids: text <eos> <pad> ..., of pairs source <sep> <pad> ... text <eos>
    kind: stream  documents one after the other, each ended by <eos>; any window of it is a row
"""
import argparse
import ast
import calendar
import datetime
import logging
import os
import pydoc_data.topics
import random
import re
import sys
import sysconfig
import tempfile
import time
import unicodedata
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

SPECIAL = ['<eos>', '<pad>', '<sep>', '<bos>']      # ids V-4 ... V-1 of every tokenizer

@dataclass
class Options:
    name: str = 'pydocs'    # pydocs | dates | lm1b | owt | shakespeare | qqp, or any with --input
    input: tuple = ()       # local .txt, .jsonl (text, or src and trg) or .parquet, plain or .gz
    tokenizer: str = ''     # gpt2 | bpe:N | byte | bert:vocab.txt; default bpe:2048, lm1b, owt gpt2
    length: int = 0         # tokens per row; default 32, lm1b 128, owt 1024, dates as needed
    val: float = 0.1        # share held out, at most; of a stream its end, as in the papers
    data: str = 'data'      # folder that receives <name>/

# ---- The command line of every script; torch is not needed for -h ----
def fail(message):
    """End with one line on stderr and exit status 2, argparse's own."""
    print(f'{Path(sys.argv[0]).name}: {message}', file=sys.stderr)
    raise SystemExit(2)

def parse(options, positional=''):
    """A dataclass of defaults -> its instance from the command line; comments are the help."""
    module = sys.modules[options.__module__]
    source = Path(module.__file__).read_text(encoding='utf-8').split('class Options:')[1]
    told = dict(re.findall(r'^    (\w+): .*?# (.*)$', source.split('\n\n')[0], re.M))
    parser = argparse.ArgumentParser(description=module.__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f'{message} (-h lists the options)')
    kinds = {bool: dict(action=argparse.BooleanOptionalAction), tuple: dict(nargs='+')}
    for f in fields(options):
        free = f.name == positional
        how = dict(nargs='?*'[f.type is tuple]) if free else kinds.get(f.type, dict(type=f.type))
        parser.add_argument(f.name if free else '--' + f.name.replace('_', '-'), default=f.default,
                            help=f'{told[f.name]} [{f.default}]', **how)
    o = options(**vars(parser.parse_args()))
    wrong = [k for k, x in vars(o).items() if isinstance(x, (int, float)) and not 0 <= x < 1e300]
    return fail(f'--{wrong[0].replace("_", "-")}: must be a number from 0') if wrong else o

# ---- Tokenizers: a dict {name, pattern, tokens as latin-1 strings in rank order} ----
# a word, a digit or a run of punctuation, each with at most one space before it
WORDS = r' ?[^\W\d_]+| ?\d| ?(?:[^\s\w]|_)+|\s+'

def train_bpe(texts, size):
    """Byte-level BPE: merge the most frequent pair of neighbours until there are `size` tokens."""
    # a line of ten million letters is no word: every merge would go through all of it
    counts = Counter(x for text in texts for x in re.findall(WORDS, text) if len(x) <= 64)
    bar = '\u0100'                      # between pieces; bytes are the characters 0-255
    words = [bar + bar.join(word.encode().decode('latin-1')) + bar for word in counts]
    times, pairs, where = list(counts.values()), Counter(), defaultdict(set)
    def count(i, sign):
        pieces = words[i].split(bar)[1:-1]
        for pair in zip(pieces, pieces[1:]):
            pairs[pair] += sign * times[i]
            where[pair].add(i)
    for i in range(len(words)):         # from here on a merge touches only the words it changes
        count(i, 1)
    tokens = dict.fromkeys(map(chr, range(256)))        # a set that keeps its order
    while len(tokens) + len(SPECIAL) < size and pairs:
        a, b = max(pairs, key=pairs.get)        # ties go to the pair that was seen first
        tokens[a + b] = None
        apart, joined = f'{bar}{a}{bar}{b}{bar}', f'{bar}{a}{b}{bar}'
        for i in where.pop((a, b)):
            count(i, -1)
            # twice: in runs such as "----" two neighbouring pairs share a bar
            words[i] = words[i].replace(apart, joined).replace(apart, joined)
            count(i, 1)
        del pairs[a, b]
    return {'name': f'bpe:{len(tokens) + len(SPECIAL)}', 'pattern': WORDS, 'tokens': list(tokens)}

def make_tokenizer(how, texts):
    """The tokenizer dict for gpt2, byte, bpe:N, bert:FILE or dates (words and single digits)."""
    if how == 'dates':
        pieces = {piece for text in texts for piece in re.findall(DATE_TOKENS, text)}
        return {'name': how, 'pattern': DATE_TOKENS, 'tokens': sorted(pieces)}
    if how == 'byte' or re.fullmatch(r'bpe:\d{3,5}', how) and 300 <= int(how[4:]) <= 60000:
        return train_bpe(texts, int(how[4:] if ':' in how else 0))
    words = Path(how[5:]).read_text('utf-8', 'replace').split() if os.path.isfile(how[5:]) else ()
    if how[:5] == 'bert:' and 0 < len(words) < 2 ** 16 - len(SPECIAL):
        # '##ing' goes on with a word, 'the' begins one, here as ' the'; the longest is taken first
        tokens = dict.fromkeys(x[2:] if x[:2] == '##' else ' ' + x for x in words)
        return {'name': 'bert', 'tokens': [x.encode().decode('latin-1') for x in tokens],
                'pattern': '|'.join(map(re.escape, sorted(tokens, key=len, reverse=True)))}
    if how != 'gpt2':
        fail(f'--tokenizer {how}: use gpt2, byte, bpe:N, N from 300 to 60000, or bert:vocab.txt')
    import tiktoken
    try:
        gpt2 = tiktoken.get_encoding('gpt2')
    except Exception:                   # tiktoken downloads it once
        fail('gpt2 cannot be fetched; fill TIKTOKEN_CACHE_DIR, or use --tokenizer bpe:8192')
    tokens = [gpt2.decode_single_token_bytes(i).decode('latin-1') for i in range(50256)]
    return {'name': how, 'pattern': gpt2._pat_str, 'tokens': list(tokens)}

def encode(enc, text):
    """A text's token ids. BERT's know lower case without accents, and punctuation as words."""
    if enc.name == 'bert':
        plain = re.sub('[\u0300-\u036f]', '', unicodedata.normalize('NFD', text.lower()))
        text = ''.join(' ' + x for x in re.findall(r'[^\W_]+|[^\w\s]|_', plain))
    return enc.encode_ordinary(text)

# ---- dates: the exact yardstick. One source, eight right answers, all samples checkable ----
DATE_TOKENS = r'[A-Z][a-z]{2,}|the | of |, |st|nd|rd|th|[-./ ]|\d'       # V is 48, L is 23

def date_forms(iso):
    """The eight written forms of an ISO date: '1987-03-23' -> ('March 23, 1987', ...)."""
    try:
        y, m, d = datetime.date.fromisoformat(iso).timetuple()[:3]
    except ValueError:
        return ()
    month, short = calendar.month_name[m], calendar.month_abbr[m]
    nth = str(d) + ('th' if 10 <= d <= 20 else {1: 'st', 2: 'nd', 3: 'rd'}.get(d % 10, 'th'))
    return (f'{month} {d}, {y}', f'the {nth} of {month} {y}', f'{d} {short} {y}', f'{m}/{d}/{y}',
            f'{d}.{m}.{y}', f'{month} {nth}, {y}', f'{d}-{short}-{y}', f'{month} the {nth}, {y}')

def dates():
    """(source, target) pairs: each day of 1900-2099 in each of its eight forms."""
    days = (str(datetime.date(1900, 1, 1) + datetime.timedelta(n)) for n in range(73049))
    return [(day, form) for day in days for form in date_forms(day)]

# ---- Other texts: the prose in every Python; local files and the hub, both through `datasets` ----
def docstrings():
    """Yield the docstrings of the standard library without its tests, then the help topics."""
    library = Path(sysconfig.get_path('stdlib'))
    skip = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
    for path in sorted(library.rglob('*.py')):
        with suppress(SyntaxError, ValueError):     # a few are templates or not UTF-8
            if skip.isdisjoint(path.relative_to(library).parts):
                kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
                nodes = ast.walk(ast.parse(path.read_text(encoding='utf-8')))
                yield from (ast.get_docstring(x) or '' for x in nodes if isinstance(x, kinds))
    yield from (text for _, text in sorted(pydoc_data.topics.topics.items()))

def sentences(texts):
    """Yield sentences in order of appearance: prose only, no doctests, tables or signatures."""
    for paragraph in (p for text in texts for p in re.split(r'\n\s*\n|\n(?=\s*[-*]\s)', text)):
        flat = ' '.join(re.sub(r'[*`]+|^\s*-\s+', '', paragraph).split())
        for s in re.split(r'(?<=[.!?])\s+(?=[A-Z])', flat):
            words = s.split()
            plain = sum(word.strip('.,;:()"\'!?').isalpha() for word in words)
            if (4 <= len(words) <= 60 and s[0].isupper() and s[-1] in '.!?' and s.isascii()
                    and plain >= 0.75 * len(words) and '>>>' not in s):
                yield s

PARQUET = 'refs/convert/parquet'    # a branch; `datasets` runs no scripts any more
# as the papers have them: tokenizer, length, documents held out (all of LM1B's test split)
HUB = {
    'lm1b': ('gpt2', 128, 306_688, dict(path='billion-word-benchmark/lm1b', revision=PARQUET)),
    'owt': ('gpt2', 1024, 100_000, dict(path='Skylion007/openwebtext')),
    'shakespeare': ('bpe:2048', 32, 0, dict(path='karpathy/tiny_shakespeare', revision=PARQUET)),
    'qqp': ('bpe:2048', 32, 0, dict(path='nyu-mll/glue', name='qqp'))}      # asked on Quora

def load_texts(complaint, cache, **how):
    """What datasets.load_dataset has, by way of a folder: a table of texts or a list of pairs."""
    try:
        import datasets
        datasets.disable_progress_bars()
        logging.disable()               # of the hub's client: it tells of each of its retries
        table = datasets.load_dataset(**how, cache_dir=str(cache), split='all')
    except Exception as e:              # the library and the hub's client raise dozens of kinds
        fail('this needs a package more; run: pip install datasets' if isinstance(e, ImportError)
             else f'{complaint} ({type(e).__name__})')
    columns = {k for k, x in table.features.items() if getattr(x, 'dtype', '').endswith('string')}
    for a, b in ('src', 'trg'), ('question1', 'question2'):
        if {a, b} <= columns:           # of Quora's pairs only those labelled as asking the same
            if b == 'question2' and 'label' in table.features:
                table = table.filter(lambda same: same == 1, input_columns='label')
            return list(dict.fromkeys((x, y) for x, y in zip(table[a], table[b]) if x and y))
    if 'text' not in columns:
        fail(f'{complaint} (records need a "text", or "src" and "trg", all strings)')
    return table.select_columns('text')

def from_files(o, cache):
    """The documents of local files of one kind, read as `datasets` does, through a folder."""
    known = {'.txt': 'text', '.jsonl': 'json', '.parquet': 'parquet'}
    where = f'--input {" ".join(o.input)}'
    builder, *more = {known.get(Path(path.removesuffix('.gz')).suffix) for path in o.input}
    if more or not builder or not all(map(os.path.isfile, o.input)):
        fail(f'{where}: give existing .txt, .jsonl or .parquet files, plain or .gz, all of a kind')
    how = {'sample_by': 'line' if o.name == 'lm1b' else 'document'} if builder == 'text' else {}
    return load_texts(f'{where}: cannot be read as UTF-8 {builder}; mend or convert it', cache,
                      path=builder, data_files=list(o.input), **how)

def untokenise(text):
    """LM1B's words as running text: 'It \'s " $ 5 " ( not 6 ) .' -> It's "$5" (not 6)."""
    for pattern, new in ((r" '(?=\w)", "'"), (r' (?=[,.;:?!%)\]])', ''), (r'(?<=[(\[$£]) ', ''),
                         (r'" ([^"]*?) "', r'"\1"'), (r' / ', '/')):
        text = re.sub(pattern, new, text)
    return text

# ---- Writing ----
def pack_rows(enc, items, length):
    """Documents -> flat ids of rows, laid out as described above, and the rows' length."""
    eos, pad, sep = (enc._special_tokens[s] for s in SPECIAL[:3])
    rows = []
    for item in items:
        source, text = item if isinstance(item, tuple) else (None, item)
        given = [] if source is None else encode(enc, source) + [sep]
        rows.append((given, encode(enc, text) + [eos]))
    length = length or max(len(given) + len(text) for given, text in rows)      # 0: the longest
    # the texts of pairs end alike, whatever the length of their source
    kept = [given + [pad] * (length - n) + text if given else text + [pad] * (length - n)
            for given, text in rows if (n := len(given) + len(text)) <= length]
    return np.array(kept, dtype='<u2').reshape(-1), length

def to_ids(batch, enc, clean):
    """Texts of a table -> their token ids, each text ended by <eos>, and how many these are."""
    texts = [t for text in batch['text'] for t in (text or '').split('<|endoftext|>') if t.strip()]
    ids = [encode(enc, clean(text)) + [enc.n_vocab - len(SPECIAL)] for text in texts]
    return {'ids': [np.array(x, np.uint16) for x in ids], 'n': [len(x) for x in ids]}

def pack_stream(table, share, documents, cache, **how):
    """A table of texts -> (train, val), flat ids on disk; `datasets` caches what is done."""
    table = table.map(to_ids, batched=True, remove_columns='text', fn_kwargs=how,
                      num_proc=os.cpu_count() if len(table) > 10_000 else None)
    sizes, at = table.with_format('numpy')['n'][:], 0
    held = min(int(share * sizes.sum()), int(sizes[-documents:].sum()))
    ids = np.memmap(tempfile.TemporaryFile(dir=cache), '<u2', 'w+', shape=int(sizes.sum()))
    for batch in table.iter(1000):
        part = np.concatenate(batch['ids'])
        ids[at:at + len(part)], at = part, at + len(part)
    return np.split(ids, [at - held])

def main(o):
    from model import encoding, write_dataset
    start, folder, cache = time.time(), Path(o.data) / o.name, Path(o.data) / 'cache'
    tokenizer, length, documents, how = HUB.get(o.name, ('bpe:2048', 32, 0, {}))     # 0: all
    length = o.length or length
    if not (re.fullmatch(r'\w[\w.-]*', o.name) and 0 < o.val < 1 and 4 <= length <= 65536):
        fail('NAME is letters, digits, "_", "-", "."; --val from 0 to 1, --length from 4 to 65536')

    if o.input:     # 1. documents
        items, source = from_files(o, cache), ' '.join(Path(path).name for path in o.input)
    elif o.name == 'dates':
        items, source = dates(), 'all days of 1900-2099'
        tokenizer, o.tokenizer, length = 'dates', '', 0         # its own; the longest row's
    elif o.name == 'pydocs':
        items, source = [*dict.fromkeys(sentences(docstrings()))], f'Python {sys.version}'
    else:
        how or fail(f'{o.name}: not pydocs, dates, {", ".join(HUB)}; give your files by --input')
        items, source = load_texts(f'{how["path"]} cannot be had from the hub; fetch it, then: '
            f'python prepare_data.py {o.name} --input FILES', cache, **how), how['path']

    # 2. tokens; no sentence is in both splits, and no text of a pair
    pairs = isinstance(next(iter(items), ''), tuple)
    kind = 'rows' if isinstance(items, list) else 'stream'
    texts = ([text for item in items for text in (item if pairs else [item])] if kind == 'rows' else
             [x['text'].replace('<|endoftext|>', '') for x in items.take(100_000) if x['text']])
    if not any(map(str.strip, texts)) or any('\0' in text for text in texts):
        fail(f'{source}: holds no text, or NUL characters, so it is not text')
    enc = encoding(spec := make_tokenizer(o.tokenizer or tokenizer, texts))
    if kind == 'rows':
        unique = list(dict.fromkeys(keys := [item[0] if pairs else item for item in items]))
        random.Random(0).shuffle(unique)
        held = set(unique[:max(1, int(o.val * len(unique)))])
        train, val = ([x for x, k in zip(items, keys) if (k in held) == side] for side in (0, 1))
        seen = {text for pair in val for text in pair} if pairs else ()     # maybe in other pairs
        train = [x for x in train if not pairs or seen.isdisjoint(x)]
        train, length = pack_rows(enc, train or val, length)
        val, length = pack_rows(enc, val, length)
    else:
        clean = untokenise if o.name == 'lm1b' else str
        train, val = pack_stream(items, o.val, documents, cache, enc=enc, clean=clean)
    if min(len(train), len(val)) < length:
        fail(f'too little text for rows of {length} tokens; give more, or a smaller --length')
    left_out = len(items) - (len(train) + len(val)) // length if kind == 'rows' else 0
    write_dataset(folder, train, val, spec, kind=kind, pairs=pairs, length=length, source=source)
    print(f'{folder}: {len(train):,} tokens to train on, {len(val):,} for val, {kind} of {length}, '
          f'{left_out:,} left out (long, or in val); {spec["name"]}; {time.time() - start:.0f} s')
    print(f'next: python train_teacher.py --data {folder}')

if __name__ == '__main__':
    main(parse(Options, positional='name'))
