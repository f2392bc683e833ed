"""k-means and residual k-means of the CLS: relative k-NN accuracy of equal bits without a network.

    python -m extras.baselines --vocab 128 --json results/shapes-kmeans-128-s0.json
    python -m extras.baselines --checkpoint runs/RUN/ckpt.pt          # of the CLS in its own space
    python -m extras.baselines --checkpoint runs/RUN/ckpt.pt --beam 8
    python -m extras.baselines --checkpoint runs/RUN/ckpt.pt --beam 8 --learned

    r_0 = x,   s_n = argmin_k |r_(n-1) - c_k^(n)|^2,   r_n = r_(n-1) - c_(s_n)^(n)

1 symbol is k-means with K centroids. n symbols are residual k-means (Juang and Gray 1982): stage n
quantises the residual that stages 1 ... n-1 leave, the receiver adds n centroids, and the code has
the n log2 K bits of a student's prefix of n symbols. --beam B keeps the B best codes of each image
at every stage instead of the best one, and fits the next stage to the residuals of all of them
(multi-path encoding, Liu et al. 2015; faiss's ResidualQuantizer). The best code of n symbols then
need not be the start of the best one of 8, as it is for a student, so a beam is the harder rival.

--learned has the run's own codebooks instead of k-means, and its z_s instead of the sum: the same
search for the codewords whose sum is nearest to the CLS, which the decoder predicts and does not
search for. So it is the student with a search at inference, and it sees the CLS itself.

x is the teacher's raw CLS, or, with --checkpoint, the CLS in that student's own space,
student.preprocess(z_t)[:, 0]. Images, k-NN and linear probe are those of evaluate.py. Relative
k-NN accuracy is k-NN top-1 divided by that of the raw CLS (retention_raw; row `teacher`), and by
that of the CLS in the student's space (retention_space; row `teacher_space`). A student below these
rows has learned nothing that its teacher's features and a minute of k-means would not give.
"""
import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import checkpoint
import data
import evaluate
import flags
import precision
import stable
import teachers
from extras.probe_teacher import features
from progress import Progress

POINTS_PER_CENTROID = 256       # k-means is fitted to this many (faiss's default), or to the
                                # number of images, if that is more
CHUNK = 1000                    # images whose distances are in memory at a time


def add_flags(add):
    """The flags that every baseline shares with train.py; extras/vqvae.py has them too."""
    add("--data", default="shapes", help="as in train.py")
    add("--teacher", default="shapes", help="as in train.py")
    add("--image-size", type=int, default=32, help="pixels")
    add("--length", type=int, default=8, help="T, symbols per image, a power of two")
    add("--train-images", type=data.image_count, default=20000, help="at most this many, or all")
    add("--test-images", type=data.image_count, default=5000, help="at most this many, or all")
    add("--seed", type=int, default=0, help="of the images drawn, as in train.py, and of the fit")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda, for everything but the reading of images")
    add("--precision", choices=precision.NAMES, default="auto",
        help="of the networks, as in train.py")


def accuracies(train_x, train_y, test_x, test_y, linear=True):
    """A row of results.json: `evaluate.score` of the features as `evaluate.summary` writes it."""
    return evaluate.flat(evaluate.score(train_x, train_y, test_x, test_y, probe=linear))


def extend(residuals, codes, centroids, beam):
    """One stage of beam search for each of n images. residuals (n, b, d) of its b codes so far,
    codes (n, b, t), centroids (K, d) -> the same of the `beam` best of the b K codes of t + 1
    symbols, or of all where they are fewer; best first."""
    distance = torch.cdist(residuals.flatten(0, 1), centroids).unflatten(0, residuals.shape[:2])
    best = distance.flatten(1)                                              # (n, b K)
    best = best.topk(min(beam, best.shape[1]), largest=False).indices       # (n, beam)
    parent, symbol = best // len(centroids), best % len(centroids)
    image = torch.arange(len(best), device=best.device)[:, None]            # (n, 1)
    return (residuals[image, parent] - centroids[symbol],
            torch.cat([codes[image, parent], symbol[..., None]], 2))


def decode(codes, codebooks):
    """codes (n, t) -> (n, d), the sums of their centroids. Equal codes give equal sums to the bit,
    so k-NN sees their ties."""
    return sum(centroids[ids] for centroids, ids in zip(codebooks, codes.T))


def start(x):
    """x (n, d) -> (residuals (n, 1, d), codes (n, 1, 0)) before the first stage."""
    return x[:, None], torch.empty(len(x), 1, 0, dtype=torch.long, device=x.device)


def stage(part, centroids, beam):
    """`extend` of all images, CHUNK of them at a time."""
    chunks = [extend(*chunk, centroids, beam) for chunk in zip(*(x.split(CHUNK) for x in part))]
    return [torch.cat(x) for x in zip(*chunks)]


def residual_kmeans(train, test, vocab, stages, beam=1):
    """train (n, d), test (m, d) -> for 1, 2, ... `stages` symbols: (reconstruction of train, of
    test, codes of test (m, symbols)). The centroids are fitted to train alone."""
    parts = [start(x) for x in (train, test)]
    codebooks, points = [], max(len(train), POINTS_PER_CENTROID * vocab)
    with Progress("residual k-means, stages", stages) as progress:
        for _ in range(stages):
            residuals = parts[0][0].flatten(0, 1)                           # (n b, d)
            if len(residuals) > points:
                residuals = residuals[torch.randperm(len(residuals))[:points].to(train.device)]
            codebooks.append(stable.kmeans(residuals, vocab))
            parts = [stage(part, codebooks[-1], beam) for part in parts]
            progress.update()
            best = [codes[:, 0] for _, codes in parts]
            yield decode(best[0], codebooks), decode(best[1], codebooks), best[1]


