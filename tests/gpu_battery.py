"""The parts of tests/gpu_battery.sh, which says how to call it. Each is a process of its own, so that none takes
another with it, and prints its figures as it has them: what is cut short still tells.

A part ends in one line, `battery:<part> ok|FAIL|skip figures`. What it prints besides is in OUT/log.txt.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGES = {  # what a run may lack, and what that costs
    "sentencepiece": "data, chain, lora, evaluation, audit, group, resume",
    "constriction": "COMPRESSOR=ans in chain, which takes lzma instead",
    "zstandard": "COMPRESSOR=zstd, which no part uses",
    "triton": "everything compiled: step, evaluation, variants, frontier, qat, reductions",
    "flash_attn_interface": "FlashAttention 3 (ATTENTION=fa3)",
    "flash_attn": "FlashAttention 2 (ATTENTION=fa2)",
}

# Settings of small models: on a GPU where size does not matter, and of the whole dry run.
SMALL = dict(NUM_LAYERS=6, MODEL_DIM=128, NUM_HEADS=4, NUM_KV_HEADS=2, VE_LAYERS="4,5", TRAIN_SEQ_LEN=256)
SMALL |= dict(EVAL_SEQ_LEN=256, TRAIN_BATCH_TOKENS=8192, TTT_CHUNK_TOKENS=8192)
SHALLOW = dict(NUM_LAYERS=3, VE_LAYERS="1,2", XSA_LAST_N=2)  # the default model with few layers, where each is compiled
TINY = dict(NUM_LAYERS=2, MODEL_DIM=32, NUM_HEADS=4, NUM_KV_HEADS=2, ROPE_DIMS=4, XSA_LAST_N=1, BIGRAM_VOCAB_SIZE=64)
TINY |= dict(BIGRAM_DIM=8, VE_DIM=8, VE_LAYERS="1", TRAIN_SEQ_LEN=32, EVAL_SEQ_LEN=32, TRAIN_BATCH_TOKENS=512)
TINY |= dict(
    VAL_BATCH_SIZE=2048,
    EVAL_STRIDE=16,
    TTT_CHUNK_TOKENS=2048,
    TTT_EPOCHS=1,
    TTT_LORA_CHUNK=32,
    DEVICE="cpu",
    MUON_BACKEND_STEPS=2,
)


class Skip(Exception):
    """Why a part has nothing to do here."""


def figure(**figures) -> None:
    """Figures of this part's line, as soon as they are known."""
    for name, value in figures.items():
        value = f"{value:.4g}" if isinstance(value, float) else str(value).replace(" ", "_")
        print(f"figure {name}:{value}", flush=True)


def expect(holds: bool, what: str) -> None:
    """A check of this part. The others still follow: one call should tell as much as it can."""
    if not holds:
        print(f"problem {what}", flush=True)


class Bench:
    """What every part needs to know: where it runs and where it keeps what others build on."""

    def __init__(self, cpu: bool, out: Path, work: Path):
        self.cpu, self.out, self.work = cpu, out, work
        self.data, self.artifact = work / "data", work / "chain" / "runs" / "chain" / "artifact.pgolf"

    @property
    def device(self):
        import torch

        return torch.device("cpu" if self.cpu else "cuda")

    def settings(self, small: bool = False, **changes) -> dict[str, str]:
        """An environment: the defaults, or a small model; always tiny in a dry run."""
        base = TINY if self.cpu else SMALL if small else {}
        base = dict(MAX_WALLCLOCK_SECONDS=0, EVAL_MAX_SECONDS=0, TRAIN_LOG_EVERY=20, VAL_LOSS_EVERY=0) | base
        return {name: str(value) for name, value in (base | changes).items()}

    def on_data(self, name: str, small: bool = False, **changes) -> dict[str, str]:
        """The same for a run on the prepared text; its results go to `name`."""
        if not (self.data / "manifest.json").exists():
            raise Skip("needs the text that the part data prepares")
        vocab = json.loads((self.data / "manifest.json").read_text())["tokenizer"]["vocab_size"]
        where = dict(DATA_PATH=self.data, OUT_DIR=self.work / name, RUN_ID=name, VOCAB_SIZE=vocab)
        return self.settings(small, **(where | changes))

    def on_artifact(self, name: str, **changes) -> dict[str, str]:
        """EVAL_ONLY of the artifact that the part chain leaves."""
        if not self.artifact.exists():
            raise Skip("needs the artifact that the part chain leaves")
        found = self.on_data(name)
        kept = {
            key: found[key] for key in ("DATA_PATH", "OUT_DIR", "RUN_ID", "EVAL_MAX_SECONDS", "DEVICE") if key in found
        }
        return kept | {
            key: str(value) for key, value in (dict(EVAL_ONLY=1, ARTIFACT_PATH=self.artifact) | changes).items()
        }


def carry_out(environ: dict[str, str]) -> dict:
    """A run of train_gpt.py in this process: its result. Raises AssertionError where its exit code is not 0."""
    import torch

    import train_gpt as pg

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # peaks are this run's
    code = pg.main([], environ)
    if code:
        raise AssertionError(f"train_gpt.py ended with exit code {code}")
    return json.loads((Path(environ["OUT_DIR"]) / "runs" / environ["RUN_ID"] / "result.json").read_text())


def scores(result: dict) -> dict[str, float]:
    """Nats per token of every pass, by the pass's short name."""
    return {name.removeprefix("final_"): score["val_loss"] for name, score in result["scores"].items()}


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(work: Callable, repeats: int = 5) -> float:
    """Median milliseconds of work(), after two calls to warm up."""
    spent = []
    for i in range(repeats + 2):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        if i >= 2:
            spent.append(1000 * (time.perf_counter() - start))
    return statistics.median(spent)


