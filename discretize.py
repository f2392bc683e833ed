"""Discretizers: the decoder's output becomes one of K symbols, and gradients still pass (3.2).

    softmax   s_q = softmax(W h / tau)                         soft, sharp for a small tau
    gumbel    s_q = softmax((W h + g) / tau), g ~ Gumbel(0,1)  a soft sample; noise in training only
    vq        s_q = e_k, k = argmin_k |h - e_k|                nearest code, gradient copied past it

    python discretize.py                          # one vector h through all three, with gradients
    python train.py --disc gumbel --tau-start 2 --tau 0.5       # annealed; --tau alone: constant
    python train.py --disc vq --vocab 256

To add one, write a class and its entry in DISCRETIZERS (README: "Add a discretizer").
h (B, d): the decoder's output at one position; B: images times views, d: width, K: vocabulary. The
paper's s_s is W h for softmax and gumbel, h for vq; E_S reads s_q @ codebook. (3.2) is its section.
"""
import math
from argparse import Namespace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import distributed

# Standard deviation of the logits at initialisation, for a perplexity of about K exp(-SPREAD^2 / 2)
# = K / 3: not uniform (all images embed to one mean vector), not one-hot (no other symbol gets a
# gradient). Our choice: the paper names none.
SPREAD = 1.5
# That of symbols' embeddings (vq: 1), start token, CLS token and positions (our choice).
EMBEDDING_STD = 0.3


class Quantized(NamedTuple):
    """One symbol per row: what every discretizer returns, in float32."""

    weights: Tensor    # (B, K) sums to 1; exactly one-hot for vq and for hard=True
    embedding: Tensor  # (B, d) the symbol's embedding: next input of descriptor and interpreter
    ids: Tensor        # (B,) int64, argmax of the weights in use (with their noise)
    aux: Tensor        # () loss to add to the objective; 0 where the discretizer has none
    logits: Tensor     # (B, K); softmax(logits) is p(symbol | h), before noise: for H(p)


class Discretizer(nn.Module):
    """The contract. A subclass defines `logits`, `choose` and `codebook`, (K, d), the embeddings of
    the symbols. train.py sets `tau` in every step (see `anneal`); a loaded model has the final one.
    Raises ValueError for flags that make no sense."""

    default_tau = default_tau_start = 0.12      # where no flag sets it (paper: softmax 0.12)

    def __init__(self, width, vocab, args):
        super().__init__()
        if vocab < 2:
            raise ValueError(f"--vocab must be 2 or more (one symbol carries 0 bits), not {vocab}")
        self.vocab, self.views = vocab, args.views
        self.final_tau = self.default_tau if args.tau is None else args.tau
        start = self.default_tau_start if args.tau is None else self.final_tau  # --tau: constant
        self.tau = self.start_tau = start if args.tau_start is None else args.tau_start
        if not (self.final_tau > 0 and self.start_tau > 0):
            raise ValueError("--tau and --tau-start must be above 0")

    def forward(self, h, hard=False):
        """h (B, d) -> Quantized. hard: one-hot argmax, no noise, as in every reported figure."""
        # bfloat16 keeps 3 digits: near-equal logits would tie, and argmax would favour low ids
        with torch.autocast(h.device.type, enabled=False):
            h = h.float()
            return self.choose(self.logits(h), h, hard)

    def logits(self, h):
        """(B, d) -> (B, K), the scores that decide: higher is likelier."""
        raise NotImplementedError

    def choose(self, logits, h, hard):
        """(B, K), (B, d) -> Quantized."""
        raise NotImplementedError

    def init_codebook(self, centroids, scale):
        """Starts from centroids (K, d) of h (k-means), where a recipe wants that; scale: standard
        deviation of |h - c|^2 over the data. Does nothing where there is no such codebook."""

    def codebook_parameters(self):
        """The parameters that `init_codebook` sets."""
        return []


class Softmax(Discretizer):
    """Low-temperature softmax (3.2, item 1), with an optional straight-through one-hot."""

    logits_use_tau = True             # the logits are W h / tau
    init_sharpness = 1.0        # std of W h over the data after `init_codebook`, before / tau

    def __init__(self, width, vocab, args):
        super().__init__(width, vocab, args)
        self.straight_through = args.straight_through
        self.to_logits = nn.Linear(width, vocab)
        # for h of unit variance (`--recipe paper`: after BatchNorm) the logits have std SPREAD
        divisor = self.tau if self.logits_use_tau else 1.0
        nn.init.normal_(self.to_logits.weight, std=SPREAD * divisor / math.sqrt(width))
        nn.init.zeros_(self.to_logits.bias)
        self.codebook = nn.Parameter(EMBEDDING_STD * torch.randn(vocab, width))     # (K, d)

    def logits(self, h):
        return self.to_logits(h) / (self.tau if self.logits_use_tau else 1.0)

    def soft_assignment(self, logits):
        """(B, K) -> (B, K), the soft assignment that carries the gradient."""
        return logits.softmax(-1)

    def choose(self, logits, h, hard):
        scores = logits if hard else self.soft_assignment(logits)
        ids = scores.argmax(-1)                                          # (B,)
        weights = F.one_hot(ids, self.vocab).float() if hard or self.straight_through else scores
        if self.straight_through and not hard:
            weights = weights + (scores - scores.detach())      # adds 0, and the softmax's gradient
        return Quantized(weights, weights @ self.codebook, ids, h.new_zeros(()), logits)

    @torch.no_grad()
    def init_codebook(self, centroids, scale):
        """So that argmax(W h + b) is the nearest: argmin |h - c|^2 = argmax 2 <h, c> - |c|^2."""
        self.codebook.copy_(centroids)
        self.to_logits.weight.copy_(2 * centroids * self.init_sharpness / scale)
        self.to_logits.bias.copy_(-centroids.square().sum(1) * self.init_sharpness / scale)

    def codebook_parameters(self):
        return [self.codebook, *self.to_logits.parameters()]


