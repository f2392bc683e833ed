"""checkpoint.py: runs killed at any moment, stopped by signals or out of disk resume to the bit.
Long form: python -m pytest -q tests/test_crash.py --crashes 20"""
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import data
import flags
import train
from extras import benchmark, pretrain

resource = pytest.importorskip("resource")         # not on Windows, which has no SIGKILL either
PRETRAIN = """--image-size 8 --width 64 --depth 1 --stem --prototypes 16 --hidden 32 --warmup 1
    --batch-size 20 --epochs 2 --every 100 --device cpu --precision float32""".split()
PARSE = {"train": flags.parse, "extras.pretrain": pretrain.parse}


def random_images(*anything, **more):
    """120 of 8 x 8 pixels; what `data.load` gives, the same in every process."""
    g = torch.Generator().manual_seed(1)
    images = torch.randint(256, (120, 3, 8, 8), dtype=torch.uint8, generator=g)
    return data.ImageSet(images, torch.arange(120) % 3, list("abc"))


def same(a, b, part=""):
    """Two checkpoints to the bit; what differs: seconds, and names of directories."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return all(same(a[k], b[k], k) for k in a if k not in ("seconds", "elapsed", "config"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, part) for x, y in zip(a, b))
    assert torch.equal(a, b) if torch.is_tensor(a) else a == b, part
    return True


def final(out):
    return torch.load(out / "ckpt.pt", weights_only=True)


def log(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    speed = "seconds", "images_per_s", "gemm_fraction"
    return [{k: v for k, v in r.items() if k not in speed} for r in lines]


def run(words):
    train.run(flags.parse(words))


@pytest.fixture(autouse=True)
def quick(unscored, monkeypatch):
    monkeypatch.setitem(benchmark.PRODUCT_SIDE, "cpu", 64)


# ---- SIGKILL -------------------------------------------------------------------------------------

def run_with_slow_disk(name, words):
    """In its own process: every torch.save stops half-way for a tenth of a second, and the run
    saves after every step."""
    torch.set_num_threads(1)
    main, fast = sys.modules[name], torch.save

    def slow(state, path):
        whole = io.BytesIO()
        fast(state, whole)
        with open(path, "wb", buffering=0) as file:
            file.write(whole.getvalue()[:whole.tell() // 2])
            time.sleep(0.1)
            file.write(whole.getvalue()[whole.tell() // 2:])
    torch.save, main.SAVE_MINUTES, train.finish = slow, 1e-9, lambda *args, **kwargs: None
    data.load = random_images if main is pretrain else data.load
    benchmark.PRODUCT_SIDE["cpu"] = 64
    main.run(PARSE[name](words))


def killed(context, main, words, out, delay):
    """Starts a run, kills it `delay` seconds after it begins its first save; -> its exit status."""
    part = out / "ckpt.pt.tmp"
    part.unlink(missing_ok=True)
    process = context.Process(target=run_with_slow_disk, args=(main.__name__, words))
    process.start()
    while process.is_alive() and not part.exists():
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join()
    return process.exitcode


def test_train_survives_kills_at_random_moments(tiny, tmp_path, forkserver, request, image_folder):
    """On streamed images, whose reading processes are left without a parent by the kill."""
    crashes, dice = request.config.getoption("--crashes"), random.Random()
    words = tiny("--epochs", str(2 + crashes), "--knn-every", "0.5",   # no kill after the last step
                 "--data", f"folder:{image_folder(80)}", "--storage", "stream")
    out, statuses = tmp_path / "run", []
    run([*words, "--out", str(tmp_path / "straight")])
    for _ in range(crashes):
        resume = ["--resume"] if checkpoint.exists(out / "ckpt.pt") else []
        statuses.append(killed(forkserver, train, words + resume, out, dice.uniform(0, 0.4)))
    assert statuses == [-9] * crashes
    run(words + ["--resume"] * checkpoint.exists(out / "ckpt.pt"))
    assert same(final(tmp_path / "straight"), final(out))
    assert log(tmp_path / "straight") == log(out)


def test_pretraining_survives_a_kill(tmp_path, forkserver, monkeypatch):
    monkeypatch.setattr(data, "load", random_images)
    straight, out = tmp_path / "straight", tmp_path / "killed"
    pretrain.run(pretrain.parse([*PRETRAIN, "--out", str(straight)]))
    words = [*PRETRAIN, "--out", str(out)]
    assert killed(forkserver, pretrain, words, out, 0.5) == -9
    assert final(out)["step"] < 10 and log(out) == []
    pretrain.run(pretrain.parse([*words, "--resume"]))
    assert same(final(straight), final(out)) and log(straight) == log(out)


@pytest.mark.parametrize("call, now", [(0, "old"), (1, "old"), (2, "new")])
def test_between_any_two_operations_an_intact_checkpoint_exists(tmp_path, monkeypatch, call, now):
    """The crash comes in place of the first or second rename, or of the return."""
    path, calls, rename = tmp_path / "ckpt.pt", [], os.replace
    for name in ("older", "old"):
        checkpoint.save(path, {"name": name})

    def replace(a, b):
        if len(calls) == call:
            raise KeyboardInterrupt
        calls.append(b)
        rename(a, b)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        try:
            checkpoint.save(path, {"name": "new"})
        except KeyboardInterrupt:
            assert call < 2
    assert len(calls) == call and checkpoint.load(path)["name"] == now


# ---- signals, damage, disks, data ----------------------------------------------------------------

def stopped(monkeypatch, words, number, step):
    """Runs until the signal `number` arrives in that step; -> exit status."""
    original = train.Trainer.step

    def stepping(self, z_t, step_now):
        if step_now == step:
            os.kill(os.getpid(), number)
        return original(self, z_t, step_now)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(train.Trainer, "step", stepping)
        run(words)
    return end.value.code


def test_signals_save_and_leave(tiny, tmp_path, monkeypatch, capsys):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    run(tiny("--disc", "vq", "--out", str(tmp_path / "straight")))
    words, out = tiny("--disc", "vq"), tmp_path / "run"
    assert stopped(monkeypatch, words, signal.SIGINT, 1) == 130
    assert [final(out)[k] for k in ("epoch", "step_in_epoch")] == [0, 2] and log(out) == []
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed.startswith("stopped by SIGINT; ") and f"--resume --out {out}" in printed
    torch.rand(7)                                   # the process that resumes has another past
    assert stopped(monkeypatch, [*words, "--resume"], signal.SIGTERM, 3) == 143    # an epoch's last
    assert [final(out)[k] for k in ("epoch", "step_in_epoch")] == [1, 0] and len(log(out)) == 1
    run([*words, "--resume"])
    assert same(final(tmp_path / "straight"), final(out))
    assert log(tmp_path / "straight") == log(out)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def halve(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def flip(path):
    """One bit in the middle of the weights: torch.load would not notice."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [Path.unlink, halve, flip])
