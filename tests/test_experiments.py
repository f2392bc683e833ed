"""extras/experiments.py: processes side by side, rows and tables of planted files, figures."""
import json
import os
import signal
import threading
import time

import numpy as np
import pytest
from PIL import Image

from extras import experiments

# Stands in for train.py. MODE good: writes what a run writes, and its own command and threads;
# bad: fails; meet: good, if another process like it is there at the same time;
# hang: never ends.
STAND_IN = """
import json, os, sys, time
from pathlib import Path
mode, words = sys.argv[1], sys.argv[2:]
out = Path(words[words.index("--out") + 1])
print("line one"); print("something is wrong" if mode == "bad" else "fine")
if mode == "bad": sys.exit(3)
out.mkdir(parents=True, exist_ok=True)
(out / "here").touch()
while mode == "hang": time.sleep(0.02)
while mode == "meet" and len(list(out.parent.glob("*/here"))) < 2: time.sleep(0.02)
facts = {"words": words, "threads": os.environ["OMP_NUM_THREADS"]}
for name in ("config.json", "metrics.jsonl", "results.json"):
    (out / name).write_text(json.dumps(facts))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder of its own for results/ and runs/, and stand-ins for experiments."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    modes = {"a": "good", "b": "bad", "c": "meet", "d": "hang"}
    monkeypatch.setattr(experiments, "EXPERIMENTS",
                        {name: f"{tmp_path}/stand_in.py {mode}" for name, mode in modes.items()})
    for name in ("RESULTS", "RUNS"):
        monkeypatch.setattr(experiments, name, tmp_path / name.lower())
    monkeypatch.setattr(experiments.torch, "get_num_threads", lambda: 5)
    (tmp_path / "results").mkdir()
    return tmp_path


def main(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["experiments", *words])
    experiments.main()


def test_one_that_fails_stops_no_other_and_is_named_at_the_end(place, monkeypatch, capsys):
    (place / "runs" / "a-s1").mkdir(parents=True)
    (place / "runs" / "a-s1" / "ckpt.pt").touch()               # it was interrupted
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, "run", "b", "a", "--seeds", "0", "1", "--jobs", "2")
    words = str(stop.value.code)                                # a message: exit code 1
    assert "2 failed" in words and "b-s0: exit code 3: something is wrong" in words
    assert "b-s1.log" in words and "a-s" not in words
    assert sorted(p.name for p in (place / "results").iterdir()) == ["a-s0", "a-s1"]
    first, second = (json.loads((place / f"results/a-s{seed}/results.json").read_text())
                     for seed in (0, 1))
    assert first["threads"] == "2"                              # 5 threads for 2 jobs
    assert first["words"][:2] == ["--seed", "0"] and "--resume" not in first["words"]
    assert second["words"][:2] == ["--seed", "1"] and second["words"][-1] == "--resume"
    assert (place / "runs" / "a-s0.log").read_text() == "line one\nfine\n"
    capsys.readouterr()
    experiments.run(["a"], [0, 1], 1)
    assert capsys.readouterr().out == "a-s0: done before\na-s1: done before\n"


def test_jobs_run_at_the_same_time(place, capsys):
    experiments.run(["c"], [0, 1], 2)                           # else they wait for ever
    assert {p.name for p in (place / "results").iterdir()} == {"c-s0", "c-s1"}


def test_sigterm_ends_the_experiments_too(place, monkeypatch):
    def interrupt():
        while not len(list((place / "runs").glob("d-s*/here"))) == 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="stopped; the same command goes on"):
            main(monkeypatch, "run", "d", "--seeds", "0", "1", "2", "--jobs", "2")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not experiments.RUNNING
    assert not (place / "runs/d-s2").exists()            # what waited was not begun


@pytest.mark.parametrize("words, why", [
    (["nonsense"], "unknown experiment nonsense"), (["a", "--jobs", "0"], "must be at least")])
def test_wrong_words_are_one_line(place, monkeypatch, words, why):
    with pytest.raises(SystemExit, match=why):
        main(monkeypatch, "run", *words)


# ---- rows and tables -----------------------------------------------------------------------------

def row(top1):
    return {"knn_top1": top1, "knn_top5": 90.0, "linear_top1": top1 + 1, "linear_top5": 95.0}


def plant(folder, run, config, kept, seconds=60.0, log=()):
    """results/RUN as train.py leaves it; kept: {symbols: retention} of the teacher's k-NN, 80 %."""
    path = folder / run
    path.mkdir(parents=True)
    machine = {"torch": "2.6", "threads": 2, "gpu": None}
    config = {"data": "shapes", "disc": "softmax", "explore": "base", "vocab": 128, "seed": 0,
              "machine": machine} | config
    results = {"teacher": row(80.0), "student": {n: row(80 * r) for n, r in kept.items()},
               "retention": kept, "perplexity": [50.0, 40.0, 60.0, 30.0, 90.0, 90.0, 90.0, 20.0]}
    path.joinpath("config.json").write_text(json.dumps(config))
    path.joinpath("results.json").write_text(json.dumps(results))
    lines = [*log, {"epoch": 9, "seconds": seconds, "loss": 1.0}]
    path.joinpath("metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def planted(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    kept = {"1": 0.5, "2": 0.6, "4": 0.7, "8": 0.8}
    plant(tmp_path, "shapes-softmax-128-s0", {}, kept)
    plant(tmp_path, "shapes-softmax-128-s1", {"seed": 1}, kept | {"8": 0.9}, 70.0)
    plant(tmp_path, "shapes-vqvae-128-s0", {"disc": "vq", "method": "vqvae"}, {"8": 0.25})
    figures = {"config": {"data": "shapes", "vocab": "128", "seed": "0"}, "teacher": row(80.0),
               "pixels": {"knn_top1": 70.0}, "1": row(40) | {"retention": 0.5},
               "8": row(60) | {"retention": 0.75, "perplexity": [9.0, 7.0]}}
    (tmp_path / "shapes-kmeans-128-s0.json").write_text(json.dumps(figures))
    return tmp_path


def test_rows_are_one_per_run_and_number_of_symbols(planted):
    rows = list(experiments.rows())
    named = [(r["method"], r["symbols"], r["seed"]) for r in rows]
    assert named == [("softmax", n, 0) for n in (1, 2, 4, 8)] + [("teacher", None, 0)] + [
        ("softmax", n, 1) for n in (1, 2, 4, 8)] + [
        ("vqvae", 8, 0), ("pixels", None, 0), ("kmeans", 1, 0), ("residual-kmeans", 8, 0)]
    keys = {"experiment", "data", "method", "explore", "vocab", "symbols", "seed", "knn_top1",
            "knn_top5", "linear_top1", "linear_top5", "retention", "perplexity", "hardware",
            "seconds"}
    assert all(set(r) == keys for r in rows)
    assert rows[1] == row(48.0) | {
        "experiment": "shapes-softmax-128", "data": "shapes", "method": "softmax",
        "explore": "base", "vocab": 128, "symbols": 2, "seed": 0, "retention": 0.6,
        "perplexity": 40.0, "hardware": "CPU, 2 threads", "seconds": 60.0}
    teacher, pixels = rows[4], rows[-3]
    assert (teacher["knn_top1"], teacher["linear_top5"], teacher["retention"]) == (80, 95, 1)
    assert teacher["vocab"] is None and pixels["linear_top1"] is None
    assert rows[-1]["perplexity"] == 7


def test_tables_have_a_line_per_experiment_and_only_where_there_is_news(planted):
    text = "\n".join(experiments.tables(list(experiments.rows())))
    assert "**shapes** (teacher k-NN 80.0, linear 81.0; pixels k-NN 70.0)" in text
    assert text.count("| seeds |") == 1 and "Table 2" not in text
    # deviation of 0.8 and 0.9 is 0.1 / sqrt(2); of 65 and 73 it is 8 / sqrt(2)
    assert ("| shapes-softmax-128 | 2 | 0.500 ± 0.000 | 0.600 ± 0.000 | 0.700 ± 0.000 | 0.850 ± 0.071 "
            "| 41.0 ± 0.0 | 49.0 ± 0.0 | 57.0 ± 0.0 | 69.0 ± 5.7 | 20 of 128 |") in text
    assert "| shapes-vqvae-128 | 1 | - | - | - | 0.250 | - | - | - | 21.0 | 20 of 128 |" in text
    assert "| shapes-kmeans-128 | 1 | 0.500 | - | - | 0.750 | 41.0 | - | - | 61.0 | 7 of 128 |" in text
    plant(planted, "shapes-softmax-128-info-s0", {"explore": "info"}, {"1": 0.5, "8": 0.6})
    plant(planted, "shapes-mine-s0", {}, {"8": 0.9})
    blocks = "\n".join(experiments.tables(list(experiments.rows()))).split("\n\n")
    assert [b[:9] for b in blocks[1:]] == ["| discret", "| explora", "| other |", "Ahead of "]
    assert [line.split(" | ")[0] for line in blocks[2].splitlines()[2:]] == [
        "| shapes-softmax-128", "| shapes-softmax-128-info"]
    lines = [[b for b in block.splitlines() if b.startswith("| shapes-softmax-128 |")]
             for block in blocks[1:3]]
    assert "| 2 | 0.500 ± 0.000 |" in lines[0][0] and "| 0.850 ± 0.071 |" in lines[0][0]
    assert "| 1 | 0.500 |" in lines[1][0] and "| 0.800 |" in lines[1][0]    # seed 0, as `info`


def test_against_kmeans_names_what_is_behind(planted):
    whole = {f"{n}": r for n, r in ((1, 0.5), (2, 0.7), (4, 0.8), (8, 0.9))}
    plant(planted, "shapes-gumbel-256-s0", {"disc": "gumbel", "vocab": 256}, whole | {"4": 0.6})
    plant(planted, "shapes-softmax-256-s0", {"vocab": 256}, {n: r + 0.05 for n, r in whole.items()})
    figures = {"config": {"data": "shapes", "vocab": "256", "seed": "0"}, "teacher": row(80.0)}
    figures |= {n: row(80 * r - 0.1) | {"retention": r - 0.001} for n, r in whole.items()}
    (planted / "shapes-kmeans-256-s0.json").write_text(json.dumps(figures))
    found = {}
    for r in experiments.rows():
        if r["symbols"] and r["vocab"] == 256:
            found.setdefault(r["experiment"].partition("-")[2], []).append(r)
    (text,) = experiments.against_kmeans(found)
    assert "in 14 of 16 comparisons of retention and linear probe" in text
    assert text.endswith("behind: gumbel-256, retention with 4 (0.6, 0.799); "
                         "gumbel-256, linear with 4 (49, 64.9).\n")


def test_the_largest_soft_gap_of_each_discretizer(planted):
    plant(planted, "shapes-gumbel-128-s0", {"disc": "gumbel"}, {"8": 0.5})
    plant(planted, "shapes-gumbel-128-soft-s0",
          {"disc": "gumbel", "straight_through": False}, {"8": 0.5})
    for run, gaps in (("shapes-softmax-128-s0", {"1": 0.1, "8": 0.2}),
                      ("shapes-softmax-128-s1", {"1": -0.3}),
                      ("shapes-gumbel-128-s0", {"8": 0.1}),
                      ("shapes-gumbel-128-soft-s0", {"8": 2.0})):
        path = planted / run / "results.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"soft_minus_hard": gaps}))
    (line,) = experiments.soft()
    assert line.endswith("gumbel +0.10 points (1 runs), gumbel (read as mixtures) +2.00 points "
                         "(1 runs), softmax -0.30 points (2 runs).\n")


def plant_teacher(place, run, knn, early, seed=0):
    speed = {"images_per_s": 100.0, "gemm_fraction": 0.25, "seconds": 1800.0}
    log = [speed | {"epoch": epoch, "knn_top1": early + epoch}
           for epoch in (1.0, 3.0, 10.0)]
    (place / run).mkdir()
    for name, value in (("config", {}), ("results", {"knn_top1": {"10": 1.0, "20": knn}})):
        (place / run / f"{name}.json").write_text(json.dumps(value))
    (place / run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))


