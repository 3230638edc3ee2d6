"""How good are the samples, at how many network calls, and how fast?

    python bench.py quality out/dates/teacher out/dates/student --nfe 1 4 64
    python bench.py speed out/pydocs/student@1 out/pydocs/teacher@8,64
    python bench.py speed student,128,50257,256@1 ar,128,50257,256      # untrained, of size L,V,D
    python bench.py train 16,128,50257,256      # B,L,V,D: one iteration in two formulations

Prints a Markdown table (of seeds the mean, and half the range), writes <out> as JSON and a picture.
"""
import json
import math
import re
import statistics
import timeit
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from prepare_data import fail, parse

@dataclass
class Options:
    what: tuple = ()            # quality CHECKPOINTS (of one data set) | speed MODELS | train SIZES
    nfe: tuple = ('1', '4', '64')   # network calls
    sampler: str = ''           # quality: of the teachers, as for sample.py
    temperature: float = 1.0    # quality: of the teachers and baselines, as for sample.py
    gamma: float = 0.0          # quality: of the flows, as for sample.py
    rows: int = 500             # quality: samples per model, nfe, seed
    per_source: int = 1         # pairs: samples for each source; from 2: unique, self-BLEU, div-4
    seeds: int = 1              # quality: of rows and noise: 0, 1, ...; {seed} in CHECKPOINTS too
    scorer: str = ''            # quality: gen_ppl under this: an ar checkpoint or a hub's name
    batch: tuple = ('1', '8', '64')     # speed: rows written at once
    beside: str = ''            # speed: the JSON of a quality run, whose figures stand beside
    layers: int = 4             # speed, train: transformer blocks of untrained models
    out: str = ''               # the figures; default out/<what>.json
    device: str = ''            # cpu, cuda or mps; default the best there is
    compile: bool = True        # speed, train: torch.compile, on CUDA only

OPTIONS = parse(Options, positional='what') if __name__ == '__main__' else None

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from model import (Config, build, is_student, load, split_rows, time_axis,  # noqa: E402
                   write_rows, write_whole)
from sample import SAMPLERS, as_rows, health, to_texts, write  # noqa: E402
from train_teacher import autocast, load_data, pick_device, up_to  # noqa: E402

# ---- Distances between samples and real text, on token ids; repetition cannot fool them ----
def ngrams(ids, n):
    """All n-grams of a list, as tuples."""
    return list(zip(*(ids[i:] for i in range(n))))

def jensen_shannon(a, b):
    """Jensen-Shannon divergence of two lists of items, in nats: 0 if alike, ln 2 if disjoint."""
    p, q = ({x: n / len(y) for x, n in Counter(y).items()} for y in (a, b))
    return sum(w / 2 * math.log(2 * w / (p.get(x, 0) + q.get(x, 0)))
               for y in (p, q) for x, w in y.items())

def energy_distance(a, b, dim=512):
    """2 E|x-y| - E|x-x'| - E|y-y'| over rows' bags of 1- and 2-grams, hashed to `dim` counts;
    a, b lists of rows (lists of ids). Unbiased: about 0, even below, for rows of the same law."""
    def bag(row):
        hashes = [sum((v + 1) * m for v, m in zip(gram, (2654435761, 40503))) % dim
                  for gram in ngrams(row, 1) + ngrams(row, 2)]
        return torch.bincount(torch.tensor(hashes, dtype=torch.long), minlength=dim).float()
    def mean(x, y, same):
        return torch.cdist(x, y).double().sum() / (len(x) * (len(y) - same))
    x, y = (torch.stack([bag(row) for row in rows]) for rows in (a, b))
    return (2 * mean(x, y, 0) - mean(x, x, 1) - mean(y, y, 1)).item()

def text_figures(rows, meta, real, train, score):
    """Rows (B, L) against `real`, a list of id lists, and `train`, a set of tuples: a dict."""
    texts = [ids for _, ids in split_rows(rows, meta)]
    figures = {f'js{n}': jensen_shannon([g for t in texts for g in ngrams(t, n)],
                                        [g for t in real for g in ngrams(t, n)]) for n in (1, 2, 3)}
    return {**figures, **({'gen_ppl': math.exp(score(rows).mean())} if score else {}),
            'energy': energy_distance(texts, real),
            'self_bleu': self_bleu([' '.join(map(str, t)) for t in texts[:50]]),
            'copied': sum(tuple(t) in train for t in texts) / len(texts)}

