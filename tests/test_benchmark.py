"""extras/benchmark.py: the naive baseline, a second writing of the step, gives the same loss and
gradients; FLOPs by hand; planted times. (Times themselves are the machine's.)"""
import copy
import json
import sys

import pytest
import torch

import data
import flags
import model
import teachers
import tokens
import train
from extras import benchmark

B, V, SIDE = 6, 2, 8
TINY = """--batch-size 6 --views 2 --cache-views 0 --image-size 8 --vocab 8 --prototypes 16
    --hidden 32 --descriptor 2x4 --interpreter 2x4 --device cpu --precision float32""".split()


@pytest.fixture
def words(tmp_path):
    """The flags of train.py for networks of a second: one block of width 64, N = 4 patches."""
    torch.save(teachers.small_vit(SIDE, 4, 64, 1, 1).vit.state_dict(), tmp_path / "teacher.pt")
    return [*TINY, "--teacher", str(tmp_path / "teacher.pt")]


def loss_and_gradients(trainer, patches, views):
    """Of one train.training_step: the loss, {name: gradient}, BatchNorm's statistics after it."""
    student, args = trainer.student, trainer.args
    before = copy.deepcopy(student.state_dict())
    student.zero_grad()
    torch.manual_seed(1)                                                        # Gumbel's noise
    with benchmark.patched(patches):
        with torch.no_grad():
            z_t = trainer.teacher(views.flatten(0, 1))
        loss, _ = train.training_step(student, trainer.centering, student.preprocess(z_t), 0.1,
                                      args)
    loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    statistics = {name: x.clone() for name, x in student.state_dict().items() if "running" in name}
    student.load_state_dict(before)
    return loss.detach(), gradients, statistics


@pytest.mark.parametrize("extra", [
    ["--disc", "softmax"], ["--disc", "gumbel", "--no-straight-through"],
    ["--disc", "vq", "--explore", "entropy"], ["--recipe", "paper"],
    ["--recipe", "paper", "--disc", "vq"]], ids=" ".join)
def test_naive_and_fast_agree_in_loss_and_gradients(words, extra):
    trainer = benchmark.build(flags.parse([*words, *extra]))
    for p in trainer.student.parameters():          # what starts at 0 would hide errors behind it
        p.data.add_(0.1 * torch.randn_like(p) if p.ndim == 1 or not p.any() else 0)
    views = torch.randn(V, B, 3, SIDE, SIDE)
    loss, fast, statistics = loss_and_gradients(trainer, [], views)
    trainer.centering.center.zero_()                                # the first call has moved it
    naive_loss, naive, naive_statistics = loss_and_gradients(
        trainer, benchmark.naive_patches(trainer), views)
    assert abs(loss - naive_loss) < 1e-4 * abs(naive_loss)
    assert fast.keys() == naive.keys() and len(fast) > 50
    total = torch.stack([g.norm() for g in naive.values()]).norm()
    assert total > 1e-3
    for name in naive:                              # 1e-6: the keys' biases, whose gradient is 0
        assert (fast[name] - naive[name]).norm() <= 1e-4 * naive[name].norm() + 1e-6 * total, name
    assert statistics.keys() == naive_statistics.keys()     # they saw each position once
    assert all(torch.allclose(x, naive_statistics[k], atol=1e-5, rtol=1e-4)
               for k, x in statistics.items())


def test_a_naive_step_calls_nothing_fast_and_leaves_no_trace(words, monkeypatch):
    trainer = benchmark.build(flags.parse([*words, "--views", "1", "--cache-views", "1"]))
    attributes, optimizer = dict(vars(trainer.teacher)), trainer.optimizer
    before = copy.deepcopy(trainer.student.state_dict())
    with monkeypatch.context() as patch, benchmark.patched(benchmark.naive_patches(trainer)):
        for owner, name in ((teachers.Teacher, "forward"), (model.Descriptor, "step"),
                            (model.Interpreter, "forward"), (tokens.TrainingTokens, "batches")):
            patch.setattr(owner, name, None)                                # a call: TypeError
        benchmark.full_step(trainer)
    assert vars(trainer.teacher).keys() == attributes.keys()
    assert trainer.optimizer is optimizer and "batches" not in vars(trainer.tokens)
    assert "step" not in vars(trainer.student.descriptor)
    now = trainer.student.state_dict()
    assert not torch.equal(now["descriptor.start"], before["descriptor.start"])     # it was a step


