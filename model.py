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


def lowered(x):
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


# The names of DINO's parameters, old -> new; everything else in a DINO file is its projection head.
DINO_NAMES = [
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^norm\.", "encoder.ln."),
    (r"^blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj\.", ".self_attention.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
]


def dino_to_torchvision(state_dict):
    """The official DINO ViT's state dict (or one in torchvision's names already) -> torchvision's
    names.

    Also takes what DINO's training saves: the `teacher` entry, `module.` and `backbone.` prefixes,
    and the projection head, which is dropped. Raises ValueError when no ViT is found in it."""
    state = state_dict["teacher"] if isinstance(state_dict.get("teacher"), dict) else state_dict
    new = {}
    for name, value in state.items():
        name = re.sub(r"^(module\.|backbone\.)+", "", name)
        if name.startswith(("head.", "heads.")):
            continue
        for old, replacement in DINO_NAMES:
            name = re.sub(old, replacement, name)
        new[name] = value
    if not {"class_token", "encoder.pos_embedding", "encoder.ln.weight"} <= new.keys():
        raise ValueError("no vision transformer in it: neither DINO's nor torchvision's names")
    return new


def teacher_from_state(state):
    """torchvision-named ViT weights -> frozen Teacher in float32. The sizes are read off the
    shapes; there are 64 channels to a head in every DINO model, and in ours."""
    side = round((state["encoder.pos_embedding"].shape[1] - 1) ** 0.5)
    width = state["class_token"].shape[-1]
    depth = sum(name.endswith(".ln_1.weight") for name in state)
    stem = [len(value) for name, value in state.items()
            if re.fullmatch(r"conv_proj\.conv_bn_relu_\d+\.0\.weight", name)]
    if stem:
        patch = 2 ** (1 + sum(a != b for a, b in zip(stem, stem[1:])))
    else:
        patch = state["conv_proj.weight"].shape[-1]
    teacher = small_vit(side * patch, patch, width, depth, max(1, width // 64), stem)
    try:
        teacher.vit.load_state_dict(state)
    except RuntimeError as error:
        missing = str(error).splitlines()[1].strip()
        raise ValueError(f"its vision transformer is incomplete: {missing}") from None
    return teacher.eval().requires_grad_(False)


DINO_URL = "https://dl.fbaipublicfiles.com/dino/dino_{0}_pretrain/dino_{0}_pretrain.pth"
HUB = {"dino_vitb16": "vitbase16", "dino_vitb8": "vitbase8",                  # width 768, 12 blocks
       "dino_vits16": "deitsmall16", "dino_vits8": "deitsmall8"}              # width 384, 12 blocks


def read_weights(path):
    """torch.load without running any code from the file. Raises FileNotFoundError or ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):         # DINO stores its flags
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:           # truncated, foreign or hostile: torch raises a dozen kinds
        raise ValueError(f"{path} is damaged or no PyTorch checkpoint "
                         f"({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a dictionary of weights")
    return state


def read_teacher(path):
    """DINO's or our own weights -> frozen Teacher. Raises OSError or ValueError naming the file."""
    state = read_weights(path)
    try:
        return teacher_from_state(dino_to_torchvision(state))
    except Exception as error:                      # wrong names, types, shapes: each another kind
        raise ValueError(f"{path} is no teacher: {' '.join(str(error).split())[:200]}") from None


def hub_teacher(name):
    """The teacher `name` of HUB, downloaded once to where torch.hub keeps its files. DINO publishes
    no hash to check, and torch.hub takes a cut connection for the file's end: a new file is kept
    only after it was read. Raises OSError for a download, ValueError for a file kept earlier."""
    url = DINO_URL.format(HUB[name])
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if path.is_file():
        try:
            return read_teacher(path)
        except ValueError as error:
            raise ValueError(f"{error}; delete it, and the next run downloads it again") from None
    part = Path(f"{path}.{os.getpid()}.tmp")        # two runs at a time do not meet
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(part))
        teacher = read_teacher(part)
        os.replace(part, path)
        return teacher
    except Exception as error:                      # no network, no page, half a file, no space
        raise OSError(f"cannot get the weights of {name} from {url} ({error}); nothing is kept. "
                      "Try again, or download it elsewhere and pass --teacher FILE, or use "
                      "--random-teacher to try the sizes") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def build_teacher(name, random_weights=False):
    """The frozen teacher `name`: one of HUB (downloaded once), a name in weights/, or a file with
    DINO's or our own weights. random_weights: the architecture of a HUB name, untrained, to try
    sizes without a network. Raises ValueError or OSError with what to do."""
    if random_weights:
        if name not in HUB:
            raise ValueError(f"--random-teacher needs one of {', '.join(HUB)} as --teacher, "
                             f"not {name!r}")
        width = 768 if "vitb" in name else 384
        return small_vit(224, int(name[9:]), width, 12, width // 64).eval().requires_grad_(False)
    if name in HUB:
        return hub_teacher(name)
    shipped = WEIGHTS / f"{name}.pt"
    if not shipped.is_file() and not Path(name).is_file():
        known = sorted(f.stem for f in WEIGHTS.glob("*.pt"))
        raise FileNotFoundError(f"no teacher {name!r}: give a file, or one of "
                                f"{', '.join([*HUB, *known])}")
    return read_teacher(shipped if shipped.is_file() else name)


# ------------------------------------------------------------- student: D_S, discretizer, E_S, P_S

# Of start token, CLS and positions: as the symbols' embeddings, so that neither drowns the other
START_STD = 0.3


class Attention(nn.Module):
    """Multi-head attention whose keys and values are made apart from the queries: to be kept."""

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
        """x (B, L, d) asks; mask (L, S), True where asking is allowed."""
        y = attend(self.split(self.to_q(x)), keys, values, mask)
        return self.out(y.transpose(1, 2).flatten(2))


class Look(Attention):
    """Attention of one query per picture to tokens without gradient; no keys or values are made.

    <q, W_k x> = <W_k^T q, x>, and the mean of W_v x is W_v times the mean of x: the question goes
    to the tokens, instead of N+1 tokens to keys and values. The same numbers; less work as long as
    T questions cost less than N+1 keys, and backward makes nothing of the tokens' size. The keys'
    bias adds the same to all scores of a question, which softmax takes away again."""

    def carriers(self):
        """W_k and W_v, (heads, c, d) each, cast once for all T questions."""
        return lowered(self.to_kv.weight).unflatten(0, (2, self.heads, -1)).unbind()

    def forward(self, x, carriers, tokens, mark):
        """x (B, 1, d) asks tokens (B, S, d), the first of them seen as tokens[:, 0] + mark (d,);
        None: as it is. Returns what is seen, (B, 1, d), and the weights (B, heads, S), whose
        rows sum to 1."""
        to_k, to_v = carriers
        q = self.split(self.to_q(x))[:, :, 0] * to_k.shape[1] ** -0.5           # (B, heads, c)
        asked = torch.einsum("bhc,hcd->bhd", q, to_k)
        scores = asked @ tokens.transpose(1, 2)
        if mark is not None:
            of_mark = torch.einsum("bhd,d->bh", asked, mark)[..., None]     # for the first score
            scores = scores + F.pad(of_mark, (0, tokens.shape[1] - 1))
        weights = scores.softmax(-1)                                            # (B, heads, S)
        seen = weights @ tokens if mark is None else weights @ tokens + weights[..., :1] * mark
        y = torch.einsum("bhd,hcd->bhc", seen, to_v).flatten(1) + self.to_kv.bias.chunk(2)[1]
        return self.out(y)[:, None], weights


class Block(nn.Module):
    """Pre-norm transformer block; with cross=True it also looks at the teacher's tokens."""

    def __init__(self, width, heads, cross=False):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        if cross:
            self.norm_cross, self.cross = nn.LayerNorm(width), Look(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(),
                                 nn.Linear(4 * width, width))

    def forward(self, x, context=None, past=None, mask=None, only=None):
        """x (B, L, d); context: what `Look` is given, L is 1 then; past: keys and values of earlier
        positions; only: positions that are wanted, others are seen but not computed. Returns x,
        keys and values of all positions so far, and the look's weights."""
        h, weights = self.norm1(x), None
        kept = self.attention.keys_values(h)
        if only is not None:
            x, h, mask = x[:, only], h[:, only], mask[only]
        if past is not None:
            kept = [torch.cat(pair, 2) for pair in zip(past, kept)]
        x = x + self.attention(h, *kept, mask)
        if context is not None:
            seen, weights = self.cross(self.norm_cross(x), *context)
            x = x + seen
        return x + self.mlp(self.norm2(x)), kept, weights


class Description(NamedTuple):
    """What the student says about B pictures."""
    ids: torch.Tensor               # (B, T) int64 symbols
    weights: torch.Tensor           # (B, T, K) soft or hard choice
    embeddings: torch.Tensor        # (B, T, d)
    logits: torch.Tensor            # (B, T, K)
    gists: torch.Tensor             # (B, T, d) the CLS as imagined at each; zeros without Draft
    drafts: torch.Tensor            # (B, T, d) a linear reading up to each; zeros without Draft
    aux: torch.Tensor               # () the discretizer's own loss, mean over positions
    attention: torch.Tensor | None  # (B, T, N) over the patches, rows sum to 1


def ordered_like(meant, centres):
    """centres (K, d) in the order in which each has a large cosine with the row of meant (K, d)
    beside it: greedily, the most similar pair first."""
    cosine = F.normalize(meant, dim=1) @ F.normalize(centres, dim=1).T          # (K, K)
    order = torch.empty(len(centres), dtype=torch.long)
    for _ in range(len(centres)):
        k, best = divmod(cosine.argmax().item(), len(centres))
        order[k] = best
        cosine[k], cosine[:, best] = -2, -2                                     # both are taken
    return centres[order.to(centres.device)]


class Draft(nn.Module):
    """A first, linear reading of the symbols so far, and what it makes of the next one. Our
    addition, after residual quantisation: c_tk in the student's space is what symbol k stands
    for at place t,

        draft_t = c_1,s1 + ... + c_t,st        bid_tk = -|gist_t - draft_(t-1) - c_tk|^2 / unit_t

    gist_t is the CLS as the descriptor imagines it when it says symbol t: it sees the patches
    alone, and learns to tell the CLS from them (losses.regression_loss). So a symbol is about
    what those before it left unsaid, and the language is residual k-means (`fit`) as far as
    patches tell the CLS.

    With axes > 0 what the first symbol leaves is told in axes of its own: pictures that differ
    from their kind do so in other directions in each kind. The same bits tell more, and later
    symbols mean nothing without the first."""

    def __init__(self, width, length, vocab, axes=0):
        super().__init__()
        self.register_buffer("basis", torch.zeros(width, axes))     # the directions of the space
        self.register_buffer("axes", torch.zeros(vocab, axes, axes))    # of each first symbol
        # c_tk; fixed: learning on augmented views would move them away from pictures as they are
        self.register_buffer("centres", torch.randn(length, vocab, width))
        self.register_buffer("unit", torch.ones(length))
        self.gist = nn.Linear(width, width)
        self.show = nn.Linear(width, width)

    @torch.no_grad()
    def fit(self, cls, near, local=0):
        """Residual k-means of CLS in the student's space, (n, d). The first symbols are centres of
        pictures half on their way to what is near them, (n, d): of kinds, more than of single
        pictures. A unit is one deviation of the squared distances: bids have deviation 1 at every
        place, however little is left. A symbol points the same way at all places, as far as
        possible: so it is one word, and not T words. local: pictures that a first symbol's axes
        are fitted to."""
        meant, left = 0, cls
        for t, centres in enumerate(self.centres):
            fitted = discretize.kmeans(left if t else (cls + near) / 2, len(centres), 25)
            centres.copy_(ordered_like(meant, fitted) if t else fitted)
            meant = meant + F.normalize(centres, dim=1)
            distance = torch.cdist(left, centres)                               # (n, K)
            self.unit[t] = distance.square().std()
            symbols = distance.argmin(1)
            left = left - centres[symbols]
            if t == 0 and self.axes.numel():
                self.fit_axes(cls, left, local)
                left = self.turn(left, symbols)
        self.unit.clamp_(min=0.001 * self.unit[0].item() + 1e-6)    # few pictures leave nothing

    def fit_axes(self, cls, left, local):
        """Each first symbol's axes: principal ones of what is left (n, d) of so many pictures (n,
        d), those nearest to its centre, so that one code book serves all. Each axis points to
        where it is skewed: its two signs are not the same to a code book."""
        count = self.basis.shape[1]
        self.basis.copy_(torch.linalg.eigh(torch.cov(cls.T)).eigenvectors[:, -count:])
        left = left @ self.basis
        for centre, axes in zip(self.centres[0], self.axes):
            nearest = (cls - centre).square().sum(1).topk(min(local, len(cls)), largest=False)
            x = left[nearest.indices]
            principal = torch.linalg.eigh(x.T @ x).eigenvectors                 # loudest: last
            axes.copy_(principal * torch.where((x @ principal).pow(3).sum(0) < 0, -1, 1))

    def turn(self, x, first, back=False):
        """x (B, d) or (B, L, d) -> the same in the axes of the first symbols (B,), or back."""
        if not self.axes.numel():
            return x
        axes = self.axes[first]                                                 # (B, r, r)
        with torch.autocast(x.device.type, enabled=False):
            y = x.float().reshape(len(x), -1, x.shape[-1]) @ self.basis         # (B, L, r)
            return (y @ (axes.mT if back else axes) @ self.basis.T).view_as(x)

    def bids(self, left, t, first):
        """left (B, d) to be said at place t, after the symbols (B,) at place 0 -> (B, K), up to
        what is the same for all symbols."""
        centres, left = self.centres[t], self.turn(left, first) if t else left
        with torch.autocast(left.device.type, enabled=False):
            return (2 * left.float() @ centres.T - centres.square().sum(1)) / self.unit[t]

    def word(self, weights, t, first):
        """What the symbol at place t, (B, K), adds after the symbols (B,) at place 0."""
        with torch.autocast(weights.device.type, enabled=False):
            added = weights.float() @ self.centres[t]
        return self.turn(added, first, back=True) if t else added

    def forward(self, symbols):
        """(B, T) int64 -> (B, T, d), the draft after each symbol."""
        words = self.centres[torch.arange(symbols.shape[1]), symbols]
        later = self.turn(words[:, 1:], symbols[:, 0], back=True)
        return torch.cat([words[:, :1], later], 1).cumsum(1)


class Descriptor(nn.Module):
    """D_S: says T symbols about the teacher's tokens, one after the other (paper, section 3.1)."""

    def __init__(self, width, depth, heads, length, see_cls):
        super().__init__()
        self.length = length
        self.start = nn.Parameter(torch.randn(1, 1, width) * START_STD)
        self.position = nn.Parameter(torch.randn(length, width) * START_STD)
        # Standardised tokens look alike; the CLS, which knows most, is given a mark to be found by.
        self.cls_mark = nn.Parameter(torch.randn(width)) if see_cls else None
        self.blocks = nn.ModuleList(Block(width, heads, cross=True) for _ in range(depth))
        # BatchNorm, one per position, and not LayerNorm (our choice): it takes away what all
        # pictures have in common, which otherwise decides the symbol, the same for every picture
        # and every position.
        self.norms = nn.ModuleList(
            distributed.BatchNorm(width, affine=False) for _ in range(length))

    def forward(self, tokens, disc, draft=None, hard=False, attention=False):
        """tokens (B, N+1, d) -> Description. The embedding of each symbol *after*
        discretisation is the next input, in training and in evaluation alike (our choice: no
        teacher forcing exists here)."""
        gist, read, bids = torch.zeros_like(tokens[:, 0]), torch.zeros_like(tokens[:, 0]), None
        seen = ((lowered(tokens[:, 1:]), None) if draft
                else (lowered(tokens), lowered(self.cls_mark)))
        contexts = [(block.cross.carriers(), *seen) for block in self.blocks]
        pasts, said, looked, gists, drafts = [None] * len(self.blocks), [], [], [], []
        embedding = self.start[:, 0].expand(len(tokens), -1)                    # (B, d)
        for t in range(self.length):
            x = embedding + self.position[t]
            if draft is not None:
                x = x + draft.show(gist - read)     # what is left to say
            x = x[:, None]                                                      # (B, 1, d)
            for i, block in enumerate(self.blocks):
                x, pasts[i], weights = block(x, contexts[i], pasts[i])
            h = self.norms[t](x[:, 0].float())
            if draft is not None:
                gist = draft.gist(h)
                bids = draft.bids(gist - read, t, said[0].ids if t else None)
            said.append(disc(h, hard, bids))
            embedding = said[-1].embedding
            if draft is not None:
                read = read + draft.word(said[-1].weights, t, said[0].ids)
            gists.append(gist)
            drafts.append(read)
            looked.append(weights.float().mean(1) if attention else None)   # of the deepest layer
        if attention:
            looked = torch.stack(looked, 1)                                     # (B, T, N + 1 or N)
            if draft is None:       # CLS is no place in the picture: without it, to a sum of 1
                looked = looked[..., 1:] / looked[..., 1:].sum(-1, keepdim=True)
        stack = lambda name: torch.stack([getattr(s, name) for s in said], 1)   # noqa: E731
        return Description(stack("ids"), stack("weights"), stack("embedding"), stack("logits"),
                           torch.stack(gists, 1), torch.stack(drafts, 1),
                           torch.stack([s.aux for s in said]).mean(), looked if attention else None)


class Interpreter(nn.Module):
    """E_S: reads the prefixes of 1, 2, 4, … T symbols back; z_s^(n) is its CLS output (3.2).

    All prefixes lie side by side in one sequence, [CLS s1][CLS s1 s2][CLS s1 … s4] …, and a mask
    keeps them apart: one pass instead of four, the same numbers.
    """

    def __init__(self, width, depth, heads, length):
        super().__init__()
        self.lengths = [2**j for j in range(length.bit_length())]
        self.cls = nn.Parameter(torch.randn(1, 1, width) * START_STD)
        self.position = nn.Parameter(torch.randn(length, width) * START_STD)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, width)
        group = torch.cat([torch.full((n + 1,), n) for n in self.lengths])
        gather = torch.cat([torch.arange(n + 1) for n in self.lengths])
        self.register_buffer("gather", gather, persistent=False)
        self.first = [n - 1 + j for j, n in enumerate(self.lengths)]    # the CLS of each prefix
        self.register_buffer("mask", group[:, None] == group[None, :], persistent=False)

    def forward(self, embeddings):
        """(B, T, d) -> (B, D, d), one row per prefix."""
        x = torch.cat([self.cls.expand(len(embeddings), -1, -1), embeddings + self.position], 1)
        x = x[:, self.gather]                                                   # (B, 2T - 1 + D, d)
        for block in self.blocks[:-1]:
            x, *_ = block(x, mask=self.mask)
        x, *_ = self.blocks[-1](x, mask=self.mask, only=self.first)             # (B, D, d)
        return self.out(self.norm(x))


def neighbour_means(y, neighbours):
    """y (n, d) -> (n, d), the mean of so many others that lie nearest to each."""
    near = (torch.cdist(part, y).topk(neighbours + 1, largest=False).indices
            for part in y.split(500))
    return torch.cat([y[i[:, 1:]].mean(1) for i in near])           # without itself


def whitening(x, ridge):
    """The symmetric matrix that makes the covariance of x (n, d), of mean 0, the same in all
    directions, up to a factor. ridge: share of the largest variance that is added to all."""
    variance, axes = torch.linalg.eigh(x.T @ x / len(x))
    return axes * (variance + ridge * variance.max().clamp(min=1e-12)).rsqrt() @ axes.T


class Student(nn.Module):
    """Descriptor, discretizer, interpreter, projector, and the space where they see the teacher.

    Space (our choice): the CLS token is centred and whitened by its covariance *within*
    pictures, between augmented views, so that a unit is as much as an augmentation moves it, in
    every direction: the student should say what lasts, and a teacher's few loud directions
    would otherwise be all that it says. Then by what tells it from its neighbours
    (`draw_together`), and of all this the loudest directions (`project`). With unit_length all
    CLS are as far from 0 as they are on average: k-NN compares directions, so a symbol spent on a
    length is lost on it. Patch tokens: mean 0 and deviation 1 in each dimension."""

    def __init__(self, width, disc, projector, length=8, descriptor=(6, 8), interpreter=(12, 6),
                 draft=True, axes=0, unit_length=False):
        """descriptor, interpreter: (depth, heads). Raises ValueError for sizes that do not fit."""
        super().__init__()
        if length < 1 or length & (length - 1):
            raise ValueError("--length must be a power of two (prefixes of 1, 2, 4, …), "
                             f"not {length}")
        for name, (_, heads) in (("descriptor", descriptor), ("interpreter", interpreter)):
            if heads < 1 or width % heads:
                raise ValueError(f"--{name}-heads {heads} does not divide the teacher's width "
                                 f"{width}")
        self.unit_length = unit_length
        self.register_buffer("mean", torch.zeros(2, width))                     # of CLS, of patches
        self.register_buffer("std", torch.ones(width))                          # of patches
        self.register_buffer("whiten", torch.eye(width))                        # of CLS
        # With a draft the CLS is what the descriptor has to tell: it would be the answer
        self.descriptor = Descriptor(width, *descriptor, length, see_cls=not draft)
        self.interpreter = Interpreter(width, *interpreter, length)
        for module in (*self.descriptor.modules(), *self.interpreter.modules()):
            # PyTorch's own start is 1.7 times narrower: every picture gets the same symbols
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.draft = Draft(width, length, disc.vocab, axes) if draft else None
        if draft:
            nn.init.zeros_(self.interpreter.out.weight)     # it corrects the draft: silent at first
        self.disc, self.projector = disc, projector
        self.lengths = self.interpreter.lengths

    @torch.no_grad()
    def fit_space(self, cls, patches, ridge=0.01):
        """cls (2, B, d): two views each of B pictures; patches (M, N, d) of some. ridge: share of
        the largest variance within pictures that is added to all (0.001 to 0.1 measured alike)."""
        patches = patches.flatten(0, 1)
        self.mean.copy_(torch.stack([cls.mean((0, 1)), patches.mean(0)]))
        self.std.copy_(patches.std(0).clamp(min=1e-6))
        whiten = whitening(cls[0] - cls[1], ridge)
        size = ((cls - self.mean[0]) @ whiten).square().mean().sqrt()
        self.whiten.copy_(whiten / size.clamp(min=1e-6))

    @torch.no_grad()
    def draw_together(self, y, neighbours, ridge=0.1):
        """Whitens the space once more, by the covariance of what tells pictures from their
        neighbours. y: CLS of pictures as they are, in this space, (n, d) -> the same in the new
        one. What near pictures do not share is not what they are of: it counts less now, and their
        classes lie closer together."""
        return self.transform(y, whitening(y - neighbour_means(y, neighbours), ridge))

    @torch.no_grad()
    def project(self, y, directions):
        """Leaves as many directions of the space as pictures differ most in; y (n, d) and what is
        returned as in `draw_together`. A symbol spent on the others, in which neighbours agree no
        more than others do, would be lost on k-NN; and the patches tell little of them."""
        _, axes = torch.linalg.eigh(torch.cov(self.lengthen(y).T))
        axes = axes[:, -directions:]                                            # largest: last
        return self.transform(y, axes @ axes.T)

    def transform(self, y, change):
        """Space and y (n, d) in it, changed by a matrix (d, d), and to mean square 1 again."""
        change = change / ((y - y.mean(0)) @ change).square().mean().sqrt().clamp(min=1e-6)
        self.whiten.copy_(self.whiten @ change)
        return y @ change

    def whitened(self, cls):
        """The teacher's CLS (..., d), of mean 0 and mean square 1, each of its own length."""
        with torch.autocast(cls.device.type, enabled=False):
            return (cls.float() - self.mean[0]) @ self.whiten

    def lengthen(self, y):
        """Whitened CLS (..., d), as long as the space has them: with unit_length all have mean
        square 1, and not only their mean has."""
        return F.normalize(y, dim=-1) * y.shape[-1] ** 0.5 if self.unit_length else y

    def space(self, tokens):
        """z_t (B, N+1, d) -> the same in the student's space, CLS of mean square 1."""
        cls = self.lengthen(self.whitened(tokens[:, :1]))
        return torch.cat([cls, (tokens[:, 1:].float() - self.mean[1]) / self.std], 1)

    def describe(self, tokens, hard=False, attention=False):
        """z_t (B, N+1, d) -> Description. hard: argmax symbols, as in every reported figure."""
        return self.descriptor(self.space(tokens), self.disc, self.draft, hard, attention)

    def interpret(self, embeddings, drafts):
        """Those of a Description, (B, T, d) each -> z_s (B, D, d)."""
        z_s = self.interpreter(embeddings)
        if self.draft is not None:                  # the interpreter corrects the draft
            z_s = z_s + drafts[:, [n - 1 for n in self.lengths]]
        return z_s

    def read(self, symbols):
        """symbols (B, T) int64 -> z_s (B, D, d): what a receiver of symbols alone can compute."""
        return self.interpret(self.disc.table[symbols], self.draft and self.draft(symbols))


class Anchors(nn.Module):
    """P_S and P_T with prototypes that stay: k-means centres c_k of the teacher's CLS (ours).

    The paper's P_T, an EMA of P_S, forgets whatever the student does not say yet, and the
    target gets easy instead of the student good. These cannot forget. logit k = <z, c_k> /
    mean |c|^2: student and teacher go through the same prototypes, so z_s must come to lie
    where the CLS does."""

    def __init__(self, width, prototypes):
        super().__init__()
        self.register_buffer("centres", torch.zeros(prototypes, width))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def fit(self, cls):
        """k-means of CLS in the student's space (n, d), n at least P; ValueError for fewer."""
        if len(cls) < len(self.centres):
            raise ValueError(f"--prototypes {len(self.centres)} is more than the {len(cls)} "
                             "pictures; lower it")
        self.centres.copy_(discretize.kmeans(cls, len(self.centres)))
        self.scale.copy_(self.centres.square().sum(1).mean().clamp(min=1e-6))

    def forward(self, z):
        """(..., d) -> (..., P)"""
        with torch.autocast(z.device.type, enabled=False):
            return z.float() @ (self.centres / self.scale).T


def build_student(config, width):
    """Student and P_T for a teacher of this width; config: train.py's flags as a dictionary."""
    args = argparse.Namespace(**config)
    if args.prototype_source == "kmeans":           # P_S is P_T, and has no parameters
        projector = head = Anchors(width, args.prototypes)
    else:
        projector = DINOHead(width, args.prototypes, args.hidden, args.bottleneck)
        head = copy.deepcopy(projector).requires_grad_(False)
    disc = discretize.build(args.disc, width, args.vocab, args)
    student = Student(width, disc, projector, args.length,
                      (args.descriptor_depth, args.descriptor_heads),
                      (args.interpreter_depth, args.interpreter_heads), args.draft,
                      min(args.directions, width) if args.local_axes else 0, args.unit_length)
    return student, head


def load_checkpoint(path, device="cpu"):
    """RUN/ckpt.pt of train.py -> (config, teacher, student), both frozen and in eval mode on
    `device`. Raises FileNotFoundError, or ValueError for a damaged or foreign file or one
    that does not fit."""
    state = read_weights(path)
    if not {"config", "teacher", "student"} <= state.keys():
        raise ValueError(f"{path} is no checkpoint of train.py (a teacher's weights: --teacher)")
    config = state["config"]
    try:
        sizes = [config["image_size"], config["train_images"] or 1, config["test_images"] or 1]
        kinds = [type(config["data"]), *(type(n) for n in (config["seed"], *sizes))]
        if kinds != [str, int, int, int, int] or min(sizes) < 1:
            raise TypeError("its flags are not those of train.py")
        teacher = teacher_from_state(state["teacher"])
        student, _ = build_student(config, teacher.width)
        student.load_state_dict(state["student"])
    except Exception as error:                      # as above: what a file can hold has no end
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not fit this code: {why}") from None
    return config, teacher.to(device), student.to(device).eval().requires_grad_(False)
