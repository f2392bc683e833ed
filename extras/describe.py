"""The symbols of any folder of images, one JSON line each; the nearest images; code statistics.

    python -m extras.describe RUN/ckpt.pt FOLDER -o symbols.jsonl           # run it again to resume
    python -m extras.describe RUN/ckpt.pt --retrieve cat.jpg -o symbols.jsonl
    python -m extras.describe --statistics symbols.jsonl --labels-from-path     # of any codes

A line is {"path": below FOLDER, "symbols": T ids, "bits": T log2 K, "log_prob": T natural logs of
p(symbol | image, earlier symbols)}, and with --attention "attention": T lists over the N patches,
row by row, each of sum 1. Images come in sorted order, cropped to their central squares.

Everything is computed in float32, on every device: the symbols of an image must not depend on the
batch size, which changes the order of sums, and in bfloat16 that decides between near-equal logits.

The same command resumes an unfinished file: its lines are kept, and a torn last line is cut off.
It refuses if the lines are not those of FOLDER's first images, or if the first image, described
again, does not get its line's symbols and log_prob, because another checkpoint wrote them then.

--retrieve ranks the lines by the cosine of z_s, which is decoded from the symbols alone: 1 for
equal symbols, about 0 for unrelated images (recipe `stable`, whose space has mean 0). Give the
checkpoint that wrote the file, because the file does not record it.
"""
import argparse
import heapq
import itertools
import json
import math
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

import flags
import hubconf
from extras import codes
from folder import EXTENSIONS, read_image, try_read
from progress import Progress

LINE_START = b'{"path": "'
LOG_PROB_TOLERANCE = 0.02           # nats by which a log_prob may differ between machines


# ---- a folder -> lines ---------------------------------------------------------------------------

def describe_images(symbolizer, names, images, attention=False):
    """n names and n images (3, H, W) uint8 of one size -> n objects, one for each line."""
    sequence = symbolizer.describe(torch.stack(images), attention=attention)
    log_prob = sequence.logits.log_softmax(-1).gather(-1, sequence.ids[..., None])[..., 0]  # (n, T)
    bits = symbolizer.length * math.log2(symbolizer.vocab)
    lines = [{"path": name, "symbols": ids, "bits": round(bits, 4), "log_prob": log_prob}
             for name, ids, log_prob in zip(names, sequence.ids.tolist(), rounded(log_prob))]
    if attention:
        for line, maps in zip(lines, rounded(sequence.attention)):                  # (T, N)
            line["attention"] = maps
    return lines


def rounded(x):
    """A tensor -> nested lists, to five decimals."""
    return x.double().cpu().numpy().round(5).tolist()


def same_line(old, new):
    """Whether two lines about one image are of one checkpoint, both with attention or both
    without."""
    try:
        close = [abs(a - b) < LOG_PROB_TOLERANCE
                 for a, b in zip(old["log_prob"], new["log_prob"], strict=True)]
    except (KeyError, TypeError, ValueError):
        return False
    return old.keys() == new.keys() and old["symbols"] == new["symbols"] and all(close)


def complete_lines(out):
    """-> the number of bytes of the file `out` up to the end of its last complete line. Raises
    ValueError where what follows is not the start of a line of ours."""
    if not out.stat().st_size:
        return 0
    with open(out, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = content.rfind(b"\n") + 1
        tail = content[end:end + len(LINE_START)]
    if tail != LINE_START[:len(tail)]:
        raise ValueError(f"{out} was not written by this command; give another -o")
    return end


def resume(symbolizer, root, names, out, attention):
    """Cuts a torn last line off `out` -> (number of names dealt with, number of lines). Changes
    nothing and raises ValueError if `out` is not the beginning of what would be written there."""
    end, done, lines = complete_lines(out), 0, 0
    for where, row in codes.read_lines(out, torn=True):
        # Only files that cannot be read may be missing between the lines
        while done < len(names) and names[done] != row.get("path"):
            if try_read(root / names[done], symbolizer.size) is not None:
                break
            done += 1
        if done == len(names) or names[done] != row.get("path"):
            expected = f"{names[done]} was expected" if done < len(names) else "no image is left"
            raise ValueError(f"{where} is about {row.get('path')}, but {expected}: this is not the "
                             f"beginning of {root}; give another -o")
        if not lines:
            image = read_image(root / names[done], symbolizer.size)
            again, = describe_images(symbolizer, [names[done]], [image], attention)
            if not same_line(row, again):
                raise ValueError(f"{where} was written by another checkpoint, or not with the same "
                                 "--attention; give another -o")
        done, lines = done + 1, lines + 1
    os.truncate(out, end)
    return done, lines


def list_images(root):
    """-> the sorted paths of the images below the folder `root`, relative to it; hidden files and
    folders are passed over. Raises FileNotFoundError for none."""
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}")
    files = (f.relative_to(root) for f in sorted(root.rglob("*"))
             if f.suffix.lower() in EXTENSIONS and not f.is_dir())
    names = [f.as_posix() for f in files if not any(part.startswith(".") for part in f.parts)]
    if not names:
        raise FileNotFoundError(f"no images in {root} (looking for {' '.join(EXTENSIONS)})")
    return names


