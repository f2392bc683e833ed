"""Trains the student: images in, at most 8 symbols out, no labels (paper, section 3).

    python train.py                                  # drawn images, 2 CPU cores, five minutes
    python train.py --disc softmax --tau 0.12        # the discretizer and temperature of Figure 1
    python train.py --recipe paper                   # exactly as published, at the same small size
    python train.py --recipe paper --size paper      # and at the paper's size: wants a GPU

One step (`training_step`), for B images in V augmented views:

    z_t = E_T(x)          p_t = P_T(z_t[CLS])                   the frozen teacher
    s   = D_S(z_t)        p_s^(n) = P_S(E_S(s[:n]))             n = 1, 2, 4, 8 symbols
    L   = sum_i sum_j lambda^j H(p_t^(i), p_s^(i,j)) + exploration terms

Writes OUT/config.json, OUT/metrics.jsonl (see --knn-every), OUT/ckpt.pt (see checkpoint.py), and
at the end the evaluation (OUT/results.json) and the figures (OUT/figure1.png, OUT/curves.png).
"""
if __name__ == "__main__":
    print("loading PyTorch ...", flush=True)        # its import alone can take five seconds
import argparse
import json
import math
import time
from pathlib import Path

import torch

import checkpoint
import data
import discretize
import distributed
import evaluate
import losses
import precision
import teachers
import visualize
from progress import Progress, duration

# What a size changes in the flags' defaults.
SIZES = {
    "small": {},
    "cifar10": dict(data="cifar10", teacher="cifar10", train_images=None, test_images=None,
                    vocab=256, descriptor="4x4", interpreter="4x4", batch_size=256, epochs=3),
    "paper": dict(data="cifar10", teacher="dino_vitb16", image_size=224, train_images=None,
                  test_images=None, vocab=512, descriptor="6x8", interpreter="12x6", hidden=2048,
                  prototypes=8192, batch_size=64, epochs=140, lr=5e-4,
                  weight_decay=[0.04, 0.4], knn_every=5),
}
END_LR = 1e-5           # of the cosine: below it nothing moves any more
CLIP = 2.0              # largest norm of the gradient (paper, section 3.3)
STUDENT_TEMP = 0.1      # DINO's
SAVE_MINUTES = 10       # between checkpoints within an epoch: as much is lost in a crash
LR_WARMUP = 0.1         # of all steps, linear (DINO: 10 of 100 epochs)
TEACHER_WARMUP = 30     # epochs in which --teacher-temp reaches its end, at most (DINO)


def network_shape(text):
    """argparse type of --descriptor and --interpreter: "6x8" -> (depth 6, heads 8)."""
    depth, heads = (int(part) for part in text.split("x"))
    if depth < 1 or heads < 1:
        raise ValueError
    return depth, heads


def data_flags(add):
    add("--data", default="shapes",
        help="shapes (drawn by shapes.py), cifar10, cifar100, stl10 or folder:PATH")
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
    add("--prototypes", type=int, default=1024,
        help="P, outputs of the projector; more for more varied data")
    add("--hidden", type=int, default=512,
        help="width of the projector's MLP; its bottleneck is an eighth of it (DINO: 2048, 256)")


def loss_flags(add):
    add("--ema", type=float, default=0.996, help="momentum of P_T, to 1 by a cosine")
    add("--lam", type=float, default=1.0,
        help="lambda: < 1 favours short prefixes, 1 treats all alike, > 1 the full sequence")
    add("--pairing", choices=["same", "cross"], default="same",
        help="the target of a view: itself (the paper's formula) or the other views (DINO)")
    add("--centering", choices=["center", "sinkhorn", "none"], default="center",
        help="against collapse of P_T: DINO's center, or Sinkhorn-Knopp (stronger); none: for "
             "prototypes that are not learned")
    add("--teacher-temp", type=float, nargs=2, default=[0.04, 0.07], metavar=("START", "END"),
        help="temperature of p_t over the warm-up; lower: sharper, harder targets")
    add("--explore", choices=["base", "entropy", "info", "combined"], default="base",
        help="section 3.4")
    add("--alpha", type=float, default=0.01,
        help="weight of the symbols' entropy with --explore entropy, combined")
    add("--beta", type=float, default=0.05,
        help="weight of a sequence's information with --explore info, combined")
    add("--me-max", type=float, default=0.0,
        help="weight of mean-entropy maximisation (MSN), which keeps symbols in use")


