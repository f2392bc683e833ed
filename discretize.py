"""Discretizers: the decoder's output becomes one of K symbols, and gradients still pass (3.2).

    softmax   s_q = softmax(W h / tau)                         a mixture, sharp for a small tau
    gumbel    s_q = softmax((W h + g) / tau), g ~ Gumbel(0,1)  a soft sample; noise in training only
    vq        s_q = argmin_k |h - e_k|                         nearest code, gradient copied past it

    python train.py --disc gumbel --tau-start 4
    python train.py --disc vq --vocab 256 --vq-update gradient

To add one, write a class and its entry in DISCRETIZERS (the last test is a worked example).
B: images times views, d: width, K: vocabulary, c: code dimension; (3.2) is the paper's section.
"""

import argparse
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import distributed

# Deviation of the logits before training, for a perplexity of about K exp(-SPREAD^2 / 2) = K / 3:
# not uniform (all images embed to one mean vector), not one-hot (no other symbol gets a gradient).
SPREAD = 1.5
# As the positions, which share the next transformer's input: neither drowns the other, and AdamW
# can reshape the table within the warm-up (from deviation 1 it takes 1 / lr steps).
TABLE_STD = 0.3
UPDATES, INITS = ("ema", "gradient"), ("kmeans", "random")


class Discrete(NamedTuple):
    """One symbol per row: what every discretizer returns, in float32."""

    weights: Tensor    # (B, K) sums to 1; exactly one-hot for vq and for hard=True
    embedding: Tensor  # (B, d) = weights @ table, the next input of descriptor and interpreter
    ids: Tensor        # (B,) int64, argmax of the weights in use (with their noise)
    aux: Tensor        # () loss to add to the objective; 0 where the discretizer has none
    logits: Tensor     # (B, K); softmax(logits) is p(symbol | h), before noise: for H(p) and I(s)


def require(condition, message):
    if not condition:
        raise ValueError(message)


class Discretizer(nn.Module):
    """The contract. A subclass defines `discretize(h, hard, bids)`, and `after_step` if it keeps
    state. train.py sets `tau` at every step (see `anneal`); a loaded model has the final one."""

    good_tau = 0.12      # what --tau is when it is not given: measured for each class (paper: 0.12)

    def __init__(self, width, vocab, args):
        super().__init__()
        require(vocab >= 2, f"--vocab must be 2 or more (one symbol says nothing), not {vocab}")
        self.final_tau = self.good_tau if args.tau is None else args.tau
        require(self.final_tau > 0, f"--tau must be above 0, not {args.tau}")
        self.vocab, self.tau = vocab, self.final_tau

    def forward(self, h, hard=False):
        """h (B, d) -> Discrete. hard: one-hot argmax without noise, as in every reported figure.
        bids (B, K), deviation about 1: what speaks for each symbol instead of h (model.Draft)."""
        # bfloat16 keeps 3 digits: near-equal logits would tie, and argmax would favour low ids
        with torch.autocast(h.device.type, enabled=False):
            h = h.float()
            return self.choose(self.logits(h), h, hard)

    def after_step(self):
        """train.py calls this once per optimiser step, after the T calls of `forward` in it."""


class Softmax(Discretizer):
    """Low-temperature softmax (3.2, item 1), with an optional straight-through one-hot."""

    tempered = True  # logits are W h / tau
    unit = 1.0       # logits to a bid, before tau

    def __init__(self, width, vocab, args):
        super().__init__(width, vocab, args)
        self.straight_through = args.straight_through
        if not getattr(args, "draft", False):                            # whose bids take its place
            # No bias: it could only prefer a symbol for all images: the first step of collapse
            self.to_logits = nn.Linear(width, vocab, bias=False)
            # h has unit variance (it leaves a BatchNorm), so the logits have deviation SPREAD
            unit = (getattr(args, "tau_start", None) or self.final_tau) if self.tempered else 1
            nn.init.normal_(self.to_logits.weight, std=SPREAD * unit / math.sqrt(width))
        self.table = nn.Parameter(TABLE_STD * torch.randn(vocab, width))

    def weigh(self, logits):
        return logits.softmax(-1)

    def scaled(self, scores):
        scores = scores * self.unit
        return scores / (self.tau if self.tempered else 1)

    def logits(self, h):
        return self.to_logits(h) / (self.tau if self.tempered else 1)

    def choose(self, logits, h, hard):
        soft = logits if hard else self.weigh(logits)
        ids = soft.argmax(-1)                                            # (B,)
        weights = F.one_hot(ids, self.vocab).float() if hard or self.straight_through else soft
        if self.straight_through and not hard:
            weights = weights + (soft - soft.detach())  # adds exactly 0, and the softmax's gradient
        return Discrete(weights, weights @ self.table, ids, h.new_zeros(()), logits)


