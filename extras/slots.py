"""Object segmentation from the teacher's patch tokens without symbols: slots, and k-means.

    python -m extras.slots --json slots-s0.json      # DINOSAUR at a small size
    python -m extras.slots --method kmeans --json FILE              # k-means of each image's tokens

slots: slot attention (Locatello et al. 2020) on the frozen teacher's patch tokens, trained so that
a decoder reconstructs these tokens from the slots, as in DINOSAUR (Seitzer et al. 2023):

    tokens (N, d) --slot attention--> slots (S, d) --MLP per slot and patch--> tokens_s, alpha_s
    reconstruction = sum over s of softmax_s(alpha)_s * tokens_s

The segmentation is the decoder's alpha, as DINOSAUR's for an MLP decoder. kmeans: the clusters of
each image's own tokens, S of them, the best of several starts. Both are scored by FG-ARI and mBO
(extras/objects.py) beside extras.measures' figures for symbols. Tokens are standardised.
"""
import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import checkpoint
import data
import evaluate
import flags
import losses
import precision
import teachers
from extras import measures
from progress import Progress
from train import CLIP

WARMUP = 0.1                    # share of the steps


# ---- networks ------------------------------------------------------------------------------------

class SlotAttention(nn.Module):
    """Slots compete for tokens: the attention's softmax is over the slots (Locatello et al. 2020,
    algorithm 1). tokens (B, N, d) -> slots (B, S, d)."""

    def __init__(self, width, slots, iterations=3):
        super().__init__()
        self.iterations, self.scale = iterations, width**-0.5
        self.inputs = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(),
                                    nn.Linear(width, width), nn.LayerNorm(width))
        # learned starts (Jia et al. 2023), not samples of one Gaussian: a short run breaks the
        # symmetry of the slots sooner
        self.start = nn.Parameter(torch.randn(slots, width))
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.norm, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.gru = nn.GRUCell(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(),
                                 nn.Linear(4 * width, width))

    def forward(self, tokens):
        x = self.inputs(tokens)
        k, v = self.to_k(x), self.to_v(x)                                       # (B, N, d)
        slots = self.start.expand(len(x), -1, -1)                               # (B, S, d)
        for _ in range(self.iterations):
            q = self.to_q(self.norm(slots)) * self.scale
            attention = (q @ k.transpose(1, 2)).softmax(1) + 1e-8               # (B, S, N)
            update = attention / attention.sum(2, keepdim=True) @ v
            slots = self.gru(update.flatten(0, 1), slots.reshape(-1, slots.shape[2])).view_as(slots)
            slots = slots + self.mlp(self.norm_mlp(slots))
        return slots


class Autoencoder(nn.Module):
    """tokens (B, N, d) -> their reconstruction (B, N, d) and alpha (B, S, N), which sums to 1 over
    the slots. The decoder decodes each slot at each position, alone. Unlike DINOSAUR's the
    encoder gets positions too, as slot attention's on pixels does: a slot must have the position of
    its patches, which a small teacher's tokens determine less well."""

    def __init__(self, width, patches, slots, hidden):
        super().__init__()
        self.encoder = SlotAttention(width, slots)
        self.position = nn.Parameter(torch.randn(patches, width))
        self.decoder = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden),
                                     nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                     nn.Linear(hidden, width + 1))

    def forward(self, tokens):
        slots = self.encoder(tokens + self.position)
        out = self.decoder(slots[:, :, None] + self.position)                   # (B, S, N, d + 1)
        alpha = out[..., -1].float().softmax(1)
        return torch.einsum("bsn,bsnd->bnd", alpha, out[..., :-1].float()), alpha


# ---- k-means -------------------------------------------------------------------------------------

def kmeans(tokens, clusters, starts=8, iterations=20):
    """Lloyd's algorithm in each image: tokens (B, N, d) -> one-hot assignment (B, S, N), of the
    start with the least distance. A start's centroids are random tokens of the image."""
    best, least = None, torch.full((len(tokens),), float("inf"), device=tokens.device)
    for _ in range(starts):
        order = torch.rand(tokens.shape[:2], device=tokens.device).argsort(1)[:, :clusters]
        centroids = tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[2]))
        for _ in range(iterations):
            distance = torch.cdist(centroids, tokens)                           # (B, S, N)
            chosen = F.one_hot(distance.argmin(1), clusters).transpose(1, 2).float()
            number = chosen.sum(2, keepdim=True)
            centroids = torch.where(number > 0, chosen @ tokens / number.clamp(min=1), centroids)
        error = distance.amin(1).square().sum(1)
        best = chosen if best is None else torch.where((error < least)[:, None, None], chosen, best)
        least = torch.minimum(least, error)
    return best


