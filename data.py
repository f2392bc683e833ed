"""Images: folders, public data sets, the drawn `shapes` and `scenes`, and augmented views of them.

    python data.py                          # draws 8 images of `shapes` and their views: data.png
    python data.py folder:PATH      # the same for a folder, or for scenes, cifar10, cifar100, stl10

Images are (n, 3, H, W) uint8. They are in memory or, where a folder does not fit, streamed by
worker processes; both give the same images in the same order. A batch becomes float on the training
device only, where the V augmented views are made for the whole batch at once.
"""
import hashlib
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision import datasets
from torchvision.utils import save_image

import distributed
import scenes
import shapes
from folder import ImageFiles, image_size, list_folder, read_image  # noqa: F401
from progress import counted

# ImageNet statistics, because the official DINO weights expect them; our own teachers use the same.
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@dataclass
class ImageSet:
    """n images, in memory or streamed from their files."""
    images: torch.Tensor | None                     # (n, 3, H, W) uint8; None where streamed
    labels: torch.Tensor                            # (n,) int64, -1 for an image without a class
    classes: list
    factors: dict = field(default_factory=dict)     # `shapes`: name -> (n,) int64; `scenes`: (n, 4)
    masks: torch.Tensor | None = None               # (n, H, W), `shapes`: bool, True on the object;
                                                    # `scenes`: uint8, k on object k, 0 beside them
    files: "ImageFiles | None" = None               # folders only

    def __len__(self):
        return len(self.files if self.images is None else self.images)

    @property
    def labelled(self):
        return len(self.labels) > 0 and bool((self.labels >= 0).all())

    @property
    def skipped(self):
        """How many files of the folder have turned out to be unreadable so far."""
        return len(self.files.unreadable) if self.files else 0

    def subset(self, indices):
        """The images at `indices` (1-d int64) as an ImageSet; no file is opened."""
        images, labels, masks = (None if x is None else x[indices]
                                 for x in (self.images, self.labels, self.masks))
        factors = {name: values[indices] for name, values in self.factors.items()}
        files = self.files and self.files.subset(indices)
        return ImageSet(images, labels, self.classes, factors, masks, files)

    def get(self, indices):
        """Indices (b,) int64 -> (b, 3, H, W) uint8. Raises OSError if no file can be read."""
        return next(self.batches([indices]))

    def batches(self, index_batches):
        """Yields (b, 3, H, W) uint8 for each of `index_batches`, a list of (b,) int64, in order.
        PyTorch's random state is left as it is. Raises OSError if no file can be read."""
        if self.images is None:
            yield from self.files.batches(index_batches)
        else:
            yield from (self.images[indices] for indices in index_batches)

    def fingerprint(self):
        """A line that differs if the images do: a hash of the labels and, for folders, of names
        and sizes of the files, which is the same in memory and streamed; else of some pixels."""
        if self.files:
            content = self.files.names_and_sizes()
        else:
            content = self.images[:, :, self.images.shape[2] // 2, ::8].numpy().tobytes()
        digest = hashlib.sha256(self.labels.numpy().tobytes() + content)
        return f"{len(self)} images, {digest.hexdigest()[:12]}"


def held_out_indices(n, seed):
    """Indices of n training images -> those to train on, and up to 1000 (5 % at most) for the
    monitor of a run. Raises ValueError for too few."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    count = min(1000, n // 20)
    if count < 2:
        raise ValueError(f"{n} training images are too few: the monitor alone needs 40 (1 in 20)")
    return order[count:], order[:count]


# ----------------------------------------------------------------------------- sources of images

DATA_DIR = Path("data")                             # where torchvision downloads to
PUBLIC = {
    "cifar10": lambda split: datasets.CIFAR10(DATA_DIR, split == "train", download=True),
    "cifar100": lambda split: datasets.CIFAR100(DATA_DIR, split == "train", download=True),
    "stl10": lambda split: datasets.STL10(DATA_DIR, split, download=True),
}


def load_public(name, split, limit, seed):
    """CIFAR-10/100 and STL-10 through torchvision; OSError when they cannot be downloaded."""
    try:
        source = PUBLIC[name](split)
    except (OSError, RuntimeError) as error:        # URLError, or RuntimeError: a bad archive
        reason = str(error).splitlines()[0]
        raise OSError(f"cannot download {name} ({reason}). Put torchvision's archive for it into "
                      f"{DATA_DIR}/ yourself, or use --data shapes or --data folder:PATH") from None
    labels = torch.tensor(source.labels if name == "stl10" else source.targets)
    images = torch.from_numpy(np.asarray(source.data))
    images = images if name == "stl10" else images.permute(0, 3, 1, 2)          # -> (n, 3, H, W)
    chosen = choose(len(images), limit, seed)
    return ImageSet(images[chosen].contiguous(), labels[chosen].long(), list(source.classes))


def choose(n, limit, seed):
    """Indices of a random subset, one for each seed: files and labels come sorted by class."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[:limit].sort().values if limit else torch.arange(n)


# Images of an evaluation's gallery, at most: all of CIFAR-10's training images; features and k-NN
# of a million would take 15 GB and hours
GALLERY = 50_000
ASSUMED_FREE_MEMORY = 4 * 10**9                     # bytes, where the system gives no figure
CGROUPS = {                                         # Linux's control groups, version 2 and 1
    "": ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
               "total_inactive_file")}


