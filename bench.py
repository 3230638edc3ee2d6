"""
How good are the samples, in how many network calls, and how fast?

    python bench.py quality                     # the newest student and its teacher
    python bench.py quality out/dates/student out/dates-mdlm/teacher --nfe 1 4 64
    python bench.py speed out/stories/student@1 out/stories/teacher@8,64
    python bench.py speed student,128,50257,256@1 ar,128,50257,256    # untrained, of size L,V,D
    python bench.py train 16,128,50257,256      # B,L,V,D: one iteration, beside a plain GPT's
    python bench.py tables                      # the tables of the pages, from the JSON files

Each line of figures is printed, and written to a JSON file, as soon as it is known: of several
seeds the mean (and half the range). For `quality` there is a picture, too.
"""

import argparse
import datetime
import io
import json
import math
import os
import re
import shlex
import statistics
import sys
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# before torch, which takes seconds to load: Ctrl-C is one line from here on
from prepare_data import (Parser, as_command, as_rows, check_output, expected_seen, fail,
                          is_stories, jensen_shannon, load_dataset, need, newest_dataset, number,
                          positive_int, run_script, sanity_metrics, say, split_rows, story_metrics,
                          tell, to_texts, write_whole)

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.benchmark import Timer

from model import (MODELS, Config, autocast, build, has_bf16, load, newest_checkpoint, pick_device,
                   round_weights)
from sample import (add_sampler_options, best_rows, bleu, network_calls, refuse_sampler_options,
                    sampler_options, split_words, timed_rows)
from train_teacher import difference, refuse_unused, up_to

# -----------------------------------------------------------------------------
# Options

def split_calls(item):
    """'NAME@8,64' -> ('NAME', [8, 64]); without @ the list is empty."""
    # a folder's name may hold an @ as well
    found = re.fullmatch(r'(.+)@([1-9]\d*(?:,[1-9]\d*)*)', item)
    if found is None:
        return item, []
    name, calls = found.groups()
    return name, [int(nfe) for nfe in calls.split(',')]


def untrained_size(name):
    """'flm,128,50257,256' -> ('flm', [128, 50257, 256]); None for the name of a checkpoint."""
    if not re.fullmatch(r'(student|flm|diffuseq|mdlm|ar)(,\d{1,6}){3}', name):
        return None
    kind, *shape = name.split(',')
    return kind, [int(n) for n in shape]


def training_size(text):
    """argparse type: B,L,V,D -> four numbers."""
    if not re.fullmatch(r'[1-9]\d{0,5}(,\d{1,6}){3}', text):
        raise argparse.ArgumentTypeError(f'{text[:40]!r} is not B,L,V,D, as in 16,128,50257,256')
    return [int(n) for n in text.split(',')]


def check_shape(length, vocab, width):
    """Stop at a model of a size that cannot be."""
    # four tokens are special; rotary positions turn pairs of channels
    if length < 1 or vocab < 10 or width < 2 or width % 2:
        fail(f'size {length},{vocab},{width}: L must be at least 1, V at least 10, and D even')


def add_quality(parser):
    """The options of `quality`."""
    several = number(int, 2, 1000)
    add = parser.add_argument
    add('models', nargs='*', metavar='CHECKPOINT',
        help='folders or .pt files, all of one data set; {seed} in a name stands for 0, 1, ...; '
             'default: the newest student and its teacher')
    add('--nfe', nargs='+', type=positive_int, default=[1, 4, 64],
        help='network calls')
    add('--rows', type=positive_int, default=500,
        help='samples of each model, nfe and seed; fewer if held-out text allows no more')
    add('--seeds', type=positive_int, default=1,
        help='how many seeds of rows and noise: 0, 1, ...')
    add('--scorer', metavar='CHECKPOINT',
        help='text: an ar model; adds gen_ppl')
    add_sampler_options(add)
    # there are fewer sources then
    add = parser.add_mutually_exclusive_group().add_argument
    add('--per-source', type=several,
        help='pairs: samples of each source; adds self-BLEU and div-4')
    add('--mbr', type=several, metavar='N',
        help='pairs: of N samples of each source the one most like the others is scored')


def parse(argv=None):
    """The options, and under `command` the line that was typed."""
    parser = Parser(description=__doc__)
    kinds = parser.add_subparsers(dest='what', required=True, metavar='WHAT')
    quality_parser = kinds.add_parser('quality', help='samples beside real text')
    speed_parser = kinds.add_parser('speed', help='time to write rows, beside its roofline bound')
    train_parser = kinds.add_parser('train', help='time and memory of one training iteration')
    kinds.add_parser('tables', help='regenerate the tables in README.md and assets/*.md')
    add_quality(quality_parser)

    add = speed_parser.add_argument
    add('models', nargs='*', metavar='MODEL[@NFE,NFE]',
        help='checkpoints, or untrained: student, flm, diffuseq, mdlm or ar, then ,L,V,D; '
             'default: the newest student and its teacher')
    add('--nfe', nargs='+', type=positive_int, default=[1, 4, 64],
        help='network calls of models without an @')
    add('--batch', nargs='+', type=positive_int, default=[1, 8, 64],
        help='rows written at once')

    add = train_parser.add_argument
    add('sizes', nargs='+', type=training_size, metavar='B,L,V,D',
        help='rows of a batch, their length, vocabulary, width')

    for one in (speed_parser, train_parser):
        add = one.add_argument
        add('--layers', type=positive_int, default=4,
            help='transformer blocks of untrained models')
        add('--no-compile', dest='compile', action='store_false',
            help='no torch.compile on CUDA')
    for one in (quality_parser, speed_parser, train_parser):
        add = one.add_argument
        add('--out',
            help='the JSON file; default: a new one in out/')
        add('--overwrite', action='store_true',
            help='--out may replace a file')
        add('--device', default='',
            help='cpu, cuda or mps; default: the best there is')
    words = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(words)
    options.command = shlex.join(['python', 'bench.py', *words])
    return options


