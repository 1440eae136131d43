"""`plot`: loss curves, events and final scores of one or several logs as a PNG that reads well at 800 pixels."""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from records.submission import runlog
from records.submission.board import clean, number, thin
from records.submission.command import Unusable, command

MAX_LOGS, MAX_SCORES, MAX_POINTS, MAX_EVENTS = 10, 12, 2000, 12
COLOURS = ("#0b62c4", "#c8500a", "#1a7f4b", "#a3278f", "#8a6a00", "#c32a3c", "#0b7d8c", "#5a45c9", "#5d6a1c", "#6b4a3a")
SHARED = "#5c6673"  # what belongs to no one run


def points(log: runlog.RunLog, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of train_loss, val_loss or val_bpb, thinned."""
    kept = [(step.step, value) for step in log.steps if (value := number(getattr(step, name))) is not None]
    kept = thin(kept, MAX_POINTS)
    return [step for step, _ in kept], [value for _, value in kept]


def bpb_per_nat(logs: Sequence[runlog.RunLog]) -> float | None:
    """val_bpb / val_loss if it is the same in all results of all logs, as it is on one validation split; else None."""
    pairs = [(line.val_loss, line.val_bpb) for log in logs for line in (*log.scores, *log.steps)]
    ratios = [bpb / loss for loss, bpb in pairs if number(loss) is not None and number(bpb) is not None]
    # Four printed decimals leave each ratio uncertain by some 1e-4.
    return ratios[-1] if ratios and max(ratios) - min(ratios) < 5e-4 else None


def limits(logs: Sequence[runlog.RunLog]) -> tuple[float, float] | None:
    """The losses that the axis spans: without those of the first 5 % of each run, whose fall would flatten everything
    after it, and without runs beyond Tukey's outer fences, which have diverged; those are marked at the edge."""
    spans = []
    for log in logs:
        pairs = [pair for name in ("train_loss", "val_loss") for pair in zip(*points(log, name), strict=True)]
        late = [loss for step, loss in pairs if step >= 0.05 * log.steps[-1].step]
        spans += [(min(late), max(late))] if late else []
    highs = sorted(high for _, high in spans)
    if len(highs) > 3:
        first, _, third = statistics.quantiles(highs, n=4, method="inclusive")
        fence = third + (3 * (third - first) or 0.02 * abs(third))
        highs = [high for high in highs if high <= fence]
    return (min(low for low, _ in spans), highs[-1]) if spans else None


def draw(logs: Sequence[runlog.RunLog], names: Sequence[str], out: Path) -> None:
    """Write the PNG. Raises Unusable where matplotlib is missing or the file cannot be written."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.ticker import FuncFormatter, MaxNLocator
    except ImportError:
        raise Unusable("plot needs matplotlib: pip install -r requirements-records.txt") from None
    rows = (len(logs) + 1) // 2
    figure = Figure(figsize=(8, 4.2 + 0.22 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    curves, finals = figure.subplots(1, 2, width_ratios=(2.1, 1))
    for axes in (curves, finals):
        axes.grid(color="#dde1e7", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    for log, colour in zip(logs, COLOURS, strict=False):
        dense = len(log.steps) > 60
        curves.plot(*points(log, "train_loss"), color=colour, lw=1.4, marker=None if dense else ".", ms=4)
        curves.plot(*points(log, "val_loss"), color=colour, lw=1, ls=":", marker="D", ms=4.5, mec="white", mew=0.6)
    if span := limits(logs):
        low, high = span
        room = 0.06 * (high - low) or 0.1
        curves.set_ylim(low - room, high + 3 * room)  # room above for the names of events
        for log, colour in zip(logs, COLOURS, strict=False):
            steps, losses = points(log, "train_loss")
            if losses and losses[-1] > high + 3 * room:
                curves.plot(steps[-1], 1, "^", color=colour, transform=curves.get_xaxis_transform(), clip_on=False)
    mark_events(curves, logs)
    curves.set(xlabel="training steps", ylabel="loss, nats per token")
    curves.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    curves.set_xlim(left=0)
    ratio = bpb_per_nat(logs)
    if ratio:
        right = curves.secondary_yaxis("right", functions=(lambda nats: nats * ratio, lambda bpb: bpb / ratio))
        right.set_ylabel("bits per byte of the validation split")
    mark_scores(finals, logs)
    finals.xaxis.set_major_locator(MaxNLocator(4))
    handles = [Line2D([], [], color=colour, lw=2) for colour, _ in zip(COLOURS, logs, strict=False)]
    handles += [Line2D([], [], color=SHARED, lw=1.4), Line2D([], [], color=SHARED, ls=":", marker="D", ms=4.5)]
    style = dict(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    legend = figure.legend(handles, ["run"] * len(handles), **style)
    for label, name in zip(legend.get_texts(), [*names, "training", "validation"], strict=True):
        label.set_text(name)  # afterwards: a label that begins with "_" would be left out
    for label in figure.findobj(lambda artist: hasattr(artist, "set_parse_math")):
        label.set_parse_math(False)  # a "$" in a log is a dollar, not a formula
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, format="png", metadata={"Software": None})
    except OSError as error:
        raise Unusable(f"cannot write {out}: {error.strerror}") from None


def mark_events(axes, logs: Sequence[runlog.RunLog]) -> None:
    """A dashed line at each event; runs that share it share the line and its name."""
    events: dict[tuple[str, int], str] = {}
    for log, colour in zip(logs, COLOURS, strict=False):
        for name, step in log.events[:MAX_EVENTS]:
            at = (clean(name, 24), step)
            events[at] = SHARED if at in events else colour
    last = max((log.steps[-1].step for log in logs), default=1)
    for row, ((name, step), colour) in enumerate(sorted(events.items(), key=lambda item: item[0][1])):
        axes.axvline(step, color=colour, lw=0.9, ls="--", alpha=0.7)
        place = dict(xytext=(-3, -10 - 11 * (row % 4)), ha="right") if step > 0.2 * last else dict(xytext=(3, -10))
        at = dict(xy=(step, 1), xycoords=("data", "axes fraction"), textcoords="offset points")
        axes.annotate(name, **at, **place, fontsize=8, color=colour)


def mark_scores(axes, logs: Sequence[runlog.RunLog]) -> None:
    """val_bpb of each result, in the order of the logs; the declared headline is filled."""
    shown = [[line for line in log.scores if number(line.val_bpb) is not None] for log in logs]
    labels = list(dict.fromkeys(line.label for lines in shown for line in lines))[-MAX_SCORES:]
    for log, lines, colour in zip(logs, shown, COLOURS, strict=False):
        headline = log.headline()
        for line in (line for line in lines if line.label in labels):
            declared = headline is not None and line.label == headline.label
            style = dict(mfc=colour if declared else "white", mec=colour, ms=8 if declared else 6, alpha=0.9)
            axes.plot(line.val_bpb, labels.index(line.label), "o", **style)
    axes.set_title("val_bpb (filled: headline)", fontsize=10)
    # Long labels stand above their line, inside the panel: beside the axis they would take the curves' room.
    for y, label in enumerate(labels):
        axes.text(0.02, y - 0.22, clean(label, 30), transform=axes.get_yaxis_transform(), fontsize=8, color=SHARED)
    axes.set_yticks(range(len(labels)), [""] * len(labels))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(labels) - 0.5, -0.7)
    if not labels:
        axes.text(0.5, 0.5, "no result yet", transform=axes.transAxes, ha="center", color=SHARED)
        axes.set(xticks=[], ylim=(0, 1))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help=f"logs of runs, at most {MAX_LOGS}")
    parser.add_argument("-o", "--out", type=Path, metavar="OUT.png", help="default: beside the first log, as .png")


@command
def run(args: argparse.Namespace) -> int:
    """Exit code: 0, or 2 where a log or matplotlib cannot be used."""
    logs, names = [], []
    for path in args.logs[: MAX_LOGS + 1]:
        log = runlog.parse(path)
        parts = log.parts or [log]
        logs += parts
        names += [clean(path.stem, 36) + f", run {i}" * (len(parts) > 1) for i, _ in enumerate(parts, 1)]
    if len(logs) > MAX_LOGS:
        raise Unusable(f"more than {MAX_LOGS} runs cannot be told apart")
    for log in logs:
        if not log.steps:
            raise Unusable(f"{log.path} has no training step to draw")
    out = args.out or args.logs[0].with_suffix(".png")
    draw(logs, names, out)
    print(f"wrote {out}")
    return 0
