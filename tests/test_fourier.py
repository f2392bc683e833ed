"""extras/fourier.py: filters with known effects, who gets the perturbed views, and a default run
that nothing of it reaches."""
import math

import pytest
import torch

import checkpoint
import data
import flags
import teachers
from conftest import make_trainer
from extras import fourier, pretrain
from test_pretrain import parse

ON = (1.0, 1.0, 1.0, 1.0)


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """`register` changes the recipes of the whole process."""
    monkeypatch.setattr(checkpoint, "STUDENTS", dict(checkpoint.STUDENTS))


@pytest.mark.parametrize("name, value, probabilities", [
    ("AMPLITUDE", (1, 1), (1, 0, 0, 0)), ("PHASE", (0, 0), (0, 1, 0, 0)),
    ("MASKED", (0, 0), (0, 0, 1, 0)), ("SPREAD", (1e6, 1e6), (0, 0, 0, 1))])
def test_settings_that_do_nothing_return_the_image(monkeypatch, name, value, probabilities):
    x = torch.rand(6, 3, 16, 16)
    changed = fourier.perturb(x, fourier.draw_filter(6, 16, probabilities, "cpu"))
    monkeypatch.setattr(fourier, name, value)
    same = fourier.perturb(x, fourier.draw_filter(6, 16, probabilities, "cpu"))
    assert (same - x).abs().max() < 1e-5 < 0.02 < (changed - x).abs().mean()


def test_probability_0_is_the_identity_to_the_bit():
    x = torch.rand(6, 3, 16, 16)
    spectrum = fourier.draw_filter(6, 16, (0, 0, 0, 0), "cpu")
    assert torch.equal(spectrum, torch.ones(6, 3, 16, 9, dtype=torch.complex64))
    assert torch.equal(fourier.perturb(x, spectrum), x)


def test_each_has_its_probability():
    """Of 4000 images each operation changes its share; the standard error is below 0.8 points."""
    for i, p in enumerate(fourier.PROBABILITIES):
        one = [p if i == j else 0 for j in range(4)]
        spectrum = fourier.draw_filter(4000, 8, one, "cpu")
        share = (spectrum != 1).flatten(1).any(1).float().mean()
        # k = 1 to 10 % of 40 frequencies masks none in one image of six
        expected = p * (1 - torch.linspace(0.01, 0.1, 999).neg().add(1).pow(39).mean()
                        if i == 2 else 1)
        assert abs(share - expected) < 0.03, i


def test_output_is_an_image_and_the_generator_decides():
    x = torch.rand(20, 3, 16, 16)
    torch.manual_seed(3)
    a = fourier.perturb(x, fourier.draw_filter(20, 16, ON, "cpu"))
    torch.manual_seed(3)
    b = fourier.perturb(x, fourier.draw_filter(20, 16, ON, "cpu"))
    assert torch.equal(a, b) and a.shape == x.shape and a.isfinite().all()
    assert 0 <= a.min() and a.max() <= 1


@pytest.mark.parametrize("probabilities", [(0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)])
def test_shift_and_masks_preserve_the_mean(probabilities):
    x = torch.rand(20, 3, 16, 16)
    spectrum = fourier.draw_filter(20, 16, probabilities, "cpu")
    y = torch.fft.irfft2(torch.fft.rfft2(x) * spectrum, s=(16, 16))             # before clamping
    assert (y.mean((2, 3)) - x.mean((2, 3))).abs().max() < 1e-5 < 0.01 < (y - x).abs().mean()


def test_a_phase_shift_turns_a_wave_by_its_angle():
    """cos(2 pi 3 x / 16) becomes cos(2 pi 3 x / 16 +- theta), theta in [0.4, 0.7)."""
    wave = 2 * math.pi * 3 * torch.arange(16) / 16
    x = (0.5 + 0.3 * wave.cos()).expand(50, 3, 16, 16)
    y = fourier.perturb(x, fourier.draw_filter(50, 16, (0, 1, 0, 0), "cpu"))
    f = torch.fft.rfft(y[:, 0, 0])[:, 3]
    assert torch.allclose(f.abs(), torch.tensor(0.3 * 8), atol=1e-4)
    theta = f.angle()
    assert ((theta.abs() >= 0.4) & (theta.abs() < 0.7)).all() and -0.3 < theta.sign().mean() < 0.3


