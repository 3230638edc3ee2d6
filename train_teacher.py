"""Train a teacher, which writes in tens of network calls, for distill.py to turn into one.

    python train_teacher.py                                  # pydocs, minutes on 2 CPU cores
    python train_teacher.py --data data/dates --model diffuseq --code 8     # or mdlm, or ar
    torchrun --standalone --nproc_per_node=8 train_teacher.py --layers 12 --width 768   # on GPUs

Writes <out>/model.pt (weights, their average, optimiser, config, tokenizer) and <out>/log.jsonl.
"""
import atexit
import copy
import json
import os
import re
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import takewhile
from pathlib import Path

from prepare_data import fail, parse

@dataclass
class Options:
    data: str = 'data/pydocs'   # folder made by prepare_data.py
    out: str = ''               # folder to write to; default out/<data>[-<model>]/teacher
    model: str = 'flm'          # flm (one-hot flow) | diffuseq (embedding diffusion) | mdlm | ar
    iters: int = 1200           # optimiser iterations
    batch: int = 64             # rows per iteration, of all processes together
    parts: int = 0              # parts each batch is computed in; 0: one for each process
    optimiser: str = 'muon'     # muon (AdamW for all but the blocks' matrices) | adamw
    lr: float = 3e-3            # peak learning rate of AdamW
    muon_lr: float = 0.02       # peak learning rate of Muon
    warmup: int = 50            # iterations of linear warm-up
    decay: float = 0.6          # last share of the run, over which the rates fall linearly to 0
    ema: float = 0.999          # decay of the averaged weights, which samples are drawn with
    layers: int = 4             # transformer blocks
    heads: int = 8              # attention heads
    width: int = 128            # D, channels of the residual stream
    code: int = 8               # C, channels of the embedding table; 0: the width
    dropout: float = 0.0        # on attention-out and MLP-out
    gate: float = 0.3           # initial residual gates; 0 is adaLN-zero
    axis: str = 'measured'      # flm: tau(t): measured | reader | paper | uniform | a number
    squared: bool = False       # flm: to compare: squared error, not cross-entropy
    anchor: float = 0.1         # diffuseq: weight of the cross-entropy of the rounded prediction
    given: float = 0.1          # share of rows without source that get random given tokens
    eval_every: int = 500       # iterations between validations; each one saves
    resume: bool = False        # go on from <out>/model.pt
    seed: int = 0               # of weights, batches and noise
    device: str = ''            # cpu, cuda or mps; default the best there is
    compile: bool = True        # torch.compile, on CUDA only

OPTIONS = parse(Options) if __name__ == '__main__' else None     # before torch loads

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from model import Config, build, checksum, load, save  # noqa: E402

# ---- What distill.py needs as well ----
def load_data(folder):
    """data/<name> -> (meta dict, train ids, val ids), ids memory-mapped uint16."""
    folder = Path(folder)
    if not os.path.isfile(folder / 'meta.json'):
        fail(f'{folder} holds no prepared data; run: python prepare_data.py {folder.name}')
    with suppress(OSError, ValueError, KeyError, TypeError):
        meta = json.loads((folder / 'meta.json').read_bytes())
        ids = [np.memmap(folder / f'{x}.bin', dtype='<u2', mode='r') for x in ('train', 'val')]
        if meta['format'] == 1 and meta['crc'] == checksum(meta, *ids):
            return meta, *ids
    fail(f'{folder}: damaged, or of another version; run: python prepare_data.py {folder.name}')

