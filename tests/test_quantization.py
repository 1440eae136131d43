"""The quantizer's per-row choice, the storage classes, and fake quantization on the exporter's own grid."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import build_model, make_run, quantize, random_tokens, tiny_hp, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as pg

INT6, INT8 = "blocks.0.attn.q.weight", "tok_emb.weight"
DTYPES = dict(fp16=torch.float16, fp32=torch.float32)  # all others hold int8 codes


def store(name: str, w: torch.Tensor) -> pg.Stored:
    """As the default settings store a tensor of this name."""
    return quantize({name: w}, tiny_hp())[name]


def grids(weights: dict, hp: pg.Hyperparameters, factor: float = 1.0, sensitivity: dict | None = None) -> dict:
    """The grid of each weight that is stored as codes."""
    return pg.make_grids(weights, hp, pg.choose_steps(weights, hp, pg.Calibration({}, sensitivity or {})), factor)


def clip_grid(w: torch.Tensor) -> pg.Grid:
    """Clip search's, of six bits."""
    return grids({INT6: w}, tiny_hp())[INT6]


def normal(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return normal(rows, cols, seed) ** 5


def on_grid(w: torch.Tensor, clip: torch.Tensor, q_max: int) -> torch.Tensor:
    """Round to nearest with one fp16 scale per row, written without the code under test."""
    scale = torch.from_numpy((clip / q_max).numpy().astype(np.float16).astype(np.float32))
    codes = torch.round(w / torch.where(scale > 0, scale, torch.ones(()))).clamp(-q_max, q_max)
    return torch.where(scale > 0, codes * scale, torch.zeros(()))


def squared_error(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.double() - b.double()).square().sum(1)


@pytest.mark.parametrize("cols", [1, 2, 3, 100, 1000, 1001, 1002, 5000])
@pytest.mark.parametrize("make", [normal, heavy_tailed])
def test_each_row_takes_the_best_of_four_quantiles_and_the_maximum(make, cols):
    w = make(12, cols)
    stored = store(INT6, w)
    candidates = [w.abs().amax(1, keepdim=True)]
    candidates += [torch.quantile(w.abs(), q, dim=1, keepdim=True) for q in (0.999, 0.9995, 0.9999, 0.99999)]
    errors = torch.stack([squared_error(on_grid(w, clip, 31), w) for clip in candidates])
    ours = squared_error(stored.dequantize(), w)
    assert (ours <= errors[0] * (1 + 1e-5)).all(), "worse than the maximum"
    torch.testing.assert_close(ours, errors.min(0).values, rtol=2e-3, atol=0)


def test_clipping_wins_where_it_should():
    """Rows with outliers among thousands choose a quantile: the search is not idle."""
    w = heavy_tailed(16, 4000)
    maximum = (w.abs().amax(1, keepdim=True) / 31).half()
    assert (store(INT6, w).scale < maximum).any()
    even = normal(16, 100).sign()
    assert torch.equal(store(INT6, even).scale, torch.full((16, 1), 1 / 31).half())


def test_255_levels_clip_nothing():
    w = heavy_tailed(16, 4000)
    assert torch.equal(store(INT8, w).scale, (w.abs().amax(1, keepdim=True) / 127).half())


@pytest.mark.parametrize("name, q_max", [(INT6, 31), (INT8, 127)])
def test_codes_are_whole_and_in_range_and_scales_are_one_fp16_per_row(name, q_max):
    stored = store(name, heavy_tailed(20, 300))
    assert stored.data.dtype == torch.int8 and stored.scale.dtype == torch.float16 and stored.scale.shape == (20, 1)
    assert int(stored.data.abs().max()) == q_max
    assert torch.equal(stored.dequantize(), stored.data.float() * stored.scale.float())


@pytest.mark.parametrize("name, q_max", [(INT6, 31), (INT8, 127)])
@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.floats(-1e4, 1e4, width=32), min_size=9, max_size=9), min_size=1, max_size=6
    )
)  # fmt: skip
def test_the_error_is_at_most_half_a_step_inside_the_clip(name, q_max, rows):
    w = torch.tensor(rows)
    stored = store(name, w)
    scale = stored.scale.float()
    inside = w.abs() <= scale * q_max
    error = (stored.dequantize() - w).abs()
    assert (error <= scale * 0.5001)[inside & (scale > 0)].all()
    assert (stored.dequantize()[(scale == 0).expand_as(w)] == 0).all()
    clipped_to = (scale * q_max).expand_as(w)
    assert torch.equal(stored.dequantize().abs()[~inside], clipped_to[~inside])


