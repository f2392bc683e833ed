"""hubconf.py and extras/describe.py: the same symbols by every way, files that survive a kill,
exact audits."""
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import hubconf
from extras import codes, describe

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkpoint(tiny_trainer, tmp_path):
    """checkpoint(*flags) -> a file of a tiny student that has seen one batch: 8 symbols of 8, N =
    4."""
    def make(*flags, name="ckpt.pt"):
        trainer = tiny_trainer(*flags)
        if trainer.student.draft:                           # 32 pictures leave nothing for symbol 8
            trainer.student.draft.centres.data.normal_()
            trainer.student.draft.unit.fill_(10)
        tokens = trainer.teacher(data.normalize(trainer.images, 8))
        for _ in range(60):                          # statistics for BatchNorm, or all say the same
            trainer.student.train().describe(tokens)
        torch.save(trainer.state(), tmp_path / name)
        return str(tmp_path / name)
    return make


@pytest.fixture
def folder(tmp_path):
    """10 pictures of 8 x 8: 5 in the folder a, 5 in b/deep."""
    for i in range(10):
        place = tmp_path / "pictures" / ("a", "b/deep")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (8, 8, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(place / f"{i}.png")
    return tmp_path / "pictures"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, *rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def refusal(*words):
    """What the command says instead of working; one line, after its name."""
    with pytest.raises(SystemExit) as stop:
        describe.main([str(word) for word in words])
    name, message = str(stop.value).split(": ", 1)
    assert name == "extras.describe" and "\n" not in message
    return message


# ---- hubconf -------------------------------------------------------------------------------------

def test_torch_hub_finds_it_from_another_folder(checkpoint, tmp_path):
    code = (f"import torch\ns = torch.hub.load({str(ROOT)!r}, 'symbolizer', source='local', "
            f"checkpoint={checkpoint()!r})\n"
            "print(tuple(s(torch.rand(3, 3, 8, 8)).shape), s.read(s(torch.rand(3, 3, 8, 8))).shape[1:])")
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True)
    assert said.stdout.strip() == "(3, 8) torch.Size([4, 64])", said.stderr
    listed = [name for name, x in vars(hubconf).items() if callable(x) and not name.startswith("_")]
    assert listed == ["symbolizer"]                         # as torch.hub.list does


@pytest.mark.parametrize("disc", ["softmax", "gumbel", "vq"])
def test_reading_symbols_is_reading_the_description(checkpoint, disc):
    symbolizer = hubconf.symbolizer(checkpoint("--disc", disc))
    pictures = torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8)
    said = symbolizer.describe(pictures)
    assert len(said.ids.unique(dim=0)) > 1 and said.ids.dtype == torch.int64
    z = symbolizer.student.interpret(said.embeddings, said.drafts)
    assert torch.allclose(symbolizer.read(said.ids), z, atol=1e-5)
    assert torch.equal(symbolizer(pictures), said.ids)
    assert torch.equal(symbolizer(pictures.float() / 255), said.ids)
    assert torch.equal(torch.cat([symbolizer(x[None]) for x in pictures]), said.ids)


def test_other_shapes_give_their_central_square_and_training_around_it_changes_nothing(checkpoint):
    symbolizer = hubconf.symbolizer(checkpoint())
    wide = torch.randint(256, (12, 3, 8, 12), dtype=torch.uint8)
    tall = wide.transpose(2, 3)
    before = symbolizer(wide)
    assert torch.equal(before, symbolizer(wide[..., 2:10]))
    assert torch.equal(symbolizer(tall), symbolizer(tall[:, :, 2:10]))
    torch.nn.Sequential(symbolizer).train()
    symbolizer(255 - wide)
    assert torch.equal(symbolizer(wide), before)


def test_wrong_pictures_and_symbols_are_refused(checkpoint):
    symbolizer = hubconf.symbolizer(checkpoint())
    for pictures in (torch.rand(3, 8, 8), torch.rand(2, 1, 8, 8), 255 * torch.rand(2, 3, 8, 8),
                     torch.full((1, 3, 8, 8), torch.nan), torch.ones(1, 3, 8, 8, dtype=torch.int64)):
        with pytest.raises(ValueError, match="pictures must be"):
            symbolizer(pictures)
    for symbols in (torch.zeros(2, 4).long(), torch.full((1, 8), 8), torch.full((1, 8), -1)):
        with pytest.raises(ValueError, match="symbols must be"):
            symbolizer.read(symbols)


# ---- a folder ------------------------------------------------------------------------------------

