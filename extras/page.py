"""A student's symbols as one HTML page: training curves, samples, symbol table, tree of prefixes.

    python -m extras.page RUN/ckpt.pt -o page.html
    python -m extras.page RUN/ckpt.pt --images 5000 --symbols 128       # surer figures, larger file
    python -m extras.page RUN/ckpt.pt --concepts concepts.json      # with extras/falcon.py's words

The page needs nothing else: its images are inside, and it has no script and needs no network. The
lift compares the images that have a symbol with all images whose value (a class, a colour, ...) is
known:

    lift(value | symbol) = P(value | symbol at that position) / P(value)

Symbols are hard (argmax) and in float32, because in bfloat16 the batch size would decide between
near-equal logits.
"""
import argparse
import base64
import io
import json
import math
from functools import cached_property
from html import escape
from pathlib import Path
from string import Template

import torch
from PIL import Image

import checkpoint
import data
import flags
import visualize
from extras import codes
from progress import counted
from shapes import FACTORS

BATCH = 128                         # images at a time
THUMB = 64                          # pixels: the side of a thumbnail; smaller images keep theirs
SAMPLES = 8                         # rows of samples
EXAMPLES, VALUES, CO_OCCURRING = 8, 3, 4        # in the entry of a symbol
GROUPS, BRANCHES, MEMBERS = 24, 6, 6            # first symbols, second symbols of each, images

TEMPLATE = Path(__file__).with_suffix(".html")      # the page's text and its style


# ---- what occurs with a symbol -------------------------------------------------------------------

def attributes(image_set):
    """What is known of an ImageSet's n images: {name: (values (n,) int64, -1 = unknown, names)}.
    The factors of `shapes` contain its classes; other data has classes or nothing."""
    if image_set.factors:
        return {name: (values, FACTORS[name]) for name, values in image_set.factors.items()}
    if (image_set.labels >= 0).any():
        return {"class": (image_set.labels, image_set.classes)}
    return {}


def lifts(chosen, values, names):
    """chosen (n,) bool, values (n,) as in `attributes` -> [(name, lift, hits)] of the values that
    occur in the chosen images of known value, in `hits` of them.

    The first has the largest hits * log(lift), its share of the divergence between the chosen
    images and all. By lift alone, one odd image of a rare class would come first."""
    known = values >= 0
    total = values[known].bincount(minlength=len(names)).tolist()
    hits = values[known & chosen].bincount(minlength=len(names)).tolist()
    uses, n = sum(hits), sum(total)
    rows = [(names[c], h * n / (uses * total[c]), h) for c, h in enumerate(hits) if h]
    return sorted(rows, key=lambda row: (-row[2] * math.log(row[1]), -row[2]))


def most_informative_position(ids, symbol, known):
    """The position, from 0, where a symbol has the largest hits * log(lift) (see `lifts`) for any
    of the attributes; where nothing is known, or equal, the one where it is most frequent. A symbol
    can stand for something else at every position."""
    def information(t):
        chosen = ids[:, t] == symbol
        rows = [lifts(chosen, *attribute) for attribute in known.values()]
        best = [hits * math.log(lift) for _, lift, hits in (row[0] for row in rows if row)]
        return max(best, default=0), chosen.sum().item()
    return max(range(ids.shape[1]), key=information)


def co_occurrence(present, symbol, count):
    """present (n, K) bool -> the `count` other symbols most often in sequences that contain
    `symbol`: [(symbol, images)], the most frequent first, without those that never do."""
    together = present[present[:, symbol]].sum(0)
    together[symbol] = 0
    images, order = together.sort(descending=True, stable=True)
    return [(s, m) for s, m in zip(order[:count].tolist(), images[:count].tolist()) if m]


def prefix_groups(ids, members, t, count):
    """The images `members` (m,), grouped by their symbol at position t of ids (n, T): [(symbol,
    members)] of the `count` largest groups, the largest first."""
    symbols, sizes = ids[members, t].unique(return_counts=True)
    order = sizes.argsort(descending=True, stable=True)[:count]
    return [(s, members[ids[members, t] == s]) for s in symbols[order].tolist()]


# ---- pieces of HTML ------------------------------------------------------------------------------

