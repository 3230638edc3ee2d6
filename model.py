"""
One-step text generation: one transformer denoiser, and the four models built on it.

  OneHotFlow          FLM (teacher) and FMLM (student), arXiv:2602.16813
  EmbeddingDiffusion  DiffuSeq (teacher, arXiv:2210.08933) and DLM-One (student, arXiv:2506.00290)
  MaskedDiffusion     MDLM, a baseline, arXiv:2406.07524
  Autoregressive      a baseline that writes one token after another, as nanoGPT does

Conventions, used everywhere in this repository:

  t in [0, 1]    time, from noise (t = 0) to data (t = 1); s <= u <= t for a flow map
  tau in [0, 1]  reparameterized time: training and samplers are uniform in tau
  B, L, V, D, C  batch, length, vocabulary, width, channels of the embedding
  h (B, L, C)    noisy rows x_t E: all that the network ever sees of the one-hot x_t
  given (B, L)   int64, ids of known tokens (a source, a prompt); -1 where text is generated
  nfe            number of function evaluations: network calls of a sampler

Every model has loss(tokens, given, tau, rng) -> (B,), in nats (diffuseq adds squared errors), and
sample(given, nfe, rng, ..., on_call=None) -> (B, L); on_call(i, tokens) sees the text of each call.
The last four ids of every vocabulary are <eos>, <pad>, <sep>, <bos>.
A comment that begins with "ours" marks what is in neither paper; assets/papers.md lists all
differences from the papers' codes.
"""

import glob
import io
import math
import os
import time
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from prepare_data import fail, out_of_memory, write_whole

# of checkpoint files; a file of another format is refused with one line
FORMAT = 8

# the time of DLM-One's only call: there b/a = 2.5, as at index 1490 of DiffuSeq's 2000
ONE_CALL_START = 1 - 1491 / 2000

# DiffuSeq's clean end is itself slightly noisy, x = E[token] + 0.121 n: its b at index 0
EMBEDDING_NOISE = 0.121


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
    calls: int = 0               # network calls it was distilled for; 0: a teacher or a baseline
    network: str = 'ours'        # ours | paper: FLM's own, with channels = width
    cond: int = 128              # width of the time conditioning
    dropout: float = 0.0         # after attention and after the MLP
    hidden_input: bool = False   # a hidden layer between the rows of E and the first block
    reparam: str = 'paper'       # flm: tau(t), one of paper | root | loss | uniform
    stagger: float = 0.0         # flm: how much later the last token is denoised than the first
    noise_levels: int = 0        # flm: quantization levels of the noise; 0: not quantized
    consistency: bool = False    # flm: a flow map that was trained on jumps to t = 1 only
    shared_noise: bool = False   # diffuseq: all positions of a row start from the same noise
    all_positions: bool = False  # diffuseq: noise and error at the source's positions, too
    anchor: float = 0.0          # diffuseq: weight of the cross-entropy of the rounded prediction

    @property
    def flow_map(self):
        """Whether it is conditioned on two times, s and t."""
        return self.model == 'flm' and self.calls > 0

    @property
    def start(self):
        """Time of the first call."""
        return ONE_CALL_START if self.model == 'diffuseq' and self.calls > 0 else 0.0


# -----------------------------------------------------------------------------
# The denoiser, used by every model: rows h (B, L, C) at tau (B,) -> (B, L, V), or (B, L, C)

def sinusoid(tau, frequencies):
    """Fourier features of times in [0, 1]: (...) and (n,) -> (..., 2 n)."""
    angles = tau[..., None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotate(x, cos, sin):
    """Rotary positions (arXiv:2104.09864): channel pairs turn by angles that grow with position."""
    x1, x2 = x.chunk(2, dim=-1)
    rotated1 = torch.addcmul(x1 * cos, x2, sin, value=-1)
    rotated2 = torch.addcmul(x1 * sin, x2, cos)
    return torch.cat([rotated1, rotated2], dim=-1)


def modulate(x, shift, scale):
    """Layer norm of x (B, L, D) without weights of its own, then scale and shift by the time."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), scale)


def capped_attention(q, k, v):
    """FLM's attention, (B, heads, L, size) each: its logits are softly capped at 50."""
    if q.device.type == 'cuda' and torch.compiler.is_compiling():
        # fused, so that no (L, L) is stored; only compiled does it pay
        return flex_attention(q, k, v, score_mod=cap_score)
    # in bf16 logits of 20 would be off by 0.06
    with torch.autocast(q.device.type, enabled=False):
        logits = q.float() @ k.float().mT * q.shape[-1] ** -0.5
        p = cap_score(logits).softmax(-1)
    return p.to(v.dtype) @ v


def cap_score(score, *place):
    return 50 * torch.tanh(score / 50)


class Block(nn.Module):
    """
    Attention and MLP, both shifted, scaled and gated by the time (adaLN, arXiv:2212.09748). FLM's
    own (config.network: paper) has weights in its layer norms, capped attention and a tanh GELU.
    """

    def __init__(self, config):
        super().__init__()
        D = config.width
        self.heads = config.heads
        self.causal = config.model == 'ar'
        self.dropout = config.dropout
        self.paper = config.network == 'paper'
        if self.paper:
            self.norm1 = nn.Parameter(torch.ones(D))
            self.norm2 = nn.Parameter(torch.ones(D))
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.up = nn.Linear(D, 4 * D)
        self.down = nn.Linear(4 * D, D)

    def attention(self, x, cos, sin, cache, at):
        """x (B, L, D) -> (B, L, D). With a cache, x is the position `at` alone, see Denoiser."""
        B, L, D = x.shape
        size = D // self.heads
        qkv = self.qkv(x).view(B, L, 3, self.heads, size)
        qk = qkv[:, :, :2]
        if not self.paper:
            # ours: unit queries and keys bound the attention logits (QK-norm, arXiv:2302.05442),
            # which allows higher learning rates than FLM's cap does
            qk = qk / (qk.norm(dim=-1, keepdim=True) + 1e-6)
        qk = rotate(qk, cos, sin)
        q, k = qk.permute(2, 0, 3, 1, 4)  # (B, heads, L, size) each
        v = qkv[:, :, 2].transpose(1, 2)
        if cache is not None:
            # only the newest token goes through the network, and attends to the cached ones
            assert L == 1
            cache[0, :, :, at:at + 1] = k
            cache[1, :, :, at:at + 1] = v
            k = cache[0, :, :, :at + 1]
            v = cache[1, :, :, :at + 1]
        if self.paper:
            y = capped_attention(q, k, v)
        else:
            causal = self.causal and cache is None
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=size ** 0.5)
        return self.out(y.transpose(1, 2).reshape(B, L, D))

    def forward(self, x, modulation, cos, sin, cache=None, at=0):
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation  # (B, 1, D) each
        if self.paper:
            scale1 = self.norm1 * scale1
            scale2 = self.norm2 * scale2
        y = self.attention(modulate(x, shift1, scale1), cos, sin, cache, at)
        x = torch.addcmul(x, gate1, F.dropout(y, self.dropout, self.training))
        gelu = 'tanh' if self.paper else 'none'
        y = self.down(F.gelu(self.up(modulate(x, shift2, scale2)), approximate=gelu))
        return torch.addcmul(x, gate2, F.dropout(y, self.dropout, self.training))


