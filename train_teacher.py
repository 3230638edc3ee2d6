"""
Train a teacher, which writes in tens of network calls, for distill.py to turn into one call.

    python train_teacher.py                         # the newest data set; minutes on a laptop's CPU
    python train_teacher.py --data data/dates --model diffuseq       # or the baselines mdlm, ar
    torchrun --standalone --nproc_per_node=8 train_teacher.py        # as one with --micro-batches 8

Writes <out>/model.pt (weights, their average, optimizers, config, tokenizer) and <out>/log.jsonl.
The settings follow the machine (--preset) and the data. The training loop, `train`, serves
distill.py too: what a run minimizes is an Objective.
"""

import argparse
import atexit
import copy
import errno
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path

# before torch, which takes seconds to load: Ctrl-C is one line from here on
from prepare_data import (Parser, as_command, as_rows, fail, fraction, is_stories, load_dataset,
                          newest_dataset, nonnegative, nonnegative_int, number, positive_int,
                          run_script, say, to_texts, why_not)

import numpy as np
import torch
import torch.distributed as dist

from model import Config, autocast, build, generator, has_bf16, load, pick_device, save

# -----------------------------------------------------------------------------
# Options

# ours, for minutes on a CPU: Muon, few channels of the embedding with a hidden layer after them, a
# reparameterization that follows the loss, given tokens in a fraction of the rows, an anchor for
# the diffusion. assets/ablations.md has what each of them brings
LAPTOP = dict(
    layers=4, heads=6, width=96, channels=4, network='ours', dropout=0.0,
    hidden_input=True, reparam='loss', stagger=0.0, given=0.3, anchor=0.1, all_positions=False,
    minutes=12, iters=None, batch=64, optimizer='muon', lr=3e-3, muon_lr=0.02, beta2=0.99,
    clip=1.0, warmup=50, decay=0.6, ema=0.999, evals=2)

# one GPU has time for a larger network and larger batches
GPU = dict(layers=6, heads=8, width=256, minutes=10, batch=512, evals=4)

# FLM, arXiv:2602.16813; MDLM and AR of the same size
PAPER = dict(
    layers=12, heads=12, width=768, channels=768, network='ours', dropout=0.1,
    hidden_input=False, reparam='paper', stagger=0.0, given=0.0, anchor=0.0, all_positions=False,
    minutes=None, iters=1_000_000, batch=512, optimizer='adamw', lr=3e-4, muon_lr=0.02,
    beta2=0.999, clip=1.0, warmup=2500, decay=0.0, ema=0.9999, evals=200)

# what differs for the data set `stories`, and by the model
STORIES = dict(heads=8, width=128, channels=2, reparam='root', stagger=3.0, minutes=5)
BY_MODEL = {
    'flm': {},
    'diffuseq': dict(channels=8, hidden_input=False),
    # a baseline's embedding is not noised, so it may be wider; rows need no given tokens, as in
    # training the network sees some anyway
    'mdlm': dict(channels=32, hidden_input=False, given=0.0),
    'ar': dict(channels=32, hidden_input=False, given=0.0),
}
PAPER_BY_MODEL = {
    'flm': dict(network='paper'),
    # DiffuSeq, arXiv:2210.08933, on its question pairs
    'diffuseq': dict(channels=128, all_positions=True, iters=50_000, batch=2048, lr=1e-4, warmup=0,
                     decay=1.0, evals=10),
    'mdlm': {},
    'ar': {},
}


def preset(machine, model, stories):
    """The settings for a machine (laptop, gpu, paper) and a model, for `stories` or other data."""
    if machine == 'paper':
        return {**PAPER, **PAPER_BY_MODEL[model]}
    of_data = STORIES if stories else {}
    of_machine = GPU if machine == 'gpu' else {}
    return {**LAPTOP, **of_data, **of_machine, **BY_MODEL[model]}


# the models that an option is for, where it is not for all
ONLY_FOR = {
    'network': ['flm'],
    'reparam': ['flm'],
    'stagger': ['flm'],
    'anchor': ['diffuseq'],
    'all_positions': ['diffuseq'],
}