def test_lines_say_what_the_model_says(checkpoint, folder, tmp_path):
    ckpt, out = checkpoint(), tmp_path / "s.jsonl"
    describe.main([ckpt, str(folder), "-o", str(out), "--batch-size", "3", "--attention"])
    rows = lines(out)
    names = [row["path"] for row in rows]
    assert names == [*(f"a/{i}.png" for i in (0, 2, 4, 6, 8)),
                     *(f"b/deep/{i}.png" for i in (1, 3, 5, 7, 9))]
    pictures = torch.stack([data.read_image(folder / name, 8) for name in names])
    said = hubconf.symbolizer(ckpt).describe(pictures, attention=True)
    assert [row["symbols"] for row in rows] == said.ids.tolist()
    assert {row["bits"] for row in rows} == {24.0}          # 8 log2 8
    # The chosen symbol is the largest logit: log p = max - log sum exp
    log_prob = said.logits.max(-1).values - said.logits.exp().sum(-1).log()
    assert torch.allclose(torch.tensor([row["log_prob"] for row in rows]), log_prob, atol=1e-4)
    attention = torch.tensor([row["attention"] for row in rows])
    assert attention.shape == (10, 8, 4) and torch.allclose(attention, said.attention, atol=1e-4)


def test_corrupt_files_are_named_counted_and_left_out(checkpoint, folder, tmp_path, capsys):
    ckpt, out = checkpoint(), tmp_path / "s.jsonl"
    whole = (folder / "a/4.png").read_bytes()
    (folder / "a/4.png").write_bytes(whole[:60])
    (folder / "zz.jpg").write_bytes(b"")
    describe.main([ckpt, str(folder), "-o", str(out)])
    said = capsys.readouterr().err
    assert "a/4.png" in said and "zz.jpg" in said and "10 lines" not in said
    assert "9 lines, 2 files skipped" in said and "images/s" in said
    before = out.read_bytes()
    assert len(lines(out)) == 9 and b"a/4" not in before
    describe.main([ckpt, str(folder), "-o", str(out)])     # nothing is left to do, nothing is added
    assert "9 lines, 2 files skipped" in capsys.readouterr().err and out.read_bytes() == before
    (folder / "a/4.png").write_bytes(whole)             # a file that was skipped can be read now
    assert "a/6.png, expected a/4.png" in refusal(ckpt, folder, "-o", out)
    assert out.read_bytes() == before


def test_a_file_cut_anywhere_is_completed_without_loss_or_double(checkpoint, folder, tmp_path):
    ckpt, out = checkpoint(), tmp_path / "s.jsonl"
    (folder / "a/1.png").write_bytes(b"corrupt")            # the second name
    symbolizer = hubconf.symbolizer(ckpt)
    describe.describe_folder(symbolizer, folder, out, 4, False)
    whole, ends = out.read_bytes(), [0]
    for line in whole.splitlines(keepends=True):
        ends.append(ends[-1] + len(line))
    assert len(ends) == 11
    for cut in sorted({*range(0, ends[2] + 1, 7), *ends, ends[5] - 1, ends[5] + 1, ends[-1] - 1}):
        out.write_bytes(whole[:cut])
        describe.describe_folder(symbolizer, folder, out, 4, False)
        kept = max(end for end in ends if end <= cut)
        assert out.read_bytes()[:kept] == whole[:kept]      # complete lines stay as they are
        for row, old in zip(lines(out), map(json.loads, whole.splitlines()), strict=True):
            assert describe.same(row, old) and row["path"] == old["path"]


def test_a_killed_command_goes_on(checkpoint, folder, tmp_path):
    """kill -9 in the fourth batch of 3; the second run ends with what one run would write."""
    code = ("import itertools, os, sys\nfrom extras import describe\n"
            "calls, real = itertools.count(), describe.describe\n"
            "die = lambda *a: os.kill(os.getpid(), 9) if next(calls) == 3 else real(*a)\n"
            "describe.describe = die\ndescribe.main(sys.argv[1:])")
    out, once = tmp_path / "s.jsonl", tmp_path / "once.jsonl"
    words = [checkpoint(), str(folder), "--device", "cpu", "--batch-size", "3", "-o"]
    child = subprocess.run([sys.executable, "-c", code, *words, str(out)], cwd=ROOT)
    assert child.returncode == -9 and len(lines(out)) == 9
    describe.main([*words, str(out)])
    describe.main([*words, str(once)])
    assert [row["path"] for row in lines(out)] == [row["path"] for row in lines(once)]
    assert all(map(describe.same, lines(out), lines(once))) and len(lines(out)) == 10


