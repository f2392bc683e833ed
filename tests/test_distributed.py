"""distributed.py with two processes on one CPU: the arithmetic against one process with the whole
batch, loss curves of whole runs, and what is left when one of them is killed."""
import json
import os
import signal
import socket
import sys
import time

import pytest
import torch

import checkpoint
import data
import discretize
import distributed
import flags
import losses
import train
from extras import benchmark, pretrain
from test_crash import PRETRAIN, random_images

X, LOGITS = (torch.randn(*shape, generator=torch.Generator().manual_seed(2))
             for shape in ((12, 5, 3), (2, 6, 7)))


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


def pair(context, where, function, *args):
    """The same function in two processes that meet; -> both, started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [context.Process(target=process, args=(r, port, where, function, *args)) for r in (0, 1)]
    [p.start() for p in both]
    return both


def results(context, where, function, *args):
    """What both wrote into their files."""
    both = pair(context, where, function, *args)
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


def noisy_symbols(x):
    """Gumbel's symbols for x (n, 3), 3 views one after the other, from one seed."""
    torch.manual_seed(4)
    disc = discretize.build(flags.parse(["--disc", "gumbel", "--vocab", "9", "--views", "3"]), 3)
    return disc(x).ids


def compute(file):
    distributed.init("cpu")
    part = slice(6 * distributed.rank(), 6 * distributed.rank() + 6)
    norm = distributed.BatchNorm(5)
    torch.nn.init.constant_(norm.weight, 2.0)
    y, gradient, state = normalise(norm, X[part] + 100, X[part] ** 2)
    logits = LOGITS[:, 3 * distributed.rank():][:, :3].clone()
    centering = losses.Centering(7, "center", momentum=0.5)
    centering(logits, 1.0)
    layer = torch.nn.Linear(3, 1)
    (layer(X[part]).mean() * (1 + distributed.rank())).backward()
    distributed.average_gradients(layer)
    augment, images = data.Augment(), torch.arange(4 * 3 * 64).view(4, 3, 8, 8).byte()
    ids = noisy_symbols(distributed.shard(X[:, 0], 3)).view(3, -1)
    torch.manual_seed(3)
    views = augment(distributed.shard(images), 3, 8, True)
    out = {"y": y, "gradient": gradient / 2, "layer": layer.weight.grad, "symbols": ids,
           "sinkhorn": losses.Centering(7, "sinkhorn")(logits, 0.5), "center": centering.center,
           "views": views, "ids": distributed.all_gather(torch.tensor([distributed.rank(), 5])),
           "mean": distributed.all_reduce_mean(torch.tensor([3.0 * distributed.rank()])),
           "max": distributed.all_reduce_max(distributed.rank(), 7 - distributed.rank())} | state
    torch.save({k: v.detach() if torch.is_tensor(v) else v for k, v in out.items()}, file)


def test_two_halves_give_what_the_whole_batch_does(tmp_path, forkserver):
    halves = results(forkserver, tmp_path, compute)
    joined = lambda name, dim: torch.cat([half[name] for half in halves], dim)  # noqa: E731
    close = lambda a, b: torch.allclose(a, b, atol=1e-5)                        # noqa: E731
    norm = torch.nn.BatchNorm1d(5)
    torch.nn.init.constant_(norm.weight, 2.0)
    y, gradient, state = normalise(norm, X + 100, X ** 2)
    assert torch.allclose(joined("y", 0), y, atol=1e-3) and y.std() > 1     # of 100 + x: 3 digits
    assert torch.allclose(joined("gradient", 0), gradient, atol=1e-4) and gradient.std() > 0.01
    assert all(torch.allclose(half[k], state[k], rtol=1e-4) for half in halves for k in state)

    assert close(joined("sinkhorn", 1), losses.Centering(7, "sinkhorn")(LOGITS, 0.5))
    assert all(close(half["center"], LOGITS.mean((0, 1)) / 2) for half in halves)
    expected = (X[:6].mean((0, 1)) + 2 * X[6:].mean((0, 1))) / 2        # d mean(w x + b) / d w
    assert all(close(half["layer"], expected[None]) for half in halves)
    assert torch.equal(joined("symbols", 1), noisy_symbols(X[:, 0]).view(3, -1))
    torch.manual_seed(3)
    views = data.Augment()(torch.arange(4 * 3 * 64).view(4, 3, 8, 8).byte(), 3, 8)
    assert close(joined("views", 1), views)
    for half in halves:
        assert half["ids"].tolist() == [0, 5, 1, 5] and half["max"] == [1, 7]
        assert half["mean"].item() == 1.5


def test_alone_everything_is_as_it_was_given():
    x = torch.randn(4, 3)
    for function in (distributed.all_gather, distributed.all_reduce_mean, distributed.shard):
        assert torch.equal(function(x), x)
    assert distributed.all_reduce_max(3, False) == (3, False)
    assert (distributed.world_size(), distributed.rank(), distributed.init("cpu")) == (1, 0, "cpu")


