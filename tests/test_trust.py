"""extras/trust.py and extras/xmeans.py: tables by hand, planted symbols, planted clusters."""
import json
import math

import pytest
import tiny_checkpoint
import torch

from extras import extract, trust, xmeans

LABELS = torch.tensor([0, 0, 0, 1])
IDS = torch.tensor([[0, 2], [0, 2], [1, 2], [2, 2]])                # K = 3


def test_symbol_map_by_hand():
    table = trust.symbol_map(IDS, LABELS, 3, 2)
    assert torch.allclose(table["symbol"][0].exp(),
                          torch.tensor([[3 / 6, 1 / 4], [2 / 6, 1 / 4], [1 / 6, 2 / 4]]).double())
    assert torch.allclose(table["class"][0].exp(),
                          torch.tensor([[3 / 4, 1 / 4], [2 / 3, 1 / 3], [1 / 3, 2 / 3]]).double())
    assert torch.allclose(table["marginal"].exp(),
                          torch.tensor([[4, 3, 3], [2, 2, 6]]).double() / 10)


def test_scores_by_hand():
    """Prefixes of 1 and 2: ln 1/2 and (ln 1/2 + ln 4/6) / 2; the marginals are 4/10 and 6/10."""
    table = trust.symbol_map(IDS, LABELS, 3, 2)
    scores = trust.scores(table, IDS[:1], LABELS[:1])
    ess = torch.tensor([[math.log(1 / 2), (math.log(1 / 2) + math.log(4 / 6)) / 2]]).double()
    marginal = torch.tensor([[math.log(4 / 10), (math.log(4 / 10) + math.log(6 / 10)) / 2]]).double()
    assert torch.allclose(scores["ESS"], ess) and torch.allclose(scores["marginal"], marginal)
    assert torch.allclose(scores["LIFT"], ess - marginal)
    assert trust.predict(trust.symbol_map(IDS[:, :1], LABELS, 3, 2), IDS[:, :1]).tolist() == [
        0, 0, 0, 1]


def test_a_symbol_that_no_training_image_has_fits_no_class_better_than_another():
    n = 1000
    labels = torch.arange(n) % 10
    table = trust.symbol_map(labels[:, None], labels, 20, 10)      # symbols 10 to 19 are never used
    lift = trust.scores(table, torch.arange(10, 20)[:, None], torch.arange(10))["LIFT"]
    assert lift.abs().max() < 1e-9


def test_auroc_by_hand_with_a_tie():
    high, low = torch.tensor([1.0, 2, 3]), torch.tensor([0.0, 2])
    assert extract.auroc(high, low) == 0.75
    interval = extract.auroc_interval(high.repeat(50), low.repeat(50))
    assert interval["auroc"] == 0.75 and 0.65 < interval["low"] < 0.75 < interval["high"] < 0.85
    assert extract.auroc_interval(high, low[:0])["auroc"] is None


def planted(n=400, wrong=0.2):
    """Ten classes, whose symbol is the class at both positions; the CLS is its one-hot, but in a
    share of the images that of another class, so that a probe errs on exactly these."""
    labels = torch.arange(n) % 10
    apparent = torch.where(torch.rand(n) < wrong, (labels + 1) % 10, labels)
    cls = torch.nn.functional.one_hot(apparent, 10).float()
    return {"ids": labels[:, None].repeat(1, 2), "labels": labels, "cls": cls}, apparent == labels


def test_planted_symbols_find_all_errors_and_the_control_none():
    part, right = planted()
    judge = trust.Judge(part, torch.arange(10), 10)
    assert torch.equal(judge(part)[1] == part["labels"], right)
    row = judge.auroc(trust.rows_of(part, right), trust.rows_of(part, ~right))
    assert row["ESS"][2]["auroc"] == row["LIFT"][1]["auroc"] == 1
    assert abs(row["marginal"][2]["auroc"] - 0.5) < 0.1


def test_temporary_learning_of_planted_symbols():
    part, _ = planted(wrong=0.0)
    two = trust.rows_of(part, part["labels"] >= 8)
    figures = trust.temporary(two, two, 10)
    assert figures["accuracy"] == figures["nearest_mean_of_cls"] == 100
    assert 35 < figures["shuffled_labels"] < 65


def test_block_shuffle_moves_intact_blocks():
    block = torch.arange(16).view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1)
    images = block.expand(5, 3, 32, 32).byte()
    shuffled = trust.block_shuffle(images)
    assert not torch.equal(shuffled, images)
    corners = shuffled[:, :, ::8, ::8]
    assert torch.equal(corners.repeat_interleave(8, 2).repeat_interleave(8, 3), shuffled)
    assert torch.equal(corners[:, 0].flatten(1).sort().values, torch.arange(16).expand(5, 16))


def test_attack_on_a_linear_classifier_is_the_corner_of_the_box():
    weight, labels = torch.randn(12), torch.tensor([0, 1, 1])
    images = torch.rand(3, 3, 2, 2) * 0.8 + 0.1

    def classify(x):
        return torch.stack([x.flatten(1) @ weight, -x.flatten(1) @ weight], 1)

    attacked = trust.attack(classify, images, labels)
    toward = torch.tensor([-1, 1, 1]).view(3, 1, 1, 1) * weight.view(3, 2, 2).sign()
    assert torch.allclose(attacked, images + trust.EPSILON * toward, atol=1e-6)


# ---- X-means -------------------------------------------------------------------------------------

def test_bic_by_hand():
    """SSE 4 of 4 points in 2 clusters: variance 2."""
    x = torch.tensor([[0.0], [2], [10], [12]]).double()
    value = xmeans.bic(x, torch.tensor([[1.0], [11]]).double(), torch.tensor([0, 0, 1, 1]))
    by_hand = 4 * math.log(1 / 2) - 2 * math.log(4 * math.pi) - 1 - 2 * math.log(4)
    assert value == pytest.approx(by_hand)
    assert xmeans.bic(x[:2], x[:2], torch.arange(2)) == -math.inf


def test_xmeans_finds_five_gaussians_and_keeps_one_intact():
    means = torch.tensor([[0.0, 0, 0], [9, 0, 0], [0, 9, 0], [0, 0, 9], [9, 9, 9]])
    x = (means[:, None] + torch.randn(5, 200, 3)).flatten(0, 1)
    centroids = xmeans.xmeans(x)
    assert len(centroids) == 5
    assert torch.cdist(means.double(), centroids).amin(1).max() < 0.3
    assert xmeans.halves(x[:200].double()) is None and len(xmeans.xmeans(x[:200], start=1)) == 1
    assert len(xmeans.xmeans(x, most=3)) == 3


# ---- the command ---------------------------------------------------------------------------------

def test_the_command_writes_its_record(tmp_path, capsys):
    path = tiny_checkpoint.save(tmp_path / "ckpt.pt")
    words = [path, "--train-images", "80", "--test-images", "40", "--count", "4", "--device", "cpu"]
    for more in ([], ["--xmeans"]):
        trust.main([*words, *more, "--json", str(tmp_path / "record.json")])
        record = json.loads((tmp_path / "record.json").read_text())
        assert {"correct above wrong", "clean above attacked", "eight classes above two new",
                "eight classes above noise"} <= record["auroc"].keys()
        assert record["images"] == [80, 40] and record["auroc"]["eight classes above noise"]["ESS"]
    assert "temporary learning" in capsys.readouterr().out
    for wrong in (["--held-out", "3", "3"], ["--json", str(tmp_path / "no" / "folder")],
                  ["--test-images", "1"]):
        with pytest.raises(SystemExit, match="extras.trust: "):
            trust.main([*words, *wrong])
