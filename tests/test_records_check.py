"""`check` on synthetic folders: clean ones of every dialect pass, every planted defect is found by the check named."""

import base64
import dataclasses
import hashlib
import io
import json
import lzma
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest
import records_corpus as corpus
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_records_legality import EVAL, HEAD, LEGAL_TTT, MAIN, PRE_QUANT_TTT, SLOT, TRAIN, script

from records.submission import check, claims, foreign, program, smoke
from records.submission.foreign import Finding

SEEDS = (1337, 42, 2025)
SETTINGS = HEAD + "    model_dim = 512\n    num_layers = 11\n    vocab_size = 1024\n"
SCRIPT = SETTINGS + EVAL + TRAIN + LEGAL_TTT + MAIN.format(body="eval_val_ttt(args, model, val_tokens, [], optimizer)")
RESULTS = {
    "pgolf": corpus.PGOLF_RESULTS,
    "baseline": corpus.BASELINE_RESULTS,
    "baseline-noprefix": (
        corpus.result("quantized", 2.0712),
        corpus.result("quantized_ttt_phased", 2.0531, "", 401_234),
    ),
}
HEADLINE = {"pgolf": "legal_ttt", "baseline": "final_int8_zlib_roundtrip", "baseline-noprefix": "quantized_ttt_phased"}


@dataclasses.dataclass
class Folder:
    """A folder that can be spoilt before it is written."""

    dialect: str
    runs: list[corpus.Run]
    meta: dict
    readme: str
    files: dict[str, bytes]

    def logs(self) -> dict[str, bytes]:
        return {f"train_seed{run.seed}.log": corpus.DIALECTS[self.dialect](run).encode() for run in self.runs}

    def write(self, path: Path) -> Path:
        path.mkdir(parents=True)
        files = {"submission.json": json.dumps(self.meta, indent=2).encode(), "README.md": self.readme.encode()}
        for name, data in (files | self.files).items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            if data is not None:
                (path / name).write_bytes(data)
        return path

    def again(self, *changes: dict) -> None:
        """The logs of changed runs, one dictionary of changes per seed, and nothing else."""
        self.runs = [dataclasses.replace(run, **change) for run, change in zip(self.runs, changes, strict=False)]
        self.files |= self.logs()

    def edit(self, name: str, old: str, new: str) -> None:
        text = self.files[name].decode()
        assert old in text
        self.files[name] = text.replace(old, new).encode()


def build(dialect: str = "pgolf", seeds: tuple = SEEDS, source: str = SCRIPT, inner: str | None = None) -> Folder:
    """A clean submission; `inner` is the readable source of a packed script."""
    label = HEADLINE[dialect]
    runs = []
    for i, seed in enumerate(seeds):
        results = tuple(
            corpus.result(found.label, found.loss + 0.0007 * i**2, found.extra, found.eval_ms)
            for found in RESULTS[dialect]
        )
        settings = (("num_layers", 11), ("matrix_lr", 0.04), ("slot_enabled", False))
        run = corpus.Run(
            seed=seed,
            run_id=f"seed{seed}",
            source=source,
            results=results,
            settings=settings,
            step_ms=87.5 + i,
            steps=(1, 2, 10, 200, 6500 + i),
            bytes_model=15_815_847 + 41 * i,
            size_label="int8+zlib" if dialect == "baseline" else "int6+lzma",
        )
        runs.append(run)
    scores = [next(r for r in run.results if r.label == label) for run in runs]
    bpb, loss = [score.bpb for score in scores], [score.loss for score in scores]
    deviation = statistics.stdev(bpb) if len(bpb) > 1 else 0.0
    meta = dict(
        author="Ann Author",
        github_id="ann",
        name="Core",
        blurb="One idea over #549, 0.9965 of it.",
        date="2026-04-09",
        track="10min_16mb",
        headline=f"{label}_exact",
        val_loss=round(statistics.fmean(loss), 8),
        val_bpb=round(statistics.fmean(bpb), 8),
        val_bpb_std=round(deviation, 8),
        seeds=list(seeds),
        seed_results={
            str(run.seed): dict(
                val_bpb=score.bpb,
                val_loss=score.loss,
                artifact_bytes=run.bytes_total,
                steps=run.steps[-1],
                train_time_s=run.train_ms / 1000,
            )
            for run, score in zip(runs, scores, strict=True)
        },
        bytes_total=max(run.bytes_total for run in runs),
        bytes_code=runs[0].bytes_code,
        hardware="8xH100 80GB SXM",
        pytorch_version="2.9.1+cu128",
        compliance=dict(three_seeds=len(seeds) >= 3, train_under_600s=True, artifact_under_16mb=True, no_slot=True),
        base_pr=549,
        comparison_baseline_bpb=1.1194,
        p_value=0.003,
    )
    rows = "\n".join(
        f"| {run.seed} | {run.steps[-1]:,} | **{score.bpb:.5f}** | {score.loss:.4f} | {run.bytes_total:,} |"
        for run, score in zip(runs, scores, strict=True)
    )
    readme = f"""# Core (2026)

**val_bpb {statistics.fmean(bpb):.5f} ± {deviation:.5f}** ({len(seeds)} seeds), {meta["bytes_total"]:,} bytes

| seed | steps | val_bpb | val_loss | artifact bytes |
|---|---|---|---|---|
{rows}
| mean | | {statistics.fmean(bpb):.5f} | {statistics.fmean(loss):.4f} | |

## Techniques

11 layers of width 512, EMA decay 0.9965, lr 0.0250, written in 2026 after #549 (1.1194) and PR #414; 8 GPUs, CUDA 12.8.
Improves on the baseline's 1.2244 by 0.01 nats. The cap is 16,000,000 bytes and 600 s.

```
SEED=1337 MATRIX_LR=0.04 torchrun --standalone --nproc_per_node=8 train_gpt.py
```
"""
    made = Folder(dialect, runs, meta, readme, {"train_gpt.py": source.encode()})
    if inner is not None:
        made.files["train_gpt_human.py"] = inner.encode()
    made.files |= made.logs()
    return made


def packed(source: str) -> str:
    data = base64.b85encode(lzma.compress(source.encode())).decode()
    return f"import lzma,base64\nexec(lzma.decompress(base64.b85decode({data!r})))\n"


def findings(folder: Path, level: str | None = None) -> list[check.Finding]:
    return [found for found in check.check(folder) if level in (None, found.level)]


# -----------------------------------------------------------------------------
# Clean folders
# -----------------------------------------------------------------------------

CLEAN: dict[str, Callable[[], Folder]] = {
    **{dialect: lambda dialect=dialect: build(dialect) for dialect in corpus.DIALECTS},
    "packed, with its readable source": lambda: build(source=packed(SCRIPT), inner=SCRIPT),
    "packed twice": lambda: build("baseline", source=packed(packed(SCRIPT))),
}


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_folder_passes(tmp_path, name):
    folder = CLEAN[name]().write(tmp_path / "track_10min_16mb" / "2026-04-09_Core")
    found = findings(folder)
    assert [f for f in found if f.level != "pass"] == []
    assert {f.check for f in found} == set(check.CHECKS)


def test_a_folder_of_old_habits_fails_nothing(tmp_path):
    """Renamed JSON, old names, one seed, a date with a time, UTF-16 with \\r\\n, seed in the file name alone."""
    made = build("baseline", seeds=(1337,))
    log = made.files.pop("train_seed1337.log").decode()
    made.files["train.log"] = log.replace("\n", "\r\n").encode("utf-16")
    for key in ("headline", "seeds", "seed_results", "compliance", "val_bpb_std"):
        made.meta.pop(key)
    made.meta["mean_val_bpb"] = round(made.meta.pop("val_bpb"), 4)
    made.meta |= dict(artifact_bytes=made.meta.pop("bytes_total"), code_bytes=made.meta.pop("bytes_code"))
    made.meta |= dict(date="2026-03-20T18:24:05Z", wallclock_seconds=569, step_stop=6500)
    folder = made.write(tmp_path / "f")
    (folder / "submission.json").rename(folder / "submission_ternary.json")
    assert findings(folder, "FAIL") == []


def test_a_headline_that_is_not_declared_is_the_line_of_the_claimed_mean(tmp_path):
    made = build("baseline-noprefix")
    del made.meta["headline"]
    for name in made.logs():  # a pass that diverged, after the one that counts
        made.files[name] += b"quantized_again val_loss:9.00000000 val_bpb:5.30000000 eval_time:5ms\n"
    found = [f for f in findings(made.write(tmp_path / "f")) if f.check == "headline"]
    assert [f.level for f in found] == ["pass", "pass"] and "quantized_ttt_phased" in found[0].what