def parse(argv=None):
    """The options of a command line; what is not given is None, see fill_in."""
    parser = Parser(description=__doc__)
    add = preset_adder(parser, laptop=LAPTOP, gpu=GPU, paper=PAPER)
    # what and where
    add('--data', default='', help='folder made by prepare_data.py; default: the newest')
    add('--out', default='', help='folder to write to; default: out/<data>[-<model>]/teacher')
    add('--model', default='flm', choices=['flm', 'diffuseq', 'mdlm', 'ar'],
        help='one-hot flow, embedding diffusion, or a baseline')
    # the network
    add('--layers', type=number(int, 1, 1000), help='transformer blocks')
    add('--heads', type=number(int, 1, 1000), help='attention heads')
    add('--width', type=number(int, 2, 100_000), help='D, channels of the residual stream')
    add('--channels', type=number(int, 1, 100_000), help='C, channels of the embedding table')
    add('--network', choices=['ours', 'paper'],
        help="flm: ours, or the paper's own, with --channels equal to --width")
    add('--hidden-input', action=argparse.BooleanOptionalAction,
        help='a hidden layer between the embedding and the first block')
    # the loss
    add('--reparam', choices=['paper', 'root', 'loss', 'uniform'],
        help='flm: tau(t), as in the paper, or by the root of the measured loss, or by the loss')
    add('--stagger', type=nonnegative,
        help='flm: how much later the last token is denoised than the first; 0: all together')
    add('--anchor', type=nonnegative,
        help='diffuseq: weight of the cross-entropy of the rounded prediction')
    add('--all-positions', action=argparse.BooleanOptionalAction,
        help='diffuseq: noise and error at the source, too')
    add_training_options(add)
    return parser.parse_args(argv)


def preset_adder(parser, **presets):
    """parser.add_argument, whose help tells an option's value in the presets."""
    def add(name, **how):
        key = name.removeprefix('--').replace('-', '_')
        values = [f'{machine} {settings[key]}' for machine, settings in presets.items()
                  if settings.get(key) is not None]
        if values:
            how['help'] += f' [{", ".join(values)}]'
        parser.add_argument(name, **how)
    return add


def add_training_options(add):
    """The options that train_teacher.py and distill.py share."""
    # a 1 would drop, or remember, everything
    below_one = number(float, 0, 0.999999)
    add('--preset', choices=['laptop', 'gpu', 'paper'],
        help='the settings; default: gpu on a GPU, else laptop; paper: the paper\'s')
    add('--given', type=fraction,
        help='fraction of rows without a source that get random given tokens, for prompts')
    add('--dropout', type=below_one, help='after attention and after the MLP')
    # the optimizer
    add('--minutes', type=number(float, 0.01, 1e6),
        help='how long to train; sets the number of iterations, which --resume keeps')
    add('--iters', type=positive_int, help='iterations of the optimizer, in place of minutes')
    add('--batch', type=positive_int, help='rows per iteration, of all processes together')
    add('--optimizer', choices=['muon', 'adamw'],
        help='muon is for the matrices in the blocks, AdamW for the rest')
    add('--lr', type=nonnegative, help='peak learning rate of AdamW')
    add('--muon-lr', type=nonnegative, help='peak learning rate of Muon')
    add('--beta2', type=below_one, help='of AdamW')
    add('--clip', type=nonnegative, help='largest norm of the gradient; 0: unlimited')
    add('--warmup', type=nonnegative_int, help='iterations of linear warm-up')
    add('--decay', type=fraction, help='last fraction of the run, over which rates fall to 0')
    add('--ema', type=below_one, help='decay of the averaged weights, which samples use')
    # the run
    add('--evals', type=positive_int, help='measurements, evenly spread; each one saves first')
    add('--micro-batches', type=nonnegative_int, default=0,
        help='parts a batch is computed in; 0: one per process, more if memory requires it')
    add('--resume', action='store_true', help='continue from <out>/model.pt')
    add('--overwrite', action='store_true', help='replace the model in <out>')
    add('--seed', type=nonnegative_int, default=0, help='of weights, batches and noise')
    add('--device', default='', help='cpu, cuda or mps; default: the best there is')
    add('--no-compile', dest='compile', action='store_false', help='no torch.compile on CUDA')


def fill_in(options, settings):
    """Complete what the command line left open, once; nothing changes the options afterwards."""
    if options.iters is not None and options.minutes is not None:
        fail('--iters and --minutes do not go together; give one of them')
    # whichever was given counts, and not what the preset says of the other
    if options.iters is not None or options.minutes is not None:
        settings = {**settings, 'iters': options.iters, 'minutes': options.minutes}
    for name, value in settings.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def default_machine(device):
    """The preset for a device."""
    return 'gpu' if device.type == 'cuda' else 'laptop'


