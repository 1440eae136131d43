"""`board`: every record folder and loose log as one leaderboard, in Markdown and as one offline HTML page.

Logs and JSON files are untrusted. Their text is cleaned (no control or direction characters, bounded length), reaches
Markdown only inside code spans and the page only as JSON that its script puts into text nodes; the page's policy allows
no script, style, image or request but its own. Only figures that a log shows are ranked, or else they are marked as
stated. The output holds nothing of the moment it was made, so it changes only with what it shows.
"""

import argparse
import base64
import hashlib
import itertools
import json
import os
import re
import statistics
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from records.submission import audits, runlog, runs
from records.submission.command import Unusable, command
from records.submission.foreign import load
from records.submission.rules import CAP_BYTES
from records.submission.runs import declared_label, of_one_text, validation_bytes

RECORDS = Path(__file__).resolve().parent.parent
TEMPLATE = Path(__file__).with_name("board.html")
BEGIN, END = "<!-- board:begin -->", "<!-- board:end -->"
LOOSE = "loose logs"

MAX_ENTRIES, MAX_LOGS = 1000, 16  # folders and loose logs; curves of a folder
MAX_POINTS, MAX_ALL_POINTS = 500, 200_000  # of one curve; of all curves of a page
MAX_SETTINGS, MAX_EVENTS, MAX_PHASES, MAX_NOTES = 400, 40, 32, 6
AGREES = 1e-4  # bpb between a JSON file and its logs: the rounding of four decimals

INTRODUCTION = """\
# Records

Runs of this project, best first. The table is written by `python records/submit.py board`; everything outside its
markers is kept. Scores of different tracks were made on different data or hardware and do not compare.

"""


@dataclass
class Entry:
    """One row: a record folder with its runs, or one loose log. None where nothing trustworthy says it."""

    name: str
    path: Path
    track: str
    author: str | None = None
    date: str | None = None
    bpb: float | None = None
    std: float | None = None
    seeds: int | None = None
    bytes: int | None = None
    train_s: float | None = None
    eval_s: float | None = None
    steps: int | None = None
    params: int | None = None
    device: str | None = None
    notes: list[str] = field(default_factory=list)
    phases: list[tuple[str, float]] = field(default_factory=list)
    settings: list[tuple[str, str]] | None = None
    curves: list[dict[str, Any]] = field(default_factory=list)
    rank: int | None = None
    text_bytes: float | None = None  # that the score is over


# ----------------------------------------------------------------------------------------------------------------------
# Untrusted text and numbers
# ----------------------------------------------------------------------------------------------------------------------

ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)?")  # of terminals


