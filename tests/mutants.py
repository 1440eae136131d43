"""Scripts that break a rule. The text of this file goes into a copy of train_gpt.py, followed by a call of one change:
`pg` is then that copy itself."""

import contextlib
import math

import numpy as np
import torch
import torch.nn.functional as F

MUTANTS = {}
LORA = dict(ttt_params="lora", ttt_lora_chunk=4, ttt_lora_rank=2, ttt_lr=0.5)


def mutant(caught_by: str, *along: str, **settings):
    """Enter a change that breaks a rule, the check that has to fail, and those that may fail along."""

    def enter(change):
        MUTANTS[change.__name__] = (change, dict(dict(ttt_enabled=False), **settings), caught_by, {caught_by, *along})
        return change

    return enter


def up_to(tokens, segment, ahead: int = 0):
    """The text to the segment's end, or some tokens further."""
    return tokens[: segment.windows[:, 2].max() + 1 + ahead]


def rescore(pg, change) -> None:
    """Nats become change(log probabilities (B, S, V), targets (B, S, 1))."""

    def forward(self, tokens, targets):
        logits = self.logits(tokens)[:, tokens.size(1) - targets.size(1) :]
        return change(logits.log_softmax(-1), targets[..., None]).squeeze(-1)

    pg.GPT.forward = forward


def replace_loop(pg, loop, learns: bool = True) -> None:
    """Passes that learn, or those that do not, go through loop(evaluation, method, tokens, their segments in order)."""
    ours = pg.Evaluation.score_first

    def changed(self, method, tokens, plan):
        if learns != (method.adapted_params > 0):
            return ours(self, method, tokens, plan)
        return loop(self, method, tokens, [segment for segments in plan.rounds for segment in segments])

    pg.Evaluation.score_first = changed


def rearrange(pg, change, learns: bool = True) -> None:
    """The pass with test-time training, or those without, become change(nats of every segment)."""
    ours = pg.Evaluation.score_first

    def changed(self, method, tokens, plan):
        nats = ours(self, method, tokens, plan)
        return change(nats) if learns == (method.adapted_params > 0) else nats

    pg.Evaluation.score_first = changed


def peek(pg, ahead) -> None:
    """Every update also learns from ahead(segments, k) tokens after chunk k."""

    def loop(self, method, tokens, segments):
        nats = []
        for k, segment in enumerate(segments):
            nats.append(self.score(method, up_to(tokens, segment), segment))
            if segment.useful.any():
                self.learn(method, up_to(tokens, segment, ahead(segments, k)), segment)
        return nats

    replace_loop(pg, loop)


TTT = dict(ttt_enabled=True)
EVERY = ("causal", "normalised", "score_first", "documents", "bytes", "unwatched", "clocks", "size")  # not carried out


def unguarded(pg) -> None:
    """The script lets another number of scores than of targets pass, and tells the right one."""
    pg.total = lambda nats, counted: pg.Score(float(nats.sum(dtype=np.float64)), len(counted), int(counted.sum()))


@mutant("score_first", "causal", "unwatched", "normalised", **TTT)
def trains_on_a_chunk_before_scoring_it(pg):
    def loop(self, method, tokens, segments):
        nats = []
        for segment in segments:
            if segment.useful.any():
                self.learn(method, up_to(tokens, segment), segment)
            nats.append(self.score(method, up_to(tokens, segment), segment))
        return nats

    replace_loop(pg, loop)


@mutant("causal", "unwatched", "normalised", **TTT)
def trains_on_the_next_chunk_too(pg):
    peek(pg, lambda segments, k: int(segments[k + 1].windows[-1, 2] - segments[k].windows[-1, 2]))


@mutant("causal", "unwatched", "normalised", **TTT)
def trains_on_two_tokens_of_the_next_chunk(pg):
    peek(pg, lambda segments, k: 2)


@mutant("normalised", **TTT)
def trains_on_the_first_token_of_the_next_chunk(pg):
    peek(pg, lambda segments, k: 1)


