"""Known answers for place.py: the decoder of --attention own against its equations, one position at
a time without a cache; what reaches a symbol and what does not; the loss of its places."""
import math

import pytest
import torch
import torch.nn.functional as F

import place
from conftest import RECIPES, make_student

B, N, D, T, SIDE = 3, 16, 32, 8, 4
CORNERS = torch.tensor([0, 3, 12, 15])


def own(*words):
    return make_student("--attention", "own", *words)


def by_the_equations(descriptor, inputs, tokens, left):
    """The last position of inputs (B, t, d), full causal attention over them -> h (B, d), map and
    share (B, N)."""
    y, t = inputs, inputs.shape[1]
    for block in descriptor.blocks:
        h = block.norm1(y)
        q, k, v = (x.unflatten(-1, (block.attention.heads, -1)) for x in (
            block.attention.to_q(h), *block.attention.to_kv(h).chunk(2, -1)))
        scores = torch.einsum("blhc,bshc->bhls", q, k) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), -math.inf)
        y = y + block.attention.out(
            torch.einsum("bhls,bshc->blhc", scores.softmax(-1), v).flatten(2))
        y = y + block.mlp(block.norm2(y))
    q = descriptor.place_attention.to_q(y[:, -1])
    u = torch.einsum("bd,bnd->bn", q, tokens) / D**0.5
    u = u + tokens.square().mean(-1).log() + left.log()
    x = torch.stack([torch.arange(N) // SIDE, torch.arange(N) % SIDE], 1) / SIDE      # (N, 2)
    c = x[u.argmax(1)]                                                                # (B, 2)
    for _ in range(place.SHIFTS + 1):
        square = ((x - c[:, None]) ** 2).sum(-1)
        w = (-square / (2 * place.SIGMA**2)).exp().clamp(min=place.LEAST)
        a = u.exp() * w
        a = a / a.sum(1, keepdim=True)
        c = a @ x
    return torch.einsum("bn,bnd->bd", a, tokens), a, left * w


@torch.no_grad()
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_decoder_is_its_equations(recipe):
    student, z_t, stable = own("--recipe", recipe), torch.randn(B, N + 1, D), recipe == "stable"
    descriptor, inputs = student.descriptor, torch.zeros(B, 0, D)
    if stable:
        descriptor.whiten.normal_(std=D**-0.5)
    sequence = student.describe(z_t, hard=True, attention=True)
    symbol, left, shares = descriptor.start.expand(B, D), torch.ones(B, N), []
    for t in range(T):
        inputs = torch.cat([inputs, (symbol + descriptor.position[t])[:, None]], 1)
        h, weight, share = by_the_equations(descriptor, inputs, z_t[:, 1:], left)
        left = torch.ones(B, N) if t == place.PLACES - 1 else (left - share).clamp(min=place.LEAST)
        shares.append(share)
        assert torch.allclose(sequence.attention[:, t], weight, atol=1e-5)
        if stable:
            assert torch.allclose(sequence.shares[:, t], share, atol=1e-5)
            h = h @ descriptor.whiten
            for m, e in zip(shares[:t // place.PLACES * place.PLACES],
                            sequence.embeddings.unbind(1)):
                h = h - (weight * m).sum(1, keepdim=True) * e
        else:
            norm = descriptor.norms[t]
            h = (h - norm.running_mean) / (norm.running_var + 1e-5).sqrt()
        assert torch.allclose((student.disc[t] if stable else student.disc)(h).logits,
                              sequence.logits[:, t], atol=1e-3)
        symbol = sequence.embeddings[:, t]


@torch.no_grad()
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_cls_is_out_of_reach(recipe):
    """Of both recipes, and of stable's --memory all too."""
    student, z_t = own("--recipe", recipe), torch.randn(B, N + 1, D)
    other = torch.cat([z_t[:, :1] + 5, z_t[:, 1:]], 1)
    assert torch.equal(*(student.describe(z, True, True).logits for z in (z_t, other)))


def corner_images(n, values):
    """-> z_t (n, N+1, D) of short tokens, but for the four corner patches: each is one of the
    planted `values` (V, D), and which one, (n, 4)."""
    which = torch.randint(len(values), (n, 4))
    z_t = 0.01 * torch.randn(n, N + 1, D)
    z_t[:, 1 + CORNERS] += values[which]
    return z_t, which


@torch.no_grad()
def test_places_are_apart_and_nothing_but_the_map_lets_the_image_in():
    """The scores are |z|^2 alone: each of the four corners, which are long, has one symbol a round.
    No other patch matters, and no symbol depends on another's place."""
    student = own()
    student.descriptor.place_attention.to_q.weight.zero_()
    student.descriptor.place_attention.to_q.bias.zero_()
    values = 3 * F.normalize(torch.randn(6, D), dim=1)
    z_t, _ = corner_images(B, values)
    z_t[:, 1 + CORNERS] *= torch.tensor([1.3, 1.2, 1.1, 1.0])[:, None]      # the order
    sequence = student.describe(z_t, hard=True, attention=True)
    assert torch.equal(sequence.attention.argmax(2), CORNERS.repeat(2).expand(B, T))
    assert sequence.attention.amax(2).min() > 0.98
    for shares in sequence.shares.split(place.PLACES, 1):
        assert (shares >= 0).all() and shares.sum(1).max() <= 1 + 1e-5
        assert torch.allclose(shares[:, range(4), CORNERS], torch.ones(B, 4), atol=1e-2)
    third = z_t.clone()
    third[:, 1 + 12] = third[:, 1 + 12].flip(1)         # as long as before; symbols 3 and 7
    change = (student.describe(third, hard=True).logits - sequence.logits).abs().amax((0, 2))
    assert change[2] > 0.1 and change[[0, 1, 3]].max() < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("disc", ["softmax", "gumbel", "vq"])
def test_before_training_a_symbol_stands_for_what_is_at_its_place(disc):
    """Fitted to images with one of six planted values in each corner, scores of |z|^2 alone: all
    images in which a symbol occurs have the same value at its place, whichever corner it is."""
    student = own("--disc", disc, "--vocab", "32", "--neighbours", "0")
    student.descriptor.place_attention.to_q.weight.zero_()
    student.descriptor.place_attention.to_q.bias.zero_()
    values = 3 * F.normalize(torch.randn(6, D), dim=1)
    z_t, _ = corner_images(400, values)
    student.fit(lambda n, augmented=False: [z_t + 0.01 * augmented * torch.randn_like(z_t)])
    z_t, which = corner_images(50, values)
    sequence = student.describe(student.preprocess(z_t), hard=True, attention=True)
    at = sequence.attention[:, :4].argmax(2)                                    # (50, 4) patches
    assert torch.equal(at.sort(1).values, CORNERS.expand(50, 4))
    value = which.gather(1, (at[..., None] == CORNERS).float().argmax(2))
    symbols = sequence.ids[:, :4]
    assert all(len(value[symbols == symbol].unique()) == 1 for symbol in symbols.unique())
    assert len(value.unique()) == 6
    # What the first round leaves of the same places is small
    lengths = sequence.embeddings.norm(dim=2)
    assert lengths[:, 4:].mean() < 0.3 * lengths[:, :4].mean()


def test_a_symbols_gradient_reaches_where_it_points():
    student = own().train()
    sequence = student.describe(torch.randn(B, N + 1, D))
    sequence.shares.square().sum().backward()
    assert student.descriptor.place_attention.to_q.weight.grad.abs().max() > 0


def test_only_the_loss_of_places_has_a_gradient_to_the_decoder():
    """In `stable`: place_loss is of maps and shares, which the symbols' embeddings leave alone."""
    student = own().train()
    sequence = student.describe(torch.randn(B, N + 1, D))
    sequence.embeddings.square().sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in student.descriptor.parameters())


def test_a_window_by_hand():
    grid = place.patch_grid(9)                                                  # 3 x 3 patches
    w = place.window(grid, grid)
    assert torch.equal(w.diag(), torch.ones(9)) and torch.allclose(w, w.T)
    assert w[0, 1].item() == pytest.approx(math.exp(-(1 / 3) ** 2 / (2 * place.SIGMA**2)))
    assert w[0, 8].item() == pytest.approx(place.LEAST)     # exp(-22.7) at a distance of 0.94


def test_mean_shift_moves_to_the_middle_of_what_is_there():
    """Two equal patches side by side and nothing else: the middle between them, from either."""
    grid, scores = place.patch_grid(64), torch.full((2, 64), -20.0)
    scores[:, [27, 28]] = 0
    maps, w = place.mean_shift(scores, grid[[27, 28]], grid)
    assert torch.allclose(maps[:, [27, 28]], torch.tensor(0.5), atol=0.05)
    assert torch.allclose(w[0], w[1], atol=0.05)
    assert w[0, 27].item() == pytest.approx(math.exp(-(1 / 16) ** 2 / (2 * place.SIGMA**2)), abs=0.03)


def test_the_loss_of_places_by_hand():
    """Two places of one token each, which they take whole, and two patches of background 1: no
    error. With background 0 these become 0: the error is their part of the mean square."""
    tokens = torch.tensor([[3.0, 0], [0, 2], [1, 1], [1, 1]])[None]             # (1, 4, 2)
    shares = F.one_hot(torch.tensor([[0, 1]]), 4).float()
    assert place.place_loss(shares, shares, tokens, torch.ones(2)).item() == 0
    # weights |z|^2 / d: 4.5, 2, 1, 1; errors 0, 0, 1, 1
    assert place.place_loss(shares, shares, tokens, torch.zeros(2)).item() == pytest.approx(2 / 8.5)
