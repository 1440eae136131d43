"""Shards, batches, byte accounting, and every way in which data can be wrong."""

import dataclasses
import errno
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import ROOT, TINY_ENV, clean_environ, run_here
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as pg

# -----------------------------------------------------------------------------
# BYTES
# -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_model(tiny_data) -> Path:
    return next(tiny_data.glob("*.model"))


@pytest.fixture(scope="module")
def counter(tiny_model) -> pg.TokenBytes:
    return pg.TokenBytes(tiny_model, 512)


@pytest.fixture(scope="module")
def processor(tiny_model) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(tiny_model))


def test_bytes_of_450_real_documents_are_those_of_their_text(real_text):
    path = real_text / "fineweb_1024_bpe.model"
    model, counter = sentencepiece.SentencePieceProcessor(model_file=str(path)), pg.TokenBytes(path, 1024)
    with gzip.open(real_text / "fineweb_val_450.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    documents = [[pg.BOS_ID, *ids] for ids in model.encode(texts)]
    decoded = [len(text.encode()) for text in model.decode([ids[1:] for ids in documents])]
    assert [int(counter.count(np.array(ids)).sum()) for ids in documents] == decoded
    # In one stream, the BOS between documents adds nothing and takes nothing.
    stream = np.concatenate(documents)
    assert (len(stream), int(counter.count(stream).sum())) == (504_573, 1_209_539)


@given(text=st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_bytes_of_any_text_are_those_of_what_decodes(text, counter, processor):
    ids = processor.encode(text)
    assert counter.count(np.array([pg.BOS_ID, *ids])).sum() == len(processor.decode(ids).encode())


def test_single_cases_of_the_byte_counter(counter, processor):
    space, a = processor.piece_to_id("▁"), processor.piece_to_id("a")
    byte, eos = processor.piece_to_id("<0xE2>"), processor.eos_id()
    leading = next(
        i for i in range(512) if len(p := processor.id_to_piece(i)) > 2 and p[0] == "▁" and p.isalpha() is False
    )
    size = len(processor.id_to_piece(leading).encode()) - 3  # without the three bytes of ▁
    cases = [
        ((a, leading), size + 1),
        ((pg.BOS_ID, leading), size),
        ((eos, leading), size),
        ((processor.unk_id(), leading), size),
        ((byte, leading), size + 1),
        ((a, byte), 1),
        ((pg.BOS_ID, byte), 1),
        ((a, space), 1),
        ((pg.BOS_ID, space), 0),
        ((space, space), 1),
        ((a, pg.BOS_ID), 0),
        ((a, eos), 0),
        ((a, a), 1),
    ]
    assert [int(counter.count(np.array(pair))[0]) for pair, _ in cases] == [count for _, count in cases]


def fake_processor(pieces: list[str], **kinds: set[int]):
    """A tokenizer of these pieces with 256 byte pieces after them."""
    bytes_from = len(pieces)
    pieces = pieces + [f"<0x{i:02X}>" for i in range(256)]
    control, unused = {0, 1, 2}, kinds.get("unused", set())
    return SimpleNamespace(
        get_piece_size=lambda: len(pieces),
        id_to_piece=lambda i: pieces[i],
        is_byte=lambda i: i >= bytes_from,
        is_control=lambda i: i in control,
        is_unknown=lambda i: i == 3,
        is_unused=lambda i: i in unused,
        unk_id=lambda: 3,
        serialized_model_proto=lambda: b"",
        normalize=lambda text: text,
        encode=lambda text: [],
        decode=lambda ids: "",
    )


def fake_counter(monkeypatch, tmp_path: Path, pieces: list[str], **kinds) -> pg.TokenBytes:
    (tmp_path / "t.model").write_bytes(b"fake")
    monkeypatch.setattr(sentencepiece, "SentencePieceProcessor", lambda **_: fake_processor(pieces, **kinds))
    return pg.TokenBytes(tmp_path / "t.model", len(pieces) + 256)


SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def test_inner_spaces_accents_and_unused_pieces(monkeypatch, tmp_path):
    pieces = [*SPECIAL, "▁", "a▁b", "▁of▁the", "é", "▁日", "gone"]
    counter = fake_counter(monkeypatch, tmp_path, pieces, unused={9})
    previous, target = np.divmod(np.arange(36), 6)
    counts = [int(counter.count(np.array([p + 4, t + 4]))[0]) for p, t in zip(previous, target, strict=True)]
    after_text = [1, 3, 7, 2, 4, 0]
    assert counts == after_text * 5 + [0, 3, 6, 2, 3, 0]  # after the unused piece, a leading space is not counted


# -----------------------------------------------------------------------------
# STREAM AND BATCHES
# -----------------------------------------------------------------------------


def write_shard(path: Path, tokens) -> Path:
    tokens = np.asarray(tokens, "<u2")
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + tokens.tobytes())
    return path


def write_shards(folder: Path, *lengths: int) -> tuple[list[Path], np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, 500, sum(lengths)).astype(np.uint16)
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    return [write_shard(folder / f"fineweb_train_{i:06d}.bin", part) for i, part in enumerate(parts)], tokens


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    start=st.integers(0, 200),
    count=st.integers(1, 60),
)
@settings(max_examples=60, deadline=None)
def test_the_stream_is_circular_across_shards(tmp_path_factory, lengths, start, count):
    paths, tokens = write_shards(tmp_path_factory.mktemp("shards"), *lengths)
    stream = pg.TokenStream(paths, 500)
    assert len(stream) == sum(lengths)
    read = stream.read(start, count)
    assert read.dtype == np.uint16
    assert np.array_equal(read, np.take(tokens, np.arange(start, start + count), mode="wrap"))


