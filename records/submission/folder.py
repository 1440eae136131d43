"""`new NAME LOG...`: a submission folder from the logs of one configuration, one log per seed.

Everything in it comes from the logs: the script is the source that they hold, the figures are theirs, and a boolean of
`compliance` is computed or null. What cannot be decided is asked for, never guessed. The folder appears whole or not
at all, and names no path of the machine.
"""

import argparse
import ast
import dataclasses
import hashlib
import html
import json
import os
import re
import shlex
import shutil
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from records.submission import audits, pack, runlog, unpack
from records.submission.command import Unusable, command
from records.submission.rules import AUDITS, CAP_BYTES, CLOCK_SECONDS, SEEDS, has_clocks, may_differ, verdict, within
from records.submission.runlog import RunLog, ScoreLine

# ----------------------------------------------------------------------------------------------------------------------
# What a log says
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SeedRun:
    """The log of one seed, with all that a submission needs of it."""

    log: RunLog
    data: bytes  # of the log's file
    seed: int
    score: ScoreLine
    bytes_total: int
    audit: bytes | None = None  # of its audit.json

    @property
    def result(self) -> dict[str, Any]:
        return self.log.result or {}

    @property
    def name(self) -> str:
        return self.log.path.name

    def told(self, name: str, kind: type) -> Any:
        """An entry of the `result` line, if it is of this kind."""
        value = self.result.get(name)
        return value if isinstance(value, kind) else None

    @property
    def ranks(self) -> int:
        return self.log.world_size or self.result.get("world_size") or 1

    @property
    def compared(self) -> dict[str, object]:
        """The settings that have to be the same for all seeds."""
        ours = self.log.dialect == "pgolf"
        return {name: value for name, value in (self.log.settings or {}).items() if not may_differ(name, value, ours)}

    @property
    def hardware(self) -> str | None:
        device, ranks = self.log.device, self.ranks
        if device is None or ranks == 1:
            return device
        return f"{device}, {ranks} processes" if device.startswith("cpu") else f"{ranks}x {device}"


def read_run(path: Path, headline: str | None) -> SeedRun:
    """Parse a log and make sure that it holds what a submission needs. Raises LogError and Unusable."""
    log = runlog.parse(path)
    data = path.read_bytes()
    score = log.score(headline.removesuffix("_exact")) if headline else log.headline()
    mode = (log.result or {}).get("mode", "train")
    for missing, message in (
        (hashlib.sha256(data).hexdigest() != log.sha256, "it is being written; wait for the end of the run"),
        (log.dialect == "pgolf" and log.result is None, "no `result` line: the run did not come to its end"),
        (mode != "train", f"a run with mode {mode}; a submission needs the log of the training run"),
        (len(log.runs) > 1, f"{len(log.runs)} runs in one log; a submission needs one log per seed"),
        (log.seed is None, "it does not say its seed"),
        (score is None and headline, f"no single result is called {headline}"),
        (score is None, f"which score counts is not clear ({said(log, 'headline')}); --headline LABEL names it"),
        (score is not None and score.val_bpb is None, "its score has no val_bpb"),
        (score is not None and not score.is_finite, "its score is not finite"),
        (log.bytes_total is None, f"its size is not clear ({said(log, 'total size', 'bytes')})"),
    ):
        if missing:
            raise Unusable(f"{path}: {message}")
    return SeedRun(log, data, log.seed, score, log.bytes_total)


def with_audits(runs: Sequence[SeedRun], named: Sequence[Path]) -> list[SeedRun]:
    """The runs with their audit.json: the one beside the artifact, or that of the named ones that is theirs. Raises
    Unusable where one is of another script or artifact."""
    found, unused = [], {path: path.read_bytes() for path in named}
    for run in runs:
        path = audits.beside(run.log.path)
        candidates = dict(unused) if named else {path: path.read_bytes()} if path else {}
        data = None
        for path, candidate in candidates.items():
            if audits.attach(audits.parse(candidate, str(path)), run.log):
                data = candidate
                unused.pop(path, None)
            elif not named:
                raise Unusable(f"{path} is of another script or artifact than {run.name}; audit it again")
        found.append(dataclasses.replace(run, audit=data))
    if unused:
        raise Unusable(f"{next(iter(unused))} is of no log's script and artifact")
    return found


