"""Known answers for losses.py: numbers worked out by hand, and plain double loops."""
import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import losses

LN2 = math.log(2)


def close(a, b, tolerance=1e-6):
    a, b = (torch.as_tensor(x).double() for x in (a, b))
    return torch.allclose(a, b, atol=tolerance, rtol=0)


def distributions(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


# ---- the granular DINO loss ----------------------------------------------------------------------

def two_by_two():
    """V = 2 views, D = 2 granularities, B = 1 image, P = 2 prototypes: (p_t, student logits).
    The logits are 0.1 ln q, so that at temperature 0.1 the student's distribution is q itself."""
    p_t = torch.tensor([[1, 0], [0.5, 0.5]])[:, None]                           # (V, B, P)
    q = torch.tensor([[[0.5, 0.5], [0.25, 0.75]], [[0.2, 0.8], [0.9, 0.1]]])    # (D, V, P)
    return p_t, 0.1 * q.log()[:, :, None]


# H of each granularity, mean of two views; by hand.
# cross: n = 1: H([.5 .5], [.5 .5]) = ln 2 and H([1 0], [.25 .75]) = ln 4
#        n = 2: H([.5 .5], [.2 .8]) = ln 2.5 and H([1 0], [.9 .1]) = ln(10 / 9)
# same:  n = 1: ln 2 and -ln(3 / 16) / 2;  n = 2: ln 5 and -ln(0.09) / 2 = ln(10 / 3)
SHORT_LONG = {"cross": (1.5 * LN2, math.log(5 / 3)),
              "same": ((LN2 - math.log(3 / 16) / 2) / 2, (math.log(5) + math.log(10 / 3)) / 2)}


def granular_loss(p_t, logits, lam, pairing="cross"):
    return losses.granular_dino_loss(losses.dino_loss(p_t, logits, 0.1, pairing), lam)


def entropies(p_t, logits, pairing, temperature=0.1):
    """(D, views): the cross-entropies that `dino_loss` averages, as it does."""
    targets = losses.view_targets(p_t, logits.shape[1], pairing)
    found = -(targets * (logits / temperature).log_softmax(-1)).sum(-1).mean(-1)
    assert close(losses.dino_loss(p_t, logits, temperature, pairing), found.mean(1), 1e-5)
    return found


@pytest.mark.parametrize("pairing", ["cross", "same"])
@pytest.mark.parametrize("lam, share", [(0.5, 2 / 3), (1, 1 / 2), (2, 1 / 3)])
def test_granular_loss_by_hand(pairing, lam, share):
    """share: of the short prefix, lam / (lam + lam^2) = 1 / (1 + lam)."""
    short, long = SHORT_LONG[pairing]
    assert close(entropies(*two_by_two(), pairing).mean(1), [short, long])
    loss = granular_loss(*two_by_two(), lam, pairing)
    assert close(loss, share * short + (1 - share) * long)


def test_granular_loss_in_numbers():
    figures = [granular_loss(*two_by_two(), lam).item() for lam in (0.5, 1, 2)]
    assert close(figures, [0.863422, 0.775273, 0.687124])


@pytest.mark.parametrize("views", [3, 7])                     # 7: four local views of the student's
def test_cross_pairing_is_the_double_loop_over_other_views(views):
    p_t, logits = distributions(3, 5, 6), torch.randn(4, views, 5, 6)
    found = entropies(p_t, logits, "cross")
    for d in range(4):
        for i in range(views):
            log_q = torch.log_softmax(logits[d, i] / 0.1, -1)
            pairs = [-(p_t[j] * log_q).sum(-1).mean() for j in range(3) if j != i]
            assert len(pairs) == (2 if i < 3 else 3)
            assert close(found[d, i], sum(pairs) / len(pairs), 1e-5)


def test_same_pairing_is_the_papers_formula():
    p_t, logits = distributions(3, 5, 6), torch.randn(4, 3, 5, 6)
    found = entropies(p_t, logits, "same")
    for d in range(4):
        for i in range(3):
            pair = nn.functional.cross_entropy(logits[d, i] / 0.1, p_t[i])
            assert close(found[d, i], pair, 1e-5)


def test_one_view_is_its_own_target():
    p_t, logits = distributions(1, 5, 6), torch.randn(4, 1, 5, 6)
    same, cross = (granular_loss(p_t, logits, 1.0, name)
                   for name in ("same", "cross"))
    assert same.isfinite() and close(same, cross)


@pytest.mark.parametrize("lam, powers", [
    (0.5, [8, 4, 2, 1]), (1, [1, 1, 1, 1]), (3, [1, 3, 9, 27])])
def test_lambda_moves_weight_between_prefixes(lam, powers):
    logits = torch.zeros(4, 2, 1, 2, requires_grad=True)              # four prefixes, equally wrong
    loss = granular_loss(torch.tensor([[1.0, 0.0]]).expand(2, 1, 2), logits, lam)
    loss.backward()
    pull = logits.grad[..., 0].sum((1, 2))                                      # (D,)
    assert close(pull / pull.sum(), torch.tensor(powers) / sum(powers))
    assert close(loss, LN2)                                          # lambda leaves the scale alone


def test_the_loss_is_least_at_the_targets():
    p_t = distributions(2, 3, 4)
    p_t[1] = p_t[0]                                                             # both views agree
    at = lambda logits: losses.dino_loss(p_t, logits, 0.1, "cross")[0]            # noqa: E731
    best = 0.1 * p_t.log()[None]
    assert close(at(best), losses.entropy(p_t).mean())
    assert at(best + 0.02 * torch.randn(1, 2, 3, 4)) > at(best)


def test_the_loss_is_float32_under_autocast():
    p_t, logits = distributions(3, 5, 6), torch.randn(4, 3, 5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        half = granular_loss(p_t, logits, 0.5)
    assert torch.equal(half, granular_loss(p_t, logits, 0.5))


def test_joint_kl_by_hand():
    """One image, the first of two views, two prefixes: their mean (1/2, 1/2) against (3/4, 1/4)."""
    p_t = torch.tensor([[[0.75, 0.25]], [[0.0, 1.0]]])                          # (V, B, P)
    q = torch.tensor([[0.2, 0.8], [0.8, 0.2]])                                  # (D, P)
    logits = torch.stack([0.1 * q.log(), torch.randn(2, 2)], 1)[:, :, None]     # (D, V, B, P)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert close(losses.joint_kl(p_t, logits, 0.1, "same"), expected)
    # cross: the target is that of the other view, (0, 1): KL = ln 2
    assert close(losses.joint_kl(p_t, logits, 0.1, "cross"), LN2)


# ---- the teacher's side --------------------------------------------------------------------------

def test_sinkhorn_gives_every_image_one_and_every_prototype_its_part():
    q = losses.sinkhorn(torch.randn(24, 6), 0.5, iterations=100)
    assert close(q.sum(1), torch.ones(24)) and close(q.sum(0), torch.full((6,), 24 / 6), 1e-4)
    preferred = torch.randn(24, 6) + torch.tensor([9.0, 0, 0, 0, 0, 0])       # all want prototype 0
    assert losses.sinkhorn(preferred, 1.0).sum(0).max() < 2 * 4 < preferred.softmax(-1).sum(0).max()


def test_sinkhorn_of_balanced_columns_is_softmax():
    row = torch.tensor([0.9, -0.3, 0.1, 0.4])
    circulant = torch.stack([row.roll(i) for i in range(4)])            # all rows and columns alike
    assert close(losses.sinkhorn(circulant, 0.1), (circulant / 0.1).softmax(-1))


def test_the_center_is_used_before_it_moves():
    centering = losses.Centering(2, "center", momentum=0.9)
    logits = torch.tensor([[[1.0, 0.0]], [[3.0, 2.0]]])                  # mean over V and B: (2, 1)
    even = 0.1 * torch.tensor([3.0, 1.0]).log()                              # p = (3, 1) / 4 at 0.1
    assert close(centering(logits, 1.0), logits.softmax(-1))                    # the center was 0
    assert close(centering.center, [0.2, 0.1])
    p_t = centering(centering.center + even.view(1, 1, 2), 0.1)
    assert close(p_t, [[[0.75, 0.25]]])
    assert close(centering.center, torch.tensor([0.2, 0.1]) + 0.1 * even)   # 0.9 c + 0.1 (c + even)


@pytest.mark.parametrize("method", ["none", "sinkhorn"])
def test_other_centerings_keep_no_center(method):
    centering, logits = losses.Centering(4, method), torch.randn(2, 3, 4)
    expected = {"none": (logits / 0.5).softmax(-1),
                "sinkhorn": losses.sinkhorn(logits.view(6, 4), 0.5).view(2, 3, 4)}
    assert close(centering(logits, 0.5), expected[method])
    assert close(centering.center, torch.zeros(4))


def test_ema_update_by_hand():
    target, source = nn.Linear(1, 1), nn.Linear(1, 1)
    for module, weight, bias in ((target, 1.0, -1.0), (source, 2.0, 3.0)):
        nn.init.constant_(module.weight, weight)
        nn.init.constant_(module.bias, bias)
    losses.ema_update(target, source, 0.9)
    assert close(target.weight, [[1.1]]) and close(target.bias, [-0.6])
    assert close(source.weight, [[2.0]]) and close(source.bias, [3.0])


# ---- exploration ---------------------------------------------------------------------------------

K, T = 8, 4
UNDECIDED = torch.zeros(16, T, K)
SAME_SYMBOL = 100 * torch.eye(K)[torch.zeros(16, T, dtype=torch.long)]
# Image i has symbols i, i + 1, i + 2, i + 3 modulo 8: certain, none repeated, each equally often.
VARIED = 100 * torch.eye(K)[(torch.arange(16)[:, None] + torch.arange(T)) % K]


@pytest.mark.parametrize("logits, symbol, within", [
    (UNDECIDED, math.log(K), math.log(K)), (SAME_SYMBOL, 0, 0), (VARIED, 0, math.log(T))])
def test_entropies_at_their_extremes(logits, symbol, within):
    assert close(losses.symbol_entropy(logits), symbol, 1e-5)
    assert close(losses.sequence_information(logits.softmax(-1)), within, 1e-5)


def test_entropy_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]])
    assert close(losses.entropy(p), [1.5 * LN2, 0])
    assert close(losses.entropy(p.T, dim=0), [1.5 * LN2, 0])


