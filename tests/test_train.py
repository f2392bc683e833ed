"""train.py in seconds: resuming to the bit, what a run leaves behind, and what it says when it
cannot go on. (The parts of a run: test_step.py.)"""
import json
import math
import os
import signal
import sys

import pytest
import torch
from PIL import Image

import checkpoint
import data
import evaluate
import train

STEPS = 4                                   # an epoch of `tiny`: 76 training pictures, 16 to a step
KEYS = {"epoch", "step", "seconds", "images_per_s", "lr", "loss", "teacher_entropy",
        "teacher_entropy_max", "kl", "symbol_entropy", "information", "perplexity", "usage",
        "distinct", "aux", "tau"}
TIMING = {"seconds", "images_per_s"}


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def files(out):
    return {f.name: f.read_bytes() for f in out.iterdir()}


def refusal(monkeypatch, words):
    """What `python train.py WORDS` says before it exits with status 1: one line."""
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(SystemExit) as error:
        train.main()
    message = error.value.code                      # a string: Python prints it and exits with 1
    assert isinstance(message, str) and message.startswith("train.py: ") and "\n" not in message
    return message


def kill_in_second_epoch(monkeypatch, step=1):
    """Ctrl-C in the middle of the second epoch."""
    original = train.Trainer.step

    def stepping(self, images, at):
        if at == STEPS + step:
            raise KeyboardInterrupt
        return original(self, images, at)
    monkeypatch.setattr(train.Trainer, "step", stepping)


# ---- a run and its files -------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [
    ("--disc", "softmax"), ("--disc", "gumbel", "--tau-start", "1"), ("--disc", "vq"),
    ("--prototype-source", "ema", "--centering", "centre", "--teacher-temp-start", "0.04"),
    ("--cache-views", "3", "--accumulate", "2")], ids=["softmax", "gumbel", "vq", "ema", "cache"])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tiny, tmp_path, monkeypatch, flags):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train.run(train.parse(tiny(*flags, "--out", str(straight))))
    words = tiny(*flags, "--out", str(resumed))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        kill_in_second_epoch(patch)
        train.run(train.parse(words))
    assert [r["epoch"] for r in records(resumed)] == [1]
    torch.rand(7)                                   # the process that resumes has another past
    train.run(train.parse([*words, "--resume"]))

    for a, b in zip(records(straight), records(resumed), strict=True):
        assert a.keys() == b.keys() and {k for k in a if a[k] != b[k]} <= TIMING
    a, b = (torch.load(out / "ckpt.pt", weights_only=True) for out in (straight, resumed))
    for part in ("student", "head", "softmax"):
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part]), part
    assert torch.equal(a["rng"]["cpu"], b["rng"]["cpu"])


def test_a_kill_between_log_and_checkpoint_leaves_one_line_per_epoch(tiny, tmp_path, monkeypatch):
    original, saved = checkpoint.save, []

    def saving(path, state):
        saved.append(path.name)
        if len(saved) == 2:
            raise KeyboardInterrupt
        original(path, state)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", saving)
        train.run(train.parse(tiny()))
    train.run(train.parse(tiny("--resume")))
    assert [r["epoch"] for r in records(tmp_path / "run")] == [1, 2]


def test_what_a_run_leaves(tiny, tmp_path):
    args = train.parse(tiny("--knn-every", "2", "--tau", "0.3"))
    train.run(args)
    out = tmp_path / "run"
    expected = {"config.json", "metrics.jsonl", "ckpt.pt", "figure1.png", "curves.png"}
    assert set(files(out)) == expected
    first, second = records(out)
    assert KEYS <= first.keys() and KEYS | {"knn_top1", "knn_prefix"} <= second.keys()
    assert "knn_top1" not in first and len(second["knn_prefix"]) == 4
    assert second["knn_prefix"][-1] == second["knn_top1"]
    assert [(r["epoch"], r["step"]) for r in (first, second)] == [(1, STEPS), (2, 2 * STEPS)]
    for r in (first, second):
        assert len(r["perplexity"]) == 8 and all(1 <= p <= 8 for p in r["perplexity"])
        assert 0 < r["usage"] <= 1 and 0 < r["distinct"] <= 1 and r["tau"] == 0.3
        assert min(r["kl"], r["seconds"], r["images_per_s"], r["lr"]) > 0
        assert r["teacher_entropy_max"] == math.log(16) > r["teacher_entropy"] > 0
        assert all(0 <= r[name] <= math.log(8) + 1e-5 for name in ("information", "symbol_entropy"))
    config = json.loads((out / "config.json").read_text())
    assert config.pop("machine")["threads"] == torch.get_num_threads()
    flags = {k: v for k, v in vars(args).items() if k not in ("resume", "overwrite")}
    assert config == flags | {"out": str(out)} and config["vocab"] == 8 and config["tau"] == 0.3


