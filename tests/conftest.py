"""Shared fixtures. The environment is set before anything imports torch."""

import os

# Two torch processes on two cores spin against each other with libgomp's default policy (measured: up to 37x slower).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores, so one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import contextlib
import inspect
import io
import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

REAL_TEXT_DIR = Path(os.environ.get("REAL_TEXT_DIR") or ROOT.parent / "shared" / "data")


@pytest.fixture(scope="session")
def real_text() -> Path:
    """Folder with real documents: webmix_train.jsonl.gz, fineweb_val_450.jsonl.gz, fineweb_*_bpe.model."""
    if not (REAL_TEXT_DIR / "fineweb_val_450.jsonl.gz").exists():
        pytest.skip(f"no real text at {REAL_TEXT_DIR}; point REAL_TEXT_DIR at it")
    return REAL_TEXT_DIR


# -----------------------------------------------------------------------------
# A TINY DATA SET AND TINY RUNS
# -----------------------------------------------------------------------------

TINY_ENV = dict(
    DEVICE="cpu",
    DTYPE="fp32",
    VOCAB_SIZE="512",
    NUM_LAYERS="3",
    MODEL_DIM="32",
    NUM_HEADS="4",
    NUM_KV_HEADS="2",
    ROPE_DIMS="4",
    XSA_LAST_N="1",
    BIGRAM_VOCAB_SIZE="64",
    BIGRAM_DIM="8",
    VE_DIM="8",
    VE_LAYERS="1,2",
    TRAIN_SEQ_LEN="32",
    EVAL_SEQ_LEN="32",
    TRAIN_BATCH_TOKENS="384",
    ITERATIONS="12",
    WARMDOWN_ITERS="11",
    WARMUP_STEPS="1",
    MAX_WALLCLOCK_SECONDS="0",
    TRAIN_LOG_EVERY="5",
    VAL_LOSS_EVERY="6",
    MUON_MOMENTUM_WARMUP_STEPS="4",
    SWA_ENABLED="1",
    SWA_EVERY="1",
    VAL_BATCH_SIZE="2048",
    EVAL_STRIDE="16",
    TTT_CHUNK_TOKENS="512",
    TTT_EPOCHS="1",
    TTT_BATCH_SEQS="8",
)


class Ran(NamedTuple):
    """What a run left."""

    code: int
    out: str
    err: str
    folder: Path  # of results
    log: Path

    @property
    def result(self) -> dict:
        return json.loads((self.folder / "result.json").read_text("utf-8"))

    @property
    def artifact(self) -> bytes:
        return (self.folder / "artifact.pgolf").read_bytes()


def run_here(
    out: Path, data: Path, run_id: str = "run", tiny: bool = True, argv: tuple[str, ...] = (), **settings
) -> Ran:
    """train_gpt.main in this process: a subprocess would import torch again."""
    import torch

    import train_gpt

    environ = {**(TINY_ENV if tiny else {}), "DATA_PATH": str(data), "OUT_DIR": str(out), "RUN_ID": run_id}
    environ |= {name: str(value) for name, value in settings.items()}
    stdout, stderr, threads = io.StringIO(), io.StringIO(), torch.get_num_threads()
    torch.set_num_threads(1)  # the order of floating-point sums depends on it
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            code = train_gpt.main(argv, environ)
    finally:
        torch.set_num_threads(threads)
    return Ran(code, stdout.getvalue(), stderr.getvalue(), out / "runs" / run_id, out / "logs" / f"{run_id}.txt")


def clean_environ(**settings) -> dict[str, str]:
    """Environment of a subprocess: this one's without settings of the script, and one thread."""
    kept = {"PATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR", "LANG", "OMP_WAIT_POLICY", "SYSTEMROOT"}
    base = {name: value for name, value in os.environ.items() if name in kept}
    return base | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in settings.items()}


def torchrun(
    size: int, script: Path, cwd: Path, timeout: float = 60, args: tuple[object, ...] = (), **environ
) -> tuple[subprocess.CompletedProcess, float]:
    """The finished command and its seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}", script]
    command += map(str, args)
    start = time.perf_counter()
    ran = subprocess.run(
        command, cwd=cwd, env=clean_environ(**environ), capture_output=True, text=True, timeout=timeout
    )
    return ran, time.perf_counter() - start


DRIVER = """
import json, os, sys
import torch.distributed as dist
sys.path.insert(0, {root!r})
import train_gpt

init, codes = dist.init_process_group, []
if size := (not hasattr(train_gpt, "fresh_store")) * int(os.environ["WORLD_SIZE"]):  # a script from before that
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
for number, job in enumerate(json.loads(os.environ["JOBS"])):
    if size:  # each group would find the addresses of the one before
        own = dict(store=dist.PrefixStore(str(number), store), rank=int(os.environ["RANK"]), world_size=size)
        dist.init_process_group = lambda backend, own=own: init(backend, **own)
    codes.append(train_gpt.main([], {{**os.environ, **job}}))
if dist.is_initialized():
    dist.destroy_process_group()  # left alone after an error, it may abort the interpreter's way down
open("codes" + os.environ["RANK"], "w").write(json.dumps(codes))
"""


def jobs_in_world(
    size: int, folder: Path, jobs: list[dict[str, str]], root: Path = ROOT, timeout: float = 60
) -> tuple[subprocess.CompletedProcess, list]:
    """Every job (an environment) in the same processes, one after the other: starting torchrun takes longer than all of
    them. Returns torchrun's end and the exit codes, rank by rank."""
    (folder / "driver.py").write_text(DRIVER.format(root=str(root)))
    ran, _ = torchrun(size, folder / "driver.py", folder, timeout, JOBS=json.dumps(jobs))
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran, [json.loads((folder / f"codes{rank}").read_text()) for rank in range(size)]


@pytest.fixture(scope="session")
def warm_reader() -> None:
    """torch loads parts of itself at the first model without storage: no measure of how fast an artifact is read."""
    import torch

    import train_gpt

    with torch.device("meta"):
        train_gpt.GPT(train_gpt.Hyperparameters(), 2, train_gpt.sdpa, torch.float32)


def make_tiny_data(folder: Path) -> Path:
    """Folder with a tokenizer of 512 pieces, training shards and a validation shard of a few thousand tokens, made by
    data/prepare.py from the standard library's docstrings."""
    modules = (argparse, inspect, json, logging, subprocess)
    members = [value for module in modules for value in vars(module).values()]
    members += [value for member in members if inspect.isclass(member) for value in vars(member).values()]
    texts = sorted({text for member in members if len(text := str(getattr(member, "__doc__", None) or "")) > 80})
    folder.mkdir(exist_ok=True)
    source = folder / "documents.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    command = [sys.executable, ROOT / "data" / "prepare.py", "text", source, "--val-docs", "30", "--vocab-size", "512"]
    command += ["--shard-tokens", "20000", "--workers", "1", "--out", folder / "shards"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "shards"


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    return make_tiny_data(tmp_path_factory.mktemp("tiny"))
