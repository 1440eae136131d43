"""Window plans and the one scorer: every target once, whatever the grouping."""

import math

import numpy as np
import pytest
import torch
from helpers import build_model, random_tokens, single_rank, tiny_hp
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_gpt as pg

plans = st.tuples(st.integers(1, 300), st.integers(2, 40), st.integers(1, 40)).filter(lambda p: p[2] <= p[1])


@settings(max_examples=300, deadline=None)
@given(plans)
def test_every_target_is_scored_once_in_order(plan):
    n, context, stride = plan
    windows = pg.plan_windows(n, context, stride)
    scored = np.concatenate([np.arange(first, end) for _, first, end in windows])
    assert np.array_equal(scored, np.arange(n))


@settings(max_examples=300, deadline=None)
@given(plans)
def test_windows_are_those_of_the_sliding_rule(plan):
    n, context, stride = plan
    windows = pg.plan_windows(n, context, stride)
    starts, firsts, ends = windows.T
    assert (starts >= 0).all() and (ends <= n).all() and (firsts >= starts).all() and (firsts < ends).all()
    assert (ends - starts == min(n, context)).all()
    assert (starts[:-1] == np.arange(len(windows) - 1) * stride).all()
    assert (ends - firsts)[0] == min(n, context)
    assert ((ends - firsts)[1:] <= stride).all() and ((ends - firsts)[1:-1] == stride).all()
    assert starts[-1] <= (len(windows) - 1) * stride


class Echo:
    """Stands in for a model: a target's score is its token id, and calls are kept."""

    def __init__(self):
        self.inputs, self.targets = [], []

    def __call__(self, tokens, targets):
        assert torch.equal(tokens[:, tokens.size(1) - targets.size(1) + 1 :], targets[:, :-1])
        self.inputs.append(tokens)
        self.targets.append(targets)
        return targets.float()


@settings(max_examples=200, deadline=None)
@given(plans, st.integers(1, 7))
def test_the_scorer_returns_each_targets_score_in_stream_order(plan, batch):
    n, context, stride = plan
    tokens, echo = np.arange(n + 1).astype(np.uint16), Echo()
    nats = pg.score(echo, tokens, pg.plan_windows(n, context, stride), stride, batch, single_rank())
    assert nats.dtype == np.float32 and np.array_equal(nats, tokens[1:])
    assert {x.shape for x in echo.inputs} == {(batch, min(n, context))}
    assert {x.size(1) for x in echo.targets} <= {min(n, stride), min(n, context)}


@pytest.mark.parametrize("n, context, stride", [(50, 16, 4), (50, 16, 16), (37, 16, 5), (16, 16, 4), (9, 16, 16)])
def test_scores_equal_brute_force_over_single_targets(n, context, stride):
    model, tokens = build_model(context=context), random_tokens(n + 1)
    windows = pg.plan_windows(n, context, stride)
    expected = np.empty(n)
    for start, first, end in windows:
        for i in range(first, end):  # target i is the token after token i
            text = torch.from_numpy(tokens[None, start : i + 1].astype(np.int64))
            with torch.no_grad():
                expected[i] = -model.logits(text)[0, -1].log_softmax(-1)[int(tokens[i + 1])]
    nats = pg.score(model, tokens, windows, stride, 3, single_rank())
    np.testing.assert_allclose(nats, expected, atol=2e-5)


def test_scores_do_not_depend_on_the_batch():
    model, tokens = build_model(), random_tokens(101)
    windows = pg.plan_windows(100, 16, 4)
    one, seven = (pg.score(model, tokens, windows, 4, b, single_rank()) for b in (1, 7))
    np.testing.assert_allclose(one, seven, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_part_of_the_windows_scores_bit_identically(batch, dtype):
    model, tokens = build_model(dtype=dtype), random_tokens(151)
    windows = pg.plan_windows(150, 16, 4)
    whole = pg.score(model, tokens, windows, 4, batch, single_rank())
    for cut in (1, 2, 3, 5, 8, 13, 30):
        parts = [
            pg.score(model, tokens[: part[-1, 2] + 1], part, 4, batch, single_rank())
            for part in (windows[:cut], windows[cut:])
        ]
        assert np.array_equal(np.concatenate(parts), whole), f"cut at window {cut}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_token_leaves_earlier_sliding_scores_bit_identical(dtype):
    model, tokens = build_model(dtype=dtype), random_tokens(81)
    windows = pg.plan_windows(80, 16, 4)
    before = pg.score(model, tokens, windows, 4, 4, single_rank())
    for t in (1, 15, 16, 17, 20, 33, 79):
        changed = tokens.copy()
        changed[t] = 5 if tokens[t] != 5 else 6
        after = pg.score(model, changed, windows, 4, 4, single_rank())
        assert np.array_equal(before[: t - 1], after[: t - 1])
        assert before[t - 1] != after[t - 1] and before[t] != after[t]


def test_scoring_keeps_no_gradients():
    model, tokens = build_model(), random_tokens(41)
    pg.score(model, tokens, pg.plan_windows(40, 16, 4), 4, 4, single_rank())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_totals_are_float64_sums_and_bits_per_byte():
    nats = np.full(1_000_000, 0.1, dtype=np.float32)
    result = pg.total(nats, np.full(1_000_000, 3, dtype=np.int64))
    assert result.nats == pytest.approx(1_000_000 * float(np.float32(0.1)), rel=1e-12)
    assert (result.tokens, result.bytes) == (1_000_000, 3_000_000)
    assert result.loss == pytest.approx(float(np.float32(0.1)))
    assert result.bpb == pytest.approx(result.nats / math.log(2) / 3_000_000, rel=1e-12)
    with pytest.raises(RuntimeError):
        pg.total(nats, np.ones(3, dtype=np.int64))


# Chunks


@settings(max_examples=300, deadline=None)
@given(plans, st.integers(1, 400))
def test_chunks_are_the_shortest_runs_of_whole_windows_that_are_long_enough(plan, chunk_tokens):
    windows = pg.plan_windows(*plan)
    chunks = pg.plan_chunks(windows, chunk_tokens)
    assert np.array_equal(np.concatenate(chunks), windows)
    for k, chunk in enumerate(chunks):
        assert len(chunk)
        assert chunk[-1, 1] - chunk[0, 1] < chunk_tokens, "one window fewer would have been enough"
        if k + 1 < len(chunks):
            assert chunk[-1, 2] - chunk[0, 1] >= chunk_tokens


@settings(max_examples=300, deadline=None)
@given(plans, st.integers(1, 400))
@example((3, 2, 1), 5)
def test_check_ttt_names_a_size_that_works(plan, chunk_tokens):
    n, context, stride = plan
    hp = tiny_hp(eval_seq_len=context, eval_stride=stride, ttt_chunk_tokens=chunk_tokens)
    enough = len(pg.plan_chunks(pg.plan_windows(n, context, stride), chunk_tokens)) > 1
    if enough:
        pg.check_ttt(hp, n)
        return
    with pytest.raises(pg.UserError) as error:
        pg.check_ttt(hp, n)
    if "TTT_CHUNK_TOKENS=" in str(error.value):
        fits = int(str(error.value).rsplit("=", 1)[1])
        pg.check_ttt(tiny_hp(eval_seq_len=context, eval_stride=stride, ttt_chunk_tokens=fits), n)
    else:
        assert "EVAL_SEQ_LEN" in str(error.value) and n <= context


def test_check_ttt_is_silent_without_ttt():
    pg.check_ttt(tiny_hp(ttt_enabled=False), 3)