# -----------------------------------------------------------------------------
# Distances between samples and real text, on token ids; repetition cannot fool them

def all_ngrams(rows, n):
    """The n-grams, as tuples, of all rows (lists); none goes from one row into the next."""
    grams = []
    for row in rows:
        shifted = [row[i:] for i in range(n)]
        grams.extend(zip(*shifted))
    return grams


def ngram_divergence(a, b):
    """
    Jensen-Shannon divergence (Lin 1991) of the distributions of items in two lists, in nats: 0 if
    they are alike, ln 2 if they have nothing in common.
    """
    # texts of fewer than n tokens have no n-gram to compare
    if not a or not b:
        return math.log(2)
    return jensen_shannon(Counter(a), Counter(b))


def bag(row, dim):
    """How often each 1- and 2-gram of a list of ids occurs, hashed to `dim` counts: (dim,)."""
    hashes = []
    for token in row:
        hashes.append((token + 1) * 2654435761 % dim)
    # another odd number, so that the order of a pair counts
    for first, second in zip(row, row[1:]):
        mixed = (first + 1) * 2654435761 + (second + 1) * 40503
        hashes.append(mixed % dim)
    hashes = torch.tensor(hashes, dtype=torch.long)
    counts = torch.bincount(hashes, minlength=dim)
    return counts.float()


def energy_distance(a, b, dim=512):
    """
    Energy distance (Szekely and Rizzo 2013) 2 E|x-y| - E|x-x'| - E|y-y'| of rows, lists of ids, as
    bags of 1- and 2-grams. Unbiased: about 0, even below, for rows of the same distribution.
    """
    x = torch.stack([bag(row, dim) for row in a])
    y = torch.stack([bag(row, dim) for row in b])
    between = torch.cdist(x, y).double().mean()
    distance = 2 * between
    for z in (x, y):
        # no row is compared with itself
        pairs = len(z) * (len(z) - 1)
        within = torch.cdist(z, z).double()
        distance -= within.sum() / pairs
    return distance.item()


def training_texts(ids, meta, rows_at_once=10_000):
    """The hashes of all training texts: the texts of a billion tokens would not fit in memory."""
    seen = set()
    size = rows_at_once * meta['length']
    for start in range(0, len(ids), size):
        rows = as_rows(ids[start:start + size], meta['length'])
        for _, text in split_rows(rows, meta):
            seen.add(hash(tuple(text)))
    return seen


def copied(texts, seen):
    """The fraction of texts (lists of ids) that are, as a whole, texts of the training set."""
    copies = [hash(tuple(ids)) in seen for ids in texts]
    return sum(copies) / len(texts)


def scored_positions(rows, meta):
    """Which positions of rows (B, L) are text or the <eos> that ends it, not padding: (B, L)."""
    # a row of a stream is full of text
    if meta['kind'] == 'stream':
        return torch.ones_like(rows, dtype=torch.bool)
    return up_to(rows, meta, '<eos>') >= 0


