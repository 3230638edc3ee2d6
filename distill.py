"""Distil a teacher into a student that writes in one network call.

    python distill.py                                   # out/pydocs/teacher -> out/pydocs/student
    python distill.py out/dates/teacher --guide out/dates/student       # a student, once more
    python distill.py out/dates-diffuseq/teacher        # a teacher trained with --model diffuseq

A flow's student is the teacher plus a second time: it learns delta_{s,t}, the text to aim at in one
jump from time s to a later t; delta_{0,1} turns noise into text. A diffusion's is a generator
trained by score distillation. Writes <out>/model.pt and <out>/log.jsonl.
"""
import copy
import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from prepare_data import fail, parse

@dataclass
class Options:
    teacher: str = 'out/pydocs/teacher'     # folder or model.pt of the teacher
    out: str = ''               # folder to write to; default student, beside it (--guide: one-call)
    data: str = ''              # folder made by prepare_data.py; default: the teacher's
    method: str = 'rollout'     # flow: rollout | lagrangian | semigroup | eulerian: flow_map_target
    rollout: int = 8            # flow: teacher's calls to copy, by other methods only for (0, 1)
    leg: float = 0.1            # flow: length of the teacher's leg in tau, as a share of t - s
    diagonal: float = 0.25      # flow: share of rows at s = t
    boundary: float = 0.5       # flow: of the others, share at (s, t) = (0, 1), the one-call map
    temperature: float = 0.75   # flow: of the teacher at tau = 1, to which it falls from 1
    balance: float = 0.2        # flow: power in weighing one call's tokens, see balance; 0: none
    bigrams: float = 0.5        # flow: weight of the data's pairs of neighbours in a call's text
    guide: str = ''             # a frozen student: a copy learns its jump and a look in one call
    noises: int = 3             # --guide: noises per row, of which the hardest is learnt
    loss: str = 'sid'           # diffuseq: sid | dmd, see score_gap
    alpha: float = 1.0          # diffuseq, sid: quality against diversity, 0.5 to 1.2
    fake_ratio: int = 1         # diffuseq: updates of the fake denoiser for each of the student
    adversarial: float = 0.0    # diffuseq: weight of the critic; with --guide: its stage 2
    score_lr: float = 3e-4      # diffuseq: learning rate of both networks (Adam)
    row_noise: bool = True      # diffuseq: all positions see one noise, so need not agree on theirs
    iters: int = 250            # optimiser iterations
    batch: int = 64             # rows per iteration, of all processes together
    parts: int = 0              # parts of a batch; 0: one for each process, or as memory needs
    optimiser: str = 'muon'     # muon (AdamW for all but the blocks' matrices) | adamw
    lr: float = 2e-3            # peak learning rate of AdamW
    muon_lr: float = 0.01       # peak learning rate of Muon
    warmup: int = 50            # iterations of linear warm-up
    decay: float = 0.6          # last share of the run, over which the rates fall linearly to 0
    ema: float = 0.999          # decay of the averaged weights, which samples are drawn with
    eval_every: int = 200       # iterations between samples at 1, 2 and 4 calls; each one saves
    resume: bool = False        # go on from <out>/model.pt
    seed: int = 0               # of batches and noise
    device: str = ''            # cpu, cuda or mps; default the best there is
    compile: bool = True        # torch.compile, on CUDA only

OPTIONS = parse(Options, positional='teacher') if __name__ == '__main__' else None

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from model import CHUNK, build, cool, is_student, load, row_mean, save, share_of  # noqa: E402
from sample import as_rows, health, write  # noqa: E402
from train_teacher import (Log, add_up, autocast, generator, get_batch, join,  # noqa: E402
                           load_data, optimisers, restore, update)

# ---- FMLM: the flow map, learnt from the teacher and from the student's own shorter legs ----
def time_pairs(B, o, rng, device):
    """(tau_s, tau_t), each (B,), n and edge: rows :n lie at s = t, n:edge are to be rolled out.
    Some lie at (0, 1), others at t - s ~ U(0, 1), s ~ U(0, 1 - (t - s)), as in arXiv:2602.16813."""
    n = round(B * o.diagonal)
    edge = min(B, n + max(1, round((B - n) * o.boundary))) if o.boundary else n
    u = torch.rand(2, B, generator=rng, device=device)
    s, t = u[1] * (1 - u[0]), u[1] * (1 - u[0]) + u[0]
    s[:n] = t[:n] = (u[0, 0] + torch.arange(n, device=device) / max(1, n)) % 1      # stratified
    s[n:edge], t[n:edge] = 0, 1
    return s, t, n, B if o.method == 'rollout' else edge if o.rollout else n

