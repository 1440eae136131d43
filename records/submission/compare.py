"""`compare`: whether the runs of one side are better than those of another, and how many more seeds would tell.

Scores of seeds are taken as independent and normal, with a spread of its own on each side: Welch's t test, one-sided,
because only a better score is a record.
"""

import argparse
import json
import math
import statistics
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from records.submission import runlog
from records.submission.command import Unusable, command
from records.submission.foreign import load
from records.submission.runlog import RunLog, ScoreLine
from records.submission.runs import of_one_text, validation_bytes

POWER = 0.8  # probability of meeting a rule that the number of seeds is worked out for
MAX_SEEDS = 1000


class Rule(NamedTuple):
    """A rule of acceptance: A is better than B by more than margin, at p < alpha."""

    name: str
    metric: str  # val_loss (nats per token) | val_bpb
    margin: float
    alpha: float
    against: str  # the null hypothesis, in words


RULES = (
    Rule("0.005 nats", "val_loss", 0.005, 0.01, "A is better by 0.005 nats or less"),
    Rule("frontier", "val_bpb", 0.0, 0.25, "A is not better"),
)


class Sample(NamedTuple):
    """What is known of one metric on one side."""

    n: int
    mean: float
    std: float | None  # of a sample: n - 1 in the denominator; None with one seed


class Side(NamedTuple):
    """The runs of one side and the score of each."""

    logs: list[RunLog]
    scores: list[ScoreLine]
    declared: str | None = None  # the label that the side declares itself

    @property
    def label(self) -> str:
        return self.scores[0].label

    def sample(self, metric: str) -> Sample | None:
        """None where some run does not print this metric."""
        values = [getattr(score, metric) for score in self.scores]
        return None if None in values else sample(values)


class Verdict(NamedTuple):
    """What a test says: t, degrees of freedom, p, or only a note of why there is none; met is None if undecided."""

    t: float | None = None
    df: float | None = None
    p: float | None = None
    met: bool | None = None
    more_seeds: int | None = None  # on each side, to meet the rule with probability POWER; None if no number does
    note: str = ""


# ----------------------------------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------------------------------


def scipy_stats():
    """scipy.stats, or a Unusable that says how to get it."""
    try:
        from scipy import stats
    except ImportError:
        raise Unusable("the t distribution needs scipy: pip install -r requirements-records.txt") from None
    return stats


def sample(values: Sequence[float]) -> Sample:
    std = statistics.stdev(values) if len(values) > 1 else None
    return Sample(len(values), statistics.fmean(values), std)


def standard_error(a: Sample, b: Sample) -> tuple[float, float]:
    """(standard error of the difference of means, Welch-Satterthwaite degrees of freedom); needs spread on a side."""
    of_a, of_b = a.std / math.sqrt(a.n), b.std / math.sqrt(b.n)
    error = math.hypot(of_a, of_b)
    return error, 1 / ((of_a / error) ** 4 / (a.n - 1) + (of_b / error) ** 4 / (b.n - 1))


def welch(a: Sample, b: Sample, margin: float = 0.0) -> tuple[float, float, float]:
    """(t, degrees of freedom, p) of the one-sided test against `mean b - mean a <= margin`; lower scores are better."""
    error, df = standard_error(a, b)
    t = (b.mean - a.mean - margin) / error
    return t, df, float(scipy_stats().t.sf(t, df))


def power(a: Sample, b: Sample, margin: float, alpha: float) -> float:
    """Probability that the test comes out below alpha if the means and spreads are the true ones (noncentral t)."""
    error, df = standard_error(a, b)
    stats = scipy_stats()
    # nct gives nan far in the tails, where it is certain anyway.
    probability = float(stats.nct.sf(stats.t.isf(alpha, df), df, min((b.mean - a.mean - margin) / error, 30.0)))
    return 1.0 if math.isnan(probability) else probability


def more_seeds(a: Sample, b: Sample, margin: float, alpha: float) -> int | None:
    """How many more seeds on each side meet a rule with probability POWER, at the present means and spreads."""
    if b.mean - a.mean <= margin:
        return None

    def enough(more: int) -> bool:
        return power(a._replace(n=a.n + more), b._replace(n=b.n + more), margin, alpha) >= POWER

    if not enough(MAX_SEEDS):
        return None
    return bisect_left(range(MAX_SEEDS), True, key=enough)  # power grows with the number of seeds


