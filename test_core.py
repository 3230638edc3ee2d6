"""Everything that can silently go wrong, on a CPU in three minutes, without data or network.

    make test        (or: pytest -q test_core.py)
"""
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import sacrebleu
import torch

import bench
import distill
import prepare_data
import sample
import train_teacher
from distill import semigroup_weight
from model import (Config, ancestral, bridge, build, ddim, encoding, interpolate, jump, load,
                   noise_level, row_cross_entropy, time_axis, write_dataset, write_rows)

HERE, DOUBLE = Path(__file__).parent, torch.float64

def tiny(vocab=12, length=6, seed=0, **more):
    """A small model whose head is not zero any more."""
    torch.manual_seed(seed)
    model = build(Config(vocab, length, layers=2, heads=2, width=32, cond=16, **more))
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model.eval()

def no_given(B, L):
    return torch.full((B, L), -1)

@pytest.mark.parametrize('K, spots', [(27, (.106, .669, .823)), (65, (.179, .702, .832)),
                                      (4096, (.547, .784, .859)), (50257, (.646, .809, .870))])
def test_time_axis_spot_values(K, spots):
    ts, taus = time_axis(K)
    for tau, t in zip((.01, .5, .99), spots):
        assert abs(interpolate(torch.tensor(tau, dtype=DOUBLE), taus, ts).item() - t) < 1e-3

def test_dense_equals_projected_on_the_same_noise():
    model, t = tiny(vocab=80), 0.3          # V > D: noise goes through the Cholesky factor
    E, B, L = model.net.embed.detach(), 3, 6
    covariance, want = torch.cov(model.begin(no_given(2000, 6)).flatten(0, 1).T), E.T @ E
    assert (covariance - want).abs().max() < 0.08 * want.diagonal().max()
    eps, tokens = torch.randn(B, L, 80), torch.randint(80, (B, L))
    onehot = torch.nn.functional.one_hot(tokens, 80).float()
    z = torch.linalg.solve(model.noise_factor().T, (eps @ E).transpose(1, 2)).transpose(1, 2)
    projected = jump(z @ model.noise_factor(), E[tokens], torch.tensor(0.), torch.tensor(t))
    x = (1 - t) * eps + t * onehot
    assert torch.allclose(x @ E, projected, atol=1e-4)
    # an Euler step taken in R^V and then projected is the step taken on h
    p, s, u = torch.rand(B, L, 80).softmax(-1), torch.tensor(t), torch.tensor(.6)
    assert torch.allclose(jump(x, p, s, u) @ E, jump(projected, p @ E, s, u), atol=1e-4)

# ---- Flow map, on a flow whose denoiser is known: one position, K tokens of prior pi ----

PRIOR = torch.tensor([0.5, 0.3, 0.2], dtype=DOUBLE)

def exact_denoiser(x, t):
    """D_t(x)_k ~ pi_k exp(t x_k / (1-t)^2): Bayes for x = (1-t) eps + t e_k."""
    return (PRIOR.log() + t * x / (1 - t) ** 2).softmax(-1)

def exact_map(x, s, t, calls=4000):
    """X_{s,t}(x) by Heun's method on dx/dr = (D_r(x) - x)/(1-r)."""
    def v(x, r):
        return (exact_denoiser(x, r) - x) / (1 - r)
    grid = torch.linspace(s, t, calls + 1, dtype=DOUBLE)
    for a, b in zip(grid[:-1], grid[1:]):
        k = v(x, a)
        x = x + (b - a) / 2 * (k + v(x + (b - a) * k, b))
    return x

def exact_delta(x, s, t):
    """delta_{s,t}(x) = x + (1-s) (X_{s,t}(x) - x) / (t-s)."""
    return x + (1 - s) * (exact_map(x, s, t) - x) / (t - s)

