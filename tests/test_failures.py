"""Failures while a run goes on: what it says, how it ends, and what can still be saved."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from broken import at_call, spoil_gradient, spoil_loss
from conftest import ROOT, TINY_ENV, Ran, clean_environ, run_here
from helpers import make_run, random_tokens, tiny_hp
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt as pg

# Calls of what is broken are steps; a checkpoint after every step whose time is known.
SETTINGS = dict(WARMUP_STEPS=0, VAL_LOSS_EVERY=0, CHECKPOINT_EVERY=1e-6, TTT_ENABLED=0, EVAL_STRIDE=0)


def newest(folder: Path) -> pg.Checkpoint:
    return pg.read_checkpoint(pg.find_checkpoints(folder)[-1])


def resumed(message: str) -> Path:
    """The checkpoint that a message advises to go on from."""
    return Path(re.search(r"go on with the same command and RESUME=(\S+)", message)[1])


def all_finite(checkpoint: pg.Checkpoint) -> bool:
    return all(bool(t.isfinite().all()) for t in checkpoint.tensors.values())


@pytest.fixture
def data(tiny_data, tmp_path) -> Path:
    """A copy of the tiny data set that a test may break."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


@pytest.fixture
def again(tiny_data, tmp_path):
    """Start the tiny run in this process."""
    return lambda run_id="run", **settings: run_here(tmp_path, tiny_data, run_id, **{**SETTINGS, **settings})


# -----------------------------------------------------------------------------
# NUMBERS THAT ARE NO LONGER FINITE
# -----------------------------------------------------------------------------

SPOILED = {  # and the step: checkpoints are written after every second one, before the bad step and at it
    "nan loss": (7, spoil_loss(math.nan)),
    "inf loss": (8, spoil_loss(math.inf)),
    "nan gradient of a table": (7, spoil_gradient("tok_emb.weight", math.nan)),
    "inf gradient of a gate": (8, spoil_gradient("smear.gate", -math.inf)),
    "inf gradient of a matrix": (7, spoil_gradient("blocks.0.mlp.up.weight", math.inf)),
}


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory) -> Ran:
    """The run without a fault."""
    return run_here(tmp_path_factory.mktemp("whole"), tiny_data, **SETTINGS)


@pytest.mark.parametrize("fault", SPOILED)
def test_what_is_not_finite_ends_the_run_and_names_the_checkpoint_before_it(fault, whole, again, monkeypatch):
    step, spoil = SPOILED[fault]
    monkeypatch.setattr(pg, "accumulate_gradients", at_call(pg.accumulate_gradients, step, spoil))
    ran = again(TRAIN_LOG_EVERY=0)  # nothing but the checkpoints asks for the state of a step
    before = re.search(rf"^step:{step - 1}/12 train_loss:(\S+)", whole.out, re.MULTILINE)[1]
    said = f"limit: loss or gradient of step {step} is no longer finite; the loss before it was {before}; "
    assert ran.code == 3 and ran.err.startswith(said) and ran.err.count("\n") == 1
    assert "lower MATRIX_LR, SCALAR_LR or TIED_EMBED_LR" in ran.err
    assert ran.log.read_text("utf-8").endswith(ran.err)
    good = newest(ran.folder)
    assert resumed(ran.err) == good.path and good.meta["step"] in (step - 2, step - 1) and all_finite(good)
    written = re.findall(r"^checkpoint:written step:(\d+)", ran.out, re.MULTILINE)
    assert int(written[-1]) == good.meta["step"]
    assert {p.suffix for p in ran.folder.iterdir()} == {".pgckpt"}
    on = again(RESUME=good.path)
    assert (on.code, on.err) == (0, "") and on.artifact == whole.artifact


def test_without_checkpoints_none_is_named(again, monkeypatch):
    monkeypatch.setattr(pg, "accumulate_gradients", at_call(pg.accumulate_gradients, 1, spoil_loss(math.nan)))
    ran = again(CHECKPOINT_EVERY=0)
    assert ran.code == 3 and "RESUME" not in ran.err and not list(ran.folder.iterdir())


