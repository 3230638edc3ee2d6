"""
Train a teacher, which writes in tens of network calls, for distill.py to turn into one call.

    python train_teacher.py                         # the newest data set; minutes on a laptop's CPU
    python train_teacher.py --data data/dates --model diffuseq       # or the baselines mdlm, ar
    torchrun --standalone --nproc_per_node=8 train_teacher.py        # the paper's size, on 8 GPUs

Writes <out>/model.pt (weights, their average, optimisers, config, tokenizer) and <out>/log.jsonl.
Without --preset the settings are the paper's on a GPU, and laptop-sized on a CPU.
"""

import argparse
import atexit
import copy
import json
import math
import os
import re
import signal
import sys
import time
from contextlib import suppress
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

# before torch, which takes seconds to load: Ctrl-C is one line from here on
from prepare_data import (Parser, as_command, as_rows, load_dataset, newest_dataset, run_script,
                          to_texts, why_not)
from prepare_data import fraction as share_type
from prepare_data import nonnegative as rate
from prepare_data import nonnegative_int as count
from prepare_data import positive_int as positive

import numpy as np
import torch
import torch.distributed as dist

from model import (MEASURED_AXES, Config, autocast, build, compile_net, fail, generator, has_bf16,
                   load, pick_device, save)

# -----------------------------------------------------------------------------
# Options

# ours, for minutes on a CPU: Muon, few channels of the embedding, a hidden layer behind them, open
# gates, the measured axis, first tokens ahead of last ones, given tokens in part of the rows, an
# anchor for the diffusion. What is measured of it: assets/ablations.md
LAPTOP = dict(
    layers=4, heads=8, width=128, channels=2, dropout=0.0, gate=0.3, hidden_input=True,
    axis='measured', stagger=3.0, given=0.3, anchor=0.1, all_positions=False, iters=1000,
    batch=128, optimiser='muon', lr=3e-3, beta2=0.99, warmup=50, decay=0.6, ema=0.999,
    eval_every=500)
LAPTOP_DIFFUSEQ = {
    **LAPTOP, 'channels': 8, 'hidden_input': False, 'stagger': 0.0, 'iters': 1500, 'batch': 64}
# a baseline's embedding is not noised, so it may be wider; it learns from all that it writes
LAPTOP_BASELINE = {
    **LAPTOP, 'channels': 32, 'hidden_input': False, 'stagger': 0.0, 'given': 0.0, 'iters': 900}

# FLM, arXiv:2602.16813; MDLM and AR of the same size
PAPER = dict(
    layers=12, heads=12, width=768, channels=768, dropout=0.1, gate=0.0, hidden_input=False,
    axis='paper', stagger=0.0, given=0.0, anchor=0.0, all_positions=False, iters=1_000_000,
    batch=512, optimiser='adamw', lr=3e-4, beta2=0.999, warmup=2500, decay=0.0, ema=0.9999,
    eval_every=5000)
# DiffuSeq, arXiv:2210.08933, on its question pairs
PAPER_DIFFUSEQ = {
    **PAPER, 'channels': 128, 'all_positions': True, 'iters': 50_000, 'batch': 2048, 'lr': 1e-4,
    'warmup': 0, 'decay': 1.0}

PRESETS = {
    ('laptop', 'flm'): LAPTOP,
    ('laptop', 'diffuseq'): LAPTOP_DIFFUSEQ,
    ('laptop', 'mdlm'): LAPTOP_BASELINE,
    ('laptop', 'ar'): LAPTOP_BASELINE,
    ('paper', 'flm'): PAPER,
    ('paper', 'diffuseq'): PAPER_DIFFUSEQ,
    ('paper', 'mdlm'): PAPER,
    ('paper', 'ar'): PAPER,
}

# options that are for one kind of model only
ONLY_FOR = {'axis': 'flm', 'stagger': 'flm', 'anchor': 'diffuseq', 'all_positions': 'diffuseq'}