def test_flow_map_and_its_identity_on_the_exact_ode():
    torch.manual_seed(0)
    x = torch.randn(64, 3, dtype=DOUBLE)
    s, u, t = (torch.tensor(v, dtype=DOUBLE) for v in (0.1, 0.4, 0.8))
    delta = exact_delta(x, s, t)
    assert delta.min() > -1e-6 and torch.allclose(delta.sum(-1), torch.ones(64, dtype=DOUBLE))
    assert torch.allclose(jump(x, delta, s, t), exact_map(x, s, t), atol=1e-9)
    assert torch.equal(jump(x, delta, s, s), x)
    assert semigroup_weight(s, u, torch.tensor(1., dtype=DOUBLE)) == 0

class ExactNet:
    """Stands in for both networks of a distillation; h is x itself (E = identity), tau is t."""

    def __call__(self, h, given, tau, tau_to=None):
        rows = [exact_denoiser(x, s) if tau_to is None else exact_delta(x, s, r)
                for x, s, r in zip(h, tau, tau if tau_to is None else tau_to)]
        return torch.stack(rows).log()

    predict = __call__
    t_of = staticmethod(lambda tau: tau)
    jump = staticmethod(lambda h, p, given, s, t: jump(h, p, s[:, None, None], t[:, None, None]))

@pytest.mark.parametrize('method, leg, tolerance', [
    ('semigroup', .5, 1e-6), ('lagrangian', .01, .01), ('eulerian', .01, .01)])
def test_distillation_targets_are_right_at_the_exact_flow_map(method, leg, tolerance):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, dtype=DOUBLE)
    s, t = torch.tensor([.0, .2], dtype=DOUBLE), torch.tensor([.9, .6], dtype=DOUBLE)
    target = distill.flow_map_target(ExactNet(), ExactNet(), x, no_given(2, 4), s, t, method, leg)
    want = torch.stack([exact_delta(*args) for args in zip(x, s, t)])
    assert torch.allclose(target, want, atol=tolerance)
    assert torch.allclose(target.sum(-1), torch.ones(2, 4, dtype=DOUBLE))
    last = distill.rollout(ExactNet(), ExactNet(), x, no_given(2, 4), 400)
    want = exact_delta(x, torch.tensor(.0, dtype=DOUBLE), torch.tensor(.999, dtype=DOUBLE))
    assert torch.allclose(last, want, atol=.01)

def test_bridge_mean_and_variance():
    torch.manual_seed(0)
    t, s, n = torch.tensor(.3), torch.tensor(.7), 400_000
    x_t = .7 * torch.randn(n) + .3                      # e = 1
    x_s = bridge(x_t, torch.ones(n), t, s, torch.randn(n))
    # marginal at s, and the covariance of a path that forgets its noise: Cov(x_s, x_t) = a Var(x_t)
    assert abs(x_s.mean() - .7) < .005 and abs(x_s.std() - .3) < .005
    a = t / s * ((1 - s) / (1 - t)) ** 2
    assert abs(((x_s - .7) * (x_t - .3)).mean() - a * .49) < .005

def test_measured_axis_lets_tau_rise_as_the_loss_falls():
    model = tiny(axis='measured')
    old = model.taus.clone()
    model.refit(1 - ((torch.arange(64) + .5) / 64) ** 2)        # the loss at tau is 1 - tau^2
    assert torch.allclose(model.taus, .5 * old ** 2 + .5 * old, atol=2e-3)
    assert (model.taus.diff() > 0).all() and model.taus[0] == 0 and model.taus[-1] == 1

def test_loss_against_brute_force():
    model = tiny(vocab=5, length=4)
    tokens, given = torch.tensor([[1, 2, 3, 0], [4, 4, 0, 1]]), no_given(2, 4)
    given[0, :2] = tokens[0, :2]
    tau = torch.tensor([.3, .8])
    loss = model.loss(tokens, given, tau, torch.Generator().manual_seed(0))
    h = model.corrupt(tokens, given, tau, torch.Generator().manual_seed(0))
    p = model.predict(h, given, tau).softmax(-1).detach()
    for b, positions in enumerate(([2, 3], [0, 1, 2, 3])):
        brute = -sum(math.log(p[b, i, tokens[b, i]]) for i in positions) / len(positions)
        assert abs(loss[b].item() - brute) < 1e-5
    onehot = torch.nn.functional.one_hot(tokens, 5).float()
    assert torch.allclose(row_cross_entropy(p.log(), onehot, given), loss, atol=1e-5)

