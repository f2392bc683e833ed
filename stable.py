"""Stage 1."""
import torch
from torch import nn
from torch.nn import functional as F
import discretize, model, data, distributed, precision
from model import Descriptor, Student


def ordered_like(meant, centres):
    """centres (K, d) in the order in which each has a large cosine with the row of meant (K, d)
    beside it: greedily, the most similar pair first."""
    cosine = F.normalize(meant, dim=1) @ F.normalize(centres, dim=1).T          # (K, K)
    order = torch.empty(len(centres), dtype=torch.long)
    for _ in range(len(centres)):
        k, best = divmod(cosine.argmax().item(), len(centres))
        order[k] = best
        cosine[k], cosine[:, best] = -2, -2                                     # both are taken
    return centres[order.to(centres.device)]


class Draft(nn.Module):
    """A first, linear reading of the symbols so far, and what it makes of the next one. Our
    addition, after residual quantisation: c_tk in the student's space is what symbol k stands
    for at place t,

        draft_t = c_1,s1 + ... + c_t,st        bid_tk = -|gist_t - draft_(t-1) - c_tk|^2 / unit_t

    gist_t is the CLS as the descriptor imagines it when it says symbol t: it sees the patches
    alone, and learns to tell the CLS from them (losses.regression_loss). So a symbol is about
    what those before it left unsaid, and the language is residual k-means (`fit`) as far as
    patches tell the CLS.

    With axes > 0 what the first symbol leaves is told in axes of its own: pictures that differ
    from their kind do so in other directions in each kind. The same bits tell more, and later
    symbols mean nothing without the first."""

    def __init__(self, width, length, vocab, axes=0):
        super().__init__()
        self.register_buffer("basis", torch.zeros(width, axes))     # the directions of the space
        self.register_buffer("axes", torch.zeros(vocab, axes, axes))    # of each first symbol
        # c_tk; fixed: learning on augmented views would move them away from pictures as they are
        self.register_buffer("centres", torch.randn(length, vocab, width))
        self.register_buffer("unit", torch.ones(length))
        self.gist = nn.Linear(width, width)
        self.show = nn.Linear(width, width)

    @torch.no_grad()
    def fit(self, cls, near, local=0):
        """Residual k-means of CLS in the student's space, (n, d). The first symbols are centres of
        pictures half on their way to what is near them, (n, d): of kinds, more than of single
        pictures. A unit is one deviation of the squared distances: bids have deviation 1 at every
        place, however little is left. A symbol points the same way at all places, as far as
        possible: so it is one word, and not T words. local: pictures that a first symbol's axes
        are fitted to."""
        meant, left = 0, cls
        for t, centres in enumerate(self.centres):
            fitted = discretize.kmeans(left if t else (cls + near) / 2, len(centres), 25)
            centres.copy_(ordered_like(meant, fitted) if t else fitted)
            meant = meant + F.normalize(centres, dim=1)
            distance = torch.cdist(left, centres)                               # (n, K)
            self.unit[t] = distance.square().std()
            symbols = distance.argmin(1)
            left = left - centres[symbols]
            if t == 0 and self.axes.numel():
                self.fit_axes(cls, left, local)
                left = self.turn(left, symbols)
        self.unit.clamp_(min=0.001 * self.unit[0].item() + 1e-6)    # few pictures leave nothing

    def fit_axes(self, cls, left, local):
        """Each first symbol's axes: principal ones of what is left (n, d) of so many pictures (n,
        d), those nearest to its centre, so that one code book serves all. Each axis points to
        where it is skewed: its two signs are not the same to a code book."""
        count = self.basis.shape[1]
        self.basis.copy_(torch.linalg.eigh(torch.cov(cls.T)).eigenvectors[:, -count:])
        left = left @ self.basis
        for centre, axes in zip(self.centres[0], self.axes):
            nearest = (cls - centre).square().sum(1).topk(min(local, len(cls)), largest=False)
            x = left[nearest.indices]
            principal = torch.linalg.eigh(x.T @ x).eigenvectors                 # loudest: last
            axes.copy_(principal * torch.where((x @ principal).pow(3).sum(0) < 0, -1, 1))

    def turn(self, x, first, back=False):
        """x (B, d) or (B, L, d) -> the same in the axes of the first symbols (B,), or back."""
        if not self.axes.numel():
            return x
        axes = self.axes[first]                                                 # (B, r, r)
        with torch.autocast(x.device.type, enabled=False):
            y = x.float().reshape(len(x), -1, x.shape[-1]) @ self.basis         # (B, L, r)
            return (y @ (axes.mT if back else axes) @ self.basis.T).view_as(x)

    def bids(self, left, t, first):
        """left (B, d) to be said at place t, after the symbols (B,) at place 0 -> (B, K), up to
        what is the same for all symbols."""
        centres, left = self.centres[t], self.turn(left, first) if t else left
        with torch.autocast(left.device.type, enabled=False):
            return (2 * left.float() @ centres.T - centres.square().sum(1)) / self.unit[t]

    def word(self, weights, t, first):
        """What the symbol at place t, (B, K), adds after the symbols (B,) at place 0."""
        with torch.autocast(weights.device.type, enabled=False):
            added = weights.float() @ self.centres[t]
        return self.turn(added, first, back=True) if t else added

    def forward(self, symbols):
        """(B, T) int64 -> (B, T, d), the draft after each symbol."""
        words = self.centres[torch.arange(symbols.shape[1]), symbols]
        later = self.turn(words[:, 1:], symbols[:, 0], back=True)
        return torch.cat([words[:, :1], later], 1).cumsum(1)


