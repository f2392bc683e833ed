"""Trains the student: pictures in, at most 8 symbols out, no labels (paper, section 3).

    python train.py                                  # embedded pictures, 2 CPU cores, a few minutes
    python train.py --disc softmax --tau 0.12        # the discretizer and temperature of Figure 1
    python train.py --preset paper --data cifar10    # the paper's sizes; wants a GPU and a network

One step, for B pictures in V augmented views:

    z_t = E_T(x)          p_t = P_T(z_t[CLS])                   the frozen teacher
    s   = D_S(z_t)        p_s^(n) = P_S(E_S(s[:n]))             n = 1, 2, 4, 8 symbols
    L   = sum_i sum_j lambda^j H(p_t^(i), p_s^(i,j)) + exploration terms

Writes OUT/config.json, OUT/metrics.jsonl (see --knn-every), OUT/ckpt.pt (see checkpoint.py), and
at the end the evaluation (OUT/results.json) and the figures (OUT/figure1.png, OUT/curves.png).
"""
import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch

import checkpoint
import data
import discretize
import distributed
import evaluate
import losses
import model
import visualize

# What a preset changes in the flags' defaults. `small` is the defaults themselves.
PRESETS = {
    "small": {},
    "cifar10": dict(data="cifar10", teacher="cifar10", train_images=None, test_images=None,
                    vocab=256, descriptor_depth=4, interpreter_depth=4, batch_size=256, epochs=3,
                    rounds=1, local_axes=1000, mirror=True, unit_length=True),
    "paper": dict(data="cifar10", teacher="dino_vitb16", image_size=224,
                  train_images=None, test_images=None,
                  descriptor_depth=6, descriptor_heads=8, interpreter_depth=12, interpreter_heads=6,
                  prototypes=8192, hidden=2048, bottleneck=256, vocab=512, straight_through=False,
                  prototype_source="ema", centering="centre", pairing="same",
                  teacher_temp_start=0.04, teacher_temp=0.07, student_temp=0.1,
                  draft=False, plain=False, neighbours=0, directions=0, regression=0.0,  # ours, off
                  epochs=140, batch_size=64, lr=5e-4, warmup_epochs=10, weight_decay_end=0.4,
                  knn_every=5),
}


def data_flags(add):
    add("--data", default="shapes",
        help="shapes (drawn by data.py), cifar10, cifar100, stl10 or folder:PATH")
    add("--train-images", type=data.image_count, default=20000,
        help="at most so many, or all; fewer: shorter epochs")
    add("--test-images", type=data.image_count, default=5000,
        help="at most so many, or all; for the evaluation at the end only")
    add("--image-size", type=int, default=32,
        help="pixels; what the teacher was trained on, or a multiple of its patch")
    add("--views", type=int, default=4,
        help="V, augmented views per picture; 1 trains on same-view pairs only")
    add("--plain", action=argparse.BooleanOptionalAction, default=True,
        help="the first view is the picture as it is, as it will be described (not of "
             "--cache-views); the paper: no")
    add("--cache-views", type=int, default=0,
        help="keep the teacher's tokens of so many views of each picture in memory (bf16), draw "
             "--views of them per step and run the teacher no more: for large teachers, few "
             "pictures, many epochs; 0: new views in every step")
    add("--batch-size", type=int, default=64,
        help="B, pictures per step, of all processes together; the teacher sees B * V views")
    add("--accumulate", type=int, default=1,
        help="parts that a step's batch goes through one by one, when memory is short. BatchNorm, "
             "--balance, centre and Sinkhorn then see a part, not the batch")


