"""The benchmark counts what is computed, its phases are the step's, and a ratio is a result only on an idle machine."""

import json
import time
from pathlib import Path

import bench
import helpers
import pytest
import torch
from conftest import ROOT, TINY_ENV, clean_environ, torchrun
from torch.utils.flop_counter import FlopCounterMode

import train_gpt as pg
from records.experiments import steptime

FAKE = """
import json, os
from pathlib import Path
with open({calls!r}, "a") as calls:
    calls.write("{name} ")
for step in range(1, int(os.environ["ITERATIONS"]) + 1):
    print(f"step:{{step}}/9 train_loss:2.0000 train_time:1ms step_avg:{ms}.00ms")
print("final_int6_sliding_window val_loss:2.0 val_bpb:1.0 stride:16 eval_time:{ms}00ms")
print("legal_ttt val_loss:2.0 val_bpb:1.0 eval_time:500ms")
folder = Path(os.environ["OUT_DIR"]) / "runs" / os.environ["RUN_ID"]
folder.mkdir(parents=True)
phases = dict(train=9.0, quantize={ms}, compress=1.0)
result = dict(phase_seconds=phases, device="none", dtype="float32", world_size=1)
(folder / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "tiny.env"
    path.write_text("".join(f"{name}={value}\n" for name, value in TINY_ENV.items()))
    return path


@pytest.fixture
def command(recipe, tiny_data, tmp_path):
    """A command line in this process: its exit code."""

    def call(*words: str, **settings: str) -> int:
        words = ("--quick", "--recipe", recipe, "--data", tiny_data, "--json", tmp_path / "out.json", *words)
        return bench.main([str(word) for word in words], clean_environ(**settings))

    call.found = lambda: json.loads((tmp_path / "out.json").read_text())
    return call


@pytest.fixture
def fake(tmp_path):
    """Scripts that only say how long they took, and the order in which they were started."""

    def script(name: str, ms: int) -> Path:
        path = tmp_path / f"{name}.py"
        path.write_text(FAKE.format(calls=str(tmp_path / "calls"), name=name, ms=ms))
        return path

    script.calls = lambda: (tmp_path / "calls").read_text().split()
    return script


def idle(monkeypatch, others: float = 0.0) -> None:
    """The machine says that other work takes so much of a core."""
    monkeypatch.setattr(steptime.Load, "others", lambda self, own=None: others)


# -----------------------------------------------------------------------------
# WHAT HAS TO BE COMPUTED AND MOVED
# -----------------------------------------------------------------------------

MODELS = dict(
    core={},
    loops=dict(num_loops=2, enable_looping_at=0.0, loop_start=1, loop_end=1),
    untied_swiglu=dict(tie_embeddings=False, mlp_kind="swiglu"),
    gates=dict(gated_attention=True, value_residual=True, smear_gate_kind="token"),
    accumulated=dict(train_batch_tokens=128, micro_batch_tokens=64),
)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_flops_are_those_that_torch_counts(changes):
    """To the last one: the plain attention computes all positions and nothing anew for its backward."""
    hp = helpers.tiny_hp(**changes)
    trainer = pg.Trainer(helpers.make_run(hp)._replace(attend=pg.matmul_attention))
    shape = (hp.train_batch_tokens // hp.train_seq_len, hp.train_seq_len)
    tokens = torch.randint(4, hp.vocab_size, shape)
    with FlopCounterMode(display=False) as counted:
        trainer.train_step(tokens, tokens)
    assert sum(bench.step_flops(hp, attended=hp.train_seq_len).values()) == counted.get_total_flops()
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        trainer.model(tokens, tokens[:, -4:])
    assert bench.count_forward(hp, *shape, 4, attended=hp.train_seq_len).flops == counted.get_total_flops()


def test_causal_attention_counts_half_and_a_scored_token_its_whole_window():
    hp = helpers.tiny_hp()
    causal, full = (bench.count_forward(hp, 1, 16, attended=n) for n in (None, 16))
    assert causal.products == full.products and causal.attention == full.attention * 17 / 32
    assert bench.scored_token_flops(hp) == bench.count_forward(hp, 1, hp.eval_seq_len, hp.eval_stride).flops / 4


def test_bytes_of_the_optimizer_are_those_of_its_tensors():
    """Counted on the optimizer's own: what it keeps is as large as the formula says."""
    hp = helpers.tiny_hp()
    optimizers = pg.Trainer(helpers.make_run(hp)).optimizers
    muon = [p for bank in optimizers.banks for p in bank.parameters]
    shapes = bench.optimizer_shapes(hp)
    for parameters, key in ((muon, "muon"), (optimizers.small, "adamw")):
        assert sorted(shapes[key]) == sorted(tuple(p.shape) for p in parameters)
    small, large = (sum(p.numel() for p in parameters) for parameters in (optimizers.small, muon))
    assert bench.optimizer_bytes(hp, 1, torch.float32) == 7 * 4 * small + 8 * 4 * large
    assert bench.optimizer_bytes(hp, 4, torch.bfloat16) == 28 * small + 16 * large + 10 * large / 4
    assert bench.sent_bytes(hp, 1, torch.float32) == 0
    assert bench.sent_bytes(hp, 4, torch.bfloat16) == 6 * small + 3 * large


