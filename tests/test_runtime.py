"""Where a run meets its machine: consoles, signals, torchrun's variables, the compiler, memory."""

import collections
import dataclasses
import datetime
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from broken import at_call
from conftest import ROOT, TINY_ENV, Ran, clean_environ, run_here
from helpers import make_run, random_tokens, single_rank, tiny_hp
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt as pg

QUICK = dict(ITERATIONS=3, WARMDOWN_ITERS=2, WARMUP_STEPS=0, VAL_LOSS_EVERY=0, TTT_ENABLED=0, EVAL_STRIDE=0)
SCRIPT = [sys.executable, "-B", str(ROOT / "train_gpt.py")]


@pytest.fixture(scope="module")
def whole(tiny_data, tmp_path_factory) -> Ran:
    """The run that nothing happens to."""
    return run_here(tmp_path_factory.mktemp("whole"), tiny_data, **QUICK)


def said(err: str) -> str:
    """The only line of stderr."""
    (line,) = err.splitlines()
    return line


# -----------------------------------------------------------------------------
# CONSOLES
# -----------------------------------------------------------------------------


def test_a_run_without_a_console_is_a_whole_run(whole, tiny_data, tmp_path):
    """Closed from the start: files opened later must not get the numbers of stdin, stdout and stderr."""
    environ = clean_environ(**{**TINY_ENV, **QUICK, "DATA_PATH": tiny_data, "OUT_DIR": tmp_path, "RUN_ID": "run"})
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *SCRIPT]
    assert subprocess.run(command, cwd=tmp_path, env=environ, timeout=120).returncode == 0
    assert (tmp_path / "runs" / "run" / "artifact.pgolf").read_bytes() == whole.artifact
    lines = (tmp_path / "logs" / "run.txt").read_text("utf-8").splitlines()
    assert lines[-1].startswith("result {") and len(lines) == len(whole.log.read_text("utf-8").splitlines())


def test_a_table_is_printed_without_utf8_and_as_far_as_somebody_reads(tmp_path):
    command = ["sh", "-c", '("$@"; echo code $? >&2) | head -2', "sh", *SCRIPT, "--settings"]
    environ = clean_environ(PYTHONIOENCODING="ascii")
    ran = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120)
    assert ran.stderr == "code 0\n" and ran.stdout.splitlines() == pg.settings_table().splitlines()[:2]


@pytest.mark.parametrize(
    ("given", "spins"), [({}, 10000), (dict(OMP_WAIT_POLICY="PASSIVE"), 0), (dict(GOMP_SPINCOUNT=7), 7)]
)
def test_threads_spin_for_as_long_as_they_should_unless_told_otherwise(given, spins, tmp_path):
    """What libgomp says when it is loaded: by then it must know."""
    environ = {name: text for name, text in clean_environ().items() if name != "OMP_WAIT_POLICY"}
    environ |= dict(OMP_DISPLAY_ENV="VERBOSE") | {name: str(value) for name, value in given.items()}
    ran = subprocess.run(
        [*SCRIPT, "--settings"], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120
    )
    if "GOMP_" not in ran.stderr:
        pytest.skip("this torch was built with another OpenMP than GCC's")
    assert f"GOMP_SPINCOUNT = '{spins}'" in ran.stderr


def test_an_error_that_nobody_reads_keeps_its_exit_code(tmp_path):
    reads, writes = os.pipe()
    os.close(reads)
    try:
        ran = subprocess.run(SCRIPT, cwd=tmp_path, env=clean_environ(WORLD_SIZE=""), stderr=writes, timeout=120)
    finally:
        os.close(writes)
    assert ran.returncode == 2


def test_the_log_takes_a_path_that_is_no_text(tmp_path):
    log = pg.Log(tmp_path / "log.txt")
    log("tokenizer_path=" + os.fsdecode(b"a\xff.model"), console=False)
    log("after it", console=False)
    assert (tmp_path / "log.txt").read_text("utf-8") == "tokenizer_path=a\\udcff.model\nafter it\n"


