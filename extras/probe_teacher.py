"""Linear probes and k-NN of a teacher's tokens, for factors of `shapes` and `scenes` or classes.

    python -m extras.probe_teacher shapes --json results/teachers/shapes/probe.json
    python -m extras.probe_teacher scenes --data scenes --json FILE
    python -m extras.probe_teacher cifar10 --data folder:cifar10 --json FILE

A linear probe of the CLS per factor (top-1 in %), as Alain and Bengio (2017); chance is 1 / number
of values. The train split fits the probe and is the gallery of k-NN, the test split holds the
queries. On scenes, whose factors belong to objects:

    present     which values of a factor the scene has, from the CLS and from the mean of the patch
                tokens: mean over values of the average precision in %, chance the mean prevalence
    largest     of the largest object, from the CLS (its shape is the class)
    object      of each object, from the mean of the patch tokens, weighted by the patch's share of
                the object
    patch       of each object, from one random patch token that the object covers by half or more
"""
import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

import checkpoint
import data
import evaluate
import flags
import precision
import scoring
import teachers
from extras.objects import object_cover
from progress import Progress, counted


@torch.no_grad()
def features(teacher, images, args, select=lambda z_t: z_t[:, 0], batch_size=250):
    """An ImageSet of n images -> what `select` takes of their tokens z_t (B, N+1, d), for all
    (n, ...), float32 in main memory; by default the CLS. args: image_size, device, precision."""
    batches = evaluate.teacher_tokens(teacher, images, torch.arange(len(images)).split(batch_size),
                                      args.image_size, args.device, args.precision)
    return torch.cat([select(z_t).float().cpu()
                      for z_t in counted("teacher's tokens, images", len(images), batches)])


def probe(train, test, sets):
    """Features (n, d) and (m, d) of the two sets -> {factor: figures in %}."""
    figures = {}
    factors = sets[0].factors or {"class": sets[0].labels}
    with Progress("linear probes, factors", len(factors)) as progress:
        for name in factors:
            labels = [s.factors.get(name, s.labels) for s in sets]
            scores = scoring.linear_probe(train, labels[0], test, labels[1])
            row = {"chance": 100 / (1 + labels[0].max().item()), "linear_top1": scores[0]}
            if name in ("shape", "class"):
                knn = scoring.knn_accuracies(train, labels[0], test, labels[1])
                row |= {f"knn_top1_k{k}": top1 for k, (top1, _) in knn.items()}
            figures[name] = row
            progress.update()
    return figures


@torch.no_grad()
def scene_features(teacher, images, args, batch_size=250):
    """An ImageSet of n scenes -> {"cls": (n, d), "mean": (n, d), of all patch tokens, "object":
    (n, 4, d), "patch": (n, 4, d)}; "covered": (n, 4) bool, whether there is such a patch."""
    out, index_batches = [], torch.arange(len(images)).split(batch_size)
    with Progress("teacher's tokens, images", len(images)) as progress:
        for index, z_t in zip(index_batches, evaluate.teacher_tokens(
                teacher, images, index_batches, args.image_size, args.device, args.precision)):
            z_t = z_t.float().cpu()
            cover = object_cover(images.masks[index], z_t.shape[1] - 1)
            share = cover / cover.sum(2, keepdim=True).clamp(min=1e-6)
            random = (cover >= 0.5) * torch.rand(cover.shape)               # (b, 4, N)
            patch = z_t[:, 1:].gather(1, random.argmax(2)[..., None].expand(-1, -1, z_t.shape[2]))
            out.append([z_t[:, 0], z_t[:, 1:].mean(1), share @ z_t[:, 1:], patch,
                        random.amax(2) > 0])
            progress.update(len(z_t))
    return dict(zip(("cls", "mean", "object", "patch", "covered"), map(torch.cat, zip(*out))))


