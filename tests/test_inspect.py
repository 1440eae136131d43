"""`inspect`: where an artifact's bytes go."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from helpers import build_model, quantize, tiny_hp, weights_of
from test_artifact import header_of, make_blob

import train_gpt as pg
from records import submit
from records.submission import inspect

HP = tiny_hp(model_dim=64, gated_attention=True, tie_embeddings=False, attn_out_bits=8)


@pytest.fixture(params=["lzma", "zstd", "ans"])
def artifact(request, tmp_path):
    path = tmp_path / "artifact.pgolf"
    path.write_bytes(make_blob(request.param, HP))
    return path


def rows(printed: str) -> dict[str, list[str]]:
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if "---" not in line
    ]
    return {cells[0]: cells[1:] for cells in lines[1:]}


def test_every_byte_and_weight_is_in_one_row(artifact, capsys):
    assert submit.main(["inspect", str(artifact)]) == 0
    table = rows(capsys.readouterr().out)
    total = next(cells for name, cells in table.items() if name.endswith(", all"))
    parts = {name: cells for name, cells in table.items() if not name.endswith(", all")}
    size, weights = artifact.stat().st_size, sum(w.numel() for w in weights_of(build_model(HP)).values())
    assert int(total[4].replace(",", "")) == size and int(total[1].replace(",", "")) == weights
    assert sum(int(cells[4].replace(",", "")) for cells in parts.values()) == pytest.approx(size, abs=len(parts))
    counted = {name: int(cells[1].replace(",", "") or 0) for name, cells in parts.items() if name != "row scales fp16"}
    assert sum(counted.values()) == weights
    expected = {"attention int6", "attention_out int8", "mlp int6", "embedding int8", "head int8", "gate int8"}
    assert set(parts) == expected | {"projection fp16", "control fp32", "row scales fp16", "header"}


def test_entropies_are_those_of_the_codes():
    tensors = quantize(weights_of(build_model(HP)), HP)
    blob = pg.pack_artifact(header_of(HP), tensors, "ans")
    shares = {share.part: share for share in inspect.shares_of(blob, header_of(HP), tensors)}
    codes = torch.cat([t.data.flatten() for name, t in tensors.items() if pg.label_of(name) == "mlp"])
    _, counts = codes.unique(return_counts=True)
    p = counts / counts.sum()
    assert shares["mlp int6"].entropy == pytest.approx(float(-(p * p.log2()).sum()), rel=1e-5)
    assert shares["mlp int6"].tensors == 6 and shares["header"].entropy is None
    sizes = [share.bytes for share in shares.values()]
    assert sizes == sorted(sizes, reverse=True) and sum(sizes) == pytest.approx(len(blob))


def test_a_picture_is_drawn_beside_the_artifact_when_asked(artifact, capsys):
    pytest.importorskip("matplotlib")
    assert submit.main(["inspect", str(artifact), "--png"]) == 0
    drawn = artifact.with_suffix(".png")
    assert drawn.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and f"drawn: {drawn}" in capsys.readouterr().out


def refused(capsys, *arguments: str) -> str:
    """The one line with which `inspect` ends, after nothing else."""
    try:
        code = submit.main(["inspect", *arguments])
    except SystemExit as leaving:  # of argparse
        code = leaving.code
    said = capsys.readouterr()
    assert code == 2 and said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "the following arguments are required: ARTIFACT"),
        (["a", "--pdf"], "unrecognized arguments: --pdf"),
        (["nowhere.pgolf"], "cannot read nowhere.pgolf: No such file"),
        ([__file__], "not an artifact of this script"),
    ],
)
def test_what_cannot_be_inspected_is_one_line(arguments, message, capsys):
    assert message in refused(capsys, *arguments)


def test_saved_weights_are_no_artifact(tmp_path, capsys):
    weights = weights_of(build_model(HP))
    stored = {name: pg.Stored("fp32", w, None) for name, w in weights.items()}
    (tmp_path / "weights.pgolf").write_bytes(pg.pack_artifact(header_of(HP, "weights"), stored, "lzma"))
    assert "holds weights" in refused(capsys, str(tmp_path / "weights.pgolf"))


def test_the_picture_overwrites_no_artifact(tmp_path, capsys):
    path, blob = tmp_path / "artifact.png", make_blob("lzma", HP)
    path.write_bytes(blob)
    assert "would overwrite" in refused(capsys, str(path), "--png") and path.read_bytes() == blob


def test_a_picture_without_matplotlib_is_a_clear_error_after_the_table(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.pgolf"
    path.write_bytes(make_blob("ans", HP))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert submit.main(["inspect", str(path), "--png"]) == 2
    said = capsys.readouterr()
    assert re.search(r"mlp int6", said.out) and "--png needs matplotlib: pip install" in said.err


def test_a_place_that_takes_no_picture_is_one_line_after_the_table(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "a.pgolf").write_bytes(make_blob("lzma", HP))
    (tmp_path / "a.png").mkdir()
    assert submit.main(["inspect", str(tmp_path / "a.pgolf"), "--png"]) == 2
    said = capsys.readouterr()
    assert "mlp int6" in said.out and said.err == f"error: cannot write {tmp_path / 'a.png'}: Is a directory\n"


def test_without_torch_it_names_what_is_missing(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    command, paths = [sys.executable, "records/submit.py", "inspect", "a.pgolf"], {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=paths, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: inspect needs torch: pip install -r requirements.txt\n"


@pytest.mark.parametrize("arguments", [["--inspect"], ["--inspect", "runs/a/artifact.pgolf", "--png"]])
def test_the_script_names_the_command_that_took_over(arguments, capsys):
    assert pg.main(arguments, {}) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert "python records/submit.py inspect ARTIFACT" in said.err
