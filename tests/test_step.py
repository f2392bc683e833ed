"""Known answers for the parts of train.py: one step against views taken one by one, the schedules,
who is moved by a step and who is not, presets, alarms. (Whole runs: test_train.py.)"""
import math

import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import losses
import model
import train


# ---- one step ------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("pairing", ["same", "cross"])
def test_the_loss_equals_views_taken_one_by_one(tiny_trainer, monkeypatch, pairing):
    trainer = tiny_trainer("--disc", "vq", "--views", "3", "--lam", "0.5", "--explore", "combined",
                           "--pairing", pairing, "--student-temp", "0.1", "--neighbours", "0")
    args, student, images = trainer.args, trainer.student, trainer.images[:5]
    for norm in student.descriptor.norms.eval():               # in training they would couple views
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    views = torch.randn(3, 5, 3, 8, 8)
    views[0] = data.normalize(images)                               # --plain: the picture as it is
    monkeypatch.setattr(data, "augmentation", lambda name, size: lambda images, n, *_: views[-n:])
    total, log = train.forward(trainer.teacher, student, trainer.head, trainer.softmax,
                               images, 0.07, args)

    y, p_t, said, z_s, p_s = [], [], [], [], []
    for view in views:
        tokens = trainer.teacher(view)                                  # (B, N + 1, d)
        y.append((tokens[:, 0] - student.mean[0]) @ student.whiten)
        products = torch.einsum("bd,pd->bp", y[-1], trainer.head.centres) / trainer.head.scale
        p_t.append((products / 0.07).softmax(-1))
        said.append(student.describe(tokens))
        z_s.append(student.interpret(said[-1].embeddings, said[-1].drafts))
        p_s.append(student.projector(z_s[-1]) / 0.1)                    # (B, 4, P)
    target = [p_t[i] if pairing == "same" else (sum(p_t) - p_t[i]) / 2 for i in range(3)]
    loss = sum(0.5 ** (j + 1) * F.cross_entropy(p_s[i][:, j], target[i]) / 3
               for i in range(3) for j in range(4)) / (0.5 + 0.25 + 0.125 + 0.0625)
    aux = sum(s.aux for s in said) / 3
    weights, logits = (torch.cat(parts) for parts in zip(*((s.weights, s.logits) for s in said)))
    explore = losses.exploration_loss(weights, logits, "combined",
                                      args.alpha, args.beta, args.balance)
    assert aux > 0.01 and explore < -0.01
    close = lambda a, b: abs(a - b) < 1e-4                              # noqa: E731
    assert close(log["dino_loss"], loss) and close(log["aux"], aux)
    error = sum((z[:, j] - v).square().mean() / 12 for z, v in zip(z_s, y) for j in range(4))
    error += sum((s.gists[:, t] - v).square().mean() / 6 for s, v in zip(said, y) for t in range(8))
    assert close(total, loss + aux + args.regression * error + explore) and log["loss"] == total
    full = sum((z[:, 3] - v).square().mean() / 3 for z, v in zip(z_s, y))
    assert close(log["unexplained"], full)
    joint = p_s[0].softmax(-1).mean(1)                                  # over the prefixes
    kl = F.kl_div(joint.log(), target[0], reduction="batchmean")        # of the first view alone
    entropy = torch.distributions.Categorical(torch.cat(p_t)).entropy().mean()
    assert close(log["kl"], kl) and close(log["teacher_entropy"], entropy)


def test_one_step_moves_the_student_and_nothing_else(tiny_trainer):
    trainer = tiny_trainer("--prototype-source", "ema", "--ema", "0.9", "--epochs", "1")
    trainer.student.interpreter.out.weight.data.normal_()   # from 0, nothing behind it would move
    before = {name: {k: v.clone() for k, v in getattr(trainer, name).state_dict().items()}
              for name in ("teacher", "student", "head")}
    trainer.step(trainer.images[:16], 0)
    now = dict(trainer.student.named_parameters())
    assert [k for k in now if torch.equal(now[k], before["student"][k])] == []
    for k, v in trainer.student.descriptor.norms.named_buffers(prefix="descriptor.norms"):
        assert not torch.equal(v, before["student"][k])                 # what evaluation will use
    for k, v in trainer.teacher.state_dict().items():
        assert torch.equal(v, before["teacher"][k])
    for k, v in trainer.head.named_parameters():
        assert torch.allclose(v, 0.9 * before["head"][k] + 0.1 * now[f"projector.{k}"], atol=1e-6)


def test_k_means_prototypes_stay_and_vq_codes_move(tiny_trainer):
    trainer = tiny_trainer("--disc", "vq")
    centres, codes = trainer.head.centres.clone(), trainer.student.disc.codebook.clone()
    trainer.step(trainer.images[:16], 0)
    assert torch.equal(trainer.head.centres, centres)
    assert not torch.equal(trainer.student.disc.codebook, codes) and trainer.student.disc.ready


