"""The VQ-VAE baseline (van den Oord et al. 2017): the symbols that rebuild the pixels best.

    python -m extras.vqvae                              # shapes, 128 symbols
    python -m extras.vqvae --vocab 512 --seed 1 --out runs/vqvae-512
    python -m extras.vqvae --data folder:cifar10 --teacher cifar10

    z_e = encoder(x), z_q = its nearest codebook vectors           (B, width, rows, columns)
    L   = |x - decoder(z_q)|^2 + beta |z_e - sg(z_q)|^2            eq. 3; the codebook by EMA (A.1)

Equal bits: at 32 pixels a VQ-VAE usually says 8 x 8 codes. Here three convolutions of stride 2
leave 4 x 4 cells, and a last one, whose kernel is its stride, merges each pair of neighbours in a
row: 4 rows x 2 columns = 8 codes of K, in reading order, exactly the student's 8 log2 K bits. A
code is about its part of the picture; no prefix stands for the whole, so all 8 are scored at once.

What a receiver of the symbols alone can compute is scored as the student is, by evaluate.py: the
concatenated code vectors ("student" in results.json), the one-hot symbols, and the rebuilt pixels
(k-NN alone).
The teacher is there for its ceiling only. Writes OUT/config.json, metrics.jsonl (a line per epoch),
results.json and reconstructions.png (8 test pictures, below each what its 8 symbols rebuild).
"""
import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.utils import save_image

import checkpoint
import data
import discretize
import evaluate
import losses
import model
from extras import baselines
from extras.probe_teacher import cls_features
from train import config_of, machine


