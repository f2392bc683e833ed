"""Every flag of train.py: what it does, in which unit, and when to change it.

    python train.py --help
    python train.py --recipe paper --size paper --help      # with the defaults of these

A default is here, once, except what a recipe changes (its student's `defaults`), the flags that
only `stable` has (stable.py) and the temperatures, which each discretizer has (discretize.py).
"""
import argparse
from pathlib import Path

import torch

import checkpoint
import data
import discretize
import distributed
import precision



class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Ends the help of each flag that has a default with it."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


# What a data set, and after it a size, changes in the flags' defaults.
DATA = {"scenes": dict(image_size=48)}

SIZES = {
    "small": {},
    "cifar10": dict(data="cifar10", teacher="cifar10", train_images="all", test_images="all",
                    vocab=256, descriptor="4x4", interpreter="4x4", batch_size=256, epochs=3,
                    iterations=1),
    "paper": dict(data="cifar10", teacher="dino_vitb16", image_size=224, train_images="all",
                  test_images="all", vocab=512, descriptor="6x8", interpreter="12x6", hidden=2048,
                  prototypes=8192, batch_size=64, epochs=140, lr=5e-4,
                  weight_decay=[0.04, 0.4], knn_every=5),
}


def network_shape(text):
    """argparse type of --descriptor and --interpreter: "6x8" -> (depth 6, heads 8)."""
    depth, heads = (int(part) for part in text.split("x"))
    if depth < 1 or heads < 1:
        raise ValueError
    return depth, heads


def data_flags(add):
    add("--data", default="shapes",
        help="shapes or scenes (drawn; scenes has an --image-size of 48), cifar10, "
             "cifar100, stl10 or folder:PATH")
    add("--train-images", type=data.image_count, default=20000,
        help="at most this many, or all; fewer: shorter epochs")
    add("--test-images", type=data.image_count, default=5000,
        help="at most this many, or all; for the evaluation at the end only")
    add("--storage", choices=["auto", "memory", "stream"], default="auto",
        help="of a folder's images: in memory, or read when wanted; auto: by the memory that is "
             "free")
    add("--image-size", type=int, default=32,
        help="pixels; what the teacher was trained on, or a multiple of its patch")
    add("--views", type=int, default=4, help="V, augmented views per image and step")
    add("--cache-views", type=int, default=0,
        help="run the teacher once: keep its tokens of this many views of each image in memory and "
             "draw --views of them per step (the first is the image without augmentation); 0: new "
             "views in every step, as in the paper")
    add("--batch-size", type=int, default=64,
        help="B, images per step, of all processes together; the student sees B * V views")


def network_flags(add):
    add("--teacher", default="shapes",
        help="a name of teachers.py (dino_vitb16, ...), a file, or random:NAME to try sizes")
    add("--length", type=int, default=8, help="T, symbols per image, a power of two")
    add("--descriptor", type=network_shape, default="2x4", metavar="DEPTHxHEADS",
        help="decoder blocks and heads; each block costs T sequential steps")
    add("--interpreter", type=network_shape, default="2x4", metavar="DEPTHxHEADS",
        help="encoder blocks and heads")
    add("--attention", choices=["free", "own"], default="free",
        help="own: each symbol attends to another place, and gets nothing else (place.py)")
    add("--prototypes", type=int, default=1024,
        help="P, outputs of the projector; more for more varied data")
    add("--hidden", type=int, default=512,
        help="recipe paper: width of the projector's MLP; its bottleneck is an eighth of it (DINO: "
             "2048, 256)")


def per_discretizer(name):
    """A class attribute of the discretizers, for help texts: "softmax 0.12, gumbel 0.5, ..."."""
    return ", ".join(f"{key} {getattr(cls, name)}" for key, cls in discretize.DISCRETIZERS.items())


def discretizer_flags(add):
    add("--disc", choices=list(discretize.DISCRETIZERS), default="softmax",
        help="softmax (no noise), gumbel (explores by sampling) or vq (nearest code)")
    add("--vocab", type=int, default=128,
        help="symbols K; an image is T log2(K) bits. Raise when nearly all are in use")
    add("--tau", type=float,
        help="temperature at the end. Lower: closer to one symbol, gradients vanish. vq: scales "
             f"the logits of exploration terms only (default: {per_discretizer('default_tau')})")
    add("--tau-start", type=float,
        help="temperature at step 0, annealed exponentially to --tau. Raise when few symbols "
             "survive the start (default: --tau where that is given, otherwise "
             f"{per_discretizer('default_tau_start')})")
    add("--straight-through", action=argparse.BooleanOptionalAction, default=False,
        help="one-hot forward, soft gradient; no: soft assignments in training, as in the paper, "
             "whose soft figures exceed hard ones")