def network_flags(add):
    add("--teacher", default="shapes",
        help=f"{', '.join(model.HUB)}, a name in weights/, or a file")
    add("--random-teacher", action="store_true",
        help="an untrained dino_* teacher, to try sizes without a network")
    add("--length", type=int, default=8, help="T, symbols per picture, a power of two")
    add("--descriptor-depth", type=int, default=2, help="blocks; each costs T sequential steps")
    add("--descriptor-heads", type=int, default=4)
    add("--interpreter-depth", type=int, default=2, help="blocks")
    add("--interpreter-heads", type=int, default=4)
    add("--draft", action=argparse.BooleanOptionalAction, default=True,
        help="symbols start as residual k-means of the CLS, which the descriptor must tell from "
             "the patches; the paper: no")
    add("--local-axes", type=int, default=0,
        help="what the first symbol leaves is told in the principal axes of so many pictures "
             "nearest to its centre: more per bit (1000), but later symbols mean nothing without "
             "the first; 0: in the same axes after all")
    add("--prototypes", type=int, default=1024,
        help="P, outputs of the projector; more for more varied data")
    add("--hidden", type=int, default=512,
        help="width of the projector's MLP with --prototype-source ema")
    add("--bottleneck", type=int, default=128,
        help="width in front of the prototypes with --prototype-source ema")


def loss_flags(add):
    add("--prototype-source", choices=["ema", "kmeans"], default="kmeans",
        help="P_T: the EMA of P_S (the paper), or P_T = P_S = fixed k-means centres of the "
             "teacher's CLS (holds more)")
    add("--regression", type=float, default=3.0,
        help="weight of the squared error of z_s and gists from the teacher's CLS itself; 0: off, "
             "as in the paper")
    add("--neighbours", type=int, default=50,
        help="the student's space is whitened by what tells pictures from so many nearest ones (at "
             "most a tenth of all); 0: off, the paper")
    add("--mirror", action=argparse.BooleanOptionalAction, default=False,
        help="space and k-means see the mirror image of each picture too: twice as many for the "
             "same teacher, where a mirror image could be a picture of the data")
    add("--rounds", type=int, default=3,
        help="how often, with neighbours in the space of the round before; 1 where the nearest are "
             "often of another kind")
    add("--directions", type=int, default=32,
        help="then the space keeps so many directions, those in which pictures differ most; 0: "
             "all, the paper")
    add("--unit-length", action=argparse.BooleanOptionalAction, default=False,
        help="all CLS are of one length in the student's space: symbols tell directions alone, "
             "which is what k-NN compares")
    add("--ema", type=float, default=0.996,
        help="momentum of P_T with --prototype-source ema, to 1 by a cosine")
    add("--lam", type=float, default=1.0,
        help="lambda: < 1 favours short prefixes, 1 treats all alike, > 1 favours the full "
             "sequence")
    add("--pairing", choices=["same", "cross"], default="same",
        help="a view answers for itself (the paper's formula) or for the other views (DINO)")
    add("--centering", choices=["centre", "sinkhorn", "none"], default="none",
        help="against collapse of --prototype-source ema: DINO's centre, or Sinkhorn (stronger); "
             "fixed prototypes need none")
    add("--teacher-temp", type=float, default=0.1,
        help="after warm-up; lower: sharper, harder targets")
    add("--teacher-temp-start", type=float, default=0.1, help="before warm-up (30 epochs at most)")
    add("--student-temp", type=float, default=0.1)
    add("--explore", choices=["base", "entropy", "info", "combined"], default="base",
        help="section 3.4")
    add("--alpha", type=float, default=0.01,
        help="weight of the symbols' entropy with --explore entropy, combined")
    add("--beta", type=float, default=0.05,
        help="weight of a sequence's information with --explore info, combined")
    add("--balance", type=float, default=0.0,
        help="weight of the entropy of the batch's mean prediction; without a draft, 2 keeps all "
             "symbols in use")


def optimiser_flags(add):
    add("--epochs", type=int, default=2)
    add("--lr", type=float, default=2e-3, help="peak; lower it for larger networks")
    add("--lr-end", type=float, default=1e-5)
    add("--warmup-epochs", type=float, default=0.2)
    add("--weight-decay", type=float, default=0.04)
    add("--weight-decay-end", type=float, default=0.04,
        help="reached by a cosine; DINO: 0.4, for long runs")
    add("--clip", type=float, default=2.0, help="largest norm of the gradient")


