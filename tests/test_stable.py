"""Known answers for stable.py: planted clusters, planted views, sums and residuals by hand."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import discretize
import stable
from conftest import make_student

B, N, D, T, K = 16, 5, 32, 8, 6
FLAGS = "--recipe", "stable"


def close(a, b, tolerance=1e-5):
    return torch.allclose(a, b, atol=tolerance, rtol=0)


class Planted(torch.nn.Module):
    """A module that returns planted values in turn and keeps what it was called with."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs, self.inputs = list(outputs), []

    def forward(self, x, *rest):
        self.inputs.append(x)
        return self.outputs[len(self.inputs) - 1]


# ---- the networks' differences -------------------------------------------------------------------

@torch.no_grad()
def test_the_discretizer_sees_the_cls_less_the_codewords_so_far(monkeypatch):
    """With planted predictions and planted codewords."""
    student = make_student(*FLAGS)
    cls_preds, codewords = torch.randn(T, B, D), torch.randn(T, B, D)
    discs = [Planted(discretize.Quantized(torch.ones(B, 1), e, torch.zeros(B).long(),
                                          torch.zeros(()), torch.zeros(B, 1))) for e in codewords]
    monkeypatch.setattr(student, "disc", torch.nn.ModuleList(discs))
    monkeypatch.setattr(student.descriptor, "cls_head", Planted(*cls_preds))
    sequence = student.describe(torch.randn(B, N + 1, D))
    for t in range(T):
        h, = discs[t].inputs
        assert close(h, cls_preds[t] - codewords[:t].sum(0))
    assert torch.equal(sequence.cls_pred, cls_preds.transpose(0, 1))
    assert torch.equal(sequence.embeddings, codewords.transpose(0, 1))


@torch.no_grad()
def test_the_descriptor_of_patches_cannot_see_the_cls_it_predicts():
    student, z_t = make_student(*FLAGS, "--memory", "patches"), torch.randn(B, N + 1, D)
    other = z_t.clone()
    other[:, 0] += 5
    a, b = student.describe(z_t, attention=True), student.describe(other, attention=True)
    assert all(x is y is None or torch.equal(x, y) for x, y in zip(a, b))
    other[:, 3] += 5                                                        # a patch
    assert not close(student.describe(other).cls_pred, a.cls_pred, 1e-2)
    student, other = make_student(*FLAGS), z_t.clone()                      # of all tokens it can
    other[:, 0] += 5
    a, b = student.describe(z_t, attention=True), student.describe(other, attention=True)
    assert not close(a.cls_pred, b.cls_pred, 1e-2) and a.attention.shape == b.attention.shape


@pytest.mark.parametrize("disc", list(discretize.DISCRETIZERS))
def test_no_gradient_passes_from_a_position_through_earlier_codewords(disc):
    student = make_student(*FLAGS, "--disc", disc)
    sequence = student.describe(torch.randn(B, N + 1, D))
    sequence.logits[:, 3, 0].sum().backward(retain_graph=True)
    touched = [any(p.grad is not None and p.grad.any() for p in d.parameters())
               for d in student.disc]
    assert touched == [t == 3 for t in range(T)]
    student.zero_grad()
    sequence.embeddings[:, 0].sum().backward()              # the interpreter's gradient does pass
    learned = student.disc[0].codebook if disc != "vq" else student.descriptor.cls_head.weight
    assert learned.grad.abs().sum() > 0


@torch.no_grad()
def test_interpret_is_the_sum_of_codewords_and_a_correction():
    student, e = make_student(*FLAGS), torch.randn(B, T, D)
    correction = student.interpreter(e)
    for j, n in enumerate((1, 2, 4, 8)):
        assert close(student.interpret(e)[:, j], e[:, :n].sum(1) + correction[:, j])
    assert correction.std() > 0.1
    student.interpreter.out.weight.zero_()                                  # as it starts
    student.interpreter.out.bias.zero_()
    assert close(student.interpret(e), e.cumsum(1)[:, [0, 1, 3, 7]])


def test_each_position_has_a_codebook_and_embed_reads_it():
    student, ids = make_student(*FLAGS), torch.randint(K, (B, T))
    embeddings = student.embed(ids)
    for b, t in ((0, 0), (3, 1), (5, 7)):
        assert torch.equal(embeddings[b, t], student.disc[t].codebook[ids[b, t]])
    assert not torch.equal(student.disc[0].codebook, student.disc[1].codebook)