def neighbour_means(y, neighbours):
    """y (n, d) -> (n, d), the mean of so many others that lie nearest to each."""
    near = (torch.cdist(part, y).topk(neighbours + 1, largest=False).indices
            for part in y.split(500))
    return torch.cat([y[i[:, 1:]].mean(1) for i in near])           # without itself


def whitening(x, ridge):
    """The symmetric matrix that makes the covariance of x (n, d), of mean 0, the same in all
    directions, up to a factor. ridge: share of the largest variance that is added to all."""
    variance, axes = torch.linalg.eigh(x.T @ x / len(x))
    return axes * (variance + ridge * variance.max().clamp(min=1e-12)).rsqrt() @ axes.T


class Anchors(nn.Module):
    """P_S and P_T with prototypes that stay: k-means centres c_k of the teacher's CLS (ours).

    The paper's P_T, an EMA of P_S, forgets whatever the student does not say yet, and the
    target gets easy instead of the student good. These cannot forget. logit k = <z, c_k> /
    mean |c|^2: student and teacher go through the same prototypes, so z_s must come to lie
    where the CLS does."""

    def __init__(self, width, prototypes):
        super().__init__()
        self.register_buffer("centres", torch.zeros(prototypes, width))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def fit(self, cls):
        """k-means of CLS in the student's space (n, d), n at least P; ValueError for fewer."""
        if len(cls) < len(self.centres):
            raise ValueError(f"--prototypes {len(self.centres)} is more than the {len(cls)} "
                             "pictures; lower it")
        self.centres.copy_(discretize.kmeans(cls, len(self.centres)))
        self.scale.copy_(self.centres.square().sum(1).mean().clamp(min=1e-6))

    def forward(self, z):
        """(..., d) -> (..., P)"""
        with torch.autocast(z.device.type, enabled=False):
            return z.float() @ (self.centres / self.scale).T


class StableDescriptor(Descriptor):
    sees_cls = False

    def __init__(self, width, depth, heads, length):
        super().__init__(width, depth, heads, length)
        self.draft = None

    def forward(self, z_t, disc, hard=False, attention=False):
        draft = self.draft[0]
        state, emitted, cls_preds, sums = self.start_state(z_t), [], [], []
        cls_pred = read = torch.zeros_like(z_t[:, 0])
        x = self.start[:, 0].expand(len(z_t), -1)
        for t in range(self.length):
            x = x + self.position[t]
            x = x + draft.show(cls_pred - read)
            h = self.step(x, t, state)
            cls_pred = draft.gist(h)
            bids = draft.bids(cls_pred - read, t, emitted[0].ids if t else None)
            with torch.autocast(h.device.type, enabled=False):
                emitted.append(disc.choose(disc.scaled(bids.float()), h.float(), hard))
            x = emitted[-1].embedding
            read = read + draft.word(emitted[-1].weights, t, emitted[0].ids)
            cls_preds.append(cls_pred)
            sums.append(read)
        return self.sequence(emitted, state, attention, cls_pred=torch.stack(cls_preds, 1),
                             codewords=torch.stack(sums, 1))