def test_student_equals_teacher_at_the_start():
    teacher, student = tiny(), build(replace(tiny().config, two_time=True)).eval()
    student.load_state_dict({**student.state_dict(), **teacher.state_dict()})
    h, given, s = torch.randn(3, 6, 32), no_given(3, 6), torch.tensor([0., .4, .9])
    assert torch.equal(teacher.predict(h, given, s), student.predict(h, given, s, s))

def test_autoregression_sees_no_later_token_and_its_cache_is_exact():
    model, tokens = tiny(model='ar', code=4), torch.randint(8, (3, 6))
    before = torch.cat([torch.full((3, 1), 11), tokens[:, :-1]], 1)         # <bos> is the first
    with torch.no_grad():
        cache, at_once = torch.empty(2, 2, 3, 2, 6, 16), model.predict(before)
        one_by_one = [model.predict(before[:, i:i + 1], cache, i) for i in range(6)]
    assert torch.allclose(torch.cat(one_by_one, 1), at_once, atol=1e-5)
    nats = -at_once.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    assert torch.allclose(model.token_loss(tokens), nats, atol=1e-5)

def test_masked_diffusion_weighs_what_is_masked_and_writes_it_all():
    model, tokens = tiny(model='mdlm'), torch.randint(8, (4000, 6))
    given = torch.where(torch.arange(6) < 2, tokens, -1)
    with torch.no_grad():
        for p in model.parameters():                        # all tokens equally likely
            p.zero_()
        loss = model.loss(tokens, given, torch.full((4000,), .7), torch.Generator().manual_seed(0))
    assert abs(loss.mean() - math.log(12)) < .1     # three in ten masked, each counts 1 / (1 - t)
    out = write_rows(model, given, 3, torch.Generator().manual_seed(0))
    assert (out[:, :2] == tokens[:, :2]).all() and (out >= 0).all()
    assert (torch.bincount(out[:, 2:].flatten(), minlength=12)[:10] / 16000 - .1).abs().max() < .02

# ---- DiffuSeq and DLM-One ----

@pytest.mark.parametrize('i, ratio', [(0, .122), (100, .527), (500, .99), (1000, 1.54),
                                      (1490, 2.5), (1850, 5.0), (1999, 2225)])
def test_square_root_schedule_spot_values(i, ratio):
    a, s = noise_level(torch.tensor(1 - (i + 1) / 2000, dtype=DOUBLE))
    assert abs(s / a - ratio) < 0.005 * ratio

@pytest.mark.parametrize('move', [ddim, lambda x_t, x, t, s: ancestral(
    x_t, x, t, s, torch.randn_like(x))])
def test_strided_samplers_reach_the_modes_of_an_exact_teacher(move):
    torch.manual_seed(0)
    grid = torch.linspace(0, 1, 501)
    x_t = torch.randn(2000)
    for t, s in zip(grid[:-1], grid[1:]):               # data: -1 or 1, equally likely
        a, sd = noise_level(t)
        x = torch.tanh(a * x_t / sd ** 2)
        x_t = move(x_t, x, t, s)
    assert (x.abs() > 0.95).float().mean() >= 0.95 and abs((x > 0).float().mean() - .5) < .05