@torch.no_grad()
def generative_perplexity(rows, meta, scorer):
    """exp of the mean -log p of the tokens of rows (B, L) under an ar model, the scorer."""
    device = next(scorer.parameters()).device
    nats = 0.0
    tokens = 0
    for part in rows.split(max(1, 8192 // rows.shape[1])):
        part = part.to(device)
        scored = scored_positions(part, meta)
        # what is given does not count
        given = torch.where(scored, -1, part)
        n = scored.sum(1)  # (B,)
        # the loss is a mean over the positions that are not given
        nats += (scorer.loss(part, given) * n).sum().item()
        tokens += n.sum().item()
    return math.exp(nats / tokens)


# -----------------------------------------------------------------------------
# Pairs: scores of sequence-to-sequence text, as DiffuSeq has them; BLEU is in sample.py

class RougeWords:
    """
    Words in lower case without punctuation: of ASCII text those of rouge_score itself, which drops
    all other letters.
    """

    def tokenize(self, text):
        kept = []
        for letter in text.lower():
            # letters, the marks that go with them, and numbers
            known = unicodedata.category(letter)[0] in 'LMN'
            kept.append(letter if known else ' ')
        return split_words(''.join(kept))


def rouge_l(text, reference):
    """ROUGE-L (Lin 2004), the F-measure of the longest common subsequence, in [0, 1]."""
    from rouge_score.rouge_scorer import RougeScorer
    scorer = RougeScorer(['rougeL'], tokenizer=RougeWords())
    return scorer.score(reference, text)['rougeL'].fmeasure


def distinct(texts, n):
    """
    Fraction of distinct n-grams among all n-grams of some texts (arXiv:1510.03055): dist-1 of one
    text, div-4 of all texts of a source.
    """
    words = [split_words(text) for text in texts]
    grams = all_ngrams(words, n)
    different = len(set(grams))
    return different / max(1, len(grams))


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


def pair_figures(texts, targets, per_source):
    """Texts, `per_source` in a row for the same target, and their targets -> a dict of means."""
    scores = defaultdict(list)
    for text, target in zip(texts, targets):
        scores['bleu'].append(bleu(text, target))
        scores['rouge_l'].append(rouge_l(text, target))
        scores['dist1'].append(distinct([text], 1))
    # how much the samples of one source differ
    if per_source is not None:
        for start in range(0, len(texts), per_source):
            group = texts[start:start + per_source]
            scores['self_bleu'].append(self_bleu(group))
            scores['div4'].append(distinct(group, 4))
    means = {}
    for name, values in scores.items():
        means[name] = statistics.mean(values)
    return means


# -----------------------------------------------------------------------------
# Quality: what can be wrong is said before the first sample is drawn

@dataclass
class Opened:
    """What has to be known of a checkpoint before it is measured."""
    config: Config
    meta: dict          # of the data that it was trained on
    data: str           # their folder
    options: dict       # of its training; may be empty


def newest_pair():
    """The newest student, and its teacher if that is still there: names; a line says which."""
    path = newest_checkpoint(lambda config: config.calls > 0)
    if path is None:
        command = as_command('distill.py')
        fail(f'out/ holds no student; name a model, or make one: {command}')
    names = [str(path)]
    _, ckpt = load(path)
    # published weights do not say
    parents = ckpt.get('parents', {})
    if 'teacher' in parents and os.path.isfile(parents['teacher']['path']):
        names.append(parents['teacher']['path'])
    say(f'measuring {" and ".join(names)}')
    return names


def with_seed(name, seed):
    """The path of a model's `seed`-th run."""
    return name.replace('{seed}', str(seed))


def open_models(names, seeds):
    """{path: Opened} of every model and seed; their weights are not kept."""
    opened = {}
    for name in names:
        for seed in range(seeds):
            path = with_seed(name, seed)
            model, ckpt = load(path, 'cpu')
            meta = ckpt['meta']
            opened[path] = Opened(model.config, meta, ckpt['data'], ckpt['options'])
    return opened


def other_data(a, b):
    """How two descriptions of data differ, as a sentence; '' if they do not."""
    fields = ['tokenizer', 'length', 'kind', 'pairs']
    # published weights do not say which data they saw
    if a['crc'] and b['crc']:
        fields.append('crc')
        # the first checksum is of the description, and so of the folder's name
        a = {**a, 'crc': a['crc'][1:]}
        b = {**b, 'crc': b['crc'][1:]}
    return difference(a, b, fields)


def load_common_data(opened):
    """The data that all models were trained on: (folder, (meta, train ids, val ids))."""
    first, *others = opened
    for path in others:
        changed = other_data(opened[first].meta, opened[path].meta)
        if changed:
            fail(f'{path} cannot be compared with {first}: it was trained on {changed}')
    folder = opened[first].data or newest_dataset()
    data = load_dataset(folder)
    # they may have been prepared again since
    changed = other_data(opened[first].meta, data[0])
    if changed:
        fail(f'{folder} is not what {first} was trained on: it has {changed}; train it again')
    return folder, data


# the kinds of data that an option is for
FOR_DATA = {'per_source': ['pairs'], 'mbr': ['pairs'], 'scorer': ['text']}


def check_quality(options, opened, meta):
    """Stop at options without effect on these models, and where a package is missing."""
    kinds = [one.config.model for one in opened.values()]
    models = [MODELS[kind] for kind in kinds]
    refuse_sampler_options(options, models, 'these models')
    data = 'pairs' if meta['pairs'] else 'text'
    refuse_unused(options, FOR_DATA, data, 'these models')
    # for a date any of eight texts is right, so none of them is a reference
    referenced = meta['pairs'] and meta['tokenizer']['name'] != 'dates'
    if referenced or options.mbr:
        need('nltk', 'BLEU')
    if referenced:
        need('rouge-score', 'ROUGE-L')


def rows_to_draw(options, meta, held):
    """How many samples are drawn from each model: --rows, or what so many held-out rows allow."""
    each = options.per_source or options.mbr or 1
    # of text one half is compared with, the other half is shown beside the samples
    most = held * each if meta['pairs'] else held // 2
    # all samples of each source; a distance is between two rows
    rows = min(options.rows, most) // each * each
    least = each if meta['pairs'] else 2
    if rows < least:
        fail(f'--rows {options.rows}, of {held} held-out rows: too few; need {least}')
    if rows != options.rows:
        say(f'{held} rows are held out: measuring {rows} samples, not {options.rows}')
    return rows


def open_scorer(name, meta, device):
    """The --scorer, if it can judge these data; None without one."""
    if not name:
        return None
    scorer, ckpt = load(name, device)
    # only ar knows the probability of a whole text
    if scorer.config.model != 'ar':
        command = as_command('train_teacher.py', '--model', 'ar')
        fail(f'--scorer {name}: is not autoregressive; make one: {command}')
    changed = difference(meta, ckpt['meta'], ('tokenizer',))
    if changed or scorer.config.length < meta['length']:
        fail(f'--scorer {name}: has {changed or "shorter rows"}')
    return scorer


# -----------------------------------------------------------------------------
# Quality: the figures

class Reference:
    """What samples are compared with, and how many of them there are."""

    def __init__(self, folder, data, options, scorer):
        self.folder = folder
        self.meta, train, val = data
        self.scorer = scorer
        # held-out rows (n, L), in the order of the file
        held = as_rows(val, self.meta['length'])
        self.held = torch.from_numpy(held)
        # samples of each model, nfe and seed; of pairs so many of them are of one source
        self.rows = rows_to_draw(options, self.meta, len(held))
        self.each = options.per_source or options.mbr or 1
        if not self.meta['pairs']:
            self.add_texts(train)

    def add_texts(self, train):
        """What texts without a source are compared with."""
        meta = self.meta
        # shuffled, as neighbors are alike
        rng = np.random.default_rng(0)
        held = self.held[rng.permutation(len(self.held))]
        half = len(held) // 2
        # one half is what samples should be like; beyond 2,000 rows figures hardly change
        like = held[:half][:2000]
        self.real = [ids for _, ids in split_rows(like, meta)]
        # the other half shows what text scores
        self.shown = held[half:][:self.rows]
        # the text of a stream is not cut where samples are: a copy would not be found
        self.seen = set()
        if meta['kind'] == 'rows':
            self.seen = training_texts(train, meta)
        # stories: the fraction that is in the training set by chance
        self.chance = 0.0
        if is_stories(meta):
            self.chance = expected_seen(len(train) // meta['length'])


def shuffled(rows, meta):
    """Rows (n, L) with the tokens of each text in a random order: no text, of the right words."""
    rng = np.random.default_rng(0)
    rows = rows.clone()
    for row, (_, ids) in zip(rows, split_rows(rows, meta)):
        row[:len(ids)] = torch.from_numpy(rng.permutation(ids))
    return rows


def text_figures(rows, reference):
    """All figures of rows (B, L) of text without a source: a dict."""
    meta = reference.meta
    texts = [ids for _, ids in split_rows(rows, meta)]
    # of each story it is known whether it is valid
    if is_stories(meta):
        figures = story_metrics([text for _, text in to_texts(rows, meta)])
    else:
        figures = sanity_metrics(rows, meta, reference.folder)
    # how far they are from real text
    for n in (1, 2, 3):
        ours = all_ngrams(texts, n)
        real = all_ngrams(reference.real, n)
        figures[f'js{n}'] = ngram_divergence(ours, real)
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
    if options.mbr is not None:
        rows = best_rows(rows, options.mbr, meta)
        known = known[::options.mbr]
    figures = sanity_metrics(rows, meta, reference.folder)
    # for a date any of eight texts is right, as sanity_metrics knows
    if meta['tokenizer']['name'] != 'dates':
        texts = [text for _, text in to_texts(rows, meta)]
        targets = [text for _, text in to_texts(known, meta)]
        figures.update(pair_figures(texts, targets, options.per_source))
    return figures


def draw(reference, seed):
    """
    Held-out pairs (n, L), drawn by a seed, and what is given of them to a model: their sources, -1
    after these. Each pair is there once for each of its samples, one after the other. Of text
    nothing is drawn or given.
    """
    meta = reference.meta
    if not meta['pairs']:
        nothing = torch.full((reference.rows, meta['length']), -1)
        return None, nothing
    held = reference.held
    sources = reference.rows // reference.each
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(held), sources, replace=False)
    known = held[chosen]
    known = known.repeat_interleave(reference.each, dim=0)
    return known, up_to(known, meta, '<sep>')


def pair_rows(pairs, meta):
    """(source, target), lists of ids -> rows (n, L); what does not fit is cut off, as models do."""
    eos, pad, sep, _ = meta['special'].values()
    length = meta['length']
    rows = []
    for source, target in pairs:
        ids = [*source, sep, *target, eos]
        ids += [pad] * length
        rows.append(ids[:length])
    return torch.tensor(rows)


def pair_references(reference, options, seed):
    """What pairs score without a model: each source as its own answer, and another's target."""
    # the same sources as the models'
    known, _ = draw(reference, seed)
    pairs = split_rows(known, reference.meta)
    copies = []
    others = []
    for i, (source, _) in enumerate(pairs):
        copies.append((source, source))
        # the samples of one source share its target, so another one is the next source's
        _, other = pairs[(i + reference.each) % len(pairs)]
        others.append((source, other))
    figures = []
    for answers in (copies, others):
        rows = pair_rows(answers, reference.meta)
        figures.append(source_figures(rows, known, reference, options))
    return figures


def measure(name, nfe, reference, options, device):
    """All figures of a model at one nfe: a dict for each seed."""
    runs = []
    for seed in range(options.seeds):
        model, ckpt = load(with_seed(name, seed), device)
        model = round_weights(model)
        how = sampler_options(model, options)
        known, given = draw(reference, seed)
        rows, ms = timed_rows(model, given, nfe, seed, **how)
        if known is None:
            figures = text_figures(rows, reference)
        else:
            figures = source_figures(rows, known, reference, options)
        # of --mbr, the time of a row that is kept
        figures['ms_per_row'] = ms * (options.mbr or 1)
        # what it took to train, as far as the checkpoint knows
        if 'iter' in ckpt:
            figures['train_iters'] = ckpt['iter']
        if 'seconds' in ckpt:
            figures['train_minutes'] = ckpt['seconds'] / 60
        runs.append(figures)
    return runs


def quality(options, device):
    """Measure every model at every nfe, after what needs no model."""
    # what can be wrong
    names = options.models or newest_pair()
    opened = open_models(names, options.seeds)
    folder, data = load_common_data(opened)
    check_quality(options, opened, data[0])
    scorer = open_scorer(options.scorer, data[0], device)
    report = Report(options, device)
    drawing = Path(report.out).with_suffix('.svg')
    check_output('the picture', drawing, '.svg', options.overwrite)
    reference = Reference(folder, data, options, scorer)
    # what it takes to do this again
    report.about['rows'] = reference.rows
    report.about['trained'] = trained = {}
    for path, one in opened.items():
        trained[path] = one.options

    # what real text scores, or answers that need no model
    if reference.meta['pairs']:
        copies = []
        others = []
        for seed in range(options.seeds):
            copy, other = pair_references(reference, options, seed)
            copies.append(copy)
            others.append(other)
        report.add('the source itself', '', copies)
        report.add('another target', '', others)
    else:
        report.add('held-out text', '', [text_figures(reference.shown, reference)])
        mixed = shuffled(reference.shown, reference.meta)
        report.add('the same, shuffled', '', [text_figures(mixed, reference)])

    # the models
    plan = []
    for name in names:
        first = opened[with_seed(name, 0)]
        for nfe in calls_of(first.config, options.nfe):
            plan.append((name, nfe))
    for i, (name, nfe) in enumerate(plan):
        tell(f'{i + 1} of {len(plan)}: {name}, nfe {nfe} ...')
        report.attempt(name, nfe, measure, name, nfe, reference, options, device)
    picture(report.lines, drawing)
    report.finish()


def calls_of(config, calls):
    """Those of some numbers of network calls in which a model can write."""
    # ar makes a call for each token, whatever is asked for
    return dict.fromkeys(network_calls(config, nfe) for nfe in calls)


# -----------------------------------------------------------------------------
# Speed: measured beside the roofline bound, the time that the machine must take

def median_seconds(work):
    """Median seconds of work(), after warm-up; accelerators are synchronized."""
    threads = torch.get_num_threads()
    timer = Timer('work()', globals={'work': work}, num_threads=threads)
    times = timer.adaptive_autorange(min_run_time=1, max_run_time=10)
    return times.median


def machine_rates(device):
    """Measured peaks: FLOP/s of a large matmul, bytes/s read or written by a copy."""
    n = 1024
    size = 2 ** 26  # floats
    if device.type == 'cuda':
        n = 8192
        size = 2 ** 28
    # in the type that models compute in
    dtype = torch.bfloat16 if has_bf16(device) else torch.float32
    a = torch.randn(n, n, device=device, dtype=dtype)
    flops = 2 * n ** 3 / median_seconds(lambda: a @ a)
    # memory that was never written need not be read
    x, y = torch.ones(2, size, device=device)
    # each number is read and written
    bandwidth = 2 * x.nbytes / median_seconds(lambda: y.copy_(x))
    say(f'large products {flops / 1e9:,.0f} GFLOP/s, copies {bandwidth / 1e9:,.1f} GB/s')
    return flops, bandwidth


def matrix_weights(*parts):
    """How many weights of matrices are in modules: each position meets them once in a call."""
    total = 0
    for part in parts:
        for p in part.parameters():
            if p.ndim == 2:
                total += p.numel()
    return total


def forward_flops(weights, layers, length, width):
    """Floating-point operations of one network call for one row."""
    # two products, each L x L x D
    attention = 4 * layers * length ** 2 * width
    # a multiply and an add for each weight
    return 2 * weights * length + attention


def denoiser_weights(net):
    """The matrix_weights of a Denoiser."""
    # without the tables, where a row is looked up, and what only the time goes through
    return matrix_weights(net.into, net.blocks, net.head)


def row_flops(model, nfe):
    """The fewest floating-point operations that write one row in nfe calls, given nothing."""
    c = model.config
    weights = denoiser_weights(model.net)
    if c.model == 'ar':
        # with a cache: each call is for one position, which sees itself and those before it
        seen = c.length * (c.length + 1) / 2
        return 2 * weights * c.length + 4 * c.layers * seen * c.width
    calls = nfe * forward_flops(weights, c.layers, c.length, c.width)
    by_table = 2 * c.length * c.vocab * c.channels  # a product with E, at each position
    if c.model == 'flm':
        # between two calls the noisy row moves toward p E
        return calls + (nfe - 1) * by_table
    if c.model == 'diffuseq':
        # after the last call x is rounded
        return calls + by_table
    return calls


def bytes_read(model, rows, nfe, number_size):
    """The fewest bytes that must be read to write so many rows in nfe calls; see row_flops."""
    c = model.config
    net = model.net
    # of tables only the rows of given tokens are looked up
    tables = ('embed', 'known.weight')
    weights = sum(p.nbytes for name, p in net.named_parameters() if name not in tables)
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


def roofline_bound(model, rows, nfe, rates, number_size):
    """
    Seconds that writing must take on a machine of these rates: whichever is longer, computing its
    products or reading its weights. Weights that stay in a cache are read faster.
    """
    flops, bandwidth = rates
    computing = rows * row_flops(model, nfe) / flops
    reading = bytes_read(model, rows, nfe, number_size) / bandwidth
    return max(computing, reading)


def heads_of(width):
    """The number of heads, each of gcd(width, 64) channels."""
    return width // math.gcd(width, 64)


def new_model(kind, length, vocab, width, layers):
    """An untrained student, flm, diffuseq, mdlm or ar: as fast as a trained one."""
    check_shape(length, vocab, width)
    calls = 0
    if kind == 'student':
        kind = 'flm'
        calls = 1
    heads = heads_of(width)
    channels = width
    config = Config(vocab, length, layers, heads, width, channels, model=kind, calls=calls)
    return build(config)


def open_timed(name, layers, device):
    """The model of a name, a checkpoint's or kind,L,V,D, on a device."""
    size = untrained_size(name)
    if size is None and ',' in name and not os.path.exists(name):
        fail(f'{name}: neither a checkpoint nor KIND,L,V,D such as student,32,2048,128')
    if size is None:
        model, _ = load(with_seed(name, 0), device)
    else:
        kind, shape = size
        model = new_model(kind, *shape, layers)
        model = model.to(device).eval()
    return round_weights(model)


def recorded(work):
    """work() as one CUDA graph: a function that runs it again, without Python between kernels."""
    # on a stream of its own, as CUDA requires; the first runs compile, and allocate what stays
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
    shape = (rows, model.config.length)
    nothing = torch.full(shape, -1, device=device)
    with autocast(device):
        return model.sample(nothing, nfe)


def time_writing(name, rows, nfe, options, rates, device):
    """How long a model takes to write `rows` rows in nfe calls, and the bound: a dict in a list."""
    model = open_timed(name, options.layers, device)
    work = partial(write_nothing_given, model, rows, nfe)
    if options.compile and device.type == 'cuda':
        torch.compiler.reset()
        model.net.compile(dynamic=False)
        work = recorded(work)
    seconds = median_seconds(work)
    number_size = 2 if has_bf16(device) else 4
    bound = roofline_bound(model, rows, nfe, rates, number_size)
    return [{
        'batch': rows,
        'ms': 1000 * seconds,
        'rows_per_s': rows / seconds,
        'roofline_ms': 1000 * bound,
        'times_roofline': seconds / bound,
    }]


def speed(options, device):
    """Time to write `batch` rows, nothing given, with each model."""
    # each is opened once before, so that a wrong name costs nothing
    plan = []
    for item in options.models or newest_pair():
        name, calls = split_calls(item)
        config = open_timed(name, options.layers, 'cpu').config
        for rows in options.batch:
            for nfe in calls_of(config, calls or options.nfe):
                plan.append((name, rows, nfe))
    report = Report(options, device)
    rates = machine_rates(device)
    report.tell_rates(rates)
    for i, (name, rows, nfe) in enumerate(plan):
        tell(f'{i + 1} of {len(plan)}: {name}, nfe {nfe}, {rows} rows ...')
        report.attempt(name, nfe, time_writing, name, rows, nfe, options, rates, device)
    report.finish()


# -----------------------------------------------------------------------------
# Training: one iteration as model.py computes it, as published code does, and a plain GPT's

class GPTBlock(nn.Module):
    """Causal attention and MLP, each after a LayerNorm."""

    def __init__(self, width):
        super().__init__()
        self.heads = heads_of(width)
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        B, L, D = x.shape
        qkv = self.qkv(self.norm1(x))
        size = D // self.heads
        qkv = qkv.view(B, L, 3, self.heads, size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, L, D/heads) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).reshape(B, L, D)
        x = x + self.out(y)
        y = self.up(self.norm2(x))
        return x + self.down(F.gelu(y))


class GPT(nn.Module):
    """The ceiling: a transformer of this size, as plain as possible."""

    def __init__(self, length, vocab, width, layers):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.position = nn.Embedding(length, width)
        blocks = [GPTBlock(width) for _ in range(layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens):
        """Cross-entropy of tokens (B, L), each given those before it."""
        x = self.embed(tokens) + self.position.weight
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        # each position predicts the next one
        logits = logits[:, :-1].flatten(0, 1)
        target = tokens[:, 1:].flatten()
        return F.cross_entropy(logits, target)


def dense_loss(model, tokens, given, tau):
    """The loss as published code computes it: one-hot rows, V normals per token, all (B, L, V)."""
    vocab = model.config.vocab
    # three tensors of V numbers for each token: text, noise and their sum
    onehot = F.one_hot(tokens, vocab).float()
    noise = torch.randn_like(onehot)
    t = model.t_of(tau)[:, None, None]
    x_t = (1 - t) * noise + t * onehot
    # on GPUs this product is in TF32, see training_step
    with torch.autocast(tokens.device.type, enabled=False):
        h = x_t @ model.net.embed.float()
    logits = model.predict(h, given, tau)
    log_p = logits.log_softmax(-1)
    nats = -(onehot * log_p).sum(-1)  # (B, L)
    return nats.mean(1)


def peak_memory(device):
    """Peak memory in bytes since the last call, which resets it; None if unknown."""
    if device.type == 'cuda':
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    try:
        status = Path('/proc/self/status').read_text()
        # Linux: sets the peak back to what is held now
        Path('/proc/self/clear_refs').write_text('5')
    except OSError:
        return None
    return 1024 * int(re.search(r'VmHWM:\s*(\d+) kB', status)[1])


def training_step(formulation, size, options, rates, device):
    """
    Forward and backward of a flow, or of a GPT: time, tokens/s, mfu (the fraction of the rate of
    large products that the network's products reach) and peak memory beyond the model's: a dict in
    a list, as there are no seeds.
    """
    rows, length, vocab, width = size
    torch.set_float32_matmul_precision('high' if formulation == 'dense' else 'highest')
    tokens = torch.randint(vocab, (rows, length), device=device)
    if formulation == 'gpt':
        net = GPT(length, vocab, width, options.layers)
        net = net.to(device)
        weights = matrix_weights(net.blocks, net.head)
        loss = partial(net, tokens)
    else:
        model = new_model('flm', length, vocab, width, options.layers)
        net = model.to(device).net
        weights = denoiser_weights(net)
        given = torch.full_like(tokens, -1)
        tau = torch.rand(rows, device=device)
        formula = model.loss if formulation == 'projected' else partial(dense_loss, model)
        loss = partial(formula, tokens, given, tau)
    if options.compile and device.type == 'cuda':
        torch.compiler.reset()
        net.compile(dynamic=False)

    def work():
        with autocast(device):
            mean = loss().mean()
        mean.backward()
        net.zero_grad(set_to_none=True)

    # what there is by now are the model and its batch
    peak_memory(device)
    before = peak_memory(device)
    seconds = median_seconds(work)
    peak = peak_memory(device)
    # the backward pass computes twice what the forward pass does
    flops = 3 * rows * forward_flops(weights, options.layers, length, width)
    figures = {
        'tokens': tokens.numel(),
        'ms': 1000 * seconds,
        'tokens_per_s': tokens.numel() / seconds,
        'mfu': flops / seconds / rates[0],
    }
    if peak is not None:
        figures['peak_GB'] = (peak - before) / 1e9
    return [figures]


def train(options, device):
    """One iteration of each size and formulation."""
    for _, *shape in options.sizes:
        check_shape(*shape)
    report = Report(options, device)
    rates = machine_rates(device)
    report.tell_rates(rates)
    for size in options.sizes:
        for formulation in ('projected', 'dense', 'gpt'):
            name = f'{formulation} {",".join(map(str, size))}'
            tell(f'{name} ...')
            report.attempt(name, '', training_step, formulation, size, options, rates, device)
    report.finish()


# -----------------------------------------------------------------------------
# What was measured: printed and written as it comes, as a table and as a picture

class Report:
    """The lines (name, nfe, [figures, one dict for each seed]) of a table, and their JSON file."""

    def __init__(self, options, device):
        now = datetime.datetime.now()
        # a name that nothing has yet
        self.out = options.out or f'out/{options.what}-{now:%Y%m%d-%H%M%S}.json'
        check_output('--out', self.out, '.json', options.overwrite)
        self.lines = []
        self.failed = []
        self.heading = ''
        told = dict(vars(options))
        machine = str(device)
        if device.type == 'cuda':
            machine = torch.cuda.get_device_name()
        self.about = {
            'device': machine,
            'cpu_capability': torch.backends.cpu.get_cpu_capability(),
            'torch': str(torch.__version__),
            'threads': torch.get_num_threads(),
            'date': now.date().isoformat(),
            'command': told.pop('command'),
            'options': told,
        }

    def tell_rates(self, rates):
        """Keep what the machine reached."""
        flops, bandwidth = rates
        self.about['GFLOP_per_s'] = flops / 1e9
        self.about['GB_per_s'] = bandwidth / 1e9
        # a file that cannot be written is found now, and not after an hour
        self.write()

    def add(self, name, nfe, runs):
        """A new line, which is printed and written: a stop loses nothing."""
        self.lines.append((name, nfe, runs))
        found = summary(runs)
        heading = as_row(['', 'nfe', *found])
        # not all lines have the same figures
        if heading != self.heading:
            self.heading = heading
            say(f'\n{heading}\n{"|---" * (len(found) + 2)}|')
        cells = [name, str(nfe)]
        for mean, half_range in found.values():
            cell = digits(mean)
            if half_range:
                cell += f' ({digits(half_range)})'
            cells.append(cell)
        say(as_row(cells))
        self.write()

    def attempt(self, name, nfe, work, *arguments):
        """Add the line work(*arguments); if it fails, say so and let the others go on."""
        try:
            runs = work(*arguments)
        except Exception as error:
            first_line = str(error).strip().split('\n')[0]
            line = f'{name}, nfe {nfe}: failed: {type(error).__name__}: {first_line}'
            tell(line)
            self.failed.append(line)
            self.write()
        else:
            self.add(name, nfe, runs)
        # the next one has another shape
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def write(self):
        """The JSON file, whole."""
        written = dict(self.about)
        written['failed'] = self.failed
        written['runs'] = []
        for name, nfe, runs in self.lines:
            run = {'model': name, 'nfe': nfe, 'seeds': runs}
            written['runs'].append(run)
        text = json.dumps(written, indent=1) + '\n'
        write_whole(self.out, text.encode())

    def finish(self):
        """Say where the figures are; exit status 1 if something failed."""
        say(f'\nwrote {self.out}')
        if self.failed:
            raise SystemExit(1)


def summary(runs):
    """Dicts of figures, one for each seed -> {figure: (mean, half the range)}."""
    found = {}
    for key in runs[0]:
        values = [run[key] for run in runs if key in run]
        half_range = (max(values) - min(values)) / 2
        found[key] = (statistics.mean(values), half_range)
    return found


def digits(x):
    """A figure with three significant digits, or whole where these would not reach its point."""
    return f'{x:,.0f}' if abs(x) >= 999.5 else f'{x:.3g}'


def as_row(cells):
    """A line of a Markdown table."""
    return '| ' + ' | '.join(cells) + ' |'


def plot_quality(axes, lines, key, by_time):
    """A figure against calls or milliseconds per row, one line for each model."""
    curves = {}
    for name, nfe, runs in lines:
        # what needs no model makes no calls
        if nfe:
            found = summary(runs)
            x = found['ms_per_row'][0] if by_time else nfe
            y = found[key][0]
            curves.setdefault(name, []).append((x, y))
    for name, points in curves.items():
        points.sort()
        # the end of a path tells models apart
        path = Path(name.removesuffix('/model.pt'))
        label = '/'.join(path.parts[-2:])
        axes.plot(*zip(*points), 'o-', label=label)
    axes.set(xlabel='ms per row' if by_time else 'network calls', ylabel=key)
    # 1, 2, 4, ...
    axes.set_xscale('log', base=2)
    axes.xaxis.set_major_formatter('{x:g}')
    axes.grid(alpha=0.3)


def picture(lines, path):
    """An SVG: quality against calls and against time."""
    if not any(nfe for _, nfe, _ in lines):
        return
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        tell('there is no picture, which needs: pip install matplotlib')
        return
    # validity where it is known, or distance, or likeness to targets
    _, _, runs = lines[0]
    keys = [key for key in ('valid', 'energy', 'bleu') if key in runs[0]]
    figure = Figure(figsize=(5, 6), layout='constrained')
    above, below = figure.subplots(2)
    plot_quality(above, lines, keys[0], by_time=False)
    plot_quality(below, lines, keys[0], by_time=True)
    # above both, where it hides no point
    figure.legend(*above.get_legend_handles_labels(), loc='outside upper left')
    # without a date, and with names that are not drawn, so that equal figures give equal files
    svg = io.BytesIO()
    with rc_context({'svg.hashsalt': 'bench'}):
        figure.savefig(svg, format='svg', metadata={'Date': None})
    write_whole(path, svg.getvalue())
    say(f'\nwrote {path}')


# -----------------------------------------------------------------------------
# The tables of the pages: what stands between two marks is written anew from a JSON file
#
#     <!-- table: stories-short.json
#     FLM teacher = flow/teacher @ 8 32; AR = ar/teacher
#     valid = {valid:.1%}; +- valid = {valid_spread:.1%}; ms a row = {ms_per_row:.1f}
#     -->
#     ...
#     <!-- end -->
#
# An entry with braces is a column: its heading, and what stands in a cell, as in str.format. Any
# other is a model: its label, the end of its name (of another file: stories.json:flow/teacher), and
# the calls to show, if not all. A figure of `batch` rows is {ms_64}, half the range over seeds
# {valid_spread}.

def page_figures(runs):
    """Lines of a JSON file that are of one model -> {nfe: {name of a figure: its value}}."""
    found = {}
    for run in runs:
        figures = found.setdefault(run['nfe'], {})
        batch = run['seeds'][0].get('batch')
        suffix = '' if batch is None else f'_{batch}'
        for key, (mean, spread) in summary(run['seeds']).items():
            figures[key + suffix] = mean
            figures[f'{key}{suffix}_spread'] = spread
    return found


def page_cell(form, figures):
    """A cell of a page's table; empty where a figure was not measured."""
    try:
        return form.format_map(figures)
    except KeyError:
        return ''


def page_table(folder, link, entries):
    """The Markdown table that a mark asks for; an entry names its JSON file, or it is `link`."""
    models = []
    columns = []
    for entry in re.split(r'[;\n]\s*', entries.strip()):
        name, what = entry.split(' = ', 1)
        kind = columns if '{' in what else models
        kind.append((name, what))

    headings = [name for name, _ in columns]
    lines = [as_row([f'[{Path(link).stem}]({link})', 'calls', *headings])]
    lines.append('|---' * (len(columns) + 2) + '|')
    for label, what in models:
        model, _, calls = what.partition(' @ ')
        other, _, end = model.rpartition(':')
        path = folder / (other or link)
        runs = json.loads(path.read_text())['runs']
        chosen = [run for run in runs if run['model'].endswith(end)]
        names = {run['model'] for run in chosen}
        if len(names) != 1:
            fail(f'{path}: {end!r} must be the end of one name')
        for nfe, figures in page_figures(chosen).items():
            if calls and str(nfe) not in calls.split():
                continue
            cells = [page_cell(form, figures) for _, form in columns]
            line = as_row([label, str(nfe), *cells])
            lines.append(line)
    return '\n'.join(lines)


def fill_tables(text, folder):
    """A page that lies in a folder, with all tables between marks written anew."""
    def fill(found):
        mark, link, entries = found.groups()
        table = page_table(folder, link, entries)
        return f'{mark}{table}\n<!-- end -->'

    return re.sub(r'(<!-- table: (\S+)\n(.*?)-->\n).*?<!-- end -->', fill, text, flags=re.S)


def tables():
    """Write the tables of README.md and assets/*.md anew."""
    here = Path(__file__).parent
    for page in [here / 'README.md', *here.glob('assets/*.md')]:
        old = page.read_text(encoding='utf-8')
        new = fill_tables(old, page.parent)
        if new != old:
            write_whole(page, new.encode())
            say(f'{page}: written anew')


def main(options):
    if options.what == 'tables':
        tables()
        return
    device = pick_device(options.device)
    # what is timed is the first GPU
    if device.type == 'cuda' and device.index:
        fail(f'--device {device}: set CUDA_VISIBLE_DEVICES={device.index} instead')
    kinds = {'quality': quality, 'speed': speed, 'train': train}
    kinds[options.what](options, device)


if __name__ == '__main__':
    run_script(lambda: main(parse()))
