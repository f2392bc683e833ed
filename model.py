"""The networks, in the order in which a picture goes through them (paper, section 3.1).

    x --E_T--> z_t --D_S--> s --discretizer--> symbols --E_S--> z_s --P_S--> p_s
    picture    tokens       decoder            1 … T           encoder      prototypes

Teacher (E_T): a frozen torchvision ViT with DINO weights. Student: descriptor (D_S), discretizer,
interpreter (E_S) and projector (P_S). P_T, the teacher's projector, is the EMA of P_S.
"""
import argparse
import contextlib
import copy
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

import discretize
import distributed

WEIGHTS = Path(__file__).parent / "weights"


def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(c)) v: (..., L, c), (..., S, c) twice -> (..., L, c); mask (L, S),
    True where asking is allowed. On a CPU in plain products: at our lengths (197 tokens and fewer)
    faster than all of PyTorch's kernels there (measured in bf16)."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, mask)
    k = k.contiguous()                              # or matmul makes its own copy, a slower one
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v


def to_autocast(x):
    """x in autocast's precision, for what is used many times and would be cast at each."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


# --------------------------------------------------------------------------------- teacher E_T, P_T

class Teacher(nn.Module):
    """A torchvision ViT that returns all its tokens: x (B, 3, H, W) normalised -> (B,
    N+1, d), CLS first.

    Any H and W that the patch size divides: the position embedding is interpolated, as DINO does.
    """

    def __init__(self, vit):
        super().__init__()
        self.vit = vit
        self.width, self.patch = vit.hidden_dim, vit.patch_size
        self.image_size = vit.image_size

    def positions(self, h, w):
        """Position embedding for a grid of h x w patches: (1, 1 + h*w, d)."""
        table = self.vit.encoder.pos_embedding
        side = self.image_size // self.patch
        if (h, w) == (side, side):
            return table
        grid = table[:, 1:].transpose(1, 2).unflatten(2, (side, side)).float()
        grid = F.interpolate(grid, (h, w), mode="bicubic", align_corners=False)
        return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], 1)

    def forward(self, x):
        x = self.vit.conv_proj(x)                                               # (B, d, h, w)
        positions = self.positions(*x.shape[-2:])
        x = x.flatten(2).transpose(1, 2)                                        # (B, N, d)
        x = torch.cat([self.vit.class_token.expand(len(x), -1, -1), x], 1) + positions
        for block in self.vit.encoder.layers:       # its own forward takes slower attention
            x = x + self.attention(block.self_attention, block.ln_1(x))
            x = x + block.mlp(block.ln_2(x))
        return self.vit.encoder.ln(x)                                           # (B, N+1, d)

    @staticmethod
    def attention(layer, x):
        """layer, a torch.nn.MultiheadAttention, on x (B, L, d), which asks itself."""
        qkv = F.linear(x, layer.in_proj_weight, layer.in_proj_bias)
        # (B, L, 3d) -> three of (B, heads, L, c)
        q, k, v = qkv.unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return layer.out_proj(attend(q, k, v).transpose(1, 2).flatten(2))


def small_vit(image_size, patch, width, depth, heads, stem=()):
    """A torchvision ViT of any size (without its classifier), randomly initialised as DINO does.
    stem: channels of 3x3 convolutions in front (Xiao et al. 2021); each that changes their number
    has stride 2. Raises ValueError when they do not make the patch."""
    strides = [1 + (channels != before) for before, channels in zip([3, *stem], stem)]
    if stem and math.prod(strides) != patch:
        raise ValueError(f"a stem of {list(stem)} channels makes patches of {math.prod(strides)} "
                         f"pixels, not {patch}")
    convolutions = [ConvStemConfig(channels, 3, stride, distributed.BatchNorm)
                    for channels, stride in zip(stem, strides)] or None
    vit = VisionTransformer(image_size, patch, depth, heads, width, 4 * width,
                            conv_stem_configs=convolutions)
    vit.heads = nn.Identity()
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.MultiheadAttention):
            nn.init.trunc_normal_(module.in_proj_weight, std=0.02)
    nn.init.trunc_normal_(vit.class_token, std=0.02)
    return Teacher(vit)


class DINOHead(nn.Module):
    """Projector P: 3-layer MLP with GELU, bottleneck, L2-normalise, cosine to P prototypes
    (DINO's weight-normalised last layer with its gain fixed at 1). (..., d) -> (..., P),
    values in [-1, 1]."""

    def __init__(self, width, prototypes, hidden=2048, bottleneck=256, batch_norm=False):
        super().__init__()
        norm = distributed.BatchNorm if batch_norm else (lambda width: nn.Identity())
        self.mlp = nn.Sequential(nn.Linear(width, hidden), norm(hidden), nn.GELU(),
                                 nn.Linear(hidden, hidden), norm(hidden), nn.GELU(),
                                 nn.Linear(hidden, bottleneck))
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        for p in self.parameters():
            # Xavier, not DINO's 0.02: our student starts from a random encoder of narrow width, and
            # with 0.02 everything it sees lands on one prototype.
            nn.init.xavier_uniform_(p) if p.ndim > 1 else None
        nn.init.normal_(self.prototypes)

    def forward(self, x):
        x = self.mlp(x)
        # Cosines are divided by temperatures of 0.02 to 0.1 later: bf16's three digits
        # would not do.
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(F.normalize(x.float(), dim=-1),
                            F.normalize(self.prototypes.float(), dim=-1))


# ------------------------------------------------------------- student: D_S, discretizer, E_S, P_S

# Standard deviation of the start token, the CLS and the positions at initialisation: that of the
# symbol embeddings (discretize.TABLE_STD), so that neither drowns the other.
START_STD = 0.3


class Attention(nn.Module):
    """Multi-head attention whose keys and values are computed apart from the queries, so that the
    decoder can keep them (a KV cache)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_kv, self.out = (nn.Linear(width, n * width) for n in (1, 2, 1))

    def split(self, x):
        """(B, L, d) -> (B, heads, L, d/heads)"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, x):
        """x (B, L, d) -> keys and values, (B, heads, L, d/heads) each."""
        return [self.split(part) for part in self.to_kv(x).chunk(2, -1)]

    def forward(self, x, keys, values, mask=None):
        """Queries x (B, L, d) -> (B, L, d); mask (L, S), True where attention is allowed."""
        y = attend(self.split(self.to_q(x)), keys, values, mask)
        return self.out(y.transpose(1, 2).flatten(2))


class CrossAttention(Attention):
    """Attention of one query per image to tokens without gradient; no keys or values are made."""

    def forward(self, x, tokens, type_embedding=None):
        to_k, to_v = to_autocast(self.to_kv.weight).unflatten(0, (2, self.heads, -1)).unbind()
        q = self.split(self.to_q(x))[:, :, 0] * to_k.shape[1] ** -0.5           # (B, heads, c)
        asked = torch.einsum("bhc,hcd->bhd", q, to_k)
        scores = asked @ tokens.transpose(1, 2)
        if type_embedding is not None:
            of_cls = torch.einsum("bhd,d->bh", asked, type_embedding)[..., None]
            scores = scores + F.pad(of_cls, (0, tokens.shape[1] - 1))
        weights = scores.softmax(-1)                                            # (B, heads, S)
        seen = weights @ tokens
        if type_embedding is not None:
            seen = seen + weights[..., :1] * type_embedding
        y = torch.einsum("bhd,hcd->bhc", seen, to_v).flatten(1) + self.to_kv.bias.chunk(2)[1]
        return self.out(y)[:, None], weights


class Block(nn.Module):
    """Pre-norm transformer block; with cross=True it also attends to the teacher's tokens."""

    def __init__(self, width, heads, cross=False):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        if cross:
            self.norm_cross, self.cross = nn.LayerNorm(width), CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(),
                                 nn.Linear(4 * width, width))

    def forward(self, x, memory=None, kv_cache=None, mask=None, queries=None):
        h, weights = self.norm1(x), None
        kv = self.attention.keys_values(h)
        if queries is not None:
            x, h, mask = x[:, queries], h[:, queries], mask[queries]
        if kv_cache is not None:
            kv = [torch.cat(pair, 2) for pair in zip(kv_cache, kv)]
        x = x + self.attention(h, *kv, mask)
        if memory is not None:
            attended, weights = self.cross(self.norm_cross(x), *memory)
            x = x + attended
        return x + self.mlp(self.norm2(x)), kv, weights


