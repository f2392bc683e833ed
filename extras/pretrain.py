"""DINO from scratch for a small ViT: makes the teachers that the project ships (Caron et al. 2021).

    python -m extras.pretrain                   # the shipped `shapes` teacher, step by step
    python -m extras.pretrain --data folder:PATH --width 192 --depth 6 --locals 4 --epochs 100
    python -m extras.pretrain --out runs/teacher --resume          # continue after an interruption

Student and teacher are the same ViT and projector; the teacher is the student's EMA. The student
gets 2 global and --locals local crops, the teacher the global ones, and each student view must
predict the teacher's output for the other views:

    L = mean over pairs i != j of H(p_t^(i), p_s^(j))                          (DINO, equation 3)

Writes OUT/config.json, OUT/metrics.jsonl, OUT/ckpt.pt (everything, to resume), OUT/teacher.pt (the
ViT alone in half precision, for train.py --teacher OUT/teacher.pt) and at the end OUT/results.json:
k-NN of 6000 held-out training images, or an eighth of them, with all others as the gallery.
"""
import argparse
import copy
import dataclasses
import json
import math
import time
from pathlib import Path

import torch

import checkpoint
import data
import distributed
import flags
import losses
import precision
import scoring
import teachers
from extras import probe_teacher
from extras.benchmark import count_flops, product_rate
from model import DINOHead
from progress import Progress
from train import CLIP, END_LR, SAVE_MINUTES, STUDENT_TEMP

HELD_OUT = 6000                 # images for k-NN: 1000 queries and a gallery of 5000 during a run


# ---- flags ---------------------------------------------------------------------------------------

def data_flags(add):
    add("--data", default="shapes", help="as in train.py")
    add("--train-images", type=data.image_count, help="at most this many; default all")
    add("--image-size", type=int, default=32, help="pixels, a multiple of the patch")
    add("--crop", type=float, nargs=2, default=None, metavar=("FROM", "TO"),
        help="share of the image's area in a global crop; default the data set's")
    add("--hue", type=float, metavar="TURNS",
        help="how far the hue of a view turns either way, of 1; default the data set's. 0.5: any "
             "colour, so that views can agree on shapes only")
    add("--locals", type=int, default=0,
        help="local crops per image besides the two global ones; they help on photographs (DINO: "
             "8) and hurt on shapes, where a part of the image may not show the object")
    add("--local-size", type=int, default=16, help="pixels of a local crop")
    add("--local-crop", type=float, nargs=2, default=(0.15, 0.4), metavar=("FROM", "TO"),
        help="share of the image's area in a local crop")
    add("--window", type=int, default=0,
        help="pixels: both views show the same square of the image, each at another place of an "
             "empty canvas. For scenes, whose layout is cheaper to match than their objects; 0: no")
    add("--batch-size", type=int, default=128, help="images per step, of all processes together")


def network_flags(add):
    add("--init", metavar="TEACHER", help="start from a teacher of this size, as --teacher of "
        "train.py, its position embedding interpolated; default random")
    add("--stem", type=int, nargs="*", default=(32, 64), metavar="CHANNELS",
        help="channels of 3x3 convolutions in front (Xiao et al. 2021), stride 2 where their "
             "number changes: learns sooner; none: a patch embedding")
    add("--patch", type=int, default=4,
        help="pixels; with a stem, the product of its strides. Finer is quadratically slower")
    add("--width", type=int, default=128, help="d, a multiple of 64, the channels of a head")
    add("--depth", type=int, default=4, help="blocks")
    add("--prototypes", type=int, default=512, help="P; more for more varied data")
    add("--hidden", type=int, default=512, help="width of the projector's MLP")
    add("--batch-norm", action=argparse.BooleanOptionalAction, default=True,
        help="BatchNorm in the projector: gets short runs off the ground")


