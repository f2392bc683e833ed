"""extras/qscore.py: scores by hand, planted features, and the regulariser's gradient."""
import json

import tiny_checkpoint
import torch
import torch.nn.functional as F

from extras import qscore

# Mean 0.25 and deviation 0.433 in the first two rows; 0.5 and 0.5 in the third
H = torch.tensor([[0.0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 1]])


def test_active_features_and_their_frequency_by_hand():
    assert qscore.active(H, 0.9).tolist() == [[False, False, False, True],
                                              [False, True, False, False],
                                              [False, False, True, True]]
    assert torch.allclose(qscore.frequency(H, 0.9), torch.tensor([0, 100 / 3, 100 / 3, 200 / 3]))
    assert not qscore.active(H, 4.0).any()


def test_q_score_by_hand():
    discriminative = torch.tensor([False, False, True, True])
    q = qscore.q_score(H, discriminative, 0.9)
    assert torch.allclose(q, torch.tensor([0.75, 0.0, 0.5]))        # the second: an empty set, so 0


def test_the_middle_of_the_frequencies():
    order = torch.randperm(20)
    chosen = qscore.middle(torch.arange(20.0)[order])
    assert sorted(order[chosen].tolist()) == [*range(10, 19)]       # percentiles 50 to 95
    assert qscore.middle(torch.zeros(128), 0.35).sum() == 77        # 60 %, with all A equal


def test_one_planted_feature_is_the_only_active_one():
    x = 0.01 * torch.rand(50, 128)
    x[:, 7] = 1
    h = F.normalize(x, dim=1)
    assert torch.equal(qscore.active(h, 4.0), F.one_hot(torch.full((50,), 7), 128).bool())


def test_hard_bags_of_8_in_128_have_no_active_feature():
    """z = sqrt((128 - 8) / 8) = 3.87 < 4: the reason for soft bags."""
    h = F.normalize((torch.arange(128) < 8).float()[None], dim=1)
    assert not qscore.active(h, 4.0).any() and qscore.active(h, 3.8).sum() == 8


def test_regulariser_by_hand():
    """Q is 0.75, 0, 0.5, of which only 0 is below their mean; columns have norms 0, 1, 1, 2, of
    which only 2 is above their mean 1."""
    discriminative = torch.tensor([False, False, True, True])
    assert qscore.regulariser(H, discriminative, 0.9, 1.0, 0.0) == 0
    assert qscore.regulariser(H, discriminative, 0.9, 0.0, 3.0) == 6
    assert qscore.regulariser(H, discriminative, 0.9, 0.0, 0.0) == 0


def test_regulariser_gradient_raises_low_scores_and_is_finite_for_empty_sets():
    h = torch.tensor([[0.0, 0.1, 0.5, 0], [0, 0, 0, 1], [1, 0, 0, 0]], requires_grad=True)
    discriminative = torch.tensor([False, False, True, True])
    gradient, = torch.autograd.grad(qscore.regulariser(h, discriminative, 0.9, 1.0, 0.0), h)
    assert gradient[0, 2] < 0 and not gradient[1].any()     # its step raises h of the low one alone
    nothing = torch.zeros(4, dtype=torch.bool)
    gradient, = torch.autograd.grad(qscore.regulariser(h, nothing, 4.0, 1.0, 1.0), h)
    assert gradient.isfinite().all()


def test_planted_quality_is_found_and_random_sets_find_less(monkeypatch):
    """Each class has five of the features 64 to 113. A probe gets the images right that have one of
    them active; the others have feature 0, which is active in too many images to be in D."""
    monkeypatch.setattr(qscore, "RANDOM_PROBES", 1)
    n, y = 1200, torch.arange(1200) % 10
    good = torch.rand(n) < 0.6
    x = 0.01 * torch.rand(n, 128)
    x[torch.arange(n), torch.where(good, 64 + y + 10 * torch.randint(5, (n,)), 0)] = 1
    h = F.normalize(x, dim=1)
    row = qscore.measure_features(h[:600], y[:600], h[600:], y[600:], 4.0)
    assert row["auroc"] > 0.8 and row["auroc"] > row["random_95th_percentile"]
    assert row["sizes"]["0.6"]["features"] == 77


def test_the_command_writes_its_record(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(qscore, "RANDOM_SETS", 2)
    monkeypatch.setattr(qscore, "RANDOM_PROBES", 1)
    path = tiny_checkpoint.save(tmp_path / "ckpt.pt", "--batch-size", "16")
    qscore.main([path, "--train-images", "80", "--test-images", "40", "--device", "cpu",
                 "--q-l1", "1e-4", "--json", str(tmp_path / "record.json")])
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["variants"].keys() == qscore.EPSILON.keys()
    assert record["fine_tuning"].keys() == {"before", "without", "with"}
    assert "fine-tuning, with" in capsys.readouterr().out
