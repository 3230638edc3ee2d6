"""How good are the samples, at how many network calls, at what cost?

    python bench.py out/dates/teacher out/dates/student --nfe 1 4 64
    python bench.py out/pydocs/teacher out/pydocs/student --nfe 1 8 64 --rows 1000 --seeds 3

Prints a Markdown table, the mean over seeds and in brackets half the range, and writes the same
figures as JSON to <out>. No language model scores another here: samples are compared with the
validation text itself, beside that text's own other half and a copy of it with its tokens shuffled.
"""
import json
import math
import platform
import statistics
from collections import Counter
from dataclasses import dataclass

from prepare_data import fail, parse


@dataclass
class Options:
    checkpoints: tuple = ()     # folders or model.pt of the models to compare, all on the same data
    nfe: tuple = ('1', '4', '64')   # network calls
    sampler: str = ''           # as for sample.py
    rows: int = 500             # samples per model, nfe and seed
    per_source: int = 1         # pairs: samples for each source; more than 1 adds self-BLEU, div-4
    seeds: int = 1              # of rows and noise: 0, 1, ...
    out: str = 'out/quality.json'   # the figures
    device: str = ''            # cpu, cuda or mps; default the best there is


OPTIONS = parse(Options, positional='checkpoints') if __name__ == '__main__' else None

import numpy as np  # noqa: E402
import torch  # noqa: E402

from model import load, pick_device, split_rows, to_texts, write_whole  # noqa: E402
from sample import draw_rows, health, write  # noqa: E402
from train_teacher import load_data, source_mask  # noqa: E402

# -------------------------------------------------------------------------------------------------
# Distances between samples and real text, on token ids; repetition cannot fool them

def ngrams(ids, n):
    """All n-grams of a list, as tuples."""
    return list(zip(*(ids[i:] for i in range(n))))


def jensen_shannon(a, b):
    """Jensen-Shannon divergence of two lists of items, in nats: 0 if alike, ln 2 if disjoint."""
    p, q = Counter(a), Counter(b)
    total = 0.0
    for x in p.keys() | q.keys():
        u, v = p[x] / len(a), q[x] / len(b)
        total += sum(w / 2 * math.log(2 * w / (u + v)) for w in (u, v) if w)
    return total


def energy_distance(a, b, dim=512):
    """2 E|x-y| - E|x-x'| - E|y-y'| over rows' bags of 1- and 2-grams, hashed to `dim` counts.

    a, b lists of rows (lists of ids). Unbiased: about 0, even below, for rows of the same law.
    """
    def bags(rows):
        x = np.zeros((len(rows), dim), np.float32)
        for i, row in enumerate(rows):
            for gram in ngrams(row, 1) + ngrams(row, 2):
                # a multiplicative hash of our own: Python's differs from run to run for strings
                x[i, sum((v + 1) * m for v, m in zip(gram, (2654435761, 40503))) % dim] += 1
        return torch.from_numpy(x)

    def mean(x, y, same):
        return torch.cdist(x, y).double().sum() / (len(x) * (len(y) - same))
    x, y = bags(a), bags(b)
    return (2 * mean(x, y, 0) - mean(x, x, 1) - mean(y, y, 1)).item()


def text_figures(rows, meta, real, train):
    """Rows (B, L) against `real`, a list of id lists, and `train`, a set of tuples: a dict."""
    texts = [ids for _, ids in split_rows(rows, meta)]
    figures = {f'js{n}': jensen_shannon([g for t in texts for g in ngrams(t, n)],
                                        [g for t in real for g in ngrams(t, n)]) for n in (1, 2, 3)}
    figures['energy'] = energy_distance(texts, real)
    figures['copied'] = sum(tuple(t) in train for t in texts) / len(texts)
    return figures


# -------------------------------------------------------------------------------------------------
# Pairs: scores of sequence-to-sequence text, words split at spaces

def library(name):
    """An optional package, or one clear line."""
    import importlib
    try:
        return importlib.import_module(name)
    except ImportError:
        fail(f'these scores need it: pip install {name.split(".")[0].replace("_", "-")}')


def bleu(text, references):
    """Sentence BLEU, smoothing method 4, in [0, 1]: what DiffuSeq and DLM-One report."""
    score = library('nltk.translate.bleu_score')
    return score.sentence_bleu([r.split() for r in references], text.split(),
                               smoothing_function=score.SmoothingFunction().method4)


def distinct(texts, n):
    """Share of distinct n-grams among all n-grams of some texts (dist-1 of one text, div-4)."""
    grams = [g for text in texts for g in ngrams(text.split(), n)]
    return len(set(grams)) / max(1, len(grams))


def self_bleu(texts):
    """Mean BLEU of each text against the others: 1 if all are the same."""
    return statistics.mean(bleu(t, texts[:i] + texts[i + 1:]) for i, t in enumerate(texts))


