#!/usr/bin/env python3
"""Where the time of a run goes, and whether a change made it faster.

    python tests/bench.py                                   the phases of this train_gpt.py, one by one
    python tests/bench.py --against HEAD                    this train_gpt.py and that of a commit (or a file), in turn
    torchrun --nproc_per_node=8 tests/bench.py              the phases with what ranks tell each other

A setting in the environment counts more than the recipe. Ratios are a result only where nothing else ran meanwhile.
Exit code: 0 done, 2 unusable input or a machine that was not idle, said in one line.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # behind what is there: the battery tries other scripts

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from gpu_battery import write_shard  # noqa: E402
from helpers import Lines, make_run  # noqa: E402

import train_gpt as pg  # noqa: E402
from records.experiments.ledger import ExperimentError  # noqa: E402
from records.experiments.plan import fetch_script, read_recipe  # noqa: E402
from records.experiments.steptime import ALONE, STEPS, Load  # noqa: E402

WARM_UP_STEPS = 2
CHUNKS = 2  # that test-time training gets: it learns from all but the last
AGREEING = 6  # pairs that all have to say the same: by chance they do once in 32 times


class BenchError(Exception):
    """What whoever called can mend, in one line."""


# ----------------------------------------------------------------------------------------------------------------------
# What has to be computed and moved, from the settings alone
# ----------------------------------------------------------------------------------------------------------------------


class Forward(NamedTuple):
    """What forwards multiply."""

    products: Counter  # (rows, in, out) of each product with a weight -> how often
    attention: float  # FLOPs of queries with keys and of shares with values

    @property
    def flops(self) -> float:
        return sum(2 * rows * inner * outer * n for (rows, inner, outer), n in self.products.items()) + self.attention


def count_forward(
    hp: pg.Hyperparameters, rows: int, length: int, scored: int | None = None, attended: float | None = None
) -> Forward:
    """The products of a forward of `rows` sequences of `length` tokens; the head sees the last `scored` of each.

    Two FLOPs for each weight and row of every matrix product with a weight (a token table is none, a tied head is one),
    loops as often as they run; in attention four for each channel of each query head and each position that a query
    attends to: (length + 1) / 2 on average, as attention is causal, unless `attended` says what a kernel computes that
    does not leave out the rest. Counted by carrying the model out without its numbers, so that it holds for any
    architecture. Norms, gates and other elementwise work count nothing, as usual.
    """
    products, attention = Counter(), 0.0
    attended = (length + 1) / 2 if attended is None else attended

    def count(layer: pg.CastedLinear, inputs: tuple[torch.Tensor], _) -> None:
        outer, inner = layer.weight.shape
        products[inputs[0].numel() // inner, inner, outer] += 1

    def attend(q: torch.Tensor, *_) -> torch.Tensor:
        nonlocal attention
        attention += 4 * q.numel() * attended
        return torch.empty_like(q)

    with torch.device("meta"), torch.no_grad():
        model = pg.GPT(hp, length, attend, torch.float32)
        for layer in model.modules():
            if isinstance(layer, pg.CastedLinear):
                layer.register_forward_hook(count)
        tokens = torch.zeros(rows, length, dtype=torch.int64)
        model(tokens, tokens[:, -(scored or length) :])
    return Forward(products, attention)


def optimizer_shapes(hp: pg.Hyperparameters) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of all parameters by the algorithm that moves them: muon | adamw."""
    with torch.device("meta"):
        model = pg.GPT(hp, 2, pg.sdpa, torch.float32)
    rows, shapes = pg.optimizer_rows(hp), dict(muon=[], adamw=[])
    for name, parameter in model.named_parameters():
        shapes[rows[pg.row_of(name).optimizer].algorithm].append(tuple(parameter.shape))
    return shapes


def optimized_weights(hp: pg.Hyperparameters) -> tuple[int, int]:
    """How many AdamW moves, and how many Muon."""
    shapes = optimizer_shapes(hp)
    return tuple(sum(map(math.prod, shapes[algorithm])) for algorithm in ("adamw", "muon"))