def loss_flags(add):
    add("--centering", choices=["center", "sinkhorn"], default="sinkhorn",
        help="center: DINO; sinkhorn: SwAV, DINOv2")
    add("--teacher-temp", type=float, default=0.02, help="lower it when the loss stays at ln P")
    add("--momentum", type=float, default=0.99,
        help="of the teacher's EMA, to 1 by a cosine; long runs: 0.996")
    add("--epochs", type=int, default=5, help="passes over the training images")
    add("--stop", type=float,
        help="end after this many of --epochs, whose schedule it stays; --resume continues")
    add("--lr", type=float, default=1e-3, help="peak, whatever the batch size")
    add("--warmup", type=int, default=200, help="steps")
    add("--weight-decay", type=float, default=0.04, help="of matrices; none of vectors")


def run_flags(add):
    add("--seed", type=int, default=0, help="of weights, order and crops")
    add("--out", type=Path, default=Path("runs/teacher"), help="run directory")
    add("--resume", action="store_true",
        help="continue from OUT/ckpt.pt, to the bit on a CPU, in the precision of the run")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--precision", choices=precision.NAMES, default="auto", help="as in train.py")
    add("--every", type=int, default=50,
        help="steps between lines of the log, with k-NN, and checkpoints")


def parse(argv=None, description=__doc__, own_flags=None):
    """own_flags: adds the flags of a script with another Pretrainer, as ddm.py is."""
    p = argparse.ArgumentParser(description=description,
                                formatter_class=flags.HelpFormatter)
    data_flags(p.add_argument_group("data").add_argument)
    network_flags(p.add_argument_group("network").add_argument)
    loss_flags(p.add_argument_group("loss and optimisation").add_argument)
    run_flags(p.add_argument_group("run").add_argument)
    if own_flags:
        own_flags(p)
    return p.parse_args(argv)


# ---- the step ------------------------------------------------------------------------------------

def forward(net, crops, first=0):
    """crops: list of (views, B, 3, S, S), one entry per size -> logits (all views, B, P) of the
    CLS's columns from `first` on, and the CLS (all views, B, d)."""
    cls = [net["backbone"](x.flatten(0, 1))[:, 0].unflatten(0, x.shape[:2]) for x in crops]
    cls = torch.cat(cls)                                                        # (all views, B, d)
    return net["head"](cls[..., first:].flatten(0, 1)).unflatten(0, cls.shape[:2]), cls


def windows(images, side, views=2):
    """A square of `side` pixels of each image, the same for all views, at a random position of a
    canvas in the image's median colour, another one for each view: (B, 3, H, W) uint8 -> views
    tensors like it. With it no layout is left for the views to agree on (our choice)."""
    n, _, h, w = images.shape
    u = torch.rand(distributed.world_size() * n, 1 + views, 2, device=images.device)
    room = torch.tensor([h - side + 1, w - side + 1], device=images.device)
    corner = (distributed.shard(u) * room).long()                   # (B, 1 + views, 2), rows first
    axis, image = torch.arange(side, device=images.device), torch.arange(n, device=images.device)
    index = [(image[:, None, None], slice(None), corner[:, k, 0, None, None] + axis[:, None],
              corner[:, k, 1, None, None] + axis) for k in range(1 + views)]
    empty = images.flatten(2).float().median(2).values.to(images.dtype)
    empty = empty[..., None, None].expand_as(images)
    for k in range(views):
        canvas = empty.clone()
        canvas[index[1 + k]] = images[index[0]]
        yield canvas


