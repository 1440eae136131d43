"""Trellis-coded quantization: the best walk, its decoder on every machine, its place in the file, its worth."""

import itertools

import numpy as np
import pytest
import torch
from helpers import build_model, make_run, tiny_hp, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_artifact import SMALL, assert_well_formed, edited, header_of, read, same
from test_entropy import fuzz, student
from test_fit import SMALL as LARGER
from test_fit import trained_like

import train_gpt as pg

UP, DOWN, TOKENS = "blocks.0.mlp.up.weight", "blocks.0.mlp.down.weight", "tok_emb.weight"
TRELLIS = dict(trellis_enabled=True, quant="sdclip", compressor="ans")


def walked(codes: np.ndarray, columns: np.ndarray, storage: str = "tcq6") -> pg.Stored:
    scale = torch.ones(len(codes), 1, dtype=torch.float16)
    data = torch.from_numpy(np.ascontiguousarray(codes.astype(np.int8)))
    return pg.Stored(storage, data, scale, torch.from_numpy(columns.astype(np.int8)))


def rounded(w: torch.Tensor, step: float, q_max: int = pg.Q_LIMIT, rounder=None) -> pg.Stored:
    """w (rows, cols) in a trellis; of a GPTQ, w as its columns' scales leave it."""
    grid, rounder = pg.Grid(torch.full((len(w), 1), step), q_max), rounder or pg.Trellis(w.size(1))
    codes = pg.walk_trellises({UP: w / pg.column_scales(rounder.columns)}, {UP: grid}, {UP: rounder})[UP]
    return pg.Stored("tcq8", codes.to(torch.int8), grid.scales.half(), rounder.columns)


def conditional_bits(stored: pg.Stored) -> float:
    """Entropy of a code whose state is known."""
    codes, odd = stored.data.numpy(), pg.odd_states(stored.data.numpy(), stored.columns.numpy())
    counts = (np.bincount(codes[odd == which].astype(int) + 128) for which in (False, True))
    return sum(map(pg.entropy_bits, counts)) / codes.size


# The walk


