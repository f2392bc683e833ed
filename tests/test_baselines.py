"""extras/baselines.py: residual k-means on data whose answer is known, and the file it writes."""
import json

import pytest
import torch

import model
from extras import baselines, experiments
from extras.baselines import residual_kmeans


def test_two_stages_find_a_sum_of_two_codebooks():
    """Points are coarse (4 far corners) + fine (a small offset in a third dimension): 4 + 4 centres
    are exact."""
    corners = torch.tensor([[100.0, 0, 0], [0, 100, 0], [-100, 0, 0], [0, -100, 0]])
    offsets = torch.tensor([1.0, -1]).repeat(100)[:, None]
    x = corners.repeat_interleave(50, 0) + torch.tensor([0.0, 0, 1]) * offsets
    best = None
    for seed in range(20):                              # Lloyd from random rows may miss a corner
        torch.manual_seed(seed)
        (a, _, _), (b, test, said) = residual_kmeans(x, x[:3], 4, 2)
        if best is None or (x - b).norm() < (x - best[1]).norm():
            best = a, b, test, said
    _, b, test, said = best
    assert torch.allclose(b, x, atol=0.05) and torch.allclose(test, x[:3], atol=0.05)
    # the first three pictures share a corner, and the offset alternates
    assert said.shape == (3, 2) and len(set(said[:, 0].tolist())) == 1
    assert said[0, 1] == said[2, 1] != said[1, 1]


def test_each_stage_lowers_the_error_and_test_is_not_fitted():
    torch.manual_seed(0)
    train, other = torch.randn(300, 8), torch.randn(300, 8) + 5
    errors = [(train - a).pow(2).mean().item() for a, *_ in residual_kmeans(train, other, 8, 4)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.7 * errors[0]
    torch.manual_seed(0)
    again = [a for a, *_ in residual_kmeans(train, other * 0, 8, 4)]
    torch.manual_seed(0)
    assert all(torch.equal(x, y) for x, (y, *_) in zip(again, residual_kmeans(train, other, 8, 4)))


def test_the_first_stage_is_plain_k_means():
    """Two far clusters: their centres are the means, and the error is what is left within them."""
    x = torch.cat([torch.randn(50, 3), torch.randn(50, 3) + 40])
    (rebuilt, _, said), = residual_kmeans(x, x, 2, 1)
    means = torch.stack([x[:50].mean(0), x[50:].mean(0)]).repeat_interleave(50, 0)
    assert torch.allclose(rebuilt, means, atol=1e-4)
    assert len(said[:50].unique()) == len(said[50:].unique()) == 1 and said[0] != said[50]


def test_the_file_is_read_by_the_tables_with_hardware_and_seconds(tmp_path, monkeypatch):
    torch.save(model.small_vit(32, 8, 64, 1, 1).vit.state_dict(), tmp_path / "teacher.pt")
    file = tmp_path / "shapes-kmeans-4-s1.json"
    flags = "--train-images 80 --test-images 40 --vocab 4 --length 2 --seed 1 --device cpu --space"
    baselines.run(baselines.parse([*flags.split(), "--teacher", str(tmp_path / "teacher.pt"),
                                   "--json", str(file)]))
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    rows = {(r["method"], r["symbols"]): r for r in experiments.rows()}
    assert list(rows) == [("pixels", None), ("teacher", None), ("whitened", None), ("kmeans", 1),
                          ("residual-kmeans", 2)]
    two = rows["residual-kmeans", 2]
    assert (two["experiment"], two["seed"], two["vocab"]) == ("shapes-kmeans-4", 1, 4)
    assert two["hardware"] == "CPU, 1 threads" and two["seconds"] >= 0
    assert 1 <= two["perplexity"] <= 4
    assert two["retention"] == pytest.approx(two["knn_top1"] / rows["teacher", None]["knn_top1"])
    assert rows["pixels", None]["linear_top1"] is None and rows["pixels", None]["knn_top5"] > 0
    assert json.loads(file.read_text())["config"]["space"] == "True"


def test_a_folder_that_is_missing_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["baselines", "--json", str(tmp_path / "no" / "x.json")])
    monkeypatch.setattr(baselines, "run", lambda args: pytest.fail("ran"))
    with pytest.raises(SystemExit, match="does not exist; make it first"):
        baselines.main()
