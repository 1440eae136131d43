"""What is to be run: a base and its arms as their scripts understand them, and one job for each seed of each."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from records.experiments import ledger
from records.experiments.ledger import ExperimentError

ROOT = Path(__file__).resolve().parent.parent.parent
SEEDS = (1337, 42, 2025, 7, 8, 9, 10, 11, 12, 13)
TRAINED_FOR = {"QAT_ENABLED", "LATE_QAT", "LATE_QAT_THRESHOLD", "CROWN_Q"}  # quantization that acts on training
DATA = {"DATA_PATH", "TOKENIZER_PATH", "SHUFFLE_SEQUENCES"}
OPTIMIZER = re.compile(r"_LR|LR_|_WD$|MOMENTUM|BETA|_EPS$|CLIP_NORM|BACKEND_STEPS")


class Arm(NamedTuple):
    name: str
    changes: dict[str, str]


class Variant(NamedTuple):
    """The base or an arm as its script understands it."""

    arm: Arm
    axis: str
    script: Path
    environ: dict[str, str]
    settings: dict  # that differ from the script's defaults
    data: list[str]  # fingerprints

    @property
    def trains(self) -> bool:
        return trains(self.arm.changes, self.axis)


class Job(NamedTuple):
    """One run: what of its row is known before, the environment, and the base's key whose weights it starts from."""

    row: dict
    environ: dict[str, str]
    script: Path
    weights: str = ""

    @property
    def key(self) -> str:
        return ledger.key(self.row)

    @property
    def run_id(self) -> str:
        name = re.sub(r"[^A-Za-z0-9.]+", "-", self.row["name"]).strip("-")
        return f"{self.row['recipe']}-{name}-{self.row['seed']}-{self.key[:8]}"


class Plan(NamedTuple):
    jobs: list[Job]  # in the order in which they are made: seed by seed, the base first
    names: tuple[str, ...]  # settings of the script, which the shell's environment must not decide


def read_recipe(path: Path) -> dict[str, str]:
    """The settings of an .env file. Raises ExperimentError."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise ExperimentError(f"cannot read {path}: {error.strerror}") from None
    return read_settings([line for line in lines if line.strip() and not line.startswith("#")], str(path))


def read_settings(words: Sequence[str], where: str) -> dict[str, str]:
    for word in words:
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", word):
            raise ExperimentError(f"{where}: {word!r} is no NAME=value")
    return dict(word.split("=", 1) for word in words)


def read_arm(text: str) -> Arm:
    """`name: X=1 Y=2`; the settings themselves are the name where there is none. `name:` alone is another script."""
    named = re.match(r"(.*?):(?:\s+|$)(.*)", text)
    name, settings = named.groups() if named else ("", text)
    changes = read_settings(shlex.split(settings), text)
    arm = Arm(name.strip() or " ".join(f"{k}={v}" for k, v in changes.items()), changes)
    if not arm.name or arm.name == "base":
        raise ExperimentError(f"{text!r} is no arm; write 'name: X=1 Y=2'")
    return arm


def read_seeds(text: str) -> list[int]:
    """A number of seeds (the first of SEEDS), or the seeds themselves, separated by commas."""
    try:
        numbers = [int(word) for word in text.removesuffix(",").split(",")]
    except ValueError:
        numbers = [-1]
    if "," not in text and 1 <= numbers[0] <= len(SEEDS):
        return list(SEEDS[: numbers[0]])
    if "," in text and min(numbers) >= 0 and len({*numbers}) == len(numbers):
        return numbers
    raise ExperimentError(f"--seeds {text}: give a number from 1 to {len(SEEDS)}, or different seeds: 1337,42 (or 42,)")


def fetch_script(name: str, out: Path) -> Path:
    """A copy of the script under its hash, so that editing it does not change what later runs run. `name` is a file,
    or a commit whose train_gpt.py is meant. Raises ExperimentError."""
    if Path(name).is_file():
        source = Path(name).read_bytes()
    else:
        shown = subprocess.run(["git", "-C", ROOT, "show", f"{name}:train_gpt.py"], capture_output=True)
        if shown.returncode:
            raise ExperimentError(f"{name} is neither a file nor a commit with a train_gpt.py")
        source = shown.stdout
    path = out / "scripts" / f"{hashlib.sha256(source).hexdigest()}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")  # another process may write the same
    partial.write_bytes(source)
    partial.replace(path)
    return path


def probe(script: Path, environs: Sequence[Mapping[str, str]]) -> dict:
    """What the script makes of these environments (probe.py). Raises ExperimentError."""
    asked = subprocess.run(
        [sys.executable, Path(__file__).with_name("probe.py"), script],
        input=json.dumps([dict(environ) for environ in environs]),
        capture_output=True,
        text=True,
    )
    if asked.returncode:
        last = (asked.stderr.strip().splitlines() or ["no message"])[-1]
        raise ExperimentError(f"{script.name[:12]}… is no version of train_gpt.py that can be asked: {last}")
    return json.loads(asked.stdout)


def axis_of(changes: Mapping[str, str], sections: Mapping[str, str]) -> str:
    """What an arm changes, by its settings; of several the first in AXES."""

    def axis(name: str) -> str:
        section = sections.get(name, "run")
        if name in DATA:
            return "data"
        if section == "run":
            return "model"
        if section in ("training", "averaging"):
            return "optimizer" if OPTIMIZER.search(name) else "schedule"
        return section

    return min(map(axis, changes), key=ledger.AXES.index)


def trains(changes: Mapping[str, str], axis: str) -> bool:
    """Whether an arm needs a training of its own, or starts from the base's weights."""
    return axis not in ("quantization", "evaluation") or not TRAINED_FOR.isdisjoint(changes)


