"""
Distill a teacher into a student that writes in one network call.

    python distill.py                                   # the newest teacher
    python distill.py out/dates-diffuseq/teacher        # a teacher trained with --model diffuseq
    python distill.py out/dates-diffuseq/teacher --reference out/dates-diffuseq/student   # refined

A flow's student is the teacher plus a second time: it learns delta_{s,t}, the text to aim at in one
jump from time s to a later t; delta_{0,1} turns noise into text (FMLM, arXiv:2602.16813). A
diffusion's student is a generator trained by score distillation (DLM-One, arXiv:2506.00290).
The baseline mdlm is distilled, too, for comparison: SDTT, arXiv:2410.21035.
Writes <out>/model.pt and <out>/log.jsonl. The training loop is that of train_teacher.py.

As everywhere, times run from noise (0) to data (1), and `given` (B, L) holds the ids of known
tokens, -1 where text is generated. The s, u and t of a flow's jump are reparameterized times tau,
one for each row; flow.token_t turns one into the t of the formulas, for each token. D_t is the
teacher's prediction at t, and delta_{t,t} = D_t. E is the embedding table, which both networks
share.
"""

import argparse
import copy
import math
import statistics
import time
import zlib
from dataclasses import replace
from pathlib import Path

# before torch, which takes seconds to load: Ctrl-C is one line from here on
from prepare_data import (Parser, as_command, fail, fraction, is_stories, load_dataset,
                          nonnegative, nonnegative_int, number, positive_int, run_script,
                          sanity_metrics, say)

import torch
import torch.nn.functional as F

from model import (EMBEDDING_NOISE, autocast, build, checkpoint_path, draw, generator, load,
                   mask_specials, newest_checkpoint, row_mean, sample_rows, semigroup_weight,
                   token_weights)
from train_teacher import (Objective, Run, add_training_options, all_reduce, batch_of, check_out,
                           choose_micro_batches, compile_on_gpu, default_machine, difference,
                           fill_in, first_line, get_batch, last_lines, make_optimizers,
                           micro_batches, preset_adder, refuse_unused, sample_command,
                           start_processes, stratified, sum_and_count, train)

# -----------------------------------------------------------------------------
# Options

# ours, for minutes on a CPU: cached trajectories of the teacher, quantized noise, more rows at
# (0, 1), higher rates
LAPTOP = dict(
    method='rollout', rollout=8, reuse=5, top_k=32, noise_levels=3, substep=0.1, diagonal=0.125,
    boundary=0.85, loss='sid', alpha=1.0, fake_updates=2, adversarial=0.0, shared_noise=True,
    candidates=3, given=0.15, dropout=0.0, minutes=15, iters=None, batch=64, optimizer='muon',
    lr=2e-3, muon_lr=0.01, beta2=0.99, clip=1.0, warmup=50, decay=0.6, ema=0.999, evals=2)

GPU = dict(rollout=16, minutes=10, batch=512, evals=4)

# FMLM, arXiv:2602.16813
PAPER = {
    **LAPTOP, 'method': 'semigroup', 'reuse': 0, 'noise_levels': 0, 'diagonal': 0.5,
    'boundary': 1 / 32, 'given': 0.0, 'dropout': 0.1, 'fake_updates': 1, 'shared_noise': False,
    'minutes': None, 'iters': 100_000, 'batch': 512, 'optimizer': 'adamw', 'lr': 3e-4,
    'beta2': 0.95, 'warmup': 2500, 'decay': 0.0, 'ema': 0.9999, 'evals': 20}

# what differs for the data set `stories`, and by the kind of student
STORIES = dict(rollout=16, noise_levels=6, minutes=4)
BY_METHOD = {
    'flow map': {},
    # Adam, whatever `optimizer` and `beta2` say, see adam; it goes on improving for long
    'score': dict(lr=1e-4, minutes=30),
    'refine': {},
    'masked': dict(given=0.0, rounds=4, final_calls=4),
}
PAPER_BY_METHOD = {
    'flow map': {},
    # SiD, arXiv:2404.04057, with a teacher of DiffuSeq's; DLM-One's iterations are not known
    'score': dict(dropout=0.0, iters=50_000, lr=1e-5, clip=0.0, warmup=0),
    'refine': {},
    # SDTT, arXiv:2410.21035: seven rounds, from 1024 calls to 8
    'masked': dict(iters=70_000, batch=128, lr=6e-5, beta2=0.999, warmup=500, rounds=7,
                   final_calls=8),
}


def preset(machine, method, stories):
    """The settings for a machine and a kind of student, see train_teacher.preset."""
    if machine == 'paper':
        return {**PAPER, **PAPER_BY_METHOD[method]}
    of_data = STORIES if stories else {}
    of_machine = GPU if machine == 'gpu' else {}
    return {**LAPTOP, **of_data, **of_machine, **BY_METHOD[method]}