def spoil_weight(_, bank: pg.Bank, *__) -> None:
    bank.weight[0, 0, 0] = math.nan


def test_weights_that_are_not_finite_are_no_checkpoint(again, monkeypatch):
    """Loss and gradient of the first step are finite; its update is not, which only the second loss would show."""
    monkeypatch.setattr(pg.Bank, "apply", at_call(pg.Bank.apply, 1, spoil_weight))
    ran = again()
    assert ran.code == 3 and ran.err.startswith("limit: ") and ran.err.count("\n") == 1
    assert "RESUME" not in ran.err and not list(ran.folder.iterdir())


def test_an_update_that_is_not_finite_leaves_the_checkpoint_before_it(again, monkeypatch):
    monkeypatch.setattr(pg.Bank, "apply", at_call(pg.Bank.apply, 13, spoil_weight))  # of the fifth step
    ran = again(NUM_LAYERS=1, XSA_LAST_N=1, VE_LAYERS="0", UNET_SKIPS=0)
    assert ran.code == 3 and ran.err.startswith("limit: ") and ran.err.count("\n") == 1
    good = newest(ran.folder)
    assert all_finite(good) and resumed(ran.err) == good.path and good.meta["step"] >= 3


def test_lower_rates_and_resume_are_not_asked_for_at_once(again, monkeypatch):
    """A checkpoint goes on with its own settings alone."""
    monkeypatch.setattr(pg, "accumulate_gradients", at_call(pg.accumulate_gradients, 3, spoil_loss(math.nan)))
    ran = again()
    assert again(RESUME=resumed(ran.err), MATRIX_LR=0.01).code == 2
    lower, resume = ran.err.index("lower MATRIX_LR"), ran.err.index("RESUME=")
    assert re.search(r"\b(new run|anew|start again|from the beginning)\b", ran.err[min(lower, resume) - 40 : resume])


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for the device: .item(), float(), bool()."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._overloadpacket is torch.ops.aten._local_scalar_dense
        return function(*args, **(kwargs or {}))


def test_looking_for_what_is_not_finite_costs_no_message_and_no_waiting(monkeypatch):
    trainer = pg.Trainer(make_run(tiny_hp(late_qat=False)))
    counts = dict.fromkeys(("start_sum", "largest", "start_reduce_scatter", "start_all_gather"), 0)
    read = dict(started=0, ended=0)

    def count(name: str):
        real = getattr(pg.Ranks, name)

        def counted(*args):
            counts[name] += 1
            return real(*args)

        monkeypatch.setattr(pg.Ranks, name, counted)

    def start_read(x):
        read["started"] += 1
        assert read["started"] - read["ended"] <= 2  # the step before is read while this one is on its way

        def end():
            read["ended"] += 1
            return x.tolist()

        return end

    for name in counts:
        count(name)
    monkeypatch.setattr(pg, "start_read", start_read)
    text = torch.from_numpy(random_tokens(65).astype("int64"))
    batch = text[:-1].view(-1, 16), text[1:].view(-1, 16)
    steps, banks = 4, len(trainer.optimizers.banks)
    with Reads() as reads:
        for _ in range(steps):
            trainer.train_step(*batch)
    # The small gradients, their norm, and the message; a shard in and a bank out for each shape.
    assert counts == dict(
        start_sum=3 * steps, largest=0, start_reduce_scatter=banks * steps, start_all_gather=banks * steps
    )
    assert reads.count == 0
    assert read == dict(started=steps, ended=steps - 1)


# -----------------------------------------------------------------------------
# TRAINING TEXT THAT CHANGES
# -----------------------------------------------------------------------------


