"""
Distil a teacher into a student that writes in one network call.

    python distill.py                                   # the newest teacher
    python distill.py out/dates-diffuseq/teacher        # a teacher trained with --model diffuseq
    python distill.py out/dates-diffuseq/teacher --guide out/dates-diffuseq/student   # refined

A flow's student is the teacher plus a second time: it learns delta_{s,t}, the text to aim at in one
jump from time s to a later t; delta_{0,1} turns noise into text (FMLM, arXiv:2602.16813). A
diffusion's student is a generator trained by score distillation (DLM-One, arXiv:2506.00290).
The baseline mdlm is distilled, too, to be compared with: SDTT, arXiv:2410.21035.
Writes <out>/model.pt and <out>/log.jsonl.

As everywhere, times run from noise (0) to data (1), and `given` (B, L) holds the ids of known
tokens, -1 where text is to be written. The s, u and t of a flow's jump are reparameterised times
tau, one for each row; flow.token_t makes of one the t of the formulas, for each token. D_t is the
text that the teacher guesses at t, and delta_{t,t} = D_t. E is the embedding table, which both
networks share. A batch is computed in o.parts parts, so that n processes train as one does.
"""

import argparse
import copy
import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

# before torch, which takes seconds to load: Ctrl-C is one line from here on
from prepare_data import Parser, as_command, load_dataset, run_script
from prepare_data import fraction as share
from prepare_data import nonnegative as rate
from prepare_data import nonnegative_int as count
from prepare_data import positive_int as positive
from prepare_data import sanity_metrics as health

import torch
import torch.nn.functional as F

from model import (GRAIN, ONE_CALL_START, STUDENTS, autocast, build, checkpoint_path, draw,
                   fail, first_leg_weight, generator, is_student, load, newest_checkpoints,
                   row_mean, save, share_of, without_specials, write_rows)
from train_teacher import (Log, Stopper, add_run_options, add_up, apply_preset, as_flag, check_out,
                           check_shares, compile_on_gpu, even_times, get_batch, make_optimisers,
                           parts_of, preset_adder, restore, set_parts, start_processes, to_sample,
                           update)

# -----------------------------------------------------------------------------
# Options

# the same in both presets
ALIKE = dict(
    leg=0.1, rollout=16, loss='sid', alpha=1.0, fake_ratio=1, adversarial=0.0, noises=3,
    muon_lr=0.01)

# ours, for minutes on a CPU: copies of the teacher's own way (rollout_target), kept as Lessons;
# noise of few values (values_of_noise); more rows at (0, 1), higher rates
LAPTOP = dict(
    **ALIKE,
    method='rollout', lessons=10_000, noise_values=6, diagonal=0.125, boundary=0.85, given=0.15,
    dropout=0.0, row_noise=True, iters=1000, batch=64, optimiser='muon', lr=2e-3, beta2=0.99,
    clip=1.0, warmup=50, decay=0.6, ema=0.999, eval_every=500)
# score distillation runs on Adam, whatever `optimiser` and `beta2` say, see adam
LAPTOP_SCORE = {**LAPTOP, 'noise_values': 0, 'lr': 3e-4, 'iters': 300, 'eval_every': 150}
# a diffusion's noise may have any value
LAPTOP_REFINE = {**LAPTOP, 'noise_values': 0}

# FMLM, arXiv:2602.16813
PAPER = dict(
    **ALIKE,
    method='semigroup', lessons=0, noise_values=0, diagonal=0.5, boundary=1 / 32, given=0.0,
    dropout=0.1, row_noise=False, iters=100_000, batch=512, optimiser='adamw', lr=3e-4, beta2=0.95,
    clip=1.0, warmup=2500, decay=0.0, ema=0.9999, eval_every=5000)
# SiD, arXiv:2404.04057, on a teacher of DiffuSeq's; DLM-One's number of iterations is not known
PAPER_SCORE = {
    **PAPER, 'dropout': 0.0, 'iters': 50_000, 'lr': 1e-5, 'beta2': 0.999, 'clip': 0.0, 'warmup': 0}

# SDTT, arXiv:2410.21035, on masked diffusion: seven rounds, from 1024 calls to 8
PAPER_MASKED = {
    **PAPER, 'iters': 70_000, 'batch': 128, 'lr': 6e-5, 'beta2': 0.999, 'warmup': 500,
    'rounds': 7, 'fewest': 8}
LAPTOP_MASKED = {
    **LAPTOP, 'noise_values': 0, 'given': 0.0, 'iters': 700, 'eval_every': 350, 'rounds': 4,
    'fewest': 4}

PRESETS = {
    ('laptop', 'flow map'): LAPTOP,
    ('laptop', 'score'): LAPTOP_SCORE,
    ('laptop', 'refine'): LAPTOP_REFINE,
    ('laptop', 'masked'): LAPTOP_MASKED,
    ('paper', 'flow map'): PAPER,
    ('paper', 'score'): PAPER_SCORE,
    ('paper', 'refine'): PAPER,
    ('paper', 'masked'): PAPER_MASKED,
}

# the options that are for one stage only, and whom it is for
ONLY_FOR = {
    'flow map': ['method', 'diagonal', 'boundary', 'leg', 'rollout', 'lessons', 'noise_values'],
    'score': ['loss', 'alpha', 'fake_ratio', 'adversarial', 'row_noise'],
    'masked': ['rounds', 'fewest'],
    'refine': ['noises'],
}
FOR_WHOM = {
    'flow map': "a flow's student",
    'score': "a diffusion's student",
    'masked': "masked diffusion's student",
    'refine': "a diffusion's student with --guide",
}


