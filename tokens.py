"""The teacher's tokens that a run trains on: new augmented views in every step, or cached ones.

With --cache-views the teacher runs once, before step 1, and not in every step.
"""
import math

import torch

import data
import distributed
import precision
from progress import counted


class TrainingTokens:
    """z_t of the training images `images` (an ImageSet), as args' flags want them."""

    def __init__(self, teacher, images, args):
        """Raises ValueError where --cache-views does not fit into memory."""
        self.teacher, self.images, self.args = teacher, images, args
        self.augment = data.augmentation(args.data, args.image_size)
        self.cache = self.fill_cache() if args.cache_views else None

    @torch.no_grad()
    def encode(self, images, views, part=False):
        """uint8 images (b, 3, H, W) -> z_t of their augmented views (views*b, N+1, d); views = 0:
        of the images without augmentation. part: see data.Augment."""
        args, images = self.args, images.to(self.args.device)
        x = (self.augment(images, views, args.image_size, part).flatten(0, 1) if views
             else data.normalize(images, args.image_size))
        with precision.autocast(args.device, args.precision):
            return self.teacher(x)

    def fill_cache(self):
        """-> (n, C, N+1, d) float16 in main memory: view 0 of each image is the image without
        augmentation. Drawn from the seed alone, so a resumed run has the same."""
        args, images = self.args, self.images
        shape = (len(images), args.cache_views, 1 + (args.image_size // self.teacher.patch) ** 2,
                 self.teacher.width)
        need = 2 * math.prod(shape) * distributed.world_size()              # bytes
        if need > 0.9 * data.free_memory()[0]:
            raise ValueError(f"--cache-views {args.cache_views} takes {need / 1e9:.3g} GB, and less"
                             " memory is free; use fewer, or 0 to run the teacher in every step")
        cache = torch.empty(shape, dtype=torch.float16)
        batches = torch.arange(len(images)).split(args.batch_size)
        gpus = [args.device] if "cuda" in args.device else []
        with torch.random.fork_rng(gpus):
            torch.manual_seed(args.seed)
            indices = counted("teacher's tokens, images", len(images), batches)
            for index, x in zip(indices, images.batches(batches)):
                for view in range(args.cache_views):
                    cache[index, view] = self.encode(x, min(view, 1)).half().cpu()
        return cache

    def first(self, n, augmented=False):
        """Yields z_t (b, N+1, d), float32, of the first n training images, for `Student.fit`: not
        at once, because 20 000 images of 257 tokens of width 384 are 8 GB."""
        batches = torch.arange(min(n, len(self.images))).split(self.args.batch_size)
        if self.cache is not None and not augmented:
            yield from (self.cache[index, 0].to(self.args.device).float() for index in batches)
            return
        for x in counted("teacher's tokens for the statistics, images", sum(map(len, batches)),
                         self.images.batches(batches)):
            yield self.encode(x, int(augmented)).float()

    @torch.no_grad()
    def gallery(self, held_out):
        """-> a function of indices (b,) into the images of `data.load`: their z_t (b, N+1, d)
        without augmentation, of the cache or, for those of `held_out`, new. None without a cache,
        and for more images than the evaluation's gallery has."""
        n = len(self.images)
        if self.cache is None or n + len(held_out) > data.GALLERY:
            return None
        batches = counted("teacher's tokens of held-out images", len(held_out), held_out.batches(
            torch.arange(len(held_out)).split(self.args.batch_size)))
        others = torch.cat([self.encode(x, 0).half().cpu() for x in batches])
        rows = torch.cat(data.held_out_indices(n + len(others), self.args.seed)).argsort()

        def z_t(indices):
            row = rows[indices]
            trained = self.cache[row.clamp(max=n - 1), 0]
            return torch.where((row < n)[:, None, None], trained, others[(row - n).clamp(min=0)])
        return z_t

    def batches(self, epoch, start, steps):
        """Yields this process's z_t (V*b, N+1, d) of the steps from `start` on, through the images
        in an order that depends on seed and epoch alone."""
        args = self.args
        generator = torch.Generator().manual_seed(args.seed + epoch)
        order = torch.randperm(len(self.images), generator=generator)
        indices = order.split(args.batch_size)[start:steps]
        if self.cache is None:
            for x in self.images.batches([distributed.shard(index) for index in indices]):
                yield self.encode(x, args.views, part=True)
            return
        for index in indices:
            views = torch.rand(len(index), args.cache_views).argsort(1)[:, :args.views]
            index, views = distributed.shard(index), distributed.shard(views)
            z_t = self.cache[index[:, None], views]                         # (b, V, N+1, d)
            yield z_t.transpose(0, 1).flatten(0, 1).to(args.device).float()
