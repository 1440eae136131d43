"""data/prepare.py: splits, shards, byte counts, atomicity, error lines, and the downloader against a local server."""

import dataclasses
import errno
import fcntl
import gzip
import hashlib
import http.server
import importlib.util
import itertools
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import sentencepiece as spm
import zstandard
from conftest import ROOT
from hypothesis import strategies as st

sys.path.insert(0, str(ROOT / "data"))
import prepare

import train_gpt

WORDS = "the model reads a document and writes small tokens into shards while other words remain unseen".split()


def story(i: int, words: int = 40) -> str:
    """A document that no other number gives."""
    picked = [WORDS[(i * 7 + j * (i % 5 + 1)) % len(WORDS)] for j in range(words)]
    return f"Document number {i}.\n\n" + " ".join(picked)


def write_jsonl(path: Path, texts) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def real_documents(real_text: Path, count: int) -> list[str]:
    with gzip.open(real_text / "webmix_train.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in itertools.islice(lines, count)]


def run(*args, code: int = 0) -> None:
    assert prepare.main([str(a) for a in args]) == code


def split_tokens(folder: Path, split: str) -> np.ndarray:
    return np.concatenate([train_gpt.read_shard(p) for p in sorted(folder.glob(f"fineweb_{split}_*.bin"))])


def split_texts(folder: Path, split: str) -> list[str]:
    """The documents of a split, decoded."""
    (model,) = folder.glob("*.model")
    tokens = split_tokens(folder, split)
    documents = np.split(tokens, np.flatnonzero(tokens == 1))[1:]
    assert all(document[0] == 1 for document in documents)
    return spm.SentencePieceProcessor(model_file=str(model)).decode([d[1:].tolist() for d in documents])


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "stories.jsonl", [story(i) for i in range(60)])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tokenizer of the challenge's recipe for documents like `story`."""
    folder = tmp_path_factory.mktemp("tokenizer")
    stories = write_jsonl(folder / "stories.jsonl", [story(i) for i in range(60)])
    run("text", stories, "--val-docs", 5, "--vocab-size", 320, "--out", folder / "out")
    return next((folder / "out").glob("*.model"))


def digests(texts) -> list[str]:
    """What fineweb_val_documents.tsv is to hold for documents of this normalised text."""
    return [f"{len(data)}\t{hashlib.sha256(data).hexdigest()}" for data in (text.encode() for text in texts)]


# -----------------------------------------------------------------------------
# SPLITS AND SHARDS
# -----------------------------------------------------------------------------


def test_first_documents_validate_and_none_is_in_both_splits(tmp_path, capsys):
    texts = [story(i) for i in range(30)]
    same = [texts[1].replace(" ", "  "), texts[2].replace("D", "\uff24")]  # to the model: the normaliser folds both
    source = write_jsonl(tmp_path / "in.jsonl", texts[:10] + [texts[3], "", " \n"] + texts[10:] + [texts[20], *same])
    run("text", source, "--val-docs", 4, "--vocab-size", 320, "--out", tmp_path / "out")

    folded = [" ".join(text.split()) for text in texts]
    assert split_texts(tmp_path / "out", "val") == folded[:4]
    assert split_texts(tmp_path / "out", "train") == folded[4:]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["dropped"] == {"duplicates": 4, "empty": 2, "unreadable": 0}
    assert "4 duplicates, 2 empty" in capsys.readouterr().out


def test_duplicates_inside_the_first_documents_do_not_count_as_validation(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [story(0), story(0), story(1), story(2), story(1)] + [story(3)] * 2)
    run("text", source, "--val-docs", 2, "--vocab-size", 300, "--out", tmp_path / "out")
    assert [t[:17] for t in split_texts(tmp_path / "out", "val")] == ["Document number 0", "Document number 1"]
    assert [t[:17] for t in split_texts(tmp_path / "out", "train")] == ["Document number 2", "Document number 3"]


