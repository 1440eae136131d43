"""CaseOps: the transform and its inverse, and the bytes of its tokens, which are those of a plain tokenizer's."""

import gzip
import json
import shutil
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import sentencepiece as spm
from conftest import ROOT, run_here
from hypothesis import strategies as st
from test_data import train_tokenizer
from test_prepare import real_documents, run, split_tokens, story, write_jsonl

sys.path.insert(0, str(ROOT / "data"))
import caseops
import prepare

import train_gpt as pg
from records import sample

LETTERS, MARKS = "abjJTwWAZ  \n\t.'1\ue001\ue002\ue003\ue004", "\u0301\u030a\u030c\u0308\u0331"
NASTY = st.text(st.sampled_from(f"{LETTERS}{MARKS}ＡｊéÉßĲŉ日本\u200b\u00a0\u2581\x00\x7f🎈"))
TEXTS = st.one_of(NASTY, st.text())


@pytest.mark.parametrize(
    "text, after, before",
    [
        ("the cat", "the cat", "the cat"),
        ("The cat", "<T>the cat", "<T>the cat"),
        ("in The end", "in <T>the end", "in<T> the end"),
        ("A NASA I", "<T>a <C>nasa <T>i", "<T>a<C> nasa<T> i"),
        ("an iPhone", "an i<N>phone", "an i<N>phone"),
        ("by McDonald", "by <T>mc<N>donald", "by<T> mc<N>donald"),
        ("two USAs", "two <T>u<N>s<N>as", "two<T> u<N>s<N>as"),
        ("x2Y ÉCole", "x2<T>y É<T>cole", "x2<T>y É<T>cole"),
        ("<T> <E>", "<E><T> <E><E>", "<E><T> <E><E>"),
        ("J\u030c AB\u0301", "J\u030c AB\u0301", "J\u030c AB\u0301"),
    ],
)
def test_the_transform(text, after, before):
    def marked(shown: str) -> str:
        for name, operator in zip("TCNE", caseops.OPERATORS, strict=True):
            shown = shown.replace(f"<{name}>", operator)
        return shown

    assert caseops.transform(marked(text), "after") == caseops.transform(marked(text), "piece") == marked(after)
    assert caseops.transform(marked(text), "before") == marked(before)


@hypothesis.given(text=TEXTS, place=st.sampled_from(caseops.PLACES))
@hypothesis.settings(max_examples=300, deadline=None)
def test_the_inverse_is_exact(text, place):
    assert caseops.restore(caseops.transform(text, place)) == text == caseops.restore(caseops.escape(text))


# -----------------------------------------------------------------------------
# TOKENS AND BYTES
# -----------------------------------------------------------------------------

CASED_STORIES = [f"The Story of McDonald {i}, by NASA\n\n{story(i)}. \ue001 {story(i + 60)}" for i in range(60)]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str | None, Path]:
    """A tokenizer of each place of operators, and a plain one, trained by prepare.py on the same text."""
    folder = tmp_path_factory.mktemp("models")
    source = write_jsonl(folder / "stories.jsonl", CASED_STORIES)
    for place in (None, *caseops.PLACES):
        words = ["--caseops", place] if place else []
        run("text", source, "--val-docs", 5, "--vocab-size", 340, "--shard-tokens", 700, *words, "--workers", 1,
            "--out", folder / str(place))  # fmt: skip
    return {place: next((folder / str(place)).glob("*.model")) for place in (None, *caseops.PLACES)}


def loaded(path: Path) -> tuple[spm.SentencePieceProcessor, pg.TokenBytes]:
    model = spm.SentencePieceProcessor(model_file=str(path))
    return model, pg.TokenBytes(path, model.vocab_size())


def counted(text: str, model: spm.SentencePieceProcessor, counter: pg.TokenBytes) -> tuple[str, int]:
    """The text that its tokens spell, and the bytes that they count."""
    ids = prepare.tokenized(text, model, counter.transform.removeprefix("caseops_") or None)
    spelled = model.decode(ids)
    spelled = caseops.restore(spelled) if counter.transform else spelled
    return spelled, int(counter.count(np.array([pg.BOS_ID, *ids])).sum())


def test_tokenizers_say_by_their_pieces_where_operators_stand(models):
    places = {place: loaded(path)[1].transform for place, path in models.items()}
    assert places == {place: f"caseops_{place}" if place else "" for place in (None, *caseops.PLACES)}
    pieces = {place: [loaded(path)[0].id_to_piece(i) for i in range(12)] for place, path in models.items()}
    assert pieces["piece"][4:10] == [*caseops.OPERATORS, "▁\ue001", "▁\ue002"]
    assert pieces["before"][5:9] == list(caseops.OPERATORS)


