"""Checkpoints: a run that was interrupted, killed or short of disk ends in the artifact of one that was not."""

import ast
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, TINY_ENV, Ran, clean_environ, run_here
from helpers import make_run, quantize, single_rank, tiny_hp
from test_ranks import SETTINGS as RANKS
from test_ranks import difference, tiny_environ, torchrun

import train_gpt as pg

# Twelve steps: fake quantization from step 6, snapshots of tight SWA in the last two, a validation after step 6.
# With a line for every step the clock is exact after each of them, so that EVERY_STEP writes after every step.
QUICK = dict(TRAIN_LOG_EVERY=1, TTT_ENABLED=0, EVAL_STRIDE=0)
EVERY_STEP, ON_SIGNAL = dict(CHECKPOINT_EVERY=1e-6), dict(CHECKPOINT_EVERY=1000)
BEFORE_QAT, AFTER_QAT, IN_SWA = POINTS = (4, 8, 11)
NOTHING = "there is no checkpoint to go on from"
TERM, INT = signal.SIGTERM, signal.SIGINT
SOURCE = re.compile(r"^===== source begin bytes:\d+ =====$", re.MULTILINE)

# -----------------------------------------------------------------------------
# RUNS, WHOLE AND INTERRUPTED
# -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tiny_data, tmp_path_factory) -> Ran:
    """The run that nothing happens to."""
    return run_here(tmp_path_factory.mktemp("plain"), tiny_data, **QUICK)


class Kept(NamedTuple):
    ran: Ran
    checkpoints: dict[int, Path]  # a copy of every checkpoint, by its step
    names: list[set[str]]  # what the folder held after each of them


@pytest.fixture(scope="module")
def kept(tiny_data, tmp_path_factory) -> Kept:
    """The same run with a checkpoint after every step."""
    out, copies = tmp_path_factory.mktemp("kept"), tmp_path_factory.mktemp("checkpoints")
    checkpoints, names, save = {}, [], pg.Trainer.save

    def copy(trainer: pg.Trainer) -> None:
        save(trainer)
        checkpoints[trainer.step] = Path(shutil.copy(checkpoint_of(trainer.run.folder, trainer.step), copies))
        names.append(names_in(trainer.run.folder))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pg.Trainer, "save", copy)
        ran = run_here(out, tiny_data, **QUICK, **EVERY_STEP)
    return Kept(ran, checkpoints, names)


@pytest.fixture
def go(tiny_data, tmp_path):
    """Start that run, with other settings."""
    return lambda data=tiny_data, **settings: run_here(tmp_path, data, **{**QUICK, **settings})


@pytest.fixture
def folder(tmp_path) -> Path:
    """Of the results of a run that `go` starts, there before it."""
    path = tmp_path / "runs" / "run"
    path.mkdir(parents=True)
    return path


