"""The paper's questions as named experiments: runs them, and writes their tables and figures.

    python -m extras.experiments list
    python -m extras.experiments run shapes/stable-softmax-128 'cifar10/paper-*' --seeds 0 1 2
    python -m extras.experiments run all --seeds 0 1 2 --jobs 2     # days on a CPU; resumes
    python -m extras.experiments table --write --json rows.json     # RESULTS.md and README.md
    python -m extras.experiments figures                            # Figures 3 and 4

`run` starts one process per experiment and seed, with its output in runs/DATA/NAME-sSEED.log, and
copies config.json, metrics.jsonl and results.json to results/DATA/NAME-sSEED (k-means: one file,
NAME-sSEED.json). What is in results/ is not run again, what was interrupted resumes, and one that
fails does not stop the others. extras/tables.py defines what the tables show.
"""
import argparse
import fnmatch
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import checkpoint
import visualize
from extras import tables
from progress import duration

ROOT = Path(__file__).parent.parent
RESULTS, RUNS = ROOT / "results", ROOT / "runs"

# ---- the experiments -----------------------------------------------------------------------------

DATA = {"shapes": "", "cifar10": "--data folder:cifar10 --teacher cifar10"}
LABELS = {"shapes": "shapes (drawn by shapes.py)", "cifar10": "CIFAR-10 (JPEG)"}
# Only for `stable`: on CIFAR-10 the nearest images are often of another class
SPACE = {"shapes": "", "cifar10": "--iterations 1"}
# `paper` makes four new views of each image and runs the teacher on them in every step: an epoch of
# it costs as much as four of `stable`, and shows its student the views of four
BUDGET = {"paper": "--epochs 1", "stable": ""}
VOCABS = (128, 256, 512)
RECIPES, DISCS = ("paper", "stable"), ("softmax", "gumbel", "vq")
COMPARED = "stable-gumbel"  # whose space the baselines see, and which they are set against
SEARCHED = ("stable-gumbel", "stable-vq")
SEARCHES = ("-greedy", "-beam")         # of extras/baselines.py, at inference
# Table -> row -> the flags beside those in its name, RECIPE-DISC-VOCAB or METHOD-VOCAB
TABLES = {
    "discretizer and vocabulary (Table 1)": {
        f"{recipe}-{disc}-{vocab}": ""
        for recipe in RECIPES for disc in DISCS for vocab in VOCABS},
    "exploration (Table 2)": {
        f"{recipe}-gumbel-128{tail}": flags for recipe in RECIPES for tail, flags in {
            "": "",
            "-entropy": "--explore entropy",
            "-info": "--explore info",
            "-combined": "--explore combined",
            # To softmax and its tau, so that two things differ: the noise and the last tau
            "-switch": "--explore switch --tau-start 2 --tau 0.12"}.items()},
    "ablations of paper": {
        f"paper-{disc}-128{tail}": flags for disc in DISCS for tail, flags in {
            "": "",
            "-teacher-0.04": "--teacher-temp 0.04 0.04",
            "-sinkhorn": "--centering sinkhorn"}.items()},
    "ablations of stable": {
        "stable-softmax-128": "",
        "stable-softmax-128-no-rca": "--neighbours 0 --components 0",
        "stable-softmax-128-patches": "--memory patches",
        "stable-softmax-128-no-regression": "--regression 0",
        "stable-softmax-128-fixed-codebooks": "--codebook-lr 0",
        "stable-softmax-128-new-views": "--views 4 --cache-views 0 --epochs 1",
        "stable-softmax-128-soft": "--no-straight-through"},
    "ten times the training": {
        f"paper-{disc}-128{tail}": flags for disc in DISCS for tail, flags in {
            "": "",
            "-long": "--epochs 10",
            "-long-teacher-0.04": "--epochs 10 --teacher-temp 0.04 0.04",
            "-long-sinkhorn": "--epochs 10 --centering sinkhorn"}.items()} | {
        "stable-gumbel-512": "",
        "stable-gumbel-512-long": "--epochs 20"},
    # -space: of the CLS in the space of the student of that seed, which must have been trained,
    # of gumbel or, with -vq, of vq: their spaces differ in the views that the fit happens to draw
    "baselines of equal bits": {
        f"{method}-{vocab}{tail}": flags for vocab in VOCABS for method, tail, flags in (
            ("kmeans", "", ""),
            ("kmeans", "-beam", "--beam 8"),
            ("kmeans", "-space", "--checkpoint {student}"),
            ("kmeans", "-space-beam", "--checkpoint {student} --beam 8"),
            ("kmeans", "-space-vq", "--checkpoint {student}"),
            ("kmeans", "-space-vq-beam", "--checkpoint {student} --beam 8"),
            ("vqvae", "", ""))},
    # The learned codebooks, searched as those of k-means are
    "search in the learned codebooks": {
        f"{student}-{vocab}{tail}": flags for student in SEARCHED for vocab in VOCABS
        for tail, flags in {
            "": "",
            "-greedy": "--checkpoint {student} --beam 1 --learned",
            "-beam": "--checkpoint {student} --beam 8 --learned"}.items()},
}


