"""What the symbols stand for, what they attend to, and how stable they are: one JSON record.

    python -m extras.measures RUN/ckpt.pt --json measures.json
    python -m extras.measures RUN/ckpt.pt --data folder:PATH --perturbed 500    # less, and faster

On `shapes`, whose factors and object masks are known: mutual information, disentanglement,
lift-based purity, pointing game. On `scenes` these are about the largest object (the pointing game
about all), and there are FG-ARI and mBO of the segmentation by the symbol that attends most, the
binding of symbols to objects, and which object each symbol attends to. On any images: occlusion
(deletion metric), specificity, similarity of attention maps, stability. Each has its control beside
it: `chance` is the mean over permutations of the images' answers (factors, masks, maps, symbols).
Symbols are hard (argmax) and in float32, because in bfloat16 the batch size would decide between
near-equal logits.
"""
import argparse
import io
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import checkpoint
import data
import flags
from extras import objects
from progress import Progress

BATCH = 128                 # images at a time


def chance(measure, rows, times):
    """Mean of measure(rows) over `times` permutations of rows (n, ...) among the images."""
    shuffled = (rows[torch.randperm(len(rows))] for _ in range(times))
    return torch.stack([torch.as_tensor(measure(x)).double() for x in shuffled]).mean(0)


# ---- symbols and factors -------------------------------------------------------------------------

def entropy(p):
    """p (A, ...), each p[a] a distribution -> (A,) bits."""
    return torch.special.entr(p.double().flatten(1)).sum(1) / math.log(2)


def mutual_information(symbols, factors):
    """I(symbols_a; factors_b) for each pair of columns: symbols (n, A), factors (n, B), integers
    from 0 -> (A, B) bits, from 0 to the smaller entropy. The plug-in estimate H(x) + H(y) - H(x, y)
    of the counts; with X and Y values it is too high by about (X-1)(Y-1) / (2 n ln 2) bits (Miller
    1955; Paninski 2003), so read it against its chance level, which has the same bias."""
    (n, a), bits = symbols.shape, []
    x, y = int(symbols.max()) + 1, int(factors.max()) + 1
    for factor in factors.T:
        cells = (torch.arange(a) * x + symbols) * y + factor[:, None]           # (n, A)
        joint = cells.flatten().bincount(minlength=a * x * y).view(a, x, y).double() / n
        bits.append(entropy(joint.sum(2)) + entropy(joint.sum(1)) - entropy(joint))
    return torch.stack(bits, 1).clamp(min=0)


def disentanglement(columns, factors):
    """Does each column depend on one factor? columns (n, A), factors (n, B), B >= 2 -> 0 to 1.

        mean over a of  (I(column_a; best factor) - I(column_a; second best)) / H(column_a)

    over the columns that vary; 0 if none does. Positional (posdis) where the columns are ids, bag
    of symbols (bosdis) where they are `symbol_counts(ids)` (Chaabouni et al. 2020)."""
    columns = columns[:, (columns != columns[:1]).any(0)]
    if not columns.shape[1]:
        return 0.0
    best = mutual_information(columns, factors).topk(2).values                  # (A, 2)
    counts = [column.unique(return_counts=True)[1] for column in columns.T]
    bits = torch.cat([entropy(count[None] / len(columns)) for count in counts])     # (A,)
    return ((best[:, 0] - best[:, 1]) / bits).mean().item()


def symbol_counts(ids, vocab):
    """ids (n, T) in 0..K-1 -> (n, K), how often each symbol occurs in each image's sequence."""
    return torch.zeros(len(ids), vocab, dtype=torch.long).scatter_add_(1, ids, torch.ones_like(ids))


