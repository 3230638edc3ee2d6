"""
How good are the samples, at how many network calls, and how fast?

    python bench.py quality                     # the newest student beside its teacher
    python bench.py quality out/dates/student out/dates/mdlm --nfe 1 4 64
    python bench.py speed out/stories/student@1 out/stories/teacher@8,64
    python bench.py speed student,128,50257,256@1 ar,128,50257,256    # untrained, of size L,V,D
    python bench.py train 16,128,50257,256      # B,L,V,D: one iteration in two formulations
    python bench.py gpu                         # the list for one GPU; --tiny rehearses it

Each figure is printed and written (JSON) as soon as it is known; at the end there is a Markdown
table, of several seeds the mean (and half the range), and for `quality` a picture.
"""

import argparse
import datetime
import importlib.util
import io
import json
import math
import os
import re
import shlex
import signal
import statistics
import sys
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

# before torch, which takes seconds to load: Ctrl-C is one line from here on
from prepare_data import (UNSPACED, Parser, as_rows, command_for, expected_seen, fail, load_dataset,
                          number, run_script, split_rows, to_texts, why_not, write_whole)
from prepare_data import fraction as share
from prepare_data import jensen_shannon as divergence
from prepare_data import sanity_metrics as health
from prepare_data import story_metrics as story_figures

import numpy as np
import torch
import torch.nn.functional as F

from model import (Config, autocast, build, compile_net, has_bf16, is_student, load, pick_device,
                   round_weights, time_axis)
from sample import newest_students, timed_rows
from train_teacher import up_to

# samples of each model, unless --rows says otherwise or too little text is held out
ROWS = 500
# of real text at most so many rows are compared with: beyond that figures hardly move
REFERENCE_ROWS = 2000
# of training text so many rows are read at a time: they take eight bytes a token, two in the file
ROWS_AT_ONCE = 10_000


# -----------------------------------------------------------------------------
# Options

whole = number(int, 1, 100_000)
warmth = number(float, 0.01, 100)


def check_shape(length, vocab, width):
    """argparse's error for an untrained model of a size that cannot be."""
    if length < 1:
        raise argparse.ArgumentTypeError('L must be at least 1')
    if vocab < 10:
        raise argparse.ArgumentTypeError('V must be at least 10, four of them special tokens')
    if width < 2 or width % 2:
        raise argparse.ArgumentTypeError('D must be even: rotary positions turn pairs of channels')


def training_size(text):
    """argparse type: B,L,V,D as it stands, if it can be."""
    if not re.fullmatch(r'\d{1,6}(,\d{1,6}){3}', text):
        raise argparse.ArgumentTypeError(f'{text[:40]!r} is not B,L,V,D, as in 16,128,50257,256')
    rows, *shape = map(int, text.split(','))
    if rows < 1:
        raise argparse.ArgumentTypeError('B must be at least 1')
    check_shape(*shape)
    return text


def split_calls(item):
    """'NAME@8,64' -> ('NAME', [8, 64]); without @ the list is empty."""
    name, at, calls = item.rpartition('@')
    # a folder's name may hold an @ as well
    if not at or not re.fullmatch(r'\d{1,5}(,\d{1,5})*', calls):
        return item, []
    return name, [int(nfe) for nfe in calls.split(',')]


def untrained_size(name):
    """'flm,128,50257,256' -> ('flm', [128, 50257, 256]); None for the name of a checkpoint."""
    if not re.fullmatch(r'(student|flm|diffuseq|mdlm|ar)(,\d{1,6}){3}', name):
        return None
    kind, *shape = name.split(',')
    return kind, [int(n) for n in shape]


def timed_model(text):
    """argparse type: MODEL or MODEL@NFE,NFE as it stands, if it can be."""
    name, calls = split_calls(text)
    if 0 in calls:
        raise argparse.ArgumentTypeError(f'{text[:40]!r}: a sampler makes at least one call')
    size = untrained_size(name)
    if size is None:
        if ',' in name and not os.path.exists(name):
            raise argparse.ArgumentTypeError(
                f'{text[:40]!r} is no checkpoint; sizes are KIND,L,V,D, as student,32,2048,128')
        return text
    kind, shape = size
    check_shape(*shape)
    if kind == 'ar' and calls:
        raise argparse.ArgumentTypeError('ar makes one call for each token; leave out the @')
    return text


def add_quality(parser):
    """The options of `quality`."""
    add = parser.add_argument
    # what is measured
    add('models', nargs='*', metavar='CHECKPOINT',
        help='folders or .pt files, all of one data set; {seed} in a name stands for 0, 1, ...; '
             'without any the newest student and its teacher')
    add('--nfe', nargs='+', type=whole, default=[1, 4, 64], help='network calls')
    add('--rows', type=whole,
        help=f'samples of each model, nfe and seed [{ROWS}, or as many as held-out text allows]')
    add('--seeds', type=whole, default=1, help='how many seeds of rows and noise: 0, 1, ...')
    add('--scorer', default='', metavar='CHECKPOINT', help='text: an ar model; adds gen_ppl')
    # pairs: several samples of a source, of which there are then fewer
    add('--per-source', type=whole, default=1,
        help='pairs: samples of each source; from 2 on self-BLEU and div-4 are measured')
    add('--mbr', type=whole, default=1, metavar='N',
        help='pairs: of N samples of each source the one most like the others is scored')
    # how samples are drawn
    add('--method', choices=['ancestral', 'ddim'], default='ancestral',
        help='diffuseq teachers: the sampler')
    add('--clamp', action='store_true',
        help='diffuseq teachers: each guess becomes the nearest embedding')
    add('--temperature', type=warmth, default=1.0,
        help='flm teachers and the baselines: of predictions, logits / T')
    add('--gamma', type=share, default=0.0,
        help='flows: 0 follows the flow, up to 1 noise is added anew')


def add_speed(parser):
    """The options of `speed`."""
    add = parser.add_argument
    add('models', nargs='*', type=timed_model, metavar='MODEL[@NFE,NFE]',
        help='checkpoints, or untrained: student, flm, diffuseq, mdlm or ar, then ,L,V,D; '
             'without any the newest student and its teacher')
    add('--nfe', nargs='+', type=whole, default=[1, 4, 64], help='of models without @')
    add('--batch', nargs='+', type=whole, default=[1, 8, 64], help='rows written at once')
    add_machine(parser)


def add_train(parser):
    """The options of `train`."""
    parser.add_argument('sizes', nargs='+', type=training_size, metavar='B,L,V,D',
                        help='rows of a batch, their length, vocabulary, width')
    add_machine(parser)


def add_machine(parser):
    """The options that `speed` and `train` share."""
    add = parser.add_argument
    add('--layers', type=whole, default=4, help='transformer blocks of untrained models')
    add('--compile', action=argparse.BooleanOptionalAction, default=True,
        help='torch.compile, on CUDA only')