def pair_figures(texts, targets, per_source):
    """Texts, `per_source` in a row for each of the targets -> a dict of means."""
    rouge = library('rouge_score.rouge_scorer').RougeScorer(['rougeL'])
    both = list(zip(texts, [t for t in targets for _ in range(per_source)]))
    figures = {'bleu': statistics.mean(bleu(text, [target]) for text, target in both),
               'rouge_l': statistics.mean(rouge.score(target, text)['rougeL'].fmeasure
                                          for text, target in both),
               'dist1': statistics.mean(distinct([text], 1) for text in texts)}
    if per_source > 1:
        groups = [texts[i:i + per_source] for i in range(0, len(texts), per_source)]
        figures['self_bleu'] = statistics.mean(map(self_bleu, groups))
        figures['div4'] = statistics.mean(distinct(group, 4) for group in groups)
    return figures


# -------------------------------------------------------------------------------------------------

def as_rows(ids, L):
    """Flat ids of a .bin file -> its whole rows (n, L)."""
    return torch.from_numpy(np.asarray(ids[:len(ids) // L * L], np.int64)).view(-1, L)


def measure(model, meta, data, ids, o, nfe, seed, real, train):
    """All figures of one model at one nfe and seed: a dict."""
    how = {'sampler': o.sampler} if o.sampler else {}
    if not meta['pairs']:
        rows, seconds = draw_rows(model, meta, ids, o.rows, nfe, seed, **how)
        figures = {**health(rows, meta, data), **text_figures(rows, meta, real, train)}
    else:
        # known targets, so not draw_rows: every source stands per_source times in a row
        known = as_rows(ids, meta['length'])
        known = known[np.random.default_rng(seed).choice(len(known), o.rows // o.per_source)]
        tokens = known.repeat_interleave(o.per_source, dim=0)                   # (rows, L)
        rows, seconds = write(model, tokens, source_mask(tokens, meta), nfe, seed, **how)
        figures = health(rows, meta, data)
        if meta['tokenizer']['name'] != 'dates':        # there any of eight texts is right
            targets = [text for _, text in to_texts(known, meta)]
            texts = [text for _, text in to_texts(rows, meta)]
            figures |= pair_figures(texts, targets, o.per_source)
    return {**figures, 'ms_per_row': 1000 * seconds / len(rows)}


def references(ids, meta, data, real, train, seed=0):
    """The same figures for real text that was not compared with, and for a shuffled copy of it."""
    rows = as_rows(ids, meta['length'])
    shuffled, rng = rows.clone(), np.random.default_rng(seed)
    # same tokens in every row, so whatever tells the two apart sees order, not just words
    for row, (_, text) in zip(shuffled, split_rows(rows, meta)):
        row[:len(text)] = torch.from_numpy(rng.permutation(text))
    return {name: {**health(r, meta, data), **text_figures(r, meta, real, train)}
            for name, r in (('held-out text', rows), ('the same, shuffled', shuffled))}


def table(lines):
    """[(name, nfe, [figures, one per seed])] -> a Markdown table."""
    names = list(dict.fromkeys(k for *_, runs in lines for k in runs[0]))
    text = ['| | nfe | ' + ' | '.join(names) + ' |', '|---' * (len(names) + 2) + '|']
    for name, nfe, runs in lines:
        cells = []
        for key in names:
            values = [run[key] for run in runs if key in run]
            spread = (max(values) - min(values)) / 2 if len(values) > 1 else 0
            cells.append('' if not values else f'{statistics.mean(values):.3g}'
                         + (f' ({spread:.2g})' if spread else ''))
        text.append(f'| {name} | {nfe} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(text)


def main(o):
    if not all(str(n).isdigit() and int(n) for n in o.nfe) or min(o.rows, o.seeds) < 1:
        fail('--nfe takes whole numbers from 1, --rows and --seeds are 1 at least')
    if not o.checkpoints or not 1 <= o.per_source <= o.rows:
        fail('give CHECKPOINTS, and --per-source from 1 to --rows')
    device, lines, meta = pick_device(o.device), [], None
    for path in o.checkpoints:
        model, ckpt = load(path, device)
        data = ckpt.get('teacher', ckpt['options'])['data']
        if meta and ckpt['meta']['tokenizer'] != meta['tokenizer']:
            fail(f'{path}: has another tokenizer than {o.checkpoints[0]}; compare like with like')
        if not meta:
            meta, train_ids, val = load_data(data)
            real, train = [], set()
            if not meta['pairs']:
                # samples meet one half of the text; the other half shows what real text scores
                L, half = meta['length'], len(val) // 2 // meta['length'] * meta['length']
                real = [ids for _, ids in split_rows(as_rows(val[:half], L), meta)]
                train = {tuple(ids) for _, ids in split_rows(as_rows(train_ids, L), meta)}
                lines += [(name, '', [figures]) for name, figures in
                          references(val[half:], meta, data, real, train).items()]
        for nfe in map(int, o.nfe):
            runs = [measure(model, meta, data, val, o, nfe, seed, real, train)
                    for seed in range(o.seeds)]
            lines.append((path, nfe, runs))
            print(f'{path}, nfe {nfe}: done', flush=True)
    print('\n' + table(lines))
    about = {'device': str(device), 'cpu': platform.processor() or platform.machine(),
             'torch': torch.__version__, 'rows': o.rows, 'per_source': o.per_source}
    report = {**about, 'runs': [dict(model=str(name), nfe=nfe, seeds=runs)
                                for name, nfe, runs in lines]}
    write_whole(o.out, json.dumps(report, indent=1).encode())
    print(f'\nwrote {o.out}')


if __name__ == '__main__':
    main(OPTIONS)
