"""Each technique switched on or off on top of one recipe, one line per finished run; ended runs are not repeated.

    python records/ablate.py run --data $DATA_PATH --out $OUT [NAME…]     what is missing in the results, or these
    python records/ablate.py table                                        README's table from the results

Runs go `--jobs` at a time with one thread each. Techniques that train are trained anew; those of quantization and
evaluation start from the core's saved weights (EXPORT_ONLY).
"""

import argparse
import json
import os
import re
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
EXPORTED: dict[str, dict] = {}


def wanted() -> dict[str, tuple[int, dict]]:
    """Run id: (seed, settings), in the order in which they are made."""
    runs = {}
    for name, settings in TRAINED.items():
        for seed in SEEDS if name in THREE_SEEDS else SEEDS[:1]:
            runs[run_id(name, seed)] = (seed, settings)
    return runs


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run")
    command.add_argument("names", nargs="*")
    command.add_argument("--data", required=True)
    command.add_argument("--out", required=True)
    command.add_argument("--jobs", type=int, default=2)
    command.set_defaults(call=run)
    arguments = parser.parse_args()
    return arguments.call(arguments)


if __name__ == "__main__":
    sys.exit(main())
