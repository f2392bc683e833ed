"""hubconf.py: symbols by torch.hub are the student's, and other programs keep their own modules."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import data
import flags
import hubconf
import model
import teachers

ROOT = Path(__file__).parent.parent
FLAGS = """--train-images 80 --test-images 40 --image-size 8 --vocab 8 --prototypes 16 --hidden 32
    --descriptor 1x4 --interpreter 1x4 --device cpu""".split()


@pytest.fixture
def ckpt(tmp_path):
    """ckpt(*flags) -> the file of an untrained student with statistics in its BatchNorms, without
    which all images get the same symbols: 8 symbols of 8, d = 64, N = 4 patches."""
    def make(*words):
        args = flags.parse([*FLAGS, *words])
        teacher = teachers.small_vit(8, 4, 64, 1, 1).eval()
        student = checkpoint.STUDENTS[args.recipe](args, teacher.width)
        images = torch.randint(256, (32, 3, 8, 8), dtype=torch.uint8)
        with torch.no_grad():
            z_t = student.preprocess(teacher(data.normalize(images)))
            for _ in range(20):
                student.describe(z_t)
        torch.save({"config": checkpoint.config_of(args), "teacher": teacher.state_dict(),
                    "student": student.state_dict()}, tmp_path / "ckpt.pt")
        return str(tmp_path / "ckpt.pt")
    return make


@pytest.mark.parametrize("recipe, disc", [("paper", "softmax"), ("stable", "softmax"),
                                          ("stable", "gumbel"), ("stable", "vq")])
def test_symbols_and_what_is_decoded_from_them_are_the_students(ckpt, recipe, disc):
    path = ckpt("--recipe", recipe, "--disc", disc)
    symbolizer = hubconf.symbolizer(path)
    images = torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8)
    sequence = symbolizer.describe(images, attention=True)
    _, teacher, student = checkpoint.load_model(path)
    z_t = student.preprocess(teacher(data.normalize(images)))
    assert torch.equal(sequence.ids, student.describe(z_t, hard=True).ids)
    assert len(sequence.ids.unique(dim=0)) > 1 and sequence.ids.dtype == torch.int64
    assert torch.allclose(sequence.attention.sum(-1), torch.ones(12, 8))
    z_s = student.interpret(sequence.embeddings)
    assert torch.allclose(symbolizer.decode(sequence.ids), z_s, atol=1e-5)
    assert torch.equal(symbolizer(images), sequence.ids)
    assert torch.equal(symbolizer(images.float() / 255), sequence.ids)
    assert torch.equal(torch.cat([symbolizer(x[None]) for x in images]), sequence.ids)
    assert symbolizer.describe(images).attention is None


def test_an_untrained_stable_student_decodes_to_sums_of_codewords(ckpt):
    symbolizer = hubconf.symbolizer(ckpt())                 # its interpreter corrects nothing yet
    ids = torch.tensor([[3, 1, 4, 1, 5, 2, 6, 5]])
    codewords = [disc.codebook[i] for disc, i in zip(symbolizer.student.disc, ids[0])]
    by_hand = torch.stack([sum(codewords[:n]) for n in (1, 2, 4, 8)])
    assert torch.allclose(symbolizer.decode(ids)[0], by_hand, atol=1e-5)


def test_other_shapes_give_their_central_square_and_training_around_it_changes_nothing(ckpt):
    symbolizer = hubconf.symbolizer(ckpt())
    wide = torch.randint(256, (12, 3, 8, 12), dtype=torch.uint8)
    tall = wide.transpose(2, 3)
    before = symbolizer(wide)
    assert torch.equal(before, symbolizer(wide[..., 2:10]))
    assert torch.equal(symbolizer(tall), symbolizer(tall[:, :, 2:10]))
    torch.nn.Sequential(symbolizer).train()
    symbolizer(255 - wide)
    assert torch.equal(symbolizer(wide), before)


def test_wrong_images_and_symbols_are_refused(ckpt):
    symbolizer = hubconf.symbolizer(ckpt())
    for images in (torch.rand(3, 8, 8), torch.rand(2, 1, 8, 8), 255 * torch.rand(2, 3, 8, 8),
                   torch.full((1, 3, 8, 8), torch.nan), torch.ones(1, 3, 8, 8, dtype=torch.int64)):
        with pytest.raises(ValueError, match="^images .*must be"):
            symbolizer(images)
    for symbols in (torch.zeros(2, 4).long(), torch.full((1, 8), 8), torch.full((1, 8), -1)):
        with pytest.raises(ValueError, match="symbols must be"):
            symbolizer.decode(symbols)
    with pytest.raises(FileNotFoundError, match="none.pt"):
        hubconf.symbolizer("none.pt")


def test_modules_of_our_own_folder_are_shared():
    assert hubconf._checkpoint is checkpoint and sys.modules["model"] is model


def test_torch_hub_lists_the_symbolizer_alone():
    listed = [name for name, x in vars(hubconf).items() if callable(x) and not name.startswith("_")]
    assert listed == ["symbolizer"]                         # as torch.hub.list does


# A program in whose folder each module of NAMES has a state. torch.hub comes before its modules,
# then after them; last a plain import, with our folder behind the program's in sys.path.
NAMES = ("model", "data", "losses", "train", "evaluate", "utils", "checkpoint", "distributed")
PROGRAM = """
import importlib, sys, torch

root, ckpt, *names = sys.argv[1:]
images = torch.rand(3, 3, 8, 8)

def load():
    symbolizer = torch.hub.load(root, "symbolizer", source="local", checkpoint=ckpt)
    files = [getattr(module, "__file__", None) or "" for module in sys.modules.values()]
    assert not [file for file in files if file.startswith(root + "/")]
    return symbolizer

early = load()
symbols = early(images)
for name in names:
    importlib.import_module(name).state.append(name)
assert torch.equal(early(images), symbols)
late = load()
assert torch.equal(late(images), symbols)
assert torch.equal(early.decode(symbols), late.decode(symbols))
for name in names:
    assert importlib.import_module(name).state == ["fresh", name], name
sys.path.append(root)
import hubconf
import model
assert torch.equal(hubconf.symbolizer(ckpt)(images), symbols)
assert importlib.import_module("model").state == ["fresh", "model"]
print(tuple(symbols.shape), tuple(late.decode(symbols).shape))
"""


def test_a_program_with_modules_of_the_same_names_keeps_them(ckpt, tmp_path):
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text("state = ['fresh']\n")
    (tmp_path / "data.py").unlink()
    (tmp_path / "data").mkdir()                             # a package, not a file
    (tmp_path / "data" / "__init__.py").write_text("state = ['fresh']\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run([sys.executable, tmp_path / "program.py", ROOT, ckpt(), *NAMES],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "(3, 8) (3, 4, 64)", done.stderr
