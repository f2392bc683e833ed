"""What results/ holds, as rows, and the statistics and Markdown that extras.experiments writes.

Relative k-NN accuracy is k-NN top-1 of the symbols divided by that of the raw CLS (retention_raw)
or of the CLS in the student's own space (retention_space). Tables give the mean ± the standard
deviation over seeds. Two experiments are compared seed by seed: mean difference, relative to the
raw CLS, which both share, with a 95 % t-interval over the seeds, and for 8 symbols also with a 95 %
bootstrap interval over the test images, which are the same for both. It is the mean of the seeds'
intervals, each as wide as for one seed: wider than that of their mean, whose images overlap.

A run has collapsed when, with all its symbols, the smallest perplexity of any position is below 2,
or k-NN top-1 is at most 2 points above chance. This rule was fixed before the first run. It finds
constant symbols alone; that most images share a few sequences, or that the teacher's targets are
nearly uniform, is seen in the columns `different sequences` and `teacher entropy`.
"""
import json
import re
import statistics

import torch

import checkpoint
import scoring

CHANCE = 10.0           # %: both data sets have 10 classes
PREFIXES = (1, 2, 4, 8)
ACCURACIES = ("knn_top1", "knn_top5", "linear_top1", "linear_top5")
PER_PREFIX = ("retention_raw", "retention_space", "soft_minus_hard")
KEYS = ("experiment", "data", "recipe", "method", "explore", "vocab", "symbols", "seed",
        *ACCURACIES, *PER_PREFIX, "perplexity", "unique_codes", "teacher_entropy", "collapsed",
        "steps", "hardware", "precision", "seconds")

# ---- rows ----------------------------------------------------------------------------------------


def read_run(path):
    """results.json of a run, or the file of a k-means -> (facts, {reference or symbols: figures}).
    References: cls, the raw CLS of that seed's images, and cls-space. seconds: of the training."""
    results, steps = json.loads(path.read_text()), None
    if path.name == "results.json":
        config = json.loads(path.with_name("config.json").read_text())
        last = json.loads(path.with_name("metrics.jsonl").read_text().splitlines()[-1])
        hardware, seconds, steps = config["hardware"], last["seconds"], last["step"]
        figures = {n: row | {key: results.get(key, {}).get(n) for key in PER_PREFIX}
                   | {"perplexity": results["perplexity"][:int(n)]}
                   for n, row in results["student"].items()}
        figures[max(figures, key=int)]["unique_codes"] = results["unique_codes"]
        if "teacher_entropy" in last:
            entropy = last["teacher_entropy"] / last["teacher_entropy_max"]
            figures[max(figures, key=int)]["teacher_entropy"] = entropy
        if space := results.get("teacher_space"):
            raw = space["knn_top1"] / results["teacher"]["knn_top1"]
            figures["cls-space"] = space | {"retention_raw": raw, "retention_space": 1.0}
    else:
        config, hardware, seconds = (results[key] for key in ("config", "hardware", "seconds"))
        beam = "-beam" * (config["beam"] > 1)
        if config.get("learned"):
            config |= {"method": config["disc"] + (beam or "-greedy"), "recipe": "stable"}
        else:
            space = "-space" * bool(config["checkpoint"])
            config |= {"method": f"residual-kmeans{space}{beam}", "recipe": None}
        figures = {n: row for n, row in results.items() if n.isdigit()}
    figures["cls"] = results["teacher"] | {"retention_raw": 1.0}
    if space := results.get("teacher_space"):
        figures["cls"]["retention_space"] = results["teacher"]["knn_top1"] / space["knn_top1"]
    facts = {key: config.get(key) for key in ("recipe", "explore", "precision")}
    return facts | {
        "method": config.get("method") or config["disc"], "vocab": int(config["vocab"]),
        "seed": int(config["seed"]), "steps": steps, "seconds": seconds,
        "hardware": hardware["gpu"] or f"{hardware['processor']}, {hardware['threads']} threads",
    }, figures


def has_collapsed(figures):
    """The rule at the top of this file; figures of all symbols, perplexity: of each position."""
    return min(figures["perplexity"]) < 2 or figures["knn_top1"] <= CHANCE + 2


