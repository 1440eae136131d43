"""The auditor: a clean script passes every check, and whatever breaks a rule fails the check that names it."""

import contextlib
import hashlib
import itertools
import json
import math
import re
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Ran, run_here
from helpers import build_model, make_run, tiny_hp, weights_of
from test_data import train_tokenizer
from test_ranks import torchrun
from test_ttt import PhasedLoRA

import train_gpt as pg

CHECKS = ["causal", "normalised", "score_first", "once", "documents", "bytes", "clocks", "size"]
SIZE, SECONDS = (70_000, 9_000_000), dict(train=30.0, average=1.0, evaluation=20.0)
RARE = "Füßchen kosten 10 € – 🦊 sagt: „naïve“ Öfen."  # the tokenizer has byte tokens for most of it


def audit_hp(**changes):
    few = dict(audit=True, vocab_size=512, num_layers=1, ve_layers="0", val_batch_size=512, ttt_epochs=1)
    return tiny_hp(**{**few, **changes})


def split(tiny_data: Path, documents: int = 6) -> pg.Validation:
    """Short real documents after one of byte tokens and a leading space, counted by the script as it is now."""
    import sentencepiece

    whole = pg.load_validation(audit_hp(data_path=str(tiny_data)))
    model = sentencepiece.SentencePieceProcessor(model_file=str(whole.tokenizer_path))
    texts = np.split(whole.tokens, np.flatnonzero(whole.tokens == pg.BOS_ID)[1:])
    texts = [[pg.BOS_ID, model.piece_to_id("▁"), *model.encode(RARE)]] + [text for text in texts if len(text) < 60]
    tokens = np.concatenate(texts[:documents]).astype(np.uint16)
    return whole._replace(tokens=tokens, bytes=pg.TokenBytes(whole.tokenizer_path, 512).count(tokens), documents=None)


def up_to_the_third_document(val: pg.Validation) -> int:
    """Targets of a slice whose last window has a document border."""
    return int(np.flatnonzero(val.tokens == pg.BOS_ID)[2]) + 4


def evaluation_of(hp, val: pg.Validation) -> pg.Evaluation:
    stored = {name: pg.Stored("fp32", w, None) for name, w in weights_of(build_model(hp, hp.eval_seq_len)).items()}
    return pg.Evaluation(make_run(hp)._replace(val=val), stored)


def audit(hp, val: pg.Validation, size=SIZE, seconds=SECONDS) -> dict[str, pg.Finding]:
    evaluation = evaluation_of(hp, val)
    return pg.Audit(evaluation).check(evaluation.score_all(), size, seconds)


def failed(findings: dict[str, pg.Finding]) -> dict[str, str]:
    return {name: figure for name, (passed, figure) in findings.items() if not passed}


# -----------------------------------------------------------------------------
# THE CLEAN SCRIPT
# -----------------------------------------------------------------------------

LORA = dict(ttt_params="lora", ttt_lora_chunk=4, ttt_lora_rank=2, ttt_lr=0.5)
CLEAN = dict(
    fp32=dict(),
    three_layers=dict(num_layers=3, ve_layers="1,2"),
    bf16=dict(dtype="bf16"),
    without_ttt=dict(ttt_enabled=False),
    without_sliding_windows=dict(ttt_enabled=False, eval_stride=0),
    single_targets=dict(eval_stride=1),
    longer_context=dict(eval_seq_len=32),
    frozen_blocks=dict(ttt_freeze_blocks=1),
    without_neighbours=dict(bigram_vocab_size=0, smear_gate_enabled=False),
    nothing_to_learn=dict(ttt_lr=0.0),
    more_tokens_than_there_are=dict(audit_tokens=10**6),
    published_model=dict(value_residual=True, gated_attention=True, num_loops=2, loop_start=0, loop_end=0),
    gated_mlp=dict(mlp_kind="star_relu"),
    scales=dict(ttt_params="scales", ttt_optimizer="adamw"),
    sam_and_an_early_stop=dict(ttt_sam_rho=0.1, ttt_max_chunks=2, ttt_warmup_chunks=1),
    lora=LORA,
    lora_bf16=dict(LORA, dtype="bf16"),
    lora_carried=dict(LORA, ttt_lora_reset=False),
    temperature=dict(ttt_temperature=True),
    hedge=dict(hedge_enabled=True),
    hedge_and_temperature=dict(hedge_enabled=True, ttt_temperature=True, ttt_params="scales"),
)