# -----------------------------------------------------------------------------
# TORCHRUN'S VARIABLES
# -----------------------------------------------------------------------------

MEETING = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="29771")


@pytest.mark.parametrize(
    "environ, words",
    [
        (dict(WORLD_SIZE=""), "WORLD_SIZE= must be a whole number"),
        (dict(RANK=""), "RANK= must be a whole number"),
        (dict(RANK="-1"), "RANK=-1 must be a whole number"),
        (dict(RANK="9" * 5000), f"RANK={'9' * 80}… (5000 characters) must be a whole number"),
        (dict(RANK="x\ny"), "RANK=x\\ny must be a whole number"),
        (dict(LOCAL_RANK="abc"), "LOCAL_RANK=abc must be a whole number"),
        (dict(LOCAL_WORLD_SIZE="1.0"), "LOCAL_WORLD_SIZE=1.0 must be a whole number"),
        (dict(WORLD_SIZE="0"), "RANK=0 must be less than WORLD_SIZE=0"),
        (dict(RANK="1"), "RANK=1 must be less than WORLD_SIZE=1"),
        (MEETING | dict(RANK="5"), "RANK=5 must be less than WORLD_SIZE=2"),
        (MEETING | dict(LOCAL_RANK="1", LOCAL_WORLD_SIZE="1"), "LOCAL_RANK=1 must be less than LOCAL_WORLD_SIZE=1"),
        (MEETING | dict(MASTER_ADDR=""), "WORLD_SIZE=2 processes need MASTER_ADDR"),
        (MEETING | dict(MASTER_PORT="70000"), "WORLD_SIZE=2 processes need MASTER_PORT"),
        (MEETING | dict(MASTER_PORT="abc"), "MASTER_PORT=abc must be a whole number"),
    ],
)
def test_a_wrong_place_is_one_line_before_any_work(environ, words, tiny_data, tmp_path):
    ran = run_here(tmp_path, tiny_data, **environ)
    assert ran.code == 2 and said(ran.err).startswith(f"error: {words}") and not list(tmp_path.iterdir())


def test_places_that_are_right():
    assert pg.Place.from_env({}) == (0, 1, 0, 1)
    assert pg.Place.from_env(MEETING | dict(RANK="1", LOCAL_RANK="1")) == (1, 2, 1, 2)


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_that_start_again_agree_on_a_part_of_the_store_without_the_keys_of_the_dead(first, monkeypatch):
    shared, parts = dist.HashStore(), {}
    shared.set_timeout(datetime.timedelta(seconds=30))
    monkeypatch.setattr(dist, "rendezvous", lambda *_: iter([(shared, 0, 0)]))

    def join(rank: int) -> None:
        parts[rank] = pg.fresh_store(rank, 2)

    for start in range(3):
        threads = [threading.Thread(target=join, args=(rank,), daemon=True) for rank in (first, 1 - first)]
        threads[0].start()
        time.sleep(0.05)  # it meets what the ranks before it have left
        threads[1].start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert not parts[0].check(["address0"]) and not parts[1].check(["address0"])
        parts[0].set("address0", str(start))
        assert parts[1].get("address0") == str(start).encode()


# -----------------------------------------------------------------------------
# SIGNALS WHERE NO HANDLER RUNS
# -----------------------------------------------------------------------------


def test_a_signal_ends_a_rank_that_waits_for_the_others(tmp_path):
    started = []
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        environ = clean_environ(**{**TINY_ENV, **MEETING, "RANK": 0, "MASTER_PORT": port})
        process = subprocess.Popen(SCRIPT, cwd=tmp_path, env=environ, stderr=subprocess.PIPE, text=True)
        started.append((process, port, number, code))
    for process, port, number, code in started:
        for _ in range(1200):  # the main rank serves the store while it waits
            with socket.socket() as probe:
                if probe.connect_ex(("localhost", port)) == 0:
                    break
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(number)
        err = process.communicate(timeout=60)[1]
        name = signal.Signals(number).name
        assert (process.returncode, err) == (code, f"interrupted: {name}; there is no checkpoint to go on from\n")