def test_teacher_and_student_share_the_k_means_prototypes(tiny_trainer):
    trainer = tiny_trainer("--prototypes", "16", "--bottleneck", "24")
    for head in (trainer.head, trainer.student.projector):
        assert len(head.centres.unique(dim=0)) == 16 and list(head.parameters()) == []
    assert torch.equal(trainer.head.centres, trainer.student.projector.centres)
    ema = tiny_trainer("--prototypes", "16", "--bottleneck", "24", "--prototype-source", "ema")
    assert ema.student.projector.prototypes.shape == ema.head.prototypes.shape == (16, 24)


def test_gradients_are_clipped(tiny_trainer):
    norms = []
    for clip in (1e9, 1e-3):
        trainer = tiny_trainer("--clip", str(clip))
        trainer.step(trainer.images[:16], 0)
        norms.append(torch.cat([p.grad.flatten() for p in trainer.student.parameters()]).norm())
    assert norms[0] > 0.1 and abs(norms[1] - 1e-3) < 1e-5


def test_accumulated_gradients_are_the_batch_s(tiny_trainer, monkeypatch):
    """With a loss that knows no neighbours: mean pixel times a weight."""
    trainer, seen = tiny_trainer("--accumulate", "4", "--clip", "1e9"), []

    def forward(teacher, student, head, softmax, images, temperature, args):
        seen.append(images)
        loss = (student.descriptor.start * images.float().mean()).sum()
        return loss, {"loss": loss.detach(), "mean": images.float().mean()}
    monkeypatch.setattr(train, "forward", forward)
    log = trainer.step(trainer.images[:16], 0)
    whole = trainer.images[:16].float().mean()
    assert [len(part) for part in seen] == [4] * 4
    assert torch.equal(torch.cat(seen), trainer.images[:16])
    assert torch.allclose(trainer.student.descriptor.start.grad, whole.expand(1, 1, 64))
    assert torch.allclose(log["mean"], whole) and log.keys() == {"loss", "mean"}


@torch.no_grad()
def test_k_means_sees_pictures_in_the_space_and_mirror_images(tiny_trainer, monkeypatch):
    seen = []
    monkeypatch.setattr(model.Anchors, "fit", lambda self, y: seen.append(y))
    for flags, side in ((("--no-mirror",), 0), (("--mirror",), 3), (("--unit-length",), 0)):
        trainer = tiny_trainer(*flags)
        images = trainer.images.flip(side) if side else trainer.images[:0]
        with evaluate.autocast(torch.device("cpu")):
            tokens = trainer.teacher(data.normalize(torch.cat([trainer.images, images])))
        y = trainer.student.space(tokens)[:, 0]
        assert len(seen[-1]) == len(y)
        gap = torch.cdist(seen[-1], y)                          # in any order; bf16 rounds
        assert max(gap.min(0).values.max(), gap.min(1).values.max()) < 0.1 * gap.mean()


def test_cached_views_are_the_teacher_s_and_spare_it(tiny_trainer, monkeypatch):
    """View c of a picture is, here, the picture turned upside down and dimmed c times."""
    def views(images, count, size, part=False):
        x = images.flip(-2).float() / 255
        return torch.stack([x / 2 ** c for c in range(count)])
    monkeypatch.setattr(data, "augmentation", lambda name, size: views)
    before = tiny_trainer()
    random = torch.get_rng_state()
    cache = train.cache_views(before.teacher, before.images, train.argparse.Namespace(
        **vars(before.args) | {"cache_views": 3}))
    assert torch.equal(torch.get_rng_state(), random) and cache.shape == (32, 3, 5, 64)
    expected = before.teacher(before.images[7:8].flip(-2).float() / 255 / 4)[0]
    far = lambda tokens: (tokens.float() - expected).abs().max()        # noqa: E731
    assert far(cache[7, 2]) < 0.05 < 0.2 < far(cache[7, 1])

    trainer = tiny_trainer("--cache-views", "3", "--views", "2")

    def asked(*_):
        raise AssertionError("the teacher was run")
    monkeypatch.setattr(trainer.teacher, "forward", asked)
    batch = torch.tensor([5, 0, 31])
    tokens = trainer.fetch(batch)                                       # (3, 2, 5, 64)
    for row, picture in zip(tokens, batch):
        of_it = trainer.cache[picture]                                  # (3, 5, 64)
        found = [(of_it == view).flatten(1).all(1).nonzero().item() for view in row]
        assert len(set(found)) == 2
    second_view_of_0 = train.see(None, tokens, trainer.args)[3 + 1]     # (V*B, N+1, d)
    assert torch.equal(second_view_of_0, tokens[1, 1].float())
    assert trainer.step(trainer.fetch(torch.arange(16)), 0)["loss"].isfinite()