@mutant("score_first", **TTT)
def updates_do_nothing(pg):
    pg.StreamTTT.adapt = lambda self, tokens, lr: None


@mutant("causal", "unwatched", "normalised", "score_first", **TTT)
def weights_carry_over_to_the_next_pass(pg):
    init = pg.Evaluation.__init__

    def learns_first(self, run, tensors):
        init(self, run, tensors)
        last = list(self.passes)[-1]
        self.passes = {last: self.passes.pop(last), **self.passes}
        self.reset = lambda: None

    pg.Evaluation.__init__ = learns_first


@mutant("normalised")
def scales_the_nats_of_some_targets(pg):
    rescore(pg, lambda p, t: -p.gather(-1, t) * torch.where(t % 2 == 0, 0.9, 1.0))


@mutant("normalised")
def boosts_the_logits_of_some_targets(pg):
    rescore(pg, lambda p, t: -p.gather(-1, t) - 0.5 * (t % 2 == 0))


@mutant("normalised")
def chooses_the_temperature_by_the_target(pg):
    rescore(pg, lambda p, t: torch.where(t % 2 == 0, -p.gather(-1, t), -(2 * p).log_softmax(-1).gather(-1, t)))


@mutant("normalised")
def takes_the_better_of_two_distributions(pg):
    rescore(pg, lambda p, t: -torch.maximum(p, (2 * p).log_softmax(-1)).gather(-1, t))


@mutant("normalised")
def adds_a_prior_without_normalising(pg):
    rescore(pg, lambda p, t: -(p.exp() + 0.1 / p.size(-1)).log().gather(-1, t))


@mutant("normalised")
def divides_by_half_the_vocabulary(pg):
    rescore(pg, lambda p, t: (p[..., ::2].logsumexp(-1, keepdim=True) - p).gather(-1, t))


@mutant("normalised")
def gives_half_the_vocabulary_a_distribution_of_its_own(pg):
    rescore(pg, lambda p, t: -p.unflatten(-1, (2, -1)).log_softmax(-1).flatten(-2).gather(-1, t))


@mutant("normalised")
def knows_only_half_the_vocabulary(pg):
    rescore(pg, lambda p, t: -(p - 1e4 * (torch.arange(p.size(-1)) % 2)).log_softmax(-1).gather(-1, t))


@mutant("normalised", "causal", "once", "unwatched")
def has_no_score_for_a_rare_token(pg):
    rescore(pg, lambda p, t: torch.where(t == 4, math.nan, -p.gather(-1, t)))


def look_ahead(q, k, v, mask=None):
    group, allowed = q.size(2) // k.size(2), torch.ones(q.size(1), q.size(1)).tril(1).bool()
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2)


@mutant("causal", "unwatched", "normalised", num_layers=2)
def attention_sees_the_next_position(pg):
    pg.sdpa = look_ahead


@mutant("normalised")
def attention_of_one_layer_sees_the_next_position(pg):
    pg.sdpa = look_ahead


@mutant("normalised", "unwatched", **TTT)
def attention_sees_the_next_position_where_it_has_adapted(pg):
    plain, score, ahead = pg.sdpa, pg.Evaluation.score, []
    pg.sdpa = lambda *qkv: (look_ahead if ahead else plain)(*qkv)

    def changed(self, method, tokens, segment):
        if method.adapted_params and segment.windows[0, 1] > 0:
            ahead.append("of the first chunk")
        nats = score(self, method, tokens, segment)
        ahead.clear()
        return nats

    pg.Evaluation.score = changed


@mutant("normalised")
def inputs_hold_the_next_token(pg):
    trunk = pg.GPT.trunk
    pg.GPT.trunk = lambda self, x: trunk(self, x) + 0.1 * self.tok_emb.look_up(x.roll(-1, 1)).to(self.dtype)


