"""When is a classifier likely to be wrong, by its symbols? Expected Symbol Score; a JSON record.

    python -m extras.trust RUN/ckpt.pt --json trust.json
    python -m extras.trust RUN/ckpt.pt --xmeans --json trust.json       # the source's own pipeline

After "Searching for internal symbols underlying deep learning" (arXiv 2405.20605). We have a
summary of it, which names the score without its formula, so the formulas are our reconstruction:
with y the class that a linear probe of the teacher's CLS predicts (the classifier in question) and
s_n the symbol at position n, where the source has hidden layers,

    ESS(x)  = mean_n log P(s_n | y, n)                      low: suspicious
    LIFT(x) = ESS(x) - mean_n log P(s_n | n)                fits the class, not merely frequent
    symbol prediction = argmax_c sum_n log P(c | s_n, n)

from counts on labelled training images, Laplace-smoothed by 1, for prefixes of 1, 2, 4, 8 symbols.
AUROCs: correct above wrong; images of eight classes above those of two classes left out of map and
probe (near), above noise, shuffled blocks and drawn shapes (far), and clean above attacked (PGD,
L-inf, through teacher and probe). Temporary learning: a map of the two classes from ten images
each. Controls: max-softmax of the probe, and the marginal mean_n log P(s_n | n) alone.

--xmeans: one symbol per image by PCA to 3 dimensions (the source: UMAP) and X-means with BIC of the
patch tokens, averaged over 3 x 3 parts of the image (the source: of a detected region).
"""
import torch
import torch.nn.functional as F

import data
import scoring
from extras import extract as reader
from extras import xmeans

SHOTS, DRAWS = 10, 50               # images per class of temporary learning; repetitions
STEPS, EPSILON, STEP = 10, 8 / 255, 2 / 255     # of PGD, in units of the pixel range


# ---- the score -----------------------------------------------------------------------------------

def symbol_map(ids, labels, vocab, classes, smoothing=1.0):
    """ids (n, T) in 0..K-1, labels (n,) in 0..C-1 -> natural logs: "symbol" P(s | c, n) (T, K, C),
    "class" P(c | s, n) (T, K, C), "marginal" P(s | n) (T, K)."""
    cells = ids * classes + labels[:, None]                                         # (n, T)
    counts = torch.stack([column.bincount(minlength=vocab * classes) for column in cells.T])
    counts = counts.view(-1, vocab, classes).double()
    smooth = counts + smoothing
    marginal = smooth.sum(2)            # of the same table: unseen symbols have no LIFT
    return {"symbol": (smooth / smooth.sum(1, keepdim=True)).log(),
            "class": (smooth / smooth.sum(2, keepdim=True)).log(),
            "marginal": (marginal / marginal.sum(1, keepdim=True)).log()}


def scores(table, ids, predicted):
    """ids (n, T), predicted classes (n,) -> {"ESS", "LIFT", "marginal"}, each (n, T): column m - 1
    is that of the first m symbols."""
    position, lengths = torch.arange(ids.shape[1]), torch.arange(1, ids.shape[1] + 1)
    symbol = table["symbol"][position, ids, predicted[:, None]].cumsum(1) / lengths
    marginal = table["marginal"][position, ids].cumsum(1) / lengths
    return {"ESS": symbol, "LIFT": symbol - marginal, "marginal": marginal}


def predict(table, ids):
    """The symbol prediction: ids (n, T) -> classes (n,)."""
    return table["class"][torch.arange(ids.shape[1]), ids].sum(1).argmax(1)


# ---- images that are out of distribution, and attacked ones --------------------------------------