class VQVAE(nn.Module):
    """Encoder, codebook, decoder for pictures of `size` pixels in `length` codes, a power of two.
    Raises ValueError where they do not fit."""

    def __init__(self, size, length, width, args):
        super().__init__()
        rows = 2 ** math.ceil(math.log2(max(length, 1)) / 2)            # 8 -> 4 x 2, 16 -> 4 x 4
        columns, cells = length // rows, size // 8
        if length < 1 or rows * columns != length or columns & (columns - 1):
            raise ValueError(f"--length must be a power of two, not {length}")
        if size % (8 * rows):
            raise ValueError(f"--image-size must be a multiple of {8 * rows} for {length} codes")
        merge = (cells // rows, cells // columns)       # kernel and stride: cells into one code
        half = lambda i, o: nn.Conv2d(i, o, 4, 2, 1)                            # noqa: E731
        twice = lambda i, o: nn.ConvTranspose2d(i, o, 4, 2, 1)                  # noqa: E731
        self.encoder = nn.Sequential(
            half(3, width // 2), nn.ReLU(), half(width // 2, width), nn.ReLU(),
            half(width, width), nn.ReLU(), nn.Conv2d(width, width, merge, merge),
            # Our choice (Lancucki et al. 2020): else the commitment shrinks z_e, and codes die
            nn.BatchNorm2d(width, affine=False))
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(width, width, merge, merge), nn.ReLU(),
            twice(width, width), nn.ReLU(), twice(width, width // 2), nn.ReLU(),
            twice(width // 2, 3))
        self.vq = discretize.VQ(width, args.vocab, args)
        self.grid = rows, columns

    def encode(self, x, hard=False):
        """x (B, 3, S, S) normalised -> Discrete of all B * T codes, the T of a picture together."""
        return self.vq(self.encoder(x).flatten(2).transpose(1, 2).flatten(0, 1), hard)

    def decode(self, embeddings):
        """Code vectors (B * T, width) -> pictures (B, 3, S, S), normalised as the input."""
        z = embeddings.unflatten(0, (-1, math.prod(self.grid))).transpose(1, 2)     # (B, width, T)
        return self.decoder(z.unflatten(2, self.grid))

    def forward(self, x):
        """-> (mean squared error of the pixels, Discrete)."""
        said = self.encode(x)
        return F.mse_loss(self.decode(said.embedding), x), said


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    baselines.add_flags(p)
    discretize.add_flags(p)
    p.set_defaults(disc="vq")
    add = p.add_argument_group("VQ-VAE").add_argument
    add("--width", type=int, default=64, help="channels; more rebuild better, time as the square")
    add("--epochs", type=int, default=10)
    add("--batch-size", type=int, default=64, help="pictures per step")
    add("--lr", type=float, default=2e-3, help="peak, after 5 %% of the steps; to 0 by a cosine")
    add("--out", type=Path, help="run directory; default runs/DATA-vqvae-VOCAB-sSEED")
    add("--overwrite", action="store_true", help="start anew although OUT holds a run")
    return p.parse_args(argv)


def train_epoch(net, optimizer, images, epoch, args):
    """One pass over uint8 pictures (n, 3, H, W); -> the epoch's figures for the log."""
    steps, sums, ids = len(images) // args.batch_size, torch.zeros(2), []
    order = torch.randperm(len(images))
    for i in range(steps):
        step, batch = epoch * steps + i, order[i * args.batch_size:(i + 1) * args.batch_size]
        lr = losses.warmup_cosine(args.lr, 0, step, args.epochs * steps, args.epochs * steps // 20)
        optimizer.param_groups[0]["lr"] = lr
        with evaluate.autocast(torch.device(args.device)):
            mse, said = net(data.normalize(images[batch].to(args.device), args.image_size))
        optimizer.zero_grad()
        (mse + said.aux).backward()
        optimizer.step()
        net.vq.after_step()
        sums += torch.stack([mse, said.aux]).detach().float().cpu() / steps
        ids.append(said.ids.cpu())
    if not sums.isfinite().all():
        raise FloatingPointError(f"the loss is no number in epoch {epoch + 1}; try a lower --lr")
    said = torch.cat(ids).unflatten(0, (-1, args.length))
    return {"epoch": epoch + 1, "step": (epoch + 1) * steps, "loss": sums.sum().item(),
            "mse": sums[0].item(), "aux": sums[1].item(), **evaluate.code_figures(said, args.vocab)}


@torch.no_grad()
def read(net, images, args):
    """uint8 pictures (n, 3, H, W) -> symbols (n, T) and rebuilt pictures (n, 3, S, S), on the CPU.
    Pictures with the same symbols are rebuilt the same to the bit, so that k-NN sees the tie."""
    net.eval()
    ids, rebuilt = [], []
    for batch in images.split(250):
        said = net.encode(data.normalize(batch.to(args.device), args.image_size), hard=True)
        ids.append(said.ids.cpu().unflatten(0, (len(batch), -1)))
        rebuilt.append(net.decode(said.embedding).cpu())
    ids = torch.cat(ids)
    return ids, evaluate.one_feature_per_code(torch.cat(rebuilt), ids)


def score(net, sets, cls, args):
    """The figures of results.json, and the rebuilt test pictures. cls: the teacher's, per set."""
    (said, pixels), (asked, rebuilt) = (read(net, s.images, args) for s in sets)
    table = net.vq.table.detach().cpu()                                         # (K, width)
    features = {"teacher": cls, "student": [table[x].flatten(1) for x in (said, asked)],
                "onehot": [evaluate.one_hot(x, args.vocab) for x in (said, asked)],
                "rebuilt": [pixels.flatten(1), rebuilt.flatten(1)]}
    rows = {}
    for name, (a, b) in features.items():
        rows[name] = baselines.percentages(a, sets[0].labels, b, sets[1].labels, name != "rebuilt")
        print(f"{name:8}", *(f"{key} {value:.2f}" for key, value in rows[name].items()), flush=True)
    kept = rows["student"]["knn_top1"] / rows["teacher"]["knn_top1"]
    mse = F.mse_loss(rebuilt, data.normalize(sets[1].images, args.image_size)).item()
    return {**rows, "student": {args.length: rows["student"]}, "retention": {args.length: kept},
            **evaluate.code_figures(asked, args.vocab), "bits": args.length * math.log2(args.vocab),
            "mse": mse}, rebuilt


def run(args):
    if args.disc != "vq":
        raise ValueError("a VQ-VAE has a codebook: leave --disc at vq")
    name = f"{args.data.replace(':', '-').replace('/', '-')}-vqvae-{args.vocab}-s{args.seed}"
    out = args.out or Path("runs", name)
    if (out / "results.json").exists() and not args.overwrite:
        raise ValueError(f"{out} holds a run already: --overwrite to start anew, or another --out")
    torch.manual_seed(args.seed)
    sets = evaluate.load_splits(vars(args))
    teacher = model.build_teacher(args.teacher).to(args.device)
    net = VQVAE(args.image_size, args.length, args.width, args).to(args.device)
    cls = [cls_features(teacher, s.images, args.image_size) for s in sets]   # fails early
    optimizer = torch.optim.Adam(net.parameters())
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").unlink(missing_ok=True)                              # another run's
    config = config_of(args) | {"out": str(out), "method": "vqvae",
                                "machine": machine(args.device)}
    text = json.dumps(config, indent=1) + "\n"
    checkpoint.write(out / "config.json", lambda part: part.write_text(text))
    start = time.time()
    with open(out / "metrics.jsonl", "w") as log:
        for epoch in range(args.epochs):
            record = train_epoch(net.train(), optimizer, sets[0].images, epoch, args)
            record["seconds"] = round(time.time() - start, 1)
            print(json.dumps(record), file=log, flush=True)
            print(f"epoch {epoch + 1}/{args.epochs}  mse {record['mse']:.3f}  smallest perplexity "
                  f"{min(record['perplexity']):.0f}  {record['seconds']:.0f} s", flush=True)
    results, rebuilt = score(net, sets, cls, args)
    shown = torch.cat([data.normalize(sets[1].images[:8], args.image_size), rebuilt[:8]])
    shown = F.interpolate((shown * data.STD + data.MEAN).clamp(0, 1), scale_factor=3)
    save_image(shown, out / "reconstructions.png", nrow=8)
    text = json.dumps(results, indent=1) + "\n"
    checkpoint.write(out / "results.json", lambda part: part.write_text(text))
    print(f"{out}: " + " ".join(sorted(f.name for f in out.iterdir())))


def main():
    try:
        run(parse())
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"extras.vqvae: {error}") from None


if __name__ == "__main__":
    main()
