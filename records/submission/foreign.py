"""A submission folder as data, and what is found in it.

Folders are untrusted: links are not followed, sizes are bounded, and foreign text is printed without control
characters. What could not be read is said in `problems`.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from records.submission import runlog, unpack
from records.submission.rules import has_clocks
from records.submission.runlog import LogError, RunLog

MAX_ENTRIES, MAX_DEPTH = 500, 4  # of a folder
MAX_FILE, MAX_FOLDER = 8_000_000, 64_000_000  # bytes
MAX_LOG_BYTES = 32_000_000  # bytes of all logs; public ones have a few MB at most
MAX_README, MAX_JSON, MAX_JSON_DEPTH = 1_000_000, 1_000_000, 20
MAX_LINE = 2000  # characters of a line of README.md
MAX_FINDINGS = 12  # printed per check and level; the rest is counted

LOG = re.compile(r"\.(?:log|txt)$", re.I)
COMPANION = re.compile(
    r"README\.md|submission[\w.-]*\.json|train_gpt\.py|requirements[\w.-]*\.txt|LICENSE(?:\.\w+)?|\.gitattributes"
    r"|train_gpt_human\.py|\w+_decode\.py|lossless_caps\.py|prepare_caseops_data\.py|tokenizers/[\w.+-]+\.(?:model|vocab)"
)


class CheckError(Exception):
    """Arguments that cannot be used, in one line for the user."""


class Finding(NamedTuple):
    """level is pass, warn or FAIL."""

    check: str
    level: str
    what: str


class Note(NamedTuple):
    """What a check function yields: a level and a text."""

    level: str
    what: str


@dataclasses.dataclass(eq=False)
class Submission:
    """A folder as data. What could not be read is None or empty and said in `problems`."""

    folder: Path
    files: dict[str, int] = dataclasses.field(default_factory=dict)  # relative name -> bytes
    problems: list[Note] = dataclasses.field(default_factory=list)  # of reading the folder
    json_problems: list[Note] = dataclasses.field(default_factory=list)
    json_name: str | None = None
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)  # decimals are Decimal, as written
    readme: str = ""
    script: bytes | None = None
    layers: unpack.Unwrapped = dataclasses.field(default_factory=lambda: unpack.Unwrapped([], [], []))
    logs: dict[str, RunLog] = dataclasses.field(default_factory=dict)  # by file name
    texts: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # lines of each log, without its source

    def read(self, name: str, limit: int = MAX_FILE) -> bytes:
        """Bytes of a plain file of the folder. Raises OSError; a longer file is cut and said to be."""
        descriptor = os.open(self.folder / name, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        with open(descriptor, "rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            self.problems.append(Note("FAIL", f"{name}: larger than {limit:,} bytes; only the beginning was read"))
        return data[:limit]

    @property
    def track(self) -> str:
        stated = self.meta.get("track")
        parent = self.folder.parent.name
        if isinstance(stated, str) and stated:
            return stated
        return parent.removeprefix("track_") if parent.startswith("track_") else ""

    @property
    def timed(self) -> bool:
        return has_clocks(self.track)

    @property
    def runs(self) -> dict[str, RunLog]:
        """Logs that hold a result, by file name."""
        return {name: log for name, log in self.logs.items() if log.scores or log.steps or log.sizes}

    @property
    def ours(self) -> bool:
        return bool(self.runs) and all(log.dialect == "pgolf" for log in self.runs.values())

    @property
    def seeds(self) -> list[int]:
        """Seeds that submission.json claims, else those of the logs."""
        claimed: list[int] = []
        for key in ("seeds", "seed_results", "seed"):
            value = self.meta.get(key)
            values = list(value) if isinstance(value, (list, dict)) else [value]
            claimed += [seed for seed in map(as_seed, values) if seed is not None]
        logged = [seed for name, log in self.runs.items() if (seed := seed_of(name, log)) is not None]
        return list(dict.fromkeys(claimed or logged))


def as_seed(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    text = str(value) if isinstance(value, (int, str)) else ""
    found = re.fullmatch(r"(?:seed_?)?(\d{1,10})", text)
    return int(found[1]) if found else None


def seed_of(name: str, log: RunLog) -> int | None:
    """The seed a log states, else the one in its file name."""
    if log.seed is not None:
        return log.seed
    found = re.search(r"seed[_-]?(\d{1,10})", name)
    return int(found[1]) if found else None


def load(folder: Path) -> Submission:
    """Read a folder as data. Raises CheckError where it is none."""
    if not folder.is_dir():
        raise CheckError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    submission = Submission(folder.resolve())
    list_files(submission, submission.folder, "")
    read_json(submission)
    if "README.md" in submission.files:
        with contextlib.suppress(OSError):
            readme = submission.read("README.md", MAX_README).decode("utf-8", "replace")
            submission.readme = readme.replace("\r\n", "\n")
    if "train_gpt.py" in submission.files:
        with contextlib.suppress(OSError):
            submission.script = submission.read("train_gpt.py")
            text = submission.script.decode("utf-8", "replace").replace("\r\n", "\n")
            submission.layers = unpack.unwrap(text)
    room = MAX_LOG_BYTES
    for name, size in submission.files.items():
        if LOG.search(name) and not COMPANION.fullmatch(name):
            if size > room:
                note = f"{name}: not read, the logs have more than {MAX_LOG_BYTES:,} bytes"
                submission.problems.append(Note("FAIL", note))
                continue
            room -= size
            read_log(submission, name)
    return submission


def list_files(submission: Submission, folder: Path, prefix: str) -> None:
    """Fill in `files`, depth first in order of names; links and special files are refused."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        submission.problems.append(Note("FAIL", f"{prefix or '.'}: cannot be read ({error.strerror})"))
        return
    for entry in entries:
        name = prefix + entry.name
        if len(submission.files) >= MAX_ENTRIES:
            submission.problems.append(Note("FAIL", f"more than {MAX_ENTRIES} files; the rest was not looked at"))
            return
        if entry.is_symlink():
            target = (folder / os.readlink(entry.path)).resolve()
            inside = target.is_relative_to(submission.folder)
            what = "a link, which is not followed" if inside else "a link that leaves the folder"
            submission.problems.append(Note("warn" if inside else "FAIL", f"{name}: {what}"))
        elif entry.is_dir():
            if entry.name in {"__pycache__", ".git", ".venv", "node_modules", ".ipynb_checkpoints"}:
                submission.problems.append(Note("FAIL", f"{name}/ does not belong into a submission"))
            elif prefix.count("/") >= MAX_DEPTH:
                submission.problems.append(Note("FAIL", f"{name}: nested too deeply"))
            else:
                list_files(submission, Path(entry.path), f"{name}/")
        elif not stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
            submission.problems.append(Note("FAIL", f"{name}: not a plain file"))
        else:
            submission.files[name] = entry.stat(follow_symlinks=False).st_size


