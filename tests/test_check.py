"""`train_gpt.py --check`: a run's errors in its words, what it would be, and nothing written."""

import base64
import contextlib
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import memory
import pytest
import torch
from conftest import ROOT, TINY_ENV, Ran, run_here, torchrun
from helpers import build_model, make_run, random_tokens, tiny_hp

import train_gpt as pg


def tree(*folders: Path) -> dict[Path, tuple]:
    """Everything below; of a file, what would tell that it was written to."""
    stats = {path: path.lstat() for folder in folders for path in folder.rglob("*")}
    return {path: (s.st_size, s.st_mtime_ns, s.st_ino) if path.is_file() else () for path, s in stats.items()}


@pytest.fixture(scope="module")
def real(tiny_data, tmp_path_factory) -> Ran:
    """A finished run."""
    ran = run_here(tmp_path_factory.mktemp("real"), tiny_data, SAVE_WEIGHTS=1)
    assert ran.code == 0, ran.err
    return ran


@pytest.fixture
def check(tiny_data, tmp_path, monkeypatch):
    """`--check` with these settings; that it wrote nothing, here or into the data, is asserted."""
    monkeypatch.chdir(tmp_path)

    def call(run_id: str = "run", measured: bool = True, **settings) -> Ran:
        before = tree(tmp_path, tiny_data)
        if not measured:  # which takes most of the time
            monkeypatch.setattr(pg, "TRIED_SECONDS", 1e-9)
        ran = run_here(Path("out"), tiny_data, run_id, argv=("--check",), **settings)
        assert tree(tmp_path, tiny_data) == before
        return ran

    return call


