"""visualize.py: planted maps, symbols and points must come out at the pixels computed by hand."""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import visualize
from data import ImageSet


class FakeStudent(torch.nn.Module):
    """Emits symbol t * 10 + (a bright image) at position t, and attends to patch t of 4 x 4."""

    def __init__(self, length=8):
        super().__init__()
        self.nothing, self.length = torch.nn.Parameter(torch.zeros(1)), length

    def preprocess(self, z_t):
        return z_t + 100                                # describe must get what this returns

    def describe(self, z_t, hard=False, attention=False):
        assert hard and attention                       # every figure shows hard symbols
        ids = torch.arange(self.length) * 10 + (z_t.mean((1, 2, 3)) > 100).long()[:, None]
        maps = torch.eye(16)[: self.length].expand(len(z_t), -1, -1)
        return SimpleNamespace(ids=ids, attention=maps)


def teacher(x):
    return x                                            # FakeStudent gets the pixels themselves


def dark_and_bright():
    """30 images, the last 10 bright and of class "bright"; sorted by class, as folders are."""
    labels = torch.tensor([0] * 10 + [1] * 10 + [2] * 10)
    shade = torch.where(labels == 2, 250, 5).to(torch.uint8)
    images = shade[:, None, None, None].expand(-1, 3, 16, 16).contiguous()
    return ImageSet(images, labels, ["dark", "dim", "bright"])


