"""Image files: one is read, a folder of them is listed, and streamed by worker processes.

    python data.py folder:PATH      # lists the folder and draws some of its images

`data.load` decides whether the images of a folder are kept in memory. Every script reads image
files through `read_image` or `ImageFiles`, so that an image is the same wherever it is used.
"""
import functools
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, features
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS

import distributed

# --------------------------------------------------------------------------- reading an image file

# What IMG_EXTENSIONS stand for, and GIF, whatever the file's name is. Pillow reads more formats;
# for EPS it would run ghostscript on a stranger's program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
EXTENSIONS = IMG_EXTENSIONS
if "avif" in features.modules and features.check("avif"):                   # Pillow >= 11.3
    FORMATS, EXTENSIONS = (*FORMATS, "AVIF"), (*EXTENSIONS, ".avif")
STRETCHED = ("images of 32-bit integers or floats are stretched from their own minimum (black) to "
             "their own maximum (white)")


@functools.cache
def warn_once(line):
    print(line, file=sys.stderr)


def scale_grey(image):
    """A grey image of more than 8 bits -> (mode "L", whether by its own minimum and maximum).
    16 bits are scaled by their range, 65535 -> 255, and 12 bits (TIFF) by theirs, 4095 -> 255;
    values that are not finite become the minimum."""
    values = np.asarray(image, dtype=np.float64)
    # Pillow before 11 has mode "I" for 16-bit PNGs, and every Pillow for 16-bit PGMs
    stretched = image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM")
    bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]          # TIFF's tag BitsPerSample
    low, high = 0, 2**bits - 1
    if stretched:
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if finite.size else (0, 0)
        values = np.where(np.isfinite(values), values, low)
    grey = np.rint((values - low) * (255 / (high - low or 1)))
    if "transparency" in image.info:                # PNG: one grey level means transparent
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey.astype(np.uint8)), stretched


def to_rgb(image):
    """A Pillow image of any mode -> (mode "RGB", whether its grey levels were stretched).
    Transparent images are laid on white, because most are drawn for white pages; the colours that
    files hold under full transparency are arbitrary and must not show."""
    if image.mode.startswith(("I", "F")):
        image, stretched = scale_grey(image)
        return image.convert("RGB"), stretched
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB"), False


def decode(path, side):
    """A file's central square, upright as its EXIF orientation has it -> ((3, side, side) uint8
    array, whether its grey levels were stretched). Raises OSError naming a file that is missing,
    damaged or no image."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            # JPEG only: decodes at 1/2, 1/4 or 1/8 of the size while that is twice as large as
            # wanted. A tenth of the time for 12 megapixels, under 2 grey levels of difference.
            image.draft("RGB", (2 * side, 2 * side))
            ImageOps.exif_transpose(image, in_place=True)
            # White comes before the resizing, which would mix hidden colours in; the crop does
            # too, because 1 x 60000 pixels must not become gigabytes
            image, stretched = to_rgb(image)
            square = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    except Exception as error:                      # Pillow raises many kinds on damaged files
        raise OSError(f"cannot read image {path}: {error}") from None
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1)), stretched


def read_image(path, side):
    """`decode` as a tensor (3, side, side) uint8; prints once that an image was stretched."""
    pixels, stretched = decode(path, side)
    if stretched:
        warn_once(STRETCHED)
    return torch.from_numpy(pixels)


def try_read(path, side):
    """`read_image`, or None and a line on stderr for a file that cannot be read."""
    try:
        return read_image(path, side)
    except OSError as error:
        print(f"skipped: {error}", file=sys.stderr)
        return None


def image_size(path):
    """(width, height) without decoding the pixels; None when the file is no image."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except Exception:
        return None


# ------------------------------------------------------------------------------- folders of images

MOST_WORKERS = 16                                   # processes that read, for each that trains


def end_with_parent(worker):
    """A worker ends when the main process was killed: it would wait for ever to hand over images.
    Its own process group keeps Ctrl-C for the main process, which then ends its workers."""
    parent = os.getppid()
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