def read_lines(path):
    """A file's lines, none where it cannot be read."""
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def cgroup_memory():
    """Bytes that the memory limit of this process's container or batch job leaves, and those of
    the groups around it; infinity without a limit. Inactive cached files count as free, because
    the kernel drops them first."""
    left = math.inf
    for _, controllers, group in (line.split(":", 2) for line in read_lines("/proc/self/cgroup")):
        if controllers not in CGROUPS:
            continue
        root, *names, inactive = CGROUPS[controllers]
        folder = Path(root + group)     # often the host's name, where `root` is the container's own
        for folder in (folder, *folder.parents):
            limit, used, stat = (read_lines(folder / name) for name in (*names, "memory.stat"))
            if limit and limit[0] != "max":
                cached = dict(map(str.split, stat))[inactive]
                left = min(left, max(0, int(limit[0]) - int(used[0]) + int(cached)))
    return left


def free_memory():
    """(bytes of memory that are free, "free"), of the machine or within this process's limit, or a
    guess where there is no /proc/meminfo."""
    free = [1024 * int(line.split()[1]) for line in read_lines("/proc/meminfo")
            if line.startswith("MemAvailable:")]
    if not free:
        return ASSUMED_FREE_MEMORY, "free memory, as is assumed"
    left = cgroup_memory()
    return (left, "free within the control group's limit") if left < free[0] else (free[0], "free")


def fits_in_memory(what, n, side, storage):
    """Whether n images go into memory, and a printed line with the reason: `storage` demands it, or
    is "auto" and the copies of all processes take no more than half of the free memory (the other
    half is for the copies that subsets make)."""
    processes = distributed.world_size()
    need, (free, free_text) = 3 * n * side**2 * processes, free_memory()
    small = need <= free / 2
    reason = (f"--storage {storage}" if storage != "auto" else
              f"{'at most' if small else 'more than'} half of the {free / 1e6:.0f} MB {free_text}")
    memory = storage == "memory" or storage == "auto" and small
    print(f"{what}: {n} images of {side} x {side} pixels, {need / 1e6:.1f} MB for {processes} "
          f"{'process' if processes == 1 else 'processes'}, are "
          f"{'held in memory' if memory else 'streamed from their files'} ({reason})")
    return memory