def read_json(submission: Submission) -> None:
    names = [name for name in submission.files if re.fullmatch(r"submission[\w.-]*\.json", name)]
    if not names:
        return
    name = "submission.json" if "submission.json" in names else names[0]
    submission.json_name = name
    problem = submission.json_problems.append
    if submission.files[name] > MAX_JSON:
        problem(Note("FAIL", f"{name}: larger than {MAX_JSON:,} bytes"))
        return

    def constant(text: str) -> float:
        problem(Note("FAIL", f"{name}: {text} is no JSON number"))
        return math.nan

    def once(pairs: list[tuple[str, Any]]) -> dict:
        for key, times in Counter(key for key, _ in pairs).items():
            if times > 1:
                problem(Note("FAIL", f"{name}: the field {key} is there twice"))
        return dict(pairs)

    try:
        text = submission.read(name).decode("utf-8-sig")
        meta = json.loads(text, parse_float=Decimal, parse_constant=constant, object_pairs_hook=once)
        if not isinstance(meta, dict):
            problem(Note("FAIL", f"{name}: not an object"))
        elif depth(meta) > MAX_JSON_DEPTH:
            problem(Note("FAIL", f"{name}: nested too deeply"))
        else:
            submission.meta = meta
    except (ValueError, ArithmeticError, RecursionError, OSError) as error:
        problem(Note("FAIL", f"{name} does not parse: {str(error)[:120]}"))


def depth(value: Any) -> int:
    """How deeply a JSON value is nested; stops at the limit."""
    level, layer = 0, [value]
    while layer and level <= MAX_JSON_DEPTH:
        layer = [
            part
            for outer in layer
            if isinstance(outer, (dict, list))
            for part in (outer.values() if isinstance(outer, dict) else outer)
        ]
        level += 1
    return level


def read_log(submission: Submission, name: str) -> None:
    try:
        data = submission.read(name, MAX_LOG_BYTES)
        text, encoding, _ = runlog.decode(data, Path(name))
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        log = runlog.parse_text(text, Path(name))
        log.sha256, log.encoding = hashlib.sha256(data).hexdigest(), encoding
    except (LogError, OSError) as error:
        submission.problems.append(Note("FAIL", f"{name}: cannot be read ({error})"))
        return
    lines, kept, start = text.split("\n"), [], 0
    for dump in runlog.find_dumps(lines):
        kept += lines[start : dump.start]
        start = dump.end
    submission.logs[name] = log
    submission.texts[name] = kept + lines[start:]


def number(value: Any) -> float | None:
    """A JSON value as a float, if it is a finite number."""
    found = runlog.number(float(value) if isinstance(value, Decimal) else value)
    return found if found is not None and math.isfinite(found) else None


def decimals(value: Any) -> int:
    """Digits after the point, as written."""
    exponent = value.as_tuple().exponent if isinstance(value, Decimal) else 0
    return -exponent if isinstance(exponent, int) and exponent < 0 else 0


def score_digits(value: Any) -> int:
    """The same of a score: JSON writers drop zeros, and nobody claims a score to less than three digits."""
    return max(3, decimals(value))


def declared_label(meta: Mapping) -> str | None:
    """The label of the line that submission.json declares as the headline."""
    for key in ("headline", "headline_label", "headline_line", "score_label", "declared_line", "metric_label"):
        value = meta.get(key)
        value = value.get("label") if isinstance(value, dict) else value
        if isinstance(value, str) and value.strip():
            return value.strip().removesuffix("_exact")
    return None


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything in a JSON value that holds nothing else."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from leaves(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from leaves(part, f"{path}[{i}]")
    else:
        yield path, value


# ----------------------------------------------------------------------------------------------------------------------
# Findings
# ----------------------------------------------------------------------------------------------------------------------


def summarised(name: str, notes: list[Note]) -> list[Finding]:
    """Findings of one check, worst first, the long tail counted; `pass` where there is nothing to say."""
    found = []
    for level in ("FAIL", "warn", "pass"):
        texts = [note.what for note in notes if note.level == level]
        if level == "pass" and found:
            texts = []
        found += [Finding(name, level, clean_text(text)) for text in texts[:MAX_FINDINGS]]
        if len(texts) > MAX_FINDINGS:
            found.append(Finding(name, level, f"and {len(texts) - MAX_FINDINGS} more"))
    return found or [Finding(name, "pass", "")]


def clean_text(text: str, limit: int = 300) -> str:
    """Foreign text for a terminal: one line, nothing that is not printable."""
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text[:limit]
    )
    return shown + "..." * (len(text) > limit)
