"""Known answers for the parts of train.py: one step against views taken one by one, what a step
moves and what it does not, caches, schedules, sizes, warnings. (Whole runs: test_train.py.)

    python tests/test_step.py       # rewrites fixtures/losses.json, the losses of 20 steps
"""
import contextlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import conftest                 # first: it puts the code on the path
import checkpoint
import data
import discretize
import evaluate
import flags
import losses
import model
import precision
import teachers
import train

RECORDED = Path(__file__).parent / "fixtures" / "losses.json"


def first_batch(trainer):
    """z_t of the first step's 16 images."""
    return next(trainer.tokens.batches(0, 0, 1))


# ---- one step ------------------------------------------------------------------------------------

def views_one_by_one(trainer, views):
    """The parts of the loss for views, a list of z_t (B, N+1, d), from the formulas of the paper
    and of stable.py -> (target p_t of each, sequence, z_s, student's logits / temperature)."""
    student, temperature = trainer.student, 0.07
    p_t, sequences, z_s, p_s = [], [], [], []
    for z_t in views:
        if trainer.args.recipe == "paper":
            head, center = student.teacher_projector, trainer.centering.center
            bottleneck = F.normalize(head.mlp(z_t[:, 0]), dim=-1)
            logits = bottleneck @ F.normalize(head.prototypes, dim=-1).T - center
        else:
            cls = (z_t[:, 0] - student.mean[0]) @ student.whiten
            cls = cls / cls.square().mean(1, keepdim=True).sqrt()
            patches = (z_t[:, 1:] - student.mean[1]) / student.std
            z_t = torch.cat([cls[:, None], patches], 1)
            logits = torch.einsum("bd,pd->bp", cls, student.projector.centroids)
        p_t.append((logits / temperature).softmax(-1))
        sequences.append(student.describe(z_t))
        z_s.append((student.interpret(sequences[-1].embeddings), z_t[:, 0]))
        p_s.append(student.projector(z_s[-1][0]) / 0.1)                     # (B, 4, P)
    return p_t, sequences, z_s, p_s


@torch.no_grad()
@pytest.mark.parametrize("pairing", ["same", "cross"])
@pytest.mark.parametrize("recipe", conftest.RECIPES)
def test_the_loss_equals_views_taken_one_by_one(tiny_trainer, recipe, pairing):
    trainer = tiny_trainer("--recipe", recipe, "--disc", "vq", "--views", "3", "--cache-views", "0",
                           "--lam", "0.5", "--explore", "entropy", "--pairing", pairing)
    args, student = trainer.args, trainer.student
    student.interpreter.out.weight.normal_(std=0.1)
    for norm in student.descriptor.norms.eval():               # in training they would couple views
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    if recipe == "paper":
        trainer.centering.center.normal_(std=0.1)
        for p in student.teacher_projector.parameters():
            p.add_(0.1 * torch.randn_like(p))
    views = [trainer.teacher(torch.randn(5, 3, 8, 8)) for _ in range(3)]
    p_t, sequences, z_s, p_s = views_one_by_one(trainer, views)
    total, log = train.training_step(student, trainer.centering,
                                     student.preprocess(torch.cat(views)), 0.07, args)

    target = [p_t[i] if pairing == "same" else (sum(p_t) - p_t[i]) / 2 for i in range(3)]
    loss = sum(0.5 ** (j + 1) * F.cross_entropy(p_s[i][:, j], target[i]) / 3
               for i in range(3) for j in range(4)) / (0.5 + 0.25 + 0.125 + 0.0625)
    aux = sum(s.aux for s in sequences) / 3
    both = SimpleNamespace(**{name: torch.cat([getattr(s, name) for s in sequences])
                              for name in ("weights", "logits")})
    explore = losses.exploration_loss(both, "entropy", args.alpha, args.beta)
    extra = 0
    if recipe == "stable":
        extra = 3 * sum((z - cls[:, None]).square().mean() / 3 for z, cls in z_s)
        extra += 3 * 4 * sum((s.cls_pred - cls[:, None]).square().mean() / 3
                             for s, (_, cls) in zip(sequences, z_s))
    assert aux > 0.01 and explore < -0.01 and (extra > 0.01) == (recipe == "stable")
    close = lambda a, b: abs(a - b) < 2e-4                              # noqa: E731
    assert close(log["dino_loss"], loss) and close(log["aux"], aux)
    assert close(log["extra_loss"], extra)
    assert close(total, loss + aux + explore + extra) and log["loss"] == total
    joint = p_s[0].softmax(-1).mean(1)                                  # over the prefixes
    kl = F.kl_div(joint.log(), target[0], reduction="batchmean")        # of the first view alone
    entropy = torch.distributions.Categorical(torch.cat(p_t)).entropy().mean()
    assert close(log["kl"], kl) and close(log["teacher_entropy"], entropy)