def add_gpu(parser):
    """The options of `gpu`."""
    add = parser.add_argument
    steps = list(GPU_STEPS)
    add('--only', nargs='+', choices=steps, default=steps, help='these steps')
    add('--skip', nargs='+', choices=steps, default=[], help='all steps but these')
    add('--folder', default='', help='for gpu-STEP.json; new ones in assets, or out if --tiny')
    add('--tiny', action='store_true', help='tiny sizes, on a CPU too: a rehearsal, no figures')


def parse(argv=None):
    """The options, and under `command` the line that was typed."""
    parser = Parser(description=__doc__)
    kinds = parser.add_subparsers(dest='what', required=True, metavar='WHAT')
    quality_parser = kinds.add_parser('quality', help='samples beside real text')
    speed_parser = kinds.add_parser('speed', help='time to write rows, beside what it must take')
    train_parser = kinds.add_parser('train', help='time and memory of one training iteration')
    gpu_parser = kinds.add_parser('gpu', help='all that is to be timed on one GPU')
    add_quality(quality_parser)
    add_speed(speed_parser)
    add_train(train_parser)
    add_gpu(gpu_parser)
    # what all have; gpu writes several files
    for one in (quality_parser, speed_parser, train_parser):
        one.add_argument('--out', default='',
                         help='the JSON file; a new one, out/WHAT.json, if not given')
    for one in (quality_parser, speed_parser, train_parser, gpu_parser):
        one.add_argument('--device', default='', help='cpu, cuda or mps; the best there is')
    words = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(words)
    options.command = shlex.join(['python', 'bench.py', *words])
    return options


# -----------------------------------------------------------------------------
# Distances between samples and real text, on token ids; repetition cannot fool them

def ngrams(items, n):
    """All n-grams of a list, as tuples."""
    return list(zip(*(items[i:] for i in range(n))))


def all_ngrams(rows, n):
    """The n-grams of all rows (lists); none goes from one row into the next."""
    grams = []
    for row in rows:
        grams.extend(ngrams(row, n))
    return grams


def jensen_shannon(a, b):
    """
    Jensen-Shannon divergence (Lin 1991) of how often items occur in two lists, in nats: 0 if they
    are alike, ln 2 if they have nothing in common.
    """
    # texts of less than n tokens have no n-gram to compare
    if not a or not b:
        return math.log(2)
    return divergence(Counter(a), Counter(b))


def bag(row, dim):
    """How often each 1- and 2-gram of a list of ids occurs, hashed to `dim` counts: (dim,)."""
    # two odd numbers, so that the order of a pair counts
    hashes = [(token + 1) * 2654435761 % dim for token in row]
    for first, second in ngrams(row, 2):
        hashes.append(((first + 1) * 2654435761 + (second + 1) * 40503) % dim)
    return torch.bincount(torch.tensor(hashes, dtype=torch.long), minlength=dim).float()


def energy_distance(a, b, dim=512):
    """
    Energy distance (Szekely and Rizzo 2013) 2 E|x-y| - E|x-x'| - E|y-y'| of rows, lists of ids, as
    bags of 1- and 2-grams. Unbiased: about 0, even below, for rows of the same law.
    """
    x = torch.stack([bag(row, dim) for row in a])
    y = torch.stack([bag(row, dim) for row in b])
    between = torch.cdist(x, y).double().mean()
    # no row is compared with itself
    within_x = torch.cdist(x, x).double().sum() / (len(x) * (len(x) - 1))
    within_y = torch.cdist(y, y).double().sum() / (len(y) * (len(y) - 1))
    return (2 * between - within_x - within_y).item()


def copied(texts, seen):
    """The share of texts (lists of ids) that are, as a whole, texts of the training set."""
    return sum(hash(tuple(ids)) in seen for ids in texts) / len(texts)


def scored_positions(rows, meta):
    """Which positions of rows (B, L) are text or the <eos> that ends it, not padding: (B, L)."""
    # a row of a stream is full of text
    if meta['kind'] == 'stream':
        return torch.ones_like(rows, dtype=torch.bool)
    return up_to(rows, meta, '<eos>') >= 0


@torch.no_grad()
def generative_perplexity(rows, meta, scorer):
    """exp of the mean -log p of the tokens of rows (B, L) under an ar model, the scorer."""
    nats = 0.0
    tokens = 0
    for part in rows.split(256):
        part = part.to(next(scorer.parameters()).device)
        scored = scored_positions(part, meta)
        # what is given does not count
        given = torch.where(scored, -1, part)
        n = scored.sum(1)  # (B,)
        # the loss is a mean over the positions that are not given
        nats += (scorer.loss(part, given) * n).sum().item()
        tokens += n.sum().item()
    return math.exp(nats / tokens)


# -----------------------------------------------------------------------------
# Pairs: scores of sequence-to-sequence text. Words are split at spaces, as DiffuSeq scores them


def split_words(text):
    """A text's words, split at spaces; ours: each character of scripts without spaces is one."""
    return re.sub(UNSPACED, r' \g<0> ', text).split()


class RougeWords:
    """
    Words in lower case without punctuation: of ASCII text those of rouge_score itself, which drops
    all other letters.
    """

    def tokenize(self, text):
        """The words of a text."""
        kept = []
        for letter in text.lower():
            # letters, the marks that go with them, and numbers
            known = unicodedata.category(letter)[0] in 'LMN'
            kept.append(letter if known else ' ')
        return split_words(''.join(kept))


def bleu(text, reference):
    """Sentence BLEU (Papineni et al. 2002) with smoothing method 4, in [0, 1], as in DiffuSeq."""
    # optional, and slow to import: only where pairs or text are scored
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    smoothing = SmoothingFunction().method4
    return sentence_bleu([split_words(reference)], split_words(text),
                         smoothing_function=smoothing)


def rouge_l(text, reference):
    """ROUGE-L (Lin 2004), the F-measure of the longest common subsequence, in [0, 1]."""
    from rouge_score.rouge_scorer import RougeScorer
    scorer = RougeScorer(['rougeL'], tokenizer=RougeWords())
    return scorer.score(reference, text)['rougeL'].fmeasure


def distinct(texts, n):
    """
    Share of distinct n-grams among all n-grams of some texts (arXiv:1510.03055): dist-1 of one
    text, div-4 of all texts of a source.
    """
    grams = all_ngrams([split_words(text) for text in texts], n)
    return len(set(grams)) / max(1, len(grams))


def self_bleu(texts):
    """
    Mean BLEU of one text against another over all pairs i < j, as in DiffuSeq: 1 if all are the
    same. (Elsewhere, arXiv:1802.01886, each text meets all others at once, which gives more.)
    """
    scores = []
    for i, text in enumerate(texts):
        for other in texts[i + 1:]:
            scores.append(bleu(text, other))
    return statistics.mean(scores) if scores else 0.0