def test_score_gap_has_half_the_fisher_gradient_on_a_gaussian():
    torch.manual_seed(0)
    m, theta, a, s, n = 1.0, torch.tensor(-.5, dtype=DOUBLE, requires_grad=True), .6, .8, 400_000

    def guess(x_t, mean, var):                          # E[x | x_t] for x ~ N(mean, var)
        return mean + a * var / (a * a * var + s * s) * (x_t - a * mean)

    x = theta + .7 * torch.randn(n, 1, 1, dtype=DOUBLE)
    x_t = a * x + s * torch.randn(n, 1, 1, dtype=DOUBLE)
    real, fake = guess(x_t, m, 1.0), guess(x_t, theta.detach(), .49)
    fisher = -2 * (m - theta.item()) * (1 - a * a / (a * a + s * s)) ** 2     # of E|real - fake|^2

    def gradient(x, loss='sid'):
        loss = distill.score_gap(x, real, fake, 0.5, loss).mean()
        return torch.autograd.grad(loss, theta, retain_graph=True)[0].item()

    assert abs(gradient(x) - fisher / 2) < 0.01
    assert gradient(x.detach()) > 0 > gradient(x, 'dmd')       # detached it runs away from the data

class ExactMixture:
    """Stands in for a diffusion's teacher: four tokens, equally likely, at (+-1.5, +-1.5)."""

    def predict(self, x_t, given, t):
        a, s = noise_level(t[:, None, None])
        power = (a * 0.121) ** 2 + s ** 2
        mean = 1.5 * torch.tanh(1.5 * a * x_t / power)
        return mean + a * 0.121 ** 2 / power * (x_t - a * mean)

def test_one_step_generator_reaches_all_modes_of_an_exact_mixture():
    student = tiny(vocab=8, length=1, model='diffuseq', code=2, start=distill.START)
    fake = distill.Fake(student)
    opt, fake_opt = (torch.optim.Adam(m.parameters(), lr=2e-3, betas=(0., .999))
                     for m in (student, fake))
    losses = distill.score_distillation(student, ExactMixture(), fake, fake_opt,
                                        distill.Options(parts=1), torch.device('cpu'))
    rng, tokens = torch.Generator().manual_seed(0), torch.zeros(128, 1, dtype=torch.long)
    for it in range(250):
        opt.param_groups[0]['lr'] = 2e-3 * (1 - it / 250)
        student.zero_grad()
        losses(tokens, no_given(128, 1), rng)[0].backward()
        opt.step()
    x = student.generate(student.begin(no_given(1024, 1), rng), no_given(1024, 1))[:, 0]
    assert ((x.abs() - 1.5).abs() < 0.5).all(-1).float().mean() > 0.65       # 0.77 in trials
    assert torch.bincount((x[:, 0] > 0) * 2 + (x[:, 1] > 0), minlength=4).min() > 150

@pytest.mark.parametrize('kind, how', [
    *(('flm', how) for how in (dict(), dict(gamma=.7), dict(gamma=1.), dict(sampler='bridge'),
                               dict(sampler='ab2'), dict(top_p=.5), dict(temperature=2.))),
    *(('diffuseq', dict(sampler=x)) for x in ('ddim', 'ancestral')), ('mdlm', {}), ('ar', {})])
def test_given_tokens_come_back_and_special_ids_are_never_written(kind, how):
    model, tokens = tiny(model=kind), torch.randint(8, (50, 6))
    given = torch.where(torch.rand(50, 6) < 0.3, tokens, -1)
    with torch.no_grad():                       # the network would love to write <sep>
        (model.bias if kind == 'diffuseq' else model.net.head.bias)[-2:] += 10
    out = write_rows(model, given, 3, torch.Generator().manual_seed(0), **how)
    assert (out == tokens)[given >= 0].all() and out[given < 0].max() < 10

# ---- Optimiser, average, distillation end to end on a dozen rows ----

def test_ema_ramp():
    model, ema, o = tiny(), tiny(seed=1), train_teacher.Options(ema=.5, optimiser='adamw', lr=0.)
    before = ema.net.embed.clone()
    model.net.embed.sum().backward()
    train_teacher.update(model, ema, train_teacher.optimisers(model, o), 0, o)
    assert torch.allclose(ema.net.embed, 0.1 * before + 0.9 * model.net.embed, atol=1e-6)

def date_spec():
    texts = [text for pair in prepare_data.dates()[::97] for text in pair]
    return prepare_data.make_tokenizer('dates', texts)

