"""Known answers for evaluate.py: votes, ties and collapse figures that one can check by hand."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import evaluate as ev  # noqa: E402
from data import ImageSet  # noqa: E402


def angles(*degrees):
    """Unit vectors in the plane: their cosine similarity to 0 degrees is cos(angle)."""
    turn = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([turn.cos(), turn.sin()], 1)


def noisy_classes(n, m, classes, d=16, spread=1.0, seed=0):
    """n train and m test points around one random centre per class: (x, y, x_test, y_test)."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=g)
    y = torch.randint(classes, (n + m,), generator=g)
    x = centres[y] + spread * torch.randn(n + m, d, generator=g)
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
    got = ev.knn_accuracy(x, y, test_x, test_y, k)
    assert 30 < top1 < 90  # a test that means something: neither chance nor saturated
    assert got == pytest.approx((top1, 100.0), abs=1e-9)


def test_knn_top5_equals_dinos_where_five_classes_got_votes():
    x, y, test_x, test_y = noisy_classes(2000, 200, classes=20, d=6, spread=2.5)
    near, index = (F.normalize(test_x, dim=1) @ F.normalize(x, dim=1).T).topk(200)
    votes = torch.einsum("bk,bkc->bc", (near / 0.07).exp(), F.one_hot(y[index], 20).float())
    assert ((votes > 0).sum(1) >= 5).all()
    top5 = 100 * (votes.topk(5).indices == test_y[:, None]).any(1).double().mean().item()
    assert 40 < top5 < 95
    assert ev.knn_accuracy(x, y, test_x, test_y, 200)[1] == pytest.approx(top5, abs=1e-9)


def test_knn_of_four_points_by_hand():
    # Similarities 0.9848, 0.9397, 0.8660, 0.7660; weights at temperature 1: 2.68, 2.56, 2.38, 2.15.
    x, y = angles(10, 20, 30, 40), torch.tensor([7, 3, 3, 7])
    query, three = angles(0), torch.tensor([3])
    top1 = {k: ev.knn_accuracy(x, y, query, three, k, temperature=1.0)[0] for k in (1, 3, 4)}
    assert top1 == {1: 0.0, 3: 100.0, 4: 100.0}  # 3: 2.56 + 2.38 > 2.68; 4: 4.94 > 4.83
    # At 0.07 the nearest one alone outweighs the two of class 3: e^14.07 > e^13.42 + e^12.37.
    assert ev.knn_accuracy(x, y, query, three, 3)[0] == 0.0


def test_tied_neighbours_share_the_places_that_are_left():
    # k = 2: the nearest (class 0) votes fully, three tie for the one place left. At temperature
    # 1e3 every vote weighs the same within 0.1 %: class 0 has 1 + 1/3, class 1 has 2/3.
    similarity = angles(0) @ angles(10, 30, 30, 30).T
    labels = torch.tensor([0, 0, 1, 1])
    (votes,) = ev.neighbour_votes(similarity, labels, 2, [2], temperature=1e3)
    assert votes[0].tolist() == pytest.approx([4 / 3, 2 / 3], rel=2e-3)


def test_tied_classes_score_the_expected_value_of_a_coin():
    # The same code, one vote each for classes 0, 1, 2: the label is first with chance 1/3.
    x, y = angles(5, 5, 5), torch.tensor([0, 1, 2])
    for label in (0, 1, 2):
        top1, top5 = ev.knn_accuracy(x, y, angles(0), torch.tensor([label]), 3)
        assert top1 == pytest.approx(100 / 3) and top5 == 100.0
    # Six classes: one voted, five share the four places left of the top 5.
    x, y = angles(5, 90, 91, 92, 93, 94), torch.arange(6)
    assert ev.knn_accuracy(x, y, angles(0), torch.tensor([4]), 1)[1] == pytest.approx(80.0)


