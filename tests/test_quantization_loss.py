"""The scripts behind the figures on quantization."""

import re
import statistics
import sys

import pytest
from conftest import ROOT, run_here

import train_gpt as pg

sys.path.insert(0, str(ROOT / "records"))
import quantization_loss


def test_quantization_loss_is_the_mean_of_both_sides_at_equal_bytes(tiny_data, tmp_path, monkeypatch, capsys):
    small = dict(NUM_LAYERS=1, VE_LAYERS=0, XSA_LAST_N=1, TTT_ENABLED=0, EVAL_STRIDE=0, VAL_LOSS_EVERY=0)
    weights = run_here(tmp_path, tiny_data, **small, ITERATIONS=40, LATE_QAT=0, SAVE_WEIGHTS=1).folder / "weights.pgolf"
    coarse = "MLP_BITS=5 ATTN_BITS=5 ATTN_OUT_BITS=5 EMBED_BITS=5"

    def table(*arguments: str) -> list[list[str]]:
        argv = [
            "quantization_loss.py",
            str(weights),
            *arguments,
            "--data",
            str(tiny_data),
            "--calibration-tokens",
            "6400",
        ]
        monkeypatch.setattr(sys, "argv", argv)
        capsys.readouterr()
        assert quantization_loss.main() == 0
        rows = capsys.readouterr().out.splitlines()[3:]
        return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]

    rows = table(coarse, f"{coarse} GPTQ_ENABLED=1", f"{coarse} QUANT=rd COMPRESSOR=ans")
    for _, _, size, left, there, mirrored, mean, _ in rows:
        assert float(mean) == pytest.approx((float(there) + float(mirrored)) / 2, abs=2e-3)
        assert 0 <= int(left.replace(",", "")) <= pg.FIT_WINDOW and int(size.replace(",", "")) > 10_000
    assert len({row[6] for row in rows}) == 3
    rd = "QUANT=rd COMPRESSOR=ans GPTQ_ENABLED=1"
    room = int(rows[0][2].replace(",", ""))
    rows = table(rd, f"{rd} GPTQ_HEAD_ENABLED=1", f"{rd} TRELLIS_ENABLED=1 PROJECTION_BITS=8", "--bytes", str(room))
    assert all(0 <= room - int(row[2].replace(",", "")) <= pg.FIT_WINDOW for row in rows)
    assert len({row[6] for row in rows}) == 3, "the head has a Hessian where its row asks for one, and there alone"
    unfitted = table(coarse, "QUANT=clip_search", "--unfitted")
    assert [row[1] for row in unfitted] == ["1.000", "1.000"]
    assert 0 < float(unfitted[1][6]) < 0.7 * float(unfitted[0][6]), "a bit more halves the error"
    argv = ["quantization_loss.py", str(weights), "QUANT=sdclip", "--data", str(tiny_data), "--landings", "2"]
    monkeypatch.setattr(sys, "argv", argv)
    assert quantization_loss.main() == 0 and "| 6 of 6 inside |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["quantization_loss.py", "nowhere", "QUANT=rd", "--data", str(tiny_data)])
    assert quantization_loss.main() == 2 and "error: cannot read nowhere" in capsys.readouterr().err


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


@pytest.mark.parametrize("kind", ["equal", "low"])
def test_the_table_of_losses_at_equal_bytes_is_what_the_logs_say(kind):
    """A row: its settings, the loss of three seeds, their mean, and how much less that is than the first row's."""
    losses: dict[str, list[float]] = {}
    for seed in (1337, 42, 2025):
        log = (ROOT / "records" / "logs" / "quantization" / f"{kind}_bytes_seed{seed}.txt").read_text("utf-8")
        for row in map(cells, re.findall(r"^\| `.*$", log, re.MULTILINE)):
            assert 0 <= int(row[3].replace(",", "")) <= pg.FIT_WINDOW
            losses.setdefault(row[0], []).append(float(row[6]))
    results, first = (ROOT / "records" / "RESULTS.md").read_text("utf-8"), statistics.fmean(next(iter(losses.values())))
    for settings, found in losses.items():
        shown = [f"{loss:.3f}" for loss in (*found, statistics.fmean(found))]
        less = f"{100 * (1 - statistics.fmean(found) / first):.0f} %" if statistics.fmean(found) != first else ""
        assert any(cells(line) == [settings, *shown, less] for line in results.splitlines()), settings


def test_the_bits_under_each_compressor_are_what_the_logs_say():
    folder, results = ROOT / "records" / "logs" / "quantization", (ROOT / "records" / "RESULTS.md").read_text("utf-8")
    for line in re.findall(r"^\| all .*$", (folder / "code_bytes_seed1337.txt").read_text("utf-8"), re.MULTILINE):
        assert " | ".join(cells(line)[2:]) in results
