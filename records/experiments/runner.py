"""Runs of a base and its arms, seed by seed, each once, into the ledger.

A run belongs to OUT/runs/<recipe>-<arm>-<seed>-<key>. Its lock in OUT/locks is held by the run itself, so that neither
two processes nor one that was killed and started again make the same run at once. What a killed process left half done
is done again; what its script ended all the same is taken as it is.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from records.experiments import ledger
from records.experiments.ledger import ExperimentError

ROOT = Path(__file__).resolve().parent.parent.parent
SEEDS = (1337, 42, 2025, 7, 8, 9, 10, 11, 12, 13)
TRAINED_FOR = {"QAT_ENABLED", "LATE_QAT", "LATE_QAT_THRESHOLD", "CROWN_Q"}  # quantization that acts on training
OPTIMIZER = re.compile(r"_LR|LR_|_WD$|MOMENTUM|BETA|_EPS$|CLIP_NORM|BACKEND_STEPS")
REPORT_EVERY = 60.0  # seconds between lines on progress


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


# ----------------------------------------------------------------------------------------------------------------------
# What is wanted
# ----------------------------------------------------------------------------------------------------------------------


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
        if section == "run":
            return "data" if name in ("DATA_PATH", "TOKENIZER_PATH") else "model"
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


# ----------------------------------------------------------------------------------------------------------------------
# Running
# ----------------------------------------------------------------------------------------------------------------------


def shell(names: Sequence[str]) -> dict[str, str]:
    """This process's environment without settings of the script: a recipe and its arm say all of them."""
    return {name: text for name, text in os.environ.items() if name not in names}


def short(label: str) -> str:
    """A pass by one name, whatever grid its weights are on: final_int6_sliding_window, final_int5_sliding_window."""
    return re.sub(r"^(float_|final_(int\d+|fp\d+)_)", "", label)


def finished_row(job: Job, result: Mapping, wall: float | None, limit: str) -> dict:
    """The row of an ended run."""
    scores = {short(label): round(score["val_bpb"], 8) for label, score in result["scores"].items()}
    seconds = dict(train=result["train_seconds"], evaluate=result["eval_seconds"], wall=wall)
    row = job.row | dict(
        scores=scores,
        scored_bytes=max(score["bytes"] for score in result["scores"].values()),
        steps=result["steps"],
        bytes=dict(code=result["bytes_code"], artifact=result["bytes_artifact"]),
        seconds={name: round(spent, 1) for name, spent in seconds.items() if spent is not None},
        device=result["device"],
        dtype=result["dtype"],
    )
    return row | (dict(limit=limit) if limit else {})


