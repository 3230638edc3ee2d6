"""Everything that can silently go wrong, on a CPU: each docstring names the bug that it catches."""
import ast
import contextlib
import functools
import gzip
import hashlib
import io
import itertools
import json
import lzma
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import unicodedata
import xml.etree.ElementTree
import zipfile
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

import bench
import distill
import model as models
import prepare_data
import sample
import train_teacher
from model import Config

CPU = torch.device('cpu')

# models of tests are tiny: a second thread would only wait for the first
torch.set_num_threads(1)


# =============================================================================
# prepare_data.py

def prepare(capsys, *words):
    """Run `python prepare_data.py words` here: (exit status, what it printed, its errors)."""
    status = 0
    try:
        prepare_data.main([str(word) for word in words])
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


def prepared(capsys, *words):
    """What `x --input a.txt` and these words prepare: (meta, train ids, val ids, its output)."""
    status, out, err = prepare(capsys, 'x', '--input', 'a.txt', *words)
    assert status == 0, err
    return *prepare_data.load_dataset('data/x'), out


def items_of(ids, meta):
    """The (source, text) of prepared rows, sorted."""
    return sorted(prepare_data.to_texts(prepare_data.as_rows(ids, meta['length']), meta))


def stream_of(train, val, meta):
    return prepare_data.make_encoding(meta['tokenizer']).decode([*train, *val])


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty folder to run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def encoding_of(how, texts=()):
    return prepare_data.make_encoding(prepare_data.make_tokenizer(how, texts))


@pytest.mark.parametrize('text, learned', [
    ('low low low lower lowest', ['lo', 'low', ' low']),                # by frequency
    ('-' * 16, ['-' * 2, '-' * 4, '-' * 8, '-' * 16]),                  # all of a run
    ('ab ab', ['ab', ' ab']),                                           # only what occurs
    ('x' * 128 + 'yz' * 40, ['xx', 'xxxx', 'yz']),                      # to a word's very end
])
def test_bpe_merges(text, learned):
    """Merges in another order, of every second pair of a run, or of a word's first letters only."""
    tokens = prepare_data.make_tokenizer('bpe:300', [text])['tokens']

    assert tokens[256:256 + len(learned)] == learned


@pytest.mark.parametrize('tokenizer', ['bpe:2048', 'words:300'])
@pytest.mark.parametrize('words', [
    'the children play',
    '\u0d15\u0d41\u0d1f\u0d4d\u0d1f\u0d3f\u0d15\u0d7e \u0d05\u0d2e\u0d4d\u0d2e',    # Malayalam
    '\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u0622\u0628',                # Persian
    '\u1000\u101c\u1031\u1038 \u1025\u101a\u103b\u102c\u1009\u103a \u1019\u102d',   # Burmese
    '\u05e1\u05b5\u05e4\u05b6\u05e8 \u05de\u05b7\u05d9\u05b4\u05dd',                # Hebrew
    unicodedata.normalize('NFD', 'tr\u1ebb em ch\u01a1i v\u01b0\u1eddn'),           # Vietnamese
    'Recht\u00adschrei\u00adbung ver\u00adbessern',                                 # soft hyphens
])
def test_a_word_of_any_script_is_one_token(words, tokenizer):
    """Words cut at vowel signs, which are letters for one regular expression engine only."""
    text = ' '.join(random.Random(0).choices(words.split(), k=300))
    encoding = encoding_of(tokenizer, [text])

    ids = prepare_data.encode(encoding, text)

    assert len(ids) == 300
    assert prepare_data.decode(encoding, ids) == text


def test_any_text_comes_back_from_bytes(monkeypatch):
    """Characters that were not seen in training dropped; a long text cut where a token is."""
    text = ('One  two\n\n three,four ' * 3 + '\t' + 'x' * 50) * 40
    spec = prepare_data.make_tokenizer('bpe:300', [text])
    monkeypatch.setattr(prepare_data, 'CHUNK', 40)

    chunks = list(prepare_data.chunks_of([text, ' '], ''))

    assert ''.join(chunk for chunk, _ in chunks) == text
    assert [ends for _, ends in chunks] == [False] * (len(chunks) - 2) + [True, False]
    assert prepare_data.make_tokenizer('bpe:300', [text]) == spec
    encoding = prepare_data.make_encoding(spec)
    text = 'Any: \u2603 \u200d\u0301 \ufe0f\U0001f469\u200d\U0001f680\x00\x1f'
    assert prepare_data.decode(encoding, prepare_data.encode(encoding, text)) == text


WRITTEN = ["A dog's ball isn't red-hot, \u2018yes\u2019 \u2026 it is (5 m).\nNo: a dog\u2019s.",
           'A dog runs.', 'The dog'] * 9


def test_the_most_frequent_words_are_the_tokens():
    """Special tokens on top of N, words in another case, or spaces that nobody wrote."""
    few = prepare_data.make_tokenizer('words:10', WRITTEN)['tokens']
    encoding = encoding_of('words:500', WRITTEN)

    assert len(few) == 6
    assert {' dog', ' A', '.'} < set(few)
    for piece in (" dog's", " isn't", ' red-hot', ' a', ' A', '5', '\n'):
        encoding.encode_single_token(piece)
    for text in WRITTEN:
        assert prepare_data.decode(encoding, prepare_data.encode(encoding, text)) == text


def test_stories_and_bert_encode_word_by_word(bert):
    """A doubled space in a prompt as a token that no text has; accents, or pieces in disorder."""
    encoding = encoding_of('stories', draws(3000))
    ids = prepare_data.encode(encoding, STORIES[3])

    assert (encoding.n_vocab, len(ids)) == (109, 20)
    assert prepare_data.decode(encoding, ids) == STORIES[3]
    assert ids == encoding.encode_ordinary(' ' + STORIES[3])
    assert prepare_data.encode(encoding, ' There  are ') == ids[:2]
    encoding = encoding_of(bert)
    ids = prepare_data.encode(encoding, 'The unable C\u00e1t.')
    assert ids == [0, 2, 3, 1, 4]
    assert prepare_data.decode(encoding, ids) == 'the unable cat .'


@pytest.fixture
def bert(home):
    """The --tokenizer of a small vocabulary, of words and of letters."""
    letters = 'abcdefghijklmnopqrstuvwxyz'
    words = ['the', 'cat', 'un', '##able', '.', *letters, *(f'##{letter}' for letter in letters)]
    Path('vocab.txt').write_text('\n'.join(words))
    return 'bert:vocab.txt'


@pytest.mark.parametrize('tokenizer, prompt, unknown', [
    ('words:500', 'The zebra runs', 'zebra'), ('words:500', 'The dog!', '!'),
    ('bert', 'a \u4e66\u3002\u4e66', '\u4e66'), ('bert', 'hi.\U0001f600', '\U0001f600'),
    ('stories', 'Nora has 4', '4'), ('stories', 'Nora has seventeen', 'seventeen'),
])
def test_what_a_tokenizer_cannot_write_is_named(bert, capsys, tokenizer, prompt, unknown):
    """A prompt with holes in it."""
    texts = WRITTEN if tokenizer == 'words:500' else draws(3000)
    encoding = encoding_of(bert if tokenizer == 'bert' else tokenizer, texts)

    with pytest.raises(SystemExit):
        prepare_data.encode(encoding, prompt)

    assert f'{unknown!r} is not in the vocabulary of {tokenizer}' in capsys.readouterr().err


@pytest.mark.parametrize('tokenizer', ['bert', 'words:12'])
def test_rows_that_cannot_be_written_are_left_out(capsys, bert, tokenizer):
    """Rows with holes in them, where characters or words were dropped in silence."""
    written = [f'{a}{b} hi .' for a in 'ab' for b in 'abc']
    Path('a.txt').write_text('\n'.join([*written, 'a \U0001f600', '\u6211\u4eec']), 'utf-8')
    tokenizer = bert if tokenizer == 'bert' else tokenizer

    meta, train, val, out = prepared(capsys, '--rows', '--length', 8, '--tokenizer', tokenizer)

    assert 'left out: 2 with unknown words or characters\n' in out
    assert items_of([*train, *val], meta) == [('', text) for text in written]


def lines_of_words(n):
    """n different lines of four words each, of 120 words in all."""
    words = [''.join(letters) for letters in itertools.product('bdgk', 'aeiou', 'lmnrst')]
    lines = {' '.join(random.Random(i).choices(words, k=4)) for i in range(2 * n)}
    return '\n'.join(sorted(lines)[:n])


@pytest.mark.parametrize('text, rows, tokenizer, vocab, length', [
    (lines_of_words(2000), ['--rows'], 'words:2000', 124, 5),           # few words, many lines
    (lines_of_words(400), ['--rows'], 'byte', 260, 16),                 # too few lines of them
    ('\n'.join('ab' * i for i in range(1, 100)), ['--rows'], 'byte', 260, 128),  # not the longest
    ('one two three four. ' * 11_000, [], 'bpe:512', 274, 32),
])
def test_tokenizer_and_length_suit_the_text(home, capsys, text, rows, tokenizer, vocab, length):
    """A default that suits one text only; thousands of tokens that occur once or twice each."""
    Path('a.txt').write_text(text)

    meta, *_, out = prepared(capsys, *rows)

    assert (meta['tokenizer']['name'], meta['vocab'], meta['length']) == (tokenizer, vocab, length)
    assert f'{tokenizer}, {vocab} tokens' in out


@pytest.mark.parametrize('rare, tokenizer', [(1, 'words:2000'), (9, 'bpe:512')])
def test_pairs_of_common_words_are_of_words(home, capsys, rare, tokenizer):
    """Pairs told by one column: each text is common, but hardly a pair is."""
    lines = lines_of_words(20_000).split('\n')
    pairs = [f'{a}\t{b} x{i}' if i % 10 < rare else f'{a}\t{b}'
             for i, (a, b) in enumerate(zip(lines[::2], lines[1::2]))]
    Path('a.tsv').write_text('\n'.join(pairs))

    assert prepare(capsys, 'x', '--input', 'a.tsv')[0] == 0

    meta = prepare_data.load_dataset('data/x')[0]
    assert meta['pairs'] and meta['tokenizer']['name'] == tokenizer


@pytest.mark.parametrize('rare, words, said', [
    (2000, [], True), (2000, ['--tokenizer', 'words:2000'], False), (9, [], False)])
def test_left_out_words_that_nobody_asked_to_leave_out(home, capsys, rare, words, said):
    """A good part of a text lost to a default, without a word on how to keep it."""
    Path('a.txt').write_text(lines_of_words(9000) + ''.join(f'\nb x{i}' for i in range(rare)))

    meta, *_, out = prepared(capsys, '--rows', *words)

    assert meta['tokenizer']['name'] == 'words:2000'
    assert ('--tokenizer bpe:2048 keeps texts with other words' in out) == said


@pytest.mark.parametrize('text, words, said', [
    ('To be, or not to be:\n\nthat is the question.\n' * 20, [], True),
    ('To be, or not to be:\n\nthat is the question.\n' * 20, ['--rows', '--length', 64], False),
    ('ann\nbo\n' * 99, [], True),
    ('Prose that is wrapped, as mail and books are, at some seventy letters.\n' * 20, [], False),
    (('A whole paragraph is a line here. ' * 9 + '\n') * 3, [], False),
])
def test_short_lines_are_noticed(home, capsys, text, words, said):
    """Verse or names learned as a stream, of which any window is a row, without a word about it."""
    Path('a.txt').write_text(text)

    *_, out = prepared(capsys, '--tokenizer', 'byte', *words)

    assert ('with --rows each is a text of its own' in out) == said


def test_dates_are_complete_and_fit_their_rows():
    """A form that is missing or there twice, a row that is cut, another vocabulary than shipped."""
    every = prepare_data.dates()
    pairs = every[::97]
    spec = prepare_data.make_tokenizer('dates', [text for pair in pairs for text in pair])

    ids, sizes = prepare_data.pack_rows(prepare_data.make_encoding(spec), pairs, 23)

    assert len(set(every)) == len(every) == 73049 * 8
    assert every[0] == ('1900-01-01', 'January 1, 1900')
    assert every[-1] == ('2099-12-31', 'December the 31st, 2099')
    assert prepare_data.date_forms('2001-02-29') == ()
    assert len(spec['tokens']) == 44
    assert (len(sizes), max(sizes)) == (len(pairs), 23)
    meta = {'special': {'<eos>': 44, '<pad>': 45, '<sep>': 46, '<bos>': 47}, 'pairs': True,
            'kind': 'rows', 'length': 23, 'tokenizer': spec}
    assert items_of(ids, meta) == sorted(pairs)
    metrics = prepare_data.sanity_metrics(prepare_data.as_rows(ids, 23), meta)
    assert metrics == {'valid': 1, 'form_entropy': pytest.approx(1, abs=1e-3)}


def draws(n, seed=0):
    rng = random.Random(seed)
    return [prepare_data.draw_story(rng) for _ in range(n)]


def test_drawn_stories_are_always_the_same_and_right():
    """Other data than the weights were trained on; a text that is drawn and never read as valid."""
    texts = draws(3000)

    stories = [prepare_data.read_story(text) for text in texts]

    digest = hashlib.sha256('\n'.join(texts).encode()).hexdigest()
    assert digest == 'df10afbfaa5dfef0c845a6c04c9b812f216e87640fca5b2624892e1c53068794'
    assert all(story and story['right'] for story in stories)
    assert {story['plot'] for story in stories} == set(prepare_data.PLOTS)
    assert {story['number'] for story in stories} == set(range(1, 13))


STORIES = [
    'Nora has four old books. She gives one to Ben. Now she has three books.',
    'Tom has three coins in the boat. He finds five more. Now he has eight coins.',
    'Sam and Ben have three cakes each. Together they have six cakes. Sam is happy.',
    'There are eight big boxes in the drawer. Paul takes seven for Anna. One box is left.',
]


@pytest.mark.parametrize('n, old, new', [
    (0, 'She', 'He'), (0, 'she', 'he'),             # pronoun
    (0, 'Ben', 'Nora'),                             # two names that are one
    (0, 'three books', 'three book'),               # plurals
    (0, 'three books', 'three coins'),              # another thing
    (0, 'old', 'purple'), (1, 'Tom', 'Tim'), (1, 'eight', 'thirteen'),      # not in the grammar
    (0, '.', ''), (1, 'three', 'zero'),
    (2, 'Sam is', 'Tom is'), (2, 'Ben', 'Sam'),     # who is that?
    (3, 'box is', 'box are'), (3, 'There are', 'There is'), (3, 'One', 'one'),      # verbs
])
def test_what_does_not_agree_is_not_well_formed(n, old, new):
    """A reader that takes broken grammar for good: `well_formed` would flatter a model."""
    assert prepare_data.read_story(STORIES[n])['right']

    assert prepare_data.read_story(STORIES[n].replace(old, new)) is None


def test_slots_of_known_stories():
    """Slots in each other's place; a wrong sum that counts as valid."""
    first, _, third, last = [prepare_data.read_story(text) for text in STORIES]

    assert (first['name'], first['other'], first['thing']) == ('Nora', 'Ben', 'book')
    assert (first['number'], first['change'], first['result']) == (4, 1, 3)
    assert (third['number'], third['result'], third['happy']) == (3, 6, 'Sam')
    assert (last['plot'], last['name'], last['thing'], last['result']) == ('take', 'Paul', 'box', 1)
    for text, old, new in zip(STORIES, ['three', 'eight', 'six', 'seven'],
                              ['two', 'nine', 'five', 'six']):
        assert not prepare_data.read_story(text.replace(old, new))['right']


def every_story():
    """All texts of the grammar, by its slots and not by the code under test."""
    names = prepare_data.CHOICES['name']
    for plot in prepare_data.PLOTS:
        for number, change in itertools.product(range(1, 13), repeat=2):
            result = number + change if plot in ('find', 'share') else number - change
            if not 1 <= result <= 12 or (plot == 'share' and number != change):
                continue
            for values in itertools.product(*prepare_data.CHOICES.values(), names, names):
                story = dict(zip([*prepare_data.CHOICES, 'other', 'happy'], values))
                story.update(plot=plot, number=number, change=change, result=result)
                if story['name'] != story['other'] and story['happy'] in values[-2:] + values[:1]:
                    yield prepare_data.write_story(story)


def test_probabilities_of_stories_sum_to_one(monkeypatch):
    """Probabilities that are off by a factor, or a slot that has lost its words."""
    texts = sum(prepare_data.story_ways(plot) * len(results)
                for plot, sums in prepare_data.SUMS.items() for results in sums.values())
    assert texts == 7_903_872
    assert prepare_data.expected_seen(135_000) == pytest.approx(0.27422548684984827, rel=1e-12)
    few = {'name': ['Nora', 'Ben', 'Tom'], 'thing': ['box'], 'adjective': ['old', 'red'],
           'quality': ['old'], 'place': ['bag', 'shed']}
    monkeypatch.setattr(prepare_data, 'CHOICES', few)

    read = {text: prepare_data.read_story(text) for text in every_story()}
    probabilities = {text: prepare_data.story_probability(story['plot'], story['number'])
                     for text, story in read.items() if story}

    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-12)
    # what is drawn is as frequent as its probability, here the plot with the fewest texts
    text = 'Nora and Ben have three boxes each. Together they have six boxes. Ben is happy.'
    assert probabilities[text] == pytest.approx(1 / 4 / 6 / (3 * 2) / 2)
    assert draws(20_000).count(text) / 20_000 == pytest.approx(probabilities[text], rel=0.25)
    # and those seen in training, by brute force
    seen = sum(p * (1 - (1 - p) ** 500) for p in probabilities.values())
    assert prepare_data.expected_seen(500) == pytest.approx(seen, rel=1e-9)


def test_metrics_of_stories_of_collapse_and_of_noise():
    """Metrics that do not tell a good model from one that writes one text, or none."""
    drawn = prepare_data.story_metrics(draws(4000))
    collapsed = prepare_data.story_metrics(STORIES[:1] * 100)
    noise = prepare_data.story_metrics(['Nora has has.'] * 10)

    assert drawn['well_formed'] == drawn['valid'] == collapsed['valid'] == 1
    assert drawn['slot_entropy'] == pytest.approx(0.9994385694473223, rel=1e-12)
    assert drawn['slot_divergence'] == pytest.approx(0.0010140802369207336, abs=1e-12)
    assert collapsed['slot_divergence'] > 0.5
    assert collapsed['unique'] == 0.01
    assert collapsed['slot_entropy'] == noise['valid'] == noise['slot_entropy'] == 0
    assert noise['slot_divergence'] == math.log(2)


def test_stories_are_the_default_and_no_text_is_in_both_splits(home, monkeypatch, capsys):
    """Texts held out that were trained on; another distribution than that of the metrics."""
    few = draws(3000)
    monkeypatch.setattr(prepare_data, 'stories', lambda: few)

    out = prepare(capsys)[1]
    meta, train, val = prepare_data.load_dataset('data/stories')

    assert out.splitlines()[-1] == 'next: python train_teacher.py --data data/stories'
    assert set(items_of(train, meta)).isdisjoint(items_of(val, meta))
    assert items_of([*train, *val], meta) == [('', text) for text in sorted(few)]
    assert len(val) == pytest.approx(300 * 21, rel=0.1)


PROSE = '\n'.join(f'Line number {i} of this text.' for i in range(60))
POEMS = {'p/a': 'A rose\nis red.\n', 'p/b.txt': 'Two\nlines.<|endoftext|>Third.',
         'p/more/c.txt': 'Last.', 'p/.DS_Store': b'\0\xff', 'p/.git/config': 'no text'}
# files, the words after `x --input`, and the stream, the rows or the pairs that people mean by them
MEANT = [
    *[({name: PROSE}, shlex.quote(name), PROSE + '<eos>') for name in (
        'a.TXT', 'a', 'n.en-00001-of-00100', 'a b?.txt', "it's.txt", '.notes')],
    ({'a[1]*.txt': PROSE, 'a1x.txt': 'another'}, "'a[1]*.txt'", PROSE + '<eos>'),
    *[({'a.txt': ('\ufeff' + PROSE).encode(encoding)}, 'a.txt', PROSE + '<eos>')
      for encoding in ('utf-8', 'utf-16-le', 'utf-16-be', 'utf-32-le', 'utf-32-be')],
    ({'a.md': lzma.compress(PROSE.encode())}, 'a.md', PROSE + '<eos>'),
    (POEMS, 'p p/b.txt --length 4', 'A rose\nis red.\n<eos>Two\nlines.<eos>Third.<eos>Last.<eos>'),
    (POEMS, 'p --rows', ['A rose\nis red.\n', 'Last.', 'Third.', 'Two\nlines.']),
    ({'a.jsonl.gz': gzip.compress(b'{"text": "1987-03-23"}\n\n{"text": "007", "id": []}')},
     'a.jsonl.gz --rows', ['007', '1987-03-23']),
    ({'a.json': '[{"text": "a\\nb"},\n {"text": "NA"}]'}, 'a.json --rows', ['NA', 'a\nb']),
    ({'a.ndjson': '{"text": "p"}\n{"id": 1, "text": "q"}\n'}, 'a.ndjson --rows', ['p', 'q']),
    ({'a.csv': 'id,text\n1,"Said ""no"", twice"\n2,5" of it\n'}, 'a.csv --rows',
     ['5" of it', 'Said "no", twice']),
    ({'a.csv': 'src;trg\n1,5;"a\nb"\n2,5;c'}, 'a.csv', [('1,5', 'a\nb'), ('2,5', 'c')]),
    ({'a.tsv': 'src\ttrg\n"a ""b"""\t007\n"c, d"\tNA\n'}, 'a.tsv',
     [('a "b"', '007'), ('c, d', 'NA')]),
    ({'a.tsv': '"So\ta\n5" nail\t"b" it is\n'}, 'a.tsv', [('"So', 'a'), ('5" nail', '"b" it is')]),
    ({'a.tsv': 'en\tde\nyes\tja\n'}, 'a.tsv', [('en', 'de'), ('yes', 'ja')]),
    ({'a.tsv': 'id\tquestion\tanswer\n1\tp\tx\n2\tq\ty\n'}, 'a.tsv', [('p', 'x'), ('q', 'y')]),
    ({'a.tsv': 'en\tde\nyes\tja\nno\tnein'}, 'a.tsv --columns de en',
     [('ja', 'yes'), ('nein', 'no')]),
    ({'a.parquet': [{'n': 1, 'en': 'yes', 'de': 'ja'}, {'n': 2, 'en': 'no', 'de': 'nein'}]},
     'a.parquet --columns en de', [('no', 'nein'), ('yes', 'ja')]),
]


def write_files(files):
    for name, data in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, list):
            pyarrow = pytest.importorskip('pyarrow')
            pytest.importorskip('pyarrow.parquet').write_table(
                pyarrow.Table.from_pylist(data), name)
        else:
            Path(name).write_bytes(data if isinstance(data, bytes) else data.encode())


@pytest.mark.parametrize('files, words, meant', MEANT)
def test_files_are_read_as_people_mean_them(home, capsys, files, words, meant):
    """Files read twice, marks of Windows, quotes, texts taken for times, or targets for sources."""
    write_files(files)
    words = ['x', '--tokenizer', 'byte', '--length', 24, '--input', *shlex.split(words)]

    status, _, err = prepare(capsys, *words)

    assert status == 0, err
    meta, train, val = prepare_data.load_dataset('data/x')
    if isinstance(meant, str):
        assert stream_of(train, val, meta) == meant
    else:
        assert meta['pairs'] == isinstance(meant[0], tuple)
        assert items_of([*train, *val], meta) == [
            item if meta['pairs'] else ('', item) for item in meant]


def test_a_stream_is_its_text_and_its_end_is_held_out(home, capsys):
    """Lost characters at line ends or accents; another part held out; keys that are gone."""
    text = 'The cat sat on the mat. The dog sat on the \u00e9\u4e16.\r\n' * 100
    Path('a.txt').write_bytes(text.encode())

    meta, train, val, _ = prepared(capsys, '--tokenizer', 'bpe:300', '--length', 8, '--val', 0.2)

    assert stream_of(train, val, meta) == text.replace('\r\n', '\n') + '<eos>'
    assert len(val) == len([*train, *val]) // 5
    assert list(meta) == ['format', 'name', 'vocab', 'kind', 'pairs', 'length', 'source', 'special',
                          'train_tokens', 'val_tokens', 'tokenizer', 'crc']
    assert (meta['name'], meta['kind'], meta['length']) == ('x', 'stream', 8)
    assert list(meta['special'].values()) == list(range(meta['vocab'] - 4, meta['vocab']))


def test_what_is_left_out_is_counted(home, capsys):
    """Lines or pairs dropped without a word, or names that flow into each other."""
    names = sorted(f'name{i}' for i in range(60))
    pairs = [{'question1': f'q{i}', 'question2': f'r{i}', 'label': 1} for i in range(40)]
    pairs += [pairs[0], {'question1': 'a', 'question2': None, 'label': '1'},
              {'question1': 'a', 'question2': 'b', 'label': 0},
              {'question1': 'a', 'question2': 'b', 'is_duplicate': '0'}]
    write_files({'a.txt': '\n'.join([*names, '', ' ', '<|endoftext|>', 'name7', 'n' * 99, '']),
                 'q.json': json.dumps(pairs)})
    words = ('--tokenizer', 'byte', '--length', 8)

    meta, train, val, out = prepared(capsys, '--rows', *words)
    _, paired, _ = prepare(capsys, 'q', '--input', 'q.json', *words)

    assert 'left out: 3 empty, 1 duplicate, 1 too long\n' in out
    assert items_of([*train, *val], meta) == [('', name) for name in names]
    assert 'left out: 2 labeled as different, 1 empty, 1 duplicate\n' in paired
    assert paired.endswith('\nor:   python train_teacher.py --data data/q --model diffuseq\n')


def test_a_long_wait_says_what_is_left(monkeypatch, capsys):
    """Minutes without a word."""
    clock = itertools.count(0, 5)
    monkeypatch.setattr(prepare_data.time, 'time', lambda: next(clock))

    assert list(prepare_data.progress('reading', 'abc')) == ['a', 'b', 'c']
    assert capsys.readouterr().out.splitlines()[0] == 'reading: 33%, 10 s left'


def repeated(kind):
    """Pairs whose targets are repeated: a label, a common reply, or a word that answers any."""
    rng = random.Random(0)

    def zipf(texts, n):
        return rng.choices(texts, [1 / i for i in range(1, len(texts) + 1)], k=n)

    if kind == 'labels':
        return [(f'text {i}', label) for i, label in enumerate(zipf(['bad', 'good', 'fair'], 3000))]
    if kind == 'replies':
        replies = zipf([f'reply {i}' for i in range(2000)], 20_000)
        return [(f'line {i}', reply) for i, reply in enumerate(replies)]
    # the turns of a chat, of which each is what the next one answers
    turns = enumerate(zipf(['ok', 'yes', 'no', 'well'], 9000))
    said = [rng.choice([text, f'{text}, {i}']) for i, text in turns]
    return list(dict.fromkeys(zip(said, said[1:])))


@pytest.mark.parametrize('kind', ['labels', 'replies', 'chat'])
def test_targets_are_distributed_alike_in_both_splits(kind):
    """The commonest labels or replies gone from training, as they are held out with a source."""
    pairs = repeated(kind)

    train, val = prepare_data.split_items(pairs, 0.1, {})

    # of a chat's turns that are said once none is on the other side of a pair
    assert len(train) + len(val) > (0.7 if kind == 'chat' else 0.999) * len(pairs)
    assert {source for source, _ in train}.isdisjoint(source for source, _ in val)
    assert 0.04 * len(pairs) < len(val) < 0.12 * len(pairs)
    common = dict(prepare_data.Counter(target for _, target in pairs).most_common(20))
    counts = [prepare_data.Counter(target for _, target in part if target in common)
              for part in (train, val)]
    # a sample of n differs by about (cells - 1) / 8 n nats
    assert prepare_data.jensen_shannon(*counts) < 5 * len(common) / 8 / counts[1].total()


def test_labels_as_sources_are_in_both_splits():
    """Text of a label: one label gone from training, as it is held out."""
    pairs = [(f'{label}', f'text {label} {i}') for i in range(500) for label in range(2)]

    splits = prepare_data.split_items(pairs, 0.1, {})

    assert [len(part) for part in splits] == [900, 100]
    for part in splits:
        counts = prepare_data.Counter(source for source, _ in part)
        assert min(counts.values()) > 0.35 * len(part)


def test_common_replies_of_a_chat_are_learned():
    """The commonest turns gone from training, where all others are said once."""
    rng = random.Random(0)
    turns = [rng.choice(['ok', 'yes']) if rng.random() < 0.05 else str(i) for i in range(5000)]
    pairs = list(dict.fromkeys(zip(turns, turns[1:])))

    train, val = prepare_data.split_items(pairs, 0.1, {})

    for part in (train, val):
        share = sum(reply in ('ok', 'yes') for _, reply in part) / len(part)
        assert 0.03 < share < 0.07
    once = [{text for text in itertools.chain(*part) if text.isdigit()} for part in (train, val)]
    assert once[0].isdisjoint(once[1])


@pytest.mark.parametrize('pairs', [
    [(f'{group} {i}', f'{group} {j}') for group in range(400)
     for i, j in itertools.permutations(range(3), 2)],
    [*((f'what is {i}', f'tell me {i}') for i in range(500)),
     *((f'tell me {i}', f'say what is {i}') for i in range(0, 500, 9))],
])
def test_neither_side_of_a_paraphrase_is_in_both_splits(pairs):
    """A text held out that was trained on, on the other side of a pair."""
    left_out = {}

    train, val = prepare_data.split_items(pairs, 0.1, left_out)

    assert set(itertools.chain(*train)).isdisjoint(itertools.chain(*val))
    assert len(train) + len(val) + left_out['with a text that is held out'] == len(pairs)
    assert len(train) > 0.6 * len(pairs)


