"""Accuracy of a few symbols beside the teacher's: k-NN, linear probe, collapse figures.

    python evaluate.py runs/shapes-stable-softmax-128-s0/ckpt.pt
    python evaluate.py RUN/ckpt.pt --json results.json --probe-on both --soft
    python evaluate.py RUN/ckpt.pt --data cifar10 --test-images 2000

Every figure of the student uses hard (argmax) symbols, so a prefix of n symbols is n log2 K bits.
Soft assignments are scored beside them, never instead (`soft_minus_hard`, --soft). The train split
is the gallery, the images of the test split are the queries, and scoring.py has the k-NN and the
linear probe.

    relative k-NN accuracy = top-1 of the student / top-1 of the CLS

(means over k = 10, 20, 100, 200), once against the teacher's raw CLS, and once against the CLS in
the student's own space, whose whitening alone can lift k-NN.
"""
import argparse
import math
import time
from pathlib import Path

import torch

from checkpoint import check_folder, load_model, write_json
from data import GALLERY, evaluation_problem, image_count, load, normalize
from flags import HelpFormatter
from precision import NAMES, autocast, resolve
from progress import counted
from scoring import KS, code_figures, knn_accuracy, knn_hits, linear_probe, pack

# ---- a data set through teacher and student --------------------------------------------------

def one_feature_per_code(z, codes):
    """Rows of z (n, d) with the same code (n, t) all get the feature of the first of them: they
    differ by rounding (kernels round by place in the batch), and it would break exact ties."""
    _, code = torch.unique(codes, dim=0, return_inverse=True)  # (n,)
    first = torch.full_like(code, len(z)).scatter_reduce_(0, code, torch.arange(len(z)), "amin")
    return z[first[code]]


def teacher_tokens(teacher, image_set, index_batches, size, device, precision):
    """Yields z_t (b, N+1, d) of the images at each of `index_batches`, resized to size x size."""
    for images in image_set.batches(index_batches):
        with autocast(device, precision):
            z_t = teacher(normalize(images.to(device), size))
        yield z_t


def encode_batch(student, z_t, precision, soft):
    """z_t (b, N+1, d) -> the entries of `encode`, of b images."""
    with autocast(str(z_t.device), precision):
        inputs = student.preprocess(z_t)
        sequences = {"z": student.describe(inputs, hard=True)}
        if soft:
            sequences["soft"] = student.describe(inputs)
    # in float32, because bfloat16 would blur codes; (b, D, d) -> (D, b, d)
    features = {name: student.interpret(sequence.embeddings.float()).transpose(0, 1)
                for name, sequence in sequences.items()}
    return {"cls": z_t[:, 0].float(), "space": inputs[:, 0].float(), "ids": sequences["z"].ids,
            **features}


@torch.no_grad()
def encode(student, teacher, image_set, size, precision="auto", batch_size=256, soft=False,
           tokens=None):
    """Runs an ImageSet of n images at size x size -> {"cls": (n, d) the teacher's CLS, "space": the
    CLS as the student gets it, "ids": (n, T), "z": (D, n, d) of each prefix in student.lengths,
    from hard symbols, "soft": the same from soft assignments, where `soft` and the discretizer has
    any}, float32, in main memory: 4 n d (2 + 2 D) bytes, 15 GB for a million images of width 384.
    tokens: function of indices (b,) -> the teacher's tokens (b, N+1, d) of these images, where they
    are at hand."""
    device, n, out = str(next(student.parameters()).device), len(image_set), {}
    index_batches = torch.arange(n).split(batch_size)
    if tokens is None:
        batches = teacher_tokens(teacher, image_set, index_batches, size, device, precision)
    else:
        batches = (tokens(index).to(device).float() for index in index_batches)
    for index, z_t in zip(counted("encoding, images", n, index_batches), batches):
        batch = encode_batch(student, z_t, precision, soft)
        if soft and not out and torch.equal(batch["soft"], batch["z"]):
            del batch["soft"]                               # straight-through, vq: nothing is soft
            soft = False
        for name, x in batch.items():                                   # (..., b, width)
            if name not in out:
                out[name] = torch.empty(*x.shape[:-2], n, x.shape[-1], dtype=x.dtype)
            out[name][..., index, :] = x.cpu()
    for z, length in zip(out["z"], student.lengths):
        z.copy_(one_feature_per_code(z, out["ids"][:, :length]))
    return out


def one_hot(ids, vocab):
    """ids (n, t) in 0..vocab-1 -> (n, t * vocab) float32: the symbols without their embeddings."""
    cells = ids + vocab * torch.arange(ids.shape[1], device=ids.device)
    return torch.zeros(len(ids), ids.shape[1] * vocab, device=ids.device).scatter_(1, cells, 1)