def step_flops(hp: pg.Hyperparameters, attended: float | None = None) -> dict[str, float]:
    """FLOPs of one training step over all ranks, by phase.

    A backward has two products for each of the forward's; what a kernel computes anew for it counts nothing. An
    iteration of Newton-Schulz on a matrix (r, c), r <= c, is x xᵀ and the last product, 2 r² c each, and 2 r³.
    """
    forward = count_forward(hp, 1, hp.train_seq_len, attended=attended).flops
    forward *= hp.train_batch_tokens // hp.train_seq_len
    sides = [sorted(shape) for shape in optimizer_shapes(hp)["muon"]]
    polar = hp.muon_backend_steps * sum(4 * r * r * c + 2 * r**3 for r, c in sides)
    return dict(forward=forward, backward=2 * forward, optimizer=polar)


def scored_token_flops(hp: pg.Hyperparameters) -> float:
    """FLOPs of one scored token: of a sliding window, whose other tokens are context, or of plain windows."""
    scored = hp.eval_stride or hp.eval_seq_len
    return count_forward(hp, 1, hp.eval_seq_len, scored).flops / scored


def optimizer_bytes(hp: pg.Hyperparameters, world_size: int, dtype: torch.dtype) -> float:
    """Bytes that one rank's memory moves at least in an optimizer step, every tensor once.

    AdamW: the gradient read; weight and both moments read and written, fp32. Muon: the gradient read and written in
    `dtype` for the exchange, the weight read and written, the update read; and of this rank's shard the momentum read
    and written and the update written. What the iterations of Newton-Schulz move beyond that is not counted.
    """
    adamw, muon = optimized_weights(hp)
    short = dtype.itemsize
    return 28 * adamw + (4 + short + 8 + short) * muon + (8 + short) * muon / world_size


def sent_bytes(hp: pg.Hyperparameters, world_size: int, dtype: torch.dtype) -> float:
    """Bytes that each rank has to send in a training step, and to hear.

    Whatever is summed over ranks leaves each of them (ranks - 1) / ranks of it twice, as parts and as sums: AdamW's
    gradients in fp32; of Muon, gradients as parts and updates as sums, both in `dtype`.
    """
    adamw, muon = optimized_weights(hp)
    return (world_size - 1) / world_size * 2 * (4 * adamw + dtype.itemsize * muon)


# ----------------------------------------------------------------------------------------------------------------------
# Watching
# ----------------------------------------------------------------------------------------------------------------------


class Spread(NamedTuple):
    """Of several measurements."""

    median: float
    low: float  # quartiles
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) == 1:
            return cls(*(3 * [values[0]]))
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


class Watch:
    """Seconds of named phases, the device drained at both ends. What runs inside another phase counts in its own
    alone, so that phases add up."""

    def __init__(self, device: torch.device):
        self.device, self.open, self.since = device, [], 0.0
        self.seconds: Counter = Counter()

    def turn(self) -> None:
        """Give the time since the last turn to the innermost open phase."""
        pg.synchronize(self.device)
        now = time.perf_counter()
        if self.open:
            self.seconds[self.open[-1]] += now - self.since
        self.since = now

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.turn()
        self.open.append(name)
        try:
            yield
        finally:
            self.turn()
            self.open.pop()

    def watched(self, name: str, work: Callable) -> Callable:
        def timed(*args: Any, **more: Any) -> Any:
            with self(name):
                return work(*args, **more)

        return timed

    def waited(self, name: str, start: Callable) -> Callable:
        """The same for a collective: its start, and waiting for the handle that it returns."""

        def timed(*args: Any) -> Any:
            with self(name):
                handle = start(*args)
            return mock.Mock(spec=["wait"], wait=self.watched(name, handle.wait))

        return timed

    @contextlib.contextmanager
    def over(self, trainer: pg.Trainer) -> Iterator[None]:
        """The parts of a training step are phases inside the block."""
        ranks, parts = trainer.run.ranks, contextlib.ExitStack()
        with parts:
            for owner, name, phase in (
                (trainer, "forward", "forward"),
                (torch.Tensor, "backward", "backward"),
                (trainer.optimizers, "step", "optimizer"),
                (trainer.averages, "update", "averaging"),
            ):
                work = getattr(owner, name)
                timed = self.watched(phase, work)
                parts.enter_context(mock.patch.object(owner, name, timed))
            if ranks.size > 1:
                for name in ("start_sum", "start_reduce_scatter", "start_all_gather"):
                    timed = self.waited("communication", getattr(ranks, name))
                    parts.enter_context(mock.patch.object(ranks, name, timed))
            yield


