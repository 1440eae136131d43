"""`check FOLDER...`: whether a folder says what its logs say, and keeps the rules as far as files can show it.

Folders are untrusted: nothing in them is executed (but with --run, in a subprocess with limits), links are not
followed, sizes are bounded, and foreign text is printed without control characters. One function per check, each
yielding findings: FAIL, warn, skip for what could not be examined, note; a check that finds nothing has passed.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from records.submission import audits, foreign, legality, runs
from records.submission.claims import check_numbers, readme_scores
from records.submission.command import clean_text, command
from records.submission.foreign import CheckError, Finding, Note, Submission, load
from records.submission.program import COMPANION_SOURCE, beside, check_source, check_syntax, sources
from records.submission.rules import CAP_BYTES, CLOCK_SECONDS, SEEDS, has_clocks, verdict, within
from records.submission.runlog import RunLog
from records.submission.runs import EXACT_DIGITS, Mean, means, number, seed_of
from records.submission.smoke import check_run

MIB_16 = 16 << 20  # what some take the cap for

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
    if not s.files.get("README.md"):
        yield Note("FAIL", f"README.md is {'empty' if 'README.md' in s.files else 'missing'}")
    script, why = s.found_script
    if why:
        yield Note("FAIL" if script is None or "empty" in why else "warn", why)
    if s.json_name is None:
        yield Note("FAIL", "submission.json is missing")
    elif s.json_name != "submission.json":
        yield Note("warn", f"{s.json_name} should be called submission.json")
    if not s.runs:
        yield Note("FAIL", "no log of a run")
    for copy, original in s.choice.copies.items():
        yield Note("note", f"{copy} is a copy of {original}: one run")
    if s.choice.others:
        yield Note("note", f"other runs, not judged: {', '.join(s.choice.others)}")
    logs = {name.partition(", run ")[0] for name in s.logs}
    logged = {seed_of(name, log) for name, log in s.runs.items()}
    together = len(s.runs) == 1 and None in logged or any(len(log.runs) > 1 for log in s.runs.values())
    for seed in s.seeds:
        if s.runs and seed not in logged:
            level = "warn" if together else "FAIL"
            yield Note(level, f"no log states seed {seed}, which submission.json claims")
    for name, size in s.files.items():
        used = name in logs or name == script or name in beside(s)
        known = used or foreign.COMPANION.fullmatch(name)
        reason = next((why for why, pattern in SURPRISE.items() if not known and re.search(pattern, name, re.I)), None)
        if not (known or reason or IMAGE.search(name) or foreign.LOG.search(name)):
            yield Note("warn", f"{name}: not one of the files a submission has")
        if IMAGE.search(name) and Path(name).name not in s.readme:
            yield Note("warn", f"{name}: an image that README.md does not show")
        if reason:
            yield Note("FAIL", f"{name}: {reason}")
        elif size > foreign.MAX_FILE and name not in logs:
            yield Note("FAIL", f"{name}: {size:,} bytes")
        elif size <= foreign.MAX_FOLDER:
            with contextlib.suppress(OSError):
                data = s.read(name, foreign.MAX_FOLDER)
                if SECRET.search(data):
                    yield Note("FAIL", f"{name}: holds what looks like a secret key")
                elif b"\0" in data[:4096] and not (used or IMAGE.search(name) or "tokenizers/" in name):
                    yield Note("FAIL", f"{name}: binary")
    if sum(s.files.values()) > foreign.MAX_FOLDER:
        yield Note("FAIL", f"{sum(s.files.values()):,} bytes in all")


# name -> (what its value may be, how many of the public files have it)
FIELDS = {
    "author": ("text", "all"),
    "date": ("text", "all"),
    "name": ("text", "most"),
    "github_id": ("text", "most"),
    "blurb": ("text or null", "some"),
    "track": ("text", "most"),
    "val_loss": ("a number or a whole number or null", "most"),
    "val_loss_std": ("a number or a whole number or null", "some"),
    "val_bpb_std": ("a number or a whole number or null", "some"),
    "bytes_total": ("a whole number", "most"),
    "bytes_code": ("a whole number or null", "most"),
    "bytes_model": ("a whole number or null", "some"),
    "seeds": ("a list or an object", "most"),
    "seed_results": ("an object", "some"),
    "compliance": ("an object", "some"),
    "hardware": ("text or null", "some"),
}
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
    for key, (kinds, who) in FIELDS.items():
        if key not in meta:
            if who == "all":
                yield Note("FAIL", f"no field {key}")
            elif who == "most" and not s.old_name(key):
                yield Note("usual", key)
        elif kind_of(meta[key]) not in kinds.split(" or ") or isinstance(meta[key], float):  # NaN, infinity
            level = "warn" if meta[key] is None and who != "all" and key != "bytes_total" else "FAIL"
            yield Note(level, f"{key} is {kind_of(meta[key])}, not {kinds}")
    if not str(meta.get("author") or "").strip() and "author" in meta:
        yield Note("FAIL", "author is empty")
    if meta.get("github_id") == "" and meta.get("author"):
        yield Note("warn", "github_id is empty")
    if isinstance(meta.get("date"), str) and not is_date(meta["date"]):
        yield Note("FAIL", f"date {meta['date']} is no day (YYYY-MM-DD) or ISO time")
    for path, value in foreign.leaves(meta):
        unsaid = path in ("author", "github_id", "name", "date", "track") and str(value).lower() in UNSAID
        if isinstance(value, str) and (unsaid or PLACEHOLDER.search(value[:500])):
            yield Note("FAIL", f"{path} is not filled in: {value}")
    for key in ("bytes_total", "bytes_code", "val_bpb", "val_loss"):
        if number(meta.get(key)) == 0:
            yield Note("FAIL", f"{key} is 0: not filled in")
    yield from check_score_field(s, meta)
    seeds, results = meta.get("seeds"), meta.get("seed_results")
    if isinstance(seeds, (list, dict)) and isinstance(results, dict):
        listed, given = ({runs.as_seed(seed) for seed in values} - {None} for values in (seeds, results))
        if listed != given:
            odd = ", ".join(map(str, sorted(listed ^ given)))
            yield Note("FAIL", f"seeds and seed_results differ: {odd}")
    for i, line in enumerate(s.readme.split("\n"), 1):
        if match := README_PLACEHOLDER.search(line[: foreign.MAX_LINE]):
            yield Note("warn", f"README.md line {i}: not filled in: {match[0]}")


def check_score_field(s: Submission, meta: Mapping) -> Iterator[Note]:
    if "val_bpb" not in meta:
        old = s.old_name("val_bpb")
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
        why = "are they swapped, or are tokens single bytes?"
        yield Note("warn", f"val_bpb {bpb} is larger than val_loss {loss}: {why}")


def kind_of(value: Any) -> str:
    names = {str: "text", list: "a list", dict: "an object", int: "a whole number", Decimal: "a number"}
    return (names | {bool: "true or false"}).get(type(value), "null")


def is_date(text: str) -> bool:
    try:
        return 2020 <= datetime.fromisoformat(text.replace("Z", "+00:00")).year < 2100
    except ValueError:
        return False


# ----------------------------------------------------------------------------------------------------------------------
# headline
# ----------------------------------------------------------------------------------------------------------------------


def check_headline(s: Submission) -> Iterator[Note]:
    """val_bpb and val_loss are the mean over seeds of the declared line."""
    if not s.meta or not s.runs:
        yield Note("skip", "nothing to compare: no JSON" if s.runs else "nothing to compare: no log of a run")
        return
    logs, (label, how) = list(s.runs.values()), s.headline
    if runs.declared_label(s.meta) is None and not s.ours:
        yield Note("usual", "headline")
    if number(s.stated("val_bpb")) is None:
        yield Note("skip", "the JSON claims no val_bpb")
    for index, key in enumerate(("val_bpb", "val_loss")):
        claim = s.stated(key)
        if number(claim) is None:
            continue
        found = means(logs, index)
        if label is not None and label not in found:
            if index == 0:
                yield Note("FAIL", f"no log has a line {label}, which is declared as the headline")
            continue
        matching = [name for name, mean in found.items() if mean.gives(claim)]
        if label is not None:
            mean = found[label]
            what = f"{key} {claim}; the mean of {mean.n} x {label} is {mean.value:.8f}"
            if label in matching and mean.n == len(logs):
                yield Note("pass", f"{what}, tolerance {mean.reach(claim):.1g} (the line: {how})")
            elif label in matching:
                yield Note("warn", f"{what}, but {len(logs) - mean.n} logs lack the line")
            elif is_mean_of_rounded(s, key, claim, mean):
                yield Note("pass", f"{what}, and it is that of the seeds' scores as they were rounded")
            else:
                yield Note("FAIL", f"{what}{other_source(s, index, claim, matching)}")
        elif matching:
            # Which line is unclear only where val_bpb fits none or several that differ.
            yield Note("warn", f"{key} {claim} is the mean over {found[matching[0]].n} logs of {', '.join(matching)}")
        else:
            nearest = min(found.items(), key=lambda item: abs(item[1].value - float(claim)), default=None)
            near = f"; nearest: {nearest[0]} {nearest[1].value:.8f}" if nearest else ""
            what = f"{key} {claim} is the mean of no line of the logs{near}{other_source(s, index, claim, [])}"
            yield Note("FAIL" if found else "skip", what)


def rounded_scores(s: Submission, key: str) -> list[Any]:
    """The score of each seed as the JSON states it."""
    results = s.meta.get("seed_results")
    rows = list(results.values()) if isinstance(results, dict) else []
    values = [row.get(key) for row in rows if isinstance(row, dict)]
    return values if values and None not in map(number, values) else []


def is_mean_of_rounded(s: Submission, key: str, claim: Any, mean: Mean) -> bool:
    """Whether a claim is the mean of the seeds' scores as the JSON or README.md rounds them, and within that rounding
    of the mean of the logs; the check of numbers compares each of them with its log."""
    values = rounded_scores(s, key) or readme_scores(s.readme, s.seeds)
    if not values:
        return False
    rounding = 0.5 * 10.0 ** -max(map(runs.decimals, values))
    stated = Mean(statistics.fmean(map(float, values)), len(values), tolerance=0.0)
    return stated.gives(claim) and mean.gives(claim, rounding)


def other_source(s: Submission, index: int, claim: Any, matching: list[str]) -> str:
    """Where a wrong headline comes from, as far as the logs tell."""
    if matching:
        return f"; it is that of {', '.join(matching)}"
    for name, log in s.logs.items():
        for label, mean in means([log], index).items():
            if len(s.logs) > 1 and mean.gives(claim):
                return f"; it is {label} of {name} alone"
    return ""


def check_readme(s: Submission) -> Iterator[Note]:
    """README.md gives the score that the JSON gives."""
    claim = s.stated("val_bpb")
    if number(claim) is None or not s.readme.strip():
        yield Note("skip", "the JSON claims no val_bpb" if s.readme.strip() else "README.md says nothing")
        return
    scores = re.findall(r"(?<![\w.])\d\.\d{3,20}(?![\w.]*\d)", s.readme)
    value = number(claim)
    # The one with more digits has to give the other.
    halves = [0.5 * 10.0 ** -min(len(text) - 2, runs.score_digits(claim)) * 1.001 for text in scores]
    if any(abs(float(text) - value) <= half for text, half in zip(scores, halves, strict=True)):
        return
    if any(abs(float(text) - value) < 10.0 ** -(len(text) - 2) for text in scores):
        yield Note("warn", f"README.md gives val_bpb {claim} of the JSON cut, not rounded")
    else:
        stated = foreign.STATED_BPB.search(s.readme)
        here = f", it gives {stated[1] or stated[2]}" if stated else ""
        yield Note("FAIL" if stated else "warn", f"README.md nowhere gives val_bpb {claim} of {s.json_name}{here}")


# ----------------------------------------------------------------------------------------------------------------------
# size, clocks
# ----------------------------------------------------------------------------------------------------------------------


def check_size(s: Submission) -> Iterator[Note]:
    """Code and artifact within the cap, in integers, for each seed: as the authors count, and by what runs."""
    if not s.runs:
        yield Note("skip", "no log of a run, so no size")
        return
    script, extra = s.found_script[0], {name: s.files[name] for name in beside(s)}
    code = len(s.script) + sum(extra.values()) if s.script is not None else None
    what = f"what runs ({', '.join([script, *extra])})" if extra else script
    carriage_returns = (s.script or b"").count(b"\r\n")  # which a checkout may add
    raw = {len(layer.encode()) for layer in s.layers.layers[1:]}
    raw |= {size for name, size in s.files.items() if COMPANION_SOURCE.fullmatch(name)}
    worst, unknown = 0, []
    for name, log in s.runs.items():
        total, model, counted = log.bytes_total, log.bytes_model, log.bytes_code
        if counted is None and None not in (total, model):
            counted = total - model
        for message in log.undecided:
            if "add up to the total" in message:
                yield Note("FAIL" if message.startswith("none of") else "warn", f"{name}: {message}")
            elif total is None and ("size:" in message or "bytes_total" in message):
                yield Note("warn", f"{name}: {message}")
        if total is None:
            unknown.append(name)
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
        if code is None or counted is None or counted in (code, code - carriage_returns):
            continue
        if counted in raw:
            yield Note("warn", f"{name} counts {counted:,} bytes of raw code; the packed {script} has {code:,}")
            continue
        real = total - counted + code
        over = f", {real - CAP_BYTES:,} over the cap" if real > CAP_BYTES else ""
        both = f"{total:,} bytes in all as counted, {real:,} by what runs{over}"
        level = "FAIL" if s.ours else "warn"
        yield Note(level, f"{name} counts {counted:,} bytes of code, {what} has {code:,}: {both}")
    if unknown:
        yield Note("skip", f"no total size is clear in {', '.join(unknown)}")
    yield from check_size_fields(s, worst)


def check_size_fields(s: Submission, worst: int) -> Iterator[Note]:
    """The sizes in the JSON are those of the logs and the file."""
    total, counted, script = s.stated("bytes_total"), s.stated("bytes_code"), s.found_script[0]
    logs = s.runs.values()
    if number(total) is not None:
        told = f"{s.json_name}: {total:,} bytes are"
        if total > CAP_BYTES:
            mib = ", as 16 MiB would allow" if total <= MIB_16 else ""
            yield Note("FAIL", f"{told} over {CAP_BYTES:,}{mib}")
        totals = [log.bytes_total for log in logs if log.bytes_total is not None]
        if totals and number(total) not in totals:
            if number(total) in {log.bytes_model for log in logs}:
                yield Note("FAIL", f"{told} the model alone; the code is forgotten")
            elif abs(number(total) - statistics.fmean(totals)) <= 1:
                yield Note("warn", f"{told} the mean of the logs; the largest has {worst:,}")
            else:
                yield Note("FAIL", f"{told} the total of no log ({min(totals):,} to {worst:,})")
        elif totals and number(total) < worst:
            yield Note("warn", f"{told} not the largest seed's, {worst:,}")
    if number(counted) is not None and s.script is not None:
        sizes = {len(s.script), len(s.script) + sum(s.files[name] for name in beside(s))}
        sizes.add(len(s.script.replace(b"\r\n", b"\n")))
        if number(counted) not in sizes:
            logged = number(counted) in {size for log in logs for size in (log.bytes_code, log.bytes_source)}
            text = f"{s.json_name}: bytes_code {counted:,}, {script} has {len(s.script):,}"
            yield Note("warn" if logged else "FAIL", text + (", the logs count as the JSON" if logged else ""))
    if worst:
        over = worst > CAP_BYTES
        away = f"{abs(CAP_BYTES - worst):,} {'over' if over else 'below'} the cap"
        yield Note("FAIL" if over else "pass", f"largest total {worst:,} bytes, {away}")


CALIBRATION = re.compile(r"gptq|calibrat|hessian", re.I)
SELF_GENERATED = re.compile(r"self.?gen|auto.?regressive|\bAR\b|generat\w{1,4} .{0,40}calib|calib.{0,40}generat", re.I)
RESERVED = re.compile(r"reserv\w{0,6}\D{0,20}?(\d{1,9}(?:\.\d{1,9})?)", re.I)
ENDED = re.compile(r"stopping_early|peak memory allocated")
LAST_STEP_SECONDS = 1.0  # scripts look at the clock after each step; public records are accepted that end so late


def check_clocks(s: Submission) -> Iterator[Note]:
    """Training and evaluation within 600 s each, for each seed."""
    if s.track and not has_clocks(s.track):
        yield Note("pass", f"not applicable: track {s.track}")
        return
    if not s.runs:
        yield Note("skip", "no log of a run, so no times")
        return
    longest, silent, late = {}, {}, []
    for name, log in s.runs.items():
        train = train_seconds(log)
        for what, seconds in (("training", train), ("evaluation", log.eval_seconds)):
            if seconds is None:
                silent.setdefault(what, []).append(name)
                continue
            longest[what] = max(seconds, longest.get(what, 0.0))
            took = f"{name}: {what} took {seconds:.3f} s"
            if what == "training" and CLOCK_SECONDS < seconds < CLOCK_SECONDS + LAST_STEP_SECONDS:
                late.append(Note("warn", f"{took}: its last step ended after {CLOCK_SECONDS}"))
            elif seconds > CLOCK_SECONDS:
                late.append(Note("FAIL", f"{took}, more than {CLOCK_SECONDS}"))
        if log.dialect != "pgolf":  # whose training clock holds the calibration
            late += check_calibration(name, log, train)
        if steps := [str(step) for event, step in log.events if event == "resume"]:
            text = f"{name}: taken up from a checkpoint at step {', '.join(steps)}: its clocks span several processes"
            yield Note("warn", text)
    for path, value in foreign.leaves(s.meta):
        found, key = number(value), path.lower()
        if found is not None and re.search(r"(?:train|eval)_?time|wallclock|(?:train|eval)\w*_seconds", key):
            seconds = found / 1000 if key.endswith("_ms") else found
            most = CLOCK_SECONDS + (0 if "eval" in key else LAST_STEP_SECONDS)
            if seconds > most and not re.search(r"total|max_wall|limit|cap", key):
                late.append(Note("FAIL", f"{s.json_name} {path}: {value} is more than {CLOCK_SECONDS} s"))
    if s.track or not late:
        yield from late
    else:
        yield Note("skip", f"no track is named; on one with clocks this would count: {late[0].what}")
    for what, names in silent.items():
        yield Note("skip", f"{', '.join(names)}: how long the {what} took is not said")
    yield Note("pass", "longest " + ", ".join(f"{what} {seconds:.1f} s" for what, seconds in longest.items()))


def check_calibration(name: str, log: RunLog, train: float | None) -> Iterator[Note]:
    """Calibration on training data belongs to the training clock, or to time reserved in it. A reserve of nothing is
    none. Text that the model makes itself is no training data, whatever was reserved."""
    lines = log.printed
    end = next((i for i, line in enumerate(lines) if ENDED.match(line)), len(lines))
    late = [line.strip()[: foreign.MAX_LINE] for line in lines[end:] if CALIBRATION.search(line[: foreign.MAX_LINE])]
    late = [line for line in late if not line.startswith("gptq (")]
    if not late:
        return
    spent = re.search(r"(\d{1,9}(?:\.\d{1,9})?) ?s\b", " ".join(late))
    seconds = float(spent[1]) if spent else 0.0
    reserves = [RESERVED.search(line[: foreign.MAX_LINE]) for line in lines[:end] if "reserv" in line]
    if any(SELF_GENERATED.search(line) for line in late):
        took = f" ({seconds:.1f} s)" if seconds else ""
        yield Note("warn", f"{name}: calibration after the training clock{took}, on text that the model made itself")
    elif not any(float(found[1]) for found in reserves if found):
        yield Note("warn", f"{name}: calibration after the training clock: {late[0]}")
    elif train is not None and train + seconds >= CLOCK_SECONDS + LAST_STEP_SECONDS:
        yield Note("FAIL", f"{name}: with {seconds:.1f} s of calibration, training took {train + seconds:.1f} s")


def train_seconds(log: RunLog) -> float | None:
    if log.train_seconds is not None or not log.steps or log.steps[-1].time_ms is None:
        return log.train_seconds
    return log.steps[-1].time_ms / 1000


# ----------------------------------------------------------------------------------------------------------------------
# seeds and statistics, compliance, audit, legality
# ----------------------------------------------------------------------------------------------------------------------


def check_seeds(s: Submission) -> Iterator[Note]:
    """How many distinct seeds, of one configuration; deviations as claimed."""
    if not s.runs:
        yield Note("skip", "no log of a run, so no seed")
        return
    seeds: dict[int | None, str] = {}
    for name, log in s.runs.items():
        seed, stated = seed_of(name, log), runs.named_seed(name)
        if None not in (stated, log.seed) and stated != log.seed:
            yield Note("FAIL", f"{name} is the log of seed {log.seed}")
        if seed is not None and seed in seeds:
            yield Note("FAIL" if s.ours else "warn", f"two logs for seed {seed}: {seeds[seed]} and {name}")
        seeds.setdefault(seed, name)
        if s.seeds and seed is not None and seed not in s.seeds:
            yield Note("warn", f"{name} is of seed {seed}, which {s.json_name} does not list")
        for message in log.undecided[:5]:
            if "runs in one log" in message or "several values of seed" in message:
                yield Note("warn", f"{name}: {message}")
    for copy, original in s.choice.copies.items():
        if runs.named_seed(copy) not in (None, seed_of(original, s.logs[original])):
            yield Note("FAIL", f"the same file as {original}, or its copy: {copy}, named for another seed")
    if not s.choice.decided:
        yield Note("skip", f"several experiments, and nothing says which is meant: {', '.join(s.runs)} were judged")
    known = {seed for seed in seeds if seed is not None}
    count = max(len(known), 1)
    if count < SEEDS:
        claimed = f"{count} seed{'s' * (count > 1)} in the logs, {len(s.seeds)} claimed"
        yield Note("warn", f"{claimed}; {SEEDS} are expected")
    yield from one_configuration(s)
    yield from deviations(s)
    yield Note("pass", f"{count} seeds: {', '.join(map(str, sorted(known)))}")


def one_configuration(s: Submission) -> Iterator[Note]:
    """Nothing but seed, run id and paths differs between the logs."""
    (first, reference), *others = s.runs.items()
    for name, log in others:
        odd = [f"{what} {mine} and {other}" for what, mine, other in runs.differences(log, reference)]
        if odd:
            yield Note("FAIL", f"{name} and {first} are of different configurations: {', '.join(odd[:4])}")


def deviations(s: Submission) -> Iterator[Note]:
    """val_bpb_std and val_loss_std are sample deviations of the line whose mean is the score."""
    for index, key in enumerate(("val_bpb", "val_loss")):
        claim = s.meta.get(f"{key}_std")
        if number(claim) is None:
            continue
        found = means(s.runs.values(), index)
        label, score = s.headline[0], s.stated(key)
        fits = [name for name, mean in found.items() if (mean.gives(score) if label is None else name == label)]
        values = [found[name].values for name in fits if found[name].n > 1]
        if not values:
            if number(claim) != 0 and all(mean.n < 2 for mean in found.values()):
                yield Note("FAIL", f"{key}_std {claim}, but no line has two seeds")
            continue
        rounded = [float(value) for value in rounded_scores(s, key)]
        samples = [*values, rounded] if len(rounded) > 1 else values
        half = 0.5 * 10.0 ** -runs.decimals(claim) + 1.5 * EXACT_DIGITS  # the scores in the log are rounded too
        by_sample, by_population = (
            any(abs(deviation(sample) - number(claim)) <= half for sample in samples)
            for deviation in (statistics.stdev, statistics.pstdev)
        )
        sample = f"{statistics.stdev(values[0]):.6f}"
        if by_sample:
            yield Note("pass", f"{key}_std {claim} is the sample deviation over {len(values[0])} seeds")
        elif by_population:
            yield Note("warn", f"{key}_std {claim} divides by n; the sample deviation (n - 1) is {sample}")
        else:
            yield Note("FAIL", f"{key}_std {claim}; the sample deviation over {len(values[0])} seeds is {sample}")


@functools.lru_cache(1)
def examined(s: Submission) -> list[tuple[str, legality.Finding]]:
    """(file, finding) of the static rules over every source."""
    found: list[tuple[str, legality.Finding]] = []
    for name, source in sources(s):
        try:
            found += [(name, finding) for finding in legality.examine(source, switched(s))]
        except SyntaxError as error:
            unread = legality.Finding("unread", "skip", error.lineno or 0, f"not examined: {error.msg}")
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
    script, why = s.found_script
    if s.script is None:
        yield Note("skip", why)
        return
    for problem in s.layers.problems:
        yield Note("skip", f"{script}: {problem.text}: what it runs was not examined")
    for name in s.layers.files:
        if s.read_for(script, name) is None:
            yield Note("skip", f"{script} runs {name}, which the folder lacks: it was not examined")
    shown = audits.shown(s.runs.values())
    for name, finding in examined(s):
        level, text = finding.level, finding.text
        if shown["score_first_ttt"] and finding.rule == "train_before_score" and level == "warn":
            text += "; audit:score_first passed in every log, if that audit is to be believed"
        yield Note(level, f"{finding.rule}: {name} line {finding.line}: {text}")


def check_compliance(s: Submission) -> Iterator[Note]:
    """Every claim of `compliance` that can be computed is as computed."""
    claims = s.meta.get("compliance")
    if not isinstance(claims, dict):
        yield Note("pass", "nothing to check: the JSON claims none")
        return
    logs = s.runs.values()
    seeds = {seed_of(name, log) for name, log in s.runs.items()} - {None}

    def clean(*rules: str) -> bool | None:
        levels = {finding.level for _, finding in examined(s) if finding.rule in rules}
        return False if "FAIL" in levels else None

    audited = [passed for log in logs for passed, _ in log.audit.values()]
    in_time = within(map(train_seconds, logs), CLOCK_SECONDS)
    if all((train_seconds(log) or 0.0) < CLOCK_SECONDS + LAST_STEP_SECONDS for log in logs):
        in_time = in_time or None  # the last step alone ended late
    computed: dict[str, bool | None] = {
        "three_seeds": len(seeds) >= SEEDS if seeds else None,
        "train_under_600s": in_time,
        "eval_under_600s": within((log.eval_seconds for log in logs), CLOCK_SECONDS),
        "artifact_under_16mb": within((log.bytes_total for log in logs), CAP_BYTES),
        "score_first_ttt": clean("train_before_score", "several_passes"),
        "no_pre_quant_ttt": clean("train_before_score"),
        "no_slot": clean("scored_region"),
        "no_ngram_cache": clean("target_in_key", "unnormalised_mix"),
        "single_pass": clean("several_passes", "best_of_passes"),
        "audit_passed": all(audited) if audited else None,
        "no_network": clean("network"),
        "one_configuration": False if s.runs and any(one_configuration(s)) else None,
    }
    shown = audits.shown(logs)
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
    """Findings of audits, in the log or in an audit.json of its script and artifact, all pass."""
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
    if without and count:
        yield Note("warn", f"no audit lines in {', '.join(without)}")
    yield Note("pass", f"{count} audit lines pass" if count else "nothing to check: no log has audit lines")


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


# What the challenge requires: a folder of which one of these was not examined is not clean.
REQUIRED = frozenset(("files", "json", "headline", "source", "syntax", "size", "clocks", "seeds", "legality"))


def check(folder: Path) -> list[Finding]:
    """All findings of a folder, each check with one at least. Raises CheckError where it is no folder."""
    submission = load(folder)
    found: list[Finding] = []
    usual: list[str] = []
    for name, function in CHECKS.items():
        try:
            notes = list(dict.fromkeys(function(submission)))
        except RecursionError:
            notes = [Note("skip", "nested too deeply to be examined")]
        usual += [note.what for note in notes if note.level == "usual"]
        found += foreign.summarised(name, notes)
    if usual:
        unsaid = ", ".join(dict.fromkeys(usual))
        found.append(Finding("unsaid", "warn", f"{submission.json_name} does not say, as many do not: {unsaid}"))
    return found


def is_clean(findings: Iterable[Finding]) -> bool:
    """Whether nothing failed, and all was examined that the challenge requires."""
    return not any(f.level == "FAIL" or (f.level == "skip" and f.check in REQUIRED) for f in findings)


# ----------------------------------------------------------------------------------------------------------------------
# --against
# ----------------------------------------------------------------------------------------------------------------------


CHANGED = dict(A="added", D="deleted")  # status of git diff


def git(folder: Path, *words: str) -> str:
    """Output of a git command in a folder. Raises CheckError."""
    # Nothing that the repository's own configuration names is started.
    safe = ["-c", "core.fsmonitor=", "-c", "core.hooksPath=/dev/null", "-c", "diff.external="]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(["git", *safe, *words], cwd=folder, env=environment, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise CheckError(f"git: {clean_text(str(error), 120)}") from None
    out, said = (stream.decode("utf-8", "replace") for stream in (done.stdout, done.stderr))
    if done.returncode:
        raise CheckError(f"git {words[0]}: {clean_text(''.join(said.strip().splitlines()[-1:]), 120)}")
    return out


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
            notes.append(Note("FAIL", f"{name} is {CHANGED.get(status, 'changed')}, outside of {own}"))
        elif status != "A":
            notes.append(Note("FAIL", f"{name} was there before and is {CHANGED.get(status, 'changed')}"))
    ignored = git(root, "ls-files", "--others", "--ignored", "--exclude-standard", "-z", "--", own).split("\0")
    notes += [Note("FAIL", f"{name} is ignored by git and would be missing: git add -f") for name in ignored if name]
    added = sum(name.startswith(own) for name in changed)
    if not added:
        notes.append(Note("FAIL", f"{own} is not new against {ref}"))
    return foreign.summarised("against", notes or [Note("pass", f"adds {added} files, all in {own}")])


# ----------------------------------------------------------------------------------------------------------------------
# Command
# ----------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", metavar="FOLDER", nargs="+", type=Path, help="submission folder, anyone's")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.add_argument("--run", action="store_true", help="also import the script, in a subprocess with limits")
    parser.add_argument("--against", metavar="REF", help="also check that the change since REF is this folder alone")


@command
def run(args: argparse.Namespace) -> int:
    """1 where anything FAILed, or was not examined that the challenge requires."""
    found = []
    folders = [folder for folder in args.folders if not folder.is_file()] or args.folders
    for file in [path for path in args.folders if path not in folders]:  # of `check records/track_x/*`
        print(f"skipped: {clean_text(str(file))} is no folder", file=sys.stderr)
    for folder in folders:
        findings = check(folder)
        findings += check_run(folder) if args.run else []
        findings += check_against(folder, args.against) if args.against else []
        found.append((folder, findings))
    clean = all(is_clean(findings) for _, findings in found)
    if args.json:
        folders = []
        for folder, findings in found:
            failed = any(f.level == "FAIL" for f in findings)
            said = dict(folder=str(folder), failed=failed, clean=is_clean(findings))
            folders.append(said | {"findings": [f._asdict() for f in findings]})
        failed = any(folder["failed"] for folder in folders)
        print(json.dumps({"failed": failed, "clean": clean, "folders": folders}, indent=2))
        return int(not clean)
    for folder, findings in found:
        if len(found) > 1:
            show(f"{clean_text(str(folder))}:")
        for finding in findings:
            show(f"{finding.level} {finding.check} {finding.what}".rstrip())
    return int(not clean)


def show(line: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding))
