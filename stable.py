"""The recipe `stable`: the paper's transformer blocks, granular loss and kinds of discretizer, with
what keeps the symbols from collapsing. (Our choices within `--recipe paper` are in README's table.)

    h_t = cls_pred_t - (e_1 + ... + e_(t-1))      the discretizer sees what is left of the CLS
    z_s^(n) = e_1 + ... + e_n + E_S(s_q^[n])      the interpreter corrects the sum of codewords

1. Residual codebooks (SoundStream, EnCodec): at position t the decoder predicts the CLS token
   (`cls_pred`), and the discretizer chooses the codeword e_t for what the earlier
   codewords leave of it. Each position has its own discretizer, of any kind.
2. Their codebooks start at residual k-means of the CLS tokens and then learn by gradient.
3. The CLS is whitened by the covariance of its difference between two views of an image, and by
   that of x - mean(kNN(x)) (RCA with k-NN chunklets), projected to its principal components and
   L2-normalised: directions that vary between views or neighbours count less.
4. P_S = P_T = frozen k-means prototypes of the CLS instead of an MLP and its EMA.
5. Feature regression: z_s and cls_pred are regressed on the CLS itself, by squared error.
6. Training is straight-through, on one un-augmented view per image whose tokens are cached,
   without centering, at a teacher temperature of 0.1.

RESULTS.md has ablations of 2, 3, 5 and 6.
"""
import torch
from torch import nn
from torch.nn import functional as F

import discretize
import place
from model import Descriptor, Sequence, Student
from progress import Progress, counted

CLS_PRED_WEIGHT = 4         # of cls_pred's error, times --regression: all symbols depend on it
KMEANS_ITERATIONS = 25
FIT_IMAGES = 20000          # for whitening and k-means, at most
RCA_IMAGES = 4000           # of these, whose neighbours (among all) are averaged
WITHIN_IMAGES = 2000        # whose augmented views are compared
PATCH_IMAGES = 500          # of these, whose patch tokens are standardised
PLACE_IMAGES = 4000         # whose places are whitened, with --attention own
WITHIN_RIDGE, RCA_RIDGE = 0.01, 0.1     # of the two whitenings


# ---- what is fitted before the first step --------------------------------------------------------

def kmeans(x, count, iterations=KMEANS_ITERATIONS, what="k-means", start=None):
    """x (n, d) -> (count, d) centroids: Lloyd's algorithm from start (count, d), or random rows; an
    empty one stays. what: begins the line of progress. Raises ValueError for fewer rows than
    centroids."""
    if len(x) < count:
        raise ValueError(f"k-means of {len(x)} images cannot have {count} centroids; lower --vocab "
                         "or --prototypes, or take more images")
    centroids = x[torch.randperm(len(x))[:count].to(x.device)] if start is None else start
    with Progress(f"{what}, iteration", iterations) as progress:
        for _ in range(iterations):
            nearest = nearest_centroid(x, centroids)                        # (n,)
            size = nearest.bincount(minlength=count)[:, None]
            total = torch.zeros_like(centroids).index_add_(0, nearest, x)
            centroids = torch.where(size > 0, total / size.clamp(min=1), centroids)
            progress.update()
    return centroids


def nearest_centroid(x, centroids):
    """x (n, d), centroids (K, d) -> (n,) int64: argmin_k |x - c_k|^2."""
    half_norms = centroids.square().sum(1) / 2                      # |c|^2 / 2 - <x, c> decides
    return torch.cat([(half_norms - part @ centroids.T).argmin(1) for part in x.split(2000)])


def neighbour_means(y, neighbours, rows):
    """y (n, d) -> for its first `rows`: the mean of the k nearest other rows of y, (rows, d)."""
    parts = counted("nearest neighbours, images", len(y[:rows]), y[:rows].split(500))
    nearest = (torch.cdist(part, y).topk(neighbours + 1, largest=False).indices for part in parts)
    return torch.cat([y[i[:, 1:]].mean(1) for i in nearest])        # without the row itself


def whitening(x, ridge):
    """x (n, d) of mean 0 and covariance C -> the symmetric (ZCA) matrix (C + ridge l I)^(-1/2), l
    the largest eigenvalue of C."""
    variance, axes = torch.linalg.eigh(x.T @ x / len(x))
    return axes * (variance + ridge * variance.max().clamp(min=1e-12)).rsqrt() @ axes.T