def optimizer_flags(add):
    add("--epochs", type=int, default=2)
    add("--lr", type=float, default=2e-3, help="peak; lower it for larger networks")
    add("--weight-decay", type=float, nargs=2, default=[0.04, 0.04], metavar=("START", "END"),
        help="END is reached by a cosine; DINO: 0.4, for long runs")


def run_flags(add):
    add("--out", type=Path, default=None,
        help="run directory; default runs/DATA-RECIPE-DISC-VOCAB-sSEED, with -2, -3 if taken")
    add("--resume", action="store_true", help="continue from OUT/ckpt.pt, to the bit on a CPU")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=precision.NAMES, default="auto",
        help="auto: bfloat16 where this machine computes it faster (measured), else float32")
    add("--knn-every", type=float, default=0.5,
        help="epochs between k-NN on held-out training images, 0: never. Below 1 the log has a "
             "line as often, otherwise after each epoch")


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--recipe", choices=checkpoint.STUDENTS, default="stable",   # or "paper"
                   help="the paper exactly as published, or the fewest changes that keep its "
                        "symbols from collapsing (stable.py)")
    p.add_argument("--size", choices=SIZES, default="small",
                   help="small: minutes on a CPU; cifar10: all its images, one GPU; paper: its "
                        "teacher and networks")
    data_flags(p.add_argument_group("data").add_argument)
    network_flags(p.add_argument_group("networks").add_argument)
    discretize.add_flags(p.add_argument_group("discretizer").add_argument)
    loss_flags(p.add_argument_group("loss").add_argument)
    optimizer_flags(p.add_argument_group("optimisation").add_argument)
    run_flags(p.add_argument_group("run").add_argument)
    for name, student in checkpoint.STUDENTS.items():
        student.add_flags(p.add_argument_group(f"only with --recipe {name}").add_argument)
    first = p.parse_known_args(argv)[0]
    p.set_defaults(**checkpoint.STUDENTS[first.recipe].defaults | SIZES[first.size])
    return p.parse_args(argv)


def check(args):
    """Flags that would fail later, or silently do nothing. Raises ValueError."""
    for name in ("train_images", "test_images", "image_size", "views", "batch_size", "epochs",
                 "prototypes", "hidden", "teacher_temp", "lr", "lam"):
        value = getattr(args, name)
        if value is not None and not min([value] if not isinstance(value, list) else value) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if not args.knn_every >= 0:
        raise ValueError(f"--knn-every must not be below 0, and is {args.knn_every}")
    distributed.check_batch_size(args.batch_size)
    if args.cache_views and args.cache_views < args.views:
        raise ValueError(f"--cache-views {args.cache_views} are too few for --views {args.views}")
    try:
        torch.empty(0, device=args.device)
    except Exception as error:             # no driver, no such GPU, no such word: each another kind
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}; "
                         "use --device cpu") from None
    args.precision = precision.resolve(args.device, args.precision)


# ---- one step ------------------------------------------------------------------------------------

@torch.no_grad()
def encode_views(teacher, images, args):
    """uint8 images (B, 3, H, W) -> z_t of V augmented views of each, (V*B, N+1, d)."""
    augment = data.augmentation(args.data, args.image_size)
    return teacher(augment(images, args.views, args.image_size, part=True).flatten(0, 1))


