"""Linear probe and k-NN of a teacher's CLS, for each factor of `shapes` or for the classes.

    python -m extras.probe_teacher shapes --json results/teacher-shapes/probe.json
    python -m extras.probe_teacher cifar10 --data folder:cifar10 --json FILE

A linear probe per factor (top-1 in %), as Alain and Bengio (2017); chance is 1 / number of values.
The train split fits the probe and is the gallery of k-NN, the test split holds the queries.
"""
import argparse
from pathlib import Path

import torch

import checkpoint
import data
import evaluate
import precision
import scoring
import teachers
from progress import Progress


@torch.no_grad()
def features(teacher, images, args, select=lambda z_t: z_t[:, 0], batch_size=250):
    """An ImageSet of n images -> what `select` takes of their tokens z_t (B, N+1, d), for all
    (n, ...), float32 in main memory; by default the CLS. args: image_size, device, precision."""
    out, index_batches = [], torch.arange(len(images)).split(batch_size)
    with Progress("teacher's tokens, images", len(images)) as progress:
        for z_t in evaluate.teacher_tokens(teacher, images, index_batches, args.image_size,
                                           args.device, args.precision):
            out.append(select(z_t).float().cpu())
            progress.update(len(z_t))
    return torch.cat(out)


def check_folder(path):
    """Raises FileNotFoundError where a file cannot be written later; path: a Path or None."""
    if path and not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--json {path}: its folder does not exist; make it first")


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


def run(args):
    check_folder(args.json)
    teacher = teachers.load_teacher(args.teacher).to(args.device)
    args.image_size, args.seed = teacher.image_size, 0
    sets = evaluate.load_splits(vars(args))
    figures = probe(*(features(teacher, s, args) for s in sets), sets)
    for name, row in figures.items():
        print(f"{name:8}" + "".join(f"  {key} {value:.2f}" for key, value in row.items()))
    if args.json:
        checkpoint.write_json(args.json, figures)


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("teacher", help="a name in weights/ or a file of extras.pretrain")
    add("--data", default="shapes", help="as in train.py")
    add("--train-images", type=data.image_count, help="at most this many; default all")
    add("--test-images", type=data.image_count, help="at most this many; default all")
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
