"""How fast a training step is, where its time goes, and what the code gains over a naive baseline.

    python -m extras.benchmark --json small.json                # train.py's default size
    python -m extras.benchmark --size paper --steps 2           # ViT-B/16 at 224 px: wants a GPU
    python -m extras.benchmark --recipe paper                   # other flags are those of train.py

A step is train.py's, from uint8 images to the updated student. The naive baseline is the same step
(paper, section 3) as one would first write it, with the same loss and gradients: the descriptor has
no KV cache, so the whole prefix goes through it again for each symbol, and the keys and values of
the teacher's tokens are made again; the interpreter takes four passes, not one packed pass; teacher
and student take one view at a time; torchvision's ViT and AdamW are used as they come; there is no
cache of the teacher's tokens. Both run in the precision that training has on this device, in turns,
so the speedup is that of the code. Images and the student's weights are random. gemm_fraction is
the step's FLOP/s divided by those of a large matrix product in the same precision.
"""
import argparse
import contextlib
import functools
import resource
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import (FlopCounterMode, sdpa_backward_flop_count,
                                      sdpa_flop_count)

import checkpoint
import data
import flags
import losses
import precision
import teachers
import train
from progress import Progress

PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}                  # of the large matrix product
CPU_ATTENTION = {                                           # FlopCounterMode has the GPUs' alone
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)}


# ---- the naive baseline --------------------------------------------------------------------------

def naive_teacher(teacher, views, x):
    """torchvision's own forward, one view at a time: x (V*B, 3, H, W) -> (V*B, N+1, d)."""
    vit, tokens = teacher.vit, []
    for view in x.chunk(views):
        patches = vit.conv_proj(view).flatten(2).transpose(1, 2)                # (B, N, d)
        cls = vit.class_token.expand(len(view), -1, -1)
        tokens.append(vit.encoder(torch.cat([cls, patches], 1)))
    return torch.cat(tokens)


def naive_attention(layer, x, source, causal=False):
    """Queries x (B, L, d), keys and values of source (B, S, d) -> (B, L, d)."""
    q, k, v = (layer.split(part) for part in (layer.to_q(x), *layer.to_kv(source).chunk(2, -1)))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return layer.out(y.transpose(1, 2).flatten(2))


def naive_block(block, x, tokens=None):
    """All positions x (B, L, d) through a block: of the descriptor (with tokens) or interpreter."""
    h = block.norm1(x)
    x = x + naive_attention(block.attention, h, h, causal=tokens is not None)
    if tokens is not None:
        x = x + naive_attention(block.cross, block.norm_cross(x), tokens)
    return x + block.mlp(block.norm2(x))


def naive_start_state(descriptor, views, z_t):
    """Like model.Descriptor.start_state, but keeps the inputs alone: tokens by view, prefix."""
    return {"tokens": (z_t if descriptor.attends_to_cls else z_t[:, 1:]).chunk(views), "prefix": []}


def naive_step(descriptor, x, t, state):
    """model.Descriptor.step without its cache: x (V*B, d) -> (V*B, d)."""
    state["prefix"].append(x + descriptor.position[t])
    out, prefix = [], torch.stack(state["prefix"], 1)                       # (V*B, t + 1, d)
    for view, tokens in zip(prefix.chunk(len(state["tokens"])), state["tokens"]):
        for block in descriptor.blocks:
            view = naive_block(block, view, tokens)
        out.append(view[:, -1].float())
    return descriptor.norms[t](torch.cat(out))          # over all views, or the loss would change


def naive_interpret(interpreter, views, embeddings):
    """model.Interpreter, a pass for each view and prefix: (V*B, T, d) -> (V*B, D, d)."""
    out = []
    for view in embeddings.chunk(views):
        z_s, cls = [], interpreter.cls.expand(len(view), -1, -1)
        for n in interpreter.lengths:
            x = torch.cat([cls, view[:, :n] + interpreter.position[:n]], 1)
            for block in interpreter.blocks:
                x = naive_block(block, x)
            z_s.append(interpreter.out(interpreter.norm(x[:, 0])))
        out.append(torch.stack(z_s, 1))
    return torch.cat(out)


