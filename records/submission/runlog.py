"""Reads the log of a run, in every dialect in use around the challenge.

A log is untrusted input, and its figures decide about a record. So: sizes are bounded, every pattern is linear, numbers
inside a dump of the source are never results, and what cannot be decided is None and said in RunLog.undecided.
"""

import hashlib
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from records.submission.command import Unusable

MAX_BYTES = 256 << 20  # of a log; the longest public ones have a few MB
MAX_LINES = 1_000_000
MAX_LINE = 4096  # characters of a line that can be a result; settings and result are JSON and may be longer
MAX_JSON = 1 << 20
MAX_RESULTS = 300  # scores, and sizes, of a log
MAX_UNDECIDED = 50
MAX_PARTS = 32  # runs of one log that are read one by one
BYTES_PER_WEIGHT = 1.5  # a submission with more than that holds floats: the raw model
TRAINING_PHASES = ("train", "average", "calibrate")  # what the training clock of train_gpt.py holds


class LogError(Unusable):
    """Input that cannot be used, in one line for the user."""


class Step(NamedTuple):
    """A line of the training loop. time_ms is the training clock."""

    step: int
    total: int | None
    train_loss: float | None
    val_loss: float | None
    val_bpb: float | None
    time_ms: float | None
    line: int
    tokens_per_s: float | None = None


class ScoreLine(NamedTuple):
    """A result. label is without _exact; exact says that the figures are unrounded; they may be nan or inf."""

    label: str
    val_loss: float | None
    val_bpb: float | None
    exact: bool
    line: int
    extra: str  # what else it depends on: "stride:64", "(stride=16, T=0.90)"
    eval_ms: float | None = None

    @property
    def is_finite(self) -> bool:
        return all(math.isfinite(value) for value in (self.val_loss, self.val_bpb) if value is not None)


class SizeLine(NamedTuple):
    """A `Total submission size` line; label is what stands before the colon, often empty."""

    label: str
    bytes: int
    line: int


@dataclass
class RunLog:
    """What a log says. A field is None where the log does not say it, or not clearly: then see `undecided`."""

    path: Path
    sha256: str  # of the file's bytes, or of one run's text among several
    dialect: str = "unknown"  # pgolf (train_gpt.py of this project) | baseline | baseline-noprefix | unknown
    lines: int = 0
    seed: int | None = None
    run_id: str | None = None
    world_size: int | None = None
    model_params: int | None = None
    settings: dict[str, object] | None = None
    settings_hash: str | None = None
    code_sha256: str | None = None  # as the log states it
    source: str | None = None
    steps: list[Step] = field(default_factory=list)
    scores: list[ScoreLine] = field(default_factory=list)
    sizes: list[SizeLine] = field(default_factory=list)
    bytes_code: int | None = None  # as counted in the total
    bytes_source: int | None = None  # uncompressed, where the log states both
    bytes_model: int | None = None
    bytes_total: int | None = None
    train_seconds: float | None = None
    eval_seconds: float | None = None
    phases: dict[str, float] = field(default_factory=dict)
    events: list[tuple[str, int]] = field(default_factory=list)
    device: str | None = None
    torch: str | None = None
    cuda: str | None = None
    python: str | None = None  # "3.12"
    result: dict | None = None
    audit: dict[str, tuple[bool, str]] = field(default_factory=dict)
    undecided: list[str] = field(default_factory=list)
    runs: list[int] = field(default_factory=list)  # line at which each run in the file begins; one, as a rule
    results: int = 0  # number of different `result` lines
    unnamed: int = 0  # scores whose label could not be read, and which no other line gives
    printed: list[str] = field(default_factory=list, repr=False)  # its lines, without stamps and without its source
    parts: list["RunLog"] = field(default_factory=list)  # where there are several runs: each, read by itself

    def score(self, label: str) -> ScoreLine | None:
        """The result of this label; None if there is none or if several differ."""
        found = [score for score in self.scores if score.label == label]
        return found[0] if len(found) == 1 else None

    @property
    def told_scores(self) -> dict[str, dict]:
        """What the `result` line says of each score, by label."""
        scores = (self.result or {}).get("scores")
        return {k: v for k, v in scores.items() if isinstance(v, dict)} if isinstance(scores, dict) else {}

    def each(self) -> list["RunLog"]:
        """The runs in the log, one by one where each has its score; else the log as it is."""
        apart = len(self.parts) > 1 and all(part.candidates() for part in self.parts)
        return self.parts if apart else [self]

    def candidates(self) -> list[ScoreLine]:
        """The results that could be the headline: all but diagnostics."""
        return [score for score in self.scores if not DIAGNOSTIC.search(score.label)]

    def headline(self) -> ScoreLine | None:
        """The score of the run: what its `result` line declares, else the last of its results if none is better."""
        return self.headline_and_why()[0]

    def headline_and_why(self) -> tuple[ScoreLine | None, str]:
        """Passes get better one after another, and the last is what a run was made for: a last score that is also the
        best is taken. One that is worse is a diverged pass, or another experiment: not decided."""
        if self.dialect == "pgolf":
            return self._declared(), "its `result` line declares it"
        scores = [score for score in self.candidates() if score.val_bpb is not None] or self.candidates()
        if not scores or self.unnamed:
            return None, ""
        # An old label is often printed again with the same figures, for the sake of somebody's parser.
        last = next(score for score in scores if figures(score) == figures(scores[-1]))
        if len({figures(score) for score in scores}) == 1:
            return last, "it is the only one"
        values = [score.val_loss if score.val_bpb is None else score.val_bpb for score in scores]
        if len(self.runs) > 1 or not values[-1] <= min(values):
            return None, ""
        return last, "it is the last of the log and the best"

    def _declared(self) -> ScoreLine | None:
        headline = (self.result or {}).get("headline")
        if not isinstance(headline, dict) or not isinstance(headline.get("label"), str) or self.results > 1:
            return None
        label, loss, bpb = headline["label"], number(headline.get("val_loss")), number(headline.get("val_bpb"))
        logged = self.score(label)
        if logged is None or not (agree(logged.val_loss, loss) and agree(logged.val_bpb, bpb)):
            return None
        return logged._replace(val_loss=loss, val_bpb=bpb, exact=True)