def test_validation_files_are_kept_whole_and_leave_the_training_documents(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", [story(i) for i in range(20)])
    val = write_jsonl(tmp_path / "val.jsonl", [story(5), story(100), story(5), story(19)])
    run("text", train, "--val", val, "--vocab-size", 320, "--out", tmp_path / "out")
    folded = [" ".join(story(i).split()) for i in range(101)]
    assert split_texts(tmp_path / "out", "val") == [folded[5], folded[100], folded[5], folded[19]]
    assert split_texts(tmp_path / "out", "train") == [folded[i] for i in range(20) if i not in (5, 19)]


def test_shards_are_cut_exactly_and_hold_every_document(tmp_path, stories, model, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK_BYTES", 700)  # several chunks in a shard, and shards that end inside a chunk
    run("text", stories, "--val-docs", 5, "--tokenizer", model, "--shard-tokens", 500, "--out", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for split, documents in (("train", 55), ("val", 5)):
        entry = manifest["splits"][split]
        paths = [tmp_path / "out" / f["name"] for f in entry["files"]]
        assert [p.name for p in paths] == [f"fineweb_{split}_{i:06d}.bin" for i in range(len(paths))]
        sizes = [len(train_gpt.read_shard(p)) for p in paths]
        assert set(sizes[:-1]) <= {500} and 0 < sizes[-1] <= 500
        assert sum(sizes) == entry["tokens"] == sum(f["tokens"] for f in entry["files"])
        assert sum(int((train_gpt.read_shard(p) == 1).sum()) for p in paths) == documents == entry["documents"]
        assert entry["fingerprint"] == train_gpt.data_fingerprint(paths)
        for path, file in zip(paths, entry["files"], strict=True):
            assert file["bytes"] == path.stat().st_size
            assert file["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(manifest["splits"]["train"]["files"]) > 2
    header = np.fromfile(tmp_path / "out" / "fineweb_train_000000.bin", dtype="<i4", count=256)
    assert header.tolist() == [20240520, 1, 500] + [0] * 253
    shards = [f["name"] for s in manifest["splits"].values() for f in s["files"]]
    others = ["manifest.json", model.name, "fineweb_val_documents.tsv"]
    assert sorted(contents(tmp_path / "out")) == sorted(shards + others)


def test_the_same_inputs_give_the_same_bytes_with_any_number_of_workers(tmp_path, real_text, monkeypatch):
    source = write_jsonl(tmp_path / "in.jsonl", real_documents(real_text, 60))
    chunk_processes = []
    monkeypatch.setattr(prepare, "CHUNK_BYTES", 10_000)
    executor = prepare.ProcessPoolExecutor
    monkeypatch.setattr(prepare, "ProcessPoolExecutor", lambda n, **kw: chunk_processes.append(n) or executor(n, **kw))
    for n in (1, 3):
        run("text", source, "--val-docs", 9, "--vocab-size", 512, "--workers", n, "--out", tmp_path / f"w{n}")
    assert 3 in chunk_processes and 1 not in chunk_processes
    assert contents(tmp_path / "w1") == contents(tmp_path / "w3")


def test_tokens_decode_to_the_normalised_text_and_its_bytes_are_counted(tmp_path, real_text):
    odd = "  caf\u00e9 \u2460 \ufb01n\u200b  \u2581\u2581 x \x00 <s> \U0001f469\u200d\U0001f4bb\r\n\r\n\t\u6f22 \ud800 "
    texts = [odd, *real_documents(real_text, 30)]
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    out, model = tmp_path / "out", real_text / "fineweb_1024_bpe.model"
    run("text", source, "--val-docs", 12, "--tokenizer", model, "--out", out)
    tokenizer = spm.SentencePieceProcessor(model_file=str(model))
    wanted = [tokenizer.normalize(t.replace("\ud800", "\ufffd")).replace("\u2581", " ") for t in texts]
    assert split_texts(out, "val") == wanted[:12]
    assert split_texts(out, "train") == wanted[12:]

    manifest = json.loads((out / "manifest.json").read_text())
    counter = train_gpt.TokenBytes(model, 1024)
    for split, part in (("val", slice(0, 12)), ("train", slice(12, None))):
        entry = manifest["splits"][split]
        decoded = sum(len(text.encode()) for text in wanted[part])
        assert entry["normalised_bytes"] == decoded == int(counter.count(split_tokens(out, split)).sum())
        assert entry["raw_bytes"] == sum(len(t.replace("\ud800", "\ufffd").encode()) for t in texts[part])
    assert manifest["splits"]["val"]["raw_bytes"] > manifest["splits"]["val"]["normalised_bytes"]
    table = (out / "fineweb_val_documents.tsv").read_bytes()
    assert table.decode().splitlines() == digests(wanted[:12])
    assert manifest["validation_documents"] == {
        "file": "fineweb_val_documents.tsv",
        "sha256": hashlib.sha256(table).hexdigest(),
        "documents": 12,
        "bytes": manifest["splits"]["val"]["normalised_bytes"],
    }


def test_bytes_are_counted_across_parts_and_shards(monkeypatch, model):
    counter = train_gpt.TokenBytes(model, spm.SentencePieceProcessor(model_file=str(model)).vocab_size())
    tokens = np.random.default_rng(0).integers(4, 300, 1000).astype(np.uint16)
    tokens[::50] = 1
    monkeypatch.setattr(prepare, "COUNT_TOKENS", 7)
    assert prepare.count_bytes([tokens[:333], tokens[333:]], counter) == int(counter.count(tokens).sum())


def test_a_wrong_byte_count_is_refused(tmp_path, stories, model, monkeypatch, capsys):
    count = train_gpt.TokenBytes.count
    third = len(spm.SentencePieceProcessor(model_file=str(model)).encode(story(2)))
    assert third not in [len(spm.SentencePieceProcessor(model_file=str(model)).encode(story(i))) for i in (0, 1, 3, 4)]
    wrong = {third: 1}  # in one document, and made good in another, so that the sum is right
    monkeypatch.setattr(
        train_gpt.TokenBytes, "count", lambda self, tokens: count(self, tokens) + wrong.get(len(tokens) - 1, 0)
    )
    run("text", stories, "--val-docs", 5, "--tokenizer", model, "--out", tmp_path / "out", code=2)
    err = capsys.readouterr().err
    assert "validation document 3 ('Document number 2." in err and "bits per byte would be wrong" in err
    assert not (tmp_path / "out").exists()


def test_tokens_of_another_text_with_as_many_bytes_are_refused(tmp_path, stories, model, monkeypatch, capsys):
    encode = prepare.encode_chunk
    a, b = (spm.SentencePieceProcessor(model_file=str(model)).piece_to_id(piece) for piece in "ab")

    def exchange(*args):
        tokens = encode(*args)
        return np.where(tokens == a, b, tokens).astype(np.uint16)

    monkeypatch.setattr(prepare, "encode_chunk", exchange)
    run("text", stories, "--val-docs", 5, "--tokenizer", model, "--workers", 1, "--out", tmp_path / "out", code=2)
    assert "validation document 1" in (err := capsys.readouterr().err) and "decode to another text" in err


NASTY = [
    " \ufeffTwo  spaces \u2581 and\r\na line. ",
    "Ａ\u0301 full\u3000width \ufb01 \u2460 \u00bd\u037a",
    "cafe\u0301 \u0130\u00df \u1100\u1161\u11a8 \U0001f469\u200d\U0001f4bb",
    "\x00\x01 \u200b <s> </s> \ud800 \ue001the",
]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalization_rule_name": "nfkc"},
        {"normalization_rule_name": "identity"},
        {"add_dummy_prefix": True},
        {"add_dummy_prefix": True, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
        {"treat_whitespace_as_suffix": True},
    ],
)
def test_documents_are_those_of_the_tokenizers_own_normaliser(tmp_path, changes):
    model = bad_model(tmp_path, **changes)
    source = write_jsonl(tmp_path / "in.jsonl", [*NASTY, *(story(i) for i in range(9))])
    run("text", source, "--val-docs", 6, "--tokenizer", model, "--shard-tokens", 50, "--out", tmp_path / "out")
    wanted = split_texts(tmp_path / "out", "val")  # by the decoder, which does not know the normaliser
    assert (tmp_path / "out" / "fineweb_val_documents.tsv").read_text().splitlines() == digests(wanted)
    assert len(wanted) == 6 and "\ue001the" in wanted[3]


NORMALIZERS = [
    spm.SentencePieceNormalizer(rule_name=rule, remove_extra_whitespaces=spaces).normalize
    for rule in ("nmt_nfkc", "nfkc", "identity")
    for spaces in (True, False)
]
FOLDS_CASE = spm.SentencePieceNormalizer(rule_name="nmt_nfkc_cf").normalize
CHARACTERS = st.one_of(st.characters(), st.sampled_from("aA \u0301\u1161\uff21\u00a8\u200d\ufdfa\u2581\n"))


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.text(CHARACTERS, max_size=20))
def test_the_usual_normalisers_change_no_content(text):
    text = prepare.utf8(text).decode()
    for normalize in NORMALIZERS:
        assert prepare.content(normalize(text).replace("\u2581", " ")) == prepare.content(text)
    if any("A" <= c <= "Z" for c in text):
        assert prepare.content(FOLDS_CASE(text)) != prepare.content(text)


def test_a_normaliser_of_own_rules_is_found_in_the_document_that_it_changes(tmp_path, capsys):
    (tmp_path / "rules.tsv").write_text("71 76\t78\n")  # qv -> x, and nothing else
    model = bad_model(tmp_path, normalization_rule_tsv=str(tmp_path / "rules.tsv"))
    source = write_jsonl(tmp_path / "in.jsonl", [story(0), "a qv b", *(story(i) for i in range(1, 9))])
    run("text", source, "--val-docs", 2, "--tokenizer", model, "--out", tmp_path / "out", code=2)
    err = capsys.readouterr().err
    assert "validation document 2 ('a qv b')" in err and "(`qv b` to `x b`)" in err
    assert not (tmp_path / "out").exists()


def test_shards_without_every_document_are_refused(tmp_path, stories, model, monkeypatch, capsys):
    encode = prepare.encode_chunk
    monkeypatch.setattr(prepare, "encode_chunk", lambda *args: encode(*args)[1:])
    run("text", stories, "--val-docs", 5, "--tokenizer", model, "--workers", 1, "--out", tmp_path / "out", code=2)
    assert "holds 54 documents instead of 55" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_450_fineweb_documents_give_the_known_number_of_tokens(tmp_path, real_text):
    source = write_jsonl(tmp_path / "in.jsonl", [story(0), story(1)])
    run("text", source, "--val", real_text / "fineweb_val_450.jsonl.gz",
        "--tokenizer", real_text / "fineweb_1024_bpe.model", "--out", tmp_path / "out")  # fmt: skip
    val = json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]["val"]
    assert (val["documents"], val["tokens"], val["raw_bytes"]) == (450, 504_573, 1_209_539)


# -----------------------------------------------------------------------------
# TOKENIZER
# -----------------------------------------------------------------------------


def test_trained_tokenizer_follows_the_recipe_and_sees_training_documents_only(tmp_path):
    texts = [story(i) + " 2048" * 50 for i in range(40)]
    long = "zyzzyva " * 2000  # longer than the sentences SentencePiece takes by default
    out, other = tmp_path / "out", tmp_path / "other"
    run("text", write_jsonl(tmp_path / "a.jsonl", ["qwqwqw " * 50, *texts, long]),
        "--val-docs", 1, "--vocab-size", 330, "--out", out)  # fmt: skip
    run("text", write_jsonl(tmp_path / "b.jsonl", ["something else", *texts, long]),
        "--val-docs", 1, "--vocab-size", 330, "--out", other)  # fmt: skip
    (path,), (other_path,) = out.glob("*.model"), other.glob("*.model")
    assert path.read_bytes() == other_path.read_bytes()  # whatever validation holds
    tokenizer = spm.SentencePieceProcessor(model_file=str(path))
    assert tokenizer.vocab_size() == 330
    assert [tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()] == [0, 1, 2, 3]
    assert sum(tokenizer.is_byte(i) for i in range(330)) == 256
    assert not tokenizer.encode("the", out_type=str)[0].startswith("\u2581")  # add_dummy_prefix false
    assert "zyzzyva" in "".join(tokenizer.encode("zyzzyva", out_type=str)) and len(tokenizer.encode("zyzzyva")) < 4
    assert len(tokenizer.encode("2048")) >= 4  # split_digits


def test_a_text_too_small_for_the_vocabulary_says_which_size_to_use(tmp_path, capsys):
    source = write_jsonl(tmp_path / "in.jsonl", ["a b a b", "a b c", "b a c c"])
    run("text", source, "--val-docs", 1, "--vocab-size", 1024, "--out", tmp_path / "out")
    out = capsys.readouterr().out
    size = json.loads((tmp_path / "out" / "manifest.json").read_text())["tokenizer"]["vocab_size"]
    assert size < 1024
    assert f"{size} pieces instead of 1024; train with VOCAB_SIZE={size}" in out
    assert f"VOCAB_SIZE={size} python train_gpt.py" in out


def bad_model(folder: Path, **changes) -> Path:
    """A tokenizer that differs from the recipe."""
    with (folder / "bad.model").open("wb") as sink:
        spm.SentencePieceTrainer.train(
            model_writer=sink, minloglevel=2,
            **{"sentence_iterator": iter([story(i) for i in range(50)]), "model_type": "bpe", "vocab_size": 320,
               "byte_fallback": True, "add_dummy_prefix": False, "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3,
               "hard_vocab_limit": False, **changes},
        )  # fmt: skip
    return folder / "bad.model"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"byte_fallback": False}, "byte fallback"),
        ({"pad_id": 3, "unk_id": 0, "bos_id": 2, "eos_id": 1}, "BOS id 2"),
        ({"sentence_iterator": iter(["wordswithoutspaces"] * 9), "vocab_size": 280}, "piece of its own"),
        ({"user_defined_symbols": ["\ue001", "<|x|>"]}, r"user-defined symbols ('\ue001', '<|x|>')"),
        ({"normalization_rule_name": "nmt_nfkc_cf"}, "normaliser that changes letters"),
        ({"normalization_rule_name": "nfkc_cf"}, "normaliser that changes letters"),
        ({"remove_extra_whitespaces": False}, "keeps a document's leading spaces"),
        ({"add_dummy_prefix": True, "treat_whitespace_as_suffix": True}, "puts its spaces elsewhere"),
    ],
)
def test_unsuitable_tokenizers_are_refused_before_any_work(tmp_path, stories, monkeypatch, capsys, changes, message):
    model = bad_model(tmp_path, **changes)
    monkeypatch.setattr(prepare, "split_documents", lambda *args: pytest.fail("documents were read"))
    run("text", stories, "--val-docs", 5, "--tokenizer", model, "--out", tmp_path / "out", code=2)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "out").exists()