def said(log: RunLog, *subjects: str) -> str:
    """What the parser noted about a subject, or that the log is silent."""
    return next((line for line in log.undecided if any(s in line for s in subjects)), "nothing in the log says it")


def check_one_configuration(runs: Sequence[SeedRun]) -> None:
    """Raises Unusable where two logs, in order of seeds, are not of one configuration."""
    first = runs[0]
    for other in runs[1:]:
        if (first.log.settings is None) != (other.log.settings is None):
            raise Unusable(f"{first.name} and {other.name}: only one of them states its settings")
        mine, others = first.compared, other.compared
        for name in mine | others:
            a, b = mine.get(name, "unset"), others.get(name, "unset")
            if a != b:
                raise Unusable(
                    f"two configurations: {name.upper()}={plain(a)} in {first.name}, {plain(b)} in {other.name}"
                )
        for what, value in (
            ("code sha256", lambda run: run.log.code_sha256),
            ("source", lambda run: run.log.source and hashlib.sha256(run.log.source.encode()).hexdigest()),
            ("settings hash", lambda run: run.log.settings_hash),
            ("score that counts", lambda run: run.score.label),
            ("number of parameters", lambda run: run.log.model_params),
            ("number of processes", lambda run: run.log.world_size),
            ("bytes of code", lambda run: run.log.bytes_code),
            ("validation data", lambda run: run.result.get("val_fingerprint")),
            ("training data", lambda run: run.result.get("train_fingerprint")),
            ("tokenizer", lambda run: run.result.get("tokenizer_sha256")),
        ):
            a, b = value(first), value(other)
            if a != b:
                raise Unusable(f"two configurations: {what} {a} in {first.name}, {b} in {other.name}")
    for run, other in zip(runs, runs[1:], strict=False):
        if run.seed == other.seed:
            raise Unusable(f"two logs of seed {run.seed}: {run.name} and {other.name}; keep one")


# ----------------------------------------------------------------------------------------------------------------------
# The script that ran
# ----------------------------------------------------------------------------------------------------------------------


class Script(NamedTuple):
    """What ran. `evidence` says what ties it to the logs; `text` is readable, of a packed script what is inside."""

    data: bytes
    evidence: str
    packed: bool
    text: str
    human: bytes | None


def find_script(runs: Sequence[SeedRun], given: Path | None, human: Path | None) -> Script:
    """The script that the logs prove to have run. Raises Unusable."""
    log, name = runs[0].log, runs[0].name
    size = log.bytes_code
    if given is not None:
        candidates = [given.read_bytes()]
    elif log.source is None:
        raise Unusable(f"{name} holds no source; give the file that ran with --script")
    elif log.code_sha256:
        candidates = [log.source.encode()]
    else:  # a log of another dialect does not keep the end of the last line
        candidates = [(log.source.rstrip("\n") + end).encode() for end in ("\n", "")]
    for data in candidates:
        digest = hashlib.sha256(data).hexdigest()
        in_log = log.source is not None and data.rstrip() == log.source.encode().rstrip()
        if log.code_sha256 is not None:
            if digest == log.code_sha256:
                return finish_script(data, "the sha256 of the script is in every log", human)
        elif in_log and size in (None, len(data)):
            return finish_script(data, "every log holds its source", human)
        elif log.source is None and size == len(data):
            return finish_script(data, "every log states its size in bytes, and nothing more", human)
    if given is not None:
        stated = f"sha256 {log.code_sha256}" if log.code_sha256 else f"{size} bytes of code"
        raise Unusable(f"{given} did not run: it has sha256 {digest}, {len(data)} bytes; {name} states {stated}")
    stated = f"sha256 {log.code_sha256}" if log.code_sha256 else f"size, {size} bytes"
    raise Unusable(f"the source in {name} is not of the {stated} that it states; give the file with --script")


