"""Synthetic logs of runs, in every dialect in use: text made from parameters, so that a test knows what it must read.

text = records_corpus.baseline(Run(seed=42, results=(Result("final_int8_zlib_roundtrip", 2.07, 1.2244),)))
path.write_bytes(records_corpus.ENCODINGS["utf-16"](text))
"""

import codecs
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

BPB_PER_NAT = 1.22436570 / 2.07269931  # of the baseline's tokenizer on the validation split
RUN_SETTINGS = ("seed", "run_id", "out_dir", "data_path", "tokenizer_path")  # no part of a configuration

# Every label of a result that the public logs use, as printed (`_exact` lines are made of them).
SCORE_LABELS = (
    "final_int8_zlib_roundtrip",
    "final_int6_roundtrip",
    "final_int6_sliding_window",
    "final_sliding_window",
    "final_sliding_window_eval",
    "final_sliding",
    "final_roundtrip",
    "final_temped",
    "final_ternary_roundtrip",
    "final_xnor_roundtrip",
    "final_binary_roundtrip",
    "final_INT7_zlib_roundtrip",
    "final_int6_ttt",
    "final_int8_ttt_lora",
    "final_ttt_lora",
    "legal_ttt",
    "quantized",
    "quantized_sliding_window",
    "quantized_ttt",
    "quantized_ttt_lora",
    "quantized_ttt_phased",
)
DIAGNOSTIC_LABELS = (
    "DIAGNOSTIC post_ema",
    "pre-quantization post-ema",
    "diagnostic pre-quantization post-ema",
    "diagnostic quantized",
)
# What may stand between `Total submission size` and the colon.
SIZE_LABELS = (
    "",
    "int8+zlib",
    "int6+zstd",
    "int6+zstd-22",
    "int6+zlib-9",
    "int6+lzma",
    "int6+lzma-9",
    "int6+brotli",
    "mixed_int5_int6+brotli",
    "quantized+brotli",
    "quantized+pergroup",
)

ENCODINGS = {
    "utf-8": lambda text: text.encode(),
    "utf-8-sig": lambda text: text.encode("utf-8-sig"),
    "utf-16": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "utf-16 big-endian": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "utf-16-le without BOM": lambda text: text.encode("utf-16-le"),
    "utf-16-be without BOM": lambda text: text.encode("utf-16-be"),
    "crlf": lambda text: text.replace("\n", "\r\n").encode(),
    "utf-16 crlf": lambda text: codecs.BOM_UTF16_LE + text.replace("\n", "\r\n").encode("utf-16-le"),
}

# Source whose text looks like results: templates, literals, and a docstring and a string that quote a log.
DECOY_SOURCE = '''"""Trains a model.

An earlier run ended with
final_int8_zlib_roundtrip_exact val_loss:1.11111111 val_bpb:0.11111111
step:77/88 train_loss:0.7777 train_time:77ms step_avg:7.77ms
Total submission size int8+zlib: 7777777 bytes
seed:7777
"""

from __future__ import annotations

import os
import time

USAGE = """
legal_ttt val_loss:0.2222 val_bpb:0.2222
result {"headline": {"label": "legal_ttt", "val_loss": 0.2, "val_bpb": 0.2}}
====================================================================================================
Code size: 777 bytes
"""
SEED: int = 7777
val_loss, val_bpb = 0.3333, 0.3333
TABLE = (
0.3333, 0.3333,
)
TOTAL = SEED + \\
7777
PATTERN = r"final_int6_roundtrip val_loss:(\\d+) val_bpb:0.4444"


def log0(message: str, console: bool = True) -> None:
    print(message)  # step:99/99 train_loss:0.9999 train_time:9ms


def report(q_val_loss: float, q_val_bpb: float, step: int, model_bytes: int) -> None:
    log0(f"final_int8_zlib_roundtrip_exact val_loss:{q_val_loss:.8f} val_bpb:{q_val_bpb:.8f}")
    log0(
        f"step:{step}/20000 val_loss:{q_val_loss:.4f} val_bpb:{q_val_bpb:.4f} "
        "train_time:5ms step_avg:5.00ms"
    )
    log0("final_int6_roundtrip_exact val_loss:0.55555555 val_bpb:0.55555555")
    log0(f"Total submission size int8+zlib: {model_bytes + 777} bytes")
    log0("===== source end =====")
    assert q_val_loss < 6.6666, f'quantized val_loss:{q_val_loss} val_bpb:0.6666'
    if os.environ.get("LATE") == "1": print('Total submission size: 7777 bytes')


if __name__ == "__main__":
    report(0.8888, 0.8888, 8, 8888)
'''


