"""Known answers for model.py: each network of the student against a plain reimplementation that
keeps nothing, packs nothing and masks by hand. (Teachers and files: test_teachers.py.)"""
import math
import re

import pytest
import torch
import torch.nn.functional as F

import discretize
import flags
import model
from conftest import RECIPES, make_student

B, N, D, T, K = 3, 5, 32, 8, 6


def close(a, b, tolerance=1e-5):
    return torch.allclose(a, b, atol=tolerance, rtol=0)


# ---- attention -----------------------------------------------------------------------------------

def attend(attention, x, source, mask=None):
    """Multi-head attention by the book, from x (B, L, d) to source (B, S, d): output, and weights
    (B, heads, L, S)."""
    split = lambda y: y.view(*y.shape[:2], attention.heads, -1)                 # noqa: E731
    (to_k, to_v), (bias_k, bias_v) = attention.to_kv.weight.chunk(2), attention.to_kv.bias.chunk(2)
    q, k, v = map(split, (attention.to_q(x), source @ to_k.T + bias_k, source @ to_v.T + bias_v))
    scores = torch.einsum("blhc,bshc->bhls", q, k) / math.sqrt(q.shape[-1])
    weights = (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1)
    return attention.out(torch.einsum("bhls,bshc->blhc", weights, v).flatten(2)), weights


def transform(blocks, x, tokens=None, mask=None):
    """x through pre-norm blocks in one go, with no cache: output, weights of the last block's
    cross-attention."""
    weights = None
    for block in blocks:
        h = block.norm1(x)
        x = x + attend(block.attention, h, h, mask)[0]
        if tokens is not None:
            y, weights = attend(block.cross, block.norm_cross(x), tokens)
            x = x + y
        x = x + block.mlp(block.norm2(x))
    return x, weights


@torch.no_grad()
def test_an_attention_map_by_hand():
    """One channel a head, so a score is a product: queries 1 and 2, keys 0, ln 2 and ln 3 (plus a
    constant, which changes nothing); each value is the token plus 5."""
    attention = model.CrossAttention(2, 2)
    for layer, copies in ((attention.to_q, 1), (attention.to_kv, 2), (attention.out, 1)):
        layer.weight.copy_(torch.eye(2).repeat(copies, 1))
        layer.bias.zero_()
    attention.to_kv.bias.copy_(torch.tensor([3.0, -4, 5, 5]))
    tokens = torch.tensor([1, 2, 3]).log()[:, None].expand(1, 3, 2)             # (B, N, d)
    y, maps = attention(torch.tensor([[[1.0, 2.0]]]), tokens)
    first, second = torch.tensor([1, 2, 3]) / 6, torch.tensor([1, 4, 9]) / 14
    assert maps.shape == (1, 1, 2, 3)                                           # (B, L, heads, N)
    assert close(maps[0, 0, 0], first) and close(maps[0, 0, 1], second)
    means = torch.stack([first @ tokens[0, :, 0], second @ tokens[0, :, 1]])
    assert close(y[0, 0], means + 5)


# ---- descriptor ----------------------------------------------------------------------------------

class Forced(torch.nn.Module):
    """A discretizer that emits the symbols ids (B, T), whatever the decoder's output is."""

    def __init__(self, inner, ids):
        super().__init__()
        self.inner, self.ids, self.t = inner, ids, 0

    def forward(self, h, hard=False):
        ids, self.t = self.ids[:, self.t], self.t + 1
        weights = F.one_hot(ids, K).float()
        return discretize.Quantized(weights, weights @ self.inner.codebook, ids, h.new_zeros(()),
                                    self.inner(h).logits)


