"""DINO from scratch for a small ViT: makes the teachers that the project ships (Caron et al. 2021).

    python -m extras.pretrain                   # the shipped `shapes` teacher, step by step
    python -m extras.pretrain --data folder:PATH --width 192 --depth 6 --locals 4 --epochs 100
    python -m extras.pretrain --out runs/teacher --resume          # go on after an interruption

Student and teacher are the same ViT + projector; the teacher is the student's EMA. The student sees
2 global and --locals local crops, the teacher the global ones, and each student view must predict
the teacher's output for the other views:

    L = mean over pairs i != j of H(p_t^(i), p_s^(j))                          (DINO, equation 3)

Writes OUT/metrics.jsonl, OUT/ckpt.pt (everything, to resume), OUT/teacher.pt (the ViT alone, half
precision: give it to train.py as --teacher OUT/teacher.pt) and at the end OUT/results.json: k-NN of
the 6000 pictures held out, all others being the gallery. Lines of the log have the speed, and the
share that it is of a large product's FLOP/s on this machine, measured when the run starts.
"""
import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import data
import distributed
import evaluate
import losses
from extras.benchmark import Clock, product_seconds
from model import DINOHead, small_vit
from train import config_of, machine


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument_group("data").add_argument
    add("--data", default="shapes", help="shapes, cifar10, cifar100, stl10 or folder:PATH")
    add("--train-images", type=data.image_count, help="use at most so many; default: all")
    add("--image-size", type=int, default=32, help="pixels; a multiple of the patch")
    add("--crop", type=float, nargs=2, default=None,
        help="share of the area of a global crop, from and to; default the data set's")
    add("--locals", type=int, default=0,
        help="local crops per picture besides the two global ones; they help on photographs (DINO: "
             "8) and hurt on shapes, where a part of the picture may not show the object")
    add("--local-size", type=int, default=16, help="pixels of a local crop")
    add("--local-crop", type=float, nargs=2, default=(0.15, 0.4),
        help="share of the picture's area, from and to")
    add("--batch-size", type=int, default=128, help="pictures per step, of all processes together")
    add = p.add_argument_group("network").add_argument
    add("--stem", type=int, nargs="*", default=(32, 64),
        help="channels of 3x3 convolutions in front (Xiao et al. 2021), stride 2 where their "
             "number changes: learns sooner; none: a patch embedding")
    add("--patch", type=int, default=4,
        help="pixels; with a stem, the product of its strides. Finer is quadratically slower")
    add("--width", type=int, default=128,
        help="d, a multiple of 64: there are 64 channels to a head")
    add("--depth", type=int, default=4, help="blocks")
    add("--prototypes", type=int, default=512, help="P; more for more varied data")
    add("--hidden", type=int, default=512, help="width of the projector's MLP")
    add("--bottleneck", type=int, default=128, help="width in front of the prototypes")
    add("--batch-norm", action=argparse.BooleanOptionalAction, default=True,
        help="BatchNorm in the projector: gets short runs off the ground")
    add = p.add_argument_group("loss").add_argument
    add("--centering", choices=["centre", "sinkhorn"], default="sinkhorn",
        help="centre: DINO; sinkhorn: SwAV, DINOv2")
    add("--teacher-temp", type=float, default=0.02, help="lower it when the loss stays at ln P")
    add("--student-temp", type=float, default=0.1)
    add("--momentum", type=float, default=0.99,
        help="of the teacher's EMA, to 1 by a cosine; long runs: 0.996")
    add = p.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=5)
    add("--stop", type=float,
        help="end after so many of --epochs, the schedule being theirs; --resume goes on")
    add("--lr", type=float, default=1e-3, help="peak, whatever the batch size")
    add("--lr-end", type=float, default=1e-5)
    add("--warmup", type=int, default=200, help="steps")
    add("--weight-decay", type=float, default=0.04)
    add("--clip", type=float, default=2.0, help="largest norm of the gradient")
    add = p.add_argument_group("run").add_argument
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/teacher"))
    add("--resume", action="store_true", help="continue from OUT/ckpt.pt, to the bit on a CPU")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--every", type=int, default=50,
        help="steps between lines of the log, with k-NN, and checkpoints")
    add("--save-minutes", type=float, default=10,
        help="minutes between checkpoints where --every takes longer: as much is lost in a crash; "
             "0: none in between")
    return p.parse_args(argv)


def forward(net, crops):
    """crops: list of (views, B, 3, S, S), one entry per size -> logits (all views, B, P)."""
    cls = [net["backbone"](x.flatten(0, 1))[:, 0].unflatten(0, x.shape[:2]) for x in crops]
    cls = torch.cat(cls)                                                        # (all views, B, d)
    return net["head"](cls.flatten(0, 1)).unflatten(0, cls.shape[:2])


