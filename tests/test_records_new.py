"""`new`: from the logs of one configuration to a folder that says what they say."""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import shlex
import statistics
from pathlib import Path

import pytest
import records_corpus as corpus
from conftest import run_here

import train_gpt as pg
from records.submission import check, folder, pack, rules

SCRIPT = '''"""Trains."""
import dataclasses


def opt(section, default, doc):
    return dataclasses.field(default=default)


@dataclasses.dataclass
class Hyperparameters:
    """Settings."""

    num_layers: int = opt("model", 11, "L, layers")
    matrix_lr: float = opt("training", 0.04, "Muon | block matrices")
    swa_enabled: bool = opt("averaging", False, "mean of snapshots")
    ve_layers: str = opt("model", "9,10", "layers")
'''
SETTINGS = (("num_layers", 9), ("matrix_lr", 0.04), ("swa_enabled", True), ("ve_layers", "1,2 3"))
SEEDS = {1337: 2.0460, 42: 2.0472, 7: 2.0451}


@pytest.fixture
def logs(tmp_path):
    """Write a log per seed; `each` of them is changed by a function of its text."""

    def logs(dialect="pgolf", seeds=SEEDS, each=lambda text, seed: text, **changes) -> list[Path]:
        paths = []
        for i, (seed, loss) in enumerate(dict(seeds).items()):
            usual = corpus.run_of(dialect).results
            results = (*usual[:-1], corpus.result(usual[-1].label, loss, usual[-1].extra, usual[-1].eval_ms))
            sizes = dict(bytes_model=15_800_000 + 1000 * i)
            text = corpus.log_text(
                dialect, **(dict(seed=seed, results=results, source=SCRIPT, settings=SETTINGS) | sizes | changes)
            )
            path = tmp_path / f"run_{seed}.txt"
            path.write_bytes(each(text, seed).encode())
            os.utime(path, (1_700_000_000 + 86_400 * i,) * 2)
            paths.append(path)
        return paths

    return logs


@pytest.fixture
def new(tmp_path, capsys):
    """Run the command; returns (exit code, the folder, stdout, stderr)."""

    def new(*arguments) -> tuple[int, Path, str, str]:
        parser, out = argparse.ArgumentParser(), tmp_path / "records"
        folder.add_arguments(parser)
        code = folder.run(parser.parse_args([*map(str, arguments), "--out", str(out)]))
        made = sorted(out.glob("*/*"))
        assert len(made) <= 1
        return code, made[0] if made else out, *capsys.readouterr()

    return new


@pytest.fixture
def made(new, logs) -> Path:
    """The folder of three clean runs."""
    code, path, _, err = new("Nine-Layers", *logs(), "--author", "A. Body", "--github-id", "abody", "--base", "#1855")
    assert (code, err) == (0, "")
    return path


def submission(path: Path) -> dict:
    return json.loads((path / "submission.json").read_text("utf-8"), parse_constant=lambda name: pytest.fail(name))