def naive_batches(tokens, epoch, start, steps):
    """tokens.TrainingTokens.batches of one step without the cache."""
    images, args = tokens.images.get(torch.arange(tokens.args.batch_size)), tokens.args
    yield tokens.encode(images, 0 if args.cache_views == 1 else args.views, part=True)


@contextlib.contextmanager
def patched(patches):
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def naive_patches(trainer):
    """The patches under which `full_step` is the naive baseline."""
    args, student, tokens, views = (trainer.args, trainer.student, trainer.tokens,
                                    trainer.args.views)
    descriptor, interpreter = student.descriptor, student.interpreter
    swap, given = mock.patch.object, functools.partial
    groups = losses.parameter_groups(student, student.slow_parameters(), args.codebook_lr)
    return [swap(trainer.teacher, "forward", given(naive_teacher, trainer.teacher, views)),
            swap(descriptor, "start_state", given(naive_start_state, descriptor, views)),
            swap(descriptor, "step", given(naive_step, descriptor)),
            swap(interpreter, "forward", given(naive_interpret, interpreter, views)),
            swap(tokens, "batches", given(naive_batches, tokens)),
            swap(trainer, "optimizer", torch.optim.AdamW(groups, lr=args.lr))]


# ---- measuring -----------------------------------------------------------------------------------

def full_step(trainer):
    """One step of train.py, from uint8 images (or cached tokens) to the updated student."""
    for z_t in trainer.tokens.batches(0, 0, 1):
        trainer.step(z_t, 0)


