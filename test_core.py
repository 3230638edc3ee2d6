"""Everything that can silently go wrong, on a CPU in minutes, without data or network."""
import io
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import fields, replace
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import pytest
import sacrebleu
import torch
from torch.nn.functional import cross_entropy

import bench
import distill
import prepare_data
import sample
import train_teacher
from model import (Config, ancestral, bridge, build, ddim, encoding, interpolate, jump, load,
                   noise_level, time_axis, write_dataset, write_rows)

HERE, DOUBLE = Path(__file__).parent, torch.float64
README = (HERE / 'README.md').read_text(encoding='utf-8')
def tiny(vocab=12, length=6, seed=0, **more):       # a small model; its head is not zero any more
    torch.manual_seed(seed)
    model = build(Config(vocab, length, layers=2, heads=2, width=32, cond=16, **more))
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model.eval()
def run(script, **options):
    script.main(script.Options(**options))

@pytest.mark.parametrize('K, spots', [(27, (.106, .669, .823)), (65, (.179, .702, .832)),
                                      (4096, (.547, .784, .859)), (50257, (.646, .809, .870))])
def test_spot_values_of_the_papers_time_axis_and_schedule(K, spots):
    ts, taus = time_axis(K)
    for tau, t in zip((.01, .5, .99), spots):
        assert abs(interpolate(torch.tensor(tau, dtype=DOUBLE), taus, ts).item() - t) < 1e-3
    for i, ratio in (0, .122), (100, .527), (500, .99), (1000, 1.54), (1490, 2.5), (1999, 2225):
        a, s = noise_level(torch.tensor(1 - (i + 1) / 2000, dtype=DOUBLE))
        assert abs(s / a - ratio) < 0.005 * ratio

def test_dense_equals_projected_on_the_same_noise():
    model, t = tiny(vocab=80), 0.3          # V > D: noise goes through the Cholesky factor
    E, B, L = model.net.embed.detach(), 3, 6
    covariance, want = torch.cov(model.begin(torch.full((2000, 6), -1)).flatten(0, 1).T), E.T @ E
    assert (covariance - want).abs().max() < 0.08 * want.diagonal().max()
    eps, onehot = torch.randn(B, L, 80), torch.eye(80)[tokens := torch.randint(80, (B, L))]
    z = torch.linalg.solve(model.noise_factor(99).T, (eps @ E).transpose(1, 2)).transpose(1, 2)
    projected = jump(z @ model.noise_factor(99), E[tokens], torch.tensor(0.), torch.tensor(t))
    assert torch.allclose((x := (1 - t) * eps + t * onehot) @ E, projected, atol=1e-4)
    p, s, u = torch.rand(B, L, 80).softmax(-1), torch.tensor(t), torch.tensor(.6)   # Euler, too
    assert torch.allclose(jump(x, p, s, u) @ E, jump(projected, p @ E, s, u), atol=1e-4)

# ---- Flow map, on a flow whose denoiser is known: one position, K tokens of prior pi ----
def exact_denoiser(x, t):       # D_t(x)_k ~ pi_k exp(t x_k / (1-t)^2): Bayes, x = (1-t) eps + t e_k
    return (torch.tensor([.5, .3, .2], dtype=DOUBLE).log() + t * x / (1 - t) ** 2).softmax(-1)
def exact_map(x, s, t, calls=4000):     # X_{s,t}(x): midpoint method, dx/dr = (D_r(x) - x)/(1-r)
    for a, b in torch.linspace(s, t, calls + 1, dtype=DOUBLE).unfold(0, 2, 1):
        y, m = x + (b - a) / 2 * (exact_denoiser(x, a) - x) / (1 - a), (a + b) / 2
        x = x + (b - a) * (exact_denoiser(y, m) - y) / (1 - m)
    return x
def exact_delta(x, s, t):
    return x + (1 - s) * (exact_map(x, s, t) - x) / (t - s)
class ExactNet:     # for both networks of a distillation; h is x itself (E = identity), tau is t
    def __call__(self, h, given, tau, tau_to=None):
        return torch.stack([exact_denoiser(x, s) if tau_to is None else exact_delta(x, s, r)
                            for x, s, r in zip(h, tau, tau if tau_to is None else tau_to)]).log()
    predict = __call__
    t_of = staticmethod(lambda tau: tau)
    jump = staticmethod(lambda h, p, given, s, t: jump(h, p, s[:, None, None], t[:, None, None]))

