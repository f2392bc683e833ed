"""progress.py on a planted clock: one line on a terminal, few whole ones in a file."""
import io

import pytest

import progress
from progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds) lets them pass."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Progress, "last_output", None)

    def wait(seconds):
        now[0] += seconds
    return wait


@pytest.fixture
def screen(monkeypatch):
    """screen(terminal) -> what is printed from now on."""
    def make(terminal):
        stream = io.StringIO()
        stream.isatty = lambda: terminal
        monkeypatch.setattr("sys.stdout", stream)
        return stream
    return make


@pytest.mark.parametrize("seconds, words", [
    (0, "0 s"), (3.2, "3 s"), (59.6, "1 min 0 s"), (95, "1 min 35 s"), (4000, "1 h 6 min")])
def test_durations(seconds, words):
    assert progress.duration(seconds) == words


def test_a_terminal_has_one_line_which_is_rewritten_and_goes(clock, screen):
    stream = screen(terminal=True)
    with Progress("epochs", 4) as bar:
        for _ in range(2):
            clock(30)
            bar.update(note=lambda: "loss 2")
            clock(0.1)
            bar.update(0, lambda: 1 / 0)                           # 0.2 s must pass between two
    lines = stream.getvalue().split("\r\033[K")
    assert lines == ["", "epochs: 0/4", "epochs: 1/4, 1 min 30 s left  loss 2",
                     "epochs: 2/4, 1 min 0 s left  loss 2", ""]
    assert "\n" not in stream.getvalue()


def test_a_file_has_whole_lines_at_most_one_in_ten_seconds(clock, screen):
    stream, times = screen(terminal=False), []
    with Progress("images", 100) as bar:
        for second in range(1, 61):
            clock(1)
            before = len(stream.getvalue())
            bar.update()
            times += [second] * (len(stream.getvalue()) > before)
    assert times == [10, 20, 30, 40, 50, 60]
    lines = stream.getvalue().splitlines(True)
    assert lines[0] == "images: 0/100\n" and lines[3] == "images: 30/100, 1 min 10 s left\n"
    assert all(line.endswith("\n") and "\r" not in line for line in lines)


def test_a_stage_that_continues_estimates_from_what_it_did_itself(clock, screen):
    stream = screen(terminal=False)
    with Progress("step", 100, done=90) as bar:
        clock(20)
        bar.update(5)
    assert stream.getvalue() == "step: 90/100\nstep: 95/100, 20 s left\n"


def test_quick_stages_in_a_row_do_not_flood_a_file(clock, screen):
    stream = screen(terminal=False)
    for number in range(25):
        with Progress(f"stage {number}", 1) as bar:
            clock(1)
            bar.update()
    assert stream.getvalue().splitlines() == ["stage 0: 0/1", "stage 9: 1/1, 0 s left",
                                              "stage 19: 1/1, 0 s left"]


def test_a_stage_that_was_never_shown_leaves_the_line_of_another(clock, screen):
    stream = screen(terminal=True)
    with Progress("outer", 2):
        with Progress("inner", 2):
            pass
        assert stream.getvalue() == "\r\033[Kouter: 0/2"
    assert stream.getvalue() == "\r\033[Kouter: 0/2\r\033[K"
