"""One-step text generation: the denoiser, the one-hot flow, the embedding diffusion.

Conventions, used everywhere in this repository:
  t in [0, 1]    time, from noise (0) to data (1);     s <= u <= t for a flow map
  tau in [0, 1]  reparameterised time, what training and samplers are uniform in
  B, L, V, D, C  batch, length, vocabulary, width, channels of the embedding; shapes: # (B, L, D)
  given          (B, L) int64, ids of known tokens (source, prompt, infill), never noised; else -1

The flow (FLM, arXiv:2602.16813) moves x_t = (1-t) eps + t onehot(token), eps ~ N(0, I) in R^V at
each of the L positions. The network's first layer is linear, so all it sees of x_t is h = x_t E,
E (V x C) its embedding table, and h alone is kept: noise is drawn as z R with R^T R = E^T E, a
clean token is a row of E, and Euler steps, flow maps and bridges, affine in x, act on h as on x:
on the input side nothing has the size (B, L, V).
"""
import io
import json
import os
import zipfile
import zlib
from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from prepare_data import SPECIAL, fail

FORMAT = 4          # of checkpoints
CHUNK = defaultdict(lambda: 2 ** 22, cuda=2 ** 27)      # logits at a time in a loss, by device

@dataclass
class Config:
    """What fixes a network's shape; stored in its checkpoint."""
    vocab: int                  # V
    length: int                 # L, the longest row
    layers: int = 4
    heads: int = 4
    width: int = 128            # D
    code: int = 0               # C, channels of the embedding E (V x C); 0: as the width
    model: str = 'flm'          # flm | diffuseq; baselines: mdlm | ar
    cond: int = 128             # width of the time conditioning
    dropout: float = 0.0        # on attention-out and MLP-out
    gate: float = 0.3           # initial residual gates; 0 is adaLN-zero, as in the paper
    axis: str = 'measured'      # tau(t): measured | reader | paper | uniform | a number
    squared: bool = False       # a flow's loss: squared error, not cross-entropy
    two_time: bool = False      # a flow map also knows the time it jumps to
    bigrams: int = 0            # and so many pairs of neighbours, see OneHotFlow.read
    start: float = 0.0          # diffuseq: time of the first call; a one-call student's is later
    row_noise: bool = False     # diffuseq: its first noise is one vector for all of a row
    anchor: float = 0.0         # diffuseq: weight of the cross-entropy of the rounded prediction