@hypothesis.given(text=TEXTS, place=st.sampled_from(caseops.PLACES))
@hypothesis.settings(max_examples=300, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_bytes_and_text_are_those_of_a_plain_tokenizer(models, text, place):
    spelled, size = counted(text, *loaded(models[place]))
    assert (spelled, size) == counted(text, *loaded(models[None])) and size == len(spelled.encode())


@pytest.mark.parametrize("text", ["\ue004" * k + end for k in range(6) for end in ("", "\ue001", "x The")])
def test_escapes_in_a_row_are_counted_from_the_first(text, models):
    for place in caseops.PLACES:
        assert counted(text, *loaded(models[place])) == (text, len(text.encode()))


def test_the_published_tokenizer_counts_the_450_documents_like_the_plain_one(real_text):
    with gzip.open(real_text / "fineweb_val_450.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    case = loaded(real_text / "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model")
    plain = loaded(real_text / "fineweb_1024_bpe.model")
    assert len(texts) == 450
    for text in texts:
        assert counted(text, *case) == counted(text, *plain)


def test_a_tokenizer_of_some_operators_is_refused(tmp_path):
    for symbols in (["\ue001"], [*caseops.OPERATORS, "<sep>"], [*caseops.OPERATORS, "▁\ue003"]):
        with pytest.raises(pg.UserError, match="user-defined symbols"):
            pg.TokenBytes(*train_tokenizer(tmp_path, "other", user_defined_symbols=symbols))


# -----------------------------------------------------------------------------
# PREPARING
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("place", caseops.PLACES)
def test_shards_hold_every_document_once_with_any_number_of_workers(place, models, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK_BYTES", 2000)
    texts = [*CASED_STORIES, *(text.replace("\n\n", "  ") for text in CASED_STORIES[:9])]  # the same, once folded
    source = write_jsonl(tmp_path / "texts.jsonl", texts)
    words = ["text", source, "--val-docs", 5, "--tokenizer", models[place], "--shard-tokens", 700, "--out"]
    for workers in (1, 2):
        run(*words, tmp_path / str(workers), "--workers", workers)
    files = [sorted(p.name for p in (tmp_path / str(n)).iterdir()) for n in (1, 2)]
    assert files[0] == files[1]
    assert all((tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes() for name in files[0])
    manifest = json.loads((tmp_path / "1/manifest.json").read_text())
    assert manifest["tokenizer"]["transform"] == f"caseops_{place}" and manifest["dropped"]["duplicates"] == 9
    model, counter = loaded(models[place])
    documents = {}
    monkeypatch.setattr(prepare, "COUNT_TOKENS", 7)  # parts that end between an escape and its operator
    for split in ("train", "val"):
        tokens = split_tokens(tmp_path / "1", split)
        decoded = model.decode([ids[1:].tolist() for ids in np.split(tokens, np.flatnonzero(tokens == 1)[1:])])
        documents[split] = {caseops.restore(text) for text in decoded}
        entry = manifest["splits"][split]
        assert sum(file["documents"] for file in entry["files"]) == entry["documents"] == len(documents[split])
        assert entry["normalised_bytes"] == sum(len(text.encode()) for text in documents[split])
        shards = [pg.read_shard(p) for p in sorted((tmp_path / "1").glob(f"fineweb_{split}_*.bin"))]
        assert prepare.count_bytes(shards, counter) == entry["normalised_bytes"]
    assert not documents["train"] & documents["val"] and len(documents["train"] | documents["val"]) == 60


def test_parts_may_end_inside_a_row_of_escapes(models, monkeypatch):
    model, counter = loaded(models["after"])
    ids = [pg.BOS_ID, *prepare.tokenized("a" + "\ue004" * 5 + "\ue001 The", model, "after")]
    whole = int(counter.count(np.array(ids)).sum())
    for cut in range(1, len(ids)):
        for part in range(1, 5):
            monkeypatch.setattr(prepare, "COUNT_TOKENS", part)
            shards = [np.array(ids[:cut], np.uint16), np.array(ids[cut:], np.uint16)]
            assert prepare.count_bytes(shards, counter) == whole == 1 + 18 + 4


def test_a_shard_without_its_documents_is_refused(models, tmp_path, monkeypatch, capsys):
    source = write_jsonl(tmp_path / "texts.jsonl", CASED_STORIES)
    finish = prepare.ShardWriter.finish

    def moved(self):
        if self.documents:
            self.documents[-1] += 1 if len(self.documents) % 2 else -1  # the sum stays
        finish(self)

    monkeypatch.setattr(prepare.ShardWriter, "finish", moved)
    run("text", source, "--val-docs", 5, "--vocab-size", 340, "--shard-tokens", 700, "--out", tmp_path / "o", code=2)
    assert "documents instead of" in capsys.readouterr().err


def test_a_tokenizer_that_exists_decides_itself(models, tmp_path, capsys):
    source = write_jsonl(tmp_path / "texts.jsonl", CASED_STORIES)
    words = ["--val-docs", 5, "--tokenizer", models[None], "--caseops", "before", "--out", tmp_path / "out"]
    run("text", source, *words, code=2)
    assert capsys.readouterr().err.startswith("error: --caseops is for a tokenizer to train")


@pytest.mark.parametrize("place", caseops.PLACES)
def test_real_documents_have_as_many_bytes_in_caseops(place, real_text, tmp_path):
    source = write_jsonl(tmp_path / "texts.jsonl", real_documents(real_text, 60))
    sizes = []
    for words in ([], ["--caseops", place]):
        run("text", source, "--val-docs", 20, "--vocab-size", 600, *words, "--out", tmp_path / f"out{len(words)}")
        manifest = json.loads((tmp_path / f"out{len(words)}/manifest.json").read_text())
        sizes.append([manifest["splits"][split]["normalised_bytes"] for split in ("train", "val")])
        sizes[-1].append((tmp_path / f"out{len(words)}" / prepare.VAL_DOCUMENTS_FILE).read_bytes())
    assert sizes[0] == sizes[1]


# -----------------------------------------------------------------------------
# RUNS
# -----------------------------------------------------------------------------


@pytest.fixture
def data(models, tmp_path) -> Path:
    """A copy of the shards in CaseOps, operators before the space."""
    return Path(shutil.copytree(models["before"].parent, tmp_path / "data"))


def score(data: Path, tmp_path: Path, **changes):
    """A run of one step that only scores text; its vocabulary is the data's."""
    vocab_size = loaded(next(data.glob("*.model")))[0].vocab_size()
    return run_here(tmp_path, data, ITERATIONS=1, TTT_ENABLED=0, EVAL_STRIDE=0, VOCAB_SIZE=vocab_size, **changes)


def test_a_run_counts_the_text_and_its_artifact_names_the_transform(data, tmp_path):
    ran = score(data, tmp_path, CASEOPS_ENABLED=1)
    manifest = json.loads((data / "manifest.json").read_text())
    assert ran.code == 0, ran.err
    assert all(s["bytes"] == manifest["validation_documents"]["bytes"] for s in ran.result["scores"].values())
    assert ran.result["transform"] == "caseops_before" and "val_bpb:transform:caseops_before" in ran.out
    header, _ = pg.unpack_artifact((ran.folder / "artifact.pgolf").read_bytes())
    assert header["transform"] == "caseops_before"


@pytest.mark.parametrize("place, value, said", [("before", 0, "in CaseOps by"), (None, 1, "not in CaseOps by")])
def test_caseops_enabled_may_only_agree(place, value, said, models, tmp_path):
    ran = score(models[place].parent, tmp_path, CASEOPS_ENABLED=value)
    assert ran.code == 2 and f"CASEOPS_ENABLED={value}, but the text is {said}" in ran.err


def sidecar(data: Path, change=lambda counts, tokens: counts) -> None:
    """A published count of bytes beside the shards, token by token."""
    shards = pg.find_shards(pg.Hyperparameters(data_path=str(data)), "val")
    tokens, counter = np.concatenate([pg.read_shard(p) for p in shards]), loaded(next(data.glob("*.model")))[1]
    counts = change(np.concatenate([[0], counter.count(tokens)]), tokens)
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(counts)
    (data / "fineweb_val_bytes_000000.bin").write_bytes(header.tobytes() + counts.astype("<u2").tobytes())


def test_a_published_sidecar_has_to_count_what_the_ids_do(data, tmp_path):
    sidecar(data)
    assert score(data, tmp_path / "same").code == 0
    operators = loaded(next(data.glob("*.model")))[1].operator
    sidecar(data, lambda counts, tokens: np.where(operators[tokens], 3, counts))  # by decoded prefixes
    ran = score(data, tmp_path / "credited")
    assert ran.code == 2 and ran.err.count("\n") == 1
    assert "fineweb_val_bytes_000000.bin: document 1 has" in ran.err and "5 of 5 documents differ" in ran.err
    sidecar(data, lambda counts, tokens: counts[:-1])
    assert "the shards hold" in score(data, tmp_path / "short").err


def test_samples_are_of_the_text_before_operators(models, capsys):
    model, _ = loaded(models["before"])
    tokens = prepare.tokenized("By NASA and McDonald, The End", model, "before")
    for start in range(len(tokens)):
        came = list(sample.pieces(model, [pg.BOS_ID, *tokens[:start]], iter(tokens[start:]), cased=True))
        assert "".join(came) == "By NASA and McDonald, The End"
        assert not any(operator in piece for piece in came for operator in caseops.OPERATORS)
