"""Where the teacher comes from: a name, or a file with any plain ViT's weights -> Teacher.

    load_teacher("dinov2_vits14")                   # a name of HUB, downloaded once
    load_teacher("random:dino_vitb16")              # that architecture with random weights
    load_teacher("shapes")                          # weights/shapes.pt
    load_teacher("dino-vitb16/model.safetensors")   # a file; see the table

| source | what its file is known by | position embedding at other sizes than it was trained on |
|---|---|---|
| DINO, iBOT | `blocks.0.attn.qkv` | offset 0.1, as theirs |
| DINOv2 | that and `mask_token` | offset 0.1; with registers: antialiased, as theirs |
| MAE | that and `decoder_*` | bicubic, as its fine-tuning |
| MoCo v3 | that and `base_encoder.` | bicubic, as MAE; its own code takes one size only |
| timm | that and `reg_token` or `ls1` without `mask_token` | antialiased, as theirs |
| Hugging Face | `embeddings.cls_token` | bicubic; with registers: antialiased, as theirs |
| torchvision, train.py, weights/ | `class_token` | bicubic (its own aligns corners), or as stored |

A file with DINO's names alone is taken for DINO's, unless timm's config.json lies beside it. It may
be timm's vit_*_dino or MAE's encoder without its decoder, which differ at other sizes only, or
MoCo v3's without its prefix, whose small model also has other heads.

Heads have 64 channels (ViT-H of width 1280: 80), except in MoCo v3, which has 12 heads, and where
Hugging Face's config.json beside the file gives their number. That also gives the epsilon of
LayerNorm; without it, it is 1e-12 in Hugging Face's ViT and 1e-6 everywhere else. Not supported:
SwiGLU (DINOv2 giant), a stem of MoCo v3, distillation tokens, patches that form no square. All get
images of ImageNet's statistics (data.normalize), which a few of Hugging Face's and timm's were not
trained with.
"""
import argparse
import contextlib
import json
import math
import os
import re
from functools import partial
from pathlib import Path

import torch

from torch import nn
from torch.nn import functional as F
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

import distributed

WEIGHTS = Path(__file__).parent / "weights"

SITE = "https://dl.fbaipublicfiles.com"
# Name: (file on SITE, width, patch size, image size of the position embedding); all have 12 blocks
HUB = {
    "dino_vitb16": ("dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth", 768, 16, 224),
    "dino_vitb8": ("dino/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth", 768, 8, 224),
    "dino_vits16": ("dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth", 384, 16, 224),
    "dino_vits8": ("dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth", 384, 8, 224),
    "dinov2_vitb14": ("dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth", 768, 14, 518),
    "dinov2_vits14": ("dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth", 384, 14, 518),
}
DINO_OFFSET = 0.1                               # of DINO's and DINOv2's interpolate_pos_encoding


# ---- the network E_T -----------------------------------------------------------------------------