def img_tag(image, alt="", file_format="JPEG", style=""):
    """A PIL image -> an <img> that contains it. style: a class of page.html."""
    file = io.BytesIO()
    options = {"quality": 80, "subsampling": 0} if file_format == "JPEG" else {}
    image.save(file, file_format, **options)
    code = base64.b64encode(file.getvalue()).decode()
    style = f' class="{style}"' if style else ""
    return (f'<img{style} alt="{escape(alt)}" '
            f'src="data:image/{file_format.lower()};base64,{code}">')


def thumbnail(pixels, side, alt=""):
    """uint8 (3, H, W) -> an <img> of at most `side` pixels; tiny images keep theirs."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    style = "pixels" if image.width <= 32 else ""
    if image.width > side:
        image = image.resize((side, side), Image.BICUBIC)
    return img_tag(image, alt, style=style)


def chip(symbol, link=True):
    """The id on its colour, a link to its entry in the symbol table."""
    colour, ink = visualize.chip_colours(symbol)
    tag, target = ("a", f' href="#s{symbol}"') if link else ("span", "")
    style = f"background:rgb{colour};color:rgb{ink}"
    return f'<{tag} class="chip" style="{style}"{target}>{symbol}</{tag}>'


def top_values(chosen, attribute, count, least=0):
    """The `count` first values of `lifts` for the images chosen (n,) bool: "disc × 3.20 (8), ...",
    without those of a lift below 1 and those of fewer than `least` images."""
    rows = [row for row in lifts(chosen, *attribute) if row[1] >= 1 and row[2] >= least]
    return ", ".join(f'{escape(value)} ×&nbsp;{lift:.2f}&nbsp;<span class="quiet">({hits})</span>'
                     for value, lift, hits in rows[:count])


class Codes:
    """The codes of an ImageSet: ids (n, T) in 0..vocab-1, attention (n, T, N), and what the parts
    of the page derive from them."""

    def __init__(self, ids, attention, image_set, vocab, concepts=None):
        """concepts: symbol -> its words by extras/falcon.py, a string (see `read_concepts`)."""
        self.concepts = concepts or {}
        self.ids, self.attention, self.image_set, self.vocab = ids, attention, image_set, vocab
        self.attributes, self.thumbs = attributes(image_set), {}
        self.names = visualize.class_names(image_set, torch.arange(len(ids)))   # n strings

    @cached_property
    def present(self):
        """(n, K) bool: whether the symbol occurs in the image's sequence."""
        return torch.zeros(len(self.ids), self.vocab, dtype=torch.bool).scatter_(1, self.ids, True)

    def pixels(self, i):
        """Image i, uint8 (3, H, W)."""
        return self.image_set.get(torch.tensor([i]))[0]

    def thumb(self, i):
        """The <img> of image i, drawn when it is first needed."""
        if i not in self.thumbs:
            self.thumbs[i] = thumbnail(self.pixels(i), THUMB, self.names[i])
        return self.thumbs[i]

    def heat_map(self, i, t, side):
        """The <img> of where symbol t of image i attends to."""
        return thumbnail(visualize.overlay(self.pixels(i), self.attention[i, t], side), side)


# ---- the four parts of the page ------------------------------------------------------------------

def training(rows):
    """Rows of metrics.jsonl -> a PNG for each panel of the curves: a phone can stack them."""
    width, height, parts = 296, 254, []     # pixels: four abreast on a desktop
    for key, title in visualize.PANELS.items():
        sheet = visualize.Sheet(width, height)
        visualize.panel(sheet, 50, 30, width, height, key, [rows])
        parts.append(img_tag(sheet.page.reduce(sheet.SCALE), title, "PNG"))
    return f'<div class="panels">{"".join(parts)}</div>'


def samples(code):
    """Figure 1: an image, and each of its symbols above where it attends to."""
    (n, length), rows = code.ids.shape, []
    for i in visualize.spread(n, SAMPLES).tolist():
        image = thumbnail(code.pixels(i), 2 * THUMB, code.names[i])
        cells = [f"<div>{image}{escape(code.names[i])}</div>"]
        cells += [f"<div>{chip(symbol)}{code.heat_map(i, t, 2 * THUMB)}</div>"
                  for t, symbol in enumerate(code.ids[i].tolist())]
        style = f"--all:{length + 1};--rows:{math.ceil(length / 4)}"
        rows.append(f'<div class="sample" style="{style}">{"".join(cells)}</div>')
    return "".join(rows)