@pytest.mark.parametrize('method, leg, tolerance', [
    ('semigroup', .5, 1e-6), ('lagrangian', .01, .01), ('eulerian', .01, .01)])
def test_distillation_targets_are_right_at_the_exact_flow_map(method, leg, tolerance):
    x = torch.randn(2, 4, 3, dtype=DOUBLE)
    s, t = torch.tensor([.0, .2], dtype=DOUBLE), torch.tensor([.9, .6], dtype=DOUBLE)
    target = distill.flow_map_target(ExactNet(), ExactNet(), x, None, s, t, method, leg)
    want = torch.stack([exact_delta(*args) for args in zip(x, s, t)])
    assert torch.allclose(target, want, atol=tolerance) and (target.sum(-1) - 1).abs().max() < 1e-9
    for a, b, steady, n in (s, t, False, 400), (s, t, True, 100), (0 * s, 0 * t + .999, False, 400):
        want = torch.stack([exact_delta(*args) for args in zip(x, a, b)])
        rolled = distill.rollout(ExactNet(), ExactNet(), x, None, a, b, n, steady)
        assert torch.allclose(rolled, want, atol=.01)

def test_balance_lets_one_call_write_tokens_as_often_as_the_data():
    model, nothing, meta = tiny(two_time=True), torch.full((2000, 6), -1), dict(length=6, vocab=12)
    model.net.head.bias.data[3] += 2
    for power, low, high in (0, .4, 1), (.2, .08, .14):
        distill.balance(model, distill.count(np.arange(6000) % 10, meta, 1)[0], nothing, power, 8)
        assert low < (write_rows(model, nothing, 1) == 3).float().mean() < high

def test_a_row_is_read_with_its_neighbours():
    often, pairs, links = distill.count(np.array([0, 1, 0, 1, 0, 2]), dict(length=3, vocab=8), .5)
    assert (often[:3] * 6).round().tolist() == [3, 2, 1] and pairs.tolist() == [-1, 1, 2, 8]
    assert torch.allclose(links, torch.tensor([-5, *map(math.log, (1.5, 3, 3))]) / 2)
    model, p, given = tiny(8, 4, bigrams=4), torch.rand(1, 4, 8), torch.tensor([[-1, -1, 2, -1]])
    model.pairs, model.links = pairs, 3 * torch.randn(4)
    rows = torch.cartesian_prod(*[torch.arange(8)] * 2, torch.tensor([2]), torch.arange(8))
    at = (pairs == (8 * rows[:, :-1] + rows[:, 1:])[..., None]).int().argmax(-1)    # 0: unseen
    score = p[0, torch.arange(4), rows].log()[:, [0, 1, 3]].sum(1) + model.links[at].sum(1)
    assert torch.equal(model.read(p, given)[0], rows[score.argmax()])

def test_bridge_mean_and_variance():
    s, t, x_s = torch.tensor(.3), torch.tensor(.7), .7 * torch.randn(400_000) + .3      # e = 1
    x_t, a = bridge(x_s, 1, s, t, torch.randn(400_000)), s / t * ((1 - t) / (1 - s)) ** 2
    # marginal at t, and the covariance of a path that forgets its noise: Cov(x_s, x_t) = a Var(x_s)
    assert abs(x_t.mean() - .7) < .005 and abs(x_t.std() - .3) < .005
    assert abs(((x_t - .7) * (x_s - .3)).mean() - a * .49) < .005

def test_measured_axis_lets_tau_rise_as_the_loss_falls():
    old = (model := tiny()).taus.clone()
    model.loss = lambda tokens, given, tau, rng: 1 - tau ** 2
    model.refit(torch.full((2, 6), -1), None, seed=0)
    assert torch.allclose(model.taus, .5 * old ** 2 + .5 * old, atol=2e-3)
    assert (model.taus.diff() > 0).all() and model.taus[0] == 0 and model.taus[-1] == 1