def parse(argv=None):
    """The options of a command line; those without a value get it from apply_preset."""
    parser = Parser(description=__doc__)
    add = preset_adder(parser, LAPTOP, PAPER)
    # what and where
    add('--data', default='', help='folder made by prepare_data.py; default: the newest')
    add('--out', default='', help='folder to write to; default: out/<data>[-<model>]/teacher')
    add('--model', default='flm', choices=['flm', 'diffuseq', 'mdlm', 'ar'],
        help='one-hot flow, embedding diffusion, or a baseline')
    add('--preset', choices=['laptop', 'paper'],
        help='whose settings; default: paper on a GPU, laptop on a CPU')
    # the network
    add('--layers', type=positive, help='transformer blocks')
    add('--heads', type=positive, help='attention heads')
    add('--width', type=positive, help='D, channels of the residual stream')
    add('--channels', type=positive, help='C, channels of the embedding table')
    add('--dropout', type=share_type, help='on attention-out and MLP-out')
    add('--gate', type=rate, help='initial residual gates; 0 is adaLN-zero')
    add('--hidden-input', action=argparse.BooleanOptionalAction,
        help='a hidden layer between the embedding and the first block')
    # the loss
    add('--axis', choices=['paper', *MEASURED_AXES, 'uniform'],
        help='flm: how tau runs along t; by the root of the measured loss, or by the loss itself')
    add('--stagger', type=rate,
        help='flm: how much later the last token is written than the first; 0: all together')
    add('--given', type=share_type,
        help='share of rows without a source that get random given tokens, for prompts and infills')
    add('--anchor', type=rate,
        help='diffuseq: weight of the cross-entropy of the rounded prediction')
    add('--all-positions', action=argparse.BooleanOptionalAction,
        help='diffuseq: noise and error at the source, too')
    # the optimiser
    add('--iters', type=count, help='iterations of the optimiser')
    add('--batch', type=positive, help='rows per iteration, of all processes together')
    add('--optimiser', choices=['muon', 'adamw'],
        help='muon is for the matrices in the blocks, AdamW for all else')
    add('--lr', type=rate, help='peak learning rate of AdamW')
    add('--muon-lr', type=rate, default=0.02, help='peak learning rate of Muon')
    add('--beta2', type=share_type, help='of AdamW')
    add('--clip', type=rate, default=1.0, help='largest norm of the gradient; 0: any')
    add('--warmup', type=count, help='iterations of linear warm-up')
    add('--decay', type=share_type, help='last share of the run, over which rates fall to 0')
    add('--ema', type=share_type, help='decay of the averaged weights, which samples use')
    # the run
    add_run_options(add)
    return parser.parse_args(argv)


def preset_adder(parser, laptop, paper):
    """parser.add_argument, whose help tells what the presets say of an option."""
    def add(name, **how):
        key = name.removeprefix('--').replace('-', '_')
        if key in laptop:
            how['help'] += f' [laptop {laptop[key]}, paper {paper[key]}]'
        parser.add_argument(name, **how)
    return add


def add_run_options(add):
    """The options that train_teacher.py and distill.py share."""
    add('--eval-every', type=positive, help='iterations between measurements; each one saves')
    add('--parts', type=count, default=0,
        help='parts a batch is computed in; 0: one for each process, or as memory asks')
    add('--resume', action='store_true', help='go on from <out>/model.pt')
    add('--overwrite', action='store_true', help='replace the model in <out>')
    add('--seed', type=count, default=0, help='of weights, batches and noise')
    add('--device', default='', help='cpu, cuda or mps; default: the best there is')
    add('--no-compile', dest='compile', action='store_false', help='no torch.compile on CUDA')


def apply_preset(options, device, presets, kind):
    """Fill in what the command line left open: the paper's on a GPU, the laptop's on a CPU."""
    if options.preset is None:
        options.preset = 'paper' if device.type == 'cuda' else 'laptop'
    for name, value in presets[options.preset, kind].items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def check_model(o):
    """Refuse options that would change nothing in a model of this kind; the preset comes later."""
    for name, model in ONLY_FOR.items():
        if getattr(o, name) is not None and o.model != model:
            fail(f'{as_flag(name)}: is for --model {model}; leave it out for {o.model}')


def as_flag(name):
    """An option's name as it is typed."""
    return '--' + name.replace('_', '-')


