"""`check FOLDER...`: whether a folder says what its logs say, and keeps the rules as far as files can show it.

Folders are untrusted: nothing in them is executed (but with --run, in a subprocess with limits), links are not
followed, sizes are bounded, and foreign text is printed without control characters. One function per check, each
yielding findings; a check without a finding that is not a pass has passed.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from records.submission import legality
from records.submission.claims import check_numbers
from records.submission.foreign import (
    COMPANION,
    LOG,
    MAX_FILE,
    MAX_FOLDER,
    MAX_LINE,
    CheckError,
    Finding,
    Note,
    Submission,
    as_seed,
    clean_text,
    decimals,
    declared_label,
    leaves,
    load,
    number,
    score_digits,
    seed_of,
    summarised,
)
from records.submission.program import check_source, check_syntax, siblings, sources
from records.submission.rules import AUDITS, CAP_BYTES, CLOCK_SECONDS, SEEDS, may_differ, verdict, within
from records.submission.runlog import RunLog
from records.submission.smoke import check_run

MIB_16 = 16 << 20  # what some take the cap for
EXACT_DIGITS = 5e-9  # half a unit of the eighth decimal, which `_exact` lines have
ROUNDED_DIGITS = 5e-5  # of the fourth, which other lines have

# ----------------------------------------------------------------------------------------------------------------------
# files, json
# ----------------------------------------------------------------------------------------------------------------------

IMAGE = re.compile(r"\.(?:png|jpe?g|svg|webp|gif)$", re.I)
SURPRISE = {
    "may hold secrets": r"(?:^|/)\.env(?:\..*)?$|\.(?:pem|key|p12|pfx|kdbx)$|(?:^|/)(?:id_(?:rsa|ed25519|ecdsa)|\.netrc"
    r"|credentials(?:\.\w+)?|\.npmrc|\.pypirc)$",
    "weights or pickled data": r"\.(?:pt|pth|ckpt|safetensors|pkl|pickle|npy|npz|onnx|ptz|pgolf|pgckpt|h5)$",
    "data": r"\.(?:bin|parquet|arrow|jsonl|gz|xz|zst|br|zip|tar|tgz|7z|lz4|sqlite|db)$",
    "compiled code": r"\.(?:so|pyc|pyd|dll|dylib|exe|o|a|whl|class|jar)$",
    "an editor's or system's file": r"(?:^|/)(?:\.DS_Store|Thumbs\.db)$|\.(?:swp|orig|rej|bak|ipynb)$|~$",
}
SECRET = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----|\b(?:ghp|gho|github_pat)_[A-Za-z0-9_]{30,}|\bhf_[A-Za-z0-9]{30,}"
    rb"|\bsk-[A-Za-z0-9_-]{32,}|\bAKIA[0-9A-Z]{16}\b|\brpa_[A-Z0-9]{30,}"
)


def check_files(s: Submission) -> Iterator[Note]:
    """The files that a submission has, and no others."""
    yield from s.problems
    for name in ("README.md", "train_gpt.py"):
        if name not in s.files:
            yield Note("FAIL", f"{name} is missing")
        elif s.files[name] == 0:
            yield Note("FAIL", f"{name} is empty")
    if s.json_name is None:
        yield Note("FAIL", "submission.json is missing")
    elif s.json_name != "submission.json":
        yield Note("warn", f"{s.json_name} should be called submission.json")
    if not s.runs:
        yield Note("FAIL", "no log of a run")
    logged = {seed_of(name, log) for name, log in s.runs.items()}
    together = len(s.runs) == 1 and None in logged or any(len(log.runs) > 1 for log in s.runs.values())
    for seed in s.seeds:
        if s.runs and seed not in logged:
            level = "warn" if together else "FAIL"
            yield Note(level, f"no log states seed {seed}, which submission.json claims")
    for name, size in s.files.items():
        reason = next((why for why, pattern in SURPRISE.items() if re.search(pattern, name, re.I)), None)
        if COMPANION.fullmatch(name) or name in s.runs:
            reason = None
        elif reason is None and not IMAGE.search(name) and not LOG.search(name):
            yield Note("warn", f"{name}: not one of the files a submission has")
        if IMAGE.search(name) and Path(name).name not in s.readme:
            yield Note("warn", f"{name}: an image that README.md does not show")
        if reason:
            yield Note("FAIL", f"{name}: {reason}")
        elif size > MAX_FILE and name not in s.runs:
            yield Note("FAIL", f"{name}: {size:,} bytes")
        elif size <= MAX_FOLDER:
            with contextlib.suppress(OSError):
                data = s.read(name, MAX_FOLDER)
                if SECRET.search(data):
                    yield Note("FAIL", f"{name}: holds what looks like a secret key")
                elif (
                    b"\0" in data[:4096] and name not in s.logs and not IMAGE.search(name) and "tokenizers/" not in name
                ):
                    yield Note("FAIL", f"{name}: binary")
    if sum(s.files.values()) > MAX_FOLDER:
        yield Note("FAIL", f"{sum(s.files.values()):,} bytes in all")


# name -> (types, whether all of the public files have it)
FIELDS: dict[str, tuple[tuple[type, ...], bool]] = {
    "author": ((str,), True),
    "date": ((str,), True),
    "name": ((str,), False),
    "github_id": ((str,), False),
    "blurb": ((str, type(None)), False),
    "track": ((str,), False),
    "val_loss": ((Decimal, int, type(None)), False),
    "val_loss_std": ((Decimal, int, type(None)), False),
    "val_bpb_std": ((Decimal, int, type(None)), False),
    "bytes_total": ((int,), False),
    "bytes_code": ((int, type(None)), False),
    "bytes_model": ((int, type(None)), False),
    "seeds": ((list, dict), False),
    "seed_results": ((dict,), False),
    "compliance": ((dict,), False),
    "hardware": ((str, type(None)), False),
}
EXPECTED = ("name", "github_id", "track", "val_loss", "bytes_total", "bytes_code", "seeds")
UNSAID = {"n/a", "na", "none", "null", "unknown", "...", "?", "-"}
PLACEHOLDER = re.compile(
    r"^\W*(?:placeholder|fill(?: me)? in|xxx+|your[ _-]?\w+(?:[ _-]\w+)?)\W*$|\b(?:TODO|TBD|FIXME)\b"
    r"|<\s*(?:your|fill|insert|name|author|todo)[^>]*>|\{\{\s*\w+\s*\}\}|\bYOUR_[A-Z_]+\b",
    re.I,
)
README_PLACEHOLDER = re.compile(r"\b(?:TODO|TBD|FIXME)\b|<(?:your|fill|insert) [^>]*>|(?<!\w)\d?\.?X\.XX+")


def check_json(s: Submission) -> Iterator[Note]:
    """Fields and types, old names included; nothing left to fill in."""
    yield from s.json_problems
    meta = s.meta
    if not meta:
        return
    for key, (types, required) in FIELDS.items():
        if key not in meta:
            if required or key in EXPECTED and not (key == "bytes_total" and old_name(meta, "bytes_total")):
                yield Note("FAIL" if required else "warn", f"no field {key}")
        elif not isinstance(meta[key], types) or isinstance(meta[key], bool):
            level = "warn" if meta[key] is None and not required and key != "bytes_total" else "FAIL"
            yield Note(level, f"{key} is {kind_of(meta[key])}, not {' or '.join(kind_name(t) for t in types)}")
    if not str(meta.get("author") or "").strip() and "author" in meta:
        yield Note("FAIL", "author is empty")
    if meta.get("github_id") == "" and meta.get("author"):
        yield Note("warn", "github_id is empty")
    if isinstance(meta.get("date"), str) and not is_date(meta["date"]):
        yield Note("FAIL", f"date {meta['date']} is no day (YYYY-MM-DD) or ISO time")
    for path, value in leaves(meta):
        unsaid = path in ("author", "github_id", "name", "date", "track") and str(value).lower() in UNSAID
        if isinstance(value, str) and (unsaid or PLACEHOLDER.search(value[:500])):
            yield Note("FAIL", f"{path} is not filled in: {value}")
    for key in ("bytes_total", "bytes_code", "val_bpb", "val_loss"):
        if number(meta.get(key)) == 0:
            yield Note("FAIL", f"{key} is 0: not filled in")
    yield from check_score_field(meta)
    seeds, results = meta.get("seeds"), meta.get("seed_results")
    if isinstance(seeds, (list, dict)) and isinstance(results, dict):
        listed, given = ({as_seed(seed) for seed in values} - {None} for values in (seeds, results))
        if listed != given:
            odd = ", ".join(map(str, sorted(listed ^ given)))
            yield Note("FAIL", f"seeds and seed_results differ: {odd}")
    for i, line in enumerate(s.readme.split("\n"), 1):
        if match := README_PLACEHOLDER.search(line[:MAX_LINE]):
            yield Note("warn", f"README.md line {i}: not filled in: {match[0]}")


def check_score_field(meta: Mapping) -> Iterator[Note]:
    if "val_bpb" not in meta:
        old = old_name(meta, "val_bpb")
        yield Note("warn" if old else "FAIL", f"no field val_bpb{f'; {old} was read instead' if old else ''}")
        return
    bpb, loss = number(meta["val_bpb"]), number(meta.get("val_loss"))
    if bpb is None:
        yield Note("FAIL", f"val_bpb is {kind_of(meta['val_bpb'])}, not a number")
    elif not 0 < bpb < 10:
        yield Note("FAIL", f"val_bpb {bpb} is not plausible")
    elif bpb < 0.5:
        yield Note("warn", f"val_bpb {bpb} is below what any accepted entry has")
    if bpb and loss and bpb > loss and bpb < 10:
        yield Note(
            "warn", f"val_bpb {bpb} is larger than val_loss {loss}: are they swapped, or are tokens single bytes?"
        )


OLD_NAMES = {
    "val_bpb": ("mean_val_bpb", "val_bpb_mean", "final_val_bpb", "sliding_val_bpb"),
    "bytes_total": (
        "artifact_bytes",
        "artifact_bytes_max",
        "artifact_size_bytes",
        "total_bytes",
        "artifact_bytes_mean",
    ),
    "bytes_code": ("code_bytes",),
}


def old_name(meta: Mapping, key: str) -> str | None:
    return next((name for name in OLD_NAMES[key] if number(meta.get(name)) is not None), None)


def field_of(meta: Mapping, key: str) -> Any:
    """A field by its name or by an older one."""
    return meta[key] if key in meta else meta.get(old_name(meta, key) or "")


def kind_name(kind: type) -> str:
    return {str: "text", list: "a list", dict: "an object", int: "a whole number", Decimal: "a number"}.get(
        kind, "null"
    )


def kind_of(value: Any) -> str:
    return "true or false" if isinstance(value, bool) else kind_name(type(value))


def is_date(text: str) -> bool:
    for kind in (date, datetime):
        try:
            day = kind.fromisoformat(text.replace("Z", "+00:00") if kind is datetime else text)
            return 2020 <= day.year < 2100
        except ValueError:
            continue
    return False


# ----------------------------------------------------------------------------------------------------------------------
# headline
# ----------------------------------------------------------------------------------------------------------------------


def scores_by_label(log: RunLog) -> dict[str, tuple[float | None, float | None, bool]]:
    """label -> (bpb, loss, whether unrounded); the last validation of training is one of them."""
    found = {}
    for score in log.scores:
        found[score.label] = (score.val_bpb, score.val_loss, score.exact)
    scores = (log.result or {}).get("scores")
    for label, score in scores.items() if isinstance(scores, dict) else ():
        if isinstance(score, dict) and label in found:
            found[label] = (number(score.get("val_bpb")), number(score.get("val_loss")), True)
    validated = [step for step in log.steps if step.val_bpb is not None]
    if validated:
        found.setdefault("last validation step", (validated[-1].val_bpb, validated[-1].val_loss, False))
    return found


class Mean(NamedTuple):
    value: float
    n: int
    tolerance: float

    def reach(self, claim: Any) -> float:
        """How far the claim may lie from the mean: both were rounded, the claim and what the log has."""
        return (0.5 * 10.0 ** -score_digits(claim) + self.tolerance) * (1 + 1e-6) + 1e-12

    def gives(self, claim: Any) -> bool:
        """Whether the mean is the claim."""
        claimed = number(claim)
        return claimed is not None and abs(claimed - self.value) <= self.reach(claim)


def means(s: Submission, index: int) -> dict[str, Mean]:
    """label -> mean over the logs that have it; index 0 is bpb, 1 loss."""
    columns: dict[str, list[tuple[float, bool]]] = {}
    for log in s.runs.values():
        for label, found in scores_by_label(log).items():
            if found[index] is not None and math.isfinite(found[index]):
                columns.setdefault(label, []).append((found[index], found[2]))
    return {
        label: Mean(
            statistics.fmean(value for value, _ in values),
            len(values),
            EXACT_DIGITS if all(exact for _, exact in values) else ROUNDED_DIGITS,
        )
        for label, values in columns.items()
    }


def check_headline(s: Submission) -> Iterator[Note]:
    """val_bpb and val_loss are the mean over seeds of the declared line."""
    if not s.meta or not s.runs:
        yield Note("warn", "nothing to compare: no JSON or no log")
        return
    label = declared_label(s.meta)
    if label is None and s.ours:
        labels = {log.headline().label for log in s.runs.values() if log.headline() is not None}
        label = labels.pop() if len(labels) == 1 else None
    for index, key in enumerate(("val_bpb", "val_loss")):
        claim = field_of(s.meta, key) if key == "val_bpb" else s.meta.get(key)
        if number(claim) is None:
            continue
        found = means(s, index)
        if label is not None and label not in found:
            if index == 0:
                yield Note("FAIL", f"no log has a line {label}, which is declared as the headline")
            continue
        matching = [name for name, mean in found.items() if mean.gives(claim)]
        if label is not None:
            mean = found[label]
            what = f"{key} {claim}; the mean of {mean.n} x {label} is {mean.value:.8f}"
            if label in matching and mean.n == len(s.runs):
                yield Note("pass", f"{what}, tolerance {mean.reach(claim):.1g}")
            elif label in matching:
                yield Note("warn", f"{what}, but {len(s.runs) - mean.n} logs lack the line")
            else:
                yield Note("FAIL", f"{what}{other_source(s, index, claim, matching)}")
        elif matching:
            exact = f"{claim} is the mean over {found[matching[0]].n} logs of {', '.join(matching)}"
            yield Note("warn", f"no line is declared as the headline; {key} {exact}")
        else:
            nearest = min(found.items(), key=lambda item: abs(item[1].value - float(claim)), default=None)
            near = f"; nearest: {nearest[0]} {nearest[1].value:.8f}" if nearest else ""
            level = "FAIL" if found else "warn"
            yield Note(
                level, f"{key} {claim} is the mean of no line of the logs{near}{other_source(s, index, claim, [])}"
            )


def other_source(s: Submission, index: int, claim: Any, matching: list[str]) -> str:
    """Where a wrong headline comes from, as far as the logs tell."""
    if matching:
        return f"; it is that of {', '.join(matching)}"
    for name, log in s.runs.items():
        for label, found in scores_by_label(log).items():
            if found[index] is not None and len(s.runs) > 1:
                if Mean(found[index], 1, EXACT_DIGITS if found[2] else ROUNDED_DIGITS).gives(claim):
                    return f"; it is {label} of {name} alone"
    return ""


def check_readme(s: Submission) -> Iterator[Note]:
    """README.md gives the score that the JSON gives."""
    claim = field_of(s.meta, "val_bpb") if s.meta else None
    if number(claim) is None or not s.readme.strip():
        return
    scores = re.findall(r"(?<![\w.])\d\.\d{3,20}(?![\w.]*\d)", s.readme)
    value = number(claim)
    if any(abs(float(text) - value) <= 0.5 * 10.0 ** -(len(text) - 2) * 1.001 for text in scores):
        return
    if any(abs(float(text) - value) < 10.0 ** -(len(text) - 2) for text in scores):
        yield Note("warn", f"README.md gives val_bpb {claim} of the JSON cut, not rounded")
    else:
        stated = re.search(r"bpb\W{0,12}(\d\.\d{3,})|(\d\.\d{3,})\W{0,6}(?:val_)?bpb", s.readme, re.I)
        here = f", it gives {stated[1] or stated[2]}" if stated else ""
        yield Note("FAIL" if stated else "warn", f"README.md nowhere gives val_bpb {claim} of {s.json_name}{here}")


# ----------------------------------------------------------------------------------------------------------------------
# size, clocks
# ----------------------------------------------------------------------------------------------------------------------


def check_size(s: Submission) -> Iterator[Note]:
    """Code and artifact within the cap, in integers, for each seed; the code counted is the file."""
    if not s.runs:
        return
    code = len(s.script) if s.script is not None else None
    raw = {len(layer.encode()) for layer in s.layers.layers[1:]}
    raw |= {size for name, size in s.files.items() if re.fullmatch(r"train_gpt_\w+\.py|\w+_decode\.py", name)}
    beside = {name: s.files[name] for name in siblings(s)}
    worst, unknown = 0, []
    for name, log in s.runs.items():
        total, model, counted = log.bytes_total, log.bytes_model, log.bytes_code
        for message in log.undecided:
            if "add up to the total" in message:
                yield Note("FAIL" if message.startswith("none of") else "warn", f"{name}: {message}")
        if total is None:
            unknown.append(name)
            for message in log.undecided:
                if "size:" in message or "bytes_total" in message:
                    yield Note("warn", f"{name}: {message}")
            continue
        worst = max(worst, total)
        if model is not None and counted is not None and model + counted != total:
            if model == total:
                yield Note("FAIL", f"{name}: the total of {total:,} bytes is the model alone; the code is forgotten")
            else:
                yield Note("FAIL", f"{name}: {counted:,} + {model:,} bytes are not the total of {total:,}")
        if total > CAP_BYTES:
            over = f"{total:,} bytes, {total - CAP_BYTES:,} over {CAP_BYTES:,}"
            mib = f": it fits 16 MiB ({MIB_16:,}), but the cap is 16 MB" if total <= MIB_16 else ""
            packed = ""
            if counted in raw and code is not None and model is not None and model + code <= CAP_BYTES:
                packed = f"; the log counts the raw source, with the packed script it is {model + code:,}"
            yield Note("FAIL", f"{name}: {over}{mib}{packed}")
        if code is None or counted is None or counted == code:
            continue
        if counted in raw:
            yield Note("warn", f"{name} counts {counted:,} bytes of raw code; the packed train_gpt.py has {code:,}")
        elif model is not None and model + code > CAP_BYTES and total <= CAP_BYTES:
            text = f"with train_gpt.py of {code:,} bytes the total is {model + code:,}, over the cap"
            yield Note("FAIL", f"{name} counts {counted:,} bytes of code; {text}")
        else:
            yield Note(
                "FAIL" if s.ours else "warn", f"{name} counts {counted:,} bytes of code, train_gpt.py has {code:,}"
            )
    for file, size in beside.items():
        if size + (code or 0) not in {log.bytes_code for log in s.runs.values()}:
            level = "FAIL" if file in {Path(name).name for name in s.layers.files} else "warn"
            yield Note(level, f"train_gpt.py runs {file} ({size:,} bytes), which the counted code may leave out")
    if unknown:
        yield Note("warn", f"no total size is clear in {', '.join(unknown)}")
    yield from check_size_fields(s, worst, code)


def check_size_fields(s: Submission, worst: int, code: int | None) -> Iterator[Note]:
    """The sizes in the JSON are those of the logs and the file."""
    total, counted = field_of(s.meta, "bytes_total"), field_of(s.meta, "bytes_code")
    logs = s.runs.values()
    if number(total) is not None:
        if total > CAP_BYTES:
            mib = ", as 16 MiB would allow" if total <= MIB_16 else ""
            yield Note("FAIL", f"{s.json_name}: {total:,} bytes are over {CAP_BYTES:,}{mib}")
        totals = {log.bytes_total for log in logs} - {None}
        if totals and number(total) not in totals and "artifact_bytes_mean" != old_name(s.meta, "bytes_total"):
            if number(total) in {log.bytes_model for log in logs}:
                yield Note("FAIL", f"{s.json_name}: {total:,} bytes are the model alone; the code is forgotten")
            else:
                yield Note(
                    "FAIL", f"{s.json_name}: {total:,} bytes are the total of no log ({min(totals):,} to {worst:,})"
                )
        elif totals and number(total) < worst:
            yield Note("warn", f"{s.json_name}: {total:,} bytes are not the largest seed's, {worst:,}")
    if number(counted) is not None and code is not None and number(counted) != code:
        logged = number(counted) in {log.bytes_code for log in logs}
        text = f"{s.json_name}: bytes_code {counted:,}, train_gpt.py has {code:,}"
        yield Note("warn" if logged else "FAIL", text + (", the logs count as the JSON" if logged else ""))
    if worst:
        over = worst > CAP_BYTES
        yield Note(
            "FAIL" if over else "pass",
            f"largest total {worst:,} bytes, {abs(CAP_BYTES - worst):,} {'over' if over else 'below'} the cap",
        )


CALIBRATION = re.compile(r"gptq|calibrat|hessian", re.I)
ENDED = re.compile(r"stopping_early|peak memory allocated")


def check_clocks(s: Submission) -> Iterator[Note]:
    """Training and evaluation within 600 s each, for each seed."""
    if not s.timed:
        if s.track:
            yield Note("pass", f"not applicable: track {s.track}")
        else:
            yield Note("warn", "neither the JSON nor the folder above names a track: its clocks were not checked")
        return
    longest = {}
    for name, log in s.runs.items():
        train = train_seconds(log)
        for what, seconds in (("training", train), ("evaluation", log.eval_seconds)):
            if seconds is None:
                yield Note("warn", f"{name} does not say how long the {what} took")
                continue
            longest[what] = max(seconds, longest.get(what, 0.0))
            if seconds <= CLOCK_SECONDS:
                continue
            if what == "training" and seconds <= CLOCK_SECONDS + last_step_seconds(log):
                yield Note("warn", f"{name}: training took {seconds:.3f} s: its last step ended after {CLOCK_SECONDS}")
            else:
                yield Note("FAIL", f"{name}: {what} took {seconds:.3f} s, more than {CLOCK_SECONDS}")
        if log.dialect != "pgolf":  # whose training clock holds the calibration
            yield from check_calibration(name, log, s.texts[name], train)
        if steps := [str(step) for event, step in log.events if event == "resume"]:
            text = f"{name}: taken up from a checkpoint at step {', '.join(steps)}: its clocks span several processes"
            yield Note("warn", text)
    allowed = CLOCK_SECONDS + max(map(last_step_seconds, s.runs.values()), default=0.0)
    for path, value in leaves(s.meta):
        found, key = number(value), path.lower()
        if found is not None and re.search(r"(?:train|eval)_?time|wallclock|(?:train|eval)\w*_seconds", key):
            seconds = found / 1000 if key.endswith("_ms") else found
            most = CLOCK_SECONDS if "eval" in key else allowed
            if seconds > most and not re.search(r"total|max_wall|limit|cap", key):
                yield Note("FAIL", f"{s.json_name} {path}: {value} is more than {CLOCK_SECONDS} s")
    if longest:
        yield Note("pass", "longest " + ", ".join(f"{what} {seconds:.1f} s" for what, seconds in longest.items()))


def check_calibration(name: str, log: RunLog, lines: list[str], train: float | None) -> Iterator[Note]:
    """Calibration on training data belongs to the training clock, or to time reserved in it."""
    end = next((i for i, line in enumerate(lines) if ENDED.match(line)), len(lines))
    late = [line.strip() for line in lines[end:] if CALIBRATION.search(line) and not line.lstrip().startswith("gptq (")]
    if late and not re.search(r"reserv", " ".join(lines[:end])):
        yield Note("warn", f"{name}: calibration after the training clock: {late[0]}")
    elif late and train is not None:
        spent = re.search(r"(\d{1,9}(?:\.\d{1,9})?) ?s\b", " ".join(late))
        seconds = float(spent[1]) if spent else 0.0
        if train + seconds > CLOCK_SECONDS + last_step_seconds(log):
            yield Note("FAIL", f"{name}: with {seconds:.1f} s of calibration, training took {train + seconds:.1f} s")


def last_step_seconds(log: RunLog) -> float:
    """How long a step took on average, a second at most: scripts that look at the clock after each step end beyond the
    cap by so much, and public records are accepted with it."""
    last = log.steps[-1] if log.steps else None
    return min(1.0, last.time_ms / last.step / 1000) if last is not None and last.time_ms and last.step else 0.0


def train_seconds(log: RunLog) -> float | None:
    if log.train_seconds is not None or not log.steps or log.steps[-1].time_ms is None:
        return log.train_seconds
    return log.steps[-1].time_ms / 1000


# ----------------------------------------------------------------------------------------------------------------------
# seeds and statistics, compliance, audit, legality
# ----------------------------------------------------------------------------------------------------------------------


def check_seeds(s: Submission) -> Iterator[Note]:
    """How many seeds, of one configuration; deviations as claimed."""
    runs = s.runs
    if not runs:
        return
    seeds: dict[int | None, str] = {}
    for name, log in runs.items():
        seed, named = seed_of(name, log), re.search(r"seed[_-]?(\d{1,10})", name)
        if named and log.seed is not None and int(named[1]) != log.seed:
            yield Note("FAIL", f"{name} is the log of seed {log.seed}")
        if seed is not None and seed in seeds:
            same = runs[seeds[seed]].sha256 == log.sha256
            stale = "the same file" if same else "two logs"
            yield Note("FAIL" if same or s.ours else "warn", f"{stale} for seed {seed}: {seeds[seed]} and {name}")
        seeds.setdefault(seed, name)
        if s.seeds and seed is not None and seed not in s.seeds:
            yield Note("warn", f"{name} is of seed {seed}, which {s.json_name} does not list")
        for message in log.undecided[:5]:
            if "runs in one log" in message or "several values of seed" in message:
                yield Note("warn", f"{name}: {message}")
    hashes = [log.sha256 for log in runs.values()]
    if len(set(hashes)) < len(hashes) and None in seeds:
        yield Note("FAIL", "two logs are the same file")
    claimed = len(s.seeds)
    known = {seed for seed in seeds if seed is not None}
    count = max(len(known), 1)
    if count < SEEDS:
        yield Note("warn", f"{count} seed{'s' * (count > 1)} in the logs, {claimed} claimed; {SEEDS} are expected")
    yield from one_configuration(s)
    yield from deviations(s)
    if count >= SEEDS:
        yield Note("pass", f"{count} seeds: {', '.join(map(str, sorted(known)))}")


def one_configuration(s: Submission) -> Iterator[Note]:
    """Nothing but seed, run id and paths differs between the logs."""
    if not s.runs:
        return
    (first, reference), *others = s.runs.items()
    for name, log in others:
        pairs = {
            "code_sha256": (reference.code_sha256, log.code_sha256),
            "model_params": (reference.model_params, log.model_params),
            "world_size": (reference.world_size, log.world_size),
            "settings_hash": (reference.settings_hash, log.settings_hash),
        }
        if reference.source is not None and log.source is not None:
            pairs["source"] = tuple(
                hashlib.sha256(x.source.strip().encode()).hexdigest()[:12] for x in (reference, log)
            )
        for key in ("train_fingerprint", "val_fingerprint", "tokenizer_sha256"):
            pairs[key] = ((reference.result or {}).get(key), (log.result or {}).get(key))
        for what, (a, b) in pairs.items():
            if a is not None and b is not None and a != b:
                yield Note("FAIL", f"{name} has another {what} than {first}: {b}, {a}")
        a, b = reference.settings or {}, log.settings or {}
        if a and b:
            odd = [key for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
            odd = [key for key in odd if not may_differ(key, a.get(key, b.get(key)), s.ours)]
            if odd:
                shown = ", ".join(f"{key} {b.get(key)} and {a.get(key)}" for key in odd[:4])
                yield Note("FAIL", f"{name} and {first} are of different configurations: {shown}")


def deviations(s: Submission) -> Iterator[Note]:
    """val_bpb_std and val_loss_std are sample deviations of the line whose mean is the score."""
    for index, key in enumerate(("val_bpb", "val_loss")):
        claim = s.meta.get(f"{key}_std")
        if number(claim) is None:
            continue
        label, score = declared_label(s.meta), field_of(s.meta, "val_bpb") if index == 0 else s.meta.get(key)
        columns: dict[str, list[float]] = {}
        for log in s.runs.values():
            for name, found in scores_by_label(log).items():
                if found[index] is not None:
                    columns.setdefault(name, []).append(found[index])
        fits = [name for name, mean in means(s, index).items() if mean.gives(score)] if label is None else [label]
        values = [columns[name] for name in fits if len(columns.get(name, ())) > 1]
        half = 0.5 * 10.0 ** -decimals(claim) + 1.5 * EXACT_DIGITS  # the scores in the log are rounded too
        if not values:
            if number(claim) != 0 and all(len(column) < 2 for column in columns.values()):
                yield Note("FAIL", f"{key}_std {claim}, but no line has two seeds")
        elif any(abs(statistics.stdev(column) - number(claim)) <= half for column in values):
            yield Note("pass", f"{key}_std {claim} is the sample deviation over {len(values[0])} seeds")
        elif any(abs(statistics.pstdev(column) - number(claim)) <= half for column in values):
            sample = statistics.stdev(values[0])
            yield Note("warn", f"{key}_std {claim} divides by n; the sample deviation (n - 1) is {sample:.6f}")
        else:
            sample = statistics.stdev(values[0])
            yield Note("FAIL", f"{key}_std {claim}; the sample deviation over {len(values[0])} seeds is {sample:.6f}")


@functools.lru_cache(1)
def examined(s: Submission) -> list[tuple[str, legality.Finding]]:
    """(file, finding) of the static rules over every source."""
    found: list[tuple[str, legality.Finding]] = []
    for name, source in sources(s):
        try:
            found += [(name, finding) for finding in legality.examine(source, switched(s))]
        except SyntaxError as error:
            unread = legality.Finding("unread", "warn", error.lineno or 0, f"not examined: {error.msg}")
            found.append((name, unread))
    return found


def switched(s: Submission) -> dict[str, Any]:
    """Settings that all runs logged with one value; without any, those that README.md's command switches on."""
    logged = [log.settings for log in s.runs.values() if log.settings]
    if not logged:
        return {name.lower(): value for name, value in re.findall(r"\b([A-Z][A-Z0-9_]{2,})=([\w.]+)", s.readme)}
    first, *others = logged
    return {
        name: value
        for name, value in first.items()
        if isinstance(value, (str, int, float, bool)) and all(other.get(name) == value for other in others)
    }


