"""What the symbols mean, where they look and how firmly they are said: measures of the language.

    python -m extras.measures runs/shapes/ckpt.pt --json measures.json
    python -m extras.measures runs/cats/ckpt.pt --data folder:PATH       # no factors: the last two

On `shapes`, whose factors and object masks are known: mutual information, disentanglement,
topographic similarity, symbols that name a factor value, the pointing game. On any pictures:
faithfulness of the attention, stability of the symbols. Beside each its chance level: the mean over
permutations of the pictures' answers (factors, masks, symbols). Symbols are hard (argmax).
"""
import argparse
import io
import json
import math
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import FACTORS, load
from model import load_checkpoint
from visualize import read


def chance(measure, rows, times):
    """Mean of measure(rows) over `times` permutations of rows (n, ...) among the pictures."""
    shuffled = (rows[torch.randperm(len(rows))] for _ in range(times))
    return torch.stack([torch.as_tensor(measure(x)).double() for x in shuffled]).mean(0)


# ---- symbols and factors -------------------------------------------------------------------------

def entropy(p):
    """p (A, ...), each p[a] a distribution -> (A,) bits."""
    return torch.special.entr(p.double().flatten(1)).sum(1) / math.log(2)


def mutual_information(said, factors):
    """I(said_a; factor_b) for each pair of columns: said (n, A), factors (n, B), integers from 0
    -> (A, B) bits, in 0 .. min of the two entropies. The plug-in estimate H(x) + H(y) - H(x, y) of
    the counts; with X and Y values it is too high by about (X-1)(Y-1) / (2 n ln 2) bits (Miller
    1955; Paninski 2003), so read it against its chance level, which has the same bias."""
    (n, a), bits = said.shape, []
    x, y = int(said.max()) + 1, int(factors.max()) + 1
    for factor in factors.T:
        cells = (torch.arange(a) * x + said) * y + factor[:, None]              # (n, A)
        joint = cells.flatten().bincount(minlength=a * x * y).view(a, x, y).double() / n
        bits.append(entropy(joint.sum(2)) + entropy(joint.sum(1)) - entropy(joint))
    return torch.stack(bits, 1).clamp(min=0)


def disentanglement(said, factors):
    """Does each thing said belong to one factor? said (n, A), factors (n, B), B >= 2 -> 0 .. 1.

        mean over a of  (I(said_a; best factor) - I(said_a; second best)) / H(said_a)

    over those a that vary; 0 if none does. Positional (posdis) where said is ids; bag of symbols
    (bosdis) where it is `symbol_counts(ids)` (Chaabouni et al. 2020)."""
    said = said[:, (said != said[:1]).any(0)]
    if not said.shape[1]:
        return 0.0
    best = mutual_information(said, factors).topk(2).values                     # (A, 2)
    counts = [column.unique(return_counts=True)[1] for column in said.T]
    bits = torch.cat([entropy(count[None] / len(said)) for count in counts])    # (A,)
    return ((best[:, 0] - best[:, 1]) / bits).mean().item()


def symbol_counts(ids, vocab):
    """ids (n, T) in 0..K-1 -> (n, K), how often each picture's description says each symbol."""
    return torch.zeros(len(ids), vocab, dtype=torch.long).scatter_add_(1, ids, torch.ones_like(ids))


def hamming_distance(a, b):
    """(P, T) and (P, T) -> (P,), places that differ: 0 .. T."""
    return (a != b).sum(1)


def edit_distance(a, b):
    """Levenshtein: (P, T) and (P, S) -> (P,), insertions, deletions, substitutions: 0 .. max."""
    row = [torch.full_like(a[:, 0], j) for j in range(b.shape[1] + 1)]          # to b's first j
    for i in range(a.shape[1]):
        old, row = row, [row[0] + 1]
        for j in range(b.shape[1]):
            substituted = old[j] + (a[:, i] != b[:, j])
            row.append(torch.minimum(substituted, torch.minimum(old[j + 1], row[j]) + 1))
    return row[-1]


def bag_distance(a, b):
    """(P, T) and (P, T) -> (P,), symbols to exchange until the bags are equal: 0 .. T."""
    def tagged(x):                                      # the second 7 becomes (7, 1): bags -> sets
        return x * x.shape[1] + (x[:, :, None] == x[:, None]).tril(-1).sum(2)
    return a.shape[1] - (tagged(a)[:, :, None] == tagged(b)[:, None]).sum((1, 2))