def cls_and_patches(batches, n, images):
    """Batches of z_t (b, N+1, d) of at most n images -> (CLS (n, d), patches (images * N, d) of the
    first `images`). Copied into one piece of memory: a slice would keep its whole batch, and small
    pieces between the batches would keep the memory around them from being used again."""
    done = 0
    for z_t in batches:
        if not done:
            cls, patches = z_t.new_empty(n, z_t.shape[2]), z_t.new_empty(images, *z_t[0, 1:].shape)
        cls[done:done + len(z_t)] = z_t[:, 0]
        patches[done:done + len(z_t)] = z_t[:max(0, images - done), 1:]
        done += len(z_t)
    return cls[:done], patches[:done].flatten(0, 1)


def match_codewords(directions, centroids):
    """centroids (K, d) reordered by greedy matching, so that centroid k has a large cosine with
    directions[k], (K, d): symbol k then has a similar direction at every position."""
    cosine = F.normalize(directions, dim=1) @ F.normalize(centroids, dim=1).T       # (K, K)
    order = torch.empty(len(centroids), dtype=torch.long, device=centroids.device)
    for _ in range(len(centroids)):
        k, best = divmod(cosine.argmax().item(), len(centroids))
        order[k] = best
        cosine[k], cosine[:, best] = -2, -2                                 # both are taken
    return centroids[order]


class KMeansPrototypes(nn.Module):
    """P_S and P_T: the logit of prototype c_k is <z, c_k> / mean |c|^2. Student and teacher share
    the frozen prototypes, so z_s must come to lie where the CLS does."""

    def __init__(self, width, prototypes):
        super().__init__()
        self.register_buffer("centroids", torch.zeros(prototypes, width))

    @torch.no_grad()
    def fit(self, cls):
        """cls (n, d), n at least P."""
        centroids = kmeans(cls, len(self.centroids), 10, "k-means of the prototypes")
        self.centroids.copy_(centroids / centroids.square().sum(1).mean().clamp(min=1e-6))

    def forward(self, z):
        """(..., d) -> (..., P)"""
        with torch.autocast(z.device.type, enabled=False):
            return z.float() @ self.centroids.T


# ---- the networks' differences -------------------------------------------------------------------

class StableDescriptor(Descriptor):
    """The paper's decoder; its output becomes a prediction of the CLS."""

    def __init__(self, width, depth, heads, length, own=False):
        super().__init__(width, depth, heads, length, own)
        self.cls_head = nn.Linear(width, width)

    def forward(self, z_t, disc, hard=False, attention=False):
        """z_t (B, N+1, d), disc: T discretizers -> Sequence."""
        state, quantized, cls_preds = self.start_state(z_t), [], []
        x, codewords = self.start.expand(len(z_t), -1), 0                   # (B, d)
        for t in range(self.length):
            cls_pred = self.cls_head(self.step(x, t, state)).float()
            q = disc[t](cls_pred - codewords, hard)                         # h_t
            # No gradient from later positions, as in residual VQ (our choice, because vq's
            # straight-through copy would add the gradients of all later positions to this one's)
            x = q.embedding.detach()
            codewords = codewords + x
            quantized.append(q)
            cls_preds.append(cls_pred)
        maps = self.attention_maps(state) if attention else None
        return Sequence.stack(quantized, maps, torch.stack(cls_preds, 1))


class PlaceDescriptor(Descriptor):
    """--attention own: the discretizer gets the whitened mean token of the symbol's place
    (place.py) and, in later rounds, what the earlier rounds' codewords leave of it. It gets no
    gradient to the decoder (our choice): the place is learned by place_loss alone."""

    def __init__(self, width, depth, heads, length, own=True):
        super().__init__(width, depth, heads, length, own)
        self.norms = nn.ModuleList(nn.Identity() for _ in range(length))    # whitening does it
        self.background = nn.Parameter(torch.zeros(width))                  # of place_loss
        self.register_buffer("whiten", torch.eye(width))

    def forward(self, z_t, disc, hard=False, attention=False):
        """z_t (B, N+1, d), disc: T discretizers -> Sequence, always with its maps."""
        state, quantized, embeddings = self.start_state(z_t), [], []
        x = self.start.expand(len(z_t), -1)                                     # (B, d)
        for t in range(self.length):
            mean = self.step(x, t, state) @ self.whiten
            a, m = state["maps"][-1][:, 0, 0], state["tokens"]["shares"][:t]
            h = (mean - place.explained(a, m, embeddings)).detach()
            quantized.append(disc[t](h, hard))
            embeddings.append(quantized[-1].embedding)
            x = embeddings[-1].detach()
        return Sequence.stack(quantized, self.attention_maps(state), None,
                              torch.stack(state["tokens"]["shares"], 1))


