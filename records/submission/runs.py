"""The runs of a folder: which logs are those that it declares, and what their scores amount to.

A folder often holds more than one experiment: a first run and its rerun, an original and an ablation, the same log
twice. Averaging over all would give a score that nobody ran, so the set is judged whose mean is the declared score.
"""

import dataclasses
import functools
import hashlib
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from records.submission import runlog
from records.submission.rules import may_differ
from records.submission.runlog import RunLog

MAX_COMPARED = 60  # logs of a folder that are compared with one another
EXACT_DIGITS = 5e-9  # half a unit of the eighth decimal, which `_exact` lines have
ROUNDED_DIGITS = 5e-5  # of the fourth, which other lines have


def number(value: Any) -> float | None:
    """A JSON value as a float, if it is a finite number."""
    found = runlog.number(float(value) if isinstance(value, Decimal) else value)
    return found if found is not None and math.isfinite(found) else None


def decimals(value: Any) -> int:
    """Digits after the point, as written."""
    value = Decimal(repr(value)) if isinstance(value, float) else value
    exponent = value.as_tuple().exponent if isinstance(value, Decimal) else 0
    return -exponent if isinstance(exponent, int) and exponent < 0 else 0


def score_digits(value: Any) -> int:
    """The same of a score: JSON writers drop zeros, and nobody claims a score to less than three digits."""
    return max(3, decimals(value))


# ----------------------------------------------------------------------------------------------------------------------
# Scores
# ----------------------------------------------------------------------------------------------------------------------

VALIDATION_TOKENS = re.compile(r"val_loader:.*\btokens:(\d{1,12})\b")
SAME_TEXT = 5e-4  # relative: bytes that follow from figures of four decimals, of texts that tokenizers fold alike


def validation_bytes(log: RunLog, score: runlog.ScoreLine | None) -> float | None:
    """Bytes of the text that a score is over: as the run's `result` states them, else as its tokens and the score in
    both units give them, else None."""
    if score is None:
        return None
    if stated := number(log.told_scores.get(score.label, {}).get("bytes")):
        return stated
    told = next((found for line in log.printed if (found := VALIDATION_TOKENS.search(line))), None)
    if told is None or not score.val_loss or not score.val_bpb:
        return None
    return int(told[1]) * score.val_loss / math.log(2) / score.val_bpb


def of_one_text(sizes: Iterable[float]) -> bool:
    """Whether these numbers of bytes are of one text."""
    sizes = list(sizes)
    return not sizes or max(sizes) - min(sizes) <= SAME_TEXT * min(sizes)


class Mean(NamedTuple):
    value: float
    n: int
    tolerance: float
    values: Sequence[float] = ()

    def reach(self, claim: Any) -> float:
        """How far the claim may lie from the mean: both were rounded, the claim and what the log has."""
        return (0.5 * 10.0 ** -score_digits(claim) + self.tolerance) * (1 + 1e-6) + 1e-12

    def gives(self, claim: Any, rounding: float = 0.0) -> bool:
        """Whether the mean is the claim; `rounding` is what the scores were rounded by before they were averaged."""
        claimed = number(claim)
        return claimed is not None and abs(claimed - self.value) <= self.reach(claim) + rounding


def scores_by_label(log: RunLog) -> dict[str, tuple[float | None, float | None, bool]]:
    """label -> (bpb, loss, whether unrounded); the last validation of training is one of them."""
    found = {score.label: (score.val_bpb, score.val_loss, score.exact) for score in log.scores}
    for label, score in log.told_scores.items():
        if label in found:
            found[label] = (number(score.get("val_bpb")), number(score.get("val_loss")), True)
    validated = [step for step in log.steps if step.val_bpb is not None]
    if validated:
        found.setdefault("last validation step", (validated[-1].val_bpb, validated[-1].val_loss, False))
    return found


def means(logs: Iterable[RunLog], index: int) -> dict[str, Mean]:
    """label -> mean over the logs that have it; index 0 is bpb, 1 loss."""
    columns: dict[str, list[float]] = {}
    rounded = set()
    for log in logs:
        for label, (*figures, exact) in scores_by_label(log).items():
            if figures[index] is not None and math.isfinite(figures[index]):
                columns.setdefault(label, []).append(figures[index])
                if not exact:
                    rounded.add(label)
    return {
        label: Mean(statistics.fmean(values), len(values), ROUNDED_DIGITS if label in rounded else EXACT_DIGITS, values)
        for label, values in columns.items()
    }


