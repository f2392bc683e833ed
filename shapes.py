"""The drawn data set `shapes`: images of 32 x 32 pixels whose factors are known and independent.

    python shapes.py                # prints the factors and draws 10 images of each shape

Each image is a function of (seed, index) alone, so that nothing is downloaded and every machine has
the same images. Drawing one takes less than a millisecond.
"""
import time

import numpy as np
import torch
from PIL import Image

from progress import counted

FACTORS = {
    "shape": ["disc", "ring", "square", "triangle", "star", "cross", "crescent", "heart",
              "hourglass", "bars"],
    "colour": ["red", "orange", "yellow", "green", "cyan", "azure", "violet", "magenta"],
    "size": ["small", "medium", "large"],
    "column": ["left", "middle", "right"],
    "row": ["top", "middle", "bottom"],
}
HUES = torch.tensor([0.0, 30.0, 58.0, 120.0, 180.0, 212.0, 268.0, 312.0])  # degrees, one per colour
RADII = torch.tensor([7.0, 9.0, 11.0])                                        # pixels, one per size
SIDE = 32
COUNTS = {"train": 50_000, "test": 10_000}


def signed_distance(shape, x, y):
    """Distance to the outline of shape number `shape`, negative inside, for points in units of
    the object's radius; exact near the outline, which is all that anti-aliasing needs."""
    ax, ay, r = x.abs(), y.abs(), (x * x + y * y).sqrt()
    if shape == 0:                                                              # disc
        return r - 0.9
    if shape == 1:                                                              # ring
        return (r - 0.68).abs() - 0.24
    if shape == 2:                                                              # square
        return torch.maximum(ax, ay) - 0.8
    if shape == 3:                                                              # triangle, tip up
        return torch.maximum(0.866 * ax - 0.5 * y, y) - 0.5
    if shape == 4:                                                         # star: one fifth, folded
        fifth = 2 * torch.pi / 5
        angle = torch.atan2(x, -y)
        angle = (angle - fifth * torch.round(angle / fifth)).abs()
        # the edge runs from the tip (1, 0) to the notch at half a fifth, radius 0.42
        return (r * angle.cos() - 1.0) * 0.350 + r * angle.sin() * 0.937
    if shape == 5:                                                              # cross
        return torch.minimum(torch.maximum(ax - 0.95, ay - 0.28),
                             torch.maximum(ay - 0.95, ax - 0.28))
    if shape == 6:                                                              # crescent
        return torch.maximum(r - 0.95, 0.72 - ((x - 0.42) ** 2 + y * y).sqrt())
    if shape == 7:                                                       # heart: two discs, a wedge
        lobes = ((ax - 0.42) ** 2 + (y + 0.35) ** 2).sqrt() - 0.48
        wedge = torch.maximum(0.755 * ax + 0.656 * y - 0.60, -0.35 - y)
        return torch.minimum(lobes, wedge)
    if shape == 8:                                                              # hourglass
        return torch.maximum(ay - 0.85, 0.78 * (ax - 0.8 * ay) - 0.06)
    return torch.maximum(ax - 0.85, (ay - 0.5).abs() - 0.22)                    # two bars


