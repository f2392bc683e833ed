"""The numeric precision of a run: one place decides, for everything that computes.

    python precision.py                     # what this machine's products cost, and the choice

On a GPU that has bfloat16 it is bfloat16, on an older one float16 (with a gradient scaler). On a
CPU it depends: with AVX-512-BF16 or AMX bfloat16 is several times faster than float32, without them
it is about a hundred times slower (PyTorch issues 118499, 86270). No processor flag shows it, so
two small products are timed, once per process.
"""
import functools
import platform
import sys
import time

import torch

NAMES = ("auto", "float32", "bfloat16", "float16")
SIZE = 128                  # of the timed square matrices: 2 million multiply-adds, 0.03 to 5 ms


@functools.cache
def product_seconds():
    """Seconds of a SIZE x SIZE matrix product on one core of the CPU, in float32 and in bfloat16.
    The best of ten each, in turns: the first builds a kernel, and a busy machine delays some."""
    times, threads = {torch.float32: [], torch.bfloat16: []}, torch.get_num_threads()
    torch.set_num_threads(1)                # two threads that wait for each other measure the load
    for _ in range(10):
        for dtype, seconds in times.items():
            a = torch.ones(SIZE, SIZE, dtype=dtype)
            start = time.perf_counter()
            a @ a
            seconds.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return tuple(min(seconds) for seconds in times.values())


def bfloat16_slowdown():
    """Time of a bfloat16 product over that of a float32 one, on this CPU."""
    single, half = product_seconds()
    return half / single


@functools.cache
def resolve(device, name="auto"):
    """The precision that `name` (one of NAMES) means on `device` ("cpu", "cuda:0", ...): "float32",
    "bfloat16" or "float16". Prints one line where the choice makes a CPU crawl. Raises ValueError
    for an unknown name."""
    if name not in NAMES:
        raise ValueError(f"--precision must be one of {', '.join(NAMES)}, not {name!r}")
    on_cpu = torch.device(device).type == "cpu"
    if name == "auto":
        if not on_cpu:
            return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
        return "bfloat16" if bfloat16_slowdown() < 0.8 else "float32"
    if on_cpu and name == "float16":
        raise ValueError("--precision float16 is for GPUs; use float32 on a CPU")
    if on_cpu and name == "bfloat16" and bfloat16_slowdown() > 1:
        print(f"WARNING: bfloat16 products are {bfloat16_slowdown():.0f} times slower than float32 "
              "ones on this CPU (measured); --precision float32 avoids that", file=sys.stderr)
    return name


def autocast(device, name="auto"):
    """The context manager in which networks run on `device`: torch.autocast, off for float32."""
    device_type, name = torch.device(device).type, resolve(str(device), name)
    dtype = torch.bfloat16 if name == "float32" else getattr(torch, name)       # any: it is off
    return torch.autocast(device_type, dtype, enabled=name != "float32")


def hardware_info(device):
    """What a run's figures of speed depend on: plain values for config.json."""
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    return {"torch": torch.__version__, "threads": torch.get_num_threads(),
            "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            "bfloat16_slowdown": round(bfloat16_slowdown(), 2), "gpu": gpu}


if __name__ == "__main__":
    for name, seconds in zip(NAMES[1:3], product_seconds()):
        rate = 2e-9 * SIZE ** 3 / seconds
        print(f"{name:9}{rate:8.1f} GFLOP/s of one core, product of {SIZE} x {SIZE} matrices")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"--precision auto on {device}: {resolve(device)}")
