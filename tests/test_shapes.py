"""shapes.py: an image is a function of (seed, index), and the masks are where the object is."""
import hashlib

import pytest
import torch
from PIL import Image

import shapes

GOLDEN = {
    "factors": [[0, 8, 8, 4], [1, 6, 3, 3], [0, 2, 0, 1], [1, 1, 1, 1], [1, 2, 2, 0]],
    "pixels": [[78, 253, 244, 82], [81, 147, 141, 84], [76, 63, 60, 80]],
    "areas": [133, 162, 72, 92],
}


@pytest.fixture(scope="module")
def drawn():
    """(images, factors, masks) of 4000 training images."""
    return shapes.load("train", 4000)


def test_an_image_depends_on_seed_and_index_alone():
    images, factors, masks = shapes.draw_shapes(range(20), seed=3)
    again, same, cover = shapes.draw_shapes([7, 3], seed=3)
    assert torch.equal(images[[7, 3]], again) and torch.equal(masks[[7, 3]], cover)
    assert all(torch.equal(factors[name][[7, 3]], same[name]) for name in shapes.FACTORS)
    assert not torch.equal(images, shapes.draw_shapes(range(20), seed=4)[0])


def test_images_are_the_same_on_every_machine():
    """A few numbers of the first image of stream 0, as first drawn: a change here changes every
    result."""
    images, factors, masks = shapes.draw_shapes(range(4), seed=0)
    assert [v.tolist() for v in factors.values()] == GOLDEN["factors"]
    # sin and cos may differ in the last bit between processors: one grey level at the most
    assert (images[0, :, 16, 8:24:5].int() - torch.tensor(GOLDEN["pixels"])).abs().max() <= 1
    assert masks.sum((1, 2)).tolist() == GOLDEN["areas"]


def test_factors_of_many_images_are_as_first_drawn(drawn):
    """Factors come from whole numbers alone, so that they are the same to the bit everywhere."""
    table = torch.stack(list(drawn[1].values())).numpy()                            # (5, 4000)
    assert hashlib.sha256(table.tobytes()).hexdigest()[:16] == "ee07400bd17cf4e3"


def test_train_test_and_seeds_are_different_streams():
    sets = [shapes.load(split, 50, seed)[0] for split in ("train", "test") for seed in (0, 1)]
    assert len({images.numpy().tobytes() for images in sets}) == 4
    assert torch.equal(sets[1], shapes.draw_shapes(range(50), seed=2)[0])
    assert torch.equal(sets[2], shapes.draw_shapes(range(50), seed=1)[0])


def test_loading_in_parts_changes_nothing(drawn):
    images, factors, masks = shapes.draw_shapes(range(1990, 2010))              # parts of 2000
    assert torch.equal(drawn[0][1990:2010], images) and torch.equal(drawn[2][1990:2010], masks)
    assert torch.equal(drawn[1]["row"][1990:2010], factors["row"])


def test_factors_are_balanced_and_independent(drawn):
    factors = drawn[1]
    for name, values in shapes.FACTORS.items():
        share = factors[name].bincount(minlength=len(values)) / 4000
        assert (share - 1 / len(values)).abs().max() < 0.03
    pairs = factors["shape"], factors["colour"]
    table = torch.zeros(10, 8).index_put_(pairs, torch.ones(()), True)
    assert (table / 4000 - 1 / 80).abs().max() < 0.008


def test_masks_cover_the_object(drawn):
    """The object is more saturated than the background, and lies where its factors put it."""
    images, factors, masks = drawn[0][:300], {k: v[:300] for k, v in drawn[1].items()}, drawn[2]
    saturation = images.amax(1).float() - images.amin(1).float()                    # (n, H, W)
    inside = torch.stack([s[m].mean() for s, m in zip(saturation, masks)])
    outside = torch.stack([s[~m].mean() for s, m in zip(saturation, masks)])
    assert (inside > outside + 40).float().mean() > 0.99
    line = torch.arange(32.0)
    for name, pixels in (("row", line[:, None].expand(32, 32)), ("column", line.expand(32, 32))):
        middle = torch.stack([pixels[m].mean() for m in masks[:300]])
        means = [middle[factors[name] == k].mean() for k in range(3)]
        assert means[0] + 2 < means[1] < means[2] - 2


def test_signed_distances_are_those_of_the_outlines():
    """Points on, inside and outside of outlines that are easy by hand, in units of the radius."""
    x, y = torch.tensor([0.0, 0.9, 3.0]), torch.tensor([0.0, 0.0, 4.0])
    assert torch.allclose(shapes.signed_distance(0, x, y), torch.tensor([-0.9, 0.0, 4.1]))
    assert torch.allclose(shapes.signed_distance(1, x, y), torch.tensor([0.44, -0.02, 4.08]))
    assert torch.allclose(shapes.signed_distance(2, x, y), torch.tensor([-0.8, 0.1, 3.2]))


def test_hsv_to_rgb_is_colorsys():
    import colorsys
    values = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
    ours = shapes.hsv_to_rgb(360 * values[:, 0], values[:, 1], values[:, 2])[..., 0, 0]
    assert torch.allclose(ours, torch.tensor([colorsys.hsv_to_rgb(*v) for v in values.tolist()]),
                          atol=1e-5)


def test_the_script_prints_the_first_image_and_draws_a_row_for_each_shape(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shapes.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("drew 500 images of 32 x 32 pixels in ")
    assert [line.split()[:2] for line in printed[1:-1]] == [
        ["shape", "disc"], ["colour", "orange"], ["size", "small"], ["column", "middle"],
        ["row", "middle"], ["mask", "133"]]                 # GOLDEN's first
    assert printed[-1] == "shapes.png: a row for each shape, 10 images each"
    sheet = Image.open("shapes.png")
    assert sheet.size == (960, 960)                         # each pixel three times as large
    images, factors, _ = shapes.draw_shapes(range(100))
    ring = images[factors["shape"] == 1][0]
    assert sheet.getpixel((3 * 16, 3 * (32 + 16))) == tuple(ring[:, 16, 16].tolist())
