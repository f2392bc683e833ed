"""Statistics of discrete codes of any system, from a file with one JSON line per image.

    python -m extras.describe --statistics symbols.jsonl --labels-from-path

A line is {"symbols": T ids from 0, ...}, T the same in all lines, and perhaps a "label". With y the
label and s_t the symbol at position t, counted over the n images,

    I(s_t; y) = H(s_t) + H(y) - H(s_t, y)               in bits

Few images bias it upwards, by about its value with the labels shuffled, which is printed below it.
k-NN compares one-hot symbols: the cosine is the share of positions at which two images agree.
"""
import json
import math
from array import array
from pathlib import Path

import torch

import evaluate
import scoring

ONE_HOT = 2**27                     # most entries of the matrix for k-NN: 0.5 GB in float32


def read_lines(path, torn=False):
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


def read_codes(path, labels_from_path=False):
    """-> ids (n, T) int64 and n labels, or None where the lines have none. labels_from_path: the
    label is the folder that the file is in. Raises ValueError."""
    flat, labels = array("q"), []
    for where, row in read_lines(path):
        flat.extend(row["symbols"])
        label = row.get("label")
        if labels_from_path:
            label = Path(row["path"]).parent.name if isinstance(row.get("path"), str) else ""
            if not label:
                raise ValueError(f'{where} has no "path" with a folder for --labels-from-path')
        labels.append(label)
        if type(label) not in (str, int, type(None)) or (label is None) != (labels[0] is None):
            raise ValueError(f'{where}: a "label" must be text or a whole number, and be in all '
                             "lines or in none")
    if not labels:
        raise ValueError(f"{path} is empty")
    ids = torch.frombuffer(flat, dtype=torch.int64).view(len(labels), -1)
    return ids, labels if labels[0] is not None else None


def entropy(x):
    """x (n,) integers -> entropy of their histogram, in bits."""
    share = x.unique(return_counts=True)[1].double() / len(x)
    return torch.special.entr(share).sum().item() / math.log(2)


def code_statistics(ids, vocab=None):
    """ids (n, T) from 0 -> counts, shares (0..1), bits per image, and perplexity per position
    (1..K). vocab: K, by default the largest id + 1. Raises ValueError for an id outside of it."""
    (n, length), largest = ids.shape, int(ids.max())
    vocab = largest + 1 if vocab is None else vocab
    if largest >= vocab:
        raise ValueError(f"symbol {largest} is not in a vocabulary of {vocab}")
    used = len(ids.unique())
    entropies = [entropy(column) for column in ids.T]
    copies = ids.unique(dim=0, return_counts=True)[1]           # of each sequence
    return {"images": n, "length": length, "vocab": vocab, "used_symbols": used,
            "codebook_usage": used / vocab, "perplexity": [2**bits for bits in entropies],
            "unique_codes": len(copies) / n, "duplicates": n - len(copies),
            "most_frequent_code": int(copies.max()), "bits": length * math.log2(vocab),
            "entropy_bits": sum(entropies)}


def label_statistics(ids, labels, seed=0):
    """ids (n, T) from 0, n >= 2 labels -> mutual information per position (bits) and k-NN top-1
    (%); half of the images, at random, are the gallery and half the queries."""
    symbols, ids = ids.unique(return_inverse=True)              # 0..U-1: large ids take no memory
    classes = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    y = torch.tensor([classes[label] for label in labels])                          # (n,)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))

    def information(y):
        return [entropy(s) + entropy(y) - entropy(s * len(classes) + y) for s in ids.T]

    figures = {"classes": len(classes), "label_entropy": entropy(y),
               "information": information(y), "information_shuffled": information(y[order])}
    order = order[:max(2, ONE_HOT // (ids.shape[1] * len(symbols)))]
    gallery, queries = order.tensor_split(2)
    x = evaluate.one_hot(ids[order], len(symbols)).tensor_split(2)
    knn = scoring.knn_accuracies(x[0], y[gallery], x[1], y[queries])
    return figures | {"gallery": len(gallery), "queries": len(queries),
                      "largest_class": 100 * y[queries].bincount().max().item() / len(queries),
                      "knn": {k: top1 for k, (top1, _) in knn.items()}}


def print_statistics(f):
    """f: of `code_statistics`, or this with `label_statistics`."""
    print("{images} images of {length} symbols; vocabulary {vocab}, in use {used_symbols} "
          "({codebook_usage:.1%})\n"
          "unique codes / images {unique_codes:.4f}: {duplicates} duplicates; the most frequent "
          "code occurs {most_frequent_code} times\n"
          "bits per image {bits:.2f} (T log2 K); sum of the positions' entropies "
          "{entropy_bits:.2f}".format_map(f))
    print("perplexity per position     " + " ".join(f"{p:7.2f}" for p in f["perplexity"]))
    if "knn" in f:
        print("bits about the label        " + " ".join(f"{i:7.3f}" for i in f["information"])
              + f"  of {f['label_entropy']:.3f} ({f['classes']} classes)")
        print("with the labels shuffled    "
              + " ".join(f"{i:7.3f}" for i in f["information_shuffled"]))
        print("k-NN on one-hot symbols, top-1 in %: "
              + ", ".join(f"k = {k}: {top1:.2f}" for k, top1 in f["knn"].items())
              + f"; the largest class: {f['largest_class']:.2f}\n"
              f"({f['gallery']} images are the gallery, {f['queries']} the queries)")
