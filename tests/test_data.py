"""data.py: one interface in memory and streamed, data sets that fail by name, and the views."""
import hashlib
import pickle
import shutil
import sys
import tarfile

import pytest
import torch
from PIL import Image
from torchvision import datasets

import data
import folder
import shapes


@pytest.fixture(autouse=True)
def no_warning_yet():
    folder.warn_once.cache_clear()


def square(path, colour, size=(40, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def name(tmp_path):
    """folder:PATH with 9 images in the classes a, b and c of train, image k having k in red, and 3
    of test."""
    for k in range(9):
        square(tmp_path / f"train/{'aabbbbccc'[k]}/{k}.png", (k, 100, 200))
    for k in range(3):
        square(tmp_path / f"test/{'abc'[k]}/{k}.png", (k, 0, 0))
    return f"folder:{tmp_path}"


@pytest.fixture
def both(name):
    """The 9 images, in memory and streamed."""
    return [data.load(name, "train", 32, storage=storage) for storage in ("memory", "stream")]


# ---- one interface -------------------------------------------------------------------------------

def test_memory_and_stream_are_the_same_images(both):
    order = torch.tensor([8, 0, 3, 3, 1, 7, 2])
    for images in both:
        assert len(images) == 9 and images.classes == ["a", "b", "c"] and images.labelled
        assert images.labels.tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2] and images.skipped == 0
        batches = list(images.batches(order.split(3)))
        assert [len(x) for x in batches] == [3, 3, 1] and batches[0].dtype == torch.uint8
        assert torch.cat(batches)[:, :, 20, 20].tolist() == [[k, 100, 200] for k in order.tolist()]
        assert torch.equal(torch.cat(batches), images.get(order))
    assert both[0].images.shape == (9, 3, 36, 36)                               # 32 * 8 / 7
    assert both[1].images is None and torch.equal(both[0].images, both[1].get(torch.arange(9)))


def test_a_subset_has_the_images_labels_factors_and_masks_of_its_indices(both, monkeypatch):
    indices = torch.tensor([6, 2, 0])
    for images in both:
        with monkeypatch.context() as patch:
            patch.setattr(folder, "decode", None)                           # no file is opened
            part = images.subset(indices).subset(torch.tensor([2, 0]))
        assert len(part) == 2 and part.labels.tolist() == [0, 2] and part.classes == images.classes
        assert part.get(torch.tensor([1, 0]))[:, 0, 0, 0].tolist() == [6, 0]
    drawn = data.load("shapes", "train", 32, 9)
    part = drawn.subset(indices)
    images, factors, masks = shapes.draw_shapes(indices.tolist())
    assert torch.equal(part.images, images) and torch.equal(part.masks, masks)
    assert torch.equal(part.factors["row"], factors["row"])
    assert torch.equal(part.labels, factors["shape"])


@pytest.mark.parametrize("storage", ["memory", "stream"])
def test_an_unreadable_file_is_replaced_named_and_counted(tmp_path, name, storage, capfd):
    (tmp_path / "train/b/4.png").write_bytes((tmp_path / "train/b/4.png").read_bytes()[:60])
    images = data.load(name, "train", 32, storage=storage)
    held_out, rest = images.subset(torch.tensor([4, 0])), images.subset(torch.arange(2, 9))
    for _ in range(2):
        assert images.get(torch.arange(9))[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 5, 5, 6, 7, 8]
        assert rest.get(torch.arange(3))[:, 0, 0, 0].tolist() == [2, 3, 5]
    assert images.skipped == rest.skipped == held_out.skipped == 1
    warnings = capfd.readouterr().err
    assert warnings.count("\n") == 1 and "4.png" in warnings
    assert warnings.endswith("5.png takes its place\n")


def test_a_folder_that_cannot_be_read_at_all_is_one_line(tmp_path, name):
    for file in (tmp_path / "train").rglob("*.png"):
        file.write_bytes(b"broken")
    with pytest.raises(OSError, match="^none of the 9 images in .*train can be read$"):
        data.load(name, "train", 32)


def test_a_fingerprint_is_of_number_names_sizes_and_labels(tmp_path, both, name, monkeypatch):
    known = both[0].fingerprint()
    monkeypatch.setattr(folder, "decode", None)                             # no file is opened
    assert known.startswith("9 images, ") and both[1].fingerprint() == known
    again = lambda: data.load(name, "train", 32, storage="stream").fingerprint()     # noqa: E731
    assert again() == known
    files, prints = tmp_path / "train", {known, data.load(name, "train", 16, None, 0, "stream")
                                         .fingerprint(), both[1].subset(torch.arange(8))
                                         .fingerprint()}
    (files / "a/0.png").rename(files / "a/00.png")
    prints.add(again())
    (files / "a/00.png").write_bytes(b"of another size")
    prints.add(again())
    (files / "d").mkdir()
    (files / "c/8.png").rename(files / "d/8.png")
    assert len(prints | {again()}) == 6


def test_a_fingerprint_in_memory_is_of_number_labels_and_pixels():
    images = torch.randint(256, (30, 3, 8, 8), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 3
    sets = [(images, labels), (images[1:], labels[1:]), (images, labels.roll(1)),
            (images.roll(3, 0), labels)]
    prints = [data.ImageSet(*one, list("abc")).fingerprint() for one in sets]
    assert len({*prints}) == 4 and prints[0].startswith("30 images, ")
    assert prints[0] == data.ImageSet(images.clone(), labels.clone(), []).fingerprint()


# ---- memory or stream ----------------------------------------------------------------------------

@pytest.mark.parametrize("free, processes, storage, expected", [
    (2 * 34_992, 1, "auto", "held in memory (at most half of the 0 MB free)"),
    (2 * 34_991, 1, "auto", "streamed from their files (more than half of the 0 MB free)"),
    (2 * 34_992, 2, "auto", "streamed from their files (more than half of the 0 MB free)"),
    (10**9, 1, "stream", "streamed from their files (--storage stream)"),
    (0, 1, "memory", "held in memory (--storage memory)")])
def test_memory_is_for_what_fits_into_half_of_it(name, free, processes, storage, expected, capsys,
                                                 monkeypatch):
    monkeypatch.setattr(data, "free_memory", lambda: (free, "free"))
    monkeypatch.setattr(data.distributed, "world_size", lambda: processes)
    images = data.load(name, "train", 32, storage=storage)                  # 9 x 36 x 36 x 3 bytes
    assert (images.images is None) == ("streamed" in expected)
    line, = capsys.readouterr().out.splitlines()
    memory = f"{0.034992 * processes:.1f} MB for {processes} process{'es' if processes > 1 else ''}"
    assert line == f"{name}/train: 9 images of 36 x 36 pixels, {memory}, are {expected}"


MEMINFO = {"/proc/meminfo": "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:   5000 kB\n"}
V1, V2 = "/sys/fs/cgroup/memory", "/sys/fs/cgroup"


@pytest.mark.parametrize("files, expected", [
    (MEMINFO, (5_120_000, "free")),
    ({"/proc/meminfo": "MemTotal: 9000 kB\n"}, (data.ASSUMED_FREE_MEMORY, "as is assumed")),
    ({}, (data.ASSUMED_FREE_MEMORY, "as is assumed")),
    # version 2: the limit is that of a group around the process's own
    (MEMINFO | {"/proc/self/cgroup": "0::/job/step\n", f"{V2}/job/step/memory.max": "max\n",
                f"{V2}/job/memory.max": "3000000\n", f"{V2}/job/memory.current": "1500000\n",
                f"{V2}/job/memory.stat": "anon 5\ninactive_file 500000\nactive_file 9\n"},
     (2_000_000, "free within the control group's limit")),
    # version 1 in a container, which sees the host's name for its group and its own group as root
    (MEMINFO | {"/proc/self/cgroup": "5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n0::/\n",
                f"{V1}/memory.limit_in_bytes": "3000000\n",
                f"{V1}/memory.usage_in_bytes": "4000000\n",
                f"{V1}/memory.stat": "inactive_file 7\ntotal_inactive_file 100000\n"},
     (0, "free within the control group's limit")),
    (MEMINFO | {"/proc/self/cgroup": "4:memory:/\n",
                f"{V1}/memory.limit_in_bytes": "9223372036854771712\n",
                f"{V1}/memory.usage_in_bytes": "1\n", f"{V1}/memory.stat": "total_inactive_file 0"},
     (5_120_000, "free"))])
def test_free_memory_is_that_of_the_machine_or_of_a_containers_limit(monkeypatch, files, expected):
    def read(path):
        try:
            return files[str(path)]
        except KeyError:
            raise FileNotFoundError from None
    monkeypatch.setattr(data.Path, "read_text", read)
    free, word = data.free_memory()
    assert free == expected[0] and word.endswith(expected[1])


def test_only_folders_are_streamed():
    with pytest.raises(ValueError, match="--storage stream is for folder:PATH; shapes is always"):
        data.load("shapes", "train", 32, 5, storage="stream")


# ---- sources -------------------------------------------------------------------------------------

def test_shapes_are_those_of_their_file():
    drawn = data.load("shapes", "test", 32, 30, 1)
    images, factors, masks = shapes.load("test", 30, 1)
    assert torch.equal(drawn.images, images) and torch.equal(drawn.masks, masks)
    assert torch.equal(drawn.labels, factors["shape"]) and drawn.labelled
    assert drawn.classes == shapes.FACTORS["shape"] and drawn.factors.keys() == factors.keys()


def test_other_files_of_a_folder_are_counted_in_one_line(tmp_path, capsys):
    square(tmp_path / "a.jpg", (9, 9, 9), (64, 40))
    for other in ("1.txt", "2.TXT", "3.mp4", "._a.jpg", ".DS_Store"):
        (tmp_path / other).touch()
    images = data.load(f"folder:{tmp_path}", "train", 32)
    assert images.labels.tolist() == [-1] and not images.labelled and images.classes == []
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0] == f"{tmp_path}: ignored 3 files: .txt 2, .mp4 1"
    assert printed.err == ""


def test_images_are_as_small_as_the_first_that_can_be_read(tmp_path):
    (tmp_path / "0.png").write_bytes(b"broken")
    square(tmp_path / "1.png", (1, 1, 1), (30, 20))
    square(tmp_path / "2.png", (2, 2, 2))
    assert data.load(f"folder:{tmp_path}", "train", 32).images.shape == (3, 3, 20, 20)


def test_a_limit_is_a_random_choice_for_each_seed(name):
    chosen = [data.load(name, "train", 32, 4, seed).images[:, 0, 0, 0].tolist() for seed in (0, 1)]
    assert chosen[0] == data.choose(9, 4, 0).tolist() != chosen[1] == data.choose(9, 4, 1).tolist()
    assert len({*chosen[0]}) == 4 and chosen[0] == sorted(chosen[0])


def test_what_cannot_be_scored_is_a_sentence_and_no_image_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "decode", None)
    monkeypatch.setattr(data, "PUBLIC", {})
    name = f"folder:{tmp_path}"
    with pytest.raises(FileNotFoundError, match="no folder"):
        data.evaluation_problem(f"folder:{tmp_path / 'nowhere'}")
    start = f"{name} cannot be scored because "
    for file, words in (
            ("train/a/1.png", f"it has no test images in {tmp_path}/test/<class>/…"),
            ("train/b/2.png", f"it has no test images in {tmp_path}/test/<class>/…"),
            ("test/a/1.png", "only train or only test has the classes b"), ("test/b/1.png", None),
            ("test/c/1.png", "only train or only test has the classes c"), ("train/c/1.png", None),
            ("train/1.png", f"some images have no class; their places are {tmp_path}/train/<class>/"
                            f"… and {tmp_path}/test/<class>/…")):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
        assert data.evaluation_problem(name) == (words and start + words)
    assert data.evaluation_problem("shapes") is data.evaluation_problem("cifar10") is None


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