# the kinds of student that an option is for, where it is not for all
ONLY_FOR = {
    'method': ['flow map'],
    'diagonal': ['flow map'],
    'boundary': ['flow map'],
    'substep': ['flow map'],
    'rollout': ['flow map'],
    'reuse': ['flow map'],
    'top_k': ['flow map'],
    'noise_levels': ['flow map'],
    'loss': ['score'],
    'alpha': ['score'],
    'fake_updates': ['score'],
    'adversarial': ['score'],
    'shared_noise': ['score'],
    'rounds': ['masked'],
    'final_calls': ['masked'],
    'candidates': ['refine'],
    # score distillation has optimizers of its own
    'optimizer': ['flow map', 'masked', 'refine'],
    'muon_lr': ['flow map', 'masked', 'refine'],
    'beta2': ['flow map', 'masked', 'refine'],
}
# likewise, the methods of a flow map
ONLY_FOR_METHOD = {
    'rollout': ['rollout'],
    'reuse': ['rollout'],
    'top_k': ['rollout'],
    'substep': ['lagrangian', 'eulerian'],
}


def parse(argv=None):
    """The options of a command line; what is not given is None, see fill_in."""
    parser = Parser(description=__doc__)
    add = preset_adder(parser, laptop=LAPTOP, gpu=GPU, paper=PAPER)
    # what and where
    add('teacher', nargs='?', default='',
        help='folder or .pt file of the teacher; default: the newest in out/')
    add('--out', default='', help='folder to write to; default: student, beside the teacher')
    add('--data', default='', help="folder made by prepare_data.py; default: the teacher's")
    # flow map
    add('--method', choices=['semigroup', 'lagrangian', 'eulerian', 'rollout'],
        help='flow: where the targets of a jump come from')
    add('--diagonal', type=fraction, help='flow: fraction of rows at s = t')
    add('--boundary', type=fraction, help='flow: of the others, fraction at (s, t) = (0, 1)')
    add('--substep', type=number(float, 0.001, 1),
        help="flow: length of the teacher's sub-step, relative to t - s (lagrangian, eulerian)")
    add('--rollout', type=positive_int, help="rollout: network calls of the teacher's trajectory")
    add('--reuse', type=nonnegative_int,
        help='rollout: how often a target is learned on average; 0: once, without a cache')
    add('--top-k', type=number(int, 2, 100_000),
        help='rollout: tokens that a cached target keeps of each p')
    add('--noise-levels', type=number(int, 0, 1000),
        help='flow: quantization levels of the noise; 0: not quantized')
    # score distillation
    add('--loss', choices=['sid', 'dmd'], help='diffusion: which gradient')
    add('--alpha', type=nonnegative, help='sid: quality against diversity, 0.5 to 1.2')
    add('--fake-updates', type=positive_int,
        help='diffusion: updates of the fake score network for each of the student')
    add('--adversarial', type=nonnegative,
        help="diffusion: weight of the discriminator, in SiDA's second run")
    add('--shared-noise', action=argparse.BooleanOptionalAction,
        help='diffusion: all positions of a row start from the same noise')
    # masked diffusion
    add('--rounds', type=positive_int, help='mdlm: how often the student becomes the teacher')
    add('--final-calls', type=positive_int, help='mdlm: network calls the last round is for')
    # refining
    add('--reference', default='',
        help="a diffusion's student, which is frozen: a copy of it is refined")
    add('--candidates', type=positive_int,
        help='--reference: noise samples per row; the least confident one is trained on')
    add_training_options(add)
    return parser.parse_args(argv)


# -----------------------------------------------------------------------------
# What all students share

class Distillation(Objective):
    """The objective of a student: measured by the texts that it writes in few calls."""
    logits = True   # whether its targets are (B, L, V)

    def measure(self, ema, run, it, iters, log):
        cpu = torch.device('cpu')
        _, given = get_batch(run.val, run.meta, 200, 0.0, generator(cpu, 1, 1), cpu)
        for nfe in (4, 2, 1):
            rows, _ = sample_rows(ema, given, nfe, seed=1)
            log.record(it, iters, nfe=nfe, **sanity_metrics(rows, run.meta, str(run.data)))


# -----------------------------------------------------------------------------
# Part 1. FMLM: the flow map, from the teacher at s = t and from shorter jumps elsewhere

