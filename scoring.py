"""Scores of frozen features: DINO's weighted k-NN, the linear probe, and collapse figures of codes.

With u the L2-normalised features, class c gets from the k nearest images of the gallery

    votes(c) = sum_i  exp(<u_query, u_i> / 0.07) [y_i = c]             (DINO, eval_knn.py)

Discrete codes tie: hundreds of images have the same one-symbol code, so "the k nearest" is not a
set. Images tied at the k-th place each get the vote that breaking the tie at random would give them
on average, and classes with equal votes score the chance of a random pick. Gallery order is never
used. With more than k images to a code, k-NN is thus the majority of that code's images.
"""
import base64
import zlib

import torch
import torch.nn.functional as F

from progress import Progress

KS = (10, 20, 100, 200)         # DINO's four neighbourhood sizes
TIE = 1e-6                      # cosines closer than this tie: 10 times what float32 rounds them by
VOTE_TIE = 1e-9                 # so do votes, relative to the largest: they are sums in float64
CHUNK = 2**21                   # similarities held at a time: 8 MB, so that they stay in a cache,
MIN_QUERIES = 64                # but never fewer queries: a product of few rows is slow
L2_GRID = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)    # the linear probe's weight decays, strongest first

def checked_classes(train_x, train_y, test_x, test_y):
    """Labels of any kind -> (train_y, test_y, C), both in 0..C-1. Raises ValueError, see below."""
    if not len(train_x) or not len(test_x):
        raise ValueError("accuracy needs at least one train image and one test image")
    if not (train_x.isfinite().all() and test_x.isfinite().all()):
        raise ValueError("the features contain NaN or infinity (did training diverge?)")
    classes, y = torch.unique(torch.cat([train_y, test_y]), return_inverse=True)
    return y[: len(train_y)], y[len(train_y) :], len(classes)


def unique_entries(x, y):
    """Images with the same feature and the same class count as one entry with a size, which is
    exact and saves nearly all work for short codes. x (n, d), y (n,) below 2^24 -> float32
    features (E, d), labels (E,), entry of each image (n,), images in each entry (E,)."""
    rows, entry, size = torch.unique(torch.cat([x.float(), y[:, None].float()], 1), dim=0,
                                     return_inverse=True, return_counts=True)
    return rows[:, :-1], rows[:, -1].long(), entry, size


def expected_hits(scores, labels, m):
    """Chance that the label is among the m best scores when equal scores are ordered at random:
    scores (B, C), labels (B,) -> (B,) in 0..1, and 0 or 1 wherever the m-th place is not tied."""
    own = scores.gather(1, labels[:, None])
    gap = VOTE_TIE * scores.abs().amax(1, keepdim=True)
    better = (scores > own + gap).sum(1)
    equal = ((scores - own).abs() <= gap).sum(1)  # counts the label itself, so at least 1
    return ((m - better).double() / equal).clamp(0, 1)


def nearest_entries(similarity, sizes, k):
    """similarity (b, E), images in each entry (E,) -> (near, index), each (b, m), nearest first:
    all entries that hold the k nearest images or tie with the k-th of them. Cosines that tie are
    made equal, to the first of them, because rounding has set them apart."""
    m = k + k // 4 + 1
    while True:
        near, index = similarity.topk(min(m, len(sizes)))
        rank = torch.arange(near.shape[1], device=near.device).expand_as(index)
        is_first = near.diff(dim=1, prepend=near[:, :1]) < -TIE
        near = near.gather(1, rank.where(is_first, 0).cummax(1).values)
        kth = (sizes[index].cumsum(1) < k).sum(1, keepdim=True)     # (b, 1) the k-th image's entry
        if m >= len(sizes) or (near[:, -1:] < near.gather(1, kth)).all():
            return near, index
        m *= 2


