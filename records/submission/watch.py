"""`watch`: follow a running log in the terminal: curve, speed, time left, and where the run is heading.

How the finish is projected (what is printed names the method):

- With `--like LOG…`, finished runs of nearly the same settings. Batches come in the same order in every run, so the
  difference of the training losses at the same step is paired and far less noisy than either curve. The mean of the
  last five differences (or the difference of the last common validation, where there is one among those steps), in bpb,
  is added to the finished run's score. Uncertainty: two standard errors, to which 0.003 bpb are added in squares for
  what happens after training (averaging, quantization, adaptation); several logs are averaged, their spread counts.
  Over all pairs of the runs in records/logs/ this range held the true score (tests/test_records_watch.py).
- Without, a straight line over log(step) through the last two thirds of the training loss, give or take all the
  progress that it promises (so from none to twice as much) and two standard errors of the last lines. It becomes bpb
  only by the run's own last validation; before the first one, training loss is what is projected. This range is wide,
  because it is honest: the final decay of the learning rate is no part of the curve before it.

It ends with the log's `result` line. Logs of other scripts have none: they are followed until Ctrl-C.
"""

import argparse
import math
import re
import shutil
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from records.submission import runlog
from records.submission.board import clean, number
from records.submission.command import Unusable, command

RECENT = 5  # logged steps that count as the present
SETTLED = 10  # the first steps are no guide to anything
AFTER_TRAINING = 0.003  # bpb, one standard deviation: what equal curves differ by in the end, measured on records/logs/
STALE_S = 60.0  # without a new line, the view says so

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille character: rows of (left, right)
HOME, CLEAR_BELOW, CLEAR_RIGHT = "\x1b[H", "\x1b[J", "\x1b[K"
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # a screen of its own, without a cursor; and back


class Projection(NamedTuple):
    """Where a run ends: 'val_bpb' or 'train_loss', value ± margin (about 95 %), and how that is known."""

    quantity: str
    value: float
    margin: float
    how: str

    def __str__(self) -> str:
        return f"{self.quantity} {self.value:.4f} ± {self.margin:.4f}"


# ----------------------------------------------------------------------------------------------------------------------
# What a log says about now
# ----------------------------------------------------------------------------------------------------------------------


def losses(log: runlog.RunLog, name: str = "train_loss") -> dict[int, float]:
    """{step: value}; of a step that was logged twice, the last."""
    return {step.step: value for step in log.steps if (value := number(getattr(step, name))) is not None}


def setting(log: runlog.RunLog, name: str) -> float | None:
    return number((log.settings or {}).get(name))


def pace(log: runlog.RunLog) -> float | None:
    """Milliseconds per step over the last logged steps."""
    timed = [(step.step, step.time_ms) for step in log.steps if step.time_ms is not None]
    if not timed:
        return None
    settled = [at for at in timed if at[0] > SETTLED] or timed
    (first, start), (last, end) = settled[-RECENT - 1 :][0], timed[-1]
    if last > first and end > start:
        return (end - start) / (last - first)
    return end / last if last and end else None


def tokens_per_second(log: runlog.RunLog) -> float | None:
    """Of training: from the settings' batch and the pace, else what the log itself prints."""
    ms, batch = pace(log), setting(log, "train_batch_tokens")
    if ms and batch:
        return 1000 * batch / ms
    return log.steps[-1].tokens_per_s if log.steps else None


def last_step(log: runlog.RunLog) -> tuple[int, int | None]:
    """(the last logged step, the step at which training ends: by its count, or where the clock will stop it)."""
    if not log.steps:
        return 0, None
    at, total, ms = log.steps[-1].step, log.steps[-1].total, pace(log)
    cap, spent = setting(log, "max_wallclock_seconds"), log.steps[-1].time_ms
    if cap and ms and spent is not None:
        by_clock = at + max(0, int((1000 * cap - spent) / ms))
        total = by_clock if total is None else min(total, by_clock)
    return at, total


def has_trained(log: runlog.RunLog) -> bool:
    at, end = last_step(log)
    stopped = any(name == "stopping_early" for name, _ in log.events)
    return bool(log.scores or log.sizes or log.result) or stopped or (end is not None and 0 < end <= at)