def lift_purity(ids, factors, halves, vocab, least=10, lift=2.0):
    """Share of the symbols in use that stand for one factor value, 0 to 1. Whether a symbol occurs
    in an image's sequence is compared with the value:  lift = P(value | symbol) / P(value)  (Brin
    et al. 1997). ids (n, T), factors (n, B). halves: two index tensors; the first proposes the
    value of the largest lift among those that occur `least` times with the symbol, and in the
    second its lift must be `lift` or more. Of V equally frequent values a lift is at most V."""
    present = symbol_counts(ids, vocab).clamp(max=1).double()                   # (n, K)
    value = torch.cat([F.one_hot(factor) for factor in factors.T], 1).double()  # (n, values)
    both = torch.stack([present[h].T @ value[h] for h in halves])               # (2, K, values)
    alone = torch.stack([present[h].mean(0) for h in halves])[:, :, None]       # P(symbol)
    prior = torch.stack([value[h].sum(0) for h in halves])[:, None]             # n P(value)
    lifts = both / (alone * prior).clamp(min=1e-9)
    proposed = lifts[0].where(both[0] >= least, -1)                             # (K, values)
    confirmed = lifts[1].gather(1, proposed.argmax(1, keepdim=True))[:, 0] >= lift
    return (confirmed & (proposed.amax(1) > 0)).sum().item() / (present.sum(0) > 0).sum().item()


# ---- attention maps ------------------------------------------------------------------------------

def patch_cover(masks, patches):
    """masks (n, H, W), not 0 on an object -> (n, N), the share of each patch that is covered."""
    return F.adaptive_avg_pool2d((masks[:, None] > 0).float(), math.isqrt(patches)).flatten(1)


def pointing_game(attention, cover):
    """Share of a symbol's attention that lies on the object, per position: attention (n, T, N) with
    rows of sum 1, cover (n, N) -> (T,) in 0..1. The energy-based pointing game (Wang et al. 2020,
    Score-CAM; Zhang et al. 2018 count hits of the maximum). Uniform attention gets the object's
    share of the area; attention to the usual position of objects gets what the masks of other
    images get."""
    return torch.einsum("ntp,np->t", attention, cover) / len(cover)


def attention_similarity(attention, others):
    """Mean cosine between the attention map of each position and those of all other positions:
    attention (n, T, N) and others (n, T, N), the same maps for pairs within one image -> (T,) in
    0..1; T >= 2. 1: every symbol attends to the same patches."""
    cosine = torch.einsum("ntp,nsp->ts", F.normalize(attention, dim=-1),
                          F.normalize(others, dim=-1)) / len(attention)         # (T, T)
    return (cosine.sum(1) - cosine.diag()) / (len(cosine) - 1)


# ---- symbols of changed images -------------------------------------------------------------------

def teacher_forced(student, z_t, ids):
    """Teacher-forced decoding: z_t (B, N+1, d) preprocessed, ids (B, T) -> Sequence in which symbol
    t is the student's choice after ids[:, :t], whatever it chose there itself. The descriptor runs
    as it is, of either recipe; only the embedding that each choice hands on is replaced."""
    embeddings, position = student.embed(ids), iter(range(ids.shape[1]))

    def force(disc, h, hard):
        return disc(h, hard)._replace(embedding=embeddings[:, next(position)])

    if isinstance(student.disc, torch.nn.ModuleList):                   # one for each position
        discs = [partial(force, disc) for disc in student.disc]
    else:
        discs = partial(force, student.disc)
    return student.descriptor(z_t, discs, hard=True)


@torch.no_grad()
def describe(teacher, student, size, images, forced_ids=None, progress=None):
    """images (n, 3, H, W) uint8 -> ids (n, T) and attention maps (n, T, N), on the CPU. size: the
    side at which the teacher takes images. forced_ids (n, T): see `teacher_forced`; the maps are
    then None."""
    device, ids, maps = next(student.parameters()).device, [], []
    for i in range(0, len(images), BATCH):
        x = data.normalize(images[i:i + BATCH].to(device), size)
        z_t = student.preprocess(teacher(x))                                    # (B, N+1, d)
        if forced_ids is None:
            sequence = student.describe(z_t, hard=True, attention=True)
            maps.append(sequence.attention.float().cpu())
        else:
            sequence = teacher_forced(student, z_t, forced_ids[i:i + BATCH].to(device))
        ids.append(sequence.ids.cpu())
        if progress:
            progress.update(len(x))
    return torch.cat(ids), torch.cat(maps) if maps else None


