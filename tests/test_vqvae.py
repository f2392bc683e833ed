"""extras/vqvae.py: where codes come from, what they reconstruct, and what a run leaves behind."""
import functools
import json

import pytest
import torch

import data
import evaluate
import teachers
from extras import baselines, vqvae
from progress import Progress

SMALL = "--vocab 8 --width 16 --batch-size 16 --device cpu --precision float32".split()


def build(*flags):
    args = vqvae.parse([*SMALL, *flags])
    return vqvae.VQVAE(args.image_size, args.length, args.width, args), args


@pytest.mark.parametrize("length, grid", [(1, (1, 1)), (2, (2, 1)), (8, (4, 2)), (16, (4, 4))])
def test_an_image_is_exactly_t_codes_and_comes_back_at_its_size(length, grid):
    net, _ = build("--length", str(length))
    quantized = net.encode(torch.randn(3, 3, 32, 32))
    assert net.grid == grid and quantized.ids.shape == (3 * length,)
    assert net.decode(quantized.embedding).shape == (3, 3, 32, 32)


def test_codes_are_in_reading_order_each_of_its_place():
    """The corner's pixel is seen by code 1 (row 0, column 1), and by no code of the lower half."""
    net = build()[0].eval()
    x = torch.randn(1, 3, 32, 32)
    changed = x.clone()
    changed[..., 0, 31] += 5
    z, other = (net.latents(v) for v in (x, changed))                           # (8, width)
    moved = (z - other).abs().sum(1)
    assert moved[1] > 0 and moved[4:].max() == 0
    logits = net.encode(torch.cat([changed, x])).logits.unflatten(0, (2, 8))    # images, codes, K
    assert not torch.equal(logits[0, 1], logits[1, 1]) and torch.equal(logits[0, 4:], logits[1, 4:])


def test_loss_and_gradient_are_those_of_equation_3():
    net, args = build()
    x = torch.randn(4, 3, 32, 32)
    mse, quantized = net(x)
    z_e, codes = net.latents(x), net.vq.codebook[quantized.ids]
    image = codes.view(4, 4, 2, 16).permute(0, 3, 1, 2)                         # (B, width, 4, 2)
    assert torch.allclose(mse, (net.decoder(image) - x).square().mean(), atol=1e-6)
    distance = (z_e - codes).square().mean()
    assert torch.allclose(quantized.aux, 1.25 * distance, atol=1e-5)
    mse.backward()                                      # past the codes, which it does not reach
    assert net.encoder[0].weight.grad.abs().max() > 0 and net.vq.codebook.grad is None


def test_the_codebook_starts_at_the_means_of_the_latents():
    """Two kinds of images whose places are all alike: their latents are the two codes."""
    net, _ = build("--vocab", "2", "--length", "1")
    x = torch.tensor([-1.0, 1]).repeat(8).view(16, 1, 1, 1).expand(16, 3, 32, 32)
    net.init_codebook(x)
    z = net.train().latents(x).detach()
    match = torch.cdist(net.vq.codebook, z[:2]).min(1)
    assert match.values.max() < 1e-4 and sorted(match.indices.tolist()) == [0, 1]
    with pytest.raises(ValueError, match="lower --vocab"):
        build("--vocab", "32", "--length", "1")[0].init_codebook(x)


def test_training_reconstructs_better_than_the_mean_image_and_ties_are_exact():
    """The mean image is the best that a decoder can do whose codes carry nothing. Measured at the
    end, as a share of its error: 0.888 to 0.902 over seeds 0 to 3, in float32 and in bfloat16; the
    bound lies half-way to 1."""
    _, args = build("--epochs", "12", "--lr", "5e-3", "--vocab", "16")
    images = data.load("shapes", "train", 32, 192)
    trainer = vqvae.Trainer(args, images)
    with Progress("steps", 144) as progress:
        log = [trainer.train_epoch(epoch, progress) for epoch in range(args.epochs)]
    twice = images.subset(torch.arange(192).repeat(2))
    ids, reconstructed, error = vqvae.encode(trainer.net, twice, args)
    x = data.normalize(images.images)
    assert error < 0.95 * (x - x.mean(0)).square().mean()
    assert error == pytest.approx((reconstructed[:192] - x).square().mean().item(), rel=1e-4)
    assert torch.equal(ids[:192], ids[192:])
    assert torch.equal(reconstructed[:192], reconstructed[192:])
    assert 24 < len(torch.unique(ids, dim=0)) <= 192            # 60 to 147 on those seeds
    assert [r["step"] for r in log] == [12 * e for e in range(1, 13)]
    assert log[-1]["loss"] == pytest.approx(log[-1]["mse"] + log[-1]["aux"])


def test_a_run_is_scored_on_its_symbols_alone(tmp_path, monkeypatch):
    torch.save(teachers.small_vit(32, 8, 64, 1, 1).vit.state_dict(), tmp_path / "teacher.pt")
    out, kept, encode = tmp_path / "run", [], vqvae.encode
    flags = [*SMALL, "--teacher", str(tmp_path / "teacher.pt"), "--out", str(out), "--epochs", "1",
             "--train-images", "96", "--test-images", "48"]
    monkeypatch.setattr(vqvae, "encode", lambda *args: kept.append(encode(*args)) or kept[-1])
    probe = functools.partial(evaluate.linear_probe, grid=(0.1,), iterations=3)         # fast
    monkeypatch.setattr(evaluate, "linear_probe", probe)
    vqvae.run(vqvae.parse(flags))
    assert (out / "reconstructions.png").exists()
    results = json.loads((out / "results.json").read_text())
    sets = evaluate.load_splits(vars(vqvae.parse(flags)))
    onehot = [torch.nn.functional.one_hot(ids, 8).flatten(1) for ids, *_ in kept]
    expected = baselines.accuracies(onehot[0], sets[0].labels, onehot[1], sets[1].labels, False)
    assert results["onehot"]["knn_top1"] == pytest.approx(expected["knn_top1"])
    assert results["bits"] == 24 and len(results["perplexity"]) == 8
    ratio = results["student"]["8"]["knn_top1"] / results["teacher"]["knn_top1"]
    assert results["retention_raw"] == {"8": pytest.approx(ratio)}
    config = json.loads((out / "config.json").read_text())
    assert (config["method"], config["vocab"], config["precision"]) == ("vqvae", 8, "float32")
    with pytest.raises(ValueError, match="holds a run already"):
        vqvae.run(vqvae.parse(flags))


@pytest.mark.parametrize("flags, words", [
    (["--length", "6"], "power of two"), (["--length", "0"], "power of two"),
    (["--image-size", "40"], "multiple of 32"), (["--disc", "gumbel"], "leave --disc at vq"),
    (["--batch-size", "41"], "more than the 40 training images"),
    (["--precision", "float16", "--device", "cpu"], "float16 is for GPUs")])
def test_what_cannot_be_is_one_line(flags, words, tmp_path, monkeypatch):
    few = ["--train-images", "40", "--test-images", "20", "--out", str(tmp_path / "x")]
    monkeypatch.setattr("sys.argv", ["vqvae", *few, *flags])
    with pytest.raises(SystemExit, match=words):
        vqvae.main()
    assert not (tmp_path / "x").exists()
