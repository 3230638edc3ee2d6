"""Distil a teacher into a student that writes in one network call.

    python distill.py                                   # out/pydocs/teacher -> out/pydocs/student
    python distill.py out/dates/teacher --iters 6000
    python distill.py out/dates/teacher --method lagrangian

The student is the teacher plus a second time: it learns the flow map delta_{s,t}, the straight jump
from any time s to any later t, and delta_{0,1} turns noise into text. Data, network and tokenizer
come from the teacher's checkpoint. Writes <out>/model.pt and <out>/log.jsonl.
"""
import copy
from dataclasses import dataclass, replace
from pathlib import Path

from prepare_data import fail, parse


@dataclass
class Options:
    teacher: str = 'out/pydocs/teacher'     # folder or model.pt of the teacher
    out: str = ''               # folder for model.pt and log.jsonl; default student, beside it
    data: str = ''              # folder made by prepare_data.py; default: the teacher's
    method: str = 'semigroup'   # semigroup | lagrangian | eulerian: where the middle time u lies
    leg: float = 0.1            # length of the teacher's leg in tau, as a share of t - s
    diagonal: float = 0.5       # share of rows at s = t
    boundary: float = 0.2       # of the others, share at (s, t) = (0, 1): the one-call map itself
    teacher_diagonal: bool = True   # at s = t learn from the teacher; else from data alone
    iters: int = 700            # optimiser iterations
    batch: int = 64             # rows per iteration
    optimiser: str = 'muon'     # muon (AdamW for all but the blocks' matrices) | adamw
    lr: float = 2e-3            # peak learning rate of AdamW
    muon_lr: float = 0.01       # peak learning rate of Muon
    warmup: int = 50            # iterations of linear warm-up
    decay: float = 0.6          # last share of the run, over which the rates fall linearly to 0
    ema: float = 0.999          # decay of the averaged weights, which samples are drawn with
    eval_every: int = 500       # iterations between samples at 1, 2 and 4 calls; each one saves
    resume: bool = False        # go on from <out>/model.pt
    seed: int = 0               # of batches and noise
    device: str = ''            # cpu, cuda or mps; default the best there is
    compile: bool = True        # torch.compile, on CUDA only


OPTIONS = parse(Options, positional='teacher') if __name__ == '__main__' else None

import numpy as np  # noqa: E402
import torch  # noqa: E402

from model import (OneHotFlow, autocast, generator, load, pick_device,  # noqa: E402
                   row_cross_entropy, save, semigroup_weight)
from sample import draw_rows, health  # noqa: E402
from train_teacher import (Log, get_batch, load_data, optimisers, restore, state,  # noqa: E402
                           update)


def time_pairs(B, o, rng, device):
    """(tau_s, tau_t), each (B,), and n: rows :n lie at s = t, some at (0, 1), the rest between.

    Between: t - s ~ U(0, 1) and s ~ U(0, 1 - (t - s)), as in arXiv:2602.16813.
    """
    n = round(B * o.diagonal)
    edge = n + max(1, round((B - n) * o.boundary)) if o.boundary else n
    u = torch.rand(2, B, generator=rng, device=device)
    s, t = u[1] * (1 - u[0]), u[1] * (1 - u[0]) + u[0]
    s[:n] = t[:n] = (u[0, 0] + torch.arange(n, device=device) / max(1, n)) % 1      # stratified
    s[n:edge], t[n:edge] = 0, 1
    return s, t, n


@torch.no_grad()
def flow_map_target(student, teacher, h, given, s, t, o):
    """What delta_{s,t}(h) should be, from two shorter legs s -> u -> t: (B, L, V), rows sum to 1.

    semigroup   u in the middle, both legs by the student
    lagrangian  u close to t, the last leg by the teacher:  delta_{u,t} ~ D_u
    eulerian    u close to s, the first leg by the teacher: delta_{s,u} ~ D_s
    One formula for the three (Eq. of semigroup_weight), no derivative, and always in the simplex.
    """
    share = {'semigroup': 0.5, 'lagrangian': 1 - o.leg, 'eulerian': o.leg}[o.method]
    u = s + share * (t - s)
    first = teacher(h, given, s) if o.method == 'eulerian' else student.net(h, given, s, u)
    first = first.softmax(-1)
    h_u = student.jump(h, first, given, s, u)
    last = teacher(h_u, given, u) if o.method == 'lagrangian' else student.net(h_u, given, u, t)
    g = semigroup_weight(*(student.t_of(x)[:, None, None] for x in (s, u, t)))      # 0 at t = 1
    return g * first + (1 - g) * last.softmax(-1)