def test_published_tokenizers(real_text, tmp_path, stories, capsys):
    for name in ("fineweb_1024_bpe.model", "fineweb_8192_bpe.model"):
        prepare.check_tokenizer(real_text / name)
    caseops = real_text / "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
    run("text", stories, "--val-docs", 5, "--tokenizer", caseops, "--out", tmp_path / "out")
    assert "8192 pieces, text in caseops_after" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# INPUTS
# -----------------------------------------------------------------------------


def test_every_kind_of_input_and_folders_give_the_same_documents(tmp_path, model):
    texts = [story(i) for i in range(12)]
    folder = tmp_path / "docs"
    (folder / "deeper").mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", texts[:3])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(write_jsonl(tmp_path / "b.jsonl", texts[3:6]).read_bytes()))
    frames = [zstandard.ZstdCompressor().compress(write_jsonl(tmp_path / "c", [t]).read_bytes()) for t in texts[6:9]]
    (folder / "c.jsonl.zst").write_bytes(b"".join(frames))
    for i in (9, 10, 11):
        (folder / "deeper" / f"{i:02d}.txt").write_text(texts[i], "utf-8")
    (folder / "notes.md").write_text("not an input")
    run("text", folder, "--val-docs", 2, "--tokenizer", model, "--out", tmp_path / "out")
    assert split_texts(tmp_path / "out", "val") + split_texts(tmp_path / "out", "train") == [
        " ".join(text.split()) for text in texts
    ]


def test_zst_lines_survive_any_read_size(tmp_path, monkeypatch):
    lines = [b"line %d" % i for i in range(500)]
    frames = [zstandard.ZstdCompressor().compress(b"\n".join(part) + b"\n") for part in (lines[:200], lines[200:])]
    (tmp_path / "a.zst").write_bytes(b"".join(frames))
    monkeypatch.setattr(prepare, "READ_BYTES", 5)
    assert [line for line in prepare.zst_lines(tmp_path / "a.zst") if line] == lines


def test_another_text_field(tmp_path, model):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"body": story(i), "text": 3}) + "\n" for i in range(4)))
    run("text", source, "--val-docs", 1, "--text-field", "body", "--tokenizer", model, "--out", tmp_path / "out")
    assert len(split_texts(tmp_path / "out", "train")) == 3


def test_parquet(tmp_path, model, capsys):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [story(i) for i in range(6)]}), tmp_path / "in.parquet")
    run("text", tmp_path / "in.parquet", "--val-docs", 2, "--tokenizer", model, "--out", tmp_path / "out")
    assert len(split_texts(tmp_path / "out", "train")) == 4
    run("text", tmp_path / "in.parquet", "--val-docs", 2, "--text-field", "no", "--out", tmp_path / "out2", code=2)
    assert "no text field 'no'" in capsys.readouterr().err