@pytest.mark.parametrize("name", [INT6, INT8])
def test_zero_rows_stay_zero_beside_ordinary_rows(name):
    w = normal(4, 32)
    w[1] = 0
    back = store(name, w).dequantize()
    assert not back[1].any() and back.isfinite().all() and back[0].any()


@pytest.mark.parametrize("name, levels", [(INT6, 31), (INT8, 127)])
@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-1, 10.0, 1e4])
def test_relative_precision_does_not_depend_on_a_rows_size(name, levels, size):
    """A floor under the scale would leave small rows with a few levels or none."""
    w = normal(8, 64)
    unit = (store(name, w).dequantize() - w).norm() / w.norm()
    scaled = (store(name, size * w).dequantize() - size * w).norm() / (size * w).norm()
    assert unit < 1.5 / levels and scaled < 1.3 * unit


@pytest.mark.parametrize("name, levels", [(INT6, 31), (INT8, 127)])
def test_a_step_of_a_millionth_keeps_its_levels(name, levels):
    """A floor under the scale (1/31 was published) would store such rows as zeros."""
    w = normal(8, 64)
    w *= 1e-6 * levels / w.abs().amax(1, keepdim=True)
    stored = store(name, w)
    # fp16 says 1e-6 to within 3 %: as much of the largest weight may be clipped.
    assert (stored.dequantize() - w).abs().max() < 0.5e-6 + 0.03e-6 * levels
    assert stored.data.unique().numel() > levels / 2


@pytest.mark.parametrize("name", [INT6, INT8])
@pytest.mark.parametrize("size", [1e-5, 1e-6, 1e-7, 1e-8, 1e-40])
def test_the_tiniest_rows_are_never_worse_than_zeros(name, size):
    w = size * normal(8, 64)
    back = store(name, w).dequantize()
    assert back.isfinite().all() and (squared_error(back, w) <= squared_error(0 * w, w)).all()


@pytest.mark.parametrize("name", [INT6, INT8, "bigram.proj.weight", "blocks.0.attn_scale"])
@pytest.mark.parametrize("size", [1e5, 1e6, 1e7, 1e30])
def test_huge_finite_weights_are_stored_finite_or_refused(name, size):
    w = normal(4, 2000)
    w[2, 7] = size
    try:
        back = store(name, w).dequantize()
    except pg.LimitError:
        return
    assert back.isfinite().all(), "an export that cannot be read back"
    assert (back[0] - w[0]).norm() < 0.1 * w[0].norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [INT6, INT8, "bigram.proj.weight", "blocks.0.attn_scale", "smear.gate"])
def test_non_finite_weights_are_a_broken_limit(name, bad):
    w = normal(4, 8)
    w[1, 2] = bad
    with pytest.raises(pg.LimitError, match=name):
        store(name, w)


def expected_storage(name: str) -> str:
    if name.startswith("blocks.") and name.endswith(".weight"):
        return "int6"
    if name.endswith((".table.weight", "tok_emb.weight", "lm_head.weight")):
        return "int8"
    return "fp16" if name.endswith(".proj.weight") else "fp32"


@pytest.mark.parametrize("dim", [8, 24, 64])
def test_the_class_decides_the_storage_whatever_the_size(dim):
    model = build_model(tiny_hp(model_dim=dim, num_heads=2, num_kv_heads=1, tie_embeddings=False))
    weights = weights_of(model)
    stored = quantize(weights, tiny_hp())
    assert {name: t.storage for name, t in stored.items()} == {name: expected_storage(name) for name in weights}
    for name, t in stored.items():
        assert t.data.dtype == DTYPES.get(t.storage, torch.int8) and t.data.shape == weights[name].shape
        if t.storage == "fp32":
            assert torch.equal(t.dequantize(), weights[name])
        if t.storage == "fp16":
            assert torch.equal(t.dequantize(), weights[name].half().float())
    storages = [t.storage for t in stored.values()]
    assert storages == sorted(storages, key=["int6", "int8", "fp16", "fp32"].index)


# Fake quantization


def text():
    tokens = torch.from_numpy(random_tokens(33).astype(np.int64)).view(1, -1)
    return tokens[:, :-1].view(2, 16), tokens[:, 1:].view(2, 16)