@mutant("normalised")
def smears_from_the_right(pg):
    def forward(self, x, starts):
        return torch.where(starts[..., None], x, torch.lerp(x, x.roll(-1, 1), self.gate.sigmoid().to(x.dtype)))

    pg.SmearGate.forward = forward


@mutant("causal", "normalised", "documents", "unwatched", **TTT)
def windows_of_a_batch_hear_of_each_other(pg):
    trunk = pg.GPT.trunk
    pg.GPT.trunk = lambda self, x: (y := trunk(self, x)) + 0.1 * y.mean(0)


def only_first(starts):
    return torch.arange(starts.size(1)).expand_as(starts) == 0


@mutant("documents")
def smears_across_documents(pg):
    forward = pg.SmearGate.forward
    pg.SmearGate.forward = lambda self, x, starts: forward(self, x, only_first(starts))


@mutant("documents", document_mask=True)
def attends_across_documents(pg):
    mask = pg.additive_mask
    pg.additive_mask = lambda starts, dtype: mask(only_first(starts), dtype)


@mutant("documents")
def hashes_bigrams_across_documents(pg):
    forward = pg.BigramHash.forward
    pg.BigramHash.forward = lambda self, x, starts, dtype: forward(self, x, only_first(starts), dtype)


def add_prior(pg) -> None:
    head = pg.GPT.unembed
    pg.GPT.unembed = lambda self, x: head(self, x) + getattr(self, "prior", 0.0)


def frequencies(tokens):
    counts = np.bincount(tokens, minlength=512) + 1.0
    return torch.from_numpy(np.log(counts / counts.sum())).float()


def knows_frequencies(pg, cheats) -> None:
    """Where cheats(evaluation), every pass knows how often each token comes in its text."""
    add_prior(pg)
    run_pass = pg.Evaluation.run_pass

    def changed(self, *arguments):
        if cheats(self):
            self.model.prior = frequencies(self.run.val.tokens)
        nats = run_pass(self, *arguments)
        self.model.prior = 0.0
        return nats

    pg.Evaluation.run_pass = changed


@mutant("causal", "normalised", "unwatched", "score_first", "documents", **TTT)
def knows_how_often_each_token_comes(pg):
    knows_frequencies(pg, lambda evaluation: True)


@mutant("causal", "normalised", "unwatched", "documents", **TTT)
def knows_how_often_each_token_comes_when_it_is_built(pg):
    add_prior(pg)
    init = pg.Evaluation.__init__

    def changed(self, run, tensors):
        init(self, run, tensors)
        self.model.prior = frequencies(run.val.tokens)

    pg.Evaluation.__init__ = changed


@mutant("causal", "normalised", "unwatched", "score_first", "documents", **TTT)
def learns_the_split_whenever_it_starts_anew(pg):
    reset = pg.Evaluation.reset

    def changed(self):
        reset(self)
        if "legal_ttt" in self.passes:
            self.passes["legal_ttt"].adapt(self.run.val.tokens, 0.05)

    pg.Evaluation.reset = changed


@mutant("causal", "normalised", "unwatched", "score_first", **TTT)
def learns_the_split_before_the_first_pass(pg):
    score_all = pg.Evaluation.score_all

    def changed(self):
        if "legal_ttt" in self.passes:
            self.passes["legal_ttt"].adapt(self.run.val.tokens, 0.05)
        return score_all(self)

    pg.Evaluation.score_all = changed


@mutant("once", *EVERY, **TTT)
def counts_the_last_chunk_twice(pg):
    unguarded(pg)
    rearrange(pg, lambda nats: [*nats, nats[-1]])


@mutant("once", *EVERY, **TTT)
def drops_the_last_chunk(pg):
    unguarded(pg)
    rearrange(pg, lambda nats: nats[:-1])


@mutant("once", *EVERY, **TTT)
def never_scores_the_last_chunk(pg):
    unguarded(pg)
    plan = pg.StreamTTT.plan

    def shorter(self, tokens):
        planned = plan(self, tokens)
        return pg.Plan(planned.rounds[:-1], planned.updates - 1)

    pg.StreamTTT.plan = shorter


