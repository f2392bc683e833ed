"""extras/regions.py and extras/pairs.py: the rank matrix of a hand-written scene, regions that are
known, memories that must not differ, and the drawn relations."""
import pytest
import torch
from torch.nn import functional as F

import checkpoint
import data
import flags
import teachers
from conftest import make_trainer
from extras import pairs, regions


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for module, name in ((checkpoint, "STUDENTS"), (data, "PUBLIC"), (data, "AUGMENT")):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    regions.register()


# ---- regions -------------------------------------------------------------------------------------

def test_clusters_are_the_planted_regions_of_each_image():
    """4 x 4 patches: an object of 4 in the corner, one of 2 in the middle, the ground."""
    ids = torch.tensor([[0, 0, 2, 2], [0, 0, 2, 2], [2, 1, 1, 2], [2, 2, 2, 2]]).flatten()
    ids = torch.stack([ids, ids.flip(0)])
    directions = F.one_hot(torch.arange(3), 8).float() * 5
    patches = directions[ids] + 0.1 * torch.randn(2, 16, 8)
    found = regions.cluster(patches, 3)
    for a, b in zip(found, ids):
        assert len({(int(i), int(j)) for i, j in zip(a, b)}) == 3      # one to one
    assert torch.equal(found, regions.cluster(patches, 3))              # and no randomness
    means, size = regions.region_means(patches, ids, 4)
    assert size.tolist() == [[4, 2, 10, 0]] * 2 and not means[:, 3].any()
    assert torch.allclose(means[0, 1], patches[0, [9, 10]].mean(0))
    assert regions.foreground(patches, ids, 4).tolist() == [[True, True, False, False]] * 2


def test_positions_are_x_then_y_in_the_order_of_patches():
    assert regions.grid(4).tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]


@pytest.mark.parametrize("b, relation", [((0.9, 0.5), "left"), ((0.1, 0.4), "right"),
                                         ((0.4, 0.9), "above"), ((0.6, 0.1), "below")])
def test_the_relation_is_of_the_larger_to_the_smaller(b, relation):
    """Region 2 is the largest, but ground; region 1 is larger than region 0."""
    centroids = torch.tensor([[b, (0.5, 0.5), (0.5, 0.5)]])
    size, front = torch.tensor([[3, 4, 9]]), torch.tensor([[True, True, False]])
    *triplet, predicate = regions.find_relation(centroids, size, front)
    assert [x.item() for x in triplet] == [1, 0]
    assert pairs.RELATIONS[predicate.item()] == relation


# ---- ranks ---------------------------------------------------------------------------------------

def test_the_rank_matrix_of_a_three_object_scene():
    """Objects at x = 0, 0.2 and 0.6; the first is in a relation to the third."""
    centroids = torch.tensor([[(0.0, 0.5), (0.2, 0.5), (0.6, 0.5)]])
    triplet = torch.tensor([0]), torch.tensor([2])
    ranks = regions.rank_matrix(centroids, torch.tensor([[5, 5, 5]]), triplet)
    assert ranks[0].tolist() == [
        [0, 4, 7, 6],           # its nearest is the second; the third would be 3, and is the object
        [4, 0, 3, 0],
        [3, 4, 0, 6],
        [5, 0, 5, 0]]           # the predicate
    alone = regions.rank_matrix(centroids, torch.tensor([[5, 5, 5]]))
    assert alone[0].tolist() == [[0, 4, 3], [4, 0, 3], [3, 4, 0]]


def test_only_the_four_nearest_count_and_no_empty_region():
    centroids = torch.tensor([[(0.1 * i, 0.0) for i in range(7)]])
    ranks = regions.rank_matrix(centroids, torch.ones(1, 7, dtype=torch.long))
    assert ranks[0, 0].tolist() == [0, 4, 3, 2, 1, 0, 0]
    size = torch.tensor([[1, 0, 1, 1, 1, 1, 1]])
    ranks = regions.rank_matrix(centroids, size)
    assert ranks[0, 0].tolist() == [0, 0, 4, 3, 2, 1, 0] and not ranks[0, 1].any()


def test_rank_weights_rise_whatever_is_learned():
    bias, ranks = regions.RankBias(), torch.arange(8)
    assert torch.allclose(bias(ranks), torch.arange(1.0, 9))            # a = 0: cumsum of ones
    for _ in range(20):
        with torch.no_grad():
            bias.a.add_(torch.randn(7))
        w = bias(ranks)
        assert w[0] == 1 and (w.diff() > 0).all()
    with torch.no_grad():
        bias.a.copy_(torch.tensor([1.0, 2, 3, 4, 5, 6, 7]))
    assert torch.allclose(bias(ranks), torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7]).exp().cumsum(0))


# ---- memory --------------------------------------------------------------------------------------

def memory_of(contents, count=3):
    torch.manual_seed(0)
    return regions.Memory(16, 2, contents, count).eval()