def test_masks_by_hand(monkeypatch):
    """A tenth of the frequencies, the same in all channels; one Gaussian of known center."""
    monkeypatch.setattr(fourier, "MASKED", (0.1, 0.1))
    spectrum = fourier.draw_filter(200, 16, (0, 0, 1, 0), "cpu")
    assert torch.equal(spectrum[:, 0], spectrum[:, 2]) and (spectrum[..., 0, 0] == 1).all()
    assert abs((spectrum[:, 0].flatten(1)[:, 1:] == 0).float().mean() - 0.1) < 0.01
    draws = iter([5.0, 2.0, 3.0, 4.0])                      # center, deviation in u; then in v
    monkeypatch.setattr(fourier, "CENTERS", 1)
    monkeypatch.setattr(fourier, "uniform", lambda shape, low, high, device:
                        torch.full(shape, next(draws)) * (224 / 16 if low == 10 else 1))
    mask = fourier.gaussian_mask(1, 16, "cpu")[0, 0]
    u, v = torch.arange(16.0)[:, None], torch.arange(9.0)
    expected = (-((u - 5) ** 2 / (2 * 2 ** 2) + (v - 3) ** 2 / (2 * 4 ** 2))).exp()
    assert torch.allclose(mask, expected, atol=1e-6)


def test_the_pair_differs_in_the_spectrum_alone():
    """With probability 0 both are equal; otherwise they have the same crop, flip and colours."""
    images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)
    augment = fourier.FourierAugment(blur=1.0)
    clean, perturbed = augment.pair(images, 3, 8, (0, 0, 0, 0))
    assert torch.equal(clean, perturbed) and clean.shape == (3, 5, 3, 8, 8)
    clean, perturbed = augment.pair(images, 3, 8, (0, 0, 1, 0))
    correlation = torch.corrcoef(torch.stack([clean.flatten(), perturbed.flatten()]))[0, 1]
    assert not torch.equal(clean, perturbed) and correlation > 0.8
    clean, perturbed = augment.pair(images, 0, 8, (0, 0, 0, 0))
    assert torch.equal(clean, perturbed) and torch.allclose(clean[0], data.normalize(images, 8))


def test_pretraining_perturbs_the_students_crops_alone(tmp_path):
    images = data.ImageSet(torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8),
                           torch.full((40,), -1), [])
    args = parse(tmp_path, "--stem", "--locals", "2", "--local-size", "4")
    x, trainer = images.images[:4], fourier.FourierPretrainer(args, images, ON)
    torch.manual_seed(1)
    (teacher,), (globals_, local) = trainer.crops(x)
    trainer.args.fda_probability = [0, 0, 0, 0]
    assert teacher.shape == globals_.shape == (2, 4, 3, 8, 8) and local.shape == (2, 4, 3, 4, 4)
    assert not torch.isclose(teacher, globals_).all((2, 3, 4)).any()
    trainer = fourier.FourierPretrainer(args, images, (0, 0, 0, 0))
    (teacher,), (globals_, _) = trainer.crops(x)
    assert torch.equal(teacher, globals_)


@pytest.mark.parametrize("recipe, views", [("stable", []), ("paper", []),
                                           ("stable", ["--cache-views", "0", "--views", "2"])])
def test_the_target_is_of_the_clean_view_and_the_symbols_of_the_perturbed(tiny, recipe, views):
    fourier.register()
    args = flags.parse(tiny("--recipe", recipe, *views))
    teacher = teachers.load_teacher(args.teacher)
    trainer = make_trainer(args, teacher)
    trainer.tokens = fourier.FourierTokens(teacher, trainer.tokens.images, args, ON)
    z_t, student = next(trainer.tokens.batches(0, 0, 1)), trainer.student.train()
    assert z_t.shape == (16 * args.views, 6, 64) and args.fda_probability == list(ON)
    assert (z_t[:, 0] - z_t[:, 1]).abs().mean() > 0.01      # CLS of the two views
    described = []
    original = student.descriptor.forward
    student.descriptor.forward = lambda z, *rest: described.append(z) or original(z, *rest)
    trainer.step(z_t, 0)
    both = student.preprocess(z_t)
    student.eval()
    clean, perturbed = (student.preprocess(x) for x in (z_t[:, [0, 2, 3, 4, 5]], z_t[:, 1:]))
    assert torch.equal(described[0], perturbed) and torch.equal(both[:, 0], clean[:, 0])
    student.describe(perturbed)                                         # evaluated as ever
    assert torch.equal(described[1], perturbed)


def test_probability_0_trains_on_the_tokens_of_a_default_run(tiny):
    """Without the cache, whose half precision would lie between."""
    args = flags.parse(tiny("--cache-views", "0"))
    trainer = make_trainer(args, teachers.load_teacher(args.teacher))
    torch.manual_seed(5)
    fourier.draw_filter(16, 8, ON, "cpu")                   # the numbers that the filters take
    expected = next(trainer.tokens.batches(0, 0, 1))
    tokens = fourier.FourierTokens(trainer.teacher, trainer.tokens.images, args, (0, 0, 0, 0))
    torch.manual_seed(5)
    z_t = next(tokens.batches(0, 0, 1))
    assert torch.equal(z_t[:, 1:], expected) and torch.equal(z_t[:, 0], expected[:, 0])