@mutant("once", *EVERY)
def drops_the_last_window(pg):
    unguarded(pg)
    plan = pg.plan_windows
    pg.plan_windows = lambda n, context, stride: plan(n, context, stride)[:-1]


@mutant("once", *EVERY)
def counts_the_last_window_twice(pg):
    unguarded(pg)
    rearrange(pg, lambda nats: [*nats, nats[-1][-1:]], learns=False)


@mutant("causal", "normalised", "score_first", "unwatched", **TTT)
def counts_targets_out_of_order(pg):
    rearrange(pg, lambda nats: nats[::-1])


@mutant("causal", "unwatched", "normalised", "score_first", **TTT)
def counts_easier_targets_in_place_of_others(pg):
    rearrange(pg, lambda nats: [np.minimum(x, np.median(x)) for x in nats])


@mutant("once", *EVERY, **TTT)
def scores_a_chunk_again_after_training_on_it(pg):
    def again(self, method, tokens, segments):
        nats = []
        for segment in segments:
            kept = self.score(method, up_to(tokens, segment), segment)
            if segment.useful.any():
                self.learn(method, up_to(tokens, segment), segment)
                kept = self.score(method, up_to(tokens, segment), segment)
            nats.append(kept)
        return nats

    replace_loop(pg, again)


@mutant("once", *EVERY, **TTT)
def trains_on_the_last_chunk_and_scores_it_again(pg):
    loop = pg.Evaluation.score_first

    def again(self, method, tokens, plan):
        nats = loop(self, method, tokens, plan)
        if method.adapted_params:
            self.learn(method, tokens, last := plan.rounds[-1][0])
            nats[-1] = self.score(method, tokens, last)
        return nats

    pg.Evaluation.score_first = again


@mutant("normalised", "once", "causal", "unwatched", "score_first", **TTT)
def takes_the_minimum_over_two_passes(pg):
    run_pass = pg.Evaluation.run_pass

    def better(self, method, tokens, plan):
        nats = run_pass(self, method, tokens, plan)
        if method.adapted_params:
            told = self.scored, self.last
            sliding = list(self.passes.values())[1]
            nats = np.minimum(run_pass(self, sliding, tokens, sliding.plan(tokens)), nats)
            self.scored, self.last = told
        return nats

    pg.Evaluation.run_pass = better


@mutant("once", *EVERY, **TTT)
def scorer_forgets_its_last_target(pg):
    unguarded(pg)
    score = pg.score
    pg.score = lambda *arguments: score(*arguments)[:-1]


@mutant("once", *EVERY)
def scores_where_nobody_watches(pg):
    replace_loop(
        pg,
        lambda self, method, tokens, segments: [method.score(tokens, segment, self.bar) for segment in segments],
        learns=False,
    )


@mutant("once", "bytes")
def counts_bytes_twice_in_the_total(pg):
    total = pg.total
    pg.total = lambda nats, counted: total(nats, 2 * counted)


@mutant("once", "unwatched")
def writes_a_better_total_than_it_scored(pg):
    total = pg.total
    pg.total = lambda nats, counted: total(0.9 * nats, counted)


@mutant("bytes")
def counts_every_byte_twice(pg):
    count = pg.TokenBytes.count
    pg.TokenBytes.count = lambda self, tokens: 2 * count(self, tokens)


def recount(pg, change) -> None:
    """Bytes are counted with the tables that `change` leaves."""
    init = pg.TokenBytes.__init__

    def changed(self, path, vocab_size):
        init(self, path, vocab_size)
        change(self)

    pg.TokenBytes.__init__ = changed


@mutant("bytes")
def counts_byte_tokens_as_three(pg):
    recount(pg, lambda counter: counter.base.__setitem__(slice(pg.BOS_ID + 3, pg.BOS_ID + 259), 3))


