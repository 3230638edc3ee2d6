"""Write text with a trained model, in one network call by default.

    python sample.py                                          # out/pydocs/student, 8 sentences
    python sample.py --compare out/pydocs/teacher             # same noise: teacher and student
    python sample.py --prompt "Return the" --nfe 4
    python sample.py --infill "Return ____ of the file."      # one token for each _
    python sample.py out/dates/student --source 1987-03-23    # or one source per line on stdin
    python sample.py out/pydocs/teacher --nfe 64 --watch      # see it denoise
    python sample.py out/pydocs/student --info                # what the file is and how it was made
"""
import math
import re
import sys
import textwrap
import time
from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from prepare_data import date_forms, encode, encoding, fail, parse


@dataclass
class Options:
    checkpoint: str = 'out/pydocs/student'  # folder or model.pt
    nfe: int = 1                # network calls
    n: int = 8                  # rows to write (for each source)
    seed: int = 0               # of the noise
    sampler: str = 'euler'      # euler (for a student: its flow map) | bridge
    gamma: float = 0.0          # 0 follows the flow, 1 predicts the data and noises again
    temperature: float = 1.0    # of every prediction
    top_p: float = 1.0          # keep the most likely tokens of this total probability
    prompt: str = ''            # text to begin with
    infill: str = ''            # text with holes, one _ per token
    source: str = ''            # for models of pairs: the source; without it, lines on stdin
    compare: str = ''           # a teacher: its rows at 1 and 64 calls beside ours, same noise
    watch: bool = False         # animate the denoising in the terminal
    info: bool = False          # describe the checkpoint and stop
    ema: bool = True            # averaged weights; --no-ema takes the last ones
    device: str = ''            # cpu, cuda or mps; default the best there is


OPTIONS = parse(Options, positional='checkpoint') if __name__ == '__main__' else None

import numpy as np                                                               # noqa: E402
import torch                                                                     # noqa: E402

from model import load  # noqa: E402
from train_teacher import autocast, generator, get_batch, load_data, pick_device  # noqa: E402


def open_checkpoint(path, device, ema=True):
    """Folder or model.pt -> (model, checkpoint dict), or one clear line."""
    path = Path(path) / 'model.pt' if Path(path).is_dir() or not Path(path).suffix else Path(path)
    try:
        return load(path, device, ema)
    except ValueError as e:
        fail(f'{path}: {e}; make one with train_teacher.py, then distill.py')


# -------------------------------------------------------------------------------------------------
# Rows and texts

def text_rows(ids, meta, enc=None):
    """Token rows (B, L) -> list of (source or None, text); the text ends at the first <eos>."""
    enc = enc or encoding(meta['tokenizer'])
    sep, eos = meta['special']['<sep>'], meta['special']['<eos>']
    texts = []
    for row in ids.tolist():
        source = None
        if meta['pairs']:
            source, row = enc.decode(row[:row.index(sep)]), row[row.index(sep) + 1:]
        if meta['kind'] == 'rows' and eos in row:
            row = row[:row.index(eos)]
        texts.append((source, enc.decode(row)))
    return texts


def make_row(meta, enc, prompt='', infill='', source=''):
    """What is known of a row -> tokens (1, L) and given (1, L); unknown positions hold 0."""
    L, pad, eos, sep = meta['length'], *(meta['special'][k] for k in ('<pad>', '<eos>', '<sep>'))
    try:
        known = []                      # (id, is given)
        if source:
            known = [(i, True) for i in encode(enc, meta['tokenizer'], source) + [sep]]
        for i, part in enumerate(re.split('(_)', infill) if infill else [prompt]):
            known += [(0, False)] if part == '_' else [
                (j, True) for j in encode(enc, meta['tokenizer'], part)]
        if infill and meta['kind'] == 'rows':
            known += [(eos, True)] + [(pad, True)] * (L - len(known) - 1)
    except ValueError as e:
        fail(str(e))
    if len(known) > L:
        fail(f'the given text has {len(known)} tokens, this model writes rows of {L}; shorten it')
    known += [(0, False)] * (L - len(known))
    return torch.tensor([[i for i, _ in known]]), torch.tensor([[g for _, g in known]])