def get_batch(ids, meta, n, share, cpu, device):
    """n random rows: tokens and given (n, L) int64, tau (n,) stratified over the batch.
    Of pairs the source is given, of a `share` of other rows a random prefix or random tokens: that
    makes prompts and infilling work in a single call."""
    L = meta['length']
    stride = L if meta['kind'] == 'rows' else 1         # any window of a stream is a row
    at = torch.randint((len(ids) - L) // stride + 1, (n,), generator=cpu) * stride
    tokens = torch.from_numpy(np.stack([ids[i:i + L] for i in at.tolist()]).astype(np.int64))
    if meta['pairs']:
        given = up_to(tokens, meta, '<sep>')
    else:
        r = torch.rand(3, n, 1, generator=cpu)
        prefix = torch.arange(L) < r[1] * L * 0.75
        spread = torch.rand(n, L, generator=cpu) < r[1]
        known = (r[0] < share) & torch.where(r[2] < 0.5, prefix, spread)
        given = torch.where(known, tokens, -1)                                  # (n, L)
    tau = (torch.rand(1, generator=cpu) + torch.arange(n) / n) % 1
    return tuple((x.pin_memory() if device.type == 'cuda' else x).to(device, non_blocking=True)
                 for x in (tokens, given, tau))

def up_to(tokens, meta, end):
    """The tokens up to and including the first special token `end`, then -1: (B, L) -> (B, L)."""
    ends = tokens == meta['special'][end]
    return torch.where(ends.cumsum(1) - ends.long() == 0, tokens, -1)

def pick_device(name):
    """The torch.device named, else the machine's accelerator, else its CPU."""
    try:
        best = torch.accelerator.current_accelerator(check_available=True)
        return torch.empty(1, device=name or best or 'cpu').device
    except (RuntimeError, AssertionError, NotImplementedError):
        fail(f'--device {name} is not available; leave it out to use what there is')

def autocast(device):
    """bf16 where the GPU has it, fp32 elsewhere."""
    on = device.type == 'cuda' and torch.cuda.is_bf16_supported()
    # uncached: a cached cast of weights would outlive their update, or lack their gradient
    return torch.autocast(device.type, torch.bfloat16, enabled=on, cache_enabled=False)

def generator(device, *key):
    """A generator seeded by the numbers in `key`: an exact resume needs no saved state."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1
    return torch.Generator(device).manual_seed(int(seed))

def join(o):
    """This process's rank, how many there are, its device, and stopped(it): whether to stop."""
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    # noise belongs to a part of the batch: one process with n parts trains as n processes do
    o.parts = o.parts or world
    if not min(o.batch, o.parts, o.warmup, o.eval_every) >= 1 >= max(o.decay, o.ema, o.batch / 1e6):
        fail('--batch (to 1e6), --parts, --warmup, --eval-every: from 1; --decay, --ema: to 1')
    if o.parts % world or o.batch % o.parts:
        fail(f'--batch {o.batch}: a multiple of --parts {o.parts}, and that of {world} processes')
    if world > 1:
        dist.init_process_group()       # gloo for tensors on CPUs, nccl on GPUs
        atexit.register(dist.destroy_process_group)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    if rank:
        sys.stdout = open(os.devnull, 'w')          # the first process speaks for all
    device = pick_device(o.device)
    heard = torch.zeros(1, device=device)       # of Ctrl-C or SIGTERM; the second one kills
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, lambda n, _: (heard.add_(1), signal.signal(n, signal.SIG_DFL)))
    def stopped(it):       # by any process: all ask each other at every tenth iteration
        return it % 10 == 0 and (add_up([heard]) or heard.item() > 0)
    return rank, world, device, stopped

def add_up(tensors):
    """Each tensor becomes its sum over all processes; one message."""
    if dist.is_initialized():
        flat = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(flat)
        for x, total in zip(tensors, flat.split([x.numel() for x in tensors])):
            x.copy_(total.view_as(x))

