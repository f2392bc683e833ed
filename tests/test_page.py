"""extras/page.py: planted codes must come out with their exact figures, in valid HTML."""
import html
import json
import re
from html.parser import HTMLParser

import pytest
import tiny_checkpoint
import torch

from data import ImageSet, load
from extras import page


def toy():
    """40 images, 10 of class a<b and 30 of class "c&d"; 4 patches. Symbol 5 comes first in 8 of the
    ten and 2 of the thirty, 1 in the others; then 7 where the first is 5, else 3; then 3, 3."""
    labels = torch.tensor([0] * 10 + [1] * 30)
    ids = torch.full((40, 4), 3)
    ids[:, 0] = 1
    ids[[*range(8), 10, 11], 0] = 5
    ids[ids[:, 0] == 5, 1] = 7
    images = torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8)
    return ids, torch.full((40, 4, 4), 0.25), ImageSet(images, labels, ["a<b", '"c&d"'])


def built(ids, attention, image_set, **more):
    return page.build(page.Codes(ids, attention, image_set, 8), "run <1>", "toy", **more)


class Parser(HTMLParser):
    """Fails on a tag that is not closed in its order; collects ids, links and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.sources, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag != "script" and not any(name.startswith("on") for name in attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []
        self.sources += [attributes["src"]] if "src" in attributes else []
        self.open += [] if tag in ("meta", "img", "br") else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += "" if self.open and self.open[-1] == "style" else data


@pytest.mark.parametrize("symbols", [0, 2, 64])
def test_the_page_is_valid_and_needs_nothing_else(symbols):
    text = built(*toy(), symbols=symbols, metrics=[{"epoch": 1, "loss": 2.0}])
    parsed = Parser(text)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert parsed.links and all(link[0] == "#" and link[1:] in parsed.ids for link in parsed.links)
    assert parsed.sources and all(source.startswith("data:image/") for source in parsed.sources)
    assert not re.search(r"https?:|url\(|@import|<link", text) and "$" not in parsed.text
    assert text.count("data:image/png") == len(page.visualize.PANELS)
    headings = re.findall(r"<h2[^>]*>([\w ]+)", text)
    assert headings == ["Training", "Samples", "Symbol table", "Prefixes"]
    assert text.count("<article") == min(symbols, 4)            # 1, 3, 5 and 7 are in use


def test_lifts_are_exact():
    ids, _, data = toy()
    first = (ids == 5).any(1)
    assert page.lifts(first, data.labels, data.classes) == [
        ("a<b", 0.8 / 0.25, 8), ('"c&d"', pytest.approx(0.2 / 0.75), 2)]
    everyone = page.lifts(first | True, data.labels, data.classes)
    assert sorted(everyone) == [('"c&d"', 1.0, 30), ("a<b", 1.0, 10)]
    half = torch.where(torch.arange(40) < 5, -1, data.labels)   # 5 of class 0 remain, 3 have 5
    assert page.lifts(first, half, data.classes)[0] == ("a<b", pytest.approx(3 / 5 / (5 / 35)), 3)
    assert page.lifts(first, torch.full((40,), -1), data.classes) == []


def test_one_odd_image_of_a_rare_value_does_not_come_first():
    values = torch.tensor([0] * 20 + [1] * 20 + [2] * 2)
    chosen = torch.zeros(42, dtype=torch.bool)
    chosen[[*range(15), 40]] = True                             # 15 of 20, and 1 of the rare 2
    rows = page.lifts(chosen, values, ["common", "other", "rare"])
    assert [row[0] for row in rows] == ["common", "rare"]


def test_an_entry_has_counts_positions_values_and_co_occurrence():
    text = built(*toy())
    entry = re.search(r'<article[^>]*id="s5">.*?</article>', text).group()
    words = html.unescape(re.sub("<[^>]+>", " ", entry)).split()
    assert " ".join(words[:12]) == "5 10 images, 25.0 % 10 uses below: position 1, 10 images"
    assert "class a<b × 3.20 (8)" in " ".join(words)        # "c&d" is rarer here than elsewhere
    assert words[-6:] == ["co-occurs", "with", "3", "10,", "7", "10"]
    assert re.findall(r"<div>(\d*)<i style=\"height:(\d+)px\"></i>\d", entry) == [
        ("10", "28"), ("", "0"), ("", "0"), ("", "0")]
    assert entry.count("<img") == 2 * page.EXAMPLES


def test_the_most_informative_position():
    """Symbol 1 is at position 1 in 12 images of both classes, at position 2 in the 4 of class 0."""
    labels = torch.tensor([0] * 4 + [1] * 20)
    ids = torch.stack([torch.arange(24) % 2, (labels == 0).long(), torch.full((24,), 2)], 1)
    assert page.most_informative_position(ids, 1, {"class": (labels, ["few", "many"])}) == 1
    unknown = {"class": (labels * 0 - 1, ["few", "many"])}
    assert page.most_informative_position(ids, 1, unknown) == 0
    assert page.most_informative_position(ids, 1, {}) == 0
    assert page.most_informative_position(ids, 2, {}) == 2


def test_co_occurrence_is_counted_in_images():
    present = torch.tensor([[1, 1, 0, 1], [1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 1]]).bool()
    assert page.co_occurrence(present, 0, 4) == [(1, 2), (3, 2)]
    assert page.co_occurrence(present, 1, 1) == [(0, 2)] and page.co_occurrence(present, 2, 4) == []


def test_the_tree_goes_from_the_largest_group_to_its_parts():
    ids = torch.tensor([[2, 0], [1, 4], [2, 0], [2, 3], [1, 4], [2, 3], [2, 0], [6, 6]])
    groups = page.prefix_groups(ids, torch.arange(8), 0, 2)
    assert [(s, m.tolist()) for s, m in groups] == [(2, [0, 2, 3, 5, 6]), (1, [1, 4])]
    inner = page.prefix_groups(ids, groups[0][1], 1, 9)
    assert [(s, m.tolist()) for s, m in inner] == [(0, [0, 2, 6]), (3, [3, 5])]
    images = ImageSet(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.full((8,), -1), [])
    tree = page.tree(page.Codes(ids, torch.full((8, 2, 4), 0.25), images, 7))
    tree = html.unescape(re.sub(r"<[^>]+>", " ", tree))
    found = re.findall(r"(?:\d+ +)+images?", tree)
    assert [" ".join(x.split()) for x in found] == [
        "2 5 images", "2 0 3 images", "2 3 2 images", "1 2 images", "1 4 2 images", "6 1 image",
        "6 6 1 image"]


def test_names_are_escaped():
    text = built(*toy())
    assert "a<b" not in text and '"c&d"' not in text and "run <1>" not in text
    parsed = Parser(text)
    assert "a<b" in parsed.text and '"c&d"' in parsed.text and "Symbols of run <1>" in parsed.text


def test_images_without_labels_have_a_page_without_values():
    ids, attention, data = toy()
    text = built(ids, attention, ImageSet(data.images, torch.full((40,), -1), []))
    parsed = Parser(text)
    assert "class" not in parsed.text and "No metrics.jsonl" in parsed.text
    assert "10 images, 25.0 %" in parsed.text and text.count("<article") == 4


def test_factors_of_shapes_are_named():
    data = load("shapes", "test", 32, 60)
    small = data.factors["size"] == 0
    ids = torch.where(small, 5, 2)[:, None]                     # the one symbol is the size
    text = built(ids, torch.full((60, 1, 64), 1 / 64), data)
    entry = re.search(r'<article[^>]*id="s5">.*?</article>', text).group()
    words = html.unescape(re.sub("<[^>]+>", "", entry)).replace("\xa0", " ")
    uses = int(small.sum())
    assert f"small × {60 / uses:.2f} ({uses})" in words
    assert all(f"<th>{name}</th>" in entry for name in ("shape", "colour", "size", "column", "row"))


def test_large_images_become_thumbnails():
    text = page.thumbnail(torch.zeros(3, 256, 256, dtype=torch.uint8), 64)
    assert len(text) < 2000 and "pixels" not in text            # smoothly, not in blocks


def test_the_command_writes_a_page_and_names_what_is_wrong(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "new" / "page.html"
    run.mkdir()
    tiny_checkpoint.save(run / "ckpt.pt")
    (run / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "loss": 2.0}) + "\n")
    page.main([str(run / "ckpt.pt"), "-o", str(out), "--images", "30", "--device", "cpu"])
    assert "30 images" in capsys.readouterr().out
    text = out.read_text()
    assert "30 test images of shapes" in Parser(text).text and str(tmp_path) not in text
    page.main([str(run / "ckpt.pt"), "-o", str(out), "--images", "9", "--split", "train"])
    assert "9 train images of shapes" in Parser(out.read_text()).text
    (run / "metrics.jsonl").write_text(json.dumps({"no": "epoch"}) + "\n")
    ckpt = str(run / "ckpt.pt")
    for words in [[str(tmp_path / "none.pt")], [ckpt], [ckpt, "--data", "nothing"],
                  [ckpt, "--images", "0"]]:
        with pytest.raises(SystemExit, match=r"^extras\.page: [^\n]+$"):
            page.main([*words, "--device", "cpu", "-o", str(tmp_path / "x.html")])
    assert not (tmp_path / "x.html").exists()
