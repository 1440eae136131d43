"""An artifact in two lines of Python, and text from it."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, clean_environ, run_here
from helpers import build_model, random_tokens
from sentencepiece import SentencePieceProcessor

import train_gpt as pg
from records import sample, submit


@pytest.fixture(scope="module")
def ran(tiny_data, tmp_path_factory):
    """A short run of a tiny model."""
    return run_here(tmp_path_factory.mktemp("run"), tiny_data, ITERATIONS=60, TTT_ENABLED=0, LOOP_START=1, LOOP_END=1,
                    NUM_LOOPS=1)  # fmt: skip


@pytest.fixture
def write(ran, tiny_data, capsys):
    """The text that sample.py writes with these arguments, or its one line of error."""
    (tokenizer,) = tiny_data.glob("*.model")

    def write(*arguments: str, artifact=ran.folder / "artifact.pgolf", tokenizer=tokenizer) -> str:
        named = ["--tokenizer", str(tokenizer)] if tokenizer else []
        capsys.readouterr()
        try:
            code = sample.sample(sample.parse([str(artifact), *named, *arguments]))
        except SystemExit as leaving:  # of argparse
            code = leaving.code
        said = capsys.readouterr()
        assert (code, bool(said.out)) in ((0, True), (2, False)) and said.err.count("\n") == (code == 2)
        assert not said.err or said.err.startswith("error: ")
        return said.out or said.err

    return write


# ----------------------------------------------------------------------------------------------------------------------
# load_model
# ----------------------------------------------------------------------------------------------------------------------


def test_the_loaded_model_scores_what_the_run_scored(ran, tiny_data):
    model, hp, header = pg.load_model(ran.folder / "artifact.pgolf", "cpu")
    assert (hp.num_layers, hp.num_loops, hp.eval_seq_len) == (3, 1, 32) and header["kind"] == "artifact"
    tokens = pg.TokenStream(sorted(tiny_data.glob("fineweb_val_*.bin")), hp.vocab_size)
    tokens = torch.from_numpy(tokens.read(0, len(tokens)).astype(np.int64))
    n, context, nats = len(tokens) - 1, hp.eval_seq_len, 0.0
    for first in range(0, n, context):
        start, end = max(0, min(first, n - context)), min(first + context, n)
        with torch.no_grad():
            losses = model(tokens[None, start:end], tokens[None, start + 1 : end + 1])
        nats += losses[0, first - start :].double().sum().item()
    assert nats / n == pytest.approx(ran.result["scores"]["final_int6_roundtrip"]["val_loss"], rel=1e-6)


def test_logits_are_fp32_of_the_whole_vocabulary(ran):
    model, hp, _ = pg.load_model(str(ran.folder / "artifact.pgolf"))
    assert model.logits(torch.tensor([[1, 20, 30]])).shape == (1, 3, hp.vocab_size)
    assert model.logits(torch.tensor([[1]])).dtype == torch.float32


def test_what_cannot_be_loaded_is_a_user_error(ran, tmp_path):
    with pytest.raises(pg.UserError, match="cannot read .*nowhere"):
        pg.load_model(tmp_path / "nowhere")
    (tmp_path / "cut").write_bytes(ran.artifact[:-1])
    with pytest.raises(pg.UserError, match="truncated"):
        pg.load_model(tmp_path / "cut")
    with pytest.raises(pg.UserError, match="DEVICE=tpu must be one of auto, cuda, cpu"):
        pg.load_model(ran.folder / "artifact.pgolf", "tpu")
    if not torch.cuda.is_available():
        with pytest.raises(pg.UserError, match="DEVICE=cuda, but torch sees no CUDA device"):
            pg.load_model(ran.folder / "artifact.pgolf", "cuda")


# ----------------------------------------------------------------------------------------------------------------------
# next_tokens
# ----------------------------------------------------------------------------------------------------------------------


def drawn(model, tokens, n: int = 30, **how) -> list[int]:
    new = sample.next_tokens(model, tokens, 16, **how)
    return [token for token, _ in zip(new, range(n), strict=False)]


def test_temperature_0_and_top_k_1_take_the_likeliest_token_within_the_context():
    model, tokens = build_model(), [pg.BOS_ID, *random_tokens(20)[1:].tolist()]
    expected = list(tokens)
    with torch.no_grad():
        for _ in range(30):
            expected.append(int(model.logits(torch.tensor([expected[-16:]]))[0, -1].argmax()))
    expected = expected[20:]
    if pg.BOS_ID in expected:
        expected = expected[: expected.index(pg.BOS_ID)]
    assert len(expected) > 5
    assert drawn(model, tokens, temperature=0) == drawn(model, tokens, top_k=1, seed=9) == expected
    assert drawn(model, tokens, temperature=5e-324) == expected, "the smallest that there is"


def test_the_model_sees_the_last_tokens_of_its_context(monkeypatch):
    model, tokens, seen = build_model(), [pg.BOS_ID, *range(20, 32)], []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda x: (seen.append(x[0].tolist()), logits(x))[1])
    written = [*tokens, *drawn(model, tokens, 8, never=[pg.BOS_ID])]
    assert len(written) == 21 and seen[:8] == [written[max(0, n - 16) : n] for n in range(13, 21)]


def test_the_seed_decides_and_nothing_else():
    model, tokens = build_model(), [pg.BOS_ID]
    first = drawn(model, tokens, seed=1)
    torch.manual_seed(123)
    assert drawn(model, tokens, seed=1) == first
    assert len({tuple(drawn(model, tokens, seed=seed)) for seed in range(5)}) > 2


def test_draws_follow_the_softmax_at_the_temperature():
    model, tokens = build_model(), [pg.BOS_ID, 9]
    with torch.no_grad():
        p = (model.logits(torch.tensor([tokens]))[0, -1].double() / 0.7).softmax(-1)
    counts = torch.zeros(48, dtype=torch.double)
    for seed in range(300):
        counts[(drawn(model, tokens, 1, temperature=0.7, seed=seed) or [pg.BOS_ID])[0]] += 1
    assert ((counts / 300 - p).abs() < 5 * (p * (1 - p) / 300).sqrt() + 1e-3).all()


def test_banned_tokens_are_never_drawn_and_a_new_document_ends_the_text():
    model, all_but_two = build_model(), [i for i in range(48) if i not in (5, pg.BOS_ID)]
    texts = [drawn(model, [pg.BOS_ID, 7], never=all_but_two, temperature=3.0, seed=seed) for seed in range(20)]
    assert set().union(*texts) == {5} and len({len(text) for text in texts}) > 1 and max(map(len, texts)) < 30


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def test_it_writes_the_prompt_and_goes_on(write, tiny_data):
    text = write("--prompt", "Return the", "--tokens", "40")
    assert text.startswith("Return the") and len(text) > len("Return the") + 20
    assert text == write("--prompt", "Return the", "--tokens", "40") != write("--prompt", "Return the", "--seed", "1")
    assert write("--prompt", "Return the", "--tokens", "0") == "Return the\n"
    assert len(write("--tokens", "40", "--temperature", "0", "--top-k", "3")) > 1, "a prompt is not needed"


def test_characters_of_several_byte_tokens_come_whole(tiny_data):
    (path,) = tiny_data.glob("*.model")
    tokenizer = SentencePieceProcessor(model_file=str(path))
    first, *rest = tokenizer.encode("In € äh")
    assert len(rest) > 6, "the euro sign is three byte tokens"
    came = list(sample.pieces(tokenizer, [pg.BOS_ID, first], iter(rest)))
    assert "".join(came) == "In € äh" and "" in came and not any("\ufffd" in piece for piece in came)
    cut = tokenizer.encode("In €")[:-1]  # inside the sign
    assert "".join(sample.pieces(tokenizer, [pg.BOS_ID], iter(cut))).startswith("In \ufffd")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--temperature", "-1"], "--temperature must be a number from 0"),
        (["--temperature", "nan"], "--temperature must be a number from 0"),
        (["--tokens", "-1"], "--tokens must be a whole number from 0"),
        (["--top-k", "x"], "argument --top-k: invalid int value"),
        (["--seed", str(1 << 64)], "--seed must be a whole number from 0"),
        (["--device", "tpu"], "DEVICE=tpu must be one of"),
        (["--prompt", os.fsdecode(b"a\xff")], "--prompt is no UTF-8 text"),
        (["--length", "3"], "unrecognized arguments: --length 3"),
    ],
)
def test_what_it_cannot_use_is_one_line(write, arguments, message):
    assert message in write(*arguments)


def test_another_tokenizer_is_refused(write, ran, tmp_path):
    other = tmp_path / "other.model"
    other.write_bytes(b"no tokenizer")
    assert "is not the tokenizer that this artifact was made with" in write(tokenizer=other)
    assert "nowhere.model: No such file" in write(tokenizer=tmp_path / "nowhere.model")
    assert "not an artifact of this script" in write(artifact=other)


def test_the_tokenizer_is_found_by_its_hash(write, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "ROOT", tmp_path)
    assert "name it with --tokenizer FILE" in write(tokenizer=None)
    (path,), folder = tiny_data.glob("*.model"), tmp_path / "data" / "datasets" / "mine"
    folder.mkdir(parents=True)
    (folder / "a.model").write_bytes(b"another")
    (folder / "b.model").symlink_to("nowhere")
    shutil.copy(path, folder / "c.model")
    assert write("--prompt", "Return", tokenizer=None).startswith("Return")


def test_it_runs_as_a_file_into_a_pipe_that_closes(ran, tiny_data):
    (tokenizer,) = tiny_data.glob("*.model")
    artifact = ran.folder / "artifact.pgolf"
    command = f"{sys.executable} records/sample.py {artifact} --tokenizer {tokenizer} --prompt Return | head -c 6"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=clean_environ(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Return", "")
    assert "sample" not in submit.COMMANDS
