"""A folder of pictures as symbols, one JSON line each; the pictures most like one; an audit of codes.

    python -m extras.describe ckpt.pt FOLDER -o symbols.jsonl              # killed? run it again
    python -m extras.describe ckpt.pt --like cat.jpg -o symbols.jsonl      # the nearest pictures
    python -m extras.describe --check symbols.jsonl --labels-from-path     # no checkpoint needed

A line is {"path": below FOLDER, "symbols": T ids, "bits": T log2 K, "log_prob": T natural logs of
p(symbol | picture, earlier symbols)}, and with --attention "attention": T lists over the N patches,
row by row, each of sum 1. Pictures come in sorted order, their central squares, in float32.

The same command goes on with an unfinished file: its lines are kept, a torn last line is cut off.
It refuses if the lines are not those of FOLDER's first pictures, or if the first picture, described
again, does not get its line's symbols and log_prob: then another checkpoint has written them.

--like compares cosines of z_s, read from the symbols alone; it cannot see who wrote the file.
--check reads any system's codes: lines with "symbols", as many in each, and perhaps a "label". Its
k-NN compares one-hot symbols, so its cosine is the share of positions that agree. Mutual information
is that of the counts, in bits (nats / ln 2); few pictures inflate it, by about what it is with the
labels shuffled, which is printed below it.
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
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.datasets.folder import IMG_EXTENSIONS

import evaluate
import hubconf
from data import read_image, try_read

START = b'{"path": "'               # how each line of ours begins
SAME = 0.02                         # nats by which a log_prob may differ between machines
ONE_HOT = 2**27                     # most numbers of a one-hot matrix for k-NN: 0.5 GB


def rows(path, torn=False):
    """Yields ("FILE, line n", its object) after checking its symbols. Raises ValueError with the
    line's number. torn: a last line without its end is left out."""
    length = None
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if torn and not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON ({error})") from None
            ids = row.get("symbols") if isinstance(row, dict) else None
            if not isinstance(ids, list) or not ids or any(type(i) is not int for i in ids):
                raise ValueError(f'{where} needs "symbols", a list of whole numbers')
            if min(ids) < 0 or max(ids) >= 2**63:
                raise ValueError(f"{where}: symbols must be from 0 to 2^63 - 1, not {min(ids)}"
                                 f" to {max(ids)}")
            length = length or len(ids)
            if len(ids) != length:
                raise ValueError(f"{where} has {len(ids)} symbols, the lines before it {length}")
            yield where, row


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
    """Whether two lines about one picture are of one checkpoint (and both with attention, or none)."""
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
    for where, row in rows(out, torn=True):
        # Only files that cannot be read may be missing between the lines
        while done < len(names) and names[done] != row.get("path"):
            if try_read(root / names[done], symbolizer.size) is not None:
                break
            done += 1
        if done == len(names) or names[done] != row.get("path"):
            expected = f"expected {names[done]}" if done < len(names) else "no picture is left"
            raise ValueError(f"{where} is about {row.get('path')}, {expected}: not the beginning of "
                             f"{root}; give another -o")
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
    print(f"{out}: {lines} lines, {len(names) - lines} unreadable files skipped", file=sys.stderr)
    if not lines:
        raise OSError(f"none of the {len(names)} images in {root} can be read")


# ---- a picture -> the nearest lines ----------------------------------------------------------

def like(symbolizer, image, path, count):
    """The `count` lines of `path` whose z_s (all T symbols) has the largest cosine with the picture's
    -> (its symbols, [(cosine, positions that agree, path, symbols)]); equal ones in the file's order."""
    own = symbolizer(read_image(image, symbolizer.size)[None]).cpu()                # (1, T)
    z, best, lines = symbolizer.read(own)[:, -1], [], rows(path)                    # (1, d)
    while batch := list(itertools.islice(lines, 1000)):
        ids = torch.tensor([row["symbols"] for _, row in batch])                    # (b, T)
        cosine = F.cosine_similarity(symbolizer.read(ids)[:, -1], z).double().tolist()
        paths = [row.get("path", where) for where, row in batch]
        best += zip(cosine, (ids == own).sum(1).tolist(), paths, ids.tolist())
        best = heapq.nsmallest(count, best, key=lambda found: -round(found[0], 4))
    return own[0].tolist(), best


# ---- codes of any system -> figures ----------------------------------------------------------

def read_codes(path, labels_from_path=False):
    """-> ids (n, T) int64 and n labels, or None where the lines have none. Raises ValueError."""
    flat, labels = array("q"), []
    for where, row in rows(path):
        flat.extend(row["symbols"])
        label = row.get("label")
        if labels_from_path:
            label = Path(row["path"]).parent.name if isinstance(row.get("path"), str) else ""
            if not label:
                raise ValueError(f'{where} has no "path" with a folder for --labels-from-path')
        labels.append(label)
        if type(label) not in (str, int, type(labels[0])) or (label is None) != (labels[0] is None):
            raise ValueError(f'{where}: "label" must be a word or a whole number in all lines or none')
    if not labels:
        raise ValueError(f"{path} is empty")
    ids = torch.frombuffer(flat, dtype=torch.int64).view(len(labels), -1)
    return ids, labels if labels[0] is not None else None