def refuse_unused(options, only_for, kind, name):
    """Stop at an option that has no effect on this kind of model or run, called `name`."""
    for option, kinds in only_for.items():
        if getattr(options, option) is not None and kind not in kinds:
            fail(f'{as_flag(option)} is for {", ".join(kinds)}; leave it out for {name}')


def as_flag(option):
    """An option's name as it is typed."""
    return '-n' if option == 'n' else '--' + option.replace('_', '-')


# -----------------------------------------------------------------------------
# Batches

def get_batch(ids, meta, n, given_fraction, cpu, device):
    """
    n random rows: tokens and given (n, L) int64. Of pairs the source is given. Of a fraction of
    other rows a random prefix or random tokens are (ours: prompts and infilling then work in a
    single call).
    """
    L = meta['length']
    stride = L if meta['kind'] == 'rows' else 1  # any window of a stream is a row
    starts = torch.randint((len(ids) - L) // stride + 1, (n,), generator=cpu) * stride
    rows = ids[starts.numpy()[:, None] + np.arange(L)]
    tokens = torch.from_numpy(rows.astype(np.int64))
    if meta['pairs']:
        given = up_to(tokens, meta, '<sep>')
    else:
        given = random_given(tokens, given_fraction, cpu)
    return to_device(tokens, device), to_device(given, device)


def stratified(start, n):
    """One time in each of n equal stretches of [0, 1), from a random start: (n,)."""
    return (start + torch.arange(n) / n) % 1


def random_given(tokens, given_fraction, cpu):
    """Given tokens for a fraction of rows, half of them prefixes, half scattered: (n, L)."""
    n, L = tokens.shape
    chosen, amount, kind = torch.rand(3, n, 1, generator=cpu)
    prefix = torch.arange(L) < amount * L * 0.75
    scattered = torch.rand(n, L, generator=cpu) < amount
    known = (chosen < given_fraction) & torch.where(kind < 0.5, prefix, scattered)
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

def start_processes(name):
    """Join the others that torchrun started, if any: (rank, world size, this one's device)."""
    rank = int(os.environ.get('RANK', 0))
    world = int(os.environ.get('WORLD_SIZE', 1))
    if world > 1 and torch.cuda.is_available() and not name.startswith('cpu'):
        processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        if processes > torch.cuda.device_count():
            fail(f'{processes} processes, but {torch.cuda.device_count()} GPUs; give torchrun '
                 'a smaller --nproc_per_node')
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    device = pick_device(name)
    if world > 1 and device.type not in ('cpu', 'cuda'):
        fail(f'several processes cannot share {device}; add --device cpu, or leave out torchrun')
    if world > 1:
        # gloo for tensors on CPUs, nccl for those on GPUs
        dist.init_process_group()
        atexit.register(dist.destroy_process_group)
    if rank > 0:
        # only the first process prints
        sys.stdout = open(os.devnull, 'w')
    return rank, world, device


def all_reduce(tensors):
    """Each tensor becomes its sum over all processes."""
    if dist.is_initialized():
        handles = [dist.all_reduce(x, async_op=True) for x in tensors]
        for handle in handles:
            handle.wait()


class Stopper:
    """Any signal that asks to end, in any process, ends a run after a last save."""
    # Ctrl-C, Ctrl-\, Windows' Ctrl-Break, kill, a lost terminal, a job's limits and its scheduler
    SIGNALS = ('SIGINT', 'SIGQUIT', 'SIGBREAK', 'SIGTERM', 'SIGHUP', 'SIGXCPU', 'SIGUSR1')

    def __init__(self):
        self.heard = False
        for name in self.SIGNALS:
            # no system has all
            if not hasattr(signal, name):
                continue
            number = getattr(signal, name)
            by_nohup = name == 'SIGHUP' and signal.getsignal(number) is signal.SIG_IGN
            if not by_nohup:
                signal.signal(number, self.hear)

    def hear(self, number, frame):
        if not self.heard:
            line = '\nstopping after this iteration, saving ...\n'
        else:
            line = f'still saving; to lose it: kill -9 {os.getpid()}\n'
        self.heard = True
        # by a system call, as print itself may have been interrupted; stderr may be gone
        with suppress(OSError):
            os.write(2, line.encode())

    def asked(self):
        """Whether any process was told to stop; all of them agree on it."""
        if not dist.is_initialized():
            return self.heard
        # on the CPU, so that no GPU is waited for
        flag = torch.tensor(float(self.heard))
        dist.all_reduce(flag)
        return flag.item() > 0


# -----------------------------------------------------------------------------
# Optimizers

def orthogonalize(update):
    """
    Newton-Schulz iteration (K. Jordan 2024): matrices (n, rows, cols) -> nearly orthogonal ones.
    Five iterations of a quintic polynomial push all singular values towards 1.
    """
    tall = update.shape[1] > update.shape[2]
    x = update.mT if tall else update
    # most CPUs would emulate bf16, far slower than fp32
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
    ours: Muon (K. Jordan 2024), orthogonalized momentum: a small network needs far fewer
    iterations. The update of torch.optim.Muon without weight decay, for all matrices of a shape at
    once, and in fp32 where there is no bf16.
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
                # Nesterov momentum
                gradients = [p.grad for p in params]
                averages = [self.average_of(p) for p in params]
                torch._foreach_lerp_(averages, gradients, 1 - group['momentum'])
                updates = torch._foreach_lerp(gradients, averages, group['momentum'])
                updates = orthogonalize(torch.stack(updates))
                scale = group['lr'] * max(1, rows / cols) ** 0.5
                # contiguous, so that all are added by one kernel
                updates = list(updates.float().contiguous())
                torch._foreach_add_(params, updates, alpha=-scale)

    def average_of(self, p):
        """The running average of p's gradient."""
        if 'momentum' not in self.state[p]:
            self.state[p]['momentum'] = torch.zeros_like(p)
        return self.state[p]['momentum']


def make_optimizers(model, o):
    """AdamW, and with --optimizer muon Muon for the matrices inside the blocks."""
    matrices = []
    rest = []
    for name, p in model.named_parameters():
        inside = re.search(r'blocks.*(qkv|out|up|down)\.weight', name)
        if not p.requires_grad:
            continue
        if o.optimizer == 'muon' and inside:
            matrices.append(p)
        else:
            rest.append(p)
    optimizers = [torch.optim.AdamW(rest, lr=o.lr, betas=(0.9, o.beta2), weight_decay=0.0,
                                    fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, lr=o.muon_lr))
    return optimizers


def learning_rate_factor(it, iters, o):
    """Linear warm-up, then constant, then linear to 0 over the last fraction --decay of a run."""
    factor = 1.0
    if o.warmup:
        factor = min(factor, (it + 1) / o.warmup)
    # while iters is not known yet, the end is far
    if o.decay and iters:
        factor = min(factor, (iters - it) / (o.decay * iters))
    return factor


def update(model, ema, optimizers, it, factor, o):
    """All-reduce and clip gradients, step the optimizers, update the EMA: the gradient's norm."""
    all_reduce([p.grad for p in model.parameters() if p.grad is not None])
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip or math.inf)
    for optimizer in optimizers:
        # this run's rates, also when it continues from a checkpoint
        for group in optimizer.param_groups:
            group['lr'] = optimizer.defaults['lr'] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    # a ramp lets the average forget the random start: 0.1, 0.18, ..., o.ema
    decay = min(o.ema, (1 + it) / (10 + it))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
    return norm


