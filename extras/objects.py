"""Measures of scenes with several objects: segmentation, binding, order. It has no command;
extras.measures, extras.slots and extras.sentences use it.

n images, K objects at most, T symbols (or slots), N patches. masks (n, H, W): k on object k, from
1, 0 on the background; maps (n, T, N): attention over the patches; factors {name: (n, K) int64},
-1 where there is no such object.
"""
import math

import torch
import torch.nn.functional as F


def object_cover(masks, patches):
    """-> (n, K, N) float, the share of each patch that each object covers, 0 to 1."""
    each = masks[:, None] == torch.arange(1, int(masks.max()) + 1)[:, None, None]
    return F.adaptive_avg_pool2d(each.float(), math.isqrt(patches)).flatten(2)


# ---- segmentation --------------------------------------------------------------------------------

def segment(maps, side):
    """-> (n, side, side) int64 in 0..T-1: the symbol that attends most to the pixel, from maps that
    are enlarged bilinearly, as DINOSAUR does. On `scenes` at patches of 4 pixels, maps that are the
    objects' covers, three times as high, and one of the rest for the background, get a FG-ARI of
    0.97 and a mBO of 0.62. Without a map for the background, segments reach beyond objects."""
    grid = math.isqrt(maps.shape[2])
    maps = maps.float().unflatten(2, (grid, grid))
    return F.interpolate(maps, (side, side), mode="bilinear").argmax(1)


def contingency(masks, segments):
    """-> (n, 1 + K, S) float64: how many pixels lie on object k (0: background) and in segment s.
    segments (n, H, W) int64 from 0."""
    n, rows, columns = len(masks), int(masks.max()) + 1, int(segments.max()) + 1
    cells = (torch.arange(n)[:, None, None] * rows + masks.long()) * columns + segments
    return cells.flatten().bincount(minlength=n * rows * columns).view(n, rows, columns).double()


def foreground_ari(masks, segments):
    """FG-ARI, mean over images: the adjusted Rand index (Hubert and Arabie 1985) of objects and
    segments over the pixels of objects, as Greff et al. (2019) and DINOSAUR report it. 1: equal
    partitions; 0 in expectation for random ones. A single object in one segment counts as 1."""
    counts = contingency(masks, segments)[:, 1:]                                # (n, K, S)
    pairs = lambda x: x * (x - 1) / 2                                           # noqa: E731
    both, a, b, all_ = (pairs(counts).sum((1, 2)), pairs(counts.sum(2)).sum(1),
                        pairs(counts.sum(1)).sum(1), pairs(counts.sum((1, 2))))
    expected, most = a * b / all_.clamp(min=1), (a + b) / 2
    equal = most == expected                    # both partitions trivial
    return torch.where(equal, 1.0, (both - expected) / (most - expected)).mean().item()


def best_overlap(masks, segments):
    """mBO in 0..1: for each object the largest intersection over union with a segment, the mean
    over all objects of all images (Pont-Tuset et al. 2017; DINOSAUR). The background is none."""
    counts = contingency(masks, segments)
    objects, areas = counts[:, 1:], counts.sum(1)[:, None]                      # (n, 1, S)
    union = objects.sum(2, keepdim=True) + areas - objects
    best = (objects / union.clamp(min=1)).amax(2)                               # (n, K)
    return best[objects.sum(2) > 0].mean().item()


# ---- which object a symbol is about --------------------------------------------------------------

def attended_object(maps, cover):
    """-> (n, T) int64 in 0..K-1: the object with more of the symbol's attention than any other, be
    it little."""
    return torch.einsum("ntp,nkp->ntk", maps, cover).argmax(2)


def another_object(attended, present):
    """A random other object of the same image, for each symbol: attended (n, T), present (n, K)
    bool with two objects or more in each row -> (n, T)."""
    u = torch.rand(*attended.shape, present.shape[1]) * present[:, None]
    return u.scatter(2, attended[..., None], -1.0).argmax(2)


def lift_table(ids, values, vocab, number, prior=1.0):
    """lift[t, s, v] = P(v | symbol s at position t) / P(v at position t): ids (n, T), values (n, T)
    in 0..number-1 -> (T, vocab, number). The estimate of P(v | s) has `prior` more observations
    that are distributed as P(v), so that a rare symbol has a lift near 1."""
    t = torch.arange(ids.shape[1])
    cells = ((t * vocab + ids) * number + values).flatten()
    counts = cells.bincount(minlength=ids.shape[1] * vocab * number).double()
    counts = counts.view(-1, vocab, number)
    base = counts.sum(1, keepdim=True) / len(ids)                               # (T, 1, V)
    given = (counts + prior * base) / (counts.sum(2, keepdim=True) + prior)
    return torch.where(base > 0, given / base.clamp(min=1e-12), 1.0)


def binding(ids, attended, factors, vocab):
    """Whether a symbol goes with the object that it attends to: {factor: {"attended": (T,),
    "another": (T,)}}: mean lift of the symbol for the factor's value of the attended object, and
    for that of another object of the same image. The lifts come from the images of even index, the
    means are of the others. 1: the symbol does not depend on it; at most the number of values."""
    rows, other = {}, another_object(attended, next(iter(factors.values())) >= 0)
    positions, odd = torch.arange(ids.shape[1]), slice(1, None, 2)
    for name, values in factors.items():
        own = values.gather(1, attended)                                        # (n, T)
        table = lift_table(ids[::2], own[::2], vocab, int(values.max()) + 1)
        lift = lambda v: table[positions, ids[odd], v[odd]].mean(0)             # noqa: E731
        rows[name] = {"attended": lift(own), "another": lift(values.gather(1, other))}
    return rows


def attends_largest(attended):
    """Share of images in which the symbol attends most to the largest object, which is the first
    one: (n, T) -> (T,)."""
    return (attended == 0).double().mean(0)