def entry(code, symbol):
    """A symbol's entry: its frequency per position, images and values at its most informative
    position, and the symbols that it co-occurs with."""
    t = most_informative_position(code.ids, symbol, code.attributes)
    chosen, users = code.ids[:, t] == symbol, code.present[:, symbol].sum()
    counts = (code.ids == symbol).sum(0).tolist()                               # T
    bars = "".join(f'<div>{m or ""}<i style="height:{28 * m / max(counts):.0f}px"></i>{t}</div>'
                   for t, m in enumerate(counts, 1))
    shown = chosen.nonzero().flatten()[visualize.spread(counts[t], EXAMPLES)].tolist()
    examples = "".join(f"<div>{code.thumb(i)}{code.heat_map(i, t, THUMB)}</div>" for i in shown)
    rows = {name: top_values(chosen, attribute, VALUES)
            for name, attribute in code.attributes.items()}
    if code.concepts:
        rows["concepts"] = escape(code.concepts.get(symbol) or code.concepts.get((symbol, t), ""))
    rows["co-occurs with"] = ", ".join(
        f"{chip(s)} {m}" for s, m in co_occurrence(code.present, symbol, CO_OCCURRING))
    rows = "".join(f"<tr><th>{name}</th><td>{row}</td></tr>" for name, row in rows.items())
    frequency = (f"{users} images, {100 * users / len(code.ids):.1f} %<br>{sum(counts)} uses<br>"
                 f"below: position {t + 1}, {counts[t]} images")
    return (f'<article class="card" id="s{symbol}"><div class="head">{chip(symbol, link=False)}'
            f'<p>{frequency}</p><div class="bars">{bars}</div></div>'
            f'<div class="examples">{examples}</div><table>{rows}</table></article>')