def training_step(student, centering, z_t, temperature, args):
    """The step at the top of this file, from z_t (V*B, N+1, d) as `student.preprocess` returns it;
    centering: losses.Centering, temperature: of p_t -> (loss, what the log wants)."""
    v = args.views
    with torch.no_grad():
        logits_t = student.teacher_projector(z_t[:, 0]).unflatten(0, (v, -1))   # (V, B, P)
        p_t = centering(logits_t, temperature)
    sequence = student.describe(z_t)                                        # s, for V*B views
    z_s = student.interpret(sequence.embeddings)                            # (V*B, D, d)
    logits_s = student.projector(z_s.transpose(0, 1)).unflatten(1, (v, -1))     # (D, V, B, P)
    loss = losses.granular_dino_loss(p_t, logits_s, args.lam, STUDENT_TEMP, args.pairing)
    explore = losses.exploration_loss(sequence, args.explore, args.alpha, args.beta, args.me_max)
    extra = student.extra_loss(sequence, z_s, z_t)                          # 0 in the paper
    total = loss + sequence.aux + explore + extra
    log = {"loss": total, "dino_loss": loss, "aux": sequence.aux, "extra_loss": extra,
           "teacher_entropy": losses.entropy(p_t).mean(),
           "kl": losses.joint_kl(p_t, logits_s, STUDENT_TEMP, args.pairing),
           "symbol_entropy": losses.symbol_entropy(sequence.logits),
           "information": losses.sequence_information(sequence.weights)}
    return total, {name: torch.as_tensor(value).detach().float() for name, value in log.items()}


# ---- a run ---------------------------------------------------------------------------------------

