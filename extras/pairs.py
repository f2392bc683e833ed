"""Drawn scenes of two objects whose class is their relation, and the swapped-order test.

    python -m extras.regions order runs/regions/ckpt.pt --json results/order.json  # of --data pairs

An image of `pairs` has two of four shapes (disc, square, triangle, star), each of one of four
colours (red, yellow, green, azure) and of any size in a range. Its class is the relation of the
object whose shape comes first in that list to the other one: left, right, above or below. So the
linear probe at the end of a run is the relation probe, of chance 25 %. extras.regions makes `pairs`
a data set and has the commands that train on it.

The swapped-order test exchanges the places of the two objects of a test image. A linear probe of
z_s, fitted to training images, should find an image's relation more likely than the exchanged one
(`order`, chance 50 %), and that in both images of a pair (`order_of_both`, chance 25 %). It is the
drawn counterpart of COCO-Order in Kalibhat, dissertation, chapter 6. The same figures of the CLS
are the reference, because z_s is trained to match it, and not to have what the CLS lacks.
"""
import argparse
from pathlib import Path
from types import SimpleNamespace

import torch

import checkpoint
import data
import evaluate
import flags
import scoring
import shapes

RELATIONS = ["left", "right", "above", "below"]
STEPS = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])       # of the first object, in x and y
SHAPES, COLOURS = torch.tensor([0, 2, 3, 4]), torch.tensor([0, 2, 3, 5])    # of shapes.FACTORS
COUNTS = {"train": 20_000, "test": 5_000}
ORDER_COUNTS = {"train": 5_000, "test": 2_000}              # of the swapped-order test
STREAMS = {"train": 2**33, "test": 2**33 + 1}               # shapes.py and scenes.py have others


# ---- the images ----------------------------------------------------------------------------------

def draw_pairs(indices, split, swapped=False):
    """-> images (n, 3, 32, 32) uint8, relations (n,) int64, masks (n, 32, 32) int64: 0 ground, 1
    and 2 the objects. swapped: the two objects exchange their positions."""
    u, noise = shapes.random_numbers(indices, STREAMS[split], 3 * 24)
    scene, *objects = u.unflatten(0, (3, 24))                                   # (24, n) each
    relation, grid = (4 * scene[0]).long(), shapes.pixel_grid(shapes.SIDE)
    first, second = (4 * scene[1]).long(), (3 * scene[2]).long()
    shape = torch.stack([first, second + (second >= first)]).sort(0).values     # two different ones
    images = shapes.draw_background(scene, *grid)
    masks = torch.zeros(1, dtype=torch.long)
    for i, v in enumerate(objects):
        slot = i ^ swapped
        x, y = (16 + 7.5 * (1 - 2 * slot) * STEPS[relation, axis]
                + 3 * (objects[slot][12 + axis] - 0.5) for axis in range(2))    # pixels
        paint, cover = shapes.draw_object(
            v, SHAPES[shape[i]], COLOURS[(4 * v[1]).long()],
            *(value[:, None, None] for value in (x, y, 5 + 2.5 * v[14])), *grid)
        images = torch.lerp(images, paint, cover[:, None])
        masks = torch.where(cover > 0.5, i + 1, masks)
    return shapes.add_noise(images, scene, noise), relation ^ int(swapped), masks


def pairs(split):
    """What data.load_public wants of a data set."""
    parts = [draw_pairs(indices, split) for indices in torch.arange(COUNTS[split]).split(1000)]
    images, relation, _ = map(torch.cat, zip(*parts))
    return SimpleNamespace(data=images.permute(0, 2, 3, 1).numpy(), targets=relation.tolist(),
                           classes=RELATIONS)


# ---- the swapped-order test ----------------------------------------------------------------------

def order_figures(x, y):
    """Features and relations [train, test, exchanged test] -> figures in %."""
    probe, _ = scoring.fit_probe(x[0], y[0], len(RELATIONS))
    scores = [probe(part) for part in x[1:]]
    own = [s.gather(1, t[:, None]) > s.gather(1, t[:, None] ^ 1) for s, t in zip(scores, y[1:])]
    top1 = [(s.argmax(1) == t).float().mean() for s, t in zip(scores, y[1:])]
    shares = {"relation_top1": sum(top1) / 2, "order": torch.cat(own).float().mean(),
              "order_of_both": (own[0] & own[1]).float().mean()}
    return {name: round(100 * share.item(), 2) for name, share in shares.items()}


def order_test(path, device):
    """RUN/ckpt.pt of --data pairs -> {"z_s", "cls", "space"}: `order_figures` of all symbols, of
    the teacher's CLS and of the CLS in the student's space, which z_s is trained to match."""
    config, teacher, student = checkpoint.load_model(path, device)
    if config["data"] != "pairs":
        raise ValueError(f"{path} was not trained on --data pairs")
    features, y = {"z_s": [], "cls": [], "space": []}, []
    for split, swapped in (("train", 0), ("test", 0), ("test", 1)):
        images, relation, _ = draw_pairs(range(ORDER_COUNTS[split]), split, swapped)
        images = data.ImageSet(images, relation, RELATIONS)
        part = evaluate.encode(student, teacher, images, 32)
        for name, x in features.items():
            x.append(part["z"][-1] if name == "z_s" else part[name])
        y.append(relation)
    return {name: order_figures(x, y) for name, x in features.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=flags.HelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="RUN/ckpt.pt")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
    try:
        checkpoint.check_folder(args.json)
        figures = order_test(args.checkpoint, args.device)
    except (ValueError, OSError) as error:
        raise SystemExit(f"extras.regions: {error}") from None
    for name, row in figures.items():
        print(f"{name:6}" + "".join(f"  {key} {value:6.2f}" for key, value in row.items()))
    if args.json:
        checkpoint.write_json(args.json, figures)
