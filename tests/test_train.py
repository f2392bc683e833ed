"""train.py in seconds: resuming to the bit, what a run leaves behind, and what it says when it cannot go on."""
import json
import math
import sys

import pytest
import torch

import data
import evaluate
import model
import train

STEPS = 4                                           # an epoch of `tiny`: 76 training pictures, 16 to a step
KEYS = {"epoch", "step", "seconds", "images_per_s", "lr", "loss", "teacher_entropy", "teacher_entropy_max", "kl",
        "symbol_entropy", "information", "perplexity", "usage", "distinct", "aux", "tau"}


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
    ("--prototype-source", "ema", "--centering", "centre", "--teacher-temp-start", "0.04", "--weight-decay-end", "0.4")],
    ids=["softmax", "gumbel", "vq", "ema"])
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
        timing = ("seconds", "images_per_s")
        assert {k: v for k, v in a.items() if k not in timing} == {k: v for k, v in b.items() if k not in timing}
    a, b = (torch.load(out / "ckpt.pt", weights_only=True) for out in (straight, resumed))
    for part in ("student", "head", "softmax"):
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part]), part
    assert torch.equal(a["rng"]["cpu"], b["rng"]["cpu"])


def test_a_kill_between_log_and_checkpoint_leaves_one_line_per_epoch(tiny, tmp_path, monkeypatch):
    original, written = train.write, []

    def writing(path, write_to):
        written.append(path.name)
        if written.count("ckpt.pt") == 2:
            raise KeyboardInterrupt
        original(path, write_to)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "write", writing)
        train.run(train.parse(tiny()))
    train.run(train.parse(tiny("--resume")))
    assert [r["epoch"] for r in records(tmp_path / "run")] == [1, 2]


def test_what_a_run_leaves(tiny, tmp_path):
    args = train.parse(tiny("--knn-every", "2", "--tau", "0.3"))
    train.run(args)
    out = tmp_path / "run"
    assert set(files(out)) == {"config.json", "metrics.jsonl", "ckpt.pt", "figure1.png", "curves.png"}
    first, second = records(out)
    assert KEYS <= first.keys() and KEYS | {"knn_top1", "knn_prefix"} <= second.keys()
    assert "knn_top1" not in first and len(second["knn_prefix"]) == 4 and second["knn_prefix"][-1] == second["knn_top1"]
    assert (first["epoch"], first["step"], second["epoch"], second["step"]) == (1, STEPS, 2, 2 * STEPS)
    for r in (first, second):
        assert len(r["perplexity"]) == 8 and all(1 <= p <= 8 for p in r["perplexity"]) and r["tau"] == 0.3
        assert 0 < r["usage"] <= 1 and 0 < r["distinct"] <= 1 and r["kl"] > 0 and r["images_per_s"] > 0
        assert r["teacher_entropy_max"] == math.log(16) > r["teacher_entropy"] > 0
        assert 0 <= r["information"] <= math.log(8) + 1e-5 and 0 <= r["symbol_entropy"] <= math.log(8) + 1e-5
    config = json.loads((out / "config.json").read_text())
    flags = {k: v for k, v in vars(args).items() if k not in ("resume", "overwrite")}
    assert config == flags | {"out": str(out)} and config["vocab"] == 8 and config["tau"] == 0.3


def test_one_step_moves_the_student_and_nothing_else(tiny_trainer):
    trainer = tiny_trainer("--prototype-source", "ema", "--ema", "0.9", "--epochs", "1")
    before = {name: {k: v.clone() for k, v in getattr(trainer, name).state_dict().items()} for name in ("teacher", "student", "head")}
    trainer.step(trainer.images[:16], 0)
    now = {k: v for k, v in trainer.student.named_parameters()}
    still = [k for k in now if torch.equal(now[k], before["student"][k]) and "to_kv.bias" not in k]
    assert not still
    assert all(torch.equal(v, before["teacher"][k]) for k, v in trainer.teacher.state_dict().items())
    for k, v in trainer.head.named_parameters():
        assert torch.allclose(v, 0.9 * before["head"][k] + 0.1 * now[f"projector.{k}"], atol=1e-6)
    trainer = tiny_trainer()                        # k-means prototypes do not move
    centres = trainer.head.centres.clone()
    trainer.step(trainer.images[:16], 0)
    assert torch.equal(trainer.head.centres, centres)


def test_prototypes_rest_in_the_first_epoch_of_ema_runs(tiny_trainer):
    trainer = tiny_trainer("--prototype-source", "ema")
    before = trainer.student.projector.prototypes.clone()
    trainer.train_epoch()
    assert torch.equal(trainer.student.projector.prototypes, before)
    trainer.train_epoch()
    assert not torch.equal(trainer.student.projector.prototypes, before)


def test_the_test_part_plays_no_part_in_training(tiny, monkeypatch):
    load, seen = data.load, []
    for module in (data, evaluate):
        monkeypatch.setattr(module, "load", lambda name, split, *rest: seen.append(split) or load(name, split, *rest))
    train.run(train.parse(tiny("--epochs", "1", "--knn-every", "1")))
    assert seen == ["train"]
    train.run(train.parse(tiny("--epochs", "1", "--overwrite", "--evaluate")))
    assert seen == ["train", "train", "train", "test"]              # the evaluation comes last


def test_held_out_pictures_are_not_trained_on():
    images = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1).expand(-1, 3, 2, 2)
    kept, held = train.split_held_out(data.ImageSet(images, torch.arange(100), []), seed=3)
    assert len(held) == 5 and sorted(kept.labels.tolist() + held.labels.tolist()) == list(range(100))
    assert torch.equal(held.images[:, 0, 0, 0].long(), held.labels) and torch.equal(kept.images[:, 0, 0, 0].long(), kept.labels)