def load_scorer(name, meta, device):
    """A function: rows (B, L) -> -log p of tokens up to <eos>, under a model that wrote none."""
    if len(name) < 250 and (Path(name) / 'model.pt').is_file():
        model, ckpt = load(name, device)
        if model.config.model != 'ar' or ckpt['meta']['tokenizer'] != meta['tokenizer']:
            fail(f'--scorer {name}: needs --model ar and the tokenizer of the models it scores')
        def mean_nats(rows):
            given = torch.where(up_to(rows, meta, '<eos>') < 0, rows, -1)       # the padding
            return model.loss(rows, given).repeat_interleave((given < 0).sum(1))
        return lambda rows: torch.cat([mean_nats(part) for part in rows.to(device).split(256)])
    import transformers as hub              # its models read text, in tokens of their own
    try:
        tokens = hub.AutoTokenizer.from_pretrained(name)
        model = hub.AutoModelForCausalLM.from_pretrained(name).to(device).eval()
    except (OSError, ValueError) as e:
        fail(f'--scorer {name}: neither an ar checkpoint nor one of the hub ({type(e).__name__})')
    def nats(text):
        ids = tokens(tokens.bos_token + text, return_tensors='pt').input_ids.to(device)
        return F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction='none')
    return lambda rows: torch.cat([nats(text) for _, text in to_texts(rows, meta)])

