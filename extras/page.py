"""What a student says, as one HTML page: training, samples, a dictionary, a tree of prefixes.

    python -m extras.page runs/a/ckpt.pt -o page.html
    python -m extras.page runs/a/ckpt.pt --images 5000 --symbols 128     # surer, and larger

The page needs nothing else: its pictures are inside, no script and no network. What a symbol
goes with is told by its lift, over the images whose value (a class, a colour, ...) is known:

    lift(value | symbol) = P(value | the image says the symbol) / P(value)
"""
import argparse
import base64
import io
import math
from html import escape
from pathlib import Path
from string import Template

import torch
from PIL import Image

import visualize
from data import FACTORS, load
from evaluate import code_figures
from model import load_checkpoint

THUMB = 64                          # pixels: the side of a thumbnail; smaller pictures keep theirs
SAMPLES, SHOWN, MEANINGS, FRIENDS = 8, 8, 3, 4      # sample rows; of a symbol: images, values, ..
GROUPS, BRANCHES, FEW = 24, 6, 6    # first symbols, second symbols of each, images of a group

TEMPLATE = Path(__file__).with_suffix(".html")      # the page's words, and its look


# ---- what goes with a symbol ---------------------------------------------------------------------

def attributes(data):
    """What is known of an ImageSet's n images: {name: (values (n,) int64, -1 = unknown, names)}.
    The factors of `shapes` hold its classes; other data has classes or nothing."""
    if data.factors:
        return {name: (values, FACTORS[name]) for name, values in data.factors.items()}
    return {"class": (data.labels, data.classes)} if (data.labels >= 0).any() else {}


def lifts(chosen, values, names):
    """chosen (n,) bool, values (n,) as in `attributes` -> [(name, lift, hits)] of the values that
    occur in the chosen images of known value, in `hits` of them.

    First the value that tells most: largest hits * log(lift), its share of the divergence between
    the chosen images and all. By lift alone, one odd image of a rare class would come first."""
    known = values >= 0
    total = values[known].bincount(minlength=len(names)).tolist()
    hits = values[known & chosen].bincount(minlength=len(names)).tolist()
    uses, n = sum(hits), sum(total)
    rows = [(names[c], h * n / (uses * total[c]), h) for c, h in enumerate(hits) if h]
    return sorted(rows, key=lambda row: (-row[2] * math.log(row[1]), -row[2]))


def telling_place(ids, symbol, known):
    """The position, from 0, where a symbol tells most (see `lifts`) about one of the attributes;
    where nothing is known, or told, the one where it is said most. A symbol can mean another
    thing at every position."""
    def told(t):
        chosen = ids[:, t] == symbol
        every = (lifts(chosen, *attribute) for attribute in known.values())
        told = [hits * math.log(lift) for _, lift, hits in (rows[0] for rows in every if rows)]
        return max(told, default=0), chosen.sum().item()
    return max(range(ids.shape[1]), key=told)


def companions(said, symbol, count):
    """said (n, K) bool -> the `count` other symbols most often in sequences that hold `symbol`:
    [(symbol, images)], the most frequent first, without those it never meets."""
    together = said[said[:, symbol]].sum(0)
    together[symbol] = 0
    images, order = together.sort(descending=True, stable=True)
    return [(s, m) for s, m in zip(order[:count].tolist(), images[:count].tolist()) if m]


def prefix_groups(ids, members, t, count):
    """The images `members` (m,), parted by their symbol number t of ids (n, T): [(symbol, members)]
    of the `count` largest groups, the largest first."""
    symbols, sizes = ids[members, t].unique(return_counts=True)
    order = sizes.argsort(descending=True, stable=True)[:count]
    return [(s, members[ids[members, t] == s]) for s in symbols[order].tolist()]


# ---- pieces of HTML ------------------------------------------------------------------------------

def img(picture, alt="", kind="JPEG", look=""):
    """A PIL image -> an <img> that holds it."""
    file = io.BytesIO()
    picture.save(file, kind, **({"quality": 80, "subsampling": 0} if kind == "JPEG" else {}))
    code = base64.b64encode(file.getvalue()).decode()
    look = f' class="{look}"' if look else ""
    return f'<img{look} alt="{escape(alt)}" src="data:image/{kind.lower()};base64,{code}">'