def test_votes_are_the_average_over_random_tie_breaks():
    x, y, test_x, _ = codes(60, 8)
    similarity = F.normalize(test_x.double(), dim=1) @ F.normalize(x.double(), dim=1).T
    (votes,) = ev.neighbour_votes(similarity, y, 6, [15], temperature=0.5)
    total, g = torch.zeros(8, 6).double(), torch.Generator().manual_seed(0)
    for _ in range(4000):
        jitter = 1e-7 * torch.rand(similarity.shape, generator=g)  # far below the codes' distances
        near, index = (similarity + jitter).topk(15)
        total.scatter_add_(1, y[index], (near / 0.5).exp())
    # a tied place changes a vote by at most e^2; over 4000 draws that averages to about 0.1
    assert torch.allclose(votes, total / 4000, atol=0.5)
    assert (votes % 1 > 0).any() and votes.max() > 20


def test_neither_gallery_order_nor_class_numbers_matter_for_codes():
    x, y, test_x, test_y = codes(400, 150)
    before = ev.knn_accuracies(x, y, test_x, test_y, (1, 10, 100))
    by_class, names = y.argsort(), torch.tensor([40, -3, 900, 1, 2, 0])
    for order in (by_class, by_class.flip(0), torch.arange(400).flip(0)):
        after = ev.knn_accuracies(x[order], names[y[order]], test_x, names[test_y], (1, 10, 100))
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
    x, test_x = (ev.one_hot(torch.randint(4, (n, 3), generator=g), 4) for n in (300, 80))
    y, test_y = (torch.randint(6, (n,), generator=g) for n in (300, 80))
    scale = torch.rand(300, 1, generator=g) + 0.5  # normalising takes it out, and leaves rounding
    plain, scaled = (ev.knn_accuracy(a, y, test_x, test_y, 10) for a in (x, x.double() * scale))
    assert scaled == pytest.approx(plain, abs=1e-9)


def test_all_ks_in_one_pass_equal_one_k_at_a_time():
    for data in (codes(300, 90, vocab=50), noisy_classes(300, 90, classes=7, d=4, spread=2.0)):
        together = ev.knn_accuracies(*data, ks=(60, 1, 9))
        assert together == {k: pytest.approx(ev.knn_accuracy(*data, k), abs=1e-9) for k in together}
        assert len({top1 for top1, _ in together.values()}) == 3  # it matters which k


def test_chunks_do_not_change_the_result(monkeypatch):
    x, y, test_x, test_y = codes(300, 90)
    whole = ev.knn_accuracies(x, y, test_x, test_y, (5, 50))
    sizes, votes = [], ev.neighbour_votes
    monkeypatch.setattr(ev, "CHUNK", 300 * 7)
    monkeypatch.setattr(ev, "neighbour_votes", lambda s, *a: sizes.append(len(s)) or votes(s, *a))
    parts = ev.knn_accuracies(x, y, test_x, test_y, (5, 50))
    assert sizes == [7] * 12 + [6]
    assert all(parts[k] == pytest.approx(whole[k], abs=1e-9) for k in whole)


def test_few_classes_few_images_and_a_large_k():
    x, y, test_x, test_y = noisy_classes(30, 3, classes=2, spread=0.01)
    assert ev.knn_accuracy(x, y, test_x, test_y, 5) == (100.0, 100.0)
    assert ev.knn_accuracy(x, 1 - y, test_x, test_y, 5) == (0.0, 100.0)  # 2 classes: top 5 is both
    everyone = ev.knn_accuracy(x, y, test_x, test_y, 30)
    assert ev.knn_accuracy(x, y, test_x, test_y, 1000) == everyone


def test_features_that_are_not_finite_are_refused():
    x, y, test_x, test_y = noisy_classes(30, 5, classes=2)
    x[3, 2] = float("nan")
    for figure in (lambda *a: ev.knn_accuracy(*a, 5), ev.linear_probe):
        with pytest.raises(ValueError, match="NaN"):
            figure(x, y, test_x, test_y)


# ---- linear probe ----------------------------------------------------------------------------


def test_probe_does_not_depend_on_the_unit_of_a_feature():
    x, y, test_x, test_y = noisy_classes(300, 200, classes=8, spread=1.5)
    plain, unit = ev.linear_probe(x, y, test_x, test_y), torch.logspace(-3, 3, 16)
    assert 60 < plain[0] < 95
    scaled = ev.linear_probe((x + 5) * unit, y, (test_x + 5) * unit, test_y)
    assert scaled == pytest.approx(plain, abs=0.51)  # one image of 200: float32 rounding


