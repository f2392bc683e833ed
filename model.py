"""The networks, in the order in which an image goes through them (paper, section 3.1, Figure 2).

    x --E_T--> z_t --D_S--> s_s --discretizer--> s_q --E_S--> z_s --P_S--> p_s
    image      tokens       logits               T symbols    prefixes     prototypes

    python model.py                         # the shapes of one batch on this way

Teacher (E_T, teachers.py): a frozen ViT with DINO weights. Student: descriptor (D_S), discretizer
(discretize.py), interpreter (E_S) and projector (P_S). P_T, the teacher's projector, is the EMA of
P_S. B: images times views, N: patches, M: N + 1 tokens with the CLS, or N, d: width, L: queries,
T: symbols, K: vocabulary, D: prefixes.
"""
import argparse
import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import discretize
import distributed
import place


# ---- projectors P_T and P_S ----------------------------------------------------------------------

class DINOHead(nn.Module):
    """Projector (P_T, P_S): 3-layer MLP with GELU, bottleneck, L2-normalise, cosine to P prototypes
    (DINO's weight-normalised last layer with its gain fixed at 1). (..., d) -> (..., P),
    values in [-1, 1]."""

    def __init__(self, width, prototypes, hidden, batch_norm=False):
        super().__init__()
        bottleneck = hidden // 8                                # DINO: 2048 and 256
        norm = distributed.BatchNorm if batch_norm else (lambda width: nn.Identity())
        self.mlp = nn.Sequential(nn.Linear(width, hidden), norm(hidden), nn.GELU(),
                                 nn.Linear(hidden, hidden), norm(hidden), nn.GELU(),
                                 nn.Linear(hidden, bottleneck))
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        for p in self.parameters():
            # Our choice: at DINO's std of 0.02 a layer of width 128 would shrink its input to 0.2
            nn.init.xavier_uniform_(p) if p.ndim > 1 else None
        nn.init.normal_(self.prototypes)

    def forward(self, x):
        x = self.mlp(x)
        # Cosines are divided by temperatures of 0.04 to 0.1 later: three digits would not do
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(F.normalize(x.float(), dim=-1),
                            F.normalize(self.prototypes.float(), dim=-1))


# ---- student: D_S, discretizer, E_S, P_S ---------------------------------------------------------