class Pretrainer:
    """Student, teacher (ViT and projector each) and what else changes during a run.
    args.precision: resolved. Raises ValueError for fewer images than a batch.
    ddm.py and fourier.py subclass it: prefix, crops and objective are theirs to replace."""

    parts = ("student", "teacher", "centering", "optimizer", "scaler")  # they go into checkpoints
    prefix = 0                          # columns of the CLS that the projector does not see

    def __init__(self, args, images):
        self.args, self.images = args, images
        self.student = torch.nn.ModuleDict({
            "backbone": teachers.small_vit(args.image_size, args.patch, args.width, args.depth,
                                           args.width // 64, args.stem),
            "head": DINOHead(args.width - self.prefix, args.prototypes, args.hidden,
                             args.batch_norm)}).to(args.device)
        if args.init:
            self.load_backbone(teachers.load_teacher(args.init))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.centering = losses.Centering(args.prototypes, args.centering).to(args.device)
        self.optimizer = torch.optim.AdamW(losses.parameter_groups(self.student), lr=args.lr)
        self.scaler = torch.amp.GradScaler(torch.device(args.device).type,
                                           enabled=args.precision == "float16")
        augment = data.augmentation(args.data, args.image_size)
        hue = augment.strength[3] if args.hue is None else args.hue
        augment = dataclasses.replace(augment, strength=(*augment.strength[:3], hue))
        self.augment = dataclasses.replace(augment, crop=tuple(args.crop or augment.crop))
        self.augment_local = dataclasses.replace(augment, crop=tuple(args.local_crop))
        self.steps_per_epoch = len(images) // args.batch_size
        if not self.steps_per_epoch:
            raise ValueError(f"--batch-size {args.batch_size} is more than the {len(images)} "
                             "images to train on")
        self.steps, self.step, self.seconds = args.epochs * self.steps_per_epoch, 0, 0.0
        self.gflop_per_image = self.peak = None             # see `measure`

    def load_backbone(self, source):
        """The weights of the Teacher `source`. Raises ValueError where it has another size."""
        backbone, grid = self.student["backbone"], self.args.image_size // self.args.patch
        state = source.vit.state_dict()
        try:
            backbone.vit.load_state_dict(
                state | {"encoder.pos_embedding": source.positions(grid, grid)})
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError(f"--init {self.args.init} is a teacher of another size: {reason}"
                             ) from None

    def order(self, last):
        """Indices of the images of this epoch's steps that are left, (b,) each of this process, up
        to step `last`: an order for every epoch, from the seed alone."""
        epoch, start = divmod(self.step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.args.seed + 1 + epoch)
        order = torch.randperm(len(self.images), generator=generator).split(self.args.batch_size)
        end = min(self.steps_per_epoch, start + last - self.step)
        return [distributed.shard(batch) for batch in order[start:end]]

    def batches(self, last):
        """The images at `order`, (b, 3, H, W) uint8."""
        for x in self.images.batches(self.order(last)):
            yield x.to(self.args.device)

    def crops(self, images):
        """-> what the teacher and what the student gets: lists of (views, B, 3, S, S), a size
        each."""
        args = self.args
        if args.window:
            views = windows(images, args.window)
            crops = [torch.cat([self.augment(x, 1, args.image_size, True) for x in views])]
        else:
            crops = [self.augment(images, 2, args.image_size, True)]
        if args.locals:
            crops.append(self.augment_local(images, args.locals, args.local_size, True))
        return crops[:1], crops

    def objective(self, loss, cls):
        """What is minimised, from DINO's loss and the student's CLS (2 + locals, B, d)."""
        return loss

    def train_step(self, images):
        """One optimizer step; returns DINO's loss and the teacher's probabilities (2, B, P)."""
        args = self.args
        teacher_crops, student_crops = self.crops(images)
        lr = losses.warmup_cosine(args.lr, END_LR, self.step, self.steps, args.warmup)
        losses.set_schedule(self.optimizer, lr, args.weight_decay)
        with precision.autocast(args.device, args.precision):
            with torch.no_grad():
                logits_t, _ = forward(self.teacher, teacher_crops, self.prefix)
                p_t = self.centering(logits_t, args.teacher_temp)
            logits, cls = forward(self.student, student_crops, self.prefix)     # (2 + locals, B, P)
            loss = losses.dino_loss(p_t, logits, STUDENT_TEMP, "cross")
            objective = self.objective(loss, cls)
        self.optimizer.zero_grad()
        self.scaler.scale(objective).backward()
        distributed.average_gradients(self.student)
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), CLIP)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        losses.ema_update(self.teacher, self.student,
                          losses.cosine(args.momentum, 1.0, self.step / self.steps))
        self.step += 1
        return distributed.all_reduce_mean(loss.detach()).item(), p_t

    def measure(self, images):
        """A step that counts its FLOPs, and a large product's FLOP/s (`peak`) on this machine."""
        result, args = [], self.args
        flops = count_flops(lambda: result.append(self.train_step(images)))
        self.gflop_per_image = flops * distributed.world_size() / args.batch_size / 1e9
        self.peak = distributed.world_size() * product_rate(args.device, args.precision)
        return result[0]

    def state(self):
        parts = {name: getattr(self, name).state_dict() for name in self.parts}
        if self.args.device.startswith("cuda"):
            parts["cuda_rng"] = torch.cuda.get_rng_state(self.args.device)
        return parts | {"step": self.step, "seconds": self.seconds, "rng": torch.get_rng_state(),
                        "config": checkpoint.config_of(self.args)}

    def load(self, state):
        """Raises ValueError where the state is of other networks."""
        try:
            for name in self.parts:
                getattr(self, name).load_state_dict(state[name])
        except (RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise ValueError("--resume with other flags of the networks than in config.json: "
                             f"{reason}") from None
        self.step, self.seconds = state["step"], state["seconds"]
        torch.set_rng_state(state["rng"])
        if "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], self.args.device)

    def weights(self):
        """The teacher's ViT in half precision."""
        state = self.teacher["backbone"].vit.state_dict()
        return {name: value.half() if value.is_floating_point() else value
                for name, value in state.items()}


# ---- k-NN ----------------------------------------------------------------------------------------

def features(backbone, images, args):
    """An ImageSet of n images -> the teacher's CLS (n, d), on the CPU."""
    backbone.eval()
    cls = probe_teacher.features(backbone, images, args)
    backbone.train()
    return cls


def quick_knn(backbone, held_out, args):
    """Weighted k-NN (k = 20) top-1 in % of the teacher's CLS: a sixth of the held-out images are
    the queries, the others the gallery."""
    x, y, queries = features(backbone, held_out, args), held_out.labels, len(held_out) // 6
    k = min(20, len(y) - queries)
    return scoring.knn_accuracy(x[queries:], y[queries:], x[:queries], y[:queries], k)[0]


def full_knn(trainer, held_out):
    """{k: top-1 in %}: queries are all held-out images, gallery the images trained on."""
    backbone, gallery = trainer.teacher["backbone"], trainer.images
    x, queries = (features(backbone, part, trainer.args) for part in (gallery, held_out))
    return {k: top1 for k, (top1, _) in
            scoring.knn_accuracies(x, gallery.labels, queries, held_out.labels).items()}


# ---- a run ---------------------------------------------------------------------------------------

def open_run(args):
    """The state to resume from, or None; sets args.precision. ValueError rather than overwrite."""
    path, state = args.out / "ckpt.pt", None
    if args.resume:
        with distributed.rank_zero_first():                 # it may put a checkpoint in its place
            state = checkpoint.load(path)
        if not {"config", "step", *Pretrainer.parts} <= state.keys():
            raise ValueError(f"{path} is not a checkpoint of extras.pretrain")
        args.precision = state["config"]["precision"]       # a run keeps its precision
    elif checkpoint.exists(path):
        raise ValueError(f"{args.out} holds a run already: --resume continues it; or another --out")
    args.precision = precision.resolve(args.device, args.precision)
    return state


def split(images, seed):
    """-> images to train on, images held out for k-NN (none of a set without labels)."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    n = min(HELD_OUT, len(images) // 8) if images.labelled else 0
    return images.subset(order[n:]), images.subset(order[:n])


def run(args, make=Pretrainer, prepare=lambda images: images):
    """A run -> its trainer. make: Pretrainer or a subclass; prepare: of the ImageSet loaded."""
    distributed.check_batch_size(args.batch_size)
    state = open_run(args)
    torch.manual_seed(args.seed)
    with distributed.rank_zero_first():                     # it may download
        images = prepare(data.load(args.data, "train", args.image_size, args.train_images,
                                   args.seed))
    manager = checkpoint.Manager(args.out / "ckpt.pt", SAVE_MINUTES, images.fingerprint())
    images, held_out = split(images, args.seed)
    trainer = make(args, images)
    distributed.broadcast_parameters(trainer.student)
    distributed.broadcast_parameters(trainer.teacher)
    if state:
        manager.check_data(state)
        trainer.load(state)
    if distributed.rank() == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(args.out / "config.json", checkpoint.config_of(args) | {
            "hardware": precision.hardware_info(args.device)})
        checkpoint.truncate_log(args.out / "metrics.jsonl", "step", trainer.step)
    with manager:
        train(trainer, held_out, manager)
    if distributed.rank() == 0 and len(held_out):
        results = {"step": trainer.step, "knn_top1": full_knn(trainer, held_out),
                   "gallery": len(images), "queries": len(held_out)}
        checkpoint.write_json(args.out / "results.json", results)
        print("results:", json.dumps(results["knn_top1"]))
    return trainer


def train(trainer, held_out, manager):
    """The steps that are left, with a line of the log and a checkpoint every --every."""
    args, start = trainer.args, time.time()
    last = trainer.steps
    if args.stop is not None:
        last = min(last, round(args.stop * trainer.steps_per_epoch))
    with Progress("pretraining, step", last, trainer.step) as progress:
        while trainer.step < last:
            for images in trainer.batches(last):
                step = trainer.train_step if trainer.peak else trainer.measure
                loss, p_t = step(images)
                if not math.isfinite(loss):
                    raise FloatingPointError(f"the loss is {loss} at step {trainer.step}; lower "
                                             "--lr, then --resume")
                progress.update(note=lambda: f"loss {loss:.3f}")
                report = trainer.step % args.every == 0 or trainer.step == last
                if report or manager.should_save():
                    trainer.seconds, start = trainer.seconds + time.time() - start, time.time()
                    save(trainer, loss, p_t, held_out if report else None)
                    manager.save(trainer.state())


def save(trainer, loss, p_t, held_out):
    """teacher.pt, and, where held_out is given, a line of the log."""
    entropy = distributed.all_reduce_mean(losses.entropy(p_t).mean()).item()
    if distributed.rank() == 0:
        if held_out is not None:
            log_line(trainer, loss, entropy, held_out)
        weights = trainer.weights()
        checkpoint.write(trainer.args.out / "teacher.pt", lambda part: torch.save(weights, part))


def log_line(trainer, loss, entropy, held_out):
    """Prints and writes a line of the log, with k-NN where images are held out. gemm_fraction is
    the run's FLOP/s divided by those of a large matrix product in the same precision."""
    args = trainer.args
    rate = trainer.step * args.batch_size / trainer.seconds
    record = {"step": trainer.step, "epoch": round(trainer.step / trainer.steps_per_epoch, 3),
              "loss": loss, "teacher_entropy": entropy,
              "teacher_entropy_max": math.log(args.prototypes), "images_per_s": round(rate, 1),
              "gflop_per_image": round(trainer.gflop_per_image, 4),
              "gemm_fraction": round(rate * trainer.gflop_per_image * 1e9 / trainer.peak, 3)}
    if len(held_out):
        record["knn_top1"] = quick_knn(trainer.teacher["backbone"], held_out, args)
    record["seconds"] = round(trainer.seconds, 1)
    print(json.dumps(record), flush=True)
    with open(args.out / "metrics.jsonl", "a") as log:
        log.write(json.dumps(record) + "\n")


def main(make=Pretrainer):
    args = parse()
    try:
        args.device = distributed.init(args.device)
        run(args, make)
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"extras.pretrain: {error}") from None
    distributed.cleanup()


if __name__ == "__main__":
    main()