@torch.no_grad()
@pytest.mark.parametrize("position", [0, 3, 6])
def test_a_symbol_changes_only_what_comes_later(position):
    student, tokens = make_student("--recipe", "paper"), torch.randn(B, N + 1, D)
    first = torch.randint(K, (B, T))
    second = torch.cat([first[:, :position], (first[:, position:] + 1) % K], 1)
    a, b = (student.descriptor(tokens, Forced(student.disc, ids), attention=True)
            for ids in (first, second))
    for x, y in ((a.logits, b.logits), (a.attention, b.attention)):
        assert torch.equal(x[:, :position + 1], y[:, :position + 1])        # before the change
        assert (x[:, position + 1:] - y[:, position + 1:]).abs().amax((0, 2)).min() > 1e-4
    assert torch.equal(a.ids, first) and torch.equal(b.ids, second)


def without_cache(descriptor, inputs, t, tokens, training, kept):
    """The decoder's output at position t from the inputs (B, t+1, d) of all positions up to it, by
    full causal attention -> (B, d), and the map of the deepest cross-attention (B, N or N+1)."""
    causal = torch.ones(t + 1, t + 1, dtype=torch.bool).tril()
    x, weights = transform(descriptor.blocks, inputs, tokens, causal)
    x = x[:, -1]
    mean, var = (x.mean(0), x.var(0, False)) if training else kept[t]
    return (x - mean) / (var + 1e-5).sqrt(), weights[:, :, -1].mean(1)


@torch.no_grad()
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("flags", ["--recipe paper", "--recipe stable",
                                   "--recipe stable --memory patches"])
def test_cached_decoding_equals_full_causal_attention(flags, training, hard):
    """And for `stable`: h_t = cls_pred_t - (e_1 + ... + e_(t-1)), with and without the CLS."""
    student = make_student(*flags.split(), "--tau", "0.5", "--no-straight-through")
    z_t, descriptor, stable = torch.randn(B, N + 1, D), student.descriptor, "stable" in flags
    with_cls = "patches" not in flags
    kept = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in descriptor.norms]
    sequence = student.train(training).describe(z_t, hard, attention=True)
    tokens = z_t if with_cls else z_t[:, 1:]
    inputs, symbol, codewords = torch.zeros(B, 0, D), descriptor.start.expand(B, D), 0
    for t in range(T):
        inputs = torch.cat([inputs, (symbol + descriptor.position[t])[:, None]], 1)
        h, patches = without_cache(descriptor, inputs, t, tokens, training, kept)
        if stable:
            cls_pred = descriptor.cls_head(h)
            assert close(sequence.cls_pred[:, t], cls_pred, 1e-4)
            h = cls_pred - codewords
        q = (student.disc[t] if stable else student.disc)(h, hard)
        for name in ("logits", "weights", "embedding"):
            field = "embeddings" if name == "embedding" else name
            assert close(getattr(sequence, field)[:, t], getattr(q, name), 1e-4), name
        assert torch.equal(sequence.ids[:, t], q.ids)
        patches = patches[:, 1:] if with_cls else patches                   # (B, N)
        assert not with_cls or (patches.sum(-1) < 0.99).all()   # there was a CLS to leave out
        assert close(sequence.attention[:, t], patches / patches.sum(-1, keepdim=True))
        symbol, codewords = q.embedding, codewords + q.embedding
    assert sequence.attention.shape == (B, T, N)
    assert close(sequence.attention.sum(-1), torch.ones(B, T))
    assert (sequence.cls_pred is None) != stable


@torch.no_grad()
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("disc", list(discretize.DISCRETIZERS))
def test_hard_symbols_are_the_argmax_and_embed_gives_their_embeddings(disc, recipe):
    student, z_t = make_student("--recipe", recipe, "--disc", disc), torch.randn(64, N + 1, D)
    for training in (False, True):                                  # hard means no noise either way
        sequence = student.train(training).describe(z_t, hard=True)
        assert torch.equal(sequence.ids, sequence.logits.argmax(-1))
        assert len(sequence.ids.unique()) > 1 and sequence.attention is None
        assert torch.equal(sequence.weights, torch.eye(K)[sequence.ids])
        assert close(sequence.embeddings, student.embed(sequence.ids))