def neighbour_votes(similarity, labels, sizes, classes, ks, temperature):
    """Yields the class votes (b, C) of the k nearest images for each k. similarity (b, E) to the
    gallery's entries, of labels (E,) and sizes (E,). Images strictly nearer than the k-th place
    vote fully; those tied at the k-th place share the places that are left, (places left) /
    (number tied) of a vote each."""
    near, index = nearest_entries(similarity, sizes, max(ks))       # (b, m)
    label, size = labels[index], sizes[index].double()
    weight = size * (near.double() / temperature).exp()             # of all images of an entry
    reached = size.cumsum(1)
    for k in ks:
        edge = near.gather(1, (reached < k).sum(1, keepdim=True))   # (b, 1) similarity at place k
        above, tied = near > edge, near == edge
        n_above, n_tied = ((size * x).sum(1, keepdim=True) for x in (above, tied))
        vote = weight * (above + tied * ((k - n_above) / n_tied))
        yield vote.new_zeros(len(vote), classes).scatter_add_(1, label, vote)


def knn_hits(train_x, train_y, test_x, test_y, ks=KS, temperature=0.07):
    """DINO's weighted k-NN for several k in one pass: {k: (m, 2) float64}, the chance in 0..1 that
    each query's class is the first, and that it is among the first 5.
    train_x (n, d), test_x (m, d): features on any scale; similarities are float32, votes float64.
    Labels: any integers; with C < 5 classes top-5 is top-C. A k beyond the gallery lets the whole
    gallery vote. Equal to eval_knn.py when nothing ties. Where fewer than 5 classes got a vote,
    DINO fills its top 5 by class number; here the voteless classes tie, and share the places left.
    Raises ValueError for an empty part, and for features that are not finite.
    """
    train_y, test_y, classes = checked_classes(train_x, train_y, test_x, test_y)
    gallery, labels, _, sizes = unique_entries(train_x, train_y)
    queries, query_y, query, _ = unique_entries(test_x, test_y)
    gallery, queries = F.normalize(gallery, dim=1), F.normalize(queries, dim=1)
    clamped = [min(k, len(train_y)) for k in ks]
    rows = max(MIN_QUERIES, CHUNK // len(gallery))
    hits = [[] for _ in ks]
    with Progress("k-NN, queries", len(queries)) as progress:
        for x, y in zip(queries.split(rows), query_y.split(rows)):
            votes = neighbour_votes(x @ gallery.T, labels, sizes, classes, clamped, temperature)
            for of_k, v in zip(hits, votes):
                of_k.append(torch.stack([expected_hits(v, y, m) for m in (1, 5)], 1))
            progress.update(len(x))
    return {k: torch.cat(of_k)[query] for k, of_k in zip(ks, hits)}


def knn_accuracies(*args, **kwargs):
    """`knn_hits`' means over the queries: {k: (top1, top5)} in percent."""
    found = knn_hits(*args, **kwargs).items()
    return {k: tuple((100 * hits.mean(0)).tolist()) for k, hits in found}


def knn_accuracy(train_x, train_y, test_x, test_y, k, temperature=0.07):
    """(top1, top5) in percent for one k: see `knn_accuracies`."""
    return knn_accuracies(train_x, train_y, test_x, test_y, (k,), temperature)[k]


def pack(hits):
    """hits (m,) in 0..1, `knn_hits` of m queries -> a short text for a JSON file: base64 of zlib of
    a byte per query, in percent."""
    return base64.b64encode(zlib.compress(bytes((100 * hits).round().int().tolist()))).decode()


def unpack(text):
    """`pack`'s text -> hits (m,) float64 in 0..1, to a percent."""
    return torch.tensor([*zlib.decompress(base64.b64decode(text))], dtype=torch.float64) / 100


def fit_logistic(x, y, share, l2, start, iterations):
    """Minimises sum_i share_i CE(W x_i + b, y_i) + l2/2 |W|^2 from start = (W (C, d), b (C,)); x
    (n, d), y (n,), share (n,) of sum 1 -> the new (W, b).
    L-BFGS on all rows: no learning rate, no noise, and the problem is convex. It works on W /
    scale, because where all classes are likely a column of variance v has curvature v / C + l2:
    columns that vary little would otherwise be learned last. It helps most on uncorrelated ones."""
    weight, bias = start
    scale = (share @ x.square() / len(bias) + l2).rsqrt()           # (d,)
    scaled, bias = (weight / scale).requires_grad_(), bias.clone().requires_grad_()
    solver = torch.optim.LBFGS([scaled, bias], max_iter=iterations, tolerance_change=1e-7,
                               tolerance_grad=1e-6, history_size=50, line_search_fn="strong_wolfe")
    progress = Progress(f"linear probe, weight decay {l2:g}, step", solver.defaults["max_eval"])

    def loss():
        solver.zero_grad()
        errors = F.cross_entropy(F.linear(x, scaled * scale, bias), y, reduction="none")    # (n,)
        value = share @ errors + l2 / 2 * (scaled * scale).square().sum()
        value.backward()
        progress.update()
        return value

    with torch.enable_grad(), progress:
        solver.step(loss)
    return scaled.detach() * scale, bias.detach()


def fit_probe(x, y, classes, grid=L2_GRID, iterations=25, seed=0):
    """Multinomial logistic regression on frozen features x (n, d) of any scale, one-hot symbols
    too, y (n,) in 0..classes-1 -> a differentiable function (m, d) -> logits (m, classes), and the
    weight decay it has. Our choices, because the paper names no solver: features standardised
    (columns that never vary are dropped) and turned to their principal axes, which changes neither
    loss nor penalty; the weight decay of `grid` with the lowest cross-entropy on a random tenth of
    the images, each fit starting from the one before; then three times the steps on all of them.
    """
    n = len(y)
    x, y, entry, size = unique_entries(x, y)
    share = size.float() / n                                        # (E,) of the images
    mean = share @ x
    std = (share @ (x - mean).square()).sqrt()
    varies = std > 1e-5 * x.abs().amax(0)       # more than float32's rounding of a constant
    x = (x - mean)[:, varies] / std[varies]
    axes = torch.linalg.eigh((share[:, None] * x).T @ x).eigenvectors
    x = x @ axes

    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    held, fitted = (entry[part.to(entry.device)].bincount(minlength=len(x)).float() / len(part)
                  for part in order.tensor_split([max(1, len(order) // 10)]))
    model, fits = (x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)), []
    for l2 in grid:
        model = fit_logistic(x, y, fitted, l2, model, iterations)
        error = held @ F.cross_entropy(F.linear(x, *model), y, reduction="none")
        fits.append((error.item(), l2, model))
    _, l2, model = min(fits, key=lambda fit: fit[0])    # equal ones: the earlier, stronger decay
    model = fit_logistic(x, y, share, l2, model, 3 * iterations)
    return lambda x: F.linear((x.float() - mean)[:, varies] / std[varies] @ axes, *model), l2


def linear_probe(train_x, train_y, test_x, test_y, **options):
    """`fit_probe` to the train part, with its options, scored once on the test part: (top1, top5)
    in percent. Raises ValueError as `knn_accuracies` does."""
    train_y, test_y, classes = checked_classes(train_x, train_y, test_x, test_y)
    scores = fit_probe(train_x, train_y, classes, **options)[0](test_x)             # (m, C)
    return tuple(100 * expected_hits(scores, test_y, m).mean().item() for m in (1, 5))


def code_figures(ids, vocab):
    """Collapse figures of ids (n, T) in 0..vocab-1. perplexity: T floats in 1..vocab, exp of the
    entropy of each position's histogram; codebook_usage: share of the vocabulary in use at any
    position; unique_codes: different sequences / images."""
    histogram = torch.stack([column.bincount(minlength=vocab) for column in ids.T])  # (T, K)
    entropy = torch.special.entr(histogram.double() / len(ids)).sum(1)  # (T,)
    return {"perplexity": entropy.exp().tolist(),
            "codebook_usage": (histogram.sum(0) > 0).double().mean().item(),
            "unique_codes": len(torch.unique(ids, dim=0)) / len(ids)}