def clean(value: object, limit: int = 80) -> str:
    """One line of printable text, at most `limit` characters: no terminal codes, no characters that turn direction."""
    text = ESCAPES.sub("", str(value)[: 10 * limit])
    kept = (" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    text = " ".join("".join(kept).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def number(value: object, above: float = 0.0) -> float | None:
    """A finite number greater than `above`, or None: NaN, strings, booleans and absurd sizes are no figures."""
    value = runs.number(value)
    return value if value is not None and above < value < 1e15 else None


def whole(value: object) -> int | None:
    figure = number(value)
    return None if figure is None else int(figure)


def thin(points: Sequence, most: int) -> list:
    """At most `most` of the points, evenly spread, first and last included."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


# ----------------------------------------------------------------------------------------------------------------------
# What there is
# ----------------------------------------------------------------------------------------------------------------------


def is_plain(path: Path) -> bool:
    """A regular file that is no link: a foreign folder must not lead to files outside it."""
    return path.is_file() and not path.is_symlink()


def logs_in(folder: Path) -> list[Path]:
    suffixes = (".log", ".txt")
    files = (path for path in sorted(folder.iterdir()) if path.suffix.lower() in suffixes and is_plain(path))
    return [path for path in files if "requirements" not in path.name.lower()]


def is_record(folder: Path) -> bool:
    """A folder with a submission.json, or one that lacks it: in a track, or a script with its logs."""
    if any(is_plain(path) for path in folder.glob("submission*.json")):
        return True
    in_track = folder.resolve().parent.name.startswith("track_") and any(map(is_plain, folder.iterdir()))
    return in_track or (is_plain(folder / "train_gpt.py") and bool(logs_in(folder)))


def find(path: Path) -> Iterator[Path]:
    """Record folders and logs at or below a path: itself, a folder of logs, a track, or `records/`."""
    if path.is_file() or (path.is_dir() and is_record(path)):
        yield path
    elif path.is_dir():
        yield from logs_in(path)
        for inner in sorted(path.iterdir()):
            if inner.is_dir() and not inner.is_symlink():
                if inner.name.startswith("track_") or inner.name == "logs":
                    yield from find(inner)
                elif is_record(inner):
                    yield inner
    else:
        raise Unusable(f"{path} does not exist")


# ----------------------------------------------------------------------------------------------------------------------
# Entries
# ----------------------------------------------------------------------------------------------------------------------


def curve(log: runlog.RunLog) -> dict[str, Any]:
    """What the page draws of one run: training and validation points, and events at their steps."""
    train, val = [], []
    for step in log.steps:
        at = (step.step, None if step.time_ms is None else number(step.time_ms / 1000, above=-1))
        if number(step.train_loss) is not None:
            train.append((*at, step.train_loss))
        if number(step.val_loss) is not None or number(step.val_bpb) is not None:
            val.append((*at, number(step.val_loss), number(step.val_bpb)))
    events = [(clean(name, 30), step) for name, step in log.events[:MAX_EVENTS]]
    return dict(seed=log.seed, train=thin(train, MAX_POINTS), val=thin(val, MAX_POINTS), events=events)


def phases_of(log: runlog.RunLog) -> list[tuple[str, float]]:
    """Seconds by phase; where the log has no ledger, what it says of training and evaluation."""
    stated = log.phases or dict(train=log.train_seconds, evaluation=log.eval_seconds)
    known = [(clean(name, 30), number(seconds, above=-1)) for name, seconds in list(stated.items())[:MAX_PHASES]]
    return [(name, round(seconds, 3)) for name, seconds in known if seconds is not None]


def shown(value: object) -> str:
    """A setting's value as text."""
    try:
        return clean(value if isinstance(value, str) else json.dumps(value, default=str), 200)
    except RecursionError:
        return "(nested too deep)"


def notes_of(log: runlog.RunLog) -> Iterator[str]:
    """What a reader of the score has to know about the run."""
    if log.result is None and log.dialect == "pgolf":
        yield "unfinished: no result line"
    result = log.result or {}
    if result.get("mode", "train") != "train":
        yield f"{clean(result['mode'], 20)}: not trained in this run"
    if result.get("eval_cut"):
        yield "adaptation cut by the evaluation clock"
    resumed = [str(step) for event, step in log.events if event == "resume"]
    if resumed:
        yield f"taken up from a checkpoint at step {', '.join(resumed)}"
    failed = [clean(name, 30) for name, (passed, _) in log.audit.items() if not passed]
    if failed:
        yield "audit failed: " + ", ".join(failed)
    cap = whole(result.get("bytes_cap")) or CAP_BYTES
    if log.bytes_total is not None and log.bytes_total > cap:
        yield f"{log.bytes_total - cap:,} bytes over the cap"
    if log.headline() is None and log.scores and log.result is not None:
        yield "no score is the declared one"


def from_logs(entry: Entry, logs: Sequence[runlog.RunLog], label: str | None = None) -> Entry:
    """The entry with all that its logs show; their scores are those of a declared label, else their own headlines."""
    lines = [log.score(label) if label else log.headline() for log in logs]
    scores = [number(line.val_bpb) if line is not None else None for line in lines]
    if logs and None not in scores:
        known = {log.seed for log in logs if log.seed is not None}
        entry.bpb, entry.seeds = statistics.fmean(scores), len(known) or len(scores)
        entry.std = statistics.stdev(scores) if len(scores) > 1 else None
    entry.text_bytes = next((n for pair in zip(logs, lines, strict=True) if (n := validation_bytes(*pair))), None)
    entry.bytes = whole(max((log.bytes_total or 0 for log in logs), default=0))
    entry.train_s = mean(number(log.train_seconds) for log in logs)
    entry.eval_s = mean(number(log.eval_seconds) for log in logs)
    logged = [log.steps[-1].step if log.steps else None for log in logs]
    told = [number((log.result or {}).get("steps")) for log in logs]
    entry.steps = whole(mean(a or b for a, b in zip(told, logged, strict=True)))
    entry.params = next((params for log in logs if (params := whole(log.model_params))), None)
    entry.device = next((clean(log.device, 40) for log in logs if log.device), None)
    settings = next((log.settings for log in logs if log.settings is not None), None)
    if settings is not None:
        entry.settings = [(clean(name, 60), shown(value)) for name, value in sorted(settings.items())[:MAX_SETTINGS]]
    entry.curves = [curve(part) for log in logs for part in log.parts or [log]][:MAX_LOGS]
    for log in logs:
        prefix = f"seed {log.seed}: " if len(logs) > 1 else ""
        entry.notes += [prefix + note for note in notes_of(log)]
    if logs and all(log.audit and all(passed for passed, _ in log.audit.values()) for log in logs):
        entry.notes.append("audited")
    by_phase: dict[str, list[float]] = {}
    for log in logs:
        for name, seconds in phases_of(log):
            by_phase.setdefault(name, []).append(seconds)
    entry.phases = [(name, round(sum(spent) / len(logs), 3)) for name, spent in by_phase.items()]
    return entry


def read_folder(folder: Path) -> Entry:
    """A record folder. Its score is the mean over the runs that it declares; what only its JSON says is marked so."""
    s = load(folder)
    parent = s.folder.parent.name
    entry = Entry(clean(s.folder.name, 160), folder, clean(parent.removeprefix("track_"), 40))
    if not parent.startswith("track_"):
        entry.track = clean(s.track or "no track", 40)
    for name in ("author", "date"):
        if isinstance(s.meta.get(name), str):
            setattr(entry, name, clean(s.meta[name], 40) or None)
    logs, stated = list(s.runs.values()), number(s.stated("val_bpb"))
    own = None if s.ours else s.headline[0]  # of ours, each `result` line is compared with what it declares
    declared = declared_label(s.meta)
    from_logs(entry, logs if s.choice.decided else [], declared or own)
    notes = [note.what for note in s.json_problems[:1]]
    if s.json_name is None:
        notes.append("no submission.json")
    if not s.choice.decided:
        notes.append("several experiments, and nothing says which one counts")
    elif declared and logs and entry.bpb is None:
        notes.append(f"not every log has the declared score {declared}")
    if entry.bpb is None and stated is not None:
        entry.bpb, entry.std = stated, number(s.meta.get("val_bpb_std"))
        notes.append("score as stated: " + ("its logs do not decide it" if s.logs else "it has no log"))
    elif entry.bpb is not None and stated is not None and abs(stated - entry.bpb) > AGREES:
        notes.append(f"the JSON file says {stated:.4f}")
    notes += [note.what for note in s.problems if "read" in note.what]
    if s.choice.others and s.choice.decided:
        notes.append(f"{len(s.choice.others)} logs of other experiments do not count")
    if len(logs) > MAX_LOGS:
        notes.append(f"{len(logs)} logs, the first {MAX_LOGS} are drawn")
    entry.notes = [clean(note, 120) for note in notes] + entry.notes
    if entry.bytes is None:
        entry.bytes = whole(s.meta.get("bytes_total"))
    if not logs:
        entry.train_s, entry.eval_s = (number(s.meta.get(f"{k}_time_s_max")) for k in ("train", "eval"))
    if entry.device is None and isinstance(s.meta.get("hardware"), str):
        entry.device = clean(s.meta["hardware"], 40) or None
    return entry


def read_log(path: Path) -> Entry:
    """A loose log, with the audit.json beside its run's artifact."""
    log = runlog.parse(path)
    beside = audits.beside(path)
    if beside is not None:
        audits.attach(audits.parse(beside.read_bytes(), str(beside)), log)
    return from_logs(Entry(clean(path.stem, 160), path, LOOSE), log.each())


def collect(paths: Sequence[Path]) -> list[Entry]:
    """All entries by track (loose logs last) and score, ranked within their track. Raises Unusable, LogError."""
    found = sorted({path.resolve(): path for start in paths for path in find(start)}.items())
    if len(found) > MAX_ENTRIES:
        raise Unusable(f"{len(found)} folders and logs are more than {MAX_ENTRIES}; name fewer")
    entries = []
    for _, path in found:
        try:
            entries.append(read_folder(path) if path.is_dir() else read_log(path))
        except runlog.LogError as error:
            if path in paths:
                raise
            print(f"skipped: {clean(error, 300)}", file=sys.stderr)
    entries.sort(key=lambda e: (e.track == LOOSE, e.track, e.bpb is None, e.bpb or 0.0, e.name, str(e.path)))
    for _, track in itertools.groupby(entries, key=lambda entry: entry.track):
        rank_by_text(list(track))
    for entry in entries:
        entry.notes = entry.notes[:MAX_NOTES]
    return entries


def rank_by_text(track: Sequence[Entry]) -> None:
    """Ranks a track's entries, which are in order, but for scores over another text than most of them have."""
    known = [entry.text_bytes for entry in track if entry.text_bytes and entry.bpb is not None]
    usual = max(known, key=lambda size: sum(of_one_text((size, other)) for other in known), default=None)
    rank = 0
    for entry in track:
        if entry.text_bytes and usual and not of_one_text((entry.text_bytes, usual)):
            others = f"over {entry.text_bytes:,.0f} bytes of text, most of the track over {usual:,.0f}"
            entry.notes.insert(0, f"not ranked: scored {others}")
        elif entry.bpb is not None:
            rank += 1
            entry.rank = rank


# ----------------------------------------------------------------------------------------------------------------------
# Markdown
# ----------------------------------------------------------------------------------------------------------------------

# Inside a code span nothing is markup but its fence and a table's bars; angle brackets could imitate the marker.
SPAN = str.maketrans({"`": "'", "|": "¦", "<": "‹", ">": "›", "\\": "/"})


def span(text: object, limit: int = 60) -> str:
    """Text as a code span, which no content can leave."""
    return f"`{clean(text, limit).translate(SPAN) or '?'}`"


def linked(entry: Entry, base: Path) -> str:
    """The name, with a relative link where the entry lies beside or below the README."""
    target = Path(os.path.relpath(entry.path.resolve(), base.resolve())).as_posix()
    return span(entry.name) if target.startswith("../") else f"[{span(entry.name)}]({quote('./' + target)})"


def columns(base: Path) -> list[tuple[str, Callable[[Entry], str]]]:
    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        ("#", lambda e: str(e.rank or "–")),
        ("run", lambda e: linked(e, base)),
        ("val_bpb", lambda e: shown(e.bpb, ".4f") or "–"),
        ("± std", lambda e: shown(e.std, ".5f")),
        ("seeds", lambda e: shown(e.seeds, "d")),
        ("bytes", lambda e: shown(e.bytes, ",d")),
        ("train s", lambda e: shown(e.train_s, ",.1f")),
        ("eval s", lambda e: shown(e.eval_s, ",.1f")),
        ("device", lambda e: span(e.device, 30) if e.device else ""),
        ("by", lambda e: span(e.author, 30) if e.author else ""),
        ("date", lambda e: span(e.date, 20) if e.date else ""),
        ("notes", lambda e: "; ".join(span(note, 120) for note in e.notes)),
    ]