class Denoiser(nn.Module):
    """The transformer. It owns the embedding table E, whose row space the noisy rows live in."""

    def __init__(self, config, out):
        super().__init__()
        V = config.vocab
        D = config.width
        C = config.channels
        self.layers = config.layers
        self.embed = nn.Parameter(torch.empty(V, C))  # E
        self.into = nn.Linear(C, D, bias=False) if C != D else nn.Identity()
        if config.hidden_input:
            # ours: with few channels the embeddings are so close that a linear layer can barely
            # separate them
            self.into = nn.Sequential(nn.Linear(C, 4 * D), nn.GELU(), nn.Linear(4 * D, D))
        self.paper = config.network == 'paper'
        if self.paper:
            self.norm = nn.Parameter(torch.ones(D))
        else:
            # ours: learned positions beside the rotary ones, which FLM has alone
            self.position = nn.Parameter(torch.empty(config.length, D))
            # ours: marks positions whose token is given; entry 0 is for all others. With few
            # channels E cannot separate the tokens of a source well, so each token gets an entry of
            # its own, unless a hidden layer separates them
            entries = V if C < D and not config.hidden_input else 1
            self.known = nn.Embedding(1 + entries, D)
        self.time = self.time_network(config.cond)
        self.time_to = self.time_network(config.cond) if config.flow_map else None
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        # shifts, scales and gates of all blocks at once, and of the head
        self.modulation = nn.Linear(config.cond, (6 * config.layers + 2) * D)
        self.head = nn.Linear(D, out)  # not tied to E
        # a flow's logits are softly capped, 30 tanh(z / 30), as in the paper's second version
        self.cap = 30.0 if config.model == 'flm' else 0.0
        half = D // config.heads // 2
        angle = torch.arange(config.length)[:, None] * 10000 ** (-torch.arange(half) / half)
        self.register_buffer('cos', angle.cos(), persistent=False)  # (L, half)
        self.register_buffer('sin', angle.sin(), persistent=False)
        # ours: times are scaled by 1000, as is usual in diffusion, so that neighboring times get
        # different features; FLM feeds tau itself
        scale = 1 if self.paper else 1000
        frequencies = scale * 10000 ** (-torch.arange(128) / 128)
        self.register_buffer('frequencies', frequencies, persistent=False)
        self.initialize()

    @staticmethod
    def time_network(cond):
        return nn.Sequential(nn.Linear(256, cond), nn.SiLU(), nn.Linear(cond, cond))

    def initialize(self):
        if self.paper:
            # linear layers stay as torch makes them
            bound = self.head.in_features ** -0.5
            nn.init.uniform_(self.embed, -bound, bound)
        else:
            for p in self.parameters():
                if p.ndim == 2:
                    nn.init.normal_(p, std=p.shape[1] ** -0.5)
                else:
                    nn.init.zeros_(p)
            # unit scale, like the noise they are added to; the usual 0.02 would be drowned out
            nn.init.normal_(self.position)
            nn.init.normal_(self.known.weight)
        # adaLN-zero: at first shifts are 0, scales 1, and gates 0, so that a block is the identity
        nn.init.zeros_(self.modulation.weight)
        one_block = torch.tensor([0, 1, 0, 0, 1, 0])
        chunks = torch.cat([one_block.repeat(self.layers), torch.tensor([0, 1])])
        with torch.no_grad():
            self.modulation.bias.copy_(chunks.repeat_interleave(self.head.in_features))
        # all tokens are equally likely
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        # a new flow map predicts what its teacher does, whatever time it jumps to
        if self.time_to is not None:
            nn.init.zeros_(self.time_to[2].weight)
            nn.init.zeros_(self.time_to[2].bias)

    def forward(self, h, seen, tau, tau_to=None, target=None, weights=None, cache=None, at=0):
        """
        h (B, L, C), seen (B, L) ids of tokens known for certain, else -1, tau and tau_to (B,) or
        (1,) -> logits (B, L, out) in fp32.
        With a target, see cross_entropy: each row's loss (B,) in nats, a sum over positions with
        these weights (B, L); default: the mean over the positions not seen.
        ar: with a cache (layers, 2, B, heads, L, D/heads), h holds the position `at` alone.
        """
        here = slice(at, at + h.shape[1])
        cos = self.cos[here, None, None]  # (L, 1, 1, half): alike for queries, keys and heads
        sin = self.sin[here, None, None]
        x = self.into(h)  # (B, L, D)
        if not self.paper:
            known = self.known((seen + 1).clamp(max=self.known.num_embeddings - 1))
            x = x + self.position[here] + known

        # one vector for each shift, scale and gate, from the time, or from both times
        cond = self.time(sinusoid(tau, self.frequencies))
        if tau_to is not None:
            cond = cond + self.time_to(sinusoid(tau_to, self.frequencies))
        chunks = self.modulation(F.silu(cond))[:, None].chunk(6 * self.layers + 2, dim=-1)

        for i, block in enumerate(self.blocks):
            block_cache = None if cache is None else cache[i]
            x = block(x, chunks[6 * i:6 * i + 6], cos, sin, block_cache, at)
        shift, scale = chunks[-2:]
        if self.paper:
            scale = self.norm * scale
        y = modulate(x, shift, scale)

        if target is None:
            return capped_logits(y, self.head.weight, self.head.bias, self.cap)
        if weights is None:
            weights = token_weights(seen)
        return cross_entropy(y, self.head.weight, self.head.bias, self.cap, target, weights)