class Teacher(nn.Module):
    """A torchvision ViT that returns all its tokens: x (B, 3, H, W) normalised -> (B,
    N+1, d), CLS first.

    registers: tokens between CLS and patches that only the blocks see (Darcet et al. 2024).
    Any H and W that the patch size divides: the position embedding is interpolated bicubically.
    interpolate_offset and interpolate_antialias are DINOv2's: offset 0.1 takes the scale
    (h + 0.1) / side as DINO does, 0 takes the size h itself."""

    def __init__(self, vit, registers=0, interpolate_offset=0.0, interpolate_antialias=False):
        super().__init__()
        self.vit = vit
        self.width, self.patch = vit.hidden_dim, vit.patch_size
        self.image_size = vit.image_size
        self.registers = nn.Parameter(torch.zeros(1, registers, self.width)) if registers else None
        self.interpolate_offset = interpolate_offset
        self.interpolate_antialias = interpolate_antialias

    def get_extra_state(self):
        """What the weights' shapes do not determine. state_dict() holds it as `_extra_state`, so
        a checkpoint builds the same teacher again (teachers.teacher_from_state)."""
        block = self.vit.encoder.layers[0]
        return {"heads": block.self_attention.num_heads, "eps": block.ln_1.eps,
                "interpolate_offset": self.interpolate_offset,
                "interpolate_antialias": self.interpolate_antialias}

    def set_extra_state(self, state):
        if state != self.get_extra_state():
            raise ValueError(f"weights of a teacher with {state}, not {self.get_extra_state()}")

    def positions(self, h, w):
        """Position embedding for a grid of h x w patches: (1, 1 + h*w, d)."""
        embedding = self.vit.encoder.pos_embedding
        side = self.image_size // self.patch
        if (h, w) == (side, side):
            return embedding
        grid = embedding[:, 1:].transpose(1, 2).unflatten(2, (side, side)).float()
        offset = self.interpolate_offset
        to = ({"scale_factor": ((h + offset) / side, (w + offset) / side)} if offset
              else {"size": (h, w)})
        grid = F.interpolate(grid, **to, mode="bicubic", align_corners=False,
                             antialias=self.interpolate_antialias)
        return torch.cat([embedding[:, :1], grid.flatten(2).transpose(1, 2)], 1)

    def forward(self, x):
        x = self.vit.conv_proj(x)                                               # (B, d, h, w)
        positions = self.positions(*x.shape[-2:])
        x = x.flatten(2).transpose(1, 2)                                        # (B, N, d)
        x = torch.cat([self.vit.class_token.expand(len(x), -1, -1), x], 1) + positions
        if self.registers is not None:                                          # (B, 1+R+N, d)
            x = torch.cat([x[:, :1], self.registers.expand(len(x), -1, -1), x[:, 1:]], 1)
        for block in self.vit.encoder.layers:       # its own forward takes slower attention
            x = x + self.attention(block.self_attention, block.ln_1(x))
            x = x + block.mlp(block.ln_2(x))
        if self.registers is not None:
            x = torch.cat([x[:, :1], x[:, 1 + self.registers.shape[1]:]], 1)
        return self.vit.encoder.ln(x)                                           # (B, N+1, d)

    @staticmethod
    def attention(layer, x):
        """layer, a torch.nn.MultiheadAttention, as self-attention of x (B, L, d)."""
        qkv = F.linear(x, layer.in_proj_weight, layer.in_proj_bias)
        # (B, L, 3d) -> three of (B, heads, L, c)
        q, k, v = qkv.unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return layer.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def small_vit(image_size, patch, width, depth, heads, stem=(), eps=1e-6, **settings):
    """A torchvision ViT of any size (without its classifier), randomly initialised as DINO does.
    stem: channels of 3x3 convolutions in front (Xiao et al. 2021); each that changes their number
    has stride 2. eps: of the LayerNorms. settings: Teacher's. Raises ValueError when the stem does
    not make the patch."""
    strides = [1 + (channels != before) for before, channels in zip([3, *stem], stem)]
    if stem and math.prod(strides) != patch:
        raise ValueError(f"a stem of {list(stem)} channels makes patches of {math.prod(strides)} "
                         f"pixels, not {patch}")
    convolutions = [ConvStemConfig(channels, 3, stride, distributed.BatchNorm)
                    for channels, stride in zip(stem, strides)] or None
    vit = VisionTransformer(image_size, patch, depth, heads, width, 4 * width,
                            norm_layer=partial(nn.LayerNorm, eps=eps),
                            conv_stem_configs=convolutions)
    vit.heads = nn.Identity()
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.MultiheadAttention):
            nn.init.trunc_normal_(module.in_proj_weight, std=0.02)
    nn.init.trunc_normal_(vit.class_token, std=0.02)
    return Teacher(vit, **settings)


# ---- where it comes from -------------------------------------------------------------------------

def load_teacher(name_or_path):
    """A name of HUB, `random:` and a name of HUB, a name in weights/, or a file -> Teacher,
    frozen, in eval mode, float32. Raises OSError or ValueError, in one line."""
    name = str(name_or_path)
    if name.startswith("random:"):
        return random_teacher(name.removeprefix("random:"))
    if name in HUB:
        return hub_teacher(name)
    shipped = WEIGHTS / f"{name}.pt"
    if shipped.is_file():
        return read_teacher(shipped)
    if not Path(name).is_file():
        known = sorted(file.stem for file in WEIGHTS.glob("*.pt"))
        raise FileNotFoundError(f"no teacher {name!r}: give a file, one of "
                                f"{', '.join([*HUB, *known])}, or random:{next(iter(HUB))}")
    return read_teacher(name)


