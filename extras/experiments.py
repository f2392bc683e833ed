"""The named experiments: run them, and draw tables and Figures 3 and 4 from results/.

    python -m extras.experiments list
    python -m extras.experiments run shapes-softmax-128 shapes-vq-128 --seeds 0 1 2 --jobs 2
    python -m extras.experiments run all --seeds 0 1 2      # hours on a CPU; stop and go on at will
    python -m extras.experiments table --readme --json rows.json
    python -m extras.experiments figures                    # results/figure3.png, figure4.png

`run` starts each experiment's command as a process with its log in runs/NAME-sSEED.log, and copies
config.json, metrics.jsonl and results.json to results/NAME-sSEED (k-means: one file of that name).
What is there is not run again, and a run that was interrupted is resumed. One that fails stops no
other. `table --readme` writes between the marks in README.md, `--json` one object per row.
"""
import argparse
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import visualize
from checkpoint import write

ROOT = Path(__file__).parent.parent
RESULTS, RUNS, README = ROOT / "results", ROOT / "runs", ROOT / "README.md"
START = "<!-- python -m extras.experiments table --readme -->"
END = "<!-- end of table -->"

# Photographs: all of CIFAR-10 as cifar10/{train,test}/<class>/, or --data cifar10 with a network
DATA = {"shapes": "", "cifar10": "--data folder:cifar10 --teacher cifar10"}
SPACE = {"shapes": "", "cifar10": "--rounds 1"}                 # for what fits the student's space
SIZES, STRATEGIES = (128, 256, 512), ("entropy", "info", "combined")
BASE = {"softmax-128": "train.py --disc softmax --vocab 128"}
DISCS = {f"{disc}-{vocab}": f"train.py --disc {disc} --vocab {vocab}"
         for vocab in SIZES for disc in ("softmax", "gumbel", "vq")}
# Symbols that tell more, and mean nothing without the first; and do not tell what k-NN ignores
LOCAL, UNIT = ({f"{name}-{tail}": f"{command} {flags}" for name, command in DISCS.items()}
               for tail, flags in (("local", "--local-axes 2000 --mirror"),
                                   ("unit", "--local-axes 1000 --mirror --unit-length")))
EXPLORE = BASE | {f"softmax-128-{name}": f"train.py --explore {name}" for name in STRATEGIES}
VOCABULARIES = {f"softmax-{vocab}": f"train.py --disc softmax --vocab {vocab}"
                for vocab in (512, 256, 128, 64, 32, 16)}
# Table -> name of a row -> its command. Each exploration changes one thing of BASE; ablations
# go back towards the paper step by step, with --balance where there is no draft to keep
# symbols in use.
TABLES = {
    "discretizer (Table 1)": DISCS
    | {f"vqvae-{vocab}": f"-m extras.vqvae --overwrite --vocab {vocab}" for vocab in SIZES}
    | {f"kmeans-{vocab}{tail}": f"-m extras.baselines --vocab {vocab}{space}" for vocab in SIZES
       for tail, space in (("", ""), ("-space", " --space"))},
    "local axes": LOCAL,
    "local axes, unit length": UNIT,
    "vocabulary": VOCABULARIES
    | {f"kmeans-{vocab}": f"-m extras.baselines --vocab {vocab}" for vocab in (64, 32, 16)},
    "exploration (Table 2)": EXPLORE,
    "ablation": BASE | {
        "softmax-128-local": LOCAL["softmax-128-local"],
        "softmax-128-local-no-mirror": "train.py --local-axes 1000",
        "softmax-128-unit": UNIT["softmax-128-unit"],
        "softmax-128-unit-length": "train.py --unit-length",
        "softmax-128-balance": "train.py --balance 2",
        "softmax-128-no-neighbours": "train.py --neighbours 0",
        "softmax-128-all-directions": "train.py --directions 0",
        "softmax-128-no-plain": "train.py --no-plain",
        "softmax-128-no-draft": "train.py --no-draft --balance 2",
        "softmax-128-no-draft-no-balance": "train.py --no-draft",
        "softmax-128-no-regression": "train.py --no-draft --balance 2 --regression 0",
        "softmax-128-ema": "train.py --no-draft --balance 2 --regression 0 --neighbours 0 "
                           "--directions 0 --no-plain --prototype-source ema --centering centre "
                           "--teacher-temp 0.07 --teacher-temp-start 0.04",
        "gumbel-128": DISCS["gumbel-128"],
        "gumbel-128-soft": "train.py --disc gumbel --no-straight-through --tau 0.5",
        "gumbel-128-annealed": "train.py --disc gumbel --no-straight-through --tau-start 0.5 "
                               "--tau 0.1"},
}
PAIRED = ("exploration (Table 2)", "ablation")      # compared on the seeds that all rows have
# The teacher of photographs: the first tenth of the shipped one's training, for other seeds, and
# the first three epochs of a shorter schedule with one choice changed
PRETRAIN = ("-m extras.pretrain --data folder:cifar10 --crop 0.25 1 --stem 32 64 64 128 128 128 "
            "--patch 8 --depth 2 --prototypes 1024 --batch-size 256 --lr 2e-3 --epochs 100 "
            "--every 171")