LOADER = dict(train_seq_len=4, train_batch_tokens=24, eval_seq_len=4, eval_stride=4)


def loader(paths, rank: int, size: int, log: list[str], **changes) -> pg.BatchLoader:
    fields = LOADER | changes
    ranks = SimpleNamespace(rank=rank, size=size, device=torch.device("cpu"))
    return pg.BatchLoader(pg.TokenStream(paths, 500), pg.Hyperparameters(**fields), ranks, log.append)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_a_step_has_the_same_targets_for_every_world_size(tmp_path, size):
    paths, tokens = write_shards(tmp_path, 31, 17, 23)
    loaders = [loader(paths, rank, size, []) for rank in range(size)]
    for step in range(8):  # the stream's end lies inside step 2, and again inside step 5
        batches = [each.next() for each in loaders]
        inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
        expected = np.take(tokens, np.arange(24 * step, 24 * step + 25), mode="wrap").astype(np.int64)
        assert inputs.shape == targets.shape == (6, 4) and inputs.dtype == targets.dtype == torch.int64
        assert np.array_equal(inputs.flatten(), expected[:-1])
        assert np.array_equal(targets.flatten(), expected[1:])


def taken(loaders: list[pg.BatchLoader], steps: int) -> list[tuple[int, ...]]:
    """Every sequence of these steps, with the target that follows it."""
    rows = []
    for _ in range(steps):
        for inputs, targets in (each.next() for each in loaders):
            assert torch.equal(inputs[:, 1:], targets[:, :-1])
            rows += [(*row.tolist(), int(last)) for row, last in zip(inputs, targets[:, -1], strict=True)]
    return rows


def test_shuffled_sequences_are_the_whole_text_once_each_time_through_it(tmp_path):
    paths, tokens = write_shards(tmp_path, 31, 17, 24)  # 72 tokens: 18 sequences, three steps
    rows = taken([loader(paths, 0, 1, [], shuffle_sequences=True)], 6)
    epochs = rows[:18], rows[18:]
    for epoch in epochs:
        phases = [p for p in range(4) if {cut(tokens, p + 4 * i) for i in range(18)} == {*epoch}]
        assert len({*epoch}) == 18 and phases
    assert epochs[0] != epochs[1]
    assert rows[:6] != [cut(tokens, 4 * i) for i in range(6)]


def cut(tokens: np.ndarray, start: int) -> tuple[int, ...]:
    return tuple(np.take(tokens, np.arange(start, start + 5), mode="wrap").tolist())


def test_shuffled_batches_depend_on_seed_and_step_alone(tmp_path):
    paths, _ = write_shards(tmp_path, 31, 17, 23)
    settings = dict(shuffle_sequences=True, seed=3)
    whole = taken([loader(paths, 0, 1, [], **settings)], 8)
    assert taken([loader(paths, rank, 3, [], **settings) for rank in range(3)], 8) == whole
    late = loader(paths, 0, 1, [], **settings)
    resumed = pg.BatchLoader(late.stream, pg.Hyperparameters(**LOADER, **settings), late.ranks, print, step=5)
    assert taken([resumed], 3) == whole[30:]
    assert taken([loader(paths, 0, 1, [], shuffle_sequences=True, seed=4)], 8) != whole