def test_without_ranks_additive_is_relations():
    """Equal weights cancel in the softmax: the ranks alone make the difference."""
    patches, ids = torch.randn(2, 16, 16), torch.arange(16).repeat(2, 1) % 3
    a, b = (memory_of(contents) for contents in ("relations", "additive"))
    assert not torch.allclose(a(patches, ids)[0], b(patches, ids)[0], atol=1e-3)
    b.bias.forward = lambda ranks: torch.full(ranks.shape, 2.5)
    assert torch.allclose(a(patches, ids)[0], b(patches, ids)[0], atol=1e-5)
    assert a(patches, ids)[0].shape == (2, 4, 16)
    assert memory_of("regions")(patches, ids)[0].shape == (2, 3, 16)


@pytest.mark.parametrize("contents", ["regions", "additive"])
def test_an_empty_region_has_no_weight(contents):
    """K = 5 with two empty regions is K = 3."""
    patches, ids = torch.randn(2, 16, 16), torch.arange(16).repeat(2, 1) % 3
    small, large = (memory_of(contents, count) for count in (3, 5))
    large.load_state_dict(small.state_dict())
    (x, none), (y, padding) = small(patches, ids), large(patches, ids)
    assert not none.any() and padding[0, :5].tolist() == [False] * 3 + [True] * 2
    assert torch.allclose(x[:, :3], y[:, :3], atol=1e-5)
    cross = regions.MaskedCrossAttention(16, 2)
    query, noise = torch.randn(2, 1, 16), torch.where(padding[..., None], 9.0, y)
    a, maps = cross(query, (y, padding))
    assert torch.allclose(a, cross(query, (noise, padding))[0])
    assert maps.shape == (2, 1, 2, y.shape[1]) and not maps[..., 3:5].any()


def test_without_padding_attention_is_the_cores():
    cross = regions.MaskedCrossAttention(16, 2)
    x, tokens = torch.randn(2, 1, 16), torch.randn(2, 5, 16)
    ours = cross(x, (tokens, torch.zeros(2, 5, dtype=torch.bool)))
    for a, b in zip(ours, regions.CrossAttention.forward(cross, x, tokens)):
        assert torch.allclose(a, b, atol=1e-5)


# ---- the student ---------------------------------------------------------------------------------

def make(tiny, *words):
    args = flags.parse(tiny("--recipe", "regions", "--regions", "3", *words))
    return make_trainer(args, teachers.load_teacher(args.teacher))


def test_patches_are_the_recipe_stable_to_the_bit(tiny):
    """The control is train.py itself: same losses, same parameters."""
    losses, students = [], []
    for words in (["--recipe", "stable", "--memory", "patches"],
                  ["--recipe", "regions", "--region-memory", "none"]):
        torch.manual_seed(0)
        args = flags.parse(tiny(*words))
        trainer = make_trainer(args, teachers.load_teacher(args.teacher))
        batches = trainer.tokens.batches(0, 0, 2)
        losses.append([trainer.step(z_t, i)["loss"] for i, z_t in enumerate(batches)])
        students.append(trainer.student.state_dict())
    assert torch.equal(*map(torch.stack, losses)) and students[0].keys() == students[1].keys()


@pytest.mark.parametrize("memory", ["regions", "relations", "additive"])
def test_a_step_trains_the_memory_and_maps_are_of_patches(tiny, memory):
    trainer = make(tiny, "--region-memory", memory)
    before = {n: p.clone() for n, p in trainer.student.named_parameters()}
    z_t = next(trainer.tokens.batches(0, 0, 1))
    trainer.student.train()
    for step in range(2):
        trainer.step(z_t, step)
    moved = {n for n, p in trainer.student.named_parameters() if not torch.equal(p, before[n])}
    prefix = "descriptor.memory."
    assert prefix + "types" in moved and prefix + "block.mlp.0.weight" in moved
    assert (prefix + "predicates" in moved) == (memory != "regions")
    assert (prefix + "bias.a" in moved) == (memory == "additive")
    student = trainer.student.eval()
    inputs = student.preprocess(z_t)
    maps = student.describe(inputs, hard=True, attention=True).attention        # (B, T, N)
    assert maps.shape == (len(z_t), 8, 4) and torch.allclose(maps.sum(-1), torch.ones(()))
    ids = regions.cluster(inputs[:, 1:], 3)
    for row, region in zip(maps[:, 0], ids):                # equal within a region
        assert all(row[region == r].std(unbiased=False) < 1e-6 for r in region.unique())


