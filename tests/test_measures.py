"""extras/measures.py: languages that are known functions of the factors, and planted looks."""
import json
import math

import pytest
import torch

import train
from data import FACTORS, draw_shapes
from extras import measures

SIZES = [len(values) for values in FACTORS.values()]                            # 10, 8, 3, 3, 3
FIRST = torch.tensor([0, *SIZES]).cumsum(0)[:-1]        # each factor's first symbol
GRID = torch.cartesian_prod(*[torch.arange(size) for size in SIZES])    # (2160, 5), independent
WORDS = GRID + FIRST            # the planted language: symbol t names factor t; K = 27


def shuffled(x):
    return x[torch.randperm(len(x))]


def in_any_order(ids):
    return ids.gather(1, torch.rand(ids.shape).argsort(1))


def test_mutual_information_of_a_language_that_names_factors():
    bits = measures.mutual_information(WORDS, GRID)
    assert torch.allclose(bits, torch.tensor(SIZES).double().log2().diag(), atol=1e-9)


def test_mutual_information_by_hand():
    """H(x) = 1, H(y) = 2 - 3/4 log2 3 = 0.8113, H(x, y) = 1.5 bits."""
    x, y = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])[..., None]
    assert measures.mutual_information(x, y).item() == pytest.approx(0.311278)


def test_chance_of_mutual_information_is_its_bias():
    """An unrelated language has as much as its permutations: (X-1)(Y-1) / (2 n ln 2) bits."""
    ids = torch.randint(16, (2000, 1))
    factors = torch.randint(10, (2000, 1))
    measured = measures.mutual_information(ids, factors).item()
    expected = 15 * 9 / (2 * 2000 * 0.693147)
    by_chance = measures.chance(lambda f: measures.mutual_information(ids, f), factors, 20).item()
    assert by_chance == pytest.approx(expected, rel=0.1)
    assert measured == pytest.approx(expected, rel=0.4)


def test_disentanglement_of_ordered_and_unordered_words():
    """Words in any order: the bag still names the factors, the positions nothing."""
    loose = in_any_order(WORDS)
    counts = [measures.symbol_counts(ids, 27) for ids in (WORDS, loose)]
    assert torch.equal(*counts) and counts[0].sum() == WORDS.numel()
    assert measures.disentanglement(WORDS, GRID) == pytest.approx(1)
    assert measures.disentanglement(counts[0], GRID) == pytest.approx(1)
    assert measures.disentanglement(loose, GRID) < 0.05


def test_disentanglement_of_entangled_constant_and_shuffled_words():
    both = GRID[:, :1] + 10 * GRID[:, 1:2]              # one symbol for shape and colour
    gap = math.log(10 / 8, 80)
    assert measures.disentanglement(both, GRID) == pytest.approx(gap)
    assert measures.disentanglement(torch.cat([both, both * 0], 1), GRID) == pytest.approx(gap)
    assert measures.disentanglement(both * 0, GRID) == 0
    assert measures.disentanglement(shuffled(WORDS), GRID) < 0.02


def letters(*words):
    return torch.tensor([[ord(c) for c in word] for word in words])


def test_distances_of_known_strings():
    a = letters("kitten", "abcdef", "aabbcc", "abcdef")
    b = letters("mitten", "fabcde", "abbccc", "abcdef")
    assert measures.hamming_distance(a, b).tolist() == [1, 6, 2, 0]
    assert measures.edit_distance(a, b).tolist() == [1, 2, 2, 0]
    assert measures.bag_distance(a, b).tolist() == [1, 0, 1, 0]
    assert measures.edit_distance(letters("kitten"), letters("sitting")).tolist() == [3]
    assert measures.edit_distance(letters("saturday"), letters("sunday")).tolist() == [3]


def test_ranks_share_ties():
    assert measures.ranks(torch.tensor([5, 1, 5, 9, 5])).tolist() == [2, 0, 2, 4, 2]


