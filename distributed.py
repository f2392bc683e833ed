"""Several processes, one batch: torchrun starts them, and together they learn as one would.

    torchrun --nproc_per_node 4 train.py --batch-size 256           # a GPU each
    torchrun --nproc_per_node 2 train.py --device cpu               # gloo instead of NCCL

Each process holds the whole student, takes its shard of every batch and averages the gradients.
What concerns the batch as a whole (BatchNorm, the entropy of the mean prediction, center, Sinkhorn)
is computed over all shards. All processes draw the random numbers of the whole batch from one seed
and use their shard of them: so one checkpoint holds everybody's random state, and views do not
depend on the number of processes.

Not DistributedDataParallel: it wants one forward() and no gradient missing, and PyTorch's
SyncBatchNorm runs on GPUs alone. Without torchrun every function returns what it was given.
"""
import contextlib
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

# For a process that runs and does not answer; one that has died is noticed by its connection.
TIMEOUT = timedelta(seconds=60)
long_timeout_group = None               # for what may take long: downloads, slow disks


def init(device):
    """Joins the processes that torchrun started; returns this one's device: "cuda:2" for "cuda"."""
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
        sys.stdout = open(os.devnull, "w")          # rank 0 prints for all
    return device


def cleanup():
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def check_batch_size(size):
    """Raises ValueError when a batch of `size` cannot be cut into equal shards."""
    if size % world_size():
        raise ValueError(f"--batch-size {size} is for all processes together: make it a multiple "
                         f"of {world_size()}")


def checked(collective, *args, **kwargs):
    """Calls it; raises ConnectionError when another process has died, or does not answer."""
    try:
        collective(*args, **kwargs)
    except RuntimeError as error:
        raise ConnectionError(f"another process has died or does not answer ({str(error)[:80]!r}). "
                              "--resume continues from the last checkpoint") from None


class Mean(torch.autograd.Function):
    """Mean over the processes. Each has its own loss and their mean counts, so the gradient is the
    mean of the gradients that all of them have for the result."""

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
    """(n, ...) -> (world_size * n, ...), shard after shard; without gradient."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    checked(dist.all_gather, parts, x.contiguous())
    return torch.cat(parts)


def shard(x, groups=1):
    """This rank's shard: (groups * world_size * n, ...) -> (groups * n, ...). groups: V for views
    that lie one after the other, (V, B) flattened."""
    if world_size() == 1:
        return x
    return x.unflatten(0, (groups, world_size(), -1))[:, rank()].flatten(0, 1)


def average_gradients(module):
    """All gradients at once, after the backward pass."""
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


def broadcast_parameters(module):
    """Parameters and buffers of rank 0 for all: other processors round differently."""
    if world_size() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            checked(dist.broadcast, tensor.data, 0)


@contextlib.contextmanager
def rank_zero_first():
    """Rank 0 runs the block alone (it may download, or repair), the others after it."""
    if rank():
        all_reduce_max(0, group=long_timeout_group)
    yield
    if not rank():
        all_reduce_max(0, group=long_timeout_group)


class BatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """BatchNorm1d and 2d over all processes, on CPUs too.
    (B, C) or (B, C, H, W) -> the same; alone, and in evaluation, PyTorch's own."""

    def _check_input_dim(self, x):
        """Any."""

    def forward(self, x):
        if world_size() == 1 or not self.training:
            return super().forward(x)
        dims, x32 = [d for d in range(x.ndim) if d != 1], x.float()
        mean = all_reduce_mean(x32.mean(dims, keepdim=True))
        # in two passes: E[x^2] - E[x]^2 would lose its digits where all images are much alike
        variance = all_reduce_mean((x32 - mean).square().mean(dims, keepdim=True))
        n = world_size() * x.numel() / x.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(variance.flatten() * (n / (n - 1)), self.momentum)
            self.num_batches_tracked += 1
        y = (x32 - mean) * (variance + self.eps).rsqrt()
        if self.affine:
            shape = [-1 if d == 1 else 1 for d in range(x.ndim)]
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)