TEACHERS = {"pretrain-cifar10-tenth": PRETRAIN + " --epochs 140 --stop 14"} | {
    f"pretrain-cifar10-{name}": f"{PRETRAIN} --stop 3 {flag}".strip() for name, flag in {
        "three": "", "patch-stem": "--stem", "short-stem": "--stem 32 64 128",
        "no-batch-norm": "--no-batch-norm", "centre": "--centering centre",
        "temp-04": "--teacher-temp 0.04", "momentum-996": "--momentum 0.996",
        "prototypes-256": "--prototypes 256", "crop-10": "--crop 0.1 1", "locals-4": "--locals 4",
        "width-256": "--width 256"}.items()}
EXPERIMENTS = {f"{data}-{name}": " ".join(filter(None, [
    command, flags, SPACE[data] if command.startswith("train.py") or "--space" in command else ""]))
    for data, flags in DATA.items() for recipes in TABLES.values()
    for name, command in recipes.items()} | TEACHERS
EXPERIMENTS["cifar10-whole"] = "train.py --preset cifar10 --data folder:cifar10"
EXPERIMENTS["cifar10-whole-kmeans"] = (
    "-m extras.baselines --vocab 256 --train-images all --test-images all --data folder:cifar10 "
    "--teacher cifar10")
# The paper's: nine runs in three panels; the strategies, where it has a figure for each of them
FIGURES = {3: (DISCS, ("teacher_entropy", "kl", "knn_top1")),
           4: (EXPLORE, ("knn_top1", "loss", "teacher_entropy", "kl", "information",
                         "symbol_entropy"))}
EPOCHS = (1, 3, 10, 30, 100)                                    # of a teacher's curve
MEASURED = ("knn_top1", "knn_top5", "linear_top1", "linear_top5", "retention", "perplexity")
RUNNING = set()                                                 # child processes


def stop(*_):
    """The handler of SIGTERM: `run` passes it on to RUNNING."""
    raise SystemExit("extras.experiments: stopped; the same command goes on")


def start(name, seed, threads):
    """Runs one experiment, or goes on with it, and keeps its log. -> why it failed, or None."""
    run, begun = f"{name}-s{seed}", time.time()
    out, kept, log = RUNS / run, RESULTS / run, RUNS / f"{run}.log"
    flat = "extras.baselines" in EXPERIMENTS[name]              # writes one file and no log
    done = kept.with_suffix(".json") if flat else kept / "results.json"
    if done.exists():
        return print(f"{run}: done before")
    where = os.path.relpath(done if flat else out, ROOT)        # relative: it ends in config.json
    command = [sys.executable, *EXPERIMENTS[name].split(), "--seed", str(seed),
               "--json" if flat else "--out", where, *["--resume"] * any(out.glob("ckpt*.pt"))]
    try:
        RUNS.mkdir(exist_ok=True)
        with open(log, "w") as file, subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)}) as child:
            RUNNING.add(child)
            code = child.wait()
            RUNNING.discard(child)
        if code:
            last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
            raise OSError(f"exit code {code}: {last} (log: {os.path.relpath(log, ROOT)})")
        for file in () if flat else ("config.json", "metrics.jsonl", "results.json"):
            kept.mkdir(parents=True, exist_ok=True)
            write(kept / file, lambda part: shutil.copy(out / file, part))
    except OSError as error:
        print(f"{run}: failed", flush=True)
        return f"{run}: {error}"
    print(f"{run}: done in {(time.time() - begun) / 60:.1f} minutes", flush=True)


