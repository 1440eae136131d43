"""World sizes: the same weights and scores however many processes share the work, and no rank that hangs."""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, TINY_ENV, Ran, jobs_in_world, run_here, torchrun

import train_gpt as pg

# Five layers: banks of 5 and 10 matrices are padded for 3 ranks, and that of 5 for 2 ranks. Two things would turn a
# rounding difference into a visible one and are off: fake quantization, and AdamW's division by gradients near zero.
SETTINGS = dict(NUM_LAYERS=5, MODEL_DIM=16, ITERATIONS=5, WARMDOWN_ITERS=2, VAL_LOSS_EVERY=2, SAVE_WEIGHTS=1)
SETTINGS |= dict(LATE_QAT=0, ADAM_EPS=1e-4)
SAME_WEIGHTS = 1e-5  # what world sizes may differ by; bf16 differs by more than ten times that


def tiny_environ(data: Path, **settings) -> dict[str, str]:
    return {name: str(value) for name, value in {**TINY_ENV, **SETTINGS, "DATA_PATH": data, **settings}.items()}


class World(NamedTuple):
    """What all jobs of one world size left."""

    size: int
    codes: list[list[int]]  # of each rank, job by job
    out: str
    err: str
    runs: dict[str, Ran]


JOBS = ["fp32", "bf16", "eval", "eval16", "wrong"]


@pytest.fixture(scope="module")
def alone(tiny_data, tmp_path_factory) -> dict[str, Ran]:
    """The reference: one process, in bf16 and fp32, and the latter with gradient accumulation and scored in bf16."""
    out = tmp_path_factory.mktemp("alone")
    accumulated = dict(DTYPE="fp32", MICRO_BATCH_TOKENS=96)
    runs = dict(fp32=dict(DTYPE="fp32"), bf16=dict(DTYPE="bf16"), accumulated=accumulated)
    ran = {name: run_here(out, tiny_data, name, **SETTINGS, **settings) for name, settings in runs.items()}
    evaluation = dict(EVAL_ONLY=1, ARTIFACT_PATH=ran["fp32"].folder / "artifact.pgolf", DTYPE="bf16")
    return ran | dict(eval16=run_here(out, tiny_data, "eval16", **SETTINGS, **evaluation))


def start_world(size: int, data: Path, alone: dict[str, Ran], folder: Path) -> World:
    """Every job in the same processes, one after the other: starting torchrun takes longer than all of them."""
    evaluation = dict(EVAL_ONLY="1", ARTIFACT_PATH=str(alone["fp32"].folder / "artifact.pgolf"))
    jobs = [
        tiny_environ(data, DTYPE="fp32", RUN_ID="fp32"),
        tiny_environ(data, DTYPE="bf16", RUN_ID="bf16"),
        tiny_environ(data, RUN_ID="eval", DTYPE="fp32") | evaluation,
        tiny_environ(data, RUN_ID="eval16", DTYPE="bf16") | evaluation,
        tiny_environ(data, RUN_ID="wrong", VOCAB_SIZE=600),
    ]
    ran, codes = jobs_in_world(size, folder, jobs)
    runs = {n: Ran(codes[0][i], "", "", folder / "runs" / n, folder / "logs" / f"{n}.txt") for i, n in enumerate(JOBS)}
    return World(size, codes, ran.stdout, ran.stderr, runs)


@pytest.fixture(scope="module", params=[2, 3])
def world(request, tiny_data, alone, tmp_path_factory) -> World:
    return start_world(request.param, tiny_data, alone, tmp_path_factory.mktemp(f"world{request.param}"))


def weights(ran: Ran) -> dict[str, torch.Tensor]:
    _, tensors = pg.unpack_artifact((ran.folder / "weights.pgolf").read_bytes())
    return {name: stored.data for name, stored in tensors.items()}


def difference(a: Ran, b: Ran) -> float:
    """Largest difference of any weight."""
    x, y = weights(a), weights(b)
    return max(float((x[name] - y[name]).abs().max()) for name in x)


def bpb(ran: Ran) -> dict[str, float]:
    return {name: score["val_bpb"] for name, score in ran.result["scores"].items()}


def test_jobs_end_alike_on_every_rank(world):
    assert world.codes == [[0, 0, 0, 0, 2]] * world.size


def test_weights_do_not_depend_on_the_world_size(world, alone):
    assert difference(world.runs["fp32"], alone["fp32"]) < SAME_WEIGHTS
    moved = difference(alone["fp32"], alone["bf16"])
    assert moved > 1e-4  # the tolerance is below what another arithmetic does


def test_scores_do_not_depend_on_the_world_size(world, alone):
    reference = {name: value for name, value in bpb(alone["fp32"]).items() if not name.startswith("float_")}
    assert bpb(world.runs["eval"]) == pytest.approx(reference, abs=1e-6, rel=0)
    assert set(reference) == {"final_int6_roundtrip", "final_int6_sliding_window", "legal_ttt"}
    # In bf16 windows and batches are the same; adaptation sums other parts of a gradient.
    assert bpb(world.runs["eval16"]) == pytest.approx(bpb(alone["eval16"]), abs=1e-4, rel=0)
    trained = bpb(world.runs["fp32"])
    floats = [name for name in trained if name.startswith("float_")]
    assert {n: trained[n] for n in floats} == pytest.approx({n: bpb(alone["fp32"])[n] for n in floats}, abs=1e-6, rel=0)
    # A weight at the edge of a grid cell may fall to the other side in the run's own artifact.
    assert trained == pytest.approx(bpb(alone["fp32"]), abs=1e-4, rel=0)


