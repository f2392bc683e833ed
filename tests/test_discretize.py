"""Known answers for discretize.py: numbers by hand, planted logits, short reimplementations."""
import math
import re

import pytest
import torch
from torch.nn import functional as F

import discretize
import flags
from conftest import RECIPES, make_student

B, WIDTH, VOCAB = 64, 24, 12
NAMES = list(discretize.DISCRETIZERS)


def make(name, width=WIDTH, vocab=VOCAB, seed=0, **changes):
    torch.manual_seed(seed)
    args = flags.parse(["--recipe", "paper", "--disc", name, "--vocab", str(vocab)])
    vars(args).update(changes)
    return discretize.build(args, width)


def vectors(n=B, width=WIDTH, seed=1):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


# ---- the contract, for every entry ---------------------------------------------------------------

@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("hard, straight_through", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("name", NAMES)
def test_contract(name, hard, straight_through, training):
    disc = make(name, straight_through=straight_through).train(training)
    weights, embedding, ids, aux, logits = disc(vectors(), hard=hard)
    assert weights.shape == logits.shape == (B, VOCAB) and embedding.shape == (B, WIDTH)
    assert ids.shape == (B,) and ids.dtype == torch.int64 and aux.shape == ()
    assert all(x.dtype == torch.float32 for x in (weights, embedding, aux, logits))
    assert weights.min() >= 0 and torch.allclose(weights.sum(-1), torch.ones(B))
    assert torch.equal(ids, weights.argmax(-1)) and len(ids.unique()) > 3
    assert torch.allclose(embedding, weights @ disc.codebook, atol=1e-6)
    assert (aux > 0) == (name == "vq")
    if hard:
        assert torch.equal(ids, logits.argmax(-1))              # no noise, in training either
    if hard or straight_through or name == "vq":
        assert torch.equal(weights, F.one_hot(ids, VOCAB).float())
    else:
        assert (weights.max(-1).values < 0.99).any()            # soft


@pytest.mark.parametrize("name", NAMES)
def test_float32_under_bfloat16_autocast(name):
    disc, h = make(name).eval(), vectors()
    expected = disc(h)
    with torch.autocast("cpu", torch.bfloat16):
        out = disc(h)
    assert out.weights.dtype == out.embedding.dtype == torch.float32
    assert torch.equal(out.logits, expected.logits)     # bfloat16 products would differ in digit 3
    assert torch.equal(out.embedding, expected.embedding)


@pytest.mark.parametrize("name, change", [
    ("softmax", dict(tau=0.0)), ("gumbel", dict(tau=-1.0)), ("vq", dict(tau=math.nan)),
    ("softmax", dict(vocab=1))])
def test_a_wrong_setting_is_one_clear_line(name, change):
    with pytest.raises(ValueError) as error:
        make(name, **change)
    assert re.match(f"--{next(iter(change)).replace('_', '-')} (and --tau-start )?must be ",
                    str(error.value)) and "\n" not in str(error.value)


@pytest.mark.parametrize("tau, tau_start", [(None, 0.0), (0.5, -1.0)])
def test_a_start_must_be_above_0_too(tau, tau_start):
    with pytest.raises(ValueError, match="--tau and --tau-start must be above 0"):
        make("softmax", tau=tau, tau_start=tau_start)


@pytest.mark.parametrize("name, start, end", [("softmax", 0.12, 0.12), ("gumbel", 2, 0.5),
                                              ("vq", 1, 1)])
def test_temperatures_not_given_are_the_class_s(name, start, end):
    def temperatures(**given):
        disc = make(name, **given)
        return disc.tau, disc.start_tau, disc.final_tau
    assert temperatures() == (start, start, end)
    assert temperatures(tau=0.7) == (0.7, 0.7, 0.7)             # a --tau alone is constant
    assert temperatures(tau_start=3.0) == (3, 3, end)
    assert temperatures(tau=0.7, tau_start=3.0) == (3, 3, 0.7)


def test_anneal_sets_every_discretizer_of_a_module():
    module = torch.nn.ModuleList([make("gumbel", tau=0.01, tau_start=1.0),
                                  make("softmax", tau=0.04, tau_start=1.0), make("vq", tau=0.3)])
    for progress, expected in ((0, (1, 1, 0.3)), (0.5, (0.1, 0.2, 0.3)), (1, (0.01, 0.04, 0.3))):
        discretize.anneal(module, progress)                     # half-way: geometric mean
        assert [disc.tau for disc in module] == pytest.approx(expected)


def test_switch_ends_gumbels_noise_half_way():
    disc, h = make("gumbel"), vectors(2)
    for explore, progress, noisy in (("switch", 0.49, True), ("switch", 0.5, False),
                                     ("base", 0.9, True)):
        discretize.anneal(disc.train(), progress, explore)
        assert torch.equal(disc(h).weights, disc(h).weights) == (not noisy)
    discretize.anneal(disc, 1.0, "switch")
    assert torch.allclose(disc(h).weights, (disc.logits(h) / disc.tau).softmax(-1))


# ---- softmax and gumbel --------------------------------------------------------------------------

def test_softmax_by_hand():
    disc = make("softmax", width=2, vocab=3, tau=0.5)
    disc.to_logits.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    disc.codebook.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 3.0]])
    h = torch.tensor([[math.log(2) / 2, math.log(3) / 2]])
    out = disc(h)                               # W h / tau = (ln 2, ln 3, 0): weights 2 : 3 : 1
    assert torch.allclose(out.logits, torch.tensor([2.0, 3, 1]).log())
    assert torch.allclose(out.weights, torch.tensor([[2, 3, 1]]) / 6)
    assert torch.allclose(out.embedding, torch.tensor([[5 / 6, 1.0]]))
    assert out.ids.tolist() == [1]
    disc.tau = 0.25                             # as `anneal` sets it: the logits double
    assert torch.allclose(disc(h).weights, torch.tensor([[4, 9, 1]]) / 14)
    disc.to_logits.bias.data = torch.tensor([0.0, 0.0, math.log(9) / 4])
    assert torch.allclose(disc(h).weights, torch.tensor([[4, 9, 9]]) / 22)