# -----------------------------------------------------------------------------
# The one-hot flow: its mathematics. t, s and u broadcast

def right_token_probability(t, K, signal_scale=1.0):
    """
    q(t) = P(argmax_k x_t is the right token) = E_z[Phi(z + t/(1-t))^(K-1)], z ~ N(0, 1), for t (n,)
    float64 in [0, 1) and K tokens -> (n,). arXiv:2602.16813, time reparameterization.
    signal_scale: factor on the signal-to-noise ratio t/(1-t), for a decoder that sees only h.
    """
    # Gauss-Hermite quadrature: the expectation over z becomes a weighted sum over 100 nodes
    nodes, weights = np.polynomial.hermite_e.hermegauss(100)
    nodes = torch.from_numpy(nodes)
    weights = torch.from_numpy(weights)
    log_cdf = torch.special.log_ndtr(nodes + signal_scale * (t / (1 - t))[:, None])  # (n, 100)
    return (weights * torch.exp((K - 1) * log_cdf)).sum(1) / weights.sum()


def reparameterization(K, signal_scale=1.0, knots=1001):
    """Knots (ts, taus) of tau(t) = K/(K-1) (q(t) - 1/K), each (knots,) float64, from 0 to 1."""
    ts = torch.linspace(0, 1, knots, dtype=torch.float64)
    taus = (right_token_probability(ts[:-1], K, signal_scale) - 1 / K) * K / (K - 1)
    # quadrature is slightly off: make it exactly 0 at t = 0, at most 1, and never decreasing
    taus = torch.cat([taus - taus[0], torch.ones(1)]).clamp(0, 1)
    taus = torch.cummax(taus, 0).values
    # flat at both ends to machine precision: a slight slope keeps it invertible
    return ts, (1 - 1e-4) * taus + 1e-4 * ts


def quantization_levels(count):
    """
    ours: the levels of quantized noise, medians of `count` equally likely slices of N(0, 1):
    (count,), none for 0. C numbers of a position form one of count^C symbols. A single call fails
    mostly where the noise lies between two texts, and quantized noise rarely does.
    """
    medians = torch.special.ndtri((torch.arange(count) + 0.5) / count)
    # unit variance, as the teacher was trained on
    return medians / medians.square().mean().sqrt()


def piecewise_linear(x, xs, ys):
    """y(x) through knots (xs, ys), xs increasing; x of any shape."""
    i = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
    w = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
    return ys[i - 1] + w * (ys[i] - ys[i - 1])


def jump(x, p, s, t):
    """
    X_{s,t}(x) = (1-t)/(1-s) x + (t-s)/(1-s) p, arXiv:2602.16813: an Euler step for p = D_s(x), the
    flow map for p = delta_{s,t}(x). x and p are both in R^V, or both already times E.
    """
    left = 1 - s
    # at s = 1 there is nothing left to move
    keep = torch.where(left > 1e-6, (1 - t) / left.clamp(min=1e-6), 1)
    return keep * x + (1 - keep) * p


def semigroup_weight(s, u, t):
    """
    g in delta_{s,t}(x) = g delta_{s,u}(x) + (1-g) delta_{u,t}(X_{s,u}(x)), s <= u <= t: the weight
    of the first sub-step of a jump (semigroup property, arXiv:2602.16813). g = 0 at t = 1, unless
    u is 1 itself.
    """
    g = (1 - t) * (u - s) / ((1 - u) * (t - s)).clamp(min=1e-9)
    return torch.where((1 - u < 1e-6) & (u > s), 1, g)


def gram(E):
    """E^T E of a table (V, C): (C, C), accurate to about 1e-5."""
    if not has_bf16(E.device):
        return E.T @ E
    # on tensor cores: E is the sum of two bf16 numbers, of which the product of the small parts
    # does not matter
    high = E.bfloat16()
    low = (E - high).bfloat16()
    cross = torch.mm(high.T, low, out_dtype=torch.float32)
    return torch.mm(high.T, high, out_dtype=torch.float32) + cross + cross.T


class NoiseTimesTable(torch.autograd.Function):
    """
    z R (B, L, C) for a table E (V, C), its factor R (C, C) and z (B, L, C): noise eps E, without
    eps. Nor does the gradient of E need eps: given z, its mean is z Q^T with Q = E R^-1, and
    dE = eps^T g is linear in it, so dE = E R^-1 z^T g on average, with less variance.
    """

    @staticmethod
    def forward(ctx, E, factor, z):
        ctx.save_for_backward(E, factor, z)
        return z @ factor

    @staticmethod
    def backward(ctx, grad):
        E, factor, z = ctx.saved_tensors
        inner = z.flatten(0, 1).T @ grad.flatten(0, 1).float()  # (C, C)
        inner = torch.linalg.solve_triangular(factor, inner, upper=True)
        # a gradient may be in bf16, as all others are
        with autocast(E.device):
            return E @ inner, None, None


# -----------------------------------------------------------------------------
# The models

class Model(nn.Module):
    """What the four models share: a config and a denoiser."""

    def __init__(self, config, out):
        super().__init__()
        self.config = config
        self.net = Denoiser(config, out)

    def embedded(self, ids):
        """Rows of E, (B, L) -> (B, L, C); ids of -1 (unknown tokens) count as 0."""
        return F.embedding(ids.clamp(min=0), self.net.embed)


