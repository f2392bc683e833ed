"""The README's worked example runs as printed, and the files it names exist."""
import json
import re
import statistics
from argparse import Namespace
from pathlib import Path

import torch

import discretize
import train
from extras import baselines, experiments, pretrain, vqvae

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_worked_discretizer_is_short_and_runs():
    code = re.search(r"```python\n(class .*?)```", README, re.S).group(1)
    assert len(code.strip().splitlines()) < 20
    names = dict(vars(discretize), DISCRETIZERS=dict(discretize.DISCRETIZERS))
    exec(code, names)
    flags = Namespace(tau=0.12, tau_start=None, straight_through=False)
    disc = names["DISCRETIZERS"]["dropped"](16, 10, flags)
    torch.manual_seed(0)
    out = disc(torch.randn(500, 16))
    hidden = out.weights.max(0).values < 1e-6               # the same symbols for the whole batch
    assert 0 < hidden.sum() < 10
    assert torch.allclose(out.weights.sum(1), torch.ones(500))
    assert disc.eval()(torch.randn(5, 16), hard=True).weights.sum(1).tolist() == [1] * 5


def test_every_file_the_readme_names_exists():
    paths = re.findall(r"`((?:extras|results|tests|weights)/[\w./-]*|\w+\.py)`", README)
    missing = [p for p in set(paths) if not (ROOT / p).exists()]
    assert paths and not missing


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README


def test_the_tables_say_what_the_files_say():
    block = README.split(experiments.START)[1].split(experiments.END)[0]
    assert block.strip() == experiments.markdown(list(experiments.rows())).strip()


def test_a_row_by_hand():
    """vq with 8 symbols over its seeds: mean and deviation, from the files, without the code of the
    table."""
    paths = (ROOT / "results").glob("shapes-vq-128-s*/results.json")
    kept = [json.loads(path.read_text())["retention"]["8"] for path in paths]
    row = next(line for line in README.splitlines() if line.startswith("| shapes-vq-128 |"))
    cells = row.split("|")
    assert cells[2].strip() == str(len(kept))
    assert cells[6].strip() == f"{statistics.mean(kept):.3f} ± {statistics.stdev(kept):.3f}"


def test_every_experiment_is_a_command_that_is_accepted_and_no_two_are_the_same():
    commands = [command.split(" ", 2) for command in experiments.EXPERIMENTS.values()]
    parsers = {"extras.vqvae": vqvae.parse, "extras.baselines": baselines.parse,
               "extras.pretrain": pretrain.parse}
    others = [(c[1], parsers[c[1]](c[2].split())) for c in commands if c[0] == "-m"]
    runs = [("train.py", train.parse(" ".join(c[1:]).split()))
            for c in commands if c[0] == "train.py"]
    assert all(train.check(args) is None for _, args in runs)
    settings = {script + json.dumps(train.config_of(args)) for script, args in runs + others}
    assert len(settings) == len(commands) == len(runs + others)


def test_preset_cifar10_is_the_recipe_of_rows_unit():
    preset = train.PRESETS["cifar10"]
    row = vars(train.parse(experiments.EXPERIMENTS["cifar10-softmax-256-unit"].split()[1:]))
    larger = {"train_images", "test_images", "descriptor_depth", "interpreter_depth", "batch_size",
              "epochs", "data"}
    assert {name: row[name] for name in preset.keys() - larger} == {
        name: value for name, value in preset.items() if name not in larger}
    default = vars(train.parse([]))
    assert all(row[name] == default[name] for name in row.keys() - preset.keys())