def finish_script(data: bytes, evidence: str, human: Path | None) -> Script:
    """Look inside a packed script, and make sure that the readable source is its source."""
    inner = pack.unpack(data)
    outer = data.decode("utf-8", "replace")
    layers = [outer, inner.decode()] if inner is not None else unpack.unwrap(outer).layers
    packed = len(layers) > 1
    if human is None:
        return Script(data, evidence, packed, layers[-1], None)
    readable = human.read_bytes()
    if not packed:
        raise Unusable(f"the script that ran is readable itself; leave out --human {human}")
    if inner is not None:
        same = pack.strip(readable, str(human)) == layers[-1]
    else:
        same = unpack.same_program(readable.decode("utf-8", "replace"), layers[-1])
    if not same:
        raise Unusable(f"{human} is not the source of the packed script that ran")
    return Script(data, evidence, packed, readable.decode("utf-8", "replace"), readable)


class Setting(NamedTuple):
    variable: str  # of the environment
    default: object
    doc: str


def declared_settings(text: str) -> dict[str, Setting]:
    """The settings that a script declares, by field name, read as data: `name: type = opt(section, default, doc)`, or
    `name = int(os.environ.get("NAME", default))` as the public scripts have it. Empty where it has neither."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return {}
    found = {}
    for owner in ast.walk(tree):
        if not isinstance(owner, ast.ClassDef) or owner.name != "Hyperparameters":
            continue
        for statement in owner.body:
            if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
                continue
            target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
            for call in ast.walk(statement.value):
                if not isinstance(call, ast.Call) or not isinstance(target, ast.Name):
                    continue
                constants = [constant(argument) for argument in call.args]
                if pack.last_name(call) == "opt" and len(constants) >= 3:
                    found[target.id] = Setting(target.id.upper(), constants[1], str(constants[2]))
                elif ast.unparse(call.func) in ("os.environ.get", "os.getenv") and len(constants) == 2:
                    found[target.id] = Setting(str(constants[0]), constants[1], "")
    return found


def constant(node: ast.expr) -> object:
    """The value of a literal; None for any other expression."""
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError):
        return None


def equal(value: object, default: object) -> bool:
    """Whether a setting has its default, which another script may give as text: "1" is True, "0.0400" is 0.04."""
    if value == default:
        return True
    try:
        return float(value) == float(default)
    except (TypeError, ValueError):
        return str(value).lower() == str(default).lower()


def changed_settings(run: SeedRun, declared: Mapping[str, Setting]) -> dict[str, object] | None:
    """What all seeds set otherwise than the script's defaults, by variable; None where that cannot be told."""
    if run.log.settings is None or not declared:
        return None
    pairs = [(declared[name], value) for name, value in run.compared.items() if name in declared]
    return {setting.variable: value for setting, value in pairs if not equal(value, setting.default)}


# ----------------------------------------------------------------------------------------------------------------------
# submission.json
# ----------------------------------------------------------------------------------------------------------------------


def known(values: Iterable[Any], reduce: Callable, digits: int | None = None) -> Any:
    """A reduction of values; None where one of them is."""
    values = list(values)
    if None in values:
        return None
    value = reduce(values)
    return value if digits is None or value is None else round(value, digits)


def deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation (n - 1); None for one value."""
    return statistics.stdev(values) if len(values) > 1 else None


def distinct(values: Iterable[str | None]) -> str | None:
    return "; ".join(dict.fromkeys(value for value in values if value)) or None


def number_of_pull_request(base: str | None) -> int | None:
    """1855 from `1855`, `#1855` or the pull request's address."""
    found = re.fullmatch(r"(?:PR ?)?#?(\d{1,6})|https?://\S+/pull/(\d{1,6})/?", base or "", re.IGNORECASE)
    return int(found[1] or found[2]) if found else None


def compliance(runs: Sequence[SeedRun], script: Script) -> dict[str, bool | None]:
    """Every rule as far as the logs and the files decide it."""
    sizes = [run.bytes_total for run in runs]
    added_up = [
        None if run.log.bytes_model is None else run.log.bytes_model + len(script.data) == run.bytes_total
        for run in runs
    ]
    return dict(
        artifact_under_16mb=verdict([within(sizes, CAP_BYTES), verdict(added_up)]),
        train_under_600s=within((run.log.train_seconds for run in runs), CLOCK_SECONDS),
        eval_under_600s=within((run.log.eval_seconds for run in runs), CLOCK_SECONDS),
        three_seeds=len(runs) >= SEEDS,
        one_configuration=None if any(run.log.settings is None for run in runs) else True,  # else it was refused
        audit_passed=verdict(verdict(passed for passed, _ in run.log.audit.values()) for run in runs),
        **audits.shown([run.log for run in runs]),
    )