def test_no_network_names_the_remedy(monkeypatch):
    def refuse(split):
        raise OSError("network is unreachable")
    monkeypatch.setitem(data.PUBLIC, "cifar10", refuse)
    with pytest.raises(OSError, match="--data shapes or --data folder:PATH"):
        data.load("cifar10", "train", 32)


@pytest.fixture
def cifar10_archive(tmp_path, monkeypatch):
    """data/cifar-10-python.tar.gz with other images in it, 5 x 60 and 40; torchvision takes it
    for the real one."""
    cifar, checksum = datasets.CIFAR10, lambda file: hashlib.md5(file.read_bytes()).hexdigest()
    folder = tmp_path / cifar.base_folder
    folder.mkdir()
    names = [name for name, _ in cifar.train_list]
    parts = {name: shapes.draw_shapes(range(i * 60, i * 60 + 60)) for i, name in enumerate(names)}
    parts["test_batch"] = shapes.draw_shapes(range(40), seed=1)
    for name, (images, factors, _) in parts.items():
        entry = {"data": images.flatten(1).numpy(), "labels": factors["shape"].tolist()}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": shapes.FACTORS["shape"]}))
    archive = tmp_path / data.DATA_DIR / cifar.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, cifar.base_folder)
    checksums = {file.name: checksum(file) for file in folder.iterdir()}
    shutil.rmtree(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cifar, "tgz_md5", checksum(archive))
    monkeypatch.setattr(cifar, "train_list", [[name, checksums[name]] for name in names])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", checksums["test_batch"]]])
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": checksums["batches.meta"]})
    return archive


