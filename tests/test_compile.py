"""torch.compile on CPU stands in for CUDA: the same graphs, guards and recompilations."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY_ENV, clean_environ, run_here


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPU needs a C++ compiler")
def test_warm_up_compiles_every_graph_of_the_clock_and_of_the_scores(tiny_data, tmp_path):
    settings = dict(ITERATIONS=12, TRAIN_LOG_EVERY=1)
    environ = clean_environ(**{**TINY_ENV, **settings}, COMPILE=1, TORCH_LOGS="recompiles", DATA_PATH=tiny_data)
    command = [sys.executable, ROOT / "train_gpt.py"]
    ran = subprocess.run(
        command, cwd=tmp_path, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    lines = ran.stdout.splitlines()
    assert ran.returncode == 0, ran.stdout[-2000:]

    def line(start: str) -> int:
        return next(i for i, text in enumerate(lines) if text.startswith(start))

    recompiled = [i for i, text in enumerate(lines) if "Recompiling function" in text]
    clock = range(line("warmup_step:1/1") + 1, line("export_weights:"))
    assert line("late_qat:enabled") in clock and line("step:6/12 val_loss") in clock
    # The one graph after the last warm-up step is that of scoring, still before the first timed step.
    assert [i for i in recompiled if i in clock and i > line("step:1/12")] == []
    assert [i for i in recompiled if i > line("final_int6_roundtrip")] == []
    eager = run_here(tmp_path / "eager", tiny_data, **settings).result["scores"]
    compiled = json.loads(next((tmp_path / "runs").glob("*/result.json")).read_text())["scores"]
    assert compiled["float_raw"]["val_bpb"] == pytest.approx(eager["float_raw"]["val_bpb"], abs=1e-3)
