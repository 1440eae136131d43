"""Test-time training is legal by structure: score first, adapt on what was scored, never look back or ahead."""

import copy
import itertools
import math
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import build_model, make_run, random_tokens, scores_of, single_rank, tiny_hp, weights_of

import train_gpt as pg

N = 90


def adapter_for(hp, forward=None, **build):
    model, run = build_model(hp, hp.eval_seq_len, **build), make_run(hp)
    return pg.StreamTTT(run._replace(compile=pg.Compiled(*[True] * 4)), model, forward or model)


def plan(hp, n=N):
    return pg.plan_windows(n, hp.eval_seq_len, hp.eval_stride)


def spans(hp, n=N) -> list[tuple[int, int]]:
    """(first target, end) of each chunk."""
    return [(int(c[0, 1]), int(c[-1, 2])) for c in pg.plan_chunks(plan(hp, n), hp.ttt_chunk_tokens)]


def evaluation_of(model, hp, tokens) -> pg.Evaluation:
    """Of an artifact with the model's weights."""
    stored = {name: pg.Stored("fp32", w, None) for name, w in weights_of(model).items()}
    return pg.Evaluation(make_run(hp, tokens=tokens), stored)


def run(adapter, tokens):
    """The pass of an evaluation, with this adapter and its model."""
    evaluation = evaluation_of(adapter.model, adapter.hp, tokens)
    evaluation.passes["legal_ttt"] = adapter
    evaluation.reset = lambda: None  # tests look at what was learned
    return scores_of(evaluation)


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
        changed[t] = 7 if tokens[t] != 7 else 8  # of other logits, which in bf16 are few
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

    adapter = adapter_for(hp)
    adapter.forward = Spy(adapter.model)
    run(adapter, tokens)
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

        adapter = pg.StreamTTT(make_run(hp), model, model)
        adapter.forward = spy
        adapter.adapt(tokens, 0.01)
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
        adapter.step_rows = micro
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
    pg.StreamTTT(make_run(hp), model, model).adapt(random_tokens(33), 0.1)
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


# -----------------------------------------------------------------------------
# WHAT ADAPTS, AND HOW
# -----------------------------------------------------------------------------


def test_scales_only_moves_the_control_tensors_and_nothing_else():
    adapter = adapter_for(tiny_hp(ttt_params="scales"))
    before = weights_of(adapter.model)
    adapter.adapt(random_tokens(40), 0.1)
    moved = {name for name, w in weights_of(adapter.model).items() if not torch.equal(w, before[name])}
    assert moved == {name for name in before if pg.label_of(name) == "control"}


@pytest.mark.parametrize("betas, decay", [((0.8, 0.999), 0.0), ((0.0, 0.999), 0.5)])
def test_adamw_is_torchs(betas, decay):
    hp = tiny_hp(ttt_optimizer="adamw", ttt_grad_clip=0.0, ttt_momentum=betas[0], ttt_weight_decay=decay)
    ours, theirs, tokens = adapter_for(hp), build_model(hp), random_tokens(33)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=betas, weight_decay=decay)
    text = torch.from_numpy(tokens.astype(np.int64))
    for group in ours.optimizer.param_groups:
        group["lr"] = 0.01
    for _ in range(3):
        ours.step(tokens, pg.plan_windows(32, 16, 16))
        reference.zero_grad()
        theirs(text[:-1].view(2, 16), text[1:].view(2, 16)).mean().backward()
        reference.step()
    theirs = weights_of(theirs)
    for name, w in weights_of(ours.model).items():
        torch.testing.assert_close(w, theirs[name], atol=2e-4, rtol=1e-3)


