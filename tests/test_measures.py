"""extras/measures.py: codes that are known functions of the factors, and planted attention."""
import json
import math
from functools import partial

import pytest
import tiny_checkpoint
import torch
import torch.nn.functional as F

import checkpoint
import data
import scenes
from data import ImageSet
from extras import measures, objects
from progress import Progress
from shapes import FACTORS, draw_shapes

SIZES = [len(values) for values in FACTORS.values()]                            # 10, 8, 3, 3, 3
FIRST = torch.tensor([0, *SIZES]).cumsum(0)[:-1]        # each factor's first symbol
GRID = torch.cartesian_prod(*[torch.arange(size) for size in SIZES])    # (2160, 5), independent
PLANTED = GRID + FIRST            # the planted code: symbol t is factor t; K = 27


def shuffled(x):
    return x[torch.randperm(len(x))]


def in_any_order(ids):
    return ids.gather(1, torch.rand(ids.shape).argsort(1))


def test_mutual_information_of_a_code_that_is_the_factors():
    bits = measures.mutual_information(PLANTED, GRID)
    assert torch.allclose(bits, torch.tensor(SIZES).double().log2().diag(), atol=1e-9)


def test_mutual_information_by_hand():
    """H(x) = 1, H(y) = 2 - 3/4 log2 3 = 0.8113, H(x, y) = 1.5 bits."""
    x, y = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])[..., None]
    assert measures.mutual_information(x, y).item() == pytest.approx(0.311278)


def test_chance_of_mutual_information_is_its_bias():
    """An unrelated code has as much as its permutations: (X-1)(Y-1) / (2 n ln 2) bits."""
    ids = torch.randint(16, (2000, 1))
    factors = torch.randint(10, (2000, 1))
    measured = measures.mutual_information(ids, factors).item()
    expected = 15 * 9 / (2 * 2000 * 0.693147)
    by_chance = measures.chance(lambda f: measures.mutual_information(ids, f), factors, 20).item()
    assert by_chance == pytest.approx(expected, rel=0.1)
    assert measured == pytest.approx(expected, rel=0.4)


def test_disentanglement_of_ordered_and_unordered_symbols():
    """In any order, the bag of symbols still determines the factors, the positions do not."""
    unordered = in_any_order(PLANTED)
    counts = [measures.symbol_counts(ids, 27) for ids in (PLANTED, unordered)]
    assert torch.equal(*counts) and counts[0].sum() == PLANTED.numel()
    assert measures.disentanglement(PLANTED, GRID) == pytest.approx(1)
    assert measures.disentanglement(counts[0], GRID) == pytest.approx(1)
    assert measures.disentanglement(unordered, GRID) < 0.05


def test_disentanglement_of_entangled_constant_and_shuffled_symbols():
    both = GRID[:, :1] + 10 * GRID[:, 1:2]              # one symbol for shape and colour
    gap = math.log(10 / 8, 80)
    assert measures.disentanglement(both, GRID) == pytest.approx(gap)
    assert measures.disentanglement(torch.cat([both, both * 0], 1), GRID) == pytest.approx(gap)
    assert measures.disentanglement(both * 0, GRID) == 0
    assert measures.disentanglement(shuffled(PLANTED), GRID) < 0.02


def test_lift_purity():
    halves = torch.randperm(len(GRID)).tensor_split(2)

    def share(ids, least=10):
        return measures.lift_purity(ids, GRID, halves, 40, least)

    assert share(PLANTED) == 1 and share(in_any_order(PLANTED)) == 1    # 27 of 27 in use, of K = 40
    assert share(shuffled(PLANTED)) == 0
    nothing = torch.randint(27, 40, (len(GRID), 1))                 # 13 symbols more, at random
    assert share(torch.cat([PLANTED, nothing], 1)) == 27 / 40
    first = PLANTED[:, :1]                              # each symbol is 108 times in a half
    assert share(first, 50) == 1 and share(first, 300) == 0


