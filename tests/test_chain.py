"""The whole run on a tiny model: train, average, quantize, write, read back, score, adapt and score."""

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_ENV, Ran, clean_environ, run_here

import train_gpt as pg

# -----------------------------------------------------------------------------
# ONE RUN, AS A USER STARTS IT
# -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(tiny_data, tmp_path_factory) -> Ran:
    """A run in a folder that holds nothing but a copy of train_gpt.py; everything else is at its default place."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copy(ROOT / "train_gpt.py", folder)
    environ = clean_environ(**TINY_ENV, DATA_PATH=tiny_data, RUN_ID="first", SAVE_WEIGHTS=1)
    command = [sys.executable, "-B", "train_gpt.py"]
    ran = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")
    return Ran(0, ran.stdout, ran.stderr, folder / "runs" / "first", folder / "logs" / "first.txt")


@pytest.fixture(scope="module")
def source() -> bytes:
    return (ROOT / "train_gpt.py").read_bytes()


def console(chain: Ran) -> list[str]:
    return chain.out.splitlines()


def scores(ran: Ran) -> dict:
    return {name: score for name, score in ran.result["scores"].items() if not name.startswith("float_")}


MS, BPB = r"\d+ms", r"val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4}"
EXACT = r"val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}"
IN_ORDER = [
    r"code_sha256:[0-9a-f]{64} settings_hash:[0-9a-f]{16}",
    r"torch:\S+ cuda:\S+ python:\S+ device:cpu .+",
    r"threads:\d+ omp_wait_policy:\S+ spin:\S+",
    r"setting:MODEL_DIM=32",
    r"seed:1337",
    r"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=\S+\.model",
    r"train_loader:dataset:shards train_shards:3",
    r"train_loader:fingerprint:[0-9a-f]{64} .*",
    r"val_loader:shards pattern=\S+fineweb_val_\*\.bin tokens:\d+",
    r"val_loader:fingerprint:[0-9a-f]{64} .*",
    r"model_params:\d+",
    r"world_size:1 grad_accum_steps:1",
    r"warmup_step:1/1",
    rf"step:1/12 train_loss:\d+\.\d{{4}} train_time:{MS} step_avg:\d+\.\d{{2}}ms",
    rf"step:6/12 {BPB} train_time:{MS} step_avg:\d+\.\d{{2}}ms",
    r"late_qat:enabled step:6 scale:0\.5455",
    r"swa:start step:10",
    r"peak memory allocated: \d+ MiB reserved: \d+ MiB",
    r"export_weights:swa .*",
    r"Serialized model int6\+lzma: \d+ bytes",
    r"Code size: \d+ bytes",
    r"Total submission size int6\+lzma: \d+ bytes",
    rf"step:12/12 {BPB} train_time:{MS} step_avg:\d+\.\d{{2}}ms",
    rf"DIAGNOSTIC post_ema {BPB} eval_time:{MS}",
    rf"final_int6_roundtrip {BPB} eval_time:{MS}",
    rf"final_int6_roundtrip_exact {EXACT}",
    rf"final_int6_sliding_window {BPB} stride:16 eval_time:{MS}",
    rf"final_int6_sliding_window_exact {EXACT}",
    rf"legal_ttt {BPB} eval_time:{MS}",
    rf"legal_ttt_exact {EXACT}",
    r"result \{.*\}",
]


def test_the_console_has_every_line_in_order_and_once(chain):
    lines = console(chain)
    found = [[i for i, line in enumerate(lines) if re.fullmatch(pattern, line)] for pattern in IN_ORDER]
    missing = [pattern for pattern, where in zip(IN_ORDER, found, strict=True) if len(where) != 1]
    assert missing == []
    assert found == sorted(found)


def test_every_phase_has_its_seconds(chain):
    logged = re.findall(r"^phase:(\w+) seconds:\d+\.\d\d$", chain.out, re.MULTILINE)
    assert {"warmup", "train", "average", "quantize", "compress", "score", "adapt"} <= set(logged)
    assert set(logged) == set(chain.result["phase_seconds"])


def test_no_line_names_a_format_or_step_that_was_not_used(chain):
    assert "zstd" not in chain.out and "stopping_early" not in chain.out and "int7" not in chain.out
    assert [line for line in chain.out.splitlines() if "int8" in line] == re.findall(r"grids: .*", chain.out)


def test_the_file_has_the_console_and_the_source_and_all_settings(chain, source):
    text = chain.log.read_text("utf-8")
    marked = re.search(r"^===== source begin.* =====\n(.*?)\n?^===== source end =====$", text, re.DOTALL | re.MULTILINE)
    assert marked[1].strip() == source.decode().strip()
    before, after = text[: marked.start()], text[marked.end() + 1 :]
    (line,) = re.findall(r"^settings (\{.*\})$", before, re.MULTILINE)
    expected = pg.Hyperparameters.from_env(TINY_ENV | dict(RUN_ID="first", SAVE_WEIGHTS="1"))
    assert json.loads(line) | dict(data_path="") == dataclasses.asdict(expected) | dict(data_path="")
    grids = re.compile(r"^grid:\S+ int[68] step:\S+ entropy:\S+\n", re.MULTILINE)
    assert len(grids.findall(after)) == 3 * 6 + 3 and not grids.search(chain.out)
    assert grids.sub("", before + after).replace(f"settings {line}\n", "") == chain.out
    assert "import " not in chain.out and "settings {" not in chain.out


def test_changed_settings_are_on_the_console_and_no_others(chain):
    named = dict(re.findall(r"^setting:(\w+)=(.*)$", chain.out, re.MULTILINE))
    default = {f.name.upper(): f.default for f in dataclasses.fields(pg.Hyperparameters)}
    given = TINY_ENV | dict(RUN_ID="first", SAVE_WEIGHTS="1")
    hp = pg.Hyperparameters.from_env(given)
    changed = {name for name in given if getattr(hp, name.lower()) != default[name]}
    assert named.keys() - {"DATA_PATH"} == changed
    assert named["SAVE_WEIGHTS"] == "1" and named["NUM_LAYERS"] == "3"


def test_the_submission_size_is_that_of_the_files(chain, source):
    sizes = re.findall(r"^Total submission size \S+: (\d+) bytes$", chain.out, re.MULTILINE)
    assert sizes == [str(len(source) + len(chain.artifact))]
    assert f"Code size: {len(source)} bytes" in console(chain)
    assert f"Serialized model int6+lzma: {len(chain.artifact)} bytes" in console(chain)
    result = chain.result
    assert (result["bytes_code"], result["bytes_artifact"]) == (len(source), len(chain.artifact))
    assert result["bytes_total"] == int(sizes[0]) and result["bytes_cap"] == 16_000_000


def test_the_last_line_is_the_result_and_complete(chain, source):
    label, _, text = console(chain)[-1].partition(" ")
    result = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert label == "result" and result == chain.result
    assert (result["run_id"], result["seed"], result["world_size"], result["steps"]) == ("first", 1337, 1, 12)
    assert result["train_tokens"] == 12 * 384
    assert result["torch"] == torch.__version__ and result["device"].startswith("cpu")
    assert result["code_sha256"] == hashlib.sha256(source).hexdigest()
    assert result["artifact_sha256"] == hashlib.sha256(chain.artifact).hexdigest()
    assert f"settings_hash:{result['settings_hash']}" in chain.out
    for split in ("train", "val"):
        assert f"{split}_loader:fingerprint:{result[f'{split}_fingerprint']} " in chain.out
    assert 0 < result["train_seconds"] < 60 and 0 < result["eval_seconds"] < 60
    assert sum(result["phase_seconds"][phase] for phase in ("train", "average")) == result["train_seconds"]


def test_the_scores_are_those_of_the_log_and_the_headline_is_the_last_legal_one(chain):
    result = chain.result
    assert list(scores(chain)) == ["final_int6_roundtrip", "final_int6_sliding_window", "legal_ttt"]
    for label, score in scores(chain).items():
        assert f"{label}_exact val_loss:{score['val_loss']:.8f} val_bpb:{score['val_bpb']:.8f}" in console(chain)
        nats = score["val_loss"] * score["tokens"]
        assert score["val_bpb"] == pytest.approx(nats / score["bytes"] * 1.4426950408889634, rel=1e-12)
    last = result["scores"]["legal_ttt"]
    assert result["headline"] == dict(label="legal_ttt", val_loss=last["val_loss"], val_bpb=last["val_bpb"])
    assert len({score["val_loss"] for score in scores(chain).values()}) == 3


def test_the_model_learned(chain):
    first = float(re.search(r"^step:1/12 train_loss:(\S+)", chain.out, re.MULTILINE)[1])
    assert chain.result["headline"]["val_loss"] < first - 0.5


def test_nothing_partial_is_left(chain):
    names = {str(p.relative_to(chain.folder)) for p in chain.folder.rglob("*")}
    assert names == {"artifact.pgolf", "result.json", "weights.pgolf"}
    top = chain.folder.parent.parent
    assert {p.name for p in top.iterdir()} == {"train_gpt.py", "logs", "runs"}


# -----------------------------------------------------------------------------
# THE SAME AGAIN, AND OTHERWISE
# -----------------------------------------------------------------------------


@pytest.fixture
def again(tiny_data, tmp_path):
    """Start the tiny run again in this process, with other settings."""
    return lambda **settings: run_here(tmp_path, tiny_data, **settings)


@pytest.fixture
def unpacked(monkeypatch) -> list[bytes]:
    """The files that are unpacked while a test runs, in order."""
    files, unpack = [], pg.unpack_artifact
    monkeypatch.setattr(pg, "unpack_artifact", lambda blob: files.append(blob) or unpack(blob))
    return files


def test_a_seed_repeats_the_artifact_byte_for_byte_and_another_does_not(chain, again):
    same, other = again(run_id="same"), again(run_id="other", SEED=7)
    assert same.artifact == chain.artifact
    assert scores(same) == scores(chain)
    assert same.result["settings_hash"] == other.result["settings_hash"]
    assert other.artifact != chain.artifact
    assert other.code == 0 and scores(other) != scores(chain)


def test_nothing_in_the_artifact_tells_the_run(chain):
    header, _ = pg.unpack_artifact(chain.artifact)
    text = json.dumps(header)
    assert "first" not in text and "1337" not in text and str(ROOT) not in text and "/" not in text


def test_exported_weights_are_the_swa_mean_else_the_ema_else_raw(chain, again):
    assert "export_weights:swa swa_samples:2" in console(chain) and chain.result["exported"] == "swa"
    once = again(run_id="once", SWA_EVERY=11, ITERATIONS=12, VAL_LOSS_EVERY=0)
    assert once.result["exported"] == "ema" and "export_weights:ema" in once.out
    neither = again(run_id="neither", SWA_ENABLED=0, EMA_ENABLED=0, SWA_SOURCE="raw", VAL_LOSS_EVERY=0)
    assert neither.result["exported"] == "raw" and "swa:start" not in neither.out and "post_ema" not in neither.out
    assert len({chain.artifact, once.artifact, neither.artifact}) == 3


def test_saved_weights_are_exported_to_the_same_artifact(chain, again, unpacked):
    ran = again(run_id="re", EXPORT_ONLY=1, WEIGHTS_PATH=chain.folder / "weights.pgolf")
    assert ran.code == 0 and ran.artifact == chain.artifact
    assert ran.result["mode"] == "export_only" and "export_only" in ran.out
    assert ran.result["train_seconds"] == 0 and not ran.result["steps"]
    assert scores(ran) == scores(chain)
    assert unpacked == [(chain.folder / "weights.pgolf").read_bytes(), ran.artifact], "each file once"


def test_what_is_scored_lies_on_the_disk(chain, again, monkeypatch):
    """Another artifact under the name of this one: its scores are the run's."""
    write = pg.write_result
    other = {"artifact.pgolf": chain.artifact}
    monkeypatch.setattr(pg, "write_result", lambda run, path, data: write(run, path, other.get(path.name, data)))
    ran = again(EXPORT_ONLY=1, WEIGHTS_PATH=chain.folder / "weights.pgolf", MLP_BITS=8)
    assert ran.code == 0 and ran.artifact == chain.artifact and scores(ran) == scores(chain)


