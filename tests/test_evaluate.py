"""evaluate.py on a teacher and a student whose symbols, and so whose figures, are known."""
import json
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import evaluate
import scoring
from data import ImageSet


class ToyTeacher(torch.nn.Module):
    """CLS = mean colour of the image, (B, 1, 3): the class is the colour, so it is separable."""

    def forward(self, x):
        return x.float().mean((2, 3))[:, None]


class ToyStudent(torch.nn.Module):
    """Emits the brightest channel and then `second`; interprets a prefix as its mean embedding.

    Adds noise of float32's rounding by place in the batch, as real kernels do.
    """

    lengths, softness = [1, 2], 0.1

    def __init__(self, second=(3,)):
        super().__init__()
        self.second = torch.tensor(second)
        self.codebook = torch.nn.Parameter(torch.eye(4) + 0.5)

    def preprocess(self, z_t):
        return 2 * z_t

    def describe(self, z_t, hard=False):
        second = self.second[torch.arange(len(z_t)) % len(self.second)]
        ids = torch.stack([z_t[:, 0].argmax(1), second], 1)
        weights = F.one_hot(ids, 4).float()
        if not hard:
            weights = (1 - self.softness) * weights + self.softness / 4
        return SimpleNamespace(ids=ids, weights=weights, embeddings=weights @ self.codebook)

    def interpret(self, embeddings):
        z = torch.stack([embeddings[:, 0], embeddings.mean(1)], 1)
        return z + 1e-7 * torch.arange(len(z))[:, None, None]


class StraightThroughStudent(ToyStudent):
    softness = 0.0


def colour_set(n, noise=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=g)
    images = torch.randint(noise, (n, 3, 8, 8), generator=g)
    images[torch.arange(n), labels] += 200
    return ImageSet(images.to(torch.uint8), labels, ["red", "green", "blue"])


# ---- encode ----------------------------------------------------------------------------------


def test_encode_gives_one_feature_per_hard_code_whatever_the_batches():
    images, parts = colour_set(23), (ToyStudent(second=(3, 1)), ToyTeacher())
    out = evaluate.encode(*parts, images, 8, batch_size=5, soft=True)
    assert torch.equal(out["ids"][:, 0], images.labels)
    assert set(out["ids"][:, 1].tolist()) == {1, 3}
    assert out["cls"].shape == (23, 3) and torch.equal(out["space"], 2 * out["cls"])
    assert out["z"].shape == out["soft"].shape == (2, 23, 4)
    for c in range(3):  # of one symbol, whatever the second one is
        rows = out["z"][0, images.labels == c]
        assert len(rows) > 2 and (rows == rows[0]).all()
        assert torch.allclose(rows[0], torch.eye(4)[c] + 0.5, atol=1e-4)
    # 0.9 (1.5) + 0.1 mean(1.5, 0.5, 0.5, 0.5)
    assert torch.allclose(out["soft"][0].amax(1), torch.tensor(1.425), atol=0.01)
    assert not evaluate.encode(*parts, images, 8)["z"].requires_grad


def test_encode_takes_tokens_at_hand_instead_of_the_teacher():
    images, student = colour_set(23), ToyStudent()
    by_teacher = evaluate.encode(student, ToyTeacher(), images, 8, batch_size=5)
    tokens = by_teacher["cls"][:, None].half()                      # (n, N+1, d), as cached
    by_tokens = evaluate.encode(student, None, images, 8, batch_size=5, tokens=tokens.__getitem__)
    assert torch.equal(by_tokens["ids"], by_teacher["ids"])
    assert torch.equal(by_tokens["z"], by_teacher["z"])
    assert torch.allclose(by_tokens["cls"], by_teacher["cls"], rtol=1e-3)


def test_encode_finds_that_straight_through_symbols_have_no_soft_assignments():
    out = evaluate.encode(StraightThroughStudent(), ToyTeacher(), colour_set(7), 8, soft=True)
    assert "soft" not in out


# ---- all figures of a run ----------------------------------------------------------------------

CONFIG = {"data": "toy", "image_size": 8, "vocab": 4, "seed": 0, "train_images": 90,
          "test_images": 30, "precision": "float32"}


