"""Checkpoints: an intact one exists at every instant, and what is on the disk is read with care.

    OUT/ckpt.pt         the newest; `save` writes it beside the old one, reads it back, and renames
    OUT/ckpt.prev.pt    the one before it, in case the newest is damaged later

A run that gets SIGTERM or Ctrl-C finishes its step, saves and exits with 128 + the signal's number.
"""
import argparse
import json
import os
import signal
import time
import zipfile
from pathlib import Path

import torch

import distributed
import model
import precision
import stable
import teachers

STUDENTS = {"paper": model.Student, "stable": stable.StableStudent}     # --recipe


def write(path, write_to, previous=None):
    """Atomically: write_to(temporary path), sync, rename. After a crash the old file is intact,
    after an error there is no temporary one either. previous: the old file's name from then on;
    None: it goes. Raises OSError when the disk is full."""
    part = Path(f"{path}.tmp")
    try:
        write_to(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
    except BaseException as error:
        part.unlink(missing_ok=True)
        if not isinstance(error, (OSError, RuntimeError)):      # the second: torch.save, full disk
            raise
        hint = "; the previous one is intact" if path.exists() else ""
        reason = str(error).splitlines()[0]
        raise OSError(f"cannot write {path} ({reason}){hint}. Is the disk full?") from None
    if previous and path.exists():
        os.replace(path, previous)                  # a crash here: see `load`
    os.replace(part, path)


def write_json(path, values):
    """`write` for a dictionary of plain values."""
    write(path, lambda part: part.write_text(json.dumps(values, indent=1) + "\n"))


def check_folder(path):
    """Raises FileNotFoundError where --json's file cannot be written later; path: a Path or None.
    """
    if path and not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--json {path}: its folder does not exist; make it first")


def previous(path):
    """RUN/ckpt.pt -> RUN/ckpt.prev.pt"""
    return path.with_suffix(".prev.pt")


def exists(path):
    return path.exists() or previous(path).exists()


def is_valid(path):
    """Whether the file is complete and fits its checksums, which torch.load does not check."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except zipfile.BadZipFile:
        return False


def save(path, state):
    """Writes a checkpoint, and reads it back before it takes the place of the previous one."""
    def write_and_read_back(part):
        torch.save(state, part)
        if not is_valid(part):
            raise OSError("it does not read back as it was written")
    write(path, write_and_read_back, previous(path))


def load(path):
    """The checkpoint, a dictionary. Where it is missing or damaged: the previous one, which takes
    its place, and a line is printed. Raises FileNotFoundError or ValueError if none is intact."""
    try:
        if path.exists() and not is_valid(path):
            raise ValueError(f"{path} is damaged")
        return teachers.read_weights(path)
    except (OSError, ValueError) as error:
        if not previous(path).exists():
            raise
        state = teachers.read_weights(previous(path))
        os.replace(previous(path), path)            # or the next save would keep the damaged one
        print(f"{error}; resuming from the previous checkpoint")
        return state


def truncate_log(path, key, last):
    """Keeps the lines of metrics.jsonl up to record[key] = last. A crash can leave lines that the
    checkpoint does not contain, which will come again, and half a line."""
    def contained(line):
        try:
            return line.endswith("\n") and json.loads(line)[key] <= last
        except ValueError:                          # zeros, after a crash of the machine
            return False
    lines = path.read_text(errors="replace").splitlines(True) if path.exists() else []
    write(path, lambda part: part.write_text("".join(filter(contained, lines))))


def config_of(args):
    """The flags as plain values, to be stored and compared."""
    return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v
            for k, v in vars(args).items() if k != "resume"}


def open_run(args):
    """Sets args.out -> the state to resume from, or None. Raises ValueError, never overwrites."""
    name = "-".join([args.data.replace(":", "-").replace("/", "-"), args.recipe, args.disc,
                     str(args.vocab), f"s{args.seed}"])
    out, number = args.out or Path("runs", name), 1
    while not (args.out or args.resume) and exists(out / "ckpt.pt"):
        number += 1                             # nobody chose this name: take the next free one
        out = Path("runs", f"{name}-{number}")
    args.out = out
    if not args.resume:
        if exists(out / "ckpt.pt"):
            raise ValueError(f"{out} holds a run already: --resume to continue it, or another "
                             "--out")
        out.mkdir(parents=True, exist_ok=True)
        return None
    state = load(out / "ckpt.pt")
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
    truncate_log(args.out / "metrics.jsonl", "step", done)
    config = config_of(args) | {"hardware": precision.hardware_info(args.device)}
    write_json(args.out / "config.json", config)


PROGRESS = ("epoch", "seconds", "step_in_epoch", "elapsed", "totals")   # of a train.Trainer
MODULES = ("student", "centering", "optimizer", "scaler")               # with a state_dict


def state_of(trainer):
    """What a checkpoint of a train.Trainer holds: all that the rest of the run depends on, and what
    `load_model` needs."""
    rng = {"cpu": torch.get_rng_state()}
    if trainer.args.device.startswith("cuda"):
        rng["cuda"] = torch.cuda.get_rng_state(trainer.args.device)
    state = {"config": config_of(trainer.args), "teacher": trainer.teacher.state_dict(), "rng": rng}
    state |= {name: getattr(trainer, name).state_dict() for name in MODULES}
    return state | {name: getattr(trainer, name) for name in PROGRESS}


def restore(trainer, state):
    """`state_of` back into a new Trainer of the same flags, and PyTorch's random state with it."""
    for name in MODULES:
        getattr(trainer, name).load_state_dict(state[name])
    for name in PROGRESS:
        setattr(trainer, name, state[name])
    device = trainer.args.device
    trainer.totals = {name: value.to(device) for name, value in trainer.totals.items()}
    torch.set_rng_state(state["rng"]["cpu"])
    if "cuda" in state["rng"]:
        torch.cuda.set_rng_state(state["rng"]["cuda"], device)


def load_model(path, device="cpu"):
    """RUN/ckpt.pt of train.py -> (config, teacher, student), both frozen and in eval mode on
    `device`. Raises FileNotFoundError, or ValueError for a damaged or foreign file, one of another
    version of this code, or a GPU that PyTorch does not find."""
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch finds no GPU; use --device cpu")
    state = teachers.read_weights(path)
    if not {"config", "teacher", "student"} <= state.keys():
        raise ValueError(f"{path} is not a checkpoint of train.py (a teacher's weights: --teacher)")
    config = state["config"]
    try:
        sizes = [config["image_size"], config["train_images"] or 1, config["test_images"] or 1]
        types = [type(config["data"]), *(type(n) for n in (config["seed"], *sizes))]
        if types != [str, int, int, int, int] or min(sizes) < 1:
            raise TypeError("its flags are not those of train.py")
        teacher = teachers.teacher_from_state(state["teacher"])
        student = STUDENTS[config["recipe"]](argparse.Namespace(**config), teacher.width)
        student.load_state_dict(state["student"])
    except Exception as error:                      # what a file can hold has no end
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} does not fit this version of the code ({reason}); train it "
                         "again") from None
    return config, teacher.to(device), student.to(device).eval().requires_grad_(False)