def test_a_folder_that_new_builds_passes(tmp_path):
    folder = pytest.importorskip("records.submission.folder")
    made = build()
    made.write(tmp_path / "logs")
    import argparse

    parser = argparse.ArgumentParser()
    folder.add_arguments(parser)
    logs = [str(tmp_path / "logs" / name) for name in made.logs()]
    options = ["--author", "Ann", "--github-id", "ann", "--blurb", "One idea.", "--out", str(tmp_path / "records")]
    assert folder.run(parser.parse_args(["Core", *logs, *options])) == 0
    (path,) = (tmp_path / "records").glob("track_10min_16mb/*_Core")
    assert [f for f in findings(path) if f.level != "pass"] == []


# -----------------------------------------------------------------------------
# What was not examined
# -----------------------------------------------------------------------------

ILLEGAL = script(PRE_QUANT_TTT, "ttt_adapt(args, model, val_tokens, optimizer)")
PREPARE = b"import numpy as np\nnp.arange(9).tofile('x.bin')\n"


def renamed(made: Folder, to: str) -> None:
    made.files[to] = made.files["train_gpt.py"]
    made.files["train_gpt.py"] = None


# The script under a name of its own -> what shows a reader which file it is
ELSEWHERE: dict[str, tuple[str, str, Callable[[Folder], object]]] = {
    "the logs hold it": ("golf_v7.py", "the logs show", lambda f: f.files.update({"other.py": b"loss.backward()\n"})),
    "README's command": (
        "golf_v7.py",
        "is named",
        lambda f: (
            f.files.update({"other.py": b"loss.backward()\n"}),
            setattr(f, "readme", f.readme.replace("train_gpt.py", "golf_v7.py")),
        ),
    ),
    "the JSON": (
        "golf_v7.py",
        "is named",
        lambda f: (f.files.update({"other.py": b"loss.backward()\n"}), f.meta.update(script="golf_v7.py")),
    ),
    "a subfolder": ("src/train_gpt.py", "named", lambda f: f.files.update({"prepare.py": PREPARE})),
    "the only one that trains": ("golf_v7.py", "the only one that trains", lambda f: f.files.update({"p.py": PREPARE})),
}


@pytest.mark.parametrize("form", ELSEWHERE)
def test_a_script_of_another_name_is_found_and_examined(tmp_path, form):
    name, words, show = ELSEWHERE[form]
    made = build("baseline", source=ILLEGAL)
    renamed(made, name)
    show(made)
    if form != "the logs hold it":
        for log in made.logs():
            made.edit(log, made.runs[0].source, "")
    found = findings(made.write(tmp_path / "track_10min_16mb" / "f"))
    assert any(f.check == "files" and f.level == "warn" and words in f.what for f in found)
    assert any(f.check == "legality" and f.level == "FAIL" and f"{name} line" in f.what for f in found)
    levels = {f.check: f.level for f in found if f.check in ("source", "syntax", "size")}
    assert levels == dict(source="pass", syntax="pass", size="pass")  # by its size, where the logs hold no source


@pytest.mark.parametrize("data", [None, b""])
def test_a_script_that_is_not_there_is_skipped_not_passed(tmp_path, data):
    made = build("baseline")
    made.files |= {"train_gpt.py": data, "a.py": b"loss.backward()\n", "b.py": b"loss.backward()\n"}
    folder = made.write(tmp_path / "f")
    found = findings(folder)
    for name in ("source", "syntax", "legality"):
        (said,) = [f for f in found if f.check == name]
        assert said.level == "skip" and "which of a.py, b.py ran is not said" in said.what
    assert main(folder) == 1


def test_without_a_log_nothing_about_runs_passes(tmp_path):
    made = build()
    made.files |= dict.fromkeys(made.logs())
    folder = made.write(tmp_path / "track_10min_16mb" / "f")
    levels = {f.check: f.level for f in findings(folder) if f.level != "warn"}
    assert {name for name, level in levels.items() if level == "skip"} == {
        *("headline", "numbers", "source", "size", "clocks", "seeds")
    }


def test_logs_that_state_no_size_and_no_time_are_skipped_not_passed(tmp_path):
    made = build("baseline")
    for name in made.logs():
        lines = made.files[name].decode().splitlines(keepends=True)
        gone = ("Total submission", "Serialized", "stopping_early", "Code size")
        kept = [line for line in lines if not line.startswith(gone)]
        made.files[name] = re.sub(r" eval_time:\d+ms", "", "".join(kept)).encode()
    folder = made.write(tmp_path / "track_10min_16mb" / "f")
    skipped = {f.check for f in findings(folder, "skip")}
    assert skipped == {"size", "clocks"} and not [f for f in findings(folder, "FAIL") if f.check == "size"]
    assert main(folder) == 1


def test_without_a_track_times_within_the_clocks_pass_and_others_are_skipped(tmp_path):
    made = build("baseline")
    made.meta["track"] = None
    assert [f.level for f in findings(made.write(tmp_path / "f")) if f.check == "clocks"] == ["pass"]
    made.again(*[dict(steps=(1, 6012), step_ms=1000.0)] * 3)
    (found,) = [f for f in findings(made.write(tmp_path / "g")) if f.check == "clocks"]
    assert found.level == "skip" and "6012.000 s" in found.what


def test_what_nearly_every_folder_leaves_unsaid_is_one_line_at_the_end(tmp_path):
    made = build("baseline")
    for key in ("headline", "seeds", "track", "github_id"):
        made.meta.pop(key)
    found = findings(made.write(tmp_path / "track_10min_16mb" / "f"))
    assert [f for f in found if f.level not in ("pass", "note")] == [found[-1]]
    assert found[-1].what == "submission.json does not say, as many do not: github_id, track, seeds, headline"


# -----------------------------------------------------------------------------
# Several experiments in one folder
# -----------------------------------------------------------------------------


def experiments(**scores: tuple[float, ...]) -> Folder:
    """Logs <name>_seed<1…>.log of these scores; the JSON is still to be said what of it counts."""
    made = build("baseline")
    made.files |= dict.fromkeys(made.logs())
    made.runs = []
    for name, values in scores.items():
        for seed, bpb in enumerate(values, 1):
            found = corpus.Result("final_int8_zlib_roundtrip", round(bpb / corpus.BPB_PER_NAT, 8), bpb)
            run = corpus.run_of("baseline", seed=seed, source=SCRIPT, results=(found,), run_id=f"{name}{seed}")
            made.files[f"{name}_seed{seed}.log"] = corpus.baseline(run).encode()
            made.runs.append(run)
    made.readme = "# Core\n\nval_bpb 1.2002\n"
    made.meta = dict(author="Ann", date="2026-04-09", val_bpb=1.2002, track="10min_16mb")
    made.meta |= dict(bytes_total=made.runs[0].bytes_total, bytes_code=made.runs[0].bytes_code)
    return made


A, B = (1.2001, 1.2002, 1.2003), (1.1001, 1.1002, 1.1003)


def test_the_experiment_that_the_json_declares_is_judged_and_the_other_listed(tmp_path):
    found = findings(experiments(a=A, b=B).write(tmp_path / "f"))
    assert [f for f in found if f.level in ("FAIL", "skip")] == []
    assert Finding("files", "note", "other runs, not judged: b_seed1.log, b_seed2.log, b_seed3.log") in found
    assert Finding("seeds", "pass", "3 seeds: 1, 2, 3") in found
    assert any(f.check == "headline" and f.level == "pass" and "1.20020000" in f.what for f in found)


@pytest.mark.parametrize("told", ["in README.md alone", "by the names of logs"])
def test_the_experiment_may_be_declared_otherwise(tmp_path, told):
    made = experiments(first=A, rerun=B)
    if told == "by the names of logs":
        made.meta |= dict(val_bpb=1.1002, logs=[f"first_seed{i}.log" for i in (1, 2, 3)])
        (found,) = findings(made.write(tmp_path / "f"), "FAIL")  # the names, but another score: the score counts
        assert found.check == "readme"
        return
    made.readme = "# Core\n\nval_bpb 1.1002 (a compliance rerun of 1.2002)\n"
    made.files["submission.json"] = b"{}"
    found = findings(made.write(tmp_path / "f"))
    assert any(f.what.startswith("other runs, not judged: first_seed1.log") for f in found)


def test_experiments_are_told_apart_by_their_settings(tmp_path):
    """Seeds 1 to 3 of one, 4 to 6 of another, names of one kind: an original and its ablation."""
    made = build("baseline-noprefix")
    for seed, run in zip((4, 5, 6), made.runs, strict=True):
        other = dataclasses.replace(run, seed=seed, run_id=f"seed{seed}", settings=(("num_layers", 9),))
        other = dataclasses.replace(other, results=(corpus.result("quantized", 2.2), corpus.result("ttt", 2.19 + seed)))
        made.files[f"train_seed{seed}.log"] = corpus.noprefix(other).encode()
    found = findings(made.write(tmp_path / "track_10min_16mb" / "f"))
    assert [f for f in found if f.level not in ("pass", "note")] == []
    names = "train_seed4.log, train_seed5.log, train_seed6.log"
    assert Finding("files", "note", f"other runs, not judged: {names}") in found