# ---- Pairs: scores of sequence-to-sequence text, words split at spaces ----
def bleu(text, references):
    """Sentence BLEU, smoothing method 4, in [0, 1]: what DiffuSeq and DLM-One report."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    return sentence_bleu([r.split() for r in references], text.split(),
                         smoothing_function=SmoothingFunction().method4)

def distinct(texts, n):
    """Share of distinct n-grams among all n-grams of some texts (dist-1 of one text, div-4)."""
    grams = [g for text in texts for g in ngrams(text.split(), n)]
    return len(set(grams)) / max(1, len(grams))

def self_bleu(texts):
    """Mean BLEU of each text against the others: 1 if all are the same."""
    return statistics.mean(bleu(t, texts[:i] + texts[i + 1:]) for i, t in enumerate(texts))

def pair_figures(texts, targets, per_source):
    """Texts, `per_source` in a row for the same target, and their targets -> a dict of means."""
    from rouge_score.rouge_scorer import RougeScorer
    rouge = RougeScorer(['rougeL'])
    each = [(bleu(text, [target]), rouge.score(target, text)['rougeL'].fmeasure,
             distinct([text], 1)) for text, target in zip(texts, targets)]
    figures = dict(zip(('bleu', 'rouge_l', 'dist1'), map(statistics.mean, zip(*each))))
    if per_source > 1:
        groups = [texts[i:i + per_source] for i in range(0, len(texts), per_source)]
        figures['self_bleu'] = statistics.mean(map(self_bleu, groups))
        figures['div4'] = statistics.mean(distinct(group, 4) for group in groups)
    return figures

# ---- Quality ----
def measure(model, meta, data, ids, o, nfe, seed, *compared):
    """All figures of one model at one nfe and seed: a dict."""
    known, each = as_rows(ids, meta['length']), o.per_source if meta['pairs'] else 1
    chosen = np.random.default_rng(seed).choice(len(known), o.rows // each)
    known = known[chosen].repeat_interleave(each, dim=0)    # (rows, L), every source `each` times
    given = up_to(known, meta, '<sep>') if meta['pairs'] else torch.full_like(known, -1)
    how = {'gamma': o.gamma} if model.config.model == 'flm' else {}
    if not is_student(model.config):
        how['temperature'] = o.temperature
        how |= {'sampler': o.sampler} if o.sampler in SAMPLERS.get(model.config.model, []) else {}
    _, (rows, seconds) = write(model, given[:1], 1, seed), write(model, given, nfe, seed, **how)
    figures, pairs = health(rows, meta, data), to_texts(rows, meta)
    if not meta['pairs']:
        figures |= text_figures(rows, meta, *compared)
    elif meta['tokenizer']['name'] != 'dates':          # there any of eight texts is right
        targets = [text for _, text in to_texts(known, meta)]
        figures |= pair_figures([text for _, text in pairs], targets, each)
    figures |= {'unique': len(set(pairs)) / len(pairs)} if each > 1 else {}     # of dates, too
    return {**figures, 'ms_per_row': 1000 * seconds / len(rows)}

@torch.no_grad()
def quality(o, paths, device):
    """The figures of every model, nfe and seed, after those of real text: lines of a table."""
    lines, meta = [], None
    for path in paths:
        models = [load(path.replace('{seed}', str(seed)), device) for seed in range(o.seeds)]
        model, ckpt = models[0]
        data = ckpt.get('teacher', ckpt['options'])['data']
        if meta and ckpt['meta']['tokenizer'] != meta['tokenizer']:
            fail(f'{path}: has another tokenizer than {paths[0]}; compare like with like')
        if not meta:
            meta, train_ids, val = load_data(data)
            real, train, score = [], set(), o.scorer and load_scorer(o.scorer, meta, device)
            if not meta['pairs']:
                # half meets the samples, half shows what text scores; mixed: neighbours are alike
                L, rng = meta['length'], np.random.default_rng(0)
                held, rows = as_rows(val, L)[rng.permutation(len(val) // L)], as_rows(train_ids, L)
                real = [ids for _, ids in split_rows(held[:len(held) // 2], meta)]
                train = {tuple(ids) for _, ids in split_rows(rows, meta)}
                other = held[len(held) // 2:][:o.rows]
                mixed = other.clone()
                for row, (_, text) in zip(mixed, split_rows(other, meta)):
                    row[:len(text)] = torch.from_numpy(rng.permutation(text))
                ids, chain = np.array(train_ids[:10 ** 7], np.int64), rows[:o.rows]
                often, after = np.bincount(ids), np.roll(ids, -1)[ids.argsort()]
                ends = often.cumsum()
                for i in range(1, L):           # each drawn from what follows the one before
                    n, end = (x[chain[:, i - 1]] for x in (often, ends))
                    chain[:, i] = torch.from_numpy(after[end - 1 - rng.integers(n)])
                for name, x in (('held-out text', other), ('the same, shuffled', mixed),
                                ('a chain of bigrams', chain)):
                    lines.append((name, '', [{**health(x, meta, data),
                                              **text_figures(x, meta, real, train, score)}]))
        for nfe in [meta['length']] if model.config.model == 'ar' else map(int, o.nfe):
            lines.append((path, nfe, [measure(model, meta, data, val, o, nfe, i, real, train, score)
                                      for i, (model, _) in enumerate(models)]))
            print(f'{path}, nfe {nfe}: done', flush=True)
    return lines

def picture(lines, path):
    """How good at how many calls and in what time, and the teachers' time axes, as an SVG."""
    import matplotlib.pyplot as plt
    shown = ('valid', 'form_entropy') if 'valid' in lines[0][2][0] else ('energy', 'energy')
    figure, (*axes, last) = plt.subplots(3, figsize=(5, 9), layout='constrained')
    for name in dict.fromkeys(name for name, nfe, _ in lines if nfe):
        for ax, x, y in zip(axes, ('network calls', 'ms_per_row'), shown):
            points = [np.mean([(run.get(x, nfe), run[y]) for run in runs], axis=0)
                      for other, nfe, runs in lines if other == name]
            ax.plot(*zip(*points), 'o-', label=name), ax.minorticks_off()   # labels would overlap
            ax.set(xscale='log', yscale='log' if y == 'energy' else 'linear', xlabel=x, ylabel=y)
        model, _ = load(name.replace('{seed}', '0'))
        if model.config.model == 'flm' and not is_student(model.config):
            last.plot(model.ts, model.taus, label=name)
            last.plot(*time_axis(model.config.vocab), 'k:', label="the paper's")
    last.set(xlabel='time t', ylabel='tau'), axes[0].legend(), last.lines and last.legend()
    figure.savefig(path, metadata={'Date': None})

# ---- Speed: timed on the device itself after warm-up, of which compilation is part ----
def median_time(work, device):
    """Median seconds of work(), of twenty after three."""
    if device.type != 'cuda':
        return statistics.median(timeit.repeat(work, number=1, repeat=23)[3:])
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(23)]
    for start, end in events:
        start.record(), work(), end.record(), end.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events[3:]) / 1000