def most_alike(texts):
    """
    Minimum Bayes risk as in DiffuSeq: the index of the text whose BLEU against the others, each a
    reference of its own, adds up to most.
    """
    sums = []
    for i, text in enumerate(texts):
        others = texts[:i] + texts[i + 1:]
        sums.append(sum(bleu(text, other) for other in others))
    return sums.index(max(sums))


def groups_of(items, size):
    """A list cut into lists of `size`."""
    return [items[i:i + size] for i in range(0, len(items), size)]


def pair_figures(texts, targets, per_source):
    """Texts, `per_source` in a row for the same target, and their targets -> a dict of means."""
    pairs = list(zip(texts, targets))
    figures = {
        'bleu': statistics.mean(bleu(text, target) for text, target in pairs),
        'rouge_l': statistics.mean(rouge_l(text, target) for text, target in pairs),
        'dist1': statistics.mean(distinct([text], 1) for text in texts),
    }
    # how much the samples of one source differ
    if per_source > 1:
        groups = groups_of(texts, per_source)
        figures['self_bleu'] = statistics.mean(map(self_bleu, groups))
        figures['div4'] = statistics.mean(distinct(group, 4) for group in groups)
    return figures


# -----------------------------------------------------------------------------
# Quality: all that can be wrong is said before the first sample is drawn

@dataclass
class Opened:
    """What has to be known of a checkpoint before it is measured."""
    config: Config
    meta: dict          # of the data that it was trained on
    folder: str         # where these lay


def newest_pair():
    """The newest student, and its teacher if that is still there: names; a line says which."""
    found = newest_students()
    if not found:
        fail('out/ holds no student yet; name a model, or make one: python distill.py')
    student = found[0]
    names = [str(student.parent)]
    # distill.py writes the student beside its teacher
    teacher = student.parent.parent / 'teacher'
    if (teacher / 'model.pt').is_file():
        names.append(str(teacher))
    print(f'no model is named: measuring {" and ".join(names)}', flush=True)
    return names


def with_seed(name, seed):
    """The path of a model's `seed`-th run."""
    return name.replace('{seed}', str(seed))


def check_named_once(names):
    """Stop at a model that would be measured twice, in lines of one name."""
    seen = set()
    for name in names:
        # out/a/ is out/a
        path = os.path.realpath(name)
        if path in seen:
            fail(f'{name}: is named twice; name each model once')
        seen.add(path)


def open_models(names, seeds):
    """{path: Opened} of every model and seed; their weights are not kept."""
    opened = {}
    for name in names:
        for seed in range(seeds):
            path = with_seed(name, seed)
            model, ckpt = load(path)
            opened[path] = Opened(model.config, ckpt['meta'], ckpt['options']['data'])
    return opened


def data_sums(meta):
    """Checksums of the training and the validation tokens; the first one is of their name."""
    return meta['crc'][1:]


def check_alike(opened):
    """Stop unless all models know the same tokens, the same data and rows of one length."""
    # each is compared with the one that was named first
    first, *others = opened
    meta = opened[first].meta
    for path in others:
        other = opened[path].meta
        if other['tokenizer'] != meta['tokenizer']:
            fail(f'{path}: has another tokenizer than {first}; compare like with like')
        if other['length'] != meta['length']:
            fail(f'{path}: writes rows of {other["length"]} tokens, {first} of {meta["length"]}; '
                 'compare like with like')
        if data_sums(other) != data_sums(meta):
            fail(f'{path}: was trained on other data than {first}; compare like with like')


def check_data(path, model):
    """Stop unless the folder of a model's data still holds them: (meta, train ids, val ids)."""
    folder = Path(model.folder)
    # a message of our own, as load_dataset knows of no model
    if not os.path.isfile(folder / 'meta.json'):
        fail(f'{path}: its data {folder} are not there; run: {command_for(folder)}')
    meta, train, val = load_dataset(folder)
    # they may have been prepared anew since
    if meta['tokenizer'] != model.meta['tokenizer']:
        fail(f'{path}: {folder} now has another tokenizer than this model; train it anew')
    if meta['length'] != model.meta['length']:
        fail(f'{path}: {folder} now has rows of {meta["length"]} tokens, this model writes '
             f'{model.meta["length"]}; train it anew')
    if data_sums(meta) != data_sums(model.meta):
        fail(f'{path}: {folder} holds other data than it was trained on; train it anew')
    return meta, train, val


def samples_per_source(options):
    """How many samples are drawn from each source of pairs."""
    return max(options.per_source, options.mbr)


def rows_to_draw(path, options, meta, val):
    """How many samples are drawn: so many as are asked for, or as held-out text allows."""
    n = len(val) // meta['length']
    each = samples_per_source(options)
    # of text one half is compared with, the other one stands beside the samples
    most = n * each if meta['pairs'] else n // 2
    # all samples of one source; distances are between rows
    least = each if meta['pairs'] else 2
    if most < least:
        fail(f'{path}: its data hold out {n} rows, too few to compare with; prepare more')
    if options.rows is None:
        rows = max(ROWS, least)
        if most < rows:
            print(f'{path}: its data hold out {n} rows: measuring {most} samples, not {rows}')
        # all samples of each source
        return min(most, rows) // each * each
    if options.rows < least:
        if meta['pairs']:
            fail(f'--rows {options.rows}: must be at least the {least} samples of one source')
        fail(f'--rows {options.rows}: must be at least {least}, as distances are between rows')
    if options.rows > most:
        fail(f'{path}: its data hold out {n} rows, too few for so many samples; --rows {most}, or '
             'less')
    if options.rows % each:
        fail(f'--rows {options.rows}: must be a multiple of the {each} samples of one source')
    return options.rows


def check_pair_options(options, first, pairs):
    """Stop at options for pairs where there are none, and the other way round."""
    if not pairs and options.per_source > 1:
        fail(f'--per-source is for pairs; {first} writes text without a source')
    if not pairs and options.mbr > 1:
        fail(f'--mbr is for pairs; {first} writes text without a source')
    if options.mbr > 1 and options.per_source > 1:
        fail('--mbr leaves one sample of each source, --per-source measures several; choose one')
    if pairs and options.scorer:
        fail(f'--scorer is for text without a source; {first} writes pairs')


def check_sampling(options, opened):
    """Stop at a sampling option that no model would take."""
    # what the samplers of these models are told
    taken = set()
    for model in opened.values():
        taken.update(sampling(options, model.config))
    if options.gamma and 'gamma' not in taken:
        fail('--gamma is for flows (flm); none of the models is one')
    if options.temperature != 1 and 'temperature' not in taken:
        fail('--temperature is for flm teachers, mdlm and ar; none of the models is one')
    if options.method != 'ancestral' and 'method' not in taken:
        fail(f'--method {options.method} is for diffuseq teachers; none of the models is one')
    if options.clamp and 'clamp' not in taken:
        fail('--clamp is for diffuseq teachers; none of the models is one')