@pytest.mark.parametrize("changes", CLEAN.values(), ids=CLEAN)
def test_a_clean_evaluation_passes_every_check(changes, tiny_data):
    val = split(tiny_data)
    findings = audit(audit_hp(**{"audit_tokens": up_to_the_third_document(val), **changes}), val)
    assert list(findings) == CHECKS and failed(findings) == {}


def test_a_method_of_ones_own_is_audited_like_the_others(tiny_data, monkeypatch):
    monkeypatch.setitem(pg.TTT_METHODS, "lora", PhasedLoRA)
    val = split(tiny_data)
    hp = audit_hp(audit_tokens=up_to_the_third_document(val), val_batch_size=32, **LORA)
    assert failed(audit(hp, val)) == {}
    plan = PhasedLoRA.plan

    def peeks(self, tokens):
        planned = plan(self, tokens)
        self.scored.append(tokens[-12:])
        return planned

    monkeypatch.setattr(PhasedLoRA, "plan", peeks)
    assert "causal" in failed(audit(hp, val))


@pytest.mark.parametrize("documents", [1, 2])
def test_the_slice_of_a_short_split_is_at_least_four_windows(documents, tiny_data):
    val = split(tiny_data, documents)
    findings = audit(audit_hp(), val)
    assert failed(findings) == {}
    assert findings["documents"].figure.startswith(f"borders:{documents - 1} ")
    assert (val.targets < 64) == (documents == 1)


@pytest.mark.parametrize("documents", [1, 2])
def test_the_bytes_are_those_of_every_document_that_begins_in_the_slice(documents, tiny_data):
    val = split(tiny_data, documents)
    figure = pg.Audit(evaluation_of(audit_hp(), val)).bytes().figure
    assert figure == f"documents:{documents} decoded_bytes:{val.bytes.sum()}"


def prepared(texts: list[str]) -> list[tuple[int, str]]:
    """What prepare.py records of these texts, already normal."""
    return [(len(text.encode()), hashlib.sha256(text.encode()).hexdigest()) for text in texts]


def test_bytes_and_text_are_held_against_the_record_of_the_preparation(tiny_data):
    import sentencepiece

    val = split(tiny_data, 3)
    model = sentencepiece.SentencePieceProcessor(model_file=str(val.tokenizer_path))
    texts = [model.decode(ids[1:].tolist()) for ids in np.split(val.tokens, np.flatnonzero(val.tokens == 1)[1:])]
    record = prepared(texts)

    def finding(documents) -> pg.Finding:
        return pg.Audit(evaluation_of(audit_hp(audit_tokens=10**6), val._replace(documents=documents))).bytes()

    assert finding(record) == (True, f"documents:3 recorded_bytes:{val.bytes.sum()}")
    assert finding(record[:2]) == (False, "3 documents in the split, 2 in prepare.py's record")
    size, digest = record[1]
    longer, other = [record[0], (size + 1, digest), record[2]], [record[0], (size, "0" * 64), record[2]]
    assert finding(longer) == (False, f"document 1 counts {size} bytes, its text has {size + 1}")
    assert finding(other) == (False, "document 1 is not the text that was prepared")


def test_operators_of_a_transformed_text_are_caught_where_a_decoder_calls_them_bytes(tiny_data, tmp_path, monkeypatch):
    """A script that takes a tokenizer of case operators counts three bytes for each, and so does the decoder."""
    import sentencepiece

    path, size = train_tokenizer(tmp_path, "case", user_defined_symbols=["\ue001"])
    with pytest.raises(pg.UserError, match="user-defined"):
        pg.TokenBytes(path, size)
    monkeypatch.setattr(pg.TokenBytes, "misspelling", lambda *_: None)
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = ["The Fox jumps over the Dog and the lazy quartz", "My Sphinx of black quartz judge my vow"]
    ids = [[1, *model.encode("".join(f"\ue001{c.lower()}" if c.isupper() else c for c in text))] for text in texts]
    tokens = np.concatenate(ids).astype(np.uint16)
    val = split(tiny_data)._replace(tokens=tokens, bytes=pg.TokenBytes(path, size).count(tokens), tokenizer_path=path)
    hp = audit_hp(vocab_size=size, ttt_enabled=False, audit_tokens=10**6)
    trusting = pg.Audit(evaluation_of(hp, val)).bytes()
    assert trusting == (True, f"documents:2 decoded_bytes:{sum(map(len, texts)) + 3 * 5}")
    finding = pg.Audit(evaluation_of(hp, val._replace(documents=prepared(texts)))).bytes()
    assert finding == (False, f"document 0 counts {len(texts[0]) + 9} bytes, its text has {len(texts[0])}")


