"""extras/slots.py: slots and k-means on tokens that are known functions of the objects."""
import json

import pytest
import torch
import torch.nn.functional as F

from data import ImageSet
from extras import slots


def planted(n):
    """n images of 4 x 4 patches of one pixel with two objects of 2 x 2 patches, of different kinds
    of six, at two of four corners -> tokens (n, 16, 7), masks (n, 4, 4)."""
    kind = torch.rand(n, 6).argsort(1)[:, :2]
    corner = torch.rand(n, 4).argsort(1)[:, :2]
    masks = torch.zeros(n, 4, 4, dtype=torch.uint8)
    label = torch.zeros(n, 4, 4, dtype=torch.long)
    for k in range(2):
        blocks = F.one_hot(corner[:, k], 4).view(n, 2, 2).repeat_interleave(2, 1)
        blocks = blocks.repeat_interleave(2, 2).bool()
        masks[blocks] = k + 1
        label = torch.where(blocks, 1 + kind[:, k, None, None], label)
    tokens = torch.eye(12)[label].flatten(1, 2)[..., :7] * 3
    return tokens + 0.1 * torch.randn_like(tokens), masks


class Planted(torch.nn.Module):
    """A teacher whose token of a patch is the embedding of the pixel's value; CLS: 0."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens

    def forward(self, x):
        index = ((x[:, 0, 0, 0] * 0.229 + 0.485) * 255).round().long() + 256 * (
            (x[:, 1, 0, 0] * 0.224 + 0.456) * 255).round().long()
        return torch.cat([torch.zeros(len(x), 1, 7), self.tokens[index]], 1)


@pytest.fixture
def world(monkeypatch):
    """1200 planted images, 800 to train on and 400 to test; a teacher that has their tokens."""
    tokens, masks = planted(1200)
    number = torch.arange(1200)
    images = torch.zeros(1200, 3, 4, 4, dtype=torch.uint8)
    images[:, 0], images[:, 1] = ((number % 256).byte()[:, None, None],
                                  (number // 256).byte()[:, None, None])
    image_set = ImageSet(images, torch.zeros(1200).long(), ["a"], {}, masks)
    halves = [image_set.subset(number[:800]), image_set.subset(number[800:])]
    monkeypatch.setattr(slots.teachers, "load_teacher", lambda name: Planted(tokens))
    monkeypatch.setattr(slots.evaluate, "load_splits", lambda config: halves)
    return tokens, masks


def run(method, path, *flags):
    slots.run(slots.parse(["--method", method, "--image-size", "4", "--slots", "3",
                           "--hidden", "32", "--batch-size", "32", "--device", "cpu",
                           "--precision", "float32", "--json", str(path), *flags]))
    return json.loads(path.read_text())


def test_kmeans_finds_planted_objects(world, tmp_path, capsys):
    record = run("kmeans", tmp_path / "r.json")
    for name in ("foreground_ari", "mean_best_overlap"):
        assert record[name]["measured"] > 0.95 > 0.9 > record[name]["chance"]   # four corners only
    assert record["slots"] == 3 and record["method"] == "kmeans"
    assert "foreground_ari" in capsys.readouterr().out


def test_slots_run_and_their_loss_is_the_share_of_variance(world, tmp_path):
    """Untrained, the reconstruction is nearly 0 and the tokens have unit variance."""
    record = run("slots", tmp_path / "r.json", "--steps", "3", "--lr", "1e-9")
    assert record["reconstruction_loss"] == pytest.approx(1, abs=0.1)
    assert record["foreground_ari"]["measured"] < 0.5
    assert record["teacher"] == "shapes" and record["steps"] == 3


def test_slots_compete_for_patches_and_alpha_sums_to_1():
    model = slots.Autoencoder(16, 9, 4, 8)
    reconstruction, alpha = model(torch.randn(5, 9, 16))
    assert reconstruction.shape == (5, 9, 16) and alpha.shape == (5, 4, 9)
    assert torch.allclose(alpha.sum(1), torch.ones(5, 9), atol=1e-5)
    reconstruction.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_kmeans_takes_the_best_of_its_starts():
    """Three tight groups of four tokens: a start with two centroids in one group ends badly."""
    groups = torch.tensor([[0.0, 0], [10, 0], [0, 30]]).repeat_interleave(4, 0)
    tokens = (groups + 0.1 * torch.randn(50, 12, 2))
    chosen = slots.kmeans(tokens, 3)
    assert chosen.shape == (50, 3, 12) and (chosen.sum(1) == 1).all()
    same = chosen.transpose(1, 2) @ chosen
    expected = torch.eye(3).repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert (same == expected).flatten(1).all(1).float().mean() > 0.95
    once = slots.kmeans(tokens, 3, starts=1)
    assert (once.transpose(1, 2) @ once == expected).flatten(1).all(1).float().mean() < 0.9
