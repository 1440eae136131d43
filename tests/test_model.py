"""The model against a plain reference, its causality, its switches and its initial values."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.attention.flex_attention
import torch.nn.functional as F
from helpers import build_model, random_tokens, randomize, single_rank, tiny_hp, weights_of

import train_gpt as pg


def batch(*rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def losses(model: pg.GPT, tokens: np.ndarray) -> torch.Tensor:
    """(T-1,) nats of one sequence's own next tokens."""
    text = batch(tokens)
    with torch.no_grad():
        return model(text[:, :-1], text[:, 1:])[0]


# The reference: one sequence, one position, one head at a time, in float64.


def ref_rms(x):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def int32(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31


def ref_bigram_row(tokens, i: int, rows: int) -> int:
    if i == 0 or tokens[i] == 1:
        return rows - 1
    return (int32(36313 * int(tokens[i])) ^ int32(27191 * int(tokens[i - 1]))) % (rows - 1)


def ref_rotate(x, position: int, hp, context: int):
    d = hp.rope_dims or len(x)
    base = hp.rope_base * max(1, context / hp.train_seq_len) ** (d / (d - 2))
    y = x.clone()
    for j in range(d // 2):
        angle = position * base ** (-2 * j / d)
        c, s = math.cos(angle), math.sin(angle)
        y[j] = x[j] * c + x[j + d // 2] * s
        y[j + d // 2] = -x[j] * s + x[j + d // 2] * c
    return y


def ref_attention(x, ve, first, layer: int, hp, w, context: int, tokens):
    """(output, own value)"""
    length, width = len(x), hp.model_dim // hp.num_heads
    group = hp.num_heads // hp.num_kv_heads
    name = f"blocks.{layer}.attn"
    q, k, own = (x @ w[f"{name}.{part}.weight"].T for part in "qkv")
    v = own + first * w[f"{name}.first_share"] if f"{name}.first_share" in w else own
    if f"{name}.ve_scale" in w:
        v = v + ve * w[f"{name}.ve_scale"]
    y = torch.zeros(length, hp.num_heads, width, dtype=torch.float64)
    for h in range(hp.num_heads):
        mine, shared = slice(h * width, (h + 1) * width), slice(h // group * width, (h // group + 1) * width)
        keys = torch.stack([ref_rotate(ref_rms(k[t, shared]), t, hp, context) for t in range(length)])
        for t in range(length):
            query = ref_rotate(ref_rms(q[t, mine]), t, hp, context) * w[f"{name}.q_gain"][h]
            begin = max((i for i in range(t + 1) if tokens[i] == 1), default=0) if hp.document_mask else 0
            share = torch.softmax(keys[begin : t + 1] @ query / math.sqrt(width), 0)
            out = share @ v[begin : t + 1, shared]
            if layer >= hp.num_layers - hp.xsa_last_n:
                unit = v[t, shared] / v[t, shared].norm()
                out = out - (out @ unit) * unit
            if hp.gated_attention:
                gate = x[t] @ w[f"{name}.gate.proj.weight"][h] + w[f"{name}.gate.bias"][h]
                out = out * 2 / (1 + torch.exp(-gate))
            if f"{name}.sparse_gate.weight" in w:
                gate = x[t, : hp.gate_window] @ w[f"{name}.sparse_gate.weight"][h]
                out = out / (1 + torch.exp(-hp.sparse_attn_gate_scale * gate))
            y[t, h] = out
    return y.flatten(1) @ w[f"{name}.out.weight"].T, own


def ref_mlp(x, layer: int, hp, w):
    z = x @ w[f"blocks.{layer}.mlp.up.weight"].T
    if hp.mlp_kind == "leaky_relu2":
        hidden = torch.where(z > 0, z, hp.leaky_relu_slope * z) ** 2
    else:
        gate = x @ w[f"blocks.{layer}.mlp.gate.weight"].T
        hidden = z * (gate / (1 + torch.exp(-gate)) if hp.mlp_kind == "swiglu" else gate.clamp(min=0) ** 2)
    return hidden @ w[f"blocks.{layer}.mlp.down.weight"].T


def ref_logits(tokens, hp, weights, context: int):
    w = {name: value.double() for name, value in weights.items()}
    x = w["tok_emb.weight"][tokens]
    if hp.bigram_vocab_size:
        rows = [ref_bigram_row(tokens, i, hp.bigram_vocab_size) for i in range(len(tokens))]
        x = x + w["bigram.scale"] * (w["bigram.table.weight"][rows] @ w["bigram.proj.weight"].T)
    if "token_smear.strength" in w:
        gates = 1 / (1 + torch.exp(-x[:, : hp.gate_window] @ w["token_smear.proj.weight"][0]))
        shares = [0 if i == 0 or tokens[i] == 1 else w["token_smear.strength"] * gates[i] for i in range(len(tokens))]
        x = torch.stack([x[i] + shares[i] * x[i - 1] for i in range(len(tokens))])
    x = ref_rms(x)
    if "smear.gate" in w:
        share = 1 / (1 + torch.exp(-w["smear.gate"]))
        keep = [i == 0 or tokens[i] == 1 for i in range(len(tokens))]
        x = torch.stack([x[i] if keep[i] else x[i] + share * (x[i - 1] - x[i]) for i in range(len(tokens))])
    ve = None
    if hp.ve_enabled:
        table = w["value_embedding.table.weight"][tokens]
        ve = w["value_embedding.scale"] * (table @ w["value_embedding.proj.weight"].T)
    passes = [(layer, None) for layer in range(hp.num_layers)]
    if hp.num_loops:
        middle = list(range(hp.loop_start, hp.loop_end + 1))
        passes = [(layer, None) for layer in range(hp.loop_end + 1)]
        for loop in range(hp.num_loops):
            passes += [(middle[0], loop)] + [(layer, None) for layer in middle[1:]]
        passes += [(layer, None) for layer in range(hp.loop_end + 1, hp.num_layers)]
    x0, stack, half, first = x, [], len(passes) // 2 if hp.unet_skips else 0, None
    lane = None
    for place, (layer, loop) in enumerate(passes):
        name = f"blocks.{layer}"
        if hp.parallel_start_layer and layer == hp.parallel_start_layer:
            lane = x
        if place >= half and stack:
            pushed_at, pushed = stack.pop()
            skip, gate = w["skip_weights"][pushed_at] * pushed, w.get("skip_gates")
            x = x + skip if gate is None else skip + (x - skip) / (1 + torch.exp(-gate[pushed_at]))
        if loop is not None and "loop_vectors" in w:
            x = x + w["loop_vectors"][loop]
        scale = 1 / math.sqrt(layer + 1) if hp.ln_scale else 1.0
        u = w[f"{name}.resid_mix"][0] * x + w[f"{name}.resid_mix"][1] * x0
        y, own = ref_attention(ref_rms(u) * scale, ve, first, layer, hp, w, context, tokens)
        first = own if first is None else first
        y = w[f"{name}.attn_scale"] * y
        u = u + y
        m = w[f"{name}.mlp_scale"] * ref_mlp(ref_rms(u if lane is None else lane) * scale, layer, hp, w)
        if lane is None:
            x = u + m
        else:
            (r0, a0, m0), (r1, a1, m1) = w[f"{name}.lane_weights"]
            x, lane = r0 * x + a0 * y + m0 * m, r1 * lane + a1 * y + m1 * m
        if place < half:
            stack.append((place, x))
    x = x if lane is None else (x + lane) / 2
    z = ref_rms(x) @ (w["tok_emb.weight"] if hp.tie_embeddings else w["lm_head.weight"]).T
    return hp.logit_softcap * torch.tanh(z / hp.logit_softcap)


NOTHING = dict(
    bigram_vocab_size=0, smear_gate_enabled=False, ve_enabled=False, xsa_last_n=0, ln_scale=False, unet_skips=False
)


FRONTIER = dict(
    loop_vectors=False,
    parallel_start_layer=4,
    smear_gate_kind="token",
    sparse_attn_gate_enabled=True,
    num_layers=7,
    num_loops=2,
    loop_start=1,
    loop_end=2,
    skip_gates_enabled=True,
)


@pytest.mark.parametrize(
    "changes, context",
    [
        (FRONTIER, 16),
        (dict(), 16),
        (NOTHING, 16),
        (dict(num_layers=5, xsa_last_n=3, ve_layers="0,3", num_kv_heads=1, logit_softcap=2.0), 16),
        (dict(num_layers=4, num_kv_heads=4, tie_embeddings=False, leaky_relu_slope=0.1), 16),
        (dict(rope_dims=0, train_seq_len=8, rope_base=50.0, mlp_mult=1.3), 16),
        (dict(num_layers=1, ve_layers="0", leaky_relu_slope=0.0), 16),
        (dict(value_residual=True, gated_attention=True), 16),
        (dict(mlp_kind="swiglu", mlp_mult=3.0), 16),
        (dict(mlp_kind="star_relu", xsa_last_n=0), 16),
        (dict(num_loops=2, loop_start=1, loop_end=1), 16),
        (dict(num_loops=1, loop_start=0, loop_end=2, value_residual=True), 16),
        (dict(num_layers=5, num_loops=3, loop_start=1, loop_end=3, unet_skips=False), 16),
        (dict(num_layers=5, num_loops=2, loop_start=1, loop_end=2, skip_gates_enabled=True), 16),
        (dict(sparse_attn_gate_enabled=True, sparse_attn_gate_scale=0.5, gate_window=5), 16),
        (dict(smear_gate_kind="token", gate_window=7), 16),
        (dict(num_layers=5, parallel_start_layer=3), 16),
        (dict(document_mask=True), 16),
    ],
    ids="""frontier all nothing five-layers untied ntk one-layer values-and-gates swiglu star-relu loop-of-one
    loop-of-all loop-without-skips gated-skips sparse-gate token-smear lanes document-mask""".split(),
)
def test_model_equals_plain_reference(changes, context):
    hp = tiny_hp(**changes)
    model = build_model(hp, context, seed=3)
    tokens = random_tokens(14, seed=5, document=5)
    with torch.no_grad():
        ours = model.logits(batch(tokens))[0].double()
    torch.testing.assert_close(ours, ref_logits(tokens, hp, weights_of(model), context), atol=2e-4, rtol=2e-4)


def test_bigram_hash_wraps_in_int32():
    hash_ = randomize(pg.BigramHash(1009, 4, 8))
    tokens = np.array([1, 65535, 60000, 59999, 1, 7, 65535, 65535], dtype=np.int64)
    starts = torch.tensor([[i == 0 or t == 1 for i, t in enumerate(tokens)]])
    rows = [ref_bigram_row(tokens, i, 1009) for i in range(len(tokens))]
    assert rows[0] == rows[4] == 1008 and max(np.delete(rows, [0, 4])) < 1008
    expected = F.linear(hash_.table.weight[rows], hash_.proj.weight) * hash_.scale
    torch.testing.assert_close(hash_(batch(tokens), starts, torch.float32)[0], expected)


def test_exclude_own_value_leaves_nothing_along_the_groups_value():
    generator = torch.Generator().manual_seed(0)
    y, v = torch.randn(2, 5, 6, 8, generator=generator), torch.randn(2, 5, 3, 8, generator=generator)
    out = pg.exclude_own_value(y, v)
    along = (out * v.repeat_interleave(2, dim=2)).sum(-1)
    assert along.abs().max() < 1e-5
    assert (out - y).abs().max() > 0.1


# Forward, logits, context


def test_forward_is_the_unreduced_cross_entropy_of_logits():
    model, tokens = build_model(), batch(random_tokens(17), random_tokens(17, seed=1))
    with torch.no_grad():
        nats, logits = model(tokens[:, :-1], tokens[:, 1:]), model.logits(tokens[:, :-1])
    assert nats.shape == (2, 16) and nats.dtype == torch.float32
    log_probabilities = logits.log_softmax(-1)
    torch.testing.assert_close(nats, -log_probabilities.gather(-1, tokens[:, 1:, None])[..., 0])
    torch.testing.assert_close(log_probabilities.exp().sum(-1), torch.ones(2, 16))
    assert logits.size(-1) == 48


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fewer_targets_are_the_tail_of_the_full_forward(dtype):
    model, tokens = build_model(dtype=dtype), batch(random_tokens(17), random_tokens(17, seed=1))
    with torch.no_grad():
        full = model(tokens[:, :-1], tokens[:, 1:])
        for count in (1, 4, 15):
            tail = model(tokens[:, :-1], tokens[:, 1:][:, -count:])
            torch.testing.assert_close(tail, full[:, -count:], atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0)


@pytest.mark.parametrize(
    "changes", [dict(), FRONTIER, dict(num_layers=1, ve_layers="0")], ids=["all", "frontier", "one"]
)
def test_the_last_mlp_runs_on_scored_positions_alone(changes):
    model, tokens = randomize(build_model(tiny_hp(**changes))), batch(random_tokens(17))
    positions = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda _, inputs: positions.append(inputs[0].size(1)))
    with torch.no_grad():
        full = model(tokens[:, :-1], tokens[:, 1:])
        assert set(positions) == {16}
        positions.clear()
        tail = model(tokens[:, :-1], tokens[:, 13:])
    *others, last = positions
    assert last == 4 and all(count == 16 for count in others)
    torch.testing.assert_close(tail, full[:, -4:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_token_leaves_earlier_scores_bit_identical(dtype):
    hp = tiny_hp(train_seq_len=64, train_batch_tokens=64)
    model, tokens = build_model(hp, dtype=dtype), random_tokens(65)
    before = losses(model, tokens)
    for t in (1, 2, 17, 40, 63):
        changed = tokens.copy()
        changed[t] = 5 if tokens[t] != 5 else 6
        after = losses(model, changed)
        assert torch.equal(before[: t - 1], after[: t - 1]), f"token {t} reaches back"
        assert not torch.equal(before[t:], after[t:]), f"token {t} has no effect on what follows"


def test_smear_and_bigram_do_not_cross_documents():
    model = build_model()
    first, second = np.array([1, 5, 6, 7], dtype=np.int64), np.array([1, 9, 8, 7, 6], dtype=np.int64)
    x = torch.randn(1, 9, 24, generator=torch.Generator().manual_seed(0))

    def outputs(tokens, x):
        starts = batch(tokens) == 1
        return model.bigram(batch(tokens), starts, torch.float32)[0], model.smear(x, starts)[0]

    packed = outputs(np.concatenate([first, second]), x)
    for alone, part in ((outputs(first, x[:, :4]), slice(0, 4)), (outputs(second, x[:, 4:]), slice(4, 9))):
        for ours, theirs in zip(alone, packed, strict=True):
            torch.testing.assert_close(ours, theirs[part], atol=1e-6, rtol=1e-6)
    within = torch.lerp(x[0, 5], x[0, 4], model.smear.gate.sigmoid())
    torch.testing.assert_close(packed[1][5], within)  # but it does act inside a document


def test_trunk_restarts_smear_and_bigram_at_each_bos():
    """The first block sees the same input for a document whether it is packed behind another or alone."""
    model, seen = build_model(), []
    model.blocks[0].attn.register_forward_hook(lambda _, args, out: seen.append(args[1].x0))
    first, second = np.array([1, 5, 6, 7], dtype=np.int64), np.array([1, 9, 8, 7], dtype=np.int64)
    with torch.no_grad():
        for tokens in (np.concatenate([first, second]), second, first):
            model.logits(batch(tokens))
    torch.testing.assert_close(seen[0][:, 4:], seen[1], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(seen[0][:, :4], seen[2], atol=1e-6, rtol=1e-6)


# Documents


DOCUMENTS = ((0, 5), (5, 6), (6, 16), (16, 32))  # in two rows of sixteen


def packed_and_alone(logits) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (T, V) of DOCUMENTS, packed and each alone at the start of a row, with whatever behind it."""
    tokens = random_tokens(32, document=1000)
    tokens[[start for start, _ in DOCUMENTS]] = pg.BOS_ID
    with torch.no_grad():
        packed = [logits(batch(row))[0] for row in tokens.reshape(2, 16)]
        alone = [logits(batch(np.resize(tokens[a:b], 16)))[0, : b - a] for a, b in DOCUMENTS]
    return torch.cat(packed), torch.cat(alone)


@pytest.mark.parametrize("changes", [dict(), NOTHING, FRONTIER], ids=["all", "nothing", "frontier"])
@pytest.mark.parametrize("attend", [pg.sdpa, pg.matmul_attention, pg.flex], ids=lambda attend: attend.__name__)
def test_masked_documents_score_as_they_do_alone(attend, changes):
    """At any place in a row; without the mask they hear of what stands before them."""
    for masked in (True, False):
        model = randomize(pg.GPT(tiny_hp(**changes, document_mask=masked), 16, attend, torch.float32))
        packed, alone = packed_and_alone(model.logits)
        assert (packed - alone).abs().max() < 1e-4 if masked else (packed - alone).abs().max() > 1e-2


def test_compiled_flex_attention_is_the_masked_sdpa(monkeypatch):
    """Scores and gradients, by what is traced: the kernel that it becomes on CUDA, and its backward, CPUs lack."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    hp, results = tiny_hp(document_mask=True), []
    for attend in (pg.sdpa, pg.flex):
        model = randomize(pg.GPT(hp, 16, attend, torch.float32))
        logits = model.logits
        if attend is pg.flex:
            logits = torch.compile(logits, backend="aot_eager", fullgraph=True, dynamic=False)
            packed, alone = packed_and_alone(logits)
            torch.testing.assert_close(packed, alone, atol=1e-4, rtol=0)
        out = logits(batch(random_tokens(16, document=4)))
        out.square().mean().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("length", [1, 8, 24, 45, 64])
def test_blocks_of_documents_are_those_that_each_pair_of_positions_would_give(length):
    """torch's own look at every pair, on documents of one token to several blocks: which are seen, which as a whole."""
    generator = torch.Generator().manual_seed(length)
    starts = torch.rand(40, length, generator=generator) < torch.logspace(-3, 0, 40)[:, None]
    starts[:, 0] = True
    ours = pg.document_blocks(starts, width=8)
    theirs = torch.nn.attention.flex_attention.create_block_mask(
        ours.mask_mod, 40, None, length, length, device="cpu", BLOCK_SIZE=8
    )
    causal = torch.ones(length, length).tril().bool()
    document = starts.cumsum(1)
    rows, places = torch.arange(40)[:, None, None], torch.arange(length)
    seen = ours.mask_mod(rows, None, places[:, None], places)
    assert torch.equal(seen, causal & (document[:, :, None] == document[:, None]))
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    whole = [
        {(row, query, int(key)) for row in range(40) for query, count in enumerate(mask.full_kv_num_blocks[row, 0])
         for key in mask.full_kv_indices[row, 0, query, :count]}
        for mask in (ours, theirs)
    ]  # fmt: skip
    # A last block that the text does not fill is not whole for torch, which asks for the places behind the text, too.
    assert whole[1] == {at for at in whole[0] if at[1] < length // 8} and (length < 16 or whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("length", [512, 1000])
def test_flex_attention_skips_blocks_and_nothing_that_a_position_sees(length):
    """Forward, by the kernel that torch has for CPUs: it reads the lists of blocks."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.rand(3, length, generator=generator) < 0.01
    starts[:, 0] = True
    q, k, v = (torch.randn(3, length, heads, 32, generator=generator) for heads in (4, 2, 2))
    attend = torch.compile(lambda *qkv: pg.flex(*qkv, pg.flex_mask(starts, q.dtype)), fullgraph=True, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(attend(q, k, v), pg.sdpa(q, k, v, pg.additive_mask(starts, q.dtype)))
    assert pg.document_blocks(starts).sparsity() > 50  # percent of all pairs of blocks


@pytest.mark.parametrize("kernel", [pg.sdpa, pg.matmul_attention], ids=["sdpa", "matmul"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_token_of_another_document_moves_a_masked_score(kernel, dtype):
    hp = tiny_hp(document_mask=True, train_seq_len=64, train_batch_tokens=64)
    model = randomize(pg.GPT(hp, 64, kernel, dtype))
    tokens = random_tokens(65, document=1000)
    tokens[[20, 21, 50]] = pg.BOS_ID
    before = losses(model, tokens)
    changed = tokens.copy()
    changed[22:50] = 9
    after = losses(model, changed)
    assert torch.equal(before[:21], after[:21]) and torch.equal(before[50:], after[50:])
    assert (before[22:49] != after[22:49]).all()


# Rotary


def rotary_angles(rotary: pg.Rotary) -> torch.Tensor:
    """Frequencies (dims/2,), read from the tables at position 1."""
    return torch.atan2(rotary.sin[1, 0], rotary.cos[1, 0])[: rotary.dims // 2]


def test_the_training_context_leaves_base_frequencies_alone():
    for length in (16, 32):
        model = build_model(tiny_hp(train_seq_len=length, train_batch_tokens=64, rope_base=100.0, rope_dims=6))
        expected = 100.0 ** (-torch.tensor([0.0, 2.0, 4.0]) / 6)
        torch.testing.assert_close(rotary_angles(model.blocks[0].attn.rotary), expected)


def test_a_longer_context_applies_the_ntk_rule_once_and_a_shorter_one_never():
    hp = tiny_hp(rope_base=100.0, rope_dims=6)
    stretched = (100.0 * 2 ** (6 / 4)) ** (-torch.tensor([0.0, 2.0, 4.0]) / 6)
    plain = 100.0 ** (-torch.tensor([0.0, 2.0, 4.0]) / 6)
    for context, expected in ((32, stretched), (8, plain)):
        for block in build_model(hp, context).blocks:
            torch.testing.assert_close(rotary_angles(block.attn.rotary), expected)


def test_rotation_of_a_position_does_not_depend_on_the_inputs_length():
    rotary = build_model(context=64).blocks[0].attn.rotary
    x = torch.randn(1, 64, 2, 6, generator=torch.Generator().manual_seed(0))
    full = rotary(x)
    for length in (1, 5, 17, 40):
        assert torch.equal(rotary(x[:, :length]), full[:, :length])


def test_rope_dims_zero_rotates_the_whole_head_and_four_rotate_four():
    x = torch.randn(1, 8, 4, 6, generator=torch.Generator().manual_seed(0))
    moved = {}
    for dims in (0, 4, 6):
        rotary = build_model(tiny_hp(rope_dims=dims)).blocks[0].attn.rotary
        moved[dims] = rotary(x)
    assert torch.equal(moved[0], moved[6])
    assert torch.equal(moved[4][..., 4:], x[..., 4:])
    assert (moved[4][:, 1:, :, :4] != x[:, 1:, :, :4]).all() and (moved[0][:, 1:] != x[:, 1:]).all()


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_norm_and_its_own_backward_are_those_of_the_formula(scale):
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for norm in (pg.rms_norm, lambda x, scale: scale * x / (x.square().mean(-1, keepdim=True) + pg.NORM_EPS).sqrt()):
        leaf = x.clone().requires_grad_()
        y = norm(leaf, scale)
        (y * torch.arange(16.0)).square().sum().backward()
        results.append((y.detach(), leaf.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", [(3, 5, 16), (2, 7, 4, 6), (1, 1, 33), (0, 4, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_are_scaled_in_fp32_and_rounded_once(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x = (100 * torch.randn(*shape[::-1], generator=generator)).to(dtype).permute(*range(len(shape))[::-1])
    powers = torch.randint(-9, 3, (*shape[:-1], 1), generator=generator)
    factor = torch.rand(*shape[:-1], 1, generator=generator) * torch.tensor(10.0) ** powers
    y = pg.scale_rows(x, factor)
    assert y.dtype == dtype and torch.equal(y, (x * factor).to(dtype))
    if dtype == torch.bfloat16 and x.numel():
        assert torch.equal(y.float(), (x.float() * factor).bfloat16().float())


def test_short_attention_is_plain_products_to_learn_and_sdpa_to_score():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 32, heads, 8, generator=generator).bfloat16() for heads in (4, 2, 2))
    products, fused = pg.matmul_attention(q, k, v), pg.sdpa(q, k, v)
    assert not torch.equal(products, fused)
    assert torch.equal(pg.short_attention(q, k, v), products)
    with torch.no_grad():
        assert torch.equal(pg.short_attention(q, k, v), fused)


# Switches

OFF = [
    (dict(bigram_vocab_size=0), ("bigram.",)),
    (dict(smear_gate_enabled=False), ("smear.",)),
    (dict(ve_enabled=False), ("value_embedding.", "ve_scale")),
    (dict(unet_skips=False), ("skip_weights",)),
    (dict(tie_embeddings=True), ("lm_head",)),
    (dict(xsa_last_n=0), ()),
    (dict(ln_scale=False), ()),
    (dict(leaky_relu_slope=0.0), ()),
    (dict(rope_dims=0), ()),
    (dict(logit_softcap=5.0), ()),
]


@pytest.mark.parametrize("off, absent", OFF, ids=[next(iter(off)) for off, _ in OFF])
def test_a_technique_that_is_off_is_absent_and_changes_the_loss(off, absent):
    base = dict(tie_embeddings=False) if "tie_embeddings" in off else {}
    on = build_model(tiny_hp(**base))
    without = pg.GPT(tiny_hp(**(base | off)), 16, pg.sdpa, torch.float32)
    names = {name for name, _ in without.named_parameters()}
    gone = {name for name, _ in on.named_parameters() if any(part in name for part in absent)}
    assert bool(gone) == bool(absent)
    assert names == {name for name, _ in on.named_parameters()} - gone
    without.load_state_dict({name: w for name, w in weights_of(on).items() if name in names})
    tokens = random_tokens(17)
    assert (losses(on, tokens) - losses(without, tokens)).abs().max() > 1e-4


def test_value_embeddings_act_in_their_layers_alone():
    model = build_model(tiny_hp(ve_layers="1"))
    assert [block.attn.ve_scale is not None for block in model.blocks] == [False, True, False]


def test_qk_gain_init_reaches_every_query_head():
    model = build_model(tiny_hp(qk_gain_init=2.5), seed=None)
    assert all(torch.equal(block.attn.q_gain, torch.full((4,), 2.5)) for block in model.blocks)


@pytest.mark.parametrize("field", ["mlp_mult", "num_kv_heads", "ve_dim", "bigram_dim", "num_layers"])
def test_each_size_reaches_the_model(field):
    hp = tiny_hp()
    value = {"mlp_mult": 3.0, "num_kv_heads": 4}.get(field, getattr(hp, field) + 1)
    sizes = [
        sum(p.numel() for p in build_model(h).parameters()) for h in (hp, dataclasses.replace(hp, **{field: value}))
    ]
    assert sizes[0] < sizes[1]


PUBLISHED = dict(value_residual=True, gated_attention=True, num_loops=2, loop_start=1, loop_end=1)
PUBLISHED_OFF = [
    (dict(value_residual=False), "first_share"),
    (dict(gated_attention=False), "attn.gate."),
    (dict(num_loops=0), "loop_vectors"),
]


@pytest.mark.parametrize("off, absent", PUBLISHED_OFF, ids=[next(iter(off)) for off, _ in PUBLISHED_OFF])
def test_a_published_technique_is_absent_when_off_and_acts_when_on(off, absent):
    on, without = build_model(tiny_hp(**PUBLISHED)), build_model(tiny_hp(**(PUBLISHED | off)))
    gone = {n for n in weights_of(on)} - {n for n in weights_of(without)}
    assert gone and all(absent in name for name in gone)
    shared = {n: w[: len(weights_of(without)[n])] if w.dim() else w for n, w in weights_of(on).items() if n not in gone}
    without.load_state_dict(shared)
    assert (losses(on, random_tokens(17)) - losses(without, random_tokens(17))).abs().max() > 1e-4


def test_a_fresh_model_is_not_moved_by_gates_shares_or_loops():
    """What starts as the identity does: after one step of training nothing but the loop vectors could differ."""
    plain = build_model(seed=None)
    for changes in (dict(value_residual=True), dict(gated_attention=True)):
        other = build_model(tiny_hp(**changes), seed=None)
        other.load_state_dict(randomized := weights_of(randomize(build_model(seed=None))), strict=False)
        plain.load_state_dict(randomized)
        tokens = random_tokens(17)
        torch.testing.assert_close(losses(other, tokens), losses(plain, tokens), atol=1e-5, rtol=0)


def test_a_model_with_loops_switched_off_is_the_plain_one():
    looped, plain = build_model(tiny_hp(**PUBLISHED)), build_model(tiny_hp(**(PUBLISHED | dict(num_loops=0))))
    plain.load_state_dict(
        {n: w[:1] if n == "skip_weights" else w for n, w in weights_of(looped).items() if n != "loop_vectors"}
    )
    on = losses(looped, random_tokens(17))
    looped.looping = False
    assert torch.equal(losses(looped, random_tokens(17)), losses(plain, random_tokens(17)))
    assert not torch.equal(losses(looped, random_tokens(17)), on)


def test_loops_keep_the_meaning_of_a_skip_that_both_graphs_have():
    """The weight belongs to what is pushed: switching loops on does not hand a learned weight to another layer."""
    hp = tiny_hp(num_layers=7, num_loops=2, loop_start=2, loop_end=3)
    assert [layer for layer, _ in pg.layer_passes(hp, 2)] == [0, 1, 2, 3, 2, 3, 2, 3, 4, 5, 6]
    assert [loop for _, loop in pg.layer_passes(hp, 2)] == [None] * 4 + [0, None, 1, None] + [None] * 3
    model = build_model(hp)
    assert model.skip_weights.shape == (5, 24)
    model.looping = False
    before = losses(model, random_tokens(17))
    with torch.no_grad():
        model.skip_weights[3:].zero_()  # those of outputs that only the loops push
    assert torch.equal(losses(model, random_tokens(17)), before)


@pytest.mark.parametrize("kind", ["swiglu", "star_relu"])
def test_a_gated_mlp_has_as_many_weights(kind):
    def weights(**changes) -> int:
        return sum(
            p.numel() for n, p in build_model(tiny_hp(mlp_mult=3.0, **changes)).named_parameters() if "mlp." in n
        )

    assert weights(mlp_kind=kind) == weights()


def test_a_tied_head_is_the_token_table_and_both_read_the_same_quantized_weight():
    model, tokens = build_model(), batch(np.array([1, 5, 6, 7], dtype=np.int64))
    assert model.head is model.tok_emb and "lm_head.weight" not in dict(model.state_dict())
    assert build_model(tiny_hp(tie_embeddings=False)).head.weight.shape == model.tok_emb.weight.shape
    plain = model.logits(tokens)
    model.tok_emb.q_max, model.tok_emb.fake_quant = 1, True
    model.tok_emb.row_scale = torch.full((48, 1), 0.01)
    grid = model.tok_emb.quantized().detach().clone()
    assert torch.equal(grid, (grid / 0.01).round() * 0.01) and grid.abs().max() <= 0.01
    assert torch.equal(model.tok_emb.look_up(tokens), grid[tokens])
    assert not torch.equal(model.logits(tokens), plain)
    model.tok_emb.fake_quant = False
    with torch.no_grad():
        model.tok_emb.weight.copy_(grid)
    after = model.logits(tokens)
    model.tok_emb.fake_quant = True
    torch.testing.assert_close(model.logits(tokens), after)


# Initial values

EVERYTHING = [
    dict(),
    dict(tie_embeddings=False),
    NOTHING,
    dict(num_layers=12),
    dict(PUBLISHED, mlp_kind="swiglu"),
    FRONTIER,
]


@pytest.mark.parametrize(
    "changes", EVERYTHING, ids=["all", "untied", "nothing", "twelve-layers", "published", "frontier"]
)
def test_every_parameter_has_one_initial_value_one_class_and_one_optimizer_row(changes):
    hp = tiny_hp(**changes)
    model = pg.GPT(hp, 16, pg.sdpa, torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    pg.init_weights(model, hp)
    optimizers = pg.Optimizers(model, hp, single_rank(hp), torch.float32, False)
    owners = [id(p) for p in optimizers.small] + [id(p) for bank in optimizers.banks for p in bank.parameters]
    assert sorted(owners) == sorted(id(p) for p in model.parameters())
    for name, p in model.named_parameters():
        assert p.isfinite().all(), f"{name} was not initialized"
        assert [row for row in pg.PARAMETERS if re.fullmatch(row.names, name)] == [pg.row_of(name)]
        assert pg.row_of(name).storage in pg.STORAGE


def test_every_row_of_the_tables_names_something():
    every = [pg.GPT(tiny_hp(**changes), 16, pg.sdpa, torch.float32) for changes in EVERYTHING]
    names = {name for model in every for name, _ in model.named_parameters()}
    for row in pg.PARAMETERS:
        assert any(re.fullmatch(row.names, name) for name in names), row.names
        assert row.optimizer in pg.optimizer_rows(tiny_hp())
    assert {pg.row_of(name).storage for name in names} == set(pg.STORAGE)
    assert {pg.row_of(name).optimizer for name in names} == set(pg.optimizer_rows(tiny_hp()))


def test_an_unknown_parameter_is_refused_everywhere():
    hp = tiny_hp()
    model = build_model(hp)
    model.surprise = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(RuntimeError, match="surprise"):
        pg.label_of("surprise")
    with pytest.raises(RuntimeError, match="surprise"):
        pg.init_weights(model, hp)
    with pytest.raises(RuntimeError, match="surprise"):
        pg.Optimizers(model, hp, single_rank(hp), torch.float32, False)


def test_a_model_with_a_parameter_of_no_row_or_of_two_is_not_built(monkeypatch):
    rows = pg.PARAMETERS
    for table, count in ((rows[1:], 0), ((*rows, rows[0]), 2)):
        monkeypatch.setattr(pg, "PARAMETERS", table)
        pg.row_of.cache_clear()
        with pytest.raises(RuntimeError, match=rf"blocks\.0\.attn\.q\.weight has {count} rows"):
            build_model()
    monkeypatch.undo()
    pg.row_of.cache_clear()
    build_model()


def test_initial_weights_follow_the_seed():
    one, same, other = (weights_of(build_model(tiny_hp(seed=s), seed=None)) for s in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    drawn = [name for name in one if one[name].dim() == 2 and one[name].unique().numel() > 2]
    assert len(drawn) > 10 and all(not torch.equal(one[name], other[name]) for name in drawn)
    assert not torch.equal(one["blocks.0.attn.q.weight"], one["blocks.1.attn.q.weight"])


def test_blocks_start_as_the_identity():
    model = build_model(seed=None)
    x, x0 = torch.randn(2, 1, 8, 24, generator=torch.Generator().manual_seed(0)).unbind()
    stream = pg.Stream(x0, model.value_embedding(torch.arange(8)[None], torch.float32))
    for block in model.blocks:
        assert torch.equal(block.mix(x, stream), x)
        assert not block.attend(x, stream)[0].any() and not block.feed(x).any()


def test_initial_values_are_those_of_the_formulas():
    hp = tiny_hp(vocab_size=512, tied_embed_init_std=0.02, tie_embeddings=False)
    w = weights_of(build_model(hp, seed=None))
    for name, value in w.items():
        if name.endswith((".q.weight", ".k.weight", ".v.weight", ".up.weight", ".proj.weight")):
            gram = value @ value.T if value.size(0) <= value.size(1) else value.T @ value
            torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-4, rtol=0)
        if name.endswith((".out.weight", ".down.weight", "lm_head.weight", "bigram.table.weight", "smear.gate")):
            assert not value.any()
        if name.endswith(("attn_scale", "mlp_scale", "ve_scale", "skip_weights")):
            assert (value == 1).all()
        if name.endswith("resid_mix"):
            assert (value[0] == 1).all() and not value[1].any()
    assert w["tok_emb.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert w["value_embedding.table.weight"].std() == pytest.approx(0.01, rel=0.05)
    assert w["bigram.scale"] == pytest.approx(0.05) and w["value_embedding.scale"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "changes", [dict(), dict(PUBLISHED, mlp_kind="swiglu"), FRONTIER], ids=["core", "published", "frontier"]
)
def test_every_parameter_learns_by_the_second_step(changes):
    hp = tiny_hp(grad_clip_norm=0.0, **changes)
    model = build_model(hp, seed=None)
    optimizers = pg.Optimizers(model, hp, single_rank(hp), torch.float32, False)
    text = batch(*(random_tokens(17, seed=s) for s in range(4)))
    for _ in range(2):
        model.zero_grad()
        model(text[:, :-1], text[:, 1:]).mean().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizers.step(1.0, 0.9)
    assert [name for name, g in gradients.items() if not g.any()] == []
