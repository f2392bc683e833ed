"""extras/pretrain.py in seconds: DINO's equation 3 view by view, resuming to the bit, and a file
that is the teacher it was trained to be."""
import json

import pytest
import torch
import torch.nn.functional as F

import data
import precision
import teachers
from extras import benchmark, pretrain

TINY = """--image-size 8 --width 64 --depth 1 --prototypes 16 --hidden 32 --batch-size 20 --epochs 2
    --warmup 1 --lr 0.01 --every 4 --device cpu --precision float32""".split()
STEPS = 10                                      # 105 of 120 images are left: 5 steps in an epoch
NETWORKS = {"patch embedding": ["--stem", "--centering", "center"],
            "stem and local crops": ["--stem", "4", "8", "--locals", "2", "--local-size", "4"],
            "deep stem": ["--stem", "4", "4", "8", "8", "8", "--crop", "0.5", "1"]}


@pytest.fixture(autouse=True)
def images(monkeypatch):
    """120 of 8 x 8 pixels in three classes, of which a run holds out 15 for its k-NN."""
    some = data.ImageSet(torch.randint(256, (120, 3, 8, 8), dtype=torch.uint8),
                         torch.arange(120) % 3, list("abc"))

    def load(name, split, size, limit, seed, storage="auto"):
        assert split == "train" and size == 8           # the test split plays no part in training
        return some
    monkeypatch.setattr(data, "load", load)
    monkeypatch.setitem(benchmark.PRODUCT_SIDE, "cpu", 64)
    return some


def parse(out, *flags):
    return pretrain.parse([*TINY, "--out", str(out), *flags])


def records(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    speed = "seconds", "images_per_s", "gemm_fraction"
    return [{k: v for k, v in r.items() if k not in speed} for r in lines]


def leaves(tree, name=""):
    """{path: value} of what is in nested dictionaries and lists."""
    if not isinstance(tree, (dict, list)):
        return {name: tree}
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {path: leaf for key, part in pairs
            for path, leaf in leaves(part, f"{name}/{key}").items()}


def test_one_step_by_hand(tmp_path, images, monkeypatch):
    """Both views through both networks one by one; without BatchNorm, which would couple them."""
    args = parse(tmp_path, "--stem", "--no-batch-norm", "--centering", "center",
                 "--momentum", "0.9")
    trainer, views = pretrain.Pretrainer(args, images), torch.randn(2, 20, 3, 8, 8)
    monkeypatch.setattr(trainer, "augment", lambda *_: views)
    for p in trainer.teacher.parameters():              # else it would still be its student
        p.add_(0.05 * torch.randn_like(p))
    logits = lambda net, x: net["head"](net["backbone"](x)[:, 0])               # noqa: E731
    before = [p.clone() for p in trainer.teacher.parameters()]
    p_t = [(logits(trainer.teacher, x) / 0.02).softmax(-1) for x in views]
    p_s = [logits(trainer.student, x) / 0.1 for x in views]
    loss, targets = trainer.train_step(images.images[:20])
    assert torch.allclose(targets, torch.stack(p_t), atol=1e-5)
    expected = (F.cross_entropy(p_s[1], p_t[0]) + F.cross_entropy(p_s[0], p_t[1])) / 2
    same = (F.cross_entropy(p_s[0], p_t[0]) + F.cross_entropy(p_s[1], p_t[1])) / 2
    assert abs(loss - expected) < 1e-4 < 0.01 < abs(same - expected)
    for t, s, old in zip(trainer.teacher.parameters(), trainer.student.parameters(), before):
        assert torch.allclose(t, 0.9 * old + 0.1 * s, atol=1e-6)


@pytest.mark.parametrize("network", ["patch embedding", "stem and local crops"])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch, network):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    pretrain.run(parse(straight, *NETWORKS[network]))
    original = pretrain.Pretrainer.train_step

    def stepping(self, images):
        if self.step == 6:                      # in the second epoch, after the file of step 4
            raise KeyboardInterrupt
        return original(self, images)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain.Pretrainer, "train_step", stepping)
        pretrain.run(parse(resumed, *NETWORKS[network]))
    assert [r["step"] for r in records(resumed)] == [4]
    torch.rand(7)                                       # the process that resumes has another past
    pretrain.run(parse(resumed, *NETWORKS[network], "--resume"))

    assert [r["step"] for r in records(straight)] == [4, 8, STEPS]
    assert records(resumed) == records(straight)
    a, b = (torch.load(out / "ckpt.pt", weights_only=True) for out in (straight, resumed))
    for part in ("student", "teacher", "centering", "optimizer", "rng"):
        x, y = leaves(a[part]), leaves(b[part])
        assert x.keys() == y.keys() and len(x) > 0
        for name in x:
            same = torch.equal(x[name], y[name]) if torch.is_tensor(x[name]) else x[name] == y[name]
            assert same, part + name
    moments = [name for name in leaves(a["optimizer"]) if "exp_avg" in name]
    assert len(moments) > 20 and a["step"] == b["step"] == STEPS


