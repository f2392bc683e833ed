"""Words for symbols and for pairs of symbols, without those that similar images have as well.

    python -m extras.falcon RUN/ckpt.pt -o concepts.json
    python -m extras.falcon RUN/ckpt.pt -o concepts.json --by-position --json falcon.json
    python -m extras.page RUN/ckpt.pt --concepts concepts.json

After FALCON (chapter 4 of Kalibhat's dissertation), with symbols for its features, attention maps
for Grad-CAM, and factors, class names and computed words (extras/crops.py) for CLIP's captions. h
(K,) is an image's soft symbol bag, L2-normalised. For a symbol, or a pair of symbols, v:

    T = images that contain v (all of v); |T| > 10                                  (section 4.3)
    WordScore(w) = mean over T of the confidence of w in the crop; kept above 0.08  (equation 4.1)
    L = images without v, where cos(h, mean of h over T) >= beta, both without v    (equation 4.2);
        the 50 with the largest cosine, where those are fewer (our choice)
    a word is dropped unless WordScore_T >= 1.5 WordScore_L, L uncropped; the source drops what
        scores in L at all, which is for CLIP's cosines and would drop any frequent word of ours
    lift(w) = WordScore_T / the mean over all crops of all images; words are ranked by it (our
        choice, because base rates differ)

The crop is the box around attention of 0.6 of its maximum at the symbol's position, for pairs that
of the product of both maps. Words are learned on training images; P(word | T) and lift are then
measured on test images. Control: the same with the images' words permuted. Class names make the
report supervised, and words are correlates, not causes.
"""
from pathlib import Path

import torch
import torch.nn.functional as F

import checkpoint
import scoring
from extras import extract as reader
from extras.crops import Scorer
from extras.qscore import soft_bag

LEAST = 10                          # |T| must exceed it (section 4.3)
THRESHOLD = 0.08                    # of WordScore (section 4.2.2)
CONTRAST = 1.5                      # see above
SIMILAR = 50                        # |L|, where beta leaves fewer: the most similar ones


# ---- the explanation of one feature (sections 4.2, 4.3) ------------------------------------------

class Part:
    """An ImageSet's ids (n, T) in 0..K-1, h (n, K), attention maps `heat` (n, T, N), and the
    confidences of a scorer's W words: `crops` (n, T, W), `images` (n, W), `base` (W,) their mean.
    """

    def __init__(self, ids, h, heat, scorer, confident, order=None):
        """confident (n, T) bool: the symbols that count. order (n,): for the control, a permutation
        of the images whose words are taken."""
        self.ids, self.h, self.heat, self.scorer, n = ids, h, heat, scorer, len(ids)
        self.order = torch.arange(n) if order is None else order
        self.crops = scorer(self.order, heat[self.order])
        self.images = scorer(self.order, torch.ones_like(heat[:, :1]))[:, 0]
        self.base, self.confident = self.crops.mean((0, 1)), confident
        self.present = torch.zeros(h.shape).scatter_reduce_(1, ids, confident.float(), "amax") > 0

    def having(self, feature):
        """T: the images (m,) that contain all symbols of the list `feature`."""
        return self.present[:, feature].all(1).nonzero().flatten()

    def confidences(self, feature, images):
        """(m, W) of the images (m,): in the crop of the symbol's first position; of a pair, in that
        of the product of both maps."""
        positions = [((self.ids[images] == v) & self.confident[images]).int().argmax(1)
                     for v in feature]
        if len(feature) == 1:
            return self.crops[images, positions[0]]
        source = self.order[images]
        heat = torch.stack([self.heat[source, t] for t in positions]).prod(0)
        return self.scorer(source, heat[:, None])[:, 0]

    def similar_without(self, feature, images, beta):
        """L: the images without any of the symbols of `feature` whose other features are like the
        mean of `images`' (cosine >= beta, or the SIMILAR most similar where those are fewer)."""
        mean = self.h[images].mean(0).index_fill(0, torch.tensor(feature), 0)
        length = (1 - self.h[:, feature].square().sum(1)).clamp(min=1e-6).sqrt()    # without them
        cosine = self.h @ F.normalize(mean, dim=0) / length
        cosine[self.present[:, feature].any(1)] = -1
        count = min(max(SIMILAR, int((cosine >= beta).sum())), int((cosine >= 0).sum()))
        return cosine.topk(count).indices