@pytest.fixture
def toy_run(monkeypatch):
    """The names that evaluate.py imported, replaced: a run whose answers are known."""
    make = {"train": 1, "test": 2}
    monkeypatch.setattr(evaluate, "load", lambda name, split, size, limit, seed, storage:
                        colour_set(limit, seed=make[split]))
    monkeypatch.setattr(evaluate, "load_model", lambda path, device:
                        (dict(CONFIG), ToyTeacher(), ToyStudent()))


def test_evaluate_scores_a_perfect_code(toy_run, capsys):
    results = evaluate.evaluate(ToyTeacher(), ToyStudent(), CONFIG, soft=True, probe_on="both")
    for row in (results["teacher"], results["teacher_space"], *results["student"].values(),
                *results["soft"].values()):
        assert row["each"][10] == (100.0, 100.0) and row["linear"] == (100.0, 100.0)
    assert results["retention_raw"] == results["retention_space"] == {1: 1.0, 2: 1.0}
    assert results["soft_minus_hard"] == {1: 0, 2: 0} and results["onehot"][2]["linear"][0] == 100
    assert results["perplexity"][1] == pytest.approx(1) and 2.8 < results["perplexity"][0] <= 3
    assert results["codebook_usage"] == 1.0 and results["unique_codes"] == 0.1
    assert results["bits"] == 4 and results["precision"] == "float32"
    evaluate.print_table(results)
    printed = capsys.readouterr().out
    assert "2 symbols, one-hot" in printed and "1 symbol, soft" in printed
    assert "blue            2    3" in printed
    assert "minus that of hard symbols: +0.00, +0.00 points" in printed
    assert max(map(len, printed.splitlines())) <= 110


def test_soft_minus_hard_is_a_difference_in_points(toy_run):
    """Soft assignments that are the same for all images leave k-NN at what guessing gives."""
    class Uniform(ToyStudent):
        softness = 1.0

    results = evaluate.evaluate(ToyTeacher(), Uniform(), CONFIG)
    assert not results["soft"] and results["student"][1]["knn"][0] == 100
    assert -80 < results["soft_minus_hard"][1] < -50  # 100 / 3 or so, of three colours


def test_relative_accuracy_is_against_the_raw_cls_and_the_one_in_the_students_space(toy_run):
    class Constant(ToyStudent):
        """Its space has no information: k-NN there is a guess among three colours."""
        def preprocess(self, z_t):
            return torch.ones_like(z_t)

        def describe(self, z_t, hard=False):
            return super().describe(torch.eye(3)[:, None].repeat(len(z_t), 1, 1)[:len(z_t)], hard)

    results = evaluate.evaluate(ToyTeacher(), Constant(), CONFIG)
    raw, space, student = (results[name]["knn"][0] if name != "student" else
                           results[name][2]["knn"][0] for name in ("teacher", "teacher_space",
                                                                   "student"))
    assert raw == 100 and 20 < space < 60 and student < 70
    assert results["retention_raw"][2] == pytest.approx(student / raw)
    assert results["retention_space"][2] == pytest.approx(student / space)


def test_monitor_scores_each_prefix_on_half_of_the_held_out_images():
    args = SimpleNamespace(image_size=8, precision="float32", vocab=4)
    trainer = SimpleNamespace(args=args, student=ToyStudent(), teacher=ToyTeacher())
    figures = evaluate.monitor(trainer, colour_set(40), knn=True)
    assert figures["knn_prefix"] == [100.0, 100.0] and figures["knn_top1"] == 100.0
    assert "knn_top1" not in evaluate.monitor(trainer, colour_set(40), knn=False)


# ---- the command and its files -----------------------------------------------------------------


def test_summary_takes_each_figure_from_its_place():
    row = {"each": {10: (0, 0)}, "knn": (1.0, 2.0), "linear": (3.0, 4.0)}
    results = {"teacher": row, "teacher_space": row | {"knn": (5.0, 7.0)}, "soft": {}, "onehot": {},
               "student": {8: row | {"knn": (0.5, 6.0)}}, "retention_raw": {8: 0.5},
               "retention_space": {8: 0.1}, "soft_minus_hard": {8: -2.0}, "perplexity": [2.0],
               "codebook_usage": 0.1, "unique_codes": 0.2, "bits": 8.0, "precision": "float32",
               "seconds": 3.0}
    figures = evaluate.summary(results)
    assert figures["teacher"] == {"knn_top1": 1, "knn_top5": 2, "linear_top1": 3, "linear_top5": 4}
    assert figures["teacher_space"] == figures["teacher"] | {"knn_top1": 5, "knn_top5": 7}
    assert figures["student"]["8"] == figures["teacher"] | {"knn_top1": 0.5, "knn_top5": 6}
    assert (figures["retention_raw"], figures["retention_space"]) == ({"8": 0.5}, {"8": 0.1})