@pytest.mark.parametrize('name, columns, words, meant', [
    ('qqp', {'question1': ['a', 'b', 'c'], 'question2': ['d', 'e', 'f'], 'label': [1, 0, 1]}, [],
     [('a', 'd'), ('c', 'f')]),
    ('captions', {'caption1': ['a b', 'c d'], 'caption2': ['b a', 'a b']}, [],
     [('', 'a b'), ('', 'b a'), ('', 'c d')]),
    ('snli', {'premise': ['p', 'q'], 'hypothesis': ['a b', 'b b'], 'label': [0, -1]}, [],
     [('', 'a b'), ('', 'b b')]),
    ('tinystories', {'text': ['a b', 'b\nc', None]}, ['--rows'], [('', 'a b'), ('', 'b\nc')]),
    ('shakespeare', {'text': ['A:\na b\n\nB:\nb a\n', 'A:\nb']}, [],
     [('', text) for text in ('A:', 'B:', 'a b', 'b', 'b a')]),
    ('lm1b', {'text': ["It 's here .", '', None, 'And ( " there " ) .'] * 9, 'id': [1] * 36},
     ['--val', .5], "It's here.<eos>And (\"there\").<eos>" * 9),
])
def test_sets_of_the_hub(home, monkeypatch, capsys, name, columns, words, meant):
    """Different questions learned as paraphrases; captions that are pairs; documents lost."""
    datasets = pytest.importorskip('datasets')
    table = datasets.Dataset.from_dict(columns)
    monkeypatch.setattr(datasets, 'load_dataset', lambda *words, **how: table)
    monkeypatch.setattr(prepare_data.logging, 'disable', lambda: None)

    status, _, err = prepare(capsys, name, '--tokenizer', 'byte', '--length', 8, *words)
    assert status == 0, err
    meta, train, val = prepare_data.load_dataset(f'data/{name}')

    if isinstance(meant, str):
        assert stream_of(train, val, meta) == meant
    else:
        assert items_of([*train, *val], meta) == meant
        assert (meta['kind'], meta['pairs']) == ('rows', name == 'qqp')


# a file's name, what it holds, and what is said of `x --input FILE --tokenizer byte`
BAD_FILES = [
    ('a.jsonl', b'{"text": null}', 'holds no text'),
    ('a.txt', b'short', 'too little text'),
    ('a.jsonl', '{"text":\n"caf\u00e9"}'.encode('cp1252'), 'line 2: not UTF-8; convert it'),
    ('a.png', b'\x89PNG\r\n\x1a\n\0\0', 'line 1: has a NUL character, so it is not text'),
    ('a.docx', b'PK\3\4\x14\0\xff', 'is a zip; unpack it'),
    ('a.xz', lzma.compress(PROSE.encode())[:40], 'not a whole compressed file'),
    ('a.parquet', b'PAR1 no PAR1', 'damaged, or not parquet'),
    ('a.jsonl', b'{"text": "b"}\n{"text": "a\\ud83d"}', 'record 2: has a value that is not text'),
    ('a.jsonl', b'{"text": "a"}\n{"text": ', 'line 2: not JSON; give one record a line'),
    ('a.jsonl', b'{"text": "a"}\n\n\n{"text": ', 'line 4: not JSON; give one record a line'),
    ('a.json', b'[' * 10 ** 5, 'line 1: not JSON'),
    ('a.jsonl', b'{"txt": "a", "id": 1}', 'has the columns txt, id; needs text, or name one'),
    ('a.tsv', b'a\tb\nc\n', 'line 2: needs one cell per column: source, target'),
    ('a.csv', b'src,trg\na,b\nc,d,e\n', 'line 3: needs one cell per column: src, trg'),
]
# a command, and what is said of it where good.txt holds PROSE
BAD_WORDS = [
    ('nonsense', 'not one of stories'),
    ('mine good.txt', 'each value goes after its option, as in --input FILE'),
    ('x --input -good.txt', 'a value that begins with "-" is written with "="'),
    ('../x --input good.txt', 'use letters'),
    ('x --input good.txt --tokenizer stories', 'is not gpt2, byte, bpe:N, words:N'),
    ('x --input good.txt --tokenizer words:50', 'needs rows, as it drops those with other words'),
    ('dates --tokenizer byte', 'takes no --input, --columns or --tokenizer'),
    ('x --input good.txt --columns text', 'is text, which has no columns'),
    ('x --input *.txt', 'cannot be read (No such file'),
    ('x --input good.txt --data good.txt', 'good.txt/x/train.bin: cannot be written'),
    ('x --input good.txt b.jsonl', 'mixes text and tables'),
    ('x --input b.jsonl c.jsonl', 'mixes pairs and texts'),
    ('x --input good.txt --length 60000', 'nothing; give more text, or a smaller --length'),
    ('x --input good.txt --rows --tokenizer words:10', '60 with unknown words or characters\n'),
    ('x --input twice.txt --rows', 'left out: 8 duplicate, 1 too long\n'),
]


@pytest.mark.parametrize('words, said, files', [
    *[(f'x --input {name} --tokenizer byte', said, {name: data}) for name, data, said in BAD_FILES],
    *[(words, said, {'good.txt': PROSE, 'twice.txt': 'again\n' * 9,
                     'b.jsonl': '{"src": "a", "trg": "b"}', 'c.jsonl': '{"text": "a"}'})
      for words, said in BAD_WORDS],
])
def test_what_is_refused_is_one_line(home, capsys, words, said, files):
    """A traceback, two lines, advice that fits another cause, or a file written all the same."""
    write_files(files)
    before = sorted(os.listdir())

    status, _, err = prepare(capsys, *words.split())

    assert (status, err.count('\n'), err[-1]) == (2, 1, '\n')
    assert said in err
    assert sorted(os.listdir()) == before


def test_a_folder_that_may_not_be_read_is_named(home, monkeypatch, capsys):
    """A subfolder left out without a word."""
    scandir = os.scandir

    def forbid(path):
        if Path(path).name == 'more':
            raise PermissionError(13, 'Permission denied', path)
        return scandir(path)

    write_files(POEMS)
    monkeypatch.setattr(os, 'scandir', forbid)
    assert 'more: cannot be read (Permission denied)' in prepare(capsys, 'x', '--input', 'p')[2]


@pytest.mark.parametrize('kind, good, bad', [
    (prepare_data.positive_int, ['1', '1000000000'], ['0', '1.5', 'nan', 'inf', '1000000001', 'x']),
    (prepare_data.fraction, ['0', '0.5', '1'], ['-0.1', '1.1', 'nan', 'inf', 'x'])])