class StableStudent(Student):
    """See the top of this file."""

    descriptor_class = StableDescriptor
    defaults = dict(straight_through=True, views=1, cache_views=1, centering="none",
                    teacher_temp=[0.1, 0.1])

    @staticmethod
    def add_flags(add):
        add("--regression", type=float, default=3.0,
            help="weight of the squared error of z_s and cls_pred from the CLS")
        add("--codebook-lr", type=float, default=0.1,
            help="learning rate of codebooks that k-means started, as a share of --lr; 0: fixed")
        add("--neighbours", type=int, default=50,
            help="k of the k-NN chunklets of RCA; 0: no RCA (whitening by views stays)")
        add("--iterations", type=int, default=3,
            help="of RCA, with neighbours in the space of the iteration before; 1 where the "
                 "nearest are often of another class")
        add("--components", type=int, default=32,
            help="principal components that the space keeps; 0: all")
        add("--memory", choices=["all", "patches"], default="all",
            help="what the decoder attends to: all of the teacher's tokens (the paper), or the "
                 "patch tokens alone, from which it cannot copy the CLS")

    def __init__(self, args, width):
        self.own = args.attention == "own"
        if self.own:
            self.descriptor_class = PlaceDescriptor
        super().__init__(args, width)
        for name in ("regression", "codebook_lr", "neighbours", "iterations", "components"):
            if not getattr(args, name) >= 0:
                raise ValueError(f"--{name.replace('_', '-')} must not be below 0, and is "
                                 f"{getattr(args, name)}")
        self.args = args
        if not self.own:
            nn.init.zeros_(self.interpreter.out.weight)         # no correction at first
            self.descriptor.attends_to_cls = args.memory == "all"
        self.register_buffer("mean", torch.zeros(2, width))                 # of CLS, of patches
        self.register_buffer("std", torch.ones(width))                      # of patches
        self.register_buffer("whiten", torch.eye(width))                    # of CLS

    def build_discretizer(self, args, width):
        if not self.own:
            return nn.ModuleList(discretize.build(args, width) for _ in range(args.length))
        discs = [discretize.build(args, width) for _ in range(0, args.length, place.PLACES)]
        return nn.ModuleList(discs[t // place.PLACES] for t in range(args.length))

    def slow_parameters(self):
        return [p for disc in dict.fromkeys(self.disc) for p in disc.codebook_parameters()]

    def build_projectors(self, args, width):
        projector = KMeansPrototypes(width, args.prototypes)
        return projector, projector

    def preprocess(self, z_t):
        """z_t (B, N+1, d) -> patches of mean 0 and std 1, CLS whitened, of length d^0.5."""
        with torch.autocast(z_t.device.type, enabled=False):
            cls = self.l2_normalise((z_t[:, :1].float() - self.mean[0]) @ self.whiten)
            return torch.cat([cls, (z_t[:, 1:].float() - self.mean[1]) / self.std], 1)

    @staticmethod
    def l2_normalise(y):
        """L2-normalised to mean square 1, because k-NN compares directions alone."""
        return F.normalize(y, dim=-1) * y.shape[-1] ** 0.5

    def interpret(self, embeddings):
        """(B, T, d) -> z_s (B, D, d): the sum of each prefix's codewords, corrected by E_S."""
        if self.own:
            return self.interpreter(embeddings)
        prefix_sums = embeddings.cumsum(1)[:, [n - 1 for n in self.lengths]]
        return prefix_sums + self.interpreter(embeddings)

    def embed(self, ids):
        """ids (B, T) -> each position's codewords (B, T, d)."""
        return torch.stack([d.codebook[i] for d, i in zip(self.disc, ids.T)], 1)

    def extra_loss(self, sequence, z_s, z_t):
        """Feature regression: mean squared errors, in units of the CLS's own variance."""
        cls = z_t[:, :1]                                                    # (B, 1, d)
        error = (z_s.float() - cls).square().mean()
        if self.own:
            return self.args.regression * error + place.place_loss(
                sequence.attention, sequence.shares, z_t[:, 1:].float(), self.descriptor.background)
        return self.args.regression * (
            error + CLS_PRED_WEIGHT * (sequence.cls_pred - cls).square().mean())

    # ---- before the first step -------------------------------------------------------------------

    @torch.no_grad()
    def fit(self, first_tokens):
        """The space, the prototypes and the codebooks, from the teacher's tokens of training
        images. first_tokens(n, augmented=False) yields z_t (b, N+1, d) of the first n, or of all
        if there are fewer.
        """
        components = self.args.components
        y = self.whiten_by_neighbours(self.fit_whitening(first_tokens), self.whiten)
        if components:
            covariance = torch.cov(self.l2_normalise(y).T)
            axes = torch.linalg.eigh(covariance).eigenvectors[:, -components:]          # ascending
            y = self.transform(y, axes @ axes.T, self.whiten)
        y = self.l2_normalise(y)
        self.projector.fit(y)
        self.fit_codebooks(self.fit_places(first_tokens) if self.own else y)

    def fit_places(self, first_tokens):
        """Whitens the mean tokens of places as the CLS tokens, by their covariance and by that of
        x - mean(kNN(x)), because a ViT's tokens depend on the whole image, but in few directions,
        and in these a symbol would change with what lies elsewhere -> y (n, d)."""
        y = torch.cat([place.sample_places(self.preprocess(z_t)[:, 1:], place.PLACES)
                       for z_t in first_tokens(PLACE_IMAGES)])
        y = self.transform(y, whitening(y - y.mean(0), WITHIN_RIDGE), self.descriptor.whiten)
        return self.whiten_by_neighbours(y, self.descriptor.whiten)

    def whiten_by_neighbours(self, y, total):
        """RCA of y (n, d), see 3 at the top; multiplies the matrix `total` too -> y."""
        neighbours = min(self.args.neighbours, len(y) // 10)
        for _ in range(self.args.iterations if neighbours else 0):
            difference = y[:RCA_IMAGES] - neighbour_means(y, neighbours, RCA_IMAGES)
            y = self.transform(y, whitening(difference, RCA_RIDGE), total)
        return y

    def fit_whitening(self, first_tokens):
        """Whitens by the covariance within images, between two augmented views: what lasts counts.
        -> CLS of the un-augmented images, whitened, (n, d)."""
        views, patches = zip(*(cls_and_patches(first_tokens(WITHIN_IMAGES, True), WITHIN_IMAGES,
                                               PATCH_IMAGES) for _ in range(2)))
        patches = torch.cat(patches)
        self.mean.copy_(torch.stack([torch.cat(views).mean(0), patches.mean(0)]))
        self.std.copy_(patches.std(0).clamp(min=1e-6))
        y = cls_and_patches(first_tokens(FIT_IMAGES), FIT_IMAGES, 0)[0] - self.mean[0]
        return self.transform(y, whitening(views[0] - views[1], WITHIN_RIDGE), self.whiten)

    def transform(self, y, matrix, total):
        """Multiplies y (n, d) and the matrix `total` by `matrix` (d, d), scaled so that the
        product's variance is 1 -> y."""
        matrix = matrix / ((y - y.mean(0)) @ matrix).square().mean().sqrt().clamp(min=1e-6)
        total.copy_(total @ matrix)
        return y @ matrix

    def fit_codebooks(self, y):
        """Residual k-means of y (n, d): each position's codebook is of what the earlier ones leave
        of the CLS tokens."""
        residual, directions = y, 0
        discs = list(dict.fromkeys(self.disc))
        for t, disc in enumerate(discs):
            centroids = kmeans(residual, disc.vocab,
                               what=f"k-means of codebook {t + 1} of {len(discs)}")
            if t:
                centroids = match_codewords(directions, centroids)
            directions = directions + F.normalize(centroids, dim=1)
            disc.init_codebook(centroids, torch.cdist(residual, centroids).square().std())
            residual = residual - centroids[nearest_centroid(residual, centroids)]
