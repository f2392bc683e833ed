"""Several processes, one batch: torchrun starts them, and together they learn as one would.

    torchrun --nproc_per_node 4 train.py --batch-size 256           # a GPU each
    torchrun --nproc_per_node 2 train.py --device cpu               # gloo instead of NCCL
    torchrun --nproc_per_node 2 -m extras.pretrain --resume         # whatever number began it

Each process holds all pictures and the whole student, takes its part of every batch and averages
the gradients. What is about the batch as a whole (BatchNorm, the entropy of the mean prediction,
centre, Sinkhorn, codebook) is computed over all parts. All draw the random numbers of the whole
batch from one seed and use their part of them (`shard`): one random state is everybody's, so one
checkpoint is, and views do not depend on the number of processes.

Not DistributedDataParallel: it overlaps sending with the backward pass, but wants one forward() and
no gradient missing. Here all gradients are averaged at once, after the backward pass.
Without torchrun every function returns what it was given.
"""
import contextlib
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

# For a process that lives and does not answer; one that has died is noticed by its connection.
TIMEOUT = timedelta(seconds=60)
long_timeout_group = None                          # a group for what may take long: downloads, slow disks


def init(device):
    """Meets the processes that torchrun started; returns this one's device, "cuda:2" for "cuda"."""
    global long_timeout_group
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    checked(dist.init_process_group, "cpu:gloo,cuda:nccl" if "cuda" in device else "gloo",
         timeout=TIMEOUT)
    long_timeout_group = dist.new_group(timeout=timedelta(days=1), backend="gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")          # the first one speaks for all
    return device


def cleanup():
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def check_batch_size(size, accumulate=1):
    """Raises ValueError when a batch of `size` cannot be cut into equal parts."""
    if size % (world_size() * accumulate):
        raise ValueError(f"--batch-size {size} is for the whole step: make it a multiple of "
                         f"{world_size()} (processes) x {accumulate} (--accumulate)")


def checked(collective, *args, **kwargs):
    """Calls it; raises ConnectionError when another process has died, or hangs."""
    try:
        collective(*args, **kwargs)
    except RuntimeError as error:
        raise ConnectionError(f"another process has died or does not answer ({str(error)[:80]!r}). "
                              "--resume goes on from the last checkpoint") from None


class Mean(torch.autograd.Function):
    """Mean over the processes. Each has a loss of its own and their mean counts, so the gradient is
    the mean of the gradients that all of them have for the result."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone(memory_format=torch.contiguous_format)
        checked(dist.all_reduce, x)
        return x / world_size()

    @staticmethod
    def backward(ctx, gradient):
        return Mean.apply(gradient)


def all_reduce_mean(x):
    """Element by element; with gradient."""
    return Mean.apply(x) if world_size() > 1 else x


def all_gather(x):
    """(n, ...) -> (world * n, ...), part after part; without gradient."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    checked(dist.all_gather, parts, x.contiguous())
    return torch.cat(parts)


def shard(x, groups=1):
    """This process's part: (groups * world * n, ...) -> (groups * n, ...). groups: V for views that
    lie one after the other, (V, B) flattened."""
    return x.unflatten(0, (groups, world_size(), -1))[:, rank()].flatten(0, 1)


def average_gradients(module):
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    if world_size() > 1:
        flat = all_reduce_mean(torch.cat([g.flatten() for g in gradients]))
        for g, part in zip(gradients, flat.split([g.numel() for g in gradients])):
            g.copy_(part.view_as(g))


def all_reduce_max(*numbers, group=None):
    """Whole numbers -> for each, the largest that any process has."""
    if world_size() == 1:
        return numbers
    numbers = torch.tensor(numbers)
    checked(dist.all_reduce, numbers, dist.ReduceOp.MAX, group)
    return numbers.tolist()


def broadcast_parameters(*modules):
    """Parameters and buffers of rank 0 for all: other processors round otherwise."""
    if world_size() > 1:
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                checked(dist.broadcast, tensor.data, 0)


@contextlib.contextmanager
def rank_zero_first():
    """Rank 0 goes through the block alone (it may download, or repair), the others after it."""
    if rank():
        all_reduce_max(0, group=long_timeout_group)
    yield
    if not rank():
        all_reduce_max(0, group=long_timeout_group)


class BatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """BatchNorm1d and 2d over all processes (torch.nn.SyncBatchNorm is for GPUs alone).
    (B, C) or (B, C, H, W) -> the same; alone, and in evaluation, PyTorch's own."""

    def _check_input_dim(self, x):
        """Any."""

    def forward(self, x):
        if world_size() == 1 or not self.training:
            return super().forward(x)
        dims, wide = [d for d in range(x.ndim) if d != 1], x.float()
        centre = all_reduce_mean(wide.mean(dims, keepdim=True))
        # in two goes: E[x^2] - E[x]^2 would lose its digits where all pictures are much alike
        variance = all_reduce_mean((wide - centre).square().mean(dims, keepdim=True))
        n = world_size() * x.numel() / x.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(centre.flatten(), self.momentum)
            self.running_var.lerp_(variance.flatten() * (n / (n - 1)), self.momentum)
            self.num_batches_tracked += 1
        y = (wide - centre) * (variance + self.eps).rsqrt()
        if self.affine:
            shape = [-1 if d == 1 else 1 for d in range(x.ndim)]
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)
