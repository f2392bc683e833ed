"""checkpoint.py: runs killed at any moment, stopped by signals or out of disk go on to the bit.
Long form: python -m pytest -q tests/test_crash.py --crashes 20"""
import io
import json
import multiprocessing
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
import train
from extras import pretrain

resource = pytest.importorskip("resource")         # not on Windows, which has no SIGKILL either
ROOT = str(Path(__file__).parent.parent)
EVERY_STEP = ("--save-minutes", "1e-9")
PRETRAIN = """--image-size 8 --width 64 --depth 1 --stem --prototypes 16 --hidden 32 --bottleneck 8
    --batch-size 20 --epochs 2 --warmup 1 --every 100 --device cpu""".split()   # one line of log


def random_pictures(*anything):
    """6100 of 8 x 8 pixels; what `data.load` gives, the same in every process."""
    g = torch.Generator().manual_seed(1)
    images = torch.randint(256, (6100, 3, 8, 8), dtype=torch.uint8, generator=g)
    return data.ImageSet(images, torch.arange(6100) % 3, list("abc"))


def same(a, b, part=""):
    """Two checkpoints to the bit; what differs: seconds, and names of directories."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return all(same(a[k], b[k], k) for k in a if k not in ("seconds", "config"))
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


# ---- SIGKILL -------------------------------------------------------------------------------------

def run_with_slow_disk(name, words):
    """In a process of its own: every torch.save stops half-way for a tenth of a second."""
    torch.set_num_threads(1)
    main, fast = sys.modules[name], torch.save

    def slow(state, path):
        whole = io.BytesIO()
        fast(state, whole)
        with open(path, "wb", buffering=0) as file:
            file.write(whole.getvalue()[:whole.tell() // 2])
            time.sleep(0.1)
            file.write(whole.getvalue()[whole.tell() // 2:])
    torch.save, data.load = slow, random_pictures if main is pretrain else data.load
    main.run(main.parse(words))


def killed(main, words, out, delay):
    """Starts a run, kills it `delay` seconds after it begins its first save; -> its exit status."""
    part = out / "ckpt.pt.tmp"
    part.unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=run_with_slow_disk, args=(main.__name__, words))
    process.start()
    while process.is_alive() and not part.exists():
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join()
    return process.exitcode


@pytest.fixture
def fork_quickly(monkeypatch):
    """Processes that have imported torch already, and find our modules."""
    monkeypatch.setenv("PYTHONPATH", ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["train", "extras.pretrain"])


def test_train_survives_kills_at_random_moments(tiny, tmp_path, fork_quickly, request):
    crashes, dice = request.config.getoption("--crashes"), random.Random()
    flags = ["--epochs", str(2 + crashes), "--knn-every", "0.5"]    # no kill after the last step
    out, statuses = tmp_path / "run", []
    train.run(train.parse(tiny(*flags, "--out", str(tmp_path / "straight"))))
    words = tiny(*flags, *EVERY_STEP)
    for _ in range(crashes):
        resume = ["--resume"] if checkpoint.exists(out / "ckpt.pt") else []
        statuses.append(killed(train, words + resume, out, dice.uniform(0, 0.4)))
    assert statuses == [-9] * crashes
    train.run(train.parse(words + ["--resume"] * checkpoint.exists(out / "ckpt.pt")))
    assert same(final(tmp_path / "straight"), final(out))
    assert log(tmp_path / "straight") == log(out)


def test_pretraining_survives_a_kill(tmp_path, fork_quickly, monkeypatch):
    monkeypatch.setattr(data, "load", random_pictures)
    straight, out = tmp_path / "straight", tmp_path / "killed"
    pretrain.run(pretrain.parse([*PRETRAIN, "--out", str(straight)]))
    words = [*PRETRAIN, *EVERY_STEP, "--out", str(out)]
    assert killed(pretrain, words, out, 0.5) == -9
    assert final(out)["step"] < 10 and log(out) == []
    pretrain.run(pretrain.parse([*words, "--resume"]))
    assert same(final(straight), final(out)) and log(straight) == log(out)


@pytest.mark.parametrize("call, now", [(0, "old"), (1, "old"), (2, "new")])
def test_between_any_two_operations_a_whole_checkpoint_exists(tmp_path, monkeypatch, call, now):
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
    """Runs until `number` arrives during that step; -> exit status."""
    original = train.Trainer.step

    def stepping(self, images, at):
        if at == step:
            os.kill(os.getpid(), number)
        return original(self, images, at)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(train.Trainer, "step", stepping)
        train.run(train.parse(words))
    return end.value.code


def test_signals_save_and_leave(tiny, tmp_path, monkeypatch, capsys):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    train.run(train.parse(tiny("--disc", "vq", "--out", str(tmp_path / "straight"))))
    words, out = tiny("--disc", "vq", "--save-minutes", "0"), tmp_path / "run"
    assert stopped(monkeypatch, words, signal.SIGINT, 1) == 130
    assert [final(out)[k] for k in ("epoch", "at")] == [0, 2] and log(out) == []
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("stopped by SIGINT; ") and f"--resume --out {out}" in said
    torch.rand(7)                                   # the process that resumes has another past
    assert stopped(monkeypatch, [*words, "--resume"], signal.SIGTERM, 3) == 143    # an epoch's last
    assert [final(out)[k] for k in ("epoch", "at")] == [1, 0] and len(log(out)) == 1
    train.run(train.parse([*words, "--resume"]))
    assert same(final(tmp_path / "straight"), final(out))
    assert log(tmp_path / "straight") == log(out)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert not (out / "ckpt.prev.pt").exists()


def halve(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def flip(path):
    """One bit in the middle of the weights: torch.load would not notice."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tiny, tmp_path, monkeypatch, capsys):
    train.run(train.parse(tiny("--out", str(tmp_path / "straight"))))
    assert stopped(monkeypatch, tiny(), signal.SIGTERM, 5) == 143      # ckpt.prev.pt: after epoch 1
    for damage in (Path.unlink, halve, flip):
        out = tmp_path / damage.__name__
        shutil.copytree(tmp_path / "run", out)
        with open(out / "metrics.jsonl", "a") as file:
            file.write('{"epoch": 2, "step": 8}\n{"epo')   # a line too many, and a half one
        damage(out / "ckpt.pt")
        capsys.readouterr()
        assert stopped(monkeypatch, tiny("--out", str(out), "--resume"), signal.SIGTERM, 6) == 143
        assert "; going on from the checkpoint before it" in capsys.readouterr().out.splitlines()[0]
        halve(out / "ckpt.pt")                      # now the one before is the good one of then
        train.run(train.parse(tiny("--out", str(out), "--resume")))
        assert same(final(tmp_path / "straight"), final(out))
        assert log(tmp_path / "straight") == log(out)