def test_teachers_have_a_table_of_their_own(planted):
    before = list(experiments.rows())
    assert not list(experiments.teachers())
    for seed, knn in ((1, 50.0), (2, 52.0)):
        plant_teacher(planted, f"pretrain-cifar10-tenth-s{seed}", knn, 40.0, seed)
    plant_teacher(planted, "pretrain-cifar10-centre-s0", 44.0, 41.0)
    plant_teacher(planted, "teacher-cifar10", 60.0, 42.0)
    text = "\n".join(experiments.teachers())
    assert "teacher-cifar10, took 0.5 hours: 100 images/s, 0.25 of the rate" in text
    assert text.splitlines()[-3:] == [
        "| teacher-cifar10 | 1 | 43.0 | 45.0 | 52.0 | - | - | 60.0 |",
        "| pretrain-cifar10-tenth | 2 | 41.0 ± 0.0 | 43.0 ± 0.0 | 50.0 ± 0.0 | - | - | 51.0 ± 1.4 |",
        "| pretrain-cifar10-centre | 1 | 42.0 | 44.0 | 51.0 | - | - | 44.0 |"]
    assert list(experiments.rows()) == before


def test_speed_is_what_the_benchmark_wrote(planted):
    assert not list(experiments.speed())
    result = {"size": "small", "device": "abacus", "images_per_s": 30.0,
              "plain_images_per_s": 10.0, "speedup": 3.0,
              "gflop_per_image": 1.5, "gemm_fraction": 0.5, "peak_memory_mb": 99.6,
              "config": {"batch_size": 64, "views": 4},
              "growth": {"length": {"exponent": 0.5}, "views": {"exponent": 1.0}}}
    (planted / "benchmark-small.json").write_text(json.dumps(result))
    text = "\n".join(experiments.speed())
    assert "| small, batch 64 x 4 | abacus | 30.00 | 10.00 | 3.00 | 1.50 | 0.50 | 100 |" in text
    assert "(small) grows as length^0.50, views^1.00." in text