def test_rows_without_a_text_are_left_out_and_counted(tmp_path, model, capsys):
    source = write_jsonl(tmp_path / "good.jsonl", [story(i) for i in range(400)])
    good = source.read_bytes()
    run("text", source, "--val-docs", 2, "--tokenizer", model, "--workers", 1, "--out", tmp_path / "good")
    wanted = {name: data for name, data in contents(tmp_path / "good").items() if name != "manifest.json"}
    deep = b"[" * 100_000
    rows = {
        "null": (b'{"text": null}', "{}:201: the field 'text' is not a string but null"),
        "number": (b'{"text": 5}', "the field 'text' is not a string but int"),
        "list": (b"[1]", "a JSON object with a 'text' field was expected"),
        "no field": (b'{"body": "x"}', "no text field 'text' (fields: 'body'); name it with --text-field"),
        "no JSON": (b'{"text": "x', "not a line of JSON"),
        "deep": (deep, "JSON that is nested too deep"),
        "deep in a field": (b'{"text": "x", "y": ' + deep, "JSON that is nested too deep"),
        "bytes": (b'{"text": "caf\xe9 au lait"}', "not a line of JSON ('utf-8' codec"),
        "digits": (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "not a line of JSON"),
    }
    lines = good.splitlines(keepends=True)
    for name, (row, message) in rows.items():
        source = tmp_path / f"{name}.jsonl"
        source.write_bytes(b"".join([*lines[:200], row + b"\n", *lines[200:]]))
        out = tmp_path / name
        run("text", source, "--val-docs", 2, "--tokenizer", model, "--workers", 1, "--out", out)
        manifest = json.loads((out / "manifest.json").read_text())
        assert {name: data for name, data in contents(out).items() if name != "manifest.json"} == wanted
        assert manifest["dropped"] == {"duplicates": 0, "empty": 0, "unreadable": 1}
        said = capsys.readouterr().out
        assert message.format(source) in said and "1 rows without a text" in said
        assert "left out: 1 of 401 rows, which hold no text; the first: " in said

        run("text", source, "--val-docs", 2, "--tokenizer", model, "--strict", "--out", tmp_path / "strict", code=2)
        assert capsys.readouterr().err.startswith(f"error: {source}:201: ")
        assert not (tmp_path / "strict").exists()


def test_a_wrong_field_is_found_without_reading_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "HOPELESS_ROWS", 10)
    (tmp_path / "in.jsonl").write_text('{"body": "x"}\n' * 10 + '{"text": "x"}\n' * 10_000)
    rows = prepare.read_documents([tmp_path / "in.jsonl"], "text", strict=False)
    with pytest.raises(prepare.UserError, match="none of the first 10 rows holds a text.*--text-field"):
        list(rows)


def test_lines_of_utf_16_are_not_guessed_at(tmp_path, stories, capsys):
    source = tmp_path / "utf16.jsonl"
    source.write_bytes(stories.read_text().encode("utf-16"))
    run("text", source, "--val-docs", 2, "--out", tmp_path / "out", code=2)
    assert "61 of 61 rows hold no text" in capsys.readouterr().err
    source.write_bytes(b"\xef\xbb\xbf" + stories.read_bytes())  # but a mark that says UTF-8 is nothing
    assert list(prepare.read_documents([source], "text", strict=True)) == [story(i) for i in range(60)]


def test_parquet_rows(tmp_path):
    import pyarrow
    from pyarrow import parquet

    def rows(column) -> list:
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / "in.parquet")
        return list(prepare.file_rows(tmp_path / "in.parquet", "text"))

    where = f"{tmp_path / 'in.parquet'}: row"
    offsets, broken = pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xff")
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, broken])
    good, null, bytes_ = rows(pyarrow.concat_arrays([pyarrow.array(["a", None]), bad]))
    assert good == "a"
    assert null.reason == f"{where} 2: the field 'text' is not a string but null"
    assert bytes_.reason.startswith(f"{where} 3 is not UTF-8")
    assert rows(pyarrow.array(["a", "b"], pyarrow.large_string())) == ["a", "b"]
    assert rows(pyarrow.array(["a", "b"]).dictionary_encode()) == ["a", "b"]
    for column, kind in (([1], "int"), ([["a"]], "list"), ([{"a": "b"}], "dict"), ([b"a"], "bytes")):
        assert rows(column)[0].reason == f"{where} 1: the field 'text' is not a string but {kind}"
    whole = (tmp_path / "in.parquet").read_bytes()
    for damaged in (b"", whole[:-50], whole[:4] + b"\xff" * 60 + whole[64:]):
        (tmp_path / "in.parquet").write_bytes(damaged)
        with pytest.raises(prepare.UserError, match="cannot read .*in.parquet: "):
            list(prepare.file_rows(tmp_path / "in.parquet", "text"))


def test_a_folder_is_read_as_its_owner_sees_it(tmp_path, monkeypatch, capsys):
    folder, elsewhere = tmp_path / "docs", tmp_path / "elsewhere"
    (folder / ".git").mkdir(parents=True)
    elsewhere.mkdir()
    for path in (folder / "a.txt", folder / ".b.txt", folder / ".git" / "c.txt", elsewhere / "d.txt", folder / "e.md"):
        path.write_text("text")
    (folder / "d.jsonl").mkdir()  # a folder after all
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again").symlink_to(folder)
    assert prepare.input_files([folder]) == [folder / "a.txt", folder / "linked" / "d.txt"]
    assert capsys.readouterr().out == f"{folder}: left out 2 hidden files or folders, such as .b.txt\n"
    assert prepare.input_files([folder / ".b.txt"]) == [folder / ".b.txt"]  # named, it is meant

    for broken in ("f.jsonl", "more"):
        (folder / broken).symlink_to(tmp_path / "nowhere")
        with pytest.raises(prepare.UserError, match=f"{broken} is a link to nothing"):
            prepare.input_files([folder])
        (folder / broken).unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder / "a.txt")
    with pytest.raises(prepare.UserError, match="a.txt: permission denied"):
        prepare.input_files([folder])

    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(prepare.UserError, match="cannot read .*docs: Permission denied"):
        prepare.input_files([folder])


def test_zst_of_a_wide_window(tmp_path):
    # As `zstd --long=28` writes it; decoders take 27 if they are not told otherwise.
    wide = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    line = json.dumps({"text": "word " * 20}).encode() + b"\n"
    frame = zstandard.ZstdCompressor(compression_params=wide).compressobj()  # of unknown size, so the window counts
    (tmp_path / "in.jsonl.zst").write_bytes(frame.compress(line) + frame.flush())
    assert list(prepare.read_documents([tmp_path / "in.jsonl.zst"], "text", strict=True)) == ["word " * 20]


def test_parquet_without_pyarrow_is_one_clear_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "in.parquet").write_bytes(b"PAR1")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else find_spec(name))
    run("text", tmp_path / "in.parquet", "--val-docs", 1, "--out", tmp_path / "out", code=2)
    assert "a .parquet input needs pyarrow, which is not installed: pip install pyarrow" in capsys.readouterr().err


# -----------------------------------------------------------------------------
# ERRORS AND ATOMICITY
# -----------------------------------------------------------------------------


