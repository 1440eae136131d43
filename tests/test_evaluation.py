"""The clock of the evaluation: what does not fit is cut from test-time training, never from the scores."""

import re
import threading
import time
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Ran, run_here
from helpers import build_model, make_run, random_tokens, scores_of, tiny_hp, weights_of

import train_gpt as pg

# With one second a window and ten an update: 6 s without overlap, 20 s with, and 20 + 10 × 10 s with TTT.
N, CHUNKS, ALL_SECONDS = 90, 11, 146.0


def limited(seconds: float, **changes):
    return tiny_hp(**{**dict(eval_max_seconds=float(seconds), ttt_chunk_tokens=8, ttt_epochs=1), **changes})


def evaluation_of(hp) -> pg.Evaluation:
    stored = {name: pg.Stored("fp32", w, None) for name, w in weights_of(build_model(hp)).items()}
    return pg.Evaluation(make_run(hp, tokens=random_tokens(N + 1)), stored)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_the_evaluation_compiles_what_it_was_told_to(whole, sliding, learning, lora, monkeypatch):
    """Which (training, width of targets) go through the graph, in its warm-up and after it; the scores stay."""
    changes = dict(ttt_params="lora", ttt_lora_chunk=4, phased_ttt_num_phases=1) if lora else {}
    hp, seen = tiny_hp(**changes), []
    plain = evaluation_of(hp).score_all()

    class Graph:
        def __init__(self, model):
            self.model = model

        def __call__(self, inputs, targets):
            seen.append((torch.is_grad_enabled(), targets.size(1)))
            return self.model(inputs, targets)

        def __len__(self):  # nor has a compiled model any: it is neither true nor false
            raise TypeError("GPT does not support len()")

    monkeypatch.setattr(pg, "compiled", lambda model, on: Graph(model) if on else model)
    stored = {name: pg.Stored("fp32", w, None) for name, w in weights_of(build_model(hp)).items()}
    compiled = pg.Compiled(True, whole, sliding, learning)
    evaluation = pg.Evaluation(make_run(hp, tokens=random_tokens(N + 1))._replace(compile=compiled), stored)
    evaluation.warm_up()
    width, stride = hp.eval_seq_len, hp.eval_stride
    expected = {
        kind for kind, on in {(False, width): whole, (False, stride): sliding, (True, width): learning}.items() if on
    }
    assert set(seen) == expected
    seen.clear()
    assert evaluation.score_all() == plain and set(seen) == expected


@pytest.mark.parametrize("params", ["all", "lora"])
def test_progress_counts_the_windows_of_each_pass(params, monkeypatch):
    counts = []

    class Bar:
        def __init__(self, total, label, log):
            counts.append([label, total, 0])

        def update(self, n):
            counts[-1][2] += n

        def close(self):
            pass

    evaluation = evaluation_of(tiny_hp(ttt_params=params, ttt_lora_chunk=4))
    monkeypatch.setattr(pg, "progress_bar", Bar)
    evaluation.score_all()
    assert [total for _, total, _ in counts] == [done for *_, done in counts] and len(counts) == 3


@pytest.fixture
def slow(monkeypatch):
    """A clock that stands still but for scoring (a second a window) and updates (ten). Remembers what was done."""
    seen = types.SimpleNamespace(now=0.0, update=10.0, scored=[], updates=0)
    score, adapt = pg.score, pg.StreamTTT.adapt

    def slow_score(model, tokens, windows, *rest):
        seen.now += len(windows)
        seen.scored.append((windows, score(model, tokens, windows, *rest)))
        return seen.scored[-1][1]

    def slow_adapt(self, tokens, lr):
        seen.now, seen.updates = seen.now + seen.update, seen.updates + 1
        adapt(self, tokens, lr)

    monkeypatch.setattr(pg, "score", slow_score)
    monkeypatch.setattr(pg.StreamTTT, "adapt", slow_adapt)
    monkeypatch.setattr(
        pg,
        "time",
        types.SimpleNamespace(perf_counter=lambda: seen.now, strftime=time.strftime, monotonic=time.monotonic),
    )
    return seen