def test_several_experiments_of_which_none_is_declared_are_not_judged_silently(tmp_path):
    made = experiments(a=A, b=B)
    made.readme, made.files["submission.json"] = "# Core\n", b"{}"
    found = findings(made.write(tmp_path / "f"))
    assert any(f.check == "seeds" and f.level == "skip" and "nothing says which" in f.what for f in found)


@pytest.mark.parametrize("form", ["the same file", "the console's", "in a subfolder"])
def test_a_copy_of_a_log_is_one_run(tmp_path, form):
    made = build("baseline")
    text = corpus.console(made.runs[0]) if form == "the console's" else made.files["train_seed1337.log"].decode()
    name = "logs/train.log" if form == "in a subfolder" else "train.log"
    made.files[name] = text.encode()
    found = findings(made.write(tmp_path / "track_10min_16mb" / "f"))
    assert [f for f in found if f.level not in ("pass", "note")] == []
    assert Finding("files", "note", f"{name} is a copy of train_seed1337.log: one run") in found
    assert any(f.check == "seeds" and "3 seeds: 42, 1337, 2025" in f.what for f in found)


def test_a_log_of_the_evaluation_alone_is_joined_with_that_of_its_training(tmp_path):
    made = build("baseline")
    for run in made.runs:
        text = f"legal_ttt_exact val_loss:2.04000000 val_bpb:1.205{run.seed % 1000:03d}00 eval_time:400000ms\n"
        made.files[f"eval_seed{run.seed}.log"] = f"seed:{run.seed}\n{text}".encode()
    made.meta |= dict(headline="legal_ttt", val_loss=2.04, seed_results=None, val_bpb_std=None)
    made.meta["val_bpb"] = round(statistics.fmean(1.205 + run.seed % 1000 / 1e6 for run in made.runs), 8)
    made.readme = f"# Core\n\nval_bpb {made.meta['val_bpb']:.5f}\n"
    found = findings(made.write(tmp_path / "track_10min_16mb" / "f"))
    assert [f for f in found if f.level in ("FAIL", "skip")] == []
    assert any(f.check == "clocks" and f.what == "longest training 581.9 s, evaluation 400.0 s" for f in found)


def test_seeds_are_counted_as_the_logs_state_them(tmp_path):
    made = build("baseline", seeds=(1, 2, 3))
    again = dataclasses.replace(made.runs[0], results=(corpus.result("final_int8_zlib_roundtrip", 2.0719),))
    made.files["train_seed2.log"] = corpus.baseline(again).encode()
    found = findings(made.write(tmp_path / "f"))
    assert any(f.check == "seeds" and f.level == "warn" and f.what.startswith("2 seeds in the logs") for f in found)


def test_three_runs_in_one_log_are_three_runs(tmp_path):
    made = build("baseline")
    made.files["train.log"] = b"".join(made.logs().values())
    made.files |= dict.fromkeys(made.logs())
    found = findings(made.write(tmp_path / "track_10min_16mb" / "f"))
    assert [f for f in found if f.level not in ("pass", "note")] == []
    assert any(f.check == "seeds" and "3 seeds" in f.what for f in found)


# -----------------------------------------------------------------------------
# Sizes, numbers and syntax that are right
# -----------------------------------------------------------------------------


def with_two_sizes(made: Folder, uncompressed: int) -> None:
    """Logs that state both sizes of the code, and not its source."""
    for name, run in zip(made.logs(), made.runs, strict=True):
        both = f"Code size (uncompressed): {uncompressed} bytes\nCode size (compressed): {run.bytes_code - 700} bytes\n"
        made.edit(name, f"Code size: {run.bytes_code} bytes\n", both)
        made.edit(name, run.source, "")
        label = run.size_label
        made.edit(name, f"size {label}: {run.bytes_total} bytes", f"size {label}: {run.bytes_total - 700} bytes")
    made.meta |= dict(bytes_total=made.meta["bytes_total"] - 700, bytes_code=uncompressed, seed_results=None)
    made.readme = f"# Core\n\nval_bpb {made.meta['val_bpb']:.5f}\n"


def test_the_uncompressed_size_is_compared_with_the_file(tmp_path):
    made = build("baseline")
    with_two_sizes(made, len(SCRIPT))
    found = findings(made.write(tmp_path / "f"))
    assert [f for f in found if f.level == "FAIL"] == []
    assert any(f.check == "source" and f.level == "pass" for f in found)
    (said, *_) = [f for f in found if f.check == "size" and f.level == "warn"]
    total = made.runs[0].bytes_total
    assert f"{total - 700:,} bytes in all as counted, {total:,} by what runs" in said.what

    made = build("baseline")
    with_two_sizes(made, len(SCRIPT) + 571)
    found = findings(made.write(tmp_path / "g"), "FAIL")
    assert any(f.check == "source" and f"{len(SCRIPT) + 571:,} bytes uncompressed" in f.what for f in found)


@pytest.mark.parametrize("over", [False, True])
def test_the_cap_is_judged_by_what_is_counted_and_by_what_runs(tmp_path, over):
    """Beyond the cap by what runs alone is a warning with both totals; beyond it as counted is a failure."""
    made = build("baseline")
    model = 16_000_000 - len(SCRIPT) + (200 if over else 0) + 700 - (0 if over else 100)
    made.again(*[dict(bytes_model=model)] * 3)
    made.meta["bytes_total"] = made.runs[0].bytes_total
    with_two_sizes(made, len(SCRIPT))
    if over:
        made.again(*[dict(bytes_model=model)] * 3)
    found = [f for f in findings(made.write(tmp_path / "f")) if f.check == "size"]
    assert ("FAIL" in {f.level for f in found}) == over
    assert over or any(f"{600:,} over the cap" in f.what and "as counted" in f.what for f in found)


BESIDE = {
    "an import": ("import helper\n", "helper.py"),
    "a package": ("from pack.inner import f\n", "pack/inner.py"),
    "a relative import": ("from . import helper\n", "helper.py"),
    "an import by name": ("import importlib\nm = importlib.import_module('helper')\n", "helper.py"),
    "a kernel": ("from torch.utils.cpp_extension import load\nk = load('k', sources=['csrc/k.cu'])\n", "csrc/k.cu"),
    "C++": ("import os\ns = open(os.path.join(os.path.dirname(__file__), 'fast.cpp')).read()\n", "fast.cpp"),
    "an f-string": ("h = __file__\nsrc = f'{h}/kern.cpp'\n", "kern.cpp"),
    "an import of an import": ("import first\n", "second.py"),
}


@pytest.mark.parametrize("form", BESIDE)
def test_code_beside_the_script_counts(tmp_path, form):
    head, name = BESIDE[form]
    made = build("baseline", source=head + SCRIPT)
    made.files |= {name: b"x = 1\n" * 50, "pack/__init__.py": b"y = 1\n"} | {"first.py": b"import second\n"}
    if form != "an import of an import":
        made.files["first.py"] = None
    found = [f for f in findings(made.write(tmp_path / "f")) if f.check == "size"]
    more = 300 + {"an import of an import": 14, "a package": 6}.get(form, 0)
    total = made.runs[0].bytes_total
    assert [f.level for f in found] == ["warn"] * 3 and name in found[0].what
    assert f"{total:,} bytes in all as counted, {total + more:,} by what runs" in found[0].what
    assert not [f for f in findings(tmp_path / "f", "warn") if "not one of the files" in f.what and name in f.what]


def test_a_packed_file_that_the_script_executes_is_its_code(tmp_path):
    source = "import lzma, pathlib\n"
    source += "exec(lzma.decompress(pathlib.Path(__file__).with_name('code.bin').read_bytes()))\n"
    made = build("baseline", source=source)
    made.files["code.bin"] = lzma.compress(ILLEGAL.encode())
    found = findings(made.write(tmp_path / "f"))
    assert not [f for f in found if f.check == "files" and f.level != "pass"]
    assert any(f.check == "size" and "(train_gpt.py, code.bin)" in f.what for f in found)
    assert any(f.check == "legality" and f.level == "FAIL" and "unpacked (1) line" in f.what for f in found)
    made = build("baseline", source="import helper\n" + SCRIPT)
    made.files["helper.py"] = b"TOKEN = 'hf_" + b"a" * 34 + b"'\n"
    assert any("secret key" in f.what for f in findings(made.write(tmp_path / "g"), "FAIL"))


def test_carriage_returns_that_a_checkout_adds_are_no_code(tmp_path):
    made = build("baseline")
    made.files["train_gpt.py"] = made.files["train_gpt.py"].replace(b"\n", b"\r\n")
    found = findings(made.write(tmp_path / "track_10min_16mb" / "f"))
    assert [f for f in found if f.level not in ("pass", "note")] == []


def test_a_readme_may_give_the_score_with_more_digits_than_the_json(tmp_path):
    made = build("baseline")
    made.meta["val_bpb"] = round(made.meta["val_bpb"], 3)
    assert not [f for f in findings(made.write(tmp_path / "f"), "FAIL") if f.check == "readme"]