def test_numbers_of_options(kind, good, bad):
    """nan, infinity or a negative number taken for a setting; a range that is not said."""
    assert [kind(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(prepare_data.argparse.ArgumentTypeError, match='from [01] to 1'):
            kind(text)


@pytest.mark.parametrize('error, status, said', [
    (KeyboardInterrupt(), 130, 'stopped'),
    (np._core._exceptions._ArrayMemoryError((9,), np.dtype('u2')), 2, 'a smaller --batch'),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, 'out of memory; '),
    (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate ...'), 2, 'out of memory; '),
    (OSError(28, 'No space left\non device'), 2, 'make room on the disk'),
])
def test_how_a_script_ends(monkeypatch, capsys, error, status, said):
    """A traceback of forty lines for who just wants to stop, or whose memory is full."""
    def ends():
        raise error

    monkeypatch.setattr(prepare_data, 'mute_stdout', lambda: None)
    with pytest.raises(SystemExit) as end:
        prepare_data.run_script(ends)

    err = capsys.readouterr().err
    assert (end.value.code, err.count('\n')) == (status, 1)
    assert said in err


def small_dataset(folder, **how):
    spec = prepare_data.make_tokenizer('byte', [])
    ids = np.random.default_rng(0).integers(97, 123, 64)
    prepare_data.save_dataset(folder, ids, ids[:32], spec, 'stream', False, 8, 'a test', **how)


def test_damage_is_noticed(home):
    """A flipped bit or a file cut short that is trained on, or not replaced by a whole one."""
    rng = random.Random(0)
    for i in range(30):
        small_dataset('x', overwrite=False)
        meta, _, _ = prepare_data.load_dataset('x')
        path = home / 'x' / ['meta.json', 'train.bin', 'val.bin'][i % 3]
        whole = path.read_bytes()
        at = rng.randrange(len(whole))
        flipped = whole[:at] + bytes([whole[at] ^ 1 << i % 8]) + whole[at + 1:]
        path.write_bytes([whole[:at], flipped][i // 3 % 2])

        try:
            found, _, _ = prepare_data.load_dataset('x')
            # in JSON \u00e9 may have become \u00E9, which is the same
            assert (path.name, found) == ('meta.json', meta)
        except SystemExit as end:
            assert end.code == 2


def test_why_a_data_folder_cannot_be_read(home, capsys):
    """One message for all causes, or advice that does not run."""
    Path('lm.txt').write_text('text')
    small_dataset('data/x')
    small_dataset('data/old')
    meta = Path('data/old/meta.json')
    meta.write_text(meta.read_text().replace('"format": 1', '"format": 9'))

    for folder, said in [
            ('-e/dates', 'run: python prepare_data.py dates --data ./-e'),
            ('data/mine', 'run: python prepare_data.py -h'),
            ('lm.txt', 'run: python prepare_data.py mine --input lm.txt'),
            ('../data/x', 'holds no prepared data, but data/x does; add --data data/x'),
            ('data/old', 'of another version; prepare it again: python prepare_data.py -h')]:
        with pytest.raises(SystemExit):
            prepare_data.load_dataset(folder)
        assert capsys.readouterr().err.endswith(f'{said}\n')


def test_newest_is_what_was_prepared_last(home):
    """Training on what was prepared first, in silence."""
    for i, name in enumerate(['b', 'c', 'a', 'b']):
        small_dataset(Path('data') / name)
        os.utime(f'data/{name}/meta.json', (10 ** 9 + i, 10 ** 9 + i))
        assert prepare_data.newest_dataset() == Path('data') / name


def test_other_data_are_replaced_only_if_asked(home, capsys):
    """Data that a teacher was trained on gone, so that it cannot go on."""
    Path('a.txt').write_text(PROSE)
    command = ('x', '--input', 'a.txt', '--tokenizer', 'byte')
    prepare(capsys, *command)
    before = [path.read_bytes() for path in Path('data/x').iterdir()]

    assert prepare(capsys, *command)[0] == 0
    err = prepare(capsys, *command, '--length', 16)[2]
    assert 'data/x exists: 1,557 tokens, stream of 32, from a.txt; add --overwrite' in err
    assert [path.read_bytes() for path in Path('data/x').iterdir()] == before
    assert prepare(capsys, *command, '--length', 16, '--overwrite')[0] == 0
    assert prepare_data.load_dataset('data/x')[0]['length'] == 16


def test_a_full_disk_leaves_what_there_was(home, monkeypatch, capsys):
    """Half a file under the name of a whole one."""
    prepare_data.write_whole('a.bin', b'old')

    def full(_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(prepare_data.os, 'fsync', full)
    with pytest.raises(SystemExit):
        prepare_data.write_whole('a.bin', b'new')

    assert 'a.bin: cannot be written: No space left on device; make' in capsys.readouterr().err
    assert [(path.name, path.read_bytes()) for path in home.iterdir()] == [('a.bin', b'old')]


def test_rows_are_split_where_they_end():
    """A source read as text, a text that goes on after its end, or rows that are shifted."""
    a, b, eos, pad, sep = 97, 98, 256, 257, 258
    meta = {'special': {'<eos>': eos, '<pad>': pad, '<sep>': sep, '<bos>': 259}, 'kind': 'rows',
            'tokenizer': prepare_data.make_tokenizer('byte', [])}

    rows = np.array([[a, b, eos, pad], [a, eos, b, eos], [a, pad, b, b], [a, b, a, b]])
    assert prepare_data.split_rows(rows, {**meta, 'pairs': False}) == [
        ([], [a, b]), ([], [a]), ([], [a]), ([], [a, b, a, b])]
    rows = np.array([[a, sep, pad, pad, b, eos], [a, a, sep, b, b, b],
                     [sep, pad, pad, pad, pad, eos]])
    assert prepare_data.split_rows(rows, {**meta, 'pairs': True}) == [
        ([a], [b]), ([a, a], [b, b, b]), ([], [])]
    rows = prepare_data.as_rows(np.array([a, eos, b, eos, a], dtype=np.uint16), 2)
    assert rows.dtype == np.int64
    stream = {**meta, 'kind': 'stream', 'pairs': False}
    assert prepare_data.to_texts(rows, stream) == [('', 'a<eos>'), ('', 'b<eos>')]


@pytest.mark.parametrize('text, words', [
    ('one two three. ', 1), ('\u05d0\u05d1\u05d2 \u05d3\u05d4. ', 1),
    ('\ud55c\uad6d\uc5b4 \uc2dc\ud5d8. ', 1),
    ('\u092c\u091a\u094d\u091a\u0947 \u092c\u0917\u0940\u091a\u0947. ', 1),     # Hindi
    ('1 2 3 4 ', None), ('?! ... ', None),
    ('\u6211\u4eec\u559c\u6b22\u770b\u4e66\u3002', None),                      # Chinese
    ('\u3053\u308c\u306f\u672c\u3067\u3059\u3002 ok ', None),                  # Japanese
    ('\u0e09\u0e31\u0e19\u0e23\u0e31\u0e01 ', None),                            # Thai
    ('gattacagattaca\n', None),                                                # DNA
])
def test_words_of_any_script_are_found(home, capsys, text, words):
    """`words` 0 for all but Latin letters, or of texts that have none or no spaces between them."""
    Path('a.txt').write_text(text * 200, encoding='utf-8')
    meta, train, _, _ = prepared(capsys, '--tokenizer', 'byte')
    rows = prepare_data.as_rows(train, len(train) // 2)

    metrics = prepare_data.sanity_metrics(rows, meta, 'data/x')

    assert metrics.get('words') in (words, None if words is None else pytest.approx(1, abs=0.02))
    assert set(prepare_data.sanity_metrics(rows, meta, 'data/gone')) == {'entropy', 'unique'}
    assert prepare_data.words_of('Stra\u00dfe ONE<eos>2 <pad>') == ['strasse', 'one']
    prepare_data.corpus_words.cache_clear()


def test_the_script_itself_runs(home):
    """A script that works only where it is imported, or advice that is taken for an option."""
    (home / '-a.txt').write_text(PROSE)
    command = [sys.executable, prepare_data.__file__, 'x', '--input=-a.txt', '--data=-d']

    done = subprocess.run(command, capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, '')
    # from another folder
    train = shlex.quote(str(HERE / 'train_teacher.py'))
    assert done.stdout.endswith(f'\nnext: python {train} --data ./-d/x\n')


# =============================================================================
# model.py, train_teacher.py, distill.py

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def same_every_time(monkeypatch):
    """Every test begins with the same seed, and gets back the signals that a script took over."""
    # as in the folder of the scripts
    monkeypatch.setattr(sys, 'argv', ['script.py'])
    numbers = {getattr(signal, name, signal.SIGINT) for name in train_teacher.Stopper.SIGNALS}
    handlers = {number: signal.getsignal(number) for number in numbers}
    torch.manual_seed(0)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def tiny(vocab=12, length=6, seed=0, **more):
    """A small model in eval mode, with weights that are zero nowhere, not even in its head."""
    torch.manual_seed(seed)
    shape = dict(layers=2, heads=2, width=32, channels=32, cond=16)
    net = models.build(Config(vocab, length, **{**shape, **more}))
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return net.eval()


def nothing_given(B, L=6):
    return torch.full((B, L), -1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def options(script, kind, *words, machine='laptop'):
    """Options of a command line, completed by a preset."""
    o = script.parse([str(word) for word in words])
    train_teacher.fill_in(o, script.preset(machine, kind, stories=False))
    return o


def all_close(found, want, atol=1e-5):
    return all(torch.allclose(a, b, atol=atol) for a, b in zip(found, want, strict=True))


# -----------------------------------------------------------------------------
# Reparameterized time, and the diffusion's noise schedule


@pytest.mark.parametrize('K, times', [
    (27, [0.106, 0.669, 0.823]), (65, [0.179, 0.702, 0.832]), (4096, [0.547, 0.784, 0.859]),
    (50257, [0.646, 0.809, 0.870])])
def test_spot_values_of_the_papers_reparameterization(K, times):
    """A t(tau) of another K or another formula, which trains, and is a little worse everywhere."""
    ts, taus = models.reparameterization(K)

    found = models.piecewise_linear(torch.tensor([0.01, 0.5, 0.99], dtype=DOUBLE), taus, ts)

    assert found.tolist() == pytest.approx(times, abs=1e-3)


@pytest.mark.parametrize('i, ratio', [
    (0, 0.122), (100, 0.527), (500, 0.99), (1000, 1.54), (1490, 2.5), (1999, 2225)])
def test_spot_values_of_diffuseqs_schedule(i, ratio):
    """The noise level of a neighboring index, or time that runs backwards."""
    a, b = models.noise_level(torch.tensor(1 - (i + 1) / 2000, dtype=DOUBLE))

    assert abs(b / a - ratio) < 0.005 * ratio
    assert abs(a ** 2 + b ** 2 - 1) < 1e-12


# 0.4 is the root of 32 / 200, for a decoder of 32 of 200 directions
@pytest.mark.parametrize('reparam, scale', [('paper', 1), ('root', 0.4), ('loss', 0.4)])
def test_a_reparameterization_runs_from_0_to_1(reparam, scale):
    """A --reparam that has no effect, or whose t(tau) does not go from noise to data."""
    flow = tiny(vocab=200, reparam=reparam)
    uniform = tiny(vocab=200, reparam='uniform')

    assert torch.allclose(flow.taus, models.reparameterization(200, scale)[1].float())
    assert (flow.taus.diff() > 0).all()
    assert flow.t_of(torch.tensor([0.0, 1.0])).tolist() == [0, 1]
    assert uniform.t_of(torch.tensor([0.0, 0.3, 1.0])).tolist() == pytest.approx([0, 0.3, 1])


@pytest.mark.parametrize('reparam, stagger', [
    ('root', 0.0), ('root', 1.0), ('root', 3.0), ('loss', 0.0), ('loss', 1.0)])
def test_refitted_tau_rises_as_the_loss_or_its_root_falls(reparam, stagger):
    """A tau fitted to the wrong curve, to a row's time in place of a token's, or to few tokens."""
    flow = tiny(reparam=reparam, stagger=stagger, length=11)
    old = flow.taus.clone()

    def predict(h, given, tau):
        # nats of token 0 at its own time: 1 - tau^2, and more for later places
        harder = 0.3 * torch.arange(given.shape[1])
        p = torch.exp(flow.token_tau(tau, given) ** 2 - 1 - harder)
        others = torch.log((1 - p) / 11 + 1e-9)
        return torch.cat([p.log()[..., None], others[..., None].expand(-1, -1, 11)], -1)

    flow.predict = predict
    given = torch.where(torch.arange(11) < 1, 0, nothing_given(2, 11))
    flow.refit_reparam(torch.zeros(2, 11).long(), given, seed=0)

    left = (1 - old ** 2) ** (0.5 if reparam == 'root' else 1)
    want = 0.5 * (1 - left) + 0.5 * old
    # the root is steep in the last of 32 stretches, which is a straight line there
    before = old < 31 / 32
    assert torch.allclose(flow.taus[before], want[before], atol=3e-3)
    assert (flow.taus.diff() > 0).all()
    assert (flow.taus[0], flow.taus[-1]) == (0, 1)


def test_refitting_tau_depends_on_neither_dropout_nor_empty_rows():
    """Another t(tau) in each of several processes, or one of nan where everything is given."""
    tokens = torch.arange(12).view(2, 6) % 8
    fits = []
    for seed in (1, 2):
        flow = tiny(reparam='root', dropout=0.5).train()
        torch.manual_seed(seed)
        fits.append(flow.refit_reparam(tokens, nothing_given(2), seed=0).clone())

    assert flow.net.training
    assert torch.equal(*fits)
    assert torch.equal(flow.refit_reparam(tokens[:1], tokens[:1], seed=0), fits[0])


# -----------------------------------------------------------------------------
# The one-hot flow: projected equals dense


@torch.no_grad()
@pytest.mark.parametrize('vocab, levels', [(80, 0), (80, 4), (3, 0), (3, 4)])
def test_noise_has_the_covariance_of_dense_noise(vocab, levels):
    """Noise of another covariance than E^T E, by its factor or, with few tokens, without."""
    flow = tiny(vocab=vocab, channels=4, noise_levels=levels)
    E = flow.net.embed
    # its columns are correlated
    E[:, 1] += E[:, 0]
    E[:, 3] -= 2 * E[:, 0]

    noise = flow.noise(60_000, 1).flatten(0, 1)

    want = E.T @ E
    assert (torch.cov(noise.T) - want).abs().max() < 0.05 * want.diagonal().max()
    if levels:
        assert len(noise.unique(dim=0)) == levels ** min(vocab, 4)


def test_levels_are_medians_of_equally_likely_slices():
    """Levels crowded in the middle or at the ends, or of another variance than the noise's."""
    levels = models.quantization_levels(5)

    assert torch.allclose(levels, -levels.flip(0), atol=1e-6)
    assert levels.square().mean() == pytest.approx(1)
    # of fifths: quantiles at 10, 30, 50, 70 and 90 %
    assert levels[4] / levels[3] == pytest.approx(1.28155 / 0.52440, rel=1e-4)


def test_noise_has_the_mean_gradient_of_dense_noise():
    """A biased gradient through the noise's factor, by which E learns something else."""
    flow = tiny(vocab=10, channels=3)
    E = flow.net.embed

    def gradient(noise):
        # not linear, so that the gradient depends on the noise
        loss = 0.5 * noise.square().sum(-1) + noise.sum(-1).sin() + noise.prod(-1)
        return torch.autograd.grad(loss.mean(), E)[0]

    found = gradient(flow.noise(1, 200_000))

    want = gradient(torch.randn(200_000, 10) @ E)
    assert (found - want).norm() < 0.03 * want.norm()


@pytest.mark.parametrize('vocab', [80, 12])
def test_a_frozen_table_writes_the_same_texts(vocab):
    """A factor of another table, or one that a checkpoint holds and no model can load."""
    flow = tiny(vocab=vocab, calls=1)
    names = flow.state_dict().keys()
    want = flow.sample(nothing_given(50), 2, generator())

    flow.freeze_table()

    assert flow.sample(nothing_given(50), 2, generator()).equal(want)
    assert flow.state_dict().keys() == names


@torch.no_grad()
def test_the_noise_and_the_nearest_embedding_are_as_exact_in_bf16(monkeypatch):
    """A noise factor as coarse as bf16, or a token rounded to its neighbor."""
    flow = tiny(vocab=300, model='diffuseq')
    x = torch.randn(50, 50, 32)
    want = flow.nearest(x)
    monkeypatch.setattr(models, 'has_bf16', lambda device: True)
    # what a GPU does: products of bf16 numbers, added up in fp32
    monkeypatch.setattr(torch, 'mm', lambda a, b, out_dtype: a.float() @ b.float())

    with torch.autocast('cpu', torch.bfloat16):
        found = flow.nearest(x)
        R = tiny(vocab=300).noise_factor()

    assert found.equal(want)
    E = tiny(vocab=300).net.embed
    assert (R.T @ R - E.T @ E).abs().max() < 2e-5 * (E.T @ E).max()


@torch.no_grad()
def test_dense_equals_projected_on_the_same_noise():
    """An input that is not x_t E, or a jump that leaves the projected flow."""
    flow = tiny(vocab=80)
    E = flow.net.embed
    s, t = torch.tensor([0.3, 0.6])
    tokens = torch.randint(80, (3, 6))
    eps = torch.randn(3, 6, 80)
    p = torch.rand(3, 6, 80).softmax(-1)
    # the z whose z R is eps E
    R = flow.noise_factor()
    z = torch.linalg.solve(R.T, (eps @ E).mT).mT

    dense = (1 - s) * eps + s * torch.eye(80)[tokens]
    projected = (1 - s) * (z @ R) + s * E[tokens]

    assert torch.allclose(dense @ E, projected, atol=1e-4)
    jumps = models.jump(dense, p, s, t) @ E, models.jump(projected, p @ E, s, t)
    assert torch.allclose(*jumps, atol=1e-4)


def test_noisy_rows_are_noise_and_token_and_given_ones_clean():
    """A time taken for another, or noise on a prompt."""
    flow = tiny(vocab=80)
    tokens = torch.randint(80, (3, 6))
    given = torch.where(torch.arange(6) < 2, tokens, -1)
    tau = torch.tensor([0.0, 0.4, 0.9])

    h = flow.q_sample(tokens, given, tau, generator(1))

    t = flow.t_of(tau)[:, None, None]
    E = flow.net.embed
    want = (1 - t) * flow.noise(3, 6, generator(1)) + t * E[tokens]
    assert torch.allclose(h[:, 2:], want[:, 2:], atol=1e-6)
    assert torch.equal(h[:, :2], E[tokens][:, :2])


@pytest.mark.parametrize('tau', [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize('vocab', [80, 3000])
def test_rows_come_to_the_network_at_unit_size(vocab, tau):
    """Inputs 200 times too large or small at one end of the flow, which train all the same."""
    flow = tiny(vocab=vocab, layers=1)
    tokens = torch.randint(vocab, (64, 6))
    given = torch.where(torch.arange(6) < 2, tokens, -1)
    seen = []
    flow.net.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0]))
    tau = torch.full((64,), tau)

    flow.predict(flow.q_sample(tokens, given, tau), given, tau)

    h, = seen
    assert abs(h[:, 2:].square().mean() - 1) < 0.15
    assert abs(h[:, :2].square().mean() - 1) < 0.15


# -----------------------------------------------------------------------------
# The paper's own network; what it predicts is tested with the published weights


@pytest.mark.filterwarnings('ignore:flex_attention called without torch.compile')
def test_fused_capped_attention_is_the_plain_one():
    """Attention on a GPU with another scale or another cap than on a CPU."""
    # logits on both sides of the cap
    q, k, v = 4 * torch.randn(3, 2, 2, 6, 16)

    fused = models.flex_attention(q, k, v, score_mod=models.cap_score)

    assert torch.allclose(fused, models.capped_attention(q, k, v), atol=1e-5)


@pytest.mark.parametrize('gamma', [0.0, 0.6, 0.8, 1.0])
def test_where_gamma_sampling_lands(gamma):
    """The paper's students sampled by another rule than the one behind their published figures."""
    taus = torch.tensor([0.2, 0.5, 0.8])
    keep = (1 - gamma ** 2) ** 0.5
    for network, calls in (('paper', 1), ('paper', 0), ('ours', 1)):
        flow = tiny(network=network, calls=calls)
        t = flow.t_of(taus)
        if network == 'paper' and calls:
            want = 1 - (1 - t) * keep
        else:
            want = t / (t + (1 - t) * keep)

        assert torch.allclose(flow.t_of(flow.gamma_landing(taus, gamma)), want, atol=1e-3)


# -----------------------------------------------------------------------------
# Jumps, and the flow map of a flow whose denoiser is known: one position, K tokens of prior pi


def test_a_jump_stays_arrives_and_composes():
    """A jump that is right for one step and wrong for two."""
    x = torch.randn(2, 4, 3, dtype=DOUBLE)
    p = torch.rand(2, 4, 3, dtype=DOUBLE).softmax(-1)
    s, u, t, end = torch.tensor([0.2, 0.5, 0.8, 1.0], dtype=DOUBLE)

    assert torch.allclose(models.jump(x, p, s, s), x)
    assert torch.allclose(models.jump(x, p, s, end), p)
    two = models.jump(models.jump(x, p, s, u), p, u, t)
    assert torch.allclose(two, models.jump(x, p, s, t))


def exact_denoiser(x, t):
    """D_t(x)_k ~ pi_k exp(t x_k / (1-t)^2): Bayes for x = (1-t) eps + t e_k."""
    prior = torch.tensor([0.5, 0.3, 0.2], dtype=DOUBLE)
    return (prior.log() + t * x / (1 - t) ** 2).softmax(-1)


def exact_map(x, s, t, steps=1500):
    """X_{s,t}(x) by the midpoint method: dx/dr = (D_r(x) - x) / (1-r)."""
    step = (t - s) / steps
    for i in range(steps):
        a = s + i * step
        middle = a + step / 2
        y = x + step / 2 * (exact_denoiser(x, a) - x) / (1 - a)
        x = x + step * (exact_denoiser(y, middle) - y) / (1 - middle)
    return x


def exact_delta(x, s, t, steps=1500):
    return x + (1 - s) * (exact_map(x, s, t, steps) - x) / (t - s)


class ExactNet:
    """Both networks of a distillation, without error; h is x itself (E = identity), tau is t."""

    def __init__(self, stagger=0.0):
        self.config = Namespace(stagger=stagger)

    def predict(self, h, given, tau, tau_to=None):
        if tau_to is None:
            return exact_denoiser(h, tau[:, None, None]).log()
        return exact_delta(h, tau[:, None, None], tau_to[:, None, None]).log()

    def token_t(self, tau, given):
        return tau[:, None, None]

    def jump(self, h, p, given, s, t):
        return models.jump(h, p, s[:, None, None], t[:, None, None])


def error_of(target, s, t, stagger=0.0, **how):
    """The largest error of a distillation's target for exact networks, for rows from s to t."""
    x = torch.randn(2, 4, 3, dtype=DOUBLE, generator=generator())
    s = torch.tensor(s, dtype=DOUBLE)
    t = torch.tensor(t, dtype=DOUBLE)
    net = ExactNet(stagger)
    found = target(net, net, x, None, s, t, Namespace(**how))
    assert (found.sum(-1) - 1).abs().max() < 1e-9
    return (found - exact_delta(x, s[:, None, None], t[:, None, None])).abs().max()


@pytest.mark.parametrize('target, how, s, t, error', [
    (distill.semigroup_target, {}, [0.0, 0.2], [0.9, 0.6], 1e-5),
    (distill.lagrangian_target, {'substep': 0.01}, [0.0, 0.2], [0.9, 0.6], 0.01),
    (distill.eulerian_target, {'substep': 0.01}, [0.0, 0.2], [0.9, 0.6], 0.01),
    (distill.rollout_target, {'rollout': 400}, [0.0, 0.2], [0.999, 0.999], 0.01),
])
def test_targets_are_right_at_the_exact_flow_map(target, how, s, t, error):
    """A target that a perfect student would have to move away from."""
    assert error_of(target, s, t, **how) < error


@pytest.mark.parametrize('stagger', [0.0, 3.0])
def test_a_rollout_of_more_steps_is_closer_to_the_flow_map(stagger):
    """Steps, even or uneven, of which more do not help."""
    few, many = [error_of(distill.rollout_target, [0.0, 0.2], [0.999, 0.999], stagger, rollout=n)
                 for n in (4, 8)]

    assert many < few / 10


class LinearNet(ExactNet):
    """A network whose prediction changes evenly with time."""

    def predict(self, h, given, tau):
        # logits of probabilities (0.2, 0.3, 0.5) at tau = 0 and (0.5, 0.3, 0.2) at 1
        p = torch.stack([0.2 + 0.3 * tau, torch.full_like(tau, 0.3), 0.5 - 0.3 * tau], -1)
        return p.log()[:, None].expand_as(h)


@pytest.mark.parametrize('stagger', [0.0, 3.0])
def test_a_rollout_aims_at_the_end_of_each_step(stagger):
    """Predictions taken from the start or the middle of a step, whose texts are less likely."""
    net = LinearNet(stagger)
    s, t = torch.tensor([[0.2], [1.0]], dtype=DOUBLE)

    found = distill.rollout_target(net, net, torch.zeros(1, 4, 3, dtype=DOUBLE), None, s, t,
                                   Namespace(rollout=4))

    assert torch.allclose(found, torch.tensor([0.5, 0.3, 0.2], dtype=DOUBLE))


class NotingNet(ExactNet):
    """A network that takes note of the times it is asked for."""

    def __init__(self, name, asked, stagger):
        super().__init__(stagger)
        self.name = name
        self.asked = asked

    def predict(self, h, given, *times):
        self.asked.append((self.name, *[round(tau.item(), 6) for tau in times]))
        return torch.zeros_like(h)


@pytest.mark.parametrize('target, stagger, asked', [
    (distill.semigroup_target, 0.0, [('student', 0.2, 0.6), ('student', 0.6, 1.0)]),
    (distill.lagrangian_target, 0.0, [('student', 0.2, 0.92), ('teacher', 0.92)]),
    (distill.eulerian_target, 0.0, [('teacher', 0.2), ('student', 0.28, 1.0)]),
    (distill.rollout_target, 0.0,
     [('teacher', 0.2), ('teacher', 0.4), ('teacher', 0.6), ('teacher', 0.8)]),
    # the first steps are shorter: 1/8 and 0.354 and 0.65 of the way
    (distill.rollout_target, 3.0,
     [('teacher', 0.2), ('teacher', 0.3), ('teacher', 0.482843), ('teacher', 0.719615)]),
])
def test_who_is_asked_for_a_target_and_at_which_times(target, stagger, asked):
    """A student that learns from itself alone: at the exact flow map any sub-steps are as good."""
    found = []
    student, teacher = [NotingNet(name, found, stagger) for name in ('student', 'teacher')]
    s, t = torch.tensor([[0.2], [1.0]], dtype=DOUBLE)

    target(student, teacher, torch.zeros(1, 4, 3), None, s, t, Namespace(substep=0.1, rollout=4))

    assert found == asked


def test_semigroup_weight_at_the_ends():
    """A division by 0 where a sub-step has no length, or where a jump ends at t = 1."""
    s, u, t = torch.tensor([[0.0, 0.5, 1.0], [0.2, 0.2, 0.6], [0.2, 0.6, 0.6]]).T

    assert models.semigroup_weight(s, u, t).tolist() == pytest.approx([0, 0, 1])
    assert models.semigroup_weight(s, s, s).isfinite().all()


def flow_map(*words, student=None, teacher=None):
    """A FlowMap of tiny networks."""
    student = student or tiny(calls=1)
    teacher = teacher or tiny(seed=1)
    return distill.FlowMap(student, teacher, None, options(distill, 'flow map', *words))


@pytest.mark.parametrize('method, diagonal, boundary', [
    ('semigroup', 0.5, 1 / 32), ('semigroup', 0, 0.5), ('semigroup', 1, 0.5),
    ('semigroup', 0.25, 0), ('rollout', 0.25, 0.85)])
def test_loss_of_a_flow_map_against_brute_force(method, diagonal, boundary):
    """Rows that get each other's targets, or a fraction of rows that stops the run."""
    objective = flow_map('--method', method, '--diagonal', diagonal, '--boundary', boundary,
                         '--reuse', 0, '--rollout', 3)
    student = objective.student
    tokens = torch.randint(8, (8, 6))
    given = torch.where(torch.rand(8, 6) < 0.3, tokens, -1)
    times = objective.times(8, generator())
    s, t, kind, _ = times

    loss, seen = objective(tokens, given, times, generator(1))

    h = student.q_sample(tokens, given, s, generator(1))
    nats = torch.zeros(8)
    for i in range(8):
        row = (h[i:i + 1], given[i:i + 1], s[i:i + 1])
        if kind[i] == 0:
            target = objective.teacher.predict(*row).softmax(-1)
        else:
            target = objective.targets([*row, t[i:i + 1], kind])
        log_p = student.predict(*row, t[i:i + 1]).log_softmax(-1)
        nats[i] = -(target * log_p).sum(-1)[given[i:i + 1] < 0].mean()
    want = train_teacher.sum_and_count(nats, kind, 3)
    assert torch.allclose(loss, nats.mean(), atol=1e-5)
    assert torch.allclose(seen['kinds'], want, atol=1e-4)


# -----------------------------------------------------------------------------
# Cached targets


@pytest.mark.parametrize('iters, asked', [(10, 4), (12, 4), (None, 12)])
def test_what_the_teacher_answered_is_learned_again(iters, asked):
    """A teacher that is asked in every iteration, or targets of other jumps than their own."""
    objective = flow_map('--reuse', 3, '--rollout', 2, '--diagonal', 0.25)
    rollout = objective.target
    rows = []
    objective.target = lambda *words: rows.append(len(words[2])) or rollout(*words)
    tokens = torch.randint(8, (8, 6))

    for it in range(12):
        objective.before(it, iters, None, None)
        times = objective.times(8, generator(it))
        h, given, s, t, kind, ids, p = objective.examples(
            tokens, nothing_given(8), times, generator(it))

    # in ceil(iters / reuse) iterations, for 6 jumps among 8 rows
    assert rows == [6] * asked
    assert [len(x) for x in objective.caches[0].kept] == [6 * asked] * 7
    want = rollout(objective.student, objective.teacher, h, given, s, t, objective.o)
    found = torch.zeros(8, 6, 12).scatter(2, ids.long(), p.float())
    assert torch.allclose(found[kind > 0], want[kind > 0], atol=2e-3)


@pytest.fixture(scope='module')
def many_tokens():
    """A FlowMap of two rows of 50,257 tokens, of which one is the likeliest, and its targets."""
    shape = dict(vocab=50_257, length=64, layers=1, width=8, channels=8)
    student = tiny(**shape, calls=1)
    teacher = tiny(**shape)
    teacher.net.head.bias.data[50_000] += 20
    objective = flow_map('--rollout', 1, '--diagonal', 0, student=student, teacher=teacher)
    targets = []
    student.predict = lambda *words: targets.append(words[-1]) or torch.zeros(2)
    times = objective.times(2, generator())
    objective(torch.zeros(2, 64).long(), nothing_given(2, 64), times, generator())
    return objective, targets[0]


def test_ids_of_a_large_vocabulary_survive_16_bits(many_tokens):
    """Ids above 32,767 that come back from the cache as negative ones."""
    _, (ids, p) = many_tokens

    assert (ids[..., 0] == 50_000).all()
    assert ids.min() >= 0
    assert ids.max() < 50_257
    assert (p[..., 0] > 0.9).all()


def test_100_000_cached_targets_of_a_large_vocabulary_fit_into_1_gb(many_tokens):
    """A cache that keeps all tokens' probabilities of each target, and memory that is full."""
    objective, _ = many_tokens

    row = sum(x[0].numel() * x.element_size() for x in objective.caches[0].kept)

    assert 100_000 * row < 10 ** 9


# -----------------------------------------------------------------------------
# Sampling: gamma, stagger, and the times at which a network is called


@pytest.mark.parametrize('stagger', [0.0, 1.0])
@pytest.mark.parametrize('gamma', [0.3, 0.8, 1.0])
@pytest.mark.parametrize('tau', [0.1, 0.5, 0.9])
def test_gamma_adds_as_much_noise_as_the_time_says(gamma, stagger, tau):
    """Noise on top of noise: each call would see more of it than its time says."""
    flow = tiny(stagger=stagger)
    given = nothing_given(1)
    zeros = torch.zeros(1, 6, 32)
    tau = torch.tensor([tau])
    landing = flow.gamma_landing(tau, gamma)
    r = flow.token_t(landing, given)
    t = flow.token_t(tau, given)

    # what becomes of x_r = (1-r) eps + r token, of fresh noise, and of no noise at all
    noise = flow.renoise((1 - r) * (zeros + 1), given, landing, tau, zeros)
    token = flow.renoise(r * (zeros + 1), given, landing, tau, zeros)
    fresh = flow.renoise(zeros, given, landing, tau, zeros + 1)

    assert torch.allclose(token, t.expand_as(token), atol=1e-4)
    assert torch.allclose(noise ** 2 + fresh ** 2, ((1 - t) ** 2).expand_as(token), atol=1e-4)
    if stagger == 0:
        assert torch.allclose(fresh, gamma * (1 - t).expand_as(token), atol=1e-3)


def test_a_consistency_model_only_jumps_to_the_end(monkeypatch):
    """A jump that was never learned, where more than one call is asked for."""
    flow = tiny(calls=1, consistency=True)
    asked = []
    predict = flow.predict
    monkeypatch.setattr(flow, 'predict', lambda h, given, s, t: (
        asked.append((s.item(), t.item())) or predict(h, given, s, t)))

    flow.sample(nothing_given(2), 4)

    assert asked == [(0, 1), (0.25, 1), (0.5, 1), (0.75, 1)]


def test_times_of_staggered_tokens():
    """A prompt that is waited for, a token that never starts or ends, or another flow at 0."""
    given = torch.tensor([[-1, -1, -1, -1, -1, -1], [3, 3, -1, -1, -1, 3], [3, 3, 3, 3, -1, 3]])
    tau = torch.tensor([0.5])

    found = tiny(stagger=1.0).token_tau(tau, given)

    # the first token is denoised in the first half of the row's time
    assert torch.allclose(found[0], torch.linspace(1, 0, 6))
    assert torch.allclose(found[1, 2:5], torch.tensor([1, 0.5, 0]))
    # alone it has the first one's time
    assert found[2, 4] == 1
    assert torch.equal(tiny().token_tau(tau, given), torch.full((3, 6), 0.5))
    for end in (0.0, 1.0):
        ends = tiny(stagger=0.3).token_tau(torch.tensor([end]), given)[0]
        assert torch.allclose(ends, torch.full((6,), end))


def test_a_finished_token_stays_and_a_waiting_one_too():
    """A token that moves before its time, or after it, where 1 - t is 0."""
    flow = tiny(stagger=3.0)
    given = nothing_given(2)
    h = torch.randn(2, 6, 32)
    p, first, second = torch.rand(3, 2, 6, 12).softmax(-1)
    s = torch.tensor([0.4])
    t = torch.tensor([0.6])
    before = flow.token_tau(s, given)[0]    # 1, 1, 0.4, 0, 0, 0
    now = flow.token_tau(t, given)[0]       # 1, 1, 1, 0.6, 0, 0

    after = flow.jump(h, p, given, s, t)
    both = distill.two_steps(flow, first, second, given, s, t, torch.ones(1))

    same = before == now
    assert same.tolist() == [True, True, False, False, True, True]
    assert torch.equal(after[:, same], h[:, same])
    assert torch.allclose(after[:, 2], (p @ flow.net.embed)[:, 2], atol=1e-5)
    # what the first sub-step finished is the first one's, the rest the second one's
    assert torch.equal(both[:, 2], first[:, 2])
    assert torch.equal(both[:, 3:], second[:, 3:])


@pytest.mark.parametrize('more, times', [
    ({}, [[0], [0.25], [0.5], [0.75]]),
    ({'calls': 1}, [[0, 0.25], [0.25, 0.5], [0.5, 0.75], [0.75, 1]]),
    ({'model': 'diffuseq'}, [[0], [0.25], [0.5], [0.75]]),
    # from DiffuSeq's index 1490 on
    ({'model': 'diffuseq', 'calls': 1}, [[0.2545], [0.440875], [0.62725], [0.813625]]),
])
def test_times_at_which_a_sampler_calls_the_network(more, times):
    """A sampler that begins with pure noise at a time at which the network knows clean rows."""
    net = tiny(**more)
    seen = []
    net.net.register_forward_pre_hook(lambda net, inputs: seen.append(inputs))

    net.sample(nothing_given(2), 4, generator())

    found = [[tau.item() for tau in inputs[2:4] if tau is not None] for inputs in seen]
    assert np.array(found) == pytest.approx(np.array(times))


# -----------------------------------------------------------------------------
# The loss over a vocabulary


def dense_cross_entropy(y, weight, bias, cap, target, weights):
    """What model.cross_entropy is to compute, by autograd over all V tokens at once."""
    z = y @ weight.T + bias
    if cap:
        z = cap * torch.tanh(z / cap)
    log_q = z.log_softmax(-1)
    if isinstance(target, tuple):
        ids, p = target
        log_q = log_q.gather(-1, ids)
        # all other tokens are one
        log_q = torch.cat([log_q, (1 - log_q.exp().sum(-1, keepdim=True)).log()], -1)
        target = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)
    return (-(target * log_q).sum(-1) * weights).sum(1)


def likeliest(p, k):
    p, ids = p.topk(k)
    return ids, p


def loss_of_a_gpu(y, ids, p, weights, weight, bias, cap):
    """The loss over all logits at once in place of that in chunks."""
    log_q = models.capped_logits(y, weight, bias, cap).log_softmax(-1)
    return weights * models.sparse_cross_entropy(log_q, ids, p)


# 16,384 tokens are computed in chunks of at most 64 positions
@pytest.mark.parametrize('form, cap, V, L', [
    ('ids', 0.0, 7, 4), ('ids', 3.0, 7, 4), ('dense', 0.0, 7, 4), ('dense', 3.0, 7, 4),
    ('top-k', 0.0, 7, 4), ('top-k', 3.0, 7, 4), ('all', 3.0, 7, 4),
    ('ids', 3.0, 2 ** 14, 32), ('top-k', 0.0, 2 ** 14, 33), ('top-k', 3.0, 2 ** 14, 75)])
@pytest.mark.parametrize('row_weights', [(1.0, 1.0), (0.3, -2.0)])
@pytest.mark.parametrize('gpu', [False, True])
def test_cross_entropy_against_brute_force(monkeypatch, form, cap, V, L, row_weights, gpu):
    """A gradient of another loss, a cap without slope, or positions lost at a chunk's end."""
    if gpu:
        monkeypatch.setattr(models, 'ChunkedCrossEntropy', Namespace(apply=loss_of_a_gpu))
    sizes = ((2, L, 3), (V, 3), (V,))
    inputs = [torch.randn(size, dtype=DOUBLE, requires_grad=True) for size in sizes]
    p = (3 * torch.randn(2, L, V, dtype=DOUBLE)).softmax(-1)
    weights = torch.rand(2, L, dtype=DOUBLE)
    row_weights = torch.tensor(row_weights, dtype=DOUBLE)
    best = p.argmax(-1)
    if form == 'ids':
        target, want = best, torch.nn.functional.one_hot(best, V).double()
    elif form == 'top-k':
        target = want = likeliest(p, 2)
    else:
        # of all tokens nothing is left for the rest
        target, want = likeliest(p, V) if form == 'all' else p, p

    losses = []
    for function, goal in ((models.cross_entropy, target), (dense_cross_entropy, want)):
        loss = (row_weights * function(*inputs, cap, goal, weights)).mean()
        losses.append([loss, *torch.autograd.grad(loss, inputs)])

    # all logits at once are in fp32
    exact = form in ('ids', 'top-k') and not gpu
    assert all_close(*losses, atol=1e-9 if exact else 1e-4)


def rows_with_a_prompt():
    """Tokens, given and tau of two rows, the first of which has a prompt."""
    tokens = torch.tensor([[1, 2, 3, 0], [4, 4, 0, 1]])
    given = nothing_given(2, 4)
    given[0, :2] = tokens[0, :2]
    return tokens, given, torch.tensor([0.3, 0.8])


def test_loss_of_a_flow_against_brute_force():
    """A loss divided by the wrong number of positions, or one that counts a prompt."""
    flow = tiny(vocab=5, length=4)
    tokens, given, tau = rows_with_a_prompt()

    loss = flow.loss(tokens, given, tau, generator())

    h = flow.q_sample(tokens, given, tau, generator())
    nats = cross_entropy(flow.predict(h, given, tau).mT, tokens, reduction='none')
    assert torch.allclose(loss, torch.stack([nats[0, 2:].mean(), nats[1].mean()]), atol=1e-5)


@pytest.mark.parametrize('more', [
    {'channels': 4, 'hidden_input': True}, {'calls': 1}, {'network': 'paper', 'calls': 1},
    {'model': 'diffuseq'}, {'model': 'mdlm'}, {'model': 'ar'}])
def test_a_compiled_network_has_the_same_loss_and_gradient(monkeypatch, more):
    """A network that cannot be traced as one graph, seen first on a GPU; or other values there."""
    tau = torch.tensor([0.2, 0.5, 0.9])
    found = []
    for compiled in (False, True):
        net = tiny(layers=1, **more)
        if compiled:
            monkeypatch.setattr(models, 'ChunkedCrossEntropy', Namespace(apply=loss_of_a_gpu))
            net.net.compile(backend='eager', dynamic=False, fullgraph=True)
        loss = net.loss(torch.arange(18).view(3, 6) % 8, nothing_given(3), tau, generator())
        loss.mean().backward()
        found.append([loss, *[p.grad for p in net.parameters() if p.grad is not None]])

    assert all_close(*found)


def test_rounded_weights_write_the_same(monkeypatch):
    """Texts that depend on whether weights are rounded once or in each call."""
    def in_bf16(device):
        return torch.autocast('cpu', torch.bfloat16, cache_enabled=False)

    monkeypatch.setattr(models, 'autocast', in_bf16)
    flow = tiny(calls=1, channels=8)
    given = nothing_given(64)
    want, _ = models.sample_rows(flow, given, 3, seed=1)

    models.round_weights(flow)

    assert flow.net.head.weight.dtype == torch.bfloat16
    found, _ = models.sample_rows(flow, given, 3, seed=1)
    assert found.equal(want)
    assert len(found.unique(dim=0)) > 30


# -----------------------------------------------------------------------------
# Students, averages, optimizers


def student_of(kind, teacher, *words):
    """A new student in eval mode."""
    o = options(distill, kind, *words)
    config = distill.METHODS[kind].student_config(teacher.config, o)
    return distill.build_student(teacher, config).eval()


def frozen(net):
    return {name for name, p in net.named_parameters() if not p.requires_grad}


def test_a_new_flow_map_is_its_teacher_whatever_time_it_jumps_to():
    """A student that begins somewhere else than its teacher."""
    teacher = tiny(channels=8)
    h = torch.randn(3, 6, 8)
    given = nothing_given(3)
    s = torch.tensor([0.0, 0.4, 0.9])

    student = student_of('flow map', teacher)

    for t in (s, torch.ones(3)):
        assert torch.equal(teacher.predict(h, given, s), student.predict(h, given, s, t))
    assert frozen(student) == {'net.embed'}
    assert student.config == replace(teacher.config, calls=1, noise_levels=3, consistency=True)


@torch.no_grad()
def test_a_new_generator_is_its_teacher_at_a_later_start():
    """A generator whose noise is that of another time than the one it is conditioned on."""
    teacher = tiny(model='diffuseq')
    given = nothing_given(2000)

    student = student_of('score', teacher, '--no-shared-noise')

    x_t = student.initial_noise(given)
    want = teacher.predict(x_t, given, torch.full((2000,), 1 - 1491 / 2000))
    assert torch.equal(student.generate(x_t, given), want)
    # b of b/a = 2.5
    assert abs(x_t.std() - 2.5 / (1 + 2.5 ** 2) ** 0.5) < 0.005
    assert frozen(student) == {'bias', 'net.embed'}


def one_update(net, ema, *optimizers, it=0, factor=1.0, clip=0.0):
    """train_teacher.update with gradients of 1 everywhere: their norm."""
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    return train_teacher.update(net, ema, optimizers, it, factor, Namespace(clip=clip, ema=0.999))


@pytest.mark.parametrize('it, kept', [(0, 1 / 10), (1, 2 / 11), (90, 91 / 100), (10 ** 6, 0.999)])
def test_the_average_forgets_its_start(it, kept):
    """An average without a ramp, a third of which is the random start."""
    net = tiny()
    ema = tiny(seed=1)
    want = kept * ema.net.embed + (1 - kept) * net.net.embed

    one_update(net, ema, torch.optim.SGD(net.parameters(), lr=0.0), it=it)

    assert torch.allclose(ema.net.embed, want, atol=1e-6)


@pytest.mark.parametrize('clip', [0.0, 1.0])
def test_gradients_are_clipped_and_rates_reach_every_optimizer(clip):
    """Clipping without effect or without an end, or warm-up of one optimizer out of two."""
    net = tiny()
    weights = list(net.parameters())
    before = [weights[0].detach().clone(), weights[-1].detach().clone()]
    size = sum(p.numel() for p in weights) ** 0.5
    optimizers = [torch.optim.SGD(weights[:3], lr=1.0), torch.optim.SGD(weights[3:], lr=0.5)]

    norm = one_update(net, tiny(), *optimizers, factor=0.25, clip=clip)

    scale = 1 / size if clip else 1
    assert norm == pytest.approx(size, rel=1e-3)
    for old, new, lr in zip(before, (weights[0], weights[-1]), (0.25, 0.125)):
        assert torch.allclose(old - new, torch.full_like(old, lr * scale), rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in weights)


@pytest.mark.parametrize('iters, it, factor', [
    (100, 0, 0.1), (100, 4, 0.5), (100, 9, 1), (100, 69, 1), (100, 70, 1), (100, 85, 0.5),
    (100, 99, 1 / 30), (None, 4, 0.5), (None, 10 ** 6, 1)])
def test_the_learning_rate_rises_stays_and_falls(iters, it, factor):
    """A rate that is 0 in the first iteration, or that falls before the end is known."""
    o = Namespace(warmup=10, decay=0.3)

    assert train_teacher.learning_rate_factor(it, iters, o) == pytest.approx(factor)


@pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='torch 2.9 is the first with it')
def test_muon_is_torchs_muon(monkeypatch):
    """Other momentum, scale or coefficients, or shapes mixed up where matrices go together."""
    shapes = [(8, 24), (24, 8), (16, 16), (24, 8), (8, 24), (24, 8)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    # theirs computes in bf16
    monkeypatch.setattr(torch.Tensor, 'bfloat16', lambda x: x.clone())
    optimizers = [train_teacher.Muon(ours, lr=0.02),
                  torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0, momentum=0.95)]

    for _ in range(4):
        for mine, other in zip(ours, theirs):
            mine.grad = 10.0 ** len(mine) * torch.randn_like(mine)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()

    assert all_close(ours, theirs)


@pytest.mark.parametrize('more', [{}, {'network': 'paper'}])
@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
def test_every_weight_that_trains_has_one_optimizer(optimizer, more):
    """Weights that nobody trains or that two optimizers do, or a frozen embedding that moves."""
    net = tiny(**more)
    net.net.embed.requires_grad_(False)
    o = options(train_teacher, 'flm', '--optimizer', optimizer)

    optimizers = train_teacher.make_optimizers(net, o)

    names = {p: name for name, p in net.named_parameters()}
    groups = [[names[p] for p in each.param_groups[0]['params']] for each in optimizers]
    assert sorted(sum(groups, [])) == sorted(set(names.values()) - {'net.embed'})
    matrices = [f'net.blocks.{i}.{name}.weight' for i in (0, 1)
                for name in ('qkv', 'out', 'up', 'down')]
    assert groups[1:] == ([matrices] if optimizer == 'muon' else [])


# -----------------------------------------------------------------------------
# Tokens from probabilities, and the baselines


def test_tokens_are_drawn_as_often_as_their_probabilities_say(monkeypatch):
    """Tokens of another distribution, or <bos>, where rounding takes the sum to its end."""
    p = torch.tensor([0.5, 0.2, 0.0, 0.25, 0.05, 0.0, 0.0])

    tokens = models.draw(p.expand(1000, 200, 7), generator())
    monkeypatch.setattr(torch, 'rand', lambda shape, **how: torch.ones(shape))
    last = models.draw(models.mask_specials(torch.randn(4, 5, 300)).softmax(-1))

    fraction = torch.bincount(tokens.flatten(), minlength=7) / tokens.numel()
    assert (fraction - p).abs().max() < 0.005
    assert fraction[2] == 0
    assert last.max() < 298


def test_an_autoregressive_loss_is_the_chain_rule():
    """A loss that is shifted by one, or that sees the token it predicts."""
    net = tiny(model='ar', channels=4)
    tokens = torch.randint(8, (3, 6))
    # <bos> is the first
    before = torch.cat([torch.full((3, 1), 11), tokens[:, :-1]], 1)

    loss = net.loss(tokens, nothing_given(3))

    nats = cross_entropy(net.predict(before).mT, tokens, reduction='none').mean(1)
    assert torch.allclose(loss, nats, atol=1e-5)


def test_the_cache_of_keys_and_values_is_exact():
    """Keys of another position, or of another row."""
    net = tiny(model='ar', channels=4)
    before = torch.randint(8, (3, 6))
    cache = torch.empty(2, 2, 3, 2, 6, 16)

    one_by_one = [net.predict(before[:, i:i + 1], cache=cache, at=i) for i in range(6)]

    assert torch.allclose(torch.cat(one_by_one, 1), net.predict(before), atol=1e-5)


@torch.no_grad()
def test_an_autoregressive_model_samples_by_its_own_probabilities():
    """Tokens that are written by the logits of another position."""
    net = tiny(vocab=7, length=2, model='ar')
    net.net.head.weight.mul_(5)

    rows = net.sample(nothing_given(40_000, 2), rng=generator())

    p = models.mask_specials(net.predict(torch.tensor([[6]]))).softmax(-1)[0, 0]
    first = torch.bincount(rows[:, 0], minlength=7) / 40_000
    assert (first - p).abs().max() < 0.01
    second = rows[rows[:, 0] == 1, 1]
    p = models.mask_specials(net.predict(torch.tensor([[6, 1]]))).softmax(-1)[0, 1]
    assert (torch.bincount(second, minlength=7) / len(second) - p).abs().max() < 0.03


def exact_twins(seen, target=None, weights=None):
    """What an mdlm predicts of two positions that are both 0 or both 1, equally likely."""
    p = torch.zeros(*seen.shape, 5)
    other = seen.flip(1)
    for token in (0, 1):
        p[..., token] = torch.where(other < 0, 0.5, (other == token).float())
    if target is None:
        return p.log()
    nats = -p.gather(2, target[..., None])[..., 0].log()
    return (nats * weights).sum(1)


def test_masked_diffusion_on_an_exact_toy():
    """A bound that is not -log p for an exact network."""
    net = tiny(vocab=5, length=2, model='mdlm')
    net.predict = exact_twins
    tokens = torch.randint(2, (100_000, 1)).expand(-1, 2)
    t = torch.arange(100_000) / 100_000

    loss = net.loss(tokens, nothing_given(100_000, 2), t, generator()).mean()

    assert abs(loss - math.log(2) / 2) < 0.01


@pytest.mark.parametrize('nfe', [1, 2, 8])
def test_masked_sampler_on_an_exact_toy(nfe):
    """A call that unmasks more than its fraction."""
    net = tiny(vocab=5, length=2, model='mdlm')
    net.predict = exact_twins

    rows = net.sample(nothing_given(40_000, 2), nfe, generator())

    # both are written by the same call with 1/nfe, and then agree by chance
    differ = (rows[:, 0] != rows[:, 1]).float().mean()
    assert abs(differ - 1 / nfe / 2) < 0.01


# -----------------------------------------------------------------------------
# SDTT: a masked diffusion's student


def masked_distillation(net, *words, iters, it=0):
    """The objective at an iteration."""
    o = options(distill, 'masked', *words)
    objective = distill.MaskedDistillation(net, net, None, o)
    objective.before(it, iters, net, None)
    return objective


@pytest.mark.parametrize('t, final_calls', [(0.0, 1), (0.5, 2)])
def test_target_of_masked_distillation_is_what_two_steps_predict(t, final_calls):
    """A prediction from before the other position was decided, or of a token already written."""
    net = tiny(vocab=5, length=2, model='mdlm')
    objective = masked_distillation(net, '--rounds', 1, '--final-calls', final_calls, iters=1)
    objective.teacher.predict = exact_twins
    times = torch.full((40_000, 1), t)

    target = objective.two_ancestral_steps(nothing_given(40_000, 2), times, generator())

    # by two steps all is written, half of it by the first: one of two by each in half of the rows,
    # and then the second knows for certain
    half = torch.tensor([0.5, 0.5, 0, 0, 0])
    certain = target.amax(-1) == 1
    assert abs(certain.any(1).float().mean() - 0.5) < 0.01
    assert not certain.all(1).any()
    assert ((target[~certain] - half).abs() < 1e-6).all()
    assert (target.mean((0, 1)) - half).abs().max() < 0.01


@pytest.mark.parametrize('start, known, replacements', [
    (0, 0, [4, 8]),
    # --minutes becomes a number of iterations in the middle of a round
    (0, 6, [6, 8]),
    # a run that continues where a round begins
    (8, 0, [8]),
])
def test_rounds_of_masked_distillation(start, known, replacements):
    """Steps that do not double, or a teacher that is never replaced."""
    net = tiny(model='mdlm')
    objective = masked_distillation(net, '--rounds', 3, '--final-calls', 2, iters=10)
    before = objective.teacher.net.head.weight.clone()
    steps = []
    replaced = []

    for it in range(start, 10):
        net.net.head.weight.data.add_(1)
        objective.before(it, 10 if it >= known else None, net, None)
        steps.append(objective.step)
        if not objective.teacher.net.head.weight.equal(before):
            replaced.append(it)
        before = objective.teacher.net.head.weight.clone()

    first = replacements[0]
    if start == 0:
        assert steps == [1 / 16] * first + [1 / 8] * (8 - first) + [1 / 4] * 2
    assert replaced == replacements


@torch.no_grad()
def test_masked_distillation_counts_what_is_masked():
    """A mean over positions that the student sees."""
    net = tiny(model='mdlm')
    objective = masked_distillation(net, '--rounds', 1, '--final-calls', 1, iters=1)
    # all tokens are equally likely
    net.net.head.weight.zero_()
    net.net.head.bias.zero_()
    tokens = torch.randint(8, (4000, 6))
    given = torch.where(torch.arange(6) < 5, tokens, -1)

    loss, _ = objective(tokens, given, [torch.full((4000,), 0.7)], generator())

    # in the three rows of ten whose last position is masked
    assert abs(loss - 0.3 * math.log(12)) < 0.1


# -----------------------------------------------------------------------------
# What all models promise

@pytest.mark.parametrize('kind, more, how', [
    ('flm', {}, {}),
    ('flm', {}, {'gamma': 0.7}),
    ('flm', {}, {'gamma': 1.0}),
    ('flm', {}, {'temperature': 2.0}),
    ('flm', {'calls': 1}, {}),
    ('flm', {'calls': 1}, {'gamma': 0.7}),
    ('flm', {'calls': 1, 'network': 'paper'}, {'gamma': 0.8}),
    ('flm', {'calls': 1, 'consistency': True}, {}),
    ('flm', {'channels': 4, 'stagger': 2.0}, {}),
    ('mdlm', {}, {}),
    ('mdlm', {}, {'temperature': 2.0}),
    ('ar', {}, {}),
    ('ar', {}, {'temperature': 2.0}),
    ('diffuseq', {}, {}),
    ('diffuseq', {}, {'method': 'ddim'}),
    ('diffuseq', {}, {'clamp': True}),
    ('diffuseq', {}, {'method': 'ddim', 'clamp': True}),
    ('diffuseq', {'calls': 1, 'shared_noise': True}, {}),
])
def test_given_tokens_come_back_and_special_ids_are_never_written(kind, more, how):
    """A prompt overwritten, <sep> in a text, rows in another order, or an option without effect."""
    net = tiny(model=kind, layers=1, **more)
    # more rows than are written at a time
    tokens = torch.randint(8, (300, 6))
    given = torch.where(torch.rand(300, 6) < 0.3, tokens, -1)
    # it loves <sep> and <bos>
    bias = net.bias if kind == 'diffuseq' else net.net.head.bias
    bias.data[-2:] += 10
    seen = []

    rows, _ = models.sample_rows(net, given, 3, seed=0, on_call=lambda i, x: seen.append(i), **how)
    plain, _ = models.sample_rows(net, given, 3, seed=0)

    assert torch.equal(rows[given >= 0], tokens[given >= 0])
    assert rows.min() >= 0
    assert rows[given < 0].max() < 10
    assert seen == 2 * list(range(6 if kind == 'ar' else 3))
    assert torch.equal(rows, plain) == (how == {})


@pytest.mark.parametrize('kind', ['mdlm', 'ar'])
def test_low_temperature_leaves_fewer_tokens(kind):
    """A temperature that multiplies where it should divide."""
    net = tiny(model=kind)
    net.net.head.weight.data.mul_(3)

    counts = []
    for temperature in (0.05, 9.0):
        rows, _ = models.sample_rows(net, nothing_given(500), 4, seed=0, temperature=temperature)
        counts.append(sum(torch.bincount(column).max() for column in rows.T))

    # of the most frequent token at each position
    assert counts[0] > 2 * counts[1]


# -----------------------------------------------------------------------------
# The embedding diffusion


def diffuseq_loss_by_hand(net, tokens, given, t, seed):
    """The loss of EmbeddingDiffusion for each row, as the paper has it or ours."""
    rng = generator(seed)
    E = net.net.embed
    embedded = E[tokens]
    x = embedded + 0.121 * torch.randn(embedded.shape, generator=rng)
    a, b = models.noise_level(t[:, None, None])
    x_t = a * x + b * torch.randn(x.shape, generator=rng)
    known = (given >= 0)[..., None]
    x_t = torch.where(known, x if net.config.all_positions else embedded, x_t)
    prediction = net.predict(x_t, given, t)
    losses = []
    for i in range(len(tokens)):
        generated = given[i] < 0
        counted = slice(None) if net.config.all_positions else generated
        error = (prediction[i] - x[i]).square().mean(-1)[counted].mean()
        rounding = cross_entropy(x[i] @ E.T + net.bias, tokens[i])
        logits = (prediction[i] @ E.T + net.bias)[generated]
        anchor = cross_entropy(logits, tokens[i, generated])
        losses.append(error + rounding + net.config.anchor * anchor)
    return torch.stack(losses)


@pytest.mark.parametrize('more', [
    {}, {'all_positions': True}, {'anchor': 0.1}, {'all_positions': True, 'anchor': 0.5}])
def test_loss_of_diffuseq_against_brute_force(more):
    """Terms over the wrong positions, or embeddings without the gradient that keeps them apart."""
    net = tiny(vocab=5, length=4, model='diffuseq', **more)
    tokens, given, t = rows_with_a_prompt()

    found = net.loss(tokens, given, t, generator(3))

    want = diffuseq_loss_by_hand(net, tokens, given, t, seed=3)
    weights = list(net.parameters())
    assert torch.allclose(found, want, atol=1e-5)
    gradients = torch.autograd.grad(found.mean(), weights)
    assert all_close(gradients, torch.autograd.grad(want.mean(), weights))


@pytest.mark.parametrize('step', [
    models.ddim_step,
    lambda x_s, x, s, t: models.ancestral_step(x_s, x, s, t, torch.randn_like(x_s)),
])
def test_strided_samplers_reach_the_modes_of_an_exact_teacher(step):
    """The noise level of a neighboring index where the stride's is needed."""
    x_t = torch.randn(2000)

    for s, t in torch.linspace(0, 1, 501).unfold(0, 2, 1):
        # data: -1 or 1, equally likely
        a, b = models.noise_level(s)
        x = torch.tanh(a * x_t / b ** 2)
        x_t = step(x_t, x, s, t)

    assert (x.abs() > 0.95).float().mean() >= 0.95
    assert abs((x > 0).float().mean() - 0.5) < 0.05


def test_steps_keep_the_distribution_of_x_t():
    """Noise levels of two times mixed, or fresh noise for another stride than the step's."""
    s = torch.tensor(0.3)
    t = torch.tensor(0.6)
    a_s, b_s = models.noise_level(s)
    a_t, b_t = models.noise_level(t)
    x = torch.full((400_000,), 2.0)
    noise, fresh = torch.randn(2, 400_000)
    x_s = a_s * x + b_s * noise

    ancestral = models.ancestral_step(x_s, x, s, t, fresh)

    assert abs(ancestral.mean() - 2 * a_t) < 0.005
    assert abs(ancestral.std() - b_t) < 0.005
    # ddim keeps the noise itself
    assert torch.allclose(models.ddim_step(x_s, x, s, t), a_t * x + b_t * noise, atol=1e-5)


@torch.no_grad()
def test_clamp_is_to_the_nearest_embedding():
    """The embedding with the largest product, which is a long one."""
    net = tiny(vocab=50, model='diffuseq')
    E = net.net.embed
    E.mul_(torch.linspace(0.2, 3, 50)[:, None])
    x = torch.randn(4, 6, 32)

    found = net.nearest(x)

    distance = (x[:, :, None] - E).square().sum(-1)
    assert torch.equal(found, E[distance.argmin(-1)])


def test_shared_noise_is_the_same_at_all_positions():
    """An option that does nothing."""
    given = nothing_given(4)
    shared, separate = [tiny(model='diffuseq', calls=1, shared_noise=x) for x in (True, False)]

    assert shared.initial_noise(given).var(1).max() < 1e-9
    assert shared.initial_noise(given).var(0).min() > 1e-3
    assert separate.initial_noise(given).var(1).min() > 1e-3


# -----------------------------------------------------------------------------
# Score distillation


def gaussian_toy():
    """A student N(theta, 0.49) of data N(1, 1) in one channel: theta, x, and both predictions."""
    n, z = torch.randn(2, 400_000, 1, 1, dtype=DOUBLE)
    a, b = 0.6, 0.8
    theta = torch.tensor(-0.5, dtype=DOUBLE, requires_grad=True)
    x = theta + 0.7 * n
    x_t = a * x + b * z

    def prediction(mean, variance):
        # E[x | x_t] for x ~ N(mean, variance)
        return mean + a * variance / (a * a * variance + b * b) * (x_t - a * mean)

    return theta, x, prediction(1.0, 1.0), prediction(theta.detach(), 0.49)


def slope(loss, theta):
    return torch.autograd.grad(loss.mean(), theta, retain_graph=True)[0].item()


def test_sid_has_half_the_fisher_gradient_on_a_gaussian():
    """A student driven elsewhere than to the data; away from it where x is detached."""
    theta, x, teacher_x, fake_x = gaussian_toy()

    found = slope(distill.sid_loss(x, teacher_x, fake_x, 0.5), theta)

    # of E|teacher_x - fake_x|^2
    fisher = -2 * (1 - theta.item()) * (1 - 0.36 / (0.36 + 0.64)) ** 2
    assert abs(found - fisher / 2) < 0.01
    assert slope(distill.sid_loss(x.detach(), teacher_x, fake_x, 0.5), theta) > 0


@pytest.mark.parametrize('alpha', [0.5, 1.0, 1.2])
def test_value_of_sid(alpha):
    """Alpha at the wrong term: the mean is (1 - alpha) of the squared gap."""
    _, x, teacher_x, fake_x = gaussian_toy()

    found = distill.sid_loss(x, teacher_x, fake_x, alpha).mean()

    assert abs(found - (1 - alpha) * (teacher_x - fake_x).square().mean()) < 0.01


def test_dmd_drives_the_student_to_the_data():
    """The sign of DMD's gradient, or a gradient through the denoisers."""
    theta, x, teacher_x, fake_x = gaussian_toy()

    found = slope(distill.dmd_loss(x, teacher_x, fake_x), theta)

    assert found < 0
    assert found == pytest.approx((fake_x - teacher_x).mean().item())


def score_distillation(*words):
    """The objective with its networks, and rows to learn from."""
    teacher = tiny(model='diffuseq').requires_grad_(False)
    words = ('--lr', 0.003, *words)
    student = student_of('score', teacher, *words)
    o = options(distill, 'score', *words)
    objective = distill.ScoreDistillation(student, teacher, None, o)
    tokens = torch.randint(8, (16, 6))
    given = torch.where(torch.arange(6) < 2, tokens, -1)
    return objective, tokens, given


def copy_of(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize('words', [(), ('--adversarial', 0.1), ('--loss', 'dmd')])
def test_who_learns_in_score_distillation(words):
    """A teacher that learns from its student, or a fake pulled along by the student's loss."""
    objective, tokens, given = score_distillation(*words)
    student = objective.student
    teacher = copy_of(objective.teacher)
    fake = copy_of(objective.fake)

    objective.update_fake(student.embedded(tokens), given, generator())
    updated = copy_of(objective.fake)
    loss, _ = objective.student_loss(student.embedded(tokens), given, generator())
    loss.backward(inputs=[p for p in student.parameters() if p.requires_grad])

    for name, p in objective.teacher.named_parameters():
        assert torch.equal(p, teacher[name])
    for name, p in objective.fake.named_parameters():
        assert torch.equal(p, updated[name])
    kept = [name for name, p in fake.items() if torch.equal(p, updated[name])]
    unused = [] if '--adversarial' in words else ['discriminator.bias', 'discriminator.weight']
    assert sorted(kept) == sorted([*unused, 'model.bias', 'model.net.embed'])
    idle = [name for name, p in student.named_parameters() if p.grad is None]
    assert sorted(idle) == ['bias', 'net.embed']
    assert student.net.head.weight.grad.abs().sum() > 0


def test_score_distillation_is_the_same_compiled(monkeypatch):
    """A fake score network whose discriminator sees nothing, once it is compiled."""
    compiler = functools.partial(torch.compile, backend='eager')
    monkeypatch.setattr(torch, 'compile', compiler)
    found = []
    for compiled in (False, True):
        objective, tokens, given = score_distillation('--adversarial', 0.1,
                                                      '--fake-updates', 3)
        networks = [objective.student, objective.teacher, *objective.modules().values()]
        o = Namespace(compile=compiled)
        train_teacher.compile_on_gpu(o, torch.device('cuda'), networks)

        loss, seen = objective(tokens, given, [], generator())
        trained = [p for p in objective.student.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, trained)
        found.append([loss, seen['fake_error'], *gradients, *objective.fake.parameters()])
        steps = {state['step'].item() for state in objective.own_optimizers[0].state.values()}
        assert steps == {3}

    assert all_close(*found)


def test_the_discriminator_learns_to_tell_generated_rows():
    """A discriminator that is never trained, or trained to take one for the other."""
    objective, tokens, given = score_distillation('--adversarial', 0.1)
    student = objective.student
    clean = student.embedded(tokens)
    x = student.generate(student.initial_noise(given), given).detach()
    t = torch.full((16,), 0.8)

    gaps = []
    for _ in range(40):
        _, real = objective.fake(student.q_sample(clean, clean, given, t), given, t)
        _, fake = objective.fake(student.q_sample(x, clean, given, t), given, t)
        gaps.append((real - fake).mean().item())
        objective.update_fake(clean, given, generator())

    assert gaps[-1] > gaps[0] + 0.5


@torch.no_grad()
def test_the_student_is_to_look_real():
    """The sign of the adversarial term, or a weight that does nothing."""
    objective, tokens, given = score_distillation('--adversarial', 0.5)
    clean = objective.student.embedded(tokens)

    losses = []
    for weight, logit in ((0.0, 0.0), (0.5, -2.0), (0.5, 2.0)):
        objective.o.adversarial = weight
        objective.fake.discriminator.weight.zero_()
        objective.fake.discriminator.bias.fill_(logit)
        losses.append(objective.student_loss(clean, given, generator())[0].item())

    # 0.5 softplus(-logit)
    assert losses[1] - losses[0] == pytest.approx(0.5 * math.log1p(math.exp(2)), abs=1e-4)
    assert losses[2] - losses[0] == pytest.approx(0.5 * math.log1p(math.exp(-2)), abs=1e-4)


# -----------------------------------------------------------------------------
# Refining


def test_refining_learns_the_noise_whose_text_is_least_certain():
    """The easiest of several noises, on which nothing is left to learn."""
    student = tiny(model='diffuseq', calls=1)
    given = nothing_given(20)
    o = options(distill, 'refine', '--candidates', 4)
    objective = distill.Refinement(student, tiny(model='diffuseq', seed=1), student, o)

    found = objective.least_certain_noise(given, generator())

    rng = generator()
    noises = torch.stack([student.initial_noise(given, rng) for _ in range(4)])
    certainty = []
    for x_t in noises:
        log_p = student.rounding_logits(student.generate(x_t, given)).log_softmax(-1)
        certainty.append(log_p.amax(-1).mean(1))
    least = torch.stack(certainty).argmin(0)
    assert torch.equal(found, noises[least, torch.arange(20)])


# -----------------------------------------------------------------------------
# Time pairs and batches


@pytest.mark.parametrize('consistency', [False, True])
@pytest.mark.parametrize('n, diagonal, boundary, numbers', [
    (512, 0.5, 1 / 32, [256, 8, 248]),
    (4, 0.5, 1 / 32, [2, 1, 1]),
    (8, 0.25, 0.5, [2, 3, 3]),
    (8, 0.5, 0.0, [4, 0, 4]),
    (8, 0.0, 1.0, [0, 8, 0]),
    (8, 1.0, 0.5, [8, 0, 0]),
    (1, 0.0, 0.1, [0, 1, 0]),
])
def test_fractions_of_time_pairs(n, diagonal, boundary, numbers, consistency):
    """No row at (0, 1), the only jump that one call needs, or rows of another kind than said."""
    s, t, kind = distill.time_pairs(n, diagonal, boundary, consistency, generator())

    assert torch.bincount(kind, minlength=3).tolist() == numbers
    assert torch.equal(kind, kind.sort().values)
    assert torch.equal(s[kind == 0], t[kind == 0])
    assert (s[kind == 1] == 0).all()
    assert (t[kind == 1] == 1).all()
    # those on the diagonal are stratified
    strata = (s[kind == 0] * numbers[0]).long()
    assert strata.sort().values.tolist() == list(range(numbers[0]))


def test_distribution_of_time_pairs():
    """Jumps of another distribution than the paper's: lengths uniform, then starts uniform."""
    s, t, _ = distill.time_pairs(100_000, 0.0, 0.0, False, generator())

    length = t - s
    start = s / (1 - length)
    levels = torch.linspace(0.1, 0.9, 9)
    assert (length.quantile(levels) - levels).abs().max() < 0.01
    assert (start.quantile(levels) - levels).abs().max() < 0.01
    assert torch.corrcoef(torch.stack([length, start]))[0, 1].abs() < 0.02
    assert s.min() >= 0
    assert t.max() <= 1


def test_jumps_of_a_consistency_model():
    """A jump that its sampler never makes, or starts that it is asked for and has not learned."""
    s, t, _ = distill.time_pairs(100_000, 0.0, 0.0, True, generator())

    levels = torch.linspace(0.1, 0.9, 9)
    assert (s.quantile(levels) - levels).abs().max() < 0.01
    assert (t == 1).all()


class Recorder(train_teacher.Objective):
    """An objective that takes note of the rows it is asked for."""

    def __init__(self):
        self.kinds = []
        self.seeds = []
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def __call__(self, tokens, given, times, rng):
        self.kinds.append(torch.bincount(times[2], minlength=3).tolist())
        self.seeds.append(rng.initial_seed())
        value = self.weight + tokens.float().mean()
        return value, {'bins': train_teacher.sum_and_count(tokens[:, 0], tokens[:, 0] % 2, 2)}


@pytest.mark.parametrize('parts', [1, 2, 4, 8])
def test_micro_batches_see_all_kinds_of_rows_and_count_alike(parts):
    """1/4 of rows at (0, 1) for 1/32, or the same noise, as soon as a batch is split."""
    objective = Recorder()
    means = train_teacher.Means()
    tokens = torch.arange(512)[:, None].expand(-1, 6)
    batch = [tokens, tokens, distill.time_pairs(512, 0.5, 1 / 32, False, generator())]
    run = Namespace(rank=0, world=1, micro_batches=parts, device=CPU)

    for it in (0, 1):
        train_teacher.backward(objective, [objective.weight], it, batch, run, Namespace(seed=0),
                               means)

    assert objective.kinds == [[256 // parts, 8 // parts, 248 // parts]] * 2 * parts
    assert len(set(objective.seeds)) == 2 * parts
    # the mean over the batch, twice
    assert objective.weight.grad == 2
    assert means.record() == {'loss': pytest.approx(255.5), 'bins': [255, 256]}


def test_means_of_a_checkpoint_go_on_where_the_run_does():
    """Means that were saved on a CPU, and a run that continues on a GPU."""
    kept = {'loss': torch.tensor([3.0, 2.0])}

    means = train_teacher.Means(kept, 'meta')
    means.add({'loss': torch.ones(2, device='meta')})

    assert means.sums['loss'].device.type == 'meta'
    assert kept['loss'].tolist() == [3, 2]


def some_rows(n, kind='rows', pairs=False, fraction=0.0, ids=None):
    """Tokens and given of rows of 8 that are cut from 0, 1, 2, ..."""
    special = {'<eos>': 996, '<pad>': 997, '<sep>': 998, '<bos>': 999}
    meta = {'length': 8, 'kind': kind, 'pairs': pairs, 'special': special}
    ids = np.arange(800, dtype=np.uint16) if ids is None else ids
    return train_teacher.get_batch(ids, meta, n, fraction, generator(), CPU)


@pytest.mark.parametrize('kind, stride', [('rows', 8), ('stream', 1)])
def test_batches_are_cut_where_rows_begin(kind, stride):
    """Rows shifted against each other, or the last row of the data never seen."""
    tokens, _ = some_rows(5000, kind)

    assert torch.equal(tokens - tokens[:, :1], torch.arange(8).expand(5000, 8))
    assert (tokens[:, 0] % stride == 0).all()
    assert len(tokens[:, 0].unique()) > 0.9 * 800 / stride
    assert tokens[:, 0].min() == 0
    assert tokens[:, 0].max() == 792
    assert torch.equal(tokens, some_rows(5000, kind)[0])


@pytest.mark.parametrize('fraction', [0.0, 0.1, 1.0])
def test_fraction_of_rows_with_given_tokens(fraction):
    """Prompts in all rows or in none, or given tokens that are others than the row's."""
    tokens, given = some_rows(4000, fraction=fraction)

    known = given >= 0
    assert torch.equal(given[known], tokens[known])
    assert (given[~known] == -1).all()
    if fraction == 0:
        assert not known.any()
        return
    # every eighth prefix, and some scattered sets, are empty
    rows = known.any(1)
    assert 0.8 * fraction < rows.float().mean() <= fraction * 1.1
    prefixes = known[rows].long().diff(dim=1).max(1).values <= 0
    assert 0.4 < prefixes.float().mean() < 0.7
    # where everything is given nothing is learned
    assert known.all(1).float().mean() < 0.06 * fraction


def test_sources_of_pairs_are_given():
    """A source without its <sep>, or given up to a later one."""
    sep = 998
    row = np.array([5, 6, sep, 997, 7, sep, 8, 996])
    rows = np.stack([row, row[::-1], np.roll(row, 2)])

    tokens, given = some_rows(50, pairs=True, fraction=1.0, ids=rows.flatten().astype(np.uint16))

    for row, source in zip(tokens.tolist(), given.tolist()):
        n = row.index(sep) + 1
        assert source == row[:n] + [-1] * (8 - n)
    assert len(given[:, 0].unique()) == 3


# -----------------------------------------------------------------------------
# Presets

# the papers' own values: arXiv:2602.16813, 2210.08933, 2410.21035, 2404.04057
FLM = dict(
    layers=12, width=768, heads=12, channels=768, network='paper', hidden_input=False, dropout=0.1,
    reparam='paper', stagger=0.0, given=0.0, anchor=0.0, optimizer='adamw', lr=3e-4,
    beta2=0.999, clip=1.0, warmup=2500, decay=0.0, ema=0.9999, batch=512, iters=1_000_000)
DIFFUSEQ = {
    **FLM, 'network': 'ours', 'channels': 128, 'all_positions': True, 'lr': 1e-4, 'warmup': 0,
    'decay': 1.0, 'batch': 2048, 'iters': 50_000}
FMLM = dict(
    method='semigroup', noise_levels=0, diagonal=0.5, boundary=1 / 32, given=0.0, dropout=0.1,
    optimizer='adamw', lr=3e-4, beta2=0.95, clip=1.0, warmup=2500, decay=0.0, ema=0.9999,
    batch=512, iters=100_000)
SDTT = dict(
    rounds=7, final_calls=8, given=0.0, dropout=0.1, optimizer='adamw', lr=6e-5, beta2=0.999,
    warmup=500, decay=0.0, ema=0.9999, batch=128, iters=70_000)
SID = dict(
    loss='sid', alpha=1.0, fake_updates=1, adversarial=0.0, shared_noise=False, lr=1e-5, clip=0.0,
    warmup=0, decay=0.0, ema=0.9999)


@pytest.mark.parametrize('stories', [False, True])
@pytest.mark.parametrize('script, kind, values', [
    (train_teacher, 'flm', FLM), (train_teacher, 'mdlm', {**FLM, 'network': 'ours'}),
    (train_teacher, 'ar', {**FLM, 'network': 'ours'}), (train_teacher, 'diffuseq', DIFFUSEQ),
    (distill, 'flow map', FMLM), (distill, 'score', SID), (distill, 'masked', SDTT)])
def test_preset_of_the_papers(script, kind, values, stories):
    """"The paper's settings" that are not the paper's."""
    settings = script.preset('paper', kind, stories)

    assert {name: settings[name] for name in values} == values


@pytest.mark.parametrize('machine', ['laptop', 'gpu', 'paper'])
@pytest.mark.parametrize('script, kind', [
    *[(train_teacher, kind) for kind in ('flm', 'diffuseq', 'mdlm', 'ar')],
    *[(distill, kind) for kind in ('flow map', 'score', 'refine', 'masked')]])
def test_every_option_overrides_a_preset(script, kind, machine):
    """A 0 or a no that counts as left out, or an option that no preset fills in."""
    settings = script.preset(machine, kind, stories=False)

    for name in settings:
        o = script.parse([])
        assert getattr(o, name) is None
        setattr(o, name, 0)
        train_teacher.fill_in(o, settings)
        assert getattr(o, name) == 0
        # one of them counts, and not what the preset says of the other
        assert (o.iters is None) != (o.minutes is None)

    empty = {name for name, value in vars(o).items() if value is None}
    of_others = {name for name, kinds in script.ONLY_FOR.items() if kind not in kinds}
    assert empty - of_others <= {'preset', 'iters', 'minutes'}


@pytest.mark.parametrize('device, machine', [('cpu', 'laptop'), ('mps', 'laptop'), ('cuda', 'gpu')])
@pytest.mark.parametrize('tokenizer, stagger', [('stories', 3), ('dates', 0), ('byte', 0)])
def test_settings_follow_the_machine_and_the_data(device, machine, tokenizer, stagger):
    """Settings of one grammar for real text, or years of training on a laptop, unasked."""
    stories = train_teacher.is_stories({'tokenizer': {'name': tokenizer}})

    assert train_teacher.default_machine(torch.device(device)) == machine
    assert train_teacher.preset(machine, 'flm', stories)['stagger'] == stagger
    assert train_teacher.preset(machine, 'flm', stories)['minutes'] <= 15
    assert distill.preset(machine, 'flow map', stories)['minutes'] <= 15


# -----------------------------------------------------------------------------
# Runs of the real scripts on a dozen rows: six dates in two forms each


def run_main(script, *words):
    """A script's main() with a command line, on the CPU."""
    script.main(script.parse([str(word) for word in ('--device', 'cpu', *words)]))


# a model that trains in no time
SMALL = ('--layers', 1, '--width', 32, '--heads', 2, '--channels', 8, '--batch', 4)


def write_dates(folder, days, length=23):
    """A data set of dates, the same rows for training and validation."""
    texts = []
    for pair in prepare_data.dates()[::97]:
        texts += pair
    spec = prepare_data.make_tokenizer('dates', texts)
    pairs = []
    for day in days:
        forms = prepare_data.date_forms(day)
        pairs += [(day, forms[1]), (day, forms[6])]
    rows, _ = prepare_data.pack_rows(prepare_data.make_encoding(spec), pairs, length)
    prepare_data.save_dataset(folder, rows, rows, spec, kind='rows', pairs=True, length=length,
                              source='test')


def write_bytes(folder, length=23):
    """A data set of another tokenizer."""
    spec = prepare_data.make_tokenizer('byte', [])
    ids = np.arange(20 * length) % 256
    prepare_data.save_dataset(folder, ids, ids, spec, kind='stream', pairs=False, length=length,
                              source='test')


@pytest.fixture(scope='module')
def dozen(tmp_path_factory):
    """A folder with the dozen rows in `data`, and with other data beside it."""
    folder = tmp_path_factory.mktemp('dozen')
    days = ['1987-03-23', '2001-12-04', '1912-08-30', '2076-10-15', '1944-06-11', '2033-01-27']
    write_dates(folder / 'data', days)
    write_dates(folder / 'other-days', days[::-1])
    write_bytes(folder / 'bytes')
    return folder


@pytest.fixture(scope='module')
def small(dozen):
    """Teachers and students that have hardly been trained, by the name of their folder."""
    folder = dozen / 'small'
    data = ('--data', dozen / 'data', *SMALL, '--iters', 2)
    few = ('--batch', 4, '--iters', 2)
    run_main(train_teacher, '--out', folder / 'flow/teacher', *data)
    run_main(distill, folder / 'flow/teacher', *few, '--rollout', 2)
    run_main(train_teacher, '--out', folder / 'another/teacher', *data, '--seed', 1)
    for kind in ('diffuseq', 'mdlm', 'ar'):
        run_main(train_teacher, '--model', kind, '--out', folder / kind / 'teacher', *data)
    for kind in ('diffuseq', 'mdlm'):
        run_main(distill, folder / kind / 'teacher', *few)
    run_main(distill, folder / 'diffuseq/teacher', *few, '--reference',
             folder / 'diffuseq/student')
    return folder


def commands(dozen, small):
    """A command of each script, by its name."""
    return {'teacher': (train_teacher, '--data', dozen / 'data', *SMALL),
            'student': (distill, small / 'flow/teacher', '--batch', 4, '--rollout', 2)}


BOTH = pytest.mark.parametrize('name', ['teacher', 'student'])


def tensors(folder):
    """All that a checkpoint holds, as bytes: weights, average, optimizers, counts."""
    with zipfile.ZipFile(folder / 'model.pt') as z:
        return [z.read(name) for name in z.namelist() if '/data/' in name]


def files_in(folder):
    """What is on the disk: every file, its size, and when it was written."""
    files = [(path, path.stat()) for path in folder.rglob('*') if path.is_file()]
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in files}


def valid_fraction(folder, path):
    """The fraction of 480 texts, written in one call, that are right."""
    meta, train, _ = prepare_data.load_dataset(folder / 'data')
    rows = torch.from_numpy(prepare_data.as_rows(train, 23)).repeat(40, 1)
    given = train_teacher.up_to(rows, meta, '<sep>')
    net, _ = models.load(folder / path)
    written, _ = models.sample_rows(net, given, 1, seed=0)
    return prepare_data.sanity_metrics(written, meta)['valid']


def test_overfit_a_dozen_rows_in_one_call(dozen):
    """Anything at all that keeps a teacher or a student from learning."""
    run_main(train_teacher, '--data', dozen / 'data', '--out', dozen / 'over/teacher',
             '--iters', 150, '--layers', 2, '--heads', 4, '--width', 64, '--channels', 2,
             '--reparam', 'paper', '--batch', 32, '--evals', 1)
    run_main(distill, dozen / 'over/teacher', '--iters', 180, '--rollout', 4, '--lr', 4e-3,
             '--muon-lr', 0.03, '--batch', 32, '--evals', 1)

    before = valid_fraction(dozen, 'over/teacher')
    after = valid_fraction(dozen, 'over/student')
    assert after >= max(0.75, before + 0.2), (before, after)


def test_a_model_of_the_papers_network_is_trained_and_distilled(dozen, tmp_path):
    """The paper's preset that ends in a checkpoint which nothing can load."""
    few = ('--preset', 'paper', '--batch', 4, '--iters', 2, '--evals', 1)
    run_main(train_teacher, '--data', dozen / 'data', '--out', tmp_path / 'teacher', *few,
             '--layers', 1, '--width', 64, '--channels', 64, '--heads', 2)
    run_main(distill, tmp_path / 'teacher', *few)

    student, ckpt = models.load(tmp_path / 'student')

    # more channels than tokens
    assert (student.config.network, student.config.vocab) == ('paper', 48)
    assert (ckpt['options']['method'], student.config.noise_levels) == ('semigroup', 0)


def stop_at_20(monkeypatch):
    """Let a run get SIGTERM in its 20th iteration; returns a list that has all of them."""
    seen = []
    update = train_teacher.update

    def stopping(*words):
        if len(seen) == 19:
            os.kill(os.getpid(), signal.SIGTERM)
        seen.append(1)
        return update(*words)

    monkeypatch.setattr(train_teacher, 'update', stopping)
    return seen


def pass_time(patch, update=1 / 64, targets=1 / 64):
    """Let --minutes see a clock that each update and each call for targets moves by so much."""
    now = [0.0]

    def slow(function, seconds):
        def passing(*words):
            now[0] += seconds
            return function(*words)

        return passing

    patch(train_teacher, 'update', slow(train_teacher.update, update))
    patch(distill.FlowMap, 'targets', slow(distill.FlowMap.targets, targets))
    for script in (train_teacher, distill):
        patch(script, 'time', Namespace(perf_counter=lambda: now[0], time=time.time))


# the first one is long enough for a record of a hundred iterations
@pytest.mark.parametrize('script, words', [
    (train_teacher, ('--data', 'data', *SMALL, '--dropout', 0.1, '--iters', 110)),
    (distill, ('small/flow/teacher', '--iters', 24, '--method', 'lagrangian', '--dropout', 0.1)),
    (distill, ('small/flow/teacher', '--iters', 24, '--rollout', 2, '--reuse', 2)),
    (train_teacher,
     ('--data', 'data', *SMALL, '--model', 'diffuseq', '--dropout', 0.1, '--iters', 24)),
    (distill,
     ('small/diffuseq/teacher', '--adversarial', 0.1, '--dropout', 0.1, '--iters', 24)),
    (distill,
     ('small/diffuseq/teacher', '--reference', 'small/diffuseq/student', '--iters', 24)),
    (distill, ('small/mdlm/teacher', '--rounds', 3, '--iters', 24)),
    (train_teacher, ('--data', 'data', *SMALL, '--minutes', 0.01)),
    (distill, ('small/flow/teacher', '--rollout', 2, '--reuse', 5, '--minutes', 0.01)),
    # fewer iterations are to make targets than it takes to know how many
    (distill, ('small/flow/teacher', '--rollout', 2, '--reuse', 10, '--minutes', 0.01)),
])
def test_a_stopped_and_resumed_run_is_the_one_never_stopped(
        dozen, small, tmp_path, monkeypatch, script, words):
    """A stop, or a look at a run, that costs it its noise, its targets, its optimizer or time."""
    monkeypatch.chdir(dozen)
    pass_time(monkeypatch.setattr)
    words = (*words, '--batch', 4)
    run_main(script, '--out', tmp_path / 'a', '--evals', 1, *words)
    seen = stop_at_20(monkeypatch)

    run_main(script, '--out', tmp_path / 'b', '--evals', 2, *words)
    stopped_at = models.load(tmp_path / 'b')[1]['iter']
    run_main(script, '--out', tmp_path / 'b', '--evals', 2, '--resume', *words)

    assert stopped_at == 20
    assert len(seen) == models.load(tmp_path / 'a')[1]['iter']
    assert tensors(tmp_path / 'a') == tensors(tmp_path / 'b')
    # at the same seconds, too
    losses = [[line for line in open(tmp_path / name / 'log.jsonl') if '"loss"' in line]
              for name in 'ab']
    assert losses[0] == losses[1]
    assert len(losses[0]) == len(seen) // 100


@pytest.mark.parametrize('start, first, each, known, more', [
    # 60 s; in the first 10 s 25 iterations, the last 20 of them in 5 s
    (0, 4.0, 0.25, 25, 188),
    (1000, 4.0, 0.25, 25, 188),
    # the first one, which compiles, takes more than a fifth of the time, or more than all of it
    (0, 13.0, 0.25, 25, 152),
    (0, 100.0, 0.25, 25, 1),
    # two take a tenth of the time
    (0, 4.0, 4.0, 7, 7),
])
def test_minutes_become_iterations(monkeypatch, start, first, each, known, more):
    """Compiling counted as learning, or a run that is ten times as long as it was to be."""
    now = 0.0
    monkeypatch.setattr(train_teacher, 'time', Namespace(perf_counter=lambda: now))
    clock = train_teacher.Clock(1, start, CPU)

    for it in itertools.count(start):
        iters = clock.iters(it, train_teacher.Objective())
        if iters:
            break
        now += first if it == start else each

    assert it == start + known
    assert iters == start + known + more


@pytest.mark.parametrize('left, seconds, caches, more', [
    # (47 - 288 * 0.15) / 0.1 = 38, and 38 + 25 is a fifth of 288 + 25
    (47, [0.1] * 25, 1, 288), (47, [0.05] * 50, 2, 288), (47, [9.0] * 5 + [0.1] * 20, 1, 288),
    # no more are needed
    (1, [0.1] * 25, 1, 6),
    # there is no cache
    (47, [], 0, 188)])
def test_minutes_count_the_cached_targets(left, seconds, caches, more):
    """A student that is done in a third of its time, as only its first iterations are slow."""
    objective = flow_map('--reuse', 5)
    objective.seconds = seconds
    objective.caches = {i: distill.TargetCache() for i in range(caches)}

    # 0.15 s to learn, and 0.1 s for the targets of one in five
    assert objective.iters_in(left, 0.25) == more


@pytest.mark.parametrize('start, it, seconds, left', [
    # 100 of 1,000 iterations, and half of the 200 that make targets: 900 to learn, 100 to make
    (0, 100, 25.0, 145.0),
    (0, 600, 110.0, 60.0),
    # after --resume: 50 that make targets, or none
    (50, 100, 12.5, 145.0),
    (500, 600, 15.0, 60.0)])
def test_the_time_left_counts_the_cached_targets(start, it, seconds, left):
    """A line that says 35 minutes in a run of 15."""
    objective = flow_map('--reuse', 5)
    objective.seconds = [0.1]
    objective.caches = {0: distill.TargetCache()}
    objective.before(it - 1, 1000, None, None)

    # 0.15 s to learn, and 0.1 s for targets
    assert objective.seconds_left(start, it, 1000, seconds) == pytest.approx(left)
    objective.seconds = []
    assert objective.seconds_left(start, it, 1000, seconds) == pytest.approx(
        seconds / (it - start) * (1000 - it))


def test_the_log_has_the_mean_loss_since_the_last_record(dozen, tmp_path, monkeypatch):
    """A loss that falls slower and slower, because it is the mean since the start."""
    losses = itertools.count()
    loss = models.OneHotFlow.loss
    monkeypatch.setattr(models.OneHotFlow, 'loss', lambda *words: loss(*words) * 0 + next(losses))

    run_main(train_teacher, '--data', dozen / 'data', *SMALL, '--out', tmp_path, '--iters', 200,
             '--reparam', 'paper', '--evals', 1)

    seen = [json.loads(line) for line in open(tmp_path / 'log.jsonl')]
    assert [(x['iter'], x['loss']) for x in seen if 'loss' in x] == [(100, 49.5), (200, 149.5)]


# -----------------------------------------------------------------------------
# What may happen to a run


def process(target, *args):
    """A started process that has torch in it already, so that it is at work soon."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([__name__, 'torch._dynamo'])
    child = context.Process(target=target, args=args)
    child.start()
    return child


def as_command(name, words, out=os.devnull, err=os.devnull, **environment):
    """What such a process does: a script as its command line runs it, printing to these files."""
    os.environ.update(environment)
    # ignored where these tests run under nohup
    if hasattr(signal, 'SIGHUP'):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout = open(1, 'w', closefd=False)
    sys.argv = [f'{name}.py']
    script = sys.modules[name]
    o = script.parse([str(word) for word in ('--device', 'cpu', *words)])
    prepare_data.run_script(lambda: script.main(o))


def start_in(world, script, *words, target=as_command, **how):
    """A script in several processes, as torchrun would start them; in one, without."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    children = []
    for rank in range(world):
        if world > 1:
            how.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                       MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        children.append(process(functools.partial(target, **how), script.__name__, words))
    return children


def newest_save(path):
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.parametrize('n', [3, pytest.param(25, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment(dozen, tmp_path, n):
    """Half a checkpoint, half a record of the log, or temporary files that pile up."""
    rng = random.Random(0)
    path = tmp_path / 'out/model.pt'
    last = 0
    for _ in range(n):
        saved = newest_save(path)
        more = ['--resume'] if last else []
        # a save in every second iteration
        child, = start_in(1, train_teacher, '--data', dozen / 'data', '--out', tmp_path / 'out',
                          *SMALL, '--iters', 10 ** 6, '--evals', 500_000, *more)
        while child.is_alive() and newest_save(path) == saved:
            time.sleep(0.1)
        time.sleep((2 if n > 3 else 0.5) * rng.random())
        child.kill()
        child.join()

        # every record is whole, every save is further than the one before
        for line in open(tmp_path / 'out/log.jsonl'):
            json.loads(line)
        before = last
        last = models.load(path)[1]['iter']
        assert last > before
        # one temporary file at most
        assert len(list(path.parent.iterdir())) <= 3


@pytest.mark.parametrize('n', [12, pytest.param(200, marks=pytest.mark.slow)])
def test_damage_of_a_checkpoint_is_noticed(small, tmp_path, n):
    """A bit that has flipped, distilled or sampled from in silence."""
    rng = random.Random(0)
    path = tmp_path / 'model.pt'
    whole = (small / 'flow/teacher/model.pt').read_bytes()
    for i in range(n):
        at = rng.randrange(len(whole))
        flipped = whole[:at] + bytes([whole[at] ^ 1 << i % 8]) + whole[at + 1:]
        zeros = whole[:at] + bytes(64) + whole[at + 64:]
        path.write_bytes([whole[:at], flipped, zeros][i % 3])
        try:
            models.load(path)
            # a bit of no importance may differ, if the tensors do not
            assert tensors(tmp_path) == tensors(small / 'flow/teacher')
        except SystemExit as end:
            assert end.code == 2


def refusal(capfd, script, *words):
    """The one line on stderr with which a command is refused."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        run_main(script, *words)
    err = capfd.readouterr().err
    assert end.value.code == 2, err
    assert (err.count('\n'), err[-1]) == (1, '\n'), err
    return err


def failing(error):
    def fails(*args, **how):
        raise error
    return fails


def nan_loss(objective, tokens, given, times, rng):
    """A loss that is not finite, while its gradient is."""
    return objective.model.loss(tokens, given, times[0], rng).mean() + math.nan, {}


ENDS = [
    ('os.fsync', failing(OSError(28, 'No space left')), 'No space left; make room on the disk'),
    ('fcntl.lockf', failing(OSError(11, 'Busy')), 'another run writes there; wait for it'),
    ('torch.Tensor.backward', failing(MemoryError()), 'out of memory; '),
    ('torch.nn.utils.clip_grad_norm_', lambda *words: torch.tensor(math.nan), 'not finite'),
]


@pytest.mark.parametrize('name, where, instead, said', [
    *[('teacher', *end) for end in ENDS],
    *[('student', *end) for end in ENDS],
    ('teacher', 'train_teacher.TeacherLoss.__call__', nan_loss, 'not finite'),
])
def test_what_ends_a_run_leaves_the_last_save(
        dozen, small, tmp_path, monkeypatch, capfd, name, where, instead, said):
    """Half a file under the name of a whole one, nan saved over weights, or two runs in one."""
    pytest.importorskip(where.split('.')[0])
    script, *words = commands(dozen, small)[name]
    words = (*words, '--out', tmp_path, '--iters', 2, '--evals', 1)
    run_main(script, *words)
    before = tensors(tmp_path)
    monkeypatch.setattr(where, instead)

    with pytest.raises(SystemExit) as end:
        prepare_data.run_script(lambda: run_main(script, *words, '--overwrite'))

    assert end.value.code == 2
    assert said in capfd.readouterr().err
    assert tensors(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ['log.jsonl', 'model.pt']


def with_little_memory(name, words, err):
    """A script in a process that may have 1 GB more than it has."""
    # Windows lacks it
    import resource
    used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 10 ** 9, used + 10 ** 9))
    as_command(name, words, err=err)


@pytest.mark.skipif(sys.platform != 'linux', reason='limits of Linux')
@pytest.mark.parametrize('words', [('--batch', 10 ** 9), ('--width', 10 ** 5, '--heads', 1)])
def test_memory_that_is_full_is_one_line(dozen, tmp_path, words):
    """A traceback for a batch or a model that is too large for the machine."""
    words = ('--data', dozen / 'data', '--out', tmp_path / 'out', *words)

    child = process(with_little_memory, 'train_teacher', words, tmp_path / 'err')
    child.join()

    err = (tmp_path / 'err').read_text()
    assert child.exitcode == 2, err
    assert err.startswith('train_teacher.py: out of memory; ')
    assert err.count('\n') == 1


# -----------------------------------------------------------------------------
# Stopping, and a terminal that is gone


@pytest.mark.parametrize('evals', [1, 9])
@BOTH
def test_who_is_told_to_stop_saves_first(dozen, small, tmp_path, monkeypatch, capfd, name, evals):
    """Measuring between a signal and the save, or a second Ctrl-C that loses all."""
    script, *words = commands(dozen, small)[name]
    order = []
    save = train_teacher.save
    update = train_teacher.update

    def saving(*words, **how):
        os.kill(os.getpid(), signal.SIGINT)
        order.append('save')
        save(*words, **how)

    def stopping(*words):
        os.kill(os.getpid(), signal.SIGTERM)
        return update(*words)

    monkeypatch.setattr(train_teacher, 'save', saving)
    monkeypatch.setattr(train_teacher, 'update', stopping)
    for objective in (train_teacher.TeacherLoss, distill.Distillation):
        monkeypatch.setattr(objective, 'measure', lambda *words: order.append('measure'))

    run_main(script, '--out', tmp_path, '--iters', 9, '--evals', evals, *words)

    out, err = capfd.readouterr()
    assert order == (['save'] if evals == 1 else ['save', 'measure'])
    assert err.startswith('\nstopping after this iteration, saving ...\n')
    assert f'still saving; to lose it: kill -9 {os.getpid()}' in err
    assert 'stopped; the same command with --resume continues' in out
    assert models.load(tmp_path)[1]['iter'] == 1


def last_record(out):
    """The last iteration in log.jsonl, 0 where there is none yet."""
    path = out / 'log.jsonl'
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])['iter'] if lines else 0


def wait_for_a_record(children, out):
    """Wait until the log goes on."""
    before = last_record(out)
    while all(child.is_alive() for child in children) and last_record(out) == before:
        time.sleep(0.02)


@pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')
@pytest.mark.parametrize('n, world', [
    (1, 1), pytest.param(25, 1, marks=pytest.mark.slow),
    pytest.param(25, 2, marks=pytest.mark.slow)])
@pytest.mark.parametrize('number, stdout', [
    ('SIGINT', 'file'), ('SIGTERM', 'file'), ('SIGHUP', 'file'), ('SIGTERM', 'pipe'),
    ('SIGINT', '/dev/full')])
@BOTH
def test_a_stop_at_any_moment_loses_nothing(
        dozen, small, tmp_path, name, number, stdout, n, world):
    """Hours of training lost to a closed terminal, to `| head -1`, or to a full disk of the log."""
    script, *words = commands(dozen, small)[name]
    rng = random.Random(0)
    out = tmp_path / 'out'
    words = (*words, '--out', out, '--iters', 10 ** 6, '--evals', 1)
    words += ('--reuse', 0) if name == 'student' else ()
    last = 0
    for i in range(n):
        files = {'out': str(tmp_path / f'stdout-{i}'), 'err': str(tmp_path / f'stderr-{i}')}
        if stdout == 'pipe':
            os.mkfifo(files['out'])
        elif stdout == '/dev/full':
            files['out'] = stdout
        children = start_in(world, script, *words, *(['--resume'] if last else []), **files)
        if stdout == 'pipe':
            # head -1
            with open(files['out']) as reader:
                assert 'preset: ' in reader.readline()
        wait_for_a_record(children, out)
        time.sleep(rng.random() if n > 1 else 0)
        seen = last_record(out)

        os.kill(rng.choice(children).pid, getattr(signal, number))
        for child in children:
            child.join()

        assert [child.exitcode for child in children] == [0] * world
        _, ckpt = models.load(out)
        assert ckpt['iter'] >= max(seen, last + 1)
        last = ckpt['iter']
        said = [line for line in Path(files['err']).read_text().splitlines() if line]
        said.remove('stopping after this iteration, saving ...')
        assert [line[-21:] for line in said] == ['; going on without it'] * (stdout != 'file')
        if stdout == 'file':
            printed = Path(files['out']).read_text().splitlines()
            assert printed[-1] == 'stopped; the same command with --resume continues'


@pytest.mark.parametrize('name', train_teacher.Stopper.SIGNALS)
def test_any_signal_that_asks_to_end_is_heard(capfd, name):
    """Hours lost to Ctrl-\\, or to a scheduler that announces the end of a job in its own way."""
    if not hasattr(signal, name):
        pytest.skip(f'no {name}')
    # ignored where these tests run under nohup
    signal.signal(getattr(signal, name), signal.SIG_DFL)
    stopper = train_teacher.Stopper()
    assert not stopper.asked()

    signal.raise_signal(getattr(signal, name))

    assert stopper.asked()
    assert capfd.readouterr().err == '\nstopping after this iteration, saving ...\n'


@pytest.mark.skipif(not hasattr(signal, 'SIGHUP'), reason='no SIGHUP')
def test_nohup_is_respected():
    """A run that nohup started, and that ends with its terminal nevertheless."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    train_teacher.Stopper()

    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL


@pytest.mark.skipif(not hasattr(signal, 'SIGHUP'), reason='no shell')
@pytest.mark.parametrize('closed', ['>&-', '2>&-', '<&- >&- 2>&-'])
def test_closed_streams_cost_nothing(tmp_path, closed):
    """A traceback for a print that nobody could read, or a message in the middle of the data."""
    (tmp_path / 'rows.txt').write_text(''.join(f'row {i}\n' for i in range(50)))
    script = f'{shlex.quote(sys.executable)} {shlex.quote(str(HERE / "prepare_data.py"))}'

    done = subprocess.run(f'{script} mine --input rows.txt --rows --tokenizer byte {closed}',
                          shell=True, cwd=tmp_path, capture_output=True)

    assert (done.returncode, done.stderr) == (0, b'')
    meta, _, _ = prepare_data.load_dataset(tmp_path / 'data/mine')
    assert meta['source'] == 'rows.txt'


# -----------------------------------------------------------------------------
# What a run is: nothing is replaced or mixed in silence


@BOTH
def test_a_run_is_continued_or_replaced_as_asked(dozen, small, tmp_path, name):
    """A check so strict that a moved folder or a longer run cannot be resumed."""
    script, *words = commands(dozen, small)[name]
    shutil.copytree(dozen / 'data', tmp_path / 'data')
    shutil.copytree(small / 'flow/teacher', tmp_path / 'moved')
    out = tmp_path / 'out'
    run_main(script, *words, '--out', out, '--iters', 2)
    moved = ['--data', tmp_path / 'data', '--no-compile', '--preset', 'laptop', '--evals', 1]
    if name == 'student':
        words[0] = tmp_path / 'moved/model.pt'

    run_main(script, *words, *moved, '--out', out, '--iters', 4, '--resume')
    assert models.load(out)[1]['iter'] == 4
    run_main(script, *words, *moved, '--out', out, '--iters', 1, '--overwrite')
    assert models.load(out)[1]['iter'] == 1


# -----------------------------------------------------------------------------
# The log


def log_of(folder, start):
    """The iterations in log.jsonl after it was opened to go on from `start`."""
    train_teacher.open_log(folder, start).close()
    return [json.loads(line)['iter'] for line in open(folder / 'log.jsonl')]


@pytest.mark.parametrize('start, kept', [
    (0, []), (9, []), (10, [10]), (25, [10, 20]), (99, [10, 20, 30])])
def test_the_log_goes_on_where_the_checkpoint_is(tmp_path, start, kept):
    """Records after the last save twice in the log, or half a line in its middle."""
    lines = [json.dumps({'iter': it, 'seconds': 1.0, 'loss': 2.0}) for it in (10, 20, 30)]
    (tmp_path / 'log.jsonl').write_text('\n'.join(lines) + '\n{"iter": 40, "sec')

    assert log_of(tmp_path, start) == kept


@pytest.mark.parametrize('iters, said', [(1060, '5/1060'), (None, '5/?')])
def test_a_line_is_printed_every_ten_seconds(tmp_path, monkeypatch, capsys, iters, said):
    """Minutes without a word, because lines are counted in iterations."""
    now = 0.0
    monkeypatch.setattr(train_teacher, 'time', Namespace(perf_counter=lambda: now))
    log = train_teacher.Log(tmp_path, 0, 64, train_teacher.Objective().seconds_left)

    for it in range(60):
        now = float(it)
        log.progress(it, iters, lambda: torch.tensor(2.5))

    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split('/')[0]) for line in lines] == [5, 15, 25, 35, 45, 55]
    assert said in lines[0]
    assert all('loss 2.5' in line for line in lines)


# -----------------------------------------------------------------------------
# Checkpoints


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    """Weights in place of their average, a model in training mode, or a config that is lost."""
    net = tiny(calls=1, dropout=0.5).train()
    ema = tiny(calls=1, dropout=0.5, seed=1)

    models.save(tmp_path / 'model.pt', {'model': net, 'ema': ema}, iter=7, options={'lr': 0.1},
                note='\u00e9')
    loaded, ckpt = models.load(tmp_path)

    assert loaded.config == net.config
    assert not loaded.training
    for name, p in loaded.state_dict().items():
        assert torch.equal(p, ema.state_dict()[name])
        assert torch.equal(net.state_dict()[name], ckpt['model'][name])
    assert (ckpt['iter'], ckpt['options'], ckpt['note']) == (7, {'lr': 0.1}, '\u00e9')
    assert ckpt['config'] == asdict(net.config)
    assert [path.name for path in tmp_path.iterdir()] == ['model.pt']


class Evil:
    """When it is unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ('owned',)


@pytest.fixture(scope='module')
def bad(dozen, small):
    """A folder of files that are no checkpoints, or not the ones asked for; names say why."""
    folder = dozen / 'bad'
    folder.mkdir()
    good = torch.load(small / 'flow/teacher/model.pt', weights_only=True)
    for name, more in [
        ('format', {'format': models.FORMAT - 1}),
        ('evil', {'note': Evil()}),
        ('shape', {'config': {**good['config'], 'width': 64}}),
        ('unknown', {'config': {**good['config'], 'colour': 64}}),
    ]:
        torch.save({**good, **more}, folder / f'{name}.pt')
    torch.save({'format': models.FORMAT, 'ema': Evil()}, folder / 'evil-2.pt')
    torch.save([1, 2], folder / 'list.pt')
    (folder / 'empty.pt').write_text('')
    whole = (small / 'flow/teacher/model.pt').read_bytes()
    (folder / 'cut.pt').write_bytes(whole[:-99])
    (folder / 'folder.pt').mkdir()
    (folder / 'empty').mkdir()
    # what --export writes
    (folder / 'weights').mkdir()
    exported = {name: x for name, x in good.items() if name not in ('model', 'optimizers')}
    torch.save(exported, folder / 'weights/model.pt')
    # of another teacher, and one of the same that was trained again
    net, student = models.load(small / 'diffuseq/student')
    net.net.head.weight.data.add_(1)
    torch.save({**student, 'ema': net.state_dict()}, folder / 'again.pt')
    net.net.embed.data.add_(1)
    torch.save({**student, 'ema': net.state_dict()}, folder / 'stranger.pt')
    return folder


# -----------------------------------------------------------------------------
# Commands without a name take what was made last


def put_model(small, kind, at, seconds):
    """A copy of a model in out/, as if it was made at that time."""
    shutil.copytree(small / kind, Path('out') / at)
    os.utime(Path('out') / at / 'model.pt', (seconds, seconds))


def test_the_newest_teacher_is_distilled_wherever_it_lies(small, tmp_path, monkeypatch, capfd):
    """A baseline, a student, a damaged file or the first teacher ever, and not a word of it."""
    monkeypatch.chdir(tmp_path)
    assert 'first run: python train_teacher.py' in refusal(capfd, distill)
    put_model(small, 'mdlm/teacher', 'c', 10 ** 9 + 2)
    assert 'first run: python train_teacher.py' in refusal(capfd, distill)
    put_model(small, 'diffuseq/teacher', 'a/teacher', 10 ** 9)
    put_model(small, 'flow/teacher', 'my/own/run', 10 ** 9 + 1)
    put_model(small, 'ar/teacher', 'd', 10 ** 9 + 3)
    put_model(small, 'flow/student', 'e', 10 ** 9 + 4)
    (tmp_path / 'out/f').mkdir()
    (tmp_path / 'out/f/model.pt').write_text('damaged')

    run_main(distill, '--batch', 4, '--iters', 1)

    assert 'flow map of out/my/own/run/model.pt' in capfd.readouterr().out
    _, ckpt = models.load('out/my/own/run-student')
    assert ckpt['parents']['teacher']['path'] == 'out/my/own/run/model.pt'


@pytest.mark.parametrize('teacher, reference, out', [
    ('out/dates/teacher/model.pt', None, 'out/dates/student'),
    ('out/dates/teacher/model.pt', 'yes', 'out/dates/refined'),
    ('out/run1/model.pt', None, 'out/run1-student'),
    ('out/run1/model.pt', 'yes', 'out/run1-refined'),
    ('assets/dates.pt', None, 'out/dates/student'),
    # of `distill.py .` and `distill.py ..`
    ('model.pt', None, '../here-student'),
    ('../model.pt', 'yes', '../../runs-refined'),
])
def test_a_student_is_written_beside_its_teacher(tmp_path, monkeypatch, teacher, reference, out):
    """Students of two teachers in one folder, or one in the folder of shipped files."""
    (tmp_path / 'runs/here').mkdir(parents=True)
    monkeypatch.chdir(tmp_path / 'runs/here')

    found = distill.default_out(Path(teacher), {'name': 'dates'}, reference)

    assert found.resolve() == Path(out).resolve()


def run_next(capfd, *more):
    """Run the command that the last line on the terminal names, word by word."""
    line = capfd.readouterr().out.splitlines()[-1]
    python, path, *words = shlex.split(line.removeprefix('next: '))
    folder, file = os.path.split(path)
    script = {'distill.py': distill, 'sample.py': sample}[file]
    assert (python, folder) == ('python', os.path.dirname(sys.argv[0]))
    script.main(script.parse([*words, *[str(word) for word in more]]))
    return [file, *words]


@pytest.mark.parametrize('script', ['script.py', '../my code/script.py'])
def test_next_lines_of_two_runs_are_taken_literally(dozen, tmp_path, monkeypatch, capfd, script):
    """A script that is not there, or advice that is refused, as another run's is in its way."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', [script])
    for out in ('out/run1', 'out/my run'):
        run_main(train_teacher, '--data', dozen / 'data', *SMALL, '--iters', 1, '--out', out)

        assert run_next(capfd, '--batch', 4, '--iters', 1) == ['distill.py', out]
        assert run_next(capfd) == ['sample.py', f'{out}-student', '--source=1987-03-23',
                                   '--compare', f'{out}/model.pt']


@pytest.mark.parametrize('sources, words', [
    (['-ed', 'b'], ['--source=-ed']), (['a\nb', '\x1b[31m', 'c'], ['--source=c']), (['\n'], [])])
def test_advice_has_a_source_that_a_command_line_can_hold(sources, words):
    """A source taken for an option, or a command that a line break cuts in two."""
    special = {name: 256 + i for i, name in enumerate(prepare_data.SPECIAL)}
    meta = {'kind': 'rows', 'pairs': True, 'length': 16, 'special': special,
            'tokenizer': prepare_data.make_tokenizer('byte', [])}
    encoding = prepare_data.make_encoding(meta['tokenizer'])
    rows, _ = prepare_data.pack_rows(encoding, [(source, 'x') for source in sources], 16)

    assert train_teacher.sample_command('out', meta, rows)[2:] == words


# -----------------------------------------------------------------------------
# Command lines that cannot be

NEW = '--data {dozen}/data ' + ' '.join(str(word) for word in SMALL)
AGAIN = NEW + ' --out {small}/flow/teacher --iters'
FLOW = '{small}/flow/teacher'
DIFFUSEQ = '{small}/diffuseq/teacher'
STUDENT = FLOW + ' --batch 4 --rollout 2 --out {small}/flow/student --iters'
GENERATOR = DIFFUSEQ + ' --batch 4 --out {small}/diffuseq/student --iters'
LONG = '9' * 400

REFUSED_RUNS = [
    (train_teacher, '--nonsense 1', 'unrecognized arguments: --nonsense'),
    (train_teacher, '--reparam magic', 'invalid choice'),
    (train_teacher, '--dropout 1', 'a number from 0 to 0.999999'),
    (train_teacher, '', 'run: python prepare_data.py stories'),
    (train_teacher, '--data missing', 'missing holds no prepared data'),
    (train_teacher, '--data text.txt', 'python prepare_data.py mine --input text.txt'),
    (train_teacher, NEW + f' --out {LONG}', 'cannot be written'),
    (train_teacher, NEW + ' --out text.txt', 'cannot be written'),
    (train_teacher, NEW + f' --device {LONG}', 'is not available'),
    (train_teacher, NEW + ' --heads 3', 'must be a multiple of twice --heads (3)'),
    (train_teacher, NEW + ' --width 36 --heads 4', '--width 36: must be a multiple'),
    (train_teacher, NEW + ' --network paper', "--channels 8: the paper's network has as many as"),
    (train_teacher, NEW + ' --model mdlm --stagger 0.5', '--stagger is for flm; leave it out for'),
    (train_teacher, NEW + ' --model ar --reparam loss', '--reparam is for flm; leave it out for'),
    (train_teacher, NEW + ' --model diffuseq --network paper', '--network is for flm; leave it'),
    (train_teacher, NEW + ' --anchor 0.1', '--anchor is for diffuseq; leave it out for --model'),
    (train_teacher, NEW + ' --iters 2 --minutes 2', '--iters and --minutes do not go together'),
    (train_teacher, NEW + ' --micro-batches 3', 'must be a multiple of --micro-batches (3)'),
    (train_teacher, NEW + ' --resume', 'nothing was saved in out/data/teacher yet; leave out'),
    (train_teacher, NEW + f' --resume --out {LONG}', 'nothing was saved'),
    # what is there is not replaced, and continued only as what it was
    (train_teacher, AGAIN + ' 5', 'of 2 iterations; --resume continues it, --overwrite replaces'),
    (train_teacher, AGAIN + ' 5 --seed 1', 'of 2 iterations; --overwrite replaces it'),
    (train_teacher, AGAIN + ' 2 --resume', 'has 2 iterations already; ask for more by --iters'),
    (train_teacher, AGAIN + ' 9 --resume --seed 1', '--seed was 0, now 1'),
    (train_teacher, AGAIN + ' 9 --resume --batch 8', '--batch was 4, now 8'),
    (train_teacher, AGAIN + ' 9 --resume --width 64', '--width was 32, now 64'),
    (train_teacher, AGAIN + ' 9 --resume --model diffuseq', '--model was flm, now diffuseq'),
    (train_teacher, AGAIN + ' 9 --resume --optimizer adamw', '--optimizer was muon, now adamw'),
    (train_teacher, AGAIN + ' 9 --resume --no-hidden-input', '--hidden-input was True, now False'),
    (train_teacher, AGAIN + ' 9 --resume --data {dozen}/other-days', 'other data than data'),
    (train_teacher, AGAIN + ' 9 --resume --data {dozen}/bytes', 'another tokenizer'),
    (train_teacher, AGAIN + ' 9 --out {bad}/weights', 'of 2 iterations; --overwrite replaces it'),
    (train_teacher, AGAIN + ' 9 --out {bad}/weights --resume', 'it holds only weights'),
    (distill, '--nonsense 1', 'unrecognized arguments: --nonsense'),
    (distill, '--method magic', 'invalid choice'),
    (distill, '--substep 0', 'a number from 0.001 to 1'),
    (distill, '', 'first run: python train_teacher.py'),
    # what is no checkpoint, and nothing of it is executed
    (distill, 'missing', 'no such checkpoint'),
    (distill, LONG, 'no such checkpoint'),
    (distill, '{bad}/folder.pt', 'no such checkpoint'),
    (distill, '{bad}/empty', 'no such checkpoint'),
    (distill, '{small}/flow', 'name one of these: {small}/flow/student, {small}/flow/teacher'),
    (distill, '{bad}/format.pt', f'has format {models.FORMAT - 1}, this code reads format'),
    (distill, '{bad}/evil.pt', 'no whole checkpoint of this project (UnpicklingError)'),
    (distill, '{bad}/evil-2.pt', 'no whole checkpoint of this project (UnpicklingError)'),
    (distill, '{bad}/shape.pt', 'weights and config do not fit'),
    (distill, '{bad}/unknown.pt', 'weights and config do not fit'),
    (distill, '{bad}/list.pt', 'no whole checkpoint'),
    (distill, '{bad}/empty.pt', 'no whole checkpoint'),
    (distill, '{bad}/cut.pt', 'no whole checkpoint'),
    # what cannot be distilled, or not so
    (distill, '{small}/flow/student', 'is a student already'),
    (distill, '{small}/diffuseq/refined', 'is a student already'),
    (distill, '{small}/ar/teacher', 'is autoregressive; distill a flow'),
    (distill, '{small}/mdlm/teacher --reference {small}/mdlm/teacher', '--reference is for a diff'),
    (distill, FLOW + ' --reference {small}/flow/student', "--reference is for a diffusion's"),
    (distill, DIFFUSEQ + ' --reference missing', 'no such checkpoint'),
    (distill, DIFFUSEQ + ' --reference ' + DIFFUSEQ, 'must be a student of this teacher'),
    (distill, DIFFUSEQ + ' --reference {small}/flow/student', 'must be a student of this teacher'),
    (distill, DIFFUSEQ + ' --reference {bad}/stranger.pt', 'must be a student of this teacher'),
    (distill, FLOW + ' --data missing', 'missing holds no prepared data'),
    (distill, FLOW + ' --data {dozen}/bytes', 'it has another tokenizer; name its data by --data'),
    (distill, FLOW + ' --out text.txt', 'cannot be written'),
    (distill, FLOW + ' --adversarial 0.1', '--adversarial is for score; leave it out'),
    (distill, FLOW + ' --candidates 2', '--candidates is for refine; leave it out'),
    (distill, '{small}/mdlm/teacher --noise-levels 4', '--noise-levels is for flow map; leave it'),
    (distill, DIFFUSEQ + ' --method rollout', '--method is for flow map; leave it out'),
    (distill, DIFFUSEQ + ' --beta2 0.9', '--beta2 is for flow map, masked, refine; leave it'),
    (distill, DIFFUSEQ + ' --reference {small}/diffuseq/student --alpha 1', '--alpha is for score'),
    (distill, DIFFUSEQ + ' --out new --batch 4 --micro-batches 2', 'score distillation takes one'),
    (distill, FLOW + ' --method semigroup --reuse 3', '--reuse is for rollout; leave it out'),
    (distill, FLOW + ' --substep 0.5', '--substep is for lagrangian, eulerian; leave it out'),
    (distill, FLOW + ' --noise-levels 1', 'give 0, or at least 2'),
    (distill, FLOW + ' --top-k 1', 'argument --top-k'),
    # as above, and with the same teacher and reference
    (distill, STUDENT + ' 5', 'of 2 iterations; --resume continues it, --overwrite replaces it'),
    (distill, STUDENT + ' 2 --resume', 'has 2 iterations already'),
    (distill, STUDENT.replace('--rollout 2', '') + ' 9 --resume --method semigroup',
     '--method was rollout, now semigroup'),
    (distill, STUDENT + ' 9 --resume --lr 0.5', '--lr was 0.002, now 0.5'),
    (distill, STUDENT + ' 9 --resume --data {dozen}/other-days', 'other data than data'),
    (distill, '{small}/another/teacher ' + STUDENT.removeprefix(FLOW) + ' 9 --resume',
     'it has another teacher'),
    (distill, GENERATOR + ' 9 --resume --reference {small}/diffuseq/student',
     'it has another reference'),
    (distill, GENERATOR + ' 9 --resume --out {small}/diffuseq/refined --reference {bad}/again.pt',
     'it has another reference'),
    (distill, '{small}/mdlm/teacher --batch 4 --iters 4 --resume', 'the rounds of'),
]


@pytest.mark.parametrize('script, words, said', REFUSED_RUNS)
def test_what_is_refused_is_one_line_and_changes_nothing(
        dozen, small, bad, tmp_path, monkeypatch, capfd, script, words, said):
    """A traceback, minutes of work before it, or a file written for a command that cannot be."""
    monkeypatch.chdir(tmp_path)
    Path('text.txt').write_text('text')
    before = files_in(dozen)

    message = refusal(capfd, script, *words.format(dozen=dozen, small=small, bad=bad).split())

    assert said.format(small=small) in message
    assert [path.name for path in tmp_path.iterdir()] == ['text.txt']
    assert files_in(dozen) == before


def test_a_reference_may_be_named_otherwise(small, tmp_path, monkeypatch):
    """A run that cannot continue from another folder."""
    words = (small / 'diffuseq/teacher', '--batch', 4, '--out', tmp_path / 'out', '--reference')
    run_main(distill, *words, small / 'diffuseq/student', '--iters', 1)
    monkeypatch.chdir(small)

    run_main(distill, *words, 'diffuseq/student/model.pt', '--iters', 2, '--resume')

    assert models.load(tmp_path / 'out')[1]['iter'] == 2


def test_a_reference_is_where_refining_starts_and_stays_what_it_was(small, bad, tmp_path, capfd):
    """What the reference learned lost, or half of a run with another one."""
    shutil.copy(bad / 'again.pt', tmp_path / 'reference.pt')
    words = (small / 'diffuseq/teacher', '--batch', 4, '--out', tmp_path / 'out',
             '--reference', tmp_path / 'reference.pt')
    run_main(distill, *words, '--iters', 1)
    heads = [models.load(path)[0].net.head.weight for path in (tmp_path / 'out', bad / 'again.pt')]
    shutil.copy(small / 'diffuseq/student/model.pt', tmp_path / 'reference.pt')

    message = refusal(capfd, distill, *words, '--iters', 2, '--resume')

    assert torch.allclose(*heads, atol=0.1)
    assert 'it has another reference' in message


@pytest.mark.parametrize('script', [train_teacher, distill])
@pytest.mark.parametrize('value', ['x', '', '-1', 'nan', 'inf', LONG])
def test_every_option_refuses_what_is_no_value_of_its_own(capfd, script, value):
    """nan, infinity or a negative number taken for a setting."""
    names = set(vars(script.parse([])))
    for name in names - {'data', 'out', 'device', 'teacher', 'reference', 'compile'}:
        flag = train_teacher.as_flag(name)
        assert f'argument {flag}' in refusal(capfd, script, f'{flag}={value}')


# -----------------------------------------------------------------------------
# Several processes


def by_the_same_clock(name, words, **environment):
    """A script whose minutes pass with its iterations, thrice as fast in the second process."""
    pass_time(setattr, update=[1 / 64, 3 / 64][int(environment['RANK'])])
    as_command(name, words, **environment)


def run_in_two(script, *words):
    """A script in two processes, which must end well."""
    children = start_in(2, script, *words, target=by_the_same_clock)
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]


def assert_same_state(*folders):
    """The same weights, averages and optimizers, bit for bit."""
    states = []
    for folder in folders:
        _, ckpt = models.load(folder)
        states.append([ckpt[name] for name in ('model', 'ema', 'optimizers', 'iter')])
    torch.testing.assert_close(*states, rtol=0, atol=0)


@BOTH
def test_two_processes_train_as_one_by_the_clock(dozen, small, tmp_path, monkeypatch, name):
    """Gradients of half the batch, the same noise in both, or two different ends of a run."""
    script, *words = commands(dozen, small)[name]
    words = (*words, '--batch', 8, '--micro-batches', 2, '--minutes', 0.01, '--evals', 1)
    run_in_two(script, *words, '--out', tmp_path / 'two')
    # which makes the targets of both
    pass_time(monkeypatch.setattr, targets=1 / 128)

    run_main(script, *words, '--out', tmp_path / 'one')

    assert models.load(tmp_path / 'one')[1]['iter'] > 20
    assert_same_state(tmp_path / 'one', tmp_path / 'two')


def test_two_processes_are_resumed_as_one(dozen, small, tmp_path):
    """Cached targets, or a checkpoint, that one of two processes lacks."""
    script, *words = commands(dozen, small)['student']
    # a constant rate, so that the number of iterations changes nothing
    words = (*words, '--batch', 8, '--decay', 0, '--micro-batches', 2, '--evals', 1)
    run_main(script, *words, '--reuse', 1, '--iters', 12, '--out', tmp_path / 'one')

    run_in_two(script, *words, '--reuse', 1, '--iters', 6, '--out', tmp_path / 'two')
    run_in_two(script, *words, '--reuse', 1, '--iters', 12, '--out', tmp_path / 'two', '--resume')

    assert_same_state(tmp_path / 'one', tmp_path / 'two')


@pytest.mark.parametrize('gpus, device, said', [
    (1, '', '2 processes, but 1 GPUs'), (0, 'meta', 'several processes cannot share meta')])
def test_processes_need_a_device_each(monkeypatch, capfd, gpus, device, said):
    """A traceback from within CUDA, or processes that do not add up their gradients."""
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)

    with pytest.raises(SystemExit) as end:
        train_teacher.start_processes(device)

    assert end.value.code == 2
    assert said in capfd.readouterr().err


def test_a_refused_command_ends_both_processes_with_one_line(dozen, tmp_path):
    """A process that waits for one that has ended, or the same error eight times."""
    err = tmp_path / 'err'
    children = start_in(2, train_teacher, '--data', dozen / 'none', '--out', tmp_path / 'out',
                        err=err)
    for child in children:
        child.join(120)

    assert [child.exitcode for child in children] == [2, 2]
    assert err.read_text().count('\n') == 1
    assert not (tmp_path / 'out').exists()


def test_score_distillation_runs_under_torchrun(small, tmp_path):
    """Fake denoisers that part, as each process follows its own rows; every line printed twice."""
    words = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone',
             distill.__file__, small / 'diffuseq/teacher', '--batch', 8, '--iters', 3,
             '--adversarial', 0.1, '--out', tmp_path, '--device', 'cpu', '--evals', 1]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}

    done = subprocess.run([str(word) for word in words], capture_output=True, text=True,
                          env=environment)

    assert done.returncode == 0, done.stderr
    assert done.stdout.count('next: ') == 1
    _, ckpt = models.load(tmp_path)
    assert ckpt['iter'] == 3
    assert ckpt['fake']['discriminator.weight'].isfinite().all()


# =============================================================================
# sample.py and bench.py: tiny models with random weights, and what both refuse

HERE = Path(__file__).parent


def make_data(folder, items, tokenizer, length):
    """A data folder of texts or pairs, a fifth of them held out: its path."""
    texts = []
    for item in items:
        texts.extend(prepare_data.as_texts(item))
    spec = prepare_data.make_tokenizer(tokenizer, texts)
    encoding = prepare_data.make_encoding(spec)
    ids, _ = prepare_data.pack_rows(encoding, items, length)
    cut = len(ids) // length // 5 * length
    pairs = isinstance(items[0], tuple)
    prepare_data.save_dataset(folder, ids[cut:], ids[:cut], spec, 'rows', pairs, length, 'a test')
    return folder


def make_model(path, folder, seed=0, more=(), **config):
    """A tiny model with random weights, saved as the training scripts save theirs: its path."""
    meta, _, _ = prepare_data.load_dataset(folder)
    torch.manual_seed(seed)
    shape = {'layers': 1, 'heads': 2, 'width': 32, 'channels': 8, 'cond': 16}
    network = models.build(Config(meta['vocab'], meta['length'], **{**shape, **config}))
    # a fresh head writes the same token everywhere
    torch.nn.init.normal_(network.net.head.weight)
    models.save(path, {'model': network, 'ema': network}, meta=meta, data=str(folder), iter=7,
                options={'seed': seed}, **dict(more))
    return path


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with data sets and models of all kinds, which tests only read."""
    folder = tmp_path_factory.mktemp('place')
    rng = np.random.default_rng(0)
    words = ['red', 'green', 'blue', 'old', 'new', 'cat', 'dog']
    # 40 of these texts are held out, 20 of these pairs, 22 days
    texts = [' '.join(rng.choice(words, 4)) + '.' for _ in range(200)]
    numbers = [(str(n), f'tell me {n} more') for n in range(100)]
    days = [pair for pair in prepare_data.dates() if pair[0].startswith('1987-0')]
    other = [f'{n} green bottles' for n in range(200)]

    data = make_data(folder / 'data/words', texts, 'byte', 24)
    make_model(folder / 'student.pt', data, calls=1)
    make_model(folder / 'teacher.pt', data)
    make_model(folder / 'mdlm.pt', data, model='mdlm')
    make_model(folder / 'sdtt.pt', data, model='mdlm', calls=4)
    make_model(folder / 'ar.pt', data, model='ar')
    make_model(folder / 'diffuseq.pt', data, model='diffuseq')
    make_model(folder / 'dlm-one.pt', data, model='diffuseq', calls=1)
    data = make_data(folder / 'data/numbers', numbers, 'byte', 24)
    make_model(folder / 'pairs.pt', data, calls=1)
    data = make_data(folder / 'data/dates', days, 'dates', 23)
    make_model(folder / 'dates.pt', data, calls=1)
    make_model(folder / 'dates-ar.pt', data, model='ar')
    make_model(folder / 'otherwise.pt', make_data(folder / 'data/other', other, 'byte', 24))
    make_model(folder / 'longer.pt', make_data(folder / 'data/longer', other, 'byte', 32))
    make_model(folder / 'bpe.pt', make_data(folder / 'data/bpe', other, 'bpe:300', 24), model='ar')
    make_model(folder / 'few.pt', make_data(folder / 'data/few', other[:8], 'byte', 24))
    write_bytes(folder / 'data/stream', 24)
    make_model(folder / 'stream.pt', folder / 'data/stream', calls=1)
    (folder / 'notes.txt').write_text('no checkpoint')
    (folder / 'figures.json').write_text('precious')
    (folder / 'picture.svg').write_text('precious')
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(capsys, script, *words):
    """Run `python SCRIPT.py words` here: (exit status, stdout, stderr)."""
    status = 0
    try:
        script.main(script.parse([str(word) for word in words]))
    except SystemExit as end:
        status = end.code or 0
    out, err = capsys.readouterr()
    return status, out, err


def lines_of(capsys, *words):
    """The texts that `python sample.py words` prints."""
    status, out, err = call(capsys, sample, *words)
    assert status == 0, err
    # not splitlines, to which odd characters in a text are line breaks
    return out.split('\n')[:-1]


def give_stdin(monkeypatch, path, content):
    """Let stdin be a file of these bytes."""
    path.write_bytes(content)
    # the encoding of Windows
    monkeypatch.setattr(sys, 'stdin', open(path, encoding='cp1252'))


# a command line, and what the one line must say with which it is refused
REFUSED = [
    # sample.py: options
    ('sample student.pt --nfe 0', '--nfe'),
    ('sample student.pt --nfe 100001', '1 to 100,000'),
    ('sample student.pt --mbr 1', '--mbr'),
    ('sample student.pt --temperature -1', '--temperature'),
    ('sample student.pt --seed -1', '--seed'),
    ('sample student.pt --device nowhere', '--device'),
    ('sample student.pt --prompt a --infill _', 'not allowed with'),
    ('sample student.pt --compare teacher.pt --watch', 'not allowed with'),
    ('sample student.pt --prompt -x', '--prompt=-x'),
    ('sample student.pt a text', 'unrecognized arguments'),
    # and files
    ('sample no.pt', 'no such checkpoint'),
    ('sample notes.txt', 'notes.txt is not a checkpoint'),
    ('sample student.pt --compare notes.txt', 'notes.txt is not a checkpoint'),
    ('sample student.pt --film a.svg', '--compare'),
    ('sample student.pt --compare teacher.pt --film a.pt', '.svg'),
    ('sample student.pt --compare teacher.pt --film picture.svg', '--overwrite'),
    ('sample student.pt --export a', '.pt'),
    ('sample student.pt --export teacher.pt', '--overwrite'),
    ('sample student.pt --export {tmp}/folder.pt', 'is a folder'),
    # and what a model cannot do
    ('sample student.pt --method ddim', '--method is for diffuseq'),
    ('sample diffuseq.pt --temperature 2', '--temperature is for flm, mdlm, ar'),
    ('sample mdlm.pt --gamma 0.5', '--gamma is for flm'),
    ('sample ar.pt --nfe 4', '--nfe'),
    ('sample student.pt --source a', 'models of pairs'),
    ('sample dates.pt --prompt 1', 'models of text'),
    ('sample student.pt --compare bpe.pt', 'another tokenizer'),
    ('sample student.pt --compare longer.pt', 'rows of 32 tokens'),
    # and texts
    ('sample student.pt --prompt " "', '--prompt is empty'),
    ('sample student.pt --infill abc', 'has no blank'),
    (r'sample student.pt --infill "a\_c"', 'has no blank'),
    ('sample student.pt --prompt aaaaaaaaaaaaaaaaaaaaaaaa', '24 tokens'),
    ('sample dates.pt --source 1987-03-23x', "'x' is not in the vocabulary"),
    ('sample dates.pt', 'holds no source', b''),
    ('sample dates.pt', 'UTF-8', b'\xff\xfe\n'),
    ('sample dates.pt', 'line 2 is empty', b'1987-03-23\n\n1987-03-24\n'),
    ('sample dates.pt', 'line 3: 26 tokens', b'1987-03-23\n1987-03-24\n' + b'1987-' * 5 + b'\n'),
    # bench.py: options
    ('bench', 'WHAT'),
    ('bench quality student.pt --rows ' + '9' * 5000, '--rows'),
    ('bench quality student.pt --temperature nan', '--temperature'),
    ('bench speed student,8,16', 'nor KIND,L,V,D such as'),
    ('bench speed student,8,16,7@1', 'D even'),
    ('bench train 1,9', 'B,L,V,D'),
    ('bench train 1,8,16,7', 'D even'),
    # and files
    ('bench quality', 'python distill.py'),
    ('bench speed no.pt', 'no such checkpoint'),
    ('bench quality notes.txt', 'notes.txt is not a checkpoint'),
    ('bench quality student.pt --rows 20 --out student.pt', 'end in .json'),
    ('bench quality student.pt --rows 20 --out {tmp}/folder.json', 'is a folder'),
    ('bench quality student.pt --rows 20 --out figures.json', '--overwrite'),
    ('bench quality student.pt --rows 20 --out picture.json', 'picture.svg'),
    ('bench train 1,8,16,8 --out figures.json', '--overwrite'),
    # and what cannot be compared
    ('bench quality student.pt otherwise.pt', 'other data'),
    ('bench quality student.pt longer.pt', 'rows of 32 tokens'),
    ('bench quality student.pt bpe.pt', 'another tokenizer'),
    ('bench quality few.pt --rows 20', 'too few; need 2'),
    ('bench quality student.pt --method ddim', '--method is for diffuseq'),
    ('bench quality diffuseq.pt --temperature 2', '--temperature is for flm, mdlm, ar'),
    ('bench quality mdlm.pt --gamma 0.5', '--gamma is for flm'),
    ('bench quality student.pt --mbr 2', '--mbr is for pairs'),
    ('bench quality pairs.pt --mbr 2 --per-source 2', 'not allowed with'),
    ('bench quality pairs.pt --scorer ar.pt', '--scorer is for text'),
    ('bench quality student.pt --scorer student.pt', '--model ar'),
    ('bench quality student.pt --scorer bpe.pt', 'another tokenizer'),
]


@pytest.mark.parametrize('line, said, stdin', [(*case, None)[:3] for case in REFUSED])
def test_what_cannot_be_is_one_line_before_any_work(
        place, tmp_path, monkeypatch, capsys, line, said, stdin):
    """A traceback; an option that is ignored; an hour of work that cannot be written."""
    def never(*how, **more):
        raise AssertionError('work before all was checked')

    for name in ('timed_rows', 'text_figures', 'median_seconds'):
        monkeypatch.setattr(bench, name, never)
    monkeypatch.setattr(models.Model, 'embedded', never)
    monkeypatch.chdir(place)
    (tmp_path / 'folder.pt').mkdir()
    (tmp_path / 'folder.json').mkdir()
    if stdin is not None:
        give_stdin(monkeypatch, tmp_path / 'lines.txt', stdin)
    script, *words = shlex.split(line.format(tmp=tmp_path))
    before = files_in(place)

    status, _, err = call(capsys, {'sample': sample, 'bench': bench}[script], *words)

    assert status == 2
    assert said in err
    assert err.count('\n') == 1
    assert len(err) < 300
    assert files_in(place) == before


@pytest.mark.parametrize('script, words', [
    (sample, ''), (bench, 'quality'), (bench, 'speed'), (bench, 'train'), (bench, 'tables')])
def test_help_and_examples_are_understood(capsys, script, words):
    """An option without a word of help; an example on the first page that does not run."""
    with pytest.raises(SystemExit) as end:
        script.parse([*words.split(), '-h'])
    out = capsys.readouterr().out
    examples = re.findall(r'^    python \w+\.py([^#\n]*)', script.__doc__, re.M)
    for line in examples:
        script.parse(shlex.split(line))

    assert end.value.code == 0
    assert len(examples) == 6
    if words == 'quality':
        assert '--temperature' in out
    for option in re.findall(r'^  (-.*)$', out, re.M):
        # its help is beside it, or below
        assert '  ' in option or re.search(re.escape(option) + r'\n {10}', out)


def test_the_newest_model_is_taken_and_named(place, here, monkeypatch, capsys):
    """An older model in silence; a model that is passed over for its folder's name."""
    data = place / 'data/words'
    names = ['out/a/student', 'out/my-sdtt', 'out/run/b/teacher']
    more = {'parents': {'teacher': {'path': 'out/run/b/teacher/model.pt', 'crc': 0}}}
    make_model(Path(names[0], 'model.pt'), data, more=more, calls=1)
    make_model(Path(names[1], 'model.pt'), data, more=more, calls=4, model='mdlm')
    make_model(Path(names[2], 'model.pt'), data)
    # a run that was stopped early, one whose folder lies elsewhere, and one that is gone
    Path('out/c/student').mkdir(parents=True)
    shutil.move('out/a', 'large-disk')
    os.symlink(Path('large-disk').resolve(), 'out/a')
    os.symlink('no/such/model.pt', 'out/c/model.pt')

    for name in names:
        for other in names:
            os.utime(f'{other}/model.pt', (1, 2 if other == name else 1))
        _, _, err = call(capsys, sample, '-n', 1)
        assert f'{name}/model.pt, the newest' in err

    # of students the newest, and its teacher
    os.utime('out/my-sdtt/model.pt', (3, 3))
    assert bench.newest_pair() == ['out/my-sdtt/model.pt', 'out/run/b/teacher/model.pt']
    shutil.rmtree('out/run')
    assert bench.newest_pair() == ['out/my-sdtt/model.pt']
    shutil.rmtree('out')
    capsys.readouterr()
    monkeypatch.setattr(sample, 'SHIPPED', place / 'student.pt')
    status, out, err = call(capsys, sample)
    assert (status, out.count('\n')) == (0, 8)
    assert str(place / 'student.pt') in err.split('\n')[0]
    monkeypatch.setattr(sample, 'SHIPPED', here / 'none.pt')
    assert call(capsys, sample)[0] == 2


@pytest.mark.parametrize('kind, words, want', [
    ('teacher', '--gamma 0.5 --temperature 0.5', {'gamma': 0.5, 'temperature': 0.5}),
    ('student', '--gamma 0.5 --temperature 0.5', {'gamma': 0.5, 'temperature': 0.5}),
    ('diffuseq', '--method ddim --clamp', {'method': 'ddim', 'clamp': True}),
    ('dlm-one', '--method ddim', {'method': 'ddim'}),
    ('sdtt', '--temperature 0', {'temperature': 1e-9}),
    ('ar', '', {}),
])
def test_both_scripts_tell_a_sampler_the_same(place, monkeypatch, capsys, kind, words, want):
    """A figure in a table that was measured with other options than the texts are written with."""
    told = []

    def listen(model, given, nfe, seed, **how):
        how.pop('on_call', None)
        told.append(how)
        return torch.full((len(given), 24), 97), 1.0

    monkeypatch.chdir(place)
    monkeypatch.setattr(bench, 'timed_rows', listen)
    monkeypatch.setattr(bench, 'picture', lambda *how: None)
    monkeypatch.setattr(sample, 'warm_up', lambda *how: None)
    monkeypatch.setattr(sample, 'sample_batches', lambda *how, **more: [listen(*how, **more)])
    monkeypatch.setattr(bench, 'write_whole', lambda path, data: None)

    call(capsys, sample, f'{kind}.pt', *words.split())
    status, _, err = call(capsys, bench, 'quality', f'{kind}.pt', *words.split(), '--nfe', 2)

    assert status == 0, err
    assert told == [want, want]


# =============================================================================
# sample.py

@pytest.mark.parametrize('name, words, made', [
    # a teacher in one call would write noise, a distilled model needs no more than it was made for
    ('student', '', 'nfe 1,'), ('teacher', '', 'nfe 64,'), ('mdlm', '', 'nfe 64,'),
    ('sdtt', '', 'nfe 4,'), ('ar', '', 'nfe 24,'), ('dlm-one', '', 'nfe 1,'),
    # each option changes the texts
    ('teacher', '--gamma 1', 'nfe 4,'), ('teacher', '--temperature 30', 'nfe 4,'),
    ('mdlm', '--temperature 9', 'nfe 4,'), ('ar', '--temperature 9', 'nfe 24,'),
    ('diffuseq', '--method ddim', 'nfe 4,'), ('diffuseq', '--clamp', 'nfe 4,'),
    ('teacher', '--seed 1', 'nfe 4,'), ('student', '--nfe 2', 'nfe 2,'),
    # and what cannot is told
    ('student', '--temperature 2', '--temperature has no effect'),
    ('student', '--watch', '--watch draws in a terminal only'),
])
def test_each_option_does_what_is_said(place, capsys, name, words, made):
    """An option that never reaches the sampler; a number of calls that nobody asked for."""
    path = place / f'{name}.pt'
    calls = ['--nfe', 4] if made == 'nfe 4,' else []

    _, changed, err = call(capsys, sample, path, *words.split(), *calls)
    without = lines_of(capsys, path, *calls)

    assert made in err
    assert (changed.split('\n')[:-1] != without) == (words != '' and 'nfe' in made)


# -----------------------------------------------------------------------------
# What is given

@pytest.mark.parametrize('name, option, text, want', [
    # "Return the " begins with a token that no text has there
    ('student', '--prompt', 'ab ', [97, 98] + [-1] * 22),
    # a hole takes its space along; the text ends after the last word given
    ('student', '--infill', r'a _ b\_c', [97, -1, 32, 98, 95, 99, 256] + [257] * 17),
    # the row of a stream goes on
    ('stream', '--infill', 'a_b', [97, -1, 98] + [-1] * 21),
    ('pairs', '--source', ' 7 ', [55, 258] + [-1] * 22),
    ('student', '', '', [-1] * 24),
])
def test_what_is_given(place, name, option, text, want):
    """A prompt with a token too many; a hole whose space is lost; a source without its <sep>."""
    writer = sample.make_writer('', *models.load(place / f'{name}.pt'))

    assert sample.known_row(writer, option, text)[0].tolist() == want


def test_story_words_take_their_space_along(capsys):
    """A closed vocabulary has ' has' and no 'has'; a sampler that overwrites what is given."""
    text = 'Anna has _ red _ in the bag.'
    lines = lines_of(capsys, HERE / 'assets/stories-student.pt', '--infill', text)

    assert all(re.fullmatch(text.replace(' _', r' \S+'), line) for line in lines)


@pytest.mark.parametrize('stdin', [
    b'1987-03-23\n2024-02-29\n', b'1987-03-23\n2024-02-29', b' 1987-03-23 \r\n2024-02-29\r\n',
    '\ufeff1987-03-23\n2024-02-29\n'.encode()])
def test_sources_on_stdin_keep_their_order(place, tmp_path, monkeypatch, capsys, stdin):
    """Texts under another source than their own; a sign of Windows that is part of the first."""
    give_stdin(monkeypatch, tmp_path / 'lines.txt', stdin)

    lines = lines_of(capsys, place / 'dates.pt', '-n', 2)

    sources = [line.split(' -> ')[0] for line in lines]
    assert sources == ['1987-03-23', '1987-03-23', '2024-02-29', '2024-02-29']


# -----------------------------------------------------------------------------
# Writing

def test_temperature_0_is_greedy(place):
    """A draw among tokens that are not the likeliest, or a division by zero."""
    options = sample.parse(['--temperature', '0'])
    given = nothing_given(20, 24)

    for name in ('ar', 'mdlm'):
        model, _ = models.load(place / f'{name}.pt')
        how = sample.sampler_options(model, options)
        rows = model.sample(given, 1, generator(1), **how)
        # of a single call of MDLM, and of an autoregressive model, there is nothing else to draw
        assert torch.equal(rows, model.sample(given, 1, generator(2), **how))
        before = torch.cat([torch.full((20, 1), 259), rows[:, :-1]], 1) if name == 'ar' else given
        logits = models.mask_specials(model.predict(before))
        assert torch.equal(rows, logits.argmax(-1))


def test_texts_are_printed_as_they_are_written(place, capsys):
    """Minutes of silence; other texts than all at once; metrics of the last ones only."""
    model, ckpt = models.load(place / 'student.pt')
    given = nothing_given(300, 24)
    want, _ = models.sample_rows(model, given, 2, seed=0)
    seen = []
    for rows, _ in models.sample_batches(model, given, 2, seed=0):
        seen.append(rows)

    assert [len(rows) for rows in seen] == [256, 44]
    assert torch.equal(torch.cat(seen), want)
    status, out, err = call(capsys, sample, place / 'student.pt', '-n', 300, '--nfe', 2)
    texts = [sample.on_one_line(text) for _, text in prepare_data.to_texts(want, ckpt['meta'])]
    assert out.split('\n')[:-1] == texts
    # bytes of a random model would move the cursor
    assert all(letter.isprintable() for letter in ''.join(texts))
    metrics = prepare_data.sanity_metrics(want, ckpt['meta'], ckpt['data'])
    assert f'300 rows: entropy {metrics["entropy"]:.3f}' in err


def test_long_work_is_announced(place, monkeypatch, capsys):
    """Four minutes without a word."""
    model, _ = models.load(place / 'teacher.pt')
    monkeypatch.setattr(sample, 'sample_rows', lambda *how: (None, 0.5))

    sample.warm_up(model, nothing_given(512, 24), 64, 0)
    sample.warm_up(model, nothing_given(8, 24), 4, 0)

    assert capsys.readouterr().err == '512 rows in 64 network calls: about 0:01:04\n'


def test_on_one_line():
    """Line breaks vanish, an escape sequence reaches the terminal, or Persian loses its joiners."""
    assert sample.on_one_line('a\r\nb\rc\nd') == 'a⏎b⏎c⏎d'
    assert sample.on_one_line('\033[2Ja\tb\xa0c\u2028d') == '\ufffd[2Ja b c d'
    assert sample.on_one_line('\u0645\u06cc\u200c\u062e') == '\u0645\u06cc\u200c\u062e'


def test_the_last_line_says_how_the_rows_were_made(place, capsys):
    """Figures without the seed, the device or the calls cannot be made again."""
    words = ('-n', 4, '--seed', 3, '--device', 'cpu')
    _, _, err = call(capsys, sample, place / 'student.pt', *words)

    assert re.fullmatch(r'4 rows: entropy \d\.\d{3}, unique \d\.\d{3}, words \d\.\d{3}; '
                        r'nfe 1, \d+\.\d\d ms per row, seed 3, cpu', err.strip())


def test_mbr_takes_the_text_most_like_the_others_of_its_source(place):
    """The longest text, the first one, or one of another source."""
    texts = ['no word of these here', 'the cat sat on the mat', 'the cat sat on the red mat',
             'a cat sat on the mat']
    assert sample.most_alike(texts) == 1

    writer = sample.make_writer('', *models.load(place / 'student.pt'))
    texts = ['a b c d', 'x y', 'a b c d', 'x y', 'q r s t', 'x y']
    encoded = [prepare_data.encode(writer.encoding, text) for text in texts]
    rows = torch.tensor([ids + [256] * (24 - len(ids)) for ids in encoded])
    parts = [(rows[:2], 1.0), (rows[2:5], 1.0), (rows[5:], 1.0)]

    chosen = list(sample.best_as_written(parts, 3, writer))

    assert [len(part) for part, _ in chosen] == [0, 1, 1]
    assert torch.equal(torch.cat([part for part, _ in chosen]), rows[[0, 3]])


@pytest.mark.parametrize('words, lines', [('--mbr 6', 1), ('--mbr 6 -n 2', 2)])
def test_mbr_prints_the_chosen_ones(place, capsys, words, lines):
    """All candidates are printed."""
    status, out, err = call(capsys, sample, place / 'student.pt', *words.split())

    assert status == 0, err
    assert out.count('\n') == lines
    assert err.startswith(f'{lines} rows')


# -----------------------------------------------------------------------------
# Frames, film, compare

class Terminal(io.StringIO):
    """A stdout that is a terminal."""

    def isatty(self):
        return True

    def screen(self):
        """The lines on its screen at the end, and the most that a frame had."""
        lines = []
        tallest = 0
        text = re.sub('\033\\[\\?7[lh]', '', self.getvalue())
        # a frame is erased by going up as many lines as it has
        for part in re.split('(\033\\[[0-9]+A\033\\[J)', text):
            if part.startswith('\033['):
                up = int(part[2:-4])
                tallest = max(tallest, up)
                assert up == len(lines)
                lines = []
            lines += part.split('\n')[:-1]
        return lines, tallest


@pytest.mark.parametrize('name', ['teacher', 'ar'])
def test_watch_leaves_only_the_texts(place, monkeypatch, capsys, name):
    """A frame taller than the screen, or of another height, leaves its remains above."""
    monkeypatch.setattr(sample.time, 'sleep', lambda seconds: None)
    monkeypatch.setenv('LINES', '6')
    words = [str(place / f'{name}.pt'), '-n', '300']
    if name != 'ar':
        words += ['--nfe', '5']
    plain = lines_of(capsys, *words)
    terminal = Terminal()

    with contextlib.redirect_stdout(terminal):
        sample.main(sample.parse([*words, '--watch']))

    # without lines that wrap
    text = terminal.getvalue()
    assert text.count('\033[?7l') == text.count('\033[?7h') == (24 if name == 'ar' else 5)
    assert terminal.screen() == (plain, 5)


@pytest.mark.parametrize('levels', [0, 4])
def test_compare_shows_the_same_noise(place, tmp_path, monkeypatch, capsys, levels):
    """Rows of different noise, or of unquantized noise, or under another model's name."""
    student = make_model(tmp_path / 's.pt', place / 'data/words', calls=1, noise_levels=levels)
    monkeypatch.setattr(sample, 'TEACHER_CALLS', 8)
    teacher, ckpt = models.load(place / 'teacher.pt')
    teacher.levels = models.quantization_levels(levels)
    rows, _ = models.sample_rows(teacher, nothing_given(256, 24), 8, 0)
    texts = [sample.on_one_line(text) for _, text in prepare_data.to_texts(rows, ckpt['meta'])]

    lines = lines_of(capsys, student, '--compare', place / 'teacher.pt', '-n', 3, '--nfe', 2)

    shown = [line.split(' 8 | ')[1] for line in lines if line.startswith('teacher  8 | ')]
    assert shown[0].startswith('256 rows: ')
    assert shown[1:] == texts[:3]
    shown = [line.split(' 2 | ')[1] for line in lines if line.startswith('student  2 | ')]
    assert shown[1:] == lines_of(capsys, student, '--nfe', 2, '-n', 256)[:3]


def test_who_shares_noise(place, tmp_path):
    """A diffusion's teacher with other noise at each position; noise that masks do not have."""
    make_model(tmp_path / 'shared.pt', place / 'data/words', model='diffuseq', calls=1,
               shared_noise=True)
    make_model(tmp_path / 'narrow.pt', place / 'data/words', channels=2)
    writers = {}
    for name in ('shared', 'narrow', 'diffuseq', 'student', 'mdlm'):
        folder = tmp_path if name in ('shared', 'narrow') else place
        writers[name] = sample.make_writer('', *models.load(folder / f'{name}.pt'))

    assert sample.share_noise(writers['shared'], writers['diffuseq'])
    for name in ('mdlm', 'narrow', 'diffuseq'):
        assert not sample.share_noise(writers['student'], writers[name])
    noises = [writers[name].model.initial_noise(nothing_given(5, 24), generator())
              for name in ('shared', 'diffuseq')]
    ours, theirs = [noise / noise.norm() for noise in noises]
    # the student begins a little later, so its noise is a little smaller
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_compare_with_sources_shows_each(place, tmp_path, monkeypatch, capsys):
    """All rows shown are of the first source."""
    give_stdin(monkeypatch, tmp_path / 'lines.txt', b'1987-03-23\n2024-02-29\n')

    lines = lines_of(capsys, place / 'dates.pt', '--compare', place / 'dates-ar.pt', '-n', 1)

    assert lines[3::4] == ['1987-03-23', '2024-02-29']
    assert sum(line.startswith('AR 23 | ') for line in lines) == 3


SVG = '{http://www.w3.org/2000/svg}'


def test_film_is_whole_svg(place, tmp_path, monkeypatch, capsys):
    """A control character makes the picture unreadable, or a frame is lost."""
    path = tmp_path / 'film.svg'
    monkeypatch.setattr(sample, 'TEACHER_CALLS', 8)

    lines_of(capsys, place / 'student.pt', '--compare', place / 'teacher.pt', '--film', path)

    texts = xml.etree.ElementTree.parse(path).getroot().findall(f'{SVG}text')
    # each call, and the student's result; the rest is invisible where nothing moves
    assert [text.get('opacity') for text in texts] == ['0'] * 7 + ['1', None]
    assert all(len(text.findall(f'{SVG}tspan')) == 13 for text in texts)
    assert texts[-1][0].text == 'student: call 1 of 1, from the same noise'
    assert not list(tmp_path.glob('*.tmp'))


def test_film_marks_what_is_not_valid(place):
    """A film of right texts only, or of wrong ones that nobody tells from them."""
    writer = sample.make_writer('', *models.load(place / 'dates.pt'))
    special = writer.meta['special']
    source = prepare_data.encode(writer.encoding, '1987-03-23')
    texts = [prepare_data.date_forms('1987-03-23')[0], 'March']
    rows = []
    for text in texts:
        ids = [*source, special['<sep>'], *prepare_data.encode(writer.encoding, text)]
        rows.append(ids + [special['<eos>']] * (23 - len(ids)))

    block = sample.film_block('a < b', torch.tensor(rows), writer)

    spans = [span.text for span in xml.etree.ElementTree.fromstring(f'<a>{block}</a>')]
    assert spans == ['a < b', f'\xa0 {texts[0]}', f'x {texts[1]}']


# -----------------------------------------------------------------------------
# The file itself

def test_info_prints_what_a_model_is(place, capsys):
    """Weights cannot be matched to the code and data that made them."""
    text = '\n'.join(lines_of(capsys, place / 'student.pt', '--info'))

    for said in ('iter: 7', "'calls': 1", "options: {'seed': 0}", 'data: words, rows of 24 tokens',
                 'tokenizer: byte, 260 tokens'):
        assert said in text


def test_export_is_smaller_and_writes_the_same(place, tmp_path, capsys):
    """The raw weights are exported in place of the averaged ones, or all is stored twice."""
    model, ckpt = models.load(place / 'student.pt')
    raw = models.build(model.config)
    more = {name: ckpt[name] for name in ('iter', 'meta', 'data', 'options')}
    models.save(tmp_path / 'model.pt', {'model': raw, 'ema': model}, optimizers=[], **more)
    small = tmp_path / 'small.pt'

    lines_of(capsys, tmp_path / 'model.pt', '--export', small)

    assert small.stat().st_size < 0.4 * (tmp_path / 'model.pt').stat().st_size
    exported, ckpt = models.load(small)
    difference = exported.net.head.weight - model.net.head.weight
    assert 0 < difference.abs().max() < 1e-2
    assert 'optimizers' not in ckpt
    lines_of(capsys, place / 'teacher.pt', '--export', small, '--overwrite')
    assert len(lines_of(capsys, small, '--nfe', 1)) == 8


# -----------------------------------------------------------------------------
# The script as a process

def start(*words, env=None):
    """Start `python sample.py words`."""
    command = [sys.executable, str(HERE / 'sample.py'), *map(str, words)]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', **(env or {})}
    # unbuffered, as `communicate` does not see what a buffer took beyond the first line
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            stdin=subprocess.DEVNULL, env=environment, bufsize=0)


@pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')
@pytest.mark.parametrize('how', ['Ctrl-C', 'head'])
def test_a_stop_keeps_the_texts_so_far(place, how):
    """A traceback of forty lines; texts that were there and are lost."""
    running = start(place / 'student.pt', '-n', 100000)
    first = [running.stdout.readline() for _ in range(3)]
    if how == 'Ctrl-C':
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=100)
    else:
        running.stdout.close()
        err = running.stderr.read()
        running.wait(timeout=100)

    assert all(line.endswith(b'\n') for line in first)
    if how == 'Ctrl-C':
        assert running.returncode == 130
        assert err.decode().splitlines()[-1] == 'sample.py: stopped'
    said = [line for line in err.decode().splitlines() if 'about' not in line]
    assert len(said) == (how == 'Ctrl-C')