def test_a_shard_that_changes_is_told_by_the_next_read(data):
    path, other = data / "fineweb_train_000000.bin", data / "fineweb_train_000001.bin"
    stream, good = pg.TokenStream([path, other], 512), path.read_bytes()
    tokens = stream.read(100, 50).tolist()

    def said(start: int = 100) -> str:
        with pytest.raises(pg.UserError) as error:
            stream.read(start, 50)
        return str(error.value)

    path.write_bytes(good[: 1024 + 2 * 149])
    assert said() == f"shard {path} became shorter while it was in use; fetch or build it again"
    path.write_bytes(good[:10])
    assert "became shorter" in said()
    assert len(stream.read(int(stream.ends[0]), 50)) == 50  # the other shard
    assert "became shorter" in said(int(stream.ends[0]) - 1)  # one token of the first
    path.write_bytes(good[: 1024 + 2 * 149] + (512).to_bytes(2, "little") + good[1024 + 2 * 150 :])
    assert said().startswith(f"{path} holds token id 512, but VOCAB_SIZE=512; ")
    path.unlink()
    assert said() == f"cannot read shard {path} any more: No such file or directory; put it back"
    path.mkdir()
    assert said() == f"cannot read shard {path} any more: Is a directory; put it back"
    path.rmdir()
    path.write_bytes(good)
    assert stream.read(100, 50).tolist() == tokens


@pytest.mark.parametrize("log_every", [0, 1])
def test_one_bad_token_in_one_batch_ends_the_run(log_every, data, again):
    """The batch after it is good: what was bad must still be told once the step is collected."""
    path = data / "fineweb_train_000000.bin"
    whole = bytearray(path.read_bytes())
    position = 1024 + 2 * (4 * 384 + 100)
    whole[position : position + 2] = (700).to_bytes(2, "little")
    path.write_bytes(whole)
    ran = again(DATA_PATH=data, TRAIN_LOG_EVERY=log_every)
    assert ran.code == 2 and ran.err.count("\n") == 1 and "holds token id 700" in ran.err
    assert newest(ran.folder).meta["step"] == 4