@pytest.mark.parametrize("disc, count", [("softmax", 3), ("gumbel", 3), ("vq", 1)])
def test_the_codebooks_are_what_learns_slowly(disc, count):
    student = make_student(*FLAGS, "--disc", disc)
    slow = {id(p) for p in student.slow_parameters()}
    assert len(slow) == count * T and slow == {id(p) for p in student.disc.parameters()}


@torch.no_grad()
def test_preprocess_by_hand():
    student, z_t = make_student(*FLAGS), torch.randn(B, N + 1, D)
    student.mean.normal_(), student.std.uniform_(0.5, 2), student.whiten.normal_()
    out = student.preprocess(z_t)
    assert close(out[:, 1:], (z_t[:, 1:] - student.mean[1]) / student.std)
    cls = torch.einsum("bd,de->be", z_t[:, 0] - student.mean[0], student.whiten)
    assert close(out[:, 0], cls / cls.square().mean(1, keepdim=True).sqrt(), 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(student.preprocess(z_t), out)


def test_extra_loss_by_hand():
    """Errors of 1 and 0 in prefixes 1 and 2, of 2, 0, 0, 0 in the four predictions."""
    student, cls = make_student(*FLAGS, "--regression", "3"), torch.randn(B, 1, D)
    z_t = torch.cat([cls, torch.randn(B, N, D)], 1)
    sequence = SimpleNamespace(cls_pred=torch.cat([cls - 2, cls, cls, cls], 1))
    loss = student.extra_loss(sequence, torch.cat([cls + 1, cls], 1), z_t)
    assert loss.item() == pytest.approx(3 * (1 / 2 + 4 * (4 / 4)), rel=1e-5)


def test_teacher_and_student_share_prototypes_that_nothing_moves():
    student = make_student(*FLAGS)
    assert student.projector is student.teacher_projector
    assert list(student.projector.parameters()) == []
    assert not hasattr(student.projector, "prototypes")         # nothing to rest in the first epoch


@pytest.mark.parametrize("flags", ["--neighbours -1", "--iterations -1", "--components -1",
                                   "--codebook-lr -1", "--regression -1"])
def test_numbers_below_0_are_refused(flags):
    with pytest.raises(ValueError, match=f"{flags.split()[0]} must not be below 0, and is -1"):
        make_student(*FLAGS, *flags.split())


# ---- k-means and whitening -----------------------------------------------------------------------

def test_k_means_by_hand():
    x = torch.tensor([[0.0], [1.0], [10.0], [12.0]])
    # From any two of the four points, Lloyd's algorithm ends in these two means
    assert sorted(stable.kmeans(x, 2).flatten().tolist()) == [0.5, 11.0]
    with pytest.raises(ValueError, match="k-means of 4 images cannot have 5 centroids; lower"):
        stable.kmeans(x, 5)


def test_k_means_finds_separated_clusters():
    """32 centroids for 4 clusters: each cluster has some, and none lies between clusters."""
    planted = torch.tensor([[0.0, 0.0], [20.0, 0.0], [0.0, 20.0], [20.0, 20.0]])
    centroids = stable.kmeans(planted.repeat(200, 1) + 0.1 * torch.randn(800, 2), 32)
    distance = torch.cdist(centroids, planted)                              # (32, 4)
    assert distance.min(1).values.max() < 0.5 and distance.min(0).values.max() < 0.5


def test_nearest_centroid_is_the_argmin_of_distances():
    x, centroids = torch.randn(4500, D), torch.randn(K, D)                  # in three chunks
    nearest = stable.nearest_centroid(x, centroids)
    assert torch.equal(nearest, torch.cdist(x, centroids).argmin(1)) and len(nearest.unique()) == K


def test_whitening_makes_the_covariance_the_identity():
    x = torch.randn(500, D) @ torch.randn(D, D)
    matrix = stable.whitening(x, 0)
    y = x @ matrix
    assert close(y.T @ y / len(y), torch.eye(D), 1e-2) and close(matrix, matrix.T, 1e-4)
    variance = torch.linalg.eigvalsh(x.T @ x / len(x))
    ridged = x @ stable.whitening(x, 0.5)                                   # v / (v + ridge max v)
    assert close(torch.linalg.eigvalsh(ridged.T @ ridged / len(x)),
                 variance / (variance + 0.5 * variance.max()), 1e-3)


def test_neighbour_means_leave_an_image_itself_out():
    y = torch.tensor([[0.0], [1], [3], [7], [1000]])
    expected = torch.tensor([[2.0], [1.5], [0.5], [2], [5]])
    assert torch.equal(stable.neighbour_means(y, 2, 5), expected)
    assert torch.equal(stable.neighbour_means(y, 2, 3), expected[:3])


def test_match_codewords_orders_by_direction():
    directions, shuffled = torch.randn(20, D), torch.randperm(20)
    scaled = directions * torch.linspace(0.1, 9, 20)[:, None] + 0.01 * torch.randn(20, D)
    assert torch.equal(stable.match_codewords(directions, scaled[shuffled]), scaled)
    tied = torch.eye(D)[:1].expand(4, -1)       # all alike, or of no direction: each once
    for others in (tied, 0 * tied, torch.randn(4, D)):
        matched = stable.match_codewords(tied, others)
        assert torch.equal(matched.sort(0).values, others.sort(0).values)


def test_prototypes_are_the_planted_clusters():
    # From any two of these, Lloyd's algorithm ends in the two clusters
    x = torch.tensor([[3.0, 0], [3.2, 0.2], [-2, 1], [-2, -1], [-2.3, 0]])
    prototypes = stable.KMeansPrototypes(2, 2)
    prototypes.fit(x)
    logits, c = prototypes(x), torch.stack([x[:2].mean(0), x[2:].mean(0)])
    expected = x @ c.T / ((c[0] @ c[0] + c[1] @ c[1]) / 2)
    assert close(logits, expected) or close(logits, expected.flip(1))       # in any order
    # of the cluster's own, about 1 as a cosine would be
    assert close(logits.max(1).values.mean(), torch.tensor(1.0), 0.1)
    assert (logits.min(1).values < 0).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prototypes(x), logits)


