"""The artifact: exact round trips, and nothing but ArtifactError for any other bytes."""

import ast
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import random
import re
import struct
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import build_model, quantize, tiny_hp, weights_of

import train_gpt as pg

SMALL = dict(
    vocab_size=12,
    num_layers=2,
    model_dim=8,
    num_heads=2,
    num_kv_heads=1,
    mlp_mult=1.0,
    bigram_vocab_size=5,
    bigram_dim=2,
    ve_dim=2,
    ve_layers="1",
)
pytestmark = pytest.mark.usefixtures("warm_reader")
COMPRESSORS = ("stored", "lzma", "zstd")  # of a whole payload
ALL = (*COMPRESSORS, "ans")
DTYPES = dict(fp16=torch.float16, fp32=torch.float32)  # all others hold int8 codes


def header_of(hp: pg.Hyperparameters, kind: str = "artifact") -> dict:
    return pg.artifact_header(kind, hp, torch.float32, pg.Validation(None, None, "", None, "ab" * 32))


def make_blob(compressor: str = "stored", hp: pg.Hyperparameters | None = None) -> bytes:
    hp = hp or tiny_hp(**SMALL)
    return pg.pack_artifact(header_of(hp), quantize(weights_of(build_model(hp)), hp), compressor)


def seal(compressor: int, body: bytes, payload_bytes: int) -> bytes:
    """A file around this body whose length and checksum are right."""
    prefix = struct.pack("<5sBBBQQ", b"PGOLF", pg.FORMAT_VERSION, compressor, 0, len(body), payload_bytes % 2**64)
    return prefix + hashlib.sha256(prefix + body).digest() + body


def reseal(blob: bytes) -> bytes:
    """The same bytes with the body's length and the checksum made right, as a forger would."""
    blob = blob.ljust(56, b"\0")
    prefix = blob[:8] + struct.pack("<Q", len(blob) - 56) + blob[16:24]
    return prefix + hashlib.sha256(prefix + blob[56:]).digest() + blob[56:]


def payload_of(blob: bytes) -> bytes:
    return pg.decompress(blob[56:], pg.COMPRESSORS[blob[6]], struct.unpack("<Q", blob[16:24])[0])


def with_payload(blob: bytes, payload: bytes) -> bytes:
    return seal(blob[6], pg.compress(payload, pg.COMPRESSORS[blob[6]]), len(payload))


def split_payload(blob: bytes) -> tuple[bytes, bytes]:
    """(header, streams)"""
    payload = payload_of(blob)
    end = 4 + int.from_bytes(payload[:4], "little")
    return payload[4:end], payload[end:]


def with_header(blob: bytes, header: bytes) -> bytes:
    return with_payload(blob, struct.pack("<I", len(header)) + header + split_payload(blob)[1])


def edited(blob: bytes, edit) -> bytes:
    """The artifact with a changed header: edit works on the parsed one in place."""
    header = json.loads(split_payload(blob)[0])
    edit(header)
    return with_header(blob, json.dumps(header).encode())


def same(a: dict[str, pg.Stored], b: dict[str, pg.Stored]) -> bool:
    def raw(stored: pg.Stored):
        scale = None if stored.scale is None else stored.scale.numpy().tobytes()
        columns = None if stored.columns is None else stored.columns.numpy().tobytes()
        return stored.storage, stored.data.dtype, stored.data.shape, stored.data.numpy().tobytes(), scale, columns

    return list(a) == list(b) and all(raw(a[name]) == raw(b[name]) for name in a)


def assert_well_formed(header: dict, tensors: dict[str, pg.Stored]) -> None:
    """What a reader may rely on: the tensors of the header's own architecture, finite and within their storage."""
    hp = pg.Hyperparameters(**header["architecture"], **header["evaluation"])
    model = pg.GPT(hp, 2, pg.sdpa, torch.float32)
    assert [[name, list(t.data.shape), t.storage] for name, t in tensors.items()] == header["tensors"]
    assert {name: t.data.shape for name, t in tensors.items()} == {n: p.shape for n, p in model.named_parameters()}
    for name, t in tensors.items():
        assert t.storage in (pg.row_of(name).storage.forms if header["kind"] == "artifact" else ("fp32",))
        assert t.data.dtype == DTYPES.get(t.storage, torch.int8) and t.dequantize().isfinite().all()
        if t.scale is not None:
            assert t.scale.shape == (t.data.size(0), 1) and t.scale.dtype == torch.float16
            assert int(t.data.abs().max()) <= {"5": 15, "6": 31, "7": 63, "8": 127}[t.storage[-1]]
            assert (t.columns is not None) == t.storage.startswith("tcq")
    model.load_state_dict({name: t.dequantize() for name, t in tensors.items()})


