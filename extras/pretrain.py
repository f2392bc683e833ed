"""DINO from scratch for a small ViT: makes the teachers that the project ships (Caron et al. 2021).

    python -m extras.pretrain --data shapes --out runs/teacher          # the shipped `shapes` teacher
    python -m extras.pretrain --data folder:PATH --width 192 --depth 6  # one for your own pictures
    python -m extras.pretrain --out runs/teacher --resume               # go on after an interruption

Student and teacher are the same ViT + projector; the teacher is the student's EMA. The student sees 2
global and several local crops, the teacher the global ones, and each student view must predict the
teacher's output for the others. Writes OUT/metrics.jsonl, OUT/ckpt.pt (everything, to resume) and
OUT/teacher.pt (the ViT alone, half precision: give it to train.py as --teacher OUT/teacher.pt).
"""
import argparse
import copy
import json
import os
import time
from pathlib import Path

import torch

import data
import losses
from evaluate import knn_accuracy
from model import DINOHead, small_vit


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--data", default="shapes", help="shapes, cifar10, cifar100, stl10 or folder:PATH")
    add("--train-images", type=int, default=None, help="use only so many; default all")
    add("--image-size", type=int, default=32, help="pixels; a multiple of the patch")
    add("--patch", type=int, default=4, help="pixels; smaller: finer tokens, quadratically slower")
    add("--width", type=int, default=128)
    add("--depth", type=int, default=4)
    add("--heads", type=int, default=2, help="64 channels each, as in DINO")
    add("--prototypes", type=int, default=1024, help="P; more for more varied data")
    add("--hidden", type=int, default=512, help="width of the projector's MLP")
    add("--bottleneck", type=int, default=128)
    add("--batch-norm", action=argparse.BooleanOptionalAction, default=True,
        help="BatchNorm in the projector; gets small runs off the ground, see losses.TeacherSoftmax")
    add("--centering", choices=["centre", "sinkhorn"], default="sinkhorn")
    add("--teacher-temp", type=float, default=0.02, help="lower: sharper targets; ln P in the log: lower it")
    add("--student-temp", type=float, default=0.1)
    add("--momentum", type=float, default=0.99, help="of the teacher's EMA, to 1 by a cosine; longer runs: 0.996")
    add("--locals", type=int, default=4, help="local crops per picture; 0: only the two global ones")
    add("--local-size", type=int, default=16)
    add("--local-crop", type=float, nargs=2, default=(0.15, 0.4), help="range of the area a local crop keeps")
    add("--batch-size", type=int, default=128)
    add("--epochs", type=float, default=10)
    add("--lr", type=float, default=1e-3, help="peak, whatever the batch size")
    add("--warmup", type=int, default=200, help="steps")
    add("--weight-decay", type=float, default=0.04)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/teacher"))
    add("--resume", action="store_true", help="continue from OUT/ckpt.pt")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--knn-every", type=int, default=400, help="steps between logs with k-NN on a held-out part of train")
    return p.parse_args(argv)


def build(args):
    """Backbone and head of student and teacher, as two ModuleDicts."""
    net = torch.nn.ModuleDict({
        "backbone": small_vit(args.image_size, args.patch, args.width, args.depth, args.heads),
        "head": DINOHead(args.width, args.prototypes, args.hidden, args.bottleneck, args.batch_norm)})
    return net.to(args.device), copy.deepcopy(net).requires_grad_(False).to(args.device)


def forward(net, crops):
    """crops: list of (V, B, 3, S, S), one entry per size -> logits (all views, B, P), one head pass."""
    cls = [net["backbone"](x.flatten(0, 1))[:, 0].unflatten(0, x.shape[:2]) for x in crops]
    cls = torch.cat(cls)                                                        # (views, B, d)
    return net["head"](cls.flatten(0, 1)).unflatten(0, cls.shape[:2])


