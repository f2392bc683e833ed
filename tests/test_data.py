"""data.py: shapes is a function of (seed, index), the masks are where the object is, files fail by
name."""
import hashlib
import json
import pickle
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

import data
import train

GOLDEN = {
    "factors": [[0, 8, 8, 4], [1, 6, 3, 3], [0, 2, 0, 1], [1, 1, 1, 1], [1, 2, 2, 0]],
    "pixels": [[78, 253, 244, 82], [81, 147, 141, 84], [76, 63, 60, 80]],
    "areas": [133, 162, 72, 92],
}


def test_a_picture_depends_on_seed_and_index_alone():
    images, factors, masks = data.draw_shapes(range(20), seed=3)
    again, same, _ = data.draw_shapes([7, 3], seed=3)
    assert torch.equal(images[[7, 3]], again)
    assert factors["shape"][[7, 3]].tolist() == same["shape"].tolist()
    assert not torch.equal(images, data.draw_shapes(range(20), seed=4)[0])


def test_pictures_are_the_same_on_every_machine():
    """A few numbers of the first picture of stream 0, as first drawn: a change here changes every
    result."""
    images, factors, masks = data.draw_shapes(range(4), seed=0)
    assert [v.tolist() for v in factors.values()] == GOLDEN["factors"]
    # sin and cos may differ in the last bit between processors: one grey level at the most
    assert (images[0, :, 16, 8:24:5].int() - torch.tensor(GOLDEN["pixels"])).abs().max() <= 1
    assert masks.sum((1, 2)).tolist() == GOLDEN["areas"]


def test_train_and_test_are_different_streams():
    train, test = (data.load("shapes", split, 32, 50) for split in ("train", "test"))
    assert not torch.equal(train.images, test.images)
    assert train.classes == data.FACTORS["shape"]
    assert torch.equal(train.labels, train.factors["shape"])


def test_factors_are_balanced_and_independent():
    shapes = data.load("shapes", "train", 32, 4000)
    for name, values in data.FACTORS.items():
        share = shapes.factors[name].bincount(minlength=len(values)) / 4000
        assert (share - 1 / len(values)).abs().max() < 0.03
    pairs = shapes.factors["shape"], shapes.factors["colour"]
    table = torch.zeros(10, 8).index_put_(pairs, torch.ones(()), True)
    assert (table / 4000 - 1 / 80).abs().max() < 0.008


def test_masks_cover_the_object():
    """The object is the brightest and most saturated thing: more saturated than the background."""
    shapes = data.load("shapes", "train", 32, 300)
    saturation = (shapes.images.amax(1).float() - shapes.images.amin(1).float())        # (n, H, W)
    inside = torch.stack([s[m].mean() for s, m in zip(saturation, shapes.masks)])
    outside = torch.stack([s[~m].mean() for s, m in zip(saturation, shapes.masks)])
    assert (inside > outside + 40).float().mean() > 0.99
    rows = torch.arange(32.0).view(1, 32, 1).expand_as(shapes.masks)
    centre = torch.stack([r[m].mean() for r, m in zip(rows, shapes.masks)])
    means = [centre[shapes.factors["row"] == k].mean().item() for k in range(3)]
    assert means[0] + 2 < means[1] < means[2] - 2