def test_json_has_exactly_the_agreed_keys(toy_run, tmp_path, monkeypatch, capsys):
    target = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "run.pt", "--json", str(target),
                                      "--device", "cpu", "--precision", "float32",
                                      "--train-images", "60"])
    evaluate.main()
    assert "60 gallery images, 30 queries" in capsys.readouterr().out
    figures = json.loads(target.read_text())
    row = dict.fromkeys(("knn_top1", "knn_top5", "linear_top1", "linear_top5"), 100.0)
    row["knn_hits"] = scoring.pack(torch.ones(30))
    assert figures.pop("teacher") == figures.pop("teacher_space") == row
    assert figures.pop("student") == {"1": row, "2": row}
    assert figures.pop("retention_raw") == figures.pop("retention_space") == {"1": 1.0, "2": 1.0}
    assert figures.pop("soft_minus_hard") == {"1": 0.0, "2": 0.0}
    assert len(figures.pop("perplexity")) == 2 and figures.pop("seconds") >= 0
    assert figures == {"codebook_usage": 1.0, "unique_codes": 0.1, "bits": 4.0,
                       "precision": "float32"}
    assert list(tmp_path.iterdir()) == [target]  # nothing temporary stays


@pytest.mark.parametrize("arguments, complaint", [
    (["--json", "no/such/folder/x.json"], "folder does not exist"),
    (["--test-images", "-3"], "at least 1"),
    (["--device", "cpu", "--precision", "float16"], "float16 is for GPUs"),
])
def test_mistakes_end_in_one_line(toy_run, monkeypatch, arguments, complaint):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "run.pt", *arguments])
    with pytest.raises(SystemExit, match=complaint) as stop:
        evaluate.main()
    assert str(stop.value).startswith("evaluate.py: ") and "\n" not in str(stop.value)


@pytest.mark.parametrize("flags, sizes", [
    ([], [90, 30]), (["--train-images", "all"], [None, 30]), (["--test-images", "all"], [90, None]),
    (["--train-images", "50", "--data", "other"], [50, 30])])
def test_flags_that_are_given_replace_the_runs_own(toy_run, monkeypatch, flags, sizes):
    seen = []
    monkeypatch.setattr(evaluate, "evaluate", lambda t, s, config, *rest, max_gallery:
                        seen.append(config | {"max_gallery": max_gallery}) or 1 / 0)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "run.pt", "--device", "cpu", *flags])
    with pytest.raises(ZeroDivisionError):
        evaluate.main()
    assert [seen[0][k] for k in ("train_images", "test_images")] == sizes
    assert seen[0]["max_gallery"] == (None if "--train-images" in flags else evaluate.GALLERY)
    assert seen[0]["data"] == ("other" if "other" in flags else "toy") and seen[0]["vocab"] == 4
    assert seen[0]["precision"] == "auto"       # of this machine, not of the one that trained


@pytest.mark.parametrize("train_images, largest, gallery", [
    (90, 100, 90), (90, 20, 20), (None, 20, 20), (90, None, 90)])
def test_the_gallery_has_a_largest_size(toy_run, train_images, largest, gallery):
    config = CONFIG | {"train_images": train_images}
    results = evaluate.evaluate(ToyTeacher(), ToyStudent(), config, max_gallery=largest)
    assert results["sizes"] == [gallery, 30] and evaluate.GALLERY == 50_000


def test_images_without_classes_are_refused(tmp_path):
    for name in ("train/a/1.png", "test/a/1.png", "test/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="have no class"):
        evaluate.evaluate(ToyTeacher(), ToyStudent(), CONFIG | {"data": f"folder:{tmp_path}"})
