"""extras/tables.py: rows, statistics and Markdown of planted results, with known answers."""
import json

import pytest
import torch

import scoring
from extras import tables

HARDWARE = {"torch": "2.6", "threads": 2, "processor": "x86_64 AVX2", "bfloat16_slowdown": 9.0,
            "gpu": None}


def accuracies(top1):
    return {"knn_top1": top1, "knn_top5": 90.0, "linear_top1": top1 + 1, "linear_top5": 95.0}


def plant(results, run, config, raw, perplexity=(50.0, 40.0, 60.0, 30.0, 90.0, 90.0, 90.0, 20.0)):
    """results/RUN as train.py leaves it. raw: {symbols: relative k-NN accuracy}; the raw CLS has
    80 %, the CLS in the student's space 100 %."""
    config = {"recipe": "stable", "disc": "softmax", "explore": "base", "vocab": 128, "seed": 0,
              "precision": "float32", "hardware": HARDWARE} | config
    found = {"teacher": accuracies(80.0), "teacher_space": accuracies(100.0),
             "student": {n: accuracies(80 * r) for n, r in raw.items()}, "retention_raw": raw,
             "retention_space": {n: 0.8 * r for n, r in raw.items()}, "perplexity": perplexity,
             "soft_minus_hard": {n: 0.5 for n in raw}, "unique_codes": 0.9, "seconds": 1.0}
    log = [{"step": 5, "epoch": 1.0, "seconds": 30.0}, {"step": 9, "epoch": 2.0, "seconds": 60.0}]
    if config.get("method") != "vqvae":                         # which has no teacher
        log[-1] |= {"teacher_entropy": 3.0, "teacher_entropy_max": 4.0}
    (results / run).mkdir(parents=True)
    (results / run / "config.json").write_text(json.dumps(config))
    (results / run / "results.json").write_text(json.dumps(found))
    (results / run / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in log))


def plant_kmeans(results, name, raw, **config):
    """The file of extras.baselines with figures of 1 and 8 symbols."""
    config = {"vocab": 128, "seed": 0, "checkpoint": None, "beam": 1,
              "precision": "float32"} | config
    rows = {n: accuracies(80 * r) | {"retention_raw": r, "perplexity": [9.0, 7.0][:int(n)]}
            for n, r in raw.items()}
    (results / name).write_text(json.dumps(
        {"config": config, "hardware": HARDWARE, "seconds": 7.0, "teacher": accuracies(80.0)
         | {"retention_raw": 1.0}, "space": accuracies(100.0)} | rows))


@pytest.fixture
def planted(tmp_path):
    raw = {"1": 0.5, "2": 0.6, "4": 0.7, "8": 0.8}
    plant(tmp_path, "shapes/stable-softmax-128-s0", {}, raw)
    plant(tmp_path, "shapes/stable-softmax-128-s1", {"seed": 1}, raw | {"8": 0.9})
    plant(tmp_path, "shapes/vqvae-128-s0", {"method": "vqvae", "recipe": None}, {"8": 0.25})
    plant(tmp_path, "other/stable-softmax-128-s0", {}, raw)
    plant_kmeans(tmp_path, "shapes/kmeans-128-s0.json", {"1": 0.5, "8": 0.75})
    plant_kmeans(tmp_path, "shapes/kmeans-128-space-beam-s0.json", {"8": 0.95}, beam=8,
                 checkpoint="runs/shapes/stable-softmax-128-s0/ckpt.pt")
    return tmp_path


def read(results):
    return [*tables.rows(results, ["shapes"])]


# ---- rows ----------------------------------------------------------------------------------------

def test_a_searched_student_is_a_row_of_its_recipe(tmp_path):
    (tmp_path / "shapes").mkdir()
    plant_kmeans(tmp_path, "shapes/stable-gumbel-128-beam-s0.json", {"8": 0.95}, beam=8,
                 checkpoint="runs/shapes/stable-gumbel-128-s0/ckpt.pt", learned=True, disc="gumbel")
    row, = (row for row in read(tmp_path) if row["symbols"] == 8)
    assert [row[key] for key in ("experiment", "recipe", "method", "retention_raw")] == [
        "stable-gumbel-128-beam", "stable", "gumbel-beam", 0.95]


