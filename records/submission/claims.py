"""The check of numbers: what README.md and submission.json claim of the runs is in their logs or follows from them."""

import contextlib
import math
import re
import statistics
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import NamedTuple

from records.submission import runlog
from records.submission.foreign import MAX_LINE, Note, Submission, leaves
from records.submission.rules import CAP_BYTES
from records.submission.runlog import RunLog
from records.submission.runs import decimals, number, score_digits, seed_of

LOGGED_NUMBER = re.compile(r"(?<![\w.])[-+]?(\d[\d,_]*(?:\.\d+)?(?:[eE][-+]?\d{1,3})?)")
SCALES = {
    "score": (1.0,),
    "size": (1.0, 1e3, 1e6, 1024.0, 1048576.0),
    "steps": (1.0, 1e3),
    "time": (1.0, 1e3, 60.0, 6e4, 1e-3),
}


class Pool:
    """Numbers of logs to look claims up in, and statistics of them, which are rounded or cut where they are told."""

    def __init__(self, values: Iterable[float], statistics: Iterable[float] = ()):
        self.values, self.statistics = (
            sorted({abs(value) for value in found if math.isfinite(value)}) for found in (values, statistics)
        )

    def has(self, claim: float, digits: int, kind: str) -> bool:
        """Whether a number here gives the claim when rounded to its digits, in one of the units of its kind. A mean of
        whole numbers may be cut; one of scores may be that of scores that were rounded first."""
        unit = 10.0**-digits
        return self.near(self.values, claim, digits, kind, 0.0) or self.near(
            self.statistics, claim, digits, kind, unit if kind != "score" else 0.5 * unit if digits > 3 else 0.0
        )

    @staticmethod
    def near(values: list[float], claim: float, digits: int, kind: str, more: float) -> bool:
        half = 0.5 * 10.0**-digits if digits or kind != "size" else 0.0
        half = max(half, 1e-9) if kind == "score" else half
        for scale in SCALES[kind]:
            reach = (half if scale == 1.0 else max(half, 0.5 * 10.0**-digits)) * scale
            if kind == "size" and scale > 1:
                reach *= 2  # megabytes are often cut, not rounded
            reach = max(reach, more * scale) if kind != "score" else reach + more
            low, high = abs(claim) * scale - reach, abs(claim) * scale + reach
            i = bisect_left(values, low - 1e-9 * max(1.0, abs(low)))
            if i < len(values) and values[i] <= high + 1e-9 * max(1.0, abs(high)):
                return True
        return False


def logged_numbers(lines: Iterable[str]) -> Iterator[float]:
    for line in lines:
        for match in LOGGED_NUMBER.finditer(line[: runlog.MAX_JSON]):
            with contextlib.suppress(ValueError):
                yield float(match[1].replace(",", "").replace("_", ""))


def figures_of(log: RunLog) -> dict[str, float]:
    """The quantities of one run that a table may give a mean of."""
    names = ("bytes_total", "bytes_code", "bytes_model", "train_seconds", "eval_seconds")
    found: dict[str, float | None] = {name: getattr(log, name) for name in names}
    if log.bytes_total is not None:
        found["headroom"] = CAP_BYTES - log.bytes_total
    for score in log.scores:
        found |= {f"{score.label} bpb": score.val_bpb, f"{score.label} loss": score.val_loss}
    for label, score in log.told_scores.items():
        found |= {f"{label} bpb": number(score.get("val_bpb")), f"{label} loss": number(score.get("val_loss"))}
    if log.steps:
        last = log.steps[-1]
        found |= {"steps": float(last.step), "last bpb": last.val_bpb, "last loss": last.val_loss}
        if last.time_ms and last.step:
            found |= {"train_ms": last.time_ms, "step_ms": last.time_ms / last.step}
    found |= {f"phase {name}": seconds for name, seconds in log.phases.items()}
    numbers = {name: float(value) for name, value in found.items() if value is not None}
    for kind in ("bpb", "loss"):
        values = [(name, value) for name, value in numbers.items() if name.endswith(kind)][:20]
        numbers |= {f"{a} - {b}": x - y for i, (a, x) in enumerate(values) for b, y in values[:i]}
    return numbers


def statistics_of(logs: Iterable[RunLog]) -> Iterator[float]:
    """Mean, deviations, median and extremes of every quantity that several runs have."""
    columns: dict[str, list[float]] = {}
    for log in logs:
        for name, value in figures_of(log).items():
            columns.setdefault(name, []).append(value)
    for values in columns.values():
        yield from values
        if len(values) > 1 and all(map(math.isfinite, values)):
            yield from (statistics.fmean(values), statistics.stdev(values), statistics.pstdev(values))
            yield from (statistics.median(values), max(values) - min(values), sum(values))