def rows(results, data_sets):
    """Yields a dictionary of KEYS (and knn_hits: see scoring.pack) for each run in results/ and
    number of symbols, and for each data set and seed one for the raw CLS, one for the CLS in the
    space of `stable`. None: not measured, or without a meaning there. perplexity: the smallest
    of the positions read."""
    seen = set()
    own = r"stable-[a-z]+-\d+-s\d+"         # first: their CLS has both ratios
    for data, path in ((data, path) for data in data_sets for path in sorted(
            [*results.glob(f"{data}/*/results.json"), *results.glob(f"{data}/*-s[0-9]*.json")],
            key=lambda path: (not re.fullmatch(own, path.parent.name), path))):
        run = path.parent.name if path.name == "results.json" else path.stem
        facts, figures = read_run(path)
        longest = max(filter(str.isdigit, figures), key=int)
        collapsed = has_collapsed(figures[longest])
        for n, row in figures.items():
            row = dict.fromkeys(KEYS) | {k: row[k] for k in row if k in (*KEYS, "knn_hits")} | {
                "data": data, "seed": facts["seed"], "hardware": facts["hardware"],
                "precision": facts["precision"]}
            if n.isdigit():
                yield row | facts | {
                    "experiment": re.sub(r"-s\d+$", "", run), "symbols": int(n),
                    "collapsed": collapsed, "perplexity": min(row["perplexity"])}
            elif (data, n, row["seed"]) not in seen and (n == "cls" or re.fullmatch(own, run)):
                seen.add((data, n, row["seed"]))
                yield row | {"experiment": n, "method": n}


def by_seed(rows, name, key, symbols=8):
    """{seed: figure} of an experiment on one data set; the CLS stands where 8 symbols do."""
    symbols = None if symbols == 8 and name.startswith("cls") else symbols
    return {r["seed"]: r[key] for r in rows if r["experiment"] == name and r["symbols"] == symbols
            and r.get(key) is not None}


# ---- statistics ----------------------------------------------------------------------------------

# 97.5 % quantiles of Student's t for 1 ... 9 degrees of freedom. For more the last serves, which
# makes the interval a little too wide
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def spread(values, digits):
    """Mean ± standard deviation, this one where there are several values."""
    std = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{std}"


def paired(a, b):
    """{seed: figure} of two experiments -> (mean of a - b over the seeds that both have, half the
    width of its 95 % interval), or None for fewer than two such seeds."""
    differences = [a[seed] - b[seed] for seed in a.keys() & b.keys()]
    if len(differences) < 2:
        return None
    t = T975[min(len(differences) - 1, len(T975)) - 1]
    return statistics.mean(differences), t * statistics.stdev(differences) / len(differences) ** 0.5


def bootstrap(differences, draws=1000):
    """differences (m,) of two experiments on m test images -> the 95 % interval (2,) of their mean
    over other draws of m images."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(differences), (draws, len(differences)), generator=generator)
    return differences[picks].mean(1).quantile(torch.tensor([0.025, 0.975]).double())


def image_interval(rows, a, b):
    """Mean over the shared seeds of `bootstrap` of a - b with 8 symbols, relative to the raw CLS,
    (2,), or None where the hits of no seed are there."""
    hits = [{seed: scoring.unpack(text) for seed, text in by_seed(rows, x, "knn_hits").items()}
            for x in (a, b, "cls")]
    shared = hits[0].keys() & hits[1].keys() & hits[2].keys()
    intervals = [bootstrap(hits[0][s] - hits[1][s]) / hits[2][s].mean() for s in shared]
    return torch.stack(intervals).mean(0).tolist() if intervals else None


# ---- Markdown ------------------------------------------------------------------------------------

# Heading, key of a row, symbols, digits
MAIN = [("k-NN top-1, %", "knn_top1", 8, 1), ("linear top-1, %", "linear_top1", 8, 1)]
SPACE = [(f"space: {n}", "retention_space", n, 3) for n in PREFIXES]
COLUMNS = [("steps", "steps", 8, 0), *MAIN,
           *((f"raw: {n}", "retention_raw", n, 3) for n in PREFIXES), *SPACE,
           ("soft - hard, points", "soft_minus_hard", 8, 1),
           ("smallest perplexity", "perplexity", 8, 0),
           ("different sequences / images", "unique_codes", 8, 3),
           ("teacher entropy / ln P", "teacher_entropy", 8, 3), ("collapsed", "collapsed", 8, 0)]


def markdown(head, lines):
    """Lists of cells -> a Markdown table, or a sentence when there is no line."""
    if not lines:
        return "Not run yet.\n"
    return "".join(f"| {' | '.join(map(str, x))} |\n" for x in (head, ["---"] * len(head), *lines))


def cell(rows, name, key, symbols, digits):
    """One figure of an experiment: mean ± deviation over its seeds, "-" where there is none."""
    values = [*by_seed(rows, name, key, symbols).values()]
    if key == "collapsed" and values:
        return f"{sum(values)} of {len(values)}"
    return spread({*values} if key == "steps" else values, digits) if values else "-"


def accuracy_table(rows, names, columns):
    """names: label -> experiment. A line for each that has rows."""
    return markdown(["", "seeds", *(heading for heading, *_ in columns)], [
        [label, len(by_seed(rows, name, "knn_top1")), *(cell(rows, name, *c[1:]) for c in columns)]
        for label, name in names.items() if by_seed(rows, name, "knn_top1")])


def side_by_side(parts, names):
    """The short table of README.md. parts: label of a data set -> its rows; names: label of a line
    -> experiment. The prefixes' means share a cell."""
    def cells(rows, name):
        prefixes = [by_seed(rows, name, "retention_raw", n) for n in PREFIXES]
        return [cell(rows, name, "knn_top1", 8, 1), cell(rows, name, "linear_top1", 8, 1),
                " / ".join(f"{statistics.mean(x.values()):.3f}" for x in prefixes if x) or "-",
                cell(rows, name, "retention_space", 8, 3)]
    head = ["k-NN", "linear", "raw: 1 / 2 / 4 / 8", "space"]
    return markdown(["", *(f"{label}: {head[0]}" if i == 0 else x for label in parts
                           for i, x in enumerate(head))],
                    [[label, *(x for rows in parts.values() for x in cells(rows, name))]
                     for label, name in names.items()
                     if any(by_seed(rows, name, "knn_top1") for rows in parts.values())])