def test_a_lift_of_two_must_hold_on_the_second_half():
    """Symbols 0 and 1 swap their values between the halves; 2 and 3 have a lift of 4 on both."""
    factors = torch.arange(4).repeat(100)[:, None]
    ids, halves = factors.clone(), torch.arange(400).split(200)
    ids[200:] = torch.tensor([1, 0, 2, 3])[factors[200:]]
    assert measures.lift_purity(ids, factors, halves, 4) == 0.5
    assert measures.lift_purity(factors, factors, halves, 4, lift=4.0) == 1
    assert measures.lift_purity(factors, factors, halves, 4, lift=4.1) == 0


def test_pointing_at_the_mask():
    _, _, masks = draw_shapes(range(50))
    cover = measures.patch_cover(masks, 64)
    assert cover.shape == (50, 64) and torch.allclose(cover.mean(1), masks.float().mean((1, 2)))
    assert torch.equal(cover[3].view(8, 8)[2, 5], masks[3, 8:12, 20:24].float().mean())
    cover = cover[(cover == 1).any(1)]                          # thin shapes fill no patch
    inside, outside = (cover == 1).float(), (cover == 0).float()
    even = torch.ones_like(cover)
    maps = [x / x.sum(1, keepdim=True) for x in (inside, outside, even, 3 * inside + outside)]
    share = 3 * inside.sum(1) / (3 * inside + outside).sum(1)
    expected = torch.stack([torch.tensor(1.0), torch.tensor(0.0), cover.mean(), share.mean()])
    assert torch.allclose(measures.pointing_game(torch.stack(maps, 1), cover), expected, atol=1e-5)


def test_occluded_patches_have_the_median_colour():
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    most = torch.tensor([[7, 90, 200], [255, 0, 31]]).byte()
    images[:, :, :, :5] = most[..., None, None]
    score = torch.tensor([[0, 3, 1, 2], [9, 0, 0, 8]]).float()      # patches of 4 x 4 pixels
    occluded = measures.occlude(images, score, 2)
    expected, ground = images.clone(), images[:, :, :1, :1]
    expected[0, :, :, 4:] = ground[0]
    expected[1, :, :4, :4] = expected[1, :, 4:, 4:] = ground[1]
    assert torch.equal(occluded, expected)


def dots(n):
    """n images of 16 black or white dots on grey, one for each patch of 4 x 4 pixels."""
    images = torch.full((n, 3, 16, 16), 100, dtype=torch.uint8)
    images[:, :, ::4, ::4] = 255 * torch.randint(2, (n, 1, 4, 4), dtype=torch.uint8)
    return images


def colour_of(patches):
    """A describer whose symbol t is the grey level of patch patches[:, t]; patches (n, T)."""
    return lambda x, ids=None: (x[:, 0, ::4, ::4].flatten(1).long().gather(1, patches), None)


def test_occlusion_of_a_symbol_that_is_the_colour_of_the_patch_it_attends_to():
    images, patches = dots(1000), torch.randint(16, (1000, 2))
    describe = colour_of(patches)
    ids = describe(images)[0]
    attention = torch.rand(1000, 2, 16).scatter_(2, patches[..., None], 2)
    assert measures.occlusion(describe, images, ids, attention, 4).diag().tolist() == [1, 1]
    elsewhere = attention.roll(500, 0)
    quarter = torch.tensor([0.25, 0.25]).double()                           # 4 of 16 patches
    for score in (elsewhere, torch.rand_like(attention)):
        changed = measures.occlusion(describe, images, ids, score, 4).diag()
        assert torch.allclose(changed, quarter, atol=0.05)
    wrong = measures.occlusion(describe, images, ids, 2 - attention, 4)
    assert wrong.diag().tolist() == [0, 0]                          # attends to all but its patch


def test_specificity_of_symbols_with_patches_of_their_own_and_of_symbols_with_the_same():
    """Symbols 1 and 2 are the colours of two patches; each is among the three patches that the
    other attends to after its own with probability 3 / 15."""
    images = dots(3000)
    patches = torch.rand(3000, 16).argsort(1)[:, :2]                # two different ones
    describe = colour_of(patches)
    ids = describe(images)[0]
    attention = torch.rand(3000, 2, 16).scatter_(2, patches[..., None], 2)
    changed = measures.occlusion(describe, images, ids, attention, 4)
    assert torch.allclose(measures.specificity(changed), torch.tensor([5.0, 5.0]).double(), rtol=.2)
    same = attention.amax(1, keepdim=True).expand(-1, 2, -1)        # both attend to both patches
    changed = measures.occlusion(describe, images, ids, same, 4)
    assert measures.specificity(changed).tolist() == [1, 1]