def test_batches_that_wrap_are_logged(tmp_path):
    paths, _ = write_shards(tmp_path, 31, 29)
    log: list[str] = []
    each = loader(paths, 0, 1, log)
    for _ in range(6):  # 144 targets of a stream of 60
        each.next()
    assert log == [f"train_loader:wrapped epoch:{e} step:{s} stream_tokens:60" for e, s in ((1, 2), (2, 4))]


def test_what_the_prefetch_thread_meets_is_told_with_the_batch(tmp_path):
    paths, _ = write_shards(tmp_path, 40)
    write_shard(paths[0], [7] * 30 + [500] + [7] * 30)
    each = loader(paths, 0, 1, [])
    each.next()
    assert each.problem is None
    inputs, _ = each.next()
    assert "holds token id 500, but VOCAB_SIZE=500" in each.problem
    assert not inputs.any()  # the rank still takes part in the step that ends the run for all


def test_the_fingerprint_follows_the_shards_and_not_their_folder(tmp_path):
    paths, _ = write_shards(tmp_path / "a", 50, 60)
    base = pg.data_fingerprint(paths)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    copies = sorted((tmp_path / "b").iterdir())
    assert pg.data_fingerprint(copies) == base
    assert pg.data_fingerprint(copies[:1]) != base != pg.data_fingerprint(copies[::-1])
    for copy in copies:
        for offset in (8, 1024, copy.stat().st_size // 2, copy.stat().st_size - 1):  # header, first, middle, last
            whole = copy.read_bytes()
            copy.write_bytes(whole[:offset] + bytes([whole[offset] ^ 1]) + whole[offset + 1 :])
            assert pg.data_fingerprint(copies) != base
            copy.write_bytes(whole)
    assert pg.data_fingerprint(copies) == base


# -----------------------------------------------------------------------------
# WHAT CAN BE WRONG
# -----------------------------------------------------------------------------


@pytest.fixture
def data(tiny_data, tmp_path) -> Path:
    """A copy of the tiny data set that a test may break."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


def refused(tmp_path: Path, data: Path, *said: str, **settings) -> None:
    """One error line with these words, exit code 2, and nothing left behind."""
    ran = run_here(tmp_path / "out", data, **settings)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: ") and ran.err.count("\n") == 1 and ran.err.endswith("\n")
    for words in said:
        assert words in ran.err
    assert not (tmp_path / "out").exists()


def alter(path: Path, offset: int, value: bytes) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:offset] + value + whole[offset + len(value) :])


@pytest.mark.parametrize("name", ["fineweb_val_000000.bin", "fineweb_train_000001.bin"])
def test_damaged_shards_are_refused(name, data, tmp_path):
    path = data / name
    whole = path.read_bytes()
    alter(path, 0, b"\x00")
    refused(tmp_path, data, name, "is no token shard (wrong magic or version)", "data/prepare.py")
    path.write_bytes(whole)
    alter(path, 4, b"\x02")
    refused(tmp_path, data, name, "is no token shard (wrong magic or version)")
    path.write_bytes(whole[:-2])
    refused(tmp_path, data, name, f"is {len(whole) - 2} bytes, but its header promises {len(whole)}")
    path.write_bytes(whole + b"\0\0")
    refused(tmp_path, data, name, "but its header promises")
    path.write_bytes(whole[:500])
    refused(tmp_path, data, name, "is no token shard")
    for few in (b"", b"x", b"Not Found"):  # what a failed download leaves
        path.write_bytes(few)
        refused(tmp_path, data, name, "is no token shard")
    write_shard(path, [])
    refused(tmp_path, data, name, "holds no tokens")


@pytest.mark.parametrize("name", ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "manifest.json"])
def test_a_pipe_is_refused_and_not_waited_for(name, data, tmp_path):
    (data / name).unlink()
    os.mkfifo(data / name)
    refused(tmp_path, data, str(data), "it is no regular file")


def test_a_folder_that_cannot_be_read_is_named(data, tmp_path, monkeypatch):
    def refuse(_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "listdir", refuse)
    refused(tmp_path, data, f"cannot read DATA_PATH={data}: Permission denied")


def test_a_file_larger_than_the_memory_is_an_error_of_reading_it(data, monkeypatch):
    class Huge(io.BytesIO):
        def read(self, size=-1):
            raise MemoryError

    monkeypatch.setattr(Path, "open", lambda *_: Huge())
    with pytest.raises(OSError, match="larger than the free memory"):
        pg.read_file(data / "manifest.json")


def test_a_validation_id_beyond_the_vocabulary_is_refused_at_load(data, tmp_path):
    path = data / "fineweb_val_000000.bin"
    alter(path, path.stat().st_size - 2, (512).to_bytes(2, "little"))  # the very last token
    refused(tmp_path, data, "fineweb_val_000000.bin holds token id 512, but VOCAB_SIZE=512")


def test_a_training_id_beyond_the_vocabulary_stops_the_run_with_one_line(data, tmp_path):
    alter(data / "fineweb_train_000000.bin", 1024 + 2 * 1000, (600).to_bytes(2, "little"))
    ran = run_here(tmp_path / "out", data)
    assert ran.code == 2
    assert ran.err.count("\n") == 1 and "fineweb_train_000000.bin holds token id 600, but VOCAB_SIZE=512" in ran.err
    left = {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert left == {"run.txt"}  # the log of what was done; nothing that looks like a result


def test_a_missing_folder_or_split_names_the_command(data, tmp_path):
    refused(tmp_path, tmp_path / "nowhere", "nowhere", TOKENIZER_PATH=next(data.glob("*.model")))
    refused(tmp_path, tmp_path / "nowhere", "DATA_PATH=")
    for path in data.glob("fineweb_train_*.bin"):
        path.unlink()
    refused(tmp_path, data, "no fineweb_train_*.bin in DATA_PATH=", "python data/prepare.py")
    (data / "fineweb_val_000000.bin").unlink()
    refused(tmp_path, data, "no fineweb_val_*.bin in DATA_PATH=", "python data/prepare.py")


def test_the_default_run_without_data_says_how_to_prepare_it(tmp_path):
    copy = shutil.copy(ROOT / "train_gpt.py", tmp_path)
    ran = subprocess.run(
        [sys.executable, "-B", copy], cwd=tmp_path, env=clean_environ(), capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1
    assert "python data/prepare.py" in ran.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["train_gpt.py"]


def test_the_tokenizer_must_be_found_and_be_one(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no default tokenizer is
    model = next(data.glob("*.model"))
    shutil.copy(model, data / "second.model")
    refused(tmp_path, data, "2 .model files in DATA_PATH=", "TOKENIZER_PATH")
    (data / "second.model").unlink()
    moved = model.rename(tmp_path / "moved.model")
    refused(tmp_path, data, "no .model in DATA_PATH=", "set TOKENIZER_PATH")
    refused(tmp_path, data, "absent.model does not exist", TOKENIZER_PATH=data / "absent.model")
    (data / "x.model").write_bytes(b"no model at all")
    refused(tmp_path, data, "x.model is no SentencePiece model")
    (data / "x.model").write_bytes(b"")
    refused(tmp_path, data, "x.model")
    hp = pg.Hyperparameters(data_path=str(data), tokenizer_path=str(moved))
    assert pg.find_tokenizer(hp) == moved  # the setting rules over what lies beside the shards


def test_a_tokenizer_of_another_size_is_refused(data, tmp_path):
    said = "has 512 pieces, not VOCAB_SIZE=1024; set VOCAB_SIZE=512"
    refused(tmp_path, data, said, VOCAB_SIZE=1024)


@pytest.mark.parametrize(
    "pieces, byte_count, said",
    [
        ([*SPECIAL, "a", "▁a"], 256, "has no `▁` piece of its own"),
        ([*SPECIAL, "▁", "a"], 0, "has no byte fallback"),
        ([*SPECIAL, "▁", "a"], 255, "has no byte fallback"),
    ],
)
def test_tokenizers_whose_text_cannot_be_counted_are_refused(pieces, byte_count, said, monkeypatch, tmp_path):
    fake = fake_processor(pieces)
    size = len(pieces) + 256
    (tmp_path / "t.model").write_bytes(b"fake")
    missing = SimpleNamespace(**{**vars(fake), "is_byte": lambda i: size - byte_count <= i})
    monkeypatch.setattr(sentencepiece, "SentencePieceProcessor", lambda **_: missing)
    with pytest.raises(pg.UserError, match=said):
        pg.TokenBytes(tmp_path / "t.model", size)


def test_a_tokenizer_without_a_bos_is_refused(monkeypatch, tmp_path):
    fake = fake_processor(["<unk>", "a", "b", "c", "▁"])
    fake.is_control, fake.is_unknown = lambda i: False, lambda i: i == 0
    (tmp_path / "t.model").write_bytes(b"fake")
    monkeypatch.setattr(sentencepiece, "SentencePieceProcessor", lambda **_: fake)
    with pytest.raises(pg.UserError, match="has no control token with id 1"):
        pg.TokenBytes(tmp_path / "t.model", 5 + 256)


def test_a_real_tokenizer_without_byte_fallback_is_refused(data, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\nsphinx of black quartz judge my vow\n" * 9)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "plain"), vocab_size=60, model_type="bpe", minloglevel=2,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, hard_vocab_limit=False,
    )  # fmt: skip
    path = tmp_path / "plain.model"
    size = sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size()
    refused(tmp_path, data, "has no byte fallback", TOKENIZER_PATH=path, VOCAB_SIZE=size)


def train_tokenizer(folder: Path, name: str, **changes) -> tuple[Path, int]:
    """A small tokenizer of the challenge's recipe but for `changes`, and its size."""
    text = folder / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog\nSphinx of black quartz judge my vow\n" * 9)
    recipe = dict(
        vocab_size=330, model_type="bpe", byte_fallback=True, split_digits=True, normalization_rule_name="nmt_nfkc",
        add_dummy_prefix=False, hard_vocab_limit=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2,
    )  # fmt: skip
    path = folder / f"{name}.model"
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(path.with_suffix("")), **{**recipe, **changes}
    )
    return path, sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size()


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(user_defined_symbols=["\ue001", "<sep>"]), r"user-defined symbols \('\\ue001', '<sep>'\)"),
        (dict(normalization_rule_name="nmt_nfkc_cf"), "a normaliser that changes letters"),
        (dict(normalization_rule_name="nfkc_cf"), "a normaliser that changes letters"),
        (dict(remove_extra_whitespaces=False), "keeps a document's leading spaces"),
        (dict(treat_whitespace_as_suffix=True, add_dummy_prefix=True), "puts its spaces elsewhere"),
    ],
)
def test_a_tokenizer_whose_pieces_do_not_spell_its_text_is_refused(changes, said, tmp_path):
    with pytest.raises(pg.UserError, match=said):
        pg.TokenBytes(*train_tokenizer(tmp_path, "other", **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(normalization_rule_name="nfkc"),
        dict(normalization_rule_name="identity"),
        dict(add_dummy_prefix=True),
        dict(add_dummy_prefix=True, remove_extra_whitespaces=False),
        dict(control_symbols=["<mask>"]),
    ],
)
def test_a_tokenizer_that_spells_its_text_is_taken_and_counts_it(changes, tmp_path):
    path, size = train_tokenizer(tmp_path, "other", **changes)
    counter, model = pg.TokenBytes(path, size), sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in ("The fox", "  two  leading, İstanbul ﬁne\ttab\nline", " a", "quartz ", "日本 <mask> x"):
        ids = model.encode(text)
        assert counter.count(np.array([pg.BOS_ID, *ids])).sum() == len(model.decode(ids).encode())