def machine_rates(device):
    """What the machine reaches: FLOP/s of a large product, bytes/s read or written by a copy."""
    n, size = (8192, 2 ** 28) if device.type == 'cuda' else (1024, 2 ** 26)     # size in floats
    bf16 = device.type == 'cuda' and torch.cuda.is_bf16_supported()
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    x, y = torch.empty(2, size, device=device)
    return (2 * n ** 3 / median_time(lambda: a @ a, device),
            2 * x.nbytes / median_time(lambda: y.copy_(x), device))          # read and written

def call_floor(model, rows, flops, bandwidth):
    """The least seconds of one network call: its weights must be read, its products computed."""
    c, weights = model.config, {k: p for k, p in model.net.named_parameters() if k != 'embed'}
    # what meets every token; the time and what it modulates are computed once a row
    each = sum(p.numel() for name, p in weights.items() if not re.search('position|time|ada', name))
    L = 1 if c.model == 'ar' else c.length          # positions computed; its cache is not counted
    work = 2 * each * L + 4 * c.layers * L ** 2 * c.width                       # per row
    return max(sum(p.nbytes for p in weights.values()) / bandwidth, rows * work / flops)

def new_model(kind, length, vocab, width, layers):
    """An untrained student, flm, diffuseq, mdlm or ar, as fast as a trained one."""
    return build(Config(vocab, length, layers, width // math.gcd(width, 64), width,
                        model={'student': 'flm'}.get(kind, kind), two_time=kind == 'student'))

def speed(o, items, device):
    """Time to write `batch` rows, nothing given, with each MODEL@NFE,NFE: lines of a table."""
    (flops, bandwidth), lines = machine_rates(device), []
    print(f'large products {flops / 1e9:,.0f} GFLOP/s, copies {bandwidth / 1e9:,.1f} GB/s')
    try:
        runs = json.loads(Path(o.beside).read_bytes())['runs'] if o.beside else []
        known = {(run['model'], run['nfe']): {
            k: statistics.mean(seed[k] for seed in run['seeds'])
            for k in ('js2', 'energy', 'valid') if k in run['seeds'][0]} for run in runs}
    except (OSError, ValueError, KeyError, TypeError):
        fail(f'--beside {o.beside}: not the JSON of a quality run')
    for name, _, calls in (item.partition('@') for item in items):
        kind, *size = name.split(',')
        model = (new_model(kind, *map(int, size), o.layers).to(device).eval() if size else
                 load(name.replace('{seed}', '0'), device)[0])
        L, ar = model.config.length, model.config.model == 'ar'
        if o.compile and device.type == 'cuda':  # as CUDA graphs; but for ar, whose cache grows
            torch.compiler.reset()
            model.net.compile(mode='reduce-overhead', dynamic=None if ar else False)
        calls = [L] if ar else calls.split(',') if calls else o.nfe
        for nfe, rows in [(int(nfe), int(rows)) for nfe in calls for rows in o.batch]:
            nothing = torch.full((rows, L), -1, device=device)
            with autocast(device):
                took = median_time(partial(write_rows, model, nothing, nfe), device)
            floor = nfe * call_floor(model, rows, flops, bandwidth)
            lines.append((name, nfe, [dict(
                batch=rows, ms=1000 * took, rows_per_s=rows / took, floor_ms=1000 * floor,
                times_floor=took / floor, **known.get((name, nfe), {}))]))
            print(f'{name}, nfe {nfe}, {rows} rows: done', flush=True)
    return lines

def dense_loss(model, tokens, given, tau):
    """The loss as published code computes it: one-hot rows, V normals per token, all (B, L, V)."""
    onehot, t = F.one_hot(tokens, model.config.vocab).float(), model.t_of(tau)[:, None, None]
    with torch.autocast(tokens.device.type, enabled=False):         # on GPUs this product is TF32
        h = ((1 - t) * torch.randn_like(onehot) + t * onehot) @ model.net.embed.float()
    return -(onehot * model.predict(h, given, tau).log_softmax(-1)).sum(-1).mean(1)