def load_folder(path, split, size, limit, seed, storage):
    """The images of `list_folder` as squares of size * 8/7 pixels (256 for 224, as DINO does), or
    smaller if the first one is smaller."""
    root, names, labels, classes, ignored = list_folder(path, split)
    if ignored:
        counts = ", ".join(f"{name} {count}" for name, count in ignored.most_common())
        print(f"{root}: ignored {ignored.total()} files: {counts}")
    names, labels = np.array([os.fsencode(name) for name in names]), torch.tensor(labels)
    chosen = choose(len(names), limit, seed)
    labels = labels[chosen]
    files = ImageFiles(root, names[chosen.numpy()], labels.numpy(), size * 8 // 7)
    sizes = (image_size(files.path(i)) for i in range(len(files)))
    files.side = min(files.side, *next(filter(None, sizes), (files.side,)))
    images = None
    if fits_in_memory(f"folder:{root}", len(files), files.side, storage):
        images = torch.empty(len(files), 3, files.side, files.side, dtype=torch.uint8)
        parts = torch.arange(len(files)).split(128)
        for part, pixels in zip(counted("reading images", len(files), parts), files.batches(parts)):
            images[part] = pixels
    return ImageSet(images, labels, classes, files=files)


def image_count(text):
    """argparse type of --train-images and --test-images: `all` -> None, else a whole number."""
    return None if text == "all" else int(text)


def load(name, split, size, limit=None, seed=0, storage="auto"):
    """The data set `name` (shapes, scenes, cifar10, cifar100, stl10 or folder:PATH), split train or
    test, as an ImageSet of at most `limit` images. storage: `memory`, `stream` or `auto`, see
    `fits_in_memory`. Raises ValueError for an unknown name, OSError for what cannot be had."""
    if name.startswith("folder:"):
        return load_folder(name[len("folder:"):], split, size, limit, seed, storage)
    if storage == "stream":
        raise ValueError(f"--storage stream is for folder:PATH; {name} is always held in memory")
    if name == "shapes":
        images, factors, masks = shapes.load(split, limit, seed)
        return ImageSet(images, factors["shape"], shapes.FACTORS["shape"], factors, masks)
    if name == "scenes":                        # class: the shape of the largest object, the first
        images, factors, masks = scenes.load(split, limit, seed)
        return ImageSet(images, factors["shape"][:, 0], scenes.FACTORS["shape"], factors, masks)
    if name in PUBLIC:
        return load_public(name, split, limit, seed)
    raise ValueError(f"unknown data set {name!r}; choose shapes, scenes, {', '.join(PUBLIC)} "
                     "or folder:PATH")


def evaluation_problem(name):
    """Why the data set `name` cannot be scored, in one sentence, or None where it can. Opens no
    image. Raises FileNotFoundError for a folder without images to train on."""
    if not name.startswith("folder:"):
        return None
    path = name[len("folder:"):]
    _, _, labels, classes, _ = list_folder(path, "train")
    try:
        _, _, test_labels, test_classes, _ = list_folder(path, "test")
    except FileNotFoundError:
        return f"{name} cannot be scored because it has no test images in {path}/test/<class>/…"
    if -1 in labels + test_labels:
        return (f"{name} cannot be scored because some images have no class; their places are "
                f"{path}/train/<class>/… and {path}/test/<class>/…")
    if classes != test_classes:
        odd = ", ".join(sorted({*classes} ^ {*test_classes}))
        return f"{name} cannot be scored because only train or only test has the classes {odd}"
    return None


# ------------------------------------------------------------------------------------------- views

def normalize(images, size=None):
    """(B, 3, H, W) uint8, or float in [0, 1] -> float of ImageNet statistics, size x size."""
    x = images.float() / 255 if images.dtype == torch.uint8 else images
    if size and x.shape[-1] != size:
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return (x - MEAN.to(x.device)) / STD.to(x.device)


@dataclass
class Augment:
    """DINO's augmentations for global crops, on whole batches of tensors on their own device.

    Each of `flip`, `jitter`, `grey`, `blur`, `solarise` is the probability that a view gets it;
    crop is the range of the area kept. The defaults are DINO's, with blur and solarise averaged
    over its two global views. Our choices, for batched arithmetic: crops are sampled
    bilinearly, and brightness, saturation and hue are one 3x3 colour matrix per view (hue turns
    about the grey axis).
    """
    crop: tuple = (0.4, 1.0)
    flip: float = 0.5
    jitter: float = 0.8
    strength: tuple = (0.4, 0.4, 0.2, 0.1)        # brightness, contrast, saturation, hue (in turns)
    grey: float = 0.2
    blur: float = 0.55
    solarise: float = 0.1
    part = 0            # views, where the images at hand are one process's part of a batch

    def __call__(self, images, views, size, part=False):
        """(B, 3, H, W) uint8 -> (views, B, 3, size, size) float, normalised. part: each process has
        other images, and together they draw the random numbers that one with all of them would."""
        self.part = views if part else 0
        x = images.float().div(255).repeat(views, 1, 1, 1)                      # (V*B, 3, H, W)
        x = self.random_crop(x, size)
        x = self.random_colour(x)
        x = self.random_blur(x)
        x = torch.where(self.coin(x, self.solarise) & (x >= 0.5), 1 - x, x)
        return normalize(x).view(views, len(images), 3, size, size)

    def rand(self, x):
        if not self.part:
            return torch.rand(len(x), device=x.device)
        of_all_ranks = torch.rand(distributed.world_size() * len(x), device=x.device)
        return distributed.shard(of_all_ranks, self.part)

    def uniform(self, x, low, high):
        return low + (high - low) * self.rand(x)

    def coin(self, x, probability):
        return (self.rand(x) < probability).view(-1, 1, 1, 1)

    def random_crop(self, x, size):
        """RandomResizedCrop, aspect 3/4 … 4/3, and horizontal flip as one affine map per view."""
        area = self.uniform(x, *self.crop)
        ratio = self.uniform(x, np.log(3 / 4), np.log(4 / 3)).exp().sqrt()
        w, h = (area.sqrt() * ratio).clamp(max=1), (area.sqrt() / ratio).clamp(max=1)
        theta = x.new_zeros(len(x), 2, 3)
        theta[:, 0, 0] = torch.where(self.coin(x, self.flip).flatten(), -w, w)
        theta[:, 1, 1] = h
        theta[:, 0, 2] = self.uniform(x, -1, 1) * (1 - w)                  # the image spans [-1, 1]
        theta[:, 1, 2] = self.uniform(x, -1, 1) * (1 - h)
        grid = F.affine_grid(theta, (len(x), 3, size, size), align_corners=False)
        return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)

    def random_colour(self, x):
        """Brightness, saturation, hue by a 3x3 matrix, contrast about the view's mean, grey."""
        b, c, s, h = self.strength
        on = self.coin(x, self.jitter).flatten().float()
        brightness = 1 + on * self.uniform(x, -b, b)
        contrast = 1 + on * self.uniform(x, -c, c)
        saturation = 1 + on * self.uniform(x, -s, s)
        saturation = saturation * (1 - self.coin(x, self.grey).flatten().float())
        rotation = on * self.uniform(x, -h, h) * 2 * torch.pi
        luma = x.new_tensor([0.299, 0.587, 0.114]).expand(3, 3)     # every row: the grey of a pixel
        eye, third = torch.eye(3, device=x.device), x.new_full((3, 3), 1 / 3)
        # Rodrigues' formula about (1, 1, 1) / sqrt(3):
        # cos * I + (1 - cos) * projection + sin * cross product
        cross = x.new_tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
        cos, sin = rotation.cos().view(-1, 1, 1), rotation.sin().view(-1, 1, 1)
        matrix = cos * eye + (1 - cos) * third + sin * cross                    # (V*B, 3, 3)
        saturate = luma + saturation.view(-1, 1, 1) * (eye - luma)
        matrix = brightness.view(-1, 1, 1) * (saturate @ matrix)
        x = (matrix @ x.flatten(2)).view_as(x)
        mean = x.mean((1, 2, 3), keepdim=True)
        return (mean + contrast.view(-1, 1, 1, 1) * (x - mean)).clamp(0, 1)

    def random_blur(self, x):
        """Gaussian blur, sigma 0.1 … 2 pixels at 224 px, in proportion below; kernel 5 % wide."""
        if self.blur == 0:
            return x
        side = x.shape[-1]
        reach = max(1, side // 40)
        sigma = self.uniform(x, 0.1, 2.0) * max(side / 224, 0.5)
        offsets = torch.arange(-reach, reach + 1, device=x.device)
        kernel = torch.softmax(-offsets**2 / (2 * sigma[:, None] ** 2), dim=1)  # (V*B, taps)
        kernel = kernel.repeat_interleave(3, 0)[:, None]                  # one per view and channel
        flat = F.pad(x.reshape(1, -1, side, side), [reach] * 4, mode="reflect")
        flat = F.conv2d(flat, kernel[:, :, None], groups=len(kernel))
        flat = F.conv2d(flat, kernel[..., None], groups=len(kernel))
        return torch.where(self.coin(x, self.blur), flat.view_as(x), x)


# Which augmentations a data set uses. `shapes` keeps position (no flip, large crops) and hides the
# exact tint and brightness, because two views could agree on them alone (our choice).
AUGMENT = {
    "shapes": Augment(crop=(0.7, 1.0), flip=0, jitter=1, strength=(0.4, 0.4, 0.8, 0.5), grey=0,
                      blur=0, solarise=0),
    # Colours name the objects of a scene, so the hue moves little; flips and crops, because the
    # layout of a scene would otherwise be the cheapest thing for two views to agree on
    "scenes": Augment(crop=(0.5, 1.0), jitter=1, strength=(0.4, 0.4, 0.8, 0.08), grey=0, blur=0,
                      solarise=0),
    "photographs": Augment(),
    # Our choice, because photographs of 32 pixels have no detail that blur could remove
    "small photographs": Augment(crop=(0.25, 1.0), blur=0, solarise=0),
}


def augmentation(name, size):
    """The data set's own; photographs of less than 64 pixels: gentler than DINO's."""
    return AUGMENT.get(name, AUGMENT["small photographs" if size < 64 else "photographs"])


def main(name="shapes"):
    """Prints what the training images of `name` are and draws 8 of them, each with 7 views."""
    folder = name.startswith("folder:")
    images = load(name, "train", 224, None if folder else 1000, 0, "stream" if folder else "auto")
    shown = images.get(torch.linspace(0, len(images) - 1, 8).long())                # (8, 3, H, W)
    size, counts = min(224, shown.shape[-1]), images.labels[images.labels >= 0].bincount().tolist()
    print(f"{name}: {len(images)} train images, {shown.shape[-1]} x {shown.shape[-1]} pixels")
    print("classes:", ", ".join(map("{} {}".format, images.classes, counts)) or "none")
    augment = augmentation(name, size)
    views = torch.cat([normalize(shown, size)[None], augment(shown, 7, size)])      # (8, 8, 3, ...)
    print(f"views of {size} x {size} pixels: {augment}")
    views = (views * STD + MEAN).transpose(0, 1).flatten(0, 1).clamp(0, 1)
    save_image(F.interpolate(views, (96, 96)), "data.png", nrow=8)
    print("data.png: a row for each of 8 images, then 7 views of it")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2])
    except (OSError, ValueError) as error:
        sys.exit(f"data.py: {error}")