def test_rows_are_one_per_run_and_number_of_symbols(planted):
    rows = read(planted)
    assert all(set(row) == set(tables.KEYS) for row in rows)
    assert sorted((r["experiment"], r["method"], r["symbols"] or 0, r["seed"]) for r in rows) == [
        ("cls", "cls", 0, 0), ("cls", "cls", 0, 1),
        ("cls-space", "cls-space", 0, 0), ("cls-space", "cls-space", 0, 1),
        ("kmeans-128", "residual-kmeans", 1, 0), ("kmeans-128", "residual-kmeans", 8, 0),
        ("kmeans-128-space-beam", "residual-kmeans-space-beam", 8, 0),
        *(("stable-softmax-128", "softmax", n, seed) for n in (1, 2, 4, 8) for seed in (0, 1)),
        ("vqvae-128", "vqvae", 8, 0)]


def test_a_row_of_a_run_of_k_means_and_of_the_cls(planted):
    rows = {(r["experiment"], r["symbols"], r["seed"]): r for r in read(planted)}
    assert rows["stable-softmax-128", 2, 1] == accuracies(48.0) | {
        "experiment": "stable-softmax-128", "data": "shapes", "recipe": "stable",
        "method": "softmax", "explore": "base", "vocab": 128, "symbols": 2, "seed": 1,
        "retention_raw": 0.6, "retention_space": 0.48, "soft_minus_hard": 0.5, "perplexity": 40.0,
        "unique_codes": None, "teacher_entropy": None, "collapsed": False, "steps": 9,
        "hardware": "x86_64 AVX2, 2 threads",
        "precision": "float32", "seconds": 60.0}            # of training, not of the evaluation
    whole = rows["stable-softmax-128", 8, 1]
    assert (whole["unique_codes"], whole["teacher_entropy"]) == (0.9, 0.75)
    kmeans = rows["kmeans-128", 8, 0]
    assert (kmeans["recipe"], kmeans["explore"], kmeans["steps"]) == (None, None, None)
    assert (kmeans["retention_raw"], kmeans["retention_space"]) == (0.75, None)
    assert (kmeans["perplexity"], kmeans["seconds"]) == (7.0, 7.0)
    cls, space = rows["cls", None, 0], rows["cls-space", None, 0]
    assert (cls["knn_top1"], cls["retention_raw"], cls["retention_space"]) == (80.0, 1.0, 0.8)
    assert (space["knn_top1"], space["retention_raw"], space["retention_space"]) == (100, 1.25, 1)
    assert cls["vocab"] is cls["perplexity"] is cls["collapsed"] is None


def test_the_space_is_that_of_stable_as_it_is(tmp_path):
    plant(tmp_path, "shapes/paper-vq-128-s0", {"recipe": "paper"}, {"8": 0.5})
    plant(tmp_path, "shapes/stable-softmax-128-no-rca-s0", {}, {"8": 0.5})
    assert {r["experiment"] for r in read(tmp_path) if r["symbols"] is None} == {"cls"}


@pytest.mark.parametrize("least, knn, collapsed", [
    (2.0, 12.1, False), (1.9, 80.0, True), (64.0, 12.0, True), (64.0, 9.0, True)])
def test_collapse_is_perplexity_below_2_or_k_nn_at_chance(tmp_path, least, knn, collapsed):
    plant(tmp_path, "shapes/paper-vq-128-s0", {}, {"1": 0.9, "8": knn / 80},
          perplexity=[50.0] * 7 + [least])
    assert [r["collapsed"] for r in read(tmp_path) if r["symbols"]] == [collapsed] * 2


# ---- statistics ----------------------------------------------------------------------------------

