"""
One-step text generation: one transformer denoiser, and the four models that are built on it.

  OneHotFlow          FLM (teacher) and FMLM (student), arXiv:2602.16813
  EmbeddingDiffusion  DiffuSeq (teacher, arXiv:2210.08933) and DLM-One (student, arXiv:2506.00290)
  MaskedDiffusion     MDLM, a baseline, arXiv:2406.07524
  Autoregressive      a baseline that writes one token after the other, as nanoGPT does

Conventions, used everywhere in this repository:

  t in [0, 1]    time, from noise (t = 0) to data (t = 1); s <= u <= t for a flow map
  tau in [0, 1]  reparameterised time: training and samplers are uniform in tau
  B, L, V, D, C  batch, length, vocabulary, width, channels of the embedding
  h (B, L, C)    noisy rows x_t E: all that a network is ever given of the one-hot x_t
  given (B, L)   int64, ids of known tokens (a source, a prompt); -1 where text is to be written
  nfe            network calls of a sampler

Every model has loss(tokens, given, tau, rng) -> (B,), in nats (diffuseq's: plus squares), and
sample(given, nfe, rng, ..., on_call=None) -> (B, L), whose on_call(i, tokens) sees what each call
would write. The last four ids of every vocabulary are <eos>, <pad>, <sep>, <bos>.
A comment that begins with "ours" marks what neither of the papers has; smaller differences from
their codes are listed in assets/papers.md.
"""

import math
import os
import sys
import time
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# of checkpoint files; a file of another format is refused by one line
FORMAT = 7

# the time of DLM-One's only call: there b/a = 2.5, as at index 1490 of DiffuSeq's 2000
ONE_CALL_START = 1 - 1491 / 2000

# DiffuSeq's clean end is itself a little noisy, x = E[token] + 0.121 n: its b at index 0
GRAIN = 0.121

# ours: the time axes that follow the network's own loss, see OneHotFlow.refit_axis
MEASURED_AXES = ('measured', 'loss')

# folders that distill.py writes to, each beside its teacher's
STUDENTS = {'distilled': 'student', 'refined': 'one-call', 'mdlm': 'sdtt'}


@dataclass
class Config:
    """What fixes a model's shape and its loss; stored in its checkpoint."""
    vocab: int                   # V
    length: int                  # L, the longest row
    layers: int = 4
    heads: int = 4
    width: int = 128             # D
    channels: int = 128          # C, columns of the embedding table E (V x C)
    model: str = 'flm'           # flm | diffuseq | mdlm | ar
    cond: int = 128              # width of the time conditioning
    dropout: float = 0.0         # on attention-out and MLP-out
    gate: float = 0.0            # initial residual gates; 0 is adaLN-zero, as in the papers
    hidden_input: bool = False   # a hidden layer between the rows of E and the first block
    axis: str = 'paper'          # flm: tau(t), one of paper | measured | loss | uniform
    stagger: float = 0.0         # flm: delay of the last token, in the time that each takes
    two_time: bool = False       # flm: a flow map, which also knows the time it jumps to
    noise_values: int = 0        # flm: how many values each number of its noise can take; 0: any
    start: float = 0.0           # diffuseq: time of the first call; a one-call student's is later
    row_noise: bool = False      # diffuseq: the first noise is one vector for all of a row
    all_positions: bool = False  # diffuseq: error and grain at the source's positions, too
    anchor: float = 0.0          # diffuseq: weight of the cross-entropy of the rounded prediction


# -----------------------------------------------------------------------------
# The denoiser, used by every model: rows h (B, L, C) at tau (B,) -> (B, L, V), or (B, L, C)