class Gumbel(Softmax):
    """Gumbel-softmax (3.2, item 2; Jang et al. 2017). In evaluation its weights are Softmax's.

    In training the argmax of the weights is a sample of softmax(W h), whatever tau is (Gumbel-max);
    tau only sets how close to one-hot the weights are, or, straight-through, which symbols a
    gradient reaches."""

    default_tau_start, default_tau = 2.0, 0.5       # annealed: the base strategy of section 3.4
    logits_use_tau = False            # they are W h
    init_sharpness = 30.0       # `stable`: far above the noise's std, 1.28, so it rarely decides
    noisy = True                # --explore switch ends it: see `anneal`

    def soft_assignment(self, logits):
        if self.training and self.noisy:
            shape = distributed.world_size() * len(logits), self.vocab      # of all ranks
            noise = -distributed.shard(logits.new_empty(shape).exponential_(), self.views).log()
            logits = logits + noise
        return (logits / self.tau).softmax(-1)


class VQ(Discretizer):
    """Vector quantization (3.2, item 3; equation 3 of van den Oord et al. 2017):

        L_vq = |sg[h] - e|^2 + beta |h - sg[e]|^2          (sg: no gradient; mean over d)

    tau scales the logits only, -|h - e|^2 / (2 d tau), which exploration terms use."""

    default_tau = default_tau_start = 1.0
    beta = 0.25                 # van den Oord's, who find 0.1 to 2 to be alike

    def __init__(self, width, vocab, args):
        super().__init__(width, vocab, args)
        # unit variance, as h has; the U(-1/K, 1/K) of common VQ-VAE code is far smaller than h
        self.codebook = nn.Parameter(torch.randn(vocab, width))                 # (K, d)

    def logits(self, h):
        norms = self.codebook.square().sum(1)
        distance = h.square().sum(1, keepdim=True) - 2 * h @ self.codebook.T + norms    # (B, K)
        return -distance / (2 * h.shape[-1] * self.tau)

    def choose(self, logits, h, hard):
        ids = logits.argmax(-1)                                          # (B,)
        weights = F.one_hot(ids, self.vocab).float()
        code = weights @ self.codebook                                   # (B, d)
        aux = F.mse_loss(code, h.detach()) + self.beta * F.mse_loss(h, code.detach())
        # Straight-through: the value is the code's, the gradient goes to h unchanged
        return Quantized(weights, code.detach() + (h - h.detach()), ids, aux, logits)

    @torch.no_grad()
    def init_codebook(self, centroids, scale):
        self.codebook.copy_(centroids)

    def codebook_parameters(self):
        return [self.codebook]


DISCRETIZERS = {"softmax": Softmax, "gumbel": Gumbel, "vq": VQ}


def build(args, width):
    """The discretizer that train.py's flags name. Raises ValueError."""
    return DISCRETIZERS[args.disc](width, args.vocab, args)


def anneal(module, progress, explore="base"):
    """Sets the temperature of all discretizers in `module` at `progress` in 0..1, from --tau-start
    to --tau: start (end / start)^progress, as Jang et al. 2017, so that 1 / tau grows by the
    same factor in every epoch. explore = "switch": gumbel's noise ends half-way."""
    for disc in module.modules():
        if isinstance(disc, Discretizer):
            disc.tau = disc.start_tau * (disc.final_tau / disc.start_tau) ** progress
            disc.noisy = explore != "switch" or progress < 0.5


def main():
    torch.manual_seed(0)
    h = torch.randn(1, 4, requires_grad=True)
    print("One decoder output h through the three discretizers, K = 5 symbols, d = 4")
    print("h =", [round(x, 2) for x in h[0].tolist()])
    for name, disc in DISCRETIZERS.items():
        disc = disc(4, 5, Namespace(tau=None, tau_start=None, straight_through=False,
                                    views=1))
        for hard in (False, True):
            out = disc(h, hard)
            gradient, = torch.autograd.grad(out.embedding.sum(), h, allow_unused=True)
            print(f"{name:8}{'hard' if hard else 'soft'}  symbol {out.ids.item()}  weights "
                  + " ".join(f"{w:.2f}" for w in out.weights[0]) + "  |gradient of h| "
                  + ("none" if gradient is None else f"{gradient.norm():.2f}"))


if __name__ == "__main__":
    main()