def check_packages(path, options, meta):
    """Stop where a figure of these data needs a package that is not there."""
    dates = meta['tokenizer']['name'] == 'dates'
    # of dates any of eight texts is right, so none of them is a reference
    needs_bleu = meta['pairs'] and (not dates or options.mbr > 1)
    needs_rouge = meta['pairs'] and not dates
    if needs_bleu and importlib.util.find_spec('nltk') is None:
        fail(f'{path}: BLEU of its samples needs a package; pip install nltk')
    if needs_rouge and importlib.util.find_spec('rouge_score') is None:
        fail(f'{path}: ROUGE-L of its samples needs a package; pip install rouge-score')
    if importlib.util.find_spec('matplotlib') is None:
        print('there will be no picture, which needs: pip install matplotlib')


def check_scorer(options, first, meta, device):
    """The --scorer, if it can judge these models, or None without one."""
    if not options.scorer:
        return None
    scorer, ckpt = load(options.scorer, device)
    # only ar knows the probability of a whole text
    if scorer.config.model != 'ar':
        fail(f'--scorer {options.scorer}: is no ar model; make one: '
             'python train_teacher.py --model ar')
    if ckpt['meta']['tokenizer'] != meta['tokenizer']:
        fail(f'--scorer {options.scorer}: has another tokenizer than {first}')
    if scorer.config.length < meta['length']:
        fail(f'--scorer {options.scorer}: reads {scorer.config.length} tokens, {first} writes '
             f'{meta["length"]}')
    return scorer


def free_name(path):
    """PATH.json, or the first of PATH-2.json, PATH-3.json, ... so that nothing is replaced."""
    path = Path(path)
    free = path
    number = 1
    # a picture of the same name may stand beside the figures
    while free.exists() or free.with_suffix('.svg').exists():
        number += 1
        free = path.with_stem(f'{path.stem}-{number}')
    return free


def check_writable(out):
    """Stop if a file cannot be written: better now than after an hour. Say if it is replaced."""
    # the name that write_whole writes to first
    trial = Path(f'{out}.tmp')
    if os.path.isdir(out):
        fail(f'{out}: is a folder; name a file for the figures')
    # a slip such as `--out model.pt` would replace a model by figures
    if Path(out).suffix != '.json':
        fail(f'{out}: the name of the figures must end in .json')
    try:
        trial.parent.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b'')
        trial.unlink()
    except OSError as error:
        fail(f'{out}: cannot be written: {why_not(error)}')
    tell_if_replaced(out)


def tell_if_replaced(path):
    """A line if a file is there that will be written anew."""
    if os.path.exists(path):
        print(f'{path} is there already, and will be replaced', flush=True)


# -----------------------------------------------------------------------------
# Quality: the figures

@dataclass
class Reference:
    """What samples are held against."""
    folder: str
    meta: dict
    held: torch.Tensor      # (n, L) rows held out, in the order of the file
    real: list              # text: lists of ids that samples should be like
    seen: set               # text in rows: hashes of the training texts
    chance: float           # stories: the share that is in the training set by chance
    scorer: object          # text: an ar model, or None


def training_texts(ids, meta):
    """The set of hashes of all training texts: of a billion tokens the texts would not fit."""
    L = meta['length']
    size = ROWS_AT_ONCE * L
    seen = set()
    for start in range(0, len(ids), size):
        rows = as_rows(ids[start:start + size], L)
        seen.update(hash(tuple(text)) for _, text in split_rows(rows, meta))
    return seen