# -----------------------------------------------------------------------------
# What a run writes: log and checkpoint

class Log:
    """Progress lines by the clock on the terminal, records by iteration in <out>/log.jsonl."""

    def __init__(self, out, start, tokens, seconds_left, seconds=0.0):
        self.start = start
        self.tokens = tokens  # per iteration
        self.seconds_left = seconds_left  # see Objective
        self.seconds = seconds  # before a stop
        self.began = time.perf_counter()
        self.next_line = 5.0  # seconds; then one every ten
        self.file = open_log(out, start)

    def now(self):
        """Seconds since this process began to train."""
        return time.perf_counter() - self.began

    def trained(self):
        """Seconds of training, those before a stop included."""
        return self.seconds + self.now()

    def record(self, it, iters, **values):
        """A line in log.jsonl and on the terminal."""
        # on a full disk the next save says so
        if self.file is not None:
            line = json.dumps({'iter': it, 'seconds': round(self.trained(), 2), **values})
            with suppress(OSError):
                self.file.write(line.encode() + b'\n')
        self.print_line(it, iters, values)

    def progress(self, it, iters, loss):
        """A line on the terminal if it is due; loss() is a tensor, asked for only then."""
        if self.now() >= self.next_line:
            self.print_line(it, iters, {'loss': loss().item()})

    def print_line(self, it, iters, values):
        seconds = self.now()
        self.next_line = seconds + 10
        done = max(1, it - self.start)
        speed = done * self.tokens / max(seconds, 1e-9)
        left = ''
        if iters is not None:
            more = self.seconds_left(self.start, it, iters, seconds)
            left = f', {timedelta(seconds=int(more))} left'
        parts = [f'{name} {x:.4g}' if isinstance(x, float) else f'{name} {x}'
                 for name, x in values.items()]
        text = '  '.join(parts)
        say(f'{it:6d}/{iters or "?"}  {text}  {speed:,.0f} tokens/s{left}')


