"""scenes.py: a scene is a function of (seed, index), its objects do not touch, and its factors and
masks are those of the objects that are drawn."""
import hashlib

import pytest
import torch
from PIL import Image

import data
import flags
import scenes

PIXELS = [[230, 74, 64, 234], [166, 60, 52, 10], [67, 44, 49, 206]]
AREAS = [2048, 116, 94, 46]


@pytest.fixture(scope="module")
def drawn():
    """(images, factors, masks) of 1000 training scenes."""
    return scenes.load("train", 1000)


def test_a_scene_depends_on_seed_and_index_alone(drawn):
    again, factors, masks = scenes.draw_scenes([703, 7])
    assert torch.equal(drawn[0][[703, 7]], again) and torch.equal(drawn[2][[703, 7]], masks)
    assert all(torch.equal(drawn[1][name][[703, 7]], factors[name]) for name in scenes.FACTORS)
    assert not torch.equal(again, scenes.draw_scenes([703, 7], seed=1)[0])
    assert torch.equal(scenes.load("test", 5, 1)[0], scenes.draw_scenes(range(5), seed=3)[0])


def test_scenes_are_the_same_on_every_machine(drawn):
    """As first drawn: a change here changes every result. Factors come from whole numbers."""
    table = torch.stack(list(drawn[1].values())).numpy()                            # (5, 1000, 4)
    assert hashlib.sha256(table.tobytes()).hexdigest()[:16] == "7c2c2fe83db99adc"
    assert [scenes.describe(drawn[1], 0, k) for k in range(3)] == [
        "large magenta triangle, middle right", "medium orange heart, top left",
        "small azure crescent, bottom right"]
    assert (drawn[0][0, :, 16, 8:48:10].int() - torch.tensor(PIXELS)).abs().max() <= 1
    assert drawn[2][0].flatten().bincount().tolist() == AREAS


def test_objects_are_2_to_4_the_first_is_the_largest_and_they_do_not_touch(drawn):
    _, factors, masks = drawn
    number = (factors["shape"] >= 0).sum(1)
    assert (number.bincount() / 1000 - torch.tensor([0, 0, 1, 1, 1]) / 3).abs().max() < 0.05
    assert all(torch.equal(values >= 0, torch.arange(4) < number[:, None])
               for values in factors.values())                  # absent objects are the last ones
    assert torch.equal(masks.flatten(1).amax(1).long(), number)
    assert (factors["size"][:, 0] == 2).all() and (factors["size"].diff(dim=1) <= 0).all()
    assert set(factors["size"][:, 1:].unique().tolist()) == {-1, 0, 1}
    # no two objects have pixels side by side
    for a, b in ((masks[:, 1:], masks[:, :-1]), (masks[:, :, 1:], masks[:, :, :-1])):
        assert ((a != b) & (a > 0) & (b > 0)).sum() == 0


def test_masks_lie_where_column_and_row_put_them_and_are_saturated(drawn):
    images, factors, masks = (drawn[0], drawn[1], drawn[2])
    saturation = images.amax(1).float() - images.amin(1).float()                # (n, 48, 48)
    axis = torch.arange(48.0) + 0.5
    background = (saturation * (masks == 0)).sum((1, 2)) / (masks == 0).sum((1, 2))
    for k in range(3):
        some = factors["shape"][:, k] >= 0
        mask = (masks[some] == k + 1).float()
        area = mask.sum((1, 2))
        assert ((mask * saturation[some]).sum((1, 2)) / area > background[some] + 20).all()
        for name, weights in (("column", mask.sum(1)), ("row", mask.sum(2))):
            middle = (weights * axis).sum(1) / area
            # of a crescent the mean lies beside the middle that was drawn
            assert ((middle / 16).floor() - factors[name][some, k] == 0).float().mean() > 0.85


def test_factors_of_the_objects_are_balanced_and_independent(drawn):
    for name in ("shape", "colour"):
        present = drawn[1][name][drawn[1][name] >= 0]
        share = present.bincount() / len(present)
        assert (share - 1 / len(scenes.FACTORS[name])).abs().max() < 0.02
    first, second = drawn[1]["shape"][:, :2].T
    assert abs((first == second).float().mean() - 0.1) < 0.03


def test_an_object_without_a_place_is_left_out():
    """Three large objects that fill the corners leave no place for the fourth."""
    size, present = torch.full((200, 4), 2), torch.ones(200, 4, dtype=torch.bool)
    u = torch.rand(4, 200, generator=torch.Generator().manual_seed(0))
    x, y, placed = scenes.choose_positions(u, size, present)
    assert placed[:, 0].all() and 0 < placed[:, 3].float().mean() < 1
    for a in range(4):
        for b in range(a):
            both = placed[:, a] & placed[:, b]
            assert ((x[:, a] - x[:, b]) ** 2 + (y[:, a] - y[:, b]) ** 2 >= 22**2)[both].all()


def test_the_data_set_is_that_of_its_file_and_its_class_the_largest_objects_shape(drawn):
    images = data.load("scenes", "train", 48, 20)
    assert torch.equal(images.images, drawn[0][:20]) and torch.equal(images.masks, drawn[2][:20])
    assert torch.equal(images.labels, drawn[1]["shape"][:20, 0]) and images.labelled
    part = images.subset(torch.tensor([3, 11]))
    assert torch.equal(part.factors["row"], drawn[1]["row"][[3, 11]])


def test_the_script_prints_the_first_scene_and_draws_60(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scenes.main()
    printed = [line for line in capsys.readouterr().out.splitlines()
               if not line.startswith("drawing scenes")]           # progress, on a slow machine
    assert printed[1].split()[-2:] == [str(AREAS[1]), "pixels"] and len(printed) == 5
    assert Image.open("scenes.png").size == (1440, 864)


def test_the_default_image_size_is_that_of_the_data_set():
    assert flags.parse(["--data", "scenes"]).image_size == 48
    assert flags.parse(["--data", "scenes", "--image-size", "32"]).image_size == 32
    assert flags.parse([]).image_size == 32