def check_options(o):
    """Refuse a network that cannot be built."""
    if o.width % (2 * o.heads):
        fail(f'--width {o.width}: must be a multiple of twice --heads ({o.heads})')
    check_shares(o)
    if o.layers * o.width ** 2 > 1e11:
        fail(f'--layers {o.layers}, --width {o.width}: too large for any machine')
    if o.channels > 1e6:
        fail(f'--channels {o.channels}: too large for any machine')


def check_shares(o):
    """Refuse a 1 where all must not be dropped, or remembered."""
    if o.dropout == 1:
        fail('--dropout 1: nothing would be left; give less')
    if o.beta2 == 1:
        fail('--beta2 1: no gradient would ever count; give less')


# -----------------------------------------------------------------------------
# Batches

def get_batch(ids, meta, n, share, cpu, device):
    """
    n random rows: tokens and given (n, L) int64, tau (n,) spread evenly over [0, 1).
    Of pairs the source is given. Of a `share` of other rows a random prefix or random tokens are
    (ours: prompts and infilling then work in a single call).
    """
    L = meta['length']
    stride = L if meta['kind'] == 'rows' else 1  # any window of a stream is a row
    starts = torch.randint((len(ids) - L) // stride + 1, (n,), generator=cpu) * stride
    rows = np.stack([ids[start:start + L] for start in starts.tolist()])
    tokens = torch.from_numpy(rows.astype(np.int64))
    if meta['pairs']:
        given = up_to(tokens, meta, '<sep>')
    else:
        given = random_given(tokens, share, cpu)
    tau = even_times(torch.rand(1, generator=cpu), n)
    return [to_device(x, device) for x in (tokens, given, tau)]


def even_times(start, n):
    """Stratified: one time in each of n equal stretches of [0, 1), from a random start: (n,)."""
    return (start + torch.arange(n) / n) % 1


def random_given(tokens, share, cpu):
    """Given tokens for a `share` of rows, half of them prefixes, half scattered: (n, L)."""
    n, L = tokens.shape
    chosen, amount, kind = torch.rand(3, n, 1, generator=cpu)
    prefix = torch.arange(L) < amount * L * 0.75
    scattered = torch.rand(n, L, generator=cpu) < amount
    known = (chosen < share) & torch.where(kind < 0.5, prefix, scattered)
    return torch.where(known, tokens, -1)


def up_to(tokens, meta, name):
    """The tokens up to and including the first special token of that name, then -1: (n, L)."""
    ends = tokens == meta['special'][name]
    before = ends.cumsum(1) - ends.long() == 0
    return torch.where(before, tokens, -1)


def to_device(x, device):
    """x on the device; from pinned memory a GPU fetches it while it computes."""
    if device.type == 'cuda':
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


# -----------------------------------------------------------------------------
# Several processes

def start_processes(o):
    """Join the others that torchrun started, if any: (rank, how many, this one's device)."""
    rank = int(os.environ.get('RANK', 0))
    world = int(os.environ.get('WORLD_SIZE', 1))
    if world > 1 and torch.cuda.is_available() and not o.device.startswith('cpu'):
        processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        if processes > torch.cuda.device_count():
            fail(f'{processes} processes, but {torch.cuda.device_count()} GPUs; give torchrun '
                 'a smaller --nproc_per_node')
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    device = pick_device(o.device)
    if world > 1 and device.type not in ('cpu', 'cuda'):
        fail(f'several processes cannot share {device}; add --device cpu, or leave out torchrun')
    if world > 1:
        # gloo for what is on CPUs, nccl for what is on GPUs
        dist.init_process_group()
        atexit.register(dist.destroy_process_group)
    if rank > 0:
        # the first process speaks for all
        sys.stdout = open(os.devnull, 'w')
    return rank, world, device


def set_parts(o, world):
    """How many parts a batch is computed in; one process with n parts trains as n processes do."""
    o.parts = o.parts or world
    if o.parts % world:
        fail(f'--parts {o.parts}: must be a multiple of the number of processes ({world})')
    if o.batch % o.parts:
        fail(f'--batch {o.batch}: must be a multiple of --parts ({o.parts}), of which each process '
             'has at least one')


def parts_of(o, it, rank, world, device):
    """
    For each of this process's parts of a batch: which rows are in it, and the generator of its
    noise. Part i of n has rows i, i + n, i + 2n, ...: of all times, and of all kinds.
    """
    for part in range(rank, o.parts, world):
        rng = generator(device, o.seed, it, 1 + part)
        # dropout draws from the global generator
        torch.manual_seed(rng.initial_seed())
        yield slice(part, None, o.parts), rng


def add_up(tensors):
    """Each tensor becomes its sum over all processes."""
    if dist.is_initialized():
        messages = [dist.all_reduce(x, async_op=True) for x in tensors]
        for message in messages:
            message.wait()


class Stopper:
    """Ctrl-C or SIGTERM, to any process, ends a run after the iteration at hand; it is saved."""

    def __init__(self):
        self.heard = False
        signal.signal(signal.SIGINT, self.hear)
        signal.signal(signal.SIGTERM, self.hear)

    def hear(self, number, frame):
        # written by the system's own call: print may have been interrupted itself
        if not self.heard:
            os.write(2, b'\nstopping after this iteration, saving ...\n')
        else:
            os.write(2, f'still saving; to lose it: kill -9 {os.getpid()}\n'.encode())
        self.heard = True

    def asked(self):
        """Whether any process was told to stop; all of them agree on it."""
        if not dist.is_initialized():
            return self.heard
        # on the CPU, so that no GPU is waited for
        flag = torch.tensor(float(self.heard))
        dist.all_reduce(flag)
        return flag.item() > 0


# -----------------------------------------------------------------------------
# Optimisers

def orthogonalise(update):
    """
    Newton-Schulz iteration (K. Jordan 2024): matrices (n, rows, cols) -> nearly orthogonal ones.
    Five iterations of a quintic polynomial push all singular values towards 1.
    """
    tall = update.shape[1] > update.shape[2]
    x = update.mT if tall else update
    # bf16 where the machine has it; most CPUs would emulate it, 17 times slower than fp32
    if has_bf16(x.device):
        x = x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """
    ours: Muon (K. Jordan 2024), momentum made orthogonal: a small network needs far fewer
    iterations. The update of torch.optim.Muon without weight decay, for all matrices of a shape at
    once.
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group['params']:
                by_shape.setdefault(p.shape, []).append(p)
            for (rows, cols), params in by_shape.items():
                updates = [self.momentum_update(p, group['momentum']) for p in params]
                updates = orthogonalise(torch.stack(updates))
                scale = group['lr'] * max(1, rows / cols) ** 0.5
                for p, update in zip(params, updates):
                    p.add_(update, alpha=-scale)

    def momentum_update(self, p, momentum):
        """Nesterov momentum of p's gradient."""
        if 'momentum' not in self.state[p]:
            self.state[p]['momentum'] = torch.zeros_like(p)
        average = self.state[p]['momentum']
        average.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(average, momentum)


def make_optimisers(model, o):
    """AdamW, and with --optimiser muon Muon for the matrices inside the blocks."""
    matrices = []
    rest = []
    for name, p in model.named_parameters():
        inside = re.search(r'blocks.*(qkv|out|up|down)\.weight', name)
        if not p.requires_grad:
            continue
        if o.optimiser == 'muon' and inside:
            matrices.append(p)
        else:
            rest.append(p)
    optimisers = [torch.optim.AdamW(rest, lr=o.lr, betas=(0.9, o.beta2), weight_decay=0.0,
                                    fused=True)]
    if matrices:
        optimisers.append(Muon(matrices, lr=o.muon_lr))
    return optimisers


def learning_rate_factor(it, o):
    """Linear warm-up, then flat, then a linear fall to 0 over the last `decay` share of a run."""
    factor = 1.0
    if o.warmup:
        factor = min(factor, (it + 1) / o.warmup)
    if o.decay:
        factor = min(factor, (o.iters - it) / (o.decay * o.iters))
    return factor


def update(model, ema, optimisers, it, o):
    """One iteration of the optimisers from the gradients at hand, then of the average -> norm."""
    add_up([p.grad for p in model.parameters() if p.grad is not None])
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip or math.inf)
    for optimiser in optimisers:
        # of this run's options, also when it goes on from a checkpoint
        rate_now = optimiser.defaults['lr'] * learning_rate_factor(it, o)
        for group in optimiser.param_groups:
            group['lr'] = rate_now
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    # a ramp lets the average forget the random start: 0.1, 0.18, ..., o.ema
    decay = min(o.ema, (1 + it) / (10 + it))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    return norm