def test_another_compressor_changes_the_bytes_and_the_label_but_no_score(chain, again):
    pytest.importorskip("zstandard")
    ran = again(EXPORT_ONLY=1, WEIGHTS_PATH=chain.folder / "weights.pgolf", COMPRESSOR="zstd")
    assert ran.artifact != chain.artifact and scores(ran) == scores(chain)
    assert f"Total submission size int6+zstd: {ran.result['bytes_total']} bytes" in ran.out and "lzma" not in ran.out


# -----------------------------------------------------------------------------
# EVAL_ONLY
# -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def validation_only(tiny_data, tmp_path_factory) -> Path:
    """The validation shard and the tokenizer, and no training shards."""
    folder = tmp_path_factory.mktemp("validation")
    for path in (*tiny_data.glob("fineweb_val_*.bin"), *tiny_data.glob("*.model")):
        shutil.copy(path, folder)
    return folder


@pytest.fixture
def evaluate(validation_only, tmp_path, chain):
    """EVAL_ONLY with nothing but the artifact, the validation split and these settings."""
    artifact = chain.folder / "artifact.pgolf"
    number = iter(range(9))

    def run(data: Path = validation_only, path: Path = artifact, **settings) -> Ran:
        run_id = f"eval{next(number)}"
        return run_here(tmp_path, data, run_id, tiny=False, DEVICE="cpu", EVAL_ONLY=1, ARTIFACT_PATH=path, **settings)

    return run


