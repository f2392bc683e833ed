"""Known answers for place.py: the decoder of --attention own against its equations, one position at
a time without a cache; what reaches a symbol and what does not; the loss of its places."""
import math

import pytest
import torch
import torch.nn.functional as F

import place
from conftest import RECIPES, make_student

B, N, D, T, SIDE = 3, 16, 32, 8, 4


def own(*words):
    return make_student("--attention", "own", *words)


def by_the_equations(descriptor, inputs, tokens, left):
    """The last position of inputs (B, t, d), full causal attention over them -> decoder's output
    before its BatchNorm (B, d), map and share (B, N)."""
    x, t = inputs, inputs.shape[1]
    for block in descriptor.blocks:
        h = block.norm1(x)
        q, k, v = (y.unflatten(-1, (block.attention.heads, -1)) for y in (
            block.attention.to_q(h), *block.attention.to_kv(h).chunk(2, -1)))
        scores = torch.einsum("blhc,bshc->bhls", q, k) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), -math.inf)
        x = x + block.attention.out(
            torch.einsum("bhls,bshc->blhc", scores.softmax(-1), v).flatten(2))
        if block is descriptor.blocks[-1]:              # it alone attends to the image
            x, cross = x[:, -1], block.cross
            scores = torch.einsum("bd,bnd->bn", cross.to_q(block.norm_cross(x)), tokens) / D**0.5
            pointed = (scores + left.log()).argmax(1)
            rows, columns = torch.arange(N) // SIDE, torch.arange(N) % SIDE
            square = ((rows - rows[pointed, None]) ** 2 + (columns - columns[pointed, None]) ** 2)
            share = left * (-square / SIDE**2 / (2 * place.SIGMA**2)).exp()
            weight = scores.exp() * share
            weight = weight / weight.sum(1, keepdim=True)
            y = cross.out(torch.einsum("bn,bnd->bd", weight, tokens + cross.mlp(tokens)))
            x = x + y + cross.deep(block.norm_cross(x) + y)
        x = x + block.mlp(block.norm2(x))
    return x, weight, share


@torch.no_grad()
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_decoder_is_its_equations(recipe):
    student, z_t, stable = own("--recipe", recipe), torch.randn(B, N + 1, D), recipe == "stable"
    descriptor, codewords, inputs = student.descriptor, 0, torch.zeros(B, 0, D)
    sequence = student.describe(z_t, hard=True, attention=True)
    symbol, left = descriptor.start.expand(B, D), torch.ones(B, N)
    for t in range(T):
        inputs = torch.cat([inputs, (symbol + descriptor.position[t])[:, None]], 1)
        x, weight, share = by_the_equations(descriptor, inputs, z_t[:, 1:], left)
        left = torch.ones(B, N) if t == place.PLACES - 1 else left - share
        assert torch.allclose(sequence.attention[:, t], weight, atol=1e-5)
        norm = descriptor.norms[t]
        h = (x - norm.running_mean) / (norm.running_var + 1e-5).sqrt()
        if stable:
            assert torch.allclose(sequence.shares[:, t], share, atol=1e-5)
            h = descriptor.cls_head(h) - codewords
        assert torch.allclose((student.disc[t] if stable else student.disc)(h).logits,
                              sequence.logits[:, t], atol=1e-3)
        symbol = sequence.embeddings[:, t]
        codewords = codewords + symbol


@torch.no_grad()
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_cls_is_out_of_reach(recipe):
    """Of both recipes, and of stable's --memory all too."""
    student, z_t = own("--recipe", recipe), torch.randn(B, N + 1, D)
    other = torch.cat([z_t[:, :1] + 5, z_t[:, 1:]], 1)
    assert torch.equal(*(student.describe(z, True, True).logits for z in (z_t, other)))