def make_bad_inputs(folder: Path) -> None:
    write_jsonl(folder / "good.jsonl", [story(i) for i in range(5)])
    good = (folder / "good.jsonl").read_bytes()
    (folder / "json.jsonl").write_bytes(good + b"{not json\n")
    (folder / "list.jsonl").write_bytes(good + b"[1]\n")
    (folder / "number.jsonl").write_bytes(good + b'{"text": 5}\n')
    (folder / "field.jsonl").write_bytes(good + b'{"body": "x"}\n')
    (folder / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(good)[:-20])
    (folder / "cut.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(good)[:-1])
    (folder / "bad.jsonl.zst").write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(good)[:-1] + b"?")
    (folder / "none.jsonl").write_bytes(b"\n")
    (folder / "page.html").write_text("x")
    (folder / "empty").mkdir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{d}/missing.jsonl --val-docs 1 --out {d}/out", "missing.jsonl does not exist"),
        ("{d}/page.html --val-docs 1 --out {d}/out", "page.html: inputs are"),
        ("{d}/empty --val-docs 1 --out {d}/out", "in the folder"),
        ("{d}/json.jsonl --val-docs 1 --out {d}/out", "json.jsonl:6: not a line of JSON"),
        ("{d}/list.jsonl --val-docs 1 --out {d}/out", "list.jsonl:6: a JSON object"),
        ("{d}/number.jsonl --val-docs 1 --out {d}/out", "number.jsonl:6: the field 'text' is not a string"),
        ("{d}/field.jsonl --val-docs 1 --out {d}/out", "field.jsonl:6: no text field 'text' (fields: 'body')"),
        ("{d}/latin.txt --val-docs 1 --out {d}/out", "latin.txt is not UTF-8"),
        ("{d}/cut.jsonl.gz --val-docs 1 --out {d}/out", "cannot read {d}/cut.jsonl.gz"),
        ("{d}/cut.jsonl.zst --val-docs 1 --out {d}/out", "cannot read {d}/cut.jsonl.zst"),
        ("{d}/bad.jsonl.zst --val-docs 1 --out {d}/out", "cannot read {d}/bad.jsonl.zst"),
        ("{d}/good.jsonl --val-docs 5 --out {d}/out", "too few documents for --val-docs 5"),
        ("{d}/none.jsonl --val {d}/good.jsonl --out {d}/out", "no training documents"),
        ("{d}/good.jsonl --val {d}/none.jsonl --out {d}/out", "no validation documents"),
        ("{d}/good.jsonl --val-docs 1 --out {d}/page.html/out", "cannot write {d}/page.html/out"),
        ("{d}/good.jsonl --val-docs 1 --out {d}/empty", "empty exists already"),
        ("{d}/good.jsonl --val-docs 1 --out {d}/out --vocab-size 200", "cannot train 200 pieces"),
        ("{d}/good.jsonl --val-docs 1 --out {d}/out --tokenizer {d}/no.model", "no.model does not exist"),
        ("{d}/good.jsonl --val-docs 1 --out {d}/out --tokenizer {d}/page.html", "page.html is not a SentencePiece"),
        ("{d}/good.jsonl --val-docs 1 --val {d}/good.jsonl --out {d}/out", "not allowed with"),
        ("{d}/good.jsonl --out {d}/out", "--val-docs --val is required"),
        ("{d}/good.jsonl --val-docs 0 --out {d}/out", "above 0"),
        ("{d}/good.jsonl --val-docs 1" + 5000 * "0" + " --out {d}/out", "at most 18 digits"),
        ("{d}/good.jsonl --val-docs 1 --vocab-size 65537 --out {d}/out", "65537 is above 65,536"),
        ("{d}/good.jsonl --val-docs 1 --shard-tokens 2147483648 --out {d}/out", "above 2,147,483,647"),
        ("{d}/good.jsonl --val-docs 1 --out /", "/ exists already"),
        ("{d}/good.jsonl --val-docs 1 --out {d}/\udcff", "SentencePiece opens UTF-8 paths only"),
        ("/dev/null --val-docs 1 --out {d}/out", "/dev/null is no regular file"),
        ("{d}/good.jsonl --val-docs 1", "required: --out"),
        ("{d}/good.jsonl --val-docs 1 --out {d}/out --vocab-size 300 --tokenizer x", "not allowed with"),
    ],
)
def test_what_the_user_can_fix_is_one_line(tmp_path, capfd, arguments, message):
    make_bad_inputs(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    run("text", *(word.format(d=tmp_path) for word in arguments.split()), code=2)
    err = capfd.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message.format(d=tmp_path) in err
    assert sorted(tmp_path.rglob("*")) == before  # nothing is left, neither result nor temporary folder


def test_an_error_stays_one_line_whatever_the_path(tmp_path, capsys):
    run("text", tmp_path / "new\nline\x1b.jsonl", "--val-docs", 1, "--out", tmp_path / "out", code=2)
    assert capsys.readouterr().err == f"error: input {tmp_path}/new\\nline\\x1b.jsonl does not exist\n"


def test_an_input_whose_name_is_not_utf_8(tmp_path, model):
    source = tmp_path / os.fsdecode(b"raw\xff.jsonl")
    write_jsonl(source, [story(i) for i in range(4)])
    run("text", source, "--val-docs", 1, "--tokenizer", model, "--out", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text("utf-8"))
    assert manifest["options"]["inputs"][0]["name"] == source.name


def test_existing_output_is_not_touched(tmp_path, stories, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    run("text", stories, "--val-docs", 5, "--out", tmp_path / "out", code=2)
    assert "exists already" in capsys.readouterr().err
    assert contents(tmp_path / "out") == {"precious": b"mine"}


@pytest.mark.parametrize("step", ["write_shards", "train_tokenizer", "describe", "fsync"])
def test_a_failure_at_any_step_leaves_nothing(tmp_path, stories, monkeypatch, capsys, step):
    def fail(*args):
        assert list(tmp_path.glob(".out.preparing")) and not (tmp_path / "out").exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, step, fail)
    run("text", stories, "--val-docs", 5, "--vocab-size", 300, "--out", tmp_path / "out", code=2)
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [stories]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_run_leaves_no_data_set(tmp_path, real_text, number, code, capsys):
    out = tmp_path / "out"
    command = [sys.executable, ROOT / "data" / "prepare.py", "text", real_text / "webmix_train.jsonl.gz", "--val-docs",
               "9", "--tokenizer", real_text / "fineweb_1024_bpe.model", "--workers", "2", "--out", out]  # fmt: skip
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell starts background jobs with SIGINT ignored, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.preparing/fineweb_train_000000.bin")) and time.monotonic() < deadline:
        time.sleep(0.01)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: the workers get it too
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=120)  # until nobody can write to stderr any more: no worker is left
    assert process.returncode == code
    assert not out.exists()
    if number != signal.SIGKILL:
        assert err == "interrupted: nothing incomplete is under a final name\n"
        assert list(tmp_path.iterdir()) == []
        return
    assert [path.name for path in tmp_path.iterdir()] == [".out.preparing"]
    source = write_jsonl(tmp_path / "in.jsonl", [story(i) for i in range(9)])
    run("text", source, "--val-docs", 2, "--vocab-size", 300, "--workers", 1, "--out", out)
    assert "files of a run that was killed from" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out"]
    assert len(split_texts(out, "train")) == 7 and len(list(out.iterdir())) == 5  # nothing of the other run


def test_of_two_runs_into_one_folder_the_second_gets_a_line(tmp_path, stories, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "LOCK_SECONDS", 0.0)
    again = ("text", stories, "--val-docs", 5, "--vocab-size", 300, "--out", tmp_path / "out")
    with prepare.building(tmp_path / "out") as folder:
        (folder / "train.spool").write_bytes(b"of the first")
        run(*again, code=2)
        assert f"another run is preparing {tmp_path / 'out'}" in capsys.readouterr().err
        assert contents(folder) == {"train.spool": b"of the first"}
    run(*again, code=2)
    assert "exists already" in capsys.readouterr().err
    assert contents(tmp_path / "out") == {"train.spool": b"of the first"}


def test_a_file_system_without_locks(tmp_path, stories, monkeypatch, capsys):
    def flock(*args):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(prepare.fcntl, "flock", flock)
    again = ("text", stories, "--val-docs", 5, "--vocab-size", 300, "--out", tmp_path / "out")
    (tmp_path / ".out.preparing").mkdir()
    (tmp_path / ".out.preparing" / "train.spool").write_bytes(b"of somebody")
    run(*again, code=2)  # it may be alive
    assert "is of another run, live or killed; remove it" in capsys.readouterr().err
    assert contents(tmp_path / ".out.preparing") == {"train.spool": b"of somebody"}
    shutil.rmtree(tmp_path / ".out.preparing")
    run(*again)
    assert not (tmp_path / ".out.preparing").exists()