def test_an_artifact_repeats_its_scores_exactly(chain, evaluate, unpacked):
    ran = evaluate(VAL_BATCH_SIZE=TINY_ENV["VAL_BATCH_SIZE"])
    assert (ran.code, ran.err) == (0, "") and unpacked == [chain.artifact]
    assert scores(ran) == scores(chain) and ran.result["headline"] == chain.result["headline"]
    exact = [line for line in console(chain) if "_exact" in line]
    assert [line for line in console(ran) if "_exact" in line] == exact
    assert ran.result["mode"] == "eval_only" and "evaluation:changed" not in ran.out
    assert not (ran.folder / "artifact.pgolf").exists() and ran.result["bytes_total"] == chain.result["bytes_total"]


def test_a_changed_evaluation_is_used_and_named(chain, evaluate):
    ran = evaluate(EVAL_STRIDE=8, TTT_LR=0)
    assert "evaluation:changed EVAL_STRIDE=8 file:16" in console(ran)
    assert "evaluation:changed TTT_LR=0.0 file:0.002" in console(ran)
    assert ran.out.count("evaluation:changed") == 2
    assert scores(ran)["final_int6_roundtrip"] == scores(chain)["final_int6_roundtrip"]
    assert scores(ran)["final_int6_sliding_window"] != scores(chain)["final_int6_sliding_window"]
    assert scores(ran)["legal_ttt"] == scores(ran)["final_int6_sliding_window"]  # learning nothing scores the same