def test_schedules_by_hand(tiny_trainer):
    trainer = tiny_trainer("--epochs", "2", "--lr", "1", "--lr-end", "0", "--warmup-epochs", "1",
                           "--weight-decay-end", "0.4", "--tau-start", "1", "--tau", "0.25",
                           "--teacher-temp-start", "0.03", "--teacher-temp", "0.07")
    seen = []
    for step in range(4):                                               # 2 epochs of 2 steps
        temperature = trainer.schedule(step)
        matrices, vectors = trainer.optimizer.param_groups
        assert vectors["weight_decay"] == 0 and vectors["lr"] == matrices["lr"]
        seen.append((matrices["lr"], matrices["weight_decay"],
                     trainer.student.disc.tau, temperature))
    lr, decay, tau, temperature = zip(*seen)
    assert lr == pytest.approx([0.5, 1, 1, 0.5])                 # 2 steps of warm-up, then a cosine
    assert decay == pytest.approx([0.04, 0.22 - 0.18 * 0.5**0.5, 0.22, 0.22 + 0.18 * 0.5**0.5])
    assert tau == pytest.approx([1, 0.5**0.5, 0.5, 0.5**1.5])
    assert temperature == pytest.approx([0.03, 0.04, 0.05, 0.06])


@pytest.mark.parametrize("disc, end", [("softmax", 0.12), ("gumbel", 1)])
def test_without_a_temperature_annealing_ends_at_the_discretizer_s(tiny_trainer, disc, end):
    trainer = tiny_trainer("--disc", disc, "--tau-start", "2")          # 2 epochs of 2 steps
    seen = []
    for step in (0, 2, 4):
        trainer.schedule(step)
        seen.append(trainer.student.disc.tau)
    assert seen == pytest.approx([2, (2 * end) ** 0.5, end])            # half-way: geometric mean


def test_prototypes_rest_in_the_first_epoch_of_ema_runs(tiny_trainer):
    trainer = tiny_trainer("--prototype-source", "ema")
    before = trainer.student.projector.prototypes.clone()
    trainer.train_part()
    assert torch.equal(trainer.student.projector.prototypes, before)
    trainer.train_part()
    assert not torch.equal(trainer.student.projector.prototypes, before)


def test_held_out_pictures_are_not_trained_on():
    images = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1).expand(-1, 3, 2, 2)
    kept, held = train.split_held_out(data.ImageSet(images, torch.arange(100), []), seed=3)
    assert len(held) == 5
    assert sorted(kept.labels.tolist() + held.labels.tolist()) == list(range(100))
    for part in (kept, held):
        assert torch.equal(part.images[:, 0, 0, 0].long(), part.labels)


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
        pictures = torch.empty(2, 3, args.image_size, args.image_size)
        assert teacher(pictures).shape == (2, 1 + 196, 768)
        assert student.lengths == [1, 2, 4, 8] and student.disc.table.shape == (512, 768)
        assert student.projector.mlp[0].weight.shape == (2048, 768)
        assert student.projector.prototypes.shape == (8192, 256)
        assert (student.disc.tau, student.disc.straight_through) == (0.12, False)
        says, reads = student.descriptor.blocks, student.interpreter.blocks
        assert (len(says), says[0].cross.heads) == (6, 8)
        assert (len(reads), reads[0].attention.heads) == (12, 6)
    assert isinstance(head, model.DINOHead) and not any(p.requires_grad for p in head.parameters())
    assert (args.batch_size, args.views, args.epochs, args.clip) == (64, 4, 140, 2)
    assert (args.weight_decay, args.weight_decay_end) == (0.04, 0.4)
    assert (args.teacher_temp_start, args.teacher_temp) == (0.04, 0.07)
    assert (args.student_temp, args.ema) == (0.1, 0.996)


# ---- alarms --------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, words", [
    ({}, []), ({"teacher_entropy": 0.001}, ["all prototypes but one are dead"]),
    ({"teacher_entropy": math.log(1000) - 0.001}, ["its targets say nothing"]),
    ({"perplexity": [1.0, 1.2, 1.4]}, ["one symbol is said for every picture"]),
    ({"perplexity": [1.0, 1.0, 9.0]}, []),
    ({"perplexity": [1.0], "teacher_entropy": 0.0}, ["prototypes but one are dead", "one symbol"])])
def test_alarms(changes, words):
    record = {"teacher_entropy": 3.0, "teacher_entropy_max": math.log(1000), "perplexity": [50, 60]}
    said = list(train.alarms(record | changes))
    assert len(said) == len(words) and all(w in s for w, s in zip(words, said))