FOREIGN_KEY = re.compile(
    r"base|compar|prev|delta|improv|gain|p_value|t_stat|threshold|limit|cap$|target|sota|parent|prior|ablation|budget"
    r"|max_wall"
)
CLAIM_KEYS = {
    "score": re.compile(r"bpb|val_loss|_loss$|nats"),
    "size": re.compile(r"bytes|size"),
    "steps": re.compile(r"steps?$|step_stop$"),
    "time": re.compile(r"time|seconds|wallclock|_ms$|_s$|step_avg"),
}


def check_numbers(s: Submission) -> Iterator[Note]:
    """Every score, size, step count and time that README.md and the JSON claim is in a log, or a statistic of logs."""
    if not s.runs:
        yield Note("skip", "no log to compare with")
        return
    shared = list(statistics_of(s.runs.values()))
    sizes = [float(size) for size in s.files.values()]
    own = {name: list(logged_numbers(log.printed)) for name, log in s.runs.items()}
    others = [value for name in s.choice.others for value in logged_numbers(s.logs[name].printed)]
    pool = Pool([value for values in own.values() for value in values] + others + sizes, shared)
    by_seed = {
        seed_of(name, log): Pool(own[name] + sizes + list(figures_of(log).values())) for name, log in s.runs.items()
    }
    for path, value in leaves(s.meta):
        claimed = number(value)
        kind = next((kind for kind, pattern in CLAIM_KEYS.items() if pattern.search(path.lower().split("[")[0])), None)
        if claimed is None or claimed == 0 or kind is None or FOREIGN_KEY.search(path.lower()):
            continue
        if path.lower().startswith(("settings", "attribution", "hyperparam", "config", "model_config")):
            continue
        row = re.match(r"seed_results\.(?:seed_?)?(\d+)\.", path)
        where, place = (by_seed.get(int(row[1])), f"the log of seed {row[1]}") if row else (pool, "any log")
        digits = score_digits(value) if kind == "score" else decimals(value)
        if where is not None and not where.has(claimed, digits, kind):
            known = re.fullmatch(r"bytes_(?:total|model)|(?:mean_|pre_quant_)?val_(?:bpb|loss)\w*", path)
            level = "FAIL" if known or row or s.ours else "warn"
            yield Note(level, f"{s.json_name} {path}: {value} is not in {place}")
    for claim in readme_claims(s.readme, s.seeds):
        where = by_seed.get(claim.seed, pool) if claim.seed is not None else pool
        if not where.has(claim.value, claim.digits, claim.kind):
            row = claim.seed is not None and claim.seed in by_seed
            place = f"the log of seed {claim.seed}" if row else "any log"
            level = "FAIL" if claim.kind in ("score", "size") and (row or s.ours) else "warn"
            yield Note(level, f"README.md line {claim.line}: {claim.text} ({claim.kind}) is not in {place}")


class Claim(NamedTuple):
    """A number that README.md claims of these runs."""

    kind: str
    value: float
    digits: int
    line: int
    text: str
    seed: int | None
    column: str = ""


README_NUMBER = re.compile(r"(?<![\w.#/@^])[-+−±~≈]?(\d{1,3}(?:,\d{3})+|\d+)(\.\d+)?(?![\w%]*[\d/])(?!\.\d)")
UNIT = {
    "size": re.compile(r"\s?(?:bytes|B|MB|MiB|KB|kB|KiB)\b"),
    "time": re.compile(r"\s?(?:ms|s|sec|seconds|min|minutes)\b"),
    "steps": re.compile(r"\s?(?:training )?(?:steps|iterations)\b"),
    "score": re.compile(r"\s?(?:val_)?(?:bpb|BPB|nats|bits per byte)\b"),
}
NEARBY = {
    "score": re.compile(r"bpb|val_loss|val loss|\bscore|mean|\bnats\b|seed \d+|±|\bstd\b", re.I),
    "setting": re.compile(
        r"decay|\blr\b|rate|beta|momentum|eps|scale|threshold|\bwd\b|clip|ratio|frac|dropout|temperature|init|base|gain"
        r"|alpha|lambda|softcap|version|torch|=",
        re.I,
    ),
}
HEADER = {
    "score": re.compile(
        r"bpb|val_loss|val loss|\bloss\b|nats|final_|legal_ttt|roundtrip|sliding|quantized|float weights", re.I
    ),
    "size": re.compile(r"bytes|size|artifact", re.I),
    "steps": re.compile(r"^(?!.*(?:\bms\b|\bs/|/ ?step|per step|avg|time)).*\bsteps?\b(?!/)", re.I),
    "time": re.compile(r"time|seconds|, ?s\b|\(s\)|\bms\b|train s|eval s", re.I),
}
# Lines about something other than these runs: other entries, rules, differences, plans.
ELSEWHERE = re.compile(
    r"#\d|\bPR\b|baseline|previous|prior|publish|sota|merged|record\b|ablat|\bvs\.?\b|compar|Δ|delta|improve|credit|lineage"
    r"|naive|reference|leaderboard|\bcap\b|limit|budget|at most|≤|<|under|below|threshold|earlier|without|instead|gain"
    r"|default|would|expected|about|roughly|each|per |every|reserve|first|until|from step|at step|after",
    re.I,
)