def test_cifar10_is_unpacked_from_its_archive_once(cifar10_archive):
    train, test = (data.load("cifar10", split, 32) for split in ("train", "test"))
    images, factors, _ = shapes.draw_shapes(range(300))
    assert torch.equal(train.images, images) and torch.equal(train.labels, factors["shape"])
    assert len(test) == 40 and test.classes == shapes.FACTORS["shape"]
    cifar10_archive.unlink()
    few = data.load("cifar10", "train", 32, 7, seed=3)
    assert torch.equal(few.images, train.images[data.choose(300, 7, 3)])


# ---- the script ----------------------------------------------------------------------------------

def test_the_script_prints_and_draws_images_and_their_views(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data.main()
    assert capsys.readouterr().out.splitlines() == [
        "shapes: 1000 train images, 32 x 32 pixels",
        "classes: disc 113, ring 92, square 106, triangle 92, star 106, cross 102, crescent 99, "
        "heart 98, hourglass 99, bars 93",
        f"views of 32 x 32 pixels: {data.AUGMENT['shapes']}",
        "data.png: a row for each of 8 images, then 7 views of it"]
    sheet = Image.open("data.png")
    assert sheet.size == (8 * 98 + 2, 8 * 98 + 2)           # 96 pixels and a rim of 2
    last = shapes.draw_shapes([999])[0][0, :, 16, 16]       # row 8, column 1, pixel (16, 16)
    assert sheet.getpixel((2 + 48, 7 * 98 + 2 + 48)) == pytest.approx(tuple(last.tolist()), abs=1)


def test_the_script_reads_8_images_of_a_folder(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data.main(name)
    printed = capsys.readouterr().out.splitlines()
    assert printed[1:3] == [f"{name}: 9 train images, 40 x 40 pixels", "classes: a 2, b 4, c 3"]
    sheet = Image.open("data.png").convert("RGB")
    column = [sheet.getpixel((50, row * 98 + 50))[0] for row in range(8)]
    assert column == pytest.approx([0, 1, 2, 3, 4, 5, 6, 8], abs=1)


# ---- views ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, size, expected", [
    ("shapes", 32, "shapes"), ("cifar10", 32, "small photographs"), ("stl10", 96, "photographs"),
    ("folder:x", 63, "small photographs"), ("folder:x", 64, "photographs")])
