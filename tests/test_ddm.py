"""extras/ddm.py: L_var and the outlier rule by hand, a critic that finds domains, an encoder step
that takes them away, and a whole run."""
import json
import math

import pytest
import torch

import data
from extras import benchmark, ddm, pretrain
from test_pretrain import TINY


@pytest.fixture(autouse=True)
def images(monkeypatch):
    """120 of 8 x 8 pixels in three classes; the test split has 40."""
    sets = {split: data.ImageSet(torch.randint(256, (n, 3, 8, 8), dtype=torch.uint8),
                                 torch.arange(n) % 3, list("abc"))
            for split, n in (("train", 120), ("test", 40))}
    monkeypatch.setattr(data, "load", lambda name, split, *rest: sets[split])
    monkeypatch.setitem(benchmark.PRODUCT_SIDE, "cpu", 64)
    return sets


def parse(out, *words):
    return pretrain.parse([*TINY, "--stem", "--out", str(out), *words], ddm.__doc__, ddm.own_flags)


def make(tmp_path, sets, *words):
    args = parse(tmp_path, *words)
    return ddm.DDMPretrainer(args, ddm.domains(sets["train"], args.domains, 0))


# ---- images --------------------------------------------------------------------------------------

def test_tinted_images_are_red_or_green_and_as_bright_as_grey_ones(images):
    grey, tinted = (ddm.domains(images["train"], tint, 0) for tint in ("grey", "tinted"))
    domain, x = tinted.factors["domain"], tinted.images
    luma = (images["train"].images * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    assert torch.equal(grey.images[:, 0], luma.round().byte())
    for i in range(120):
        assert torch.equal(x[i, domain[i]], grey.images[i, 0])
        assert not x[i, 1 - domain[i]].any() and not x[i, 2].any()
    assert 40 < domain.sum() < 80 and ddm.domains(images["train"], "none", 0) is images["train"]
    again = ddm.domains(images["train"], "tinted", 0)
    assert torch.equal(again.images, x) and torch.equal(tinted.labels, images["train"].labels)
    assert torch.equal(tinted.subset(torch.tensor([5])).factors["domain"], domain[5:6])


# ---- terms ---------------------------------------------------------------------------------------

def test_the_prefix_term_by_hand():
    """Directions 0, 90 and 180 degrees; domains a, a, b; tau 1. The image of b has no other."""
    h = torch.tensor([[2.0, 0.0], [0.0, 0.5], [-3.0, 0.0]], requires_grad=True)
    terms = ddm.prefix_terms(h, torch.tensor([0, 0, 1]), 1.0)
    assert torch.allclose(terms, torch.tensor([0.0 - -1.0, 0.0 - 0.0]))
    terms.sum().backward()
    assert h.grad.isfinite().all()
    assert len(ddm.prefix_terms(h, torch.tensor([0, 0, 0]), 1.0)) == 0     # no other domain


def test_the_prefix_term_sums_over_images():
    """Two images of each domain, all in one direction: log(e^10 / 2 e^10)."""
    terms = ddm.prefix_terms(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]), 0.1)
    assert torch.allclose(terms, torch.full((4,), -math.log(2)), atol=1e-5)


def test_the_outlier_rule_on_three_points():
    """Centroids 0 and 10 (a third at 100 changes nothing): squared distances 1/81, 16/36, 25/25."""
    x, c = torch.tensor([[1.0], [4.0], [5.0]]), torch.tensor([[0.0], [10.0], [100.0]])
    distances = torch.cdist(x, c).square()
    assert ddm.reliable(distances, 1.0).tolist() == [True, True, False]
    assert ddm.reliable(distances, 1.3).tolist() == [True, False, False]
    assert ddm.reliable(distances, 0.0).tolist() == [True, True, False]     # 5 is equidistant


def test_purity_by_hand():
    assert ddm.purity(torch.tensor([0, 0, 0, 1]), torch.tensor([1, 1, 0, 0])) == 0.75