def check_legality(s: Submission) -> Iterator[Note]:
    """The static rules, and what could not be read."""
    for problem in s.layers.problems:
        yield Note("warn", f"train_gpt.py: {problem.text}: what it runs was not examined")
    for name in s.layers.files:
        if Path(name).name not in s.files:
            yield Note("warn", f"train_gpt.py runs {name}, which the folder lacks: it was not examined")
    audited = verdict(log.audit.get("score_first", (None,))[0] for log in s.runs.values())
    for name, finding in examined(s):
        level, text = "pass" if finding.level == "note" else finding.level, finding.text
        if audited and finding.rule == "train_before_score" and level == "warn":
            text += "; audit:score_first passed in every log, if the script's audit is to be believed"
        yield Note(level, f"{finding.rule}: {name} line {finding.line}: {text}")


def check_compliance(s: Submission) -> Iterator[Note]:
    """Every claim of `compliance` that can be computed is as computed."""
    claims = s.meta.get("compliance")
    if not isinstance(claims, dict):
        return
    runs = s.runs.values()
    seeds = {seed_of(name, log) for name, log in s.runs.items()} - {None}

    def clean(*rules: str) -> bool | None:
        levels = {finding.level for _, finding in examined(s) if finding.rule in rules}
        return False if "FAIL" in levels else None

    audited = [passed for log in runs for passed, _ in log.audit.values()]
    in_time = within(map(train_seconds, runs), CLOCK_SECONDS)
    if all((train_seconds(log) or 0.0) <= CLOCK_SECONDS + last_step_seconds(log) for log in runs):
        in_time = in_time or None  # the last step alone ended late
    computed: dict[str, bool | None] = {
        "three_seeds": len(seeds) >= SEEDS if seeds else None,
        "train_under_600s": in_time,
        "eval_under_600s": within((log.eval_seconds for log in runs), CLOCK_SECONDS),
        "artifact_under_16mb": within((log.bytes_total for log in runs), CAP_BYTES),
        "score_first_ttt": clean("train_before_score", "several_passes"),
        "no_pre_quant_ttt": clean("train_before_score"),
        "no_slot": clean("scored_region"),
        "no_ngram_cache": clean("target_in_key", "unnormalised_mix"),
        "single_pass": clean("several_passes", "best_of_passes"),
        "audit_passed": all(audited) if audited else None,
        "no_network": clean("network"),
        "one_configuration": False if any(one_configuration(s)) else None,
    }
    shown = {key: verdict(log.audit.get(name, (None,))[0] for log in runs) for name, (key, _) in AUDITS.items()}
    computed |= {key: verdict([computed.get(key, answer), answer]) for key, answer in shown.items()}
    aliases = {"training_under_600s": "train_under_600s", "artifact_under_16_mb": "artifact_under_16mb"}
    for key, claim in claims.items():
        truth = computed.get(aliases.get(key, key))
        if claim is not None and not isinstance(claim, bool) and aliases.get(key, key) in computed:
            yield Note("warn", f"{key} is {kind_of(claim)}, not true or false")
        elif claim is True and truth is False:
            yield Note("FAIL", f"{key} is claimed, and it is not so")
        elif claim is False and truth is True:
            yield Note("warn", f"{key} is denied, but it is so")
        elif claim is True and key in shown and shown[key] is None and s.ours:
            yield Note("warn", f"{key} is claimed, and no audit in the logs shows it")