def base_of(name):
    """The row of Table 1 that an experiment is compared with."""
    recipe, disc, vocab = re.fullmatch(r"(?:(paper|stable)-)?([a-z]+)-(\d+).*", name).groups()
    student = "stable-vq" if "-space-vq" in name else COMPARED
    return f"{recipe}-{disc}-{vocab}" if recipe else f"{student}-{vocab}"


def command(data, name, flags):
    """What follows `python`; {seed} is left open. In float32, which all machines have."""
    recipe, disc, vocab = base_of(name).split("-")
    if name.startswith(RECIPES) and not name.endswith(SEARCHES):
        own = f"train.py --recipe {recipe} --disc {disc} --vocab {vocab} {BUDGET[recipe]} {flags} "
        own += SPACE[data] if recipe == "stable" else ""
    else:
        module = "vqvae" if name.startswith("vqvae") else "baselines"
        student = f"runs/{data}/{base_of(name)}-s{{seed}}/ckpt.pt"
        own = f"-m extras.{module} --vocab {vocab} {flags.replace('{student}', student)}"
    return " ".join(f"{own} {DATA[data]} --precision float32".split())


EXPERIMENTS = {f"{data}/{name}": command(data, name, flags) for data in DATA
               for table in TABLES.values() for name, flags in table.items()}

# ---- run -----------------------------------------------------------------------------------------

RUNNING = set()                                                 # child processes


def stop(*_):
    """The handler of SIGTERM: `run` passes it on to RUNNING."""
    raise SystemExit("extras.experiments: stopped; the same command resumes")


def start(name, seed, threads):
    """Runs or resumes one experiment and copies what it wrote -> why it failed, or None."""
    run, begin = f"{name}-s{seed}", time.time()
    out, destination, log = RUNS / run, RESULTS / run, RUNS / f"{run}.log"
    one_file = "extras.baselines" in EXPERIMENTS[name]
    done = RESULTS / f"{run}.json" if one_file else destination / "results.json"
    if done.exists():
        return print(f"{run}: done before")
    where = os.path.relpath(done if one_file else out, ROOT)    # relative: it ends in config.json
    command = [sys.executable, *EXPERIMENTS[name].format(seed=seed).split(), "--seed", str(seed),
               "--json" if one_file else "--out", where, *["--resume"] * any(out.glob("ckpt*.pt"))]
    try:
        for folder in (log.parent, destination.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as file, subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)}) as child:
            RUNNING.add(child)
            code = child.wait()
            RUNNING.discard(child)
        if code:
            last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
            raise OSError(f"exit code {code}: {last} (log: {os.path.relpath(log, ROOT)})")
        for file in () if one_file else ("config.json", "metrics.jsonl", "results.json"):
            destination.mkdir(exist_ok=True)
            checkpoint.write(destination / file, lambda part: shutil.copy(out / file, part))
    except OSError as error:
        print(f"{run}: failed", flush=True)
        return f"{run}: {error}"
    print(f"{run}: done in {duration(time.time() - begin)}", flush=True)