class Result(NamedTuple):
    """A score as a run prints it."""

    label: str
    loss: float
    bpb: float
    extra: str = ""  # "stride:64"
    eval_ms: int | None = 1401


def result(label: str, loss: float, extra: str = "", eval_ms: int | None = 1401) -> Result:
    """A result with the bpb that belongs to its loss."""
    return Result(label, loss, round(loss * BPB_PER_NAT, 8), extra, eval_ms)


BASELINE_RESULTS = (result("final_int8_zlib_roundtrip", 2.07269931),)
PGOLF_RESULTS = (
    result("final_int6_roundtrip", 2.07269931, eval_ms=1401),
    result("final_int6_sliding_window", 2.05012345, "stride:64 ", 74321),
    result("legal_ttt", 2.04654321, eval_ms=301234),
)


@dataclass(frozen=True)
class Run:
    """What a run did: what a parser must read from its log."""

    seed: int = 1337
    run_id: str = "run"
    world_size: int = 8
    model_params: int = 17_059_912
    total: int = 20_000  # ITERATIONS
    steps: tuple[int, ...] = (1, 2, 10, 200, 400, 600)
    step_ms: float = 45.0
    final_loss: float = 2.06
    results: tuple[Result, ...] = BASELINE_RESULTS
    size_label: str = "int8+zlib"
    bytes_raw: int = 67_224_983  # the model before quantization; only the public dialects print it
    bytes_model: int = 15_815_847
    source: str = DECOY_SOURCE
    settings: tuple[tuple[str, object], ...] = (("num_layers", 9), ("matrix_lr", 0.04))
    torch: str = "2.9.1+cu128"
    device: str = "NVIDIA H100 80GB HBM3"
    capped: bool = True  # stopped by the wall clock before `total`
    rounded: bool = True  # `<label>` lines with four decimals before the `_exact` ones

    @property
    def bytes_code(self) -> int:
        return len(self.source.encode())

    @property
    def bytes_total(self) -> int:
        return self.bytes_code + self.bytes_model

    @property
    def code_sha256(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    @property
    def all_settings(self) -> dict[str, object]:
        return {"data_path": "data", "out_dir": ".", "seed": self.seed, "run_id": self.run_id, **dict(self.settings)}

    @property
    def settings_hash(self) -> str:
        kept = {name: value for name, value in self.all_settings.items() if name not in RUN_SETTINGS}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]

    def loss(self, step: int) -> float:
        """Training loss, rounded as it is printed."""
        return round(self.final_loss + 4.9 * math.exp(-step / 150), 4)

    def time_ms(self, step: int) -> int:
        return round(step * self.step_ms)

    @property
    def train_ms(self) -> int:
        return self.time_ms(self.steps[-1])


# ----------------------------------------------------------------------------------------------------------------------
# Parts
# ----------------------------------------------------------------------------------------------------------------------


def nvidia_smi(device: str = "NVIDIA H100 80GB HBM3", count: int = 8) -> str:
    """What the baseline prints of its machine."""
    head = """Fri Mar 20 18:24:05 2026
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 570.148.08             Driver Version: 570.148.08     CUDA Version: 12.8     |
|-----------------------------------------+------------------------+----------------------+
| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |
|=========================================+========================+======================|"""
    row = """
|   {}  {:<30}  On  |   00000000:18:00.0 Off |                    0 |
| N/A   37C    P0            119W /  700W |    1521MiB /  81559MiB |      6%      Default |"""
    end = "\n+-----------------------------------------------------------------------------------------+\n"
    return head + "".join(row.format(i, device) for i in range(count)) + end