def check_audit(s: Submission) -> Iterator[Note]:
    """Audit lines, where a log has them, all pass."""
    count, without = 0, []
    for name, log in s.runs.items():
        findings = dict(log.audit)
        stated = (log.result or {}).get("audit")
        for key, finding in stated.items() if isinstance(stated, dict) else ():
            if isinstance(finding, dict) and finding.get("passed") is False:
                findings[key] = (False, str(finding.get("figure", "")))
        count += len(findings)
        without += [] if findings else [name]
        for key, (passed, figure) in findings.items():
            if not passed:
                yield Note("FAIL", f"{name}: audit:{key} failed: {figure}")
    if without:
        yield Note("pass", "no log has audit lines" if not count else f"no audit lines in {', '.join(without)}")
    elif count:
        yield Note("pass", f"{count} audit lines pass")


CHECKS: dict[str, Callable[[Submission], Iterator[Note]]] = {
    "files": check_files,
    "json": check_json,
    "readme": check_readme,
    "headline": check_headline,
    "numbers": check_numbers,
    "source": check_source,
    "syntax": check_syntax,
    "size": check_size,
    "clocks": check_clocks,
    "seeds": check_seeds,
    "compliance": check_compliance,
    "audit": check_audit,
    "legality": check_legality,
}


def check(folder: Path) -> list[Finding]:
    """All findings of a folder, each check with one at least. Raises CheckError where it is no folder."""
    submission = load(folder)
    found: list[Finding] = []
    for name, function in CHECKS.items():
        notes = []
        try:
            notes = list(dict.fromkeys(function(submission)))
        except RecursionError:
            notes = [Note("warn", "nested too deeply to be examined")]
        found += summarised(name, notes)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# --against
