"""A scene in words made of its symbols, and the share of scenes for which the words are right.

    python -m extras.sentences RUN/ckpt.pt --out sentences.png --json FILE      # a run on scenes

1. Symbol table: for each position and symbol the lift of every factor value, of the object that the
   symbol attends to, over training scenes (extras.objects.lift_table; so masks are used here).
2. The symbols of a test scene whose attention maps have a cosine of 0.5 or more are one group.
3. A group's words: for size, colour and shape the value v with the largest
   P(v) * product over its symbols s of lift(s, v), normalised over v, where that is at least 0.75;
   and the third of the image that has the maps' mean position. No colour and no shape: no phrase.
4. A scene is right if there is a phrase and each is true of a different object; complete if also
   every object has one. The same with the positions. Control: the objects of other scenes.
"""
import argparse
import math
from itertools import permutations
from pathlib import Path

import torch
import torch.nn.functional as F

import checkpoint
import data
import flags
from extras import measures, objects
from scenes import FACTORS
from visualize import CHIP, GAP, MARGIN, Sheet, chip_colours, draw_chip

NAMED = ("size", "colour", "shape")     # factors that symbols name; the map gives column and row
CELL, COLUMN, LINE = 224, 316, 25       # pixels: a scene's side, its column, a line of text
IN_ROW = 4                              # scenes


# ---- from symbols to phrases ---------------------------------------------------------------------

def log_lifts(ids, attended, factors, vocab):
    """-> {factor: (log lift (T, vocab, V), log prior (V,))} for the values of attended objects:
    ids and attended (n, T), factors {name: (n, K)}. The prior is of all positions together, so
    that a position with another distribution has a lift too."""
    tables = {}
    for name in NAMED:
        values, number = factors[name].gather(1, attended), len(FACTORS[name])
        prior = F.one_hot(values, number).double().mean((0, 1))                 # (V,)
        by_position = F.one_hot(values, number).double().mean(0)                # (T, V)
        given = objects.lift_table(ids, values, vocab, number) * by_position[:, None]
        tables[name] = [x.clamp(min=1e-6).log() for x in (given / prior.clamp(min=1e-6), prior)]
    return tables


def groups_of(maps, least=0.5):
    """maps (n, T, N) -> (n, T) int64: the first position of each symbol's group, the connected
    component under a cosine of `least` or more."""
    maps = F.normalize(maps, dim=-1)
    linked = (maps @ maps.transpose(1, 2) >= least).float()
    for _ in range(max(1, math.ceil(math.log2(maps.shape[1])))):
        linked = (linked @ linked > 0).float()
    return linked.argmax(2)


def third(maps):
    """maps (n, N), N square -> column, row (n,) int64 in 0..2 of their mean positions."""
    grid = math.isqrt(maps.shape[1])
    axis = (torch.arange(grid) + 0.5) / grid
    square = maps.float().unflatten(1, (grid, grid)) / maps.sum(1)[:, None, None]
    return [(3 * (square.sum(dim) @ axis)).long().clamp(0, 2) for dim in (1, 2)]


def phrases_of(ids, maps, tables, least=0.75):
    """ids (n, T), maps (n, T, N) -> for each image a list of phrases: {"symbols": positions, "map":
    (N,), "column", "row": int, and "size", "colour", "shape" where they are named: int}."""
    groups, phrases = groups_of(maps), [[] for _ in ids]
    for first in range(ids.shape[1]):
        member = (groups == first).double()                                     # (n, T)
        some = member.sum(1).nonzero().flatten()
        if not len(some):
            continue
        weights = member[some].float()
        mean = (weights[:, None] @ maps[some])[:, 0] / weights.sum(1)[:, None]
        column, row = third(mean)
        named = {}
        for name, (lift, prior) in tables.items():
            evidence = lift[torch.arange(ids.shape[1]), ids[some]]              # (m, T, V)
            posterior = (prior + (member[some, :, None] * evidence).sum(1)).softmax(1)
            share, value = posterior.max(1)
            named[name] = torch.where(share >= least, value, -1).tolist()
        for j, i in enumerate(some.tolist()):
            phrase = {name: values[j] for name, values in named.items() if values[j] >= 0}
            if "colour" in phrase or "shape" in phrase:
                phrases[i].append(phrase | {
                    "symbols": member[i].nonzero().flatten().tolist(), "map": mean[j],
                    "column": column[j].item(), "row": row[j].item()})
    return phrases


def text_of(phrase):
    """"small blue star, top left"; what is not named is left out, or "object"."""
    value = {name: FACTORS[name][phrase[name]] for name in FACTORS if name in phrase}
    noun = " ".join([value[name] for name in NAMED if name in value]
                    + ["object"] * ("shape" not in value))
    position = dict.fromkeys((value["row"], value["column"]))           # "middle", not twice
    return f"{noun}, {' '.join(position)}"


# ---- are they right ------------------------------------------------------------------------------

def matched(phrases, true_objects, names):
    """Whether each phrase is true of a different object of the scene: true_objects is
    a list of {factor: value}, names the factors that count where a phrase has them."""
    fits = [[all(phrase[name] == thing[name] for name in names if name in phrase)
             for thing in true_objects] for phrase in phrases]
    return len(phrases) <= len(true_objects) and any(
        all(row[k] for row, k in zip(fits, order))
        for order in permutations(range(len(true_objects)), len(phrases)))