@pytest.mark.parametrize("distance", measures.DISTANCES)
def test_topographic_similarity(distance):
    pairs = torch.randint(len(GRID), (20_000, 2))

    def similarity(ids):
        return measures.topographic_similarity(ids, GRID, pairs, distance)

    assert similarity(WORDS) == pytest.approx(1)    # a symbol serves one factor
    assert abs(similarity(shuffled(WORDS))) < 0.03
    assert similarity(WORDS * 0) == 0
    if distance == "bag":
        assert similarity(in_any_order(WORDS)) == pytest.approx(1)


def test_topographic_similarity_by_hand():
    """Meanings 1, 2, 1 apart, messages 2, 2, 0: ranks (.5, 2, .5), (1.5, 1.5, 0) give .5."""
    factors, ids = torch.tensor([[[0, 0], [0, 1], [1, 1]], [[0, 0], [1, 1], [1, 1]]])
    pairs = torch.tensor([[0, 1], [0, 2], [1, 2]])
    assert measures.topographic_similarity(ids, factors, pairs, "hamming") == pytest.approx(0.5)


def test_symbols_that_name_a_value():
    halves = torch.randperm(len(GRID)).tensor_split(2)

    def share(ids, least=10):
        return measures.naming_share(ids, GRID, halves, 40, least)

    assert share(WORDS) == 1 and share(in_any_order(WORDS)) == 1    # 27 of 27 in use, of K = 40
    assert share(shuffled(WORDS)) == 0
    nothing = torch.randint(27, 40, (len(GRID), 1))                 # 13 symbols more, of no meaning
    assert share(torch.cat([WORDS, nothing], 1)) == 27 / 40
    assert share(WORDS[:, :1], 50) == 1 and share(WORDS[:, :1], 300) == 0   # 108 times in a half


def test_a_lift_of_two_must_hold_on_the_second_half():
    """Symbols 0 and 1 swap their values between the halves; 2 and 3 have a lift of 4 on both."""
    factors = torch.arange(4).repeat(100)[:, None]
    ids, halves = factors.clone(), torch.arange(400).split(200)
    ids[200:] = torch.tensor([1, 0, 2, 3])[factors[200:]]
    assert measures.naming_share(ids, factors, halves, 4) == 0.5
    assert measures.naming_share(factors, factors, halves, 4, lift=4.0) == 1
    assert measures.naming_share(factors, factors, halves, 4, lift=4.1) == 0


def test_pointing_at_the_mask():
    _, _, masks = draw_shapes(range(50))
    cover = measures.patch_cover(masks, 64)
    assert cover.shape == (50, 64) and torch.allclose(cover.mean(1), masks.float().mean((1, 2)))
    assert torch.equal(cover[3].view(8, 8)[2, 5], masks[3, 8:12, 20:24].float().mean())
    cover = cover[(cover == 1).any(1)]                          # thin shapes fill no patch
    inside, outside = (cover == 1).float(), (cover == 0).float()
    even = torch.ones_like(cover)
    looks = [x / x.sum(1, keepdim=True) for x in (inside, outside, even, 3 * inside + outside)]
    share = 3 * inside.sum(1) / (3 * inside + outside).sum(1)
    expected = torch.stack([torch.tensor(1.0), torch.tensor(0.0), cover.mean(), share.mean()])
    assert torch.allclose(measures.pointing(torch.stack(looks, 1), cover), expected, atol=1e-5)


def test_hidden_patches_have_the_median_colour():
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    most = torch.tensor([[7, 90, 200], [255, 0, 31]]).byte()
    images[:, :, :, :5] = most[..., None, None]
    score = torch.tensor([[0, 3, 1, 2], [9, 0, 0, 8]]).float()      # patches of 4 x 4 pixels
    hidden = measures.hide(images, score, 2)
    expected, ground = images.clone(), images[:, :, :1, :1]
    expected[0, :, :, 4:] = ground[0]
    expected[1, :, :4, :4] = expected[1, :, 4:, 4:] = ground[1]
    assert torch.equal(hidden, expected)