def test_a_lock_is_not_taken_for_a_folder_that_was_just_renamed(tmp_path):
    (tmp_path / "old").mkdir()
    opened = iter([tmp_path / "old", tmp_path / "new"])  # the first was renamed after it was opened

    def open_next() -> int:
        (tmp_path / "new").mkdir(exist_ok=True)
        return os.open(next(opened), os.O_RDONLY)

    descriptor, locked = prepare.claim(tmp_path / "new", open_next, "here")
    assert locked and os.path.samestat(os.fstat(descriptor), os.stat(tmp_path / "new"))
    os.close(descriptor)


def test_training_a_tokenizer_can_be_interrupted():
    heard = threading.Event()

    def interrupt():  # again where Python dropped the first one: one that comes while it forks may be lost
        pause = 0.5
        while not heard.wait(pause):
            os.kill(os.getpid(), signal.SIGINT)
            pause = 10.0

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    insistent = threading.Thread(target=interrupt)
    insistent.start()
    with pytest.raises(KeyboardInterrupt):
        prepare.in_child(time.sleep, 600)
    heard.set()
    insistent.join()
    signal.signal(signal.SIGINT, before)
    assert not multiprocessing.active_children()
    with pytest.raises(prepare.UserError, match="died, perhaps for lack of memory"):
        prepare.in_child(os._exit, 1)


@pytest.mark.parametrize("step", ["encode_chunk", "fsync"])
def test_an_interrupt_that_python_drops_is_raised_again(tmp_path, stories, model, monkeypatch, capsys, step):
    class Dropped:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    done = getattr(prepare, step)

    def drop(*args):
        Dropped()
        return done(*args)

    monkeypatch.setattr(prepare, step, drop)
    monkeypatch.setattr(prepare, "INTERRUPTED", threading.Event())
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: None)
    before = signal.signal(signal.SIGTERM, prepare.interrupt)
    try:
        run("text", stories, "--val-docs", 5, "--tokenizer", model, "--workers", 1, "--out", tmp_path / "out", code=130)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [stories]


def prepared(command: str, cwd: Path, **environ) -> subprocess.CompletedProcess:
    """`prepare.py <command>` of a shell, which can close and break its streams."""
    script = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'data' / 'prepare.py'))} {command}"
    env = {**os.environ, **environ}
    return subprocess.run(["bash", "-c", script], cwd=cwd, env=env, capture_output=True, text=True, timeout=100)


def test_closed_streams_cost_no_data(tmp_path, stories, model):
    run("text", stories, "--val-docs", 5, "--tokenizer", model, "--out", tmp_path / "wanted")
    ran = prepared(f"text {stories} --val-docs 5 --tokenizer {model} --out \u00f6ut <&- >&- 2>&-", tmp_path)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    assert contents(tmp_path / "\u00f6ut") == contents(tmp_path / "wanted")