def seed_result(run: SeedRun) -> dict[str, Any]:
    log, steps = run.log, run.told("steps", int)
    exported = log.told_scores.get(f"float_{run.result.get('exported')}", {})  # the weights before quantization
    return dict(
        val_loss=None if run.score.val_loss is None else round(run.score.val_loss, 8),
        val_bpb=round(run.score.val_bpb, 8),
        steps=log.steps[-1].step if steps is None and log.steps else steps,
        train_time_s=log.train_seconds,
        eval_time_s=log.eval_seconds,
        artifact_bytes=run.bytes_total,
        bytes_total=run.bytes_total,
        bytes_model=log.bytes_model,
        pre_quant_val_bpb=runlog.number(exported.get("val_bpb")),
        artifact_sha256=run.result.get("artifact_sha256"),
        scores={score.label: score.val_bpb for score in log.candidates() if score.val_bpb is not None},
        eval_cut=run.told("eval_cut", dict),
        resumed_at=[step for step in run.told("resumed_at", list) or () if isinstance(step, int)],
        log=log_name(run),
        log_sha256=log.sha256,
    )


def log_name(run: SeedRun) -> str:
    return f"train_seed{run.seed}.log"


def describe(runs: Sequence[SeedRun], script: Script, args: argparse.Namespace) -> dict[str, Any]:
    """submission.json. Names are those of the public files, which viewers read; `artifact` there is code and model."""
    results = {str(run.seed): seed_result(run) for run in runs}
    losses, scores = ([r[key] for r in results.values()] for key in ("val_loss", "val_bpb"))
    totals = [run.bytes_total for run in runs]
    largest = max(runs, key=lambda run: run.bytes_total)
    base_pr = number_of_pull_request(args.base)
    base = f"PR #{base_pr}" if base_pr else args.base
    settings = changed_settings(runs[0], declared_settings(script.text))
    counted = runs[0].log.told_scores.get(runs[0].score.label, {})
    return dict(
        author=args.author,
        github_id=args.github_id,
        name=args.name,
        blurb=args.blurb,
        date=args.date or date.fromtimestamp(max(run.log.path.stat().st_mtime for run in runs)).isoformat(),
        track=args.track,
        headline=runs[0].score.label,
        val_loss=known(losses, statistics.fmean, 8),
        val_bpb=known(scores, statistics.fmean, 8),
        val_loss_std=known(losses, deviation, 8),
        val_bpb_std=known(scores, deviation, 8),
        seeds=[run.seed for run in runs],
        seed_results=results,
        bytes_total=max(totals),
        bytes_code=len(script.data),
        bytes_model=largest.log.bytes_model,
        artifact_bytes_mean=round(statistics.fmean(totals), 1),
        artifact_bytes_max=max(totals),
        hardware=args.hardware or distinct(run.hardware for run in runs),
        pytorch_version=distinct(run.log.torch for run in runs),
        cuda_version=distinct(run.log.cuda for run in runs),
        train_time_s_max=known((r["train_time_s"] for r in results.values()), max),
        eval_time_s_max=known((r["eval_time_s"] for r in results.values()), max),
        settings=settings,
        settings_hash=runs[0].log.settings_hash,
        code_sha256=hashlib.sha256(script.data).hexdigest(),
        code_packed=script.packed,
        code_evidence=script.evidence,
        train_fingerprint=runs[0].result.get("train_fingerprint"),
        val_fingerprint=runs[0].result.get("val_fingerprint"),
        tokenizer_sha256=runs[0].result.get("tokenizer_sha256"),
        val_tokens=counted.get("tokens"),
        val_bytes=counted.get("bytes"),
        compliance=compliance(runs, script),
        attribution={"base": base} if base else {},
        base_pr=base_pr,
    )


# ----------------------------------------------------------------------------------------------------------------------
# README.md
# ----------------------------------------------------------------------------------------------------------------------


def plain(value: object) -> str:
    """A setting's value as the environment takes it."""
    return str(int(value)) if isinstance(value, bool) else str(value)


def cell(value: object) -> str:
    """Text of a log in a Markdown table or sentence: nothing in it is markup, a row or a column."""
    text = html.escape(" ".join(str("" if value is None else value).split()), quote=False)
    return re.sub(r"([\\|`*_\[\]~#!])", r"\\\1", text)