def test_loss_and_its_gradient_against_brute_force(monkeypatch):
    model = tiny(vocab=5, length=4)
    tokens, given = torch.tensor([[1, 2, 3, 0], [4, 4, 0, 1]]), torch.full((2, 4), -1)
    given[0, :2], tau, rng = tokens[0, :2], torch.tensor([.3, .8]), torch.Generator()
    h = model.corrupt(tokens, given, tau, rng.manual_seed(0))
    onehot, dense = torch.eye(5)[tokens], model.predict(h, given, tau).log_softmax(-1)
    for model.config.squared, brute in ((True, (dense.exp() - onehot).square().sum(-1)),
                                        (False, -(onehot * dense).sum(-1))):
        brute = torch.stack([brute[0, 2:].mean(), brute[1].mean()])
        assert torch.allclose(model.loss(tokens, given, tau, rng.manual_seed(0)), brute, atol=1e-5)
    monkeypatch.setattr('model.CHUNK', {'cpu': 5 * 3})      # three positions at a time
    nats = [model.predict(h, given, tau, target=x) for x in (tokens, onehot)]
    model.net.compile(backend='aot_eager')      # and so does what torch.compile makes of it
    nats += [model.predict(h, given, tau, target=x) for x in (tokens, onehot)]
    want, *found = ((x, *torch.autograd.grad(x.mean(), [*model.net.parameters()][1:],
                                             retain_graph=True)) for x in (brute, *nats))
    assert all(torch.allclose(a, b, atol=1e-5) for x in found for a, b in zip(want, x))
    pytest.raises(RuntimeError, nats[0][0].backward)        # all rows count alike, or none

def test_fresh_student_equals_its_teacher_and_the_average_forgets_its_start():
    teacher, student = tiny(), build(replace(tiny().config, two_time=True)).eval()
    student.load_state_dict({**student.state_dict(), **teacher.state_dict()})
    h, given, s = torch.randn(3, 6, 32), torch.full((3, 6), -1), torch.tensor([0., .4, .9])
    assert torch.equal(teacher.predict(h, given, s), student.predict(h, given, s, s))
    ema, o = tiny(seed=1), train_teacher.Options(ema=.5, optimiser='adamw', lr=0.)
    want, _ = 0.1 * ema.net.embed + 0.9 * teacher.net.embed, teacher.net.embed.sum().backward()
    train_teacher.update(teacher, ema, train_teacher.optimisers(teacher, o), 0, o)
    assert torch.allclose(ema.net.embed, want, atol=1e-6)
    with mock.patch('torch.optim.Muon', None, create=True):     # as before torch 2.9
        assert len(train_teacher.optimisers(teacher, train_teacher.Options())) == 1

@torch.no_grad()
def test_autoregression_sees_no_later_token_and_its_cache_is_exact():
    model, tokens = tiny(model='ar', code=4), torch.randint(8, (3, 6))
    before = torch.cat([torch.full((3, 1), 11), tokens[:, :-1]], 1)         # <bos> is the first
    cache, at_once = torch.empty(2, 2, 3, 2, 6, 16), model.predict(before)
    one_by_one = [model.predict(before[:, i:i + 1], cache=cache, at=i) for i in range(6)]
    assert torch.allclose(torch.cat(one_by_one, 1), at_once, atol=1e-5)
    nats = cross_entropy(at_once.mT, tokens, reduction='none').mean(1)
    assert torch.allclose(model.loss(tokens, torch.full((3, 6), -1)), nats, atol=1e-5)

def test_masked_diffusion_weighs_what_is_masked_and_writes_it_all():
    model, tokens = tiny(model='mdlm'), torch.randint(8, (4000, 6))
    given = torch.where(torch.arange(6) < 2, tokens, -1)
    model.net.head.requires_grad_(False).weight.zero_(), model.net.head.bias.zero_()    # no choice
    assert abs(model.loss(tokens, given, torch.full((4000,), .7)).mean() - math.log(12)) < .1
    out = write_rows(model, given, 3)[:, 2:].flatten()
    assert (torch.bincount(out, minlength=12)[:10] / 16000 - .1).abs().max() < .02