def test_probe_separates_clusters_and_finds_nothing_in_shuffled_labels():
    x, y, test_x, test_y = noisy_classes(600, 300, classes=8, spread=0.3)
    assert ev.linear_probe(x, y, test_x, test_y)[0] > 99
    g = torch.Generator().manual_seed(0)
    shuffled = y[torch.randperm(600, generator=g)]
    top1, top5 = ev.linear_probe(x, shuffled, test_x, test_y)
    # chance is 12.5 % and 62.5 %; clusters move as one, so the deviation is that of 8, not 300
    assert top1 < 45 and top5 < 95


def test_probe_reads_one_hot_symbols_and_ignores_unused_ones():
    ids = torch.randint(5, (500, 3), generator=torch.Generator().manual_seed(0))
    y = (ids[:, 0] + 2 * (ids[:, 1] > 2)) % 2
    x = ev.one_hot(ids, 50)  # 45 of 50 symbols are never said: columns without variance
    assert x.shape == (500, 150) and (x.sum(1) == 3).all() and x[0, 50 + ids[0, 1]] == 1
    assert ev.linear_probe(x[:400], ids[:400, 0], x[400:], ids[400:, 0])[0] == 100.0
    constant = torch.ones(400, 4), y[:400], torch.ones(100, 4), y[400:]
    majority = 100 * (y[400:] == y[:400].mode().values).double().mean().item()
    assert ev.linear_probe(*constant)[0] == pytest.approx(majority)


def test_probe_chooses_the_decay_without_the_test_part(monkeypatch):
    x, y, test_x, test_y = noisy_classes(200, 50, classes=3, spread=3.0)
    used, fit = [], ev.fit_logistic
    monkeypatch.setattr(ev, "fit_logistic",
                        lambda a, b, c, l2, i: used.append((len(a), l2)) or fit(a, b, c, l2, i))
    first = ev.linear_probe(x, y, test_x, test_y)
    chosen = used[-1]
    assert [n for n, _ in used] == [180] * len(ev.L2_GRID) + [200]
    assert chosen[1] == 1e-1  # three overlapping clusters: the strongest decay generalises best
    ev.linear_probe(x, y, test_x, (test_y + 1) % 3)  # other test labels, the same choice
    assert used[-1] == chosen
    assert ev.linear_probe(x, y, test_x, test_y) == first  # deterministic


def test_fit_logistic_agrees_with_plain_gradient_descent():
    x, y, _, _ = noisy_classes(40, 1, classes=3, d=4)
    x, l2 = x.double(), 0.05
    weight, bias = ev.fit_logistic(x, y, 3, l2)
    w, b, target = torch.zeros(4, 3).double(), torch.zeros(3).double(), F.one_hot(y, 3).double()
    for _ in range(20_000):
        error = ((x @ w + b).softmax(1) - target) / 40  # the gradient of cross-entropy, by hand
        w, b = w - 0.1 * (x.T @ error + l2 * w), b - 0.1 * error.sum(0)
    assert w.abs().max() > 0.3
    assert torch.allclose(weight, w, atol=1e-4)
    assert torch.allclose(bias - bias.mean(), b - b.mean(), atol=1e-4)


# ---- collapse figures, encoding, report ------------------------------------------------------


def test_perplexity_usage_and_distinct_by_hand():
    # position 0 constant, position 1 uniform over 4, position 2 half and half of two symbols
    ids = torch.tensor([[9, 0, 5], [9, 1, 5], [9, 2, 6], [9, 3, 6]]).repeat(3, 1)
    figures = ev.code_figures(ids, vocab=10)
    assert figures["perplexity"] == pytest.approx([1, 4, 2])
    assert figures["usage"] == pytest.approx(0.7)  # 0 1 2 3 5 6 9 of 10
    assert figures["distinct"] == pytest.approx(4 / 12)
    # 1/2, 1/4, 1/4: entropy 1.5 bits
    skewed = ev.code_figures(torch.tensor([[0], [0], [1], [2]]), vocab=3)
    assert skewed["perplexity"] == pytest.approx([2**1.5])


