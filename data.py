"""Pictures: the embedded data set `shapes`, public data sets, your own folders, augmented views.

    python data.py                  # draws 96 pictures of `shapes` into shapes.png
    python data.py cifar10          # the same for another data set (or folder:PATH)

Images stay uint8 in memory, (n, 3, H, W); a batch becomes float only on the training device, where
the V augmented views are made for the whole batch at once.
"""
import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

import distributed

# ImageNet statistics, because the official DINO weights expect them; our own teachers use the same.
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@dataclass
class ImageSet:
    """n pictures in memory. `labels` are -1 where a picture has none; `factors` and `masks` (True
    on the object) exist for `shapes` only; `skipped` counts the files that could not be read."""
    images: torch.Tensor                            # (n, 3, H, W) uint8
    labels: torch.Tensor                            # (n,) int64
    classes: list
    factors: dict = field(default_factory=dict)     # name -> (n,) int64
    masks: torch.Tensor | None = None               # (n, H, W) bool
    skipped: int = 0

    def __len__(self):
        return len(self.images)

    def subset(self, indices):
        return ImageSet(self.images[indices], self.labels[indices], self.classes)

    def get(self, indices):
        return self.images[torch.as_tensor(indices)]

    def batches(self, index_batches):
        return (self.images[i] for i in index_batches)

    @property
    def labelled(self):
        return len(self.labels) > 0 and bool((self.labels >= 0).all())

    def fingerprint(self):
        """Their number and a hash of the labels and a few pixels of each: have they changed?"""
        some = self.images[:, :, self.images.shape[2] // 2, ::8]                # (n, 3, W / 8)
        digest = hashlib.sha256(self.labels.numpy().tobytes() + some.numpy().tobytes())
        return f"{len(self)} pictures, {digest.hexdigest()[:12]}"


# ---------------------------------------------------------------- shapes: drawn from (seed, index)

FACTORS = {
    "shape": ["disc", "ring", "square", "triangle", "star", "cross", "crescent", "heart",
              "hourglass", "bars"],
    "colour": ["red", "orange", "yellow", "green", "cyan", "azure", "violet", "magenta"],
    "size": ["small", "medium", "large"],
    "column": ["left", "centre", "right"],
    "row": ["top", "middle", "bottom"],
}
HUES = torch.tensor([0.0, 30.0, 58.0, 120.0, 180.0, 212.0, 268.0, 312.0])  # degrees, one per colour
RADII = torch.tensor([7.0, 9.0, 11.0])                                        # pixels, one per size
SIDE = 32


def signed_distance(kind, x, y):
    """Distance to the outline of FACTORS["shape"][kind], negative inside, for points in units of
    the object's radius; exact near the outline, which is all that anti-aliasing needs."""
    ax, ay, r = x.abs(), y.abs(), (x * x + y * y).sqrt()
    if kind == 0:                                                               # disc
        return r - 0.9
    if kind == 1:                                                               # ring
        return (r - 0.68).abs() - 0.24
    if kind == 2:                                                               # square
        return torch.maximum(ax, ay) - 0.8
    if kind == 3:                                                               # triangle, tip up
        return torch.maximum(0.866 * ax - 0.5 * y, y) - 0.5
    if kind == 4:                                                          # star: one fifth, folded
        fifth = 2 * torch.pi / 5
        angle = torch.atan2(x, -y)
        angle = (angle - fifth * torch.round(angle / fifth)).abs()
        # the edge runs from the tip (1, 0) to the notch at half a fifth, radius 0.42
        return (r * angle.cos() - 1.0) * 0.350 + r * angle.sin() * 0.937
    if kind == 5:                                                               # cross
        return torch.minimum(torch.maximum(ax - 0.95, ay - 0.28),
                             torch.maximum(ay - 0.95, ax - 0.28))
    if kind == 6:                                                               # crescent
        return torch.maximum(r - 0.95, 0.72 - ((x - 0.42) ** 2 + y * y).sqrt())
    if kind == 7:                                                        # heart: two discs, a wedge
        lobes = ((ax - 0.42) ** 2 + (y + 0.35) ** 2).sqrt() - 0.48
        wedge = torch.maximum(0.755 * ax + 0.656 * y - 0.60, -0.35 - y)
        return torch.minimum(lobes, wedge)
    if kind == 8:                                                               # hourglass
        return torch.maximum(ay - 0.85, 0.78 * (ax - 0.8 * ay) - 0.06)
    return torch.maximum(ax - 0.85, (ay - 0.5).abs() - 0.22)                    # two bars


def hsv_to_rgb(hue, saturation, value):
    """(n,) degrees, (n,) and (n,) in [0, 1] -> (n, 3, 1, 1) in [0, 1]."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + hue[:, None] / 60) % 6              # the usual closed form
    rgb = value[:, None] * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))
    return rgb[..., None, None]


def draw_shapes(indices, seed=0):
    """Pictures `indices` of stream `seed` -> (images (n, 3, 32, 32) uint8, factors, masks).

    Picture i depends on (seed, i) alone. Philox is a counter-based generator whose raw output numpy
    guarantees to be the same on every machine and in every version; 24 numbers choose the picture,
    the rest is its pixel noise. Backgrounds are plain and dim on purpose (our choice): with busy
    ones a self-supervised teacher learns the background, the cheaper cue.
    """
    raw = np.stack([np.random.Philox(key=[seed, int(i)]).random_raw(24 + 3 * SIDE * SIDE // 8)
                    for i in indices])
    u = (raw[:, :24] >> np.uint64(40)).astype(np.float32) / 2**24
    u = torch.from_numpy(u)                                                     # (n, 24) in [0, 1)
    noise = np.ascontiguousarray(raw[:, 24:]).view(np.uint8)
    noise = torch.from_numpy(noise.reshape(-1, 3, SIDE, SIDE))
    factors = {name: (u[:, k] * len(values)).long()
               for k, (name, values) in enumerate(FACTORS.items())}

    # Background: a dim, nearly grey colour with faint stripes of any direction and width.
    axis = torch.arange(SIDE) + 0.5
    py, px = torch.meshgrid(axis, axis, indexing="ij")                      # (32, 32) pixel centres
    col = lambda k: u[:, k, None, None]                                      # noqa: E731  (n, 1, 1)
    turn = torch.pi * col(5)
    wave = ((px * turn.cos() + py * turn.sin()) * (0.3 + 0.7 * col(6)) + 6.28 * col(7)).sin()
    ground = hsv_to_rgb(360 * u[:, 8], 0.25 * u[:, 9], 0.18 + 0.2 * u[:, 10])
    ground = ground * (1 + 0.15 * col(11) * wave)[:, None]                       # (n, 3, 32, 32)

    # Object: position, size and angle are jittered: a factor is a category and not a number.
    cx = 16 + 3.5 * (factors["column"][:, None, None] - 1) + 2 * col(12) - 1
    cy = 16 + 3.5 * (factors["row"][:, None, None] - 1) + 2 * col(13) - 1
    radius = RADII[factors["size"]][:, None, None] * (0.95 + 0.1 * col(14))
    angle = 0.5 * col(15) - 0.25                                       # radians, about +-14 degrees
    dx, dy = (px - cx) / radius, (py - cy) / radius
    x, y = dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()
    distance = torch.empty_like(x)
    for kind in range(len(FACTORS["shape"])):
        chosen = factors["shape"] == kind
        distance[chosen] = signed_distance(kind, x[chosen], y[chosen])
    cover = (0.5 - distance * radius).clamp(0, 1)                   # (n, 32, 32) share of the pixel

    hue = HUES[factors["colour"]] + 16 * u[:, 16] - 8
    paint = hsv_to_rgb(hue, 0.7 + 0.3 * u[:, 17], 0.75 + 0.25 * u[:, 18])
    paint = paint * (1 - 0.25 * col(19) * (dx * (6.28 * col(20)).cos() + dy).clamp(-1, 1))[:, None]
    picture = ground + cover[:, None] * (paint - ground)
    picture = picture * 255 + (noise.float() - 127.5) * (0.1 * u[:, 21])[:, None, None, None]
    return picture.round().clamp(0, 255).byte(), factors, cover > 0.5


def load_shapes(split, size, limit, seed):
    """50 000 train or 10 000 test pictures; the splits are different streams of the generator."""
    n = limit or {"train": 50_000, "test": 10_000}[split]
    stream = 2 * seed + (split == "test")
    parts = [draw_shapes(range(i, min(i + 2000, n)), stream) for i in range(0, n, 2000)]
    images, factors, masks = zip(*parts)
    factors = {name: torch.cat([f[name] for f in factors]) for name in FACTORS}
    return ImageSet(torch.cat(images), factors["shape"], FACTORS["shape"], factors,
                    torch.cat(masks))


# ------------------------------------------------------------------------------- real photographs

DATA_DIR = Path("data")                             # where torchvision downloads to
# What IMG_EXTENSIONS stand for, and GIF, whatever the file's name is. Pillow knows more formats;
# for EPS it would run ghostscript on a stranger's program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
PUBLIC = {
    "cifar10": lambda split: datasets.CIFAR10(DATA_DIR, split == "train", download=True),
    "cifar100": lambda split: datasets.CIFAR100(DATA_DIR, split == "train", download=True),
    "stl10": lambda split: datasets.STL10(DATA_DIR, split, download=True),
}


def load_public(name, split, size, limit, seed):
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
    keep = subset(len(images), limit, seed)
    return ImageSet(images[keep].contiguous(), labels[keep].long(), list(source.classes))


def subset(n, limit, seed):
    """Indices of a random subset, one for each seed: files and labels come sorted by class."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[:limit].sort().values if limit else torch.arange(n)


def read_image(path, side):
    """A file's central square, turned upright as its EXIF says, as RGB (3, side, side) uint8.
    Raises OSError naming the file when it is missing, damaged or no image."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            # A JPEG at 1/2, 1/4 or 1/8 of its size, while it stays twice as large as is wanted: a
            # tenth of the time for 12 megapixels, and under 2 grey levels of difference
            image.draft("RGB", (2 * side, 2 * side))
            ImageOps.exif_transpose(image, in_place=True)
            # The crop comes before the resizing: 1 x 60000 pixels must not become gigabytes
            square = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
    except Exception as error:                      # Pillow raises many kinds on damaged files
        raise OSError(f"cannot read image {path}: {error}") from None
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def list_folder(path, split):
    """PATH/train/<class>/… and PATH/test/<class>/…, or for train a flat PATH, no picture opened ->
    (n files, n labels, -1 without a class, names of classes). Raises FileNotFoundError."""
    root = Path(path) / split if (Path(path) / split).is_dir() else Path(path)
    if not root.is_dir() or (root == Path(path) and split == "test"):
        raise FileNotFoundError(f"no folder {Path(path) / split}; expected PATH/train/<class>/… "
                                "and PATH/test/<class>/… (a flat folder of pictures is enough for "
                                "train.py --no-evaluate and extras.page --split train)")
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in IMG_EXTENSIONS)
    if not files:
        raise FileNotFoundError(f"no images in {root} (looked for {' '.join(IMG_EXTENSIONS)})")
    classes = sorted({f.relative_to(root).parts[0] for f in files if f.parent != root})
    number = {name: i for i, name in enumerate(classes)}
    labels = [number[f.relative_to(root).parts[0]] if f.parent != root else -1 for f in files]
    return files, labels, classes


def check_labels(name):
    """Whether the data set `name` can be scored, before hours go into it. Raises ValueError for a
    folder without classes, or with others in test than in train, OSError for one without test."""
    if not name.startswith("folder:"):
        return
    (_, labels, classes), (_, test_labels, test_classes) = (
        list_folder(name[len("folder:"):], split) for split in ("train", "test"))
    if -1 in labels + test_labels:
        raise ValueError(f"{name} has images without a class: put them into PATH/train/<class>/… "
                         "and PATH/test/<class>/…, or train with --no-evaluate")
    if classes != test_classes:
        odd = ", ".join(sorted(set(classes) ^ set(test_classes)))
        raise ValueError(f"{name}: only one of train and test has the class folders {odd}")


def load_folder(path, split, size, limit, seed):
    """The pictures of `list_folder` as squares of size * 8/7 pixels (256 for 224, as DINO does),
    or smaller if the first one is smaller. Unreadable files are named, skipped and counted."""
    files, labels, classes = list_folder(path, split)
    chosen = subset(len(files), limit, seed).tolist()
    files, labels, side = [files[i] for i in chosen], [labels[i] for i in chosen], size * 8 // 7
    with ThreadPoolExecutor() as pool:
        sizes = next((s for s in pool.map(image_size, files) if s), (side,))
        side = min(side, *sizes)
        tensors = list(pool.map(lambda f: try_read(f, side), files))
    kept = [i for i, t in enumerate(tensors) if t is not None]
    if not kept:
        raise OSError(f"none of the {len(files)} images chosen in {path} can be read")
    images, labels = torch.stack([tensors[i] for i in kept]), [labels[i] for i in kept]
    return ImageSet(images, torch.tensor(labels), classes, skipped=len(files) - len(kept))


def image_size(path):
    """(width, height) without decoding the pixels; None when the file is no image."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except Exception:
        return None


def try_read(path, side):
    try:
        return read_image(path, side)
    except OSError as error:
        print(f"skipped: {error}", file=sys.stderr)
        return None


def evaluation_problem(name):
    try:
        check_labels(name)
    except ValueError as e:
        return str(e)


def free_memory():
    return 10e9


def image_count(text):
    """argparse type of --train-images and --test-images: `all` -> None, else a whole number."""
    return None if text == "all" else int(text)


def load(name, split, size, limit=None, seed=0):
    """The data set `name` (shapes, cifar10, cifar100, stl10 or folder:PATH), split train or test,
    as an ImageSet of at most `limit` pictures. Raises ValueError for an unknown name, OSError for
    what cannot be had; both say what to do."""
    if name == "shapes":
        return load_shapes(split, size, limit, seed)
    if name in PUBLIC:
        return load_public(name, split, size, limit, seed)
    if name.startswith("folder:"):
        return load_folder(name[len("folder:"):], split, size, limit, seed)
    raise ValueError(f"unknown data set {name!r}; choose shapes, {', '.join(PUBLIC)} "
                     "or folder:PATH")


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
    blur: float = 0.5
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
        everyones = torch.rand(distributed.world_size() * len(x), device=x.device)
        return distributed.shard(everyones, self.part)

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
        turn = on * self.uniform(x, -h, h) * 2 * torch.pi
        luma = x.new_tensor([0.299, 0.587, 0.114]).expand(3, 3)     # every row: the grey of a pixel
        eye, third = torch.eye(3, device=x.device), x.new_full((3, 3), 1 / 3)
        # Rodrigues' formula about (1, 1, 1) / sqrt(3):
        # cos * I + (1 - cos) * projection + sin * cross product
        cross = x.new_tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
        cos, sin = turn.cos().view(-1, 1, 1), turn.sin().view(-1, 1, 1)
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
# exact tint and brightness, which would otherwise be the cheapest thing for two views to agree on.
AUGMENT = {
    "shapes": Augment(crop=(0.7, 1.0), flip=0, jitter=1, strength=(0.4, 0.4, 0.8, 0.5), grey=0,
                      blur=0, solarise=0),
    "photographs": Augment(),
    # Our choice: at 32 px there is no detail to blur away, and solarised cats help nobody
    "small photographs": Augment(crop=(0.25, 1.0), blur=0, solarise=0),
}


def augmentation(name, size):
    """The data set's own; photographs of less than 64 pixels: gentler than DINO's."""
    return AUGMENT.get(name, AUGMENT["small photographs" if size < 64 else "photographs"])


if __name__ == "__main__":
    from torchvision.utils import save_image
    name = sys.argv[1] if len(sys.argv) > 1 else "shapes"
    pictures = load(name, "train", 224, 96).images
    large = F.interpolate(pictures.float() / 255, scale_factor=3)
    save_image(large, f"{name.split(':')[0]}.png", nrow=16)
    views = augmentation(name, pictures.shape[-1])(pictures[:16], 6, pictures.shape[-1])
    large = F.interpolate(views.flatten(0, 1) * STD + MEAN, scale_factor=3)
    save_image(large, "views.png", nrow=16)
