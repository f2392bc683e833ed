"""Fourier domain augmentations: views of perturbed spectra, for train.py and for pretraining.

    python -m extras.fourier train --out runs/fourier            # train.py, with its flags
    python -m extras.fourier pretrain --out runs/teacher-fourier           # extras.pretrain
    python -m extras.fourier train --fda-probability 0 0 0 0     # the control: no image is changed
    python -m extras.robustness runs/fourier/ckpt.pt             # what it is for: corrupted images

Source: Kalibhat, dissertation, section 5.4. After the random crop, f = rfft2(x) of each channel is
multiplied by a filter and irfft2 returns to pixels, clamped to [0, 1]; the other augmentations
follow. The filter is the product of what an image gets, each with its probability:

    amplitude rescale   p ~ U[0.8, 1.75) for every frequency and channel              0.2
    phase shift         exp(+-i theta), one theta ~ U[0.4, 0.7) radians for an image    0.2
    frequency mask      0 for a share k ~ U[0.01, 0.1] of the frequencies               0.5
    Gaussian mask       min(1, sum over 20 centers o of exp(-|(u, v) - o|^2 / 2 s^2))   0.2

s ~ U[10, 15] at 224 pixels in u and in v, in proportion at other sizes. Our choices, where the
source is silent: the kernels are summed and clamped at 1, and frequency 0, the mean of an image,
is left alone by all but the amplitude rescale, because the others would darken the image.

Only the branch that learns gets it, as in the source's left view. Pretraining: the student's crops,
not the teacher's. train.py: the descriptor reads the tokens of the perturbed view, while the target
is the CLS of the same view unperturbed. Both are computed in every step; with --cache-views, as in
recipe `stable`, the view is the un-augmented image.
"""
import argparse
import dataclasses
import sys
from functools import partial

import torch
from torch.nn import functional as F

import checkpoint
import data
import distributed
import flags
import precision
import tokens
import train
from extras import pretrain

AMPLITUDE, PHASE, MASKED, CENTERS, SPREAD = (0.8, 1.75), (0.4, 0.7), (0.01, 0.1), 20, (10, 15)
PROBABILITIES = (0.2, 0.2, 0.5, 0.2)        # of the table's rows, for the left view


# ---- the augmentation ----------------------------------------------------------------------------

def uniform(shape, low, high, device):
    return low + (high - low) * torch.rand(shape, device=device)