def read(blob: bytes, seconds: float = 1.0):
    """unpack_artifact's answer, or None for an ArtifactError; any other exception, or a slow answer, fails the test."""
    start = time.process_time()
    try:
        return pg.unpack_artifact(blob)
    except pg.ArtifactError as error:
        assert str(error) and "\n" not in str(error)
        return None
    finally:
        assert time.process_time() - start < seconds, "a reader must not hang"


@contextlib.contextmanager
def little_memory(limit: int):
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit, f"{peak} bytes were allocated on a header's word"


# Round trips


@pytest.mark.parametrize("compressor", ALL)
@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        SMALL,
        dict(tie_embeddings=False, ve_enabled=False, bigram_vocab_size=0),
        dict(attn_bits=5, attn_out_bits=8, mlp_bits=7, embed_bits=16),
        dict(value_residual=True, gated_attention=True, mlp_kind="swiglu", num_loops=2, loop_start=1, loop_end=1),
    ],
)
def test_round_trip_is_exact(compressor, changes):
    hp = tiny_hp(**changes)
    tensors = quantize(weights_of(build_model(hp)), hp)
    blob = pg.pack_artifact(header_of(hp), tensors, compressor)
    header, back = pg.unpack_artifact(blob)
    assert same(tensors, back)
    table = [[name, list(t.data.shape), t.storage] for name, t in tensors.items()]
    assert header == header_of(hp) | {"tensors": table}
    assert_well_formed(header, back)


@pytest.mark.parametrize(
    "name, storage",
    [("blocks.0.attn_scale", "int8"), ("bigram.proj.weight", "fp32"), ("blocks.0.mlp.up.weight", "fp16"),
     ("tok_emb.weight", "fp32"), ("blocks.0.attn.gate.proj.weight", "int6"), ("tok_emb.weight", "int9")],
)  # fmt: skip
def test_a_storage_that_its_class_never_has_is_refused(name, storage):
    hp = tiny_hp(**SMALL, gated_attention=True)
    blob = make_blob("stored", hp)
    length = int.from_bytes(payload_of(blob)[:4], "little")
    header = json.loads(payload_of(blob)[4 : 4 + length])
    (row,) = [row for row in header["tensors"] if row[0] == name]
    row[2] = storage
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    payload = struct.pack("<I", len(text)) + text + payload_of(blob)[4 + length :]
    with pytest.raises(pg.ArtifactError, match=f"{name} is stored as '{storage}'"):
        pg.unpack_artifact(seal(0, payload, len(payload)))


def test_float_weights_round_trip_exactly():
    hp = tiny_hp(**SMALL)
    tensors = {name: pg.Stored("fp32", w, None) for name, w in weights_of(build_model(hp)).items()}
    header, back = pg.unpack_artifact(pg.pack_artifact(header_of(hp, "weights"), tensors, "stored"))
    assert header["kind"] == "weights" and same(tensors, back)
    assert_well_formed(header, back)


def test_extreme_values_round_trip_exactly():
    hp = tiny_hp(**SMALL)
    tensors = quantize(weights_of(build_model(hp)), hp)
    for t in tensors.values():
        t.data.flatten()[0] = {"int6": -31, "int8": -127, "fp16": 6e-8, "fp32": 1e-45}[t.storage]
        t.data.flatten()[-1] = {"int6": 31, "int8": 127, "fp16": -65504.0, "fp32": -3e38}[t.storage]
        if t.scale is not None:
            t.scale[0], t.scale[-1] = 6e-8, 65504.0
            t.scale[1] = 0.0
    assert same(pg.unpack_artifact(pg.pack_artifact(header_of(hp), tensors, "lzma"))[1], tensors)


