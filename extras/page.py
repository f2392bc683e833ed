"""One HTML page of what a student says: its training, samples, a dictionary, a tree of prefixes.

    python -m extras.page runs/a/ckpt.pt -o page.html
    python -m extras.page runs/a/ckpt.pt --images 5000 --symbols 128     # surer figures, larger file

The page needs nothing else: pictures are inside it, there is no script and no network. What a symbol
means is told by its lift, over the images whose value (a class, a colour, ...) is known:

    lift(value | symbol) = P(value | the image says the symbol) / P(value)
"""
import argparse
import base64
import io
import math
from html import escape
from pathlib import Path

import torch
from PIL import Image

import visualize
from data import FACTORS, load
from evaluate import code_figures
from model import load_checkpoint

THUMB = 64                          # pixels: the side of a thumbnail; smaller pictures keep theirs
SAMPLES, SHOWN, MEANINGS, FRIENDS = 8, 8, 3, 4      # sample rows; and a symbol's images, values, ...
GROUPS, BRANCHES, FEW = 24, 6, 6                    # first symbols, second symbols of each, images

CSS = """
:root { color-scheme: light; font: 16px/1.45 system-ui, sans-serif; color: #191c21; background: #fff }
body { max-width: 1240px; margin: 0 auto; padding: 0 16px 48px; overflow-wrap: anywhere }
h1, h2 { line-height: 1.2 } h2 { margin: 48px 0 8px; border-top: 1px solid #ddd; padding-top: 16px }
p { max-width: 75ch; margin: 8px 0 } nav a { margin-right: 16px } a { color: #0057a3 }
img { display: block; max-width: 100%; border-radius: 3px } .p { image-rendering: pixelated }
.panels { display: flex; flex-wrap: wrap; gap: 8px }
.chip { display: inline-block; min-width: 2em; padding: 0 6px; border-radius: 4px; text-align: center;
  font-size: 14px; font-weight: 600; text-decoration: none }
.sample { display: grid; gap: 6px; margin: 16px 0; align-items: start;
  grid-template-columns: repeat(var(--all), minmax(0, 1fr)) }
.sample div:first-child { font-size: 14px } .sample img { width: 100% }
.sample .chip { display: block; padding: 0; margin-bottom: 3px }
.cards { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 540px), 1fr)) }
.card { border: 1px solid #ddd; border-radius: 8px; padding: 12px; scroll-margin-top: 8px }
.head { display: flex; flex-wrap: wrap; gap: 4px 16px; align-items: end; font-size: 14px }
.head .chip { font-size: 20px; padding: 2px 10px; align-self: start } .head span { flex: 1 1 150px }
.bars { display: flex; gap: 2px; align-items: end; font-size: 11px; line-height: 1.2; color: #555 }
.bars div { width: 26px; text-align: center } .bars i { display: block; background: #7a8ba3 }
.looks { display: grid; gap: 4px; margin: 10px 0; grid-template-columns: repeat(8, minmax(0, 1fr)) }
.looks img { width: 100% } .looks img + img { margin-top: 2px }
table { border-collapse: collapse; font-size: 14px } .card td, .card th { padding: 1px 10px 1px 0 }
th { text-align: left; font-weight: 500; color: #555; vertical-align: top } td { vertical-align: top }
.wide { overflow-x: auto } .wide table { white-space: nowrap; overflow-wrap: normal }
.wide td, .wide th { padding: 2px 10px 2px 0; border-bottom: 1px solid #eee }
.n { text-align: right; font-variant-numeric: tabular-nums } .quiet { color: #555; font-size: 14px }
details { margin: 4px 0 } summary { cursor: pointer; padding: 4px 0 } ul { list-style: none; margin: 0 }
.tree details { border-top: 1px solid #eee } .tree ul { padding-left: 20px; border-left: 3px solid #ddd }
.tree li { margin: 10px 0 } .few { display: flex; flex-wrap: wrap; gap: 3px; margin: 4px 0 }
.few img { width: 48px; height: 48px }
@media (max-width: 600px) {
  .sample { grid-template-columns: repeat(5, minmax(0, 1fr)) }
  .sample div:first-child { grid-row: span var(--rows) }
  .looks { grid-template-columns: repeat(4, minmax(0, 1fr)) } .tree ul { padding-left: 10px } }
@media print {
  :root { font-size: 10pt } * { print-color-adjust: exact; -webkit-print-color-adjust: exact }
  nav { display: none } .card, .sample, .panels img, li, tr { break-inside: avoid }
  .wide { overflow: visible } .wide table { font-size: 7pt; white-space: normal }
  details::details-content { content-visibility: visible; display: block; height: auto } }
"""


# ---- what goes with a symbol ---------------------------------------------------------------------