@pytest.fixture(scope='module')
def dozen(tmp_path_factory):
    """A dozen rows, six dates in two forms each, through the real scripts' main()."""
    folder = tmp_path_factory.mktemp('dozen')
    days = ['1987-03-23', '2001-12-04', '1912-08-30', '2076-10-15', '1944-06-11', '2033-01-27']
    pairs = [(day, prepare_data.date_forms(day)[form]) for day in days for form in (1, 6)]
    spec = date_spec()
    rows, _ = prepare_data.pack_rows(encoding(spec), pairs, 23)
    write_dataset(folder / 'data', rows, rows, spec, kind='rows', pairs=True, length=23,
                  source='test', left_out=0)
    o = dict(device='cpu', batch=64, eval_every=10 ** 6)
    train_teacher.main(train_teacher.Options(data=str(folder / 'data'), out=str(folder / 'teacher'),
                                             iters=300, layers=2, width=64, code=2, axis='1', **o))
    o.update(lr=4e-3, muon_lr=0.03)
    for more in (dict(method='lagrangian', iters=200), dict(guide=f'{folder}/student', iters=300)):
        distill.main(distill.Options(teacher=f'{folder}/teacher', **more, **o))
    return folder

def test_overfit_a_dozen_rows_in_one_call(dozen):
    meta, train, _ = train_teacher.load_data(dozen / 'data')
    figures = {}
    for who in ('teacher', 'one-call'):
        rows, _ = sample.draw_rows(load(dozen / who)[0], meta, train, 500, 1, seed=0)
        figures[who] = sample.health(rows, meta)['valid']
    # .63 and .99 in trials; not 1, as noise on the border of two texts still gives their mixture
    assert figures['one-call'] >= max(0.95, figures['teacher'] + 0.2), figures

def test_exact_resume(dozen, tmp_path, monkeypatch):
    o = dict(data=str(dozen / 'data'), device='cpu', batch=8, layers=1, width=32)
    train_teacher.main(train_teacher.Options(out=str(tmp_path / 'a'), iters=6, eval_every=4, **o))
    halted = dict(out=str(tmp_path / 'b'), iters=6, eval_every=3)
    update, left = train_teacher.update, iter(range(3))
    monkeypatch.setattr(train_teacher, 'update', lambda *args: (next(left), update(*args))[1])
    with pytest.raises(StopIteration):
        train_teacher.main(train_teacher.Options(**halted, **o))
    monkeypatch.undo()
    train_teacher.main(train_teacher.Options(**halted, **o, resume=True))
    a, b = (load(tmp_path / x / 'model.pt')[1] for x in 'ab')
    for part in ('model', 'ema'):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])
    assert torch.equal(a['bins'], b['bins']) and a['bins'][1].sum() == 48   # rows, for the axis

def test_two_processes_train_as_one_that_takes_the_batch_in_two_parts(dozen, tmp_path):
    o = 'train_teacher.py', '--data', dozen / 'data', '--device', 'cpu', '--batch', 8, '--iters', 3
    run(*o, '--parts', 2, '--out', tmp_path / 'one')
    run('-m', 'torch.distributed.run', '--nproc_per_node=2', *o, '--out', tmp_path / 'two')
    one, two = (load(tmp_path / x)[1]['model'] for x in ('one', 'two'))
    assert all(torch.allclose(one[key], two[key], atol=1e-5) for key in one)