@torch.no_grad()
def test_places_are_apart_and_nothing_but_the_map_lets_the_image_in():
    """Channel 0 of a token is how strongly it is pointed at: patches 0, 3, 12, 15, the corners, in
    this order. The map of each is on it alone, and no other patch's other channels matter."""
    student, tokens = own(), torch.randn(B, N, D)
    tokens[:, :, 0], cross = 0, student.descriptor.blocks[-1].cross
    corners = torch.tensor([0, 3, 12, 15])
    tokens[:, corners, 0] = torch.tensor([1.5, 1.4, 1.3, 1.2])
    cross.to_q.weight.zero_()
    cross.to_q.bias.copy_(16 * D**0.5 * torch.eye(D)[0])                        # scores 16 z[0]
    z_t = torch.cat([torch.randn(B, 1, D), tokens], 1)
    sequence = student.describe(z_t, hard=True, attention=True)
    assert torch.equal(sequence.attention.argmax(2), corners.repeat(2).expand(B, T))
    assert sequence.attention.amax(2).min() > 0.999
    for shares in sequence.shares.split(place.PLACES, 1):
        assert (shares >= 0).all() and shares.sum(1).max() <= 1 + 1e-5
        assert torch.allclose(shares[:, range(4), corners], torch.ones(B, 4), atol=1e-2)
    elsewhere = z_t.clone()
    elsewhere[:, 1:, 1:] += 3 * torch.randn(B, N, D - 1)
    elsewhere[:, 1 + corners] = z_t[:, 1 + corners]
    hidden = student.describe(elsewhere, hard=True, attention=True)
    assert (hidden.logits - sequence.logits).abs().max() < 0.05 * sequence.logits.std()
    third = z_t.clone()
    third[:, 1 + 12, 1:] += 3 * torch.randn(D - 1)              # the place of symbols 3 and 7
    change = (student.describe(third, hard=True).logits - sequence.logits).abs().amax((0, 2))
    assert change[2] > 0.5 * sequence.logits.std() and change[:2].max() < 0.01


def test_a_symbols_gradient_reaches_where_it_points():
    student = own().train()
    sequence = student.describe(torch.randn(B, N + 1, D))
    sequence.shares.square().sum().backward()
    assert student.descriptor.blocks[-1].cross.to_q.weight.grad.abs().max() > 0


def test_the_loss_of_pointing_by_hand():
    """Three patches, a symbol whose scores are 0, ln 2 and ln 3, and a share of the last two."""
    cross = place.PlaceAttention(2, 1)
    cross.listen.weight.data.copy_(torch.eye(2) * 2**0.5)
    cross.listen.bias.data.zero_()
    tokens = torch.tensor([[1.0, 0], [2, 0], [3, 0]]).clamp(min=1e-9).log()[None]
    loss = cross.pointing_loss(torch.tensor([[[1.0, 0]]]), torch.tensor([[[0, 0.2, 0.2]]]), tokens)
    assert loss.item() == pytest.approx(-(math.log(2 / 6) + math.log(3 / 6)) / 2, abs=1e-5)


def test_windows_by_hand():
    w = place.windows(9)                                                        # 3 x 3 patches
    assert torch.equal(w.diag(), torch.ones(9)) and torch.allclose(w, w.T)
    assert w[0, 1].item() == pytest.approx(math.exp(-(1 / 3) ** 2 / (2 * place.SIGMA**2)))
    assert w[0, 8].item() == pytest.approx(math.exp(-2 * (2 / 3) ** 2 / (2 * place.SIGMA**2)),
                                          rel=1e-4)


def test_the_loss_of_places_by_hand():
    """Two places of one token each, which they take whole, and two patches of background 1: no
    error. With background 0 these become 0: the error is their part of the mean square."""
    tokens = torch.tensor([[3.0, 0], [0, 2], [1, 1], [1, 1]])[None]             # (1, 4, 2)
    shares = F.one_hot(torch.tensor([[0, 1]]), 4).float()
    assert place.place_loss(shares, shares, tokens, torch.ones(2)).item() == 0
    # weights |z|^2 / d: 4.5, 2, 1, 1; errors 0, 0, 1, 1
    assert place.place_loss(shares, shares, tokens, torch.zeros(2)).item() == pytest.approx(2 / 8.5)