@pytest.fixture(autouse=True)
def outside():
    """A signal that the script does not handle fails a test instead of ending them all."""

    def unhandled(number: int, _) -> None:
        raise AssertionError(f"nothing handles {signal.Signals(number).name}")

    before = {number: signal.signal(number, unhandled) for number in (TERM, INT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def replaced(owner, name: str, make) -> Iterator[None]:
    """Inside the block, `owner.name` is make(what it was)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, make(getattr(owner, name)))
        yield


def after_step(step: int, act) -> contextlib.AbstractContextManager:
    """Inside the block, a run calls act(trainer) once it has reported this step."""

    def make(report):
        def reported(trainer: pg.Trainer) -> None:
            report(trainer)
            if trainer.step == step:
                act(trainer)

        return reported

    return replaced(pg.Trainer, "report", make)


def before_call(owner, name: str, act) -> contextlib.AbstractContextManager:
    """Inside the block, act(*args) comes before each call of `owner.name`."""
    return replaced(owner, name, lambda call: lambda *args, **named: (act(*args), call(*args, **named))[1])


def signal_after(step: int, number: int = TERM) -> contextlib.AbstractContextManager:
    return after_step(step, lambda _: signal.raise_signal(number))


def checkpoint_of(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step}.pgckpt"


def step_of(path: Path) -> int:
    return int(re.fullmatch(r"checkpoint-(\d+)\.pgckpt", path.name)[1])


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def step_lines(log: Path) -> set[tuple[str, ...]]:
    """(step, train or val, loss) of all lines about steps; a step that was done twice with other losses is two."""
    return set(re.findall(r"^step:(\d+)/\d+ (train|val)_loss:(\S+)", log.read_text("utf-8"), re.MULTILINE))


def assert_same(ran: Ran, other: Ran) -> None:
    """Both ended, in one artifact with one set of scores, by the same steps, and nothing else is left."""
    assert (ran.code, ran.err) == (0, "")
    assert ran.artifact == other.artifact
    for name in ("scores", "headline", "steps", "train_tokens", "exported", "settings_hash"):
        assert ran.result[name] == other.result[name]
    assert step_lines(ran.log) == step_lines(other.log)
    assert names_in(ran.folder) == {"artifact.pgolf", "result.json"}


def test_checkpoints_change_nothing_and_are_gone_in_the_end(kept, plain):
    assert_same(kept.ran, plain)
    assert kept.ran.result["resumed_at"] == plain.result["resumed_at"] == []
    assert "late_qat:enabled step:6" in plain.out and "swa:start step:10" in plain.out
    assert len(step_lines(plain.log)) == 12 + 2


def test_the_two_newest_checkpoints_are_kept(kept):
    assert kept.names == [{f"checkpoint-{step}.pgckpt" for step in (n - 1, n) if step} for n in range(1, 13)]


def test_each_checkpoint_has_its_line(kept):
    lines = re.findall(r"^checkpoint:written step:(\d+) bytes:(\d+) path:(\S+)$", kept.ran.out, re.MULTILINE)
    assert lines == [
        (str(step), str(path.stat().st_size), str(checkpoint_of(kept.ran.folder, step)))
        for step, path in kept.checkpoints.items()
    ]
    assert len(lines) == 12


@pytest.mark.parametrize("step", [*POINTS, 12])
def test_a_run_resumes_before_and_after_qat_within_swa_and_after_the_last_step(step, kept, plain, go):
    ran = go(RESUME=kept.checkpoints[step])
    assert (ran.code, ran.err) == (0, "") and ran.artifact == plain.artifact
    assert ran.result["scores"] == plain.result["scores"] and ran.result["resumed_at"] == [step]
    assert re.search(rf"^resume:step:{step} train_time:\d+ms from:{kept.checkpoints[step]}$", ran.out, re.MULTILINE)
    # The last validation comes after training.
    expected = {line for line in step_lines(plain.log) if int(line[0]) > step or line[:2] == ("12", "val")}
    assert step_lines(ran.log) == expected


@pytest.mark.parametrize("number, code, resume", [(TERM, 143, "auto"), (INT, 130, "path")], ids=["SIGTERM", "SIGINT"])
def test_an_interrupted_run_goes_on_to_the_same_end(number, code, resume, go, plain):
    with signal_after(7, number):
        cut = go(**ON_SIGNAL)
    (path,) = cut.folder.iterdir()
    said = f"interrupted: {number.name}; go on with the same command and RESUME={path}\n"
    assert (cut.code, cut.err) == (code, said) and 7 < step_of(path) < 10
    text = cut.log.read_text("utf-8")
    assert text.endswith("\n" + said) and said not in cut.out
    # Without RUN_ID the run id comes from the checkpoint.
    ran = go(RESUME="auto") if resume == "auto" else go(run_id="", RESUME=path)
    ran = ran._replace(folder=cut.folder, log=cut.log)
    assert_same(ran, plain)
    assert ran.result["run_id"] == "run" and ran.result["resumed_at"] == [step_of(path)]
    assert ran.log.read_text("utf-8").startswith(text)
    assert len(SOURCE.findall(ran.log.read_text("utf-8"))) == 1


@pytest.mark.parametrize("number, code", [(TERM, 143), (INT, 130)], ids=["SIGTERM", "SIGINT"])
def test_without_checkpoints_a_signal_ends_the_run_at_once(number, code, go):
    with signal_after(6, number):
        cut = go()
    said = f"interrupted: {number.name}; {NOTHING}\n"
    assert (cut.code, cut.err) == (code, said) and cut.log.read_text("utf-8").endswith("\n" + said)
    assert "step:6/12 train_loss" in cut.out and "step:7/12" not in cut.out
    assert not names_in(cut.folder)


def test_a_signal_in_the_last_step_loses_nothing(go, plain):
    with signal_after(12):
        cut = go(**ON_SIGNAL)
    assert cut.code == 143 and "go on with the same command and RESUME=" in cut.err
    assert_same(go(RESUME="auto"), plain)


def test_a_repeated_signal_while_the_checkpoint_is_written_changes_nothing(go, plain):
    again = []

    def repeat(_) -> None:
        for number in (INT, TERM, TERM):
            again.append(number)
            signal.raise_signal(number)

    with signal_after(7), before_call(os, "fsync", repeat):
        cut = go(**ON_SIGNAL)
    (path,) = cut.folder.iterdir()
    assert len(again) == 3 and cut.code == 143 and cut.err.count("\n") == 1
    assert cut.err == f"interrupted: SIGTERM; go on with the same command and RESUME={path}\n"
    assert_same(go(RESUME="auto"), plain)


def test_the_first_signal_while_a_checkpoint_is_written_waits_for_it(go, plain):
    sent = []

    def once(_) -> None:
        if not sent:
            sent.append(signal.raise_signal(TERM))

    with before_call(os, "fsync", once):
        cut = go(**EVERY_STEP)
    assert sent and cut.code == 143 and "checkpoint:written step:1 " in cut.out
    assert_same(go(RESUME="auto"), plain)


def test_a_signal_that_only_another_rank_had_until_the_checkpoint_is_written_does_not_cut_it(go, plain):
    """torchrun ends the ranks that are left, the main one amid its writing, when the first one is gone."""

    def told_by_the_clock(trainer: pg.Trainer) -> None:
        trainer.clock.interrupted = True

    with after_step(5, told_by_the_clock), before_call(os, "fsync", lambda _: signal.raise_signal(TERM)):
        cut = go(**ON_SIGNAL)
    assert cut.code == 143 and names_in(cut.folder) == {"checkpoint-5.pgckpt"}
    assert cut.err == f"interrupted: SIGTERM; go on with the same command and RESUME={checkpoint_of(cut.folder, 5)}\n"
    assert_same(go(RESUME="auto"), plain)


def test_a_run_that_is_interrupted_before_it_trains_again_still_names_its_checkpoint(go, kept):
    path = kept.checkpoints[BEFORE_QAT]
    with before_call(pg.Trainer, "warm_up", lambda _: signal.raise_signal(TERM)):
        cut = go(RESUME=path)
    assert cut.code == 143 and cut.err == f"interrupted: SIGTERM; go on with the same command and RESUME={path}\n"


def test_a_run_resumed_without_further_checkpoints_names_the_one_it_came_from(go, kept):
    path = kept.checkpoints[BEFORE_QAT]
    with signal_after(6):
        cut = go(RESUME=path)
    assert cut.code == 143 and cut.err == f"interrupted: SIGTERM; go on with the same command and RESUME={path}\n"
    assert not names_in(cut.folder) and "step:7/12" not in cut.out


@pytest.mark.parametrize("settings", [dict(), ON_SIGNAL], ids=["without", "with"])
def test_a_signal_during_the_evaluation_leaves_a_whole_artifact(settings, go, plain):
    with before_call(pg.Evaluation, "score_all", lambda _: signal.raise_signal(TERM)):
        cut = go(**settings)
    artifact = cut.folder / "artifact.pgolf"
    said = f"interrupted: SIGTERM; the artifact is whole: EVAL_ONLY=1 ARTIFACT_PATH={artifact} scores it\n"
    assert (cut.code, cut.err) == (143, said) and cut.log.read_text("utf-8").endswith("\n" + said)
    assert cut.artifact == plain.artifact and names_in(cut.folder) == {"artifact.pgolf"}
    scored = go(run_id="again", EVAL_ONLY=1, ARTIFACT_PATH=artifact)
    label = "final_int6_roundtrip"
    assert scored.code == 0 and scored.result["scores"] == {label: plain.result["scores"][label]}


def test_an_evaluation_alone_that_is_interrupted_says_how_to_repeat_it(go, plain):
    artifact = plain.folder / "artifact.pgolf"
    with before_call(pg.Evaluation, "score_all", lambda _: signal.raise_signal(TERM)):
        cut = go(EVAL_ONLY=1, ARTIFACT_PATH=artifact)
    assert cut.code == 143 and "CHECKPOINT_EVERY" not in cut.err and str(artifact) in cut.err


def test_a_run_that_is_interrupted_after_training_resumes_from_its_last_checkpoint(go, plain):
    with before_call(pg.Evaluation, "score_all", lambda _: signal.raise_signal(TERM)):
        cut = go(**EVERY_STEP)
    assert names_in(cut.folder) == {"artifact.pgolf", "checkpoint-11.pgckpt", "checkpoint-12.pgckpt"}
    assert_same(go(RESUME="auto", **EVERY_STEP), plain)


def test_a_signal_while_the_artifact_is_written_leaves_nothing_of_it(go, plain):
    with before_call(os, "fsync", lambda _: signal.raise_signal(TERM)):
        cut = go()
    assert cut.code == 143 and NOTHING in cut.err and not names_in(cut.folder)


# -----------------------------------------------------------------------------
# KILLED
# -----------------------------------------------------------------------------

# Enough steps for several kills.
LONG = dict(ITERATIONS=100, WARMDOWN_ITERS=90, VAL_LOSS_EVERY=0, TRAIN_LOG_EVERY=1, TTT_ENABLED=0, EVAL_STRIDE=0)
SLOW_DISK = """
import os, sys, time
sys.path.insert(0, {root!r})
import train_gpt

fsync = os.fsync
os.fsync = lambda file: (time.sleep(0.05), fsync(file))
sys.exit(train_gpt.main([], os.environ))
"""


@pytest.fixture(scope="module")
def long(tiny_data, tmp_path_factory) -> Ran:
    return run_here(tmp_path_factory.mktemp("long"), tiny_data, **LONG)


class Restarted:
    """One command, started again whenever it was ended, as a scheduler does."""

    def __init__(self, folder: Path, data: Path, script: Path):
        self.folder, self.command = folder, [sys.executable, "-B", script]
        settings = TINY_ENV | LONG | dict(DATA_PATH=data, RUN_ID="run", RESUME="auto", CHECKPOINT_EVERY=0.02)
        self.environ = clean_environ(**settings)
        self.log, self.results = folder / "logs" / "run.txt", folder / "runs" / "run"

    def start(self) -> subprocess.Popen:
        self.begun, self.steps = time.time_ns(), 0
        self.seen = self.log.stat().st_size if self.log.exists() else 0
        pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(self.command, cwd=self.folder, env=self.environ, **pipes)

    def trained(self, steps: int) -> bool:
        """Whether the present start has done so many steps."""
        if self.log.exists():
            with self.log.open("rb") as file:
                file.seek(self.seen)
                new = file.read()
            self.seen, self.steps = self.seen + len(new), self.steps + new.count(b" train_loss:")
        return self.steps >= steps

    def writing(self) -> bool:
        """Whether a checkpoint of the present start is there in part."""
        with contextlib.suppress(FileNotFoundError):  # just renamed
            return any(path.stat().st_mtime_ns > self.begun for path in self.results.glob("*.partial"))
        return False

    def end(self, when: Callable[[], bool], delay: float = 0.0, number: int = signal.SIGKILL) -> tuple[int, str]:
        """Exit code and stderr of a start that gets this signal so long after that moment."""
        process = self.start()
        while not when() and process.poll() is None:
            time.sleep(0.003)
        time.sleep(delay)
        process.send_signal(number)
        return process.wait(60), process.communicate()[1]

    def finish(self) -> Ran:
        process = self.start()
        err = process.communicate(timeout=120)[1]
        return Ran(process.returncode, "", err, self.results, self.log)


class Killed(NamedTuple):
    ran: Ran
    ends: list[tuple[int, str]]
    found: list[set[str]]  # in the folder after each kill


@pytest.fixture(scope="module")
def killed(tiny_data, tmp_path_factory) -> Killed:
    """The script itself, killed three times and ended by SIGTERM once."""
    job = Restarted(tmp_path_factory.mktemp("killed"), tiny_data, ROOT / "train_gpt.py")
    dice, ends, found = random.Random(0), [], []
    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, TERM):
        steps = dice.randrange(1, 25)
        ends.append(job.end(lambda steps=steps: job.trained(steps), dice.uniform(0, 0.02), number))
        found.append(names_in(job.results))
    return Killed(job.finish(), ends, found)


def test_a_run_that_is_killed_three_times_ends_in_the_same_artifact(killed, long):
    assert [end for end in killed.ends[:3]] == [(-signal.SIGKILL, "")] * 3
    assert_same(killed.ran, long)
    resumed = killed.ran.result["resumed_at"]
    assert 1 <= len(resumed) <= 4 and resumed == sorted(resumed)


def test_a_kill_leaves_two_checkpoints_or_the_third_that_was_to_replace_one(killed):
    whole = [len([name for name in names if name.endswith(".pgckpt")]) for names in killed.found]
    assert all(count <= 3 for count in whole[:3]) and whole[3] == 2


def test_sigterm_ends_a_process_with_143_and_one_line(killed):
    code, err = killed.ends[3]
    newest = max((name for name in killed.found[3] if name.endswith(".pgckpt")), key=lambda name: step_of(Path(name)))
    assert code == 143
    assert err == f"interrupted: SIGTERM; go on with the same command and RESUME=runs/run/{newest}\n"
    assert f"\n{err}" in killed.ran.log.read_text("utf-8")
    assert killed.ran.result["resumed_at"][-1] == step_of(Path(newest))


@pytest.mark.slow
def test_a_run_survives_kills_at_random_moments_and_amid_writing(tiny_data, long, tmp_path, capsys):
    script, dice = tmp_path / "driver.py", random.Random(1)
    script.write_text(SLOW_DISK.format(root=str(ROOT)))
    tried, writing, survived = 0, 0, 0
    for chain in range(4):
        job = Restarted(tmp_path / str(chain), tiny_data, script)
        job.folder.mkdir()
        aims = dice.sample([True, False] * 3, 6)
        for aimed in aims:
            steps, delay = dice.randrange(1, 25), dice.uniform(0, 0.1)
            end = job.end(job.writing) if aimed else job.end(lambda job=job, n=steps: job.trained(n), delay)
            assert end == (-signal.SIGKILL, "")
            tried, writing = tried + 1, writing + job.writing()
        ran = job.finish()
        assert_same(ran, long)
        assert ran.result["resumed_at"] == sorted(ran.result["resumed_at"])
        survived += len(aims)
    with capsys.disabled():
        print(f"\nkills: {tried} tried, {writing} of them while a checkpoint was being written, {survived} survived")
    assert tried >= 20 and writing >= 5


def test_the_next_checkpoint_clears_what_a_kill_left(folder, go, kept, plain):
    shutil.copy(kept.checkpoints[4], folder)
    (folder / "checkpoint-5.pgckpt.partial").write_bytes(b"half")
    (folder / "checkpoint-7.pgckpt.partial").write_bytes(b"half")
    seen = []
    with after_step(5, lambda trainer: seen.append(names_in(trainer.run.folder))):
        ran = go(RESUME="auto", **EVERY_STEP)
    assert seen == [{"checkpoint-4.pgckpt", "checkpoint-5.pgckpt"}]
    assert ran.artifact == plain.artifact


def test_a_run_that_ends_without_another_checkpoint_clears_what_a_kill_left(folder, go, kept, plain):
    shutil.copy(kept.checkpoints[4], folder)
    (folder / "checkpoint-5.pgckpt.partial").write_bytes(b"half")
    ran = go(RESUME="auto")
    assert ran.artifact == plain.artifact and names_in(folder) == {"artifact.pgolf", "result.json"}


def test_what_cannot_be_removed_is_named_and_ends_nothing(go, plain):
    def obstruct(trainer: pg.Trainer) -> None:
        (trainer.run.folder / "checkpoint-20.pgckpt").mkdir()

    with after_step(3, obstruct):
        ran = go(**EVERY_STEP)
    assert ran.code == 0 and ran.artifact == plain.artifact
    stuck = ran.folder / "checkpoint-20.pgckpt"
    assert f"warning: cannot remove {stuck}: {os.strerror(errno.EISDIR)}\n" in ran.out and "not written" not in ran.out
    assert names_in(ran.folder) == {"artifact.pgolf", "result.json", stuck.name}


# -----------------------------------------------------------------------------
# EVERY PIECE OF THE STATE
# -----------------------------------------------------------------------------

# Snapshots are of the EMA here, so that it too is in what is exported.
STATE = TINY_ENV | {name: str(value) for name, value in (QUICK | EVERY_STEP).items()}
STATE |= dict(SWA_SOURCE="ema", VAL_LOSS_EVERY="0", WARMUP_STEPS="0")


def make_trainer(data: Path, folder: Path, **settings) -> pg.Trainer:
    hp = pg.Hyperparameters.from_env(STATE | dict(DATA_PATH=str(data)) | settings)
    stream = pg.TokenStream(pg.find_shards(hp, "train"), hp.vocab_size)
    return pg.Trainer(make_run(hp, stream)._replace(folder=folder))


def outcome(trainer: pg.Trainer) -> tuple[bytes, list[str]]:
    """Train to the end: the artifact, and the log without times."""
    trainer.warm_up()
    if trainer.run.checkpoint is not None:
        trainer.restore(trainer.run.checkpoint)
    trainer.train()
    source, weights = trainer.exported_weights()
    lines = [re.sub(r" train_time:.*", "", line) for line in trainer.run.log if re.match(r"step:|late_qat:|swa:", line)]
    return pg.pack_artifact({"source": source}, quantize(weights, tiny_hp()), "stored"), lines


class Reference(NamedTuple):
    artifact: bytes
    lines: list[str]
    checkpoints: dict[int, pg.Checkpoint]


@pytest.fixture(scope="module")
def reference(tiny_data, tmp_path_factory) -> Reference:
    folder, checkpoints = tmp_path_factory.mktemp("reference"), {}

    def read(trainer: pg.Trainer) -> None:
        checkpoints[trainer.step] = pg.read_checkpoint(checkpoint_of(folder, trainer.step))

    with contextlib.ExitStack() as stack:
        for step in POINTS:
            stack.enter_context(after_step(step, read))
        return Reference(*outcome(make_trainer(tiny_data, folder)), checkpoints)


@pytest.fixture
def resumed(tiny_data, tmp_path):
    """The outcome of going on from this checkpoint."""

    def resume(checkpoint: pg.Checkpoint) -> tuple[bytes, list[str]]:
        trainer = make_trainer(tiny_data, tmp_path, CHECKPOINT_EVERY="0")
        trainer.run = trainer.run._replace(checkpoint=checkpoint)
        return outcome(trainer)

    return resume


@pytest.mark.parametrize("step", POINTS)
def test_a_checkpoint_as_it_is_leads_to_the_same_artifact(step, reference, resumed):
    artifact, lines = resumed(reference.checkpoints[step])
    assert artifact == reference.artifact
    assert lines == [line for line in reference.lines if int(re.search(r"step:(\d+)", line)[1]) > step]


PIECES = ["weight.", "ema.", "adam.exp_avg.", "adam.exp_avg_sq.", "adam.step.", "momentum."]
PLACES = [(step, piece) for step in POINTS for piece in PIECES]
PLACES += [(AFTER_QAT, "row_scale."), (IN_SWA, "row_scale."), (IN_SWA, "swa.")]


@pytest.mark.parametrize("step, piece", PLACES)
def test_a_checkpoint_with_other_tensors_leads_to_another_artifact(step, piece, reference, resumed):
    checkpoint = reference.checkpoints[step]
    tensors = {name: 1.5 * x if name.startswith(piece) else x for name, x in checkpoint.tensors.items()}
    changed = [name for name in tensors if not torch.equal(tensors[name], checkpoint.tensors[name])]
    assert changed and all(name.startswith(piece) for name in changed)
    assert resumed(checkpoint._replace(tensors=tensors))[0] != reference.artifact


@pytest.mark.parametrize(
    "step, changed",
    [
        *((step, dict(step=step - 1)) for step in POINTS),
        *((step, dict(switches=dict(late_qat=step == BEFORE_QAT))) for step in POINTS),
        (IN_SWA, dict(swa_samples=2)),
    ],
    ids=str,
)
def test_a_checkpoint_with_another_switch_or_count_leads_to_another_artifact(step, changed, reference, resumed):
    checkpoint = reference.checkpoints[step]
    assert all(checkpoint.meta[name] != value for name, value in changed.items())
    assert resumed(checkpoint._replace(meta=checkpoint.meta | changed))[0] != reference.artifact


@pytest.mark.parametrize("step", POINTS)
def test_the_state_is_restored_tensor_by_tensor(step, reference, tiny_data, tmp_path):
    trainer, checkpoint = make_trainer(tiny_data, tmp_path), reference.checkpoints[step]
    trainer.warm_up()
    torch.rand(1)  # moves torch's own generator
    trainer.restore(checkpoint)
    state = trainer.state() | dict(random=torch.get_rng_state())
    assert state.keys() == checkpoint.tensors.keys()
    assert [name for name, x in state.items() if not torch.equal(x, checkpoint.tensors[name])] == []
    kinds = {name.partition(".")[0] for name in state}
    assert kinds == {"weight", "ema", "adam", "momentum", "row_scale", "random", *["swa"] * (step == IN_SWA)}
    clock, meta = trainer.clock, checkpoint.meta
    assert (trainer.step, clock.step, clock.loss) == (step, step, meta["loss"]) and clock.durations
    assert (clock.elapsed_ms, clock.local_ms()) == (meta["elapsed_ms"],) * 2 and trainer.saved_ms == clock.elapsed_ms
    assert list(clock.durations) == meta["durations"]


# -----------------------------------------------------------------------------
# THE CLOCK
# -----------------------------------------------------------------------------

TIMED = dict(MAX_WALLCLOCK_SECONDS=4, ITERATIONS=1000, WARMDOWN_ITERS=30, VAL_LOSS_EVERY=0)


def step_ms(step: int) -> float:
    return 62.5 * (1 + step % 3)  # exact in binary


@pytest.fixture
def timed(monkeypatch) -> list[float]:
    """The time, of which a step takes step_ms, and nothing else takes any."""
    now, train_step = [0.0], pg.Trainer.train_step

    def slow(trainer: pg.Trainer, *batch: torch.Tensor) -> torch.Tensor:
        now[0] += step_ms(trainer.step) / 1000
        return train_step(trainer, *batch)

    monkeypatch.setattr(pg.Trainer, "train_step", slow)
    monkeypatch.setattr(
        pg, "time", SimpleNamespace(perf_counter=lambda: now[0], strftime=time.strftime, monotonic=time.monotonic)
    )
    return now


def test_the_clock_goes_on_and_the_schedule_with_it(timed, go):
    whole = go(run_id="whole", **TIMED)
    steps, seconds = whole.result["steps"], whole.result["train_seconds"]
    assert f"stopping_early: wallclock_cap train_time:{1000 * seconds:.0f}ms step:{steps}/1000\n" in whole.out
    assert whole.code == 0 and 20 < steps < 40 and 3.5 < seconds <= 4
    assert whole.result["exported"] == "swa" and "late_qat:enabled" in whole.out
    with signal_after(7):
        first = go(**TIMED, **ON_SIGNAL)
    with signal_after(17):
        second = go(RESUME="auto", **TIMED, **ON_SIGNAL)
    last = go(RESUME="auto", **TIMED)
    assert (first.code, second.code) == (143, 143)
    assert_same(last, whole)
    assert last.result["train_seconds"] == seconds
    begun = re.findall(r"^resume:step:(\d+) train_time:(\d+)ms", second.out + last.out, re.MULTILINE)
    resumed = last.result["resumed_at"]
    assert [int(step) for step, _ in begun] == resumed and 7 < resumed[0] < 17 < resumed[1] < steps
    for (step, ms), ran in zip(begun, (second, last), strict=True):
        spent = sum(step_ms(k) for k in range(int(step)))
        assert ms == f"{spent:.0f}"
        after = int(step) + 1
        assert re.search(
            rf"^step:{after}/1000 .* train_time:{spent + step_ms(after - 1):.0f}ms ", ran.out, re.MULTILINE
        )


def test_the_clock_stands_still_while_a_checkpoint_is_written(timed, go):
    def wait(_) -> None:
        timed[0] += 1000

    whole = go(run_id="whole", **TIMED)
    with before_call(os, "fsync", wait):
        ran = go(**TIMED, **EVERY_STEP)
    assert_same(ran, whole)
    assert ran.result["train_seconds"] == whole.result["train_seconds"]
    assert ran.result["phase_seconds"]["checkpoint"] == 1000 * ran.result["steps"]


def test_another_clock_in_the_checkpoint_is_another_schedule(timed, go, tmp_path):
    whole = go(run_id="whole", **TIMED)
    with signal_after(9):
        cut = go(**TIMED, **ON_SIGNAL)
    (path,) = cut.folder.iterdir()
    checkpoint = pg.read_checkpoint(path)
    for name, value in dict(elapsed_ms=2000.0, durations=[300.0] * 9).items():
        altered = write(tmp_path / name, checkpoint.meta | {name: value}, checkpoint.tensors)
        ran = go(run_id=f"other-{name}", RESUME=altered, **TIMED)
        assert ran.code == 0 and ran.artifact != whole.artifact and ran.result["train_seconds"] <= 4


# -----------------------------------------------------------------------------
# WORLD SIZES
# -----------------------------------------------------------------------------

# Jobs of two and of three processes in the same three, one after the other: starting torchrun takes longer than all of
# them. Runs named cut… get a signal on their last rank alone; resumed ones leave digests of each rank's state.
WORLDS_DRIVER = """
import hashlib, json, os, signal, sys
import torch.distributed as dist
sys.path.insert(0, {root!r})
import train_gpt

rank, codes = int(os.environ["RANK"]), {{}}
report, restore = train_gpt.Trainer.report, train_gpt.Trainer.restore

def reported(trainer):
    report(trainer)
    if trainer.run.folder.name.startswith("cut") and trainer.step == 2 and rank == size - 1:
        signal.raise_signal(signal.SIGTERM)

def restored(trainer, checkpoint):
    restore(trainer, checkpoint)
    state = trainer.state()
    digests = {{name: hashlib.sha256(x.detach().numpy().tobytes()).hexdigest() for name, x in state.items()}}
    with open("state-" + trainer.run.folder.name + "-" + str(rank), "w") as file:
        json.dump([digests, trainer.step, trainer.qat.on, trainer.averages.swa_samples], file)

train_gpt.Trainer.report, train_gpt.Trainer.restore = reported, restored
for job in json.loads(os.environ["JOBS"]):
    size = int(job["WORLD_SIZE"])
    if rank < size:
        codes[job["RUN_ID"]] = train_gpt.main([], {{**os.environ, **job}})
        if dist.is_initialized():
            dist.destroy_process_group()
with open("codes" + str(rank), "w") as file:
    json.dump(codes, file)
"""
WORLD = RANKS | dict(ITERATIONS=6, VAL_LOSS_EVERY=0, TRAIN_LOG_EVERY=1, TTT_ENABLED=0, EVAL_STRIDE=0)


class Worlds(NamedTuple):
    alone: Ran  # uninterrupted, one process
    cut: dict[int, Ran]  # interrupted after step 3, by world size
    resumed: dict[tuple[int, int], Ran]  # by the sizes before and after
    states: dict[int, list]  # of a checkpoint within SWA, as each rank restored it, by world size
    codes: list[dict[str, int]]  # of each rank, by run


@pytest.fixture(scope="module")
def worlds(tiny_data, kept, tmp_path_factory) -> Worlds:
    """Runs interrupted at one world size and resumed at another."""
    one, many = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("many")
    alone = run_here(one, tiny_data, "alone", **WORLD)
    with signal_after(2):
        cut = {1: run_here(one, tiny_data, "cut1", **WORLD, **ON_SIGNAL)}

    def left(name: str) -> Ran:
        return Ran(0, ran.stdout, ran.stderr, many / "runs" / name, many / "logs" / f"{name}.txt")

    jobs, within = [], TINY_ENV | QUICK | dict(DATA_PATH=tiny_data, RESUME=kept.checkpoints[IN_SWA])
    for size in (2, 3):
        for before in range(1, size):
            path = checkpoint_of((one if before == 1 else many) / "runs" / f"cut{before}", 3)
            jobs.append(tiny_environ(tiny_data, **WORLD, RUN_ID=f"from{before}to{size}", RESUME=path))
        jobs.append({name: str(value) for name, value in within.items()} | dict(RUN_ID=f"within{size}"))
        jobs.append(tiny_environ(tiny_data, **WORLD, **ON_SIGNAL, RUN_ID=f"cut{size}"))
        jobs = [dict(WORLD_SIZE=str(size)) | job for job in jobs]
    (many / "driver.py").write_text(WORLDS_DRIVER.format(root=str(ROOT)))
    ran, _ = torchrun(3, many / "driver.py", many, JOBS=json.dumps(jobs))
    assert ran.returncode == 0, ran.stderr
    cut |= {size: left(f"cut{size}") for size in (2, 3)}
    resumed = {(before, size): left(f"from{before}to{size}") for before, size in ((1, 2), (1, 3), (2, 3))}
    for size in (2, 3):
        resumed[size, 1] = run_here(one, tiny_data, f"from{size}", **WORLD, RESUME=checkpoint_of(cut[size].folder, 3))
    states = {
        size: [json.loads((many / f"state-within{size}-{r}").read_text()) for r in range(size)] for size in (2, 3)
    }
    codes = [json.loads((many / f"codes{rank}").read_text()) for rank in range(3)]
    return Worlds(alone, cut, resumed, states, codes)


def test_a_checkpoint_resumes_at_another_world_size(worlds):
    assert len(worlds.resumed) == 5
    for (before, after), ran in worlds.resumed.items():
        assert ran.result["resumed_at"] == [3] and ran.result["steps"] == worlds.alone.result["steps"] == 6
        assert ran.result["world_size"] == after
        assert difference(ran, worlds.alone) < 1e-5, (before, after)


def test_a_signal_on_one_rank_ends_all_of_them_with_a_checkpoint(worlds):
    for codes in worlds.codes:
        assert all(code == (143 if name.startswith("cut") else 0) for name, code in codes.items())
    assert [len(codes) for codes in worlds.codes] == [7, 7, 4]
    for size in (2, 3):
        cut = worlds.cut[size]
        said = f"interrupted: SIGTERM; go on with the same command and RESUME=runs/cut{size}/checkpoint-3.pgckpt\n"
        assert cut.err.count(said) == 1 and cut.log.read_text("utf-8").endswith("\n" + said)
        assert names_in(cut.folder) == {"checkpoint-3.pgckpt"}


def test_every_rank_restores_the_whole_state(worlds, kept):
    checkpoint = pg.read_checkpoint(kept.checkpoints[IN_SWA])
    tensors = {name: x for name, x in checkpoint.tensors.items() if name != "random"}
    expected = {name: hashlib.sha256(x.numpy().tobytes()).hexdigest() for name, x in tensors.items()}
    assert checkpoint.meta["switches"]["late_qat"] and checkpoint.meta["swa_samples"] == 1
    for states in worlds.states.values():
        assert states == [[expected, IN_SWA, True, 1]] * len(states)


def test_a_world_size_that_does_not_divide_the_batch_is_the_usual_error(go, kept):
    ran = go(RESUME=kept.checkpoints[BEFORE_QAT], WORLD_SIZE=5, RANK=0, LOCAL_RANK=0)
    said = "error: TRAIN_BATCH_TOKENS=384 must be a multiple of WORLD_SIZE=5 x TRAIN_SEQ_LEN=32\n"
    assert (ran.code, ran.out, ran.err) == (2, "", said)


class OneOfMany(pg.Ranks):
    """A rank that hears of no other, and need not where everything is in the checkpoint."""

    def __init__(self, rank: int, size: int):
        vars(self).update(vars(single_rank()) | dict(rank=rank, size=size))

    def broadcast_(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def broadcast_object(self, x: object) -> object:
        return x

    def agree(self, work):
        return work()

    def start_all_gather(self, full: torch.Tensor, shard: torch.Tensor):
        return pg.NOTHING_TO_WAIT_FOR

    @property
    def is_main(self) -> bool:
        return True


# With MLP_MULT=2 the bank of the queries is as large as that of the MLP at world size 1, and smaller at others.
@pytest.mark.parametrize("layers, mlp_mult", [(3, 2.0), (5, 3.0), (5, 2.0), (11, 2.0)])
def test_each_matrix_finds_its_momentum_at_every_world_size(layers, mlp_mult, tmp_path):
    hp = tiny_hp(num_layers=layers, mlp_mult=mlp_mult, train_batch_tokens=24 * 16)
    writer = pg.Trainer(make_run(hp, SimpleNamespace(fingerprint=""))._replace(folder=tmp_path))
    for i, bank in enumerate(writer.optimizers.banks):
        bank.momentum.copy_(torch.arange(bank.momentum.numel()).view_as(bank.momentum) + 1000 * i)
    writer.save()
    names = {p: name for name, p in writer.model.named_parameters()}
    banks = writer.optimizers.banks
    expected = {names[p]: m for bank in banks for p, m in zip(bank.parameters, bank.momentum, strict=True)}
    checkpoint = pg.read_checkpoint(checkpoint_of(tmp_path, 0))
    for size in (2, 3, 8):
        readers = [pg.Trainer(writer.run._replace(ranks=OneOfMany(rank, size))) for rank in range(size)]
        for reader in readers:
            reader.restore(checkpoint)
        names = {p: name for name, p in readers[0].model.named_parameters()}
        found = {}
        for i, bank in enumerate(readers[0].optimizers.banks):
            whole = torch.cat([reader.optimizers.banks[i].momentum for reader in readers])
            found |= {names[p]: m for p, m in zip(bank.parameters, whole, strict=False)}
            assert not whole[len(bank.parameters) :].any()
        assert [name for name, m in expected.items() if not torch.equal(found[name], m)] == []


# -----------------------------------------------------------------------------
# REFUSALS
# -----------------------------------------------------------------------------


@pytest.fixture
def refused(go, tmp_path):
    """What a run that does not begin says, after `error: `."""

    def start(**settings) -> str:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        ran = go(**settings)
        assert (ran.code, ran.out) == (2, "") and re.fullmatch(r"error: [^\n]+\n", ran.err)
        assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        return ran.err.removeprefix("error: ").rstrip("\n")

    return start


@pytest.fixture
def path(kept) -> Path:
    return kept.checkpoints[BEFORE_QAT]


def test_other_settings_are_refused_and_each_is_named(refused, path):
    said = refused(RESUME=path, SEED=7, MUON_WD=0.1, EMA_ENABLED=0, EVAL_STRIDE=8)
    differences = "SEED=7 here, 1337 there; MUON_WD=0.1 here, 0.04 there; EMA_ENABLED=False here, True there"
    assert said == f"{path} was made with other settings: {differences}; EVAL_STRIDE=8 here, 0 there"


def test_every_setting_is_compared_but_those_that_may_change(path, monkeypatch):
    checkpoint, source = pg.read_checkpoint(path), (ROOT / "train_gpt.py").read_bytes()
    settings = checkpoint.meta["settings"]
    hp, refused = pg.Hyperparameters(**settings | dict(resume=str(path))), []
    for name in settings:
        altered = checkpoint._replace(meta=checkpoint.meta | dict(settings=settings | {name: "another"}))
        monkeypatch.setattr(pg, "read_checkpoint", lambda path, altered=altered: altered)
        try:
            assert pg.find_resumed(hp, source) is altered
        except pg.UserError as error:
            assert str(error).endswith(f"other settings: {name.upper()}={settings[name]} here, another there")
            refused.append(name)
    assert set(refused) == set(settings) - set(pg.MAY_CHANGE)


def test_settings_that_may_change_change_nothing_that_counts(go, path, plain, tiny_data, tmp_path):
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    changed = dict(
        RUN_ID="other", OUT_DIR=tmp_path / "out", TOKENIZER_PATH=next(tiny_data.glob("*.model")), RESUME=path
    )
    changed |= dict(CHECKPOINT_EVERY=1e-6, TRAIN_LOG_EVERY=3, VAL_LOSS_EVERY=0, SAVE_WEIGHTS=1, SAVE_SCORES=1)
    changed |= dict(CASEOPS_ENABLED=0)
    assert {*map(str.lower, changed), "data_path", "micro_batch_tokens"} == set(pg.MAY_CHANGE)
    out = tmp_path / "out"
    ran = go(data, **changed)._replace(folder=out / "runs" / "other", log=out / "logs" / "other.txt")
    assert (ran.code, ran.err) == (0, "") and ran.artifact == plain.artifact
    assert ran.result["scores"] == plain.result["scores"] and ran.result["blocks"] == plain.result["blocks"]
    assert path.exists()  # not of this run's folder
    micro = go(RESUME=path, MICRO_BATCH_TOKENS=96)
    assert micro.code == 0 and "grad_accum_steps:4" in micro.out
    for label, score in micro.result["scores"].items():
        assert score["val_bpb"] == pytest.approx(plain.result["scores"][label]["val_bpb"], abs=1e-3)


def test_a_run_that_goes_on_elsewhere_has_a_complete_log_there(go, path):
    text = go(run_id="elsewhere", RESUME=path).log.read_text("utf-8")
    assert len(SOURCE.findall(text)) == 1 and len(re.findall(r"^settings \{", text, re.MULTILINE)) == 1


def changed_copy(data: Path, folder: Path, pattern: str, offset: int | None) -> Path:
    """The data with one bit of one file flipped, or an unknown field at its end."""
    copy = Path(shutil.copytree(data, folder))
    (copy / "manifest.json").unlink()  # which would tell of another tokenizer
    (path,) = sorted(copy.glob(pattern))[:1]
    content = bytearray(path.read_bytes())
    if offset is None:
        content += b"\x9a\x06\x00"  # of a tokenizer: the same pieces in another file
    else:
        content[offset] ^= 1
    path.write_bytes(content)
    return copy


CHANGES = {
    "training shards": ("fineweb_train_*.bin", 1024 + 2 * 100),
    "validation shards": ("fineweb_val_*.bin", -2),
    "tokenizer": ("*.model", None),
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_data_are_refused(what, refused, path, tiny_data, tmp_path):
    data = changed_copy(tiny_data, tmp_path / "data", *CHANGES[what])
    said = refused(data=data, RESUME=path)
    here, there = re.fullmatch(
        rf"{path} was made with other {what} \(fingerprint ([0-9a-f]{{16}}), here ([0-9a-f]{{16}})\)", said
    ).groups()
    assert here != there


def test_another_train_gpt_is_refused(refused, path, tmp_path, monkeypatch):
    other = tmp_path / "train_gpt.py"
    other.write_bytes((ROOT / "train_gpt.py").read_bytes() + b"# one more line\n")
    monkeypatch.setattr(pg, "__file__", str(other))
    assert refused(RESUME=path) == (f"{path} was made by another train_gpt.py; the log of its run holds that source")


def test_another_dtype_is_refused(refused, path, go, monkeypatch):
    assert refused(RESUME=path, DTYPE="bf16").endswith("other settings: DTYPE=bf16 here, fp32 there")
    with signal_after(2):
        cut = go(run_id="auto", DTYPE="auto", **ON_SIGNAL)
    (path,) = cut.folder.iterdir()
    here = str(torch.bfloat16 if "dtype:float32" in cut.out else torch.float32)
    there = "torch.float32" if "dtype:float32" in cut.out else "torch.bfloat16"
    monkeypatch.setattr(pg, "activation_dtype", lambda *_: getattr(torch, here.removeprefix("torch.")))
    assert refused(RESUME=path, DTYPE="auto") == f"{path} was made with {there}, here it would be {here}; set DTYPE"


def test_auto_needs_the_run_id(refused):
    assert refused(run_id="", RESUME="auto") == "RESUME=auto needs the RUN_ID to go on with"


def test_a_run_that_has_ended_is_not_resumed(refused, go):
    ran = go(ITERATIONS=1)
    assert refused(RESUME="auto", ITERATIONS=1) == (
        f"RUN_ID=run has ended: {ran.folder / 'result.json'}; there is nothing to resume"
    )


def test_paths_that_hold_no_checkpoint_are_refused(refused, plain, tmp_path):
    missing, artifact, noise = tmp_path / "missing", plain.folder / "artifact.pgolf", tmp_path / "noise"
    noise.write_bytes(random.Random(0).randbytes(100_000))
    assert refused(RESUME=missing) == f"cannot read the checkpoint {missing}: No such file or directory"
    assert refused(RESUME=tmp_path) == f"cannot read the checkpoint {tmp_path}: Is a directory"
    os.mkfifo(tmp_path / "pipe")
    assert refused(RESUME=tmp_path / "pipe") == f"cannot read the checkpoint {tmp_path / 'pipe'}: it is no regular file"
    with (huge := tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    for path in (artifact, noise, plain.log, huge):
        assert refused(RESUME=path) == f"{path} is no checkpoint of this script; there is no other one"


def test_a_log_that_cannot_be_read_is_named(refused, tmp_path):
    (log := tmp_path / "logs" / "run.txt").mkdir(parents=True)
    assert refused(RESUME="auto") == f"cannot read OUT_DIR={tmp_path}: Is a directory ({log})"


def test_scoring_an_artifact_is_not_resumed(refused, path, plain):
    said = "RESUME goes on with training; leave out EVAL_ONLY and EXPORT_ONLY"
    assert refused(RESUME=path, EVAL_ONLY=1, ARTIFACT_PATH=plain.folder / "artifact.pgolf") == said


def test_auto_without_a_checkpoint_starts_from_the_beginning(go, plain):
    with signal_after(3):
        cut = go()
    text = cut.log.read_text("utf-8")
    ran = go(RESUME="auto")
    assert_same(ran, plain)
    assert ran.result["resumed_at"] == [] and "resume:step" not in ran.out
    assert (aside := ran.log.with_name("run.dead-1.txt")).read_text("utf-8") == text
    assert f"log:set_aside {aside} left no checkpoint to go on from\n" in ran.out
    assert len(re.findall(r"^settings \{", ran.log.read_text("utf-8"), re.MULTILINE)) == 1
    fresh = go(run_id="fresh", RESUME="auto")  # without a log either
    assert_same(fresh, plain)


def test_every_start_that_left_nothing_has_a_log_of_its_own(go, plain):
    for _ in range(2):
        with signal_after(3):
            go(RESUME="auto")
    ran = go(RESUME="auto")
    assert_same(ran, plain)
    assert names_in(ran.log.parent) == {"run.dead-1.txt", "run.dead-2.txt", "run.txt"}


def test_a_run_id_is_one_runs_for_its_life(go, tiny_data, tmp_path, plain):
    """Locked while the process lives, whatever the second start asks for; a kill -9 gives it free."""
    endless = dict(DATA_PATH=tiny_data, OUT_DIR=tmp_path, RUN_ID="run", ITERATIONS=10**6)
    environ = clean_environ(**{**TINY_ENV, **QUICK, **endless})
    first = subprocess.Popen([sys.executable, ROOT / "train_gpt.py"], env=environ, stdout=subprocess.PIPE, text=True)
    try:
        for line in first.stdout:
            if line.startswith("step:1/"):
                break
        log = tmp_path / "logs" / "run.txt"
        said = f"error: RUN_ID=run is running now and holds {log}; choose another or wait for its end\n"
        for settings in ({}, dict(RESUME="auto"), dict(EVAL_ONLY=1, ARTIFACT_PATH=plain.folder / "artifact.pgolf")):
            ran = go(**settings)
            assert (ran.code, ran.out, ran.err) == (2, "", said)
        assert names_in(log.parent) == {"run.txt"} and log.read_text("utf-8").count("code_sha256:") < 40
    finally:
        first.kill()
        first.wait()
        first.stdout.close()
    assert_same(go(RESUME="auto"), plain)


def test_a_log_that_is_set_aside_while_another_start_opens_it_is_not_that_starts(tmp_path, monkeypatch):
    import fcntl

    path, lock = tmp_path / "run.txt", fcntl.flock
    path.write_text("dead\n")

    def late(file, how) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        running.append(pg.Log(path))
        running[0].set_aside()
        lock(file, how)

    running = []
    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(pg.UserError, match="RUN_ID=run is running now"):
        pg.Log(path)
    assert names_in(tmp_path) == {"run.txt", "run.dead-1.txt"}
    running[0].close()


def test_a_file_system_without_locks_is_named(tmp_path, capsys, monkeypatch):
    import fcntl

    def refuse(*_) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    pg.Log(tmp_path / "run.txt")("line")
    assert capsys.readouterr().err == (
        f"warning: {tmp_path / 'run.txt'} cannot be locked ([Errno {errno.ENOLCK}] {os.strerror(errno.ENOLCK)}); "
        "do not use its RUN_ID twice\n"
    )
    assert (tmp_path / "run.txt").read_text() == "line\n"


def test_a_log_that_is_there_is_an_error_without_resume(go):
    with signal_after(3):
        cut = go(**ON_SIGNAL)
    ran = go(**ON_SIGNAL)
    assert ran.code == 2 and ran.err.startswith(
        f"error: RUN_ID=run has a log already; choose another or move {cut.log}"
    )
    assert len(names_in(cut.folder)) == 1


def test_going_back_to_an_older_checkpoint_leaves_the_newer_ones_behind(folder, go, kept, plain, path):
    """Only what the run itself writes now counts: RESUME=auto does not jump ahead to what was given up."""
    for step in (8, 9):
        shutil.copy(kept.checkpoints[step], folder)
    with signal_after(5):
        cut = go(RESUME=path, **EVERY_STEP)
    assert cut.code == 143
    saved = Path(re.fullmatch(r"interrupted: SIGTERM; go on with the same command and RESUME=(\S+)\n", cut.err)[1])
    assert saved.exists() and step_of(saved) < 8
    ran = go(RESUME="auto", **EVERY_STEP)
    assert (ran.code, ran.err) == (0, "") and ran.artifact == plain.artifact
    assert ran.result["resumed_at"] == [BEFORE_QAT, step_of(saved)]
    assert names_in(ran.folder) == {"artifact.pgolf", "result.json"}


# -----------------------------------------------------------------------------
# DAMAGED AND FORGED FILES
# -----------------------------------------------------------------------------


def write(path: Path, meta: dict, tensors: dict[str, torch.Tensor]) -> Path:
    pg.write_atomic(path, pg.checkpoint_parts(meta, tensors))
    return path


@pytest.fixture
def pair(folder, kept) -> tuple[Path, Path]:
    """The two newest checkpoints of an unfinished run, the older first."""
    return tuple(Path(shutil.copy(kept.checkpoints[step], folder)) for step in (7, 8))


def assert_damage_is_seen(path: Path, older: Path) -> None:
    with pytest.raises(pg.UserError) as caught:
        pg.read_checkpoint(path)
    said = str(caught.value)
    assert said.count(str(path)) == 1 and said.endswith(f"; RESUME={older} is another one") and "\n" not in said


def header_end(blob: bytes) -> int:
    start = len(pg.CHECKPOINT_MAGIC)
    return start + 8 + struct.unpack("<Q", blob[start : start + 8])[0]


def test_a_truncated_checkpoint_is_refused(pair):
    older, path = pair
    blob, dice = path.read_bytes(), random.Random(0)
    end, size = header_end(blob), len(blob)
    places = [0, 1, 7, 8, 9, 15, 16, 17, 40, 47, 48, 49, end - 1, end, end + 1, end + 4, size // 2]
    places += [size - 64, size - 33, size - 32, size - 31, size - 4, size - 1, *dice.sample(range(size), 27)]
    for place in places:
        path.write_bytes(blob[:place])
        assert_damage_is_seen(path, older)
    for longer in (blob + b"\0", blob + blob[-32:], blob + blob):
        path.write_bytes(longer)
        assert_damage_is_seen(path, older)
    assert len(set(places)) >= 50


def test_a_checkpoint_with_one_bit_flipped_is_refused(pair):
    older, path = pair
    blob, dice = bytearray(path.read_bytes()), random.Random(0)
    end, size = header_end(blob), len(blob)
    parts = [range(8), range(8, 16), range(16, end), range(end, size - 32), range(size - 32, size)]
    places = [(place, bit) for part in parts for place in dice.sample(part, 8) for bit in dice.sample(range(8), 2)]
    places += [(place, dice.randrange(8)) for place in dice.sample(range(size), 20)]
    for place, bit in places:
        blob[place] ^= 1 << bit
        path.write_bytes(blob)
        assert_damage_is_seen(path, older)
        blob[place] ^= 1 << bit
    assert len(set(places)) >= 100
    path.write_bytes(blob)
    assert pg.read_checkpoint(path).meta["step"] == 8  # whole again


def test_a_damaged_checkpoint_ends_the_run_and_the_older_one_makes_the_same_artifact(pair, go, refused, plain):
    older, path = pair
    blob = path.read_bytes()
    path.write_bytes(blob[:-1000])
    said = refused(RESUME="auto")
    assert said.startswith(f"the checkpoint {path} is damaged or not whole: its checksum does not match; ")
    named = Path(re.search(r"; RESUME=(\S+) is another one$", said)[1])
    assert named == older
    ran = go(RESUME=named, **EVERY_STEP)
    assert (ran.code, ran.err) == (0, "") and ran.artifact == plain.artifact and ran.result["resumed_at"] == [7]
    assert names_in(ran.folder) == {"artifact.pgolf", "result.json"}


def test_a_damaged_checkpoint_without_another_says_so(pair):
    older, path = pair
    older.unlink()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(pg.UserError, match="; there is no other one$"):
        pg.read_checkpoint(path)


def forge(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    """A file with a correct checksum."""
    body = pg.CHECKPOINT_MAGIC + struct.pack("<Q", len(header) if length is None else length) + header + data
    path.write_bytes(body + hashlib.sha256(body).digest())
    return path


def table(*rows) -> bytes:
    return json.dumps(dict(tensors=rows)).encode()


NONSENSE = {
    "empty": b"",
    "no JSON": b"{]",
    "no UTF-8": b"\xff\xfe",
    "null": b"null",
    "a list": b"[]",
    "a number": b"1e999",
    "no table": b"{}",
    "a number as table": b'{"tensors": 3}',
    "a row too short": table(["a", [2]]),
    "more than there is": table(["a", [2], "float32"]),
    "a negative length": table(["a", [-1], "float32"]),
    "a fraction": table(["a", [1.5], "float32"]),
    "a text as shape": table(["a", "ab", "float32"]),
    "beyond 64 bits": table(["a", [1 << 80], "float32"]),
    "infinite": b'{"tensors": [["a", [Infinity], "float32"]]}',
    "objects": table(["a", [1], "object"]),
    "texts": table(["a", [1], "U1"]),
    "no dtype": table(["a", [1], "nonsense"]),
    "a list as name": table([["a"], [1], "uint8"]),
    "deep": b"[" * 100_000,
    "data that are no tensor's": table(["a", [1], "uint8"]),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_nonsense_header_with_a_correct_checksum_is_refused(name, tmp_path):
    path = forge(tmp_path / "checkpoint-9.pgckpt", NONSENSE[name], b"abc")
    with pytest.raises(pg.UserError, match=f"^{path} is no checkpoint of this script; there is no other one$"):
        pg.read_checkpoint(path)


@pytest.mark.parametrize("length", [0, 1, 1 << 20, (1 << 64) - 1])
def test_a_header_of_an_impossible_length_is_refused(length, tmp_path):
    path = forge(tmp_path / "checkpoint-9.pgckpt", table(), length=length)
    with pytest.raises(pg.UserError, match="is no checkpoint of this script"):
        pg.read_checkpoint(path)


def without(tensors: dict, name: str) -> dict:
    return {key: x for key, x in tensors.items() if key != name}


TABLE = "weight.tok_emb.weight"
FORGED = {
    "nothing but the code": lambda meta, tensors: ({"code_sha256": meta["code_sha256"]}, tensors),
    "no data": lambda meta, tensors: (without(meta, "data"), tensors),
    "no step": lambda meta, tensors: (without(meta, "step"), tensors),
    "a text as step": lambda meta, tensors: (meta | dict(step="4"), tensors),
    "a list as settings": lambda meta, tensors: (meta | dict(settings=[]), tensors),
    "an unknown setting": lambda meta, tensors: (meta | dict(settings=meta["settings"] | dict(nonsense=1)), tensors),
    "a path as run id": lambda meta, tensors: (meta | dict(run_id="../up"), tensors),
    "a tensor less": lambda meta, tensors: (meta, without(tensors, TABLE)),
    "a tensor of another shape": lambda meta, tensors: (meta, tensors | {TABLE: tensors[TABLE][:9]}),
    "a tensor of another type": lambda meta, tensors: (meta, tensors | {TABLE: tensors[TABLE].to(torch.int64)}),
    "no momentum": lambda meta, tensors: (
        meta,
        without(tensors, next(name for name in tensors if name.startswith("momentum."))),
    ),
    "no random state": lambda meta, tensors: (meta, without(tensors, "random")),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_checkpoint_is_refused_in_one_line(name, path, go, tmp_path):
    checkpoint = pg.read_checkpoint(path)
    forged = write(tmp_path / "forged", *FORGED[name](checkpoint.meta, checkpoint.tensors))
    ran = go(run_id="", RESUME=forged)
    assert ran.code == 2 and re.fullmatch(r"error: [^\n]*/forged[^\n]*\n", ran.err)
    assert not (tmp_path / "up").exists()


def test_a_checkpoint_written_again_is_the_same_file(path, tmp_path):
    checkpoint = pg.read_checkpoint(path)
    assert write(tmp_path / "again", checkpoint.meta, checkpoint.tensors).read_bytes() == path.read_bytes()


def test_nothing_in_a_file_is_executed():
    """train_gpt.py reads with no library that could run what a file says, and runs no text as code."""
    imported, called = set(), set()
    for node in ast.walk(ast.parse((ROOT / "train_gpt.py").read_text("utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {node.module.partition(".")[0], *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Call):
            called.add(ast.unparse(node.func))
        elif isinstance(node, ast.keyword):
            assert node.arg != "allow_pickle"
    assert {"torch", "numpy", "json", "Path"} <= imported and {"json.loads", "np.frombuffer", "print"} <= called
    assert not imported & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "importlib", "load", "save"}
    assert not called & {"eval", "exec", "compile", "__import__", "np.load", "np.save", "numpy.load"}
    assert not [name for name in called if re.fullmatch(r"torch(\..+)?\.(load|save)", name)]


# -----------------------------------------------------------------------------
# A FULL DISK
# -----------------------------------------------------------------------------

full_device = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")


def full(path: Path) -> None:
    """Writing this file fails as on a full disk."""
    path.with_name(path.name + ".partial").symlink_to("/dev/full")


def no_space(_) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@full_device
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(go, plain):
    seen = []

    def look(trainer: pg.Trainer) -> None:
        folder = trainer.run.folder
        seen.append((names_in(folder), pg.read_checkpoint(checkpoint_of(folder, 4)).meta["step"]))

    with after_step(4, lambda trainer: full(checkpoint_of(trainer.run.folder, 5))), after_step(5, look):
        ran = go(**EVERY_STEP)
    assert_same(ran, plain)
    assert seen == [({"checkpoint-3.pgckpt", "checkpoint-4.pgckpt"}, 4)]
    warning = "warning: checkpoint of step 5 not written: No space left on device; "
    assert warning + f"go on with the same command and RESUME={checkpoint_of(ran.folder, 4)}\n" in ran.out
    assert ran.out.count("warning: checkpoint") == 1 and "checkpoint:written step:6 " in ran.out


def test_a_disk_that_stays_full_leaves_the_older_checkpoint_to_go_on_from(go, plain):
    with pytest.MonkeyPatch.context() as patch:
        with after_step(4, lambda _: patch.setattr(os, "fsync", no_space)), signal_after(7):
            cut = go(**EVERY_STEP)
    assert names_in(cut.folder) == {"checkpoint-3.pgckpt", "checkpoint-4.pgckpt"}
    advice = f"go on with the same command and RESUME={checkpoint_of(cut.folder, 4)}\n"
    assert (cut.code, cut.err) == (143, f"interrupted: SIGTERM; {advice}")
    lost = re.findall(
        r"^warning: checkpoint of step (\d+) not written: No space left on device; ", cut.out, re.MULTILINE
    )
    assert lost[:4] == ["5", "6", "7", "8"] and cut.out.count(advice) == len(lost)
    ran = go(RESUME="auto")
    assert_same(ran, plain)
    assert ran.result["resumed_at"] == [4]


def test_a_disk_that_is_full_from_the_start_leaves_the_advice_true(go):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with signal_after(3):
            cut = go(**EVERY_STEP)
    assert cut.code == 143 and NOTHING in cut.err and not names_in(cut.folder)
    assert "would have kept" not in cut.out + cut.err  # it was set


LAST = {
    "artifact.pgolf": "go on with the same command and RESUME={folder}/checkpoint-12.pgckpt",
    "result.json": "the artifact is whole: EVAL_ONLY=1 ARTIFACT_PATH={folder}/artifact.pgolf scores it",
}


@full_device
@pytest.mark.parametrize("name", LAST)
def test_disks_too_full_for_the_results_end_the_run_with_a_way_to_go_on(name, go, plain, monkeypatch):
    monkeypatch.setattr(pg.Log, "rescue", lambda *_: None)
    with before_call(pg, "export", lambda run, _: full(run.folder / name)):
        cut = go(**EVERY_STEP)
    path, advice = cut.folder / name, LAST[name].format(folder=cut.folder)
    said = f"error: cannot write {path}: No space left on device, nor anywhere else; {advice}\n"
    assert (cut.code, cut.err) == (2, said) and cut.log.read_text("utf-8").endswith("\n" + said)
    checkpoints = {"checkpoint-11.pgckpt", "checkpoint-12.pgckpt"}
    assert names_in(cut.folder) == checkpoints | ({"artifact.pgolf"} if name == "result.json" else set())
    assert_same(go(RESUME="auto"), plain)


@full_device
def test_disks_too_full_for_the_artifact_of_a_run_without_checkpoints(go, monkeypatch):
    monkeypatch.setattr(pg.Log, "rescue", lambda *_: None)
    with before_call(pg, "export", lambda run, _: full(run.folder / "artifact.pgolf")):
        cut = go()
    said = f"error: cannot write {cut.folder / 'artifact.pgolf'}: No space left on device, nor anywhere else; {NOTHING}"
    assert (cut.code, cut.err) == (2, said + "\n") and not names_in(cut.folder)


@full_device
@pytest.mark.parametrize("name", ["artifact.pgolf", "weights.pgolf", "result.json"])
def test_what_a_full_disk_does_not_take_is_written_where_there_is_room(name, go, plain, tmp_path, monkeypatch):
    refuge = tmp_path / "temporary"
    refuge.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(refuge))
    before = "save_weights" if name == "weights.pgolf" else "export"
    with before_call(pg, before, lambda run, _: full(run.folder / name)):
        ran = go(SAVE_WEIGHTS=1)
    (kept,) = refuge.rglob("*.*")
    assert ran.code == 0 and kept.name == name and kept.parent.name.startswith("run-")
    assert f"warning: cannot write {ran.folder / name}: No space left on device; it is {kept}\n" in ran.out
    result = json.loads(ran.out.splitlines()[-1].removeprefix("result "))
    assert result["headline"] == plain.result["headline"]
    if name != "weights.pgolf":
        assert re.search(rf"^files: .* {re.escape(str(kept))}( |$)", ran.out, re.MULTILINE)
    if name == "result.json":  # a job that is restarted until it ends must not train again
        again, log = go(RESUME="auto"), ran.log.read_bytes()
        assert (again.code, again.out) == (2, "") and f"has ended already: see the end of {ran.log}" in again.err
        assert ran.log.read_bytes() == log
    if name == "artifact.pgolf":
        assert kept.read_bytes() == plain.artifact
        assert go(run_id="again", EVAL_ONLY=1, ARTIFACT_PATH=kept).result["headline"] == plain.result["headline"]


def test_the_next_folder_is_tried_where_one_is_full_or_missing(tmp_path, monkeypatch):
    log, home = pg.Log(tmp_path / "run.txt"), tmp_path / "home"
    home.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    monkeypatch.setattr(Path, "home", lambda: home)
    kept = log.rescue("result.json", b"{}")
    assert kept.read_bytes() == b"{}" and kept.parent.parent == home and kept.parent.stat().st_mode & 0o777 == 0o700
    assert log.rescue("other", b"") == kept.with_name("other")
    monkeypatch.setattr(pg, "write_atomic", lambda *_: no_space(_))
    assert log.rescue("result.json", b"{}") is None


def test_too_little_space_is_refused_before_training_with_the_figures(go, monkeypatch, tmp_path):
    hp = pg.Hyperparameters.from_env(STATE)
    needed = pg.bytes_to_write(hp)
    assert needed > 3 << 20
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    ran = go(**EVERY_STEP)
    figures = f"has {needed - 1:,} bytes free; this run may write {needed:,}"
    assert (ran.code, ran.out, ran.err) == (2, "", f"error: OUT_DIR={tmp_path} {figures}\n")
    assert not ran.log.exists() and not ran.folder.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    assert go(**EVERY_STEP).code == 0


def test_a_run_writes_no_more_than_it_asks_for(kept):
    hp = pg.Hyperparameters.from_env(STATE)
    largest = max(path.stat().st_size for path in kept.checkpoints.values())
    without = pg.bytes_to_write(dataclasses.replace(hp, checkpoint_every=0.0))
    assert 3 * largest < pg.bytes_to_write(hp) - without < 4 * largest
    assert without > len(kept.ran.artifact) + kept.ran.log.stat().st_size
    saved = pg.bytes_to_write(dataclasses.replace(hp, checkpoint_every=0.0, save_weights=True))
    assert saved - without == 4 * int(re.search(r"^model_params:(\d+)$", kept.ran.out, re.MULTILINE)[1])


def test_a_run_that_had_enough_space_has_enough_to_go_on(go, monkeypatch, tmp_path, plain):
    """The checkpoints that lie there are part of what it was to write."""
    capacity = pg.bytes_to_write(pg.Hyperparameters.from_env(STATE))

    def usage(_) -> SimpleNamespace:
        return SimpleNamespace(free=capacity - sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with signal_after(7):
        cut = go(**EVERY_STEP)
    assert cut.code == 143 and len(names_in(cut.folder)) == 2
    assert_same(go(RESUME="auto", **EVERY_STEP), plain)
