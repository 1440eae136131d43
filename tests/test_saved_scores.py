"""What a run leaves for an audit: sums of its scores in its result and, with SAVE_SCORES=1, all of them."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Ran, jobs_in_world, run_here
from helpers import build_model, make_run, tiny_hp, weights_of
from test_ttt import LENGTHS, PhasedLoRA, documents_of

import train_gpt as pg

LORA = dict(ttt_params="lora", ttt_lora_chunk=4, ttt_lora_rank=2, ttt_lr=0.5)
METHODS = dict(
    sgd=dict(),
    without_ttt=dict(ttt_enabled=False),
    without_sliding_windows=dict(ttt_enabled=False, eval_stride=0),
    single_targets=dict(eval_stride=1),
    temperature=dict(ttt_temperature=True),
    hedge=dict(hedge_enabled=True),
    hedge_and_temperature=dict(hedge_enabled=True, ttt_temperature=True, ttt_params="scales"),
    lora=LORA,
    lora_in_batches=LORA | dict(val_batch_size=32),
    lora_carried=LORA | dict(ttt_lora_reset=False),
)


def saved(hp, tokens: np.ndarray) -> tuple[pg.Evaluation, dict[str, pg.Score]]:
    stored = {name: pg.Stored("fp32", w, None) for name, w in weights_of(build_model(hp, hp.eval_seq_len)).items()}
    evaluation = pg.Evaluation(make_run(hp, tokens=tokens), stored)
    return evaluation, evaluation.score_all()


def place_in_order(order: np.ndarray) -> np.ndarray:
    """Of each target."""
    assert np.array_equal(np.sort(order), np.arange(len(order)))
    return np.argsort(order)


@pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)
def test_every_pass_says_what_it_scored_in_which_order_and_the_last_distribution(changes):
    hp, tokens = tiny_hp(save_scores=True, **changes), documents_of(LENGTHS)
    other = np.append(tokens[:-1], np.uint16(9))
    (first, scores), (second, _) = (saved(hp, text) for text in (tokens, other))
    documents = np.cumsum(tokens[:-1] == pg.BOS_ID)
    for label, score in scores.items():
        nats, order, last = (first.saved[f"{label}.{name}"] for name in ("nats", "order", "last"))
        assert nats.sum(dtype=np.float64) == score.nats
        place = place_in_order(order)
        assert all((np.diff(place[documents == d]) > 0).all() for d in set(documents))
        sums = [part.sum(dtype=np.float64) for part in np.array_split(nats[order], 64)]
        assert np.allclose(sums, first.blocks[label], atol=1e-6) and len(sums) == 64
        assert abs(np.exp(last).sum() - 1) < 1e-6 and np.array_equal(last, second.saved[f"{label}.last"])
        assert nats[-1] == pytest.approx(-last[tokens[-1]], abs=1e-5)
        assert second.saved[f"{label}.nats"][-1] == pytest.approx(-last[9], abs=1e-5) and nats[-1] != -last[9]


def test_documents_side_by_side_are_scored_the_longest_first_and_in_turn():
    hp, tokens = tiny_hp(save_scores=True, **LORA), documents_of([3, 9, 6])
    order = saved(hp, tokens)[0].saved["legal_ttt.order"]
    assert order.tolist() == [3, 4, 5, 6, 12, 13, 14, 15, 0, 1, 2, 7, 8, 9, 10, 16, 17, 11]


def test_a_piece_without_targets_is_in_no_order(monkeypatch):
    monkeypatch.setitem(pg.TTT_METHODS, "lora", PhasedLoRA)
    evaluation, _ = saved(tiny_hp(save_scores=True, val_batch_size=32, **LORA), documents_of(LENGTHS))
    place_in_order(evaluation.saved["legal_ttt.order"])


def test_scores_that_are_no_numbers_leave_a_result_that_is_json():
    evaluation, _ = saved(tiny_hp(), documents_of(LENGTHS))
    method = evaluation.passes["legal_ttt"]
    nats = evaluation.run_pass(method, evaluation.run.val.tokens, method.plan(evaluation.run.val.tokens))
    nats[0] = np.nan
    evaluation.keep("legal_ttt", method, nats)
    assert evaluation.blocks["legal_ttt"][0] is None and evaluation.blocks["legal_ttt"][1] > 0


# -----------------------------------------------------------------------------
# WHOLE RUNS
# -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory) -> Ran:
    return run_here(
        tmp_path_factory.mktemp("trained"), tiny_data, ITERATIONS=4, WARMDOWN_ITERS=2, NUM_LAYERS=2, VE_LAYERS=1
    )


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(path.read_bytes())) as file:
        return dict(file)


def test_saving_scores_changes_none_and_every_run_has_their_sums(trained, tiny_data, tmp_path):
    few = dict(tiny=False, EVAL_ONLY=1, ARTIFACT_PATH=trained.folder / "artifact.pgolf", SAVE_SCORES=1, DEVICE="cpu")
    again = run_here(tmp_path, tiny_data, **few)
    assert again.code == 0 and again.result["blocks"] == trained.result["blocks"]
    assert tiny_hp().settings_hash() == tiny_hp(save_scores=True).settings_hash()
    assert not (trained.folder / "scores.npz").exists()
    found, val = (
        arrays(again.folder / "scores.npz"),
        pg.load_validation(pg.Hyperparameters(data_path=str(tiny_data), vocab_size=512)),
    )
    assert np.array_equal(found["bytes"], val.bytes)
    for label, sums in again.result["blocks"].items():
        score = trained.result["scores"][label]
        assert sum(sums) == pytest.approx(score["val_loss"] * score["tokens"], abs=1e-4)
        assert sum(sums) == pytest.approx(found[f"{label}.nats"].sum(dtype=np.float64), abs=1e-4)
    assert len(found) == 1 + 3 * len(again.result["blocks"])


def test_ranks_that_score_documents_apart_tell_one_order(trained, tiny_data, tmp_path):
    job = dict(DATA_PATH=tiny_data, EVAL_ONLY=1, ARTIFACT_PATH=trained.folder / "artifact.pgolf", SAVE_SCORES=1)
    job |= dict(DEVICE="cpu", DTYPE="fp32", TTT_PARAMS="lora", TTT_LORA_CHUNK=16, EVAL_STRIDE=32, VAL_BATCH_SIZE=256)
    jobs = [{name: str(value) for name, value in job.items()} | dict(OUT_DIR=str(tmp_path), RUN_ID="two")]
    ran, codes = jobs_in_world(2, tmp_path, jobs, ROOT)
    assert codes == [[0], [0]], ran.stderr
    alone = run_here(tmp_path, tiny_data, tiny=False, run_id="one", **job)
    two, one = (arrays(tmp_path / "runs" / name / "scores.npz") for name in ("two", "one"))
    # A round of two ranks is a batch of one: the pieces of its documents, side by side.
    assert np.array_equal(two["legal_ttt.order"], one["legal_ttt.order"])
    place_in_order(two["legal_ttt.order"])
    for name in ("legal_ttt.nats", "legal_ttt.last"):
        assert np.abs(two[name] - one[name]).max() < 1e-4
    blocks = json.loads((tmp_path / "runs/two/result.json").read_text())["blocks"]["legal_ttt"]
    sums = [part.sum(dtype=np.float64) for part in np.array_split(two["legal_ttt.nats"][two["legal_ttt.order"]], 64)]
    assert np.allclose(sums, blocks, atol=1e-6)
    assert np.allclose(blocks, alone.result["blocks"]["legal_ttt"], atol=1e-2)