def last_pass(seen) -> tuple[np.ndarray, np.ndarray]:
    """(targets, nats) in the order in which the last pass asked for them."""
    calls = seen.scored[-CHUNKS:]
    targets = [np.arange(first, end) for windows, _ in calls for _, first, end in windows]
    return np.concatenate(targets), np.concatenate([nats for _, nats in calls])


def chunk_ends(evaluation) -> list[int]:
    plan = evaluation.passes["legal_ttt"].plan(evaluation.run.val.tokens)
    return [int(chunk.windows[-1, 2]) for (chunk,) in plan.rounds]


def lines(evaluation, pattern: str) -> list[str]:
    return [line for line in evaluation.run.log if re.search(pattern, line)]


def test_no_limit_never_cuts_and_asks_no_rank(slow):
    evaluation = evaluation_of(limited(0))
    evaluation.run.ranks.largest = lambda x: pytest.fail("a collective without a limit")
    slow.update = 1e6
    assert list(evaluation.score_all()) == ["final_fp32_roundtrip", "final_fp32_sliding_window", "legal_ttt"]
    assert evaluation.cut is None and slow.updates == CHUNKS - 1 and not lines(evaluation, "cut|skipped|warning")


def test_enough_time_changes_nothing(slow):
    free = evaluation_of(limited(0)).score_all()
    timed = evaluation_of(limited(160))
    assert timed.score_all() == free and timed.elapsed() == ALL_SECONDS
    assert timed.cut is None and slow.updates == 2 * (CHUNKS - 1) and not lines(timed, "cut|skipped|warning")


@pytest.mark.parametrize("seconds, adapted", [(56, 1), (100, 5), (110, 6), (147, 9), (151, 10)])
def test_too_little_time_ends_learning_and_keeps_every_score(seconds, adapted, slow):
    uncut, stopped = evaluation_of(limited(0)), evaluation_of(limited(0))
    stopped.on_time = lambda plan, k: k < adapted
    expected, until_the_cut = (scores_of(e) for e in (uncut, stopped))
    slow.now = slow.updates = 0
    evaluation = evaluation_of(limited(seconds))
    scores = evaluation.score_all()
    targets, nats = last_pass(slow)
    assert slow.updates == adapted and evaluation.elapsed() <= seconds
    assert np.array_equal(targets, np.arange(N)) and scores["legal_ttt"].tokens == N
    assert scores["legal_ttt"].nats == nats.sum(dtype=np.float64)
    kept = chunk_ends(evaluation)[adapted]  # the chunk after the last update is the last that an uncut run scores alike
    assert np.array_equal(nats[:kept], expected[:kept]) and np.array_equal(nats, until_the_cut)
    assert adapted == CHUNKS - 1 or (nats[kept:] != expected[kept:]).any()
    cut = dict(chunks=CHUNKS, adapted=adapted, scored=CHUNKS)
    assert evaluation.cut == (cut if adapted < CHUNKS - 1 else None)
    said = [f"legal_ttt:cut adapted_chunks:{adapted} of:{CHUNKS - 1} to end before EVAL_MAX_SECONDS={seconds:g}"]
    assert [line.split(";")[0] for line in lines(evaluation, ":cut ")] == (said if evaluation.cut else [])


@pytest.mark.parametrize("epochs, adapted", [(280, 0), (200, 1)])
def test_a_first_update_that_would_take_too_long_is_not_begun(epochs, adapted, slow):
    """Forward and backward of a chunk once are guessed at 3/4 s: 20 s of scores, a twentieth of them for its window."""
    evaluation = evaluation_of(limited(255, ttt_epochs=epochs))
    slow.update = 1000.0
    evaluation.score_all()
    assert slow.updates == adapted and evaluation.cut == dict(chunks=CHUNKS, adapted=adapted, scored=CHUNKS)


def test_a_rank_without_documents_has_time(slow):
    evaluation = evaluation_of(limited(100))
    evaluation.before = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluation.on_time(pg.Plan([[]], 1), 0)
        assert all(evaluation.on_time(pg.Plan([[], [], []], 3), k) for k in range(3))


def test_after_a_cut_nothing_learns_however_fast_it_gets(slow):
    evaluation = evaluation_of(limited(100))
    evaluation.elapsed = lambda: 1000.0 if slow.updates == 3 and len(slow.scored) == 3 else 0.0
    slow.update = 0.0
    scores_of(evaluation)
    assert slow.updates == 3 and evaluation.cut == dict(chunks=CHUNKS, adapted=3, scored=CHUNKS)