def optimisers(model, o):
    """Muon (K. Jordan 2024) for the matrices inside the blocks, AdamW for all else that trains."""
    if o.optimiser not in ('muon', 'adamw'):
        fail(f'--optimiser {o.optimiser}: use muon or adamw')
    muon = o.optimiser == 'muon' and getattr(torch.optim, 'Muon', None)
    if muon is None:
        print(f'torch {torch.__version__} has no Muon (2.9 has): AdamW alone, which learns slower')
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inside = [x for x in params if muon and re.search(r'blocks.*(qkv|out|up|down)\.weight', x)]
    # orthogonal updates of those matrices: a small network needs far fewer iterations
    made = [torch.optim.AdamW([p for name, p in params.items() if name not in inside], lr=o.lr,
                              betas=(0.9, 0.99), weight_decay=0.0, fused=True)]
    if inside:
        made.append(muon([params[name] for name in inside], lr=o.muon_lr, weight_decay=0.0))
    return made

def update(model, ema, opts, it, o):
    """One optimiser iteration from the gradients at hand, then the average; returns their norm."""
    # linear warm-up, flat, then a linear fall to 0 over the last `decay` share of the run
    factor = min(1, (it + 1) / o.warmup, (o.iters - it) / (o.decay * o.iters) if o.decay else 1)
    add_up([p.grad for p in model.parameters() if p.grad is not None])
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for opt in opts:
        opt.param_groups[0]['lr'] = opt.defaults['lr'] * factor     # this run's, also on --resume
        opt.step()
        opt.zero_grad(set_to_none=True)
    # the ramp lets the average forget the random start: 0.1, 0.18, ... , o.ema
    with torch.no_grad():
        decay = min(o.ema, (1 + it) / (10 + it))
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    return norm

class Log:
    """One progress line with ETA on the terminal, the same record in <out>/log.jsonl."""
    def __init__(self, out, o, start=0):
        self.o, self.start, self.began = o, start, time.time()
        try:
            Path(out).mkdir(parents=True, exist_ok=True)
            self.file = open(Path(out) / 'log.jsonl', 'a+b', buffering=0)
            with suppress(ImportError):         # on Windows nothing keeps a second run out
                import fcntl
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            fail(f'{out}: cannot be written, or another run writes there ({e.strerror})')
        self.file.seek(0)
        def stays(line):        # what a killed run logged behind its last save will come again
            found = re.fullmatch(rb'{"iter": (\d+), .*}\n', line)
            return found and int(found[1]) <= start
        self.file.truncate(sum(map(len, takewhile(stays, self.file if start else ()))))

    def __call__(self, it, **values):
        seconds = time.time() - self.began
        left = seconds / max(1, it - self.start) * (self.o.iters - it)
        text = '  '.join(f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}'
                         for k, v in values.items())
        print(f'{it:6d}/{self.o.iters}  {text}  {timedelta(seconds=int(seconds))}, '
              f'{timedelta(seconds=int(left))} left', flush=True)
        with suppress(OSError):         # a full disk: the next save says so
            self.file.write(json.dumps({'iter': it, 'seconds': round(seconds, 2), **values})
                            .encode() + b'\n')