def test_a_file_that_is_only_spoken_of_does_not_count(tmp_path):
    made = build("baseline", source='"""Run helper.py first."""\n' + SCRIPT)
    made.files["helper.py"] = b"x = 1\n"
    assert [f.level for f in findings(made.write(tmp_path / "f")) if f.check == "size"] == ["pass"]


def test_means_within_their_roundings_are_right(tmp_path):
    """The mean of scores that were rounded first, and the mean of byte totals, rounded or cut."""
    made = build("baseline")
    losses = [bpb / corpus.BPB_PER_NAT for bpb in (1.08104, 1.08114, 1.08124)]
    results = [
        (corpus.Result("final_int8_zlib_roundtrip", round(x, 8), round(x * corpus.BPB_PER_NAT, 8)),) for x in losses
    ]
    made.again(*(dict(results=r, bytes_model=15_815_847 + 50 * i**2) for i, r in enumerate(results)))
    totals = [run.bytes_total for run in made.runs]
    for seed, bpb in zip(SEEDS, (1.0810, 1.0811, 1.0812), strict=True):
        made.meta["seed_results"][str(seed)] = dict(val_bpb=bpb)
    made.meta |= dict(val_bpb=1.08110, val_bpb_std=0.0001, val_loss=None)
    made.meta["bytes_total"] = sum(totals) // 3
    made.meta["artifact_bytes_mean"] = round(sum(totals) / 3)
    made.files["submission.json"] = json.dumps(made.meta).replace('"val_bpb": 1.0811,', '"val_bpb": 1.08110,').encode()
    rows = "\n".join(f"| {seed} | 1.081{i} | {n:,} |" for i, (seed, n) in enumerate(zip(SEEDS, totals, strict=True)))
    mean = f"| mean | 1.08110 | {sum(totals) // 3:,} |"
    made.readme = f"# Core\n\n| seed | val_bpb | artifact bytes |\n|---|---|---|\n{rows}\n{mean}\n"
    found = findings(made.write(tmp_path / "track_10min_16mb" / "f"))
    assert [f for f in found if f.level in ("FAIL", "skip")] == []
    (said,) = [f for f in found if f.level == "warn"]
    assert said.check == "size" and "are the mean of the logs" in said.what
    made.files["submission.json"] = made.files["submission.json"].replace(b"1.08110,", b"1.08102,")
    wrong = {f.check for f in findings(made.write(tmp_path / "g"), "FAIL")}
    assert "headline" in wrong


def test_table_columns_and_names_that_are_no_claims(tmp_path):
    made = build("baseline", seeds=(7, 8, 9))
    made.readme += """
| variant | ms/step | steps/s | val_bpb |
|---|---|---|---|
| T7 | 87.50 | 11.43 | 1.2299 |
| S8 | 88.50 | 11.30 | 1.2298 |
"""
    said = [f.what for f in findings(made.write(tmp_path / "f"), "warn") if f.check == "numbers"]
    assert len(said) == 2 and all("1.229" in what and "is not in any log" in what for what in said)


@pytest.mark.parametrize(
    "python, source, level",
    [
        ("3.12.3", "print(f'{len('a')}')\n", "pass"),
        ("3.11.9", "print(f'{len('a')}')\n", "FAIL"),
        ("3.10.12", "try:\n    pass\nexcept* OSError:\n    pass\n", "FAIL"),
        ("3.11.9", "try:\n    pass\nexcept* OSError:\n    pass\n", "pass"),
        (None, "print(f'{len('a')}')\n", "pass"),
    ],
)
def test_the_syntax_is_judged_by_the_python_that_ran(tmp_path, python, source, level):
    made = build("baseline", source=SCRIPT + source)
    for name in made.logs():
        made.edit(name, "Running Python 3.12.3", f"Running Python {python}" if python else "Running")
    (found,) = [f for f in findings(made.write(tmp_path / "f")) if f.check == "syntax"]
    assert found.level == level


def test_what_only_a_newer_python_reads_is_skipped(tmp_path):
    made = build("baseline", source=SCRIPT + "type X = int\n")
    found = [f for f in findings(made.write(tmp_path / "f")) if f.check == "syntax"]
    assert found[0].level == ("pass" if sys.version_info >= (3, 12) else "skip")


@pytest.mark.parametrize("ms, level", [(600_999, "warn"), (601_001, "FAIL")])
def test_a_last_step_may_cross_by_less_than_a_second(tmp_path, ms, level):
    made = build("baseline")  # of 87 ms each on average; the last one met a compilation
    made.again(*[dict(steps=(1, 6857), step_ms=ms / 6857)] * 3)
    made.meta |= dict(compliance=None, seed_results=None)
    found = [f for f in findings(made.write(tmp_path / "f")) if f.check == "clocks"]
    assert {f.level for f in found} == {level} and f"{ms / 1000:.3f} s" in found[0].what


@pytest.mark.parametrize(
    "reserve", ["", "gptq:reserving 0ms, effective=600000ms\n", "gptq:reserving 10s, effective=590000ms\n"]
)
def test_self_generated_calibration_is_judged_alike(tmp_path, reserve):
    made = build("baseline")
    late = "gptq:generating autoregressive calibration data (64 seqs x 2048)\ngptq:generated 64 sequences in 186.2s\n"
    for name in made.logs():
        made.edit(name, "warmup_step:1/20\n", f"warmup_step:1/20\n{reserve}")
        made.edit(name, "peak memory", late + "peak memory")
        made.edit(name, "Code size", late + "Code size")
    found = [f for f in findings(made.write(tmp_path / "f")) if f.check == "clocks"]
    assert [f.level for f in found] == ["warn"] * 3 and "(186.2 s), on text that the model made itself" in found[0].what


@pytest.mark.parametrize("reserve", ["", "gptq:reserving 0ms, effective=600000ms\n"])
def test_a_reserve_of_nothing_is_none(tmp_path, reserve):
    made = build("baseline")
    made.again(*[dict(steps=(1, 5999), step_ms=100.0)] * 3)
    for name in made.logs():
        made.edit(name, "warmup_step:1/20\n", f"warmup_step:1/20\n{reserve}")
        made.edit(name, "Code size", "gptq:collected 67 hessians in 3.6s\nCode size")
    found = [f for f in findings(made.write(tmp_path / "f")) if f.check == "clocks"]
    assert [f.level for f in found] == ["warn"] * 3 and "calibration after the training clock: gptq" in found[0].what


# -----------------------------------------------------------------------------
# Planted defects: name -> (check that finds it, level, words of its finding, what is done to a clean folder)
# -----------------------------------------------------------------------------

DEFECTS: dict[str, tuple[str, str, str, Callable[[Folder], object]]] = {}


def defect(where: str, level: str, words: str, dialect: str = "pgolf", **built):
    """Register a function that spoils a folder; its name is the defect's."""

    def register(spoil):
        DEFECTS[spoil.__name__] = (where, level, words, lambda: _spoilt(spoil, dialect, built))
        return spoil

    return register


def _spoilt(spoil, dialect, built):
    made = build(dialect, **built)
    spoil(made)
    return made


def planted(name: str, where: str, level: str, words: str, spoil: Callable, dialect: str = "pgolf", **built) -> None:
    spoil.__name__ = name
    defect(where, level, words, dialect, **built)(spoil)


