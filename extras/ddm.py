"""DDM: a teacher whose CLS keeps the domain of an image in a short prefix, and out of the rest.

    python -m extras.ddm --data folder:cifar10 --domains tinted                     # without DDM
    python -m extras.ddm --data folder:cifar10 --domains tinted --ddm labels        # with it
    python -m extras.ddm --data folder:cifar10 --domains tinted --ddm pseudo        # no labels

Source: Kalibhat, dissertation, chapter 2 (Domain Disentanglement Module and robust clustering),
here in the DINO pretraining of extras.pretrain, whose flags apply. The CLS is h = [h^d | h^p], h^d
its first k = width / 16 columns; y_i is the domain of image i, sim(a, b) = exp(cos(a, b) / tau):

    L_var,i = log [ sum_{j != i, y_j = y_i} sim(h^d_i, h^d_j) / sum_{y_j != y_i} sim(h^d_i, h^d_j) ]
    L_inv,i = D(h^p_i, y_i) - D(h^p_i, y_rand),                         y_rand ~ P(y)

The encoder minimises lambda L_DINO(h^p) - mean L_var + mean L_inv; the critic D maximises mean
L_inv - penalty * mean (|gradient| - 1)^2 (WGAN-GP). With --ddm pseudo the domains are clusters of h
(k-means into M, repeated 20 times), and image i counts where |h_i - c_2nd|^2 / |h_i - c_1st|^2 >
1 + exp(-5 t / T), in step t of T after the warm-up. (Our choices: images that do not count stay in
L_DINO; k-means starts at the means of its last clusters, so that a domain keeps its number.) Not
given by the source, and therefore our choices: tau 0.1, lambda on L_DINO alone as in its text, the
critic's widths, penalty and steps (WGAN-GP's), k-means' intervals.

Domains: `tinted` puts an image's luminance into red or green alone, at random; `grey` puts it into
all channels, which is the control for the colours that tinting takes away; `none` leaves the
images. Hue, saturation and grey are not augmented in any of them, because that would erase the
domain. After pretraining the linear probes of the teacher's h, h^p and h^d, for class and domain,
on the test split are printed and written to OUT/ddm.json.
"""
import dataclasses
import json
import math
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import checkpoint
import data
import distributed
import losses
import scoring
import stable
from extras import pretrain

LUMA = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
CRITIC_WIDTH, SLOPE, REFRESHES = 256, 0.2, 20


def domains(images, tint, seed):
    """An ImageSet in memory -> the same with images of `tint` and, where `tinted`, the factor
    "domain" (n,): 0 red, 1 green."""
    if tint == "none":
        return images
    if images.images is None:
        raise ValueError("--domains needs the images in memory: take fewer with --train-images")
    grey = torch.cat([(x * LUMA).sum(1, keepdim=True) for x in images.images.split(1000)])
    grey, factors = grey.round().byte().expand(-1, 3, -1, -1), {}
    if tint == "tinted":
        generator = torch.Generator().manual_seed(seed)
        factors = {"domain": torch.randint(2, (len(images),), generator=generator)}
        grey = grey * F.one_hot(factors["domain"], 3).byte()[:, :, None, None]
    return dataclasses.replace(images, images=grey.contiguous(), files=None, factors=factors)


def prefix_terms(h, y, tau):
    """L_var,i of h (n, k), y (n,) -> one value for each i that has another image of its domain and
    one of another domain; maybe none."""
    u, same = F.normalize(h, dim=1), y[:, None] == y
    itself = torch.eye(len(y), dtype=torch.bool, device=y.device)
    valid = (same.sum(1) > 1) & (~same).any(1)
    cosine, same, itself = (u @ u.T / tau)[valid], same[valid], itself[valid]
    return (cosine.masked_fill(~same | itself, -torch.inf).logsumexp(1)
            - cosine.masked_fill(same, -torch.inf).logsumexp(1))


def reliable(distances, eps):
    """Squared distances (n, M) to the centroids -> (n,) bool: not nearly between two of them. (As
    printed the ratio is of the farthest to the nearest; both are the same for M = 2.)"""
    near = distances.topk(2, largest=False).values
    return near[:, 1] / near[:, 0].clamp(min=1e-12) > 1 + eps