@mutant("bytes")
def forgets_the_leading_space(pg):
    recount(pg, lambda counter: counter.leading_space.fill(False))


@mutant("bytes")
def counts_the_space_that_decoding_drops(pg):
    recount(pg, lambda counter: counter.boundary.fill(False))


@mutant("bytes")
def counts_a_byte_for_every_document(pg):
    recount(pg, lambda counter: counter.base.__setitem__(pg.BOS_ID, 1))


CASED = {"counts_operators", "forgets_the_escape", "counts_raw_newlines"}  # scored on a split in CaseOps


@mutant("bytes", vocab_size=320)
def counts_operators(pg):
    recount(pg, lambda counter: counter.base.__setitem__(counter.operator, 3))


@mutant("bytes", vocab_size=320)
def forgets_the_escape(pg):
    pg.TokenBytes.escapes = lambda self, tokens: np.zeros(len(tokens), bool)


@mutant("bytes", vocab_size=320)
def counts_raw_newlines(pg):
    """As if each space of the text that is scored had been two newlines in the text that was given."""
    recount(pg, lambda counter: counter.base.__iadd__(counter.leading_space))


# Adapters by document, temperature and mixture


@mutant("score_first", "causal", "unwatched", "normalised", **LORA, **TTT)
def learns_from_a_piece_before_scoring_it(pg):
    score = pg.Evaluation.score

    def learned_before(self, method, tokens, piece):
        if method.adapted_params:
            method.score(tokens, piece, self.bar)
            self.learn(method, tokens, piece._replace(useful=np.ones(len(piece.windows), dtype=bool)))
            piece = piece._replace(fresh=False)
        return score(self, method, tokens, piece)

    pg.Evaluation.score = learned_before


@mutant("normalised", "causal", "unwatched", **LORA, **TTT)
def scores_a_piece_again_after_learning_from_it(pg):
    run_pass = pg.Evaluation.run_pass

    def twice(self, method, tokens, plan):
        nats = run_pass(self, method, tokens, plan)
        return np.minimum(nats, run_pass(self, method, tokens, plan) - 0.01) if method.adapted_params else nats

    pg.Evaluation.run_pass = twice


@mutant("score_first", "causal", "unwatched", "normalised", val_batch_size=32, **LORA, **TTT)
def keeps_what_longer_documents_taught(pg):
    pieces = pg.plan_pieces
    pg.plan_pieces = lambda *plan: (piece._replace(fresh=False) for piece in pieces(*plan))


@mutant("normalised", "causal", "unwatched", **LORA, **TTT)
def learns_from_a_piece_with_the_text_after_it(pg):
    learn = pg.DocumentLoRA.learn

    def ahead(self, tokens, piece):
        learn(self, tokens, piece)
        starts, _, ends = piece.windows[piece.useful].T
        starts = np.maximum(starts, ends - self.hp.eval_seq_len + self.stride)
        inputs, targets, counted = self.batch_of(self.whole, np.column_stack([starts, ends, ends + 1]))
        with torch.enable_grad(), self.attached():
            (self.model(inputs, targets) * counted).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    pg.DocumentLoRA.learn = ahead
    init = pg.DocumentLoRA.__init__

    def has_the_whole_text(self, run, *rest):
        init(self, run, *rest)
        self.whole = run.val.tokens

    pg.DocumentLoRA.__init__ = has_the_whole_text


@mutant("normalised", "causal", "unwatched", "score_first", **LORA, **TTT)
def a_piece_reads_a_token_too_many(pg):
    batch_of = pg.DocumentLoRA.batch_of

    def ahead(self, tokens, windows):
        inputs, targets, counted = batch_of(self, tokens, windows)
        return inputs.roll(-1, dims=1), targets, counted

    pg.DocumentLoRA.batch_of = ahead


# A kept warm, phases in which the model learns: one document at a time in each of eight queues
QUEUED = dict(LORA, ttt_warm_start_a=True, phased_ttt_num_phases=2, global_ttt_lr=0.1, val_batch_size=128)


