"""Known answers for model.py: each network of the student against a plain reimplementation that
keeps nothing, packs nothing and masks by hand. (Teachers and files: test_teacher.py.)"""
import argparse
import math

import pytest
import torch
import torch.nn.functional as F

import discretize
import model
from discretize import Discrete

B, N, D, T, K = 3, 5, 32, 8, 6


def close(a, b, tolerance=1e-5):
    return torch.allclose(a, b, atol=tolerance, rtol=0)


# ---- descriptor ----------------------------------------------------------------------------------

def attend(attention, x, source, mask=None):
    """Multi-head attention by the book, from x (B, L, d) to source (B, S, d): output, and weights
    (B, heads, L, S)."""
    split = lambda y: y.view(*y.shape[:2], attention.heads, -1)                 # noqa: E731
    (to_k, to_v), (bias_k, bias_v) = attention.to_kv.weight.chunk(2), attention.to_kv.bias.chunk(2)
    q, k, v = map(split, (attention.to_q(x), source @ to_k.T + bias_k, source @ to_v.T + bias_v))
    scores = torch.einsum("blhc,bshc->bhls", q, k) / math.sqrt(q.shape[-1])
    weights = (scores if mask is None else scores.masked_fill(~mask, -math.inf)).softmax(-1)
    return attention.out(torch.einsum("bhls,bshc->blhc", weights, v).flatten(2)), weights


def read(blocks, x, tokens=None, mask=None):
    """x through pre-norm blocks in one go, nothing kept: output, last block's cross-attention."""
    looked = None
    for block in blocks:
        h = block.norm1(x)
        x = x + attend(block.attention, h, h, mask)[0]
        if tokens is not None:
            y, looked = attend(block.cross, block.norm_cross(x), tokens)
            x = x + y
        x = x + block.mlp(block.norm2(x))
    return x, looked


def make_student(disc="softmax", draft=True, axes=0, unit_length=False, **flags):
    parser = argparse.ArgumentParser()
    discretize.add_flags(parser)
    args = argparse.Namespace(**vars(parser.parse_args([])) | flags, draft=draft)
    disc, head = discretize.build(disc, D, K, args), model.DINOHead(D, 10, 16, 8)
    student = model.Student(D, disc, head, T, descriptor=(2, 4), interpreter=(3, 2), draft=draft,
                            axes=axes, unit_length=unit_length)
    for name, p in student.named_parameters():                                  # no bias stays 0
        if p.ndim == 1 or "position" in name:
            p.data.add_(0.3 * torch.randn_like(p))
    if draft:                                                               # as if after training
        student.draft.gist.weight.data.normal_(std=0.1)
        student.interpreter.out.weight.data.normal_()
        student.draft.unit.uniform_(20, 60)
        student.draft.basis.copy_(torch.linalg.qr(torch.randn(D, D))[0][:, :axes])
        student.draft.axes.copy_(torch.linalg.qr(torch.randn(K, axes, axes))[0])
    for norm in student.descriptor.norms:
        norm.running_mean.normal_(std=0.5)
        norm.running_var.uniform_(0.5, 2)
    return student.eval()


class Forced(torch.nn.Module):
    """A discretizer that says what it is told: symbols (B, T), whatever the decoder wants."""

    def __init__(self, student, ids):
        super().__init__()
        self.inner, self.ids, self.t = student.disc, ids, 0

    def forward(self, h, hard=False, bids=None):
        ids, self.t = self.ids[:, self.t], self.t + 1
        weights = F.one_hot(ids, K).float()
        embedding, logits = weights @ self.inner.table, self.inner(h, bids=bids).logits
        return Discrete(weights, embedding, ids, h.new_zeros(()), logits)


@torch.no_grad()
@pytest.mark.parametrize("position", [0, 3, 6])
def test_what_is_said_changes_only_what_comes_later(position):
    student, tokens = make_student(), torch.randn(B, N + 1, D)
    first = torch.randint(K, (B, T))
    second = torch.cat([first[:, :position], (first[:, position:] + 1) % K], 1)
    a, b = (student.descriptor(tokens, Forced(student, ids), student.draft, attention=True)
            for ids in (first, second))
    assert torch.equal(a.drafts[:, :position], b.drafts[:, :position])
    for x, y in ((a.logits, b.logits), (a.attention, b.attention)):
        assert torch.equal(x[:, :position + 1], y[:, :position + 1])        # said before the change
        assert (x[:, position + 1:] - y[:, position + 1:]).abs().amax((0, 2)).min() > 1e-4
    assert torch.equal(a.ids, first) and torch.equal(b.ids, second)


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("hard, draft, axes", [(False, False, 0), (False, True, 0),
                                               (True, True, 0), (False, True, 3), (True, True, D)])
