"""Which images does a representation describe well? Q-Score and its regulariser; a JSON record.

    python -m extras.qscore RUN/ckpt.pt --json qscore.json
    python -m extras.qscore RUN/ckpt.pt --q-l1 1e-4 --q-l2 1e-4     # fine-tunes, with and without

After chapter 3 of Kalibhat's dissertation. h_i (r,) is an image's representation, L2-normalised,
mu_i and sigma_i are the mean and standard deviation over its r features:

    L_i = {j: h_ij > mu_i + eps sigma_i}                    highly active features (section 3.3)
    A_j = 100 / N sum_i [j in L_i]                          percent, on training images
    D   = features with A from its 50th to its 95th percentile          discriminative (3.3.1)
    Q_i = mean over j in L_i and D of (h_ij - mu_i)         (equation 3.1); 0 where there is none
    regulariser: minimise  -l1 mean_i [Q_i < mean Q] Q_i                (equation 3.3)
                           + l2 sum_k [|H_k|_1 > mean |H|_1] |H_k|_1    over columns k of a batch H

The source is about ReLU features of ResNets. Here h is the soft symbol bag, the mean over positions
of softmax(logits), of K features (eps = 4); relu(z_s) (eps = 3); and z_s itself (eps = 2), a
negative control. No label is used but to score: the AUROC of Q for a linear probe of h being right
on test images, beside that of 20 random sets D of equal size, and the probe's accuracy on 80, 60
and 40 % of the features, those with A from the (95 - size)th to the 95th percentile, beside random
ones. Sizes above 45 % and the empty intersection are our choice, because the source has none.
"""
import argparse

import torch
import torch.nn.functional as F

import checkpoint
import discretize
import scoring
from extras import extract as reader
from progress import Progress

EPSILON = {"bag": 4.0, "relu_z": 3.0, "z": 2.0}
RANDOM_SETS, RANDOM_PROBES = 20, 3
SIZES = (0.8, 0.6, 0.4)
LOW, HIGH = 0.5, 0.95               # percentiles of A between which features are discriminative
LR = 1e-5                           # of the fine-tuning (section 3.4.1)


# ---- the score (sections 3.3, 3.4) ---------------------------------------------------------------

def active(h, epsilon):
    """h (n, r), L2-normalised -> L (n, r) bool."""
    return h > h.mean(1, keepdim=True) + epsilon * h.std(1, correction=0, keepdim=True)


def frequency(h, epsilon):
    """h (n, r) -> A (r,) in percent."""
    return 100 * active(h, epsilon).float().mean(0)


def middle(a, low=LOW, high=HIGH):
    """A (r,) -> D (r,) bool: the features whose rank is between the two percentiles. Equal A are
    ordered by feature number."""
    rank = (a.argsort(stable=True).argsort().float() + 0.5) / len(a)
    return (rank > low) & (rank <= high)


def q_score(h, discriminative, epsilon):
    """h (n, r), D (r,) bool -> Q (n,), 0 where L_i and D have nothing in common."""
    chosen = (active(h, epsilon) & discriminative).float()
    return (chosen * (h - h.mean(1, keepdim=True))).sum(1) / chosen.sum(1).clamp(min=1)


def regulariser(h, discriminative, epsilon, l1, l2):
    """What equation 3.3 adds, as a loss: h (B, r), L2-normalised -> (). The sets L, D and those of
    the two thresholds (batch means) are constants in the backward pass (our choice)."""
    q, columns = q_score(h, discriminative, epsilon), h.abs().sum(0)
    return (l2 * (columns * (columns > columns.mean())).sum()
            - l1 * (q * (q < q.mean())).mean())


def soft_bag(probs):
    """(n, T, K) softmax of the discretizer's logits -> (n, K), L2-normalised."""
    return F.normalize(probs.mean(1), dim=1)


# ---- fine-tuning with the regulariser (section 3.4) ----------------------------------------------

def fine_tune(model, images, discriminative, l1, l2):
    """One epoch of train.py at the learning rate 1e-5 from the checkpoint, with the regulariser of
    the soft bag in Student.extra_loss -> the student, in eval mode."""
    import train                            # only here: it draws figures and evaluates too
    config, teacher, student = model
    args = argparse.Namespace(**config | {"lr": LR, "epochs": 1,
                                          "device": str(next(student.parameters()).device)})
    student.requires_grad_(True)
    student.teacher_projector.requires_grad_(False)
    own_loss = student.extra_loss

    def extra_loss(sequence, z_s, z_t):
        h = soft_bag(sequence.logits.float().softmax(-1))
        return own_loss(sequence, z_s, z_t) + regulariser(h, discriminative.to(h.device),
                                                       EPSILON["bag"], l1, l2)
    student.extra_loss = extra_loss
    for disc in student.modules():
        if isinstance(disc, discretize.Discretizer):
            disc.start_tau = disc.final_tau                     # the checkpoint is annealed already
    trainer = train.Trainer(args, teacher, student, images)
    batches = trainer.tokens.batches(0, 0, trainer.steps_per_epoch)
    with Progress("fine-tuning, step", trainer.steps) as progress:
        for step, z_t in enumerate(batches):
            student.train()
            trainer.step(z_t, step)
            progress.update()
    return student.eval().requires_grad_(False)


# ---- a checkpoint: all figures, and the report ---------------------------------------------------

def probe_hits(x, y, test_x, test_y, grid=scoring.L2_GRID):
    """-> the test images (m,) bool that a linear probe gets right, and its weight decay."""
    probe, l2 = scoring.fit_probe(x, y, int(y.max()) + 1, grid)
    return probe(test_x).argmax(1) == test_y, l2