def readme(path: Path) -> str:
    return (path / "README.md").read_text("utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# What is in the folder
# ----------------------------------------------------------------------------------------------------------------------


def test_the_folder_has_the_script_the_logs_and_nothing_else(made, tmp_path):
    assert re.fullmatch(r"track_10min_16mb/2023-11-1\d_Nine-Layers", str(made.relative_to(tmp_path / "records")))
    assert {path.name for path in made.iterdir()} == {
        *("README.md", "submission.json", "train_gpt.py"),
        *(f"train_seed{seed}.log" for seed in SEEDS),
    }
    for seed in SEEDS:
        assert (made / f"train_seed{seed}.log").read_bytes() == (tmp_path / f"run_{seed}.txt").read_bytes()
    assert (made / "train_gpt.py").read_text("utf-8") == SCRIPT
    assert [path.name for path in made.parent.iterdir()] == [made.name]
    assert made.stat().st_mode & 0o055 == 0o055 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_every_figure_of_the_json_is_that_of_the_logs(made):
    s, runs = submission(made), s_runs(SEEDS)
    losses, scores = [run.results[-1].loss for run in runs], [run.results[-1].bpb for run in runs]
    assert (s["author"], s["github_id"], s["name"], s["track"]) == ("A. Body", "abody", "Nine-Layers", "10min_16mb")
    assert s["seeds"] == [7, 42, 1337] and list(s["seed_results"]) == ["7", "42", "1337"]
    assert s["headline"] == "legal_ttt"
    assert s["val_loss"] == pytest.approx(statistics.fmean(losses), abs=1e-8)
    assert s["val_bpb"] == pytest.approx(statistics.fmean(scores), abs=1e-8)
    assert s["val_bpb_std"] == pytest.approx(statistics.stdev(scores), abs=1e-8)
    assert s["val_loss_std"] == pytest.approx(statistics.stdev(losses), abs=1e-8)
    code, models = len(SCRIPT), (15_800_000, 15_801_000, 15_802_000)
    assert s["bytes_code"] == code and s["bytes_model"] == models[2]
    assert s["bytes_total"] == s["artifact_bytes_max"] == code + models[2]
    assert s["artifact_bytes_mean"] == code + models[1]
    result = s["seed_results"]["42"]
    assert (result["val_loss"], result["val_bpb"]) == (2.0472, runs[1].results[-1].bpb)
    assert (result["bytes_model"], result["bytes_total"]) == (models[1], code + models[1])
    assert (result["steps"], result["train_time_s"], result["eval_time_s"]) == (600, 27.0, 376.956)
    assert result["scores"]["final_int6_sliding_window"] == runs[1].results[1].bpb
    assert (s["train_time_s_max"], s["eval_time_s_max"]) == (27.0, 376.956)
    assert (s["hardware"], s["pytorch_version"], s["cuda_version"]) == (
        "8x NVIDIA H100 80GB HBM3",
        "2.9.1+cu128",
        "12.8",
    )
    assert s["code_sha256"] == hashlib.sha256(SCRIPT.encode()).hexdigest() and s["code_packed"] is False
    assert s["settings"] == {"NUM_LAYERS": 9, "SWA_ENABLED": True, "VE_LAYERS": "1,2 3"}
    assert (s["base_pr"], s["attribution"]) == (1855, {"base": "PR #1855"})
    assert (s["val_tokens"], s["val_bytes"]) == (1000, 2437)


def s_runs(seeds: dict) -> list[corpus.Run]:
    """The corpus's runs, by seed."""
    usual = corpus.run_of("pgolf").results
    return [
        corpus.run_of("pgolf", seed=seed, results=(*usual[:-1], corpus.result(usual[-1].label, seeds[seed])))
        for seed in sorted(seeds)
    ]


def test_the_readme_has_the_figures_of_the_json(made):
    text, s = readme(made), submission(made)
    spread = f"{s['val_bpb']:.5f} ± {s['val_bpb_std']:.5f}"
    assert f"**val_bpb {spread}** (3 seeds, `legal_ttt`, {s['val_loss']:.5f} nats per token)" in text
    for seed, result in s["seed_results"].items():
        (row,) = re.findall(rf"^\| {seed} \|.*$", text, re.MULTILINE)
        assert f" {result['val_bpb']:.5f} | {result['bytes_total']:,} | 27.0 | 377.0 |" in row and "| 600 |" in row
    fixed = " | ".join(f"{result.bpb:.5f}" for result in s_runs(SEEDS)[0].results[:2])
    mean = f"{s['val_bpb']:.5f} | 15,801,{len(SCRIPT):03d}.0 | 27.0 | 377.0 |"
    assert f"| mean | 600.0 | {fixed} | {mean}" in text
    assert f"| std | 0.0 | 0.00000 | 0.00000 | {s['val_bpb_std']:.5f} | 1,000.0 | 0.0 | 0.0 |" in text
    assert "Built on PR \\#1855." in text and "torch 2.9.1+cu128, CUDA 12.8" in text
    for path in made.iterdir():
        if path.name != "README.md":
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            assert f"| `{path.name}` | {path.stat().st_size:,} | `{digest}` |" in text


def test_techniques_are_the_settings_that_differ(made):
    text = readme(made)
    assert "| `NUM_LAYERS` | `9` | `11` | L, layers |" in text and "| `SWA_ENABLED` | `1` | `0` |" in text
    assert "MATRIX_LR" not in text
    (command,) = re.findall(r"```\n(.*?)\n```", text, re.DOTALL)
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:7] == ["for", "seed", "in", "7", "42", "1337;", "do"]
    assert {"NUM_LAYERS=9", "SWA_ENABLED=1", "VE_LAYERS=1,2 3", "SEED=$seed", "DATA_PATH=$DATA_PATH"} <= set(words)
    assert command.splitlines()[-2].endswith("torchrun --standalone --nproc_per_node=8 train_gpt.py")


