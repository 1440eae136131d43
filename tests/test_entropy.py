"""The entropy coder: exact everywhere, near or below the entropy of its codes, and no harm in damaged files."""

import base64
import random
import struct
import time

import numpy as np
import pytest
import torch
from helpers import build_model, quantize, tiny_hp, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_artifact import SMALL, assert_well_formed, header_of, make_blob, payload_of, read, reseal, same, seal

import train_gpt as pg
from records import code_bytes

pytestmark = pytest.mark.usefixtures("warm_reader")
UP, DOWN, TOKENS = "blocks.0.mlp.up.weight", "blocks.0.mlp.down.weight", "tok_emb.weight"


def stored(codes: np.ndarray, storage: str = "int6") -> pg.Stored:
    scale = torch.ones(len(codes), 1, dtype=torch.float16)
    return pg.Stored(storage, torch.from_numpy(np.ascontiguousarray(codes.astype(np.int8))), scale)


def coded(tensors: dict[str, pg.Stored]) -> tuple[bytes, bytes, dict[str, np.ndarray]]:
    """(models, words, what a decoder makes of them)."""
    models, words = pg.encode_codes(tensors)
    table = [[name, list(t.data.shape), t.storage] for name, t in tensors.items()]
    return models, words, pg.decode_codes(table, memoryview(models), words)


def student(rows: int, cols: int, seed: int = 0, q_max: int = 31, step: float = 12.85 / 31) -> np.ndarray:
    """Heavy-tailed codes as a trained matrix has them."""
    x = np.random.default_rng(seed).standard_t(8, (rows, cols)) / step / 1.1547
    return np.clip(np.round(x), -q_max, q_max)


def entropy(codes: np.ndarray) -> float:
    """Bits of all codes at their own frequencies."""
    _, counts = np.unique(codes, return_counts=True)
    return float(-(counts * np.log2(counts / counts.sum())).sum())


SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=60, deadline=None)
@given(SHAPES, SHAPES, st.sampled_from(["int5", "int6", "int7", "int8"]), st.integers(0, 2**31), st.integers(0, 3))
def test_any_codes_come_back(a, b, storage, seed, spread):
    rng, q_max = np.random.default_rng(seed), pg.levels(storage)
    limit = (0, 1, q_max // 2, q_max)[spread]
    tensors = {
        UP: stored(rng.integers(-limit, limit + 1, a), storage),
        DOWN: stored(rng.integers(-limit, limit + 1, b), storage),
    }
    tensors[TOKENS] = stored(rng.integers(-127, 128, (7, 5)), "int8")
    codes = coded(tensors)[2]
    assert all(np.array_equal(codes[name], t.data.numpy()) for name, t in tensors.items())


@pytest.mark.parametrize("q_max, storage", [(31, "int6"), (127, "int8")])
def test_even_rows_cost_their_entropy(q_max, storage):
    """Within 0.2 % with tables where rows and columns are alike: 300,000 weights are few for a file."""
    codes = student(512, 600, q_max=q_max, step=12.85 / 127 * (127 / q_max))
    models, words, _ = coded({UP: stored(codes, storage)})
    assert 8 * (len(words) + len(pg.compress(models, "lzma"))) < 1.002 * entropy(codes)


def test_uneven_rows_and_columns_cost_less():
    rows, cols = np.geomspace(0.1, 1, 512)[:, None], np.geomspace(0.2, 1, 600)
    codes = np.round(student(512, 600) * rows * cols)
    models, words, _ = coded({UP: stored(codes)})
    assert 8 * (len(words) + len(models)) < 0.93 * entropy(codes)
    shuffled = np.random.default_rng(0).permutation(codes.ravel()).reshape(codes.shape)
    models, words, _ = coded({UP: stored(shuffled)})
    assert 8 * (len(words) + len(models)) == pytest.approx(entropy(codes), rel=0.003)


def test_the_tables_of_one_class_serve_all_its_matrices():
    tensors = {f"blocks.{i}.mlp.up.weight": stored(student(64, 64, i)) for i in range(8)}
    models, _, _ = coded(tensors)
    assert len(models) < 3 + 2 * 20 + 3 * 32 * 3
    other = dict(tensors, **{"blocks.0.attn.q.weight": stored(student(64, 64, 9))})
    assert len(pg.encode_codes(other)[0]) > len(models)


def test_shares_are_whole_numbers_that_no_rounding_moves():
    assert pg.COST_WEIGHTS[0] == 1 << 40 and pg.COST_WEIGHTS[8] == 1 << 39 and (pg.COST_WEIGHTS > 0).all()
    exact = [2 ** (40 - c / 8) % 1 for c in range(256)]
    assert all(abs(x - 0.5) > 1e-4 for x in exact), "a weight near a half could round either way elsewhere"


# What this script wrote once, from codes by integer arithmetic: (1103515245 i + 12345) mod 2^31, shifted.
VECTOR = (
    "rgAAAE4AAAAAAAAAABghFxkY/xr/FyH//xr///8l////////////////////AAAAAAAZ/////xsa////G/8Z//8Z//8Y/xj///8a"
    "////////////////////////////////////////////////////////////////////////////////////////////////////"
    "/////////////////////////////////////wdHdzpa1D3V60mI9h2rvVWw1v1YRZFgWZ1rYwOxNEYQMxYmT/LPWUeepkPl8sH4"
    "m4ayDxqCQoY7tdyKtXYUy9miAMkRP3RoikGI7Ns4spR5mFPrkc28mdTSlhXP6oQ2RiUhyL+p++E6ENrFho2d4PDsGIK7wDBGbGM/"
    "1pDrOwDCMRcrkWPRKce3fx+VEdFw6b4+RNgogsEEt70r1kIrUn9+L+yfE7DQrZQQ6jZZDRVgWLF5MIsz8tMObBS1dXARYY7W+LT4"
    "fI7p0bYHEN18W7bl29J21WGfExv/w5cQlt7P3Ssim7F6LOGDhqZ8CoO/L8EnI9dQHFj6IvpkvkcbdsJYAHuZixW89lAVetlvFKik"
    "T5+DnVKGQFoMjJ5mtsPAx1gfbrkxqKStBCZBmbHioloOr7kPTQAAAA=="
)


def vector_tensors() -> dict[str, pg.Stored]:
    x, values = 1, []
    for _ in range(600):
        x = (1103515245 * x + 12345) % (1 << 31)
        values.append(((x >> 16) % 9 - 4) * (1 + len(values) // 100))
    a = np.array(values[:400]).reshape(20, 20)
    return {UP: stored(np.clip(a, -31, 31)), TOKENS: stored(np.array(values[400:]).reshape(10, 20), "int8")}


def test_what_another_machine_wrote_is_read_and_written_the_same():
    models, words, codes = coded(vector_tensors())
    assert all(np.array_equal(codes[name], t.data.numpy()) for name, t in vector_tensors().items())
    assert base64.b64encode(struct.pack("<I", len(models)) + models + words).decode() == VECTOR


def test_the_file_is_smaller_than_a_general_compressors():
    hp = tiny_hp(model_dim=64)
    sizes = {name: len(make_blob(name, hp)) for name in ("lzma", "zstd", "ans")}
    assert sizes["ans"] < 0.99 * sizes["zstd"] and sizes["ans"] < 0.99 * sizes["lzma"]
    assert make_blob("ans", hp) == make_blob("ans", hp)


def test_a_model_of_full_size_is_coded_in_seconds():
    """A quarter of 36 million weights, so that the test is quick; the limit is a quarter too."""
    tensors = {f"blocks.{i}.mlp.up.weight": stored(student(1536, 512, i)) for i in range(11)}
    start = time.process_time()
    models, words = pg.encode_codes(tensors)
    table = [[name, list(t.data.shape), t.storage] for name, t in tensors.items()]
    pg.decode_codes(table, memoryview(models), words)
    assert time.process_time() - start < 20 / 4


# Damage


def mutated(data: bytes, rng: random.Random, start: int = 0) -> bytes:
    """A few bytes from `start` on changed, dropped or put in."""
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at = rng.randrange(start, len(damaged))
        act = rng.randrange(4)
        if act < 2:
            damaged[at] = rng.randrange(256) if act else damaged[at] ^ (1 << rng.randrange(8))
        elif act == 2:
            del damaged[at : at + rng.choice((1, 2, 4, 64))]
        else:
            damaged[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 4, 64))))
    return bytes(damaged)


def body_of(blob: bytes) -> tuple[bytes, bytes]:
    """(payload, words)"""
    end = 60 + int.from_bytes(blob[56:60], "little")
    return pg.decompress(blob[60:end], "lzma", struct.unpack("<Q", blob[16:24])[0]), blob[end:]


def rebuilt(payload: bytes, words: bytes) -> bytes:
    compressed = pg.compress(payload, "lzma")
    return seal(3, struct.pack("<I", len(compressed)) + compressed + words, len(payload))


