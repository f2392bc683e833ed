"""extras/probe_teacher.py on scenes: tokens that are known functions of the objects."""
import json

import pytest
import torch

import scenes
from data import ImageSet
from extras import probe_teacher


def test_average_precision_by_hand():
    scores, truth = torch.tensor([0.9, 0.8, 0.7, 0.1]), torch.tensor([True, False, True, False])
    assert probe_teacher.average_precision(scores, truth) == pytest.approx((1 + 2 / 3) / 2)
    assert probe_teacher.average_precision(-scores, truth) == pytest.approx((1 / 2 + 2 / 4) / 2)


def test_present_values_are_multi_hot():
    values = torch.tensor([[2, 0, -1, -1], [1, 1, 2, -1]])
    assert probe_teacher.multi_hot(values).tolist() == [[True, False, True], [False, True, True]]


class Planted(torch.nn.Module):
    """A teacher whose patch tokens are the colour's one-hot vector where an object covers the patch
    by half or more, with noise; the CLS is noise. Images carry their index in the first pixel."""
    image_size = 48

    def __init__(self, colours, cover):
        super().__init__()
        hot = torch.nn.functional.one_hot(colours.clamp(min=0), 8).float()      # (n, 4, 8)
        self.tokens = (cover >= 0.5).float().transpose(1, 2) @ hot              # (n, 144, 8)

    def forward(self, x):
        index = ((x[:, 0, 0, 0] * 0.229 + 0.485) * 255).round().long() + 256 * (
            (x[:, 1, 0, 0] * 0.224 + 0.456) * 255).round().long()
        z_t = torch.cat([torch.zeros(len(x), 1, 8), self.tokens[index]], 1)
        return z_t + 0.05 * torch.randn(z_t.shape)


def test_a_teacher_with_the_colours_in_its_patch_tokens_alone(tmp_path, monkeypatch, capsys):
    images, factors, masks = scenes.load("test", 800)
    number = torch.arange(800)
    images[:, 0, 0, 0], images[:, 1, 0, 0] = (number % 256).byte(), (number // 256).byte()
    image_set = ImageSet(images, factors["shape"][:, 0], scenes.FACTORS["shape"], factors, masks)
    teacher = Planted(factors["colour"], probe_teacher.object_cover(masks, 144))
    monkeypatch.setattr(probe_teacher.teachers, "load_teacher", lambda name: teacher)
    halves = [image_set.subset(number[:500]), image_set.subset(number[500:])]
    monkeypatch.setattr(probe_teacher.evaluate, "load_splits", lambda config: halves)
    probe_teacher.run(probe_teacher.parse(["planted", "--data", "scenes", "--device", "cpu",
                                           "--precision", "float32", "--json",
                                           str(tmp_path / "probe.json")]))
    figures = json.loads((tmp_path / "probe.json").read_text())
    colour, shape = figures["colour"], figures["shape"]
    assert colour["patch"] > 97 and colour["object"] > 97 and colour["present_mean"] > 97
    assert colour["present_cls"] < colour["present_chance"] + 8 and colour["largest_cls"] < 25
    assert shape["patch"] < 20 and shape["object"] < 25 and shape["present_mean"] < 40
    assert figures["class"]["knn_top1_k20"] < 20 and "largest_cls" not in figures["size"]
    assert "\ncolour " in capsys.readouterr().out
