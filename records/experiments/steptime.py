"""Milliseconds of a step, of runs that had the machine to themselves."""

import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from records.experiments.ledger import ExperimentError
from records.experiments.plan import Job, Plan, shell

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


class Load:
    """Cores that work other than this process and its ended children takes, from its making on."""

    def __init__(self):
        self.busy, self.own, self.start = busy_seconds(), os.times(), time.monotonic()

    def own_seconds(self) -> float:
        return sum(os.times()[:4]) - sum(self.own[:4])

    def others(self, own_seconds: float | None = None) -> float | None:
        """None where the machine does not say; own_seconds where more than this process is no other work."""
        now, wall = busy_seconds(), time.monotonic() - self.start
        if self.busy is None or now is None:
            return None
        own = self.own_seconds() if own_seconds is None else own_seconds
        return max(0.0, (now - self.busy - own) / wall)


def time_one(job: Job, out: Path, names: Sequence[str], steps: int, tag: str) -> tuple[float, float | None]:
    """(median milliseconds of a step, cores that other work took meanwhile). The run ends with its last step."""
    run_id = f"time-{job.run_id}-{tag}"
    environ = shell(names) | job.environ | STEPS | dict(ITERATIONS=str(steps), SEED=str(job.row["seed"]), RUN_ID=run_id)
    environ |= dict(OUT_DIR=str(out), OMP_NUM_THREADS=str(job.row["threads"]))
    command = [*(shlex.split(job.row["launch"]) or [sys.executable]), str(job.script)]
    marks, tail, load = [], deque(maxlen=5), Load()
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
    others = load.others()
    shutil.rmtree(out / "runs" / run_id, ignore_errors=True)
    (out / "logs" / f"{run_id}.txt").unlink(missing_ok=True)
    if len(marks) < 4:
        raise ExperimentError(f"{job.row['name']}: no steps to time: {tail[-1] if tail else 'no output'}")
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
