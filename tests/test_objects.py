"""extras/objects.py: planted segmentations and symbols, and what they must get."""
import pytest
import torch

import scenes
from extras import objects


@pytest.fixture(scope="module")
def drawn():
    """(images, factors, masks) of 600 test scenes."""
    return scenes.load("test", 600)


def brute_force_ari(a, b):
    """Over all pairs of pixels: agreements above their expectation, over their maximum."""
    i, j = torch.combinations(torch.arange(len(a))).T
    same_a, same_b = (a[i] == a[j]).double(), (b[i] == b[j]).double()
    expected, most = same_a.mean() * same_b.mean(), (same_a.mean() + same_b.mean()) / 2
    return (((same_a * same_b).mean() - expected) / (most - expected)).item()


def test_ari_is_that_of_all_pairs_of_foreground_pixels():
    masks, segments = torch.randint(4, (5, 6, 6)), torch.randint(3, (5, 6, 6))
    expected = [brute_force_ari(m[m > 0], s[m > 0]) for m, s in zip(masks, segments)]
    assert objects.foreground_ari(masks, segments) == pytest.approx(sum(expected) / 5)


def test_segments_equal_to_the_masks_get_1_and_random_ones_0(drawn):
    masks = drawn[2]
    renamed = torch.tensor([7, 3, 0, 5, 1])[masks.long()]
    assert objects.foreground_ari(masks, renamed) == objects.best_overlap(masks, renamed) == 1
    random = torch.randint(8, masks.shape)
    assert abs(objects.foreground_ari(masks, random)) < 0.005
    assert objects.best_overlap(masks, random) < 0.1
    split = renamed + 8 * torch.randint(2, masks.shape)         # each object in two halves
    assert 0.1 < objects.foreground_ari(masks, split) < 0.9
    assert objects.best_overlap(masks, split) == pytest.approx(0.55, abs=0.05)


def test_one_segment_for_all_and_one_object_alone():
    masks = torch.tensor([[[0, 1], [1, 2]]])
    assert objects.foreground_ari(masks, torch.zeros_like(masks)) == 0
    assert objects.best_overlap(masks, torch.zeros_like(masks)) == pytest.approx((0.5 + 0.25) / 2)
    assert objects.foreground_ari(masks.clamp(max=1), torch.zeros_like(masks)) == 1


def test_the_segment_is_the_symbol_that_attends_most(drawn):
    """Maps that are the objects' covers cut the image at the borders of the patches."""
    masks = drawn[2]
    cover = objects.object_cover(masks, 144)                                    # (n, 4, 144)
    assert cover.shape == (600, 4, 144)
    assert torch.allclose(cover.sum(2) * 16, torch.stack([(masks == k).sum((1, 2)).float()
                                                          for k in range(1, 5)], 1))
    background = 1 - cover.sum(1, keepdim=True)
    segments = objects.segment(torch.cat([3 * cover, background], 1), 48)
    assert objects.foreground_ari(masks, segments) == pytest.approx(0.97, abs=0.01)
    assert objects.best_overlap(masks, segments) == pytest.approx(0.62, abs=0.01)
    shuffled = segments[torch.randperm(600)]
    assert objects.foreground_ari(masks, shuffled) < 0.3


def test_another_object_is_of_the_image_and_another_one():
    present = torch.arange(4) < torch.tensor([2, 3, 4]).repeat_interleave(500)[:, None]
    attended = torch.zeros(1500, 2, dtype=torch.long)
    attended[:, 1] = 1
    other = objects.another_object(attended, present)
    assert (other != attended).all() and present.gather(1, other).all()
    assert (other[1000:, 0].bincount() / 500 - torch.tensor([0, 1, 1, 1]) / 3).abs().max() < 0.07


def test_binding_of_symbols_that_name_the_attended_object_or_anything_else():
    """Four symbols: the shape of the object attended to; its shape or, half of the time, noise; the
    shape of the largest object, whatever it attends to; noise."""
    number = torch.randint(2, 5, (6000,))
    present = torch.arange(4) < number[:, None]
    factors = {name: torch.randint(count, (6000, 4)).where(present, -1)
               for name, count in (("shape", 10), ("colour", 8), ("row", 3))}
    cover = torch.eye(4)[None] * present[..., None]             # object k covers patch k of four
    target = (torch.rand(4, 6000) * number).long().T                            # (n, T)
    maps = 0.1 + torch.eye(4)[target]                                           # (n, T, N)
    attended = objects.attended_object(maps, cover)
    assert torch.equal(attended, target)
    shape = factors["shape"].gather(1, attended)
    noise = torch.randint(10, shape.shape)
    half = torch.where(torch.rand(len(shape)) < 0.5, shape[:, 1], noise[:, 1])
    ids = torch.stack([shape[:, 0], half, factors["shape"][:, 0], noise[:, 3]], 1)
    rows = objects.binding(ids, attended, factors, 12)
    own, other = rows["shape"]["attended"], rows["shape"]["another"]
    assert own[0] == pytest.approx(10, rel=0.1) and other[0] == pytest.approx(1, abs=0.15)
    # P(shape | symbol) = 0.55: right with lift 5.5, else 0.5, of which 0.55 and 0.45 of the images
    assert own[1] == pytest.approx(0.55 * 5.5 + 0.45 * 0.5, rel=0.1)
    assert other[1] == pytest.approx(1, abs=0.15)
    # one of three attended objects is the largest one, as is one of three others
    assert own[2] == pytest.approx(other[2], rel=0.25) and own[2] > 1.5
    assert own[3] == pytest.approx(1, abs=0.05) and other[3] == pytest.approx(1, abs=0.05)
    for name in ("colour", "row"):
        assert (rows[name]["attended"] - 1).abs().max() < 0.1
    assert objects.attends_largest(attended).tolist() == pytest.approx([13 / 36] * 4, abs=0.03)


def test_lifts_by_hand():
    ids, values = torch.tensor([[0], [0], [1], [1]]), torch.tensor([[0], [0], [1], [0]])
    table = objects.lift_table(ids, values, 3, 2, prior=0)
    assert table.shape == (1, 3, 2)
    assert table[0, :2].flatten().tolist() == pytest.approx([1 / 0.75, 0, 0.5 / 0.75, 0.5 / 0.25])
    table = objects.lift_table(ids, values, 3, 2, prior=2)              # P(0 | 0) = (2 + 1.5) / 4
    assert table[0, 0].tolist() == pytest.approx([3.5 / 4 / 0.75, 0.5 / 4 / 0.25])
    assert table[0, 2].tolist() == pytest.approx([1, 1])                # never emitted