def picture(pixels, side, alt=""):
    """uint8 (3, H, W) -> an <img> of at most `side` pixels; tiny pictures keep theirs."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    look = "pixels" if image.width <= 32 else ""
    if image.width > side:
        image = image.resize((side, side), Image.BICUBIC)
    return img(image, alt, look=look)


def chip(symbol, link=True):
    """The id on its colour, leading to its place in the dictionary."""
    colour, ink = visualize.chip_colours(symbol)
    tag, place = ("a", f' href="#s{symbol}"') if link else ("span", "")
    style = f"background:rgb{colour};color:rgb{ink}"
    return f'<{tag} class="chip" style="{style}"{place}>{symbol}</{tag}>'


def meanings(chosen, attribute, count, least=0):
    """The `count` values that tell most of the images chosen (n,) bool: "disc × 3.20 (8), ...",
    without those more frequent elsewhere, and those of fewer than `least` images."""
    rows = [row for row in lifts(chosen, *attribute) if row[1] >= 1 and row[2] >= least]
    return ", ".join(f'{escape(value)} ×&nbsp;{lift:.2f}&nbsp;<span class="quiet">({hits})</span>'
                     for value, lift, hits in rows[:count])


# ---- the four parts of the page ------------------------------------------------------------------

def training(rows):
    """Rows of metrics.jsonl -> a PNG for each panel of the curves: a phone can stack them."""
    width, height, parts = 296, 254, []     # pixels: four abreast on a desktop
    for key, title in visualize.PANELS.items():
        sheet = visualize.Sheet(width, height)
        visualize.panel(sheet, 50, 30, width, height, key, [rows])
        parts.append(img(sheet.render(), title, "PNG"))
    return f'<div class="panels">{"".join(parts)}</div>'


def samples(ids, attention, data):
    """Figure 1: a picture, and each of its symbols above where the student looked. ids (n, T)."""
    length, rows = ids.shape[1], []
    for i in visualize.spread(len(ids), SAMPLES).tolist():
        name = data.classes[data.labels[i]] if data.labels[i] >= 0 else ""
        cells = [f"<div>{picture(data.images[i], 2 * THUMB, name)}{escape(name)}</div>"]
        for symbol, mask in zip(ids[i].tolist(), attention[i]):
            look = visualize.overlay(data.images[i], mask, 2 * THUMB)
            cells.append(f"<div>{chip(symbol)}{picture(look, 2 * THUMB)}</div>")
        style = f"--all:{length + 1};--rows:{math.ceil(length / 4)}"
        rows.append(f'<div class="sample" style="{style}">{"".join(cells)}</div>')
    return "".join(rows)


def card(symbol, ids, said, attention, data, known, thumbs):
    """A symbol's entry: how often and where it is said, images and meanings at its telling place,
    companions."""
    t = telling_place(ids, symbol, known)
    chosen, users = ids[:, t] == symbol, said[:, symbol].sum()
    places = (ids == symbol).sum(0).tolist()
    bars = "".join(f'<div>{m or ""}<i style="height:{28 * m / max(places):.0f}px"></i>{t}</div>'
                   for t, m in enumerate(places, 1))
    looks = []
    for i in chosen.nonzero().flatten()[visualize.spread(places[t], SHOWN)].tolist():
        seen = picture(visualize.overlay(data.images[i], attention[i, t], THUMB), THUMB)
        looks.append(f"<div>{thumbs[i]}{seen}</div>")
    rows = {name: meanings(chosen, known[name], MEANINGS) for name in known}
    rows["said with"] = ", ".join(f"{chip(s)} {m}" for s, m in companions(said, symbol, FRIENDS))
    rows = "".join(f"<tr><th>{name}</th><td>{row}</td></tr>" for name, row in rows.items())
    often = (f"{users} images, {100 * users / len(ids):.1f} %<br>said {sum(places)} times<br>"
             f"below: number {t + 1} in {places[t]} images")
    return (f'<article class="card" id="s{symbol}"><div class="head">{chip(symbol, link=False)}'
            f'<p>{often}</p><div class="bars">{bars}</div></div>'
            f'<div class="looks">{"".join(looks)}</div><table>{rows}</table></article>')


def dictionary(ids, attention, data, known, thumbs, vocab, count):
    """Entries of the `count` symbols of most images, then all symbols, a line each. ids (n, T)."""
    said = torch.zeros(len(ids), vocab, dtype=torch.bool).scatter_(1, ids, True)       # (n, K)
    uses = said.sum(0)
    order = [s for s in uses.argsort(descending=True, stable=True).tolist() if uses[s]]
    cards = "".join(card(s, ids, said, attention, data, known, thumbs) for s in order[:count])
    lines = []
    for rank, s in enumerate(order):
        place = "" if rank < count else f' id="s{s}"'           # a chip leads to the fullest entry
        counts = "".join(f'<td class="n">{m or ""}</td>'
                         for m in [int(uses[s]), *(ids == s).sum(0).tolist()])
        t = telling_place(ids, s, known)
        cells = [str(t + 1)]
        cells += [meanings(ids[:, t] == s, attribute, 1) for attribute in known.values()]
        cells += [f"{chip(f)} {m}" for f, m in companions(said, s, 1)]
        cells = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f"<tr{place}><td>{chip(s)}</td>{counts}{cells}</tr>")
    heads = ["symbol", "images", *range(1, ids.shape[1] + 1), "as number", *known, "said with"]
    heads = "".join(f"<th>{head}</th>" for head in heads)
    return (f'<div class="cards">{cards}</div><details><summary>All {len(order)} symbols that are '
            f'said, of {vocab}</summary><div class="wide"><table><thead><tr>{heads}</tr></thead>'
            f'<tbody>{"".join(lines)}</tbody></table></div></details>')


def tree(ids, known, thumbs):
    """Images by first symbol, within it by the first two. ids (n, T), thumbs: n <img>s."""
    def line(prefix, members):
        chosen = torch.zeros(len(ids), dtype=torch.bool).index_fill_(0, members, True)
        few = members[visualize.spread(len(members), FEW)].tolist()
        chips = " ".join(chip(s, link=False) for s in prefix)
        gist = [meanings(chosen, attribute, 1, len(members) / 2) for attribute in known.values()]
        gist = ", ".join(filter(None, gist))
        noun = "image" if len(members) == 1 else "images"
        return (f'{chips} {len(members)} {noun} <span class="gist">{gist}</span>'
                f'<span class="few">{"".join(thumbs[i] for i in few)}</span>')

    parts = []
    for s, members in prefix_groups(ids, torch.arange(len(ids)), 0, GROUPS):
        inner = prefix_groups(ids, members, 1, BRANCHES) if ids.shape[1] > 1 else []
        items = "".join(f"<li>{line((s, s2), m2)}</li>" for s2, m2 in inner)
        rest = len(members) - sum(len(m2) for _, m2 in inner)
        items += f'<li class="quiet">and {rest} images in smaller groups</li>' if rest else ""
        opened = "" if parts else " open"
        parts.append(f"<details{opened}><summary>{line((s,), members)}</summary>"
                     f"<ul>{items}</ul></details>")
    return f'<div class="tree">{"".join(parts)}</div>'


# ---- the page and the command --------------------------------------------------------------------

def build(ids, attention, data, vocab, name, source, metrics=None, symbols=64):
    """ids (n, T) in 0..vocab-1, attention (n, T, N), data: ImageSet of n images, `source`: whose,
    metrics: rows of metrics.jsonl, symbols: full entries -> the page, a string."""
    (n, length), known, figures = ids.shape, attributes(data), code_figures(ids, vocab)
    names = [data.classes[c] if c >= 0 else "" for c in data.labels.tolist()]
    thumbs = [picture(image, THUMB, alt) for image, alt in zip(data.images, names)]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=escape(name), source=escape(source), n=n, length=length, vocab=vocab, groups=GROUPS,
        bits=f"{length * math.log2(vocab):.0f}", usage=f"{100 * figures['usage']:.0f}",
        perplexity=", ".join(f"{p:.0f}" for p in figures["perplexity"]),
        training=training(metrics) if metrics else "<p>No metrics.jsonl beside the checkpoint.</p>",
        samples=samples(ids, attention, data), tree=tree(ids, known, thumbs),
        dictionary=dictionary(ids, attention, data, known, thumbs, vocab, symbols))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("checkpoint", type=Path, help="RUN/ckpt.pt; RUN/metrics.jsonl gives the curves")
    add("-o", "--out", type=Path, default="page.html", help="the page's file")
    add("--split", choices=("test", "train"), default="test", help="the part of the data to show: "
        "train for a flat folder of pictures, which has no test part")
    add("--images", type=int, default=2000, help="images to read: more make the figures surer")
    add("--symbols", type=int, default=64, help="symbols with a full entry: more, a larger file")
    add("--data", help="take the images from here (default: the run's own data set)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    if args.images < 1 or args.symbols < 0:
        parser.error("--images is at least 1, --symbols at least 0")
    try:
        config, teacher, student = load_checkpoint(args.checkpoint, args.device)
        run, size = args.checkpoint.parent, config["image_size"]
        source = args.data or config["data"]
        metrics = visualize.read_metrics(run) if (run / "metrics.jsonl").exists() else None
        data = load(source, args.split, size, args.images, config["seed"])
        ids, attention = visualize.read(teacher, student, data.images, size, attention=True)
        html = build(ids, attention, data, config["vocab"], run.resolve().name,
                     f"{args.split} images of {Path(source).name}", metrics, args.symbols)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(html, encoding="utf-8")
    except (ValueError, OSError) as error:
        raise SystemExit(f"extras.page: {error}") from None
    print(f"{args.out}: {len(html.encode()) / 1e6:.1f} MB, {len(ids)} images")


if __name__ == "__main__":
    main()
