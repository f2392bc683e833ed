"""extras/falcon.py and extras/crops.py: planted symbols get their words, and no others."""
import json
import re

import pytest
import tiny_checkpoint
import torch
import torch.nn.functional as F

from data import ImageSet
from extras import crops, falcon, page
from shapes import FACTORS

SIZES = [len(values) for values in FACTORS.values()]                            # 10, 8, 3, 3, 3
FIRST = torch.tensor([0, *SIZES]).cumsum(0)[:-1]        # each factor's first symbol; K = 27


def drawn(n=2000):
    """An ImageSet of known factors without pixels, and the code in which symbol t is factor t."""
    factors = {name: torch.randint(len(values), (n,)) for name, values in FACTORS.items()}
    image_set = ImageSet(torch.zeros(n, 3, 4, 4, dtype=torch.uint8), factors["shape"],
                         FACTORS["shape"], factors)
    return image_set, torch.stack([*factors.values()], 1) + FIRST


def part(image_set, ids, vocab, permuted=False, scorer=None):
    heat = torch.ones(*ids.shape, 4)
    h = F.normalize(torch.zeros(len(ids), vocab).scatter_(1, ids, 1.0), dim=1)
    order = torch.randperm(len(ids)) if permuted else None
    return falcon.Part(ids, h, heat, scorer or crops.Scorer(image_set, heat),
                       torch.ones_like(ids, dtype=torch.bool), order)


def test_planted_symbols_get_their_factor_and_the_control_gets_chance():
    (a, ids), (b, test_ids) = drawn(), drawn()
    rows = falcon.concepts(part(a, ids, 27), part(b, test_ids, 27), 10, 0.7)
    names = crops.annotations(a)[0]
    assert len(set(names)) == 27 and len(rows) == 37
    for row in rows[:27]:
        assert next(iter(row["top_words"])) == names[row["symbols"][0]]
        assert row["test_share"] == 1
    for row in rows[27:]:                   # a pair has the words of both, the rarer one first
        assert {*list(row["top_words"])[:2]} == {names[v] for v in row["symbols"]}
    assert falcon.summary(rows[:27])["share_80"] == 1
    assert falcon.summary(rows[:10])["median_lift"] == pytest.approx(10, rel=0.25)
    control = falcon.concepts(part(a, ids, 27, True), part(b, test_ids, 27, True), 0, 0.7)
    assert falcon.summary(control)["median_lift"] == pytest.approx(1, abs=0.1)


def test_contrast_drops_the_word_of_similar_images_without_the_symbol():
    """Symbols 0 and 1 are a context whose images are all animals; half of them have symbol 3 and
    are dogs. Of symbol 3, animal has lift 2, but the other images of the context have it too."""
    n = 400
    context, dog = torch.arange(n) < 200, torch.arange(n) < 100
    third = torch.where(dog, 3, torch.where(context, 4, 5))
    ids = torch.stack([torch.where(context, 0, 6), torch.where(context, 1, 7), third], 1)

    def scorer(index, heat):
        known = torch.stack([context, dog], 1).float()[index]
        return known[:, None].expand(-1, heat.shape[1], -1)
    scorer.names = ["animal", "dog"]
    row = falcon.explain(part(None, ids, 8, scorer=scorer), [3], 0.7)
    assert row["top_words"] == {"dog": [1.0, 4.0]} and row["dropped"] == ["animal"]
    assert row["images"] == 100 and row["similar"] == 100
    assert "animal" in falcon.explain(part(None, ids, 8, scorer=scorer), [0], 0.7)["top_words"]


def test_a_pair_has_the_word_of_images_with_both_of_its_symbols():
    """Symbols 0 to 3 are two bits, and the word holds where both are set."""
    bits = torch.cartesian_prod(torch.arange(2), torch.arange(2)).repeat(50, 1)
    truth = bits.all(1).float()[:, None]

    def scorer(index, heat):
        return truth[index, None].expand(-1, heat.shape[1], -1)
    scorer.names = ["both"]
    own = part(None, bits + torch.tensor([0, 2]), 4, scorer=scorer)
    rows = {tuple(row["symbols"]): row for row in falcon.concepts(own, own, 4, 0.7)}
    assert rows[(1,)]["top_words"] == {"both": [0.5, 2.0]} and not rows[(0,)]["top_words"]
    assert rows[(1, 3)]["top_words"] == {"both": [1.0, 4.0]} and not rows[(0, 3)]["top_words"]


# ---- crops ---------------------------------------------------------------------------------------

def test_boxes():
    heat = torch.zeros(1, 16)
    heat[0, [5, 10]] = torch.tensor([0.7, 1.0])             # (row 1, column 1) and (2, 2) of 4 x 4
    box = crops.boxes(heat, 8)[0]
    assert torch.equal(box.nonzero().amin(0), torch.tensor([2, 2])) and box.sum() == 16
    heat[0, 5] = 0.5                                        # below 0.6 of the maximum
    assert crops.boxes(heat, 8).sum() == 4


def test_words_computed_from_the_pixels_of_a_crop():
    """A red quarter at the top left of a blue image with bright vertical stripes at the right."""
    image = torch.tensor([0, 0, 200]).view(3, 1, 1).repeat(1, 8, 8)
    image[:, :4, :4] = torch.tensor([200, 0, 0]).view(3, 1, 1)
    image[:, :, 5::2] = 255
    image_set = ImageSet(image[None].byte(), torch.tensor([0]), ["cat"])
    heat = torch.eye(4)[None]                               # four crops: the quarters
    scorer = crops.Scorer(image_set, heat)
    found = [{name for name, c in zip(scorer.names, row) if c}
             for row in scorer(torch.tensor([0]), heat)[0]]
    assert {"cat", "red", "left", "top"} <= found[0] and "textured" not in found[0]
    assert {"cat", "blue", "left", "bottom"} <= found[2]
    assert {"bright", "right", "textured"} <= found[3] and "left" not in found[3]


def test_annotations_of_classes_and_of_several_objects():
    image_set = ImageSet(None, torch.tensor([1, 0]), ["airplane", *sorted(crops.ANIMALS)])
    names, known = crops.annotations(image_set)
    assert names[-2:] == ["animal", "vehicle"] and known[:, -2:].tolist() == [[1, 0], [0, 1]]
    factors = {name: torch.tensor([[0, 1, -1]]) for name in FACTORS}        # two objects
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    _, known = crops.annotations(ImageSet(images, torch.tensor([0]), [], factors))
    assert known.sum() == 10


# ---- the command, and the page -------------------------------------------------------------------

@pytest.mark.parametrize("more", [[], ["--by-position"]])
def test_the_command_writes_its_record_and_the_page_shows_the_words(tmp_path, capsys, more):
    path = tiny_checkpoint.save(tmp_path / "ckpt.pt")
    out = tmp_path / "concepts.json"
    falcon.main([path, "--train-images", "80", "--test-images", "40", "--device", "cpu", *more,
                 "-o", str(out), "--json", str(tmp_path / "record.json")])
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["symbols"]["measured"]["features"] > 0 and "concepts" not in record
    assert "symbols and pairs" in capsys.readouterr().out
    texts = page.read_concepts(out, 8)
    assert any(texts.values())
    page.main([path, "-o", str(tmp_path / "page.html"), "--images", "40", "--device", "cpu",
               "--concepts", str(out)])
    text = (tmp_path / "page.html").read_text()
    shown = [row for row in re.findall(r"<th>concepts</th><td>(.*?)</td>", text) if row]
    assert shown and {*shown} <= {*texts.values()}
    with pytest.raises(ValueError, match="--concepts"):
        page.read_concepts(out, 9)