# ---- The denoiser, used by every model: rows h (B, L, C) at tau (B,) -> (B, L, V or C) ----
def sinusoid(tau, dim=256):
    """Fourier features of times in [0, 1]: (B,) -> (B, dim)."""
    # periods from 0.006 to 63, so that both neighbouring times and far ones can be told apart
    freqs = 1000 * 10000 ** (-torch.arange(dim // 2, device=tau.device) / (dim // 2))
    return torch.cat([f(tau[:, None].float() * freqs) for f in (torch.cos, torch.sin)], dim=1)

def rotate(x, cos, sin):
    """Rotary positions (arXiv:2104.09864): turn channel pairs by angles that grow with position."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)

class Block(nn.Module):
    """Attention (ar: causal) and MLP, scaled and gated by the time (adaLN, arXiv:2212.09748)."""
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=False)
        self.out = nn.Linear(c.width, c.width, bias=False)
        self.up = nn.Linear(c.width, 4 * c.width)
        self.down = nn.Linear(4 * c.width, c.width)
        self.ada = nn.Linear(c.cond, 6 * c.width)

    def forward(self, x, cond, cos, sin, cache=None, at=0):
        (B, L, D), c = x.shape, self.c
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(cond)[:, None].chunk(6, dim=-1)
        y = F.layer_norm(x, (D,)) * (1 + scale1) + shift1
        q, k, v = self.qkv(y).view(B, L, 3, c.heads, D // c.heads).permute(2, 0, 3, 1, 4)
        # unit-size queries and keys bound the attention logits: the learning rate may be large
        q = rotate(F.rms_norm(q, q.shape[-1:]), cos, sin)      # (B, heads, L, D/heads)
        k = rotate(F.rms_norm(k, k.shape[-1:]), cos, sin)
        if cache is not None:           # ar: one token is new, of those before it these are kept
            cache[:, :, :, at:at + L] = torch.stack([k, v])
            k, v = cache[:, :, :, :at + L].to(v.dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=c.model == 'ar' and cache is None)
        y = self.out(y.transpose(1, 2).reshape(B, L, D))                        # (B, L, D)
        x = x + (c.gate + gate1) * F.dropout(y, c.dropout, self.training)
        y = F.layer_norm(x, (D,)) * (1 + scale2) + shift2
        y = self.down(F.gelu(self.up(y)))
        return x + (c.gate + gate2) * F.dropout(y, c.dropout, self.training)

class Denoiser(nn.Module):
    """The transformer. It owns the embedding table E, in whose row space the noisy rows live."""
    def __init__(self, c, out):
        super().__init__()
        C = c.code or c.width
        self.embed = nn.Parameter(torch.empty(c.vocab, C))                      # E (V, C)
        self.into = nn.Linear(C, c.width, bias=False) if C != c.width else nn.Identity()
        self.position = nn.Parameter(torch.empty(c.length, c.width))
        # added where a token is given: vectors of their own if E has few channels, as those are
        # spent on what noise must decide and would hardly tell the digits of a source apart
        self.known = nn.Embedding(1 + (c.vocab if c.code else 1), c.width)      # 0: to write
        self.time, *to = (
            nn.Sequential(nn.Linear(256, c.cond), nn.SiLU(), nn.Linear(c.cond, c.cond))
            for _ in range(1 + c.two_time))
        self.time_to = to[0] if to else None
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.ada = nn.Linear(c.cond, 2 * c.width)
        self.head = nn.Linear(c.width, out)                                     # not tied to E
        self.cap = 30 if c.model == 'flm' else 0        # soft, keeps a flow's bf16 logits finite
        half = c.width // c.heads // 2
        angle = torch.arange(c.length)[:, None] * 10000 ** (-torch.arange(half) / half)
        self.register_buffer('cos', angle.cos(), persistent=False)
        self.register_buffer('sin', angle.sin(), persistent=False)
        for p in self.parameters():
            nn.init.normal_(p, std=p.shape[1] ** -0.5) if p.ndim == 2 else nn.init.zeros_(p)
        # as large as the noise beside it: 0.02, as usual, takes hundreds of iterations to be heard
        nn.init.normal_(self.position), nn.init.normal_(self.known.weight)
        # zero: nothing modulated yet, all tokens equally likely, a fresh student like its teacher
        for layer in [self.ada, self.head, *(block.ada for block in self.blocks),
                      *([self.time_to[2]] if c.two_time else [])]:
            nn.init.zeros_(layer.weight)

    def forward(self, h, given, tau, tau_to=None, target=None, share=None, cache=None, at=0):
        """h (B, L, C), given (B, L), tau and tau_to (B,) -> (B, L, out) in fp32.
        With a target, ids (B, L) or p (B, L, V): the cross-entropy of rows (B,), nats, of which a
        position has its share (B, L); default: the mean over those not given.
        ar: with a cache (layers, 2, B, heads, length, D/heads), h is of the positions from `at`."""
        known = self.known((given + 1).clamp(max=self.known.num_embeddings - 1))
        here = slice(at, at + h.shape[1])
        x = self.into(h) + self.position[here] + known                          # (B, L, D)
        cond = self.time(sinusoid(tau))                                         # (B, cond)
        cond = F.silu(cond if tau_to is None else cond + self.time_to(sinusoid(tau_to)))
        for block, kept in zip(self.blocks, [None] * len(self.blocks) if cache is None else cache):
            x = block(x, cond, self.cos[here], self.sin[here], kept, at)
        shift, scale = self.ada(cond)[:, None].chunk(2, dim=-1)
        x = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        share = share_of(given) if share is None else share
        return logits_or_nats(x, self.head.weight, self.head.bias, self.cap, target, share)

# ---- Pure functions: the mathematics, testable on toys with known answers; t, s, u broadcast ----
def right_token(t, K, share=1.0):
    """q(t) = P(argmax_k x_t is the right token) = E_z[Phi(z + t/(1-t))^(K-1)], arXiv:2602.16813;
    t (n,) float64 in [0, 1), K the vocabulary size -> (n,). `share` scales t/(1-t), the ratio of
    signal to noise, for a reader who sees less than x_t."""
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(100))
    log_cdf = torch.special.log_ndtr(nodes + share * (t / (1 - t))[:, None])    # (n, 100)
    return (weights * torch.exp((K - 1) * log_cdf)).sum(1) / weights.sum()

def time_axis(K, share=1.0, knots=1001):
    """Knots (ts, taus) of tau(t) = K/(K-1) (q(t) - 1/K), each (knots,) float64, from 0 to 1."""
    ts = torch.linspace(0, 1, knots, dtype=torch.float64)
    taus = (right_token(ts[:-1], K, share) - 1 / K) * K / (K - 1)
    taus = torch.cummax(torch.cat([taus - taus[0], torch.ones(1)]).clamp(0, 1), 0).values
    # flat at both ends to machine precision: a slight slope keeps t(0) = 0, t(1) = 1, one-to-one
    return ts, (1 - 1e-4) * taus + 1e-4 * ts

def interpolate(x, xs, ys):
    """Piecewise linear y(x) through knots (xs, ys), xs rising; x of any shape."""
    i = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
    w = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
    return ys[i - 1] + w * (ys[i] - ys[i - 1])

def jump(x, p, s, t):
    """X_{s,t}(x) = (1-t)/(1-s) x + (t-s)/(1-s) p: an Euler step for p = D_s, the flow map for
    p = delta_{s,t} (arXiv:2602.16813); x and p both dense, or both times E."""
    keep = (1 - t) / (1 - s).clamp(min=1e-6)
    return keep * x + (1 - keep) * p

def bridge(x, e, s, t, noise):
    """Draw x_t, t > s, given x_s and the clean e: N(a x + b e, v I), arXiv:2605.13681."""
    a = s / t * ((1 - t) / (1 - s)) ** 2
    v = (1 - t) ** 2 * (1 - a * s / t)
    return a * x + (t - a * s) * e + v.clamp(min=0).sqrt() * noise

def best_row(score, links, sweeps=8):
    """Of k candidates at each position those of the row with the largest sum of scores (B, L, k)
    and links (B, L-1, k, k) between neighbours: (B, L), 0 to k-1. Viterbi's answer, for all
    positions at once: each sweep lets them hear of a neighbour farther; eight are enough."""
    before = behind = torch.zeros_like(score)                                   # (B, L, k)
    for _ in range(sweeps):
        before = F.pad(((score + before)[:, :-1, :, None] + links).amax(2), (0, 0, 1, 0))
        behind = F.pad(((score + behind)[:, 1:, None] + links).amax(3), (0, 0, 0, 1))
    return (before + score + behind).argmax(-1)

# ---- FLM and FMLM: the one-hot flow (teacher) and its flow map (student, config.two_time) ----
class Model(nn.Module):
    """What the models below have: a Config and a Denoiser."""
    def __init__(self, c, out=None):
        super().__init__()
        self.config, self.net = c, Denoiser(c, out or c.vocab)

class OneHotFlow(Model):
    """The flow of one-hot tokens, seen through E, on one of these time axes:
    paper     tau rises as the error of argmax over x_t falls, arXiv:2602.16813
    reader    the same for who reads h = x_t E, where a token keeps C/V of its signal's energy
    measured  as `reader`, then refit: equal stretches of tau lower the loss by as many nats
    uniform   tau = t;   a number: a factor on t/(1-t) chosen by hand"""
    def __init__(self, c):
        super().__init__(c)
        reader = min(1, (c.code or c.width) / c.vocab) ** 0.5
        shares = dict(reader=reader, measured=reader, paper=1, uniform=1)
        ts, taus = time_axis(c.vocab, shares.get(c.axis) or float(c.axis))
        self.register_buffer('ts', ts.float(), persistent=False)
        taus = (ts if c.axis == 'uniform' else taus).float()
        self.register_buffer('taus', taus, persistent=c.axis == 'measured')
        # a student that is unsure would write frequent tokens too often: these count less
        self.register_buffer('rare', torch.ones(c.vocab), persistent=c.two_time)
        # of pairs a b of neighbours: a V + b, rising, and how far they seek or shun each other
        self.register_buffer('pairs', torch.arange(c.bigrams), persistent=c.bigrams > 0)
        self.register_buffer('links', torch.zeros(c.bigrams), persistent=c.bigrams > 0)

    @torch.no_grad()
    def refit(self, tokens, given, seed):
        """Let tau rise as the loss of these rows (B, L) falls, seen at 33 times."""
        grid, losses = torch.linspace(0, 1, 33, device=tokens.device), []
        for tau in grid:        # the same rows and noise each time, or the axis would get stairs
            rng = torch.Generator(tokens.device).manual_seed(seed)
            losses.append(self.loss(tokens, given, tau.expand(len(tokens)), rng).mean())
        loss = torch.cummin(torch.stack(losses), 0).values - 1e-6 * grid        # it falls
        # half of the old axis: one rough measure does little harm
        fallen = 0.5 * (loss[0] - loss) / (loss[0] - loss[-1]) + 0.5 * grid
        return self.taus.copy_(interpolate(self.taus, grid, fallen))

    def t_of(self, tau):
        return interpolate(tau, self.taus, self.ts)

    def noise_factor(self, n):
        """R (k, C) with R^T R = E^T E: z R has the law of eps E for n positions' z ~ N(0, I_k).
        One product of V C^2 and one C x C Cholesky, k = C; gradients reach E through it."""
        E = self.net.embed.float()
        if min(n, len(E)) <= E.shape[1]:        # eps itself, k = V, costs less and is as small as E
            return E
        with torch.autocast(E.device.type, enabled=False):      # bf16 would not be positive
            gram = E.T @ E                                                      # (C, C)
        jitter = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
        factor, bad = torch.linalg.cholesky_ex(gram + jitter)   # does not wait for a GPU
        return factor.T / (bad == 0)            # if it failed: not finite, which ends a training

    def noise(self, B, L, rng=None, factor=None):
        """eps E, eps ~ N(0, I) in R^(B x L x V), without eps if that saves work: (B, L, C)."""
        factor = self.noise_factor(B * L) if factor is None else factor
        return torch.randn(B, L, len(factor), generator=rng, device=factor.device) @ factor

    def corrupt(self, tokens, given, tau, rng=None):
        """Noisy rows at tau (B,): tokens (B, L) -> h (B, L, C); given positions stay clean."""
        t = self.t_of(tau)[:, None, None]
        clean = self.net.embed[tokens].float()                                  # (B, L, C)
        h = jump(self.noise(*tokens.shape, rng), clean, torch.zeros_like(t), t)
        return torch.where(given[..., None] < 0, h, clean)

    def predict(self, h, given, tau, tau_to=None, target=None):
        """The network on rows h (B, L, C) brought to unit size -> logits (B, L, V), or nats."""
        t = self.t_of(tau)[:, None, None]
        V, C = self.net.embed.shape
        # mean squares per channel: |E|^2 / C for noise (it adds up over V tokens), 1/V of it for a
        # clean token. A constant per t, not each token's own norm: of few channels that tells much
        size = torch.where(given[..., None] < 0, (1 - t) ** 2 + t ** 2 / V, 1 / V)
        size = (size / C).sqrt() * self.net.embed.detach().float().norm()
        return self.net(h / size, given, tau, tau_to, target)

    def loss(self, tokens, given, tau, rng=None):
        """Cross-entropy of the clean tokens, mean over positions not given: (B,), nats."""
        h = self.corrupt(tokens, given, tau, rng)
        if not self.config.squared:
            return self.predict(h, given, tau, target=tokens)
        p = self.predict(h, given, tau).softmax(-1)     # (B, L, V): dense, for comparisons only
        return row_mean((p - F.one_hot(tokens, p.shape[-1])).square().sum(-1), given)

    def begin(self, given, rng=None, factor=None):
        """Pure noise around the given tokens: h (B, L, C)."""
        clean = self.net.embed[given.clamp(min=0)].float()
        return torch.where(given[..., None] < 0, self.noise(*given.shape, rng, factor), clean)

    def jump(self, h, p, given, tau_s, tau_t):
        """Move h from tau_s to tau_t (B,) along the prediction p (B, L, V); given rows stay."""
        s, t = self.t_of(tau_s)[:, None, None], self.t_of(tau_t)[:, None, None]
        return torch.where(given[..., None] < 0, jump(h, p @ self.net.embed.float(), s, t), h)

    def read(self, p, given):
        """Tokens (B, L) of predictions p (B, L, V): the likeliest at each position, or with bigrams
        the likeliest row when neighbours count, too: alone, two may take halves of two answers."""
        if not self.config.bigrams:
            return (p * self.rare).argmax(-1)
        score, ids = (p * self.rare).topk(8)
        ids = torch.where(given[..., None] < 0, ids, given[..., None])          # (B, L, 8)
        pairs = ids[:, :-1, :, None] * self.config.vocab + ids[:, 1:, None]     # (B, L-1, 8, 8)
        at = torch.searchsorted(self.pairs, pairs).clamp(max=len(self.pairs) - 1)
        links = self.links[torch.where(self.pairs[at] == pairs, at, 0)]         # 0: never seen
        return ids.gather(-1, best_row(score.log(), links)[..., None])[..., 0]

    def calls(self, given, nfe, rng, choose, sampler='euler', gamma=0.0):
        """Yield at each network call a function: () -> what it would write; choose(logits) -> p.
        sampler  euler (a student: its flow map) | ab2, of second order (Adams-Bashforth) | bridge
        gamma    0: follow the flow; up to 1: predict the data, then noise again (not at nfe 1)"""
        factor, last = self.noise_factor(given.numel()), None
        h = clean = self.begin(given, rng, factor)                              # tau = 0
        for now, then in pairwise(torch.linspace(0, 1, nfe + 1, device=h.device)[:, None]):
            t = self.t_of(then)
            # gamma: land nearer the data, at r, so that scaling by t/r leaves room for fresh noise:
            # (t/r)^2 (1-r)^2 + gamma^2 (1-t)^2 = (1-t)^2, the noise level of time t
            r = t / (t + (1 - t) * (1 - gamma ** 2) ** 0.5)
            to = interpolate(r, self.ts, self.taus) if gamma else then
            now, to = (x.expand(len(given)) for x in (now, to))
            p = choose(self.predict(h, given, now, to if self.config.two_time else None), now[0])
            tokens = draw(p, rng) if sampler == 'bridge' else None
            yield lambda: self.read(p, given) if tokens is None else tokens
            if sampler == 'bridge':
                e, s = self.net.embed[tokens].float(), self.t_of(now)[:, None, None]
                h = bridge(h, e, s, t, self.noise(*given.shape, rng, factor))
            else:
                ahead = 0.5 * (p - last) if sampler == 'ab2' and last is not None else 0
                h, last = self.jump(h, p + ahead, given, now, to), p
                if gamma:
                    h = t / r * h + gamma * (1 - t) * self.noise(*given.shape, rng, factor)
            h = torch.where(given[..., None] < 0, h, clean)

# ---- DiffuSeq and DLM-One: diffusion of embeddings and its one-call generator ----
def noise_level(t):
    """a(t), b(t) of x_t = a x + b eps, a^2 + b^2 = 1: the square-root schedule of DiffuSeq, whose
    index i of T = 2000 is t = 1 - (i+1)/T (arXiv:2210.08933). Any shape of t."""
    # 2e-7: pure noise stays finite as b/a, the published table's last entry
    keep = ((1 - (1 - t + 1e-4).sqrt()) / 0.99).clamp(2e-7, 1)
    return keep.sqrt(), (1 - keep).sqrt()

def ancestral(x_s, x, s, t, noise):
    """Draw x_t, t > s, given x_s and the clean x: the exact posterior for any stride."""
    (a_s, b_s), (a_t, b_t) = noise_level(s), noise_level(t)
    keep = (a_s / a_t) ** 2                         # of the signal's power on the way back to s
    mean = (a_t * (1 - keep) * x + keep.sqrt() * b_t ** 2 * x_s) / b_s ** 2
    return mean + ((1 - keep) * b_t ** 2 / b_s ** 2).sqrt() * noise

def ddim(x_s, x, s, t):
    """Move x_s to a later time t along the clean x, without fresh noise (arXiv:2010.02502)."""
    (a_s, b_s), (a_t, b_t) = noise_level(s), noise_level(t)
    return a_t * x + b_t / b_s * (x_s - a_s * x)

class EmbeddingDiffusion(Model):
    """DiffuSeq (arXiv:2210.08933): Gaussian diffusion of embeddings; the network guesses x.
    Given positions keep their embedding at all times. The rounding head is E itself with a bias."""
    GRAIN = 0.121       # the clean end is a little noisy, x = E[token] + 0.121 n: b at i = 0

    def __init__(self, c):
        super().__init__(c, out=c.code or c.width)
        nn.init.normal_(self.net.embed)             # of the size of the noise
        self.bias = nn.Parameter(torch.zeros(c.vocab))

    def round(self, x, target=None, share=None):
        """Logits (B, L, V) of the tokens that x (B, L, C) may stand for, or nats; see Denoiser."""
        return logits_or_nats(x.float(), self.net.embed.float(), self.bias, 0, target, share)

    def predict(self, x_t, given, t):
        """The clean x (B, L, C) seen from x_t at time t (B,)."""
        return self.net(x_t, given, t)

    def noise(self, x, rng=None):
        return torch.randn(x.shape, generator=rng, device=x.device)

    def corrupt(self, x, clean, given, t, rng=None):
        """x_t (B, L, C) of x at times t (B,); given positions hold `clean`, their embeddings."""
        a, b = noise_level(t[:, None, None])
        return torch.where(given[..., None] < 0, a * x + b * self.noise(x, rng), clean)

    def loss(self, tokens, given, t, rng=None):
        """Squared error of x, rounding term and anchor term, mean over positions: (B,)."""
        clean = self.net.embed[tokens].float()                                  # (B, L, C)
        x = clean + self.GRAIN * self.noise(clean, rng)
        guess = self.predict(self.corrupt(x, clean, given, t, rng), given, t)
        error = row_mean((guess - x).square().mean(-1), given)
        # without the rounding term all embeddings would shrink to one point, error 0
        error, a = error + self.round(x, tokens, 0 * given + 1 / x.shape[1]), self.config.anchor
        return error + (a * self.round(guess, tokens, share_of(given)) if a else 0)

    def begin(self, given, rng=None):
        """Noise at the time of the first call around the given embeddings: x_t (B, L, C)."""
        clean = self.net.embed[given.clamp(min=0)].float()
        b = noise_level(torch.tensor(self.config.start))[1]
        z = self.noise(clean[:, :1] if self.config.row_noise else clean, rng)
        return torch.where(given[..., None] < 0, b * z, clean)

    def generate(self, x_t, given):
        """The one-call generator: x (B, L, C), with gradient."""
        return self.predict(x_t, given, torch.full_like(x_t[:, 0, 0], self.config.start))

    def calls(self, given, nfe, rng, choose, sampler='ancestral'):
        """As a flow's calls; sampler: ancestral | ddim, right for any stride."""
        x_t = clean = self.begin(given, rng)
        for s, t in pairwise(torch.linspace(self.config.start, 1, nfe + 1, device=x_t.device)):
            x = self.predict(x_t, given, s.expand(len(given)))
            yield lambda: choose(self.round(x)).argmax(-1)
            x_t = (ddim(x_t, x, s, t) if sampler == 'ddim' else
                   ancestral(x_t, x, s, t, self.noise(clean, rng)))
            x_t = torch.where(given[..., None] < 0, x_t, clean)

# ---- The baselines, on tokens themselves: the same network, all it sees is given ----
class MaskedDiffusion(Model):
    """MDLM (arXiv:2406.07524): tokens are masked, guessed, and stay once they are written."""

    def predict(self, seen, **how):
        """Logits (B, L, V) of the tokens behind those seen (B, L), -1 where masked, or nats."""
        h = torch.where(seen[..., None] < 0, 0, self.net.embed[seen.clamp(min=0)])
        return self.net(h, seen, torch.zeros_like(h[:, 0, 0]), **how)           # it knows no time

    def loss(self, tokens, given, t, rng=None):
        """Bound on -log p, nats per position not given: that of masked ones over 1 - t (B,)."""
        hide = torch.rand(tokens.shape, generator=rng, device=tokens.device) >= t[:, None]
        seen = torch.where(hide & (given < 0), -1, tokens)
        share = share_of(given) * (seen < 0) / (1 - t[:, None]).clamp(min=1e-3)
        return self.predict(seen, target=tokens, share=share)

    def calls(self, given, nfe, rng, choose):
        """As a flow's calls: each writes a share of the masks."""
        seen = given
        for s, t in pairwise(torch.linspace(0, 1, nfe + 1, device=given.device)):
            tokens = draw(choose(self.predict(seen)), rng)
            yield lambda: torch.where(seen < 0, tokens, seen)
            # of the masks left at time s a share of (t - s) / (1 - s) goes by time t
            now = torch.rand(given.shape, generator=rng, device=given.device) < (t - s) / (1 - s)
            seen = torch.where(now & (seen < 0), tokens, seen)

class Autoregressive(MaskedDiffusion):
    """Writes from left to right: at each position it sees those before, and predicts its token."""

    def loss(self, tokens, given, tau=None, rng=None):
        """-log p of each token given all before it, mean over positions not given: (B,), nats."""
        before = F.pad(tokens[:, :-1], (1, 0), value=self.config.vocab - 1)
        return self.predict(before, target=tokens, share=share_of(given))

    def calls(self, given, nfe, rng, choose):
        """As a flow's calls, but L of them, whatever nfe says."""
        c, (B, L), W = self.config, given.shape, self.net.head.weight[:0]
        cache = F.linear(W, W).new_empty(c.layers, 2, B, c.heads, L, c.width // c.heads)
        row = torch.full((B, L + 1), c.vocab - 1, device=given.device)          # <bos> and the row
        for at in range(L):
            p = choose(self.predict(row[:, at:at + 1], cache=cache, at=at))
            row[:, at + 1] = torch.where(given[:, at] < 0, draw(p, rng)[:, 0], given[:, at])
            yield lambda: row[:, 1:]

# ---- What the models share ----
def build(config):
    """The model a Config describes."""
    return {'flm': OneHotFlow, 'diffuseq': EmbeddingDiffusion, 'mdlm': MaskedDiffusion,
            'ar': Autoregressive}[config.model](config)

@torch.no_grad()
def write_rows(model, given, nfe, rng=None, temperature=1.0, watch=None, **how):
    """Write the tokens that are not given (B, L), in nfe network calls: (B, L).
    temperature: see cool; watch(i, tokens) sees what a call writes: without it only the last."""
    def choose(logits, tau=1):
        logits = cool(logits, tau, temperature)
        logits[..., -2:] = -torch.inf                   # <sep> and <bos> are never written
        return logits.softmax(-1)
    nfe = given.shape[1] if model.config.model == 'ar' else nfe
    # in this order zip does not ask for a state after the last call
    for i, read in zip(range(nfe), model.calls(given, nfe, rng, choose, **how)):
        tokens = torch.where(given < 0, read(), given) if watch or i == nfe - 1 else None
        watch and watch(i, tokens)
    return tokens

def is_student(config):
    """Whether a model has been distilled: a flow map, or a generator that starts late."""
    return config.two_time or config.start > 0

def share_of(given):
    """What each position not given has in the mean of its row: (B, L)."""
    return (given < 0) / (given < 0).sum(1, keepdim=True).clamp(min=1)

def row_mean(x, given):
    """Mean of x (B, L) over the positions not given: (B,)."""
    return (x * share_of(given)).sum(1)

def cool(logits, tau, temperature):
    """Logits at a temperature that a flow comes to from 1 along tau; others are at tau = 1."""
    return logits / (1 + (temperature - 1) * tau)       # early guesses, means of many texts, stay

def draw(p, rng=None):
    """One token per position: (B, L, V) -> (B, L). torch.multinomial would wait for a GPU."""
    return (p / torch.empty_like(p).exponential_(generator=rng)).argmax(-1)

def logits(y, weight, bias, cap):
    """y W^T + b in fp32, softly capped if `cap` is not 0: (..., D) -> (..., V)."""
    x = F.linear(y, weight, bias).float()
    return x.div_(cap).tanh_() * cap if cap else x

@torch.compiler.allow_in_graph          # torch 2.13 fails to trace inside
class CrossEntropy(torch.autograd.Function):
    """Share (n,) of the nats of ids (n,) or p (n, V) under logits of y (n, D): (n,), fp32.
    A CHUNK of logits at a time, and each only once: its gradients are taken on the spot, no (n, V)
    is kept. Therefore all positions must count alike in what is minimised, but for their share."""
    @staticmethod
    def forward(ctx, y, weight, bias, cap, target, share):
        n = max(1, CHUNK[y.device.type] // len(weight))
        nats, y_grad, w_grad, b_grad = [], [], torch.zeros_like(weight, dtype=torch.float32), 0
        for y_n, aim, s in zip(*(x.split(n) for x in (y, target, share[:, None]))):
            x, ids = logits(y_n, weight, bias, cap), aim[:, None]
            p = x - x.logsumexp(-1, keepdim=True)   # log_softmax; torch 2.13 compiles that wrong
            nats.append(-s * (p.gather(1, ids) if aim.ndim == 1 else (p * aim).sum(1, True)))
            if ctx.needs_input_grad[0]:
                p = p.exp_().mul_(s)        # (softmax - target) times share, times the cap's slope
                p.scatter_add_(1, ids, -s) if aim.ndim == 1 else p.addcmul_(s, aim, value=-1)
                cap and p.addcmul_(p, x.div_(cap).square_(), value=-1)
                b_grad, p = b_grad + p.sum(0), p.to(y.dtype)
                y_grad.append(p @ weight)
                w_grad += (p.T @ y_n).float()
                x = p = None            # gone before the next ones come
        ctx.needs_input_grad[0] and ctx.save_for_backward(torch.cat(y_grad), w_grad, b_grad)
        return torch.cat(nats)[:, 0]

    @staticmethod
    def backward(ctx, grad):
        torch._assert_async((grad == grad[0]).all())        # without waiting for a GPU
        return *(x * grad[0] for x in ctx.saved_tensors), None, None, None

def logits_or_nats(y, weight, bias, cap, target, share):
    """Logits (B, L, V) of y (B, L, D), or with a target and shares (B, L) nats of rows (B,)."""
    if target is None:
        return logits(y, weight, bias, cap)
    dtype = F.linear(y[:0], weight[:0]).dtype       # that of products, under autocast, too
    y, weight, bias = (x.to(dtype) for x in (y.flatten(0, 1), weight, bias))
    nats = CrossEntropy.apply(y, weight, bias, cap, target.flatten(0, 1), share.flatten())
    return nats.view(share.shape).sum(1)

# ---- Tokenizers, files and checkpoints: tensors and plain values only ----
def encoding(spec):
    """The tiktoken.Encoding of a dict {name, pattern, tokens as latin-1 strings in rank order}."""
    import tiktoken
    ranks = {token.encode('latin-1'): i for i, token in enumerate(spec['tokens'])}
    return tiktoken.Encoding(spec['name'], pat_str=spec['pattern'], mergeable_ranks=ranks,
                             special_tokens={s: len(ranks) + i for i, s in enumerate(SPECIAL)})

def split_rows(rows, meta):
    """Rows (B, L) -> per row (ids of the source, ids of the text up to its <eos> or a <pad>)."""
    eos, pad, sep, _ = meta['special'].values()
    for row in rows.tolist():
        source = row[:row.index(sep)] if meta['pairs'] else []
        at = len(source) + 1 if meta['pairs'] else 0
        while meta['pairs'] and row[at:at + 1] == [pad]:
            at += 1
        ends = [row.index(x, at) for x in (eos, pad) if x in row[at:] and meta['kind'] == 'rows']
        yield source, row[at:min(ends, default=None)]

def write_whole(path, data):
    """Write bytes or an array completely or not at all: to a file beside it, then os.replace."""
    temporary = Path(f'{path}.tmp')
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, 'wb') as f:
            f.write(data)
            f.flush(), os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        fail(f'{path}: cannot be written ({e.strerror}); make room, or name another folder')
    finally:
        os.path.exists(temporary) and temporary.unlink()

def write_dataset(folder, train, val, spec, **about):
    """folder/{train,val}.bin, then meta.json: a folder that has a meta.json is complete."""
    V = len(spec['tokens'])
    meta = {'format': 1, 'name': Path(folder).name, 'vocab': V + len(SPECIAL), **about,
            'special': {name: V + i for i, name in enumerate(SPECIAL)}, 'train_tokens': len(train),
            'val_tokens': len(val), 'tokenizer': spec}
    meta['crc'] = checksum(meta, train, val)
    about = json.dumps(meta).encode()
    for name, data in ('train.bin', train), ('val.bin', val), ('meta.json', about):
        write_whole(Path(folder) / name, data)

def checksum(meta, *ids):
    """Of all that a data folder holds; of files from 256 MB on only the length, to start fast."""
    about = json.dumps({**meta, 'crc': 0}).encode()
    return [zlib.crc32(x if len(x) < 2 ** 27 else str(len(x)).encode()) for x in (about, *ids)]

def load(path, device='cpu'):
    """model.pt or its folder -> (averaged model in eval mode, checkpoint dict), or one line."""
    path = Path(path) / 'model.pt' if Path(path).suffix != '.pt' else Path(path)
    if not os.path.isfile(path):        # Path's own raises where a name is too long
        fail(f'{path}: no such checkpoint; make one with train_teacher.py, then distill.py')
    try:
        whole = not zipfile.ZipFile(path).testzip()     # which looks at all checksums
        ckpt = torch.load(path, map_location='cpu', weights_only=True) if whole else {}
        if ckpt['format'] > FORMAT:
            fail(f'{path}: its format {ckpt["format"]} is newer than this code (format {FORMAT})')
        model = build(Config(**ckpt['config']))
        model.load_state_dict(ckpt['ema'])
    except Exception as e:              # torch.load raises a dozen different types
        fail(f'{path}: not a whole checkpoint of this project ({type(e).__name__}); make it anew')
    return model.to(device).eval(), ckpt

def save(path, model, ema, opts=(), **more):
    """A checkpoint file, whole or not at all; `more` holds tensors and plain values."""
    ckpt = {'format': FORMAT, 'config': asdict(model.config), 'model': model.state_dict(),
            'ema': ema.state_dict(), 'optimisers': [opt.state_dict() for opt in opts],
            'torch': str(torch.__version__), **more}
    buffer = io.BytesIO()
    torch.save(ckpt, buffer)
    write_whole(path, buffer.getbuffer())
