"""Known answers for discretize.py: numbers by hand, planted clusters, short reimplementations."""

import argparse
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import discretize

B, WIDTH, VOCAB = 64, 24, 12  # wider than --vq-dim: by default vq projects down and up


def flags(*words, **changes):
    parser = argparse.ArgumentParser()
    discretize.add_flags(parser)
    args = parser.parse_args(list(words))
    for name, value in changes.items():
        assert hasattr(args, name), name
        setattr(args, name, value)
    return args


def make(name, width=WIDTH, vocab=VOCAB, seed=0, **changes):
    torch.manual_seed(seed)
    return discretize.build(name, width, vocab, flags(**changes))


def make_vq(codes, **changes):
    """A vq with the given codes (K, c), c = width, past its k-means, without restarts."""
    codes = torch.tensor(codes)
    options = dict(vq_dim=0, vq_init="random", vq_restart=0.0) | changes
    disc = make("vq", codes.shape[1], len(codes), **options)
    disc.codebook.data.copy_(codes)
    return disc


def vectors(n=B, width=WIDTH, seed=1):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the contract, for every entry

@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("hard, straight_through", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("name", list(discretize.DISCRETIZERS))
def test_contract(name, hard, straight_through, training):
    disc = make(name, straight_through=straight_through).train(training)
    weights, embedding, ids, aux, logits = out = disc(vectors(), hard=hard)
    assert weights.shape == logits.shape == (B, VOCAB) and embedding.shape == (B, WIDTH)
    assert ids.shape == (B,) and ids.dtype == torch.int64 and aux.shape == ()
    assert all(x.dtype == torch.float32 for x in (weights, embedding, aux, logits))
    assert weights.min() >= 0 and torch.allclose(weights.sum(-1), torch.ones(B))
    assert torch.equal(ids, weights.argmax(-1))
    assert torch.allclose(embedding, weights @ disc.table, atol=1e-6)
    assert (aux > 0) == (name == "vq")
    if hard:
        assert torch.equal(ids, logits.argmax(-1))  # no noise, in training either
        assert torch.equal(weights, F.one_hot(out.ids, VOCAB).float())
    elif not straight_through and name != "vq":
        assert (weights.max(-1).values < 0.99).any()  # a mixture


@pytest.mark.parametrize("name", list(discretize.DISCRETIZERS))
def test_float32_under_bfloat16_autocast(name):
    disc, h = make(name, straight_through=False).eval(), vectors()
    expected = disc(h)
    with torch.autocast("cpu", torch.bfloat16):
        out = disc(h)
    assert out.weights.dtype == torch.float32
    assert torch.equal(out.logits, expected.logits)  # bfloat16 products would differ in digit 3


@pytest.mark.parametrize("name", list(discretize.DISCRETIZERS))
def test_state_dict_continues_to_the_bit(name):
    def step(disc, number):
        for position in range(2):
            disc(vectors(seed=2 * number + position))
        disc.after_step()

    options = dict(straight_through=False, vq_restart=0.5, vq_decay=0.5)
    first = make(name, **options)
    for number in range(3):
        step(first, number)
    second = make(name, seed=5, **options)
    second.load_state_dict(first.state_dict())
    random_state = torch.get_rng_state()
    step(first, 3)
    torch.set_rng_state(random_state)
    step(second, 3)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    random_state = torch.get_rng_state()
    expected = first(vectors())
    torch.set_rng_state(random_state)
    assert torch.equal(second(vectors()).embedding, expected.embedding)


@pytest.mark.parametrize("name, change", [
    ("softmax", dict(tau=0.0)), ("gumbel", dict(tau=-1.0)), ("vq", dict(tau=0.0)),
    ("vq", dict(vq_update="sgd")), ("vq", dict(vq_init="zeros")), ("vq", dict(vq_decay=1.0)),
    ("vq", dict(vq_restart=1.0)), ("vq", dict(vq_dim=-1)), ("softmax", dict(vocab=1)),
    ("gumble", {}),
])
def test_a_wrong_setting_is_one_clear_line(name, change):
    with pytest.raises(ValueError) as error:
        make(name, **change)
    message = str(error.value)
    assert message.startswith("--") and "\n" not in message
    wrong = str(next(iter(change.values()))) if change else name
    assert wrong in message  # it quotes what the user wrote


def test_flags_have_defaults_and_help():
    parser = argparse.ArgumentParser()
    discretize.add_flags(parser)
    args = parser.parse_args([])
    assert (args.disc, args.vocab, args.vq_dim) == ("softmax", 128, 16)
    assert (args.tau, args.tau_start, args.straight_through) == (None, None, True)
    assert flags("--no-straight-through").straight_through is False
    assert all(len(action.help) > 20 for action in parser._actions)
    assert "--vq-beta" in parser.format_help()  # a stray % in a help text fails here


@pytest.mark.parametrize("name, tau", [("softmax", 0.12), ("gumbel", 1), ("vq", 0.12)])
def test_a_flag_not_given_is_the_class_s_and_a_given_one_wins(name, tau):
    def says_one_hot(disc):
        return torch.equal(disc(vectors()).weights.max(-1).values, torch.ones(B))

    disc = make(name)
    assert disc.tau == disc.final_tau == tau and says_one_hot(disc)
    assert make(name, tau_start=1.0).final_tau == tau  # where the annealing ends
    for chosen in (True, False):
        disc = make(name, tau=0.7, straight_through=chosen)
        assert disc.tau == disc.final_tau == 0.7
        assert says_one_hot(disc) == (chosen or name == "vq")


def test_embeddings_start_as_large_as_the_positions():
    for name in ("softmax", "gumbel"):
        table = make(name, 64, 128).table
        assert table.std().item() == pytest.approx(0.3, rel=0.05)


def test_anneal():
    assert discretize.anneal(None, 0.12, 0.3) == pytest.approx(0.12)
    assert discretize.anneal(1.0, 0.01, 0.0) == pytest.approx(1.0)
    assert discretize.anneal(1.0, 0.01, 0.5) == pytest.approx(0.1)  # geometric mean
    assert discretize.anneal(1.0, 0.01, 1.2) == pytest.approx(0.01)  # stays at the end
    for start, end in ((0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)):
        with pytest.raises(ValueError, match="above 0"):
            discretize.anneal(start, end, 0.5)


# --------------------------------------------------------------------------- softmax and gumbel

def test_softmax_by_hand():
    disc = make("softmax", width=2, vocab=3, tau=0.5, straight_through=False)
    disc.to_logits.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    disc.table.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 3.0]])
    out = disc(torch.tensor([[math.log(2) / 2, math.log(3) / 2]]))
    # W h / tau = (ln 2, ln 3, 0): weights 2 : 3 : 1
    assert torch.allclose(out.weights, torch.tensor([[2, 3, 1]]) / 6)
    assert torch.allclose(out.embedding, torch.tensor([[5 / 6, 1.0]]))
    assert out.ids.tolist() == [1]
    disc.tau = 0.25  # the schedule's handle: logits double
    squared = torch.tensor([[4, 9, 1]]) / 14
    assert torch.allclose(disc(torch.tensor([[math.log(2) / 2, math.log(3) / 2]])).weights, squared)