@pytest.fixture
def script_of(tmp_path_factory, monkeypatch):
    """Let the script be of so many bytes that no packing makes fewer."""

    def call(size: int) -> None:
        path = tmp_path_factory.mktemp("packed") / "packed.py"
        path.write_bytes(base64.b85encode(os.urandom(size * 4 // 5)))
        monkeypatch.setattr(pg, "__file__", str(path))

    return call


def figures(ran: Ran, topic: str) -> dict[str, str]:
    (line,) = re.findall(rf"^check: {topic} (.*:.*)$", ran.out, re.MULTILINE)
    return dict(re.findall(r"(\w+):([^:]+?)(?: (?=\w+:)|$)", line))


# ----------------------------------------------------------------------------------------------------------------------
# What a run would be
# ----------------------------------------------------------------------------------------------------------------------


def test_a_good_start_is_described_and_nothing_is_written(check, real, script_of, tmp_path):
    script_of(60_000)
    ran = check()
    assert (ran.code, ran.err) == (0, "") and not (tmp_path / "out").exists()
    lines = ran.out.splitlines()
    assert all(line.startswith("check: ") for line in lines) and lines[-1] == "check: ok"
    head = [line for line in real.out.splitlines() if line.startswith(("dtype:", "train_loader:", "val_loader:"))]
    assert len(head) == 5 and {f"check: {line}" for line in head} < set(lines)
    size, result = figures(ran, "bytes"), real.result
    assert size["code"] == "60000" and size["cap"] == "16000000"
    assert int(size["artifact_predicted"]) == pytest.approx(result["bytes_artifact"], rel=0.05)
    assert int(size["left"]) == 16_000_000 - 60_000 - int(size["artifact_predicted"])
    data, trained = figures(ran, "data"), result["train_tokens"]
    assert int(data["tokens_to_train"]) == trained == 12 * 384
    assert float(data["reads"]) == pytest.approx(trained / int(data["of"]), abs=0.005)
    assert int(figures(ran, "disk")["may_write"]) > sum(path.stat().st_size for path in real.folder.iterdir()) / 2
    training, evaluation = figures(ran, "training"), figures(ran, "evaluation")
    assert training["steps"] == "12 then 12" and len(training["step_ms"].split(" then ")) == 2
    assert float(evaluation["seconds"]) > 0 and evaluation["of"] == str(result["scores"]["legal_ttt"]["tokens"])


def test_a_file_is_checked_as_it_would_be_scored_or_exported(check, real):
    scored = check(EVAL_ONLY=1, ARTIFACT_PATH=real.folder / "artifact.pgolf")
    assert scored.code == 0 and int(figures(scored, "bytes")["artifact"]) == len(real.artifact)
    again = check(EXPORT_ONLY=1, WEIGHTS_PATH=real.folder / "weights.pgolf")
    assert again.code == 0
    assert int(figures(again, "bytes")["artifact_predicted"]) == pytest.approx(len(real.artifact), rel=0.05)
    for ran in (scored, again):
        assert float(figures(ran, "evaluation")["seconds"]) > 0 and "check: training" not in ran.out


@pytest.mark.parametrize(
    "settings",
    [
        dict(QUANT="rd", GPTQ_ENABLED=1, GPTQ_HEAD_ENABLED=1, GPTQ_CALIBRATION_TOKENS=256, MAX_WALLCLOCK_SECONDS=60),
        dict(TTT_PARAMS="lora", TTT_LORA_CHUNK=16, PHASED_TTT_NUM_PHASES=2, QAT_ENABLED=1),
        dict(EVAL_STRIDE=0, TTT_ENABLED=0, NUM_LOOPS=1, LOOP_START=1, LOOP_END=1, DTYPE="bf16"),
    ],
)
def test_every_kind_of_run_is_tried(check, settings):
    ran = check(**settings)
    assert (ran.code, ran.err) == (0, "")
    assert "not measured" not in ran.out and re.search(r"^check: evaluation seconds:\d", ran.out, re.MULTILINE)


def test_what_would_take_long_is_not_measured_and_says_so(check):
    ran = check(measured=False)
    assert ran.code == 0
    for topic in ("training", "evaluation"):
        assert re.search(rf"^check: {topic} not measured: .* more than \d+ s here$", ran.out, re.MULTILINE)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(ARTIFACT_CAP_BYTES=80_000), r"code and artifact_predicted are \d+ bytes over ARTIFACT_CAP_BYTES=80000"),
        (dict(ARTIFACT_CAP_BYTES=70_000, FIT_TO_CAP=1), r".* bytes over ARTIFACT_CAP_BYTES=70000"),
        (dict(WARMDOWN_ITERS=12), "WARMDOWN_ITERS=12 covers all 12 steps; WARMDOWN_ITERS=4 would fit"),
        (dict(EVAL_MAX_SECONDS=1e-3), "the evaluation may pass EVAL_MAX_SECONDS=0.001; .*"),
    ],
)
def test_what_a_competitor_would_regret_is_a_warning(check, script_of, settings, words):
    script_of(60_000)
    ran = check(measured="ARTIFACT_CAP_BYTES" not in settings, **settings)
    assert ran.code == 0
    (warning,) = re.findall(r"^check: warning: (.*)$", ran.out, re.MULTILINE)
    assert re.fullmatch(words, warning) and ran.out.endswith("\ncheck: 1 warning\n")


def test_a_script_that_could_be_packed_is_a_warning_and_warnings_are_counted(check):
    ran = check(WARMDOWN_ITERS=12)
    code = len((ROOT / "train_gpt.py").read_bytes())
    assert re.search(rf"^check: warning: the script counts {code} bytes, below \d+ packed: ", ran.out, re.MULTILINE)
    assert ran.out.endswith("\ncheck: 2 warnings\n")


def test_a_fitted_artifact_is_predicted_below_the_cap(check, script_of):
    script_of(60_000)
    ran = check(measured=False, ARTIFACT_CAP_BYTES=100_000, FIT_TO_CAP=1)
    assert ran.out.endswith("check: ok\n") and 0 <= int(figures(ran, "bytes")["left"]) < 100


