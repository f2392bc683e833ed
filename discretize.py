"""Discretizers: a decoder's output vector becomes one of K symbols, and gradients still pass (3.2).

    softmax   s_q = softmax(W h / tau)                          a mixture, sharp for a small tau
    gumbel    s_q = softmax((W h + g) / tau),  g ~ Gumbel(0,1)  a sample, soft; noise in training only
    vq        s_q = argmin_k |h - e_k|                          the nearest code, gradient copied past

    python train.py --disc gumbel --tau-start 1
    python train.py --disc vq --vocab 256 --vq-update gradient
    python -m pytest -q tests/test_discretize.py

A new one is a class (a subclass of Discretizer, or of Softmax where only the weights differ) and
its entry in DISCRETIZERS; `test_a_new_discretizer_is_one_short_class` is a worked example.
Section numbers are the paper's. B: images times views, d: width, K: vocabulary, c: code dimension.
"""

import argparse
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Standard deviation of the logits before training. For normal logits, perplexity is about
# K exp(-SPREAD^2 / 2) = K / 3: not uniform (the embedding would be the same mean vector for every
# image, with no gradient to tell symbols apart), not one-hot (an untrained winner would be final).
SPREAD = 1.5
# As the positions and the start token that share the next transformer's input: neither drowns the
# other, and AdamW can reshape the table within the warm-up (from std 1 it takes 1 / lr steps).
TABLE_STD = 0.02
UPDATES, INITS = ("ema", "gradient"), ("kmeans", "random")


class Discrete(NamedTuple):
    """One symbol per row: what every discretizer returns, always in float32."""

    weights: Tensor    # (B, K) non-negative, sums to 1; exactly one-hot for vq and for hard=True
    embedding: Tensor  # (B, d) = weights @ table, the next input of descriptor and interpreter
    ids: Tensor        # (B,) int64, argmax of the weights in use (after noise where there is noise)
    aux: Tensor        # () loss to add to the objective; 0 where the discretizer has none
    logits: Tensor     # (B, K); softmax(logits) is p(symbol | h), before noise: for H(p) and I(s)


def require(condition, message):
    if not condition:
        raise ValueError(message)


class Discretizer(nn.Module):
    """The contract. A subclass defines `discretize(h, hard)`, and `after_step` if it keeps state.

    `tau` is a plain attribute: train.py sets it at every step (`anneal`), and it is not in the
    state_dict, so that a loaded model stands at the end of the schedule, args.tau.
    """

    def __init__(self, width, vocab, args):
        super().__init__()
        require(vocab >= 2, f"--vocab must be 2 or more (one symbol says nothing), not {vocab}")
        require(args.tau > 0, f"--tau must be above 0, not {args.tau}")
        self.width, self.vocab, self.tau = width, vocab, args.tau

    def forward(self, h, hard=False):
        """h (B, d) -> Discrete. hard: one-hot argmax without noise, as in every reported figure."""
        # bfloat16 keeps 3 digits: near-equal logits would tie, and argmax would favour low ids
        with torch.autocast(h.device.type, enabled=False):
            return self.discretize(h.float(), hard)

    def discretize(self, h, hard):
        raise NotImplementedError

    def after_step(self):
        """train.py calls this once per optimiser step, after the T calls of `forward` in it."""


class Softmax(Discretizer):
    """Low-temperature softmax (3.2, item 1), with an optional straight-through one-hot."""

    def __init__(self, width, vocab, args):
        super().__init__(width, vocab, args)
        self.straight_through = args.straight_through
        # No bias: it could only prefer a symbol for all images alike, the first step of collapse
        self.to_logits = nn.Linear(width, vocab, bias=False)
        nn.init.normal_(self.to_logits.weight, std=self.initial_scale(args) / math.sqrt(width))
        self.table = nn.Parameter(TABLE_STD * torch.randn(vocab, width))

    @staticmethod
    def initial_scale(args):
        """Standard deviation of W h for h of unit variance (it leaves a LayerNorm)."""
        return SPREAD * (getattr(args, "tau_start", None) or args.tau)  # tau divides it away again

    def logits(self, h):
        return self.to_logits(h) / self.tau

    def weigh(self, logits):
        return logits.softmax(-1)

    def discretize(self, h, hard):
        logits = self.logits(h)                                       # (B, K)
        soft = logits if hard else self.weigh(logits)
        ids = soft.argmax(-1)                                         # (B,)
        one_hot = F.one_hot(ids, self.vocab).float()
        if hard:
            weights = one_hot
        elif self.straight_through:  # x - x.detach() is exactly 0: one-hot forward, soft backward
            weights = one_hot + (soft - soft.detach())
        else:
            weights = soft
        return Discrete(weights, weights @ self.table, ids, h.new_zeros(()), logits)


