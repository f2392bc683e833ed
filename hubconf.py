"""Images to symbols and back in two lines, from any program (torch.hub).

    symbolizer = torch.hub.load(FOLDER, "symbolizer", source="local", checkpoint="ckpt.pt")
    symbols = symbolizer(images)                # (B, 3, H, W) -> (B, T) int64
    z_s = symbolizer.decode(symbols)            # (B, T) -> (B, D, d), one row per prefix

FOLDER is the one that holds this file. The calling program may itself have modules called model,
data, train ...; these stay, because ours leave sys.modules once they are imported.
"""
import pathlib
import sys

import torch
from torch import nn
from torchvision.transforms import functional as transforms

dependencies = ["torch", "torchvision"]


def _import_ours(*names):
    """-> our modules of these names, whatever the program has imported under the names of our
    files. torch.hub itself would give us the program's, or later the program ours (PyTorch issue
    65881). Modules that the program imported from this very folder are shared."""
    folder = pathlib.Path(__file__).resolve().parent
    files = {file.stem: file for file in folder.glob("*.py")}
    before = {name: sys.modules[name] for name in files if name in sys.modules}
    for name, module in before.items():
        if pathlib.Path(getattr(module, "__file__", None) or "").resolve() != files[name]:
            del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        return [__import__(name) for name in names]
    finally:
        sys.path.remove(str(folder))
        for name in files:
            sys.modules.pop(name, None)
        sys.modules.update(before)


_checkpoint, _data = _import_ours("checkpoint", "data")


class _Symbolizer(nn.Module):       # underscore: torch.hub.list() shows all callables without one
    """A frozen teacher and student. B images, T symbols of K, D prefixes (1, 2, 4 ... T), width d.
    All is in float32: bfloat16 would change some symbols, and batches of other sizes others."""

    def __init__(self, config, teacher, student):
        super().__init__()
        self.teacher, self.student = teacher, student
        self.size, self.vocab, self.length = (config[k] for k in ("image_size", "vocab", "length"))
        self.eval()

    def train(self, mode=True):
        """Stays in evaluation when a model around it trains: BatchNorm would change the symbols."""
        return super().train(False)

    @property
    def device(self):
        return next(self.student.parameters()).device

    @torch.no_grad()
    def describe(self, images, attention=False):
        """images (B, 3, H, W), uint8 or float in [0, 1], any size: of other shapes the central
        square -> model.Sequence of hard symbols; attention: with the maps (B, T, N)."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), not {tuple(images.shape)}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"images must be uint8 or float in [0, 1], not {images.dtype}")
        if images.is_floating_point() and not ((images >= 0) & (images <= 1)).all():
            raise ValueError("images of floats must be in [0, 1]")
        square = transforms.center_crop(images.to(self.device), min(images.shape[2:]))
        z_t = self.teacher(_data.normalize(square, self.size))                  # (B, N+1, d)
        return self.student.describe(self.student.preprocess(z_t), hard=True, attention=attention)

    def forward(self, images):
        """(B, 3, H, W) -> symbols (B, T) int64."""
        return self.describe(images).ids

    @torch.no_grad()
    def decode(self, symbols):
        """symbols (B, T) -> z_s (B, D, d) of each prefix, from symbols alone; cosines compare."""
        if symbols.ndim != 2 or symbols.shape[1] != self.length:
            raise ValueError(f"symbols must be (B, {self.length}), not {tuple(symbols.shape)}")
        if len(symbols) and not 0 <= symbols.min() <= symbols.max() < self.vocab:
            raise ValueError(f"symbols must be in 0..{self.vocab - 1}")
        return self.student.interpret(self.student.embed(symbols.to(self.device)))


def symbolizer(checkpoint, device="cpu"):
    """RUN/ckpt.pt of train.py -> a frozen module: images -> symbols, `.describe`, `.decode`.
    Raises FileNotFoundError, or ValueError for a file that is no checkpoint of this code."""
    return _Symbolizer(*_checkpoint.load_model(checkpoint, device))
