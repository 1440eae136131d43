"""Experiments in pairs: the statistics against scipy and by simulation, the ledger, the runs and the pages."""

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY_ENV, clean_environ
from scipy import stats

from records import experiment
from records.experiments import ledger, noise, plan, proxy, report, runner, steptime

RECORDS = ROOT / "records"


# -----------------------------------------------------------------------------
# STATISTICS
# -----------------------------------------------------------------------------

SEEDS = (1, 2, 3)


def draw(random, arms: int, seeds: int, spreads: list[float], effect: float = 0.0) -> list[dict[int, float]]:
    """Differences of arms from a base of deviation 1; the first arm is better by `effect`."""
    base = random.normal(size=seeds)
    runs = random.normal(size=(arms, seeds)) * np.resize(spreads, arms)[:, None]
    runs[0] -= effect
    return [dict(enumerate((run - base).tolist())) for run in runs]


def found(draws: list[list[dict[int, float]]]) -> float:
    """Share of experiments in which the first arm gets a verdict."""
    return sum(noise.judge(arms[0], arms[1:]).p < noise.LEVEL for arms in draws) / len(draws)


@pytest.mark.parametrize("values", [[0.3, -1.0, 2.0], [5.0, 5.5], [-1.0, -2.0, -4.0, -1.5, 0.2]])
def test_an_arm_by_itself_is_a_paired_t_test(values):
    base = np.linspace(2.0, 2.1, len(values))
    judged = noise.judge(dict(enumerate(values)))
    test = stats.ttest_rel(base + values, base)
    interval = test.confidence_interval()
    assert judged.p == pytest.approx(test.pvalue)
    assert (judged.low, judged.high) == pytest.approx((interval.low, interval.high))
    assert judged.error == pytest.approx(stats.sem(values)) and judged.noise.source == "its own"


def test_one_seed_is_no_verdict_whatever_the_others_say():
    judged = noise.judge({1: -50.0}, [dict(zip(SEEDS, (0.1, 0.2, 0.3), strict=True))])
    assert (judged.n, judged.mean, judged.p, judged.low) == (1, -50.0, None, None)


def test_seeds_that_differ_by_the_same_are_certain_and_no_difference_is_none():
    assert noise.judge({1: 0.0, 2: 0.0}).p == 1.0 and noise.judge({1: -0.5, 2: -0.5}).p == 0.0


def test_holm_is_the_closed_test_of_bonferroni():
    """A hypothesis is rejected if every set of hypotheses that holds it is, by the smallest p times its size."""
    random = np.random.default_rng(1)
    for ps in random.uniform(0, 0.1, size=(50, 4)).tolist():
        for i, corrected in enumerate(noise.holm(ps)):
            sets = [[j for j in range(4) if bits >> j & 1] for bits in range(16) if bits >> i & 1]
            assert corrected == pytest.approx(min(1.0, max(len(s) * min(ps[j] for j in s) for s in sets)))
    assert noise.holm([]) == []


@pytest.mark.parametrize("shapes", [[3, 3, 3, 3], [5, 2, 3], [4]], ids=str)
def test_the_pool_is_worth_what_its_variance_says(shapes):
    """A chi-square of df degrees of freedom, over df, has the variance 2/df; arms share the base of their seeds."""
    random, n = np.random.default_rng(2), 20_000
    base, squares = random.normal(size=(n, max(shapes))), np.zeros(n)
    for seeds in shapes:
        d = random.normal(size=(n, seeds)) - base[:, :seeds]
        squares += ((d - d.mean(1, keepdims=True)) ** 2).sum(1)
    variance = (squares / (2 * sum(seeds - 1 for seeds in shapes))).var()
    df = noise.worth([dict.fromkeys(range(seeds), 0.0) for seeds in shapes])
    assert 2 / variance == pytest.approx(df, rel=0.06)
    assert df < sum(seeds - 1 for seeds in shapes) or len(shapes) == 1


def test_ten_thousand_null_experiments_keep_the_level():
    """Three seeds, four arms, no effect anywhere: any verdict at all among the four is false."""
    random, false, alone = np.random.default_rng(3), 0, 0
    for _ in range(10_000):
        arms = draw(random, 4, 3, [1.0])
        ps = [noise.judge(arm, arms[:i] + arms[i + 1 :]).p for i, arm in enumerate(arms)]
        false += min(noise.holm(ps)) < noise.LEVEL
        alone += ps[0] < noise.LEVEL
    assert 0.01 < alone / 10_000 <= noise.LEVEL, "of one arm"
    assert 0.01 < false / 10_000 <= noise.LEVEL, "of the family"


@pytest.mark.parametrize("times, stated", [(0.4, 0.05), (2.0, 0.08), (3.0, 0.09), (5.0, 0.085)])
def test_an_arm_that_changes_the_noise_stays_near_the_level(times, stated):
    random = np.random.default_rng(4)
    draws = [draw(random, 6, 3, [times, 1.0, 1.0, 1.0, 1.0, 1.0]) for _ in range(4000)]
    assert found(draws) <= stated + 0.0135  # three standard errors
    if times > 1:  # what the pool alone would say
        pools = [noise.pooled(arms) for arms in draws]
        means = [math.fsum(arms[0].values()) / 3 for arms in draws]
        limit = stats.t.isf(noise.LEVEL / 2, pools[0].df)
        assert np.mean([abs(m) * 3**0.5 / p.std > limit for m, p in zip(means, pools, strict=True)]) > 0.1