def test_specificity_of_symbols_that_read_one_patch_is_exact():
    """Symbol t is the grey level of patch t. It attends to patch t first and to patch t + 1 next,
    so with two hidden symbols 2 and 3 also change under one of the two other maps, exactly."""
    images, patches = dots(200), torch.arange(3).expand(200, 3)
    describe = colour_of(patches)
    attention = torch.zeros(200, 3, 16)
    for t in range(3):
        attention[:, t, t], attention[:, t, t + 1] = 0.7, 0.3
    changed = measures.occlusion(describe, images, describe(images)[0], attention, 2)
    assert changed.tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 1]]
    ratios = measures.specificity(changed)
    assert ratios[0].isnan() and ratios[1:].tolist() == [2, 2]
    control = attention.roll(-1, 1)             # each has the map of the symbol after it
    changed = measures.occlusion(describe, images, describe(images)[0], control, 2)
    assert measures.specificity(changed).tolist() == [0, 0, 0]


def test_specificity_by_hand():
    changed = torch.tensor([[0.8, 0.3, 0.0], [0.2, 0.9, 0.0], [0.2, 0.0, 0.5]])
    ratios = measures.specificity(changed)
    assert ratios[:2].tolist() == pytest.approx([4, 6]) and ratios[2].isnan()


def test_attention_similarity_by_hand():
    """One patch and another: 0; the same: 1; one patch and all four: 1 / 4^0.5."""
    one, two = torch.eye(4)[:2]
    everywhere = torch.full((4,), 0.25)
    for maps, expected in (([one, one], [1, 1]), ([one, two], [0, 0]),
                           ([one, everywhere], [0.5, 0.5]), ([one, one, two], [0.5, 0.5, 0])):
        maps = torch.stack(maps).repeat(7, 1, 1)                                # (n, T, N)
        assert measures.attention_similarity(maps, maps).tolist() == pytest.approx(expected)


def test_attention_that_moves_with_the_image_is_similar_within_images_only():
    maps = F.one_hot(torch.arange(4).repeat(50), 4).float()[:, None].repeat(1, 3, 1)
    similarity = partial(measures.attention_similarity, maps)
    assert similarity(maps).tolist() == pytest.approx([1, 1, 1])
    assert measures.chance(similarity, maps, 20).tolist() == pytest.approx([0.25] * 3, abs=0.03)


@pytest.mark.parametrize("flags", [["--recipe", "stable"], ["--recipe", "paper"]])
def test_teacher_forced_decoding(tmp_path, flags):
    """Against the loop written out; a student that is forced to its own symbols emits them."""
    _, teacher, student = checkpoint.load_model(tiny_checkpoint.save(tmp_path / "c.pt", *flags))
    images, given = torch.randint(256, (200, 3, 8, 8)).byte(), torch.randint(8, (200, 8))
    describe = partial(measures.describe, teacher, student, 8)
    forced = describe(images, given)[0]
    decoder, embeddings = student.descriptor, student.embed(given)
    state = decoder.start_state(student.preprocess(teacher(data.normalize(images))))
    for t in range(8):
        x = embeddings[:, t - 1] if t else decoder.start.expand(200, -1)
        h, disc = decoder.step(x, t, state), student.disc
        if "stable" in flags:
            h, disc = decoder.cls_head(h) - embeddings[:, :t].sum(1), disc[t]
        assert torch.equal(disc(h, hard=True).ids, forced[:, t])
    ids, maps = describe(images)
    assert torch.equal(describe(images, ids)[0], ids) and not torch.equal(forced, ids)
    assert maps.shape == (200, 8, 4) and len(ids.unique(dim=0)) > 1