def judge(rule: Rule, a: Sample | None, b: Sample | None) -> Verdict:
    """What a rule says about two sides, or why it says nothing."""
    if a is None or b is None:
        return Verdict(note=f"not every run prints {rule.metric}")
    if a.std is None or b.std is None:
        sides = " and ".join(name for name, side in (("A", a), ("B", b)) if side.std is None)
        return Verdict(note=f"one seed has no spread to test with; at least one more is needed for {sides}")
    if a.std == 0 and b.std == 0:
        return Verdict(note="no spread on either side, so no test; were these runs of different seeds?")
    t, df, p = welch(a, b, rule.margin)
    if p < rule.alpha:
        return Verdict(t, df, p, met=True, more_seeds=0)
    more = more_seeds(a, b, rule.margin, rule.alpha)
    if b.mean - a.mean <= rule.margin:
        note = "at these means no number of seeds would meet it"
    elif more is None:
        note = f"at these means and spreads {MAX_SEEDS} more seeds a side are not enough"
    else:
        # With 0 more the test had a good chance and missed: the next seed is what can be said.
        more = max(more, 1)
        note = f"{more} more seed{'s' * (more > 1)} a side meet it with probability {POWER:g}"
    return Verdict(t, df, p, False, more, note)


# ----------------------------------------------------------------------------------------------------------------------
# Sides
# ----------------------------------------------------------------------------------------------------------------------


def score_of(log: RunLog, label: str | None) -> ScoreLine:
    """The score that counts: of the given label, else the log's headline. Raises Unusable."""
    score = log.score(label) if label else log.headline()
    if score is None:
        labels = ", ".join(dict.fromkeys(found.label for found in log.scores)) or "none"
        problem = f"no single result {label!r}" if label else "which result is the headline is not clear; --headline"
        raise Unusable(f"{log.path}: {problem} (results: {labels})")
    if not score.is_finite:
        raise Unusable(f"{log.path}: {score.label} is not finite (line {score.line})")
    return score


def read_side(paths: Sequence[Path], asked: str | None) -> Side:
    """The runs of a side, each scored by the line that its folder declares, or by the one that is asked for. Raises
    Unusable and LogError."""
    asked = asked and runlog.plain_label(asked)
    logs, labels = [], []
    for path in paths:
        if path.is_dir():
            folder = load(path)
            if not folder.runs:
                raise Unusable(f"{path}: no log in this folder")
            found, label = list(folder.runs.values()), folder.headline[0]
            for name, log in folder.runs.items():
                log.path = path / name
        else:
            found = runlog.parse(path).each()
            record = (path.parent / "submission.json").is_file()
            label = load(path.parent).headline[0] if record else None
        logs += found
        labels += [label] * len(found)
    scores = [score_of(log, asked or label) for log, label in zip(logs, labels, strict=True)]
    if len(names := {score.label for score in scores}) > 1:
        raise Unusable(f"{logs[0].path} and others: their headlines are {', '.join(sorted(names))}; --headline")
    own = {label or getattr(log.headline(), "label", None) for log, label in zip(logs, labels, strict=True)}
    return Side(logs, scores, own.pop() if len(own) == 1 else None)


def reject_twice(logs: Sequence[RunLog]) -> None:
    """A run counts once, under whatever name. Raises Unusable."""
    first: dict[str, Path] = {}
    for log in logs:
        if log.sha256 in first:
            raise Unusable(f"{log.path} is the same log as {first[log.sha256]}")
        first[log.sha256] = log.path


def same_tokens(a: Side, b: Side) -> bool:
    """Whether nats per token compare: bits per byte are in one proportion to them if the tokenizer is one."""
    ratios = [s.val_bpb / s.val_loss for s in a.scores + b.scores if s.val_bpb is not None and s.val_loss]
    return not ratios or max(ratios) <= 1.001 * min(ratios)


def other_texts(a: Side, b: Side) -> str | None:
    """Why bits per byte of the two sides do not compare, or None: they are of one text, or nothing says otherwise."""
    known = [validation_bytes(log, score) for side in (a, b) for log, score in zip(side.logs, side.scores, strict=True)]
    sizes = [size for size in known if size is not None]
    if not of_one_text(sizes):
        return f"the sides are scored over different texts ({min(sizes):,.0f} and {max(sizes):,.0f} bytes)"
    if None in known and not same_tokens(a, b):
        return "the sides have other tokens, and not every log tells the validation bytes, which have to agree"
    return None


def remarks(sides: dict[str, Side]) -> list[str]:
    """What a reader of the test should know."""
    found = []
    for name, side in sides.items():
        seeds = Counter(log.seed for log in side.logs if log.seed is not None)
        if repeated := [str(seed) for seed, times in seeds.items() if times > 1]:
            found.append(f"{name} has several runs of seed {', '.join(repeated)}: not independent")
        for what, field in (("settings", "settings_hash"), ("source", "code_sha256")):
            if len({getattr(log, field) for log in side.logs}) > 1:
                found.append(f"{name} mixes runs of different {what}")
        if not all(score.exact for score in side.scores):
            found.append(f"{name} has figures that the log rounds to four decimals")
        for log in side.logs:
            found += [f"{log.path.name}: {said}" for said in log.undecided if "runs in one log" in said]
        if side.declared not in (None, side.label):
            own = [score for log in side.logs if (score := log.score(side.declared)) is not None]
            figures = [score.val_bpb for score in own if score.val_bpb is not None]
            mean = f" (val_bpb {statistics.fmean(figures):.5f})" if len(figures) == len(side.logs) else ""
            found.append(f"{name} declares {side.declared}{mean}, not {side.label}, which was asked for")
    labels = [side.label for side in sides.values()]
    if labels[0] != labels[1]:
        found.append(f"different results are compared: A {labels[0]}, B {labels[1]}")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Report
