"""Runs of a base and its arms, seed by seed, each once, into the ledger.

A run belongs to OUT/runs/<recipe>-<arm>-<seed>-<key>. Its lock in OUT/locks is held by the run itself, so that neither
two processes nor one that was killed and started again make the same run at once. What a killed process left half done
is done again; what its script ended all the same is taken as it is.
"""

import contextlib
import fcntl
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from records.experiments import ledger
from records.experiments.plan import Job, Plan, shell

REPORT_EVERY = 60.0  # seconds between lines on progress


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