def attributes(data):
    """What is known of an ImageSet's n images: {name: (values (n,) int64, -1 = unknown, names)}.
    The factors of `shapes` hold its classes; other data has classes or nothing."""
    if data.factors:
        return {name: (values, FACTORS[name]) for name, values in data.factors.items()}
    return {"class": (data.labels, data.classes)} if (data.labels >= 0).any() else {}


def lifts(chosen, values, names):
    """chosen (n,) bool, values (n,) as in `attributes` -> [(name, lift, hits, uses)] of the values
    that occur in the `uses` chosen images of known value, `hits` of them with this one.

    First the value that tells most: largest hits * log(lift), its share of the divergence between
    the chosen images and all. By lift alone, one odd image of a rare class would come first."""
    known = values >= 0
    total = values[known].bincount(minlength=len(names)).tolist()
    hits = values[known & chosen].bincount(minlength=len(names)).tolist()
    uses, n = sum(hits), sum(total)
    rows = [(names[c], h * n / (uses * total[c]), h, uses) for c, h in enumerate(hits) if h]
    return sorted(rows, key=lambda row: (-row[2] * math.log(row[1]), -row[2]))


def companions(said, symbol, count):
    """said (n, K) bool -> the `count` other symbols most often said of the images that say `symbol`:
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
    picture.save(file, kind, **({"quality": 88, "subsampling": 0} if kind == "JPEG" else {}))
    code = base64.b64encode(file.getvalue()).decode()
    look = f' class="{look}"' if look else ""
    return f'<img{look} alt="{escape(alt)}" src="data:image/{kind.lower()};base64,{code}">'


def picture(pixels, side, alt=""):
    """uint8 (3, H, W) -> an <img> of at most `side` pixels; small drawings keep their own pixels."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    look = "p" if image.width <= 32 else ""
    if image.width > side:
        image = image.resize((side, side), Image.BICUBIC)
    return img(image, alt, look=look)


def chip(symbol, link=True):
    """The id on its colour, leading to its place in the dictionary."""
    colour, ink = visualize.chip_colours(symbol)
    style = f'class="chip" style="background:rgb{colour};color:rgb{ink}"'
    return f'<a {style} href="#s{symbol}">{symbol}</a>' if link else f"<span {style}>{symbol}</span>"


def times(lift):
    return f"× {lift:.2f}" if lift < 10 else f"× {lift:.1f}"


def gist(chosen, known):
    """One line about the images chosen (n,) bool: the value of each attribute that tells most."""
    rows = [lifts(chosen, *attribute) for attribute in known.values()]
    best = [row[0] for row in rows if row]
    return ", ".join(f"{escape(name)} {hits} of {uses} ({times(lift)})"
                     for name, lift, hits, uses in best)


# ---- the four parts of the page ------------------------------------------------------------------