def exported(model) -> dict[str, torch.Tensor]:
    """The model's weights with every int6 matrix replaced by what the artifact would hold."""
    weights = weights_of(model)
    stored = quantize(weights, tiny_hp())
    return {name: t.dequantize() if t.storage == "int6" else weights[name] for name, t in stored.items()}


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switching_on_after_a_compiled_call_gives_exactly_the_exported_forward(fresh_dynamo, dtype):
    model = build_model(dtype=dtype)
    qat = pg.QAT(model, tiny_hp())
    forward = torch.compile(model, backend="eager", dynamic=False, fullgraph=True)
    before = forward(*text()).detach()
    qat.refresh()
    qat.set(True)
    on = forward(*text()).detach()
    assert (on - before).abs().max() > 1e-3, "the compiled graph ignores the switch"

    reference = pg.GPT(tiny_hp(), 16, pg.sdpa, dtype)
    reference.load_state_dict(exported(model))
    assert torch.equal(on, reference(*text()).detach())
    assert torch.equal(model(*text()).detach(), on)

    with torch.no_grad():
        model.blocks[0].mlp.up.weight.mul_(1.7)
        model.blocks[2].attn.q.weight[3] *= 0.2
    reference.load_state_dict(exported(model))
    assert not torch.equal(forward(*text()).detach(), reference(*text()).detach()), "scales cannot be fresh yet"
    qat.refresh()
    assert torch.equal(forward(*text()).detach(), reference(*text()).detach())

    qat.set(False)
    reference.load_state_dict(weights_of(model))
    assert torch.equal(forward(*text()).detach(), reference(*text()).detach())


def test_switched_is_undone_at_the_end_of_its_block():
    model = build_model()
    qat = pg.QAT(model, tiny_hp())
    plain = model(*text()).detach()
    qat.refresh()
    qat.set(True)
    on = model(*text()).detach()
    with qat.switched(False):
        assert torch.equal(model(*text()).detach(), plain)
    assert torch.equal(model(*text()).detach(), on)
    with pytest.raises(KeyError), qat.switched(False):
        raise KeyError
    assert torch.equal(model(*text()).detach(), on) and qat.on


def test_exactly_the_int6_matrices_are_covered():
    model = build_model(tiny_hp(tie_embeddings=False))
    covered = {id(layer.weight) for layer in pg.QAT(model, tiny_hp()).layers.values()}
    int6 = {id(p) for name, p in model.named_parameters() if expected_storage(name) == "int6"}
    assert covered == int6 and len(int6) == 6 * 3


@pytest.mark.parametrize("index", range(18))
def test_each_int6_matrix_acts_through_its_grid(index):
    model = build_model()
    qat = pg.QAT(model, tiny_hp())
    before = model(*text()).detach()
    qat.refresh()
    qat.set(True)
    for i, layer in enumerate(qat.layers.values()):
        layer.fake_quant = i == index
    assert (model(*text()).detach() - before).abs().max() > 0


def test_the_gradient_passes_straight_through():
    layer = pg.CastedLinear(6, 5)
    x, up = normal(3, 6), normal(3, 5, seed=1)
    with torch.no_grad():
        layer.weight.copy_(heavy_tailed(5, 6))
    layer.row_scale = (
        pg.search_row_scales(layer.weight.detach(), clip_grid(layer.weight.detach())) / 3
    )  # clips much: nothing may be lost there
    layer.fake_quant, layer.q_max = True, 31
    y = layer(x)
    y.backward(up)
    assert torch.equal(y.detach(), F.linear(x, pg.quantize_rows(layer.weight, layer.row_scale, 31) * layer.row_scale))
    torch.testing.assert_close(layer.weight.grad, up.T @ x)


def test_scales_are_no_part_of_the_weights():
    model = build_model()
    qat = pg.QAT(model, tiny_hp())
    qat.refresh()
    qat.set(True)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


# Bits


@pytest.mark.parametrize("bits, storage", [(5, "int5"), (6, "int6"), (7, "int7"), (8, "int8")])
def test_bits_reach_their_class_alone_and_finer_grids_err_less(bits, storage):
    weights = weights_of(build_model(tiny_hp(tie_embeddings=False, gated_attention=True)))
    for setting, classes in dict(attn_bits=["attention"], attn_out_bits=["attention_out"], mlp_bits=["mlp"],
                                 embed_bits=["embedding", "head"], projection_bits=["projection"]).items():  # fmt: skip
        default = quantize(weights, tiny_hp())
        stored = quantize(weights, tiny_hp(**{setting: bits}))
        for name, t in stored.items():
            mine = pg.label_of(name) in classes
            assert t.storage == (storage if mine else default[name].storage)
            if mine:
                assert pg.levels(storage) == 2 ** (bits - 1) - 1 >= int(t.data.abs().max()) > 2 ** (bits - 2) - 1
                relative = (t.dequantize() - weights[name]).norm() / weights[name].norm()
                assert 0.3 / 2**bits < relative < 3 / 2**bits


def test_embeddings_of_sixteen_bits_are_fp16():
    weights = weights_of(build_model())
    stored = quantize(weights, tiny_hp(embed_bits=16))
    tables = {name for name, t in stored.items() if pg.label_of(name) == "embedding"}
    assert tables and all(stored[name].storage == "fp16" for name in tables)
    assert all(torch.equal(stored[name].dequantize(), weights[name].half().float()) for name in tables)