def paired_table(rows, pairs):
    """pairs: (a, b) of experiments. a minus b with its intervals, where they share two seeds."""
    def cell(a, b, key, symbols, digits):
        difference = paired(by_seed(rows, a, key, symbols), by_seed(rows, b, key, symbols))
        if difference is None:
            return "-"
        mean, half = difference
        return f"{mean:+.{digits}f} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]"

    def images(a, b):
        return "[{:+.3f}, {:+.3f}]".format(*pair) if (pair := image_interval(rows, a, b)) else "-"
    lines = [[f"{a} minus {b}", *(cell(a, b, "retention_raw", n, 3) for n in PREFIXES),
              images(a, b), cell(a, b, "linear_top1", 8, 1)] for a, b in pairs]
    return markdown(
        ["", *(f"raw: {n}" for n in PREFIXES), "raw: 8, images", "linear top-1, points: 8"],
        [line for line in lines if line[4] != "-"])


def ahead_table(rows, pairs):
    """pairs: (a, b). In how many comparisons (prefix, k-NN or linear probe, seed) a is ahead of b,
    and by how many points of top-1 on average."""
    lines = []
    for a, b in pairs:
        of_probe = {probe: [[x[s] - y[s] for s in x.keys() & y.keys()] for n in PREFIXES for x, y in
                            [[by_seed(rows, name, f"{probe}_top1", n) for name in (a, b)]]]
                    for probe in ("knn", "linear")}
        every = [d for columns in of_probe.values() for column in columns for d in column]
        if every:
            lines.append([f"{a} against {b}", f"{sum(d > 0 for d in every)} of {len(every)}"] + [
                f"{statistics.mean(column):+.2f}" if column else "-"
                for columns in of_probe.values() for column in columns])
    return markdown(["", "ahead", *(f"k-NN: {n}" for n in PREFIXES),
                     *(f"linear: {n}" for n in PREFIXES)], lines)


def speed_table(results):
    """The files of extras.benchmark."""
    head = {"size": "size", "device": "hardware", "images_per_s": "images/s",
            "speedup": "times the naive baseline", "gflop_per_image": "GFLOP per image",
            "gemm_fraction": "fraction of measured GEMM throughput",
            "peak_memory_mb": "peak memory, MB"}
    files = [json.loads(path.read_text()) for path in sorted(results.glob("benchmark/*.json"))]
    for file in files:
        file["device"] += f", {file['config']['precision']}"
    return markdown(head.values(), [
        [f"{x:.2f}" if isinstance(x := file.get(key, "-"), float) else x for key in head]
        for file in files])


def fill(path, texts, new=None):
    """Writes each text between its two marks in the file; everything else stays. new: what a file
    begins with that is missing or has no such marks yet, which are then added with a heading.
    Raises ValueError, and leaves the file as it was, where marks are missing."""
    page = path.read_text() if path.exists() else new or ""
    for name, text in texts.items():
        start, end = f"<!-- table: {name} -->", f"<!-- end of table: {name} -->"
        if new and start not in page and end not in page:
            page += f"\n## {name}\n\n{start}\n{end}\n"
        if not page.count(start) == page.count(end) == 1 or page.find(start) > page.find(end):
            raise ValueError(f"{path.name} must hold, once and in this order: {start} {end}")
        before, rest = page.split(start)
        page = f"{before}{start}\n\n{text}\n{end}{rest.split(end)[1]}"
    checkpoint.write(path, lambda part: part.write_text(page))