def test_a_file_of_something_else_is_refused_and_left_alone(checkpoint, folder, tmp_path):
    ckpt, out = checkpoint(), tmp_path / "s.jsonl"
    torch.manual_seed(1)
    other = checkpoint(name="other.pt")
    describe.main([ckpt, str(folder), "-o", str(out)])
    torn = out.read_bytes()[:-5]
    out.write_bytes(torn)
    assert "another checkpoint" in refusal(other, folder, "-o", out)
    assert "--attention" in refusal(ckpt, folder, "-o", out, "--attention")
    assert "expected" not in refusal(other, folder, "-o", out)
    (folder / "a/0a.png").write_bytes((folder / "a/0.png").read_bytes())    # a new one in between
    assert "a/2.png, expected a/0a.png" in refusal(ckpt, folder, "-o", out)
    shutil.rmtree(folder / "b")
    (folder / "a/0a.png").unlink()
    assert "no picture is left" in refusal(ckpt, folder, "-o", out)
    assert out.read_bytes() == torn
    out.write_text("my notes, which end without a newline")
    assert "no file of this command" in refusal(ckpt, folder, "-o", out)
    assert out.read_text().startswith("my notes")


# ---- --like --------------------------------------------------------------------------------------

def test_like_ranks_by_the_cosine_of_what_is_read(checkpoint, folder, tmp_path, capsys):
    ckpt, out = checkpoint(), tmp_path / "s.jsonl"
    describe.main([ckpt, str(folder), "-o", str(out), "--like", str(folder / "b/deep/3.png")])
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    symbolizer, rows = hubconf.symbolizer(ckpt), {row["path"]: row["symbols"] for row in lines(out)}
    student = symbolizer.student
    z = student.read(torch.tensor([*rows.values()]))[:, -1]
    asked = z[[*rows].index("b/deep/3.png")]
    cosine = dict(zip(rows, F.normalize(z, dim=1) @ F.normalize(asked, dim=0)))
    assert printed[0][2:] == [*map(str, rows["b/deep/3.png"]), str(folder / "b/deep/3.png")]
    assert "b/deep/3.png" in [row[-1] for row in printed[1:] if row[:2] == ["1.000000", "8"]]
    assert sorted(row[-1] for row in printed[1:]) == sorted(rows)
    shown = [float(row[0]) for row in printed[1:]]
    assert shown == sorted(shown, reverse=True) and shown[-1] < 0.999
    for value, agree, *ids, name in printed[1:]:
        assert float(value) == pytest.approx(cosine[name].item(), abs=1e-3)    # float32 beside 1000
        assert ids == [*map(str, rows[name])]
        assert int(agree) == sum(a == b for a, b in zip(rows[name], rows["b/deep/3.png"]))
    describe.main([ckpt, "-o", str(out), "--like", str(folder / "a/0.png"), "--count", "2"])
    assert len(capsys.readouterr().out.splitlines()) == 3


# ---- --check -------------------------------------------------------------------------------------

def test_an_audit_by_hand():
    """Position 1 is the label, position 2 a coin, position 3 constant; half of the rows are
    copies."""
    ids = torch.tensor([[0, 0, 5], [0, 1, 5], [1, 0, 5], [1, 1, 5]]).repeat(2, 1)
    f = codes.audit(ids, ["cat", "cat", "dog", "dog"] * 2)
    assert (f["images"], f["length"], f["vocab"], f["used"], f["usage"]) == (8, 3, 6, 3, 0.5)
    assert f["perplexity"] == pytest.approx([2, 2, 1])
    assert (f["distinct"], f["duplicates"], f["most"]) == (0.5, 4, 2)
    assert f["bits"] == pytest.approx(3 * math.log2(6)) and f["entropy"] == pytest.approx(2)
    assert f["information"] == pytest.approx([1, 0, 0], abs=1e-12) and f["label_entropy"] == 1
    assert codes.audit(ids, vocab=8)["bits"] == 9 and "knn" not in codes.audit(ids)


def test_information_of_a_noisy_position():
    """p(s = y) = 3/4: I = 1 - H(1/4) = 1 - 0.811278 bits."""
    f = codes.audit(torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])[:, None], [0] * 4 + [1] * 4)
    assert f["information"] == pytest.approx([0.188722], abs=1e-6)


def test_knn_of_codes_that_tell_the_label_and_of_codes_that_do_not():
    y = torch.arange(400) % 4
    told = codes.audit(torch.stack([y, y + 2**40], 1), y.tolist())          # large ids cost nothing
    assert set(told["knn"].values()) == {100.0} and told["gallery"] == told["queries"] == 200
    assert told["shuffled"][0] < 0.1 < 1.99 < told["information"][0]
    same = codes.audit(torch.zeros(400, 2).long(), y.tolist())
    assert same["knn"][200] <= same["majority"] < 40 and same["bits"] == 0