def parse(path: Path) -> RunLog:
    """The log in a file. Raises LogError where it is missing, no text, or too large."""
    path = Path(path)
    try:
        if not path.is_file():
            raise LogError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise LogError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_BYTES:
        raise LogError(f"{path}: larger than {MAX_BYTES >> 20} MiB; no log of a run is")
    text, encoding, replaced = decode(data, path)
    log = parse_text(text, path)
    log.sha256 = hashlib.sha256(data).hexdigest()
    if replaced:
        log.undecided.append(f"{replaced} characters are not {encoding}")
    return log


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def parse_text(text: str, path: Path) -> RunLog:
    """The log in a string. Raises LogError where it is too large."""
    log = RunLog(Path(path), text_sha256(text))
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if text.count("\n") >= MAX_LINES:
        raise LogError(f"{path}: more than {MAX_LINES} lines; no log of a run has as many")
    lines = text.split("\n")
    log.lines = len(lines) - (lines[-1] == "")
    if not COMPLETE.search(lines[-1][-16:]):
        log.undecided.append(f"line {len(lines)}, the last, has no end and was not read: it may be cut off")
        lines[-1] = ""
    _Reader(log, lines).read()
    if 1 < len(log.runs) <= MAX_PARTS:
        bounds = [0, *(line - 1 for line in log.runs[1:]), len(lines)]
        for start, end in zip(bounds, bounds[1:], strict=False):
            part = RunLog(log.path, text_sha256("\n".join(lines[start:end]).strip()), lines=end - start)
            _Reader(part, lines[start:end], start).read()
            log.parts.append(part)
    return log