DISTANCES = {"hamming": hamming_distance, "edit": edit_distance, "bag": bag_distance}


def ranks(x):
    """(P,) -> (P,) ranks from 0, ties share their mean rank."""
    _, place, counts = x.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts.double() + 1) / 2)[place]


def topographic_similarity(ids, factors, pairs, distance="edit"):
    """Do like pictures get like messages? Spearman correlation, -1 .. 1, between the pictures'
    Hamming distance over factors and that of their messages (Brighton and Kirby 2006).
    ids (n, T), factors (n, B), pairs (P, 2) of pictures; 0 where all distances are equal."""
    (a, b), messages = pairs.T, DISTANCES[distance]
    apart = [hamming_distance(factors[a], factors[b]), messages(ids[a], ids[b])]
    x, y = (ranks(d) - ranks(d).mean() for d in apart)
    return ((x @ y) / (x.norm() * y.norm()).clamp(min=1e-9)).item()


def naming_share(ids, factors, halves, vocab, least=10, lift=2.0):
    """Share of the symbols in use that name a factor value, 0 .. 1. Whether a symbol is among a
    picture's T, wherever, is set against the value:  lift = P(value | symbol) / P(value)  (Brin et
    al. 1997). ids (n, T), factors (n, B). halves: two index tensors; the first proposes the value
    with the best lift among those met `least` times with the symbol, in the second its lift must be
    `lift` or more. A value of V equally frequent ones has a lift of at most V."""
    present = symbol_counts(ids, vocab).clamp(max=1).double()                   # (n, K)
    value = torch.cat([F.one_hot(factor) for factor in factors.T], 1).double()  # (n, values)
    both = torch.stack([present[h].T @ value[h] for h in halves])               # (2, K, values)
    alone = torch.stack([present[h].mean(0) for h in halves])[:, :, None]       # P(symbol)
    prior = torch.stack([value[h].sum(0) for h in halves])[:, None]             # n P(value)
    lifts = both / (alone * prior).clamp(min=1e-9)
    proposed = lifts[0].where(both[0] >= least, -1)                             # (K, values)
    confirmed = lifts[1].gather(1, proposed.argmax(1, keepdim=True))[:, 0] >= lift
    return (confirmed & (proposed.amax(1) > 0)).sum().item() / (present.sum(0) > 0).sum().item()


# ---- where the symbols look, and what moves them -------------------------------------------------

def unchanged(ids, others):
    """Share of symbols that are the same, per position: (n, T) twice -> (T,) in 0 .. 1. Stability
    under `crop`, `noise` and `jpeg` is after Hendrycks and Dietterich 2019."""
    return (ids == others).double().mean(0)


def patch_cover(masks, patches):
    """masks (n, H, W) bool -> (n, N), the share of each patch that the object covers, 0 .. 1."""
    return F.adaptive_avg_pool2d(masks[:, None].float(), math.isqrt(patches)).flatten(1)


def pointing(attention, cover):
    """Share of a symbol's attention that lies on the object, per position: attention (n, T, N) with
    rows of sum 1, cover (n, N) -> (T,) in 0 .. 1. The energy-based pointing game (Wang et al. 2020,
    Score-CAM; Zhang et al. 2018 count hits of the maximum). Attention spread evenly gets the
    object's share of the area; attention to the usual place of objects, what other masks get."""
    return torch.einsum("ntp,np->t", attention, cover) / len(cover)


def hide(images, score, k):
    """images (n, 3, H, W) uint8 -> the same, the k patches of the highest score (n, N) painted over
    in the picture's median colour: on a plain ground the ground's own. The mean colour of a red
    disc on grey, reddish, would be something new to see there."""
    chosen = torch.zeros_like(score).scatter_(1, score.topk(k).indices, 1)
    chosen = chosen.unflatten(1, (1, math.isqrt(score.shape[1]), -1))           # (n, 1, h, w)
    median = images.flatten(2).median(2).values[..., None, None]                # (n, 3, 1, 1)
    return torch.where(F.interpolate(chosen, images.shape[-2:]) > 0, median, images)


class Repeat(torch.nn.Module):
    """Stands for a discretizer while a descriptor says T symbols: each is its own choice, but what
    goes on as the symbol before the next is `given` (n, T)."""

    def __init__(self, disc, given):
        super().__init__()
        self.disc, self.given, self.t = disc, given, 0

    def forward(self, h, hard=False, bids=None):
        said, ids = self.disc(h, hard, bids), self.given[:, self.t]
        self.t += 1
        weights = F.one_hot(ids, said.weights.shape[1]).float()
        return said._replace(weights=weights, embedding=self.disc.table[ids])