def test_perturbations_by_their_size():
    flat = torch.full((4, 3, 32, 32), 90, dtype=torch.uint8)
    assert torch.equal(measures.crop(flat), flat)
    ramp = (torch.arange(32) * 8).byte().expand(1, 3, 32, 32)
    cropped = measures.crop(ramp)[0, 0, 0, [1, 30]].float()              # away from the border
    assert ((cropped[1] - cropped[0]) / (29 * 8)).item() == pytest.approx(0.9**0.5, abs=0.01)
    noisy = measures.noise(flat).float() - 90
    assert noisy.std().item() == pytest.approx(0.02 * 255, rel=0.05) and abs(noisy.mean()) < 0.2
    images, _, _ = draw_shapes(range(4))
    packed = measures.jpeg(images)
    error = (packed.float() - images.float()).abs().mean()
    assert packed.shape == images.shape and 0.2 < error < 10


def test_agreement_by_hand_and_by_chance():
    ids, others = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 0], [3, 4]])
    assert measures.agreement(ids, others).tolist() == [1, 0.5]
    many = torch.arange(10).repeat(100)[:, None]
    by_chance = measures.chance(lambda x: measures.agreement(many, x), many, 20)
    assert by_chance.item() == pytest.approx(0.1, abs=0.01)


def test_a_planted_describer_gets_every_measure():
    """`measure` on drawn shapes, whose symbols are their factors and attend to the object's
    core."""
    images, factors, masks = draw_shapes(range(600))
    image_set = ImageSet(images, factors["shape"], FACTORS["shape"], factors, masks)
    ids = torch.stack([*factors.values()], 1) + FIRST
    most = measures.patch_cover(masks, 64).amax(1, keepdim=True)
    maps = (measures.patch_cover(masks, 64) == most).float()
    maps = (maps / maps.sum(1, keepdim=True))[:, None].repeat(1, 5, 1)
    starts = iter(range(0, 600, measures.BATCH))            # of the first pass through all images

    def describe(x, forced_ids=None):
        start = next(starts, 0)
        return ids[start:start + len(x)], maps[start:start + len(x)]

    rows = measures.measure(describe, image_set, 27, times=3)
    for name in ("lift_purity", "lift_purity_by_position"):
        assert rows[name]["measured"] == pytest.approx(1) and abs(rows[name]["chance"]) < 0.1
    for name in ("positional_disentanglement", "bag_of_symbols_disentanglement"):
        assert rows[name]["measured"] > 0.95 and rows[name]["chance"] < 0.05    # of finite draws
    for b, (name, size) in enumerate(zip(FACTORS, SIZES)):
        row = rows[f"mutual_information_{name}"]
        assert row["measured"][b] == pytest.approx(math.log2(size), abs=0.03)
        assert row["factor_entropy"] == pytest.approx(row["measured"][b])
        assert row["chance"][b] < 0.15
    pointing = rows["pointing_game"]
    assert pointing["measured"] == pytest.approx([most.mean().item()] * 5, abs=1e-5)
    assert max(pointing["chance"]) < 0.8 * most.mean()
    assert pointing["uniform_attention"] == pytest.approx(masks.float().mean().item())
    assert rows["attention_similarity"]["measured"] == pytest.approx([1] * 5, abs=1e-4)
    assert max(rows["attention_similarity"]["chance"]) < 0.5
    assert rows["occlusion"]["attended"] == [0] * 5 and rows["occlusion"]["random"] == [0] * 5
    assert rows["specificity"]["measured"] == [None] * 5                        # 0 / 0
    assert rows["stability"]["jpeg"] == [1] * 5
    assert rows["stability"]["chance"] == pytest.approx([1 / size for size in SIZES], abs=0.03)


