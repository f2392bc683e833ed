"""The README's worked example runs as printed, and the files it names exist."""
import json
import re

import pytest
import torch

import checkpoint
import discretize
import flags
import train
from conftest import RECIPES, ROOT

README = (ROOT / "README.md").read_text()


@pytest.fixture
def fsq(monkeypatch):
    """The worked discretizer, where a user would write it: in discretize.py."""
    code = re.search(r"```python\n(class .*?)```", README, re.S).group(1)
    assert len(code.strip().splitlines()) < 40
    monkeypatch.setattr(discretize, "DISCRETIZERS", dict(discretize.DISCRETIZERS))
    exec(code, dict(vars(discretize)))
    return discretize.DISCRETIZERS["fsq"]


@torch.no_grad()
def test_the_worked_discretizer_rounds(fsq):
    """Three signs of 8 corners, and the corner's number is the three signs as a binary number."""
    args = flags.parse(["--disc", "fsq", "--vocab", "8"])
    disc, h = discretize.build(args, 16), torch.randn(500, 16)
    for hard in (False, True):
        out = disc(h, hard)
        signs = disc.down(h) > 0                                            # (500, 3)
        assert torch.equal(out.ids, signs.long() @ torch.tensor([4, 2, 1]))
        assert torch.equal(out.weights, torch.eye(8)[out.ids]) and len(out.ids.unique()) == 8
        assert torch.allclose(out.embedding, disc.codebook[out.ids], atol=1e-6)
        expected = disc.up(2 * signs.float() - 1)
        assert torch.allclose(out.embedding, expected, atol=1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_worked_discretizer_trains_in_both_recipes(fsq, tiny, tmp_path, recipe):
    train.run(flags.parse(tiny("--disc", "fsq", "--recipe", recipe, "--epochs", "1")))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["student"].keys() == {"1", "2", "4", "8"} and results["bits"] == 24
    _, _, student = checkpoint.load_model(tmp_path / "run" / "ckpt.pt")
    sequence = student.describe(torch.randn(40, 5, 64), hard=True)
    assert sequence.ids.shape == (40, 8) and 0 <= sequence.ids.min() <= sequence.ids.max() < 8
    assert torch.equal(sequence.weights, torch.eye(8)[sequence.ids])
    assert torch.allclose(sequence.embeddings, student.embed(sequence.ids), atol=1e-5)


def test_every_file_the_readme_names_exists():
    paths = re.findall(r"`((?:extras|results|tests|weights)/[\w./-]*|\w+\.py)`", README)
    missing = [p for p in set(paths) if not (ROOT / p).exists()]
    assert paths and not missing


def test_every_command_of_the_readme_is_accepted():
    commands = re.findall(r"^python train\.py *([^#\n]*)", README, re.M)
    assert len(commands) >= 5
    for words in commands:
        flags.check(flags.parse([*words.replace("PATH", "/a").split(), "--device", "cpu"]))


def test_at_most_ten_differences_from_the_paper():
    rows = [line for line in README.split("## Differences")[1].split("\n## ")[0].splitlines()
            if line.startswith("| ")]
    assert 5 < len(rows) - 1 <= 10                                          # without the heading


def test_nothing_is_left_to_fill_in():
    assert re.findall(r"@[A-Z]+@", README) == []