def describe_all(describe, image_set):
    """The ids (n, T) and attention maps (n, T, N) of an ImageSet; describe: see `measure`."""
    batches = image_set.batches(torch.arange(len(image_set)).split(BATCH))
    return [torch.cat(part) for part in zip(*map(describe, batches))]


def agreement(ids, others):
    """Share of images with equal symbols, per position: (n, T) twice -> (T,) in 0..1. Stability
    under `crop`, `noise` and `jpeg` is after Hendrycks and Dietterich 2019."""
    return (ids == others).double().mean(0)


def occlude(images, score, k):
    """images (n, 3, H, W) uint8 -> the same with the k patches of the highest score (n, N) painted
    over in the image's median colour, which on a plain background is the background's. The mean
    colour of a red disc on grey, reddish, would be something new in the image."""
    chosen = torch.zeros_like(score).scatter_(1, score.topk(k).indices, 1)
    chosen = chosen.unflatten(1, (1, math.isqrt(score.shape[1]), -1))           # (n, 1, h, w)
    median = images.flatten(2).median(2).values[..., None, None]                # (n, 3, 1, 1)
    return torch.where(F.interpolate(chosen, images.shape[-2:]) > 0, median, images)


def occlusion(describe, images, ids, score, k):
    """The deletion metric (Samek et al. 2017; Petsiuk et al. 2018), one symbol at a time. images
    (n, 3, H, W) uint8, ids (n, T), score (n, S, N), describe(images, forced_ids) -> ids and maps.
    -> (S, T): the share of images in which symbol t changes when the k patches with the highest
    score[:, s] are occluded. Symbols before t are kept as they were, so a change is its own."""
    changed = [1 - agreement(ids, describe(occlude(images, row, k), ids)[0])
               for row in score.unbind(1)]
    return torch.stack(changed)


def specificity(changed):
    """changed (T, T) of `occlusion` for the attention maps of the T positions -> (T,): the change
    of symbol t when the patches that it attends to are occluded, over its mean change when those
    are that another symbol attends to. 1: its map finds nothing that the others' maps do not; NaN
    where it never changes under the others'."""
    own, length = changed.diag(), len(changed)
    other = (changed.sum(0) - own) / (length - 1)
    return torch.where(other > 0, own / other, math.nan)


def crop(images, area=0.9):
    """The middle `area` of each image at the image's own size, bilinear."""
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
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG",
                                                                          quality=quality)
        return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    return torch.stack([through(image) for image in images])


# ---- a checkpoint: all its measures, and the report ----------------------------------------------

def factor_measures(ids, factors, vocab, times):
    """ids (n, T), factors {name: (n,)} -> {measure: {row: number or (T,)}}."""
    names, factors = list(factors), torch.stack([*factors.values()], 1)         # (n, B)
    bits, most = mutual_information(ids, factors), mutual_information(factors, factors).diag()
    by_chance = chance(lambda f: mutual_information(ids, f), factors, times)
    rows = {f"mutual_information_{name}":
            {"measured": bits[:, b], "chance": by_chance[:, b], "factor_entropy": most[b]}
            for b, name in enumerate(names)}
    (n, t), counts = ids.shape, symbol_counts(ids, vocab)
    by_position = ids + vocab * torch.arange(t)     # symbol 5 at position 1 is not 5 at position 3
    halves = torch.randperm(n).tensor_split(2)
    measures = {"positional_disentanglement": lambda f: disentanglement(ids, f),
                "bag_of_symbols_disentanglement": lambda f: disentanglement(counts, f),
                "lift_purity": lambda f: lift_purity(ids, f, halves, vocab),
                "lift_purity_by_position": lambda f: lift_purity(by_position, f, halves, t * vocab)}
    for name, measure in measures.items():
        rows[name] = {"measured": measure(factors), "chance": chance(measure, factors, times)}
    return rows