@torch.no_grad()
def test_views_come_one_after_the_other(tiny_trainer, monkeypatch):
    """Row v * B + b is view v of image b, here the image dimmed v times."""
    tokens = tiny_trainer("--recipe", "paper", "--views", "3").tokens
    dim = lambda x, v: data.normalize(x.float() / 255 / 2 ** v)         # noqa: E731
    monkeypatch.setattr(tokens, "augment", lambda x, count, size, part: (
        torch.stack([dim(x, v) for v in range(count)])))
    images = tokens.images.images[:5]
    z_t = tokens.encode(images, 3)
    assert z_t.shape == (15, 5, 64)
    for v in range(3):
        expected = tokens.teacher(dim(images, v))
        assert torch.allclose(z_t[5 * v:5 * v + 5], expected, atol=1e-5)
    assert torch.allclose(tokens.encode(images, 0), tokens.teacher(dim(images, 0)), atol=1e-5)


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()
            if torch.is_tensor(value)}


@pytest.mark.parametrize("recipe", conftest.RECIPES)
def test_one_step_moves_the_student_and_nothing_else(tiny_trainer, recipe):
    """And P_T of the paper by hand: theta_T <- 0.9 theta_T + 0.1 theta_S in the first step."""
    trainer = tiny_trainer("--recipe", recipe, "--ema", "0.9", "--epochs", "1")
    student = trainer.student
    student.interpreter.out.weight.data.normal_()   # from 0, nothing behind it would move
    for p in student.teacher_projector.parameters():
        p.data.add_(torch.randn_like(p))
    teacher, before = state_of(trainer.teacher), state_of(student)
    trainer.step(first_batch(trainer), 0)
    moved = {name for name, value in state_of(student).items()
             if not torch.equal(value, before[name])}
    learned = {name for name, p in student.named_parameters() if p.requires_grad}
    statistics = {name for name in before if ".norms." in name}         # what evaluation will use
    ema = {name for name in before if name.startswith("teacher_projector.")} - learned
    constant = {"mean", "std", "whiten", "projector.centroids", "teacher_projector.centroids"}
    assert moved == (learned | statistics | ema) - constant
    now = state_of(trainer.teacher)
    assert all(torch.equal(value, now[name]) for name, value in teacher.items())
    if recipe == "paper":
        assert ema == {f"teacher_{name}" for name in learned if name.startswith("projector.")}
        for name in ema:
            now = student.state_dict()[name.removeprefix("teacher_")]
            expected = 0.9 * before[name] + 0.1 * now
            assert torch.allclose(student.state_dict()[name], expected, atol=1e-6)


@pytest.mark.parametrize("epochs", [1, 2])
def test_prototypes_rest_in_the_first_epoch_of_several(tiny_trainer, epochs):
    trainer = tiny_trainer("--recipe", "paper", "--epochs", str(epochs))
    prototypes = trainer.student.projector.prototypes
    start = prototypes.detach().clone()
    trainer.step(first_batch(trainer), 0)
    assert torch.equal(prototypes, start) == (epochs == 2)
    trainer.step(first_batch(trainer), trainer.steps_per_epoch)
    assert not torch.equal(prototypes, start)


