"""extras/benchmark.py: the plain version, a second writing of the step, gives the same loss and
gradients; FLOPs by hand; planted times and exponents. (Times themselves are the machine's.)"""
import copy
import json
import sys

import pytest
import torch

import data
import model
import train
from extras import benchmark

B, V, SIDE = 6, 2, 8


def loss_and_gradients(trainer, patches, monkeypatch, views):
    """Of one train.forward in float32: {name: gradient}, and what BatchNorm remembers after it."""
    student = trainer.student.train()
    before = copy.deepcopy(student.state_dict())
    student.zero_grad()
    torch.manual_seed(1)                                                        # Gumbel's noise
    with benchmark.under(patches), monkeypatch.context() as patch:
        patch.setattr(data, "augmentation", lambda name, size: lambda images, n, *_: views[:n])
        loss, _ = train.forward(trainer.teacher, student, trainer.head, trainer.softmax,
                                trainer.images[:B], 0.1, trainer.args)
    loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    moved = {name: x.clone() for name, x in student.state_dict().items() if "running" in name}
    student.load_state_dict(before)
    trainer.student.disc.seen = []                                              # vq's, of this call
    return loss.detach(), gradients, moved


@pytest.mark.parametrize("flags", [
    ("--disc", "softmax"), ("--disc", "softmax", "--no-straight-through", "--tau", "0.5"),
    ("--disc", "gumbel"), ("--disc", "vq", "--vq-update", "gradient", "--explore", "combined"),
    ("--no-draft", "--regression", "0", "--prototype-source", "ema"),
    ("--local-axes", "20", "--directions", "9")],
    ids=["softmax", "soft", "gumbel", "vq", "paper", "local axes"])
def test_plain_and_fast_agree_in_loss_and_gradients(tiny_trainer, monkeypatch, flags):
    trainer = tiny_trainer("--descriptor-depth", "2", "--interpreter-depth", "2", *flags)
    for name, p in trainer.student.named_parameters():                          # no bias stays 0
        p.data.add_(0.1 * torch.randn_like(p) if p.ndim == 1 else 0)
    views = torch.randn(V, B, 3, SIDE, SIDE)
    loss, fast, moved = loss_and_gradients(trainer, [], monkeypatch, views)
    patches = benchmark.plain_parts(trainer)
    plain_loss, plain, plain_moved = loss_and_gradients(trainer, patches, monkeypatch, views)
    assert abs(loss - plain_loss) < 1e-4 * abs(plain_loss)
    assert fast.keys() == plain.keys() and len(fast) > 50
    whole = torch.stack([g.norm() for g in plain.values()]).norm()
    assert whole > 1e-3
    for name in plain:                              # 1e-6: the keys' biases, whose gradient is 0
        assert (fast[name] - plain[name]).norm() <= 1e-4 * plain[name].norm() + 1e-6 * whole, name
    assert moved.keys() == plain_moved.keys()       # the statistics saw each position once
    assert all(torch.allclose(moved[k], plain_moved[k], atol=1e-5, rtol=1e-4) for k in moved)


def test_a_plain_step_calls_nothing_fast_and_leaves_no_trace(tiny_trainer, monkeypatch):
    trainer = tiny_trainer()
    attributes, optimizer = dict(vars(trainer.teacher)), trainer.optimizer
    before = copy.deepcopy(trainer.student.state_dict())
    with monkeypatch.context() as patch, benchmark.under(benchmark.plain_parts(trainer)):
        for owner in (model.Teacher, model.Descriptor, model.Interpreter):
            patch.setattr(owner, "forward", None)                               # a call: TypeError
        patch.setattr(data.Augment, "__call__", None)
        patch.setattr(model, "attend", None)
        trainer.step(trainer.images[:16], 0)
    assert vars(trainer.teacher).keys() == attributes.keys() and trainer.optimizer is optimizer
    assert "describe" not in vars(trainer.student)
    assert isinstance(data.augmentation("shapes", 8), data.Augment)
    now = trainer.student.state_dict()
    assert not torch.equal(now["descriptor.start"], before["descriptor.start"])     # it was a step