def run(patterns, seeds, jobs):
    """`jobs` processes at a time, one seed of all experiments first. Raises ValueError for
    failures, when all the others have ended."""
    if jobs < 1:
        raise ValueError(f"--jobs must be at least 1, not {jobs}")
    names = {}
    for pattern in patterns:
        found = fnmatch.filter(EXPERIMENTS, "*" if pattern == "all" else pattern)
        if not found:
            raise ValueError(f"no experiment is called {pattern}; `list` names them")
        names |= dict.fromkeys(found)
    threads = max(1, torch.get_num_threads() // jobs)
    with ThreadPoolExecutor(jobs) as pool:                      # an interruption cancels what waits
        ends = pool.map(lambda job: start(*job, threads), [(n, s) for s in seeds for n in names])
        try:
            failed = [why for why in ends if why]
        except SystemExit:                                      # Ctrl-C reaches them by itself
            for child in [*RUNNING]:
                child.terminate()                               # train.py saves first
            raise
    if failed:
        raise ValueError("\n".join([f"{len(failed)} failed; the same command resumes", *failed]))


# ---- tables and figures --------------------------------------------------------------------------

NEW = """# Results

What stands between two marks is written by `python -m extras.experiments table --write` from the
files in results/; all other text stays as it is.

raw: 1, 2, 4, 8 is the relative k-NN accuracy of 1, 2, 4, 8 symbols: k-NN top-1 divided by that of
the raw CLS; space: divided by that of the CLS in the student's own space. Figures without a
number are of 8 symbols. ± is the standard deviation over seeds. [ ] is a 95 % t-interval over
seeds (images: a bootstrap over test images), not corrected for the number of comparisons.

Rows are RECIPE-DISCRETIZER-VOCABULARY and what is changed; `python -m extras.experiments list` has
the command of each. cls, cls-space: the teacher's CLS, raw and in the space of `stable`; kmeans:
residual k-means of the raw CLS, with -space of the CLS in the space of `stable-gumbel` (-space-vq:
of `stable-vq`) of that seed, with -beam by beam search of width 8. stable- with -greedy or -beam:
in place of the decoder, a search for the student's codewords whose sum is nearest to the CLS. Other
runs: -own is `--attention own`, -other-processor the same command on another processor; README.md
has -layernorm, -batchnorm (differences from the paper) and fsq (the worked discretizer).
"""


def pairs():
    """Yields what is compared: rows of Table 1 that differ in one thing, the discretizers with one
    change of `paper`, all other rows with theirs of Table 1, and `rivals`."""
    table1, *others = TABLES.values()
    for b, a in itertools.combinations(table1, 2):
        if sum(x != y for x, y in zip(a.split("-"), b.split("-"))) == 1:
            yield a, b
    for b, a in itertools.combinations(TABLES["ablations of paper"], 2):
        disc = base_of(b).split("-")[1]
        if a not in table1 and a == b.replace(disc, base_of(a).split("-")[1]):
            yield a, b
    for name in itertools.chain(*others):
        if name.startswith(RECIPES) and base_of(name) != name:
            yield name, base_of(name)
    yield from rivals()


def rivals():
    """Yields the student with each baseline, and the searched one with those in its space."""
    names = [*TABLES["baselines of equal bits"]]
    yield from ((base_of(name), name) for name in names)
    yield from ((f"{base_of(name)}-beam", name) for name in names if "-space" in name)


def sections(rows):
    """Heading -> the text of that section of RESULTS.md."""
    texts = {}
    for data, label in LABELS.items():
        part = [r for r in rows if r["data"] == data]
        names = {"the teacher": ["cls", "cls-space"]} | TABLES
        names["other runs"] = sorted({r["experiment"] for r in part}.difference(*names.values()))
        found, table1 = {r["experiment"] for r in part}, {*[*TABLES.values()][0]}
        for title, table in names.items():
            changed = {*table} - table1 or table1           # without these nothing is compared
            texts[f"{label}: {title}"] = tables.accuracy_table(
                part, {name: name for name in table if changed & found}, tables.COLUMNS)
        texts[f"{label}: paired differences"] = tables.paired_table(part, [*pairs()])
        texts[f"{label}: against baselines of equal bits"] = tables.ahead_table(part, [*rivals()])
        machines = Counter(f"{r['hardware']}, {r['precision']}" for r in part if r["symbols"] == 8)
        texts[f"{label}: hardware"] = "".join(f"- {n} runs: {x}\n" for x, n in machines.items())
    return texts | {"Speed of a training step": tables.speed_table(RESULTS)}


def readme_table(rows):
    """The table in README.md."""
    small, large = min(VOCABS), max(VOCABS)
    names = {"CLS of the teacher": "cls", "CLS in the student's space": "cls-space",
             f"residual k-means of the CLS, {small}": f"kmeans-{small}",
             f"VQ-VAE, {small}": f"vqvae-{small}"}
    names |= {f"`paper`, {disc}, {small}": f"paper-{disc}-{small}" for disc in DISCS}
    names[f"`paper`, gumbel, Sinkhorn-Knopp, {small}"] = f"paper-gumbel-{small}-sinkhorn"
    for vocab in (small, large):
        names[f"residual k-means in the space, {vocab}"] = f"kmeans-{vocab}-space"
        names |= {f"`stable`, {disc}, {vocab}": f"stable-{disc}-{vocab}" for disc in DISCS}
        names[f"search in the codebooks of `stable`, vq, {vocab}"] = f"stable-vq-{vocab}-beam"
    return tables.side_by_side({data: [r for r in rows if r["data"] == data] for data in DATA},
                               names)


def table(write, json_path):
    """Prints the tables, or writes them into RESULTS.md and README.md; the rows as JSON."""
    rows = [*tables.rows(RESULTS, DATA)]
    texts = sections(rows)
    if write:
        tables.fill(ROOT / "RESULTS.md", texts, NEW)
        tables.fill(ROOT / "README.md", {"results": readme_table(rows)})
    else:
        print("\n".join(f"**{name}**\n\n{text}" for name, text in texts.items()))
    if json_path:
        checkpoint.write_json(json_path, [{k: row[k] for k in tables.KEYS} for row in rows])


def figures():
    """results/DATA/figure3-RECIPE.png (Table 1) and figure4-RECIPE.png (Table 2) of first seeds."""
    keys = {3: ("teacher_entropy", "kl", "knn_top1"),           # the panels of the paper
            4: ("knn_top1", "loss", "teacher_entropy", "kl", "information", "symbol_entropy")}
    for data, recipe, number in itertools.product(DATA, RECIPES, keys):
        names = [*TABLES.values()][number - 3]                  # its first two
        logs = {name: sorted(RESULTS.glob(f"{data}/{name}-s[0-9]*/metrics.jsonl"))
                for name in names if name.startswith(recipe)}
        runs = [found[0].parent for found in logs.values() if found]
        path = RESULTS / data / f"figure{number}-{recipe}.png"
        print(visualize.curves(runs, path, keys[number]) if len(runs) > 1 else f"no {path.name}",
              *(f"\n  not run yet: {data}/{name}" for name, found in logs.items() if not found))


# ---- main ----------------------------------------------------------------------------------------


def parse():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names and commands")
    p = commands.add_parser("run", help="run experiments")
    p.add_argument("names", nargs="+", help="as `list` prints them, also with * and ?; or all")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="each once per seed")
    p.add_argument("--jobs", type=int, default=1,
                   help="processes side by side, which share the CPU's threads; raise on many "
                        "cores, or on a GPU that one run does not fill")
    p = commands.add_parser("table", help="results/ as Markdown")
    p.add_argument("--write", action="store_true",
                   help="into RESULTS.md and README.md, between their marks, instead of printing")
    p.add_argument("--json", type=Path, help="also write the rows there")
    commands.add_parser("figures", help="Figures 3 and 4 from the logs in results/")
    return parser.parse_args()


def main():
    args = parse()
    try:
        if args.command == "list":
            for name, command in EXPERIMENTS.items():
                print(f"{name:42} python {command}")
        elif args.command == "run":
            signal.signal(signal.SIGTERM, stop)
            run(args.names, args.seeds, args.jobs)
        elif args.command == "table":
            table(args.write, args.json)
        else:
            figures()
    except KeyboardInterrupt:
        raise SystemExit("extras.experiments: interrupted; the same command resumes") from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"extras.experiments: {error}") from None


if __name__ == "__main__":
    main()
