"""Following a running log: what is said of it, where it is thought to end, and how the following ends."""

import argparse
import io
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from itertools import permutations
from pathlib import Path

import pytest
import records_corpus as corpus

from records.submission import runlog, watch

ROOT = Path(__file__).resolve().parent.parent
LOGS = sorted((ROOT / "records" / "logs").glob("cpu_mini*.txt"))
DONE = ROOT / "records" / "logs" / "cpu_mini_seed1337.txt"
COMMAND = 'import sys; from records import submit; sys.argv.insert(1, "watch"); sys.exit(submit.entry())'


def until(path: Path, step: int) -> runlog.RunLog:
    """The log as it was when this step had been logged."""
    text = path.read_text("utf-8")
    match = re.search(rf"^step:{step}/\d+ train_loss.*\n", text, re.M)
    return runlog.parse_text(text[: match.end()], path)


def arguments(*given: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    watch.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in given])


# ----------------------------------------------------------------------------------------------------------------------
# Speed and time
# ----------------------------------------------------------------------------------------------------------------------


def test_speed_and_time_left_come_from_the_recent_steps():
    log = until(DONE, 1000)
    ms = (874514 - 515891) / 500  # of the last five logged steps: 500 to 1000
    assert watch.pace(log) == pytest.approx(ms)
    assert watch.tokens_per_second(log) == pytest.approx(8192 * 1000 / ms)
    assert watch.seconds_left(log) == pytest.approx(500 * ms / 1000)
    assert watch.last_step(log) == (1000, 1500) and not watch.has_trained(log)


def test_the_training_clock_ends_a_run_before_its_last_step():
    lines = ['settings {"seed": 1, "max_wallclock_seconds": 100.0, "train_batch_tokens": 1000}', "seed:1"]
    lines += [f"step:{i}/9000 train_loss:3.0 train_time:{i * 100}ms step_avg:100.00ms" for i in range(100, 701, 100)]
    log = runlog.parse_text("\n".join(lines) + "\n", Path("x"))
    assert watch.last_step(log) == (700, 1000)
    assert watch.seconds_left(log) == pytest.approx(30)
    assert watch.tokens_per_second(log) == pytest.approx(10_000)


def test_a_log_that_says_little_is_no_error():
    for text in (
        "",
        "hello\n",
        "step:1/10 train_loss:nan train_time:0ms step_avg:0.00ms\n",
        "step:0/10 val_loss:3.0\n",
    ):
        log = runlog.parse_text(text, Path("x"))
        assert watch.project(log, []) is None
        assert watch.plain(log, []) and watch.screen(log, [], {}, (80, 24))


# ----------------------------------------------------------------------------------------------------------------------
# Where it ends
# ----------------------------------------------------------------------------------------------------------------------


def test_the_stated_range_holds_the_score_of_every_pair_of_runs():
    """Each of the project's runs, cut at five places and compared with each other one: the true score is inside."""
    missed, count = [], 0
    for mine, other in permutations(LOGS, 2):
        like = runlog.parse(other)
        truth = runlog.parse(mine).score(watch.final_score(like).label)
        for step in (300, 500, 700, 1000, 1300) if truth is not None else ():
            projection = watch.compared(until(mine, step), like)
            count += 1
            if abs(projection.value - truth.val_bpb) > projection.margin:
                missed.append((mine.stem, other.stem, step, projection.value - truth.val_bpb, projection.margin))
            assert projection.margin < 0.03, "a range that wide says nothing"
    assert count > 60 and len(missed) <= 0.05 * count, missed


def test_the_fit_holds_the_final_training_loss_of_every_run():
    for path in LOGS:
        curve = watch.losses(runlog.parse(path))
        end = sum(curve[step] for step in (1300, 1400, 1500)) / 3
        for step in (500, 700, 1000, 1300):
            projection = watch.fitted(until(path, step))
            assert projection.quantity == "train_loss" and "--like" in projection.how
            assert abs(projection.value - end) < projection.margin, (path.stem, step, projection, end)


