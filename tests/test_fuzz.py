"""Files that lie: 200 checkpoints and 200 pictures, damaged at random, forged, or made to do harm. Each
is read, or refused in one line; nothing else happens. The seeds are fixed: a failure comes again."""
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

import data
import evaluate
from extras import describe


def damaged(blob, rng):
    """Bytes with one kind of damage: flipped, cut off, blanked, or put together from other places."""
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
    """A copy of the checkpoint in which a value, found by walking down at random, is another or gone."""
    state = copy.deepcopy(state)
    part = state[rng.choice(["config", "config", "teacher", "student"])]
    if rng.random() < 0.1:
        part = state
    key = rng.choice(list(part))
    part[key] = rng.choice([*values, part[rng.choice(list(part))]])
    if rng.random() < 0.1:
        del part[key]
    return state


def saved(state, rng):
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=rng.random() < 0.7)
    return file.getvalue() if rng.random() < 0.9 else pickle.dumps(state, 2)


def checkpoints(state, victim):
    """200 files: a third damaged in their bytes, a third forged, a third with code in them."""
    rng, nan = random.Random(0), torch.tensor(torch.nan)
    harm = [Hostile(os.system, f"touch {victim}"), Hostile(eval, f"open({str(victim)!r}, 'w')"),
            Hostile(exec, f"open({str(victim)!r}, 'w')"), Hostile(io.open, str(victim), "w")]
    wrong = [None, -1, 0, 3, 97, 1e9, -2.5, "", "shapes", [], [1, 2], {}, {"a": 1}, nan, torch.ones(0),
             torch.ones(1, 3).expand(5, 3), torch.ones(64, dtype=torch.complex64), torch.eye(3).to_sparse()]
    for i in range(200):
        if i % 3 == 0:
            yield damaged(saved(state, rng), rng)
        else:
            yield saved(forged(state, rng, wrong if i % 3 == 1 else harm), rng)


def test_no_checkpoint_does_harm(tiny_trainer, tmp_path, monkeypatch, capsys):
    file, out, victim = tmp_path / "ckpt.pt", tmp_path / "figures.json", tmp_path / "victim"
    probe = functools.partial(evaluate.linear_probe, grid=(1e-2,), iterations=1)    # its figures do not matter
    monkeypatch.setattr(evaluate, "linear_probe", probe)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(file), "--json", str(out), "--device", "cpu"])
    refused = 0
    for i, content in enumerate(checkpoints(tiny_trainer().state(), victim)):
        file.write_bytes(content)
        out.write_text("old")
        try:
            evaluate.main()
            assert json.loads(out.read_text())["bits"] > 0, i
        except SystemExit as stop:
            assert str(stop).startswith("evaluate.py: ") and "\n" not in str(stop), (i, str(stop))
            assert out.read_text() == "old" and sorted(tmp_path.iterdir())[:2] == [file, out], i
            refused += 1
        except Exception as error:
            pytest.fail(f"checkpoint {i}: {type(error).__name__} {error}")
        assert not victim.exists(), i
    assert 130 < refused < 200                      # some forgeries change nothing that counts