# ---- The script ----
def main(o):
    if o.model not in ('flm', 'diffuseq', 'mdlm', 'ar'):
        fail(f'--model {o.model}: use flm, diffuseq, mdlm or ar')
    if not re.fullmatch(r'measured|reader|paper|uniform|\d+(\.\d+)?', o.axis) or o.dropout >= 1:
        fail(f'--axis {o.axis}: measured, reader, paper, uniform or a number; --dropout: below 1')
    if not 0 < o.layers * o.heads * o.width * (1 + o.code) < 1e13 or o.width % (2 * o.heads):
        fail(f'--width {o.width}: a multiple of twice --heads; --layers, --code: too many, or none')
    rank, world, device, stopped = join(o)
    meta, train, val = load_data(o.data)
    name = meta['name'] if o.model == 'flm' else f'{meta["name"]}-{o.model}'
    out = Path(o.out or f'out/{name}/teacher')
    torch.manual_seed(o.seed)
    shape = {name: x for name, x in asdict(o).items() if name in Config.__annotations__}
    model = build(Config(meta['vocab'], meta['length'], **shape)).to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    opts = optimisers(model, o)
    kept = restore(out, model, ema, opts) if o.resume else {}
    start, bins = kept.get('iter', 0), kept.get('bins', torch.zeros(3, 8)) * (rank == 0)
    # sums in float64 are exact, whatever their order: a resumed run of several has the same ones
    bins = bins.to(device, torch.float32 if device.type == 'mps' else torch.float64)
    if o.compile and device.type == 'cuda':
        model.net.compile()         # in place: the names of the weights stay as they are
    log = Log(out, o, start) if rank == 0 else lambda it, **values: None
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f'{size:.2f}M parameters on {world} x {device}, {len(train):,} tokens in {o.data}')
    for it in range(start, o.iters + 1):
        hundred, due = (it % n == 0 and it > start for n in (100, o.eval_every))
        stop = it == o.iters or stopped(it)
        if hundred or due or stop:
            add_up([bins])
            if not bins.isfinite().all():
                bad = (~bins[0].isfinite()).nonzero().flatten().tolist()
                fail(f'loss or gradient not finite by iteration {it}, tau bins {bad} of 8; lower '
                     f'the learning rates, and --resume goes on from the last save in {out}')
        if hundred:
            log(it, loss=(bins[0].sum() / bins[1].sum()).item(), norm_max=bins[2, 0].item(),
                norm=norm.item(), bins=[round(x, 3) for x in (bins[0] / bins[1]).tolist()])
            if o.axis == 'measured' and o.model == 'flm' and 2 * it <= o.iters:
                with autocast(device):
                    ema.taus.copy_(model.refit(*(x[:32] for x in batch[:2]), seed=it))
            bins.zero_()
        if due or it == o.iters:
            log(it, val=validate(ema, val, meta, device))
        if due or stop:
            # the first process keeps what all have counted so far
            bins.zero_() if rank else save(out / 'model.pt', model, ema, opts, bins=bins, iter=it,
                                           meta=meta, options=asdict(o))
        if stop:
            break
        batch = get_batch(train, meta, o.batch, o.given, generator('cpu', o.seed, it, 0), device)
        for part in range(rank, o.parts, world):
            tokens, given, tau = (x.chunk(o.parts)[part] for x in batch)
            rng = generator(device, o.seed, it, 1 + part)
            torch.manual_seed(rng.initial_seed())       # dropout draws from the global one
            with autocast(device):
                losses = model.loss(tokens, given, tau, rng)
            (losses.sum() / o.batch).backward()
            seen = torch.stack([losses, losses ** 0]).detach().to(bins)     # and how many rows
            bins[:2].index_add_(1, (tau * 8).long(), seen)     # by tau: where it is still learning
        norm = update(model, ema, opts, it, o)
        bins[2] = bins[2].maximum(norm) * (rank == 0)
    print(f'wrote {out}/model.pt and {out}/log.jsonl')
    print(f'next: python distill.py {out}' if it == o.iters else
          f'stopped at iteration {it}; the same command with --resume goes on')

@torch.no_grad()
def validate(model, ids, meta, device, batches=4):
    """Mean loss on fixed validation rows, times and noise: two runs see the same ones."""
    with autocast(device):
        losses = [model.loss(*get_batch(ids, meta, 64, 0.0, generator('cpu', 1234, i, 0), device),
                             generator(device, 1234, i, 1)) for i in range(batches)]
    return torch.cat(losses).mean().item()

def restore(out, model, ema, opts, **others):
    """Load <out>/model.pt into everything that trains; returns that checkpoint."""
    _, ckpt = load(out)
    try:
        for name, part in {'model': model, 'ema': ema, **others}.items():
            part.load_state_dict(ckpt[name])
        for opt, values in zip(opts, ckpt['optimisers'], strict=True):
            opt.load_state_dict(values)
    except (KeyError, ValueError, RuntimeError):
        fail(f'--resume: {out}/model.pt was made with other options; start afresh without --resume')
    return ckpt

if __name__ == '__main__':
    main(OPTIONS)