def train_step(student, teacher, softmax, images, args, augment, local_augment):
    """One loss on one batch of uint8 pictures."""
    crops = [augment(images, 2, args.image_size)]
    if args.locals:
        crops.append(local_augment(images, args.locals, args.local_size))
    with torch.autocast(images.device.type, torch.bfloat16):
        with torch.no_grad():
            p_t = softmax(forward(teacher, crops[:1]), args.teacher_temp)
        logits = forward(student, crops)
    loss, _ = losses.granular_dino_loss(p_t, logits[None], 1.0, args.student_temp)
    return loss, p_t


@torch.no_grad()
def features(backbone, images, args):
    """CLS of uint8 pictures: (n, d)."""
    backbone.eval()
    parts = []
    for batch in images.split(500):
        with torch.autocast(args.device, torch.bfloat16):
            parts.append(backbone(data.normalize(batch.to(args.device), args.image_size))[:, 0].float())
    backbone.train()
    return torch.cat(parts)


def monitor(teacher, held_out, args):
    """k-NN top-1 of the EMA teacher on 1000 held-out training pictures, gallery 5000 others; k = 20."""
    x, y = features(teacher["backbone"], held_out.images, args), held_out.labels.to(args.device)
    return knn_accuracy(x[1000:], y[1000:], x[:1000], y[:1000], 20)[0]


def save(path, state):
    torch.save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def main():
    args = parse()
    torch.manual_seed(args.seed)
    pictures = data.load(args.data, "train", args.image_size, args.train_images, args.seed)
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(args.seed))
    held = order[:6000]                                                         # unlabelled use in training is fine
    held_out = data.ImageSet(pictures.images[held], pictures.labels[held], pictures.classes)
    student, teacher = build(args)
    softmax = losses.TeacherSoftmax(args.prototypes, args.centering).to(args.device)
    optimizer = torch.optim.AdamW(losses.parameter_groups(student), lr=args.lr)
    augment = data.augmentation(args.data)
    local_augment = copy.copy(augment)
    local_augment.crop = tuple(args.local_crop)
    args.out.mkdir(parents=True, exist_ok=True)
    steps = int(args.epochs * (len(pictures) // args.batch_size))
    step, start_epoch = 0, None
    if args.resume:
        state = torch.load(args.out / "ckpt.pt", map_location=args.device, weights_only=True)
        for module, key in ((student, "student"), (teacher, "teacher"), (softmax, "softmax"), (optimizer, "optimizer")):
            module.load_state_dict(state[key])
        step = state["step"]
        torch.set_rng_state(state["rng"].cpu())
    log = open(args.out / "metrics.jsonl", "a" if args.resume else "w")
    start = time.time()
    while step < steps:
        epoch, at = divmod(step, len(pictures) // args.batch_size)
        if at == 0 or start_epoch != epoch:
            shuffle = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(args.seed + 1 + epoch))
            start_epoch = epoch
        images = pictures.images[shuffle[at * args.batch_size:][:args.batch_size]].to(args.device)
        losses.set_schedule(optimizer, losses.warmup_cosine(args.lr, args.lr / 100, step, steps, args.warmup),
                            args.weight_decay)
        loss, p_t = train_step(student, teacher, softmax, images, args, augment, local_augment)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 2.0)
        optimizer.step()
        losses.ema_update(teacher, student, losses.cosine(args.momentum, 1.0, step / steps))
        step += 1
        if step % args.knn_every == 0 or step == steps:
            record = {"step": step, "epoch": step * args.batch_size / len(pictures), "loss": loss.item(),
                      "teacher_entropy": losses.entropy(p_t).mean().item(),
                      "prototypes_used": p_t.flatten(0, 1).argmax(1).unique().numel() / args.prototypes,
                      "knn_top1": monitor(teacher, held_out, args), "seconds": time.time() - start}
            print(json.dumps(record), flush=True)
            log.write(json.dumps(record) + "\n")
            log.flush()
            save(args.out / "ckpt.pt", {"step": step, "student": student.state_dict(), "teacher": teacher.state_dict(),
                                        "softmax": softmax.state_dict(), "optimizer": optimizer.state_dict(),
                                        "rng": torch.get_rng_state()})
            save(args.out / "teacher.pt", {k: v.half() for k, v in teacher["backbone"].vit.state_dict().items()})


if __name__ == "__main__":
    main()