def monitor(trainer, held_out, knn):
    """Collapse figures of hard symbols on images not trained on, and, where there are labels and
    `knn`, k-NN (k = 20) of each prefix: half of the images are queries, the others the gallery."""
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
    """Yields what in a line of the log is a sign of collapse."""
    share = record["teacher_entropy"] / record["teacher_entropy_max"]
    if share < 0.005:
        yield ("the teacher's entropy is 0: all images have one prototype (raise --teacher-temp, "
               "or --centering sinkhorn)")
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
    storage = config.get("storage", "auto")
    return [load(name, split, size, config[f"{split}_images"], seed, storage)
            for split in ("train", "test")]


def score(*features, probe=True):
    """One row of the table from train_x, train_y, test_x, test_y: (top1, top5) pairs, k-NN for each
    k, their mean, with `probe` the linear probe, and each test image's own k-NN top-1, (m,) in
    0..1, mean over k."""
    hits = torch.stack([*knn_hits(*features).values()])                 # (len(KS), m, 2)
    each = [tuple(pair) for pair in (100 * hits.mean(1)).tolist()]
    row = {"each": dict(zip(KS, each)), "knn": tuple((100 * hits.mean((0, 1))).tolist()),
           "hits": hits[..., 0].mean(0)}
    return row | ({"linear": linear_probe(*features)} if probe else {})


def score_prefixes(train, train_y, test, test_y, lengths, vocab, soft, probe_on):
    """The rows of all prefixes, from what `encode` returned for both splits."""
    rows = {"student": {}, "soft": {}, "onehot": {}, "soft_minus_hard": {}}
    for j, n in enumerate(lengths):
        row = rows["student"][n] = score(train["z"][j], train_y, test["z"][j], test_y)
        rows["soft_minus_hard"][n] = 0.0                # where no assignment is soft
        if "soft" in train and "soft" in test:
            soft_row = score(train["soft"][j], train_y, test["soft"][j], test_y, probe=soft)
            rows["soft_minus_hard"][n] = soft_row["knn"][0] - row["knn"][0]
            if soft:
                rows["soft"][n] = soft_row
        if probe_on != "z":
            a, b = (one_hot(part["ids"][:, :n], vocab) for part in (train, test))
            target = row if probe_on == "onehot" else rows["onehot"].setdefault(n, {})
            target["linear"] = linear_probe(a, train_y, b, test_y)
    return rows


def evaluate(teacher, student, config, soft=False, probe_on="z", batch_size=256, tokens=None,
             max_gallery=GALLERY):
    """All figures of a run: a dict for `print_table` and `summary`. Teacher and student: on one
    device, in eval mode. config: data, image_size, vocab, train_images, test_images, seed and, if
    not "auto", precision and storage. probe_on: "z", "onehot" or "both". soft: probe soft
    assignments too; their k-NN is always measured. tokens: as `encode` takes them, of the
    gallery. max_gallery: images in the gallery, or None for all train_images. The collapse figures
    are of the test split."""
    start, vocab = time.monotonic(), config["vocab"]
    if max_gallery:
        count = min(config["train_images"] or max_gallery, max_gallery)
        config = config | {"train_images": count}
    sets = load_splits(config)
    device = next(student.parameters()).device
    precision = resolve(str(device), config.get("precision", "auto"))
    codes = [encode(student, teacher, part, config["image_size"], precision, batch_size, True, z_t)
             for part, z_t in zip(sets, (tokens, None))]
    device = device if device.type == "cuda" else torch.device("cpu")   # votes need float64
    train, test = ({name: x.to(device) for name, x in code.items()} for code in codes)
    train_y, test_y = (s.labels.to(device) for s in sets)

    results = {"teacher": score(train["cls"], train_y, test["cls"], test_y),
               "teacher_space": score(train["space"], train_y, test["space"], test_y)}
    results |= score_prefixes(train, train_y, test, test_y, student.lengths, vocab, soft, probe_on)
    for name, row in (("raw", results["teacher"]), ("space", results["teacher_space"])):
        results[f"retention_{name}"] = {n: prefix["knn"][0] / max(row["knn"][0], 1e-9)
                                        for n, prefix in results["student"].items()}
    ids, labels = codes[1]["ids"], sets[1].labels
    shown = [i for c in range(5) for i in (labels == c).nonzero()[:2, 0].tolist()]
    results["examples"] = [(sets[1].classes[labels[i]], ids[i].tolist()) for i in shown]
    results |= {"data": config["data"], "sizes": [len(s) for s in sets], "vocab": vocab}
    return results | code_figures(ids, vocab) | {
        "bits": ids.shape[1] * math.log2(vocab), "precision": precision,
        "seconds": round(time.monotonic() - start, 1)}


def flat(row):
    """`score`'s row for a JSON file; the hits of each test image as `scoring.pack` writes them."""
    figures = {f"{name}_top{i}": row[name][i > 1]
               for name in ("knn", "linear") if name in row for i in (1, 5)}
    return figures | ({"knn_hits": pack(row["hits"])} if "hits" in row else {})