# -----------------------------------------------------------------------------
# PHASES
# -----------------------------------------------------------------------------


def test_time_inside_another_phase_counts_once(monkeypatch):
    ticks = iter(range(0, 100, 10))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(ticks))
    watch = bench.Watch(torch.device("cpu"))
    with watch("outer"), watch("inner"):
        pass
    assert watch.seconds == dict(outer=20, inner=10) and not watch.open


def test_what_is_slow_is_in_the_phase_that_says_so(recipe, tiny_data, tmp_path, monkeypatch):
    parts = {
        "data wait": (pg.BatchLoader, "next"),
        "forward": (pg.GPT, "forward"),
        "backward": (torch.Tensor, "backward"),
        "optimizer": (pg.Optimizers, "step"),
        "averaging": (pg.Averages, "update"),
        "other": (pg.Clock, "post"),
    }
    seconds = {name: 0.02 * (i + 1) for i, name in enumerate(parts)}

    def slowed(work, wait: float):
        def slow(*args, **more):
            time.sleep(wait)
            return work(*args, **more)

        return slow

    for name, (owner, method) in parts.items():
        monkeypatch.setattr(owner, method, slowed(getattr(owner, method), seconds[name]))
    environ = bench.environment(recipe, clean_environ(DATA_PATH=tiny_data, WARMUP_STEPS=0))
    phases = bench.Phases(pg.Hyperparameters.from_env(environ), environ, tmp_path, repeats=1)
    phases.train(trace=None)
    found = {name: spread.median for name, spread in phases.seconds.items()}
    assert {*found} == {*seconds, "step"}
    assert all(found[name] >= seconds[name] for name in seconds) and found["step"] >= sum(seconds.values())


def test_the_phases_of_a_step_are_the_step(command, capsys, tmp_path):
    assert command("--trace", tmp_path / "trace.json", GPTQ_ENABLED="1", GPTQ_CALIBRATION_TOKENS="512") == 0
    found, out = command.found(), capsys.readouterr().out
    phases = found["phases"]
    for name, phase in phases.items():
        assert 0 <= phase["low"] <= phase["median"] <= phase["high"], name
        assert any(line.startswith(f"{name} ") for line in out.splitlines())
    assert {*phases} == {"step", *bench.IN_STEP, *bench.AFTER} - {"communication", "fit"}
    assert 0.3 < found["phases_over_step"] < 3  # near 1, on an idle machine
    assert all(phases[name]["median"] > 0 for name in phases if name != "data wait")
    assert phases["other"]["median"] < phases["forward"]["median"] + phases["backward"]["median"]
    assert 0 < found["utilisation"] < 1 and 0 < found["scoring_utilisation"] < 1
    assert found["scored_targets"] == 2 * 256 + 32  # what one step of test-time training reads, twice
    assert found["alone"] == (found["others"] is not None and found["others"] <= steptime.ALONE)
    assert ("NO RESULT" in out) == (not found["alone"])
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"step", "aten::mm"} <= names