def test_faithfulness_of_a_symbol_that_names_the_patch_it_looks_at():
    """Dots, one a patch on grey, are black or white; symbol t is that of patch where[t]; 4 of 16
    are hidden."""
    images = torch.full((1000, 3, 16, 16), 100, dtype=torch.uint8)
    images[:, :, ::4, ::4] = 255 * torch.randint(2, (1000, 1, 4, 4), dtype=torch.uint8)
    where = torch.randint(16, (1000, 2))

    def describe(x, given=None):
        return x[:, 0, ::4, ::4].flatten(1).long().gather(1, where)

    attention = torch.rand(1000, 2, 16).scatter_(2, where[..., None], 2)
    kept = measures.faithfulness(describe, images, describe(images), attention, 4)
    assert kept["attended"].tolist() == [1, 1]
    assert torch.allclose(kept["random"], torch.tensor(0.25).double(), atol=0.05)
    assert torch.allclose(kept["attended in another"], torch.tensor(0.25).double(), atol=0.05)
    blind = measures.faithfulness(describe, images, describe(images), 2 - attention, 4)
    assert blind["attended"].tolist() == [0, 0]                             # looks everywhere else


def test_retelling_says_the_own_choice_after_given_symbols(tiny_trainer):
    """Its own symbols given, a student says them again; others given, all but the first may
    change."""
    trainer = tiny_trainer()
    teacher, student, size = trainer.teacher, trainer.student.eval(), trainer.args.image_size
    images = torch.randint(256, (200, 3, size, size), dtype=torch.uint8)
    ids, _ = measures.read(teacher, student, images, size)
    assert torch.equal(measures.retell(teacher, student, images, ids, size), ids)
    others = measures.retell(teacher, student, images, (ids + 1) % student.disc.vocab, size)
    assert torch.equal(others[:, 0], ids[:, 0]) and not torch.equal(others, ids)
    assert torch.equal(measures.read(teacher, student, images, size)[0], ids)  # nothing left behind


def test_disturbances_by_their_size():
    flat = torch.full((4, 3, 32, 32), 90, dtype=torch.uint8)
    assert torch.equal(measures.crop(flat), flat)
    ramp = (torch.arange(32) * 8).byte().expand(1, 3, 32, 32)
    seen = measures.crop(ramp)[0, 0, 0, [1, 30]].float()                    # away from the border
    assert ((seen[1] - seen[0]) / (29 * 8)).item() == pytest.approx(0.9**0.5, abs=0.01)
    noisy = measures.noise(flat).float() - 90
    assert noisy.std().item() == pytest.approx(0.02 * 255, rel=0.05) and abs(noisy.mean()) < 0.2
    pictures, _, _ = draw_shapes(range(4))
    packed = measures.jpeg(pictures)
    error = (packed.float() - pictures.float()).abs().mean()
    assert packed.shape == pictures.shape and 0.2 < error < 10


def test_unchanged_by_hand_and_by_chance():
    ids, others = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 0], [3, 4]])
    assert measures.unchanged(ids, others).tolist() == [1, 0.5]
    many = torch.arange(10).repeat(100)[:, None]
    by_chance = measures.chance(lambda x: measures.unchanged(many, x), many, 20)
    assert by_chance.item() == pytest.approx(0.1, abs=0.01)