class Gumbel(Softmax):
    """Gumbel-softmax (3.2, item 2; Jang et al. 2017). In evaluation its weights are Softmax's.

    In training the argmax of the weights is a sample of softmax(W h), whatever tau is (Gumbel-max);
    tau only sets how close to one-hot the weights are, or, straight-through, whom a gradient
    reaches. Bids are certain from the start and leave little to explore: a quarter of the noise,
    for samples of softmax(4 * logits), kept the most."""

    good_tau = 1.0
    tempered = False  # logits are W h: SPREAD against noise of standard deviation 1.28, at any tau
    unit = 1 / 0.12   # as many as softmax has at its tau

    def __init__(self, width, vocab, args):
        super().__init__(width, vocab, args)
        self.noise = 0.25 if getattr(args, "draft", False) else 1

    def weigh(self, logits):
        if self.training:
            shape = distributed.world_size() * len(logits), self.vocab        # everyone's noise: -log E
            noise = -distributed.shard(logits.new_empty(shape).exponential_()).log()
            return ((logits + self.noise * noise) / self.tau).softmax(-1)
        return (logits / self.tau).softmax(-1)


class VQ(Discretizer):
    """Vector quantization (3.2, item 3; van den Oord et al. 2017), with remedies for dead codes.

    The T calls of a step share one codebook but come from T different distributions. So k-means,
    EMA and restarts wait for `after_step` and see them all: k-means on the first call alone would
    leave positions 2 to T a few codes. Step 1 uses random codes, at a warm-up rate of about 0."""

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
        codebook = torch.randn(vocab, dim)  # (K, c) of unit variance, as h; U(-1/K, 1/K) is a point
        if self.ema:
            self.register_buffer("codebook", codebook)                   # moved by after_step
        else:
            self.codebook = nn.Parameter(codebook)                       # moved by the optimiser
        self.register_buffer("usage", torch.full((vocab,), 1 / vocab))   # EMA of each code's share
        self.register_buffer("ready", torch.tensor(args.vq_init == "random"))
        self.seen = []  # (z, ids) of this step's calls; empty between steps, hence not a buffer

    @property
    def table(self):
        return self.up(self.normalise(self.codebook))                    # (K, d)

    def normalise(self, x):
        # l2 of ViT-VQGAN (Yu et al. 2022), but at radius sqrt(c): losses do not shrink with c
        return F.normalize(x, dim=-1) * math.sqrt(x.shape[-1]) if self.l2 else x

    def scaled(self, scores):
        return scores / self.tau

    def logits(self, h):
        z, codes = self.normalise(self.down(h)), self.normalise(self.codebook)  # (B, c), (K, c)
        distance = (z**2).sum(-1, keepdim=True) - 2 * z @ codes.T + (codes**2).sum(-1)  # (B, K)
        return -distance / (2 * z.shape[-1]) / self.tau

    def choose(self, logits, h, hard):
        z, codes = self.normalise(self.down(h)), self.normalise(self.codebook)  # (B, c), (K, c)
        ids = logits.argmax(-1)
        weights = F.one_hot(ids, self.vocab).float()
        code = weights @ codes                                           # (B, c)
        aux = self.beta * F.mse_loss(z, code.detach())                   # eq. 3: commitment
        if not self.ema:
            aux = aux + F.mse_loss(code, z.detach())                     # eq. 3: codebook
        if self.training and not hard:
            self.seen.append((z.detach(), ids))
        # Straight-through: the value is exactly the code, the gradient goes to z unchanged
        return Discrete(weights, self.up(code.detach() + (z - z.detach())), ids, aux, logits)

    @torch.no_grad()
    def after_step(self):
        """k-means after the first step; from then on usage, the EMA update and restarts."""
        if not self.seen:
            return
        z, ids = (torch.cat([distributed.all_gather(part) for part in parts])
                  for parts in zip(*self.seen))                          # (T B, c), (T B,)
        self.seen = []
        if not self.ready:
            self.codebook.copy_(kmeans(z, self.vocab))
            self.ready.fill_(True)
            return
        assigned = F.one_hot(ids, self.vocab).float() / len(ids)         # (T B, K)
        share = assigned.sum(0)                                          # (K,)
        self.usage.lerp_(share, 1 - self.decay)
        if self.ema:
            # e = m / N of van den Oord et al. 2017, A.1 (also in Razavi et al. 2019), as a step:
            # no second buffer, and a code that nobody uses stays where it is instead of 0 / 0
            step = (1 - self.decay) * (assigned.T @ z - share[:, None] * self.codebook)  # (K, c)
            self.codebook.add_(step / self.usage.clamp(min=1e-12)[:, None])
        # Jukebox (Dhariwal et al. 2020): an idle code moves onto a vector of this step, and counts
        # as averagely used until shown otherwise
        idle = self.usage < self.restart / self.vocab                    # (K,)
        self.codebook.copy_(torch.where(idle[:, None], draw(z, self.vocab), self.codebook))
        self.usage.masked_fill_(idle, 1 / self.vocab)