def test_a_pass_that_is_cut_before_it_learns_repeats_the_sliding_scores(slow):
    evaluation = evaluation_of(limited(100))
    sliding = scores_of(evaluation, "final_fp32_sliding_window")
    evaluation.elapsed = lambda: 1000.0
    assert np.array_equal(scores_of(evaluation), sliding)
    assert slow.updates == 0 and evaluation.cut == dict(chunks=CHUNKS, adapted=0, scored=CHUNKS)


def test_weights_are_the_artifacts_after_a_cut(slow):
    evaluation = evaluation_of(limited(100))
    evaluation.score_all()
    assert evaluation.cut and slow.updates
    for name, weight in weights_of(evaluation.model).items():
        assert torch.equal(weight, evaluation.tensors[name].data), name


@pytest.mark.parametrize("seconds, skipped", [(45.9, True), (46, False)])
def test_ttt_is_skipped_where_its_scores_alone_would_not_fit(seconds, skipped, slow):
    evaluation = evaluation_of(limited(seconds))
    slow.update = 0.0
    scores = evaluation.score_all()
    assert list(scores)[-1] == ("final_fp32_sliding_window" if skipped else "legal_ttt")
    said = [f"legal_ttt:skipped it would end beyond EVAL_MAX_SECONDS={seconds:g}"]
    assert lines(evaluation, "skipped") == (said if skipped else [])
    if skipped:
        assert evaluation.cut == dict(chunks=CHUNKS, adapted=0, scored=0) and slow.updates == 0
        assert evaluation.elapsed() == 26


def test_every_pass_predicts_once_when_the_evaluation_will_end(slow):
    evaluation = evaluation_of(limited(1000, val_batch_size=16))
    evaluation.score_all()
    pattern = r"(\w+):predicted evaluation_seconds:(\d+) limit:1000"
    said = [re.fullmatch(pattern, line).groups() for line in lines(evaluation, "predicted")]
    assert said[:2] == [("final_fp32_roundtrip", "6"), ("final_fp32_sliding_window", "26")]
    assert [label for label, _ in said[2:]] == ["legal_ttt"]
    assert float(said[2][1]) == pytest.approx(ALL_SECONDS, rel=0.05)  # the first chunk has one window, the others two


def test_scores_that_will_not_fit_are_warned_of(slow):
    evaluation = evaluation_of(limited(25, val_batch_size=16))
    evaluation.score_all()
    warning = "warning: the scores will not fit EVAL_MAX_SECONDS=25; raise EVAL_STRIDE"
    assert [line for line in evaluation.run.log if line.startswith("warning")] == [warning]


def test_the_clock_runs_from_before_the_model_is_built(slow, monkeypatch):
    build = pg.Run.build

    def slow_build(self, context):
        slow.now += 7
        return build(self, context)

    monkeypatch.setattr(pg.Run, "build", slow_build)
    slow.now = 1000.0
    hp = limited(0)
    evaluation = evaluation_of(hp)
    assert evaluation.elapsed() == 7
    evaluation.score_all()
    assert evaluation.elapsed() == 7 + ALL_SECONDS


# -----------------------------------------------------------------------------
# RANKS
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("speeds", [(1.0, 10.0), (10.0, 1.0)])
def test_ranks_whose_clocks_differ_cut_alike(speeds):
    """Two evaluations that share nothing but the maximum; a rank that asked once more would wait in vain."""
    barrier, posted = threading.Barrier(2, timeout=20), [None, None]

    def rank(number: int) -> pg.Evaluation:
        evaluation = evaluation_of(limited(50))
        scored = [0]

        def largest(x):
            posted[number] = x
            barrier.wait()
            agreed = max(posted)
            barrier.wait()
            return agreed

        def score(*arguments, inner=evaluation.score):
            scored[0] += 1
            return inner(*arguments)

        evaluation.run.ranks.largest, evaluation.score = largest, score
        evaluation.elapsed = lambda: speeds[number] * scored[0]
        scores_of(evaluation)
        return evaluation

    with ThreadPoolExecutor(2) as pool:
        ranks = list(pool.map(rank, (0, 1)))
    assert ranks[0].cut == ranks[1].cut == dict(chunks=CHUNKS, adapted=5, scored=CHUNKS)
    assert lines(ranks[0], ":cut ") == lines(ranks[1], ":cut ") != []