def semigroup_weight(student, *taus):
    """g in delta_{s,t}(x) = g delta_{s,u}(x) + (1-g) delta_{u,t}(X_{s,u}(x)), arXiv:2602.16813."""
    s, u, t = (student.t_of(tau)[:, None, None] for tau in taus)
    return (1 - t) * (u - s) / ((1 - u) * (t - s)).clamp(min=1e-9)

@torch.no_grad()
def flow_map_target(student, teacher, h, given, s, t, method, leg):
    """What delta_{s,t}(h) should be, from two shorter legs s -> u -> t: (B, L, V), rows sum to 1.
    lagrangian  u close to t, the last leg by the teacher:  delta_{u,t} ~ D_u
    eulerian    u close to s, the first leg by the teacher: delta_{s,u} ~ D_s
    semigroup   u in the middle, both legs by the student
    One formula for the three (see semigroup_weight), no derivative, and always in the simplex."""
    u = s + {'semigroup': 0.5, 'lagrangian': 1 - leg, 'eulerian': leg}[method] * (t - s)
    first = teacher(h, given, s) if method == 'eulerian' else student.predict(h, given, s, u)
    first = first.softmax(-1)
    h_u = student.jump(h, first, given, s, u)
    last = teacher(h_u, given, u) if method == 'lagrangian' else student.predict(h_u, given, u, t)
    g = semigroup_weight(student, s, u, t)                                          # 0 at t = 1
    return g * first + (1 - g) * last.softmax(-1)

def rollout(student, teacher, h, given, s, t, calls, steady=False):
    """delta_{s,t}(h), as the teacher finds it in so many calls from s to t: (B, L, V).
    steady: its guess changes evenly along tau, and may go on as it changed last (sampler ab2)."""
    p = mean = 0
    for i in range(calls):
        now, then = (s + (t - s) * k / calls for k in (i, i + 1))
        p, last = teacher(h, given, now).softmax(-1), p
        way = p + 0.5 * (p - last) if steady and 0 < i < calls - 1 else p
        h = student.jump(h, way, given, now, then)
        g = semigroup_weight(student, s, now, then)
        mean = g * mean + (1 - g) * way
    return mean

def cooled(teacher, T):
    """The teacher's D_tau(h), logits (B, L, V), at a temperature that falls, see model.cool."""
    return lambda h, given, tau: cool(teacher.predict(h, given, tau), tau[:, None, None], T)

def flow_map(student, teacher, o):
    """The student's loss of one iteration, as a function of tokens, given and generator."""
    D, steady = cooled(teacher, o.temperature), student.config.axis == 'measured'
    def losses(tokens, given, rng):
        s, t, n, edge = time_pairs(len(tokens), o, rng, tokens.device)
        h = student.corrupt(tokens, given, s, rng)
        with torch.no_grad():
            still, roll, between = zip(*(x.split([n, edge - n, len(h) - edge])
                                         for x in (h, given, s, t)))
            target = [D(*still[:3]).softmax(-1)] if n else []
            target += [rollout(student, D, *roll, o.rollout, steady)] if n < edge else []
            if edge < len(h):       # taught by its own legs the student may drift off its teacher
                target.append(flow_map_target(student, D, *between, o.method, o.leg))
        loss = student.predict(h, given, s, t, torch.cat(target))               # (B,)
        groups = {'diagonal': loss[:n], 'rollout': loss[n:edge], 'between': loss[edge:]}
        return loss.mean(), {k: x.detach().mean() for k, x in groups.items() if len(x)}
    return losses

# ---- DLM-One: score distillation of a diffusion into a generator ----
START = 1 - 1491 / 2000     # where the generator's noise lies: s/a = 2.5, as in SiD

def score_gap(x, real, fake, alpha=1.0, loss='sid'):
    """What the student minimises at each position, up to a weight: (B, L, C) three times -> (B, L).
    x is generated; `real` and `fake` are what the teacher and the fake denoiser guess it was, from
    x_t. Where both guess the same, at all noise levels, the student writes as the data do.
    sid  (1 - alpha) |real - fake|^2 + (real - fake).(fake - x), arXiv:2404.04057, with gradient
         through all three. Its mean is (1 - alpha) E|real - fake|^2: no progress meter.
    dmd  the gradient fake - real on x alone, arXiv:2311.18828"""
    if loss == 'dmd':
        return ((fake - real).detach() * x).mean(-1)
    gap = real - fake
    return ((1 - alpha) * gap.square() + gap * (fake - x)).mean(-1)