def test_the_bytes_are_a_function_of_the_model_alone():
    hp = tiny_hp(**SMALL)
    elsewhere = dataclasses.replace(hp, run_id="other", out_dir="/elsewhere", data_path="x", tokenizer_path="y", seed=7)
    assert header_of(hp) == header_of(elsewhere)
    first = make_blob("lzma", hp)
    assert first == make_blob("lzma", hp) == make_blob("lzma", elsewhere)
    text = split_payload(make_blob("stored", elsewhere))[0]
    assert not any(word in text for word in (b"elsewhere", b"run_id", b"out_dir", b"path", b"seed", b'time"'))
    assert set(json.loads(text)) == {"kind", "architecture", "evaluation", "tokenizer_sha256", "tensors"}


@pytest.mark.parametrize("compressor", ["lzma", "zstd"])
def test_compression_helps_ordinary_weights(compressor):
    hp = tiny_hp(model_dim=64)
    assert len(make_blob(compressor, hp)) < 0.9 * len(make_blob("stored", hp))


# Damage


@pytest.mark.parametrize("compressor", ALL)
def test_every_truncation_is_an_artifact_error(compressor):
    blob = make_blob(compressor)
    for length in range(len(blob)):
        assert read(blob[:length]) is None, f"read {length} of {len(blob)} bytes"
    assert read(blob + b"\0") is None