@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize("name", ["softmax", "gumbel"])
def test_gradient_against_three_lines(name, straight_through):
    disc = make(name, tau=0.7, straight_through=straight_through)
    h, direction = vectors().requires_grad_(), vectors(seed=2)
    torch.manual_seed(3)
    out = disc(h)
    (out.weights @ direction[0, :VOCAB]).sum().backward()

    torch.manual_seed(3)
    noise = -torch.empty(B, VOCAB).exponential_().log() if name == "gumbel" else 0.0
    twin = h.detach().clone().requires_grad_()
    soft = ((twin @ disc.to_logits.weight.detach().T + noise) / 0.7).softmax(-1)
    (soft @ direction[0, :VOCAB]).sum().backward()

    assert twin.grad.abs().max() > 1e-3
    assert torch.allclose(h.grad, twin.grad, atol=1e-6)
    expected = F.one_hot(soft.argmax(-1), VOCAB).float() if straight_through else soft
    assert torch.allclose(out.weights, expected, atol=1e-6)
    if straight_through:
        assert torch.equal(out.weights, expected)  # one-hot to the bit


@pytest.mark.parametrize("straight_through", [False, True])
def test_gumbel_is_softmax_in_evaluation(straight_through):
    options = dict(tau=0.3, straight_through=straight_through)
    gumbel, softmax = make("gumbel", **options).eval(), make("softmax", **options)
    softmax.load_state_dict(gumbel.state_dict())
    # softmax: W h / tau and its softmax; gumbel: W h, divided by tau on the way to the weights
    assert torch.allclose(gumbel(vectors()).logits, 0.3 * softmax(vectors()).logits)
    assert torch.equal(gumbel(vectors()).weights, softmax(vectors()).weights)