def run(names, seeds, jobs):
    """`jobs` experiments at a time, one seed of all first. Raises ValueError for failures."""
    if unknown := set(names) - {"all", *EXPERIMENTS}:
        raise ValueError(f"unknown experiment {', '.join(sorted(unknown))}; `list` names them")
    if jobs < 1:
        raise ValueError(f"--jobs must be at least 1, not {jobs}")
    names = dict.fromkeys(EXPERIMENTS if "all" in names else names)
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
        raise ValueError("\n".join([f"{len(failed)} failed; the same command goes on", *failed]))


def read_run(path):
    """results.json of a run -> its config, results, and lines of the log."""
    config, results = (json.loads(path.with_name(f"{name}.json").read_text())
                       for name in ("config", "results"))
    log = path.with_name("metrics.jsonl").read_text().splitlines()
    return config, results, [json.loads(line) for line in log]


def recorded():
    """Yields (run, config, seconds, name -> figures) for each folder, then each k-means file, of
    results/. A name is a number of symbols, or what has none: teacher, whitened, pixels."""
    for path in sorted(RESULTS.glob("*/results.json")):
        config, results, log = read_run(path)
        if "student" not in results:                            # a teacher's
            continue
        codes = {n: row | {"retention": results["retention"][n],
                           "perplexity": results["perplexity"][:int(n)]}
                 for n, row in results["student"].items()}
        teacher = results["teacher"] | {"retention": 1.0}
        yield path.parent.name, config, log[-1]["seconds"], codes | {"teacher": teacher}
    for path in sorted(RESULTS.glob("*-kmeans-*.json")):
        figures = json.loads(path.read_text())
        config = {"machine": figures.pop("machine", {}), "method": "residual-kmeans"}
        yield path.stem, config | figures.pop("config"), figures.pop("seconds", None), figures


def rows():
    """A dictionary per run and number of symbols; what has no symbols once per data set, from the
    first run. None: not measured. perplexity: the smallest of the positions read."""
    seen = set()
    for run, config, seconds, figures in recorded():
        gpu, threads = (config["machine"].get(key) for key in ("gpu", "threads"))
        for name, row in figures.items():
            n = int(name) if name.isdigit() else None
            method = config.get("method", config.get("disc")) if n else name
            if n or (config["data"], name) not in seen:
                yield dict.fromkeys(MEASURED) | row | {
                    "experiment": re.sub(r"-s\d+$", "", run), "data": config["data"],
                    # one stage of residual k-means is k-means
                    "method": "kmeans" if n == 1 and method == "residual-kmeans" else method,
                    "explore": config.get("explore") if n else None,
                    "vocab": int(config["vocab"]) if n else None, "symbols": n,
                    "seed": int(config["seed"]), "seconds": seconds if n else None,
                    "hardware": gpu or (f"CPU, {threads} threads" if threads else "CPU"),
                    "perplexity": min(row["perplexity"]) if row.get("perplexity") else None}
            seen.add((config["data"], name))


def spread(values, digits):
    """Mean, and the deviation between seeds where there are several; - where there is nothing."""
    if not values:
        return "-"
    x = torch.tensor(values, dtype=torch.float64)
    return f"{x.mean():.{digits}f}" + (f" ± {x.std():.{digits}f}" if len(x) > 1 else "")


def line(mine):
    """The rows of one experiment, all seeds -> its line: the retention and the linear probe's top-1
    of 1, 2, 4, 8 symbols, the smallest perplexity of any position and seed."""
    alive = [r["perplexity"] for r in mine if r["symbols"] == 8 and r["perplexity"]]
    cells = [spread([r[key] for r in mine if r["symbols"] == n], digits)
             for key, digits in (("retention", 3), ("linear_top1", 1)) for n in (1, 2, 4, 8)]
    return "| " + " | ".join([
        mine[0]["experiment"], str(len({r["seed"] for r in mine})), *cells,
        f"{min(alive):.0f} of {mine[0]['vocab']}" if alive else "-"]) + " |"


