"""How much of the teacher's picture survives in a few symbols: k-NN, linear probe, collapse.

    python evaluate.py runs/shapes/ckpt.pt
    python evaluate.py runs/shapes/ckpt.pt --json results/shapes.json --probe-on both
    python evaluate.py runs/shapes/ckpt.pt --data cifar10 --test-images 2000 --soft

Every student figure uses hard (argmax) symbols, so a prefix of n symbols is exactly n log2 K bits;
the k-NN of soft mixtures minus it is a line below, --soft gives them rows of their own, beside it
and never instead of it. The train split is the gallery, the test split asks. With u the
L2-normalised features, class c gets from the k nearest images

    votes(c) = sum_i  exp(<u_test, u_i> / 0.07) [y_i = c]          (DINO, eval_knn.py)

    retention = student k-NN top-1 / teacher k-NN top-1            (mean over k = 10, 20, 100, 200)

Discrete codes tie: hundreds of images share a one-symbol code, so "the k nearest" is not a set.
Images tied at the k-th place each get the vote that breaking the tie at random would give them on
average; classes with equal votes score the chance of a random pick. Gallery order is never used.
(With more than k images to a code, k-NN is thus the majority of that code's images, for every k.)
"""

import argparse
import json
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F

from data import evaluation_problem, image_count, load, normalize
from checkpoint import load_model
from precision import autocast

KS = (10, 20, 100, 200)  # DINO's four neighbourhood sizes
# Similarities (or votes, relative to the largest) closer than this tie. They are float64, rounded
# by 1e-16 to 1e-13; the gaps between continuous features are far wider (1e-4 in 20 000 images).
TIE = 1e-9
CHUNK = 2**21  # similarities held at a time: 16 MB, so that they stay in a cache
L2_GRID = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # the linear probe's weight decays, strongest first


# ---- scores of features: weighted k-NN, linear probe, collapse -------------------------------

def checked_classes(train_x, train_y, test_x, test_y):
    """Labels of any kind -> (train_y, test_y, C), both in 0..C-1. Raises ValueError, see below."""
    if not len(train_x) or not len(test_x):
        raise ValueError("accuracy needs at least one train image and one test image")
    if not (train_x.isfinite().all() and test_x.isfinite().all()):
        raise ValueError("the features contain NaN or infinity (did training diverge?)")
    classes, y = torch.unique(torch.cat([train_y, test_y]), return_inverse=True)
    return y[: len(train_y)], y[len(train_y) :], len(classes)


def expected_hits(scores, labels, m):
    """Chance that the label is among the m best scores when equal scores are ordered at random:
    scores (B, C), labels (B,) -> (B,) in 0..1, and 0 or 1 wherever the m-th place is not tied."""
    own = scores.gather(1, labels[:, None])
    gap = TIE * scores.abs().amax(1, keepdim=True)
    better = (scores > own + gap).sum(1)
    equal = ((scores - own).abs() <= gap).sum(1)  # counts the label itself, so at least 1
    return ((m - better).double() / equal).clamp(0, 1)


def neighbour_votes(similarity, labels, classes, ks, temperature):
    """Yields the class votes (b, C) of the k nearest for each k; similarity (b, n), labels (n,).
    Images strictly nearer than the k-th place vote fully; those tied at the k-th place share the
    places that are left, (places left) / (number tied) of a vote each."""
    b = len(similarity)
    top = similarity.topk(max(ks), dim=1).values  # (b, max k), descending
    # Whoever can vote for any k: the max(ks) nearest and everyone tied with the last of them.
    row, column = (similarity >= top[:, -1:] - TIE).nonzero(as_tuple=True)  # (m,), (m,)
    near, cell = similarity[row, column], row * classes + labels[column]
    for k in ks:
        edge = top[row, k - 1]  # (m,) the similarity at this row's k-th place
        above = (near > edge + TIE).double()
        tied = ((near - edge).abs() <= TIE).double()
        n_above, n_tied = (near.new_zeros(b).index_add_(0, row, x) for x in (above, tied))
        vote = above + tied * ((k - n_above) / n_tied)[row]
        vote *= (near / temperature).exp()
        yield near.new_zeros(b * classes).index_add_(0, cell, vote).view(b, classes)