# ---- interpreter and projector -------------------------------------------------------------------

@torch.no_grad()
def test_packed_prefixes_equal_each_prefix_alone():
    student, symbols = make_student("--recipe", "paper"), torch.randn(B, T, D)
    z, encoder = student.interpret(symbols), student.interpreter
    assert student.lengths == [1, 2, 4, 8] and z.shape == (B, 4, D)
    for j, n in enumerate([1, 2, 4, 8]):
        alone = torch.cat([encoder.cls.expand(B, 1, D), symbols[:, :n] + encoder.position[:n]], 1)
        assert close(z[:, j], encoder.out(encoder.norm(transform(encoder.blocks, alone)[0][:, 0])))


@torch.no_grad()
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_prefix_does_not_depend_on_what_follows_and_order_matters(recipe):
    student, ids = make_student("--recipe", recipe), torch.randint(K, (B, T))
    ids[:, 1] = (ids[:, 0] + 1) % K
    z = lambda ids: student.interpret(student.embed(ids))                   # noqa: E731
    other = torch.cat([ids[:, :4], (ids[:, 4:] + 1) % K], 1)
    assert torch.equal(z(ids)[:, :3], z(other)[:, :3])
    assert (z(ids)[:, 3] - z(other)[:, 3]).abs().amax(-1).min() > 1e-3
    swapped = ids[:, [1, 0, *range(2, T)]]
    assert (z(ids)[:, 1:] - z(swapped)[:, 1:]).abs().amax(-1).min() > 1e-4


@torch.no_grad()
def test_projector_is_the_cosine_to_each_prototype():
    head, x = model.DINOHead(D, 10, 64), 5 * torch.randn(4, 3, D)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(x).dtype == torch.float32 and head(x).abs().max() <= 1 + 1e-6
    out = head(x)
    assert out.shape == (4, 3, 10) and head.prototypes.shape == (10, 8)     # bottleneck 64 / 8
    assert close(out, F.cosine_similarity(head.mlp(x)[..., None, :], head.prototypes, dim=-1))
    head.prototypes[7] = 3 * head.mlp(x[0, 0])
    assert out.abs().max() < 1 - 1e-6 < head(x)[0, 0, 7] <= 1 + 1e-6


def test_the_papers_teacher_projector_is_a_frozen_copy():
    student = make_student("--recipe", "paper")
    pairs = list(zip(student.projector.parameters(), student.teacher_projector.parameters()))
    assert len(pairs) == 7 and all(p.requires_grad and not q.requires_grad for p, q in pairs)
    assert torch.equal(student.projector.prototypes, student.teacher_projector.prototypes)
    assert student.projector.prototypes is not student.teacher_projector.prototypes
    z_t = torch.randn(B, N + 1, D)
    assert student.preprocess(z_t) is z_t and student.extra_loss(None, z_t, z_t) == 0
    assert student.slow_parameters() == []


# ---- sizes, and the script -----------------------------------------------------------------------

@pytest.mark.parametrize("words, heads", [("--descriptor 2x5", 5), ("--interpreter 2x3", 3)])
def test_heads_that_do_not_fit(words, heads):
    with pytest.raises(ValueError, match=f"{heads} heads do not divide the teacher's width 32"):
        model.Student(flags.parse(words.split()), D)


def test_the_script_prints_the_shapes_of_a_batch(capsys):
    """B = 16, N = 64, d = 128, P = 1024, T = 8, K = 128, D = 4."""
    model.main()
    lines = capsys.readouterr().out.splitlines()
    shapes = [re.search(r"\([\d, ]+\)$", line).group() for line in lines]
    assert shapes == ["(16, 65, 128)", "(16, 1024)", "(16, 8, 128)", "(16, 8, 128)", "(16, 8)",
                      "(16, 8, 64)", "(16, 4, 128)", "(16, 4, 1024)"]
