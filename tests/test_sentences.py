"""extras/sentences.py: phrases of planted symbols, which must be right, and of noise."""
import json

import pytest
import tiny_checkpoint
import torch
from PIL import Image

import scenes
from extras import objects, sentences


@pytest.fixture(scope="module")
def planted():
    """600 scenes and the ideal descriptor: symbols 0-3 are size and shape of objects 1-4, to which
    they attend (and to the first where there is none), symbol 4 is the colour of object 1."""
    images, factors, masks = scenes.load("test", 600)
    cover = objects.object_cover(masks, 144)
    exists = factors["shape"] >= 0
    maps = cover.where(exists[..., None], cover[:, :1])
    maps = torch.cat([maps, cover[:, :1]], 1)
    both = factors["size"] * 10 + factors["shape"]
    ids = torch.cat([both.where(exists, both[:, :1]), factors["colour"][:, :1]], 1)
    return images, factors, ids, maps / maps.sum(2, keepdim=True), cover


def test_planted_symbols_make_right_and_complete_sentences(planted):
    images, factors, ids, maps, cover = planted
    attended = objects.attended_object(maps, cover)
    tables = sentences.log_lifts(ids, attended, factors, 30)
    phrases = sentences.phrases_of(ids, maps, tables)
    share = sentences.shares(phrases, factors)
    assert share["right"] > 0.9 and share["complete"] > 0.8
    assert share["right_with_position"] > 0.5 * share["right"]
    other = sentences.shares(phrases, {k: v.roll(300, 0) for k, v in factors.items()})
    assert other["right"] < 0.01
    noise = torch.randint(30, ids.shape)
    tables = sentences.log_lifts(noise, attended, factors, 30)
    phrases = sentences.phrases_of(noise, maps, tables)
    assert sentences.shares(phrases, factors)["complete"] < 0.02


def test_groups_are_connected_components():
    maps = torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]],
                         [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0.1, 0, 0, 1]]])
    assert sentences.groups_of(maps).tolist() == [[0, 0, 0, 3], [0, 1, 2, 3]]


def test_the_third_of_the_image():
    maps = torch.zeros(3, 36)
    maps[0, 0] = maps[1, 5] = maps[2, 35] = 1
    maps[2, 0] = 1
    column, row = sentences.third(maps)
    assert column.tolist() == [0, 2, 1] and row.tolist() == [0, 0, 1]


def test_phrases_need_objects_to_themselves():
    red_disc, red_ring = {"shape": 0, "colour": 0, "size": 1}, {"shape": 1, "colour": 0, "size": 0}
    names = ("shape", "colour", "size")
    things = [red_disc, red_ring]
    assert sentences.matched([{"colour": 0}, {"shape": 0}], things, names)  # the ring is red too
    assert not sentences.matched([{"shape": 0}, {"shape": 0}], things, names)
    assert not sentences.matched([{"colour": 0}] * 3, things, names)
    in_rows = [red_disc | {"row": 0}, red_ring | {"row": 2}]
    assert sentences.matched([{"shape": 1, "row": 2}], in_rows, (*names, "row"))
    factors = {name: torch.tensor([[red_disc[name], red_ring[name]]]) for name in names}
    factors |= {"column": torch.tensor([[0, 1]]), "row": torch.tensor([[0, 1]])}
    phrase = {"shape": 0, "column": 0, "row": 1}
    assert sentences.shares([[phrase]], factors) == {
        "right": 1, "complete": 0, "right_with_position": 0, "complete_with_position": 0}
    assert sentences.shares([[]], factors)["right"] == 0
    assert sentences.text_of(phrase) == "disc, middle left"
    assert sentences.text_of({"colour": 0, "column": 1, "row": 1}) == "red object, middle"


def test_the_figure_outlines_objects_in_their_symbols_colours(planted, tmp_path):
    images, factors, ids, maps, cover = planted
    tables = sentences.log_lifts(ids, objects.attended_object(maps, cover), factors, 30)
    phrases = sentences.phrases_of(ids[:5], maps[:5], tables)
    page = sentences.outlined(images[0], phrases[0], ids[0], 96)
    for phrase in phrases[0]:
        colour = torch.tensor(sentences.chip_colours(int(ids[0, phrase["symbols"][0]]))[0])
        at = (page == colour.byte()[:, None, None]).all(0).nonzero().float()
        assert 20 < len(at) < 400
        rows = maps[0, phrase["symbols"][0]].view(12, 12).sum(1) @ (torch.arange(12.0) + 0.5)
        assert abs(at[:, 0].mean() / 8 - rows) < 1.5
    path = sentences.figure(images[:5], ids[:5], phrases, tmp_path / "f.png")
    assert Image.open(path).size[0] == 2 * sentences.MARGIN + 4 * sentences.COLUMN


def test_the_command_on_a_checkpoint(tmp_path, capsys, monkeypatch):
    """An untrained student, whose symbols are of four patches; what there is, is written."""
    ckpt = tiny_checkpoint.save(tmp_path / "c.pt", "--data", "scenes", "--image-size", "8")
    out, record = tmp_path / "s.png", tmp_path / "s.json"
    monkeypatch.setattr("sys.argv", ["sentences", str(ckpt), "--train-images", "60",
                                     "--images", "40", "--count", "3", "--device", "cpu",
                                     "--out", str(out), "--json", str(record)])
    sentences.main()
    written = json.loads(record.read_text())
    assert written["images"] == 40 and written["measured"].keys() == written["other_scenes"].keys()
    assert 0 <= written["measured"]["complete"] <= written["measured"]["right"] < 0.5
    assert out.is_file() and "right_with_position" in capsys.readouterr().out
    ckpt = tiny_checkpoint.save(tmp_path / "c.pt")
    with pytest.raises(SystemExit, match="sentences need scenes"):
        sentences.main()