class Sequence(NamedTuple):
    """What the descriptor emits for B images."""
    ids: torch.Tensor               # (B, T) int64 symbols
    weights: torch.Tensor           # (B, T, K) soft or hard choice
    embeddings: torch.Tensor        # (B, T, d)
    logits: torch.Tensor            # (B, T, K)
    aux: torch.Tensor               # () the discretizer's own loss, mean over positions
    attention: torch.Tensor | None = None   # (B, T, N) over the patches, rows sum to 1
    cls_pred: torch.Tensor | None = None    # (B, T, d) of the recipe `stable`
    codewords: torch.Tensor | None = None   # (B, T, d) of the recipe `stable`: sums so far


class DecoderState:
    """What the descriptor keeps between positions: the memory, keys and values of the positions so
    far, and the deepest layer's attention maps."""

    def __init__(self, memories):
        self.memories, self.kv_caches, self.maps = memories, [None] * len(memories), []


class Descriptor(nn.Module):
    """D_S: emits T symbols, one after the other (paper, section 3.1)."""

    sees_cls = True

    def __init__(self, width, depth, heads, length):
        super().__init__()
        self.length = length
        self.start = nn.Parameter(torch.randn(1, 1, width) * START_STD)
        self.position = nn.Parameter(torch.randn(length, width) * START_STD)
        self.type_embedding = nn.Parameter(torch.randn(width)) if self.sees_cls else None
        self.blocks = nn.ModuleList(Block(width, heads, cross=True) for _ in range(depth))
        self.norms = nn.ModuleList(
            distributed.BatchNorm(width, affine=False) for _ in range(length))

    def start_state(self, z_t):
        memory = ((to_autocast(z_t), to_autocast(self.type_embedding)) if self.sees_cls
                  else (to_autocast(z_t[:, 1:]), None))
        return DecoderState([memory] * len(self.blocks))

    def step(self, x, t, state):
        """x (B, d) with its position -> the decoder's output (B, d) at position t."""
        x = x[:, None]                                                          # (B, 1, d)
        for i, block in enumerate(self.blocks):
            x, state.kv_caches[i], weights = block(x, state.memories[i], state.kv_caches[i])
        state.maps.append(weights.float().mean(1))
        return self.norms[t](x[:, 0].float())

    def attention_maps(self, state):
        """-> (B, T, N)"""
        maps = torch.stack(state.maps, 1)                                       # (B, T, N + 1 or N)
        if self.sees_cls:
            maps = maps[..., 1:] / maps[..., 1:].sum(-1, keepdim=True)
        return maps

    def forward(self, z_t, disc, hard=False, attention=False):
        """z_t (B, N+1, d) -> Sequence."""
        state, emitted = self.start_state(z_t), []
        x = self.start[:, 0].expand(len(z_t), -1)                               # (B, d)
        for t in range(self.length):
            h = self.step(x + self.position[t], t, state)
            emitted.append(disc(h, hard))
            x = emitted[-1].embedding
        return self.sequence(emitted, state, attention)

    def sequence(self, emitted, state, attention, **more):
        stack = lambda name: torch.stack([getattr(q, name) for q in emitted], 1)  # noqa: E731
        return Sequence(stack("ids"), stack("weights"), stack("embedding"), stack("logits"),
                        torch.stack([q.aux for q in emitted]).mean(),
                        self.attention_maps(state) if attention else None, **more)