def gaussian_mask(n, size, device):
    """-> (n, 1, size, size/2+1) in [0, 1]: the Gaussian masks of n images."""
    kernels = []
    for length in (size, size // 2 + 1):                                        # u, v
        center = uniform((n, CENTERS, 1), 0, length, device)
        spread = uniform((n, CENTERS, 1), *SPREAD, device) * size / 224
        frequency = torch.arange(length, device=device)
        kernels.append((-((frequency - center) / spread).square() / 2).exp())
    return torch.einsum("ncu,ncv->nuv", *kernels).clamp(max=1)[:, None]


def draw_filter(n, size, probabilities, device):
    """-> (n, 3, size, size/2+1) complex: what multiplies rfft2 of n square images."""
    one, all_bins = (n, 1, 1, 1), (size, size // 2 + 1)
    rescale, shift, mask, mix = (uniform(one, 0, 1, device) < p for p in probabilities)
    sign = 1 - 2 * (uniform(one, 0, 1, device) < 0.5).float()
    theta = shift * sign * uniform(one, *PHASE, device)
    keep = uniform((n, 1, *all_bins), 0, 1, device) >= mask * uniform(one, *MASKED, device)
    blend = torch.where(mix, gaussian_mask(n, size, device), 1.0)
    spectrum = torch.polar(keep * blend, theta.expand_as(blend))
    spectrum[..., 0, 0] = 1
    return spectrum * torch.where(rescale, uniform((n, 3, *all_bins), *AMPLITUDE, device), 1.0)


def perturb(x, spectrum):
    """x (n, 3, S, S) in [0, 1], a filter each -> the same shape; to the bit where a filter is 1."""
    y = torch.fft.irfft2(torch.fft.rfft2(x) * spectrum, s=x.shape[-2:]).clamp(0, 1)
    return torch.where((spectrum == 1).flatten(1).all(1)[:, None, None, None], x, y)


class FourierAugment(data.Augment):
    """A data set's augmentation, and with `pair` the same views with a perturbed spectrum."""

    spectrum = None

    def random_crop(self, x, size):
        x = super().random_crop(x, size)
        return x if self.spectrum is None else perturb(x, self.spectrum)

    def pair(self, images, views, size, probabilities):
        """(B, 3, H, W) uint8 -> views as they are and perturbed, normalised, (views, B, 3, size,
        size) each, with the same crops, colours and blur; views = 0: of un-augmented
        images."""
        spectrum = draw_filter(max(1, views) * len(images), size, probabilities, images.device)
        if not views:
            x = F.interpolate(images / 255, (size, size), mode="bilinear", antialias=True)
            return data.normalize(x)[None], data.normalize(perturb(x, spectrum))[None]
        with torch.random.fork_rng([images.device] if images.is_cuda else []):
            clean = self(images, views, size)
        self.spectrum = spectrum
        perturbed = self(images, views, size)               # draws the same numbers again
        self.spectrum = None
        return clean, perturbed


# ---- the two seats -------------------------------------------------------------------------------

def switch_on(self, args, probabilities):
    """In what makes the views (`augment`) of a run; config.json has the probabilities."""
    if distributed.world_size() > 1:
        raise ValueError("extras.fourier runs in one process")
    args.fda_probability = list(probabilities)
    self.augment = FourierAugment(**dataclasses.asdict(self.augment))
    self.pair = lambda images, views: self.augment.pair(images, views, args.image_size,
                                                        probabilities)


class FourierPretrainer(pretrain.Pretrainer):
    """The teacher gets its crops as they are, the student perturbed ones."""

    def __init__(self, args, images, probabilities):
        if args.window:
            raise ValueError("extras.fourier has no --window")
        super().__init__(args, images)
        switch_on(self, args, probabilities)
        self.augment_local = FourierAugment(**dataclasses.asdict(self.augment_local))

    def crops(self, images):
        clean, perturbed = self.pair(images, 2)
        crops, args = [perturbed], self.args
        if args.locals:
            crops.append(self.augment_local.pair(images, args.locals, args.local_size,
                                                 args.fda_probability)[1])
        return [clean], crops


class FourierTokens(tokens.TrainingTokens):
    """z_t of training steps, (V*b, N+2, d): CLS of the view as it is, then all tokens of the
    perturbed view."""

    def __init__(self, teacher, images, args, probabilities):
        super().__init__(teacher, images, args)
        switch_on(self, args, probabilities)

    def fill_cache(self):
        """None: perturbed tokens are new in every step."""

    @torch.no_grad()
    def encode(self, images, views, part=False):
        if not part:                                        # not of a training step
            return super().encode(images, views)
        args, views = self.args, 0 if self.args.cache_views else views
        with precision.autocast(args.device, args.precision):
            clean, perturbed = (self.teacher(x.flatten(0, 1))
                                for x in self.pair(images.to(args.device), views))
        return torch.cat([clean[:, :1], perturbed], 1)


def register():
    """In training, the descriptors of all recipes read what follows the first CLS."""
    for name, base in checkpoint.STUDENTS.items():
        class Perturbed(base):
            def preprocess(self, z_t):
                if not self.training:
                    return super().preprocess(z_t)
                clean = super().preprocess(torch.cat([z_t[:, :1], z_t[:, 2:]], 1))[:, :1]
                return torch.cat([clean, super().preprocess(z_t[:, 1:])], 1)

            def describe(self, z_t, hard=False, attention=False):
                return super().describe(z_t[:, 1:] if self.training else z_t, hard, attention)
        checkpoint.STUDENTS[name] = Perturbed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=flags.HelpFormatter,
        epilog="All other flags are those of train.py or of extras.pretrain.")
    parser.add_argument("command", choices=["train", "pretrain"])
    parser.add_argument("--fda-probability", type=float, nargs=4, default=PROBABILITIES,
                        metavar=("RESCALE", "SHIFT", "MASK", "GAUSSIAN"),
                        help="of the table's rows for each view")
    args, rest = parser.parse_known_args()
    sys.argv = [f"extras.fourier {args.command}", *rest]
    if args.command == "train":
        register()
        train.main(partial(FourierTokens, probabilities=args.fda_probability))
    else:
        pretrain.main(partial(FourierPretrainer, probabilities=args.fda_probability))


if __name__ == "__main__":
    main()
