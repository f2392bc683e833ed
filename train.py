"""Trains the student: images in, 8 symbols out, no labels (paper, section 3).

    python train.py                                  # drawn images: two to five minutes on a CPU
    python train.py --disc softmax --tau 0.12        # the default; tau of the paper's Figure 1
    python train.py --recipe paper                   # the published method, small (see README)
    python train.py --recipe paper --size paper      # and at the paper's size: wants a GPU

One step (`training_step`), for B images in V augmented views (the networks' B is V * B):

    z_t = E_T(x)          p_t = softmax((P_T(z_t[CLS]) - center) / temperature)    E_T is frozen
    s_q = disc(D_S(z_t))  p_s^(n) = softmax(P_S(E_S(s_q^[n])) / 0.1)   prefixes of n symbols
    L   = weighted mean over i, j of H(p_t^(i), p_s^(i,j)) + vq's loss + exploration + extra_loss
    P_T <- EMA of P_S     (stable.py: P_T = P_S = frozen k-means prototypes, no center)

Writes OUT/{config.json, metrics.jsonl, ckpt.pt}, and at the end the evaluation, OUT/results.json,
and the figures, OUT/{figure1,curves}.png.
"""
if __name__ == "__main__":
    print("loading PyTorch ...", flush=True)        # its import alone can take five seconds
import json
import math
import time

import torch

import checkpoint
import data
import discretize
import distributed
import evaluate
import flags
import losses
import precision
import teachers
import visualize
from progress import Progress, duration
from tokens import TrainingTokens

END_LR = 1e-5           # of the cosine (our choice; DINO: 1e-6)
CLIP = 2.0              # largest norm of the gradient (paper, section 3.3)
STUDENT_TEMP = 0.1      # DINO's
SAVE_MINUTES = 10       # between checkpoints within an epoch: the most that a crash loses
LR_WARMUP = 0.1         # of all steps, linear (DINO: 10 of 100 epochs)
TEACHER_WARMUP = 30     # epochs in which --teacher-temp reaches its end, at most (DINO)


# ---- one step ------------------------------------------------------------------------------------

def training_step(student, centering, z_t, temperature, args):
    """The step above from z_t (V*B, N+1, d), preprocessed -> (loss, values to log)."""
    v = args.views
    with torch.no_grad():
        logits_t = student.teacher_projector(z_t[:, 0]).unflatten(0, (v, -1))   # (V, B, P)
        p_t = centering(logits_t, temperature)
    sequence = student.describe(z_t)                                        # s_q of V*B views
    z_s = student.interpret(sequence.embeddings)                            # (V*B, D, d)
    logits_s = student.projector(z_s.transpose(0, 1)).unflatten(1, (v, -1))     # (D, V, B, P)
    prefix_losses = losses.dino_loss(p_t, logits_s, STUDENT_TEMP, args.pairing)     # (D,)
    loss = losses.granular_dino_loss(prefix_losses, args.lam)
    explore = losses.exploration_loss(sequence, args.explore, args.alpha, args.beta)
    extra = student.extra_loss(sequence, z_s, z_t)                          # 0 in the paper
    total = loss + sequence.aux + explore + extra
    log = {"loss": total, "dino_loss": loss, "aux": sequence.aux, "extra_loss": extra,
           "teacher_entropy": losses.entropy(p_t).mean(),
           "kl": losses.joint_kl(p_t, logits_s, STUDENT_TEMP, args.pairing),
           "symbol_entropy": losses.symbol_entropy(sequence.logits),
           "information": losses.sequence_information(sequence.weights)}
    return total, {name: value.detach().float() for name, value in log.items()}


# ---- a run ---------------------------------------------------------------------------------------