def test_vectors_and_numbers_of_sixteen_bits_are_fp16():
    weights = weights_of(build_model())
    stored, default = quantize(weights, tiny_hp(control_bits=16)), quantize(weights, tiny_hp())
    for name, t in stored.items():
        assert t.storage == ("fp16" if pg.label_of(name) == "control" else default[name].storage)
        if pg.label_of(name) == "control":
            assert torch.equal(t.dequantize(), weights[name].half().float()) and default[name].storage == "fp32"


@pytest.mark.parametrize("bits", [5, 7, 8])
def test_fake_quantization_is_on_the_exported_grid_whatever_its_bits(bits):
    hp = tiny_hp(mlp_bits=bits, attn_out_bits=8)
    model = build_model(hp)
    qat = pg.QAT(model, hp)
    qat.refresh()
    qat.set(True)
    reference = build_model(hp)
    stored = quantize(weights_of(model), hp)
    matrices = {name: t.dequantize() for name, t in stored.items() if pg.row_of(name).storage.reconstructed}
    reference.load_state_dict(weights_of(model) | matrices)
    assert torch.equal(model(*text()), reference(*text()))


# Full GPTQ


def correlated_inputs(n: int, cols: int) -> torch.Tensor:
    """(n, cols) whose columns share a few directions, as activations do."""
    shared = normal(n, 4, seed=1) @ normal(4, cols, seed=2)
    return (shared + 0.3 * normal(n, cols, seed=3)) * torch.linspace(0.2, 3, cols)


def plain_gptq(w: np.ndarray, scale: np.ndarray, hessian: np.ndarray, damping: float) -> np.ndarray:
    """The method by its definition: round a column, then solve for the later ones by the inverse of what is left."""
    h = hessian + damping * np.diag(hessian).mean() * np.eye(len(hessian))
    order = np.argsort(-np.diag(hessian), kind="stable")
    w, codes = w.copy(), np.zeros_like(w)
    for i, j in enumerate(order):
        rest = order[i:]
        inverse = np.linalg.inv(h[np.ix_(rest, rest)])
        codes[:, j] = np.clip(np.round(w[:, j] / scale[:, 0]), -31, 31)
        error = (w[:, j] - codes[:, j] * scale[:, 0]) / inverse[0, 0]
        w[:, rest[1:]] -= np.outer(error, inverse[0, 1:])
    return codes


@pytest.mark.parametrize("block", [1, 5, 24, 128])
def test_codes_are_those_of_the_method_whatever_the_block(block):
    w, x = normal(6, 24), correlated_inputs(200, 24)
    hessian = x.T @ x
    scale = (w.abs().amax(1, keepdim=True) / 31).half().float()
    ours = pg.GPTQ(hessian, tiny_hp(gptq_block_size=block)).codes(w, scale, 31)
    reference = plain_gptq(w.double().numpy(), scale.double().numpy(), hessian.double().numpy(), 0.01)
    assert (ours.numpy() == reference).mean() > 0.98  # a tie may fall either way in fp32
    assert not torch.equal(ours, pg.quantize_rows(w, scale, 31))


def store_by_gptq(w: torch.Tensor, hessian: torch.Tensor) -> pg.Stored:
    """On clip search's grid of six bits."""
    return pg.quantize({INT6: w}, tiny_hp(), {INT6: clip_grid(w)}, {INT6: pg.GPTQ(hessian, tiny_hp())})[INT6]


def test_gptq_loses_less_of_the_outputs_than_rounding_and_more_of_the_weights():
    w, x = normal(16, 96), correlated_inputs(1000, 96)
    hessian = x.T @ x
    rounded, better = store(INT6, w), store_by_gptq(w, hessian)
    lost = [((t.dequantize() - w) @ x.T).square().sum().item() for t in (rounded, better)]
    assert lost[1] < 0.3 * lost[0]
    assert squared_error(better.dequantize(), w).sum() > squared_error(rounded.dequantize(), w).sum()
    measured = pg.output_error(w, better.dequantize(), hessian).sum().item()
    assert measured == pytest.approx(lost[1], rel=1e-3)


def test_gptq_says_beforehand_what_it_leaves_of_the_error_of_rounding():
    x = correlated_inputs(2000, 48)
    gptq, w = pg.GPTQ(x.T @ x, tiny_hp(gptq_percdamp=1e-6)), normal(400, 48, seed=5)
    grid = pg.Grid(torch.full((400, 1), 0.02), 127)
    errors = []
    for scale, codes in (gptq.round(w, grid), pg.round_to_nearest(w, grid)):
        errors.append(pg.output_error(w, codes * scale, gptq.hessian).sum().item())
    assert errors[0] / errors[1] == pytest.approx(gptq.left, rel=0.05) and gptq.left < 0.5
    independent = pg.GPTQ(torch.diag(torch.rand(48) + 0.5), tiny_hp())
    assert independent.left == pytest.approx(1 + tiny_hp().gptq_percdamp)