def code(value: object) -> str:
    """Text of a log as Markdown code, also inside a table."""
    return f"`{' '.join(str(value).split()).replace('`', chr(39)).replace('|', '¦')}`"


def figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def yes_no(answer: bool | None) -> str:
    return {True: "yes", False: "**no**", None: "not shown"}[answer]


def score_line(s: Mapping[str, Any]) -> str:
    spread = "" if s["val_bpb_std"] is None else f" ± {s['val_bpb_std']:.5f}"
    loss = "" if s["val_loss"] is None else f", {s['val_loss']:.5f} nats per token"
    many = len(s["seeds"]) > 1
    seeds = f"{len(s['seeds'])} seed{'s' * many}"
    size = f"{s['bytes_total']:,} bytes{' at most' * many}"
    return f"**val_bpb {s['val_bpb']:.5f}{spread}** ({seeds}, {code(s['headline'])}{loss}), {size}"


def results_table(s: Mapping[str, Any]) -> str:
    """A row per seed with every score that all of them have, then mean and deviation."""
    results = s["seed_results"].values()
    labels = [label for label in next(iter(results))["scores"] if all(label in r["scores"] for r in results)]
    columns = [
        ("steps", 0, [r["steps"] for r in results]),
        ("float weights", 5, [r["pre_quant_val_bpb"] for r in results]),
        *((code(label), 5, [r["scores"][label] for r in results]) for label in labels),
        ("bytes", 0, [r["bytes_total"] for r in results]),
        ("training, s", 1, [r["train_time_s"] for r in results]),
        ("evaluation, s", 1, [r["eval_time_s"] for r in results]),
    ]
    columns = [column for column in columns if any(value is not None for value in column[2])]
    rows = [
        [str(seed), *(figure(values[i], digits) for _, digits, values in columns)] for i, seed in enumerate(s["seeds"])
    ]
    if len(rows) > 1:
        for name, reduce in (("mean", statistics.fmean), ("std", deviation)):
            row = [figure(known(values, reduce), max(digits, 1)) for _, digits, values in columns]
            rows.append([name, *row])
    return table(["seed", *(name for name, *_ in columns)], rows)


def notes(s: Mapping[str, Any]) -> Iterator[str]:
    """What a reader of the table has to know."""
    for seed, result in s["seed_results"].items():
        if result["eval_cut"]:
            cut = ", ".join(f"{cell(k)} {cell(v)}" for k, v in result["eval_cut"].items())
            yield f"Seed {seed}: the evaluation clock cut the last pass ({cut}), so this score does not repeat."
        if result["resumed_at"]:
            steps = ", ".join(cell(step) for step in result["resumed_at"])
            yield f"Seed {seed}: taken up from a checkpoint at step {steps}."


def techniques(s: Mapping[str, Any], script: Script) -> str:
    declared = {setting.variable: setting for setting in declared_settings(script.text).values()}
    if s["settings"] is None:
        return "The logs do not state the settings of the runs, or the script does not declare its defaults."
    if not s["settings"]:
        return "Nothing: the script's defaults ran."
    rows = []
    for name, value in s["settings"].items():
        was = declared[name]
        default = code(plain(was.default)) if was.default != "" else ""
        rows.append([code(name), code(plain(value)), default, cell(was.doc)])
    return table(["setting", "here", "default", "what it is"], rows)


def run_command(s: Mapping[str, Any], runs: Sequence[SeedRun]) -> str:
    """What makes these runs again, but for the machine."""
    ranks = runs[0].ranks
    settings = {name: plain(value) for name, value in (s["settings"] or {}).items()}
    if all((run.log.settings or {}).get("audit") is True for run in runs):
        settings["AUDIT"] = "1"
    words = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
    lines = [" ".join(words[i : i + 4]) for i in range(0, len(words), 4)]
    start = f"torchrun --standalone --nproc_per_node={ranks}" if ranks > 1 else "python"
    lines.append(f"SEED=$seed DATA_PATH=$DATA_PATH {start} train_gpt.py")
    seeds = " ".join(str(run.seed) for run in runs)
    body = " \\\n    ".join(lines)
    return f"```\nfor seed in {seeds}; do\n  {body}\ndone\n```"


