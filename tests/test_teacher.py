"""Known answers for the files model.py reads: DINO's weights against DINO's own architecture,
downloads from a stand-in on this machine, checkpoints whole, damaged, foreign and hostile."""
import argparse
import http.server
import io
import os
import pickle
import re
import threading

import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import model
import train


# ---- DINO's ViT, written down from its parameter names -------------------------------------------

def dino_state(width=128, depth=2, patch=4, side=3):
    """Random weights with the official names; tokens so small that another LayerNorm eps shows."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + side**2, width),
              "patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": [width]}
    linears = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    norms = ["norm"]
    for i in range(depth):
        norms += [f"blocks.{i}.norm1", f"blocks.{i}.norm2"]
        for name, (n, m) in linears.items():
            shapes[f"blocks.{i}.{name}.weight"] = (n * width, m * width)
            shapes[f"blocks.{i}.{name}.bias"] = (n * width,)
    state = {name: torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 0.02)
             for name, shape in shapes.items()}
    for name in norms:
        state[f"{name}.weight"] = 1 + 0.02 * torch.randn(width)
        state[f"{name}.bias"] = 0.02 * torch.randn(width)
    return state


def dino_forward(state, x):
    """DINO's vision_transformer.py with the weights `state`: pictures -> tokens, all and normed."""
    w = lambda name: (state[name + ".weight"], state[name + ".bias"])           # noqa: E731
    width = state["cls_token"].shape[-1]
    norm = lambda x, name: F.layer_norm(x, (width,), *w(name), eps=1e-6)        # noqa: E731
    patches = F.conv2d(x, *w("patch_embed.proj"), stride=state["patch_embed.proj.weight"].shape[-1])
    cls = state["cls_token"].repeat(len(x), 1, 1)
    x = torch.cat([cls, patches.flatten(2).mT], 1) + state["pos_embed"]
    for i in range(sum(name.endswith("norm1.weight") for name in state)):
        qkv = F.linear(norm(x, f"blocks.{i}.norm1"), *w(f"blocks.{i}.attn.qkv"))
        q, k, v = qkv.view(*x.shape[:2], 3, width // 64, 64).permute(2, 0, 3, 1, 4)
        y = ((q @ k.mT) / 8).softmax(-1) @ v                                    # 8 = sqrt(64)
        x = x + F.linear(y.transpose(1, 2).flatten(2), *w(f"blocks.{i}.attn.proj"))
        y = F.gelu(F.linear(norm(x, f"blocks.{i}.norm2"), *w(f"blocks.{i}.mlp.fc1")))
        x = x + F.linear(y, *w(f"blocks.{i}.mlp.fc2"))
    return norm(x, "norm")


def close(a, b, tolerance=1e-5):
    return torch.allclose(a, b, atol=tolerance, rtol=0)


def test_converted_teacher_is_dinos():
    state, x = dino_state(), torch.randn(2, 3, 12, 12)
    teacher = model.teacher_from_state(model.dino_to_torchvision(state))
    assert close(teacher(x), dino_forward(state, x), 1e-4)
    assert (teacher.width, teacher.patch, teacher.image_size) == (128, 4, 12)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_teacher_from_a_training_checkpoint_of_dino(tmp_path):
    state, other, x = dino_state(), dino_state(), torch.randn(2, 3, 12, 12)
    head = {"module.head.mlp.0.weight": torch.randn(7, 128),
            "module.head.last_layer.weight_g": torch.ones(7, 1)}
    student, ema = ({f"module.backbone.{k}": v for k, v in s.items()} | head
                    for s in (other, state))
    args = argparse.Namespace(arch="vit_base", lr=5e-4, output_dir=None)
    torch.save({"student": student, "teacher": ema, "optimizer": {"state": {}}, "epoch": 100,
                "args": args}, tmp_path / "checkpoint.pth")
    teacher = model.build_teacher(str(tmp_path / "checkpoint.pth"))
    assert close(teacher(x), dino_forward(state, x), 1e-4)


def test_teacher_from_our_own_half_precision_file(tmp_path):
    half = {k: v.half() for k, v in dino_state().items()}
    small = model.teacher_from_state(model.dino_to_torchvision(half))
    torch.save({k: v.half() for k, v in small.vit.state_dict().items()}, tmp_path / "own.pt")
    teacher, x = model.build_teacher(tmp_path / "own.pt"), torch.randn(2, 3, 12, 12)
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    assert close(teacher(x), dino_forward({k: v.float() for k, v in half.items()}, x), 1e-4)


def test_positions_at_another_size():
    state = dino_state()
    grid = state["pos_embed"][0, 1:].view(3, 3, 128)
    grid[..., 0], grid[..., 1] = torch.arange(3.0)[:, None], torch.arange(3.0)  # row, column number
    teacher = model.teacher_from_state(model.dino_to_torchvision(state))
    assert torch.equal(teacher.positions(3, 3), state["pos_embed"])
    table = teacher.positions(4, 6)
    assert table.shape == (1, 1 + 4 * 6, 128) and torch.equal(table[:, 0], state["pos_embed"][:, 0])
    rows, columns = table[0, 1:, :2].view(4, 6, 2).unbind(-1)
    assert close(rows, rows[:, :1].expand(4, 6)) and close(columns, columns[:1].expand(4, 6))
    assert (rows.diff(dim=0) > 0.1).all() and close(rows + rows.flip(0), torch.full((4, 6), 2.0))
    # Column 2 of 6 lies at (2 + 0.5) / 2 - 0.5 = 0.75; the cubic gives 0.8789 * 1 - 0.1055 * 2
    assert close(columns[:, 2], torch.tensor(0.66796875), 1e-4)
    assert teacher.positions(1, 9).shape == table[:, :10].shape
    assert not close(teacher.positions(1, 9), state["pos_embed"], 0.1)  # nine patches, but in a row
    assert (columns.diff(dim=1) > 0.1).all()
    assert close(columns + columns.flip(1), torch.full((4, 6), 2.0))

    x = torch.randn(2, 3, 4 * 4, 6 * 4)
    assert close(teacher(x), dino_forward(state | {"pos_embed": table}, x), 1e-4)


@pytest.mark.parametrize("name, tokens, width, size", [                         # DINO: 85 M, 21 M
    ("dino_vitb16", 197, 768, 85_798_656), ("dino_vitb8", 785, 768, 85_807_872),
    ("dino_vits16", 197, 384, 21_665_664)])
def test_hub_architectures(name, tokens, width, size):
    with torch.device("meta"):                                              # shapes only, no memory
        teacher = model.build_teacher(name, random_weights=True)
        assert teacher(torch.empty(2, 3, 224, 224)).shape == (2, tokens, width)
    assert sum(p.numel() for p in teacher.parameters()) == size


# ---- teachers by name ----------------------------------------------------------------------------

class Server(http.server.BaseHTTPRequestHandler):
    """Stands in for DINO's: `files`, name -> (bytes, how many it says they are, or None)."""
    def do_GET(self):
        self.server.asked.append(self.path)
        body, length = self.server.files.get(self.path, (b"", 0))
        self.send_response(200 if body else 404)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server on this machine; what is downloaded from it is kept in `hub.cache`."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        server.files, server.asked, server.cache = {}, [], tmp_path / "checkpoints"
        url = f"http://127.0.0.1:{server.server_port}/{{0}}.pth"
        monkeypatch.setattr(model, "DINO_URL", url)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def one_line(error):
    return "\n" not in str(error.value) and str(error.value)


def saved(content, **flags):
    """The bytes of the file that torch.save makes."""
    file = io.BytesIO()
    torch.save(content, file, **flags)
    return file.getvalue()


def test_hub_teacher_is_downloaded_once(hub, capfd):
    state, x = dino_state(), torch.randn(2, 3, 12, 12)
    body = saved(state)
    hub.files["/deitsmall8.pth"] = (body, len(body))
    first = model.build_teacher("dino_vits8")(x)
    assert close(first, dino_forward(state, x), 1e-4)
    assert re.search(r"100(\.0)?%", capfd.readouterr().err)                     # its progress
    assert torch.equal(model.build_teacher("dino_vits8")(x), first)
    assert hub.asked == ["/deitsmall8.pth"] and capfd.readouterr().err == ""
    assert [(f.name, f.read_bytes()) for f in hub.cache.iterdir()] == [("deitsmall8.pth", body)]


@pytest.mark.parametrize("says_length", [True, False])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_half_a_download_is_not_kept(hub, zipped, says_length):
    body = saved(dino_state(), _use_new_zipfile_serialization=zipped)
    for sent in (len(body) // 2, len(body) - 1, 0):
        hub.files["/vitbase16.pth"] = (body[:sent], len(body) if says_length else None)
        with pytest.raises(OSError, match="nothing is kept. Try again") as error:
            model.build_teacher("dino_vitb16")
        assert one_line(error) and list(hub.cache.iterdir()) == []
    hub.files["/vitbase16.pth"] = (body, len(body))
    assert model.build_teacher("dino_vitb16").width == 128 and len(hub.asked) == 4


def test_hub_teacher_without_a_network(hub, monkeypatch):
    for url, reason in ((model.DINO_URL, "404"), ("http://127.0.0.1:9/{0}.pth", "refused")):
        monkeypatch.setattr(model, "DINO_URL", url)
        with pytest.raises(OSError, match=reason) as error:
            model.build_teacher("dino_vitb16")
        words = one_line(error).split()
        assert {url.format("vitbase16"), "--teacher", "--random-teacher"} <= set(words)
        assert list(hub.cache.iterdir()) == []


@pytest.mark.parametrize("content, words", [
    (saved({"fc.weight": torch.ones(2)}), "no vision transformer"),
    (saved({"teacher": 3}), "no vision transformer"), (saved([1, 2]), "holds a list"),
    (b"<html>not here</html>", "damaged or no PyTorch checkpoint")])
def test_hub_serves_something_else(hub, content, words):
    hub.files["/vitbase16.pth"] = (content, len(content))
    with pytest.raises(OSError, match=words) as error:
        model.build_teacher("dino_vitb16")
    assert model.DINO_URL.format("vitbase16") in one_line(error) and list(hub.cache.iterdir()) == []


@pytest.mark.parametrize("content, words", [
    (saved(dino_state())[:-100], "damaged"), (saved({"fc.weight": torch.ones(2)}), "no teacher"),
    (b"", "damaged")])
def test_a_bad_file_that_was_kept_is_named_and_left_alone(hub, content, words):
    kept = hub.cache / "deitsmall16.pth"
    kept.parent.mkdir()
    kept.write_bytes(content)
    with pytest.raises(ValueError, match=f"{kept}.* {words}.*; delete it, and the next") as error:
        model.build_teacher("dino_vits16")
    assert one_line(error) and kept.read_bytes() == content and hub.asked == []
    kept.unlink()
    body = saved(dino_state())
    hub.files["/deitsmall16.pth"] = (body, len(body))
    assert model.build_teacher("dino_vits16").patch == 4


def test_unknown_and_incomplete_teachers(tmp_path):
    with pytest.raises(FileNotFoundError, match="no teacher 'dino'.*dino_vitb16"):
        model.build_teacher("dino")
    with pytest.raises(ValueError, match="--random-teacher needs one of dino_vitb16"):
        model.build_teacher("shapes", random_weights=True)
    state = dino_state()
    for damage, words in (({"blocks.1.mlp.fc2.bias": None}, "incomplete.*layer_1.mlp.3.bias"),
                          ({"norm.weight": None}, "no vision transformer"),
                          ({"pos_embed": torch.zeros(1, 12, 128)}, "pos_embedding"),
                          (dino_state(width=200), "num_heads"),
                          ({"cls_token": 5}, "teacher"), ({5: torch.zeros(1)}, "teacher")):
        bad = {k: v for k, v in (state | damage).items() if v is not None}
        torch.save(bad, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match=words) as error:
            model.build_teacher(tmp_path / "bad.pt")
        assert one_line(error)


@torch.no_grad()
def test_the_shipped_teacher_knows_shapes_better_than_pixels_do():
    teacher = model.build_teacher("shapes")
    assert (teacher.width, teacher.patch, teacher.image_size) == (128, 4, 32)
    train_set, test_set = (data.load("shapes", split, 32, n)
                           for split, n in (("train", 500), ("test", 250)))
    cls, pixels = (
        evaluate.knn_accuracy(see(train_set.images), train_set.labels, see(test_set.images),
                              test_set.labels, 20)[0]
        for see in (lambda x: teacher(data.normalize(x))[:, 0], lambda x: x.flatten(1).float()))
    assert cls > pixels + 10 and cls > 50                   # % of ten shapes


# ---- checkpoints ---------------------------------------------------------------------------------

@pytest.mark.parametrize("disc", ["softmax", "gumbel", "vq"])
def test_checkpoint_round_trip(tiny_trainer, tmp_path, disc):
    trainer = tiny_trainer("--disc", disc)
    trainer.train_part()
    torch.save(trainer.state(), tmp_path / "ckpt.pt")
    config, teacher, student = model.load_checkpoint(tmp_path / "ckpt.pt")
    assert config == train.config_of(trainer.args) and config["disc"] == disc
    assert not any(m.training for m in (*teacher.modules(), *student.modules()))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        original = trainer.student.eval()
        said, ours = (s.describe(teacher(x), hard=True) for s in (student, original))
        assert torch.equal(said.ids, ours.ids) and torch.equal(said.logits, ours.logits)
        z, z_ours = (s.interpret(said.embeddings, said.drafts) for s in (student, original))
        assert torch.equal(z, z_ours)
    assert student.mean.abs().sum() > 0 and teacher(x).equal(trainer.teacher(x))
    assert model.build_teacher(tmp_path / "ckpt.pt")(x).equal(teacher(x))  # a teacher's file, too


def damaged_checkpoints(state):
    """(what is wrong, what is in the file, what the message says)"""
    without = {k: v for k, v in state.items() if k != "student"}
    changed = lambda **flags: state | {"config": state["config"] | flags}       # noqa: E731
    return [("foreign", {"weight": torch.ones(3)}, "no checkpoint of train.py"),
            ("a list", [1, 2, 3], "holds a list"),
            ("no student", without, "no checkpoint of train.py"),
            ("other vocabulary", changed(vocab=9), "does not fit"),
            ("other depth", changed(interpreter_depth=2), "does not fit"),
            ("other discretizer", changed(disc="vq"), "does not fit"),
            ("flags missing", state | {"config": {"vocab": 8}}, "does not fit"),
            ("flags no dictionary", state | {"config": 5}, "does not fit"),
            ("teacher no dictionary", state | {"teacher": 5}, "does not fit"),
            ("impossible length", changed(length=3), "power of two")]


def test_checkpoints_that_cannot_be_loaded(tiny_trainer, tmp_path):
    state, file = tiny_trainer().state(), tmp_path / "ckpt.pt"
    for what, content, words in damaged_checkpoints(state):
        torch.save(content, file)
        with pytest.raises(ValueError) as error:
            model.load_checkpoint(file)
        assert words in one_line(error), what
    torch.save(state, file)
    whole = file.read_bytes()
    for content in (whole[:len(whole) // 2], whole[:-20], b"", b"PK\x03\x04 not a checkpoint"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="damaged or no PyTorch checkpoint") as error:
            model.load_checkpoint(file)
        assert one_line(error)
    with pytest.raises(FileNotFoundError, match="no file"):
        model.load_checkpoint(tmp_path / "nothing.pt")


class Hostile:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x, 2))])
def test_code_in_a_file_is_refused_and_not_run(tiny_trainer, tmp_path, save):
    victim, file = tmp_path / "victim", tmp_path / "ckpt.pt"
    hostile = Hostile(f"touch '{victim}'")
    save(tiny_trainer().state() | {"epoch": hostile}, file)
    for read in (model.load_checkpoint, model.build_teacher):
        with pytest.raises(ValueError, match="damaged or no PyTorch checkpoint") as error:
            read(file)
        assert one_line(error) and not victim.exists()
    pickle.loads(pickle.dumps(hostile))
    assert victim.exists()                                                    # it would have worked
