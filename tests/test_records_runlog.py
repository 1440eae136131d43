"""The parser of logs: what the corpus wrote is what it reads, and what is not clear is said."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import records_corpus as corpus
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records_corpus import Result, Run, result

from records.submission import runlog
from records.submission.runlog import LogError, RunLog, parse, parse_text

LOGS = Path(__file__).resolve().parent.parent / "records" / "logs"
NOWHERE = Path("train_seed1337.log")
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(text: str) -> RunLog:
    return parse_text(text, NOWHERE)


def assert_read(log: RunLog, run: Run, dialect: str) -> None:
    """Whether the log says what the run did, and nothing of what its source says."""
    assert log.dialect == dialect
    assert (log.seed, log.world_size, log.model_params) == (run.seed, run.world_size, run.model_params)
    assert (log.bytes_code, log.bytes_model, log.bytes_total) == (run.bytes_code, run.bytes_model, run.bytes_total)
    trained = [step for step in log.steps if step.train_loss is not None]
    assert [(step.step, step.total, step.train_loss) for step in trained] == [
        (step, run.total, run.loss(step)) for step in run.steps
    ]
    if dialect != "baseline-noprefix":  # that one prints minutes
        assert [step.time_ms for step in trained] == [run.time_ms(step) for step in run.steps]
    else:
        assert [step.time_ms for step in trained] == pytest.approx([run.time_ms(step) for step in run.steps], abs=3001)
        assert {step.tokens_per_s for step in trained} == {7_711_432}
    scores = [score for score in log.scores if not runlog.DIAGNOSTIC.search(score.label)]
    expected = [(r.label, pytest.approx(r.loss, abs=5e-9), pytest.approx(r.bpb, abs=5e-9)) for r in run.results]
    assert [score[:3] for score in scores] == expected
    assert [score.extra for score in scores] == [r.extra.strip() for r in run.results]
    assert [score.eval_ms for score in scores] == [r.eval_ms for r in run.results]
    assert all(score.exact for score in scores)
    assert log.train_seconds == pytest.approx(run.train_ms / 1000)
    assert {step.val_loss for step in log.steps} <= {None, 6.9357, 9.0065, round(run.final_loss, 4)}
    assert {size.bytes for size in log.sizes} <= {run.bytes_total, run.bytes_raw + run.bytes_code}


# ----------------------------------------------------------------------------------------------------------------------
# Every dialect, label, size and encoding
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", corpus.DIALECTS)
def test_reads_what_the_run_did(dialect):
    run = corpus.run_of(dialect, seed=42, run_id="mine")
    log = read(corpus.DIALECTS[dialect](run))
    assert_read(log, run, dialect)
    assert log.undecided == [] and log.runs == [1]
    assert (log.run_id or "mine", log.torch, log.cuda, log.device) == ("mine", run.torch, "12.8", run.device)
    assert log.headline()[1:3] == (run.results[-1].loss, run.results[-1].bpb)
    assert ("stopping_early", run.steps[-1]) in log.events
    assert log.source == run.source


@pytest.mark.parametrize("encoding", corpus.ENCODINGS)
@pytest.mark.parametrize("dialect", corpus.DIALECTS)
def test_encodings(dialect, encoding, tmp_path):
    run, path = corpus.run_of(dialect), tmp_path / "train.log"
    path.write_bytes(corpus.ENCODINGS[encoding](corpus.DIALECTS[dialect](run)))
    log = parse(path)
    assert_read(log, run, dialect)
    assert log.source == run.source and log.undecided == []


@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("extra", ["", "stride:64", "(stride=16, T=0.90)", "T=0.90"])
@pytest.mark.parametrize("label", corpus.SCORE_LABELS)
def test_every_label_of_a_result(label, extra, rounded):
    run = Run(results=(result(label, 1.95648123, extra, 74_321),), rounded=rounded)
    log = read(corpus.baseline(run))
    assert_read(log, run, "baseline")
    assert log.headline() == log.score(label) and log.undecided == []
    assert log.eval_seconds == 74.321


@pytest.mark.parametrize("label", corpus.DIAGNOSTIC_LABELS)
def test_a_diagnostic_is_no_headline(label):
    log = read(corpus.baseline(Run(results=(result(label, 1.9), result("quantized", 2.0)))))
    assert log.score(label).val_loss == 1.9
    assert log.headline().label == "quantized"
    assert read(corpus.baseline(Run(results=(result(label, 1.9),)))).headline() is None


def test_what_a_result_depends_on_may_stand_before_its_figures():
    log = read("final_sliding_window_eval_exact stride:64 val_loss:1.90000000 val_bpb:1.12000000\n")
    assert log.scores[0][:6] == ("final_sliding_window_eval", 1.9, 1.12, True, 1, "stride:64")


@pytest.mark.parametrize("label", corpus.SIZE_LABELS)
def test_every_label_of_a_size(label):
    run = Run(size_label=label)
    log = read(corpus.baseline(run))
    assert [(size.label, size.bytes) for size in log.sizes] == [
        ("", run.bytes_raw + run.bytes_code),
        (label, run.bytes_total),
    ]
    assert (log.bytes_total, log.bytes_model) == (run.bytes_total, run.bytes_model)
    assert log.undecided == []


def test_our_own_logs_of_earlier_versions():
    finished = {"cpu_mini_seed1337.txt": 2.0370714110138963, "cpu_mini_seed1337_swa_raw.txt": 2.041261971845229}
    for path in sorted(LOGS.glob("*.txt")):
        log = parse(path)
        assert (log.dialect, log.world_size, log.device) == ("pgolf", 1, "cpu AVX512")
        assert log.settings["seed"] == log.seed and len(log.steps) == 26 and ("late_qat", 1102) in log.events
        assert log.bytes_code == len(log.source.encode())  # and its hash is the one stated, or undecided would say so
        if path.name in finished:
            assert log.headline().val_bpb == finished[path.name] and log.undecided == []
        if log.result is None:
            assert log.headline() is None and "did not come to its end" in log.undecided[0]


def test_a_run_of_this_version(tmp_path, tiny_data):
    pytest.importorskip("torch")
    from conftest import run_here

    ran = run_here(tmp_path, tiny_data)
    log = parse(ran.log)
    assert log.undecided == [] and log.result == ran.result
    assert log.headline()[:3] == tuple(ran.result["headline"].values())
    assert log.bytes_total == ran.result["bytes_total"] and log.settings_hash == ran.result["settings_hash"]
    assert log.steps[-1].val_loss is not None and log.phases == ran.result["phase_seconds"]


# ----------------------------------------------------------------------------------------------------------------------
# Dumps of the source
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", corpus.DIALECTS)
@pytest.mark.parametrize(
    "start",
    [
        "",
        "#!/usr/bin/env python3\n# a comment: seed:7777\n",
        '"""One line."""\n',
        "import os\n",
        "_A,_B=None,True\nimport lzma as L,base64 as B\n",
        'import lzma as L,base64 as B\nexec(L.decompress(B.b85decode("'
        + "{Wp48S^xk9=GL@E0stWa8~^|S5YJf5;*&`" * 400
        + '")))\n',
    ],
)
def test_no_number_of_the_source_is_a_result(dialect, start):
    run = corpus.run_of(dialect, source=start + corpus.DECOY_SOURCE)
    log = read(corpus.DIALECTS[dialect](run))
    assert_read(log, run, dialect)
    assert log.source == run.source and log.undecided == []


def test_a_dump_without_any_marker():
    text = corpus.DECOY_SOURCE + corpus.console()
    assert_read(read(text), Run(), "baseline")
    assert read(text).source == corpus.DECOY_SOURCE


@pytest.mark.parametrize("dialect", corpus.DIALECTS)
def test_a_log_that_ends_inside_its_source(dialect):
    text = corpus.log_text(dialect)
    start = text.index("Trains a model")
    for end in range(start + 40, start + len(corpus.DECOY_SOURCE) - 60, 97):
        log = read(text[:end])
        assert (log.scores, log.steps, log.sizes) == ([], [], [])
        assert not {7777, 777} & {log.seed, log.bytes_code}
        if dialect == "pgolf":
            assert any("does not end" in said for said in log.undecided)


def test_a_source_that_was_cut_before_it_was_printed():
    """Its string never closes; what the baseline prints after its source does."""
    run = Run(source="import os\n" + corpus.DECOY_SOURCE[:200])
    log = read(corpus.baseline(run))
    assert_read(log, run, "baseline")


def test_a_source_other_than_stated():
    text = corpus.log_text("pgolf").replace("SEED: int = 7777", "SEED: int = 7778")
    assert any("code_sha256" in said for said in read(text).undecided)


def test_a_marker_inside_the_source_does_not_end_it():
    run = corpus.run_of("pgolf", source=corpus.DECOY_SOURCE + 'X = """\n===== source end =====\nseed:7777\n"""\n')
    log = read(corpus.pgolf(run))
    assert_read(log, run, "pgolf")
    assert log.source == run.source and log.undecided == []


def test_a_source_with_windows_newlines_keeps_them():
    run = corpus.run_of("pgolf", source=corpus.DECOY_SOURCE.replace("\n", "\r\n"))
    log = read(corpus.pgolf(run))
    assert log.source == run.source and log.undecided == []


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be decided
# ----------------------------------------------------------------------------------------------------------------------


def test_a_last_score_that_is_the_best_is_the_headline():
    found = [result("final_int6_roundtrip", 2.0), result("final_int6_sliding_window", 1.9), result("legal_ttt", 1.8)]
    log = read(corpus.baseline(Run(results=tuple(found))))
    assert log.headline_and_why() == (log.score("legal_ttt"), "it is the last of the log and the best")
    assert log.undecided == []
    again = corpus.result("final_int8_zlib_roundtrip", 1.8)  # the last, repeated for the sake of a parser
    assert read(corpus.baseline(Run(results=(*found, again)))).headline().label == "legal_ttt"


def test_several_results_of_which_the_last_is_not_the_best_are_no_headline():
    found = [result("final_int6_roundtrip", 2.0), result("legal_ttt", 1.8), result("final_int6_sliding_window", 1.9)]
    log = read(corpus.baseline(Run(results=tuple(found))))
    assert log.headline() is None
    assert [said for said in log.undecided if said.startswith("headline") and "legal_ttt" in said]


def test_one_figure_under_two_labels_is_the_headline():
    log = read(corpus.baseline(Run(results=(result("final_int6_x", 2.0), result("final_int8_zlib_roundtrip", 2.0)))))
    assert log.headline().label == "final_int6_x" and log.undecided == []


def test_a_diverged_pass_after_the_headline_is_not_taken_for_it():
    log = read(corpus.baseline(Run(results=(result("final_int6_sliding_window", 1.84), result("legal_ttt", 9.9)))))
    assert log.headline() is None and any("9.9" in said or "legal_ttt" in said for said in log.undecided)


@pytest.mark.parametrize("figure", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dialect", corpus.DIALECTS)
def test_figures_that_are_not_finite(dialect, figure):
    label = "legal_ttt" if dialect == "pgolf" else "quantized"
    log = read(corpus.log_text(dialect, results=(Result(label, figure, figure),)))
    assert [repr(score.val_bpb) for score in log.scores if score.label == label] == [repr(figure)]
    assert repr(log.headline().val_loss) == repr(figure)


def test_the_raw_model_is_no_submission():
    whole = corpus.baseline()
    cut = whole[: whole.index("Serialized model int8+zlib")]
    log = read(cut)
    assert len(log.sizes) == 1 and log.bytes_total is None
    assert any("raw model" in said for said in log.undecided)
    log = read(cut.replace("model_params:17059912\n", ""))
    assert log.bytes_total is None and any("raw model" in said for said in log.undecided)


def test_two_totals_without_a_label():
    """The raw model's and the compressed one's, told apart by their sizes alone."""
    text = corpus.baseline(Run(size_label="")).replace("model_params:17059912\n", "")
    assert read(text).bytes_total == Run().bytes_total


def test_sizes_that_do_not_say_which_counts():
    text = corpus.baseline()
    for more in (
        "Total submission size int6+zstd: 15000000 bytes\n",
        "Total submission size int8+zlib: 15000000 bytes\n",
    ):
        log = read(text + more)
        assert log.bytes_total is None and log.bytes_code is None
        assert any("which one counts" in said for said in log.undecided)
    assert read(text + "Total submission size int8+zlib: 15000000 bytes\n" * 2).bytes_total is None


def test_the_code_size_is_the_one_that_adds_up():
    text = corpus.noprefix().replace("Code size: ", "Code size (uncompressed): 131887 bytes\nCode size (compressed): ")
    log = read(text)
    assert (log.bytes_code, log.undecided) == (Run().bytes_code, [])
    log = read(corpus.baseline().replace(f"Code size: {Run().bytes_code}", "Code size: 17"))
    assert any("none of the code and model sizes add up" in said for said in log.undecided)


@pytest.mark.parametrize("size", ["15.24 MiB", "15.99 MB", "15.9 bytes", "16 MB"])
def test_megabytes_are_no_bytes(size):
    text = corpus.baseline().replace(f"Total submission size int8+zlib: {Run().bytes_total} bytes", "")
    log = read(text + f"Total submission size int8+zlib: {size}\n")
    assert log.bytes_total is None
    assert any("no whole number of bytes" in said and size in said for said in log.undecided)


def test_sizes_with_separators():
    log = read(corpus.baseline().replace(str(Run().bytes_total), f"{Run().bytes_total:,}"))
    assert log.bytes_total == Run().bytes_total


@pytest.mark.parametrize("dialect", corpus.DIALECTS)
def test_several_runs_in_one_log(dialect):
    first, second = (corpus.log_text(dialect, seed=seed, final_loss=loss) for seed, loss in ((1, 2.06), (2, 2.07)))
    log = read(first + second)
    assert log.seed is None and any(said.startswith("several values of seed: 1 (line ") for said in log.undecided)
    assert log.runs == [1, first.count("\n") + 1]
    assert log.settings is None  # they hold the seed
    assert any(said.startswith("2 runs in one log, from lines 1, ") for said in log.undecided)
    if dialect == "pgolf":
        assert log.headline() is None


def test_runs_that_print_no_head():
    log = read(corpus.console(Run(seed=1)).replace("seed:1\n", "") * 2)
    assert len(log.runs) == 2 and log.headline() is not None  # both say the same


def test_a_log_and_its_console_in_one_file():
    lines = corpus.baseline().splitlines(keepends=True)
    start = next(i for i, line in enumerate(lines) if line.startswith("val_bpb:enabled"))
    log = read("".join(lines[:start] + [line for line in lines[start:] for _ in (1, 2)]))
    assert_read(log, Run(), "baseline")
    assert log.runs == [1] and log.undecided == []


def test_a_score_whose_label_cannot_be_read_leaves_the_headline_open():
    text = corpus.log_text("baseline")
    score = read(text).headline()
    again = f"ttt_sliding:done val_loss={score.val_loss:.6f} val_bpb={score.val_bpb:.6f} elapsed=9.2s\n"
    assert read(text + again).headline() == score and read(text + again).undecided == []
    log = read(text + "ttt_sliding:done val_loss=1.890131 val_bpb=1.119442 elapsed=9.2s\n")
    assert log.headline() is None and log.unnamed == 1
    assert any("label could not be read: 1, the first in line" in said for said in log.undecided)


def test_an_old_label_without_a_time_takes_none():
    sliding = corpus.result("final_int6_sliding_window", 2.05012345, "stride:64", 74_000)
    alias = sliding._replace(label="final_int8_zlib_roundtrip", extra="", eval_ms=None)
    ttt = corpus.result("legal_ttt", 2.04, eval_ms=None)
    assert read(corpus.log_text("baseline", results=(sliding, alias))).eval_seconds == 74.0
    assert read(corpus.log_text("baseline", results=(sliding, alias, ttt))).eval_seconds is None


def test_a_resumed_run_is_one_run():
    run = corpus.run_of("pgolf", steps=(1, 2, 3, 4, 5, 6))
    lines = corpus.pgolf(run).splitlines(keepends=True)
    at = {k: next(i for i, line in enumerate(lines) if line.startswith(f"step:{k}/")) for k in (1, 4, 6)}
    source = next(i for i, line in enumerate(lines) if line.startswith("settings {"))
    end = next(i for i, line in enumerate(lines) if line == "===== source end =====\n" and i > source + 40)
    written = "checkpoint:written step:3 bytes:1234 path:c-3.pgckpt\n"  # an event of the disk, not of the run
    lost = [*lines[: at[4]], written, *lines[at[4] : at[6]], "late_qat:enabled step:5 scale:0.5\n"]
    again = [*lines[:source], *lines[end + 1 : at[1]], "resume:step:3 train_time:135ms from:checkpoint-3.pgckpt\n"]
    log = read("".join(lost + again + lines[at[4] :]))
    assert_read(log, run, "pgolf")
    assert (log.runs, log.undecided) == ([1], [])
    assert [name for name, _ in log.events] == ["resume", "late_qat", "stopping_early"]
    assert log.events[0] == ("resume", 3) and ("late_qat", 5) not in log.events


@pytest.mark.parametrize("dialect", corpus.DIALECTS)
def test_a_run_in_front_of_another_that_did_not_end(dialect):
    text = corpus.log_text(dialect)
    log = read(text[: text.rindex("200/20000 train_loss") - 5] + "\n" + text)
    assert log.headline() is not None and len(log.runs) == 2
    assert [said for said in log.undecided if said.startswith("2 runs")]


def test_two_different_results_of_one_run():
    """An evaluation alone, into the log of the run that trained: its headline is another."""
    run = corpus.run_of("pgolf")
    again = corpus.pgolf_result(replace(run, results=run.results[:2]))
    log = read(corpus.pgolf(run) + f"result {json.dumps(again)}\n")
    assert log.headline() is None and any("2 different `result` lines" in said for said in log.undecided)


def test_a_result_that_contradicts_its_lines():
    text = corpus.log_text("pgolf")
    lines = [line for line in text.splitlines(keepends=True) if not line.startswith("legal_ttt")]
    log = read("".join([*lines[:-1], "legal_ttt_exact val_loss:1.99000000 val_bpb:1.17000000\n", lines[-1]]))
    assert log.headline() is None and any("val_loss of legal_ttt" in said for said in log.undecided)
    log = read(text.replace(f"Code size: {Run().bytes_code}", "Code size: 5"))
    assert log.bytes_code is None and any("bytes_code" in said for said in log.undecided)


def test_a_figure_given_twice():
    log = read("quantized val_loss:2.0 val_bpb:1.2 val_bpb:1.1\n")
    assert log.scores == [] and "twice" in log.undecided[0]


def test_progress_is_no_result():
    for line in (
        "ttt chunk:5/100 val_loss:2.0 val_bpb:1.2",
        "  ttt_chunk [11/1893] bpb=1.186 time=4.5s",
        "ttp: b780/782 bl:2.26 bb:1.04 rl:2.29 rb:1.06 dl:10 gd:1",
        "sliding window 10% batch 5 val_bpb:1.2",
        "val_bpb:enabled tokenizer_kind=sentencepiece",
        'log0(f"quantized val_loss:{loss:.8f} val_bpb:{bpb:.8f}")',
        'print("quantized val_loss:2.0 val_bpb:1.2")',
        "quantized val_loss:2.0 val_bpb:{bpb:.8f}",
        'quantized val_loss:2.0 val_bpb:1.2")',
        "warmup_step:1/20",
    ):
        log = read(line + "\n")
        assert (log.scores, log.steps) == ([], []), line


# ----------------------------------------------------------------------------------------------------------------------
# Broken and hostile input
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", corpus.DIALECTS)
def test_truncation_never_changes_a_figure(dialect):
    """Of a log cut anywhere, every figure that is read is one of the whole log, and none is cut short."""
    text = corpus.log_text(dialect, source="import os\n")
    whole = read(text)
    steps = {step._replace(line=0) for step in whole.steps}
    for end in range(0, len(text), 7):
        log = read(text[:end])
        assert {step._replace(line=0) for step in log.steps} <= steps
        assert {step.time_ms for step in log.steps} <= {step.time_ms for step in whole.steps}
        for score in log.scores:
            exact = whole.score(score.label)
            for found, true in zip(score[1:3], exact[1:3], strict=True):
                assert found in (None, true, round(true, 4))
        assert log.bytes_total in (None, whole.bytes_total) and log.seed in (None, whole.seed)


def test_the_end_of_a_log_without_newline():
    text = corpus.baseline()
    assert read(text.rstrip("\n")).headline() == read(text).headline()
    log = read(text.rstrip("\n")[:-1])  # val_bpb:1.2243657
    assert log.scores[0].val_bpb == round(Run().results[0].bpb, 4) and "cut off" in log.undecided[0]
    assert read(corpus.log_text("pgolf").rstrip("\n")).undecided == []


PREFIXES = ["[rank0]: ", "[default0]:", "2026-03-20 18:24:05,123 - ", "2026-03-20T18:24:05.123+00:00 ", "[12:34:56] "]
PREFIXES += ["\x1b[32m", "1776142360.538 ", "12:34:56.789 ", "2026-03-20 18:24:05,123 - INFO - ", "INFO:root:"]
PREFIXES += ["1776142360 ", "1776142360538 ", "[  12.3s] "]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_launchers_and_loggers_put_in_front_of_a_line(prefix):
    text = "".join(prefix + line + "\n" for line in corpus.console().splitlines())
    assert_read(read(text), Run(), "baseline")
    stamped = read("".join(prefix + line + "\n" for line in corpus.baseline().splitlines()))  # its source, too
    assert_read(stamped, Run(), "baseline")
    assert stamped.source == Run().source
    first, _, rest = corpus.baseline().partition("\n")  # one stamp to a message, and the source is one
    assert read(f"{prefix}{first}\n{rest}").source == Run().source


def test_a_dialect_of_short_names():
    """`step:N/M loss:… t:…ms`, `params:… s:42`, `budget:A/B`."""
    lines = ["params:17059912 s:42 world_size:8", "step:1/20 loss:6.9310 t:45ms", "step:20/20 loss:3.2100 t:900ms"]
    lines += ["budget:15873489/16000000", "wall budget:590/600", "final val_loss:2.06000000 val_bpb:1.21000000"]
    log = read("".join(line + "\n" for line in lines))
    assert (log.seed, log.model_params, log.bytes_total, log.train_seconds) == (42, 17059912, 15873489, 0.9)
    assert [step[:3] + step[5:6] for step in log.steps] == [(1, 20, 6.931, 45.0), (20, 20, 3.21, 900.0)]
    assert log.headline().val_bpb == 1.21 and log.undecided == []


def test_an_early_stop_that_names_no_step():
    text = corpus.baseline()
    last = Run().steps[-1]
    log = read(text.replace(f"train_time:{Run().train_ms}ms step:{last}/20000\n", f"train_time:{Run().train_ms}ms\n"))
    assert log.train_seconds == Run().train_ms / 1000 and ("stopping_early", last) in log.events


@pytest.mark.parametrize("empty", ["  blurb:\n", "  blurb: \n", "  blurb:  \n"])
def test_a_setting_with_an_empty_value(empty):
    run = corpus.run_of("baseline-noprefix")
    log = read(corpus.noprefix(run).replace("  data_path: data\n", empty + "  data_path: data\n"))
    assert log.settings["blurb"] == "" and log.settings["num_layers"] == 9 and log.settings["ttt_enabled"] is True
    assert_read(log, run, "baseline-noprefix")


def test_the_exact_line_may_have_its_mark_inside_the_label():
    text = "final_x sliding val_loss:2.0600 val_bpb:1.2100 eval_time:900ms\n"
    log = read(text + "final_x_exact sliding val_loss:2.06001234 val_bpb:1.21001234\n")
    assert [score[:4] for score in log.scores] == [("final_x sliding", 2.06001234, 1.21001234, True)]
    assert log.headline().label == "final_x sliding" and log.eval_seconds == 0.9


def test_an_evaluation_time_of_nothing_is_none():
    rounded = "legal_ttt val_loss:2.0600 val_bpb:1.2100 eval_time:{0}ms\n"
    exact = "legal_ttt_exact val_loss:2.06001234 val_bpb:1.21001234 eval_time:{0}ms\n"
    for first, second in ((0, 412_000), (412_000, 0)):
        assert read(rounded.format(first) + exact.format(second)).eval_seconds == 412.0
    assert read(rounded.format(0) + exact.format(0)).eval_seconds is None


@pytest.mark.parametrize(
    "lines",
    [
        "Code size (uncompressed): 131887 bytes\nCode size (compressed): {0} bytes\n",
        "Code size uncompressed: 131887 bytes\nCode size compressed: {0} bytes\n",
        "Uncompressed code size: 131887 bytes\nCompressed code size: {0} bytes\n",
        "Code size (raw): 131,887 bytes\nCode size (packed): {0} bytes\n",
        "Code size: {0} bytes\nRaw code size: 131887\n",
    ],
)
def test_two_sizes_of_the_code(lines):
    run = corpus.run_of("baseline")
    log = read(corpus.baseline(run).replace(f"Code size: {run.bytes_code} bytes\n", lines.format(run.bytes_code)))
    assert (log.bytes_code, log.bytes_source, log.bytes_total) == (run.bytes_code, 131887, run.bytes_total)


def test_the_python_of_the_run():
    assert [read(corpus.log_text(dialect)).python for dialect in corpus.DIALECTS] == ["3.11", "3.12", "3.12"]


def test_each_of_several_runs_in_one_log_is_read_by_itself():
    runs = [Run(seed=seed, results=(result("quantized", loss),)) for seed, loss in ((1, 2.06), (2, 2.07), (3, 2.08))]
    log = read("".join(map(corpus.baseline, runs)))
    assert [part.seed for part in log.parts] == [1, 2, 3] and log.headline() is None
    for part, run in zip(log.parts, runs, strict=True):
        assert_read(part, run, "baseline")
    assert log.parts[1].scores[0].line > log.parts[0].scores[0].line + 100


def test_files_that_are_no_logs(tmp_path, monkeypatch):
    for name, data in (
        ("zeros", b"\0" * 5000),
        ("noise", bytes(range(1, 256)) * 40),
        ("mixed", b"seed:1\n" * 50 + "seed:2\n".encode("utf-16-le") * 3),
    ):
        (tmp_path / name).write_bytes(data)
        if name == "zeros":
            assert parse(tmp_path / name).lines == 0
            continue
        with pytest.raises(LogError, match=f"{name}: not a text file"):
            parse(tmp_path / name)
    with pytest.raises(LogError, match="no such file"):
        parse(tmp_path / "absent.log")
    with pytest.raises(LogError, match="not a file"):
        parse(tmp_path)
    with pytest.raises(LogError):
        parse(tmp_path / "null\0byte")
    (tmp_path / "large").write_bytes(b"step:1/2 train_loss:1.0 train_time:1ms\n" * 100)
    monkeypatch.setattr(runlog, "MAX_LINES", 99)
    with pytest.raises(LogError, match="more than 99 lines"):
        parse(tmp_path / "large")
    monkeypatch.setattr(runlog, "MAX_BYTES", 3000)
    with pytest.raises(LogError, match="larger than"):
        parse(tmp_path / "large")


def test_bytes_that_are_no_utf8_are_told_of(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(corpus.baseline().encode() + b"caf\xe9 \xff\n" + b"\0" * 512)
    log = parse(path)
    assert_read(log, Run(), "baseline")
    assert log.undecided == ["2 characters are not utf-8"]


@pytest.mark.parametrize(
    "line",
    [
        'result {"a": ' + "[" * 200_000,
        'result {"a": ' + '{"a": ' * 100_000,
        'result {"a": ' + "[" * 900 + "]" * 900 + "}",
        'settings {"a": ' + "[" * 900 + "]" * 900 + "}",
        "result [1]",
        "result {broken",
        'result {"scores": [1], "headline": 5, "phase_seconds": "x", "bytes_total": true, "seed": 1e400}',
        'result {"headline": {"label": ["x"]}, "scores": {"a": 1, "legal_ttt": {"val_loss": "x"}}, "bytes_code": -1}',
        'result {"seed": ' + "9" * 5000 + "}",
        'result {"train_seconds": ' + "9" * 400 + "}",
        "settings {}",
        "total_eval_time: 1.2.3s",
        "stopping_early: wallclock_cap train_time:1.2.3ms step:1/2",
        "model_params:,,",
        "Total submission size: _ bytes",
        "quantized val_loss:" + "9" * 100_000,
        "step:" + "9" * 100 + "/1 train_loss:1.0",
        "Total submission size: " + "9" * 100_000 + " bytes",
        "a" * 5_000_000,
        "final " * 1_000_000,
    ],
    ids=lambda line: f"{line[:24]} {len(line)}",
)
def test_hostile_lines(line):
    started = time.process_time()
    for text in (line, line + "\n", corpus.console() + line + "\n", corpus.log_text("pgolf") + line + "\n"):
        log = read(text)
        log.headline()
    assert time.process_time() - started < 8


def test_json_that_is_nested_too_deep_to_handle_is_none():
    log = read('result {"a": ' + "[" * 20 + "]" * 20 + "}\n")
    assert log.result is None and "not followed by a JSON object" in log.undecided[0]


@pytest.mark.parametrize(
    "line",
    [
        "quantized val_loss:{i}.0 val_bpb:1.2",
        "step:1/2 train_loss:{i}.0",
        "resume:step:0 x",
        "import os",
        '"""',
        '"\\"\\"\\"',
        "===== source begin bytes:5 =====",
        "===== source begin bytes:99999999 =====\n===== source end =====",
        "import x\n(",
        'import x\n"""\n' + "=" * 100 + "\nRunning Python 3",
        "seed:{i}",
        "Total submission size: {i} bytes",
        "late_qat:enabled step:{i}",
        "quantized x:y " + "(" * 400,
        "1,1,1,1,1,1,1,1,1,1,1,1,1,1",
        '"""text"""',
    ],
)
def test_a_megabyte_of_anything_takes_seconds_at_most(line):
    count = min(20_000, 2_000_000 // len(line))
    text = "!\n" + "".join(line.replace("{i}", str(i)) + "\n" for i in range(count)) + "!\nimport os\n"
    started = time.process_time()
    log = read(text)
    assert time.process_time() - started < 8
    assert len(log.undecided) <= 2 * runlog.MAX_UNDECIDED and len(log.scores) <= runlog.MAX_RESULTS


def test_ten_megabytes_take_seconds_at_most():
    step = "step:{0}/200000 train_loss:2.1234 train_time:{0}00ms step_avg:100.00ms\n"
    text = corpus.DECOY_SOURCE * 900 + corpus.baseline() + "".join(step.format(i) for i in range(700, 120_000))
    assert len(text) > 9_000_000
    started = time.process_time()
    log = read(text)
    assert time.process_time() - started < 8
    assert len(log.steps) > 119_000


# ----------------------------------------------------------------------------------------------------------------------
# Properties
# ----------------------------------------------------------------------------------------------------------------------

FIGURES = st.floats(0.01, 20).map(lambda x: round(x, 8))
RESULTS = st.lists(
    st.tuples(st.sampled_from(corpus.SCORE_LABELS), FIGURES, FIGURES, st.sampled_from(["", "stride:64", "T=0.90"])),
    min_size=1,
    max_size=4,
    unique_by=lambda found: found[0],
).map(lambda many: tuple(Result(*found) for found in many))
NOISE = st.sampled_from(
    [
        "",
        "   ",
        "W0320 18:24:05.000000 139 torch/distributed/run.py:803] ****",
        "/usr/lib/python3.12/x.py:5: FutureWarning: deprecated\n  import pynvml  # type: ignore",
        "ttt_sliding:start chunks=1893 chunk_tokens=32768 ttt_lr=0.002",
        "  ttt_chunk [11/1893] bpb=1.186 time=4.5s",
        "swa:applying averaged 30 checkpoints",
        "val_loss is what counts, 1.0 is the aim",
        "train 45%|████▌     | 900/2000 [00:45<00:55, 20.0it/s]",
        "wandb: Syncing run x",
        'log0(f"legal_ttt_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}")',
        '        log0("legal_ttt_exact val_loss:0.55555555 val_bpb:0.55555555")',
        "peak memory allocated: 10 MiB",
        "{'val_bpb': 0.5555}",
        "<script>alert('val_loss:0.5555')</script>",
    ]
)


@FEW
@given(
    dialect=st.sampled_from(sorted(corpus.DIALECTS)),
    encoding=st.sampled_from(sorted(corpus.ENCODINGS)),
    seed=st.integers(0, 2**31),
    results=RESULTS,
    sizes=st.tuples(st.integers(1_000_000, 16_000_000), st.sampled_from(corpus.SIZE_LABELS[1:])),
    steps=st.lists(st.integers(1, 9999), min_size=1, max_size=6, unique=True).map(sorted).map(tuple),
    noise=st.lists(st.tuples(st.integers(0, 10**6), NOISE), max_size=12),
)
def test_what_was_written_is_what_is_read(tmp_path, dialect, encoding, seed, results, sizes, steps, noise):
    run = Run(seed=seed, results=results, bytes_model=sizes[0], size_label=sizes[1], steps=steps)
    lines = corpus.DIALECTS[dialect](run).splitlines(keepends=True)
    source = len(run.source.splitlines())
    start = lines.index("SEED: int = 7777\n") + source  # noise comes where a program prints: after the dump
    for place, line in noise:
        at = start + place % (len(lines) - start) if start < len(lines) else len(lines)
        lines.insert(at, line + "\n")
    path = tmp_path / "train.log"
    path.write_bytes(corpus.ENCODINGS[encoding]("".join(lines)))
    log = parse(path)
    assert_read(log, run, dialect)
    assert log.source == run.source
    best = results[-1].bpb == min(r.bpb for r in results)
    assert (log.headline() is not None) == (dialect == "pgolf" or best)
    assert all(said.startswith("headline: ") for said in log.undecided)


FRAGMENTS = st.sampled_from(
    [
        *corpus.pgolf().splitlines()[:12],
        *corpus.console().splitlines()[4:],
        *corpus.noprefix().splitlines()[:12],
        *corpus.DECOY_SOURCE.splitlines(),
        "resume:step:3 x",
        "=" * 100,
        "Running Python 3.12",
        "Source code:",
        "===== source end =====",
        "result " + json.dumps(corpus.pgolf_result(corpus.run_of("pgolf"))),
        'result {"headline": null}',
        "step:5/3 train_loss:nan train_time:1e9h",
        "Total submission size: 1.5 MiB",
    ]
)


LINES = sorted({*corpus.pgolf().splitlines(), *corpus.baseline().splitlines(), *corpus.noprefix().splitlines()})
LINES += ["total_eval_time: 12.5s", "resume:step:3 train_time:5ms", "phase:train seconds:5.00", "1/2 val_bpb: 1.0"]


@FEW
@given(st.lists(st.one_of(FRAGMENTS, NOISE, st.text(max_size=80)), max_size=40), st.sampled_from(["\n", "\r\n", "\r"]))
def test_any_lines_can_be_read(lines, newline):
    log = read(newline.join(lines))
    assert log.headline() is None or log.headline().label
    assert all(isinstance(said, str) and "\n" not in said for said in log.undecided)
    assert len(log.runs) >= 1 and log.score("quantized") in (None, *log.scores)


@settings(FEW, max_examples=300)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(LINES),
            st.integers(0, 200),
            st.integers(0, 4),
            st.text("0123456789.,_:/=-+enaif sm", max_size=5),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_any_damage_to_a_line_can_be_read(damaged):
    log = read("".join(f"{line[:at]}{new}{line[at + gone :]}\n" for line, at, gone, new in damaged))
    assert isinstance(log, RunLog)


@FEW
@given(
    data=st.one_of(st.binary(max_size=400), st.text(max_size=200).map(str.encode)),
    mark=st.sampled_from([b"", b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf"]),
)
def test_any_bytes_are_a_log_or_an_error(tmp_path, data, mark):
    path = tmp_path / "any.log"
    path.write_bytes(mark + data)
    try:
        assert isinstance(parse(path), RunLog)
    except LogError as error:
        assert "\n" not in str(error)


@FEW
@given(st.lists(st.sampled_from(corpus.DECOY_SOURCE.splitlines(keepends=True)), max_size=25), st.data())
def test_a_source_of_any_shape_leaves_the_results_alone(extra, data):
    """Whole statements of Python in any order around the decoys: only the real results are read."""
    blocks = corpus.DECOY_SOURCE.split("\n\n\n")
    source = "import os\n" + "\n\n\n".join(data.draw(st.permutations(blocks[1:]))) + "\n"
    dialect = data.draw(st.sampled_from(sorted(corpus.DIALECTS)))
    run = corpus.run_of(dialect, source=blocks[0] + "\n" + source)
    log = read(corpus.DIALECTS[dialect](run))
    assert_read(log, run, dialect)
    assert log.source == run.source


def test_replacing_a_field_of_the_run_is_seen():
    """The corpus has no constant that a parser could have learned by heart."""
    for change in (dict(seed=5), dict(model_params=99_000_000), dict(bytes_model=12_345), dict(world_size=1)):
        run = replace(corpus.run_of("baseline"), **change)
        assert_read(read(corpus.baseline(run)), run, "baseline")