def table_line(code, symbol, is_target):
    """A symbol's line in the list of all symbols. is_target: whether links lead here."""
    counts = [int(code.present[:, symbol].sum()), *(code.ids == symbol).sum(0).tolist()]
    t = most_informative_position(code.ids, symbol, code.attributes)
    cells = [str(t + 1)]
    cells += [top_values(code.ids[:, t] == symbol, attribute, 1)
              for attribute in code.attributes.values()]
    cells += [f"{chip(s)} {m}" for s, m in co_occurrence(code.present, symbol, 1)]
    target = f' id="s{symbol}"' if is_target else ""
    return (f"<tr{target}><td>{chip(symbol)}</td>"
            + "".join(f'<td class="n">{m or ""}</td>' for m in counts)
            + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")


def symbol_table(code, count):
    """Entries of the `count` symbols of most images, then all symbols in use, a line each."""
    uses = code.present.sum(0)
    order = [s for s in uses.argsort(descending=True, stable=True).tolist() if uses[s]]
    entries = "".join(entry(code, s) for s in order[:count])
    lines = "".join(table_line(code, s, rank >= count) for rank, s in enumerate(order))
    heads = ["symbol", "images", *range(1, code.ids.shape[1] + 1), "most informative position",
             *code.attributes, "co-occurs with"]
    heads = "".join(f"<th>{head}</th>" for head in heads)
    return (f'<div class="cards">{entries}</div><details><summary>All {len(order)} symbols in use, '
            f'of {code.vocab}</summary><div class="wide"><table><thead><tr>{heads}</tr></thead>'
            f'<tbody>{lines}</tbody></table></div></details>')


def group_line(code, prefix, members):
    """The images `members` (m,), which share the symbols `prefix`: how many, what at least half of
    them are, and some of them."""
    chosen = torch.zeros(len(code.ids), dtype=torch.bool).index_fill_(0, members, True)
    values = (top_values(chosen, attribute, 1, len(members) / 2)
              for attribute in code.attributes.values())
    shown = members[visualize.spread(len(members), MEMBERS)].tolist()
    noun = "image" if len(members) == 1 else "images"
    return (f'{" ".join(chip(s, link=False) for s in prefix)} {len(members)} {noun} '
            f'<span class="values">{", ".join(filter(None, values))}</span>'
            f'<span class="members">{"".join(code.thumb(i) for i in shown)}</span>')


def tree(code):
    """Images by first symbol, and within each group by the first two."""
    (n, length), parts = code.ids.shape, []
    for s, members in prefix_groups(code.ids, torch.arange(n), 0, GROUPS):
        inner = prefix_groups(code.ids, members, 1, BRANCHES) if length > 1 else []
        items = "".join(f"<li>{group_line(code, (s, s2), m2)}</li>" for s2, m2 in inner)
        rest = len(members) - sum(len(m2) for _, m2 in inner)
        items += f'<li class="quiet">and {rest} images in smaller groups</li>' if rest else ""
        opened = "" if parts else " open"
        parts.append(f"<details{opened}><summary>{group_line(code, (s,), members)}</summary>"
                     f"<ul>{items}</ul></details>")
    return f'<div class="tree">{"".join(parts)}</div>'


def read_concepts(path, vocab):
    """concepts.json of extras/falcon.py -> {symbol, or (symbol, position from 0) where they are by
    position: "word × lift, ..."}. Raises ValueError for another file or vocabulary."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["vocab"] != vocab:
            raise ValueError(f"its vocabulary is {stored['vocab']}, not {vocab}")
        texts = {}
        for row in stored["concepts"]:
            if len(row["symbols"]) == 1:
                t, symbol = divmod(row["symbols"][0], vocab)
                top = list(row["top_words"].items())[:VALUES]
                texts[(symbol, t) if stored["by_position"] else symbol] = ", ".join(
                    f"{name} × {lift:.2f}" for name, (_, lift) in top)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--concepts {path} is not of extras.falcon for this checkpoint "
                         f"({error})") from None
    return texts


# ---- the page and the command --------------------------------------------------------------------

def build(code, run, source, metrics=None, symbols=64):
    """code: Codes; run: its name; source: what the images are; metrics: rows of metrics.jsonl;
    symbols: how many get a full entry -> the page, a string."""
    figures = codes.code_statistics(code.ids, code.vocab)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        run=escape(run), source=escape(source), images=figures["images"],
        length=figures["length"], vocab=code.vocab, bits=f"{figures['bits']:.0f}",
        codebook_usage=f"{100 * figures['codebook_usage']:.0f}",
        perplexity=", ".join(f"{p:.0f}" for p in figures["perplexity"]),
        training=training(metrics) if metrics else "<p>No metrics.jsonl beside the checkpoint.</p>",
        samples=samples(code), symbol_table=symbol_table(code, symbols), tree=tree(code),
        groups=GROUPS, concepts="" if not code.concepts else "Concepts are words by FALCON, with "
        "their lift, without those that images of similar symbols have as well.")


def run(args):
    if args.images < 1 or args.symbols < 0:
        raise ValueError("--images must be at least 1, --symbols at least 0")
    config, teacher, student = checkpoint.load_model(args.checkpoint, args.device)
    concepts = args.concepts and read_concepts(args.concepts, config["vocab"])
    folder, size = args.checkpoint.parent, config["image_size"]
    metrics = visualize.read_metrics(folder) if (folder / "metrics.jsonl").exists() else None
    source = args.data or config["data"]
    image_set = data.load(source, args.split, size, args.images, config["seed"])
    batches = counted("images described", len(image_set),
                      image_set.batches(torch.arange(len(image_set)).split(BATCH)))
    ids, attention = visualize.symbols_and_maps(teacher, student, batches, size)
    html = build(Codes(ids, attention, image_set, config["vocab"], concepts), folder.resolve().name,
                 f"{args.split} images of {Path(source).name}", metrics, args.symbols)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(html, encoding="utf-8")
    print(f"{args.out}: {len(html.encode()) / 1e6:.1f} MB, {len(ids)} images")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m extras.page", description=__doc__,
                                     formatter_class=flags.HelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, help="RUN/ckpt.pt; RUN/metrics.jsonl gives the curves")
    add("-o", "--out", type=Path, default="page.html", help="the page's file")
    add("--split", choices=("test", "train"), default="test", help="which images: train for a flat "
        "folder, which has no test part")
    add("--images", type=int, default=2000, help="how many; with more the figures are surer")
    add("--symbols", type=int, default=64, help="symbols with a full entry; with more the file is "
        "larger")
    add("--concepts", type=Path, metavar="FILE",
        help="concepts.json of extras/falcon.py, whose words are added to each symbol")
    add("--data", help="take the images from here (default: the run's own data set)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    try:
        run(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        raise SystemExit(f"extras.page: {error}") from None


if __name__ == "__main__":
    main()