# Measured: up to 5e-4 bpb after five steps, as far apart as bf16 and fp32 are from each other.
BF16_BPB = 2e-3


def test_bf16_scores_agree_as_far_as_bf16_does(world, alone):
    assert bpb(world.runs["bf16"]) == pytest.approx(bpb(alone["bf16"]), abs=BF16_BPB, rel=0)
    assert world.runs["bf16"].result["dtype"] == "bfloat16"


def test_the_result_names_the_world_and_counts_no_token_twice(world, alone):
    result, reference = world.runs["fp32"].result, alone["fp32"].result
    assert result["world_size"] == world.size
    for name in ("steps", "train_tokens", "settings_hash", "train_fingerprint", "val_fingerprint", "exported"):
        assert result[name] == reference[name]
    for label, score in result["scores"].items():
        assert (score["tokens"], score["bytes"]) == tuple(reference["scores"][label][k] for k in ("tokens", "bytes"))


def test_the_training_losses_are_those_of_the_whole_batch(world, alone):
    def losses(text: str) -> list[float]:
        return [float(x) for x in re.findall(r"^step:\d+/5 (?:train|val)_loss:(\S+)", text, re.MULTILINE)]

    expected = losses(alone["fp32"].log.read_text("utf-8"))
    assert len(expected) == 5 + 3
    assert losses(world.runs["fp32"].log.read_text("utf-8")) == pytest.approx(expected, abs=1.5e-4)


def test_the_main_rank_alone_writes_and_speaks(world):
    text = world.runs["fp32"].log.read_text("utf-8")
    for line in (f"world_size:{world.size} grad_accum_steps:1", "seed:1337", "warmup_step:1/1"):
        assert re.findall(rf"^{line}$", text, re.MULTILINE) == [line]
        assert len(re.findall(rf"^{line}$", world.out, re.MULTILINE)) == (4 if line.startswith("seed") else 2)
    assert len(re.findall(r"^result \{", world.out, re.MULTILINE)) == 4


def test_an_error_in_the_data_is_said_once(world):
    lines = [line for line in world.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "has 512 pieces, not VOCAB_SIZE=600" in lines[0]
    assert "Traceback" not in world.err
    assert not world.runs["wrong"].log.exists()


def test_micro_batches_change_nothing(alone):
    assert "grad_accum_steps:4" in alone["accumulated"].out and "grad_accum_steps:1" in alone["fp32"].out
    assert difference(alone["accumulated"], alone["fp32"]) < SAME_WEIGHTS
    assert bpb(alone["accumulated"]) == pytest.approx(bpb(alone["fp32"]), abs=1e-4, rel=0)


def stopped_by_a_bad_token(tiny_data: Path, tmp_path: Path, position: int) -> str:
    """stderr of two ranks of train_gpt.py itself whose training text has an id beyond the vocabulary there."""
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    path = data / "fineweb_train_000000.bin"
    whole = bytearray(path.read_bytes())
    whole[1024 + 2 * position : 1024 + 2 * position + 2] = (700).to_bytes(2, "little")
    path.write_bytes(whole)
    environ = tiny_environ(data, ITERATIONS=100_000, VAL_LOSS_EVERY=0, RUN_ID="bad")
    ran, seconds = torchrun(2, ROOT / "train_gpt.py", tmp_path, **environ)
    assert ran.returncode != 0 and seconds < 45
    assert "terminate called" not in ran.stderr and "SIGABRT" not in ran.stderr
    log = (tmp_path / "logs" / "bad.txt").read_text("utf-8")
    assert "world_size:2 grad_accum_steps:1" in log and "step:2/100000" in log
    return ran.stderr


# A batch is 384 targets, of which rank 1 has the last 192; its 193rd input is also its predecessor's last target.
@pytest.mark.parametrize("position", [4 * 384 + 300, 4 * 384 + 192], ids=["rank1", "both"])
def test_a_bad_training_token_on_any_rank_ends_the_run_with_one_line(position, tiny_data, tmp_path):
    err = stopped_by_a_bad_token(tiny_data, tmp_path, position)
    said = [line for line in err.splitlines() if "holds token id 700" in line]
    assert len(said) == 1 and "error: " in said[0]
    assert 'train_gpt.py", line' not in err  # no traceback of ours


def test_a_batch_that_does_not_split_is_refused():
    hp = pg.Hyperparameters.from_env(tiny_environ(Path("data")))
    assert [hp.micro_batch(size) for size in (1, 2, 3, 4, 6, 12)] == [384, 192, 128, 96, 64, 32]
    for size in (5, 7, 8, 24):
        with pytest.raises(pg.UserError, match=f"must be a multiple of WORLD_SIZE={size} x TRAIN_SEQ_LEN=32"):
            hp.micro_batch(size)
    with pytest.raises(pg.UserError, match="MICRO_BATCH_TOKENS=96 must divide a rank's 128 tokens"):
        dataclasses.replace(hp, micro_batch_tokens=96).micro_batch(3)