# -----------------------------------------------------------------------------
# The weights that the authors publish. The expected numbers are what their code returned

PUBLISHED_V = 12
PUBLISHED_D = 16

# log-probabilities of the first position; then texts of 1 and of 4 calls, from the same noise
PUBLISHED_SAY = {
    'teacher': [-2.26518, -3.95207, -1.74644, -5.43511, -7.20182, -5.47501, -0.53683, -6.55213,
                -5.57443, -3.23645, -2.93475, -4.50802],
    'student': [-5.88546, -7.22452, -0.6634, -7.07397, -3.71573, -5.41609, -5.4008, -3.3603,
                -4.17699, -11.44835, -0.93494, -5.3898],
}
PUBLISHED_WRITE = {
    'teacher': {1: [6, 0, 0, 0, 0, 0], 4: [0, 0, 0, 0, 0, 0]},
    'student': {1: [2, 10, 2, 10, 10, 10], 4: [10, 10, 2, 10, 10, 10]},
}


def published_state(kind):
    """Small weights by the names of their class DIT, from numbers that numpy never changes."""
    V, D = PUBLISHED_V, PUBLISHED_D
    shapes = {'vocab_embed.embedding': (V, D)}
    for name in ['sigma_map', 'sigma_map_prime'][:1 + (kind == 'student')]:
        shapes[f'{name}.mlp.0.weight'] = (8, 256)
        shapes[f'{name}.mlp.0.bias'] = (8,)
        shapes[f'{name}.mlp.2.weight'] = (8, 8)
        shapes[f'{name}.mlp.2.bias'] = (8,)
    for i in range(2):
        shapes[f'blocks.{i}.norm1.weight'] = (D,)
        shapes[f'blocks.{i}.attn_qkv.weight'] = (3 * D, D)
        shapes[f'blocks.{i}.attn_out.weight'] = (D, D)
        shapes[f'blocks.{i}.norm2.weight'] = (D,)
        shapes[f'blocks.{i}.mlp.0.weight'] = (4 * D, D)
        shapes[f'blocks.{i}.mlp.0.bias'] = (4 * D,)
        shapes[f'blocks.{i}.mlp.2.weight'] = (D, 4 * D)
        shapes[f'blocks.{i}.mlp.2.bias'] = (D,)
        shapes[f'blocks.{i}.adaLN_modulation.weight'] = (6 * D, 8)
        shapes[f'blocks.{i}.adaLN_modulation.bias'] = (6 * D,)
    shapes['output_layer.norm_final.weight'] = (D,)
    shapes['output_layer.linear.weight'] = (V, D)
    shapes['output_layer.linear.bias'] = (V,)
    shapes['output_layer.adaLN_modulation.weight'] = (2 * D, 8)
    shapes['output_layer.adaLN_modulation.bias'] = (2 * D,)
    numbers = np.random.RandomState(0)
    state = {}
    for name, shape in shapes.items():
        # queries and keys so large that the cap on attention matters
        size = 1.2 if 'qkv' in name else 1.0 if 'linear' in name or 'embed' in name else 0.3
        state[name] = torch.tensor(size * numbers.randn(*shape), dtype=torch.float32)
    state['rotary_emb.inv_freq'] = 10000 ** (-torch.arange(4) / 4)
    return state