def test_a_contradicting_architecture_is_refused(evaluate):
    ran = evaluate(NUM_LAYERS=4)
    assert ran.code == 2 and ran.err.count("\n") == 1 and not ran.log.exists()
    assert re.match(r"error: NUM_LAYERS=4 contradicts \S+, made with 3; leave it out\n", ran.err)
    assert evaluate(NUM_LAYERS=3, TTT_ENABLED=0, EVAL_STRIDE=0).code == 0  # one that agrees is no contradiction


def test_another_tokenizer_is_refused(evaluate, validation_only, tmp_path):
    other = shutil.copytree(validation_only, tmp_path / "other")
    model = next(Path(other).glob("*.model"))
    model.write_bytes(model.read_bytes() + b"\x9a\x06\x00")  # an unknown field: the same pieces in another file
    ran = evaluate(data=other)
    assert ran.code == 2 and ran.err.startswith("error: ") and ran.err.count("\n") == 1
    assert "is not the" in ran.err and "set TOKENIZER_PATH" in ran.err


def test_files_that_are_no_whole_artifact_are_refused(chain, evaluate, tmp_path):
    def said(path: Path) -> str:
        ran = evaluate(path=path)
        assert (ran.code, ran.out) == (2, "") and ran.err.count("\n") == 1 and str(path) in ran.err
        return ran.err

    assert "holds weights; read it with EXPORT_ONLY=1 WEIGHTS_PATH" in said(chain.folder / "weights.pgolf")
    (tmp_path / "cut").write_bytes(chain.artifact[:-1])
    assert "truncated" in said(tmp_path / "cut")
    (tmp_path / "flipped").write_bytes(chain.artifact[:-9] + bytes([chain.artifact[-9] ^ 1]) + chain.artifact[-8:])
    assert "checksum" in said(tmp_path / "flipped")
    (tmp_path / "empty").write_bytes(b"")
    assert "not an artifact" in said(tmp_path / "empty")
    assert "cannot read" in said(tmp_path / "absent")
    assert "cannot read" in said(tmp_path)


def test_an_artifact_is_no_weights_file(chain, again):
    ran = again(EXPORT_ONLY=1, WEIGHTS_PATH=chain.folder / "artifact.pgolf")
    assert ran.code == 2 and "holds artifact; read it with EVAL_ONLY=1 ARTIFACT_PATH" in ran.err


def test_the_batch_size_of_training_is_no_matter_for_an_evaluation(evaluate, monkeypatch):
    hp = pg.Hyperparameters()
    assert hp.train_batch_tokens % (5 * 32)
    monkeypatch.setattr(pg.Ranks, "__init__", lambda *_: (_ for _ in ()).throw(pg.UserError("got this far")))
    assert evaluate(WORLD_SIZE=5, RANK=0, LOCAL_RANK=0).err == "error: got this far\n"


