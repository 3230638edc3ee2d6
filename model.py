"""One-step text generation: the denoiser, the one-hot flow, the embedding diffusion.

Conventions, used everywhere in this repository:
  t in [0, 1]    time, from noise (0) to data (1);     s <= u <= t for a flow map
  tau in [0, 1]  reparameterised time, what training and samplers are uniform in
  B, L, V, D, C  batch, length, vocabulary, width, channels of the embedding; shapes: # (B, L, D)
  nfe            network calls of a sampler
  given          (B, L) int64, the ids of tokens that are known (source, prompt, infill) and never
                 noised; -1 where one is to be written

The flow (FLM, arXiv:2602.16813) moves x_t = (1-t) eps + t onehot(token), eps ~ N(0, I) in R^V at
each of the L positions. The network's first layer is linear, so all it ever sees of x_t is
h = x_t E, E (V x C) its embedding table. We keep h alone: noise is drawn directly as z F with
F^T F = E^T E, a clean token is a row of E, and Euler steps, flow maps and bridges act on h as they
do on x, for they are affine in x. So nothing of size (B, L, V) exists on the input side, and a
one-hot flow is an embedding-space flow whose noise has covariance E^T E.
"""
import io
import json
import math
import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from prepare_data import SPECIAL, fail


@dataclass
class Config:
    """What fixes a network's shape; stored in its checkpoint."""
    vocab: int                  # V
    length: int                 # L, the longest row
    layers: int = 4
    heads: int = 4
    width: int = 128            # D
    code: int = 0               # C, channels of the embedding E (V x C); 0: as the width
    model: str = 'flm'          # flm (one-hot flow) | diffuseq (embedding diffusion)
    cond: int = 128             # width of the time conditioning
    dropout: float = 0.0        # on attention-out and MLP-out
    gate: float = 0.3           # initial residual gates; 0 is adaLN-zero, as in the paper
    axis: str = 'reader'        # tau(t): reader | paper | uniform | a number, see OneHotFlow
    two_time: bool = False      # a flow map also knows the time it jumps to
    start: float = 0.0          # diffuseq: time of the first call; a one-call student's is later
    row_noise: bool = False     # diffuseq: its first noise is one vector for all of a row
    anchor: float = 0.0         # diffuseq: weight of the cross-entropy of the rounded prediction


# -------------------------------------------------------------------------------------------------
# The denoiser, used by every model: noisy rows h (B, L, C) at time tau (B,) -> (B, L, V or C)