class ToyTeacher(torch.nn.Module):
    """CLS = mean colour of the picture, (B, 1, 3): the class is the colour, so it is separable."""

    def forward(self, x):
        return x.float().mean((2, 3))[:, None]


class ToyStudent(torch.nn.Module):
    """Says the brightest channel and then `second`; interprets a prefix as its mean embedding.

    Adds noise of float32's rounding by place in the batch, as real kernels do.
    """

    lengths = [1, 2]

    def __init__(self, second=(3,)):
        super().__init__()
        self.second = torch.tensor(second)
        self.table = torch.nn.Parameter(torch.eye(4) + 0.5)

    def describe(self, tokens, hard=False):
        second = self.second[torch.arange(len(tokens)) % len(self.second)]
        ids = torch.stack([tokens[:, 0].argmax(1), second], 1)
        weights = F.one_hot(ids, 4).float()
        if not hard:
            weights = 0.9 * weights + 0.025
        return SimpleNamespace(ids=ids, embeddings=weights @ self.table, drafts=weights)

    def interpret(self, embeddings, drafts):
        z = torch.stack([embeddings[:, 0], embeddings.mean(1)], 1)
        return z + 1e-7 * torch.arange(len(z))[:, None, None]


def colour_set(n, noise=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=g)
    images = torch.randint(noise, (n, 3, 8, 8), generator=g)
    images[torch.arange(n), labels] += 200
    return ImageSet(images.to(torch.uint8), labels, ["red", "green", "blue"])


def test_encode_gives_one_feature_per_hard_code_whatever_the_batches():
    pictures, parts = colour_set(23), (ToyStudent(second=(3, 1)), ToyTeacher())
    out = ev.encode(*parts, pictures, 8, batch_size=5, soft=True)
    assert torch.equal(out["ids"][:, 0], pictures.labels)
    assert set(out["ids"][:, 1].tolist()) == {1, 3}
    assert out["cls"].shape == (23, 4 - 1) and out["z"].shape == out["soft"].shape == (2, 23, 4)
    for c in range(3):  # of one symbol, whatever the second one is
        rows = out["z"][0, pictures.labels == c]
        assert len(rows) > 2 and (rows == rows[0]).all()
        assert torch.allclose(rows[0], torch.eye(4)[c] + 0.5, atol=1e-4)
    assert torch.allclose(out["soft"][0].amax(1), torch.tensor(1.425), atol=0.01)
    assert not ev.encode(*parts, pictures, 8)["z"].requires_grad


CONFIG = {"data": "toy", "image_size": 8, "vocab": 4, "seed": 0, "train_images": 90,
          "test_images": 30}


@pytest.fixture
def toy_run(monkeypatch):
    """The names that evaluate.py imported, replaced: a run whose answers are known."""
    make = {"train": 1, "test": 2}
    monkeypatch.setattr(ev, "load", lambda name, split, size, limit, seed:
                        colour_set(limit, seed=make[split]))
    monkeypatch.setattr(ev, "load_checkpoint", lambda path, device:
                        (dict(CONFIG), ToyTeacher(), ToyStudent()))


def test_evaluate_scores_a_perfect_language(toy_run, capsys):
    results = ev.evaluate(ToyTeacher(), ToyStudent(), CONFIG, soft=True, probe_on="both")
    for row in (results["teacher"], *results["student"].values(), *results["soft"].values()):
        assert row["each"][10] == (100.0, 100.0) and row["linear"] == (100.0, 100.0)
    assert results["retention"] == {1: 1.0, 2: 1.0} and results["soft_minus_hard"] == {1: 0, 2: 0}
    assert results["onehot"][2]["linear"][0] == 100
    assert results["perplexity"][1] == pytest.approx(1) and 2.8 < results["perplexity"][0] <= 3
    assert results["usage"] == 1.0 and results["distinct"] == 0.1 and results["bits"] == 4
    ev.print_table(results)
    printed = capsys.readouterr().out
    assert "2 symbols, one-hot" in printed and "1 symbol, soft" in printed
    assert "blue            2    3" in printed
    assert "minus that of symbols: +0.00, +0.00 points" in printed