def open_log(out, start):
    """<out>/log.jsonl, locked against a second run, without records after iteration `start`."""
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
    except BlockingIOError:
        fail(f'{out}: another run writes there; wait for it, or name another folder by --out')
    # records that a killed run wrote after its last save will come again
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
    """Keep a second run out, by a BlockingIOError; some systems, as Windows, have no such lock."""
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except OSError as error:
        # a file system without locks has another error
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError from error


class Means:
    """Means of what was seen since the last record: by name, sums and their counts."""

    def __init__(self, sums=None, device='cpu'):
        self.sums = {name: pair.to(device) for name, pair in (sums or {}).items()}

    def add(self, seen):
        for name, pair in seen.items():
            self.sums[name] = self.sums.get(name, 0) + pair

    def collect(self, rank):
        """The first process gets the sums over all processes; the others start again."""
        all_reduce(list(self.sums.values()))
        if rank > 0:
            self.sums = {name: torch.zeros_like(pair) for name, pair in self.sums.items()}

    def loss(self):
        return self.sums['loss'][0] / self.sums['loss'][1]

    def record(self):
        """For log.jsonl: a number each, or a list."""
        means = {}
        for name, (total, count) in self.sums.items():
            mean = (total / count).tolist()
            means[name] = [round(x, 3) for x in mean] if total.ndim else mean
        return means

    def check(self, it, out):
        """End the run if any loss or gradient was not finite."""
        if not all(pair.isfinite().all() for pair in self.sums.values()):
            fail(f'loss or gradient not finite by iteration {it}; {out} keeps the last save; start '
                 'again with lower learning rates')


def sum_and_count(x, kind=None, kinds=1):
    """What Means needs of values x (n,): (2,), or by their kind (n,), an integer: (2, kinds)."""
    # sums in float64 are exact enough to be the same in any number of processes
    dtype = torch.float32 if x.device.type == 'mps' else torch.float64
    both = torch.stack([x.detach().to(dtype), torch.ones_like(x, dtype=dtype)])
    if kind is None:
        return both.sum(1)
    return both.new_zeros(2, kinds).index_add_(1, kind, both)


# options that may differ when a run continues: how far, where, how it is computed
FREE = {'data', 'out', 'teacher', 'reference', 'preset', 'iters', 'minutes', 'evals',
        'micro_batches', 'resume', 'overwrite', 'device', 'compile'}


def difference(a, b, fields):
    """The first of these fields that differs between two descriptions of data, as a sentence."""
    what = {
        'tokenizer': 'another tokenizer',
        'length': f'rows of {b["length"]} tokens, not {a["length"]}',
        'kind': f'{b["kind"]}, not {a["kind"]}',
        'pairs': 'pairs' if b['pairs'] else 'no pairs',
        'crc': f'other data than {a["name"]}',
    }
    for field in fields:
        if a[field] != b[field]:
            return what[field]
    return ''


def other_run(ckpt, options, run):
    """How a checkpoint's run differs from this one, as a sentence; '' if it does not."""
    for name, parent in run.parents.items():
        if ckpt['parents'].get(name, {}).get('crc') != parent['crc']:
            return f'it has another {name}'
    for name, value in vars(options).items():
        old = ckpt['options'].get(name)
        if name not in FREE and old != value:
            return f'{as_flag(name)} was {old}, now {value}'
    changed = difference(ckpt['meta'], run.meta, ('tokenizer', 'crc'))
    if changed:
        return f'the data differ: {changed}'
    return ''


def check_out(run, options):
    """
    Look at what <out> holds before anything is written -> checkpoint to continue from, or None.
    A finished model is not replaced unless asked to; a run continues only as what it was, and with
    the models that it learns from.
    """
    path = run.out / 'model.pt'
    # os.path.exists is False where Path's own would raise, such as for names that are too long
    there = os.path.exists(path)
    if not options.resume and (options.overwrite or not there):
        return None
    if not there:
        fail(f'--resume: nothing was saved in {run.out} yet; leave out --resume')
    _, ckpt = load(path)
    if 'optimizers' not in ckpt:
        reason = 'it holds only weights'
    else:
        reason = other_run(ckpt, options, run)
    if not options.resume:
        # only the run that it was can continue
        resume = '' if reason else '--resume continues it, '
        fail(f'{path} holds a model of {ckpt["iter"]} iterations; {resume}'
             '--overwrite replaces it, --out writes elsewhere')
    if reason:
        fail(f'--resume: {path} is of another run: {reason}; give what it had, or start again '
             'with --overwrite in place of --resume')
    iters = options.iters or ckpt['iters']
    if iters and ckpt['iter'] >= iters:
        fail(f'--resume: {path} has {ckpt["iter"]} iterations already; ask for more by --iters, '
             'and the rates will be those of the longer run')
    return ckpt


