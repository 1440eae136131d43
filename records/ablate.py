"""Each technique switched on or off on top of one recipe, one line per finished run; ended runs are not repeated.

    python records/ablate.py run --data $DATA_PATH --out $OUT [NAME…]     what is missing in the results, or these
    python records/ablate.py time --data $DATA_PATH --out $OUT            a step of each, alone on the machine
    python records/ablate.py table                                        README's table from the results

Runs go `--jobs` at a time with one thread each. Techniques that train are trained anew; those of quantization and
evaluation start from the core's saved weights (EXPORT_ONLY).
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "records/recipes/cpu_ablate.env"
RESULTS = ROOT / "records/ablation/results.jsonl"
SEEDS = (1337, 42, 2025)  # of the core: their spread is the noise of every difference

# name: settings on top of the core.
TRAINED = {
    "core": {},
    "value residual": dict(VALUE_RESIDUAL=1),
    "gated attention": dict(GATED_ATTENTION=1),
    "SwiGLU": dict(MLP_KIND="swiglu"),
    "Star-ReLU gate": dict(MLP_KIND="star_relu"),
    "no late QAT": dict(LATE_QAT=0),
    "9 layers, layer 4 three times": dict(NUM_LAYERS=9, VE_LAYERS="7,8", NUM_LOOPS=2, LOOP_START=4, LOOP_END=4),
    "layers 3-5 three times from 0.35": dict(NUM_LOOPS=2, LOOP_START=3, LOOP_END=5),
    "decoder learning rate x2": dict(DECODER_LR_MULT=2),
    "CROWN-Q": dict(CROWN_Q=100000),
    "relu squared": dict(LEAKY_RELU_SLOPE=0),
    "no XSA": dict(XSA_LAST_N=0),
    "XSA on all layers": dict(XSA_LAST_N=11),
    "no BigramHash": dict(BIGRAM_VOCAB_SIZE=0),
    "no SmearGate": dict(SMEAR_GATE_ENABLED=0),
    "no value embeddings": dict(VE_ENABLED=0),
    "no LN scale": dict(LN_SCALE=0),
    "rotary on all dimensions": dict(ROPE_DIMS=0),
    "no U-Net skips": dict(UNET_SKIPS=0),
    "SWA of raw snapshots": dict(SWA_ENABLED=1, SWA_SOURCE="raw"),
    "SWA of EMA snapshots": dict(SWA_ENABLED=1, SWA_SOURCE="ema"),
}
THREE_SEEDS = ("core", "no late QAT")

LORA = dict(TTT_PARAMS="lora", TTT_OPTIMIZER="adamw")
# name: settings of quantization and evaluation on the core's weights.
EXPORTED = {
    "full GPTQ": dict(GPTQ_ENABLED=1),
    "full GPTQ, no late QAT": dict(GPTQ_ENABLED=1),
    "attention output int8": dict(ATTN_OUT_BITS=8),
    "MLP int5": dict(MLP_BITS=5),
    "full GPTQ, MLP int5": dict(GPTQ_ENABLED=1, MLP_BITS=5),
    "tables int7": dict(EMBED_BITS=7),
    "tables fp16": dict(EMBED_BITS=16),
    "TTT by AdamW, rate 0.0001": dict(TTT_OPTIMIZER="adamw", TTT_LR=0.0001),
    "TTT by AdamW, rate 0.0005": dict(TTT_OPTIMIZER="adamw", TTT_LR=0.0005),
    "TTT with SAM 0.05": dict(TTT_SAM_RHO=0.05),
    "TTT with a rise over 4 chunks": dict(TTT_WARMUP_CHUNKS=4),
    "TTT on 8 chunks": dict(TTT_MAX_CHUNKS=8),
    "TTT of scales, rate 0.02": dict(TTT_PARAMS="scales", TTT_LR=0.02),
    "LoRA TTT, rate 0.001": dict(LORA, TTT_LR=0.001),
    "LoRA TTT, rate 0.01": dict(LORA, TTT_LR=0.01),
    "LoRA TTT, no step": dict(LORA, TTT_LR=0),
    "LoRA TTT carried, rate 0.001": dict(LORA, TTT_LR=0.001, TTT_LORA_RESET=0),
    "temperature": dict(TTT_TEMPERATURE=1),
    "Hedge mixture": dict(HEDGE_ENABLED=1),
}
GPTQ_OF = {"full GPTQ": "core", "full GPTQ, no late QAT": "no late QAT"}  # three seeds each; the others: one, of core


def wanted() -> dict[str, tuple[int, dict]]:
    """Run id: (seed, settings), in the order in which they are made."""
    runs = {}
    for name, settings in TRAINED.items():
        for seed in SEEDS if name in THREE_SEEDS else SEEDS[:1]:
            runs[run_id(name, seed)] = (seed, settings)
    for name, settings in EXPORTED.items():
        for seed in SEEDS if name in GPTQ_OF else SEEDS[:1]:
            runs[run_id(name, seed)] = (seed, settings | dict(EXPORT_ONLY=1, WEIGHTS_PATH=run_id(base(name), seed)))
    return runs


def base(name: str) -> str:
    """What a technique is compared with."""
    return "core" if name in TRAINED else GPTQ_OF.get(name, "core")


def run_id(name: str, seed: int) -> str:
    return f"{re.sub('[^A-Za-z0-9.]+', '-', name)}-{seed}"


def recipe() -> dict[str, str]:
    lines = RECIPE.read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def finished() -> dict[str, dict]:
    """Results so far by run id."""
    if not RESULTS.exists():
        return {}
    return {r["run_id"]: r for r in map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())}


def run_one(name: str, seed: int, settings: dict, data: str, out: str, lock: threading.Lock) -> bool:
    """One run of the script; its result line goes to the results. False where it failed."""
    environ = os.environ | recipe() | {key: str(value) for key, value in settings.items()}
    environ |= dict(SEED=str(seed), RUN_ID=name, DATA_PATH=data, OUT_DIR=out, SAVE_WEIGHTS="1")
    environ |= dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    if "WEIGHTS_PATH" in settings:
        environ |= dict(
            WEIGHTS_PATH=str(Path(out) / "runs" / settings["WEIGHTS_PATH"] / "weights.pgolf"), SAVE_WEIGHTS="0"
        )
    done = subprocess.run([sys.executable, ROOT / "train_gpt.py"], env=environ, capture_output=True, text=True)
    if done.returncode:
        print(f"{name}: exit code {done.returncode}: {done.stderr.strip()[-500:]}", flush=True)
        return False
    result = json.loads((Path(out) / "runs" / name / "result.json").read_text())
    with lock:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"settings": settings, **result}) + "\n")
        scores = " ".join(f"{label}:{score['val_bpb']:.4f}" for label, score in result["scores"].items())
        print(f"{name} {scores} bytes:{result['bytes_artifact']}", flush=True)
    return True


def run(arguments: argparse.Namespace) -> int:
    runs, done, lock = wanted(), finished(), threading.Lock()
    unknown = [name for name in arguments.names if name not in runs]
    if unknown:
        print(f"error: unknown run {unknown[0]}; there are {', '.join(runs)}", file=sys.stderr)
        return 2
    todo = [name for name in arguments.names or runs if name not in done]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        ended = pool.map(lambda name: run_one(name, *runs[name], arguments.data, arguments.out, lock), todo)
        return 0 if all(list(ended)) else 1


def score(result: dict, kind: str) -> float:
    """bpb of the pass whose label ends so."""
    return next(s["val_bpb"] for label, s in result["scores"].items() if label.endswith(kind))


def spread(results: dict[str, dict], kind: str) -> float:
    return statistics.stdev(score(results[run_id("core", seed)], kind) for seed in SEEDS)


def verdict(difference: float, noise: float) -> str:
    return "within noise" if abs(difference) <= 2 * noise else "better" if difference < 0 else "worse"


def signed(x: float | None, digits: int = 4) -> str:
    return "" if x is None else f"{x:+.{digits}f}" if digits else f"{x:+,.0f}"


def table(_: argparse.Namespace) -> int:
    """Differences from the run of the same seed that a technique was put on; one seed, or the mean of three."""
    results, times = finished(), step_times()
    noise = {kind: spread(results, kind) for kind in ("sliding_window", "legal_ttt")}
    core = results[run_id("core", SEEDS[0])]
    print(f"| setting | sliding | legal TTT | bytes |{' step time |' * bool(times)} verdict |")
    print("|---|---|---|---|" + "---|" * bool(times) + "---|")
    scores = " | ".join(f"{score(core, kind):.4f}" for kind in noise)
    seeds = "spread of three seeds: " + ", ".join(f"{spread:.4f} {kind}" for kind, spread in noise.items())
    print(f"| core, seed {SEEDS[0]} | {scores} | {core['bytes_artifact']:,} |{' |' * bool(times)} {seeds} |")
    for name in [*TRAINED, *EXPORTED]:
        pairs = [(results.get(run_id(name, s)), results.get(run_id(base(name), s))) for s in SEEDS]
        pairs = [(new, old) for new, old in pairs if new is not None and old is not None]
        if name == "core" or not pairs:
            continue
        moved = {kind: statistics.fmean(score(n, kind) - score(o, kind) for n, o in pairs) for kind in noise}
        size = statistics.fmean(n["bytes_artifact"] - o["bytes_artifact"] for n, o in pairs)
        kind = "legal_ttt" if abs(moved["sliding_window"]) < 1e-9 else "sliding_window"
        seconds = times.get(name, {}).get("step_ms") if name in TRAINED else None
        time = f"{100 * (seconds / times['core']['step_ms'] - 1):+.0f} %" if seconds else ""
        settings = " ".join(f"{k}={v}" for k, v in (TRAINED | EXPORTED)[name].items())
        said = verdict(moved[kind], noise[kind]) + (f" ({len(pairs)} seeds)" if len(pairs) > 1 else "")
        print(
            f"| {name}: `{settings}` | {signed(moved['sliding_window'])} | {signed(moved['legal_ttt'])} "
            f"| {signed(size, 0)} |{f' {time} |' * bool(times)} {said} |"
        )
    return 0


TIMES = RESULTS.with_name("step_times.json")


def step_times() -> dict[str, dict]:
    return json.loads(TIMES.read_text(encoding="utf-8")) if TIMES.exists() else {}


def time_steps(arguments: argparse.Namespace) -> int:
    """Milliseconds of a step of each technique that trains: the median of six, alone on the machine."""
    times = step_times()
    for name, settings in TRAINED.items():
        if name in times:
            continue
        environ = os.environ | recipe() | {key: str(value) for key, value in settings.items()}
        environ |= dict(ITERATIONS="8", TRAIN_LOG_EVERY="1", EVAL_STRIDE="0", TTT_ENABLED="0", ENABLE_LOOPING_AT="0")
        environ |= dict(LATE_QAT_THRESHOLD="0", DATA_PATH=arguments.data, OUT_DIR=arguments.out)
        environ |= dict(RUN_ID=f"time-{run_id(name, 0)}", OMP_NUM_THREADS="2", OMP_WAIT_POLICY="PASSIVE")
        done = subprocess.Popen(
            [sys.executable, "-u", ROOT / "train_gpt.py"], env=environ, stdout=subprocess.PIPE, text=True
        )
        marks = []
        for line in done.stdout:
            if found := re.match(r"step:\d+/8 train_loss:.* train_time:(\d+)ms", line):
                marks.append(int(found[1]))
                if len(marks) == 8:
                    done.terminate()  # the rest is no part of the measurement
        done.wait()
        times[name] = dict(step_ms=statistics.median(b - a for a, b in itertools.pairwise(marks[1:])))
        print(name, times[name], flush=True)
        TIMES.write_text(json.dumps(times, indent=1) + "\n", encoding="utf-8")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run")
    command.add_argument("names", nargs="*")
    command.add_argument("--data", required=True)
    command.add_argument("--out", required=True)
    command.add_argument("--jobs", type=int, default=2)
    command.set_defaults(call=run)
    command = commands.add_parser("time")
    command.add_argument("--data", required=True)
    command.add_argument("--out", required=True)
    command.set_defaults(call=time_steps)
    commands.add_parser("table").set_defaults(call=table)
    arguments = parser.parse_args()
    return arguments.call(arguments)


if __name__ == "__main__":
    sys.exit(main())