class ImageFiles:
    """Image files below the folder `root`, read as squares of `side` pixels when they are wanted.

    A file that cannot be read is named once on stderr, and the next readable file takes its place:
    the next of its class while there is one, so that the label holds. `unreadable` has the names
    that were printed, and `broken` those that this process or worker failed to read.
    """

    def __init__(self, root, names, labels, side, unreadable=None):
        """names (n,): relative paths as numpy bytes. In a list, each str would have a reference
        count, and counting copies a list's memory into every worker. labels: (n,) numpy int64."""
        self.root, self.names, self.labels, self.side = root, names, labels, side
        self.unreadable, self.broken = set() if unreadable is None else unreadable, set()

    def __len__(self):
        return len(self.names)

    def path(self, i):
        return os.path.join(self.root, os.fsdecode(bytes(self.names[i])))

    def subset(self, indices):
        indices = np.asarray(indices)
        return ImageFiles(self.root, self.names[indices], self.labels[indices], self.side,
                          self.unreadable)

    def names_and_sizes(self):
        sizes = [os.stat(self.path(i)).st_size for i in range(len(self))]
        return self.names.tobytes() + np.array([self.side, *sizes]).tobytes()

    def candidates(self, i):
        """Yields i, then the other indices from i + 1 on, round to i - 1, its own class first."""
        yield i
        others = (i + np.arange(1, len(self))) % len(self)
        yield from others[np.argsort(self.labels[others] != self.labels[i], kind="stable")]

    def read(self, i, notes):
        """Pixels (3, side, side) of file i, or of the next that is readable. `notes` gets a line
        for stderr under the name of file i if it is not, and STRETCHED under None."""
        problem = None
        for j in self.candidates(i):
            name = bytes(self.names[j])
            if j != i and name in self.broken:
                continue
            try:
                pixels, stretched = decode(self.path(j), self.side)
            except OSError as error:
                self.broken.add(name)
                problem = problem or error
                continue
            if stretched:
                notes[None] = STRETCHED
            if problem:
                notes[bytes(self.names[i])] = f"skipped: {problem}; {self.path(j)} takes its place"
            return pixels
        raise OSError(f"none of the {len(self)} images in {self.root} can be read")

    def __getitem__(self, indices):
        """What a worker does: a list of b indices -> (pixels (b, 3, side, side) uint8, notes), or
        (None, error). As arrays they go through a pipe: tensors would need much of /dev/shm."""
        pixels, notes = np.empty((len(indices), 3, self.side, self.side), np.uint8), {}
        try:
            for k, i in enumerate(indices):
                pixels[k] = self.read(i, notes)
        except OSError as error:
            return None, error
        return pixels, notes

    def batches(self, index_batches):
        """As `ImageSet.batches`, read ahead by a worker process for each core; one batch by none.
        The workers' seeds come from their own generator, for training's is not to move."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = max(1, min(MOST_WORKERS, cores // distributed.world_size(), len(index_batches)))
        workers = workers if len(index_batches) > 1 else 0
        loader = DataLoader(
            self, batch_size=None, sampler=map(torch.Tensor.tolist, index_batches),
            num_workers=workers, collate_fn=tuple, worker_init_fn=end_with_parent,
            generator=torch.Generator(),
            # Python 3.14 would start a new interpreter for each, which imports PyTorch for seconds
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None)
        try:
            for pixels, notes in loader:
                if pixels is None:
                    raise notes
                for name, line in notes.items():
                    if name not in self.unreadable:
                        warn_once(line)
                    self.unreadable.update({name} - {None})
                yield torch.from_numpy(pixels)
        except RuntimeError as error:               # PyTorch's for a worker that was killed
            raise OSError(f"a process that reads images has died: {error}") from None


def list_folder(path, split):
    """PATH/train/<class>/… and PATH/test/<class>/…, or for train a flat PATH -> (root, n relative
    names, n labels, -1 without a class, names of the classes, how many files of each other
    extension). Opens no image, passes over what is hidden. Raises FileNotFoundError."""
    root = Path(path) / split if (Path(path) / split).is_dir() else Path(path)
    if not root.is_dir() or (root == Path(path) and split == "test"):
        raise FileNotFoundError(f"no folder {Path(path) / split}; expected PATH/train/<class>/… "
                                "and PATH/test/<class>/… (a flat folder of images is enough for "
                                "training without evaluation)")
    names, ignored = [], Counter()
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inner = os.path.relpath(folder, root) if folder != str(root) else ""
        for name in files:
            extension = os.path.splitext(name)[1].lower()
            if extension in EXTENSIONS and not name.startswith("."):
                names.append(os.path.join(inner, name))
            elif not name.startswith("."):
                ignored[extension or "without extension"] += 1
    if not names:
        raise FileNotFoundError(f"no images in {root} (looking for {' '.join(EXTENSIONS)})")
    names.sort(key=lambda name: name.replace(os.sep, "\0"))     # folder by folder: a/ before a-b/
    folder_of = lambda name: name.partition(os.sep)[0] if os.sep in name else None  # noqa: E731
    classes = sorted({folder_of(name) for name in names} - {None})
    number = {None: -1} | {name: i for i, name in enumerate(classes)}
    return str(root), names, [number[folder_of(name)] for name in names], classes, ignored