def markdown(entries: Sequence[Entry], base: Path) -> str:
    """A table per track; a column that says nothing there is left out. Links are relative to the folder `base`."""
    if not entries:
        return "No runs yet.\n"
    parts = []
    for track in dict.fromkeys(entry.track for entry in entries):
        rows = [entry for entry in entries if entry.track == track]
        cells = [(title, [show(entry) for entry in rows]) for title, show in columns(base)]
        cells = [(title, column) for title, column in cells if any(column)]
        text = {"run", "device", "by", "date", "notes"}
        table = [[title for title, _ in cells], ["---" if title in text else "---:" for title, _ in cells]]
        table += [list(row) for row in zip(*(column for _, column in cells), strict=True)]
        lines = ["| " + " | ".join(row) + " |" for row in table]
        heading = f"### Track {span(track)}"
        if track == LOOSE:
            heading = "### Loose logs\n\nSingle runs, no submissions; they compare only where data and settings agree."
        parts.append("\n".join([heading, "", *lines, ""]))
    return "\n".join(parts)


def update_readme(path: Path, table: str) -> None:
    """Put the table between the markers; a file that is not there is begun. Raises Unusable."""
    try:
        old = path.read_text("utf-8") if path.exists() else f"{INTRODUCTION}{BEGIN}\n{END}\n"
    except (OSError, ValueError) as error:
        raise Unusable(f"{path} cannot be read as text: {error}") from None
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise Unusable(f"{path} must have one line {BEGIN} and, after it, one line {END}: the table goes between")
    write(path, f"{before}{BEGIN}\n\n{table}\n{END}{after}")