@pytest.mark.parametrize("targets", [1, 3, 16])
def test_a_split_of_one_window_passes(targets, tiny_data):
    val = split(tiny_data)
    start = int(np.flatnonzero(val.tokens == pg.BOS_ID)[1])
    val = val._replace(tokens=val.tokens[start : start + targets + 1], bytes=val.bytes[start : start + targets])
    assert failed(audit(audit_hp(ttt_enabled=False), val)) == {}


# -----------------------------------------------------------------------------
# BROKEN SCRIPTS
# -----------------------------------------------------------------------------

MUTANTS = []


def mutant(caught_by: str, *along: str, **settings):
    """Enter a change that breaks a rule, the check that has to fail, and those that may fail along."""
    settings = dict(ttt_enabled=caught_by not in ("normalised", "documents", "bytes")) | settings

    def enter(change):
        entry = (change, settings, caught_by, {caught_by, *along})
        MUTANTS.append(pytest.param(*entry, id=change.__name__))
        return change

    return enter


def up_to(tokens: np.ndarray, segment: pg.Segment, ahead: int = 0) -> np.ndarray:
    """The text to the segment's end, or some tokens further."""
    return tokens[: segment.windows[:, 2].max() + 1 + ahead]


def rescore(patch, change) -> None:
    """Nats become change(log probabilities (B, S, V), targets (B, S, 1))."""

    def forward(self, tokens, targets):
        logits = self.logits(tokens)[:, tokens.size(1) - targets.size(1) :]
        return change(logits.log_softmax(-1), targets[..., None]).squeeze(-1)

    patch.setattr(pg.GPT, "forward", forward)


def replace_loop(patch, loop, learns: bool = True) -> None:
    """Passes that learn, or those that do not, go through loop(evaluation, method, tokens, their segments in order)."""
    ours = pg.Evaluation.score_first

    def changed(self, method, tokens, plan):
        if learns != (method.adapted_params > 0):
            return ours(self, method, tokens, plan)
        return loop(self, method, tokens, [segment for segments in plan.rounds for segment in segments])

    patch.setattr(pg.Evaluation, "score_first", changed)


def rearrange(patch, change, learns: bool = True) -> None:
    """The pass with test-time training, or those without, become change(nats of every segment)."""
    ours = pg.Evaluation.score_first

    def changed(self, method, tokens, plan):
        nats = ours(self, method, tokens, plan)
        return change(nats) if learns == (method.adapted_params > 0) else nats

    patch.setattr(pg.Evaluation, "score_first", changed)


def peek(patch, ahead) -> None:
    """Every update also learns from ahead(segments, k) tokens after chunk k."""

    def loop(self, method, tokens, segments):
        nats = []
        for k, segment in enumerate(segments):
            nats.append(self.score(method, up_to(tokens, segment), segment))
            if segment.useful.any():
                self.learn(method, up_to(tokens, segment, ahead(segments, k)), segment)
        return nats

    replace_loop(patch, loop)


@mutant("score_first", "causal", "once")
def trains_on_a_chunk_before_scoring_it(patch):
    def loop(self, method, tokens, segments):
        nats = []
        for segment in segments:
            if segment.useful.any():
                self.learn(method, up_to(tokens, segment), segment)
            nats.append(self.score(method, up_to(tokens, segment), segment))
        return nats

    replace_loop(patch, loop)


@mutant("causal", "score_first")
def trains_on_the_next_chunk_too(patch):
    peek(patch, lambda segments, k: int(segments[k + 1].windows[-1, 2] - segments[k].windows[-1, 2]))


@mutant("score_first", "causal")
def trains_on_two_tokens_of_the_next_chunk(patch):
    peek(patch, lambda segments, k: 2)


@mutant("score_first", "causal")
def trains_on_the_first_token_of_the_next_chunk(patch):
    peek(patch, lambda segments, k: 1)


@mutant("score_first")
def updates_do_nothing(patch):
    patch.setattr(pg.StreamTTT, "adapt", lambda self, tokens, lr: None)


@mutant("causal", "score_first", "once")
def weights_carry_over_to_the_next_pass(patch):
    reset = pg.Evaluation.reset

    def only_once(self):
        if not hasattr(self, "was_reset"):
            reset(self)
        self.was_reset = True

    patch.setattr(pg.Evaluation, "reset", only_once)


@mutant("normalised")
def scales_the_nats_of_some_targets(patch):
    rescore(patch, lambda p, t: -p.gather(-1, t) * torch.where(t % 2 == 0, 0.9, 1.0))