@pytest.mark.parametrize("disc", list(discretize.DISCRETIZERS))
@pytest.mark.parametrize("codebook_lr", [0, 0.25])
def test_codebooks_learn_at_a_share_of_the_rate(tiny_trainer, disc, codebook_lr):
    """Adam's first step is as long as the learning rate, where there is a gradient."""
    trainer = tiny_trainer("--disc", disc, "--codebook-lr", str(codebook_lr), "--lr", "0.01",
                           "--epochs", "1")
    books = [d.codebook for d in trainer.student.disc]
    before, start = [p.detach().clone() for p in books], trainer.student.descriptor.start
    start_before = start.detach().clone()
    trainer.step(first_batch(trainer), 0)
    assert (start - start_before).abs().max().item() == pytest.approx(0.01, rel=0.01)
    moved = max((p - b).abs().max().item() for p, b in zip(books, before))
    assert moved == pytest.approx(0.01 * codebook_lr, rel=0.02)


def test_gradients_are_clipped(tiny_trainer, monkeypatch):
    norms = []
    for clip in (1e9, 1e-3):
        monkeypatch.setattr(train, "CLIP", clip)
        torch.manual_seed(0)
        trainer = tiny_trainer()
        trainer.step(first_batch(trainer), 0)
        gradients = [p.grad for p in trainer.student.parameters() if p.grad is not None]
        norms.append(torch.cat([g.flatten() for g in gradients]).norm())
    assert norms[0] > 0.1 and norms[1].item() == pytest.approx(1e-3, rel=1e-3)


# ---- batches and the token cache -----------------------------------------------------------------

def dimmed_ever_more(images, count, size, part=False):
    """In place of an augmentation: each call halves the images once more than the one before."""
    assert count == 1
    dimmed_ever_more.calls += 1
    return data.normalize(images.float() / 255 / 2 ** dimmed_ever_more.calls)[None]


@torch.no_grad()
def test_cached_views_are_the_teachers_and_spare_it(tiny_trainer, monkeypatch):
    """View 0 is the un-augmented image; view c is, here, the image dimmed c times."""
    dimmed_ever_more.calls = 0
    monkeypatch.setattr(data, "augmentation", lambda name, size: dimmed_ever_more)
    torch.manual_seed(7)
    trainer = tiny_trainer("--cache-views", "3", "--views", "2", "--batch-size", "32")
    tokens, x = trainer.tokens, trainer.tokens.images.images
    assert tokens.cache.shape == (32, 3, 5, 64) and tokens.cache.dtype == torch.float16
    for c in range(3):
        expected = tokens.teacher(data.normalize(x.float() / 255 / 2 ** c))
        assert torch.allclose(tokens.cache[:, c].float(), expected, atol=3e-3)
    assert not torch.allclose(tokens.cache[:, 0], tokens.cache[:, 1], atol=0.05)
    for n in (9, 50):                                                       # what `fit` gets
        assert torch.equal(torch.cat([*tokens.first(n)]), tokens.cache[:n, 0].float())

    def refuse(*_):
        raise AssertionError("the teacher was run")
    monkeypatch.setattr(tokens.teacher, "forward", refuse)
    chosen = []
    for epoch in range(20):
        z_t, = tokens.batches(epoch, 0, 1)                                  # (V*B, N+1, d)
        assert z_t.shape == (64, 5, 64) and z_t.dtype == torch.float32
        rows = tokens.cache.float().flatten(0, 1)                           # image by image
        found = torch.cdist(z_t.flatten(1), rows.flatten(1)).argmin(1).view(2, 32)
        assert torch.equal(z_t, rows[found.flatten()])
        image, view = found // 3, found % 3
        assert torch.equal(image[0], image[1]) and image[0].unique().tolist() == [*range(32)]
        assert (view[0] != view[1]).all()
        chosen += list(zip(*view.tolist()))
    assert len(set(chosen)) == 6                                        # all orders of 2 of 3