@pytest.mark.slow
def test_two_processes_tell_what_they_wait_for(recipe, tiny_data, tmp_path):
    words = ["--quick", "--recipe", str(recipe), "--data", str(tiny_data), "--json", "out"]
    (tmp_path / "call.py").write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        f"import bench; sys.exit(bench.main({words}, os.environ))"
    )
    ran, _ = torchrun(2, tmp_path / "call.py", tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads((tmp_path / "out").read_text())
    assert found["world_size"] == 2 and found["phases"]["communication"]["median"] > 0
    assert f"each rank sends {found['sent_bytes'] / 1e6:.4g} MB at least" in ran.stdout


# -----------------------------------------------------------------------------
# TWO SCRIPTS IN TURN
# -----------------------------------------------------------------------------


def test_a_script_is_as_fast_as_itself(command, capsys):
    """The real one, in processes of its own; what is asserted holds on a machine that does other work too."""
    assert command("--against", ROOT / "train_gpt.py", "--pairs", "1", "--busy") == 0
    ratios = command.found()["ratios"]
    assert list(ratios) == list(bench.COMPARED)
    assert all(0.02 < ratio["median"] < 50 and ratio["verdict"] == "undecided" for ratio in ratios.values()), ratios
    assert len({*command.found()["code_sha256"].values()}) == 1


@pytest.mark.slow
def test_a_script_of_long_ago_can_be_compared(command, capsys):
    code = command("--against", "105231d", "--pairs", "1", "--busy")
    if "neither a file nor a commit" in capsys.readouterr().err:
        pytest.skip("this checkout's history begins later")
    assert code == 0 and list(command.found()["ratios"]) == list(bench.COMPARED)


def test_pairs_turn_and_a_faster_script_is_called_so(command, fake, monkeypatch, capsys):
    idle(monkeypatch)
    old, new = fake("old", 8), fake("new", 6)
    parse = bench.parse
    monkeypatch.setattr(bench, "parse", lambda argv, environ: parse(argv[1:], environ))  # all pairs: without --quick
    monkeypatch.setattr(bench.time, "sleep", lambda seconds: None)
    assert command("--against", old, "--script", new) == 0
    assert fake.calls() == ["old", "new", "new", "old"] * 3
    ratios = command.found()["ratios"]
    medians = [ratios[name]["median"] for name in bench.COMPARED]
    assert medians == pytest.approx([0.75, 0.75, 1.0, 7 / 9])
    verdicts = {name: ratio["verdict"] for name, ratio in ratios.items()}
    assert verdicts == {name: "undecided" if name == "legal TTT" else "faster" for name in bench.COMPARED}
    assert "faster in 6 of 6 pairs: faster" in capsys.readouterr().out


def test_a_machine_that_does_other_work_gives_no_result(command, fake, monkeypatch, capsys, tmp_path):
    idle(monkeypatch, 0.7)
    words = ("--against", fake("old", 8), "--script", fake("new", 6))
    assert command(*words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: other work took 0.70 of a core; ") and said.err.count("\n") == 1
    assert not (tmp_path / "calls").exists() and not (tmp_path / "out.json").exists()
    monkeypatch.setattr(bench, "check_idle", lambda seconds: None)  # it begins later
    assert command(*words) == 2
    assert "error: 2 of 2 pairs shared the machine" in capsys.readouterr().err
    assert command(*words, "--busy") == 0
    assert "NO RESULT" in capsys.readouterr().out and not command.found()["alone"]


def test_a_script_that_fails_says_which_and_why(command, monkeypatch, capsys, tmp_path):
    idle(monkeypatch)
    (tmp_path / "bad.py").write_text("import sys; print('error: no such thing; use another'); sys.exit(2)")
    assert command("--against", tmp_path / "bad.py") == 2
    assert capsys.readouterr().err.endswith("bad.py ends with exit code 2: no such thing; use another\n")
    (tmp_path / "bad.py").write_text("print('no version of the script')")
    assert command("--against", tmp_path / "bad.py") == 2
    assert "bad.py leaves no runs/RUN_ID/result.json" in capsys.readouterr().err


# -----------------------------------------------------------------------------
# WHAT CANNOT BE DONE
# -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, settings, said",
    [
        (["--repeats", "0"], {}, "'0' is no whole number from 1"),
        (["--nonsense"], {}, "unrecognized arguments: --nonsense"),
        (["--json", "/nowhere/at/all"], {}, "--json /nowhere/at/all: no place for a file"),
        (["--against", "HEAD", "--trace", "x"], {}, "--trace goes with the phases"),
        (["--against", "HEAD"], dict(WORLD_SIZE="2"), "--launch 'torchrun …'"),
        (["--recipe", "/nowhere.env"], {}, "cannot read /nowhere.env"),
        (["--data", "/nowhere"], {}, "no fineweb_val_*.bin in DATA_PATH=/nowhere"),
        (["--against", "no-commit", "--busy"], {}, "no-commit is neither a file nor a commit"),
        ([], dict(NUM_LAYER="3"), "unknown setting NUM_LAYER; did you mean NUM_LAYERS?"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(command, capsys, words, settings, said):
    try:
        code = command(*words, **settings)
    except SystemExit as end:
        code = end.code
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("error: ") and said in err and err.count("\n") == 1


def test_the_environment_counts_more_than_the_recipe(recipe):
    chosen = bench.environment(recipe, dict(MODEL_DIM="48", WARMDOWN_FRAC="0.3", EVAL_ONLY="1"))
    assert (chosen["MODEL_DIM"], chosen["NUM_LAYERS"], chosen["WARMDOWN_FRAC"]) == ("48", "3", "0")
    assert "EVAL_ONLY" not in chosen and "WARMDOWN_FRAC" not in bench.environment(recipe, {})
