"""Progress of everything that takes longer than a few seconds, in one manner.

    with Progress("linear probe", total=5) as progress:
        progress.update()                           # one of the five is done
    for batch in counted("encoding, images", 1000, batches):
        ...                                         # of the 1000, len(batch) are done

prints what is being done, how far it is and how long it will still take. On a terminal one line is
rewritten; into a file or a pipe go whole lines, flushed, at most one in ten seconds.
"""
import sys
import time

TERMINAL_SECONDS, FILE_SECONDS = 0.2, 10            # between two outputs


def duration(seconds):
    """3.2 -> "3 s", 95 -> "1 min 35 s", 4000 -> "1 h 6 min"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


class Progress:
    """A context manager; `total` counts whatever `update` counts. Time is the wall clock's."""

    last_output = None              # of all instances: quick stages in a row do not flood a file

    def __init__(self, what, total, done=0):
        self.what, self.total, self.done, self.before = what, total, done, done
        self.start, self.shown = time.monotonic(), False

    def __enter__(self):
        self.update(0)
        return self

    def update(self, count=1, note=None):
        """`count` more are done; note: returns what else the line has (e.g. the loss)."""
        self.done += count
        now, terminal = time.monotonic(), sys.stdout.isatty()
        pause = TERMINAL_SECONDS if terminal else FILE_SECONDS
        if Progress.last_output is not None and now - Progress.last_output < pause:
            return
        Progress.last_output, self.shown = now, True
        text = f"{self.what}: {self.done}/{self.total}"
        if self.done > self.before:
            left = (now - self.start) * (self.total - self.done) / (self.done - self.before)
            text += f", {duration(left)} left"
        text += f"  {note()}" if note else ""
        print(f"\r\033[K{text}" if terminal else text, end="" if terminal else "\n", flush=True)

    def __exit__(self, *error):
        if self.shown and sys.stdout.isatty():
            print("\r\033[K", end="", flush=True)           # the stage is over: its line goes


def counted(what, total, batches):
    """The same batches, with the progress of the loop over them; `total` counts their items."""
    with Progress(what, total) as progress:
        for batch in batches:
            yield batch
            progress.update(len(batch))
