"""What a teacher's CLS keeps of each factor of `shapes`, or of classes: linear probe and k-NN.

    python -m extras.probe_teacher shapes --json results/teacher-shapes/probe.json
    python -m extras.probe_teacher cifar10 --data folder:cifar10 --json FILE

Chance is 1 / number of values. The train split fits the probe and is the k-NN's gallery;
the test split asks.
"""
import argparse
import json
from pathlib import Path

import torch

import data
import evaluate
import model


@torch.no_grad()
def cls_features(teacher, images, size, batch_size=250):
    """The CLS of uint8 pictures (n, 3, H, W), made on the teacher's device: (n, d) on the CPU."""
    device = next(teacher.parameters()).device
    with evaluate.autocast(device):
        return torch.cat([teacher(data.normalize(x.to(device), size))[:, 0].float().cpu()
                          for x in images.split(batch_size)])


def run(args):
    if args.json and not args.json.absolute().parent.is_dir():
        raise FileNotFoundError(f"--json {args.json}: its folder does not exist; make it first")
    data.check_labels(args.data)
    teacher = model.build_teacher(args.teacher)
    sets = [data.load(args.data, split, 32, n) for split, n in
            (("train", args.train_images), ("test", args.test_images))]
    train, test = (cls_features(teacher, s.images, 32) for s in sets)
    figures, factors = {}, data.FACTORS if args.data == "shapes" else {"class": sets[0].classes}
    for name, values in factors.items():
        labels = [s.factors[name] if args.data == "shapes" else s.labels for s in sets]
        figures[name] = {"chance": 100 / len(values),
                         "linear_top1": evaluate.linear_probe(train, labels[0], test, labels[1])[0]}
        if name in ("shape", "class"):
            knn = evaluate.knn_accuracies(train, labels[0], test, labels[1])
            figures[name] |= {f"knn_top1_k{k}": top1 for k, (top1, _) in knn.items()}
        scores = "".join(f"  {key} {value:.2f}" for key, value in figures[name].items())
        print(f"{name:8}{scores}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("teacher", help="a name in weights/ or a file of extras.pretrain")
    p.add_argument("--data", default="shapes", help="as in train.py")
    p.add_argument("--train-images", type=data.image_count, help="default: all")
    p.add_argument("--test-images", type=data.image_count, help="default: all")
    p.add_argument("--json", type=Path, help="also write the figures there")
    try:
        run(p.parse_args())
    except (ValueError, OSError) as error:
        raise SystemExit(f"extras.probe_teacher: {error}") from None


if __name__ == "__main__":
    main()
