"""How fast a training step is, where its time goes, and what the code gains over the plain way.

    python -m extras.benchmark --size small --json small.json  # train.py's defaults
    python -m extras.benchmark --size paper --steps 2          # ViT-B/16, 224 px; 8 pictures
    python -m extras.benchmark --size small --growth           # by batch, length, vocabulary, views

Pictures are random, and weights where the size has none at hand: that does not change the time. The
plain version is the same step as one would first write it: every prefix goes through the descriptor
again, with the keys of the tokens made again; the interpreter reads prefix by prefix; PIL augments
picture by picture; the teacher sees view by view; attention and AdamW are PyTorch's as they come.
Both compute in autocast's bf16 and take turns in one run, so that the speedup is about code and not
about precision or the hour. gemm_fraction is the step's FLOP/s over those of a large bf16 product,
taken in between.
"""
import argparse
import contextlib
import functools
import json
import platform
import random
import resource
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageFilter
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode, to_pil_image

import data
import evaluate
import losses
import model
import train

# Flags of train.py
SIZES = {"small": "--preset small", "cifar10": "--preset cifar10",
         "paper": "--preset paper --random-teacher"}
GROWTH = ("batch_size", "length", "vocab", "views")


# ------------------------------------------------------------------------------- the plain version

def plain_teacher(teacher, views, x):
    """torchvision's own forward, once per view: x (V*B, 3, H, W) -> (V*B, N+1, d)."""
    vit, tokens = teacher.vit, []
    for view in x.chunk(views):
        patches = vit.conv_proj(view).flatten(2).transpose(1, 2)                # (B, N, d)
        cls = vit.class_token.expand(len(view), -1, -1)
        tokens.append(vit.encoder(torch.cat([cls, patches], 1)))
    return torch.cat(tokens)


def plain_attention(layer, x, source, causal=False):
    """x (B, L, d) asks source (B, S, d), whose keys and values are made here."""
    q, k, v = (layer.split(part) for part in (layer.to_q(x), *layer.to_kv(source).chunk(2, -1)))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return layer.out(y.transpose(1, 2).flatten(2))


def plain_block(block, x, tokens=None):
    """All positions x (B, L, d) through a block: of the descriptor (with tokens) or interpreter."""
    h = block.norm1(x)
    x = x + plain_attention(block.attention, h, h, causal=tokens is not None)
    if tokens is not None:
        x = x + plain_attention(block.cross, block.norm_cross(x), tokens)
    return x + block.mlp(block.norm2(x))


def plain_describe(student, tokens):
    """model.Student.describe with nothing kept: the whole prefix goes in again for each symbol.
    BatchNorm sees the newest position only, once, so its statistics are the fast version's."""
    descriptor, draft, tokens = student.descriptor, student.draft, student.space(tokens)
    gist, read = torch.zeros_like(tokens[:, 0]), torch.zeros_like(tokens[:, 0])
    if draft is None:
        tokens = torch.cat([tokens[:, :1] + descriptor.cls_mark, tokens[:, 1:]], 1)
    else:
        tokens = tokens[:, 1:]
    prefix, said, gists, drafts = [], [], [], []
    embedding = descriptor.start[0].expand(len(tokens), -1)                     # (B, d)
    for t in range(descriptor.length):
        shown = 0 if draft is None else draft.show(gist - read)
        prefix.append(embedding + descriptor.position[t] + shown)
        x = torch.stack(prefix, 1)                                              # (B, t + 1, d)
        for block in descriptor.blocks:
            x = plain_block(block, x, tokens)
        h = descriptor.norms[t](x[:, -1].float())
        gist = gist if draft is None else draft.gist(h)
        first = said[0].ids if t else None
        bids = None if draft is None else draft.bids(gist - read, t, first)
        said.append(student.disc(h, bids=bids))
        embedding = said[-1].embedding
        read = read if draft is None else read + draft.word(said[-1].weights, t, said[0].ids)
        gists.append(gist)
        drafts.append(read)
    ids, weights, embeddings, logits = (torch.stack([getattr(s, name) for s in said], 1)
                                        for name in ("ids", "weights", "embedding", "logits"))
    aux = torch.stack([s.aux for s in said]).mean()
    gists, drafts = torch.stack(gists, 1), torch.stack(drafts, 1)
    return model.Description(ids, weights, embeddings, logits, gists, drafts, aux, None)