@mutant("normalised")
def boosts_the_logits_of_some_targets(patch):
    rescore(patch, lambda p, t: -p.gather(-1, t) - 0.5 * (t % 2 == 0))


@mutant("normalised")
def chooses_the_temperature_by_the_target(patch):
    rescore(patch, lambda p, t: torch.where(t % 2 == 0, -p.gather(-1, t), -(2 * p).log_softmax(-1).gather(-1, t)))


@mutant("normalised")
def takes_the_better_of_two_distributions(patch):
    rescore(patch, lambda p, t: -torch.maximum(p, (2 * p).log_softmax(-1)).gather(-1, t))


@mutant("normalised")
def adds_a_prior_without_normalising(patch):
    rescore(patch, lambda p, t: -(p.exp() + 0.1 / p.size(-1)).log().gather(-1, t))


@mutant("normalised")
def divides_by_half_the_vocabulary(patch):
    rescore(patch, lambda p, t: (p[..., ::2].logsumexp(-1, keepdim=True) - p).gather(-1, t))


@mutant("normalised")
def gives_half_the_vocabulary_a_distribution_of_its_own(patch):
    rescore(patch, lambda p, t: -p.unflatten(-1, (2, -1)).log_softmax(-1).flatten(-2).gather(-1, t))


@mutant("normalised")
def knows_only_half_the_vocabulary(patch):
    rescore(patch, lambda p, t: -(p - 1e4 * (torch.arange(p.size(-1)) % 2)).log_softmax(-1).gather(-1, t))


@mutant("normalised", "causal")
def has_no_score_for_a_rare_token(patch):
    rescore(patch, lambda p, t: torch.where(t == 3, math.nan, -p.gather(-1, t)))


def look_ahead(q, k, v):
    group, allowed = q.size(2) // k.size(2), torch.ones(q.size(1), q.size(1)).tril(1).bool()
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2)


@mutant("causal", "normalised", num_layers=2)
def attention_sees_the_next_position(patch):
    patch.setattr(pg, "sdpa", look_ahead)


@mutant("normalised")
def attention_of_one_layer_sees_the_next_position(patch):
    patch.setattr(pg, "sdpa", look_ahead)


@mutant("normalised")
def inputs_hold_the_next_token(patch):
    trunk = pg.GPT.trunk
    patch.setattr(
        pg.GPT, "trunk", lambda self, x: trunk(self, x) + 0.1 * self.tok_emb.look_up(x.roll(-1, 1)).to(self.dtype)
    )


@mutant("normalised")
def smears_from_the_right(patch):
    def forward(self, x, starts):
        return torch.where(starts[..., None], x, torch.lerp(x, x.roll(-1, 1), self.gate.sigmoid().to(x.dtype)))

    patch.setattr(pg.SmearGate, "forward", forward)


@mutant("causal", "normalised", "once", "documents")
def windows_of_a_batch_hear_of_each_other(patch):
    trunk = pg.GPT.trunk
    patch.setattr(pg.GPT, "trunk", lambda self, x: (y := trunk(self, x)) + 0.1 * y.mean(0))


def only_first(starts):
    return torch.arange(starts.size(1)).expand_as(starts) == 0


@mutant("documents")
def smears_across_documents(patch):
    forward = pg.SmearGate.forward
    patch.setattr(pg.SmearGate, "forward", lambda self, x, starts: forward(self, x, only_first(starts)))


@mutant("documents")
def hashes_bigrams_across_documents(patch):
    forward = pg.BigramHash.forward
    patch.setattr(pg.BigramHash, "forward", lambda self, x, starts, dtype: forward(self, x, only_first(starts), dtype))


def add_prior(patch) -> None:
    head = pg.GPT.unembed
    patch.setattr(pg.GPT, "unembed", lambda self, x: head(self, x) + getattr(self, "prior", 0.0))


def frequencies(tokens: np.ndarray) -> torch.Tensor:
    counts = np.bincount(tokens, minlength=512) + 1.0
    return torch.from_numpy(np.log(counts / counts.sum())).float()


@mutant("causal", "once")
def knows_how_often_each_token_comes(patch):
    add_prior(patch)
    run_pass = pg.Evaluation.run_pass

    def changed(self, *arguments):
        self.model.prior = frequencies(self.run.val.tokens)
        return run_pass(self, *arguments)

    patch.setattr(pg.Evaluation, "run_pass", changed)