def shares(phrases, factors):
    """Lists of phrases of n scenes, factors {name: (n, K)} -> shares of the scenes in 0..1."""
    columns, counts = {name: values.tolist() for name, values in factors.items()}, {}
    for i, scene in enumerate(phrases):
        number = sum(value >= 0 for value in columns["shape"][i])
        things = [{name: values[i][k] for name, values in columns.items()} for k in range(number)]
        for label, names in (("", NAMED), ("_with_position", (*NAMED, "column", "row"))):
            right = bool(scene) and matched(scene, things, names)
            counts[f"right{label}"] = counts.get(f"right{label}", 0) + right
            complete = right and len(scene) == number
            counts[f"complete{label}"] = counts.get(f"complete{label}", 0) + complete
    return {name: count / len(phrases) for name, count in counts.items()}


# ---- the figure ----------------------------------------------------------------------------------

def outlined(image, phrases, ids, side):
    """uint8 image (3, H, W) -> (3, side, side) with an outline around each phrase's region, where
    its map is above half of its maximum, in the colour of its first symbol; ids (T,)."""
    page = F.interpolate(image[None] / 255, (side, side), mode="bicubic").clamp(0, 1)[0]
    for phrase in phrases:
        grid = math.isqrt(len(phrase["map"]))
        heat = F.interpolate(phrase["map"].view(1, 1, grid, grid), (side, side), mode="bicubic")
        inside = (heat > heat.max() / 2).float()
        wide, wider = (F.max_pool2d(inside, 2 * width + 1, 1, width)[0]
                       for width in (side // 90, side // 60))
        colour, _ = chip_colours(int(ids[phrase["symbols"][0]]))
        page = torch.where(wider > wide, 1.0, page)                 # white around the colour
        page = torch.where(wide > inside[0], torch.tensor(colour).view(3, 1, 1) / 255, page)
    return (255 * page).round().byte()


def figure(images, ids, phrases, path):
    """A cell for each scene: the outlined image, and under it a line for each phrase: its symbols,
    as chips in their colours, and its words. images (n, 3, H, W) uint8, ids (n, T)."""
    row = CELL + max(map(len, phrases)) * LINE + 3 * GAP
    top = MARGIN + 34
    sheet = Sheet(2 * MARGIN + IN_ROW * COLUMN, top + math.ceil(len(images) / IN_ROW) * row)
    sheet.text(MARGIN, MARGIN + 8, "outlined: where symbols attend; below: these symbols, and what "
               "they stand for in training scenes", 14)
    for i, (image, scene) in enumerate(zip(images, phrases)):
        x, y = MARGIN + i % IN_ROW * COLUMN, top + i // IN_ROW * row
        sheet.image(outlined(image, scene, ids[i], 2 * CELL), x, y, CELL)
        for j, phrase in enumerate(scene):
            line, left = y + CELL + GAP + j * LINE, x
            for t in phrase["symbols"]:
                draw_chip(sheet, left, line, int(ids[i, t]), 30)
                left += 33
            sheet.text(left + 3, line + CHIP / 2, text_of(phrase), 13, room=x + COLUMN - left - 12)
    return sheet.save(path)


def run(args):
    checkpoint.check_folder(args.json)
    config, teacher, student = checkpoint.load_model(args.checkpoint, args.device)
    if config["data"] != "scenes":
        raise ValueError(f"{args.checkpoint} is of {config['data']}; sentences need scenes")
    torch.manual_seed(args.seed)
    sets = [data.load("scenes", split, config["image_size"], n, config["seed"])
            for split, n in (("train", args.train_images), ("test", args.images))]
    results = [measures.describe(teacher, student, config["image_size"], s.images) for s in sets]
    (train_ids, train_maps), (ids, maps) = results
    attended = objects.attended_object(
        train_maps, objects.object_cover(sets[0].masks, train_maps.shape[2]))
    tables = log_lifts(train_ids, attended, sets[0].factors, config["vocab"])
    phrases = phrases_of(ids, maps, tables)
    factors = sets[1].factors
    control = {name: values.roll(len(values) // 2, 0) for name, values in factors.items()}
    record = {"train_images": len(sets[0]), "images": len(sets[1]), "seed": args.seed,
              "phrases_per_scene": sum(map(len, phrases)) / len(phrases),
              "objects_per_scene": (factors["shape"] >= 0).double().sum(1).mean().item(),
              "measured": shares(phrases, factors), "other_scenes": shares(phrases, control)}
    for name, share in record["measured"].items():
        print(f"{name:24}{share:6.3f}   with the objects of other scenes "
              f"{record['other_scenes'][name]:6.3f}")
    if args.json:
        checkpoint.write_json(args.json, record)
    if args.out:
        some = slice(args.first, args.first + args.count)
        print(figure(sets[1].images[some], ids[some], phrases[some], args.out))


def parse(argv=None):
    p = argparse.ArgumentParser(prog="python -m extras.sentences", description=__doc__,
                                formatter_class=flags.HelpFormatter)
    add = p.add_argument
    add("checkpoint", type=Path, help="RUN/ckpt.pt, of a run on scenes")
    add("--train-images", type=int, default=5000, help="scenes for the symbol table")
    add("--images", type=int, default=2000, help="test scenes")
    add("--seed", type=int, default=0)
    add("--out", type=Path, metavar="PNG", help="draw scenes, their symbols and words")
    add("--first", type=int, default=0, help="the first test scene of the figure")
    add("--count", type=int, default=8, help="scenes in the figure")
    add("--json", type=Path, metavar="FILE", help="also write the record there")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return p.parse_args(argv)


def main():
    try:
        run(parse())
    except (ValueError, OSError) as error:
        raise SystemExit(f"extras.sentences: {error}") from None


if __name__ == "__main__":
    main()