def against_kmeans(found):
    """Experiment -> its rows, of one data set -> a sentence: where the discretizers with default
    flags are ahead of residual k-means of the CLS at equal bits, means over seeds."""
    def means(name):
        for n, key in itertools.product((1, 2, 4, 8), ("retention", "linear_top1")):
            values = [r[key] for r in found.get(name, ())
                      if r["symbols"] == n and r[key] is not None]
            if values:
                yield (n, key), statistics.mean(values)

    count, behind = 0, []
    for name in filter(found.__contains__, DISCS | VOCABULARIES | LOCAL | UNIT):
        theirs = dict(means(f"kmeans-{found[name][0]['vocab']}"))
        for (n, key), ours in means(name):
            if (n, key) in theirs:
                count += 1
                if ours <= theirs[n, key]:
                    behind.append(f"{name}, {key.partition('_')[0]} with {n} "
                                  f"({ours:.4g}, {theirs[n, key]:.4g})")
    if count:
        yield (f"Ahead of residual k-means of as many symbols in {count - len(behind)} of {count} "
               "comparisons of retention and linear probe"
               f"{'; behind: ' + '; '.join(behind) if behind else ''}.\n")


def tables(every):
    """Markdown: for each data set what has no symbols, then those of TABLES that have a line which
    no table before has, then runs in results/ that no table names."""
    named = {name for recipes in TABLES.values() for name in recipes}
    for data in sorted({r["data"] for r in every}, reverse=True):
        found, facts, shown = {}, [], set()
        for r in every:
            if r["data"] == data and r["symbols"]:
                found.setdefault(r["experiment"].partition("-")[2], []).append(r)
            elif r["data"] == data:
                probe = f", linear {r['linear_top1']:.1f}" if r["linear_top1"] else ""
                facts.append(f"{r['method']} k-NN {r['knn_top1']:.1f}{probe}")
        yield f"**{data}** ({'; '.join(facts)})\n"
        for title, recipes in (TABLES | {"other": [n for n in found if n not in named]}).items():
            mine = [name for name in recipes if name in found]
            if set(mine) - shown:
                seeds = set.intersection(*({r["seed"] for r in found[name]} for name in mine))
                seeds = seeds if title in PAIRED else None
                yield (f"| {title} | seeds | 1 symbol | 2 | 4 | 8 | linear, 1 | 2 | 4 | 8 "
                       "| perplexity |\n" + "|---" * 11 + "|")
                yield from (line([r for r in found[name] if not seeds or r["seed"] in seeds])
                            for name in mine)
                yield ""
            shown |= set(mine)
        yield from against_kmeans(found)


def teachers():
    """Markdown: the shipped teacher and the runs of TEACHERS in results/, k-NN over the epochs."""
    lines, cost = [], ""
    for name, seeds in ({"teacher-cifar10": ""} | dict.fromkeys(TEACHERS, "-s[0-9]*")).items():
        runs = [read_run(path) for path in sorted(RESULTS.glob(f"{name}{seeds}/results.json"))]
        if runs:
            curve = [spread([record["knn_top1"] for *_, log in runs for record in log
                             if record["epoch"] == epoch], 1) for epoch in EPOCHS]
            end = spread([results["knn_top1"]["20"] for _, results, _ in runs], 1)
            lines.append(f"| {name} | {len(runs)} | {' | '.join(curve)} | {end} |")
        if runs and not seeds:
            last = runs[0][2][-1]
            cost = (f"The shipped teacher, {name}, took {last['seconds'] / 3600:.1f} hours: "
                    f"{last['images_per_s']:.0f} images/s, {last['gemm_fraction']:.2f} of the rate "
                    "of a large matrix product there.")
    if lines:
        yield ("**teachers for photographs**, k-NN (k = 20) of CIFAR-10's training pictures: by "
               "epoch, of 1 000 held out, gallery 5 000; at the run's end, of 6 000 held out, "
               f"gallery 44 000. {cost}\n\n"
               f"| run | seeds | epoch {' | '.join(map(str, EPOCHS))} | end |\n"
               + "|---" * (len(EPOCHS) + 3) + "|")
        yield from lines
        yield ""