class Runner:
    """Carries out a plan with several runs at a time."""

    def __init__(self, plan: Plan, path: Path, out: Path, jobs: int):
        self.plan, self.path, self.out, self.workers = plan, path, out, jobs
        self.lock, self.stop, self.broken = threading.Lock(), threading.Event(), None
        self.rows = {ledger.key(row): row for row in ledger.read(path) if row["kind"] == "run"}
        self.folders = {job.key: out / "runs" / job.run_id for job in plan.jobs}
        self.gone: dict[str, str] = {}  # arm: why the rest of it is left out
        self.failed = 0
        self.running: dict[str, tuple[Job, float, subprocess.Popen]] = {}
        self.todo = deque(job for job in plan.jobs if job.key not in self.rows or self.weights_missing(job))
        self.total, self.open = len(self.todo), {job.key for job in self.todo}

    def weights_missing(self, job: Job) -> bool:
        """A base in the ledger whose weights an arm still wants: it has to run again."""
        wanted = any(j.weights == job.key and j.key not in self.rows for j in self.plan.jobs)
        return wanted and not (self.folders[job.key] / "weights.pgolf").exists()

    def say(self, line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)

    def run(self) -> int:
        """Exit code: 0, or 1 where a run failed. Raises what keeps results from being written down."""
        done = len(self.plan.jobs) - self.total
        self.say(f"{self.total} runs to make, {done} in the ledger already{self.time_left()}")
        workers = [threading.Thread(target=self.work, daemon=True) for _ in range(self.workers)]
        for worker in workers:
            worker.start()
        try:
            reported = time.monotonic()
            while any(worker.is_alive() for worker in workers):
                for worker in workers:
                    worker.join(0.2)
                if time.monotonic() - reported > REPORT_EVERY:
                    reported = time.monotonic()
                    self.say(self.progress())
        except KeyboardInterrupt:
            self.stop.set()
            for _, _, process in list(self.running.values()):
                process.terminate()
            for worker in workers:
                worker.join()
            self.say("interrupted; start the same command again to go on")
            return 130
        if self.broken is not None:
            raise self.broken
        return 1 if self.failed else 0

    def work(self) -> None:
        try:
            self.work_on()
        except Exception as error:  # of a thread: run() raises it
            self.broken = error
            self.stop.set()

    def work_on(self) -> None:
        while not self.stop.is_set():
            with self.lock:
                if not self.todo:
                    return
                job = self.todo.popleft()
            if self.take(job):
                self.open.discard(job.key)
            else:
                with self.lock:
                    self.todo.append(job)
                self.stop.wait(0.1)

    def take(self, job: Job) -> bool:
        """Make this run, unless it has to wait: for the base's weights, or for another process that makes it."""
        if job.row["name"] in self.gone or job.weights and job.weights in self.open:
            return job.row["name"] in self.gone
        if job.weights and not (self.folders[job.weights] / "weights.pgolf").exists():
            self.fail(job, "the base left no weights to start from", whole_arm=False)
            return True
        lock = self.out / "locks" / job.run_id
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            self.make(job, file.fileno())
        return True

    def make(self, job: Job, lock: int) -> None:
        """The run itself, or what an earlier process of the same plan left of it."""
        folder, log = self.folders[job.key], self.out / "logs" / f"{job.run_id}.txt"
        wall, code, said = None, 0, ""
        if job.key in {ledger.key(row) for row in ledger.read(self.path)} and not self.weights_missing(job):
            return self.ended(job, "another process made it")
        if not (folder / "result.json").exists() or self.weights_missing(job):
            shutil.rmtree(folder, ignore_errors=True)
            log.unlink(missing_ok=True)
            start = time.monotonic()
            code, said = self.start(job, lock)
            wall = time.monotonic() - start
        if self.stop.is_set() and code:
            return
        limit = next((line for line in said.splitlines() if line.startswith("limit:")), "")
        if (folder / "result.json").exists():
            result = json.loads((folder / "result.json").read_text("utf-8"))
            if (result["code_sha256"], result["seed"]) != (job.row["script"], job.row["seed"]):
                return self.fail(job, f"{folder} holds another run's result; move it away", whole_arm=False)
            row = finished_row(job, result, wall, limit)
        elif code == 3:
            row = job.row | dict(failed=limit or "a limit was broken")
        else:
            lines = said.strip().splitlines() or ["it said nothing"]
            last = next((line for line in lines if line.startswith("error:")), lines[-1])
            return self.fail(job, f"exit code {code}: {last}", whole_arm=code == 2)
        new = ledger.append(self.path, row)
        old = self.rows.get(job.key)
        if old is not None and "scores" in row and old["scores"] != row["scores"]:
            self.say(
                f"{job.run_id} scored {row['scores']}, the ledger says {old['scores']}: this machine does not repeat"
            )
        with self.lock:
            self.rows[job.key] = row
        scores = " ".join(f"{label}:{score:.4f}" for label, score in row.get("scores", {}).items())
        self.ended(job, scores + limit if new else "in the ledger already")

    def start(self, job: Job, lock: int) -> tuple[int, str]:
        """Exit code and messages of the script. It inherits the lock, and holds it even if this process is killed."""
        environ = shell(self.plan.names) | job.environ
        environ |= dict(SEED=str(job.row["seed"]), RUN_ID=job.run_id, OUT_DIR=str(self.out), OMP_WAIT_POLICY="PASSIVE")
        environ |= dict(OMP_NUM_THREADS=str(job.row["threads"]))
        if "TRAIN_LOG_EVERY" in self.plan.names:
            environ.setdefault("TRAIN_LOG_EVERY", "10")  # for the time left
        if job.weights:
            environ |= dict(EXPORT_ONLY="1", WEIGHTS_PATH=str(self.folders[job.weights] / "weights.pgolf"))
        launch = shlex.split(job.row["launch"]) or [sys.executable]
        messages = self.out / "locks" / f"{job.run_id}.messages"
        with messages.open("w+b") as file:
            process = subprocess.Popen(
                [*launch, str(job.script)], env=environ, stdout=file, stderr=subprocess.STDOUT, pass_fds=(lock,)
            )
            self.running[job.run_id] = (job, time.monotonic(), process)
            if self.stop.is_set():
                process.terminate()
            code = process.wait()
            self.running.pop(job.run_id)
            return code, messages.read_text("utf-8", "replace")

    def fail(self, job: Job, why: str, whole_arm: bool) -> None:
        """Not in the ledger: it is tried again next time. A setting that is refused is refused for every seed."""
        self.failed += 1
        if whole_arm:
            self.gone[job.row["name"]] = why
        self.say(f"FAILED {job.row['name']} seed {job.row['seed']}: {why}")

    def ended(self, job: Job, said: str) -> None:
        self.say(f"{job.row['name']} seed {job.row['seed']}: {said}{self.time_left()}")

    # What is still to come

    def expected(self, job: Job) -> tuple[float, float] | None:
        """(training, all) seconds that the last runs like this took: of this recipe here, trained or exported."""
        like = [
            (row["seconds"]["train"], row["seconds"]["train"] + row["seconds"]["evaluate"])
            for row in self.rows.values()
            if "seconds" in row
            and row["recipe"] == job.row["recipe"]
            and row["machine"] == job.row["machine"]
            and ("EXPORT_ONLY" in row["settings"]) == bool(job.weights)
        ]
        train, whole = zip(*like[-5:], strict=True) if like else ((), ())
        return (statistics.median(train), statistics.median(whole)) if like else None

    def steps(self, job: Job) -> tuple[int, int] | None:
        """(steps so far, of how many) by the log of a run."""
        with contextlib.suppress(OSError):
            log = (self.out / "logs" / f"{job.run_id}.txt").read_text("utf-8", "replace")
            if found := re.findall(r"^step:(\d+)/(\d+) train", log, re.MULTILINE):
                return int(found[-1][0]), int(found[-1][1])
        return None

    def time_left(self) -> str:
        """Of all runs, at the pace of those that run now: they may share the machine with more than earlier ones."""
        running = [(job, time.monotonic() - since) for job, since, _ in list(self.running.values())]
        waiting = [job for job in self.todo if job.row["name"] not in self.gone]
        expected = {job.key: self.expected(job) for job in [*waiting, *(job for job, _ in running)]}
        if not expected or None in expected.values():
            return ""
        paces = [
            elapsed / (expected[job.key][0] * steps[0] / steps[1])
            for job, elapsed in running
            if (steps := self.steps(job)) and expected[job.key][0] and steps[0] > 0.05 * steps[1]
        ]
        pace = statistics.median(paces) if paces else 1.0
        left = sum(expected[job.key][1] * pace for job in waiting)
        left += sum(max(expected[job.key][1] * pace - elapsed, 0.0) for job, elapsed in running)
        return f"; about {max(1, round(left / self.workers / 60))} min left"

    def progress(self) -> str:
        """One line on what runs."""
        parts = []
        for job, since, _ in list(self.running.values()):
            steps = self.steps(job)
            said = f"{job.row['name']} seed {job.row['seed']} {(time.monotonic() - since) / 60:.1f} min"
            parts.append(said + (f" step {steps[0]}/{steps[1]}" if steps else ""))
        return f"running {', '.join(parts) or 'nothing'}; {len(self.todo)} waiting{self.time_left()}"


