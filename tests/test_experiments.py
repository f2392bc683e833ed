"""extras/experiments.py: the list, processes side by side, what is written from planted results."""
import json
import os
import signal
import threading
import time

import numpy as np
import pytest
from PIL import Image

import flags
from extras import experiments
from test_tables import plant, plant_kmeans

# Stands in for train.py. MODE good: writes what a run writes, with its own flags and threads; bad:
# fails; meet: good, if another process like it is there at the same time; hang: never ends.
STAND_IN = """
import json, os, sys, time
from pathlib import Path
mode, flags = sys.argv[1], sys.argv[2:]
print("line one"); print("something is wrong" if mode == "bad" else "fine")
if mode == "bad": sys.exit(3)
facts = json.dumps({"flags": flags, "threads": os.environ["OMP_NUM_THREADS"]})
if "--json" in flags:
    Path(flags[flags.index("--json") + 1]).write_text(facts)
    sys.exit()
out = Path(flags[flags.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
(out / "here").touch()
while mode == "hang": time.sleep(0.02)
while mode == "meet" and len(list(out.parent.glob("*/here"))) < 2: time.sleep(0.02)
for name in ("config.json", "metrics.jsonl", "results.json"):
    (out / name).write_text(facts)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A separate folder for everything that is written."""
    for name in ("results", "runs"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(experiments, name.upper(), tmp_path / name)
    return tmp_path


@pytest.fixture
def stand_ins(place, monkeypatch):
    for name in ("stand_in.py", "extras.baselines.py"):
        (place / name).write_text(STAND_IN)
    modes = {"x/good": "good", "x/bad": "bad", "y/meet": "meet", "y/hang": "hang"}
    modes = {name: f"{place}/stand_in.py {mode}" for name, mode in modes.items()}
    modes["y/kmeans"] = f"{place}/extras.baselines.py good --checkpoint of-s{{seed}}"
    monkeypatch.setattr(experiments, "EXPERIMENTS", modes)
    monkeypatch.setattr(experiments.torch, "get_num_threads", lambda: 5)
    return place


def main(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["experiments", *words])
    experiments.main()


# ---- the list ------------------------------------------------------------------------------------

def test_table_1_and_2_are_the_papers():
    for recipe in ("paper", "stable"):
        grid = {f"cifar10/{recipe}-{disc}-{vocab}" for disc in ("softmax", "gumbel", "vq")
                for vocab in (128, 256, 512)}
        grid |= {f"{data}/{recipe}-gumbel-128{tail}" for data in ("shapes", "cifar10")
                 for tail in ("", "-entropy", "-info", "-combined", "-switch")}
        assert grid <= set(experiments.EXPERIMENTS)
    assert experiments.EXPERIMENTS["cifar10/stable-vq-256"] == (
        "train.py --recipe stable --disc vq --vocab 256 --iterations 1 --data folder:cifar10 "
        "--teacher cifar10 --precision float32")
    assert experiments.EXPERIMENTS["shapes/kmeans-128-space-beam"] == (
        "-m extras.baselines --vocab 128 --checkpoint "
        "runs/shapes/stable-gumbel-128-s{seed}/ckpt.pt --beam 8 --precision float32")
    assert experiments.EXPERIMENTS["shapes/stable-gumbel-512-beam"] == (
        "-m extras.baselines --vocab 512 --checkpoint runs/shapes/stable-gumbel-512-s{seed}/ckpt.pt"
        " --beam 8 --learned --precision float32")


def test_train_understands_every_command_and_each_changes_something():
    seen = {}
    for name, command in experiments.EXPERIMENTS.items():
        if command.startswith("train.py"):
            args = flags.parse(command.split()[1:])
            recipe, disc, vocab = name.partition("/")[2].split("-")[:3]
            assert [args.recipe, args.disc, str(args.vocab)] == [recipe, disc, vocab]
            assert seen.setdefault(str(args), name) == name


def test_pairs_differ_in_one_thing():
    pairs = [*experiments.pairs()]
    assert len(pairs) == len(set(pairs))
    assert {("stable-gumbel-128", "stable-softmax-128"), ("paper-vq-256", "paper-vq-128"),
            ("stable-vq-512", "paper-vq-512"), ("paper-gumbel-128-info", "paper-gumbel-128"),
            ("stable-softmax-128-soft", "stable-softmax-128"),
            ("paper-vq-128-long", "paper-vq-128"),
            ("stable-gumbel-256", "kmeans-256-space-beam"),
            ("stable-gumbel-256-beam", "stable-gumbel-256"),
            ("stable-gumbel-256-beam", "kmeans-256-space"),
            ("stable-vq-256", "kmeans-256-space-vq"),
            ("stable-vq-256-beam", "kmeans-256-space-vq"),
            ("paper-gumbel-128-sinkhorn", "paper-softmax-128-sinkhorn"),
            ("stable-gumbel-128", "vqvae-128")} <= set(pairs)
    assert ("stable-gumbel-256", "stable-softmax-128") not in pairs
    assert ("paper-gumbel-128-sinkhorn", "paper-gumbel-128-teacher-0.04") not in pairs


# ---- run -----------------------------------------------------------------------------------------

def test_one_that_fails_stops_no_other_and_is_named_at_the_end(stand_ins, monkeypatch, capsys):
    (stand_ins / "runs/x/good-s1").mkdir(parents=True)
    (stand_ins / "runs/x/good-s1/ckpt.pt").touch()              # it was interrupted
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, "run", "x/*", "--seeds", "0", "1", "--jobs", "2")
    words = str(stop.value.code)                                # a message: exit code 1
    assert "2 failed" in words and "x/bad-s0: exit code 3: something is wrong" in words
    assert "bad-s1.log" in words and "good-s" not in words
    assert sorted(p.name for p in (stand_ins / "results/x").iterdir()) == ["good-s0", "good-s1"]
    first, second = (json.loads((stand_ins / f"results/x/good-s{seed}/results.json").read_text())
                     for seed in (0, 1))
    assert first["threads"] == "2"                              # 5 threads for 2 jobs
    assert first["flags"][:2] == ["--seed", "0"] and "--resume" not in first["flags"]
    assert second["flags"][:2] == ["--seed", "1"] and second["flags"][-1] == "--resume"
    assert (stand_ins / "runs/x/good-s0.log").read_text() == "line one\nfine\n"
    capsys.readouterr()
    experiments.run(["x/good"], [0, 1], 1)
    assert capsys.readouterr().out == "x/good-s0: done before\nx/good-s1: done before\n"