@pytest.mark.parametrize("compressor", ALL)
def test_random_bit_flips_are_artifact_errors_or_harmless(compressor):
    blob, rng = make_blob(compressor), random.Random(0)
    whole = pg.unpack_artifact(blob)
    for _ in range(1000):
        damaged = bytearray(blob)
        damaged[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
        result = read(bytes(damaged))
        assert result is None or (result[0] == whole[0] and same(result[1], whole[1]))
    for position in range(56):
        damaged = bytearray(blob)
        damaged[position] ^= 1 << rng.randrange(8)
        assert read(bytes(damaged)) is None, f"byte {position} is not covered by any check"


@pytest.mark.parametrize("compressor", ALL)
def test_resealed_truncations_are_errors_or_well_formed(compressor):
    blob = make_blob(compressor)
    for length in {*range(0, 140), *range(140, len(blob), max(1, len(blob) // 150))}:
        if (result := read(reseal(blob[:length]))) is not None:
            assert_well_formed(*result)


@pytest.mark.parametrize("compressor", ALL)
def test_resealed_bit_flips_are_errors_or_well_formed(compressor):
    blob, rng, readable = make_blob(compressor), random.Random(1), 0
    spots = [rng.randrange(8, len(blob)) for _ in range(900)] + [rng.randrange(4, 24) for _ in range(100)]
    for spot in spots:
        damaged = bytearray(blob)
        damaged[spot] ^= 1 << rng.randrange(8)
        if (result := read(reseal(bytes(damaged)))) is not None:
            readable += 1
            if readable % 5 == 1:
                assert_well_formed(*result)
    assert compressor != "stored" or readable > 50, "the forgeries do not get past the checksum"


def test_resealed_random_bytes_are_artifact_errors():
    rng = random.Random(2)
    for compressor in range(3):
        for size in (0, 1, 5, 100, 5000):
            for declared in (0, 4, size, 4 * size + 4, 1 << 30, (1 << 30) + 1, (1 << 64) - 1):
                with little_memory(160 << 20):
                    assert read(seal(compressor, rng.randbytes(size), declared)) is None


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_foreign_files_and_versions_are_artifact_errors(compressor):
    blob = make_blob(compressor)
    for forged in (b"", b"PGOLF", b"PK\3\4" + blob, blob[:5] + b"\1" + blob[6:], blob[:6] + b"\3" + blob[7:]):
        assert read(forged) is None
        assert read(reseal(forged)) is None or forged == blob


# Forged headers


def set_in(*path_and_value):
    *path, last, value = path_and_value

    def edit(header):
        for key in path:
            header = header[key]
        header[last] = value

    return edit


def delete(*path):
    def edit(header):
        for key in path[:-1]:
            header = header[key]
        del header[path[-1]]

    return edit


def move_scale(header):
    header["tensors"][0][2] = "fp16"


def many_value_layers(header):
    header["architecture"] |= dict(ve_layers=",".join(["1"] * 450_000), num_layers=64)


def duplicate_name(header):
    header["tensors"][1] = list(header["tensors"][0])


def duplicate_row(header):
    header["tensors"].append(list(header["tensors"][0]))


def float_shapes(header):
    header["tensors"][0][1] = [float(x) for x in header["tensors"][0][1]]


def transpose_shape(header):
    row = next(row for row in header["tensors"] if len(set(row[1])) == 2)
    row[1] = row[1][::-1]


FORGERIES = {
    "kind-unknown": set_in("kind", "picture"),
    "kind-number": set_in("kind", 1),
    "kind-weights": set_in("kind", "weights"),
    "no-kind": delete("kind"),
    "extra-field": set_in("extra", 1),
    "architecture-list": set_in("architecture", []),
    "architecture-null": set_in("architecture", None),
    "architecture-missing-one": delete("architecture", "model_dim"),
    "architecture-foreign-setting": set_in("architecture", "seed", 1),
    "architecture-unknown-setting": set_in("architecture", "surprise", 1),
    "architecture-self": set_in("architecture", "self", 1),
    "vocab-huge": set_in("architecture", "vocab_size", 65536),
    "vocab-impossible": set_in("architecture", "vocab_size", 10**300),
    "vocab-negative": set_in("architecture", "vocab_size", -12),
    "vocab-zero": set_in("architecture", "vocab_size", 0),
    "vocab-float": set_in("architecture", "vocab_size", 12.0),
    "vocab-bool": set_in("architecture", "vocab_size", True),
    "vocab-string": set_in("architecture", "vocab_size", "12"),
    "vocab-list": set_in("architecture", "vocab_size", [12]),
    "heads-zero": set_in("architecture", "num_heads", 0),
    "heads-huge": set_in("architecture", "num_heads", 10**4000),
    "dim-huge": set_in("architecture", "model_dim", 16384),
    "layers-huge": set_in("architecture", "num_layers", 10**6),
    "layers-most": set_in("architecture", "num_layers", 128),
    "bigram-huge": set_in("architecture", "bigram_vocab_size", 1 << 24),
    "softcap-nan": set_in("architecture", "logit_softcap", float("nan")),
    "base-infinite": set_in("architecture", "rope_base", float("inf")),
    "mult-huge": set_in("architecture", "mlp_mult", 1e308),
    "ve-layers-long": many_value_layers,
    "ve-layers-odd": set_in("architecture", "ve_layers", "1,²"),
    "context-huge": set_in("architecture", "train_seq_len", 1 << 40),
    "evaluation-null": set_in("evaluation", None),
    "evaluation-unknown": set_in("evaluation", "surprise", 1),
    "evaluation-stride-string": set_in("evaluation", "eval_stride", "4"),
    "evaluation-writes-elsewhere": set_in("evaluation", "out_dir", "/elsewhere"),
    "evaluation-changes-the-cap": set_in("evaluation", "artifact_cap_bytes", 10**9),
    "evaluation-architecture": set_in("evaluation", "model_dim", 8),
    "sha-number": set_in("tokenizer_sha256", 5),
    "tensors-object": set_in("tensors", {}),
    "tensors-empty": set_in("tensors", []),
    "tensors-null-row": set_in("tensors", 0, None),
    "tensors-short-row": set_in("tensors", 0, ["a", [1]]),
    "tensors-missing": delete("tensors", 3),
    "name-number": set_in("tensors", 0, 0, 5),
    "name-list": set_in("tensors", 0, 0, ["x"]),
    "name-unknown": set_in("tensors", 0, 0, "__class__"),
    "shape-negative": set_in("tensors", 0, 1, [-8, -8]),
    "shape-huge": set_in("tensors", 0, 1, [1 << 62, 1 << 62]),
    "shape-float": float_shapes,
    "shape-null": set_in("tensors", 0, 1, None),
    "shape-nested": set_in("tensors", 0, 1, [[8], [8]]),
    "shape-transposed": transpose_shape,
    "storage-fp16": move_scale,
    "storage-null": set_in("tensors", 0, 2, None),
    "storage-list": set_in("tensors", 0, 2, ["int6"]),
    "storage-foreign": set_in("tensors", 0, 2, "object"),
    "duplicate-name": duplicate_name,
    "duplicate-row": duplicate_row,
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_headers_are_artifact_errors(name):
    blob = edited(make_blob("lzma"), FORGERIES[name])
    assert read(blob) is None
    with little_memory(64 << 20):
        assert read(blob, seconds=10) is None  # counting allocations is slow


# What every artifact lists: there is no model without these. Whatever comes after them can be off.
ALWAYS_LISTED = """vocab_size num_layers model_dim num_heads num_kv_heads mlp_mult tie_embeddings rope_base rope_dims
logit_softcap qk_gain_init train_seq_len eval_seq_len eval_stride val_batch_size ttt_lr ttt_epochs ttt_chunk_tokens
ttt_momentum ttt_batch_seqs ttt_grad_clip""".split()


def test_every_setting_of_a_file_that_is_not_always_listed_states_its_off_value():
    fields = [f for f in dataclasses.fields(pg.Hyperparameters) if f.metadata["section"] in ("model", "evaluation")]
    assert [f.name for f in fields if f.metadata["off"] is None] == ALWAYS_LISTED
    for f in fields:
        if f.metadata["off"] is not None:
            pg.check_value(f, f.metadata["off"])


def without_techniques(header) -> None:
    """As a version would have written it that knew no technique."""
    for part in ("architecture", "evaluation"):
        header[part] = {name: value for name, value in header[part].items() if name in (*ALWAYS_LISTED, "dtype")}


def test_an_artifact_outlives_settings_that_came_after_it():
    offs = {f.name: off for f in dataclasses.fields(pg.Hyperparameters) if (off := f.metadata["off"]) is not None}
    plain = tiny_hp(**SMALL | offs)
    blob = make_blob("lzma", plain)
    old = edited(blob, without_techniques)
    header, tensors = pg.unpack_artifact(old)
    whole, same = pg.unpack_artifact(blob)
    assert len(json.dumps(whole)) > len(split_payload(old)[0]) and header == whole
    assert header["architecture"] == plain.section("model")
    assert tensors.keys() == same.keys() and all(torch.equal(tensors[name].data, same[name].data) for name in same)
    with pytest.raises(pg.ArtifactError, match="its tensors are not those of its architecture"):
        pg.unpack_artifact(edited(make_blob("lzma"), without_techniques))  # it has tables


@pytest.mark.parametrize("part, name", [("architecture", "surprise"), ("evaluation", "seed"), ("evaluation", "a\nb")])
def test_a_setting_of_a_later_version_is_named(part, name):
    said = f"artifact has a setting that this version does not know: {pg.shown(name)}"
    with pytest.raises(pg.ArtifactError, match=f"^{re.escape(said)}$"):
        pg.unpack_artifact(edited(make_blob("lzma"), set_in(part, name, 1)))


def test_a_header_that_calls_itself_neither_artifact_nor_weights_is_refused():
    hp = tiny_hp(**SMALL)
    tensors = {name: pg.Stored("fp32", w, None) for name, w in weights_of(build_model(hp)).items()}
    assert read(pg.pack_artifact(header_of(hp, "picture"), tensors, "stored")) is None


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"5",
        b'"x"',
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b"{}" * 3,
        b"1" * 5000,
        b"NaN",
        b'{"a":' * 9,
    ],
)
def test_headers_that_are_no_header_are_artifact_errors(header):
    assert read(with_header(make_blob(), header)) is None


def test_deep_nesting_is_an_artifact_error():
    blob = make_blob()
    text = split_payload(blob)[0]
    # Depths around the interpreter's limit: parsed by json, perhaps too deep for what comes next.
    for depth in (50, 500, *range(sys.getrecursionlimit() - 200, sys.getrecursionlimit() + 1, 4), 10_000, 400_000):
        nest = b"[" * depth + b"]" * depth
        assert read(with_header(blob, nest)) is None
        for old in (b'"int6"', b'"vocab_size":12', b"[8,8]", b'"kind":"artifact"'):
            assert old in text
            key, colon, _ = old.partition(b":")
            assert read(with_header(blob, text.replace(old, key + colon + nest if colon else nest, 1))) is None


def test_a_headers_length_is_bounded():
    blob = make_blob()
    payload = payload_of(blob)
    for length in (0, 1, len(payload) - 4, len(payload) - 3, 1 << 20, (1 << 20) + 1, (1 << 32) - 1):
        assert read(with_payload(blob, struct.pack("<I", length) + payload[4:])) is None
    for short in (b"", b"\0", b"\0\0\0"):
        assert read(seal(0, short, len(short))) is None
    text = split_payload(blob)[0]
    assert read(with_header(blob, text + b" " * 1000)) is not None
    assert read(with_header(blob, text + b" " * (1 << 20))) is None


def test_an_equivalent_header_in_another_spelling_reads_the_same():
    """The forging helpers themselves are sound: an unchanged header passes."""
    for compressor in COMPRESSORS:
        blob = make_blob(compressor)
        assert same(read(edited(blob, lambda header: None))[1], pg.unpack_artifact(blob)[1])


# Forged streams


def stream_starts(blob: bytes) -> tuple[dict[str, int], dict[str, int]]:
    """Where the streams of codes, fp16 (scales last) and fp32 start, and how many values each has."""
    counts = dict(codes=0, fp16=0, fp32=0)
    for _, shape, storage in json.loads(split_payload(blob)[0])["tensors"]:
        counts[storage if storage in counts else "codes"] += int(np.prod(shape))
        counts["fp16"] += shape[0] if storage.startswith("int") else 0
    return dict(codes=0, fp16=counts["codes"], fp32=counts["codes"] + 2 * counts["fp16"]), counts


def with_value(blob: bytes, stream: str, index: int, value: bytes) -> bytes:
    """One value of a stream replaced by these little-endian bytes, which lie in as many planes, the highest first."""
    header, streams = split_payload(blob)
    starts, counts = stream_starts(blob)
    forged = bytearray(streams)
    for plane, byte in enumerate(reversed(value)):
        forged[starts[stream] + plane * counts[stream] + index % counts[stream]] = byte
    return with_payload(blob, struct.pack("<I", len(header)) + header + bytes(forged))


def test_a_tensor_told_twice_with_the_data_to_match_is_an_artifact_error():
    blob = make_blob()
    header, streams = split_payload(blob)
    header = json.loads(header)
    name, shape, storage = header["tensors"][-1]
    assert storage == "fp32"
    header["tensors"].append([name, shape, storage])
    text, again = json.dumps(header).encode(), bytes(4 * int(np.prod(shape)))
    assert read(with_payload(blob, struct.pack("<I", len(text)) + text + streams + again)) is None


@pytest.mark.parametrize(
    "storage, new",
    [
        ("int6", b"\x20"),
        ("int6", b"\xe0"),
        ("int6", b"\x80"),
        ("int8", b"\x80"),
        ("fp16", b"\x00\x7c"),
        ("fp16", b"\x01\xfe"),
        ("fp32", b"\x00\x00\x80\x7f"),
        ("fp32", b"\x00\x00\xc0\x7f"),
    ],
)
def test_values_outside_their_storage_are_artifact_errors(storage, new):
    blob = make_blob()
    stream = storage if storage.startswith("fp") else "codes"
    before = itertools.takewhile(lambda row: row[2] != storage, json.loads(split_payload(blob)[0])["tensors"])
    index = sum(int(np.prod(shape)) for _, shape, _ in before) if stream == "codes" else 0
    assert read(with_value(blob, stream, index, bytes(len(new)))) is not None
    assert read(with_value(blob, stream, index, new)) is None


@pytest.mark.parametrize("high", [0x7C, 0x7E, 0xFC, 0xBC])
def test_scales_that_are_not_finite_or_negative_are_artifact_errors(high):
    blob = make_blob()
    table = json.loads(split_payload(blob)[0])["tensors"]
    rows = sum(shape[0] for _, shape, storage in table if storage in ("int6", "int8"))
    assert read(with_value(blob, "fp16", -1, b"\0\x3c")) is not None
    for row in (-rows, -1):
        assert read(with_value(blob, "fp16", row, bytes([0, high]))) is None


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_streams_of_another_length_are_artifact_errors(compressor):
    blob = make_blob(compressor)
    payload = payload_of(blob)
    for other in (payload[:-1], payload + b"\0", payload[:-100], payload + bytes(1000)):
        assert read(with_payload(blob, other)) is None


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_a_wrong_payload_length_is_an_artifact_error(compressor):
    blob = make_blob(compressor)
    size = len(payload_of(blob))
    for declared in (0, 3, size - 1, size + 1, 2 * size, 1 << 30, (1 << 30) + 1, 1 << 40, (1 << 64) - 1):
        with little_memory(160 << 20):
            assert read(seal(blob[6], blob[56:], declared)) is None


@pytest.mark.parametrize("compressor", ["lzma", "zstd"])
def test_a_bomb_is_not_unpacked_beyond_its_declared_length(compressor):
    bomb = pg.compress(bytes(48 << 20), compressor)
    with little_memory(16 << 20):
        assert read(seal(pg.COMPRESSORS.index(compressor), bomb, 100_000)) is None


def test_a_zstd_frame_that_lies_about_its_length_is_not_unpacked():
    import zstandard

    payload = bytes(48 << 20)
    honest = zstandard.ZstdCompressor(level=3).compress(payload)
    assert honest.count(struct.pack("<I", 48 << 20)) == 1
    lying = honest.replace(struct.pack("<I", 48 << 20), struct.pack("<I", 1 << 17))
    silent = zstandard.ZstdCompressor(level=3, write_content_size=False).compress(payload)
    with little_memory(24 << 20):
        assert read(seal(2, lying, 1 << 17)) is None
        assert read(seal(2, silent, 1 << 17)) is None


@pytest.mark.parametrize("compressor", ["lzma", "zstd"])
def test_bytes_behind_the_compressed_stream_are_artifact_errors(compressor):
    blob = make_blob(compressor)
    for extra in (b"\0", b"abc", blob[56:]):
        assert read(reseal(blob + extra)) is None


# Files, compressors, code


def test_reading_a_file_names_it_and_its_kind(tmp_path):
    hp, path = tiny_hp(**SMALL), tmp_path / "a.pgolf"
    with pytest.raises(pg.UserError, match="a.pgolf"):
        pg.read_artifact_file(str(path), "artifact")
    path.write_bytes(b"junk")
    with pytest.raises(pg.UserError, match="a.pgolf"):
        pg.read_artifact_file(str(path), "artifact")
    path.write_bytes(make_blob("lzma", hp))
    blob, header, tensors = pg.read_artifact_file(str(path), "artifact")
    assert blob == path.read_bytes() and same(tensors, pg.unpack_artifact(blob)[1]) and header["kind"] == "artifact"
    with pytest.raises(pg.UserError, match="EVAL_ONLY=1"):
        pg.read_artifact_file(str(path), "weights")


def test_what_never_ends_or_is_huge_is_no_artifact(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(pg.UserError, match=f"cannot read {path}: it is no regular file"):
            pg.read_artifact_file(str(path), "artifact")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)  # of which no more is read than it takes to know
    with pytest.raises(pg.UserError, match="not an artifact of this script"):
        pg.read_artifact_file(str(tmp_path / "huge"), "artifact")


def test_a_missing_compressor_is_a_user_error_and_never_another_compressor(monkeypatch):
    blob = make_blob("zstd")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for attempt in (
        lambda: pg.load_compressor("zstd"),
        lambda: make_blob("zstd"),
        lambda: pg.unpack_artifact(blob),
    ):
        with pytest.raises(pg.UserError, match="zstandard"):
            attempt()
    assert pg.load_compressor("lzma") is None and pg.unpack_artifact(make_blob("lzma"))


def test_nothing_that_is_read_can_be_executed():
    """No pickle, no torch.load, no eval: checked on the syntax tree, where comments do not count."""
    tree = ast.parse(Path(pg.__file__).read_text())
    imported, called = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
        if isinstance(node, ast.Call):
            called.add(ast.unparse(node.func))
    assert "json" in imported and "json.loads" in called
    assert not imported & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "importlib", "subprocess"}
    forbidden = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "np.load", "numpy.load"}
    assert not called & (forbidden | {"os.system", "torch.jit.load", "torch.package.PackageImporter"})
