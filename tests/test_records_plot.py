"""PNG of curves, events and scores."""

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import records_corpus as corpus

from records.submission import plot, runlog

ROOT = Path(__file__).resolve().parent.parent
LOGS = sorted((ROOT / "records" / "logs").glob("*.txt"))


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    plot.add_arguments(parser)
    return plot.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def pixels():
    pytest.importorskip("matplotlib", reason="no matplotlib: pip install -r requirements-records.txt")
    from matplotlib.image import imread

    return imread


def colours_in(image) -> set[str]:
    """Of the palette, those that the image shows."""
    pixels = (image[..., :3].reshape(-1, 3) * 255).round().astype(int).tolist()
    return {f"#{r:02x}{g:02x}{b:02x}" for r, g, b in pixels} & set(plot.COLOURS)


def test_logs_are_drawn_at_the_width_of_a_readme(pixels, tmp_path):
    assert run(*LOGS, "-o", tmp_path / "all.png") == 0
    image = pixels(tmp_path / "all.png")
    assert image.shape[1] == 800 and 400 < image.shape[0] < 700
    assert colours_in(image) == set(plot.COLOURS[: len(LOGS)])
    assert run(LOGS[0], "-o", tmp_path / "one.png") == 0
    assert colours_in(pixels(tmp_path / "one.png")) == {plot.COLOURS[0]}


def test_the_same_logs_give_the_same_file(pixels, tmp_path):
    for name in ("a.png", "b.png"):
        assert run(*LOGS[:2], "-o", tmp_path / name) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("dialect", corpus.DIALECTS)
def test_every_dialect_is_drawn(dialect, pixels, tmp_path):
    path = tmp_path / "run.log"
    path.write_text(corpus.log_text(dialect), "utf-8")
    assert run(path) == 0 and pixels(tmp_path / "run.png").shape[1] == 800


@pytest.mark.parametrize("name", ["_hidden", "$\\frac{1}$", "a$b$c^_", "\u202eabc" + "x" * 150, "<b>&amp;"])
def test_names_are_no_formulas(name, pixels, tmp_path):
    log = corpus.pgolf(replace(corpus.run_of("pgolf"), results=(corpus.result("$a_{b}$", 2.0), *corpus.PGOLF_RESULTS)))
    path = tmp_path / f"{name}.txt"
    path.write_text(log.replace("late_qat:enabled", "$x^{:enabled"), "utf-8")
    assert run(path, "-o", tmp_path / "o.png") == 0


def test_a_run_that_has_only_begun_is_drawn(pixels, tmp_path):
    path = tmp_path / "begun.txt"
    path.write_text("step:1/10 train_loss:6.9 train_time:5ms step_avg:5ms\n", "utf-8")
    assert run(path) == 0


def test_diverged_losses_are_left_out(tmp_path):
    lines = [f"step:{i}/9 train_loss:{'nan' if i > 5 else 3.0} train_time:{i}ms step_avg:1ms\n" for i in range(1, 10)]
    log = runlog.parse_text("".join(lines), tmp_path / "x")
    assert plot.points(log, "train_loss") == ([1, 2, 3, 4, 5], [3.0] * 5)


def test_a_run_that_diverged_does_not_flatten_the_others(pixels, tmp_path):
    texts = [corpus.log_text("baseline", seed=i, final_loss=2 + i / 100) for i in range(5)]
    logs = [runlog.parse_text(text, Path("x")) for text in texts]
    wild = runlog.parse_text(corpus.log_text("baseline", final_loss=60.0), Path("x"))
    assert plot.limits([*logs, wild]) == plot.limits(logs) and plot.limits([]) is None
    assert plot.limits([logs[0], wild])[1] > 60  # of two nobody knows which is the outlier
    for i, text in enumerate([*texts, corpus.log_text("baseline", final_loss=60.0)]):
        (tmp_path / f"{i}.log").write_text(text)
    assert run(*sorted(tmp_path.glob("*.log")), "-o", tmp_path / "o.png") == 0
    assert plot.COLOURS[5] in colours_in(pixels(tmp_path / "o.png"))  # marked at the edge


def test_each_run_of_a_log_is_a_curve(pixels, tmp_path):
    (tmp_path / "three.log").write_text("".join(corpus.log_text("baseline", seed=s, final_loss=s) for s in (2, 3, 4)))
    assert run(tmp_path / "three.log") == 0
    assert colours_in(pixels(tmp_path / "three.png")) == set(plot.COLOURS[:3])


def test_bits_and_nats_share_an_axis_only_where_their_ratio_is_one():
    one, other = runlog.parse(LOGS[0]), runlog.parse(LOGS[1])
    assert plot.bpb_per_nat([one, other]) == pytest.approx(2.03707141 / 3.38476440, abs=1e-4)
    foreign = runlog.parse_text(corpus.log_text("baseline"), Path("x"))
    assert abs(corpus.BPB_PER_NAT - plot.bpb_per_nat([one])) > 1e-3
    assert plot.bpb_per_nat([one, foreign]) is None


def test_what_cannot_be_drawn_ends_in_one_line(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("nothing\n")
    for arguments in ([tmp_path / "missing.txt"], [tmp_path / "empty.txt"], [LOGS[0]] * 11):
        assert run(*arguments) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("error: ") for line in errors)


def test_a_folder_that_cannot_be_written_ends_in_one_line(pixels, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(LOGS[0], "-o", tmp_path / "file" / "out.png") == 2
    assert capsys.readouterr().err.startswith("error: cannot write")


def test_without_matplotlib_one_line_says_what_to_install(tmp_path):
    script = (
        "import sys; sys.modules['matplotlib'] = None; import argparse; from records.submission import plot\n"
        "parser = argparse.ArgumentParser(); plot.add_arguments(parser); sys.exit(plot.run(parser.parse_args()))"
    )
    command = [sys.executable, "-c", script, str(LOGS[0]), "-o", str(tmp_path / "x.png")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stderr.startswith("error: plot needs matplotlib") and ran.stderr.count("\n") == 1