def attention_measures(attention, masks, times):
    """attention (n, T, N), masks (n, H, W) or None -> {measure: {row: number or (T,)}}."""
    rows = {}
    if attention.shape[1] > 1:
        similarity = partial(attention_similarity, attention)
        rows["attention_similarity"] = {"measured": similarity(attention),
                                        "chance": chance(similarity, attention, times)}
    if masks is not None:
        cover = patch_cover(masks, attention.shape[2])
        rows["pointing_game"] = {
            "measured": pointing_game(attention, cover), "uniform_attention": cover.mean(),
            "chance": chance(lambda c: pointing_game(attention, c), cover, times)}
    return rows


def segment_measures(maps, masks, times):
    """FG-ARI and mBO of the segments of maps (n, T, N), masks (n, H, W) -> as the others. Chance:
    the segments of other images, which have more than 0 where maps keep to places."""
    segments = objects.segment(maps, masks.shape[2])
    return {name: {"measured": measure(masks, segments),
                   "chance": chance(lambda s, f=measure: f(masks, s), segments, times)}
            for name, measure in (("foreground_ari", objects.foreground_ari),
                                  ("mean_best_overlap", objects.best_overlap))}


def object_measures(ids, attention, factors, masks, vocab, times):
    """Of scenes: factors {name: (n, K)}, masks (n, H, W); see extras/objects.py. The chance level
    of binding is the figure for another object of the same image. -> as the others."""
    cover = objects.object_cover(masks, attention.shape[2])
    rows = segment_measures(attention, masks, times)
    attended = objects.attended_object(attention, cover)
    rows["attends_largest"] = {
        "measured": objects.attends_largest(attended),
        "chance": chance(lambda c: objects.attends_largest(objects.attended_object(attention, c)),
                         cover, times)}
    bound = objects.binding(ids, attended, factors, vocab)
    return rows | {f"binding_{name}": row for name, row in bound.items()}