@pytest.mark.parametrize("attend, tolerance", [(pg.matmul_attention, 0), (pg.sdpa, 0.05)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_a_micro_batch_is_what_autograd_keeps(attend, tolerance, dtype):
    hp = tiny_hp(train_seq_len=64, train_batch_tokens=512, ema_enabled=False, swa_enabled=False)
    run = make_run(hp)._replace(attend=attend, dtype=dtype)
    model, kept = run.build(64), {}
    pg.init_weights(model, hp)
    own = {p.data_ptr() for p in model.parameters()}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    tokens = torch.zeros(8, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        held = model(tokens, tokens)
    assert held.shape == (8, 64)
    activations = sum(t.untyped_storage().nbytes() for t in kept.values())
    matrices = sum(p.numel() for name, p in model.named_parameters() if pg.row_of(name).optimizer == "matrix")
    others = pg.count_weights(hp) - matrices
    fixed = matrices * (4 + 4 + 4 + 2 * dtype.itemsize) + others * (4 + 4 + 8 + 4)
    assert pg.predict_memory(run) - fixed == pytest.approx(1.25 * activations, rel=tolerance, abs=1)
    averages = pg.predict_memory(run._replace(hp=tiny_hp(train_seq_len=64, train_batch_tokens=512)))
    assert averages - pg.predict_memory(run) == 8 * pg.count_weights(hp)


def test_blocks_that_are_computed_again_keep_less_and_have_the_same_gradients():
    hp, gradients = tiny_hp(num_loops=1, loop_start=1, loop_end=1, parallel_start_layer=2, value_residual=True), []
    tokens = torch.from_numpy(random_tokens(64).astype("int64")).view(4, 16)
    for how in (contextlib.nullcontext(), memory.recomputing(), memory.recomputing(spared=1)):
        with how:
            model = build_model(hp)
            model(tokens, tokens).mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients, strict=True))
    deep, flat = (memory.Kept.of(tiny_hp(num_layers=n, ve_layers="0"), 1) for n in (4, 1))
    assert deep.recomputed < 0.7 * deep.as_it_is < 0.7 * deep.peak
    assert flat.recomputed >= flat.as_it_is  # that one block is computed again as a whole


def test_a_step_that_may_not_fit_is_a_warning(check, script_of, monkeypatch):
    script_of(60_000)
    monkeypatch.setattr(pg, "device_memory", lambda _: 3 << 20)
    ran = check(measured=False)
    assert ran.code == 0 and ran.out.endswith("check: 1 warning\n")
    assert "check: warning: a step is predicted not to fit in memory; lower MICRO_BATCH_TOKENS\n" in ran.out


@pytest.mark.slow
def test_the_steps_and_seconds_are_those_of_a_run_within_a_factor_of_three(check, tiny_data, tmp_path):
    settings = dict(MAX_WALLCLOCK_SECONDS=20, ITERATIONS=100_000, WARMDOWN_ITERS=100, VAL_LOSS_EVERY=0)
    checked = check(**settings)
    ran = run_here(tmp_path, tiny_data, **settings)
    predicted = [int(n) for n in figures(checked, "training")["steps"].split(" then ")]
    assert min(predicted) / 3 < ran.result["steps"] < max(predicted) * 3
    seconds = float(figures(checked, "evaluation")["seconds"])
    assert seconds / 3 < ran.result["eval_seconds"] < seconds * 3


# ----------------------------------------------------------------------------------------------------------------------
# What would go wrong
# ----------------------------------------------------------------------------------------------------------------------

WRONG = {
    "a setting": dict(NUM_HEADS=3),
    "a batch": dict(TRAIN_BATCH_TOKENS=400),
    "a micro-batch": dict(MICRO_BATCH_TOKENS=64 * 5),
    "no data": dict(DATA_PATH="absent"),
    "no tokenizer": dict(TOKENIZER_PATH="absent.model"),
    "another vocabulary": dict(VOCAB_SIZE=600),
    "one chunk": dict(TTT_CHUNK_TOKENS=1 << 20),
    "no kernel": dict(ATTENTION="fa3"),
    "no device": dict(DEVICE="cuda"),
    "no artifact": dict(EVAL_ONLY=1, ARTIFACT_PATH="absent.pgolf"),
    "no checkpoint": dict(RESUME="absent.pgckpt"),
    "no folder": dict(OUT_DIR="{data}/manifest.json/below"),
}


def refused_alike(check, data: Path, run_id: str = "run", **settings) -> str:
    """The one line that a run and its check both end with."""
    checked = check(run_id, **settings)
    assert (checked.code, checked.out) == (2, "")
    ran = run_here(Path("out"), data, run_id, **settings)
    assert (ran.code, ran.out) == (2, "")
    assert re.fullmatch(r"error: .*\n", ran.err)
    assert checked.err == ran.err
    return ran.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="it has a device and may have the kernels")