def parse(argv=None):
    """The options of a command line; those without a value get it from the preset, see main."""
    parser = Parser(description=__doc__)
    # masked diffusion adds two options of its own to those of all stages
    add = preset_adder(parser, {**LAPTOP_MASKED, **LAPTOP}, {**PAPER_MASKED, **PAPER})
    # what and where
    add('teacher', nargs='?', default='',
        help='folder or .pt file of the teacher; default: the newest out/*/teacher')
    add('--out', default='', help='folder to write to; default: student, beside the teacher')
    add('--data', default='', help="folder made by prepare_data.py; default: the teacher's")
    add('--preset', choices=['laptop', 'paper'],
        help='whose settings; default: paper on a GPU, laptop on a CPU')
    # flow map
    add('--method', choices=['semigroup', 'lagrangian', 'eulerian', 'rollout'],
        help='flow: where the targets of a jump come from')
    add('--diagonal', type=share, help='flow: share of rows at s = t')
    add('--boundary', type=share, help='flow: of the others, share at (s, t) = (0, 1)')
    add('--leg', type=share,
        help="flow: length of the teacher's leg, as a share of t - s (lagrangian, eulerian)")
    add('--rollout', type=positive, help="rollout: the teacher's calls that are copied")
    add('--lessons', type=count,
        help='rollout: jumps that are kept and learnt again and again; 0: always new ones')
    # score distillation
    add('--loss', choices=['sid', 'dmd'], help='diffusion: which gradient')
    add('--alpha', type=rate, help='sid: quality against diversity, 0.5 to 1.2')
    add('--fake-ratio', type=positive,
        help="diffusion: updates of the fake denoiser for each of the student")
    add('--adversarial', type=rate, help="diffusion: weight of the critic, in SiDA's second run")
    add('--row-noise', action=argparse.BooleanOptionalAction,
        help='diffusion: one noise for all of a row')
    # masked diffusion
    add('--rounds', type=positive, help='mdlm: how often the student becomes the teacher')
    add('--fewest', type=positive, help='mdlm: calls that the last round is for')
    # refining
    add('--guide', default='',
        help="a diffusion's student that stays as it is: a copy of it is refined")
    add('--noises', type=positive, help='--guide: of so many noises the hardest is learnt')
    # what is learnt
    add('--given', type=share,
        help='share of rows without a source that get random given tokens')
    add('--noise-values', type=count,
        help='flow: how many values each number of its noise can take; 0: any')
    add('--dropout', type=share, help='on attention-out and MLP-out')
    # the optimiser
    add('--iters', type=count, help='iterations of the optimiser')
    add('--batch', type=positive, help='rows per iteration, of all processes together')
    add('--optimiser', choices=['muon', 'adamw'], help='of all but score distillation')
    add('--lr', type=rate, help='peak learning rate of AdamW (of Adam in score distillation)')
    add('--muon-lr', type=rate, help='peak learning rate of Muon')
    add('--beta2', type=share, help='of AdamW')
    add('--clip', type=rate, help='largest norm of the gradient; 0: any')
    add('--warmup', type=count, help='iterations of linear warm-up')
    add('--decay', type=share, help='last share of the run, over which rates fall to 0')
    add('--ema', type=share, help='decay of the averaged weights, which samples use')
    # the run
    add_run_options(add)
    return parser.parse_args(argv)


# -----------------------------------------------------------------------------
# Part 1. FMLM: the flow map, from the teacher at s = t and from shorter jumps elsewhere

def time_pairs(n, diagonal, boundary, cpu):
    """
    s <= t for n rows, each (n,), and what is asked of them (n,): 0 for s = t, 1 for (0, 1), 2 for
    jumps in between, in this order. Rows are counted before a batch is split into parts, so the
    method does not depend on their number. arXiv:2602.16813.
    """
    uniform = torch.rand(2, n, generator=cpu)
    # t - s ~ U(0, 1), then s ~ U(0, 1 - (t - s))
    s = uniform[1] * (1 - uniform[0])
    t = s + uniform[0]
    kind = torch.full((n,), 2)

    # s = t, spread evenly over [0, 1)
    on_diagonal = round(n * diagonal)
    s[:on_diagonal] = even_times(uniform[0, 0], on_diagonal)
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


def two_legs(flow, first, last, given, s, u, t):
    """delta_{s,t} from the texts that its legs s -> u and u -> t aim at: (B, L, V)."""
    # in the t of the formulas, for each token
    g = first_leg_weight(*[flow.token_t(tau, given) for tau in (s, u, t)])
    return g * first + (1 - g) * last


def semigroup_target(student, teacher, h, given, s, t, o):
    """delta_{s,t}(h) by two jumps of the student itself, u half way: arXiv:2602.16813, PSD."""
    u = s + 0.5 * (t - s)
    first = student.predict(h, given, s, u).softmax(-1)
    h_u = student.jump(h, first, given, s, u)
    last = student.predict(h_u, given, u, t).softmax(-1)
    return two_legs(student, first, last, given, s, u, t)