def test_steps_of_rate_distortion_count_what_gptq_leaves():
    hp = tiny_hp(quant="rd", gptq_enabled=True)
    weights, sensitivity = matrices_of_unlike_sensitivity(hp)
    x = correlated_inputs(2000, weights[INT6].size(1))
    steps = pg.choose_steps(weights, hp, pg.Calibration({}, sensitivity))
    after = pg.Exporter(make_run(hp), weights, pg.Calibration({INT6: x.T @ x}, sensitivity)).steps
    ratio = {name: (after[name] / steps[name]).mean().item() for name in steps}
    others = ratio[INT8]
    assert ratio[INT6] / others == pytest.approx(pg.GPTQ(x.T @ x, hp).left ** -0.5, rel=1e-3) and others < 1


def test_gptq_chooses_among_the_clips_by_the_outputs():
    """An outlier whose input is always nearly zero is worth clipping; one that matters is not."""
    w, x = normal(2, 2000), normal(4000, 2000, seed=1)
    w[:, 0] = 40.0
    steps = []
    for size in (1e-3, 10.0):
        x[:, 0] = size * normal(4000, 1, seed=2)[:, 0]
        steps.append(store_by_gptq(w, x.T @ x).scale)
    assert (steps[0] < 0.5 * steps[1]).all()


def test_inputs_that_never_fire_and_few_samples_are_no_obstacle():
    w, x = normal(4, 16), normal(3, 16, seed=1)
    x[:, 5] = 0
    stored = store_by_gptq(w, x.T @ x)
    assert stored.dequantize().isfinite().all()
    assert (stored.dequantize()[:, 5] - w[:, 5]).abs().max() <= 0.51 * stored.scale.float().max()


@pytest.mark.parametrize("setting, value", [("gptq_percdamp", 5.0), ("gptq_block_size", 1)])
def test_settings_of_gptq_reach_it(setting, value):
    hessian = correlated_inputs(100, 24).T @ correlated_inputs(100, 24)
    a, b = (pg.GPTQ(hessian, hp) for hp in (tiny_hp(), tiny_hp(**{setting: value})))
    assert a.block != b.block if setting.endswith("size") else not torch.equal(a.factor, b.factor)


class Memory:
    """Training text without shards."""

    def __init__(self, tokens: np.ndarray):
        self.tokens = tokens

    def read(self, start: int, count: int) -> np.ndarray:
        return self.tokens[start : start + count]

    def __len__(self) -> int:
        return len(self.tokens)


def test_hessians_are_the_second_moments_of_each_layers_inputs():
    hp = tiny_hp(
        gptq_enabled=True, gptq_calibration_tokens=96, gated_attention=True, num_loops=1, loop_start=1, loop_end=1
    )
    run, model = make_run(hp, Memory(random_tokens(500))), build_model(hp)
    texts = pg.calibration_texts(run)
    assert texts.shape == (6, 17) and (texts[0] == run.stream.tokens[:17]).all()
    assert (texts[-1] == run.stream.tokens[-17:]).all()
    seen: dict[str, list] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, pg.CastedLinear):
            layer.register_forward_pre_hook(
                lambda _, x, name=name: seen.setdefault(f"{name}.weight", []).append(x[0].detach().flatten(0, 1))
            )
    with torch.no_grad():
        model.logits(torch.from_numpy(texts[:, :-1].astype(np.int64)))
    hessians = pg.calibrate(run, weights_of(model), texts).hessians
    matrices = {name for name, _ in model.named_parameters() if pg.row_of(name).storage.reconstructed}
    assert set(hessians) == matrices
    for name, hessian in hessians.items():
        x = torch.cat(seen[name])
        assert len(x) == 96 * (2 if name.startswith("blocks.1.") else 1)  # a looped layer counts each pass
        torch.testing.assert_close(hessian, x.T @ x, rtol=1e-4, atol=1e-3)


def test_calibration_keeps_documents_apart_as_training_does():
    """Two documents in a row give the Hessians of both, whichever comes first."""
    tokens, swapped = random_tokens(17, document=1000), random_tokens(17)
    tokens[8] = tokens[16] = pg.BOS_ID
    swapped[:8], swapped[8:] = tokens[8:16], np.append(tokens[:8], pg.BOS_ID)
    for masked in (True, False):
        hp = tiny_hp(gptq_enabled=True, gptq_calibration_tokens=32, document_mask=masked)
        weights, run = weights_of(build_model(hp)), make_run(hp, Memory(tokens))
        ours, theirs = (pg.calibrate(run, weights, text[None]).hessians for text in (tokens, swapped))
        off = max((ours[name] - theirs[name]).norm() / ours[name].norm() for name in ours)
        assert off < 1e-4 if masked else off > 1e-2


