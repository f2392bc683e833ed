"""folder.py: kinds of files give the same image, and streaming keeps order and random state."""
import os
import random
import signal
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, features

import folder


@pytest.fixture(autouse=True)
def no_warning_yet():
    folder.warn_once.cache_clear()


# ---- one file ------------------------------------------------------------------------------------

RAMP = np.tile(np.arange(256, dtype=np.uint8), (256, 1))                # black left, white right
RAMPS = {
    "16.png": RAMP * np.uint16(257), "16.tif": RAMP * np.uint16(257),   # 65535 is white
    "float.tif": RAMP.astype(np.float32) / 255, "dark.tif": RAMP.astype(np.float32) * 1e-6 - 7,
    "32.tif": RAMP.astype(np.int32) * 8_000_000 - 10**9}


@pytest.mark.parametrize("name", [*RAMPS, "16.pgm"])
def test_a_grey_ramp_is_the_same_image_in_every_depth(tmp_path, name, capsys):
    Image.fromarray(RAMP).save(tmp_path / "8.png")
    if name == "16.pgm":
        pixels = RAMPS["16.png"].astype(">u2").tobytes()
        (tmp_path / name).write_bytes(b"P5 256 256 65535\n" + pixels)
    else:
        Image.fromarray(RAMPS[name]).save(tmp_path / name)
    expected = folder.read_image(tmp_path / "8.png", 224).int()
    assert expected[:, 7, 0].tolist() == [0] * 3 and expected[:, 7, -1].tolist() == [255] * 3
    for _ in range(2):
        assert (folder.read_image(tmp_path / name, 224).int() - expected).abs().max() <= 1
    stretched = name in ("float.tif", "dark.tif", "32.tif")
    assert capsys.readouterr().err == (folder.STRETCHED + "\n" if stretched else "")


def test_16_bits_are_scaled_by_their_range_and_not_by_what_is_used(tmp_path):
    Image.fromarray(np.full((8, 8), 257 * 40, np.uint16)).save(tmp_path / "a.png")
    assert folder.read_image(tmp_path / "a.png", 8).unique().tolist() == [40]
    Image.fromarray(np.full((8, 8), 4095, np.uint16)).save(tmp_path / "a.tif")
    with Image.open(tmp_path / "a.tif") as image:
        image.tag_v2[258] = 12                              # as microscopes write them: 12 bits
        assert np.unique(folder.scale_grey(image)[0]).tolist() == [255]


