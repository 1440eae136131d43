"""The auditor: a clean script passes every check, and whatever breaks a rule fails the check that names it.

A script is an edited copy of train_gpt.py, and every run of it a process of its own, forked from this one, which has
imported torch already.
"""

import contextlib
import hashlib
import inspect
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import ROOT, clean_environ, run_here
from forks import forked
from helpers import build_model, quantize, tiny_hp, weights_of
from mutants import CASED, LORA, MUTANTS, QUEUED
from test_data import train_tokenizer
from test_ranks import torchrun
from test_ttt import PhasedLoRA

import train_gpt as pg
from records import audit
from records.submission.command import Unusable, command
from records.submission.rules import AUDITS

CHECKS = list(AUDITS)
RARE = "Füßchen kosten 10 € – 🦊 sagt: „naïve“ Öfen."  # the tokenizer has byte tokens for most of it
SCRIPT = (ROOT / "train_gpt.py").read_text("utf-8")


class Audited(NamedTuple):
    code: int
    out: str
    err: str
    folder: Path

    @property
    def told(self) -> dict:
        return json.loads((self.folder / "audit.json").read_text("utf-8"))

    @property
    def failed(self) -> dict[str, str]:
        return {name: figure for name, passed, figure in self.lines if passed == "FAIL"}

    @property
    def lines(self) -> list[tuple[str, str, str]]:
        """(check, pass or FAIL, figure)"""
        return re.findall(r"^audit:(\w+) (pass|FAIL) (\S.*)$", self.out, re.MULTILINE)


def audit_here(artifact: Path, *words: object, environ=None, run=forked) -> Audited:
    """The command in this process, its runs of the script in forks."""
    stdout, stderr = io.StringIO(), io.StringIO()
    args = audit.parse([str(word) for word in (artifact, *words)])
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = command(lambda args: audit.audit(args, clean_environ(DEVICE="cpu") | (environ or {}), run))(args)
    return Audited(code, stdout.getvalue(), stderr.getvalue(), artifact.parent)


# -----------------------------------------------------------------------------
# A SMALL ARTIFACT AND ITS SPLIT
# -----------------------------------------------------------------------------


def audit_hp(**changes):
    few = dict(vocab_size=512, num_layers=1, ve_layers="0", val_batch_size=512, ttt_epochs=1, ttt_chunk_tokens=24)
    return tiny_hp(**{**few, **changes})


def write_artifact(path: Path, hp: pg.Hyperparameters, tokenizer: Path) -> Path:
    """Random weights."""
    stored = quantize(weights_of(build_model(hp, hp.eval_seq_len)), hp)
    dtype = pg.activation_dtype(hp.dtype, pg.Ranks(hp, {}).device)
    sha256 = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    header = pg.artifact_header("artifact", hp, dtype, pg.Validation(None, None, "", tokenizer, sha256))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pg.pack_artifact(header, stored, "stored"))
    return path