@mutant("causal", "once")
def knows_how_often_each_token_comes_when_it_is_built(patch):
    add_prior(patch)
    init = pg.Evaluation.__init__

    def changed(self, run, tensors):
        init(self, run, tensors)
        self.model.prior = frequencies(run.val.tokens)

    patch.setattr(pg.Evaluation, "__init__", changed)


@mutant("causal", "once", "score_first", "documents")
def learns_the_split_whenever_it_starts_anew(patch):
    reset = pg.Evaluation.reset

    def changed(self):
        reset(self)
        self.passes["legal_ttt"].adapt(self.run.val.tokens, 0.05)

    patch.setattr(pg.Evaluation, "reset", changed)


@mutant("once", "causal")
def learns_the_split_before_the_first_pass(patch):
    score_all = pg.Evaluation.score_all

    def changed(self):
        self.passes["legal_ttt"].adapt(self.run.val.tokens, 0.05)
        return score_all(self)

    patch.setattr(pg.Evaluation, "score_all", changed)


@mutant("once")
def counts_the_last_chunk_twice(patch):
    rearrange(patch, lambda nats: [*nats, nats[-1]])


@mutant("once", "causal", "score_first")
def drops_the_last_chunk(patch):
    rearrange(patch, lambda nats: nats[:-1])


@mutant("once", "causal", "score_first")
def never_scores_the_last_chunk(patch):
    plan = pg.StreamTTT.plan

    def shorter(self, tokens):
        planned = plan(self, tokens)
        return pg.Plan(planned.rounds[:-1], planned.updates - 1)

    patch.setattr(pg.StreamTTT, "plan", shorter)


@mutant("once", "causal", "score_first", "documents")
def drops_the_last_window(patch):
    plan = pg.plan_windows
    patch.setattr(pg, "plan_windows", lambda n, context, stride: plan(n, context, stride)[:-1])


@mutant("once", "causal", "normalised", "documents")
def counts_the_last_window_twice(patch):
    rearrange(patch, lambda nats: [*nats, nats[-1][-1:]], learns=False)


@mutant("once", "causal", "score_first")
def counts_targets_out_of_order(patch):
    rearrange(patch, lambda nats: nats[::-1])


@mutant("once", "causal")
def counts_easier_targets_in_place_of_others(patch):
    rearrange(patch, lambda nats: [np.minimum(x, np.median(x)) for x in nats])


@mutant("once", "causal", "score_first")
def scores_a_chunk_again_after_training_on_it(patch):
    def again(self, method, tokens, segments):
        nats = []
        for segment in segments:
            kept = self.score(method, up_to(tokens, segment), segment)
            if segment.useful.any():
                self.learn(method, up_to(tokens, segment), segment)
                kept = self.score(method, up_to(tokens, segment), segment)
            nats.append(kept)
        return nats

    replace_loop(patch, again)


@mutant("once", "causal", "score_first")
def trains_on_the_last_chunk_and_scores_it_again(patch):
    loop = pg.Evaluation.score_first

    def again(self, method, tokens, plan):
        nats = loop(self, method, tokens, plan)
        if method.adapted_params:
            self.learn(method, tokens, last := plan.rounds[-1][0])
            nats[-1] = self.score(method, tokens, last)
        return nats

    patch.setattr(pg.Evaluation, "score_first", again)


@mutant("once", "causal", "score_first", "normalised")
def takes_the_minimum_over_two_passes(patch):
    run_pass = pg.Evaluation.run_pass

    def better(self, method, tokens, plan):
        nats = run_pass(self, method, tokens, plan)
        if method.adapted_params:
            sliding = self.passes["final_fp32_sliding_window"]
            nats = np.minimum(run_pass(self, sliding, tokens, sliding.plan(tokens)), nats)
        return nats

    patch.setattr(pg.Evaluation, "run_pass", better)


@mutant("once", "causal", "normalised", "score_first", "documents")
def scorer_forgets_its_last_target(patch):
    score = pg.score
    patch.setattr(pg, "score", lambda *arguments: score(*arguments)[:-1])


@mutant("once")
def scores_where_nobody_watches(patch):
    replace_loop(
        patch,
        lambda self, method, tokens, segments: [method.score(tokens, segment, self.bar) for segment in segments],
        learns=False,
    )


@mutant("once")
def counts_bytes_twice_in_the_total(patch):
    total = pg.total
    patch.setattr(pg, "total", lambda nats, counted: total(nats, 2 * counted))


@mutant("once")
def writes_a_better_total_than_it_scored(patch):
    total = pg.total
    patch.setattr(pg, "total", lambda nats, counted: total(0.9 * nats, counted))