def test_a_full_disk_keeps_the_old_checkpoint(tiny, tmp_path, monkeypatch):
    """From the second epoch on no file may be longer than 50 kB."""
    out, original = tmp_path / "run", train.Trainer.step
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def step(self, images, at):
        if at == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        return original(self, images, at)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(train.Trainer, "step", step)
            patch.setattr(sys, "argv", ["train.py", *tiny()])
            with pytest.raises(SystemExit) as error:
                train.main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.code.startswith("train.py: cannot write ") and "\n" not in error.value.code
    assert "the one before it is whole" in error.value.code
    assert final(out)["epoch"] == 1
    assert {f.name for f in out.iterdir()} == {"ckpt.pt", "metrics.jsonl", "config.json"}
    train.run(train.parse(tiny("--resume")))
    assert [r["epoch"] for r in log(out)] == [1, 2]


def test_pictures_that_changed_underneath_are_noticed(tiny, monkeypatch):
    train.run(train.parse(tiny("--epochs", "1")))
    original = data.load

    def load(*words):
        pictures = original(*words)
        pictures.images[3] = pictures.images[4]
        return pictures
    monkeypatch.setattr(data, "load", load)
    with pytest.raises(ValueError, match="the pictures have changed since the run was started"):
        train.run(train.parse(tiny("--epochs", "1", "--resume")))


def test_a_fingerprint_knows_number_labels_and_pixels():
    pictures = random_pictures()
    known = pictures.fingerprint()
    assert known == random_pictures().fingerprint() and known.startswith("6100 pictures, ")
    fewer = data.ImageSet(pictures.images[1:], pictures.labels[1:], pictures.classes)
    relabelled = data.ImageSet(pictures.images, pictures.labels.roll(1), pictures.classes)
    swapped = data.ImageSet(pictures.images.roll(3, 0), pictures.labels, pictures.classes)
    assert len({known, *(p.fingerprint() for p in (fewer, relabelled, swapped))}) == 4


def test_pretraining_does_not_overwrite_a_run(tmp_path):
    (tmp_path / "ckpt.prev.pt").touch()
    with pytest.raises(ValueError, match="holds a run already"):
        pretrain.run(pretrain.parse(["--out", str(tmp_path)]))