def write_safetensors(path, state):
    """A .safetensors file of a state dict in fp32."""
    header = {'__metadata__': {'format': 'pt'}}
    numbers = b''
    for name, x in state.items():
        data = x.float().numpy().tobytes()
        place = [len(numbers), len(numbers) + len(data)]
        header[name] = {'dtype': 'F32', 'shape': list(x.shape), 'data_offsets': place}
        numbers += data
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, 'little') + text + numbers)


@pytest.mark.parametrize('kind', ['teacher', 'student'])
def test_published_weights_predict_and_write_as_with_the_authors_code(kind):
    """
    A name mapped to the wrong weight, a lost 1 +, another cap, GELU, scale of tau or rotary half,
    the two times swapped, new ids that are written.
    """
    x = torch.tensor(np.random.RandomState(1).randn(1, 6, PUBLISHED_V), dtype=torch.float32)
    flow = sample.from_published(published_state(kind), 6, new=4)
    h = x @ flow.net.embed[:PUBLISHED_V]
    t = torch.tensor([0.75]) if kind == 'student' else None

    with torch.no_grad():
        logits = flow.predict(h, nothing_given(1), torch.tensor([0.25]), t)
    said = logits[0, 0, :PUBLISHED_V].log_softmax(-1)
    flow.noise = lambda *how: h
    written = {nfe: flow.sample(nothing_given(1), nfe)[0].tolist() for nfe in (1, 4)}

    torch.testing.assert_close(said, torch.tensor(PUBLISHED_SAY[kind]), atol=3e-5, rtol=0)
    assert written == PUBLISHED_WRITE[kind]