def declared_label(meta: Mapping) -> str | None:
    """The label of the line that submission.json declares as the headline."""
    for key in ("headline", "headline_label", "headline_line", "score_label", "declared_line", "metric_label"):
        value = meta.get(key)
        value = value.get("label") if isinstance(value, dict) else value
        if isinstance(value, str) and value.strip():
            return runlog.plain_label(value)
    return None


def headline_of(logs: Sequence[RunLog], meta: Mapping, claim: Any) -> tuple[str | None, str]:
    """(label of the score that counts, how that is known): declared, of the claimed mean, or each log's own."""
    if label := declared_label(meta):
        return label, "declared"
    found = means(logs, 0)
    fits = [label for label, mean in found.items() if mean.n == len(logs) and mean.gives(claim)]
    labels = {getattr(log.headline(), "label", None) for log in logs}
    own = labels.pop() if len(labels) == 1 else None
    if own is not None and (number(claim) is None or own in fits or all(log.dialect == "pgolf" for log in logs)):
        return own, "of every log"
    if fits and len({round(found[label].value, 8) for label in fits}) == 1:
        return fits[0], f"its mean is val_bpb {claim}"
    return None, ""


# ----------------------------------------------------------------------------------------------------------------------
# Which runs
# ----------------------------------------------------------------------------------------------------------------------


def as_seed(value: Any) -> int | None:
    found = re.fullmatch(r"(?:seed_?)?(\d{1,10})", str(value)) if isinstance(value, (int, str)) else None
    return int(found[1]) if found else None


def named_seed(name: str) -> int | None:
    found = re.search(r"seed[_-]?(\d{1,10})", name)
    return int(found[1]) if found else None


def seed_of(name: str, log: RunLog) -> int | None:
    """The seed a log states, else the one in its file name."""
    return named_seed(name) if log.seed is None else log.seed


def figures_of(log: RunLog) -> tuple | None:
    """What makes a log this run's and no other's: a copy without its source has them, too."""
    scores = tuple((score.label, *runlog.figures(score)) for score in log.scores)
    steps = tuple(repr(step[:6]) for step in log.steps)
    return (log.seed, scores, steps) if scores or steps else None


def family(name: str, log: RunLog) -> str:
    """A log's name without its seed: `a` of a_seed1.log, the empty text of seed_42.txt."""
    stem, seed = re.sub(r"(?:, run \d+|\.\w+)+$", "", name), seed_of(name, log)
    if seed is not None:
        stem = re.sub(rf"(?:seed|run|s)?[_-]?(?<!\d)0*{seed}(?!\d)", "", stem)
    stem = re.sub(r"(?:seed|run|rep|trial)[_-]?\d{1,10}", "", stem)
    return re.sub(r"[^a-z0-9/]+", "_", stem.lower()).strip("_")


@functools.lru_cache(256)
def short_hash(source: str) -> str:
    return hashlib.sha256(source.strip().encode("utf-8", "replace")).hexdigest()[:12]


def differences(a: RunLog, b: RunLog) -> Iterator[tuple[str, Any, Any]]:
    """(what, of a, of b) of all that two seeds of one configuration share and these do not; unknowns are left out."""
    pairs = {
        name: (getattr(a, name), getattr(b, name))
        for name in ("code_sha256", "model_params", "world_size", "settings_hash")
    }
    pairs["source"] = tuple(log.source and short_hash(log.source) for log in (a, b))
    for name in ("train_fingerprint", "val_fingerprint", "tokenizer_sha256"):
        pairs[name] = (a.result or {}).get(name), (b.result or {}).get(name)
    ours = a.dialect == b.dialect == "pgolf"
    first, second = a.settings or {}, b.settings or {}
    for name in sorted({*first, *second}) if first and second else ():
        if not may_differ(name, first.get(name, second.get(name)), ours):
            pairs[name] = str(first.get(name, "unset")), str(second.get(name, "unset"))
    for name, (mine, other) in pairs.items():
        if mine is not None and other is not None and mine != other:
            yield name, mine, other