def result_lines(found: Result, rounded: bool = True) -> Iterator[str]:
    """The rounded line and the `_exact` one."""
    time = f" eval_time:{found.eval_ms}ms" if found.eval_ms is not None else ""
    extra = f" {found.extra.strip()}" if found.extra.strip() else ""
    if rounded:
        yield f"{found.label} val_loss:{found.loss:.4f} val_bpb:{found.bpb:.4f}{extra}{time}"
    yield f"{found.label}_exact val_loss:{found.loss:.8f} val_bpb:{found.bpb:.8f}{'' if rounded else extra + time}"


def text_of(lines: list[str]) -> str:
    return "".join(line + "\n" for line in lines)


# ----------------------------------------------------------------------------------------------------------------------
# Dialects
# ----------------------------------------------------------------------------------------------------------------------


def console(run: Run = Run()) -> str:
    """The baseline's lines on the console: its log file without the dump of the source."""
    average = f"{run.step_ms:.2f}ms"
    lines = [
        f"logs/{run.run_id}.txt",
        "val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=fineweb_1024_bpe.model",
    ]
    lines += [
        "train_loader:dataset:fineweb10B_sp1024 train_shards:80",
        "val_loader:shards pattern=val.bin tokens:62021632",
    ]
    lines += [f"model_params:{run.model_params}", f"world_size:{run.world_size} grad_accum_steps:1"]
    lines += ["sdp_backends:cudnn=False flash=True mem_efficient=False math=False"]
    lines += [
        f"train_batch_tokens:524288 train_seq_len:1024 iterations:{run.total} warmup_steps:20",
        f"seed:{run.seed}",
    ]
    lines += [f"warmup_step:{i}/20" for i in (1, 20)]
    lines += [f"step:0/{run.total} val_loss:6.9357 val_bpb:4.1077 train_time:0ms step_avg:0.02ms"]
    for step in run.steps:
        head = f"step:{step}/{run.total}"
        lines.append(f"{head} train_loss:{run.loss(step):.4f} train_time:{run.time_ms(step)}ms step_avg:{average}")
    last, bpb = run.steps[-1], run.final_loss * BPB_PER_NAT
    head = f"step:{last}/{run.total}"
    lines.append(
        f"{head} val_loss:{run.final_loss:.4f} val_bpb:{bpb:.4f} train_time:{run.train_ms}ms step_avg:{average}"
    )
    if run.capped:
        lines.append(f"stopping_early: wallclock_cap train_time:{run.train_ms}ms step:{last}/{run.total}")
    lines.append("peak memory allocated: 10184 MiB reserved: 10200 MiB")
    label = f" {run.size_label}" if run.size_label else ""
    lines += [f"Serialized model: {run.bytes_raw} bytes", f"Code size: {run.bytes_code} bytes"]
    lines += [f"Total submission size: {run.bytes_raw + run.bytes_code} bytes"]
    lines += [
        f"Serialized model{label}: {run.bytes_model} bytes (payload:17178912 raw_torch:17224025 payload_ratio:3.91x)"
    ]
    lines += [f"Total submission size{label}: {run.bytes_total} bytes"]
    for found in run.results:
        lines += result_lines(found, run.rounded)
    return text_of(lines)


def baseline(run: Run = Run()) -> str:
    """The public baseline's log file: its source, where it ran, and what the console shows."""
    rule, where = "=" * 100, nvidia_smi(run.device, run.world_size)
    lines = [run.source, rule, "Running Python 3.12.3 (main, Nov  6 2025) [GCC 13.3.0]", f"Running PyTorch {run.torch}"]
    first, _, rest = console(run).partition("\n")
    assert first.startswith("logs/")  # the name of the log is for the console alone
    return text_of([*lines, where, rule]) + rest