def test_a_known_gap_is_carried_over_exactly():
    def log(shift: float, finished: bool) -> runlog.RunLog:
        lines = [f"step:{i}/900 train_loss:{5 - i / 300 + shift:.4f} train_time:{i}ms" for i in range(100, 601, 100)]
        lines += ["final_int8_zlib_roundtrip_exact val_loss:2.00000000 val_bpb:1.20000000"] if finished else []
        return runlog.parse_text("\n".join(lines) + "\n", Path("like.log"))

    projection = watch.project(log(0.1, False), [log(0.0, True)])
    assert projection.value == pytest.approx(1.2 + 0.1 * 0.6) and projection.margin == pytest.approx(0.006, rel=0.05)
    both = watch.project(log(0.1, False), [log(0.0, True), log(0.2, True)])
    assert both.value == pytest.approx(1.2) and both.margin > 0.1, "two guides that disagree must widen the range"


def test_validation_makes_bpb_of_the_fit():
    lines = [f"step:{i}/9000 train_loss:{4 - i / 4000:.4f} train_time:{i}ms" for i in range(500, 4001, 500)]
    lines += ["step:4000/9000 val_loss:3.2000 val_bpb:1.9200 train_time:4000ms"]
    projection = watch.project(runlog.parse_text("\n".join(lines) + "\n", Path("x")), [])
    assert projection.quantity == "val_bpb" and "validation at step 4000" in projection.how
    assert 1.0 < projection.value < 1.92
    assert watch.project(runlog.parse(DONE), []) is None, "nothing to guess once it has trained"


# ----------------------------------------------------------------------------------------------------------------------
# The view
# ----------------------------------------------------------------------------------------------------------------------


def test_the_curve_goes_where_the_points_are():
    assert watch.braille([(0, 1.0), (10, 0.0)], 10, 2, 1) == ["⠑⢄"]
    rows = watch.braille([(0, 1.0), (10, 1.0)], 20, 4, 2)
    assert rows[0].strip("⠀") and not rows[1].strip("⠀"), "flat at the top"
    assert rows[0].endswith("⠀"), "what lies ahead is empty"


@pytest.mark.parametrize("size", [(80, 24), (40, 12), (10, 5), (200, 60)])
def test_the_view_fits_its_terminal(size):
    lines = watch.screen(until(DONE, 1100), [], {"now": "x" * 300}, size)
    assert len(lines) < size[1] and max(map(len, lines)) < size[0]


def test_nothing_in_a_log_reaches_the_terminal_as_a_code(tmp_path):
    text = corpus.log_text("pgolf").replace("legal_ttt", "legal\x1b[2J_ttt")
    path = tmp_path / "a\x1b[31m.txt"
    path.write_text(text.replace("late_qat:", "l\x9bate_qat:"), "utf-8")
    out = io.StringIO()
    watch.follow(arguments(path, "--once"), [], out)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", out.getvalue())
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", watch.last_line(path))


# ----------------------------------------------------------------------------------------------------------------------
# Following
# ----------------------------------------------------------------------------------------------------------------------


class Acts:
    """Stands in for sleep: does the next thing to the log instead of waiting."""

    def __init__(self, *acts):
        self.acts = list(acts)

    def __call__(self, seconds: float) -> None:
        self.acts.pop(0)()


def test_a_run_is_followed_from_before_its_log_to_its_result(tmp_path):
    text, path, out = DONE.read_text("utf-8"), tmp_path / "run.txt", io.StringIO()
    cuts = [text.index("step:500/1500"), text.index("step:900/1500") + 25, text.rindex("result {") + 30, len(text)]
    writes = [lambda cut=cut: path.write_text(text[:cut], "utf-8") for cut in cuts]
    watch.follow(arguments(path), [], out, Acts(lambda: None, *writes))
    lines = out.getvalue().splitlines()
    assert "does not exist yet" in lines[0] and sum("does not exist" in line for line in lines) == 1
    assert lines[1].startswith("step 400/1500") and "tokens/s" in lines[1] and "training left" in lines[1]
    assert lines[2].startswith("step 800/1500"), "a line that is still being written does not count"
    assert "last score legal_ttt 2.0371" in lines[3]
    assert lines[-1] == "finished: legal_ttt val_bpb 2.037071  1,942,626 bytes  training 1,242.5 s  evaluation 238.7 s"