class Fake(torch.nn.Module):
    """The fake denoiser psi, which follows what the student writes, with a critic in its middle."""
    def __init__(self, teacher):
        super().__init__()
        self.model = copy.deepcopy(teacher).requires_grad_(True)
        # embeddings and rounding stay the teacher's
        self.model.net.embed.requires_grad_(False), self.model.bias.requires_grad_(False)
        self.critic = torch.nn.Linear(teacher.config.width, 1)      # real or generated?
        middle = self.model.net.blocks[(teacher.config.layers - 1) // 2]
        middle.register_forward_hook(lambda block, inputs, y: setattr(self, 'middle', y))

    def forward(self, x_t, given, t):
        """The clean x it sees in x_t (B, L, C), and per row the logit of "real" (B,)."""
        x = self.model.predict(x_t, given, t)
        return x, row_mean(self.critic(self.middle)[..., 0], given)

def score_distillation(student, teacher, fake, fake_opt, o, device):
    """The student's loss of one iteration, as a function; it first lets the fake catch up."""
    def losses(tokens, given, rng):
        clean = student.net.embed.detach()[tokens].float()                      # (B, L, C)
        for _ in range(o.fake_ratio):
            with torch.no_grad():
                x = student.generate(student.begin(given, rng), given)
            t = torch.rand(len(tokens), generator=rng, device=device)
            seen, logit = fake(student.corrupt(x, clean, given, t, rng), given, t)
            loss = row_mean((seen - x).square().mean(-1), given).mean()
            if o.adversarial:
                real = clean + student.GRAIN * student.noise(clean, rng)
                _, logit_real = fake(student.corrupt(real, clean, given, t, rng), given, t)
                loss = loss + (F.softplus(-logit_real) + F.softplus(logit)).mean()
            fake_opt.zero_grad(set_to_none=True)
            (loss / o.parts).backward()
            add_up([p.grad for p in fake.parameters() if p.grad is not None])
            fake_opt.step()

        x = student.generate(student.begin(given, rng), given)
        t = 0.02 + 0.96 * torch.rand(len(tokens), generator=rng, device=device)
        x_t = student.corrupt(x, clean, given, t, rng)
        real, (seen, logit) = teacher.predict(x_t, given, t), fake(x_t, given, t)
        gap = row_mean((real - seen).detach().square().mean(-1), given)
        # rows far from what the teacher sees would drown the others
        weight = 1 / row_mean((x - real).detach().abs().mean(-1), given).clamp(min=1e-5)
        loss = (weight * row_mean(score_gap(x, real, seen, o.alpha, o.loss), given)).mean()
        loss = loss + (o.adversarial * F.softplus(-logit).mean() if o.adversarial else 0)
        return loss, {'gap': gap.mean(), 'fake_error': row_mean(
            (seen - x).detach().square().mean(-1), given).mean()}
    return losses

# ---- Both: a student at rest, the guide, settles what one call leaves open ----
def one_call(student, h, given, target=None):
    """Its logits (B, L, V) of the text that noise h (B, L, C) stands for; or nats."""
    if student.config.two_time:
        start = torch.zeros_like(h[:, 0, 0])
        return student.predict(h, given, start, start + 1, target)
    return student.round(student.generate(h, given), target, share_of(given))

@torch.no_grad()
def hardest(student, given, n, rng):
    """For each row, of n noises the one whose text the student is least sure of: h (B, L, C)."""
    tries = [student.begin(given, rng) for _ in range(n)]
    sure = torch.stack([row_mean(one_call(student, h, given).log_softmax(-1).amax(-1), given)
                        for h in tries])                                        # (n, B)
    return torch.stack(tries)[sure.argmin(0), torch.arange(len(given), device=given.device)]

def settle(student, guide, teacher, o):
    """The loss of a copy of the guide: one call is to do what guide and teacher do in several.
    A flow: the guide jumps to tau = 1 - leg and the teacher looks. A diffusion: the guide's text is
    noised to t = 0.5, 0.65, 0.8, for three looks. Between two texts a student that learns from
    itself goes on mixing; the guide does not move, so the one it prefers can be learnt. Far from
    such ties nothing is open: hence the hardest of n."""
    def losses(tokens, given, rng):
        h = hardest(student, given, o.noises, rng)
        s = torch.zeros_like(h[:, 0, 0])
        with torch.no_grad():
            if student.config.two_time:
                goal = flow_map_target(guide, cooled(teacher, o.temperature), h, given, s, s + 1,
                                       'lagrangian', o.leg)
            else:
                x = guide.net.embed[one_call(guide, h, given).argmax(-1)]
                for t in (s + 0.5, s + 0.65, s + 0.8):
                    x = teacher.predict(teacher.corrupt(x, h, given, t, rng), given, t)
                goal = teacher.round(x).softmax(-1)
        loss = one_call(student, h, given, goal).mean()
        return loss, {'one_call': loss.detach()}
    return losses

# ---- The script ----
def count(ids, meta, weight):
    """How often each token comes (V,), all neighbours a b in a row as a V + b, rising, and
    weight * log(how many times as often as by chance); the first of both is for all others."""
    rows, V = as_rows(ids[:10 ** 7], meta['length']), meta['vocab']
    often = torch.bincount(rows.flatten(), minlength=V) / rows.numel()
    pairs, times = (rows[:, :-1] * V + rows[:, 1:]).unique(return_counts=True)
    links = (times / times.sum() / often[pairs // V] / often[pairs % V]).log().clamp(-5, 5)
    return often, F.pad(pairs, (1, 0), value=-1), weight * F.pad(links, (1, 0), value=-5.0)

def balance(student, often, known, power, rounds):
    """Weigh tokens, in student.rare, so that one call writes each about as often as the data do:
    p is divided by a power of the frequency, then corrected by what is written in each round."""
    student.rare.copy_((often + 1e-5) ** -power)
    for i in range(rounds if power else 0):
        text = write(student, known, 1, i)[0].flatten()
        ratio = (1 + often * len(text)) / (1 + torch.bincount(text, minlength=len(often)))
        student.rare *= ratio.clamp(1 / 3, 3).pow(0.3).to(student.rare)

def main(o):
    methods = 'rollout', 'lagrangian', 'semigroup', 'eulerian'
    if o.method not in methods or o.loss not in ('sid', 'dmd'):
        fail(f'--method {o.method}: use {", ".join(methods)}; --loss {o.loss}: sid or dmd')
    if (not (o.method == 'rollout') <= o.rollout <= 1000 >= o.noises >= 1 or o.temperature > 100
            or o.temperature < .01 or max(o.leg, o.diagonal, o.boundary, o.balance, o.bigrams) > 1):
        fail('--rollout, --noises: from 1 to 1000; --temperature: from 0.01 to 100; '
             '--leg, --diagonal, --boundary, --balance, --bigrams: to 1')
    auto, (rank, world, device, stopped) = not o.parts, join(o)
    teacher, ckpt = load(o.teacher, device)
    if is_student(teacher.config) or teacher.config.model not in ('flm', 'diffuseq'):
        fail(f'{o.teacher}: distil a teacher of flm or diffuseq, made by: python train_teacher.py')
    folder = Path(o.teacher) if Path(o.teacher).is_dir() else Path(o.teacher).parent
    out = Path(o.out) if o.out else folder.parent / ('one-call' if o.guide else 'student')
    meta, train, val = load_data(data := o.data or ckpt['options']['data'])
    if meta['tokenizer'] != ckpt['meta']['tokenizer'] or meta['length'] != ckpt['meta']['length']:
        fail(f'{data} is not what {o.teacher} was trained on; name that folder by --data')

    torch.manual_seed(o.seed)
    flow, others = teacher.requires_grad_(False).config.model == 'flm', {}
    # a flow's targets are dense: so many parts that (rows, L, V) of each fits, with rows enough
    least = o.batch * meta['length'] * meta['vocab'] / 4 / CHUNK[device.type]
    while auto and flow and o.parts < least and o.batch % (8 * o.parts) == 0:
        o.parts *= 2
    guide = load(o.guide, device)[0].requires_grad_(False) if o.guide else None
    if guide and not (is_student(guide.config) and guide.net.embed.equal(teacher.net.embed)):
        fail(f'--guide {o.guide}: needs a student of {o.teacher}; make it without --guide')
    often, pairs, links = count(train, meta, o.bigrams) if flow else (None, [], None)
    one = dict(two_time=True) if flow else dict(start=START, row_noise=o.row_noise)
    config = guide.config if guide else replace(teacher.config, dropout=0, **one)
    student = build(replace(config, bigrams=len(pairs) * (o.bigrams > 0))).to(device)
    # a flow map's second time starts at zero, so that every student starts as its teacher
    old = {**(guide or teacher).state_dict(), 'pairs': pairs, 'links': links}
    student.load_state_dict({name: old.get(name, x) for name, x in student.state_dict().items()})
    # the embedding spans the space both networks read and write: shared, so never trained
    for name, p in student.named_parameters():
        p.requires_grad_(name not in ('net.embed', 'bias'))
    # with the critic a guide is no guide, but where stage 2 starts; its fake is the teacher again
    if flow or guide and not o.adversarial:
        opts = optimisers(student, o)
        losses = settle(student, guide, teacher, o) if guide else flow_map(student, teacher, o)
    else:
        fake = others['fake'] = Fake(teacher).to(device)
        if o.parts != world:
            fail('--parts: score distillation takes as many as there are processes; leave it out')
        opts = [torch.optim.Adam(m.parameters(), o.score_lr, (0.0, 0.999)) for m in (student, fake)]
        losses = score_distillation(student, teacher, fake, opts[1], o, device)
    ema = copy.deepcopy(student).requires_grad_(False).eval()
    kept = restore(out, student, ema, opts, **others) if o.resume else {}
    start, best, sums = kept.get('iter', 0), kept.get('best', 0.0), Counter(kept.get('sums'))
    if o.compile and device.type == 'cuda':
        for model in filter(None, (student, guide, teacher)):
            model.net.compile()
    log = Log(out, o, start) if rank == 0 else lambda it, **values: None
    known = get_batch(val, meta, 200, 0.0, generator('cpu', 1, 1), torch.device('cpu'))[1]

    for it in range(start, o.iters + 1):
        hundred, due = (it % n == 0 and it > start for n in (100, o.eval_every))
        stop = it == o.iters or stopped(it)
        if (hundred or due or stop) and not all(x.isfinite() for x in sums.values()):
            fail(f'loss or gradient not finite by iteration {it}; lower the learning rates, and '
                 f'--resume goes on from the last save in {out}')
        if hundred:
            log(it, **{name: x.item() / 100 for name, x in sums.items()}), sums.clear()
        if due or stop:
            if flow:        # from nothing but what is saved with it: a resumed run ends alike
                balance(ema, often, known.repeat(3, 1), o.balance, 24 if stop else 8)
            for nfe in (4, 2, 1):
                one = health(write(ema, known, nfe, 1)[0], meta, data)
                log(it, nfe=nfe, **one)
            # score distillation may swing, so its best weights are kept; a flow map's are the last
            quality = math.prod(one.get(k, 1) for k in ('valid', 'form_entropy', 'words', 'unique'))
            if flow or quality >= best:
                best = quality
                rank == 0 and save(
                    out / 'model.pt', student, ema, opts, iter=it, meta=meta, options=asdict(o),
                    teacher=ckpt['options'], best=best, sums=dict(sums),
                    **{name: m.state_dict() for name, m in others.items()})
            elif quality < best / 2:
                fail(f'degenerated at iteration {it}: {out}/model.pt keeps the best weights; lower '
                     'the learning rates or raise --fake-ratio')
        if stop:
            break
        cpu = generator('cpu', o.seed, it, 0)
        batch = get_batch(train, meta, o.batch, ckpt['options']['given'], cpu, device)
        for part in range(rank, o.parts, world):
            tokens, given, _ = (x.chunk(o.parts)[part] for x in batch)
            with autocast(device):
                loss, seen = losses(tokens, given, generator(device, o.seed, it, 1 + part))
            # not into the fake denoiser, whose own turn is past
            (loss / o.parts).backward(inputs=[p for p in student.parameters() if p.requires_grad])
            sums.update({name: x * world / o.parts for name, x in seen.items()})
        sums.update(norm=update(student, ema, opts[:1] if others else opts, it, o))
    print(f'wrote {out}/model.pt and {out}/log.jsonl')
    print(f'stopped at iteration {it}; the same command with --resume goes on' if it < o.iters else
          f'next: python sample.py {out} --compare {o.teacher}' + meta['pairs'] * ' --source "..."')

if __name__ == '__main__':
    main(OPTIONS)
