"""Files that lie: 200 checkpoints and 200 images, damaged at random, forged, or made to do harm.
Each is read, or refused in one line, and nothing else happens. With fixed seeds."""
import copy
import functools
import io
import json
import os
import pickle
import random
import struct
import sys
import zlib

import pytest
import torch
from PIL import Image

import checkpoint
import data
import evaluate
from extras import describe


def damaged(blob, rng):
    """Bytes flipped, the end cut off, or a part blanked, doubled, or replaced."""
    a, b = sorted(rng.sample(range(len(blob)), 2))
    kind = rng.randrange(5)
    if kind == 0:
        flipped = bytearray(blob)
        for _ in range(rng.choice([1, 5, 50])):
            flipped[rng.randrange(len(blob))] ^= rng.randrange(1, 256)
        return bytes(flipped)
    middle = [b"", bytes(b - a), blob[a:b] * 2, blob[:b - a]][kind - 1]
    return blob[:a] + middle + (b"" if kind == 1 else blob[b:])


# ---- checkpoints ---------------------------------------------------------------------------------

class Hostile:
    """A pickle that runs a command when it is read."""
    def __init__(self, function, *words):
        self.call = function, words

    def __reduce__(self):
        return self.call


def forged(state, rng, values):
    """The checkpoint with one of `values` in some place; without any: a neighbour's, or gone."""
    state = copy.deepcopy(state)
    part = rng.choice([state, *[state[name] for name in ("config", "teacher", "student")] * 3])
    key = rng.choice(list(part))
    part[key] = rng.choice(values or [part[rng.choice(list(part))]])            # its neighbour's
    if not values and rng.random() < 0.5:
        del part[key]
    return state


def saved(state, rng):
    """In the format of today's PyTorch, or of torch < 1.6."""
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=rng.random() < 0.7)
    return file.getvalue()


def checkpoints(state, victim):
    """200 times (kind, file): damaged in its bytes, with code in it, with a wrong value."""
    rng, nan = random.Random(0), torch.tensor(torch.nan)
    harm = [Hostile(os.system, f"touch {victim}"), Hostile(eval, f"open({str(victim)!r}, 'w')"),
            Hostile(exec, f"open({str(victim)!r}, 'w')"), Hostile(io.open, str(victim), "w")]
    wrong = [None, -1, 0, 3, 97, 1e9, -2.5, "", "shapes", [], [1, 2], {}, {"a": 1}, nan,
             torch.ones(0), torch.ones(1, 3).expand(5, 3), torch.ones(64, dtype=torch.complex64),
             torch.eye(3).to_sparse()]
    for _ in range(50):
        yield "damaged", damaged(saved(state, rng), rng)
        yield "hostile", saved(forged(state, rng, harm), rng)
        yield "hostile", pickle.dumps(forged(state, rng, harm), 2)
        yield "forged", saved(forged(state, rng, rng.choice([wrong, wrong, []])), rng)


@pytest.mark.filterwarnings("ignore::UserWarning")         # PyTorch's, about strange tensors
def test_no_checkpoint_does_harm(tiny_trainer, tmp_path, monkeypatch, capsys):
    file, out, victim = tmp_path / "ckpt.pt", tmp_path / "figures.json", tmp_path / "victim"
    probe = functools.partial(evaluate.linear_probe, grid=(1e-2,), iterations=1)    # quick
    monkeypatch.setattr(evaluate, "linear_probe", probe)
    words = ["evaluate.py", str(file), "--json", str(out), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", words)
    ran = {"damaged": 0, "hostile": 0, "forged": 0}
    for i, (kind, content) in enumerate(checkpoints(checkpoint.state_of(tiny_trainer()), victim)):
        file.write_bytes(content)
        out.write_text("old")
        try:
            evaluate.main()
            assert json.loads(out.read_text())["bits"] == 24, i
            ran[kind] += 1
        except SystemExit as stop:
            assert str(stop).startswith("evaluate.py: ") and "\n" not in str(stop), (i, str(stop))
            assert out.read_text() == "old" and sorted(tmp_path.iterdir())[:2] == [file, out], i
        except Exception as error:
            pytest.fail(f"checkpoint {i}, {kind}: {type(error).__name__} {error}")
        assert not victim.exists(), i
    # A flipped bit of a weight is a weight, and many flags do not count any more after training
    assert ran["hostile"] == 0 and 0 < ran["damaged"] < 40 and 0 < ran["forged"] < 40


# ---- images --------------------------------------------------------------------------------------

def png(width, height):
    """A PNG of this size by its header, with the pixels of 40 x 30 and right checksums."""
    def chunk(kind, x):
        return struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(30 * 121)))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def jpeg(whole, width, height):
    """The JPEG with other sizes in its frame header."""
    at = whole.index(b"\xff\xc0") + 5
    return whole[:at] + struct.pack(">HH", height, width) + whole[at + 4:]