def test_lines_of_the_log_within_an_epoch(tiny, tmp_path):
    """They change nothing but the log: a third of four steps is 1, two thirds are 2."""
    whole, parts = ({"--out": tmp_path / str(every), "--knn-every": every} for every in (1, 0.3))
    for flags in whole, parts:
        train.run(train.parse(tiny(*(str(word) for pair in flags.items() for word in pair))))
    whole, parts = ((flags["--out"], records(flags["--out"])) for flags in (whole, parts))
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


def test_a_resumed_run_may_write_other_lines(tiny, tmp_path, monkeypatch):
    """Stopped after 3 steps of 4, a line after 2: the next line, at the end, is of 2 steps."""
    original = train.Trainer.step

    def step(self, images, at):
        if at == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, images, at)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train.Trainer, "step", step)
        train.run(train.parse(tiny("--epochs", "1", "--knn-every", "0.5")))
    train.run(train.parse(tiny("--epochs", "1", "--knn-every", "0", "--resume")))
    train.run(train.parse(tiny("--epochs", "1", "--out", str(tmp_path / "straight"))))
    (first, second), (whole,) = records(tmp_path / "run"), records(tmp_path / "straight")
    assert (first["loss"] + second["loss"]) / 2 == pytest.approx(whole["loss"])


def test_the_test_part_plays_no_part_in_training(tiny, monkeypatch):
    original, seen = data.load, []

    def load(name, split, *rest):
        seen.append(split)
        return original(name, split, *rest)
    for module in (data, evaluate):
        monkeypatch.setattr(module, "load", load)
    train.run(train.parse(tiny("--epochs", "1", "--knn-every", "1")))
    assert seen == ["train"]
    train.run(train.parse(tiny("--epochs", "1", "--overwrite", "--evaluate")))
    assert seen == ["train", "train", "train", "test"]              # the evaluation comes last


# ---- what goes wrong -----------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    ("--tau 0", "--tau must be above 0"), ("--vocab 1", "--vocab must be 2 or more"),
    ("--length 3", "power of two"), ("--data dogs", "unknown data set 'dogs'"),
    ("--data folder:/no/such", "no folder /no/such"), ("--teacher nobody", "no teacher 'nobody'"),
    ("--random-teacher --teacher shapes", "--random-teacher needs"),
    ("--image-size 10", "--image-size 10"), ("--image-size 0", "--image-size"),
    ("--batch-size 77", "--batch-size 77"), ("--train-images 20", "too few"),
    ("--train-images 0", "--train-images"), ("--train-images -5", "--train-images"),
    ("--test-images 0", "--test-images"), ("--regression 0", "--no-draft"),
    ("--neighbours -1", "--neighbours"), ("--prototypes 77", "--prototypes 77"),
    ("--local-axes -1", "--local-axes must"), ("--local-axes 9 --directions 0", "--directions"),
    ("--local-axes 9 --no-draft", "--local-axes needs --draft"),
    ("--views 0", "--views"), ("--epochs 0", "--epochs"), ("--lr 0", "--lr must"),
    ("--lam -1", "--lam must"), ("--student-temp 0", "--student-temp"),
    ("--descriptor-heads 5", "--descriptor-heads"), ("--descriptor-heads 0", "--descriptor-heads"),
    ("--interpreter-heads 0", "--interpreter-heads"),
    ("--descriptor-depth 0", "--descriptor-depth"), ("--hidden 0", "--hidden"),
    ("--bottleneck 0", "--bottleneck"), ("--device tpu9", "--device"),
    ("--save-minutes -1", "--save-minutes"), ("--knn-every -1", "--knn-every"),
    ("--knn-every nan", "--knn-every"), ("--lr nan", "--lr must"),
    ("--accumulate 0", "--accumulate must"),
    ("--accumulate 3", "multiple of 1 (processes) x 3"), ("--cache-views 1", "--views 2"),
    ("--resume", "no file")])
def test_bad_input_is_one_line(tiny, tmp_path, monkeypatch, flags, words):
    assert words in refusal(monkeypatch, tiny(*flags.split()))
    assert not (tmp_path / "run" / "ckpt.pt").exists()