@pytest.mark.parametrize("tau", [0.12, 2.0])
def test_gumbel_samples_the_softmax_of_its_logits(tau):
    disc = make("gumbel", width=1, vocab=4, tau=tau)
    disc.to_logits.weight.data = torch.tensor([[1.0], [2.0], [3.0], [4.0]]).log()
    n = 20000
    torch.manual_seed(0)
    out = disc(torch.ones(n, 1))
    frequency = torch.bincount(out.ids, minlength=4) / n
    # standard error below 0.0035; tau must not matter (Gumbel-max)
    assert torch.allclose(frequency, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.015)
    assert torch.allclose(out.logits.softmax(-1)[0], torch.tensor([0.1, 0.2, 0.3, 0.4]))


def test_bids_are_sampled_with_a_quarter_of_the_noise():
    args, n = argparse.Namespace(**vars(flags()), draft=True), 20000
    disc = discretize.build("gumbel", WIDTH, 3, args)
    p = torch.tensor([0.2, 0.3, 0.5])
    ids = disc(vectors(n), bids=(p.log() / 4 / disc.unit).expand(n, -1)).ids
    assert torch.allclose(torch.bincount(ids, minlength=3) / n, p, atol=0.015)


@pytest.mark.parametrize("name, tau_start", [("softmax", None), ("softmax", 1.0), ("gumbel", None)])
@pytest.mark.parametrize("tau, width", [(None, 64), (0.12, 64), (0.12, 512), (1.0, 64)])
def test_untrained_symbols_are_neither_uniform_nor_one_hot(name, tau_start, tau, width):
    disc = make(name, width, 128, tau=tau, tau_start=tau_start)
    disc.tau = tau_start or disc.final_tau
    log_p = disc(vectors(width=width)).logits.log_softmax(-1)
    perplexity = torch.exp(-(log_p.exp() * log_p).sum(-1)).mean()
    assert 0.2 * 128 < perplexity < 0.6 * 128  # K exp(-1.5^2 / 2) = 0.32 K


# ------------------------------------------------------------------------------------------- vq

@pytest.mark.parametrize("l2", [False, True])
@pytest.mark.parametrize("dim", [0, 5])
def test_vq_finds_the_nearest_code(dim, l2):
    disc = make("vq", tau=0.2, vq_dim=dim, vq_l2=l2).eval()
    h = vectors()
    out, codes = disc(h), disc.codebook
    with torch.no_grad():
        z = disc.down(h)
        if l2:
            z, codes = z / z.norm(dim=1, keepdim=True), codes / codes.norm(dim=1, keepdim=True)
        squared = torch.stack([((z - code) ** 2).sum(1) for code in codes], 1)  # (B, K)
        scale = 1 if l2 else z.shape[1]
    assert torch.equal(out.ids, squared.argmin(1)) and len(out.ids.unique()) > 3
    # -|z - e|^2 / (2 c tau); on the sphere (cosine - 1) / tau
    assert torch.allclose(out.logits, -squared / (2 * scale * 0.2), atol=1e-3)
    assert torch.allclose(out.embedding, disc.table[out.ids], atol=1e-6)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_vq_gradient_is_the_identity(update):
    disc = make("vq", vq_dim=0, vq_update=update)
    h, direction = vectors().requires_grad_(), vectors(seed=2)
    (disc(h).embedding * direction).sum().backward()
    assert torch.equal(h.grad, direction)
    assert disc.codebook.grad is None or not disc.codebook.grad.any()  # eq. 3: only by its own loss


