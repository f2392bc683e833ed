"""distributed.py with two processes on one CPU: the arithmetic against one process with the whole
batch, loss curves of whole runs, and what is left when one of them is killed."""
import json
import multiprocessing
import os
import signal
import socket
import sys
import time

import pytest
import torch

import checkpoint
import data
import distributed
import evaluate
import losses
import train
from extras import pretrain
from test_crash import PRETRAIN, fork_quickly, random_pictures      # noqa: F401

X, LOGITS = (torch.randn(*shape, generator=torch.Generator().manual_seed(2))
             for shape in ((12, 5, 3), (2, 6, 7)))


def in_float32(device):
    """bf16 turns another order of a sum into another symbol here and there, and curves part."""
    return torch.autocast(device.type, enabled=False)


def process(rank, port, where, function, *args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    sys.stderr = open(where / f"rank{rank}.err", "w", buffering=1)
    try:
        function(where / f"rank{rank}.pt", *args)
    except SystemExit as end:
        print(end.code, file=sys.stderr)
        raise


def pair(where, function, *args):
    """The same function in two processes that meet; -> both, started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    both = [context.Process(target=process, args=(r, port, where, function, *args)) for r in (0, 1)]
    [p.start() for p in both]
    return both


def results(where, function, *args):
    """What both wrote into their files."""
    both = pair(where, function, *args)
    [p.join() for p in both]
    assert [p.exitcode for p in both] == [0, 0], [f.read_text() for f in where.glob("*.err")]
    return [torch.load(where / f"rank{r}.pt", weights_only=True) for r in (0, 1)]


# ---- the arithmetic ------------------------------------------------------------------------------

def normalise(norm, x, weights):
    """-> normalised, gradient of its weighted mean for x, norm's state after it."""
    x = x.clone().requires_grad_()
    y = norm(x)
    (y * weights).mean().backward()
    return y.detach(), x.grad, norm.state_dict()


def compute(file):
    distributed.join("cpu")
    part = slice(6 * distributed.rank(), 6 * distributed.rank() + 6)
    norm = distributed.BatchNorm(5)
    torch.nn.init.constant_(norm.weight, 2.0)
    y, gradient, state = normalise(norm, X[part] + 100, X[part] ** 2)
    logits = LOGITS[:, 3 * distributed.rank():][:, :3].clone().requires_grad_()
    usage = losses.usage_entropy(logits.flatten(0, 1)[:, None])
    usage.backward()
    centred = losses.TeacherSoftmax(7, "centre", momentum=0.5)
    centred(logits, 1.0)
    augment, images = data.Augment(), torch.arange(4 * 3 * 64).view(4, 3, 8, 8).byte()
    torch.manual_seed(3)
    views = augment(distributed.mine(images), 3, 8, True)
    out = {"y": y, "gradient": gradient / 2, "usage": usage, "usage_gradient": logits.grad / 2,
           "sinkhorn": losses.TeacherSoftmax(7, "sinkhorn")(logits, 0.5), "centre": centred.centre,
           "views": views, "ids": distributed.gather(torch.tensor([distributed.rank(), 5])),
           "agreed": distributed.agree(distributed.rank(), 7 - distributed.rank())} | state
    torch.save({k: v.detach() if torch.is_tensor(v) else v for k, v in out.items()}, file)


def test_two_halves_give_what_the_whole_batch_does(tmp_path, fork_quickly):  # noqa: F811
    halves = results(tmp_path, compute)
    joined = lambda name, dim: torch.cat([half[name] for half in halves], dim)  # noqa: E731
    close = lambda a, b: torch.allclose(a, b, atol=1e-5)                        # noqa: E731
    norm = torch.nn.BatchNorm1d(5)
    torch.nn.init.constant_(norm.weight, 2.0)
    y, gradient, state = normalise(norm, X + 100, X ** 2)
    assert torch.allclose(joined("y", 0), y, atol=1e-3) and y.std() > 1     # of 100 + x: 3 digits
    assert torch.allclose(joined("gradient", 0), gradient, atol=1e-4) and gradient.std() > 0.01
    assert all(torch.allclose(half[k], state[k], rtol=1e-4) for half in halves for k in state)

    logits = LOGITS.clone().requires_grad_()
    usage = losses.usage_entropy(logits.flatten(0, 1)[:, None])
    usage.backward()
    assert all(close(half["usage"], usage) for half in halves)
    assert close(joined("usage_gradient", 1), logits.grad) and logits.grad.std() > 1e-3
    assert close(joined("sinkhorn", 1), losses.TeacherSoftmax(7, "sinkhorn")(LOGITS, 0.5))
    assert all(close(half["centre"], LOGITS.mean((0, 1)) / 2) for half in halves)
    torch.manual_seed(3)
    views = data.Augment()(torch.arange(4 * 3 * 64).view(4, 3, 8, 8).byte(), 3, 8)
    assert close(joined("views", 1), views)
    assert all(half["ids"].tolist() == [0, 5, 1, 5] and half["agreed"] == [1, 7] for half in halves)


# ---- runs ----------------------------------------------------------------------------------------

def learn(file, name, words):
    """A whole run in float32; keeps the loss of every step and the last state."""
    kept, main, step = {"losses": []}, sys.modules[name], train.Trainer.step

    def stepping(self, images, at):
        log = step(self, images, at)
        kept["losses"].append(log["loss"].item())
        kept["student"] = self.student.state_dict()
        return log
    train.Trainer.step, evaluate.autocast = stepping, in_float32
    data.load = random_pictures if main is pretrain else data.load
    sys.argv = ["", *words]
    main.main()
    torch.save(kept, file)


@pytest.mark.parametrize("flags", [
    "--disc softmax",
    "--disc vq --views 1 --vq-restart 0.5",         # one view: then its vectors come in one order
    # and the noise; 76 pictures leave little for later symbols to say, where rounding would grow
    "--disc gumbel --views 1 --length 2 --prototype-source ema --centering sinkhorn"],
    ids=lambda flags: flags.split()[1])
def test_two_processes_learn_what_one_does(
        tiny, tmp_path, fork_quickly, monkeypatch, flags):                      # noqa: F811
    words, seen, step = tiny(*flags.split(), "--epochs", "13"), [], train.Trainer.step

    def stepping(self, images, at):
        seen.append(step(self, images, at)["loss"].item())
        return {name: torch.tensor(seen[-1]) for name in ("loss", "teacher_entropy", "kl")}
    monkeypatch.setattr(train.Trainer, "step", stepping)
    monkeypatch.setattr(evaluate, "autocast", in_float32)
    train.run(train.parse([*words, "--out", str(tmp_path / "alone")]))
    first, second = results(tmp_path, learn, "train", words)
    assert first["losses"] == second["losses"] and len(seen) == len(first["losses"]) == 52
    assert max(abs(a / b - 1) for a, b in zip(seen, first["losses"])) < 1e-3
    assert seen[0] - seen[-1] > 0.1
    for name, value in first["student"].items():                    # the codebook, too
        assert torch.equal(value, second["student"][name]), name
    assert (tmp_path / "run" / "ckpt.pt").exists()


def test_pretraining_with_two_processes(tmp_path, fork_quickly, monkeypatch):   # noqa: F811
    words = [*PRETRAIN, "--stem", "4", "8", "--locals", "2", "--local-size", "4", "--every", "1"]
    monkeypatch.setattr(data, "load", random_pictures)
    monkeypatch.setattr(evaluate, "autocast", in_float32)
    pretrain.run(pretrain.parse([*words, "--out", str(tmp_path / "alone")]))
    results(tmp_path, learn, "extras.pretrain", [*words, "--out", str(tmp_path / "run")])
    alone, run = ([json.loads(line) for line in open(tmp_path / out / "metrics.jsonl")]
                  for out in ("alone", "run"))
    for key in ("loss", "teacher_entropy"):
        assert max(abs(a[key] - b[key]) for a, b in zip(alone, run, strict=True)) < 1e-3
    assert len(run) == 10 and len({r["loss"] for r in run}) == 10


@pytest.mark.parametrize("number, status, words", [
    (signal.SIGKILL, [1, -9], "another process has died or does not answer"),
    (signal.SIGTERM, [143, 143], "143")])
def test_what_happens_to_one_ends_both(
        tiny, tmp_path, fork_quickly, number, status, words):                   # noqa: F811
    out, flags = tmp_path / "run", ("--epochs", "1000")
    both = pair(tmp_path, learn, "train", tiny(*flags))
    while not (out / "ckpt.pt").exists() and both[0].is_alive():
        time.sleep(0.01)
    os.kill(both[1].pid, number)
    start = time.monotonic()
    [p.join(120) for p in both]
    assert time.monotonic() - start < 60 and [p.exitcode for p in both] == status
    assert words in (tmp_path / "rank0.err").read_text()
    state, args = checkpoint.load(out / "ckpt.pt"), train.parse(tiny(*flags, "--resume"))
    trainer, _, _ = train.start(args, *train.open_run(args))        # one process goes on from two
    assert 1 <= state["epoch"] == trainer.epoch < 1000
    assert trainer.train_part()["step"] == 4 * (state["epoch"] + 1)


def test_batches_that_do_not_divide(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 3)
    with pytest.raises(ValueError, match="--batch-size 64 .* multiple of 3 "):
        train.check(train.parse([]))
    train.check(train.parse(["--batch-size", "66"]))