@pytest.mark.parametrize('move', [ddim, lambda *how: ancestral(*how, torch.randn_like(how[0]))])
def test_strided_samplers_reach_the_modes_of_an_exact_teacher(move):
    x_s = torch.randn(2000)
    for s, t in torch.linspace(0, 1, 501).unfold(0, 2, 1):      # data: -1 or 1, equally likely
        x = torch.tanh(noise_level(s)[0] * x_s / noise_level(s)[1] ** 2)
        x_s = move(x_s, x, s, t)
    assert (x.abs() > 0.95).float().mean() >= 0.95 and abs((x > 0).float().mean() - .5) < .05

def test_score_gap_has_half_the_fisher_gradient_on_a_gaussian():
    (n, z), a, s = torch.randn(2, 400_000, 1, 1, dtype=DOUBLE), .6, .8
    theta = torch.tensor(-.5, dtype=DOUBLE, requires_grad=True)
    x_t = a * (x := theta + .7 * n) + s * z
    real, fake = (mean + a * var / (a * a * var + s * s) * (x_t - a * mean)     # E[x | x_t] for
                  for mean, var in ((1.0, 1.0), (theta.detach(), .49)))         # x ~ N(mean, var)
    fisher = -2 * (1 - theta.item()) * (1 - a * a / (a * a + s * s)) ** 2     # of E|real - fake|^2
    def gradient(x, loss='sid'):
        loss = distill.score_gap(x, real, fake, 0.5, loss).mean()
        return torch.autograd.grad(loss, theta, retain_graph=True)[0].item()
    assert abs(gradient(x) - fisher / 2) < 0.01
    assert gradient(x.detach()) > 0 > gradient(x, 'dmd')       # detached it runs away from the data

@pytest.mark.parametrize('kind, how', [
    *(('flm', {key: x}) for key, x in (('gamma', 0.), ('gamma', .7), ('gamma', 1.),
        ('temperature', 2.), ('sampler', 'bridge'), ('sampler', 'ab2'))), ('mdlm', {}), ('ar', {}),
    *(('diffuseq', {'sampler': x}) for x in ('ddim', 'ancestral'))])
def test_given_tokens_come_back_and_special_ids_are_never_written(kind, how):
    model, tokens = tiny(model=kind), torch.randint(8, (50, 6))
    given = torch.where(torch.rand(50, 6) < 0.3, tokens, -1)
    (model.bias if kind == 'diffuseq' else model.net.head.bias).data[-2:] += 10     # loves <sep>
    out = write_rows(model, given, 3, **how)
    assert (out == tokens)[given >= 0].all() and out[given < 0].max() < 10

@pytest.fixture(scope='module')
def dozen(tmp_path_factory):
    """A dozen rows, six dates in two forms each, through the real scripts' main()."""
    folder, every = tmp_path_factory.mktemp('dozen'), prepare_data.dates()
    assert len(every) == 73049 * 8 == len(set(every)) and every[-1][0] == '2099-12-31'
    days = ['1987-03-23', '2001-12-04', '1912-08-30', '2076-10-15', '1944-06-11', '2033-01-27']
    pairs = [(day, prepare_data.date_forms(day)[form]) for day in days for form in (1, 6)]
    spec = prepare_data.make_tokenizer('dates', [x for pair in every[::97] for x in pair])
    rows, _ = prepare_data.pack_rows(encoding(spec), pairs, 23)
    write_dataset(folder / 'data', rows, rows, spec, kind='rows', pairs=True, length=23)
    o = dict(device='cpu', batch=32, eval_every=10 ** 6)
    run(train_teacher, data=f'{folder}/data', out=f'{folder}/teacher', iters=300, layers=2,
        width=64, code=2, axis='1', **o)
    for more in (dict(iters=150), dict(guide=f'{folder}/student', iters=200)):
        run(distill, teacher=f'{folder}/teacher', lr=4e-3, muon_lr=0.03, **more, **o)
    return folder

def test_overfit_a_dozen_rows_in_one_call(dozen):
    meta, train, _ = train_teacher.load_data(dozen / 'data')
    known = train_teacher.up_to(sample.as_rows(train, 23).repeat(40, 1), meta, '<sep>')
    before, after = (sample.health(sample.write(load(dozen / x)[0], known, 1, 0)[0], meta)['valid']
                     for x in ('teacher', 'one-call'))
    assert after >= max(0.95, before + 0.2), (before, after)        # .69 and .97 in trials

@pytest.mark.parametrize('script, more', [(train_teacher, dict(data='data', layers=1, dropout=.1)),
    (distill, dict(teacher='teacher', method='lagrangian')),
    (distill, dict(teacher='teacher', guide='student'))])