def test_k_means_is_one_file_and_reads_the_student_of_its_seed(stand_ins):
    experiments.run(["y/kmeans"], [0, 3], 1)
    files = sorted((stand_ins / "results/y").iterdir())
    assert [file.name for file in files] == ["kmeans-s0.json", "kmeans-s3.json"]
    assert json.loads(files[1].read_text())["flags"][:4] == [
        "--checkpoint", "of-s3", "--seed", "3"]


def test_jobs_run_at_the_same_time(stand_ins):
    experiments.run(["y/meet"], [0, 1], 2)                      # else they wait for ever
    assert {p.name for p in (stand_ins / "results/y").iterdir()} == {"meet-s0", "meet-s1"}


def test_sigterm_ends_the_experiments_too(stand_ins, monkeypatch):
    def interrupt():
        while not len(list((stand_ins / "runs").glob("y/hang-s*/here"))) == 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="stopped; the same command resumes"):
            main(monkeypatch, "run", "y/hang", "--seeds", "0", "1", "2", "--jobs", "2")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not experiments.RUNNING
    assert not (stand_ins / "runs/y/hang-s2").exists()          # what waited was not started


@pytest.mark.parametrize("words, why", [
    (["nonsense"], "no experiment is called nonsense"),
    (["x/good", "--jobs", "0"], "must be at least")])
def test_wrong_words_are_one_line(stand_ins, monkeypatch, words, why):
    with pytest.raises(SystemExit, match=why):
        main(monkeypatch, "run", *words)


# ---- tables and figures --------------------------------------------------------------------------

@pytest.fixture
def planted(place, monkeypatch):
    monkeypatch.setattr(experiments, "ROOT", place)
    raw = {"1": 0.5, "2": 0.6, "4": 0.7, "8": 0.8}
    for seed in (0, 1):
        for name, change in (("stable-softmax-128", 0), ("stable-softmax-128-soft", 0.25),
                             ("stable-softmax-256", 0), ("stable-mine-64-long", 0)):
            disc = {"disc": name.split("-")[1], "vocab": name.split("-")[2], "seed": seed}
            plant(place / "results", f"shapes/{name}-s{seed}", disc, raw | {"8": 0.6 + change})
    plant_kmeans(place / "results", "shapes/kmeans-128-s0.json", {"1": 0.5, "8": 0.75})
    (place / "README.md").write_text(
        "before\n<!-- table: results -->\nold\n<!-- end of table: results -->\nafter\n")
    return place