# files
planted("no README", "files", "FAIL", "README.md is missing", lambda f: f.files.update({"README.md": None}))
planted("no JSON", "files", "FAIL", "submission.json is missing", lambda f: f.files.update({"submission.json": None}))
planted("no script", "files", "FAIL", "train_gpt.py is missing", lambda f: f.files.update({"train_gpt.py": None}))
planted("empty script", "files", "FAIL", "train_gpt.py is empty", lambda f: f.files.update({"train_gpt.py": b""}))
planted("no log", "files", "FAIL", "no log", lambda f: f.files.update({name: None for name in f.logs()}))
planted("a log missing", "files", "FAIL", "seed 42", lambda f: f.files.update({"train_seed42.log": None}))
planted("secrets file", "files", "FAIL", ".env: may hold secrets", lambda f: f.files.update({".env": b"A=1"}))
planted("weights", "files", "FAIL", "final_model.pt", lambda f: f.files.update({"final_model.pt": b"PK"}))
planted("private key", "files", "FAIL", "id_rsa", lambda f: f.files.update({"keys/id_rsa": b"x"}))
planted("key in the text", "files", "FAIL", "secret key", lambda f: f.files.update({"notes.md": b"hf_" + b"a" * 34}))
planted(
    "shard", "files", "FAIL", "fineweb_val_000000.bin: data", lambda f: f.files.update({"fineweb_val_000000.bin": b"1"})
)
planted("cache folder", "files", "FAIL", "__pycache__", lambda f: f.files.update({"__pycache__/a.pyc": b"1"}))
planted("binary", "files", "FAIL", "tool: binary", lambda f: f.files.update({"tool": b"\x7fELF\0"}))
planted("helper file", "files", "warn", "launch.py: not one", lambda f: f.files.update({"launch.py": b"1"}))
planted(
    "oversized file",
    "files",
    "FAIL",
    "notes.md: 8,000,001 bytes",
    lambda f: f.files.update({"notes.md": b"a" * 8_000_001}),
)
# json
planted("JSON does not parse", "json", "FAIL", "does not parse", lambda f: f.files.update({"submission.json": b"{,}"}))
planted("JSON bomb", "json", "FAIL", "", lambda f: f.files.update({"submission.json": b"[" * 100_000}))
planted("JSON nested deeply", "json", "FAIL", "deeply", lambda f: f.meta.update(x=json.loads("[" * 40 + "]" * 40)))
planted("NaN", "json", "FAIL", "NaN", lambda f: f.meta.update(val_loss=float("nan")))
planted("twice", "json", "FAIL", "twice", lambda f: f.files.update({"submission.json": b'{"author":"a","author":"b"}'}))
planted("empty author", "json", "FAIL", "author is empty", lambda f: f.meta.update(author="", github_id=""))
planted("no date", "json", "FAIL", "no field date", lambda f: f.meta.pop("date"))
planted("wrong date", "json", "FAIL", "09/04/2026", lambda f: f.meta.update(date="09/04/2026"))
planted("score as text", "json", "FAIL", "val_bpb is text", lambda f: f.meta.update(val_bpb="1.08"))
planted("no score", "json", "FAIL", "no field val_bpb", lambda f: f.meta.pop("val_bpb"))
planted("implausible score", "json", "FAIL", "not plausible", lambda f: f.meta.update(val_bpb=-1.08))
planted("unfilled size", "json", "FAIL", "bytes_total is null", lambda f: f.meta.update(bytes_total=None))
planted("placeholder", "json", "FAIL", "github_id is not filled in", lambda f: f.meta.update(github_id="your_github"))
planted("placeholder in README", "json", "warn", "TODO", lambda f: setattr(f, "readme", f.readme + "\nTODO: results\n"))
planted("seeds and results differ", "json", "FAIL", "7", lambda f: f.meta.update(seeds=[1337, 42, 7]))
# readme, headline
planted(
    "README of another run", "readme", "FAIL", "nowhere", lambda f: setattr(f, "readme", "# Core\n\nval_bpb 1.0512\n")
)
planted("JSON disagrees with logs", "headline", "FAIL", "mean of 3", lambda f: f.meta.update(val_bpb=1.1502))
planted(
    "best seed as headline",
    "headline",
    "FAIL",
    "train_seed1337.log alone",
    lambda f: f.meta.update(val_bpb=f.meta["seed_results"]["1337"]["val_bpb"]),
)
planted(
    "another line than declared",
    "headline",
    "FAIL",
    "it is that of legal_ttt",
    lambda f: f.meta.update(headline="final_int6_roundtrip"),
)
planted("declared line missing", "headline", "FAIL", "slot", lambda f: f.meta.update(headline="slot_exact"))
planted(
    "undeclared and unknown",
    "headline",
    "FAIL",
    "nearest",
    lambda f: (f.meta.pop("headline"), f.meta.update(val_bpb=1.01)),
    dialect="baseline-noprefix",
)
planted("wrong loss", "headline", "FAIL", "val_loss", lambda f: f.meta.update(val_loss=1.9))
planted(
    "rounded up", "headline", "FAIL", "val_bpb", lambda f: f.meta.update(val_bpb=round(f.meta["val_bpb"] - 0.00001, 5))
)
# numbers
planted(
    "seed result not logged",
    "numbers",
    "FAIL",
    "seed_results.42.val_bpb",
    lambda f: f.meta["seed_results"]["42"].update(val_bpb=1.2),
)
planted(
    "results of two seeds swapped",
    "numbers",
    "FAIL",
    "the log of seed 1337",
    lambda f: f.meta["seed_results"].update(
        {"1337": f.meta["seed_results"]["42"], "42": f.meta["seed_results"]["1337"]}
    ),
)
planted("steps not logged", "numbers", "FAIL", "steps", lambda f: f.meta["seed_results"]["42"].update(steps=7185))
planted(
    "README row not logged",
    "numbers",
    "FAIL",
    "README.md line",
    lambda f: setattr(f, "readme", re.sub(r"\*\*1\.\d+\*\* \| 2", "**1.04321** | 2", f.readme, count=1)),
)
planted(
    "README score not logged",
    "numbers",
    "warn",
    "1.09312",
    lambda f: setattr(f, "readme", f.readme + "\nIt gives val_bpb 1.09312.\n"),
    dialect="baseline",
)
planted(
    "README bytes not logged",
    "numbers",
    "FAIL",
    "15,123,456",
    lambda f: setattr(f, "readme", f.readme + "\nThe artifact has 15,123,456 bytes.\n"),
)
# source
planted(
    "log of another script", "source", "FAIL", "another script", lambda f: f.again({}, dict(source=SCRIPT + "x = 1\n"))
)
planted(
    "script edited after the run",
    "source",
    "FAIL",
    "first difference",
    lambda f: f.edit("train_gpt.py", '"3"', '"4"'),
    dialect="baseline",
)
planted("hash in the JSON", "source", "FAIL", "code_sha256", lambda f: f.meta.update(code_sha256="0" * 64))
planted(
    "log's source is not what it states",
    "source",
    "FAIL",
    "whose code_sha256",
    lambda f: f.edit("train_seed42.log", '"TTT_EPOCHS", "3"', '"TTT_EPOCHS", "4"'),
)
planted(
    "companion is another program",
    "source",
    "FAIL",
    "train_gpt_human.py",
    lambda f: f.edit("train_gpt_human.py", '"3"', '"4"'),
    source=packed(SCRIPT),
    inner=SCRIPT,
)
# syntax
planted("syntax error", "syntax", "FAIL", "line 1", lambda f: None, source="def f(:\n")
planted("Python 3.12 only", "syntax", "FAIL", "3.12", lambda f: None, source=SCRIPT + "print(f'{len('a')}')\n")
planted(
    "Python 3.11 only",
    "syntax",
    "FAIL",
    "3.10",
    lambda f: None,
    source=SCRIPT + "try:\n    pass\nexcept* OSError:\n    pass\n",
)
planted(
    "3.12 inside a packed script",
    "syntax",
    "FAIL",
    "unpacked (1)",
    lambda f: None,
    source=packed(SCRIPT + "print(f'{len('a')}')\n"),
)
planted(
    "sibling module missing", "syntax", "FAIL", "env_utils", lambda f: None, source="from env_utils import a\n" + SCRIPT
)
planted(
    "needs a kernel to be imported",
    "syntax",
    "warn",
    "flash_attn",
    lambda f: None,
    source="from flash_attn_interface import flash_attn_func\n" + SCRIPT,
)
# size
planted("over the cap", "size", "FAIL", "over 16,000,000", lambda f: f.again({}, dict(bytes_model=18_000_000)))
planted("MiB for MB", "size", "FAIL", "16 MiB", lambda f: f.again({}, dict(bytes_model=16_042_632)))
planted(
    "code bytes forgotten in the JSON",
    "size",
    "FAIL",
    "the code is forgotten",
    lambda f: f.meta.update(bytes_total=f.runs[0].bytes_model),
)
planted(
    "code bytes forgotten in the log",
    "size",
    "FAIL",
    "code",
    lambda f: [
        f.edit(
            name,
            f"Total submission size int8+zlib: {run.bytes_total}",
            f"Total submission size int8+zlib: {run.bytes_model}",
        )
        for name, run in zip(f.logs(), f.runs, strict=True)
    ],
    dialect="baseline",
)
planted("size of no log", "size", "FAIL", "the total of no log", lambda f: f.meta.update(bytes_total=15_900_001))
planted("not the largest seed", "size", "warn", "largest", lambda f: f.meta.update(bytes_total=f.runs[0].bytes_total))
planted("other code bytes", "size", "FAIL", "train_gpt.py has", lambda f: f.meta.update(bytes_code=47_686))
planted(
    "raw code counted",
    "size",
    "warn",
    "raw code",
    lambda f: f.files.update({"train_gpt.py": packed(SCRIPT).encode()}),
    dialect="baseline",
)
planted(
    "raw code counted, over the cap",
    "size",
    "FAIL",
    "counts the raw source",
    lambda f: (
        f.again(*[dict(bytes_model=15_999_000 - len(packed(SCRIPT)))] * 3),
        f.files.update({"train_gpt.py": packed(SCRIPT).encode()}),
    ),
    dialect="baseline",
    source=SCRIPT,
)
planted(
    "a stub that runs a sibling",
    "size",
    "FAIL",
    "inner.py",
    lambda f: f.files.update({"inner.py": SCRIPT.encode()}),
    source="exec(open('inner.py').read())\n",
)
# clocks
planted(
    "training too long",
    "clocks",
    "FAIL",
    "training took 601.200 s",
    lambda f: f.again({}, dict(steps=(1, 6012), step_ms=100.0)),
)
planted(
    "evaluation too long",
    "clocks",
    "FAIL",
    "evaluation took",
    lambda f: f.again({}, dict(results=(corpus.result("legal_ttt", 2.05, "", 688_000),))),
)
planted(
    "calibration after the clock",
    "clocks",
    "FAIL",
    "12.8 s of calibration",
    lambda f: f.again(*[dict(steps=(1, 5999), step_ms=100.0)] * 3),
    dialect="baseline-noprefix",
)
planted(
    "time in the JSON", "clocks", "FAIL", "eval_time_seconds", lambda f: f.meta.update(eval_time_seconds=[500, 616])
)
planted(
    "taken up from a checkpoint",
    "clocks",
    "warn",
    "at step 200",
    lambda f: f.edit(
        "train_seed42.log",
        "step:6501/20000 train_loss",
        "checkpoint:written step:200 bytes:9 path:c-200.pgckpt\nresume:step:200 train_time:17700ms from:c-200.pgckpt\n"
        "step:6501/20000 train_loss",
    ),
)
# seeds
planted("single seed", "seeds", "warn", "3 are expected", lambda f: None, seeds=(1337,))
planted(
    "the same log twice",
    "seeds",
    "FAIL",
    "the same file",
    lambda f: f.files.update({"train_seed42.log": f.files["train_seed1337.log"]}),
)
planted(
    "log named for another seed",
    "seeds",
    "FAIL",
    "is the log of seed",
    lambda f: f.files.update(
        {"train_seed42.log": f.files["train_seed2025.log"], "train_seed2025.log": f.files["train_seed42.log"]}
    ),
)
planted(
    "mixed configurations",
    "seeds",
    "FAIL",
    "matrix_lr",
    lambda f: f.again({}, dict(settings=(("num_layers", 11), ("matrix_lr", 0.02), ("slot_enabled", False)))),
)
planted(
    "mixed models", "seeds", "FAIL", "model_params", lambda f: f.again({}, dict(model_params=1)), dialect="baseline"
)
planted(
    "population deviation",
    "seeds",
    "warn",
    "divides by n",
    lambda f: f.meta.update(
        val_bpb_std=round(statistics.pstdev(r["val_bpb"] for r in f.meta["seed_results"].values()), 8)
    ),
)
planted("wrong deviation", "seeds", "FAIL", "val_bpb_std", lambda f: f.meta.update(val_bpb_std=0.0001))
# compliance, audit
planted(
    "three seeds claimed",
    "compliance",
    "FAIL",
    "three_seeds",
    lambda f: f.meta["compliance"].update(three_seeds=True),
    seeds=(1337,),
)
planted(
    "time claimed",
    "compliance",
    "FAIL",
    "train_under_600s",
    lambda f: f.again({}, dict(steps=(1, 6012), step_ms=100.0)),
)
planted(
    "size claimed", "compliance", "FAIL", "artifact_under_16mb", lambda f: f.again({}, dict(bytes_model=16_042_632))
)
planted(
    "no SLOT claimed",
    "compliance",
    "FAIL",
    "no_slot",
    lambda f: None,
    source=script(SLOT, "eval_val_slot(args, model, val_tokens, [])"),
)
planted(
    "audit claimed that failed",
    "compliance",
    "FAIL",
    "causal_dependence",
    lambda f: (
        f.meta["compliance"].update(causal_dependence=True),
        f.edit("train_seed42.log", "audit:causal pass", "audit:causal FAIL"),
    ),
)
planted(
    "audit claimed that no log has",
    "compliance",
    "warn",
    "no audit in the logs shows it",
    lambda f: f.meta["compliance"].update(full_distribution=True),
)
planted(
    "one configuration claimed",
    "compliance",
    "FAIL",
    "one_configuration",
    lambda f: (f.meta["compliance"].update(one_configuration=True), f.again({}, dict(world_size=4))),
)
planted(
    "adapters of another rank",
    "seeds",
    "FAIL",
    "ttt_lora_rank",
    lambda f: f.again(*[dict(settings=(("num_layers", 11), ("ttt_lora_rank", rank))) for rank in (8, 8, 16)]),
    dialect="baseline-noprefix",
)
planted(
    "audit failed",
    "audit",
    "FAIL",
    "audit:causal",
    lambda f: f.edit("train_seed42.log", "audit:causal pass", "audit:causal FAIL"),
)
# legality
planted(
    "trains on validation first",
    "legality",
    "FAIL",
    "train_before_score",
    lambda f: None,
    source=script(PRE_QUANT_TTT, "ttt_adapt(args, model, val_tokens, optimizer)"),
)
planted(
    "the same, packed",
    "legality",
    "FAIL",
    "unpacked (1) line",
    lambda f: None,
    source=packed(script(PRE_QUANT_TTT, "ttt_adapt(args, model, val_tokens, optimizer)")),
)
planted(
    "SLOT switched on by the run",
    "legality",
    "FAIL",
    "scored_region",
    lambda f: f.again(*[dict(settings=(("slot_enabled", True),))] * 3),
    source=script(SLOT, "if args.slot_enabled: eval_val_slot(args, model, val_tokens, [])"),
)
planted(
    "in a sibling module",
    "legality",
    "FAIL",
    "helper.py line",
    lambda f: f.files.update(
        {"helper.py": script(PRE_QUANT_TTT, "ttt_adapt(args, model, val_tokens, optimizer)").encode()}
    ),
    source="import helper\n" + SCRIPT,
)
planted(
    "cannot be unwrapped",
    "legality",
    "skip",
    "not examined",
    lambda f: None,
    source="import zlib\nexec(zlib.decompress(input()))\n",
)


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found_by_its_check(tmp_path, name):
    where, level, words, spoilt = DEFECTS[name]
    found = findings(spoilt().write(tmp_path / "track_10min_16mb" / "2026-04-09_Core"))
    assert [f for f in found if f.check == where and f.level == level and words in f.what], found