def test_a_damaged_checkpoint_gives_way_to_the_previous_one(tmp_path, capsys, damage):
    path = tmp_path / "ckpt.pt"
    for name in ("previous", "newest"):
        checkpoint.save(path, {"name": name, "weights": torch.randn(10_000)})
    damage(path)
    assert checkpoint.load(path)["name"] == "previous"
    line, = capsys.readouterr().out.splitlines()
    assert line.endswith("; resuming from the previous checkpoint") and str(path) in line
    assert checkpoint.load(path)["name"] == "previous" and checkpoint.is_valid(path)
    checkpoint.save(path, {"name": "next"})             # which keeps the intact one
    halve(path)
    assert checkpoint.load(path)["name"] == "previous"
    halve(path)
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load(path)


def test_a_run_resumes_from_the_previous_checkpoint(tiny, tmp_path, monkeypatch, capsys):
    run(tiny("--out", str(tmp_path / "straight")))
    assert stopped(monkeypatch, tiny(), signal.SIGTERM, 5) == 143      # ckpt.prev.pt: after epoch 1
    out = tmp_path / "run"
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2, "step": 8}\n{"epo')       # a line too many, and a half one
    flip(out / "ckpt.pt")
    capsys.readouterr()
    run(tiny("--resume"))
    assert "; resuming from the previous checkpoint" in capsys.readouterr().out.splitlines()[0]
    assert same(final(tmp_path / "straight"), final(out))
    assert log(tmp_path / "straight") == log(out)


def test_a_full_disk_keeps_the_old_checkpoint(tiny, tmp_path, monkeypatch):
    """From the second epoch on no file may be longer than 50 kB."""
    out, original = tmp_path / "run", train.Trainer.step
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def step(self, z_t, step_now):
        if step_now == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        return original(self, z_t, step_now)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(train.Trainer, "step", step)
            patch.setattr(sys, "argv", ["train.py", *tiny()])
            with pytest.raises(SystemExit) as error:
                train.main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.code.startswith("train.py: cannot write ") and "\n" not in error.value.code
    assert "the previous one is intact" in error.value.code
    assert final(out)["epoch"] == 1
    assert {f.name for f in out.iterdir()} == {"ckpt.pt", "metrics.jsonl", "config.json"}
    run(tiny("--resume"))
    assert [r["epoch"] for r in log(out)] == [1, 2]


def test_images_that_changed_underneath_are_noticed(tiny, monkeypatch):
    run(tiny("--epochs", "1"))
    original = data.load

    def load(*words):
        images = original(*words)
        images.images[3] = images.images[4]
        return images
    monkeypatch.setattr(data, "load", load)
    with pytest.raises(ValueError, match="the images have changed since the run was started"):
        run(tiny("--epochs", "1", "--resume"))


def test_pretraining_does_not_overwrite_a_run(tmp_path):
    (tmp_path / "ckpt.prev.pt").touch()
    with pytest.raises(ValueError, match="holds a run already"):
        pretrain.run(pretrain.parse(["--device", "cpu", "--out", str(tmp_path)]))