def test_gumbel_by_hand(monkeypatch):
    """-log E of planted E ~ Exp(1) is the noise, which is added before the division by tau."""
    disc = make("gumbel", width=2, vocab=2, tau=0.5)
    disc.to_logits.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    h, planted = torch.tensor([[math.log(2), math.log(3)]]), torch.tensor([[1 / 3, 1.0]])
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.copy_(planted))
    out = disc(h)                           # W h + g = (ln 6, ln 3): weights 36 : 9, symbol 0
    assert torch.allclose(out.weights, torch.tensor([[4, 1]]) / 5) and out.ids.tolist() == [0]
    assert torch.allclose(out.logits, h)                                    # without the noise
    assert disc(h, hard=True).ids.tolist() == [1] == disc.eval()(h).ids.tolist()
    assert torch.allclose(disc(h).weights, torch.tensor([[4, 9]]) / 13)


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


@pytest.mark.parametrize("straight_through", [False, True])
def test_gumbel_is_softmax_in_evaluation(straight_through):
    options = dict(tau=0.3, straight_through=straight_through)
    gumbel, softmax = make("gumbel", **options).eval(), make("softmax", **options)
    softmax.load_state_dict(gumbel.state_dict())
    # softmax: W h / tau and its softmax; gumbel: W h, divided by tau on the way to the weights
    assert torch.allclose(gumbel(vectors()).logits, 0.3 * softmax(vectors()).logits)
    assert torch.allclose(gumbel(vectors()).weights, softmax(vectors()).weights, atol=1e-6)


@pytest.mark.parametrize("tau", [0.12, 2.0])
def test_gumbel_samples_the_softmax_of_its_logits(tau):
    disc, p = make("gumbel", width=1, vocab=4, tau=tau), torch.tensor([0.1, 0.2, 0.3, 0.4])
    disc.to_logits.weight.data = p.log()[:, None]
    n = 20000
    out = disc(torch.ones(n, 1))
    frequency = torch.bincount(out.ids, minlength=4) / n
    # standard error below 0.0035; tau must not matter (Gumbel-max)
    assert torch.allclose(frequency, p, atol=0.015)
    assert torch.allclose(out.logits.softmax(-1)[0], p)


@pytest.mark.parametrize("name, tau_start", [("softmax", None), ("softmax", 1.0), ("gumbel", None)])
@pytest.mark.parametrize("tau, width", [(None, 64), (0.12, 64), (0.12, 512), (1.0, 64)])
def test_untrained_symbols_are_neither_uniform_nor_one_hot(name, tau_start, tau, width):
    disc = make(name, width, 128, tau=tau, tau_start=tau_start)
    log_p = disc(vectors(width=width)).logits.log_softmax(-1)
    perplexity = torch.exp(-(log_p.exp() * log_p).sum(-1)).mean()
    assert 0.2 * 128 < perplexity < 0.6 * 128                   # K exp(-1.5^2 / 2) = 0.32 K
    assert disc.codebook.std().item() == pytest.approx(0.3, rel=0.05)       # as the positions


# ---- vq ------------------------------------------------------------------------------------------

def test_vq_finds_the_nearest_code():
    disc, h = make("vq", tau=0.2), vectors()
    out = disc(h)
    squared = torch.stack([((h - code) ** 2).sum(1) for code in disc.codebook], 1)      # (B, K)
    assert torch.equal(out.ids, squared.argmin(1)) and len(out.ids.unique()) > 3
    assert torch.allclose(out.logits, -squared / (2 * WIDTH * 0.2), atol=1e-3)
    assert torch.allclose(out.embedding, disc.codebook[out.ids], atol=1e-6)