def test_descriptor_equals_rereading_every_prefix_without_a_cache(hard, draft, axes, training):
    student = make_student(draft=draft, axes=axes, tau=0.5, straight_through=False)
    tokens = torch.randn(B, N + 1, D)
    tokens = tokens + torch.randn(D)                                 # so that the space matters
    student.fit_space(tokens[:, 0] + 0.1 * torch.randn(2, B, D), tokens[:, 1:])
    descriptor, z_t = student.descriptor, student.space(tokens)
    kept = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in descriptor.norms]

    def normalise(x, t):
        mean, var = (x.mean(0), x.var(0, False)) if training else kept[t]
        return (x - mean) / (var + 1e-5).sqrt()

    said = student.train(training).describe(tokens, hard, attention=True)
    gist = torch.zeros(B, D)
    unit, centres = (student.draft.unit, student.draft.centres) if draft else (None, None)
    read_so_far, bids, turns = torch.zeros(B, D), None, torch.eye(D).expand(B, D, D)
    if draft:
        z_t = z_t[:, 1:]                                    # it must not see the CLS
    else:
        z_t[:, 0] += descriptor.cls_mark
    inputs, symbol = torch.zeros(B, 0, D), descriptor.start.expand(B, 1, D)
    for t in range(T):
        shown = student.draft.show(gist - read_so_far)[:, None] if draft else 0
        inputs = torch.cat([inputs, symbol + descriptor.position[t] + shown], 1)
        causal = torch.ones(t + 1, t + 1, dtype=torch.bool).tril()
        x, looked = read(descriptor.blocks, inputs, z_t, causal)
        h = normalise(x[:, -1], t)
        if draft:
            gist = student.draft.gist(h)
            left = torch.einsum("bd,bde->be", gist - read_so_far, turns)
            square = torch.cdist(left, centres[t]).square()
            bids = left.square().sum(-1, keepdim=True) / unit[t] - square / unit[t]
        choice = student.disc(h, hard, bids)
        assert close(said.logits[:, t], choice.logits, 1e-3)
        assert torch.equal(said.ids[:, t], choice.ids)
        assert close(said.weights[:, t], choice.weights, 1e-3)
        assert close(said.embeddings[:, t], choice.embedding, 1e-3)
        patches = looked[:, :, -1, 0 if draft else 1:].mean(1)  # mean of heads: (B, N)
        assert close(said.attention[:, t], patches / patches.sum(-1, keepdim=True))
        symbol = choice.embedding[:, None]
        if draft:
            word = choice.weights @ centres[t]
            read_so_far = read_so_far + torch.einsum("be,bde->bd", word, turns)
            if t == 0 and axes:                 # the first symbol's axes, back in the space
                basis = student.draft.basis
                turns = basis @ student.draft.axes[choice.ids] @ basis.T
        assert close(said.gists[:, t], gist, 1e-3) and close(said.drafts[:, t], read_so_far, 1e-3)
    assert said.attention.shape == (B, T, N) and close(said.attention.sum(-1), torch.ones(B, T))
    if not draft:
        assert (looked[:, :, -1, 1:].mean(1).sum(-1) < 0.99).all()    # there was a CLS to leave out


@torch.no_grad()
@pytest.mark.parametrize("disc", list(discretize.DISCRETIZERS))
def test_hard_symbols_are_the_argmax_and_their_embeddings_rows_of_the_table(disc):
    student, tokens = make_student(disc), torch.randn(64, N + 1, D)
    for training in (False, True):                                  # hard means no noise either way
        said = student.train(training).describe(tokens, hard=True)
        assert torch.equal(said.ids, said.logits.argmax(-1)) and len(said.ids.unique()) > 1
        assert torch.equal(said.weights, torch.eye(K)[said.ids])
        assert close(said.embeddings, student.disc.table[said.ids])
        assert said.attention is None


# ---- interpreter, standardisation, projectors ----------------------------------------------------