def lagrangian_target(student, teacher, h, given, s, t, o):
    """
    delta_{s,t}(h) by a jump of the student to u close to t, where the teacher looks:
    delta_{u,t} ~ D_u. The Lagrangian equation of arXiv:2602.16813 in a finite step, without
    derivatives and always in the simplex.
    """
    u = t - o.leg * (t - s)
    first = student.predict(h, given, s, u).softmax(-1)
    h_u = student.jump(h, first, given, s, u)
    last = teacher.predict(h_u, given, u).softmax(-1)
    return two_legs(student, first, last, given, s, u, t)


def eulerian_target(student, teacher, h, given, s, t, o):
    """
    delta_{s,t}(h) by a step of the teacher to u close to s, delta_{s,u} ~ D_s, and a jump of the
    student from there: the Eulerian equation of arXiv:2602.16813 (consistency) in a finite step.
    """
    u = s + o.leg * (t - s)
    first = teacher.predict(h, given, s).softmax(-1)
    h_u = student.jump(h, first, given, s, u)
    last = student.predict(h_u, given, u, t).softmax(-1)
    return two_legs(student, first, last, given, s, u, t)


def rollout_target(student, teacher, h, given, s, t, o):
    """
    ours: delta_{s,t}(h) as the teacher finds it in o.rollout steps from s to t: (B, L, V). A
    student taught by jumps of its own may drift off its teacher; this one cannot. Steps are of
    second order (Adams and Bashforth's method): 16 write as well as 32 of Euler's
    (assets/ablations.md).
    """
    # where first tokens go ahead, the first steps decide what the text is about: shorter ones keep
    # it varied (assets/ablations.md)
    early = 1.5 if teacher.config.stagger > 0 else 1.0
    ends = [(i / o.rollout) ** early for i in range(o.rollout + 1)]
    # has no weight in the first step
    target = torch.zeros(())
    before = None
    for i in range(o.rollout):
        now = s + (t - s) * ends[i]
        then = s + (t - s) * ends[i + 1]
        p = teacher.predict(h, given, now).softmax(-1)
        aim = p
        if before is not None:
            # what the teacher would say in the middle of the step: half of what it has changed by
            # since the last one, if both are equally long
            longer = (ends[i + 1] - ends[i]) / (ends[i] - ends[i - 1])
            aim = p + 0.5 * longer * (p - before)
        before = p
        # a weighted mean of the aims along the way; of a jump to t = 1 only the last one counts
        target = two_legs(student, target, aim, given, s, now, then)
        h = student.jump(h, aim, given, now, then)
    # a step of second order may lie a little beyond the probabilities
    target = target.clamp(min=0)
    return target / target.sum(-1, keepdim=True)


class Lessons:
    """
    ours: jumps with the targets that the teacher has found for them. They are kept, and learnt many
    times over: a target takes --rollout calls of the teacher, learning it the time of about three.
    Such copies of a teacher's way were first made of images: arXiv:2101.02388.
    """

    def __init__(self, capacity):
        self.capacity = capacity
        self.size = 0
        self.kept = []  # h, given, s, t, kind, target, each (capacity, ...)

    def full(self):
        return self.size >= self.capacity

    def add(self, jumps):
        """Keep some jumps, each given by one row of several tensors, as far as there is room."""
        if not self.kept:
            self.kept = [x.new_empty(self.capacity, *x.shape[1:]) for x in jumps]
        end = min(self.capacity, self.size + len(jumps[0]))
        for kept, x in zip(self.kept, jumps):
            kept[self.size:end] = x[:end - self.size]
        self.size = end

    def draw(self, n, rng):
        """Any n of those kept."""
        rows = torch.randint(self.size, (n,), generator=rng, device=self.kept[0].device)
        return [x[rows] for x in self.kept]


class FlowMap:
    """The loss of a flow's student."""

    def __init__(self, student, teacher, o):
        self.student = student
        self.teacher = teacher
        self.o = o
        targets = {'semigroup': semigroup_target, 'lagrangian': lagrangian_target,
                   'eulerian': eulerian_target, 'rollout': rollout_target}
        self.target = targets[o.method]
        # each part of a batch has its own, so the method does not depend on the number of processes
        capacity = o.lessons // o.parts if o.method == 'rollout' else 0
        self.lessons = [Lessons(capacity) for _ in range(o.parts)]

    def times(self, n, cpu):
        """s, t and kind of each row, and which part of the batch it is in: (n,) each."""
        s, t, kind = time_pairs(n, self.o.diagonal, self.o.boundary, cpu)
        part = torch.arange(n) % self.o.parts
        return s, t, kind, part

    def __call__(self, tokens, given, times, rng):
        """
        Cross-entropy of the student's delta_{s,t} with its target, for tokens and given (B, L) ->
        mean in nats, and what to log: for each kind of row sum and number.
        """
        h, given, s, t, kind, target = self.examples(tokens, given, times, rng)
        losses = self.student.predict(h, given, s, t, target)  # (B,)
        seen = {}
        for i, name in enumerate(('diagonal', 'all_the_way', 'between')):
            here = kind == i
            seen[name] = torch.stack([(losses.detach() * here).sum(), here.sum()])
        return losses.mean(), seen

    @torch.no_grad()
    def examples(self, tokens, given, times, rng):
        """What is to be learnt: h, given, s, t, kind and target, each (B, ...)."""
        s, t, kind, part = times
        # rows come sorted by kind; counted on the CPU, so that no GPU is waited for
        on_diagonal = int((kind == 0).sum())
        # all rows of a call are of one part
        lessons = self.lessons[part[0]]
        s, t, kind = [x.to(tokens.device) for x in (s, t, kind)]
        rows = [self.student.corrupt(tokens, given, s, rng), given, s, t, kind]
        # at s = t the student is the teacher
        learnt = [x[:on_diagonal] for x in rows]
        learnt.append(self.teacher.predict(*learnt[:3]).softmax(-1))
        if on_diagonal == len(s):
            return learnt
        jumps = self.with_targets([x[on_diagonal:] for x in rows], lessons, rng)
        return [torch.cat(both) for both in zip(learnt, jumps)]

    def with_targets(self, jumps, lessons, rng):
        """
        The jumps with their targets. Where lessons are kept, the jumps are only stored, while there
        is room, and what is learnt is drawn at random from the store: at first some twice and some
        not. Once the store is full, the teacher is not asked any more.
        """
        if lessons.capacity == 0:
            return [*jumps, self.targets(jumps)]
        if not lessons.full():
            # half precision is enough for probabilities
            lessons.add([*jumps, self.targets(jumps).half()])
        return lessons.draw(len(jumps[0]), rng)

    def targets(self, jumps):
        """The targets (n, L, V) of jumps: h, given, s, t, kind."""
        h, given, s, t, _ = jumps
        return self.target(self.student, self.teacher, h, given, s, t, self.o)