def draw_rows(model, meta, ids, n, nfe, seed, **how):
    """n rows for the sources of n data rows, if they have any: ((n, L) on the CPU, seconds)."""
    device = next(model.parameters()).device
    tokens, given, _ = get_batch(ids, meta, n, 0.0, generator(device, seed, 1), device)
    return write(model, tokens, given, nfe, seed, **how)


def write(model, tokens, given, nfe, seed, **how):
    """The model's rows for tokens and given (B, L): ((B, L) on CPU, seconds)."""
    device = next(model.parameters()).device
    start = time.perf_counter()
    with autocast(device):
        rows = model.sample(tokens.to(device), given.to(device), nfe, generator(device, seed, 2),
                            **how)
    return rows.cpu(), time.perf_counter() - start


def corpus_words(ids, meta, limit=5_000_000):
    """The set of words in the first `limit` training tokens."""
    key = (id(ids), len(ids))
    if key not in corpus_words.known:
        text = encoding(meta['tokenizer']).decode(ids[:limit].tolist())
        corpus_words.known[key] = set(re.findall('[A-Za-z]+', text.lower()))
    return corpus_words.known[key]


corpus_words.known = {}


def entropy_of(items):
    """Entropy in nats of how often each item occurs."""
    n = len(items)
    return -sum(c / n * math.log(c / n) for c in Counter(items).values()) if n else 0.0


def health(rows, meta, train=None):
    """Is it text? rows (B, L) -> dict of figures, all computed on the texts alone.

    dates: share of valid rows (exactly one of the eight forms of their source), and entropy of the
    forms used over ln 8. Else: entropy of the tokens within a row (nats, mean), share of unique
    rows, share of words that occur in the training text.
    """
    texts = text_rows(rows, meta)
    if meta['tokenizer']['name'] == 'dates':
        forms = [date_forms(source).index(text) for source, text in texts
                 if text in date_forms(source)]
        return {'valid': len(forms) / len(texts), 'form_entropy': entropy_of(forms) / math.log(8)}
    entropy = []
    for row in rows.tolist():
        if meta['kind'] == 'rows' and meta['special']['<eos>'] in row:
            row = row[:row.index(meta['special']['<eos>'])]
        entropy.append(entropy_of(row))
    figures = {'entropy': sum(entropy) / len(entropy), 'unique': len(set(texts)) / len(texts)}
    if train is not None:
        words = [w for _, text in texts for w in re.findall('[A-Za-z]+', text.lower())]
        known = corpus_words(train, meta)
        figures['words'] = sum(w in known for w in words) / max(1, len(words))
    return figures


def health_line(figures, nfe, seconds, n):
    text = ', '.join(f'{k.replace("_", " ")} {v:.3f}' for k, v in figures.items())
    return f'health of {n} rows: {text}; nfe {nfe}, {1000 * seconds / n:.1f} ms per row'


# -------------------------------------------------------------------------------------------------
# What the command line asks for

def show_info(path, ckpt, model):
    size = sum(p.numel() for p in model.parameters())
    what = 'student (flow map)' if model.config.two_time else 'teacher'
    print(f'{path}: {what}, {size / 1e6:.2f}M parameters, iteration {ckpt["iter"]}')
    for name in ('config', 'options', 'teacher', 'versions'):
        if name in ckpt:
            print(f'{name}: ' + ', '.join(f'{k} {v}' for k, v in ckpt[name].items()))
    meta = {k: v for k, v in ckpt['meta'].items() if k != 'tokenizer'}
    print('data: ' + ', '.join(f'{k} {v}' for k, v in meta.items()))
    print(f'tokenizer: {ckpt["meta"]["tokenizer"]["name"]}, inside the checkpoint')