@mutant("bytes")
def counts_every_byte_twice(patch):
    count = pg.TokenBytes.count
    patch.setattr(pg.TokenBytes, "count", lambda self, tokens: 2 * count(self, tokens))


def recount(patch, change) -> None:
    """Bytes are counted with the tables that `change` leaves."""
    init = pg.TokenBytes.__init__

    def changed(self, path, vocab_size):
        init(self, path, vocab_size)
        change(self)

    patch.setattr(pg.TokenBytes, "__init__", changed)


@mutant("bytes")
def counts_byte_tokens_as_three(patch):
    recount(patch, lambda counter: counter.base.__setitem__(slice(pg.BOS_ID + 3, pg.BOS_ID + 259), 3))


@mutant("bytes")
def forgets_the_leading_space(patch):
    recount(patch, lambda counter: counter.leading_space.fill(False))


@mutant("bytes")
def counts_the_space_that_decoding_drops(patch):
    recount(patch, lambda counter: counter.boundary.fill(False))


@mutant("bytes")
def counts_a_byte_for_every_document(patch):
    recount(patch, lambda counter: counter.base.__setitem__(pg.BOS_ID, 1))


# Adapters by document, temperature and mixture


@mutant("causal", "score_first", "once", "normalised", **LORA)
def learns_from_a_piece_before_scoring_it(patch):
    score = pg.Evaluation.score

    def learned_before(self, method, tokens, piece):
        if method.adapted_params:
            method.score(tokens, piece, self.bar)
            self.learn(method, tokens, piece._replace(useful=np.ones(len(piece.windows), dtype=bool)))
            piece = piece._replace(fresh=False)
        return score(self, method, tokens, piece)

    patch.setattr(pg.Evaluation, "score", learned_before)


@mutant("once", "score_first", "causal", **LORA)
def scores_a_piece_again_after_learning_from_it(patch):
    run_pass = pg.Evaluation.run_pass

    def twice(self, method, tokens, plan):
        nats = run_pass(self, method, tokens, plan)
        return np.minimum(nats, run_pass(self, method, tokens, plan) - 0.01) if method.adapted_params else nats

    patch.setattr(pg.Evaluation, "run_pass", twice)


@mutant("once", "causal", "score_first", val_batch_size=32, **LORA)
def keeps_what_longer_documents_taught(patch):
    pieces = pg.plan_pieces
    patch.setattr(pg, "plan_pieces", lambda *plan: (piece._replace(fresh=False) for piece in pieces(*plan)))


@mutant("score_first", **LORA)
def learns_from_a_piece_with_the_text_after_it(patch):
    peek(patch, lambda segments, k: 1)


@mutant("normalised", "causal", "once", "score_first", **LORA | dict(ttt_enabled=True))
def a_piece_reads_a_token_too_many(patch):
    batch_of = pg.DocumentLoRA.batch_of

    def ahead(self, tokens, windows):
        inputs, targets, counted = batch_of(self, tokens, windows)
        return inputs.roll(-1, dims=1), targets, counted

    patch.setattr(pg.DocumentLoRA, "batch_of", ahead)


@mutant("causal", "once", "normalised", "score_first", hedge_enabled=True)
def counts_the_chunk_before_mixing(patch):
    call = pg.Readout.__call__

    def greedy(self, columns, tokens, first):
        self.add(*self.keys(tokens, first))
        return call(self, columns, tokens, first)

    patch.setattr(pg.Readout, "__call__", greedy)


@mutant("causal", "once", "normalised", "score_first", hedge_enabled=True)
def weighs_the_experts_by_their_later_scores(patch):
    call = pg.Readout.__call__

    def prophetic(self, columns, tokens, first):
        contexts, targets = self.keys(tokens, first)
        self.log_weights = self.log_weights + self.experts(columns, contexts, targets).sum(0)
        return call(self, columns, tokens, first)

    patch.setattr(pg.Readout, "__call__", prophetic)


@mutant("normalised", "causal", "once", "score_first", hedge_enabled=True, ttt_enabled=True)
def scores_the_best_expert(patch):
    patch.setattr(pg, "log_sum_exp", lambda x: x.max(-1))


@mutant("normalised", "once", "causal", "score_first", hedge_enabled=True, ttt_enabled=True)
def an_ngram_that_knows_too_much(patch):
    ngrams = pg.Readout.ngrams
    patch.setattr(pg.Readout, "ngrams", lambda *arguments: np.minimum(1, 3 * ngrams(*arguments)))


