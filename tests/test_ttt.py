"""Test-time training is legal by structure: score first, adapt on what was scored, never look back or ahead."""

import math

import numpy as np
import pytest
import torch
from helpers import build_model, make_run, random_tokens, single_rank, tiny_hp, weights_of

import train_gpt as pg

N = 90


def adapter_for(hp, forward=None, **build):
    model = build_model(hp, hp.eval_seq_len, **build)
    return pg.Adapter(model, forward or model, hp, single_rank(hp))


def plan(hp, n=N):
    return pg.plan_windows(n, hp.eval_seq_len, hp.eval_stride)


def spans(hp, n=N) -> list[tuple[int, int]]:
    """(first target, end) of each chunk."""
    return [(int(c[0, 1]), int(c[-1, 2])) for c in pg.plan_chunks(plan(hp, n), hp.ttt_chunk_tokens)]


def run(adapter, tokens):
    """The pass of an evaluation, with this adapter and its model."""
    stored = {name: pg.Stored("fp32", w, None) for name, w in weights_of(adapter.model).items()}
    evaluation = pg.Evaluation(make_run(adapter.hp, tokens=tokens), stored)
    evaluation.adapter, evaluation.forward, evaluation.batch = adapter, adapter.forward, 4
    evaluation.reset = lambda: None  # tests look at what was learned
    return evaluation.adapted(evaluation.run.val, adapter.hp.eval_stride)


def forward_only(hp, **build):
    """A pass without any adaptation."""
    adapter = adapter_for(hp, **build)
    adapter.adapt = lambda tokens, lr: None
    return adapter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_token_leaves_all_earlier_scores_bit_identical(dtype):
    hp, tokens = tiny_hp(), random_tokens(N + 1)
    before = run(adapter_for(hp, dtype=dtype), tokens)
    first, end = spans(hp)[1]
    for t in (first + 1, first + 7, end, spans(hp)[-1][1]):
        changed = tokens.copy()
        changed[t] = 5 if tokens[t] != 5 else 6
        after = run(adapter_for(hp, dtype=dtype), changed)
        assert np.array_equal(before[: t - 1], after[: t - 1]), f"token {t} reaches back"
        assert before[t - 1] != after[t - 1]
        if t <= end:
            assert (before[end + hp.eval_seq_len :] != after[end + hp.eval_seq_len :]).any(), "nothing was learned"


def test_zero_learning_rate_repeats_the_sliding_score_bit_for_bit():
    hp, tokens = tiny_hp(ttt_lr=0.0), random_tokens(N + 1)
    sliding = pg.score(build_model(hp), tokens, plan(hp), hp.eval_stride, 4, single_rank())
    assert np.array_equal(run(adapter_for(hp), tokens), sliding)
    assert not np.array_equal(run(adapter_for(tiny_hp()), tokens), sliding)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_chunks_scores_do_not_depend_on_training_on_it(k):
    hp, tokens = tiny_hp(), random_tokens(N + 1)
    adapter, calls = adapter_for(hp), []
    adapt = adapter.adapt

    def skip_one(tokens, lr):
        calls.append(lr)
        if len(calls) - 1 != k:
            adapt(tokens, lr)

    adapter.adapt = skip_one
    with_training, without = run(adapter_for(hp), tokens), run(adapter, tokens)
    end = spans(hp)[k][1]
    assert len(calls) == len(spans(hp)) - 1 and k < len(calls)
    assert np.array_equal(with_training[:end], without[:end])
    assert not np.array_equal(with_training[end:], without[end:])


def test_each_chunk_is_scored_then_learned_and_the_last_is_never_learned(monkeypatch):
    hp, tokens = tiny_hp(), random_tokens(N + 1)
    adapter, events = adapter_for(hp), []
    score = pg.score

    def spy_score(model, visible, windows, *rest):
        events.append(("score", int(windows[0, 1]), int(windows[-1, 2])))
        assert len(visible) == windows[-1, 2] + 1, "text beyond the chunk is within reach"
        return score(model, visible, windows, *rest)

    def spy_adapt(seen, lr):
        scored = max(end for kind, _, end in events if kind == "score")
        assert len(seen) - 1 <= scored and np.array_equal(seen, tokens[scored + 1 - len(seen) : scored + 1])
        events.append(("adapt", scored + 1 - len(seen), scored))

    monkeypatch.setattr(pg, "score", spy_score)
    adapter.adapt = spy_adapt
    run(adapter, tokens)
    expected = [(kind, *span) for span in spans(hp) for kind in ("score", "adapt")][:-1]
    assert len(spans(hp)) >= 3 and events == expected