def sinusoid(tau, dim=256):
    """Fourier features of times in [0, 1]: (B,) -> (B, dim)."""
    # periods from 0.006 to 63, so that both neighbouring times and far ones can be told apart
    index = torch.arange(dim // 2, device=tau.device)
    freqs = 1000 * torch.exp(-math.log(10000) * index / (dim // 2))
    angles = tau[:, None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def rotate(x, cos, sin):
    """Rotary positions (arXiv:2104.09864): turn channel pairs by angles that grow with position."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)


class Block(nn.Module):
    """Bidirectional attention and MLP, scaled and gated by the time (adaLN, arXiv:2212.09748)."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.gate, self.dropout = c.heads, c.gate, c.dropout
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=False)
        self.out = nn.Linear(c.width, c.width, bias=False)
        self.up = nn.Linear(c.width, 4 * c.width)
        self.down = nn.Linear(4 * c.width, c.width)
        self.ada = nn.Linear(c.cond, 6 * c.width)

    def forward(self, x, cond, cos, sin):
        B, L, D = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(cond)[:, None].chunk(6, dim=-1)
        y = F.layer_norm(x, (D,)) * (1 + scale1) + shift1
        q, k, v = self.qkv(y).view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        # unit-size queries and keys bound the attention logits: the learning rate may be large
        q = rotate(F.rms_norm(q, q.shape[-1:]), cos, sin)      # (B, heads, L, D/heads)
        k = rotate(F.rms_norm(k, k.shape[-1:]), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v)
        y = self.out(y.transpose(1, 2).reshape(B, L, D))                        # (B, L, D)
        x = x + (self.gate + gate1) * F.dropout(y, self.dropout, self.training)
        y = F.layer_norm(x, (D,)) * (1 + scale2) + shift2
        y = self.down(F.gelu(self.up(y)))
        return x + (self.gate + gate2) * F.dropout(y, self.dropout, self.training)


class Denoiser(nn.Module):
    """The transformer. It owns the embedding table E, in whose row space the noisy rows live."""

    def __init__(self, c, out):
        super().__init__()
        C = c.code or c.width
        self.embed = nn.Parameter(torch.empty(c.vocab, C))                      # E (V, C)
        self.into = nn.Linear(C, c.width, bias=False) if C != c.width else nn.Identity()
        self.position = nn.Parameter(torch.empty(c.length, c.width))
        # added where a token is given. Few channels are spent on what noise must decide, and would
        # hardly tell the digits of a source apart: there each token has a vector of its own
        self.known = nn.Embedding(1 + (c.vocab if c.code else 1), c.width)      # 0: to write
        self.time, *to = (
            nn.Sequential(nn.Linear(256, c.cond), nn.SiLU(), nn.Linear(c.cond, c.cond))
            for _ in range(1 + c.two_time))
        self.time_to = to[0] if to else None
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.ada = nn.Linear(c.cond, 2 * c.width)
        self.head = nn.Linear(c.width, out)                                     # not tied to E
        half = c.width // c.heads // 2
        angle = torch.arange(c.length)[:, None] * 10000 ** (-torch.arange(half) / half)
        self.register_buffer('cos', angle.cos(), persistent=False)
        self.register_buffer('sin', angle.sin(), persistent=False)

        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
            elif name.endswith('bias'):
                nn.init.zeros_(p)
        # as large as the noise beside it: what a noisy token means depends on where it stands, and
        # small positions (0.02, the usual value) take hundreds of iterations to be heard
        nn.init.normal_(self.position)
        nn.init.normal_(self.known.weight)
        # zero: the time modulates nothing yet, every token is equally likely, and a fresh target
        # time leaves a student equal to its teacher
        for layer in [self.ada, self.head, *(block.ada for block in self.blocks),
                      *([self.time_to[2]] if c.two_time else [])]:
            nn.init.zeros_(layer.weight)

    def forward(self, h, given, tau, tau_to=None):
        """h (B, L, C), given (B, L), tau and tau_to (B,) -> (B, L, out) in fp32."""
        known = self.known((given + 1).clamp(max=self.known.num_embeddings - 1))
        x = self.into(h) + self.position[:h.shape[1]] + known                   # (B, L, D)
        cond = self.time(sinusoid(tau))                                         # (B, cond)
        cond = F.silu(cond if tau_to is None else cond + self.time_to(sinusoid(tau_to)))
        cos, sin = self.cos[:h.shape[1]], self.sin[:h.shape[1]]
        for block in self.blocks:
            x = block(x, cond, cos, sin)
        shift, scale = self.ada(cond)[:, None].chunk(2, dim=-1)
        return self.head(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift).float()


# -------------------------------------------------------------------------------------------------
# Pure functions: the mathematics, testable on toys with known answers. t, s, u broadcast.

def right_token(t, K, share=1.0):
    """q(t) = P(argmax_k x_t is the right token) = E_z[Phi(z + t/(1-t))^(K-1)], arXiv:2602.16813.

    t (n,) float64 in [0, 1), K the vocabulary size -> (n,), by 100 Gauss-Hermite nodes. `share`
    scales the signal-to-noise ratio t/(1-t), for a reader who sees less than x_t.
    """
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
    p = delta_{s,t} (arXiv:2602.16813). x and p both dense, or both times E.
    """
    keep = (1 - t) / (1 - s).clamp(min=1e-6)
    return keep * x + (1 - keep) * p


def semigroup_weight(s, u, t):
    """g in delta_{s,t}(x) = g delta_{s,u}(x) + (1-g) delta_{u,t}(X_{s,u}(x)), arXiv:2602.16813."""
    return (1 - t) * (u - s) / ((1 - u) * (t - s)).clamp(min=1e-9)


def bridge(x, e, t, s, noise):
    """Draw x_s, s > t, given x_t and the clean e: N(a x + b e, v I), arXiv:2605.13681."""
    a = t / s * ((1 - s) / (1 - t)) ** 2
    v = (1 - s) ** 2 * (1 - a * t / s)
    return a * x + (s - a * t) * e + v.clamp(min=0).sqrt() * noise


def dense_corrupt(onehot, eps, t, E):
    """For reference only: h = ((1-t) eps + t onehot) E with (B, L, V) noise and one-hot rows."""
    return ((1 - t) * eps + t * onehot) @ E


# -------------------------------------------------------------------------------------------------
# FLM and FMLM: the one-hot flow (teacher) and its flow map (student, config.two_time)

class OneHotFlow(nn.Module):
    """The flow of one-hot tokens, seen through E, on one of these time axes:

    paper    tau rises as the error of argmax over x_t falls, arXiv:2602.16813
    reader   the same for who reads h = x_t E instead. Whitened by its noise covariance E^T E, a
             token's signal has energy E_k (E^T E)^-1 E_k^T, and these sum to C over the V tokens:
             only C/V of x_t's on average. So t/(1-t) shrinks by sqrt(C/V), where C < V.
    uniform  tau = t
    number   a factor on t/(1-t) chosen by hand: larger where a row's tokens tell of each other
    """

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.net = Denoiser(c, out=c.vocab)
        shares = {'reader': min(1, (c.code or c.width) / c.vocab) ** 0.5, 'paper': 1, 'uniform': 1}
        ts, taus = time_axis(c.vocab, shares.get(c.axis) or float(c.axis))
        taus = ts if c.axis == 'uniform' else taus
        self.register_buffer('ts', ts.float(), persistent=False)
        self.register_buffer('taus', taus.float(), persistent=False)

    def t_of(self, tau):
        return interpolate(tau, self.taus, self.ts)

    def tau_of(self, t):
        return interpolate(t, self.ts, self.taus)

    def noise_factor(self):
        """F (k, C) with F^T F = E^T E: z F has the law of eps E for z ~ N(0, I_k), k = min(V, C).

        One product of V C^2 and one C x C Cholesky per call; gradients reach E through it.
        """
        E = self.net.embed.float()
        if E.shape[0] <= E.shape[1]:
            return E                                                        # nothing to save
        gram = E.T @ E                                                          # (C, C)
        jitter = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
        return torch.linalg.cholesky(gram + jitter).T

    def noise(self, B, L, rng=None, factor=None):
        """eps E, eps ~ N(0, I) in R^(B x L x V), without eps: (B, L, C)."""
        factor = self.noise_factor() if factor is None else factor
        z = torch.randn(B, L, len(factor), generator=rng, device=factor.device)
        return z @ factor

    def corrupt(self, tokens, given, tau, rng=None):
        """Noisy rows at tau (B,): tokens (B, L) -> h (B, L, C); given positions stay clean."""
        t = self.t_of(tau)[:, None, None]
        clean = self.net.embed[tokens].float()                                  # (B, L, C)
        h = jump(self.noise(*tokens.shape, rng), clean, torch.zeros_like(t), t)
        return torch.where(given[..., None] < 0, h, clean)

    def predict(self, h, given, tau, tau_to=None):
        """The network on rows h (B, L, C) brought to unit size -> logits (B, L, V)."""
        t = self.t_of(tau)[:, None, None]
        V, C = self.net.embed.shape
        # mean squares per channel: |E|^2 / C for noise (it adds up over V tokens), 1/V of it for a
        # clean token. A constant per t, not each token's own norm: of few channels that tells much
        size = torch.where(given[..., None] < 0, (1 - t) ** 2 + t ** 2 / V, 1 / V)
        size = (size / C).sqrt() * self.net.embed.detach().float().norm()
        logits = self.net(h / size, given, tau, tau_to)
        return 30 * torch.tanh(logits / 30)         # soft cap, keeps bf16 logits finite

    def loss(self, tokens, given, tau, rng=None):
        """Cross-entropy of the clean tokens, mean over positions not given: (B,), nats."""
        h = self.corrupt(tokens, given, tau, rng)
        return row_cross_entropy(self.predict(h, given, tau), tokens, given)

    def begin(self, given, rng=None, factor=None):
        """Pure noise around the given tokens: h (B, L, C)."""
        clean = self.net.embed[given.clamp(min=0)].float()
        return torch.where(given[..., None] < 0, self.noise(*given.shape, rng, factor), clean)

    def one_call(self, h, given):
        """A flow map's logits (B, L, V) of the text that pure noise h stands for."""
        start = torch.zeros_like(h[:, 0, 0])
        return self.predict(h, given, start, start + 1)

    def jump(self, h, p, given, tau_s, tau_t):
        """Move h from tau_s to tau_t (B,) along the prediction p (B, L, V); given rows stay."""
        s, t = self.t_of(tau_s)[:, None, None], self.t_of(tau_t)[:, None, None]
        return torch.where(given[..., None] < 0, jump(h, p @ self.net.embed.float(), s, t), h)

    @torch.no_grad()
    def sample(self, given, nfe, rng=None, sampler='euler', gamma=0.0, temperature=1.0, top_p=1.0,
               watch=None):
        """Write the tokens that are not given (B, L), in nfe network calls: (B, L).

        sampler  euler (a student takes its flow map instead) | bridge
        gamma    0: follow the flow; up to 1: predict the data, then noise again (nothing at nfe 1)
        temperature, top_p act on every prediction; watch(i, tokens) is shown the argmax of each
        """
        B, L = given.shape
        E, factor, free = self.net.embed.float(), self.noise_factor(), given < 0
        clean = E[given.clamp(min=0)]                                           # (B, L, C)
        h = self.begin(given, rng, factor)                                      # tau = 0
        grid = torch.linspace(0, 1, nfe + 1, device=h.device)
        for i in range(nfe):
            now, then = grid[i].expand(B), grid[i + 1].expand(B)
            s, t = self.t_of(grid[i]), self.t_of(grid[i + 1])
            # gamma: land nearer the data, at r, so that scaling by t/r leaves room for fresh noise:
            # (t/r)^2 (1-r)^2 + gamma^2 (1-t)^2 = (1-t)^2, the noise level of time t
            r = t / (t + (1 - t) * (1 - gamma ** 2) ** 0.5)
            to = self.tau_of(r).expand(B) if gamma else then
            logits = self.predict(h, given, now, to if self.config.two_time else None)
            logits = logits / temperature
            logits[..., -2:] = -torch.inf                       # <sep> and <bos> are never written
            p = nucleus(logits.softmax(-1), top_p)                              # (B, L, V)
            if watch:
                watch(i, torch.where(free, p.argmax(-1), given))
            if i == nfe - 1:
                break
            if sampler == 'bridge':
                h_next = bridge(h, E[draw(p, rng)], s, t, self.noise(B, L, rng, factor))
            else:
                h_next = jump(h, p @ E, s, r)
                if gamma:
                    h_next = t / r * h_next + gamma * (1 - t) * self.noise(B, L, rng, factor)
            h = torch.where(free[..., None], h_next, clean)
        last = draw(p, rng) if sampler == 'bridge' else p.argmax(-1)
        return torch.where(free, last, given)


# -------------------------------------------------------------------------------------------------
# DiffuSeq and DLM-One: diffusion of embeddings (teacher) and its one-call generator (start > 0)

def noise_level(t):
    """a(t), s(t) of x_t = a x + s eps, a^2 + s^2 = 1: the square-root schedule of DiffuSeq.

    With T = 2000 published steps, index i is t = 1 - (i+1)/T (arXiv:2210.08933). Any shape of t.
    """
    # 2e-7: pure noise stays finite as s/a, the published table's last entry
    keep = ((1 - (1 - t + 1e-4).sqrt()) / 0.99).clamp(2e-7, 1)
    return keep.sqrt(), (1 - keep).sqrt()


def ancestral(x_t, x, t, s, noise):
    """Draw x_s, s > t, given x_t and the clean x: the exact posterior for any stride."""
    (a_t, s_t), (a_s, s_s) = noise_level(t), noise_level(s)
    keep = (a_t / a_s) ** 2                         # of the signal's power on the way from s to t
    mean = (a_s * (1 - keep) * x + keep.sqrt() * s_s ** 2 * x_t) / s_t ** 2
    return mean + ((1 - keep) * s_s ** 2 / s_t ** 2).sqrt() * noise


def ddim(x_t, x, t, s):
    """Move x_t to time s along the clean x, without fresh noise (arXiv:2010.02502)."""
    (a_t, s_t), (a_s, s_s) = noise_level(t), noise_level(s)
    return a_s * x + s_s / s_t * (x_t - a_t * x)


class EmbeddingDiffusion(nn.Module):
    """DiffuSeq (arXiv:2210.08933): Gaussian diffusion of embeddings; the network guesses x.

    Given positions keep their embedding at all times. What is learned is a table E with x near
    E[token] that rounding can tell apart, so the rounding head is E itself with a bias.
    """
    GRAIN = 0.121       # the clean end is a little noisy, x = E[token] + 0.121 n: s at i = 0

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.net = Denoiser(c, out=c.code or c.width)
        nn.init.normal_(self.net.embed)             # of the size of the noise
        self.bias = nn.Parameter(torch.zeros(c.vocab))

    def round(self, x):
        """Logits of the tokens that x (B, L, C) may stand for: (B, L, V)."""
        return x.float() @ self.net.embed.float().T + self.bias

    def predict(self, x_t, given, t):
        """The clean x (B, L, C) seen from x_t at time t (B,)."""
        return self.net(x_t, given, t)

    def noise(self, x, rng=None):
        return torch.randn(x.shape, generator=rng, device=x.device)

    def corrupt(self, x, clean, given, t, rng=None):
        """x_t (B, L, C) of x at times t (B,); given positions hold `clean`, their embeddings."""
        a, s = noise_level(t[:, None, None])
        return torch.where(given[..., None] < 0, a * x + s * self.noise(x, rng), clean)

    def loss(self, tokens, given, t, rng=None):
        """Squared error of x, rounding term and anchor term, mean over positions: (B,)."""
        clean = self.net.embed[tokens].float()                                  # (B, L, C)
        x = clean + self.GRAIN * self.noise(clean, rng)
        guess = self.predict(self.corrupt(x, clean, given, t, rng), given, t)
        error = row_mean((guess - x).square().mean(-1), given)
        # without the rounding term all embeddings would shrink to one point, error 0
        loss = error + row_cross_entropy(self.round(x), tokens, torch.full_like(given, -1))
        if self.config.anchor:
            loss = loss + self.config.anchor * row_cross_entropy(self.round(guess), tokens, given)
        return loss

    def begin(self, given, rng=None):
        """Noise at the time of the first call around the given embeddings: x_t (B, L, C)."""
        clean = self.net.embed[given.clamp(min=0)].float()
        s = noise_level(torch.tensor(self.config.start))[1]
        z = self.noise(clean[:, :1] if self.config.row_noise else clean, rng)
        return torch.where(given[..., None] < 0, s * z, clean)

    def generate(self, x_t, given):
        """The one-call generator: x (B, L, C), with gradient."""
        return self.predict(x_t, given, torch.full_like(x_t[:, 0, 0], self.config.start))

    def one_call(self, x_t, given):
        """Its logits (B, L, V)."""
        return self.round(self.generate(x_t, given))

    @torch.no_grad()
    def sample(self, given, nfe, rng=None, sampler='ancestral', clamp=False, watch=None):
        """Write the tokens that are not given (B, L), in nfe network calls: (B, L).

        sampler  ancestral | ddim, both right for any stride;  watch(i, tokens) sees each guess
        clamp    every guess goes to the nearest embedding before it is used
        """
        E, free = self.net.embed.float(), given < 0
        clean = E[given.clamp(min=0)]                                           # (B, L, C)
        grid = torch.linspace(self.config.start, 1, nfe + 1, device=clean.device)
        x_t = self.begin(given, rng)
        for i in range(nfe):
            x_t = torch.where(free[..., None], x_t, clean)
            x = self.predict(x_t, given, grid[i].expand(len(given)))
            # <sep> and <bos>, the last two, are never written
            written = torch.where(free, self.round(x)[..., :-2].argmax(-1), given)
            if watch:
                watch(i, written)
            if clamp:
                x = E[(x @ E.T - E.square().sum(-1) / 2).argmax(-1)]
            if i + 1 < nfe:
                x_t = (ddim(x_t, x, grid[i], grid[i + 1]) if sampler == 'ddim' else
                       ancestral(x_t, x, grid[i], grid[i + 1], self.noise(clean, rng)))
        return written


# -------------------------------------------------------------------------------------------------
# What both models share

def build(config):
    """The model a Config describes."""
    return (EmbeddingDiffusion if config.model == 'diffuseq' else OneHotFlow)(config)


def is_student(config):
    """Whether a model has been distilled: a flow map, or a generator that starts late."""
    return config.two_time or config.start > 0


def row_mean(x, given):
    """Mean of x (B, L) over the positions not given: (B,)."""
    return torch.where(given < 0, x, 0).sum(1) / (given < 0).sum(1).clamp(min=1)


def nucleus(p, top_p):
    """Keep the most likely tokens of total probability top_p: (..., V) -> (..., V)."""
    if top_p >= 1:
        return p
    sorted_p, order = p.sort(dim=-1, descending=True)
    sorted_p = sorted_p * (sorted_p.cumsum(-1) - sorted_p < top_p)
    p = torch.zeros_like(p).scatter(-1, order, sorted_p)
    return p / p.sum(-1, keepdim=True)


def draw(p, rng=None):
    """One token per position: (B, L, V) -> (B, L)."""
    return torch.multinomial(p.flatten(0, 1), 1, generator=rng).view(p.shape[:-1])


def row_cross_entropy(logits, target, given):
    """Mean over positions not given: logits (B, L, V), ids (B, L) or p (B, L, V) -> (B,), nats."""
    # tokens in one long row: (B, V, L), the other form it takes, costs a copy and slow strides
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(0, 1), reduction='none')
    return row_mean(loss.view(given.shape), given)


# -------------------------------------------------------------------------------------------------
# Tokenizers, files and checkpoints: tensors and plain values only

FORMAT = 2      # of checkpoints


def encoding(spec):
    """The tiktoken.Encoding of a dict {name, pattern, tokens as latin-1 strings in rank order}."""
    import tiktoken
    ranks = {token.encode('latin-1'): i for i, token in enumerate(spec['tokens'])}
    return tiktoken.Encoding(spec['name'], pat_str=spec['pattern'], mergeable_ranks=ranks,
                             special_tokens={s: len(ranks) + i for i, s in enumerate(SPECIAL)})


def encode(enc, spec, text):
    """Token ids of `text`; ValueError names the first piece that the tokenizer lacks."""
    if spec['name'] == 'dates':         # no byte fallback here: every piece must be a token itself
        for piece in re.findall(spec['pattern'] + '|.', text, re.S):
            if piece not in spec['tokens']:
                raise ValueError(f'{piece!r} is not in the vocabulary of this model')
    return enc.encode_ordinary(text)


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


def to_texts(rows, meta, enc=None):
    """Rows (B, L) -> list of (source, text)."""
    enc = enc or encoding(meta['tokenizer'])
    return [(enc.decode(source), enc.decode(text)) for source, text in split_rows(rows, meta)]


def write_whole(path, data):
    """Write bytes completely or not at all: to a temporary file beside `path`, then os.replace."""
    path = Path(path)
    temporary = path.with_name(path.name + '.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, 'wb') as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        fail(f'{path}: cannot be written ({e.strerror}); make room, or name another folder')
    finally:
        os.path.exists(temporary) and os.unlink(temporary)


def write_dataset(folder, train, val, spec, **about):
    """folder/{train,val}.bin, then meta.json: a folder that has a meta.json is complete."""
    V = len(spec['tokens'])
    meta = {'format': 1, 'name': Path(folder).name, 'vocab': V + len(SPECIAL), **about,
            'special': {name: V + i for i, name in enumerate(SPECIAL)}, 'train_tokens': len(train),
            'val_tokens': len(val), 'python': platform.python_version(), 'tokenizer': spec}
    write_whole(Path(folder) / 'train.bin', train.tobytes())
    write_whole(Path(folder) / 'val.bin', val.tobytes())
    write_whole(Path(folder) / 'meta.json', json.dumps(meta).encode())


def load(path, device='cpu'):
    """model.pt or its folder -> (averaged model in eval mode, checkpoint dict), or one line."""
    path = Path(path) / 'model.pt' if Path(path).suffix != '.pt' else Path(path)
    if not path.is_file():
        fail(f'{path}: no such checkpoint; make one with train_teacher.py, then distill.py')
    try:
        ckpt = torch.load(path, map_location='cpu', weights_only=True)
        if ckpt['format'] > FORMAT:
            fail(f'{path}: its format {ckpt["format"]} is newer than this code (format {FORMAT})')
        model = build(Config(**ckpt['config']))
        model.load_state_dict(ckpt['ema'])
    except Exception as e:              # torch.load raises a dozen different types
        fail(f'{path}: not a whole checkpoint of this project ({type(e).__name__}); make it anew')
    return model.to(device).eval(), ckpt


def save(path, model, ema, **more):
    """A checkpoint file, whole or not at all; `more` holds tensors and plain values."""
    ckpt = {'format': FORMAT, 'config': asdict(model.config), 'model': model.state_dict(),
            'ema': ema.state_dict(), **more,
            'versions': {'torch': str(torch.__version__), 'python': platform.python_version()}}
    buffer = io.BytesIO()
    torch.save(ckpt, buffer)
    write_whole(path, buffer.getbuffer())


def pick_device(name):
    """The torch.device named, else cuda, mps or cpu in this order."""
    name = name or ('cuda' if torch.cuda.is_available() else
                    'mps' if torch.backends.mps.is_available() else 'cpu')
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):
        fail(f'--device {name} is not available; leave it out to use what there is')
    return torch.device(name)


def autocast(device):
    """bf16 where the GPU has it, fp32 elsewhere."""
    on = device.type == 'cuda' and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=on)


def generator(device, *key):
    """A generator seeded by the numbers in `key`: an exact resume needs no saved state."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1
    return torch.Generator(device).manual_seed(int(seed))