@pytest.mark.parametrize("others, effect", [(4, 4.0), (1, 3.0), (0, 3.0)])
def test_a_planted_effect_is_found_with_the_stated_power(others, effect):
    random = np.random.default_rng(5)
    pool = [dict.fromkeys(range(3), 0.0) for _ in range(others)]
    df, std = noise.worth(pool) if pool else 0.0, 2**0.5  # of a difference of two runs
    n = noise.seeds_to_settle(-effect, noise.Noise(std, df, ""), df)
    stated = noise.power(effect, std, n, df)
    assert noise.power(effect, std, n - 1, df) < noise.POWER <= stated if n > 2 else noise.POWER <= stated
    draws = []
    for _ in range(3000):
        arms = draw(random, others + 1, max(n, 3), [1.0], effect)
        draws.append([{seed: arms[0][seed] for seed in range(n)}, *({s: a[s] for s in range(3)} for a in arms[1:])])
    assert found(draws) == pytest.approx(stated, abs=0.035)
    assert noise.seeds_to_settle(1e-6, noise.Noise(std, df, ""), df) is None


def test_without_scipy_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(ledger.ExperimentError, match="needs scipy: pip install -r requirements-records.txt"):
        noise.judge({1: 0.0, 2: 1.0})


# -----------------------------------------------------------------------------
# LEDGERS MADE UP
# -----------------------------------------------------------------------------


def a_row(name: str, seed: int, bpb: float, base: dict | None = None, **changes) -> dict:
    """A finished run; the scores of a base are `bpb`."""
    given = {key: changes.pop(key) for key in list(changes) if not key.isupper()}
    row = dict(kind="run", recipe="r", name=name, axis="optimizer" if base else "", changes=changes)
    row |= dict(base=ledger.key(base) if base else "", settings=dict(ITERATIONS=100) | changes, script="a" * 64)
    row |= dict(data=["t", "v", "p"], machine="m", torch="2", threads=1, launch="", seed=seed)
    row |= dict(scores=dict(sliding_window=bpb + 0.003, legal_ttt=bpb), scored_bytes=100, steps=100)
    row |= dict(bytes=dict(code=1000, artifact=1_000_000), seconds=dict(train=60.0, evaluate=30.0))
    return row | given


def made_up(differences: dict[str, list[float]], **given) -> list[dict]:
    """A base and arms whose differences, in mbpb, are these."""
    rows = []
    for seed in range(max(map(len, differences.values()))):
        base = a_row("base", seed, 2.0 + 0.001 * seed)
        rows.append(base)
        for name, values in differences.items():
            if seed < len(values):
                setting = {"X_" + re.sub(r"\W", "_", name).upper(): "1"}
                rows.append(
                    a_row(name, seed, base["scores"]["legal_ttt"] + values[seed] / 1000, base, **setting, **given)
                )
    return rows


NOISY = {"good": [-9.0, -8.2, -8.6], "null": [0.4, -0.5, 0.2], "flat": [0.3, 0.1, -0.6], "once": [-30.0]}


def test_verdicts_are_the_statistics_of_the_ledger():
    said = report.verdicts(made_up(NOISY), "r")
    arms = {name: dict(enumerate(values)) for name, values in NOISY.items() if len(values) > 1}
    for name in arms:
        judged = noise.judge(arms[name], [arm for other, arm in arms.items() if other != name])
        assert said[name]["difference_mbpb"] == pytest.approx(judged.mean, rel=1e-3)
        assert said[name]["p"] == pytest.approx(judged.p, rel=1e-3)
        assert said[name]["interval_mbpb"] == pytest.approx([judged.low, judged.high], rel=1e-3)
        assert said[name]["arms_corrected_for"] == 3
    assert {name: v["verdict"] for name, v in said.items()} == dict(
        good="better", null="undecided", flat="undecided", once="one seed"
    )
    assert said["once"]["seeds_to_settle"] == 2 and said["once"]["p"] is None
    worse = report.verdicts(made_up({"bad": [9.0, 8.2, 8.6], "null": NOISY["null"]}), "r")
    assert worse["bad"]["verdict"] == "worse"


def test_an_arm_that_only_evaluates_is_judged_by_its_own_noise():
    rows = made_up(NOISY) + made_up({"ttt": [-0.2, -0.21, -0.19]}, axis="evaluation")
    said = report.verdicts(rows, "r")
    assert said["ttt"]["noise_of"] == "its own" and said["ttt"]["noise_df"] == 2
    without = report.verdicts(made_up(NOISY), "r")
    for name in ("good", "null", "flat"):
        assert said[name]["noise_of"] == without[name]["noise_of"] and said[name]["p"] == without[name]["p"], "no pool"