# ---- a run ---------------------------------------------------------------------------------------

class Tokens:
    """Standardised patch tokens of an ImageSet's images, from the frozen teacher."""

    def __init__(self, teacher, images, args):
        self.teacher, self.args, self.mean, self.std = teacher, args, 0.0, 1.0
        some = self.batch(images, torch.arange(min(1000, len(images))))
        self.mean, self.std = some.mean((0, 1)), some.std((0, 1)) + 1e-6

    @torch.no_grad()
    def batch(self, images, index):
        """-> (b, N, d), float32, on the device."""
        args = self.args
        z_t = next(evaluate.teacher_tokens(self.teacher, images, [index], args.image_size,
                                           args.device, args.precision))
        return (z_t[:, 1:].float() - self.mean) / self.std


def fit(tokens, images, args):
    """-> the trained Autoencoder, and the loss of the last hundred steps: the share of the tokens'
    variance that is not reconstructed."""
    patches, width = tokens.batch(images, torch.arange(1)).shape[1:]
    model = Autoencoder(width, patches, args.slots, args.hidden).to(args.device)
    optimizer = torch.optim.AdamW(losses.parameter_groups(model), lr=args.lr)
    recent = []
    with Progress("slots, step", args.steps) as progress:
        for step in range(args.steps):
            x = tokens.batch(images, torch.randint(len(images), (args.batch_size,)))
            lr = losses.warmup_cosine(args.lr, 1e-5, step, args.steps, WARMUP * args.steps)
            losses.set_schedule(optimizer, lr, 0.0)
            with precision.autocast(args.device, args.precision):
                loss = F.mse_loss(model(x)[0], x)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            recent = [*recent[-99:], loss.detach()]
            progress.update(note=lambda loss=loss: f"loss {loss.item():.3f}")
    return model.eval(), torch.stack(recent).mean().item()


@torch.no_grad()
def score(assign, tokens, images):
    """assign(tokens (b, N, d)) -> maps (b, S, N). -> {"foreground_ari", "mean_best_overlap"}, each
    {"measured", "chance"}; chance: the segments of other images."""
    maps = [assign(tokens.batch(images, index)).float().cpu()
            for index in torch.arange(len(images)).split(250)]
    rows = measures.segment_measures(torch.cat(maps), images.masks, times=1)
    return {name: {key: float(x) for key, x in row.items()} for name, row in rows.items()}


def run(args):
    checkpoint.check_folder(args.json)
    args.precision = precision.resolve(args.device, args.precision)
    teacher = teachers.load_teacher(args.teacher).to(args.device)
    torch.manual_seed(args.seed)
    train, test = evaluate.load_splits(vars(args) | {"data": "scenes"})
    tokens = Tokens(teacher, train, args)
    record = {name: x for name, x in checkpoint.config_of(args).items() if name != "json"}
    if args.method == "slots":
        model, record["reconstruction_loss"] = fit(tokens, train, args)
        figures = score(lambda x: model(x)[1], tokens, test)
    else:
        figures = score(lambda x: kmeans(x, args.slots), tokens, test)
    for name, row in figures.items():
        print(f"{name:18}" + "".join(f"  {key} {value:.3f}" for key, value in row.items()))
    if args.json:
        checkpoint.write_json(args.json, record | figures)


def parse(argv=None):
    p = argparse.ArgumentParser(prog="python -m extras.slots", description=__doc__,
                                formatter_class=flags.HelpFormatter)
    add = p.add_argument
    add("--method", choices=["slots", "kmeans"], default="slots")
    add("--teacher", default="shapes", help="as in train.py")
    add("--image-size", type=int, default=48, help="pixels, at which the teacher takes scenes")
    add("--slots", type=int, default=6, help="S, slots or clusters: 4 objects, the background, and "
        "one more for the background's parts")
    add("--hidden", type=int, default=256, help="width of the decoder's MLP")
    add("--train-images", type=data.image_count, default=20000, help="at most this many scenes")
    add("--test-images", type=data.image_count, default=2000, help="at most this many scenes")
    add("--batch-size", type=int, default=64, help="images per step")
    add("--steps", type=int, default=5000, help="5000: a few minutes on a GPU, hours on a CPU")
    add("--lr", type=float, default=4e-4, help="peak, DINOSAUR's")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=precision.NAMES, default="auto", help="as in train.py")
    add("--json", type=Path, metavar="FILE", help="also write the record there")
    return p.parse_args(argv)


def main():
    try:
        run(parse())
    except (ValueError, OSError) as error:
        raise SystemExit(f"extras.slots: {error}") from None


if __name__ == "__main__":
    main()