class Choice(NamedTuple):
    """`judged` are the runs that the folder declares, `others` those of other experiments, `copies` name -> original.
    `decided` is False where nothing says which of several experiments is meant."""

    judged: list[str]
    others: list[str]
    copies: dict[str, str]
    decided: bool


def grouped(names: Sequence[str], same: Callable[[str, str], bool]) -> list[list[str]]:
    groups: list[list[str]] = []
    for name in names:
        home = next((group for group in groups if same(group[0], name)), None)
        if home is None:
            groups.append([name])
        else:
            home.append(name)
    return groups


def choose(logs: Mapping[str, RunLog], claim: Any, label: str | None, seeds: Iterable[int], listed: str) -> Choice:
    """Which logs are the runs of the folder. `claim` is its score, `label` the line that it declares, `seeds` those
    that it claims, `listed` the text of its JSON, which may name logs."""
    originals: dict[tuple, str] = {}
    copies: dict[str, str] = {}
    # A copy has the poorer name: the one that says its seed is the original, then the one that holds more.
    for name in sorted(logs, key=lambda name: (named_seed(name) != logs[name].seed, -logs[name].lines)):
        figures = figures_of(logs[name])
        if figures is not None and originals.setdefault(figures, name) != name:
            copies[name] = originals[figures]
    names = [name for name in logs if name not in copies]
    names, beyond = names[:MAX_COMPARED], names[MAX_COMPARED:]

    def distinct(group: Sequence[str]) -> bool:
        known = [seed for name in group if (seed := seed_of(name, logs[name])) is not None]
        return len(set(known)) == len(known)

    def apart(group: Sequence[str]) -> float:
        """How far the claim is from the mean of the group's nearest line."""
        found = means([logs[name] for name in group], 0)
        found = {label: found[label]} if label in found else found
        return min((abs(mean.value - number(claim)) for mean in found.values() if mean.n == len(group)), default=9.0)

    def alike(a: str, b: str) -> bool:
        return next(differences(logs[a], logs[b]), None) is None

    def kin(a: str, b: str) -> bool:
        return family(a, logs[a]) == family(b, logs[b])

    parts = [grouped(names, same) for same in (kin, alike, lambda a, b: kin(a, b) and alike(a, b))]
    candidates = [names, *([name for name in names if name in listed],), *(group for part in parts for group in part)]
    candidates = [group for group in candidates if group and distinct(group)]

    def choice(group: Sequence[str], decided: bool = True) -> Choice:
        return Choice(list(group), [name for name in [*names, *beyond] if name not in group], copies, decided)

    if len(parts[2]) <= 1:
        return choice(names)
    wanted = set(seeds)
    as_claimed = [group for group in candidates if {seed_of(name, logs[name]) for name in group} == wanted]
    if number(claim) is not None:
        near = 0.5 * 10.0 ** -score_digits(claim) + 2 * ROUNDED_DIGITS
        fits = [group for group in candidates if apart(group) <= near]
        if fits:
            return choice(min(fits, key=lambda group: (group not in as_claimed, round(apart(group), 6))))
    if as_claimed:
        return choice(as_claimed[0])
    if distinct(names):
        return choice(names)
    if number(claim) is not None:
        return choice(min(parts[2], key=apart))
    return choice(max(parts[2], key=len), decided=False)


def joined(name: str, logs: Mapping[str, RunLog], others: Iterable[str]) -> tuple[RunLog, str | None]:
    """(a log of an evaluation alone with what the log of its training says, the name of that); any other log as it is.
    The training is that of the same seed, where there is but one."""
    log = logs[name]
    found = [other for other in others if logs[other].steps and seed_of(other, logs[other]) == seed_of(name, log)]
    if log.steps or len(found) != 1 or any(differences(log, logs[found[0]])):
        return log, None
    training = logs[found[0]]
    names = [field.name for field in dataclasses.fields(RunLog) if field.name != "result"]
    empty = [field for field in names if getattr(log, field) in (None, [], {})]
    filled = {field: getattr(training, field) for field in empty if field not in ("undecided", "parts")}
    return dataclasses.replace(log, **filled, printed=training.printed + log.printed), found[0]