def test_sam_steps_along_the_gradient_of_the_worse_place():
    hp, tokens = tiny_hp(ttt_sam_rho=0.5, ttt_grad_clip=0.0, ttt_momentum=0.0), random_tokens(33)
    ours, reference = adapter_for(hp), build_model(hp)
    text = torch.from_numpy(tokens.astype(np.int64))

    def gradients() -> list[torch.Tensor]:
        reference.zero_grad()
        reference(text[:-1].view(2, 16), text[1:].view(2, 16)).mean().backward()
        return [p.grad.clone() for p in reference.parameters()]

    here = weights_of(reference)
    uphill = gradients()
    norm = torch.cat([g.flatten() for g in uphill]).norm()
    with torch.no_grad():
        for p, g in zip(reference.parameters(), uphill, strict=True):
            p.add_(0.5 * g / norm)
    wanted = {
        name: here[name] - 0.1 * g for (name, _), g in zip(reference.named_parameters(), gradients(), strict=True)
    }
    ours.optimizer.param_groups[0]["lr"] = 0.1
    ours.step(tokens, pg.plan_windows(32, 16, 16))
    plain = adapter_for(tiny_hp(ttt_grad_clip=0.0, ttt_momentum=0.0))
    plain.optimizer.param_groups[0]["lr"] = 0.1
    plain.step(tokens, pg.plan_windows(32, 16, 16))
    plain = weights_of(plain.model)
    assert max((plain[name] - w).abs().max() for name, w in wanted.items()) > 1e-3
    for name, w in weights_of(ours.model).items():
        torch.testing.assert_close(w, wanted[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "changes, rates",
    [
        (dict(), [1, 0.75, 0.25]),
        (dict(ttt_warmup_chunks=2), [0.5, 0.75, 0.25]),
        (dict(ttt_max_chunks=2), [1, 0.5]),
        (dict(ttt_max_chunks=1, ttt_warmup_chunks=4), [0.25]),
        (dict(ttt_max_chunks=99), [1, 0.75, 0.25]),
    ],
)
def test_warm_up_and_an_early_stop_shape_the_learning_rate(changes, rates):
    hp, seen = tiny_hp(ttt_lr=1.0, **changes), []
    adapter = forward_only(hp)
    adapter.adapt = lambda tokens, lr: seen.append(lr)
    assert len(spans(hp)) == 4
    run(adapter, random_tokens(N + 1))
    assert seen == pytest.approx(rates)


# -----------------------------------------------------------------------------
# LORA, DOCUMENT BY DOCUMENT
# -----------------------------------------------------------------------------


def lora_hp(**changes):
    return tiny_hp(**{**dict(ttt_params="lora", ttt_lora_chunk=4, ttt_lora_rank=2, ttt_lr=0.5), **changes})


def documents_of(lengths: list[int], seed: int = 0) -> np.ndarray:
    """Documents of so many tokens, BOS included, and a last token that is only a target."""
    rng = np.random.default_rng(seed)
    texts = [np.append(pg.BOS_ID, rng.integers(4, 48, length - 1)) for length in lengths]
    return np.append(np.concatenate(texts), 7).astype(np.uint16)


LENGTHS = [30, 3, 17, 1, 50, 4, 8, 22]


def lora_scores(hp, tokens: np.ndarray) -> np.ndarray:
    return scores_of(evaluation_of(build_model(hp, hp.eval_seq_len), hp, tokens))


def hang_in(model, hp) -> list[torch.Tensor]:
    """The parameters of adapters of one sequence, hung into a model by another route: which pass a module is in, it
    counts from the model's own call on."""
    calls, parameters, names = {}, [], hp.ttt_lora.split(",")
    model.register_forward_pre_hook(lambda *_: calls.clear())
    initial = torch.randn(hp.ttt_lora_rank, 24, generator=torch.Generator().manual_seed(0)) / math.sqrt(24)

    def hang(module, width):
        pairs = []

        def added(_, inputs, output):
            call = calls[module] = calls.get(module, -1) + 1
            if call == len(pairs):
                pairs.append(
                    (initial.clone().requires_grad_(), torch.zeros(width, hp.ttt_lora_rank, requires_grad=True))
                )
                parameters.extend(pairs[-1])
            a, b = pairs[call]
            added = F.linear(F.linear(inputs[0], a), b) * (hp.ttt_lora_alpha / hp.ttt_lora_rank)
            return (output[0] + added, output[1]) if isinstance(output, tuple) else output + added

        module.register_forward_hook(added)

    for block in model.blocks:
        attn = block.attn
        for name, module in dict(q=attn.q, k=attn.k, v=attn.v, o=attn, mlp=block.mlp).items():
            if name in names:
                hang(module, 24 if name in ("o", "mlp") else module.weight.size(0))
    if "head" in names:
        hang(model.head, model.head.weight.size(0))
    text = torch.ones(1, 2, dtype=torch.int64)
    model(text, text)
    return parameters


def one_by_one(hp, tokens: np.ndarray, learn: bool = True, build=build_model) -> np.ndarray:
    """The method written as a loop over documents and pieces."""
    nats, starts = np.zeros(len(tokens) - 1), [*np.flatnonzero(tokens[:-1] == pg.BOS_ID), len(tokens) - 1]
    state = None
    for d, (start, stop) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        if state is None or hp.ttt_lora_reset:
            model = build(hp, hp.eval_seq_len)
            parameters = hang_in(model, hp)
            state = torch.optim.SGD(parameters, lr=hp.ttt_lr, momentum=hp.ttt_momentum)
        for first in range(start, stop, hp.ttt_lora_chunk):
            end = min(first + hp.ttt_lora_chunk, stop)
            begin = max(start, first + hp.ttt_lora_chunk - hp.eval_seq_len)
            text = torch.from_numpy(tokens[begin : end + 1].astype(np.int64))[None]
            losses = model(text[:, :-1], text[:, 1:])[0, first - begin :]
            nats[first:end] = losses.detach().numpy()
            more = end < stop or (not hp.ttt_lora_reset and d + 2 < len(starts))
            if learn and more:
                state.zero_grad()
                losses.mean().backward()
                norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
                for p in parameters:
                    p.grad *= min(1.0, hp.ttt_grad_clip / (norm + 1e-6))
                state.step()
    return nats


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("batch", [16, 64, 4096])
def test_lora_scores_are_those_of_one_document_after_another(reset, batch):
    # A small step where it is carried on: a large one amplifies the rounding of padded rows from document to document.
    one_after_another(lora_hp(ttt_lora_reset=reset, val_batch_size=batch, ttt_lr=0.5 if reset else 0.02))


@pytest.mark.parametrize("names", ["q", "k", "v", "o", "mlp", "head", "q,k,v,o,mlp,head"])
def test_each_pass_of_what_is_named_has_an_adapter_of_its_own(names):
    one_after_another(lora_hp(ttt_lora=names, num_loops=2, loop_start=1, loop_end=1, ttt_lora_chunk=6, ttt_lr=0.1))


def one_after_another(hp) -> None:
    tokens = documents_of(LENGTHS)
    ours = lora_scores(hp, tokens)
    np.testing.assert_allclose(ours, one_by_one(hp, tokens), atol=2e-4)
    assert np.abs(ours - one_by_one(hp, tokens, learn=False)).max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", ["q,v,head", "q,k,v,o,mlp,head"])
def test_zero_b_gives_the_plain_scores_of_each_document_to_the_bit(names, dtype):
    hp, tokens = lora_hp(ttt_lr=0.0, ttt_lora=names, num_loops=1, loop_start=1, loop_end=2), documents_of(LENGTHS)
    if dtype == torch.float32:
        np.testing.assert_allclose(lora_scores(hp, tokens), one_by_one(hp, tokens, learn=False), atol=1e-5)
    model = build_model(hp, dtype=dtype)
    piece = next(pg.plan_pieces(pg.plan_documents(tokens), hp.eval_seq_len, 4))
    method = pg.DocumentLoRA(make_run(hp), model, model)
    inputs, targets, _ = method.batch_of(tokens, piece.windows[: method.rows])
    without = model(inputs, targets)
    with method.attached():
        assert torch.equal(model(inputs, targets), without)
    assert len(method.parameters) == 2 * (1 + len(names.split(",")[:-1]) * 5)
    for p in method.parameters[1::2]:  # each B of each pass adds something
        p.data.fill_(1.0)
        with method.attached():
            assert not torch.equal(model(inputs, targets), without)
        p.data.zero_()
    assert torch.equal(model(inputs, targets), without)


def test_a_warm_a_goes_on_where_b_begins_anew():
    """Each document learns from the A that the one before it in its place of its queue has left, and from nothing else
    of it."""
    tokens = documents_of(9 * [9] + [8, 7])
    hp = lora_hp(val_batch_size=128, ttt_warm_start_a=True)  # eight queues, one document at a time
    model = build_model(hp)
    method, left, seen = pg.DocumentLoRA(make_run(hp), model, model), {}, 0
    bar, initial = pg.progress_bar(None, "", pg.Log(None)), [p.detach().clone() for p in method.parameters]
    for piece in (piece for pieces in method.plan(tokens).rounds for piece in pieces):
        method.score(tokens, piece, bar)
        if piece.fresh:
            seen += piece.queue in left
            assert all(map(torch.equal, method.parameters[::2], left.get(piece.queue, initial)[::2]))
            assert not any(b.any() for b in method.parameters[1::2]) and not method.optimizer.state
        if piece.useful.any():
            method.learn(tokens, piece)
        left[piece.queue] = [p.detach().clone() for p in method.parameters]
    assert seen == 3 and not torch.equal(left[0][0], initial[0]) and not torch.equal(left[0][0], left[1][0])
    method.reset()
    assert all(map(torch.equal, method.parameters, initial)), "another evaluation starts anew"
    assert not np.array_equal(lora_scores(hp, tokens), lora_scores(lora_hp(val_batch_size=128), tokens))


PHASED = dict(phased_ttt_num_phases=2, val_batch_size=256, ttt_chunk_tokens=40, global_ttt_lr=0.02)
MANY = [30, 3, 17, 1, 50, 4, 8, 22, 12, 12, 9, 31, 6, 2, 19, 5, 40, 11]


def shares_of(hp, tokens) -> list[np.ndarray]:
    """Documents between phases, by their definition: a document belongs to the share in which it begins."""
    documents = pg.plan_documents(tokens)
    if hp.ttt_order == "length":
        documents = np.array(sorted(documents.tolist(), key=lambda d: d[0] - d[1]))
    shares, before = [[] for _ in range(hp.phased_ttt_num_phases + 1)], 0
    for start, end in documents:
        shares[before * len(shares) // (len(tokens) - 1)].append((start, end))
        before += end - start
    return [np.array(share) for share in shares]


def learn_globally(model, hp, text: np.ndarray) -> None:
    """A phase as a plain loop of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=hp.global_ttt_lr, momentum=hp.global_ttt_momentum)
    chunks = math.ceil((len(text) - 1) / hp.ttt_chunk_tokens)
    ends = [(len(text) - 1) * k // chunks for k in range(chunks + 1)]
    for k in range(chunks):
        optimizer.param_groups[0]["lr"] = hp.global_ttt_lr * 0.5 * (1 + math.cos(math.pi * k / chunks))
        places = range(ends[k], ends[k + 1], 16)
        for _ in range(hp.ttt_epochs):
            for i in range(0, len(places), hp.ttt_batch_seqs):
                optimizer.zero_grad()
                nats = []
                for place in places[i : i + hp.ttt_batch_seqs]:
                    part = torch.from_numpy(text[place : min(place + 16, ends[k + 1]) + 1].astype(np.int64))[None]
                    nats.append(model(part[:, :-1], part[:, 1:]).flatten())
                torch.cat(nats).mean().backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), hp.ttt_grad_clip)
                optimizer.step()


@pytest.mark.parametrize("order", ["length", "stream"])
def test_between_two_shares_the_model_learns_from_the_documents_of_the_first(order):
    hp, tokens = lora_hp(**PHASED, ttt_order=order, ttt_lr=0.1), documents_of(MANY)
    model, wanted = build_model(hp, hp.eval_seq_len), np.zeros(len(tokens) - 1)
    for k, share in enumerate(shares_of(hp, tokens)):
        for start, end in share:
            wanted[start:end] = one_by_one(hp, tokens[start : end + 1], build=lambda *_: copy.deepcopy(model))
        if k < 2:
            joined = np.concatenate([tokens[start + 1 : end + 1] for start, end in sorted(share.tolist())])
            learn_globally(model, hp, np.append(pg.BOS_ID, joined))
    ours = lora_scores(hp, tokens)
    np.testing.assert_allclose(ours, wanted, atol=3e-4)
    assert np.abs(lora_scores(lora_hp(**PHASED | dict(global_ttt_lr=0.0), ttt_lr=0.1), tokens) - ours).max() > 0.01


class SharedRanks(pg.Ranks):
    """One of several ranks that are threads of this process."""

    def __init__(self, rank: int, size: int, shared: dict):
        self.rank, self.size, self.shared, self.device = rank, size, shared, torch.device("cpu")

    def gather(self, x):
        self.shared[self.rank] = x
        self.shared["barrier"].wait(60)
        found = [self.shared[rank] for rank in range(self.size)]
        self.shared["barrier"].wait(60)
        return found

    def sum_(self, x):
        return x.copy_(torch.stack([part.clone() for part in self.gather(x.clone())]).sum(0))

    def largest(self, x):
        return max(self.gather(x))


def evaluation_of_ranks(hp, tokens, size: int) -> pg.Evaluation:
    """The main rank's, after a pass that all of them have carried out to the same scores."""
    shared, evaluations, found = dict(barrier=threading.Barrier(size)), [None] * size, [None] * size
    stored = {name: pg.Stored("fp32", w, None) for name, w in weights_of(build_model(hp)).items()}

    def work(rank: int) -> None:
        run = make_run(hp, tokens=tokens)._replace(ranks=SharedRanks(rank, size, shared))
        evaluation = evaluations[rank] = pg.Evaluation(run, stored)
        found[rank] = scores_of(evaluation)
        evaluation.keep("legal_ttt", evaluation.passes["legal_ttt"], found[rank])

    workers = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(np.array_equal(nats, found[0]) for nats in found)
    return evaluations[0]


@pytest.mark.parametrize("order", ["length", "stream"])
def test_scores_are_the_same_for_every_number_of_ranks_that_divides_the_queues(order):
    hp = lora_hp(**PHASED, ttt_order=order, ttt_warm_start_a=True, ttt_lr=0.02, ttt_lora="q,k,v,o,mlp,head",
                 ttt_optimizer="adamw", ttt_momentum=0.0, save_scores=True)  # fmt: skip
    tokens = documents_of(MANY)
    alone, *others = (evaluation_of_ranks(hp, tokens, size).saved for size in (1, 2, 4, 8))
    for saved in (alone, *others):
        off = saved["legal_ttt.nats"].astype(np.float64) - alone["legal_ttt.nats"]
        assert abs(off.mean()) <= 1e-6 and np.abs(off).max() <= 1e-4  # ranks add up a phase's gradient in another order
        turn = np.argsort(saved["legal_ttt.order"])  # as an audit is told: no share before the one before it
        spans = [np.concatenate([turn[start:end] for start, end in share]) for share in shares_of(hp, tokens)]
        assert all(a.max() < b.min() for a, b in itertools.pairwise(spans))


@pytest.mark.parametrize("size, queues", [(1, 8), (2, 8), (4, 8), (8, 8), (3, 6), (5, 5), (9, 9)])
def test_other_numbers_of_ranks_have_other_queues_and_say_so(size, queues):
    run = make_run(lora_hp(ttt_warm_start_a=True))._replace(ranks=SharedRanks(0, size, {}))
    assert pg.DocumentLoRA(run, model := build_model(run.hp), model).queues == queues
    said = f"ttt:queues {queues} on {size} ranks: other scores than with 8"
    assert run.log == ([] if queues == 8 else [said])


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("changes", [dict(), dict(ttt_order="stream"), dict(phased_ttt_num_phases=4)])
def test_ranks_score_each_document_once_and_meet_at_every_phase(size, changes):
    hp, tokens = lora_hp(**PHASED | changes, ttt_warm_start_a=True), documents_of(MANY)
    scored, plans = np.zeros(len(tokens) - 1, dtype=int), []
    for rank in range(size):
        run = make_run(hp, tokens=tokens)._replace(ranks=SharedRanks(rank, size, {}))
        plans.append(pg.DocumentLoRA(run, model := build_model(hp), model).plan(tokens))
    phases = [[k for k, pieces in enumerate(plan.rounds) if any(len(p.windows) == 0 for p in pieces)] for plan in plans]
    assert all(found == phases[0] for found in phases) and len(phases[0]) == hp.phased_ttt_num_phases
    assert len({len(plan.rounds) for plan in plans}) == 1
    shares = shares_of(hp, tokens)
    for k, turn in enumerate(zip(*(plan.rounds for plan in plans), strict=True)):
        now = sum(phase < k for phase in phases[0])
        for piece in itertools.chain(*turn):
            scored[pg.targets_of(piece.windows)] += 1
            for _, first, end in piece.windows:
                assert any(start <= first < end <= stop for start, stop in shares[now])
    assert (scored == 1).all()


def test_the_next_document_goes_to_the_queue_with_the_least_text():
    hp = lora_hp(ttt_warm_start_a=True, val_batch_size=256)  # two documents at once
    method = pg.DocumentLoRA(make_run(hp), model := build_model(hp), model)
    lengths = [50, 40, 30, 30, 20, 20, 10, 10, 9, 9, 4, 3, 2, 1, 1]
    starts = np.cumsum([0, *lengths])
    documents, waiting = np.column_stack([starts[:-1], starts[1:]]), [0] * 8
    dealt = method.deal(documents, waiting)
    held = [[[int(end - start) for start, end in batch] for batch in queue] for queue in dealt]
    few = [[[50]], [[40]], [[30]], [[30]], [[20, 2]]]
    assert held == [*few, [[20, 1], [1]], [[10, 9], [4]], [[10, 9], [3]]]
    assert waiting == [sum(map(sum, queue)) for queue in held]


def test_lora_compiles_nothing():
    hp = lora_hp()
    method = pg.DocumentLoRA(make_run(hp), build_model(hp), lambda *_: pytest.fail("the compiled forward is called"))
    method.warm_up(lambda *shape: torch.ones(2, *shape, dtype=torch.int64))
    method.score(
        documents_of([9]), pg.Segment(np.array([[0, 0, 4]]), fresh=True), pg.progress_bar(None, "", pg.Log(None))
    )


def test_documents_side_by_side_need_no_mask_and_no_plan_of_every_shape(monkeypatch):
    """Both are there again for what runs in between."""
    seen, attend, tokens = [], pg.sdpa, documents_of(LENGTHS)

    def spy(q, k, v, mask=None):
        seen.append((mask is not None, torch.backends.cuda.cudnn_sdp_enabled()))
        return attend(q, k, v, mask)

    monkeypatch.setattr(pg, "sdpa", spy)
    nats = []
    for masked in (False, True):
        model = build_model(lora_hp(document_mask=masked))
        method = pg.DocumentLoRA(make_run(lora_hp(val_batch_size=4096)), model, model)
        piece = next(pg.plan_pieces(pg.plan_documents(tokens), 16, 4))
        nats.append(method.score(tokens, piece, pg.progress_bar(None, "", pg.Log(None))))
        assert seen and set(seen) == {(False, False)}
        seen.clear()
        model(torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64))
        assert set(seen) == {(masked, True)}
        seen.clear()
    assert np.array_equal(*nats)


def test_pieces_score_every_target_once_within_its_own_document():
    tokens = documents_of(LENGTHS)
    documents = pg.plan_documents(tokens)
    assert (documents[:, 1] - documents[:, 0]).tolist() == LENGTHS
    for context, chunk in ((16, 4), (16, 16), (8, 1)):
        scored = np.zeros(len(tokens) - 1, dtype=int)
        for number, piece in enumerate(pg.plan_pieces(documents, context, chunk)):
            assert piece.fresh == (number == 0)
            for (start, first, end), useful in zip(piece.windows, piece.useful, strict=True):
                document = documents[(documents[:, 0] <= first) & (first < documents[:, 1])][0]
                assert document[0] <= start <= first < end <= document[1] and end - start <= context
                assert first - start == piece.windows[0, 1] - piece.windows[0, 0], "one shape serves them"
                assert start == max(document[0], first + chunk - context) and useful == (end < document[1])
                scored[first:end] += 1
        assert (scored == 1).all()


def test_a_document_learns_nothing_from_another_unless_adapters_are_carried():
    tokens = documents_of(LENGTHS)
    changed = tokens.copy()
    changed[31:33] = [9, 10]  # within the second document
    changed[34:40] = 11  # and the third
    start, end = 33, 50
    for reset in (True, False):
        a, b = (lora_scores(lora_hp(ttt_lora_reset=reset), text) for text in (tokens, changed))
        assert np.array_equal(a[:30], b[:30]) and (a[start:end] != b[start:end]).any()
        assert (np.abs(a[end + 1 :] - b[end + 1 :]).max() == 0) == reset


@pytest.mark.parametrize("reset", [True, False])
def test_a_piece_is_scored_before_it_is_learned_and_the_end_of_a_document_never(reset, monkeypatch):
    hp, tokens, events = lora_hp(ttt_lora_reset=reset), documents_of(LENGTHS), []
    score, learn = pg.DocumentLoRA.score, pg.DocumentLoRA.learn

    def spy_score(self, visible, piece, bar):
        assert len(visible) == piece.windows[:, 2].max() + 1, "text beyond the piece is within reach"
        events.append(piece)
        return score(self, visible, piece, bar)

    def spy_learn(self, visible, piece):
        assert piece is events[-1] and len(piece.useful) == len(piece.windows) and piece.useful.any()
        goes_on = [tokens[end] != pg.BOS_ID and end + 1 < len(tokens) for end in piece.windows[:, 2]]
        assert piece.useful.tolist() == goes_on or not reset
        events.append("learned")
        learn(self, visible, piece)

    monkeypatch.setattr(pg.DocumentLoRA, "score", spy_score)
    monkeypatch.setattr(pg.DocumentLoRA, "learn", spy_learn)
    lora_scores(hp, tokens)
    pieces = [e for e in events if e != "learned"]
    assert events.count("learned") == (sum(p.useful.any() for p in pieces) if reset else len(pieces) - 1)
    assert 1 < sum(p.fresh for p in pieces) < len(pieces) if reset else [p.fresh for p in pieces].index(False) == 1
    assert events[-1] != "learned"


def test_the_clip_is_each_documents_own():
    hp = lora_hp(ttt_grad_clip=1e-3, ttt_momentum=0.0, val_batch_size=64)
    model, tokens = build_model(hp), documents_of([9, 9, 9, 9])
    method = pg.DocumentLoRA(make_run(hp), model, model)
    piece = next(pg.plan_pieces(pg.plan_documents(tokens), 16, 4))
    before = [p.detach().clone() for p in method.parameters]
    method.score(tokens, piece, pg.progress_bar(None, "", pg.Log(None)))
    method.losses = method.losses * torch.tensor([1.0, 100.0, 1.0, 0.0])
    method.learn(tokens, piece)
    moved = torch.stack([(p - b).flatten(1).norm(dim=1) for p, b in zip(method.parameters, before, strict=True)])
    torch.testing.assert_close(moved.norm(dim=0).detach(), torch.tensor([5e-4, 5e-4, 5e-4, 0.0]), rtol=5e-3, atol=1e-9)


class PhasedLoRA(pg.DocumentLoRA):
    """A method of its own: documents in the stream's order, and after each batch of them a step of the model itself on
    all that was scored so far."""

    def plan(self, tokens):
        documents, self.scored = pg.plan_documents(tokens), []
        batches = [documents[i : i + self.rows] for i in range(0, len(documents), self.rows)]
        batches = [batch[np.argsort(batch[:, 0] - batch[:, 1], kind="stable")] for batch in batches]
        rounds = [list(pg.plan_pieces(batch, self.hp.eval_seq_len, self.stride)) for batch in batches]
        for pieces in rounds[:-1]:
            pieces.append(pg.Segment(np.zeros((0, 3), dtype=np.int64), useful=np.ones(1, dtype=bool)))
        return pg.Plan(rounds, len(rounds), count=len(documents))

    def score(self, tokens, segment, bar):
        if len(segment.windows) == 0:
            return np.zeros(0, dtype=np.float32)
        self.scored += [tokens[start : end + 1] for start, _, end in segment.windows]
        return super().score(tokens, segment, bar)

    def learn(self, tokens, segment):
        if len(segment.windows):
            return super().learn(tokens, segment)
        parameters = list(self.model.requires_grad_(True).parameters())
        texts = [torch.from_numpy(text.astype(np.int64))[None] for text in self.scored]
        loss = torch.stack([self.model(text[:, :-1], text[:, 1:]).mean() for text in texts]).mean()
        with torch.no_grad():
            torch._foreach_add_(parameters, torch.autograd.grad(loss, parameters), alpha=-0.2)
        self.model.requires_grad_(False)


def test_a_new_method_is_one_class_and_one_row(monkeypatch):
    monkeypatch.setitem(pg.TTT_METHODS, "lora", PhasedLoRA)
    hp, tokens = lora_hp(val_batch_size=32, eval_max_seconds=1000.0), documents_of(LENGTHS)  # two documents a batch
    evaluation = evaluation_of(build_model(hp), hp, tokens)
    scores = evaluation.score_all()
    assert list(scores)[-1] == "legal_ttt" and "ttt:start documents:8 " in "\n".join(evaluation.run.log)
    assert all(torch.equal(w, evaluation.tensors[name].data) for name, w in weights_of(evaluation.model).items())
    ours, changed = scores_of(evaluation), tokens.copy()
    assert scores["legal_ttt"].nats == ours.sum(dtype=np.float64)
    changed[60] = 9 if tokens[60] != 9 else 10  # within the fifth document, of the third batch
    after = scores_of(evaluation_of(build_model(hp), hp, changed))
    assert np.array_equal(ours[:59], after[:59])
    assert (ours[sum(LENGTHS[:6]) :] != after[sum(LENGTHS[:6]) :]).all(), "the fourth batch hears of it"


# -----------------------------------------------------------------------------
# READOUTS: TEMPERATURE AND MIXTURE
# -----------------------------------------------------------------------------


def columns_of(model, tokens, hp, temperatures) -> np.ndarray:
    return pg.score(model, tokens, plan(hp), hp.eval_stride, 4, single_rank(), None, temperatures)


def test_nats_at_a_temperature_are_those_of_divided_logits():
    model, tokens = build_model(), random_tokens(17)
    text = torch.from_numpy(tokens.astype(np.int64))[None]
    nats = model(text[:, :-1], text[:, 1:], (1.0, 0.5, 2.0))
    for i, t in enumerate((1.0, 0.5, 2.0)):
        reference = -(model.logits(text[:, :-1]) / t).log_softmax(-1).gather(-1, text[:, 1:, None])[..., 0]
        torch.testing.assert_close(nats[..., i], reference)
    assert torch.equal(nats[..., 0], model(text[:, :-1], text[:, 1:]))


def test_the_temperature_is_that_of_the_chunks_before():
    hp, tokens = tiny_hp(ttt_temperature=True, ttt_lr=0.0), random_tokens(N + 1)
    model = build_model(hp)
    with torch.no_grad():
        model.tok_emb.weight.mul_(4.0)  # much too sure of itself
    ours = scores_of(evaluation_of(model, hp, tokens))
    columns = columns_of(model, tokens, hp, pg.TEMPERATURES)
    assert pg.TEMPERATURES[8] == 1.0 and pg.TEMPERATURES[0] == pytest.approx(0.8) and len(pg.TEMPERATURES) == 17
    chosen = []
    for first, end in spans(hp):
        chosen.append(int(columns[:first].sum(0, dtype=np.float64).argmin()) if first else 8)
        np.testing.assert_allclose(ours[first:end], columns[first:end, chosen[-1]], atol=1e-5)
    assert chosen[-1] > 8, "a model that is too sure needs a higher temperature"


def by_counting(tokens: np.ndarray, scored: int, i: int, x: int, alpha: float, vocab: int) -> list[float]:
    """p_1, p_2, p_3 of token x as target i, after the targets before `scored` were counted, from their definition."""
    p, out = 1 / vocab, []
    for n in range(3):

        def context(j: int, n: int = n) -> tuple[int, ...]:
            return tuple(int(tokens[j - m]) if j - m >= 0 else 0 for m in range(n))

        seen = [j for j in range(scored) if context(j) == context(i)]
        hits = sum(int(tokens[j + 1]) == x for j in seen)
        p = (hits + alpha * p) / (len(seen) + alpha)
        out.append(p)
    return out  # fmt: skip


def test_ngrams_are_exact_counts_of_scored_text():
    tokens = random_tokens(400, vocab_size=8, seed=3)
    readout = pg.Readout(tiny_hp(vocab_size=8, hedge_alpha=1.5, hedge_enabled=True))
    for first, end in ((0, 1), (1, 90), (90, 91), (91, 300)):
        readout.add(*readout.keys(tokens[: end + 1], first))
    ours = readout.ngrams(*readout.keys(tokens, 300))
    wanted = [by_counting(tokens, 300, i, int(tokens[i + 1]), 1.5, 8) for i in range(300, 399)]
    np.testing.assert_allclose(ours, wanted, rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_counts_survive_any_order_of_merges(seed):
    rng, counts, everything = np.random.default_rng(seed), pg.Counts(), []
    for size in rng.integers(1, 400, 30):
        keys = rng.integers(0, 300, size) * (1 << 40)
        counts.add(keys)
        everything.append(keys)
    asked = np.arange(310) * (1 << 40)
    everything = np.concatenate(everything)
    assert counts(asked).tolist() == [int((everything == key).sum()) for key in asked]
    assert len(counts.runs) <= 12 and not pg.Counts()(asked).any()


@pytest.mark.parametrize("temperature", [False, True])
def test_the_mixture_is_hedge_by_its_definition(temperature):
    hp = tiny_hp(hedge_enabled=True, hedge_eta=0.7, hedge_alpha=2.0, ttt_lr=0.0, ttt_temperature=temperature)
    tokens, model = random_tokens(N + 1), build_model(hp)
    evaluation = evaluation_of(model, hp, tokens)
    ours = scores_of(evaluation)
    grid = pg.TEMPERATURES if temperature else (1.0,)
    columns = columns_of(model, tokens, hp, (*grid, hp.hedge_temperature)).astype(np.float64)
    weights = np.full(5, 0.2)
    for first, end in spans(hp):
        best = int(columns[:first, :-1].sum(0).argmin()) if first else grid.index(1.0)
        for i in range(first, end):
            network = np.exp(-columns[i, [best, -1]])
            p = np.array([*network, *by_counting(tokens, first, i, int(tokens[i + 1]), 2.0, 48)])
            assert ours[i] == pytest.approx(-math.log(weights @ p), abs=1e-4)
            weights = weights * p**0.7
            weights /= weights.sum()
    assert evaluation.passes["legal_ttt"].readout.followed.runs == [], "the next evaluation starts anew"


def test_a_mixture_over_the_vocabulary_sums_to_one():
    hp = tiny_hp(hedge_enabled=True)
    readout, tokens, model = pg.Readout(hp), random_tokens(N + 1), build_model(hp)
    readout(columns_of(model, tokens, hp, readout.temperatures)[:60], tokens[:61], 0)
    every, rng = np.arange(48), np.random.default_rng(0)
    logits = rng.normal(size=48)
    columns = np.stack([pg.log_sum_exp(logits / t) - logits / t for t in readout.temperatures], -1)
    contexts, _ = readout.keys(tokens[:62], 60)
    log_p = readout.experts(columns, np.repeat(contexts, 48, axis=1), every)
    mixture = np.exp(pg.log_sum_exp(readout.log_weights + log_p) - pg.log_sum_exp(readout.log_weights))
    assert mixture.sum() == pytest.approx(1, abs=1e-9) and np.exp(log_p).sum(0) == pytest.approx(np.ones(5))