@torch.no_grad()
def test_packed_prefixes_equal_each_prefix_read_alone():
    student, symbols, drafts = make_student(), torch.randn(B, T, D), torch.randn(B, T, D)
    z, reader = student.interpret(symbols, drafts), student.interpreter
    assert student.lengths == [1, 2, 4, 8] and z.shape == (B, 4, D)
    for j, n in enumerate([1, 2, 4, 8]):
        alone = torch.cat([reader.cls.expand(B, 1, D), symbols[:, :n] + reader.position[:n]], 1)
        corrections = reader.out(reader.norm(read(reader.blocks, alone)[0][:, 0]))
        assert close(z[:, j], corrections + drafts[:, n - 1])
    plain = make_student(draft=False)
    assert torch.equal(plain.interpret(symbols, drafts), plain.interpreter(symbols))


@torch.no_grad()
def test_the_draft_starts_as_residual_k_means():
    """Planted: 4 far corners, each with the same 4 near corners around it: two symbols say it
    all."""
    far, near = 10 * torch.eye(D)[:4], torch.eye(D)[4:8]
    cls = (far[:, None] + near).flatten(0, 1).repeat(5, 1) + 1e-4 * torch.randn(80, D)
    best = 1e9
    for _ in range(20):                                     # k-means may start badly
        draft = model.Draft(D, 2, 4)
        draft.fit(cls, cls)
        left, symbols = cls, []
        for t in range(2):
            symbols.append(draft.bids(left, t, None).argmax(1))
            left = left - draft.centres[t][symbols[-1]]
        read = draft(torch.stack(symbols, 1))               # (80, 2, d)
        assert close(read[:, 1], cls - left)
        assert close(read[:, 0], draft.word(torch.eye(4)[symbols[0]], 0, None))
        best = min(best, left.abs().max().item())
        assert abs(torch.cdist(cls, draft.centres[0]).square().std() / draft.unit[0] - 1) < 1e-3
    assert best < 1e-2


@torch.no_grad()
def test_the_first_symbol_is_a_centre_of_what_lies_near():
    """Planted: pictures of two kinds, a fifth of which stray; half way to what is near they are two
    kinds."""
    kinds, strays = 4 * torch.eye(D)[:2].repeat(40, 1), torch.zeros(80, D)
    strays[::5] = 6 * torch.eye(D)[3]
    draft, errors = model.Draft(D, 2, 2), []
    for _ in range(40):                                     # k-means may start badly
        draft.fit(kinds + strays, kinds - strays)           # half way between them: the kinds
        read = [torch.cdist(planted, found).min(1).values
                for planted, found in zip((kinds, strays), draft.centres)]
        errors.append([x.max().item() for x in read])
    # the second: who strays
    assert min((second for first, second in errors if first < 1e-4), default=1) < 1e-4


@torch.no_grad()
def test_later_symbols_in_the_axes_of_the_first():
    """Planted: two kinds, and what a third of each has more of is another thing in each."""
    kind, more = torch.arange(400) % 2, torch.where(torch.arange(400) % 3 == 0, 2.0, -1.0)
    cls = torch.eye(D)[kind] * 10 + torch.eye(D)[kind + 2] * more[:, None]
    cls = cls + 1e-3 * torch.randn(400, D)
    errors = {0: [], 4: []}
    for axes, found in errors.items():
        for _ in range(20):                                 # k-means may start badly
            draft = model.Draft(D, 2, 2, axes)
            draft.fit(cls, cls, 100)
            first = draft.bids(cls, 0, None).argmax(1)
            left = cls - draft.word(torch.eye(2)[first], 0, None)
            second = draft.bids(left, 1, first).argmax(1)
            read = draft(torch.stack([first, second], 1))
            word = draft.word(torch.eye(2)[second], 1, first)
            assert close(read[:, 1] - read[:, 0], word)
            assert close(draft.turn(draft.turn(word, first), first, back=True), word)
            found.append((read[:, 1] - cls).square().sum(1).mean().item())
    assert min(errors[4]) < 1e-3 < 0.5 < min(errors[0])


def test_centres_in_the_order_of_others_that_point_the_same_way():
    meant = torch.randn(20, D)
    shuffled = torch.randperm(20)
    scaled = meant * torch.linspace(0.1, 9, 20)[:, None] + 0.01 * torch.randn(20, D)
    assert torch.equal(model.ordered_like(meant, scaled[shuffled]), scaled)
    tied = torch.eye(D)[:1].expand(4, -1)    # all alike, or nothing at all: each once, all the same
    for others in (tied, 0 * tied, torch.randn(4, D)):
        assert torch.equal(model.ordered_like(tied, others).sort(0).values, others.sort(0).values)


