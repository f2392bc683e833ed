"""Where teachers come from."""
import argparse
import contextlib
import os
import re
from pathlib import Path

import torch

from model import small_vit

WEIGHTS = Path(__file__).parent / "weights"

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


def load_teacher(name, random_weights=False):
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