class Trainer:
    """Everything that changes during a run. checkpoint.state_of lists what of it is saved."""

    def __init__(self, args, teacher, student, images, tokens_class=TrainingTokens):
        self.args, self.teacher, self.student = args, teacher, student
        self.tokens = tokens_class(teacher, images, args)
        self.centering = losses.Centering(args.prototypes, args.centering).to(args.device)
        groups = losses.parameter_groups(student, student.slow_parameters(), args.codebook_lr)
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
        self.scaler = torch.amp.GradScaler(enabled=args.precision == "float16")
        self.epoch, self.seconds = 0, 0.0               # epochs completed, and their seconds
        self.step_in_epoch, self.elapsed = 0, 0.0       # the same within the present epoch
        self.totals = {}                                  # of the log's values since its last line
        self.steps_per_epoch = len(images) // args.batch_size
        self.steps = self.steps_per_epoch * args.epochs
        if not self.steps:
            raise ValueError(f"--batch-size {args.batch_size} is more than the {len(images)} "
                             "training images")

    def schedule(self, step):
        """Sets learning rate, weight decay, the student's temperature; returns the teacher's."""
        args, steps = self.args, self.steps
        losses.set_schedule(self.optimizer,
                            losses.warmup_cosine(args.lr, END_LR, step, steps, LR_WARMUP * steps),
                            losses.cosine(*args.weight_decay, step / steps))
        discretize.anneal(self.student, step / steps, args.explore)
        return losses.warmup_linear(*args.teacher_temp, step,
                                    min(TEACHER_WARMUP, args.epochs) * self.steps_per_epoch)

    def step(self, z_t, step):
        """One optimizer step on the teacher's tokens (V*B, N+1, d) -> the values to log."""
        args, student = self.args, self.student
        temperature = self.schedule(step)
        self.optimizer.zero_grad()
        with precision.autocast(args.device, args.precision):
            loss, log = training_step(student, self.centering, student.preprocess(z_t),
                                      temperature, args)
        self.scaler.scale(loss).backward()
        distributed.average_gradients(student)
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        if step < self.steps_per_epoch < self.steps and hasattr(student.projector, "prototypes"):
            student.projector.prototypes.grad = None        # frozen in the first epoch, as DINO's
        self.scaler.step(self.optimizer)
        self.scaler.update()
        losses.ema_update(student.teacher_projector, student.projector,
                          losses.cosine(args.ema, 1.0, step / self.steps))
        return log

    def next_line(self):
        """The step of this epoch after which the log has its next line."""
        steps, every = self.steps_per_epoch, self.args.knn_every
        parts = min(steps, max(1, round(1 / every))) if every else 1        # lines per epoch
        return min(n for i in range(parts) if (n := steps * (i + 1) // parts) > self.step_in_epoch)

    def train(self, manager):
        """The rest of the present epoch. Yields a record for each line of the log; saves in between
        where manager.should_save()."""
        start, first = time.time() - self.elapsed, self.epoch * self.steps_per_epoch
        end = self.next_line()
        batches = self.tokens.batches(self.epoch, self.step_in_epoch, self.steps_per_epoch)
        with Progress("training, step", self.steps, first + self.step_in_epoch) as progress:
            for z_t in batches:
                self.student.train()
                log = self.step(z_t, first + self.step_in_epoch) | {"steps": torch.ones(())}
                self.totals = {k: self.totals.get(k, 0) + v for k, v in log.items()}
                self.step_in_epoch += 1
                self.elapsed = time.time() - start
                save = self.step_in_epoch < end and manager.should_save()
                if save or self.step_in_epoch == end or self.step_in_epoch % 20 == 0:
                    self.check_finite()                 # rarely: .item() waits for a GPU
                progress.update(note=lambda: f"loss {log['loss']:.3f}")
                if save:
                    manager.save(checkpoint.state_of(self))
                if self.step_in_epoch == end:
                    yield self.record()
                    start, end = time.time() - self.elapsed, self.next_line()

    def record(self):
        """The log's next line; after an epoch's last step it also advances to the next epoch."""
        args, steps, end = self.args, self.steps_per_epoch, self.step_in_epoch
        count = self.totals.pop("steps")
        means = distributed.all_reduce_mean(torch.stack([*self.totals.values()]) / count).tolist()
        record = {"epoch": self.epoch + end / steps, "step": self.epoch * steps + end,
                  "seconds": round(self.seconds + self.elapsed, 2),
                  "images_per_s": round(end * args.batch_size / self.elapsed, 1),
                  "lr": self.optimizer.param_groups[0]["lr"],
                  "teacher_entropy_max": math.log(args.prototypes), **dict(zip(self.totals, means))}
        self.totals = {}
        if end == steps:
            self.epoch, self.seconds = self.epoch + 1, self.seconds + self.elapsed
            self.step_in_epoch, self.elapsed = 0, 0.0
        return record

    def check_finite(self):
        """Raises FloatingPointError when the loss or a weight is not finite."""
        loss = (self.totals["loss"] / self.totals["steps"]).item()
        if not (math.isfinite(loss) and all(p.isfinite().all() for p in self.student.parameters())):
            raise FloatingPointError(
                f"the loss is {loss} in epoch {self.epoch + 1}, or a weight is not finite; "
                f"{self.args.out} keeps what was saved before. Try a lower --lr or a higher --tau")


def log_line(trainer, record, held_out):
    """Monitors, prints and writes a line of the log."""
    args, last = trainer.args, trainer.epoch == trainer.args.epochs
    knn = args.knn_every and (last or args.knn_every < 1 or trainer.epoch % args.knn_every == 0)
    record |= evaluate.monitor(trainer, held_out, knn)
    knn = f"  k-NN {record['knn_top1']:.1f} %" if "knn_top1" in record else ""
    print(f"epoch {record['epoch']:.4g}/{args.epochs}  step {record['step']}  loss "
          f"{record['loss']:.3f}  {record['images_per_s']:.0f} images/s  teacher entropy "
          f"{record['teacher_entropy']:.2f}  KL {record['kl']:.2f}  perplexity "
          f"{min(record['perplexity']):.0f}-{max(record['perplexity']):.0f}{knn}", flush=True)
    for warning in evaluate.collapse_warnings(record):
        print(f"WARNING: collapse? {warning}")
    with open(args.out / "metrics.jsonl", "a") as log:
        log.write(json.dumps(record) + "\n")


# ---- the run directory and main ------------------------------------------------------------------

def setup(args, state, tokens_class=TrainingTokens):
    """What comes before step 1 -> (Trainer, checkpoint manager, held-out images)."""
    torch.manual_seed(args.seed)
    with distributed.rank_zero_first():                     # it may download
        teacher = teachers.load_teacher(args.teacher).to(args.device)
        images = data.load(args.data, "train", args.image_size, args.train_images, args.seed,
                           args.storage)
    if args.image_size % teacher.patch:
        raise ValueError(f"--image-size {args.image_size} is not a multiple of the teacher's "
                         f"patch, {teacher.patch} pixels")
    student = checkpoint.STUDENTS[args.recipe](args, teacher.width).to(args.device)
    manager = checkpoint.Manager(args.out / "ckpt.pt", SAVE_MINUTES, images.fingerprint())
    images, held_out = map(images.subset, data.held_out_indices(len(images), args.seed))
    trainer = Trainer(args, teacher, student, images, tokens_class)
    if state:
        manager.check_data(state)
        checkpoint.restore(trainer, state)
    else:
        student.fit(trainer.tokens.first)
        distributed.broadcast_parameters(student)
    if distributed.rank() == 0:
        checkpoint.init_run_dir(args, trainer, fresh=not state)
    count = lambda module: sum(p.numel() for p in module.parameters()) / 1e6    # noqa: E731
    bits = args.length * math.log2(args.vocab)
    print(f"{len(images)} images, teacher {count(teacher):.1f} M parameters, student "
          f"{count(student):.1f} M, {args.length} symbols of {args.vocab}: {bits:.0f} bits an "
          f"image, {args.device} in {args.precision} -> {args.out}", flush=True)
    return trainer, manager, held_out


def run(args, tokens_class=TrainingTokens):
    flags.check(args)
    problem = data.evaluation_problem(args.data)
    if problem:                                             # not after hours of training
        print(f"the run will end without evaluation: {problem}")
    with distributed.rank_zero_first():                     # it may put a checkpoint in its place
        state = checkpoint.open_run(args)
    start = time.time()
    trainer, manager, held_out = setup(args, state, tokens_class)
    with manager:
        while trainer.epoch < args.epochs:
            for record in trainer.train(manager):
                with distributed.rank_zero_first():         # the others wait: it may take long
                    if distributed.rank() == 0:
                        log_line(trainer, record, held_out)
                if trainer.step_in_epoch == 0 or manager.should_save():
                    manager.save(checkpoint.state_of(trainer))
    if distributed.rank() == 0:
        finish(args, trainer.tokens, held_out, evaluation=not problem)
        print(f"finished in {duration(time.time() - start)}")


def finish(args, tokens, held_out, evaluation):
    """The evaluation and the figures, from the checkpoint as written."""
    out = args.out
    config, teacher, student = checkpoint.load_model(out / "ckpt.pt", args.device)
    checkpoint.previous(out / "ckpt.pt").unlink(missing_ok=True)    # of no use: the last is intact
    if evaluation:
        results = evaluate.evaluate(teacher, student, config, tokens=tokens.gallery(held_out))
        evaluate.print_table(results)
        checkpoint.write_json(out / "results.json", evaluate.summary(results))
    titles = [held_out.classes[y] if y >= 0 else "" for y in held_out.labels[:8]]
    visualize.figure1(teacher, student, held_out.get(torch.arange(len(titles))), titles,
                      out / "figure1.png", args.image_size)
    visualize.curves([out], out / "curves.png")
    print(f"{out}: " + " ".join(sorted(f.name for f in out.iterdir())))


def main(tokens_class=TrainingTokens):  # extras/fourier.py has others
    args = flags.parse(description=__doc__)
    try:
        args.device = distributed.init(args.device)
        run(args, tokens_class)
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"train.py: {error}") from None
    distributed.cleanup()


if __name__ == "__main__":
    main()