def test_two_ways_lead_into_every_state_and_every_state_has_both_kinds_of_code():
    assert sorted(pg.NEXT_STATE.ravel()) == sorted([*range(8)] * 2)
    for state, ways in enumerate(pg.WAYS):
        assert all(pg.NEXT_STATE[way % 8, way // 8] == state for way in ways)
    reached = {int(pg.NEXT_STATE[state, parity]) & 1 for state in (0, 1) for parity in (0, 1)}
    assert reached == {0, 1}


def test_states_follow_the_parities_of_the_codes_before_in_the_columns_order():
    rng = np.random.default_rng(0)
    codes, columns = rng.integers(-9, 10, (5, 7)).astype(np.int8), rng.integers(-3, 4, 7).astype(np.int8)
    odd = pg.odd_states(codes, columns)
    for row in range(5):
        state = 0
        for column in sorted(range(7), key=lambda c: (columns[c], c)):
            assert odd[row, column] == state % 2
            state = int(pg.NEXT_STATE[state, abs(int(codes[row, column])) % 2])


def test_a_code_of_an_odd_state_stands_for_half_a_step_less():
    stored = walked(np.array([[1, 2, -3, 0], [2, 1, 1, 1]]), np.array([0, 4, 4, -8]))  # the last column goes first
    odd = pg.odd_states(stored.data.numpy(), stored.columns.numpy())
    codes = stored.data.numpy()
    values = (codes - 0.5 * np.sign(codes) * odd) * np.array([1, 2, 2, 0.25])
    assert np.array_equal(stored.dequantize().numpy(), values.astype(np.float32)) and odd.any() and not odd.all()


def test_columns_scales_are_quarters_of_an_octave_and_doubling_is_exact():
    scales = pg.column_scales(torch.arange(-128, 128).to(torch.int8))
    assert torch.equal(scales[4:], 2 * scales[:-4]) and scales[128] == 1 and (scales.diff() > 0).all()
    assert scales[129].item() == np.float32(2**0.25)


@pytest.mark.parametrize("step", [0.3, 0.7, 1.5])
def test_no_walk_is_better_than_the_one_that_is_found(step):
    """Every sequence of codes of a row, tried."""
    w, q_max = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), 3
    w[0, 1], w[1] = 0.0, 0.0
    found = rounded(w, step, q_max)
    every = np.array([*itertools.product(range(-q_max, q_max + 1), repeat=4)])
    points = walked(every, np.zeros(4)).dequantize() * found.scale[0].float()
    least = (w[:, None] - points).square().sum(2).min(1).values
    assert torch.allclose((w - found.dequantize()).square().sum(1), least, rtol=1e-4, atol=1e-6)
    assert int(found.data.abs().max()) <= q_max and not found.data[1].any()


def test_at_equal_entropy_a_sixth_less_error_than_rounding():
    w, ratios = torch.randn(400, 250, generator=torch.Generator().manual_seed(1)), []
    points = []
    for step in 2.0 ** torch.arange(-2.0, 1.0, 0.125):
        codes = (w / step).round()
        bits = pg.entropy_bits(np.bincount(codes.flatten().long().numpy() + 128)) / w.numel()
        points.append((bits, (w - codes * step).square().mean().log().item()))
    for step in (0.5, 0.7, 0.9):
        stored = rounded(w, step)
        plain = np.interp(conditional_bits(stored), *zip(*sorted(points), strict=True))
        ratios.append((w - stored.dequantize()).square().mean().item() / np.exp(plain))
    assert all(0.79 < ratio < 0.86 for ratio in ratios), ratios


# With a Hessian


def inputs(cols: int, seed: int = 0) -> torch.Tensor:
    """Of columns of unlike size that say something about each other."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.eye(cols) + torch.randn(cols, cols, generator=generator) / (2 * cols**0.5)
    return torch.randn(2000, cols, generator=generator) @ mixed * 2.0 ** (3 * torch.rand(cols, generator=generator))


@pytest.mark.parametrize("block", [1, 5, 128])
def test_gptq_in_a_trellis_saves_a_fifth_of_a_bit(block, monkeypatch):
    monkeypatch.setattr(pg, "TRELLIS_BLOCK", block)
    x, w = inputs(40), torch.randn(1500, 40, generator=torch.Generator().manual_seed(3))
    scale, codes = pg.GPTQ(x.T @ x, tiny_hp()).round(w, pg.Grid(torch.full((1500, 1), 0.6), pg.Q_LIMIT))
    plain = pg.Stored("int8", codes.to(torch.int8), scale.half())
    errors, bits = [], []
    for stored in (plain, rounded(w, 0.6, rounder=pg.GPTQ(x.T @ x, tiny_hp(**TRELLIS)))):
        errors.append(pg.output_error(w, stored.dequantize(), x.T @ x).sum().item())
        bits.append(8 * len(pg.encode_codes({UP: stored})[1]) / w.numel())  # the coder sees columns' sizes
    saved = 0.5 * np.log2(errors[0] / errors[1]) - (bits[1] - bits[0])
    assert saved > 0.2, (errors, bits)


def entropy_of(stored: pg.Stored) -> float:
    return 8 * stored.size() / stored.data.numel()


def test_blocks_change_nothing_but_rounding(monkeypatch):
    x, w, found = inputs(40), torch.randn(50, 40, generator=torch.Generator().manual_seed(3)), []
    for block in (1, 40):
        monkeypatch.setattr(pg, "TRELLIS_BLOCK", block)
        found.append(rounded(w, 0.5, rounder=pg.GPTQ(x.T @ x, tiny_hp(**TRELLIS))).data)
    assert (found[0] == found[1]).float().mean() > 0.99


@pytest.mark.parametrize("free", [False, True])
def test_matrices_that_walk_side_by_side_keep_apart(free):
    """Of one shape and grid with others, of another shape, of another grid: the codes of each alone."""
    names, rounding, weights, grids = "abcde", {}, {}, {}
    for i, name in enumerate(names):
        x, rows = inputs(20, seed=i), 9 if i < 4 else 4
        rounding[name] = pg.Trellis(20) if free else pg.GPTQ(x.T @ x, tiny_hp(**TRELLIS))
        weights[name] = torch.randn(rows, 20, generator=torch.Generator().manual_seed(i))
        grids[name] = pg.Grid(torch.full((rows, 1), 0.1 * (i + 1)), 40 if i == 3 else 60)
    together = pg.walk_trellises(weights, grids, rounding)
    for name in names:
        alone = pg.walk_trellises(weights, grids, {name: rounding[name]})[name]
        assert alone.any() and (together[name] == alone).float().mean() > 0.99
    assert not torch.equal(together["a"], together["b"])


def test_an_error_of_any_column_costs_the_outputs_about_as_much():
    x = inputs(64)
    gptq = pg.GPTQ(x.T @ x, tiny_hp(**TRELLIS))
    costs = gptq.factor.diagonal().square().reciprocal()
    plain = pg.GPTQ(x.T @ x, tiny_hp()).factor.diagonal().square().reciprocal()
    assert costs.log2().std() < 0.5 * plain.log2().std()
    assert torch.equal(gptq.order, gptq.columns.argsort(stable=True)) and abs(gptq.columns.float().mean()) < 1
    assert gptq.left < pg.GPTQ(x.T @ x, tiny_hp()).left


def test_an_input_that_is_always_zero_has_a_column_all_the_same():
    x = inputs(16)
    x[:, 3] = 0
    gptq = pg.GPTQ(x.T @ x, tiny_hp(**TRELLIS))
    w = torch.randn(9, 16, generator=torch.Generator().manual_seed(3))
    assert rounded(w, 0.5, 127, gptq).dequantize().isfinite().all()


# In the file

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=60, deadline=None)
@given(SHAPES, SHAPES, st.sampled_from(["tcq5", "tcq6", "tcq7", "tcq8"]), st.integers(0, 2**31), st.integers(0, 3))
def test_any_walks_come_back(a, b, storage, seed, spread):
    rng, q_max = np.random.default_rng(seed), pg.levels(storage)
    limit = (0, 1, q_max // 2, q_max)[spread]

    def matrix(shape: tuple[int, int]) -> pg.Stored:
        return walked(rng.integers(-limit, limit + 1, shape), rng.integers(-5, 6, shape[1]), storage)

    tensors = {UP: matrix(a), DOWN: matrix(b), TOKENS: matrix((7, 5))}
    models, words = pg.encode_codes(tensors)
    table = [[name, list(t.data.shape), t.storage] for name, t in tensors.items()]
    columns = {name: t.columns.numpy() for name, t in tensors.items()}
    codes = pg.decode_codes(table, memoryview(models), words, columns)
    assert all(np.array_equal(codes[name], t.data.numpy()) for name, t in tensors.items())


def test_the_coder_knows_the_states():
    w = torch.from_numpy(student(500, 300, step=1.0)).float()
    stored = rounded(w, 1.6)
    _, words = pg.encode_codes({UP: stored})
    assert 8 * len(words) / w.numel() < conditional_bits(stored) + 0.01 < entropy_of(stored)


def blob(compressor: str = "ans") -> bytes:
    hp = tiny_hp(**SMALL | TRELLIS)
    exporter = pg.Exporter(make_run(hp), weights_of(build_model(hp)), pg.Calibration())
    return pg.pack_artifact(header_of(hp), exporter.pack().tensors, compressor)


@pytest.mark.parametrize("compressor", ["stored", "lzma", "ans"])
def test_a_file_of_trellises_comes_back(compressor):
    header, tensors = pg.unpack_artifact(blob(compressor))
    assert_well_formed(header, tensors)
    assert {t.storage[:3] for t in tensors.values() if t.data.dtype == torch.int8} == {"tcq"}
    assert same(tensors, pg.unpack_artifact(pg.pack_artifact({**header, "tensors": None}, tensors, compressor))[1])


def test_a_storage_that_is_renamed_is_no_whole_artifact():
    def rename(header: dict) -> None:
        for row in header["tensors"]:
            row[2] = row[2].replace("tcq", "int")

    assert read(edited(blob("stored"), rename)) is None


def test_mutations_are_errors_or_well_formed():
    assert fuzz(300, blob()) > 0


# In an export


@pytest.mark.parametrize("quant, calibrated", [("sdclip", False), ("rd", False), ("sdclip", True)])
def test_an_export_ends_below_the_cap_and_nearer_to_the_weights(quant, calibrated):
    found = {}
    for trellis in (False, True):
        hp = tiny_hp(**LARGER | dict(quant=quant, trellis_enabled=trellis, gptq_enabled=calibrated))
        weights, sensitivity = trained_like(hp, 1)
        sensitivity = {name: found**0.25 for name, found in sensitivity.items()}  # few rows that cost next to nothing
        blocks = [name for name in weights if calibrated and pg.row_of(name).storage.reconstructed]
        hessians = {name: (x := inputs(weights[name].size(1))).T @ x for name in blocks}
        exporter = pg.Exporter(make_run(hp), weights, pg.Calibration(hessians, sensitivity))
        packed = exporter.fit(110_000)
        exporter.report(packed)
        assert 0 <= 110_000 - len(packed.blob) <= pg.FIT_WINDOW
        errors = []
        for name, t in pg.unpack_artifact(packed.blob)[1].items():
            if t.scale is not None and (name in hessians) == calibrated:
                hessian = hessians.get(name, torch.eye(t.data.size(1)))
                weight = sensitivity.get(name, torch.ones(1))  # of each row's error
                errors.append((weight * pg.output_error(weights[name], t.dequantize(), hessian)).sum().item())
        found[trellis] = sum(errors)
    assert found[True] < (0.8 if calibrated else 0.9) * found[False], found


@pytest.mark.parametrize("other", [dict(quant="clip_search"), dict(compressor="lzma")])
def test_what_a_trellis_needs_is_said(other):
    with pytest.raises(pg.UserError, match="TRELLIS_ENABLED=1 needs COMPRESSOR=ans and QUANT=rd or sdclip, not "):
        tiny_hp(**TRELLIS | other)