@pytest.mark.parametrize("settings", WRONG.values(), ids=WRONG)
def test_it_says_what_a_run_would_say(check, tiny_data, settings):
    settings = {name: str(value).format(data=tiny_data) for name, value in settings.items()}
    refused_alike(check, tiny_data, **settings)


def test_a_file_of_the_other_kind_is_refused_alike(check, tiny_data, real):
    said = refused_alike(check, tiny_data, EXPORT_ONLY=1, WEIGHTS_PATH=real.folder / "artifact.pgolf")
    assert "holds artifact" in said


@pytest.mark.parametrize("broken", ["compiler", "disk", "memory", "compressor"])
def test_what_the_machine_lacks_is_refused_alike(check, tiny_data, monkeypatch, broken):
    def fails(*_, **__):
        raise RuntimeError("no compiler here")

    patches = dict(
        compiler=lambda: monkeypatch.setattr(torch, "compile", fails),
        disk=lambda: monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5)),
        memory=lambda: monkeypatch.setattr(pg, "device_memory", lambda _: 5),
        compressor=lambda: monkeypatch.setitem(sys.modules, "constriction", None),
    )
    patches[broken]()
    refused_alike(check, tiny_data, COMPILE=int(broken == "compiler"), COMPRESSOR="ans")


def test_a_run_id_that_is_taken_running_or_ended_is_refused_alike(check, tiny_data, tmp_path):
    (tmp_path / "out" / "logs").mkdir(parents=True)
    path = tmp_path / "out" / "logs" / "run.txt"
    path.write_text("precious\n")
    assert "has a log already" in refused_alike(check, tiny_data)
    path.write_text("result {}\n")
    assert "has ended already: see the end of" in refused_alike(check, tiny_data, RESUME="auto")
    log = pg.Log(path)
    for settings in ({}, dict(RESUME="auto")):
        assert "is running now" in refused_alike(check, tiny_data, **settings)
    log.close()
    (tmp_path / "out" / "runs" / "other").mkdir(parents=True)
    (tmp_path / "out" / "runs" / "other" / "result.json").write_text("{}")
    assert "has ended already" in refused_alike(check, tiny_data, "other")
    assert path.read_text() == "result {}\n"


def test_a_dead_run_may_be_taken_up_and_its_log_stays_where_it_is(check, tmp_path):
    (tmp_path / "out" / "logs").mkdir(parents=True)
    (tmp_path / "out" / "logs" / "run.txt").write_text("step:1/9\n")
    assert check(measured=False, RESUME="auto").code == 0


def test_it_takes_no_other_argument(capsys):
    assert pg.main(["--check", "more"], TINY_ENV) == 2
    error = "error: unknown argument --check; settings are environment variables: `--settings`, `--check`\n"
    assert capsys.readouterr() == ("", error)


# ----------------------------------------------------------------------------------------------------------------------
# Ranks
# ----------------------------------------------------------------------------------------------------------------------

DRIVER = """
import os, sys
sys.path.insert(0, {root!r})
import train_gpt

codes = [train_gpt.main(["--check"], os.environ | more) for more in ({{}}, dict(TRAIN_BATCH_TOKENS="352"))]
sys.exit(0 if codes == [0, 2] else 1)
"""


def test_two_ranks_check_together_and_the_main_one_speaks(tiny_data, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER.format(root=str(ROOT)))
    before = tree(tmp_path)
    ran, _ = torchrun(2, tmp_path / "driver.py", tmp_path, 120, **TINY_ENV, DATA_PATH=tiny_data, RUN_ID="run")
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert tree(tmp_path) == before
    for line in ("training step_ms:", "evaluation seconds:", "1 warning\n"):
        assert ran.stdout.count(f"check: {line}") == 1
    assert ran.stderr.count("error: TRAIN_BATCH_TOKENS=352") == 1