class Manager:
    """`with Manager(...) as manager`: SIGTERM and SIGINT wait for the next step, a second one not.

    manager.should_save(), after every step: is it time, or did a signal come? manager.save(state)
    saves, and exits if a signal came, with status 128 + its number: 143 after SIGTERM, 130 after
    Ctrl-C. minutes: between saves, 0 for none. data: `ImageSet.fingerprint` of the images, which
    goes into the file."""

    def __init__(self, path, minutes, data):
        self.path, self.minutes, self.data = path, minutes, data
        self.signal, self.last = 0, time.monotonic()

    def __enter__(self):
        self.handlers = {n: signal.signal(n, self.on_signal)
                         for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def on_signal(self, number, frame):
        self.signal = number
        self.__exit__()

    def should_save(self):
        late = 0 < self.minutes * 60 <= time.monotonic() - self.last
        return any(distributed.all_reduce_max(self.signal, late))   # all save after the same step

    def save(self, state):
        if distributed.rank() == 0:
            save(self.path, state | {"data": self.data})
        received, = distributed.all_reduce_max(             # and wait for the disk
            self.signal, group=distributed.long_timeout_group)
        self.last = time.monotonic()
        if received:
            name = signal.Signals(received).name
            print(f"\nstopped by {name}; {self.path} is saved. To continue: the same command with "
                  f"--resume --out {self.path.parent}")
            raise SystemExit(128 + received)

    def check_data(self, state):
        """Raises ValueError when the images are no longer those that the run was started on."""
        if state["data"] != self.data:
            raise ValueError(f"the images have changed since the run was started ({state['data']}; "
                             f"now {self.data}). Restore them, or start again with another --out")