def matmul_peak(bench: Bench) -> float:
    """FLOP/s of a square bf16 product: what utilisation is measured against."""
    import torch

    n = 256 if bench.cpu else 8192
    a, b = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / (milliseconds(lambda: a @ b, 10) / 1000)


def hyperparameters(environ: dict[str, str]):
    import train_gpt as pg

    return pg.Hyperparameters.from_env(environ)


def make_run(bench: Bench, hp):
    """A run without files, tokenizer or text: synthetic tokens, as a warm-up has them."""
    import helpers
    import numpy as np

    import train_gpt as pg

    shard = bench.work / "synthetic.bin"
    if not shard.exists():
        write_shard(shard, helpers.random_tokens(4_000_000 if not bench.cpu else 20_000, 256, document=1000))
    run = helpers.make_run(hp, pg.TokenStream([shard], hp.vocab_size), np.ones(2, np.uint16))
    attention, attend = pg.choose_attention(hp, run.ranks.device, run.dtype)
    figure(attention=attention.split()[0], dtype=str(run.dtype).removeprefix("torch."))
    print(f"attention: {attention}")
    return run._replace(attend=attend, compile=pg.Compiled(*[hp.compile != "0"] * 4))


def write_shard(path: Path, tokens) -> None:
    import numpy as np

    import train_gpt as pg

    header = np.zeros(256, "<i4")
    header[:3] = pg.SHARD_MAGIC, pg.SHARD_VERSION, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def cut_split(bench: Bench, name: str, tokens) -> Path:
    """A folder with these tokens as the text to score."""
    folder = bench.work / name
    folder.mkdir(exist_ok=True)
    shutil.copy(next(bench.data.glob("*.model")), folder)  # no manifest: it describes another text
    write_shard(folder / "fineweb_val_000000.bin", tokens)
    return folder


def graphs() -> int:
    """Graphs compiled so far in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


# ----------------------------------------------------------------------------------------------------------------------
# Parts
# ----------------------------------------------------------------------------------------------------------------------


def machine(bench: Bench) -> None:
    """What is here and what is missing, the peak of a bf16 product and of a copy."""
    import torch

    figure(python=sys.version.split()[0], torch=torch.__version__, cuda=torch.version.cuda, cpus=os.cpu_count())
    if not bench.cpu:
        with contextlib.suppress(FileNotFoundError):
            subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv"], timeout=10)
        properties = torch.cuda.get_device_properties(0)
        figure(gpus=torch.cuda.device_count(), device=properties.name, memory_mib=properties.total_memory >> 20)
        figure(nccl=".".join(map(str, torch.cuda.nccl.version())), c_compiler=shutil.which("gcc") or shutil.which("cc"))
    figure(matmul_tflops=matmul_peak(bench) / 1e12)
    a = torch.empty(1 << (20 if bench.cpu else 31), dtype=torch.uint8, device=bench.device)
    b = torch.empty_like(a)
    figure(copy_gbytes_per_s=2 * len(a) / milliseconds(lambda: b.copy_(a)) / 1e6)


def prepare(bench: Bench, out: Path, vocab_size: int) -> dict:
    """Token shards of real text, by data/prepare.py: the manifest's splits."""
    text = Path(os.environ.get("REAL_TEXT_DIR", ""))
    command = [sys.executable, HERE.parent / "data" / "prepare.py"]
    if bench.cpu:
        command += ["offline", "--max-bytes", "300000", "--vocab-size", "512", "--val-docs", "4", "--workers", "1"]
    elif os.environ.get("REAL_TEXT_DIR"):
        command += ["text", text / "webmix_train.jsonl.gz", "--val", text / "fineweb_val_450.jsonl.gz"]
        command += ["--tokenizer", text / f"fineweb_{vocab_size}_bpe.model"]
    else:
        command += ["offline", "--val-docs", "300", "--vocab-size", str(vocab_size)]
    subprocess.run([*command, "--out", out], check=True)
    return json.loads((out / "manifest.json").read_text())["splits"]


def recipe(name: str) -> dict[str, str]:
    """The settings of records/recipes/NAME.env."""
    lines = (HERE.parent / "records/recipes" / f"{name}.env").read_text("utf-8").splitlines()
    return dict(line.split("=") for line in lines if line and not line.startswith("#"))


def data(bench: Bench) -> None:
    """The text that most parts train on and score."""
    splits = prepare(bench, bench.data, 1024)
    figure(**{f"{split}_tokens": content["tokens"] for split, content in splits.items()})