@pytest.mark.parametrize("freedom, t", [*enumerate(tables.T975, 1)])
def test_quantiles_are_those_of_students_density(freedom, t):
    x = torch.linspace(0, t, 20001, dtype=torch.float64)
    density = torch.distributions.StudentT(torch.tensor(float(freedom)).double()).log_prob(x).exp()
    assert torch.trapezoid(density, x).item() == pytest.approx(0.475, abs=2e-5)


def test_paired_differences_by_hand():
    a, b = {0: 1.0, 1: 2.0, 2: 4.0, 7: 99.0}, {0: 0.0, 1: 0.0, 2: 1.0, 3: -99.0}
    mean, half = tables.paired(a, b)                        # differences 1, 2, 3: deviation 1
    assert mean == pytest.approx(2.0) and half == pytest.approx(4.303 / 3 ** 0.5)
    assert tables.paired({0: 1.0, 1: 5.0}, {1: 3.0, 2: 1.0}) is None
    many = {seed: float(seed % 2) for seed in range(20)}    # deviation (20 / 76)^0.5
    assert tables.paired(many, dict.fromkeys(many, 0.0))[1] == pytest.approx(
        2.262 * (20 / 76) ** 0.5 / 20 ** 0.5)


# ---- Markdown ------------------------------------------------------------------------------------

def test_a_line_of_the_accuracy_table_by_hand(planted):
    names = {"ours": "stable-softmax-128", "VQ-VAE": "vqvae-128", "not run": "paper-vq-128",
             "CLS": "cls-space"}
    head, _, ours, vqvae, cls = tables.accuracy_table(
        read(planted), names, tables.COLUMNS).splitlines()
    assert head.startswith("|  | seeds | steps | k-NN top-1, % | linear top-1, % | raw: 1 | raw: 2")
    # The deviation of 0.8 and 0.9 is 0.1 / sqrt(2), that of 64 and 72 is 8 / sqrt(2)
    assert ours == (
        "| ours | 2 | 9 | 68.0 ± 5.7 | 69.0 ± 5.7 "
        "| 0.500 ± 0.000 | 0.600 ± 0.000 | 0.700 ± 0.000 | 0.850 ± 0.071 "
        "| 0.400 ± 0.000 | 0.480 ± 0.000 | 0.560 ± 0.000 | 0.680 ± 0.057 "
        "| 0.5 ± 0.0 | 20 ± 0 | 0.900 ± 0.000 | 0.750 ± 0.000 | 0 of 2 |")
    assert vqvae == ("| VQ-VAE | 1 | 9 | 20.0 | 21.0 | - | - | - | 0.250 | - | - | - | 0.200 "
                     "| 0.5 | 20 | 0.900 | - | 0 of 1 |")
    assert cls == ("| CLS | 2 | - | 100.0 ± 0.0 | 101.0 ± 0.0 | - | - | - | 1.250 ± 0.000 "
                   "| - | - | - | 1.000 ± 0.000 | - | - | - | - | - |")


def test_a_line_of_the_paired_table_by_hand(planted):
    raw = {"1": 0.5, "2": 0.6, "4": 0.7}
    for seed, last in ((0, 0.7), (1, 0.7), (2, 0.1)):           # seed 2 has no partner
        plant(planted, f"shapes/stable-vq-128-s{seed}", {"seed": seed}, raw | {"8": last})
    text = tables.paired_table(read(planted), [
        ("stable-vq-128", "stable-softmax-128"), ("kmeans-128", "stable-softmax-128")])
    *_, line = text.splitlines()                                # k-means: one common seed only
    assert text.count("\n") == 3
    # -0.1 and -0.2: mean -0.15, deviation 0.1 / sqrt(2), half width 12.706 * 0.05 = 0.635
    assert line == (
        "| stable-vq-128 minus stable-softmax-128 | +0.000 [+0.000, +0.000] "
        "| +0.000 [+0.000, +0.000] | +0.000 [+0.000, +0.000] | -0.150 [-0.785, +0.485] | - "
        "| -12.0 [-62.8, +38.8] |")