class Waits:
    """A main thread that waits in C++, where no handler runs, until it is let go or the process would have ended."""

    def __init__(self, monkeypatch):
        self.store, self.code = dist.HashStore(), None
        self.store.set_timeout(datetime.timedelta(seconds=60))
        monkeypatch.setattr(pg.os, "_exit", self.end)

    def end(self, code: int) -> None:
        self.code = self.code or code
        self.store.set("go", "")

    def wait(self, *kills: float, until: float = 60) -> None:
        """Wait with a SIGTERM after each of so many seconds."""
        kill = (os.kill, (os.getpid(), signal.SIGTERM))
        timers = [threading.Timer(seconds, *kill) for seconds in kills]
        timers.append(threading.Timer(until, self.store.set, ("go", "")))
        for timer in timers:
            timer.daemon = True
            timer.start()
        self.store.wait(["go"])
        timers[-1].cancel()


def test_a_signal_ends_a_main_thread_that_hangs(monkeypatch, capsys, tmp_path):
    waits = Waits(monkeypatch)
    monkeypatch.setattr(pg.Signals, "PATIENCE", 0.3)
    with pytest.raises(pg.Interrupted), pg.Signals() as signals:  # the handler's own, once it is let go
        signals.log = pg.Log(tmp_path / "log.txt")
        signals.resume_from(Path("checkpoint-3.pgckpt"))
        waits.wait(0.1)
    line = "interrupted: SIGTERM; go on with the same command and RESUME=checkpoint-3.pgckpt\n"
    assert waits.code == 143 and capsys.readouterr().err.startswith(line)
    assert (tmp_path / "log.txt").read_text().startswith(line)


def test_a_signal_that_training_defers_ends_nothing_until_it_is_repeated(monkeypatch, capsys):
    waits = Waits(monkeypatch)
    monkeypatch.setattr(pg.Signals, "PATIENCE", 0.2)
    with pg.Signals() as signals:
        signals.deferred = True
        waits.wait(0.1, 0.2, until=1.5)
        assert waits.code is None and signals.caught == signal.SIGTERM and capsys.readouterr().err == ""
        waits.store.delete_key("go")
        monkeypatch.setattr(pg.Signals, "REPEATED", 0.0)
        waits.wait(0.1)
    assert waits.code == 143 and capsys.readouterr().err.startswith("interrupted: SIGTERM; ")


def test_handlers_and_the_wakeup_pipe_are_as_before_afterwards(monkeypatch):
    threads, handlers = threading.active_count(), [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)]
    for _ in range(3):
        with pg.Signals():
            assert signal.getsignal(signal.SIGTERM) != handlers[0]
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGHUP)] == handlers
    before = signal.set_wakeup_fd(-1)
    assert before == -1
    for _ in range(100):
        if threading.active_count() <= threads:
            return
        time.sleep(0.05)
    raise AssertionError("a thread of each is left")


# -----------------------------------------------------------------------------
# COMPILER AND MEMORY
# -----------------------------------------------------------------------------


def test_compile_without_a_compiler_is_one_line_before_any_work(tiny_data, tmp_path, monkeypatch):
    import torch._inductor.config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nonexistent")}):
        ran = run_here(tmp_path / "out", tiny_data, COMPILE=1, **QUICK)
    assert ran.code == 2 and said(ran.err).startswith("error: torch.compile fails (") and not ran.log.exists()
    assert "/nonexistent" in ran.err and ran.err.endswith("or set COMPILE=0\n")


def recipe(name: str) -> pg.Hyperparameters:
    lines = (ROOT / "records" / "recipes" / f"{name}.env").read_text("utf-8").splitlines()
    return pg.Hyperparameters.from_env(dict(line.split("=", 1) for line in lines if line and line[0] != "#"))