def test_data_that_cannot_be_evaluated_is_told_before_training(tiny, tmp_path, monkeypatch):
    (tmp_path / "flat").mkdir()
    for i in range(60):
        Image.new("RGB", (8, 8), (i, 4 * i, 255 - i)).save(tmp_path / "flat" / f"{i}.png")
    words = tiny("--data", f"folder:{tmp_path / 'flat'}", "--epochs", "1", "--train-images", "all")
    assert "--no-evaluate" in refusal(monkeypatch, [*words, "--evaluate"])
    assert not (tmp_path / "run").exists()                  # nor has anything been written
    train.run(train.parse(words))
    assert records(tmp_path / "run")[0]["step"] == (60 - 3) // 16   # all of them, but 1 in 20


def test_a_cache_that_does_not_fit_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(train, "free_memory", lambda: 1e5)
    # 76 pictures x 3 views x 5 tokens x 64 numbers x 2 bytes
    message = refusal(monkeypatch, tiny("--cache-views", "3"))
    assert "takes 0.000146 GB of memory, and 0.0001 are free" in message


def test_a_run_is_not_overwritten_by_accident(tiny, tmp_path, monkeypatch):
    train.run(train.parse(tiny("--epochs", "1")))
    before = files(tmp_path / "run")
    assert "--overwrite" in refusal(monkeypatch, tiny("--epochs", "1"))
    message = refusal(monkeypatch, tiny("--epochs", "1", "--resume", "--lr", "0.5", "--disc", "vq"))
    assert "--lr was 0.002, is 0.5" in message and "--disc was softmax, is vq" in message
    assert "--vocab" not in message
    assert files(tmp_path / "run") == before
    (tmp_path / "run" / "ckpt.pt").write_bytes(before["ckpt.pt"][:1000])
    assert "damaged" in refusal(monkeypatch, tiny("--epochs", "1", "--resume"))


def test_a_new_run_does_not_inherit_the_old_checkpoint(tiny, tmp_path, monkeypatch):
    train.run(train.parse(tiny("--epochs", "1")))

    def killed(self, keeper):                               # before its first checkpoint
        raise KeyboardInterrupt
    monkeypatch.setattr(train.Trainer, "train_part", killed)
    with pytest.raises(KeyboardInterrupt):
        train.run(train.parse(tiny("--epochs", "1", "--overwrite")))
    assert "ckpt.pt" not in files(tmp_path / "run") and records(tmp_path / "run") == []


def test_nan_stops_the_run_and_keeps_the_last_good_epoch(tiny, tmp_path, monkeypatch):
    original, good = train.forward, []

    def forward(*inputs):
        loss, log = original(*inputs)
        good.append((tmp_path / "run" / "ckpt.pt").exists())
        scale = math.nan if sum(good) >= 3 else 1.0  # the third step of the second epoch
        return loss * scale, log | {"loss": log["loss"] * scale}
    monkeypatch.setattr(train, "forward", forward)
    assert "the loss is nan in epoch 2" in refusal(monkeypatch, tiny())
    assert len(good) == 2 * STEPS and [r["epoch"] for r in records(tmp_path / "run")] == [1]
    state = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    assert state["epoch"] == 1 and all(v.isfinite().all() for v in state["student"].values())


def test_nan_is_never_saved(tiny, tmp_path, monkeypatch):
    """Saved after every step, the third of which has a finite loss and takes a weight away."""
    original, out = train.Trainer.step, tmp_path / "run"

    def step(self, images, at):
        log = original(self, images, at)
        if at == 2:
            self.student.descriptor.start.data.fill_(math.nan)
        return log
    monkeypatch.setattr(train.Trainer, "step", step)
    assert "or a weight no number; " in refusal(monkeypatch, tiny("--save-minutes", "1e-9"))
    state = torch.load(out / "ckpt.pt", weights_only=True)
    assert (state["epoch"], state["at"]) == (0, 2)
    assert all(v.isfinite().all() for v in state["student"].values())


def test_an_alarm_is_printed_in_the_run(tiny, capsys):
    flags = "--epochs 1 --teacher-temp 1000 --teacher-temp-start 1000"
    train.run(train.parse(tiny(*flags.split())))
    assert "WARNING: collapse? the teacher's entropy is ln P" in capsys.readouterr().out


def test_a_name_that_nobody_chose_gives_way_to_the_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outs = []
    for _ in range(3):
        outs.append(train.open_run(train.parse(["--data", "folder:a/b"]))[0])
        (outs[-1] / "ckpt.pt").touch()
    names = [f"runs/folder-a-b-softmax-128-s0{end}" for end in ("", "-2", "-3")]
    assert [out.as_posix() for out in outs] == names
    again = train.open_run(train.parse(["--data", "folder:a/b", "--overwrite"]))[0]
    assert again == outs[0]