def test_a_checkpoint_of_regions_is_loaded_where_they_are_registered(tiny, tmp_path, monkeypatch):
    trainer = make(tiny)
    state = checkpoint.state_of(trainer)
    torch.save(state, tmp_path / "ckpt.pt")
    _, _, student = checkpoint.load_model(tmp_path / "ckpt.pt")
    z_t = next(trainer.tokens.first(8))
    both = [s.eval().describe(s.preprocess(z_t), hard=True).ids for s in (trainer.student, student)]
    assert torch.equal(*both)
    monkeypatch.delitem(checkpoint.STUDENTS, "regions")
    with pytest.raises(ValueError, match="does not fit this version of the code"):
        checkpoint.load_model(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("words", [("--regions", "2"), ("--memory", "all")])
def test_what_cannot_be_is_one_clear_line(tiny, words):
    with pytest.raises(ValueError, match="--regions must be at least 3, and --memory patches"):
        make(tiny, *words)


# ---- the drawn scenes ----------------------------------------------------------------------------

def middle(mask):
    y, x = mask.nonzero().float().mean(0)
    return x.item(), y.item()


def test_the_class_is_the_relation_of_the_first_object_to_the_second():
    images, relation, masks = pairs.draw_pairs(range(200), "train")
    assert images.shape == (200, 3, 32, 32) and images.dtype == torch.uint8
    assert relation.bincount().min() > 30
    for mask, r in zip(masks, relation.tolist()):
        (x1, y1), (x2, y2) = middle(mask == 1), middle(mask == 2)
        expected = ["left", "right", "above", "below"].index(
            ("left" if x1 < x2 else "right") if abs(x1 - x2) > abs(y1 - y2)
            else ("above" if y1 < y2 else "below"))
        assert r == expected
    assert (masks > 0).flatten(1).sum(1).min() > 60


def test_swapped_objects_exchange_their_positions_and_nothing_else():
    images, relation, masks = pairs.draw_pairs(range(40), "test")
    swapped, other, exchanged = pairs.draw_pairs(range(40), "test", swapped=True)
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    names = [[pairs.RELATIONS[r] for r in x] for x in (relation, other)]
    assert [opposite[name] for name in names[0]] == names[1]
    for a, b in zip(masks, exchanged):
        for i in (1, 2):
            assert abs((a == i).sum() - (b == i).sum()) < 12            # the same object ...
            (x, y), (x2, y2) = middle(a == i), middle(b == 3 - i)
            assert abs(x - x2) < 1.5 and abs(y - y2) < 1.5              # ... where the other was
    ground = (masks == 0) & (exchanged == 0)
    same = (images == swapped).all(1)
    assert same[ground].float().mean() > 0.9            # all but soft edges


def test_pairs_are_a_data_set(monkeypatch):
    monkeypatch.setitem(pairs.COUNTS, "train", 100)
    images = data.load("pairs", "train", 32, 50, 0)
    assert len(images) == 50 and images.classes == pairs.RELATIONS
    assert images.images.shape == (50, 3, 32, 32)
    assert data.augmentation("pairs", 32).flip == 0


def test_the_oracles_regions_are_the_masks(tiny, monkeypatch):
    """Found by the CLS of the image itself, also among 1000 others."""
    monkeypatch.setattr(pairs, "COUNTS", {"train": 500, "test": 500})        # one batch each
    torch.manual_seed(0)
    teacher = teachers.small_vit(32, 4, 64, 1, 1).eval()
    monkeypatch.setattr(teachers, "load_teacher", lambda name: teacher)
    args = flags.parse(tiny("--recipe", "regions", "--oracle", "--data", "pairs", "--teacher",
                            "planted", "--image-size", "32"))
    student = regions.RegionStudent(args, 64)
    images, _, masks = pairs.draw_pairs(range(7, 12), "test", swapped=True)
    with torch.no_grad():
        z_t = teacher(data.normalize(images))
    ids = student.descriptor.memory.segment(student.preprocess(z_t))
    cover = torch.stack([F.avg_pool2d((masks == i).float(), 4).flatten(1) for i in range(3)], 1)
    assert torch.equal(ids, cover.argmax(1))
    regions.oracle_table.cache_clear()


def test_the_swapped_order_test_on_planted_features(monkeypatch, tmp_path):
    """z_s is the relation, or its axis alone (a code without order); the CLS is the relation."""
    config = {"data": "pairs"}
    monkeypatch.setattr(pairs, "ORDER_COUNTS", {"train": 200, "test": 200})
    monkeypatch.setattr(checkpoint, "load_model", lambda *_: (config, None, None))

    def planted(order):
        def encode(student, teacher, images, size):
            y = images.labels if order else images.labels // 2 * 2
            cls, z_s = (F.one_hot(x, 4).float() + 0.01 * torch.randn(len(x), 4)
                        for x in (images.labels, y))
            return {"z": [z_s], "cls": cls, "space": cls}
        return encode
    monkeypatch.setattr(pairs.evaluate, "encode", planted(True))
    perfect = {"relation_top1": 100, "order": 100, "order_of_both": 100}
    assert pairs.order_test("x", "cpu") == {"z_s": perfect, "cls": perfect, "space": perfect}
    monkeypatch.setattr(pairs.evaluate, "encode", planted(False))
    figures = pairs.order_test("x", "cpu")
    assert figures["cls"] == perfect
    assert abs(figures["z_s"]["order"] - 50) < 10
    assert abs(figures["z_s"]["relation_top1"] - 50) < 10
    config["data"] = "shapes"
    with pytest.raises(ValueError, match="not trained on --data pairs"):
        pairs.order_test("x", "cpu")