class TokenCache:
    """The teacher's tokens of --cache-views views of each training image, in main memory: view 0 is
    the image without augmentation. Drawn from the seed alone, so a resumed run has the same."""

    def __init__(self, teacher, images, args):
        """Raises ValueError where they do not fit into memory."""
        self.args, device = args, torch.device(args.device)
        shape = (len(images), args.cache_views, 1 + (args.image_size // teacher.patch) ** 2,
                 teacher.width)
        need = 2 * math.prod(shape) * distributed.world_size()              # bytes
        if need > 0.9 * data.free_memory()[0]:
            raise ValueError(f"--cache-views {args.cache_views} takes {need / 1e9:.3g} GB, and less "
                             "memory is free; use fewer, or 0 to run the teacher in every step")
        self.tokens = torch.empty(shape, dtype=torch.float16)
        gpus = [device] if device.type == "cuda" else []
        batches = torch.arange(len(images)).split(args.batch_size)
        augment = data.augmentation(args.data, args.image_size)
        with (torch.random.fork_rng(gpus), torch.no_grad(),
              precision.autocast(args.device, args.precision),
              Progress("teacher's tokens, images", len(images)) as progress):
            torch.manual_seed(args.seed)
            for index, x in zip(batches, images.batches(batches)):
                x = x.to(device)
                for view in range(args.cache_views):
                    x_view = (augment(x, 1, args.image_size)[0] if view
                              else data.normalize(x, args.image_size))
                    self.tokens[index, view] = teacher(x_view).half().cpu()
                progress.update(len(index))

    def batch(self, index):
        """Indices (B,) of this step's images -> this process's z_t (V*b, N+1, d), --views of the
        cached views of each image, drawn anew."""
        views = torch.rand(len(index), self.args.cache_views).argsort(1)[:, :self.args.views]
        index, views = distributed.shard(index), distributed.shard(views)
        z_t = self.tokens[index[:, None], views]                            # (b, V, N+1, d)
        return z_t.transpose(0, 1).flatten(0, 1).to(self.args.device).float()


COUNTERS = ("epoch", "seconds", "step_in_epoch", "elapsed", "sums")     # they go into checkpoints


class Trainer:
    """Everything that changes during a run; state() and load() are what a checkpoint holds."""

    def __init__(self, args, teacher, student, images):
        self.args, self.images, self.teacher, self.student = args, images, teacher, student
        self.centering = losses.Centering(args.prototypes, args.centering).to(args.device)
        groups = losses.parameter_groups(student, student.slow_parameters(), args.codebook_lr)
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
        kind = torch.device(args.device).type
        self.scaler = torch.amp.GradScaler(kind, enabled=args.precision == "float16")
        self.epoch, self.seconds = 0, 0.0               # finished ones
        self.step_in_epoch, self.elapsed = 0, 0.0       # steps and seconds of the present one
        self.sums = {}                                  # of the log's values since its last line
        self.steps_per_epoch = len(images) // args.batch_size
        if not self.steps_per_epoch:
            raise ValueError(f"--batch-size {args.batch_size} is more than the {len(images)} "
                             "training images")
        self.cache = TokenCache(teacher, images, args) if args.cache_views else None

    def state(self):
        parts = {name: getattr(self, name).state_dict()
                 for name in ("student", "centering", "optimizer", "scaler")}
        rng = {"cpu": torch.get_rng_state()}
        if self.args.device.startswith("cuda"):
            rng["cuda"] = torch.cuda.get_rng_state(self.args.device)
        return parts | {"config": config_of(self.args), "teacher": self.teacher.state_dict(),
                        "rng": rng} | {name: getattr(self, name) for name in COUNTERS}

    def load(self, state):
        for name in ("student", "centering", "optimizer", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        for name in COUNTERS:
            setattr(self, name, state[name])
        self.sums = {name: value.to(self.args.device) for name, value in self.sums.items()}
        torch.set_rng_state(state["rng"]["cpu"])
        if "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.args.device)

    @torch.no_grad()
    def encode(self, n, augmented=False):
        """z_t (n, N+1, d), float32, of the first n training images, for `Student.fit`."""
        if self.cache is not None and not augmented:
            return self.cache.tokens[:n, 0].to(self.args.device).float()
        args, n = self.args, min(n, len(self.images))
        augment, out = data.augmentation(args.data, args.image_size), []
        batches = torch.arange(n).split(args.batch_size)
        with (precision.autocast(args.device, args.precision),
              Progress("teacher's tokens for the statistics, images", n) as progress):
            for x in self.images.batches(batches):
                x = x.to(args.device)
                x = (augment(x, 1, args.image_size)[0] if augmented
                     else data.normalize(x, args.image_size))
                out.append(self.teacher(x).float())
                progress.update(len(x))
        return torch.cat(out)

    def schedule(self, step):
        """Sets learning rate, weight decay and the discretizer's temperature -> the teacher's."""
        args, steps = self.args, self.args.epochs * self.steps_per_epoch
        losses.set_schedule(self.optimizer,
                            losses.warmup_cosine(args.lr, END_LR, step, steps, int(LR_WARMUP * steps)),
                            losses.cosine(*args.weight_decay, step / steps))
        discretize.anneal(self.student, args.tau_start, step / steps)
        return losses.warmup_linear(*args.teacher_temp, step,
                                    min(TEACHER_WARMUP, args.epochs) * self.steps_per_epoch)

    def step(self, tokens, step):
        """One optimizer step on the teacher's tokens (V*B, N+1, d) -> the values to log."""
        args, student = self.args, self.student
        temperature = self.schedule(step)
        self.optimizer.zero_grad()
        with precision.autocast(args.device, args.precision):
            loss, log = training_step(student, self.centering, student.preprocess(tokens),
                                      temperature, args)
        self.scaler.scale(loss).backward()
        distributed.average_gradients(student)
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        if self.epoch == 0 and args.epochs > 1:
            losses.cancel_last_layer_gradient(student.projector)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        steps = args.epochs * self.steps_per_epoch
        losses.ema_update(student.teacher_projector, student.projector,
                          losses.cosine(args.ema, 1.0, step / steps))
        return log

    def batches(self, start):
        """z_t of the steps from `start` to the epoch's end, through the images in an order that
        depends on seed and epoch alone."""
        args = self.args
        generator = torch.Generator().manual_seed(args.seed + self.epoch)
        order = torch.randperm(len(self.images), generator=generator)
        steps = order.split(args.batch_size)[start:self.steps_per_epoch]
        if self.cache is not None:
            yield from map(self.cache.batch, steps)
            return
        for x in self.images.batches([distributed.shard(batch) for batch in steps]):
            with precision.autocast(args.device, args.precision):
                yield encode_views(self.teacher, x.to(args.device), args)

    def next_line(self):
        """The step of this epoch after which the log has its next line."""
        steps, every = self.steps_per_epoch, self.args.knn_every
        parts = min(steps, max(1, round(1 / every))) if every else 1
        return min(n for i in range(parts) if (n := steps * (i + 1) // parts) > self.step_in_epoch)

    def train(self, checkpoints):
        """The rest of the present epoch. Yields a record for each line of the log; saves in between
        where checkpoints.should_save()."""
        start, end = time.time() - self.elapsed, self.next_line()
        total = self.args.epochs * self.steps_per_epoch
        done = self.epoch * self.steps_per_epoch
        with Progress("step", total) as progress:
            progress.update(done + self.step_in_epoch)
            for tokens in self.batches(self.step_in_epoch):
                self.student.train()
                log = self.step(tokens, done + self.step_in_epoch) | {"steps": torch.ones(())}
                self.sums = {name: self.sums.get(name, 0) + value for name, value in log.items()}
                self.step_in_epoch += 1
                self.elapsed = time.time() - start
                save = self.step_in_epoch < end and checkpoints.should_save()
                if save or self.step_in_epoch % 20 == 0 or self.step_in_epoch == end:
                    self.check_finite()                 # rarely: .item() waits for a GPU
                progress.update(note=self.note)
                if save:
                    checkpoints.save(self.state())
                if self.step_in_epoch == end:
                    yield self.record()
                    end = self.next_line() if self.step_in_epoch else None

    @property
    def note(self):
        loss = (self.sums["loss"] / self.sums["steps"]).item() if self.sums else math.nan
        rate = self.step_in_epoch * self.args.batch_size / max(self.elapsed, 1e-9)
        return f"epoch {self.epoch + 1}/{self.args.epochs}  loss {loss:.3f}  {rate:.0f} images/s"

    def record(self):
        """The log's next line; after an epoch's last step it also turns the page."""
        args, steps, end = self.args, self.steps_per_epoch, self.step_in_epoch
        count = self.sums.pop("steps")
        means = distributed.all_reduce_mean(torch.stack([*self.sums.values()]) / count).tolist()
        record = {"epoch": self.epoch + end / steps, "step": self.epoch * steps + end,
                  "seconds": round(self.seconds + self.elapsed, 2),
                  "images_per_s": round(end * args.batch_size / self.elapsed, 1),
                  "lr": self.optimizer.param_groups[0]["lr"],
                  "teacher_entropy_max": math.log(args.prototypes), **dict(zip(self.sums, means))}
        self.sums = {}
        if end == steps:
            self.epoch, self.seconds = self.epoch + 1, self.seconds + self.elapsed
            self.step_in_epoch, self.elapsed = 0, 0.0
        return record

    def check_finite(self):
        """Raises FloatingPointError when the loss or a weight is not finite."""
        loss = (self.sums["loss"] / self.sums["steps"]).item()
        if not (math.isfinite(loss) and all(p.isfinite().all() for p in self.student.parameters())):
            saved = checkpoint.exists(self.args.out / "ckpt.pt")
            kept = f"{self.args.out}/ckpt.pt is from before" if saved else "nothing is saved yet"
            raise FloatingPointError(
                f"the loss is {loss} in epoch {self.epoch + 1}, or a weight is not finite; {kept}. "
                "Try a lower --lr, a higher --tau or a smaller --me-max")


def monitor(trainer, held_out, knn):
    """Collapse figures of hard symbols on images not trained on, and, where there are labels and
    `knn`, k-NN (k = 20) per prefix: half of those images are the queries, the others the gallery."""
    args, student = trainer.args, trainer.student.eval()
    code = evaluate.encode(student, trainer.teacher, held_out, args.image_size, args.precision)
    figures = evaluate.code_figures(code["ids"], args.vocab)
    if knn and held_out.labelled:
        half, y = len(held_out) // 2, held_out.labels
        k = min(20, len(y) - half)
        scores = [evaluate.knn_accuracy(z[half:], y[half:], z[:half], y[:half], k)[0]
                  for z in code["z"]]
        figures |= {"knn_prefix": scores, "knn_top1": scores[-1]}
    return figures


def collapse_warnings(record):
    """What collapse looks like in the figures of a line of the log."""
    share = record["teacher_entropy"] / record["teacher_entropy_max"]
    if share < 0.005:
        yield ("the teacher's entropy is 0: all images have one prototype (raise --teacher-temp, or "
               "--centering sinkhorn)")
    if share > 0.995:
        yield "the teacher's entropy is ln P: its targets are uniform (lower --teacher-temp)"
    if max(record["perplexity"]) < 1.5:
        yield "all images get the same symbols (raise --me-max or --tau, or lower --lr)"


def log_line(trainer, record, held_out):
    """Monitors, prints and writes a line of the log."""
    args, last = trainer.args, trainer.epoch == trainer.args.epochs
    knn = args.knn_every and (last or args.knn_every < 1 or trainer.epoch % args.knn_every == 0)
    record |= monitor(trainer, held_out, knn)
    knn = f"  k-NN {record['knn_top1']:.1f} %" if "knn_top1" in record else ""
    print(f"epoch {record['epoch']:.4g}/{args.epochs}  step {record['step']}  loss "
          f"{record['loss']:.3f}  {record['images_per_s']:.0f} images/s  teacher entropy "
          f"{record['teacher_entropy']:.2f}  KL {record['kl']:.2f}  perplexity "
          f"{min(record['perplexity']):.0f}-{max(record['perplexity']):.0f}{knn}", flush=True)
    for warning in collapse_warnings(record):
        print(f"WARNING: collapse? {warning}")
    with open(args.out / "metrics.jsonl", "a") as log:
        log.write(json.dumps(record) + "\n")


# ---- the run directory and main ------------------------------------------------------------------

def config_of(args):
    """The flags as plain values, to be stored and compared."""
    return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v
            for k, v in vars(args).items() if k != "resume"}


def open_run(args):
    """Sets args.out; returns the state to resume from, or None. ValueError rather than overwrite."""
    name = "-".join([args.data.replace(":", "-").replace("/", "-"), args.recipe, args.disc,
                     str(args.vocab), f"s{args.seed}"])
    out, number = args.out or Path("runs", name), 1
    while not (args.out or args.resume) and checkpoint.exists(out / "ckpt.pt"):
        number += 1                             # nobody chose this name: take the next free one
        out = Path("runs", f"{name}-{number}")
    args.out = out
    if not args.resume:
        if checkpoint.exists(out / "ckpt.pt"):
            raise ValueError(f"{out} holds a run already: --resume to continue it, or another "
                             "--out")
        out.mkdir(parents=True, exist_ok=True)
        return None
    state = checkpoint.load(out / "ckpt.pt")
    if "config" not in state or "optimizer" not in state:
        raise ValueError(f"{out}/ckpt.pt is not a checkpoint of train.py")
    then, now = state["config"], config_of(args)
    args.precision = now["precision"] = then.get("precision")       # a run keeps its precision
    differ = [k for k in now if k not in ("out", "device", "knn_every") and now[k] != then.get(k)]
    if differ:
        raise ValueError("--resume with other flags than the run's: " + ", ".join(
            f"--{k.replace('_', '-')} was {then.get(k)}, is {now[k]}" for k in differ))
    return state


def init_run_dir(args, trainer, fresh):
    """config.json, and a log without lines that are not of this run or will come again."""
    if fresh:
        (args.out / "results.json").unlink(missing_ok=True)
    done = trainer.epoch * trainer.steps_per_epoch + trainer.step_in_epoch
    checkpoint.truncate_log(args.out / "metrics.jsonl", "step", done)
    config = config_of(args) | {"hardware": precision.hardware_info(args.device)}
    checkpoint.write_json(args.out / "config.json", config)


def setup(args, state):
    """What comes before step 1 -> (Trainer, checkpoint manager, held-out images)."""
    torch.manual_seed(args.seed)
    with distributed.rank_zero_first():                     # it may download
        teacher = teachers.load_teacher(args.teacher).to(args.device)
        images = data.load(args.data, "train", args.image_size, args.train_images, args.seed,
                           args.storage)
    if args.image_size % teacher.patch:
        raise ValueError(f"--image-size {args.image_size} is not a multiple of the teacher's patch, "
                         f"{teacher.patch} pixels")
    student = checkpoint.STUDENTS[args.recipe](args, teacher.width).to(args.device)
    manager = checkpoint.Manager(args.out / "ckpt.pt", SAVE_MINUTES, images.fingerprint())
    images, held_out = split_held_out(images, args.seed)
    trainer = Trainer(args, teacher, student, images)
    if state:
        manager.check_data(state)
        trainer.load(state)
    else:
        student.fit(trainer.encode)
        distributed.broadcast_parameters(student)
    if distributed.rank() == 0:
        init_run_dir(args, trainer, fresh=not state)
    count = lambda module: sum(p.numel() for p in module.parameters()) / 1e6    # noqa: E731
    bits = args.length * math.log2(args.vocab)
    print(f"{len(images)} images, teacher {count(teacher):.1f} M parameters, student "
          f"{count(student):.1f} M, {args.length} symbols of {args.vocab}: {bits:.0f} bits an image, "
          f"{args.device} in {args.precision} -> {args.out}", flush=True)
    return trainer, manager, held_out


def split_held_out(images, seed):
    """Training images -> those to train on, and up to 1000 (5 % at most) for the monitor."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    n = min(1000, len(images) // 20)
    if n < 2:
        raise ValueError(f"{len(images)} training images are too few: the monitor alone needs 40 "
                         "(1 in 20)")
    return images.subset(order[n:]), images.subset(order[:n])


def run(args):
    check(args)
    problem = data.evaluation_problem(args.data)
    if problem:                                             # not after hours of training
        print(f"the run will end without evaluation: {problem}")
    with distributed.rank_zero_first():                     # it may put a checkpoint in its place
        state = open_run(args)
    start = time.time()
    trainer, manager, held_out = setup(args, state)
    with manager:
        while trainer.epoch < args.epochs:
            for record in trainer.train(manager):
                with distributed.rank_zero_first():         # the others wait: it may take long
                    if distributed.rank() == 0:
                        log_line(trainer, record, held_out)
                if trainer.step_in_epoch == 0 or manager.should_save():
                    manager.save(trainer.state())
    if distributed.rank() == 0:
        finish(args, held_out, evaluation=not problem)
        print(f"finished in {duration(time.time() - start)}")


def finish(args, held_out, evaluation):
    """The evaluation and the figures, from the checkpoint as written."""
    out = args.out
    config, teacher, student = checkpoint.load_model(out / "ckpt.pt", args.device)
    checkpoint.previous(out / "ckpt.pt").unlink(missing_ok=True)    # of no use: the last is intact
    if evaluation:
        results = evaluate.evaluate(teacher, student, config)
        evaluate.print_table(results)
        checkpoint.write_json(out / "results.json", evaluate.summary(results))
    titles = [held_out.classes[y] if y >= 0 else "" for y in held_out.labels[:8]]
    visualize.figure1(teacher, student, held_out.get(torch.arange(min(8, len(held_out)))), titles, out / "figure1.png",
                      args.image_size)
    visualize.curves([out], out / "curves.png")
    print(f"{out}: " + " ".join(sorted(f.name for f in out.iterdir())))


def main():
    args = parse()
    try:
        args.device = distributed.init(args.device)
        run(args)
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"train.py: {error}") from None
    distributed.cleanup()


if __name__ == "__main__":
    main()