# ---- presets -------------------------------------------------------------------------------------

@pytest.mark.parametrize("preset", train.PRESETS)
def test_presets_are_flags_and_flags_win(preset):
    args = train.parse(["--preset", preset])
    assert all(getattr(args, name) == value for name, value in train.PRESETS[preset].items())
    assert train.PRESETS[preset].keys() <= vars(train.parse([])).keys()
    assert train.parse(["--vocab", "77", "--preset", preset, "--lr", "7"]).vocab == 77
    train.check(args)


def test_paper_preset_has_the_paper_s_sizes():
    args = train.parse(["--preset", "paper", "--random-teacher"])
    with torch.device("meta"):                      # shapes without memory
        teacher = model.build_teacher(args.teacher, args.random_teacher)
        student, head = model.build_student(vars(args), teacher.width)
        said = student.describe(teacher(torch.empty(2, 3, args.image_size, args.image_size)), attention=True)
        assert said.weights.shape == (2, 8, 512) and said.attention.shape == (2, 8, 196)
        assert student.projector(student.interpret(said.embeddings)).shape == (2, 4, 8192)
        assert len(student.descriptor.blocks) == 6 and student.descriptor.blocks[0].cross.heads == 8
        assert len(student.interpreter.blocks) == 12 and student.interpreter.blocks[0].attention.heads == 6
    assert isinstance(head, model.DINOHead) and not any(p.requires_grad for p in head.parameters())
    assert (args.batch_size, args.views, args.epochs, args.clip, args.weight_decay, args.weight_decay_end) == (64, 4, 140, 2, 0.04, 0.4)
    assert (args.student_temp, args.teacher_temp_start, args.teacher_temp, args.ema) == (0.1, 0.04, 0.07, 0.996)


# ---- what goes wrong -----------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    ("--tau 0", "--tau must be above 0"), ("--vocab 1", "--vocab must be 2 or more"), ("--length 3", "power of two"),
    ("--data dogs", "unknown data set 'dogs'"), ("--data folder:/no/such", "no folder /no/such"),
    ("--teacher nobody", "no teacher 'nobody'"), ("--random-teacher --teacher shapes", "--random-teacher needs"),
    ("--image-size 10", "--image-size 10"), ("--image-size 0", "--image-size"), ("--batch-size 77", "--batch-size 77"),
    ("--train-images 20", "too few"), ("--train-images 0", "--train-images"), ("--train-images -5", "--train-images"),
    ("--test-images 0", "--test-images"), ("--prototypes 77", "--prototypes 77"), ("--views 0", "--views"),
    ("--epochs 0", "--epochs"), ("--lr 0", "--lr must"), ("--lam -1", "--lam must"), ("--student-temp 0", "--student-temp"),
    ("--descriptor-heads 5", "--descriptor-heads"), ("--descriptor-heads 0", "--descriptor-heads"),
    ("--interpreter-heads 0", "--interpreter-heads"), ("--descriptor-depth 0", "--descriptor-depth"),
    ("--hidden 0", "--hidden"), ("--bottleneck 0", "--bottleneck"), ("--device tpu9", "--device"),
    ("--resume", "no file")])
def test_bad_input_is_one_line(tiny, tmp_path, monkeypatch, flags, words):
    assert words in refusal(monkeypatch, tiny(*flags.split()))
    assert not (tmp_path / "run" / "ckpt.pt").exists()


def test_a_run_is_not_overwritten_by_accident(tiny, tmp_path, monkeypatch):
    train.run(train.parse(tiny("--epochs", "1")))
    before = files(tmp_path / "run")
    assert "--overwrite" in refusal(monkeypatch, tiny("--epochs", "1"))
    message = refusal(monkeypatch, tiny("--epochs", "1", "--resume", "--lr", "0.5", "--disc", "vq"))
    assert "--lr was 0.001, is 0.5" in message and "--disc was softmax, is vq" in message and "--vocab" not in message
    assert files(tmp_path / "run") == before
    (tmp_path / "run" / "ckpt.pt").write_bytes(before["ckpt.pt"][:1000])
    assert "damaged" in refusal(monkeypatch, tiny("--epochs", "1", "--resume"))


def test_a_new_run_does_not_inherit_the_old_checkpoint(tiny, tmp_path, monkeypatch):
    train.run(train.parse(tiny("--epochs", "1")))
    with pytest.raises(KeyboardInterrupt):          # stopped before its first checkpoint
        monkeypatch.setattr(train.Trainer, "train_epoch", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        train.run(train.parse(tiny("--epochs", "1", "--overwrite")))
    assert set(files(tmp_path / "run")) & {"ckpt.pt", "metrics.jsonl"} == set()


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


@pytest.mark.parametrize("changes, words", [
    ({}, []), ({"teacher_entropy": 0.001}, ["all prototypes but one are dead"]),
    ({"teacher_entropy": math.log(1000) - 0.001}, ["its targets say nothing"]),
    ({"perplexity": [1.0, 1.2, 1.4]}, ["one symbol is said for every picture"]),
    ({"perplexity": [1.0, 1.0, 9.0]}, []),
    ({"perplexity": [1.0], "teacher_entropy": 0.0}, ["all prototypes but one are dead", "one symbol"])])
def test_alarms(changes, words):
    healthy = {"teacher_entropy": 3.0, "teacher_entropy_max": math.log(1000), "perplexity": [50.0, 60.0]}
    said = list(train.alarms(healthy | changes))
    assert len(said) == len(words) and all(w in s for w, s in zip(words, said))


def test_an_alarm_is_printed_in_the_run(tiny, capsys):
    train.run(train.parse(tiny("--epochs", "1", "--teacher-temp", "1000")))
    assert "WARNING: collapse? the teacher's entropy is ln P" in capsys.readouterr().out