def test_filling_the_cache_leaves_the_random_state_alone(tiny_trainer):
    tokens = tiny_trainer("--cache-views", "3", "--views", "2").tokens
    before = torch.get_rng_state()
    assert torch.equal(tokens.fill_cache(), tokens.cache)               # from the seed alone
    assert torch.equal(torch.get_rng_state(), before)


def test_a_cache_that_does_not_fit_is_refused(tiny_trainer, monkeypatch):
    monkeypatch.setattr(data, "free_memory", lambda: (5e4, "free"))
    # 32 images x 3 views x 5 tokens x 64 numbers x 2 bytes
    with pytest.raises(ValueError, match="--cache-views 3 takes 6.14e-05 GB, and less memory is"):
        tiny_trainer("--cache-views", "3")


@torch.no_grad()
def test_the_gallery_is_the_training_images_in_the_order_of_the_data(tiny_trainer, monkeypatch):
    """40 images, 2 of them held out, as a run cuts them."""
    images = data.ImageSet(torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8),
                           torch.zeros(40).long(), ["a"])
    trainer = tiny_trainer("--cache-views", "1")
    kept, held_out = map(images.subset, data.held_out_indices(40, trainer.args.seed))
    tokens = train.TrainingTokens(trainer.teacher, kept, trainer.args)
    expected = trainer.teacher(data.normalize(images.images))
    z_t = tokens.gallery(held_out)
    assert torch.allclose(torch.cat([*map(z_t, torch.arange(40).split(7))]).float(), expected,
                          atol=3e-3)
    monkeypatch.setattr(data, "GALLERY", 39)
    assert tokens.gallery(held_out) is None
    assert tiny_trainer("--cache-views", "0").tokens.gallery(held_out) is None


def test_an_epoch_is_all_images_once_in_an_order_of_its_own(tiny_trainer, monkeypatch):
    tokens = tiny_trainer("--cache-views", "0").tokens
    monkeypatch.setattr(tokens, "encode", lambda images, views, part: images)
    pixels = lambda epoch, start=0: torch.cat([                         # noqa: E731
        *tokens.batches(epoch, start, 2)]).flatten(1)
    first, rows = pixels(0), tokens.images.images.flatten(1)
    assert not torch.equal(first, pixels(1)) and torch.equal(first, pixels(0))
    for epoch in (0, 1):
        assert (pixels(epoch)[:, None] == rows).all(2).sum(0).tolist() == [1] * 32
    assert torch.equal(pixels(0, start=1), first[16:])


def test_held_out_images_are_not_trained_on():
    kept, held_out = data.held_out_indices(100, seed=3)
    assert len(held_out) == 5 and sorted([*kept.tolist(), *held_out.tolist()]) == [*range(100)]
    assert not torch.equal(held_out, data.held_out_indices(100, seed=4)[1])
    assert len(data.held_out_indices(30000, seed=3)[1]) == 1000
    with pytest.raises(ValueError, match="39 training images are too few"):
        data.held_out_indices(39, seed=3)


# ---- schedules -----------------------------------------------------------------------------------

def test_schedules_by_hand(tiny_trainer):
    trainer = tiny_trainer("--epochs", "10", "--lr", "1", "--weight-decay", "0.04", "0.4",
                           "--tau-start", "1", "--tau", "0.25", "--teacher-temp", "0.03", "0.07",
                           "--codebook-lr", "0.5")
    rates, decays, taus, temperatures = [], [], [], []
    for step in (0, 1, 2, 11, 20):                      # of 20; two of them warm up, to step 2
        temperatures.append(trainer.schedule(step))
        matrices, vectors, codebooks = trainer.optimizer.param_groups
        assert vectors["weight_decay"] == codebooks["weight_decay"] == 0
        assert vectors["lr"] == matrices["lr"] == 2 * codebooks["lr"]
        rates.append(matrices["lr"])
        decays.append(matrices["weight_decay"])
        taus.append({disc.tau for disc in trainer.student.disc}.pop())
    half = lambda a, b: (a + b) / 2                                     # noqa: E731
    assert rates == pytest.approx([0.5, 1, 1, half(1, 1e-5), 1e-5])     # half-way from 2 to 20
    cosine = lambda p: 0.22 - 0.18 * math.cos(math.pi * p)              # noqa: E731
    assert decays == pytest.approx([cosine(p) for p in (0, 0.05, 0.1, 0.55, 1)])
    assert taus == pytest.approx([0.25 ** p for p in (0, 0.05, 0.1, 0.55, 1)])
    assert temperatures == pytest.approx([0.03 + 0.04 * p for p in (0, 0.05, 0.1, 0.55, 1)])