@torch.no_grad()
def test_a_symbol_points_the_same_way_at_every_place():
    """Planted: four directions; the first symbol says which, the second which other is there
    too."""
    axes = torch.eye(D)[:4]
    cls = (5 * axes[:, None] + axes).flatten(0, 1).repeat(5, 1) + 1e-4 * torch.randn(80, D)
    same = 0
    for _ in range(20):                                     # k-means may start badly
        draft = model.Draft(D, 2, 4)
        draft.fit(cls, cls)
        cosine = F.normalize(draft.centres, dim=2)
        same = max(same, (cosine[0] * cosine[1]).sum(1).min().item())
    assert same > 0.5                                # of pairs that do not belong together: below 0


def test_neighbour_means_leave_a_picture_itself_out():
    y = torch.tensor([[0.0], [1], [3], [7], [1000]])
    assert torch.equal(model.neighbour_means(y, 2), torch.tensor([[2.0], [1.5], [0.5], [2], [5]]))


@torch.no_grad()
def test_a_prefix_does_not_know_what_follows():
    student, symbols = make_student(), torch.randint(K, (B, T))
    other = torch.cat([symbols[:, :4], (symbols[:, 4:] + 1) % K], 1)
    a, b = student.read(symbols), student.read(other)
    assert torch.equal(a[:, :3], b[:, :3])
    assert (a[:, 3] - b[:, 3]).abs().amax(-1).min() > 1e-3
    symbols[:, 1] = (symbols[:, 0] + 1) % K
    a, swapped = student.read(symbols), symbols[:, [1, 0, *range(2, T)]]        # order matters
    assert (a[:, 1:] - student.read(swapped)[:, 1:]).abs().amax(-1).min() > 1e-4