def test_defaults_that_ran_are_no_techniques(new, logs):
    settings = (("num_layers", 11), ("matrix_lr", 0.04), ("swa_enabled", False), ("ve_layers", "9,10"))
    _, path, _, _ = new("x", *logs(settings=settings))
    assert submission(path)["settings"] == {} and "Nothing: the script's defaults ran." in readme(path)


def test_the_date_is_the_newest_log_s_or_as_given(new, logs, tmp_path, monkeypatch):
    paths = logs()
    monkeypatch.setenv("TZ", "UTC")
    _, path, _, _ = new("x", *paths)
    assert path.name == "2023-11-16_x" and submission(path)["date"] == "2023-11-16"
    (tmp_path / "records").rename(tmp_path / "old")
    _, path, _, _ = new("x", *paths, "--date", "2026-01-02", "--track", "cpu_mini")
    assert path.name == "2026-01-02_x" and path.parent.name == "track_cpu_mini"
    assert (submission(path)["date"], submission(path)["track"]) == ("2026-01-02", "cpu_mini")


def test_no_path_of_the_machine_is_named_but_in_the_logs(new, logs, tmp_path):
    def with_paths(text, seed):
        return text.replace('"data_path": "data"', '"data_path": "/elsewhere/me/secret/shards_sp1024"')

    code, path, out, _ = new("x", *logs(each=with_paths))
    assert code == 0 and "/elsewhere/me" in (path / "train_seed42.log").read_text("utf-8")
    assert "`shards_sp1024`" in readme(path)
    for text in (readme(path), json.dumps(submission(path))):
        assert "secret" not in text and str(tmp_path) not in text and not re.search(r"[\s\"'`=]/\w", text)


def test_text_of_a_log_is_no_markup(new, logs):
    device = "<script>alert(1)</script> | [x](http://evil) `code` *bold*"
    _, path, _, _ = new("x", *logs(device=device))
    text = readme(path)
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert "\\| \\[x\\](http://evil) \\`code\\` \\*bold\\*" in text
    assert submission(path)["hardware"] == f"8x {device}"


def test_one_seed_has_no_deviation(new, logs):
    _, path, out, _ = new("x", *logs(seeds={1: 2.04}))
    s = submission(path)
    assert (s["val_bpb_std"], s["val_loss_std"], s["compliance"]["three_seeds"]) == (None, None, False)
    assert "±" not in readme(path) and "(1 seed, " in readme(path) and "note: three_seeds is false" in out


# ----------------------------------------------------------------------------------------------------------------------
# Compliance
# ----------------------------------------------------------------------------------------------------------------------


def audits(**findings) -> object:
    """Replace the audit lines of a log, for every seed or for seed 42 alone."""

    def each(text: str, seed: int) -> str:
        text = re.sub(r"^audit:.*\n", "", text, flags=re.MULTILINE)
        lines = "".join(f"audit:{name} {said}\n" for name, said in findings.items() if said)
        return text.replace("phase:warmup", lines + "phase:warmup")

    return each