# -----------------------------------------------------------------------------
# What a run writes: log and checkpoint

class Log:
    """Progress lines by the clock on the terminal, records by iteration in <out>/log.jsonl."""

    def __init__(self, out, iters, start, tokens):
        self.iters = iters
        self.start = start
        self.tokens = tokens  # per iteration
        self.began = time.time()
        self.next_line = 5.0  # seconds; then one every ten
        self.file = open_log(out, start)

    def record(self, it, **values):
        """A line in log.jsonl and on the terminal."""
        seconds = round(time.time() - self.began, 2)
        self.print_line(it, values)
        if self.file is None:
            return
        line = json.dumps({'iter': it, 'seconds': seconds, **values})
        # on a full disk the next save says so
        with suppress(OSError):
            self.file.write(line.encode() + b'\n')

    def progress(self, it, loss):
        """A line on the terminal if it is due; loss() is a tensor, asked for only then."""
        if time.time() - self.began >= self.next_line:
            self.print_line(it, {'loss': loss().item()})

    def print_line(self, it, values):
        seconds = time.time() - self.began
        self.next_line = seconds + 10
        done = max(1, it - self.start)
        left = timedelta(seconds=int(seconds / done * (self.iters - it)))
        speed = done * self.tokens / max(seconds, 1e-9)
        parts = [f'{name} {x:.4g}' if isinstance(x, float) else f'{name} {x}'
                 for name, x in values.items()]
        text = '  '.join(parts)
        print(f'{it:6d}/{self.iters}  {text}  {speed:,.0f} tokens/s, {left} left', flush=True)