def write_run(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def texts(monkeypatch):
    """The list of all texts drawn, in their order."""
    drawn, text = [], visualize.Sheet.text
    def record(sheet, x, y, words, *args, **kwargs):
        drawn.append(words)
        text(sheet, x, y, words, *args, **kwargs)
    monkeypatch.setattr(visualize.Sheet, "text", record)
    return drawn


def near(colour, pixels):
    """Where the (h, w, 3) pixels are within 12 of a colour, per channel: bool (h, w)."""
    return (np.abs(np.asarray(pixels, int) - colour) <= 12).all(-1)


# ---- attention maps and Figure 1 ----------------------------------------------------------------

def test_overlay_is_warmest_at_the_planted_patch():
    attention = torch.full((64,), 0.1 / 63)
    attention[2 * 8 + 5] = 0.9                          # row 2, column 5 of 8 x 8
    image = torch.full((3, 32, 32), 128, dtype=torch.uint8)
    shown = visualize.overlay(image, attention, 112)
    assert shown.shape == (3, 112, 112) and shown.dtype == torch.uint8
    row, column = divmod(int(shown.int().sum(0).argmax()), 112)
    assert 28 <= row < 42 and 70 <= column < 84         # 14 pixels a patch
    warmth = shown[0].int() - shown[2].int()            # red minus blue
    assert warmth[35, 77] > 60 and warmth[100, 10] < -10


def test_a_uniform_map_stays_flat_and_dimmer_than_a_peak():
    image = torch.full((3, 16, 16), 128, dtype=torch.uint8)
    flat = visualize.overlay(image, torch.full((16,), 1 / 16), 32).int()
    assert int(flat.amax((1, 2)).sub(flat.amin((1, 2))).max()) == 0
    peak = visualize.overlay(image, torch.eye(16)[0], 32).int()
    assert int(flat.sum(0).max()) < int(peak.sum(0).max()) - 100


def test_figure1_has_each_map_below_its_symbol(tmp_path):
    data = dark_and_bright()
    path = visualize.figure1(teacher, FakeStudent(), data.images[:2], ["a", ""],
                             tmp_path / "f.png")
    page = Image.open(path).convert("RGB")
    # By hand: left = 24 + 112 + 24 = 160, a column 120 wide, rows from y = 74, 154 high.
    assert page.size == (160 + 8 * 120 - 8 + 24, 74 + 2 * 154 - 16 + 24)
    for t in range(8):                                  # the warmest pixel is in patch t of map t
        x, y = 160 + 120 * t, 74 + 154 + 26
        red, _, blue = np.moveaxis(np.asarray(page.crop((x, y, x + 112, y + 112)), int), -1, 0)
        row, column = divmod(int((red - blue).argmax()), 112)
        assert (row // 28, column // 28) == divmod(t, 4)
    assert page.getpixel((24 + 50, 74 + 26 + 50)) == (5, 5, 5)       # the image itself
    assert page.getpixel((160 + 10, 80)) != (255, 255, 255)          # a chip
    assert page.getpixel((12, 200)) == (255, 255, 255)               # the margin


def test_a_long_sequence_still_fits_the_width(tmp_path):
    path = visualize.figure1(teacher, FakeStudent(16), dark_and_bright().images[:1], ["x" * 90],
                             tmp_path / "f.png")
    page = Image.open(path)
    assert page.width <= 1400
    # By hand: 16 columns leave 70 pixels an image, so 94 to 118 lies between title and first chip.
    assert near((255, 255, 255), page.crop((96, 74, 117, 96))).all()


def ink_columns(sheet, path):
    """First and last column with ink."""
    page = np.asarray(Image.open(sheet.save(path)).convert("L"))
    columns = np.flatnonzero((page < 128).any(0))
    return int(columns[0]), int(columns[-1])


@pytest.mark.parametrize("align, middle", [("l", 140), ("m", 100), ("r", 60)])
def test_text_wider_than_its_room_is_cut_and_aligned(tmp_path, align, middle):
    sheet = visualize.Sheet(200, 30)
    sheet.text(100, 15, "H a name that is far too long for this H", align=align, room=80)
    first, last = ink_columns(sheet, tmp_path / "t.png")
    assert 65 < last - first < 80 and abs((first + last) / 2 - middle) < 6
    sheet = visualize.Sheet(200, 30)
    sheet.text(100, 15, "H", room=80)
    assert ink_columns(sheet, tmp_path / "t.png")[1] < 115          # no dots after a short one


# ---- Figure 5 ------------------------------------------------------------------------------------

def planted_ids():
    """200 images, 4 classes of 50. Symbol 7: 20 images, 18 of class 2. Symbol 3: in every image.
    Symbol 9: one image only, which makes it seem perfectly specific. The rest: 1."""
    ids, labels = torch.ones(200, 4, dtype=torch.long), torch.arange(200) // 50
    ids[:, 0] = 3
    ids[100:118, 1], ids[0:2, 2] = 7, 7
    ids[199, 3] = 9
    return ids, labels


def test_the_default_symbol_is_the_planted_one():
    ids, labels = planted_ids()
    assert visualize.specific_symbol(ids, labels) == 7
    assert visualize.specific_symbol(ids, torch.full((200,), -1)) in (1, 3)     # no classes: common
    ids[ids == 7] = 1                                   # without 7, what is common is unspecific
    assert visualize.specific_symbol(ids, labels) in (1, 3)


def test_symbol_facts_by_hand():
    ids, labels = planted_ids()
    image_set = SimpleNamespace(labels=labels, classes=["ant", "bee", "cat", "dog"])
    often, positions = visualize.symbol_facts(ids, image_set, 7)
    assert often == 'symbol 7: emitted for 20 of 200 test images (10.0 %), 90 % of them "cat"'
    assert positions.split() == "its uses by position 2: 90 % 3: 10 %".split()


def test_figure5_shows_the_images_that_have_the_symbol(tmp_path, texts):
    path = visualize.figure5(teacher, FakeStudent(), dark_and_bright(), tmp_path, count=9)
    assert path.name == "figure5_symbol1.png"           # a bright image has 1, 11, 21, ... alike
    page = Image.open(path).convert("RGB")
    assert page.size == (48 + 8 * 120 - 8, 104 + 2 * 262 - 16 + 24)              # two lines: 8 + 1
    for x, y in ((24, 124), (24 + 7 * 120, 124), (24, 124 + 262)):
        assert page.getpixel((x + 56, y + 56)) == (250, 250, 250)
    red, _, blue = np.moveaxis(np.asarray(page.crop((24, 238, 136, 350)), int), -1, 0)
    assert divmod(int((red - blue).argmax()), 112) < (28, 28)                    # patch 0
    assert page.getpixel((24 + 120 + 56, 124 + 262 + 56)) == (255, 255, 255)     # no tenth image
    assert texts[4:] == ["at 1: bright"] * 9


def test_figure5_shows_the_map_and_the_position_of_its_own_symbol(tmp_path, texts):
    images = dark_and_bright()
    images.labels[:] = -1                               # no classes
    path = visualize.figure5(teacher, FakeStudent(), images, tmp_path, 31, count=1)
    page = Image.open(path).convert("RGB")              # 31 is at the fourth position: patch 3
    red, _, blue = np.moveaxis(np.asarray(page.crop((24, 238, 136, 350)), int), -1, 0)
    row, column = divmod(int((red - blue).argmax()), 112)
    assert (row // 28, column // 28) == (0, 3)
    assert texts[-1] == "at 4" and "its uses by position     4: 100 %" in texts


def test_figure5_averages_the_maps_of_a_repeated_symbol(tmp_path, texts):
    class Repeating(FakeStudent):
        def describe(self, *args, **kwargs):
            sequence = super().describe(*args, **kwargs)
            sequence.ids[:, 5] = sequence.ids[:, 0]     # positions 1 and 6: patches 0 and 5
            return sequence
    path = visualize.figure5(teacher, Repeating(), dark_and_bright(), tmp_path, 1, count=1)
    page = np.asarray(Image.open(path).convert("RGB"), int)[238:350, 24:136]
    warmth = (page[..., 0] - page[..., 2]).reshape(4, 28, 4, 28).max((1, 3))      # of each patch
    assert abs(warmth[0, 0] - warmth[1, 1]) < 8 and warmth[3, 3] < warmth[0, 0] - 40
    assert texts[-1] == "at 1, 6: bright"


def test_figure5_names_another_symbol_when_no_image_has_the_wanted_one(tmp_path):
    with pytest.raises(ValueError, match="none of 30 test images has symbol 999; try 1$"):
        visualize.figure5(teacher, FakeStudent(), dark_and_bright(), tmp_path, symbol=999)


# ---- Figures 3 and 4 -----------------------------------------------------------------------------

@pytest.mark.parametrize("low, high, least, ticks", [
    (0, 10, 0, [0, 2, 4, 6, 8, 10]),
    (0.13, 0.87, 0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    (-3, 47, 0, [-10, 0, 10, 20, 30, 40, 50]),
    (0, 3, 1, [0, 1, 2, 3]),                            # epochs: no half ones
    (1000, 1001, 0, [1000, 1000.2, 1000.4, 1000.6, 1000.8, 1001]),
    (5, 5, 1, [4, 5, 6]),
])
def test_nice_ticks(low, high, least, ticks):
    assert visualize.nice_ticks(low, high, least) == pytest.approx(ticks)


@pytest.mark.parametrize("value", [0.0, -2.5, 1e-12, 1e9])
def test_nice_ticks_enclose_a_single_value(value):
    ticks = visualize.nice_ticks(value, value)
    assert ticks[0] <= value <= ticks[-1] and 2 <= len(ticks) <= 9


def test_planted_points_land_on_their_pixels(tmp_path):
    sheet = visualize.Sheet(400, 300)
    red = (200, 0, 0)
    points = [(0, 0.0), (5, 10.0), (10, 5.0)]           # ticks 0..10 on both axes; epochs left out
    place = visualize.plot(sheet, (100, 50, 300, 250), "", [(red, points)])
    hand = [(100, 250), (200, 50), (300, 150)]          # 20 pixels a unit, y downwards
    assert np.allclose([place(*p) for p in points], hand)
    page = Image.open(sheet.save(tmp_path / "p.png")).convert("RGB")
    assert all(near(red, page.getpixel((x - 1, y))) for x, y in hand)
    assert near(red, page.getpixel((150, 150)))         # halfway along the first stroke
    assert not near(red, page.getpixel((150, 100)))


def test_only_series_with_gaps_get_dots(tmp_path):
    def thickness(points):                              # of the ink at epoch 4, on a level line
        sheet = visualize.Sheet(300, 200)
        visualize.plot(sheet, (50, 50, 250, 150), "", [((200, 0, 0), points)])
        page = Image.open(sheet.save(tmp_path / "p.png")).convert("RGB")
        return int(near((200, 0, 0), np.asarray(page)[:, 50 + 4 * 25]).sum())
    assert thickness([(e, 1.0) for e in range(9)]) <= 3
    assert thickness([(e, 1.0) for e in range(0, 9, 4)]) >= 5


def test_epochs_are_whole_and_values_have_the_digits_of_their_step(texts):
    sheet = visualize.Sheet(300, 200)
    visualize.plot(sheet, (50, 50, 250, 150), "loss", [("red", [(0, 1.0), (2, 1.5)])])
    assert texts == ["loss", "1.0", "1.1", "1.2", "1.3", "1.4", "1.5", "0", "1", "2"]


def test_series_skips_what_was_not_measured():
    rows = [{"epoch": 0, "loss": 2.0, "perplexity": [1.0, 3.0]},
            {"epoch": 1, "loss": None, "knn_top1": 40.0, "perplexity": []},
            {"epoch": 2, "loss": float("nan")}, {"epoch": 3, "loss": float("inf")},
            {"epoch": 4, "loss": 1.0, "knn_top1": 50.0}]
    assert visualize.series(rows, "loss") == [(0, 2.0), (4, 1.0)]
    assert visualize.series(rows, "knn_top1") == [(1, 40.0), (4, 50.0)]
    assert visualize.series(rows, "perplexity") == [(0, 2.0)]
    assert visualize.series(rows, "never") == []


def test_metrics_of_a_resumed_and_still_running_run(tmp_path):
    run = write_run(tmp_path / "a", [{"epoch": e, "loss": v} for e, v in ((0, 9), (1, 8), (1, 7))])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2, "lo')                  # being written
    assert [(r["epoch"], r["loss"]) for r in visualize.read_metrics(run)] == [(0, 9), (1, 7)]


@pytest.mark.parametrize("text", ["", "no json\n", "[1]\n", '{"loss": 1}\n', '{"epoch": 0}\n7\n'])
def test_foreign_metrics_are_named(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match="metrics.jsonl"):
        visualize.read_metrics(tmp_path)


def test_curves_of_two_runs_one_without_knn(tmp_path):
    rows = [{"epoch": e, "loss": 5.0 - e, "teacher_entropy": 3.0, "teacher_entropy_max": 6.9,
             "perplexity": [4.0, 6.0]} for e in range(4)]
    with_knn = [row | ({"knn_top1": 30.0} if row["epoch"] == 3 else {}) for row in rows]
    runs = [write_run(tmp_path / "a", rows), write_run(tmp_path / "b", with_knn)]
    page = np.asarray(Image.open(visualize.curves(runs, tmp_path / "c.png")).convert("RGB"))
    # One line of legend, panels from y = 80, 254 apart: 80 + 2 * 254 - 22 pixels high.
    assert page.shape == (566, 1400, 3)
    knn, loss = page[80:261, 60:340], page[80:261, 398:680]
    blue, orange = (0x00, 0x72, 0xb2), (0xd5, 0x5e, 0x00)
    assert near(orange, knn).any() and not near(blue, knn).any()
    assert near(orange, loss).any()                     # the two losses are equal: b lies on top
    assert near(blue, page[:60]).any() and near(orange, page[:60]).any()         # the legend


# ---- the command ---------------------------------------------------------------------------------

def fake_checkpoint(path, device):
    return {"image_size": 16, "data": "shapes", "seed": 0}, teacher, FakeStudent()


def test_a_corrupt_image_is_one_clear_line(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "broken.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "broken.png").read_bytes()[:60])
    monkeypatch.setattr(visualize.checkpoint, "load_model", fake_checkpoint)
    with pytest.raises(SystemExit) as stop:
        visualize.main(["x.pt", str(tmp_path / "broken.png"), "--out", str(tmp_path / "new")])
    message = stop.value.code       # a string: Python prints it to stderr and exits with status 1
    assert message.startswith("visualize.py: ") and str(tmp_path / "broken.png") in message
    assert "\n" not in message and not (tmp_path / "new").exists()


def test_files_are_drawn_with_their_names_and_no_data_set(tmp_path, monkeypatch, capsys):
    Image.new("L", (90, 40), 200).save(tmp_path / "grey.png")
    monkeypatch.setattr(visualize.checkpoint, "load_model", fake_checkpoint)
    monkeypatch.setattr(visualize.data, "load", lambda *a, **k: pytest.fail("needs no data set"))
    visualize.main(["x.pt", str(tmp_path / "grey.png"), "--out", str(tmp_path / "new")])
    assert capsys.readouterr().out.split() == [str(tmp_path / "new" / "figure1.png")]
    page = Image.open(tmp_path / "new" / "figure1.png").convert("RGB")
    assert page.getpixel((24 + 56, 74 + 26 + 56)) == (200, 200, 200)


def test_test_images_are_the_default(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(visualize.checkpoint, "load_model", fake_checkpoint)
    monkeypatch.setattr(visualize.data, "load", lambda *a, **k: dark_and_bright())
    visualize.main(["x.pt", "--out", str(tmp_path), "--count", "3"])
    *_, five, one = capsys.readouterr().out.split()             # after the progress
    assert [Path(five).name, Path(one).name] == ["figure5_symbol1.png", "figure1.png"]
    page = Image.open(tmp_path / "figure1.png").convert("RGB")
    shades = [page.getpixel((80, 74 + 154 * i + 82))[0] for i in range(3)]
    assert shades == [5, 5, 250]                        # spread over the classes, not the first 3


@pytest.mark.parametrize("args, words", [
    (["x.pt", "missing.jpg"], "missing.jpg"), (["--curves", "no/such/run"], "no/such/run")])
def test_what_is_missing_is_named(monkeypatch, tmp_path, args, words):
    monkeypatch.setattr(visualize.checkpoint, "load_model", fake_checkpoint)
    with pytest.raises(SystemExit) as stop:
        visualize.main([*args, "--out", str(tmp_path)])
    assert str(stop.value).startswith("visualize.py: ") and words in str(stop.value)
    assert "\n" not in str(stop.value)


def test_without_a_gpu_device_cuda_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="finds no GPU; use --device cpu$"):
        visualize.main(["x.pt", "--device", "cuda"])


@pytest.mark.parametrize("args", [[], ["x.pt", "--count", "0"], ["x.pt", "--curves", "a"]])
def test_contradictory_flags_are_refused(args, capsys):
    with pytest.raises(SystemExit) as stop:
        visualize.main(args)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 2
    assert lines[0].startswith("usage: visualize.py RUN/ckpt.pt [IMAGE ...]")
    assert "give a checkpoint, or --curves RUN" in lines[1]