def restore(ckpt, modules, optimizers):
    """Load a checkpoint into all that trains: modules by name, optimizers in order."""
    try:
        for name, module in modules.items():
            module.load_state_dict(ckpt[name])
        for optimizer, state in zip(optimizers, ckpt['optimizers'], strict=True):
            optimizer.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError):
        fail('--resume: the checkpoint is of another shape; start again with --overwrite '
             'in place of --resume')


# -----------------------------------------------------------------------------
# The training loop

@dataclass
class Run:
    """Where a run computes, what it reads and where it writes; all checked before it begins."""
    rank: int
    world: int
    device: torch.device
    data: Path
    meta: dict              # of the data
    train: np.ndarray       # ids
    val: np.ndarray
    out: Path
    micro_batches: int      # of all processes together
    parents: dict           # {name: path and crc} of the models that it learns from
    ckpt: dict = None       # to continue from


class Objective:
    """
    What a run minimizes, and all that `train` knows of a method: a teacher's loss below, those of
    distill.py. `optimizers` are stepped by train; `own_optimizers`, if any, by the objective.
    """
    own_optimizers = ()

    def modules(self):
        """What is saved beside the model and its average, by name."""
        return {}

    def times(self, n, cpu):
        """What is drawn for each of a batch's n rows beside tokens and noise: tensors (n, ...)."""
        return []

    def __call__(self, tokens, given, times, rng):
        """Loss, a mean over these rows (B, L), and what to log of it: {name: see sum_and_count}."""
        raise NotImplementedError

    def resume(self, start, run, o):
        """Called once, before iteration `start`: restore what is in no checkpoint."""

    def before(self, it, iters, ema, batch):
        """Called before each iteration; iters is None while it is not known."""

    def iters_in(self, seconds, per_iter):
        """How many more iterations so many seconds hold, at the speed of the first ones."""
        return int(seconds / per_iter)

    def seconds_left(self, start, it, iters, seconds):
        """For the iterations from `it` on, if those since `start` took so many seconds."""
        return seconds / max(1, it - start) * (iters - it)

    def measure(self, ema, run, it, iters, log):
        """Called a few times per run: measure the averaged weights, and log it."""


class TeacherLoss(Objective):
    """A model's own loss, on data."""

    def __init__(self, model, o):
        self.model = model
        self.optimizers = make_optimizers(model, o)

    def times(self, n, cpu):
        return [stratified(torch.rand(1, generator=cpu), n)]

    def __call__(self, tokens, given, times, rng):
        tau = times[0].to(tokens.device)
        losses = self.model.loss(tokens, given, tau, rng)
        # losses in eight bins of tau show where the model is still learning
        bins = sum_and_count(losses, (tau * 8).long(), 8)
        return losses.mean(), {'bins': bins}

    def before(self, it, iters, ema, batch):
        """Let tau follow what was learned, in the first half of a run."""
        config = self.model.config
        if config.model != 'flm' or config.reparam not in ('root', 'loss'):
            return
        if it % 100 == 0 and it > 0 and (iters is None or 2 * it <= iters):
            tokens, given, _ = batch
            with autocast(tokens.device):
                taus = self.model.refit_reparam(tokens[:16], given[:16], seed=it)
            ema.taus.copy_(taus)

    def measure(self, ema, run, it, iters, log):
        log.record(it, iters, val=validate(ema, run.val, run.meta, run.device))


@torch.no_grad()
def validate(model, ids, meta, device, batches=4):
    """Mean loss on fixed validation rows and noise at fixed tau: the same ones in every run."""
    losses = []
    for i in range(batches):
        cpu = generator('cpu', 1234, i, 0)
        tokens, given = get_batch(ids, meta, 64, 0.0, cpu, device)
        tau = stratified(torch.rand(1, generator=cpu), 64).to(device)
        with autocast(device):
            losses.append(model.loss(tokens, given, tau, generator(device, 1234, i, 1)))
    return torch.cat(losses).mean().item()