def soft():
    """Markdown: for each discretizer the largest difference that being hard makes to k-NN."""
    gaps = {}                                                   # discretizer -> one of each run
    for path in sorted(RESULTS.glob("*/results.json")):
        config, results, _ = read_run(path)
        if mine := results.get("soft_minus_hard"):
            read = " (read as mixtures)" if config.get("straight_through") is False else ""
            gaps.setdefault(config["disc"] + read, []).append(max(mine.values(), key=abs))
    if gaps:
        yield ("k-NN of soft mixtures minus that of symbols, largest of all lengths and runs: "
               + ", ".join(f"{disc} {max(mine, key=abs):+.2f} points ({len(mine)} runs)"
                           for disc, mine in gaps.items()) + ".\n")


def speed():
    """Markdown: the files of extras.benchmark in results/, and exponents where one has them."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("benchmark-*.json"))]
    if not found:
        return
    yield ("**speed of a training step**\n\n"
           "| size | on | images/s | plain version | times as fast | GFLOP an image "
           "| of a large product's rate | MB |\n"
           "|---|---|---|---|---|---|---|---|")
    for r in found:
        yield (f"| {r['size']}, batch {r['config']['batch_size']} x {r['config']['views']} "
               f"| {r['device']} | {r['images_per_s']:.2f} | {r['plain_images_per_s']:.2f} "
               f"| {r['speedup']:.2f} | {r['gflop_per_image']:.2f} | {r['gemm_fraction']:.2f} "
               f"| {r['peak_memory_mb']:.0f} |")
    for r in found:
        if r.get("growth"):
            powers = ", ".join(f"{name}^{row['exponent']:.2f}" for name, row in r["growth"].items())
            yield f"\nTime of a step ({r['size']}) grows as {powers}."
    yield ""


def figures():
    """Figures 3 and 4 of each data set, first seeds, where there are two runs to compare."""
    for data, (number, (names, keys)) in itertools.product(DATA, FIGURES.items()):
        logs = {f"{data}-{name}": sorted(RESULTS.glob(f"{data}-{name}-s[0-9]*/metrics.jsonl"))
                for name in names}
        runs = [found[0].parent for found in logs.values() if found]
        path = RESULTS / f"figure{number}{'' if data == 'shapes' else '-' + data}.png"
        print(visualize.curves(runs, path, keys).name if len(runs) > 1 else f"no {path.name}",
              *(f"\n  not run yet: {name}" for name, found in logs.items() if not found))


def markdown(every):
    """All that results/ has to say: the rows `every`, soft mixtures, teachers, speed."""
    return "\n".join([*tables(every), *soft(), *teachers(), *speed()])


def table(readme, path):
    """`markdown`, printed or between the marks of README.md, and the rows as JSON at path."""
    every = list(rows())
    text = markdown(every)
    if readme:
        before, rest = README.read_text().split(START)
        whole = f"{before}{START}\n\n{text}\n{END}{rest.split(END)[1]}"
        write(README, lambda part: part.write_text(whole))
    else:
        print(text)
    if path:
        write(path, lambda part: part.write_text(json.dumps(every, indent=1) + "\n"))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names and commands")
    p = commands.add_parser("run", help="run experiments")
    p.add_argument("names", nargs="+", help="as `list` prints them, or all")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="each once per seed")
    p.add_argument("--jobs", type=int, default=1,
                   help="processes side by side, sharing the CPU's threads; raise on many cores, "
                   "or on a GPU that one run does not fill")
    p = commands.add_parser("table", help="results/ as Markdown")
    p.add_argument("--readme", action="store_true", help="into README.md instead of printing it")
    p.add_argument("--json", type=Path, help="also write the rows there")
    commands.add_parser("figures", help="Figures 3 and 4 from the logs in results/")
    args = parser.parse_args()
    try:
        if args.command == "list":
            for name, command in EXPERIMENTS.items():
                print(f"{name:36} python {command}")
        elif args.command == "run":
            signal.signal(signal.SIGTERM, stop)
            run(args.names, args.seeds, args.jobs)
        elif args.command == "table":
            table(args.readme, args.json)
        else:
            figures()
    except KeyboardInterrupt:
        raise SystemExit("extras.experiments: interrupted; the same command goes on") from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"extras.experiments: {error}") from None


if __name__ == "__main__":
    main()