def explain(part, feature, beta):
    """-> {"images": |T|, "similar": |L|, "top_words": {word: [score, lift]}, the largest
    lift first, "dropped": the words that the contrast deletes}."""
    images = part.having(feature)
    similar = part.similar_without(feature, images, beta)
    score = part.confidences(feature, images).mean(0)                           # (W,)
    lift = score / part.base.clamp(min=1e-9)
    high = (score > THRESHOLD) & (lift > 1)
    spurious = torch.zeros_like(high)
    if len(similar):
        spurious = score < CONTRAST * part.images[similar].mean(0)
    order = lift.argsort(descending=True, stable=True).tolist()
    return {"images": len(images), "similar": len(similar),
            "top_words": {part.scorer.names[w]: [score[w].item(), lift[w].item()]
                      for w in order if high[w] and not spurious[w]},
            "dropped": [part.scorer.names[w] for w in order if high[w] and spurious[w]]}


def features_of(part, pairs):
    """Symbols of more than LEAST images, then the `pairs` most frequent pairs of symbols."""
    present, size = part.present.float(), part.present.sum(0)
    both = (present.T @ present).triu(1)
    count, cell = both.flatten().topk(min(pairs, both.numel()))
    return [[v] for v in (size > LEAST).nonzero().flatten().tolist()] + [
        list(divmod(c, len(size))) for m, c in zip(count.tolist(), cell.tolist()) if m > LEAST]


def concepts(learn, test, pairs, beta):
    """Explains all features from the Part `learn`, and measures the top word on the Part `test` ->
    [{"symbols": list, as `explain`, "test_images": |T| there, "test_share": P(top word | T) there,
    "test_lift": its lift there, or None}]."""
    rows, index = [], {name: w for w, name in enumerate(learn.scorer.names)}
    for feature in features_of(learn, pairs):
        row = {"symbols": feature} | explain(learn, feature, beta)
        images = test.having(feature)
        row |= {"test_images": len(images), "test_share": None, "test_lift": None}
        if row["top_words"] and len(images):
            top = index[next(iter(row["top_words"]))]
            row["test_share"] = test.confidences(feature, images)[:, top].mean().item()
            row["test_lift"] = row["test_share"] / max(test.base[top].item(), 1e-9)
        rows.append(row)
    return rows


def summary(rows):
    """-> how many features, how many have a word and images in the test part, the mean share of
    test images on which the top word holds, the share of features where it holds on 80 % of them,
    and the median lift. A feature without a word counts as 0 in both shares."""
    shares = torch.tensor([row["test_share"] or 0.0 for row in rows])
    lifts = torch.tensor([row["test_lift"] for row in rows if row["test_lift"] is not None])
    return {"features": len(rows), "with_word": len(lifts),
            "mean_share": shares.mean().item() if len(rows) else None,
            "share_80": (shares >= 0.8).float().mean().item() if len(rows) else None,
            "median_lift": lifts.median().item() if len(lifts) else None}


# ---- a checkpoint --------------------------------------------------------------------------------

def failures(train, test, labels, test_labels, classes, rows, count):
    """The first `count` wrong test predictions of a linear probe U of h, each with the symbols of
    the largest h_j U_(j, predicted) and their top words (section 4.5)."""
    probe, (n, k) = scoring.fit_probe(train.h, labels, len(classes))[0], train.h.shape
    top_words = {row["symbols"][0]: list(row["top_words"])[:2] for row in rows
                 if len(row["symbols"]) == 1}
    weight = probe(torch.eye(k)) - probe(torch.zeros(1, k))                         # U (K, C)
    predicted = probe(test.h).argmax(1)
    return [{"image": i, "class": classes[test_labels[i]], "predicted": classes[predicted[i]],
             "because": [[v, top_words.get(v, [])] for v in
                         (test.h[i] * weight[:, predicted[i]]).topk(3).indices.tolist()]}
            for i in (predicted != test_labels).nonzero().flatten()[:count].tolist()]