def open_log(out, start):
    """<out>/log.jsonl, locked against a second run, without records behind iteration `start`."""
    # the first process writes for all
    if int(os.environ.get('RANK', 0)) > 0:
        return None
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        file = open(Path(out) / 'log.jsonl', 'a+b', buffering=0)
    except OSError as error:
        fail(f'{out}: cannot be written: {why_not(error)}')
    try:
        lock(file)
    except OSError:
        fail(f'{out}: another run writes there; wait for it, or name another folder by --out')
    # what a killed run logged behind its last save will come again
    file.seek(0)
    kept = 0
    for line in file.readlines():
        found = re.fullmatch(rb'{"iter": (\d+), .*}\n', line)
        if not found or int(found[1]) > start or start == 0:
            break
        kept += len(line)
    file.truncate(kept)
    return file


def lock(file):
    """Keep a second run out; OSError if there is one. Windows has no fcntl, nor this lock."""
    with suppress(ImportError):
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class TauBins:
    """Sums of losses in eight bins of tau, which show where a model is still learning."""

    def __init__(self, device, kept=None):
        # sums in float64 are exact, so a resumed run of several processes has the same ones
        dtype = torch.float32 if device.type == 'mps' else torch.float64
        kept = torch.zeros(3, 8) if kept is None else kept
        # rows: sum of losses, their number, largest norm of a gradient
        self.sums = kept.to(device, dtype)

    def add(self, tau, losses):
        losses = losses.detach().to(self.sums.dtype)
        both = torch.stack([losses, torch.ones_like(losses)])  # (2, B)
        self.sums[:2].index_add_(1, (tau * 8).long(), both)

    def add_norm(self, norm):
        self.sums[2] = self.sums[2].maximum(norm.to(self.sums.dtype))

    def collect(self, rank):
        """Sums over all processes come to the first one; the others start anew."""
        add_up([self.sums[:2]])
        if rank > 0:
            self.sums[:2].zero_()

    def loss(self):
        return self.sums[0].sum() / self.sums[1].sum()

    def record(self):
        """What log.jsonl says of the last iterations."""
        bins = [round(x, 3) for x in (self.sums[0] / self.sums[1]).tolist()]
        return {'loss': self.loss().item(), 'norm_max': self.sums[2, 0].item(), 'bins': bins}

    def check(self, it, out):
        """End the run if any loss or gradient was not finite."""
        if self.sums.isfinite().all():
            return
        bad = (~self.sums[0].isfinite()).nonzero().flatten().tolist()
        fail(f'loss or gradient not finite by iteration {it}, tau bins {bad} of 8; {out} keeps '
             'the last save; start anew with lower learning rates')