# ----------------------------------------------------------------------------------------------------------------------
# Step time
# ----------------------------------------------------------------------------------------------------------------------

ALONE = 0.1  # of a core that other work may take during a measurement
STEPS = dict(TRAIN_LOG_EVERY="1", EVAL_STRIDE="0", TTT_ENABLED="0", VAL_LOSS_EVERY="0", WARMDOWN_ITERS="0")
STEPS |= dict(ENABLE_LOOPING_AT="0", SAVE_WEIGHTS="0", CHECKPOINT_EVERY="0")  # a step as most of a run has it


def busy_seconds() -> float | None:
    """Processor seconds that the whole machine has spent; None where it does not say."""
    try:
        user, nice, system, idle, iowait, irq, softirq, steal, *_ = map(
            int, Path("/proc/stat").read_text("utf-8").splitlines()[0].split()[1:]
        )
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def time_one(job: Job, out: Path, names: Sequence[str], steps: int, tag: str) -> tuple[float, float | None]:
    """(median milliseconds of a step, cores that other work took meanwhile). The run ends with its last step."""
    run_id = f"time-{job.run_id}-{tag}"
    environ = shell(names) | job.environ | STEPS | dict(ITERATIONS=str(steps), SEED=str(job.row["seed"]), RUN_ID=run_id)
    environ |= dict(OUT_DIR=str(out), OMP_NUM_THREADS=str(job.row["threads"]), OMP_WAIT_POLICY="PASSIVE")
    command = [*(shlex.split(job.row["launch"]) or [sys.executable]), str(job.script)]
    marks, tail, others = [], deque(maxlen=5), None
    before, own, start = busy_seconds(), os.times(), time.monotonic()
    process = subprocess.Popen(
        command, env=environ | dict(PYTHONUNBUFFERED="1"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:
        tail.append(line.strip())
        if found := re.match(r"step:\d+/\d+ train_loss:.* train_time:(\d+(?:\.\d+)?)ms", line):
            marks.append(float(found[1]))
            if len(marks) == steps:
                process.terminate()  # the rest is no part of the measurement
                break
    process.stdout.close()
    process.wait()
    wall, now, after = time.monotonic() - start, os.times(), busy_seconds()
    shutil.rmtree(out / "runs" / run_id, ignore_errors=True)
    (out / "logs" / f"{run_id}.txt").unlink(missing_ok=True)
    if len(marks) < 4:
        raise ExperimentError(f"{job.row['name']}: no steps to time: {tail[-1] if tail else 'no output'}")
    if before is not None and after is not None:
        spent = sum(now[:4]) - sum(own[:4])
        others = max(0.0, (after - before - spent) / wall)
    return statistics.median(b - a for a, b in zip(marks[1:], marks[2:], strict=False)), others


def time_steps(plan: Plan, out: Path, rounds: int, steps: int) -> list[dict]:
    """One row for each arm: its step beside the base's, in turn, `rounds` times. Raises ExperimentError where other
    work shared the machine: such a ratio is no measurement."""
    base, *arms = plan.jobs
    found = []
    for arm in arms:
        if "EXPORT_ONLY" in arm.row["settings"]:
            raise ExperimentError(f"{arm.row['name']} does not train, so its step is the base's")
        figures: dict[str, list[float]] = dict(base=[], arm=[])
        worst: float | None = None
        for number in range(rounds):
            # The order turns, so that a drift does not favour one side.
            for side in ("base", "arm") if number % 2 == 0 else ("arm", "base"):
                job = base if side == "base" else arm
                step_ms, others = time_one(job, out, plan.names, steps, f"{side}{number}")
                if others is not None and others > ALONE:
                    raise ExperimentError(f"not alone: other work took {others:.2f} of a core; nothing was recorded")
                worst = others if worst is None or others is None else max(worst, others)
                figures[side].append(round(step_ms, 2))
                print(f"{job.row['name']}: {step_ms:.1f} ms a step", flush=True)
        row = arm.row | dict(kind="time", base_ms=figures["base"], arm_ms=figures["arm"])
        found.append(row | dict(others=None if worst is None else round(worst, 3)))
    return found
