"""The drawn data set `scenes`: 2 to 4 objects of `shapes` on one canvas of 48 x 48 pixels.

    python scenes.py                # prints the objects of one scene and draws 60 scenes

Each scene is a function of (seed, index) alone, as in shapes.py. One object is large, the others
are medium or small, so that "the largest object" always has one answer: its shape is the class.
Objects do not overlap. Shapes, colours and positions are drawn independently of each other.
"""
import time

import torch
import torch.nn.functional as F
from PIL import Image

import shapes
from progress import counted

FACTORS = shapes.FACTORS                # the same words; column and row: the third of the canvas
SIDE, OBJECTS = 48, 4                   # pixels; at most this many objects
RADII = torch.tensor([5.2, 6.6, 9.0])   # pixels, one per size
# The farthest that a pixel of an object lies from its middle, rounded up: 1.05 (jitter of the size)
# times 1.14 (the corner of an hourglass, in units of the radius)
REACH = torch.tensor([7, 8, 11], dtype=torch.short)
WINDOW = 24                             # pixels: an object is drawn in a square of this side
COUNTS = {"train": 50_000, "test": 10_000}


def choose_positions(u, size, present):
    """Middles on whole pixels, one object after the other, each uniform among those where it
    lies inside the canvas and touches no earlier one. u (4, n) in [0, 1); size (n, 4) int64, as
    indices into REACH; present (n, 4) bool -> x, y (n, 4) int64, and `present` without the objects
    for which none was left (1 in 500 scenes has one)."""
    axis = torch.arange(int(REACH.min()), SIDE - int(REACH.min()) + 1, dtype=torch.short)
    gy, gx = (g.flatten() for g in torch.meshgrid(axis, axis, indexing="ij"))
    border = torch.minimum(torch.minimum(gx, SIDE - gx), torch.minimum(gy, SIDE - gy))
    reach, present = REACH[size], present.clone()
    x, y = reach.new_zeros(2, *size.shape)
    for k in range(OBJECTS):
        free = border >= reach[:, k, None]                                      # (n, 35 * 35)
        for j in range(k):
            dx, dy = gx - x[:, j, None], gy - y[:, j, None]
            clear = dx * dx + dy * dy >= (reach[:, k, None] + reach[:, j, None]) ** 2
            free &= clear | ~present[:, j, None]
        present[:, k] &= free.any(1)
        rank = (u[k] * free.sum(1)).long()                      # which one of the free ones
        chosen = (free.cumsum(1, dtype=torch.short) > rank[:, None]).byte().argmax(1)
        x[:, k], y[:, k] = gx[chosen], gy[chosen]
    return x.long(), y.long(), present


def draw_scenes(indices, seed=0):
    """Scenes `indices` of stream `seed` -> (images (n, 3, 48, 48) uint8, factors: a dict of (n, 4)
    int64, one column an object, the large one first, the others by size, -1 where there is none;
    masks (n, 48, 48) uint8: 0 on the background, k on object k, counted from 1)."""
    # shapes.py uses the streams below 2^32
    u, noise = shapes.random_numbers(indices, seed + 2**32, 24 * (1 + OBJECTS), SIDE)
    scene, *objects = u.unflatten(0, (1 + OBJECTS, 24))             # (24, n) each
    number = 2 + (3 * scene[0]).long()
    present = torch.arange(OBJECTS) < number[:, None]                           # (n, 4)
    small = torch.stack([(2 * v[2]).long() for v in objects[1:]], 1).sort(1, descending=True).values
    size = torch.cat([torch.full_like(number, 2)[:, None], small], 1)           # (n, 4)
    x, y, present = choose_positions(torch.stack([v[12] for v in objects]), size, present)
    factors = {"shape": torch.stack([(10 * v[0]).long() for v in objects], 1),
               "colour": torch.stack([(8 * v[1]).long() for v in objects], 1), "size": size,
               "column": 3 * x // SIDE, "row": 3 * y // SIDE}
    images = shapes.draw_background(scene, *shapes.pixel_grid(SIDE))
    images = F.pad(images, [WINDOW // 2] * 4)                   # so that every window lies inside
    masks = torch.zeros(len(images), *images.shape[-2:], dtype=torch.uint8)
    px, py = (axis - WINDOW // 2 for axis in shapes.pixel_grid(WINDOW))      # middle: 0, 0
    image, window = torch.arange(len(images))[:, None, None], torch.arange(WINDOW)
    for k, v in enumerate(objects):
        radius = (RADII[size[:, k]] * (0.95 + 0.1 * v[14]))[:, None, None]
        paint, cover = shapes.draw_object(v, factors["shape"][:, k], factors["colour"][:, k],
                                          0, 0, radius, px, py)     # (n, 3, 24, 24), (n, 24, 24)
        cover = cover * present[:, k, None, None]
        cells = image, y[:, k, None, None] + window[:, None], x[:, k, None, None] + window
        pixels = images.permute(0, 2, 3, 1)                                     # a view
        pixels[cells] = torch.lerp(pixels[cells], paint.permute(0, 2, 3, 1), cover[..., None])
        masks[cells] = torch.where(cover > 0.5, k + 1, masks[cells])
    images, masks = (part[..., WINDOW // 2:-WINDOW // 2, WINDOW // 2:-WINDOW // 2]
                     for part in (images, masks))
    factors = {name: values.where(present, -1) for name, values in factors.items()}
    return shapes.add_noise(images, scene, noise), factors, masks


def load(split, limit=None, seed=0):
    """The first `limit` (default: COUNTS) scenes of split train or test, as `draw_scenes` returns
    them. The splits are different streams of the generator."""
    n, stream = limit or COUNTS[split], 2 * seed + (split == "test")
    chunks = [range(i, min(i + 500, n)) for i in range(0, n, 500)]
    parts = [draw_scenes(chunk, stream) for chunk in counted("drawing scenes", n, chunks)]
    images, factors, masks = zip(*parts)
    return (torch.cat(images), {name: torch.cat([f[name] for f in factors]) for name in FACTORS},
            torch.cat(masks))


def describe(factors, index, k):
    """Object k of scene `index` in words: "medium red disc, top left"."""
    values = {name: known[factors[name][index, k]] for name, known in FACTORS.items()}
    return "{size} {colour} {shape}, {row} {column}".format_map(values)


def main():
    start = time.perf_counter()
    images, factors, masks = load("train", 500)
    seconds = time.perf_counter() - start
    print(f"drew {len(images)} scenes of {SIDE} x {SIDE} pixels in {seconds:.2f} s; the first one:")
    for k in range(int(masks[0].max())):
        print(f"  {describe(factors, 0, k):35}{(masks[0] == k + 1).sum():4} pixels")
    sheet = images[:60].unflatten(0, (6, 10)).permute(0, 3, 1, 4, 2).reshape(6 * SIDE, 10 * SIDE, 3)
    large = Image.fromarray(sheet.numpy()).resize((1440, 864), Image.Resampling.NEAREST)
    large.save("scenes.png")
    print("scenes.png: the first 60")


if __name__ == "__main__":
    main()