def batch_of(it, objective, run, o):
    """What iteration `it` learns from: tokens and given (B, L), and times for each row."""
    cpu = generator('cpu', o.seed, it, 0)
    tokens, given = get_batch(run.train, run.meta, o.batch, o.given, cpu, run.device)
    return tokens, given, objective.times(o.batch, cpu)


def micro_batches(it, batch, run, o):
    """
    This process's parts of a batch: tokens, given, times, and the generator of their noise. Part i
    of n has rows i, i + n, i + 2n, ..., so that all times and kinds of rows are in each; one
    process with n parts trains as n processes do.
    """
    tokens, given, times = batch
    for part in range(run.rank, run.micro_batches, run.world):
        rng = generator(run.device, o.seed, it, 1 + part)
        # dropout draws from the global generator
        torch.manual_seed(rng.initial_seed())
        rows = slice(part, None, run.micro_batches)
        yield tokens[rows], given[rows], [x[rows] for x in times], rng


def backward(objective, trained, it, batch, run, o, means):
    """Loss and gradients of this process's parts of a batch."""
    for *part, rng in micro_batches(it, batch, run, o):
        with autocast(run.device):
            loss, seen = objective(*part, rng)
        # only into what `train` updates: an objective may hold other networks
        (loss / run.micro_batches).backward(inputs=trained)
        means.add({'loss': sum_and_count(loss[None]), **seen})


class Clock:
    """Turns --minutes into a number of iterations, by the speed of the first ones."""

    def __init__(self, minutes, start, device):
        self.seconds = 60 * (minutes or 0)
        self.start = start
        self.device = device
        self.began = time.perf_counter()
        self.warm = None  # when the first iterations, which may compile, were over

    def iters(self, it, objective):
        """The number of iterations of this run, of which `it` are done; None until it is known."""
        if self.device.type != 'cpu':
            torch.accelerator.synchronize()
        now = time.perf_counter()
        done = it - self.start
        if done == 5:
            self.warm = now
        iters = 0
        # of twenty iterations after five; of fewer where these are a good part of the run
        if done > 5 and (done == 25 or now - self.warm > 0.1 * self.seconds):
            # measurements and saves take some of the time, too
            left = 0.95 * self.seconds - (now - self.began)
            per_iter = (now - self.warm) / (done - 5)
            iters = it + max(1, objective.iters_in(left, per_iter))
        # the first process decides for all
        agreed = torch.tensor(iters if int(os.environ.get('RANK', 0)) == 0 else 0)
        all_reduce([agreed])
        return agreed.item() or None


def train(run, model, objective, o):
    """Minimize an objective from where the run stands -> whether it reached its end."""
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    modules = {'model': model, 'ema': ema, **objective.modules()}
    optimizers = [*objective.optimizers, *objective.own_optimizers]
    trained = [p for p in model.parameters() if p.requires_grad]
    start = 0
    seconds = 0.0
    iters = o.iters
    means = Means()
    if run.ckpt is not None:
        restore(run.ckpt, modules, optimizers)
        start = run.ckpt['iter']
        iters = o.iters or run.ckpt['iters']
        means = Means(run.ckpt['means'] if run.rank == 0 else None, run.device)
        seconds = run.ckpt['seconds']
    objective.resume(start, run, o)
    log = Log(run.out, start, o.batch * run.meta['length'], objective.seconds_left, seconds)
    stopper = Stopper()
    clock = Clock(o.minutes, start, run.device)

    for it in itertools.count(start):
        # --minutes: known only after the first iterations, and fixed then
        iters = iters or clock.iters(it, objective)
        stop = it == iters or stopper.asked()
        due = iters is not None and it % math.ceil(iters / o.evals) == 0 and it > start
        log_due = it % 100 == 0 and it > start

        # log
        if log_due or due or stop:
            means.collect(run.rank)
            means.check(it, run.out)
        if log_due:
            log.record(it, iters, **means.record())
            means = Means()

        # save, and only then measure
        if (due or stop) and run.rank == 0:
            save(run.out / 'model.pt', modules, iter=it, iters=iters, means=means.sums,
                 seconds=log.trained(),
                 optimizers=[optimizer.state_dict() for optimizer in optimizers],
                 meta=run.meta, data=str(run.data), options=vars(o), parents=run.parents)
        if due or it == iters:
            objective.measure(ema, run, it, iters, log)
        if stop:
            return it == iters

        # batch, forward and backward, step
        batch = batch_of(it, objective, run, o)
        objective.before(it, iters, ema, batch)
        backward(objective, trained, it, batch, run, o, means)
        factor = learning_rate_factor(it, iters, o)
        norm = update(model, ema, objective.optimizers, it, factor, o)
        means.add({'norm': sum_and_count(norm[None])})
        log.progress(it + 1, iters, means.loss)


