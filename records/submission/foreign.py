"""A submission folder as data, and what is found in it.

Folders are untrusted: links are not followed, sizes are bounded, and foreign text is printed without control
characters. What could not be read is said in `problems`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import posixpath
import re
import stat
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from records.submission import audits, runlog, unpack
from records.submission.command import Unusable, clean_text
from records.submission.runlog import LogError, RunLog
from records.submission.runs import Choice, as_seed, choose, declared_label, headline_of, joined, number, seed_of

MAX_ENTRIES, MAX_DEPTH = 500, 4  # of a folder
MAX_FILE, MAX_FOLDER = 8_000_000, 64_000_000  # bytes
MAX_LOG_BYTES = 32_000_000  # bytes of all logs; public ones have a few MB at most
MAX_README, MAX_JSON, MAX_JSON_DEPTH = 1_000_000, 1_000_000, 20
MAX_SCRIPTS = 20  # that are looked through for the one that trains
MAX_LINE = 2000  # characters of a line of README.md
MAX_FINDINGS = 12  # printed per check and level; the rest is counted

AUDIT = re.compile(r"audit[\w.-]*\.json")
MAX_AUDITS = 20  # files that are read
LOG = re.compile(r"\.(?:log|txt)$", re.I)
COMPANION = re.compile(
    r"README\.md|submission[\w.-]*\.json|train_gpt\.py|requirements[\w.-]*\.txt|LICENSE(?:\.\w+)?|\.gitattributes"
    r"|audit_seed\d+\.json|train_gpt_human\.py|\w+_decode\.py|lossless_caps\.py|prepare_caseops_data\.py"
    r"|tokenizers/[\w.+-]+\.(?:model|vocab)"
)


class CheckError(Unusable):
    """Arguments that cannot be used, in one line for the user."""


class Finding(NamedTuple):
    """level is pass, warn, FAIL, skip (not examined) or note."""

    check: str
    level: str
    what: str


class Note(NamedTuple):
    """What a check function yields: a level and a text."""

    level: str
    what: str


OLD_NAMES = {
    "val_bpb": "mean_val_bpb val_bpb_mean final_val_bpb sliding_val_bpb".split(),
    "bytes_total": "artifact_bytes artifact_bytes_max artifact_size_bytes total_bytes artifact_bytes_mean".split(),
    "bytes_code": ["code_bytes"],
}
STATED_BPB = re.compile(r"bpb\W{0,12}(\d\.\d{3,20})|(\d\.\d{3,20})\W{0,6}(?:val_)?bpb", re.I)  # in README.md
TRAINS = re.compile(r"\.backward\(|value_and_grad\(")  # what a script that trains has


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
    logs: dict[str, RunLog] = dataclasses.field(default_factory=dict)  # by file name, and run where it holds several

    def read(self, name: str, limit: int = MAX_FILE) -> bytes:
        """Bytes of a plain file of the folder. Raises OSError; a longer file is cut and said to be."""
        descriptor = os.open(self.folder / name, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        with open(descriptor, "rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            self.problems.append(Note("FAIL", f"{name}: larger than {limit:,} bytes; only the beginning was read"))
        return data[:limit]

    def old_name(self, key: str) -> str | None:
        return next((name for name in OLD_NAMES.get(key, ()) if number(self.meta.get(name)) is not None), None)

    def stated(self, key: str) -> Any:
        """A field of the JSON by its name or by an older one."""
        return self.meta[key] if key in self.meta else self.meta.get(self.old_name(key) or "")

    @property
    def score(self) -> Any:
        """The val_bpb that the folder claims, in its JSON or else in README.md."""
        if number(self.stated("val_bpb")) is not None:
            return self.stated("val_bpb")
        found = STATED_BPB.search(self.readme)
        return Decimal(found[1] or found[2]) if found else None

    @property
    def track(self) -> str:
        stated = self.meta.get("track")
        parent = self.folder.parent.name
        if isinstance(stated, str) and stated:
            return stated
        return parent.removeprefix("track_") if parent.startswith("track_") else ""

    @property
    def claimed_seeds(self) -> list[int]:
        claimed: list[int] = []
        for key in ("seeds", "seed_results", "seed"):
            value = self.meta.get(key)
            values = list(value) if isinstance(value, (list, dict)) else [value]
            claimed += [seed for seed in map(as_seed, values) if seed is not None]
        return list(dict.fromkeys(claimed))

    @functools.cached_property
    def choice(self) -> Choice:
        """Which of the logs that hold a result are the runs of this folder."""
        logs = {name: log for name, log in self.logs.items() if log.scores or log.steps or log.sizes}
        listed = " ".join(str(value) for _, value in leaves(self.meta) if isinstance(value, str))
        return choose(logs, self.score, declared_label(self.meta), self.claimed_seeds, listed)

    @functools.cached_property
    def runs(self) -> dict[str, RunLog]:
        """The logs that are judged, by name."""
        found = {}
        for name in self.choice.judged:
            found[name], training = joined(name, self.logs, self.choice.others)
            if training is not None:
                self.choice.others.remove(training)
        return found

    @functools.cached_property
    def headline(self) -> tuple[str | None, str]:
        """(label of the score that counts, how that is known)."""
        return headline_of(list(self.runs.values()), self.meta, self.score)

    @property
    def ours(self) -> bool:
        return bool(self.runs) and all(log.dialect == "pgolf" for log in self.runs.values())

    @property
    def seeds(self) -> list[int]:
        """Seeds that submission.json claims, else those of the logs."""
        logged = [seed for name, log in self.runs.items() if (seed := seed_of(name, log)) is not None]
        return self.claimed_seeds or list(dict.fromkeys(logged))

    @functools.cached_property
    def found_script(self) -> tuple[str | None, str]:
        """(name of the script, why it is taken for that); (None, why nothing is)."""
        if self.files.get("train_gpt.py"):
            return "train_gpt.py", ""
        missing = "train_gpt.py is empty" if "train_gpt.py" in self.files else "train_gpt.py is missing"
        texts: dict[str, str] = {}
        for name in [name for name, size in self.files.items() if name.endswith(".py") and size][:MAX_SCRIPTS]:
            with contextlib.suppress(OSError):
                data = self.read(name)
                texts[name] = unpack.decode(data)
                logged = [log.source.strip() for log in self.runs.values() if log.source]
                hashes = {log.code_sha256 for log in self.runs.values()}
                if texts[name].strip() in logged or hashlib.sha256(data).hexdigest() in hashes:
                    return name, f"{missing}; the logs show that {name} ran"
        training = [name for name in texts if any(TRAINS.search(layer) for layer in unpack.unwrap(texts[name]).layers)]
        told = " ".join([self.readme, *(str(value) for _, value in leaves(self.meta) if isinstance(value, str))])
        for names, why in (
            ([name for name in training if re.search(rf"(?<![\w.-]){re.escape(Path(name).name)}\b", told)], "is named"),
            ([name for name in training if Path(name).name == "train_gpt.py"], "has its name"),
            (training, "is the only one that trains"),
            (list(texts), "is the only one"),
        ):
            if len(names) == 1:
                return names[0], f"{missing}; {names[0]} {why} and was taken for it"
        return None, missing + (f", and which of {', '.join(texts)} ran is not said" if texts else "")

    @functools.cached_property
    def script(self) -> bytes | None:
        name = self.found_script[0]
        with contextlib.suppress(OSError):
            return None if name is None else self.read(name)

    @functools.cached_property
    def layers(self) -> unpack.Unwrapped:
        """Every readable layer of the script."""
        if self.script is None:
            return unpack.Unwrapped([], [], [])
        text = unpack.decode(self.script)
        return unpack.unwrap(text, functools.partial(self.read_for, self.found_script[0]))

    def read_for(self, script: str, name: str) -> bytes | None:
        """What a script reads by a name: the file of this folder beside it or at the top."""
        for place in (posixpath.join(posixpath.dirname(script), name), name):
            place = posixpath.normpath(place)
            if place in self.files:
                with contextlib.suppress(OSError):
                    return self.read(place)
        return None


def load(folder: Path) -> Submission:
    """Read a folder as data. Raises CheckError where it is none."""
    if not folder.is_dir():
        raise CheckError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    submission = Submission(folder.resolve())
    list_files(submission, submission.folder, "")
    read_json(submission)
    if "README.md" in submission.files:
        with contextlib.suppress(OSError):
            submission.readme = unpack.decode(submission.read("README.md", MAX_README))
    room = MAX_LOG_BYTES
    for name, size in submission.files.items():
        if LOG.search(name) and not COMPANION.fullmatch(name):
            if size > room:
                note = f"{name}: not read, the logs have more than {MAX_LOG_BYTES:,} bytes"
                submission.problems.append(Note("FAIL", note))
                continue
            room -= size
            read_log(submission, name)
    for name in [name for name in submission.files if AUDIT.fullmatch(name)][:MAX_AUDITS]:
        read_audit(submission, name)
    return submission


def read_audit(submission: Submission, name: str) -> None:
    """An audit.json into the log of its script and artifact; another one is a problem."""
    try:
        told = audits.parse(submission.read(name, audits.MAX_AUDIT + 1), name)
    except (OSError, Unusable) as error:
        submission.problems.append(Note("FAIL", str(error)))
        return
    if not [log for log in submission.logs.values() if audits.attach(told, log)]:
        submission.problems.append(Note("FAIL", f"{name} is of no log's script and artifact"))


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
        elif not runlog.shallow(meta, MAX_JSON_DEPTH):
            problem(Note("FAIL", f"{name}: nested too deeply"))
        else:
            submission.meta = meta
    except (ValueError, ArithmeticError, RecursionError, OSError) as error:
        problem(Note("FAIL", f"{name} does not parse: {str(error)[:120]}"))


def read_log(submission: Submission, name: str) -> None:
    """A log, or each run of a log that holds several and scores each."""
    try:
        data = submission.read(name, MAX_LOG_BYTES)
        log = runlog.parse_text(runlog.decode(data, Path(name))[0], Path(name))
        log.sha256 = hashlib.sha256(data).hexdigest()
    except (LogError, OSError) as error:
        submission.problems.append(Note("FAIL", f"{name}: cannot be read ({error})"))
        return
    each = log.each()
    submission.logs |= {name: log} if len(each) == 1 else {f"{name}, run {i}": run for i, run in enumerate(each, 1)}


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
    """Findings of one check, worst first, the long tail counted; `pass` only where nothing else is to be said."""
    found: list[Finding] = []
    for level in ("FAIL", "skip", "warn", "pass", "note"):
        texts = [note.what for note in notes if note.level == level]
        if level == "pass":
            texts = [] if found else texts or [""]
        found += [Finding(name, level, clean_text(text)) for text in texts[:MAX_FINDINGS]]
        if len(texts) > MAX_FINDINGS:
            found.append(Finding(name, level, f"and {len(texts) - MAX_FINDINGS} more"))
    return found
