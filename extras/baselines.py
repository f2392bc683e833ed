"""What 1, 2, 4 and 8 symbols keep without any learning of a language: residual k-means on the teacher's CLS.

    python -m extras.baselines --vocab 128 --json results/baselines-shapes-128.json
    python -m extras.baselines --space --json results/baselines-shapes-128-space.json

Stage 1 is k-means with K centres; stage j quantises what stages 1 … j-1 left over. n stages are n symbols of K,
exactly as many bits as a prefix of n symbols of the student; the receiver knows the K * n centres and adds them up.
Same data, same k-NN and linear probe as evaluate.py. A student below these figures has not learned anything that
its teacher's features and a minute of k-means would not give.
"""
import argparse
import json
from pathlib import Path

import torch

import data
import discretize
import evaluate
import model
import train as train_script
from extras.probe_teacher import cls_features


def residual_kmeans(train, test, vocab, stages, iterations=25):
    """train (n, d), test (m, d) -> for each number of stages 1 … stages the reconstructions (train, test).
    Centres are fitted on train alone."""
    left, sums = [train.clone(), test.clone()], [torch.zeros_like(train), torch.zeros_like(test)]
    for _ in range(stages):
        centres = discretize.kmeans(left[0], vocab, iterations)
        for i in range(2):
            nearest = centres[torch.cdist(left[i], centres).argmin(1)]
            sums[i], left[i] = sums[i] + nearest, left[i] - nearest
        yield sums[0], sums[1]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="shapes", help="as in train.py")
    p.add_argument("--teacher", default="shapes", help="as in train.py")
    p.add_argument("--image-size", type=int, default=32, help="pixels")
    p.add_argument("--vocab", type=int, default=128, help="K, symbols")
    p.add_argument("--length", type=int, default=8, help="symbols; prefixes are its powers of two")
    p.add_argument("--train-images", type=data.image_count, default=20000, help="or all")
    p.add_argument("--test-images", type=data.image_count, default=5000, help="or all")
    p.add_argument("--space", action="store_true", help="on the CLS as the student sees it, whitened within pictures")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--json", type=Path, help="also write the figures there")
    p.set_defaults(batch_size=64, device="cpu", regression=1.0)         # what train.py's fit of the space reads
    args = p.parse_args()
    torch.manual_seed(args.seed)
    try:
        sets = evaluate.load_splits(vars(args))
        teacher = model.build_teacher(args.teacher)
    except (ValueError, OSError) as error:
        raise SystemExit(f"extras.baselines: {error}") from None
    train, test = (cls_features(teacher, s.images, args.image_size) for s in sets)
    features = [("teacher", (train, test))]
    if args.space:
        student = model.Student(teacher.width, None, None, 1, (1, 1), (1, 1), draft=False)
        train_script.fit_teacher_statistics(teacher, student, None, sets[0], args)
        train, test = (student.space(x[:, None])[:, 0] + student.origin for x in (train, test))
        features.append(("whitened", (train, test)))
    labels = [s.labels for s in sets]
    pixels = [data.normalize(s.images, args.image_size).flatten(1) for s in sets]
    rows = {"raw pixels, k-NN": evaluate.knn_accuracies(pixels[0], labels[0], pixels[1], labels[1])}
    figures = {"pixels": {"knn_top1": sum(v[0] for v in rows["raw pixels, k-NN"].values()) / 4}}
    stages = enumerate(residual_kmeans(train, test, args.vocab, args.length), 1)
    for name, (a, b) in [*features, *((str(n), pair) for n, pair in stages if n & (n - 1) == 0)]:
        row = evaluate.score(a, labels[0], b, labels[1])
        figures[name] = {"knn_top1": row["knn"][0], "knn_top5": row["knn"][1],
                         "linear_top1": row["linear"][0], "linear_top5": row["linear"][1]}
    ceiling = figures["teacher"]["knn_top1"]
    for name, row in figures.items():
        row["retention"] = row["knn_top1"] / ceiling
        print(f"{name:8} " + "  ".join(f"{key} {value:.3f}" if key == "retention" else f"{key} {value:.2f}"
                                       for key, value in row.items()))
    if args.json:
        args.json.write_text(json.dumps({"config": {k: str(v) for k, v in vars(args).items()}, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
