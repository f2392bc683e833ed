"""The README's worked example runs as printed, and the files it names exist."""
import json
import re
from argparse import Namespace
from pathlib import Path

import torch

import discretize

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_worked_discretizer_is_short_and_runs():
    code = re.search(r"```python\n(class .*?)```", README, re.S).group(1)
    assert len(code.strip().splitlines()) < 20
    names = dict(vars(discretize), DISCRETIZERS=dict(discretize.DISCRETIZERS))
    exec(code, names)
    disc = names["DISCRETIZERS"]["dropped"](16, 10, Namespace(tau=0.12, tau_start=None, straight_through=False))
    torch.manual_seed(0)
    out = disc(torch.randn(500, 16))
    hidden = out.weights.max(0).values < 1e-6                                   # the same symbols for the whole batch
    assert 0 < hidden.sum() < 10
    assert torch.allclose(out.weights.sum(1), torch.ones(500))
    assert disc.eval()(torch.randn(5, 16), hard=True).weights.sum(1).tolist() == [1] * 5


def test_every_file_the_readme_names_exists():
    paths = re.findall(r"`((?:extras|results|tests|weights)/[\w./-]*|\w+\.py)`", README)
    missing = [p for p in set(paths) if not (ROOT / p).exists()]
    assert paths and not missing


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README


def test_the_results_table_says_what_the_files_say():
    """Every cell `k-NN (retention), linear` of the table, from the file of its run."""
    folder = ROOT / "results"
    runs = [json.loads((folder / f"shapes-{d}-128-s0/results.json").read_text()) for d in ("softmax", "gumbel", "vq")]
    kmeans = json.loads((folder / "baselines-shapes-128.json").read_text())
    for n in "1248":
        rows = [(r["student"][n], r["retention"][n]) for r in runs] + [(kmeans[n], kmeans[n]["retention"])]
        cells = [f"{row['knn_top1']:.1f} ({kept:.3f}), {row['linear_top1']:.1f}" for row, kept in rows]
        assert f"| {n} | {7 * int(n)} | " + " | ".join(cells) + " |" in README