def test_a_matrix_without_input_is_a_broken_limit():
    hp = tiny_hp(gptq_enabled=True, gptq_calibration_tokens=32)
    weights = weights_of(build_model(hp))
    weights["blocks.1.mlp.up.weight"].zero_()
    run = make_run(hp, Memory(random_tokens(100)))
    with pytest.raises(pg.LimitError, match=r"blocks.1.mlp.down.weight saw no input in calibration"):
        pg.calibrate(run, weights, pg.calibration_texts(run))


def test_every_block_matrix_and_nothing_else_is_quantized_by_gptq():
    hp = tiny_hp(gptq_enabled=True, gptq_calibration_tokens=160)
    weights, run = weights_of(build_model(hp)), make_run(hp, Memory(random_tokens(500)))
    known = pg.calibrate(run, weights, pg.calibration_texts(run))
    rounding = {name: pg.GPTQ(hessian, hp) for name, hessian in known.hessians.items()}
    with_it = pg.quantize(weights, hp, grids(weights, hp), rounding)
    without = quantize(weights, hp)
    changed = {name for name, t in with_it.items() if not torch.equal(t.dequantize(), without[name].dequantize())}
    assert changed == {name for name in weights if pg.row_of(name).storage.reconstructed}


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_quantized_by_gptq_where_asked_with_the_second_moments_of_what_it_reads(tied):
    hp = tiny_hp(gptq_enabled=True, gptq_head_enabled=True, gptq_calibration_tokens=160, tie_embeddings=tied)
    model, run = build_model(hp), make_run(hp, Memory(random_tokens(500)))
    weights, texts = weights_of(model), pg.calibration_texts(run)
    known = pg.calibrate(run, weights, texts)
    name = "tok_emb.weight" if tied else "lm_head.weight"
    with torch.no_grad():
        x = model.trunk(torch.from_numpy(texts[:, :-1].astype(np.int64))).flatten(0, 1)
    torch.testing.assert_close(known.hessians[name], x.T @ x, rtol=1e-4, atol=1e-3)
    rounding = {name: pg.GPTQ(hessian, hp) for name, hessian in known.hessians.items()}
    stored = pg.quantize(weights, hp, grids(weights, hp), rounding)
    plain, w = quantize(weights, hp), weights[name]
    changed = {n for n, t in stored.items() if not torch.equal(t.dequantize(), plain[n].dequantize())}
    assert changed == {n for n in weights if pg.row_of(n).storage.reconstructed} | {name}
    errors = [pg.output_error(w, t[name].dequantize(), known.hessians[name]).sum() for t in (stored, plain)]
    assert errors[0] < 0.9 * errors[1]


# The table of quantizers


def test_every_choice_of_the_settings_has_its_row_and_every_row_is_a_choice():
    fields = {f.name: f for f in dataclasses.fields(pg.Hyperparameters)}
    assert fields["quant"].metadata["choices"] == tuple(pg.QUANTIZERS)
    for name, row in pg.QUANTIZERS.items():
        assert set(row.needs) <= set(pg.Calibration._fields)
        assert not pg.QUANTIZERS[row.qat or name].needs, "QAT has no calibration"