def random_teacher(name):
    """The architecture of a name of HUB with random weights, to try sizes without a network."""
    if name not in HUB:
        raise ValueError(f"random: needs one of {', '.join(HUB)}, not {name!r}")
    _, width, patch, image_size = HUB[name]
    teacher = small_vit(image_size, patch, width, 12, width // 64, interpolate_offset=DINO_OFFSET)
    return teacher.eval().requires_grad_(False)


def hub_teacher(name):
    """The teacher `name` of HUB, downloaded once to where torch.hub keeps its files. The site
    publishes no hash to check, and torch.hub takes a cut connection for the file's end: a new file
    is kept only after it was read. Raises OSError for a download, ValueError for a kept file."""
    url = f"{SITE}/{HUB[name][0]}"
    path = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    if path.is_file():
        try:
            return read_teacher(path)
        except ValueError as error:
            raise ValueError(f"{error}; delete it, and the next run downloads it again") from None
    part = Path(f"{path}.{os.getpid()}.tmp")    # two runs at a time do not meet
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(part))
        teacher = read_teacher(part)
        os.replace(part, path)
        return teacher
    except Exception as error:                  # no network, no page, half a file, no space
        raise OSError(f"cannot get the weights of {name} from {url} ({error}); nothing is kept. "
                      f"Try again, or download it elsewhere and pass --teacher FILE, or use "
                      f"random:{name} to try the sizes") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


# -------------------------------------------------------------------------------------------- files

def read_weights(path):
    """The dictionary in a file of torch.save or safetensors, without running any code from it.
    Raises FileNotFoundError or ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    safe = Path(path).suffix == ".safetensors"
    if safe:
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError(f"{path} needs a package: pip install safetensors") from None
    try:
        if safe:
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):     # DINO and MAE store flags
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:          # truncated, foreign or hostile: torch raises a dozen kinds
        expected = "safetensors file" if safe else "PyTorch checkpoint"
        raise ValueError(f"{path} is damaged or no {expected} ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a dictionary of weights")
    return state


def read_config(path):
    """The config.json of Hugging Face or timm beside the file, or {}."""
    file = Path(path).with_name("config.json")
    try:
        config = json.loads(file.read_bytes()) if file.is_file() else {}
    except ValueError:
        raise ValueError(f"{file} is no JSON") from None
    return config if {"model_type", "pretrained_cfg"} & set(config) else {}     # not train.py's


def read_teacher(path):
    """A file of any source in the table above -> frozen Teacher. Raises OSError or ValueError
    naming the file."""
    state = read_weights(path)
    try:
        return teacher_from_state(to_torchvision(state, read_config(path)))
    except Exception as error:                  # wrong names, types, shapes: each another kind
        raise ValueError(f"{path} is no teacher: {' '.join(str(error).split())[:400]}") from None


# ------------------------------------------------------------------------- names of the parameters

SOURCES = "DINO, DINOv2, iBOT, MAE, MoCo v3, torchvision, timm or Hugging Face's ViT"
PREFIXES = r"^((module|backbone|base_encoder|momentum_encoder|vit|dinov2(_with_registers)?)\.)+"
DROPPED = (r"^((dino_|ibot_)?heads?|classifier|pooler|pre_logits|decoder\w*|masked_embed|"
           r"(embeddings\.)?mask_token)(\.|$)")     # known, and of no use to a frozen encoder
# Theirs -> torchvision's, or `registers`, `ls1`, `ls2` (LayerScale) and self_attention.q, .k, .v
RENAMES = [
    # DINO, DINOv2, iBOT, MAE, MoCo v3, timm
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^reg(ister)?_tokens?$", "registers"),
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^norm\.", "encoder.ln."),
    (r"^blocks\.(\d+\.)?(\d+)\.", r"encoder.layers.encoder_layer_\2."), # DINOv2 in chunks
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj\.", ".self_attention.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),                                   # iBOT
    # Hugging Face: as saved, and as in memory of transformers 5
    (r"^embeddings\.cls_token$", "class_token"),
    (r"^embeddings\.position_embeddings$", "encoder.pos_embedding"),
    (r"^embeddings\.register_tokens$", "registers"),
    (r"^embeddings\.patch_embeddings\.projection\.", "conv_proj."),
    (r"^layernorm\.", "encoder.ln."),
    (r"^(encoder\.)?layers?\.(\d+)\.", r"encoder.layers.encoder_layer_\2."),
    (r"\.layernorm_before\.", ".ln_1."),
    (r"\.layernorm_after\.", ".ln_2."),
    (r"\.attention\.(attention\.)?(q|k|v)(uery|ey|alue|_proj)\.", r".self_attention.\2."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".self_attention.out_proj."),
    (r"\.intermediate\.dense\.", ".mlp.0."),
    (r"\.output\.dense\.", ".mlp.3."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
]
SWIGLU = r"\.mlp\.(w12|w3|weights_in|gate_proj|fc1_g)\."


def encoder_of(state):
    """A file's dictionary -> (the part with the encoder, without prefixes; all names before)."""
    for entry in ("teacher", "state_dict", "model"):        # DINO, iBOT; MoCo v3; MAE
        if isinstance(state.get(entry), dict):
            state = state[entry]
    state = {str(name): value for name, value in state.items()}
    for name, value in state.items():
        if not torch.is_tensor(value) and not name.endswith("_extra_state"):
            raise ValueError(f"{name!r} in it is a {type(value).__name__}, not a tensor; expected "
                             f"the parameters of {SOURCES}")
    for encoder in ("base_encoder.", "momentum_encoder."):  # MoCo v3 evaluates the first
        if any(encoder in name for name in state):
            return {re.sub(PREFIXES, "", name): value for name, value in state.items()
                    if encoder in name}, set(state)
    return {re.sub(PREFIXES, "", name): value for name, value in state.items()}, set(state)


