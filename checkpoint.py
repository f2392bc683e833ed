"""Never losing a run: a whole checkpoint exists at every instant, and a signal becomes one.

    python train.py --save-minutes 2                # a power cut costs 2 minutes at most
    kill -TERM PID                                  # saves at the next step and leaves; also Ctrl-C
    python train.py --resume                        # goes on, in the middle of an epoch if need be

A checkpoint is written beside the one before it, synced to the disk and read back; only then that
one becomes ckpt.prev.pt, and the new one ckpt.pt. train.py and extras/pretrain.py share this file.
"""
import json
import os
import signal
import time
import zipfile
from pathlib import Path

import torch

import distributed
import model


def write(path, write_to, previous=None):
    """Atomically: write_to(temporary path), sync, rename. A crash leaves the old file whole, an
    error also no temporary one. previous: the old file's name from then on; None: it goes. Raises
    OSError when the disk is full."""
    part = Path(f"{path}.tmp")
    try:
        write_to(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
    except BaseException as error:
        part.unlink(missing_ok=True)
        if not isinstance(error, (OSError, RuntimeError)):      # the second: torch.save, full disk
            raise
        kept = "; the one before it is whole" if path.exists() else ""
        reason = str(error).splitlines()[0]
        raise OSError(f"cannot write {path} ({reason}){kept}. Is the disk full?") from None
    if previous and path.exists():
        os.replace(path, previous)                  # a crash here: see `load`
    os.replace(part, path)


def before(path):
    """RUN/ckpt.pt -> RUN/ckpt.prev.pt"""
    return path.with_suffix(".prev.pt")


def exists(path):
    return path.exists() or before(path).exists()


def sound(path):
    """Whether the file is complete and fits its checksums, which torch.load does not look at."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except zipfile.BadZipFile:
        return False


def save(path, state):
    """Writes a checkpoint, and reads it back before it takes the place of the one before it."""
    def write_and_read_back(part):
        torch.save(state, part)
        if not sound(part):
            raise OSError("it does not read back as it was written")
    write(path, write_and_read_back, before(path))


def load(path):
    """The checkpoint, a dictionary. Where it is missing or damaged: the one before it, which takes
    its place, and a line says so. Raises FileNotFoundError or ValueError when neither is whole."""
    try:
        if path.exists() and not sound(path):
            raise ValueError(f"{path} is damaged")
        return model.read_weights(path)
    except (OSError, ValueError) as error:
        if not before(path).exists():
            raise
        state = model.read_weights(before(path))
        os.replace(before(path), path)              # or the next save would keep the damaged one
        print(f"{error}; going on from the checkpoint before it")
        return state


def cut_log(path, key, last):
    """Keeps the lines of metrics.jsonl up to record[key] = last. A crash can leave lines that the
    checkpoint knows nothing of, which will come again, and half a line."""
    def known(line):
        try:
            return line.endswith("\n") and json.loads(line)[key] <= last
        except ValueError:                          # zeros, after a crash of the machine
            return False
    lines = path.read_text(errors="replace").splitlines(True) if path.exists() else []
    write(path, lambda part: part.write_text("".join(filter(known, lines))))


class Keeper:
    """`with Keeper(...) as keeper`: SIGTERM and SIGINT wait for the next step, a second one not.

    keeper.due(), asked after every step: save now? keeper.save(state) does, and leaves if a signal
    came, with exit status 128 + its number: 143 after SIGTERM, 130 after Ctrl-C. minutes: between
    saves, 0 for none. data: `ImageSet.fingerprint` of the pictures, which goes into the file."""

    def __init__(self, path, minutes, data):
        self.path, self.minutes, self.data = path, minutes, data
        self.signal, self.last = 0, time.monotonic()

    def __enter__(self):
        self.handlers = {n: signal.signal(n, self.note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        self.signal = number
        self.__exit__()

    def due(self):
        late = 0 < self.minutes * 60 <= time.monotonic() - self.last
        return any(distributed.agree(self.signal, late))            # all save after the same step

    def save(self, state):
        if not distributed.rank():
            save(self.path, state | {"data": self.data})
        came, = distributed.agree(self.signal, group=distributed.patient)   # and wait for the disk
        self.last = time.monotonic()
        if came:
            name = signal.Signals(came).name
            print(f"\nstopped by {name}; {self.path} holds all of it. To go on: the same command "
                  f"with --resume --out {self.path.parent}")
            raise SystemExit(128 + came)

    def check_data(self, state):
        """Raises ValueError when the pictures are no longer those that the run was started on."""
        then = state.get("data", self.data)         # files of before this check have none
        if then != self.data:
            raise ValueError(f"the pictures have changed since the run was started ({then}; now "
                             f"{self.data}). Put them back, or start anew with another --out")