# ----------------------------------------------------------------------------------------------------------------------


def compare(a: Side, b: Side) -> dict:
    """Everything that is said, as the object that --json prints."""
    other_text = other_texts(a, b)
    comparable = same_tokens(a, b) and other_text is None
    samples = {metric: (a.sample(metric), b.sample(metric)) for metric in ("val_loss", "val_bpb")}
    better = {metric: None if None in pair else pair[1].mean - pair[0].mean for metric, pair in samples.items()}
    report: dict = {}
    for name, side in dict(a=a, b=b).items():
        loss, bpb = side.sample("val_loss"), side.sample("val_bpb")
        report[name] = dict(
            logs=[str(log.path) for log in side.logs],
            seeds=[log.seed for log in side.logs],
            label=side.label,
            declared=side.declared,
            n=len(side.logs),
            val_loss=loss and dict(mean=loss.mean, std=loss.std),
            val_bpb=bpb and dict(mean=bpb.mean, std=bpb.std),
        )
    report["better_by"] = dict(
        nats=better["val_loss"] if comparable else None, bpb=None if other_text else better["val_bpb"]
    )
    report["rules"] = []
    for rule in RULES:
        metric = rule.metric
        if metric == "val_bpb" and None in samples[metric] and comparable:
            metric = "val_loss"  # in proportion to it
        if other_text:
            verdict = Verdict(note=other_text)
        elif metric == "val_loss" and not comparable:
            verdict = Verdict(note="the sides have other tokens, so their nats per token do not compare")
        else:
            verdict = judge(rule._replace(metric=metric), *samples[metric])
        report["rules"].append({**rule._asdict(), "metric": metric, **verdict._asdict()})
    report["assumes"] = (
        "seeds independent and scores normal; more_seeds: the means and standard deviations of now are the true ones"
    )
    report["remarks"] = remarks(dict(A=a, B=b))
    return report


def describe(report: dict) -> str:
    """The report for a reader."""
    lines = []
    for name in ("a", "b"):
        side = report[name]
        figures = [f"{name.upper()}  {side['label']}  n {side['n']}"]
        for metric, unit in (("val_loss", "nats"), ("val_bpb", "bpb")):
            if stats := side[metric]:
                std = "unknown with one seed" if stats["std"] is None else f"{stats['std']:.5f}"
                figures.append(f"{unit} {stats['mean']:.5f} (std {std})")
        seeds = ", ".join("?" if seed is None else str(seed) for seed in side["seeds"])
        lines.append("  ".join([*figures, f"seeds {seeds}"]))
    differences = {unit: value for unit, value in report["better_by"].items() if value is not None}
    apart = ", ".join(f"{abs(value):.5f} {unit}" for unit, value in differences.items())
    better = "better" if min(differences.values(), default=0) >= 0 else "worse"
    lines.append(f"A is {better} by {apart}" if apart else "the means of A and B share no unit that compares")
    for rule in report["rules"]:
        met = {True: "met", False: "not met", None: "undecided"}[rule["met"]]
        line = f"rule {rule['name']}: {met}"
        if rule["p"] is not None:
            line += f'; p {rule["p"]:.4g}, needs < {rule["alpha"]:g} against "{rule["against"]}"'
            line += f" (t {rule['t']:.3f}, {rule['df']:.2f} degrees of freedom)"
        lines.append(f"{line}; {rule['note']}" if rule["note"] else line)
    if any(rule["more_seeds"] for rule in report["rules"]):
        lines.append("seeds still needed: if the means and standard deviations of now are the true ones; few seeds say")
        lines.append("little about a standard deviation, so take it for an order of magnitude")
    return "\n".join(lines + [f"note: {remark}" for remark in report["remarks"]])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "submit.py compare A [A ...] -- B [B ...] [--headline LABEL] [--json]"
    parser.add_argument("candidate", nargs="+", type=Path, metavar="A", help="logs or record folders of the candidate")
    parser.add_argument(
        "--versus", nargs="+", type=Path, metavar="B", default=[], help="what it has to beat; a bare -- says the same"
    )
    parser.add_argument("--headline", metavar="LABEL", help="the result to compare, where a log does not declare it")
    parser.add_argument("--json", action="store_true", help="the report as one JSON object")


@command
def run(args: argparse.Namespace) -> int:
    """Exit code: 0, or 2 where the sides cannot be compared."""
    if not args.versus:
        raise Unusable("a comparison has two sides: compare A... -- B...")
    a, b = (read_side(paths, args.headline) for paths in (args.candidate, args.versus))
    reject_twice(a.logs + b.logs)
    report = compare(a, b)
    print(json.dumps(report, indent=2) if args.json else describe(report))
    return 0