def noprefix(run: Run = Run(), dump: bool = True) -> str:
    """The later public dialect: steps without `step:`, minutes, all hyperparameters, eight decimals everywhere."""
    rule = "=" * 100
    settings = {
        **run.all_settings,
        "world_size": run.world_size,
        "ttt_enabled": True,
        "logfile": f"logs/{run.run_id}.txt",
    }
    lines = ["Hyperparameters:", *(f"  {name}: {value}" for name, value in sorted(settings.items()))]
    if dump:
        lines += [rule, "Source code:", rule, run.source]
    lines += [rule, "Running Python 3.12.3 (main) [GCC 13.3.0]", f"Running PyTorch {run.torch}"]
    lines += [nvidia_smi(run.device, run.world_size), rule, "train_shards: 80", "val_tokens: 40540160"]
    lines += [f"model_params:{run.model_params}", "gptq:reserving 10s, effective=590000ms", "warmup_step: 1/20"]
    lines += ["loop_warmup_step: 1/20", f"0/{run.total} val_loss: 9.0065 val_bpb: 3.4866"]
    for step in run.steps:
        minutes = run.time_ms(step) / 60_000
        lines.append(f"{step}/{run.total} train_loss: {run.loss(step):.4f} train_time: {minutes:.1f}m tok/s: 7711432")
    last = run.steps[-1]
    lines.append(f"layer_loop:enabled step:{last} frac:0.350 encoder:[0, 1, 2] decoder:[3, 4]")
    lines.append(f"{last}/{run.total} val_loss: {run.final_loss:.4f} val_bpb: {run.final_loss * BPB_PER_NAT:.4f}")
    if run.capped:
        lines.append(f"stopping_early: wallclock_cap train_time: {run.train_ms}ms step: {last}/{run.total}")
    lines += ["peak memory allocated: 39046 MiB reserved: 39070 MiB", "ema:applying EMA weights"]
    bpb = (run.final_loss - 0.01) * BPB_PER_NAT
    lines += [f"pre-quantization post-ema val_loss:{run.final_loss - 0.01:.8f} val_bpb:{bpb:.8f} eval_time:6969ms"]
    lines += [f"Serialized model: {run.bytes_raw} bytes", f"Code size: {run.bytes_code} bytes"]
    lines += ["GPTQ:collecting Hessians from calibration data...", "GPTQ:collected 67 Hessians in 12.8s"]
    lines += [
        "Quantized weights:",
        "  gptq (int6): blocks.attn.c_k.weight",
        "  passthrough (float16): blocks.attn_scale",
    ]
    lines += [f"Serialized model {run.size_label}: {run.bytes_model} bytes"]
    lines += [f"Total submission size {run.size_label}: {run.bytes_total} bytes"]
    for found in run.results:
        extra = f" {found.extra.strip()}" if found.extra.strip() else ""
        time = f" eval_time:{found.eval_ms}ms" if found.eval_ms is not None else ""
        lines.append(f"{found.label} val_loss:{found.loss:.8f} val_bpb:{found.bpb:.8f}{extra}{time}")
    return text_of(lines)


def pgolf_result(run: Run) -> dict:
    """The `result` line's object of train_gpt.py."""
    eval_seconds = sum(found.eval_ms or 0 for found in run.results) / 1000
    scores = {
        found.label: dict(val_loss=found.loss, val_bpb=found.bpb, tokens=1000, bytes=2437) for found in run.results
    }
    headline = run.results[-1]
    return dict(
        run_id=run.run_id,
        mode="train",
        steps=run.steps[-1],
        train_tokens=run.steps[-1] * 786_432,
        exported="ema",
        audit=None,
        resumed_at=[],
        eval_seconds=eval_seconds,
        eval_cut=None,
        seed=run.seed,
        settings_hash=run.settings_hash,
        code_sha256=run.code_sha256,
        artifact_sha256=hashlib.sha256(str(run.bytes_model).encode()).hexdigest(),
        world_size=run.world_size,
        device=run.device,
        torch=run.torch,
        dtype="bfloat16",
        train_seconds=run.train_ms / 1000,
        phase_seconds={"warmup": 2.5, "train": run.train_ms / 1000, "score": eval_seconds},
        peak_memory_mib=10_184,
        bytes_code=run.bytes_code,
        bytes_artifact=run.bytes_model,
        bytes_total=run.bytes_total,
        bytes_cap=16_000_000,
        scores=scores,
        headline=dict(label=headline.label, val_loss=headline.loss, val_bpb=headline.bpb),
    )