def test_stopped_and_resumed_is_never_stopped(dozen, tmp_path, monkeypatch, script, more):
    monkeypatch.chdir(dozen)
    o, calls, update = dict(device='cpu', batch=4, iters=120, eval_every=110), [], script.update
    run(script, out=f'{tmp_path}/a', **o, **more)
    def stopping(*args):
        calls.append(len(calls) == 49 and os.kill(os.getpid(), signal.SIGTERM))
        return update(*args)
    monkeypatch.setattr(script, 'update', stopping)
    for resume in False, True:
        run(script, out=f'{tmp_path}/b', resume=resume, **o, **more)
    assert len(calls) == 120 and tensors(tmp_path / 'a') == tensors(tmp_path / 'b')
    a, b = ([re.sub('"seconds": .*?,', '', x) for x in open(tmp_path / f'{y}/log.jsonl')
             if '"iter": 50,' not in x] for y in 'ab')
    assert a == b and len(a) > 1
def tensors(folder):        # as bytes, all in its checkpoint: weights, average, optimisers, counts
    with zipfile.ZipFile(folder / 'model.pt') as z:
        return [z.read(name) for name in z.namelist() if '/data/' in name]

@pytest.mark.parametrize('n', [3, pytest.param(25, marks=pytest.mark.slow)])
def test_kill_at_any_moment(dozen, tmp_path, n):
    context, rng, last = multiprocessing.get_context('forkserver'), random.Random(0), 0
    context.set_forkserver_preload(['torch'])           # so that a child is at work soon
    o = dict(data=f'{dozen}/data', device='cpu', batch=4, layers=1, width=32, eval_every=2)
    path, saved = tmp_path / 'out/model.pt', 0
    for _ in range(n):
        one = train_teacher.Options(out=f'{tmp_path}/out', resume=last > 0, iters=10 ** 6, **o)
        (child := context.Process(target=train_teacher.main, args=(one,))).start()
        while child.is_alive() and not (path.exists() and path.stat().st_mtime_ns > saved):
            time.sleep(0.1)
        time.sleep(2 * rng.random()), child.kill(), child.join()
        assert all(json.loads(line) for line in open(tmp_path / 'out/log.jsonl'))
        saved, last, before = path.stat().st_mtime_ns, load(path)[1]['iter'], last
        assert last > before and len([*path.parent.iterdir()]) <= 3         # one .tmp at most