def test_every_experiment_is_in_its_section(planted):
    texts = experiments.sections([*experiments.tables.rows(planted / "results", ["shapes"])])
    found = {name.partition(": ")[2]: [line.split(" | ")[0][2:] for line in text.splitlines()[2:]]
             for name, text in texts.items() if name.startswith("shapes") and "\n" in text[:-1]}
    assert found == {
        "the teacher": ["cls", "cls-space"],
        "discretizer and vocabulary (Table 1)": ["stable-softmax-128", "stable-softmax-256"],
        "ablations of stable": ["stable-softmax-128", "stable-softmax-128-soft"],
        "baselines of equal bits": ["kmeans-128"],
        "other runs": ["stable-mine-64-long"],
        "paired differences": ["stable-softmax-256 minus stable-softmax-128",
                               "stable-softmax-128-soft minus stable-softmax-128"]}
    assert "| +0.250 [+0.250, +0.250] |" in texts["shapes (drawn by shapes.py): paired differences"]
    assert texts["shapes (drawn by shapes.py): hardware"] == (
        "- 9 runs: x86_64 AVX2, 2 threads, float32\n")


def test_write_and_json(planted, monkeypatch):
    main(monkeypatch, "table", "--write", "--json", str(planted / "rows.json"))
    rows = json.loads((planted / "rows.json").read_text())
    assert rows == [*experiments.tables.rows(planted / "results", experiments.DATA)]
    readme, results = ((planted / name).read_text() for name in ("README.md", "RESULTS.md"))
    assert readme.startswith("before\n") and readme.endswith("\nafter\n") and "old" not in readme
    assert [line.split(" | ")[0] for line in readme.splitlines() if line.startswith("| ")] == [
        "| ", "| ---", "| CLS of the teacher", "| CLS in the student's space",
        "| residual k-means of the CLS, 128", "| `stable`, softmax, 128"]
    assert results.startswith(experiments.NEW) and "| stable-softmax-128-soft | 2 |" in results
    main(monkeypatch, "table", "--write")
    assert (planted / "RESULTS.md").read_text() == results


def test_figures_of_the_runs_that_exist(place, monkeypatch, capsys):
    rising = [{"epoch": e, "teacher_entropy": 3.0, "kl": 1 / e, "knn_top1": 10.0 * e, "loss": 5 - e,
               "information": 1.0, "symbol_entropy": 2.0} for e in (1, 2, 3)]
    for name in ("stable-softmax-128", "stable-gumbel-128", "stable-gumbel-128-info",
                 "paper-softmax-128"):
        folder = place / f"results/shapes/{name}-s0"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in rising))
    main(monkeypatch, "figures")
    printed = capsys.readouterr().out
    assert "no figure3-paper.png" in printed and "not run yet: shapes/stable-vq-128" in printed
    files = sorted((place / "results").rglob("*.png"))
    assert [file.name for file in files] == ["figure3-stable.png", "figure4-stable.png"]
    three, four = (np.asarray(Image.open(file).convert("RGB")) for file in files)
    # One line of legend (80 pixels), then rows of three panels, each 254 pixels high
    assert three.shape == (80 + 254 - 22, 1400, 3) and four.shape == (80 + 2 * 254 - 22, 1400, 3)
    blue, orange = np.array([0, 0x72, 0xb2]), np.array([0xd5, 0x5e, 0])
    for sheet in (three, four):                                 # two runs in the legend
        assert all((np.abs(sheet[:50].astype(int) - c).sum(-1) < 30).any() for c in (blue, orange))
    assert not (np.abs(three[80:].astype(int) - blue).sum(-1) < 30).any()   # equal: under orange


@pytest.mark.skipif(not (experiments.ROOT / "RESULTS.md").exists(), reason="no results yet")
def test_the_written_tables_are_those_of_results(tmp_path, monkeypatch):
    written = {name: (experiments.ROOT / name).read_text() for name in ("README.md", "RESULTS.md")}
    for name, text in written.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    experiments.table(True, None)
    assert {name: (tmp_path / name).read_text() for name in written} == written