def sequence(weights, logits):
    return SimpleNamespace(weights=weights, logits=logits)


@pytest.mark.parametrize("explore, expected", [
    ("base", 0), ("entropy", -0.01 * math.log(K)), ("info", -0.05 * math.log(T)),
    ("combined", -0.01 * math.log(K) - 0.05 * math.log(T))])
def test_exploration_rewards_what_it_is_named_for(explore, expected):
    planted = sequence(VARIED.softmax(-1), UNDECIDED)       # I(s) = ln T, H(p) = ln K
    assert close(losses.exploration_loss(planted, explore, 0.01, 0.05), expected, 1e-5)


# ---- schedules and parameter groups --------------------------------------------------------------

def test_cosine():
    assert [losses.cosine(3, 1, p) for p in (-1, 0, 0.5, 1, 2)] == pytest.approx([3, 3, 2, 1, 1])
    assert losses.cosine(1, 0, 1 / 3) == pytest.approx(0.75)


def test_warmup_cosine():
    at = lambda step: losses.warmup_cosine(1.0, 0.1, step, 110, 10)             # noqa: E731
    assert [at(s) for s in (0, 4, 9, 10, 60, 110)] == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.55, 0.1])
    # a warm-up of 2.5 steps never exceeds the peak
    assert [losses.warmup_cosine(1.0, 1.0, s, 25, 2.5) for s in range(4)] == [0.4, 0.8, 1, 1]
    assert losses.warmup_cosine(1.0, 0.1, 0, 5, 0) == 1.0                       # no warm-up