def decode(data: bytes, path: Path) -> tuple[str, str, int]:
    """(text, encoding, number of undecodable places). Raises LogError where the bytes are no text."""
    marks = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    encoding = next((name for mark, name in marks.items() if data.startswith(mark)), "utf-8")
    if encoding == "utf-8":
        # UTF-16 without a mark: of every two bytes of a log, one is 0.
        head = data[:8192]
        zeros = [head[i::2].count(0) / max(1, len(head) // 2) for i in (0, 1)]
        if min(zeros) < 0.05 and max(zeros) > 0.3:
            encoding = "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    if encoding.startswith("utf-8"):
        data = data.rstrip(b"\0")  # what a file system leaves at the end of a file after a crash
    elif len(data) % 2:
        data = data[:-1]  # cut inside a character
    text = data.decode(encoding, "replace")
    replaced = text.count("\ufffd")
    if "\0" in text or replaced > 16 + len(text) // 100:
        raise LogError(f"{path}: not a text file")
    return text, encoding, replaced


# ----------------------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------------------

NUMBER = r"[-+]?(?:\d{1,18}(?:\.\d{0,30})?(?:[eE][-+]?\d{1,3})?|nan|inf)"


def number(value: object) -> float | None:
    """A JSON value as a float, if it is a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def whole(value: object) -> int | None:
    """A JSON value as an int, if it is one."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def shallow(value: object, levels: int = 8) -> bool:
    """Whether a JSON value is nested so little that it can be compared and written without a limit in mind."""
    if not isinstance(value, (dict, list)):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(shallow(item, levels - 1) for item in inner)


def count(text: str) -> int:
    """An integer as logs write it: 15863489, 15,863,489 or 15_863_489."""
    return int(text.replace(",", "").replace("_", ""))


def agree(a: float | None, b: float | None) -> bool:
    """Whether two figures can be one result, one of them rounded to four decimals or not printed."""
    if a is None or b is None or a == b or (math.isnan(a) and math.isnan(b)):
        return True
    return abs(a - b) <= 0.5001e-4


def same_result(a: ScoreLine, b: ScoreLine) -> bool:
    """Whether two lines give one result: rounded and exact, or the same line twice."""
    if a.label != b.label or (a.extra and b.extra and a.extra != b.extra):
        return False
    if a.exact and b.exact and None not in (*a[1:3], *b[1:3]):
        return figures(a) == figures(b)
    return agree(a.val_loss, b.val_loss) and agree(a.val_bpb, b.val_bpb)


def plain_label(label: str) -> str:
    """A label without what says that its figures are unrounded: `X_exact sliding` is `X sliding`."""
    return re.sub(r"_exact\b", "", label.strip())


def read_figures(line: str) -> dict[str, float] | None:
    """{name: value} of a line, times in ms; None if it gives one of them twice and differently."""
    found: dict[str, float] = {}
    for name, digits, unit in FIGURE.findall(line):
        if name.endswith("_time") == bool(unit):
            value = float(digits.replace(",", "")) * UNITS_MS.get(unit, 1.0)
            if repr(found.setdefault(name, value)) != repr(value):
                return None
    return found


def figures(score: ScoreLine) -> tuple[str, str]:
    """The figures of a result as text: nan equals nan."""
    return repr(score.val_loss), repr(score.val_bpb)


# ----------------------------------------------------------------------------------------------------------------------
# Dumps of the source
# ----------------------------------------------------------------------------------------------------------------------

QUOTES = ('"""', "'''", 'r"""', "r'''")
BEGIN = re.compile(r"===== source begin bytes:(\d{1,12}) =====$")
END = "===== source end ====="
SEPARATOR = re.compile(r"={20,}$")
IMPORT = re.compile(r"(?:import [\w.]+(?: as \w+)?\s*(?:[,;#].*)?|from [\w.]+ import\b.*)$")
# A line at which a logical line of Python can begin. Generous: it only has to tell source from what follows a dump.
PYTHON = re.compile(
    r"""\s|$|[#@)\]}]
    | (?:import|from|def|class|if|elif|else|for|while|with|try|except|finally|return|raise|assert|pass|global|del
        |async|await|nonlocal|yield|break|continue|match)\b(?!:?\d)
    | [rbfuRBFU]{0,2}["'] | [A-Za-z_][\w.]*[([]
    | [A-Za-z_][\w.]*(?:,[ ]?[A-Za-z_][\w.]*)*[ ]?(?::[ ]?[\w.]+(?:\[[^]=]*\])?(?:[ ]\|[ ][\w.]+)*[ ]?)?
        (?:[-+*/|&%@^]|//|\*\*|<<|>>)?=
    """,
    re.VERBOSE,
)
TOKEN = re.compile(r""" (\"{3}|'{3}) | "(?:\\.|[^"\\])*"? | '(?:\\.|[^'\\])*'? | \#.* | [([{] | [)\]}] | \\$ """, re.X)
CLOSING = {quote: re.compile(rf"\\.|{quote}") for quote in ('"""', "'''")}


class Dump(NamedTuple):
    """Lines [start, end) of a log hold its source."""

    start: int
    end: int
    source: str
    whole: bool  # False where it does not end


def find_dumps(lines: Sequence[str]) -> Iterator[Dump]:
    """Every dump: between our markers, or Python at the top level, as the public scripts print it.

    Public dumps have no common marker. So a dump begins with an import, or with what leads to one, and ends before the
    first line that cannot be Python; strings and brackets over several lines are followed, because a docstring may
    quote a log. The baseline's own end, `====...` and `Running Python`, ends a dump in any case.
    """
    imports = [bool(IMPORT.match(line[:300])) for line in lines]
    i, tested = 0, 0
    while i < len(lines):
        dump = None
        if begin := BEGIN.match(lines[i]):
            dump = marked_dump(lines, i, int(begin[1]))
        elif i >= tested and (imports[i] or may_open_source(lines, i)):
            tested, complete = python_end(lines, i)
            if True in imports[i:tested] or begins_with_source(lines, i):
                source = "\n".join(lines[i:tested]).removesuffix("\n") + "\n"  # print() ends it with one of its own
                dump = Dump(i, tested, source, complete)
        if dump is not None:
            yield dump
        i = max(i + 1, dump.end if dump is not None else 0)


def marked_dump(lines: Sequence[str], start: int, size: int) -> Dump:
    """The dump that begins at our marker. The size tells which end marker is meant: the source may hold one too."""
    end, length = 0, -1
    for i in range(start + 1, len(lines)):
        if lines[i] == END:
            breaks = i - start - 1
            if length in (size, size - breaks + 1):  # the latter: a source whose lines end in \r\n
                end = i
                break
            end = end or i
        length += len(lines[i].encode("utf-8", "surrogatepass")) + 1
        if end and (length > size + 1 or BEGIN.match(lines[i])):
            break
    if not end:
        return Dump(start, len(lines), "\n".join(lines[start + 1 :]), False)
    source = "\n".join(lines[start + 1 : end])
    if len(source.encode("utf-8", "surrogatepass")) != size:
        crlf = source.replace("\n", "\r\n")
        source = crlf if len(crlf.encode("utf-8", "surrogatepass")) == size else source
    return Dump(start, end + 1, source, True)


def may_open_source(lines: Sequence[str], i: int) -> bool:
    """Whether Python that has its imports further down may begin at this line."""
    line = lines[i]
    at_top = i < 8 and line != "" and not any(lines[:i]) and PYTHON.match(line[:300])
    return bool(at_top) or line.startswith(("#!", *QUOTES)) or begins_with_source(lines, i)


def begins_with_source(lines: Sequence[str], i: int) -> bool:
    """Whether Python begins at this line even if it has no import, being cut off: where only a dump can begin."""
    announced = i > 1 and SEPARATOR.match(lines[i - 1]) and lines[i - 2].startswith("Source")
    return bool(announced) or (i < 8 and not any(lines[:i]) and lines[i].startswith(("#!", *QUOTES)))


def python_end(lines: Sequence[str], start: int) -> tuple[int, bool]:
    """(index after the Python source that begins at `start`, whether it ends outside strings and brackets)."""
    depth, quote, goes_on = 0, "", False
    for i in range(start, len(lines)):
        line, position = lines[i], 0
        if SEPARATOR.match(line) and i + 1 < len(lines) and lines[i + 1].startswith("Running Py"):
            return i, True
        if not (depth or quote or goes_on) and not PYTHON.match(line[:300]):
            return i, True
        goes_on = False
        while position < len(line):
            if quote:
                closing = CLOSING[quote].search(line, position)
                if closing is None:
                    break
                position = closing.end()
                if closing[0] == quote:
                    quote = ""
                continue
            token = TOKEN.search(line, position)
            if token is None:
                break
            position, first = token.end(), token[0][0]
            if token[1]:
                quote = token[1]
            elif first in "([{":
                depth += 1
            elif first in ")]}":
                depth = max(0, depth - 1)
            elif first == "\\":
                goes_on = True
    return len(lines), not (depth or quote or goes_on)


# ----------------------------------------------------------------------------------------------------------------------
# Lines
# ----------------------------------------------------------------------------------------------------------------------

# A last line without a newline is whole if it ends as a result, a time or a size does; a number may be cut short.
COMPLETE = re.compile(r"(?:^|\.\d{8}|\dms|bytes|[})])$")
ESCAPES = re.compile(r"\x1b\[[0-9;]{0,16}[A-Za-z]")
# What launchers and loggers put in front of a line: `[rank0]: `, `2026-03-20 10:00:00,123 - INFO - `, `[12:34:56] `,
# `1776142360.538 `.
CLOCK_TIME = r"\d\d:\d\d:\d\d[.,\d]{0,10}"
PREFIX = re.compile(
    rf"""(?: \[rank\d{{1,4}}\]:?[ ] | \[default\d{{1,4}}\]:
    | \[?\d{{4}}-\d\d-\d\d[T ]{CLOCK_TIME}(?:Z|[ ]?[+-]\d\d:?\d\d)?\]?:?[ ](?:[-|][ ])?
    | \[{CLOCK_TIME}\]:?[ ](?:[-|][ ])? | {CLOCK_TIME}:?[ ](?:[-|][ ])?
    | \[?1\d{{9}}(?:\d{{3}}|\.\d{{1,9}})?\]?:?[ ](?:[-|][ ])?
    | \[[ ]{{0,8}}\d{{1,7}}(?:\.\d{{1,6}})?[ ]?s?\][ ]
    | \[?(?:INFO|DEBUG|WARNING)\]?(?::\w{{1,20}}:|:?[ ](?:[-|][ ])?) ){{1,4}}""",
    re.VERBOSE,
)
SETTING = re.compile(r"\s{1,8}(\w[\w.-]{0,80}):(?:\s(.*))?$")  # of a `Hyperparameters:` list; its value may be empty
FIRST_WORD = re.compile(r"[A-Za-z_]\w{0,40}(?=[:\s])")
STEP = re.compile(
    r"(?:(step:) ?(\d{1,12})(?:/(\d{1,12}))?|()(\d{1,12})/(\d{1,12}))[:,]? "
    r"(?=.{0,200}?\b(?:loss|train_loss|val_loss|val_bpb))"
)
FIGURE = re.compile(
    r"(?<![\w.])(train_loss|val_loss|val_bpb|train_time|eval_time|tok/s)(?:: ?|=)"
    rf"(\d{{1,3}}(?:,\d{{3}}){{1,5}}|{NUMBER})(ms|s|m|h)?(?![\w.%{{]|,\d)"
)
SHORT_NAMES = {"loss": "train_loss", "t": "train_time"}  # `step:5/9 loss:2.1 t:450ms`
SHORT = re.compile(r"(?<![\w.])(loss|t)(?=[:=])")
UNITS_MS = {"ms": 1.0, "s": 1e3, "m": 6e4, "h": 3.6e6}
LABEL_WORD = re.compile(r"[A-Za-z][\w+.-]*:?$")
EXTRA_WORD = re.compile(r"\(|\S{1,60}[=:]\S|\S{0,60}\)$")
PROGRESS = re.compile(r"(?:chunk|batch|step|doc|window|epoch|iter|progress|seq|phase)\w{0,8}[=: ]\[?\d", re.I)
DIAGNOSTIC = re.compile(
    r"diagnostic|pre.?quant|pre.?ttt|post.?(?:ema|swa)|\b(?:raw|float|best|running|partial)\b", re.IGNORECASE
)
SIZE = re.compile(
    r"(Total submission size|Serialized model|(?:[A-Za-z+()-]{1,20} ){0,2}[Cc]ode (?:size|bytes))([^:]{0,60}): ?~?"
    r"(\d[\d,_]{0,24})(\.\d{1,9})? ?(bytes|[kKMG]i?B|B|$)(?![\w/])"
)
# Bytes of the cap: `15873489/16000000`.
BUDGET = re.compile(r"\bbudget: ?(\d[\d,_]{0,24}) ?/ ?(\d[\d,_]{0,24})\b(?!\.)")
BUDGETS = (16_000_000, 16 << 20)  # what has another limit is a budget of something else
UNPACKED = re.compile(r"uncompressed|unpacked|\braw\b|\bsource\b|original", re.I)
EVENT = re.compile(r"(\w{1,40}):(?:enabled|activated|start(?:ed|ing)?|on)\b.{0,80}?\bstep[: ] ?(\d{1,12})\b")
STOP = re.compile(r"stopping_early:.{0,200}?step:? ?(\d{1,12})")
CLOCK = re.compile(r"stopping_early:.{0,200}?train_time[:=]? ?(\d{1,12}(?:\.\d{1,9})?)ms")
GPU = re.compile(r"\|\s{1,8}\d{1,3}\s{1,8}((?:NVIDIA|AMD|Tesla) [\w -]{1,40}?)\s{1,24}(?:On|Off|N/A)\b")

# First word of a line -> the facts in it: (field, what the value is, pattern).
FACTS: dict[str, list[tuple[str, Callable, re.Pattern]]] = defaultdict(list)
for _name, _kind, _pattern in (
    ("code_sha256", str, r"code_sha256:([0-9a-f]{64})\b"),
    ("settings_hash", str, r"code_sha256:\w{1,64} settings_hash:([0-9a-f]{1,64})\b"),
    ("torch", str, r"torch:(\S{1,60})"),
    ("cuda", str, r"torch:\S{1,60} cuda:(\d\S{0,20})"),
    ("python", str, r"torch:\S{1,60} .{0,60}?\bpython:(3\.\d{1,2})\b"),
    ("device", str, r"torch:\S{1,60} .{0,60}?\bdevice:(.{1,80})"),
    ("python", str, r"Running Python (3\.\d{1,2})\b"),
    ("torch", str, r"Running PyTorch (\S{1,60})"),
    ("cuda", lambda digits: f"{digits[:-1]}.{digits[-1]}", r"Running PyTorch \S{1,50}\+cu(\d{3})\b"),
    ("run_id", str, r"setting:RUN_ID=(.{1,200})"),
    ("python", str, r"Python (?:version)?:? ?(3\.\d{1,2})\b"),
    ("python", str, r"python(?:_version)?[:=] ?(3\.\d{1,2})\b"),
    ("model_params", count, r"params: ?(\d[\d,_]{0,23})(?![\w.])"),
    ("seed", int, r"params:.{0,200}?\bs: ?(\d{1,18})\b(?!\.)"),
    ("seed", int, r"s: ?(\d{1,18})$"),
    ("seed", int, r"seed: ?(\d{1,18})$"),
    ("model_params", count, r"model_params: ?(\d[\d,_]{0,23})$"),
    ("world_size", int, r"world_size: ?(\d{1,6})\b"),
    ("eval_seconds", float, r"total_eval_time: ?(\d{1,9}(?:\.\d{1,9})?)s$"),
):
    FACTS[re.match(r"\w+", _pattern)[0]].append((_name, _kind, re.compile(_pattern)))
# What stands once at the head of a run.
HEADS = ("code_sha256:", "Running Python", "Hyperparameters:", "seed:", "===== source begin")


class _Reader:
    """Collects what the lines say, then decides. A fact said twice in two ways is not decided."""

    def __init__(self, log: RunLog, lines: list[str], first: int = 0):
        self.log, self.raw, self.first = log, lines, first  # the number of lines before these
        self.lines = [without_prefix(line) for line in lines]
        self.facts: dict[str, dict[object, int]] = defaultdict(dict)  # field -> value -> first line that says so
        self.named: list[tuple[str, SizeLine]] = []  # every size, with what it is the size of
        self.unnamed: list[tuple[int, float | None, float | None]] = []  # (line, loss, bpb) of no readable label
        self.results: list[tuple[int, dict]] = []
        self.prefixed: bool | None = None  # whether the steps have `step:`
        self.began = False  # something was trained or scored since the last head of a run
        self.fresh_head = 0  # line of a head that a `resume:` line may turn out to belong to an earlier run
        self.settings: list[dict[str, object]] = []  # of each run
        self.settings_block: dict[str, object] | None = None  # a `Hyperparameters:` list that is being read

    def read(self) -> None:
        log, start = self.log, 0
        for dump in find_dumps(self.lines):
            self.read_lines(start, dump.start)
            self.head(self.first + dump.start + 1)
            stamped = self.raw[dump.start] != self.lines[dump.start]
            plain = None if stamped else next(find_dumps(self.raw[dump.start : dump.end]), None)
            self.fact("source", (plain or dump).source, self.first + dump.start + 1)
            start = dump.end
            if not dump.whole:
                self.undecided(f"the source that begins at line {self.first + dump.start + 1} does not end")
        self.read_lines(start, len(self.lines))
        log.runs.insert(0, 1)
        if len(log.runs) > 1:
            lines = ", ".join(map(str, log.runs[:10])) + ", ..." * (len(log.runs) > 10)
            self.undecided(f"{len(log.runs)} runs in one log, from lines {lines}")
        self.decide()

    def read_lines(self, start: int, end: int) -> None:
        self.log.printed += self.lines[start:end]
        for i in range(start, end):
            line = self.lines[i]
            if line and not line.isspace():
                self.line(line, self.first + i + 1)

    def undecided(self, message: str) -> None:
        """Note what is not decided; a log that is all riddles need not repeat it."""
        if len(self.log.undecided) < MAX_UNDECIDED:
            self.log.undecided.append(message)

    def fact(self, name: str, value: object, line: int) -> None:
        if value is not None and value != "":
            self.facts[name].setdefault(value, line)

    def line(self, line: str, i: int) -> None:
        if line.startswith(("settings {", "result {")):
            self.json(line, i)
            return
        if len(line) > MAX_LINE:
            return
        if self.settings_block is not None:
            if setting := SETTING.match(line):
                name, value = setting[1], literal((setting[2] or "").strip())
                self.settings_block[name] = value
                if name in ("seed", "world_size", "run_id"):
                    self.fact(name, str(value) if name == "run_id" else whole(value), i)
                return
            self.settings_block = None
        line = line.strip()
        if line.startswith(HEADS):
            self.head(i)
        if line == "Hyperparameters:":
            self.settings_block = {}
            self.settings.append(self.settings_block)
        elif step := STEP.match(line):
            self.step(step, line, i)
        elif "val_loss" in line or "val_bpb" in line:
            self.score(line, i)
        elif line.startswith("logs/") and line.endswith(".txt"):
            self.fact("run_id", Path(line).stem, i)
        elif line[0] == "|" and (gpu := GPU.match(line)):
            self.fact("device", gpu[1], i)
        else:
            if "ize" in line or "bytes" in line or "budget" in line:
                self.size(line, i)
            if word := FIRST_WORD.match(line):
                self.named_line(word[0], line, i)

    def named_line(self, word: str, line: str, i: int) -> None:
        """A line that is known by its first word."""
        log = self.log
        for name, kind, pattern in FACTS.get(word, ()):
            if found := pattern.match(line):
                self.fact(name, kind(found[1]), i)
        if word == "phase" and (found := re.match(rf"phase:(\w{{1,40}}) seconds:({NUMBER})$", line)):
            log.phases[found[1]] = float(found[2])
        elif word == "audit" and (found := re.match(r"audit:(\w{1,40}) (pass|FAIL)\b ?(.*)", line)):
            log.audit[found[1]] = (found[2] == "pass", found[3])
        elif word == "resume" and (found := re.match(r"resume:step:(\d{1,12})\b", line)):
            self.resume(int(found[1]))
        elif word == "stopping_early":
            if (found := STOP.match(line)) or log.steps:
                log.events.append(("stopping_early", int(found[1]) if found else log.steps[-1].step))
            if clock := CLOCK.match(line):
                self.fact("train_seconds", float(clock[1]) / 1000, i)
        elif found := EVENT.match(line):
            log.events.append((found[1], int(found[2])))

    def json(self, line: str, i: int) -> None:
        """Our `settings` and `result` lines."""
        word, _, text = line.partition(" ")
        try:
            value = json.loads(text) if len(text) <= MAX_JSON else None
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict) or not shallow(value):
            self.undecided(f"line {i}: `{word}` is not followed by a JSON object")
            return
        self.log.dialect = "pgolf"
        told = dict(seed=int, run_id=str)
        if word == "settings":
            self.settings.append(value)
        else:
            told |= dict(world_size=int, device=str, torch=str, code_sha256=str, settings_hash=str)
            self.began = True
            self.results.append((i, value))
        for name, kind in told.items():
            if isinstance(value.get(name), kind) and not isinstance(value[name], bool):
                self.fact(name, value[name], i)

    # Where a run begins

    def head(self, i: int) -> None:
        """A line that stands at the head of a run: another run, if one has begun already."""
        if self.began:
            self.new_run(i)
            self.fresh_head = i

    def new_run(self, i: int) -> None:
        self.log.runs.append(i)
        self.began, self.fresh_head = False, 0

    def resume(self, step: int) -> None:
        """The same run goes on from a checkpoint: what came after that was lost and is done again."""
        log = self.log
        if self.fresh_head and log.runs[-1:] == [self.fresh_head]:
            log.runs.pop()
        begin = (log.runs or [0])[-1]
        while log.steps and log.steps[-1].line > begin and log.steps[-1].step > step:
            log.steps.pop()
        while log.events and log.events[-1][1] > step:
            log.events.pop()
        log.events.append(("resume", step))
        self.began, self.fresh_head = True, 0

    # Steps, scores, sizes

    def step(self, head: re.Match, line: str, i: int) -> None:
        log, (mark, at, total) = self.log, head.groups()[:3] if head[1] else head.groups()[3:]
        found = read_figures(SHORT.sub(lambda name: SHORT_NAMES[name[0]], line))
        if found is None or not {"train_loss", "val_loss", "val_bpb"} & found.keys():
            return
        losses = [found.get(name) for name in ("train_loss", "val_loss", "val_bpb")]
        step = Step(int(at), int(total) if total else None, *losses, found.get("train_time"), i, found.get("tok/s"))
        last = log.steps[-1] if log.steps and self.began else None
        if last is not None and step.step < last.step:
            self.new_run(i)
        self.began, self.prefixed = True, bool(mark)
        if last is None or last._replace(line=i) != step:  # twice: a log and its console in one file
            log.steps.append(step)

    def score(self, line: str, i: int) -> None:
        """A result: up to four words of label, then figures, anywhere in between what it depends on."""
        first = FIGURE.search(line)
        if first is None or PROGRESS.search(line) or any(sign in line for sign in "{}\"'\\`"):
            return
        head, label = line[: first.start()].split(), []
        while head and LABEL_WORD.match(head[0]):
            label.append(head.pop(0))
        found = read_figures(line)
        if found is None:
            self.undecided(f"line {i} gives a figure twice: {line[:100]}")
            return
        loss, bpb = found.get("val_loss"), found.get("val_bpb")
        if loss is None and bpb is None:
            return
        if not 1 <= len(label) <= 4 or not all(EXTRA_WORD.match(word) for word in head):
            if len(self.unnamed) < MAX_RESULTS:
                self.unnamed.append((i, loss, bpb))
            return
        name = " ".join(label).rstrip(":")
        marked = plain_label(name)
        decimals = [len(value.partition(".")[2]) for key, value, _ in FIGURE.findall(line) if key.startswith("val_")]
        exact = marked != name or min(decimals) >= 6
        extra = " ".join([*head, *FIGURE.sub("", line[first.start() :]).split()])
        self.began = True
        self.add_score(ScoreLine(marked, loss, bpb, exact, i, extra, found.get("eval_time")))

    def add_score(self, score: ScoreLine) -> None:
        """Add a result, or merge the line with the other one of the same result."""
        scores = self.log.scores
        if len(scores) >= MAX_RESULTS:
            self.undecided(f"line {score.line}: more than {MAX_RESULTS} results, this one was not read")
            return
        begin = (self.log.runs or [0])[-1]
        same = [k for k, old in enumerate(scores) if old.line >= begin and same_result(old, score)]
        if not same:
            scores.append(score)
            return
        old = scores[same[-1]]
        best, other = (old, score) if old.exact or not score.exact else (score, old)
        scores[same[-1]] = best._replace(
            val_loss=other.val_loss if best.val_loss is None else best.val_loss,
            val_bpb=other.val_bpb if best.val_bpb is None else best.val_bpb,
            extra=best.extra or other.extra,
            eval_ms=best.eval_ms or other.eval_ms,  # 0 ms: a clock that nobody started
        )

    def size(self, line: str, i: int) -> None:
        budget = BUDGET.search(line)
        if budget is not None and count(budget[2]) in BUDGETS:
            what, label, digits, fraction, unit = "Total submission size", "budget", budget[1], None, "bytes"
        elif found := SIZE.match(line):
            what, label, digits, fraction, unit = found.groups()
        else:
            return
        if what.lower().endswith(("code size", "code bytes")):
            what, label = "Code size", f"{what[:-9]}{label}"
        if unit not in ("bytes", "B", "") or fraction:
            self.undecided(f"line {i} gives no whole number of bytes: {line[:80]}")
            return
        if len(self.named) >= MAX_RESULTS:
            self.undecided(f"line {i}: more than {MAX_RESULTS} sizes, this one was not read")
            return
        self.began = True
        size = SizeLine(label.strip(), count(digits), i)
        self.named.append((what, size))
        if what == "Total submission size":
            self.log.sizes.append(size)

    # What it amounts to

    def decide(self) -> None:
        log = self.log
        if log.dialect != "pgolf":
            if "code_sha256" in self.facts:
                log.dialect = "pgolf"
            elif self.prefixed is not None:
                log.dialect = "baseline" if self.prefixed else "baseline-noprefix"
            elif log.scores or log.sizes:
                log.dialect = "baseline"
        if any(settings != self.settings[0] for settings in self.settings):
            self.undecided("settings: the log holds different ones")
        elif self.settings:
            log.settings = self.settings[0]
        for name in (
            *("seed", "run_id", "world_size", "model_params", "settings_hash", "code_sha256", "source"),
            *("device", "torch", "cuda", "python"),
        ):
            setattr(log, name, self.only(name))
        if log.source is not None and log.code_sha256 is not None:
            if text_sha256(log.source) != log.code_sha256:
                self.undecided("the source in the log is not the one whose code_sha256 it states")
        self.decide_result()
        self.decide_bytes()
        self.decide_times()
        self.decide_headline()

    def only(self, name: str) -> object | None:
        """The value of a fact, if the log agrees with itself about it."""
        values = self.facts.get(name, {})
        if len(values) > 1:
            said = [f"line {line}" if name == "source" else f"{value} (line {line})" for value, line in values.items()]
            self.undecided(f"several values of {name}: {', '.join(said[:5])[:300]}")
        return next(iter(values)) if len(values) == 1 else None

    def decide_result(self) -> None:
        """The last `result` line, and whether it says what the lines before it say."""
        log = self.log
        if log.dialect != "pgolf":
            return
        if not self.results:
            self.undecided("no `result` line: the run did not come to its end")
            return
        line, log.result = self.results[-1]
        log.results = len({json.dumps(result, sort_keys=True) for _, result in self.results})
        if log.results > 1:
            self.undecided(f"{len(self.results)} different `result` lines; fields are from the last, line {line}")
        phases = log.result.get("phase_seconds")
        if isinstance(phases, dict):
            log.phases |= {name: seconds for name, value in phases.items() if (seconds := number(value)) is not None}
        for label, figures in log.told_scores.items():
            logged = log.score(label)
            for name in ("val_loss", "val_bpb") if logged is not None else ():
                if not agree(getattr(logged, name), number(figures.get(name))):
                    self.undecided(f"{name} of {label} is another in the `result` line than in line {logged.line}")

    def decide_bytes(self) -> None:
        """Which sizes count. The public baseline prints the raw model's total first, then the compressed one's."""
        log, result = self.log, self.log.result or {}
        codes, models = (
            {size.bytes: size.label for what, size in self.named if what == kind}
            for kind in ("Code size", "Serialized model")
        )
        totals = {size.bytes: size.label for size in reversed(log.sizes)}
        unpacked = [size for size, label in codes.items() if UNPACKED.search(label)]
        log.bytes_source = unpacked[0] if len(unpacked) == 1 and len(codes) > 1 else None
        log.bytes_total = self.submission_total(totals)
        for name, key, logged in (
            ("bytes_total", "bytes_total", totals),
            ("bytes_code", "bytes_code", codes),
            ("bytes_model", "bytes_artifact", models),
        ):
            stated = whole(result.get(key))
            if stated is not None and (not logged or set(logged) == {stated}):
                setattr(log, name, stated)
            elif stated is not None:
                setattr(log, name, None)
                self.undecided(f"{key} is {stated} in the `result` line, else {', '.join(map(str, logged))}")
        if result or log.bytes_total is None:
            return
        pairs = [(code, model) for code in codes for model in models if code + model == log.bytes_total]
        if len(pairs) == 1:
            log.bytes_code, log.bytes_model = pairs[0]
            return
        log.bytes_code = next(iter(codes)) if len(codes) == 1 else None
        log.bytes_model = next(iter(models)) if len(models) == 1 else None
        if codes and models:
            problem = "several of" if pairs else "none of"
            self.undecided(f"{problem} the code and model sizes add up to the total of {log.bytes_total} bytes")

    def submission_total(self, totals: dict[int, str]) -> int | None:
        """The total that counts, of {bytes: label}."""
        log = self.log
        weights = log.model_params
        labelled = [size for size, label in totals.items() if label]
        # A total without a label, beside one that names a format, is the raw model's if it is the larger one.
        likely = [size for size, label in totals.items() if label or not labelled or size < max(labelled)]
        likely = [size for size in likely if totals[size] or not weights or size < BYTES_PER_WEIGHT * weights]
        if len(likely) > 1 and not labelled:
            likely = [size for size in likely if size < 2 * min(likely)]
        if len(likely) == 1:
            lines = [size.line for size in log.sizes if size.bytes == likely[0]]
            named = totals[likely[0]] or len(totals) > 1 or weights
            if named or any(score.line > lines[0] for score in self.log.candidates()):
                return likely[0]
        if totals:
            said = ", ".join(f"{size}{f' ({label})' if label else ''}" for size, label in totals.items())
            what = "perhaps the raw model's" if len(totals) == 1 else "which one counts is not said"
            self.undecided(f"total size: {said[:200]}: {what}")
        return None

    def decide_times(self) -> None:
        """Seconds of the training and of the evaluation clock."""
        log, result = self.log, self.log.result or {}
        log.train_seconds, log.eval_seconds = number(result.get("train_seconds")), number(result.get("eval_seconds"))
        if log.train_seconds is None and "train" in log.phases:
            log.train_seconds = sum(log.phases.get(phase, 0.0) for phase in TRAINING_PHASES)
        if log.train_seconds is None and "train_seconds" in self.facts:
            log.train_seconds = self.only("train_seconds")
        elif log.train_seconds is None and log.steps and log.steps[-1].step == log.steps[-1].total:
            last = log.steps[-1].time_ms
            log.train_seconds = None if last is None or len(log.runs) > 1 else last / 1000
        if log.eval_seconds is None and "eval_seconds" in self.facts:
            log.eval_seconds = self.only("eval_seconds")
        elif log.eval_seconds is None and log.dialect != "pgolf" and len(log.runs) == 1:
            # The passes run one after another under one clock. A result without a time may be a timed one's figures,
            # printed again under an old label.
            times = [(figures(score), score.eval_ms) for score in log.candidates() if score.eval_ms]
            if times and {figures(score) for score in log.candidates()} == {shown for shown, _ in times}:
                log.eval_seconds = sum(ms for _, ms in times) / 1000

    def decide_headline(self) -> None:
        log = self.log
        labels = [score.label for score in log.scores]
        for label in sorted({label for label in labels if labels.count(label) > 1}):
            self.undecided(f"several results are called {label}")
        unread = [
            line
            for line, loss, bpb in self.unnamed
            if not any(agree(score.val_loss, loss) and agree(score.val_bpb, bpb) for score in log.scores)
        ]
        log.unnamed = len(unread)
        if unread:
            self.undecided(f"scores whose label could not be read: {len(unread)}, the first in line {unread[0]}")
        if log.headline() is not None:
            return
        if log.dialect == "pgolf" and log.result is not None:
            self.undecided("headline: the `result` line declares none that one line of the log confirms")
        elif candidates := [f"{s.label} {s.val_bpb} (line {s.line})" for s in log.candidates()[:12]]:
            which = "the run did not end" if log.dialect == "pgolf" else "the log does not say which"
            self.undecided(f"headline: {which}: {', '.join(candidates)}")
        else:
            self.undecided("headline: no result in the log")


def without_prefix(line: str) -> str:
    if "\x1b" in line[:MAX_LINE]:
        line = ESCAPES.sub("", line)
    if line[:1] in "[012IDW" and (prefix := PREFIX.match(line)):
        return line[prefix.end() :]
    return line


def literal(text: str) -> object:
    """A value of a `Hyperparameters:` list: a bool, None, a number, or the text as it stands."""
    words = {"True": True, "False": False, "None": None}
    if text in words:
        return words[text]
    if re.fullmatch(r"[-+]?\d{1,18}", text):
        return int(text)
    return float(text) if re.fullmatch(NUMBER, text) else text