@torch.no_grad()
def features(backbone, images, args):
    """uint8 pictures (n, 3, S, S) -> the teacher's CLS (n, d), on the CPU."""
    backbone.eval()
    with evaluate.autocast(torch.device(args.device)):
        size = args.image_size
        parts = [backbone(data.normalize(batch.to(args.device), size))[:, 0].float().cpu()
                 for batch in images.split(500)]
    backbone.train()
    return torch.cat(parts)


def quick_knn(backbone, held_out, args):
    """Weighted k-NN (k = 20) top-1 in % of the teacher's CLS: 1000 held-out pictures ask, 5000 are
    the gallery."""
    x, y, asked = features(backbone, held_out.images, args), held_out.labels, len(held_out) // 6
    return evaluate.knn_accuracy(x[asked:], y[asked:], x[:asked], y[:asked], 20)[0]


def full_knn(trainer, held_out):
    """{k: top-1 in %} of all held-out pictures; the pictures trained on are the gallery."""
    backbone, rest = trainer.teacher["backbone"], trainer.pictures
    x, asked = (features(backbone, part.images, trainer.args) for part in (rest, held_out))
    return {k: top1 for k, (top1, _) in
            evaluate.knn_accuracies(x, rest.labels, asked, held_out.labels).items()}


class Pretrainer:
    """Student, teacher (ViT and projector each) and what else changes during a run."""

    def __init__(self, args, pictures):
        self.args, self.pictures = args, pictures
        self.student = torch.nn.ModuleDict({
            "backbone": small_vit(args.image_size, args.patch, args.width, args.depth,
                                  args.width // 64, args.stem),
            "head": DINOHead(args.width, args.prototypes, args.hidden, args.bottleneck,
                             args.batch_norm)}).to(args.device)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.softmax = losses.TeacherSoftmax(args.prototypes, args.centering).to(args.device)
        self.optimizer = torch.optim.AdamW(losses.parameter_groups(self.student), lr=args.lr)
        self.augment = copy.copy(data.augmentation(args.data, args.image_size))
        self.augment.crop = tuple(args.crop or self.augment.crop)
        self.augment_local = copy.copy(self.augment)
        self.augment_local.crop = tuple(args.local_crop)
        self.steps_per_epoch = len(pictures) // args.batch_size
        if not self.steps_per_epoch:
            raise ValueError(f"--batch-size {args.batch_size} is more than the {len(pictures)} "
                             "pictures to train on: "
                             "6000 are held out for k-NN")
        self.steps, self.step, self.seconds = args.epochs * self.steps_per_epoch, 0, 0.0
        self.gflop_per_image = self.peak = None             # see `measure`

    def batch(self):
        """The pictures of the present step: an order for every epoch, from the seed alone."""
        epoch, at = divmod(self.step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.args.seed + 1 + epoch)
        order = torch.randperm(len(self.pictures), generator=generator)
        size = self.args.batch_size
        batch = distributed.mine(order[at * size:(at + 1) * size])
        return self.pictures.images[batch].to(self.args.device)

    def train_step(self):
        """One optimiser step; returns the loss and the teacher's probabilities (2, B, P)."""
        args, images = self.args, self.batch()
        crops = [self.augment(images, 2, args.image_size, True)]
        if args.locals:
            crops.append(self.augment_local(images, args.locals, args.local_size, True))
        lr = losses.warmup_cosine(args.lr, args.lr_end, self.step, self.steps, args.warmup)
        losses.set_schedule(self.optimizer, lr, args.weight_decay)
        with evaluate.autocast(torch.device(args.device)):
            with torch.no_grad():
                p_t = self.softmax(forward(self.teacher, crops[:1]), args.teacher_temp)
            logits = forward(self.student, crops)                               # (2 + locals, B, P)
        loss, _ = losses.granular_dino_loss(p_t, logits[None], 1.0, args.student_temp, "cross")
        self.optimizer.zero_grad()
        loss.backward()
        distributed.average_gradients(self.student)
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), args.clip)
        self.optimizer.step()
        losses.ema_update(self.teacher, self.student,
                          losses.cosine(args.momentum, 1.0, self.step / self.steps))
        self.step += 1
        return distributed.mean(loss.detach()).item(), p_t

    def measure(self):
        """A step that counts its FLOPs, and a large product's FLOP/s (`peak`) on this machine."""
        with FlopCounterMode(display=False) as counter:
            result = self.train_step()
        with torch.random.fork_rng():                       # it leaves the run as it was
            seconds, product = product_seconds(self.args.device, Clock(self.args.device))
        flops = counter.get_total_flops() * distributed.world()
        self.gflop_per_image = flops / self.args.batch_size / 1e9
        self.peak = distributed.world() * product / seconds
        return result

    def state(self):
        parts = {name: getattr(self, name).state_dict()
                 for name in ("student", "teacher", "softmax", "optimizer")}
        if self.args.device.startswith("cuda"):
            parts["cuda_rng"] = torch.cuda.get_rng_state(self.args.device)
        return parts | {"step": self.step, "seconds": self.seconds, "rng": torch.get_rng_state(),
                        "config": config_of(self.args)}

    def load(self, state):
        for name in ("student", "teacher", "softmax", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]
        torch.set_rng_state(state["rng"])
        if "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], self.args.device)

    def weights(self):
        """The teacher's ViT in half precision."""
        state = self.teacher["backbone"].vit.state_dict()
        return {name: value.half() if value.is_floating_point() else value
                for name, value in state.items()}