@pytest.mark.parametrize("needs", [(), ("hessians",), ("sensitivity",), ("hessians", "sensitivity")])
@pytest.mark.parametrize("clips", [False, True])
def test_a_new_quantizer_is_one_row_and_one_function(needs, clips, monkeypatch, tmp_path):
    """Calibration, clock, export, fit and QAT follow from the row."""
    seen = []

    def steps(weights: dict, hp: pg.Hyperparameters, known: pg.Calibration) -> dict:
        seen.append({field: set(found) for field, found in known._asdict().items()})
        return {name: w.abs().amax(1, keepdim=True) / 20 for name, w in weights.items()}

    row = pg.Quantizer(steps, clips, needs, qat="clip_search" if needs else "")
    monkeypatch.setitem(pg.QUANTIZERS, "sdclip", row)
    hp = tiny_hp(quant="sdclip", gptq_calibration_tokens=320, fit_to_cap=True, compressor="ans")
    hp = dataclasses.replace(hp, artifact_cap_bytes=9_200)
    run, model = make_run(hp, Memory(random_tokens(500)))._replace(folder=tmp_path), build_model(hp)
    path, blob = pg.export(run, weights_of(model))
    tensors = pg.unpack_artifact(blob)[1]
    assert hp.calibrates == bool(needs) and {field for field, found in seen[0].items() if found} == set(needs)
    assert blob == path.read_bytes() and 0 <= 9_200 - len(blob) <= pg.FIT_WINDOW
    scale = tensors[INT6].scale.float() / steps({INT6: weights_of(model)[INT6]}, hp, pg.Calibration())[INT6]
    assert scale.max() < (1.001 if clips else 1.126) * scale.min(), "the steps of the row, all times one factor"

    qat = pg.QAT(model, hp)
    qat.refresh()
    qat.set(True)
    grid = qat.quantizer.grid(model.blocks[0].attn.q.weight, qat.quantizer.steps(
        {INT6: model.blocks[0].attn.q.weight}, hp, pg.Calibration())[INT6], "int6")  # fmt: skip
    assert (qat.quantizer is row) == (not needs)
    assert torch.equal(qat.layers[INT6].row_scale, pg.search_row_scales(model.blocks[0].attn.q.weight, grid))
    assert qat.layers[INT6].q_max == (31 if clips or needs else 127)


# Steps of sdclip and rate-distortion


def entropy_of(stored: pg.Stored) -> float:
    """Bits a code at the codes' own frequencies."""
    return pg.entropy_bits(np.bincount(stored.data.numpy().ravel().astype(int) + 128)) / stored.data.numel()


@settings(max_examples=300, deadline=None)
@given(scale=st.floats(2.0**-14, 2.0**14, width=32))
def test_short_scales_are_the_next_of_eight_in_an_octave(scale):
    short = pg.short_scale(torch.tensor([scale])).item()
    ladder = sorted(m * 2.0**e for e in range(-14, 15) for m in np.arange(1, 2, 0.125))
    assert short == next(rung for rung in ladder if rung >= scale)


@pytest.mark.parametrize("sigmas, bits", [(12.85, 6), (6.0, 6), (20.0, 8), (12.85, 8)])
def test_sdclip_gives_every_row_the_same_bits_and_clips_nothing(sigmas, bits):
    """A Gaussian of many steps has 2.047 + log2(sigma/step) bits a weight."""
    hp = tiny_hp(quant="sdclip", attn_clip_sigmas=sigmas, attn_bits=bits)
    w = normal(64, 4000) * torch.logspace(-3, 1, 64)[:, None]
    stored = quantize({INT6: w}, hp)[INT6]
    step = stored.scale.float() / w.std(1, correction=0, keepdim=True)
    asked = sigmas / pg.levels(f"int{bits}")
    assert (step >= 0.999 * asked).all() and (step <= 1.126 * asked).all()
    assert ((stored.dequantize() - w).abs() <= 0.5001 * stored.scale.float()).all()
    assert pg.levels(stored.storage) >= int(stored.data.abs().max()) > pg.levels(stored.storage) // 2
    for row, codes in enumerate(stored.data.numpy()):
        found = pg.entropy_bits(np.bincount(codes.astype(int) + 128)) / w.size(1)
        assert found == pytest.approx(2.047 - np.log2(step[row].item()), abs=0.05)


def test_each_class_has_its_own_sigmas():
    weights = weights_of(build_model())
    settings = dict(attn_clip_sigmas=("attention", "attention_out"), mlp_clip_sigmas=("mlp",),
                    embed_clip_sigmas=("embedding",))  # fmt: skip
    plain = quantize(weights, tiny_hp(quant="sdclip"))
    for setting, classes in settings.items():
        coarser = quantize(weights, tiny_hp(quant="sdclip", **{setting: 40.0}))
        for name, t in coarser.items():
            changed = not torch.equal(t.dequantize(), plain[name].dequantize())
            assert changed == (pg.label_of(name) in classes), name


def test_all_tensors_of_a_class_share_one_grid():
    weights = {f"blocks.{i}.mlp.up.weight": normal(4, 4000, seed=i) for i in range(3)}
    assert {t.storage for t in quantize(weights, tiny_hp(quant="sdclip")).values()} == {"int5"}
    weights["blocks.1.mlp.up.weight"][0, 0] = 30.0  # one outlier needs more levels than all others
    stored = quantize(weights, tiny_hp(quant="sdclip"))
    assert {t.storage for t in stored.values()} == {"int8"}
    assert abs(stored["blocks.1.mlp.up.weight"].dequantize()[0, 0] - 30.0) < 0.25