def retell(teacher, student, images, given, size):
    """uint8 (n, 3, H, W), given (n, T) -> ids (n, T): symbol t as chosen after given[:, :t]."""
    parts = []
    for x, ids in zip(images.split(128), given.split(128)):
        repeat = Repeat(student.disc, ids.to(next(student.parameters()).device))
        with mock.patch.object(student, "disc", repeat):
            parts.append(read(teacher, student, x, size)[0])
    return torch.cat(parts)


def faithfulness(retell, images, ids, attention, k):
    """How often a symbol changes when k patches are hidden in the input picture (deletion: Samek et
    al. 2017, Petsiuk et al. 2018). images (n, 3, H, W) uint8, ids (n, T), attention (n, T, N),
    retell(images, ids) -> ids. -> (T,) shares for the patches that its own attention ranks highest,
    for those of the same position's attention to another picture, and for random ones.
    Symbol t is conditioned on symbols 1 .. t-1: these stay as they were, so that a change is its
    own. More than random says that the attention finds what matters; more than another picture's,
    that it finds it in this picture."""
    def changed(score):                                                         # (n, T, N) -> (T,)
        said = [retell(hide(images, score[:, t], k), ids)[:, t] for t in range(ids.shape[1])]
        return 1 - unchanged(ids, torch.stack(said, 1))

    other = attention.roll(len(attention) // 2, 0)
    return {"attended": changed(attention), "attended in another": changed(other),
            "random": changed(torch.rand_like(attention))}


def crop(images, area=0.9):
    """The middle `area` of each picture at the picture's own size, bilinear."""
    scale = area**0.5
    theta = torch.tensor([[scale, 0, 0], [0, scale, 0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False).round().byte()


def noise(images, sigma=0.02):
    """Gaussian noise; sigma in units of the whole range."""
    return (images + 255 * sigma * torch.randn(images.shape)).round().clamp(0, 255).byte()


def jpeg(images, quality=75):
    """Through a JPEG file and back, with Pillow: torchvision's own is going to be removed."""
    def through(image):                                                         # (3, H, W)
        picture, file = Image.fromarray(image.permute(1, 2, 0).numpy()), io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    return torch.stack([through(image) for image in images])


# ---- a checkpoint: all its figures, and the report -----------------------------------------------

def language_figures(ids, factors, vocab, pairs, times):
    """Rows of the table: ids (n, T), factors (n, B) in FACTORS' order, pairs: how many."""
    bits, most = mutual_information(ids, factors), mutual_information(factors, factors).diag()
    by_chance = chance(lambda f: mutual_information(ids, f), factors, times)
    rows = {f"bits about {name}, of {most[b]:.2f}":
            {"measured": bits[:, b], "chance": by_chance[:, b]} for b, name in enumerate(FACTORS)}
    (n, t), counts = ids.shape, symbol_counts(ids, vocab)
    placed = ids + vocab * torch.arange(t)                 # symbol 5 at place 1 is not 5 at place 3
    halves = torch.randperm(n).tensor_split(2)
    first, step = torch.randint(n, (pairs,)), torch.randint(1, n, (pairs,))
    pairs = torch.stack([first, (first + step) % n], 1)                     # of two, never of one
    measures = {"posdis": lambda f: disentanglement(ids, f),
                "bosdis": lambda f: disentanglement(counts, f),
                "symbols that name a value": lambda f: naming_share(ids, f, halves, vocab),
                "the same, at their place": lambda f: naming_share(placed, f, halves, t * vocab)}
    for d in DISTANCES:
        measures[f"topographic similarity, {d}"] = (
            lambda f, d=d: topographic_similarity(ids, f, pairs, d))
    for name, measure in measures.items():
        rows[name] = {"measured": measure(factors), "chance": chance(measure, factors, times)}
    return rows


def figures(describe, retell, image_set, vocab, share=0.25, pairs=50_000, times=20, disturbed=2000):
    """All rows that the data allow: {name: {kind: number, or (T,) per position}}. describe(images,
    attention) -> ids (n, T) and attention (n, T, N) or None, as visualize.read; retell(images, ids)
    -> ids. Only the first `disturbed` pictures are hidden from and disturbed."""
    images = image_set.images
    ids, attention = describe(images, True)
    _, t, patches = attention.shape
    k, rows = max(1, round(share * patches)), {}
    if image_set.factors:
        factors = torch.stack([image_set.factors[name] for name in FACTORS], 1)
        rows |= language_figures(ids, factors, vocab, pairs, times)
    if image_set.masks is not None:
        cover = patch_cover(image_set.masks, patches)
        rows["attention on the object"] = {
            "measured": pointing(attention, cover), "share of the area": cover.mean(),
            "masks of other pictures": chance(lambda c: pointing(attention, c), cover, times)}
    images, ids, attention = images[:disturbed], ids[:disturbed], attention[:disturbed]
    kept = faithfulness(retell, images, ids, attention, k)
    rows[f"changed, {k} of {patches} patches hidden"] = kept
    for other in ("random", "attended in another"):
        means = ([kept[x][:end].mean().item() for x in ("attended", other)] for end in (t, 1))
        total, first = (a / b if b else None for a, b in means)
        rows[f"attended / {other}"] = {"all positions": total, "position 1": first}
    stays = {f.__name__: unchanged(ids, describe(f(images), False)[0]) for f in (crop, noise, jpeg)}
    rows["unchanged"] = stays | {"chance": chance(lambda x: unchanged(ids, x), ids, times)}
    return {name: {kind: x.tolist() if torch.is_tensor(x) else x for kind, x in row.items()}
            for name, row in rows.items()}


def print_table(rows):
    """Per position where there is one, and the mean over positions in the first column."""
    t = max(len(x) for row in rows.values() for x in row.values() if isinstance(x, list))
    print(f"{'':59}{'all':>7}" + "".join(f"{i:7d}" for i in range(1, t + 1)))
    for name, row in rows.items():
        for i, (kind, x) in enumerate(row.items()):
            cells = [sum(x) / len(x), *x] if isinstance(x, list) else [x]
            cells = "".join("      -" if c is None else f"{c:7.3f}" for c in cells)
            print(f"{'' if i else name:35}{kind:24}{cells}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoint", help="RUN/ckpt.pt, written by train.py")
    add("--data", help="another data set than the run's, to see if its language carries over")
    add("--images", type=int, default=10_000, help="test images: more make rare symbols surer")
    add("--disturbed", type=int, default=2000,
        help="of them, for faithfulness and stability, which take most of the time")
    add("--hide", type=float, default=0.25, help="share of the patches hidden for faithfulness")
    add("--pairs", type=int, default=50_000, help="random pairs, for topographic similarity")
    add("--permutations", type=int, default=20, help="how many the chance levels average over")
    add("--seed", type=int, default=0, help="of permutations, pairs, halves, noise, random patches")
    add("--json", type=Path, metavar="FILE", help="also write the figures there")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    try:
        few = min(args.images, args.disturbed) < 2 or min(args.pairs, args.permutations) < 1
        if few or not 0 < args.hide < 1:
            raise ValueError("at least: --images 2, --disturbed 2, --pairs 1, --permutations 1; "
                             "--hide in (0, 1)")
        if args.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("--device cuda, but PyTorch finds no GPU; use --device cpu")
        if args.json and not args.json.absolute().parent.is_dir():
            raise FileNotFoundError(f"--json {args.json}: its folder does not exist; make it first")
        config, teacher, student = load_checkpoint(args.checkpoint, args.device)
        name, size = args.data or config["data"], config["image_size"]
        test = load(name, "test", size, args.images, config["seed"])
        torch.manual_seed(args.seed)
        rows = figures(lambda x, attention: read(teacher, student, x, size, attention),
                       lambda x, ids: retell(teacher, student, x, ids, size), test,
                       config["vocab"], args.hide, args.pairs, args.permutations, args.disturbed)
        print(f"{name}: {len(test)} test images, {min(len(test), args.disturbed)} of them "
              f"disturbed, {args.pairs} pairs, chance: {args.permutations} permutations")
        print_table(rows)
        if args.json:
            about = {"data": name, "images": len(test), "disturbed": args.disturbed,
                     "hidden share": args.hide, "pairs": args.pairs,
                     "permutations": args.permutations, "seed": args.seed}
            args.json.write_text(json.dumps(about | rows, indent=1) + "\n")
    except (ValueError, OSError) as error:
        raise SystemExit(f"extras.measures: {error}") from None


if __name__ == "__main__":
    main()
