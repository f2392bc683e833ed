"""How much of a run's k-NN accuracy is left when the test images are noisy, blurred or pale.

    python -m extras.robustness runs/shapes/ckpt.pt --json results/robustness.json

k-NN top-1 (k = 20) of all symbols and of the teacher's raw CLS, for the test images unchanged, with
Gaussian noise (std 0.1 of the range), blurred (sigma 1 pixel at 32) and with a third of their
contrast. The gallery is of unchanged training images. The corruptions are three of those of
Hendrycks and Dietterich (2019), at a strength of our choice.
"""
import argparse
import dataclasses
from pathlib import Path

import torch
from torchvision.transforms.functional import gaussian_blur

import checkpoint
import data
import evaluate
import flags
import scoring

CORRUPTIONS = {
    "clean": lambda x: x,
    "noise": lambda x: x + 0.1 * torch.randn_like(x),
    "blur": lambda x: gaussian_blur(x, 2 * (x.shape[-1] // 10) + 1, x.shape[-1] / 32),
    "contrast": lambda x: x.mean((1, 2, 3), keepdim=True) * 2 / 3 + x / 3,
}


def robustness(args):
    """{corruption: {"student", "teacher": top-1 in %}}; "corrupted": mean of all but clean."""
    config, teacher, student = checkpoint.load_model(args.checkpoint, args.device)
    train_set, test = evaluate.load_splits(config | {"test_images": args.test_images})
    pixels = test.get(torch.arange(len(test))) / 255
    sets = {"train": train_set}
    torch.manual_seed(0)                                    # of the noise
    for name, corrupt in CORRUPTIONS.items():
        x = torch.cat([corrupt(part).clamp(0, 1) for part in pixels.split(500)])
        sets[name] = dataclasses.replace(test, images=(255 * x).round().byte(), files=None)
    codes = {name: evaluate.encode(student, teacher, images, config["image_size"])
             for name, images in sets.items()}
    features = {name: {"student": code["z"][-1].to(args.device),
                       "teacher": code["cls"].to(args.device)} for name, code in codes.items()}
    gallery, labels = features.pop("train"), [s.labels.to(args.device) for s in (train_set, test)]
    figures = {name: {row: scoring.knn_accuracy(gallery[row], labels[0], x, labels[1], 20)[0]
                      for row, x in rows.items()} for name, rows in features.items()}
    return figures | {"corrupted": {row: sum(figures[name][row] for name in CORRUPTIONS
                                             if name != "clean") / 3 for row in gallery}}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=flags.HelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="RUN/ckpt.pt")
    parser.add_argument("--test-images", type=data.image_count, default=5000,
                        help="at most this many, or all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
    try:
        checkpoint.check_folder(args.json)
        figures = robustness(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"extras.robustness: {error}") from None
    for name, row in figures.items():
        print(f"{name:10}" + "".join(f"  {key} {value:.2f}" for key, value in row.items()))
    if args.json:
        checkpoint.write_json(args.json, figures)


if __name__ == "__main__":
    main()