class Critic(nn.Module):
    """D: (h^p, domain) -> (n,), an MLP with LeakyReLU."""

    def __init__(self, width, count):
        super().__init__()
        self.count = count
        self.layers = nn.ModuleList([nn.Linear(width + count, CRITIC_WIDTH),
                                     nn.Linear(CRITIC_WIDTH, CRITIC_WIDTH),
                                     nn.Linear(CRITIC_WIDTH, 1)])

    def forward(self, x):
        """x (n, r - k + M): h^p and the one-hot domain -> D (n,)."""
        first, second, last = self.layers
        return last(F.leaky_relu(second(F.leaky_relu(first(x), SLOPE)), SLOPE))[:, 0]

    def gradient(self, x):
        """dD/dx (n, r - k + M), by hand: the counter of a step's operations (extras.benchmark) does
        not support torch.autograd.grad."""
        first, second, last = self.layers
        a = first(x)
        b = second(F.leaky_relu(a, SLOPE))
        slopes = [torch.where(z > 0, 1.0, SLOPE) for z in (a, b)]       # piecewise constant
        return (last.weight * slopes[1]) @ second.weight * slopes[0] @ first.weight

    def gap(self, h, y, y_rand):
        """L_inv,i (n,) of h (n, r - k), domains y and y_rand (n,)."""
        a, b = (self(torch.cat([h, F.one_hot(d, self.count)], 1)) for d in (y, y_rand))
        return a - b

    def penalty(self, h, y, y_rand):
        """Mean (|gradient| - 1)^2 at points between (h, y) and (h, y_rand)."""
        a, b = (F.one_hot(d, self.count) for d in (y, y_rand))
        share = torch.rand(len(h), 1, device=h.device)
        gradient = self.gradient(torch.cat([h, share * a + (1 - share) * b], 1))
        return (gradient.norm(dim=1) - 1).square().mean()