def test_flops_by_hand(words):
    """Teacher and interpreter; d = 64, 4 patches of 4 x 4 pixels, prefixes of 1, 2, 4, 8."""
    trainer = benchmark.build(flags.parse([*words, "--interpreter", "1x4"]))
    d, tokens, rows = 64, 5, 2 + 3 + 5 + 9
    teacher = 4 * (3 * 4 * 4) * d + tokens * 12 * d**2 + 2 * tokens**2 * d
    # its one block is the last: keys and values of all rows, the rest for the 4 CLS
    interpreter = rows * 2 * d**2 + 4 * 10 * d**2 + 2 * 4 * rows * d + 4 * d**2
    for multiply_adds, function, inputs in (
            (teacher, trainer.teacher, torch.randn(B, 3, SIDE, SIDE)),
            (interpreter, trainer.student.interpret, torch.randn(B, 8, d))):
        assert benchmark.count_flops(function, inputs) == 2 * B * multiply_adds


def test_backward_is_counted():
    a, b = (torch.randn(3, 5, requires_grad=True), torch.randn(5, 7, requires_grad=True))
    assert benchmark.count_flops(lambda: (a @ b).sum().backward()) == 3 * 2 * 3 * 5 * 7
    assert benchmark.count_flops(lambda: (a @ b.detach()).sum().backward()) == 2 * 2 * 3 * 5 * 7


def test_each_part_has_its_own_time(monkeypatch):
    class Work:
        def outer(self, x):
            return self.inner(x) + 1

        def inner(self, x):
            return 2 * x

    times = iter([0, 3, 5, 10, 20, 24])
    monkeypatch.setattr(benchmark, "now", lambda device: next(times))
    work, watch = Work(), benchmark.Stopwatch("cpu")
    with benchmark.patched([watch.wrap(work, "outer", "out"), watch.wrap(work, "inner", "in")]):
        assert work.outer(4) == 9                                   # 0 to 10, and inside it 3 to 5
        assert work.inner(1) == 2                                   # 20 to 24
    assert watch.seconds == {"out": 8, "in": 6} and vars(work) == {}


def test_the_large_product_is_in_the_precision_of_training(monkeypatch):
    dtypes, product = [], torch.matmul
    monkeypatch.setitem(benchmark.PRODUCT_SIDE, "cpu", 16)
    monkeypatch.setattr(torch, "matmul", lambda a, b: dtypes.append(a.dtype) or product(a, b))
    assert benchmark.product_rate("cpu", "float32") > 0
    assert benchmark.product_rate("cpu", "bfloat16") > 0
    assert dtypes == 2 * [torch.float32] + 2 * [torch.bfloat16]


# ---- the command ---------------------------------------------------------------------------------

def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["benchmark", *words])
    benchmark.main()


def test_the_command_writes_what_it_prints(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(benchmark.PRODUCT_SIDE, "cpu", 64)
    call(monkeypatch, *words, "--steps", "1", "--json", str(tmp_path / "figures.json"))
    r = json.loads((tmp_path / "figures.json").read_text())
    assert list(r) == [
        "size", "device", "images_per_s", "naive_images_per_s", "speedup", "gemm_fraction",
        "gflop_per_image", "gemm_tflops", "peak_memory_mb", "parts", "hardware", "config"]
    assert list(r["parts"]) == ["augmentation", "teacher", "descriptor", "interpreter + projector",
                                "loss", "backward", "optimizer"]
    assert sum(row["share"] for row in r["parts"].values()) == pytest.approx(1)
    assert all(row["seconds"] > 0 for row in r["parts"].values())
    assert r["speedup"] == pytest.approx(r["images_per_s"] / r["naive_images_per_s"])
    achieved = r["gflop_per_image"] * r["images_per_s"] / 1e3                   # TFLOP/s
    assert r["gemm_fraction"] == pytest.approx(achieved / r["gemm_tflops"])
    assert (r["config"]["views"], r["config"]["batch_size"], r["config"]["vocab"]) == (2, 6, 8)
    assert r["config"]["precision"] == "float32" and 100 < r["peak_memory_mb"] < 1e5
    assert f"{r['speedup']:.2f} times as fast" in capsys.readouterr().out


@pytest.mark.parametrize("extra, message", [
    (("--steps", "0"), "--steps must be 1 or more"),
    (("--batch-size", "0"), "--batch-size must be above 0"),
    (("--views", "0"), "--views must be above 0"), (("--device", "nonsense"), "use --device cpu"),
    (("--json", "no/such/x.json"), "does not exist"),
    (("--precision", "float16"), "float16 is for GPUs")])
def test_flags_that_cannot_be_measured(words, monkeypatch, extra, message):
    with pytest.raises(SystemExit, match=message):
        call(monkeypatch, *words, *extra)


@pytest.mark.parametrize("size", flags.SIZES)
def test_sizes_are_those_of_train(size):
    _, args = benchmark.parse(["--size", size, "--device", "cpu"])
    flags.check(args)
    assert args.size == size and args.length == 8
    if size == "paper":
        assert (args.image_size, args.vocab, args.batch_size) == (224, 512, 8)
        assert args.teacher == "random:dino_vitb16"
