"""What 1, 2, 4 and 8 symbols keep without any learning of a language: k-means on the teacher's CLS.

    python -m extras.baselines --vocab 128 --json results/baselines-shapes-128-s0.json
    python -m extras.baselines --space --json results/baselines-shapes-128-space-s0.json

1 symbol: k-means with K centres. More: residual k-means, whose stage j quantises what stages
1 … j-1 left over (Juang and Gray 1982). n stages are n symbols of K, exactly as many bits as a
prefix of n symbols of the student; the receiver knows the K * n centres and adds them up. Plain
k-means stops at 1 symbol: 2 symbols of 128 are 14 bits, 16 384 centres for 20 000 pictures, and 4
are 2^28. Same data, same k-NN and linear probe as evaluate.py. A student below these figures has
not learned anything that its teacher's features and a minute of k-means would not give.
"""
import argparse
import json
import time
from pathlib import Path

import torch

import checkpoint
import data
import discretize
import evaluate
import model
import train as train_script
from extras.probe_teacher import cls_features


def add_flags(p):
    """What every baseline asks for, and train.py too; extras/vqvae.py shares them."""
    p.add_argument("--data", default="shapes", help="as in train.py")
    p.add_argument("--teacher", default="shapes", help="as in train.py")
    p.add_argument("--image-size", type=int, default=32, help="pixels")
    p.add_argument("--length", type=int, default=8, help="T, symbols; a power of two")
    count = {"type": data.image_count, "help": "at most so many, or all"}
    p.add_argument("--train-images", default=20000, **count)
    p.add_argument("--test-images", default=5000, **count)
    p.add_argument("--seed", type=int, default=0, help="of the draws, and of the data, as train.py")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="for the networks; k-means and probes run on the CPU")


def percentages(train_x, train_y, test_x, test_y, linear=True):
    """The figures of evaluate.score as a flat row: k-NN (mean over k) and, unless there are so many
    features that it takes minutes, the linear probe; top-1 and top-5 in %."""
    knn = evaluate.knn_accuracies(train_x, train_y, test_x, test_y).values()
    pairs = {"knn": [sum(column) / len(knn) for column in zip(*knn)]}
    if linear:
        pairs["linear"] = evaluate.linear_probe(train_x, train_y, test_x, test_y)
    return {f"{name}_top{i}": pair[i > 1] for name, pair in pairs.items() for i in (1, 5)}


def residual_kmeans(train, test, vocab, stages, iterations=25):
    """train (n, d), test (m, d) -> for each number of stages 1 … stages: what is rebuilt of train
    and of test, and the symbols of test (m, stages so far). Centres are fitted on train alone."""
    left, sums = [train.clone(), test.clone()], [torch.zeros_like(train), torch.zeros_like(test)]
    said = torch.empty(len(test), 0, dtype=torch.long)
    for _ in range(stages):
        centres = discretize.kmeans(left[0], vocab, iterations)
        for i in range(2):
            ids = torch.cdist(left[i], centres).argmin(1)
            sums[i], left[i] = sums[i] + centres[ids], left[i] - centres[ids]
        said = torch.cat([said, ids[:, None]], 1)               # the last of the two are test's
        yield sums[0], sums[1], said


def features(args, sets):
    """Yields (name, train features, test features, symbols or None), the teacher first."""
    teacher = model.build_teacher(args.teacher).to(args.device)
    train, test = (cls_features(teacher, s.images, args.image_size) for s in sets)
    yield "teacher", train, test, None
    if args.space:
        student = model.Student(teacher.width, None, None, 1, (1, 1), (1, 1), draft=False)
        train_script.fit_teacher_statistics(teacher, student.to(args.device), None, sets[0], args)
        student.cpu()
        train, test = (student.space(x[:, None])[:, 0] for x in (train, test))
        yield "whitened", train, test, None
    for n, pair in enumerate(residual_kmeans(train, test, args.vocab, args.length), 1):
        if n & (n - 1) == 0:                                    # the student's prefixes
            yield str(n), *pair


def run(args):
    start = time.time()
    torch.manual_seed(args.seed)
    sets = evaluate.load_splits(vars(args))
    labels = [s.labels for s in sets]
    pixels = [data.normalize(s.images, args.image_size).flatten(1) for s in sets]
    figures = {"pixels": percentages(pixels[0], labels[0], pixels[1], labels[1], linear=False)}
    for name, a, b, said in features(args, sets):
        figures[name] = percentages(a, labels[0], b, labels[1])
        if said is not None:
            figures[name]["perplexity"] = evaluate.code_figures(said, args.vocab)["perplexity"]
    for name, row in figures.items():
        row["retention"] = row["knn_top1"] / figures["teacher"]["knn_top1"]
        print(f"{name:8}", *(f"{key} {value:.{3 if key == 'retention' else 2}f}"
                             for key, value in row.items() if key != "perplexity"))
    if args.json:
        facts = {"config": {k: str(v) for k, v in vars(args).items()},
                 "machine": train_script.machine(args.device),
                 "seconds": round(time.time() - start, 1)}
        checkpoint.write(args.json, lambda part: part.write_text(
            json.dumps(facts | figures, indent=1) + "\n"))


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(p)
    p.add_argument("--vocab", type=int, default=128, help="K, symbols")
    p.add_argument("--space", action="store_true",
                   help="on the CLS as the student sees it, whitened")
    p.add_argument("--rounds", type=int, default=3, help="of --space, as in train.py")
    p.add_argument("--json", type=Path, help="also write the figures there")
    defaults = vars(train_script.parse([]))                 # what train.py's fit of the space reads
    p.set_defaults(**{name: defaults[name] for name in (
        "batch_size", "neighbours", "directions", "mirror")})
    return p.parse_args(argv)


def main():
    args = parse()
    try:
        if args.json and not args.json.absolute().parent.is_dir():
            raise FileNotFoundError(f"--json {args.json}: its folder does not exist; make it first")
        run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"extras.baselines: {error}") from None


if __name__ == "__main__":
    main()