def row(experiment, seed, symbols=8, **figures):
    return {"experiment": experiment, "seed": seed, "symbols": symbols} | figures


def test_the_bootstrap_over_images_by_hand():
    half = torch.tensor([1.0, 0.0] * 200).double()              # deviation 0.5, mean's 0.025
    hits = {"a": half, "b": torch.zeros(400), "cls": torch.full((400,), 0.5), "c": 1 - half}
    rows = [row(name, seed, None if name == "cls" else 8, knn_hits=scoring.pack(x))
            for name, x in hits.items() for seed in (0, 1)]
    low, high = tables.image_interval(rows, "a", "b")
    assert (low, high) == (pytest.approx(1 - 1.96 * 0.05, abs=0.01),
                           pytest.approx(1 + 1.96 * 0.05, abs=0.01))
    low, high = tables.image_interval(rows, "a", "c")           # paired: deviation 1
    assert high - low == pytest.approx(4 * 1.96 * 0.05, rel=0.1) and low < 0 < high
    assert tables.image_interval(rows, "a", "a") == [0, 0]
    assert tables.image_interval(rows, "a", "missing") is None


def test_ahead_counts_every_prefix_probe_and_seed():
    figures = {"knn_top1": 50.0, "linear_top1": 60.0}
    rows = [row("a", seed, n, **figures) for seed in (0, 1, 2) for n in (1, 8)]
    rows += [row("b", seed, n, knn_top1=49.0 if n == 1 else 50.0, linear_top1=60.0 + seed)
             for seed in (0, 1) for n in (1, 8)]
    text = tables.ahead_table(rows, [("a", "b"), ("a", "missing")])
    *_, line = text.splitlines()
    assert text.count("\n") == 3
    assert line == ("| a against b | 2 of 8 | +1.00 | - | - | +0.00 | -0.50 | - | - | -0.50 |")


def test_nothing_run_is_a_sentence(tmp_path):
    assert tables.accuracy_table([], {"a": "b"}, tables.COLUMNS) == "Not run yet.\n"
    assert tables.speed_table(tmp_path) == "Not run yet.\n"


def test_speed_is_what_the_benchmark_wrote(tmp_path):
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark/small.json").write_text(json.dumps(
        {"size": "small", "device": "abacus", "images_per_s": 30.0, "speedup": 3.0,
         "config": {"precision": "float32"}, "gemm_fraction": 0.5, "peak_memory_mb": 99.6}))
    assert tables.speed_table(tmp_path).splitlines()[2] == (
        "| small | abacus, float32 | 30.00 | 3.00 | - | 0.50 | 99.60 |")


def test_fill_replaces_what_is_between_the_marks_and_keeps_the_rest(tmp_path):
    path = tmp_path / "RESULTS.md"
    tables.fill(path, {"one": "| 1 |", "two": "| 2 |"}, "# New\n")
    first = path.read_text()
    assert first.startswith(
        "# New\n\n## one\n\n<!-- table: one -->\n\n| 1 |\n<!-- end of table: one -->\n")
    path.write_text(first.replace("## two", "By hand.\n\n## Second"))
    tables.fill(path, {"one": "| 3 |", "three": "| 4 |"}, "# New\n")
    text = path.read_text()
    assert "By hand.\n\n## Second\n\n<!-- table: two -->\n\n| 2 |" in text and "| 1 |" not in text
    assert text.index("| 3 |") < text.index("By hand.") < text.index("## three") < text.index("| 4")
    tables.fill(path, {"one": "| 3 |", "three": "| 4 |"}, "# New\n")
    assert path.read_text() == text


@pytest.mark.parametrize("text", [
    "nothing", "<!-- table: one -->", "<!-- end of table: one --> <!-- table: one -->"])
def test_fill_without_a_pair_of_marks_changes_nothing(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ValueError, match="README.md must hold, once and in this order"):
        tables.fill(path, {"one": "| 1 |"})
    assert path.read_text() == text