def damaged_images():
    """200 files: name -> bytes."""
    rng, exif, whole = random.Random(1), Image.Exif(), {}
    exif[0x112], exif[0x8769] = 6, {0x9286: "words"}        # orientation, and a nested table
    pixels = torch.randint(256, (30, 40, 3), dtype=torch.uint8).numpy()
    for ending, kind in (("png", "PNG"), ("jpg", "JPEG")):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind, exif=exif)
        whole[ending] = file.getvalue()
    files = {"whole.png": whole["png"], "whole.jpg": whole["jpg"], "empty.png": b"",
             "empty.jpg": b"", "words.png": b"not an image"}
    most = 2**31 - 1
    for w, h in [(0, 0), (0, 9), (1, most), (most, most), (50000, 50000), (12000, 12000)]:
        files[f"{w}x{h}.png"] = png(w, h)
    for w, h in [(0, 0), (0, 9), (1, 65535), (65535, 65535), (12000, 12000), (9, 9)]:
        files[f"{w}x{h}.jpg"] = jpeg(whole["jpg"], w, h)
    for i in range(200 - len(files)):
        ending = ("png", "jpg")[i % 2]
        files[f"{i:03}.{ending}"] = damaged(whole[ending], rng)
    return files


@pytest.fixture
def folder_of_harm(tmp_path):
    """(folder of the 200 files, name -> image for those that `read_image` reads, in order)."""
    path, read = tmp_path / "folder", {}
    path.mkdir()
    for name, content in sorted(damaged_images().items()):
        (path / name).write_bytes(content)
        try:
            read[name] = data.read_image(path / name, 8)
            assert read[name].shape == (3, 8, 8) and read[name].dtype == torch.uint8
        except OSError as error:
            assert name in str(error) and "\n" not in str(error)
    assert len(list(path.iterdir())) == 200 and 20 < len(read) < 150
    assert {"whole.png", "whole.jpg"} <= {*read}
    return path, read


@pytest.mark.filterwarnings("ignore")                      # Pillow's, about sizes and EXIF
def test_no_image_does_harm(folder_of_harm, capfd):
    path, read = folder_of_harm
    loaded, names = data.load(f"folder:{path}", "train", 7), sorted(os.listdir(path))
    for name, image in read.items():
        assert torch.equal(loaded.images[names.index(name)], image), name
    warnings = capfd.readouterr().err.splitlines()
    for name in {*names} - {*read}:
        assert sum(f"skipped: cannot read image {path / name}: " in line for line in warnings) == 1
    assert loaded.skipped == 200 - len(read) and loaded.images.flatten(1).any(1).all()


@pytest.mark.filterwarnings("ignore")
def test_images_that_cannot_be_read_are_not_described(folder_of_harm, tiny_trainer, tmp_path,
                                                      capsys):
    path, read = folder_of_harm
    torch.save(checkpoint.state_of(tiny_trainer()), tmp_path / "ckpt.pt")
    out = tmp_path / "s.jsonl"
    describe.main([str(tmp_path / "ckpt.pt"), str(path), "-o", str(out)])
    assert [json.loads(line)["path"] for line in out.read_text().splitlines()] == [*read]
    assert capsys.readouterr().err.count("skipped: cannot read image") == 200 - len(read)
