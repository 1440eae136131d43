"""The ledger: one JSON line for each finished run, appended and never changed, with its own checksum.

A line is a dict. Of a run (`kind` "run"):

    recipe, name, axis      the base, the arm ("base" for the base itself), what it changes (AXES)
    changes                 settings of the arm that differ from the base; empty for the base and for another script
    base                    key of the run of the base with the same seed, what this one is compared with; "": the base
    settings                all settings that differ from the script's defaults, paths and names left out
    script                  sha256 of the script that ran
    data                    fingerprints of training and validation shards and of the tokenizer, 16 digits each
    seed, machine, torch, threads, launch
    scores, scored_bytes    bits per byte by pass (raw, ema, roundtrip, sliding_window, legal_ttt …), of so many bytes
    steps, bytes, seconds   of the run; `failed` instead where a limit ended it

Of a measurement of step time (`kind` "time"): the same names, and `base_ms`, `arm_ms`, `others`. `sum` is the checksum.
Lines that two branches added merge (.gitattributes).
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

AXES = ("data", "model", "optimizer", "schedule", "quantization", "evaluation", "script")
IDENTITY = ("kind", "script", "settings", "base", "seed", "data", "machine", "torch", "threads", "launch")


class ExperimentError(Exception):
    """What the user can fix, in one line."""


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def key(row: Mapping) -> str:
    """The same for runs that are the same experiment; known before the run."""
    return digest([row[name] for name in IDENTITY])


def seal(row: Mapping) -> str:
    """The line of a row, with its checksum."""
    row = {name: value for name, value in row.items() if name != "sum"}
    return json.dumps({**row, "sum": digest(row)}, ensure_ascii=False) + "\n"


def parse(line: str, where: str) -> dict:
    """Raises ExperimentError that names an edited or broken line."""
    try:
        row = json.loads(line)
        stated = row.pop("sum")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ExperimentError(f"{where} is no line of a ledger; take it back from version control") from None
    if stated != digest(row):
        of = " ".join(str(row.get(name, "?")) for name in ("recipe", "name", "seed"))
        raise ExperimentError(f"{where} ({of}) was edited: its checksum is {digest(row)}, it says {stated}; restore it")
    return row


def read(path: Path) -> list[dict]:
    """All rows in order, each experiment once. A line that a crash cut short has no newline and is no row yet."""
    if not path.exists():
        return []
    rows: dict[str, dict] = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(keepends=True), 1):
        if line.strip() and (line.endswith("\n") or whole(line)):
            row = parse(line, f"{path.name}:{number}")
            rows.setdefault(key(row) if row["kind"] == "run" else line, row)
    return list(rows.values())


def whole(line: str) -> bool:
    """Whether this last line without a newline is a row (an editor may have eaten the newline) or the start of one."""
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def append(path: Path, row: Mapping) -> bool:
    """Add a row, whole or not at all, however many processes do so. False where the experiment is there already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if row["kind"] == "run" and any(key(r) == key(row) for r in read(path) if r["kind"] == "run"):
            return False
        file.seek(0)
        tail = file.read().rpartition(b"\n")[2]
        if tail and not whole(tail.decode("utf-8", "replace")):
            file.truncate(file.tell() - len(tail))
            tail = b""
        file.write((b"\n" if tail else b"") + seal(row).encode())
        file.flush()
        os.fsync(file.fileno())
    return True


# ----------------------------------------------------------------------------------------------------------------------
# Pairs
# ----------------------------------------------------------------------------------------------------------------------


def same_scripts(rows: Iterable[Mapping]) -> dict[str, str]:
    """Script: the first script that it repeats. Two repeat each other where a base, a seed and a machine that both ran
    have the same scores to the last digit; otherwise every change of a comment would make all runs worthless."""
    first: dict[str, str] = {}
    seen: dict[str, str] = {}
    for row in rows:
        if row["kind"] != "run" or row["name"] != "base":
            continue
        first.setdefault(row["script"], row["script"])
        if "scores" in row:
            names = ("recipe", "settings", "seed", "data", "machine", "torch", "threads", "launch", "scores")
            old = first[seen.setdefault(digest([row[name] for name in names]), row["script"])]
            new = first[row["script"]]
            first = {script: old if root == new else root for script, root in first.items()}
    return first


def pairs(rows: Iterable[Mapping], recipe: str) -> dict[str, dict[int, tuple[dict, dict]]]:
    """Arm: seed: (run, run of the base with the same seed), for arms of one recipe that ran to their end.

    An arm is compared within one script (and those that repeat it): of several, the one of its last run.
    """
    rows = [row for row in rows if row["kind"] == "run" and row["recipe"] == recipe and "scores" in row]
    scripts, bases = same_scripts(rows), {key(row): row for row in rows if row["name"] == "base"}
    found: dict[str, dict[tuple, dict[int, tuple[dict, dict]]]] = {}
    for row in rows:
        base = bases.get(row["base"])
        if base is None or base["scored_bytes"] != row["scored_bytes"]:
            continue
        version = (digest(row["changes"]), scripts.get(row["script"], row["script"]), scripts[base["script"]])
        versions = found.setdefault(row["name"], {})
        versions[version] = versions.pop(version, {}) | {row["seed"]: (row, base)}
    return {name: list(versions.values())[-1] for name, versions in found.items()}


def floors(rows: Iterable[Mapping], recipe: str) -> list[dict[int, dict]]:
    """A recipe's base, runs by seed: one dict for each script (with those that repeat it) and machine, newest last."""
    rows = [r for r in rows if r["kind"] == "run" and r["recipe"] == recipe and r["name"] == "base" and "scores" in r]
    scripts, groups = same_scripts(rows), {}
    for row in rows:
        names = ("data", "machine", "torch", "threads", "launch")
        setup = (scripts[row["script"]], digest([row[name] for name in names]))
        groups[setup] = groups.pop(setup, {}) | {row["seed"]: row}
    return list(groups.values())