def training_step(o, device, flops, how, size):
    """Forward and backward of one formulation: its time, tokens/s and peak memory, a dict."""
    torch.set_float32_matmul_precision('high' if how == 'dense' else 'highest')
    rows, length, vocab, width = map(int, size.split(','))
    model = new_model('flm', length, vocab, width, o.layers).to(device)
    o.compile and device.type == 'cuda' and model.net.compile()
    tokens = torch.randint(vocab, (rows, length), device=device)
    given, tau = torch.full_like(tokens, -1), torch.rand(rows, device=device)
    losses = model.loss if how == 'projected' else partial(dense_loss, model)
    def work():
        with autocast(torch.device('cpu') if how == 'dense fp32' else device):     # none on CPUs
            loss = losses(tokens, given, tau).mean()
        loss.backward(), model.zero_grad(set_to_none=True)
    from resource import RUSAGE_SELF, getrusage
    peak = (torch.cuda.max_memory_allocated if device.type == 'cuda' else       # so far, in bytes
            lambda: 1024 * getrusage(RUSAGE_SELF).ru_maxrss)
    before, took, n = peak(), median_time(work, device), tokens.numel()
    return {'tokens': n, 'ms': 1000 * took, 'tokens_per_s': n / took,
            'peak_GB': (peak() - before) / 1e9,     # and the share it uses of the machine's rate
            'mfu': 3 * call_floor(model, rows, flops, math.inf) / took}

def train_speed(o, sizes, device):
    """Each B,L,V,D and formulation, in a process of its own for its peak memory: table lines."""
    (flops, _), kinds = machine_rates(device), ['dense', 'projected', 'dense fp32']
    with get_context('spawn').Pool(1, maxtasksperchild=1) as pool:
        return [(f'{how} {size}', '', [pool.apply(training_step, (o, device, flops, how, size))])
                for size in sizes for how in kinds[:3 if device.type == 'cuda' else 2]]

def table(lines):
    """[(name, nfe, [figures, one per seed])] -> a Markdown table."""
    names = list(dict.fromkeys(k for *_, runs in lines for k in runs[0]))
    text = ['| | nfe | ' + ' | '.join(names) + ' |', '|---' * (len(names) + 2) + '|']
    for name, nfe, runs in lines:
        cells = []
        for key in names:
            values = [run[key] for run in runs if key in run]
            mean, spread = statistics.mean(values or [0]), max(values or [0]) - min(values or [0])
            cells.append('' if not values else f'{mean:{",.0f" if mean >= 1000 else ".3g"}}'
                         + (f' ({spread / 2:.2g})' if spread else ''))
        text.append(f'| {name} | {nfe} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(text)

def main(o):
    n, (what, *items) = r'[1-9]\d{,5}', o.what or ('',)
    size, kind = rf',{n},{n}\d,{n}[02468]', 'student|flm|diffuseq|mdlm|ar'
    form = dict(quality='.+', speed=rf'(({kind}){size}|[^,@]+)(@{n}(,{n})*)?', train=n + size)
    if not (what in form and items and all(re.fullmatch(form[what], item) for item in items)):
        fail('say: quality CHECKPOINT ..., speed CHECKPOINT@NFE,NFE ... or train B,L,V,D ...')
    numbers = map(str, (*o.nfe, *o.batch, o.rows, o.seeds, o.layers, o.per_source))
    if (not all(re.fullmatch(n, x) for x in numbers) or o.per_source > o.rows or o.gamma > 1 or not
            .01 <= o.temperature <= 100 or o.sampler not in ['', *sum(SAMPLERS.values(), [])]):
        fail('whole numbers from 1 to 999999, --per-source to --rows, the rest as for sample.py')
    device, kinds = pick_device(o.device), dict(quality=quality, speed=speed, train=train_speed)
    print('\n' + table(lines := kinds[what](o, items, device)))
    about = {'device': torch.cuda.get_device_name() if device.type == 'cuda' else str(device),
             'torch': torch.__version__, 'threads': torch.get_num_threads(), 'options': asdict(o),
             'runs': [dict(model=str(name), nfe=nfe, seeds=runs) for name, nfe, runs in lines]}
    write_whole(out := o.out or f'out/{what}.json', json.dumps(about, indent=1).encode())
    if what == 'quality' and {'energy', 'valid'} & set(lines[0][2][0]):
        picture(lines, Path(out).with_suffix('.svg'))
    print(f'\nwrote {out}')

if __name__ == '__main__':
    try:
        main(OPTIONS)
    except ImportError as e:        # of an optional package
        fail(f'this figure needs it: pip install {e.name}')