def test_no_forward_sees_a_token_that_is_not_yet_due():
    """Token ids are positions here, so what a forward was given says how far it looked."""
    hp = tiny_hp(vocab_size=128)
    tokens, seen = np.arange(N + 1).astype(np.uint16), []

    class Spy:
        def __init__(self, model):
            self.model = model

        def __call__(self, text, targets):
            seen.append((torch.is_grad_enabled(), int(text.max()), int(targets.max()), targets.flatten().tolist()))
            return self.model(text, targets)

    model = build_model(hp)
    run(pg.Adapter(model, Spy(model), hp, single_rank(hp)), tokens)
    scored = 0
    for training, deepest, target, targets in seen:
        if training:
            assert max(deepest, target) <= scored, "learned from a token before it was scored"
        else:
            end = next(end for _, end in spans(hp) if end > scored or end == N)
            assert max(deepest, target) <= end
            scored = max(scored, max(targets))
    assert scored == N and any(training for training, *_ in seen)


def test_an_epoch_covers_every_scored_target_once_in_sequences_of_the_training_length():
    hp = tiny_hp(vocab_size=128, ttt_epochs=2, ttt_batch_seqs=2)
    lengths = []
    for targets in (16, 40, 37, 5, 64):
        tokens, seen = np.arange(targets + 1).astype(np.uint16), []
        model = build_model(hp)

        def spy(text, wanted, seen=seen, model=model):
            assert torch.equal(text[:, 1:], wanted[:, :-1])
            lengths.append(text.size(1))
            nats = model(text, wanted)
            nats.register_hook(lambda g: seen.extend(wanted[g != 0].tolist()))
            return nats

        pg.Adapter(model, spy, hp, single_rank(hp)).adapt(tokens, 0.01)
        assert sorted(seen) == sorted(2 * list(range(1, targets + 1)))
    assert set(lengths) == {16}


def brute_force_gradients(hp, tokens, length):
    """Gradient of the mean loss over all targets, one unpadded sequence at a time."""
    model = build_model(hp, hp.eval_seq_len)
    targets = len(tokens) - 1
    for start in range(0, targets, length):
        text = torch.from_numpy(tokens[None, start : min(start + length, targets) + 1].astype(np.int64))
        (model(text[:, :-1], text[:, 1:]).sum() / targets).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("targets", [5, 16, 32, 37])