def time_pairs(n, diagonal, boundary, consistency, cpu):
    """
    s <= t for n rows, each (n,), and the kind of each row (n,): 0 for s = t, 1 for (0, 1), 2 for
    other jumps, in this order. Rows are counted before a batch is split into micro-batches, so the
    method does not depend on their number. arXiv:2602.16813.
    """
    uniform = torch.rand(2, n, generator=cpu)
    if consistency:
        # ours: all jumps end at t = 1, as those of a sampler with gamma = 1 do (arXiv:2303.01469)
        s = uniform[1]
        t = torch.ones(n)
    else:
        # t - s ~ U(0, 1), then s ~ U(0, 1 - (t - s))
        s = uniform[1] * (1 - uniform[0])
        t = s + uniform[0]
    kind = torch.full((n,), 2)

    # s = t, stratified
    on_diagonal = round(n * diagonal)
    s[:on_diagonal] = stratified(uniform[0, 0], on_diagonal)
    t[:on_diagonal] = s[:on_diagonal]
    kind[:on_diagonal] = 0

    # all the way in one jump, at least one row if any are wanted
    if boundary > 0:
        asked = max(1, round((n - on_diagonal) * boundary))
        all_the_way = slice(on_diagonal, min(n, on_diagonal + asked))
        s[all_the_way] = 0
        t[all_the_way] = 1
        kind[all_the_way] = 1
    return s, t, kind


def two_steps(flow, first, second, given, s, u, t):
    """delta_{s,t} from the predictions of its sub-steps s -> u and u -> t: (B, L, V)."""
    # in the t of the formulas, for each token
    g = semigroup_weight(*[flow.token_t(tau, given) for tau in (s, u, t)])
    return g * first + (1 - g) * second


def semigroup_target(student, teacher, h, given, s, t, o):
    """delta_{s,t}(h) by two jumps of the student itself, u half way: arXiv:2602.16813, PSD."""
    u = s + 0.5 * (t - s)
    first = student.predict(h, given, s, u).softmax(-1)
    h_u = student.jump(h, first, given, s, u)
    second = student.predict(h_u, given, u, t).softmax(-1)
    return two_steps(student, first, second, given, s, u, t)


def lagrangian_target(student, teacher, h, given, s, t, o):
    """
    delta_{s,t}(h) by a jump of the student to u close to t, and a sub-step of the teacher from
    there, delta_{u,t} ~ D_u: the Lagrangian equation of arXiv:2602.16813 in finite differences,
    without derivatives and always in the simplex.
    """
    u = t - o.substep * (t - s)
    first = student.predict(h, given, s, u).softmax(-1)
    h_u = student.jump(h, first, given, s, u)
    second = teacher.predict(h_u, given, u).softmax(-1)
    return two_steps(student, first, second, given, s, u, t)


def eulerian_target(student, teacher, h, given, s, t, o):
    """
    delta_{s,t}(h) by a sub-step of the teacher to u close to s, delta_{s,u} ~ D_s, and a jump of
    the student from there: the Eulerian equation of arXiv:2602.16813 (consistency), likewise.
    """
    u = s + o.substep * (t - s)
    first = teacher.predict(h, given, s).softmax(-1)
    h_u = student.jump(h, first, given, s, u)
    second = student.predict(h_u, given, u, t).softmax(-1)
    return two_steps(student, first, second, given, s, u, t)


def rollout_target(student, teacher, h, given, s, t, o):
    """
    ours: delta_{s,1}(h), where the teacher's trajectory ends, in o.rollout steps from s to t = 1:
    (B, L, V). A student trained on jumps of its own may drift away from its teacher; this one
    cannot. A step aims at the prediction extrapolated to its end, not at that of its start:
    likelier texts.
    """
    # with stagger the first steps decide what the text is about: shorter ones keep it diverse
    power = 1.5 if teacher.config.stagger > 0 else 1.0
    ends = [(i / o.rollout) ** power for i in range(o.rollout + 1)]
    before = None
    for i in range(o.rollout):
        now = s + (t - s) * ends[i]
        then = s + (t - s) * ends[i + 1]
        p = teacher.predict(h, given, now).softmax(-1)
        aim = p
        if before is not None:
            # to the middle of the step it would be Adams-Bashforth, whose texts are less likely
            longer = (ends[i + 1] - ends[i]) / (ends[i] - ends[i - 1])
            aim = p + longer * (p - before)
        before = p
        h = student.jump(h, aim, given, now, then)
    # extrapolation may leave the simplex
    aim = aim.clamp(min=0)
    return aim / aim.sum(-1, keepdim=True)


def top_k(p, k):
    """The k likeliest tokens of p (B, L, V), in 16 bits, and their p: (B, L, k) each."""
    p, ids = p.topk(min(k, p.shape[-1]))
    return ids.to(torch.int16), p.half()