def test_the_teacher_temperature_warms_up_for_30_epochs_at_most(tiny_trainer):
    trainer = tiny_trainer("--epochs", "40", "--teacher-temp", "0.04", "0.07")
    assert [trainer.schedule(step) for step in (0, 30, 60, 79)] == pytest.approx(
        [0.04, 0.055, 0.07, 0.07])                                      # 2 steps an epoch


@pytest.mark.parametrize("disc, end", [("softmax", 0.12), ("gumbel", 0.5)])
def test_without_a_temperature_annealing_ends_at_the_discretizers(tiny_trainer, disc, end):
    trainer = tiny_trainer("--recipe", "paper", "--disc", disc, "--tau-start", "2")
    found = []
    for step in (0, 2, 4):                                              # 2 epochs of 2 steps
        trainer.schedule(step)
        found.append(trainer.student.disc.tau)
    assert found == pytest.approx([2, (2 * end) ** 0.5, end])           # half-way: geometric mean


# ---- sizes and warnings --------------------------------------------------------------------------

@pytest.mark.parametrize("recipe", conftest.RECIPES)
@pytest.mark.parametrize("size", flags.SIZES)
def test_sizes_are_flags_and_flags_win(size, recipe):
    args = flags.parse(["--size", size, "--recipe", recipe])
    default = vars(flags.parse(["--recipe", recipe]))
    assert flags.SIZES[size].keys() <= default.keys()
    pairs = {"descriptor": (4, 4), "interpreter": (4, 4)} if size == "cifar10" else (
        {"descriptor": (6, 8), "interpreter": (12, 6)} if size == "paper" else {})
    if size != "small":
        pairs |= {"train_images": None, "test_images": None}                    # all
    expected = default | flags.SIZES[size] | pairs | {"size": size, "recipe": recipe}
    assert vars(args) == expected
    assert flags.parse(["--vocab", "77", "--size", size, "--lr", "7"]).vocab == 77
    flags.check(args)


def test_the_papers_size_is_the_papers():
    args = flags.parse(["--size", "paper", "--recipe", "paper"])
    with torch.device("meta"):                      # shapes without memory
        teacher = teachers.random_teacher(args.teacher)
        student = model.Student(args, teacher.width)
        images = torch.empty(2, 3, args.image_size, args.image_size)
        assert teacher(images).shape == (2, 1 + 196, 768)
    assert student.lengths == [1, 2, 4, 8] and student.disc.codebook.shape == (512, 768)
    assert student.projector.mlp[0].weight.shape == (2048, 768)
    assert student.projector.prototypes.shape == (8192, 256)
    assert (student.disc.tau, student.disc.straight_through) == (0.12, False)
    descriptor, interpreter = student.descriptor.blocks, student.interpreter.blocks
    assert (len(descriptor), descriptor[0].cross.heads) == (6, 8)
    assert (len(interpreter), interpreter[0].attention.heads) == (12, 6)
    assert not any(p.requires_grad for p in student.teacher_projector.parameters())
    assert (args.batch_size, args.views, args.cache_views, args.epochs) == (64, 4, 0, 140)
    assert args.weight_decay == [0.04, 0.4] and args.teacher_temp == [0.04, 0.07]
    assert (args.ema, args.centering, args.pairing, train.CLIP) == (0.996, "center", "same", 2)


