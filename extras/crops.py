"""Words for crops of images, computed or known: the vocabulary of extras/falcon.py.

A scorer has `names`, W words, and gives the confidence in [0, 1] of each for crops of images, in
place of a captioner such as CLIP. `shapes` and `scenes` have the words of their factors. Other data
has class names (CIFAR-10 also animal and vehicle) and words computed from the pixels of the crop:
its most frequent colour, and dark or bright, smooth or textured, edges, and place, each for the
lower and the upper third of all crops of the training images. All confidences here are 0 or 1.
"""
import math

import torch
import torch.nn.functional as F

import shapes

CROP = 0.6                          # of the attention map's maximum (FALCON's code)
HUES = ("red", "orange", "yellow", "green", "cyan", "blue", "violet", "pink", "grey")
HUE_ENDS = torch.tensor([20.0, 45, 70, 160, 200, 255, 290, 345])    # degrees; beyond: red again
ANIMALS = {"bird", "cat", "deer", "dog", "frog", "horse"}           # of CIFAR-10, else vehicles
ENDS = ("dark", "bright", "horizontal edges", "vertical edges", "smooth", "textured", "left",
        "right", "top", "bottom")   # lower and upper third of five quantities


def boxes(heat, side):
    """heat (..., N) over square patches -> (..., side, side) bool: the box around the patches with
    at least CROP times the maximum."""
    grid = math.isqrt(heat.shape[-1])
    inside = (heat >= CROP * heat.amax(-1, keepdim=True)).unflatten(-1, (grid, grid))
    rows, columns = (x.cummax(-1).values & x.flip(-1).cummax(-1).values.flip(-1)
                     for x in (inside.any(-1).int(), inside.any(-2).int()))
    patch = torch.arange(side) * grid // side
    return (rows[..., patch, None] & columns[..., None, patch]).bool()


def pixel_maps(images):
    """(n, 3, H, W) uint8 -> (n, 9 + 4, H W): one-hot colour, brightness, squared differences along
    y and along x, and the root of their sum."""
    x = images.float() / 255
    high, low = x.amax(1), x.amin(1)
    span = (high - low).clamp(min=1e-6)
    r, g, b = x.unbind(1)
    hue = torch.where(high == r, (g - b) / span, torch.where(
        high == g, 2 + (b - r) / span, 4 + (r - g) / span)) * 60 % 360
    colour = torch.bucketize(hue, HUE_ENDS, right=True) % 8
    colour = torch.where((high - low < 0.2 * high) | (high < 0.15), 8, colour)      # grey
    grey = x.mean(1)
    dx = F.pad(grey[:, :, 2:] - grey[:, :, :-2], (1, 1)).square()
    dy = F.pad(grey[:, 2:] - grey[:, :-2], (0, 0, 1, 1)).square()
    maps = torch.stack([grey, dy, dx, (dx + dy).sqrt()], 1)
    return torch.cat([F.one_hot(colour, len(HUES)).movedim(-1, 1), maps], 1).flatten(2)


def annotations(image_set):
    """What is known of an ImageSet: W names, all different, and (n, W) float, 0 or 1. An image of
    `scenes` has the values of all its objects."""
    if image_set.factors:
        names, known = [], []
        for factor, values in shapes.FACTORS.items():           # "middle" is a column and a row
            names += [f"{v} {factor}" if factor in ("column", "row") else v for v in values]
            own = image_set.factors[factor].view(len(image_set), -1, 1)
            known.append((own == torch.arange(len(values))).any(1))
        return names, torch.cat(known, 1).float()
    names = list(image_set.classes)
    known = (image_set.labels[:, None] == torch.arange(len(names))).float()
    if ANIMALS < set(names):
        animal = known[:, [name in ANIMALS for name in names]].sum(1)
        names, known = [*names, "animal", "vehicle"], torch.cat(
            [known, torch.stack([animal, 1 - animal], 1)], 1)
    return names, known


class Scorer:
    """The scorer of an ImageSet: scorer(index (m,), heat (m, C, N)) -> (m, C, W) of C crops of each
    image, around what the maps `heat` attend to."""

    def __init__(self, image_set, heat, bounds=None):
        """heat (n, T, N): maps whose crops set the bounds between thirds, or bounds (2, 5) of
        another set's scorer."""
        self.image_set, self.bounds = image_set, bounds
        self.names, self.known = annotations(image_set)
        self.from_pixels = not image_set.factors
        if self.from_pixels:
            self.names = [*self.names, *HUES, *ENDS]
            if bounds is None:
                values = self.measure(torch.arange(len(heat)), heat)[..., len(HUES):].flatten(0, 1)
                third = max(1, len(values) // 3)
                self.bounds = torch.stack([values.kthvalue(k, dim=0).values
                                           for k in (third, len(values) + 1 - third)])

    def measure(self, index, heat):
        """-> (m, C, 9 + 5): shares of the colours, then the five quantities of ENDS."""
        parts = []
        for i, maps in zip(index.split(500), heat.split(500)):
            images = self.image_set.get(i)
            axis = torch.arange(images.shape[-1]) + 0.5
            inside = boxes(maps, len(axis)).float()                             # (m, C, H, W)
            inside = inside / inside.sum((2, 3), keepdim=True)
            position = torch.stack([inside.sum(2) @ axis, inside.sum(3) @ axis], -1)       # x, y
            totals = inside.flatten(2) @ pixel_maps(images).transpose(1, 2)       # (m, C, 13)
            colours, grey, dy, dx, slope = totals.split([len(HUES), 1, 1, 1, 1], -1)
            parts.append(torch.cat([colours, grey, dx / (dx + dy + 1e-9), slope, position], -1))
        return torch.cat(parts)

    def __call__(self, index, heat):
        known = self.known[index][:, None].expand(-1, heat.shape[1], -1)
        if not self.from_pixels:
            return known
        colours, x = self.measure(index, heat).tensor_split([len(HUES)], -1)
        ends = torch.stack([x <= self.bounds[0], x >= self.bounds[1]], -1).flatten(-2).float()
        return torch.cat([known, F.one_hot(colours.argmax(-1), len(HUES)).float(), ends], -1)