# what may differ when a run goes on: how far, where, how it is computed
FREE = {'data', 'out', 'teacher', 'preset', 'iters', 'eval_every', 'parts', 'resume',
        'overwrite', 'device', 'compile'}


def first_difference(ckpt, options, meta, parents):
    """What a checkpoint was made with and a run is not, as a sentence; '' if they agree."""
    for name, value in vars(options).items():
        # 0 where the option is newer than the checkpoint
        old = ckpt['options'].get(name, 0)
        if name not in FREE and old != value:
            return f'{as_flag(name)} was {old}, now {value}'
    if ckpt['meta']['tokenizer'] != meta['tokenizer']:
        return 'the data has another tokenizer'
    if ckpt['meta']['crc'] != meta['crc']:
        return f'the data is not what it was made from ({ckpt["meta"]["name"]})'
    for name, parent in parents.items():
        if ckpt[name]['crc'] != parent['crc']:
            return f'it has another {name}'
    return ''


def check_out(out, options, meta, **parents):
    """
    Look at what <out> holds before anything is written -> checkpoint to go on from, or None.
    A finished model is not replaced unless asked to; a run goes on only as what it was, and with
    the models that it learns from: parents are dicts with their checksum `crc`.
    """
    path = Path(out) / 'model.pt'
    if not options.resume:
        # os.path.exists is False where Path's own would raise, as of names that are too long
        if os.path.exists(path) and not options.overwrite:
            _, ckpt = load(path)
            # only the run that it was can go on
            same = not first_difference(ckpt, options, meta, parents)
            resume = '--resume goes on with it, ' if same else ''
            fail(f'{path} holds a model of {ckpt["iter"]} iterations; {resume}'
                 '--overwrite replaces it, --out writes elsewhere')
        return None
    _, ckpt = load(path)
    difference = first_difference(ckpt, options, meta, parents)
    if difference:
        fail(f'--resume: {path} is of another run: {difference}; give what it had, or start anew '
             'with --overwrite in place of --resume')
    if ckpt['iter'] >= options.iters:
        fail(f'--resume: {path} has {ckpt["iter"]} iterations already; ask for more by --iters, '
             'and the rates will be those of the longer run')
    return ckpt


def restore(ckpt, modules, optimisers):
    """Load a checkpoint into all that trains: modules by name, optimisers in order."""
    try:
        for name, module in modules.items():
            module.load_state_dict(ckpt[name])
        for optimiser, state in zip(optimisers, ckpt['optimisers'], strict=True):
            optimiser.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError):
        fail('--resume: the checkpoint is of another shape; start anew with --overwrite '
             'in place of --resume')


@torch.no_grad()
def validate(model, ids, meta, device, batches=4):
    """Mean loss on fixed validation rows and noise at fixed tau: two runs see the same ones."""
    losses = []
    for i in range(batches):
        batch = get_batch(ids, meta, 64, 0.0, generator('cpu', 1234, i, 0), device)
        with autocast(device):
            losses.append(model.loss(*batch, generator(device, 1234, i, 1)))
    return torch.cat(losses).mean().item()


# -----------------------------------------------------------------------------
# The script

def backward(model, batch, it, o, rank, world, bins):
    """Loss and gradients of this process's parts of a batch, each with noise of its own."""
    device = batch[0].device
    for rows, rng in parts_of(o, it, rank, world, device):
        tokens, given, tau = [x[rows] for x in batch]
        with autocast(device):
            losses = model.loss(tokens, given, tau, rng)
        (losses.sum() / o.batch).backward()
        bins.add(tau, losses)