def test_bytes_and_time_are_paid_for_at_the_rates_of_the_base():
    rows = made_up(NOISY)
    bases = [row for row in rows if row["name"] == "base"]
    for base in bases:
        bpb = base["scores"]["legal_ttt"]
        rows.append(a_row("shorter", base["seed"], bpb + 0.010, base, ITERATIONS="80", steps=80))
        fewer = dict(code=1000, artifact=900_000)
        rows.append(a_row("int5", base["seed"], bpb + 0.002, base, MLP_BITS="5", axis="quantization", bytes=fewer))
        larger = dict(code=1000, artifact=1_050_000)
        rows.append(a_row("large", base["seed"], bpb - 0.004, base, X="1", axis="model", bytes=larger))
    rows.append(dict(rows[-1], kind="time", base_ms=[100.0, 100.0, 100.0], arm_ms=[110.0, 111.0, 109.0], others=0.0))
    assert report.verdicts(rows, "r")["int5"]["at_equal_bytes_mbpb"] is None, "the rate is its own"
    said = report.verdicts(rows, "r")["large"]
    assert said["at_equal_bytes_mbpb"] == pytest.approx(-4 + 0.5 * 2.0)
    assert said["step_time_ratio"] == 1.1 and said["at_equal_time_mbpb"] == pytest.approx(-4 + 10 * 0.5)
    assert "one percent of the steps less costs 0.50 mbpb" in report.table(rows, "r")
    assert report.verdicts(made_up(NOISY), "r")["good"]["at_equal_bytes_mbpb"] is None


def test_scripts_whose_bases_score_the_same_are_one():
    rows = made_up({"good": [-9.0]})
    for seed, base in ((0, rows[0]), (7, a_row("base", 7, 2.05, script="b" * 64))):
        again = dict(base, script="b" * 64)
        rows += [again, a_row("good", seed, again["scores"]["legal_ttt"] - 0.0088, again, X_GOOD="1", script="b" * 64)]
    assert report.verdicts(rows, "r")["good"]["seeds"] == [0, 7]
    (group,) = ledger.floors(rows, "r")
    assert set(group) == {0, 7}
    rows[2] = dict(rows[2], scores=dict(sliding_window=2.0, legal_ttt=2.1))
    assert len(ledger.floors(rows, "r")) == 2


def test_without_a_pool_seeds_are_planned_with_the_unpaired_noise():
    rows = made_up({"once": [-9.0]}) + [a_row("base", seed, 2.0 + 0.002 * seed) for seed in (1, 2)]
    said = report.verdicts(rows, "r")["once"]
    assert said["verdict"] == "one seed" and said["noise_mbpb"] is None
    spread = noise.Noise(2.0 * 2**0.5, 2.0, "")
    assert said["seeds_to_settle"] == noise.seeds_to_settle(-9.0, spread, 0.0, noise.LEVEL)
    assert "reckoned with 2.83 mbpb" in report.table(rows, "r")


def test_another_text_is_not_compared():
    rows = made_up({"data": [-9.0, -9.5]}, scored_bytes=99)
    assert report.verdicts(rows, "r") == {}


def test_why_says_everything_on_one_arm():
    rows = made_up(NOISY)
    failed = {name: value for name, value in rows[1].items() if name not in ("scores", "seconds", "bytes", "steps")}
    text = report.why([*rows, dict(failed, seed=9, failed="limit: not finite")], "r", "good")
    for said in ("verdict on legal_ttt: better", "seed 2, script aaaaaaaaaaaa", "X_GOOD=1", "-9.00 mbpb", "not finite"):
        assert said in text
    with pytest.raises(ledger.ExperimentError, match="no arm 'bad' of r; there are good, null, flat, once"):
        report.why(rows, "r", "bad")


# -----------------------------------------------------------------------------
# THE LEDGER
# -----------------------------------------------------------------------------


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(map(ledger.seal, rows)), "utf-8")
    return path


def test_an_edited_line_is_named(tmp_path, capsys):
    path = write(tmp_path / "l.jsonl", made_up(NOISY))
    lines = path.read_text("utf-8").splitlines(keepends=True)
    for edited, said in (
        (lines[1].replace("1.991", "1.981"), r"l.jsonl:2 \(r good 0\) was edited"),
        (lines[1][:50] + "\n", "l.jsonl:2 is no line of a ledger"),
        ("[1]\n", "l.jsonl:2 is no line of a ledger"),
    ):
        path.write_text("".join([lines[0], edited, *lines[2:]]), "utf-8")
        assert experiment.main(["table", "--ledger", str(path)]) == 2
        assert re.search("^error: " + said, capsys.readouterr().err)


def test_a_line_that_a_crash_cut_short_is_no_row_and_goes(tmp_path):
    rows = made_up(NOISY)
    path = write(tmp_path / "l.jsonl", rows[:2])
    whole = path.read_bytes()
    path.write_bytes(whole + ledger.seal(rows[2]).encode()[:70])
    assert ledger.read(path) == rows[:2]
    assert ledger.append(path, rows[2]) and path.read_bytes() == whole + ledger.seal(rows[2]).encode()
    path.write_bytes(path.read_bytes()[:-1])  # an editor took the last newline
    assert ledger.read(path) == rows[:3]
    assert ledger.append(path, rows[3]) and ledger.read(path) == rows[:4]
    assert not ledger.append(path, rows[3]), "an experiment is written down once"


