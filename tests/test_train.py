"""train.py in seconds: resuming to the bit, what a run leaves behind, and what it prints when it
cannot continue. (The parts of a run: test_step.py.)"""
import argparse
import ast
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import checkpoint
import data
import evaluate
import flags
import progress
import scoring
import train
import visualize
from conftest import RECIPES, ROOT

STEPS = 4                                   # an epoch of `tiny`: 76 training images, 16 to a step
KEYS = {"epoch", "step", "seconds", "images_per_s", "lr", "loss", "dino_loss", "aux", "extra_loss",
        "teacher_entropy", "teacher_entropy_max", "kl", "symbol_entropy", "information",
        "perplexity", "codebook_usage", "unique_codes"}
TIMING = {"seconds", "images_per_s"}


def test_every_panel_of_the_curves_is_a_value_of_the_log():
    assert visualize.PANELS.keys() <= KEYS | {"knn_top1"}


def run(words):
    train.run(flags.parse(words))


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def files(out):
    return {f.name: f.read_bytes() for f in out.iterdir()}


def refusal(monkeypatch, words):
    """What `python train.py WORDS` prints before it exits with status 1: one line."""
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(SystemExit) as error:
        train.main()
    message = error.value.code                      # a string: Python prints it and exits with 1
    assert isinstance(message, str) and message.startswith("train.py: ") and "\n" not in message
    return message


def killed(monkeypatch, words, at):
    """A run that ends like at a power cut, in the step `at`; it saves after every step."""
    original = train.Trainer.step

    def step(self, z_t, number):
        if number == at:
            raise KeyboardInterrupt
        return original(self, z_t, number)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Trainer, "step", step)
        patch.setattr(train, "SAVE_MINUTES", 1e-9)
        run(words)


# ---- a run and its files -------------------------------------------------------------------------

RUNS = ["--recipe stable", "--recipe stable --disc gumbel --cache-views 0",
        "--recipe stable --disc vq --views 2 --cache-views 3", "--recipe paper --views 2",
        "--recipe paper --disc gumbel --views 2 --cache-views 3"]


@pytest.mark.parametrize("words", RUNS)
def test_a_run_killed_in_mid_epoch_resumes_to_the_bit(tiny, tmp_path, monkeypatch, unscored, words):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run(tiny(*words.split(), "--out", str(straight)))
    words = tiny(*words.split(), "--out", str(resumed))
    killed(monkeypatch, words, STEPS + 2)
    state = torch.load(resumed / "ckpt.pt", weights_only=True)
    assert (state["epoch"], state["step_in_epoch"]) == (1, 2)
    assert [r["epoch"] for r in records(resumed)] == [1]
    torch.rand(7)                                   # the process that resumes has another past
    run([*words, "--resume"])

    for a, b in zip(records(straight), records(resumed), strict=True):
        assert a.keys() == b.keys() and {k for k in a if a[k] != b[k]} <= TIMING
    a, b = (torch.load(out / "ckpt.pt", weights_only=True) for out in (straight, resumed))
    for part in ("student", "centering"):
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part]), part
    assert torch.equal(a["rng"]["cpu"], b["rng"]["cpu"])


