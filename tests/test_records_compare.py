"""The comparison of two sides against figures from textbooks, and the command line around it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import records_corpus as corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from records_corpus import Result

from records import submit
from records.submission import compare
from records.submission.compare import RULES, Sample, judge, sample

ROOT = Path(__file__).resolve().parent.parent

# "Welch's t-test", Wikipedia, first example: equal spreads and sizes; t = -2.46, nu = 25.0, P = 0.021 (two-sided).
EXAMPLE_1 = (
    [27.5, 21.0, 19.0, 23.6, 17.0, 17.9, 16.9, 20.1, 21.9, 22.6, 23.1, 19.6, 19.0, 21.7, 21.4],
    [27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0, 24.8, 20.2, 21.9, 22.1, 22.9, 20.5, 24.4],
)
# The second: unequal spreads and sizes; t = -1.57, nu = 9.9, P = 0.149.
EXAMPLE_2 = (
    [17.2, 20.9, 22.6, 18.1, 21.7, 21.4, 23.5, 24.2, 14.7, 21.8],
    [21.5, 22.8, 21.0, 23.0, 21.6, 23.6, 22.5, 20.7, 23.4, 21.8]
    + [20.7, 21.7, 21.5, 22.5, 23.6, 21.5, 22.5, 23.5, 21.5, 21.8],
)


@pytest.fixture
def needs_scipy():
    pytest.importorskip("scipy")


def write_side(folder: Path, name: str, losses: list[float], dialect: str = "pgolf", **changes) -> list[str]:
    """Logs with these headline losses, one per seed."""
    paths = []
    label = "legal_ttt" if dialect == "pgolf" else "quantized"
    for seed, loss in enumerate(losses):
        found = changes.get("results") or (corpus.result(label, loss),)
        text = corpus.log_text(dialect, **{**changes, "seed": seed, "run_id": f"{name}{seed}", "results": found})
        path = folder / f"{name}_seed{seed}.log"
        path.write_text(text)
        paths.append(str(path))
    return paths


def report_of(capsys, *argv: str) -> dict:
    assert submit.main(["compare", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))


def error_of(capsys, *argv: str) -> str:
    """The error line of a comparison that cannot be made."""
    try:
        code = submit.main(["compare", *argv])
    except SystemExit as leaving:
        code = leaving.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    return err


# ----------------------------------------------------------------------------------------------------------------------
# Statistics
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sides", "t", "df", "p"), [(EXAMPLE_1, -2.46, 25.0, 0.021), (EXAMPLE_2, -1.57, 9.9, 0.149)])
def test_welch_as_in_the_textbook(needs_scipy, sides, t, df, p):
    a, b = map(sample, sides)
    found_t, found_df, found_p = compare.welch(b, a)  # t of mean a - mean b
    assert found_t == pytest.approx(t, abs=0.005) and found_df == pytest.approx(df, abs=0.05)
    assert 2 * min(found_p, 1 - found_p) == pytest.approx(p, abs=0.0005)
    # One-sided, lower is better: a is better than b.
    assert compare.welch(a, b)[2] == pytest.approx(p / 2, abs=0.0005)


@pytest.mark.parametrize("sides", [EXAMPLE_1, EXAMPLE_2, ([1.0, 1.1], [1.3, 1.2, 1.6])])
@pytest.mark.parametrize("margin", [0.0, 0.05, -1.0])
def test_welch_as_in_scipy(needs_scipy, sides, margin):
    from scipy import stats

    shifted = [value - margin for value in sides[1]]
    expected = stats.ttest_ind(sides[0], shifted, equal_var=False, alternative="less")
    t, df, p = compare.welch(sample(sides[0]), sample(sides[1]), margin)
    assert (-t, df, p) == pytest.approx((expected.statistic, expected.df, expected.pvalue), rel=1e-9)


def test_power_as_in_the_textbook(needs_scipy):
    """Cohen, Statistical Power Analysis: d = 0.5, one-sided 0.05, power 0.80 need 50 a side, 51 by the exact t."""
    a, b = Sample(2, 0.0, 1.0), Sample(2, 0.5, 1.0)
    assert 2 + compare.more_seeds(a, b, 0.0, 0.05) == 51
    assert compare.power(a._replace(n=51), b._replace(n=51), 0.0, 0.05) == pytest.approx(0.8059, abs=0.0005)
    assert compare.power(a._replace(n=50), b._replace(n=50), 0.0, 0.05) < 0.8
    # At no difference from the margin the power is alpha, whatever the number of seeds.
    assert compare.power(a._replace(n=9), b._replace(n=9), 0.5, 0.05) == pytest.approx(0.05)


def test_seeds_needed_really_give_that_power(needs_scipy):
    """Against simulation: of 2,000 draws with that many seeds, about 80 % meet the rule."""
    np = pytest.importorskip("numpy")
    from scipy import stats

    a, b = Sample(3, 2.000, 0.003), Sample(3, 2.010, 0.004)
    n = 3 + compare.more_seeds(a, b, 0.005, 0.01)
    random = np.random.default_rng(0)
    draws = [random.normal(side.mean, side.std, (2000, n)) for side in (a, b)]
    p = stats.ttest_ind(draws[0], draws[1] - 0.005, axis=1, equal_var=False, alternative="less").pvalue
    assert 0.77 < (p < 0.01).mean() < 0.86


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(1, 3), min_size=2, max_size=6),
    st.lists(st.floats(1, 3), min_size=2, max_size=6),
    st.sampled_from(RULES),
)
def test_a_verdict_holds_together(a, b, rule):
    pytest.importorskip("scipy")
    verdict = judge(rule, sample(a), sample(b))
    if verdict.p is None:
        assert verdict.met is None and verdict.note
        return
    assert verdict.met == (verdict.p < rule.alpha) and 0 <= verdict.p <= 1
    assert (verdict.more_seeds == 0) == verdict.met
    better = sample(b).mean - sample(a).mean > rule.margin
    assert better or (not verdict.met and verdict.more_seeds is None)


@pytest.mark.parametrize("scale", [1e-200, 1e150])
def test_spreads_of_any_size(needs_scipy, scale):
    a, b = sample([1 * scale, 2 * scale]), sample([3 * scale, 5 * scale])
    assert compare.welch(a, b) == pytest.approx(compare.welch(sample([1, 2]), sample([3, 5])))


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def test_two_sides(needs_scipy, tmp_path, capsys):
    a = write_side(tmp_path, "a", [2.040, 2.042, 2.041])
    b = write_side(tmp_path, "b", [2.060, 2.062, 2.061])
    report = report_of(capsys, *a, "--", *b)
    assert report["a"]["val_loss"] == dict(mean=pytest.approx(2.041), std=pytest.approx(0.001))
    assert report["better_by"]["nats"] == pytest.approx(0.02)
    assert report["better_by"]["bpb"] == pytest.approx(0.02 * corpus.BPB_PER_NAT, abs=1e-7)
    assert [rule["met"] for rule in report["rules"]] == [True, True] and report["remarks"] == []
    # t = 0.015 / sqrt(2 * 0.001**2 / 3), with four degrees of freedom
    assert (report["rules"][0]["t"], report["rules"][0]["df"]) == (pytest.approx(18.371, abs=1e-3), pytest.approx(4))

    report = report_of(capsys, *b, "--", *a)
    assert [rule["met"] for rule in report["rules"]] == [False, False]
    assert {rule["note"] for rule in report["rules"]} == {"at these means no number of seeds would meet it"}

    assert submit.main(["compare", *a, "--", *b]) == 0
    out = capsys.readouterr().out
    assert "A is better by 0.02000 nats, 0.01181 bpb" in out and out.count(": met; p ") == 2
    assert submit.main(["compare", *b, "--", *a]) == 0
    assert "A is worse by 0.02000 nats, 0.01181 bpb" in capsys.readouterr().out


def test_the_rules_differ(needs_scipy, tmp_path, capsys):
    """Four thousandths better beyond doubt: enough for the frontier, never for the margin of 0.005 nats."""
    a, b = write_side(tmp_path, "a", [2.000, 2.0002]), write_side(tmp_path, "b", [2.004, 2.0042])
    margin, frontier = report_of(capsys, *a, "--", *b)["rules"]
    assert (margin["met"], frontier["met"]) == (False, True) and margin["more_seeds"] is None
    # And six, with a spread as wide: more seeds would tell.
    b = write_side(tmp_path, "c", [2.002, 2.010])
    margin, frontier = report_of(capsys, *a, "--", *b)["rules"]
    assert not margin["met"] and margin["more_seeds"] > 1
    assert margin["note"].startswith(f"{margin['more_seeds']} more seeds a side")


def test_one_seed_tests_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)  # nor does it need scipy
    a, b = write_side(tmp_path, "a", [2.0]), write_side(tmp_path, "b", [2.1, 2.2])
    report = report_of(capsys, *a, "--", *b)
    assert report["a"]["val_bpb"]["std"] is None
    assert {(rule["p"], rule["met"], rule["more_seeds"]) for rule in report["rules"]} == {(None, None, None)}
    assert all(rule["note"].endswith("at least one more is needed for A") for rule in report["rules"])
    assert submit.main(["compare", *a, "--", *b]) == 0
    assert "std unknown with one seed" in capsys.readouterr().out


def test_without_scipy_there_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    a, b = write_side(tmp_path, "a", [2.0, 2.01]), write_side(tmp_path, "b", [2.1, 2.2])
    assert "pip install -r requirements-records.txt" in error_of(capsys, *a, "--", *b)


def test_runs_that_repeat_exactly_test_nothing(tmp_path, capsys):
    a, b = write_side(tmp_path, "a", [2.0, 2.0]), write_side(tmp_path, "b", [2.1, 2.1])
    assert all("no spread" in rule["note"] for rule in report_of(capsys, *a, "--", *b)["rules"])


def test_a_folder_is_its_logs(tmp_path, capsys):
    for name, loss in (("new", 2.0), ("old", 2.1)):
        (tmp_path / name).mkdir()
        write_side(tmp_path / name, "train", [loss])
        (tmp_path / name / "requirements.txt").write_text("numpy\n")
    report = report_of(capsys, str(tmp_path / "new"), "--versus", str(tmp_path / "old"))
    assert report["better_by"]["nats"] == pytest.approx(0.1)
    (tmp_path / "new" / "train_seed0.log").unlink()
    assert "no log in this folder" in error_of(capsys, str(tmp_path / "new"), "--", str(tmp_path / "old"))


def test_a_folder_declares_its_headline(tmp_path, capsys):
    results = (corpus.result("quantized", 2.1), corpus.result("quantized_ttt", 2.0))
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        write_side(tmp_path / name, "train", [0], "baseline-noprefix", results=results)
        (tmp_path / name / "submission.json").write_text('{"headline": "quantized_ttt_exact"}')
    with (tmp_path / "new" / "train_seed0.log").open("a") as log:
        log.write("peak memory allocated: 1 MiB\n")  # another file, or it would be the same run
    report = report_of(capsys, str(tmp_path / "new"), "--", str(tmp_path / "old"))
    assert [report[side]["label"] for side in "ab"] == ["quantized_ttt"] * 2


def test_a_headline_that_is_not_declared_is_asked_for(tmp_path, capsys):
    results = (corpus.result("quantized_ttt", 2.0), corpus.result("quantized", 2.1))  # the last is not the best
    a = write_side(tmp_path, "a", [0], "baseline-noprefix", results=results)
    b = write_side(tmp_path, "b", [2.2], "baseline-noprefix")
    error = error_of(capsys, *a, "--", *b)
    assert "--headline" in error and "quantized_ttt" in error
    report = report_of(capsys, *a, "--", *b, "--headline", "quantized_exact")
    assert report["better_by"]["nats"] == pytest.approx(0.1)
    assert "no single result 'x'" in error_of(capsys, *a, "--", *b, "--headline", "x")


def generations(folder: Path) -> tuple[Path, Path]:
    """A has score x; B has x and a better y that its JSON states as its val_bpb."""
    for name, found in (("a", [("x", 2.05)]), ("b", [("x", 2.06), ("y", 2.0)])):
        (folder / name).mkdir()
        for seed in (1, 2):
            results = tuple(corpus.result(label, loss + seed / 1000) for label, loss in found)
            text = corpus.log_text(
                "baseline", seed=seed, run_id=f"{name}{seed}", results=(*results, corpus.result("z", 3))
            )
            (folder / name / f"train_seed{seed}.log").write_text(text)
        mean = round((found[-1][1] + 0.0015) * corpus.BPB_PER_NAT, 5)
        (folder / name / "submission.json").write_text(json.dumps({"val_bpb": mean}))
    return folder / "a", folder / "b"


def test_each_side_is_compared_by_the_score_that_it_declares(needs_scipy, tmp_path, capsys):
    a, b = generations(tmp_path)
    for sides in ([str(a), "--", str(b)], [*map(str, a.glob("*.log")), "--", *map(str, b.glob("*.log"))]):
        report = report_of(capsys, *sides)
        assert [report[side]["label"] for side in "ab"] == ["x", "y"]
        assert report["better_by"]["nats"] == pytest.approx(-0.05)
        assert report["remarks"] == ["different results are compared: A x, B y"]


def test_a_score_that_is_asked_for_and_not_the_declared_one_is_said(needs_scipy, tmp_path, capsys):
    a, b = generations(tmp_path)
    report = report_of(capsys, str(a), "--", str(b), "--headline", "x_exact")
    assert report["better_by"]["nats"] == pytest.approx(0.01) and report["b"]["declared"] == "y"
    assert report["remarks"] == ["B declares y (val_bpb 1.18231), not x, which was asked for"]
    assert submit.main(["compare", str(a), "--", str(b), "--headline", "x"]) == 0
    assert "note: B declares y" in capsys.readouterr().out


def test_a_folder_of_several_experiments_is_the_one_that_it_declares(needs_scipy, tmp_path, capsys):
    (tmp_path / "both").mkdir()
    write_side(tmp_path / "both", "a", [2.05, 2.051, 2.052])
    write_side(tmp_path / "both", "b", [1.95, 1.951, 1.952])
    mean = round(2.051 * corpus.BPB_PER_NAT, 5)
    (tmp_path / "both" / "submission.json").write_text(json.dumps({"val_bpb": mean}))
    report = report_of(capsys, str(tmp_path / "both"), "--", *write_side(tmp_path, "c", [2.1, 2.11]))
    assert report["a"]["val_loss"]["mean"] == pytest.approx(2.051) and report["a"]["seeds"] == [0, 1, 2]


def test_the_runs_of_one_log_are_several(needs_scipy, tmp_path, capsys):
    runs = [Path(path).read_text() for path in write_side(tmp_path, "a", [2.0, 2.01])]
    (tmp_path / "both.log").write_text("".join(runs))
    b = write_side(tmp_path, "b", [2.1, 2.11])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.log").write_text("".join(runs))
    for both in ("both.log", "folder"):
        report = report_of(capsys, str(tmp_path / both), "--", *b)
        assert report["a"]["seeds"] == [0, 1] and report["a"]["val_loss"]["mean"] == pytest.approx(2.005)
    (tmp_path / "twice.log").write_text(runs[0] * 2)
    assert "is the same log as" in error_of(capsys, str(tmp_path / "twice.log"), "--", *b)


def test_what_cannot_be_compared(tmp_path, capsys):
    a, b = write_side(tmp_path, "a", [2.0, 2.01]), write_side(tmp_path, "b", [2.1])
    assert "is the same log as" in error_of(capsys, *a, a[0], "--", *b)
    assert "is the same log as" in error_of(capsys, *a, "--", *b, a[1])
    assert "two sides" in error_of(capsys, *a)
    assert "no such file" in error_of(capsys, *a, "--", "absent.log")
    error_of(capsys)
    mixed = write_side(tmp_path, "mixed", [2.1], "baseline-noprefix")
    assert "their headlines are legal_ttt, quantized" in error_of(capsys, *a, "--", *b, *mixed)
    broken = write_side(tmp_path, "broken", [math.nan])
    assert "not finite" in error_of(capsys, *a, "--", *broken)


def published(path: Path, loss: float, bpb: float, tokens: int | None) -> str:
    """A public log; its validation bytes follow from its tokens and a score in both units."""
    text = corpus.log_text("baseline", results=(Result("legal_ttt", loss, bpb),))
    said = "tokens:62021632"
    assert said in text
    path.write_text(text.replace(said, f"tokens:{tokens}" if tokens else "tokens unknown"))
    return str(path)


def test_bits_per_byte_of_other_tokens_compare_where_the_validation_bytes_agree(needs_scipy, tmp_path, capsys):
    a = published(tmp_path / "a.log", 2.0, 2.0 * corpus.BPB_PER_NAT, 60_000_000)
    b = published(tmp_path / "b.log", 3.06, 2.04 * corpus.BPB_PER_NAT, 40_000_000)
    report = report_of(capsys, a, "--", b)
    assert report["better_by"]["nats"] is None and "other tokens" in report["rules"][0]["note"]
    assert report["better_by"]["bpb"] == pytest.approx(0.04 * corpus.BPB_PER_NAT, abs=1e-7)
    for tokens, said in ((41_000_000, "over different texts (14"), (None, "not every log tells the validation bytes")):
        report = report_of(capsys, a, "--", published(tmp_path / "b.log", 3.06, 2.04 * corpus.BPB_PER_NAT, tokens))
        assert report["better_by"] == dict(nats=None, bpb=None)
        assert all(said in rule["note"] and rule["met"] is None for rule in report["rules"])


def test_scores_of_other_texts_do_not_compare(needs_scipy, tmp_path, capsys):
    a, b = write_side(tmp_path, "a", [2.0, 2.01]), write_side(tmp_path, "b", [2.1, 2.11])
    path = Path(b[1])
    path.write_text(path.read_text().replace('"bytes": 2437', '"bytes": 2500'))
    report = report_of(capsys, *a, "--", *b)
    assert report["better_by"] == dict(nats=None, bpb=None)
    assert "different texts (2,437 and 2,500 bytes)" in report["rules"][1]["note"]


def test_a_metric_that_some_run_does_not_print(needs_scipy, tmp_path, capsys):
    a, b = write_side(tmp_path, "a", [2.0, 2.01]), write_side(tmp_path, "b", [2.1, 2.11])
    (tmp_path / "only.log").write_text("legal_ttt_exact val_bpb:1.18000000\n")
    report = report_of(capsys, *a, str(tmp_path / "only.log"), "--", *b)
    margin, frontier = report["rules"]
    assert (report["a"]["val_loss"], margin["met"], margin["note"]) == (None, None, "not every run prints val_loss")
    assert frontier["met"] is True and report["a"]["n"] == 3


def test_remarks(tmp_path, capsys):
    a = write_side(tmp_path, "a", [2.0]) + write_side(tmp_path, "again", [2.01], settings=(("num_layers", 12),))
    b = write_side(tmp_path, "b", [2.1], "baseline")
    remarks = report_of(capsys, *a, "--", *b)["remarks"]
    assert "A has several runs of seed 0: not independent" in remarks
    assert "A mixes runs of different settings" in remarks
    assert "different results are compared: A legal_ttt, B quantized" in remarks


# ----------------------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------------------


def test_help_says_what_there_is(capsys):
    assert submit.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name}" in out for name in submit.COMMANDS)
    for name, command in submit.COMMANDS.items():
        if not (ROOT / "records" / "submission" / f"{command.module}.py").exists():
            continue
        with pytest.raises(SystemExit) as leaving:
            submit.main([name, "--help"])
        out = capsys.readouterr().out
        assert leaving.value.code == 0 and f"submit.py {name} " in out and command.description.splitlines()[0] in out


def test_a_command_that_is_none(capsys):
    assert submit.main(["compere"]) == 2
    assert capsys.readouterr().err.startswith("error: no command 'compere'; there are new, check,")
    assert submit.main([]) == 2


@pytest.mark.parametrize("how", [["records/submit.py"], ["-m", "records.submit"]])
def test_runs_as_a_file_and_as_a_module(how, tmp_path):
    """With the standard library alone: neither torch nor scipy nor anything else is imported for one seed a side."""
    a, b = write_side(tmp_path, "a", [2.0]), write_side(tmp_path, "b", [2.1])
    guard = tmp_path / "guard"
    for package in ("torch", "numpy", "scipy", "matplotlib", "rich"):
        (guard / package).mkdir(parents=True)
        (guard / package / "__init__.py").write_text("raise RuntimeError('imported')")
    command = [sys.executable, *how, "compare", *a, "--", *b]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(guard)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "A is better by 0.10000 nats" in done.stdout


def test_a_reader_that_closes_the_pipe(tmp_path):
    a, b = write_side(tmp_path, "a", [2.0]), write_side(tmp_path, "b", [2.1])
    command = f"{sys.executable} records/submit.py compare {a[0]} -- {b[0]} --json | true"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