# ----------------------------------------------------------------------------------------------------------------------
# The page
# ----------------------------------------------------------------------------------------------------------------------


def as_data(entries: Sequence[Entry]) -> str:
    """JSON for a script element: without '<', '>' and '&' nothing in it can end the element or begin a comment."""
    curves = sum(len(entry.curves) for entry in entries)
    most = max(20, min(MAX_POINTS, MAX_ALL_POINTS // max(1, curves)))
    rows = []
    for entry in entries:
        row = asdict(entry)
        del row["path"]
        for line in row["curves"]:
            line["train"], line["val"] = thin(line["train"], most), thin(line["val"], most)
        rows.append(row)
    text = json.dumps(dict(entries=rows), allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def page(entries: Sequence[Entry]) -> str:
    """The whole HTML page. Its policy names its own style and script by their hashes and allows nothing else."""
    template = TEMPLATE.read_text("utf-8")

    def hashed(tag: str) -> str:
        inner = template.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return f"'sha256-{base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()}'"

    policy = f"default-src 'none'; script-src {hashed('script')}; style-src {hashed('style')}; "
    policy += "base-uri 'none'; form-action 'none'"
    return template.replace("{{policy}}", policy).replace("{{data}}", as_data(entries))


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8", newline="\n")
    except OSError as error:
        raise Unusable(f"cannot write {path}: {error.strerror}") from None
    print(f"wrote {path}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="record folders, logs, or folders of them")
    parser.add_argument("--html", type=Path, metavar="OUT.html", help="also write one page that needs no network")
    parser.add_argument(
        "--readme", type=Path, help="file with the board's markers (default without PATH: this board's)"
    )


@command
def run(args: argparse.Namespace) -> int:
    """Exit code: 0, or 2 where a path or a file cannot be used."""
    entries = collect(args.paths or [RECORDS])
    readme = args.readme or (None if args.paths else RECORDS / "README.md")
    if readme is None:  # of some folders: this repository's table keeps the others
        print(markdown(entries, Path.cwd()))
    else:
        update_readme(readme, markdown(entries, readme.parent))
    if args.html is not None:
        write(args.html, page(entries))
    return 0
