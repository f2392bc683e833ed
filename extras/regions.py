"""Region tokens with additive (rank) attention as the decoder's memory, instead of patches.

    python -m extras.regions train --out runs/regions                           # train.py's flags
    python -m extras.regions train --data pairs --teacher runs/pairs-teacher/teacher.pt
    python -m extras.regions evaluate runs/regions/ckpt.pt                      # also: visualize
    python -m extras.regions order runs/regions/ckpt.pt              # the swapped-order test

Source: Kalibhat, dissertation, chapter 6 (semantically meaningful tokens), whose segmenter,
relation model and captions are out of reach: regions are k-means clusters of an image's patch
tokens (L2 normalised, with 0.1 times their position in the image), K = 8, or with --oracle the
drawn masks. The memory of the decoder is [regions | one relation], 9 tokens instead of 64 patches,
passed through one transformer block. The CLS is left out, because recipe `stable` would copy it.
The relation is that of the two largest regions a and b that differ from the image's border, a the
larger: "a is left of, right of, above or below b", a learned embedding.

Rank of token b for token a (equation 6.1; rows are queries; the largest where several hold):

    7      (a, b, .) is a triplet: a is the subject, b the object
    6      b is the predicate of a triplet of a
    5      a is the predicate of a triplet of b
    5 - k  b is the k-th nearest region of a, k = 1 ... 4 (distance of centroids)
    0      otherwise

Rank r adds w_r, w = cumsum(exp(a)), a in R^8 learned with a_0 = 0, to all heads' scores.
--region-memory: `none` is train.py --memory patches, `regions` has no relation and no ranks,
`relations` the relation token without ranks, `additive` both.

`pairs` (extras/pairs.py) are drawn scenes of two objects whose class is their relation; `order` is
the swapped-order test on them.
"""
import argparse
import sys
from functools import lru_cache

import torch
from torch import nn
from torch.nn import functional as F

import checkpoint
import data
import evaluate
import flags
import stable
import teachers
import train
import visualize
from discretize import EMBEDDING_STD
from extras import pairs, pretrain
from model import Block, CrossAttention

# ---- regions, relations, ranks -------------------------------------------------------------------

def grid(n):
    """-> (n, 2): x and y in [0, 1] of the middles of n patches in a square."""
    side = round(n ** 0.5)
    axis = (torch.arange(side) + 0.5) / side
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).flatten(0, 1)


def rows(x):
    return torch.arange(len(x), device=x.device)


def cluster(patches, count, iterations=10):
    """k-means in each image: (B, N, d) -> the cluster of each patch (B, N). Starts from the patch
    that differs most from the mean, then from those farthest from all so far: no randomness."""
    x = F.normalize(patches.float(), dim=-1)
    positions = 0.1 * grid(x.shape[1]).to(x)
    x = torch.cat([x, positions.expand(len(x), -1, -1)], -1)
    far, centers = (x - x.mean(1, keepdim=True)).square().sum(-1), []
    for _ in range(count):
        centers.append(x[rows(x), far.argmax(1)])
        distance = (x - centers[-1][:, None]).square().sum(-1)
        far = distance if len(centers) == 1 else torch.minimum(far, distance)
    centers = torch.stack(centers, 1)                                           # (B, K, d + 2)
    for _ in range(iterations):
        means, size = region_means(x, torch.cdist(x, centers).argmin(-1), count)
        centers = torch.where(size[..., None] > 0, means, centers)
    return torch.cdist(x, centers).argmin(-1)


def region_means(values, ids, count):
    """values (B, N, c), ids (B, N) -> means (B, K, c) of each region, sizes (B, K)."""
    member = F.one_hot(ids, count).to(values.dtype)
    size = member.sum(1)
    return member.transpose(1, 2) @ values / size.clamp(min=1)[..., None], size


def foreground(patches, ids, count):
    """patches (B, N, d), ids (B, N) -> (B, K) bool: regions whose patches differ from the mean of
    the image's border by more than the average patch does. (Our choice.)"""
    position = grid(ids.shape[1]).to(patches.device)
    border = ((position == position.min()) | (position == position.max())).any(-1)
    distance = (patches - patches[:, border].mean(1, keepdim=True)).float().square().sum(-1)
    mean, size = region_means(distance[..., None], ids, count)
    return (mean[..., 0] > distance.mean(1, keepdim=True)) & (size > 0)


