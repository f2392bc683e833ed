"""Pictures to symbols and back in two lines, from any program (torch.hub).

    symbolizer = torch.hub.load(FOLDER, "symbolizer", source="local", checkpoint="ckpt.pt")
    symbols = symbolizer(pictures)              # (B, 3, H, W) -> (B, T) int64

FOLDER is the one that holds this file. extras/describe.py does the same for a folder of images.
"""
import torch
from torch import nn
from torchvision.transforms import functional as transforms

import data
import model

dependencies = ["torch", "torchvision"]


class _Symbolizer(nn.Module):       # underscore: torch.hub.list() shows all callables without one
    """A frozen teacher and student. B pictures, T symbols of K, D prefixes (1, 2, 4 … T), width d.
    All is in float32: bf16 would change some symbols, and batches of other sizes others."""

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
        return self.student.mean.device

    @torch.no_grad()
    def describe(self, pictures, attention=False):
        """pictures (B, 3, H, W), uint8 or float in [0, 1], any size: of other shapes the central
        square -> Description of hard symbols (model.py). attention: also where it looked."""
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(f"pictures must be (B, 3, H, W), not {tuple(pictures.shape)}")
        if pictures.dtype != torch.uint8 and not pictures.is_floating_point():
            raise ValueError(f"pictures must be uint8 or float in [0, 1], not {pictures.dtype}")
        if pictures.is_floating_point() and not ((pictures >= 0) & (pictures <= 1)).all():
            raise ValueError("float pictures must be in [0, 1]")
        square = transforms.center_crop(pictures.to(self.device), min(pictures.shape[2:]))
        tokens = self.teacher(data.normalize(square, self.size))                # (B, N+1, d)
        return self.student.describe(tokens, hard=True, attention=attention)

    def forward(self, pictures):
        """(B, 3, H, W) -> symbols (B, T) int64."""
        return self.describe(pictures).ids

    @torch.no_grad()
    def read(self, symbols):
        """symbols (B, T) -> z_s (B, D, d) of each prefix, from symbols alone; cosines compare."""
        if symbols.ndim != 2 or symbols.shape[1] != self.length:
            raise ValueError(f"symbols must be (B, {self.length}), not {tuple(symbols.shape)}")
        if len(symbols) and not 0 <= symbols.min() <= symbols.max() < self.vocab:
            raise ValueError(f"symbols must be in 0..{self.vocab - 1}")
        return self.student.read(symbols.to(self.device))


def symbolizer(checkpoint, device="cpu"):
    """RUN/ckpt.pt of train.py -> a frozen module: pictures -> symbols, `.describe`, `.read`.
    Raises FileNotFoundError, or ValueError for a file that is no checkpoint of this code."""
    return _Symbolizer(*model.load_checkpoint(checkpoint, device))