def seconds_left(log: runlog.RunLog) -> float | None:
    """Of training; what comes after it is not foreseen."""
    at, end = last_step(log)
    ms = pace(log)
    if has_trained(log):
        return 0.0
    return None if end is None or ms is None else max(0, end - at) * ms / 1000


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}h{rest // 60:02d}m" if hours else f"{rest // 60}m{rest % 60:02d}s"


# ----------------------------------------------------------------------------------------------------------------------
# Where it ends
# ----------------------------------------------------------------------------------------------------------------------


def final_score(log: runlog.RunLog) -> runlog.ScoreLine | None:
    """The headline of a finished run; without one, the last result that is no diagnostic."""
    scores = [score for score in log.candidates() if number(score.val_bpb) is not None]
    return log.headline() or (scores[-1] if scores else None)


def compared(log: runlog.RunLog, like: runlog.RunLog) -> Projection | None:
    """The score of a finished run, moved by how far this run is from it now. None without common steps."""
    final = final_score(like)
    if final is None or number(final.val_bpb) is None or number(final.val_loss) is None:
        return None
    ours, theirs = losses(log), losses(like)
    common = [step for step in sorted(ours) if step in theirs and step > SETTLED][-RECENT:]
    if len(common) < 3:
        return None
    ours_val, theirs_val = losses(log, "val_bpb"), losses(like, "val_bpb")
    validated = [step for step in sorted(ours_val) if step in theirs_val and step >= common[0]]
    if validated:
        gap, error = ours_val[validated[-1]] - theirs_val[validated[-1]], 0.0
        how = f"validation at step {validated[-1]}"
    else:
        bpb_per_nat = final.val_bpb / final.val_loss
        gaps = [(ours[step] - theirs[step]) * bpb_per_nat for step in common]
        gap, error = statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
        how = f"training loss at {len(gaps)} common steps to {common[-1]}"
    how = f"{final.label} of {clean(like.path.stem, 40)} {final.val_bpb:.4f} {gap:+.4f} by {how}"
    return Projection("val_bpb", final.val_bpb + gap, 2 * math.hypot(error, AFTER_TRAINING), how)


def fitted(log: runlog.RunLog) -> Projection | None:
    """A straight line over log(step), give or take the progress it promises; bpb where the run has validated itself."""
    curve, (at, end) = losses(log), last_step(log)
    recent = [loss for step, loss in curve.items() if step > SETTLED][-RECENT:]
    window = [(math.log(step), loss) for step, loss in curve.items() if step > SETTLED and step >= at / 3]
    if end is None or len(recent) < 3 or len(window) < 4:
        return None
    slope, intercept = statistics.linear_regression(*zip(*window, strict=True))
    now = statistics.fmean(recent)
    value = min(now, intercept + slope * math.log(max(end, at)))
    margin = now - value + 2 * statistics.stdev(recent) / math.sqrt(len(recent))
    how = f"training loss, now {now:.3f}, by a line over log(step), from no further progress to twice the line's"
    validated = [step for step in log.steps if number(step.val_bpb) is not None and number(step.val_loss) is not None]
    if not validated:
        return Projection("train_loss", value, margin, f"{how}; bpb needs --like LOG or a validation")
    last = validated[-1]
    near = [loss for _, loss in sorted(curve.items(), key=lambda point: abs(point[0] - last.step))[:RECENT]]
    bpb_per_nat = last.val_bpb / last.val_loss
    value = (value + last.val_loss - statistics.fmean(near)) * bpb_per_nat
    return Projection("val_bpb", value, margin * bpb_per_nat, f"{how}; as bpb by the validation at step {last.step}")


def project(log: runlog.RunLog, likes: Sequence[runlog.RunLog]) -> Projection | None:
    """Where the run will end. Finished runs are the better guide; see the head of this file."""
    found = [projection for like in likes if (projection := compared(log, like)) is not None]
    if not found:
        return None if has_trained(log) else fitted(log)
    if len(found) == 1:
        return found[0]
    values = [projection.value for projection in found]
    spread = 2 * statistics.stdev(values)
    margin = math.hypot(statistics.fmean(projection.margin for projection in found), spread)
    how = f"mean of {len(found)} comparisons, from {min(values):.4f} to {max(values):.4f}"
    return Projection("val_bpb", statistics.fmean(values), margin, how)


# ----------------------------------------------------------------------------------------------------------------------
# What is shown
# ----------------------------------------------------------------------------------------------------------------------


def braille(points: Sequence[tuple[float, float]], x_end: float, columns: int, rows: int) -> list[str]:
    """Lines of a curve of 2·columns × 4·rows dots, neighbouring points joined; y spans the points."""
    grid = [[0] * columns for _ in range(rows)]
    low, high = min(y for _, y in points), max(y for _, y in points)
    width, height = 2 * columns - 1, 4 * rows - 1
    at = [
        (round(min(x / (x_end or 1), 1) * width), round((high - y) / ((high - low) or 1) * height)) for x, y in points
    ]
    for (x0, y0), (x1, y1) in zip([at[0], *at[:-1]], at, strict=True):
        steps = max(abs(x1 - x0), abs(y1 - y0), 1)
        for i in range(steps + 1):
            x, y = round(x0 + (x1 - x0) * i / steps), round(y0 + (y1 - y0) * i / steps)
            grid[y // 4][x // 2] |= DOTS[y % 4][x % 2]
    return ["".join(chr(0x2800 + dots) for dots in row) for row in grid]


def curve_view(log: runlog.RunLog, columns: int, rows: int) -> list[str]:
    """The training loss with its axes; the first 5 % of the steps are left out once there is more."""
    curve, (at, end) = losses(log), last_step(log)
    kept = [(step, loss) for step, loss in curve.items() if step >= 0.05 * at]
    if len(kept) < 2:
        kept = list(curve.items())
    if len(kept) < 2 or columns < 20:
        return ["(the curve begins with the second training line)"]
    high, low = max(y for _, y in kept), min(y for _, y in kept)
    lines = braille(kept, end or at, columns - 9, rows)
    marks = {0: f"{high:.3f}", rows - 1: f"{low:.3f}"}
    axis = f"{'':>7} {'step 0':<{max(0, columns - 9 - 10)}}{end or at:>10,}"
    return [*(f"{marks.get(i, ''):>7} {line}" for i, line in enumerate(lines)), axis]


def facts(log: runlog.RunLog, likes: Sequence[runlog.RunLog]) -> dict[str, str]:
    """What is known, in words: {name: value}."""
    (at, end), speed = last_step(log), tokens_per_second(log)
    share = f" ({at / end:.0%})" if end else ""
    curve, validated = list(losses(log).values()), list(losses(log, "val_bpb").items())
    left = "done" if has_trained(log) else duration(seconds_left(log))
    projection = project(log, likes) if log.result is None else None
    scores = [score for score in log.scores if number(score.val_bpb) is not None]
    known = {
        "step": f"{at}/{end or '?'}{share}" if log.steps else "",
        "train_loss": f"{curve[-1]:.4f}" if curve else "",
        "val_bpb": f"{validated[-1][1]:.4f} at step {validated[-1][0]}" if validated else "",
        "tokens/s": f"{speed:,.0f}" if speed else "",
        "training left": left if log.steps else "",
        "finish": str(projection or ""),
        "method": projection.how if projection else "",
        "last score": f"{clean(scores[-1].label, 40)} {scores[-1].val_bpb:.4f}" if scores else "",
        "events": ", ".join(f"{clean(name, 24)} at {step}" for name, step in log.events[-4:]),
    }
    return {name: text for name, text in known.items() if text}


def plain(log: runlog.RunLog, likes: Sequence[runlog.RunLog]) -> str:
    """All of it in one line, for files and pipes."""
    return "  ".join(f"{name} {value}" for name, value in facts(log, likes).items()) or "no training step yet"


def screen(
    log: runlog.RunLog, likes: Sequence[runlog.RunLog], notes: dict[str, str], size: tuple[int, int]
) -> list[str]:
    """The lines of the view, wrapped and cut to (columns, lines)."""
    columns, height = size
    known = {"log": clean(log.path, 200)} | facts(log, likes) | notes
    words = []
    for name, value in known.items():
        indent = f"{'':15}"
        words += textwrap.wrap(value, max(20, columns - 1), initial_indent=f"{name:>13}  ", subsequent_indent=indent)
    rows = max(3, min(16, height - len(words) - 4))
    lines = ["training loss, nats per token", *curve_view(log, columns, rows), "", *words]
    return [line[: columns - 1] for line in lines][: height - 1]


# ----------------------------------------------------------------------------------------------------------------------
# Following a file
# ----------------------------------------------------------------------------------------------------------------------


class Follower:
    """Reads a log again whenever its file changes. What it holds is the last state that could be read."""

    def __init__(self, path: Path):
        self.path, self.log, self.notice = path, runlog.RunLog(path, ""), ""
        self.seen: tuple[int, int, int, int] | None = None  # of the file that was read
        self.changed = time.monotonic()

    def look(self) -> bool:
        """Whether there is something new. Raises LogError where the file is no log, and OSError."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            state = "does not exist yet" if self.seen is None else "is gone"
            self.notice = f"{clean(self.path, 200)} {state}; waiting for it"
            return True
        now = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if now == self.seen:
            return False
        replaced = self.seen is not None and (now[:2] != self.seen[:2] or now[2] < self.seen[2])
        self.seen, self.changed = now, time.monotonic()
        self.notice = "the log was replaced or cut short; read again from its start" if replaced else ""
        self.log = runlog.parse(self.path)  # leaves out a last line that is still being written
        return True


def last_line(path: Path) -> str:
    """What the run said last: the only sign of life while it evaluates."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read(4096).decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return clean(next((line for line in reversed(lines) if line.strip()), ""), 150)


def ending(log: runlog.RunLog) -> str:
    """The last words about a run that has its result."""
    headline = log.headline()
    score = "no headline" if headline is None else f"{clean(headline.label, 40)} val_bpb {headline.val_bpb:.6f}"
    size = "" if log.bytes_total is None else f"  {log.bytes_total:,} bytes"
    times = [("training", log.train_seconds), ("evaluation", log.eval_seconds)]
    spent = "".join(f"  {name} {seconds:,.1f} s" for name, seconds in times if seconds is not None)
    return f"finished: {score}{size}{spent}"


def follow(args: argparse.Namespace, likes: Sequence[runlog.RunLog], out: TextIO, sleep: Callable = time.sleep) -> None:
    """Until the `result` line. Raises LogError, OSError, KeyboardInterrupt."""
    follower, said = Follower(args.log), ""
    in_place = out.isatty() and not args.once
    if in_place:
        out.write(ENTER)
    try:
        while True:
            new = follower.look()
            silent = time.monotonic() - follower.changed
            notice = follower.notice or (f"no new line for {duration(silent)}" if silent > STALE_S else "")
            if in_place:
                notes = {"last line": last_line(args.log), "now": notice}
                notes = {name: note for name, note in notes.items() if note}
                lines = screen(follower.log, likes, notes, shutil.get_terminal_size())
                out.write(HOME + "".join(f"{line}{CLEAR_RIGHT}\n" for line in lines) + CLEAR_BELOW)
            elif new:
                line = follower.notice or plain(follower.log, likes)
                if follower.notice and follower.seen is not None and follower.path.exists():
                    line += "\n" + plain(follower.log, likes)
                if line != said:  # a log that is waited for is mentioned once
                    out.write(line + "\n")
                said = line
            out.flush()
            if follower.log.result is not None or args.once:
                break
            sleep(args.every)
    finally:
        if in_place:
            out.write(LEAVE)
            out.flush()
    if follower.log.result is not None:
        print(ending(follower.log), file=out, flush=True)
    elif follower.seen is not None and in_place:
        print(plain(follower.log, likes), file=out, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def interval(text: str) -> float:
    value = float(text) if re.fullmatch(r"\d{1,4}(\.\d{1,3})?", text) else 0.0
    if value < 0.05:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is no number of seconds from 0.05 to 9999")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("log", type=Path, metavar="LOG", help="of a run; it need not be there yet")
    parser.add_argument("--like", nargs="+", type=Path, default=[], metavar="LOG", help="finished runs to compare with")
    parser.add_argument("--every", type=interval, default=2.0, metavar="SECONDS", help="between looks (default: 2)")
    parser.add_argument("--once", action="store_true", help="say once how it stands, and end")


@command
def run(args: argparse.Namespace) -> int:
    """Exit code: 0 when the run has ended or the user has seen enough (Ctrl-C), 2 where a log cannot be used."""
    try:
        likes = [runlog.parse(path) for path in args.like]
        for like in likes:
            if final_score(like) is None:
                raise Unusable(f"{like.path} has no result to compare with")
        follow(args, likes, sys.stdout)
    except KeyboardInterrupt:
        print()
    return 0