def test_there_are_enough_defects():
    assert len(DEFECTS) >= 40 and {where for where, *_ in DEFECTS.values()} == set(check.CHECKS)


def test_what_is_too_long_to_be_examined_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(program.unpack, "MAX_SOURCE", 1000)
    found = findings(build().write(tmp_path / "f"), "skip")
    for name in ("syntax", "legality"):
        assert any(f.check == name and "not examined: longer than" in f.what for f in found)


def test_sources_beyond_a_size_are_said_not_examined(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "MAX_SOURCES", len(SCRIPT) + 10)
    made = build(source=SCRIPT + "import aa\n")
    made.files["aa.py"] = b"x = 1\n" * 100
    found = findings(made.write(tmp_path / "f"), "skip")
    assert any(f.check == "legality" and "from aa.py on" in f.what for f in found)


def test_dead_code_is_a_note_not_a_failure(tmp_path):
    made = build(source=script(SLOT, "if args.slot_enabled: eval_val_slot(args, model, val_tokens, [])"))
    found = findings(made.write(tmp_path / "f"))
    assert [f for f in found if f.level == "FAIL"] == []
    assert any(f.check == "legality" and "switched off" in f.what for f in found)


def test_the_step_that_ends_after_the_cap_is_a_warning(tmp_path):
    """Public scripts look at the clock after each step; every clean record of theirs ends a few milliseconds late."""
    made = build("baseline")
    made.again(*[dict(steps=(1, 13_780), step_ms=600_038 / 13_780)] * 3)
    made.meta |= dict(compliance=dict(train_under_600s=True), wallclock_seconds=600.038)
    made.meta["seed_results"] = made.meta["seeds"] = None
    found = [f for f in findings(made.write(tmp_path / "f")) if f.check in ("clocks", "compliance")]
    assert [f.level for f in found] == ["warn", "warn", "warn", "pass"] and "600.038 s" in found[0].what


def test_our_training_clock_holds_the_calibration(tmp_path):
    made = build()
    made.again(*[dict(steps=(1, 5950), step_ms=100.0)] * 3)
    for name in made.logs():
        made.edit(name, "phase:train", "phase:calibrate seconds:9.00\nphase:train")
        made.edit(name, "peak memory", "train_reserve:9000ms for calibration\npeak memory")
    assert not [f for f in findings(made.write(tmp_path / "f"), "FAIL") if f.check == "clocks"]


def test_an_audit_speaks_for_a_score_from_the_forward_that_learns(tmp_path):
    functions = """
        def eval_val_ttt_lora(model, val_tokens, optimizer):
            nll = []
            for c in range(10):
                x = val_tokens[c * 100 : (c + 1) * 100]
                losses = model(x[:-1], x[1:])
                nll.append(losses.detach())
                losses.mean().backward()
                optimizer.step()
            return nll
    """
    made = build(source=script(functions, "eval_val_ttt_lora(model, val_tokens, optimizer)"))
    for name in made.logs():
        made.edit(name, "audit:causal pass", "audit:score_first pass moved:0\naudit:causal pass")
    (found,) = [f for f in findings(made.write(tmp_path / "f")) if f.check == "legality"]
    assert found.level == "warn" and "unless the result kept in line" in found.what
    assert "audit:score_first passed in every log" in found.what