def sinusoid(tau, frequencies):
    """Fourier features of times in [0, 1]: (...) and (n,) -> (..., 2 n)."""
    angles = tau[..., None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotate(x, cos, sin):
    """Rotary positions (arXiv:2104.09864): turn channel pairs by angles that grow with position."""
    x1, x2 = x.chunk(2, dim=-1)
    turned1 = torch.addcmul(x1 * cos, x2, sin, value=-1)
    turned2 = torch.addcmul(x1 * sin, x2, cos)
    return torch.cat([turned1, turned2], dim=-1)


def modulate(x, shift, scale):
    """Layer norm of x (B, L, D) without weights of its own, then the time's scale and shift."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), scale)


class Block(nn.Module):
    """Attention and MLP, both shifted, scaled and gated by the time (adaLN, arXiv:2212.09748)."""

    def __init__(self, config):
        super().__init__()
        D = config.width
        self.heads = config.heads
        self.causal = config.model == 'ar'
        self.dropout = config.dropout
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.up = nn.Linear(D, 4 * D)
        self.down = nn.Linear(4 * D, D)

    def attention(self, x, cos, sin, cache, at):
        """x (B, L, D) -> (B, L, D). With a cache, x is the position `at` alone, see Denoiser."""
        B, L, D = x.shape
        size = D // self.heads
        qkv = self.qkv(x).view(B, L, 3, self.heads, size)
        # ours: queries and keys of length 1, times sqrt(size), bound the attention logits
        # (arXiv:2302.05442), so that the learning rate may be large (86 % of stories valid, 55 %
        # without: assets/ablations.md); FLM caps the logits at 50
        qk = qkv[:, :, :2]
        qk = rotate(qk / (qk.norm(dim=-1, keepdim=True) + 1e-6), cos, sin)
        q, k = qk.permute(2, 0, 3, 1, 4)  # (B, heads, L, size) each
        v = qkv[:, :, 2].transpose(1, 2)
        if cache is not None:
            # only the newest token goes through the network; it sees those before it, all kept
            assert L == 1
            cache[0, :, :, at:at + 1] = k
            cache[1, :, :, at:at + 1] = v
            k = cache[0, :, :, :at + 1]
            v = cache[1, :, :, :at + 1]
        causal = self.causal and cache is None
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=size ** 0.5)
        return self.out(y.transpose(1, 2).reshape(B, L, D))

    def forward(self, x, modulation, cos, sin, cache=None, at=0):
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation  # (B, 1, D) each
        y = self.attention(modulate(x, shift1, scale1), cos, sin, cache, at)
        x = torch.addcmul(x, gate1, F.dropout(y, self.dropout, self.training))
        y = self.down(F.gelu(self.up(modulate(x, shift2, scale2))))
        return torch.addcmul(x, gate2, F.dropout(y, self.dropout, self.training))


class Denoiser(nn.Module):
    """The transformer. It owns the embedding table E, in whose row space the noisy rows live."""

    def __init__(self, config, out):
        super().__init__()
        V = config.vocab
        D = config.width
        C = config.channels
        self.layers = config.layers
        self.embed = nn.Parameter(torch.empty(V, C))  # E
        self.into = nn.Linear(C, D, bias=False) if C != D else nn.Identity()
        if config.hidden_input:
            # ours: of few channels tokens lie so close that a linear layer hardly tells them apart
            self.into = nn.Sequential(nn.Linear(C, 4 * D), nn.GELU(), nn.Linear(4 * D, D))
        # ours: learnt positions beside the rotary ones, which FLM has alone (86 % of stories valid,
        # 51 % without: assets/ablations.md)
        self.position = nn.Parameter(torch.empty(config.length, D))
        # ours: what marks a position whose token is seen for certain; entry 0 is for all others.
        # One entry would do where E is wide. Of few channels, E learns what noise has to decide,
        # and hardly tells the digits of a source apart: then each token has an entry of its own,
        # unless a hidden layer is there to tell them apart
        entries = V if C < D and not config.hidden_input else 1
        self.known = nn.Embedding(1 + entries, D)
        self.time = self.time_network(config.cond)
        self.time_to = self.time_network(config.cond) if config.two_time else None
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        # the time's shifts, scales and gates for all blocks at once, and for the head
        self.modulation = nn.Linear(config.cond, (6 * config.layers + 2) * D)
        self.head = nn.Linear(D, out)  # not tied to E
        # the functions that apply it; compile_net replaces them
        self.logits = capped_logits
        self.nats = row_nats
        # a flow's logits are softly capped, 30 tanh(z / 30), as in the paper's second version
        self.cap = 30.0 if config.model == 'flm' else 0.0
        half = D // config.heads // 2
        angle = torch.arange(config.length)[:, None] * 10000 ** (-torch.arange(half) / half)
        self.register_buffer('cos', angle.cos(), persistent=False)  # (L, half)
        self.register_buffer('sin', angle.sin(), persistent=False)
        # ours: times are scaled by 1000 (periods from 0.006 to 58), so that neighbouring ones
        # differ; FLM feeds tau itself
        frequencies = 1000 * 10000 ** (-torch.arange(128) / 128)
        self.register_buffer('frequencies', frequencies, persistent=False)
        self.initialise(config.gate)

    @staticmethod
    def time_network(cond):
        return nn.Sequential(nn.Linear(256, cond), nn.SiLU(), nn.Linear(cond, cond))

    def initialise(self, gate):
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
            else:
                nn.init.zeros_(p)
        # as large as the noise beside it: the usual 0.02 takes hundreds of iterations to be heard
        nn.init.normal_(self.position)
        nn.init.normal_(self.known.weight)
        # at first no time modulates anything: shifts are 0, scales 1, and gates what they are told
        nn.init.zeros_(self.modulation.weight)
        one_block = torch.tensor([0, 1, gate, 0, 1, gate])
        pieces = torch.cat([one_block.repeat(self.layers), torch.tensor([0, 1])])
        with torch.no_grad():
            self.modulation.bias.copy_(pieces.repeat_interleave(self.position.shape[1]))
        # and all tokens are equally likely
        nn.init.zeros_(self.head.weight)
        # zero: a fresh student does what its teacher does, whatever time it is told to jump to
        if self.time_to is not None:
            nn.init.zeros_(self.time_to[2].weight)

    def forward(self, h, seen, tau, tau_to=None, target=None, share=None, cache=None, at=0):
        """
        h (B, L, C), seen (B, L) ids of tokens known for certain, else -1, tau and tau_to (B,) or
        (1,) -> logits (B, L, out) in fp32.
        With a target, ids (B, L) or probabilities (B, L, V): the cross-entropy of each row (B,) in
        nats, summed over positions by their share (B, L); default: the mean over those not seen.
        ar: with a cache (layers, 2, B, heads, L, D/heads), h holds the position `at` alone.
        """
        here = slice(at, at + h.shape[1])
        cos = self.cos[here, None, None]  # (L, 1, 1, half): alike for queries, keys and heads
        sin = self.sin[here, None, None]
        known = self.known((seen + 1).clamp(max=self.known.num_embeddings - 1))
        x = self.into(h) + self.position[here] + known  # (B, L, D)

        # what the time has to say to every block
        cond = self.time(sinusoid(tau, self.frequencies))
        if tau_to is not None:
            cond = cond + self.time_to(sinusoid(tau_to, self.frequencies))
        pieces = self.modulation(F.silu(cond))[:, None].chunk(6 * self.layers + 2, dim=-1)

        for i, block in enumerate(self.blocks):
            kept = None if cache is None else cache[i]
            x = block(x, pieces[6 * i:6 * i + 6], cos, sin, kept, at)
        y = modulate(x, *pieces[-2:])

        if target is None:
            return self.logits(y, self.head.weight, self.head.bias, self.cap)
        if share is None:
            share = share_of(seen)
        return self.nats(y, self.head.weight, self.head.bias, self.cap, target, share)


def compile_net(net, **how):
    """
    torch.compile of a Denoiser's blocks and of its end, in place: the names of the weights stay as
    they are. What is compiled for one block serves all, where the whole network would take long.
    """
    for block in net.blocks:
        block.compile(**how)
    net.logits = torch.compile(capped_logits, **how)
    net.nats = torch.compile(row_nats, **how)


# -----------------------------------------------------------------------------
# The one-hot flow: its mathematics. t, s and u broadcast

def right_token_probability(t, K, signal_scale=1.0):
    """
    q(t) = P(argmax_k x_t is the right token) = E_z[Phi(z + t/(1-t))^(K-1)], z ~ N(0, 1), for t (n,)
    float64 in [0, 1) and K tokens -> (n,). arXiv:2602.16813, time reparameterisation.
    signal_scale: on t/(1-t), the ratio of signal to noise, for a reader who sees less than x_t.
    """
    # Gauss-Hermite: an expectation over z becomes a weighted sum over 100 nodes
    nodes, weights = np.polynomial.hermite_e.hermegauss(100)
    nodes = torch.from_numpy(nodes)
    weights = torch.from_numpy(weights)
    log_cdf = torch.special.log_ndtr(nodes + signal_scale * (t / (1 - t))[:, None])  # (n, 100)
    return (weights * torch.exp((K - 1) * log_cdf)).sum(1) / weights.sum()


def time_axis(K, signal_scale=1.0, knots=1001):
    """Knots (ts, taus) of tau(t) = K/(K-1) (q(t) - 1/K), each (knots,) float64, from 0 to 1."""
    ts = torch.linspace(0, 1, knots, dtype=torch.float64)
    taus = (right_token_probability(ts[:-1], K, signal_scale) - 1 / K) * K / (K - 1)
    # the sum over nodes is a little off: exactly 0 at t = 0, at most 1, and never falling
    taus = torch.cat([taus - taus[0], torch.ones(1)]).clamp(0, 1)
    taus = torch.cummax(taus, 0).values
    # flat at both ends to machine precision: a slight slope keeps t(tau) one-to-one
    return ts, (1 - 1e-4) * taus + 1e-4 * ts


def values_of_noise(count):
    """
    ours: a student's noise is made of numbers z of few values, the medians of `count` equally
    likely slices of N(0, 1): (count,), none for 0. C numbers make one of count^C symbols at each
    position. Which text noise belongs to is hardest to tell where those of two texts meet; what
    lies there between two symbols is never asked (assets/ablations.md).
    """
    medians = torch.special.ndtri((torch.arange(count) + 0.5) / count)
    # mean square 1, as of N(0, 1): noise has the size that the teacher knows
    return medians / medians.square().mean().sqrt()


def interpolate(x, xs, ys):
    """Piecewise linear y(x) through knots (xs, ys), xs rising; x of any shape."""
    i = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
    w = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
    return ys[i - 1] + w * (ys[i] - ys[i - 1])


def jump(x, p, s, t):
    """
    X_{s,t}(x) = (1-t)/(1-s) x + (t-s)/(1-s) p, arXiv:2602.16813: an Euler step for p = D_s(x), the
    flow map for p = delta_{s,t}(x). x and p are both in R^V, or both already times E.
    """
    left = 1 - s
    # at s = 1 nothing is left to be moved
    keep = torch.where(left > 1e-6, (1 - t) / left.clamp(min=1e-6), 1)
    return keep * x + (1 - keep) * p


def first_leg_weight(s, u, t):
    """
    g in delta_{s,t}(x) = g delta_{s,u}(x) + (1-g) delta_{u,t}(X_{s,u}(x)), s <= u <= t: how much
    of a jump's text its first leg decides (semigroup property, arXiv:2602.16813). g = 0 at t = 1,
    unless the first leg has come there itself.
    """
    g = (1 - t) * (u - s) / ((1 - u) * (t - s)).clamp(min=1e-9)
    return torch.where((1 - u < 1e-6) & (u > s), 1, g)


# -----------------------------------------------------------------------------
# The models

class Model(nn.Module):
    """What the four models share: a config and a denoiser."""

    def __init__(self, config, out):
        super().__init__()
        self.config = config
        self.net = Denoiser(config, out)

    def embedded(self, ids):
        """Rows of E, (B, L) -> (B, L, C); ids of -1 (tokens not known) count as 0."""
        return F.embedding(ids.clamp(min=0), self.net.embed)


class OneHotFlow(Model):
    """
    FLM (teacher) and FMLM, its flow map (student, config.two_time): arXiv:2602.16813.

    The flow x_t = (1-t) eps + t onehot(token), eps ~ N(0, I) in R^V at each of L positions.

    The network's first layer is linear, so all that it sees of x_t is h = x_t E, and h alone is
    ever computed. eps E has covariance E^T E, so it is drawn as z R with R^T R = E^T E: C numbers
    for each position in place of V, of exactly the same law. What moves x_t (an Euler step, a jump)
    is affine, so it moves h in the same way.

    Time axes: paper (tau rises as the error of argmax over x_t falls), uniform (tau = t), and two
    that follow the network's own loss, see refit_axis.
    """

    def __init__(self, config):
        super().__init__(config, config.vocab)
        signal_scale = 1.0
        if config.axis in MEASURED_AXES:
            # ours: where training begins, see refit_axis: the axis of a reader of h, which is a
            # projection of x_t from V to C directions, in which a share C/V of its energy lies
            signal_scale = min(1, config.channels / config.vocab) ** 0.5
        ts, taus = time_axis(config.vocab, signal_scale)
        if config.axis == 'uniform':
            taus = ts
        self.register_buffer('ts', ts.float(), persistent=False)
        self.register_buffer('taus', taus.float())
        # none: noise may take any value
        self.register_buffer('values', values_of_noise(config.noise_values), persistent=False)

    @torch.no_grad()
    def refit_axis(self, tokens, given, seed):
        """
        ours: let tau rise as the root of the network's own loss on these rows (B, L) falls, seen at
        33 times of tokens. By the loss itself each call of a sampler would decide as much as any
        other; by its root more calls are left for the end, where few tokens are open, but each may
        spoil its text; `axis` loss is for text where that does not pay (assets/ablations.md). FLM's
        axis follows a reader of all of x_t, of which the network sees C numbers. Returns the new
        taus.
        """
        # without dropout
        training = self.training
        self.eval()
        grid = torch.linspace(0, 1, 33, device=tokens.device)
        sums = torch.zeros(3, 33, device=tokens.device)  # of losses, of taus, and their number
        # so many that near each of the 33 all tokens are met, equally often
        n = round(64 * (1 + self.config.stagger))
        taus = (torch.arange(n, device=tokens.device) + 0.5) / n
        # the same rows and noise each time, or the axis would get stairs
        noise = self.noise(*tokens.shape, torch.Generator(tokens.device).manual_seed(seed))
        # several times in a call, of which a GPU would wait for each; of a large V fewer
        at_once = max(1, min(8, 2 ** 25 // (tokens.numel() * self.config.vocab)))
        for part in taus.split(at_once):
            tau = part.repeat_interleave(len(tokens))
            text = tokens.repeat(len(part), 1)
            known = given.repeat(len(part), 1)
            h = self.mix(text, known, tau, noise.repeat(len(part), 1, 1))
            logits = self.predict(h, known, tau)
            nats = F.cross_entropy(logits.transpose(1, 2), text, reduction='none').flatten()
            at = self.token_tau(tau, known).flatten()
            # not those that have yet to begin, or are written
            counted = ((known.flatten() < 0) & (at > 0) & (at < 1)).float()
            seen = torch.stack([nats, at, torch.ones_like(at)]) * counted
            sums.index_add_(1, (32 * at).round().long(), seen)
        self.train(training)
        # too little is to be written in these rows
        if (sums[2] == 0).any():
            return self.taus
        # as they were not met just at the 33, but around them
        loss = interpolate(grid, sums[1] / sums[2], sums[0] / sums[2])
        # it falls, if only slightly
        loss = torch.cummin(loss, 0).values - 1e-6 * grid
        # the share of the loss that is left
        left = (loss - loss[-1]) / (loss[0] - loss[-1])
        if self.config.axis != 'loss':
            left = left.sqrt()
        # half of the old axis stays: one rough measure does little harm
        new = 0.5 * (1 - left) + 0.5 * grid
        self.taus.copy_(interpolate(self.taus, grid, new))
        return self.taus

    def t_of(self, tau):
        """The time t at tau, any shape."""
        return interpolate(tau, self.taus, self.ts)

    def token_tau(self, tau, given):
        """
        The tau of each token (B, L) of rows at tau, (B,) or (1,).
        ours (stagger): the first token to be written goes ahead, the last one begins when a share
        stagger / (1 + stagger) of the way is over; so a token can be decided knowing most of those
        before it (AR-Diffusion, arXiv:2305.09515). At 0 all are at the row's tau, as in the paper.
        """
        w = self.config.stagger
        if w == 0:
            return tau[:, None].expand(given.shape)
        written = given < 0
        place = written.cumsum(1) - 1  # among those to be written: 0, 1, ...
        last = (written.sum(1, keepdim=True) - 1).clamp(min=1)
        return ((1 + w) * tau[:, None] - w * place / last).clamp(0, 1)

    def token_t(self, tau, given):
        """The t of each token of rows at tau, (B,) or (1,), to be used on (B, L, C): (B, L, 1)."""
        return self.t_of(self.token_tau(tau, given))[..., None]

    def noise_factor(self, positions):
        """
        R (k, C) with R^T R = E^T E: z R has the law of eps E for z ~ N(0, I_k) at each position.
        R is a Cholesky factor (k = C), for a product of V C^2, or E itself (k = V, filled up),
        whichever costs less; of few values there are C numbers, if C < V. Gradients reach E
        through both.
        """
        E = self.net.embed
        V, C = E.shape
        if V <= C or (positions <= C and len(self.values) == 0):
            return fill_up(E, 0)
        # in bf16 the product would not be positive definite
        with torch.autocast(E.device.type, enabled=False):
            gram = E.T @ E  # (C, C)
            jitter = 1e-6 * gram.diagonal().mean()
            factor, failed = torch.linalg.cholesky_ex(gram + jitter * torch.eye(C, device=E.device))
        # cholesky_ex does not wait for a GPU: a failure shows as a loss that is not finite
        return torch.where(failed == 0, factor.T, math.nan)

    def noise(self, B, L, rng=None, factor=None):
        """
        eps E for eps ~ N(0, I) in R^(B x L x V), without eps: (B, L, C). Of few values, see
        values_of_noise, it has the mean and covariance of that, not its law.
        """
        if factor is None:
            factor = self.noise_factor(B * L)
        shape = (B, L, len(factor))
        if len(self.values) > 0:
            which = torch.randint(len(self.values), shape, generator=rng, device=factor.device)
            z = self.values[which]
        else:
            z = torch.randn(shape, generator=rng, device=factor.device)
        return z @ factor

    def corrupt(self, tokens, given, tau, rng=None):
        """Noisy tokens (B, L) in rows at tau (B,) -> h (B, L, C); given ones stay clean."""
        return self.mix(tokens, given, tau, self.noise(*tokens.shape, rng))

    def mix(self, tokens, given, tau, noise):
        """The same from this noise (B, L, C), eps E."""
        t = self.token_t(tau, given)
        clean = self.embedded(tokens)
        h = (1 - t) * noise + t * clean
        return torch.where(given[..., None] < 0, h, clean)

    def predict(self, h, given, tau, tau_to=None, target=None):
        """
        D_tau(h), or delta_{tau,tau_to}(h) of a flow map, as logits (B, L, V); tau (B,) or (1,).
        With a target, ids (B, L) or probabilities (B, L, V): each row's cross-entropy (B,), nats.
        """
        # ours: rows come to the network at unit size, which over a vocabulary of 50,257 differs by
        # 200 between noise and clean tokens. Mean squares per channel are |E|^2 / C for noise,
        # which adds up over V tokens, and 1/V of that for one token. The size is a constant at
        # each t, not each token's own norm, which says much where channels are few
        t = self.token_t(tau, given)
        if self.config.two_time and tau_to is None:
            # a flow map from s to s is the denoiser
            tau_to = tau
        V, C = self.net.embed.shape
        size = torch.where(given[..., None] < 0, (1 - t) ** 2 + t ** 2 / V, 1 / V)
        # a measure only: no gradient makes E larger or smaller by it
        size = (size / C).sqrt() * self.net.embed.detach().norm()
        return self.net(h / size, given, tau, tau_to, target)

    def loss(self, tokens, given, tau, rng=None):
        """Cross-entropy of the clean tokens, mean over positions not given: (B,), nats."""
        return self.predict(self.corrupt(tokens, given, tau, rng), given, tau, target=tokens)

    def begin(self, given, rng=None, factor=None):
        """Pure noise around the given tokens: h (B, L, C) at tau = 0."""
        B, L = given.shape
        noise = self.noise(B, L, rng, factor)
        return torch.where(given[..., None] < 0, noise, self.embedded(given))

    def jump(self, h, p, given, tau_s, tau_t):
        """Move h from tau_s to tau_t along p (B, L, V); given positions stay as they are."""
        s = self.token_t(tau_s, given)
        t = self.token_t(tau_t, given)
        aim = fill_up(p, -1) @ fill_up(self.net.embed, 0)  # (B, L, C)
        return torch.where(given[..., None] < 0, jump(h, aim, s, t), h)

    @torch.no_grad()
    def sample(self, given, nfe, rng=None, temperature=1.0, gamma=0.0, on_call=None):
        """
        Euler steps of a teacher, jumps of a student, on a uniform grid of tau: (B, L).
        The text is the argmax of the last call, arXiv:2602.16813. temperature divides the logits;
        gamma: 0 follows the flow, up to 1 each call overshoots and noise is added anew. Neither has
        an effect at nfe = 1.
        """
        B, L = given.shape
        factor = self.noise_factor(B * L)
        h = self.begin(given, rng, factor)
        taus = torch.linspace(0, 1, nfe + 1, device=h.device)
        for i in range(nfe):
            tau = taus[i:i + 1]  # (1,): all rows are at the same time
            tau_next = taus[i + 1:i + 2]
            landing = self.gamma_landing(tau_next, gamma)
            tau_to = landing if self.config.two_time else None
            logits = without_specials(self.predict(h, given, tau, tau_to))
            if on_call is not None or i == nfe - 1:
                tokens = torch.where(given < 0, logits.argmax(-1), given)
            if on_call is not None:
                on_call(i, tokens)
            if i == nfe - 1:
                return tokens
            p = (logits / temperature).softmax(-1)
            h = self.jump(h, p, given, tau, landing)
            if gamma > 0:
                h = self.renoise(h, given, landing, tau_next, self.noise(B, L, rng, factor))

    def gamma_landing(self, tau_next, gamma):
        """Where gamma sampling jumps to before it adds noise: tau of a row, (1,) -> (1,)."""
        if gamma == 0:
            return tau_next
        # ours: land at the r for which scaling by t/r leaves room for just the fresh noise,
        # (t/r)^2 (1-r)^2 + gamma^2 (1-t)^2 = (1-t)^2, which keeps the law of x_t; the public code
        # lands at 1 - (1-t) sqrt(1 - gamma^2), which does not
        t = self.t_of(tau_next)
        r = t / (t + (1 - t) * (1 - gamma ** 2) ** 0.5)
        return interpolate(r, self.ts, self.taus)

    def renoise(self, h, given, tau_r, tau_t, noise):
        """Back from tau_r to an earlier tau_t, (1,) each, by noise of just the size it takes."""
        r = self.token_t(tau_r, given)
        t = self.token_t(tau_t, given)
        keep = t / r.clamp(min=1e-6)
        size = ((1 - t) ** 2 - (keep * (1 - r)) ** 2).clamp(min=0).sqrt()
        return torch.where(given[..., None] < 0, keep * h + size * noise, h)


# -----------------------------------------------------------------------------
# The embedding diffusion: its mathematics. Times of any shape that broadcasts

def noise_level(t):
    """
    a, b of x_t = a x + b eps with a^2 + b^2 = 1: the square-root schedule of DiffuSeq, whose index
    i of T = 2000 is t = 1 - (i+1)/T (arXiv:2210.08933).
    """
    # 0.99 and 1e-4 are of the public code; 2e-7 keeps b/a finite at t = 0, its last entry
    keep = ((1 - (1 - t + 1e-4).sqrt()) / 0.99).clamp(2e-7, 1)
    return keep.sqrt(), (1 - keep).sqrt()


def ancestral_step(x_s, x, s, t, noise):
    """Draw x_t, t > s, given x_s and the clean x: the posterior of arXiv:2006.11239, any stride."""
    a_s, b_s = noise_level(s)
    a_t, b_t = noise_level(t)
    keep = (a_s / a_t) ** 2  # of the signal's power on the way back to s
    mean = (a_t * (1 - keep) * x + keep.sqrt() * b_t ** 2 * x_s) / b_s ** 2
    return mean + ((1 - keep) * b_t ** 2 / b_s ** 2).sqrt() * noise


def ddim_step(x_s, x, s, t):
    """Move x_s to a later time t along the clean x, without fresh noise (arXiv:2010.02502)."""
    a_s, b_s = noise_level(s)
    a_t, b_t = noise_level(t)
    return a_t * x + b_t / b_s * (x_s - a_s * x)


class EmbeddingDiffusion(Model):
    """
    DiffuSeq (arXiv:2210.08933): Gaussian diffusion of embeddings; the network guesses the clean x.
    Given positions keep their embedding at all times. The rounding head is E itself with a bias.
    """

    def __init__(self, config):
        super().__init__(config, config.channels)
        nn.init.normal_(self.net.embed)  # of the size of the noise
        self.bias = nn.Parameter(torch.zeros(config.vocab))

    def predict(self, x_t, given, t):
        """The clean x (B, L, C) seen from x_t at time t, (B,) or (1,)."""
        return self.net(x_t, given, t)

    def rounding_logits(self, x):
        """Logits (B, L, V) of the tokens that x (B, L, C) may stand for."""
        return capped_logits(x, self.net.embed, self.bias, 0.0)

    def rounding_nats(self, x, target, share):
        """Cross-entropy (B,) of target, ids or probabilities, under the rounding of x; nats."""
        return row_nats(x, self.net.embed, self.bias, 0.0, target, share)

    def noise(self, like, rng=None):
        return torch.randn(like.shape, generator=rng, device=like.device)

    def corrupt(self, x, clean, given, t, rng=None):
        """x_t (B, L, C) of x at times t (B,); given positions hold `clean`, their embeddings."""
        a, b = noise_level(t[:, None, None])
        return torch.where(given[..., None] < 0, a * x + b * self.noise(x, rng), clean)

    def loss(self, tokens, given, t, rng=None):
        """Squared error of x, rounding term and anchor term, mean over positions: (B,)."""
        embedded = self.embedded(tokens)
        x = embedded + GRAIN * self.noise(embedded, rng)
        if self.config.all_positions:
            # DiffuSeq's own: the source is noised by the grain, and its error counts
            source = x
            counted = torch.full_like(given, -1)
        else:
            # ours: a clean source, and no error where nothing is written
            source = embedded
            counted = given
        guess = self.predict(self.corrupt(x, source, given, t, rng), given, t)
        loss = row_mean((guess - x).square().mean(-1), counted)
        # without the rounding term all embeddings would shrink to one point, error 0
        everywhere = share_of(torch.full_like(given, -1))
        loss = loss + self.rounding_nats(x, tokens, everywhere)
        if self.config.anchor:
            # ours: the guess itself is to round to the right token
            loss = loss + self.config.anchor * self.rounding_nats(guess, tokens, share_of(given))
        return loss

    def begin(self, given, rng=None):
        """Noise at the time of the first call around the given embeddings: x_t (B, L, C)."""
        clean = self.embedded(given)
        # nothing is known of the text yet, so its part a x is left out
        _, b = noise_level(torch.tensor(self.config.start))
        # ours (row_noise): all positions see the same noise, so they need not agree on theirs
        z = self.noise(clean[:, :1] if self.config.row_noise else clean, rng)
        return torch.where(given[..., None] < 0, b * z, clean)

    def generate(self, x_t, given):
        """The one-call generator of DLM-One: the clean x (B, L, C), with gradient."""
        return self.predict(x_t, given, torch.full_like(x_t[:, 0, 0], self.config.start))

    def nearest(self, x):
        """The embedding nearest to each x (B, L, C): DiffuSeq's clamp."""
        E = self.net.embed
        # |E - x|^2 is least where x E - |E|^2 / 2 is largest; bf16 would be too coarse for that
        with torch.autocast(E.device.type, enabled=False):
            closeness = F.linear(x.float(), E, -0.5 * E.square().sum(1))  # (B, L, V)
        return self.embedded(closeness.argmax(-1))

    @torch.no_grad()
    def sample(self, given, nfe, rng=None, method='ancestral', clamp=False, on_call=None):
        """
        method: ancestral (DiffuSeq's) or ddim, both right for any stride -> (B, L).
        clamp: each guess becomes the nearest embedding, DiffuSeq's own way.
        """
        x_t = self.begin(given, rng)
        clean = self.embedded(given)
        times = torch.linspace(self.config.start, 1, nfe + 1, device=x_t.device)
        for i in range(nfe):
            s, t = times[i], times[i + 1]
            x = self.predict(x_t, given, s[None])
            if on_call is not None or i == nfe - 1:
                tokens = without_specials(self.rounding_logits(x)).argmax(-1)
                tokens = torch.where(given < 0, tokens, given)
            if on_call is not None:
                on_call(i, tokens)
            if i == nfe - 1:
                return tokens
            if clamp:
                x = self.nearest(x)
            if method == 'ddim':
                x_t = ddim_step(x_t, x, s, t)
            else:
                x_t = ancestral_step(x_t, x, s, t, self.noise(clean, rng))
            x_t = torch.where(given[..., None] < 0, x_t, clean)


# -----------------------------------------------------------------------------
# The baselines, on tokens themselves, without noise: the same network

class TokenModel(Model):
    """What the baselines share: a network that sees tokens, or that there is none."""

    def __init__(self, config):
        super().__init__(config, config.vocab)

    def predict(self, seen, **how):
        """Logits (B, L, V), or nats, from the tokens seen (B, L), -1 where masked; see Denoiser."""
        h = torch.where(seen[..., None] < 0, 0, self.embedded(seen))
        no_time = torch.zeros(1, device=seen.device)  # what is seen tells how far it is
        return self.net(h, seen, no_time, **how)


class MaskedDiffusion(TokenModel):
    """MDLM (arXiv:2406.07524): tokens are masked, guessed, and stay once they are written."""

    def corrupt(self, tokens, given, t, rng=None):
        """What is seen of tokens (B, L) at t (B,): each is masked with 1 - t, but for given."""
        hidden = torch.rand(tokens.shape, generator=rng, device=tokens.device) >= t[:, None]
        return torch.where(hidden & (given < 0), -1, tokens)

    def loss(self, tokens, given, t, rng=None):
        """Bound on -log p, nats per position not given: the masked count 1/(1-t) each: (B,)."""
        seen = self.corrupt(tokens, given, t, rng)
        share = share_of(given) * (seen < 0) / (1 - t[:, None]).clamp(min=1e-3)
        return self.predict(seen, target=tokens, share=share)

    @torch.no_grad()
    def sample(self, given, nfe, rng=None, temperature=1.0, on_call=None):
        """Ancestral sampling: each call writes a share of the masks that are left: (B, L)."""
        seen = given
        times = torch.linspace(0, 1, nfe + 1, device=given.device)
        for i in range(nfe):
            s, t = times[i], times[i + 1]
            logits = without_specials(self.predict(seen))
            tokens = draw((logits / temperature).softmax(-1), rng)
            tokens = torch.where(seen < 0, tokens, seen)
            if on_call is not None:
                on_call(i, tokens)
            # of the masks left at time s a share of (t - s) / (1 - s) is written by time t
            now = torch.rand(given.shape, generator=rng, device=given.device) < (t - s) / (1 - s)
            seen = torch.where(now | (seen >= 0), tokens, seen)
        return tokens


class Autoregressive(TokenModel):
    """Writes from left to right: each position sees those before it, and predicts its token."""

    def loss(self, tokens, given, tau=None, rng=None):
        """-log p of each token given all before it, mean over positions not given: (B,), nats."""
        before = F.pad(tokens[:, :-1], (1, 0), value=self.config.vocab - 1)  # <bos> is the first
        return self.predict(before, target=tokens, share=share_of(given))

    @torch.no_grad()
    def sample(self, given, nfe=None, rng=None, temperature=1.0, on_call=None):
        """One call for each of L tokens, whatever nfe says, with a cache of keys and values."""
        c = self.config
        B, L = given.shape
        shape = (c.layers, 2, B, c.heads, L, c.width // c.heads)
        cache = torch.empty(shape, dtype=product_dtype(given.device), device=given.device)
        row = torch.full((B, L + 1), c.vocab - 1, device=given.device)  # <bos>, then the text
        for at in range(L):
            logits = without_specials(self.predict(row[:, at:at + 1], cache=cache, at=at))
            token = draw((logits / temperature).softmax(-1), rng)[:, 0]
            row[:, at + 1] = torch.where(given[:, at] < 0, token, given[:, at])
            if on_call is not None:
                on_call(at, row[:, 1:])
        return row[:, 1:]


def build(config):
    """The model that a Config describes."""
    kinds = {'flm': OneHotFlow, 'diffuseq': EmbeddingDiffusion, 'mdlm': MaskedDiffusion,
             'ar': Autoregressive}
    return kinds[config.model](config)


def is_student(config):
    """Whether a model has been distilled: a flow map, or a generator that starts late."""
    return config.two_time or config.start > 0


# -----------------------------------------------------------------------------
# What the models share: shares of positions, tokens from logits

def share_of(given):
    """What each position has in the mean over those not given of its row: (B, L)."""
    written = given < 0
    return written / written.sum(1, keepdim=True).clamp(min=1)


def row_mean(x, given):
    """Mean of x (B, L) over the positions not given: (B,)."""
    return (x * share_of(given)).sum(1)


def without_specials(logits):
    """Logits under which <sep> and <bos>, the last two ids, are never written; in place."""
    logits[..., -2:] = -math.inf
    return logits


def draw(p, rng=None):
    """A token for each position: p (B, L, V) -> (B, L), by a uniform number and a running sum."""
    rising = p.cumsum(-1)
    u = torch.rand(p.shape[:-1], generator=rng, device=p.device)[..., None]
    tokens = torch.searchsorted(rising, u * rising[..., -1:], right=True)[..., 0]
    # rounding may take u to the end, where <sep> and <bos> are
    return tokens.clamp(max=p.shape[-1] - 3)


# -----------------------------------------------------------------------------
# The loss over a large vocabulary

def fill_up(x, dim):
    """
    x in bf16 with zeros up to a multiple of 8 along `dim`, its side of V, where products are in
    bf16 and any are missing; else x. With an odd side, as GPT-2's 50,257, such a product takes a
    GPU seven times as long (H100: 6.8 ms, not 1.0).
    """
    dtype = product_dtype(x.device)
    extra = -x.shape[dim] % 8
    # padded by nothing, F.pad would copy
    if dtype != torch.bfloat16 or extra == 0:
        return x
    # F.pad takes a pair for each dimension, from the last one on
    others = (x.ndim - 1) - dim % x.ndim
    return F.pad(x.to(dtype), [0, 0] * others + [0, extra])


def capped_logits(y, weight, bias, cap):
    """y W^T + b in fp32, softly capped if `cap` is not 0: (..., D) -> (..., V)."""
    z = F.linear(y, fill_up(weight, 0), fill_up(bias, 0))[..., :len(weight)].float()
    if cap:
        z = cap * torch.tanh(z / cap)
    return z


def row_nats(y, weight, bias, cap, target, share):
    """Cross-entropy of rows (B,): y (B, L, D), target (B, L) ids or (B, L, V), share (B, L)."""
    dtype = product_dtype(y.device)
    nats = CrossEntropy.apply(
        y.flatten(0, 1).to(dtype), weight.to(dtype), bias.to(dtype), cap,
        target.flatten(0, 1), share.flatten())
    return nats.view(share.shape).sum(1)


def product_dtype(device):
    """The type that matrix products are computed in: that of autocast where it is on."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return torch.float32


def positions_at_once(device, vocab):
    """How many positions' logits exist at a time: what fits a CPU's cache, or fills a GPU."""
    if device.type == 'cuda':
        return max(1, 2 ** 27 // vocab)
    return max(64, 2 ** 20 // vocab)


@torch.compiler.allow_in_graph  # torch 2.13 fails to trace inside
class CrossEntropy(torch.autograd.Function):
    """
    Share (n,) of the nats of ids (n,) or probabilities (n, V), which sum to 1, under the logits of
    y (n, D): (n,).

    Logits are computed for a chunk of positions at a time, and only once: their gradients are taken
    on the spot, in the forward pass, and no (n, V) is kept. Therefore all positions must count
    alike in what is minimised, but for their share; an error otherwise.
    """

    @staticmethod
    def forward(ctx, y, weight, bias, cap, target, share):
        n = len(y)
        V = len(weight)
        # chunks of equal size, filled up by rows without a share: torch 2.13 miscompiles
        # log_softmax over chunks of unequal size
        chunks = math.ceil(n / positions_at_once(y.device, V))
        size = math.ceil(n / chunks)
        extra = chunks * size - n
        if extra:
            y = F.pad(y, (0, 0, 0, extra))
            target = F.pad(target, (0, extra) if target.ndim == 1 else (0, 0, 0, extra))
            share = F.pad(share, (0, extra))
        weight = fill_up(weight, 0)
        bias = fill_up(bias, 0)

        nats = []
        y_grad = []
        weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        bias_grad = torch.zeros_like(bias[:V], dtype=torch.float32)
        for y_n, target_n, share_n in zip(y.split(size), target.split(size), share.split(size)):
            nats_n, slope = CrossEntropy.chunk(
                y_n, weight, bias, V, cap, target_n, share_n[:, None],
                any(ctx.needs_input_grad[:3]))
            nats.append(nats_n)
            if slope is not None:
                bias_grad += slope.sum(0)
                slope = fill_up(slope.to(y.dtype), -1)
                y_grad.append(slope @ weight)
                weight_grad += (slope.T @ y_n).float()
        if y_grad:
            ctx.save_for_backward(torch.cat(y_grad)[:n], weight_grad[:V], bias_grad)
        return torch.cat(nats)[:n]

    @staticmethod
    def chunk(y, weight, bias, V, cap, target, share, want_slope):
        """Nats (n,) of one chunk and, if wanted, their slope in the logits (n, V)."""
        # with a cap, z holds the tanh of the logits, which are cap times that
        z = F.linear(y, weight, bias)[:, :V].float()
        if cap:
            z = z.div_(cap).tanh_()
        log_p = F.log_softmax(cap * z if cap else z, dim=-1)
        if target.ndim == 1:
            nats = -share * log_p.gather(1, target[:, None])
        else:
            nats = -share * (log_p * target).sum(1, keepdim=True)
        if not want_slope:
            return nats[:, 0], None

        # softmax - target, times the slope of the cap, 1 - tanh^2, times the share
        slope = log_p.exp_()
        if target.ndim == 1:
            slope.scatter_add_(1, target[:, None], torch.full_like(share, -1))
        else:
            slope.sub_(target)
        if cap:
            slope.addcmul_(slope, z.square_(), value=-1)
        return nats[:, 0], slope.mul_(share)

    @staticmethod
    def backward(ctx, grad):
        # asked without waiting for a GPU; not every version of torch can on MPS
        if grad.device.type != 'mps':
            torch._assert_async((grad == grad[0]).all())
        y_grad, weight_grad, bias_grad = ctx.saved_tensors
        scale = grad[0]
        return y_grad * scale, weight_grad * scale, bias_grad * scale, None, None, None


# -----------------------------------------------------------------------------
# Devices, seeds, and writing rows

def fail(message):
    """End with one line on stderr and exit status 2, as prepare_data.fail does."""
    line = ' '.join(str(message).splitlines())
    # of the processes that torchrun starts the first one speaks for all
    if os.environ.get('RANK', '0') == '0':
        print(f'{Path(sys.argv[0]).name}: {line}', file=sys.stderr)
    raise SystemExit(2)


def pick_device(name=''):
    """The torch.device named, else the machine's accelerator, else its CPU."""
    if not name:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device('cpu')
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError):
        fail(f'--device {name} is not available; leave it out to use what there is')


def has_bf16(device):
    """Whether it is a GPU that computes in bf16, and does not only emulate it."""
    return device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(device):
    """bf16 where a GPU has it, fp32 elsewhere."""
    # a cached cast of weights would outlive their update, or lack their gradient
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device),
                          cache_enabled=False)