def test_a_shard_of_views_is_the_same_images_of_each(monkeypatch):
    """(V, B) flattened, 2 views of 4 images: rank 1 of 2 has the images 2 and 3 in both."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    rows = torch.arange(8)
    assert distributed.shard(rows, 2).tolist() == [2, 3, 6, 7]
    assert distributed.shard(rows).tolist() == [4, 5, 6, 7]


def test_batches_that_do_not_divide(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(ValueError, match="--batch-size 64 .* multiple of 3"):
        flags.check(flags.parse(["--device", "cpu"]))
    flags.check(flags.parse(["--device", "cpu", "--batch-size", "66"]))


# ---- runs ----------------------------------------------------------------------------------------

def learn(file, name, words):
    """A whole run; keeps the loss of every step and the last state."""
    kept, main, step = {"losses": []}, sys.modules[name], train.Trainer.step

    def stepping(self, z_t, at):
        log = step(self, z_t, at)
        kept["losses"].append(log["loss"].item())
        kept["student"] = self.student.state_dict()
        return log
    train.Trainer.step, train.finish = stepping, lambda *args, **kwargs: None
    data.load = random_images if main is pretrain else data.load
    benchmark.PRODUCT_SIDE["cpu"] = 64
    sys.argv = ["", *words]
    main.main()
    torch.save(kept, file)


@pytest.mark.parametrize("words", [
    "--recipe paper --disc gumbel --centering sinkhorn --views 2 --epochs 2 --data folder:{} "
    "--storage stream --train-images 170",
    "--recipe paper --disc vq", "--recipe stable --views 2 --cache-views 3"])
def test_two_processes_learn_what_one_does(tiny, tmp_path, forkserver, monkeypatch, unscored,
                                           image_folder, words):
    """Slowly: symbols are chosen by comparison, and another order of a sum may change one."""
    words = tiny("--epochs", "5", "--lr", "2e-4", *words.format(image_folder(170)).split())
    alone, step = [], train.Trainer.step

    def stepping(self, z_t, at):
        log = step(self, z_t, at)
        alone.append(log["loss"].item())
        return log
    monkeypatch.setattr(train.Trainer, "step", stepping)
    train.run(flags.parse([*words, "--out", str(tmp_path / "alone")]))
    first, second = results(forkserver, tmp_path, learn, "train", words)
    both = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"])]     # each of its shard
    assert len(alone) == len(both) == 20
    assert max(abs(a / b - 1) for a, b in zip(alone, both)) < 1e-3
    for name, value in first["student"].items():                    # the codebook, too
        assert torch.equal(value, second["student"][name]), name
    a, b = (torch.load(tmp_path / out / "ckpt.pt", weights_only=True)["student"]
            for out in ("alone", "run"))
    moved = [k for k in a if not torch.allclose(a[k], b[k], atol=0.02)]
    assert moved == [] and (tmp_path / "run" / "metrics.jsonl").exists()


def test_pretraining_with_two_processes(tmp_path, forkserver, monkeypatch):
    words = [*PRETRAIN, "--stem", "4", "8", "--locals", "2", "--local-size", "4", "--every", "1"]
    monkeypatch.setattr(data, "load", random_images)
    monkeypatch.setitem(benchmark.PRODUCT_SIDE, "cpu", 64)
    pretrain.run(pretrain.parse([*words, "--out", str(tmp_path / "alone")]))
    both = [*words, "--out", str(tmp_path / "run")]
    results(forkserver, tmp_path, learn, "extras.pretrain", both)
    alone, run = ([json.loads(line) for line in open(tmp_path / out / "metrics.jsonl")]
                  for out in ("alone", "run"))
    for key in ("loss", "teacher_entropy"):
        assert max(abs(a[key] - b[key]) for a, b in zip(alone, run, strict=True)) < 1e-3
    assert len(run) == 10 and len({r["loss"] for r in run}) == 10


@pytest.mark.parametrize("number, status, words", [
    (signal.SIGKILL, [1, -9], "another process has died or does not answer"),
    (signal.SIGTERM, [143, 143], "143")])
def test_what_happens_to_one_ends_both(tiny, tmp_path, forkserver, number, status, words):
    out, more = tmp_path / "run", ("--epochs", "1000", "--recipe", "paper", "--views", "1")
    both = pair(forkserver, tmp_path, learn, "train", tiny(*more))
    while not (out / "ckpt.pt").exists() and both[0].is_alive():
        time.sleep(0.01)
    os.kill(both[1].pid, number)
    start = time.monotonic()
    [p.join(120) for p in both]
    assert time.monotonic() - start < 60 and [p.exitcode for p in both] == status
    assert words in (tmp_path / "rank0.err").read_text()
    args = flags.parse(tiny(*more, "--resume"))
    flags.check(args)
    state = checkpoint.open_run(args)
    trainer, manager, _ = train.setup(args, state)                  # one process resumes from two
    assert 1 <= state["epoch"] == trainer.epoch < 1000
    assert next(trainer.train(manager))["step"] == 4 * (state["epoch"] + 1)