def to_torchvision(state, config):
    """A file's dictionary, of any source -> that of the Teacher with the same encoder: names of
    torchvision and `_extra_state`. Heads and decoders are dropped, a parameter that no source has
    keeps its name. config: of config.json. Raises ValueError for SwiGLU and a config that does not
    fit."""
    state, names = encoder_of(state)
    state = {name: value for name, value in state.items() if not re.match(DROPPED, name)}
    if "class_token" in state:                              # torchvision's, ours, train.py's
        return state
    new = {}
    for name, value in state.items():
        for theirs, ours in RENAMES:
            name = re.sub(theirs, ours, name)
        new[name] = value
    if is_swiglu(new):
        raise ValueError("its MLPs are SwiGLU, as in DINOv2's giant model; take a ViT-S, B or L")
    hugging_face = "embeddings.cls_token" in state
    settings = hugging_face_settings(new, config) if hugging_face else settings_of(names, config)
    join_qkv(new)
    fold_layer_scale(new)
    add_cls_position(new)
    return new | {"_extra_state": settings}


def settings_of(names, config):
    """The Teacher's extra state, as far as `names`, all of the file's, and config determine it."""
    has = lambda pattern: any(re.search(pattern, name) for name in names)       # noqa: E731
    if has(r"\b(base|momentum)_encoder\."):                                     # MoCo v3
        return {"heads": 12}
    if has(r"^decoder_"):                                                       # MAE
        return {}
    timm = "pretrained_cfg" in config or has(r"\.ls1\.") and not has(r"\bmask_token$")
    antialias = timm or has(r"\b(reg_token|register_tokens)$")
    return {"interpolate_antialias": antialias,
            "interpolate_offset": 0.0 if antialias else DINO_OFFSET}


def hugging_face_settings(state, config):
    """The same for Hugging Face; state: in our names."""
    depth = sum(name.endswith(".ln_1.weight") for name in state)
    sizes = {"hidden_size": state["class_token"].shape[-1], "num_hidden_layers": depth,
             "hidden_act": "gelu"}
    for key, expected in sizes.items():
        if config.get(key, expected) != expected:
            raise ValueError(f"its config.json has {key} {config[key]}, expected {expected}")
    scaled = any(".ls1." in name for name in state)                             # DINOv2
    settings = {"eps": config.get("layer_norm_eps", 1e-6 if scaled else 1e-12),
                "interpolate_antialias": "registers" in state}
    heads = config.get("num_attention_heads")
    return settings | ({"heads": heads} if heads else {})


def is_swiglu(state):
    """By the names of the weights or, in timm, by a first layer twice as wide as what the second
    takes."""
    return any(re.search(SWIGLU, name) or name.endswith(".mlp.3.weight")
               and len(state.get(name.replace(".mlp.3.", ".mlp.0."), ())) == 2 * value.shape[-1]
               for name, value in state.items())