def run(args):
    file = args.out / "ckpt.pt"
    distributed.check_batch(args.batch_size)
    if checkpoint.exists(file) and not args.resume:
        raise ValueError(f"{args.out} holds a run already: --resume continues it; or another --out")
    torch.manual_seed(args.seed)
    with distributed.one_first():                           # it may download
        pictures = data.load(args.data, "train", args.image_size, args.train_images, args.seed)
    keeper = checkpoint.Keeper(file, args.save_minutes, pictures.fingerprint())
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(args.seed))
    held, rest = order[:6000], order[6000:]                   # k-NN is on pictures never trained on
    held_out = data.ImageSet(pictures.images[held], pictures.labels[held], pictures.classes)
    pictures = data.ImageSet(pictures.images[rest], pictures.labels[rest], pictures.classes)
    trainer = Pretrainer(args, pictures)
    distributed.start_alike(trainer.student, trainer.teacher)
    if args.resume:
        with distributed.one_first():                       # it may put a checkpoint in its place
            state = checkpoint.load(file)
        keeper.check_data(state)
        trainer.load(state)
    if not distributed.rank():
        args.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(config_of(args) | {"machine": machine(args.device)}, indent=1) + "\n"
        checkpoint.write(args.out / "config.json", lambda part: part.write_text(text))
        checkpoint.cut_log(args.out / "metrics.jsonl", "step", trainer.step)
    with keeper:
        train(trainer, held_out, keeper)


def train(trainer, held_out, keeper):
    """The steps that are left, with a line of the log and a checkpoint every --every."""
    args, start = trainer.args, time.time()
    last = trainer.steps
    if args.stop is not None:
        last = min(last, round(args.stop * trainer.steps_per_epoch))
    while trainer.step < last:
        loss, p_t = trainer.train_step() if trainer.peak else trainer.measure()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {trainer.step}; lower --lr, "
                                     "then --resume")
        report = trainer.step % args.every == 0 or trainer.step == last
        if not (report or keeper.due()):
            continue
        trainer.seconds, start = trainer.seconds + time.time() - start, time.time()
        entropy = distributed.mean(losses.entropy(p_t).mean()).item()
        if not distributed.rank():
            if report:
                log_step(trainer, loss, entropy, held_out)
            weights = trainer.weights()
            checkpoint.write(args.out / "teacher.pt", lambda part: torch.save(weights, part))
        keeper.save(trainer.state())
    if not distributed.rank() and held_out.labelled:
        result = {"step": trainer.step, "knn_top1": full_knn(trainer, held_out),
                  "gallery": len(trainer.pictures),
                  "queries": len(held_out)}
        text = json.dumps(result, indent=1) + "\n"
        checkpoint.write(args.out / "results.json", lambda part: part.write_text(text))
        print("results:", json.dumps(result["knn_top1"]))


def log_step(trainer, loss, entropy, held_out):
    """Prints and writes a line of the log, with k-NN where the pictures have labels."""
    args = trainer.args
    record = {"step": trainer.step, "epoch": round(trainer.step / trainer.steps_per_epoch, 3),
              "loss": loss, "teacher_entropy": entropy,
              "teacher_entropy_max": math.log(args.prototypes),
              "images_per_s": round(trainer.step * args.batch_size / trainer.seconds, 1)}
    record["gflop_per_image"] = round(trainer.gflop_per_image, 4)
    rate = record["images_per_s"] * trainer.gflop_per_image * 1e9
    record["gemm_fraction"] = round(rate / trainer.peak, 3)
    if held_out.labelled:
        record["knn_top1"] = quick_knn(trainer.teacher["backbone"], held_out, args)
    record["seconds"] = round(trainer.seconds, 1)
    print(json.dumps(record), flush=True)
    with open(args.out / "metrics.jsonl", "a") as log:
        log.write(json.dumps(record) + "\n")


def main():
    args = parse()
    try:
        args.device = distributed.join(args.device)
        run(args)
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"extras.pretrain: {error}") from None
    distributed.leave()


if __name__ == "__main__":
    main()