def matrices_of_unlike_sensitivity(hp: pg.Hyperparameters) -> tuple[dict, dict]:
    """Weights of about one size, of which some matrices and rows count up to a million times as much as others."""
    generator = torch.Generator().manual_seed(3)
    weights, sensitivity = {}, {}
    for i, (name, w) in enumerate(weights_of(build_model(hp)).items()):
        weights[name] = w
        if w.ndim == 2:
            weights[name] = torch.randn(96, 80, generator=generator)
            sensitivity[name] = 10.0 ** (i % 4 + 2 * torch.rand(96, 1, generator=generator))
    return weights, sensitivity


def test_rate_distortion_loses_less_at_the_same_bits():
    lost, bits, hp = {}, {}, tiny_hp()
    weights, sensitivity = matrices_of_unlike_sensitivity(hp)
    for quant in ("sdclip", "rd"):
        hp = tiny_hp(quant=quant, embed_clip_sigmas=12.85, embed_bits=6)
        stored = pg.quantize(weights, hp, grids(weights, hp, sensitivity=sensitivity))
        coded = {n: t for n, t in stored.items() if n in sensitivity and t.scale is not None}
        bits[quant] = sum(entropy_of(t) * t.data.numel() for t in coded.values())
        errors = (sensitivity[n] * (t.dequantize() - weights[n]).square() for n, t in coded.items())
        lost[quant] = sum(e.sum().item() for e in errors)
    assert bits["rd"] == pytest.approx(bits["sdclip"], rel=0.06)
    assert lost["rd"] < 0.5 * lost["sdclip"]


def test_steps_of_rate_distortion_do_not_depend_on_the_size_of_weights():
    hp = tiny_hp(quant="rd")
    weights, sensitivity = matrices_of_unlike_sensitivity(hp)
    steps = pg.choose_steps(weights, hp, pg.Calibration({}, sensitivity))
    products = []
    for name, step in steps.items():
        products.append(step.square() * (sensitivity[name] + 0.5 * sensitivity[name].mean()))
    products = torch.cat(products)
    torch.testing.assert_close(products, products[:1].expand_as(products), rtol=1e-4, atol=0)
    louder = {n: 4.0 * w if n == INT6 else w for n, w in weights.items()}
    shift = [
        (b / a).log()
        for a, b in zip(
            steps.values(), pg.choose_steps(louder, hp, pg.Calibration({}, sensitivity)).values(), strict=True
        )
    ]
    shift = torch.cat(shift)
    torch.testing.assert_close(shift, shift[:1].expand_as(shift), rtol=1e-3, atol=1e-5)


def test_a_weight_without_any_gradient_and_rows_of_zeros_are_no_obstacle():
    hp = tiny_hp(quant="rd")
    weights, sensitivity = matrices_of_unlike_sensitivity(hp)
    sensitivity[INT6] = torch.zeros_like(sensitivity[INT6])
    weights["blocks.0.mlp.up.weight"].zero_()
    stored = pg.quantize(weights, hp, grids(weights, hp, sensitivity=sensitivity))
    assert all(t.dequantize().isfinite().all() for t in stored.values())
    assert not stored["blocks.0.mlp.up.weight"].dequantize().any()
    assert entropy_of(stored[INT6]) < entropy_of(stored["blocks.0.attn.k.weight"])


def test_sensitivity_is_the_mean_square_of_gradients_of_a_few_sequences():
    hp = tiny_hp(quant="rd", gptq_calibration_tokens=16 * 300)
    run, model = make_run(hp, Memory(random_tokens(6000))), build_model(hp)
    calibration = pg.calibrate(run, weights_of(model), pg.calibration_texts(run))
    assert not calibration.hessians and pg.calibration_rows(run) == 2048 // 16
    texts = torch.from_numpy(pg.calibration_texts(run).astype(np.int64))
    wanted = {n: torch.zeros(len(p), 1) for n, p in model.named_parameters() if p.ndim == 2}
    for part in texts.split(128):
        gradients = torch.autograd.grad(model(part[:, :-1], part[:, 1:]).mean(), list(model.parameters()))
        for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
            if name in wanted:
                wanted[name] += gradient.square().mean(1, keepdim=True)
    assert set(calibration.sensitivity) == set(grids(weights_of(model), tiny_hp())) <= set(wanted)
    for name, square in calibration.sensitivity.items():
        torch.testing.assert_close(square, wanted[name], rtol=1e-4, atol=1e-12)


def test_fake_quantization_under_rate_distortion_is_on_the_grid_of_sdclip():
    scales = []
    for quant in ("sdclip", "rd", "clip_search"):
        model = build_model()
        qat = pg.QAT(model, tiny_hp(quant=quant))
        qat.refresh()
        qat.set(True)
        scales.append(torch.cat([layer.row_scale for layer in qat.layers.values()]))
    assert torch.equal(scales[0], scales[1]) and not torch.equal(scales[0], scales[2])