def loss_flags(add):
    add("--ema", type=float, default=0.996, help="recipe paper: momentum of P_T, to 1 by a cosine")
    add("--lam", type=float, default=1.0,
        help="lambda: < 1 favours short prefixes, 1 treats all alike, > 1 the full sequence")
    add("--pairing", choices=["same", "cross"], default="same",
        help="the target of a view: itself (the paper's formula) or the other views (DINO)")
    add("--centering", choices=["center", "sinkhorn", "none"], default="center",
        help="against collapse of P_T: DINO's center, or Sinkhorn-Knopp (stronger); none: for "
             "prototypes that are not learned")
    add("--teacher-temp", type=float, nargs=2, default=[0.04, 0.07], metavar=("START", "END"),
        help="temperature of p_t over the warm-up; lower: sharper, harder targets")
    add("--explore", choices=["base", "entropy", "info", "combined", "switch"],
        default="base", help="section 3.4. switch: gumbel first, without its noise (a softmax) in "
                             "the second half of training")
    add("--alpha", type=float, default=0.01,
        help="weight of the symbols' entropy with --explore entropy, combined")
    add("--beta", type=float, default=0.05,
        help="weight of a sequence's information with --explore info, combined")


def optimizer_flags(add):
    add("--epochs", type=int, default=2, help="passes over the training images")
    add("--lr", type=float, default=2e-3, help="peak; lower it for larger networks")
    add("--weight-decay", type=float, nargs=2, default=[0.04, 0.04], metavar=("START", "END"),
        help="END is reached by a cosine; DINO: 0.4, for long runs")


def run_flags(add):
    add("--out", type=Path, default=None,
        help="run directory (default: runs/DATA-RECIPE-DISC-VOCAB-sSEED, with -2, -3 if taken)")
    add("--resume", action="store_true", help="continue from OUT/ckpt.pt, to the bit on a CPU")
    add("--seed", type=int, default=0, help="of weights, order, views and drawn images")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:N")
    add("--precision", choices=precision.NAMES, default="auto",
        help="auto: bfloat16 where this machine computes it faster (measured), else float32")
    add("--knn-every", type=float, default=0.5,
        help="epochs between k-NN on held-out training images, 0: never. Below 1, the log has a "
             "line at this interval, otherwise after each epoch")


def parse(argv=None, description=__doc__):
    """The arguments of a command (None: sys.argv's) -> the flags' values, an argparse.Namespace.
    Exits with a usage line."""
    p = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter,
                                add_help=False)
    p.add_argument("--recipe", choices=checkpoint.STUDENTS, default="stable",   # or "paper"
                   help="paper: the published method, with README's list of differences; stable: "
                        "what keeps the symbols from collapsing (stable.py)")
    p.add_argument("--size", choices=SIZES, default="small",
                   help="small: minutes on a CPU; cifar10: all its images, one GPU; paper: its "
                        "teacher and networks")
    data_flags(p.add_argument_group("data").add_argument)
    network_flags(p.add_argument_group("networks").add_argument)
    discretizer_flags(p.add_argument_group("discretizer").add_argument)
    loss_flags(p.add_argument_group("loss").add_argument)
    optimizer_flags(p.add_argument_group("optimisation").add_argument)
    run_flags(p.add_argument_group("run").add_argument)
    for name, student in checkpoint.STUDENTS.items():
        student.add_flags(p.add_argument_group(f"only with --recipe {name}").add_argument)
    first = p.parse_known_args(argv)[0]             # before --help, which prints the defaults
    p.add_argument("-h", "--help", action="help", help="print this, with the defaults of the "
                   "--recipe, --size and --data of the same command")
    p.set_defaults(**checkpoint.STUDENTS[first.recipe].defaults | DATA.get(first.data, {})
                   | SIZES[first.size])
    return p.parse_args(argv)


def check(args):
    """Flags that would fail later, and some that would do nothing. Raises ValueError."""
    for name in ("train_images", "test_images", "image_size", "views", "batch_size", "epochs",
                 "prototypes", "hidden", "teacher_temp", "lr", "lam"):
        value = getattr(args, name)
        if value is not None and not min([value] if not isinstance(value, list) else value) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if args.length < 1 or args.length & (args.length - 1):
        raise ValueError("--length must be a power of two (prefixes of 1, 2, 4, ...), "
                         f"not {args.length}")
    for name in ("knn_every", "cache_views"):
        if not getattr(args, name) >= 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be below 0, and is "
                             f"{getattr(args, name)}")
    if args.pairing == "cross" and args.views == 1:
        raise ValueError("--pairing cross needs other views: --views 2 or more")
    if args.disc == "vq" and args.explore in ("info", "combined"):
        raise ValueError(f"--explore {args.explore} does nothing with --disc vq, whose weights "
                         "have no gradient; use softmax or gumbel, or --explore entropy")
    if args.explore == "switch" and args.disc != "gumbel":
        raise ValueError(f"--explore switch ends gumbel's noise; --disc {args.disc} has none")
    distributed.check_batch_size(args.batch_size)
    if args.cache_views and args.cache_views < args.views:
        raise ValueError(f"--cache-views {args.cache_views} are too few for --views "
                         f"{args.views}; 0 makes new views in every step")
    try:
        torch.empty(0, device=args.device)
    except Exception as error:             # no driver, no such GPU, no such word: each another kind
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}; "
                         "use --device cpu") from None
    args.precision = precision.resolve(args.device, args.precision)