def knows_what_waits(pg) -> None:
    """The method has the whole text, and `waiting()`, the documents of which nothing is scored yet, in their order."""
    plan, score = pg.DocumentLoRA.plan, pg.DocumentLoRA.score

    def planned(self, tokens):
        self.whole, self.done = tokens, np.zeros(len(tokens) - 1, dtype=bool)
        return plan(self, tokens)

    def scored(self, tokens, segment, bar):
        self.done[pg.targets_of(segment.windows)] = True
        return score(self, tokens, segment, bar)

    def waiting(self):
        documents = pg.plan_documents(self.whole)
        return documents[~self.done[documents[:, 0]]]

    pg.DocumentLoRA.plan, pg.DocumentLoRA.score, pg.DocumentLoRA.waiting = planned, scored, waiting


def step_on(method, start, first, end) -> None:
    """A step of the adapters on one window of the text."""
    inputs, targets, counted = method.batch_of(method.whole, np.array([[start, first, end]]))
    with torch.enable_grad(), method.attached():
        (method.model(inputs, targets) * counted).sum().backward()
    method.optimizer.step()
    method.optimizer.zero_grad(set_to_none=True)


@mutant("causal", "unwatched", "normalised", "score_first", **QUEUED, **TTT)
def a_phase_hears_a_document_that_waits(pg):
    knows_what_waits(pg)
    learn = pg.DocumentLoRA.learn_together

    def early(self):
        for start, end in self.waiting()[:1]:
            self.heard[start:end] = self.whole[start + 1 : end + 1] + np.int32(1)
        learn(self)

    pg.DocumentLoRA.learn_together = early


@mutant("causal", "unwatched", "normalised", "score_first", **QUEUED, **TTT)
def a_queue_learns_from_a_document_that_waits_in_another(pg):
    knows_what_waits(pg)
    learn = pg.DocumentLoRA.learn

    def ahead(self, tokens, piece):
        learn(self, tokens, piece)
        for start, end in self.waiting()[: len(piece.windows)]:
            step_on(self, start, start, min(start + self.stride, end))

    pg.DocumentLoRA.learn = ahead


@mutant("causal", "unwatched", "normalised", "score_first", **QUEUED, **TTT)
def warms_a_on_the_document_itself(pg):
    knows_what_waits(pg)
    begin = pg.DocumentLoRA.begin

    def ahead(self, segment):
        begin(self, segment)
        if segment.fresh:
            start = int(segment.windows[0, 0])
            end = next(int(end) for first, end in pg.plan_documents(self.whole) if first == start)
            for first in range(start, end, self.stride):
                step_on(self, max(start, first + self.stride - 16), first, min(first + self.stride, end))
            for b in self.parameters[1::2]:
                b.data.zero_()
            self.optimizer.state.clear()

    pg.DocumentLoRA.begin = ahead


@mutant("normalised", "causal", "unwatched", "score_first", **LORA, **TTT)
def smears_from_one_document_into_the_next_where_they_lie_side_by_side(pg):
    plain, attached = pg.SmearGate.forward, pg.DocumentLoRA.attached
    inside = []

    def smeared(self, x, starts):
        if not inside:
            return plain(self, x, starts)
        return plain(self, x.flatten(0, 1)[None], only_first(starts.flatten()[None])).view_as(x)

    @contextlib.contextmanager
    def with_adapters(self):
        with attached(self):
            inside.append("the LoRA path")
            yield
            inside.clear()

    pg.SmearGate.forward, pg.DocumentLoRA.attached = smeared, with_adapters


HEDGE = dict(hedge_enabled=True, ttt_enabled=True)


@mutant("normalised", "causal", "unwatched", "score_first", **HEDGE)
def counts_the_chunk_before_mixing(pg):
    call = pg.Readout.__call__

    def greedy(self, columns, tokens, first):
        self.add(*self.keys(tokens, first))
        return call(self, columns, tokens, first)

    pg.Readout.__call__ = greedy