def readme_claims(text: str, seeds: Iterable[int]) -> Iterator[Claim]:
    """Numbers with a kind: in a table column that has one, with a unit, or after a word that says score."""
    known, header, fenced, foreign = {str(seed): seed for seed in seeds}, [], False, False
    for i, line in enumerate(text.split("\n")[:5000], 1):
        line = line[:MAX_LINE]
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
            continue
        if line.startswith("#") and not fenced:
            foreign, header = bool(ELSEWHERE.search(line)) and i > 1, []
        if foreign or (fenced and re.search(r"[A-Z_]{3,}=|torchrun|python|pip |\$ ", line)):
            continue
        if line.lstrip().startswith("|") and not fenced:
            cells = [cell.strip().strip("*") for cell in line.strip().strip("|").split("|")]
            if not header or all(re.fullmatch(r":?-+:?", cell) for cell in cells):
                header = header or cells
                continue
            yield from table_claims(header, cells, i, known)
            continue
        header = []
        line = re.sub(r"`[^`]*`|\]\([^)]*\)|https?://\S+", lambda m: " " * len(m[0]), line)
        for part in re.split(r"(?<=[a-z)])[.;] ", line):
            if not ELSEWHERE.search(part):
                yield from prose_claims(part, i)


def table_claims(header: list[str], cells: list[str], line: int, known: Mapping[str, int]) -> Iterator[Claim]:
    row = " ".join(cells)
    # `T7` and `S7` name a row, not a seed.
    numbers = re.findall(r"(?<![A-Za-z0-9.+-])(?:seed[ _-]?)?(\d+)(?![\w.%])", cells[0], re.I) if cells else ()
    seed = next((known[word] for word in numbers if word in known), None)
    if seed is None and ELSEWHERE.search(cells[0]):
        return
    for name, cell in zip(header, cells, strict=False):
        kind = next((kind for kind, pattern in HEADER.items() if pattern.search(name)), None)
        found = README_NUMBER.search(re.sub(r"[*`_]", "", cell))
        if kind is None or found is None or ELSEWHERE.search(name) or re.search(r"[A-Za-z]{6,}", cell):
            continue
        if not (kind == "score" and not found[2]):  # a whole number is no score
            yield make_claim(kind, found, line, None if "mean" in row.lower() else seed)._replace(column=name)


def prose_claims(text: str, line: int) -> Iterator[Claim]:
    for found in README_NUMBER.finditer(text):
        kind = next((kind for kind, unit in UNIT.items() if unit.match(text, found.end())), None)
        digits = len(found[2] or ".") - 1
        if kind is None and digits >= 4 and 0.3 < float(found[1].replace(",", "") + (found[2] or "")) < 12:
            before = text[max(0, found.start() - 40) : found.start()]
            last = {name: max((m.end() for m in word.finditer(before)), default=-1) for name, word in NEARBY.items()}
            kind = "score" if last["score"] > last["setting"] else None
        if kind in ("score", None) and digits == 0 or kind is None:
            continue
        value = float(found[1].replace(",", "") + (found[2] or ""))
        if kind == "time" and value in (600, 10, 300) or kind == "size" and value in (CAP_BYTES, 16, 16_777_216):
            continue
        if kind == "score" and value < 0.3 and not re.search(r"±|std", text[max(0, found.start() - 6) : found.end()]):
            continue  # a difference
        yield make_claim(kind, found, line, None)


def make_claim(kind: str, found: re.Match, line: int, seed: int | None) -> Claim:
    text = found[1] + (found[2] or "")
    return Claim(kind, float(text.replace(",", "")), len(found[2] or ".") - 1, line, text, seed)


def readme_scores(text: str, seeds: Iterable[int]) -> list[Decimal]:
    """The bpb of each seed in a table of README.md, as written there; empty where not every seed has one."""
    seeds, found = list(seeds), {}
    for claim in readme_claims(text, seeds):
        if claim.seed is not None and claim.kind == "score" and "bpb" in claim.column.lower():
            found.setdefault(claim.seed, Decimal(claim.text))
    return list(found.values()) if len(found) == len(seeds) else []