def test_a_planted_describer_of_scenes():
    """Symbol t is the shape of object t, to which it attends, and of the largest one where there is
    no object t; a fifth symbol attends to the ground and is noise."""
    images, factors, masks = scenes.load("test", 600)
    image_set = ImageSet(images, factors["shape"][:, 0], FACTORS["shape"], factors, masks)
    cover = objects.object_cover(masks, 144)
    ground = (1 - cover.sum(1, keepdim=True)) / 3
    exists = factors["shape"] >= 0
    maps = torch.cat([cover.where(exists[..., None], cover[:, :1]), ground], 1)
    maps = maps + 1e-4 * torch.arange(5, 0, -1)[:, None]        # of equal maps the first wins
    ids = torch.cat([factors["shape"].where(exists, factors["shape"][:, :1]),
                     torch.randint(10, (600, 1))], 1)
    starts = iter(range(0, 600, measures.BATCH))

    def describe(x, forced_ids=None):
        start = next(starts, 0)
        return ids[start:start + len(x)], maps[start:start + len(x)]

    rows = measures.measure(describe, image_set, 10, times=2, perturbed=20)
    assert rows["foreground_ari"]["measured"] > 0.95 > 0.3 > rows["foreground_ari"]["chance"]
    assert rows["mean_best_overlap"]["measured"] > 0.6 > 2 * rows["mean_best_overlap"]["chance"]
    bound = rows["binding_shape"]
    assert bound["attended"][0] == pytest.approx(10, abs=1) and max(bound["another"]) < 1.4
    assert max(rows["binding_colour"]["attended"]) < 1.3
    assert rows["attends_largest"]["measured"][:2] == [1, 0]
    assert rows["mutual_information_shape"]["measured"][0] == pytest.approx(math.log2(10), abs=.05)
    assert "mutual_information_size" not in rows and "binding_size" in rows


def test_images_without_factors_get_the_measures_that_need_none(capsys):
    """The only symbol is the brightness, and it attends to the one bright patch of four."""
    images = torch.full((40, 3, 8, 8), 10, dtype=torch.uint8)
    images[:, :, 4:, :4] = 250
    image_set = ImageSet(images, torch.full((40,), -1), [])

    def describe(x, forced_ids=None):
        bright = (x.amax((1, 2, 3)) > 150).long()[:, None]
        return bright, torch.tensor([0, 0, 1.0, 0]).expand(len(x), 1, 4)

    rows = measures.measure(describe, image_set, 2, share=0.25, times=2)
    assert list(rows) == ["occlusion", "stability"]     # the others need two positions
    assert rows["occlusion"]["attended"] == rows["occlusion"]["attended_in_another_image"] == [1]
    assert 0 < rows["occlusion"]["random"][0] < 0.6
    assert rows["stability"] == {"crop": [1], "noise": [1], "jpeg": [1], "chance": [1]}
    measures.print_table(rows | {"specificity": {"measured": [None]}})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert "occlusion attended 1.000 1.000".split() in lines
    assert "specificity measured - -".split() in lines


def test_the_command_on_a_checkpoint(tmp_path, capsys, monkeypatch):
    """Also: the progress counts every image that is described."""
    bars = []
    monkeypatch.setattr(measures, "Progress", lambda *of: bars.append(Progress(*of)) or bars[-1])
    ckpt, out = tiny_checkpoint.save(tmp_path / "ckpt.pt"), tmp_path / "measures.json"
    flags = "--images 60 --perturbed 30 --permutations 2 --device cpu --json".split()
    measures.main([ckpt, *flags, str(out)])
    record = json.loads(out.read_text())
    rows = record.pop("measures")
    assert record == {"data": "shapes", "images": 60, "perturbed_images": 30,
                      "occluded_share": 0.25, "permutations": 2, "seed": 0}
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows) and len(rows) == 5 + 4 + 5
    assert len(rows["occlusion"]["attended"]) == 8
    assert [bar.done for bar in bars] == [bar.total for bar in bars] == [60 + 30 * (8 + 8 + 1 + 3)]


@pytest.mark.parametrize("flags, message", [
    (["--images", "1"], "--images"), (["--occluded-share", "1"], "--occluded-share"),
    (["--json", "no/such/folder.json"], "folder does not exist"), ([], "no file")])
def test_errors_are_one_line(flags, message, tmp_path):
    with pytest.raises(SystemExit, match=message) as stop:
        measures.main([str(tmp_path / "none.pt"), *flags, "--device", "cpu"])
    assert str(stop.value).startswith("extras.measures: ") and "\n" not in str(stop.value)