def understand(recipe: Path, arms: Sequence[Arm], data: Path, out: Path, options) -> tuple[list[Variant], dict]:
    """The base and the arms as their scripts understand them, and all that the base's script said (probe.py). Raises
    ExperimentError."""
    script = fetch_script(options.script, out)
    against = fetch_script(options.against, out) if options.against else script
    if not arms and against != script:
        arms = [Arm(f"script {Path(options.script).name}", {})]
    arms = [Arm("base", {}), *arms]
    if twice := {arm.name for i, arm in enumerate(arms) if arm.name in [other.name for other in arms[:i]]}:
        raise ExperimentError(f"two arms are called {min(twice)!r}")
    environs = [read_recipe(recipe) | dict(DATA_PATH=str(data)) | arm.changes for arm in arms]
    said = probe(against, environs[:1] if against != script else environs)
    answers = said["environs"] if against == script else said["environs"] + probe(script, environs[1:])["environs"]
    variants = []
    for arm, environ, answer in zip(arms, environs, answers, strict=True):
        if "error" in answer:
            raise ExperimentError(f"{arm.name}: {answer['error']}")
        axis, of = "", against
        if arm.name != "base":
            axis, of = options.axis or "script", script
            unknown = [name for name in arm.changes if name not in said["sections"]]
            if against == script and unknown:
                raise ExperimentError(f"{arm.name}: {unknown[0]} is no setting of the script")
            if against == script and (answer["settings"], answer["data"]) == (variants[0].settings, variants[0].data):
                raise ExperimentError(f"{arm.name}: nothing differs from the base")
            if against == script and not options.axis:
                axis = axis_of(arm.changes, said["sections"])
        # A path says where a machine keeps its data; what they are is in the fingerprints.
        told = {k: Path(v).name if k in ("DATA_PATH", "TOKENIZER_PATH") else v for k, v in arm.changes.items()}
        variants.append(Variant(Arm(arm.name, told), axis, of, environ, answer["settings"], answer["data"]))
    return variants, said


def stand_in(first: Mapping, rows: Sequence[Mapping]) -> str:
    """Key of the base's run that a seed needs: one in the ledger by a script that repeats this one, or its own."""
    scripts = ledger.same_scripts(rows)
    for row in rows:
        if ledger.key(row | dict(script=first["script"])) == ledger.key(first) and "scores" in row:
            if scripts.get(row["script"]) == scripts.get(first["script"], ""):
                return ledger.key(row)
    return ledger.key(first)


def plan(
    recipe: Path, arms: Sequence[Arm], seeds: Sequence[int], data: Path, out: Path, rows: Sequence[Mapping], options
) -> Plan:
    """All runs. `rows` is the ledger; `options`: script, against, axis, threads, launch. Everything wrong with any arm
    is said here, before the first run. Raises ExperimentError."""
    (base, *variants), said = understand(recipe, arms, data, out, options)
    where = dict(machine=said["machine"], torch=said["torch"], threads=options.threads, launch=options.launch)

    def row(variant: Variant, seed: int, base_key: str) -> dict:
        found = dict(kind="run", recipe=recipe.stem, name=variant.arm.name, axis=variant.axis)
        found |= dict(changes=variant.arm.changes, base=base_key, settings=variant.settings)
        return found | dict(script=variant.script.stem, data=variant.data, **where, seed=seed)

    jobs, retrained = [], all(variant.trains for variant in variants)
    for seed in seeds:
        first = row(base, seed, "")
        base_key = stand_in(first, rows) if retrained else ledger.key(first)
        if base_key == ledger.key(first):
            jobs.append(Job(first, base.environ | dict(SAVE_WEIGHTS="1"), base.script))
        for variant in variants:
            one = row(variant, seed, base_key)
            if not variant.trains:
                one["settings"] = one["settings"] | dict(EXPORT_ONLY=True)
            jobs.append(Job(one, variant.environ, variant.script, "" if variant.trains else base_key))
    names = {ledger.key(row): row["name"] for row in rows if row["kind"] == "run"}
    for job in jobs:
        if names.get(job.key, job.row["name"]) != job.row["name"]:
            raise ExperimentError(f"{job.row['name']} is {names[job.key]!r} in the ledger; call it that")
    return Plan(jobs, tuple(said["sections"]))


def shell(names: Sequence[str]) -> dict[str, str]:
    """This process's environment without settings of the script: a recipe and its arm say all of them."""
    return {name: text for name, text in os.environ.items() if name not in names}