def test_an_audit_json_speaks_for_the_log_of_its_script_and_artifact(tmp_path):
    folder = build().write(tmp_path / "f")
    result = json.loads((folder / "train_seed42.log").read_text("utf-8").rstrip().rpartition("\nresult ")[2])
    ours = dict(artifact=result["artifact_sha256"], script=result["code_sha256"])
    for sha256, passed, wanted in (
        (ours, True, []),
        (ours, False, [("audit", "audit:identity failed: not the log's")]),
        (ours | dict(script="0" * 64), True, [("files", "audit_seed42.json is of no log's script and artifact")]),
        (5, True, [("files", "audit_seed42.json is no audit.json of records/audit.py")]),
    ):
        audit = dict(audit=dict(identity=dict(passed=passed, figure="not the log's")), sha256=sha256)
        (folder / "audit_seed42.json").write_text(json.dumps(audit), "utf-8")
        failed = [(finding.check, finding.what) for finding in findings(folder, "FAIL")]
        assert [check for check, _ in failed] == [check for check, _ in wanted], failed
        assert all(said in what for (_, what), (_, said) in zip(failed, wanted, strict=True)), failed


def test_other_tracks_have_no_clocks(tmp_path):
    made = build()
    made.again(*[dict(steps=(1, 6012), step_ms=1000.0)] * 3)
    made.meta |= dict(track="non_record_16mb")
    assert not [f for f in findings(made.write(tmp_path / "f"), "FAIL") if f.check == "clocks"]


# -----------------------------------------------------------------------------
# Untrusted folders
# -----------------------------------------------------------------------------


def test_links_are_not_followed(tmp_path):
    secret = tmp_path / "secret.log"
    secret.write_text("seed:7\nlegal_ttt val_loss:1.0000 val_bpb:0.5000\n")
    folder = build().write(tmp_path / "f")
    (folder / "extra.log").symlink_to(secret)
    (folder / "inside.log").symlink_to("train_seed42.log")
    (folder / "outside").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(folder / "pipe.log")
    found = {(f.level, f.what) for f in findings(folder) if f.check == "files"}
    assert {
        ("FAIL", "extra.log: a link that leaves the folder"),
        ("FAIL", "outside: a link that leaves the folder"),
        ("FAIL", "pipe.log: not a plain file"),
        ("warn", "inside.log: a link, which is not followed"),
    } == found
    assert "extra.log" not in check.load(folder).logs


def test_nothing_foreign_is_executed(tmp_path):
    made = build(source=f"open({str(tmp_path / 'ran')!r}, 'w')\n" + SCRIPT)
    made.files["train_gpt.py"] = packed(made.files["train_gpt.py"].decode()).encode()
    findings(made.write(tmp_path / "f"))
    assert not (tmp_path / "ran").exists()


def test_foreign_text_cannot_steer_the_terminal(tmp_path, capsys):
    made = build()
    made.meta |= dict(author="TODO \x1b[2J\u202e\n pass files", date="\x1b]0;x\x07")
    made.files["\x1b[31mred.pt"] = b""
    assert main(made.write(tmp_path / "f")) == 1
    out = capsys.readouterr().out
    assert all(
        line.split(" ")[0] in {"pass", "warn", "FAIL", "skip", "note"} and line.isprintable()
        for line in out.splitlines()
    )


def test_huge_and_odd_folders(tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    for i in range(foreign.MAX_ENTRIES + 5):
        (folder / f"z{i}.md").write_text("")
    (folder / "a/b/c/d/e/f/g").mkdir(parents=True)
    found = [f.what for f in findings(folder, "FAIL")]
    assert any("more than 500 files" in what for what in found)
    assert any("nested too deeply" in what for what in found)


# What took minutes, or gigabytes, in a pattern that is not linear or a list that nobody bounded.
SLOW: dict[str, Callable[[Folder], object]] = {
    "README of brackets": lambda f: setattr(f, "readme", f.readme + "<your " * 500_000),
    "README of digits": lambda f: setattr(f, "readme", f.readme + "1." + "0" * 900_000 + "a1"),
    "JSON of brackets": lambda f: f.meta.update(blurb="<your " * 150_000),
    "JSON of names": lambda f: f.meta.update(blurb="your" + "_" * 900_000 + "!a"),
    "JSON of fields": lambda f: f.meta.update(x=[{str(i): 1 for i in range(990)} for _ in range(80)]),
    "log of digits": lambda f: f.files.update(
        {"train_seed42.log": f.files["train_seed42.log"] + b"\nreserve\npeak memory allocated\ngptq " + b"1" * 500_000}
    ),
    "log of runs": lambda f: f.files.update(
        {
            "train_seed42.log": b"seed:1\nstep:1/2 train_loss:1.0\nfinal val_loss:2.0 val_bpb:1.2\n" * 31
            + b"x\n" * 900_000
        }
    ),
    "logs of all kinds": lambda f: f.files.update(
        {
            f"a{i}_seed{i % 3}.log": corpus.noprefix(
                corpus.Run(seed=i, source=f"x = {i}\n" + SCRIPT, settings=((f"lr{i}", i),)), dump=True
            ).encode()
            for i in range(480)
        }
    ),
    "script of adapters": lambda f: f.files.update(
        {"train_gpt.py": "".join(f"a{i}=f()\no=g(a{i}.parameters())\n" for i in range(3000)).encode()}
    ),
    "script of packages": lambda f: f.files.update({"train_gpt.py": b"import " + b"a." * 240_000 + b"a\n"}),
    "script that executes": lambda f: f.files.update(
        {"train_gpt.py": b"def f():\n" + b"    exec(open('README.md').read() + x)\n" * 9000}
    ),
    "script of statements": lambda f: f.files.update({"train_gpt.py": b"a=1\n" * 1_900_000}),
}


@pytest.mark.parametrize("name", SLOW)
def test_no_folder_takes_long(tmp_path, name):
    made = build("baseline", source="x = 1\n")
    SLOW[name](made)
    folder, start = made.write(tmp_path / "f"), time.process_time()
    check.check(folder)
    assert time.process_time() - start < 20


def test_logs_are_read_up_to_a_size(tmp_path, monkeypatch):
    made = build()
    sizes = [len(log) for log in made.logs().values()]
    monkeypatch.setattr(foreign, "MAX_LOG_BYTES", sizes[0] + sizes[1] + 10)
    found = findings(made.write(tmp_path / "f"), "FAIL")
    assert len([f for f in found if "not read, the logs have more than" in f.what]) == 1


def test_a_folder_that_may_not_be_read_is_said(tmp_path, monkeypatch):
    folder, scandir = build().write(tmp_path / "f"), os.scandir
    (folder / "closed").mkdir()

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert any("closed/: cannot be read" in f.what for f in findings(folder, "FAIL"))


KEYS = [
    "author",
    "date",
    "val_bpb",
    "val_loss",
    "seeds",
    "seed_results",
    "bytes_total",
    "compliance",
    "headline",
    "track",
]
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda part: (
        st.lists(part, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), part, max_size=4)
    ),
    max_leaves=8,
)


@given(
    meta=st.dictionaries(st.sampled_from([*KEYS, "bytes_code", "val_bpb_std", "github_id"]), ANY_JSON), readme=st.text()
)
@settings(max_examples=60, deadline=None)
def test_any_json_and_readme_are_judged_without_an_exception(tmp_path_factory, meta, readme):
    made = build("baseline", source="x = 1\n")
    made.meta |= meta
    made.readme = readme.encode("utf-8", "replace").decode()
    found = findings(made.write(tmp_path_factory.mktemp("any") / "f"))
    assert {f.check for f in found} - {"unsaid"} == set(check.CHECKS)
    assert all(f.what.isprintable() for f in found)


@given(st.floats(0.9, 1.3), st.floats(0.9, 1.3), st.floats(0.9, 1.3), st.integers(3, 8))
@settings(max_examples=50, deadline=None)
def test_a_mean_gives_its_rounding_and_no_other(a, b, c, digits):
    mean = check.Mean(statistics.fmean((a, b, c)), 3, check.EXACT_DIGITS)
    right = Decimal(f"{mean.value:.{digits}f}")
    assert mean.gives(right)
    assert not mean.gives(right + 2 * Decimal(10) ** -digits)


# -----------------------------------------------------------------------------
# Prose
# -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "On 2026-04-09 PR #1493 (1.0810) and #549 came, in 2026, with 8 GPUs.",
        "EMA decay 0.9965, lr 0.0250, beta 0.9500, softcap 30, warmdown 3,500, width 512, vocab 8192.",
        "The cap is 16,000,000 bytes; each clock has 600 s.",
        "Improves by 0.0052 nats over the baseline of 1.2244 bpb.",
        "See `final 1.23456` at https://a.b/1.23456 and [text](1.23456.md).",
        "torch 2.9.1, CUDA 12.8, Python 3.12.3",
        "```\nval 1.2345 MATRIX_LR=1.0345 torchrun x\n```",
        "| setting | value |\n|---|---|\n| MATRIX_LR | 0.02500 |\n| decay | 0.99650 |",
        "| PR | val_bpb |\n|---|---|\n| #1493 | 1.0810 |\n| baseline | 1.2244 |",
        "# Core\n## Ablation\n\n| variant | val_bpb |\n|---|---|\n| no EMA | 1.0913 |",
    ],
)
def test_prose_numbers_are_no_claims(line):
    assert list(claims.readme_claims(line, SEEDS)) == []