def test_compile_auto_on_a_cpu_is_for_long_trainings_and_much_text():
    cpu, on, off = torch.device("cpu"), (True,) * 4, (False,) * 4
    for name, trains in dict(cpu_mini=True, cpu_ablate=False, cpu_demo=False, pr714=True).items():
        assert pg.choose_compiled(recipe(name), cpu, 10**4, 1) == (trains, False, False, False)
    for targets, evaluation in ((10**6, (False, False, True)), (2 * 10**6, (False, True, True)), (10**7, on[1:])):
        assert pg.choose_compiled(recipe("cpu_mini"), cpu, targets, 1) == (True, *evaluation)
    lora = dataclasses.replace(recipe("cpu_mini"), ttt_params="lora")
    assert not pg.choose_compiled(lora, cpu, 10**7, 1).learning  # no adapter goes through a graph
    assert pg.choose_compiled(dataclasses.replace(lora, phased_ttt_num_phases=1), cpu, 10**7, 1).learning
    for word, both in {"1": on, "0": off}.items():
        for device in (cpu, torch.device("cuda")):
            assert pg.choose_compiled(pg.Hyperparameters(compile=word), device, 1, 1) == both


@pytest.mark.parametrize(
    "targets, ranks, evaluation",
    [  # 62 million targets are the challenge's, 27.1 million weights the default model's
        (62_000_000, 1, (False, True, True)),
        (62_000_000, 8, (False, True, False)),
        (500_000, 1, (False, False, False)),
        (500_000_000, 1, (True, True, True)),
    ],
)
def test_compile_auto_on_cuda_is_for_what_a_rank_does_enough_of(targets, ranks, evaluation):
    assert pg.choose_compiled(pg.Hyperparameters(), torch.device("cuda"), targets, ranks) == (True, *evaluation)
    plain = pg.choose_compiled(
        pg.Hyperparameters(eval_stride=0, ttt_enabled=False), torch.device("cuda"), targets, ranks
    )
    assert plain.sliding == plain.whole == evaluation[0]
    apart = pg.Hyperparameters(document_mask=True)
    assert all(pg.choose_compiled(apart, torch.device("cuda"), targets, ranks))


def test_a_long_training_on_a_cpu_is_compiled_and_goes_on_as_it_began(whole, tiny_data, tmp_path, monkeypatch):
    """torch.compile replaced by what it makes faster."""
    asked = []
    monkeypatch.setitem(pg.COMPILE_FROM_FLOPS, "cpu", (0, math.inf))
    monkeypatch.setattr(pg, "remove", lambda *_: None)  # a run that ends takes its checkpoints away
    monkeypatch.setattr(torch, "compile", lambda f, **_: (asked.append(f), f)[1])
    often = QUICK | dict(CHECKPOINT_EVERY=1e-6)
    ran = run_here(tmp_path / "a", tiny_data, **often)
    assert ran.code == 0 and "compile:1 " in ran.out
    assert "\ncompile:auto training:1 whole:0 sliding:0 learning:0\n" in ran.out
    # The compiler is tried; then the model's training and Newton-Schulz, and no model that only scores.
    assert [f.__name__ for f in asked if not isinstance(f, torch.nn.Module)] == ["square", "newton_schulz"]
    assert len(asked) == 3 and ran.artifact == whole.artifact
    checkpoint = sorted(ran.folder.glob("*.pgckpt"))[0]

    def fail(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fail)
    says = f"error: {checkpoint} was trained compiled: torch.compile fails (no compiler); it needs a C++ compiler"
    again = run_here(tmp_path / "b", tiny_data, RESUME=checkpoint, **often)
    assert again.code == 2 and said(again.err).startswith(says)
    ran = run_here(tmp_path / "c", tiny_data, **often)  # from the beginning: slower, and said
    assert ran.code == 0 and ran.artifact == whole.artifact
    assert "compile:0 " in ran.out and "\nwarning: runs uncompiled, slower: torch.compile fails (" in ran.out
    checkpoint = sorted(ran.folder.glob("*.pgckpt"))[0]
    asked.clear()
    monkeypatch.setattr(torch, "compile", lambda f, **_: (asked.append(f), f)[1])
    again = run_here(tmp_path / "d", tiny_data, RESUME=checkpoint, **often)
    assert (again.code, asked, again.artifact) == (0, [], whole.artifact)