def make_reference(folder, data, rows, scorer):
    """(Reference, real rows (n, L) beside which the samples of text are shown; none for pairs)."""
    meta, train, val = data
    L = meta['length']
    held = torch.from_numpy(as_rows(val, L))
    reference = Reference(folder, meta, held, [], set(), 0.0, scorer)
    if meta['pairs']:
        return reference, held[:0]
    # half meets the samples, half shows what text scores; mixed, as neighbours are alike
    mixed = held[np.random.default_rng(0).permutation(len(held))]
    half = len(held) // 2
    reference.real = [ids for _, ids in split_rows(mixed[:half][:REFERENCE_ROWS], meta)]
    # the text of a stream is not cut where samples are: a copy would not be found
    if meta['kind'] == 'rows':
        reference.seen = training_texts(train, meta)
    if meta['tokenizer']['name'] == 'stories':
        reference.chance = expected_seen(len(train) // L)
    return reference, mixed[half:][:rows]


def shuffled(rows, meta):
    """Rows (n, L) with the tokens of each text in a random order."""
    rng = np.random.default_rng(0)
    rows = rows.clone()
    # the tokens alone are mixed, <eos> and padding stay behind them
    for row, (_, ids) in zip(rows, split_rows(rows, meta)):
        row[:len(ids)] = torch.from_numpy(rng.permutation(ids))
    return rows


def text_figures(rows, reference):
    """All figures of rows (B, L) of text without a source: a dict."""
    meta = reference.meta
    texts = [ids for _, ids in split_rows(rows, meta)]
    # of each story it is known whether it is right
    if meta['tokenizer']['name'] == 'stories':
        figures = story_figures([text for _, text in to_texts(rows, meta)])
    else:
        figures = health(rows, meta, reference.folder)
    # how far they are from real text
    for n in (1, 2, 3):
        grams = all_ngrams(texts, n)
        figures[f'js{n}'] = jensen_shannon(grams, all_ngrams(reference.real, n))
    figures['energy'] = energy_distance(texts, reference.real)
    if reference.scorer is not None:
        figures['gen_ppl'] = generative_perplexity(rows, meta, reference.scorer)
    # whether they repeat the training text
    if reference.seen:
        figures['copied'] = copied(texts, reference.seen)
    if reference.chance:
        figures['copied_by_chance'] = reference.chance
    return figures


def source_figures(rows, known, reference, options):
    """All figures of rows (B, L) of pairs, whose sources and targets are in `known`: a dict."""
    meta = reference.meta
    # of the samples of each source only the best row is kept
    if options.mbr > 1:
        texts = [text for _, text in to_texts(rows, meta)]
        best = [most_alike(group) for group in groups_of(texts, options.mbr)]
        best = torch.tensor(best) + options.mbr * torch.arange(len(best))
        rows = rows[best]
        known = known[best]
    figures = health(rows, meta, reference.folder)
    # of dates any of eight texts is right, as health knows
    if meta['tokenizer']['name'] != 'dates':
        texts = [text for _, text in to_texts(rows, meta)]
        targets = [text for _, text in to_texts(known, meta)]
        figures.update(pair_figures(texts, targets, options.per_source))
    return figures


def pair_rows(pairs, meta):
    """(source, target), lists of ids -> rows (n, L); what does not fit is cut off, as models do."""
    eos, pad, sep, _ = meta['special'].values()
    rows = []
    for source, target in pairs:
        ids = [*source, sep, *target, eos][:meta['length']]
        rows.append(ids + [pad] * (meta['length'] - len(ids)))
    return torch.tensor(rows)


def pair_references(report, reference, options):
    """What pairs score without a model: each source as its own answer, and another's target."""
    copies = []
    others = []
    for seed in range(options.seeds):
        # the same sources as the models'
        known, _ = draw_sources(reference, options, seed)
        pairs = split_rows(known, reference.meta)
        copy = pair_rows([(source, source) for source, _ in pairs], reference.meta)
        copies.append(source_figures(copy, known, reference, options))
        # the samples of one source share its target, so that is the next source's
        each = samples_per_source(options)
        moved = pairs[each:] + pairs[:each]
        other = [(source, target) for (source, _), (_, target) in zip(pairs, moved)]
        other = pair_rows(other, reference.meta)
        others.append(source_figures(other, known, reference, options))
    report.add('the source itself', '', copies)
    # a single source has no next one
    if len(pairs) > each:
        report.add('another target', '', others)


def sampling(options, config):
    """What a model's sampler is told: the options that are for models of its kind."""
    how = {}
    if config.model == 'flm':
        how['gamma'] = options.gamma
    # a student writes as it was taught to
    if is_student(config):
        return how
    if config.model == 'diffuseq':
        how['method'] = options.method
        how['clamp'] = options.clamp
    else:
        how['temperature'] = options.temperature
    return how


def draw_sources(reference, options, seed):
    """
    Held-out pairs (n, L), drawn by a seed, and what is given of them to a model, their sources, -1
    behind these. Each pair stands there once for each of its samples, one after the other.
    """
    each = samples_per_source(options)
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(reference.held), options.rows // each, replace=False)
    known = reference.held[chosen].repeat_interleave(each, dim=0)
    return known, up_to(known, reference.meta, '<sep>')


def measure(model, reference, options, nfe, seed):
    """All figures of one model at one nfe and seed: a dict."""
    how = sampling(options, model.config)
    if reference.meta['pairs']:
        known, given = draw_sources(reference, options, seed)
        rows, ms = timed_rows(model, given, nfe, seed, **how)
        figures = source_figures(rows, known, reference, options)
    else:
        given = torch.full((options.rows, reference.meta['length']), -1)
        rows, ms = timed_rows(model, given, nfe, seed, **how)
        figures = text_figures(rows, reference)
    # of --mbr, the time of a row that is kept
    figures['ms_per_row'] = ms * options.mbr
    return figures


def measure_seeds(name, reference, options, nfe, device):
    """The figures of a model at one nfe, one dict for each seed."""
    runs = []
    for seed in range(options.seeds):
        model, _ = load(with_seed(name, seed), device)
        runs.append(measure(round_weights(model), reference, options, nfe, seed))
    return runs


def quality(options, device):
    """Measure every model at every nfe, after what needs none: real text, or the pairs' own."""
    names = options.models or newest_pair()
    check_named_once(names)
    opened = open_models(names, options.seeds)
    first = next(iter(opened))
    meta = opened[first].meta

    # all that can be wrong
    check_alike(opened)
    check_pair_options(options, first, meta['pairs'])
    check_sampling(options, opened)
    data = check_data(first, opened[first])
    options.rows = rows_to_draw(first, options, meta, data[-1])
    check_packages(first, options, meta)
    scorer = check_scorer(options, first, meta, device)
    report = Report(options.out or free_name('out/quality.json'), options, device)
    check_writable(report.out)
    drawing = Path(report.out).with_suffix('.svg')
    tell_if_replaced(drawing)

    # what real text scores, and the same tokens without their order
    reference, real = make_reference(opened[first].folder, data, options.rows, scorer)
    if meta['pairs']:
        pair_references(report, reference, options)
    else:
        report.add('held-out text', '', [text_figures(real, reference)])
        report.add('the same, shuffled', '', [text_figures(shuffled(real, meta), reference)])
    # the models
    for name in names:
        config = opened[with_seed(name, 0)].config
        # ar makes a call for each token, whatever is asked for
        calls = [config.length] if config.model == 'ar' else options.nfe
        for nfe in calls:
            report.attempt(name, nfe, measure_seeds, name, reference, options, nfe, device)
    # what needs no model makes no calls, and is not drawn
    drawn = any(nfe for _, nfe, _ in report.lines)
    if drawn and importlib.util.find_spec('matplotlib') is not None:
        picture(report.lines, drawing)
        report.files.append(str(drawing))
    report.finish()


# -----------------------------------------------------------------------------
# Speed: on the device's own clock, after warm-up, of which compilation is part

def clock(work, device):
    """Seconds that work() takes on a device."""
    # a GPU works on while Python goes on, so its own clock is read
    if device.type == 'cuda':
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    before = time.perf_counter()
    work()
    if device.type != 'cpu':
        torch.accelerator.synchronize()
    return time.perf_counter() - before


def median_time(work, device, patience=10.0):
    """Median seconds of work(), of twenty after three; fewer, if they would take too long."""
    warm_up = 0.0
    for _ in range(3):
        warm_up += clock(work, device)
        # compiling is part of the first
        if warm_up > patience:
            break
    # the median does not mind the few that something else has slowed down
    times = []
    while len(times) < 20:
        times.append(clock(work, device))
        if sum(times) > patience and len(times) >= 3:
            break
    return statistics.median(times)


def machine_rates(device):
    """What a machine reaches: FLOP/s of a large product, bytes/s read or written by a copy."""
    cuda = device.type == 'cuda'
    n = 8192 if cuda else 1024
    size = 2 ** 28 if cuda else 2 ** 26  # floats
    # in the type that models compute in
    dtype = torch.bfloat16 if has_bf16(device) else torch.float32
    a = torch.randn(n, n, device=device, dtype=dtype)
    flops = 2 * n ** 3 / median_time(lambda: a @ a, device)
    # memory that was never written need not be read
    x, y = torch.ones(2, size, device=device)
    # each number is read and written
    bandwidth = 2 * x.nbytes / median_time(lambda: y.copy_(x), device)
    print(f'large products {flops / 1e9:,.0f} GFLOP/s, copies {bandwidth / 1e9:,.1f} GB/s')
    return flops, bandwidth


def free_memory(device):
    """Give back to the device what is no longer used."""
    if device.type == 'cuda':
        torch.cuda.empty_cache()


def token_weights(model):
    """How many weights each position meets in one network call, in a multiply and an add each."""
    net = model.net
    total = 0
    # not the tables, where a token's row is looked up, nor what the time alone goes through
    for part in (net.into, net.blocks, net.head):
        total += sum(p.numel() for p in part.parameters() if p.ndim == 2)
    return total


def call_work(model):
    """Floating-point operations of one network call for one row of L positions."""
    c = model.config
    attention = 4 * c.layers * c.length ** 2 * c.width  # two products, each L x L x D
    return 2 * token_weights(model) * c.length + attention


def row_work(model, nfe):
    """The least floating-point operations that write one row in nfe calls, given nothing."""
    c = model.config
    by_table = 2 * c.length * c.vocab * c.channels  # a product with E, at each position
    if c.model == 'ar':
        # with a cache: each call is for one position, which sees itself and those before it
        seen = c.length * (c.length + 1) / 2
        return 2 * token_weights(model) * c.length + 4 * c.layers * seen * c.width
    if c.model == 'flm':
        # between two calls the noisy row moves towards p E
        return nfe * call_work(model) + (nfe - 1) * by_table
    if c.model == 'diffuseq':
        # after the last call x is rounded
        return nfe * call_work(model) + by_table
    return nfe * call_work(model)


def bytes_read(model, rows, nfe, number_size):
    """The least bytes that must be read to write so many rows in nfe calls; see row_work."""
    c = model.config
    net = model.net
    # of the tables only the rows of given tokens are looked up
    weights = sum(p.nbytes for p in net.parameters()) - net.embed.nbytes - net.known.weight.nbytes
    if c.model == 'ar':
        seen = c.length * (c.length + 1) / 2
        # keys and values, of which each call reads those before it
        cache = rows * 2 * c.layers * c.width * seen * number_size
        return c.length * weights + cache
    # E, where p E or the rounding needs all of it
    if c.model == 'flm':
        return nfe * weights + (nfe - 1) * net.embed.nbytes
    if c.model == 'diffuseq':
        return nfe * weights + net.embed.nbytes
    return nfe * weights


def least_time(model, rows, nfe, rates, number_size):
    """
    The floor: seconds that writing must take on a machine of these rates, whichever is longer of
    computing its products and reading its weights. Weights that stay in a cache read faster.
    """
    flops, bandwidth = rates
    reading = bytes_read(model, rows, nfe, number_size) / bandwidth
    return max(rows * row_work(model, nfe) / flops, reading)


def new_model(kind, length, vocab, width, layers):
    """An untrained student, flm, diffuseq, mdlm or ar: as fast as a trained one."""
    # heads of 64 channels, or of as many as divide the width
    heads = width // math.gcd(width, 64)
    student = kind == 'student'
    return build(Config(vocab, length, layers, heads, width, channels=width,
                        model='flm' if student else kind, two_time=student))


def open_timed(name, layers, device):
    """The model of a name, a checkpoint's or kind,L,V,D, on a device."""
    size = untrained_size(name)
    if size is None:
        model, _ = load(with_seed(name, 0), device)
    else:
        kind, shape = size
        model = new_model(kind, *shape, layers).to(device).eval()
    return round_weights(model)


def check_timed(items, layers):
    """Stop at checkpoints that cannot be read or take no nfe, before anything is timed."""
    for item in items:
        name, calls = split_calls(item)
        if untrained_size(name) is None:
            config = open_timed(name, layers, 'cpu').config
            if config.model == 'ar' and calls:
                fail(f'{item}: ar makes one call for each token; leave out the @')


def compile_anew(model, device):
    """torch.compile of the network, for the next shape it meets."""
    torch.compiler.reset()
    # on a CPU, a rehearsal: traced, and then run as it is
    compile_net(model.net, backend='inductor' if device.type == 'cuda' else 'eager')


def recorded(work):
    """work() as one CUDA graph: a function that runs it again, without Python between kernels."""
    # on a stream of its own, as CUDA asks for; the first runs compile, and allocate what stays
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


@torch.inference_mode()
def write_nothing_given(model, rows, nfe):
    """Write so many rows, nothing given, as sample.py does."""
    device = next(model.parameters()).device
    nothing = torch.full((rows, model.config.length), -1, device=device)
    with autocast(device):
        return model.sample(nothing, nfe)


def time_writing(model, rows, nfe, rates, graph, device):
    """How long `rows` rows take in nfe calls, and the floor: a dict in a list."""
    work = partial(write_nothing_given, model, rows, nfe)
    took = median_time(recorded(work) if graph else work, device)
    floor = least_time(model, rows, nfe, rates, 2 if has_bf16(device) else 4)
    return [{
        'batch': rows,
        'ms': 1000 * took,
        'rows_per_s': rows / took,
        'floor_ms': 1000 * floor,
        'times_floor': took / floor,
    }]


def time_models(report, items, batches, default_nfe, layers, compiled, device):
    """Time to write with each model, batch and nfe: lines of the report."""
    rates = machine_rates(device)
    report.tell_rates(rates)
    for item in items:
        name, calls = split_calls(item)
        model = open_timed(name, layers, device)
        calls = calls or default_nfe
        # one for each token
        if model.config.model == 'ar':
            calls = [model.config.length]
        for rows in batches:
            free_memory(device)
            # one shape is compiled at a time: a second one would make shapes variables
            if compiled:
                compile_anew(model, device)
            graph = compiled and device.type == 'cuda'
            for nfe in calls:
                report.attempt(name, nfe, time_writing, model, rows, nfe, rates, graph, device)


def speed(options, device):
    """Time to write `batch` rows, nothing given, with each model."""
    items = options.models or newest_pair()
    report = Report(options.out or free_name('out/speed.json'), options, device)
    check_timed(items, options.layers)
    check_writable(report.out)
    compiled = options.compile and device.type == 'cuda'
    time_models(report, items, options.batch, options.nfe, options.layers, compiled, device)
    report.finish()


# -----------------------------------------------------------------------------
# Training speed: each formulation in a process of its own, for its peak memory

FORMULATIONS = ['projected', 'dense', 'dense fp32']


def dense_loss(model, tokens, given, tau):
    """The loss as published code computes it: one-hot rows, V normals per token, all (B, L, V)."""
    # three tensors of V numbers for each token: text, noise and their sum
    onehot = F.one_hot(tokens, model.config.vocab).float()
    t = model.t_of(tau)[:, None, None]
    # on GPUs this product is in TF32 or fp32, see training_step
    with torch.autocast(tokens.device.type, enabled=False):
        x_t = (1 - t) * torch.randn_like(onehot) + t * onehot
        h = x_t @ model.net.embed.float()
    log_p = model.predict(h, given, tau).log_softmax(-1)
    return -(onehot * log_p).sum(-1).mean(1)


def peak_memory(device):
    """The most bytes that this process has held so far; None where nothing tells."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated()
    # not getrusage, whose maximum a process takes over from the one that has started it
    try:
        status = Path('/proc/self/status').read_text()
    except OSError:
        # not Linux
        return None
    found = re.search(r'VmHWM:\s*(\d+) kB', status)
    return 1024 * int(found[1]) if found else None


def training_step(formulation, size, layers, compiled, flops, device):
    """
    Forward and backward of a flow in one formulation: time, tokens/s, mfu (the share of the rate of
    large products that the network's products reach) and peak memory beyond the model's: one dict,
    in a list, as there are no seeds.
    projected, dense: bf16 on CUDA, the noise of dense in TF32; dense fp32: fp32 throughout.
    """
    torch.set_float32_matmul_precision('high' if formulation == 'dense' else 'highest')
    rows, length, vocab, width = map(int, size.split(','))
    model = new_model('flm', length, vocab, width, layers).to(device)
    if compiled:
        compile_anew(model, device)
    tokens = torch.randint(vocab, (rows, length), device=device)
    given = torch.full_like(tokens, -1)
    tau = torch.rand(rows, device=device)
    losses = model.loss if formulation == 'projected' else partial(dense_loss, model)
    # autocast of a CPU changes nothing
    types = torch.device('cpu') if formulation == 'dense fp32' else device

    def work():
        with autocast(types):
            loss = losses(tokens, given, tau).mean()
        loss.backward()
        model.zero_grad(set_to_none=True)

    # what there is by now are the model and its batch
    before = peak_memory(device)
    took = median_time(work, device)
    figures = {
        'tokens': tokens.numel(),
        'ms': 1000 * took,
        'tokens_per_s': tokens.numel() / took,
        # the backward pass computes twice what the forward pass does
        'mfu': 3 * rows * call_work(model) / took / flops,
    }
    if before is not None:
        figures['peak_GB'] = (peak_memory(device) - before) / 1e9
    return [figures]


def send_result(pipe, work, arguments):
    """Send work(*arguments) or its error to the process that waits for it."""
    try:
        pipe.send((work(*arguments), ''))
    except Exception as error:
        pipe.send((None, describe(error)))


def in_own_process(work, *arguments):
    """work(*arguments) in a new process; RuntimeError if it fails there or is killed."""
    # spawn: a copy of this process would hold its memory, and could not use CUDA
    context = get_context('spawn')
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=send_result, args=(sender, work, arguments), daemon=True)
    # Ctrl-C is for this process alone, which then ends the other
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        child.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    # so that only the child holds that end, and its death is noticed
    sender.close()
    try:
        result, error = receiver.recv()
    except EOFError:
        raise RuntimeError('the process was killed; did memory run out?') from None
    finally:
        child.kill()
        child.join()
    if error:
        raise RuntimeError(error)
    return result


def time_training(report, sizes, formulations, compilings, layers, device):
    """One iteration of each size and formulation, compiled or not: lines of the report."""
    rates = machine_rates(device)
    report.tell_rates(rates)
    free_memory(device)
    for size in sizes:
        for formulation in formulations:
            for compiled in compilings:
                name = f'{formulation} {size}{", compiled" if compiled else ""}'
                # a size that does not fit ends its own process only
                report.attempt(name, '', in_own_process, training_step, formulation, size, layers,
                               compiled, rates[0], device)


def train(options, device):
    """Each B,L,V,D and formulation."""
    report = Report(options.out or free_name('out/train.json'), options, device)
    check_writable(report.out)
    compiled = options.compile and device.type == 'cuda'
    # on a CPU dense is in fp32 already
    formulations = FORMULATIONS if device.type == 'cuda' else FORMULATIONS[:2]
    time_training(report, options.sizes, formulations, [compiled], options.layers, device)
    report.finish()


# -----------------------------------------------------------------------------
# The list for one GPU: the paper's size, 12 blocks of 768 over 50,257 tokens

def gpu_train(report, tiny, device):
    """One iteration at 8,192 tokens, rows of 128 and of 1,024, with and without compilation."""
    sizes = ['2,16,64,32'] if tiny else ['64,128,50257,768', '8,1024,50257,768']
    layers = 1 if tiny else 12
    time_training(report, sizes, FORMULATIONS, [False, True], layers, device)


def gpu_call(report, tiny, device):
    """One call of a student, as a CUDA graph."""
    size = '16,64,32' if tiny else '128,50257,768'
    batches = [1, 2] if tiny else [1, 8, 64, 256]
    time_models(report, [f'student,{size}@1'], batches, [], 1 if tiny else 12, True, device)


def gpu_samplers(report, tiny, device):
    """What each model needs to write rows: ar, mdlm, a flow, a diffusion."""
    size = '16,64,32' if tiny else '128,50257,768'
    items = [f'ar,{size}']
    if tiny:
        items += [f'mdlm,{size}@1,2', f'flm,{size}@2', f'diffuseq,{size}@2']
    else:
        items += [f'mdlm,{size}@8,64', f'flm,{size}@32,128,1024', f'diffuseq,{size}@50,2000']
    batches = [2] if tiny else [1, 64]
    time_models(report, items, batches, [], 1 if tiny else 12, True, device)


GPU_STEPS = {'train': gpu_train, 'call': gpu_call, 'samplers': gpu_samplers}


def gpu(options, device):
    """The steps of the list, each with a file of its own; one that fails does not stop the rest."""
    if device.type != 'cuda' and not options.tiny:
        fail(f'gpu needs a CUDA device, not {device}; rehearse it: '
             'python bench.py gpu --tiny')
    names = [name for name in options.only if name not in options.skip]
    if not names:
        fail('--only and --skip leave no step')
    # a rehearsal is not to replace what was measured
    folder = Path(options.folder or ('out' if options.tiny else 'assets'))
    reports = {}
    for name in names:
        out = folder / f'gpu-{name}.json'
        reports[name] = Report(out if options.folder else free_name(out), options, device)
        check_writable(reports[name].out)
    failed = []
    for name, report in reports.items():
        print(f'\n{name}', flush=True)
        # each line has a try of its own; this one is for what comes before the first
        try:
            GPU_STEPS[name](report, options.tiny, device)
        except Exception as error:
            report.note_failure(name, error)
        report.show()
        failed.extend(report.failed)
    if failed:
        raise SystemExit(1)


# -----------------------------------------------------------------------------
# What has been measured: printed and written as it comes, as a table and as a picture

def describe(error):
    """An exception as one line."""
    lines = str(error).strip().splitlines() or ['']
    return f'{type(error).__name__}: {lines[0]}'


class Report:
    """The lines (name, nfe, [figures, one dict for each seed]) of a table, and their JSON file."""

    def __init__(self, out, options, device):
        self.out = str(out)
        self.files = [self.out]
        self.lines = []
        self.failed = []
        told = dict(vars(options))
        self.about = {
            'device': torch.cuda.get_device_name() if device.type == 'cuda' else str(device),
            'cpu_capability': torch.backends.cpu.get_cpu_capability(),
            'torch': str(torch.__version__),
            'threads': torch.get_num_threads(),
            'date': datetime.date.today().isoformat(),
            'command': told.pop('command'),
            'options': told,
        }

    def tell_rates(self, rates):
        """Keep what the machine reached, which floors and mfu are measured by."""
        flops, bandwidth = rates
        self.about['GFLOP_per_s'] = flops / 1e9
        self.about['GB_per_s'] = bandwidth / 1e9

    def add(self, name, nfe, runs):
        """A new line, which is printed and written."""
        # written each time: a stop loses nothing
        self.lines.append((name, nfe, runs))
        calls = f', nfe {nfe}' if nfe else ''
        means = [f'{key} {number(mean)}' for key, (mean, _) in summary(runs).items()]
        print(f'{name}{calls}: {", ".join(means)}', flush=True)
        self.write()

    def attempt(self, name, nfe, work, *arguments):
        """Add the line work(*arguments); if it fails, say so and let the others go on."""
        try:
            runs = work(*arguments)
        except Exception as error:
            self.note_failure(f'{name}, nfe {nfe}' if nfe else name, error)
        else:
            self.add(name, nfe, runs)

    def note_failure(self, what, error):
        """Say and keep what went wrong."""
        line = f'{what}: failed: {describe(error)}'
        print(line, file=sys.stderr, flush=True)
        self.failed.append(line)
        self.write()

    def write(self):
        """The JSON file, whole."""
        runs = [{'model': name, 'nfe': nfe, 'seeds': runs} for name, nfe, runs in self.lines]
        figures = {**self.about, 'failed': self.failed, 'runs': runs}
        write_whole(self.out, (json.dumps(figures, indent=1) + '\n').encode())

    def show(self):
        """Print the table, and where the figures are."""
        print(f'\n{table(self.lines)}\n\nwrote {" and ".join(self.files)}', flush=True)

    def finish(self):
        """Show what there is; exit status 1 if something failed."""
        self.show()
        if self.failed:
            raise SystemExit(1)


def summary(runs):
    """Dicts of figures, one for each seed -> {figure: (mean, half the range)}."""
    found = {}
    for key in runs[0]:
        values = [run[key] for run in runs if key in run]
        found[key] = statistics.mean(values), (max(values) - min(values)) / 2
    return found


def number(x, digits=3):
    """A figure with so many digits, or whole where these would not reach its point."""
    return f'{x:,.0f}' if abs(x) >= 10 ** digits - 0.5 else f'{x:.{digits}g}'


def cell(found, key):
    """A figure of a summary as text: mean (half the range); empty where it is not measured."""
    if key not in found:
        return ''
    mean, spread = found[key]
    return f'{number(mean)} ({number(spread, 2)})' if spread else number(mean)


def table(lines):
    """[(name, nfe, [figures, one dict for each seed])] -> a Markdown table."""
    # the columns, in the order in which they turn up
    keys = []
    for _, _, runs in lines:
        keys += [key for key in runs[0] if key not in keys]
    text = ['| | nfe | ' + ' | '.join(keys) + ' |', '|---' * (len(keys) + 2) + '|']
    for name, nfe, runs in lines:
        found = summary(runs)
        cells = [name, str(nfe), *(cell(found, key) for key in keys)]
        text.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(text)


def shown_figure(lines):
    """The figure that a picture shows: the exact yardstick, or distance, or likeness to targets."""
    for key in ('valid', 'energy'):
        if key in lines[0][2][0]:
            return key
    return 'bleu'


def short_names(names):
    """{name: what tells it from the others}: without the folders that all of them are in."""
    paths = [Path(name).parts for name in names]
    shared = 0
    # the last part stays, whatever they share
    while all(shared < len(parts) - 1 and parts[shared] == paths[0][shared] for parts in paths):
        shared += 1
    return {name: Path(*parts[shared:]).as_posix() for name, parts in zip(names, paths)}


def plot_quality(axes, lines, key, by_time):
    """A figure against calls or milliseconds per row, one line for each model."""
    # one line of points for each model
    curves = {}
    for name, nfe, runs in lines:
        # real text, and what else needs no model, makes no calls
        if nfe:
            found = summary(runs)
            x = found['ms_per_row'][0] if by_time else nfe
            curves.setdefault(name, []).append((x, found[key][0]))
    labels = short_names(list(curves))
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points)), 'o-', label=labels[name])
    axes.set(xlabel='ms per row' if by_time else 'network calls', ylabel=key)
    # 1, 2, 4, ...
    axes.set_xscale('log', base=2)
    axes.xaxis.set_major_formatter('{x:g}')
    axes.grid(alpha=0.3)


def flow_teachers(lines):
    """{name: (ts, taus, V)}: time axes and vocabulary of the flows that are no students."""
    found = {}
    for name, nfe, _ in lines:
        if nfe and name not in found:
            model, _ = load(with_seed(name, 0))
            if model.config.model == 'flm' and not is_student(model.config):
                found[name] = model.ts, model.taus, model.config.vocab
    return found


def plot_time_axes(axes, teachers):
    """tau(t) of each teacher, beside the paper's."""
    labels = short_names(list(teachers))
    for name, (ts, taus, _) in teachers.items():
        axes.plot(ts, taus, label=labels[name])
    ts, taus = time_axis(next(iter(teachers.values()))[2])
    axes.plot(ts, taus, 'k:', label="the paper's")
    axes.set(xlabel='time t', ylabel='tau')
    axes.legend()


def picture(lines, path):
    """An SVG: quality against calls and against time, and the teachers' time axes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    teachers = flow_teachers(lines)
    panels = 3 if teachers else 2
    figure = Figure(figsize=(5, 3 * panels), layout='constrained')
    axes = figure.subplots(panels)
    key = shown_figure(lines)
    plot_quality(axes[0], lines, key, by_time=False)
    plot_quality(axes[1], lines, key, by_time=True)
    # above both, where it hides no point
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside upper left')
    if teachers:
        plot_time_axes(axes[2], teachers)
    # without a date, and with names that are not drawn, so that equal figures give equal files
    svg = io.BytesIO()
    with rc_context({'svg.hashsalt': 'bench'}):
        figure.savefig(svg, format='svg', metadata={'Date': None})
    write_whole(path, svg.getvalue())


def main(options):
    """Do what the first word of the command line says."""
    device = pick_device(options.device)
    # the clocks here are those of the first GPU
    if device.type == 'cuda' and device.index:
        fail(f'--device {device}: name a GPU by CUDA_VISIBLE_DEVICES={device.index} in place of it')
    kinds = {'quality': quality, 'speed': speed, 'train': train, 'gpu': gpu}
    kinds[options.what](options, device)


if __name__ == '__main__':
    run_script(lambda: main(parse()))
