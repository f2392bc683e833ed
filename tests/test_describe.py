"""extras/describe.py: lines that equal the model's output, files that survive a kill, retrieval."""
import itertools
import json
import os
import shutil
import signal

import pytest
import tiny_checkpoint
import torch
import torch.nn.functional as F
from PIL import Image

import data
import hubconf
from extras import describe


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A tiny student: 8 symbols of 8 for images of 8 x 8, N = 4."""
    torch.manual_seed(0)
    return tiny_checkpoint.save(tmp_path_factory.mktemp("run") / "ckpt.pt")


@pytest.fixture
def folder(tmp_path):
    """10 images of 8 x 8: 5 in the folder a, 5 in b/deep."""
    for i in range(10):
        place = tmp_path / "images" / ("a", "b/deep")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (8, 8, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(place / f"{i}.png")
    return tmp_path / "images"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def refusal(*words):
    """The one line of the error with which the command ends, without its name."""
    with pytest.raises(SystemExit) as stop:
        describe.main([str(word) for word in words])
    name, message = str(stop.value).split(": ", 1)
    assert name == "extras.describe" and "\n" not in message
    return message


# ---- a folder ------------------------------------------------------------------------------------

def test_lines_hold_what_the_model_emits(ckpt, folder, tmp_path):
    out = tmp_path / "s.jsonl"
    describe.main([ckpt, str(folder), "-o", str(out), "--batch-size", "3", "--attention"])
    rows = lines(out)
    names = [row["path"] for row in rows]
    assert names == [*(f"a/{i}.png" for i in (0, 2, 4, 6, 8)),
                     *(f"b/deep/{i}.png" for i in (1, 3, 5, 7, 9))]
    images = torch.stack([data.read_image(folder / name, 8) for name in names])
    sequence = hubconf.symbolizer(ckpt).describe(images, attention=True)
    assert [row["symbols"] for row in rows] == sequence.ids.tolist()
    assert {row["bits"] for row in rows} == {24.0}          # 8 log2 8
    # The chosen symbol is the largest logit: log p = max - log sum exp
    log_prob = sequence.logits.max(-1).values - sequence.logits.exp().sum(-1).log()
    assert torch.allclose(torch.tensor([row["log_prob"] for row in rows]), log_prob, atol=1e-4)
    attention = torch.tensor([row["attention"] for row in rows])
    assert attention.shape == (10, 8, 4)
    assert torch.allclose(attention, sequence.attention, atol=1e-4)


def test_corrupt_files_are_named_counted_and_left_out(ckpt, folder, tmp_path, capsys):
    out = tmp_path / "s.jsonl"
    whole = (folder / "a/4.png").read_bytes()
    (folder / "a/4.png").write_bytes(whole[:60])
    (folder / "zz.jpg").write_bytes(b"")
    describe.main([ckpt, str(folder), "-o", str(out)])
    printed, skipped = capsys.readouterr()
    assert "a/4.png" in skipped and "zz.jpg" in skipped and "9 lines, 2 files skipped" in printed
    before = out.read_bytes()
    assert len(lines(out)) == 9 and b"a/4" not in before
    describe.main([ckpt, str(folder), "-o", str(out)])     # nothing is left to do, nothing is added
    assert "9 lines, 2 files skipped" in capsys.readouterr().out and out.read_bytes() == before
    (folder / "a/4.png").write_bytes(whole)             # a file that was skipped can be read now
    assert "a/6.png, but a/4.png was expected" in refusal(ckpt, folder, "-o", out)
    assert out.read_bytes() == before


def test_a_file_cut_anywhere_is_completed_without_loss_or_double(ckpt, folder, tmp_path):
    out = tmp_path / "s.jsonl"
    (folder / "a/1.png").write_bytes(b"corrupt")            # the second name
    symbolizer = hubconf.symbolizer(ckpt)
    describe.describe_folder(symbolizer, folder, out, 4, False)
    whole, ends = out.read_bytes(), [0]
    for line in whole.splitlines(keepends=True):
        ends.append(ends[-1] + len(line))
    assert len(ends) == 11
    for cut in sorted({*range(0, ends[2] + 1, 31), *ends, ends[5] - 1, ends[5] + 1, ends[-1] - 1}):
        out.write_bytes(whole[:cut])
        describe.describe_folder(symbolizer, folder, out, 4, False)
        kept = max(end for end in ends if end <= cut)
        assert out.read_bytes()[:kept] == whole[:kept]      # complete lines stay as they are
        for row, old in zip(lines(out), map(json.loads, whole.splitlines()), strict=True):
            assert describe.same_line(row, old) and row["path"] == old["path"]


def test_a_killed_command_resumes(ckpt, folder, tmp_path, monkeypatch):
    """kill -9 before the fourth batch of 3; the second run ends with what one run would write."""
    out, once = tmp_path / "s.jsonl", tmp_path / "once.jsonl"
    words = [ckpt, str(folder), "--device", "cpu", "--batch-size", "3", "-o"]
    child = os.fork()                   # and no new process: to import PyTorch takes 5 seconds
    if not child:
        batches, describe_images = itertools.count(), describe.describe_images
        monkeypatch.setattr(describe, "describe_images", lambda *a: (
            os.kill(os.getpid(), signal.SIGKILL) if next(batches) == 3 else describe_images(*a)))
        describe.main([*words, str(out)])
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL and len(lines(out)) == 9
    describe.main([*words, str(out)])
    describe.main([*words, str(once)])
    assert [row["path"] for row in lines(out)] == [row["path"] for row in lines(once)]
    assert all(map(describe.same_line, lines(out), lines(once))) and len(lines(out)) == 10


def test_a_file_of_something_else_is_refused_and_left_alone(ckpt, folder, tmp_path):
    out = tmp_path / "s.jsonl"
    torch.manual_seed(1)
    other = tiny_checkpoint.save(tmp_path / "other.pt", "--recipe", "paper")
    describe.main([ckpt, str(folder), "-o", str(out)])
    torn = out.read_bytes()[:-5]
    out.write_bytes(torn)
    assert "another checkpoint" in refusal(other, folder, "-o", out)
    assert "--attention" in refusal(ckpt, folder, "-o", out, "--attention")
    (folder / "a/0a.png").write_bytes((folder / "a/0.png").read_bytes())    # a new one in between
    assert "a/2.png, but a/0a.png was expected" in refusal(ckpt, folder, "-o", out)
    shutil.rmtree(folder / "b")
    (folder / "a/0a.png").unlink()
    assert "no image is left" in refusal(ckpt, folder, "-o", out)
    assert out.read_bytes() == torn
    out.write_text("my notes, which end without a newline")
    assert "not written by this command" in refusal(ckpt, folder, "-o", out)
    assert out.read_text().startswith("my notes")


# ---- --retrieve ----------------------------------------------------------------------------------

def test_retrieval_ranks_by_the_cosine_of_z_s(ckpt, folder, tmp_path, capsys):
    out, query = tmp_path / "s.jsonl", "b/deep/3.png"
    describe.main([ckpt, str(folder), "-o", str(out)])
    capsys.readouterr()
    describe.main([ckpt, "-o", str(out), "--retrieve", str(folder / query)])
    heading, *found = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {row["path"]: row["symbols"] for row in lines(out)}
    student = hubconf.symbolizer(ckpt).student
    z = student.interpret(student.embed(torch.tensor([*rows.values()])))[:, -1]
    cosine = dict(zip(rows, F.cosine_similarity(z, z[[*rows].index(query)][None]).tolist()))
    assert heading[2:] == [*map(str, rows[query]), str(folder / query)]
    assert query in [row[-1] for row in found if row[:2] == ["1.000000", "8"]]
    assert sorted(row[-1] for row in found) == sorted(rows)
    printed = [float(row[0]) for row in found]
    assert printed == sorted(printed, reverse=True) and printed[-1] < 0.999
    for value, equal, *ids, name in found:
        assert float(value) == pytest.approx(cosine[name], abs=1e-5)
        assert ids == [*map(str, rows[name])]
        assert int(equal) == sum(a == b for a, b in zip(rows[name], rows[query]))
    describe.main([ckpt, "-o", str(out), "--retrieve", str(folder / "a/0.png"), "--count", "2"])
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_hidden_files_are_passed_over(folder):
    shutil.copy(folder / "a/0.png", folder / "a/._0.png")
    (folder / ".cache").mkdir()
    shutil.copy(folder / "a/0.png", folder / ".cache/0.png")
    assert len(describe.list_images(folder)) == 10


def test_user_errors_are_one_line(ckpt, folder, tmp_path):
    out, empty = tmp_path / "s.jsonl", tmp_path / "empty"
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
    assert "cannot read image" in refusal(ckpt, "--retrieve", tmp_path / "none.png", "-o", out)
    query = folder / "a/0.png"
    assert "No such file" in refusal(ckpt, "--retrieve", query, "-o", tmp_path / "none")
    out.write_text(json.dumps({"symbols": [1, 2, 3]}) + "\n")
    assert "of another checkpoint" in refusal(ckpt, "--retrieve", query, "-o", out)
    assert "not in a vocabulary of 3" in refusal("--statistics", out, "--vocab", 3)
    assert "--labels-from-path" in refusal("--statistics", out, "--labels-from-path")
    assert "takes no FOLDER" in refusal(ckpt, folder, "--statistics", out)
    out.write_text("")
    assert "is empty" in refusal("--statistics", out)
    assert "No such file" in refusal("--statistics", tmp_path / "none")