def top1(*data):
    """`probe_hits`' share in %."""
    return 100 * probe_hits(*data)[0].float().mean().item()


def size_figures(x, y, test_x, test_y, a, l2):
    """Linear probe top-1 (%) of features chosen by A (r,) and of random ones, for each of SIZES.
    All have the weight decay l2, that of the probe of all features, because 36 searches take
    minutes."""
    rows = {}
    for size in SIZES:
        chosen = middle(a, HIGH - size)
        randoms = (torch.randperm(len(a))[:chosen.sum()] for _ in range(RANDOM_PROBES))
        own, *others = (top1(x[:, c], y, test_x[:, c], test_y, (l2,)) for c in (chosen, *randoms))
        rows[str(size)] = {"features": int(chosen.sum()), "discriminative": own,
                           "random": sum(others) / len(others), "random_each": others}
    return rows


def measure_features(x, y, test_x, test_y, epsilon):
    """Everything about one representation: x (n, r), test_x (m, r), L2-normalised."""
    a = frequency(x, epsilon)
    chosen = middle(a)
    right, l2 = probe_hits(x, y, test_x, test_y)

    def figure(discriminative):
        q = q_score(test_x, discriminative, epsilon)
        return reader.auroc_interval(q[right], q[~right])

    if right.all() or not right.any():
        raise ValueError(f"the probe is right on {right.sum()} of {len(right)} test images, so "
                         "Q cannot be scored; take more --test-images")
    randoms = torch.tensor([figure(chosen[torch.randperm(len(a))])["auroc"]
                            for _ in range(RANDOM_SETS)])
    l = active(test_x, epsilon)
    return {"epsilon": epsilon, "features": len(a), "discriminative": int(chosen.sum()),
            "a_percentiles_5_50_95": a.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist(),
            "probe_accuracy": 100 * right.float().mean().item(), "weight_decay": l2,
            "active_per_image": l.sum(1).float().mean().item(),
            "empty_share": (~(l & chosen).any(1)).float().mean().item(), **figure(chosen),
            "random_mean": randoms.mean().item(),
            "random_95th_percentile": randoms.quantile(0.95).item(),
            "sizes": size_figures(x, y, test_x, test_y, a, l2)}


def representations(part):
    """-> {name: (n, r)}, L2-normalised. part: of extract.extract."""
    z = part["z"][:, -1]
    return {"bag": soft_bag(part["probs"]), "relu_z": F.normalize(z.relu(), dim=1),
            "z": F.normalize(z, dim=1)}


def measure(args, model, sets, name):
    """-> the figures of the record."""
    size = model[0]["image_size"]
    train, test = (reader.extract_set(*model[1:], part, size) for part in sets)
    y, test_y = train["labels"], test["labels"]
    h, test_h = representations(train), representations(test)
    figures = {"variants": {key: measure_features(h[key], y, test_h[key], test_y, epsilon)
                            for key, epsilon in EPSILON.items()}}
    if args.q_l1 or args.q_l2:
        chosen = middle(frequency(h["bag"], EPSILON["bag"]))
        figures["fine_tuning"] = {"before": tuned_figures(h, y, test_h, test_y, chosen)}
        for arm, weights in (("without", (0.0, 0.0)), ("with", (args.q_l1, args.q_l2))):
            torch.manual_seed(args.seed)
            fresh = checkpoint.load_model(args.checkpoint, args.device)
            student = fine_tune(fresh, sets[0], chosen, *weights)
            again = [representations(reader.extract_set(model[1], student, part, size))
                     for part in sets]
            figures["fine_tuning"][arm] = tuned_figures(again[0], y, again[1], test_y, chosen)
    return figures


def tuned_figures(h, y, test_h, test_y, chosen):
    """Linear probe top-1 (%) of bag and z_s, and what the regulariser acts on."""
    q = q_score(test_h["bag"], chosen, EPSILON["bag"])
    return {"bag": top1(h["bag"], y, test_h["bag"], test_y),
            "z": top1(h["z"], y, test_h["z"], test_y), "mean_q": q.mean().item()}


def print_figures(args, figures):
    print(f"{'':8}{'probe, %':>9}{'no Q, %':>9}{'AUROC of Q':>12}{'random D':>10}{'95th pct.':>11}"
          "   probe on 80, 60, 40 % of features (random)")
    for name, row in figures["variants"].items():
        sizes = "  ".join(f"{row['sizes'][str(s)]['discriminative']:.1f} "
                          f"({row['sizes'][str(s)]['random']:.1f})" for s in SIZES)
        print(f"{name:8}{row['probe_accuracy']:9.1f}{100 * row['empty_share']:9.1f}"
              f"{row['auroc']:12.3f}{row['random_mean']:10.3f}{row['random_95th_percentile']:11.3f}"
              f"   {sizes}")
    for arm, row in figures.get("fine_tuning", {}).items():
        print(f"fine-tuning, {arm}: probe of bag {row['bag']:.2f} %, of z_s {row['z']:.2f} %, mean "
              f"Q {row['mean_q']:.4f}")


def main(argv=None):
    parser = reader.parser("qscore", __doc__)
    add = parser.add_argument
    add("--q-l1", type=float, default=0.0, help="weight of Q in the regulariser; the source: 1e-4. "
        "Above 0: also fine-tunes for an epoch, with and without")
    add("--q-l2", type=float, default=0.0, help="weight of the columns' norms; the source: 1e-4")
    reader.main(parser, argv, measure, print_figures)


if __name__ == "__main__":
    main()