def knn_accuracies(train_x, train_y, test_x, test_y, ks=KS, temperature=0.07):
    """DINO's weighted k-NN for several k in one pass: {k: (top1, top5)}, in percent.
    train_x (n, d), test_x (m, d): features on any scale, any device with float64. Labels: any
    integers; with C < 5 classes top-5 is top-C. A k beyond the gallery lets the whole gallery vote.
    Equal to eval_knn.py when nothing ties. Where fewer than 5 classes got a vote, DINO fills its
    top 5 by class number; here the voteless classes tie, and share the places that are left.
    Raises ValueError for an empty part, and for features that are not finite.
    """
    train_y, test_y, classes = checked_classes(train_x, train_y, test_x, test_y)
    gallery, queries = (F.normalize(x.double(), dim=1) for x in (train_x, test_x))
    clamped = [min(k, len(gallery)) for k in ks]
    hits = gallery.new_zeros(len(ks), 2)
    chunk = max(1, CHUNK // len(gallery))
    for x, y in zip(queries.split(chunk), test_y.split(chunk)):
        votes = neighbour_votes(x @ gallery.T, train_y, classes, clamped, temperature)
        for i, v in enumerate(votes):
            hits[i] += torch.stack([expected_hits(v, y, m).sum() for m in (1, 5)])
    return {k: tuple(h) for k, h in zip(ks, (100 * hits / len(queries)).tolist())}


def knn_accuracy(train_x, train_y, test_x, test_y, k, temperature=0.07):
    """(top1, top5) in percent for one k: see `knn_accuracies`."""
    return knn_accuracies(train_x, train_y, test_x, test_y, (k,), temperature)[k]


def fit_logistic(x, y, classes, l2, iterations=100):
    """Minimises mean cross-entropy + l2/2 |W|^2 (bias free): x (n, d), y (n,) -> W (d, C), b (C,).
    Full-batch L-BFGS from zero: deterministic, no learning rate, and the problem is convex."""
    weight = x.new_zeros(x.shape[1], classes, requires_grad=True)
    bias = x.new_zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=iterations, tolerance_grad=1e-6,
                               line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        value = F.cross_entropy(x @ weight + bias, y) + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return weight.detach(), bias.detach()


def linear_probe(train_x, train_y, test_x, test_y, grid=L2_GRID, iterations=100, seed=0):
    """Multinomial logistic regression on frozen features: (top1, top5) in percent.
    Our choices, because the paper names no solver: features standardised by the train part
    (columns that never vary are dropped); the weight decay with the lowest cross-entropy on a
    random tenth of the *train* part, then refitted on all of it. The test part is used once.
    x: (n, d) of any scale, one-hot symbols too. Raises ValueError as `knn_accuracies` does.
    """
    train_y, test_y, classes = checked_classes(train_x, train_y, test_x, test_y)
    train_x, test_x = train_x.float(), test_x.float()
    mean, std = train_x.mean(0), train_x.std(0, correction=0)
    varies = std > 1e-5 * train_x.abs().amax(0)  # more than float32's rounding of a constant
    train_x, test_x = ((x - mean)[:, varies] / std[varies] for x in (train_x, test_x))

    order = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(seed))
    held, kept = order.to(train_x.device).tensor_split([max(1, len(order) // 10)])
    kept_x, held_x = train_x[kept], train_x[held]

    def held_out_loss(l2):
        weight, bias = fit_logistic(kept_x, train_y[kept], classes, l2, iterations)
        return F.cross_entropy(held_x @ weight + bias, train_y[held]).item()

    best = min(grid, key=held_out_loss)  # equal losses keep the earlier, stronger decay
    weight, bias = fit_logistic(train_x, train_y, classes, best, iterations)
    scores = test_x @ weight + bias  # (m, C)
    return tuple(100 * expected_hits(scores, test_y, m).mean().item() for m in (1, 5))


def code_figures(ids, vocab):
    """Collapse figures of ids (n, T) in 0..vocab-1. perplexity: T floats in 1..vocab, exp of the
    entropy of each position's histogram; usage: share of the vocabulary said anywhere; distinct:
    different sequences / images."""
    histogram = torch.stack([column.bincount(minlength=vocab) for column in ids.T])  # (T, K)
    entropy = torch.special.entr(histogram.double() / len(ids)).sum(1)  # (T,)
    return {"perplexity": entropy.exp().tolist(),
            "usage": (histogram.sum(0) > 0).double().mean().item(),
            "distinct": len(torch.unique(ids, dim=0)) / len(ids)}


# ---- a data set through teacher and student --------------------------------------------------

def one_feature_per_code(z, codes):
    """Rows of z (n, d) with the same code (n, t) all get the feature of the first of them: they
    differ by rounding (kernels round by place in the batch), and it would break exact ties."""
    _, code = torch.unique(codes, dim=0, return_inverse=True)  # (n,)
    first = torch.full_like(code, len(z)).scatter_reduce_(0, code, torch.arange(len(z)), "amin")
    return z[first[code]]


@torch.no_grad()
def encode(student, teacher, image_set, size, precision="auto", batch_size=256, soft=False):
    """Runs an ImageSet of n images at size x size -> {"cls": (n, d) the teacher's CLS, "space": the
    same as the student gets it, "ids": (n, T), "z": (D, n, d) of each prefix in student.lengths,
    from hard symbols, "soft": the same from soft assignments, where `soft`}, on the CPU, float32."""
    device, out = next(student.parameters()).device, []
    index_batches = torch.arange(len(image_set)).split(batch_size)
    for images in image_set.batches(index_batches):
        with autocast(str(device), precision):
            z_t = teacher(normalize(images.to(device), size))                   # (B, N+1, d)
            inputs = student.preprocess(z_t)
            sequences = {"z": student.describe(inputs, hard=True)}
            if soft:
                sequences["soft"] = student.describe(inputs)
        batch = {"cls": z_t[:, 0].float(), "space": inputs[:, 0].float(),
                 "ids": sequences["z"].ids}
        for name, sequence in sequences.items():    # in float32: bfloat16 would blur codes
            batch[name] = student.interpret(sequence.embeddings.float()).transpose(0, 1)
        out.append({name: x.cpu() for name, x in batch.items()})
    out = {name: torch.cat([batch[name] for batch in out], dim=int(name in ("z", "soft")))
           for name in out[0]}
    for z, n in zip(out["z"], student.lengths):
        z.copy_(one_feature_per_code(z, out["ids"][:, :n]))
    return out


def one_hot(ids, vocab):
    """ids (n, t) in 0..vocab-1 -> (n, t * vocab) float32: what was said, without its embedding."""
    cells = ids + vocab * torch.arange(ids.shape[1], device=ids.device)
    return torch.zeros(len(ids), ids.shape[1] * vocab, device=ids.device).scatter_(1, cells, 1)


def monitor(trainer, held_out, knn):
    """Collapse figures of hard symbols on images not trained on, and, where there are labels and
    `knn`, k-NN (k = 20) per prefix: half of those images are the queries, the others the gallery."""
    args, student = trainer.args, trainer.student.eval()
    code = encode(student, trainer.teacher, held_out, args.image_size, args.precision)
    figures = code_figures(code["ids"], args.vocab)
    if knn and held_out.labelled:
        half, y = len(held_out) // 2, held_out.labels
        k = min(20, len(y) - half)
        scores = [knn_accuracy(z[half:], y[half:], z[:half], y[:half], k)[0]
                  for z in code["z"]]
        figures |= {"knn_prefix": scores, "knn_top1": scores[-1]}
    return figures


def collapse_warnings(record):
    """What collapse looks like in the figures of a line of the log."""
    share = record["teacher_entropy"] / record["teacher_entropy_max"]
    if share < 0.005:
        yield ("the teacher's entropy is 0: all images have one prototype (raise --teacher-temp, or "
               "--centering sinkhorn)")
    if share > 0.995:
        yield "the teacher's entropy is ln P: its targets are uniform (lower --teacher-temp)"
    if max(record["perplexity"]) < 1.5:
        yield "all images get the same symbols (raise --tau or --tau-start, or lower --lr)"


# ---- a run: all its figures, and the report --------------------------------------------------

def load_splits(config):
    """The ImageSets [train, test] that config names. Raises ValueError where labels are missing."""
    name, size, seed = config["data"], config["image_size"], config["seed"]
    if problem := evaluation_problem(name):
        raise ValueError(problem)
    return [load(name, s, size, config[f"{s}_images"], seed) for s in ("train", "test")]


def score(*features, probe=True):
    """One row of the table from train_x, train_y, test_x, test_y: (top1, top5) pairs, k-NN for each
    k, their mean, and, with `probe`, the linear probe."""
    knn = knn_accuracies(*features)
    mean = tuple(sum(column) / len(knn) for column in zip(*knn.values()))
    return {"each": knn, "knn": mean} | ({"linear": linear_probe(*features)} if probe else {})


def evaluate(teacher, student, config, soft=False, probe_on="z", batch_size=256):
    """All figures of a run: a dict for `print_table` and `summary`. Teacher and student: on one
    device, in eval mode. config: data, image_size, vocab, train_images, test_images, seed.
    probe_on: "z", "onehot" or "both". soft: probe soft mixtures too, which cost much the most;
    their k-NN is always measured. The collapse figures are of the test part."""
    sets, vocab = load_splits(config), config["vocab"]
    device = next(student.parameters()).device
    device = device if device.type == "cuda" else torch.device("cpu")  # k-NN needs float64
    codes = [encode(student, teacher, s, config["image_size"], config.get("precision","auto"), batch_size, soft=True) for s in sets]
    train, test = ({name: x.to(device) for name, x in code.items()} for code in codes)
    train_y, test_y = (s.labels.to(device) for s in sets)

    ceiling = score(train["cls"], train_y, test["cls"], test_y)
    results = {"teacher": ceiling, "student": {}, "soft": {}, "onehot": {}, "retention": {},
               "soft_minus_hard": {}}
    for j, n in enumerate(student.lengths):
        row = score(train["z"][j], train_y, test["z"][j], test_y)
        mixed = score(train["soft"][j], train_y, test["soft"][j], test_y, probe=soft)
        if soft:
            results["soft"][n] = mixed
        if probe_on != "z":
            a, b = (one_hot(part["ids"][:, :n], vocab) for part in (train, test))
            target = row if probe_on == "onehot" else results["onehot"].setdefault(n, {})
            target["linear"] = linear_probe(a, train_y, b, test_y)
        results["student"][n] = row
        results["retention"][n] = row["knn"][0] / max(ceiling["knn"][0], 1e-9)
        results["soft_minus_hard"][n] = mixed["knn"][0] - row["knn"][0]
    said, labels = codes[1]["ids"], sets[1].labels
    shown = [i for c in range(5) for i in (labels == c).nonzero()[:2, 0].tolist()]
    results["examples"] = [(sets[1].classes[labels[i]], said[i].tolist()) for i in shown]
    results |= {"data": config["data"], "sizes": [len(s) for s in sets], "vocab": vocab}
    return results | code_figures(said, vocab) | {"bits": said.shape[1] * math.log2(vocab)}


def summary(results):
    """What --json writes: percentages 0..100, prefixes as strings, shares 0..1, bits per image."""
    def flat(row):
        return {f"{m}_top{i}": row[m][i > 1] for m in ("knn", "linear") for i in (1, 5)}

    figures = {"teacher": flat(results["teacher"])}
    figures["student"] = {str(n): flat(row) for n, row in results["student"].items()}
    figures["retention"] = {str(n): kept for n, kept in results["retention"].items()}
    return figures | {key: results[key] for key in ("perplexity", "usage", "distinct", "bits")}


def print_table(results):
    """The rows, the collapse figures, and what the student said of a few test images."""
    def line(name, bits, row, kept="-"):
        pairs = [row.get("each", {}).get(k) for k in KS] + [row.get("knn"), row["linear"]]
        cells = [f"{p[0]:.2f} / {p[1]:.2f}" if p else "-" for p in pairs]
        print(f"{name:19}{bits:>5}" + "".join(f"{c:>16}" for c in cells) + f"{kept:>11}")

    sizes = "{} train images (gallery), {} test images".format(*results["sizes"])
    print(f"{results['data']}: {sizes}; top-1 / top-5 in %")
    heads = [f"k-NN, k = {k}" for k in KS] + ["k-NN mean", "linear"]
    print(f"{'':19}{'bits':>5}" + "".join(f"{h:>16}" for h in heads) + f"{'retention':>11}")
    line("teacher CLS", "-", results["teacher"])
    for kind, note in (("student", ""), ("soft", ", soft"), ("onehot", ", one-hot")):
        for n, row in results[kind].items():
            bits = "-" if kind == "soft" else f"{n * math.log2(results['vocab']):.4g}"
            kept = f"{results['retention'][n]:.3f}" if kind == "student" else "-"
            line(f"{n} symbol{'s' * (n > 1)}{note}", bits, row, kept)
    print("k-NN mean of soft mixtures minus that of symbols: "
          + ", ".join(f"{gap:+.2f}" for gap in results["soft_minus_hard"].values()) + " points")
    print("perplexity by position " + " ".join(f"{p:.1f}" for p in results["perplexity"])
          + f" of {results['vocab']}; vocabulary in use {results['usage']:.1%}; "
          f"distinct sequences / images {results['distinct']:.3f}")
    for name, ids in results["examples"]:
        print(f"  {name:12} " + " ".join(f"{i:4d}" for i in ids))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoint", help="RUN/ckpt.pt, written by train.py")
    add("--data", default=argparse.SUPPRESS,
        help="another data set than the run's, to see if its language carries over")
    count = {"type": image_count, "default": argparse.SUPPRESS}  # not given: as the run; all: None
    add("--train-images", **count, help="gallery size, or all; fewer is faster and scores lower")
    add("--test-images", **count, help="or all; the standard error is under 50 / sqrt(n) %%")
    add("--json", type=Path, metavar="FILE", help="also write the figures there")
    add("--soft", action="store_true", help="also score soft mixtures, which are not n log2 K bits")
    add("--probe-on", choices=("z", "onehot", "both"), default="z", help="linear probe of the "
        "student's z_s, of one-hot symbols instead (slow for large K), or of each in its own row")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--batch-size", type=int, default=256, help="images at a time; lower if memory runs out")
    args = parser.parse_args()
    try:
        own = ("data", "train_images", "test_images")
        given = {k: v for k, v in vars(args).items() if k in own}
        if min([args.batch_size, *(n for n in given.values() if isinstance(n, int))]) < 1:
            raise ValueError("--batch-size, --train-images and --test-images must be at least 1")
        if args.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("--device cuda, but PyTorch finds no GPU; use --device cpu")
        if args.json and not args.json.absolute().parent.is_dir():
            raise FileNotFoundError(f"--json {args.json}: its folder does not exist; make it first")
        config, teacher, student = load_checkpoint(args.checkpoint, args.device)
        config |= given
        results = evaluate(teacher, student, config, args.soft, args.probe_on, args.batch_size)
        print_table(results)
        if args.json:  # all or nothing: a reader, or a crash, never meets half a file
            part = args.json.with_name(f"{args.json.name}.tmp")
            part.write_text(json.dumps(summary(results), indent=2) + "\n")
            os.replace(part, args.json)
    except (ValueError, OSError) as error:
        raise SystemExit(f"evaluate.py: {error}") from None


if __name__ == "__main__":
    main()