def average_precision(scores, truth):
    """scores (n,) and truth (n,) bool -> the mean over true ones of the precision at their rank,
    in 0..1; ties in the order given."""
    hits = truth[scores.argsort(descending=True, stable=True)].double()
    return (hits * hits.cumsum(0) / torch.arange(1, len(hits) + 1)).sum().item() / hits.sum().item()


def presence_probe(train, train_y, test, test_y, ridge=1e-3):
    """Ridge regression of multi-hot targets (n, V), an affine map in closed form -> the mean of the
    V average precisions on the test part, in %."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    x, test = (F.pad((part - mean) / std, (0, 1), value=1.0).double() for part in (train, test))
    gram = x.T @ x / len(x) + ridge * torch.eye(x.shape[1])
    scores = test @ torch.linalg.solve(gram, x.T @ train_y.double() / len(x))
    return 100 * sum(map(average_precision, scores.T, test_y.T)) / test_y.shape[1]


def multi_hot(values):
    """(n, 4) int64, -1 where there is none -> (n, V) bool, whether value v is there."""
    return F.one_hot(values + 1).amax(1)[:, 1:].bool()


def probe_scenes(train, test, sets):
    """What `scene_features` returned of the two sets -> {factor: figures in %}."""
    figures = {}
    with Progress("linear probes, factors", len(sets[0].factors)) as progress:
        for name in sets[0].factors:
            (y, test_y) = (s.factors[name] for s in sets)                       # (n, 4) each
            present = multi_hot(y), multi_hot(test_y)
            row = {"present_chance": 100 * present[1].double().mean().item()}
            row |= {f"present_{key}": presence_probe(train[key], present[0], test[key], present[1])
                    for key in ("cls", "mean")}
            row |= {"chance": 100 / (1 + y.max().item())}
            if name != "size":                                # the largest object's is always large
                row["largest_cls"] = scoring.linear_probe(train["cls"], y[:, 0],
                                                           test["cls"], test_y[:, 0])[0]
            for key in ("object", "patch"):
                some, test_some = ((part["covered"] & (values >= 0))
                                   for part, values in ((train, y), (test, test_y)))
                row[key] = scoring.linear_probe(train[key][some], y[some],
                                                 test[key][test_some], test_y[test_some])[0]
            figures[name] = row
            progress.update()
    knn = scoring.knn_accuracies(train["cls"], sets[0].labels, test["cls"], sets[1].labels)
    figures["class"] = {f"knn_top1_k{k}": top1 for k, (top1, _) in knn.items()}
    return figures


def run(args):
    checkpoint.check_folder(args.json)
    teacher = teachers.load_teacher(args.teacher).to(args.device)
    args.image_size, args.seed = args.image_size or teacher.image_size, 0
    sets = evaluate.load_splits(vars(args))
    torch.manual_seed(args.seed)
    if args.data == "scenes":
        figures = probe_scenes(*(scene_features(teacher, s, args) for s in sets), sets)
    else:
        figures = probe(*(features(teacher, s, args) for s in sets), sets)
    for name, row in figures.items():
        print(f"{name:8}" + "".join(f"  {key} {value:.2f}" for key, value in row.items()))
    if args.json:
        checkpoint.write_json(args.json, figures)


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=flags.HelpFormatter)
    add = p.add_argument
    add("teacher", help="a name in weights/ or a file of extras.pretrain")
    add("--data", default="shapes", help="as in train.py")
    add("--train-images", type=data.image_count, help="at most this many; default all")
    add("--test-images", type=data.image_count, help="at most this many; default all")
    add("--image-size", type=int, help="pixels; default the teacher's own")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="of the teacher; the probes run on the CPU")
    add("--precision", choices=precision.NAMES, default="auto",
        help="of the teacher, as in train.py")
    add("--json", type=Path, help="also write the figures there")
    return p.parse_args(argv)


def main():
    args = parse()
    try:
        run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"extras.probe_teacher: {error}") from None


if __name__ == "__main__":
    main()