def test_soft_minus_hard_is_a_difference_in_points(toy_run, monkeypatch):
    """Mixtures that all say the same leave k-NN at what guessing gives: symbols are ahead of
    them."""
    class Mute(ToyStudent):
        def describe(self, tokens, hard):
            said = super().describe(tokens, hard)
            said.embeddings = said.embeddings if hard else torch.ones_like(said.embeddings)
            return said

    results = ev.evaluate(ToyTeacher(), Mute(), CONFIG)
    assert not results["soft"] and results["student"][1]["knn"][0] == 100
    assert -80 < results["soft_minus_hard"][1] < -50  # 100 / 3 or so, of three colours


def test_summary_takes_each_figure_from_its_place():
    row = {"each": {10: (0, 0)}, "knn": (1.0, 2.0), "linear": (3.0, 4.0)}
    results = {"teacher": row, "student": {8: row | {"knn": (0.5, 6.0)}}, "retention": {8: 0.5},
               "perplexity": [2.0], "usage": 0.1, "distinct": 0.2, "bits": 8.0}
    figures = ev.summary(results)
    assert figures["teacher"] == {"knn_top1": 1, "knn_top5": 2, "linear_top1": 3, "linear_top5": 4}
    assert figures["student"]["8"] == figures["teacher"] | {"knn_top1": 0.5, "knn_top5": 6}


def test_json_has_exactly_the_agreed_keys(toy_run, tmp_path, monkeypatch, capsys):
    target = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "run.pt", "--json", str(target),
                                      "--device", "cpu", "--train-images", "60"])
    ev.main()
    assert "60 train images (gallery), 30 test images" in capsys.readouterr().out
    figures = json.loads(target.read_text())
    row = dict.fromkeys(("knn_top1", "knn_top5", "linear_top1", "linear_top5"), 100.0)
    assert figures.pop("teacher") == row and figures.pop("student") == {"1": row, "2": row}
    assert figures.pop("retention") == {"1": 1.0, "2": 1.0} and len(figures.pop("perplexity")) == 2
    assert figures == {"usage": 1.0, "distinct": 0.1, "bits": 4.0}
    assert list(tmp_path.iterdir()) == [target]  # nothing temporary stays


@pytest.mark.parametrize("arguments, complaint", [
    (["--json", "no/such/folder/x.json"], "folder does not exist"),
    (["--test-images", "-3"], "at least 1"),
])
def test_mistakes_end_in_one_line(toy_run, monkeypatch, arguments, complaint):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "run.pt", *arguments])
    with pytest.raises(SystemExit, match=complaint) as stop:
        ev.main()
    assert str(stop.value).startswith("evaluate.py: ") and "\n" not in str(stop.value)


@pytest.mark.parametrize("flags, sizes", [
    ([], [90, 30]), (["--train-images", "all"], [None, 30]), (["--test-images", "all"], [90, None]),
    (["--train-images", "50", "--data", "other"], [50, 30])])
def test_flags_that_are_given_replace_the_runs_own(toy_run, monkeypatch, flags, sizes):
    seen = []
    monkeypatch.setattr(ev, "evaluate", lambda t, s, config, *rest: seen.append(config) or 1 / 0)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "run.pt", "--device", "cpu", *flags])
    with pytest.raises(ZeroDivisionError):
        ev.main()
    assert [seen[0][k] for k in ("train_images", "test_images")] == sizes
    assert seen[0]["data"] == ("other" if "other" in flags else "toy") and seen[0]["vocab"] == 4


def test_images_without_classes_are_refused(tmp_path):
    for name in ("train/a/1.png", "test/a/1.png", "test/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="without a class"):
        ev.evaluate(ToyTeacher(), ToyStudent(), CONFIG | {"data": f"folder:{tmp_path}"})