def now(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(device, function, *inputs):
    start = now(device)
    function(*inputs)
    return now(device) - start


def product_rate(device, name):
    """FLOP/s of a large square matrix product on `device` in the precision `name`: the machine at
    its best. The second of two products: the first prepares kernels and memory."""
    side = PRODUCT_SIDE[torch.device(device).type]
    dtype = getattr(torch, precision.resolve(device, name))
    a = torch.ones(side, side, device=device, dtype=dtype)
    return 2 * side**3 / [seconds(device, torch.matmul, a, a) for _ in range(2)][1]


def count_flops(function, *inputs):
    """FLOPs of all products and convolutions, forward and backward; 2 for a multiply-add."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        function(*inputs)
    return counter.get_total_flops()


def peak_memory_mb(device):
    """Highest so far: of the GPU's memory, or of the process's resident memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss              # bytes on macOS, else kB
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class Stopwatch:
    """Seconds of wrapped functions, each without the wrapped functions that it calls."""

    def __init__(self, device):
        self.device, self.seconds, self.inside = device, Counter(), [0.0]   # inside: of the callers

    def wrap(self, owner, name, part):
        """A patch: while it holds, calls of owner.name count for `part`."""
        inner = getattr(owner, name)

        def timed(*inputs, **flags):
            self.inside.append(0.0)
            start = now(self.device)
            result = inner(*inputs, **flags)
            total = now(self.device) - start
            self.seconds[part] += total - self.inside.pop()
            self.inside[-1] += total
            return result
        return mock.patch.object(owner, name, timed)


def time_parts(trainer, steps):
    """Where the time of a step goes: {part: {"seconds", "share"}}, mean over steps. `loss` is what
    train.training_step does itself, `optimizer` what Trainer.step does: clipping, AdamW, EMA."""
    student, watch = trainer.student, Stopwatch(trainer.args.device)
    parts = [(data.Augment, "__call__", "augmentation"), (trainer.teacher, "forward", "teacher"),
             (student, "describe", "descriptor"), (student, "interpret", "interpreter + projector"),
             (student.projector, "forward", "interpreter + projector"),
             (train, "training_step", "loss"), (torch.Tensor, "backward", "backward"),
             (trainer, "step", "optimizer")]
    with patched([watch.wrap(*part) for part in parts]):
        for _ in range(steps):
            full_step(trainer)
    total = sum(watch.seconds.values())
    return {name: {"seconds": watch.seconds[name] / steps, "share": watch.seconds[name] / total}
            for name in dict.fromkeys(part for *_, part in parts) if name in watch.seconds}


def build(args):
    """args of train.py -> its Trainer with one batch of random images. Raises ValueError."""
    flags.check(args)
    torch.manual_seed(args.seed)
    teacher = teachers.load_teacher(args.teacher).to(args.device)
    if args.image_size != teacher.image_size:               # torchvision's forward takes no other
        raise ValueError(f"--image-size must be the teacher's, {teacher.image_size} pixels")
    student = checkpoint.STUDENTS[args.recipe](args, teacher.width).to(args.device).train()
    for centroids in student.projector.buffers():           # of k-means, which does not run here
        centroids.normal_()
    shape = args.batch_size, 3, args.image_size, args.image_size
    images = torch.randint(256, shape, dtype=torch.uint8)
    labels = torch.zeros(len(images), dtype=torch.long)
    return train.Trainer(args, teacher, student, data.ImageSet(images, labels, ["none"]))


def compare(trainer, steps):
    """A step, a naive step and a large product, in turns: medians, FLOPs, memory."""
    device, images = trainer.args.device, trainer.args.batch_size
    naive, rows = naive_patches(trainer), []
    flops = count_flops(full_step, trainer)
    memory = peak_memory_mb(device)                             # before the naive baseline's
    with Progress("steps of both versions", steps + 1) as progress:
        for _ in range(steps + 1):                              # the first one is a warm-up
            fast = seconds(device, full_step, trainer)
            with patched(naive):
                slow = seconds(device, full_step, trainer)
            rows.append((fast, slow, product_rate(device, trainer.args.precision)))
            progress.update()
    step, naive_step, rate = (statistics.median(column) for column in zip(*rows[1:]))
    return {"images_per_s": images / step, "naive_images_per_s": images / naive_step,
            "speedup": naive_step / step, "gemm_fraction": flops / step / rate,
            "gflop_per_image": flops / images / 1e9, "gemm_tflops": rate / 1e12,
            "peak_memory_mb": memory}


# ---- the command ---------------------------------------------------------------------------------

def print_table(result):
    config = result["config"]
    print(f"{config['size']}, {result['device']}, {config['precision']}: {config['batch_size']} "
          f"images of {config['image_size']} px in {config['views']} views per step")
    for name, row in result["parts"].items():
        print(f"  {name:24} {1e3 * row['seconds']:9.1f} ms {100 * row['share']:5.1f} %")
    print(f"  {result['images_per_s']:.2f} images/s; naive baseline "
          f"{result['naive_images_per_s']:.2f}: {result['speedup']:.2f} times as fast")
    print(f"  {result['gflop_per_image']:.2f} GFLOP per image at {result['gemm_fraction']:.3f} of "
          f"the {result['gemm_tflops']:.3f} TFLOP/s of a large product; "
          f"{result['peak_memory_mb']:.0f} MB")


def parse(argv=None):
    """-> (the flags of this script, those of train.py)."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=flags.HelpFormatter)
    add = p.add_argument
    add("--size", choices=flags.SIZES, default="small",
        help="as in train.py; paper: with an untrained teacher, and on a CPU with --batch-size 8")
    add("--steps", type=int, default=5, help="of each version; more where results differ much")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--precision", choices=precision.NAMES, default="auto", help="as in train.py")
    add("--json", type=Path, help="also write the figures there")
    own, rest = p.parse_known_args(argv)
    if own.size == "paper":
        batch = ["--batch-size", "8"] if own.device == "cpu" else []
        rest = ["--teacher", "random:dino_vitb16", *batch, *rest]
    return own, flags.parse(["--size", own.size, "--device", own.device,
                             "--precision", own.precision, *rest])


def run(own, args):
    """The flags of `parse` -> the figures as in the JSON file. Raises ValueError or OSError."""
    checkpoint.check_folder(own.json)
    if own.steps < 1:
        raise ValueError(f"--steps must be 1 or more, not {own.steps}")
    trainer = build(args)
    hardware = precision.hardware_info(args.device)
    device = hardware["gpu"] or f"{hardware['processor']}, {hardware['threads']} thread(s)"
    return {"size": own.size, "device": device, **compare(trainer, own.steps),
            "parts": time_parts(trainer, own.steps), "hardware": hardware,
            "config": checkpoint.config_of(args) | {"steps": own.steps}}


def main():
    own, args = parse()
    try:
        result = run(own, args)
        print_table(result)
        if own.json:
            checkpoint.write_json(own.json, result)
    except (ValueError, OSError) as error:
        raise SystemExit(f"extras.benchmark: {error}") from None


if __name__ == "__main__":
    main()
