"""Known answers for teachers.py: what the libraries return for their own tiny models, the forward
pass of DINO and its kin written down once more, a stand-in for the download site, refusals."""
import argparse
import http.server
import io
import json
import os
import pickle
import re
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.vision_transformer import VisionTransformer

import data
import teachers
from fixtures.teachers.make import GRID, HERE, OTHER, images, weights

TOLERANCE = 1e-4


def close(a, b, tolerance=TOLERANCE):
    return a.shape == b.shape and torch.allclose(a, b, atol=tolerance, rtol=0)


def one_line(error):
    return "\n" not in str(error.value) and str(error.value)


def load(state, tmp_path, config=None):
    """The teacher of a file with this dictionary, and with config.json beside it."""
    torch.save(state, tmp_path / "teacher.pth")
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    return teachers.load_teacher(tmp_path / "teacher.pth")


def errors(teacher, patch, expected):
    """Largest error of the tokens at both sizes, (B, N+1, d) each. A teacher must also be frozen,
    in float32, and the same when it comes from a checkpoint of train.py."""
    assert not any(p.requires_grad or p.dtype != torch.float32 for p in teacher.parameters())
    assert not teacher.training and teacher.patch == patch and teacher.image_size == GRID[0] * patch
    file = io.BytesIO()
    torch.save(teacher.state_dict(), file)
    file.seek(0)
    again = teachers.teacher_from_state(torch.load(file, weights_only=True))
    results = [teacher(images(patch, grid)) for grid in (GRID, OTHER)]
    assert all(again(images(patch, grid)).equal(r) for grid, r in zip((GRID, OTHER), results))
    assert [r.shape for r in results] == [tokens.shape for tokens in expected]
    return [(r - tokens).abs().max() for r, tokens in zip(results, expected)]


# ---- timm, Hugging Face and torchvision ----------------------------------------------------------

@pytest.mark.parametrize("name", ["timm_dino", "timm_dinov2", "timm_dinov2_registers",
                                  "hugging_face_vit", "hugging_face_vit_in_memory",
                                  "hugging_face_dinov2", "hugging_face_dinov2_registers"])
def test_agrees_with_the_library(tmp_path, name):
    fixture = torch.load(HERE / f"{name}.pt", weights_only=True)
    teacher = load(weights(fixture["shapes"]), tmp_path, fixture["config"])
    assert max(errors(teacher, fixture["patch"], fixture["outputs"])) < TOLERANCE


def read_safetensors(path):
    """The format: length of the header (8 bytes), JSON header, values."""
    raw = Path(path).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    return {name: torch.frombuffer(bytearray(raw[start + entry["data_offsets"][0]:]),
                                   dtype=torch.float32, count=torch.Size(entry["shape"]).numel())
            .view(entry["shape"]) for name, entry in header.items()}


def test_hugging_face_folder_with_safetensors(monkeypatch):
    try:
        import safetensors.torch                                                # noqa: F401
    except ImportError:                                     # a stand-in for the optional package
        module = types.SimpleNamespace(load_file=read_safetensors)
        monkeypatch.setitem(sys.modules, "safetensors", types.SimpleNamespace(torch=module))
        monkeypatch.setitem(sys.modules, "safetensors.torch", module)
    outputs = torch.load(HERE / "hugging_face_vit.pt", weights_only=True)["outputs"]
    teacher = teachers.load_teacher(HERE / "hugging_face_vit" / "model.safetensors")
    assert max(errors(teacher, 8, outputs)) < TOLERANCE
    assert teacher.get_extra_state()["heads"] == 4          # not 64 channels: config.json has it


def test_without_safetensors_the_message_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="needs a package: pip install safetensors$") as error:
        teachers.load_teacher(HERE / "hugging_face_vit" / "model.safetensors")
    assert one_line(error)


def test_epsilon_and_heads_without_a_config(tmp_path):
    for name, eps in (("hugging_face_vit_in_memory", 1e-12), ("hugging_face_dinov2", 1e-6)):
        fixture = torch.load(HERE / f"{name}.pt", weights_only=True)
        teacher = load(weights(fixture["shapes"]), tmp_path)
        assert close(teacher(images(fixture["patch"], GRID)), fixture["outputs"][0])
        assert (teacher.get_extra_state()["eps"], teacher.get_extra_state()["heads"]) == (eps, 2)