# -----------------------------------------------------------------------------
# The script

def choose_micro_batches(o, world, meta, device, logits=True):
    """
    How many parts a batch is computed in, of all processes together: if not asked for, so many that
    the logits (rows, L, V) of each fit, where they exist at once.
    """
    parts = o.micro_batches or world
    if parts % world:
        fail(f'--micro-batches {parts}: must be a multiple of the number of processes ({world})')
    if o.batch % parts:
        fail(f'--batch {o.batch}: must be a multiple of --micro-batches ({parts}), of which each '
             'process has at least one')
    most = 2 ** 28  # bytes
    if device.type == 'cuda':
        most = torch.cuda.get_device_properties(device).total_memory / 16
    row = 4 * meta['length'] * meta['vocab']
    if o.micro_batches == 0 and logits:
        while o.batch / parts * row > most and o.batch % (2 * parts) == 0:
            parts *= 2
    return parts


def compile_on_gpu(o, device, models):
    """torch.compile of the networks of models, each as one unit and in place."""
    for model in models:
        if o.compile and device.type == 'cuda':
            # there are few shapes, and fixed ones are faster
            model.net.compile(dynamic=False)


def first_line(machine, what, run, o):
    """What a run is, before it begins."""
    amount = f'{o.iters:,} iterations' if o.iters else f'{o.minutes:g} minutes'
    say(f'{machine} preset: {what}, {amount} of {o.batch} rows, {run.world} x {run.device}; '
        f'data {run.data} -> {run.out}')


def last_lines(run, complete, command):
    """Where a run's files are, and what to run next."""
    say(f'wrote {run.out}/model.pt and {run.out}/log.jsonl')
    if complete:
        say(f'next: {as_command(*command)}')
    else:
        say('stopped; the same command with --resume continues')


def sample_command(out, meta, val):
    """A script and its words, which sample from a model: one of pairs needs a source."""
    words = ['sample.py', str(out)]
    if meta['pairs']:
        rows = as_rows(val[:100 * meta['length']], meta['length'])
        # a command line holds no line breaks, and may begin with a dash only after a =
        sources = [source for source, _ in to_texts(rows, meta) if source.isprintable()]
        words += [f'--source={source}' for source in sources[:1]]
    return words


def main(o):
    rank, world, device = start_processes(o.device)
    data = Path(o.data) if o.data else newest_dataset()
    meta, train_ids, val_ids = load_dataset(data)

    # settings
    refuse_unused(o, ONLY_FOR, o.model, f'--model {o.model}')
    machine = o.preset or default_machine(device)
    fill_in(o, preset(machine, o.model, is_stories(meta)))
    if o.width % (2 * o.heads):
        fail(f'--width {o.width}: must be a multiple of twice --heads ({o.heads})')
    if o.network == 'paper' and o.channels != o.width:
        fail(f'--channels {o.channels}: the paper\'s network has as many as --width ({o.width})')

    # where it writes, and what is there
    name = meta['name'] if o.model == 'flm' else f'{meta["name"]}-{o.model}'
    out = Path(o.out or f'out/{name}/teacher')
    # on a CPU a teacher's logits are computed in chunks, see model.cross_entropy
    parts = choose_micro_batches(o, world, meta, device, logits=device.type != 'cpu')
    run = Run(rank, world, device, data, meta, train_ids, val_ids, out, parts, parents={})
    run.ckpt = check_out(run, o)

    # the model
    torch.manual_seed(o.seed)
    names = {field.name for field in fields(Config)}
    shape = {name: value for name, value in vars(o).items() if name in names}
    model = build(Config(vocab=meta['vocab'], length=meta['length'], **shape)).to(device)
    compile_on_gpu(o, device, [model])
    size = sum(p.numel() for p in model.parameters()) / 1e6
    first_line(machine, f'{o.model} of {size:.2f}M parameters', run, o)
    complete = train(run, model, TeacherLoss(model, o), o)
    if o.model in ('flm', 'diffuseq'):
        last_lines(run, complete, ['distill.py', str(out)])
    else:
        last_lines(run, complete, sample_command(out, meta, val_ids))


if __name__ == '__main__':
    options = parse()
    run_script(lambda: main(options))