def test_space_whitens_what_augmentation_moves():
    """Planted: pictures differ in all dimensions, views in the first half ten times as much as in
    the second."""
    moves = torch.cat([torch.full((D // 2,), 1.0), torch.full((D // 2,), 0.1)])
    picture = 5 + 3 * torch.randn(4000, 1, D)
    cls = picture + moves * torch.randn(2, 4000, 1, D)
    patches = torch.randn(2, 4000, N, D) * torch.linspace(0.1, 9, D) - 2
    student = make_student()
    student.fit_space(cls[:, :, 0], patches.flatten(0, 1), ridge=0)
    out = student.space(torch.cat([cls, patches], 2).flatten(0, 1))
    within = (out[:4000, 0] - out[4000:, 0]).std(0)
    assert (within / within.mean() - 1).abs().max() < 0.1               # all directions move alike
    lasting = (out[:4000, 0] + out[4000:, 0]).std(0)
    # and the quiet ones count
    assert abs(lasting[D // 2:].mean() / lasting[:D // 2].mean() - 10) < 1
    assert close(out[:, 0].mean(0), torch.zeros(D), 1e-4)
    assert close(out[:, 0].square().mean(), torch.tensor(1.0))
    assert close(out[:, 1:].mean((0, 1)), torch.zeros(D), 1e-4)
    assert close(out[:, 1:].std((0, 1)), torch.ones(D), 1e-3)


def test_neighbours_draw_together():
    """Four classes that differ in two directions, and noise as large in all others."""
    student, classes = make_student(), torch.arange(800) % 4
    y = 0.5 * torch.randn(800, D)
    y[:, 0] = classes % 2 * 2 - 1 + 0.1 * torch.randn(800)
    y[:, 1] = classes // 2 * 2 - 1 + 0.1 * torch.randn(800)
    tokens = torch.cat([y[:, None], torch.zeros(800, N, D)], 1)
    after = student.draw_together(y, 20)
    assert close(student.space(tokens)[:, 0], after, 1e-4)          # later pictures go the same way
    # mean square 1 about the mean
    assert close(after.var(0, False).sum(), torch.tensor(float(D)), 0.01 * D)

    def within(x):                                                          # share of the variance
        centres = torch.stack([x[classes == c].mean(0) for c in range(4)])
        return ((x - centres[classes]).square().sum() / (x - x.mean(0)).square().sum()).item()
    assert within(after) < 0.7 * within(y)
    near = torch.cdist(y, y).fill_diagonal_(math.inf).topk(20, largest=False).indices
    apart = after - after[near].mean(1)  # alike in all directions, but for the ridge
    before = y - y[near].mean(1)
    assert torch.linalg.cond(apart.T @ apart) < 0.2 * torch.linalg.cond(before.T @ before)


def test_projection_keeps_the_loudest_directions():
    """Planted: pictures differ in three directions more than in the others, about a mean that is
    far away."""
    student, axes = make_student(), torch.linalg.qr(torch.randn(D, D)).Q
    loud = torch.cat([torch.tensor([3.0, 2.0, 1.0]), torch.full((D - 3,), 0.1)])
    mean, y = 4 * axes[-1], torch.randn(5000, D) * loud @ axes.T
    after = student.project(mean + y, 3)
    tokens = torch.cat([(mean + y)[:, None], torch.zeros(5000, N, D)], 1)
    assert close(student.space(tokens)[:, 0], after, 1e-4)
    kept = y @ axes[:, :3] @ axes[:, :3].T
    kept = kept / kept.square().mean().sqrt()                   # mean square 1 about the mean
    assert torch.linalg.matrix_rank(student.whiten, rtol=1e-4) == 3
    assert (after - after.mean(0) - kept).square().mean() < 1e-3


def test_unit_length_leaves_directions():
    """Planted: pictures of lengths from 1 to 50, the longest of them along one axis, which as
    directions is one of few; those of all others differ in three."""
    student = make_student(unit_length=True)
    y = torch.zeros(2000, D)
    y[:, :3] = torch.randn(2000, 3)
    y[:20, 3:4] = 500.0
    y = y * torch.linspace(1, 50, 2000)[torch.randperm(2000)][:, None]
    after = student.lengthen(student.project(y, 3))
    tokens = torch.cat([y[:, None], torch.zeros(2000, N, D)], 1)
    assert close(student.space(tokens)[:, 0], after, 1e-4)          # later pictures go the same way
    assert close(after.square().mean(1), torch.ones(2000), 1e-4)
    cosine = torch.nn.functional.cosine_similarity(after[20:], y[20:])
    assert cosine.min() > 0.99                                      # the three, not the longest


def test_space_of_views_that_do_not_move():
    student, tokens = make_student(), torch.randn(20, N + 1, D)
    student.fit_space(tokens[:, 0].expand(2, -1, -1), tokens[:, 1:])
    assert student.space(tokens).isfinite().all()



@torch.no_grad()
def test_projector_is_the_cosine_to_each_prototype():
    head, x = model.DINOHead(D, 10, 16, 8), 5 * torch.randn(4, 3, D)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(x).dtype == torch.float32 and head(x).abs().max() <= 1 + 1e-6
    out = head(x)
    assert out.shape == (4, 3, 10)
    assert close(out, F.cosine_similarity(head.mlp(x)[..., None, :], head.prototypes, dim=-1))
    head.prototypes[7] = 3 * head.mlp(x[0, 0])
    assert out.abs().max() < 0.99 < 1 - 1e-6 < head(x)[0, 0, 7] <= 1 + 1e-6


def test_anchors_are_the_planted_clusters():
    # from any two, Lloyd ends in these
    x = torch.tensor([[3.0, 0], [3.2, 0.2], [-2, 1], [-2, -1], [-2.3, 0]])
    anchors = model.Anchors(2, 2)
    anchors.fit(x)
    c = torch.stack([x[:2].mean(0), x[2:].mean(0)])
    c = c if close(anchors.centres[0], c[0]) else c.flip(0)             # in any order
    assert close(anchors.centres, c)
    assert close(anchors(x), x @ c.T / ((c[0] @ c[0] + c[1] @ c[1]) / 2))
    own = anchors(x).max(1).values                              # about 1 on average, as a cosine
    assert close(own.mean(), torch.tensor(1.0), 0.1) and (anchors(x).min(1).values < 0).all()


def test_more_anchors_than_pictures():
    with pytest.raises(ValueError, match="--prototypes 4 is more than the 3 pictures"):
        model.Anchors(2, 4).fit(torch.randn(3, 2))


@pytest.mark.parametrize("length, descriptor, interpreter, words", [
    (6, (1, 4), (1, 4), "--length must be a power of two"),
    (0, (1, 4), (1, 4), "--length must be a power of two"),
    (8, (1, 5), (1, 4), "--descriptor-heads 5 does not divide"),
    (8, (1, 4), (1, 3), "--interpreter-heads 3 does not divide")])
def test_sizes_that_do_not_fit(length, descriptor, interpreter, words):
    with pytest.raises(ValueError, match=words):
        model.Student(D, None, None, length, descriptor, interpreter)