def pgolf(run: Run = Run(results=PGOLF_RESULTS, size_label="int6+lzma"), finished: bool = True) -> str:
    """The log of this project's train_gpt.py."""
    lines = [f"code_sha256:{run.code_sha256} settings_hash:{run.settings_hash}"]
    lines += [f"torch:{run.torch} cuda:12.8 python:3.11.7 device:{run.device}", "threads:1 omp_wait_policy:PASSIVE"]
    lines += ["dtype:bfloat16 compile:1 attention:flash3", f"setting:RUN_ID={run.run_id}", f"setting:SEED={run.seed}"]
    lines += [f"settings {json.dumps(run.all_settings)}", f"===== source begin bytes:{run.bytes_code} ====="]
    lines += [run.source, "===== source end =====", f"seed:{run.seed}", f"model_params:{run.model_params}"]
    lines += [f"world_size:{run.world_size} grad_accum_steps:1", "warmup_step:1/1"]
    timing = [f"train_time:{run.time_ms(step)}ms step_avg:{run.step_ms:.2f}ms" for step in run.steps]
    for step, time in zip(run.steps, timing, strict=True):
        lines.append(f"step:{step}/{run.total} train_loss:{run.loss(step):.4f} {time}")
    last, bpb = run.steps[-1], run.final_loss * BPB_PER_NAT
    lines.append(f"late_qat:enabled step:{last} scale:0.5686")
    if run.capped:
        lines.append(f"stopping_early: wallclock_cap train_time:{run.train_ms}ms step:{last}/{run.total}")
    lines += ["peak memory allocated: 10184 MiB reserved: 10200 MiB", "export_weights:ema swa_samples:0"]
    lines += [f"Serialized model {run.size_label}: {run.bytes_model} bytes", f"Code size: {run.bytes_code} bytes"]
    lines += [f"Total submission size {run.size_label}: {run.bytes_total} bytes"]
    lines += [f"step:{last}/{run.total} val_loss:{run.final_loss:.4f} val_bpb:{bpb:.4f} {timing[-1]}"]
    lines += [f"DIAGNOSTIC post_ema val_loss:{run.final_loss:.4f} val_bpb:{bpb:.4f} eval_time:13251ms"]
    for found in run.results:
        lines += result_lines(found, run.rounded)
    lines += ["audit:causal pass disturbed_at:38 scores_before_moved:0", "audit:once pass tokens:1000 bytes:2437"]
    lines += ["phase:warmup seconds:2.50", f"phase:train seconds:{run.train_ms / 1000:.2f}"]
    if finished:
        lines.append(f"result {json.dumps(pgolf_result(run))}")
    return text_of(lines)


DIALECTS = {"pgolf": pgolf, "baseline": baseline, "baseline-noprefix": noprefix}


def run_of(dialect: str, **changes) -> Run:
    """A plausible run of a dialect: its usual results and size label."""
    usual = dict(
        pgolf=Run(results=PGOLF_RESULTS, size_label="int6+lzma"),
        baseline=Run(),
    ).get(dialect, Run(results=(result("quantized", 2.07269931, eval_ms=8762),), size_label="quantized+brotli"))
    return replace(usual, **changes)


def log_text(dialect: str, **changes) -> str:
    """The log of a plausible run, with changes to its parameters."""
    return DIALECTS[dialect](run_of(dialect, **changes))