class Attention(nn.Module):
    """Multi-head attention with keys and values apart from the queries, for the decoder's cache."""

    def __init__(self, width, heads):
        super().__init__()
        if width % heads:
            raise ValueError(f"--descriptor and --interpreter: {heads} heads do not divide the "
                             f"teacher's width {width}")
        self.heads = heads
        self.to_q, self.to_kv, self.out = (nn.Linear(width, n * width) for n in (1, 2, 1))

    def split(self, x):
        """(B, L, d) -> (B, heads, L, d/heads)"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, x):
        """x (B, S, d) -> keys and values, (B, heads, S, d/heads) each."""
        return [self.split(part) for part in self.to_kv(x).chunk(2, -1)]

    def forward(self, x, keys, values, mask=None):
        """Queries x (B, L, d) -> (B, L, d). mask (L, S): True where attention is allowed."""
        y = F.scaled_dot_product_attention(self.split(self.to_q(x)), keys, values, mask)
        return self.out(y.transpose(1, 2).flatten(2))


class CrossAttention(Attention):
    """Attention of few queries to many tokens z_n that makes no keys and values of the tokens:
        <q, W_k z_n + b_k> = <W_k^T q, z_n> + const     sum_n a_n (W_v z_n + b_v) = W_v m + b_v
    m = sum_n a_n z_n; the softmax drops const. Our choice: fewer operations than with keys of M for
    T < M d / (d + (heads - 1) M) queries, 25 at the small size."""

    def forward(self, x, tokens):
        """Queries x (B, L, d), tokens (B, M, d) -> (B, L, d), attention maps (B, L, heads, M)."""
        w_k, w_v = self.to_kv.weight.unflatten(0, (2, self.heads, -1))      # (heads, d/heads, d)
        q = self.to_q(x).unflatten(-1, (self.heads, -1)) * w_k.shape[1] ** -0.5
        maps = torch.einsum("blhe,hed,bnd->blhn", q, w_k, tokens).softmax(-1)
        y = torch.einsum("blhn,bnd,hed->blhe", maps, tokens, w_v).flatten(2)    # (B, L, d)
        return self.out(y + self.to_kv.bias.chunk(2)[1]), maps


class Block(nn.Module):
    """Pre-norm transformer block: `forward` for the interpreter, `decode` for D_S."""

    def __init__(self, width, heads, cross=False):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        if cross:
            self.norm_cross, self.cross = nn.LayerNorm(width), CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(),
                                 nn.Linear(4 * width, width))

    def forward(self, x, mask=None, queries=None):
        """x (B, L, d) -> the same, or (B, Q, d) of the positions in the list `queries` alone."""
        h = self.norm1(x)
        kv = self.attention.keys_values(h)
        if queries is not None:
            x, h, mask = x[:, queries], h[:, queries], mask[queries]
        x = x + self.attention(h, *kv, mask)
        return x + self.mlp(self.norm2(x))

    def decode(self, x, tokens, kv_cache):
        """One position x (B, 1, d) of the decoder. tokens (B, M, d): the teacher's; kv_cache: keys
        and values of the earlier positions, or None. -> x, the cache with this position's, and the
        maps of the cross-attention (B, 1, heads, M)."""
        h = self.norm1(x)
        kv = self.attention.keys_values(h)
        if kv_cache is not None:
            kv = [torch.cat(pair, 2) for pair in zip(kv_cache, kv)]
        x = x + self.attention(h, *kv)
        y, maps = self.cross(self.norm_cross(x), tokens) if hasattr(self, "cross") else (0, None)
        x = x + y
        return x + self.mlp(self.norm2(x)), kv, maps


class Sequence(NamedTuple):
    """T symbols for each of B images."""
    ids: torch.Tensor                       # (B, T) int64
    weights: torch.Tensor                   # (B, T, K) soft or one-hot
    embeddings: torch.Tensor                # (B, T, d)
    logits: torch.Tensor                    # (B, T, K)
    aux: torch.Tensor                       # () the discretizer's own loss, mean over positions
    attention: torch.Tensor | None = None   # (B, T, N) over the patches, rows sum to 1
    cls_pred: torch.Tensor | None = None    # (B, T, d), of stable.py
    shares: torch.Tensor | None = None      # (B, T, N), of place.py: windows of what was left

    @classmethod
    def stack(cls, quantized, *rest):
        """T discretize.Quantized, one a position -> Sequence."""
        stack = lambda name: torch.stack([getattr(q, name) for q in quantized], 1)  # noqa: E731
        return cls(stack("ids"), stack("weights"), stack("embedding"), stack("logits"),
                   torch.stack([q.aux for q in quantized]).mean(), *rest)


class Descriptor(nn.Module):
    """D_S: an autoregressive decoder with cross-attention to the teacher's tokens (3.1)."""

    attends_to_cls = True

    def __init__(self, width, depth, heads, length, own=False):
        super().__init__()
        self.length, self.own, self.attends_to_cls = length, own, self.attends_to_cls and not own
        self.start = nn.Parameter(torch.randn(width) * discretize.EMBEDDING_STD)
        self.position = nn.Parameter(torch.randn(length, width) * discretize.EMBEDDING_STD)
        self.blocks = nn.ModuleList(Block(width, heads, not own) for _ in range(depth))
        self.place_attention = place.PlaceAttention(width) if own else None
        # BatchNorm, one per position, and not LayerNorm (our choice): it removes what images have
        # in common, which would decide the symbol: README's differences have the measured runs.
        self.norms = nn.ModuleList(
            distributed.BatchNorm(width, affine=False) for _ in range(length))

    def start_state(self, z_t):
        """z_t (B, N+1, d) -> the state between positions: the tokens, each block's keys and values
        of the positions so far, and the maps of the deepest cross-attention."""
        tokens = z_t if self.attends_to_cls else z_t[:, 1:]
        if self.own:
            tokens = self.place_attention.start_state(tokens)
        elif torch.is_autocast_enabled(z_t.device.type):    # once, and not in every product
            tokens = tokens.to(torch.get_autocast_dtype(z_t.device.type))
        return {"tokens": tokens, "kv_cache": [None] * len(self.blocks), "maps": []}

    def step(self, x, t, state):
        """The embedding x (B, d) of the symbol before -> the decoder's output (B, d) at t."""
        x = (x + self.position[t])[:, None]                                     # (B, 1, d)
        for i, block in enumerate(self.blocks):
            x, state["kv_cache"][i], maps = block.decode(x, state["tokens"], state["kv_cache"][i])
        if self.own:
            x, maps = self.place_attention(x, state["tokens"])
        state["maps"].append(maps)
        return self.norms[t](x[:, 0].float())

    def attention_maps(self, state):
        """-> (B, T, N): the deepest block's cross-attention of each symbol to the patches (paper,
        Figure 1), mean over heads. The CLS has no position in the image: its share is left out."""
        maps = torch.cat(state["maps"], 1).float().mean(2)
        if self.attends_to_cls:
            maps = maps[..., 1:] / maps[..., 1:].sum(-1, keepdim=True)
        return maps

    def forward(self, z_t, disc, hard=False, attention=False):
        """z_t (B, N+1, d) -> Sequence. The symbol's embedding is the next input."""
        state, quantized = self.start_state(z_t), []
        x = self.start.expand(len(z_t), -1)                                     # (B, d)
        for t in range(self.length):
            quantized.append(disc(self.step(x, t, state), hard))
            x = quantized[-1].embedding
        return Sequence.stack(quantized, self.attention_maps(state) if attention else None)