def compare(student, teacher, meta, tokens, given, o, train):
    """The same noise through the teacher at 1 and 64 calls and the student at 1, side by side."""
    runs = [('teacher, 1 call', teacher, 1), ('teacher, 64 calls', teacher, 64),
            (f'student, {o.nfe} call' + 's' * (o.nfe > 1), student, o.nfe)]
    columns, lines = [], []
    for name, model, nfe in runs:
        write(model, tokens[:1], given[:1], 1, o.seed)      # the first call of all is slow
        rows, seconds = write(model, tokens, given, nfe, o.seed)
        columns.append([text for _, text in text_rows(rows, meta)])
        figures = health(rows, meta, train)
        lines.append(f'{name:18s} ' + health_line(figures, nfe, seconds, len(rows)))
    width = 44
    print(' | '.join(f'{name:{width}s}' for name, *_ in runs))
    for texts in list(zip(*columns))[:o.n]:
        print('-+-'.join(['-' * width] * 3))
        wrapped = [textwrap.wrap(text, width) for text in texts]
        for line in zip_longest(*wrapped, fillvalue=''):
            print(' | '.join(f'{cell:{width}s}' for cell in line))
    print('\n'.join(['', *lines]))


def animate(nfe, meta, enc):
    """A `watch` for sampling: the first rows as they clear up, redrawn in place in a terminal."""
    if not sys.stdout.isatty():
        return None

    def watch(i, rows):
        texts = [text[:100] for _, text in text_rows(rows[:8], meta, enc)]
        up = f'\033[{len(texts) + 1}A' if i else ''
        lines = [f'\033[K{line}' for line in (f'call {i + 1} of {nfe}', *texts)]
        print(up + '\n'.join(lines), flush=True)
        time.sleep(0.05)
    return watch


def check(o, meta, config):
    """Refuse what cannot be done, before anything is computed."""
    for name, low, high in (('nfe', 1, 100_000), ('n', 1, 1_000_000), ('temperature', 0.01, 100),
                            ('top_p', 0.001, 1), ('gamma', 0, 1)):
        if not low <= getattr(o, name) <= high:
            fail(f'--{name.replace("_", "-")} {getattr(o, name)}: must be from {low} to {high}')
    if o.sampler not in ('euler', 'bridge'):
        fail(f'--sampler {o.sampler}: use euler or bridge')
    if o.sampler == 'bridge' and config.two_time:
        fail('--sampler bridge needs a teacher, for example: python sample.py out/pydocs/teacher '
             '--sampler bridge --nfe 64')
    if meta['pairs'] and (o.prompt or o.infill):
        fail('--prompt and --infill are for plain text; this model continues a --source')
    if o.source and not meta['pairs']:
        fail('--source is for models of pairs; this one takes --prompt or --infill')
    if o.prompt and o.infill:
        fail('--prompt and --infill exclude each other')


def main(o):
    device = pick_device(o.device)
    model, ckpt = open_checkpoint(o.checkpoint, device, o.ema)
    meta = ckpt['meta']
    if o.info:
        return show_info(o.checkpoint, ckpt, model)
    check(o, meta, model.config)
    enc = encoding(meta['tokenizer'])
    # the training text, if it is still there, says which words are words
    data = (ckpt.get('teacher') or ckpt['options'])['data']
    train = load_data(data)[1] if (Path(data) / 'meta.json').is_file() else None

    sources = [o.source]
    if meta['pairs'] and not o.source:
        if sys.stdin.isatty():
            fail('this model needs a source: --source "...", or lines on stdin')
        sources = [line.strip() for line in sys.stdin if line.strip()]
    rows = [make_row(meta, enc, o.prompt, o.infill, source) for source in sources]
    per_source = max(o.n, 256) if o.compare else o.n        # a health line needs many rows
    tokens, given = (torch.cat(x).repeat_interleave(per_source, dim=0) for x in zip(*rows))
    if o.compare:
        teacher, other = open_checkpoint(o.compare, device, o.ema)
        if teacher.config.two_time or other['meta']['tokenizer'] != meta['tokenizer']:
            fail(f'--compare {o.compare}: needs a teacher with the same tokenizer')
        return compare(model, teacher, meta, tokens, given, o, train)
    watch = animate(o.nfe, meta, enc) if o.watch else None
    out, seconds = write(model, tokens, given, o.nfe, o.seed, sampler=o.sampler, gamma=o.gamma,
                         temperature=o.temperature, top_p=o.top_p, watch=watch)
    for source, text in text_rows(out, meta, enc):
        print(f'{source} -> {text}' if source else text)
    print(health_line(health(out, meta, train), o.nfe, seconds, len(out)), file=sys.stderr)


if __name__ == '__main__':
    main(OPTIONS)