def test_a_context_that_does_not_divide_the_default_batch_makes_a_whole_run(again):
    ran = again(TRAIN_SEQ_LEN=40, TRAIN_BATCH_TOKENS=400, ITERATIONS=2, VAL_LOSS_EVERY=0, TTT_ENABLED=0, EVAL_STRIDE=0)
    assert (ran.code, ran.err) == (0, "")


# -----------------------------------------------------------------------------
# LIMITS
# -----------------------------------------------------------------------------

QUICK = dict(ITERATIONS=3, VAL_LOSS_EVERY=0, TTT_ENABLED=0, EVAL_STRIDE=0)


def test_a_submission_over_the_cap_is_scored_and_exits_with_3(again, source):
    ran = again(ARTIFACT_CAP_BYTES=len(source) + 1000, **QUICK)
    assert ran.code == 3 and ran.result["headline"]["label"] == "final_int6_roundtrip"
    assert console(ran)[-1].startswith("result {")
    over = len(ran.artifact) - 1000
    assert f"limit: code and artifact are {len(source) + len(ran.artifact)} bytes, {over} over " in ran.out
    fits = again(run_id="fits", ARTIFACT_CAP_BYTES=len(source) + len(ran.artifact), **QUICK)
    assert fits.code == 0 and "limit:" not in fits.out


@pytest.mark.parametrize("settings", [dict(MATRIX_LR="1e12"), dict(SCALAR_LR="1e12")], ids=lambda s: next(iter(s)))
def test_a_loss_that_is_not_finite_stops_the_run_with_3(settings, again):
    ran = again(**settings)
    assert ran.code == 3 and re.match(r"limit: loss or gradient of step [1-4] is no longer finite", ran.err)
    assert ran.err.count("\n") == 1
    assert int(re.findall(r"^step:(\d+)/12 train_loss", ran.out, re.MULTILINE)[-1]) <= 4
    assert not list(ran.folder.iterdir())


@pytest.mark.parametrize("settings", [dict(MATRIX_LR="1e7"), dict(TIED_EMBED_LR="1e8")], ids=lambda s: next(iter(s)))
def test_weights_too_large_to_store_are_a_limit_and_no_damaged_artifact(settings, again):
    """The loss stays finite: every matrix is followed by a normalization."""
    ran = again(**QUICK, WARMDOWN_ITERS=0, LATE_QAT=0, **settings)
    assert ran.code == 3 and ran.err.startswith("limit: ") and ran.err.count("\n") == 1
    assert not list(ran.folder.iterdir())


def switched_on(ran) -> list[int]:
    """Steps of late QAT and of the first SWA snapshot, as the log has them."""
    lines = (r"late_qat:enabled step:(\d+) scale:0\.[0-5]\d*", r"swa:start step:(\d+)")
    return [int(found[1]) for line in lines if (found := re.search(f"^{line}$", ran.out, re.MULTILINE))]


def test_the_wallclock_cap_stops_the_run_in_time_with_its_switches_done(again):
    # Steps long enough that what else the machine does is short beside them. A machine that stands still for more than
    # the reserve breaks the cap, which the run says, and one that makes a dozen steps has no room for two switches:
    # both get a longer cap.
    slow = dict(TRAIN_BATCH_TOKENS=6144, WARMDOWN_ITERS=25)
    for cap in (5.0, 10.0, 20.0, 40.0):
        timed = dict(run_id=f"cap{cap:g}", MAX_WALLCLOCK_SECONDS=cap, ITERATIONS=100_000)
        ran = again(**timed, **slow, VAL_LOSS_EVERY=0, TTT_ENABLED=0)
        if ran.code == 0 and len({*switched_on(ran)}) == 2:
            break
        broken = rf"^limit: training and averaging took .* more than MAX_WALLCLOCK_SECONDS={cap:g}$"
        assert ran.code == 0 or (ran.code == 3 and re.search(broken, ran.out, re.MULTILINE))
    assert ran.code == 0
    stopped = re.search(r"^stopping_early: wallclock_cap train_time:(\d+)ms step:(\d+)/100000$", ran.out, re.MULTILINE)
    steps = ran.result["steps"]
    assert int(stopped[2]) == steps and 0 < steps < 4000
    assert 0.5 * cap < ran.result["train_seconds"] <= cap and int(stopped[1]) <= 1000 * cap
    qat, swa = switched_on(ran)
    assert 0 < qat < swa < steps