class TargetCache:
    """
    ours: jumps with the teacher's targets, kept to be learned several times: a target costs
    --rollout calls of the teacher, training on it about three. Distillation from stored
    teacher trajectories was first done for images: arXiv:2101.02388.
    """

    def __init__(self):
        self.size = 0
        self.kept = []  # tensors (room, ...)

    def make_room(self, rows, jumps):
        """Have room for so many rows of tensors like these, jumps, in all."""
        if not self.kept:
            self.kept = [x[:0] for x in jumps]
        missing = rows - len(self.kept[0])
        if missing > 0:
            self.kept = [torch.cat([x, x.new_empty(missing, *x.shape[1:])]) for x in self.kept]

    def add(self, jumps):
        """Keep some jumps, each a row of several tensors."""
        end = self.size + len(jumps[0])
        for kept, x in zip(self.kept, jumps):
            kept[self.size:end] = x
        self.size = end

    def draw(self, n, rng):
        """n of those kept, at random."""
        rows = torch.randint(self.size, (n,), generator=rng, device=self.kept[0].device)
        return [x[rows] for x in self.kept]


class FlowMap(Distillation):
    """Cross-entropy of a flow's student with the target of each jump."""

    def __init__(self, student, teacher, reference, o):
        self.student = student
        self.teacher = teacher
        self.o = o
        self.optimizers = make_optimizers(student, o)
        targets = {'semigroup': semigroup_target, 'lagrangian': lagrangian_target,
                   'eulerian': eulerian_target, 'rollout': rollout_target}
        self.target = targets[o.method]
        self.cached = o.method == 'rollout' and o.reuse > 0
        # one for each micro-batch, so that the method does not depend on the number of processes
        self.caches = {}
        self.makes = None   # the iterations that make targets, once it is known how many
        self.filling = True
        self.seconds = []   # that the latest targets took

    @staticmethod
    def student_config(config, o):
        return replace(config, dropout=o.dropout, calls=1, noise_levels=o.noise_levels,
                       consistency=o.method == 'rollout')

    def times(self, n, cpu):
        """s, t and kind of each row, and its place in the batch: (n,) each."""
        consistency = self.student.config.consistency
        pairs = time_pairs(n, self.o.diagonal, self.o.boundary, consistency, cpu)
        return [*pairs, torch.arange(n)]

    def before(self, it, iters, ema, batch):
        # the first iterations make the targets, the others learn them again
        self.makes = iters and math.ceil(iters / max(1, self.o.reuse))
        self.filling = iters is None or it < self.makes

    def __call__(self, tokens, given, times, rng):
        h, given, s, t, kind, *target = self.examples(tokens, given, times, rng)
        if self.cached:
            ids, p = target
            # 16 bits without a sign
            target = (ids.long() % 2 ** 16, p.float())
        else:
            target = target[0]
        losses = self.student.predict(h.float(), given, s, t, target)  # (B,)
        # of rows at s = t, (0, 1) and the others
        return losses.mean(), {'kinds': sum_and_count(losses, kind, 3)}

    @torch.no_grad()
    def examples(self, tokens, given, times, rng):
        """What is to be learned: h, given, s, t, kind and target, each (B, ...)."""
        s, t, kind, place = times
        # rows come sorted by kind; counted on the CPU, so that no GPU is waited for
        on_diagonal = int((kind == 0).sum())
        s, t, kind = [x.to(tokens.device) for x in (s, t, kind)]
        rows = [self.student.q_sample(tokens, given, s, rng), given, s, t, kind]
        # at s = t the student is the teacher
        diagonal = [x[:on_diagonal] for x in rows]
        p = self.teacher.predict(*diagonal[:3]).softmax(-1)
        diagonal.extend(self.kept_form(p))
        jumps = [x[on_diagonal:] for x in rows]
        if len(jumps[0]) == 0:
            return diagonal
        if self.cached:
            cache = self.caches.setdefault(int(place[0]), TargetCache())
            jumps = self.through_cache(jumps, cache, rng)
        else:
            jumps.append(self.targets(jumps))
        return [torch.cat([a, b.to(a.dtype)]) for a, b in zip(diagonal, jumps)]

    def kept_form(self, p):
        """Probabilities as they are learned: the top k where targets are cached, else all."""
        return top_k(p, self.o.top_k) if self.cached else [p]

    def targets(self, jumps):
        """The targets (n, L, V) of jumps: h, given, s, t, kind."""
        h, given, s, t, _ = jumps
        return self.target(self.student, self.teacher, h, given, s, t, self.o)

    def through_cache(self, jumps, cache, rng):
        """
        While the cache is being filled, the jumps get their targets and are stored in it; what is
        learned is drawn from it at random.
        """
        n = len(jumps[0])
        if self.filling:
            start = clock(jumps[0].device)
            # half precision is enough for noise and probabilities
            h, *others = jumps
            jumps = [h.half(), *others, *top_k(self.targets(jumps), self.o.top_k)]
            self.seconds.append(clock(jumps[0].device) - start)
            cache.make_room(max(cache.size + n, (self.makes or 0) * n), jumps)
            cache.add(jumps)
        else:
            # before --minutes had become iterations, more may have been made
            cache.size = min(cache.size, self.makes * n)
        return cache.draw(n, rng)

    def iters_in(self, seconds, per_iter):
        if not self.seconds:
            return super().iters_in(seconds, per_iter)
        making = self.making()
        learning = self.learning(per_iter, 1, 1)
        # of all iterations one in `reuse` makes targets, and those so far are among them
        made = len(self.seconds) / len(self.caches)
        more = (seconds + made * per_iter) / (learning + making / self.o.reuse) - made
        # if they suffice already, the others only learn
        return int(min(more, seconds / learning))

    def making(self):
        """Seconds that the targets of a batch take."""
        return statistics.median(self.seconds[-20:]) * len(self.caches)

    def learning(self, seconds, done, made):
        """Seconds of an iteration without targets, where `made` of those done made some."""
        # never none, however uneven the machine
        return max(seconds - self.making() * made, 0.05 * seconds) / done

    def seconds_left(self, start, it, iters, seconds):
        if not self.makes or not self.seconds or it <= start:
            return super().seconds_left(start, it, iters, seconds)
        # only the first iterations of a run make targets
        made = min(it, self.makes)
        learning = self.learning(seconds, it - start, max(0, made - start))
        return learning * (iters - it) + self.making() * (self.makes - made)

    def resume(self, start, run, o):
        """Make the cached targets of a run that continues again: they are in no checkpoint."""
        iters = o.iters or (run.ckpt and run.ckpt['iters'])
        if not self.cached or start == 0:
            return
        if iters:
            start = min(start, math.ceil(iters / o.reuse))
        told = time.time()
        for it in range(start):
            self.before(it, iters, None, None)
            for *part, rng in micro_batches(it, batch_of(it, self, run, o), run, o):
                with autocast(run.device):
                    self.examples(*part, rng)
            if time.time() - told > 5:
                told = time.time()
                say(f'making the cached targets again: {it + 1} of {start} batches')


