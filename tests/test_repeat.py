"""What repeats: the scores of an artifact when what should not matter changes."""

import pytest
import torch
from broken import at_call
from conftest import Ran, run_here

import train_gpt as pg

PASSES = {"final_int6_roundtrip", "final_int6_sliding_window", "legal_ttt"}


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory) -> Ran:
    return run_here(tmp_path_factory.mktemp("trained"), tiny_data)


@pytest.fixture(scope="module")
def evaluate(trained, tiny_data, tmp_path_factory):
    """bpb of each pass of EVAL_ONLY with these settings."""

    def run(**settings) -> dict[str, float]:
        artifact = trained.folder / "artifact.pgolf"
        folder = tmp_path_factory.mktemp("evaluated")
        ran = run_here(folder, tiny_data, tiny=False, DEVICE="cpu", EVAL_ONLY=1, ARTIFACT_PATH=artifact, **settings)
        assert (ran.code, ran.err) == (0, "")
        return {label: score["val_bpb"] for label, score in ran.result["scores"].items()}

    return run


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def dtype(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def reference(evaluate, dtype) -> dict[str, float]:
    bpb = evaluate(DTYPE=dtype)
    assert set(bpb) == PASSES and len(set(bpb.values())) == 3
    return bpb


TOLERANCE = dict(fp32=1e-6, bf16=1e-4)


def test_scores_repeat_bit_for_bit(evaluate, dtype, reference):
    assert evaluate(DTYPE=dtype) == reference
    assert evaluate(DTYPE=dtype, MICRO_BATCH_TOKENS=4096, TRAIN_BATCH_TOKENS=8192) == reference  # of training alone


@pytest.mark.parametrize("tokens", [1, 96, 1000, 4096, 524288])
def test_scores_do_not_depend_on_the_batch_they_are_computed_in(tokens, evaluate, dtype, reference):
    bpb = evaluate(DTYPE=dtype, VAL_BATCH_SIZE=tokens)
    assert bpb == pytest.approx(reference, abs=TOLERANCE[dtype], rel=0)


def test_scores_do_not_depend_on_the_kernel_or_the_threads(evaluate, dtype, reference, monkeypatch):
    for kernel in ("sdpa", "matmul"):
        bpb = evaluate(DTYPE=dtype, ATTENTION=kernel)
        assert bpb == pytest.approx(reference, abs=TOLERANCE[dtype], rel=0)

    def use_two(run, *_):
        torch.set_num_threads(2)
        return run

    monkeypatch.setattr(pg, "prepare", at_call(pg.prepare, 1, use_two))
    assert evaluate(DTYPE=dtype) == pytest.approx(reference, abs=TOLERANCE[dtype], rel=0)


def test_the_arithmetic_is_visible(evaluate):
    """The tolerance of fp32 is below what bf16 moves."""
    fp32, bf16 = evaluate(DTYPE="fp32"), evaluate(DTYPE="bf16")
    assert all(abs(fp32[label] - bf16[label]) > TOLERANCE["fp32"] for label in PASSES)


def test_the_sequences_of_an_adaptation_step_are_part_of_the_method(evaluate, dtype, reference):
    bpb = evaluate(DTYPE=dtype, TTT_BATCH_SEQS=4)
    assert {label for label in PASSES if bpb[label] == reference[label]} == PASSES - {"legal_ttt"}
    assert abs(bpb["legal_ttt"] - reference["legal_ttt"]) > TOLERANCE["fp32"]