def fuzz(count: int, blob: bytes) -> int:
    """How many of `count` forged files were read; each of them, and of as many merely damaged ones, has to be an error
    or well formed. Forgers change the file, or what lies compressed in it."""
    rng, readable = random.Random(0), 0
    whole, (payload, words) = pg.unpack_artifact(blob), body_of(blob)
    for _ in range(count):
        result = read(mutated(blob, rng, 4))
        assert result is None or (result[0] == whole[0] and same(result[1], whole[1]))
    for i in range(count):
        forged = (
            reseal(mutated(blob, rng, 4)),
            rebuilt(mutated(payload, rng), words),
            rebuilt(payload, mutated(words, rng)),
        )[i % 3]
        if (result := read(forged)) is not None:
            readable += 1
            assert_well_formed(*result)
    return readable


def test_mutations_are_errors_or_well_formed():
    assert fuzz(600, make_blob("ans")) > 5


@pytest.mark.slow
def test_ten_thousand_mutations_are_errors_or_well_formed():
    assert fuzz(10_000, make_blob("ans")) > 100


def test_words_that_are_missing_left_over_or_others_are_no_whole_artifact():
    payload, words = body_of(make_blob("ans"))
    assert read(rebuilt(payload, words)) is not None
    for other in (words[:-4], words[4:], words + b"\1\0\0\0", words + bytes(4), b"", bytes(4), words[:-1], 2 * words):
        assert read(rebuilt(payload, other)) is None
    swapped = words[4:8] + words[:4] + words[8:]
    assert (result := read(rebuilt(payload, swapped))) is None or assert_well_formed(*result) is None


def test_tables_that_are_short_or_lack_a_context_are_no_whole_artifact():
    hp = tiny_hp(**SMALL)
    tensors = quantize(weights_of(build_model(hp)), hp)
    models, _ = pg.encode_codes(tensors)
    payload, words = body_of(pg.pack_artifact(header_of(hp), tensors, "ans"))
    assert payload.endswith(models)
    head = payload[: -len(models)]
    for other in (models[:-1], models + b"\0", b"", models[1:], models[:4], models[:4] + b"\xff" + models[5:]):
        assert read(rebuilt(head + other, words)) is None


def test_a_few_bytes_cannot_ask_for_many_codes():
    table = [[TOKENS, [65536, 16384], "int8"]]
    with pytest.raises(pg.ArtifactError, match="1073741824 codes are more than its words can hold"):
        pg.decode_codes(table, memoryview(bytes(500)), bytes(500))
    zeros = {UP: stored(np.zeros((64, 700)))}  # what costs nothing may still be large
    assert not coded(zeros)[2][UP].any()


def test_a_missing_coder_is_an_error_and_never_another_compressor(monkeypatch):
    import sys

    blob = make_blob("ans")
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(pg.UserError, match="COMPRESSOR=ans needs `pip install constriction`"):
        pg.load_compressor("ans")
    with pytest.raises(pg.UserError, match="needs `pip install constriction`"):
        pg.unpack_artifact(blob)


def test_other_compressors_hold_the_codes_in_their_payload():
    assert len(payload_of(make_blob("lzma"))) > len(body_of(make_blob("ans"))[0])


# The comparison with general compressors


def test_code_bytes_counts_what_the_file_holds(tmp_path, monkeypatch, capsys):
    hp = tiny_hp(model_dim=64, compressor="ans", quant="sdclip")
    tensors = quantize(weights_of(build_model(hp)), hp)
    artifact = tmp_path / "artifact.pgolf"
    artifact.write_bytes(pg.pack_artifact(header_of(hp), tensors, "ans"))
    monkeypatch.setattr("sys.argv", ["code_bytes.py", str(artifact)])
    assert code_bytes.main() == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    head, _, *classes, whole, beside = rows
    assert head[:5] == ["codes", "weights", "entropy", "ans", "lzma-9e"] and "zstd-22" in head
    codes = {name: t.data.numpy() for name, t in tensors.items() if t.scale is not None}
    assert int(whole[1].replace(",", "")) == sum(c.size for c in codes.values())
    bits = sum(map(entropy, codes.values())) / sum(c.size for c in codes.values())
    assert float(whole[2]) == pytest.approx(bits, abs=1e-3)
    assert {row[0].split()[0] for row in classes} == {pg.label_of(name) for name in codes}
    assert beside[0] == "beside their entropy" and all(cell.endswith(" %") for cell in beside[3:])
    monkeypatch.setattr("sys.argv", ["code_bytes.py", "--synthetic", "1"])
    assert code_bytes.main() == 0
    out = capsys.readouterr().out
    assert out.startswith("encoded in ") and "mlp int6 | 786,432" in out
    monkeypatch.setattr("sys.argv", ["code_bytes.py", "nowhere"])
    assert code_bytes.main() == 2 and "error: cannot read nowhere" in capsys.readouterr().err