@pytest.mark.parametrize(
    "changes, key, wanted",
    [
        (dict(), "artifact_under_16mb", True),
        (dict(bytes_model=16_000_000 - len(SCRIPT)), "artifact_under_16mb", True),
        (dict(bytes_model=16_000_001 - len(SCRIPT)), "artifact_under_16mb", False),
        (dict(step_ms=1000.0), "train_under_600s", True),
        (dict(step_ms=1000.1), "train_under_600s", False),
        (dict(), "eval_under_600s", True),
        (dict(results=(corpus.result("legal_ttt", 2.0, eval_ms=600_001),)), "eval_under_600s", False),
        (dict(), "three_seeds", True),
        (dict(seeds={1: 2.0, 2: 2.1}), "three_seeds", False),
        (dict(), "one_configuration", True),
        (dict(), "causal_dependence", True),
        (dict(), "score_first_ttt", None),
        (dict(each=audits(score_first="pass moved:0")), "score_first_ttt", True),
        (dict(each=audits(score_first="FAIL moved:3")), "score_first_ttt", False),
        (dict(each=audits(score_first="FAIL moved:3")), "audit_passed", False),
        (dict(each=audits(score_first="pass moved:0", causal="pass 0")), "audit_passed", True),
        (dict(each=audits()), "audit_passed", None),
        (dict(each=lambda t, s: audits()(t, s) if s == 42 else t), "causal_dependence", None),
        (dict(each=lambda t, s: audits(causal="FAIL 1")(t, s) if s == 42 else t), "causal_dependence", False),
    ],
)
def test_every_boolean_is_computed(changes, key, wanted, new, logs):
    code, path, out, err = new("x", *logs(**changes))
    assert (code, err) == (0, "")
    assert submission(path)["compliance"][key] is wanted
    assert (f"note: {key} is false\n" in out) == (wanted is False)
    assert (key in "".join(re.findall(r"note: the logs do not show (.*)", out)).split(", ")) == (wanted is None)


def test_a_clock_that_no_log_states_is_unknown(new, logs):
    def without(text, seed):
        return re.sub(r'"eval_seconds": [\d.]+', '"eval_seconds": null', text)

    _, path, _, _ = new("x", *logs(each=without))
    s = submission(path)
    assert s["compliance"]["eval_under_600s"] is None and s["eval_time_s_max"] is None
    assert "| Evaluation: at most 600 s | not shown |  |" in readme(path)


def test_a_track_without_clocks_has_no_rule_about_them(new, logs):
    text = readme(new("x", *logs(step_ms=2000.0), "--track", "cpu_mini")[1])
    assert "| Training: at most 600 s | no rule of this track | longest 1,200.0 s |" in text
    assert "| Evaluation: at most 600 s | no rule of this track |" in text and "**no**" not in text


def test_the_readme_shows_the_audit_s_figures(made):
    text = readme(made)
    assert "| yes | 7: disturbed\\_at:38 scores\\_before\\_moved:0<br>42: " in text
    assert text.count("not shown |") == 8 and "`python records/audit.py ARTIFACT` makes one" not in text


def audit_json(log: Path, **sha256: str) -> bytes:
    """As records/audit.py leaves it for a log's script and artifact."""
    result = json.loads(log.read_text().rstrip().rpartition("\nresult ")[2])
    told = dict(artifact=result["artifact_sha256"], script=result["code_sha256"]) | sha256
    findings = dict(causal=dict(passed=True, figure="scores_before_moved:0"), once=dict(passed=False, figure="twice"))
    return json.dumps(dict(passed=False, audit=findings, sha256=told)).encode()


@pytest.mark.parametrize("named", [False, True])
def test_an_audit_of_the_artifact_goes_along(named, new, logs, tmp_path):
    (tmp_path / "out/logs").mkdir(parents=True)
    paths = [path.rename(tmp_path / "out/logs" / path.name) for path in logs(each=audits())]
    words = []
    for path in paths:
        beside = tmp_path / f"{path.stem}.json" if named else path.parent.parent / "runs" / path.stem / "audit.json"
        beside.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(audit_json(path))
        words += [beside]
    code, path, out, err = new("x", *paths, *(["--audits", *words] if named else []))
    assert (code, err) == (0, "")
    made = submission(path)["compliance"]
    assert (made["causal_dependence"], made["single_pass"], made["audit_passed"]) == (True, False, False)
    assert (path / "audit_seed42.json").read_bytes() in [word.read_bytes() for word in words]
    assert "`audit_seed42.json`" in readme(path) and "| audit, as written |" in readme(path)
    assert not [found for found in check.check(path) if "not one of the files" in found.what]


def test_seconds_are_rounded_once(new, logs):
    """582.3497 is 582.3, not 582.4 by way of 582.35: `check` looks for the log's own figures."""
    took = '"eval_seconds": 582.3496527550014'
    paths = logs(each=lambda text, _: re.sub(r'"eval_seconds": [0-9.]+', took, text))
    code, path, out, err = new("x", *paths)
    assert code == 0 and "| 582.3 |" in readme(path) and "582.4" not in readme(path)