def test_a_slow_rank_makes_all_skip(slow):
    evaluation = evaluation_of(limited(1000))
    evaluation.run.ranks.largest = lambda x: max(x, 1001.0)
    assert list(evaluation.score_all())[-1] == "final_fp32_sliding_window"
    assert evaluation.cut == dict(chunks=CHUNKS, adapted=0, scored=0)


# -----------------------------------------------------------------------------
# WHOLE RUNS
# -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact(tiny_data, tmp_path_factory) -> Path:
    small = dict(NUM_LAYERS=1, VE_LAYERS=0, ITERATIONS=2, WARMDOWN_ITERS=1, VAL_LOSS_EVERY=0, TTT_ENABLED=0)
    return run_here(tmp_path_factory.mktemp("trained"), tiny_data, **small).folder / "artifact.pgolf"


def evaluate(artifact: Path, data: Path, out: Path, seconds: float) -> Ran:
    settings = dict(DEVICE="cpu", DTYPE="fp32", EVAL_STRIDE=32, TTT_ENABLED=1, TTT_EPOCHS=1, EVAL_MAX_SECONDS=seconds)
    return run_here(out, data, tiny=False, EVAL_ONLY=1, ARTIFACT_PATH=artifact, **settings)


def limits(ran: Ran) -> list[str]:
    return re.findall(r"^limit: .*$", ran.out, re.MULTILINE)


def test_a_run_tells_of_its_cut(artifact, tiny_data, tmp_path, slow):
    slow.update = 50.0  # as long as forward and backward take where a window takes a second
    free = evaluate(artifact, tiny_data, tmp_path / "free", 0)
    seconds = free.result["phase_seconds"]
    assert free.code == 0 and free.result["eval_cut"] is None and seconds["adapt"] >= 200
    assert free.result["eval_seconds"] == seconds["score"] + seconds["adapt"]

    limit = seconds["score"] + seconds["adapt"] - 75
    ran = evaluate(artifact, tiny_data, tmp_path / "cut", limit)
    cut, chunks = ran.result["eval_cut"], int(seconds["adapt"]) // 50 + 1
    assert ran.code == 0 and limits(ran) == [] and ran.result["eval_seconds"] <= limit
    assert cut == dict(chunks=chunks, adapted=cut["adapted"], scored=chunks) and 0 < cut["adapted"] < chunks - 1
    assert f"\nlegal_ttt:cut adapted_chunks:{cut['adapted']} of:{chunks - 1} to end before" in ran.out
    assert ran.result["headline"]["label"] == "legal_ttt"
    assert ran.result["headline"]["val_bpb"] != free.result["headline"]["val_bpb"]
    assert ran.result["phase_seconds"] == dict(seconds, adapt=50.0 * cut["adapted"])


def test_a_run_without_time_for_ttt_reports_the_sliding_score(artifact, tiny_data, tmp_path, slow):
    free = evaluate(artifact, tiny_data, tmp_path / "free", 0)
    windows = free.result["phase_seconds"]["score"]
    ran = evaluate(artifact, tiny_data, tmp_path / "short", windows - 1)
    label = "final_int6_sliding_window"
    assert ran.code == 0 and "\nlegal_ttt:skipped " in ran.out and "legal_ttt" not in ran.result["scores"]
    assert ran.result["headline"]["label"] == label and ran.result["scores"][label] == free.result["scores"][label]
    assert ran.result["eval_cut"]["adapted"] == ran.result["eval_cut"]["scored"] == 0


def test_an_evaluation_over_its_limit_ends_with_exit_code_3(artifact, tiny_data, tmp_path, slow):
    ran = evaluate(artifact, tiny_data, tmp_path, 5)
    took = ran.result["eval_seconds"]
    assert ran.code == 3 and took > 5
    assert limits(ran) == [f"limit: the evaluation took {took:.1f} s, more than EVAL_MAX_SECONDS=5"]
    assert ran.out.splitlines()[-1].startswith("result {")