def test_two_branches_of_a_ledger_merge(tmp_path):
    rows = made_up(NOISY)
    place = tmp_path / "records" / "ledger.jsonl"
    place.parent.mkdir()
    shutil.copy(ROOT / ".gitattributes", tmp_path)

    def git(*words: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    def commit(rows: list[dict], message: str) -> None:
        write(place, rows)
        git("add", ".")
        git("commit", "-m", message)

    git("init")
    commit(rows[:2], "before")
    git("checkout", "-b", "other")
    commit([*rows[:2], rows[2]], "one")
    git("checkout", "main")
    commit([*rows[:2], rows[3], rows[2]], "two, one of them the same")
    git("merge", "other", "-m", "both")
    assert sorted(row["name"] for row in ledger.read(place)) == sorted(row["name"] for row in rows[:4])


def test_who_writes_waits_for_another(tmp_path):
    path, row = tmp_path / "l.jsonl", a_row("base", 1, 2.0)
    command = [sys.executable, "-c", APPEND, str(ROOT), str(path)]
    with path.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        writer.stdin.write(json.dumps([row]))
        writer.stdin.close()
        assert writer.stdout.readline() == "writing\n"
        time.sleep(0.3)
        assert path.read_text() == ""
    assert writer.wait() == 0 and ledger.read(path) == [row]
    writer.stdout.close()


APPEND = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from records.experiments import ledger
rows = json.load(sys.stdin)
print("writing", flush=True)
for row in rows:
    ledger.append(Path(sys.argv[2]), row)
"""


def test_two_processes_on_one_ledger(tmp_path):
    path = tmp_path / "l.jsonl"
    rows = [a_row("base", seed, 2.0 + seed) for seed in range(60)]
    command = [sys.executable, "-c", APPEND, str(ROOT), str(path)]
    quiet = subprocess.DEVNULL
    writers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, text=True) for _ in range(2)]
    for writer, own in zip(writers, (rows[:40], rows[20:]), strict=True):
        writer.stdin.write(json.dumps(own))
        writer.stdin.close()
    assert [writer.wait() for writer in writers] == [0, 0]
    assert sorted(row["seed"] for row in ledger.read(path)) == list(range(60))
    assert path.read_text("utf-8").count("\n") == 60


# -----------------------------------------------------------------------------
# RUNS, of a script that has nothing of train_gpt.py but its manners
# -----------------------------------------------------------------------------

SCRIPT = """
import dataclasses, hashlib, json, os, sys, time
from pathlib import Path

class UserError(Exception):
    pass

def opt(section, default):
    return dataclasses.field(default=default, metadata=dict(section=section))

@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    data_path: str = opt("run", "data")
    tokenizer_path: str = opt("run", "")
    seed: int = opt("run", 1337)
    vocab_size: int = opt("model", 1024)
    width: float = opt("model", 1.0)
    matrix_lr: float = opt("training", 1.0)
    iterations: int = opt("training", 4)
    mlp_bits: int = opt("quantization", 6)
    ttt_lr: float = opt("evaluation", 1.0)
    end: str = opt("training", "")
    hold: float = opt("training", 0.0)
    step_ms: float = opt("training", 10.0)

    @classmethod
    def from_env(cls, environ):
        fields = {f.name: f for f in dataclasses.fields(cls)}
        if "WIDHT" in environ:
            raise UserError("unknown setting WIDHT; did you mean WIDTH?")
        return cls(**{n: type(f.default)(environ[n.upper()]) for n, f in fields.items() if n.upper() in environ})

    def changed(self):
        return {f.name.upper(): v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) != f.default}

def find_shards(hp, split):
    return [Path(hp.data_path) / split]

def data_fingerprint(paths):
    return hashlib.sha256(str(paths[0].read_bytes()).encode()).hexdigest()

class Validation:
    fingerprint, tokenizer_sha256 = "v" * 64, "t" * 64

def load_validation(hp):
    if not Path(hp.data_path).is_dir():
        raise UserError(f"no shards in DATA_PATH={hp.data_path}")
    return Validation

def main(hp, environ):
    out, name = Path(environ["OUT_DIR"]), environ["RUN_ID"]
    folder = out / "runs" / name
    log = out / "logs" / f"{name}.txt"
    if log.exists():
        sys.exit("error: has a log already")
    for path in (folder, log.parent):
        path.mkdir(parents=True, exist_ok=True)
    with open(out / "ran", "a") as file:
        file.write(name + "\\n")
    exported = environ.get("EXPORT_ONLY") == "1"
    if exported:
        assert Path(environ["WEIGHTS_PATH"]).read_text() == str(hp.seed), "weights of another seed"
    print("threads", environ["OMP_NUM_THREADS"])
    log.write_text("")
    for step in range(hp.iterations):
        print(f"step:{step + 1}/{hp.iterations} train_loss:1 train_time:{hp.step_ms * (step + 1):.0f}ms", flush=True)
    gate = Path(hp.data_path) / f"gate{hp.seed}"
    while hp.hold and gate.exists():
        time.sleep(0.02)
    if hp.end == "crash" and hp.seed == 42:
        raise RuntimeError("boom")
    if hp.end == "refuse":
        print("error: WIDTH=2 cannot be", file=sys.stderr)
        sys.exit(2)
    if hp.end == "limit":
        print("limit: the loss is not finite")
        sys.exit(3)
    bpb = 2 + hp.seed / 1e6 - 0.01 * (hp.width - 1) - 0.02 * (hp.matrix_lr - 1) + 0.001 * hp.ttt_lr
    if environ.get("SAVE_WEIGHTS") == "1":
        (folder / "weights.pgolf").write_text(str(hp.seed))
    score = lambda x: dict(val_bpb=x, bytes=1000)
    result = dict(scores=dict(float_ema=score(bpb), final_int6_roundtrip=score(bpb), legal_ttt=score(bpb - 0.001)),
        seed=hp.seed, code_sha256=hashlib.sha256(Path(__file__).read_bytes()).hexdigest(), steps=hp.iterations,
        train_seconds=60.0, eval_seconds=60.0, bytes_code=1, bytes_artifact=1000 * hp.mlp_bits, device="cpu",
        dtype="fp32")
    (folder / "result.partial").write_text(json.dumps(result))
    (folder / "result.partial").rename(folder / "result.json")

