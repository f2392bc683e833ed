"""What the student is trained on: the granular DINO loss, its exploration terms, and the schedules.

    L = sum_i sum_j lambda^j H(p_t^(i), p_s^(i,j))                          (paper, section 3.3)

i counts the V views, j the D granularities (prefixes of 1, 2, 4, 8 symbols), H is the cross-entropy
of the teacher's sharpened, centered softmax with the student's softmax. extras/pretrain.py makes a
teacher with the same `dino_loss`.

    python losses.py                        # the loss of a toy batch, term by term
"""
import math

import torch
import torch.nn.functional as F

import distributed


# ---- the teacher's side --------------------------------------------------------------------------

@torch.no_grad()
def sinkhorn(logits, temperature, iterations=3):
    """p_t by Sinkhorn-Knopp (SwAV, DINOv2): a softmax whose prototypes are used equally often.
    logits (M, P) -> probabilities (M, P); rows sum to 1, columns to about M / P."""
    scaled = logits.float() / temperature
    q = (scaled - scaled.max()).exp()
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True).clamp(min=1e-30) / q.shape[1]         # each prototype: 1 / P
        q = q / q.sum(1, keepdim=True).clamp(min=1e-30) / q.shape[0]            # each image: 1 / M
    return q * q.shape[0]


class Centering(torch.nn.Module):
    """Teacher logits -> the probabilities p_t that the student must match.

    method="center": softmax((logits - c) / temperature), c an EMA of the batch mean (DINO).
    method="sinkhorn": see `sinkhorn`; needs no state and cannot collapse to one prototype.
    method="none": softmax(logits / temperature), for prototypes that are not learned."""

    def __init__(self, prototypes, method, momentum=0.9):
        super().__init__()
        self.method, self.momentum = method, momentum
        self.register_buffer("center", torch.zeros(prototypes))

    @torch.no_grad()
    def forward(self, logits, temperature):
        """logits (V, B, P) -> p_t (V, B, P); moves the center after using it, as DINO does."""
        if self.method == "sinkhorn":
            of_all = distributed.all_gather(logits.flatten(0, 1))
            return distributed.shard(sinkhorn(of_all, temperature)).view_as(logits)
        p = F.softmax((logits.float() - self.center) / temperature, dim=-1)
        if self.method == "center":
            mean = distributed.all_reduce_mean(logits.float().mean((0, 1)))
            self.center.lerp_(mean, 1 - self.momentum)
        return p


@torch.no_grad()
def ema_update(target, source, momentum):
    """theta_T <- m theta_T + (1 - m) theta_S (paper, section 3.1). BatchNorm's running statistics
    are not averaged: a target in training mode computes them itself."""
    for t, s in zip(target.parameters(), source.parameters()):
        t.lerp_(s, 1 - momentum)


# ---- the DINO loss -------------------------------------------------------------------------------

def view_targets(p_t, views, pairing):
    """The target of each student view: (V, B, P) -> (views, B, P).
    same (or V = 1): the target of view i is that of view i, as in the paper's formula.
    cross: it is the mean of those of every *other* view, as in DINO. H(p, q) is linear in p, so the
           mean of the cross-entropies is the cross-entropy with the mean target. Student views
           beyond the V of the teacher (pretraining's local crops) have the mean of all V.
    """
    v = len(p_t)
    if pairing == "same" or v == 1:
        return p_t
    total = p_t.sum(0, keepdim=True)
    others = (total - p_t) / (v - 1)
    return torch.cat([others, (total / v).expand(views - v, -1, -1)])


def dino_loss(p_t, logits, temperature, pairing):
    """p_t (V, B, P), student logits (..., views, B, P) -> H(p_t, p_s) in nats, averaged over images
    and views, of shape (...): (), or (D,) for the logits (D, V, B, P) of D prefixes."""
    log_p_s = F.log_softmax(logits.float() / temperature, dim=-1)
    return -(view_targets(p_t, logits.shape[-3], pairing) * log_p_s).sum(-1).mean(-1).mean(-1)


def granular_dino_loss(prefix_losses, lam):
    """`dino_loss` of each prefix (D,) -> L, their mean weighted by lambda^j. Not their sum (our
    choice), so that lambda moves weight between prefixes without changing the learning rate."""
    weights = lam ** torch.arange(1.0, len(prefix_losses) + 1, device=prefix_losses.device)
    # a sum and not a matrix product, which autocast would round to bfloat16's three digits
    return (weights * prefix_losses).sum() / weights.sum()