def sum_and_number(x):
    """What the log needs of some rows' values: (2,)."""
    x = x.detach()
    return torch.stack([x.sum(), torch.full_like(x.sum(), len(x))])


# -----------------------------------------------------------------------------
# Part 2. DLM-One: score distillation of a diffusion into a generator

def sid_gap(x, teacher_x, fake_x, alpha):
    """
    SiD, arXiv:2404.04057: (1 - alpha) |teacher_x - fake_x|^2 + (teacher_x - fake_x).(fake_x - x) at
    each position, from three (B, L, C) -> (B, L), with gradient through all three. x is generated;
    teacher_x and fake_x are what the teacher and the fake denoiser guess it was, from x_t. Where
    both guess alike at all noise levels, the student writes as the data do. With a perfect fake its
    mean is (1 - alpha) E|teacher_x - fake_x|^2, 0 at alpha = 1: no progress meter.
    """
    gap = teacher_x - fake_x
    return ((1 - alpha) * gap.square() + gap * (fake_x - x)).mean(-1)


def dmd_gap(x, teacher_x, fake_x):
    """DMD, arXiv:2311.18828: the gradient fake_x - teacher_x on x alone; shapes as in sid_gap."""
    return ((fake_x - teacher_x).detach() * x).mean(-1)


class Fake(torch.nn.Module):
    """
    The fake denoiser, which follows what the student writes; in its middle a critic, which is used
    with --adversarial only.
    """

    def __init__(self, teacher):
        super().__init__()
        self.model = copy.deepcopy(teacher).requires_grad_(True)
        # embeddings and rounding stay the teacher's
        self.model.net.embed.requires_grad_(False)
        self.model.bias.requires_grad_(False)
        self.critic = torch.nn.Linear(teacher.config.width, 1)
        middle = self.model.net.blocks[(teacher.config.layers - 1) // 2]
        middle.register_forward_hook(self.keep_middle)

    @property
    def net(self):
        """The network of any model, which compile_on_gpu compiles."""
        return self.model.net

    def keep_middle(self, block, inputs, output):
        self.middle = output

    def forward(self, x_t, given, t):
        """The clean x it sees in x_t (B, L, C), and per row the critic's logit of "real" (B,)."""
        x = self.model.predict(x_t, given, t)
        return x, row_mean(self.critic(self.middle)[..., 0], given)


class ScoreDistillation:
    """The loss of a diffusion's student: SiD or DMD; with --adversarial SiDA's critic, too."""

    def __init__(self, student, teacher, o):
        self.student = student
        self.teacher = teacher
        self.o = o
        self.fake = Fake(teacher).to(next(teacher.parameters()).device)
        self.fake_optimiser = adam(self.fake, o.lr)

    def times(self, n, cpu):
        return ()

    def __call__(self, tokens, given, times, rng):
        """The student's loss on rows (B, L), after the fake denoiser has caught up with it."""
        clean = self.student.embedded(tokens)  # (B, L, C)
        for _ in range(self.o.fake_ratio):
            self.fake_step(clean, given, rng)
        return self.student_loss(clean, given, rng)

    def fake_step(self, clean, given, rng):
        """One update of the fake denoiser on what the student writes now."""
        student = self.student
        with torch.no_grad():
            x = student.generate(student.begin(given, rng), given)
        t = torch.rand(len(given), generator=rng, device=given.device)
        guess, logit = self.fake(student.corrupt(x, clean, given, t, rng), given, t)
        loss = row_mean((guess - x).square().mean(-1), given).mean()
        if self.o.adversarial:
            # the critic learns to tell real rows from generated ones, at the same times
            real = clean + GRAIN * student.noise(clean, rng)
            _, logit_real = self.fake(student.corrupt(real, clean, given, t, rng), given, t)
            loss = loss + (F.softplus(-logit_real) + F.softplus(logit)).mean()
        self.fake_optimiser.zero_grad(set_to_none=True)
        (loss / self.o.parts).backward()
        add_up([p.grad for p in self.fake.parameters() if p.grad is not None])
        self.fake_optimiser.step()

    def student_loss(self, clean, given, rng):
        """What the student minimises, in which both denoisers pass gradients but stay."""
        student = self.student
        x = student.generate(student.begin(given, rng), given)
        # not at the very ends: SiD's range of noise levels, 2 to 98 %
        t = 0.02 + 0.96 * torch.rand(len(given), generator=rng, device=given.device)
        x_t = student.corrupt(x, clean, given, t, rng)
        teacher_x = self.teacher.predict(x_t, given, t)
        fake_x, logit = self.fake(x_t, given, t)
        if self.o.loss == 'dmd':
            gap = dmd_gap(x, teacher_x, fake_x)
        else:
            gap = sid_gap(x, teacher_x, fake_x, self.o.alpha)
        # rows far from what the teacher sees would drown the others (SiD's weight)
        weight = 1 / row_mean((x - teacher_x).detach().abs().mean(-1), given).clamp(min=1e-5)
        loss = (weight * row_mean(gap, given)).mean()
        if self.o.adversarial:
            # the student is to pass for real (SiDA, arXiv:2410.14919)
            loss = loss + self.o.adversarial * F.softplus(-logit).mean()
        distance = row_mean((teacher_x - fake_x).detach().square().mean(-1), given)
        error = row_mean((fake_x - x).detach().square().mean(-1), given)
        return loss, {'gap': sum_and_number(distance), 'fake_error': sum_and_number(error)}


def adam(module, lr):
    """Adam without momentum, as SiD has it for both networks; the fake's rate stays constant."""
    params = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.Adam(params, lr, betas=(0.0, 0.999))


# -----------------------------------------------------------------------------
# Part 3. SDTT: the rival that a one-call flow is compared with

class MaskedDistillation:
    """
    SDTT, arXiv:2410.21035: a masked diffusion's student learns to guess in one call what two
    ancestral steps of its teacher guess. Round by round the student becomes the teacher, and the
    steps double in length, until `fewest` calls of the student make a text.
    """

    def __init__(self, student, teacher, o):
        self.student = student
        self.teacher = copy.deepcopy(teacher)
        self.o = o
        self.step = None

    def start_round(self, it, ema):
        """Before iteration `it`: where a round begins, the student so far is the new teacher."""
        length = math.ceil(self.o.iters / self.o.rounds)
        if it > 0 and it % length == 0:
            self.teacher.load_state_dict(ema.state_dict())
        # the teacher's step, half of the student's, which in the last round is 1 / fewest
        halvings = self.o.rounds - it // length
        self.step = 1 / (self.o.fewest * 2 ** halvings)

    def times(self, n, cpu):
        return [even_times(torch.rand(1, generator=cpu), n)]

    def __call__(self, tokens, given, times, rng):
        """Cross-entropy of the student with its teacher on rows (B, L), masked at times (B,)."""
        t = times[0].to(tokens.device)
        seen = self.student.corrupt(tokens, given, t, rng)
        with torch.no_grad():
            target = self.two_steps(seen, t[:, None], rng)
        losses = self.student.predict(seen, target=target, share=share_of(seen))
        return losses.mean(), {}

    def two_steps(self, seen, t, rng):
        """What the teacher guesses where `seen` is masked, from t on in two steps: (B, L, V)."""
        target = 0.0
        for s in (t, t + self.step):
            p = without_specials(self.teacher.predict(seen)).softmax(-1)
            masked = seen < 0
            # a token that the first step wrote keeps the guess that it was drawn from
            target = torch.where(masked[..., None], p, target)
            # of the masks left at time s a share of step / (1 - s) is written
            u = torch.rand(seen.shape, generator=rng, device=seen.device)
            now = u < self.step / (1 - s).clamp(min=self.step)
            seen = torch.where(masked & now, draw(p, rng), seen)
        return target


# -----------------------------------------------------------------------------
# Part 4. ours: refining. What is measured of it: assets/ablations.md

class Refine:
    """
    ours: the loss of a copy of a diffusion's student, the guide: one call is to do what four calls
    of the guide and its teacher do. Between two texts a student that learns from itself goes on
    mixing; the guide does not move, so the text that it prefers can be learnt.
    """

    def __init__(self, student, guide, teacher, o):
        self.student = student
        self.guide = guide
        self.teacher = teacher
        self.o = o

    def times(self, n, cpu):
        return ()

    def __call__(self, tokens, given, times, rng):
        h = self.hardest(given, rng)
        with torch.no_grad():
            target = self.target(h, given, rng)
        text = self.student.generate(h, given)
        losses = self.student.rounding_nats(text, target, share_of(given))
        return losses.mean(), {'one_call': sum_and_number(losses)}

    @torch.no_grad()
    def hardest(self, given, rng):
        """Of several noises for each row the one whose text is least sure: h (B, L, C)."""
        tries = []
        sure = []
        for _ in range(self.o.noises):
            h = self.student.begin(given, rng)
            logits = self.student.rounding_logits(self.student.generate(h, given))
            tries.append(h)
            sure.append(row_mean(logits.log_softmax(-1).amax(-1), given))
        # far from a tie between two texts nothing is left to learn
        hardest = torch.stack(sure).argmin(0)  # (B,)
        return torch.stack(tries)[hardest, torch.arange(len(given), device=given.device)]

    def target(self, h, given, rng):
        """
        The guide's text is noised and denoised by the teacher, three times one after the other,
        with less and less noise (the times are by trial): probabilities (B, L, V).
        """
        guess = self.guide.rounding_logits(self.guide.generate(h, given)).argmax(-1)
        x = self.guide.embedded(guess)
        for t in (0.5, 0.65, 0.8):
            t = torch.full_like(h[:, 0, 0], t)
            x_t = self.teacher.corrupt(x, h, given, t, rng)
            x = self.teacher.predict(x_t, given, t)
        return self.teacher.rounding_logits(x).softmax(-1)


# -----------------------------------------------------------------------------
# The script

def find_teacher(name):
    """The .pt file of the teacher that is named, or of the newest one that can be distilled."""
    if name:
        return checkpoint_path(name)
    for path in newest_checkpoints('out/*/teacher/model.pt'):
        model, _ = load(path)
        if model.config.model in ('flm', 'diffuseq'):
            return path
    fail('out/ holds no flow or diffusion to distil; first run: python train_teacher.py')


def load_teacher(path, device):
    """Frozen teacher and its checkpoint; refuses what cannot be distilled."""
    teacher, ckpt = load(path, device)
    if is_student(teacher.config):
        fail(f'{path} is a student already; name its teacher')
    if teacher.config.model == 'ar':
        fail(f'{path} is autoregressive; distil a flow, a diffusion or an mdlm, made by: '
             'python train_teacher.py')
    return teacher.requires_grad_(False), ckpt


def load_guide(o, teacher, device):
    """The frozen student that is refined, or None."""
    if not o.guide:
        return None
    if teacher.config.model != 'diffuseq':
        fail("--guide: is for a diffusion's student; leave it out here")
    guide, _ = load(o.guide, device)
    if not is_student(guide.config) or not guide.net.embed.equal(teacher.net.embed):
        fail(f'--guide {o.guide}: must be a student of this teacher')
    return guide.requires_grad_(False)


def load_same_data(o, ckpt):
    """The data that the teacher was trained on, or other rows of the same kind."""
    o.data = o.data or ckpt['options']['data']
    meta, train, val = load_dataset(o.data)
    for name in ('tokenizer', 'length', 'kind', 'pairs'):
        if meta[name] != ckpt['meta'][name]:
            fail(f'{o.data} has another {name} than what the teacher was trained on; name that '
                 'folder by --data, or, if it was prepared anew, train a teacher anew')
    return meta, train, val


def build_student(teacher, guide, o):
    """A student that writes, at first, as the guide or the teacher does."""
    source = guide or teacher
    if guide or teacher.config.model == 'mdlm':
        config = replace(source.config, dropout=o.dropout)
    elif teacher.config.model == 'flm':
        config = replace(teacher.config, dropout=o.dropout, two_time=True,
                         noise_values=o.noise_values)
    else:
        config = replace(teacher.config, dropout=o.dropout, start=ONE_CALL_START,
                         row_noise=o.row_noise)
    student = build(config)
    # the second time of a flow map begins at zero weights, see Denoiser
    student.load_state_dict({**student.state_dict(), **source.state_dict()})
    # the embedding spans the space that both networks read and write: shared, so never trained;
    # those of masked diffusion share nothing but tokens
    for name, p in student.named_parameters():
        p.requires_grad_(config.model == 'mdlm' or name not in ('net.embed', 'bias'))
    return student.to(next(teacher.parameters()).device)


def make_stage(student, guide, teacher, o):
    """The loss function of this run, and the optimisers of all that it trains."""
    if o.stage == 'score':
        stage = ScoreDistillation(student, teacher, o)
        return stage, [adam(student, o.lr), stage.fake_optimiser]
    if o.stage == 'masked':
        return MaskedDistillation(student, teacher, o), make_optimisers(student, o)
    if o.stage == 'refine':
        return Refine(student, guide, teacher, o), make_optimisers(student, o)
    return FlowMap(student, teacher, o), make_optimisers(student, o)


def others_of(stage):
    """What a run has to keep beside its student, by name."""
    if isinstance(stage, ScoreDistillation):
        return {'fake': stage.fake}
    if isinstance(stage, MaskedDistillation):
        return {'round_teacher': stage.teacher}
    return {}


def stage_of(o, teacher):
    """Which of the four kinds of run the options ask for."""
    if teacher.config.model == 'mdlm':
        return 'masked'
    if teacher.config.model == 'flm':
        return 'flow map'
    # with a critic a guide is where the second run starts; its fake is the teacher again
    return 'refine' if o.guide and not o.adversarial else 'score'


def more_parts(o, meta, device):
    """As many parts as keep the targets (rows, L, V) of each within 256 MB, on a GPU 2 GB."""
    most = 2 ** 29 if device.type == 'cuda' else 2 ** 26
    while o.batch / o.parts * meta['length'] * meta['vocab'] > most:
        if o.batch % (2 * o.parts):
            return
        o.parts *= 2


def fit_lessons(o, meta, rank):
    """
    Keep as many lessons as fit into 2 GB, with targets (L, V) of two bytes a number; none where
    only a few would.
    """
    fit = 2 ** 30 // (meta['length'] * meta['vocab'])
    if o.lessons <= fit:
        return
    # so few would be learnt by heart (assets/ablations.md): new ones are made all the time instead
    if fit < 2000:
        fit = 0
    if rank == 0:
        print(f'--lessons: of {o.lessons:,} only {fit:,} are kept, within 2 GB of memory')
    o.lessons = fit


def measure(model, given, meta, o, it, log):
    """Samples at 4, 2 and 1 calls for given (n, L), described in the log -> quality of one call."""
    for nfe in (4, 2, 1):
        rows, _ = write_rows(model, given, nfe, seed=1)
        figures = health(rows, meta, o.data)
        log.record(it, nfe=nfe, **figures)
        if nfe == 1:
            one_call = figures
    return quality(one_call)


def quality(figures):
    """One number for health's figures: text has to be right and varied at once, so a product."""
    names = ('valid', 'form_entropy', 'slot_entropy', 'words', 'unique')
    # a figure that a text lacks counts 1
    return math.prod(figures.get(name, 1) for name in names)


class Best:
    """
    The averaged weights to keep. A flow map's are the last; score distillation may swing, so of
    its weights those are kept whose samples were best.
    """

    def __init__(self, ema, o, ckpt):
        self.ema = ema
        self.choose = o.stage == 'score'
        # until the first measurement those of now
        self.model = ema
        self.quality = 0.0
        if ckpt is not None and ckpt['quality'] > 0:
            self.quality = ckpt['quality']
            self.keep()
            self.model.load_state_dict(ckpt['ema'])

    def keep(self):
        """The weights of now are those to keep, until better ones are seen."""
        self.model = copy.deepcopy(self.ema)

    def see(self, quality, it, out):
        """Whether the weights of now are the best, and kept; ends a run that has degenerated."""
        if not self.choose:
            return False
        if quality >= self.quality:
            self.quality = quality
            self.keep()
            return True
        # a small quality is of a few rows, and falls by chance
        if self.quality > 0.1 and quality < self.quality / 2:
            fail(f'degenerated at iteration {it}: {out}/model.pt keeps the best weights; lower '
                 '--lr or raise --fake-ratio')
        return False


class Means:
    """Means of what this process has seen since the last record, by name."""

    def __init__(self, kept=None, device='cpu'):
        self.sums = {name: pair.to(device) for name, pair in (kept or {}).items()}

    def add(self, seen):
        for name, pair in seen.items():
            self.sums[name] = self.sums.get(name, 0) + pair

    def loss(self):
        total, number = self.sums['loss']
        return total / number

    def record(self):
        seen = {name: pair for name, pair in self.sums.items() if pair[1] > 0}
        return {name: (total / number).item() for name, (total, number) in seen.items()}

    def check(self, it, out):
        if not all(pair.isfinite().all() for pair in self.sums.values()):
            fail(f'loss or gradient not finite by iteration {it}; {out} keeps the last save; start '
                 'anew with lower learning rates')


def backward(stage, student, batch, it, o, run, means):
    """Loss and gradients of this process's parts of a batch, each with noise of its own."""
    tokens, given, times = batch
    trained = [p for p in student.parameters() if p.requires_grad]
    for rows, rng in parts_of(o, it, run.rank, run.world, tokens.device):
        # model.autocast keeps no casts: one made without gradient is of no use with it
        with autocast(tokens.device):
            loss, seen = stage(tokens[rows], given[rows], [x[rows] for x in times], rng)
        # not into the fake denoiser, whose own turn is past
        (loss / o.parts).backward(inputs=trained)
        means.add({'loss': sum_and_number(loss[None]), **seen})


@dataclass
class Run:
    """What a run is of: processes, models, data, and where it goes."""
    rank: int
    world: int
    device: torch.device
    teacher: torch.nn.Module
    guide: torch.nn.Module
    train: object           # ids
    val: object
    out: Path
    ckpt: dict              # to go on from, or None
    about: dict             # what a checkpoint says of its data, options and teacher


def folder_of(o, path, meta):
    """The folder to write to, for the teacher in this file."""
    # beside the teacher's folder; a file such as a shipped one has none
    beside = path.parent.parent if path.name == 'model.pt' else Path('out') / meta['name']
    kind = 'refined' if o.guide else 'distilled'
    if o.stage == 'masked':
        kind = 'mdlm'
    return Path(o.out or beside / STUDENTS[kind])


def check_stage(o):
    """Refuse options that would change nothing in a run of this kind; the preset comes later."""
    for stage, names in ONLY_FOR.items():
        for name in names:
            if o.stage != stage and getattr(o, name) is not None:
                fail(f'{as_flag(name)}: is for {FOR_WHOM[stage]}; leave it out here')
    for name in ('optimiser', 'muon_lr', 'beta2'):
        if o.stage == 'score' and getattr(o, name) is not None:
            fail(f'{as_flag(name)}: score distillation runs on Adam; leave it out here')


def check_ranges(o):
    """Refuse numbers that would leave nothing to learn from."""
    if o.leg == 0:
        fail('--leg 0: the teacher would not be asked; give more, up to 1')
    # one value would be no noise, thousands would be as good as any value
    if o.noise_values == 1 or o.noise_values > 1000:
        fail(f'--noise-values {o.noise_values}: must be from 2 to 1000, or 0 for any value')


def prepare(o):
    """Everything that a run needs, checked before anything is written."""
    rank, world, device = start_processes(o)

    # the models that are learnt from say what kind of run it is, and so which preset
    path = find_teacher(o.teacher)
    teacher, teacher_ckpt = load_teacher(path, device)
    o.teacher = str(path)
    guide = load_guide(o, teacher, device)
    o.stage = stage_of(o, teacher)
    check_stage(o)
    apply_preset(o, device, PRESETS, o.stage)
    check_shares(o)
    check_ranges(o)

    # the data say how many rows and targets fit into memory
    automatic = not o.parts
    set_parts(o, world)
    meta, train, val = load_same_data(o, teacher_ckpt)
    if o.stage == 'score' and o.parts != world:
        fail('--parts: score distillation takes as many as there are processes; leave it out')
    if o.stage != 'score' and automatic:
        more_parts(o, meta, device)
    if o.stage == 'flow map' and o.method == 'rollout':
        fit_lessons(o, meta, rank)

    # what a checkpoint says of its parents, by which a run that goes on knows them
    parents = {'teacher': {'path': o.teacher, 'crc': zlib.crc32(path.read_bytes()),
                           'options': teacher_ckpt['options']}}
    if o.guide:
        parents['guide'] = {'crc': zlib.crc32(checkpoint_path(o.guide).read_bytes())}
    out = folder_of(o, path, meta)
    ckpt = check_out(out, o, meta, **parents)
    # a round is a share of all iterations
    if o.stage == 'masked' and ckpt is not None and ckpt['options']['iters'] != o.iters:
        fail(f'--resume: the rounds of {out} are of --iters {ckpt["options"]["iters"]}; give that')
    about = dict(meta=meta, options=vars(o), **parents)
    return Run(rank, world, device, teacher, guide, train, val, out, ckpt, about)


def batch_of(it, stage, o, run):
    """What an iteration is to learn from: tokens and given (B, L), and times for each row."""
    cpu = generator('cpu', o.seed, it, 0)
    tokens, given, _ = get_batch(run.train, run.about['meta'], o.batch, o.given, cpu, run.device)
    return tokens, given, stage.times(o.batch, cpu)


def make_lessons_again(stage, start, o, run):
    """Of a run that goes on: the lessons that it had, if its parts and its device are the same."""
    # of this process's parts
    mine = stage.lessons[run.rank::run.world]
    it = 0
    while it < start and not all(lessons.full() for lessons in mine):
        tokens, given, times = batch_of(it, stage, o, run)
        for rows, rng in parts_of(o, it, run.rank, run.world, run.device):
            with autocast(run.device):
                stage.examples(tokens[rows], given[rows], [x[rows] for x in times], rng)
        it += 1


def write_checkpoint(run, it, modules, best, optimisers, means):
    """
    <out>/model.pt, by the first process: all that the run needs to go on. `ema` there are the
    averaged weights to keep, `average` those of now.
    """
    if run.rank > 0:
        return
    others = {name: module.state_dict() for name, module in modules.items() if name != 'model'}
    save(run.out / 'model.pt', modules['model'], best.model, optimisers, iter=it,
         quality=best.quality, means=means.sums, **others, **run.about)


def main(o):
    run = prepare(o)
    meta = run.about['meta']
    torch.manual_seed(o.seed)
    # the student is in training mode, so targets that it makes know dropout, too
    student = build_student(run.teacher, run.guide, o)
    stage, optimisers = make_stage(student, run.guide, run.teacher, o)
    ema = copy.deepcopy(student).requires_grad_(False).eval()
    modules = {'model': student, 'average': ema, **others_of(stage)}
    start = 0
    means = Means()
    if run.ckpt is not None:
        restore(run.ckpt, modules, optimisers)
        start = run.ckpt['iter']
        means = Means(run.ckpt['means'], run.device)
    best = Best(ema, o, run.ckpt)
    compile_on_gpu(o, run.device, [student, run.guide, run.teacher, *others_of(stage).values()])
    if o.stage == 'flow map':
        make_lessons_again(stage, start, o, run)
    log = Log(run.out, o.iters, start, o.batch * meta['length'])
    stopper = Stopper()
    cpu = torch.device('cpu')
    _, known, _ = get_batch(run.val, meta, 200, 0.0, generator('cpu', 1, 1), cpu)
    print(f'{o.preset} preset: {o.stage} of {o.teacher}, {o.iters:,} iterations of {o.batch} rows, '
          f'{run.world} x {run.device}; data {o.data} -> {run.out}')

    for it in range(start, o.iters + 1):
        stop = it == o.iters or stopper.asked()
        due = it % o.eval_every == 0 and it > start
        log_due = it % 100 == 0 and it > start

        # log
        if log_due or due or stop:
            means.check(it, run.out)
        if log_due:
            log.record(it, **means.record())
            means = Means()

        # save, only then measure, and save anew if these weights are the best
        if due or stop:
            write_checkpoint(run, it, modules, best, optimisers, means)
        if due or it == o.iters:
            quality = measure(ema, known, meta, o, it, log)
            if best.see(quality, it, run.out):
                write_checkpoint(run, it, modules, best, optimisers, means)
        if stop:
            break

        # batch, forward and backward, step
        if o.stage == 'masked':
            stage.start_round(it, ema)
        batch = batch_of(it, stage, o, run)
        backward(stage, student, batch, it, o, run, means)
        # the fake's optimiser has had its turn in the loss
        own = optimisers[:1] if o.stage == 'score' else optimisers
        norm = update(student, ema, own, it, o)
        means.add({'norm': sum_and_number(norm[None])})
        log.progress(it + 1, means.loss)

    print(f'wrote {run.out}/model.pt and {run.out}/log.jsonl')
    print(advice(o, run.out, it, meta, run.val))


def advice(o, out, it, meta, val):
    """What to run next, for a shell."""
    if it < o.iters:
        return f'stopped at iteration {it}; the same command with --resume goes on'
    words = [*to_sample(out, meta, val), '--compare', o.teacher]
    if o.stage == 'masked':
        words += ['--nfe', str(o.fewest)]
    return 'next: ' + as_command(words)


if __name__ == '__main__':
    options = parse()
    run_script(lambda: main(options))