def split(folder: Path, tiny_data: Path, documents: int = 9, targets: int | None = None) -> Path:
    """A folder with a split of short real documents after one of byte tokens and a leading space; or with the first
    targets of one of them."""
    import sentencepiece

    tokenizer = next(tiny_data.glob("*.model"))
    _, whole = audit.read_split(tiny_data)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    texts = np.split(whole, np.flatnonzero(whole == pg.BOS_ID)[1:])
    texts = [[pg.BOS_ID, model.piece_to_id("▁"), *model.encode(RARE)]] + [text for text in texts if len(text) < 60]
    tokens = np.concatenate(texts[:documents]) if targets is None else texts[1][: targets + 1]
    folder.mkdir(parents=True, exist_ok=True)
    audit.write_split(folder, tokens.astype(np.uint16))
    shutil.copy(tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def short(tiny_data, tmp_path_factory) -> Path:
    return split(tmp_path_factory.mktemp("short") / "data", tiny_data)


@pytest.fixture(scope="module")
def cased(tmp_path_factory) -> Path:
    """A split in CaseOps with its record of the texts, which hold an operator's character and newlines."""
    folder = tmp_path_factory.mktemp("cased")
    told = "The Auditor of NASA reads \ue001 and McDonald's iPhone; "
    texts = [f"Number {i}\n\n{told}" + "so it goes. " * i for i in range(12)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    command = [sys.executable, ROOT / "data/prepare.py", "text", folder / "texts.jsonl", "--val-docs", "5"]
    command += ["--vocab-size", "320", "--caseops", "before", "--workers", "1", "--out", folder / "shards"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "shards"


def test_a_clean_script_passes_on_text_in_caseops(cased, tmp_path):
    ran = audit_settings(tmp_path, cased, "--tokens", 130, vocab_size=320)
    assert ran.failed == {} and ran.code == 0, ran.err
    figures = {name: figure for name, _, figure in ran.lines}
    assert re.fullmatch(r"documents:5 recorded_bytes:\d+", figures["bytes"])


def audit_settings(folder: Path, data: Path, *words: object, script: Path | None = None, **changes: Any) -> Audited:
    """The audit of random weights under these settings, without a log."""
    path = write_artifact(folder / "runs/a/artifact.pgolf", audit_hp(**changes), next(data.glob("*.model")))
    return audit_here(path, "--data", data, *(("--script", script) if script else ()), *words)


def edited(path: Path, name: str) -> Path:
    """A copy of the script with one of the mutants in it."""
    head, end, tail = SCRIPT.rpartition('\nif __name__ == "__main__":\n')
    here = "class Here:\n    __getattr__ = lambda self, name: globals()[name]\n"
    here += "    __setattr__ = lambda self, name, value: globals().__setitem__(name, value)\n"
    mutants = (ROOT / "tests/mutants.py").read_text("utf-8")
    path.write_text(f"{head}\n{mutants}\n{here}\nMUTANTS[{name!r}][0](Here())\n{end}{tail}", "utf-8")
    return path


@pytest.fixture(autouse=True)
def quickly(warm_reader) -> None:
    """What torch loads at a first model is loaded before there are forks."""


# -----------------------------------------------------------------------------
# THE CLEAN SCRIPT
# -----------------------------------------------------------------------------

CLEAN = dict(
    fp32=dict(),
    three_layers=dict(num_layers=3, ve_layers="1,2"),
    bf16=dict(dtype="bf16"),
    documents_apart=dict(document_mask=True),
    without_ttt=dict(ttt_enabled=False),
    without_sliding_windows=dict(ttt_enabled=False, eval_stride=0),
    single_targets=dict(eval_stride=1),
    longer_context=dict(eval_seq_len=32),
    frozen_blocks=dict(ttt_freeze_blocks=1),
    without_neighbours=dict(bigram_vocab_size=0, smear_gate_enabled=False),
    nothing_to_learn=dict(ttt_lr=0.0),
    published_model=dict(value_residual=True, gated_attention=True, num_loops=2, loop_start=0, loop_end=0),
    gated_mlp=dict(mlp_kind="star_relu"),
    scales=dict(ttt_params="scales", ttt_optimizer="adamw"),
    sam_and_an_early_stop=dict(ttt_sam_rho=0.1, ttt_max_chunks=2, ttt_warmup_chunks=1),
    lora=LORA,
    lora_bf16=dict(LORA, dtype="bf16"),
    lora_in_batches=dict(LORA, val_batch_size=32),
    lora_carried=dict(LORA, ttt_lora_reset=False),
    lora_everywhere=dict(LORA, ttt_lora="q,k,v,o,mlp,head", num_layers=2, num_loops=1, loop_start=1, loop_end=1),
    lora_queued=QUEUED,
    lora_queued_stream=dict(QUEUED, ttt_order="stream", ttt_optimizer="adamw", ttt_lr=0.05, ttt_momentum=0.0),
    phases_alone=dict(QUEUED, ttt_lr=0.0, ttt_warm_start_a=False),
    temperature=dict(ttt_temperature=True),
    hedge=dict(hedge_enabled=True),
    hedge_and_temperature=dict(hedge_enabled=True, ttt_temperature=True, ttt_params="scales"),
)


def some_in_every_run(names, quick: str) -> list:
    """Parameters: the quick ones run always, the others with `-m slow`."""
    assert set(quick.split()) <= set(names)
    return [pytest.param(name, id=name, marks=() if name in quick.split() else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some_in_every_run(CLEAN, "fp32 lora hedge without_sliding_windows"))
def test_a_clean_script_passes_every_check(name, short, tmp_path):
    ran = audit_settings(tmp_path, short, "--tokens", 130, **CLEAN[name])
    assert [line[:2] for line in ran.lines] == [(check, "pass") for check in CHECKS], ran.failed or ran.err
    assert ran.code == 0 and ran.told["passed"] is True


@pytest.mark.parametrize("documents", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_slice_of_a_short_split_is_all_of_it_or_four_windows(documents, tiny_data, tmp_path):
    ran = audit_settings(tmp_path, split(tmp_path / "data", tiny_data, documents))
    assert ran.failed == {} and ran.code == 0
    figures = {name: figure for name, _, figure in ran.lines}
    assert figures["documents"].startswith(f"borders:{documents - 1} ")
    assert figures["bytes"].startswith(f"documents:{documents} decoded_bytes:")


@pytest.mark.parametrize("targets", some_in_every_run(["1", "3", "16"], "1"))
def test_a_split_of_one_window_passes(targets, tiny_data, tmp_path):
    data = split(tmp_path / "data", tiny_data, targets=int(targets))
    ran = audit_settings(tmp_path, data, ttt_enabled=False)
    assert ran.failed == {} and ran.code == 0


# -----------------------------------------------------------------------------
# BROKEN SCRIPTS
# -----------------------------------------------------------------------------

QUICK = "trains_on_the_first_token_of_the_next_chunk smears_across_documents behaves_when_it_is_asked_for_scores "
QUICK += "scores_documents_twice_and_keeps_the_better scores_the_easiest_documents_first counts_byte_tokens_as_three"


@pytest.mark.parametrize("name", some_in_every_run(MUTANTS, QUICK))
def test_a_broken_rule_fails_the_check_that_names_it(name, short, request, tmp_path):
    _, settings, caught_by, allowed = MUTANTS[name]
    data = request.getfixturevalue("cased") if name in CASED else short
    script, words = edited(tmp_path / "train_gpt.py", name), ["--tokens", 130]
    path = write_artifact(tmp_path / "runs/a/artifact.pgolf", audit_hp(**settings), next(data.glob("*.model")))
    if caught_by == "identity":
        log_of(path, data, script)
    ran = audit_here(path, "--script", script, "--data", data, *words)
    assert ran.code == 3 and caught_by in ran.failed and set(ran.failed) <= allowed, ran.failed or ran.err


def log_of(path: Path, data: Path, script: Path) -> Path:
    """The log of a run that has scored the artifact, where the auditor looks for it."""
    settings = dict(EVAL_ONLY=1, ARTIFACT_PATH=path, DATA_PATH=data, RUN_ID=path.parent.name, DEVICE="cpu")
    lines: list[str] = []
    ended = forked(script, [], clean_environ(**settings, OUT_DIR=path.parent.parent.parent), lines.append)
    assert ended == 0, lines[-5:]
    return path.parent.parent.parent / "logs" / f"{path.parent.name}.txt"


def test_every_check_can_fail():
    assert {caught_by for *_, caught_by, _ in MUTANTS.values()} == set(CHECKS) - {"clocks", "size"}


METHOD_OF_ONES_OWN = """
class PEEK(PhasedLoRA):
    def plan(self, tokens):
        planned = super().plan(tokens)
        self.scored.append(tokens[-12:])
        return planned

TTT_METHODS["lora"] = NAMED
"""


@pytest.mark.parametrize("method, caught", [("PhasedLoRA", set()), ("PEEK", {"causal"})])
@pytest.mark.slow
def test_a_method_of_ones_own_is_audited_like_the_others(method, caught, short, tmp_path):
    head, end, tail = SCRIPT.rpartition('\nif __name__ == "__main__":\n')
    ours = inspect.getsource(PhasedLoRA).replace("pg.", "").replace("alpha=-0.2", "alpha=-0.4 * self.hp.ttt_lr")
    ours += METHOD_OF_ONES_OWN.replace("NAMED", method)
    (tmp_path / "ours.py").write_text(f"{head}\n{ours}\n{end}{tail}", "utf-8")
    settings = LORA | dict(ttt_lora_reset=False)  # it promises no new beginning with each document
    ran = audit_settings(tmp_path, short, "--tokens", 200, script=tmp_path / "ours.py", **settings)
    assert (caught <= set(ran.failed)) if caught else (ran.failed == {} and ran.code == 0), ran.failed


# -----------------------------------------------------------------------------
# SINGLE CHECKS
# -----------------------------------------------------------------------------


def judged(check: str, **known: Any) -> audit.Finding:
    """A check of a judge who knows no more than this."""
    return getattr(audit.Judge, check)(types.SimpleNamespace(**known))


def counted(tokens: np.ndarray, counts: np.ndarray, tokenizer: Path, record) -> audit.Finding:
    import sentencepiece

    own = dict(scores=dict(one_pass=dict(bytes=int(counts.sum()))))
    full = types.SimpleNamespace(tokens=tokens, bytes=counts)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    return judged("bytes", tokens=tokens, full=full, own=own, tokenizer=model, record=record)


def prepared(texts: list[str]) -> list[tuple[int, str]]:
    """What prepare.py records of these texts, already normal."""
    return [(len(text.encode()), hashlib.sha256(text.encode()).hexdigest()) for text in texts]


def test_bytes_and_text_are_held_against_the_record_of_the_preparation(short):
    import sentencepiece

    tokenizer, (_, tokens) = next(short.glob("*.model")), audit.read_split(short)
    counts = pg.TokenBytes(tokenizer, 512).count(tokens)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    texts = [model.decode(ids[1:].tolist()) for ids in np.split(tokens, np.flatnonzero(tokens == 1)[1:])]
    record = prepared(texts)
    assert counted(tokens, counts, tokenizer, record) == (True, f"documents:9 recorded_bytes:{counts.sum()}")
    short_record = counted(tokens, counts, tokenizer, record[:2])
    assert short_record == (False, "9 documents in the split, 2 in prepare.py's record")
    size, digest = record[1]
    longer, other = [record[0], (size + 1, digest), *record[2:]], [record[0], (size, "0" * 64), *record[2:]]
    assert (
        counted(tokens, counts, tokenizer, longer).figure == f"document 1 counts {size} bytes, its text has {size + 1}"
    )
    assert counted(tokens, counts, tokenizer, other) == (False, "document 1 is not the text that was prepared")


def test_a_record_that_does_not_fit_its_manifest_cannot_be_used(tmp_path):
    manifest, record = tmp_path / "manifest.json", tmp_path / "record.tsv"
    assert audit.prepared_documents(tmp_path) is None
    manifest.write_text("{}")
    assert audit.prepared_documents(tmp_path) is None
    digest = hashlib.sha256(b"3\tabc\n").hexdigest()
    manifest.write_text(json.dumps(dict(validation_documents=dict(file=record.name, sha256=digest))))
    for data, said in ((None, "which is missing"), (b"4\tabc\n", "is not what the manifest says")):
        if data:
            record.write_bytes(data)
        with pytest.raises(Unusable, match=said):
            audit.prepared_documents(tmp_path)
    record.unlink()
    os.mkfifo(record)
    with pytest.raises(Unusable, match="no plain file"):
        audit.prepared_documents(tmp_path)
    record.unlink()
    record.write_bytes(b"3\tabc\n")
    assert audit.prepared_documents(tmp_path) == [(3, "abc")]
    manifest.write_text("{")
    with pytest.raises(Unusable, match="cannot be used"):
        audit.prepared_documents(tmp_path)


def test_operators_of_a_transformed_text_are_caught_where_a_decoder_calls_them_bytes(tmp_path, monkeypatch):
    """A script that takes a tokenizer of case operators counts three bytes for each, and so does the decoder."""
    import sentencepiece

    path, size = train_tokenizer(tmp_path, "case", user_defined_symbols=["\ue001"])
    with pytest.raises(pg.UserError, match="user-defined"):
        pg.TokenBytes(path, size)
    monkeypatch.setattr(pg, "case_transform", lambda *_: "")
    monkeypatch.setattr(pg, "USER_DEFINED", 0)  # an operator is a piece like others
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = ["The Fox jumps over the Dog and the lazy quartz", "My Sphinx of black quartz judge my vow"]
    ids = [[1, *model.encode("".join(f"\ue001{c.lower()}" if c.isupper() else c for c in text))] for text in texts]
    tokens = np.concatenate(ids).astype(np.uint16)
    counts = pg.TokenBytes(path, size).count(tokens)
    trusting = counted(tokens, counts, path, None)
    assert trusting == (True, f"documents:2 decoded_bytes:{sum(map(len, texts)) + 3 * 5}")
    finding = counted(tokens, counts, path, prepared(texts))
    assert finding == (False, f"document 0 counts {len(texts[0]) + 9} bytes, its text has {len(texts[0])}")


@pytest.mark.parametrize(
    "settings, seconds, passes",
    [
        ({}, {}, True),
        ({}, dict(train_seconds=600.5), False),
        ({}, dict(train_seconds=599.0), True),
        (dict(max_wallclock_seconds=0.0), dict(train_seconds=9e5), True),
        ({}, dict(eval_seconds=600.5), False),
        (dict(eval_max_seconds=0.0), dict(eval_seconds=9e5), True),
    ],
)
def test_clocks_are_held_against_both_limits(settings, seconds, passes):
    limits = dict(max_wallclock_seconds=600.0, eval_max_seconds=600.0) | settings
    finding = judged(
        "clocks",
        settings=types.SimpleNamespace(**limits),
        own=dict(mode="train", train_seconds=30.0, eval_seconds=20.0) | seconds,
    )
    assert finding.passed == passes and finding.figure.startswith("train:")


def test_the_cap_holds_for_code_and_artifact_together():
    known = dict(settings=types.SimpleNamespace(artifact_cap_bytes=100), blob=b"x" * 60)
    assert judged("size", script_bytes=b"x" * 40, **known) == (True, "code:40 artifact:60 total:100 cap:100")
    assert not judged("size", script_bytes=b"x" * 41, **known).passed


def test_a_slice_ends_behind_what_is_learned_from_before_its_last_target():
    tokens = np.full(400, 9, dtype=np.uint16)
    tokens[[0, 30, 77, 300]] = 1
    known = types.SimpleNamespace(tokens=tokens, context=16, stride=4, by_document=False)
    n = audit.Judge.slice_length(known, 150, 18)
    windows = pg.plan_windows(n, 16, 4)
    assert [len(pg.targets_of(chunk)) for chunk in pg.plan_chunks(windows, 18)][-2:] == [20, 1]
    known.by_document, known.piece = True, 8
    n = audit.Judge.slice_length(known, 150, 18)
    last = [segment for segment in pg.plan_pieces(pg.plan_documents(tokens[: n + 1]), 16, 8)][-1]
    assert last.windows[:, 1:].tolist() == [[n - 1, n]] and n > 140


def test_a_disturbed_text_keeps_every_bos_and_nothing_else(short):
    _, tokens = audit.read_split(short)
    drawn = np.arange(4, 512)
    known = types.SimpleNamespace(random=np.random.default_rng(0), pool=drawn[:0], drawn=drawn)
    seen = set()
    for first in (10, 50, 200):
        text = audit.Judge.disturbed(known, tokens, np.arange(first, len(tokens) - 1))
        assert (text[: first + 1] == tokens[: first + 1]).all()
        assert ((text[first + 1 :] == tokens[first + 1 :]) == (tokens[first + 1 :] == 1)).all()
        seen |= set(text[first + 1 :].tolist())
    assert len(seen - {1}) > len(drawn) - 5, "rare tokens come, too"


# -----------------------------------------------------------------------------
# WHOLE RUNS AND THE COMMAND
# -----------------------------------------------------------------------------

SMALL = dict(NUM_LAYERS=1, VE_LAYERS=0, ITERATIONS=4, WARMDOWN_ITERS=2, VAL_LOSS_EVERY=0, VAL_BATCH_SIZE=1024)


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory):
    return run_here(tmp_path_factory.mktemp("trained"), tiny_data, **SMALL)


def copy_of(trained, tmp_path: Path) -> Path:
    """The folder of that run, elsewhere; its artifact."""
    shutil.copytree(trained.log.parent.parent, tmp_path / "out")
    return tmp_path / "out/runs/run/artifact.pgolf"


def test_a_run_s_log_tells_what_it_scored_unwatched(trained, tmp_path):
    ran = audit_here(artifact := copy_of(trained, tmp_path), "--tokens", 200)  # data and log are found
    assert ran.code == 0 and [line[:2] for line in ran.lines] == [(check, "pass") for check in CHECKS]
    figures = {name: figure for name, _, figure in ran.lines}
    assert "run:of_the_log" in figures["unwatched"] and figures["clocks"].startswith("train:0.")
    told = ran.told
    assert told["audit"] == {name: dict(passed=True, figure=figure) for name, figure in figures.items()}
    assert (
        told["sha256"]["artifact"]
        == hashlib.sha256(artifact.read_bytes()).hexdigest()
        == trained.result["artifact_sha256"]
    )
    assert told["sha256"]["script"] == trained.result["code_sha256"]
    assert told["sha256"]["log"] == hashlib.sha256(trained.log.read_bytes()).hexdigest()
    counts = [int(n) for n in re.findall(r"^progress:audit (\d+) ", ran.out, re.MULTILINE)]
    assert counts == sorted(counts) and counts[-1] == len(told["seconds_by_text"]) >= 8
    assert ran.out.splitlines()[-1] == f"files: {artifact.parent / 'audit.json'}"


def test_what_a_log_s_run_scored_is_scored_again_by_the_same_kernel(tiny_data, tmp_path):
    """Else a run of another kernel, or a compiled one, would seem to have scored something else."""
    made = run_here(tmp_path / "made", tiny_data, **SMALL, ATTENTION="sdpa", DTYPE="bf16")
    ran = audit_here(copy_of(made, tmp_path), "--tokens", 200)
    figures = {name: figure for name, _, figure in ran.lines}
    assert ran.code == 0 and float(figures["unwatched"].rpartition("nats_off:")[2]) < 1e-6


@pytest.mark.parametrize(
    "dtype, off, mean, passed",
    [
        ("float32", 5e-4, 5e-4, True),
        ("float32", 0.06, 0.0, False),
        ("bfloat16", 0.06, 0.002, True),  # a step of a logit of 16, half of it
        ("bfloat16", 0.06, -0.02, False),  # of many that is no rounding
        ("bfloat16", 0.3, 0.0, False),
        ("bfloat16", math.inf, math.nan, False),
    ],
)
def test_a_score_may_be_off_its_reference_by_what_its_type_rounds(dtype, off, mean, passed):
    sure = np.log(np.full(4, 0.25))
    scored = audit.Pass(nats=-sure, order=np.arange(4), last=sure)
    copy = audit.Copy(np.array([1, 2, 3, 0, 1]), np.ones(4, np.int64), dict(legal_ttt=scored), dict(dtype=dtype))
    of_one_text = dict(base=copy, copies=dict(slice=copy, last=copy), full=None, even=None)
    judge = types.SimpleNamespace(**of_one_text, kind="cpu", as_logged={}, off_reference=off, off_mean=mean)
    assert audit.Judge.normalised(judge).passed is passed


@pytest.mark.parametrize("better", [0.0, 0.01])
def test_the_log_of_other_ranks_has_to_tell_the_same_scores(better, trained, tmp_path):
    artifact, log = copy_of(trained, tmp_path), tmp_path / "out/logs/run.txt"
    head, _, result = log.read_text("utf-8").rstrip().rpartition("\nresult ")
    told = json.loads(result) | dict(world_size=8)
    told["scores"]["final_int6_roundtrip"]["val_loss"] -= better
    log.write_text(f"{head}\nresult {json.dumps(told)}\n", "utf-8")
    ran = audit_here(artifact, "--tokens", 200)
    figures = {name: figure for name, _, figure in ran.lines}
    assert "run:made_here" in figures["unwatched"] and f"nats_off_log:{better:.2g}" in figures["unwatched"]
    assert set(ran.failed) == ({"unwatched"} if better else set()) and ran.code == 3 * bool(better)


def test_a_log_of_something_else_fails_and_leaves_its_findings(trained, tmp_path):
    artifact = copy_of(trained, tmp_path)
    (tmp_path / "other.py").write_text(SCRIPT + "# another one\n", "utf-8")
    log = tmp_path / "out/logs/run.txt"
    tokens = f'"artifact_sha256": "{trained.result["artifact_sha256"]}"'
    log.write_text(log.read_text("utf-8").replace(tokens, tokens.replace('": "', '": "0')), "utf-8")
    ran = audit_here(artifact, "--script", tmp_path / "other.py", "--tokens", 200)
    assert ran.code == 3 and ran.failed == dict(identity="not the log's: script, artifact")
    assert ran.told["passed"] is False and ran.told["audit"]["causal"]["passed"] is True


def test_what_cannot_be_used_is_said_in_one_line(trained, tmp_path, tiny_data):
    artifact = copy_of(trained, tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "garbage.pgolf").write_bytes(b"no artifact")
    (tmp_path / "unfinished.txt").write_text(trained.log.read_text("utf-8").rpartition("result {")[0], "utf-8")
    for words, said in (
        ([tmp_path / "nothing.pgolf"], "nothing.pgolf is no file"),
        ([artifact, "--script", tmp_path / "none.py"], "none.py is no file"),
        ([artifact, "--data", tmp_path / "empty"], "SentencePiece models in"),
        ([artifact, "--data", tmp_path / "empty", "--tokenizer", next(tiny_data.glob("*.model"))], "no fineweb_val_"),
        ([artifact, "--log", tmp_path / "unfinished.txt"], "it is not the log of a whole run"),
        ([tmp_path / "garbage.pgolf", "--data", tiny_data], "not an artifact of this script"),
    ):
        ran = audit_here(*words)
        assert ran.code == 2 and ran.err.startswith("error: ") and ran.err.count("\n") == 1 and said in ran.err, ran.err
    assert not (artifact.parent / "audit.json").exists()


def test_a_script_that_has_no_such_names_or_settings_fails_the_checks_that_need_them(trained, tmp_path):
    artifact = copy_of(trained, tmp_path)
    (tmp_path / "other.py").write_text(SCRIPT.replace("def load_model(", "def load_it("), "utf-8")
    ran = audit_here(artifact, "--script", tmp_path / "other.py", "--tokens", 200)
    assert ran.code == 3 and set(ran.failed) == {"normalised", "once", "documents", "identity"}
    assert "has no attribute 'load_model'" in ran.failed["documents"]


@pytest.mark.slow
def test_the_command_judges_a_packed_script_in_processes_of_its_own(trained, tmp_path):
    packed = tmp_path / "packed.py"
    words = [sys.executable, ROOT / "records/submit.py", "pack", ROOT / "train_gpt.py", "-o", packed]
    subprocess.run(words, check=True, capture_output=True)
    artifact = copy_of(trained, tmp_path)
    words = [sys.executable, ROOT / "records/audit.py", artifact, "--script", packed, "--tokens", "200"]
    ran = subprocess.run(words, env=clean_environ(DEVICE="cpu"), capture_output=True, text=True)
    lines = Audited(ran.returncode, ran.stdout, ran.stderr, artifact.parent)
    assert ran.returncode == 3 and lines.failed == dict(identity="not the log's: script"), ran.stderr
    assert lines.told["sha256"]["script"] == hashlib.sha256(packed.read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, LORA | dict(val_batch_size=64)])
def test_two_ranks_come_to_the_same_verdicts(settings, short, tmp_path):
    hp = audit_hp(**settings)
    path = write_artifact(tmp_path / "runs/a/artifact.pgolf", hp, next(short.glob("*.model")))
    log_of(path, short, ROOT / "train_gpt.py")  # of one process
    command = (path, "--data", short, "--tokens", 130)
    ran, _ = torchrun(2, ROOT / "records/audit.py", tmp_path, 600, args=command, DEVICE="cpu")
    assert ran.returncode == 0, ran.stderr
    two = Audited(0, ran.stdout, "", path.parent)
    assert two.told["world_size"] == 2
    one = audit_here(*command)
    assert [line[:2] for line in two.lines] == [line[:2] for line in one.lines]
    assert "run:made_here" in next(figure for name, _, figure in two.lines if name == "unwatched")


def test_audit_in_the_environment_names_the_command(tiny_data, tmp_path):
    ran = run_here(tmp_path, tiny_data, AUDIT=1)
    assert ran.code == 2 and ran.err.startswith("error: AUDIT") and "records/audit.py ARTIFACT" in ran.err
    assert ran.err.count("\n") == 1 and not ran.log.exists()


def test_what_is_disturbed_last_leaves_whole_blocks_of_every_pass():
    """Where documents are scored the longest first and hear of each other, and the passes before go by the text."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(6, 1, 400).astype(int) + 2
    tokens = np.concatenate(
        [[audit.BOS_ID, *rng.integers(2, 500, length - 1)] for length in lengths] + [[audit.BOS_ID]]
    )
    n, starts = len(tokens) - 1, np.cumsum(lengths) - lengths
    by_length = np.concatenate(
        [np.arange(starts[i], starts[i] + lengths[i]) for i in np.argsort(-lengths, kind="stable")]
    )
    changed = audit.shortest_documents(tokens)
    assert changed.min() > n // 2 and n / 8 < len(changed) <= n / 4
    for order in (np.arange(n), by_length):
        scored = audit.Pass(np.zeros(n, dtype=np.float32), order, np.zeros(1))
        assert sum(audit.whole_blocks(scored, changed, alone=False)) >= 16
    one = np.array([audit.BOS_ID, 5, 6, 7, audit.BOS_ID, 5, 6])
    assert len(audit.shortest_documents(one))