def compile_on_gpu(o, device, models):
    """torch.compile of the networks of models, in place; None stands for one that a run lacks."""
    for model in models:
        if o.compile and device.type == 'cuda' and model is not None:
            compile_net(model.net)


def set_up(o, meta, out, device):
    """Model, average, optimisers, first iteration and kept sums, from a checkpoint or fresh."""
    ckpt = check_out(out, o, meta)
    torch.manual_seed(o.seed)
    names = {field.name for field in fields(Config)}
    shape = {name: value for name, value in vars(o).items() if name in names}
    model = build(Config(vocab=meta['vocab'], length=meta['length'], **shape)).to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimisers = make_optimisers(model, o)
    if ckpt is None:
        return model, ema, optimisers, 0, None
    restore(ckpt, {'model': model, 'ema': ema}, optimisers)
    return model, ema, optimisers, ckpt['iter'], ckpt['bins']


def to_sample(out, meta, val):
    """The words of a command that writes with a model: one of pairs needs a source."""
    words = ['python', 'sample.py', str(out)]
    if meta['pairs']:
        rows = as_rows(val[:100 * meta['length']], meta['length'])
        # a command line holds no line breaks, and may begin with a dash only behind a =
        sources = [source for source, _ in to_texts(rows, meta) if source.isprintable()]
        words += [f'--source={source}' for source in sources[:1]]
    return words


def advice(o, out, it, meta, val):
    """What to run next, for a shell."""
    if it < o.iters:
        return f'stopped at iteration {it}; the same command with --resume goes on'
    if o.model in ('flm', 'diffuseq'):
        words = ['python', 'distill.py', str(out)]
    else:
        words = to_sample(out, meta, val)
    return 'next: ' + as_command(words)


def main(o):
    rank, world, device = start_processes(o)
    check_model(o)
    apply_preset(o, device, PRESETS, o.model)
    check_options(o)
    set_parts(o, world)
    data = Path(o.data) if o.data else newest_dataset()
    meta, train, val = load_dataset(data)
    o.data = str(data)
    name = meta['name'] if o.model == 'flm' else f'{meta["name"]}-{o.model}'
    out = Path(o.out or f'out/{name}/teacher')
    model, ema, optimisers, start, kept = set_up(o, meta, out, device)
    bins = TauBins(device, kept if rank == 0 else None)
    compile_on_gpu(o, device, [model])
    log = Log(out, o.iters, start, o.batch * meta['length'])
    stopper = Stopper()
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f'{o.preset} preset: {o.model} of {size:.2f}M parameters, {o.iters:,} iterations of '
          f'{o.batch} rows, {world} x {device}; {len(train):,} tokens in {data} -> {out}')

    batch = None
    for it in range(start, o.iters + 1):
        stop = it == o.iters or stopper.asked()
        due = it % o.eval_every == 0 and it > start
        log_due = it % 100 == 0 and it > start

        # log, and let the time axis follow what was learnt
        if log_due or due or stop:
            bins.collect(rank)
            bins.check(it, out)
        if log_due:
            log.record(it, **bins.record())
            if o.model == 'flm' and o.axis in MEASURED_AXES and 2 * it <= o.iters:
                with autocast(device):
                    tokens, given, _ = batch
                    ema.taus.copy_(model.refit_axis(tokens[:16], given[:16], seed=it))
            bins.sums.zero_()

        # save, and only then measure
        if (due or stop) and rank == 0:
            save(out / 'model.pt', model, ema, optimisers, iter=it, bins=bins.sums, meta=meta,
                 options=vars(o))
        if due or it == o.iters:
            log.record(it, val=validate(ema, val, meta, device))
        if stop:
            break

        # batch, forward and backward, step
        cpu = generator('cpu', o.seed, it, 0)
        batch = get_batch(train, meta, o.batch, o.given, cpu, device)
        backward(model, batch, it, o, rank, world, bins)
        bins.add_norm(update(model, ema, optimisers, it, o))
        log.progress(it + 1, bins.loss)

    print(f'wrote {out}/model.pt and {out}/log.jsonl')
    print(advice(o, out, it, meta, val))


if __name__ == '__main__':
    options = parse()
    run_script(lambda: main(options))