def test_a_kill_between_log_and_checkpoint_leaves_one_line_per_epoch(tiny, tmp_path, monkeypatch,
                                                                     unscored):
    original, saved = checkpoint.save, []

    def save(path, state):
        saved.append(path.name)
        if len(saved) == 2:
            raise KeyboardInterrupt
        original(path, state)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", save)
        run(tiny())
    run(tiny("--resume"))
    assert [r["epoch"] for r in records(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_a_run_leaves(tiny, tmp_path, capsys, recipe):
    words = tiny("--recipe", recipe, "--knn-every", "2", "--tau", "0.3")
    run(words)
    out, args = tmp_path / "run", flags.parse(words)
    assert set(files(out)) == {"config.json", "metrics.jsonl", "ckpt.pt", "results.json",
                               "figure1.png", "curves.png"}
    first, second = records(out)
    assert KEYS == first.keys() and KEYS | {"knn_top1", "knn_prefix"} == second.keys()
    assert len(second["knn_prefix"]) == 4 and second["knn_prefix"][-1] == second["knn_top1"]
    assert [(r["epoch"], r["step"]) for r in (first, second)] == [(1, STEPS), (2, 2 * STEPS)]
    for r in (first, second):
        assert len(r["perplexity"]) == 8 and all(1 <= p <= 8 for p in r["perplexity"])
        assert 0 < r["codebook_usage"] <= 1 and 0 < r["unique_codes"] <= 1
        assert min(r["kl"], r["seconds"], r["images_per_s"], r["lr"]) > 0
        assert r["teacher_entropy_max"] == math.log(16) > r["teacher_entropy"] > 0
        assert all(0 <= r[name] <= math.log(8) + 1e-5 for name in ("information", "symbol_entropy"))
        assert (r["extra_loss"] > 0) == (recipe == "stable")
        assert r["loss"] == pytest.approx(r["dino_loss"] + r["aux"] + r["extra_loss"], abs=1e-4)
    config = json.loads((out / "config.json").read_text())
    assert config.pop("hardware")["threads"] == 1
    assert config == checkpoint.config_of(args) and config["tau"] == 0.3
    results = json.loads((out / "results.json").read_text())
    assert results["student"].keys() == {"1", "2", "4", "8"} and results["bits"] == 24
    printed = capsys.readouterr().out
    assert "76 images, teacher 0.1 M parameters, student " in printed
    assert f"8 symbols of 8: 24 bits an image, cpu in float32 -> {out}" in printed
    assert printed.splitlines()[-1].startswith("finished in ")


def test_lines_of_the_log_within_an_epoch(tiny, tmp_path, unscored):
    """They change nothing but the log: a third of four steps is 1, two thirds are 2."""
    whole, parts = ({"--out": tmp_path / str(every), "--knn-every": every} for every in (1, 0.3))
    for words in whole, parts:
        run(tiny(*(str(word) for pair in words.items() for word in pair)))
    whole, parts = ((words["--out"], records(words["--out"])) for words in (whole, parts))
    assert [r["epoch"] for r in parts[1]] == [0.25, 0.5, 1, 1.25, 1.5, 2]
    assert [r["step"] for r in parts[1]] == [1, 2, 4, 5, 6, 8]
    for i, r in enumerate(whole[1]):
        a, b, c = parts[1][3 * i:3 * i + 3]
        for name in ("loss", "kl", "teacher_entropy"):
            assert (a[name] + b[name] + 2 * c[name]) / 4 == pytest.approx(r[name])
        assert {"knn_top1", "perplexity"} <= a.keys() and a["seconds"] < b["seconds"] < c["seconds"]
        assert c["knn_prefix"] == r["knn_prefix"] and c["perplexity"] == r["perplexity"]
    states = [torch.load(out / "ckpt.pt")["student"] for out, _ in (whole, parts)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_resumed_run_may_write_other_lines(tiny, tmp_path, monkeypatch, unscored):
    """Stopped after 3 steps of 4, a line after 2: the next line, at the end, is of 2 steps."""
    original = train.Trainer.step

    def step(self, z_t, number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, z_t, number)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train.Trainer, "step", step)
        run(tiny("--epochs", "1", "--knn-every", "0.5"))
    run(tiny("--epochs", "1", "--knn-every", "0", "--resume"))
    run(tiny("--epochs", "1", "--out", str(tmp_path / "straight")))
    (first, second), (whole,) = records(tmp_path / "run"), records(tmp_path / "straight")
    assert (first["loss"] + second["loss"]) / 2 == pytest.approx(whole["loss"])


def test_the_test_split_plays_no_part_in_training(tiny, monkeypatch):
    original, seen = data.load, []

    def load(name, split, *rest):
        seen.append(split)
        return original(name, split, *rest)

    def stop(*_, **__):
        assert seen == ["train"]
        raise InterruptedError
    for module in (data, evaluate):
        monkeypatch.setattr(module, "load", load)
    monkeypatch.setattr(evaluate, "evaluate", stop)             # all steps are done by then
    with pytest.raises(InterruptedError):
        run(tiny("--epochs", "1", "--knn-every", "1"))


# ---- what goes wrong -----------------------------------------------------------------------------

@pytest.mark.parametrize("flag, words", [
    ("--tau 0", "--tau and --tau-start must be above 0"), ("--tau-start 0", "--tau-start must"),
    ("--vocab 1", "--vocab must be 2 or more"), ("--vocab 77", "--vocab"),
    ("--length 3", "power of two"), ("--length 0", "power of two"),
    ("--data dogs", "unknown data set 'dogs'"), ("--data folder:/no/such", "no folder /no/such"),
    ("--teacher nobody", "no teacher 'nobody'"), ("--teacher random:nobody", "random: needs one"),
    ("--image-size 10", "--image-size 10"), ("--image-size 0", "--image-size"),
    ("--batch-size 77", "--batch-size 77"), ("--batch-size 0", "--batch-size"),
    ("--train-images 20", "too few"), ("--train-images 0", "--train-images"),
    ("--train-images -5", "--train-images"), ("--test-images 0", "--test-images"),
    ("--neighbours -1", "--neighbours"), ("--prototypes 77", "--prototypes"),
    ("--prototypes 0", "--prototypes"), ("--hidden 0", "--hidden"), ("--views 0", "--views"),
    ("--views 2", "--cache-views 1 are too few for --views 2"), ("--epochs 0", "--epochs"),
    ("--lr 0", "--lr must"), ("--lr nan", "--lr must"), ("--lam -1", "--lam must"),
    ("--teacher-temp 0 1", "--teacher-temp must"), ("--descriptor 1x5", "5 heads do not divide"),
    ("--interpreter 1x5", "5 heads do not divide"), ("--device tpu9", "--device"),
    ("--precision float16", "float16 is for GPUs"), ("--storage stream", "--storage stream is for"),
    ("--knn-every -1", "--knn-every"), ("--knn-every nan", "--knn-every"),
    ("--cache-views -1", "--cache-views must not be below 0"),
    ("--disc vq --explore info", "does nothing with --disc vq"),
    ("--pairing cross", "--pairing cross needs other views"), ("--resume", "no file")])
def test_bad_input_is_one_line(tiny, tmp_path, monkeypatch, flag, words):
    assert words in refusal(monkeypatch, tiny(*flag.split()))
    assert not (tmp_path / "run" / "ckpt.pt").exists()


@pytest.mark.parametrize("word", ["0x4", "4x0", "4", "x", "4x4x4"])
def test_a_network_shape_is_depth_and_heads(capsys, word):
    with pytest.raises(SystemExit):
        flags.parse(["--descriptor", word])
    assert "--descriptor: invalid" in capsys.readouterr().err
    assert flags.network_shape("6x8") == (6, 8)


def test_data_that_cannot_be_evaluated_is_reported_before_training(tiny, tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    for i in range(60):
        Image.new("RGB", (8, 8), (i, 4 * i, 255 - i)).save(tmp_path / "flat" / f"{i}.png")
    run(tiny("--data", f"folder:{tmp_path / 'flat'}", "--epochs", "1", "--train-images", "all"))
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("the run will end without evaluation: ") and "cannot be scored" in first
    assert records(tmp_path / "run")[0]["step"] == (60 - 3) // 16   # all of them, but 1 in 20
    assert {"figure1.png", "ckpt.pt"} <= {*files(tmp_path / "run")} > {"curves.png"}
    assert "results.json" not in files(tmp_path / "run")


def test_a_run_is_not_overwritten_and_not_continued_with_other_flags(tiny, tmp_path, monkeypatch,
                                                                     unscored):
    run(tiny("--epochs", "1"))
    before = files(tmp_path / "run")
    assert "--resume to continue it, or another --out" in refusal(monkeypatch, tiny())
    message = refusal(monkeypatch, tiny("--epochs", "1", "--resume", "--lr", "0.5", "--disc", "vq",
                                        "--descriptor", "2x4"))
    assert "--lr was 0.002, is 0.5" in message and "--disc was softmax, is vq" in message
    assert "--descriptor was [1, 4], is [2, 4]" in message and "--vocab" not in message
    assert files(tmp_path / "run") == before
    (tmp_path / "run" / "ckpt.pt").write_bytes(before["ckpt.pt"][:1000])
    assert "damaged" in refusal(monkeypatch, tiny("--epochs", "1", "--resume"))


def test_a_teachers_file_is_no_run(tiny, tmp_path, monkeypatch):
    words = tiny("--resume")
    (tmp_path / "run").mkdir()
    (tmp_path / "teacher.pt").rename(tmp_path / "run" / "ckpt.pt")
    assert "is not a checkpoint of train.py" in refusal(monkeypatch, words)


def test_a_resumed_run_keeps_its_precision(tmp_path):
    """Whatever `auto` means on the machine that resumes."""
    def parse(*words):
        return flags.parse(["--out", str(tmp_path), "--device", "cpu", *words])
    args = parse("--precision", "bfloat16")
    checkpoint.save(tmp_path / "ckpt.pt", {"config": checkpoint.config_of(args), "optimizer": {}})
    args = parse("--precision", "float32", "--resume")
    assert checkpoint.open_run(args)["config"]["precision"] == args.precision == "bfloat16"


def test_a_name_that_nobody_chose_gives_way_to_the_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outs = []
    for _ in range(3):
        args = flags.parse(["--data", "folder:a/b", "--disc", "vq", "--seed", "7"])
        assert checkpoint.open_run(args) is None
        outs.append(args.out)
        (args.out / "ckpt.pt").touch()
    names = [f"runs/folder-a-b-stable-vq-128-s7{end}" for end in ("", "-2", "-3")]
    assert [out.as_posix() for out in outs] == names


def test_nan_stops_the_run_and_keeps_the_last_good_epoch(tiny, tmp_path, monkeypatch):
    original, steps = train.training_step, []

    def step(*inputs):
        loss, log = original(*inputs)
        steps.append(loss)
        scale = math.nan if len(steps) == STEPS + 3 else 1.0    # the third of the second epoch
        return loss * scale, log | {"loss": log["loss"] * scale}
    monkeypatch.setattr(train, "training_step", step)
    assert "the loss is nan in epoch 2" in refusal(monkeypatch, tiny())
    assert len(steps) == 2 * STEPS and [r["epoch"] for r in records(tmp_path / "run")] == [1]
    state = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    assert state["epoch"] == 1 and all(v.isfinite().all() for v in state["student"].values())


def test_nan_is_never_saved(tiny, tmp_path, monkeypatch):
    """Saved after every step, the third of which has a finite loss and takes a weight away."""
    original, out = train.Trainer.step, tmp_path / "run"

    def step(self, z_t, number):
        log = original(self, z_t, number)
        if number == 2:
            self.student.descriptor.start.data.fill_(math.nan)
        return log
    monkeypatch.setattr(train.Trainer, "step", step)
    monkeypatch.setattr(train, "SAVE_MINUTES", 1e-9)
    assert "or a weight is not finite; " in refusal(monkeypatch, tiny())
    state = torch.load(out / "ckpt.pt", weights_only=True)
    assert (state["epoch"], state["step_in_epoch"]) == (0, 2)
    assert all(v.isfinite().all() for v in state["student"].values())


def test_a_warning_is_printed_in_the_run(tiny, capsys, unscored):
    run(tiny("--epochs", "1", "--teacher-temp", "1000", "1000"))
    assert "WARNING: collapse? the teacher's entropy is ln P" in capsys.readouterr().out


# ---- flags ---------------------------------------------------------------------------------------

def test_at_most_40_flags_and_6_of_the_recipe_stable(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda self, argv: self)
        parser = flags.parse([])
    groups = {group.title: group._group_actions for group in parser._action_groups}
    own = {title: actions for title, actions in groups.items() if title.startswith("only with")}
    assert own.keys() == {"only with --recipe paper", "only with --recipe stable"}
    assert own["only with --recipe paper"] == [] and len(own["only with --recipe stable"]) <= 6
    core = [a for a in parser._actions if a not in own["only with --recipe stable"]]
    assert len(core) - 1 <= 40                                  # without --help


def test_help_prints_every_default_that_the_command_would_have(capsys):
    for words, some in (([], ["default: 20000", "default: softmax 0.12, gumbel 0.5, vq 1.0",
                              "otherwise softmax 0.12, gumbel 2.0, vq 1.0", "default: True)"]),
                        (["--recipe", "paper", "--size", "paper"],
                         ["default: all", "default: 12x6", "default: 8192", "default: False)"])):
        with pytest.raises(SystemExit):
            flags.parse([*words, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert [part for part in some if part not in text] == []
        assert "default: None" not in text and text.count("efault: ") >= 43


def test_one_line_names_the_default_recipe():
    """No other line of train.py or flags.py distinguishes recipes."""
    for name, count in (("flags", 1), ("train", 0)):
        source = (ROOT / f"{name}.py").read_text()
        lines = [line for line in source.splitlines() if re.search(r"""["']stable["']""", line)]
        assert len(lines) == count and all("--recipe" in line for line in lines)
        compared = [ast.unparse(node) for node in ast.walk(ast.parse(source))
                    if isinstance(node, ast.Compare) and "recipe" in ast.unparse(node)]
        assert compared == []


# ---- output --------------------------------------------------------------------------------------

def seconds_waited(process):
    """How long it was ready to run while others had the processors (Linux; elsewhere 0)."""
    try:
        return int(Path(f"/proc/{process.pid}/schedstat").read_text().split()[1]) / 1e9
    except FileNotFoundError:
        return 0.0


def outputs(words, terminal):
    """`python train.py WORDS` on a pseudo-terminal or into a pipe -> (all text, the pauses before
    each output). A pause is the wall clock's time less `seconds_waited`, which depends on what
    else the machine does."""
    (read, write), text, pauses = os.openpty() if terminal else os.pipe(), b"", []
    with subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words], stdout=write,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        os.close(write)
        last, chunk = time.monotonic(), b"-"
        while chunk:
            try:
                chunk = os.read(read, 2**16)
            except OSError:                                 # the end of a pseudo-terminal
                chunk = b""
            now, text = time.monotonic() - seconds_waited(process), text + chunk
            pauses.append(now - last)
            last = now
    os.close(read)
    assert process.returncode == 0
    return text.decode().replace("\r\n", "\n"), pauses


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
def test_the_command_prints_at_once_and_is_never_silent_for_long(tiny, terminal):
    text, pauses = outputs(tiny("--epochs", "1"), terminal)
    assert text.startswith("loading PyTorch ...\n")
    assert ("\r\033[K" in text) == terminal
    assert text.splitlines()[-1].startswith("finished in ")
    assert pauses[0] < 5 and max(pauses) < 15, (pauses, text)


STAGES = {"drawing images", "teacher's tokens, images", "training, step", "encoding, images",
          "teacher's tokens for the statistics, images", "nearest neighbours, images",
          "k-means of the prototypes, iteration", "teacher's tokens of held-out images",
          *(f"k-means of codebook {t} of 8, iteration" for t in range(1, 9)), "k-NN, queries",
          *(f"linear probe, weight decay {l2:g}, step" for l2 in scoring.L2_GRID)}


def test_each_stage_that_grows_with_the_data_has_its_progress(tiny, monkeypatch, capsys):
    """At the default size each takes longer than five seconds on some machine, and a batch, chunk
    or iteration of it less. Here all outputs are shown that may be."""
    monkeypatch.setattr(progress, "FILE_SECONDS", 0)
    monkeypatch.setattr(progress.Progress, "last_output", None)
    run(tiny("--epochs", "1", "--knn-every", "1", "--neighbours", "2"))
    lines = re.findall(r"(.*): (\d+)/(\d+)", capsys.readouterr().out)
    assert {what for what, _, _ in lines} == STAGES
    for stage in STAGES - {what for what in STAGES if "probe" in what}:     # it may converge early
        done = [(int(n), int(total)) for what, n, total in lines if what == stage]
        assert done[0][0] == 0 and done[-1][0] == done[-1][1] > 0, stage