def test_a_planted_describer_gets_every_figure():
    """`figures` on drawn shapes, described by their factors, looking only at the object's core."""
    images, factors, masks = draw_shapes(range(600))
    pictures = train.data.ImageSet(images, factors["shape"], FACTORS["shape"], factors, masks)
    ids = torch.stack([*factors.values()], 1) + FIRST
    most = measures.patch_cover(masks, 64).amax(1, keepdim=True)
    looks = (measures.patch_cover(masks, 64) == most).float()
    looks = (looks / looks.sum(1, keepdim=True))[:, None].repeat(1, 5, 1)
    rows = measures.figures(lambda x, attention: (ids[:len(x)], looks), lambda x, before: before,
                            pictures, 27, pairs=5000, times=3)
    for name in ("topographic similarity, edit", "symbols that name a value",
                 "the same, at their place"):
        assert rows[name]["measured"] == pytest.approx(1) and abs(rows[name]["chance"]) < 0.1
    for name in ("posdis", "bosdis"):               # factors of 600 draws are nearly independent
        assert rows[name]["measured"] > 0.95 and rows[name]["chance"] < 0.05
    for b, (name, size) in enumerate(zip(FACTORS, SIZES)):
        row = next(row for title, row in rows.items() if title.startswith(f"bits about {name}"))
        assert row["measured"][b] == pytest.approx(torch.tensor(size).log2().item(), abs=0.03)
        assert row["chance"][b] < 0.15
    looked = rows["attention on the object"]
    assert looked["measured"] == pytest.approx([most.mean().item()] * 5, abs=1e-5)
    assert max(looked["masks of other pictures"]) < 0.8 * most.mean()
    assert looked["share of the area"] == pytest.approx(masks.float().mean().item())
    assert rows["attended / random"] == {"all positions": None, "position 1": None}     # 0 / 0
    assert rows["unchanged"]["jpeg"] == [1] * 5
    assert rows["unchanged"]["chance"] == pytest.approx([1 / size for size in SIZES], abs=0.03)


def test_pictures_without_factors_get_what_needs_none(capsys):
    """Brightness is the only symbol, and the attention is on the one bright patch of four."""
    images = torch.full((40, 3, 8, 8), 10, dtype=torch.uint8)
    images[:, :, 4:, :4] = 250
    looks = torch.tensor([0, 0, 1.0, 0]).expand(40, 1, 4)
    pictures = train.data.ImageSet(images, torch.full((40,), -1), [])
    bright = lambda x, _: (x.amax((1, 2, 3)) > 150).long()[:, None]         # noqa: E731
    rows = measures.figures(lambda x, _: (bright(x, _), looks), bright, pictures, 2, share=0.25,
                            times=2)
    assert list(rows) == ["changed, 1 of 4 patches hidden", "attended / random",
                          "attended / attended in another", "unchanged"]
    changed = rows["changed, 1 of 4 patches hidden"]
    assert changed["attended"] == [1] and changed["attended in another"] == [1]
    assert rows["attended / random"]["position 1"] == 1 / changed["random"][0]
    assert rows["unchanged"] == {"crop": [1], "noise": [1], "jpeg": [1], "chance": [1]}
    measures.print_table(rows)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert "changed, 1 of 4 patches hidden attended 1.000 1.000".split() in lines


def test_the_command_on_a_checkpoint(tiny_trainer, tmp_path, capsys):
    trainer = tiny_trainer()
    config = {**vars(trainer.args), "out": "", "data": "shapes"}
    weights = {"teacher": trainer.teacher.vit.state_dict(), "student": trainer.student.state_dict()}
    torch.save({"config": config, **weights}, tmp_path / "ckpt.pt")
    flags = "--images 60 --disturbed 30 --permutations 2 --pairs 100 --device cpu --json".split()
    measures.main([str(tmp_path / "ckpt.pt"), *flags, str(tmp_path / "figures.json")])
    rows = json.loads((tmp_path / "figures.json").read_text())
    expected = {"data": "shapes", "images": 60, "disturbed": 30, "hidden share": 0.25, "pairs": 100,
                "permutations": 2, "seed": 0}
    assert {key: rows.pop(key) for key in expected} == expected
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows) and len(rows) == 17
    assert len(rows["changed, 1 of 4 patches hidden"]["attended"]) == 8


@pytest.mark.parametrize("flags, says", [
    (["--images", "1"], "--images 2"), (["--hide", "1"], "--hide"), (["--pairs", "0"], "--pairs"),
    (["--json", "no/such/folder.json"], "folder does not exist"), ([], "no file")])
def test_errors_are_one_line(flags, says, tmp_path):
    with pytest.raises(SystemExit, match=says) as stop:
        measures.main([str(tmp_path / "none.pt"), *flags, "--device", "cpu"])
    assert str(stop.value).startswith("extras.measures: ") and "\n" not in str(stop.value)