@mutant("causal", "unwatched", "normalised", "score_first", **HEDGE)
def weighs_the_experts_by_their_later_scores(pg):
    call = pg.Readout.__call__

    def prophetic(self, columns, tokens, first):
        contexts, targets = self.keys(tokens, first)
        self.log_weights = self.log_weights + self.experts(columns, contexts, targets).sum(0)
        return call(self, columns, tokens, first)

    pg.Readout.__call__ = prophetic


@mutant("normalised", **HEDGE)
def scores_the_best_expert(pg):
    pg.log_sum_exp = lambda x: x.max(-1)


@mutant("normalised", "causal", "unwatched", **HEDGE)
def an_ngram_that_knows_too_much(pg):
    ngrams = pg.Readout.ngrams
    pg.Readout.ngrams = lambda *arguments: np.minimum(1, 3 * ngrams(*arguments))


@mutant("normalised", "causal", "unwatched", ttt_temperature=True, **TTT)
def takes_the_temperature_that_fits_the_chunk_itself(pg):
    call = pg.Readout.__call__

    def fitted(self, columns, tokens, first):
        self.chosen = int(columns.sum(0).argmin())
        return call(self, columns, tokens, first)

    pg.Readout.__call__ = fitted


# What only an outsider sees


@mutant("unwatched")
def behaves_when_it_is_asked_for_scores(pg):
    knows_frequencies(pg, lambda evaluation: not evaluation.run.hp.save_scores)


@mutant("unwatched", "normalised")
def behaves_when_the_text_is_short(pg):
    knows_frequencies(pg, lambda evaluation: evaluation.run.val.targets > 150)


@mutant("causal", "normalised", "unwatched", "documents")
def behaves_on_the_second_call(pg):
    calls = []
    knows_frequencies(pg, lambda evaluation: calls.append(None) or len(calls) == 1)


@mutant("identity")
def tells_a_hash_that_is_not_its_own(pg):
    prepare = pg.prepare
    pg.prepare = lambda *arguments: prepare(*arguments)._replace(source=b"print('another script')\n")


@mutant("causal", "unwatched", "normalised", "score_first", **LORA, **TTT)
def scores_documents_twice_and_keeps_the_better(pg):
    loop = pg.Evaluation.score_first

    def twice(self, method, tokens, plan):
        nats = loop(self, method, tokens, plan)
        told = list(self.scored), self.last
        if method.adapted_params:
            again = [[piece._replace(fresh=False) for piece in pieces] for pieces in plan.rounds]
            nats = [np.minimum(*pair) for pair in zip(nats, loop(self, method, tokens, pg.Plan(again)), strict=True)]
            self.scored, self.last = told
        return nats

    pg.Evaluation.score_first = twice


@mutant("once", "causal", "normalised", "score_first", "unwatched", val_batch_size=32, **LORA, **TTT)
def scores_the_easiest_documents_first(pg):
    documents = pg.plan_documents

    def by_loss(self, tokens):
        found = documents(tokens)
        most = self.hp.eval_seq_len
        texts = [torch.from_numpy(tokens[start : end + 1][:most].astype(np.int64))[None] for start, end in found]
        with torch.no_grad():
            losses = [self.model(text[:, :-1], text[:, 1:]).mean().item() for text in texts]
        return found[np.argsort(losses, kind="stable")]

    def plan(self, tokens):
        ordered = by_loss(self, tokens)
        batches = [ordered[i : i + self.rows] for i in range(0, len(ordered), self.rows)]
        batches = [batch[np.argsort(batch[:, 0] - batch[:, 1], kind="stable")] for batch in batches]
        rounds = [list(pg.plan_pieces(batch, self.hp.eval_seq_len, self.stride)) for batch in batches]
        return pg.Plan(rounds, len(rounds), count=len(ordered))

    pg.DocumentLoRA.plan = plan