def run_jobs(tmp_path: Path, data: Path, jobs: list[dict], ranks: int = 0, **environ) -> subprocess.CompletedProcess:
    """Carry out the jobs of broken.py in one process, or in the ranks of torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    command = [sys.executable, "-B", *torchrun, ROOT / "tests" / "broken.py"]
    settings = {**TINY_ENV, **SETTINGS, "DATA_PATH": data, **environ}
    jobs = [{k: v if k == "fault" else str(v) for k, v in job.items()} for job in jobs]
    environ = clean_environ(**settings, JOBS=json.dumps(jobs))
    return subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120)


def test_a_shard_that_changes_ends_the_run_with_one_line_and_the_checkpoint_is_good(whole, tiny_data, tmp_path):
    """Six batches of the first shard, then the fault; in a process of its own, as a signal could end it."""
    faults, jobs = dict(shrink="became shorter", remove="any more", write_bad_token="holds token id 700"), []
    for fault in faults:
        copy = Path(shutil.copytree(tiny_data, tmp_path / fault))
        jobs.append(dict(RUN_ID=fault, DATA_PATH=copy, fault=["accumulate_gradients", 6, fault, 0]))
    ran = run_jobs(tmp_path, tiny_data, jobs)
    assert ran.returncode == 0, ran.stderr  # of the driver; a signal is negative
    assert json.loads((tmp_path / "codes0").read_text()) == [2, 2, 2]
    lines = ran.stderr.splitlines()
    assert len(lines) == 3
    for line, (fault, words) in zip(lines, faults.items(), strict=True):
        assert line.startswith("error: ") and words in line and str(tmp_path / fault) in line
        assert (tmp_path / "logs" / f"{fault}.txt").read_text("utf-8").endswith(line + "\n")
        good = newest(tmp_path / "runs" / fault)
        assert resumed(line) == Path("runs") / fault / good.path.name and 6 <= good.meta["step"] <= 8
        on = run_here(tmp_path, tiny_data, fault, **SETTINGS, RESUME="auto")  # the shards as they were
        assert (on.code, on.err) == (0, "") and on.artifact == whole.artifact


def test_anything_else_that_ends_the_reading_thread_ends_the_run(tmp_path, tiny_data, monkeypatch):
    def fail(result, *_):
        raise MemoryError("no memory for a batch")

    monkeypatch.setattr(pg.TokenStream, "read", at_call(pg.TokenStream.read, 3, fail))
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    stream = pg.TokenStream(pg.find_shards(pg.Hyperparameters(data_path=str(tiny_data)), "train"), 512)
    ranks = SimpleNamespace(rank=0, size=1, device=torch.device("cpu"))
    loader = pg.BatchLoader(stream, tiny_hp(), ranks, print)
    met = []

    def take() -> None:
        try:
            for _ in range(3):
                loader.next()
                met.append(loader.problem)
        except MemoryError as error:
            met.append(str(error))

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive() and len(met) == 3 and "no memory for a batch" in met[2]


# -----------------------------------------------------------------------------
# FULL DISKS AND FULL GPUS
# -----------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("lines", [1, 60])
def test_a_log_that_cannot_be_written_any_more_is_whole_elsewhere(lines, whole, again, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    begun = []

    def fill(_, log: pg.Log, *__) -> None:
        begun.append(log.path.read_bytes())
        with open("/dev/full", "r+b", buffering=0) as full:
            os.dup2(full.fileno(), log._file.fileno())

    def read(log: pg.Log) -> bytes:  # /dev/full reads as zeros without end
        return begun[0]

    monkeypatch.setattr(pg.Log, "__call__", at_call(pg.Log.__call__, lines, fill))
    monkeypatch.setattr(pg.Log, "written", read)
    ran = again()
    assert ran.code == 0 and ran.artifact == whole.artifact
    (kept,) = tmp_path.glob("*-*/*.txt")
    assert ran.err == (
        f"warning: {ran.log}: {os.strerror(errno.ENOSPC)}; trying again\n"
        f"warning: {ran.log} is not whole; the whole log is {kept}\n"
    )
    assert ran.log.read_bytes() == begun[0] and 0 < len(begun[0]) < whole.log.stat().st_size - 1000
    text = kept.read_text("utf-8")
    assert text.startswith("code_sha256:") and "===== source end =====" in text
    assert [line for line in ran.out.splitlines() if line not in text.splitlines()] == []
    assert len(text.splitlines()) == len(whole.log.read_text("utf-8").splitlines())


def test_a_log_that_is_removed_is_whole_elsewhere(tmp_path, monkeypatch, capsys):
    (refuge := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(refuge))
    for kept in (True, False):
        log = pg.Log(path := tmp_path / "run.txt")
        log("first", console=False)
        path.unlink()
        log("second", console=False)
        if not kept:
            monkeypatch.setattr(pg.Log, "rescue", lambda *_: None)
        log.close()
        (where,) = refuge.rglob("run.txt")
        assert where.read_text() == "first\nsecond\n"
        said = where if kept else "nowhere: no folder takes it"
        assert capsys.readouterr().err == f"warning: {path} is gone; the whole log is {said}\n"


def test_a_log_goes_on_whole_when_its_disk_has_room_again(tmp_path):
    """A disk that takes five bytes, then none, then all."""
    log, room = pg.Log(tmp_path / "run.txt"), [5, 0, 0, 10**6]
    file = log._file

    class Disk:
        def write(self, data: bytes) -> int:
            if not (taken := room.pop(0) if len(room) > 1 else room[0]):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return file.write(data[:taken])

    log._file = Disk()
    for line in ("first line", "second", "third", "fourth"):
        log(line, console=False)
    assert (tmp_path / "run.txt").read_text() == "first line\nsecond\nthird\nfourth\n" and not log.unwritten


def test_a_console_that_cannot_be_written_any_more_does_not_end_the_run(whole, again, monkeypatch):
    """`> file` on the same full disk, or `| head`."""

    def fail(_, *args, **__) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    lines = at_call(print, 30, fail)
    monkeypatch.setattr(pg, "print", lambda *a, **k: (print if "file" in k else lines)(*a, **k), raising=False)
    ran = again()
    assert ran.code == 0 and ran.artifact == whole.artifact and ran.err.count("\n") <= 1
    assert ran.log.read_text("utf-8").splitlines()[-1].startswith("result {")


def full_memory(*_) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has …")


@pytest.mark.parametrize("where", ["accumulate_gradients", "score", "StreamTTT.step"])
def test_a_full_gpu_is_one_line_that_names_the_settings(where, again, monkeypatch):
    owner, name = (pg.StreamTTT, "step") if "." in where else (pg, where)
    monkeypatch.setattr(owner, name, at_call(getattr(owner, name), 2, full_memory))
    ran = again(TTT_ENABLED=1, EVAL_STRIDE=16)
    assert ran.code == 2 and ran.err.count("\n") == 1
    assert ran.err.startswith("error: out of GPU memory; lower MICRO_BATCH_TOKENS (training), VAL_BATCH_SIZE (scoring)")
    if where == "accumulate_gradients":
        assert resumed(ran.err).exists()
    else:
        advised = re.search(r"EVAL_ONLY=1 ARTIFACT_PATH=(\S+) scores it$", ran.err)[1]
        assert again("scored", EVAL_ONLY=1, ARTIFACT_PATH=advised).code == 0


def test_the_log_says_that_the_gpu_was_full(again, monkeypatch):
    monkeypatch.setattr(pg, "accumulate_gradients", at_call(pg.accumulate_gradients, 2, full_memory))
    ran = again()
    assert ran.err and ran.log.read_text("utf-8").endswith(ran.err)


def test_an_evaluation_that_is_stopped_says_nothing_of_checkpoints(whole, again, monkeypatch):
    monkeypatch.setattr(pg, "score", at_call(pg.score, 1, stop))
    ran = again(EVAL_ONLY=1, ARTIFACT_PATH=whole.folder / "artifact.pgolf", CHECKPOINT_EVERY=0)
    assert ran.code == 128 + signal.SIGTERM and ran.err.startswith("interrupted: SIGTERM; ")
    assert "CHECKPOINT_EVERY" not in ran.err and "RESUME" not in ran.err


def test_a_run_that_goes_on_and_is_stopped_in_its_warmup_still_names_its_checkpoint(again, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pg, "accumulate_gradients", at_call(pg.accumulate_gradients, 5, spoil_loss(math.nan)))
        good = resumed(again().err)
    monkeypatch.setattr(pg.Trainer, "warm_up", stop)
    ran = again(RESUME="auto")
    assert ran.code == 128 + signal.SIGTERM and resumed(ran.err) == good


# -----------------------------------------------------------------------------
# SIGNALS
# -----------------------------------------------------------------------------


def stop(result, *_):
    os.kill(os.getpid(), signal.SIGTERM)
    return result


@pytest.mark.parametrize("step", [1, 7, 11, 12])
def test_a_signal_in_any_step_leaves_a_checkpoint_of_it(step, whole, again, monkeypatch):
    monkeypatch.setattr(pg, "accumulate_gradients", at_call(pg.accumulate_gradients, step, stop))
    ran = again(CHECKPOINT_EVERY=3600)
    assert ran.code == 128 + signal.SIGTERM and ran.err.startswith("interrupted: SIGTERM; ")
    assert ran.err.count("\n") == 1
    good = newest(ran.folder)
    assert resumed(ran.err) == good.path and step <= good.meta["step"] <= step + 1
    on = again(RESUME="auto", CHECKPOINT_EVERY=3600)
    assert on.code == 0 and on.artifact == whole.artifact


def test_a_signal_after_the_last_step_has_reported_leaves_a_checkpoint(whole, again, monkeypatch):
    monkeypatch.setattr(pg.Trainer, "report", at_call(pg.Trainer.report, 12, stop))
    ran = again(CHECKPOINT_EVERY=3600)
    assert ran.code == 128 + signal.SIGTERM and newest(ran.folder).meta["step"] == 12
    on = again(RESUME="auto")
    assert on.code == 0 and on.artifact == whole.artifact


def test_a_signal_while_an_error_is_told_changes_nothing(again, monkeypatch):
    """torchrun stops the other ranks as soon as one has ended: both reach a rank at once."""

    def lose(_, self, *__):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")

    def told(result, *_):
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    monkeypatch.setattr(pg, "accumulate_gradients", at_call(pg.accumulate_gradients, 3, lose))
    monkeypatch.setattr(pg.Ranks, "lost_peer", at_call(pg.Ranks.lost_peer, 1, told))
    ran = again()
    assert ran.code == 1 and ran.err.startswith("error: rank 0 lost another rank") and ran.err.count("\n") == 1


# -----------------------------------------------------------------------------
# THE CLOCK
# -----------------------------------------------------------------------------


def test_averaging_fits_into_the_cap_behind_the_last_step(again, monkeypatch):
    """Rehearsed slowly before training, it is given the time it took; the last one is quicker, as a busy machine is
    not part of this test."""
    seconds, spent = iter((0.4, 0.25, 0.0)), []
    real = pg.Averages.exported

    def slow(self):
        spent.append(next(seconds))
        time.sleep(spent[-1])
        return real(self)

    monkeypatch.setattr(pg.Averages, "exported", slow)
    ran = again(MAX_WALLCLOCK_SECONDS=2, ITERATIONS=100_000, WARMDOWN_ITERS=25, CHECKPOINT_EVERY=0, TRAIN_LOG_EVERY=1)
    assert ran.code == 0 and len(spent) == 3
    reserve = int(re.search(r"^train_reserve:(\d+)ms for averaging$", ran.out, re.MULTILINE)[1])
    assert 800 <= reserve < 1500
    taken = ran.result["phase_seconds"]
    ends = [int(ms) / 1000 for ms in re.findall(r"^step:.* train_loss:.* train_time:(\d+)ms", ran.out, re.MULTILINE)]
    slowest = max(b - a for a, b in zip([0, *ends], ends, strict=False))  # three steps may come after the last look
    assert 0.1 < taken["train"] <= 2 - reserve / 1000 + 3 * slowest
    assert taken["train"] + taken["average"] <= 2


def test_a_calibration_that_takes_the_whole_clock_is_an_error_before_training(again):
    ran = again(MAX_WALLCLOCK_SECONDS=30, GPTQ_ENABLED=1, GPTQ_CALIBRATION_TOKENS=10**11, CHECKPOINT_EVERY=0)
    said = (
        r"error: GPTQ_CALIBRATION_TOKENS=10{11} may take \d+ s and leaves nothing of MAX_WALLCLOCK_SECONDS=30 to train"
    )
    assert ran.code == 2 and re.match(said, ran.err) and ran.err.count("\n") == 1 and "step:1/" not in ran.out


def test_without_a_cap_nothing_is_reserved(whole):
    assert "train_reserve" not in whole.out and "stopping_early" not in whole.out


# -----------------------------------------------------------------------------
# SEVERAL RANKS
# -----------------------------------------------------------------------------


class Ended(NamedTuple):
    err: str
    line: str  # the only one that train_gpt.py says itself
    traceback: bool  # of train_gpt.py; torchrun shows its own


def end_two_ranks(tmp_path: Path, data: Path, *fault, **settings) -> Ended:
    """Two ranks of torchrun in a run that would take for ever, ended by this fault."""
    ran = run_jobs(tmp_path, data, [dict(RUN_ID="run", fault=fault)], 2, **dict(ITERATIONS=10**6) | settings)
    seconds = time.time() - (tmp_path / "fault").stat().st_mtime
    assert ran.returncode > 0 and seconds < 45, ran.stderr
    (line,) = re.findall(r"^(?:error|limit|interrupted|warning): .*$", ran.stderr, re.MULTILINE)
    return Ended(ran.stderr, line, 'train_gpt.py", line' in ran.stderr)


def test_a_rank_that_dies_while_training_ends_all(tiny_data, tmp_path):
    ended = end_two_ranks(tmp_path, tiny_data, "accumulate_gradients", 9, "die", 0)
    assert ended.line.startswith("error: rank 1 lost another rank, see its error; ") and not ended.traceback
    good = newest(tmp_path / "runs" / "run")
    assert resumed(ended.line).name == good.path.name and good.meta["step"] == 8


def test_a_rank_that_dies_while_evaluating_ends_all(tiny_data, tmp_path):
    endless = dict(TTT_ENABLED=1, EVAL_STRIDE=16, TTT_EPOCHS=10**6, EVAL_MAX_SECONDS=0)
    ended = end_two_ranks(tmp_path, tiny_data, "StreamTTT.step", 20, "die", 1, ITERATIONS=2, **endless)
    said = "error: rank 0 lost another rank, see its error; the artifact is whole: EVAL_ONLY=1"
    assert ended.line.startswith(said) and not ended.traceback
    pg.unpack_artifact((tmp_path / "runs" / "run" / "artifact.pgolf").read_bytes())


def test_an_exception_of_one_ranks_own_ends_all_and_is_shown(tiny_data, tmp_path):
    ended = end_two_ranks(tmp_path, tiny_data, "accumulate_gradients", 9, "raise_own", 1, CHECKPOINT_EVERY=0)
    assert ended.traceback and len(re.findall(r"ZeroDivisionError: a fault of its own$", ended.err, re.MULTILINE)) == 1
    assert ended.line.startswith("error: rank 0 lost another rank, see its error; there is no checkpoint to go on from")


def test_sigterm_to_torchrun_leaves_a_checkpoint_to_go_on_from(tiny_data, tmp_path, monkeypatch):
    settings = dict(CHECKPOINT_EVERY=3600, ITERATIONS=10**6)
    ended = end_two_ranks(tmp_path, tiny_data, "accumulate_gradients", 9, "stop_torchrun", 1, **settings)
    assert ended.line.startswith("interrupted: SIGTERM; ") and not ended.traceback
    good = newest(tmp_path / "runs" / "run")
    step = good.meta["step"]
    assert resumed(ended.line).name == good.path.name and step >= 9 and all_finite(good)
    monkeypatch.setattr(pg, "out_of_time", lambda _, clock: clock.step > step)  # a few steps more are enough
    on = run_here(tmp_path, tiny_data, **{**SETTINGS, **settings}, RESUME=good.path)
    assert (on.code, on.err) == (0, "") and f"resume:step:{step} " in on.out and on.result["steps"] > step


def test_what_is_not_finite_on_one_rank_ends_all_alike(whole, tiny_data, tmp_path):
    jobs = [
        dict(RUN_ID="loss", fault=["accumulate_gradients", 7, "nan_loss", 1]),
        dict(RUN_ID="gradient", fault=["accumulate_gradients", 7, "inf_gradient", 1], TRAIN_LOG_EVERY=0),
        dict(RUN_ID="loss", RESUME="auto"),
    ]
    ran = run_jobs(tmp_path, tiny_data, jobs, 2)
    assert ran.returncode == 0, ran.stderr
    assert [json.loads((tmp_path / f"codes{rank}").read_text()) for rank in range(2)] == [[3, 3, 0]] * 2
    lines = [line for line in ran.stderr.splitlines() if re.match("limit:|error:|Traceback", line)]
    before = float(re.search(r"^step:6/12 train_loss:(\S+)", whole.out, re.MULTILINE)[1])
    for line, name in zip(lines, ("loss", "gradient"), strict=True):
        assert line.startswith("limit: loss or gradient of step 7 is no longer finite; the loss before it was ")
        assert float(re.search(r"before it was ([\d.]+);", line)[1]) == pytest.approx(before, abs=1e-3)
        log = (tmp_path / "logs" / f"{name}.txt").read_text("utf-8").partition("\nlimit: ")[0]
        newest_step = re.findall(r"^checkpoint:written step:(\d+)", log, re.MULTILINE)[-1]
        assert newest_step in ("5", "6")
        assert resumed(line) == Path("runs") / name / f"checkpoint-{newest_step}.pgckpt"
    assert all_finite(newest(tmp_path / "runs" / "gradient"))
    assert json.loads((tmp_path / "runs" / "loss" / "result.json").read_text("utf-8"))["resumed_at"] == [6]