def join_qkv(state):
    """Separate projections of q, k and v (Hugging Face) -> torch's in_proj, in place."""
    for name in [name for name in state if ".self_attention.q." in name]:
        parts = [name.replace(".q.", f".{part}.") for part in "qkv"]
        if all(part in state for part in parts):
            state[name.replace(".q.", ".in_proj_")] = torch.cat([state.pop(p) for p in parts])


def fold_layer_scale(state):
    """LayerScale: gamma * (W x + b) = (gamma W) x + gamma b, in place."""
    for scale, linear in ((".ls1.gamma", ".self_attention.out_proj"), (".ls2.gamma", ".mlp.3")):
        for name in [name for name in state if name.endswith(scale)]:
            gamma = state.pop(name).float()
            weight, bias = (name.replace(scale, f"{linear}.{part}") for part in ("weight", "bias"))
            if {weight, bias} <= state.keys():
                state[weight] = gamma[:, None] * state[weight].float()
                state[bias] = gamma * state[bias].float()


def add_cls_position(state):
    """timm may have no position for CLS, (1, N, d): a zero, in place -> (1, 1+N, d)."""
    grid = state.get("encoder.pos_embedding")
    if getattr(grid, "ndim", 0) == 3 and is_square(grid.shape[1]) and grid.shape[1] > 1:
        state["encoder.pos_embedding"] = torch.cat([torch.zeros_like(grid[:, :1]), grid], 1)


def is_square(n):
    return math.isqrt(n) ** 2 == n


def teacher_from_state(state):
    """torchvision-named weights, those of Teacher.state_dict() or of its ViT -> frozen Teacher in
    float32. The sizes are read off the shapes, the rest off `_extra_state`; what it lacks has the
    Teacher's default. Raises ValueError for missing, unexpected and misshapen weights."""
    state = {name.removeprefix("vit."): value for name, value in state.items()}
    settings = dict(state.pop("_extra_state", {}))
    needed = {"class_token", "encoder.pos_embedding", "encoder.layers.encoder_layer_0.ln_1.weight"}
    if missing := needed - state.keys():
        raise ValueError(f"no vision transformer in it: missing {some(missing)}; found "
                         f"{some(state)}; expected the parameters of {SOURCES}")
    positions, width = state["encoder.pos_embedding"].shape[1] - 1, state["class_token"].shape[-1]
    if not is_square(positions):
        raise ValueError(f"its position embedding is for {positions} patches and CLS, expected a "
                         "square")
    heads = settings.pop("heads", 16 if width == 1280 else max(1, width // 64))
    if width % heads:
        raise ValueError(f"its width {width} is no multiple of its heads, {heads}")
    depth = sum(name.endswith(".ln_1.weight") for name in state)
    patch, stem = patch_of(state)
    registers = state["registers"].shape[1] if "registers" in state else 0
    teacher = small_vit(math.isqrt(positions) * patch, patch, width, depth, heads, stem,
                        registers=registers, **settings)
    load_all(teacher, {name if name == "registers" else f"vit.{name}": value
                       for name, value in state.items()})
    return teacher.eval().requires_grad_(False)


def patch_of(state):
    """torchvision-named weights -> patch size, channels of the convolutional stem (or [])."""
    stem = [len(value) for name, value in state.items()
            if re.fullmatch(r"conv_proj\.conv_bn_relu_\d+\.0\.weight", name)]
    if stem:
        return 2 ** (1 + sum(a != b for a, b in zip(stem, stem[1:]))), stem
    if "conv_proj.weight" not in state:
        found = [name for name in state if name.startswith("conv_proj")]
        raise ValueError(f"its patch embedding is {some(found)}, expected one convolution")
    return state["conv_proj.weight"].shape[-1], []


def load_all(teacher, state):
    """Loads `state` without `_extra_state`. Raises ValueError that names what does not fit."""
    shapes = {name: getattr(value, "shape", None) for name, value in state.items()}
    expected = {name: value.shape for name, value in teacher.state_dict().items()
                if name != "_extra_state"}
    missing, unexpected = expected.keys() - shapes.keys(), shapes.keys() - expected.keys()
    if missing or unexpected:
        raise ValueError("its vision transformer is incomplete or another one: missing "
                         f"{some(missing)}; unexpected {some(unexpected)}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(f"its {name} has shape {tuple(shapes[name])}, expected {tuple(shape)}")
    teacher.load_state_dict(state | {"_extra_state": teacher.get_extra_state()})


def some(names):
    """Three of the names, in words."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "nothing") + more
