"""Draws each symbol with its attention map, one symbol over many images, and training curves.

    python visualize.py runs/a/ckpt.pt                               # Figures 1 and 5, test images
    python visualize.py runs/a/ckpt.pt cat.jpg dog.png --out figs    # Figure 1, your own images
    python visualize.py runs/a/ckpt.pt --symbol 279 --count 12       # Figure 5, that symbol
    python visualize.py --curves runs/a runs/b --out curves.png      # Figures 3 and 4

An attention map is the cross-attention of the descriptor's deepest block to the patches, mean over
heads (paper, Figure 1; model.Attention.weights). Symbols are hard (argmax), all is in float32.
Pillow draws, because a plotting library would be the largest dependency after PyTorch.
"""
import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont

import checkpoint
import data
import flags
from progress import counted

WIDTH, MARGIN, GAP = 1400, 24, 8        # pixels: the widest figure, its border, between images
CELL, CHIP, COLUMNS = 112, 22, 8        # an image's side, a chip's height, images in a line
INK, GREY, PALE = (25, 28, 33), (112, 117, 125), (228, 230, 234)
# Okabe and Ito's colours for the colour-blind, and four more, for the paper's nine runs
RUN_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b",
               "#9467bd", "#7f7f7f", "#000000")


class Sheet:
    """A white page in figure pixels. All is drawn SCALE times as large and averaged down at the
    end, because Pillow does not anti-alias shapes."""
    SCALE = 2

    def __init__(self, width, height):
        self.page = Image.new("RGB", (width * self.SCALE, height * self.SCALE), "white")
        self.draw = ImageDraw.Draw(self.page)

    def box(self, x, y, width, height, fill):
        corners = [v * self.SCALE for v in (x, y, x + width, y + height)]
        self.draw.rounded_rectangle(corners, 5 * self.SCALE, fill)

    def line(self, points, fill, width=1):
        points = [(x * self.SCALE, y * self.SCALE) for x, y in points]
        self.draw.line(points, fill, width * self.SCALE, joint="curve")

    def image(self, image, x, y, side):
        """uint8 (3, H, W), resized to side x side."""
        image = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        image = image.resize((side * self.SCALE, side * self.SCALE), Image.BICUBIC)
        self.page.paste(image, (x * self.SCALE, y * self.SCALE))

    def text(self, x, y, text, size=13, fill=INK, align="l", room=WIDTH):
        """At height y, from x rightwards (align "l"), around x ("m") or up to x ("r"). Text wider
        than `room` is cut short."""
        font, shortened = ImageFont.load_default(size * self.SCALE), text
        while shortened and font.getlength(text) > room * self.SCALE:
            shortened = shortened[:-1]
            text = shortened + "..."
        self.draw.text((x * self.SCALE, y * self.SCALE), text, fill, font, align + "m")

    def save(self, path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.page.reduce(self.SCALE).save(path)
        return Path(path)


# ---- Figure 1: sequences and attention maps ------------------------------------------------------

@torch.no_grad()
def symbols_and_maps(teacher, student, batches, size=None):
    """batches: an iterable of uint8 (b, 3, H, W), n images in all; size: side at which the teacher
    takes them (None: theirs) -> ids (n, T), attention maps (n, T, N) of sum 1, on the CPU."""
    device, ids, maps = next(student.parameters()).device, [], []
    for images in batches:
        z_t = teacher(data.normalize(images.to(device), size))                  # (b, N+1, d)
        sequence = student.describe(student.preprocess(z_t), hard=True, attention=True)
        ids.append(sequence.ids.cpu())
        maps.append(sequence.attention.cpu())
    return torch.cat(ids), torch.cat(maps)


def spread(n, count):
    """`count` of n indices, evenly spaced: varied even where the data set is sorted by class."""
    return torch.linspace(0, n - 1, min(n, count)).round().long()


def class_names(image_set, indices):
    """-> a list of strings, "" for an image without a class."""
    return [image_set.classes[y] if y >= 0 else "" for y in image_set.labels[indices].tolist()]


def chip_colours(symbol):
    """The symbol's colour, the same in every figure, and the ink legible on it: two (r, g, b).
    Golden-ratio steps round the circle of hues keep ids that are near each other apart."""
    hue, light = 360 * (symbol * 0.618034 % 1), (42, 56, 70)[symbol % 3]
    colour = ImageColor.getrgb(f"hsl({hue:.0f}, 62%, {light}%)")
    bright = np.dot(colour, (0.299, 0.587, 0.114)) > 140        # its luminance
    return colour, INK if bright else (255, 255, 255)


def draw_chip(sheet, x, y, symbol, width):
    """The id on the symbol's colour."""
    colour, ink = chip_colours(symbol)
    sheet.box(x, y, width, CHIP, colour)
    sheet.text(x + width / 2, y + CHIP / 2, str(symbol), 14, ink, "m")


def overlay(image, attention, side):
    """uint8 image (3, H, W) and an attention map (N,), sum 1, N square -> uint8 (3, side, side).

    Warm where the attention is high, dark and grey elsewhere. Full warmth is the map's peak, or
    four times uniform attention if the peak is lower, so that a uniform map appears flat and dim.
    """
    grid = math.isqrt(len(attention))
    heat = attention.view(1, 1, grid, grid) / max(float(attention.max()), 4 / grid**2)
    heat = F.interpolate(heat, (side, side), mode="bilinear")[0]                # (1, side, side)
    colour = F.interpolate(image[None] / 255, (side, side), mode="bicubic", antialias=True)[0]
    colour = colour.clamp(0, 1)                                                 # bicubic overshoots
    cold = (0.06 + 0.38 * colour.mean(0)) * torch.tensor([0.75, 0.85, 1.0]).view(3, 1, 1)
    warm = 0.62 * colour + 0.38 * torch.tensor([1.0, 0.72, 0.10]).view(3, 1, 1)
    return (255 * torch.lerp(cold, warm, heat)).round().byte()


def figure1(teacher, student, images, titles, path, size=None):
    """One row an image: the image, then each symbol of its sequence above its attention map.

    images: uint8 (n, 3, H, W); titles: n strings; size: side at which the teacher takes the images
    (None: theirs) -> path. Our choice: a symbol and its map share a column, where the paper draws
    the sequence apart, so that nobody has to count.
    """
    ids, maps = symbols_and_maps(teacher, student, images.split(128), size)
    n, length = ids.shape
    cell = min(CELL, (WIDTH - 2 * MARGIN - 2 * GAP) // (length + 1) - GAP)
    left, top, column, row = MARGIN + cell + 3 * GAP, MARGIN + 50, cell + GAP, cell + CHIP + 20
    sheet = Sheet(left + length * column - GAP + MARGIN, top + n * row - 2 * GAP + MARGIN)
    sheet.text(MARGIN, MARGIN + 6, "image", 14)
    sheet.text(left, MARGIN + 6, "symbols in the order emitted, and their attention maps", 14)
    for t in range(length):
        sheet.text(left + t * column + cell / 2, MARGIN + 34, str(t + 1), 13, GREY, "m")
    for i in range(n):
        y = top + i * row
        sheet.text(MARGIN, y + CHIP / 2, titles[i], 14, room=cell)
        sheet.image(images[i], MARGIN, y + CHIP + 4, cell)
        for t, symbol in enumerate(ids[i].tolist()):
            x = left + t * column
            draw_chip(sheet, x, y, symbol, cell)
            sheet.image(overlay(images[i], maps[i, t], 2 * cell), x, y + CHIP + 4, cell)
    return sheet.save(path)


# ---- Figure 5: one symbol ------------------------------------------------------------------------

SPECIFIC = ("the symbol most specific to one class, among those of at least 1 % of the images "
            "(without classes: the most frequent one)")


def specific_symbol(ids, labels):
    """ids (n, T), labels (n,), -1 = none -> SPECIFIC: the symbol whose images are most often of a
    single class. Our choice, as the paper does not state how it found 279; a rare symbol can seem
    specific by chance, hence the 1 %."""
    emitted = torch.zeros(len(ids), int(ids.max()) + 1).scatter_(1, ids, 1.0)   # (n, K) 0 or 1
    uses, known = emitted.sum(0), labels >= 0
    if not known.any():
        return int(uses.argmax())
    share = (F.one_hot(labels[known]).T.float() @ emitted[known]).amax(0) / uses.clamp(min=1)
    often = (uses > 0) & (uses >= min(0.01 * len(ids), float(uses.max())))
    return max(often.nonzero().flatten().tolist(), key=lambda s: (float(share[s]), float(uses[s])))


def symbol_facts(ids, image_set, symbol):
    """Two lines: how many images, of which class, emit the symbol; its uses at each position."""
    n, users = len(ids), (ids == symbol).any(1)
    uses = int(users.sum())
    often = f"symbol {symbol}: emitted for {uses} of {n} test images ({100 * uses / n:.1f} %)"
    counts = [int((image_set.labels[users] == c).sum()) for c in range(len(image_set.classes))]
    if any(counts):
        name = image_set.classes[counts.index(max(counts))]
        often += f', {100 * max(counts) / uses:.0f} % of them "{name}"'
    shares = (ids == symbol).sum(0)
    shares = enumerate((100 * shares / shares.sum()).tolist(), 1)
    return often, "its uses by position" + "".join(f"     {t}: {p:.0f} %" for t, p in shares if p)


def figure5(teacher, student, image_set, folder, symbol=None, count=24, size=None):
    """Images for which the student emits one symbol, each above the symbol's attention map.

    symbol: an id, or None for `specific_symbol`'s choice; size: as in `figure1`. Shown are `count`
    images, evenly spread over all that have it, none picked by hand, and at which positions they
    have it: in the recipe `stable` each position has its own codebook, and that symbol k points the
    same way in all of them holds only as well as they could be matched.
    -> FOLDER/figure5_symbol<ID>.png. Raises ValueError if no image has the symbol.
    """
    batches = counted("images described", len(image_set),
                      image_set.batches(torch.arange(len(image_set)).split(128)))
    ids, maps = symbols_and_maps(teacher, student, batches, size)
    best = specific_symbol(ids, image_set.labels)
    why = "given by --symbol" if symbol is not None else "chosen as " + SPECIFIC
    symbol = best if symbol is None else symbol
    users = (ids == symbol).any(1).nonzero().flatten()
    if not len(users):
        raise ValueError(f"none of {len(ids)} test images has symbol {symbol}; try {best}")
    users = users[spread(len(users), count)]
    top, column, row = MARGIN + 80, CELL + GAP, 2 * CELL + 38
    lines = math.ceil(len(users) / COLUMNS)
    sheet = Sheet(2 * MARGIN + COLUMNS * column - GAP, top + lines * row - 2 * GAP + MARGIN)
    frequency, by_position = symbol_facts(ids, image_set, symbol)
    draw_chip(sheet, MARGIN, MARGIN, symbol, 64)
    sheet.text(MARGIN + 76, MARGIN + CHIP / 2, frequency, 16)
    sheet.text(MARGIN, MARGIN + 38, by_position, 13, GREY, room=COLUMNS * column)
    sheet.text(MARGIN, MARGIN + 58, why, 13, GREY)
    shown = zip(users.tolist(), image_set.get(users), class_names(image_set, users))
    for i, (user, image, name) in enumerate(shown):
        x, y = MARGIN + i % COLUMNS * column, top + i // COLUMNS * row
        positions = (ids[user] == symbol).nonzero().flatten()
        title = "at " + ", ".join(str(t + 1) for t in positions.tolist())
        sheet.text(x, y + 8, f"{title}: {name}" if name else title, room=CELL)
        sheet.image(image, x, y + 20, CELL)
        attention = maps[user, positions].mean(0)
        sheet.image(overlay(image, attention, 2 * CELL), x, y + 22 + CELL, CELL)
    return sheet.save(Path(folder) / f"figure5_symbol{symbol}.png")


# ---- Figures 3 and 4: training curves ------------------------------------------------------------

PANELS = {"knn_top1": "k-NN top-1, %", "loss": "loss",
          "teacher_entropy": "teacher entropy, nats (dashed: ln P)", "kl": "KL(teacher, student)",
          "symbol_entropy": "symbol entropy, nats", "information": "information I(s), nats",
          "perplexity": "perplexity, mean over positions",
          "codebook_usage": "codebook usage, share of the vocabulary"}


def read_metrics(run):
    """RUN/metrics.jsonl -> its rows by epoch; the later of two for one epoch. Half a line at the
    end, which a running run is writing, is left out. Raises OSError or ValueError with the name."""
    path = Path(run) / "metrics.jsonl"
    try:
        lines = path.read_text().split("\n")[:-1]
        rows = {row["epoch"]: row for row in map(json.loads, lines)}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not one row of metrics a line ({error})") from None
    if not rows:
        raise ValueError(f"{path} holds no epoch yet")
    return [rows[epoch] for epoch in sorted(rows)]


def series(rows, key):
    """[(epoch, value)] where the value exists and is finite; of a list, the mean of its values."""
    points = [(row["epoch"], np.mean(row[key])) for row in rows if row.get(key) not in (None, [])]
    return [(epoch, float(value)) for epoch, value in points if math.isfinite(value)]


def nice_ticks(low, high, least=0.0):
    """About five numbers, 1, 2 or 5 times a power of ten and at least `least` apart, the first at
    or below `low`, the last at or above `high`: an axis begins and ends on a tick."""
    if low == high:                                     # a single value gets room on both sides
        room = max(abs(low) / 10, least, 1e-6)
        low, high = low - room, high + room
    raw = max((high - low) / 5, least)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def plot(sheet, box, title, lines, levels=()):
    """A panel in box (left, top, right, bottom). lines: [(colour, [(epoch, value)])]; levels: of
    dashed lines. A line that leaves out epochs gets a dot at each value, so that it does not
    seem measured in all. -> to_pixels(epoch, value); None without any value."""
    left, top, right, bottom = box
    sheet.text(left, top - 16, title, 14)
    points = [point for _, values in lines for point in values]
    if not points:
        return sheet.text(left, (top + bottom) / 2, "not measured", 13, GREY)
    epochs, values = [x for x, _ in points], [y for _, y in points] + list(levels)
    xs, ys = nice_ticks(min(epochs), max(epochs), least=1), nice_ticks(min(values), max(values))

    def to_pixels(x, y):
        return (left + (x - xs[0]) / (xs[-1] - xs[0]) * (right - left),
                bottom - (y - ys[0]) / (ys[-1] - ys[0]) * (bottom - top))

    digits = max(0, -math.floor(math.log10(ys[1] - ys[0]) + 1e-9))
    for tick in ys:
        _, y = to_pixels(xs[0], tick)
        sheet.line([(left, y), (right, y)], PALE if tick > ys[0] else GREY)
        sheet.text(left - 7, y, f"{tick:.{digits}f}", 12, GREY, "r")
    for tick in xs:
        sheet.text(to_pixels(tick, ys[0])[0], bottom + 14, f"{tick:.0f}", 12, GREY, "m")
    for _, y in (to_pixels(xs[0], level) for level in levels):
        for x in range(left, right, 10):
            sheet.line([(x, y), (x + 5, y)], GREY)
    for colour, values in lines:
        pixels = [to_pixels(*point) for point in values]
        sheet.line(pixels, colour, 2)
        if len(values) == 1 or values and values[-1][0] - values[0][0] >= len(values):
            for x, y in pixels:
                sheet.box(x - 3, y - 3, 6, 6, colour)           # corners so round that it is a dot
    return to_pixels


def panel(sheet, x, y, width, height, key, tables):
    """The curve of metric `key` of PANELS, a line for each table of `read_metrics`, at (x, y)."""
    lines = [(colour, series(rows, key)) for colour, rows in zip(RUN_COLOURS, tables)]
    levels = {level for rows in tables for _, level in series(rows, key + "_max")}
    plot(sheet, (x, y, x + width - 70, y + height - 74), PANELS[key], lines, levels)
    sheet.text(x + width - 70, y + height - 44, "epoch", 12, GREY, "r")


def curves(runs, path, keys=tuple(PANELS)):
    """Training curves of the runs (folders with metrics.jsonl) in one PNG, a panel for each of
    `keys` (of PANELS). -> path. Raises FileNotFoundError for a folder without metrics, ValueError
    for an empty or foreign file."""
    if len(runs) > len(RUN_COLOURS):
        raise ValueError(f"{len(runs)} runs: at most {len(RUN_COLOURS)} can be distinguished")
    tables = [read_metrics(run) for run in runs]
    names = [Path(run).resolve().name for run in runs]
    names = [str(run) if names.count(name) > 1 else name for run, name in zip(runs, names)]
    columns, height = 3 if len(keys) % 3 == 0 else 4, 254           # full rows
    width = (WIDTH - 2 * MARGIN) // columns
    top = MARGIN + math.ceil(len(runs) / columns) * 22 + 34
    sheet = Sheet(WIDTH, top + math.ceil(len(keys) / columns) * height - 22)
    for i, name in enumerate(names):
        x, y = MARGIN + 44 + i % columns * width, MARGIN + 6 + i // columns * 22
        sheet.line([(x, y), (x + 24, y)], RUN_COLOURS[i], 3)
        sheet.text(x + 32, y, name, 14, room=width - 44)
    for i, key in enumerate(keys):
        x, y = MARGIN + 44 + i % columns * width, top + i // columns * height
        panel(sheet, x, y, width, height, key, tables)
    return sheet.save(path)


# ---- the command ---------------------------------------------------------------------------------

def draw_checkpoint(args):
    """Figure 1, and Figure 5 unless only image files were given. Yields their paths."""
    config, teacher, student = checkpoint.load_model(args.checkpoint, args.device)
    size, out = config["image_size"], Path(args.out)
    images = [data.read_image(path, size) for path in args.images]
    titles = [Path(path).stem for path in args.images]
    if args.symbol is not None or not images:
        name = args.data or config["data"]
        image_set = data.load(name, "test", size, args.limit, config["seed"])
        yield figure5(teacher, student, image_set, out, args.symbol, 3 * args.count, size)
    if not images:
        shown = spread(len(image_set), args.count)
        images, titles = image_set.get(shown), class_names(image_set, shown)
    yield figure1(teacher, student, torch.stack([*images]), titles, out / "figure1.png", size)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=flags.HelpFormatter,
        usage="visualize.py RUN/ckpt.pt [IMAGE ...], or visualize.py --curves RUN ... (-h: more)")
    add = parser.add_argument
    add("checkpoint", nargs="?", metavar="RUN/ckpt.pt", help="for Figures 1 and 5")
    add("images", nargs="*", metavar="IMAGE", help="files for Figure 1 (default: test images)")
    add("--out", default=".", help="folder for the figures; with --curves also a FILE.png")
    add("--symbol", type=int, help=f"Figure 5's symbol (default: {SPECIFIC.replace('%', '%%')})")
    add("--count", type=int, default=8, help="rows of Figure 1; Figure 5 has three images for each")
    add("--data", help="take the test images from here (default: the run's own data set)")
    add("--limit", type=int, default=2000, help="test images to read: fewer are faster, more make "
        "Figure 5's percentages surer")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--curves", nargs="+", metavar="RUN", help="draw the training curves of these folders")
    args = parser.parse_args(argv)
    if bool(args.curves) == bool(args.checkpoint) or min(args.count, args.limit) < 1:
        parser.error("give a checkpoint, or --curves RUN ...; --count and --limit are at least 1")
    try:
        if args.curves:
            out = Path(args.out)
            print(curves(args.curves, out if out.suffix == ".png" else out / "curves.png"))
        else:
            print(*draw_checkpoint(args), sep="\n")
    except (ValueError, OSError) as error:
        raise SystemExit(f"visualize.py: {error}") from None


if __name__ == "__main__":
    main()
