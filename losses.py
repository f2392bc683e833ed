"""What the student is trained on: the granular DINO loss, its exploration terms, and the schedules.

    L = sum_i sum_j lambda^j H(p_t^(i), p_s^(i,j))                          (paper, section 3.3)

i counts the V views, j the D granularities (prefixes of 1, 2, 4, 8 symbols), H is the cross-entropy
of the teacher's sharpened, centred softmax with the student's softmax. extras/pretrain.py uses the
same functions with one granularity to make a teacher.
"""
import math

import torch
import torch.nn.functional as F

import distributed


# ------------------------------------------------------------------------------------- the teacher

@torch.no_grad()
def sinkhorn(logits, temperature, rounds=3):
    """Teacher probabilities by Sinkhorn-Knopp (SwAV; DINOv2): softmax, then prototypes used alike.

    logits (M, P) -> probabilities (M, P); rows sum to 1, columns to about M / P.
    """
    scaled = logits.float() / temperature
    q = (scaled - scaled.max()).exp()
    for _ in range(rounds):
        q = q / q.sum(0, keepdim=True).clamp(min=1e-30) / q.shape[1]         # each prototype: 1 / P
        q = q / q.sum(1, keepdim=True).clamp(min=1e-30) / q.shape[0]            # each image: 1 / M
    return q * q.shape[0]


class TeacherSoftmax(torch.nn.Module):
    """Teacher logits -> the probabilities p_t that the student must match.

    centering="centre": softmax((logits - c) / temperature), c an EMA of the batch mean (DINO).
    centering="sinkhorn": see `sinkhorn`; needs no state and cannot collapse to one prototype.
    centering="none": for prototypes that do not move, which need no centre.
    """

    def __init__(self, prototypes, centering="centre", momentum=0.9):
        super().__init__()
        self.centering, self.momentum = centering, momentum
        self.register_buffer("centre", torch.zeros(prototypes))

    @torch.no_grad()
    def forward(self, logits, temperature):
        """logits (V, B, P) -> p_t (V, B, P); moves the centre after using it, as DINO does."""
        if self.centering == "sinkhorn":
            everyones = distributed.all_gather(logits.flatten(0, 1))
            return distributed.shard(sinkhorn(everyones, temperature)).view_as(logits)
        p = F.softmax((logits.float() - self.centre) / temperature, dim=-1)
        if self.centering == "centre":
            self.centre.lerp_(distributed.all_reduce_mean(logits.float().mean((0, 1))), 1 - self.momentum)
        return p


@torch.no_grad()
def ema_update(target, source, momentum):
    """theta_T <- m theta_T + (1 - m) theta_S (paper, section 3.1). BatchNorm's running statistics
    are not averaged: a target in training mode keeps its own, of its own activations."""
    for t, s in zip(target.parameters(), source.parameters()):
        t.lerp_(s, 1 - momentum)


# ---------------------------------------------------------------------------------- the DINO loss

def pair_views(p_t, views, pairing):
    """The target of each student view: (V, B, P) -> (views, B, P).

    same:  view i answers for view i, as in the paper's formula.
    cross: view i answers for every *other* view, as in DINO. H(p, q) is linear in p, so the mean
           of the cross-entropies is the cross-entropy with the mean target. Student views beyond
           the V that the teacher saw (pretraining's local crops) answer for all of them.
    """
    v = len(p_t)
    if pairing == "same" or v == 1:
        return p_t
    total = p_t.sum(0, keepdim=True)
    others = (total - p_t) / (v - 1)
    return torch.cat([others, (total / v).expand(views - v, -1, -1)])


def cross_entropy(p, logits, temperature):
    """H(p, softmax(logits / temperature)) in nats, mean over images: (..., B, P) twice -> (...)."""
    return -(p * F.log_softmax(logits.float() / temperature, dim=-1)).sum(-1).mean(-1)