# ---- critic and encoder --------------------------------------------------------------------------

def planted(n=256):
    """h^p (n, 15) whose first column is the domain, and the domains."""
    y = torch.arange(n) % 2
    h = torch.randn(n, 15)
    h[:, 0] = 2.0 * y - 1
    return h, y


def trained_critic(trainer, h, y, steps=60):
    trainer.args.ddm_steps = steps
    trainer.train_critic(h, y)
    y_rand = y[torch.randperm(len(y))]
    return trainer.critic.gap(h, y, y_rand).mean().item()


def test_the_critic_finds_planted_domains_and_no_random_ones(tmp_path, images):
    trainer = make(tmp_path, images, "--ddm", "labels")
    trainer.critic = ddm.Critic(15, 2)
    trainer.critic_optimizer = torch.optim.Adam(trainer.critic.layers.parameters())
    h, y = planted()
    found = trained_critic(trainer, h, y)
    noise, labels = torch.randn(4096, 15), torch.randint(2, (4096,))
    y_rand = labels[torch.randperm(4096)]
    nothing = trainer.critic.gap(noise, labels, y_rand).mean().item()
    # a slope of 1 gains at most sqrt(2), the distance of two labels, in the half where they differ
    assert 0.25 < found < 0.9
    assert abs(nothing) < 0.1
    assert trainer.critic.penalty(h, y, y.flip(0)) < 0.1            # the gradient's norm is near 1


def test_the_penalty_is_that_of_the_finite_difference():
    """With y = y_rand the point between the two is the image itself; D is piecewise linear."""
    critic, h, y = ddm.Critic(5, 2).double(), torch.randn(1, 5).double(), torch.tensor([1])
    x = torch.cat([h, torch.tensor([[0.0, 1.0]]).double()], 1)
    gradient = (critic(x + 1e-6 * torch.eye(7).double()) - critic(x)) / 1e-6            # (7,)
    penalty = critic.penalty(h, y, y)
    assert penalty.item() == pytest.approx((gradient.norm().item() - 1) ** 2, abs=1e-6)
    penalty.backward()
    assert critic.layers[0].weight.grad.abs().max() > 0


def test_an_encoder_step_lowers_the_gap(tmp_path, images):
    trainer = make(tmp_path, images, "--ddm", "labels")
    trainer.critic = ddm.Critic(15, 2)
    trainer.critic_optimizer = torch.optim.Adam(trainer.critic.layers.parameters())
    x, y = planted()
    trained_critic(trainer, x, y)
    encoder, y_rand = torch.nn.Linear(15, 15), y[torch.randperm(len(y))]
    with torch.no_grad():
        encoder.weight.copy_(torch.eye(15))
    gaps = []
    for _ in range(2):
        gaps.append(trainer.critic.gap(encoder(x), y, y_rand).mean())
        gradient, = torch.autograd.grad(gaps[-1], encoder.weight)
        with torch.no_grad():
            encoder.weight -= gradient
    assert gaps[1] < gaps[0] - 0.01
    assert gradient[:, 0].norm() > 3 * gradient[:, 1:].norm(dim=0).max()    # of the domain's column


def test_the_objective_is_the_sum_of_its_terms(tmp_path, images, monkeypatch):
    trainer = make(tmp_path, images, "--ddm", "labels", "--ddm-lambda", "0.25")
    cls, loss = torch.randn(4, 20, 64), torch.tensor(3.0)           # two local views do not count
    trainer.y = torch.arange(20) % 2
    monkeypatch.setattr(trainer, "train_critic", lambda content, y: None)
    h, y = cls[:2].flatten(0, 1), trainer.y.repeat(2)
    torch.manual_seed(2)
    total = trainer.objective(loss, cls)
    torch.manual_seed(2)
    gap = trainer.critic.gap(h[:, 4:], y, y[torch.randperm(40)]).mean()
    prefix = ddm.prefix_terms(h[:, :4], y, 0.1).mean()
    assert torch.allclose(total, 0.25 * loss - prefix + gap)
    trainer.y = torch.full((20,), -1)
    assert trainer.objective(loss, cls) == loss                     # no image counts
    assert make(tmp_path, images).objective(loss, cls) == loss      # without --ddm