def entropy(x):
    """x (n,) integers -> entropy of their histogram, in bits."""
    share = x.unique(return_counts=True)[1].double() / len(x)
    return torch.special.entr(share).sum().item() / math.log(2)


def audit(ids, labels=None, vocab=None, seed=0):
    """ids (n, T), n labels -> figures; knn (top-1 in %) and information (bits) with labels only."""
    (n, length), largest = ids.shape, int(ids.max())
    vocab = largest + 1 if vocab is None else vocab
    if largest >= vocab:
        raise ValueError(f"symbol {largest} is not in a vocabulary of {vocab}")
    symbols, ids = ids.unique(return_inverse=True)      # 0..U-1: large ids take no memory
    codes, copies = evaluate.code_figures(ids, len(symbols)), ids.unique(dim=0, return_counts=True)[1]
    figures = {"images": n, "length": length, "vocab": vocab, "used": len(symbols),
               "usage": len(symbols) / vocab, "perplexity": codes["perplexity"],
               "distinct": codes["distinct"], "duplicates": n - len(copies),
               "most": int(copies.max()), "bits": length * math.log2(vocab),
               "entropy": sum(math.log2(p) for p in codes["perplexity"])}
    if labels is None or n < 2:
        return figures
    classes = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    y = torch.tensor([classes[label] for label in labels])                          # (n,)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))

    def information(y):
        return [entropy(s) + entropy(y) - entropy(s * len(classes) + y) for s in ids.T]

    figures |= {"classes": len(classes), "label_entropy": entropy(y),
                "information": information(y), "shuffled": information(y[order])}
    order = order[:max(2, ONE_HOT // (length * len(symbols)))]
    gallery, queries = order.tensor_split(2)
    x = evaluate.one_hot(ids[order], len(symbols)).tensor_split(2)
    knn = evaluate.knn_accuracies(x[0], y[gallery], x[1], y[queries])
    return figures | {"gallery": len(gallery), "queries": len(queries),
                      "majority": 100 * y[queries].bincount().max().item() / len(queries),
                      "knn": {k: top1 for k, (top1, _) in knn.items()}}


def print_audit(f):
    print("{images} images of {length} symbols; vocabulary {vocab}, in use {used} ({usage:.1%})\n"
          "distinct sequences / images {distinct:.4f}: {duplicates} duplicates, the most frequent "
          "sequence {most} times\n"
          "bits an image {bits:.2f} (T log2 K); sum of the positions' entropies {entropy:.2f}"
          .format_map(f))
    print("perplexity by position      " + " ".join(f"{p:7.2f}" for p in f["perplexity"]))
    if "knn" in f:
        print("bits about the label        " + " ".join(f"{i:7.3f}" for i in f["information"])
              + f"  of {f['label_entropy']:.3f} ({f['classes']} classes)")
        print("the same, labels shuffled   " + " ".join(f"{i:7.3f}" for i in f["shuffled"]))
        print("k-NN on one-hot symbols, top-1 in %: "
              + ", ".join(f"k = {k}: {top1:.2f}" for k, top1 in f["knn"].items())
              + " ({gallery} gallery, {queries} queries; largest class {majority:.2f})".format_map(f))


def run(args):
    if min(args.batch_size, args.count, args.vocab or 1) < 1:
        raise ValueError("--batch-size, --count and --vocab must be at least 1")
    if args.check:
        if args.folder or args.like or args.out:
            raise ValueError("--check takes no FOLDER, --like or -o")
        vocab = hubconf.symbolizer(args.checkpoint).vocab if args.checkpoint else None
        return print_audit(audit(*read_codes(args.check, args.labels_from_path), args.vocab or vocab))
    if not args.checkpoint or not args.out or not (args.folder or args.like):
        raise ValueError("give a checkpoint, a FOLDER or --like IMAGE, and -o FILE; or --check FILE")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch finds no GPU; use --device cpu")
    symbolizer = hubconf.symbolizer(args.checkpoint, args.device)
    if args.folder:
        describe_folder(symbolizer, args.folder, args.out, args.batch_size, args.attention)
    if args.like:
        own, found = like(symbolizer, args.like, args.out, args.count)
        print("cosine  agree  " + " ".join(f"{i:4d}" for i in own) + f"  {args.like}")
        for cosine, agree, path, ids in found:
            print(f"{cosine:6.3f}  {agree:5d}  " + " ".join(f"{i:4d}" for i in ids) + f"  {path}")


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