def test_an_audit_of_another_script_is_refused(new, logs, tmp_path):
    paths = logs()
    for data, said in ((audit_json(paths[0], script="0" * 64), "is of no log's"), (b"[]", "is no audit.json")):
        (tmp_path / "audit.json").write_bytes(data)
        code, _, _, err = new("x", *paths, "--audits", tmp_path / "audit.json")
        assert code == 2 and err.startswith("error: ") and said in err and err.count("\n") == 1, err


def test_what_was_cut_or_taken_up_again_is_said(new, logs):
    def each(text, seed):
        if seed == 42:
            text = text.replace('"eval_cut": null', '"eval_cut": {"chunks": 9, "adapted": 4, "scored": 9}')
            text = text.replace('"resumed_at": []', '"resumed_at": [300]')
        return text

    _, path, _, _ = new("x", *logs(each=each))
    assert "Seed 42: the evaluation clock cut the last pass (chunks 9, adapted 4, scored 9)" in readme(path)
    assert "Seed 42: taken up from a checkpoint at step 300." in readme(path) and "Seed 7:" not in readme(path)


# ----------------------------------------------------------------------------------------------------------------------
# What is refused
# ----------------------------------------------------------------------------------------------------------------------


def only_42(change):
    return lambda text, seed: change(text) if seed == 42 else text


def swap(a: str, b: str):
    """Replace in seed 42's log; the text has to be there."""

    def change(text: str) -> str:
        assert a in text
        return text.replace(a, b)

    return only_42(change)


NO_SUBMISSION = {
    "another setting": (swap('"num_layers": 9', '"num_layers": 10'), "NUM_LAYERS=9 in run_7.txt, 10 in run_42.txt"),
    "a setting more": (
        swap('"num_layers": 9', '"num_layers": 9, "late": true'),
        "LATE=unset in run_7.txt, 1 in run_42",
    ),
    "another code": (
        only_42(lambda text: text.replace(hashlib.sha256(SCRIPT.encode()).hexdigest(), "0" * 64)),
        f"code sha256 {hashlib.sha256(SCRIPT.encode()).hexdigest()} in run_7.txt, {'0' * 64} in run_42.txt",
    ),
    "another source": (swap("L, layers", "L, Layers"), "two configurations: source "),
    "another headline": (
        only_42(lambda text: text.replace("legal_ttt", "quantized_ttt")),
        "score that counts legal_ttt in run_7.txt, quantized_ttt in run_42.txt",
    ),
    "another model": (swap("model_params:17059912", "model_params:17059913"), "number of parameters"),
    "other machines": (swap("world_size:8 grad", "world_size:4 grad"), "number of processes"),
    "other data": (
        only_42(lambda text: text.replace('"run_id": "run", "mode"', '"val_fingerprint": "f", "mode"')),
        "validation data None in run_7.txt, f in run_42.txt",
    ),
    "another settings hash": (
        only_42(lambda text: re.sub(r"(settings_hash\W{1,4})\w+", r"\g<1>0123456789abcdef", text)),
        "settings hash",
    ),
    "no result": (only_42(lambda text: re.sub(r"^result .*\n", "", text, flags=re.M)), "run_42.txt: no `result` line"),
    "an evaluation alone": (swap('"mode": "train"', '"mode": "eval_only"'), "a run with mode eval_only"),
    "no finite score": (only_42(lambda t: re.sub(r"(val_(?:loss|bpb)\W{1,3})[\d.]+", r"\1NaN", t)), "run_42.txt: "),
    "two runs": (only_42(lambda text: text + text), "2 runs in one log"),
    "no seed": (only_42(lambda t: re.sub(r'^seed:42\n|"seed": 42, ', "", t, flags=re.M)), "it does not say its seed"),
    "no text": (only_42(lambda text: "\0" * 9), "run_42.txt: "),
}


@pytest.mark.parametrize("what", NO_SUBMISSION)
def test_logs_that_make_no_submission_are_one_error_line_and_no_folder(what, new, logs, tmp_path):
    each, message = NO_SUBMISSION[what]
    code, _, out, err = new("x", *logs(each=each))
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "records").exists()