# ----------------------------------------------------------------------------------------------------------------------


def git(folder: Path, *words: str) -> str:
    """Output of a git command in a folder. Raises CheckError."""
    # Nothing that the repository's own configuration names is started.
    safe = ["-c", "core.fsmonitor=", "-c", "core.hooksPath=/dev/null", "-c", "diff.external="]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", *safe, *words],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise CheckError(f"git: {clean_text(str(error), 120)}") from None
    if done.returncode:
        raise CheckError(
            f"git {words[0]}: {clean_text(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else '', 120)}"
        )
    return done.stdout


def check_against(folder: Path, ref: str) -> list[Finding]:
    """The difference from REF to the working tree is this folder under records/, new, and nothing else."""
    folder = folder.resolve()
    root = Path(git(folder, "rev-parse", "--show-toplevel").rstrip("\n"))
    base = git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}").strip()
    base = git(root, "merge-base", base, "HEAD").strip()  # what came to REF since then is not this change
    fields = git(root, "diff", "--name-status", "--no-renames", "--no-ext-diff", "-z", base, "--").split("\0")
    changed = dict(zip(fields[1::2], fields[::2], strict=False))
    changed |= {name: "A" for name in git(root, "ls-files", "--others", "--exclude-standard", "-z").split("\0") if name}
    own = folder.relative_to(root).as_posix() + "/"
    notes = []
    if not re.fullmatch(r"records/track_[^/]+/[^/]+/", own):
        notes.append(Note("FAIL", f"{own} is not records/track_<track>/<folder>/"))
    for name, status in changed.items():
        if not name.startswith(own):
            notes.append(
                Note("FAIL", f"{name} is {dict(A='added', D='deleted').get(status, 'changed')}, outside of {own}")
            )
        elif status != "A":
            notes.append(Note("FAIL", f"{name} was there before and is {'deleted' if status == 'D' else 'changed'}"))
    ignored = git(root, "ls-files", "--others", "--ignored", "--exclude-standard", "-z", "--", own).split("\0")
    notes += [Note("FAIL", f"{name} is ignored by git and would be missing: git add -f") for name in ignored if name]
    added = sum(name.startswith(own) for name in changed)
    if not added:
        notes.append(Note("FAIL", f"{own} is not new against {ref}"))
    return summarised("against", notes or [Note("pass", f"adds {added} files, all in {own}")])