def test_much_text_on_a_cpu_is_scored_compiled_where_there_is_a_compiler(whole, tiny_data, tmp_path, monkeypatch):
    """torch.compile replaced by what it makes faster."""
    asked = []
    monkeypatch.setitem(pg.COMPILE_FROM_FLOPS, "cpu", (math.inf, 0))
    again = dict(EVAL_ONLY=1, ARTIFACT_PATH=whole.folder / "artifact.pgolf")

    monkeypatch.setattr(torch, "compile", lambda f, **_: (asked.append(f), f)[1])
    ran = run_here(tmp_path / "a", tiny_data, **again)
    assert ran.code == 0 and "\ncompile:auto training:0 whole:1 sliding:1 learning:1\n" in ran.out
    assert [isinstance(f, torch.nn.Module) for f in asked] == [False, True]  # what tries the compiler, and the model

    def fail(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fail)
    plain = run_here(tmp_path / "b", tiny_data, **again)
    assert "compile:0 " in plain.out and "\nwarning: runs uncompiled, slower: torch.compile fails (" in plain.out
    assert plain.code == 0 and plain.result["scores"] == ran.result["scores"]


@pytest.mark.skipif(torch.__version__.startswith("2.9."), reason="makes no cache for a run that compiles nothing")
def test_a_cache_that_torch_cannot_make_is_not_blamed_on_out_dir(tiny_data, tmp_path):
    (tmp_path / "file").touch()
    environ = {**TINY_ENV, **QUICK, "DATA_PATH": tiny_data, "TORCHINDUCTOR_CACHE_DIR": tmp_path / "file" / "cache"}
    environ = clean_environ(**environ)
    ran = subprocess.run(SCRIPT, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2 and said(ran.stderr).startswith("error: torch makes no cache: [Errno 20]")
    assert "set TORCHINDUCTOR_CACHE_DIR" in ran.stderr and not (tmp_path / "logs").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_what_a_tensor_frees_the_next_one_takes():
    """Without asking the system, which clears each page of what it gives."""
    code = """if True:
        import resource, torch, train_gpt as pg
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(5):
                torch.ones(16 << 20)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        faults()
        given_back = faults()
        pg.keep_freed_memory()
        print(given_back, min(faults() for _ in range(5)))"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean_environ(), capture_output=True, text=True)
    given_back, kept = map(int, ran.stdout.split())
    assert given_back > 10_000 and kept < given_back / 10


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_tensors_lie_on_huge_pages_and_take_no_more_memory_than_they_fill():
    how = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not how.exists() or "[never]" in how.read_text():
        pytest.skip("this system has no huge pages")
    code = """if True:
        import torch, train_gpt as pg
        def memory(name):  # kB
            lines = open("/proc/self/smaps_rollup").read().splitlines()
            return int(next(line for line in lines if line.startswith(name + ":")).split()[1])
        before = memory("Rss")
        pg.keep_freed_memory()
        reserved, tensor = memory("Rss"), torch.ones(64 << 18)
        print(reserved - before, memory("AnonHugePages"), memory("Rss") - reserved)"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean_environ(), capture_output=True, text=True)
    reserved, huge, filled = (int(kb) / 1024 for kb in ran.stdout.split())
    assert reserved < 8 and huge >= 32 and filled < 80


def test_a_full_memory_is_one_line_that_names_the_settings(tiny_data, tmp_path, monkeypatch):
    def fill(*_) -> None:
        torch.empty(1 << 50)  # beyond any address space

    monkeypatch.setattr(pg, "accumulate_gradients", at_call(pg.accumulate_gradients, 2, fill))
    ran = run_here(tmp_path, tiny_data, **QUICK)
    assert ran.code == 2 and said(ran.err).startswith("error: out of memory; lower MICRO_BATCH_TOKENS (training), ")


def test_a_memory_that_is_full_before_training_is_one_line_too(tiny_data, tmp_path, monkeypatch):
    def fill(*_) -> None:
        raise MemoryError

    monkeypatch.setattr(pg, "load_validation", fill)
    ran = run_here(tmp_path, tiny_data, **QUICK)
    assert ran.code == 2 and said(ran.err).startswith("error: out of memory; lower MICRO_BATCH_TOKENS (training), ")


# -----------------------------------------------------------------------------
# HOW A RUN ENDS
# -----------------------------------------------------------------------------

COMPILER = RuntimeError("backend failed")
COMPILER.inner_exception = OSError(28, "No space left on device")
AGREED = pg.UserError("bad data")
AGREED.agreed = True
LOWER = "lower MICRO_BATCH_TOKENS (training), VAL_BATCH_SIZE (scoring) or TTT_BATCH_SEQS (a part of the method)"
LOST = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
ENDS = [  # the exception, the exit code, the line, and whether each rank that meets it says so
    (pg.Interrupted(signal.SIGTERM), 143, "interrupted: SIGTERM; go on", False),
    (pg.LimitError("no longer finite"), 3, "limit: no longer finite", False),
    (pg.UserError("bad data"), 2, "error: bad data", True),
    (AGREED, 2, "error: bad data", False),
    (COMPILER, 2, "error: torch.compile fails: [Errno 28] No space left on device; go on", True),
    (torch.OutOfMemoryError("CUDA"), 2, f"error: out of GPU memory; {LOWER}; go on", True),
    (RuntimeError("DefaultCPUAllocator: not enough memory"), 2, f"error: out of memory; {LOWER}; go on", True),
    (LOST, 1, "error: rank 1 lost another rank, see its error; go on", True),
]


@pytest.mark.parametrize("error, code, line, own", ENDS, ids=lambda x: type(x).__name__)
def test_every_end_has_its_code_and_one_line(error, code, line, own):
    ranks = single_rank()
    ranks.rank, ranks.size = 1, 2
    assert pg.ending(error, ranks, {}, "go on") == (code, line, own)


def test_before_the_ranks_met_the_main_one_speaks_unless_they_could_not_meet():
    environ = dict(RANK="1", MASTER_ADDR="nowhere", MASTER_PORT="29500")
    assert pg.ending(pg.UserError("bad setting"), None, environ, "") == (2, "error: bad setting", False)
    where = "MASTER_ADDR=nowhere MASTER_PORT=29500"
    line = f"error: rank 1 did not meet the others at {where}: {LOST}"
    assert pg.ending(LOST, None, environ, "") == (2, line, True)
    refused = RuntimeError("Gloo connectFullMesh failed with [gloo/transport/tcp/pair.cc:152] timed out connecting")
    code, line, own = pg.ending(refused, None, environ, "")
    assert (code, own) == (2, True) and "set GLOO_SOCKET_IFNAME" in line


def test_what_hosts_may_differ_in_is_where_they_keep_it():
    own = dataclasses.asdict(tiny_hp()) | dict(script="a", text="b")
    pg.check_alike([own, own | dict(data_path="/here", out_dir="/there")])
    with pytest.raises(pg.UserError, match="^ranks 0 and 2 differ in SEED, SCRIPT; start"):
        pg.check_alike([own, own, own | dict(seed=7, script="c", data_path="/here")])


def test_a_checkpoint_that_is_on_another_host_is_said_to_be(tmp_path):
    signals = pg.Signals()
    signals.is_main = False
    for path, more in ((tmp_path / "there", ", which is on the host of rank 0"), (tmp_path, "")):
        signals.resume_from(path)
        assert signals.advice == f"go on with the same command and RESUME={path}{more}"


@pytest.mark.parametrize("error", [RuntimeError("a mistake of ours"), ZeroDivisionError(), SystemExit(1)], ids=repr)
def test_a_fault_of_the_script_is_shown_as_it_is(error):
    assert pg.ending(error, single_rank(), {}, "") is None and pg.ending(error, None, {}, "") is None


# -----------------------------------------------------------------------------
# RESTARTS
# -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_costs_seconds_where_torchrun_restarts(victim, tiny_data, tmp_path):
    """The same artifact as without the kill, and no rank that calls the dead."""
    long = dict(ITERATIONS=80, WARMDOWN_ITERS=70, TRAIN_LOG_EVERY=1, RESUME="auto", CHECKPOINT_EVERY=0.1)
    environ = clean_environ(**{**TINY_ENV, **QUICK, **long, "DATA_PATH": tiny_data, "RUN_ID": "run"})
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    artifacts = []
    for name in ("whole", "killed"):
        folder, log = tmp_path / name, tmp_path / name / "logs" / "run.txt"
        folder.mkdir()
        script = [ROOT / "tests" / "broken.py"] if name == "killed" else [ROOT / "train_gpt.py"]
        kill = dict(JOBS=f'[{{"fault": ["accumulate_gradients", 20, "die_once", {victim}]}}]')
        ran = subprocess.run(
            [*torchrun, *script], cwd=folder, env=environ | kill, capture_output=True, text=True, timeout=300
        )
        assert ran.returncode == 0, ran.stderr
        assert "connectFullMesh" not in ran.stderr
        resumed = re.findall(r"^resume:step:\d+", log.read_text("utf-8"), re.MULTILINE)
        assert len(resumed) == (name == "killed")
        artifacts.append((folder / "runs" / "run" / "artifact.pgolf").read_bytes())
    assert artifacts[0] == artifacts[1]


# -----------------------------------------------------------------------------
# THE HOST NEVER WAITS FOR THE STEP THAT IT JUST LAUNCHED
# -----------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for the device: a value read, or a shape that depends on values."""

    OPS = frozenset("_local_scalar_dense nonzero is_nonzero equal unique _unique2 masked_select".split())
    METHODS = ("cpu", "numpy", "tolist")  # which reach a device without an operator of their own

    def __init__(self, monkeypatch):
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()
        for name in self.METHODS:
            monkeypatch.setattr(torch.Tensor, name, self.counting(name, getattr(torch.Tensor, name)))

    def counting(self, name: str, method):
        def counted(tensor, *args, **kwargs):
            self.found[name] += 1
            return method(tensor, *args, **kwargs)

        return counted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (name := function.overloadpacket.__name__) in self.OPS:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(late_qat=True, late_qat_threshold=1.0, micro_batch_tokens=32),
        dict(num_loops=1, loop_start=1, loop_end=1, enable_looping_at=0.3),
        dict(swa_enabled=True, skip_gates_enabled=True, value_residual=True, grad_clip_norm=0.3),
    ],
)
def test_a_step_reads_nothing_but_the_clock_of_the_step_before(settings, monkeypatch):
    hp, steps = tiny_hp(iterations=6, **settings), 6
    trainer = pg.Trainer(make_run(hp))
    trainer.warm_up()
    tokens = torch.from_numpy(random_tokens(hp.train_batch_tokens + 1).astype(np.int64))
    batch = [part.view(-1, hp.train_seq_len) for part in (tokens[:-1], tokens[1:])]
    trainer.clock.resume()
    with Reads(monkeypatch) as reads:
        for _ in range(steps):
            trainer.train_step(*batch)
    assert reads.found == {"tolist": steps - 1}
    with reads:  # what careless lines do
        assert batch[0].sum() > 0 and batch[0].max().item() and len(batch[0].nonzero())
    assert reads.found == {"tolist": steps - 1, "_local_scalar_dense": 2, "nonzero": 1}