def test_seed_run_id_and_paths_may_differ(new, logs):
    def each(text, seed):
        text = text.replace(
            '"out_dir": "."', f'"out_dir": "out{seed}", "resume": "{seed}", "audit": {str(seed > 9).lower()}'
        )
        return text.replace('"data_path": "data"', f'"data_path": "data{seed}"').replace('"run"', f'"run{seed}"')

    assert new("x", *logs(each=each))[0] == 0


@pytest.mark.parametrize(
    "name, may",
    [("logfile", True), ("local_rank", True), ("val_files", True), ("ttt_lora_rank", False), ("qat_profile", False)],
)
def test_names_of_other_scripts_that_may_differ(name, may, new, logs):
    def each(text, seed):
        return text.replace("  num_layers: 9\n", f"  num_layers: 9\n  {name}: {seed}\n")

    code, _, _, err = new("x", *logs("baseline-noprefix", source=SCRIPT, each=each))
    assert code == (0 if may else 2), err
    assert may or f"{name.upper()}=" in err


def test_two_logs_of_one_seed_are_refused(new, logs, tmp_path):
    paths = logs()
    copy = tmp_path / "copy.txt"
    copy.write_bytes(paths[0].read_bytes())
    code, _, _, err = new("x", *paths, copy)
    assert code == 2 and re.fullmatch(r"error: two logs of seed 1337: \S+\.txt and \S+\.txt; keep one\n", err)
    assert new("x", paths[0], paths[0])[0] == 2


def test_an_existing_folder_is_left_as_it_is(made, new, logs):
    (made / "mine.txt").write_text("notes")
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    code, _, _, err = new("Nine-Layers", *logs())
    assert code == 2 and "exists; choose another NAME" in err
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before


def test_a_folder_is_there_whole_or_not_at_all(new, logs, tmp_path, monkeypatch):
    paths, write = logs(), Path.write_bytes

    def full(self, data):
        if self.name == "train_seed42.log":
            raise OSError(28, "No space left on device", str(self))
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    code, _, _, err = new("x", *paths)
    assert code == 2 and "No space left on device" in err and err.count("\n") == 1
    assert [path for path in (tmp_path / "records").rglob("*") if path.is_file() or "x" in path.name] == []


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b", "ä", "-x", "a\n"])
def test_a_name_that_is_no_folder_name_is_refused(name, new, logs, tmp_path):
    parser = argparse.ArgumentParser()
    folder.add_arguments(parser)
    args = parser.parse_args(["x", *map(str, logs()), "--out", str(tmp_path / "records")])
    args.name = name
    assert folder.run(args) == 2 and not (tmp_path / "records").exists()
    args.name, args.track = "x", name
    assert folder.run(args) == 2 and not (tmp_path / "records").exists()


@pytest.mark.parametrize("day", ["2026-13-01", "yesterday", "20260102", "2026-1-2"])
def test_a_date_that_is_none_is_refused(day, new, logs):
    code, _, _, err = new("x", *logs(), "--date", day)
    assert code == 2 and err == f"error: --date {day} must be a day: YYYY-MM-DD\n"


# ----------------------------------------------------------------------------------------------------------------------
# The script
# ----------------------------------------------------------------------------------------------------------------------


def without_source(text: str, seed: int) -> str:
    """A log that lost its dump, as one of the console."""
    return re.sub(r"^settings .*?===== source end =====\n", "", text, flags=re.DOTALL | re.MULTILINE)


def test_a_log_without_source_takes_the_file_whose_sha256_it_states(new, logs, tmp_path):
    paths = logs(each=without_source)
    code, _, _, err = new("x", *paths)
    assert code == 2 and "run_7.txt holds no source; give the file that ran with --script" in err
    (tmp_path / "other.py").write_text(SCRIPT + "\n")
    code, _, _, err = new("x", *paths, "--script", tmp_path / "other.py")
    assert code == 2 and "other.py did not run: it has sha256" in err
    (tmp_path / "ran.py").write_text(SCRIPT)
    code, path, _, _ = new("x", *paths, "--script", tmp_path / "ran.py")
    assert code == 0 and (path / "train_gpt.py").read_text() == SCRIPT
    s = submission(path)
    assert s["settings"] is None and s["compliance"]["one_configuration"] is None
    assert "The logs do not state the settings" in readme(path)