class StableStudent(Student):
    descriptor_class = StableDescriptor

    def __init__(self, args, width, projector):
        super().__init__(args, width, projector)
        self.unit_length = args.unit_length
        self.register_buffer("mean", torch.zeros(2, width))                     # of CLS, of patches
        self.register_buffer("std", torch.ones(width))                          # of patches
        self.register_buffer("whiten", torch.eye(width))                        # of CLS
        self.draft = Draft(width, args.length, args.vocab, min(args.directions, width) if args.local_axes else 0)
        self.descriptor.draft = [self.draft]
        nn.init.zeros_(self.interpreter.out.weight)
        self.weight = args.regression

    @staticmethod
    def build_projectors(args, width):
        projector = Anchors(width, args.prototypes)
        return projector, projector

    @torch.no_grad()
    def fit_space(self, cls, patches, ridge=0.01):
        """cls (2, B, d): two views each of B pictures; patches (M, N, d) of some. ridge: share of
        the largest variance within pictures that is added to all (0.001 to 0.1 measured alike)."""
        patches = patches.flatten(0, 1)
        self.mean.copy_(torch.stack([cls.mean((0, 1)), patches.mean(0)]))
        self.std.copy_(patches.std(0).clamp(min=1e-6))
        whiten = whitening(cls[0] - cls[1], ridge)
        size = ((cls - self.mean[0]) @ whiten).square().mean().sqrt()
        self.whiten.copy_(whiten / size.clamp(min=1e-6))

    @torch.no_grad()
    def draw_together(self, y, neighbours, ridge=0.1):
        """Whitens the space once more, by the covariance of what tells pictures from their
        neighbours. y: CLS of pictures as they are, in this space, (n, d) -> the same in the new
        one. What near pictures do not share is not what they are of: it counts less now, and their
        classes lie closer together."""
        return self.transform(y, whitening(y - neighbour_means(y, neighbours), ridge))

    @torch.no_grad()
    def project(self, y, directions):
        """Leaves as many directions of the space as pictures differ most in; y (n, d) and what is
        returned as in `draw_together`. A symbol spent on the others, in which neighbours agree no
        more than others do, would be lost on k-NN; and the patches tell little of them."""
        _, axes = torch.linalg.eigh(torch.cov(self.lengthen(y).T))
        axes = axes[:, -directions:]                                            # largest: last
        return self.transform(y, axes @ axes.T)

    def transform(self, y, change):
        """Space and y (n, d) in it, changed by a matrix (d, d), and to mean square 1 again."""
        change = change / ((y - y.mean(0)) @ change).square().mean().sqrt().clamp(min=1e-6)
        self.whiten.copy_(self.whiten @ change)
        return y @ change

    def whitened(self, cls):
        """The teacher's CLS (..., d), of mean 0 and mean square 1, each of its own length."""
        with torch.autocast(cls.device.type, enabled=False):
            return (cls.float() - self.mean[0]) @ self.whiten

    def lengthen(self, y):
        """Whitened CLS (..., d), as long as the space has them: with unit_length all have mean
        square 1, and not only their mean has."""
        return F.normalize(y, dim=-1) * y.shape[-1] ** 0.5 if self.unit_length else y

    def preprocess(self, tokens):
        """z_t (B, N+1, d) -> the same in the student's space, CLS of mean square 1."""
        cls = self.lengthen(self.whitened(tokens[:, :1]))
        return torch.cat([cls, (tokens[:, 1:].float() - self.mean[1]) / self.std], 1)

    def interpret(self, sequence):
        z_s = self.interpreter(sequence.embeddings)
        return z_s + sequence.codewords[:, [n - 1 for n in self.lengths]]

    def extra_loss(self, sequence, z_s, z_t):
        y = z_t[:, 0]
        error = (z_s.float() - y[:, None]).square().mean((0, 2))
        return self.weight * (error.mean() + 4 * (sequence.cls_pred.float() - y[:, None]).square().mean())

    @torch.no_grad()
    def fit(self, teacher, pictures, args):
        student, head = self, self.projector
        """The student's space, from two views of 4000 pictures and the neighbours of up to 20 000 (and
        of their mirror images), and k-means of these."""
        augment, size = data.augmentation(args.data, args.image_size), args.image_size

        def encode(x):
            with precision.autocast(args.device, 'float32'):
                return teacher(x).float()

        def batches(count):
            return (x.to(args.device) for x in pictures.images[:count].split(args.batch_size))

        cls = [encode(augment(x, 2, size).flatten(0, 1))[:, 0].unflatten(0, (2, len(x)))
               for x in batches(4000)]
        patches = [encode(augment(x, 1, size)[0])[:, 1:] for x in batches(500)]
        student.fit_space(torch.cat(cls, 1), torch.cat(patches))
        anchored, draft = True, student.draft
        if anchored or draft or args.neighbours or args.directions:     # the paper needs none of it
            y = torch.cat([student.whitened(encode(data.normalize(x, size))[:, 0])
                           for part in batches(20000)
                           for x in (part, *[part.flip(3)] * args.mirror)])
            neighbours = min(args.neighbours, len(y) // 10)
            for _ in range(args.rounds if neighbours else 0):
                y = student.draw_together(y, neighbours)
            if args.directions:
                y = student.project(y, args.directions)
            y = student.lengthen(y)
            if anchored:
                head.fit(y)
            if draft:
                draft.fit(y, neighbour_means(y, neighbours) if neighbours else y,
                          args.local_axes)


