"""The VQ-VAE baseline (van den Oord et al. 2017): the symbols that reconstruct the pixels best.

    python -m extras.vqvae                              # shapes, 128 symbols
    python -m extras.vqvae --vocab 512 --seed 1 --out runs/vqvae-512
    python -m extras.vqvae --data folder:cifar10 --teacher cifar10

    z_e = encoder(x), z_q = its nearest codes                      (B, width, rows, columns)
    L   = |x - decoder(z_q)|^2 + |sg[z_e] - z_q|^2 + beta |z_e - sg[z_q]|^2             (eq. 3)

The codebook is discretize.VQ's, learned by gradient. It starts at k-means of the untrained
encoder's outputs (our choice, because from random codes few are ever used, and a baseline should be
fair).

Equal bits: at 32 pixels a VQ-VAE usually has 8 x 8 codes. Here three convolutions of stride 2 leave
4 x 4 cells, and a last one, whose kernel is its stride, merges each pair of neighbours in a row: 4
rows x 2 columns = 8 codes of K, in reading order, exactly the student's 8 log2 K bits. A code is of
its part of the image; no prefix stands for the whole, so all 8 are scored at once.

Scored as the student is, by evaluate.py, is what a receiver of the symbols alone can compute: the
concatenated codes ("student" in results.json), the one-hot symbols and the reconstructed pixels
(k-NN alone). retention_raw is its k-NN top-1 divided by that of the teacher's raw CLS, which has no
other part. Writes OUT/config.json, OUT/metrics.jsonl (a line per epoch), OUT/results.json and
OUT/reconstructions.png (8 test images, below each what its symbols reconstruct).
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
import flags
import losses
import precision
import stable
import teachers
from extras import baselines
from extras.probe_teacher import features
from progress import Progress

FIT_IMAGES = 2000               # whose encoder outputs k-means starts the codebook from, at most


class VQVAE(nn.Module):
    """Encoder, codebook, decoder for images of `size` pixels in `length` codes, a power of two.
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

    def latents(self, x):
        """x (B, 3, S, S) normalised -> z_e (B * T, width), the T of an image together."""
        return self.encoder(x).flatten(2).transpose(1, 2).flatten(0, 1)

    def encode(self, x, hard=False):
        """x (B, 3, S, S) -> Quantized of all B * T codes."""
        return self.vq(self.latents(x), hard)

    def decode(self, embeddings):
        """Codes (B * T, width) -> images (B, 3, S, S), normalised as the input."""
        z = embeddings.unflatten(0, (-1, math.prod(self.grid))).transpose(1, 2)     # (B, width, T)
        return self.decoder(z.unflatten(2, self.grid))

    def forward(self, x):
        """-> (mean squared error of the pixels, Quantized)."""
        quantized = self.encode(x)
        return F.mse_loss(self.decode(quantized.embedding), x), quantized

    @torch.no_grad()
    def init_codebook(self, x):
        """k-means of z_e for x (B, 3, S, S). Raises ValueError for fewer z_e than codes."""
        self.vq.init_codebook(stable.kmeans(self.train().latents(x), self.vq.vocab), None)


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=flags.HelpFormatter)
    baselines.add_flags(p.add_argument)
    flags.discretizer_flags(p.add_argument)
    p.set_defaults(disc="vq", views=1)
    add = p.add_argument_group("VQ-VAE").add_argument
    add("--width", type=int, default=64,
        help="channels; more reconstruct better, in time that grows as the square")
    add("--epochs", type=int, default=10, help="passes over the training images")
    add("--batch-size", type=int, default=64, help="images per step")
    add("--lr", type=float, default=2e-3, help="peak, after 5 %% of the steps; to 0 by a cosine")
    add("--out", type=Path, help="run directory (default: runs/DATA-vqvae-VOCAB-sSEED)")
    return p.parse_args(argv)