def test_replaced_cut_and_removed_logs(tmp_path):
    text, path, out = DONE.read_text("utf-8"), tmp_path / "run.txt", io.StringIO()
    part = [text[: text.index(f"step:{step}/1500")] for step in (500, 300, 200)]

    def rotate() -> None:
        (tmp_path / "new").write_text(part[2], "utf-8")
        os.replace(tmp_path / "new", path)

    path.write_text(part[0], "utf-8")
    acts = [lambda: path.write_text(part[1], "utf-8"), rotate, path.unlink, lambda: path.write_text(text, "utf-8")]
    watch.follow(arguments(path), [], out, Acts(*acts))
    said = out.getvalue()
    order = ["step 400/", "read again", "step 200/", "read again", "step 100/", "is gone", "step 1500/", "finished"]
    position = -1
    for words in order:
        position = said.find(words, position + 1)
        assert position >= 0, (words, said)


def test_logs_that_cannot_be_used_end_in_one_line(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("no result\n")
    assert watch.run(arguments(tmp_path)) == 2
    assert watch.run(arguments(DONE, "--like", tmp_path / "missing")) == 2
    assert watch.run(arguments(DONE, "--like", tmp_path / "empty.txt")) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("error: ") for line in errors)
    for interval in ("0", "-1", "nan", "x"):
        with pytest.raises(SystemExit):
            arguments(DONE, f"--every={interval}")


def test_control_c_ends_it_without_a_traceback(tmp_path):
    command = [sys.executable, "-c", COMMAND, str(tmp_path / "none.txt"), "--every", "0.1"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.default_int_handler
        ),  # a job in the background ignores it
    )
    assert "waiting" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0 and err == ""


def test_a_closed_pipe_ends_it_without_a_traceback(tmp_path):
    path = tmp_path / "run.txt"
    path.write_text(DONE.read_text("utf-8").partition("step:300/")[0], "utf-8")
    command = f"{sys.executable} -c '{COMMAND}' {path} --every 0.05 | head -n 1"
    process = subprocess.Popen(["bash", "-c", command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().startswith(b"step 200/")
    path.write_bytes(DONE.read_bytes())
    _, err = process.communicate(timeout=20)
    assert err == b""


def test_on_a_terminal_the_view_is_drawn_in_place_and_left_clean(tmp_path):
    path, (master, slave) = tmp_path / "run.txt", pty.openpty()
    text = DONE.read_text("utf-8")
    path.write_text(text[: text.index("step:900/1500")], "utf-8")
    command = [sys.executable, "-c", COMMAND, str(path), "--every", "0.05"]
    environ = os.environ | {"COLUMNS": "90", "LINES": "30"}
    process = subprocess.Popen(command, cwd=ROOT, stdout=slave, stderr=slave, stdin=slave, env=environ)
    os.close(slave)
    seen = b""

    def read() -> None:
        nonlocal seen
        try:
            while data := os.read(master, 65536):
                seen += data
        except OSError:  # how a pseudo-terminal ends
            pass

    reader = threading.Thread(target=read)
    reader.start()
    deadline = time.monotonic() + 20
    while b"800/1500" not in seen and time.monotonic() < deadline:
        time.sleep(0.02)
    path.write_text(text, "utf-8")
    assert process.wait(timeout=20) == 0
    reader.join(timeout=20)
    os.close(master)
    shown = seen.decode()
    assert shown.startswith(watch.ENTER) and watch.LEAVE in shown
    assert re.search("[\u2801-\u28ff]{3}", shown) and "Traceback" not in shown
    assert shown.rpartition(watch.LEAVE)[2].startswith("finished: legal_ttt")
