"""Tests run from anywhere, on one thread: the sizes are tiny, and sums keep their order."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)
import model
import train

TINY = """--train-images 80 --test-images 40 --batch-size 16 --views 2 --image-size 8 --vocab 8
    --prototypes 16 --hidden 32 --bottleneck 16 --descriptor-depth 1 --interpreter-depth 1
    --epochs 2 --knn-every 0 --device cpu --no-evaluate""".split()


def pytest_addoption(parser):
    parser.addoption("--crashes", type=int, default=3,
                     help="how often test_crash.py kills a run; 20: its long form")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny(tmp_path):
    """tiny(*flags) -> the words of a train.py command that takes a second: a random teacher of one
    block and width 64 from a file, pictures of 8 x 8 pixels, so N = 4 patches. Later flags win."""
    torch.save(model.small_vit(8, 4, 64, 1, 1).vit.state_dict(), tmp_path / "teacher.pt")
    places = ["--teacher", str(tmp_path / "teacher.pt"), "--out", str(tmp_path / "run")]
    return lambda *flags: [*TINY, *places, *flags]


@pytest.fixture
def tiny_trainer(tiny):
    """tiny_trainer(*flags) -> a train.Trainer of that size with random pictures, ready to go."""
    def make(*flags):
        args = train.parse(tiny(*flags))
        teacher = model.build_teacher(args.teacher)
        student, head = model.build_student(vars(args), teacher.width)
        images = torch.randint(256, (32, 3, 8, 8), dtype=torch.uint8)
        pictures = train.data.ImageSet(images, None, [])
        train.fit_teacher_statistics(teacher, student, head, pictures, args)
        return train.Trainer(args, teacher, student, head, images)
    return make