class Trainer:
    """Network, Adam and, for float16, the scaler of its gradients. args.precision: resolved."""

    def __init__(self, args, images):
        self.args, self.images = args, images
        self.net = VQVAE(args.image_size, args.length, args.width, args).to(args.device)
        self.optimizer = torch.optim.Adam(self.net.parameters())
        self.scaler = torch.amp.GradScaler(torch.device(args.device).type,
                                           enabled=args.precision == "float16")
        self.steps_per_epoch = len(images) // args.batch_size
        if not self.steps_per_epoch:
            raise ValueError(f"--batch-size {args.batch_size} is more than the {len(images)} "
                             "training images")
        few = torch.arange(min(FIT_IMAGES, len(images)))
        self.net.init_codebook(self.normalize(images.get(few)))

    def normalize(self, x):
        return data.normalize(x.to(self.args.device), self.args.image_size)

    def step(self, x, step):
        """One optimizer step on x (B, 3, S, S) -> losses (2,): pixels, codebook; ids (B * T,)."""
        args, steps = self.args, self.args.epochs * self.steps_per_epoch
        self.optimizer.param_groups[0]["lr"] = losses.warmup_cosine(args.lr, 0, step, steps,
                                                                    steps // 20)
        with precision.autocast(args.device, args.precision):
            mse, quantized = self.net(x)
        self.optimizer.zero_grad()
        self.scaler.scale(mse + quantized.aux).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return torch.stack([mse, quantized.aux]).detach().float(), quantized.ids

    def train_epoch(self, epoch, progress):
        """One pass over the images -> the epoch's figures for the log."""
        self.net.train()
        args, totals, ids = self.args, 0, []
        batches = torch.randperm(len(self.images)).split(args.batch_size)[:self.steps_per_epoch]
        for i, x in enumerate(self.images.batches(batches)):
            terms, chosen = self.step(self.normalize(x), epoch * self.steps_per_epoch + i)
            totals = totals + terms / self.steps_per_epoch
            ids.append(chosen.cpu())
            progress.update()
        if not totals.isfinite().all():
            raise FloatingPointError(f"the loss is not finite in epoch {epoch + 1}; lower --lr")
        mse, aux = totals.tolist()
        ids = torch.cat(ids).unflatten(0, (-1, args.length))
        return {"epoch": epoch + 1, "step": (epoch + 1) * self.steps_per_epoch, "loss": mse + aux,
                "mse": mse, "aux": aux, **evaluate.code_figures(ids, args.vocab)}


@torch.no_grad()
def encode(net, images, args, batch_size=250):
    """An ImageSet -> symbols (n, T), their reconstructions (n, 3, S, S), on the CPU, and the mean
    squared error. Images with equal symbols have equal reconstructions to the bit, so that k-NN
    sees the tie."""
    net.eval()
    ids, reconstructed, error = [], [], 0.0
    with Progress("codes, images", len(images)) as progress:
        for x in images.batches(torch.arange(len(images)).split(batch_size)):
            x = data.normalize(x.to(args.device), args.image_size)
            quantized = net.encode(x, hard=True)
            ids.append(quantized.ids.cpu().unflatten(0, (len(x), -1)))
            y = net.decode(quantized.embedding)
            error += (y - x).square().flatten(1).mean(1).sum().item() / len(images)
            reconstructed.append(y.cpu())
            progress.update(len(x))
    ids = torch.cat(ids)
    return ids, evaluate.one_feature_per_code(torch.cat(reconstructed), ids), error


def score(net, sets, cls, args):
    """The figures of results.json, and the reconstructed test images. cls: the teacher's, per
    set."""
    (train, train_pixels, _), (test, test_pixels, error) = (encode(net, s, args) for s in sets)
    codebook = net.vq.codebook.detach().cpu()                                   # (K, width)
    inputs = {"teacher": cls, "student": [codebook[ids].flatten(1) for ids in (train, test)],
              "onehot": [evaluate.one_hot(ids, args.vocab) for ids in (train, test)],
              "reconstructed": [train_pixels.flatten(1), test_pixels.flatten(1)]}
    rows = {}
    with Progress("k-NN and linear probe, rows", len(inputs)) as progress:
        for name, (a, b) in inputs.items():
            parts = [x.to(args.device) for x in (a, sets[0].labels, b, sets[1].labels)]
            rows[name] = baselines.accuracies(*parts, linear=name != "reconstructed")
            progress.update()
    for name, row in rows.items():
        print(f"{name:14}", *(f"{key} {value:.2f}" for key, value in row.items()
                              if isinstance(value, float)))
    ratio = rows["student"]["knn_top1"] / rows["teacher"]["knn_top1"]
    return {**rows, "student": {args.length: rows["student"]},
            "retention_raw": {args.length: ratio}, **evaluate.code_figures(test, args.vocab),
            "bits": args.length * math.log2(args.vocab), "mse": error}, test_pixels


def open_run(args):
    """Sets args.out and args.precision. Raises ValueError rather than overwrite."""
    if args.disc != "vq":
        raise ValueError("a VQ-VAE has a codebook: leave --disc at vq")
    name = f"{args.data.replace(':', '-').replace('/', '-')}-vqvae-{args.vocab}-s{args.seed}"
    args.out = args.out or Path("runs", name)
    if (args.out / "results.json").exists():
        raise ValueError(f"{args.out} holds a run already; another --out, or delete it")
    args.precision = precision.resolve(args.device, args.precision)


def run(args):
    open_run(args)
    torch.manual_seed(args.seed)
    sets = evaluate.load_splits(vars(args))
    teacher = teachers.load_teacher(args.teacher).to(args.device)
    trainer = Trainer(args, sets[0])
    cls = [features(teacher, s, args) for s in sets]
    out, start = args.out, time.time()
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(out / "config.json", checkpoint.config_of(args) | {
        "method": "vqvae", "hardware": precision.hardware_info(args.device)})
    with (open(out / "metrics.jsonl", "w") as log,
          Progress("step", args.epochs * trainer.steps_per_epoch) as progress):
        for epoch in range(args.epochs):
            record = trainer.train_epoch(epoch, progress)
            record["seconds"] = round(time.time() - start, 1)
            print(json.dumps(record), file=log, flush=True)
            print(f"epoch {epoch + 1}/{args.epochs}  mse {record['mse']:.3f}  smallest perplexity "
                  f"{min(record['perplexity']):.0f}  {record['seconds']:.0f} s", flush=True)
    results, reconstructed = score(trainer.net, sets, cls, args)
    first = data.normalize(sets[1].get(torch.arange(min(8, len(sets[1])))), args.image_size)
    shown = torch.cat([first, reconstructed[:8]]) * data.STD + data.MEAN
    save_image(F.interpolate(shown.clamp(0, 1), scale_factor=3), out / "reconstructions.png",
               nrow=len(first))
    checkpoint.write_json(out / "results.json", results)
    print(f"{out}: " + " ".join(sorted(f.name for f in out.iterdir())))


def main():
    try:
        run(parse())
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"extras.vqvae: {error}") from None


if __name__ == "__main__":
    main()