def rules(s: Mapping[str, Any], runs: Sequence[SeedRun]) -> str:
    c, timed = s["compliance"], has_clocks(s["track"])
    worst = max(runs, key=lambda run: run.bytes_total)
    sizes = f"code {s['bytes_code']:,} + model {figure(worst.log.bytes_model, 0) or 'unknown'} = {worst.bytes_total:,}"
    sizes += f" bytes (seed {worst.seed}), {CAP_BYTES - worst.bytes_total:,} below the cap"
    hashes = f"settings hash {s['settings_hash']}" if s["settings_hash"] else "the logs state no settings hash"
    rows = [
        [f"Code and compressed model: at most {CAP_BYTES:,} bytes", yes_no(c["artifact_under_16mb"]), sizes],
        *(
            [
                f"{what}: at most {CLOCK_SECONDS} s",
                yes_no(c[f"{key}_under_600s"]) if timed else "no rule of this track",
                f"longest {figure(longest, 1)} s" if (longest := s[f"{key}_time_s_max"]) is not None else "",
            ]
            for what, key in (("Training", "train"), ("Evaluation", "eval"))
        ),
        ["At least three seeds", yes_no(c["three_seeds"]), ", ".join(map(str, s["seeds"]))],
        ["One configuration", yes_no(c["one_configuration"]), f"{hashes}; {cell(s['code_evidence'])}"],
    ]
    for name, (key, rule) in AUDITS.items():
        audits = [(run.seed, *run.log.audit[name]) for run in runs if name in run.log.audit]
        figures = [f"{seed}: {'' if passed else 'FAIL '}{cell(figure)}" for seed, passed, figure in audits]
        rows.append([rule, yes_no(c[key]), "<br>".join(figures)])
    text = table(["rule", "kept", "evidence"], rows)
    if c["audit_passed"] is None:
        text += "\n\nNot shown: no audit of it. `python records/audit.py ARTIFACT` makes one."
    return text


def data_section(s: Mapping[str, Any], runs: Sequence[SeedRun]) -> str:
    names = {Path(str(run.log.settings["data_path"])).name for run in runs if (run.log.settings or {}).get("data_path")}
    rows = [
        ("data set", ", ".join(code(name) for name in sorted(names))),
        ("training tokens seen", figure(runs[0].result.get("train_tokens"), 0)),
        ("training text seen, bytes", figure(runs[0].result.get("train_bytes"), 0)),
        ("passes over the training text", figure(runs[0].result.get("train_passes"), 3)),
        ("transform of the text", code(runs[0].result.get("transform") or "")),
        ("validation tokens scored", figure(s["val_tokens"], 0)),
        ("validation bytes", figure(s["val_bytes"], 0)),
        ("training shards, fingerprint", code(s["train_fingerprint"] or "")),
        ("validation shards, fingerprint", code(s["val_fingerprint"] or "")),
        ("tokenizer, sha256", code(s["tokenizer_sha256"] or "")),
    ]
    rows = [row for row in rows if row[1] not in ("", "``")]
    return table(["", ""], rows) if rows else "The logs do not say."