def test_a_step_follows_the_mean_over_its_targets_with_the_short_tail_weighed_by_length(targets):
    hp = tiny_hp(ttt_epochs=1, ttt_batch_seqs=8, ttt_grad_clip=0.0, ttt_momentum=0.0)
    tokens, adapter = random_tokens(targets + 1), adapter_for(hp)
    before = weights_of(adapter.model)
    adapter.adapt(tokens, 0.5)
    for name, gradient in brute_force_gradients(hp, tokens, 16).items():
        step = (before[name] - adapter.model.get_parameter(name).detach()) / 0.5
        torch.testing.assert_close(step, gradient, atol=3e-6, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_a_step_clips_the_norm_and_carries_momentum_over_chunks():
    hp = tiny_hp(ttt_epochs=1, ttt_batch_seqs=8, ttt_grad_clip=0.25, ttt_momentum=0.5)
    adapter, tokens = adapter_for(hp), random_tokens(33)
    norms, momenta = [], {}
    for _ in range(2):
        before = weights_of(adapter.model)
        adapter.adapt(tokens, 0.1)
        step = {n: (before[n] - p.detach()) / 0.1 for n, p in adapter.model.named_parameters()}
        fresh = {n: step[n] - 0.5 * momenta.get(n, torch.zeros(())) for n in step}
        norms.append(torch.cat([g.flatten() for g in fresh.values()]).norm().item())
        momenta = step
    raw = torch.cat([g.flatten() for g in brute_force_gradients(hp, tokens, 16).values()]).norm()
    assert raw > 0.5
    assert norms == pytest.approx([0.25, 0.25], rel=1e-3)


def test_micro_batches_do_not_change_a_step():
    hp, tokens, weights = tiny_hp(ttt_batch_seqs=8, ttt_grad_clip=0.0), random_tokens(78), []
    for micro in (1, 3, 8):
        adapter = adapter_for(hp)
        adapter.rows = micro
        adapter.adapt(tokens, 0.05)
        weights.append(weights_of(adapter.model))
    start = weights_of(build_model(hp))
    for name in start:
        for other in weights[1:]:
            torch.testing.assert_close(weights[0][name], other[name], atol=1e-6, rtol=1e-6)
    assert any(not torch.equal(start[name], weights[0][name]) for name in start)


def test_frozen_blocks_stay_and_everything_else_moves():
    hp = tiny_hp(num_layers=12, ttt_freeze_blocks=2)
    adapter, tokens = adapter_for(hp), random_tokens(N + 1)
    before = weights_of(adapter.model)
    run(adapter, tokens)
    stayed = {name for name, p in adapter.model.named_parameters() if torch.equal(before[name], p)}
    assert stayed == {name for name in before if name.startswith(("blocks.0.", "blocks.1."))}
    assert all(adapter.model.get_parameter(name).grad is None for name in before)


def test_freezing_every_block_still_adapts_the_tables():
    hp = tiny_hp(ttt_freeze_blocks=3)
    adapter = adapter_for(hp)
    before = weights_of(adapter.model)
    run(adapter, random_tokens(N + 1))
    moved = {name for name, p in adapter.model.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {name for name in before if not name.startswith("blocks.")}


def test_learning_rate_follows_a_half_cosine_over_the_chunks():
    hp, rates = tiny_hp(ttt_lr=0.3), []
    adapter = forward_only(hp)
    adapter.adapt = lambda tokens, lr: rates.append(lr)
    run(adapter, random_tokens(N + 1))
    last = len(spans(hp)) - 1
    assert rates == pytest.approx([0.3 * 0.5 * (1 + math.cos(math.pi * k / last)) for k in range(last)])
    assert rates[0] == pytest.approx(0.3) and rates == sorted(rates, reverse=True)


def test_two_chunks_learn_at_the_full_rate_once():
    hp, rates = tiny_hp(ttt_lr=0.3, ttt_chunk_tokens=50), []
    adapter = forward_only(hp)
    adapter.adapt = lambda tokens, lr: rates.append(lr)
    run(adapter, random_tokens(N + 1))
    assert rates == [0.3]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_rotary_tables_survive_scoring_then_learning_then_scoring(mode):
    hp = tiny_hp(eval_seq_len=32)
    model, text = build_model(hp, 32), torch.from_numpy(random_tokens(33).astype(np.int64))[None]

    def nats():
        with mode():
            return model(text[:, :-1], text[:, 1:]).clone()

    before = nats()
    model(text[:, :-1], text[:, 1:]).mean().backward()
    assert torch.equal(nats(), before)
    pg.Adapter(model, model, hp, single_rank(hp)).adapt(random_tokens(33), 0.1)
    assert not torch.equal(nats(), before)


def test_sequences_are_no_longer_than_either_context():
    assert adapter_for(tiny_hp(eval_seq_len=8)).length == 8
    assert adapter_for(tiny_hp(eval_seq_len=32)).length == 16


def test_adapting_on_text_lowers_its_loss():
    hp, tokens = tiny_hp(ttt_epochs=20, ttt_lr=0.05), random_tokens(33)
    adapter = adapter_for(hp)
    windows = pg.plan_windows(32, 16, 4)
    before = pg.score(adapter.model, tokens, windows, 4, 4, single_rank()).mean()
    adapter.adapt(tokens, 0.05)
    assert pg.score(adapter.model, tokens, windows, 4, 4, single_rank()).mean() < before - 0.1