def granular_dino_loss(p_t, logits, lam, temperature=0.1, pairing="cross"):
    """p_t (V, B, P), student logits (D, V, B, P) -> (loss, cross-entropies (D, V)).

    Divided by the sum of the lambda^j, so that lambda moves weight between granularities without
    changing the learning rate; mean over views. (Both our choice.)
    """
    entropies = cross_entropy(pair_views(p_t, logits.shape[1], pairing), logits, temperature)
    weights = lam ** torch.arange(1, len(logits) + 1, device=logits.device, dtype=torch.float)
    # a sum and not a product of matrices, which autocast would round to bf16's three digits
    return (weights * entropies.mean(1)).sum() / weights.sum()


@torch.no_grad()
def joint_kl(p_t, logits, temperature, pairing):
    """KL(p_t, p_s) of the first view, p_s = sum_n p_s^(n) normalised (paper, section 3.2)."""
    target = pair_views(p_t, logits.shape[1], pairing)[0]
    joint = (logits[:, 0].float() / temperature).softmax(-1).mean(0)
    return (target * (target.clamp(min=1e-12) / joint.clamp(min=1e-12)).log()).sum(-1).mean()


# ------------------------------------------------------------------------------- exploration terms

def entropy(p, dim=-1):
    """Shannon entropy in nats."""
    return -(p * p.clamp(min=1e-12).log()).sum(dim)


def symbol_entropy(logits):
    """H(p): mean entropy, in nats, of the predicted symbols softmax(logits), logits (B, T, K)."""
    return entropy(F.softmax(logits.float(), dim=-1)).mean()


def sequence_information(weights):
    """I(s): entropy of the symbols within one sequence, mean over images; weights (B, T, K).

    0 when a sequence repeats one symbol, ln T when all T differ (our choice: the paper only says
    that repeated symbols lower the information)."""
    return entropy(weights.mean(1)).mean()


def usage_entropy(logits):
    """Entropy of the batch's mean prediction, per position: up with the number of symbols in use,
    ln K when all are used alike; logits (B, T, K). Nats, mean over positions.

    Our addition. With the entropy of each prediction subtracted (mutual information,
    IMSAT, Hu et al. 2017) all positions come to say the same: each is then best off
    repeating the easiest distinction."""
    return entropy(distributed.all_reduce_mean(F.softmax(logits.float(), dim=-1).mean(0))).mean()


def exploration_loss(weights, logits, explore, alpha, beta, balance):
    """The paper's strategies (section 3.4): base 0; entropy -alpha H(p); info -beta I(s); combined
    both; and -balance * `usage_entropy`, which is ours and comes on top of each."""
    loss = logits.new_zeros(())
    if explore in ("entropy", "combined"):
        loss = loss - alpha * symbol_entropy(logits)
    if explore in ("info", "combined"):
        loss = loss - beta * sequence_information(weights)
    if balance:
        loss = loss - balance * usage_entropy(logits)
    return loss


# --------------------------------------------------------------------------------------- schedules

def cosine(start, end, progress):
    """From start to end along half a cosine; progress in [0, 1]."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))


def warmup_cosine(peak, end, step, steps, warmup):
    """Linear from 0 to peak over `warmup` steps, then cosine to end: DINO's learning rate."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(peak, end, (step - warmup) / max(1, steps - warmup))


def warmup_linear(start, end, step, warmup):
    """From start to end over `warmup` steps, then constant: DINO's teacher-temperature schedule."""
    return start + (end - start) * min(1.0, step / max(1, warmup))


def parameter_groups(module):
    """AdamW groups as in DINO: no weight decay on biases, norms and other vectors."""
    matrices = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": matrices, "decay": True},
            {"params": vectors, "decay": False, "weight_decay": 0.0}]


def set_schedule(optimizer, lr, weight_decay):
    for group in optimizer.param_groups:
        group["lr"] = lr
        if group["decay"]:
            group["weight_decay"] = weight_decay