def test_vq_copies_the_gradient():
    disc, h, direction = make("vq"), vectors().requires_grad_(), vectors(seed=2)
    (disc(h).embedding * direction).sum().backward()
    assert torch.equal(h.grad, direction)
    assert disc.codebook.grad is None           # equation 3: the codes learn by their own loss only


def test_vq_loss_is_equation_3():
    """Nearest codes (0, 0) and (3, 2): squared errors 1, 0, 0, 4, whose mean is 1.25."""
    disc = make("vq", width=2, vocab=2)
    disc.codebook.data = torch.tensor([[0.0, 0.0], [3.0, 2.0]])
    h = torch.tensor([[1.0, 0.0], [3.0, 4.0]], requires_grad=True)
    aux = disc(h).aux
    assert aux.item() == pytest.approx(1.25 + 0.25 * 1.25)
    aux.backward()
    difference = torch.tensor([[1.0, 0.0], [0.0, 2.0]])                     # h - e
    assert torch.allclose(h.grad, 0.25 * 2 * difference / 4)                 # by the commitment
    assert torch.allclose(disc.codebook.grad, -2 * difference / 4)


# ---- a codebook that k-means started -------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_after_init_codebook_the_nearest_centroid_is_emitted(name):
    disc, h, centroids = make(name), 3 * vectors(500), 3 * vectors(VOCAB, seed=5)
    squared = torch.cdist(h, centroids).square()                            # (n, K)
    scale = squared.std()
    disc.init_codebook(centroids, scale)
    out = disc(h, hard=True)
    assert torch.equal(out.ids, squared.argmin(1)) and len(out.ids.unique()) == VOCAB
    assert torch.equal(disc.codebook, centroids)
    assert torch.allclose(out.embedding, centroids[out.ids], atol=1e-5)
    # The logits before tau have deviation 1 (softmax) or 30 (gumbel: its noise has 1.28)
    sharpness = {"softmax": 1 / scale / disc.tau, "gumbel": 30 / scale,
                 "vq": 1 / (2 * WIDTH * disc.tau)}[name]
    expected = (-squared * sharpness).log_softmax(-1)
    assert torch.allclose(out.logits.log_softmax(-1), expected, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_codebook_parameters_are_those_that_init_codebook_sets(name):
    disc = make(name)
    before = {key: p.clone() for key, p in disc.named_parameters()}
    disc.init_codebook(vectors(VOCAB), torch.tensor(2.0))
    moved = {id(p) for key, p in disc.named_parameters() if not torch.equal(p, before[key])}
    assert moved == {id(p) for p in disc.codebook_parameters()} and moved


# ---- planted logits decide, whatever the recipe --------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_planted_logits_decide_the_symbols(name, recipe, monkeypatch):
    student = make_student("--recipe", recipe, "--disc", name)
    planted = torch.randn(8, 16, 6)                                         # (T, B, K)
    discs = student.disc if recipe == "stable" else [student.disc] * 8
    calls = iter(planted)
    for disc in discs:          # stable: one discretizer a position; paper: the same at each
        monkeypatch.setattr(disc, "logits", lambda h: next(calls))
    for tokens in (torch.randn(16, 6, 32), torch.zeros(16, 6, 32)):
        calls = iter(planted)
        sequence = student.describe(tokens, hard=True)
        ids = planted.argmax(-1).T                                          # (B, T)
        assert torch.equal(sequence.ids, ids)
        expected = torch.stack([d.codebook[i] for d, i in zip(discs, ids.T)], 1)
        assert torch.allclose(sequence.embeddings, expected, atol=1e-6)


# ---- the script ----------------------------------------------------------------------------------

def test_the_script_shows_all_discretizers_hard_and_soft(capsys):
    discretize.main()
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[:2] for line in lines] == [[n, kind] for n in NAMES
                                                    for kind in ("soft", "hard")]
    for line in lines:
        name, kind, symbol = (line.split()[i] for i in (0, 1, 3))
        weights = [float(w) for w in re.search("weights (.*?)  ", line).group(1).split()]
        gradient = line.split()[-1]
        assert weights.index(max(weights)) == int(symbol)
        assert sum(weights) == pytest.approx(1, abs=0.03) and len(weights) == 5
        hard = kind == "hard" or name == "vq"
        assert (max(weights) == 1) == hard
        # vq copies the gradient of the sum of d = 4 numbers, |(1, 1, 1, 1)| = 2; argmax has none
        assert gradient == ("2.00" if name == "vq" else "none" if hard else gradient)
        assert hard or 0 < float(gradient) != 2