def seconds_of(work: Callable, device: torch.device, repeats: int) -> Spread:
    """After one call to warm up."""
    spent = []
    for _ in range(repeats + 1):
        pg.synchronize(device)
        start = time.perf_counter()
        work()
        pg.synchronize(device)
        spent.append(time.perf_counter() - start)
    return Spread.of(spent[1:])


def matmul_peak(products: Counter, device: torch.device, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """FLOP/s of each product of a micro-batch's forward, by itself on this device: {rows x in x out: FLOP/s}."""
    speeds = {}
    for rows, inner, outer in products:
        x, w = (torch.randn(n, inner, device=device, dtype=dtype) for n in (rows, outer))
        seconds = seconds_of(lambda x=x, w=w: F.linear(x, w), device, repeats)
        speeds[f"{rows}x{inner}x{outer}"] = 2 * rows * inner * outer / seconds.median
    return speeds


def memory_bandwidth(device: torch.device, repeats: int, size: int) -> float:
    """Bytes a second that a copy of `size` bytes reads and writes."""
    a = torch.ones(size, dtype=torch.uint8, device=device)
    b = torch.ones_like(a)
    return 2 * size / seconds_of(lambda: b.copy_(a), device, repeats).median


# ----------------------------------------------------------------------------------------------------------------------
# Settings and data
# ----------------------------------------------------------------------------------------------------------------------


def environment(recipe: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The recipe's settings and over them the environment; but a step as most of a run has it, no clock, and for
    test-time training chunks of no more than one step, for which little text does. Raises ExperimentError, UserError.
    """
    chosen = read_recipe(recipe) | dict(environ)
    for mode in ("EVAL_ONLY", "EXPORT_ONLY", "ARTIFACT_PATH", "WEIGHTS_PATH", "RUN_ID", "OUT_DIR", "RESUME"):
        chosen.pop(mode, None)
    steady = {name: text for name, text in STEPS.items() if name not in ("EVAL_STRIDE", "TTT_ENABLED")}
    steady |= dict(MAX_WALLCLOCK_SECONDS="0", EVAL_MAX_SECONDS="0")
    if "WARMDOWN_FRAC" in chosen:  # a setting that older scripts lack
        steady["WARMDOWN_FRAC"] = "0"
    hp = pg.Hyperparameters.from_env(chosen | steady)
    step = hp.ttt_batch_seqs * min(hp.train_seq_len, hp.eval_seq_len)
    return chosen | steady | dict(TTT_CHUNK_TOKENS=str(min(hp.ttt_chunk_tokens, step)))


def small_data(vocab_size: int, alone: bool) -> Path:
    """Text of the Python installation, prepared once for this vocabulary. Raises BenchError."""
    folder = ROOT / "data" / "datasets" / f"bench_{vocab_size}"
    if not (folder / "manifest.json").exists():
        if not alone:
            raise BenchError("several processes would prepare the same data; name some with --data")
        command = [sys.executable, ROOT / "data" / "prepare.py", "offline", "--max-bytes", "4000000"]
        command += ["--vocab-size", str(vocab_size), "--val-docs", "120", "--out", folder]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            said = (made.stderr.strip().splitlines() or ["data/prepare.py says nothing"])[-1].removeprefix("error: ")
            raise BenchError(f"no data for VOCAB_SIZE={vocab_size}: {said}; name some with --data")
    return folder


def cut_data(hp: pg.Hyperparameters, folder: Path) -> None:
    """The data of the settings in `folder`, its validation split cut to a few chunks. Raises UserError."""
    stream = pg.TokenStream(pg.find_shards(hp, "val"), hp.vocab_size)
    wanted = CHUNKS * hp.ttt_chunk_tokens if hp.ttt_enabled else 0
    wanted = max(wanted, 16 * hp.eval_seq_len) + hp.eval_seq_len
    write_shard(folder / "fineweb_val_000000.bin", stream.read(0, min(len(stream), wanted + 1)))
    for path in (*pg.find_shards(hp, "train"), pg.find_tokenizer(hp)):
        (folder / path.name).symlink_to(path.resolve())


def describe(args: argparse.Namespace, hp: pg.Hyperparameters, **where: Any) -> dict:
    """What was measured and where, for console and file."""
    paths = ("data_path", "tokenizer_path", "out_dir")
    settings = {name: value for name, value in hp.changed().items() if name.lower() not in paths}
    facts = dict(recipe=args.recipe.stem, settings=settings, torch=torch.__version__)
    return facts | dict(threads=torch.get_num_threads(), busy=args.busy) | where


# ----------------------------------------------------------------------------------------------------------------------
# Phases
# ----------------------------------------------------------------------------------------------------------------------


class Phases:
    """A run of the working tree's script, phase by phase in this process."""

    def __init__(self, hp: pg.Hyperparameters, environ: Mapping[str, str], folder: Path, repeats: int):
        self.hp, self.repeats, self.seconds = hp, repeats, {}
        run, ranks = make_run(hp, pg.TokenStream(pg.find_shards(hp, "train"), hp.vocab_size)), pg.Ranks(hp, environ)
        dtype = pg.activation_dtype(hp.dtype, ranks.device)
        val = pg.load_validation(hp)
        compile = pg.choose_compiled(hp, ranks.device, val.targets, ranks.size)
        _, attend = pg.choose_attention(hp, ranks.device, dtype)
        run = run._replace(ranks=ranks, phases=pg.Phases(ranks.device), dtype=dtype, attend=attend, compile=compile)
        self.run = run._replace(val=val, folder=folder)

    def say(self, what: str) -> None:
        if self.run.ranks.is_main:
            print(f"measuring {what}", file=sys.stderr, flush=True)

    def keep(self, spent: Mapping[str, Sequence[float]]) -> None:
        self.seconds |= {name: Spread.of(values) for name, values in spent.items()}

    def train(self, trace: Path | None) -> pg.Trainer:
        """A step as it is, in turn with one whose parts are watched."""
        self.say("steps")
        run, trainer = self.run, pg.Trainer(self.run)
        trainer.warm_up()
        loader = pg.BatchLoader(run.stream, self.hp, run.ranks, run.log)
        trainer.clock.resume()

        def step(watch: Watch) -> None:
            with watch("data wait"):
                batch = loader.next()
            trainer.train_step(*batch)

        spent: dict[str, list[float]] = dict(step=[])
        self.watched: list[float] = []  # of a step that is not: what watching costs
        for i in range(WARM_UP_STEPS + self.repeats):
            pg.synchronize(run.ranks.device)
            start = time.perf_counter()
            trainer.train_step(*loader.next())
            pg.synchronize(run.ranks.device)
            plain, watch = time.perf_counter() - start, Watch(run.ranks.device)
            with watch.over(trainer), watch("other"):
                step(watch)
            if i >= WARM_UP_STEPS:
                spent["step"].append(plain)
                self.watched.append(watch.seconds.total() / plain)
                for name, seconds in watch.seconds.items():
                    spent.setdefault(name, []).append(seconds)
        self.keep(spent)
        if trace is not None:
            self.trace(lambda: step(Watch(run.ranks.device)), trace)
        trainer.clock.pause()
        return trainer

    def trace(self, step: Callable, path: Path) -> None:
        from torch.profiler import profile, record_function

        with profile(record_shapes=True) as profiler, record_function("step"):
            step()
            pg.synchronize(self.run.ranks.device)
        if self.run.ranks.is_main:
            profiler.export_chrome_trace(str(path))

    def export(self, trainer: pg.Trainer) -> bytes:
        """Calibration, quantization and coding by the run's own clock; the artifact."""
        self.say("exports")
        names, spent = dict(calibrate="calibration", quantize="quantize", compress="encode", fit="fit"), {}
        weights = trainer.exported_weights()[1]
        for i in range(1 + self.repeats):
            run = self.run._replace(phases=pg.Phases(self.run.ranks.device))
            _, blob = pg.export(run, weights)
            with run.phases("decode"):
                _, tensors = pg.unpack_artifact(blob)
                for stored in tensors.values():
                    stored.dequantize()
            for name, seconds in run.phases.seconds.items() if i else ():
                spent.setdefault(names.get(name, name), []).append(seconds)
        self.keep(spent)
        return blob

    def evaluate(self, blob: bytes) -> None:
        """The passes over the cut split, by the run's own log."""
        self.say("passes over a little text")
        run, spent = self.run._replace(log=Lines()), {}
        evaluation = pg.Evaluation(run, pg.unpack_artifact(blob)[1])
        for i in range(1 + self.repeats):
            run.log.clear()
            evaluation.score_all()
            for name, seconds in pass_seconds(run.log).items() if i else ():
                spent.setdefault(name, []).append(seconds)
        self.keep(spent)


def pass_seconds(lines: Sequence[str]) -> dict[str, float]:
    """{sliding score, legal TTT: seconds} by the lines of a log, those that were made."""
    found = re.findall(r"^(?:\w+_(sliding)_window|legal_(ttt)) .*eval_time:(\d+)ms", "\n".join(lines), re.MULTILINE)
    names = dict(sliding="sliding score", ttt="legal TTT")
    return {names[sliding or ttt]: int(ms) / 1000 for sliding, ttt, ms in found}


def measure_phases(args: argparse.Namespace, environ: dict[str, str], folder: Path) -> dict:
    """All figures, the same keys on every rank."""
    load, hp = Load(), pg.Hyperparameters.from_env(environ)
    bench = Phases(hp, environ, folder, args.repeats)
    trainer, run = bench.train(args.trace), bench.run
    device, ranks, dtype = run.ranks.device, run.ranks, run.dtype
    bench.evaluate(bench.export(trainer))
    forward = count_forward(hp, trainer.micro_rows, hp.train_seq_len)
    speeds = matmul_peak(forward.products, device, dtype, args.repeats)
    bandwidth = memory_bandwidth(device, args.repeats, 1 << 24 if args.quick else 1 << 28)
    own = ranks.sum_(torch.tensor(load.own_seconds(), dtype=torch.float64, device=device)).item()
    others = load.others(own) if pg.Place.from_env(environ).local_size == ranks.size else None  # it sees one host
    ranks.close()
    flops, moved, peak = step_flops(hp), optimizer_bytes(hp, ranks.size, dtype), max(speeds.values())
    step, seconds = bench.seconds["step"], bench.seconds
    targets = run.val.targets
    passes = {name: targets / seconds[name].median for name in ("sliding score", "legal TTT") if name in seconds}
    where = dict(device=pg.device_name(device), dtype=str(dtype).removeprefix("torch."), world_size=ranks.size)
    found = dict(kind="phases", **describe(args, hp, **where), repeats=args.repeats)
    found |= dict(others=others, alone=others is not None and others <= ALONE)
    in_step = [name for name in IN_STEP if name in seconds]
    found |= dict(phases={name: spread._asdict() for name, spread in seconds.items()})
    for name in in_step:
        found["phases"][name]["share_of_step"] = seconds[name].median / step.median
    found |= dict(phases_over_step=statistics.median(bench.watched))
    found |= dict(tokens_per_second=hp.train_batch_tokens / step.median, scored_targets=targets)
    found |= dict(scored_tokens_per_second=passes, step_flops=flops, scored_token_flops=scored_token_flops(hp))
    found |= dict(matmul_flops_per_second=speeds, utilisation=sum(flops.values()) / step.median / ranks.size / peak)
    if "sliding score" in passes:
        scoring = passes["sliding score"] * found["scored_token_flops"] / ranks.size / peak
        found |= dict(scoring_utilisation=scoring)
    found |= dict(optimizer_bytes=moved, bandwidth=bandwidth, sent_bytes=sent_bytes(hp, ranks.size, dtype))
    return found | dict(bandwidth_share=moved / seconds["optimizer"].median / bandwidth)


IN_STEP = ("data wait", "forward", "backward", "optimizer", "communication", "averaging", "other")
AFTER = ("calibration", "quantize", "encode", "fit", "decode", "sliding score", "legal TTT")
OFF = dict(calibration="GPTQ_ENABLED=0", communication="one process", fit="FIT_TO_CAP=0")
OFF |= {"sliding score": "EVAL_STRIDE=0", "legal TTT": "TTT_ENABLED=0"}


def show_phases(found: Mapping) -> Iterator[str]:
    yield f"{'phase':<16}{'median ms':>12}{'quartiles':>26}{'of the step':>14}"
    for name in ("step", *IN_STEP, *AFTER):
        if (phase := found["phases"].get(name)) is None:
            yield f"{name:<16}{'off':>12}  {OFF[name]}"
            continue
        spread = f"{1000 * phase['low']:.2f} to {1000 * phase['high']:.2f}"
        share = f"{phase['share_of_step']:>14.1%}" if "share_of_step" in phase else ""
        yield f"{name:<16}{1000 * phase['median']:>12.2f}{spread:>26}{share}"
    yield f"watched phases together: {found['phases_over_step']:.3f} of a step that is not watched"
    peak, flops = max(found["matmul_flops_per_second"].values()), found["step_flops"]
    parts = ", ".join(f"{name} {n / 1e9:.3g}" for name, n in flops.items())
    yield f"step: {sum(flops.values()) / 1e9:.4g} GFLOP ({parts}), {found['tokens_per_second']:.0f} tokens/s"
    yield f"peak of the model's own products: {peak / 1e9:.4g} GFLOP/s; a step reaches {found['utilisation']:.1%} of it"
    line = f"scored token: {found['scored_token_flops'] / 1e6:.4g} MFLOP"
    for name, speed in found["scored_tokens_per_second"].items():
        line += f"; {name} {speed:.0f} tokens/s"
        line += f", {found['scoring_utilisation']:.1%} of the peak" if name == "sliding score" else ""
    yield line
    moved, speed = found["optimizer_bytes"], found["bandwidth"]
    yield (
        f"optimizer: moves {moved / 1e6:.4g} MB at least, {found['bandwidth_share']:.1%} of what a copy moves in that "
        f"time ({speed / 1e9:.3g} GB/s)"
    )
    if sent := found["sent_bytes"]:
        yield f"communication: each rank sends {sent / 1e6:.4g} MB at least"
    yield told(found["others"])


# ----------------------------------------------------------------------------------------------------------------------
# Two scripts in turn
# ----------------------------------------------------------------------------------------------------------------------


COMPARED = ("training step", "sliding score", "legal TTT", "export")


def run_script(
    script: Path, name: str, launch: Sequence[str], environ: Mapping[str, str], out: Path
) -> tuple[dict[str, float], dict]:
    """Seconds of a training step, the export and the passes, by what a run's log and result say, and that result.
    Raises BenchError."""
    with tempfile.TemporaryDirectory(dir=out) as folder:
        environ = dict(environ) | dict(OUT_DIR=folder, RUN_ID="bench", PYTHONUNBUFFERED="1")
        ran = subprocess.run([*launch, script], env=environ, capture_output=True, text=True)
        lines = ran.stdout.splitlines()
        if ran.returncode:
            said = [*lines, *ran.stderr.splitlines()] or ["it said nothing"]
            last = next((line for line in said if line.startswith("error:")), said[-1])
            raise BenchError(f"{name} ends with exit code {ran.returncode}: {last.removeprefix('error: ')}")
        path = Path(folder) / "runs" / "bench" / "result.json"
        if not path.exists():
            raise BenchError(f"{name} leaves no runs/RUN_ID/result.json in OUT_DIR; it is no version of train_gpt.py")
        result = json.loads(path.read_text("utf-8"))
    # The average has more digits than the sum.
    steps = re.findall(r"^step:(\d+)/\d+ train_loss:.* step_avg:([\d.]+)ms", ran.stdout, re.MULTILINE)
    marks = [int(step) * float(average) / 1000 for step, average in steps]
    durations = [b - a for a, b in zip(marks, marks[1:], strict=False)][WARM_UP_STEPS - 1 :]
    if not durations:
        raise BenchError(f"{name} logs no steps to time, as step:N/M train_loss:… step_avg:…ms")
    phases = result["phase_seconds"]
    exported = sum(phases.get(phase, 0.0) for phase in ("calibrate", "quantize", "compress", "fit"))
    return {"training step": statistics.median(durations), "export": exported} | pass_seconds(lines), result


def compare(args: argparse.Namespace, environ: dict[str, str], out: Path) -> dict:
    """Pairs of runs, the order turning, so that a drift favours no side. Raises BenchError, ExperimentError."""
    hp = pg.Hyperparameters.from_env(environ)
    names = dict(old=args.against, new=args.script)
    scripts = {side: fetch_script(name, out) for side, name in names.items()}
    launch = shlex.split(args.launch) or [sys.executable]
    environ = environ | dict(ITERATIONS=str(args.steps))
    pairs = []
    for number in range(args.pairs):
        load, seconds = Load(), {}
        for side in ("old", "new") if number % 2 == 0 else ("new", "old"):
            seconds[side], result = run_script(scripts[side], names[side], launch, environ, out)
        others = load.others()
        alone = others is not None and others <= ALONE
        old, new = seconds["old"], seconds["new"]
        ratios = {name: new[name] / old[name] for name in old.keys() & new.keys() if old[name]}
        pairs.append(dict(seconds, ratios=ratios, others=others, alone=alone))
        said = ", ".join(f"{name} {ratios[name]:.4f}" for name in COMPARED if name in ratios)
        print(f"pair {number + 1} of {args.pairs}: new/old {said}; {told(others)}", flush=True)
    used = pairs if args.busy else [pair for pair in pairs if pair["alone"]]
    if 2 * len(used) <= len(pairs):
        raise BenchError(f"{len(pairs) - len(used)} of {len(pairs)} pairs shared the machine; {NO_RESULT}")
    where = {name: result[name] for name in ("device", "dtype", "world_size")}
    found = dict(kind="against", **describe(args, hp, **where), names=names, steps=args.steps, pairs=pairs)
    found |= dict(code_sha256={side: script.stem for side, script in scripts.items()})
    found |= dict(alone=all(pair["alone"] for pair in used))
    names = [name for name in COMPARED if all(name in pair["ratios"] for pair in used)]
    return found | dict(ratios={name: judge(name, used) for name in names})


def judge(name: str, pairs: Sequence[Mapping]) -> dict:
    """Median ratio with its quartiles, in how many pairs the new script was faster, and what that says."""
    ratios = [pair["ratios"][name] for pair in pairs]
    faster, verdict = sum(ratio < 1 for ratio in ratios), "undecided"
    if len(ratios) >= AGREEING and faster in (0, len(ratios)) and 1 not in ratios:
        verdict = "faster" if faster else "slower"
    medians = {side: statistics.median(pair[side][name] for pair in pairs) for side in ("old", "new")}
    return dict(**medians, **Spread.of(ratios)._asdict(), faster=faster, of=len(ratios), verdict=verdict)


def show_ratios(found: Mapping) -> Iterator[str]:
    yield f"{'':<16}{'old ms':>12}{'new ms':>12}{'new/old':>10}{'quartiles':>20}"
    for name, ratio in found["ratios"].items():
        spread = f"{ratio['low']:.4f} to {ratio['high']:.4f}"
        line = f"{name:<16}{1000 * ratio['old']:>12.2f}{1000 * ratio['new']:>12.2f}{ratio['median']:>10.4f}{spread:>20}"
        verdict = ratio["verdict"] if found["alone"] else "NO RESULT"
        yield f"{line}  faster in {ratio['faster']} of {ratio['of']} pairs: {verdict}"


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------

NO_RESULT = "run it on an idle machine, or with --busy for figures that are no result"


def told(others: float | None) -> str:
    if others is None:
        return "other work: this system does not say"
    return f"other work took {others:.2f} of a core" + (", so this is NO RESULT" if others > ALONE else "")


def check_idle(seconds: float) -> None:
    """Before any work. Raises BenchError."""
    load = Load()
    time.sleep(seconds)
    others = load.others()
    if others is None or others > ALONE:
        raise BenchError(f"{told(others).split(', so')[0]}; {NO_RESULT}")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see bench.py --help\n")


def at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least}")
        return int(text)

    return number


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> argparse.Namespace:
    parser = Parser(prog="tests/bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    recipe = ROOT / "records" / "recipes" / "cpu_mini.env"
    parser.add_argument("--recipe", type=Path, default=recipe, metavar="FILE.env", help="default: cpu_mini")
    parser.add_argument("--data", type=Path, help="DATA_PATH; default: a little text of the Python installation")
    parser.add_argument("--against", metavar="SCRIPT", help="a file, or a commit whose train_gpt.py is meant")
    script = str(ROOT / "train_gpt.py")
    parser.add_argument("--script", default=script, help="what is compared with it; default: the one beside tests/")
    parser.add_argument("--launch", default="", help="in front of both scripts, as 'torchrun --nproc_per_node=8'")
    parser.add_argument("--repeats", type=at_least(1), default=7, help="of every phase, after a warm-up (%(default)s)")
    parser.add_argument("--pairs", type=at_least(1), default=6, help="of runs with --against (%(default)s)")
    parser.add_argument("--steps", type=at_least(4), default=10, help="of each run with --against (%(default)s)")
    parser.add_argument("--busy", action="store_true", help="other work on the machine is no reason to stop")
    parser.add_argument("--quick", action="store_true", help="few repeats: to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="a step for a trace viewer, by torch's profiler")
    args = parser.parse_args(argv)
    if args.quick:
        args.repeats, args.pairs, args.steps = min(args.repeats, 3), min(args.pairs, 2), min(args.steps, 5)
    for name in ("json", "trace"):
        path = getattr(args, name)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            parser.error(f"--{name} {path}: no place for a file")
    if args.against and args.trace:
        parser.error("--trace goes with the phases, not with --against")
    if args.against and "WORLD_SIZE" in environ:
        parser.error("--against starts the runs itself; give it --launch 'torchrun …'")
    return args


def bench(args: argparse.Namespace, environ: Mapping[str, str], folder: Path) -> dict:
    """Raises BenchError, ExperimentError, UserError."""
    chosen = environment(args.recipe, environ)
    data = args.data or (Path(chosen["DATA_PATH"]) if "DATA_PATH" in chosen else None)
    if data is None:
        data = small_data(pg.Hyperparameters.from_env(chosen).vocab_size, "WORLD_SIZE" not in environ)
    chosen["DATA_PATH"] = str(data)
    if not args.busy and args.against:
        check_idle(0.3 if args.quick else 2.0)
    cut_data(pg.Hyperparameters.from_env(chosen), folder)
    chosen.pop("TOKENIZER_PATH", None)
    chosen["DATA_PATH"] = str(folder)
    if args.against:
        return compare(args, chosen, folder)
    return measure_phases(args, chosen, folder)


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Exit code of a command line."""
    args = parse(argv, environ)
    try:
        with tempfile.TemporaryDirectory(prefix="bench_") as folder:
            found = bench(args, environ, Path(folder))
        if environ.get("RANK", "0") == "0":
            report(args, found)
    except BrokenPipeError:  # `| head`: who reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (BenchError, ExperimentError, pg.UserError, pg.LimitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def report(args: argparse.Namespace, found: Mapping) -> None:
    if args.json is not None:
        pg.write_atomic(args.json, [(json.dumps(found, indent=1) + "\n").encode()])
    facts = ("recipe", "device", "dtype", "torch", "threads", "world_size")
    print(f"bench: {', '.join(f'{name} {found[name]}' for name in facts)}")
    for line in (show_ratios if args.against else show_phases)(found):
        print(line)
    sys.stdout.flush()


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # what runs is ended and the temporary folder goes
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    sys.exit(main(sys.argv[1:], os.environ))
