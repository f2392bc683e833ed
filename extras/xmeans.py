"""X-means: k-means that finds its number of clusters by BIC (Pelleg and Moore 2000).

    BIC = sum_n R_n ln(R_n / R) - (R M / 2) ln(2 pi v) - M (R - K) / 2 - (K (M + 1) / 2) ln R

of R points of M dimensions in K clusters of R_n points; v = SSE / (M (R - K)), one variance for all
clusters. A cluster is split where two centroids have the larger BIC on its points alone. For
extras/trust.py --xmeans, whose source clusters hidden layers in this way.
"""
import math

import torch

import stable

MOST = 1000                         # clusters (the source's)


def bic(x, centroids, nearest):
    """BIC of the clustering of x (R, M) by K centroids: spherical Gaussians of one variance. -inf
    where K >= R."""
    (r, m), k = x.shape, len(centroids)
    if k >= r:
        return -math.inf
    variance = (x - centroids[nearest]).square().sum() / (m * (r - k))
    size = nearest.bincount(minlength=k).double()
    return (torch.xlogy(size, size / r).sum() - r * m / 2 * (2 * math.pi * variance + 1e-30).log()
            - m * (r - k) / 2 - k * (m + 1) / 2 * math.log(r)).item()


def halves(x):
    """x (R, M) -> the centroids of its two halves where the BIC prefers them to one, else None."""
    if len(x) < 4:
        return None
    one, two = x.mean(0, keepdim=True), stable.kmeans(x, 2)
    gain = bic(x, two, stable.nearest_centroid(x, two)) - bic(x, one, torch.zeros(len(x)).long())
    return two if gain > 0 else None


def xmeans(x, start=2, most=MOST):
    """x (n, M) -> (K, M) float64 centroids: k-means, then each cluster is split in two where the
    BIC of its points prefers that, until none is, or there are `most`. start: clusters to begin
    with (from 1, a first split that local 2-means gets wrong would be the end)."""
    x = x.double()
    centroids = stable.kmeans(x, start)
    while True:
        nearest, parts, room = stable.nearest_centroid(x, centroids), [], most - len(centroids)
        for k in range(len(centroids)):
            pair = halves(x[nearest == k]) if room > 0 else None
            room -= pair is not None
            parts.append(centroids[k:k + 1] if pair is None else pair)
        if sum(map(len, parts)) == len(centroids):
            return centroids
        centroids = torch.cat(parts)
        centroids = stable.kmeans(x, len(centroids), start=centroids)


def fit(pooled):
    """Features (n, d) -> a function from features (m, d) to symbols (m, 1), and their number."""
    mean = pooled.mean(0)
    axes = torch.linalg.svd(pooled - mean, full_matrices=False).Vh[:3].T            # (d, 3): PCA
    centroids = xmeans((pooled - mean) @ axes)

    def symbols(x):
        return stable.nearest_centroid(((x - mean) @ axes).double(), centroids)[:, None]
    return symbols, len(centroids)