@mutant("normalised", "causal", "once", ttt_temperature=True, ttt_enabled=True)
def takes_the_temperature_that_fits_the_chunk_itself(patch):
    call = pg.Readout.__call__

    def fitted(self, columns, tokens, first):
        self.chosen = int(columns.sum(0).argmin())
        return call(self, columns, tokens, first)

    patch.setattr(pg.Readout, "__call__", fitted)


@pytest.fixture(scope="module")
def clean(tiny_data) -> dict[str, pg.Score]:
    return evaluation_of(audit_hp(), split(tiny_data)).score_all()


@pytest.mark.parametrize("change, settings, caught_by, allowed", MUTANTS)
def test_a_broken_rule_fails_the_check_that_names_it(
    change, settings, caught_by, allowed, clean, tiny_data, monkeypatch
):
    change(monkeypatch)
    val = split(tiny_data)
    hp, scores = audit_hp(audit_tokens=up_to_the_third_document(val), **settings), clean
    evaluation = evaluation_of(hp, val)
    with contextlib.suppress(RuntimeError):  # total() refuses scores of another number
        scores = evaluation.score_all()
    problems = failed(pg.Audit(evaluation).check(scores, SIZE, SECONDS))
    assert caught_by in problems and set(problems) <= allowed, problems


@pytest.mark.parametrize(
    "changes, seconds, passes",
    [
        (dict(), {}, True),
        (dict(), dict(train=600.0), False),  # average included
        (dict(), dict(train=599.0), True),
        (dict(max_wallclock_seconds=0.0), dict(train=9e5), True),
        (dict(), dict(evaluation=600.5), False),
        (dict(eval_max_seconds=0.0), dict(evaluation=9e5), True),
    ],
)
def test_clocks_are_held_against_both_limits(changes, seconds, passes, tiny_data):
    hp = audit_hp(**{**dict(max_wallclock_seconds=600.0, eval_max_seconds=600.0), **changes})
    auditor = pg.Audit(evaluation_of(hp, split(tiny_data, 2)))
    assert auditor.clocks({**SECONDS, **seconds}).passed == passes


def test_the_cap_holds_for_code_and_artifact_together(tiny_data):
    auditor = pg.Audit(evaluation_of(audit_hp(artifact_cap_bytes=100), split(tiny_data, 2)))
    assert auditor.size(40, 60) == (True, "code:40 artifact:60 total:100 cap:100")
    assert not auditor.size(40, 61).passed


def test_every_check_can_fail():
    caught = {param.values[2] for param in MUTANTS if not param.marks}
    assert caught == set(CHECKS) - {"clocks", "size"}


# -----------------------------------------------------------------------------
# WHOLE RUNS
# -----------------------------------------------------------------------------

SMALL = dict(NUM_LAYERS=1, VE_LAYERS=0, ITERATIONS=4, WARMDOWN_ITERS=2, VAL_LOSS_EVERY=0, VAL_BATCH_SIZE=1024)


@pytest.fixture(scope="module")
def audited(tiny_data, tmp_path_factory) -> Ran:
    return run_here(tmp_path_factory.mktemp("audited"), tiny_data, AUDIT=1, **SMALL)


def verdicts(out: str) -> list[tuple[str, str]]:
    """(check, pass or FAIL) of every line of the audit."""
    return re.findall(r"^audit:(\w+) (pass|FAIL) \S.*$", out, re.MULTILINE)


def test_a_run_with_audit_says_and_keeps_every_finding(audited):
    assert audited.code == 0 and verdicts(audited.out) == [(name, "pass") for name in CHECKS]
    found = audited.result["audit"]
    assert list(found) == CHECKS and all(finding["passed"] is True for finding in found.values())
    for name, finding in found.items():
        assert f"audit:{name} pass {finding['figure']}\n" in audited.out
    assert re.search(r"^phase:audit seconds:\d", audited.out, re.MULTILINE) and "\nlimit:" not in audited.out


def evaluate_only(audited: Ran, tiny_data: Path, out: Path, **settings) -> Ran:
    """The artifact of that run again, with wider strides."""
    few = dict(EVAL_STRIDE=32, AUDIT_TOKENS=256, EVAL_MAX_SECONDS=0, VAL_BATCH_SIZE=1024, DEVICE="cpu", DTYPE="fp32")
    path = audited.folder / "artifact.pgolf"
    return run_here(out, tiny_data, tiny=False, EVAL_ONLY=1, ARTIFACT_PATH=path, **few | settings)