def describe_folder(symbolizer, root, out, batch_size, attention):
    """Appends to `out` the lines that it lacks, a batch at a time. Raises OSError if no image can
    be read, and what `list_images` and `resume` raise."""
    names, size = list_images(root), symbolizer.size
    first, lines = resume(symbolizer, root, names, out, attention) if out.exists() else (0, 0)
    with (ThreadPoolExecutor() as pool, open(out, "a", newline="\n") as file,
          Progress("images described", len(names)) as progress):
        progress.update(first)
        for i in range(first, len(names), batch_size):
            batch = names[i:i + batch_size]
            images = pool.map(lambda name: try_read(root / name, size), batch)
            read = {name: image for name, image in zip(batch, images) if image is not None}
            if read:
                rows = describe_images(symbolizer, list(read), list(read.values()), attention)
                file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
                file.flush()
            lines += len(read)
            progress.update(len(batch))
    print(f"{out}: {lines} lines, {len(names) - lines} files skipped")
    if not lines:
        raise OSError(f"none of the {len(names)} images in {root} can be read")


# ---- an image -> the nearest lines ---------------------------------------------------------------

def retrieve(symbolizer, query, path, count):
    """The `count` lines of the file `path` whose z_s, of all T symbols, has the largest cosine with
    that of the image file `query` -> (its symbols, [(cosine, equal positions, path, symbols)]);
    equal cosines stay in the file's order. Raises ValueError for lines of another checkpoint."""
    own = symbolizer(read_image(query, symbolizer.size)[None]).cpu()                # (1, T)
    z, best, lines = decode(symbolizer, own), [], codes.read_lines(path)            # (1, d)
    while batch := list(itertools.islice(lines, 1000)):
        ids = torch.tensor([row["symbols"] for _, row in batch])                    # (b, T)
        if ids.shape[1] != symbolizer.length or ids.max() >= symbolizer.vocab:
            raise ValueError(f"{path} is of another checkpoint: this one has {symbolizer.length} "
                             f"symbols of {symbolizer.vocab}")
        cosine = F.cosine_similarity(decode(symbolizer, ids), z).tolist()
        paths = [row.get("path", where) for where, row in batch]
        best += zip(cosine, (ids == own).sum(1).tolist(), paths, ids.tolist())
        best = heapq.nsmallest(count, best, key=lambda row: -round(row[0], 6))
    return own[0].tolist(), best


def decode(symbolizer, ids):
    """ids (b, T) -> z_s of all T symbols (b, d), float64, on the CPU."""
    return symbolizer.decode(ids)[:, -1].cpu().double()


# ---- the command ---------------------------------------------------------------------------------

def print_statistics(args):
    if args.folder or args.retrieve or args.out:
        raise ValueError("--statistics takes no FOLDER, --retrieve or -o")
    vocab = args.vocab
    if args.checkpoint and not vocab:
        vocab = hubconf.symbolizer(args.checkpoint).vocab
    ids, labels = codes.read_codes(args.statistics, args.labels_from_path)
    figures = codes.code_statistics(ids, vocab)
    if labels and len(labels) > 1:
        figures |= codes.label_statistics(ids, labels)
    codes.print_statistics(figures)


def run(args):
    if min(args.batch_size, args.count, args.vocab or 1) < 1:
        raise ValueError("--batch-size, --count and --vocab must be at least 1")
    if args.statistics:
        return print_statistics(args)
    if not args.checkpoint or not args.out or not (args.folder or args.retrieve):
        raise ValueError("give a checkpoint, FOLDER or --retrieve IMAGE, and -o FILE; or "
                         "--statistics FILE")
    symbolizer = hubconf.symbolizer(args.checkpoint, args.device)
    if args.folder:
        describe_folder(symbolizer, args.folder, args.out, args.batch_size, args.attention)
    if args.retrieve:
        own, nearest = retrieve(symbolizer, args.retrieve, args.out, args.count)
        print("   cosine  equal  " + " ".join(f"{i:4d}" for i in own) + f"  {args.retrieve}")
        for cosine, equal, path, ids in nearest:
            print(f"{cosine:9.6f}  {equal:5d}  " + " ".join(f"{i:4d}" for i in ids) + f"  {path}")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m extras.describe", description=__doc__,
                                     formatter_class=flags.HelpFormatter)
    add = parser.add_argument
    add("checkpoint", nargs="?", help="RUN/ckpt.pt; with --statistics only for its vocabulary")
    add("folder", nargs="?", type=Path, metavar="FOLDER", help="images, at any depth")
    add("-o", "--out", type=Path, metavar="FILE", help="the lines, one per image")
    add("--attention", action="store_true",
        help="also write the attention map of each symbol, which makes the file much larger")
    add("--retrieve", metavar="IMAGE", help="print the lines of -o nearest to this image")
    add("--count", type=int, default=10, help="how many of them")
    add("--statistics", metavar="FILE", help="print code statistics of a file of any system")
    add("--vocab", type=int, help="K for --statistics (default: the checkpoint's, or the largest "
        "id + 1)")
    add("--labels-from-path", action="store_true",
        help="with --statistics: the label is the folder that the file is in")
    add("--batch-size", type=int, default=256, help="images at a time; lower if memory runs out")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    try:
        run(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        raise SystemExit(f"extras.describe: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("extras.describe: interrupted; the same command resumes") from None


if __name__ == "__main__":
    main()