def block_shuffle(images):
    """(n, 3, H, W) -> the same with its 4 x 4 blocks (8 x 8 pixels at 32) in random order."""
    n, c, h, w = images.shape
    blocks = images[:, :, :h // 4 * 4, :w // 4 * 4].reshape(n, c, 4, h // 4, 4, w // 4)
    blocks = blocks.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)                 # (n, 16, 3, h/4, w/4)
    order = torch.rand(n, 16).argsort(1)
    blocks = blocks[torch.arange(n)[:, None], order].unflatten(1, (4, 4))
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(n, c, h // 4 * 4, w // 4 * 4)


def far_images(images, name):
    """{name: (n, 3, H, W) uint8} far from the data set `name`, of which images (n, 3, H, W) are."""
    far = {"noise": torch.randint_like(images, 256), "shuffled blocks": block_shuffle(images)}
    if name != "shapes":
        far["shapes"] = data.load("shapes", "test", 32, len(images)).images
    return far


def attack(classify, images, labels):
    """PGD (Madry et al. 2018): images (n, 3, H, W) in [0, 1] -> the same within L-inf EPSILON, with
    a larger cross-entropy of classify(images) (n, C) with labels (n,). It starts at random."""
    x = (images + EPSILON * (2 * torch.rand_like(images) - 1)).clamp(0, 1)
    for _ in range(STEPS):
        x.requires_grad_(True)
        loss = F.cross_entropy(classify(x), labels, reduction="sum")
        step = STEP * torch.autograd.grad(loss, x)[0].sign()
        x = (images + (x.detach() + step - images).clamp(-EPSILON, EPSILON)).clamp(0, 1)
    return x


# ---- a checkpoint: all figures, and the report ---------------------------------------------------

class Judge:
    """A probe of the CLS and a symbol map, fitted to the images of the classes `known` (C,)."""

    def __init__(self, part, known, vocab):
        own = torch.isin(part["labels"], known)
        labels = torch.searchsorted(known, part["labels"][own])
        self.probe = scoring.fit_probe(part["cls"][own], labels, len(known))[0]
        self.table = symbol_map(part["ids"][own], labels, vocab, len(known))

    def __call__(self, part):
        """-> {score: (n, T), "max-softmax": (n, 1)} and the probe's classes (n,)."""
        logits = self.probe(part["cls"])
        predicted, highest = logits.argmax(1), logits.softmax(1).amax(1, keepdim=True)
        return scores(self.table, part["ids"], predicted) | {"max-softmax": highest}, predicted

    def auroc(self, high, low):
        """Of each score and prefix: the images `high` above the images `low`."""
        high, low = self(high)[0], self(low)[0]
        lengths = [2**j for j in range(high["ESS"].shape[1].bit_length())]
        return {name: {m: reader.auroc_interval(x[:, m - 1], low[name][:, m - 1])
                       for m in lengths if m <= x.shape[1]} for name, x in high.items()}


def rows_of(part, index):
    return {name: x[index] for name, x in part.items()}


def temporary(train, test, vocab):
    """Images of two classes -> mean accuracy in % of the symbol prediction from ten shots of each,
    of one whose shots have shuffled labels (the control), and of the nearest class mean of CLS."""
    train_y, test_y = ((part["labels"] == test["labels"].max()).long() for part in (train, test))
    count, rows = min(SHOTS, *train_y.bincount(minlength=2).tolist()), []
    y, ids = torch.arange(2).repeat_interleave(count), test["ids"]
    if not count:
        raise ValueError("the training images have none of one of the two classes of --held-out")
    for _ in range(DRAWS):
        order = torch.randperm(len(train_y))
        shots = torch.cat([order[train_y[order] == c][:count] for c in (0, 1)])
        means = train["cls"][shots].view(2, count, -1).mean(1)
        answers = [predict(symbol_map(train["ids"][shots], labels, vocab, 2), ids)
                   for labels in (y, y[torch.randperm(len(y))])]
        answers.append(torch.cdist(test["cls"], means).argmin(1))
        rows.append([100 * (a == test_y).float().mean().item() for a in answers])
    mean = torch.tensor(rows).mean(0).tolist()
    return dict(zip(("accuracy", "shuffled_labels", "nearest_mean_of_cls"), mean))


def measure(args, model, sets, name):
    """-> the figures of the record; "auroc": {comparison: {score: {prefix: figures}}}."""
    config, teacher, student = model
    size, vocab, symbols = config["image_size"], config["vocab"], lambda part: part["ids"]

    def extract(images):
        part = reader.extract(teacher, student, images.split(reader.BATCH), size, len(images))
        return part | {"ids": symbols(part)}

    train, test = (reader.extract_set(teacher, student, part, size) for part in sets)
    if args.xmeans:
        from_pooled, vocab = xmeans.fit(train["pooled"])
        symbols = lambda part: from_pooled(part["pooled"])                      # noqa: E731
        train, test = (part | {"ids": symbols(part)} for part in (train, test))
    held, labels = torch.tensor(sorted(args.held_out)), test["labels"]
    known = torch.arange(len(sets[0].classes))
    if held[0] == held[1] or not torch.isin(held, known).all():
        raise ValueError(f"--held-out needs two different classes in 0..{len(known) - 1}")

    judge = Judge(train, known, vocab)
    right = judge(test)[1] == labels
    chosen = torch.randperm(len(labels))[:args.count]
    images, y = sets[1].get(chosen), labels[chosen]
    device = next(teacher.parameters()).device

    def classify(x):
        return judge.probe(teacher(data.normalize(x.to(device), size))[:, 0].cpu())

    attacked = extract(torch.cat([attack(classify, x / 255, own) for x, own in zip(
        images.split(reader.BATCH), y.split(reader.BATCH))]))
    aurocs = {"correct above wrong": judge.auroc(rows_of(test, right), rows_of(test, ~right)),
              "clean above attacked": judge.auroc(rows_of(test, chosen), attacked)}
    figures = {"symbols": vocab, "probe_accuracy": share(right),
               "symbol_accuracy": share(predict(judge.table, test["ids"]) == labels),
               "attacked_accuracy": share(judge(attacked)[1] == y)}

    judge = Judge(train, known[~torch.isin(known, held)], vocab)
    new = torch.isin(labels, held)
    familiar = rows_of(test, ~new)
    aurocs["eight classes above two new"] = judge.auroc(familiar, rows_of(test, new))
    for far, x in far_images(images, name).items():
        aurocs[f"eight classes above {far}"] = judge.auroc(familiar, extract(x))
    new_train = rows_of(train, torch.isin(train["labels"], held))
    return figures | {"auroc": aurocs, "temporary": temporary(new_train, rows_of(test, new), vocab)}


def share(x):
    return 100 * x.float().mean().item()


def print_figures(args, figures):
    print("linear probe of CLS {probe_accuracy:.1f} % right, symbol prediction "
          "{symbol_accuracy:.1f} %, probe under attack {attacked_accuracy:.1f} %; {symbols} "
          "symbols".format_map(figures))
    lengths = list(figures["auroc"]["correct above wrong"]["ESS"])
    print(f"{'AUROC of prefixes of':49}" + "".join(f"{m:>7}" for m in lengths))
    for title, row in figures["auroc"].items():
        for name, cells in row.items():
            cells = [cell["auroc"] for cell in cells.values()]
            print(f"{title if name == 'ESS' else '':36} {name:12}"
                  + "".join("      -" if c is None else f"{c:7.3f}" for c in cells))
    print("temporary learning of two classes from ten images each: {accuracy:.1f} % (shuffled "
          "labels {shuffled_labels:.1f} %, nearest mean of CLS {nearest_mean_of_cls:.1f} %)"
          .format_map(figures["temporary"]))


def main(argv=None):
    parser = reader.parser("trust", __doc__)
    add = parser.add_argument
    add("--held-out", type=int, nargs=2, default=[8, 9], metavar="CLASS",
        help="the two classes, by number, that map and probe do not have in the comparisons with "
             "eight classes")
    add("--count", type=int, default=256, help="images of each far set, and attacked ones")
    add("--xmeans", action="store_true", help="one symbol per image from the patch tokens, by "
        "X-means, instead of the student's: the source's own pipeline")
    reader.main(parser, argv, measure, print_figures)


if __name__ == "__main__":
    main()