def test_a_run_stops_at_its_limit_and_continues(tmp_path):
    """--stop ends the run, not its schedule; results.json is of the held-out images."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain.run(parse(whole, "--stem"))
    pretrain.run(parse(parts, "--stem", "--stop", "1.2"))
    results = json.loads((parts / "results.json").read_text())
    assert records(parts)[-1]["step"] == results["step"] == 6
    assert (results["gallery"], results["queries"]) == (105, 15)
    assert results["knn_top1"].keys() == {"10", "20", "100", "200"}
    pretrain.run(parse(parts, "--stem", "--resume"))
    assert [r["step"] for r in records(parts)] == [4, 6, 8, STEPS]
    assert records(parts)[-1] == records(whole)[-1]
    assert (parts / "results.json").read_text() == (whole / "results.json").read_text()


def test_a_resumed_run_keeps_its_precision(tmp_path, monkeypatch):
    """Begun in bfloat16; where `auto` would mean float32 it continues in bfloat16."""
    requested, autocast = [], precision.autocast
    pretrain.run(parse(tmp_path, "--stem", "--precision", "bfloat16", "--stop", "0.4"))
    monkeypatch.setattr(precision, "autocast",
                        lambda device, name: requested.append(name) or autocast(device, name))
    pretrain.run(parse(tmp_path, "--stem", "--precision", "float32", "--stop", "0.8", "--resume"))
    assert set(requested) == {"bfloat16"}
    assert json.loads((tmp_path / "config.json").read_text())["precision"] == "bfloat16"


def test_speed_in_the_log_is_a_share_of_the_machine_s(tmp_path, monkeypatch):
    """A patch embedding of 2 x 2 patches of 4 x 4 pixels, by hand; the machine does 1 GFLOP/s."""
    monkeypatch.setattr(pretrain, "product_rate", lambda *_: 1e9)
    pretrain.run(parse(tmp_path, "--stem", "--no-batch-norm"))
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    tokens, width = 5, 64
    block = 2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width
    embedding = 2 * 4 * 3 * 16 * width
    head = 2 * (width * 32 + 32 * 32 + 32 * 4 + 4 * 16)                     # bottleneck: 32 / 8
    # teacher; student forward; student backward: twice that, but nothing goes into the images, and
    # attention makes its scores again
    flops = 2 * (4 * (block + embedding + head) - embedding + 2 * tokens**2 * width)    # two views
    assert record["gflop_per_image"] == pytest.approx(flops / 1e9, abs=1e-4)
    expected = record["images_per_s"] * flops / 1e9
    assert record["gemm_fraction"] == pytest.approx(expected, abs=1e-3, rel=0.1)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_file_is_the_ema_teacher(tmp_path, network):
    args = parse(tmp_path, *NETWORKS[network])
    pretrain.run(args)
    file, state = tmp_path / "teacher.pt", torch.load(tmp_path / "ckpt.pt", weights_only=True)
    saved = torch.load(file, weights_only=True)
    assert {v.dtype for v in saved.values() if v.is_floating_point()} == {torch.float16}
    loaded, x = teachers.load_teacher(str(file)), torch.randn(50, 3, 8, 8)
    assert (loaded.width, loaded.patch, loaded.image_size) == (64, 4, 8) and not loaded.training

    trainer = pretrain.Pretrainer(args, data.load("", "train", 8, None, 0))
    trainer.load(state)
    with torch.no_grad():
        teacher, student = (net["backbone"].eval()(x)[:, 0]
                            for net in (trainer.teacher, trainer.student))
    error = (loaded(x)[:, 0] - teacher).abs().max()
    # CLS leaves a LayerNorm: of size 1
    assert error < 0.01 < 0.1 < (student - teacher).abs().max()
    assert teacher.std(0).mean() > 0.01                               # and images differ


def test_a_stem_halves_the_image_where_its_channels_change():
    stem = teachers.small_vit(8, 4, 64, 1, 1, (4, 4, 8, 8)).vit.conv_proj
    strides = [layer[0].stride[0] for layer in stem if len(list(layer.children()))]
    assert strides == [2, 1, 2, 1]
    with pytest.raises(ValueError, match="makes patches of 8 pixels, not 4"):
        teachers.small_vit(8, 4, 64, 1, 1, (4, 8, 16))


def test_images_without_labels_are_all_trained_on(tmp_path, images):
    images.labels[3] = -1
    pretrain.run(parse(tmp_path, "--stem", "--stop", "0.2"))
    record, = records(tmp_path)
    assert record["epoch"] == pytest.approx(1 / 6, abs=1e-3)    # 120 images: 6 steps in an epoch
    assert "knn_top1" not in record and not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("flags, words", [
    (["--batch-size", "106"], "^--batch-size 106 is more than the 105 images"),
    (["--resume"], "no file"), (["--precision", "float16"], "float16 is for GPUs")])
def test_what_cannot_be_is_one_clear_line(tmp_path, flags, words):
    with pytest.raises((ValueError, OSError), match=words):
        pretrain.run(parse(tmp_path, "--stem", *flags))


def test_resuming_with_another_network_is_one_clear_line(tmp_path):
    pretrain.run(parse(tmp_path, "--stem", "--stop", "0.2"))
    before = (tmp_path / "ckpt.pt").read_bytes()
    with pytest.raises(ValueError, match="other flags of the networks.*size mismatch"):
        pretrain.run(parse(tmp_path, "--stem", "--resume", "--prototypes", "8"))
    with pytest.raises(ValueError, match="holds a run already"):
        pretrain.run(parse(tmp_path, "--stem"))
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_windows_are_one_square_at_two_places_of_an_empty_canvas():
    """No two pixels are equal, so that a square can be found again."""
    images = torch.arange(3 * 144).view(1, 3, 12, 12).div(2).byte().repeat(40, 1, 1, 1)
    views = list(pretrain.windows(images, 5))
    median = images[0].flatten(1).float().median(1).values.byte()[:, None, None]
    corners = []
    for view in views:
        assert view.shape == images.shape and view.dtype == torch.uint8
        corners.append([])
        for canvas in view:                         # the square: where it is not the median
            rows, columns = (canvas != median).any(0).nonzero().T
            corners[-1].append((rows.min().item(), columns.min().item()))
            assert rows.max() - rows.min() <= 4 and columns.max() - columns.min() <= 4
    squares = [torch.stack([canvas[:, y:y + 5, x:x + 5] if max(y, x) < 8 else canvas[:, :5, :5] * 0
                            for canvas, (y, x) in zip(view, at)])
               for view, at in zip(views, corners)]
    equal = (squares[0] == squares[1]).flatten(1).all(1)
    assert equal.float().mean() > 0.7               # else a border of the square is the median's
    source = images[0].unfold(1, 5, 1).unfold(2, 5, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    found = torch.stack([(source == square).flatten(1).all(1).any() for square in squares[0]])
    assert found[equal].all() and len(set(corners[0])) > 15 and corners[0] != corners[1]
    assert not torch.equal(squares[0][0], squares[0][1])                # another one in each image


def test_a_run_can_start_from_another_teacher_at_another_image_size(tmp_path, images):
    torch.save(teachers.small_vit(16, 4, 64, 1, 1).vit.state_dict(), tmp_path / "before.pt")
    flags = ["--stem", "--init", str(tmp_path / "before.pt"), "--hue", "0.3"]
    trainer = pretrain.Pretrainer(parse(tmp_path, *flags), images)
    before = teachers.load_teacher(tmp_path / "before.pt")
    x = torch.randn(5, 3, 8, 8)                             # 2 x 2 patches, where there were 4 x 4
    for net in (trainer.student, trainer.teacher):
        assert torch.allclose(net["backbone"].eval()(x), before(x), atol=1e-5)
    assert trainer.augment.strength[3] == trainer.augment_local.strength[3] == 0.3
    with pytest.raises(ValueError, match="--init .*before.pt is a teacher of another size"):
        pretrain.Pretrainer(parse(tmp_path, *flags, "--depth", "2"), images)