@pytest.mark.parametrize('vocab, times', [
    (30522, [0.773478, 0.804477, 0.828097]), (50258, [0.779238, 0.808741, 0.831367])])
def test_tau_of_published_weights_is_that_of_their_vocabulary(vocab, times):
    """Our special tokens counted in K, or a coarser table than theirs."""
    ts, taus = models.reparameterization(vocab)

    found = models.piecewise_linear(torch.tensor([0.25, 0.5, 0.75], dtype=DOUBLE), taus, ts)

    torch.testing.assert_close(found, torch.tensor(times, dtype=DOUBLE), atol=2e-5, rtol=0)


@pytest.mark.parametrize('vocab, calls, parameters', [
    (30522, 0, 139_292_986), (30522, 1, 139_342_394),
    (50258, 0, 169_627_218), (50258, 1, 169_676_626)])
def test_the_papers_network_has_the_published_number_of_parameters(vocab, calls, parameters):
    """A bias too many, or a missing one."""
    config = Config(vocab, 8, layers=12, heads=12, width=768, channels=768, network='paper',
                    calls=calls)

    with torch.device('meta'):
        net = models.Denoiser(config, vocab)

    assert sum(p.numel() for p in net.parameters()) == parameters


def test_a_published_file_becomes_an_ordinary_checkpoint(here, monkeypatch, capsys):
    """A converted model that sample and distill do not take, or a file fetched twice."""
    monkeypatch.setattr(sample, 'PUBLISHED_VOCAB', {12: ('byte', 6, 4)})
    monkeypatch.setattr(sample, 'make_tokenizer', lambda how, texts: {
        'name': 'words:16', 'pattern': '.', 'tokens': list('abcdefghijkl')})
    path = here / 'FLM-B-TINY' / 'model.safetensors'
    write_safetensors(path, published_state('teacher'))

    status, out, err = call(capsys, sample, '--official', path, '-n', 3, '--nfe', 2)
    path.unlink()
    again = call(capsys, sample, 'out/FLM-B-TINY', '-n', 3, '--nfe', 2)

    assert status == 0, err
    assert out.count('\n') == 3
    assert again[1] == out
    model, _ = models.load('out/FLM-B-TINY')
    assert model.taus[500] == models.reparameterization(12)[1].float()[500]
    refused = call(capsys, sample, 'out/FLM-B-TINY', '--prompt', 'a')
    assert refused[0] == 2
    assert 'without given tokens' in refused[2]