class Gumbel(Softmax):
    """Gumbel-softmax (3.2, item 2; Jang et al. 2017). Without noise it is Softmax, number by number.

    In training the argmax of the weights is a sample of softmax(W h), whatever tau is (Gumbel-max);
    tau only sets how close to one-hot the weights are. So here the logits are W h, undivided.
    """

    @staticmethod
    def initial_scale(args):
        return SPREAD  # against noise of standard deviation pi / sqrt(6) = 1.28, for every tau

    def logits(self, h):
        return self.to_logits(h)

    def weigh(self, logits):
        if self.training:
            return F.gumbel_softmax(logits, self.tau)
        return (logits / self.tau).softmax(-1)


class VQ(Discretizer):
    """Vector quantization (3.2, item 3; van den Oord et al. 2017), with the remedies for dead codes.

    The T calls of a step share one codebook but come from T different distributions. Whatever is
    estimated from data (k-means, EMA, restarts) therefore waits for `after_step` and sees all of
    them: k-means on the first call alone would leave positions 2 to T to share a few codes. The
    first step runs on random codes; at the start of the warm-up its learning rate is about 0.
    """

    def __init__(self, width, vocab, args):
        super().__init__(width, vocab, args)
        require(args.vq_update in UPDATES, f"--vq-update: unknown name {args.vq_update!r}")
        require(args.vq_init in INITS, f"--vq-init: unknown name {args.vq_init!r}")
        require(0 <= args.vq_decay < 1, f"--vq-decay must be in [0, 1), not {args.vq_decay}")
        require(0 <= args.vq_restart < 1, f"--vq-restart must be in [0, 1), not {args.vq_restart}")
        require(args.vq_dim >= 0, f"--vq-dim must be 0 (the width) or more, not {args.vq_dim}")
        self.ema, self.l2 = args.vq_update == "ema", args.vq_l2
        self.decay, self.restart, self.beta = args.vq_decay, args.vq_restart, args.vq_beta
        dim = args.vq_dim or width
        self.down = nn.Linear(width, dim) if dim != width else nn.Identity()
        self.up = nn.Linear(dim, width) if dim != width else nn.Identity()
        # Unit variance, as h: with the usual U(-1/K, 1/K) all codes sit in one point beside the data
        codebook = torch.randn(vocab, dim)
        if self.ema:
            self.register_buffer("codebook", codebook)                # (K, c), moved by after_step
        else:
            self.codebook = nn.Parameter(codebook)                    # (K, c), moved by the optimiser
        self.register_buffer("usage", torch.full((vocab,), 1 / vocab))  # EMA of each code's share
        self.register_buffer("ready", torch.tensor(args.vq_init == "random"))
        self.seen = []  # [(z, ids)] of this step; empty between steps, so it needs no checkpoint

    @property
    def table(self):
        return self.up(self.normalise(self.codebook))                 # (K, d)

    def normalise(self, x):
        """Onto the sphere of radius sqrt(c): the l2 codes of Yu et al. 2022 (ViT-VQGAN), scaled so
        that a component has unit variance, and losses and logits do not shrink with c."""
        return F.normalize(x, dim=-1) * math.sqrt(x.shape[-1]) if self.l2 else x

    def discretize(self, h, hard):
        z, codes = self.normalise(self.down(h)), self.normalise(self.codebook)  # (B, c), (K, c)
        distance = (z**2).sum(-1, keepdim=True) - 2 * z @ codes.T + (codes**2).sum(-1)  # (B, K)
        # -|z - e|^2 / 2c, with l2: cosine - 1. Any increasing function has the same argmax; over tau
        # this one is a p(symbol) that is comparable between code dimensions and with softmax.
        logits = -distance / (2 * z.shape[-1] * self.tau)
        ids = logits.argmax(-1)
        weights = F.one_hot(ids, self.vocab).float()
        code = weights @ codes                                        # (B, c)
        aux = self.beta * F.mse_loss(z, code.detach())                # commitment
        if not self.ema:
            aux = aux + F.mse_loss(code, z.detach())                  # codebook: eq. 3, 2nd term
        if self.training and not hard:
            self.seen.append((z.detach(), ids))
        # Straight-through: the value is the code's to the bit, the gradient is z's, unchanged
        return Discrete(weights, self.up(code.detach() + (z - z.detach())), ids, aux, logits)

    @torch.no_grad()
    def after_step(self):
        """k-means after the first step; then usage, the EMA update and the restarts."""
        if not self.seen:
            return
        z, ids = (torch.cat(parts) for parts in zip(*self.seen))      # (T B, c), (T B,)
        self.seen = []
        if not self.ready:
            self.codebook.copy_(kmeans(z, self.vocab))
            self.ready.fill_(True)
            return
        assigned = F.one_hot(ids, self.vocab).float() / len(ids)      # (T B, K)
        share, total = assigned.sum(0), assigned.T @ z                # (K,), (K, c)
        self.usage.lerp_(share, 1 - self.decay)
        if self.ema:
            # e = m / N of van den Oord et al. 2017, A.1 (also in Razavi et al. 2019), as a step:
            # no second buffer, and a code that nobody uses stays where it is instead of 0 / 0
            step = (1 - self.decay) * (total - share[:, None] * self.codebook)
            self.codebook.add_(step / self.usage.clamp(min=1e-12)[:, None])
        # Dhariwal et al. 2020 (Jukebox): an idle code moves onto a vector of this step, and counts
        # as averagely used until shown otherwise. K draws at every step: no wait for the GPU.
        idle = self.usage < self.restart / self.vocab                 # (K,)
        fresh = draw(z, self.vocab)
        self.codebook.copy_(torch.where(idle[:, None], fresh, self.codebook))
        self.usage.masked_fill_(idle, 1 / self.vocab)