def test_vq_gradient_passes_the_projections_only():
    disc = make("vq", vq_dim=5)
    h, direction = vectors().requires_grad_(), vectors(seed=2)
    (disc(h).embedding * direction).sum().backward()
    assert torch.allclose(h.grad, direction @ disc.up.weight @ disc.down.weight, atol=1e-6)


def test_vq_losses_by_hand():
    h = torch.tensor([[1.0, 0.0], [3.0, 4.0]], requires_grad=True)
    codes = [[0.0, 0.0], [3.0, 2.0]]
    # squared errors 1, 0, 0, 4: mean 5 / 4. Commitment 0.5 * 1.25, codebook 1.25
    gradient = make_vq(codes, vq_update="gradient", vq_beta=0.5)
    aux = gradient(h).aux
    assert aux.item() == pytest.approx(1.875)
    aux.backward()
    assert torch.allclose(h.grad, 0.5 * 2 * torch.tensor([[1.0, 0.0], [0.0, 2.0]]) / 4)
    assert torch.allclose(gradient.codebook.grad, -2 * torch.tensor([[1.0, 0.0], [0.0, 2.0]]) / 4)
    ema = make_vq(codes, vq_update="ema", vq_beta=0.5)
    assert ema(h).aux.item() == pytest.approx(0.625)
    assert not list(ema.parameters())  # the codes are the average's, not the optimiser's


def test_vq_ema_by_hand_and_against_the_two_sums():
    disc = make_vq([[0.0], [10.0], [99.0]], vq_decay=0.5)
    usage, sums = torch.full((3,), 1 / 3), torch.tensor([0.0, 10.0, 99.0]) / 3  # N, m of A.1
    for step in range(3):
        first, second = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [11.0 + step]])
        ids = torch.cat([disc(first).ids, disc(second).ids])  # two positions, one update
        assert ids.tolist() == [0, 0, 0, 1]
        disc.after_step()
        usage = 0.5 * usage + 0.5 * torch.tensor([0.75, 0.25, 0.0])
        sums = 0.5 * sums + 0.5 * torch.tensor([6.0, 11.0 + step, 0.0]) / 4
        if step == 0:  # N_0 = (1/3 + 3/4) / 2 = 13/24, m_0 = 3/4; N_1 = 7/24, m_1 = 5/3 + 11/8
            assert disc.codebook[0].item() == pytest.approx(18 / 13)
            assert disc.codebook[1].item() == pytest.approx((5 / 3 + 11 / 8) / (7 / 24))
        assert torch.allclose(disc.usage, usage)
        assert torch.allclose(disc.codebook[:, 0], sums / usage, rtol=1e-4)
    assert disc.codebook[2].item() == 99.0  # unused: it stays, and never becomes 0 / 0
    disc.after_step()  # no forward since: nothing to do
    assert torch.allclose(disc.usage, usage)


def test_vq_code_with_no_usage_left_stays():
    disc = make_vq([[0.0], [10.0]], vq_decay=0.0)  # usage becomes 0 at once: m / N would be 0 / 0
    disc(torch.tensor([[1.0], [2.0]])), disc.after_step()
    assert disc.usage.tolist() == [1.0, 0.0] and disc.codebook.flatten().tolist() == [1.5, 10.0]


