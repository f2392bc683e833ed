"""The named experiments: run them, and turn results/ into the README's tables.

    python -m extras.experiments list
    python -m extras.experiments run shapes-softmax-128 shapes-vq-128 --seeds 0 1 2    # minutes each on a CPU
    python -m extras.experiments table                       # Markdown, from the files in results/
    python -m extras.experiments table --readme --json rows.json

`run` calls train.py with the experiment's flags and copies its config.json, metrics.jsonl and results.json to
results/NAME-sSEED; what is there already is not run again, and a run that was interrupted is resumed. `table
--readme` writes the tables between the marks in README.md, `--json` one object per row.
"""
import argparse
import json
import shutil
from pathlib import Path

import torch

import checkpoint
import train

ROOT = Path(__file__).parent.parent
RESULTS, README = ROOT / "results", ROOT / "README.md"
START, END = "<!-- python -m extras.experiments table --readme -->", "<!-- end of table -->"
DISCS = ("softmax", "gumbel", "vq")

# Name -> flags of train.py. The ablations change one thing of shapes-softmax-128 each.
EXPERIMENTS = {f"shapes-{disc}-{vocab}": f"--disc {disc} --vocab {vocab}" for vocab in (128, 256, 512) for disc in DISCS}
# Photographs: all of CIFAR-10 as a folder cifar10/{train,test}/<class>/, or --data cifar10 with a network
EXPERIMENTS |= {f"cifar10-{disc}-128": f"--data folder:cifar10 --teacher cifar10 --disc {disc}" for disc in DISCS}
EXPERIMENTS |= {
    "shapes-softmax-128-no-draft": "--no-draft",
    "shapes-softmax-128-no-regression": "--no-draft --regression 0",
    "shapes-softmax-128-no-balance": "--balance 0",
    "shapes-softmax-128-ema": "--no-draft --regression 0 --prototype-source ema --centering centre --teacher-temp 0.07 "
                              "--teacher-temp-start 0.04",
}


def start(name, seed):
    """Runs one experiment, or goes on with it, and keeps its log in results/."""
    out, kept = ROOT / "runs" / f"{name}-s{seed}", RESULTS / f"{name}-s{seed}"
    if (kept / "results.json").exists():
        return print(f"{kept.name}: done before")
    flags = [*EXPERIMENTS[name].split(), "--seed", str(seed), "--out", str(out.relative_to(ROOT))]
    args = train.parse(flags + (["--resume"] if checkpoint.exists(out / "ckpt.pt") else []))
    train.run(args)
    kept.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "metrics.jsonl", "results.json"):
        shutil.copy(out / file, kept / file)


def rows():
    """One dictionary per run and number of symbols, and per baseline; teacher and pixels have None symbols.
    perplexity: the smallest of the positions read."""
    for path in sorted(RESULTS.glob("*/results.json")):
        config, results = json.loads((path.parent / "config.json").read_text()), json.loads(path.read_text())
        last = json.loads((path.parent / "metrics.jsonl").read_text().splitlines()[-1])
        machine = config["machine"]
        common = {"experiment": path.parent.name.rsplit("-s", 1)[0], "data": config["data"], "method": config["disc"],
                  "explore": config["explore"], "vocab": config["vocab"], "seed": config["seed"],
                  "hardware": machine["gpu"] or f"CPU, {machine['threads']} threads", "seconds": last["seconds"]}
        for n, row in results["student"].items():
            yield common | row | {"symbols": int(n), "retention": results["retention"][n],
                                  "perplexity": min(results["perplexity"][:int(n)])}
    for path in sorted(RESULTS.glob("baselines-*.json")):
        file = json.loads(path.read_text())
        common = {"experiment": path.stem, "data": file["config"]["data"], "explore": None, "seed": int(file["config"]["seed"]),
                  "perplexity": None, "hardware": "CPU", "seconds": None}
        for name, row in file.items():
            if name != "config":
                symbols = int(name) if name.isdigit() else None
                yield common | row | {"method": name if symbols is None else "residual-kmeans", "symbols": symbols,
                                      "vocab": symbols and int(file["config"]["vocab"])}


def spread(values, digits):
    """Mean, and the deviation between seeds where there are several."""
    x = torch.tensor(values, dtype=torch.float64)
    return f"{x.mean():.{digits}f}" + (f" ± {x.std():.{digits}f}" if len(x) > 1 else "")


def tables(every):
    """Markdown: a block per data set; a line per experiment with the retention of 1, 2, 4, 8 symbols."""
    for data in sorted({r["data"] for r in every}, reverse=True):
        here = [r for r in every if r["data"] == data]
        ceiling = {r["method"]: r for r in here if r["symbols"] is None}
        facts = [f"{method} k-NN {row['knn_top1']:.1f}" + (f", linear {row['linear_top1']:.1f}" if "linear_top1" in row else "")
                 for method, row in ceiling.items()]
        yield f"**{data}** ({'; '.join(facts)})\n"
        yield "| experiment | seeds | 1 symbol | 2 | 4 | 8 | linear, 8 | perplexity |\n|---|---|---|---|---|---|---|---|"
        for name in dict.fromkeys(r["experiment"] for r in here):
            mine = [r for r in here if r["experiment"] == name and r["symbols"]]
            cells = [spread([r["retention"] for r in mine if r["symbols"] == n], 3) for n in (1, 2, 4, 8)]
            full = [r for r in mine if r["symbols"] == 8]
            alive = "-" if full[0]["perplexity"] is None else f"{min(r['perplexity'] for r in full):.0f} of {full[0]['vocab']}"
            yield "| " + " | ".join([name.replace("baselines-", "residual k-means: "), str(len(full)), *cells,
                                     spread([r["linear_top1"] for r in full], 1), alive]) + " |"
        yield ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names and flags")
    p = commands.add_parser("run", help="run experiments, one after the other")
    p.add_argument("names", nargs="+", help="as `list` prints them, or all")
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p = commands.add_parser("table", help="results/ as Markdown")
    p.add_argument("--readme", action="store_true", help="write it into README.md instead of printing it")
    p.add_argument("--json", type=Path, help="also write the rows there")
    args = parser.parse_args()
    try:
        if args.command == "list":
            for name, flags in EXPERIMENTS.items():
                print(f"{name:36} python train.py {flags}")
        elif args.command == "run":
            unknown = set(args.names) - {"all", *EXPERIMENTS}
            if unknown:
                raise ValueError(f"unknown experiment {', '.join(sorted(unknown))}; `list` names them")
            for name in EXPERIMENTS if "all" in args.names else args.names:
                for seed in args.seeds:
                    start(name, seed)
        else:
            every = list(rows())
            text = "\n".join(tables(every))
            if args.readme:
                before, rest = README.read_text().split(START)
                page = f"{before}{START}\n\n{text}\n{END}{rest.split(END)[1]}"
                checkpoint.write(README, lambda part: part.write_text(page))
            else:
                print(text)
            if args.json:
                args.json.write_text(json.dumps(every, indent=1) + "\n")
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"extras.experiments: {error}") from None


if __name__ == "__main__":
    main()