def draw(x, count):
    """x (n, c) -> (count, c) random rows, distinct where n allows it (CPU generator on any device)."""
    rows = torch.randperm(len(x))[:count] if len(x) >= count else torch.randint(len(x), (count,))
    return x[rows.to(x.device)]


def kmeans(x, count, iterations=10):
    """x (n, c) -> (count, c) centres: Lloyd's algorithm from random rows; an empty centre stays.

    The noise tells centres apart that begin on the same row (n < count): a tie would last forever.
    """
    centres = draw(x, count)
    centres = centres + 1e-3 * x.std() * torch.randn(centres.shape).to(x.device)
    for _ in range(iterations):
        assigned = F.one_hot(torch.cdist(x, centres).argmin(-1), count).float()  # (n, count)
        size = assigned.sum(0)[:, None]
        centres = torch.where(size > 0, assigned.T @ x / size.clamp(min=1), centres)
    return centres


DISCRETIZERS = {"softmax": Softmax, "gumbel": Gumbel, "vq": VQ}


def build(name, width, vocab, args):
    require(name in DISCRETIZERS, f"--disc must be one of {', '.join(DISCRETIZERS)}, not {name!r}")
    return DISCRETIZERS[name](width, vocab, args)


def anneal(start, end, progress):
    """Temperature at `progress` in 0..1: start (end / start)^progress; start None: constant.

    Exponential, as in Jang et al. 2017: what acts is the ratio of logits to tau, and this way it
    grows by the same factor in every epoch. A cosine would spend most epochs near the two ends.
    """
    start = end if start is None else start
    require(start > 0 and end > 0, f"--tau-start and --tau must be above 0, not {start} and {end}")
    return start * (end / start) ** min(max(progress, 0.0), 1.0)


def add_flags(parser):
    """All flags of all discretizers; their defaults are here and nowhere else."""
    add = parser.add_argument_group("discretizer").add_argument
    toggle = argparse.BooleanOptionalAction
    add("--disc", choices=list(DISCRETIZERS), default="softmax", help="how a vector becomes a symbol: "
        "softmax (no noise), gumbel (explores by sampling), vq (nearest code)")
    add("--vocab", type=int, default=128, help="number of symbols K; an image is T log2(K) bits. "
        "Raise it when nearly all symbols are in use, lower it when few are")
    add("--tau", type=float, default=0.12, help="temperature at the end of training, in units of the "
        "logits. Lower: closer to one symbol, but gradients vanish; for vq it only scales the logits")
    add("--tau-start", type=float, default=None, help="temperature at step 0, annealed exponentially "
        "to --tau; none: constant. Set it (about 1) when few symbols survive the first epochs")
    add("--straight-through", action=toggle, default=False, help="softmax, gumbel: one-hot forward, "
        "soft gradient (paper: soft). Set it when soft figures are far better than hard ones")
    add("--vq-dim", type=int, default=8, help="code dimension, 0: the model's width. Low (Yu et al. "
        "2022) keeps more codes in use; raise it when --vocab is in the thousands")
    add("--vq-l2", action=toggle, default=False, help="compare directions only (l2-normalised codes). "
        "Set it when the codes' norms drift apart or the commitment loss grows")
    add("--vq-update", choices=UPDATES, default="ema", help="what moves the codes: an average of their "
        "vectors (ema; free of the learning rate) or the codebook loss (gradient)")
    add("--vq-decay", type=float, default=0.99, help="EMA decay per optimiser step, of codes and of "
        "usage; memory is 1 / (1 - decay) steps. Lower it when codes lag behind, raise it if B is small")
    add("--vq-init", choices=INITS, default="kmeans", help="first codes: k-means of the first step's "
        "vectors, or random normal (to see why k-means is there)")
    add("--vq-restart", type=float, default=0.1, help="restart codes used less than this fraction of "
        "1 / K; 0: never. Lower it when rare but meaningful symbols are lost")
    add("--vq-beta", type=float, default=0.25, help="weight of the commitment loss (van den Oord et "
        "al. 2017: 0.1 to 2 alike). Raise it when the vectors run away from their codes")