@pytest.mark.parametrize(
    "line, kind, value",
    [
        ("val_bpb 1.08100", "score", 1.081),
        ("**val_bpb: 1.0810 ± 0.0004**", "score", 1.081),
        ("The mean is 1.0810 BPB.", "score", 1.081),
        ("15,982,621 bytes", "size", 15_982_621),
        ("an artifact of 15.98 MB", "size", 15.98),
        ("trains 588.3 s", "time", 588.3),
        ("4,900 steps", "steps", 4900),
        ("| seed | val_bpb |\n|---|---|\n| 42 | **1.0812** |", "score", 1.0812),
    ],
)
def test_claims_are_read(line, kind, value):
    assert (kind, value) in {(claim.kind, claim.value) for claim in claims.readme_claims(line, SEEDS)}


# -----------------------------------------------------------------------------
# Command line, --run, --against
# -----------------------------------------------------------------------------


def main(*words: object) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    check.add_arguments(parser)
    return check.run(parser.parse_args([str(word) for word in words]))


def test_exit_codes_and_json(tmp_path, capsys):
    good = build().write(tmp_path / "good")
    made = build()
    made.meta["val_bpb"] = 1.0
    bad = made.write(tmp_path / "bad")
    assert main(good) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("pass ") for line in lines) and len(lines) >= len(check.CHECKS)
    (tmp_path / "README.md").write_text("of the track")
    assert main(tmp_path / "README.md", good) == 0
    assert capsys.readouterr().err == f"skipped: {tmp_path / 'README.md'} is no folder\n"
    assert main(good, bad, "--json") == 1
    said = json.loads(capsys.readouterr().out)
    assert said["failed"] and [folder["failed"] for folder in said["folders"]] == [False, True]
    assert {"check", "level", "what"} == set(said["folders"][1]["findings"][0])
    assert main(tmp_path / "none") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_output_survives_a_narrow_encoding(tmp_path, monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    made = build()
    made.meta["author"] = "TODO é"
    assert main(made.write(tmp_path / "f")) == 1


def test_run_prints_the_smoke_line(tmp_path):
    source = "class Hyperparameters:\n    model_dim, num_layers, vocab_size = 512, 11, 1024\n"
    folder = build(source=source).write(tmp_path / "f")
    found = check.check_run(folder)
    line = r"import OK in \d+\.\d\ds, dim=512, layers=11, vocab=1024, code=(\d+) B, SMOKE_TEST_PASS"
    assert int(re.fullmatch(line, found[-1].what)[1]) == len(source) and found[-1].level == "pass"


HOSTILE = {
    "missing module": ("import env_utils", "ModuleNotFoundError"),
    "exception": ("raise RuntimeError('\\x1b[2J')", "RuntimeError"),
    "exit": ("import sys; sys.exit(0)", "SystemExit"),
    "hard exit": ("import os; os._exit(0)", "ended with exit code 0"),
    "killed": ("import os; os.kill(os.getpid(), 9)", "SIGKILL"),
    "endless": ("while True: pass", "not imported after"),
    "memory": ("x = bytearray(2 << 30)", "MemoryError"),
    "files": ("import os; open('a', 'wb').write(b'0' * (1 << 27))", ""),
    "environment": ("import os; assert 'SECRET' in os.environ", "AssertionError"),
    "working folder": (f"import os; assert os.getcwd() == {os.getcwd()!r}", "AssertionError"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_run_holds_hostile_scripts(tmp_path, monkeypatch, name):
    monkeypatch.setenv("SECRET", "1")
    monkeypatch.setattr(smoke, "RUN_MEMORY", 1 << 30)
    monkeypatch.setattr(smoke, "RUN_SECONDS", 20 if name != "endless" else 2)
    source, words = HOSTILE[name]
    folder = build(source=source + "\n").write(tmp_path / "f")
    before = sorted(folder.rglob("*"))
    found = check.check_run(folder)
    assert found[-1].level == "FAIL" and words in found[-1].what and found[-1].what.isprintable()
    assert sorted(folder.rglob("*")) == before


def test_run_leaves_no_process_behind(tmp_path):
    """Also none that has left its group and its parent."""
    beat = tmp_path / "beat"
    source = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for _ in range(200):
            with open({str(beat)!r}, "a") as file:
                file.write(".")
            time.sleep(0.05)
    os._exit(0)
while not os.path.exists({str(beat)!r}):
    time.sleep(0.01)
"""
    found = check.check_run(build(source=source).write(tmp_path / "f"))
    if any("did not allow" in f.what for f in found):
        pytest.skip("the kernel does not allow namespaces of one's own")
    beats = beat.stat().st_size
    time.sleep(0.5)
    assert beat.stat().st_size <= beats + 1


def test_run_has_no_network(tmp_path):
    source = "import socket\nsocket.create_connection(('127.0.0.1', PORT), 2)\n"
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        text = source.replace("PORT", str(server.getsockname()[1]))
        found = check.check_run(build(source=text).write(tmp_path / "f"))
    if any("did not allow" in f.what for f in found):
        pytest.skip("the kernel does not allow network namespaces here")
    assert found[-1].level == "FAIL" and "OSError" in found[-1].what or "Network" in found[-1].what


@pytest.fixture
def repository(tmp_path):
    """A clone with a record, and a submission added to its working tree."""

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q", "-b", "main")
    (tmp_path / "train_gpt.py").write_text("x = 1\n")
    build().write(tmp_path / "records/track_10min_16mb/2026-04-01_Old")
    git("add", ".")
    git("commit", "-qm", "a")
    return tmp_path, git, build().write(tmp_path / "records/track_10min_16mb/2026-04-09_Core")


def against(folder: Path, ref: str = "main") -> set[str]:
    return {f.what for f in check.check_against(folder, ref) if f.level == "FAIL"}


def test_against_wants_one_new_folder(repository):
    root, git, folder = repository
    assert against(folder) == set()
    git("checkout", "-qb", "mine")
    git("add", ".")
    git("commit", "-qm", "b")
    assert against(folder) == set()
    (root / "train_gpt.py").write_text("x = 2\n")
    (root / "helper.py").write_text("")
    (root / "records/track_10min_16mb/2026-04-01_Old/README.md").unlink()
    (root / "records/track_10min_16mb/2026-04-02_Two").mkdir()
    (root / "records/track_10min_16mb/2026-04-02_Two/README.md").write_text("")
    said = " ".join(against(folder))
    for words in ("train_gpt.py is changed", "helper.py is added", "README.md is deleted", "2026-04-02_Two"):
        assert words in said
    old = root / "records/track_10min_16mb/2026-04-01_Old"
    assert any("is not new" in what or "was there before" in what for what in against(old))
    with pytest.raises(check.CheckError):
        against(folder, "--output=/tmp/x")


def test_against_names_files_that_git_would_leave_out(repository):
    root, _, folder = repository
    (root / ".git/info/exclude").write_text("*.log\n")
    assert {what.split(" ")[0] for what in against(folder)} == {
        f"records/track_10min_16mb/2026-04-09_Core/train_seed{seed}.log" for seed in SEEDS
    }


def test_against_ignores_what_came_later(repository):
    root, git, folder = repository
    git("checkout", "-qb", "mine")
    git("add", ".")
    git("commit", "-qm", "b")
    git("checkout", "-q", "main")
    (root / "train_gpt.py").write_text("x = 3\n")
    git("commit", "-qam", "c")
    git("checkout", "-q", "mine")
    assert against(folder) == set()


def test_the_hash_shown_is_the_file_s(tmp_path):
    sha = hashlib.sha256(SCRIPT.encode()).hexdigest()[:16]
    assert any(f.check == "source" and sha in f.what for f in findings(build().write(tmp_path / "f")))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(0.5, 4.0), min_size=1, max_size=5))
def test_a_mean_of_unrounded_scores_is_that_of_the_rounded_ones_in_the_log(scores):
    """Both are rounded to eight decimals: the mean of 2.038075090 and 2.037010203 is not that of what the logs show."""
    logged = [round(score, 8) for score in scores]
    mean = check.Mean(statistics.fmean(logged), len(logged), check.EXACT_DIGITS)
    claim = Decimal(f"{statistics.fmean(scores):.8f}")
    assert mean.gives(claim) and not mean.gives(claim + Decimal("0.00000003"))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "records").glob("track_*/*/submission.json")), ids=lambda p: p.parent.name
)
def test_a_record_of_this_repository_passes(path):
    found = findings(path.parent)
    assert [f for f in found if f.level == "FAIL"] == []
    assert {f.check for f in found if f.level == "warn"} <= {"json", "legality"}  # no account; LoRA's one forward