class Interpreter(nn.Module):
    """E_S: encodes the prefixes of 1, 2, 4, ... T symbols; z_s^(n) is its CLS output (3.2).

    All prefixes lie side by side in one sequence, [CLS s1][CLS s1 s2][CLS s1 ... s4] ..., and a
    block-diagonal mask keeps them apart: one pass instead of four, the same numbers."""

    def __init__(self, width, depth, heads, length):
        super().__init__()
        self.lengths = [2**j for j in range(length.bit_length())]
        self.cls = nn.Parameter(torch.randn(1, 1, width) * discretize.EMBEDDING_STD)
        self.position = nn.Parameter(torch.randn(length, width) * discretize.EMBEDDING_STD)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, width)
        prefix = torch.cat([torch.full((n + 1,), n) for n in self.lengths])
        packed = torch.cat([torch.arange(n + 1) for n in self.lengths])
        self.register_buffer("packed", packed, persistent=False)
        self.cls_positions = [n - 1 + j for j, n in enumerate(self.lengths)]
        self.register_buffer("mask", prefix[:, None] == prefix[None, :], persistent=False)

    def forward(self, embeddings):
        """(B, T, d) -> (B, D, d), one row per prefix."""
        x = torch.cat([self.cls.expand(len(embeddings), -1, -1), embeddings + self.position], 1)
        x = x[:, self.packed]                                                   # (B, 2T - 1 + D, d)
        for block in self.blocks[:-1]:
            x = block(x, self.mask)
        x = self.blocks[-1](x, self.mask, self.cls_positions)                   # (B, D, d)
        return self.out(self.norm(x))


class Student(nn.Module):
    """Descriptor, discretizer, interpreter and projector of the paper, for a teacher of `width`.
    args: train.py's flags. Recipes subclass this; any nn.Parameter is trained and saved."""

    descriptor_class = Descriptor
    defaults = {}                           # of flags, where they are not those of train.py

    @staticmethod
    def add_flags(add):
        """The paper has no further flags."""

    def __init__(self, args, width):
        """Raises ValueError for sizes that do not fit."""
        super().__init__()
        self.descriptor = self.descriptor_class(width, *args.descriptor, args.length,
                                                args.attention == "own")
        self.interpreter = Interpreter(width, *args.interpreter, args.length)
        for module in (*self.descriptor.modules(), *self.interpreter.modules()):
            # Our choice, because PyTorch's default shrinks the variance to a third in each layer
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.disc = self.build_discretizer(args, width)
        self.projector, self.teacher_projector = self.build_projectors(args, width)
        self.lengths = self.interpreter.lengths

    def build_discretizer(self, args, width):
        return discretize.build(args, width)

    def build_projectors(self, args, width):
        """P_S, and P_T = its EMA (losses.ema_update moves it)."""
        projector = DINOHead(width, args.prototypes, args.hidden)
        return projector, copy.deepcopy(projector).requires_grad_(False)

    def fit(self, first_tokens):
        """Called once before step 1. first_tokens(n, augmented=False) yields z_t (b, N+1, d) of the
        first n training images."""

    def slow_parameters(self):
        """Parameters that learn at --codebook-lr times the learning rate; here none."""
        return []

    def preprocess(self, z_t):
        """The teacher's tokens (B, N+1, d) as the student gets them: as they are."""
        return z_t

    def describe(self, z_t, hard=False, attention=False):
        """D_S and discretizer: z_t (B, N+1, d) -> Sequence. hard: argmax; attention: also maps."""
        return self.descriptor(z_t, self.disc, hard, attention)

    def interpret(self, embeddings):
        """z_s^(n) = E_S(s_q^[n]): embeddings (B, T, d) of a Sequence -> (B, D, d)."""
        return self.interpreter(embeddings)

    def embed(self, ids):
        """Symbols (B, T) int64 -> their embeddings (B, T, d), from ids alone."""
        return self.disc.codebook[ids]

    def extra_loss(self, sequence, z_s, z_t):
        """What a recipe adds to the paper's loss: nothing."""
        return z_s.new_zeros(())


def main():
    """The shapes of one batch on its way through the paper's system, at a small size."""
    torch.manual_seed(0)
    student = Student(argparse.Namespace(
        disc="softmax", vocab=128, tau=None, tau_start=None, straight_through=False, length=8,
        descriptor=(2, 4), interpreter=(2, 4), prototypes=1024, hidden=512, views=1,
        attention="free"), 128)
    z_t = torch.randn(16, 65, 128)
    sequence = student.describe(z_t, attention=True)
    z_s = student.interpret(sequence.embeddings)
    for symbol, what, value in (
            ("z_t = E_T(x)", "teacher's tokens, CLS first", z_t),
            ("P_T(z_t[CLS])", "logits of P prototypes", student.teacher_projector(z_t[:, 0])),
            ("s_s / tau, s_s = D_S(z_t)", "logits of K symbols at T positions", sequence.logits),
            ("s_q = softmax(s_s / tau)", "weights of the K symbols", sequence.weights),
            ("", "symbols (argmax)", sequence.ids),
            ("", "attention maps over N patches", sequence.attention),
            ("z_s^(n) = E_S(s_q^[n])", "for prefixes n = 1, 2, 4, 8", z_s),
            ("P_S(z_s^(n))", "logits of P prototypes", student.projector(z_s))):
        print(f"{symbol:25} {what:36} {tuple(value.shape)}")


if __name__ == "__main__":
    main()