def test_the_published_tokenizers_are_known_by_their_pieces(real_text):
    assert pg.TokenBytes(real_text / "fineweb_8192_bpe.model", 8192).transform == ""
    case = pg.TokenBytes(real_text / "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model", 8192)
    assert case.transform == "caseops_after"


def test_a_tokenizer_with_what_sentencepiece_does_not_write_is_refused(data, tmp_path):
    (data / "manifest.json").unlink()
    with (data / "bpe_512.model").open("ab") as file:
        file.write(bytes([0xC3, 0x0C, 0xC4, 0x0C]))  # a group, field 200: SentencePiece takes it
    refused(tmp_path, data, "the tokenizer's protobuf has a group")


def test_types_of_pieces_are_those_that_sentencepiece_tells(tmp_path):
    path, size = train_tokenizer(tmp_path, "other", user_defined_symbols=["<sep>"], control_symbols=["<mask>"])
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    types = pg.piece_types(path.read_bytes())
    assert [model.id_to_piece(i) for i, kind in enumerate(types) if kind == 4] == ["<sep>"] and len(types) == size
    assert [kind == 3 for kind in types] == [model.is_control(i) for i in range(size)]
    assert [kind == 6 for kind in types] == [model.is_byte(i) for i in range(size)]


def test_a_manifest_that_does_not_fit_what_lies_beside_it_is_refused(data, tmp_path):
    path = data / "manifest.json"
    manifest = json.loads(path.read_text())

    def write(**changes) -> None:
        path.write_text(json.dumps(manifest | changes))

    write(tokenizer=manifest["tokenizer"] | dict(sha256="0" * 64))
    refused(tmp_path, data, "were made with another tokenizer (sha256 0000000000000000…)", "manifest.json")
    for other, name in ((5, "5"), ("a\nb", "a\\nb"), ([], "[]")):
        write(tokenizer=dict(sha256=other))
        refused(tmp_path, data, f"were made with another tokenizer (sha256 {name}…)")
    path.write_text("{")
    refused(tmp_path, data, "manifest.json cannot be used", "build the data set again")
    path.write_bytes(b"\xff" * 100_000)
    refused(tmp_path, data, "manifest.json cannot be used (UnicodeDecodeError", " characters)); build")
    path.write_text('{"datasets": []}')  # somebody else's
    pg.check_manifest(path, "any")
    path.unlink()
    pg.check_manifest(path, "any")