def clock(device):
    """Seconds, once the device has done what it was asked to."""
    if device.type != 'cpu':
        torch.accelerator.synchronize()
    return time.perf_counter()


# -----------------------------------------------------------------------------
# Part 2. DLM-One: score distillation of a diffusion into a generator

def sid_loss(x, teacher_x, fake_x, alpha):
    """
    SiD, arXiv:2404.04057: (1 - alpha) |teacher_x - fake_x|^2 + (teacher_x - fake_x).(fake_x - x) at
    each position, from three (B, L, C) -> (B, L), with gradient through all three. x is generated;
    teacher_x and fake_x are what the teacher and the fake score network predict it was, from x_t.
    Where they agree at all noise levels, the student writes as the data do. With a perfect fake
    network its mean is (1 - alpha) E|teacher_x - fake_x|^2, 0 at alpha = 1, so it does not measure
    progress.
    """
    gap = teacher_x - fake_x
    return ((1 - alpha) * gap.square() + gap * (fake_x - x)).mean(-1)


def dmd_loss(x, teacher_x, fake_x):
    """DMD, arXiv:2311.18828: the gradient fake_x - teacher_x on x alone; shapes as in sid_loss."""
    return ((fake_x - teacher_x).detach() * x).mean(-1)


class FakeScore(torch.nn.Module):
    """
    The fake score network, a denoiser of the student's own texts; in its middle a discriminator,
    which is used with --adversarial only.
    """

    def __init__(self, teacher):
        super().__init__()
        self.model = copy.deepcopy(teacher).requires_grad_(True)
        # embeddings and rounding stay the teacher's
        self.model.net.embed.requires_grad_(False)
        self.model.bias.requires_grad_(False)
        self.discriminator = torch.nn.Linear(teacher.config.width, 1)
        middle = self.model.net.blocks[(teacher.config.layers - 1) // 2]
        middle.register_forward_hook(self.keep_middle)

    @property
    def net(self):
        """The network of any model, which compile_on_gpu compiles."""
        return self.model.net

    def keep_middle(self, block, inputs, output):
        self.middle = output

    def forward(self, x_t, given, t):
        """The clean x predicted from x_t (B, L, C), and each row's logit of being real (B,)."""
        x = self.model.predict(x_t, given, t)
        return x, row_mean(self.discriminator(self.middle)[..., 0], given)


class ScoreDistillation(Distillation):
    """The loss of a diffusion's student: SiD or DMD; with --adversarial also SiDA's."""
    logits = False

    def __init__(self, student, teacher, reference, o):
        self.student = student
        self.teacher = teacher
        self.o = o
        self.fake = FakeScore(teacher).to(next(teacher.parameters()).device)
        self.optimizers = [adam(student, o.lr)]
        self.own_optimizers = [adam(self.fake, o.lr)]

    @staticmethod
    def student_config(config, o):
        return replace(config, dropout=o.dropout, calls=1, shared_noise=o.shared_noise)

    def modules(self):
        return {'fake': self.fake}

    def resume(self, start, run, o):
        if run.micro_batches != run.world:
            fail('--micro-batches: score distillation takes one per process; leave it out')

    def __call__(self, tokens, given, times, rng):
        """The student's loss on rows (B, L), after the fake score network has caught up with it."""
        clean = self.student.embedded(tokens)  # (B, L, C)
        for _ in range(self.o.fake_updates):
            self.update_fake(clean, given, rng)
        return self.student_loss(clean, given, rng)

    def update_fake(self, clean, given, rng):
        """One update of the fake score network on what the student writes now."""
        student = self.student
        with torch.no_grad():
            x = student.generate(student.initial_noise(given, rng), given)
        t = torch.rand(len(given), generator=rng, device=given.device)
        prediction, logit = self.fake(student.q_sample(x, clean, given, t, rng), given, t)
        loss = row_mean((prediction - x).square().mean(-1), given).mean()
        if self.o.adversarial:
            # the discriminator learns to tell real rows from generated ones, at the same times
            real = clean + EMBEDDING_NOISE * student.noise(clean, rng)
            _, logit_real = self.fake(student.q_sample(real, clean, given, t, rng), given, t)
            loss = loss + (F.softplus(-logit_real) + F.softplus(logit)).mean()
        optimizer = self.own_optimizers[0]
        optimizer.zero_grad(set_to_none=True)
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        (loss / world).backward()
        all_reduce([p.grad for p in self.fake.parameters() if p.grad is not None])
        optimizer.step()

    def student_loss(self, clean, given, rng):
        """What the student minimizes; both denoisers pass gradients on, but are not updated."""
        student = self.student
        x = student.generate(student.initial_noise(given, rng), given)
        # not at the very ends: SiD's range of noise levels, 2 to 98%
        t = 0.02 + 0.96 * torch.rand(len(given), generator=rng, device=given.device)
        x_t = student.q_sample(x, clean, given, t, rng)
        teacher_x = self.teacher.predict(x_t, given, t)
        fake_x, logit = self.fake(x_t, given, t)
        if self.o.loss == 'dmd':
            loss = dmd_loss(x, teacher_x, fake_x)
        else:
            loss = sid_loss(x, teacher_x, fake_x, self.o.alpha)
        # SiD's weight: rows far from the teacher's prediction would dominate the others
        weight = 1 / row_mean((x - teacher_x).detach().abs().mean(-1), given).clamp(min=1e-5)
        loss = (weight * row_mean(loss, given)).mean()
        if self.o.adversarial:
            # the student is to look real (SiDA, arXiv:2410.14919)
            loss = loss + self.o.adversarial * F.softplus(-logit).mean()
        gap = row_mean((teacher_x - fake_x).square().mean(-1), given)
        error = row_mean((fake_x - x).square().mean(-1), given)
        return loss, {'gap': sum_and_count(gap), 'fake_error': sum_and_count(error)}


def adam(module, lr):
    """Adam without momentum, as SiD has it for both networks; the fake's rate stays constant."""
    params = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.Adam(params, lr, betas=(0.0, 0.999))


# -----------------------------------------------------------------------------
# Part 3. SDTT: a baseline for one-call flows

class MaskedDistillation(Distillation):
    """
    SDTT, arXiv:2410.21035: a masked diffusion's student learns to predict in one call what two
    ancestral steps of its teacher predict. Round by round the student becomes the teacher and the
    steps double in length, until `final_calls` calls of the student write a text.
    """

    def __init__(self, student, teacher, reference, o):
        self.student = student
        self.teacher = copy.deepcopy(teacher)
        self.o = o
        self.optimizers = make_optimizers(student, o)
        self.step = None
        self.round = None

    @staticmethod
    def student_config(config, o):
        return replace(config, dropout=o.dropout, calls=o.final_calls)

    def modules(self):
        return {'round_teacher': self.teacher}

    def resume(self, start, run, o):
        # a round is a fraction of all iterations
        if start > 0 and o.iters and run.ckpt['iters'] != o.iters:
            fail(f'--resume: the rounds of {run.out} are of --iters {run.ckpt["iters"]}; give that')

    def before(self, it, iters, ema, batch):
        """Where a round begins, the student so far becomes the teacher."""
        length = math.ceil(iters / self.o.rounds) if iters else it + 1
        if self.round is None:
            self.round = max(0, it - 1) // length
        if it // length > self.round:
            self.round = it // length
            self.teacher.load_state_dict(ema.state_dict())
        # the teacher's step, half of the student's, which in the last round is 1 / final_calls
        halvings = self.o.rounds - self.round
        self.step = 1 / (self.o.final_calls * 2 ** halvings)

    def times(self, n, cpu):
        return [stratified(torch.rand(1, generator=cpu), n)]

    def __call__(self, tokens, given, times, rng):
        """Cross-entropy of the student with its teacher on rows (B, L), masked at times (B,)."""
        t = times[0].to(tokens.device)
        seen = self.student.q_sample(tokens, given, t, rng)
        with torch.no_grad():
            target = self.two_ancestral_steps(seen, t[:, None], rng)
        losses = self.student.predict(seen, target=target, weights=token_weights(seen))
        return losses.mean(), {}

    def two_ancestral_steps(self, seen, t, rng):
        """What the teacher predicts where `seen` is masked, from t on in two steps: (B, L, V)."""
        target = 0.0
        for s in (t, t + self.step):
            p = mask_specials(self.teacher.predict(seen)).softmax(-1)
            masked = seen < 0
            # a token that the first step unmasked keeps the prediction it was drawn from
            target = torch.where(masked[..., None], p, target)
            # of the masks left at time s a fraction step / (1 - s) is unmasked
            u = torch.rand(seen.shape, generator=rng, device=seen.device)
            now = u < self.step / (1 - s).clamp(min=self.step)
            seen = torch.where(masked & now, draw(p, rng), seen)
        return target


# -----------------------------------------------------------------------------
# Part 4. ours: refining, measured in assets/ablations.md

class Refinement(Distillation):
    """
    ours: a copy of a diffusion's student learns to do in one call what four calls of the frozen
    student, the reference, and its teacher do. Between two texts a student that learns from itself
    goes on mixing them; the reference does not move, so its preferred text can be learned.
    """

    def __init__(self, student, teacher, reference, o):
        self.student = student
        self.teacher = teacher
        self.reference = reference
        self.o = o
        self.optimizers = make_optimizers(student, o)

    @staticmethod
    def student_config(config, o):
        return replace(config, dropout=o.dropout)

    def __call__(self, tokens, given, times, rng):
        x_t = self.least_certain_noise(given, rng)
        with torch.no_grad():
            target = self.target(x_t, given, rng)
        x = self.student.generate(x_t, given)
        losses = self.student.rounding_loss(x, target, token_weights(given))
        return losses.mean(), {}

    @torch.no_grad()
    def least_certain_noise(self, given, rng):
        """Of several noises for each row the one whose text is least certain: x_t (B, L, C)."""
        noises = []
        certainty = []
        for _ in range(self.o.candidates):
            x_t = self.student.initial_noise(given, rng)
            logits = self.student.rounding_logits(self.student.generate(x_t, given))
            noises.append(x_t)
            certainty.append(row_mean(logits.log_softmax(-1).amax(-1), given))
        # far from a tie between two texts nothing is left to learn
        least = torch.stack(certainty).argmin(0)  # (B,)
        return torch.stack(noises)[least, torch.arange(len(given), device=given.device)]

    def target(self, x_t, given, rng):
        """
        The reference's text is noised and denoised by the teacher, three times in a row, with less
        and less noise: probabilities (B, L, V).
        """
        text = self.reference.rounding_logits(self.reference.generate(x_t, given)).argmax(-1)
        x = self.reference.embedded(text)
        for t in (0.5, 0.65, 0.8):
            t = torch.full_like(x_t[:, 0, 0], t)
            x = self.teacher.predict(self.teacher.q_sample(x, x_t, given, t, rng), given, t)
        return self.teacher.rounding_logits(x).softmax(-1)


METHODS = {
    'flow map': FlowMap,
    'score': ScoreDistillation,
    'masked': MaskedDistillation,
    'refine': Refinement,
}


# -----------------------------------------------------------------------------
# The script

def load_teacher(name, device):
    """The teacher that is named, or the newest one, frozen: its file, model and checkpoint."""
    if name:
        path = checkpoint_path(name)
    else:
        path = newest_checkpoint(lambda c: c.calls == 0 and c.model in ('flm', 'diffuseq'))
    if path is None:
        command = as_command('train_teacher.py')
        fail(f'out/ holds no flow or diffusion to distill; first run: {command}')
    teacher, ckpt = load(name or path, device)
    if teacher.config.calls > 0:
        fail(f'{path} is a student already; name its teacher')
    if teacher.config.model == 'ar':
        command = as_command('train_teacher.py')
        fail(f'{path} is autoregressive; distill a flow, a diffusion or an mdlm, made by: '
             f'{command}')
    return path, teacher.requires_grad_(False), ckpt


def load_reference(name, teacher, device):
    """The frozen student that is refined, or None."""
    if not name:
        return None
    if teacher.config.model != 'diffuseq':
        fail("--reference is for a diffusion's student; leave it out here")
    reference, _ = load(name, device)
    if reference.config.calls == 0 or not reference.net.embed.equal(teacher.net.embed):
        fail(f'--reference {name}: must be a student of this teacher')
    return reference.requires_grad_(False)


def kind_of_student(config, o):
    """Which of METHODS the teacher's config and the options ask for."""
    if config.model == 'mdlm':
        return 'masked'
    if config.model == 'flm':
        return 'flow map'
    # with a discriminator the reference is where the second run starts; its fake network is the
    # teacher again
    return 'refine' if o.reference and not o.adversarial else 'score'


def load_same_data(folder, ckpt, path):
    """The data that the teacher was trained on, or other rows of the same kind."""
    meta, train_ids, val_ids = load_dataset(folder)
    changed = difference(ckpt['meta'], meta, ('tokenizer', 'length', 'kind', 'pairs'))
    if changed:
        fail(f'{folder} is not what {path} was trained on: it has {changed}; name its data by '
             '--data, or, if they were prepared again, train a teacher again')
    return meta, train_ids, val_ids


def build_student(source, config):
    """A student that writes, at first, as its source, the teacher or the reference, does."""
    student = build(config)
    # the second time of a flow map begins at zero weights, see Denoiser
    student.load_state_dict({**student.state_dict(), **source.state_dict()})
    # E spans the space that both networks read and write: shared, so never trained; for masked
    # diffusion teacher and student share nothing but tokens
    for name, p in student.named_parameters():
        p.requires_grad_(config.model == 'mdlm' or name not in ('net.embed', 'bias'))
    student = student.to(next(source.parameters()).device)
    if config.model == 'flm':
        student.freeze_table()
    return student


def default_out(path, meta, reference):
    """The folder to write to, for the teacher in this file."""
    name = 'refined' if reference else 'student'
    # a file such as a shipped one has no folder of its own
    if path.name != 'model.pt':
        return Path('out') / meta['name'] / name
    folder = path.parent
    if folder.name in ('', '..'):
        folder = folder.resolve()
    if folder.name == 'teacher':
        return folder.with_name(name)
    return folder.with_name(f'{folder.name}-{name}')


def main(o):
    rank, world, device = start_processes(o.device)

    # the models to learn from say which kind of student this is
    path, teacher, teacher_ckpt = load_teacher(o.teacher, device)
    reference = load_reference(o.reference, teacher, device)
    method = kind_of_student(teacher.config, o)
    data = Path(o.data or teacher_ckpt['data'])
    meta, train_ids, val_ids = load_same_data(data, teacher_ckpt, path)

    # settings
    machine = o.preset or default_machine(device)
    settings = preset(machine, method, is_stories(meta))
    refuse_unused(o, ONLY_FOR, method, 'this student')
    targets = o.method or settings['method']
    refuse_unused(o, ONLY_FOR_METHOD, targets, f'--method {targets}')
    fill_in(o, settings)
    if o.noise_levels == 1:
        fail('--noise-levels 1: noise of one level is none; give 0, or at least 2')
    parts = choose_micro_batches(o, world, meta, device, logits=METHODS[method].logits)

    # where it writes, and what is there
    parents = {'teacher': {'path': str(path), 'crc': zlib.crc32(path.read_bytes())}}
    if reference is not None:
        crc = zlib.crc32(checkpoint_path(o.reference).read_bytes())
        parents['reference'] = {'path': o.reference, 'crc': crc}
    out = Path(o.out) if o.out else default_out(path, meta, reference)
    run = Run(rank, world, device, data, meta, train_ids, val_ids, out, parts, parents)
    run.ckpt = check_out(run, o)

    # the student, in training mode: targets that it makes itself have dropout, too
    torch.manual_seed(o.seed)
    source = reference or teacher
    student = build_student(source, METHODS[method].student_config(source.config, o))
    objective = METHODS[method](student, teacher, reference, o)
    compile_on_gpu(o, device, [student, source, teacher, *objective.modules().values()])
    first_line(machine, f'{method} of {path}', run, o)
    complete = train(run, student, objective, o)
    last_lines(run, complete, [*sample_command(out, meta, val_ids), '--compare', str(path)])


if __name__ == '__main__':
    options = parse()
    run_script(lambda: main(options))