def training(rows):
    """Rows of metrics.jsonl -> a PNG for each panel of the curves, so that a phone can stack them."""
    width, height, parts = 340, 254, []
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
    """A symbol's entry: how often and where it is said, images, meanings, companions."""
    users, places = said[:, symbol].nonzero().flatten(), (ids == symbol).sum(0).tolist()
    bars = "".join(f'<div>{m or ""}<i style="height:{28 * m / max(places):.0f}px"></i>{t}</div>'
                   for t, m in enumerate(places, 1))
    looks = []
    for i in users[visualize.spread(len(users), SHOWN)].tolist():
        mask = attention[i][ids[i] == symbol].mean(0)           # said twice: the mean of its masks
        seen = picture(visualize.overlay(data.images[i], mask, THUMB), THUMB)
        looks.append(f"<div>{thumbs[i]}{seen}</div>")
    rows = {name: [f"{escape(value)} {times(lift)} <span class='quiet'>({hits} of {uses})</span>"
                   for value, lift, hits, uses in lifts(said[:, symbol], *attribute)[:MEANINGS]
                   if lift >= 1] for name, attribute in known.items()}
    rows["said with"] = [f"{chip(s)} {m}" for s, m in companions(said, symbol, FRIENDS)]
    rows = "".join(f"<tr><th>{escape(n)}</th><td>{', '.join(r)}</td></tr>" for n, r in rows.items())
    often = f"{len(users)} images, {100 * len(users) / len(ids):.1f} %<br>said {sum(places)} times"
    return (f'<article class="card" id="s{symbol}"><div class="head">{chip(symbol, link=False)}'
            f'<span>{often}</span><div class="bars">{bars}</div></div>'
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
        cells = [f"{m or ''}" for m in [int(uses[s]), *(ids == s).sum(0).tolist()]]
        best = [gist(said[:, s], {name: attribute}) for name, attribute in known.items()]
        friends = " ".join(f"{chip(f)} {m}" for f, m in companions(said, s, 1))
        lines.append(f"<tr{place}><td>{chip(s)}</td>" + "".join(f'<td class="n">{c}</td>' for c in cells)
                     + "".join(f"<td>{c}</td>" for c in [*best, friends]) + "</tr>")
    heads = ["symbol", "images", *range(1, ids.shape[1] + 1), *known, "said with"]
    heads = "".join(f"<th>{escape(str(h))}</th>" for h in heads)
    return (f'<div class="cards">{cards}</div><details><summary>All {len(order)} symbols that are '
            f'said, of {vocab}</summary><div class="wide"><table><thead><tr>{heads}</tr></thead>'
            f'<tbody>{"".join(lines)}</tbody></table></div></details>')


def tree(ids, known, thumbs):
    """Images by first symbol, within it by the first two. ids (n, T), thumbs: n <img>s."""
    def line(prefix, members):
        chosen = torch.zeros(len(ids), dtype=torch.bool).index_fill_(0, members, True)
        few = members[visualize.spread(len(members), FEW)].tolist()
        chips = " ".join(chip(s, link=False) for s in prefix)
        noun = "image" if len(members) == 1 else "images"
        return (f'{chips} {len(members)} {noun} <span class="quiet">{gist(chosen, known)}</span>'
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
    """ids (n, T) in 0..vocab-1, attention (n, T, N), data: an ImageSet of n images from `source`,
    metrics: rows of metrics.jsonl, symbols: full entries -> the page, a string."""
    n, length = ids.shape
    known, figures = attributes(data), code_figures(ids, vocab)
    names = [data.classes[c] if c >= 0 else "" for c in data.labels.tolist()]
    thumbs = [picture(image, THUMB, alt) for image, alt in zip(data.images, names)]
    spread = ", ".join(f"{p:.0f}" for p in figures["perplexity"])
    parts = {
        "Training": ("One point an epoch." if metrics else "No metrics.jsonl beside the checkpoint.",
                     training(metrics) if metrics else ""),
        "Samples": ("Each symbol in the order said, above where the student looked when it said it: "
                    "warm is attended. A symbol leads to its entry in the dictionary.",
                    samples(ids, attention, data)),
        "Dictionary": (f"The most frequent symbols first, over {n} images. Bars: how often it is said "
                       "at each position. Images: evenly spread over all that say it, above where the "
                       "student looked. × is the lift, P(value | symbol) / P(value); in brackets, how "
                       "many of the images with the symbol have the value; with few, chance can do "
                       f"it. Said with: the symbols most often in the same sequence. "
                       f"Perplexity by position: {spread} of {vocab}; "
                       f"{100 * figures['usage']:.0f} % of the vocabulary is said.",
                       dictionary(ids, attention, data, known, thumbs, vocab, symbols)),
        "Prefixes": ("From general to specific: images with the same first symbol, and within them "
                     f"those with the same first two. The {GROUPS} largest groups; open one to see "
                     "its parts.", tree(ids, known, thumbs)),
    }
    links = "".join(f'<a href="#{title.lower()}">{title}</a>' for title in parts)
    body = "".join(f'<section><h2 id="{title.lower()}">{title}</h2><p class="quiet">{text}</p>{html}'
                   "</section>\n" for title, (text, html) in parts.items())
    title = f"What {escape(name)} says"
    bits = f"{length * math.log2(vocab):.0f} bits"
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{CSS}</style></head>\n<body><header><h1>{title}</h1><p>{n} test images of "
            f"{escape(source)}, each described by {length} symbols of a vocabulary of {vocab} "
            f"({bits}), which a student learned to say without labels.</p><nav>{links}</nav></header>"
            f"\n{body}</body></html>\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("checkpoint", type=Path, help="RUN/ckpt.pt; RUN/metrics.jsonl gives the curves")
    add("-o", "--out", type=Path, default="page.html", help="the page's file")
    add("--images", type=int, default=2000, help="test images to read: more make the figures surer")
    add("--symbols", type=int, default=64, help="symbols with a full entry: more make the file larger")
    add("--data", help="take the test images from here (default: the run's own data set)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    if args.images < 1 or args.symbols < 0:
        parser.error("--images is at least 1, --symbols at least 0")
    try:
        config, teacher, student = load_checkpoint(args.checkpoint, args.device)
        run, size, source = args.checkpoint.parent, config["image_size"], args.data or config["data"]
        metrics = visualize.read_metrics(run) if (run / "metrics.jsonl").exists() else None
        data = load(source, "test", size, args.images, config["seed"])
        ids, attention = visualize.read(teacher, student, data.images, size, attention=True)
        html = build(ids, attention, data, config["vocab"], run.resolve().name, Path(source).name,
                     metrics, args.symbols)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(html, encoding="utf-8")
    except (ValueError, OSError) as error:
        raise SystemExit(f"extras.page: {error}") from None
    print(f"{args.out}: {len(html.encode()) / 1e6:.1f} MB, {len(ids)} images")


if __name__ == "__main__":
    main()