def test_vq_gathers_nothing_in_evaluation_or_for_hard_symbols():
    disc = make_vq([[0.0], [10.0]], vq_decay=0.5)
    disc(torch.ones(4, 1), hard=True)
    disc.eval()(torch.ones(4, 1))
    disc.after_step()
    assert disc.codebook.flatten().tolist() == [0.0, 10.0] and disc.usage.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_an_idle_code_restarts_on_a_vector_of_the_step(update):
    disc = make_vq([[0.0], [100.0]], vq_update=update, vq_decay=0.5, vq_restart=0.3)
    h = torch.tensor([[1.0], [2.0], [3.0]])
    disc(h), disc.after_step()  # usage of code 1: 1/4, still above 0.3 / 2
    assert disc.codebook[1].item() == 100.0 and disc.usage[1].item() == 0.25
    disc(h), disc.after_step()  # 1/8: below
    assert disc.codebook[1].item() in (1.0, 2.0, 3.0) and disc.usage[1].item() == 0.5
    never = make_vq([[0.0], [100.0]], vq_update=update, vq_decay=0.5)
    for _ in range(50):
        never(h), never.after_step()
    assert never.codebook[1].item() == 100.0


PLANTED = torch.tensor([[0.0, 0.0], [20.0, 0.0], [0.0, 20.0], [20.0, 20.0]])


def test_kmeans_init_finds_planted_clusters_of_all_positions():
    # Each position says two of the clusters: k-means on one call alone would miss the other two
    disc = make("vq", width=2, vocab=32, vq_dim=0)
    noise = 0.1 * vectors(800, 2)
    disc(PLANTED[torch.arange(400) % 2] + noise[:400])
    before = disc.codebook.clone()
    disc(PLANTED[2 + torch.arange(400) % 2] + noise[400:])
    assert torch.equal(disc.codebook, before) and not disc.ready
    disc.after_step()
    assert disc.ready
    distance = torch.cdist(disc.codebook, PLANTED)  # (32, 4)
    assert distance.min(1).values.max() < 0.5  # no code between clusters
    assert distance.min(0).values.max() < 0.5  # no cluster without a code


def test_kmeans_by_hand():
    torch.manual_seed(0)
    x = torch.tensor([[0.0], [1.0], [10.0], [12.0]])
    # From any two of the four points, Lloyd's algorithm ends in these two means
    assert sorted(discretize.kmeans(x, 2).flatten().tolist()) == [0.5, 11.0]
    assert discretize.kmeans(x, 9).shape == (9, 1)  # fewer vectors than codes
    assert sorted(discretize.draw(x, 4).flatten().tolist()) == [0.0, 1.0, 10.0, 12.0]  # distinct


# -------------------------------------------------------------------- how to add a discretizer

class Sparsemax(discretize.Softmax):
    """Projection of the logits on the simplex (Martins and Astudillo 2016): most weights are 0."""

    def weigh(self, logits):
        ordered = logits.sort(-1, descending=True).values                # (B, K)
        rank = torch.arange(1, self.vocab + 1, device=logits.device)
        excess = ordered.cumsum(-1) - 1
        kept = (rank * ordered > excess).sum(-1, keepdim=True)           # (B, 1) support size
        return (logits - excess.gather(-1, kept - 1) / kept).clamp(min=0)


def test_a_new_discretizer_is_one_short_class(monkeypatch):
    monkeypatch.setitem(discretize.DISCRETIZERS, "sparsemax", Sparsemax)
    disc = discretize.build("sparsemax", WIDTH, 3, flags("--no-straight-through"))
    expected = torch.tensor([[0.75, 0.25, 0.0], [1.0, 0.0, 0.0]])
    assert torch.allclose(disc.weigh(torch.tensor([[1.0, 0.5, -1.0], [3.0, 0.0, 0.0]])), expected)
    for hard in (False, True):
        out = disc(vectors(), hard=hard)
        assert torch.allclose(out.weights.sum(-1), torch.ones(B))
        assert torch.equal(out.ids, out.weights.argmax(-1)) and out.embedding.shape == (B, WIDTH)
    out = disc(vectors())
    (out.embedding * vectors(seed=2)).sum().backward()
    assert (out.weights == 0).any() and disc.to_logits.weight.grad.abs().sum() > 0