@pytest.mark.parametrize('change, said', [
    (lambda state, path: path.write_bytes(b'no tensors'), 'damaged, or not'),
    (lambda state, path: path.write_bytes(path.read_bytes()[:-9]), 'damaged, or not'),
    (lambda state, path: write_safetensors(path, {'a': torch.ones(2)}), 'not of FLM'),
    (lambda state, path: write_safetensors(path, {**state, 'more': torch.ones(2)}), 'more'),
    (lambda state, path: write_safetensors(
        path, {name: x for name, x in state.items() if 'rotary' not in name}), 'rotary_emb'),
    (lambda state, path: write_safetensors(
        path, {**state, 'output_layer.linear.bias': torch.ones(3)}), 'head.bias'),
])
def test_what_is_no_published_file_is_refused(here, monkeypatch, capsys, change, said):
    """A traceback, or a checkpoint of half of the weights."""
    monkeypatch.setattr(sample, 'PUBLISHED_VOCAB', {12: ('byte', 6, 4)})
    path = here / 'FLM-B-TINY' / 'model.safetensors'
    state = published_state('teacher')
    write_safetensors(path, state)
    change(state, path)

    status, out, err = call(capsys, sample, '--official', path)

    assert (status, out) == (2, '')
    assert said in err.split('\n')[-2]
    assert not os.path.exists('out/FLM-B-TINY')


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), RuntimeError('offline')])
def test_failed_downloads_are_one_line(here, monkeypatch, capsys, error):
    """A traceback of the hub's client."""
    def fails(*how, **more):
        raise error

    hub = pytest.importorskip('huggingface_hub')
    monkeypatch.setattr(hub.HfApi, 'list_repo_commits', fails)

    status, out, err = call(capsys, sample, '--official', 'FMLM-B-LM1B')

    assert (status, out) == (2, '')
    assert 'cannot be fetched' in err.split('\n')[-2]


# =============================================================================
# bench.py

def untrained(kind, length=6, vocab=12, width=32, channels=8):
    """An untrained model whose head is not zero."""
    student = kind == 'student'
    config = models.Config(vocab, length, layers=2, heads=2, width=width, channels=channels,
                           cond=16, model='flm' if student else kind, calls=int(student))
    network = models.build(config)
    torch.nn.init.normal_(network.net.head.weight)
    return network.eval()


def figures_in(path):
    """The runs of a JSON file: [(model, nfe, figures of the first seed)]."""
    runs = json.loads(Path(path).read_text())['runs']
    return [(run['model'], run['nfe'], run['seeds'][0]) for run in runs]


# -----------------------------------------------------------------------------
# Distances

def test_distances_by_hand():
    """A divergence in bits, of unequal weights, or not a number for texts without an n-gram;
    n-grams that no text has; rows compared with themselves, so that equal ones seem apart."""
    assert bench.ngram_divergence('aab', 'abb') == pytest.approx(math.log(32 / 27) / 3)
    assert bench.ngram_divergence('aab', 'baa') == pytest.approx(0, abs=1e-12)
    assert bench.ngram_divergence('aab', 'c') == pytest.approx(math.log(2))
    assert bench.ngram_divergence([], 'c') == pytest.approx(math.log(2))
    assert bench.all_ngrams([[1, 2, 3], [4], [5, 6]], 2) == [(1, 2), (2, 3), (5, 6)]
    # bags of one token: |x - y| is sqrt 2 or 0
    want = 2 * math.sqrt(2) / 2 - math.sqrt(2) - 0
    assert bench.energy_distance([[1], [2]], [[1], [1]]) == pytest.approx(want, abs=1e-6)


def test_repetition_does_not_fool_the_distances():
    """A figure that is best for a few likely rows over and over, as perplexity is."""
    # each of 40 words is followed by few others: a text whose perplexity is known exactly
    rng = np.random.default_rng(0)
    chain = rng.dirichlet(np.full(40, 0.2), 40)

    def draw_row():
        row = [0]
        for _ in range(23):
            row.append(int(rng.choice(40, p=chain[row[-1]])))
        return row

    def nats(row):
        return -np.mean([np.log(chain[a, b]) for a, b in zip(row, row[1:])])

    real = [draw_row() for _ in range(400)]
    other = [draw_row() for _ in range(400)]
    likely = sorted((row[:12] * 2 for row in real), key=nats)[:7] * 57
    assert np.mean([nats(row) for row in likely]) < np.mean([nats(row) for row in real])

    good = bench.energy_distance(other, real)
    bad = bench.energy_distance(likely, real)
    grams = [bench.all_ngrams(rows, 3) for rows in (real, other, likely)]

    assert abs(good) < 0.1 < bad
    near, far = [bench.ngram_divergence(grams[i], grams[0]) for i in (1, 2)]
    assert far > 2 * near


def test_copies_are_found_wherever_they_stand(place):
    """Only the first part of a large training set is looked through; copies in a stream, whose
    training text is cut where no sample is."""
    meta, train, _ = prepare_data.load_dataset(place / 'data/words')
    rows = prepare_data.as_rows(train, meta['length'])
    texts = [ids for _, ids in prepare_data.split_rows(rows[-3:], meta)]

    seen = bench.training_texts(train, meta, rows_at_once=50)

    assert bench.copied([*texts, [1, 2, 3]], seen) == 0.75
    data = prepare_data.load_dataset(place / 'data/stream')
    options = bench.parse(['quality', 'm.pt', '--rows', '4'])
    reference = bench.Reference(str(place / 'data/stream'), data, options, None)
    assert 'copied' not in bench.text_figures(reference.shown, reference)


def test_perplexity_is_of_the_text_and_not_of_the_padding():
    """Padding that is scored, or rows that count alike; a stream scored up to its <eos> only."""
    scorer = untrained('ar')
    # V is 12, so <eos> is 8 and <pad> 9
    meta = {'kind': 'rows', 'special': {'<eos>': 8, '<pad>': 9, '<sep>': 10, '<bos>': 11}}
    rows = torch.tensor([[1, 2, 8, 9, 9, 9], [3, 3, 3, 3, 3, 8]])

    perplexity = bench.generative_perplexity(rows, meta, scorer)

    before = torch.cat([torch.full((2, 1), 11), rows[:, :-1]], dim=1)
    log_p = scorer.predict(before).log_softmax(-1).gather(2, rows[..., None])[..., 0]
    want = math.exp(-(log_p[0, :3].sum() + log_p[1].sum()).item() / 9)
    assert perplexity == pytest.approx(want, rel=1e-4)
    assert bench.scored_positions(rows, {**meta, 'kind': 'stream'}).all()


# -----------------------------------------------------------------------------
# Pairs

def test_scores_of_pairs_by_hand():
    """A BLEU whose reference and hypothesis have changed places; dist-1 over words of several
    texts, div-4 of characters, or a recall called ROUGE-L; all other texts as references."""
    text = 'the cat sat on the mat today'
    reference = 'the cat sat on the red mat'
    theirs = sacrebleu.sentence_bleu(text, [reference], smooth_method='none', tokenize='none')
    assert sample.bleu(text, reference) == pytest.approx(theirs.score / 100)

    assert bench.distinct(['a a b'], 1) == pytest.approx(2 / 3)
    assert bench.distinct(['a b c d e', 'a b c d f'], 4) == pytest.approx(3 / 4)
    # 2 of 3 and 2 of 4 words in common: F is 4/7
    assert bench.rouge_l('the cat sat', 'the black cat ran') == pytest.approx(4 / 7)

    a, b, c = ['a b c d e', 'a b c d f g', 'x y a b c']
    want = (sample.bleu(a, b) + sample.bleu(a, c) + sample.bleu(b, c)) / 3
    assert bench.self_bleu([a, b, c]) == pytest.approx(want)
    assert bench.self_bleu([a] * 3) == pytest.approx(1)
    assert bench.self_bleu([a]) == 0


@pytest.mark.parametrize('text, other', [
    ('the cat sat on the mat', 'seven old dogs ran far away'),
    ('η γάτα κάθισε στο χαλί', 'επτά σκύλοι έτρεξαν πολύ μακριά'),
    ('جلست القطة على السجادة', 'ركض سبعة كلاب بعيدا جدا'),
    ('बिल्ली चटाई पर बैठ गई', 'सात कुत्ते दूर भाग निकले'),
    ('고양이가 매트 위에 조용히 앉았다', '개 일곱 마리가 멀리 달아났다'),
    ('猫坐在垫子上。', '七只老狗跑得很远！'),
    ('ねこがマットにすわった', '七ひきの犬は遠くへ行く'),
    ('แมวนั่งบนเสื่อ', 'ฝูงสุนัขวิ่งหนีไปไกล')])