def test_a_source_that_is_not_of_the_stated_sha256_is_no_evidence(new, logs, tmp_path):
    def each(text, seed):
        return text.replace("L, layers", "L, Layers")

    code, _, _, err = new("x", *logs(each=each))
    assert code == 2 and "is not of the sha256" in err
    (tmp_path / "ran.py").write_text(SCRIPT)
    assert new("x", *logs(each=each), "--script", tmp_path / "ran.py")[0] == 0


def test_a_packed_script_comes_with_its_readable_source(new, logs, tmp_path):
    packed, human = pack.pack(SCRIPT.encode()), tmp_path / "readable.py"
    paths = logs(source=packed.decode())
    human.write_text(SCRIPT)
    code, path, _, _ = new("x", *paths, "--human", human)
    assert code == 0
    assert (path / "train_gpt.py").read_bytes() == packed and (path / "train_gpt_human.py").read_text() == SCRIPT
    s = submission(path)
    assert s["code_packed"] is True and s["bytes_code"] == len(packed)
    assert s["settings"]["NUM_LAYERS"] == 9, "read from what is inside"
    assert "| what ran, packed |" in readme(path) and "| `train_gpt_human.py` |" in readme(path)


def test_a_packed_script_may_come_alone(new, logs):
    code, path, out, _ = new("x", *logs(source=pack.pack(SCRIPT.encode()).decode()))
    assert code == 0 and not (path / "train_gpt_human.py").exists() and "--human FILE" in out
    assert submission(path)["settings"]["NUM_LAYERS"] == 9


@pytest.mark.parametrize(
    "packed, readable, message",
    [
        (True, SCRIPT.replace("11", "12"), "is not the source of the packed script that ran"),
        (True, "x = (", "is no source of Python"),
        (False, SCRIPT, "the script that ran is readable itself"),
    ],
)
def test_a_readable_source_that_is_none_is_refused(packed, readable, message, new, logs, tmp_path):
    (tmp_path / "readable.py").write_text(readable)
    source = pack.pack(SCRIPT.encode()).decode() if packed else SCRIPT
    code, _, _, err = new("x", *logs(source=source), "--human", tmp_path / "readable.py")
    assert code == 2 and message in err and err.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------------
# Other dialects
# ----------------------------------------------------------------------------------------------------------------------

PUBLIC_SCRIPT = """import os


class Hyperparameters:
    num_layers = int(os.environ.get("NUM_LAYERS", 11))
    matrix_lr: float = float(os.environ.get("MATRIX_LR", "0.0400"))
    swa_enabled = bool(int(os.environ.get("SWA_ENABLED", "1")))
    offset = int(os.environ.get("LOGIT_OFFSET", -1))
"""


@pytest.mark.parametrize("dialect", ["baseline", "baseline-noprefix"])
def test_a_log_of_another_dialect_makes_a_folder_where_it_is_clear(dialect, new, logs):
    settings = (("num_layers", 9), ("matrix_lr", 0.04), ("swa_enabled", True), ("offset", -2))
    code, path, _, err = new("x", *logs(dialect, source=PUBLIC_SCRIPT, settings=settings))
    assert (code, err) == (0, "")
    s, stated = submission(path), dialect == "baseline-noprefix"
    assert (path / "train_gpt.py").read_text() == PUBLIC_SCRIPT and s["bytes_code"] == len(PUBLIC_SCRIPT)
    assert s["settings"] == ({"NUM_LAYERS": 9, "LOGIT_OFFSET": -2} if stated else None)
    assert s["compliance"]["one_configuration"] is (True if stated else None)
    assert s["compliance"]["artifact_under_16mb"] is True and s["compliance"]["audit_passed"] is None
    assert s["code_evidence"] == "every log holds its source" and s["settings_hash"] is None
    assert s["val_loss"] == pytest.approx(statistics.fmean(SEEDS.values()), abs=1e-8)
    assert s["compliance"]["train_under_600s"] is True and s["seed_results"]["7"]["steps"] == 600
    assert ("| `LOGIT_OFFSET` | `-2` | `-1` |  |" in readme(path)) == stated


def test_a_last_result_that_is_the_best_is_the_headline_and_said_to_be(new, logs):
    results = (corpus.result("quantized", 2.05), corpus.result("quantized_ttt", 2.03))
    code, folder, out, _ = new("x", *logs("baseline-noprefix", seeds={1: 0, 2: 0}, results=results))
    assert code == 0 and "note: quantized_ttt counts: it is the last of the log and the best; --headline LABEL" in out