def step(bench: Bench, **changes) -> None:
    """The default model compiled: the training loop as it is, timed by its own clock; then where a step's time goes."""
    import torch
    from bench import step_flops

    import train_gpt as pg

    steps = 8
    hp = hyperparameters(
        bench.settings(
            ITERATIONS=steps,
            WARMDOWN_ITERS=0,
            WARMUP_STEPS=1,
            TRAIN_LOG_EVERY=0,
            COMPILE=1,
            LATE_QAT=0,
            VOCAB_SIZE=1024,
        )
        | {name: str(value) for name, value in changes.items()}
    )
    run = make_run(bench, hp)
    peak = matmul_peak(bench)
    trainer = pg.Trainer(run)
    trainer.warm_up()
    figure(warm_up_s=run.phases.seconds["warmup"], graphs=graphs())
    compiled = graphs()
    torch._logging.set_logs(recompiles=True)
    trainer.train()
    print("\n".join(run.log))
    ms = statistics.median(list(trainer.clock.durations)[2:])
    allocated, reserved = pg.peak_memory_mib(bench.device)
    figure(
        step_ms=ms,
        spread_ms=max(list(trainer.clock.durations)[2:]) - ms,
        tokens_per_s=hp.train_batch_tokens / ms * 1000,
    )
    flops = sum(step_flops(hp).values()) / (ms / 1000)
    figure(model_tflops=flops / 1e12, of_matmul_peak=flops / peak, peak_mib=allocated, reserved_mib=reserved)
    figure(loss=trainer.clock.loss, recompiled=graphs() - compiled)
    expect(
        graphs() == compiled,
        f"{graphs() - compiled} graphs were compiled inside the timed loop (see recompiles in the log)",
    )
    expect(math.isfinite(trainer.clock.loss), "the loss is not finite")
    inputs, targets = pg.BatchLoader(run.stream, hp, run.ranks, run.log).next()
    batch = pg.score_batch_windows(hp, run.ranks, hp.train_seq_len)  # the shape that the warm-up compiled
    text = [part.repeat(-(-batch // len(part)), 1)[:batch].contiguous() for part in (inputs, targets)]
    with torch.no_grad(), trainer.qat.switched(False):
        eager, forward = trainer.model(*text), trainer.forward(*text)
    off = (eager - forward).abs()
    figure(
        compiled_off_eager=(eager.mean() - forward.mean()).abs().item(), mean=off.mean().item(), most=off.max().item()
    )
    expect(off.mean() < 0.02, f"compiled scores are {off.mean():.3g} nats from eager ones")
    if not bench.cpu:
        synchronizations(trainer, inputs, targets)
    profile(bench, trainer, inputs, targets)


def synchronizations(trainer, inputs, targets) -> None:
    """The lines of train_gpt.py that make the host wait for the device inside a step."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        trainer.train_step(inputs, targets)
        torch.cuda.set_sync_debug_mode("default")
    called = [w for w in caught if "called a synchronizing" in str(w.message)]  # not: this is a prototype feature
    waits = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in called)
    figure(host_waits=sum(waits.values()), at=",".join(waits) or "none")


def profile(bench: Bench, trainer, inputs, targets) -> None:
    """The kernels of one step, the heaviest first, and the share of its time in which the device works."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    kind = "CPU" if bench.cpu else "CUDA"
    try:
        synchronize()
        with profile(activities={ProfilerActivity.CPU, getattr(ProfilerActivity, kind)}) as profiler:
            start = time.perf_counter()
            trainer.train_step(inputs, targets)
            launched = time.perf_counter() - start
            synchronize()
            spent = time.perf_counter() - start
    except RuntimeError as error:  # a machine may forbid it; the timings above stand
        return figure(profile=one_line(error))
    clock = f"self_{'cpu' if bench.cpu else 'device'}_time_total"
    kernels = [(getattr(e, clock), e) for e in profiler.key_averages() if e.device_type == getattr(DeviceType, kind)]
    figure(device_busy=sum(us for us, _ in kernels) / 1e6 / spent, launched_after=launched / spent)
    for us, e in sorted(kernels, key=lambda kernel: -kernel[0])[:30]:
        print(f"kernel {us / 1000:8.2f} ms {e.count:5d} x {e.key[:120]}")
    profiler.export_chrome_trace(str(bench.out / "step_trace.json.gz"))


def qat(bench: Bench) -> None:
    """The same with fake quantization: the graph of the warmdown."""
    step(bench, QAT_ENABLED=1)


def reductions(bench: Bench) -> None:
    """The same with sums over tokens and over channels in kernels of their own. torch 2.11 fuses them; one such kernel
    took 3.7 ms of each micro-batch on an H200, ten times what its bytes take."""
    from torch._inductor import config

    if not hasattr(config.triton, "mix_order_reduction"):
        raise Skip("this torch does not fuse them")
    config.triton.mix_order_reduction = False
    step(bench)


def card(bench: Bench) -> None:
    """gpu1.env, uncompiled, in the memory of the 24 GB card that it is for: what it takes, and its steps here."""
    import torch

    import train_gpt as pg

    steps = dict(ITERATIONS=3, WARMDOWN_ITERS=0, WARMUP_STEPS=0, TRAIN_LOG_EVERY=0, COMPILE=0, VOCAB_SIZE=1024)
    hp = hyperparameters(bench.settings(**({} if bench.cpu else recipe("gpu1")) | steps))
    if not bench.cpu:
        share = 24 * 2**30 / torch.cuda.get_device_properties(bench.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    run = make_run(bench, hp)
    trainer = pg.Trainer(run)
    trainer.warm_up()
    trainer.train()
    allocated, reserved = pg.peak_memory_mib(bench.device)
    predicted = pg.predict_memory(run) / 2**20
    figure(step_ms=trainer.clock.durations[-1], peak_mib=allocated, reserved_mib=reserved, predicted_mib=predicted)
    expect(math.isfinite(trainer.clock.loss), "the loss is not finite")


def attention(bench: Bench) -> None:
    """Every attention there is, under the default model with random weights: its scores and gradients against SDPA's
    and those of fp32 on CPU, its time at the training shape alone. Those that keep documents apart against SDPA so, in
    three layers: flex is compiled."""
    import helpers
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    import train_gpt as pg

    hp = hyperparameters(bench.settings(VOCAB_SIZE=1024))
    apart_hp = hyperparameters(bench.settings(VOCAB_SIZE=1024, DOCUMENT_MASK=1, **{} if bench.cpu else SHALLOW))
    rows, length = (2, hp.train_seq_len)
    text = torch.from_numpy(helpers.random_tokens(rows * (length + 1), 1024, document=length // 8).astype("int64"))
    inputs, targets = (part.contiguous() for part in (text.view(rows, -1)[:, :-1], text.view(rows, -1)[:, 1:]))

    def measure(attend: Callable, device, dtype, hp=hp) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = helpers.randomize(pg.GPT(hp, length, attend, dtype)).to(device)
        nats = pg.compiled(model, attend is pg.flex)(inputs.to(device), targets.to(device))
        nats.mean().backward()
        return nats.detach().cpu(), {name: p.grad.double().cpu() for name, p in model.named_parameters()}

    def forced(backend: SDPBackend) -> Callable:
        def attend(q, k, v, mask=None):
            with sdpa_kernel(backend):
                return pg.sdpa(q, k, v, mask)

        return attend

    kernels, apart = {"matmul": pg.matmul_attention}, {"matmul_apart": pg.matmul_attention}
    if not bench.cpu:
        apart["flex"] = pg.flex
    names = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    kernels |= {f"sdpa_{name.split('_')[0].lower()}": forced(getattr(SDPBackend, name)) for name in names}
    for kind in () if bench.cpu else ("fa3", "fa2"):
        with contextlib.suppress(ImportError):
            kernels[kind] = pg.load_flash(kind)
    exact, exact_gradients = measure(pg.sdpa, torch.device("cpu"), torch.float32)
    references = [measure(pg.sdpa, bench.device, torch.bfloat16, rules) for rules in (hp, apart_hp)]
    reference, gradients = references[False]
    joined, _ = measure(pg.sdpa, bench.device, torch.bfloat16, dataclasses.replace(apart_hp, document_mask=False))
    expect(not torch.equal(joined, references[True][0]), "masks at documents change no score")

    def gradients_off(ours, theirs) -> float:
        norms = [((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-30)).item() for n in ours]
        return statistics.median(norms)

    shape = (2, 64, 4, 8) if bench.cpu else (48, 2048, 8, 64)
    q, k, v = (
        torch.randn(*shape[:2], heads, shape[3], device=bench.device, dtype=torch.bfloat16, requires_grad=True)
        for heads in (shape[2], shape[2] // 2, shape[2] // 2)
    )

    def forward_and_backward(attend: Callable) -> None:
        attend(q, k, v).sum().backward()
        q.grad = k.grad = v.grad = None

    figure(sdpa_ms=milliseconds(lambda: forward_and_backward(pg.sdpa)))
    off = (reference - exact).abs()
    figure(
        sdpa_off_fp32=(reference.mean() - exact.mean()).abs().item(),
        gradients=gradients_off(gradients, exact_gradients),
    )
    expect(off.mean() < 0.05, f"SDPA in bf16 is {off.mean():.3g} nats from fp32 on CPU")
    for name, attend in (kernels | apart).items():
        reference, gradients = references[name in apart]
        try:
            nats, found = measure(attend, bench.device, torch.bfloat16, apart_hp if name in apart else hp)
        except Exception as error:  # whatever a kernel of another package raises, the others still tell
            if name.startswith("sdpa_") and re.search("No (available|viable)", str(error)):
                figure(**{name: "absent"})
            else:
                traceback.print_exc()
                expect(False, f"{name}: {one_line(error)}")
            continue
        off, gradient = (nats.mean() - reference.mean()).abs().item(), gradients_off(found, gradients)
        figure(**{name: off, f"{name}_gradients": gradient})
        expect(off <= 2e-3, f"{name} scores {off:.3g} nats from SDPA, more than 2e-3")
        expect(gradient <= 0.05, f"{name}'s gradients are {gradient:.3g} of their norm from SDPA's")
        if name not in ("sdpa_math", "matmul", *apart):  # whose memory grows with the square of the context
            figure(**{f"{name}_ms": milliseconds(functools.partial(forward_and_backward, attend))})
    if not bench.cpu:
        starts = torch.arange(shape[0] * shape[1], device=bench.device).view(shape[:2]) % 700 == 0

        def flex(q, k, v):
            return pg.flex(q, k, v, pg.flex_mask(starts, q.dtype))

        attend = torch.compile(flex, dynamic=False, fullgraph=True)
        figure(flex_ms=milliseconds(functools.partial(forward_and_backward, attend)))


def chain(bench: Bench) -> None:
    """Train a little, GPTQ in a trellis + rate-distortion + entropy coder, artifact, read back, sliding, TTT by SGD,
    then read and scored again."""
    coder = "ans" if importlib.util.find_spec("constriction") else "lzma"
    quantizer = dict(QUANT="rd", GPTQ_ENABLED=1, COMPRESSOR=coder, GPTQ_CALIBRATION_TOKENS=2048 if bench.cpu else 65536)
    quantizer |= dict(TRELLIS_ENABLED=int(coder == "ans"))
    shape = {} if bench.cpu else dict(TRAIN_BATCH_TOKENS=98304, MICRO_BATCH_TOKENS=32768, EVAL_STRIDE=256)
    steps = dict(ITERATIONS=12 if bench.cpu else 80, WARMDOWN_ITERS=10 if bench.cpu else 60, WARMUP_STEPS=1)
    steps |= dict(MUON_MOMENTUM_WARMUP_STEPS=20, EMA_DECAY=0.9, COMPILE=0)
    start = time.perf_counter()
    result = carry_out(bench.on_data("chain", **quantizer, **shape, **steps))
    found, seconds = scores(result), result["phase_seconds"]
    figure(run_s=time.perf_counter() - start, phases_s=sum(seconds.values()))
    figure(compressor=coder, bytes=result["bytes_artifact"], **found)
    figure(**{f"{phase}_s": seconds[phase] for phase in ("calibrate", "quantize", "compress", "score", "adapt")})
    figure(train_peak_mib=result["peak_memory_mib"])
    grid = next(name for name in found if name.endswith("_roundtrip")).removesuffix("_roundtrip")
    plain, sliding = found[f"{grid}_roundtrip"], found[f"{grid}_sliding_window"]
    expect(plain < math.log(512), f"training learned nothing: {plain:.3f} nats")
    expect(
        abs(plain - found["float_ema"]) < 0.05,
        f"the artifact is {plain - found['float_ema']:+.3f} nats from its weights",
    )
    expect(sliding < plain + 0.02, f"more context makes it worse: {sliding:.4f} against {plain:.4f}")
    again = carry_out(bench.on_artifact("repeated", TTT_ENABLED=0, COMPILE=0))
    moved = max(abs(found[name] - scores(again)[name]) for name in (f"{grid}_roundtrip", f"{grid}_sliding_window"))
    figure(repeats_to=moved)
    expect(moved <= (0 if bench.cpu else 1e-4), f"the artifact's scores do not repeat: {moved:.2g} nats")


def lora(bench: Bench) -> None:
    """The chain's artifact with LoRAs and phases, uncompiled as they always are, on the first documents of the text."""
    import numpy as np

    import train_gpt as pg

    adapted = dict(TTT_PARAMS="lora", TTT_OPTIMIZER="adamw", TTT_LR=0.01, TTT_MOMENTUM=0, TTT_WARM_START_A=1)
    adapted |= dict(PHASED_TTT_NUM_PHASES=1, TTT_EPOCHS=1, COMPILE=0)
    environ = bench.on_artifact("lora", **adapted)
    tokens = pg.read_shard(next(bench.data.glob("fineweb_val_*.bin")))
    starts = [*np.flatnonzero(tokens == pg.BOS_ID), len(tokens)]
    documents = min(100, len(starts) - 1)
    environ["DATA_PATH"] = str(cut_split(bench, "documents", tokens[: starts[documents]]))
    score, learn, spent = pg.DocumentLoRA.score, pg.DocumentLoRA.learn, {}

    def timed(work: Callable) -> Callable:
        def timed(self, tokens, segment, *bar):
            synchronize()
            start = time.perf_counter()
            result = work(self, tokens, segment, *bar)
            synchronize()
            if len(segment.windows):
                shape = len(segment.windows), int(segment.windows[0, 1] - segment.windows[0, 0])
                spent.setdefault((work.__name__, *shape), []).append(1000 * (time.perf_counter() - start))
            return result

        return timed

    pg.DocumentLoRA.score, pg.DocumentLoRA.learn = timed(score), timed(learn)
    result = carry_out(environ)
    found, seconds = scores(result), result["phase_seconds"]
    for name in ("score", "learn"):
        first = [ms[0] for (what, *_), ms in spent.items() if what == name]
        again = [ms for (what, *_), times in spent.items() if what == name for ms in times[1:]]
        figure(**{f"{name}_shapes": len(first), f"{name}_new_shape_ms": statistics.median(first)})
        figure(
            **{f"{name}_again_ms": statistics.median(again) if again else "none", f"{name}_calls": len(first + again)}
        )
    figure(documents=documents, eval_seconds=result["eval_seconds"], score_s=seconds["score"])
    figure(adapt_s=seconds["adapt"], peak_mib=result["peak_memory_mib"], **found)
    plain = next(nats for name, nats in found.items() if name.endswith("_roundtrip"))
    expect(found["legal_ttt"] < plain, f"adapters learned nothing: {found['legal_ttt']:.4f} against {plain:.4f} nats")


def frontier(bench: Bench) -> None:
    """frontier.env as one of eight GPUs carries it, whole: steps before and after the layers loop, compiled, weights in
    a trellis fitted to the cap, and all passes over the text."""
    from bench import step_flops

    import train_gpt as pg

    prepare(bench, bench.work / "data_8192", 8192)
    share = dict(TRAIN_BATCH_TOKENS=98304, VAL_BATCH_SIZE=131072, GPTQ_CALIBRATION_TOKENS=196608)
    share |= dict(ITERATIONS=20, ENABLE_LOOPING_AT=0.5, MUON_MOMENTUM_WARMUP_STEPS=10, EMA_DECAY=0.9)
    share |= dict(MAX_WALLCLOCK_SECONDS=0, EVAL_MAX_SECONDS=100, COMPILE=int(bench.cpu) or "auto")
    if bench.cpu:
        share |= TINY | dict(NUM_LAYERS=6, LOOP_START=1, LOOP_END=1, PARALLEL_START_LAYER=4, XSA_LAST_N=6)
        share |= dict(GATE_WINDOW=4, TTT_LORA_RANK=4, GPTQ_CALIBRATION_TOKENS=2048, VOCAB_SIZE=512)
    environ = recipe("frontier") | dict(DATA_PATH=bench.work / "data_8192", OUT_DIR=bench.work / "frontier") | share
    environ = {name: str(value) for name, value in (environ | dict(RUN_ID="frontier")).items()}
    hp, peak, train = hyperparameters(environ), matmul_peak(bench), pg.Trainer.train

    def timed(self) -> None:
        figure(warm_up_s=self.run.phases.seconds["warmup"], graphs=graphs())
        compiled = graphs()
        train(self)
        times, half = list(self.clock.durations), hp.iterations // 2
        plain, looped = statistics.median(times[2:half]), statistics.median(times[half + 1 :])
        flops = sum(step_flops(hp).values())
        figure(plain_ms=plain, looped_ms=looped, looped_of_peak=flops / looped * 1000 / peak)
        figure(train_peak_mib=pg.peak_memory_mib(bench.device)[0], recompiled=graphs() - compiled)
        expect(graphs() == compiled, f"{graphs() - compiled} graphs were compiled inside the timed loop")

    pg.Trainer.train = timed
    result = carry_out(environ)
    figure(bytes=result["bytes_artifact"], of=hp.artifact_cap_bytes, peak_mib=result["peak_memory_mib"])
    figure(**{f"{phase}_s": seconds for phase, seconds in result["phase_seconds"].items()})
    figure(eval_seconds=result["eval_seconds"], **scores(result))


def evaluation(bench: Bench) -> None:
    """The chain's artifact on a million tokens in windows, compiled: seconds of every pass, and no graph compiled after
    its warm-up. Without test-time training, whose graph takes as long to compile as the part step."""
    import numpy as np

    import train_gpt as pg

    environ = bench.on_artifact("evaluation", COMPILE=1, EVAL_STRIDE=16 if bench.cpu else 64, TTT_ENABLED=0)
    tokens, million = pg.read_shard(next(bench.data.glob("fineweb_val_*.bin"))), 6_000 if bench.cpu else 1_000_000
    folder = cut_split(bench, "million", np.resize(tokens, million + 1))
    warm_up, warm = pg.Evaluation.warm_up, {}

    def counted(self) -> None:
        start = time.perf_counter()
        warm_up(self)
        warm.update(graphs=graphs(), seconds=time.perf_counter() - start)
        figure(warm_up_s=warm["seconds"], graphs=warm["graphs"])

    pg.Evaluation.warm_up = counted
    result = carry_out(environ | dict(DATA_PATH=str(folder)))
    seconds = result["phase_seconds"]
    figure(eval_seconds=result["eval_seconds"], score_s=seconds["score"])
    passed = result["eval_seconds"] - warm["seconds"]
    figure(per_million_s=passed / million * 1e6, peak_mib=result["peak_memory_mib"], **scores(result))
    expect(graphs() == warm["graphs"], f"{graphs() - warm['graphs']} graphs were compiled after the warm-up")


def audit(bench: Bench) -> None:
    """The auditor on the chain's artifact: how far scores move that must not, against its tolerances."""
    import torch
    from forks import forked

    import train_gpt as pg

    sys.path.append(str(HERE.parent))
    from records import audit

    if not bench.artifact.exists():
        raise Skip("needs the artifact that the part chain leaves")
    words = [bench.artifact, "--script", pg.__file__, "--data", bench.data, "--tokens", 256 if bench.cpu else 16384]
    environ = os.environ | dict(COMPILE="0", DEVICE="cpu" if bench.cpu else "cuda")
    with torch.device("meta"):  # for which torch loads parts of itself: once, before there are forks
        pg.GPT(pg.Hyperparameters(), 2, pg.sdpa, torch.float32)
    code = audit.audit(audit.parse([str(word) for word in words]), environ, forked)
    told = json.loads((bench.artifact.parent / "audit.json").read_text())
    for name, finding in told["audit"].items():
        figure(**{name: ("" if finding["passed"] else "FAIL ") + finding["figure"]})
        expect(finding["passed"], f"audit:{name} {finding['figure']}")
    figure(audit_s=told["seconds"], texts=len(told["seconds_by_text"]))
    expect(code == 0, f"exit code {code}")


class One(int):
    """A world of one that takes the road of many: every collective is made."""

    def __gt__(self, other) -> bool:
        return True

    def __eq__(self, other) -> bool:
        return False

    __hash__ = int.__hash__


def group(bench: Bench) -> None:
    """Every collective of a run, over NCCL in a group of one (two ranks on one GPU are refused by NCCL): the same
    scores as without a group. With several GPUs, or on CPU, also two processes."""
    import train_gpt as pg

    steps = dict(
        ITERATIONS=4, WARMDOWN_ITERS=2, WARMUP_STEPS=1, GPTQ_ENABLED=1, GPTQ_CALIBRATION_TOKENS=2048, COMPILE=0
    )
    steps |= dict(CHECKPOINT_EVERY=0.001, EVAL_STRIDE=0, TTT_ENABLED=0, MAX_WALLCLOCK_SECONDS=3600)
    alone = scores(carry_out(bench.on_data("alone", small=True, **steps)))

    class Grouped(pg.Ranks):
        size = property(lambda self: One(1), lambda self, value: None)

    plain, pg.Ranks = pg.Ranks, Grouped
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    torchruns = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ |= torchruns
    grouped = scores(carry_out(bench.on_data("grouped", small=True, **steps) | torchruns))
    pg.Ranks = plain
    off = max(abs(alone[name] - grouped[name]) for name in alone)
    figure(backend="gloo" if bench.cpu else "nccl", off=off)
    expect(off <= (0 if bench.cpu else 0.02), f"the group's scores are {off:.3g} nats from those without one")
    if bench.cpu or pg.torch.cuda.device_count() > 1:
        environ = bench.on_data("two", small=True, **steps)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", pg.__file__]
        subprocess.run(command, env=outer_environ(environ), check=True)
        two = json.loads((bench.work / "two/runs/two/result.json").read_text())
        off = max(abs(alone[name] - score) for name, score in scores(two).items())
        figure(two_off=off)
        expect(off <= 0.02, f"two processes end {off:.3g} nats from one")


def resume(bench: Bench) -> None:
    """kill -9 after a checkpoint and the same command again, beside a run that nobody disturbs."""
    import train_gpt as pg

    steps = dict(ITERATIONS=60 if bench.cpu else 150, WARMDOWN_ITERS=30, WARMUP_STEPS=1, COMPILE=0)
    steps |= dict(CHECKPOINT_EVERY=0.05 if bench.cpu else 0.5, EVAL_STRIDE=0, TTT_ENABLED=0, RESUME="auto")
    runs = {name: outer_environ(bench.on_data(name, small=True, **steps)) for name in ("undisturbed", "killed")}
    start = functools.partial(subprocess.Popen, [sys.executable, pg.__file__])
    undisturbed, killed = start(env=runs["undisturbed"]), start(env=runs["killed"], stdout=subprocess.PIPE, text=True)
    for line in killed.stdout:
        print("killed:", line, end="")
        if line.startswith("checkpoint:written"):
            killed.kill()
            break
    expect(killed.wait() == -signal.SIGKILL, f"the run ended with {killed.returncode} before it could be killed")
    resumed = subprocess.run([sys.executable, pg.__file__], env=runs["killed"])
    expect(resumed.returncode == 0, f"the resumed run ended with {resumed.returncode}")
    expect(undisturbed.wait() == 0, f"the undisturbed run ended with {undisturbed.returncode}")
    results = [json.loads((bench.work / name / "runs" / name / "result.json").read_text()) for name in runs]
    whole, again = map(scores, results)
    off = max(abs(whole[name] - again[name]) for name in whole)
    figure(resumed_at=results[1]["resumed_at"], off=off)
    expect(bool(results[1]["resumed_at"]), "the run began anew")
    expect(off <= (0 if bench.cpu else 0.02), f"the resumed run ends {off:.3g} nats from the undisturbed one")


LAST = "the last layer"
VARIANTS = {  # between them every branch of the model's forward
    "default": {},
    "more": dict(QAT_ENABLED=1, NUM_LOOPS=2, LOOP_START=1, LOOP_END=1, MLP_KIND="swiglu", VALUE_RESIDUAL=1)
    | dict(GATED_ATTENTION=1, NUM_KV_HEADS=4, ROPE_DIMS=0, SKIP_GATES_ENABLED=1, SPARSE_ATTN_GATE_ENABLED=1)
    | dict(SMEAR_GATE_KIND="token"),
    "less": dict(MLP_KIND="star_relu", TIE_EMBEDDINGS=0, BIGRAM_VOCAB_SIZE=0, SMEAR_GATE_ENABLED=0, VE_ENABLED=0)
    | dict(XSA_LAST_N=0, UNET_SKIPS=0, LN_SCALE=0, PARALLEL_START_LAYER=LAST),
}


def variants(bench: Bench) -> None:
    """Every branch of the model compiled without a break, its nats and gradients against eager: trained, with frozen
    blocks, and scored (also at several temperatures)."""
    import helpers
    import torch

    import train_gpt as pg

    for name, changes in VARIANTS.items():
        shape = {} if bench.cpu else dict(NUM_LAYERS=4, VE_LAYERS="2,3")  # each layer is compiled
        settings = bench.settings(small=True, VOCAB_SIZE=512, COMPILE=1, **shape)
        last = int(settings["NUM_LAYERS"]) - 1
        hp = hyperparameters(settings | {k: str(last if v == LAST else v) for k, v in changes.items()})
        run = helpers.make_run(hp)
        model = helpers.randomize(run.build(hp.train_seq_len)).to(bench.device)
        qat, forward = pg.QAT(model, hp), pg.compiled(model, True)
        qat.refresh()
        qat.set(hp.qat_enabled)
        text = torch.from_numpy(helpers.random_tokens(4 * (hp.train_seq_len + 1), 512).astype("int64")).to(bench.device)
        inputs, targets = (part.contiguous() for part in (text.view(4, -1)[:, :-1], text.view(4, -1)[:, 1:]))

        def both(what: str, work: Callable) -> None:
            """work(forward) gives (nats, gradients or None)."""
            try:
                (ours, gradients), (theirs, wanted) = work(forward), work(model)  # noqa: B023
            except Exception as error:
                traceback.print_exc()
                return expect(False, f"{name} {what}: {one_line(error)}")  # noqa: B023
            off = (ours - theirs).abs().mean().item()
            turned = ((gradients - wanted).norm() / wanted.norm()).item() if gradients is not None else 0.0
            figure(**{f"{name}_{what}": f"{off:.2g}/{turned:.2g}"})  # noqa: B023
            expect(off < 0.02 and turned < 0.05, f"{name} {what}: {off:.3g} nats and {turned:.3g} of the gradient off")  # noqa: B023

        def trained(f: Callable) -> tuple:
            model.zero_grad()  # noqa: B023
            nats = f(inputs, targets)  # noqa: B023
            nats.mean().backward()
            return nats.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])  # noqa: B023

        def scored(f: Callable, *temperatures: tuple[float, ...]) -> tuple:
            with torch.no_grad():
                return f(inputs, targets[:, -8:].contiguous(), *temperatures), None  # noqa: B023

        both("train", trained)
        both("score", scored)
        if name != "default":
            continue
        both("temperatures", lambda f: scored(f, (0.9, 1.0)))
        for p in model.blocks[0].parameters():
            p.requires_grad_(False)
        both("frozen", trained)


PARTS: dict[str, tuple[int, Callable[[Bench], None]]] = {  # seconds each may take; what it leaves, later ones may use
    "machine": (10, machine),
    "data": (20, data),
    "step": (105, step),
    "chain": (80, chain),
    "lora": (55, lora),
    "evaluation": (105, evaluation),
    "attention": (50, attention),
    "group": (20, group),
    "resume": (25, resume),
    "card": (10, card),
}
LONGER = {  # only where asked for
    "audit": (150, audit),
    "variants": (180, variants),
    "frontier": (500, frontier),
    "qat": (110, qat),
    "reductions": (110, reductions),
}
ALL = PARTS | LONGER


# ----------------------------------------------------------------------------------------------------------------------
# One part in its process, and all of them in order
# ----------------------------------------------------------------------------------------------------------------------


def one_line(error: BaseException) -> str:
    """Type and the first telling lines of an error's text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:300]}"


def place(stack: traceback.StackSummary) -> str:
    """Where in this project a stack ends."""
    here = [f for f in stack if "battery" in f.filename or "train_gpt" in f.filename]
    return f" ({Path(here[-1].filename).name}:{here[-1].lineno})" if here else ""


def carry_out_part(bench: Bench, name: str, script: Path, seconds: float) -> int:
    """Exit code 0, or 1 with a `problem` line, or 0 with a `skip` line. Says where it stands before it is cut short."""
    sys.path[:0] = [str(script), str(HERE)]
    signal.signal(
        signal.SIGALRM, lambda _, frame: print(f"problem stood{place(traceback.extract_stack(frame))}", flush=True)
    )
    signal.setitimer(signal.ITIMER_REAL, max(0.5, seconds - 1))
    import torch

    if bench.cpu:  # inductor's C++ would take longer than the whole dry run
        torch.compile = functools.partial(torch.compile, backend="eager")
    try:
        ALL[name][1](bench)
    except Skip as reason:
        print(f"skip {reason}", flush=True)
    except BaseException as error:
        traceback.print_exc()
        print(f"problem {one_line(error)}{place(traceback.extract_tb(error.__traceback__))}", flush=True)
        return 1
    return 0


def outer_environ(settings: dict[str, str]) -> dict[str, str]:
    """This environment for a process of its own, with these settings and no others."""
    import train_gpt as pg

    names = {f.name.upper() for f in pg.dataclasses.fields(pg.Hyperparameters)} | set(pg.PUBLIC_NAMES)
    names |= {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {name: value for name, value in os.environ.items() if name not in names} | settings


def run_part(name: str, seconds: float, command: list, log: Path) -> tuple[str, str]:
    """(ok | FAIL | skip, figures and what went wrong) of one part, whose output is added to the log."""
    begin, start = log.stat().st_size, time.monotonic()
    environ = dict(os.environ) | {"TORCHINDUCTOR_CACHE_DIR": str(Path(command[-1]) / "inductor")}
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environ, start_new_session=True)
        try:
            code = process.wait(max(1, seconds))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):  # also what it started itself
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_bytes()[begin:].decode(errors="replace").splitlines()
    told = {
        word: [line[len(word) + 1 :] for line in lines if line.startswith(word + " ")]
        for word in ("figure", "problem", "skip")
    }
    problems, figures = [*told["problem"]], [f"seconds:{time.monotonic() - start:.1f}", *told["figure"]]
    if code is None:
        problems.append(f"not done after {seconds:.0f} s")
    elif code and not problems:
        problems.append(f"ended with exit code {code}")
    if problems:  # what the run itself said last
        problems += [line for line in lines if re.match(r"(error|limit|interrupted): ", line)][-1:]
        if code is None or (code and not told["problem"]):
            problems += [line.strip() for line in lines if line.strip()][-1:]
    status = "FAIL" if problems else "skip" if told["skip"] else "ok"
    return status, " ".join(figures + told["skip"]) + "".join(f" | {problem}" for problem in problems)


def describe(cpu: bool) -> Iterator[str]:
    """What to know before any part: when, which commit, and which packages are missing."""
    git = ["git", "-C", str(HERE.parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    except FileNotFoundError:
        commit = "unknown"
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ")
    mode, real = "cpu" if cpu else "gpu", int("REAL_TEXT_DIR" in os.environ)
    yield f"battery:begin date:{date} commit:{commit} mode:{mode} real_text:{real}"
    missing = [f"{name} ({cost})" for name, cost in PACKAGES.items() if importlib.util.find_spec(name) is None]
    yield f"battery:packages missing: {'; '.join(missing) or 'none'}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/gpu_battery.sh", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of summary.txt and log.txt; made if need be")
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (without any: these) or {', '.join(LONGER)}"
    )
    parser.add_argument("--cpu", action="store_true", help="tiny and on CPU: a dry run of the battery")
    parser.add_argument("--script", type=Path, default=HERE.parent, metavar="FOLDER", help="of the train_gpt.py to try")
    parser.add_argument(
        "--work", type=Path, help="folder of data, artifacts and compiled graphs, kept for another call"
    )
    parser.add_argument("--one", type=float, help=argparse.SUPPRESS)  # a part in its own process, and its seconds
    args = parser.parse_args()
    if unknown := set(args.parts) - set(ALL):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    if args.one is not None:
        return carry_out_part(Bench(args.cpu, args.out, args.work), args.parts[0], args.script, args.one)
    args.out.mkdir(parents=True, exist_ok=True)
    work = args.work or Path(tempfile.mkdtemp(prefix="gpu_battery_"))
    work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    log, left, failed = args.out / "log.txt", 0.0, 0
    with (args.out / "summary.txt").open("a") as summary:

        def tell(line: str) -> None:
            print(line, flush=True)
            summary.write(line + "\n")
            summary.flush()

        try:
            for line in describe(args.cpu):
                tell(line)
            for name in args.parts or PARTS:
                with log.open("a") as file:
                    file.write(f"===== {name} =====\n")
                left += ALL[name][0] * (20 if args.cpu else 1)  # a dry run only has to end
                command = [sys.executable, __file__, str(args.out), name, "--script", str(args.script)]
                command += ["--one", str(left)] + ["--cpu"] * args.cpu + ["--work", str(work)]
                start = time.monotonic()
                status, figures = run_part(name, left, command, log)
                left -= time.monotonic() - start
                failed += status == "FAIL"
                tell(f"battery:{name} {status} {figures}")
            tell(f"battery:end failed:{failed}")
        finally:
            if args.work is None:
                shutil.rmtree(work, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