# ---- fit -----------------------------------------------------------------------------------------

def fitted(cls, views=None, *flags, patches=None):
    """A student fitted to CLS tokens (n, D) and augmented views of them (2, n, D); what `encode`
    was requested."""
    views = views if views is not None else cls + torch.randn(2, *cls.shape)
    patches = patches if patches is not None else torch.randn(len(cls), N, D)
    student, calls, augmented_views = make_student(*FLAGS, *flags), [], iter(views)

    def encode(n, augmented=False):
        calls.append((n, augmented))
        y = next(augmented_views) if augmented else cls
        return torch.cat([y[:, None], patches], 1)[:n].split(300)
    student.fit(encode)
    return student, calls


def space(student, cls):
    """cls (n, D) in the student's space."""
    return student.preprocess(torch.cat([cls[:, None], torch.zeros(len(cls), N, D)], 1))[:, 0]


def test_fit_holds_the_cls_and_some_patches_of_a_stream_of_tokens():
    z_t = torch.randn(50, 1 + N, D)
    for images in (0, 12, 20, 50):
        cls, patches = stable.cls_and_patches(z_t.split(8), 70, images)
        assert torch.equal(cls, z_t[:, 0]) and torch.equal(patches, z_t[:images, 1:].flatten(0, 1))
        assert cls.untyped_storage().nbytes() == 4 * 70 * D