def perturbation_measures(describe, images, ids, attention, k, times):
    """images (n, 3, H, W) uint8, their ids (n, T) and attention (n, T, N); k patches are occluded;
    describe(images, forced_ids=None) -> ids, maps. -> {measure: {row: number or (T,)}}."""
    elsewhere = attention.roll(len(attention) // 2, 0)                  # maps of other images
    changed = occlusion(describe, images, ids, attention, k)                    # (T, T)
    rows = {"occlusion": {
        "attended": changed.diag(),
        "attended_in_another_image": occlusion(describe, images, ids, elsewhere, k).diag(),
        "random": occlusion(describe, images, ids, torch.rand_like(attention[:, :1]), k)[0]}}
    if len(changed) > 1:
        rows["specificity"] = {"measured": specificity(changed)}
    stable = {f.__name__: agreement(ids, describe(f(images))[0]) for f in (crop, noise, jpeg)}
    rows["stability"] = stable | {"chance": chance(lambda x: agreement(ids, x), ids, times)}
    return rows


def passes(n, perturbed, length):
    """How many images `measure` has to describe."""
    return n + min(n, perturbed) * (2 * length + 1 + 3)


def measure(describe, image_set, vocab, share=0.25, times=20, perturbed=2000):
    """Everything that the ImageSet allows. describe(images, forced_ids=None) -> ids (n, T), maps
    (n, T, N). share: of the patches, occluded; times: permutations; perturbed: how many images are
    occluded and perturbed, the first ones. -> plain values: {measure: {row: number, or list of T,
    None where it is undefined}}."""
    ids, attention = describe_all(describe, image_set)
    k = max(1, round(share * attention.shape[2]))
    rows, factors = {}, image_set.factors
    scenes = bool(factors) and next(iter(factors.values())).ndim == 2
    if factors:                         # the largest object's size is always the same
        largest = {name: x[:, 0] for name, x in factors.items() if name != "size"} if scenes else {}
        rows = factor_measures(ids, largest or factors, vocab, times)
    rows |= attention_measures(attention, image_set.masks, times)
    if scenes:
        rows |= object_measures(ids, attention, factors, image_set.masks, vocab, times)
    some = torch.arange(min(perturbed, len(image_set)))
    rows |= perturbation_measures(describe, image_set.get(some), ids[some], attention[some], k,
                                  times)

    def to_json(x):
        values = torch.as_tensor(x).double()
        values = [v if math.isfinite(v) else None for v in values.flatten().tolist()]
        return values if torch.is_tensor(x) and x.ndim else values[0]

    return {name: {row: to_json(x) for row, x in table.items()} for name, table in rows.items()}


def print_table(rows):
    """The mean over positions in the first column, then each position, where there is one."""
    t = max(len(x) for row in rows.values() for x in row.values() if isinstance(x, list))
    print(f"{'':59}{'mean':>7}" + "".join(f"{i:7d}" for i in range(1, t + 1)))
    for name, row in rows.items():
        for i, (label, x) in enumerate(row.items()):
            known = [v for v in x if v is not None] if isinstance(x, list) else []
            cells = [sum(known) / len(known) if known else None, *x] if isinstance(x, list) else [x]
            cells = "".join("      -" if c is None else f"{c:7.3f}" for c in cells)
            print(f"{'' if i else name:32}{label:27}{cells}")


def run(args):
    if (min(args.images, args.perturbed) < 2 or args.permutations < 1
            or not 0 < args.occluded_share < 1):
        raise ValueError("--images and --perturbed must be at least 2, --permutations at least 1, "
                         "and --occluded-share between 0 and 1")
    checkpoint.check_folder(args.json)
    config, teacher, student = checkpoint.load_model(args.checkpoint, args.device)
    name, size = args.data or config["data"], config["image_size"]
    image_set = data.load(name, "test", size, args.images, config["seed"])
    torch.manual_seed(args.seed)
    total = passes(len(image_set), args.perturbed, config["length"])
    with Progress("images described", total) as progress:
        describe_images = partial(describe, teacher, student, size, progress=progress)
        rows = measure(describe_images, image_set, config["vocab"], args.occluded_share,
                       args.permutations, args.perturbed)
    record = {"data": name, "images": len(image_set),
              "perturbed_images": min(args.perturbed, len(image_set)),
              "occluded_share": args.occluded_share, "permutations": args.permutations,
              "seed": args.seed, "measures": rows}
    print("{data}: {images} test images, of which {perturbed_images} are perturbed; chance: mean "
          "of {permutations} permutations".format_map(record))
    print_table(rows)
    if args.json:
        checkpoint.write_json(args.json, record)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m extras.measures", description=__doc__,
                                     formatter_class=flags.HelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, help="RUN/ckpt.pt, written by train.py")
    add("--data", help="another data set than the run's, to see if its code transfers")
    add("--images", type=int, default=10_000,
        help="test images; with more the figures of rare symbols have less bias")
    add("--perturbed", type=int, default=2000,
        help="of them, for occlusion and stability, which take most of the time")
    add("--occluded-share", type=float, default=0.25, help="of the patches, in 0..1; lower it to "
        "occlude the one most attended patch")
    add("--permutations", type=int, default=20, help="how many the chance levels average over")
    add("--seed", type=int, default=0, help="of permutations, halves, noise and random patches")
    add("--json", type=Path, metavar="FILE", help="also write the record there")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    try:
        run(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        raise SystemExit(f"extras.measures: {error}") from None


if __name__ == "__main__":
    main()