def measure(args, model, sets, name):
    """-> the figures of the record; with "concepts" and "failures", which `report` takes out."""
    config, teacher, student = model
    read = [reader.extract_set(teacher, student, part, config["image_size"]) for part in sets]
    scorer = Scorer(sets[0], read[0]["attention"])
    scorers, vocab = (scorer, Scorer(sets[1], None, scorer.bounds)), config["vocab"]

    def part(i, permuted):
        ids, probs = read[i]["ids"], read[i]["probs"]
        confident = probs.gather(2, ids[..., None])[..., 0] >= args.alpha
        h = soft_bag(probs)
        if args.by_position:
            ids = ids + vocab * torch.arange(ids.shape[1])
            h = F.normalize(probs.flatten(1), dim=1)
        order = torch.randperm(len(ids)) if permuted else None
        return Part(ids, h, read[i]["attention"], scorers[i], confident, order)

    parts = part(0, False), part(1, False)
    rows = concepts(*parts, args.pairs, args.beta)
    control = concepts(part(0, True), part(1, True), args.pairs, args.beta)
    figures = {title: {"measured": summary([r for r in rows if len(r["symbols"]) == m]),
                       "permuted": summary([r for r in control if len(r["symbols"]) == m])}
               for title, m in (("symbols", 1), ("pairs", 2))}
    if args.by_position:
        figures["positions"] = [summary([r for r in rows if len(r["symbols"]) == 1
                                         and r["symbols"][0] // vocab == t])
                                for t in range(config["length"])]
    return figures | {"concepts": rows, "failures": failures(
        *parts, read[0]["labels"], read[1]["labels"], sets[1].classes, rows, args.failures),
        "vocab": vocab}


def label(symbols, vocab, by_position):
    """"17 + 30", or by position "17@1 + 30@3": symbol 17 at position 1."""
    return " + ".join(f"{v % vocab}@{v // vocab + 1}" if by_position else str(v) for v in symbols)


def report(args, figures):
    """Prints the figures and some words; writes concepts.json."""
    rows, vocab = figures.pop("concepts"), figures.pop("vocab")
    print(f"{'on test images:':26}features  with a word  mean share of the top word  "
          "share at least 0.8  median lift")
    for title in ("symbols", "pairs"):
        for arm, row in figures[title].items():
            cells = ("     -" if row[key] is None else f"{row[key]:6.3f}"
                     for key in ("mean_share", "share_80", "median_lift"))
            print("{:8} {:12}{:13}{:13}{:>28}{:>20}{:>13}".format(
                title, arm, row["features"], row["with_word"], *cells))
    for row in sorted(rows, key=lambda row: -(row["test_share"] or 0))[:args.examples]:
        texts = [f"{name} {score:.2f} (x {lift:.1f})"
                 for name, (score, lift) in list(row["top_words"].items())[:4]]
        dropped = f"; dropped: {', '.join(row['dropped'][:3])}" if row["dropped"] else ""
        print(f"{label(row['symbols'], vocab, args.by_position):>16}, {row['images']} images: "
              f"{', '.join(texts)}{dropped}")
    for row in figures.pop("failures"):
        because = "; ".join(f"{label([v], vocab, args.by_position)} ({', '.join(top) or 'no word'})"
                            for v, top in row["because"])
        print(f"test image {row['image']}, {row['class']}, is taken for {row['predicted']} by "
              f"{because}")
    if args.out:
        checkpoint.write_json(args.out, {"by_position": args.by_position, "vocab": vocab,
                                         "concepts": rows})
        print(f"{args.out}: {len(rows)} symbols and pairs")


def main(argv=None):
    parser = reader.parser("falcon", __doc__)
    add = parser.add_argument
    add("-o", "--out", type=Path, metavar="FILE", help="concepts.json, for extras/page.py")
    add("--by-position", action="store_true",
        help="a symbol at another position is another symbol: the recipe stable has a "
             "codebook for each position")
    add("--alpha", type=float, default=0.0, help="least probability of a symbol that counts; raise "
        "it for fewer images that fit better")
    add("--beta", type=float, default=0.7, help="least cosine of the images of the contrast")
    add("--pairs", type=int, default=64, help="how many pairs, the most frequent ones")
    add("--examples", type=int, default=8, help="how many symbols and pairs to print")
    add("--failures", type=int, default=2, help="how many wrong predictions to explain")
    reader.main(parser, argv, measure, report)


if __name__ == "__main__":
    main()