def test_warmup_linear():
    at = lambda step: losses.warmup_linear(0.04, 0.07, step, 30)                # noqa: E731
    assert [at(s) for s in (0, 10, 30, 99)] == pytest.approx([0.04, 0.05, 0.07, 0.07])


def test_weight_decay_spares_vectors_and_frozen_parameters():
    module = nn.ModuleDict({"a": nn.Linear(3, 2), "norm": nn.LayerNorm(2),
                            "frozen": nn.Linear(2, 2).requires_grad_(False)})
    groups = losses.parameter_groups(module)
    names = {id(p): name for name, p in module.named_parameters()}
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in groups)
    assert decayed == {"a.weight"} and spared == {"a.bias", "norm.weight", "norm.bias"}

    optimizer = torch.optim.AdamW(groups, lr=9.0)
    losses.set_schedule(optimizer, 0.5, 0.2)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for p in module.parameters():
        p.grad = torch.zeros_like(p)                                     # what is left is the decay
    optimizer.step()
    for name, p in module.named_parameters():
        assert close(p, before[name] * (0.9 if name == "a.weight" else 1))   # 1 - lr * weight decay


def test_slow_parameters_have_their_own_rate_and_no_decay():
    module = nn.ModuleDict({"a": nn.Linear(3, 2), "codebook": nn.Linear(2, 4)})
    slow = list(module["codebook"].parameters())
    groups = losses.parameter_groups(module, slow, 0.25)
    assert [{id(p) for p in group["params"]} for group in groups] == [
        {id(module["a"].weight)}, {id(module["a"].bias)}, {id(p) for p in slow}]
    optimizer = torch.optim.AdamW(groups, lr=9.0)
    losses.set_schedule(optimizer, 0.5, 0.2)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.5, 0.2), (0.5, 0), (0.125, 0)]
    before = [p.detach().clone() for p in slow]
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()                            # Adam's first step is as long as the learning rate
    assert all(close(p, b - 0.125) for p, b in zip(slow, before))


# ---- the script ----------------------------------------------------------------------------------

def test_the_script_prints_a_loss_that_its_terms_add_up_to(capsys):
    losses.main()
    *rows, last = capsys.readouterr().out.splitlines()[1:]
    terms = [float(row.split(": ")[1]) for row in rows]                                 # D
    weights = [0.5 ** j for j in range(1, 5)]
    assert all(f"lambda^{j} = {w:<6}" in row for j, (w, row) in enumerate(zip(weights, rows), 1))
    loss = sum(w * t for w, t in zip(weights, terms)) / sum(weights)
    least, = re.findall(r"H\(p_t\) = ([\d.]+)", last)
    printed = float(last.split()[2].rstrip(","))
    assert float(least) < printed and printed == pytest.approx(loss, abs=2e-3)