@torch.no_grad()
def student_features(student, codes):
    """codes (n, t), t a prefix's length -> z_s of that prefix (n, d), equal for equal codes."""
    ids = F.pad(codes, (0, len(student.disc) - codes.shape[1]))     # prefixes do not see the rest
    z = torch.cat([student.interpret(student.embed(x))[:, student.lengths.index(codes.shape[1])]
                   for x in ids.split(CHUNK)])
    return evaluate.one_feature_per_code(z.cpu(), codes.cpu()).to(z)


def learned_codes(student, train, test, beam=1):
    """As residual_kmeans, with the codebooks and the z_s of a student of recipe `stable`; both
    features are None for numbers of symbols that are no prefix's."""
    parts = [start(x) for x in (train, test)]
    for n, disc in enumerate(student.disc, 1):
        parts = [stage(part, disc.codebook.detach(), beam) for part in parts]
        best = [codes[:, 0] for _, codes in parts]
        z = [student_features(student, codes) if n in student.lengths else None for codes in best]
        yield *z, best[1]


def load_searchable(args):
    """The student of --checkpoint. Raises ValueError where its symbols are not codewords of the
    CLS's residuals, one codebook for each position."""
    config, _, student = checkpoint.load_model(args.checkpoint, args.device)
    if config["recipe"] != "stable" or config["attention"] != "free":
        raise ValueError("--learned needs a run of --recipe stable with --attention free")
    args.disc, args.vocab, args.length = (config[key] for key in ("disc", "vocab", "length"))
    return student


def cls_features(args, sets):
    """The CLS of both sets: {"teacher": (train, test)}, raw, and with --checkpoint also
    "teacher_space", as in evaluate.py's results."""
    if not args.checkpoint:
        teacher = teachers.load_teacher(args.teacher).to(args.device)
        return {"teacher": [features(teacher, s, args) for s in sets]}
    _, teacher, student = checkpoint.load_model(args.checkpoint, args.device)

    def both(z_t):                                                          # -> (B, 2, d)
        return torch.stack([z_t[:, 0].float(), student.preprocess(z_t)[:, 0].float()], 1)
    cls = [features(teacher, s, args, both) for s in sets]
    return {name: [x[:, i] for x in cls] for i, name in enumerate(("teacher", "teacher_space"))}


def score(args, sets):
    """{"teacher", "teacher_space" or a number of symbols: its figures}."""
    labels = [s.labels.to(args.device) for s in sets]
    inputs = {name: [x.to(args.device) for x in parts]
              for name, parts in cls_features(args, sets).items()}
    x, codes = [*inputs.values()][-1], {}
    stages = (learned_codes(load_searchable(args), *x, args.beam) if args.learned
              else residual_kmeans(*x, args.vocab, args.length, args.beam))
    for n, (train, test, ids) in enumerate(stages, 1):
        if n & (n - 1) == 0:                                    # the student's prefixes
            inputs[str(n)], codes[str(n)] = (train, test), ids
    figures = {}
    with Progress("k-NN and linear probe, rows", len(inputs)) as progress:
        for name, (train, test) in inputs.items():
            figures[name] = accuracies(train, labels[0], test, labels[1])
            progress.update()
    for name, row in figures.items():
        row["retention_raw"] = row["knn_top1"] / figures["teacher"]["knn_top1"]
        if args.checkpoint:
            row["retention_space"] = row["knn_top1"] / figures["teacher_space"]["knn_top1"]
        if name in codes:
            row["perplexity"] = evaluate.code_figures(codes[name], args.vocab)["perplexity"]
    return figures


def run(args):
    checkpoint.check_folder(args.json)
    if args.length < 1 or args.beam < 1 or args.vocab < 2:
        raise ValueError("--length and --beam must be at least 1, --vocab at least 2")
    if args.learned and not args.checkpoint:
        raise ValueError("--learned needs --checkpoint, the run whose codebooks it searches")
    args.precision = precision.resolve(args.device, args.precision)
    start = time.time()
    torch.manual_seed(args.seed)
    figures = score(args, evaluate.load_splits(vars(args)))
    for name, row in figures.items():
        print(f"{name:13}", *(f"{key} {value:.{3 if 'retention' in key else 2}f}"
                             for key, value in row.items() if isinstance(value, float)))
    if args.json:
        checkpoint.write_json(args.json, {
            "config": checkpoint.config_of(args), "hardware": precision.hardware_info(args.device),
            "seconds": round(time.time() - start, 1)} | figures)


def parse(argv=None):
    """The flags. With --checkpoint, the defaults of those that the run has too are the run's."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=flags.HelpFormatter)
    add_flags(p.add_argument)
    add = p.add_argument
    add("--vocab", type=int, default=128, help="K, centroids of each stage")
    add("--checkpoint", type=Path,
        help="RUN/ckpt.pt of train.py: quantise the CLS in that student's space. Images, teacher, "
             "length and vocabulary are then those of the run where no flag sets them")
    add("--beam", type=int, default=1,
        help="codes that are kept for each image at every stage; 1 is greedy, faiss's default is 5")
    add("--learned", action="store_true",
        help="the learned codebooks of --checkpoint instead of k-means; its vocabulary and length")
    add("--json", type=Path, help="also write the figures there")
    path = p.parse_known_args(argv)[0].checkpoint
    if path:
        config, _, _ = checkpoint.load_model(path)
        p.set_defaults(**{name: config[name] for name in (
            "data", "teacher", "image_size", "length", "train_images", "test_images", "seed",
            "precision", "vocab")})
    return p.parse_args(argv)


def main():
    try:
        run(parse())
    except (ValueError, OSError) as error:
        raise SystemExit(f"extras.baselines: {error}") from None


if __name__ == "__main__":
    main()