class OneHotFlow(Model):
    """
    FLM (teacher) and FMLM, its flow map (student): arXiv:2602.16813.

    The flow x_t = (1-t) eps + t onehot(token), eps ~ N(0, I) in R^V at each of L positions.

    The first layer is linear, so the network only ever sees h = x_t E. The noise term eps E is
    Gaussian with covariance E^T E, and is sampled directly, as z R with R^T R = E^T E: C numbers
    per position instead of V. Whatever moves x_t (an Euler step, a jump) is affine, so it moves h
    in the same way, and x_t itself is never needed.

    The reparameterization tau(t) is the paper's (tau rises as the error of argmax over x_t falls),
    uniform (tau = t), or follows the network's own loss, see refit_reparam.
    """
    sampler_options = ('temperature', 'gamma')

    def __init__(self, config):
        super().__init__(config, config.vocab)
        signal_scale = 1.0
        if config.reparam in ('root', 'loss'):
            # ours: the start of refit_reparam is the paper's tau for a decoder that sees h, a
            # projection of x_t to C of V directions, with C/V of its energy
            signal_scale = min(1, config.channels / config.vocab) ** 0.5
        ts, taus = reparameterization(config.vocab, signal_scale)
        if config.reparam == 'uniform':
            taus = ts
        self.register_buffer('ts', ts.float(), persistent=False)
        self.register_buffer('taus', taus.float())
        levels = quantization_levels(config.noise_levels)
        self.register_buffer('levels', levels, persistent=False)
        # see freeze_table
        self.register_buffer('factor', None, persistent=False)
        self.register_buffer('table_norm', None, persistent=False)

    @torch.no_grad()
    def refit_reparam(self, tokens, given, seed):
        """
        ours: let tau rise as the network's own loss on these rows (B, L) falls (time warping,
        arXiv:2211.15089), or, with reparam `root`, the square root of the loss. By the loss itself
        every call of a sampler decides equally much; by its root more calls are spent at the end,
        where few tokens are undecided, but each of them can spoil a text. FLM's own tau assumes a
        decoder that sees all of x_t, while the network sees C numbers of it. Returns the new taus.
        """
        # dropout would make the measurement noisy
        training = self.training
        self.eval()
        grid = torch.linspace(0, 1, 33, device=tokens.device)
        sums = torch.zeros(3, 33, device=tokens.device)  # of losses, of taus, and their number
        # enough times that every token is seen equally often near each of the 33
        n = round(64 * (1 + self.config.stagger))
        taus = (torch.arange(n, device=tokens.device) + 0.5) / n
        # the same rows and noise at all times, so that the curve is smooth
        noise = self.noise(*tokens.shape, torch.Generator(tokens.device).manual_seed(seed))
        # several times per call, fewer where logits are large
        at_once = max(1, min(8, 2 ** 25 // (tokens.numel() * self.config.vocab)))
        for part in taus.split(at_once):
            tau = part.repeat_interleave(len(tokens))
            text = tokens.repeat(len(part), 1)
            known = given.repeat(len(part), 1)
            h = self.interpolate(text, known, tau, noise.repeat(len(part), 1, 1))
            logits = self.predict(h, known, tau)
            nats = F.cross_entropy(logits.transpose(1, 2), text, reduction='none').flatten()
            at = self.token_tau(tau, known).flatten()
            # leave out tokens that are still pure noise, or already clean
            counted = ((known.flatten() < 0) & (at > 0) & (at < 1)).float()
            seen = torch.stack([nats, at, torch.ones_like(at)]) * counted
            sums.index_add_(1, (32 * at).round().long(), seen)
        self.train(training)
        # these rows have nothing to generate at some of the times
        if (sums[2] == 0).any():
            return self.taus
        # from the mean times at which losses were measured to the grid
        loss = piecewise_linear(grid, sums[1] / sums[2], sums[0] / sums[2])
        # not increasing; the mixture with the grid below makes it invertible
        loss = torch.cummin(loss, 0).values - 1e-6 * grid
        left = (loss - loss[-1]) / (loss[0] - loss[-1])
        if self.config.reparam == 'root':
            left = left.sqrt()
        # half of the old curve stays, so that one noisy measurement does little harm
        new = 0.5 * (1 - left) + 0.5 * grid
        self.taus.copy_(piecewise_linear(self.taus, grid, new))
        return self.taus

    def t_of(self, tau):
        """The time t at tau, any shape."""
        return piecewise_linear(tau, self.taus, self.ts)

    def token_tau(self, tau, given):
        """
        The tau of each token (B, L) of rows at tau, (B,) or (1,).
        ours (stagger w): tokens are denoised from left to right, overlapping: each takes 1/(1+w) of
        the way, the first one at its beginning, the last one at its end, so that a token can be
        decided knowing most of those before it (AR-Diffusion, arXiv:2305.09515). With w = 0 all
        tokens are at the row's tau, as in the paper.
        """
        w = self.config.stagger
        if w == 0:
            return tau[:, None].expand(given.shape)
        generated = given < 0
        place = generated.cumsum(1) - 1  # among the positions to generate: 0, 1, ...
        last = (generated.sum(1, keepdim=True) - 1).clamp(min=1)
        return ((1 + w) * tau[:, None] - w * place / last).clamp(0, 1)

    def token_t(self, tau, given):
        """The t of each token of rows at tau, (B,) or (1,): (B, L, 1), for use with (B, L, C)."""
        return self.t_of(self.token_tau(tau, given))[..., None]

    @torch.no_grad()
    def noise_factor(self):
        """
        R (C, C) with R^T R = E^T E, by Cholesky: z R is distributed as eps E for z ~ N(0, I_C).
        With fewer tokens than channels it is E itself, and z has V numbers.
        """
        E = self.net.embed
        V, C = E.shape
        if self.factor is not None:
            return self.factor
        if V <= C:
            return E
        # in bf16 the product would not be positive definite
        with torch.autocast(E.device.type, enabled=False):
            squares = gram(E)
            jitter = 1e-6 * squares.diagonal().mean()
            squares = squares + jitter * torch.eye(C, device=E.device)
            lower, failed = torch.linalg.cholesky_ex(squares)
        # cholesky_ex does not wait for a GPU: a failure shows as a loss that is not finite
        return torch.where(failed == 0, lower.T, math.nan)

    def freeze_table(self):
        """For a model whose E does not change any more: compute once what depends on it alone."""
        self.factor = self.noise_factor().detach()
        self.table_norm = self.net.embed.detach().norm()

    def noise(self, B, L, rng=None):
        """
        eps E for eps ~ N(0, I) in R^(B x L x V), without eps: (B, L, C). Quantized noise has the
        same mean and covariance, but is not Gaussian.
        """
        E = self.net.embed
        factor = self.noise_factor()
        shape = (B, L, len(factor))
        if len(self.levels) > 0:
            symbols = torch.randint(len(self.levels), shape, generator=rng, device=E.device)
            z = self.levels[symbols]
        else:
            z = torch.randn(shape, generator=rng, device=E.device)
        if factor is E:
            return z @ E
        return NoiseTimesTable.apply(E, factor, z)

    def q_sample(self, tokens, given, tau, rng=None):
        """Noisy tokens (B, L) in rows at tau (B,) -> h (B, L, C); given ones stay clean."""
        return self.interpolate(tokens, given, tau, self.noise(*tokens.shape, rng))

    def interpolate(self, tokens, given, tau, noise):
        """(1-t) noise + t clean, in the space of h: the same from this noise (B, L, C), eps E."""
        t = self.token_t(tau, given)
        clean = self.embedded(tokens)
        h = (1 - t) * noise + t * clean
        return torch.where(given[..., None] < 0, h, clean)

    def predict(self, h, given, tau, tau_to=None, target=None):
        """
        D_tau(h), or delta_{tau,tau_to}(h) of a flow map, as logits (B, L, V); tau (B,) or (1,).
        With a target, see cross_entropy: each row's loss (B,) in nats.
        """
        if self.config.flow_map and tau_to is None:
            # a flow map from s to s is the denoiser
            tau_to = tau
        if self.config.network == 'paper':
            return self.net(h, given, tau, tau_to, target)
        # ours: rows are scaled to unit size, which over a vocabulary of 50,257 differs by a factor
        # of 200 between noise and clean tokens. The mean square per channel of noise is |E|^2 / C,
        # the sum over V tokens, and that of a clean token 1/V of it. The scale depends on t alone:
        # with few channels a token's own norm carries information
        V, C = self.net.embed.shape
        t = self.token_t(tau, given)
        size = torch.where(given[..., None] < 0, (1 - t) ** 2 + t ** 2 / V, 1 / V)
        # the scale is a constant; do not backpropagate through it
        norm = self.net.embed.detach().norm() if self.table_norm is None else self.table_norm
        size = (size / C).sqrt() * norm
        return self.net(h / size, given, tau, tau_to, target)

    def loss(self, tokens, given, tau, rng=None):
        """Cross-entropy of the clean tokens, mean over the positions to generate: (B,), nats."""
        return self.predict(self.q_sample(tokens, given, tau, rng), given, tau, target=tokens)

    def initial_noise(self, given, rng=None):
        """Pure noise around the given tokens: h (B, L, C) at tau = 0."""
        noise = self.noise(*given.shape, rng)
        return torch.where(given[..., None] < 0, noise, self.embedded(given))

    def jump(self, h, p, given, tau_s, tau_t):
        """Move h from tau_s to tau_t along p (B, L, V); given positions stay as they are."""
        s = self.token_t(tau_s, given)
        t = self.token_t(tau_t, given)
        return torch.where(given[..., None] < 0, jump(h, p @ self.net.embed, s, t), h)

    @torch.no_grad()
    def sample(self, given, nfe, rng=None, temperature=1.0, gamma=None, on_call=None):
        """
        Euler steps of a teacher, jumps of a student, on a uniform grid of tau: (B, L).
        The text is the argmax of the last call, arXiv:2602.16813. temperature divides the logits;
        gamma: 0 follows the flow, up to 1 each call overshoots and adds noise again; None: 1 if all
        jumps have to end at t = 1, else 0. Neither has an effect at nfe = 1.
        """
        if gamma is None:
            gamma = 1.0 if self.config.consistency else 0.0
        h = self.initial_noise(given, rng)
        taus = torch.linspace(0, 1, nfe + 1, device=h.device)
        for i in range(nfe):
            tau = taus[i:i + 1]  # (1,): all rows are at the same time
            tau_next = taus[i + 1:i + 2]
            landing = self.gamma_landing(tau_next, gamma)
            tau_to = landing if self.config.flow_map else None
            logits = mask_specials(self.predict(h, given, tau, tau_to))
            if on_call is not None or i == nfe - 1:
                tokens = torch.where(given < 0, logits.argmax(-1), given)
            if on_call is not None:
                on_call(i, tokens)
            if i == nfe - 1:
                return tokens
            p = (logits / temperature).softmax(-1)
            h = self.jump(h, p, given, tau, landing)
            if gamma > 0:
                h = self.renoise(h, given, landing, tau_next, self.noise(*given.shape, rng))

    def gamma_landing(self, tau_next, gamma):
        """The tau that gamma sampling jumps to before it adds noise: (1,) -> (1,)."""
        if gamma == 0:
            return tau_next
        t = self.t_of(tau_next)
        if self.config.network == 'paper' and self.config.flow_map:
            # FLM's own rule, by which its published figures were made
            r = 1 - (1 - t) * (1 - gamma ** 2) ** 0.5
            return piecewise_linear(r, self.ts, self.taus)
        # ours: land at the r for which scaling by t/r leaves room for exactly the fresh noise,
        # (t/r)^2 (1-r)^2 + gamma^2 (1-t)^2 = (1-t)^2, which preserves the distribution of x_t; the
        # paper's rule does not
        r = t / (t + (1 - t) * (1 - gamma ** 2) ** 0.5)
        return piecewise_linear(r, self.ts, self.taus)

    def renoise(self, h, given, tau_r, tau_t, noise):
        """Back from tau_r to an earlier tau_t, (1,) each, by the right amount of fresh noise."""
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
    # 0.99 and 1e-4 are from the public code; 2e-7 keeps b/a finite at t = 0, as its last entry does
    alpha_bar = ((1 - (1 - t + 1e-4).sqrt()) / 0.99).clamp(2e-7, 1)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def ancestral_step(x_s, x, s, t, noise):
    """Sample x_t, t > s, given x_s and x: the posterior of DDPM (arXiv:2006.11239), any stride."""
    a_s, b_s = noise_level(s)
    a_t, b_t = noise_level(t)
    alpha = (a_s / a_t) ** 2
    mean = (a_t * (1 - alpha) * x + alpha.sqrt() * b_t ** 2 * x_s) / b_s ** 2
    return mean + ((1 - alpha) * b_t ** 2 / b_s ** 2).sqrt() * noise


def ddim_step(x_s, x, s, t):
    """Move x_s to a later time t along the clean x, without fresh noise (arXiv:2010.02502)."""
    a_s, b_s = noise_level(s)
    a_t, b_t = noise_level(t)
    return a_t * x + b_t / b_s * (x_s - a_s * x)


class EmbeddingDiffusion(Model):
    """
    DiffuSeq (arXiv:2210.08933): Gaussian diffusion of embeddings; the network predicts the clean x.
    Given positions keep their embedding at all times. The rounding head is E itself with a bias.
    """
    sampler_options = ('method', 'clamp')

    def __init__(self, config):
        super().__init__(config, config.channels)
        nn.init.normal_(self.net.embed)  # unit scale, like the noise
        self.bias = nn.Parameter(torch.zeros(config.vocab))

    def predict(self, x_t, given, t):
        """The clean x (B, L, C) predicted from x_t at time t, (B,) or (1,)."""
        return self.net(x_t, given, t)

    def rounding_logits(self, x):
        """Logits (B, L, V) of the tokens that x (B, L, C) may stand for."""
        return capped_logits(x, self.net.embed, self.bias, 0.0)

    def rounding_loss(self, x, target, weights):
        """Cross-entropy (B,) of a target, see cross_entropy, under the rounding of x; nats."""
        return cross_entropy(x, self.net.embed, self.bias, 0.0, target, weights)

    def noise(self, like, rng=None):
        return torch.randn(like.shape, generator=rng, device=like.device)

    def q_sample(self, x, clean, given, t, rng=None):
        """x_t (B, L, C) of x at times t (B,); given positions hold `clean`, their embeddings."""
        a, b = noise_level(t[:, None, None])
        return torch.where(given[..., None] < 0, a * x + b * self.noise(x, rng), clean)

    def loss(self, tokens, given, t, rng=None):
        """Squared error of x, rounding term and anchor term, mean over positions: (B,)."""
        embedded = self.embedded(tokens)
        x = embedded + EMBEDDING_NOISE * self.noise(embedded, rng)
        if self.config.all_positions:
            # as in DiffuSeq: the source is slightly noisy, too, and its error counts
            source = x
            conditioned = torch.full_like(given, -1)
        else:
            # ours: a clean source, and no error where nothing is generated
            source = embedded
            conditioned = given
        prediction = self.predict(self.q_sample(x, source, given, t, rng), given, t)
        loss = row_mean((prediction - x).square().mean(-1), conditioned)
        # without the rounding term all embeddings would collapse to one point, with error 0
        everywhere = token_weights(torch.full_like(given, -1))
        loss = loss + self.rounding_loss(x, tokens, everywhere)
        if self.config.anchor:
            # ours: the prediction itself should round to the right token
            anchor = self.rounding_loss(prediction, tokens, token_weights(given))
            loss = loss + self.config.anchor * anchor
        return loss

    def initial_noise(self, given, rng=None):
        """Noise at the time of the first call around the given embeddings: x_t (B, L, C)."""
        clean = self.embedded(given)
        # nothing is known of the text yet, so its term a x is left out
        _, b = noise_level(torch.tensor(self.config.start))
        # ours (shared_noise): all positions see the same noise, so they need not agree on theirs
        z = self.noise(clean[:, :1] if self.config.shared_noise else clean, rng)
        return torch.where(given[..., None] < 0, b * z, clean)

    def generate(self, x_t, given):
        """The one-call generator of DLM-One: the clean x (B, L, C), with gradient."""
        return self.predict(x_t, given, torch.full_like(x_t[:, 0, 0], self.config.start))

    def nearest(self, x):
        """The embedding nearest to each x (B, L, C): DiffuSeq's clamping trick."""
        E = self.net.embed
        # |E - x|^2 is least where x E - |E|^2 / 2 is largest; bf16 would be too coarse for that
        with torch.autocast(E.device.type, enabled=False):
            closeness = F.linear(x.float(), E, -0.5 * E.square().sum(1))  # (B, L, V)
        return self.embedded(closeness.argmax(-1))

    @torch.no_grad()
    def sample(self, given, nfe, rng=None, method='ancestral', clamp=False, on_call=None):
        """
        method: ancestral (DiffuSeq's) or ddim, both right for any stride -> (B, L).
        clamp: every prediction is replaced by the nearest embedding, as DiffuSeq does.
        """
        x_t = self.initial_noise(given, rng)
        clean = self.embedded(given)
        times = torch.linspace(self.config.start, 1, nfe + 1, device=x_t.device)
        for i in range(nfe):
            s, t = times[i], times[i + 1]
            x = self.predict(x_t, given, s[None])
            if on_call is not None or i == nfe - 1:
                tokens = mask_specials(self.rounding_logits(x)).argmax(-1)
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
    """What the baselines share: a network that sees tokens, or masks."""
    sampler_options = ('temperature',)

    def __init__(self, config):
        super().__init__(config, config.vocab)

    def predict(self, seen, **how):
        """Logits (B, L, V), or losses, from tokens seen (B, L), -1 where masked; see Denoiser."""
        h = torch.where(seen[..., None] < 0, 0, self.embedded(seen))
        no_time = torch.zeros(1, device=seen.device)  # the number of masks tells the time
        return self.net(h, seen, no_time, **how)


class MaskedDiffusion(TokenModel):
    """MDLM (arXiv:2406.07524): tokens are masked and predicted; a token once unmasked stays."""

    def q_sample(self, tokens, given, t, rng=None):
        """Tokens (B, L) at t (B,): each but given ones is masked (-1) with probability 1 - t."""
        hidden = torch.rand(tokens.shape, generator=rng, device=tokens.device) >= t[:, None]
        return torch.where(hidden & (given < 0), -1, tokens)

    def loss(self, tokens, given, t, rng=None):
        """Bound on -log p, nats per position to generate: masked ones weigh 1/(1-t) each: (B,)."""
        seen = self.q_sample(tokens, given, t, rng)
        weights = token_weights(given) * (seen < 0) / (1 - t[:, None]).clamp(min=1e-3)
        return self.predict(seen, target=tokens, weights=weights)

    @torch.no_grad()
    def sample(self, given, nfe, rng=None, temperature=1.0, on_call=None):
        """Ancestral sampling: each call unmasks a fraction of the masks that are left: (B, L)."""
        seen = given
        times = torch.linspace(0, 1, nfe + 1, device=given.device)
        for i in range(nfe):
            s, t = times[i], times[i + 1]
            logits = mask_specials(self.predict(seen))
            tokens = draw((logits / temperature).softmax(-1), rng)
            tokens = torch.where(seen < 0, tokens, seen)
            if on_call is not None:
                on_call(i, tokens)
            # of the masks left at time s a fraction (t - s) / (1 - s) is unmasked by time t
            now = torch.rand(given.shape, generator=rng, device=given.device) < (t - s) / (1 - s)
            seen = torch.where(now | (seen >= 0), tokens, seen)
        return tokens


class Autoregressive(TokenModel):
    """Writes from left to right: each position sees those before it, and predicts its token."""

    def loss(self, tokens, given, tau=None, rng=None):
        """-log p of tokens given those before, mean over the positions to generate: (B,), nats."""
        before = F.pad(tokens[:, :-1], (1, 0), value=self.config.vocab - 1)  # <bos> is the first
        return self.predict(before, target=tokens, weights=token_weights(given))

    @torch.no_grad()
    def sample(self, given, nfe=None, rng=None, temperature=1.0, on_call=None):
        """One call for each of L tokens, whatever nfe says, with a cache of keys and values."""
        c = self.config
        B, L = given.shape
        shape = (c.layers, 2, B, c.heads, L, c.width // c.heads)
        cache = torch.empty(shape, dtype=compute_dtype(given.device), device=given.device)
        row = torch.full((B, L + 1), c.vocab - 1, device=given.device)  # <bos>, then the text
        for at in range(L):
            logits = mask_specials(self.predict(row[:, at:at + 1], cache=cache, at=at))
            token = draw((logits / temperature).softmax(-1), rng)[:, 0]
            row[:, at + 1] = torch.where(given[:, at] < 0, token, given[:, at])
            if on_call is not None:
                on_call(at, row[:, 1:])
        return row[:, 1:]


MODELS = {
    'flm': OneHotFlow,
    'diffuseq': EmbeddingDiffusion,
    'mdlm': MaskedDiffusion,
    'ar': Autoregressive,
}


def build(config):
    """The model that a Config describes."""
    return MODELS[config.model](config)


# -----------------------------------------------------------------------------
# What the models share: weights of positions, tokens from logits, the loss

def token_weights(given):
    """Per-token loss weights: 1/n for the n positions to generate, 0 for given ones: (B, L)."""
    generated = given < 0
    return generated / generated.sum(1, keepdim=True).clamp(min=1)


def row_mean(x, given):
    """Mean of x (B, L) over the positions to generate: (B,)."""
    return (x * token_weights(given)).sum(1)


def mask_specials(logits):
    """Logits under which <sep> and <bos>, the last two ids, are never written; in place."""
    logits[..., -2:] = -math.inf
    return logits


def draw(p, rng=None):
    """A token for each position: p (B, L, V) -> (B, L), by inverting the cumulative sum."""
    cdf = p.cumsum(-1)
    u = torch.rand(p.shape[:-1], generator=rng, device=p.device)[..., None]
    tokens = torch.searchsorted(cdf, u * cdf[..., -1:], right=True)[..., 0]
    # rounding may take u to the end, where <sep> and <bos> are
    return tokens.clamp(max=p.shape[-1] - 3)


def capped_logits(y, weight, bias, cap):
    """y W^T + b in fp32, softly capped if `cap` is not 0: (..., D) -> (..., V)."""
    V = len(weight)
    if y.device.type == 'cuda':
        # tensor cores are slow where V is no multiple of 8
        weight = F.pad(weight, (0, 0, 0, -V % 8))
        bias = F.pad(bias, (0, -V % 8))
    z = F.linear(y, weight, bias)[..., :V].float()
    if cap:
        z = cap * torch.tanh(z / cap)
    return z


def cross_entropy(y, weight, bias, cap, target, weights):
    """
    Cross-entropy of rows (B,) in nats, under the capped logits of y (B, L, D): the sum over
    positions with these weights (B, L).
    target: token ids (B, L), probabilities (B, L, V), or the k likeliest tokens of each position
    and their probabilities, (B, L, k) each, see sparse_cross_entropy.
    """
    dense = torch.is_tensor(target) and target.ndim == 3
    if y.device.type == 'cpu' and not dense:
        if torch.is_tensor(target):
            # the one likeliest token, of probability 1
            target = (target[..., None], torch.ones_like(weights)[..., None])
        flat = [x.flatten(0, 1) for x in (y, *target, weights)]
        return ChunkedCrossEntropy.apply(*flat, weight, bias, cap).view(weights.shape).sum(1)
    z = capped_logits(y, weight, bias, cap)  # (B, L, V)
    if isinstance(target, tuple):
        nats = sparse_cross_entropy(z.log_softmax(-1), *target)
    else:
        nats = F.cross_entropy(z.flatten(0, 1), target.flatten(0, 1), reduction='none')
    return (nats.view(weights.shape) * weights).sum(1)


def sparse_cross_entropy(log_q, ids, p):
    """
    Cross-entropy (...) of probabilities p (..., k) of tokens ids (..., k) under log_q (..., V).
    The other tokens count as one: what p leaves to them is compared with what q leaves to them.
    """
    log_q = log_q.gather(-1, ids)  # (..., k)
    nats = -(p * log_q).sum(-1)
    if ids.shape[-1] > 1:
        rest_p, rest_q = [(1 - x.sum(-1)).clamp(min=1e-6) for x in (p, log_q.exp())]
        nats = nats - rest_p * rest_q.log()
    return nats


class ChunkedCrossEntropy(torch.autograd.Function):
    """
    sparse_cross_entropy of positions (n,) on a CPU, times their weights (n,), in chunks whose
    logits fit into its cache. The gradient is computed along with the loss, while the logits of a
    chunk are there, for a loss that is the mean or sum of these values; for any other the backward
    pass computes it again.
    """

    @staticmethod
    def forward(ctx, y, ids, p, weights, weight, bias, cap):
        needed = any(ctx.needs_input_grad)
        nats, gradients = ChunkedCrossEntropy.compute(y, ids, p, weights, weight, bias, cap, needed)
        if needed:
            ctx.cap = cap
            ctx.save_for_backward(y, ids, p, weights, weight, bias, *gradients)
        return nats

    @staticmethod
    def backward(ctx, grad):
        *inputs, y_grad, weight_grad, bias_grad = ctx.saved_tensors
        scale = grad[0]
        if not (grad == scale).all():
            y, ids, p, weights, weight, bias = inputs
            _, (y_grad, weight_grad, bias_grad) = ChunkedCrossEntropy.compute(
                y, ids, p, weights * grad, weight, bias, ctx.cap, True)
            scale = 1.0
        return y_grad * scale, None, None, None, weight_grad * scale, bias_grad * scale, None

    @staticmethod
    def compute(y, ids, p, weights, weight, bias, cap, needed):
        """The weighted nats (n,), and the gradients of their sum in y, weight and bias."""
        n = len(y)
        chunks = math.ceil(n / max(64, 2 ** 20 // len(weight)))
        size = math.ceil(n / chunks)
        nats = []
        y_grad = []
        weight_grad = torch.zeros_like(weight)
        bias_grad = torch.zeros_like(bias)
        for chunk in zip(*[x.split(size) for x in (y, ids, p, weights)]):
            y_n, ids_n, p_n, weights_n = chunk
            # with a cap, z holds the tanh of the logits, which are cap times that
            z = F.linear(y_n, weight, bias)
            if cap:
                z = z.div_(cap).tanh_()
            log_q = F.log_softmax(cap * z if cap else z, dim=-1)
            nats.append(weights_n * sparse_cross_entropy(log_q, ids_n, p_n))
            if needed:
                slope = sparse_slope(log_q, ids_n, p_n)
                if cap:
                    # the derivative of the cap is 1 - tanh^2
                    slope.addcmul_(slope, z.square_(), value=-1)
                slope.mul_(weights_n[:, None])
                y_grad.append(slope @ weight)
                weight_grad += slope.T @ y_n
                bias_grad += slope.sum(0)
        return torch.cat(nats), (torch.cat(y_grad) if needed else None, weight_grad, bias_grad)


def sparse_slope(log_q, ids, p):
    """The gradient of sparse_cross_entropy in the logits: (n, V), in place of log_q."""
    q = log_q.exp_()
    chosen = q.gather(1, ids)
    if ids.shape[1] > 1:
        rest_p, rest_q = [(1 - x.sum(1, keepdim=True)).clamp(min=1e-6) for x in (p, chosen)]
        q.mul_(1 - rest_p / rest_q)
    # softmax minus target, as for any cross-entropy
    return q.scatter_(1, ids, chosen - p)


# -----------------------------------------------------------------------------
# Devices, seeds, and writing rows

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


def compute_dtype(device):
    """The type of matrix products: that of autocast where it is on."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return torch.float32


def round_weights(model):
    """
    For a model that is only sampled from, once and in place what each call would do: round the
    weights of linear layers to the type of autocast, factor the noise. Returns the model.
    """
    if model.config.model == 'flm':
        model.freeze_table()
    device = next(model.parameters()).device
    with autocast(device):
        dtype = compute_dtype(device)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    return model


def generator(device, *key):
    """A random generator seeded by the numbers in `key`: a resumed run needs no saved state."""
    # torch takes 63 bits
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1
    return torch.Generator(device).manual_seed(int(seed))


@torch.inference_mode()
def sample_batches(model, given, nfe, seed, **how):
    """
    model.sample for given (B, L), at most 256 rows at a time: yields rows on the CPU, and seconds.
    """
    device = next(model.parameters()).device
    rng = generator(device, seed, 2)
    # so that (rows, L, V) stays below 4 GB
    rows_at_once = max(1, min(256, 2 ** 30 // model.config.vocab // given.shape[1]))
    for part in given.split(rows_at_once):
        start = time.perf_counter()
        with autocast(device):
            rows = model.sample(part.to(device), nfe, rng, **how).cpu()
        yield rows, time.perf_counter() - start


def sample_rows(model, given, nfe, seed, **how):
    """All rows of sample_batches, (B, L), and seconds."""
    rows, seconds = zip(*sample_batches(model, given, nfe, seed, **how))
    return torch.cat(rows), sum(seconds)


# -----------------------------------------------------------------------------
# Checkpoints: tensors and plain values only

def checkpoint_path(path):
    """The .pt file that a checkpoint's name, a file or a folder, stands for."""
    path = Path(path)
    return path if path.suffix == '.pt' else path / 'model.pt'


def save(path, modules, **more):
    """
    Write a checkpoint, whole or not at all: the state of modules by name, of which `ema` is the
    averaged model, and tensors and plain values.
    """
    ckpt = {
        'format': FORMAT,
        'torch': str(torch.__version__),
        'config': asdict(modules['ema'].config),
        **{name: module.state_dict() for name, module in modules.items()},
        **more,
    }
    data = io.BytesIO()
    torch.save(ckpt, data)
    write_whole(path, data.getbuffer())


def config_of(ckpt):
    """The Config of a checkpoint; the weights in assets/ have a `gate`, for their training only."""
    config = dict(ckpt['config'])
    config.pop('gate', None)
    return Config(**config)


def load(path, device='cpu'):
    """A model.pt, or the folder of one -> (averaged model in eval mode, checkpoint dict)."""
    if os.path.isfile(path) and Path(path).suffix != '.pt':
        fail(f'{path} is not a checkpoint; name a .pt file, or the folder of a model.pt')
    path = checkpoint_path(path)
    # os.path.isfile is False where Path's own would raise, such as for names that are too long
    if not os.path.isfile(path):
        # out/stories was named, and out/stories/student is there
        inside = []
        if os.path.isdir(path.parent):
            inside = [str(found.parent) for found in sorted(path.parent.glob('*/model.pt'))]
        if inside:
            fail(f'{path}: no such checkpoint; name one of these: {", ".join(inside)}')
        fail(f'{path}: no such checkpoint; make one: python train_teacher.py')
    try:
        # verifies all checksums: torch.load would not notice a flipped bit
        if zipfile.ZipFile(path).testzip():
            raise ValueError('checksum')
        ckpt = torch.load(path, map_location='cpu', weights_only=True)
        version = ckpt['format']
    except Exception as e:  # torch.load raises a dozen different types
        if out_of_memory(e):
            raise
        fail(f'{path}: no whole checkpoint of this project ({type(e).__name__}); make it again')
    if version != FORMAT:
        fail(f'{path}: has format {version}, this code reads format {FORMAT}; train it again, or '
             'use the code that wrote it')
    try:
        model = build(config_of(ckpt))
        model.load_state_dict(ckpt['ema'])
    except Exception as e:
        if out_of_memory(e):
            raise
        fail(f'{path}: weights and config do not fit ({type(e).__name__}); make it again')
    return model.to(device).eval(), ckpt


def newest_checkpoint(accept):
    """The model.pt in out/ that was written last, of those whose Config `accept` takes; or None."""
    # unlike Path.rglob, glob follows links to folders
    found = filter(os.path.isfile, glob.glob('out/**/model.pt', recursive=True))
    for path in map(Path, sorted(found, key=os.path.getmtime, reverse=True)):
        try:
            # tensors stay in the file: only the config is read
            ckpt = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
            config = config_of(ckpt)
        except Exception:  # a damaged file is reported where it is named
            continue
        if accept(config):
            return path
    return None