def square(path, colour, size=(40, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_folder_with_classes_and_a_corrupt_file(tmp_path, capsys):
    square(tmp_path / "train/red/1.png", (255, 0, 0), (64, 40))
    square(tmp_path / "train/blue/1.png", (0, 0, 255))
    red = tmp_path / "train/red"
    (red / "broken.png").write_bytes((red / "1.png").read_bytes()[:60])
    pictures = data.load(f"folder:{tmp_path}", "train", 32)
    assert pictures.classes == ["blue", "red"] and pictures.labels.tolist() == [0, 1]
    assert pictures.images[:, :, 20, 20].tolist() == [[0, 0, 255], [255, 0, 0]]
    assert pictures.images.shape[-1] == 36                                      # 32 * 8 / 7
    assert pictures.skipped == 1 and "broken.png" in capsys.readouterr().err


def test_flat_folder_has_no_labels(tmp_path):
    square(tmp_path / "a.jpg", (9, 9, 9))
    pictures = data.load(f"folder:{tmp_path}", "train", 32)
    assert pictures.labels.tolist() == [-1] and not pictures.labelled


# Where row 0 and column 0 of the file are to be seen, from the EXIF standard's table
SIDES = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left", 5: "left top",
         6: "right top", 7: "right bottom", 8: "left bottom"}


@pytest.mark.parametrize("kind", ["png", "jpg"])
@pytest.mark.parametrize("orientation", SIDES)
def test_photographs_are_turned_upright(tmp_path, orientation, kind):
    pixels = torch.zeros(24, 24, 3, dtype=torch.uint8)
    pixels[:8, 8:, 0] = pixels[8:, :8, 1] = 255             # rows 0 to 7 red, columns 0 to 7 green
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(pixels.numpy()).save(tmp_path / f"a.{kind}", exif=exif)
    seen = data.read_image(tmp_path / f"a.{kind}", 24).float()
    middles = {"top": seen[:, 2, 12], "bottom": seen[:, -3, 12],
               "left": seen[:, 12, 2], "right": seen[:, 12, -3]}
    red, green = SIDES[orientation].split()
    assert max(middles, key=lambda side: middles[side][0]) == red
    assert max(middles, key=lambda side: middles[side][1]) == green


def test_a_picture_is_its_central_square_however_long_it_is(tmp_path):
    pixels = torch.randint(256, (20, 36, 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "a.png")
    assert torch.equal(data.read_image(tmp_path / "a.png", 20), pixels[:, 8:28].permute(2, 0, 1))
    left = Image.fromarray(pixels[:, :20].numpy())
    left.save(tmp_path / "b.png")
    small = np.array(left.resize((9, 9), Image.Resampling.BICUBIC))
    assert (data.read_image(tmp_path / "b.png", 9).permute(1, 2, 0).numpy() == small).all()
    square(tmp_path / "long.png", (1, 2, 3), (1, 60000))    # resized first, it would take 11 GB
    assert data.read_image(tmp_path / "long.png", 256)[:, 7, 9].tolist() == [1, 2, 3]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_large_jpeg_decoded_small_is_the_same_picture(tmp_path, mode):
    coarse = Image.fromarray(torch.randint(60, 200, (6, 9, 3), dtype=torch.uint8).numpy())
    coarse.resize((900, 600), Image.Resampling.BICUBIC).convert(mode).save(tmp_path / "a.jpg")
    whole = Image.open(tmp_path / "a.jpg").convert("RGB").crop((150, 0, 750, 600))
    whole = np.array(whole.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    seen = data.read_image(tmp_path / "a.jpg", 32).permute(1, 2, 0).numpy()
    assert whole.std() > 20 and abs(seen - whole).mean() < 2


def test_only_formats_that_the_names_promise_are_opened(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")       # Pillow hands these to another program
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(OSError, match="cannot read image .*a.png"):
        data.read_image(tmp_path / "a.png", 8)
    Image.new("RGB", (8, 8), (9, 8, 7)).save(tmp_path / "b.gif")
    (tmp_path / "b.gif").rename(tmp_path / "b.jpg")         # common on the web, and harmless
    assert data.read_image(tmp_path / "b.jpg", 8)[:, 0, 0].tolist() == [9, 8, 7]


def test_a_folder_that_cannot_be_scored_is_told_before_a_picture_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "read_image", None)
    monkeypatch.setattr(data, "PUBLIC", {})
    name = f"folder:{tmp_path}"
    for file in ("train/a/1.png", "train/b/2.png"):
        square(tmp_path / file, (1, 1, 1))
    with pytest.raises(FileNotFoundError, match="no folder .*/test; .*--no-evaluate"):
        data.check_labels(name)
    for file, words in (("test/a/1.png", "only one of train and test .* folders b$"),
                        ("test/b/1.png", None), ("test/c/1.png", "only one .* c$"),
                        ("train/c/1.png", None), ("train/1.png", "without a class.*--no-evaluate")):
        square(tmp_path / file, (1, 1, 1))
        if words is None:
            assert data.check_labels(name) is None
        else:
            with pytest.raises(ValueError, match=words):
                data.check_labels(name)
    assert data.check_labels("shapes") is None


def test_all_images_is_none():
    assert [data.image_count(word) for word in ("all", "17")] == [None, 17]
    with pytest.raises(ValueError):
        data.image_count("many")


@pytest.mark.parametrize("name, split, error", [
    ("nonsense", "train", ValueError), ("folder:/no/such/place", "train", FileNotFoundError)])
def test_unknown_data_is_one_clear_line(name, split, error):
    with pytest.raises(error) as caught:
        data.load(name, split, 32)
    assert "\n" not in str(caught.value) and "folder" in str(caught.value)


def test_no_network_says_what_to_do(monkeypatch):
    def refuse(split):
        raise OSError("network is unreachable")
    monkeypatch.setitem(data.PUBLIC, "cifar10", refuse)
    with pytest.raises(OSError, match="--data shapes or --data folder:PATH"):
        data.load("cifar10", "train", 32)


@pytest.fixture
def cifar10_archive(tmp_path, monkeypatch):
    """data/cifar-10-python.tar.gz with other pictures in it, 5 x 260 and 100; torchvision takes it
    for the real one."""
    cifar, checksum = datasets.CIFAR10, lambda file: hashlib.md5(file.read_bytes()).hexdigest()
    folder = tmp_path / cifar.base_folder
    folder.mkdir()
    names = [name for name, _ in cifar.train_list]
    parts = {name: data.draw_shapes(range(i * 260, i * 260 + 260)) for i, name in enumerate(names)}
    parts["test_batch"] = data.draw_shapes(range(100), seed=1)
    for name, (images, factors, _) in parts.items():
        entry = {"data": images.flatten(1).numpy(), "labels": factors["shape"].tolist()}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": data.FACTORS["shape"]}))
    archive = tmp_path / data.DATA_DIR / cifar.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, cifar.base_folder)
    sums = {file.name: checksum(file) for file in folder.iterdir()}
    shutil.rmtree(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cifar, "tgz_md5", checksum(archive))
    monkeypatch.setattr(cifar, "train_list", [[name, sums[name]] for name in names])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": sums["batches.meta"]})
    return archive


def test_preset_cifar10_needs_no_further_flags(cifar10_archive, monkeypatch, capsys):
    """Unpacks, trains on all pictures with the shipped teacher, evaluates; the archive is not
    needed again."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "cifar10"])
    train.main()
    printed = capsys.readouterr().out
    assert "1235 pictures, teacher 0.8 M" in printed and "8 symbols of 256: 64 bits" in printed
    assert "1300 train images (gallery), 100 test images" in printed
    results = json.loads(Path("runs/cifar10-softmax-256-s0/results.json").read_text())
    assert results["teacher"]["knn_top1"] > 20      # ten shapes, seen by a teacher of photographs
    cifar10_archive.unlink()
    assert len(data.load("cifar10", "train", 32)) == 1300


def test_normalize_is_imagenets():
    grey = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(data.normalize(grey, 8)[0, :, 5, 5], expected)


def test_augment_off_is_identity():
    still = data.Augment(crop=(1, 1), flip=0, jitter=0, grey=0, blur=0, solarise=0)
    images = data.draw_shapes(range(3))[0]
    torch.manual_seed(0)
    # full area, but the aspect ratio still varies: it can only squeeze, so compare the mean colour
    views = still(images, 2, 32)
    assert views.shape == (2, 3, 3, 32, 32)
    assert (views.mean((3, 4)) - data.normalize(images).mean((2, 3))).abs().max() < 0.4


@pytest.mark.parametrize("change, measure", [
    (dict(flip=1.0), lambda x: x.flip(-1)),
    (dict(solarise=1.0), lambda x: torch.where(x >= 0.5, 1 - x, x)),
    (dict(grey=1.0),
     lambda x: (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, True).expand_as(x)),
])
def test_each_augmentation_alone(change, measure, monkeypatch):
    """With crops switched to the identity, each augmentation equals its formula on the pixels."""
    monkeypatch.setattr(data.Augment, "uniform", staticmethod(
        lambda x, low, high: torch.zeros(len(x)) + (low + high) / 2))
    nothing = dict(crop=(1, 1), flip=0, jitter=0, grey=0, blur=0, solarise=0)
    only = data.Augment(**nothing | change)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    out = only(images, 1, 16)[0] * data.STD + data.MEAN
    assert torch.allclose(out, measure(images.float() / 255), atol=1e-4)


def test_hue_turns_about_grey_and_a_third_of_a_turn_permutes_the_channels(monkeypatch):
    turn = data.Augment(crop=(1, 1), flip=0, jitter=1, strength=(0, 0, 0, 1), grey=0, blur=0,
                        solarise=0)
    monkeypatch.setattr(data.Augment, "uniform", staticmethod(
        lambda x, low, high: torch.zeros(len(x)) + (
            1 / 3 if high == 1 and low == -1 else (low + high) / 2)))
    images = torch.randint(64, 192, (1, 3, 8, 8), dtype=torch.uint8)
    x = images.float() / 255
    assert torch.allclose(turn.random_colour(x), x[:, [2, 0, 1]], atol=1e-5)