if __name__ == "__main__":
    main(Hyperparameters.from_env(os.environ), os.environ)
"""


class Bench:
    """A folder with the script, a recipe, data and a ledger."""

    def __init__(self, folder: Path):
        self.folder, self.ledger, self.out, self.begun = folder, folder / "ledger.jsonl", folder / "out", []
        (folder / "script.py").write_text(SCRIPT, "utf-8")
        (folder / "small.env").write_text("# small\nITERATIONS=5\n", "utf-8")
        (folder / "data").mkdir()
        (folder / "data" / "train").write_text("text")

    def argv(self, *words: str, script: str = "", command: str = "run") -> list[str]:
        common = ["--data", str(self.folder / "data"), "--out", str(self.out), "--ledger", str(self.ledger)]
        script = script or str(self.folder / "script.py")
        return [command, str(self.folder / "small.env"), *words, *common, "--script", script]

    def run(self, *words: str, **named) -> int:
        return experiment.main(self.argv(*words, **named))

    def process(self, *words: str) -> subprocess.Popen:
        command = [sys.executable, str(RECORDS / "experiment.py"), *self.argv(*words)]
        begun = subprocess.Popen(
            command, env=clean_environ(), stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self.begun.append(begun.pid)
        return begun

    def ran(self) -> list[str]:
        """Names of the runs that were begun, without their keys."""
        path = self.out / "ran"
        return [line.rpartition("-")[0] for line in path.read_text("utf-8").split()] if path.exists() else []

    def rows(self) -> list[tuple[str, int]]:
        return [(row["name"], row["seed"]) for row in ledger.read(self.ledger)]

    def wait_for(self, runs: int) -> None:
        deadline = time.monotonic() + 60
        while len(self.ran()) < runs:
            assert time.monotonic() < deadline, "no run began"
            time.sleep(0.02)

    def gate(self, seed: int) -> Path:
        """Runs with HOLD=1 and this seed last until the file is gone."""
        path = self.folder / "data" / f"gate{seed}"
        path.write_text("")
        return path


@pytest.fixture
def bench(tmp_path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    for group in bench.begun:  # what a failed test left, runs included
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def test_seeds_are_the_same_for_all_arms_and_interleaved_and_nothing_runs_twice(bench, capsys):
    arms = ["wide: WIDTH=2", "bits: MLP_BITS=5", "TTT_LR=0"]
    assert bench.run(*arms, "--seeds", "2") == 0
    names = ["base", "wide", "bits", "TTT_LR=0"]
    assert bench.rows() == [(name, seed) for seed in (1337, 42) for name in names]
    assert "8 runs to make, 0 in the ledger already" in capsys.readouterr().out
    assert bench.run(*arms, "--seeds", "1337,42,7", "--jobs", "3") == 0
    assert "4 runs to make, 8 in the ledger already" in capsys.readouterr().out
    assert len(bench.ran()) == len(set(bench.ran())) == 12
    said = report.verdicts(ledger.read(bench.ledger), "small")
    assert {name: (v["axis"], len(v["seeds"])) for name, v in said.items()} == {
        "wide": ("model", 3), "bits": ("quantization", 3), "TTT_LR=0": ("evaluation", 3)
    }  # fmt: skip
    assert said["wide"]["difference_mbpb"] == -10 and said["bits"]["bytes"] == -1000
    rows = {row["name"]: row for row in ledger.read(bench.ledger)}
    assert rows["bits"]["settings"] == dict(ITERATIONS=5, MLP_BITS=5, EXPORT_ONLY=True)
    assert rows["wide"]["settings"] == dict(ITERATIONS=5, WIDTH=2.0) and rows["wide"]["changes"] == dict(WIDTH="2")


def test_the_time_left_is_that_of_runs_like_it(bench, capsys):
    assert bench.run("--seeds", "1") == 0
    capsys.readouterr()
    assert bench.run("wide: WIDTH=2", "--seeds", "3") == 0
    said = capsys.readouterr().out
    assert "5 runs to make, 1 in the ledger already; about 10 min left" in said
    assert re.search(r"wide seed 1337: ema:.*; about 8 min left", said)


def test_progress_is_said_while_runs_go_on(bench, capsys, monkeypatch):
    monkeypatch.setattr(runner, "REPORT_EVERY", 0.0)
    assert bench.run("--seeds", "1") == 0  # 60 s of training, 60 s of evaluation
    gate = bench.gate(42)
    (bench.folder / "small.env").write_text("ITERATIONS=5\nHOLD=1\n")
    assert bench.run("--seeds", "1") == 0
    said, clock = runner.Runner.progress, time.monotonic

    def progress(self):
        if "base seed 42" not in said(self):
            return said(self)
        log = self.out / "logs" / f"{self.plan.jobs[0].run_id}.txt"
        log.write_text("step:2/5 train_loss:1\n")
        with monkeypatch.context() as patch:  # 48 s for 2 of 5 steps: twice what it took before
            patch.setattr(time, "monotonic", lambda: clock() + 48)
            line = said(self)
        gate.unlink(missing_ok=True)
        return line

    monkeypatch.setattr(runner.Runner, "progress", progress)
    assert bench.run("wide: WIDTH=2", "--seeds", "42,") == 0
    assert re.search(
        r"running base seed 42 [01]\.\d min step 2/5; 1 waiting; about [78] min left", capsys.readouterr().out
    )


def test_what_is_wrong_is_said_before_the_first_run(bench, capsys):
    for words, said in (
        (["a: WIDHT=2"], "a: unknown setting WIDHT; did you mean WIDTH?"),
        (["a: DEPTH=2"], "a: DEPTH is no setting of the script"),
        (["a: WIDTH=1"], "a: nothing differs from the base"),
        (["a: WIDTH=2", "a: WIDTH=3"], "two arms are called 'a'"),
        (["a: WIDTH"], "a: WIDTH: 'WIDTH' is no NAME=value"),
        (["base: WIDTH=2"], "'base: WIDTH=2' is no arm"),
        (["a:"], "a: nothing differs from the base"),
        ([""], "'' is no arm"),
        (["a: WIDTH=2", "--seeds", "0"], "--seeds 0: give a number from 1 to"),
        (["a: WIDTH=2", "--seeds", "7,7"], "--seeds 7,7"),
        (["a: WIDTH=2", "--against", "nowhere"], "nowhere is neither a file nor a commit"),
        (["a: WIDTH=2", "--data", "nowhere"], "base: no shards in DATA_PATH="),
    ):
        argv = bench.argv(
            *[word for word in words if word not in ("--data", "nowhere")] if "--data" in words else words
        )
        if "--data" in words:
            argv[argv.index("--data") + 1] = "nowhere"
        assert experiment.main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {said}") and error.count("\n") == 1
    assert bench.ran() == []
    for argv in (
        ["run"],
        bench.argv("--jobs", "0"),
        bench.argv("--axis", "luck"),
        bench.argv("--rounds", "1", command="time"),
    ):
        with pytest.raises(SystemExit) as end:
            experiment.main(argv)
        assert end.value.code == 2 and re.fullmatch("error: .*\n", capsys.readouterr().err)


def test_a_script_that_fails_in_one_arm_leaves_the_others(bench, capsys):
    arms = ["crash: END=crash", "refused: END=refuse", "limit: END=limit", "wide: WIDTH=2"]
    assert bench.run(*arms, "--seeds", "3") == 1
    said = capsys.readouterr().out
    assert "FAILED crash seed 42: exit code 1: " in said and "boom" in said
    assert said.count("FAILED refused") == 1 and "exit code 2: error: WIDTH=2 cannot be" in said
    assert [name for name, _ in bench.rows()].count("wide") == 3
    assert [seed for name, seed in bench.rows() if name == "crash"] == [1337, 2025]
    failed = [row for row in ledger.read(bench.ledger) if row["name"] == "limit"]
    assert [row["failed"] for row in failed] == ["limit: the loss is not finite"] * 3, "a result, and not tried again"
    before = bench.ran()
    assert bench.run(*arms, "--seeds", "3") == 1
    again = [name for name in bench.ran()[len(before) :]]
    assert sorted(again) == ["small-crash-42", "small-refused-1337"]


def test_a_ledger_that_cannot_be_written_ends_it_and_loses_no_run(bench, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "ledger.jsonl")

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "append", full)
        assert bench.run("--seeds", "2") == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'ledger.jsonl'\n"
    assert bench.run("--seeds", "2") == 0
    assert bench.ran() == ["small-base-1337", "small-base-42"] and len(bench.rows()) == 2


def test_the_shells_settings_do_not_enter(bench, monkeypatch):
    monkeypatch.setenv("WIDTH", "9")
    assert bench.run("--seeds", "1") == 0
    (row,) = ledger.read(bench.ledger)
    assert row["scores"]["ema"] == pytest.approx(2 + 1337 / 1e6 + 0.001)


def test_weights_that_are_gone_are_made_again_and_not_written_down_twice(bench):
    assert bench.run("--seeds", "1") == 0
    shutil.rmtree(bench.out)
    assert bench.run("bits: MLP_BITS=5", "--seeds", "1") == 0
    assert bench.ran() == ["small-base-1337", "small-bits-1337"] and len(bench.rows()) == 2


def test_one_experiment_has_one_name(bench, capsys):
    assert bench.run("wide: WIDTH=2", "--seeds", "1") == 0
    assert bench.run("broad: WIDTH=2", "--seeds", "1") == 2
    assert "error: broad is 'wide' in the ledger" in capsys.readouterr().err


def test_other_training_text_is_an_arm(bench):
    (bench.folder / "more").mkdir()
    (bench.folder / "more" / "train").write_text("more text")
    assert bench.run(f"more: DATA_PATH={bench.folder / 'more'}", "--seeds", "1") == 0
    base, arm = ledger.read(bench.ledger)
    assert (arm["axis"], arm["changes"], arm["settings"]) == ("data", dict(DATA_PATH="more"), base["settings"])
    assert arm["data"][0] != base["data"][0] and arm["data"][1:] == base["data"][1:]


def test_another_script_is_an_arm(bench, capsys):
    new = bench.folder / "new.py"
    new.write_text(SCRIPT.replace("bpb = 2 +", "bpb = 1.99 +"), "utf-8")
    against = ["--against", str(bench.folder / "script.py")]
    assert experiment.main([*bench.argv("--seeds", "2", script=str(new)), *against]) == 0
    new.write_text(SCRIPT.replace("bpb = 2 +", "bpb = 1.98 +"), "utf-8")
    named = bench.argv("an idea:", "and wide: WIDTH=2", "--seeds", "2", script=str(new))
    assert experiment.main([*named, *against, "--axis", "optimizer"]) == 0
    said = report.verdicts(ledger.read(bench.ledger), "small")
    assert {name: (v["axis"], round(v["difference_mbpb"], 6)) for name, v in said.items()} == {
        "script new.py": ("script", -10), "an idea": ("optimizer", -20), "and wide": ("optimizer", -30)
    }  # fmt: skip
    assert bench.rows().count(("base", 42)) == 1


def test_a_script_that_repeats_another_takes_over_its_base(bench, capsys):
    assert bench.run("--seeds", "2") == 0
    edited = bench.folder / "edited.py"
    edited.write_text(SCRIPT + "# a comment\n", "utf-8")
    assert bench.run("--seeds", "1337,", script=str(edited)) == 0
    assert bench.run("wide: WIDTH=2", "--seeds", "2", script=str(edited)) == 0
    assert bench.rows() == [("base", 1337), ("base", 42), ("base", 1337), ("wide", 1337), ("wide", 42)]
    assert report.verdicts(ledger.read(bench.ledger), "small")["wide"]["seeds"] == [42, 1337]


def test_a_commit_is_a_script(tmp_path):
    path = plan.fetch_script("HEAD", tmp_path)
    shown = subprocess.run(["git", "-C", ROOT, "show", "HEAD:train_gpt.py"], capture_output=True, check=True).stdout
    assert path.read_bytes() == shown


def test_two_processes_may_keep_the_same_script_at_once(bench, monkeypatch):
    replace, script = Path.replace, str(bench.folder / "script.py")

    def between(path: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", replace)
        monkeypatch.setattr(os, "getpid", lambda: 1)
        plan.fetch_script(script, bench.out)  # the other one, from start to end
        return path.replace(target)

    monkeypatch.setattr(Path, "replace", between)
    assert plan.fetch_script(script, bench.out).read_text("utf-8") == SCRIPT
    assert len(list((bench.out / "scripts").iterdir())) == 1


@pytest.mark.parametrize("child_dies", [False, True], ids=["the tool alone", "with its run"])
def test_kill_9_loses_one_run_at_most(child_dies, bench):
    (bench.folder / "small.env").write_text("ITERATIONS=5\nHOLD=1\n")
    gate = bench.gate(42)
    arms = ["wide: WIDTH=2", "--seeds", "2"]
    first = bench.process(*arms)
    bench.wait_for(3)  # base and wide of the first seed, and the base of the second, which waits
    if child_dies:
        os.killpg(first.pid, signal.SIGKILL)
    else:
        os.kill(first.pid, signal.SIGKILL)
    first.wait()
    first.stdout.close()
    assert bench.rows() == [("base", 1337), ("wide", 1337)]
    second = bench.process(*arms)
    assert "2 runs to make" in second.stdout.readline()
    if child_dies:
        bench.wait_for(4)
    else:
        time.sleep(1)  # in which it must not begin what still runs
    gate.unlink()
    said = second.communicate(timeout=120)[0]
    assert second.returncode == 0 and "wide seed 42: ema:" in said
    assert sorted(bench.rows()) == sorted((name, seed) for seed in (1337, 42) for name in ("base", "wide"))
    expected = ["small-base-1337", "small-base-42", "small-wide-1337", "small-wide-42"]
    assert sorted(bench.ran()) == sorted(expected + ["small-base-42"] * child_dies), "what went on is taken as it is"


def test_two_processes_share_the_work(bench):
    (bench.folder / "small.env").write_text("ITERATIONS=5\nHOLD=1\n")
    gate = bench.gate(1337)
    arms = ["wide: WIDTH=2", "bits: MLP_BITS=5", "--seeds", "2"]
    both = [bench.process(*arms) for _ in range(2)]
    bench.wait_for(2)
    gate.unlink()
    for process in both:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert len(bench.ran()) == len(set(bench.ran())) == 6
    assert len(bench.ledger.read_text("utf-8").splitlines()) == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_stops_its_runs_and_goes_on_later(number, bench):
    (bench.folder / "small.env").write_text("ITERATIONS=5\nHOLD=1\n")
    gate = bench.gate(42)
    first = bench.process("--seeds", "2")
    bench.wait_for(2)
    os.kill(first.pid, number)
    said = first.communicate(timeout=60)[0]
    assert first.returncode == 130 and "start the same command again" in said
    with pytest.raises(ProcessLookupError):
        os.killpg(first.pid, 0)
    gate.unlink()
    assert bench.run("--seeds", "2") == 0 and bench.rows() == [("base", 1337), ("base", 42)]


def test_step_time_is_a_ratio_of_runs_that_were_alone(bench, monkeypatch, capsys):
    arms = ["slow: STEP_MS=12", "--rounds", "2"]
    clock = [0.0]

    def busy() -> float:
        clock[0] += 100.0  # somebody else
        return clock[0]

    monkeypatch.setattr(steptime, "busy_seconds", busy)
    assert bench.run(*arms, command="time") == 2
    assert "not alone" in capsys.readouterr().err and bench.rows() == []
    monkeypatch.setattr(steptime, "busy_seconds", lambda: 0.0)
    assert bench.run(*arms, command="time") == 0
    (row,) = ledger.read(bench.ledger)
    assert (row["kind"], row["base_ms"], row["arm_ms"], row["others"]) == ("time", [10.0, 10.0], [12.0, 12.0], 0.0)
    assert "x 1.2000 of the base's step" in capsys.readouterr().out
    assert bench.run("bits: MLP_BITS=5", command="time") == 2
    assert "does not train" in capsys.readouterr().err
    assert bench.run("slow: STEP_MS=12", "--seeds", "2") == 0
    assert report.verdicts(ledger.read(bench.ledger), "small")["slow"]["step_time_ratio"] == 1.2


def test_busy_seconds_count_work():
    before, own = steptime.busy_seconds(), time.process_time()
    if before is None:
        pytest.skip("this system does not say what its processors did")
    while time.process_time() < own + 0.3:
        pass
    assert steptime.busy_seconds() - before > 0.2


# -----------------------------------------------------------------------------
# WHAT IS IN THIS REPOSITORY
# -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["RESULTS.md", "PROXY.md"])
def test_the_pages_hold_what_the_ledger_says(name):
    rows = ledger.read(RECORDS / "ledger.jsonl")
    page = (RECORDS / name).read_text("utf-8")
    for marker, text in experiment.pages(rows)[RECORDS / name].items():
        shown = re.search(rf"<!-- {marker}:begin -->\n(.*?)<!-- {marker}:end -->", page, re.DOTALL)
        assert shown and shown[1].strip() == text.strip(), "python records/experiment.py table --write"


def test_published_effects_are_whole_and_name_arms_of_the_ledger():
    arms = {row["name"] for row in ledger.read(RECORDS / "ledger.jsonl")}
    for row in proxy.read_published(RECORDS / "published.json"):
        assert row["low"] <= row["effect_mbpb"] <= row["high"] and row["evidence"] in proxy.EVIDENCE
        assert row["links"] and all(re.fullmatch(r"https://github\.com/\S+/pull/\d+", link) for link in row["links"])
        assert row["here"] is None or row["here"]["arm"] in arms


def test_signs_are_those_of_adding_the_technique():
    published = dict(
        technique="t", effect_mbpb=-2.0, low=-3.0, high=-1.0, evidence="claim", source="s", links=[], note=""
    )
    rows, said = made_up(NOISY), report.verdicts(made_up(NOISY), "r")
    for here, mean, word, same in (
        (dict(arm="good"), -8.6, "better", "yes"),
        (dict(arm="good", removes=True), 8.6, "worse", "**no**"),
        (dict(arm="base", score="sliding_window", of_base="legal_ttt"), 3.0, "worse", "**no**"),
        (dict(arm="good", score="legal_ttt", of_base="sliding_window"), -11.6, "better", "yes"),
    ):
        effect = proxy.effect_here(rows, "r", here, said)
        assert effect.judged.mean == pytest.approx(mean, abs=1e-6) and effect.verdict == word
        assert proxy.agreement(published | dict(here=here), effect) == same
    assert proxy.effect_here(rows, "r", dict(arm="nothing"), said) is None
    page = proxy.page(rows, "r", [published | dict(here=dict(arm="good")), published | dict(here=None)])
    assert "the sign agrees in 1 of 1" in page and "not measured here yet" in page


def test_the_loop_of_the_page_for_programs_works(tiny_data, tmp_path):
    """AGENTS.md alone: propose a setting, run it, read the verdict; here with a tiny base."""
    tiny = TINY_ENV | dict(ITERATIONS="4", WARMDOWN_ITERS="2", VAL_LOSS_EVERY="0", TTT_ENABLED="0", EVAL_STRIDE="0")
    (tmp_path / "tiny.env").write_text("# tiny\n" + "".join(f"{k}={v}\n" for k, v in tiny.items()), "utf-8")
    (loop,) = re.findall(r"```python\n(.*?)```", (ROOT / "AGENTS.md").read_text("utf-8"), re.DOTALL)
    given = dict(BASE=str(tmp_path / "tiny.env"), DATA=str(tiny_data), OUT=str(tmp_path / "out"), PAIRS="2")
    given |= dict(LEDGER=str(tmp_path / "ledger.jsonl"), PROPOSALS="MATRIX_LR=0.05")

    ran = subprocess.run(
        [sys.executable, "-c", loop], cwd=ROOT, env=clean_environ(**given), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    verdict = json.loads(ran.stdout.splitlines()[-1])
    assert verdict["arm"] == "MATRIX_LR=0.05" and verdict["seeds"] == [42, 1337] and verdict["axis"] == "optimizer"
    assert verdict["verdict"] in ("better", "worse", "undecided") and verdict["difference_mbpb"] != 0
    assert len((tmp_path / "ledger.jsonl").read_text("utf-8").splitlines()) == 4