def run_flags(add):
    add("--out", type=Path, default=None,
        help="run directory; default runs/DATA-DISC-VOCAB-sSEED, with -2, -3 … if taken")
    add("--resume", action="store_true", help="continue from OUT/ckpt.pt, to the bit on a CPU")
    add("--save-minutes", type=float, default=10,
        help="minutes between checkpoints within an epoch: as much is lost in a crash; "
             "0: after each epoch only")
    add("--overwrite", action="store_true", help="start anew although OUT holds a checkpoint")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--knn-every", type=float, default=0.25,
        help="epochs between k-NN on held-out training pictures, 0: never. Below 1 the log has a "
             "line as often, otherwise after each epoch")
    add("--evaluate", action=argparse.BooleanOptionalAction, default=True,
        help="evaluate on the test part at the end")


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, default="small",
                   help="small: embedded data and teacher, minutes on a CPU; cifar10: all its "
                        "pictures, the shipped teacher, for one GPU; paper: its sizes and recipe")
    data_flags(p.add_argument_group("data").add_argument)
    network_flags(p.add_argument_group("networks").add_argument)
    discretize.add_flags(p)
    loss_flags(p.add_argument_group("loss").add_argument)
    optimiser_flags(p.add_argument_group("optimisation").add_argument)
    run_flags(p.add_argument_group("run").add_argument)
    preset = p.parse_known_args(argv)[0].preset
    p.set_defaults(**PRESETS[preset])
    return p.parse_args(argv)


def check(args):
    """Flags that would fail later, or silently do nothing. Raises ValueError."""
    for name in ("train_images", "test_images", "image_size", "views", "batch_size", "epochs",
                 "accumulate", "descriptor_depth", "descriptor_heads", "interpreter_depth",
                 "interpreter_heads", "prototypes", "hidden", "bottleneck", "student_temp",
                 "teacher_temp", "teacher_temp_start", "lr", "lam", "clip", "rounds"):
        value = getattr(args, name)
        if value is not None and not value > 0:         # None: all images; nan is not above, either
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    for name in ("neighbours", "directions", "local_axes", "save_minutes", "knn_every"):
        if not getattr(args, name) >= 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be below 0, and is "
                             f"{getattr(args, name)}")
    if args.draft and not args.regression:
        raise ValueError("--draft learns what to say by --regression; set it above 0, or add "
                         "--no-draft")
    if args.local_axes and not (args.draft and args.directions):
        raise ValueError("--local-axes needs --draft, and --directions to be axes of; without "
                         "them add --local-axes 0")
    distributed.check_batch(args.batch_size, args.accumulate)
    if args.cache_views and args.cache_views < args.views:
        raise ValueError(f"--cache-views {args.cache_views} are too few for --views {args.views}")
    try:
        torch.empty(0, device=args.device)
    except Exception as error:             # no driver, no such GPU, no such word: each another kind
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}; "
                         "use --device cpu") from None