def round_weights(model):
    """
    Round the weights of linear layers, in place, to the type that autocast would round them to in
    each call; texts stay the same. For a model that only writes. Returns it.
    """
    device = next(model.parameters()).device
    with autocast(device):
        dtype = product_dtype(device)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    return model


def generator(device, *key):
    """A random generator seeded by the numbers in `key`: a resumed run needs no saved state."""
    # 63 bits are what torch takes
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1
    return torch.Generator(device).manual_seed(int(seed))


@torch.inference_mode()
def write_rows(model, given, nfe, seed, **how):
    """model.sample for given (B, L), at most 256 rows at a time: rows on the CPU, and seconds."""
    device = next(model.parameters()).device
    # 2: no noise of a training's first part is drawn from it
    rng = generator(device, seed, 2)
    # so that (rows, L, V) stays below 4 GB
    rows_at_once = max(1, min(256, 2 ** 30 // model.config.vocab // given.shape[1]))
    rows = []
    start = time.perf_counter()
    with autocast(device):
        for part in given.split(rows_at_once):
            rows.append(model.sample(part.to(device), nfe, rng, **how).cpu())
    return torch.cat(rows), time.perf_counter() - start


# -----------------------------------------------------------------------------
# Checkpoints: tensors and plain values only

def checkpoint_path(path):
    """The .pt file that a checkpoint's name, a file or a folder, stands for."""
    path = Path(path)
    return path if path.suffix == '.pt' else path / 'model.pt'


def save(path, model, ema, optimisers=(), **more):
    """Write a checkpoint file, whole or not at all; `more` holds tensors and plain values."""
    ckpt = {
        'format': FORMAT,
        'config': asdict(model.config),
        'model': model.state_dict(),
        'ema': ema.state_dict(),
        'optimisers': [optimiser.state_dict() for optimiser in optimisers],
        'torch': str(torch.__version__),
        **more,
    }
    path = Path(path)
    temporary = path.with_name(path.name + '.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, 'wb') as f:
            torch.save(ckpt, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save's own writer raises the latter
        fail(f'{path}: cannot be written ({getattr(e, "strerror", None) or e}); make room, or name '
             'another folder')
    finally:
        if os.path.exists(temporary):
            temporary.unlink()


def load(path, device='cpu'):
    """A model.pt, or the folder of one -> (averaged model in eval mode, checkpoint dict)."""
    path = checkpoint_path(path)
    # os.path.isfile is False where Path's own would raise, as of names that are too long
    if not os.path.isfile(path):
        # out/stories was named, and out/stories/student is there
        inside = []
        if os.path.isdir(path.parent):
            inside = [str(found.parent) for found in sorted(path.parent.glob('*/model.pt'))]
        if inside:
            fail(f'{path}: no such checkpoint; name one of these: {", ".join(inside)}')
        fail(f'{path}: no such checkpoint; make one: python train_teacher.py')
    try:
        # looks at all checksums: torch.load would not notice a flipped bit
        if zipfile.ZipFile(path).testzip():
            raise ValueError('checksum')
        ckpt = torch.load(path, map_location='cpu', weights_only=True)
        version = ckpt['format']
    except Exception as e:  # torch.load raises a dozen different types
        fail(f'{path}: no whole checkpoint of this project ({type(e).__name__}); make it anew')
    if version != FORMAT:
        fail(f'{path}: has format {version}, this code reads format {FORMAT}; train it anew, or '
             'use the code that wrote it')
    try:
        model = build(Config(**ckpt['config']))
        model.load_state_dict(ckpt['ema'])
    except Exception as e:
        fail(f'{path}: weights and config do not fit ({type(e).__name__}); make it anew')
    return model.to(device).eval(), ckpt


def newest_checkpoints(*patterns):
    """The files that match, such as 'out/*/teacher/model.pt', the newest one first."""
    found = []
    for pattern in patterns:
        found.extend(Path().glob(pattern))
    return sorted(found, key=os.path.getmtime, reverse=True)
