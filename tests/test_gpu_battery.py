"""The battery for GPUs, tried on CPU: its parts work, and what is broken makes them fail."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import gpu_battery
import pytest
import torch
from conftest import ROOT, clean_environ


def battery(out: Path, *arguments) -> tuple[int, dict[str, str]]:
    """(exit code, each part's line) of a dry run."""
    command = [ROOT / "tests" / "gpu_battery.sh", "--cpu", *arguments[:-1], out, *arguments[-1]]
    ran = subprocess.run(command, env=clean_environ(PYTHON=sys.executable), capture_output=True, text=True)
    assert (out / "summary.txt").read_text() == ran.stdout, ran.stderr
    lines = [line.removeprefix("battery:").split(" ", 1) for line in ran.stdout.splitlines()]
    return ran.returncode, dict(lines)


def edited(folder: Path, old: str, new: str) -> Path:
    """The folder with a train_gpt.py in which something is broken."""
    source = (ROOT / "train_gpt.py").read_text()
    assert source.count(old) == 1
    folder.mkdir()
    (folder / "train_gpt.py").write_text(source.replace(old, new))
    return folder


def test_a_part_that_works_is_ok_and_one_without_its_needs_is_skipped(tmp_path):
    code, lines = battery(tmp_path / "out", ["attention", "evaluation"])
    assert code == 0
    assert lines["attention"].startswith("ok seconds:") and " matmul:" in lines["attention"]
    assert lines["evaluation"].startswith("skip ") and "needs" in lines["evaluation"]
    assert "missing:" in lines["packages"] and "torch:" not in lines["packages"]


def test_a_wrong_attention_fails(tmp_path):
    script = edited(tmp_path / "script", "alpha=width**-0.5)", "alpha=width**-0.3)")
    code, lines = battery(tmp_path / "out", "--script", script, ["attention"])
    assert code == 1
    assert lines["attention"].startswith("FAIL ") and "| matmul" in lines["attention"]
    assert lines["end"] == "failed:1"


def test_a_part_that_raises_fails_with_its_error_and_the_next_one_still_runs(tmp_path):
    script = edited(
        tmp_path / "script",
        '    """torch\'s own attention in the layout',
        '    raise RuntimeError("planted")\n    """torch\'s own attention in the layout',
    )
    code, lines = battery(tmp_path / "out", "--script", script, ["attention", "machine"])
    assert code == 1
    assert lines["attention"].startswith("FAIL ") and "RuntimeError: planted (train_gpt.py:" in lines["attention"]
    assert lines["machine"].startswith("ok ")


@pytest.mark.parametrize(
    "program, status, told",
    [
        ("print('figure a:1', flush=True); import time; time.sleep(60)", "FAIL", ["a:1", "| not done after 1 s |"]),
        ("import os; print('last words', flush=True); os.abort()", "FAIL", ["exit code -6", "| last words"]),
        ("print('problem off'); print('error: why')", "FAIL", ["| off | error: why"]),
        ("print('skip nothing here')", "skip", ["nothing here"]),
        ("print('figure a:1')", "ok", ["a:1"]),
    ],
)
def test_how_a_part_ends(tmp_path, program, status, told):
    log = tmp_path / "log.txt"
    log.touch()
    seconds = 1 if "sleep" in program else 60
    found, figures = gpu_battery.run_part("part", seconds, [sys.executable, "-c", program, str(tmp_path)], log)
    assert found == status
    assert all(text in figures for text in told), figures


def test_the_small_models_of_a_gpu_are_models(tmp_path):
    bench = gpu_battery.Bench(False, tmp_path, tmp_path)
    every = [bench.settings(), bench.settings(small=True), bench.settings(**gpu_battery.SHALLOW)]
    assert [gpu_battery.hyperparameters(settings).num_layers for settings in every] == [11, 6, 3]


def test_the_limits_of_all_parts_fit_in_eight_minutes():
    assert sum(seconds for seconds, _ in gpu_battery.PARTS.values()) <= 480


def test_every_variant_of_the_graph_compiles_without_a_break(tmp_path, monkeypatch, capsys):
    """As on CUDA, but for the last stage: dynamo and autograd's graphs with fullgraph=True."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()  # a graph of another test is no measure
    gpu_battery.variants(gpu_battery.Bench(True, tmp_path, tmp_path))
    torch._dynamo.reset()
    out = capsys.readouterr().out
    assert "problem" not in out
    assert {f"{name}_{what}" for name in gpu_battery.VARIANTS for what in ("train", "score")} | {
        f"default_{what}" for what in ("temperatures", "frozen")
    } == {line.split()[1].split(":")[0] for line in out.splitlines() if line.startswith("figure ")}


@pytest.mark.slow
def test_the_dry_run(tmp_path):
    code, lines = battery(tmp_path / "out", [*gpu_battery.ALL])
    assert code == 0, lines
    assert [*lines] == ["begin", "packages", *gpu_battery.ALL, "end"]
    assert all(lines[name].startswith("ok ") for name in gpu_battery.ALL), lines
    assert len(os.listdir(tmp_path / "out")) <= 8  # a file more and another machine may not send it back