def split_held_out(pictures, seed):
    """Training pictures -> those to train on, and up to 1000 (5 % at most) for the monitor."""
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
    n = min(1000, len(pictures) // 20)
    if n < 2:
        raise ValueError(f"{len(pictures)} training pictures are too few: the monitor alone needs "
                         "40 (1 in 20)")
    return tuple(data.ImageSet(pictures.images[i], pictures.labels[i], pictures.classes)
                 for i in (order[n:], order[:n]))


@torch.no_grad()
def fit_teacher_statistics(teacher, student, head, pictures, args):
    """The student's space, from two views of 4000 pictures and the neighbours of up to 20 000 (and
    of their mirror images), and k-means of these."""
    augment, size = data.augmentation(args.data, args.image_size), args.image_size

    def encode(x):
        with evaluate.autocast(torch.device(args.device)):
            return teacher(x).float()

    def batches(count):
        return (x.to(args.device) for x in pictures.images[:count].split(args.batch_size))

    cls = [encode(augment(x, 2, size).flatten(0, 1))[:, 0].unflatten(0, (2, len(x)))
           for x in batches(4000)]
    patches = [encode(augment(x, 1, size)[0])[:, 1:] for x in batches(500)]
    student.fit_space(torch.cat(cls, 1), torch.cat(patches))
    anchored, draft = isinstance(head, model.Anchors), student.draft
    if anchored or draft or args.neighbours or args.directions:     # the paper needs none of it
        y = torch.cat([student.whitened(encode(data.normalize(x, size))[:, 0])
                       for part in batches(20000)
                       for x in (part, *[part.flip(3)] * args.mirror)])
        neighbours = min(args.neighbours, len(y) // 10)
        for _ in range(args.rounds if neighbours else 0):
            y = student.draw_together(y, neighbours)
        if args.directions:
            y = student.project(y, args.directions)
        y = student.lengthen(y)
        if anchored:
            head.fit(y)
        if draft:
            draft.fit(y, model.neighbour_means(y, neighbours) if neighbours else y,
                      args.local_axes)


def free_memory():
    """Bytes that a process can still have; infinity where the system does not say (not Linux)."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    except OSError:
        return math.inf


@torch.no_grad()
def cache_views(teacher, images, args):
    """Tokens of --cache-views views of uint8 pictures (n, 3, H, W): (n, C, N+1, d) bf16 in main
    memory. Drawn from the seed alone: a resumed run has the same. Raises ValueError: too many."""
    n, size, device = args.cache_views, args.image_size, torch.device(args.device)
    shape = len(images), n, 1 + (size // teacher.patch) ** 2, teacher.width
    need, free = 2 * math.prod(shape) * distributed.world(), free_memory()  # 2 bytes to a number
    if need > 0.9 * free:
        raise ValueError(f"--cache-views {n} takes {need / 1e9:.3g} GB of memory, and "
                         f"{free / 1e9:.3g} are free; fewer views or --train-images, or 0 to run "
                         "the teacher in every step")
    print(f"keeping the teacher's tokens of {n} views a picture: {need / 1e9:.3g} GB", flush=True)
    cache, augment = torch.empty(shape, dtype=torch.bfloat16), data.augmentation(args.data, size)
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus), evaluate.autocast(device):
        torch.manual_seed(args.seed)
        for kept, x in zip(cache.split(args.batch_size), images.split(args.batch_size)):
            views = augment(x.to(device), n, size).flatten(0, 1)                # (C*b, 3, S, S)
            kept.copy_(teacher(views).unflatten(0, (n, -1)).transpose(0, 1))    # (b, C, N+1, d)
    return cache


def see(teacher, images, args):
    """z_t (V*B, N+1, d) of V views of uint8 pictures (B, 3, H, W), new ones but for --plain's; or
    (B, V, N+1, d) of the cache, put in that order."""
    if images.dtype == torch.bfloat16:
        return images.transpose(0, 1).flatten(0, 1).float()
    augment, size = data.augmentation(args.data, args.image_size), args.image_size
    views = [data.normalize(images, size)] if args.plain else []
    if args.views > len(views):
        views.append(augment(images, args.views - len(views), size, True).flatten(0, 1))
    return teacher(torch.cat(views))


def forward(teacher, student, head, softmax, images, temperature, args):
    """The step at the top of this file: what `see` takes -> loss and what the log wants."""
    v, b = args.views, len(images)
    with torch.no_grad():
        tokens = see(teacher, images, args)                                     # z_t (V*B, N+1, d)
        y = student.space(tokens[:, :1])[:, 0]                     # its CLS, in the student's space
        p_t = softmax(head(y).unflatten(0, (v, b)), temperature)                # (V, B, P)
    said = student.describe(tokens)                                             # T symbols each
    z_s = student.interpret(said.embeddings, said.drafts)                       # (V*B, D, d)
    logits = student.projector(z_s.transpose(0, 1)).unflatten(1, (v, b))        # p_s (D, V, B, P)
    loss, entropies = losses.granular_dino_loss(p_t, logits, args.lam, args.student_temp,
                                                args.pairing)
    regression, unexplained = losses.regression_loss(y, z_s, said.gists)
    total = loss + said.aux + args.regression * regression + losses.exploration_loss(
        said.weights, said.logits, args.explore, args.alpha, args.beta, args.balance)
    with torch.no_grad():
        target = losses.pair_views(p_t, v, args.pairing)[0]                     # of the first view
        # p_s = sum_n p_s^(n), normalised
        joint = (logits[:, 0].float() / args.student_temp).softmax(-1).mean(0)
        kl = target * (target.clamp(min=1e-12) / joint.clamp(min=1e-12)).log()
        log = {"loss": total, "dino_loss": loss, "aux": said.aux,
               "unexplained_first": unexplained[0], "unexplained": unexplained[-1],
               "teacher_entropy": losses.entropy(p_t).mean(),
               "kl": kl.sum(-1).mean(),
               "symbol_entropy": losses.symbol_entropy(said.logits),
               "information": losses.sequence_information(said.weights)}
    return total, {name: value.detach().float() for name, value in log.items()}


COUNTERS = ("epoch", "seconds", "at", "spent", "sums")      # of a Trainer; they go into checkpoints


class Trainer:
    """Everything that changes during a run; state() and load() are what a checkpoint holds."""

    def __init__(self, args, teacher, student, head, images):
        self.args, self.images = args, images
        self.teacher, self.student, self.head = teacher, student, head
        self.cache = cache_views(teacher, images, args) if args.cache_views else None
        self.softmax = losses.TeacherSoftmax(args.prototypes, args.centering).to(args.device)
        self.optimizer = torch.optim.AdamW(losses.parameter_groups(student), lr=args.lr, fused=True)
        half = evaluate.autocast(torch.device(args.device)).fast_dtype == torch.float16
        self.scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=half)
        self.epoch, self.seconds = 0, 0.0           # that are done
        self.at, self.spent = 0, 0.0                # steps and seconds of the present one,
        self.sums = {}                              # over steps since the last line of log
        self.steps_per_epoch = len(images) // args.batch_size
        if not self.steps_per_epoch:
            raise ValueError(f"--batch-size {args.batch_size} is more than the {len(images)} "
                             "training pictures")

    def state(self):
        parts = {name: getattr(self, name).state_dict()
                 for name in ("student", "head", "softmax", "optimizer", "scaler")}
        rng = {"cpu": torch.get_rng_state()}
        if self.args.device.startswith("cuda"):
            rng["cuda"] = torch.cuda.get_rng_state(self.args.device)
        return parts | {"config": config_of(self.args), "teacher": self.teacher.vit.state_dict(),
                        "rng": rng} | {name: getattr(self, name) for name in COUNTERS}

    def load(self, state):
        for name in ("student", "head", "softmax", "optimizer", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        for name in COUNTERS:
            setattr(self, name, state[name])
        self.sums = {name: value.to(self.args.device) for name, value in self.sums.items()}
        torch.set_rng_state(state["rng"]["cpu"])
        if "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.args.device)

    def schedule(self, step):
        """Sets learning rate, weight decay and the discretizer's temperature -> the teacher's."""
        args, steps = self.args, self.args.epochs * self.steps_per_epoch
        warmup = int(args.warmup_epochs * self.steps_per_epoch)
        disc, done = self.student.disc, step / steps
        losses.set_schedule(self.optimizer,
                            losses.warmup_cosine(args.lr, args.lr_end, step, steps, warmup),
                            losses.cosine(args.weight_decay, args.weight_decay_end, done))
        disc.tau = discretize.anneal(args.tau_start, disc.final_tau, done)
        return losses.warmup_linear(args.teacher_temp_start, args.teacher_temp, step,
                                    min(30, args.epochs) * self.steps_per_epoch)

    def fetch(self, batch):
        """Indices of pictures (B,) -> what `see` takes, for this process's part of them."""
        mine = distributed.mine(batch)
        if self.cache is None:
            return self.images[mine].to(self.args.device, non_blocking=True)
        views = torch.rand(len(batch), self.args.cache_views).argsort(1)[:, :self.args.views]
        return self.cache[mine[:, None], distributed.mine(views)].to(self.args.device)

    def step(self, images, step):
        """One optimiser step on what `fetch` gave; returns the figures to log."""
        args, logs = self.args, []
        temperature = self.schedule(step)
        self.optimizer.zero_grad()
        for part in images.chunk(args.accumulate):
            with evaluate.autocast(torch.device(args.device)):
                loss, log = forward(self.teacher, self.student, self.head, self.softmax, part,
                                    temperature, args)
            self.scaler.scale(loss / args.accumulate).backward()
            logs.append(torch.stack(list(log.values())))
        distributed.average_gradients(self.student)
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), args.clip)
        if args.prototype_source == "ema" and self.epoch == 0 and args.epochs > 1:
            self.student.projector.prototypes.grad = None          # DINO: frozen in the first epoch
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.student.disc.after_step()
        if args.prototype_source == "ema":
            steps = args.epochs * self.steps_per_epoch
            losses.ema_update(self.head, self.student.projector,
                              losses.cosine(args.ema, 1.0, step / steps))
        return dict(zip(log, distributed.mean(torch.stack(logs).mean(0))))

    def next_line(self):
        """The step of this epoch after which the log has its next line."""
        steps, every = self.steps_per_epoch, self.args.knn_every
        parts = min(steps, max(1, round(1 / every))) if every else 1
        return min(n for i in range(parts) if (n := steps * (i + 1) // parts) > self.at)

    def train_part(self, keeper=None):
        """Goes on to the next line of the log, at most to the epoch's end, through the pictures in
        an order that depends on seed and epoch alone; mean figures since the line before. keeper:
        saves in between when it is due."""
        args, steps, start = self.args, self.steps_per_epoch, time.time() - self.spent
        generator = torch.Generator().manual_seed(args.seed + self.epoch)
        order = torch.randperm(len(self.images), generator=generator)
        end = self.next_line()
        self.student.train()
        while self.at < end:
            batch = order[self.at * args.batch_size:(self.at + 1) * args.batch_size]
            log = self.step(self.fetch(batch), self.epoch * steps + self.at)
            log["steps"] = torch.ones(())
            self.sums = {name: self.sums.get(name, 0) + value for name, value in log.items()}
            self.at, self.spent = self.at + 1, time.time() - start
            save = keeper and self.at < end and keeper.due()    # the last: with its line of log
            if save or self.at % 20 == 0 or self.at == end:     # rarely: .item() waits for a GPU
                self.report()
            if save:
                keeper.save(self.state())
        count = self.sums.pop("steps")
        record = {"epoch": self.epoch + end / steps, "step": self.epoch * steps + end,
                  "seconds": round(self.seconds + self.spent, 2),
                  "images_per_s": round(end * args.batch_size / self.spent, 1),
                  "lr": self.optimizer.param_groups[0]["lr"], "tau": self.student.disc.tau,
                  "teacher_entropy_max": math.log(args.prototypes),
                  **{name: (value / count).item() for name, value in self.sums.items()}}
        self.sums = {}
        if end == steps:
            self.epoch, self.seconds = self.epoch + 1, self.seconds + self.spent
            self.at, self.spent = 0, 0.0
        return record

    def report(self):
        """The progress line; stops the run when the loss or a weight is no number any more."""
        args, loss = self.args, (self.sums["loss"] / self.sums["steps"]).item()
        finite = all(p.isfinite().all() for p in self.student.parameters())
        if not (finite and math.isfinite(loss)):
            saved = checkpoint.exists(args.out / "ckpt.pt")
            kept = f"{args.out}/ckpt.pt is from before" if saved else "nothing is saved yet"
            raise FloatingPointError(
                f"the loss is {loss} in epoch {self.epoch + 1}, or a weight no number; {kept}. Try "
                "a lower --lr, a higher --tau or a longer --warmup-epochs")
        left = (args.epochs - self.epoch) * self.steps_per_epoch - self.at
        print(f"\repoch {self.epoch + 1}/{args.epochs}  step {self.at}/{self.steps_per_epoch}  "
              f"loss {loss:.3f}  {self.at * args.batch_size / self.spent:.0f} images/s  "
              f"ETA {left * self.spent / self.at / 60:.1f} min ", end="", flush=True)


def monitor(trainer, held_out, knn):
    """Collapse figures of hard symbols on pictures not trained on, and, where there are labels and
    `knn`, k-NN (k = 20) per prefix: half of those pictures ask, the other half is the gallery."""
    args, trainer.student = trainer.args, trainer.student.eval()
    code = evaluate.encode(trainer.student, trainer.teacher, held_out, args.image_size)
    figures = evaluate.code_figures(code["ids"], args.vocab)
    if knn and held_out.labelled:
        half, y, z = len(held_out) // 2, held_out.labels, code["z"]
        k = min(20, len(y) - half)
        scores = [evaluate.knn_accuracy(x[half:], y[half:], x[:half], y[:half], k)[0] for x in z]
        figures |= {"knn_prefix": scores, "knn_top1": scores[-1]}
    return figures


def alarms(record):
    """Words for what collapse looks like in the figures of a line of the log."""
    share = record["teacher_entropy"] / record["teacher_entropy_max"]
    if share < 0.005:
        yield ("the teacher's entropy is 0: all prototypes but one are dead (raise --teacher-temp, "
               "--centering sinkhorn)")
    if share > 0.995:
        yield "the teacher's entropy is ln P: its targets say nothing (lower --teacher-temp)"
    if max(record["perplexity"]) < 1.5:
        yield "one symbol is said for every picture (raise --balance or --tau, lower --lr)"


def config_of(args):
    """The flags as plain values, to be stored and compared."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()
            if k not in ("resume", "overwrite")}


def machine(device):
    """What a run's figures of speed depend on."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads(),
            "processor": platform.machine(),
            "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None}


def open_run(args):
    """The run directory; the state to resume from, or None. ValueError rather than overwrite."""
    name = f"{args.data.replace(':', '-').replace('/', '-')}-{args.disc}-{args.vocab}-s{args.seed}"
    out, again = args.out or Path("runs", name), 1
    while not (args.out or args.resume or args.overwrite) and checkpoint.exists(out / "ckpt.pt"):
        again += 1                                  # nobody chose this name: take the next free one
        out = Path("runs", f"{name}-{again}")
    args.out = out
    state = None
    if args.resume:
        state = checkpoint.load(out / "ckpt.pt")
        if "config" not in state or "optimizer" not in state:
            raise ValueError(f"{out}/ckpt.pt is no checkpoint of train.py")
        now, free = config_of(args), ("out", "device", "evaluate", "knn_every", "save_minutes")
        differ = [k for k in now if k not in free and now[k] != state["config"].get(k)]
        if differ:
            changes = (f"--{k.replace('_', '-')} was {state['config'].get(k)}, is {now[k]}"
                       for k in differ)
            raise ValueError("--resume with other flags than the run's: " + ", ".join(changes))
    elif checkpoint.exists(out / "ckpt.pt") and not args.overwrite:
        raise ValueError(f"{out} holds a run already: --resume to continue it, --overwrite to "
                         "start anew, or another --out")
    out.mkdir(parents=True, exist_ok=True)
    return out, state


def first_files(args, out, trainer, fresh):
    """config.json, and a log without lines that are not of this run or come again."""
    for name in ("ckpt.pt", "ckpt.prev.pt", "results.json") if fresh else ():
        (out / name).unlink(missing_ok=True)                # --overwrite: they are another run's
    done = trainer.epoch * trainer.steps_per_epoch + trainer.at
    checkpoint.cut_log(out / "metrics.jsonl", "step", done)
    checkpoint.write(out / "config.json", lambda part: part.write_text(
        json.dumps(config_of(args) | {"machine": machine(args.device)}, indent=1) + "\n"))


def start(args, out, state):
    """What comes before step 1: (Trainer, Keeper, held-out pictures), and first files in `out`."""
    torch.manual_seed(args.seed)
    with distributed.one_first():                           # it may download
        teacher = model.build_teacher(args.teacher, args.random_teacher).to(args.device)
        pictures = data.load(args.data, "train", args.image_size, args.train_images, args.seed)
    if args.image_size % teacher.patch:
        raise ValueError(f"--image-size {args.image_size} is no multiple of the teacher's patch, "
                         f"{teacher.patch} pixels")
    student, head = (m.to(args.device) for m in model.build_student(vars(args), teacher.width))
    keeper = checkpoint.Keeper(out / "ckpt.pt", args.save_minutes, pictures.fingerprint())
    pictures, held_out = split_held_out(pictures, args.seed)
    trainer = Trainer(args, teacher, student, head, pictures.images)
    if state:
        keeper.check_data(state)
        trainer.load(state)
    else:
        fit_teacher_statistics(teacher, student, head, pictures, args)
        distributed.start_alike(student, head)
    if not distributed.rank():
        first_files(args, out, trainer, fresh=not state)
    count = lambda module: sum(p.numel() for p in module.parameters()) / 1e6    # noqa: E731
    bits = args.length * math.log2(args.vocab)
    print(f"{len(pictures)} pictures, teacher {count(teacher):.1f} M parameters, "
          f"student {count(student):.1f} M, {args.length} symbols of {args.vocab}: {bits:.0f} bits "
          f"a picture -> {out}")
    return trainer, keeper, held_out


def log_part(trainer, record, held_out):
    """Monitors, prints and writes a line of the log."""
    args, last = trainer.args, trainer.epoch == trainer.args.epochs
    due = args.knn_every and (last or args.knn_every < 1 or trainer.epoch % args.knn_every == 0)
    record |= monitor(trainer, held_out, due)
    knn = f"  k-NN {record['knn_top1']:.1f} %" if "knn_top1" in record else ""
    print(f"  teacher entropy {record['teacher_entropy']:.2f}  KL {record['kl']:.2f}  perplexity "
          f"{min(record['perplexity']):.0f}-{max(record['perplexity']):.0f}{knn}")
    for words in alarms(record):
        print(f"WARNING: collapse? {words}")
    with open(args.out / "metrics.jsonl", "a") as log:
        log.write(json.dumps(record) + "\n")


def run(args):
    check(args)
    if args.evaluate:
        data.check_labels(args.data)                        # not after hours of training
    with distributed.one_first():                           # it may put a checkpoint in its place
        out, state = open_run(args)
    trainer, keeper, held_out = start(args, out, state)
    with keeper:
        while trainer.epoch < args.epochs:
            record = trainer.train_part(keeper)
            with distributed.one_first():                   # others wait: it may take long
                if not distributed.rank():
                    log_part(trainer, record, held_out)
            if trainer.at == 0 or keeper.due():             # an epoch is over
                keeper.save(trainer.state())
    if not distributed.rank():
        finish(out, args, held_out)


def finish(out, args, held_out):
    """The evaluation and the figures, from the checkpoint as written."""
    config, teacher, student = model.load_checkpoint(out / "ckpt.pt", args.device)
    checkpoint.before(out / "ckpt.pt").unlink(missing_ok=True)      # of no use: the last is whole
    if args.evaluate:
        results = evaluate.evaluate(teacher, student, config)
        evaluate.print_table(results)
        gap = {"soft_minus_hard": results["soft_minus_hard"]}   # k-NN, points
        text = json.dumps(evaluate.summary(results) | gap, indent=1) + "\n"
        checkpoint.write(out / "results.json", lambda part: part.write_text(text))
    titles = [held_out.classes[y] if y >= 0 else "" for y in held_out.labels[:8]]
    visualize.figure1(teacher, student, held_out.images[:8], titles, out / "figure1.png",
                      args.image_size)
    visualize.curves([out], out / "curves.png")
    print(f"{out}: " + " ".join(sorted(f.name for f in out.iterdir())))


def main():
    args = parse()
    try:
        args.device = distributed.join(args.device)
        run(args)
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"train.py: {error}") from None
    distributed.leave()


if __name__ == "__main__":
    main()