@pytest.mark.parametrize("changes, words", [
    ({}, []), ({"teacher_entropy": 0.001}, ["all images have one prototype"]),
    ({"teacher_entropy": math.log(1000) - 0.001}, ["its targets are uniform"]),
    ({"perplexity": [1.0, 1.2, 1.4]}, ["all images get the same symbols"]),
    ({"perplexity": [1.0, 1.0, 9.0]}, []),
    ({"perplexity": [1.0], "teacher_entropy": 0.0}, ["one prototype", "the same symbols"])])
def test_collapse_warnings(changes, words):
    record = {"teacher_entropy": 3.0, "teacher_entropy_max": math.log(1000), "perplexity": [50, 60]}
    found = list(evaluate.collapse_warnings(record | changes))
    assert len(found) == len(words) and all(w in line for w, line in zip(words, found))


# ---- the losses of 20 steps ----------------------------------------------------------------------

def twenty_losses(recipe, disc):
    """10 epochs of 2 steps in float32, everything random from seed 0, on planted tokens: 256 images
    of 8 kinds that differ in 32 of 64 directions. Not a teacher's, of random images: there one
    rounding error decides what is a principal component and which centroid is the nearest."""
    torch.manual_seed(0)
    args = flags.parse([*conftest.TINY, "--recipe", recipe, "--disc", disc, "--epochs", "10",
                        "--views", "2", "--cache-views", "0", "--lr", "2e-4"])
    flags.check(args)
    student = checkpoint.STUDENTS[recipe](args, 64)
    images = data.ImageSet(torch.zeros(32, 3, 8, 8, dtype=torch.uint8), torch.full((32,), -1), [])
    trainer = train.Trainer(args, None, student, images)
    kinds = 3 * torch.randn(8, 5, 64).repeat(32, 1, 1)
    tokens = (kinds + torch.randn(256, 5, 64)) * torch.linspace(1, 0.5, 32).repeat_interleave(2)
    tokens[..., ::2] *= 0.02
    view = lambda: tokens + 0.1 * torch.randn(256, 5, 64)               # noqa: E731
    student.train().fit(lambda n, augmented=False: [view() if augmented else tokens])
    values = []
    for step in range(20):
        index = torch.randperm(256)[:16]
        z_t = torch.cat([view()[index], view()[index]])                     # (V*B, N+1, d)
        values.append(trainer.step(z_t, step)["loss"].item())
    return values


CURVES = [(recipe, disc) for recipe in conftest.RECIPES for disc in discretize.DISCRETIZERS]


@pytest.mark.parametrize("recipe, disc", CURVES)
def test_the_losses_of_20_steps_are_those_recorded(recipe, disc):
    recorded = json.loads(RECORDED.read_text())[f"{recipe} {disc}"]
    assert len(recorded) == 20
    assert twenty_losses(recipe, disc) == pytest.approx(recorded, rel=1e-4)


if __name__ == "__main__":
    curves = {f"{recipe} {disc}": twenty_losses(recipe, disc) for recipe, disc in CURVES}
    RECORDED.write_text(json.dumps(curves, indent=1) + "\n")
    print(f"{RECORDED.name}: {precision.hardware_info('cpu')}")


@pytest.mark.parametrize("disc", list(discretize.DISCRETIZERS))
@pytest.mark.parametrize("recipe", conftest.RECIPES)
def test_a_step_stays_on_its_device(tiny_trainer, recipe, disc, monkeypatch):
    """The meta device stands in for a GPU: like one, it refuses to mix with tensors of the CPU."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    trainer = tiny_trainer("--recipe", recipe, "--disc", disc, "--views", "2", "--cache-views", "0")
    student = trainer.student.to("meta")
    z_t = torch.randn(6, 17, trainer.teacher.width, device="meta")
    total, log = train.training_step(student, trainer.centering.to("meta"),
                                     student.preprocess(z_t), 0.07, trainer.args)
    assert {value.device.type for value in (total, *log.values())} == {"meta"}