@torch.no_grad()
def joint_kl(p_t, logits, temperature, pairing):
    """KL(p_t, p_s) of the first view in nats, a scalar, with the paper's joint distribution p_s =
    sum_n p_s^(n), normalised (section 3.2). p_t (V, B, P), logits (D, V, B, P). For the log."""
    target = view_targets(p_t, logits.shape[1], pairing)[0]                       # (B, P)
    joint = (logits[:, 0].float() / temperature).softmax(-1).mean(0)
    return (target * (target.clamp(min=1e-12) / joint.clamp(min=1e-12)).log()).sum(-1).mean()


# ---- exploration terms (section 3.4) -------------------------------------------------------------

def entropy(p, dim=-1):
    """p (..., C), of sum 1 along `dim` -> its Shannon entropy in nats, 0 to ln C, (...)."""
    return -(p * p.clamp(min=1e-12).log()).sum(dim)


def symbol_entropy(logits):
    """H(p): mean entropy, in nats, of softmax(logits (B, T, K)): of s_s / tau, gumbel: s_s."""
    return entropy(F.softmax(logits.float(), dim=-1)).mean()


def sequence_information(weights):
    """I(s): entropy, in nats, of the symbols of one sequence, mean over images; weights (B, T, K).
    For one-hot weights 0 when a sequence repeats one symbol, ln T when all T differ (our choice:
    the paper only states that repeats lower it). Soft weights can reach ln K by blurring."""
    return entropy(weights.mean(1)).mean()


def exploration_loss(sequence, explore, alpha, beta):
    """-alpha H(p) for explore = "entropy", -beta I(s) for "info", both for "combined", otherwise 0:
    a scalar in nats, of a model.Sequence."""
    loss = sequence.logits.new_zeros(())
    if explore in ("entropy", "combined"):
        loss = loss - alpha * symbol_entropy(sequence.logits)
    if explore in ("info", "combined"):
        loss = loss - beta * sequence_information(sequence.weights)
    return loss


# ---- schedules and the optimizer -----------------------------------------------------------------

def cosine(start, end, progress):
    """A number from start to end along half a cosine; progress: share of the run, in [0, 1]."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))


def warmup_cosine(peak, end, step, steps, warmup):
    """Linear from 0 to peak over `warmup` steps, then cosine to end: DINO's learning rate."""
    if step < warmup:
        return peak * min(1.0, (step + 1) / warmup)
    return cosine(peak, end, (step - warmup) / max(1, steps - warmup))


def warmup_linear(start, end, step, warmup):
    """From start to end over `warmup` steps, then constant: DINO's teacher-temperature schedule."""
    return start + (end - start) * min(1.0, step / max(1, warmup))


def parameter_groups(module, slow=(), lr_scale=1.0):
    """AdamW groups as in DINO: no weight decay on biases, norms and other vectors. slow: parameters
    (a list) that learn at lr_scale times the learning rate, without weight decay."""
    is_slow = {id(p) for p in slow}
    others = [p for p in module.parameters() if p.requires_grad and id(p) not in is_slow]
    groups = [{"params": [p for p in others if p.ndim > 1], "decay": True},
              {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
              {"params": list(slow), "weight_decay": 0.0, "lr_scale": lr_scale}]
    return [{"decay": False, "lr_scale": 1.0} | group for group in groups if group["params"]]


def set_schedule(optimizer, lr, weight_decay):
    """Sets the step's learning rate and weight decay in all groups of `parameter_groups`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if group["decay"]:
            group["weight_decay"] = weight_decay


def main():
    torch.manual_seed(0)
    p_t = Centering(6, "center")(torch.randn(2, 3, 6), 0.5)
    logits, lam = torch.randn(4, 2, 3, 6) * 0.1, 0.5
    print(f"V = 2 views, B = 3 images, P = 6 prototypes, D = 4 prefixes, lambda = {lam}")
    prefix_losses = dino_loss(p_t, logits, 0.1, "same")                         # (D,)
    for j, loss in enumerate(prefix_losses.tolist(), 1):
        print(f"prefix of {2 ** (j - 1)} symbol(s)  lambda^{j} = {lam ** j:<6}  H(p_t, p_s), mean "
              f"over views and images: {loss:.3f}")
    print(f"L = {granular_dino_loss(prefix_losses, lam):.3f}, their mean with these weights; "
          f"H(p_t) = {entropy(p_t).mean():.3f} is the least it can be")


if __name__ == "__main__":
    main()