def main(o):
    if o.method not in ('semigroup', 'lagrangian', 'eulerian'):
        fail(f'--method {o.method}: use semigroup, lagrangian or eulerian')
    device = pick_device(o.device)
    teacher, ckpt = load(o.teacher, device)
    if teacher.config.two_time:
        fail(f'{o.teacher} is a student already; run: python distill.py FOLDER_OF_ITS_TEACHER')
    folder = Path(o.teacher) if Path(o.teacher).is_dir() else Path(o.teacher).parent
    out = Path(o.out) if o.out else folder.with_name('student')
    data = o.data or ckpt['options']['data']
    meta, train, val = load_data(data)
    if meta['tokenizer'] != ckpt['meta']['tokenizer'] or meta['length'] != ckpt['meta']['length']:
        fail(f'{data} is not what {o.teacher} was trained on; name that folder by --data')

    torch.manual_seed(o.seed)
    student = OneHotFlow(replace(teacher.config, two_time=True, dropout=0.0)).to(device)
    # the second time starts at zero, so that the student starts as its teacher
    student.load_state_dict({**student.state_dict(), **teacher.state_dict()})
    # the embedding spans the space both networks read and write: shared, so never trained
    student.net.embed.requires_grad_(False)
    teacher.requires_grad_(False)
    ema = copy.deepcopy(student).requires_grad_(False).eval()
    opts = optimisers(student, o)
    start = restore(out, student, ema, opts) if o.resume else 0
    if o.compile and device.type == 'cuda':
        student.net.compile(), teacher.net.compile()
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out, o, start)
    if o.teacher_diagonal:
        D = teacher.net
    else:       # self-distillation: the student's own diagonal is the denoiser
        def D(h, given, tau): return student.net(h, given, tau, tau)

    sums = torch.zeros(3, device=device)
    for it in range(start, o.iters + 1):
        last = it == o.iters
        if (it % o.eval_every == 0 and it > start) or last:
            for nfe in (1, 2, 4):
                rows, _ = draw_rows(ema, meta, val, 200, nfe, seed=1)
                log(it, nfe=nfe, **health(rows, meta, data))
            save(out / 'model.pt', student, ema, teacher=ckpt['options'],
                 **state(opts, it, meta, o))
        if last:
            break
        cpu, rng = generator('cpu', o.seed, it, 0), generator(device, o.seed, it, 1)
        tokens, given, _ = get_batch(train, meta, o.batch, ckpt['options']['given'], cpu, device)
        s, t, n = time_pairs(o.batch, o, rng, device)
        with autocast(device):
            h = student.corrupt(tokens, given, s, rng)
            target = flow_map_target(student, D, h[n:], given[n:], s[n:], t[n:], o)
            if o.teacher_diagonal:
                with torch.no_grad():
                    diagonal = D(h[:n], given[:n], s[:n]).softmax(-1)
            else:
                diagonal = torch.nn.functional.one_hot(tokens[:n], meta['vocab']).float()
            target = torch.cat([diagonal, target])
            losses = row_cross_entropy(student.net(h, given, s, t), target, given)
        losses.mean().backward()
        norm = update(student, ema, opts, it, o)
        same, edge = torch.arange(o.batch, device=device) < n, t - s == 1
        kinds = torch.stack([same, edge, ~(same | edge)])
        sums += (kinds * losses.detach()).sum(1) / kinds.sum(1).clamp(min=1)
        if (it + 1) % 100 == 0:
            diag, one, rest = (sums / 100).tolist()
            if not np.isfinite(diag + one + rest):
                fail(f'no finite loss at iteration {it + 1}; lower --lr and --muon-lr, --resume')
            log(it + 1, diagonal=diag, between=rest, one_call=one, norm=norm.item())
            sums.zero_()
    print(f'wrote {out}/model.pt and {out}/log.jsonl')
    print(f'next: python sample.py {out} --compare {o.teacher}')


if __name__ == '__main__':
    main(OPTIONS)