def find_relation(centroids, size, front):
    """centroids (B, K, 2), sizes and foreground (B, K) -> the two largest regions of the foreground
    (or of all, where it has fewer), the largest first, and their relation, (B,) each."""
    order = (size + size.sum(1, keepdim=True) * front).topk(2, dim=1).indices
    a, b = order.T
    dx, dy = (centroids[rows(a), a] - centroids[rows(b), b]).T
    return a, b, torch.where(dy.abs() > dx.abs(), 2 + (dy > 0).long(), (dx > 0).long())


def rank_matrix(centroids, size, triplet=None):
    """centroids (B, K, 2), sizes (B, K), triplet (a, b) -> ranks (B, M, M) int64 of the tokens
    [regions | predicate], M = K, or K + 1 with a triplet. Empty regions have no neighbours."""
    count = size.shape[1]
    distance = torch.cdist(centroids, centroids)
    empty = size == 0
    distance = distance.masked_fill(empty[:, None] | empty[..., None], torch.inf)
    distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    nearest, index = distance.topk(min(4, count - 1), largest=False)
    k = torch.arange(4, 4 - index.shape[-1], -1, device=size.device)
    k = torch.where(nearest.isfinite(), k, 0)
    ranks = torch.zeros_like(distance, dtype=torch.long).scatter_(2, index, k)
    if triplet is None:
        return ranks
    ranks = F.pad(ranks, (0, 1, 0, 1))
    a, b = triplet
    n = rows(a)
    ranks[n, a, b] = 7
    for end in triplet:
        ranks[n, end, count], ranks[n, count, end] = 6, 5
    return ranks


class RankBias(nn.Module):
    """w = cumsum(exp(a)), a_0 = 0: ranks (...) -> what is added to the scores of attention."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(7))

    def forward(self, ranks):
        return F.pad(self.a, (1, 0)).exp().cumsum(0)[ranks]


# ---- the descriptor's memory ---------------------------------------------------------------------

class Memory(nn.Module):
    """[regions | relation] of preprocessed patch tokens, through one block."""

    def __init__(self, width, heads, contents, count):
        super().__init__()
        self.contents, self.count = contents, count
        self.types = nn.Parameter(torch.randn(2, width) * EMBEDDING_STD)            # p_v, p_u
        self.predicates = nn.Parameter(torch.randn(len(pairs.RELATIONS), width) * EMBEDDING_STD)
        self.block, self.bias = Block(width, heads), RankBias()
        for module in self.block.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, patches, ids):
        """patches (B, N, d), ids (B, N) -> tokens (B, M, d), padding (B, M) bool: empty regions."""
        tokens, size = region_means(patches, ids, self.count)
        centroids, _ = region_means(grid(ids.shape[1]).to(tokens).expand(len(ids), -1, -1), ids,
                                    self.count)
        tokens, padding, triplet = tokens + self.types[0], size == 0, None
        if self.contents != "regions":
            front = foreground(patches, ids, self.count)
            *triplet, predicate = find_relation(centroids, size, front)
            predicate = self.predicates[predicate] + self.types[1]
            tokens = torch.cat([tokens, predicate[:, None]], 1)
            padding = F.pad(padding, (0, 1))
        scores = tokens.new_zeros(1)
        if self.contents == "additive":
            scores = self.bias(rank_matrix(centroids, size, triplet))
        scores = scores.masked_fill(padding[:, None], -torch.inf)               # (B, 1 or M, M)
        scores = scores.expand(-1, tokens.shape[1], -1)[:, None]                # (B, 1, M, M)
        return self.block(tokens, scores.to(tokens)), padding


class MaskedCrossAttention(CrossAttention):
    def forward(self, x, memory):
        """CrossAttention's, memory: tokens (B, M, d), padding (B, M)."""
        tokens, padding = memory
        y = self.split(self.to_q(x))                                    # (B, heads, L, d/heads)
        keys, values = self.keys_values(tokens)
        scores = y @ keys.transpose(-1, -2) * y.shape[-1] ** -0.5
        maps = scores.masked_fill(padding[:, None, None], -torch.inf).softmax(-1)
        return self.out((maps @ values).transpose(1, 2).flatten(2)), maps.transpose(1, 2)