def test_a_validation_split_must_start_with_bos_and_hold_text(data, tmp_path):
    path = data / "fineweb_val_000000.bin"
    tokens = pg.read_shard(path).copy()
    write_shard(path, tokens[1:])
    refused(tmp_path, data, "does not start with BOS (1)", "data/prepare.py")
    write_shard(path, [*tokens[:90], 3, *tokens[91:]])
    refused(tmp_path, data, "holds <unk>")
    write_shard(path, tokens[:1])
    refused(tmp_path, data, "fewer than two tokens")
    write_shard(path, [1] * 900)
    refused(tmp_path, data, "error: ")  # zero bytes cannot be a denominator


def test_one_ttt_chunk_is_refused_with_a_size_that_works(data, tmp_path):
    targets = len(pg.read_shard(data / "fineweb_val_000000.bin")) - 1
    said = f"TTT_CHUNK_TOKENS=32768 makes one chunk of {targets} targets; use TTT_CHUNK_TOKENS={targets // 4}"
    refused(tmp_path, data, said, TTT_CHUNK_TOKENS=32768)
    hp = pg.Hyperparameters.from_env(TINY_ENV | {"TTT_CHUNK_TOKENS": str(targets // 4)})
    pg.check_ttt(hp, targets)
    with pytest.raises(pg.UserError, match="TTT_ENABLED=1 needs more than one window of EVAL_SEQ_LEN=32"):
        pg.check_ttt(hp, 32)
    pg.check_ttt(dataclasses.replace(hp, ttt_enabled=False), 32)


def test_an_output_that_cannot_be_written_is_refused(data, tmp_path):
    (tmp_path / "file").write_text("in the way")
    ran = run_here(tmp_path / "file" / "below", data)
    assert ran.code == 2 and ran.out == ""
    assert ran.err.startswith("error: cannot write to OUT_DIR=") and ran.err.count("\n") == 1


def test_a_file_in_the_place_of_the_log_folder_is_no_taken_run_id(data, tmp_path):
    (tmp_path / "logs").write_text("in the way")
    ran = run_here(tmp_path, data)
    assert ran.code == 2 and ran.err.startswith("error: cannot write to OUT_DIR=")


def test_a_taken_run_id_is_refused_and_nothing_is_overwritten(data, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "mine.txt").write_text("precious")
    ran = run_here(tmp_path, data, run_id="mine")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: RUN_ID=mine has a log already; choose another") and ran.err.count("\n") == 1
    assert ran.log.read_text() == "precious"
    assert not (tmp_path / "runs").exists()


def test_shards_are_read_in_the_order_of_their_names(tmp_path):
    for i in (2, 0, 10, 1):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", [i])
    stream = pg.TokenStream(pg.find_shards(pg.Hyperparameters(data_path=str(tmp_path)), "train"), 500)
    assert stream.read(0, 4).tolist() == [0, 1, 2, 10]
