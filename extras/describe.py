"""A folder of pictures as symbols, one JSON line each; the pictures most like one; an audit.

    python -m extras.describe ckpt.pt FOLDER -o symbols.jsonl              # killed? run it again
    python -m extras.describe ckpt.pt --like cat.jpg -o symbols.jsonl      # the nearest pictures
    python -m extras.describe --check symbols.jsonl --labels-from-path     # no checkpoint needed

A line is {"path": below FOLDER, "symbols": T ids, "bits": T log2 K, "log_prob": T natural logs of
p(symbol | picture, earlier symbols)}, and with --attention "attention": T lists over the N patches,
row by row, each of sum 1. Pictures come in sorted order, their central squares, in float32.

The same command goes on with an unfinished file: its lines are kept, a torn last line is cut off.
It refuses if the lines are not those of FOLDER's first pictures, or if the first picture, described
again, does not get its line's symbols and log_prob: then another checkpoint has written them.

--like compares z_s, read from the symbols alone, by its cosine, whose zero is the mean of the
pictures that the student was trained on: 1 the same, 0 nothing in common. It cannot see who wrote
the file.
--check audits a file of any system's codes, see extras/codes.py.
"""
import argparse
import heapq
import itertools
import json
import math
import mmap
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.datasets.folder import IMG_EXTENSIONS

import hubconf
from data import read_image, try_read
from extras import codes

START = b'{"path": "'               # how each line of ours begins
SAME = 0.02                         # nats by which a log_prob may differ between machines


# ---- a folder -> lines -----------------------------------------------------------------------

def describe(symbolizer, names, images, attention=False):
    """n names and pictures (3, H, W) of one size -> n objects, one for each line."""
    said = symbolizer.describe(torch.stack(images), attention)
    chosen = said.logits.log_softmax(-1).gather(-1, said.ids[..., None])[..., 0]    # (n, T)
    bits = symbolizer.length * math.log2(symbolizer.vocab)
    parts = [names, said.ids.tolist(), chosen.double().cpu().numpy().round(5).tolist()]
    lines = [{"path": name, "symbols": ids, "bits": round(bits, 4), "log_prob": log_prob}
             for name, ids, log_prob in zip(*parts)]
    if attention:
        for line, looked in zip(lines, said.attention.double().cpu().numpy().round(5).tolist()):
            line["attention"] = looked                                              # (T, N)
    return lines


def same(old, new):
    """Whether two lines about one picture are of one checkpoint, with attention or both without."""
    try:
        close = [abs(a - b) < SAME for a, b in zip(old["log_prob"], new["log_prob"], strict=True)]
    except (KeyError, TypeError, ValueError):
        return False
    return old.keys() == new.keys() and old["symbols"] == new["symbols"] and all(close)


def go_on(symbolizer, root, names, out, attention):
    """Cuts a torn last line off `out` -> (names that are dealt with, lines). Touches nothing and
    raises ValueError if `out` is not the beginning of what would be written there."""
    if not out.stat().st_size:
        return 0, 0
    with open(out, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as bytes_:
        end = bytes_.rfind(b"\n") + 1
        tail = bytes_[end:end + len(START)]
    if tail != START[:len(tail)]:
        raise ValueError(f"{out} is no file of this command; give another -o")
    done = lines = 0
    for where, row in codes.rows(out, torn=True):
        # Only files that cannot be read may be missing between the lines
        while done < len(names) and names[done] != row.get("path"):
            if try_read(root / names[done], symbolizer.size) is not None:
                break
            done += 1
        if done == len(names) or names[done] != row.get("path"):
            expected = f"expected {names[done]}" if done < len(names) else "no picture is left"
            raise ValueError(f"{where} is about {row.get('path')}, {expected}: not the beginning "
                             f"of {root}; give another -o")
        if not lines:
            image = read_image(root / names[done], symbolizer.size)
            if not same(row, describe(symbolizer, [names[done]], [image], attention)[0]):
                raise ValueError(f"{where} was written by another checkpoint, or not with the same "
                                 "--attention; give another -o")
        done, lines = done + 1, lines + 1
    os.truncate(out, end)
    return done, lines


def describe_folder(symbolizer, root, out, batch_size, attention):
    """Appends to `out` the lines that it lacks, a batch at a time."""
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}")
    names = [f.relative_to(root).as_posix() for f in sorted(root.rglob("*"))
             if f.suffix.lower() in IMG_EXTENSIONS and not f.is_dir()]
    if not names:
        raise FileNotFoundError(f"no images in {root} (looked for {' '.join(IMG_EXTENSIONS)})")
    first, lines = go_on(symbolizer, root, names, out, attention) if out.exists() else (0, 0)
    start, size = time.time(), symbolizer.size
    with ThreadPoolExecutor() as pool, open(out, "a", newline="\n") as file:
        for i in range(first, len(names), batch_size):
            batch = names[i:i + batch_size]
            images = pool.map(lambda name: try_read(root / name, size), batch)
            kept = {name: image for name, image in zip(batch, images) if image is not None}
            if kept:
                said = describe(symbolizer, list(kept), list(kept.values()), attention)
                file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in said)
                file.flush()
            lines, done = lines + len(kept), i + len(batch)
            speed = (done - first) / (time.time() - start)
            print(f"{done}/{len(names)} files, {speed:.1f} images/s", end="\r", file=sys.stderr)
    print(f"\n{out}: {lines} lines, {len(names) - lines} files skipped", file=sys.stderr)
    if not lines:
        raise OSError(f"none of the {len(names)} images in {root} can be read")