def test_plain_views_of_a_recipe_without_chance():
    """A crop of everything and a certain flip, then everything solarised: known pixel by pixel."""
    images = torch.randint(256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    recipe = data.Augment(crop=(1, 1), flip=1, jitter=0, grey=0, blur=0, solarise=1)
    views = benchmark.plain_augment(recipe, images, 2, SIDE)
    inverted = torch.where(images >= 128, 255 - images, images)
    expected = data.normalize(inverted.flip(-1))
    assert views.shape == (2, 3, 3, SIDE, SIDE)
    assert torch.allclose(views, expected.expand_as(views), atol=1e-5)


def test_flops_by_hand(tiny_trainer):
    trainer = tiny_trainer("--prototypes", "16")
    d, heads, tokens, length, vocab, student = 64, 4, 5, 8, 8, trainer.student
    views = torch.randn(B, 3, SIDE, SIDE)
    z_t = trainer.teacher(views)
    said = student.describe(z_t)
    # multiply-adds of a picture: linear layers, then what attention asks and answers
    teacher = 4 * (3 * 4 * 4) * d + tokens * 12 * d**2 + 2 * tokens**2 * d
    position = (4 + 4 + 8) * d**2                          # self-attention, look (each W once), MLP
    look = 2 * heads * (tokens - 1) * d                     # scores, the mean of the patches
    say = 2 * vocab * d + 2 * d**2 + vocab * d              # bids, embedding; gist, show; the draft
    past = sum(2 * (t + 1) * d for t in range(length))
    descriptor = d**2 + length * (position + look + say) + past
    rows = 2 + 3 + 5 + 9                                    # each prefix and its CLS, side by side
    # its one block is the last: keys and values of all rows, the rest for the 4 CLS
    interpreter = rows * 2 * d**2 + 4 * 10 * d**2 + 2 * 4 * rows * d + 4 * d**2
    projector = 4 * 16 * d
    for mac, function, inputs in (
            (teacher, trainer.teacher, (views,)), (descriptor, student.describe, (z_t,)),
            (interpreter, student.interpret, (said.embeddings, said.drafts)),
            (projector, student.projector, (said.drafts[:, :4],))):
        assert benchmark.count_flops(function, *inputs) == 2 * B * mac


def test_backward_is_counted():
    a, b = (torch.randn(3, 5, requires_grad=True), torch.randn(5, 7, requires_grad=True))
    assert benchmark.count_flops(lambda: (a @ b).sum().backward()) == 3 * 2 * 3 * 5 * 7
    assert benchmark.count_flops(lambda: (a @ b.detach()).sum().backward()) == 2 * 2 * 3 * 5 * 7


def test_the_clock_gives_each_part_its_own_time():
    class Work:
        def outer(self, x):
            return self.inner(x) + 1

        def inner(self, x):
            return 2 * x

    work, clock = Work(), benchmark.Clock("cpu")
    clock.read = iter([0, 3, 5, 10, 20, 24]).__next__
    with benchmark.under([clock.wrap(work, "outer", "out"), clock.wrap(work, "inner", "in")]):
        assert work.outer(4) == 9                                   # 0 to 10, and inside it 3 to 5
        assert work.inner(1) == 2                                   # 20 to 24
    assert clock.seconds == {"out": 8, "in": 6} and vars(work) == {}


def test_a_planted_exponent():
    assert benchmark.exponent([2, 4, 8], [3 * v**1.7 for v in (2, 4, 8)]) == pytest.approx(1.7)
    assert benchmark.exponent([1, 2, 4], [5, 5, 5]) == pytest.approx(0)


# ---- the command ---------------------------------------------------------------------------------

def call(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["benchmark", *flags])
    benchmark.main()


def test_the_command_writes_what_it_prints(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(benchmark.SIZES, "small", " ".join(tiny()))
    path = tmp_path / "new" / "figures.json"
    flags = "--steps 1 --views 4 --growth --device cpu --json".split()
    call(monkeypatch, *flags, str(path))
    r = json.loads(path.read_text())
    assert list(r) == [
        "size", "device", "images_per_s", "plain_images_per_s", "speedup", "gemm_fraction",
        "gflop_per_image", "gemm_tflops", "peak_memory_mb", "parts", "config", "growth"]
    assert list(r["parts"]) == ["augmentation", "teacher", "descriptor", "interpreter + projector",
                                "loss", "backward", "optimiser"]
    assert sum(row["share"] for row in r["parts"].values()) == pytest.approx(1)
    assert all(row["seconds"] > 0 for row in r["parts"].values())
    assert r["speedup"] == pytest.approx(r["images_per_s"] / r["plain_images_per_s"])
    achieved = r["gflop_per_image"] * r["images_per_s"] / 1e3                   # TFLOP/s
    assert r["gemm_fraction"] == pytest.approx(achieved / r["gemm_tflops"])
    assert (r["config"]["views"], r["config"]["batch_size"], r["config"]["vocab"]) == (4, 16, 8)
    assert 100 < r["peak_memory_mb"] < 1e5
    assert {k: row["values"] for k, row in r["growth"].items()} == {
        "batch_size": [8, 16, 32], "length": [4, 8, 16], "vocab": [4, 8, 16], "views": [2, 4, 8]}
    printed = capsys.readouterr().out
    assert f"{r['speedup']:.2f} times as fast" in printed
    assert f"time ~ length^{r['growth']['length']['exponent']:.2f}" in printed


@pytest.mark.parametrize("flags, words", [
    (("--steps", "0"), "--steps must be 1 or more"),
    (("--batch-size", "0"), "--batch-size must be above 0"),
    (("--views", "0"), "--views must be above 0"), (("--device", "nonsense"), "use --device cpu"),
    (("--clock", "cpu", "--device", "cuda"), "--clock cpu needs --device cpu and one thread")])
def test_flags_that_cannot_be_measured(monkeypatch, flags, words):
    with pytest.raises(SystemExit, match=words):
        call(monkeypatch, *flags)


@pytest.mark.parametrize("size", benchmark.SIZES)
def test_sizes_are_commands_that_train_accepts(size):
    args = train.parse(benchmark.SIZES[size].split())
    train.check(args)
    assert args.views == 4 and args.length == 8
    if size == "cifar10":
        assert (args.descriptor_depth, args.interpreter_depth) == (4, 4)
        assert (args.vocab, args.batch_size, args.image_size) == (256, 256, 32)
    if size == "paper":
        assert (args.image_size, args.vocab, args.random_teacher) == (224, 512, True)