@pytest.mark.parametrize('n', [12, pytest.param(200, marks=pytest.mark.slow)])
def test_damage_is_noticed(dozen, n):
    rng, files = random.Random(0), [dozen / 'teacher/model.pt', *(dozen / 'data').glob('*.*')]
    before = tensors(dozen / 'teacher')
    for i in range(n):
        at = rng.randrange(len(whole := (path := files[i % 4]).read_bytes()))
        flip = whole[:at] + bytes([whole[at] ^ 1 << i % 8]) + whole[at + 1:]
        path.write_bytes((whole[:at], flip, whole[:at] + bytes(64) + whole[at + 64:])[i // 4 % 3])
        try:            # a bit of no importance may differ, if the tensors do not
            load(files[0]), train_teacher.load_data(dozen / 'data')
            assert path == files[0] and tensors(dozen / 'teacher') == before
        except SystemExit as e:
            assert e.code == 2
        path.write_bytes(whole)

def test_two_runs_a_full_disk_and_numbers_that_are_none(dozen, tmp_path, capsys):
    o = dict(data=f'{dozen}/data', out=f'{tmp_path}', device='cpu', batch=4, layers=1, width=32)
    run(train_teacher, iters=2, **o)
    before, nan = tensors(tmp_path), [torch.tensor(math.nan)] * 9
    for name, effect, said in (('os.fsync', OSError(28, 'No space left'), 'No space left'),
                               ('fcntl.lockf', OSError(11, 'Busy'), 'another run'),
                               ('torch.nn.utils.clip_grad_norm_', nan, 'not finite')):
        with pytest.raises(SystemExit), mock.patch(name, side_effect=effect):
            run(train_teacher, iters=3, **o)
        assert said in capsys.readouterr().err and tensors(tmp_path) == before

def test_two_processes_train_as_one_with_two_parts_and_resume(dozen, tmp_path, monkeypatch):
    monkeypatch.chdir(dozen), torch.set_num_threads(1)          # as torchrun gives each process
    monkeypatch.setattr('distill.CHUNK', {'cpu': 23 * train_teacher.load_data('data')[0]['vocab']})
    for script, key, flag, n in (train_teacher, 'data', '--data', 2), (distill, 'teacher', '', 0):
        one, two, o = tmp_path / f'{key}-1', tmp_path / f'{key}-2', '--device cpu --batch 8 --iters'
        run(script, **{key: key}, device='cpu', batch=8, iters=20, parts=n, out=str(one))
        line = [*f'{sys.executable} -m torch.distributed.run --nproc_per_node=2'.split(),
                script.__file__, *f'{flag} {key} {o} 20 --eval-every 10 --out {two}'.split()]
        child = subprocess.Popen(line)
        while child.poll() is None and not (two / 'model.pt').exists():
            time.sleep(0.01)
        half, status = (two / 'model.pt').read_bytes(), child.wait()
        a, b, whole = load(one)[1]['model'], load(two)[1]['model'], tensors(two)
        assert status == 0 and all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
        (two / 'model.pt').write_bytes(half), subprocess.run([*line, '--resume'], check=True)
        assert tensors(two) == whole and torch.load(io.BytesIO(half))['iter'] == 10
def prepared(path, name, **options):    # what prepare_data.py makes: meta, train and val, decoder
    run(prepare_data, name=name, input=(str(path),), data=str(path.parent), **options)
    meta, *ids = train_teacher.load_data(path.parent / name)
    return meta, *ids, encoding(meta['tokenizer'])

def test_prepare_text_pairs_and_lm1b_from_a_parquet_file(tmp_path):
    text = 'The cat sat on the mat. The dog sat on the \u00e9\u4e16.\r\n' * 40 + 'x' * 10 ** 7
    (path := tmp_path / 'a.txt').write_text(text, encoding='utf-8')
    meta, train, val, enc = prepared(path, 'toy', tokenizer='bpe:300', length=8, val=0.2)
    row = sample.known_row(meta, enc, sample.Options(infill='a _ b'), '')[0]   # one hole, one token
    assert enc.decode(row[row >= 0].tolist()) == 'a b' and (row[:3] < 0).tolist() == [0, 1, 0]
    assert enc.decode([*train, *val]) == text.replace('\r\n', '\n') + '<eos>'
    assert enc.decode(enc.encode_ordinary('Any bytes: \u2603')) == 'Any bytes: \u2603'
    (vocab := tmp_path / 'vocab.txt').write_text('[UNK]\nthe\ncat\nun\n##able\n.')
    enc = encoding(prepare_data.make_tokenizer(f'bert:{vocab}', []))
    assert prepare_data.encode(enc, 'The unable C\u00e1t.') == [1, 3, 4, 2, 5]
    (path := tmp_path / 'b.jsonl').write_text('\n'.join(
        json.dumps({'src': f'what is {i}', 'trg': f'tell me {i // 2}'}) for i in range(50)))
    meta, *ids, enc = prepared(path, 'pairs', tokenizer='byte', length=24)
    train, val = (sample.to_texts(sample.as_rows(x, 24), meta, enc) for x in ids)
    assert all(target == f'tell me {int(source[8:]) // 2}' for source, target in train + val)
    assert set(sum(train, ())).isdisjoint(sum(val, ()))
    texts, path = ['He said , " it \'s $ 5 ( not 6 ) . "'] * 50, tmp_path / 'c.parquet'
    datasets.Dataset.from_dict({'text': texts}).to_parquet(path)
    _, train, val, enc = prepared(path, 'lm1b', tokenizer='byte', length=16)
    clean = enc.decode([*train, *val])
    assert len(val) == len(train) // 9 and clean == 'He said, "it\'s $5 (not 6)."<eos>' * 50

def test_score_distillation_leaves_teacher_embedding_and_rounding_alone(dozen, tmp_path):
    o, path = dict(device='cpu', iters=3, eval_every=2, batch=8), f'{tmp_path}/teacher'
    run(train_teacher, model='diffuseq', data=f'{dozen}/data', out=path, layers=2, width=32, **o)
    run(distill, teacher=path, adversarial=1e-4, **o)
    a, b = (load(tmp_path / who)[0] for who in ('teacher', 'student'))
    assert torch.equal(a.net.embed, b.net.embed) and torch.equal(a.bias, b.bias)
    assert b.begin(torch.full((2, 6), -1)).var(1).max() < 1e-9      # one noise for all positions
    assert not torch.equal(a.net.head.weight, b.net.head.weight)

def test_text_distances_by_hand_and_against_repetition():
    assert abs(bench.jensen_shannon('aab', 'abb') - math.log(32 / 27) / 3) < 1e-9
    texts = 'the cat sat on the mat today', ['the cat sat on the red mat']
    theirs = sacrebleu.sentence_bleu(*texts, smooth_method='none', tokenize='none')
    assert abs(bench.bleu(*texts) - theirs.score / 100) < 1e-6
    # each of 40 words is followed by few others: a text whose perplexity is known exactly
    chain = (rng := np.random.default_rng(0)).dirichlet(np.full(40, .2), 40)
    real, other = ([[w := 0] + [w := int(rng.choice(40, p=chain[w])) for _ in range(23)]
                    for _ in range(400)] for _ in range(2))
    def nats(row):
        return -np.mean([np.log(chain[a, b]) for a, b in zip(row, row[1:])])
    fooling = sorted((row[:12] * 2 for row in real), key=nats)[:7] * 57     # likely n-grams again
    assert np.mean([*map(nats, fooling)]) < np.mean([*map(nats, real)])     # fluent, it seems
    assert sample.entropy_of(fooling[0]) > 0.7 * sample.entropy_of(real[0])     # and healthy
    assert abs(bench.energy_distance(other, real)) < 0.1 < bench.energy_distance(fooling, real)
    grams = [[g for row in rows for g in bench.ngrams(row, 3)] for rows in (real, other, fooling)]
    assert bench.jensen_shannon(grams[2], grams[0]) > 2 * bench.jensen_shannon(grams[1], grams[0])

@pytest.fixture
def call(monkeypatch, capsys):
    def call(line, stdin=''):       # a command line, as it is typed -> (status, stdout, stderr)
        name, *more = line.split()
        monkeypatch.setattr(sys, 'argv', [str(HERE / name), *more])
        monkeypatch.setattr(sys, 'stdin', io.StringIO(stdin))
        with pytest.raises(SystemExit) as end:
            runpy.run_path(sys.argv[0], run_name='__main__'), sys.exit(0)
        return end.value.code, *capsys.readouterr()
    return call

def test_bad_input_is_one_line_and_exit_2_and_good_input_is_not(dozen, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    files = {'no.txt': b'', 'bad.txt': bytes(range(256)), 'good.txt': b'A b. ' * 99, 'no.pt': b'no'}
    assert all(Path(name).write_bytes(x) == len(x) for name, x in files.items())
    evil = type('', (), {'__reduce__': lambda _: (os.mkdir, ('owned',))})()     # when it is loaded
    torch.save({'format': 9}, 'new.pt'), torch.save({'format': 1, 'ema': evil}, 'evil.pt')
    one, of = f'sample.py {dozen}/student --source', 'prepare_data.py x --input'
    lines = f'''prepare_data.py nonsense; prepare_data.py --nonsense 1; sample.py no.pt; bench.py;
        sample.py new.pt; sample.py evil.pt; sample.py missing; {of} missing.txt; {of} no.txt;
        {of} bad.txt; {of} good.txt --tokenizer words; prepare_data.py ../x --input good.txt;
        train_teacher.py --axis magic; train_teacher.py --warmup 0; train_teacher.py --heads 3;
        train_teacher.py --layers 0; train_teacher.py --dropout 1; distill.py {dozen}/student;
        distill.py {dozen}/teacher --guide {dozen}/teacher; distill.py missing; distill.py --leg 2;
        distill.py --rollout 0; {one} 1 --compare {dozen}/teacher --mbr 2; bench.py train 1,9;
        bench.py speed a --nfe x; sample.py {dozen}/student --prompt 1; {one} {'1-' * 30}; {one} 1~;
        {one} 1 --sampler bridge; {one} 1 --gamma 2; {one} 1 --compare {dozen}/student'''.split(';')
    for script in prepare_data, train_teacher, distill, sample, bench:
        text = ' '.join(call(f'{script.__name__}.py -h')[1].split())
        for f in fields(script.Options):        # every one is in -h, every number is checked
            name, huge = f.name.replace('_', '-'), '9' * 400    # as a file's name, too
            wrong = ('x', '-1', 'nan', huge) if f.type in (int, float) else (huge,)
            assert name in text and f'[{f.default}]' in text
            if script is not prepare_data or f.type is int:     # else it works first, then fails
                lines += [f'{script.__name__}.py --{name} {x}' for x in wrong]
    for line in lines:
        status, out, err = call(line)
        assert status == 2 and err.count('\n') == 1 and not out, (line, out, err)
    found = {str(p) for x in ('*', 'data/*') for p in Path().glob(x)}
    assert found == {*files, 'new.pt', 'evil.pt', 'data', 'data/cache'}         # nothing "owned"
    status, out, _ = call(f'sample.py {dozen}/student --n 1', '1987-03-23\n2001-12-04\n')
    assert [x.split(' -> ')[0] for x in out.splitlines()] == ['1987-03-23', '2001-12-04']

def test_commands_of_readme_and_makefile(call, monkeypatch):
    text = (README + (HERE / 'Makefile').read_text()).replace('\\\n', '').replace('$(PY)', 'python')
    found = re.findall(r'(?:python|=8) (\w+)\.py([^#`&|\n]*)', re.sub(r'\$+\w', '1', text))  # $D
    free = dict(prepare_data='name', sample='checkpoint', distill='teacher', bench='what')
    for name, more in found:
        monkeypatch.setattr(sys, 'argv', [name, *shlex.split(more)])
        prepare_data.parse(globals()[name].Options, free.get(name, ''))
    assert len(found) > 40 and all(call('sample.py' + more)[0] == 0 for _, more in found[:2])

def test_snippets_of_the_readme():
    teach, distil, sampler = re.findall(r'```python\n(.*?)```', README, re.S)
    model, tokens, given = tiny(80, two_time=True), torch.randint(9, (8, 6)), torch.full((8, 6), -1)
    model.net.head.bias.data[-2:], _ = -30, model.rare.uniform_()   # <sep>, <bos> are never written
    rng, *same = (torch.Generator().manual_seed(0) for _ in range(3))
    def net(h, *at):
        return model.predict(h, given, *(x + torch.zeros(8) for x in at))
    says = dict(torch=torch, B=8, u=.3, tokens=tokens, E=model.net.embed, net=net, student=net,
                teacher=net, R=model.noise_factor(48), z=torch.randn(8, 6, 32, generator=rng),
                read=lambda p: model.read(p, given), t_of=lambda x: model.t_of(x)[:, None, None],
                jump=lambda h, p, *at: model.jump(h, p, given, *at),
                cross_entropy=lambda x, y: cross_entropy(x.mT, y if y.ndim == 2 else y.mT))
    exec(teach, says)
    assert torch.allclose(says['loss'], model.loss(tokens, given, says['tau'], same[0]).mean())
    s, t = says['start'], says['end'] = torch.tensor([[.2], [.8]]).expand(2, 8)
    exec(distil, says)
    want = distill.rollout(model, model.predict, says['h'], given, s, t, 8)
    assert torch.allclose(says['target'], want, atol=1e-6)
    exec(sampler, says)
    assert torch.equal(says['text'], write_rows(model, given, 1, same[1], temperature=.5))

BUDGET = {'model.py': 600, 'train_teacher.py': 300, 'distill.py': 350, 'sample.py': 220,
          'prepare_data.py': 300, 'bench.py': 350, 'test_core.py': 450, 'README.md': 250}
def test_budgets_and_width():
    for name, limit in BUDGET.items():
        lines, page = (HERE / name).read_text(encoding='utf-8').split('\n')[:-1], 'md' in name
        assert len(lines) <= limit, f'{name}: {len(lines)} lines, budget {limit}'
        assert page or max(map(len, lines)) <= 100 and f'`{name}` | {len(lines)} |' in README, name
    assert {p.name for p in HERE.glob('*.py')} <= set(BUDGET)