def test_the_artifact_of_that_run_passes_again_without_training(audited, tiny_data, tmp_path):
    again = evaluate_only(audited, tiny_data, tmp_path, AUDIT=1)
    assert again.code == 0 and verdicts(again.out) == [(name, "pass") for name in CHECKS]
    assert again.result["audit"]["clocks"]["figure"].startswith("train:not_in_this_run evaluation:")
    assert re.match(r"train:\d+\.\ds of no_limit evaluation:", audited.result["audit"]["clocks"]["figure"])


def test_the_audit_changes_no_score_and_no_other_seconds(audited, tiny_data, tmp_path, monkeypatch):
    ran = []
    for audit in (0, 1):
        ticks = itertools.count(0.0)  # a clock that goes on by a second whenever somebody looks
        clock = types.SimpleNamespace(perf_counter=ticks.__next__, strftime=time.strftime, monotonic=time.monotonic)
        monkeypatch.setattr(pg, "time", clock)
        ran.append(evaluate_only(audited, tiny_data, tmp_path / str(audit), AUDIT=audit))
    without, with_audit = (r.result for r in ran)
    assert without.pop("audit") is None and list(with_audit.pop("audit")) == CHECKS
    assert with_audit["phase_seconds"].pop("audit") > 0
    assert without.pop("peak_memory_mib") <= with_audit.pop("peak_memory_mib")
    assert with_audit == without and without["phase_seconds"]["adapt"] > 0 and without["eval_seconds"] > 0


def test_who_waits_for_an_audit_sees_it_work(audited, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(pg, "PROGRESS_SECONDS", 0.0)
    ran = evaluate_only(audited, tiny_data, tmp_path, AUDIT=1)
    counts = [int(n) for n in re.findall(r"^progress:audit (\d+) seconds:\d+$", ran.out, re.MULTILINE)]
    assert len(counts) > 20 and counts == sorted(counts) and counts[0] > 0
    assert ran.out.index("progress:audit") > ran.out.index("legal_ttt_exact")
    passes = re.findall(r"^progress:(\w+) (\d+)/(\d+) ", ran.out, re.MULTILINE)
    assert {label for label, *_ in passes} == set(ran.result["scores"])
    last = {label: (done, total) for label, done, total in passes}
    assert all(done == total for done, total in last.values()), last


def test_settings_of_the_audit_are_no_part_of_the_settings_hash():
    hashes = {tiny_hp(**changes).settings_hash() for changes in (dict(), dict(audit=True), dict(audit_tokens=99))}
    assert len(hashes) == 1


def test_a_failed_audit_ends_with_exit_code_3_and_the_results(audited, tiny_data, tmp_path, monkeypatch):
    smears_across_documents(monkeypatch)
    ran = evaluate_only(audited, tiny_data, tmp_path, AUDIT=1)
    assert ran.code == 3
    assert verdicts(ran.out) == [(name, "FAIL" if name == "documents" else "pass") for name in CHECKS]
    figure = ran.result["audit"]["documents"]["figure"]
    assert re.findall(r"^limit: .*$", ran.out, re.MULTILINE) == [f"limit: audit:documents failed: {figure}"]
    assert ran.out.splitlines()[-1].startswith("result {") and ran.result["headline"]["val_bpb"] > 0


def test_the_audit_leaves_the_weights_of_the_artifact(tiny_data):
    evaluation = evaluation_of(audit_hp(), split(tiny_data))
    pg.Audit(evaluation).check({}, SIZE, SECONDS)
    for name, weight in weights_of(evaluation.model).items():
        assert torch.equal(weight, evaluation.tensors[name].data), name
    assert not evaluation.passes["legal_ttt"].optimizer.state


def test_two_ranks_come_to_the_same_verdicts(audited, tiny_data, tmp_path):
    path = audited.folder / "artifact.pgolf"
    environ = dict(DATA_PATH=tiny_data, AUDIT=1, EVAL_ONLY=1, ARTIFACT_PATH=path, RUN_ID="two", VAL_BATCH_SIZE=1024)
    ran, _ = torchrun(2, ROOT / "train_gpt.py", tmp_path, DEVICE="cpu", DTYPE="fp32", **environ)
    assert ran.returncode == 0, ran.stderr
    result = json.loads((tmp_path / "runs" / "two" / "result.json").read_text("utf-8"))
    assert result["world_size"] == 2 and verdicts(ran.stdout) == verdicts(audited.out)
    for name in ("causal", "score_first", "once", "documents", "bytes"):
        assert result["audit"][name] == audited.result["audit"][name]