def test_streams_that_cannot_be_written(tmp_path, offline):
    shutil.copytree(offline, tmp_path / "\u00f6ut")
    again = "offline --max-bytes 300000 --val-docs 6 --out \u00f6ut"
    ran = prepared(again, tmp_path, PYTHONIOENCODING="ascii")
    assert ran.returncode == 0 and r"DATA_PATH='\xf6ut'" in ran.stdout
    ran = prepared(f"{again} > /dev/full", tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    ran = prepared(f"{again} | true; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    ran = prepared("text missing --val-docs 1 --out out 2>&-", tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")


def test_a_full_disk(tmp_path, stories):
    script = f"ulimit -f 4; exec {sys.executable} {ROOT / 'data' / 'prepare.py'} text {stories} --val-docs 5 --out out"
    ran = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 2 and ran.stderr == "error: no room to write out: File too large; nothing of it was kept\n"
    assert list(tmp_path.iterdir()) == [stories]


def test_without_numpy_it_is_one_line(tmp_path):
    ran = subprocess.run([sys.executable, "-S", "-I", ROOT / "data" / "prepare.py"], capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stderr == "error: numpy is not installed: pip install -r requirements.txt\n"


# -----------------------------------------------------------------------------
# OFFLINE
# -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("offline") / "out"
    run("offline", "--max-bytes", 300_000, "--val-docs", 6, "--out", out)
    return out


def test_offline_repeats_itself_and_notices_damage(offline, capsys):
    again = ("offline", "--max-bytes", 300_000, "--val-docs", 6, "--out", offline)
    before = {p: p.stat().st_mtime_ns for p in offline.iterdir()}
    run(*again)
    assert "already there and intact" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in offline.iterdir()} == before

    run("offline", "--max-bytes", 300_000, "--val-docs", 7, "--out", offline, code=2)
    assert "with other options" in capsys.readouterr().err
    shard = offline / "fineweb_val_000000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2] + b"\0\0")
    run(*again, code=2)
    assert f"{shard} is missing or damaged" in capsys.readouterr().err
    shard.write_bytes(whole)
    documents = offline / "fineweb_val_documents.tsv"
    whole = documents.read_bytes()
    documents.write_bytes(whole.replace(b"\t", b"0\t", 1))
    run(*again, code=2)
    assert f"{documents} is missing or damaged" in capsys.readouterr().err
    documents.write_bytes(whole)
    run(*again)


def test_offline_of_an_earlier_version_is_prepared_anew(offline, tmp_path, capsys):
    shutil.copytree(offline, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    del manifest["validation_documents"]
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    run("offline", "--max-bytes", 300_000, "--val-docs", 6, "--out", tmp_path / "out", code=2)
    assert "by an earlier version, without fineweb_val_documents.tsv; remove" in capsys.readouterr().err
    (tmp_path / "out" / "manifest.json").write_text("[" * 100_000)
    run("offline", "--max-bytes", 300_000, "--val-docs", 6, "--out", tmp_path / "out", code=2)
    assert "without a manifest of a data set" in capsys.readouterr().err


def test_offline_is_deterministic(offline):
    again = offline.with_name("again")
    run("offline", "--max-bytes", 300_000, "--val-docs", 6, "--out", again)
    assert contents(again) == contents(offline)


def test_offline_does_not_take_a_strange_folder_for_its_own(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    run("offline", "--out", tmp_path / "out", code=2)
    assert "without a manifest" in capsys.readouterr().err


def test_offline_documents_are_mixed_and_bounded():
    documents = prepare.offline_documents(prepare.OFFLINE_BYTES)
    sizes = [len(text.encode()) for text in documents]
    assert 4_000_000 < sum(sizes) <= prepare.OFFLINE_BYTES
    assert 100_000 <= sum(sizes[: prepare.OFFLINE_VAL_DOCS]) <= 200_000
    assert sum(len(t.encode()) for t in prepare.offline_documents(100_000)) <= 100_000
    validation = documents[: prepare.OFFLINE_VAL_DOCS]
    sources = list(prepare.library_sources())
    assert len({next((i for i, text in enumerate(sources) if v in text), -1) for v in validation}) > len(validation) / 2
    assert not any("_sysconfigdata" in text and "build_time_vars" in text[:300] for text in documents)


# -----------------------------------------------------------------------------
# DOWNLOADER
# -----------------------------------------------------------------------------


@dataclasses.dataclass
class Repository:
    """A hub with one dataset repository. Large files are LFS files: a redirect to another host serves them."""

    files: dict[str, bytes]
    port: int = 0
    gets: list[tuple[str, str | None, int]] = dataclasses.field(default_factory=list)  # path, Range header, status
    break_at: dict[str, int] = dataclasses.field(default_factory=dict)  # path: where the connection drops, once
    stays_broken: bool = True  # whether a path is refused after its connection was dropped
    ignores_ranges: bool = False
    broken: set[str] = dataclasses.field(default_factory=set)  # paths that are refused
    served: dict[str, bytes] = dataclasses.field(default_factory=dict)  # other bytes than those whose hash is stated
    stated_size: dict[str, int] = dataclasses.field(default_factory=dict)
    busy: set[str] = dataclasses.field(default_factory=set)  # paths that answer 429, once


class Handler(http.server.BaseHTTPRequestHandler):
    """HEAD and GET of /datasets/me/data/resolve/<revision>/<path>, and of /cdn/<path> with ranges."""

    repository: Repository
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Silent."""

    def answer(self, status: int, headers: dict, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        r = self.repository
        if self.path.startswith("/cdn/"):
            return self.cdn(self.path.removeprefix("/cdn/"))
        head, _, rest = self.path.partition("/resolve/")
        if head != "/datasets/me/data":
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        revision, _, path = rest.partition("/")
        if path not in r.files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        assert revision in ("main", "c" * 40)
        headers = {"X-Repo-Commit": "c" * 40}
        if path.endswith(".json"):
            git = hashlib.sha1(b"blob %d\0" % len(r.files[path]) + r.files[path]).hexdigest()
            return self.answer(200, {**headers, "ETag": f'"{git}"'}, r.files[path])
        headers["X-Linked-Etag"] = f'"{hashlib.sha256(r.files[path]).hexdigest()}"'
        headers["X-Linked-Size"] = r.stated_size.get(path, len(r.files[path]))
        return self.answer(302, {**headers, "Location": f"http://localhost:{r.port}/cdn/{path}"})

    def cdn(self, path: str) -> None:
        r = self.repository
        body, wanted = r.served.get(path, r.files[path]), self.headers.get("Range")
        wanted = None if r.ignores_ranges else wanted
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        status = 429 if path in r.busy else 403 if path in r.broken else 206 if wanted else 200
        if self.command == "GET":
            r.gets.append((path, wanted, status))
        if status in (403, 429):
            r.busy.discard(path)
            return self.answer(status, {})
        headers = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if wanted else {}
        if path in r.break_at and self.command == "GET":
            cut = r.break_at.pop(path)
            self.close_connection = True
            r.broken |= {path} if r.stays_broken else set()
            return self.answer(status, {**headers, "Content-Length": len(body) - start}, body[start:cut])
        return self.answer(status, headers, body[start:])


def shard_bytes(tokens: int) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, tokens
    return header.tobytes() + np.array([1, *[5] * (tokens - 1)], dtype="<u2").tobytes()


@pytest.fixture
def hub(model):
    """A repository of two training shards, two validation shards, a tokenizer and the manifest that names it."""
    files = {
        f"datasets/datasets/fineweb10B_sp320/fineweb_{split}_{i:06d}.bin": shard_bytes(tokens)
        for split, i, tokens in (("train", 0, 50_000), ("train", 1, 7), ("val", 0, 900), ("val", 1, 1))
    }
    files["datasets/tokenizers/named.model"] = model.read_bytes()
    files["datasets/manifest.json"] = json.dumps(
        {
            "datasets": [
                {"name": "other", "tokenizer_name": "wrong"},
                {"name": "fineweb10B_sp320", "tokenizer_name": "t", "stats": {"files_train": 2, "files_val": 2}},
            ],
            "tokenizers": [{"name": "t", "model_path": "tokenizers/named.model"}],
        }
    ).encode()
    repository = Repository(files)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("H", (Handler,), {"repository": repository}))
    repository.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield repository
    server.shutdown()
    server.server_close()


def fetch(hub: Repository, out: Path, *args, code: int = 0, port: int | None = None, environ=()) -> str:
    """Runs the downloader in a process of its own; returns stdout, or the one line of stderr where it is to fail."""
    hidden = {"HF_TOKEN", "HF_HUB_OFFLINE", "MATCHED_FINEWEB_REPO_ID", "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX"}
    env = {key: value for key, value in os.environ.items() if key not in hidden and not key.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{port or hub.port}", "HF_HOME": str(out / "hf")}
    env |= {"MATCHED_FINEWEB_REPO_ID": "me/data"} | dict(environ)
    command = ["fineweb", "--variant", "sp320", "--train-shards", "2", "--out", out, *args]
    got, stdout, stderr = forked([str(word) for word in command], env)
    assert got == code, stderr
    if code:
        assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
        return stderr
    assert stderr == ""
    return stdout


def forked(argv: list[str], env: dict[str, str]) -> tuple[int, str, str]:
    """prepare.main in a fork of this process, which has imported torch already; exit code, stdout and stderr.

    huggingface_hub reads its settings when it is imported, so the child imports it anew.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        if not (child := os.fork()):
            code = 70
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
                for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
                    del sys.modules[name]
                os.environ.clear()
                os.environ.update(env)
                code = prepare.main(argv)
                sys.stdout.flush()
            except BaseException:
                traceback.print_exc(file=sys.stderr)
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        out.seek(0)
        err.seek(0)
        return os.waitstatus_to_exitcode(status), out.read().decode(), err.read().decode()


TRAIN0 = "datasets/datasets/fineweb10B_sp320/fineweb_train_000000.bin"


def landed(out: Path) -> dict[str, bytes]:
    """Everything below datasets/ and tokenizers/, as paths in the repository."""
    return {
        f"datasets/{p.relative_to(out)}": p.read_bytes()
        for top in ("datasets", "tokenizers")
        for p in (out / top).rglob("*")
        if p.is_file()
    }


def test_fetch_lands_every_file_then_only_checks_then_repairs(hub, tmp_path):
    printed = fetch(hub, tmp_path)
    wanted = {k: v for k, v in hub.files.items() if k != "datasets/manifest.json"}
    wanted["datasets/datasets/fineweb10B_sp320/manifest.json"] = hub.files["datasets/manifest.json"]
    assert landed(tmp_path) == wanted
    assert "train: 50,007 tokens in 2 shards" in printed and "val: 901 tokens in 2 shards" in printed
    data, tokenizer = tmp_path / "datasets" / "fineweb10B_sp320", tmp_path / "tokenizers" / "named.model"
    assert f"DATA_PATH={data} TOKENIZER_PATH={tokenizer} VOCAB_SIZE=320 python train_gpt.py" in printed

    hub.gets.clear()
    damaged = data / "fineweb_train_000001.bin"
    damaged.write_bytes(damaged.read_bytes()[:-2] + b"\1\1")  # the right size, one wrong token
    fetch(hub, tmp_path)
    assert [Path(path).name for path, _, _ in hub.gets] == ["fineweb_train_000001.bin"]
    assert landed(tmp_path) == wanted


def test_fetch_resumes_a_broken_transfer_in_the_next_run(hub, tmp_path):
    hub.break_at[TRAIN0] = 60_000
    assert "run the command again" in fetch(hub, tmp_path, code=2)
    assert TRAIN0 not in landed(tmp_path)
    assert [len(data) for path, data in landed(tmp_path).items() if path.endswith(".partial")] == [60_000]

    hub.broken.clear()
    hub.gets.clear()
    fetch(hub, tmp_path)
    assert [get for get in hub.gets if get[0] == TRAIN0] == [(TRAIN0, "bytes=60000-", 206)]
    assert landed(tmp_path)[TRAIN0] == hub.files[TRAIN0]
    assert not any(path.endswith(".partial") for path in landed(tmp_path))


def test_fetch_takes_a_dropped_connection_up_again(hub, tmp_path):
    hub.break_at[TRAIN0], hub.stays_broken = 60_000, False
    hub.busy.add("datasets/tokenizers/named.model")
    fetch(hub, tmp_path)  # and says nothing of either on stderr
    assert [get for get in hub.gets if get[0] == TRAIN0] == [(TRAIN0, None, 200), (TRAIN0, "bytes=60000-", 206)]
    assert landed(tmp_path)[TRAIN0] == hub.files[TRAIN0]


def test_fetch_resumes_where_the_server_knows_no_ranges(hub, tmp_path):
    hub.break_at[TRAIN0], hub.stays_broken, hub.ignores_ranges = 60_000, False, True
    fetch(hub, tmp_path)
    assert landed(tmp_path)[TRAIN0] == hub.files[TRAIN0]


def test_fetch_distrusts_a_partial_file(hub, tmp_path):
    hub.break_at[TRAIN0] = 60_000
    fetch(hub, tmp_path, code=2)
    (partial,) = (tmp_path / "datasets").rglob("*.partial")
    partial.write_bytes(b"x" * 60_000)
    hub.broken.clear()
    assert "wrong size or hash" in fetch(hub, tmp_path, code=2)
    assert not partial.exists() and TRAIN0 not in landed(tmp_path)


@pytest.mark.parametrize("wrong", ["content", "longer", "shorter", "size"])
def test_fetch_refuses_what_the_hub_did_not_promise(hub, tmp_path, wrong):
    whole = hub.files[TRAIN0]
    if wrong == "size":
        hub.stated_size[TRAIN0] = len(whole) + 2
    else:
        hub.served[TRAIN0] = {"content": whole[:-1] + b"\7", "longer": whole + b"xx", "shorter": whole[:-2]}[wrong]
    assert "fineweb_train_000000.bin" in fetch(hub, tmp_path, code=2)
    assert TRAIN0 not in landed(tmp_path)

    assert not list(tmp_path.rglob("*.partial"))  # which would stand in the way of the next run


def test_fetch_refuses_a_file_that_is_no_shard(hub, tmp_path):
    hub.files[TRAIN0] = hub.files[TRAIN0][:-2]  # as published, one token fewer than its header says
    assert "fineweb_train_000000.bin" in fetch(hub, tmp_path, code=2)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (TRAIN0, f"me/data has no {TRAIN0}"),
        ("datasets/datasets/fineweb10B_sp320/fineweb_val_000000.bin", "fineweb_val_000000.bin"),
        ("datasets/tokenizers/named.model", "named.model, datasets/tokenizers/fineweb_320_bpe.model"),
    ],
)
def test_fetch_says_which_file_is_missing(hub, tmp_path, gone, message):
    del hub.files[gone]
    assert message in fetch(hub, tmp_path, code=2)
    assert not [path for path in landed(tmp_path) if path.endswith(".bin")]  # known before anything large is fetched


def test_fetch_does_without_a_manifest_and_with_any_variant_name(hub, tmp_path):
    del hub.files["datasets/manifest.json"]
    files = {k.replace("sp320", "sp320_caps_v1_reserved"): v for k, v in hub.files.items() if k.endswith(".bin")}
    model = hub.files["datasets/tokenizers/named.model"]
    hub.files = {k.replace("datasets/", "", 1): v for k, v in files.items()}  # at the root: an empty prefix
    hub.files["tokenizers/fineweb_320_bpe_caps_v1_reserved.model"] = model
    printed = fetch(hub, tmp_path, "--variant", "sp320_caps_v1_reserved", "--remote-prefix", "")
    assert "val: 901 tokens in 2 shards" in printed
    assert (tmp_path / "tokenizers" / "fineweb_320_bpe_caps_v1_reserved.model").read_bytes() == model


def test_fetch_without_network_repository_or_room_is_one_line(hub, tmp_path):
    assert "cannot reach me/data" in fetch(hub, tmp_path / "a", code=2, port=9)
    assert "no dataset repository no/body" in fetch(hub, tmp_path / "b", "--repo-id", "no/body", code=2)
    assert "2 training shards; --train-shards 3" in fetch(hub, tmp_path / "c", "--train-shards", "3", code=2)
    (tmp_path / "file").write_text("")
    assert "cannot write" in fetch(hub, tmp_path / "d", "--out", tmp_path / "file" / "out", code=2)


def test_fetch_compares_the_published_bytes_of_each_document(hub, tmp_path):
    counts = np.array([0, *[1] * 899], "<u2").tobytes()
    for i, data in enumerate((counts, bytes(2))):
        header = np.array([20240520, 1, len(data) // 2, *[0] * 253], "<i4").tobytes()
        hub.files[f"datasets/datasets/fineweb10B_sp320/fineweb_val_bytes_{i:06d}.bin"] = header + data
    printed = fetch(hub, tmp_path / "good")
    assert "6 shards" in printed and "val: 901 tokens in 2 shards" in printed and "val: 899 bytes of text" in printed
    hub.files["datasets/datasets/fineweb10B_sp320/fineweb_val_bytes_000000.bin"] = shard_bytes(900)
    err = fetch(hub, tmp_path / "bad", code=2)
    assert "document 1 has 4496 bytes by it and 899 by its ids" in err and err.count("\n") == 1


def test_fetch_refuses_text_that_cannot_be_counted_before_any_shard(hub, tmp_path):
    assert "is of folded text" in fetch(hub, tmp_path / "name", "--variant", "sp8192_casefold", code=2, port=9)
    assert not (tmp_path / "name").exists()
    (tmp_path / "m").mkdir()
    for changes, message in (
        ({"user_defined_symbols": ["\ue001"]}, "user-defined symbols"),
        ({"normalization_rule_name": "nmt_nfkc_cf"}, "normaliser that changes letters"),
    ):
        hub.files["datasets/tokenizers/named.model"] = bad_model(tmp_path / "m", **changes).read_bytes()
        assert message in fetch(hub, tmp_path / "pieces", code=2)
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.partial"))


def test_fetch_beside_another_run_gets_a_line(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "LOCK_SECONDS", 0.0)
    hub.break_at[TRAIN0] = 60_000
    fetch(hub, tmp_path, code=2)
    hub.broken.clear()
    (partial,) = (tmp_path / "datasets").rglob("*.partial")
    with partial.open("ab") as sink:
        fcntl.flock(sink, fcntl.LOCK_EX)
        assert "another run is fetching" in fetch(hub, tmp_path, code=2)
    assert partial.stat().st_size == 60_000
    fetch(hub, tmp_path)
    assert landed(tmp_path)[TRAIN0] == hub.files[TRAIN0]


@pytest.mark.parametrize(
    "setting",
    [
        "HF_ENDPOINT=nonsense",
        "HF_ENDPOINT=http://[",
        "HF_ENDPOINT=http://127.0.0.1:99999",
        "HF_HUB_DOWNLOAD_TIMEOUT=abc",
        "HF_TOKEN=t\u00f6ken",
        "HTTP_PROXY=nonsense",
    ],
)
def test_fetch_with_a_wrong_setting_of_the_hub_is_one_line(hub, tmp_path, setting):
    name, value = setting.split("=")
    err = fetch(hub, tmp_path, code=2, environ={name: value})
    assert "cannot reach me/data" in err or "a setting of the hub (HF_...) is wrong" in err
