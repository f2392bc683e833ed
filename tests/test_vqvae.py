"""extras/vqvae.py: where codes look, what they rebuild, and a whole run as the tables read it."""
import json

import pytest
import torch

import evaluate
import model
from extras import experiments, vqvae

SMALL = "--vocab 8 --width 16 --batch-size 16 --device cpu".split()


def build(*flags):
    args = vqvae.parse([*SMALL, *flags])
    return vqvae.VQVAE(args.image_size, args.length, args.width, args), args


@pytest.mark.parametrize("length, grid", [(1, (1, 1)), (2, (2, 1)), (8, (4, 2)), (16, (4, 4))])
def test_a_picture_is_exactly_t_codes_and_comes_back_at_its_size(length, grid):
    net, _ = build("--length", str(length))
    said = net.encode(torch.randn(3, 3, 32, 32))
    assert net.grid == grid and said.ids.shape == (3 * length,)
    assert net.decode(said.embedding).shape == (3, 3, 32, 32)


def test_codes_are_in_reading_order_each_about_its_place():
    """The corner's pixel is seen by code 1 (row 0, column 1), and by no code of the lower half."""
    net = build()[0].eval()
    x = torch.randn(1, 3, 32, 32)
    changed = x.clone()
    changed[..., 0, 31] += 5
    z, other = (net.encoder(v).flatten(2)[0].T for v in (x, changed))           # (8, width)
    moved = (z - other).abs().sum(1)
    assert moved[1] > 0 and moved[4:].max() == 0
    logits = net.encode(torch.cat([changed, x])).logits.unflatten(0, (2, 8))    # pictures, codes, K
    assert not torch.equal(logits[0, 1], logits[1, 1]) and torch.equal(logits[0, 4:], logits[1, 4:])


def test_the_decoder_reads_the_chosen_codes_alone_and_the_gradient_passes_them():
    net, _ = build()
    x = torch.randn(4, 3, 32, 32)
    mse, said = net(x)
    z = net.vq.table[said.ids].view(4, 4, 2, 16).permute(0, 3, 1, 2)            # (B, width, 4, 2)
    assert torch.allclose(mse, (net.decoder(z) - x).square().mean(), atol=1e-6)
    mse.backward()
    assert net.encoder[0].weight.grad.abs().max() > 0


def test_training_rebuilds_better_than_the_mean_picture_and_ties_are_exact():
    net, args = build("--epochs", "8", "--lr", "5e-3", "--vocab", "16")
    images = vqvae.data.load("shapes", "train", 32, 192).images
    optimizer = torch.optim.Adam(net.parameters())
    log = [vqvae.train_epoch(net.train(), optimizer, images, e, args) for e in range(args.epochs)]
    ids, rebuilt = vqvae.read(net, images.repeat(2, 1, 1, 1), args)             # each picture twice
    x = vqvae.data.normalize(images)
    assert (rebuilt[:192] - x).square().mean() < 0.95 * (x - x.mean(0)).square().mean()
    assert torch.equal(ids[:192], ids[192:]) and torch.equal(rebuilt[:192], rebuilt[192:])
    assert 48 < len(torch.unique(ids, dim=0)) <= 192
    assert [r["step"] for r in log] == [12 * e for e in range(1, 9)]
    assert log[-1]["loss"] == pytest.approx(log[-1]["mse"] + log[-1]["aux"])


def test_a_run_is_scored_on_its_symbols_alone_and_read_by_the_tables(tmp_path, monkeypatch):
    torch.save(model.small_vit(32, 8, 64, 1, 1).vit.state_dict(), tmp_path / "teacher.pt")
    out = tmp_path / "shapes-vqvae-8-s0"
    flags = [*SMALL, "--teacher", str(tmp_path / "teacher.pt"), "--out", str(out), "--epochs", "1",
             "--train-images", "96", "--test-images", "48"]
    kept = []
    read = vqvae.read
    monkeypatch.setattr(vqvae, "read", lambda *args: kept.append(read(*args)) or kept[-1])
    vqvae.run(vqvae.parse(flags))
    assert (out / "reconstructions.png").exists()
    results = json.loads((out / "results.json").read_text())
    sets = evaluate.load_splits(vars(vqvae.parse(flags)))
    onehot = [torch.nn.functional.one_hot(ids, 8).flatten(1) for ids, _ in kept]
    knn = evaluate.knn_accuracies(onehot[0], sets[0].labels, onehot[1], sets[1].labels)
    assert results["onehot"]["knn_top1"] == pytest.approx(sum(v[0] for v in knn.values()) / 4)
    assert results["bits"] == 24 and len(results["perplexity"]) == 8
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    row, = (r for r in experiments.rows() if r["symbols"])
    assert (row["method"], row["vocab"], row["symbols"], row["seed"]) == ("vqvae", 8, 8, 0)
    ceiling = next(r for r in experiments.rows() if r["method"] == "teacher")
    assert row["retention"] == pytest.approx(row["knn_top1"] / ceiling["knn_top1"])
    with pytest.raises(ValueError, match="holds a run already"):
        vqvae.run(vqvae.parse(flags))


@pytest.mark.parametrize("flags, words", [
    (["--length", "6"], "power of two"), (["--length", "0"], "power of two"),
    (["--image-size", "40"], "multiple of 32"), (["--disc", "gumbel"], "leave --disc at vq")])
def test_what_cannot_be_is_one_line(flags, words, tmp_path, monkeypatch):
    few = ["--train-images", "40", "--test-images", "20", "--out", str(tmp_path / "x")]
    monkeypatch.setattr("sys.argv", ["vqvae", *few, *flags])
    with pytest.raises(SystemExit, match=words):
        vqvae.main()
    assert not (tmp_path / "x").exists()