# ---- a picture -> the nearest lines ----------------------------------------------------------

def like(symbolizer, image, path, count):
    """The `count` lines of `path` whose z_s, of all T symbols, has the largest cosine with the
    picture's -> (its symbols, [(cosine, agreeing positions, path, symbols)]), ties in order."""
    own = symbolizer(read_image(image, symbolizer.size)[None]).cpu()                # (1, T)
    z, best, lines = symbolizer.read(own)[:, -1].double(), [], codes.rows(path)      # (1, d)
    while batch := list(itertools.islice(lines, 1000)):
        ids = torch.tensor([row["symbols"] for _, row in batch])                    # (b, T)
        try:
            cosine = F.cosine_similarity(symbolizer.read(ids)[:, -1].double(), z).tolist()
        except ValueError as error:
            raise ValueError(f"{path} is of another checkpoint: {error}") from None
        paths = [row.get("path", where) for where, row in batch]
        best += zip(cosine, (ids == own).sum(1).tolist(), paths, ids.tolist())
        best = heapq.nsmallest(count, best, key=lambda found: -round(found[0], 6))
    return own[0].tolist(), best


def run(args):
    if min(args.batch_size, args.count, args.vocab or 1) < 1:
        raise ValueError("--batch-size, --count and --vocab must be at least 1")
    if args.check:
        if args.folder or args.like or args.out:
            raise ValueError("--check takes no FOLDER, --like or -o")
        vocab = hubconf.symbolizer(args.checkpoint).vocab if args.checkpoint else None
        ids, labels = codes.read_codes(args.check, args.labels_from_path)
        return codes.print_audit(codes.audit(ids, labels, args.vocab or vocab))
    if not args.checkpoint or not args.out or not (args.folder or args.like):
        raise ValueError("give a checkpoint, FOLDER or --like IMAGE, and -o FILE; or --check FILE")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch finds no GPU; use --device cpu")
    symbolizer = hubconf.symbolizer(args.checkpoint, args.device)
    if args.folder:
        describe_folder(symbolizer, args.folder, args.out, args.batch_size, args.attention)
    if args.like:
        own, found = like(symbolizer, args.like, args.out, args.count)
        print("   cosine  agree  " + " ".join(f"{i:4d}" for i in own) + f"  {args.like}")
        for cosine, agree, path, ids in found:
            print(f"{cosine:9.6f}  {agree:5d}  " + " ".join(f"{i:4d}" for i in ids) + f"  {path}")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m extras.describe", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", nargs="?", help="RUN/ckpt.pt; with --check only for its vocabulary")
    add("folder", nargs="?", type=Path, metavar="FOLDER", help="images, at any depth")
    add("-o", "--symbols", dest="out", type=Path, metavar="FILE", help="the lines, one per image")
    add("--attention", action="store_true", help="also write where each symbol looks")
    add("--like", metavar="IMAGE", help="print the lines of -o nearest to this picture")
    add("--count", type=int, default=10, help="how many of them")
    add("--check", metavar="FILE", help="print figures of a file of codes")
    add("--vocab", type=int, help="K for --check (default: the largest id + 1)")
    add("--labels-from-path", action="store_true", help="label: the folder that the file is in")
    add("--batch-size", type=int, default=256, help="images at a time; lower if memory runs out")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    try:
        run(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        raise SystemExit(f"extras.describe: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("extras.describe: interrupted; the same command goes on") from None


if __name__ == "__main__":
    main()