def plain_interpret(student, embeddings, drafts):
    """model.Student.interpret, a pass for each prefix: (B, T, d) -> (B, D, d)."""
    reader, z_s = student.interpreter, []
    for n in student.lengths:
        cls = reader.cls.expand(len(embeddings), -1, -1)
        x = torch.cat([cls, embeddings[:, :n] + reader.position[:n]], 1)
        for block in reader.blocks:
            x = plain_block(block, x)
        draft = 0 if student.draft is None else drafts[:, n - 1]
        z_s.append(reader.out(reader.norm(x[:, 0])) + draft)
    return torch.stack(z_s, 1)


def plain_augment(augment, images, views, size, part=False):
    """data.Augment by PIL, a picture at a time, as DINO's own code does it:
    (B, 3, H, W) uint8 -> (V, B, 3, size, size), normalised."""
    sigma = functools.partial(random.uniform, 0.1, 2)
    blur = transforms.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(sigma())))
    one = transforms.Compose([
        transforms.RandomResizedCrop(size, augment.crop, interpolation=InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(augment.flip),
        transforms.RandomApply([transforms.ColorJitter(*augment.strength)], augment.jitter),
        transforms.RandomGrayscale(augment.grey),
        transforms.RandomApply([blur], augment.blur),
        transforms.RandomSolarize(128, augment.solarise),
        transforms.ToTensor(),
        transforms.Normalize(data.MEAN.flatten(), data.STD.flatten())])
    pictures = [to_pil_image(image) for image in images.cpu()]
    made = [torch.stack([one(picture) for picture in pictures]) for _ in range(views)]
    return torch.stack(made).to(images.device)


def plain_parts(trainer):
    """The patches `under` which trainer.step is the plain version."""
    args, student, swap = trainer.args, trainer.student, mock.patch.object
    given = functools.partial
    augment = given(plain_augment, data.augmentation(args.data, args.image_size))
    optimizer = torch.optim.AdamW(losses.parameter_groups(student), lr=args.lr)
    return [swap(data, "augmentation", lambda name, size: augment),
            swap(trainer.teacher, "forward", given(plain_teacher, trainer.teacher, args.views)),
            swap(student, "describe", given(plain_describe, student)),
            swap(student, "interpret", given(plain_interpret, student)),
            swap(trainer, "optimizer", optimizer)]


@contextlib.contextmanager
def under(patches):
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


# ---------------------------------------------------------------------------------------- measuring

class Clock:
    """Seconds of wrapped functions, each without the wrapped functions that it calls."""

    def __init__(self, device, cpu=False):
        self.cuda = torch.device(device).type == "cuda"
        self.read = time.process_time if cpu else time.perf_counter
        self.seconds, self.inside = Counter(), [0.0]               # inside: a stack, of the callers

    def now(self):
        if self.cuda:
            torch.cuda.synchronize()
        return self.read()

    def time(self, function, *inputs):
        """Of the second call: the first finds caches and memory as another function left them."""
        function(*inputs)
        start = self.now()
        function(*inputs)
        return self.now() - start

    def wrap(self, owner, name, part):
        """A patch: while it holds, calls of owner.name count for `part`."""
        inner = getattr(owner, name)

        def timed(*inputs, **flags):
            self.inside.append(0.0)
            start = self.now()
            result = inner(*inputs, **flags)
            whole = self.now() - start
            self.seconds[part] += whole - self.inside.pop()
            self.inside[-1] += whole
            return result
        return mock.patch.object(owner, name, timed)


def time_parts(trainer, images, steps, clock):
    """Where the time of a step goes: {part: {"seconds", "share"}}, mean over steps. Loss is what
    train.forward does itself, optimiser what Trainer.step does itself: clipping, AdamW, EMA."""
    student = trainer.student
    parts = [(data.Augment, "__call__", "augmentation"), (trainer.teacher, "forward", "teacher"),
             (student, "describe", "descriptor"), (student, "interpret", "interpreter + projector"),
             (student.projector, "forward", "interpreter + projector"), (train, "forward", "loss"),
             (torch.Tensor, "backward", "backward"), (trainer, "step", "optimiser")]
    patches = [clock.wrap(*part) for part in parts]
    with under(patches):
        for _ in range(steps):
            trainer.step(images, 0)
    total = sum(clock.seconds.values())
    return {name: {"seconds": clock.seconds[name] / steps, "share": clock.seconds[name] / total}
            for name in dict.fromkeys(part for *_, part in parts)}


def product_seconds(device, clock):
    """(seconds, FLOPs) of one large square product in autocast's precision: the machine at best."""
    side = 8192 if clock.cuda else 2048
    dtype = evaluate.autocast(torch.device(device)).fast_dtype
    a = torch.randn(side, side, device=device).to(dtype)
    return clock.time(torch.matmul, a, a), 2 * side**3


def count_flops(function, *inputs):
    """FLOPs of all products and convolutions, forward and backward; 2 to a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


def peak_memory_mb(device):
    """Highest so far: of the GPU's memory, or of the process's resident memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss              # bytes on macOS, else kB
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def build(args):
    """A Trainer of this size and a batch of random pictures, (B, 3, S, S) uint8 on its device."""
    train.check(args)
    torch.manual_seed(args.seed)
    teacher = model.build_teacher(args.teacher, args.random_teacher).to(args.device)
    student, head = (m.to(args.device) for m in model.build_student(vars(args), teacher.width))
    if isinstance(head, model.Anchors):
        head.centres.normal_()
    shape = args.batch_size, 3, args.image_size, args.image_size
    images = torch.randint(256, shape, dtype=torch.uint8)
    student.train()
    return train.Trainer(args, teacher, student, head, images), images.to(args.device)


def compare(trainer, images, steps, clock):
    """A step, a plain step, a large product, in turns: medians, FLOPs, memory, as in the JSON."""
    flops, times, plain_times, rates = count_flops(trainer.step, images, 0), [], [], []
    memory = peak_memory_mb(trainer.args.device)                        # before the plain version's
    plain = plain_parts(trainer)
    for _ in range(steps):
        times.append(clock.time(trainer.step, images, 0))
        with under(plain):
            plain_times.append(clock.time(trainer.step, images, 0))
        seconds, product = product_seconds(trainer.args.device, clock)
        rates.append(product / seconds)
    step, plain_step, rate = (statistics.median(x) for x in (times, plain_times, rates))
    return {"images_per_s": len(images) / step, "plain_images_per_s": len(images) / plain_step,
            "speedup": plain_step / step, "gemm_fraction": flops / step / rate,
            "gflop_per_image": flops / len(images) / 1e9, "gemm_tflops": rate / 1e12,
            "peak_memory_mb": memory}


def exponent(values, seconds):
    """b of seconds ~ a * values^b, by least squares in logarithms."""
    return float(np.polyfit(np.log(values), np.log(seconds), 1)[0])


def growth(args, steps, clock):
    """Median step time at half, once and twice each of GROWTH: {flag: {"values", "seconds",
    "exponent"}}, the exponent of `exponent`."""
    def seconds(**changed):
        trainer, images = build(argparse.Namespace(**vars(args) | changed))
        return statistics.median(clock.time(trainer.step, images, 0) for _ in range(steps))

    once, rows = seconds(), {}
    for name in GROWTH:
        middle = getattr(args, name)
        values = [max(1, middle // 2), middle, 2 * middle]
        times = [seconds(**{name: values[0]}), once, seconds(**{name: values[2]})]
        rows[name] = {"values": values, "seconds": times, "exponent": exponent(values, times)}
    return rows


# ----------------------------------------------------------------------------------------- printing

def print_table(result):
    print(f"{result['size']}, {result['device']}: {result['config']['batch_size']} pictures of "
          f"{result['config']['image_size']} px in {result['config']['views']} views a step, bf16")
    for name, row in result["parts"].items():
        print(f"  {name:24} {1e3 * row['seconds']:9.1f} ms {100 * row['share']:5.1f} %")
    print(f"  {result['images_per_s']:.2f} images/s; plain {result['plain_images_per_s']:.2f}: "
          f"{result['speedup']:.2f} times as fast")
    print(f"  {result['gflop_per_image']:.2f} GFLOP an image at {result['gemm_fraction']:.3f} of a "
          f"large product's {result['gemm_tflops']:.3f} TFLOP/s; {result['peak_memory_mb']:.0f} MB")
    for name, row in result.get("growth", {}).items():
        pairs = zip(row["values"], row["seconds"])
        times = ", ".join(f"{value}: {1e3 * seconds:.0f} ms" for value, seconds in pairs)
        print(f"  time ~ {name}^{row['exponent']:.2f}  ({times})")


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--size", choices=SIZES, default="small",
        help="train.py's presets; paper: with an untrained teacher")
    add("--batch-size", type=int,
        help="pictures a step; not given: the size's own, and 8 for paper on a CPU")
    add("--views", type=int, help="per picture; not given: the size's own")
    add("--steps", type=int, default=5, help="of each kind; raise when medians differ between runs")
    add("--growth", action="store_true",
        help="also time half and twice the batch, the length, the vocabulary and the views")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--clock", choices=["wall", "cpu"], default="wall",
        help="cpu: seconds of this process alone, where others use the machine; OMP_NUM_THREADS=1")
    add("--json", type=Path, help="also write the figures there")
    return p.parse_args(argv)


def run(flags):
    """The parsed flags -> the result as in the JSON file. Raises ValueError or OSError."""
    if flags.steps < 1:
        raise ValueError(f"--steps must be 1 or more, not {flags.steps}")
    if flags.clock == "cpu" and (flags.device != "cpu" or torch.get_num_threads() > 1):
        raise ValueError("--clock cpu needs --device cpu and one thread; set OMP_NUM_THREADS=1")
    args = train.parse([*SIZES[flags.size].split(), "--device", flags.device])
    args.views = args.views if flags.views is None else flags.views
    if flags.batch_size is not None or (flags.size, flags.device) == ("paper", "cpu"):
        args.batch_size = 8 if flags.batch_size is None else flags.batch_size
    trainer, images = build(args)
    clock = Clock(flags.device, flags.clock == "cpu")
    processor = f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    device = torch.cuda.get_device_name() if clock.cuda else processor
    result = {"size": flags.size, "device": device,
              **compare(trainer, images, flags.steps, clock),
              "parts": time_parts(trainer, images, flags.steps, clock),
              "config": train.config_of(args) | {"clock": flags.clock, "steps": flags.steps,
                                                 "torch": torch.__version__}}
    return result | ({"growth": growth(args, flags.steps, clock)} if flags.growth else {})


def main():
    flags = parse()
    try:
        if flags.json:                                                      # now, not after minutes
            flags.json.parent.mkdir(parents=True, exist_ok=True)
        result = run(flags)
        print_table(result)
        if flags.json:
            flags.json.write_text(json.dumps(result, indent=1) + "\n")
    except (ValueError, OSError) as error:
        raise SystemExit(f"extras.benchmark: {error}") from None


if __name__ == "__main__":
    main()