def test_fit_whitens_what_augmentation_moves():
    """Planted: images differ in all dimensions, views in the first half ten times as much as in the
    second."""
    moves = torch.cat([torch.full((D // 2,), 1.0), torch.full((D // 2,), 0.1)])
    images = 5 + 3 * torch.randn(2000, D)
    views, patches = images + moves * torch.randn(2, 2000, D), 9 * torch.randn(2000, N, D) - 2
    student, calls = fitted(images, views, "--neighbours", "0", "--components", "0",
                            patches=patches)
    assert calls == [(stable.WITHIN_IMAGES, True)] * 2 + [(stable.FIT_IMAGES, False)]
    transformed = lambda x: (x - student.mean[0]) @ student.whiten          # noqa: E731
    within = (transformed(views[0]) - transformed(views[1])).std(0)
    assert within[:D // 2].std() < 0.05 * within.mean()         # all that moves, moves alike
    # The ridge is a hundredth of the largest variance, and so are the small ones: half of them
    assert within[D // 2:].mean() / within[:D // 2].mean() == pytest.approx(0.5**0.5, rel=0.05)
    between = transformed(images).std(0)                        # and what does not move counts
    assert between[D // 2:].mean() / between[:D // 2].mean() == pytest.approx(50**0.5, rel=0.05)
    out = student.preprocess(torch.cat([images[:, None], patches], 1))
    assert close(out[:, 0].square().mean(1), torch.ones(2000), 1e-4)
    assert close(out[:500, 1:].mean((0, 1)), torch.zeros(D), 1e-4)          # fitted to 500 images
    assert close(out[:500, 1:].std((0, 1)), torch.ones(D), 1e-3)


def test_fit_of_views_that_do_not_move_is_finite():
    cls = torch.randn(80, D)
    student, _ = fitted(cls, cls.expand(2, -1, -1), patches=torch.zeros(80, N, D))
    assert all(value.isfinite().all() for value in student.state_dict().values())


def test_neighbours_shrink_what_varies_among_them():
    """Planted: four classes that differ in two directions, and noise as large in all others."""
    classes = torch.arange(800) % 4
    y = 0.5 * torch.randn(800, D)
    y[:, 0] = classes % 2 * 2 - 1 + 0.1 * torch.randn(800)
    y[:, 1] = classes // 2 * 2 - 1 + 0.1 * torch.randn(800)

    def within(flags):                                          # share of the variance
        x = space(fitted(y, None, "--components", "0", *flags)[0], y)
        means = torch.stack([x[classes == c].mean(0) for c in range(4)])
        return ((x - means[classes]).square().sum() / (x - x.mean(0)).square().sum()).item()
    without, once, often = (within(flags) for flags in (
        ("--neighbours", "0"), ("--neighbours", "20", "--iterations", "1"),
        ("--neighbours", "20", "--iterations", "3")))
    assert often < once < 0.8 * without


def test_components_are_the_directions_in_which_images_differ_most():
    """Planted: three directions with a deviation of 3 to 1, the others with 0.1."""
    axes = torch.linalg.qr(torch.randn(D, D)).Q
    large = torch.cat([torch.tensor([3.0, 2.0, 1.0]), torch.full((D - 3,), 0.1)])
    y = torch.randn(1000, D) * large @ axes.T
    student, _ = fitted(y, None, "--neighbours", "0", "--components", "3")
    assert torch.linalg.matrix_rank(student.whiten, rtol=1e-4) == 3
    x = space(student, y)
    outside = (x @ axes[:, 3:]).square().mean() / x.square().mean()
    assert outside < 0.01


@torch.no_grad()
@pytest.mark.parametrize("disc", list(discretize.DISCRETIZERS))
def test_hard_symbols_of_the_cls_itself_are_residual_k_means(disc, monkeypatch):
    """The decoder's prediction is replaced by the CLS that the codebooks were fitted to."""
    cls = 5 * torch.randn(12, D).repeat_interleave(20, 0) + torch.randn(240, D)
    student, _ = fitted(cls, None, "--disc", disc)
    y = space(student, cls)
    monkeypatch.setattr(student.descriptor, "cls_head", Planted(*[y] * T))
    z_t = torch.randn(240, N + 1, D)
    sequence = student.describe(z_t, hard=True)
    residual, moved = y, 0
    for t in range(T):
        codebook = student.disc[t].codebook
        nearest = torch.cdist(residual, codebook).argmin(1)
        assert torch.equal(sequence.ids[:, t], nearest) and len(nearest.unique()) == K
        means = torch.stack([residual[nearest == k].mean(0) for k in range(K)])
        moved += (means - codebook).abs().max()                 # a fixed point of Lloyd's algorithm
        residual = residual - codebook[nearest]
    assert moved < 0.2 and close(y - sequence.embeddings.sum(1), residual, 1e-4)
    errors = [(y - sequence.embeddings[:, :n].sum(1)).square().mean() for n in range(T + 1)]
    assert all(a > b for a, b in zip(errors, errors[1:])) and errors[-1] < 0.5 * errors[0]


@torch.no_grad()
def test_a_symbol_points_the_same_way_at_every_position():
    """Planted: four directions; one is large in an image, and a second one small."""
    axes = torch.linalg.qr(torch.randn(D, D)).Q[:4]
    pairs = (3 * axes[:, None] + axes).flatten(0, 1)                        # (16, D)
    y = pairs.repeat(10, 1) + 1e-4 * torch.randn(160, D)
    best = 0
    for _ in range(20):                                             # k-means may start badly
        student = make_student(*FLAGS, "--vocab", "4", "--length", "2")
        student.fit_codebooks(y)
        first, second = (F.normalize(d.codebook, dim=1) for d in student.disc)
        best = max(best, (first * second).sum(1).min().item())
    assert best > 0.5                               # of pairs that do not belong together: below 0