def test_scores_of_pairs_know_every_script(text, other):
    """A right answer that scores 0, as its letters are not a to z or its words have no spaces."""
    assert bench.rouge_l(text, text) == 1
    assert sample.bleu(text, text) == pytest.approx(1)
    assert bench.rouge_l(text, other) < 0.5
    assert sample.bleu(text, other) < 0.5


def test_words_of_scripts_without_spaces_are_their_characters():
    """A Chinese text that is one word, so that none is ever repeated and none is in common."""
    assert sample.split_words('我爱 北京。ok, go') == ['我', '爱', '北', '京', '。', 'ok,', 'go']
    assert bench.distinct(['好好好好'], 1) == 1 / 4
    assert bench.rouge_l('我爱你', '我爱她') == pytest.approx(2 / 3)
    assert bench.self_bleu(['我爱北京天安门'] * 2) == pytest.approx(1)
    assert sample.most_alike(['七只老狗跑', '我爱北京天', '我爱北京啊']) > 0


def test_scores_of_latin_text_are_those_that_others_publish():
    """Words of our own in an English text, whose figures no longer compare with any other."""
    text = "Don't ask; what's 1,000 x_y of THIS -- (again)? e-mail me\tat a.b@c.de!"
    other = 'What is 1000 of this? Mail ME at a b (c) de, again and again.'
    theirs = RougeScorer(['rougeL'])

    assert sample.split_words(text) == text.split()
    assert bench.RougeWords().tokenize(text) == DefaultTokenizer().tokenize(text)
    assert bench.rouge_l(text, other) == theirs.score(other, text)['rougeL'].fmeasure


def number_pairs(place, *words):
    """(Reference, its options) of pairs for a command line."""
    options = bench.parse(['quality', 'm.pt', *words])
    folder = place / 'data/numbers'
    data = prepare_data.load_dataset(folder)
    return bench.Reference(str(folder), data, options, None), options


def test_mbr_scores_one_sample_of_each_source(place):
    """Choosing among the samples of different sources, or scoring all of them."""
    reference, options = number_pairs(place, '--rows', '6', '--mbr', '3')
    known, _ = bench.draw(reference, seed=0)
    # of the first source two rows out of three are right, of the other one all
    rows = known.clone()
    rows[0] = known[3]
    rows[0, :4] = known[0, :4]

    figures = bench.source_figures(rows, known, reference, options)

    sources = [source for source, _ in prepare_data.to_texts(known, reference.meta)]
    assert sources == [sources[0]] * 3 + [sources[3]] * 3
    assert figures['bleu'] == pytest.approx(1)


def test_only_the_source_is_given(place):
    """A model that is shown the text it is to write, which then scores 1; a source twice."""
    reference, _ = number_pairs(place, '--rows', '40', '--per-source', '2')

    known, given = bench.draw(reference, seed=0)

    sep = reference.meta['special']['<sep>']
    for row, shown in zip(known.tolist(), given.tolist()):
        at = row.index(sep) + 1
        assert shown == row[:at] + [-1] * (len(row) - at)
    assert torch.equal(known[0::2], known[1::2])
    assert len(known[0::2].unique(dim=0)) == 20


def test_a_row_is_never_longer_than_rows_are(place):
    """A copy of a long source that does not fit its row, and ends the run."""
    reference, _ = number_pairs(place)
    L = reference.meta['length']
    parts = prepare_data.split_rows(reference.held, reference.meta)

    again = bench.pair_rows(parts, reference.meta)
    long = bench.pair_rows([([1] * (L - 2), [2, 3, 4])], reference.meta)

    assert prepare_data.split_rows(again, reference.meta) == parts
    assert prepare_data.split_rows(long, reference.meta) == [([1] * (L - 2), [2])]


# -----------------------------------------------------------------------------
# Quality, as it is called

def test_quality_of_several_models_and_seeds(place, here, capsys):
    """A seed that is not used, a model in a line of another name, calls that nobody can make."""
    for seed in (0, 1):
        more = {'seconds': 60 + seed}
        make_model(Path(f'out/{seed}/student.pt'), place / 'data/words', seed, more, calls=1)
    ar = str(place / 'ar.pt')

    status, out, _ = call(capsys, bench, 'quality', 'out/{seed}/student.pt', ar, '--nfe', 1, 2,
                          '--rows', 20, '--seeds', 2, '--scorer', ar, '--out', 'q.json')

    assert status == 0
    written = json.loads(Path('q.json').read_text())
    # ar makes a call for each of 24 tokens, whatever is asked for
    lines = [(line['model'], line['nfe']) for line in written['runs']]
    assert lines == [('held-out text', ''), ('the same, shuffled', ''),
                     ('out/{seed}/student.pt', 1), ('out/{seed}/student.pt', 2), (ar, 24)]
    first, second = written['runs'][2]['seeds']
    assert first['js1'] != second['js1']
    assert (first['train_minutes'], second['train_minutes']) == (1, 61 / 60)
    assert first['gen_ppl'] > 1
    assert {'device', 'cpu_capability', 'torch', 'threads', 'date', 'command'} <= set(written)
    assert written['trained']['out/1/student.pt'] == {'seed': 1}
    assert out.count('| out/{seed}/student.pt |') == 2
    xml.etree.ElementTree.parse('q.svg')


TEXT_METRICS = {'js1', 'js2', 'js3', 'energy', 'copied', 'unique'}
PAIRS = {'entropy', 'unique', 'words', 'bleu', 'rouge_l', 'dist1'}


@pytest.mark.parametrize('name, words, figures', [
    ('student', '', {'entropy', 'words', *TEXT_METRICS}),
    ('stories', '', {'well_formed', 'valid', 'slot_entropy', 'slot_divergence', *TEXT_METRICS,
                     'copied_by_chance'}),
    ('pairs', '', PAIRS),
    ('pairs', '--per-source 2', {'self_bleu', 'div4', *PAIRS}),
    ('pairs', '--mbr 2', PAIRS),
    # any of eight texts is right
    ('dates', '', {'valid', 'form_entropy'}),
])
def test_figures_of_each_kind_of_data(place, here, capsys, name, words, figures):
    """A figure that is lost, or that stands beside none of real text; a target taken for the only
    right one; figures of several samples where there is one."""
    path = place / f'{name}.pt'
    if name == 'stories':
        folder = make_data(here / 'data/stories', prepare_data.stories(300), 'stories', 21)
        path = make_model(here / 'stories.pt', folder, calls=1)

    status, _, err = call(capsys, bench, 'quality', path, '--nfe', 1, '--rows', 8, *words.split(),
                          '--out', 'q.json')

    *references, (_, nfe, ours) = figures_in('q.json')
    assert status == 0, err
    assert nfe == 1
    assert set(ours) == {*figures, 'ms_per_row', 'train_iters'}
    for _, nfe, theirs in references:
        assert nfe == ''
        assert set(theirs) == figures
    names = [name for name, _, _ in references]
    assert names in (['held-out text', 'the same, shuffled'],
                     ['the source itself', 'another target'])
    if name == 'pairs':
        # '7' beside 'tell me 7 more', then 'tell me 8 more', of which three words are right
        scores = [theirs['rouge_l'] for _, _, theirs in references]
        assert scores == pytest.approx([2 / 5, 3 / 4])
    if name == 'stories':
        assert ours['copied_by_chance'] == prepare_data.expected_seen(240)
        assert references[0][2]['valid'] == 1


@pytest.mark.parametrize('package', ['nltk', 'rouge_score'])
def test_missing_packages_are_named_first(place, here, monkeypatch, capsys, package):
    """An ImportError after all samples are drawn."""
    find_spec = prepare_data.importlib.util.find_spec
    monkeypatch.setattr(prepare_data.importlib.util, 'find_spec',
                        lambda name: None if name == package else find_spec(name))

    status, _, err = call(capsys, bench, 'quality', place / 'pairs.pt', '--rows', 20)

    assert status == 2
    assert f'pip install {package.replace("_", "-")}' in err
    # for dates there is no need of them
    assert call(capsys, bench, 'quality', place / 'dates.pt', '--nfe', 1, '--rows', 4)[0] == 0


@pytest.mark.parametrize('name, words, rows', [
    ('student', [], 20), ('pairs', [], 20), ('pairs', ['--mbr', 3], 60),
    ('pairs', ['--per-source', 101, '--rows', 300], 202), ('student', ['--rows', 20], 20)])
def test_as_many_rows_as_the_text_allows(place, capsys, name, words, rows):
    """A default that small data are refused for, or fewer rows in silence."""
    _, ckpt = models.load(place / f'{name}.pt')
    options = bench.parse(['quality', 'm.pt', *map(str, words)])
    held = 40 if name == 'student' else 20

    assert bench.rows_to_draw(options, ckpt['meta'], held) == rows
    told = capsys.readouterr().out
    assert (f'measuring {rows} samples' in told) == (rows != options.rows)


def test_what_was_measured_outlives_failure_and_stop(place, here, monkeypatch, capsys):
    """An hour of figures lost to one model, or since they are only written at the end."""
    measure = bench.measure

    def fail_then_work_then_stop(name, nfe, *how):
        if nfe == 1:
            raise RuntimeError('out of memory\nwith many more lines')
        if nfe == 3:
            raise KeyboardInterrupt
        return measure(name, nfe, *how)

    monkeypatch.setattr(bench, 'measure', fail_then_work_then_stop)
    name = str(place / 'student.pt')
    words = ['quality', name, '--rows', '20', '--nfe', '1', '2']
    failed, _, err = call(capsys, bench, *words, '--out', 'failed.json')
    with pytest.raises(SystemExit) as end:
        prepare_data.run_script(lambda: bench.main(bench.parse([*words, '3'])))

    said = f'{name}, nfe 1: failed: RuntimeError: out of memory'
    assert failed == 1
    assert said in err.splitlines()
    assert json.loads(Path('failed.json').read_text())['failed'] == [said]
    assert end.value.code == 130
    # without --out, a name that nothing had
    stopped, = Path('out').glob('quality-*.json')
    for path in (stopped, 'failed.json'):
        assert [line[1] for line in figures_in(path)] == ['', '', 2]


def test_data_that_were_prepared_again_are_refused(place, here, capsys):
    """Samples compared with other text than the model knows; equal folders that count as two."""
    meta, train, val = prepare_data.load_dataset(place / 'data/words')
    for name in ('data/a', 'data/b'):
        prepare_data.save_dataset(name, train, val, meta['tokenizer'], 'rows', False, 24, 'here')
        make_model(Path(f'{name[-1]}.pt'), name, calls=1)
    words = ['quality', 'a.pt', 'b.pt', '--nfe', 1, '--rows', 20]

    assert call(capsys, bench, *words)[0] == 0
    make_data(Path('data/a'), ['other'] * 99, 'byte', 24)
    assert 'other data' in call(capsys, bench, *words)[2]
    shutil.rmtree('data/a')
    assert 'prepare_data.py' in call(capsys, bench, *words)[2]


# -----------------------------------------------------------------------------
# Speed

@pytest.fixture
def quick(monkeypatch):
    """No timing in earnest: each work is done once, and machines are of known rates."""
    def once(work):
        work()
        return 0.5

    monkeypatch.setattr(bench, 'median_seconds', once)
    monkeypatch.setattr(bench, 'machine_rates', lambda device: (1e9, 1e9))


@pytest.mark.parametrize('kind', ['student', 'flm', 'diffuseq', 'mdlm', 'ar'])
def test_the_bound_counts_what_is_computed(kind):
    """Products that are not computed (a table's), or some left out: a bound that is none."""
    network = untrained(kind, length=16, vocab=40)
    nfe = 16 if kind == 'ar' else 3
    nothing = torch.full((2, 16), -1)

    # the counter knows attention only as the products that it is made of
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network.sample(nothing, nfe)
        counted = counter.get_total_flops()

    least = 2 * bench.row_flops(network, nfe)
    # times, noise and the like are left out: they are small beside the rest of a real model
    assert 0.75 * counted < least <= counted


def test_tables_are_not_products():
    """The table of known tokens, V x D, where only rows are looked up, counted as a product."""
    small = untrained('flm', vocab=40)
    large = untrained('flm', vocab=4000)

    more = bench.denoiser_weights(large.net) - bench.denoiser_weights(small.net)

    # the head alone
    assert more == 3960 * 32
    weights = sum(p.nbytes for p in large.net.parameters())
    tables = large.net.embed.nbytes + large.net.known.weight.nbytes
    assert bench.bytes_read(large, 1, 1, 4) == weights - tables
    assert bench.bytes_read(large, 1, 3, 4) == 3 * (weights - tables) + 2 * large.net.embed.nbytes


def test_the_bound_is_the_longer_of_two():
    """A bound below what a machine can do, or times that do not grow with the rows."""
    network = untrained('mdlm')
    work = bench.row_flops(network, 2)

    assert bench.roofline_bound(network, 3, 2, (1.0, 1e30), 4) == 3 * work
    assert bench.roofline_bound(network, 3, 2, (1e30, 1.0), 4) == bench.bytes_read(network, 3, 2, 4)


def test_speed_of_checkpoints_and_sizes(place, quick, here, capsys):
    """Calls of one model given to another; a batch that is left out; a folder named runs@home."""
    make_model(Path('runs@home/m.pt'), place / 'data/words', calls=1)

    status, out, _ = call(capsys, bench, 'speed', 'runs@home/m.pt@1,3', 'ar,8,16,8',
                          'diffuseq,8,16,8', '--nfe', 2, '--batch', 1, 2, '--layers', 1,
                          '--out', 's.json')

    lines = [(name, nfe, figures['batch']) for name, nfe, figures in figures_in('s.json')]
    assert status == 0
    assert lines == [('runs@home/m.pt', 1, 1), ('runs@home/m.pt', 3, 1), ('runs@home/m.pt', 1, 2),
                     ('runs@home/m.pt', 3, 2), ('ar,8,16,8', 8, 1), ('ar,8,16,8', 8, 2),
                     ('diffuseq,8,16,8', 2, 1), ('diffuseq,8,16,8', 2, 2)]
    assert figures_in('s.json')[-1][2]['rows_per_s'] == 4
    assert json.loads(Path('s.json').read_text())['GFLOP_per_s'] == 1
    assert bench.split_calls('runs@home/m.pt') == ('runs@home/m.pt', [])


# -----------------------------------------------------------------------------
# Training

def test_dense_and_projected_are_the_same_loss():
    """A formulation that is slow, or fast, since it computes something else."""
    # of so few tokens the projected formulation draws all V normals, too
    network = untrained('flm', vocab=12, channels=16)
    tokens = torch.randint(8, (4, 6))
    given = torch.full_like(tokens, -1)
    tau = torch.rand(4)

    torch.manual_seed(1)
    projected = network.loss(tokens, given, tau)
    torch.manual_seed(1)
    dense = bench.dense_loss(network, tokens, given, tau)

    torch.testing.assert_close(dense, projected)


def test_the_plain_gpt_predicts_each_token_from_those_before():
    """A ceiling of another size, or one that sees what it is to predict."""
    torch.manual_seed(0)
    network = bench.GPT(6, 12, 32, 2)
    tokens = torch.randint(12, (3, 6))
    hidden = []
    network.norm.register_forward_hook(lambda module, inputs, output: hidden.append(output))

    loss = network(tokens)
    network(torch.cat([tokens[:, :3], tokens[:, 3:].flip(1)], 1))

    assert loss.item() == pytest.approx(math.log(12), abs=0.5)
    assert torch.allclose(hidden[0][:, :3], hidden[1][:, :3], atol=1e-6)
    assert not torch.allclose(hidden[0][:, 3:], hidden[1][:, 3:], atol=1e-3)
    flow = bench.new_model('flm', 6, 12, 32, 2)
    assert bench.matrix_weights(network.blocks) == bench.matrix_weights(flow.net.blocks)


def test_train_times_every_formulation(here, quick, capsys):
    """A formulation that is left out; tokens that are rows."""
    status, _, _ = call(capsys, bench, 'train', '2,8,16,8', '--layers', 1, '--out', 't.json')

    lines = figures_in('t.json')
    assert status == 0
    assert [line[0] for line in lines] == ['projected 2,8,16,8', 'dense 2,8,16,8', 'gpt 2,8,16,8']
    for _, _, figures in lines:
        assert (figures['tokens'], figures['tokens_per_s']) == (16, 32)
        assert figures['mfu'] > 0


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='peaks are read from /proc')
def test_a_peak_is_of_the_work_since_the_last_one():
    """A small peak that is hidden by a larger one before."""
    def take(megabytes):
        held = bytearray(megabytes * 10 ** 6)
        held[::4096] = b'x' * len(held[::4096])

    take(600)
    bench.peak_memory(CPU)
    before = bench.peak_memory(CPU)
    take(300)

    # the system may have taken back some pages meanwhile
    assert 100e6 < bench.peak_memory(CPU) - before < 400e6


@pytest.mark.parametrize('script', ['sample', 'train_teacher', 'distill', 'bench'])
def test_ctrl_c_while_torch_is_loaded_is_one_line(script, tmp_path):
    """A traceback for someone who saw at once that the command line was wrong."""
    slow = 'print("loading", flush=True)\nimport time\ntime.sleep(60)\n'
    (tmp_path / 'torch.py').write_text(slow)
    run = subprocess.Popen([sys.executable, HERE / f'{script}.py'], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True,
                           env={**os.environ, 'PYTHONPATH': str(tmp_path)})

    assert run.stdout.readline() == 'loading\n'
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)

    assert run.returncode != 0
    assert said == f'{script}.py: stopped\n'


# -----------------------------------------------------------------------------
# Tables and pictures

def test_a_printed_line_has_means_and_half_the_range(here, capsys):
    """A spread of one seed; a figure under another one's name."""
    report = bench.Report(bench.parse(['quality', '--out', 'q.json']), CPU)

    report.add('real', '', [{'js1': 0.5}])
    report.add('model', 4, [{'js1': 1.0, 'ms': 2000.0}, {'js1': 2.0, 'ms': 2000.0}])
    report.add('model', 8, [{'js1': 1.0, 'ms': 2000.0}])

    assert capsys.readouterr().out.split('\n') == [
        '', '|  | nfe | js1 |', '|---|---|---|', '| real |  | 0.5 |',
        '', '|  | nfe | js1 | ms |', '|---|---|---|---|', '| model | 4 | 1.5 (0.5) | 2,000 |',
        '| model | 8 | 1 | 2,000 |', '']


def test_a_picture_has_a_line_for_each_model(here):
    """Real text drawn as a model; points of several models joined by one line."""
    figures = {'energy': 1.0, 'ms_per_row': 2.0}
    lines = [('held-out text', '', [{'energy': 0.1}])]
    lines += [(f'out/{name}', nfe, [figures]) for name in ('a/teacher', 'b') for nfe in (1, 4)]

    bench.picture(lines, 'q.svg')
    bench.picture(lines, 'again.svg')

    drawn = Path('q.svg').read_text()
    assert Path('again.svg').read_text() == drawn
    assert drawn.count('<!-- a/teacher -->') == drawn.count('<!-- out/b -->') == 1
    assert '<!-- held-out text -->' not in drawn


PAGE_WITH_A_TABLE = '''Before.
<!-- table: data/f.json
student = flow/student @ 1 4; rival, slow = data/g.json:ar
valid = {valid:.1%}; +- = {valid_spread:.0%}; 8 rows = {ms_8:.1f} ({times_8:.0f})
minutes = {train_minutes:.0f}
-->
| something old |
<!-- end -->
After.
'''


def test_a_table_of_a_page_is_made_from_its_figures(here, capsys):
    """Figures of another model or batch; a page that differs each time."""
    def line(model, nfe, *seeds):
        return {'model': model, 'nfe': nfe, 'seeds': list(seeds)}

    runs = [line('out/{seed}/flow/student', 1, {'valid': 0.5}, {'valid': 0.75}),
            line('out/{seed}/flow/student', 2, {'valid': 1.0}),
            line('out/{seed}/flow/student', 4, {'batch': 1, 'ms': 1.0, 'times': 2.0}),
            line('out/{seed}/flow/student', 4, {'batch': 8, 'ms': 3.0, 'times': 4.0}),
            line('out/ar', 21, {'valid': 0.9375, 'train_minutes': 12.0})]
    Path('data').mkdir()
    Path('data/f.json').write_text(json.dumps({'runs': runs[:-1]}))
    Path('data/g.json').write_text(json.dumps({'runs': runs[-1:]}))

    made = bench.fill_tables(PAGE_WITH_A_TABLE, here)

    table = made.split('-->\n')[1].split('<!-- end')[0].splitlines()
    assert table == [
        '| [f](data/f.json) | calls | valid | +- | 8 rows | minutes |',
        '|---|---|---|---|---|---|',
        '| student | 1 | 62.5% | 12% |  |  |',
        '| student | 4 |  |  | 3.0 (4) |  |',
        '| rival, slow | 21 | 93.8% | 0% |  | 12 |']
    assert made.replace('\n'.join(table), '| something old |') == PAGE_WITH_A_TABLE
    assert bench.fill_tables(made, here) == made
    with pytest.raises(SystemExit):
        bench.fill_tables(PAGE_WITH_A_TABLE.replace('flow/student', 'elsewhere'), here)
    assert "'elsewhere'" in capsys.readouterr().err


@pytest.mark.parametrize('page', ['README.md', *(f'assets/{path.name}' for path in
                                                 sorted((HERE / 'assets').glob('*.md')))])
def test_the_pages_have_the_figures_that_were_measured(page):
    """A table that is older than its figures; run `python bench.py tables`."""
    text = (HERE / page).read_text(encoding='utf-8')

    assert bench.fill_tables(text, (HERE / page).parent) == text


# =============================================================================
# What the scripts advise: every command that one of them prints is run here

SCRIPTS = {'prepare_data.py': prepare_data, 'train_teacher.py': train_teacher,
           'distill.py': distill, 'sample.py': sample, 'bench.py': bench}
# what makes a matter of seconds of each
QUICK = {'train_teacher.py': (*SMALL, '--iters', 1), 'distill.py': ('--batch', 4, '--iters', 1),
         'bench.py': ('--rows', 2, '--nfe', 1)}

# the function that prints a command, and a command line that makes it do so
ADVISED = [
    ('prepare_data.load_dataset', "train_teacher.py --data 'my text.txt'"),
    ('prepare_data.command_for', "train_teacher.py --data 'my data/dates'"),
    ('prepare_data.command_for', 'train_teacher.py --data data/damaged'),
    ('prepare_data.newest_dataset', 'train_teacher.py'),
    ('prepare_data.check', "prepare_data.py stories --input 'my text.txt' 'my text.txt'"),
    ('prepare_data.check', "prepare_data.py 'my text.txt'"),
    ('prepare_data.main', "prepare_data.py mine --input 'my text.txt' --length 8"),
    ('prepare_data.main', "prepare_data.py mine --input 'my text.txt' --length 8 --data 'my data'"),
    ('train_teacher.main', "train_teacher.py --data '{dozen}/data' --out 'my out/teacher'"),
    ('train_teacher.main', "train_teacher.py --data '{dozen}/data' --model diffuseq"),
    ('train_teacher.sample_command', "train_teacher.py --data '{dozen}/data' --model mdlm"),
    ('train_teacher.sample_command', "train_teacher.py --data '{plain}/data' --model ar"),
    ('distill.load_teacher', 'distill.py --data {dozen}/data'),
    ('distill.load_teacher', 'distill.py {small}/ar/teacher'),
    ('train_teacher.sample_command', "distill.py {small}/flow/teacher --out 'my out'"),
    ('train_teacher.sample_command', 'distill.py {small}/diffuseq/teacher --out new'),
    ('train_teacher.sample_command', 'distill.py {small}/mdlm/teacher --out new --rounds 1'),
    ('bench.newest_pair', 'bench.py quality'),
    ('bench.open_scorer', 'bench.py quality {plain}/teacher --rows 2 --scorer {plain}/teacher'),
    ('model.load', 'sample.py missing'),
]


def run_line(capfd, line, more=()):
    """Run a command line without its `python`: (exit status, all that it printed)."""
    name, *words = shlex.split(line)
    script = SCRIPTS[name]
    words = [str(word) for word in (*words, *more)]
    status = 0
    try:
        script.main(words if script is prepare_data else script.parse(words))
    except SystemExit as end:
        status = end.code or 0
    out, err = capfd.readouterr()
    return status, out + err


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    """A flow of texts without a source."""
    folder = tmp_path_factory.mktemp('plain')
    small_dataset(folder / 'data')
    run_main(train_teacher, '--data', folder / 'data', '--out', folder / 'teacher', *SMALL,
             '--iters', 1)
    return folder


@pytest.mark.parametrize('where, line', ADVISED)
def test_what_is_advised_runs(
        dozen, small, plain, tmp_path, monkeypatch, capfd, where, line):
    """Advice that is refused itself, or a name with a space that is not quoted."""
    monkeypatch.chdir(tmp_path)
    Path('my text.txt').write_text('Some words of mine, one after the other. ' * 400)
    if where == 'prepare_data.command_for':
        Path('data/damaged').mkdir(parents=True)
        Path('data/damaged/meta.json').write_text('{')
    elif where != 'prepare_data.newest_dataset':
        shutil.copytree(dozen / 'data', 'data/dozen')
    line = line.format(dozen=dozen, small=small, plain=plain)

    # a line that is refused prints the advice at once, one that runs has to be quick
    _, said = run_line(capfd, line, () if 'bench' in line else QUICK.get(line.split()[0], ()))

    advice = re.search(r'python (\S+\.py\b.*)\n$', said)[1]
    if where == 'bench.newest_pair':
        # what can be distilled is what its reader has to make first
        run_main(train_teacher, *SMALL, '--iters', 1)
    status, said = run_line(capfd, advice, QUICK.get(advice.split()[0], ()))
    assert status == 0, (advice, said)


def test_every_advice_is_in_the_table():
    """A command that is printed, but that nobody has ever run."""
    found = set()
    for script in (*SCRIPTS.values(), models):
        for function in ast.walk(ast.parse(Path(script.__file__).read_text(encoding='utf-8'))):
            if not isinstance(function, ast.FunctionDef):
                continue
            description = ast.get_docstring(function, clean=False)
            for node in ast.walk(function):
                if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
                    continue
                advice = 'python' in node.value.split() or re.fullmatch(r'\w+\.py', node.value)
                if node.value != description and advice:
                    found.add(f'{script.__name__}.{function.name}')

    # what bench.parse holds is what it was called by, for its file of figures
    assert found - {'bench.parse', 'prepare_data.as_command'} == {where for where, _ in ADVISED}


# =============================================================================
# The page, the Makefile, the weights

PAGE = (HERE / 'README.md').read_text(encoding='utf-8')


@pytest.mark.parametrize('name, below', [
    ('prepare_data', set()),
    ('model', {'prepare_data'}),
    ('train_teacher', {'prepare_data', 'model'}),
    ('sample', {'prepare_data', 'model', 'train_teacher'}),
    ('distill', {'prepare_data', 'model', 'train_teacher'}),
    ('bench', {'prepare_data', 'model', 'train_teacher', 'sample'}),
])
def test_imports_go_downwards(name, below):
    """A circle of imports, or a file that cannot be read before another one."""
    ours = {path.stem for path in HERE.glob('*.py')}

    tree = ast.parse((HERE / f'{name}.py').read_text(encoding='utf-8'))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)

    assert imported & ours <= below


def test_snippets_of_the_page_run_as_they_stand():
    """A page whose code no longer runs, or computes something else than the code it explains."""
    says = {}
    torch.manual_seed(0)

    learn = (HERE / 'assets/learn.md').read_text(encoding='utf-8')
    for snippet in re.findall(r'```python\n(.*?)```', PAGE + learn, re.S):
        exec(snippet, says)
        # untrained logits are all alike: ln V, whatever the targets
        assert abs(says['loss'].item() - math.log(109)) < 1e-4

    assert says['text'].shape == (8, 21)
    # of a flow of two steps the text is a mean of what both aim at
    assert ((says['weight'] > 0) & (says['weight'] < 1)).all()


def recipe(*words):
    """The commands that make would run."""
    done = subprocess.run(['make', '-n', '-C', HERE, *words], capture_output=True, text=True,
                          check=True)
    return done.stdout.replace('\\\n', ' ').splitlines()


def test_commands_of_the_page_and_the_makefile_are_understood():
    """An option that was renamed, but not where people copy it from."""
    targets = re.findall(r'^([\w-]+):', (HERE / 'Makefile').read_text(encoding='utf-8'), re.M)
    text = PAGE + ''.join(f'    {line}\n' for line in recipe(*targets, 'CAPTIONS=x'))
    for page in (HERE / 'assets').glob('*.md'):
        text += page.read_text(encoding='utf-8')

    found = re.findall(r'^\s+.*?\b(\w+\.py)( [^#`&|\n]*)?(?:#.*)?$', text, re.M)
    found += re.findall(r'`python (\w+\.py)( [^`]*)?`', text)
    commands = [(name, shlex.split(words)) for name, words in found if name in SCRIPTS]
    for name, words in commands:
        SCRIPTS[name].parse(words)

    assert len(commands) > 20
    assert {name for name, _ in commands} == set(SCRIPTS)


def test_the_page_shows_what_the_shipped_student_writes(capsys):
    """Texts of other weights, or the best of many."""
    lines = lines_of(capsys, HERE / 'assets/stories-student.pt')

    shown = PAGE.split('word problems):\n\n')[1].split('\n\n')[0].split('\n')
    assert len(lines) == len(shown) == 8
    # another processor's rounding may decide a tie otherwise
    assert sum(line == f'    {text}' for text, line in zip(lines, shown)) >= 6


def test_the_shipped_weights_are_those_of_the_list():
    """Weights replaced without their checksum, or a checksum of weights that are gone."""
    lines = (HERE / 'assets/SHA256SUMS').read_text().splitlines()

    listed = dict(reversed(line.split()) for line in lines)

    assert set(listed) == {path.name for path in (HERE / 'assets').glob('*.pt')}
    for name, digest in listed.items():
        assert hashlib.sha256((HERE / 'assets' / name).read_bytes()).hexdigest() == digest


def test_lines_of_the_page_fit_a_terminal():
    """A page that a terminal or a diff cannot show; tables and pictures may be wider."""
    lines = [line for line in PAGE.split('\n') if not line.startswith(('|', '!'))]

    assert max(len(line) for line in lines) <= 100
    assert len(PAGE.split('\n')) <= 200
