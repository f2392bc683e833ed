"""Known answers for scoring.py: votes, ties and figures that one can check by hand."""
import pytest
import torch
import torch.nn.functional as F

import scoring
from evaluate import one_hot


def angles(*degrees):
    """Unit vectors in the plane: their cosine similarity to 0 degrees is cos(angle)."""
    turn = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([turn.cos(), turn.sin()], 1)


def noisy_classes(n, m, classes, d=16, spread=1.0, seed=0):
    """n train and m test points around one random mean per class: (x, y, x_test, y_test)."""
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, d, generator=g)
    y = torch.randint(classes, (n + m,), generator=g)
    x = means[y] + spread * torch.randn(n + m, d, generator=g)
    return x[:n], y[:n], x[n:], y[n:]


def codes(n, m, vocab=7, classes=6, seed=0):
    """Discrete features: the embedding of one of `vocab` symbols, which hints at the class."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n + m,), generator=g)
    symbol = (y + torch.randint(3, (n + m,), generator=g)) % classes
    symbol += classes * torch.randint(vocab // classes, (n + m,), generator=g)
    x = torch.randn(vocab, 12, generator=g)[symbol]
    return x[:n], y[:n], x[n:], y[n:]


# ---- weighted k-NN ---------------------------------------------------------------------------


@pytest.mark.parametrize("k", [20, 100, 200])
def test_knn_equals_dinos_formula_on_continuous_features(k):
    x, y, test_x, test_y = noisy_classes(1500, 300, classes=5, d=8, spread=2.5)
    near, index = (F.normalize(test_x, dim=1) @ F.normalize(x, dim=1).T).topk(k)
    votes = torch.einsum("bk,bkc->bc", (near / 0.07).exp(), F.one_hot(y[index], 5).float())
    top1 = 100 * (votes.argmax(1) == test_y).double().mean().item()
    got = scoring.knn_accuracy(x, y, test_x, test_y, k)
    assert 30 < top1 < 90  # a test that means something: neither chance nor saturated
    assert got == pytest.approx((top1, 100.0), abs=1e-9)


def test_knn_top5_equals_dinos_where_five_classes_got_votes():
    x, y, test_x, test_y = noisy_classes(2000, 200, classes=20, d=6, spread=2.5)
    near, index = (F.normalize(test_x, dim=1) @ F.normalize(x, dim=1).T).topk(200)
    votes = torch.einsum("bk,bkc->bc", (near / 0.07).exp(), F.one_hot(y[index], 20).float())
    assert ((votes > 0).sum(1) >= 5).all()
    top5 = 100 * (votes.topk(5).indices == test_y[:, None]).any(1).double().mean().item()
    assert 40 < top5 < 95
    assert scoring.knn_accuracy(x, y, test_x, test_y, 200)[1] == pytest.approx(top5, abs=1e-9)


def test_knn_of_four_points_by_hand():
    # Similarities 0.9848, 0.9397, 0.8660, 0.7660; weights at temperature 1: 2.68, 2.56, 2.38, 2.15.
    x, y = angles(10, 20, 30, 40), torch.tensor([7, 3, 3, 7])
    query, three = angles(0), torch.tensor([3])
    top1 = {k: scoring.knn_accuracy(x, y, query, three, k, temperature=1.0)[0] for k in (1, 3, 4)}
    assert top1 == {1: 0.0, 3: 100.0, 4: 100.0}  # 3: 2.56 + 2.38 > 2.68; 4: 4.94 > 4.83
    # At 0.07 the nearest one alone outweighs the two of class 3: e^14.07 > e^13.42 + e^12.37.
    assert scoring.knn_accuracy(x, y, query, three, 3)[0] == 0.0


def test_tied_neighbours_share_the_places_that_are_left():
    # k = 2: the nearest (class 0) votes fully, three tie for the one place left. At temperature
    # 1e3 every vote weighs the same within 0.1 %: class 0 has 1 + 1/3, class 1 has 2/3.
    similarity = angles(0) @ angles(10, 30, 30, 30).T
    labels = torch.tensor([0, 0, 1, 1])
    (votes,) = scoring.neighbour_votes(similarity, labels, torch.ones(4).long(), 2, [2], 1e3)
    assert votes[0].tolist() == pytest.approx([4 / 3, 2 / 3], rel=2e-3)


def test_tied_classes_score_the_expected_value_of_a_coin():
    # The same code, one vote each for classes 0, 1, 2: the label is first with chance 1/3.
    x, y = angles(5, 5, 5), torch.tensor([0, 1, 2])
    for label in (0, 1, 2):
        top1, top5 = scoring.knn_accuracy(x, y, angles(0), torch.tensor([label]), 3)
        assert top1 == pytest.approx(100 / 3) and top5 == 100.0
    # Six classes: one voted, five share the four places left of the top 5.
    x, y = angles(5, 90, 91, 92, 93, 94), torch.arange(6)
    assert scoring.knn_accuracy(x, y, angles(0), torch.tensor([4]), 1)[1] == pytest.approx(80.0)


def brute_force(x, y, test_x, test_y, k, classes, temperature=0.07):
    """(top1, top5) in percent by the definition, an image at a time, in float64: whoever ties with
    the k-th neighbour shares the places left, equal votes share the places of the top 5."""
    x, test_x = F.normalize(x.double(), dim=1), F.normalize(test_x.double(), dim=1)
    hits = torch.zeros(2)
    for query, label in zip(test_x, test_y):
        cosine = x @ query
        edge = cosine.sort(descending=True).values[k - 1]
        above, tied = cosine > edge + 1e-9, (cosine - edge).abs() < 1e-9
        share = above + tied * (k - above.sum()) / tied.sum()
        votes = torch.stack([(share * (cosine / temperature).exp())[y == c].sum()
                             for c in range(classes)])
        votes = votes / votes.max()
        better = (votes > votes[label] + 1e-9).sum()
        equal = ((votes - votes[label]).abs() < 1e-9).sum()
        hits += torch.stack([((m - better) / equal).clamp(0, 1) for m in (1, 5)])
    return tuple((100 * hits / len(test_y)).tolist())


@pytest.mark.parametrize("k", [1, 7, 60])
@pytest.mark.parametrize("vocab", [6, 30])
def test_knn_of_codes_equals_brute_force(vocab, k):
    parts = codes(200, 60, vocab)
    assert scoring.knn_accuracy(*parts, k) == pytest.approx(brute_force(*parts, k, 6), abs=1e-4)


def test_knn_of_continuous_features_equals_brute_force():
    parts = noisy_classes(200, 60, classes=6, spread=2.0)
    assert scoring.knn_accuracy(*parts, 7) == pytest.approx(brute_force(*parts, 7, 6), abs=1e-4)


def test_knn_of_one_hot_codes_that_tie_beyond_the_first_topk_equals_brute_force():
    # 3 of 4 symbols: cosines 0, 1/3, 2/3, 1 only, so far more entries tie with the k-th than k
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(4, (260, 3), generator=g)
    y = (ids.sum(1) + torch.randint(2, (260,), generator=g)) % 6
    x = one_hot(ids, 4)
    parts = x[:200], y[:200], x[200:], y[200:]
    assert scoring.knn_accuracy(*parts, 4) == pytest.approx(brute_force(*parts, 4, 6), abs=1e-4)


def test_votes_are_the_average_over_random_tie_breaks():
    # Two entries of 3 and 5 images tie for the 4 places left after the nearest: of many random
    # orders, half of the tied images get in.
    similarity = angles(0) @ angles(10, 30, 30).T
    (votes,) = scoring.neighbour_votes(similarity, torch.tensor([0, 0, 1]), torch.tensor([1, 3, 5]),
                                       2, [5], temperature=1e6)
    assert votes[0].tolist() == pytest.approx([1 + 3 / 2, 5 / 2], rel=1e-4)


def test_images_of_one_feature_and_class_become_one_entry():
    x = torch.tensor([[1.0, 2], [3, 4], [1, 2], [1, 2]])
    features, labels, entry, size = scoring.unique_entries(x, torch.tensor([5, 0, 5, 6]))
    assert features.tolist() == [[1, 2], [1, 2], [3, 4]] and labels.tolist() == [5, 6, 0]
    assert entry.tolist() == [0, 2, 0, 1] and size.tolist() == [2, 1, 1]


def test_neither_gallery_order_nor_class_numbers_matter_for_codes():
    x, y, test_x, test_y = codes(400, 150)
    before = scoring.knn_accuracies(x, y, test_x, test_y, (1, 10, 100))
    by_class, names = y.argsort(), torch.tensor([40, -3, 900, 1, 2, 0])
    for order in (by_class, by_class.flip(0), torch.arange(400).flip(0)):
        after = scoring.knn_accuracies(x[order], names[y[order]], test_x, names[test_y],
                                       (1, 10, 100))
        for k in before:
            assert after[k] == pytest.approx(before[k], abs=1e-9)
    # the check can fail: topk with its own tie-break does depend on the order
    similarity = F.normalize(test_x, dim=1) @ F.normalize(x, dim=1).T
    naive = [(y[o][similarity[:, o].topk(1).indices[:, 0]] == test_y).sum() for o in
             (by_class, by_class.flip(0))]
    assert naive[0] != naive[1]


def test_ties_by_matching_symbols_survive_rounding():
    # One-hot sequences: similarity = matching symbols / 3, equal only up to rounding in places.
    g = torch.Generator().manual_seed(0)
    x, test_x = (one_hot(torch.randint(4, (n, 3), generator=g), 4) for n in (300, 80))
    y, test_y = (torch.randint(6, (n,), generator=g) for n in (300, 80))
    scale = torch.rand(300, 1, generator=g) + 0.5  # normalising takes it out, and leaves rounding
    plain, scaled = (scoring.knn_accuracy(part, y, test_x, test_y, 10)
                     for part in (x, x.double() * scale))
    assert scaled == pytest.approx(plain, abs=1e-9)


def test_all_ks_in_one_pass_equal_one_k_at_a_time():
    for data in (codes(300, 90, vocab=50), noisy_classes(300, 90, classes=7, d=4, spread=2.0)):
        together = scoring.knn_accuracies(*data, ks=(60, 1, 9))
        assert together == {k: pytest.approx(scoring.knn_accuracy(*data, k), abs=1e-9)
                            for k in together}
        assert len({top1 for top1, _ in together.values()}) == 3  # it matters which k


def test_chunks_do_not_change_the_result(monkeypatch):
    x, y, test_x, test_y = noisy_classes(300, 90, classes=7, d=4, spread=2.0)
    whole = scoring.knn_accuracies(x, y, test_x, test_y, (5, 50))
    sizes, votes = [], scoring.neighbour_votes
    monkeypatch.setattr(scoring, "CHUNK", 300 * 7)
    monkeypatch.setattr(scoring, "MIN_QUERIES", 1)
    monkeypatch.setattr(scoring, "neighbour_votes",
                        lambda s, *a: sizes.append(len(s)) or votes(s, *a))
    parts = scoring.knn_accuracies(x, y, test_x, test_y, (5, 50))
    assert sizes == [7] * 12 + [6]
    assert all(parts[k] == pytest.approx(whole[k], abs=1e-9) for k in whole)


def test_few_classes_few_images_and_a_large_k():
    x, y, test_x, test_y = noisy_classes(30, 3, classes=2, spread=0.01)
    assert scoring.knn_accuracy(x, y, test_x, test_y, 5) == (100.0, 100.0)
    # with 2 classes the top 5 is both of them
    assert scoring.knn_accuracy(x, 1 - y, test_x, test_y, 5) == (0.0, 100.0)
    everyone = scoring.knn_accuracy(x, y, test_x, test_y, 30)
    assert scoring.knn_accuracy(x, y, test_x, test_y, 1000) == everyone


def test_features_that_are_not_finite_are_refused():
    x, y, test_x, test_y = noisy_classes(30, 5, classes=2)
    x[3, 2] = float("nan")
    for figure in (lambda *a: scoring.knn_accuracy(*a, 5), scoring.linear_probe):
        with pytest.raises(ValueError, match="NaN"):
            figure(x, y, test_x, test_y)


# ---- linear probe ----------------------------------------------------------------------------


def test_probe_does_not_depend_on_the_unit_of_a_feature():
    x, y, test_x, test_y = noisy_classes(300, 200, classes=8, spread=1.5)
    plain, unit = scoring.linear_probe(x, y, test_x, test_y), torch.logspace(-3, 3, 16)
    assert 60 < plain[0] < 95
    scaled = scoring.linear_probe((x + 5) * unit, y, (test_x + 5) * unit, test_y)
    assert scaled == pytest.approx(plain, abs=0.51)  # one image of 200: float32 rounding


def test_probe_separates_clusters_and_finds_nothing_in_shuffled_labels():
    x, y, test_x, test_y = noisy_classes(600, 300, classes=8, spread=0.3)
    assert scoring.linear_probe(x, y, test_x, test_y)[0] > 99
    g = torch.Generator().manual_seed(0)
    shuffled = y[torch.randperm(600, generator=g)]
    top1, top5 = scoring.linear_probe(x, shuffled, test_x, test_y)
    # chance is 12.5 % and 62.5 %; clusters move as one, so the deviation is that of 8, not 300
    assert top1 < 45 and top5 < 95


def test_probe_reads_one_hot_symbols_and_ignores_unused_ones():
    ids = torch.randint(5, (500, 3), generator=torch.Generator().manual_seed(0))
    y = (ids[:, 0] + 2 * (ids[:, 1] > 2)) % 2
    x = one_hot(ids, 50)  # 45 of 50 symbols are never used: columns without variance
    assert x.shape == (500, 150) and (x.sum(1) == 3).all() and x[0, 50 + ids[0, 1]] == 1
    assert scoring.linear_probe(x[:400], ids[:400, 0], x[400:], ids[400:, 0])[0] == 100.0
    constant = torch.ones(400, 4), y[:400], torch.ones(100, 4), y[400:]
    majority = 100 * (y[400:] == y[:400].mode().values).double().mean().item()
    assert scoring.linear_probe(*constant)[0] == pytest.approx(majority)


def test_probe_chooses_the_decay_without_the_test_part(monkeypatch):
    x, y, test_x, test_y = noisy_classes(200, 50, classes=3, spread=3.0)
    used, fit = [], scoring.fit_logistic
    monkeypatch.setattr(scoring, "fit_logistic", lambda x, y, share, l2, *rest: used.append(
        ((share > 0).sum().item(), l2)) or fit(x, y, share, l2, *rest))
    first = scoring.linear_probe(x, y, test_x, test_y)
    chosen = used[-1]
    assert used[:-1] == [(180, l2) for l2 in scoring.L2_GRID]
    assert chosen == (200, 1e-1)    # three overlapping clusters: the strongest generalises best
    scoring.linear_probe(x, y, test_x, (test_y + 1) % 3)  # other test labels, the same choice
    assert used[-1] == chosen
    assert scoring.linear_probe(x, y, test_x, test_y) == first  # deterministic


def fitted(x, y, share, l2, classes):
    start = x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)
    return scoring.fit_logistic(x, y, share, l2, start, 200)


def test_fit_logistic_agrees_with_plain_gradient_descent():
    x, y, _, _ = noisy_classes(40, 1, classes=3, d=4)
    x, l2 = x.double(), 0.05
    weight, bias = fitted(x, y, torch.full((40,), 1 / 40).double(), l2, 3)
    w, b, target = torch.zeros(4, 3).double(), torch.zeros(3).double(), F.one_hot(y, 3).double()
    for _ in range(6000):
        error = ((x @ w + b).softmax(1) - target) / 40  # the gradient of cross-entropy, by hand
        w, b = w - 0.3 * (x.T @ error + l2 * w), b - 0.3 * error.sum(0)
    assert w.abs().max() > 0.3
    assert torch.allclose(weight.T, w, atol=2e-3)
    assert torch.allclose(bias - bias.mean(), b - b.mean(), atol=2e-3)


def test_fit_logistic_with_shares_equals_repeated_images():
    x, y, _, _ = noisy_classes(30, 1, classes=3, d=4)
    times = torch.arange(30) % 4        # some images three times, some never
    repeated = fitted(x.repeat_interleave(times, 0), y.repeat_interleave(times),
                      torch.full((int(times.sum()),), 1 / times.sum()), 0.05, 3)
    shared = fitted(x, y, times / times.sum(), 0.05, 3)
    assert all(torch.allclose(a, b, atol=2e-3) for a, b in zip(repeated, shared))


# ---- collapse figures ------------------------------------------------------------------------


def test_perplexity_usage_and_unique_codes_by_hand():
    # position 0 constant, position 1 uniform over 4, position 2 half and half of two symbols
    ids = torch.tensor([[9, 0, 5], [9, 1, 5], [9, 2, 6], [9, 3, 6]]).repeat(3, 1)
    figures = scoring.code_figures(ids, vocab=10)
    assert figures["perplexity"] == pytest.approx([1, 4, 2])
    assert figures["codebook_usage"] == pytest.approx(0.7)  # 0 1 2 3 5 6 9 of 10
    assert figures["unique_codes"] == pytest.approx(4 / 12)
    # 1/2, 1/4, 1/4: entropy 1.5 bits
    skewed = scoring.code_figures(torch.tensor([[0], [0], [1], [2]]), vocab=3)
    assert skewed["perplexity"] == pytest.approx([2**1.5])


def test_hits_are_those_of_each_query_and_survive_a_json_file():
    x, y = angles(0, 1, 90, 91), torch.tensor([0, 0, 1, 1])
    queries, labels = angles(90, 0, 0, 91), torch.tensor([1, 0, 1, 0])
    hits = scoring.knn_hits(x, y, queries, labels, (2,))[2]     # (m, 2)
    assert hits[:, 0].tolist() == [1, 1, 0, 0] and hits[:, 1].tolist() == [1, 1, 1, 1]
    uneven = torch.tensor([0.0, 0.25, 1 / 3, 1.0])
    assert scoring.unpack(scoring.pack(uneven)).tolist() == [0, 0.25, 0.33, 1]


def test_the_fitted_probe_is_a_differentiable_function_with_its_decay():
    x, y, test_x, _ = noisy_classes(300, 20, classes=4, spread=0.5)
    probe, l2 = scoring.fit_probe(x, y, 6)                      # two classes without an image
    assert l2 in scoring.L2_GRID and probe(test_x).shape == (20, 6)
    assert scoring.fit_probe(x, y, 6, (1e-2,))[1] == 1e-2
    test_x.requires_grad_(True)
    scores = probe(test_x)[:, 0].sum()
    step, = torch.autograd.grad(scores, test_x)
    with torch.no_grad():
        assert probe(test_x + 0.1 * step)[:, 0].sum() > scores