def test_table_1_and_2_are_the_papers_for_both_data_sets():
    for data in ("shapes", "cifar10"):
        runs = {f"{data}-{d}-{k}" for d in ("softmax", "gumbel", "vq") for k in (128, 256, 512)}
        runs |= {f"{data}-softmax-128{e}" for e in ("", "-entropy", "-info", "-combined")}
        runs |= {f"{data}-softmax-{k}" for k in (64, 32, 16)}
        assert runs <= set(experiments.EXPERIMENTS)
    assert "--data folder:cifar10" in experiments.EXPERIMENTS["cifar10-softmax-128-info"]


def test_json_and_readme(planted, monkeypatch, capsys):
    readme = planted / "README.md"
    readme.write_text(f"before\n{experiments.START}\nold\n{experiments.END}\nafter\n")
    monkeypatch.setattr(experiments, "README", readme)
    main(monkeypatch, "table", "--readme", "--json", str(planted / "rows.json"))
    assert json.loads((planted / "rows.json").read_text()) == list(experiments.rows())
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith(f"{experiments.END}\nafter\n")
    assert "| shapes-vqvae-128 |" in text and "old" not in text


# ---- figures -------------------------------------------------------------------------------------

def test_figures_of_the_runs_that_exist(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    rising = [{"epoch": e, "teacher_entropy": 3.0, "kl": 1 / e, "knn_top1": 10.0 * e, "loss": 5 - e,
               "information": 1.0, "symbol_entropy": 2.0} for e in (1, 2, 3)]
    for name in ("softmax-128", "vq-256", "softmax-128-info"):
        plant(tmp_path, f"shapes-{name}-s0", {}, {"8": 0.5}, log=rising)
    plant(tmp_path, "shapes-vq-256-s1", {}, {"8": 0.5})
    main(monkeypatch, "figures")
    printed = capsys.readouterr().out
    assert "no figure3-cifar10.png" in printed and "not run yet: shapes-gumbel-512" in printed
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["figure3.png", "figure4.png"]
    three, four = (np.asarray(Image.open(tmp_path / f"figure{number}.png").convert("RGB"))
                   for number in (3, 4))
    # One line of legend (80 pixels), then a row of three panels each 254 pixels high
    assert three.shape == (80 + 254 - 22, 1400, 3) and four.shape == (80 + 2 * 254 - 22, 1400, 3)
    blue, orange = np.array([0, 0x72, 0xb2]), np.array([0xd5, 0x5e, 0])
    for sheet in (three, four):                                 # two runs in the legend
        assert all((np.abs(sheet[:50].astype(int) - c).sum(-1) < 30).any() for c in (blue, orange))
    assert not (np.abs(three[80:].astype(int) - blue).sum(-1) < 30).any()   # equal: under orange