def test_agrees_with_torchvision(tmp_path):
    vit = VisionTransformer(32, 8, 2, 2, 128, 512).eval()
    vit.load_state_dict(weights({k: v.shape for k, v in vit.state_dict().items()}))
    teacher = load(vit.state_dict(), tmp_path)
    with torch.no_grad():
        tokens = torch.cat([vit.class_token, vit._process_input(images(8, GRID))], 1)
        expected = [vit.encoder(tokens)]
        table = vit.encoder.pos_embedding
        vit.encoder.pos_embedding = torch.nn.Parameter(resized(table, *OTHER))
        patches = vit.conv_proj(images(8, OTHER)).flatten(2).mT
        expected.append(vit.encoder(torch.cat([vit.class_token, patches], 1)))
    assert max(errors(teacher, 8, expected)) < TOLERANCE


# ---- DINO, iBOT, DINOv2, MAE and MoCo v3: from the names of their parameters ---------------------

def vit_shapes(width=128, depth=2, patch=8, side=4):
    """DINO's names -> shapes; those of iBOT, DINOv2, MAE, MoCo v3 and timm are the same."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + side**2, width),
              "patch_embed.proj.weight": (width, 3, patch, patch),
              "patch_embed.proj.bias": (width,)}
    linears = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    norms = ["norm"]
    for i in range(depth):
        norms += [f"blocks.{i}.norm1", f"blocks.{i}.norm2"]
        for name, (n, m) in linears.items():
            shapes[f"blocks.{i}.{name}.weight"] = (n * width, m * width)
            shapes[f"blocks.{i}.{name}.bias"] = (n * width,)
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes


def scales(*names, width=128, depth=2):
    return {f"blocks.{i}.{name}": (width,) for i in range(depth) for name in names}


def resized(table, h, w, offset=0.0, antialias=False):
    """(1, 1 + s * s, d) -> (1, 1 + h * w, d) as the repositories write it."""
    side = int((table.shape[1] - 1) ** 0.5)
    if (h, w) == (side, side):
        return table
    scale = ((h + offset) / side, (w + offset) / side) if offset else None
    grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, None if scale else (h, w), scale, "bicubic", antialias=antialias)
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def reference(state, x, heads=2, eps=1e-6, **interpolation):
    """The forward pass of DINO's vision_transformer.py with DINOv2's LayerScale and registers and
    iBOT's LayerScale (x (B, 3, H, W) -> (B, N+1, d)); compared once with the code of all five."""
    w = lambda name: (state[name + ".weight"], state[name + ".bias"])           # noqa: E731
    width, n = state["cls_token"].shape[-1], 0
    norm = lambda x, name: F.layer_norm(x, (width,), *w(name), eps=eps)         # noqa: E731
    x = F.conv2d(x, *w("patch_embed.proj"), stride=state["patch_embed.proj.weight"].shape[-1])
    positions = resized(state["pos_embed"], *x.shape[-2:], **interpolation)
    x = torch.cat([state["cls_token"].repeat(len(x), 1, 1), x.flatten(2).mT], 1) + positions
    if "register_tokens" in state:
        n = state["register_tokens"].shape[1]
        x = torch.cat([x[:, :1], state["register_tokens"].repeat(len(x), 1, 1), x[:, 1:]], 1)
    for block in sorted({name.split(".norm1")[0] for name in state if ".norm1.w" in name}):
        gains = [state.get(f"{block}.ls{i}.gamma", state.get(f"{block}.gamma_{i}", 1.0))
                 for i in (1, 2)]
        qkv = F.linear(norm(x, f"{block}.norm1"), *w(f"{block}.attn.qkv"))
        q, k, v = qkv.view(*x.shape[:2], 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        y = (q @ k.mT * (width // heads) ** -0.5).softmax(-1) @ v
        x = x + gains[0] * F.linear(y.transpose(1, 2).flatten(2), *w(f"{block}.attn.proj"))
        y = F.gelu(F.linear(norm(x, f"{block}.norm2"), *w(f"{block}.mlp.fc1")))
        x = x + gains[1] * F.linear(y, *w(f"{block}.mlp.fc2"))
    x = norm(x, "norm")
    return torch.cat([x[:, :1], x[:, 1 + n:]], 1)


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def junk(*names):
    return {name: torch.ones(3, 2) for name in names}


def sources():
    """name -> (encoder, the file's dictionary, arguments of the reference)."""
    plain, dino = weights(vit_shapes()), {"offset": 0.1}
    other = {k: v + 1 for k, v in plain.items()}
    head = junk("module.head.mlp.0.weight", "module.head.last_layer.weight_g")
    args = argparse.Namespace(arch="vit_base", lr=5e-4, output_dir=None)
    yield "dino", plain, plain, dino
    yield "dino_training", plain, {
        "student": prefixed("module.backbone.", other), "optimizer": {"state": {}}, "epoch": 100,
        "teacher": prefixed("module.backbone.", plain) | head, "args": args}, dino
    masked = weights(vit_shapes() | scales("gamma_1", "gamma_2") | {"masked_embed": (1, 128)})
    yield "ibot_training", masked, {
        "student": prefixed("module.backbone.", other), "args": args,
        "teacher": prefixed("backbone.", masked) | junk("head.last_layer2.weight_v")}, dino
    yield "ibot", plain, {"state_dict": plain}, dino
    names = vit_shapes(patch=14) | scales("ls1.gamma", "ls2.gamma") | {"mask_token": (1, 128)}
    two = weights(names)
    yield "dinov2", two, two, dino
    registers = weights(names | {"register_tokens": (1, 4, 128)})
    yield "dinov2_registers", registers, registers, {"antialias": True}
    chunked = {re.sub(r"^blocks\.", "blocks.0.", name): value for name, value in registers.items()}
    yield "dinov2_training", registers, {
        "teacher": prefixed("backbone.", chunked) | junk("dino_head.mlp.0.weight",
                                                         "ibot_head.last_layer.weight_v")
    }, {"antialias": True}
    yield "mae", plain, {"model": plain | junk(
        "mask_token", "decoder_pos_embed", "decoder_blocks.0.norm1.weight", "decoder_embed.weight",
        "decoder_norm.bias", "decoder_pred.bias")}, {}
    moco, wrong = weights(vit_shapes(width=96)), weights(vit_shapes(width=96), seed=2)
    predictor = junk("module.predictor.0.weight", "module.base_encoder.head.0.weight")
    yield "moco", moco, {"epoch": 300, "arch": "vit_small", "state_dict": predictor | prefixed(
        "module.base_encoder.", moco) | prefixed("module.momentum_encoder.", wrong)}, {"heads": 12}
    yield "moco_momentum", moco, {"state_dict": prefixed("module.momentum_encoder.", moco)
                                  }, {"heads": 12}


@pytest.mark.parametrize("encoder, file, flags", [pytest.param(*s[1:], id=s[0]) for s in sources()])
def test_agrees_with_the_source(tmp_path, encoder, file, flags):
    patch = encoder["patch_embed.proj.weight"].shape[-1]
    expected = [reference(encoder, images(patch, grid), **flags) for grid in (GRID, OTHER)]
    assert max(errors(load(file, tmp_path), patch, expected)) < TOLERANCE


def test_our_own_half_precision_file(tmp_path):
    half = {k: v.half() for k, v in weights(vit_shapes()).items()}
    small = load(half, tmp_path)
    teacher = load({k: v.half() for k, v in small.vit.state_dict().items()}, tmp_path)
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    expected = reference({k: v.float() for k, v in half.items()}, images(8, GRID))
    assert close(teacher(images(8, GRID)), expected)


def test_vit_h_has_heads_of_80_channels():
    state = weights(vit_shapes(width=1280, depth=1, patch=2, side=1))
    teacher = teachers.teacher_from_state(teachers.to_torchvision(state, {}))
    assert close(teacher(images(2, (1, 1))), reference(state, images(2, (1, 1)), heads=16))


def test_positions_at_another_size():
    vit = teachers.small_vit(12, 4, 64, 1, 1).requires_grad_(False)
    own = vit.vit.encoder.pos_embedding
    grid = own[0, 1:].view(3, 3, 64)
    grid[..., 0], grid[..., 1] = torch.arange(3.0)[:, None], torch.arange(3.0)  # row, column number
    assert torch.equal(vit.positions(3, 3), own)
    table = vit.positions(4, 6)
    assert table.shape == (1, 1 + 4 * 6, 64) and torch.equal(table[:, 0], own[:, 0])
    rows, columns = table[0, 1:, :2].view(4, 6, 2).unbind(-1)
    assert close(rows, rows[:, :1].expand(4, 6)) and close(columns, columns[:1].expand(4, 6))
    assert (rows.diff(dim=0) > 0.1).all() and close(rows + rows.flip(0), torch.full((4, 6), 2.0))
    # Column 2 of 6 lies at (2 + 0.5) / 2 - 0.5 = 0.75; the cubic gives 0.8789 * 1 - 0.1055 * 2
    assert close(columns[:, 2], torch.tensor([0.66796875]).expand(4))
    assert vit.positions(1, 9).shape == table[:, :10].shape
    assert not close(vit.positions(1, 9), own, 0.1)                 # nine patches, but in a row
    vit.interpolate_offset = 0.1
    shifted = vit.positions(4, 6)[0, 1:, 1].view(4, 6)
    assert close(shifted[:, 2], torch.tensor([cubic(2.5 * 3 / 6.1 - 0.5)]).expand(4))


def cubic(t):
    """Columns 0, 1, 2 at position t of [0, 1], with Keys' cubic of a = -0.75; the first repeats."""
    a = -0.75
    near = lambda d: (a + 2) * d**3 - (a + 3) * d**2 + 1                        # noqa: E731
    far = lambda d: a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a                 # noqa: E731
    return near(1 - t) * 1 + far(2 - t) * 2


@pytest.mark.parametrize("name, tokens, width, size", [     # DINO: 85 M, 21 M; DINOv2: 22 M
    ("dino_vitb16", 197, 768, 85_798_656), ("dino_vitb8", 785, 768, 85_807_872),
    ("dino_vits16", 197, 384, 21_665_664), ("dinov2_vits14", 257, 384, 22_046_976)])
def test_hub_architectures(name, tokens, width, size):
    with torch.device("meta"):                                              # shapes only, no memory
        teacher = teachers.load_teacher(f"random:{name}")
        assert teacher(torch.empty(2, 3, 224, 224)).shape == (2, tokens, width)
    assert sum(p.numel() for p in teacher.parameters()) == size
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


# ---- names ---------------------------------------------------------------------------------------

def dino_state():
    return weights(vit_shapes(patch=4, side=3))


class Server(http.server.BaseHTTPRequestHandler):
    """Stands in for the download site: `files`, path -> (bytes, the length it claims, or None)."""
    def do_GET(self):
        self.server.requested.append(self.path)
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
        server.files, server.requested, server.cache = {}, [], tmp_path / "checkpoints"
        monkeypatch.setattr(teachers, "SITE", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def saved(content, **flags):
    """The bytes of the file that torch.save makes."""
    file = io.BytesIO()
    torch.save(content, file, **flags)
    return file.getvalue()


VITS8 = "/dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth"
VITB14 = "/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth"


@pytest.mark.parametrize("name, path", [("dino_vits8", VITS8), ("dinov2_vitb14", VITB14)])
def test_hub_teacher_is_downloaded_once(hub, capfd, name, path):
    state, x = dino_state(), torch.randn(2, 3, 12, 12)
    body = saved(state)
    hub.files[path] = (body, len(body))
    first = teachers.load_teacher(name)(x)
    assert close(first, reference(state, x))
    assert re.search(r"100(\.0)?%", capfd.readouterr().err)                     # its progress
    assert torch.equal(teachers.load_teacher(name)(x), first)
    assert hub.requested == [path] and capfd.readouterr().err == ""
    assert [(f.name, f.read_bytes()) for f in hub.cache.iterdir()] == [(Path(path).name, body)]


@pytest.mark.parametrize("sends_length", [True, False])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_half_a_download_is_not_kept(hub, zipped, sends_length):
    body = saved(dino_state(), _use_new_zipfile_serialization=zipped)
    for sent in (len(body) // 2, len(body) - 1, 0):
        hub.files[VITS8] = (body[:sent], len(body) if sends_length else None)
        with pytest.raises(OSError, match="nothing is kept. Try again") as error:
            teachers.load_teacher("dino_vits8")
        assert one_line(error) and list(hub.cache.iterdir()) == []
    hub.files[VITS8] = (body, len(body))
    assert teachers.load_teacher("dino_vits8").width == 128 and len(hub.requested) == 4


def test_hub_teacher_without_a_network(hub, monkeypatch):
    for site, reason in ((teachers.SITE, "404"), ("http://127.0.0.1:9", "refused")):
        monkeypatch.setattr(teachers, "SITE", site)
        with pytest.raises(OSError, match=reason) as error:
            teachers.load_teacher("dino_vits8")
        assert {site + VITS8, "--teacher", "random:dino_vits8"} <= set(one_line(error).split())
        assert list(hub.cache.iterdir()) == []


@pytest.mark.parametrize("content, words", [
    (saved({"fc.weight": torch.ones(2)}), "no vision transformer"),
    (saved({"teacher": 3}), "'teacher' in it is a int"), (saved([1, 2]), "holds a list"),
    (b"<html>not here</html>", "damaged or no PyTorch checkpoint")])
def test_hub_serves_something_else(hub, content, words):
    hub.files[VITS8] = (content, len(content))
    with pytest.raises(OSError, match=words) as error:
        teachers.load_teacher("dino_vits8")
    assert teachers.SITE + VITS8 in one_line(error) and list(hub.cache.iterdir()) == []


@pytest.mark.parametrize("content, words", [
    (saved(dino_state())[:-100], "damaged"), (saved({"fc.weight": torch.ones(2)}), "no teacher"),
    (b"", "damaged")])
def test_a_bad_file_that_was_kept_is_named_and_left_alone(hub, content, words):
    kept = hub.cache / Path(VITS8).name
    kept.parent.mkdir()
    kept.write_bytes(content)
    with pytest.raises(ValueError, match=f"{kept}.* {words}.*; delete it, and the next") as error:
        teachers.load_teacher("dino_vits8")
    assert one_line(error) and kept.read_bytes() == content and hub.requested == []
    kept.unlink()
    body = saved(dino_state())
    hub.files[VITS8] = (body, len(body))
    assert teachers.load_teacher("dino_vits8").patch == 4


def test_unknown_names():
    with pytest.raises(FileNotFoundError, match="no teacher 'dino'.*dino_vitb16.*shapes"):
        teachers.load_teacher("dino")
    with pytest.raises(ValueError, match="random: needs one of dino_vitb16.*, not 'shapes'"):
        teachers.load_teacher("random:shapes")


@torch.no_grad()
def test_the_shipped_teacher_has_better_k_nn_than_pixels():
    teacher = teachers.load_teacher("shapes")
    assert (teacher.width, teacher.patch, teacher.image_size) == (128, 4, 32)
    train, test = (data.load("shapes", split, 32, n, 0)
                   for split, n in (("train", 500), ("test", 250)))
    accuracies = []
    for features in (lambda x: teacher(data.normalize(x))[:, 0], lambda x: x.flatten(1).float()):
        x, y = (F.normalize(features(part.images), dim=-1) for part in (train, test))
        nearest = train.labels[(y @ x.T).topk(20).indices].mode().values
        accuracies.append((nearest == test.labels).float().mean())
    assert accuracies[0] > accuracies[1] + 0.1 and accuracies[0] > 0.5                  # of ten


# ---- refusals: one line that names what was found ------------------------------------------------

def hugging_face_state(name="hugging_face_dinov2"):
    return weights(torch.load(HERE / f"{name}.pt", weights_only=True)["shapes"])


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


def refusals():
    state, hf = dino_state(), hugging_face_state()
    yield {"fc.weight": torch.ones(2)}, ("missing class_token, encoder.layers.encoder_layer_0.*; "
                                         "found fc.weight; expected the parameters of DINO, DINOv2")
    yield {k: v for k, v in state.items() if "blocks" not in k}, (
        "missing encoder.layers.encoder_layer_0.ln_1.weight; found class_token, conv_proj.bias")
    yield {}, "found nothing; expected the parameters of DINO"
    yield {5: torch.zeros(1)}, "found 5; expected"
    yield state | {"cls_token": 5}, "'cls_token' in it is a int, not a tensor"
    yield without(state, "blocks.1.mlp.fc2.bias"), (
        "missing vit.encoder.layers.encoder_layer_1.mlp.3.bias; unexpected nothing")
    yield without(state, "norm.weight", "norm.bias") | junk("fc_norm.weight"), (
        "missing vit.encoder.ln.bias, vit.encoder.ln.weight; unexpected vit.fc_norm.weight")
    yield state | junk(*(f"blocks.{i}.attn.q_norm.weight" for i in range(5))), (
        "unexpected .*, .*, .* and 2 more")
    yield state | {"pos_embed": torch.zeros(1, 12, 128)}, "for 11 patches and CLS, expected a squ"
    yield state | {"pos_embed": torch.ones(1, 10, 64)}, r"shape \(1, 10, 64\), expected \(1, 10, 1"
    yield weights(vit_shapes(width=200)), "width 200 is no multiple of its heads, 3"
    yield without(state, "patch_embed.proj.weight") | junk("patch_embed.proj.0.weight"), (
        "patch embedding is conv_proj.0.weight, conv_proj.bias, expected one convolution")
    yield state | junk("dist_token"), "unexpected vit.dist_token"
    yield state | junk("blocks.0.mlp.w12.weight", "blocks.0.mlp.w3.weight"), "SwiGLU.*ViT-S, B or L"
    packed = {"blocks.0.mlp.fc1.weight": (8, 128), "blocks.0.mlp.fc2.weight": (128, 4)}
    yield state | weights(packed), "SwiGLU"                                                 # timm
    yield hf | junk("encoder.layer.0.mlp.weights_in.weight"), "SwiGLU"
    yield hf | junk("encoder.layer.0.mlp.gate_proj.weight"), "SwiGLU"
    yield without(hf, "encoder.layer.0.attention.attention.key.weight"), (
        "missing .*in_proj_weight; unexpected .*self_attention.q.weight, .*self_attention.v.weight")
    yield without(hf, "encoder.layer.1.layer_scale2.lambda1", "encoder.layer.1.mlp.fc2.bias"), (
        "missing .*encoder_layer_1.mlp.3.bias")


@pytest.mark.parametrize("state, words", list(refusals()))
def test_what_is_no_plain_vit_is_refused(tmp_path, state, words):
    with pytest.raises(ValueError, match=words) as error:
        load(state, tmp_path)
    assert f"{tmp_path / 'teacher.pth'} is no teacher: " in one_line(error)


@pytest.mark.parametrize("config, words", [
    ({"hidden_act": "quick_gelu"}, "config.json has hidden_act quick_gelu, expected gelu"),
    ({"hidden_size": 64}, "config.json has hidden_size 64, expected 128"),
    ({"num_hidden_layers": 12}, "config.json has num_hidden_layers 12, expected 2"),
    ({"num_attention_heads": 3}, "width 128 is no multiple of its heads, 3")])
def test_a_config_of_another_model_is_refused(tmp_path, config, words):
    with pytest.raises(ValueError, match=words) as error:
        load(hugging_face_state(), tmp_path, {"model_type": "dinov2"} | config)
    assert one_line(error)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is no JSON"):
        load(hugging_face_state(), tmp_path)


def test_a_config_of_train_py_beside_a_checkpoint_is_not_read(tmp_path):
    teacher = load(hugging_face_state(), tmp_path, {"hidden_size": 1, "num_attention_heads": 3})
    again = load({"teacher": teacher.state_dict(), "student": junk("mean"), "epoch": 1}, tmp_path)
    assert again(images(14, GRID)).equal(teacher(images(14, GRID)))


def test_weights_of_a_teacher_with_other_settings_are_refused():
    teacher = teachers.load_teacher("shapes")
    state = teacher.state_dict()
    state["_extra_state"] = state["_extra_state"] | {"heads": 4}
    with pytest.raises(ValueError, match="'heads': 4"):
        teacher.load_state_dict(state)


class Hostile:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x, 2))])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, save):
    victim, file = tmp_path / "victim", tmp_path / "teacher.pt"
    hostile = Hostile(f"touch '{victim}'")
    save(dino_state() | {"epoch": hostile}, file)
    with pytest.raises(ValueError, match="damaged or no PyTorch checkpoint") as error:
        teachers.load_teacher(file)
    assert one_line(error) and not victim.exists()
    pickle.loads(pickle.dumps(hostile))
    assert victim.exists()                                                    # it would have worked