def draw(x, count):
    """x (n, c) -> (count, c): random rows, distinct if n allows it (CPU generator everywhere)."""
    rows = torch.randperm(len(x))[:count] if len(x) >= count else torch.randint(len(x), (count,))
    return x[rows.to(x.device)]


def kmeans(x, count, iterations=10):
    """x (n, c) -> (count, c) centres: Lloyd's algorithm from random rows; an empty centre stays."""
    centres = draw(x, count)
    for _ in range(iterations):
        assigned = F.one_hot(torch.cdist(x, centres).argmin(-1), count).float()      # (n, count)
        size = assigned.sum(0)[:, None]
        centres = torch.where(size > 0, assigned.T @ x / size.clamp(min=1), centres)
    return centres


DISCRETIZERS = {"softmax": Softmax, "gumbel": Gumbel, "vq": VQ}


def build(name, width, vocab, args):
    require(name in DISCRETIZERS, f"--disc must be one of {list(DISCRETIZERS)}, not {name!r}")
    return DISCRETIZERS[name](width, vocab, args)


def anneal(start, end, progress):
    """Temperature at `progress` in 0..1: start (end / start)^progress; start None: constant.
    Exponential, as Jang et al. 2017: 1 / tau, which acts, grows by one factor in every epoch."""
    start = end if start is None else start
    require(start > 0 and end > 0, f"--tau-start and --tau must be above 0, not {start} and {end}")
    return start * (end / start) ** min(max(progress, 0), 1)


def add_flags(parser):
    """All flags of all discretizers; their defaults are here and nowhere else."""
    add = parser.add_argument_group("discretizer").add_argument
    toggle = argparse.BooleanOptionalAction
    add("--disc", choices=list(DISCRETIZERS), default="softmax",
        help="softmax (no noise), gumbel (explores by sampling) or vq (nearest code)")
    add("--vocab", type=int, default=128,
        help="symbols K; an image is T log2(K) bits. Raise when nearly all are in use")
    add("--tau", type=float,
        help="temperature, final if annealed, in units of logits; not given: 0.12 (gumbel: 1). "
             "Lower: closer to one symbol, gradients vanish. vq: scales the logits only")
    add("--tau-start", type=float, help="temperature at step 0, annealed exponentially to --tau; "
        "none: constant. Set (about 1) when few symbols survive the first epochs")
    add("--straight-through", action=toggle, default=True,
        help="one-hot forward, soft gradient (paper: soft, and then soft figures exceed hard ones)")
    add("--vq-dim", type=int, default=16, help="code dimension, 0: the model's width. Low (Yu et "
        "al. 2022) keeps more codes in use; raise when K is in the thousands")
    add("--vq-l2", action=toggle, default=False, help="codes on a sphere: only directions "
        "compare. Set when the norms of vectors and codes drift apart")
    add("--vq-update", choices=UPDATES, default="ema", help="codes follow the average of their "
        "vectors (ema; no learning rate) or the codebook loss (gradient; van den Oord eq. 3)")
    add("--vq-decay", type=float, default=0.9, help="decay of the EMA of codes and usage, per "
        "step; memory 1/(1 - decay) steps. Lower when codes lag, raise for small batches")
    add("--vq-init", choices=INITS, default="kmeans", help="first codes: k-means of the first "
        "step's vectors, or random normal (to see what k-means is good for)")
    add("--vq-restart", type=float, default=0.1, help="restart codes used less than this fraction "
        "of 1/K; 0: never. Lower when rare but meaningful symbols are lost")
    add("--vq-beta", type=float, default=1.0, help="weight of the commitment loss. Raise when "
        "the decoder's vectors run away from the codes")