def test_each_data_set_has_its_augmentation(name, size, expected):
    assert data.augmentation(name, size) is data.AUGMENT[expected]


def test_random_numbers_of_the_views_are_drawn_in_the_order_in_which_results_were_made():
    """As first drawn: another order would change every training. Two views of one image, of all
    augmentations; rounding may differ between processors."""
    images, _, _ = shapes.draw_shapes([5])
    torch.manual_seed(1)
    views = data.Augment()(images, 2, 32)
    assert torch.allclose(views[:, 0, :, 16, 16], torch.tensor(
        [[-1.3129, 0.7268, 0.4605], [-1.0402, -0.7642, -0.6330]]), atol=1e-3)
    assert torch.rand(1).item() == pytest.approx(0.0112246, abs=1e-6)


def test_normalize_is_imagenets():
    grey = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(data.normalize(grey, 8)[0, :, 5, 5], expected)


def test_augment_off_is_identity():
    still = data.Augment(crop=(1, 1), flip=0, jitter=0, grey=0, blur=0, solarise=0)
    images = shapes.draw_shapes(range(3))[0]
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
    single = data.Augment(**nothing | change)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    out = single(images, 1, 16)[0] * data.STD + data.MEAN
    assert torch.allclose(out, measure(images.float() / 255), atol=1e-4)


def test_hue_turns_about_grey_and_a_third_of_a_turn_permutes_the_channels(monkeypatch):
    rotation = data.Augment(crop=(1, 1), flip=0, jitter=1, strength=(0, 0, 0, 1), grey=0, blur=0,
                        solarise=0)
    monkeypatch.setattr(data.Augment, "uniform", staticmethod(
        lambda x, low, high: torch.zeros(len(x)) + (
            1 / 3 if high == 1 and low == -1 else (low + high) / 2)))
    images = torch.randint(64, 192, (1, 3, 8, 8), dtype=torch.uint8)
    x = images.float() / 255
    assert torch.allclose(rotation.random_colour(x), x[:, [2, 0, 1]], atol=1e-5)