def test_prepare_text_pairs_and_bpe(tmp_path):
    text = tmp_path / 'a.txt'
    text.write_text('The cat sat on the mat. The dog sat on the cat.\r\n' * 40)
    prepare_data.main(prepare_data.Options(name='toy', input=(str(text),), tokenizer='bpe:300',
                                           length=8, val=0.2, data=str(tmp_path)))
    meta, train, val = train_teacher.load_data(tmp_path / 'toy')
    enc = encoding(meta['tokenizer'])
    assert meta['kind'] == 'stream' and 'The' in meta['tokenizer']['tokens']
    assert enc.decode([*train, *val]) == text.read_text().replace('\r\n', '\n') + '<eos>'
    assert enc.decode(enc.encode_ordinary('Any bytes: \u00e9\u4e16')) == 'Any bytes: \u00e9\u4e16'

    pairs = tmp_path / 'b.jsonl'
    asked = [{'question1': 'a?', 'question2': f'{x}?', 'label': x} for x in (0, 1, 1)]
    pairs.write_text('\n'.join(map(json.dumps, asked)))
    asked = prepare_data.from_files(prepare_data.Options(input=(str(pairs),)), tmp_path)
    assert asked == [('a?', '1?')]
    pairs.write_text('\n'.join(json.dumps({'src': f'what is {i}', 'trg': f'tell me {i // 2}'})
                               for i in range(50)))
    prepare_data.main(prepare_data.Options(name='pairs', input=(str(pairs),), tokenizer='byte',
                                           length=24, data=str(tmp_path)))
    meta, *ids = train_teacher.load_data(tmp_path / 'pairs')
    rows = [torch.from_numpy(np.array(x).astype(np.int64)).view(-1, 24) for x in ids]
    train, val = (sample.to_texts(x, meta) for x in rows)
    assert all(target == f'tell me {int(source[8:]) // 2}' for source, target in train + val)
    assert set(sum(train, ())).isdisjoint(sum(val, ()))         # so not all 45 that are left
    assert (train_teacher.up_to(rows[0], meta, '<sep>')[0] >= 0).sum() == len(train[0][0]) + 1

def test_prepare_lm1b_from_a_parquet_file(tmp_path):
    text = 'He said , " it \'s $ 5 ( not 6 ) . "'
    datasets.Dataset.from_dict({'text': [text] * 50}).to_parquet(tmp_path / 'c.parquet')
    prepare_data.main(prepare_data.Options(name='lm1b', input=(str(tmp_path / 'c.parquet'),),
                                           tokenizer='byte', length=16, data=str(tmp_path)))
    meta, train, val = train_teacher.load_data(tmp_path / 'lm1b')
    clean = encoding(meta['tokenizer']).decode([*train, *val])
    assert len(val) == len(train) // 9 and clean == 'He said, "it\'s $5 (not 6)."<eos>' * 50

def test_dates_are_exact():
    pairs = prepare_data.dates()
    assert len(pairs) == 73049 * 8 and pairs[0][0] == '1900-01-01' and pairs[-1][0] == '2099-12-31'
    assert all(len(set(prepare_data.date_forms(day))) == 8 for day, _ in pairs[::8])

def test_score_distillation_leaves_teacher_embedding_and_rounding_alone(dozen, tmp_path):
    o, path = dict(device='cpu', iters=3, eval_every=2, batch=8), tmp_path / 'teacher'
    train_teacher.main(train_teacher.Options(model='diffuseq', data=str(dozen / 'data'),
                                             out=str(path), layers=2, width=32, **o))
    before = (path / 'model.pt').read_bytes()
    distill.main(distill.Options(teacher=str(path), adversarial=1e-4, **o))
    assert (path / 'model.pt').read_bytes() == before
    teacher, student = (load(tmp_path / who)[0] for who in ('teacher', 'student'))
    assert torch.equal(teacher.net.embed, student.net.embed)
    assert torch.equal(teacher.bias, student.bias)
    assert student.begin(no_given(2, 6)).var(1).max() < 1e-9        # one noise for all positions
    assert not torch.equal(teacher.net.head.weight, student.net.head.weight)

def test_text_distances_by_hand_and_against_repetition():
    assert abs(bench.jensen_shannon('aab', 'abb') - math.log(32 / 27) / 3) < 1e-9
    assert bench.distinct(['a b a b'], 1) == 0.5
    texts = 'the cat sat on the mat today', ['the cat sat on the red mat']
    theirs = sacrebleu.sentence_bleu(*texts, smooth_method='none', tokenize='none')
    assert abs(bench.bleu(*texts) - theirs.score / 100) < 1e-6
    # each of 40 words is followed by few others: a text whose perplexity is known exactly
    rng = np.random.default_rng(0)
    chain = rng.dirichlet(np.full(40, .2), 40)
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