def test_the_projector_does_not_see_the_prefix(tmp_path, images):
    trainer = make(tmp_path, images, "--ddm", "labels", "--ddm-k", "5")
    assert trainer.student["head"].mlp[0].in_features == 64 - 5
    assert make(tmp_path, images).student["head"].mlp[0].in_features == 64
    strength = trainer.augment.strength
    assert strength[2:] == (0, 0) and strength[0] > 0 and trainer.augment.grey == 0


# ---- runs ----------------------------------------------------------------------------------------

def test_a_step_without_ddm_is_that_of_pretrain(tmp_path, images):
    """To the bit, with the same augmentation."""
    steps = []
    for cls in (ddm.DDMPretrainer, pretrain.Pretrainer):
        torch.manual_seed(0)
        trainer = cls(parse(tmp_path, "--domains", "none"), images["train"])
        trainer.augment = trainer.augment.__class__(grey=0)
        torch.manual_seed(1)
        for x in trainer.batches(3):
            trainer.train_step(x)
        steps.append(torch.cat([p.flatten() for p in trainer.student.parameters()]))
    assert torch.equal(*steps)


@pytest.mark.parametrize("method", ["labels", "pseudo"])
def test_a_run_writes_its_record_and_resumes(tmp_path, method, monkeypatch):
    """A run that stops and resumes ends as one that does not."""
    def main(out, *words):
        monkeypatch.setattr("sys.argv", ["ddm", *TINY, "--stem", "--ddm", method, "--ddm-steps",
                                         "1", "--out", str(out), *words])
        ddm.main()
        return json.loads((out / "ddm.json").read_text())
    record = main(tmp_path / "a")
    assert record["step"] == 10 and (record["domains"], record["ddm"]) == ("tinted", method)
    scores = [record[f"{target}_top1_{part}"] for target in ("class", "domain")
              for part in ("h", "content", "prefix")]
    assert all(0 <= score <= 100 for score in scores)
    main(tmp_path / "b", "--stop", "1.2")
    assert main(tmp_path / "b", "--resume") == record
    a, b = (torch.load(tmp_path / x / "ckpt.pt", weights_only=True) for x in "ab")
    for part in ("student", "critic"):
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part]
                   if torch.is_tensor(a[part][name])), part
    assert (-1 in a["critic"]["domain"]) <= (method == "pseudo")


def test_pseudo_domains_are_clusters_of_h(tmp_path, images, monkeypatch):
    """Two far groups of planted features, one point between them, which counts only at the end."""
    trainer = make(tmp_path, images, "--ddm", "pseudo", "--ddm-warm-up", "0")
    n = len(trainer.images)
    h = torch.cat([torch.zeros(60, 4), torch.full((59, 4), 10.0), torch.full((1, 4), 6.0)])
    h += 0.1 * torch.randn(n, 4)
    monkeypatch.setattr(pretrain, "features", lambda *_: h)
    trainer.recluster()                                             # step 0: a ratio above 2
    y = trainer.critic.domain
    assert len(y[:60].unique()) == len(y[60:119].unique()) == 1 and y[0] != y[60]
    assert y[0] >= 0 and y[60] >= 0


@pytest.mark.parametrize("words, message", [
    (["--ddm", "labels", "--domains", "grey"], "needs domains"), ([], None)])
def test_user_errors(tmp_path, images, words, message):
    if message:
        with pytest.raises(ValueError, match=message):
            make(tmp_path, images, *words)
    streamed = data.ImageSet(None, torch.zeros(3), [])
    with pytest.raises(ValueError, match="in memory"):
        ddm.domains(streamed, "tinted", 0)