def readme(s: Mapping[str, Any], runs: Sequence[SeedRun], script: Script, files: Mapping[str, bytes]) -> str:
    """README.md; `files` are the others of the folder."""
    kinds = {
        "train_gpt.py": f"what ran{', packed' if script.packed else ''}",
        "train_gpt_human.py": "its readable source",
        "submission.json": "all of this, for programs",
    }
    file_rows = [
        [
            code(name),
            f"{len(data):,}",
            code(hashlib.sha256(data).hexdigest()),
            kinds.get(name, "audit, as written" if name.startswith("audit_") else "log, as written"),
        ]
        for name, data in files.items()
    ]
    machine = [s["hardware"] or "not named in the logs", f"torch {s['pytorch_version'] or 'unknown'}"]
    machine += [f"CUDA {s['cuda_version']}"] if s["cuda_version"] else []
    credit = s["attribution"].get("base")
    parts = [
        f"# {cell(s['name'])}",
        score_line(s),
        s["blurb"],
        f"Built on {cell(credit)}." if credit else "",
        "## Results",
        results_table(s),
        *notes(s),
        "## What differs from the script's defaults",
        techniques(s, script),
        "## Run",
        run_command(s, runs),
        "## Rules",
        rules(s, runs),
        "## Files",
        table(["file", "bytes", "sha256", "what it is"], file_rows),
        "## Hardware",
        f"{cell(', '.join(machine))}.",
        "## Data",
        data_section(s, runs),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# ----------------------------------------------------------------------------------------------------------------------
# Command
# ----------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="short name: letters, digits, '_', '.', '+', '-'")
    parser.add_argument("logs", metavar="LOG", nargs="+", type=Path, help="log of a run, one per seed")
    parser.add_argument("--track", default="10min_16mb", help="default: %(default)s")
    parser.add_argument("--author", default="", help="your name")
    parser.add_argument("--github-id", default="", help="your account")
    parser.add_argument("--blurb", default="", help="the idea in one or two sentences")
    parser.add_argument("--hardware", help="default: the device that the logs name")
    parser.add_argument("--base", help="what it is built on: a pull request's number, or a record's name")
    parser.add_argument("--date", help="YYYY-MM-DD; default: that of the newest log's file")
    parser.add_argument("--script", type=Path, help="the file that ran; default: the source in the logs")
    parser.add_argument("--human", type=Path, help="the readable source of a packed script")
    parser.add_argument("--audits", type=Path, nargs="+", help="audit.json of each run; default: beside its artifact")
    parser.add_argument("--headline", metavar="LABEL", help="the score that counts, where a log does not declare it")
    parser.add_argument("--out", type=Path, default=Path("records"), help="folder of the tracks; default: %(default)s")


@command
def run(args: argparse.Namespace) -> int:
    folder, submission, why = build(args)
    print(f"{folder}: {score_line(submission).replace('*', '').replace('`', '')}")
    if why:
        print(f"note: {submission['headline']} counts: {why}; --headline LABEL names another")
    for key, answer in submission["compliance"].items():
        if answer is False:
            print(f"note: {key} is false")
    unknown = [key for key, answer in submission["compliance"].items() if answer is None]
    if unknown:
        print(f"note: the logs do not show {', '.join(unknown)}")
    if submission["code_packed"] and args.human is None:
        print("note: the script that ran is packed; --human FILE puts its readable source beside it")
    empty = [f"--{key.replace('_', '-')}" for key in ("author", "github_id", "blurb") if not submission[key]]
    if empty:
        print(f"note: left empty, and `check` asks for them: {', '.join(empty)}")
    return 0


def build(args: argparse.Namespace) -> tuple[Path, dict[str, Any], str]:
    """Make the folder; returns it, its submission.json and why its score counts where no log declares it.

    Raises Unusable, LogError and OSError.
    """
    for what, value in (("NAME", args.name), ("--track", args.track)):
        if not re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,127}", value, re.ASCII):
            raise Unusable(f"{what} {value!r} must be letters, digits, '_', '.', '+' and '-'")
    if args.date and not is_date(args.date):
        raise Unusable(f"--date {args.date} must be a day: YYYY-MM-DD")
    runs = sorted((read_run(path, args.headline) for path in args.logs), key=lambda run: run.seed)
    runs = with_audits(runs, args.audits or ())
    check_one_configuration(runs)
    script = find_script(runs, args.script, args.human)
    submission = describe(runs, script, args)
    files = {"submission.json": (json.dumps(submission, indent=2, ensure_ascii=False) + "\n").encode()}
    files["train_gpt.py"] = script.data
    if script.human is not None:
        files["train_gpt_human.py"] = script.human
    files |= {log_name(run): run.data for run in runs}
    files |= {f"audit_seed{run.seed}.json": run.audit for run in runs if run.audit is not None}
    files["README.md"] = readme(submission, runs, script, files).encode()
    folder = args.out / f"track_{args.track}" / f"{submission['date']}_{args.name}"
    write_folder(folder, files)
    declared = args.headline or runs[0].log.dialect == "pgolf" or len(runs[0].log.candidates()) == 1
    return folder, submission, "" if declared else runs[0].log.headline_and_why()[1]


def is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """All files in a new folder, or none. Raises Unusable where the folder is there already."""
    if folder.exists() or folder.is_symlink():
        raise Unusable(f"{folder} exists; choose another NAME, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        for name, data in files.items():
            (partial / name).write_bytes(data)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