# ----------------------------------------------------------------------------------------------------------------------
# Command
# ----------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path, help="submission folder, anyone's")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.add_argument("--run", action="store_true", help="also import the script, in a subprocess with limits")
    parser.add_argument("--against", metavar="REF", help="also check that the change since REF is this folder alone")


def run(args: argparse.Namespace) -> int:
    """1 where anything FAILed."""
    try:
        found = []
        folders = [folder for folder in args.folders if not folder.is_file()] or args.folders
        for file in [path for path in args.folders if path not in folders]:  # of `check records/track_x/*`
            print(f"skipped: {clean_text(str(file))} is no folder", file=sys.stderr)
        for folder in folders:
            findings = check(folder)
            findings += check_run(folder) if args.run else []
            findings += check_against(folder, args.against) if args.against else []
            found.append((folder, findings))
    except (CheckError, OSError) as error:
        print(f"error: {clean_text(str(error))}", file=sys.stderr)
        return 2
    failed = any(finding.level == "FAIL" for _, findings in found for finding in findings)
    if args.json:
        folders = [
            {
                "folder": str(folder),
                "failed": any(f.level == "FAIL" for f in findings),
                "findings": [f._asdict() for f in findings],
            }
            for folder, findings in found
        ]
        print(json.dumps({"failed": failed, "folders": folders}, indent=2))
        return int(failed)
    for folder, findings in found:
        if len(found) > 1:
            show(f"{clean_text(str(folder))}:")
        for finding in findings:
            show(f"{finding.level} {finding.check} {finding.what}".rstrip())
    return int(failed)


def show(line: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding))