class RegionDescriptor(stable.StableDescriptor):
    """StableDescriptor that attends to regions. Its maps give a region's attention to its patches
    in equal parts."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.memory = None                                  # patches

    def use(self, memory):
        self.memory = memory
        for block in self.blocks:
            block.cross.__class__ = MaskedCrossAttention

    def start_state(self, z_t):
        state = super().start_state(z_t)
        if self.memory is None:
            return state
        ids = self.memory.segment(z_t)
        return state | {"tokens": self.memory(z_t[:, 1:], ids), "ids": ids}

    def attention_maps(self, state):
        maps = super().attention_maps(state)                                    # (B, T, M)
        if self.memory is None:
            return maps
        ids = state["ids"]
        size = F.one_hot(ids, self.memory.count).sum(1).clamp(min=1)            # (B, K)
        maps = (maps[..., :self.memory.count] / size[:, None]).gather(
            2, ids[:, None].expand(-1, maps.shape[1], -1))                      # (B, T, N)
        return maps / maps.sum(-1, keepdim=True)


class RegionStudent(stable.StableStudent):
    descriptor_class = RegionDescriptor
    # the decoder would copy the CLS, whatever the rest of its memory is
    defaults = stable.StableStudent.defaults | {"memory": "patches"}

    @staticmethod
    def add_flags(add):
        add("--region-memory", choices=["none", "regions", "relations", "additive"],
            default="additive", help="what the decoder attends to; none: the patches, the control")
        add("--regions", type=int, default=8, help="K of an image")
        add("--oracle", action="store_true", help="the drawn masks of --data pairs as regions")

    def __init__(self, args, width):
        super().__init__(args, width)
        if args.region_memory == "none":
            return
        if args.regions < 3 or args.memory == "all":
            raise ValueError("--regions must be at least 3, and --memory patches")
        memory = Memory(width, args.descriptor[1], args.region_memory, args.regions)
        memory.segment = (self.oracle if args.oracle
                          else lambda z_t: cluster(z_t[:, 1:], args.regions))
        self.descriptor.use(memory)

    @torch.no_grad()
    def oracle(self, z_t):
        """The masks of the drawn image whose CLS is nearest to that of z_t, which is its own."""
        cls, ids = oracle_table(self.args.teacher, str(z_t.device))
        nearest = torch.cdist(z_t[:, 0].float(), self.preprocess(cls)[:, 0]).argmin(1)
        return ids[nearest]


@lru_cache
@torch.no_grad()
def oracle_table(name, device):
    """All images of `pairs`, and the exchanged ones -> CLS (n, 1, d), regions of patches (n, N)."""
    with torch.random.fork_rng([device] if "cuda" in device else []):
        teacher, cls, ids = teachers.load_teacher(name).to(device), [], []
    for split, swapped in (("train", False), ("test", False), ("test", True)):
        for i in range(0, pairs.COUNTS[split], 500):
            images, _, masks = pairs.draw_pairs(range(i, i + 500), split, swapped)
            cls.append(teacher(data.normalize(images.to(device)))[:, :1])
            cover = F.one_hot(masks, 3).float().permute(0, 3, 1, 2)             # (500, 3, 32, 32)
            ids.append(F.avg_pool2d(cover, teacher.patch).flatten(2).argmax(1).to(device))
    return torch.cat(cls), torch.cat(ids)


# ---- main ----------------------------------------------------------------------------------------

def register():
    checkpoint.STUDENTS["regions"] = RegionStudent
    data.PUBLIC["pairs"] = pairs.pairs
    data.AUGMENT["pairs"] = data.AUGMENT["shapes"]                      # no flip


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=flags.HelpFormatter,
        epilog="`COMMAND --help` has the flags of each; those of regions are the last ones.")
    commands = {"train": train.main, "pretrain": pretrain.main, "evaluate": evaluate.main,
                "visualize": visualize.main, "order": pairs.main}
    parser.add_argument("command", choices=commands)
    args, rest = parser.parse_args(sys.argv[1:2]), sys.argv[2:]
    register()
    own = ["--recipe", "regions"] if args.command == "train" else []
    sys.argv = [f"extras.regions {args.command}", *own, *rest]
    commands[args.command]()


if __name__ == "__main__":
    main()
