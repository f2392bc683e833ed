"""One pass over the images for trust.py, qscore.py and falcon.py, and what else they share.

`extract` keeps everything in main memory, in float32, because in bfloat16 the batch size would
decide between near-equal logits: for T symbols of K, N patches and width d about
4 n (T K + T N + (2 + D) d) bytes, 100 MB for 10 000 images of the default run.
"""
import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

import checkpoint
import data
import evaluate
import flags
from progress import Progress

BATCH = 128                 # images at a time


def describe(student, z_t):
    """z_t (b, N+1, d) -> {"cls": (b, d) the teacher's CLS, "ids": (b, T), "probs": (b, T, K)
    softmax of the discretizer's logits, "z": (b, D, d) of each prefix, "attention": (b, T, N)}."""
    sequence = student.describe(student.preprocess(z_t), hard=True, attention=True)
    return {"cls": z_t[:, 0], "ids": sequence.ids, "probs": sequence.logits.softmax(-1),
            "z": student.interpret(sequence.embeddings), "attention": sequence.attention}


@torch.no_grad()
def extract(teacher, student, batches, size, total):
    """Batches of images (b, 3, H, W), uint8 or float in [0, 1], `total` in all -> the entries of
    `describe`, of all images, on the CPU, and "pooled": (n, 9 d), the patch tokens averaged over
    3 x 3 parts of the image, for trust.py --xmeans."""
    device, parts = next(student.parameters()).device, []
    with Progress("images described", total) as progress:
        for images in batches:
            z_t = teacher(data.normalize(images.to(device), size))              # (b, N+1, d)
            side = round((z_t.shape[1] - 1) ** 0.5)
            grid = z_t[:, 1:].transpose(1, 2).unflatten(2, (side, side))
            pooled = F.adaptive_avg_pool2d(grid, 3).flatten(1)
            part = describe(student, z_t) | {"pooled": pooled}
            parts.append({name: x.float().cpu() if x.is_floating_point() else x.cpu()
                          for name, x in part.items()})
            progress.update(len(images))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def extract_set(teacher, student, image_set, size):
    """`extract` of an ImageSet, with its "labels" (n,)."""
    batches = image_set.batches(torch.arange(len(image_set)).split(BATCH))
    return extract(teacher, student, batches, size, len(image_set)) | {"labels": image_set.labels}


def auroc(high, low):
    """P(a > b) + P(a = b) / 2 for a of `high` (n,) and b of `low` (m,), 0 to 1 (Mann-Whitney)."""
    high, low = high.double().contiguous(), low.double().sort().values
    below, upto = (torch.searchsorted(low, high, right=right).double() for right in (False, True))
    return ((below + upto) / 2).mean().item() / len(low)


def auroc_interval(high, low, times=200, seed=0):
    """-> {"auroc", "low", "high"}: `auroc` and its 95 % interval by bootstrap over the images."""
    generator = torch.Generator().manual_seed(seed)

    def again(x):
        return x[torch.randint(len(x), (len(x),), generator=generator)]

    if not len(high) or not len(low):
        return {"auroc": None, "low": None, "high": None}
    draws = torch.tensor([auroc(again(high), again(low)) for _ in range(times)])
    low_end, high_end = draws.quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"auroc": auroc(high, low), "low": low_end, "high": high_end}


# ---- the command line of the three scripts -------------------------------------------------------

def parser(name, text):
    """Their common flags."""
    p = argparse.ArgumentParser(prog=f"python -m extras.{name}", description=text,
                                formatter_class=flags.HelpFormatter)
    add = p.add_argument
    add("checkpoint", type=Path, help="RUN/ckpt.pt, written by train.py")
    add("--data", help="another data set than the run's")
    add("--train-images", type=data.image_count, default=10_000,
        help="at most this many, or all; they take most of the time")
    add("--test-images", type=data.image_count, default=5_000, help="at most this many, or all")
    add("--seed", type=int, default=0, help="of everything drawn at random")
    add("--json", type=Path, metavar="FILE", help="also write the record there")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    return p


def main(p, argv, measure, report):
    """Parses, calls measure(args, (config, teacher, student), [train, test], data's name) -> the
    figures, report(args, figures), and writes the record. User errors end with one line."""
    args = p.parse_args(argv)
    try:
        if min(args.train_images or 2, args.test_images or 2) < 2:
            raise ValueError("--train-images and --test-images must be at least 2")
        checkpoint.check_folder(args.json)
        model = checkpoint.load_model(args.checkpoint, args.device)
        config = model[0] | {"train_images": args.train_images, "test_images": args.test_images}
        config["data"] = args.data or config["data"]
        sets = evaluate.load_splits(config)
        torch.manual_seed(args.seed)
        figures = measure(args, model, sets, config["data"])
        report(args, figures)
        if args.json:
            flags = {key: value for key, value in vars(args).items()
                     if key not in ("checkpoint", "json", "device", "out", "examples", "failures")}
            checkpoint.write_json(args.json, flags | {
                "data": config["data"], "images": [len(part) for part in sets],
                "student": {k: config[k] for k in ("recipe", "disc", "vocab", "seed")}, **figures})
    except (ValueError, OSError) as error:
        raise SystemExit(f"{p.prog.removeprefix('python -m ')}: {error}") from None