class DDMPretrainer(pretrain.Pretrainer):
    """Pretrainer that minimises lambda L_DINO(h^p) - mean L_var + mean L_inv, where --ddm."""

    parts = (*pretrain.Pretrainer.parts, "critic", "critic_optimizer")

    def __init__(self, args, images):
        if distributed.world_size() > 1:
            raise ValueError("extras.ddm runs in one process")
        if args.ddm == "labels" and "domain" not in images.factors:
            raise ValueError("--ddm labels needs domains: --domains tinted, or --ddm pseudo")
        self.k = args.ddm_k or args.width // 16
        self.prefix = 0 if args.ddm == "none" else self.k
        super().__init__(args, images)
        no_hue = dict(strength=(*self.augment.strength[:2], 0, 0), grey=0)
        self.augment = dataclasses.replace(self.augment, **no_hue)
        self.augment_local = dataclasses.replace(self.augment_local, **no_hue)
        self.critic = Critic(args.width - self.k, args.ddm_count)
        self.critic.register_buffer("domain", (             # of each image; -1: it does not count
            images.factors["domain"] if args.ddm == "labels" else torch.full((len(images),), -1)))
        self.critic.to(args.device)
        self.critic_optimizer = torch.optim.Adam(self.critic.layers.parameters())

    def batches(self, last):
        for index, x in zip(self.order(last), super().batches(last)):
            self.recluster()
            self.y = self.critic.domain[index.to(self.args.device)]                     # (B,)
            yield x

    def recluster(self):
        """With --ddm pseudo, REFRESHES times after the warm-up: the clusters of h as domains."""
        args, warm_up = self.args, self.args.ddm_warm_up * self.steps_per_epoch
        rest = self.steps - warm_up
        if args.ddm != "pseudo" or self.step < warm_up or (self.step - warm_up) % max(
                1, rest // REFRESHES):
            return
        h = pretrain.features(self.teacher["backbone"], self.images, args)              # (n, r)
        before = [h[self.critic.domain == m] for m in range(args.ddm_count)]
        start = torch.stack([x.mean(0) for x in before]) if all(map(len, before)) else None
        distances = torch.cdist(h, stable.kmeans(h, args.ddm_count, start=start)).square()
        counts = reliable(distances, math.exp(-5 * (self.step - warm_up) / rest))
        self.critic.domain.copy_(torch.where(counts, distances.argmin(1), -1))
        if "domain" in self.images.factors:
            print(f"pseudo-domains at step {self.step}: purity "
                  f"{purity(distances.argmin(1), self.images.factors['domain']):.3f}, "
                  f"{counts.float().mean():.1%} of the images count", flush=True)

    def objective(self, loss, cls):
        args = self.args
        if args.ddm == "none" or (self.y < 0).all():
            return loss
        y = self.y.repeat(2)                                # of the two global views
        with torch.autocast(cls.device.type, enabled=False):
            h, y = cls[:2].flatten(0, 1).float()[y >= 0], y[y >= 0]
            content = h[:, self.k:]
            self.train_critic(content.detach(), y)
            gap = self.critic.gap(content, y, y[torch.randperm(len(y), device=y.device)]).mean()
            prefix = prefix_terms(h[:, :self.k], y, args.ddm_tau)
            return (args.ddm_lambda * loss + args.ddm_invariance * gap
                    - prefix.sum() / max(1, len(prefix)))

    def train_critic(self, content, y):
        """Steps of the critic on detached h^p (n, r - k): maximises the gap minus the penalty."""
        rate = losses.cosine(self.args.ddm_lr, 0, self.step / self.steps)
        self.critic_optimizer.param_groups[0]["lr"] = rate
        for _ in range(self.args.ddm_steps):
            y_rand = y[torch.randperm(len(y), device=y.device)]
            loss = (self.args.ddm_penalty * self.critic.penalty(content, y, y_rand)
                    - self.critic.gap(content, y, y_rand).mean())
            self.critic_optimizer.zero_grad()
            loss.backward()
            self.critic_optimizer.step()


def purity(clusters, labels):
    """Share of images whose label is the most frequent one of their cluster; both (n,)."""
    table = torch.zeros(int(clusters.max()) + 1, int(labels.max()) + 1)
    table.index_put_((clusters, labels), torch.ones(len(labels)), accumulate=True)
    return (table.max(1).values.sum() / len(labels)).item()


def probes(trainer, args):
    """Linear probes (top-1 in %) of the teacher's h, h^p and h^d on the test split."""
    test = domains(data.load(args.data, "test", args.image_size, args.test_images, args.seed),
                   args.domains, args.seed + 1)
    sets, k, rows = (trainer.images, test), trainer.k, {}
    x, z = (pretrain.features(trainer.teacher["backbone"], s, args).to(args.device) for s in sets)
    parts = {"h": slice(None), "content": slice(k, None), "prefix": slice(0, k)}
    targets = {"class": [s.labels for s in sets]}
    if "domain" in test.factors:
        targets["domain"] = [s.factors["domain"] for s in sets]
    for target, (train_y, test_y) in targets.items():
        train_y, test_y = train_y.to(args.device), test_y.to(args.device)
        for name, part in parts.items():
            top1 = scoring.linear_probe(x[:, part], train_y, z[:, part], test_y)[0]
            rows[f"{target}_top1_{name}"] = round(top1, 2)
    return rows


def own_flags(parser):
    add = parser.add_argument_group("domains and DDM").add_argument
    add("--domains", choices=["none", "grey", "tinted"], default="tinted",
        help="the images: as they are, grey, or tinted red or green at random")
    add("--ddm", choices=["none", "labels", "pseudo"], default="none",
        help="labels: the tints are known; pseudo: clusters of h stand for them")
    add("--ddm-k", type=int, help="columns of the domain prefix; not given: a sixteenth of --width")
    add("--ddm-count", type=int, default=2, help="M, domains")
    add("--ddm-lambda", type=float, default=0.5, help="weight of DINO's loss")
    add("--ddm-invariance", type=float, default=1.0,
        help="weight of L_inv; raise where the probe still finds the domain in h^p")
    add("--ddm-tau", type=float, default=0.1, help="temperature of L_var")
    add("--ddm-lr", type=float, default=0.005, help="of the critic's Adam, to 0 by a cosine")
    add("--ddm-steps", type=int, default=5, help="of the critic for each one of the encoder")
    add("--ddm-penalty", type=float, default=10.0, help="weight of the critic's gradient penalty")
    add("--ddm-warm-up", type=int, default=1, help="epochs of DINO alone before --ddm pseudo")
    add("--test-images", type=data.image_count, default="all", help="for the probes, at most")
    parser.set_defaults(out=Path("runs/ddm"))


def main():
    args = pretrain.parse(description=__doc__, own_flags=own_flags)
    try:
        args.device = distributed.init(args.device)
        trainer = pretrain.run(args, DDMPretrainer,
                               lambda images: domains(images, args.domains, args.seed))
        record = {name: getattr(args, name) for name in ("domains", "ddm", "seed", "epochs")}
        record |= {"step": trainer.step} | probes(trainer, args)
        print(json.dumps(record))
        checkpoint.write_json(args.out / "ddm.json", record)
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"extras.ddm: {error}") from None


if __name__ == "__main__":
    main()