def test_several_results_of_which_the_last_is_not_the_best_need_a_headline(new, logs):
    results = (corpus.result("quantized", 2.03), corpus.result("quantized_ttt", 2.05))
    paths = logs("baseline-noprefix", seeds={1: 0, 2: 0}, results=results)
    code, _, _, err = new("x", *paths)
    assert code == 2 and "which score counts is not clear" in err and "--headline LABEL names it" in err
    code, path, _, _ = new(
        "x", *logs("baseline-noprefix", seeds={1: 0, 2: 0}, results=results), "--headline", "quantized"
    )
    assert code == 0 and submission(path)["headline"] == "quantized" and submission(path)["val_loss"] == 2.03
    code, _, _, err = new("y", *paths, "--headline", "other")
    assert code == 2 and "no single result is called other" in err


def test_the_size_alone_ties_a_file_to_a_log_without_source_and_sha256(new, logs, tmp_path):
    def without(text, seed):
        return text.replace(SCRIPT, "")

    (tmp_path / "ran.py").write_text(SCRIPT)
    paths = logs("baseline", each=without)
    code, path, _, err = new("x", *paths, "--script", tmp_path / "ran.py")
    assert (code, err) == (0, "")
    assert submission(path)["code_evidence"] == "every log states its size in bytes, and nothing more"
    (tmp_path / "ran.py").write_text(SCRIPT + " ")
    code, _, _, err = new("y", *paths, "--script", tmp_path / "ran.py")
    assert code == 2 and f"did not run: it has sha256 {hashlib.sha256((SCRIPT + ' ').encode()).hexdigest()}" in err


# ----------------------------------------------------------------------------------------------------------------------
# Runs of the project's own script
# ----------------------------------------------------------------------------------------------------------------------


def test_a_real_run_makes_a_folder_whose_command_repeats_it(tiny_data, tmp_path, new, warm_reader):
    from test_audit import audit_here

    import train_gpt

    quick = dict(ITERATIONS=3, VAL_LOSS_EVERY=0, EVAL_MAX_SECONDS=0)
    ran = run_here(tmp_path / "out", tiny_data, "run", SEED=7, **quick)
    assert audit_here(ran.folder / "artifact.pgolf", "--tokens", 200).code == 0
    code, path, _, err = new("tiny", ran.log, "--track", "cpu_mini")
    assert (code, err) == (0, "")
    s, result = submission(path), ran.result
    assert (path / "train_gpt.py").read_bytes() == Path(train_gpt.__file__).read_bytes()
    assert s["compliance"] == dict.fromkeys(s["compliance"], True) | dict(three_seeds=False)
    assert math.isclose(s["val_bpb"], result["headline"]["val_bpb"], abs_tol=1e-8)
    assert s["seed_results"]["7"]["artifact_sha256"] == result["artifact_sha256"]
    assert s["seed_results"]["7"]["pre_quant_val_bpb"] == result["scores"]["float_swa"]["val_bpb"]
    assert s["settings_hash"] == result["settings_hash"] and s["val_fingerprint"] == result["val_fingerprint"]
    assert s["val_bytes"] == result["scores"]["legal_ttt"]["bytes"]
    (command,) = re.findall(r"```\n(.*?)\n```", readme(path), re.DOTALL)
    environ = dict(re.findall(r"([A-Z][A-Z0-9_]*)=(\S+)", command)) | dict(SEED="7", DATA_PATH="x")
    assert "AUDIT" not in environ and "python train_gpt.py" in command
    assert train_gpt.Hyperparameters.from_env(environ).settings_hash() == result["settings_hash"]
    assert str(tiny_data) not in readme(path) + json.dumps(s)


def test_what_may_differ_is_what_the_scripts_settings_hash_leaves_out():
    left_out = set()
    for field in dataclasses.fields(pg.Hyperparameters):
        hp = pg.Hyperparameters()
        object.__setattr__(hp, field.name, "another")  # whether it is legal is of no concern here
        if hp.settings_hash() == pg.Hyperparameters().settings_hash():
            left_out.add(field.name)
    assert left_out == rules.MAY_DIFFER - rules.ONCE