def hsv_to_rgb(hue, saturation, value):
    """(n,) degrees, (n,) and (n,) in [0, 1] -> (n, 3, 1, 1) in [0, 1]."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + hue[:, None] / 60) % 6              # the usual closed form
    rgb = value[:, None] * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))
    return rgb[..., None, None]


def random_numbers(indices, seed, count=24, side=SIDE):
    """The randomness of n images -> u (count, n) float in [0, 1), noise (n, 3, side, side) uint8.

    Philox is a counter-based generator whose raw output numpy guarantees to be the same on every
    machine and in every version.
    """
    raw = np.stack([np.random.Philox(key=[seed, int(i)]).random_raw(count + 3 * side * side // 8)
                    for i in indices])
    u = (raw[:, :count] >> np.uint64(40)).astype(np.float32) / 2**24
    noise = np.ascontiguousarray(raw[:, count:]).view(np.uint8)
    return torch.from_numpy(u).T, torch.from_numpy(noise.reshape(-1, 3, side, side))


def draw_background(u, px, py):
    """Middles of pixels px, py (H, W) -> (n, 3, H, W) in [0, 1]: a dim, nearly grey colour with
    faint stripes of any angle and width. Plain and dim on purpose (our choice): with busy
    backgrounds a self-supervised teacher learns the background, because it is the cheaper cue."""
    angle, width, phase, strength = (u[k, :, None, None] for k in (5, 6, 7, 11))
    angle = torch.pi * angle
    wave = ((px * angle.cos() + py * angle.sin()) * (0.3 + 0.7 * width) + 6.28 * phase).sin()
    ground = hsv_to_rgb(360 * u[8], 0.25 * u[9], 0.18 + 0.2 * u[10])
    return ground * (1 + 0.15 * strength * wave)[:, None]


def draw_object(u, shape, colour, cx, cy, radius, px, py):
    """-> its colour (n, 3, H, W) in [0, 1] and the share of each pixel that it covers, (n, H, W).
    u (24, n) in [0, 1); shape and colour (n,) int64, indices into FACTORS; middle cx, cy and radius
    (n, 1, 1) in pixels; px, py: middles of pixels, (H, W) or (n, H, W). Angle and hue are jittered,
    so that a factor is a category, not a number."""
    v = u[..., None, None]                                                      # (24, n, 1, 1)
    angle = 0.5 * v[15] - 0.25                                         # radians, about +-14 degrees
    dx, dy = (px - cx) / radius, (py - cy) / radius
    x, y = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
    distance = torch.empty_like(x)
    for number in range(len(FACTORS["shape"])):
        chosen = shape == number
        distance[chosen] = signed_distance(number, x[chosen], y[chosen])
    cover = (0.5 - distance * radius).clamp(0, 1)

    hue = HUES[colour] + 16 * u[16] - 8
    paint = hsv_to_rgb(hue, 0.7 + 0.3 * u[17], 0.75 + 0.25 * u[18])
    shade = 1 - 0.25 * v[19] * (dx * (6.28 * v[20]).cos() + dy).clamp(-1, 1)
    return paint * shade[:, None], cover


def add_noise(images, u, noise):
    """(n, 3, H, W) in [0, 1] -> uint8, with noise (n, 3, H, W) uint8 whose strength u has."""
    images = images * 255 + (noise.float() - 127.5) * (0.1 * u[21])[:, None, None, None]
    return images.round().clamp(0, 255).byte()


def pixel_grid(side):
    """-> px, py, (side, side) each, in pixels."""
    axis = torch.arange(side) + 0.5
    py, px = torch.meshgrid(axis, axis, indexing="ij")
    return px, py


def draw_shapes(indices, seed=0):
    """Images `indices` of stream `seed` -> (images (n, 3, 32, 32) uint8, factors: a dict of (n,)
    int64, masks (n, 32, 32) bool, True on the object)."""
    u, noise = random_numbers(indices, seed)
    factors = {name: (u[k] * len(values)).long()
               for k, (name, values) in enumerate(FACTORS.items())}
    px, py = pixel_grid(SIDE)
    ground = draw_background(u, px, py)
    v = u[..., None, None]                                                      # (24, n, 1, 1)
    column, row, size = (factors[name][:, None, None] for name in ("column", "row", "size"))
    cx = 16 + 3.5 * (column - 1) + 2 * v[12] - 1
    cy = 16 + 3.5 * (row - 1) + 2 * v[13] - 1
    radius = RADII[size] * (0.95 + 0.1 * v[14])
    paint, cover = draw_object(u, factors["shape"], factors["colour"], cx, cy, radius, px, py)
    images = ground + cover[:, None] * (paint - ground)
    return add_noise(images, u, noise), factors, cover > 0.5


def load(split, limit=None, seed=0):
    """The first `limit` (default: COUNTS) images of split train or test, as `draw_shapes` returns
    them. The splits are different streams of the generator."""
    n, stream = limit or COUNTS[split], 2 * seed + (split == "test")
    chunks = [range(i, min(i + 2000, n)) for i in range(0, n, 2000)]
    parts = [draw_shapes(chunk, stream) for chunk in counted("drawing images", n, chunks)]
    images, factors, masks = zip(*parts)
    return (torch.cat(images), {name: torch.cat([f[name] for f in factors]) for name in FACTORS},
            torch.cat(masks))


def main():
    start = time.perf_counter()
    images, factors, masks = load("train", 500)
    seconds = time.perf_counter() - start
    print(f"drew {len(images)} images of {SIDE} x {SIDE} pixels in {seconds:.2f} s; the first one:")
    for name, values in FACTORS.items():
        print(f"  {name:7} {values[factors[name][0]]:9} of {', '.join(values)}")
    print(f"  mask    {masks[0].sum()} of {SIDE * SIDE} pixels")
    rows = [images[factors["shape"] == shape][:10] for shape in range(len(FACTORS["shape"]))]
    sheet = torch.stack(rows).permute(0, 3, 1, 4, 2).reshape(10 * SIDE, 10 * SIDE, 3)
    large = Image.fromarray(sheet.numpy()).resize((960, 960), Image.Resampling.NEAREST)
    large.save("shapes.png")
    print("shapes.png: a row for each shape, 10 images each")


if __name__ == "__main__":
    main()