def summary(results):
    """results.json, and what --json writes: percentages 0..100, ratios and shares, bits per image,
    soft_minus_hard in points; keys of prefixes are strings."""
    figures = {name: flat(results[name]) for name in ("teacher", "teacher_space")}
    for name in ("student", "soft", "onehot"):
        if results[name]:
            figures[name] = {str(n): flat(row) for n, row in results[name].items()}
    for name in ("retention_raw", "retention_space", "soft_minus_hard"):
        figures[name] = {str(n): value for n, value in results[name].items()}
    return figures | {key: results[key] for key in ("perplexity", "codebook_usage", "unique_codes",
                                                    "bits", "precision", "seconds")}


def print_table(results):
    """The rows, the collapse figures, and the symbols of a few test images."""
    def line(name, bits, row, ratios=("", "")):
        pairs = [row.get("each", {}).get(k) for k in KS] + [row.get("knn")]
        cells = [pair and pair[0] for pair in pairs] + [pairs[-1] and pairs[-1][1]]
        cells += row.get("linear", (None, None))
        texts = ("-" if cell is None else f"{cell:.2f}" for cell in cells)
        print(f"{name:23}{bits:>5}" + "".join(f"{text:>7}" for text in texts)
              + "".join(f"{ratio:>12}" for ratio in ratios))

    print("{}: {} gallery images, {} queries; all accuracies in %".format(
        results["data"], *results["sizes"]))
    print(f"{'':28}{'k-NN top-1 with k neighbours':>35}{'k-NN':>7}{'linear probe':>14}"
          f"{'relative k-NN accuracy':>24}")
    heads = [*KS, "mean", "top-5", "top-1", "top-5"]
    print(f"{'':23}{'bits':>5}" + "".join(f"{h:>7}" for h in heads)
          + f"{'to raw CLS':>12}{'to space':>12}")
    line("teacher's raw CLS", "", results["teacher"])
    line("CLS in student's space", "", results["teacher_space"])
    for name, note in (("student", ""), ("soft", ", soft"), ("onehot", ", one-hot")):
        for n, row in results[name].items():
            bits = "" if name == "soft" else f"{n * math.log2(results['vocab']):.4g}"
            ratios = [f"{results[f'retention_{to}'][n]:.3f}" if name == "student" else ""
                      for to in ("raw", "space")]
            line(f"{n} symbol{'s' * (n > 1)}{note}", bits, row, ratios)
    print("k-NN top-1 of soft assignments minus that of hard symbols: "
          + ", ".join(f"{gap:+.2f}" for gap in results["soft_minus_hard"].values()) + " points")
    print("perplexity by position: " + " ".join(f"{p:.1f}" for p in results["perplexity"])
          + f" of {results['vocab']}\ncodebook usage {results['codebook_usage']:.1%}, unique "
          f"sequences / images {results['unique_codes']:.3f}, computed in {results['precision']} "
          f"in {results['seconds']:.0f} s")
    for name, ids in results["examples"]:
        print(f"  {name:12} " + " ".join(f"{i:4d}" for i in ids))


def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=HelpFormatter)
    add = parser.add_argument
    add("checkpoint", type=Path, help="RUN/ckpt.pt, written by train.py")
    add("--data", default=argparse.SUPPRESS,
        help="another data set than the run's, to see whether its code carries over")
    count = {"type": image_count, "default": argparse.SUPPRESS}  # not given: as the run; all: None
    add("--train-images", **count, help="gallery size, or all; fewer is faster and scores lower. "
        f"Not given: as the run, at most {GALLERY}")
    add("--test-images", **count, help="or all; the standard error is under 50 / sqrt(n) %%")
    add("--json", type=Path, metavar="FILE", help="also write the figures there")
    add("--soft", action="store_true",
        help="rows for soft assignments too, which are not n log2 K bits")
    add("--probe-on", choices=("z", "onehot", "both"), default="z", help="linear probe of the "
        "student's z_s, of one-hot symbols instead (slow for large K), or of each in its own row")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--precision", choices=NAMES, default="auto",
        help="of the networks; auto: bfloat16 where this machine computes it faster (measured)")
    add("--batch-size", type=int, default=256, help="images at a time; lower if memory runs out")
    return parser.parse_args()


def main():
    args = parse()
    try:
        own = ("data", "train_images", "test_images", "precision")
        given = {k: v for k, v in vars(args).items() if k in own}
        if min([args.batch_size, *(n for n in given.values() if isinstance(n, int))]) < 1:
            raise ValueError("--batch-size, --train-images and --test-images must be at least 1")
        check_folder(args.json)
        config, teacher, student = load_model(args.checkpoint, args.device)
        results = evaluate(teacher, student, config | given, args.soft, args.probe_on,
                           args.batch_size,
                           max_gallery=None if "train_images" in given else GALLERY)
        print_table(results)
        if args.json:
            write_json(args.json, summary(results))
    except (ValueError, OSError) as error:
        raise SystemExit(f"evaluate.py: {error}") from None


if __name__ == "__main__":
    main()