def test_float_images_with_holes_or_one_value(tmp_path):
    values = np.array([[0, 1], [np.nan, np.inf]], np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert folder.read_image(tmp_path / "a.tif", 2)[0].tolist() == [[0, 255], [0, 0]]
    Image.fromarray(values[:1, 1:]).save(tmp_path / "b.tif")
    assert folder.read_image(tmp_path / "b.tif", 2).unique().tolist() == [0]


def disc(kind, hidden, path):
    """A disc of 64 pixels on a transparent ground that holds the colour `hidden`: with a soft edge
    where the file can have one."""
    mask = Image.new("L", (128, 128))
    ImageDraw.Draw(mask).ellipse((32, 32, 96, 96), fill=255)
    soft = mask.resize((64, 64), Image.Resampling.BOX).resize((128, 128))
    grey, options = kind == "LA", {}
    paint = Image.new("L", (128, 128), 90) if grey else Image.new("RGB", (128, 128), (200, 60, 0))
    ground = Image.new(paint.mode, (128, 128), hidden[0] if grey else hidden)
    image = Image.composite(paint, ground, soft.point(lambda a: 255 * (a > 0)))
    if kind in ("P", "GIF", "key"):                         # transparent or not, nothing between
        image = Image.composite(paint, ground, mask)
        if kind != "key":
            image = mask.point(lambda a: a // 255).convert("P")
            image.putpalette([*hidden, 200, 60, 0])
        options = {"transparency": hidden if kind == "key" else 0}
        options |= {"transparency": bytes([0, 255])} if kind == "P" else {}
    else:
        image.putalpha(soft)
        options = {"lossless": True, "exact": True} if path.suffix == ".webp" else {}
    image.save(path, **options)
    return mask if kind in ("P", "GIF", "key") else soft


@pytest.mark.parametrize("kind, name", [("RGBA", "a.png"), ("RGBA", "a.webp"), ("RGBA", "a.tif"),
                                        ("LA", "a.png"), ("P", "a.png"), ("GIF", "a.gif"),
                                        ("key", "a.png")])
def test_hidden_colours_do_not_show_and_the_ground_is_white(tmp_path, kind, name):
    images = []
    for hidden in ((0, 0, 0), (255, 0, 255), (3, 250, 9)):
        alpha = disc(kind, hidden, tmp_path / name)
        images.append(folder.read_image(tmp_path / name, 40))
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    colour = np.array([90, 90, 90] if kind == "LA" else [200, 60, 0])
    a = np.asarray(alpha, float)[..., None] / 255
    on_white = Image.fromarray(np.rint(a * colour + (1 - a) * 255).astype(np.uint8))
    expected = np.asarray(on_white.resize((40, 40), Image.Resampling.BICUBIC)).astype(int)
    assert abs(images[0].permute(1, 2, 0).numpy() - expected).max() <= 1
    assert images[0][:, 0, 0].tolist() == [255] * 3 and images[0][:, 20, 20].tolist() == [*colour]


def test_the_transparent_level_of_a_16_bit_png_is_white(tmp_path):
    pixels = np.array([[0, 257], [1234, 65535]], np.uint16)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    chunk, content = b"tRNS" + struct.pack(">H", 1234), (tmp_path / "a.png").read_bytes()
    chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "a.png").write_bytes(content[:33] + chunk + content[33:])       # after the header
    assert folder.read_image(tmp_path / "a.png", 2)[0].tolist() == [[0, 1], [255, 255]]


@pytest.mark.skipif(".avif" not in folder.EXTENSIONS, reason="this Pillow has no AVIF")
def test_avif_is_read(tmp_path):
    assert features.check("avif")
    Image.new("RGB", (16, 16), (200, 60, 0)).save(tmp_path / "a.avif", quality=100)
    assert (folder.read_image(tmp_path / "a.avif", 8)[:, 4, 4] - torch.tensor([200, 60, 0])
            ).abs().max() <= 4
    assert folder.list_folder(tmp_path, "train")[1] == ["a.avif"]


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
    seen = folder.read_image(tmp_path / f"a.{kind}", 24).float()
    middles = {"top": seen[:, 2, 12], "bottom": seen[:, -3, 12],
               "left": seen[:, 12, 2], "right": seen[:, 12, -3]}
    red, green = SIDES[orientation].split()
    assert max(middles, key=lambda side: middles[side][0]) == red
    assert max(middles, key=lambda side: middles[side][1]) == green


def test_16_bit_images_are_turned_upright_too(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6                                         # column 0 of the file is the top
    Image.fromarray(RAMPS["16.png"]).save(tmp_path / "a.png", exif=exif)
    seen = folder.read_image(tmp_path / "a.png", 256)
    assert seen[0, :, 9].tolist() == list(range(256))


def test_an_image_is_its_central_square_however_long_it_is(tmp_path):
    pixels = torch.arange(20 * 36 * 3).mul(37).byte().view(20, 36, 3)
    Image.fromarray(pixels.numpy()).save(tmp_path / "a.png")
    assert torch.equal(folder.read_image(tmp_path / "a.png", 20), pixels[:, 8:28].permute(2, 0, 1))
    left = Image.fromarray(pixels[:, :20].numpy())
    left.save(tmp_path / "b.png")
    small = np.array(left.resize((9, 9), Image.Resampling.BICUBIC))
    assert (folder.read_image(tmp_path / "b.png", 9).permute(1, 2, 0).numpy() == small).all()
    Image.new("RGB", (1, 60000), (1, 2, 3)).save(tmp_path / "long.png")
    # resized before it is cropped, it would take 11 GB
    assert folder.read_image(tmp_path / "long.png", 256)[:, 7, 9].tolist() == [1, 2, 3]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_large_jpeg_decoded_small_is_the_same_image(tmp_path, mode):
    coarse = np.random.default_rng(0).integers(40, 220, (6, 9, 3), dtype=np.uint8)
    coarse = Image.fromarray(coarse)
    coarse.resize((900, 600), Image.Resampling.BICUBIC).convert(mode).save(tmp_path / "a.jpg")
    whole = Image.open(tmp_path / "a.jpg").convert("RGB").crop((150, 0, 750, 600))
    whole = np.array(whole.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    seen = folder.read_image(tmp_path / "a.jpg", 32).permute(1, 2, 0).numpy()
    assert whole.std() > 20 and abs(seen - whole).mean() < 2


def test_only_formats_that_the_names_promise_are_opened(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")       # Pillow hands these to another program
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(OSError, match="cannot read image .*a.png"):
        folder.read_image(tmp_path / "a.png", 8)
    assert folder.image_size(tmp_path / "a.png") is None
    Image.new("RGB", (8, 8), (9, 8, 7)).save(tmp_path / "b.gif")
    (tmp_path / "b.gif").rename(tmp_path / "b.jpg")         # common on the web, and harmless
    assert folder.read_image(tmp_path / "b.jpg", 8)[:, 0, 0].tolist() == [9, 8, 7]


def test_try_read_names_what_it_passes_over(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"no image")
    assert folder.try_read(tmp_path / "a.png", 8) is None
    assert capsys.readouterr().err.startswith(f"skipped: cannot read image {tmp_path / 'a.png'}: ")


# ---- a folder ------------------------------------------------------------------------------------

def test_hidden_files_are_passed_over_in_silence_and_others_counted(tmp_path):
    for name in ("b/2.jpg", "b/1.JPEG", "a/x/3.png", "a-b/4.webp", "a/._3.png", "a/.DS_Store",
                 "a/.ipynb_checkpoints/3.png", "notes.txt", "b/readme.TXT", "b/film.mp4", "COPY"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).touch()
    root, names, labels, classes, ignored = folder.list_folder(tmp_path, "train")
    assert root == str(tmp_path / "train") and classes == ["a", "a-b", "b"]
    assert names == ["a/x/3.png", "a-b/4.webp", "b/1.JPEG", "b/2.jpg"] and labels == [0, 1, 2, 2]
    assert ignored == {".txt": 2, ".mp4": 1, "without extension": 1}


def test_a_class_may_be_a_link_and_an_image_may_have_none(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/1.png").touch()
    (tmp_path / "train").mkdir()
    (tmp_path / "train/2.png").touch()
    (tmp_path / "train/cat").symlink_to(tmp_path / "elsewhere")
    assert folder.list_folder(tmp_path, "train")[1:4] == (["2.png", "cat/1.png"], [-1, 0], ["cat"])
    with pytest.raises(FileNotFoundError, match="no folder .*/test; expected PATH/train/<class>"):
        folder.list_folder(tmp_path, "test")


def image_files(path, values, side=8, labels=None):
    """ImageFiles of one-coloured images, value k in red, with names that are no UTF-8."""
    names = [b"\xff%04d.png" % k for k in range(len(values))]
    for name, value in zip(names, values):
        Image.new("RGB", (side, side), (value, 0, 0)).save(path / os.fsdecode(name))
    labels = np.zeros(len(names), int) if labels is None else np.array(labels)
    return folder.ImageFiles(str(path), np.array(names), labels, side)


def reds(files, order, size=2):
    return torch.cat([x[:, 0, 0, 0] for x in files.batches(torch.tensor(order).split(size))])


def test_workers_keep_the_order_and_leave_every_random_state_alone(tmp_path):
    files, order = image_files(tmp_path, range(9)), [7, 1, 1, 8, 0, 3, 2, 6, 4]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    batches = list(files.batches(torch.tensor(order).split(2)))
    assert [tuple(x.shape) for x in batches] == 4 * [(2, 3, 8, 8)] + [(1, 3, 8, 8)]
    assert torch.cat(batches)[:, 0, 4, 4].tolist() == order and batches[0].dtype == torch.uint8
    assert next(files.batches([torch.tensor([5])]))[:, 0, 0, 0].tolist() == [5]
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    part = files.subset(torch.tensor([4, 2, 8]))
    assert reds(part, [2, 0, 1]).tolist() == [8, 4, 2]


def test_a_file_that_breaks_in_mid_training_is_replaced_named_once_and_counted(tmp_path, capfd):
    files, order = image_files(tmp_path, range(6), labels=[0, 1, 0, 1, 0, 1]), list(range(6))
    assert reds(files, order).tolist() == order and not files.unreadable
    for k in (2, 4, 5):
        (tmp_path / os.fsdecode(files.names[k].item())).write_bytes(b"broken")
    for _ in range(3):              # of the same class, and for 2 not 4, which is broken too
        assert reds(files, order).tolist() == [0, 1, 0, 3, 0, 1]
    (tmp_path / os.fsdecode(files.names[0].item())).write_bytes(b"broken")
    assert reds(files, order).tolist() == [1, 1, 3, 3, 1, 1]            # class 0 has no more
    warnings = sorted(capfd.readouterr().err.splitlines())
    assert len(warnings) == 4 and [line[-24:] for line in warnings] == [
        f"{k:04}.png takes its place" for k in (1, 0, 0, 1)]
    assert all(f"{k:04}.png: " in line for k, line in zip((0, 2, 4, 5), warnings))
    assert files.unreadable == set(files.names[[0, 2, 4, 5]].tolist())


def test_a_class_without_a_readable_file_takes_another_and_an_empty_folder_is_one_line(tmp_path):
    files = image_files(tmp_path, range(3), labels=[0, 1, 2])
    (tmp_path / os.fsdecode(files.names[1].item())).unlink()
    assert reds(files, [1, 0, 1]).tolist() == [2, 0, 2]
    for name in files.names[[0, 2]]:
        (tmp_path / os.fsdecode(name.item())).unlink()
    for size in (1, 9):                                     # from workers and without any
        with pytest.raises(OSError, match="^none of the 3 images in .* can be read$"):
            reds(files, [0, 1, 2], size)


def test_stretched_images_are_reported_once_whichever_worker_reads_them(tmp_path, capfd):
    for k in range(4):
        Image.fromarray(np.eye(8, dtype=np.float32)).save(tmp_path / f"{k}.tif")
    names = np.array([b"%d.tif" % k for k in range(4)])
    files = folder.ImageFiles(str(tmp_path), names, np.zeros(4, int), 8)
    assert reds(files, [0, 1, 2, 3], 1).tolist() == 4 * [255]
    assert capfd.readouterr().err == folder.STRETCHED + "\n" and not files.unreadable


def test_paths_take_little_memory_and_cannot_be_counted_up(tmp_path):
    names = np.array([b"class/%06d.jpg" % k for k in range(1000)])
    files = folder.ImageFiles("root", names, np.zeros(1000, int), 8)
    assert files.names.dtype == "S16" and files.names.nbytes == 16_000
    assert files.path(7) == "root/class/000007.jpg"


def test_a_killed_worker_is_one_clear_line(tmp_path):
    files = image_files(tmp_path, range(8))
    batches = files.batches(torch.arange(8).split(1) * 50)
    next(batches)
    children = f"/proc/{os.getpid()}/task/{os.getpid()}/children"
    if not os.path.exists(children):
        pytest.skip("no /proc to find the workers in")
    with open(children) as file:
        os.kill(int(file.read().split()[-1]), signal.SIGKILL)
    with pytest.raises(OSError, match="a process that reads images has died") as caught:
        list(batches)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_worker_ends_when_its_main_process_was_killed():
    read, write = os.pipe()
    main = os.fork()
    if main == 0:
        worker = os.fork()
        if worker == 0:
            folder.end_with_parent(0)
            assert os.getpgid(0) == os.getpid()             # Ctrl-C does not reach it
            os.write(write, b"watching")
            time.sleep(60)                                  # as if it waited to hand over images
        os.waitpid(worker, 0)
    os.close(write)
    assert os.read(read, 8) == b"watching"
    os.kill(main, signal.SIGKILL)
    os.waitpid(main, 0)
    start = time.monotonic()
    assert os.read(read, 8) == b"" and time.monotonic() - start < 20    # the last writer has ended
    os.close(read)