def test_only_a_part_is_compared_when_one_hot_is_too_large(monkeypatch):
    monkeypatch.setattr(codes, "ONE_HOT", 10 * 2 * 4)
    f = codes.audit(torch.arange(100).view(-1, 1).repeat(1, 2) % 4, [0] * 100)
    assert (f["gallery"], f["queries"], f["images"]) == (5, 5, 100)


def test_check_prints_the_figures_of_a_file(checkpoint, tmp_path, capsys):
    rows = [{"symbols": [i % 2, 3], "path": f"any/{'ab'[i % 2]}/{i}.jpg", "more": 1}
            for i in range(40)]
    path = write(tmp_path / "codes.jsonl", *rows)
    describe.main(["--check", path])
    out = capsys.readouterr().out
    assert "40 images of 2 symbols; vocabulary 4, in use 3 (75.0%)" in out
    assert ("distinct sequences / images 0.0500: 38 duplicates, the most frequent sequence 20 times"
            in out)
    assert "bits an image 4.00 (T log2 K); sum of the positions' entropies 1.00" in out
    assert "perplexity by position         2.00    1.00" in out and "label" not in out
    describe.main(["--check", path, "--labels-from-path", "--vocab", "16"])
    out = capsys.readouterr().out
    assert "bits an image 8.00" in out and "0.000  of 1.000 (2 classes)" in out
    assert "k = 10: 100.00" in out and "(20 images are the gallery, 20 ask)" in out
    write(tmp_path / "codes.jsonl", *({"symbols": [i], "label": "xy"[i]} for i in (0, 1, 0, 1)))
    describe.main([checkpoint(), "--check", path])          # the vocabulary of the checkpoint
    out = capsys.readouterr().out
    assert "vocabulary 8, in use 2" in out and "  1.000  of 1.000 (2 classes)" in out


@pytest.mark.parametrize("bad, message", [
    ("{not json", "line 2 is not JSON"), ("", "line 2 is not JSON"), ("[1, 2]", "line 2 needs"),
    ("[" * 100000, "line 2 is not JSON"), ('{"symbols": []}', "line 2 needs"),
    ('{"symbols": "12"}', "line 2 needs"), ('{"symbols": [1, true]}', "line 2 needs"),
    ('{"symbols": [1, 0.5]}', "line 2 needs"), ('{"symbols": [1, -2]}', "line 2: symbols must be"),
    ('{"symbols": [1, 99999999999999999999]}', "line 2: symbols must be"),
    ('{"symbols": [1, 2, 3]}', "line 2 has 3 symbols, the lines before it 2"),
    ('{"symbols": [1, 2], "label": 3}', 'line 2: a "label"')])
def test_a_bad_line_is_named_by_its_number(tmp_path, bad, message):
    path = write(tmp_path / "codes.jsonl", {"symbols": [1, 2]}, bad)
    assert message in refusal("--check", path)


def test_user_errors_are_one_line(checkpoint, folder, tmp_path):
    ckpt, out, empty = checkpoint(), tmp_path / "s.jsonl", tmp_path / "empty"
    empty.mkdir()
    assert "no file" in refusal("none.pt", folder, "-o", out)
    assert "no folder" in refusal(ckpt, tmp_path / "none", "-o", out)
    assert "no images in" in refusal(ckpt, empty, "-o", out)
    assert not out.exists()
    assert "give a checkpoint" in refusal(ckpt, folder)
    assert "give a checkpoint" in refusal()
    assert "at least 1" in refusal(ckpt, folder, "-o", out, "--batch-size", 0)
    assert "No such file" in refusal(ckpt, folder, "-o", empty / "none" / "s.jsonl")
    (empty / "a.png").write_bytes(b"")
    assert "none of the 1 images" in refusal(ckpt, empty, "-o", out)
    assert "cannot read image" in refusal(ckpt, "--like", tmp_path / "none.png", "-o", out)
    assert "No such file" in refusal(ckpt, "--like", folder / "a/0.png", "-o", tmp_path / "none")
    write(out, {"symbols": [1, 2, 3]})
    assert "of another checkpoint" in refusal(ckpt, "--like", folder / "a/0.png", "-o", out)
    assert "not in a vocabulary of 3" in refusal("--check", out, "--vocab", 3)
    assert "--labels-from-path" in refusal("--check", out, "--labels-from-path")
    assert "takes no FOLDER" in refusal(ckpt, folder, "--check", out)
    out.write_text("")
    assert "is empty" in refusal("--check", out)
    assert "No such file" in refusal("--check", tmp_path / "none")