# ---- Command lines: bad input gets one line and exit status 2, and every option is in -h ----

def run(*command, cwd=None, stdin=''):
    command = [sys.executable, *(HERE / x if str(x) in BUDGET else str(x) for x in command)]
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True)

def test_bad_input_is_one_line_and_exit_2(dozen, tmp_path):
    (tmp_path / 'empty.txt').write_text('')
    (tmp_path / 'binary.txt').write_bytes(bytes(range(256)))
    (tmp_path / 'broken.pt').write_bytes(b'not a checkpoint')
    student, teacher = dozen / 'student', dozen / 'teacher'
    source = ('--source', '1987-03-23')
    cases = [
        ('prepare_data.py', 'nonsense'), ('prepare_data.py', '--nonsense', 1),
        ('prepare_data.py', 'x', '--input', tmp_path / 'missing.txt'),
        ('prepare_data.py', 'x', '--input', tmp_path / 'empty.txt'),
        ('prepare_data.py', 'x', '--input', tmp_path / 'binary.txt'),
        ('prepare_data.py', 'x', '--input', HERE / 'README.md', '--tokenizer', 'words'),
        ('prepare_data.py', '../x', '--input', HERE / 'README.md'), ('distill.py', '--leg', 2),
        *(('train_teacher.py', *x) for x in (('--data', 'data/missing'), ('--batch', 0),
          ('--iters', 'many'), ('--device', 'abacus'), ('--model', 'magic'), ('--axis', 'magic'),
          ('--warmup', 0))),
        ('distill.py', tmp_path / 'missing'), ('distill.py', student), ('bench.py',),
        ('distill.py', teacher, '--method', 'magic'), ('distill.py', teacher, '--guide', teacher),
        ('bench.py', 'train', '--nfe', 'x'), ('sample.py', tmp_path / 'missing'),
        ('sample.py', tmp_path / 'broken.pt'), ('sample.py', student, *source, '--nfe', 0),
        *(('sample.py', student, *x) for x in (('--source', '1987~'), ('--prompt', 1),
          ('--source', '1987-03-23' * 9), (*source, '--sampler', 'bridge'),
          (*source, '--compare', student))),
    ]
    with ThreadPoolExecutor(2) as pool:
        for case, done in zip(cases, pool.map(lambda case: run(*case, cwd=tmp_path), cases)):
            assert done.returncode == 2, (case, done.stderr)
            assert done.stderr.count('\n') == 1 and not done.stdout, (case, done.stderr)
    written = {str(p.relative_to(tmp_path)) for x in ('*', 'data/*') for p in tmp_path.glob(x)}
    assert written == {'binary.txt', 'broken.pt', 'empty.txt', 'data', 'data/cache'}

def test_sample_writes_one_line_per_source(dozen):
    done = run('sample.py', dozen / 'student', '--n', 1, stdin='1987-03-23\n2001-12-04\n')
    assert done.returncode == 0, done.stderr
    assert [x.split(' -> ')[0] for x in done.stdout.splitlines()] == ['1987-03-23', '2001-12-04']

@pytest.mark.parametrize('script', [prepare_data, train_teacher, distill, sample, bench])
def test_help_shows_every_option(script):
    text = ' '.join(run(Path(script.__file__).name, '-h').stdout.split())
    for field in fields(script.Options):
        assert field.name.replace('_', '-') in text and f'[{field.default}]' in text

BUDGET = {'model.py': 600, 'train_teacher.py': 300, 'distill.py': 350, 'sample.py': 220,
          'prepare_data.py': 300, 'bench.py': 350, 'test_core.py': 450, 'README.md': 250}

def test_budgets_and_width():
    for name, limit in BUDGET.items():
        lines = (HERE / name).read_text(encoding='utf-8').split('\n')[:-1]
        assert len(lines) <= limit, f'{name}: {len(lines)} lines, budget {limit}'
        assert name == 'README.md' or max(map(len, lines)) <= 100, name
    assert {p.name for p in HERE.glob('*.py')} <= set(BUDGET)