class Interpreter(nn.Module):
    """E_S"""

    def __init__(self, width, depth, heads, length):
        super().__init__()
        self.lengths = [2**j for j in range(length.bit_length())]
        self.cls = nn.Parameter(torch.randn(1, 1, width) * START_STD)
        self.position = nn.Parameter(torch.randn(length, width) * START_STD)
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
            x, *_ = block(x, mask=self.mask)
        x, *_ = self.blocks[-1](x, mask=self.mask, queries=self.cls_positions)  # (B, D, d)
        return self.out(self.norm(x))


class Student(nn.Module):
    """Descriptor, discretizer, interpreter and projector."""

    descriptor_class = Descriptor

    def __init__(self, args, width, projector):
        super().__init__()
        length = args.length
        disc = discretize.build(args.disc, width, args.vocab, args)
        self.descriptor = self.descriptor_class(width, args.descriptor_depth, args.descriptor_heads, length)
        self.interpreter = Interpreter(width, args.interpreter_depth, args.interpreter_heads, length)
        for module in (*self.descriptor.modules(), *self.interpreter.modules()):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.disc, self.projector = disc, projector
        self.lengths = self.interpreter.lengths

    @staticmethod
    def build_projectors(args, width):
        projector = DINOHead(width, args.prototypes, args.hidden, args.bottleneck)
        return projector, copy.deepcopy(projector).requires_grad_(False)

    def fit(self, teacher, images, augment, args):
        pass

    def preprocess(self, z_t):
        return z_t

    def describe(self, z_t, hard=False, attention=False):
        return self.descriptor(z_t, self.disc, hard, attention)

    def interpret(self, sequence):
        return self.interpreter(sequence.embeddings)

    def extra_loss(self, sequence, z_s, z_t):
        return 0.0
