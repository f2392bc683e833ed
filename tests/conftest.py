"""Tests run from anywhere, on one thread: the sizes are tiny, and sums keep their order."""
import multiprocessing
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
import checkpoint
import data
import distributed
import flags
import shapes
import teachers
import train
from progress import Progress

TINY = """--train-images 80 --test-images 40 --batch-size 16 --image-size 8 --vocab 8
    --prototypes 16 --hidden 32 --descriptor 1x4 --interpreter 1x4 --epochs 2 --knn-every 0
    --device cpu --precision float32""".split()
RECIPES = list(checkpoint.STUDENTS)


def pytest_addoption(parser):
    parser.addoption("--crashes", type=int, default=3,
                     help="how often test_crash.py kills a run; 20: its long form")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_progress(monkeypatch):
    """What a script prints must not depend on how slow the machine is: no line of progress is due
    (in this process; tests of progress set their own time)."""
    monkeypatch.setattr(Progress, "last_output", float("inf"))


@pytest.fixture
def tiny(tmp_path):
    """tiny(*words) -> the words of a train.py command that takes a second: a random teacher of one
    block and width 64 from a file, images of 8 x 8 pixels, so N = 4 patches. Later words win."""
    torch.save(teachers.small_vit(8, 4, 64, 1, 1).vit.state_dict(), tmp_path / "teacher.pt")
    paths = ["--teacher", str(tmp_path / "teacher.pt"), "--out", str(tmp_path / "run")]
    return lambda *words: [*TINY, *paths, *words]


@pytest.fixture
def image_folder(tmp_path):
    """image_folder(n) -> a folder with n JPEG files of `shapes`, 8 x 8 pixels, in train/CLASS/."""
    def make(n):
        images, factors, _ = shapes.load("train", n)
        for k, (image, y) in enumerate(zip(images[:, :, ::4, ::4], factors["shape"])):
            path = tmp_path / "images" / "train" / shapes.FACTORS["shape"][y] / f"{k}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        return tmp_path / "images"
    return make


def make_trainer(args, teacher):
    """A train.Trainer with 32 random images of 8 x 8 pixels, ready for step 0."""
    flags.check(args)
    student = checkpoint.STUDENTS[args.recipe](args, teacher.width)
    images = torch.randint(256, (32, 3, 8, 8), dtype=torch.uint8)
    images = data.ImageSet(images, torch.full((32,), -1), [])
    trainer = train.Trainer(args, teacher, student, images)
    student.fit(trainer.tokens.first)
    return trainer


@pytest.fixture
def tiny_trainer(tiny):
    """tiny_trainer(*words) -> a train.Trainer of that size (see `make_trainer`)."""
    def make(*words):
        args = flags.parse(tiny(*words))
        return make_trainer(args, teachers.load_teacher(args.teacher))
    return make


def make_student(*words, width=32):
    """A student of 6 symbols as if after training: no bias is 0, and BatchNorm has statistics; in
    eval mode. words: of a train.py command."""
    args = flags.parse(["--descriptor", "2x4", "--interpreter", "3x2", "--vocab", "6",
                        "--prototypes", "10", "--hidden", "64", *words])
    student = checkpoint.STUDENTS[args.recipe](args, width)
    for name, p in student.named_parameters():
        if p.ndim == 1 or "position" in name:
            p.data.add_(0.3 * torch.randn_like(p))
    student.interpreter.out.weight.data.normal_(std=width ** -0.5)
    for norm in student.descriptor.modules():
        if isinstance(norm, distributed.BatchNorm):
            norm.running_mean.normal_(std=0.5)
            norm.running_var.uniform_(0.5, 2)
    return student.eval()


@pytest.fixture
def unscored(monkeypatch):
    """Whole runs end with their last checkpoint, without the evaluation and the figures."""
    monkeypatch.setattr(train, "finish", lambda *args, **kwargs: None)


@pytest.fixture
def forkserver(monkeypatch):
    """A multiprocessing context whose processes have imported torch already."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "extras.pretrain"])
    return context
