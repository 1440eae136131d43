#!/usr/bin/env python3
"""Parameter golf in one file: text shards in, a scored artifact of at most 16,000,000 bytes (code included) out.

A run trains an 11-layer GPT with Parallel Muon, averages its weights (EMA, tight SWA), quantizes them to int6/int8 on
the grid that late QAT trained for, writes one compressed artifact, reads that artifact back from disk and scores it on
the validation split in bits per byte: plain windows, sliding windows, and legal score-first test-time training (TTT).

    python train_gpt.py                                               CPU, or one GPU where there is one
    torchrun --standalone --nproc_per_node=8 train_gpt.py             eight GPUs (NCCL) or eight CPU processes (gloo)
    torchrun --nnodes=2 --nproc_per_node=8 --local_addr=$OWN \\
             --rdzv_backend=c10d --rdzv_endpoint=$FIRST:29500 train_gpt.py         on each of two hosts, see SETTINGS.md
    python train_gpt.py --check                                       what would go wrong or be cut; writes nothing
    python train_gpt.py --settings                                    every setting, as a Markdown table
    EVAL_ONLY=1 ARTIFACT_PATH=runs/ID/artifact.pgolf python train_gpt.py           repeat an artifact's scores

Every setting is an environment variable. The last line of the log is `result {json}`. Exit codes: 0 done, 2 the user
can fix it (one `error:` line), 3 a limit was broken (artifact over the cap, non-finite loss).

Shapes are written with B batch, T tokens, D model width, H heads, K head width, V vocabulary, L layers.
"""

import contextlib
import ctypes
import dataclasses
import errno
import functools
import hashlib
import io
import itertools
import json
import lzma
import math
import os
import queue
import re
import select
import shutil
import signal
import stat
import statistics
import struct
import sys
import tempfile
import threading
import time
import types
import unicodedata
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # before the imports, which take seconds and open files
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main: no traceback out of an import
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # a closed console: a file opened later would get its number, and the lines of C++
    os.close(spare)
    sys.stdin, sys.stdout, sys.stderr = sys.stdin or open(0), sys.stdout or open(1, "w"), sys.stderr or open(2, "w")
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a console without UTF-8 ends no run
    # libgomp reads it once, with torch. Its own default spins so long that two runs on the same cores take up to 37
    # times as long; to sleep at once (PASSIVE) takes a run alone a fifth longer: a thread wakes for each operation.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

BOS_ID = 1  # every document starts with it; SentencePiece itself never emits it
OPERATORS = "\ue001\ue002\ue003\ue004"  # of CaseOps: Title, CAPS, the next letter, and the escape of these four
SIDECAR = "fineweb_val_bytes_*.bin"  # published beside shards in CaseOps: the bytes of each token


class Interrupted(BaseException):
    """SIGTERM, SIGINT or SIGHUP; the exit code is 128 plus its number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class UserError(Exception):
    """Something the user can fix. Printed as one `error:` line; exit code 2."""

    agreed = False  # raised on every rank alike: the main rank alone prints it


class LimitError(Exception):
    """A limit of the challenge or of arithmetic was broken during the run. One `limit:` line; exit code 3."""


# ----------------------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------------------

# What is larger is a slip; int64 and fp32 hold these and what is computed from them.
LARGEST = {int: 1 << 40, float: 1e12}
LORA_TARGETS = ("q", "k", "v", "o", "mlp", "head")


def opt(
    section: str, default: Any, doc: str, lo: float = 0, hi: float | None = None, others: str = "", off: Any = None
):
    """One setting, of its default's type; lo and hi: a number's inclusive bounds; others: the words it may be instead.

    off is what an artifact means that was made before there was this setting: the technique's absence, or any value
    where only an absent technique reads it. Each new setting of model and evaluation states it: files outlive settings.
    """
    largest = LARGEST.get(type(default))
    lo, hi = (lo, largest if hi is None else hi) if largest else (None, None)
    choices = (default, *others.split()) if others else ()
    meta = dict(section=section, doc=doc, lo=lo, hi=hi, choices=choices, off=off)
    return dataclasses.field(default=default, metadata=meta)


# Settings that no weight and no score depends on: where things lie and what is kept or checked besides.
INCIDENTAL = ("run_id", "out_dir", "data_path", "tokenizer_path", "caseops_enabled", "resume", "checkpoint_every",
              "save_scores")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """Every setting once. The environment variable is the field's name in capitals; the defaults are `pr714.env`."""

    data_path: str = opt("run", "data/datasets/fineweb10B_sp1024", "folder of fineweb_{train,val}_*.bin")
    tokenizer_path: str = opt("run", "", "SentencePiece model; empty: the one .model in DATA_PATH")
    caseops_enabled: str = opt("run", "auto", "whether text is in CaseOps, as the tokenizer's pieces say: 0 and 1 have "
                               "to agree", others="0 1")  # fmt: skip
    run_id: str = opt("run", "", "names the log and the folder of results; empty: date, time and seed")
    out_dir: str = opt("run", ".", "where logs/ and runs/ go")
    seed: int = opt("run", 1337, "initial weights, and the order of SHUFFLE_SEQUENCES", hi=(1 << 64) - 1)
    device: str = opt("run", "auto", "where to run", others="cuda cpu")
    dtype: str = opt("run", "auto", "activations, Newton-Schulz, gradient banks", others="bf16 fp32")
    compile: str = opt("run", "auto", "torch.compile; auto: where it pays", others="0 1")
    attention: str = opt("run", "auto", "kernel; auto: the first that works", others="fa3 fa2 flex sdpa matmul")
    train_log_every: int = opt("run", 500, "steps between training lines, after the first ten; 0: none")
    val_loss_every: int = opt("run", 4000, "steps between validations of the raw weights; 0: only after the last")
    eval_only: bool = opt("run", False, "score ARTIFACT_PATH again; needs no training data")
    artifact_path: str = opt("run", "", "the artifact that EVAL_ONLY reads")
    checkpoint_every: float = opt("run", 0.0, "seconds of training between checkpoints; 0: none")
    resume: str = opt("run", "", "go on from a checkpoint: its path, or auto for the newest of RUN_ID")
    save_scores: bool = opt("run", False, "also keep each pass's nats by target (scores.npz), which an audit compares")
    save_weights: bool = opt("run", False, "also keep the averaged float weights (weights.pgolf)")
    export_only: bool = opt("run", False, "quantize, write and score WEIGHTS_PATH again, without training")
    weights_path: str = opt("run", "", "the saved weights that EXPORT_ONLY reads")

    vocab_size: int = opt("model", 1024, "V, the tokenizer's pieces", lo=8, hi=65536)
    num_layers: int = opt("model", 11, "L, transformer blocks", lo=1, hi=128)
    model_dim: int = opt("model", 512, "D, width of the residual stream", lo=8, hi=16384)
    num_heads: int = opt("model", 8, "H, query heads", lo=1)
    num_kv_heads: int = opt("model", 4, "key/value heads (grouped-query attention)", lo=1)
    mlp_mult: float = opt("model", 3.0, "MLP hidden width, in multiples of D", lo=0.01, hi=64)
    mlp_kind: str = opt("model", "leaky_relu2", "MLP nonlinearity", others="swiglu star_relu", off="leaky_relu2")
    leaky_relu_slope: float = opt("model", 0.5, "leaky_relu2's negative slope; 0: relu squared", hi=1, off=0.5)
    tie_embeddings: bool = opt("model", True, "the head is the token embedding")
    rope_base: float = opt("model", 10000.0, "rotary base frequency", lo=1)
    rope_dims: int = opt("model", 16, "rotated dimensions of each head, even; 0: all K")
    logit_softcap: float = opt("model", 30.0, "logits pass c*tanh(z/c)", lo=1)
    qk_gain_init: float = opt("model", 1.5, "initial gain of each query head")
    ln_scale: bool = opt("model", True, "block l scales its normalized inputs by 1/sqrt(l+1)", off=False)
    unet_skips: bool = opt("model", True, "second half adds the outputs of the first half in reverse order", off=False)
    skip_gates_enabled: bool = opt("model", False, "skips are blended in by a learned gate per channel", off=False)
    xsa_last_n: int = opt("model", 4, "last n layers remove the own value's direction from attention outputs", off=0)
    value_residual: bool = opt("model", False, "later layers add a learned share of the first layer's value", off=False)
    gated_attention: bool = opt("model", False, "a learned gate of the input on each head's output", off=False)
    sparse_attn_gate_enabled: bool = opt("model", False, "a gate of few inputs on each head's output", off=False)
    sparse_attn_gate_scale: float = opt("model", 1.0, "what those inputs' product is multiplied with", off=1.0)
    gate_window: int = opt("model", 12, "first channels that such gates and a token's SmearGate read", lo=1, off=12)
    num_loops: int = opt("model", 0, "extra passes over layers LOOP_START…LOOP_END with the same weights", hi=16, off=0)
    loop_vectors: bool = opt("model", True, "a learned vector is added where each extra pass begins", off=True)
    loop_start: int = opt("model", 3, "first layer of the loop", off=3)
    loop_end: int = opt("model", 5, "last layer of the loop", off=5)
    parallel_start_layer: int = opt("model", 0, "first layer of two lanes, attention's and the MLP's; 0: none", off=0)
    smear_gate_enabled: bool = opt("model", True, "blend each position's embedding with its predecessor's", off=False)
    smear_gate_kind: str = opt("model", "channel", "its share: per channel or token", others="token", off="channel")
    bigram_vocab_size: int = opt("model", 3072, "rows of the hashed bigram table; 0: none", hi=1 << 24, off=0)
    bigram_dim: int = opt("model", 128, "width of the bigram table", lo=1, hi=16384, off=128)
    ve_enabled: bool = opt("model", True, "value embeddings: a token table added to the values of VE_LAYERS", off=False)
    ve_dim: int = opt("model", 128, "width of the value table", lo=1, hi=16384, off=128)
    ve_layers: str = opt("model", "9,10", "layers that add value embeddings, separated by commas", off="9,10")
    document_mask: bool = opt("model", False, "attention, too, stays within a document", off=False)
    train_seq_len: int = opt("model", 2048, "training context; rotary frequencies belong to it", lo=2, hi=1 << 20)

    iterations: int = opt("training", 9000, "steps at most", lo=1)
    max_wallclock_seconds: float = opt("training", 600.0, "training clock; 0: no limit")
    warmdown_iters: int = opt("training", 3500, "steps of linear learning-rate decay at the end")
    warmdown_frac: float = opt("training", 0.0, "share of steps or clock that decays; 0: WARMDOWN_ITERS", hi=1)
    min_lr: float = opt("training", 0.0, "the decay ends at this share of each learning rate", hi=1)
    warmup_steps: int = opt("training", 20, "untimed steps per graph that compile and are undone")
    train_batch_tokens: int = opt("training", 786432, "targets per step over all ranks", lo=2)
    shuffle_sequences: bool = opt("training", False, "a step's sequences come from all over the text, not in a row")
    micro_batch_tokens: int = opt("training", 0, "targets per forward pass of a rank; 0: as many as fit 98,304")
    embed_lr: float = opt("training", 0.6, "AdamW, tables of an untied model")
    head_lr: float = opt("training", 0.008, "AdamW, untied head")
    tied_embed_lr: float = opt("training", 0.035, "AdamW, tables (token, bigram, value) of a tied model")
    tied_embed_init_std: float = opt("training", 0.005, "initial deviation of the token table")
    matrix_lr: float = opt("training", 0.025, "Muon, block matrices")
    decoder_lr_mult: float = opt("training", 1.0, "MATRIX_LR of the second half of the layers, times this")
    scalar_lr: float = opt("training", 0.025, "AdamW, gains, scales, gates and small projections")
    muon_momentum: float = opt("training", 0.99, "Muon's final momentum", hi=0.9999)
    muon_momentum_warmup_start: float = opt("training", 0.92, "Muon's first momentum", hi=0.9999)
    muon_momentum_warmup_steps: int = opt("training", 1500, "steps from the first to the final momentum")
    muon_backend_steps: int = opt("training", 5, "Newton-Schulz iterations", lo=1, hi=20)
    muon_row_normalize: bool = opt("training", False, "Muon sees rows of equal norm (MuonEq-R)")
    muon_wd: float = opt("training", 0.04, "Muon's decoupled weight decay")
    adam_wd: float = opt("training", 0.04, "AdamW's weight decay")
    embed_wd: float = opt("training", -1.0, "AdamW's weight decay of tables; -1: ADAM_WD", lo=-1)
    beta1: float = opt("training", 0.9, "AdamW", hi=0.9999)
    beta2: float = opt("training", 0.95, "AdamW", hi=0.99999)
    adam_eps: float = opt("training", 1e-8, "AdamW")
    grad_clip_norm: float = opt("training", 0.3, "norm of the averaged gradient; 0: no clipping")
    enable_looping_at: float = opt("training", 0.35, "share of the steps or of the clock after which loops run", hi=0.9)

    ema_enabled: bool = opt("averaging", True, "exponential moving average of all weights")
    ema_decay: float = opt("averaging", 0.997, "reached through the ramp (1+t)/(10+t)", hi=0.99999)
    swa_enabled: bool = opt("averaging", False, "tight SWA: mean of snapshots while the rate scale is below 0.2")
    swa_every: int = opt("averaging", 50, "steps between snapshots", lo=1)
    swa_source: str = opt("averaging", "raw", "what a snapshot takes: EMA or raw weights", others="ema")

    qat_enabled: bool = opt("quantization", False, "fake quantization from the first step")
    late_qat: bool = opt("quantization", True, "fake quantization once the learning-rate scale is below the threshold")
    late_qat_threshold: float = opt("quantization", 0.57, "learning-rate scale that switches late QAT on", hi=1)
    attn_bits: int = opt("quantization", 6, "of the matrices q, k and v", lo=5, hi=8)
    attn_out_bits: int = opt("quantization", 6, "of the attention's output matrix", lo=5, hi=8)
    mlp_bits: int = opt("quantization", 6, "of the MLP's matrices", lo=5, hi=8)
    embed_bits: int = opt("quantization", 8, "of the tables and an untied head; 16: fp16", lo=5, hi=16)
    projection_bits: int = opt("quantization", 16, "of the tables' projections; 16: fp16", lo=5, hi=16)
    control_bits: int = opt("quantization", 32, "of vectors and single numbers; 32: fp32, 16: fp16", lo=16, hi=32)
    quant: str = opt(
        "quantization", "clip_search", "steps: of a clip search, of sigmas, or rate-distortion", others="sdclip rd"
    )
    attn_clip_sigmas: float = opt("quantization", 12.85, "sdclip, rd: standard deviations to the last level", 0.1, 1e3)
    mlp_clip_sigmas: float = opt("quantization", 12.85, "the same of the MLP's matrices", lo=0.1, hi=1e3)
    embed_clip_sigmas: float = opt("quantization", 20.0, "the same of the tables and an untied head", lo=0.1, hi=1e3)
    fit_to_cap: bool = opt(
        "quantization", False, "make all steps finer or coarser until the artifact just fits the cap"
    )
    trellis_enabled: bool = opt("quantization", False, "trellis-coded quantization, for QUANT=sdclip and rd with ans")
    gptq_enabled: bool = opt("quantization", False, "full GPTQ of the block matrices, calibrated on training text")
    gptq_head_enabled: bool = opt("quantization", False, "and of the head, which is the token table if tied")
    gptq_calibration_tokens: int = opt("quantization", 262_144, "training tokens for GPTQ and QUANT=rd", lo=2)
    gptq_reserve_seconds: float = opt("quantization", 0.0, "of the training clock, for calibration; 0: measured")
    gptq_percdamp: float = opt("quantization", 0.01, "damping, in mean diagonals of the Hessian", lo=1e-6, hi=10)
    gptq_block_size: int = opt("quantization", 128, "columns between updates of all later ones", lo=1)
    crown_q: float = opt("quantization", 0.0, "weight of CROWN-Q's penalty in the warmdown; 0: none")
    compressor: str = opt("quantization", "lzma", "of the artifact", others="zstd ans")
    artifact_cap_bytes: int = opt("quantization", 16_000_000, "code plus artifact; above it the exit code is 3", lo=1)

    eval_seq_len: int = opt("evaluation", 2048, "context when scoring; beyond TRAIN_SEQ_LEN: NTK", lo=2, hi=1 << 20)
    eval_stride: int = opt("evaluation", 64, "targets per sliding window; 0: no sliding pass")
    val_batch_size: int = opt("evaluation", 524288, "tokens per scoring batch over all ranks (a memory limit)", lo=1)
    eval_max_seconds: float = opt("evaluation", 600.0, "evaluation clock; TTT stops adapting in time; 0: none", off=0.0)
    ttt_enabled: bool = opt("evaluation", True, "score-first test-time training after the sliding pass", off=False)
    ttt_params: str = opt(
        "evaluation", "all", "what adapts: weights, control tensors, LoRA", others="scales lora", off="all"
    )
    ttt_optimizer: str = opt("evaluation", "sgd", "of test-time training", others="adamw", off="sgd")
    ttt_lr: float = opt("evaluation", 0.002, "learning rate, cosine over the chunks (LoRA: constant)")
    ttt_warmup_chunks: int = opt("evaluation", 0, "chunks over which the learning rate first rises", off=0)
    ttt_max_chunks: int = opt("evaluation", 0, "chunks to learn from, then only score; 0: all but the last", off=0)
    ttt_sam_rho: float = opt("evaluation", 0.0, "SAM: gradients are taken this far uphill; 0: none", off=0.0)
    ttt_epochs: int = opt("evaluation", 3, "passes over each scored chunk", lo=1)
    ttt_chunk_tokens: int = opt("evaluation", 32768, "scored targets per chunk, at least", lo=1)
    ttt_freeze_blocks: int = opt("evaluation", 0, "first blocks that stay fixed", off=0)
    ttt_momentum: float = opt("evaluation", 0.9, "SGD's momentum or AdamW's beta1, carried", hi=0.9999)
    ttt_batch_seqs: int = opt("evaluation", 32, "sequences per step over all ranks", lo=1)
    ttt_grad_clip: float = opt("evaluation", 1.0, "gradient norm of a step (LoRA: per document); 0: none")
    ttt_weight_decay: float = opt("evaluation", 0.0, "AdamW's decoupled decay, of test-time training", off=0.0)
    ttt_lora: str = opt(
        "evaluation", "q,v,head", "what has adapters: of q,k,v,o,mlp,head (o: attention)", off="q,v,head"
    )
    ttt_lora_rank: int = opt("evaluation", 8, "of the adapters", lo=1, hi=1024, off=8)
    ttt_lora_alpha: float = opt("evaluation", 8.0, "adapters are scaled by alpha/rank", off=8.0)
    ttt_lora_chunk: int = opt("evaluation", 256, "targets of a document per step", lo=1, off=256)
    ttt_lora_reset: bool = opt("evaluation", True, "new adapters for each document; 0: carried, one by one", off=True)
    ttt_warm_start_a: bool = opt(
        "evaluation", False, "of new adapters B alone: A goes on from other documents", off=False
    )
    ttt_order: str = opt(
        "evaluation", "length", "of LoRA's documents: the longest first, or as they come", others="stream", off="length"
    )
    phased_ttt_num_phases: int = opt(
        "evaluation", 0, "LoRA: pauses in which all weights learn from the documents scored since the last", off=0
    )
    global_ttt_lr: float = opt("evaluation", 0.001, "in them, SGD's learning rate, a cosine in each", off=0.001)
    global_ttt_momentum: float = opt("evaluation", 0.9, "in them, SGD's momentum", hi=0.9999, off=0.9)
    ttt_temperature: bool = opt(
        "evaluation", False, "the softmax temperature that fitted the scored chunks best", off=False
    )
    hedge_enabled: bool = opt(
        "evaluation", False, "mix the model with n-grams of scored text (no ruling covers it)", off=False
    )
    hedge_eta: float = opt("evaluation", 0.3, "learning rate of the mixture's weights", hi=100, off=0.3)
    hedge_alpha: float = opt("evaluation", 4.0, "n-grams: counts that the shorter context is worth", lo=1e-6, off=4.0)
    hedge_temperature: float = opt("evaluation", 1.5, "of the model's second vote", lo=0.1, hi=10, off=1.5)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            check_value(f, getattr(self, f.name))
        for broken, message in self.illegal_combinations():
            if broken:
                raise UserError(message)

    @property
    def named(self) -> types.SimpleNamespace:
        """Every setting as messages write it: named.num_heads is NUM_HEADS=8."""
        values = {name: f"{v:g}" if isinstance(v, float) else v for name, v in dataclasses.asdict(self).items()}
        return types.SimpleNamespace(**{name: f"{name.upper()}={value}" for name, value in values.items()})

    def illegal_combinations(self) -> Iterator[tuple[Any, str]]:
        """Pairs (is it broken, what to say). Lazy: a later rule may rely on the earlier ones. n.x is X=value."""
        s, n, lora, last = self, self.named, self.ttt_params == "lora", self.num_layers - 1
        yield s.model_dim % s.num_heads, f"{n.num_heads} must divide {n.model_dim}"
        yield s.num_heads % s.num_kv_heads, f"{n.num_kv_heads} must divide {n.num_heads}"
        yield s.head_dim % 2 or s.head_dim < 4, f"MODEL_DIM/NUM_HEADS={s.head_dim} must be even and at least 4"
        says = f"{n.rope_dims} must be 0 or an even number from 4 to the head width {s.head_dim}"
        yield s.rope_dims not in (0, *range(4, s.head_dim + 1, 2)), says
        yield s.bigram_vocab_size == 1, f"{n.bigram_vocab_size} leaves no row to hash into; use 0 (none) or at least 2"
        first = max(s.num_layers // 2, 1, s.loop_end + 1 if s.num_loops else 0)
        says = f"{n.parallel_start_layer} must be 0 (none) or a layer of the second half, behind all loops: "
        yield s.parallel_start_layer and not first <= s.parallel_start_layer <= last, f"{says}{first} to {last}"
        windowed = s.sparse_attn_gate_enabled or (s.smear_gate_enabled and s.smear_gate_kind == "token")
        yield windowed and s.gate_window > s.model_dim, f"{n.gate_window} exceeds {n.model_dim}"
        yield s.skip_gates_enabled and not s.unet_skips, "SKIP_GATES_ENABLED=1 needs skips to gate: UNET_SKIPS=1"
        yield s.xsa_last_n > s.num_layers, f"{n.xsa_last_n} exceeds {n.num_layers}"
        says = f"{n.loop_start} and {n.loop_end} must be layers in order, the last at most {last} ({n.num_layers})"
        yield s.num_loops and not s.loop_start <= s.loop_end <= last, says
        yield s.num_loops > s.model_dim, f"{n.num_loops} exceeds {n.model_dim}"
        listed = re.fullmatch(r"\s*\d{1,3}\s*(,\s*\d{1,3}\s*)*", s.ve_layers[:1024])
        says = f"VE_LAYERS={s.ve_layers[:32]!r} must be layer numbers separated by commas, such as 9,10"
        yield s.ve_enabled and not listed, says
        says = f"VE_LAYERS={shown(s.ve_layers)} names a layer beyond the last, {last} ({n.num_layers})"
        yield s.ve_enabled and (len(s.ve_layers) > 1024 or max(s.ve_layer_ids) > last), says
        says = "SWA_SOURCE=ema needs EMA_ENABLED=1; use SWA_SOURCE=raw or SWA_ENABLED=0"
        yield s.swa_enabled and s.swa_source == "ema" and not s.ema_enabled, says
        yield 8 < s.embed_bits < 16, f"{n.embed_bits} must be from 5 to 8, or 16"
        yield 8 < s.projection_bits < 16, f"{n.projection_bits} must be from 5 to 8, or 16"
        yield 16 < s.control_bits < 32, f"{n.control_bits} must be 16 or 32"
        says = f"GPTQ_HEAD_ENABLED=1 needs GPTQ_ENABLED=1 and EMBED_BITS of 8 or less, not {s.embed_bits}"
        yield s.gptq_head_enabled and not (s.gptq_enabled and s.embed_bits <= 8), says
        says = f"TRELLIS_ENABLED=1 needs COMPRESSOR=ans and QUANT=rd or sdclip, not {n.compressor} and {n.quant}"
        yield s.trellis_enabled and (s.compressor != "ans" or s.quant == "clip_search"), says
        says = f"{n.gptq_reserve_seconds} leaves nothing of {n.max_wallclock_seconds} to train in"
        yield s.calibrates and s.gptq_reserve_seconds >= s.max_wallclock_seconds > 0, says
        says = f"{n.gptq_calibration_tokens} is less than one sequence, {n.train_seq_len}"
        yield s.calibrates and s.gptq_calibration_tokens < s.train_seq_len, says
        yield s.eval_stride > s.eval_seq_len, f"{n.eval_stride} exceeds {n.eval_seq_len}"
        yield s.ttt_enabled and s.eval_stride == 0, "TTT_ENABLED=1 needs sliding windows: EVAL_STRIDE of 1 or more"
        yield s.ttt_freeze_blocks > s.num_layers, f"{n.ttt_freeze_blocks} exceeds {n.num_layers}"
        says = "TTT_PARAMS, TTT_TEMPERATURE and HEDGE_ENABLED belong to test-time training: TTT_ENABLED=1"
        yield not s.ttt_enabled and (s.ttt_params != "all" or s.ttt_temperature or s.hedge_enabled), says
        says = "TTT_PARAMS=lora takes one plain step per piece of a document; leave out "
        says += "TTT_SAM_RHO, TTT_WARMUP_CHUNKS, TTT_MAX_CHUNKS and TTT_FREEZE_BLOCKS"
        yield lora and (s.ttt_sam_rho or s.ttt_warmup_chunks or s.ttt_max_chunks or s.ttt_freeze_blocks), says
        says = "TTT_TEMPERATURE and HEDGE_ENABLED need the stream's order"
        yield lora and (s.ttt_temperature or s.hedge_enabled), f"TTT_PARAMS=lora scores documents side by side; {says}"
        yield lora and s.ttt_lora_chunk > s.eval_seq_len, f"{n.ttt_lora_chunk} exceeds {n.eval_seq_len}"
        says = f"TTT_LORA={shown(s.ttt_lora)} must be some of {','.join(LORA_TARGETS)}, separated by commas"
        yield not set(s.ttt_lora.split(",")) <= set(LORA_TARGETS), says
        yield s.ttt_warm_start_a and not s.ttt_lora_reset, "TTT_LORA_RESET=0 carries all on; leave out TTT_WARM_START_A"
        says = "PHASED_TTT_NUM_PHASES needs TTT_PARAMS=lora with TTT_LORA_RESET=1"
        yield s.ttt_enabled and s.phased_ttt_num_phases and not (lora and s.ttt_lora_reset), says
        yield s.ttt_weight_decay and s.ttt_optimizer != "adamw", "TTT_WEIGHT_DECAY needs TTT_OPTIMIZER=adamw"
        yield s.eval_only and s.export_only, "EVAL_ONLY=1 and EXPORT_ONLY=1 exclude each other"
        yield s.eval_only and not s.artifact_path, "EVAL_ONLY=1 needs ARTIFACT_PATH"
        yield s.export_only and not s.weights_path, "EXPORT_ONLY=1 needs WEIGHTS_PATH (what SAVE_WEIGHTS=1 wrote)"
        says = "RESUME goes on with training; leave out EVAL_ONLY and EXPORT_ONLY"
        yield s.resume and (s.eval_only or s.export_only), says
        yield s.resume == "auto" and not s.run_id, "RESUME=auto needs the RUN_ID to go on with"
        yield s.artifact_path and not s.eval_only, "ARTIFACT_PATH is read only with EVAL_ONLY=1"
        yield s.weights_path and not s.export_only, "WEIGHTS_PATH is read only with EXPORT_ONLY=1"
        is_name = re.fullmatch(r"[\w.-]{0,128}", s.run_id) and not s.run_id.startswith(".")
        yield not is_name, f"RUN_ID={shown(s.run_id)!r} must be a file name of letters, digits, '_', '-' and '.'"

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        """Hidden width; a gated MLP has a third matrix and two thirds of the width, so as many weights."""
        return max(1, round(self.mlp_mult * self.model_dim * (1 if self.mlp_kind == "leaky_relu2" else 2 / 3)))

    @property
    def calibrates(self) -> bool:
        """Whether quantization reads training text."""
        return bool(calibration_needs(self))

    @property
    def ve_layer_ids(self) -> list[int]:
        return sorted({int(x) for x in self.ve_layers.split(",")}) if self.ve_enabled else []

    def section(self, *names: str) -> dict[str, Any]:
        """The settings of these sections, by field name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["section"] in names}

    def changed(self) -> dict[str, Any]:
        """What differs from the defaults, by environment name."""
        return {name: v for name, f in SETTINGS.items() if (v := getattr(self, f.name)) != f.default}

    def settings_hash(self) -> str:
        """The same for runs of one configuration: seed, names and paths do not enter."""
        ignored = ("seed", "artifact_path", "weights_path", *INCIDENTAL)
        kept = {k: v for k, v in dataclasses.asdict(self).items() if k not in ignored}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]

    def micro_batch(self, world_size: int) -> int:
        """Targets per forward pass of one rank; raises UserError where the batch cannot be split that way.

        Apart from the other rules because an artifact is scored at any world size, whatever batch trained it.
        """
        n, length, per_rank = self.named, self.train_seq_len, self.train_batch_tokens // world_size
        if self.train_batch_tokens % (world_size * length):
            raise UserError(f"{n.train_batch_tokens} must be a multiple of WORLD_SIZE={world_size} x {n.train_seq_len}")
        if self.micro_batch_tokens % length:
            raise UserError(f"{n.micro_batch_tokens} must be a multiple of {n.train_seq_len}")
        if self.micro_batch_tokens and per_rank % self.micro_batch_tokens:
            raise UserError(f"{n.micro_batch_tokens} must divide a rank's {per_rank} tokens")
        sequences = per_rank // length
        most = max(1, min(sequences, 98_304 // length))
        return self.micro_batch_tokens or next(k for k in range(most, 0, -1) if sequences % k == 0) * length

    @classmethod
    def from_env(cls, environ: Mapping[str, str], base: Mapping[str, Any] | None = None) -> "Hyperparameters":
        """Read the environment over `base` (an artifact's own settings), over the defaults. Raises UserError."""
        values, given, refused = dict(base or {}), {}, {}
        for name, text in sorted(environ.items()):
            if name in NOT_HERE:
                accepted, advice = NOT_HERE[name]
                if comparable(text) not in map(comparable, accepted):
                    instead = "leave it out" + (f" or set {accepted[0]}" if accepted else "")
                    refused[name] = f"{name}={shown(text)} is not offered here: {advice}; {instead}"
            elif (target := PUBLIC_NAMES.get(name, name)) in SETTINGS:
                if given.setdefault(target, text) != text:
                    other = f"{target}={shown(given[target])}"
                    raise UserError(f"{name}={shown(text)} contradicts another spelling of {other}; keep one")
                values[target.lower()] = parse_value(SETTINGS[target], text)
            elif close := near_miss(name):
                raise UserError(f"unknown setting {shown(name)}; did you mean {close}?")
        if refused:
            first, *others = refused
            raise UserError(refused[first] + (f". Nor are {', '.join(others)}" if others else ""))
        if {"SMEAR_GATE_ENABLED", "GATE_WINDOW"} <= given.keys() and "SMEAR_GATE_KIND" not in given:
            if values["smear_gate_enabled"]:
                says = "published commands mean two gates by SMEAR_GATE_ENABLED=1, those with GATE_WINDOW a token's"
                raise UserError(f"{says}: set SMEAR_GATE_KIND=token, or SMEAR_GATE_KIND=channel for March's")
        return cls(**values)


SETTINGS = {f.name.upper(): f for f in dataclasses.fields(Hyperparameters)}  # by environment variable

# Names that public scripts use for a setting we have under another name.
PUBLIC_NAMES = {
    "QAT_THRESHOLD": "LATE_QAT_THRESHOLD",
    "SMEAR_GATE": "SMEAR_GATE_ENABLED",
    "MUON_WEIGHT_DECAY": "MUON_WD",
    "USE_GPTQ": "GPTQ_ENABLED",
    "VAL_BATCH_TOKENS": "VAL_BATCH_SIZE",
    "TTT_WD": "TTT_WEIGHT_DECAY",
}

# Names of published commands that this script does not offer, by what to do instead; after `=` the values that switch
# the thing off or that mean what is done anyway.
NOT_HERE = {
    name: (tuple(accepted.split(",")) if accepted else (), advice)
    for advice, names in {
        # data and files
        "DATA_PATH is the folder of shards": "DATA_DIR DATASETS_DIR",
        "OUT_DIR holds logs/ and runs/": "ARTIFACT_DIR",
        "the whole split is scored, always in the same way": "VAL_DOC_FRACTION=1 TTT_EVAL_BATCHES TTT_DEBUG_BYPASS=0",
        "EVAL_ONLY=1 or EXPORT_ONLY=1 starts from a file": "TTT_EVAL_ONLY=0 PREQUANT_ONLY=0",
        "`python records/audit.py ARTIFACT` judges a finished run": "AUDIT=0 AUDIT_TOKENS",
        "FIT_TO_CAP=1 and ARTIFACT_CAP_BYTES do it": "TARGET_MB",
        # model
        "multi-token prediction was measured as a loss by its authors": "MTP_NUM_HEADS=0",
        "there are no multi-token prediction heads": "MTP_LOSS_WEIGHT=0,0.1,0.2",
        "there is no dynamic token gate": "DTG_ENABLED=0",
        "trigram tables were measured as a loss by their authors": "TRIGRAM=0 TRIGRAM_ENABLED=0",
        "use QK_GAIN_INIT": "QK_GAIN",
        "NUM_LOOPS, LOOP_START, LOOP_END and ENABLE_LOOPING_AT do it": "SHARE_START SHARE_LOOPS RECUR_LAYERS "
        "RECUR_START_STEP",
        "lanes end in their mean": "PARALLEL_FINAL_LANE=mean",
        "use PARALLEL_START_LAYER": "PARALLEL_RESIDUAL=0 PARALLEL_RESIDUAL_START",
        "embeddings are MODEL_DIM wide": "EMBEDDING_DIM",
        "rotary frequencies belong to TRAIN_SEQ_LEN, extended by NTK": "ROPE_YARN=0 ROPE_TRAIN_SEQ_LEN",
        "GATED_ATTENTION=1 is another gate: of the whole input, and 1 at the start": "GATED_ATTN_ENABLED=0 "
        "GATED_ATTN_INIT_STD GATED_ATTN_QUANT_GATE=0 ATTN_OUT_GATE_ENABLED=0 ATTN_OUT_GATE_SRC "
        "SPARSE_ATTN_GATE_INIT_STD=0",
        # training
        "Muon keeps no second moment (public scripts declare it and never read it)": "MUON_BETA2=0.95",
        "use SWA_ENABLED=1 with SWA_SOURCE=raw": "LAWA_ENABLED=0",
        "use SWA_ENABLED=1": "LAWA_K=0,10",
        "use SWA_EVERY": "LAWA_FREQ=0,100",
        "tight SWA starts at a rate scale of 0.2": "SWA_START_FRAC",
        "use MICRO_BATCH_TOKENS": "GRAD_ACCUM_STEPS",
        "COMPILE fuses what can be": "FUSED_CE_ENABLED=0",
        "ITERATIONS and MAX_WALLCLOCK_SECONDS end a run": "FORCE_STOP_STEP=0",
        # quantization
        "use ATTN_BITS, ATTN_OUT_BITS and MLP_BITS": "MATRIX_BITS=6",
        "use ATTN_CLIP_SIGMAS and MLP_CLIP_SIGMAS": "MATRIX_CLIP_SIGMAS=12.85",
        "use GPTQ_CALIBRATION_TOKENS": "GPTQ_CALIBRATION_BATCHES GPTQ_CALIB_BATCHES",
        "there are no low-rank corrections; QUANT=rd spends the bytes better": "LQER_ENABLED=0 LQER_RANK LQER_TOP_K "
        "LQER_FACTOR_BITS LQER_ASYM_ENABLED LQER_ASYM_GROUP",
        "a tensor's class says how it is stored": "CONTROL_TENSOR_NAME_PATTERNS INT8_KEEP_FLOAT_FP32_NAME_PATTERNS",
        # evaluation
        "use VAL_BATCH_SIZE, in tokens": "EVAL_BATCH_SEQS TTT_BATCH_SIZE",
        "use TTT_LR with TTT_PARAMS=lora": "TTT_LORA_LR",
        "use TTT_CHUNK_TOKENS or, with TTT_PARAMS=lora, TTT_LORA_CHUNK": "TTT_CHUNK_SIZE",
        "EVAL_SEQ_LEN is the context of every pass": "TTT_EVAL_SEQ_LEN",
        "TTT_LORA lists what has adapters": "TTT_K_LORA=0 TTT_MLP_LORA=0 TTT_O_LORA=0",
        "TTT_PARAMS=lora takes one step per piece": "TTT_GRAD_STEPS=1",
        "use TTT_MOMENTUM": "TTT_BETA1",
        "TTT_OPTIMIZER=adamw has beta2 0.999": "TTT_BETA2=0.999",
        "PHASED_TTT_NUM_PHASES cuts the split into equal shares, with a phase between them": "PHASED_TTT_ENABLED=0 "
        "PHASED_TTT_PREFIX_DOCS",
        "phases have TTT_EPOCHS, TTT_CHUNK_TOKENS, TTT_BATCH_SEQS and TTT_GRAD_CLIP": "GLOBAL_TTT_EPOCHS "
        "GLOBAL_TTT_CHUNK_TOKENS GLOBAL_TTT_BATCH_SEQS GLOBAL_TTT_GRAD_CLIP",
        "a phase has one cosine, without a rise": "GLOBAL_TTT_WARMUP_START_LR GLOBAL_TTT_WARMUP_CHUNKS=0",
        "attention looks across documents": "GLOBAL_TTT_RESPECT_DOC_BOUNDARIES=0",
        "HEDGE_ENABLED=1 mixes in n-grams of scored text": "NGRAM_ENABLED=0",
        "text is scored once, before anything learns from it": "SLOT_ENABLED=0 TWO_PASS_ENABLED=0 NGRAM_TWO_PASS=0",
    }.items()
    for name, _, accepted in (word.partition("=") for word in names.split())
}

# Other programs' variables, never taken for a misspelt setting.
FOREIGN_PREFIXES = tuple(
    """ACCELERATE AIP_ AWS_ AZ CI_ COLAB CONDA CUDA DET_ DOCKER FLASH_ATTENTION_ GIT GLOO GOMP_ GOOGLE HF_
    JUPYTER KAGGLE KMP_ KUBERNETES LC_ LSB_ MKL_ MLFLOW MPI NCCL NPM_ NV OMPI_ OMP_ PARALLEL_HOME PARALLEL_JOB
    PARALLEL_PID PARALLEL_SEQ PARALLEL_SSH PARALLEL_TMUX PBS_ PIP_ PL_ PYTEST PYTHON PYTORCH RAY_ RUNPOD SLURM
    SM_ SSH_ TF_ TOKENIZERS_ TORCH TRANSFORMERS TRITON VLLM WANDB XDG_ XLA_""".split()
)
# Words of other programs' names that lie one or two slips from ours.
FOREIGN_WORDS = frozenset("AUDIO BETA COMPILER DIR DST FEED ID JAVA NEED OPT ROOT SPEED SRC TMP TYPE".split())
# Words of settings and published names that say nothing alone.
COMMON_WORDS = frozenset(
    """ARTIFACT BACKEND BASE BLOCK BLOCKS BYPASS BYTES CAP CONTROL DATA DATASETS DEBUG DEVICE DIR DOC DOCS ENABLE
    ENABLED END EVERY EXPORT FACTOR FINAL FIT FLOAT FORCE FREEZE GLOBAL GROUP HEAD INIT INT KEEP KIND LAST LEN LOG
    MAX MIN MODEL NAME NORM NUM ONLY OUT PARALLEL PARAMS PASS PATH PATTERNS PREFIX RANK RESERVE RESET RUN SAVE SCALE
    SECONDS SHARE SIZE SKIP SOURCE SRC START STEP STOP TARGET TENSOR THRESHOLD TOP TWO USE VALUE WARM WINDOW
    YARN""".split()
)


def unused_names(environ: Mapping[str, str]) -> list[str]:
    """Variables that no line of this script reads though they look like settings, in one note for the log, or none."""
    known = {*SETTINGS, *PUBLIC_NAMES, *NOT_HERE}
    ours = set().union(*map(name_words, known)) - COMMON_WORDS
    names = [name for name in sorted(environ) if name not in known and re.fullmatch(r"[A-Z][A-Z0-9_]*", name)]
    names = [name for name in names if not is_foreign(name) and ours & name_words(name)]
    return [f"warning: no such settings, so not read: {', '.join(names)}"] if names else []


def name_words(name: str) -> set[str]:
    """What stands between the underscores, without trailing digits; single letters and pairs say nothing, but `LR`."""
    return {word for part in name.split("_") if len(word := part.rstrip("0123456789")) > 2 or word == "LR"}


def is_foreign(name: str) -> bool:
    """Whether another program's variable bears this name: by its prefix, or one that Kubernetes makes of a service."""
    return name.startswith(FOREIGN_PREFIXES) or bool(re.search(r"_SERVICE_(HOST|PORT)|_PORT(_\d+_(TCP|UDP).*)?$", name))


def comparable(text: str) -> float | str:
    """One spelling of a value: 0, 0.0 and False are the same."""
    text = text.strip().lower()
    with contextlib.suppress(ValueError):
        return float({"false": "0", "true": "1"}.get(text, text))
    return text


def shown(value: Any) -> str:
    """A value as a part of one line: a piece of it where it is long, escaped where it would break the line."""
    text = str(value)
    text = text if len(text) <= 160 else f"{text[:80]}… ({len(text)} characters)"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def limit_text(limit: float) -> str:
    """A bound as errors and the settings table write it."""
    return f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"


def parse_value(f: dataclasses.Field, text: str) -> Any:
    """Text of the environment to the type of the setting's default."""
    wanted, text = type(f.default), text.strip()
    if wanted is bool:
        if text.lower() not in ("0", "1", "true", "false"):
            raise UserError(f"{f.name.upper()}={shown(text)} must be 0, 1, true or false")
        return text.lower() in ("1", "true")
    try:
        return wanted(text)
    except ValueError:
        words = {int: "a whole number", float: "a number"}[wanted]
        raise UserError(f"{f.name.upper()}={shown(text)} must be {words}") from None


def check_value(f: dataclasses.Field, value: Any) -> None:
    """Type, choices and bounds of one setting. Raises UserError."""
    name, meta = f.name.upper(), f.metadata
    if type(value) is not type(f.default):
        raise UserError(f"{name}={value!r} must be of type {type(f.default).__name__}")
    if meta["choices"] and value not in meta["choices"]:
        raise UserError(f"{name}={shown(value)} must be one of {', '.join(meta['choices'])}")
    if isinstance(value, str) and re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", value):
        raise UserError(f"{name}={shown(value)} must be UTF-8 text without control characters")
    if name.endswith(("_PATH", "_DIR")):
        path = value.encode()
        if len(path) > 4095 or max(map(len, path.split(b"/"))) > 255:
            raise UserError(f"{name}={shown(value)} is longer than a path can be")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name}={value} must be finite")
    if meta["lo"] is not None and value < meta["lo"]:
        raise UserError(f"{name}={shown(value)} must be at least {limit_text(meta['lo'])}")
    if meta["hi"] is not None and value > meta["hi"]:
        raise UserError(f"{name}={shown(value)} must be at most {limit_text(meta['hi'])}")


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions and substitutions between two names (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def near_miss(name: str) -> str | None:
    """The setting that an unknown variable probably means, or None.

    One slip, two in a name of eight characters or more, a longer last word (TRAIN_SEQ_LENGTH), a mixture of cases. Not
    where the slip makes a word of other programs: MODEL_DIR is not MODEL_DIM misspelt.
    """
    upper, names = name.upper(), (*SETTINGS, *PUBLIC_NAMES)
    if upper != name and upper in (*names, *NOT_HERE):
        return upper
    if len(upper) < 4 or is_foreign(upper):
        return None
    if longer := [k for k in names if len(k) >= 8 and upper.startswith(k) and upper[len(k) :].isalpha()]:
        return longer[0]
    near = ((edit_distance(upper, k), k) for k in names if abs(len(k) - len(upper)) <= 2)
    slips, close = min(near, default=(99, ""))
    if slips > 1 + (len(close) >= 8) or FOREIGN_WORDS & set(upper.split("_")) - set(close.split("_")):
        return None
    return close


def settings_table() -> str:
    """The Markdown table that SETTINGS.md holds; `python train_gpt.py --settings` prints it."""
    lines, section = [], None
    for name, f in SETTINGS.items():
        meta = f.metadata
        if meta["section"] != section:
            section = meta["section"]
            lines += ["", f"| {section} | default | what it is |", "|---|---|---|"]
        default = int(f.default) if isinstance(f.default, bool) else f.default
        silent = (None, 0, LARGEST.get(type(f.default)))
        bounds = [(word, meta[key]) for key, word in (("lo", "from"), ("hi", "to"))]
        limits = [f"{word} {limit_text(bound)}" for word, bound in bounds if bound not in silent]
        extra = f" ({' · '.join(meta['choices'])})" if meta["choices"] else f" ({' '.join(limits)})" if limits else ""
        lines.append(f"| `{name}` | {f'`{default}`' if default != '' else ''} | {meta['doc']}{extra} |")
    return "\n".join(lines[1:])


# ----------------------------------------------------------------------------------------------------------------------
# Runtime: ranks, log, phases, signals, clock
# ----------------------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where torchrun has put this process; without torchrun, a single one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1  # processes on this host

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> "Place":
        """Raises UserError."""
        number = functools.partial(torchrun_number, environ)
        rank, size, local_rank = number("RANK", 0), number("WORLD_SIZE", 1), number("LOCAL_RANK", 0)
        local_size = number("LOCAL_WORLD_SIZE", local_rank + 1)
        for local, own, count in (("", rank, size), ("LOCAL_", local_rank, local_size)):
            if own >= count:
                problem = f"{local}RANK={own} must be less than {local}WORLD_SIZE={count}"
                raise UserError(f"{problem}; start the processes with torchrun")
        return cls(rank, size, local_rank, local_size)


def torchrun_number(environ: Mapping[str, str], name: str, default: int) -> int:
    """One of torchrun's variables. Raises UserError."""
    text = environ.get(name, str(default))
    if not text.isdecimal() or len(text) > 9:
        raise UserError(f"{name}={shown(text)} must be a whole number; torchrun sets it, one process needs none")
    return int(text)


def keep_freed_memory() -> None:
    """Keep what tensors free for the next ones, on huge pages (of glibc's malloc; others are left as they are).

    It gives large blocks back to the system at once, which then clears every page of the next: a sixth of an eager
    forward on a CPU. Where pages are small unless asked for, looking them up is a fifteenth of a step.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):
        return
    m_trim_threshold, m_mmap_max, madv_hugepage, huge = -1, -4, 14, 2 << 20  # malloc.h, sys/mman.h
    libc.mallopt(m_trim_threshold, -1)
    libc.mallopt(m_mmap_max, 0)
    # Addresses for the heap to grow into, freed untouched: they take no memory until they are used.
    libc.malloc.restype, size = ctypes.c_void_p, 4 << 30
    if block := libc.malloc(ctypes.c_size_t(size)):
        start = -(-block // huge) * huge
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(block + size - start), madv_hugepage)
        libc.free(ctypes.c_void_p(block))


NOTHING_TO_WAIT_FOR = types.SimpleNamespace(wait=lambda: None)  # the handle of what one rank need not send


class Ranks:
    """This process among all of torchrun's. Every collective call of the project goes through here.

    At world size 1 there is no process group and every call is the identity, so all callers have one code path.
    """

    def __init__(self, hp: Hyperparameters, environ: Mapping[str, str]):
        self.rank, self.size, local_rank, local_size = Place.from_env(environ)
        cuda = hp.device == "cuda" or (hp.device == "auto" and torch.cuda.is_available())
        if cuda and not torch.cuda.is_available():
            raise UserError("DEVICE=cuda, but torch sees no CUDA device; use DEVICE=cpu or a CUDA build of torch")
        if cuda and local_size > (gpus := torch.cuda.device_count()):
            raise UserError(f"{local_size} processes on a host with {gpus} GPUs; lower --nproc_per_node to {gpus}")
        if self.size > 1 and not environ.get("MASTER_ADDR"):
            raise UserError(f"WORLD_SIZE={self.size} processes need MASTER_ADDR to meet; start them with torchrun")
        if self.size > 1 and not 0 < torchrun_number(environ, "MASTER_PORT", 0) < 1 << 16:
            raise UserError(f"WORLD_SIZE={self.size} processes need MASTER_PORT, 1 to 65535, to meet; use torchrun")
        self.device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        else:
            keep_freed_memory()
        if self.size > 1:
            backend, store = "nccl" if cuda else "gloo", fresh_store(self.rank, self.size)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size)
            if cuda:
                dist.barrier(device_ids=[local_rank])  # the communicator is built here, not in the first timed step
        # torch 2.13 renames the flat collectives; older versions know only the first names.
        self._gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        self._scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_(self, x: Tensor) -> Tensor:
        """x, summed over ranks in place."""
        self.start_sum(x).wait()
        return x

    def start_sum(self, x: Tensor):
        """Start summing x over ranks in place; returns a handle whose wait() completes it."""
        return dist.all_reduce(x, dist.ReduceOp.SUM, async_op=True) if self.size > 1 else NOTHING_TO_WAIT_FOR

    def largest(self, x: float) -> float:
        """The largest x of all ranks."""
        if self.size == 1:
            return x
        box = torch.tensor(x, dtype=torch.float64, device=self.device)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return box.item()

    def broadcast_(self, x: Tensor) -> Tensor:
        """x, overwritten with the main rank's."""
        if self.size > 1:
            dist.broadcast(x, src=0)
        return x

    def start_reduce_scatter(self, shard: Tensor, full: Tensor):
        """shard (n/size, …) ← this rank's rows of the sum of full (n, …) over ranks; returns a handle."""
        return self._scatter(shard, full, op=dist.ReduceOp.SUM, async_op=True) if self.size > 1 else NOTHING_TO_WAIT_FOR

    def start_all_gather(self, full: Tensor, shard: Tensor):
        """full (n, …) ← every rank's shard (n/size, …); returns a handle."""
        return self._gather(full, shard, async_op=True) if self.size > 1 else NOTHING_TO_WAIT_FOR

    def broadcast_object(self, x: Any) -> Any:
        """The main rank's object, on every rank."""
        box = [x]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, x: Any) -> list:
        """Every rank's object, on every rank."""
        objects = [x] * self.size
        if self.size > 1:
            dist.all_gather_object(objects, x)
        return objects

    def agree(self, work: Callable[[], Any]) -> Any:
        """Run `work` on every rank; a UserError on any rank is raised on all, so that none waits for another."""
        result = problem = None
        try:
            result = work()
        except UserError as error:
            problem = str(error)
        if problem := next(filter(None, self.gather(problem)), None):
            error = UserError(problem)
            error.agreed = True
            raise error
        return result

    def part(self, items: np.ndarray) -> np.ndarray:
        """This rank's contiguous part of an array's rows; the parts of all ranks make the whole."""
        n = len(items)
        return items[n * self.rank // self.size : n * (self.rank + 1) // self.size]

    def lost_peer(self, error: RuntimeError) -> bool:
        """Whether a collective failed because another process is gone."""
        return self.size > 1 and is_of_ranks(error)

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


def is_of_ranks(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or re.search("gloo|NCCL|c10d", str(error)) is not None


def fresh_store(rank: int, size: int) -> dist.Store:
    """A part of torchrun's store that no other group of processes has written to.

    Processes that torchrun restarts get the store of those that died, with the addresses of the dead still in it, and
    its count of restarts may differ between hosts. So every rank draws a key; the main rank publishes the list of them
    until all have found their own in it, which no earlier list can hold, and its key names the part.
    """
    store, own = next(dist.rendezvous("env://", rank, size))[0], os.urandom(8).hex()
    store.set(f"key{rank}", own)
    if rank == 0:
        while not store.check([f"{own}/met{r}" for r in range(1, size)]):
            store.set("keys", " ".join([own] + [store.get(f"key{r}").decode() for r in range(1, size)]))
            time.sleep(0.02)
        return dist.PrefixStore(own, store)
    while own not in (keys := store.get("keys").decode().split()):
        time.sleep(0.02)
    store.set(f"{keys[0]}/met{rank}", "")
    return dist.PrefixStore(keys[0], store)


PROGRESS_SECONDS = 30.0  # between lines of progress


class Log:
    """Console and logs/<RUN_ID>.txt, on the main rank only. One line per call, written through at once.

    The file is locked for the run's life, so that a RUN_ID is one run's; the lock ends with the process. A full disk
    must not end a run that could still be saved: what the file does not take is kept and tried again with each line.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.fresh = path is None or not path.exists()  # else a run goes on
        self.unwritten = bytearray()
        self._file, self._warned = open_locked(path) if path else None, False
        self._refuge = f"{path.stem}-{os.urandom(4).hex()}" if path else ""
        self._lock = threading.Lock()  # a signal's thread may have a line too

    def __call__(self, line: str, console: bool = True) -> None:
        if self.path is None:
            return
        with self._lock:
            self.unwritten += line.encode(errors="backslashreplace") + b"\n"
            try:
                while self.unwritten:
                    del self.unwritten[: self._file.write(self.unwritten)]
            except OSError as error:
                if not self._warned:
                    complain(f"warning: {self.path}: {error.strerror}; trying again")
                self._warned = True
        if console:
            with contextlib.suppress(OSError):  # a console that is gone; the file has the line
                if sys.stderr.isatty():
                    from tqdm import tqdm

                    tqdm.write(line)  # does not tear the bar
                else:
                    print(line, flush=True)

    def set_aside(self) -> Path:
        """Give the present file another name and begin a new one; the old name's lock is held until that is locked."""
        aside = next(p for n in itertools.count(1) if not (p := self.path.with_suffix(f".dead-{n}.txt")).exists())
        self.path.rename(aside)
        old, self._file, self.fresh = self._file, open_locked(self.path), True
        old.close()
        return aside

    def written(self) -> bytes:
        """What the file has, also where its name is gone."""
        self._file.seek(0)
        return self._file.read()

    def rescue(self, name: str, data: bytes) -> Path | None:
        """Write a file that its own folder cannot take into one that has room; None where there is none."""
        for base in (tempfile.gettempdir, Path.home, lambda: "/dev/shm"):
            with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
                folder = Path(base()) / self._refuge
                folder.mkdir(mode=0o700, exist_ok=True)
                write_atomic(folder / name, [data])
                return folder / name
        return None

    def close(self) -> None:
        """End with the whole log on some disk: where its own stayed full, in a folder that the console names."""
        if self._file is None:
            return
        removed = not os.fstat(self._file.fileno()).st_nlink
        if self.unwritten or removed:
            kept = self.rescue(self.path.name, self.written() + self.unwritten) or "nowhere: no folder takes it"
            complain(f"warning: {self.path} {'is gone' if removed else 'is not whole'}; the whole log is {kept}")
        self._file.close()
        self.path = self._file = None


def complain(line: str) -> None:
    """One line to stderr, which may be gone."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def open_locked(path: Path) -> io.FileIO:
    """The file, open for appending and locked until it is closed or the process ends. Raises UserError, OSError."""
    file = path.open("a+b", buffering=0)
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise FileNotFoundError  # set aside between the two, by another start
    except (BlockingIOError, FileNotFoundError):
        file.close()
        running = f"RUN_ID={path.stem} is running now and holds {path}"
        raise UserError(f"{running}; choose another or wait for its end") from None
    except (ImportError, OSError) as error:  # some network file systems
        complain(f"warning: {path} cannot be locked ({error}); do not use its RUN_ID twice")
    return file


def output_paths(hp: Hyperparameters, run_id: str) -> tuple[Path, Path]:
    """The log and the folder of results."""
    return Path(hp.out_dir) / "logs" / f"{run_id}.txt", Path(hp.out_dir) / "runs" / run_id


def progress_bar(total: int | None, label: str, log: Log, initial: int = 0):
    """A tqdm bar where the main rank has a terminal; in pipes and log files what it would show, in lines."""
    if log.path is None or not sys.stderr.isatty():
        return ProgressLines(total, label, log, initial)
    from tqdm import tqdm

    return tqdm(total=total, initial=initial, desc=label, leave=False, smoothing=0.05)


class ProgressLines:
    """`progress:LABEL done/total`, at most once in PROGRESS_SECONDS."""

    def __init__(self, total: int | None, label: str, log: Log, initial: int = 0):
        self.log, self.label, self.of = log, label, f"/{total}" if total is not None else ""
        self.done, self.started = initial, time.monotonic()
        self.said = self.started

    def update(self, n: int = 1) -> None:
        self.done, now = self.done + n, time.monotonic()
        if now - self.said >= PROGRESS_SECONDS:
            self.said = now
            self.log(f"progress:{self.label} {self.done}{self.of} seconds:{now - self.started:.0f}")

    def close(self) -> None:
        pass


class Phases:
    """Seconds spent in each named phase of a run, devices drained at both ends."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}

    @contextlib.contextmanager
    def __call__(self, name: str):
        synchronize(self.device)
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


LOWER_RATES = "a lower MATRIX_LR, SCALAR_LR or TIED_EMBED_LR"


class Signals:
    """SIGTERM, SIGINT and SIGHUP end the run at once or, while `deferred`, are noted for the training loop to act on.

    Repeated ones are ignored: torchrun passes on to its workers what the terminal has sent them already. But one that
    comes REPEATED seconds after the first ends a deferred run at once.

    Python handles a signal between two of its own instructions. A main thread that waits for another rank, in C++, may
    not come to one for half an hour: after PATIENCE seconds a thread ends the process in its place.
    """

    PATIENCE, REPEATED = 5.0, 5.0

    def __init__(self):
        self.patience = self.PATIENCE
        self.caught, self.deferred, self.ending = 0, False, False
        self.advice = "there is no checkpoint to go on from"  # what to tell whoever ends the run
        self.is_main, self.log = True, Log(None)

    def __enter__(self):
        self.before, self.pipe = {}, None
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGTERM, signal.SIGINT]
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # else nohup
                numbers.append(signal.SIGHUP)
            reads, self.pipe = os.pipe()
            os.set_blocking(self.pipe, False)
            self.pipe_before = signal.set_wakeup_fd(self.pipe, warn_on_full_buffer=False)
            threading.Thread(target=self.watch, args=(reads, numbers), daemon=True, name="signals").start()
            self.before = {s: signal.signal(s, self.handle) for s in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.pipe is not None:
            signal.set_wakeup_fd(self.pipe_before)
            os.close(self.pipe)  # ends the thread

    @contextlib.contextmanager
    def waiting(self):
        """Where the main thread only waits, in C++, a signal is the other thread's alone, and that ends at once."""
        self.patience, before = 0.0, signal.pthread_sigmask(signal.SIG_BLOCK, self.before)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            self.patience = self.PATIENCE

    def resume_from(self, checkpoint: Path) -> None:
        elsewhere = "" if self.is_main or checkpoint.exists() else ", which is on the host of rank 0"
        self.advice = f"go on with the same command and RESUME={checkpoint}{elsewhere}"

    def say(self, line: str, own: bool = False) -> None:
        """The last line, in the log and on the console: the main rank's or, where it has one of its own, any rank's."""
        if self.is_main or own:
            complain(line)
        self.log(line, console=False)

    def handle(self, number: int, _) -> None:
        first, self.caught = not self.caught, self.caught or number
        if first and not self.deferred:
            raise Interrupted(number)

    def watch(self, pipe: int, numbers: Sequence[int]) -> None:
        """End the process where the main thread does not; reads the numbers of signals until the pipe is closed."""
        first, begun, since, announced, again = 0, 0.0, math.inf, False, False
        while True:
            ready, now = select.select([pipe], [], [], 0.1 if first else None)[0], time.monotonic()
            if ready:
                read = os.read(pipe, 1)
                if not read:
                    return os.close(pipe)
                if read[0] in numbers:
                    again = first and now - begun > self.REPEATED
                    first, begun = (first, begun) if first else (read[0], now)
            if self.deferred and not self.ending:
                since = math.inf
                if first and not announced and now - begun > 2:
                    announced = True
                    self.log(f"signal:{Interrupted(first)} the step ends, then the run; another signal ends it at once")
            elif first:
                since = min(since, now)
            if again or now - since > self.patience:
                if not self.ending:
                    self.say(f"interrupted: {Interrupted(first)}; {self.advice}")
                os._exit(128 + first)


class Clock:
    """Training time, agreed over ranks (maximum) once a step and read one step later.

    Learning rate, QAT, SWA, checkpoints and the stop are functions of the agreed number alone, so all ranks decide
    alike. Reading a step late keeps the device busy: the host waits for the step before, never for the one just
    launched. The same message carries what else concerns all ranks: the loss, whether loss and gradient are finite,
    bad data, a signal.
    """

    def __init__(self, ranks: Ranks, signals: Signals):
        self.ranks, self.signals = ranks, signals
        self.elapsed_ms = 0.0  # agreed
        self.reserve_ms = 0.0  # what has to fit behind the last step
        self.durations: deque[float] = deque(maxlen=20)
        self.step, self.loss = 0, math.nan  # steps collected, and the mean loss of the last of them
        self.interrupted = False
        self.problem: str | None = None  # of this rank's data
        self._before, self._since = 0.0, None
        self._pending: Callable[[], list[float]] | None = None

    def restore(self, step: int, loss: float, elapsed_ms: float, durations: Sequence[float]) -> None:
        """Go on from another process's clock."""
        self.step, self.loss, self.elapsed_ms, self._before = step, loss, elapsed_ms, elapsed_ms
        self.durations.extend(durations)

    def resume(self) -> None:
        synchronize(self.ranks.device)
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Stop, with the device drained: the agreed time is exact here, not a step old."""
        self.collect()
        synchronize(self.ranks.device)
        self._before, self._since = self.local_ms(), None
        self.elapsed_ms = self.ranks.largest(self._before)

    def local_ms(self) -> float:
        return self._before + (1000 * (time.perf_counter() - self._since) if self._since is not None else 0.0)

    @property
    def step_ms(self) -> float | None:
        """Median of the last 20 steps; None before there are five: switches latch, and a slow first step is no measure
        of the others."""
        return statistics.median(self.durations) if len(self.durations) >= 5 else None

    def post(self, loss: Tensor, gradient_norm: Tensor) -> None:
        """End of a step: adopt what was agreed on the step before, and start agreeing on this one.

        loss is this rank's part of the mean, the norm that of the averaged gradient; both are () on the device.
        """
        self.collect()
        message = torch.zeros(4 + self.ranks.size, dtype=torch.float64)
        message[2], message[3] = self.problem is not None, self.signals.caught != 0
        message[4 + self.ranks.rank] = self.local_ms()
        message = message.to(loss.device, non_blocking=True)
        message[0], message[1] = loss.detach(), ~(loss.detach() + gradient_norm).isfinite()
        self._pending = start_read(self.ranks.sum_(message))

    def collect(self) -> None:
        """Wait for the posted step and adopt it.

        Raises, on all ranks alike, LimitError if any rank's loss was not finite and UserError if its data was bad.
        """
        if self._pending is None:
            return
        loss, broken, problem, signalled, *elapsed = self._pending()
        self._pending = None
        self.durations.append(max(elapsed) - self.elapsed_ms)
        self.elapsed_ms = max(elapsed)
        self.interrupted |= signalled > 0
        self.step += 1
        if problem:
            self.ranks.agree(self.check_data)
        if broken:
            before = f"the loss before it was {self.loss:.4f}"
            raise LimitError(
                f"loss or gradient of step {self.step} is no longer finite; {before}; a new run needs {LOWER_RATES}"
            )
        self.loss = loss

    def check_data(self) -> None:
        if self.problem:
            raise UserError(self.problem)


def start_read(x: Tensor) -> Callable[[], list[float]]:
    """Start copying x to the host. The result waits for that copy, not for what is launched after it, and gives it."""
    if x.device.type != "cuda":
        return x.tolist
    host, copied = x.to("cpu", non_blocking=True), torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return read


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


def peak_memory_mib(device: torch.device) -> tuple[int, int]:
    """(allocated, reserved) at their peak: of the device, or of this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20, torch.cuda.max_memory_reserved(device) >> 20
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    peak >>= 20 if sys.platform == "darwin" else 10
    return peak, peak


def activation_dtype(name: str, device: torch.device) -> torch.dtype:
    """DTYPE=auto is bf16 where the device has instructions for it."""
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = torch.cpu._is_avx512_bf16_supported()
        name = "bf16" if fast else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


class Compiled(NamedTuple):
    """What of a run goes through torch.compile: the training; of the evaluation, windows that are scored whole, those
    that are scored by their last targets, and test-time training's forward and backward."""

    training: bool
    whole: bool
    sliding: bool
    learning: bool

    @property
    def evaluation(self) -> bool:
        return self.whole or self.sliding or self.learning


# FLOPs from which a training gives back what compiling it takes, and a graph of the evaluation. Two cores of a CPU need
# two and a half minutes to compile the steps of eleven layers, which then take half of the time: that pays from a few
# hundred steps of cpu_mini on; a graph of its evaluation 40 to 65 s, which a million targets in sliding windows give
# back. An H200 compiles a forward in half a minute, in the evaluation on the clock, and then scores a million tokens in
# some 0.25 s instead of 0.65. Decided by settings and the text's length, not by the clock: so that a seed repeats.
COMPILE_FROM_FLOPS = {"cpu": (1e14, 2e13), "cuda": (0.0, 5e15)}


def choose_compiled(hp: Hyperparameters, device: torch.device, targets: int, ranks: int) -> Compiled:
    """COMPILE=auto: the training and those of the evaluation's graphs that pay by what a rank does with them; on CUDA
    all, where flex attention, which is made by compiling, keeps documents apart."""
    if hp.compile != "auto":
        return Compiled(*[hp.compile == "1"] * 4)
    weights, (long, much) = count_weights(hp), COMPILE_FROM_FLOPS[device.type]
    once = 2 * weights * targets / ranks  # through the text
    sliding = once * hp.eval_seq_len / (hp.eval_stride or hp.eval_seq_len)
    learns = hp.ttt_enabled and (hp.ttt_params != "lora" or hp.phased_ttt_num_phases > 0)  # LoRAs run as they are
    learning = 3 * hp.ttt_epochs * once * learns
    apart = hp.document_mask and device.type == "cuda"
    training = 6 * weights * hp.train_batch_tokens * hp.iterations >= long
    return Compiled(training, *(apart or done >= much for done in (once, sliding, learning)))


def check_compiler(compile: bool, device: torch.device) -> None:
    """Whether torch can compile here, by one small kernel, where it is to. Raises UserError.

    Where it is not: the first optimizer loads torch's compiler all the same, and that makes the folder of its cache.
    """
    try:
        from torch import _dynamo  # noqa: F401
    except OSError as error:
        raise UserError(f"torch makes no cache: {error}; set TORCHINDUCTOR_CACHE_DIR to a folder that can be") from None
    try:
        if compile:
            torch.compile(torch.square)(torch.ones(8, device=device))
    except Exception as error:  # of torch, a compiler, a linker, a disk
        text = str(error)
        reason = (re.search(".*error: .*", text) or re.search(".+", text) or [repr(error)])[0]
        needs = "it needs a C++ compiler, Python.h and room in TORCHINDUCTOR_CACHE_DIR"
        raise UserError(f"torch.compile fails ({reason}); {needs}; or set COMPILE=0") from None


def compiled(model: nn.Module, compile: bool) -> Callable:
    """A model's forward, compiled for fixed shapes or as it is."""
    if not compile:
        return model
    # A run has about ten graphs of one forward: with and without QAT and gradients, two widths of scored windows …
    torch._dynamo.config.recompile_limit = 64
    if next(model.parameters()).device.type == "cpu":
        # Otherwise threads add a table's gradients to its rows as they come, and no seed repeats.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # what torch.empty makes, for nothing
    return torch.compile(model, dynamic=False, fullgraph=True)


def write_atomic(path: Path, parts: Iterable[bytes]) -> None:
    """Write, fsync, rename: under its final name a file is whole or absent."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove(paths: Iterable[Path], log: Log) -> None:
    """Files that nobody needs any more; one that stays is no fault of the run."""
    for path in paths:
        try:
            path.unlink()
        except OSError as error:
            log(f"warning: cannot remove {path}: {error.strerror}")


def read_file(path: Path, start: bytes = b"") -> bytes:
    """All of a file, or no more than its first bytes where they are not `start`.

    Raises OSError, also for a pipe or a device, which may never end, and for what memory does not hold.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            first = file.read(len(start))
            return first + file.read() if first == start else first
    except MemoryError:
        raise OSError(errno.ENOMEM, "it is larger than the free memory", str(path)) from None


def check_regular(path: Path) -> None:
    """Raises OSError for a pipe or a device, where to open is to wait, and for what is not there."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a folder fails by itself
        raise OSError(errno.EINVAL, "it is no regular file", str(path))


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------

# CHECKPOINT, little-endian: magic, u64 length of a JSON header, the header, the tensors in the order of its table
# ("tensors": [[name, shape, dtype], …]) without padding, SHA-256 of everything before. Nothing in it is executed.
CHECKPOINT_MAGIC = b"PGCKPT\x01\n"

CHECKPOINT_META = dict(run_id=str, settings=dict, code_sha256=str, data=list, dtype=str, compile=bool, step=int)
CHECKPOINT_META |= dict(loss=float, elapsed_ms=float, durations=list, swa_samples=int, switches=dict, resumed_at=list)

# Neither move a weight by more than rounding nor a score: they may change when a run goes on.
MAY_CHANGE = ("train_log_every", "val_loss_every", "save_weights", "micro_batch_tokens", *INCIDENTAL)


class Checkpoint(NamedTuple):
    path: Path
    meta: dict  # the header without its table
    tensors: dict[str, Tensor]  # on the main rank; empty on the others


def checkpoint_parts(meta: Mapping, tensors: Mapping[str, Tensor]) -> Iterator[bytes]:
    """The file piece by piece: no second copy of the state is ever whole in memory."""
    table = [[name, list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()]
    header, digest = json.dumps({**meta, "tensors": table}).encode(), hashlib.sha256()
    data = (np.ascontiguousarray(t.cpu().numpy()).reshape(-1).view(np.uint8) for t in tensors.values())
    for part in itertools.chain((CHECKPOINT_MAGIC, struct.pack("<Q", len(header)), header), data):
        digest.update(part)
        yield part
    yield digest.digest()


def read_checkpoint(path: Path) -> Checkpoint:
    """A whole checkpoint, or a UserError that says what is wrong with it."""
    try:
        blob = read_file(path, CHECKPOINT_MAGIC)
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    others = [p for p in find_checkpoints(path.parent) if p != path]
    advice = f"; RESUME={others[-1]} is another one" if others else "; there is no other one"
    foreign = UserError(f"{path} is no checkpoint of this script{advice}")
    body, start = memoryview(blob)[:-32], len(CHECKPOINT_MAGIC) + 8
    if not blob.startswith(CHECKPOINT_MAGIC) or len(body) < start:
        raise foreign
    if hashlib.sha256(body).digest() != blob[-32:]:
        raise UserError(f"the checkpoint {path} is damaged or not whole: its checksum does not match{advice}")
    end = start + int.from_bytes(body[start - 8 : start], "little")
    try:
        meta, tensors = json.loads(bytes(body[start:end])), {}
        for name, shape, dtype in meta.pop("tensors"):
            if not all(type(n) is int and n >= 0 for n in shape):
                raise foreign
            start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
            tensors[name] = torch.from_numpy(np.frombuffer(body[start:end], dtype).reshape(shape).copy())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise foreign from None
    if end != len(body) or {k: type(v) for k, v in meta.items()} != CHECKPOINT_META:
        raise foreign
    return Checkpoint(path, meta, tensors)


def find_checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    found = (p for p in folder.glob("checkpoint-*.pgckpt") if re.fullmatch(r"checkpoint-\d+\.pgckpt", p.name))
    return sorted(found, key=lambda path: int(path.stem.removeprefix("checkpoint-")))


def find_resumed(hp: Hyperparameters, source: bytes) -> Checkpoint | None:
    """The checkpoint that RESUME names, if any, made by this code with these settings. Raises UserError.

    RESUME=auto without a checkpoint starts from the beginning: a job that is restarted until it ends needs one command.
    """
    if not hp.resume:
        return None
    path = Path(hp.resume)
    if hp.resume == "auto":
        log, folder = output_paths(hp, hp.run_id)
        try:
            if (folder / "result.json").exists():
                raise UserError(f"RUN_ID={hp.run_id} has ended: {folder / 'result.json'}; there is nothing to resume")
            if log.exists():
                open_locked(log).close()  # beside a run that is alive, its checkpoints come and go
            found = find_checkpoints(folder)
        except OSError as error:
            raise UserError(f"cannot read OUT_DIR={hp.out_dir}: {error.strerror} ({error.filename})") from None
        if not found:
            return None
        path = found[-1]
    checkpoint = read_checkpoint(path)
    if checkpoint.meta["code_sha256"] != hashlib.sha256(source).hexdigest():
        raise UserError(f"{path} was made by another train_gpt.py; the log of its run holds that source")
    settings, theirs = dataclasses.asdict(hp), checkpoint.meta["settings"]
    if settings.keys() != theirs.keys() or not re.fullmatch(r"\w[\w.-]{0,127}", checkpoint.meta["run_id"]):
        raise UserError(f"{path} is no checkpoint of this script")
    changed = [name for name in theirs if name not in MAY_CHANGE and settings[name] != theirs[name]]
    if changed:
        differences = "; ".join(f"{name.upper()}={settings[name]} here, {theirs[name]} there" for name in changed)
        raise UserError(f"{path} was made with other settings: {differences}")
    return checkpoint


# ----------------------------------------------------------------------------------------------------------------------
# Data: shards, loader, byte accounting
# ----------------------------------------------------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 256 * 4


def read_shard(path: Path) -> np.ndarray:
    """Memory map of a shard's tokens (n,) uint16. Raises UserError for anything that is not a whole shard.

    SHARD: 256 little-endian int32 (magic, version, number of tokens, zeros), then that many little-endian uint16.
    """
    try:
        check_regular(path)
        size = path.stat().st_size
        with path.open("rb") as file:
            header = np.frombuffer(file.read(12).ljust(12, b"\0"), dtype="<i4")
    except OSError as error:
        raise UserError(f"cannot read shard {path}: {error.strerror}") from None
    if size < SHARD_HEADER_BYTES or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise UserError(f"{path} is no token shard (wrong magic or version); build shards with data/prepare.py")
    promised = SHARD_HEADER_BYTES + 2 * int(header[2])
    if size != promised:
        raise UserError(f"{path} is {size} bytes, but its header promises {promised}; fetch or build it again")
    if header[2] == 0:
        raise UserError(f"{path} holds no tokens; build it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES)


def find_shards(hp: Hyperparameters, split: str) -> list[Path]:
    """Sorted shards of a split, without byte sidecars. Raises UserError where there are none."""
    folder = Path(hp.data_path)
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except OSError as error:
        raise UserError(f"cannot read DATA_PATH={folder}: {error.strerror}") from None
    names = {name for name in names if fnmatch(name, f"fineweb_{split}_*.bin")}
    if shards := sorted(folder / name for name in names if not fnmatch(name, f"fineweb_{split}_bytes_*")):
        return shards
    ways = "`python data/prepare.py fineweb` (published shards) or `python data/prepare.py offline` (no download)"
    raise UserError(f"no fineweb_{split}_*.bin in DATA_PATH={folder}; prepare data first: {ways}, then set DATA_PATH")


def data_fingerprint(paths: Sequence[Path]) -> str:
    """SHA-256 over the shards' headers, lengths and three sampled spans each (first, middle, last 64 KiB)."""
    digest, span = hashlib.sha256(), 65536
    for path in paths:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(size.to_bytes(8, "little") + file.read(SHARD_HEADER_BYTES))
            for offset in (SHARD_HEADER_BYTES, size // 2, max(SHARD_HEADER_BYTES, size - span)):
                file.seek(offset)
                digest.update(file.read(span))
    return digest.hexdigest()


class TokenStream:
    """The shards of a split as one circular stream of tokens."""

    def __init__(self, paths: Sequence[Path], vocab_size: int):
        self.paths, self.vocab_size = list(paths), vocab_size
        self.ends = list(itertools.accumulate(len(read_shard(path)) for path in paths))
        self.fingerprint = data_fingerprint(paths)

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` tokens (count,) uint16 from stream position `start`, wrapping at the end. Raises UserError."""
        parts = []
        while count:
            position = start % len(self)
            index = int(np.searchsorted(self.ends, position, side="right"))
            offset = position - (self.ends[index - 1] if index else 0)
            part = self.read_part(index, offset, min(count, self.ends[index] - position))
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts)

    def read_part(self, index: int, offset: int, count: int) -> np.ndarray:
        """Tokens of one shard, read anew: a memory map of a file that shrinks kills the process without a word."""
        path = self.paths[index]
        try:
            tokens = np.fromfile(path, dtype="<u2", count=count, offset=SHARD_HEADER_BYTES + 2 * offset)
        except OSError as error:
            raise UserError(f"cannot read shard {path} any more: {error.strerror}; put it back") from None
        if len(tokens) < count:
            raise UserError(f"shard {path} became shorter while it was in use; fetch or build it again")
        if (token := int(tokens.max())) >= self.vocab_size:
            advice = "set VOCAB_SIZE to the tokenizer's size or use shards made with it"
            raise UserError(f"{path} holds token id {token}, but VOCAB_SIZE={self.vocab_size}; {advice}")
        return tokens


class BatchLoader:
    """Step i's batch is the same TRAIN_BATCH_TOKENS targets for every world size; a rank takes its part by arithmetic.

    Sequences follow the text or, with SHUFFLE_SEQUENCES, come in a random order: a small batch of neighbours says less.
    Each time through the text has its own order and cuts it elsewhere (after public pull request 1394).

    A thread reads one batch ahead. Where the data are bad, a rank gets zeros and says why in `problem`: it still has to
    finish the step with the others, and the clock then ends the run for all.
    """

    def __init__(self, stream: TokenStream, hp: Hyperparameters, ranks: Ranks, log: Log, step: int = 0):
        self.stream, self.ranks, self.log = stream, ranks, log
        self.length, self.shuffle, self.seed = hp.train_seq_len, hp.shuffle_sequences, hp.seed
        self.batch = hp.train_batch_tokens // self.length  # sequences
        self.per_rank = self.batch // ranks.size
        self.sequences = -(-len(stream) // self.length)  # of the text; the last may go on at its beginning
        self.step, self.problem = step, None
        self._batches: queue.Queue = queue.Queue(maxsize=1)
        threading.Thread(target=self._read_ahead, daemon=True, name="loader").start()

    def _read_ahead(self) -> None:
        order = functools.lru_cache(2)(self.order)  # a batch may lie in two epochs
        for step in itertools.count(self.step):
            first, problem = step * self.batch + self.ranks.rank * self.per_rank, None
            try:
                if self.shuffle:
                    places = (divmod(i, self.sequences) for i in range(first, first + self.per_rank))
                    rows = [self.stream.read(int(order(e)[i]), self.length + 1) for e, i in places]
                else:
                    text = self.stream.read(first * self.length, self.per_rank * self.length + 1)
                    rows = np.lib.stride_tricks.sliding_window_view(text, self.length + 1)[:: self.length]
                batch = torch.from_numpy(np.asarray(rows, dtype=np.int64))
                batch = batch.pin_memory() if self.ranks.device.type == "cuda" else batch
            except Exception as error:  # whatever it is, the run must hear of it and not wait for a dead thread
                problem = str(error) if isinstance(error, UserError) else f"reading training data failed: {error!r}"
                batch = torch.zeros(self.per_rank, self.length + 1, dtype=torch.int64)
            self._batches.put((batch, problem))

    def order(self, epoch: int) -> np.ndarray:
        """Stream positions (sequences,) int64 where the sequences of an epoch begin, in the order of training."""
        generator = np.random.default_rng((self.seed, epoch))
        return generator.integers(self.length) + self.length * generator.permutation(self.sequences)

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of this rank for the next step, each (sequences, TRAIN_SEQ_LEN) int64 on the device."""
        rows, self.problem = self._batches.get()
        epoch = (self.step + 1) * self.batch * self.length // len(self.stream)
        if epoch > self.step * self.batch * self.length // len(self.stream):
            self.log(f"train_loader:wrapped epoch:{epoch} step:{self.step} stream_tokens:{len(self.stream)}")
        self.step += 1
        rows = rows.to(self.ranks.device, non_blocking=True)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def find_tokenizer(hp: Hyperparameters) -> Path:
    """TOKENIZER_PATH, else the one .model beside the shards, else the challenge's default place. Raises UserError."""
    if hp.tokenizer_path:
        path = Path(hp.tokenizer_path)
        if not path.is_file():
            raise UserError(f"TOKENIZER_PATH={path} does not exist")
        return path
    beside = sorted(Path(hp.data_path).glob("*.model"))
    if len(beside) > 1:
        raise UserError(f"{len(beside)} .model files in DATA_PATH={hp.data_path}; name one with TOKENIZER_PATH")
    default = Path("data/tokenizers/fineweb_1024_bpe.model")
    if not beside and not default.is_file():
        raise UserError(f"no .model in DATA_PATH={hp.data_path} and no {default}; set TOKENIZER_PATH")
    return beside[0] if beside else default


class TokenBytes:
    """UTF-8 bytes that each token stands for: the denominator of bits per byte, and the only place that counts them.

    A token's bytes are those of its piece, `▁` being one space. A leading `▁` counts unless the token before is a
    boundary (control, unknown, unused), where decoding drops that space. Byte tokens count 1, control tokens 0. Where
    the user-defined symbols are CaseOps' operators (data/caseops.py), bytes are of the text before that transform: an
    operator counts 0, or 3 behind an escape, where it stands for itself.
    Raises UserError for tokenizers whose text cannot be counted exactly this way, or is not the text that was given.
    """

    def __init__(self, path: Path, vocab_size: int):
        import sentencepiece

        try:
            serialized = read_file(path)
            if not serialized:
                raise RuntimeError("it is empty")
            model = sentencepiece.SentencePieceProcessor(model_proto=serialized)  # any path's name will do
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} is no SentencePiece model: {str(error).splitlines()[0]}") from None
        n = model.get_piece_size()
        if n != vocab_size:
            raise UserError(f"tokenizer {path} has {n} pieces, not VOCAB_SIZE={vocab_size}; set VOCAB_SIZE={n}")
        pieces = [model.id_to_piece(i) for i in range(n)]
        is_byte = np.array([model.is_byte(i) for i in range(n)])
        self.boundary = np.array([model.is_control(i) or model.is_unknown(i) or model.is_unused(i) for i in range(n)])
        own = [i for i, kind in enumerate(piece_types(model.serialized_model_proto())) if kind == USER_DEFINED]
        self.operator = np.isin(np.arange(n), own)
        ordinary = ~(is_byte | self.boundary)
        self.unknown_id = model.unk_id()
        self.leading_space = np.array([p.startswith("▁") for p in pieces]) & ordinary
        lengths = [len(p.removeprefix("▁").replace("▁", " ").encode()) for p in pieces]
        self.base = np.where(is_byte, 1, np.where(ordinary & ~self.operator, lengths, 0)).astype(np.int64)
        self.transform = case_transform(pieces, own)
        self.escape_id = pieces.index(OPERATORS[-1]) if self.transform else -1
        self.sha256 = hashlib.sha256(serialized).hexdigest()
        if "▁" not in itertools.compress(pieces, ordinary):
            problem = "has no `▁` piece of its own: a space would become three byte tokens"
        elif is_byte.sum() != 256:
            problem = "has no byte fallback: rare characters become a lossy <unk>; train it with one"
        elif not (pieces[BOS_ID] and model.is_control(BOS_ID)):
            problem = f"has no control token with id {BOS_ID} to start a document"
        elif self.transform is None:
            symbols = ", ".join(ascii(pieces[i]) for i in own[:4])
            problem = f"has user-defined symbols ({symbols}), which a transform of the text may use"
        elif problem := self.misspelling(model):
            problem += "; bits per byte of the text cannot be known from its ids"
        if problem:
            raise UserError(f"tokenizer {path} {problem}")

    def misspelling(self, model: Any) -> str | None:
        """Why this tokenizer's pieces do not spell the text that it was given, or None."""
        # NFKC and folded spaces are the challenge's own; its tokenizers keep every letter's case and accents.
        letters = "".join(c for c in map(chr, range(0x21, 0x530)) if c.isalpha() or c < "\x7f")
        normal = model.normalize(letters).replace("▁", " ").strip()
        if normal not in (letters, unicodedata.normalize("NFKC", letters)):
            return "has a normaliser that changes letters (such as nmt_nfkc_cf, which folds case)"
        if (alone := model.normalize("a")) not in ("a", "▁a"):
            return "puts its spaces elsewhere (treat_whitespace_as_suffix with add_dummy_prefix)"
        if alone == "a" and model.decode(model.encode(" a")).startswith(" "):
            return "keeps a document's leading spaces (trained without remove_extra_whitespaces)"
        return None

    def count(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes (n-1,) int64 of tokens[1:], each given its predecessor; tokens is (n,) of any integer type."""
        previous, target = tokens[:-1], tokens[1:]
        counts = self.base[target] + (self.leading_space[target] & ~self.boundary[previous])
        if self.transform:
            counts[self.escapes(tokens)[:-1] & self.operator[target]] = 3
        return counts

    def escapes(self, tokens: np.ndarray) -> np.ndarray:
        """Whether each of (n,) tokens escapes the next one: in a row of U+E004 the first, the third, … do."""
        mark, place = tokens == self.escape_id, np.arange(len(tokens))
        return mark & ((place - np.maximum.accumulate(np.where(mark, -1, place))) % 2 == 1)


def case_transform(pieces: Sequence[str], own: Sequence[int]) -> str | None:
    """What the text went through before a tokenizer of these pieces, of which `own` are user-defined: "" nothing,
    CaseOps by the place of its operators (after a space, one piece with it, before it), None something else."""
    if not own:
        return ""
    symbols, joined = {pieces[i] for i in own}, {"▁" + operator for operator in OPERATORS[:2]}
    if symbols == {*OPERATORS, *joined}:
        return "caseops_piece"
    before = "<caseops_before>" in pieces  # a control piece, which only says so
    return ("caseops_before" if before else "caseops_after") if symbols == {*OPERATORS} else None


USER_DEFINED = 4


def piece_types(model: bytes) -> list[int]:
    """Type of each piece (1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte) of a serialized model.

    SentencePiece's Python module does not tell user-defined symbols from others; its protobuf file does (message
    ModelProto: field 1 is a piece, whose field 3 is the type).
    """
    pieces = (piece for number, piece in protobuf_fields(model) if number == 1)
    return [next((value for number, value in protobuf_fields(piece) if number == 3), 1) for piece in pieces]


def protobuf_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field in protobuf's wire format: whole numbers for varints, else the field's bytes."""
    data = io.BytesIO(message)

    def varint() -> int:  # seven bits a byte, the lowest first, until a byte below 128
        (byte,) = data.read(1)
        return byte if byte < 128 else byte - 128 | varint() << 7

    while data.tell() < len(message):
        number, wire = divmod(varint(), 8)
        if wire not in (0, 1, 2, 5):
            raise UserError("the tokenizer's protobuf has a group, which SentencePiece does not write; use another")
        yield number, varint() if wire == 0 else data.read({1: 8, 5: 4}[wire] if wire != 2 else varint())


class Validation(NamedTuple):
    tokens: np.ndarray  # (n+1,) uint16, the whole split
    bytes: np.ndarray  # (n,) int64, of each target
    fingerprint: str
    tokenizer_path: Path
    tokenizer_sha256: str
    transform: str = ""  # of the text before the tokenizer, as case_transform names it
    density: float = 0.0  # bytes per token of the training text, where its manifest says it

    @property
    def targets(self) -> int:
        return len(self.tokens) - 1


def load_validation(hp: Hyperparameters) -> Validation:
    """The whole validation split, every id checked, and the bytes of each target. Raises UserError."""
    shards, path = find_shards(hp, "val"), find_tokenizer(hp)
    counter = TokenBytes(path, hp.vocab_size)
    stream = TokenStream(shards, hp.vocab_size)
    tokens = stream.read(0, len(stream))
    target_bytes = counter.count(tokens)
    problems = {
        "has fewer than two tokens": len(tokens) < 2,
        f"does not start with BOS ({BOS_ID})": tokens[0] != BOS_ID,
        "holds <unk>, so its text is lost": (tokens == counter.unknown_id).any(),
        "holds no text": target_bytes.sum() == 0,
    }
    for problem, found in problems.items():
        if found:
            split = f"the validation split in DATA_PATH={hp.data_path}"
            raise UserError(f"{split} {problem}; build it with data/prepare.py")
    if hp.caseops_enabled not in ("auto", str(int(bool(counter.transform)))):
        says = f"the text is {'' if counter.transform else 'not '}in CaseOps by the pieces of {path}"
        raise UserError(f"CASEOPS_ENABLED={hp.caseops_enabled}, but {says}; leave it out, or use the other data")
    density = check_manifest(Path(hp.data_path) / "manifest.json", counter.sha256)
    check_sidecar(sorted(Path(hp.data_path).glob(SIDECAR)), tokens, target_bytes)
    return Validation(tokens, target_bytes, stream.fingerprint, path, counter.sha256, counter.transform, density)


def check_sidecar(paths: Sequence[Path], tokens: np.ndarray, target_bytes: np.ndarray) -> None:
    """Raises UserError where a published sidecar, uint16 bytes of each of the n+1 tokens in shards like theirs, counts
    other bytes in a document than the ids do (n,): scores would be of different texts."""
    if not paths:
        return
    theirs = np.concatenate([read_shard(path) for path in paths]).astype(np.int64)
    advice = "remove it to score by ids, or fetch the two of one publication"
    if len(theirs) != len(tokens):
        raise UserError(f"byte sidecar {paths[0]} counts {len(theirs)} tokens, the shards hold {len(tokens)}; {advice}")
    starts = np.flatnonzero(tokens == BOS_ID)
    by_sidecar, by_ids = (np.add.reduceat(b, starts) for b in (theirs, np.concatenate([[0], target_bytes])))
    if len(wrong := np.flatnonzero(by_sidecar != by_ids)):
        first = f"document {wrong[0] + 1} has {by_sidecar[wrong[0]]} bytes by it and {by_ids[wrong[0]]} by its ids"
        raise UserError(f"byte sidecar {paths[0]}: {first} ({len(wrong)} of {len(starts)} documents differ); {advice}")


def check_manifest(path: Path, tokenizer_sha256: str) -> float:
    """Bytes of text per training token as data/prepare.py counted them; 0 where this is no manifest of its.

    Raises UserError where the shards beside it were made with another tokenizer.
    """
    try:
        manifest = json.loads(read_file(path))
        if not isinstance(manifest, dict) or "prepare_version" not in manifest:
            return 0.0  # of published shards
        named, train = str(manifest["tokenizer"]["sha256"]), manifest.get("splits", {}).get("train")
        density = train["normalised_bytes"] / train["tokens"] if train else 0.0
    except FileNotFoundError:
        return 0.0
    except (OSError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError) as error:
        advice = "build the data set again, or move it away"
        raise UserError(f"{path} cannot be used ({shown(repr(error))}); {advice}") from None
    if named != tokenizer_sha256:
        other = f"another tokenizer (sha256 {shown(named[:16])}…)"
        raise UserError(f"the shards in {path.parent} were made with {other}; see {path}")
    return density


class Run(NamedTuple):
    """What every stage of a run needs."""

    hp: Hyperparameters
    ranks: Ranks
    log: Log
    phases: Phases
    dtype: torch.dtype  # of activations
    attend: Callable
    compile: Compiled
    val: Validation
    stream: TokenStream | None  # training text, where the run trains
    folder: Path  # of results
    source: bytes  # of this file, as it runs
    signals: Signals
    checkpoint: Checkpoint | None  # to go on from

    def build(self, context: int) -> "GPT":
        """An uninitialized model for this context, on CPU."""
        return GPT(self.hp, context, self.attend, self.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------

NORM_EPS = torch.finfo(torch.float32).eps  # for bf16 too: the mean square of a fresh token table is only 2.5e-5


def scale_rows(x: Tensor, factor: Tensor) -> Tensor:
    """x (…, D) times factor (…, 1) fp32, rounded once; not differentiable."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or not x.numel() or torch.compiler.is_compiling():
        y = x * factor
        return y if y.dtype == x.dtype else y.to(x.dtype)  # compiled by torch 2.11, an idle cast here has no gradient
    # A batch norm for inference, each row a channel of mean 0 and variance 1: one pass, where an eager CPU takes three
    # to convert, multiply and round; a twentieth of a step.
    factor = factor.flatten()
    rows, mean, variance = x.reshape(1, len(factor), -1), torch.zeros_like(factor), torch.ones_like(factor)
    return torch.batch_norm(rows, factor, None, mean, variance, False, 0.0, 0.0, False).view(x.shape)


class RMSNorm(torch.autograd.Function):
    """scale x / sqrt(mean(x²) + eps) over the last dimension, without weights; in fp32, rounded once.

    Its own backward reuses the output: half the passes over memory of the composite one, a tenth of an eager CPU step.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        factor = scale * (norm.square() / x.size(-1) + NORM_EPS).rsqrt()
        y = scale_rows(x, factor)
        ctx.save_for_backward(y, factor)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        y, factor = ctx.saved_tensors
        along = (gradient * y).mean(-1, keepdim=True, dtype=torch.float32) / ctx.scale**2
        return torch.addcmul(gradient, y, along.to(y.dtype), value=-1) * factor.to(y.dtype), None


def rms_norm(x: Tensor, scale: float = 1.0) -> Tensor:
    return RMSNorm.apply(x, scale)


class CastedLinear(nn.Module):
    """y = x Wᵀ with an fp32 master weight (out, in) cast to the activations' dtype: the one seam of the model.

    Fake quantization lives here; hooks see or change what a matrix does. The switch is an attribute of the instance:
    torch.compile guards instance attributes, while it folds a class attribute into the first graph.
    As a table of tokens, the same weight is read row by row: a tied head is its token table, one module, one parameter.
    """

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))
        self.register_buffer("row_scale", None, persistent=False)  # (out, 1) fp32, set when QAT is prepared
        self.fake_quant, self.q_max = False, 0

    def quantized(self) -> Tensor:
        """(out, in) fp32: the weight, or while fake quantization is on its values on the grid."""
        if not self.fake_quant:
            return self.weight
        grid = quantize_rows(self.weight.detach(), self.row_scale, self.q_max) * self.row_scale
        return grid + (self.weight - self.weight.detach())  # value: the grid's, exactly; gradient: straight through

    def look_up(self, rows: Tensor) -> Tensor:
        """(…,) int -> (…, in) fp32"""
        return F.embedding(rows, self.quantized())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.quantized().to(x.dtype))


def add_scaled(x: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    """x + scale y, (B, T, D) with a scale (D,) of each channel: one pass over memory where product and sum take two."""
    return torch.addcmul(x, scale.to(x.dtype), y)


class ProjectedTable(nn.Module):
    """A table of narrow vectors, brought to the width of what they are added to, and scaled."""

    def __init__(self, rows: int, dim: int, out_dim: int):
        super().__init__()
        self.table = nn.Embedding(rows, dim, _weight=torch.empty(rows, dim))
        self.proj = CastedLinear(dim, out_dim)
        self.scale = nn.Parameter(torch.empty(()))

    def forward(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T) int -> (B, T, out)"""
        return self.proj(self.table(index).to(dtype)) * self.scale.to(dtype)


class BigramHash(ProjectedTable):
    """A hashed table of token pairs, added to the embedding. Row M-1 stands for 'no predecessor'."""

    def forward(self, tokens: Tensor, starts: Tensor, dtype: torch.dtype) -> Tensor:
        """tokens (B, T) int, starts (B, T) bool: the first position and every BOS -> (B, T, D)."""
        rows = self.table.num_embeddings
        now = tokens.to(torch.int32)
        pair = torch.bitwise_xor(36313 * now, 27191 * now.roll(1, dims=1)).remainder(rows - 1)
        return super().forward(torch.where(starts, rows - 1, pair), dtype)


class SmearGate(nn.Module):
    """x_i + sigmoid(g) (x_{i-1} - x_i) per channel; nothing crosses into the first position or a BOS."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        previous = F.pad(x, (0, 0, 1, -1))
        return torch.where(starts[..., None], x, torch.lerp(x, previous, self.gate.sigmoid().to(x.dtype)))


class TokenSmearGate(nn.Module):
    """x_i + strength · sigmoid(w · x_i's first channels) x_{i-1}; nothing crosses into the first position or a BOS.

    Of raw embeddings, and the identity at the start (public pull requests 1667 and 1787).
    """

    def __init__(self, window: int):
        super().__init__()
        self.proj = CastedLinear(window, 1)
        self.strength = nn.Parameter(torch.empty(()))

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        share = self.strength.to(x.dtype) * self.proj(x[..., : self.proj.weight.size(1)]).sigmoid()
        return torch.where(starts[..., None], x, x + share * F.pad(x, (0, 0, 1, -1)))


class Rotary(nn.Module):
    """Rotates the first `dims` of each head's `width` dimensions; tables for one context, computed once.

    NTK rule: a context r times longer than TRAIN_SEQ_LEN multiplies the base by r^(d/(d-2)). Tables cached lazily
    inside a scoring pass would be inference tensors that the next backward cannot use.
    """

    def __init__(self, dims: int, width: int, base: float, context: int, train_seq_len: int):
        super().__init__()
        ratio = max(1.0, context / train_seq_len)
        base = base * ratio ** (dims / (dims - 2))
        frequencies = base ** (-torch.arange(0, dims, 2, dtype=torch.float32) / dims)
        angles = torch.outer(torch.arange(context, dtype=torch.float32), frequencies)[:, None]  # (context, 1, dims/2)
        self.dims, rest = dims, (0, width - dims)
        self.register_buffer("cos", F.pad(angles.cos().repeat(1, 1, 2), rest, value=1.0), persistent=False)
        self.register_buffer("sin", F.pad(torch.cat((angles.sin(), -angles.sin()), -1), rest), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, K) -> the same shape; half-split pairs (x1 c + x2 s, x2 c - x1 s)."""
        cos, sin = self.cos[: x.size(1)].to(x.dtype), self.sin[: x.size(1)].to(x.dtype)
        x1, x2, rest = x.split((self.dims // 2, self.dims // 2, x.size(-1) - self.dims), dim=-1)
        return torch.addcmul(x * cos, torch.cat((x2, x1, rest), dim=-1), sin)


@dataclasses.dataclass(frozen=True)
class Stream:
    """What the blocks read beside x: what a technique needs there is a field here, not an argument of each of them."""

    x0: Tensor  # (B, T, D): the embedding that the first block gets
    value_embedding: Tensor | None  # (B, T, Hkv*K)
    first_value: Tensor | None = None  # (B, T, Hkv*K): the first layer's own value, from the second pass on
    mask: Any = None  # what keeps documents apart, as the attention kernel wants it; None: it is causal alone


class Attention(nn.Module):
    """Causal grouped-query attention with normalized queries and keys, partial rotary and a gain per query head."""

    def __init__(self, hp: Hyperparameters, layer: int, rotary: Rotary, attend: Callable):
        super().__init__()
        kv_dim = hp.num_kv_heads * hp.head_dim
        self.q = CastedLinear(hp.model_dim, hp.model_dim)
        self.k = CastedLinear(hp.model_dim, kv_dim)
        self.v = CastedLinear(hp.model_dim, kv_dim)
        self.out = CastedLinear(hp.model_dim, hp.model_dim)
        self.q_gain = nn.Parameter(torch.empty(hp.num_heads))
        self.ve_scale = nn.Parameter(torch.empty(())) if layer in hp.ve_layer_ids else None
        # Not in the first layer, whose value it is: a parameter without a gradient.
        self.first_share = nn.Parameter(torch.empty(())) if hp.value_residual and layer else None
        self.gate = HeadGate(hp.model_dim, hp.num_heads) if hp.gated_attention else None
        self.sparse_gate = CastedLinear(hp.gate_window, hp.num_heads) if hp.sparse_attn_gate_enabled else None
        self.gate_scale = hp.sparse_attn_gate_scale
        self.exclude_self = layer >= hp.num_layers - hp.xsa_last_n
        self.head_dim, self.rotary, self.attend = hp.head_dim, rotary, attend

    def forward(self, x: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> (output (B, T, D), this layer's own value (B, T, Hkv*K)).

        Value residual (Zhou et al., 2024) adds a share of the first layer's own value to v.
        """
        heads = (*x.shape[:2], -1, self.head_dim)
        v = own_value = self.v(x)
        if self.first_share is not None:
            v = v + stream.first_value * self.first_share.to(x.dtype)
        if self.ve_scale is not None:
            v = v + stream.value_embedding * self.ve_scale.to(x.dtype)
        q, k, v = self.q(x).view(heads), self.k(x).view(heads), v.view(heads)
        q = self.rotary(rms_norm(q)) * self.q_gain.to(x.dtype)[:, None]
        k = self.rotary(rms_norm(k))
        y = self.attend(q, k, v, stream.mask)
        if self.exclude_self:
            y = exclude_own_value(y, v)
        if self.gate is not None:
            y = y * self.gate(x)[..., None]
        if self.sparse_gate is not None:  # one half at the start (public pull request 1787)
            window = x[..., : self.sparse_gate.weight.size(1)]
            y = y * torch.sigmoid(self.gate_scale * self.sparse_gate(window))[..., None]
        return self.out(y.reshape(x.shape)), own_value


class HeadGate(nn.Module):
    """2 sigmoid(w_h · x + b_h) per head: 1 at the start (after the gated attention of Qiu et al., 2025)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.proj = CastedLinear(dim, heads)
        self.bias = nn.Parameter(torch.empty(heads))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, H)"""
        return 2 * torch.sigmoid(self.proj(x) + self.bias.to(x.dtype))


def exclude_own_value(y: Tensor, v: Tensor) -> Tensor:
    """XSA: y (B, T, H, K) without its component along this position's value v (B, T, Hkv, K) of the head's group."""
    own = F.normalize(v, dim=-1).unsqueeze(3)  # (B, T, Hkv, 1, K)
    grouped = y.view(*v.shape[:3], -1, y.size(-1))  # (B, T, Hkv, H/Hkv, K)
    return (grouped - (grouped * own).sum(-1, keepdim=True) * own).view_as(y)


class MLP(nn.Module):
    """W_down · f(x). f is leaky_relu(W_up x)², whose square keeps the sign-blind strength of both sides, or gated:
    silu(W_gate x) ⊙ W_up x (SwiGLU, Shazeer 2020), or the same with relu(z)² in place of silu (star_relu)."""

    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.up = CastedLinear(hp.model_dim, hp.mlp_dim)
        self.gate = CastedLinear(hp.model_dim, hp.mlp_dim) if hp.mlp_kind != "leaky_relu2" else None
        self.down = CastedLinear(hp.mlp_dim, hp.model_dim)
        self.swish, self.slope = hp.mlp_kind == "swiglu", hp.leaky_relu_slope

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        if self.gate is None:
            return self.down(F.leaky_relu(hidden, self.slope).square())
        gate = self.gate(x)
        return self.down((F.silu(gate) if self.swish else gate.relu().square()) * hidden)


class Block(nn.Module):
    """Pre-norm attention and MLP on a mix of the residual stream and the first embedding.

    Two halves, attend and feed, which the trunk adds up: where they read and write is the trunk's business.
    """

    def __init__(self, hp: Hyperparameters, layer: int, rotary: Rotary, attend: Callable):
        super().__init__()
        self.attn, self.mlp = Attention(hp, layer, rotary, attend), MLP(hp)
        self.resid_mix = nn.Parameter(torch.empty(2, hp.model_dim))
        self.attn_scale = nn.Parameter(torch.empty(hp.model_dim))
        self.mlp_scale = nn.Parameter(torch.empty(hp.model_dim))
        self.norm_scale = 1 / math.sqrt(layer + 1) if hp.ln_scale else 1.0
        in_lanes = 0 < hp.parallel_start_layer <= layer
        self.lane_weights = nn.Parameter(torch.empty(2, 3)) if in_lanes else None

    def mix(self, x: Tensor, stream: Stream) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        return add_scaled(mix[0] * x, mix[1], stream.x0)

    def attend(self, x: Tensor, stream: Stream) -> tuple[Tensor, Tensor]:
        """(what attention adds to x (B, T, D) by attn_scale, this layer's own value (B, T, Hkv*K))"""
        return self.attn(rms_norm(x, self.norm_scale), stream)

    def feed(self, x: Tensor) -> Tensor:
        """What the MLP adds to x (B, T, D) by mlp_scale."""
        return self.mlp(rms_norm(x, self.norm_scale))

    def route(self, lanes: tuple[Tensor, Tensor], attended: Tensor, fed: Tensor) -> tuple[Tensor, Tensor]:
        """Both lanes after this layer: each its own weighted sum of itself and of what the two halves add."""
        weights = self.lane_weights.to(fed.dtype)
        attended, fed = self.attn_scale.to(fed.dtype) * attended, self.mlp_scale.to(fed.dtype) * fed
        return tuple(w[0] * lane + w[1] * attended + w[2] * fed for w, lane in zip(weights, lanes, strict=True))


def layer_passes(hp: Hyperparameters, loops: int) -> tuple[tuple[int, int | None], ...]:
    """(layer, number of the extra loop that begins with it, else None) of every pass through a block, in order.

    Depth recurrence (Universal Transformers, Dehghani et al., 2018): layers LOOP_START…LOOP_END run once and then
    `loops` times more with the same weights.
    """
    once = [(layer, None) for layer in range(hp.num_layers)]
    again = [(layer, loop if layer == hp.loop_start else None)
             for loop in range(loops) for layer in range(hp.loop_start, hp.loop_end + 1)]  # fmt: skip
    return (*once[: hp.loop_end + 1], *again, *once[hp.loop_end + 1 :])


class GPT(nn.Module):
    """The whole model for one context length. Parameters are uninitialized until init_weights or load_state_dict.

    It reads only the model section of the settings and knows no learning rate, rank, clock or tokenizer.
    """

    def __init__(self, hp: Hyperparameters, context: int, attend: Callable, dtype: torch.dtype):
        super().__init__()
        dim, kv_dim = hp.model_dim, hp.num_kv_heads * hp.head_dim
        self.tok_emb = CastedLinear(dim, hp.vocab_size)
        self.bigram = BigramHash(hp.bigram_vocab_size, hp.bigram_dim, dim) if hp.bigram_vocab_size else None
        smears = hp.smear_gate_kind if hp.smear_gate_enabled else None
        self.smear = SmearGate(dim) if smears == "channel" else None
        self.token_smear = TokenSmearGate(hp.gate_window) if smears == "token" else None
        # A second token table, added to the values of some layers.
        self.value_embedding = ProjectedTable(hp.vocab_size, hp.ve_dim, kv_dim) if hp.ve_enabled else None
        rotary = Rotary(hp.rope_dims or hp.head_dim, hp.head_dim, hp.rope_base, context, hp.train_seq_len)
        self.blocks = nn.ModuleList(Block(hp, layer, rotary, attend) for layer in range(hp.num_layers))
        self.plain, self.looped = layer_passes(hp, 0), layer_passes(hp, hp.num_loops)
        self.looping = hp.num_loops > 0  # training may switch it on later
        self.loop_vectors = nn.Parameter(torch.empty(hp.num_loops, dim)) if hp.num_loops and hp.loop_vectors else None
        skips = len(self.looped) // 2 if hp.unet_skips else 0
        self.skip_weights = nn.Parameter(torch.empty(skips, dim)) if skips else None
        self.skip_gates = nn.Parameter(torch.empty(skips, dim)) if skips and hp.skip_gates_enabled else None
        self.lm_head = None if hp.tie_embeddings else CastedLinear(dim, hp.vocab_size)
        self.softcap, self.dtype = hp.logit_softcap, dtype
        self.document_mask = None
        if hp.document_mask:
            self.document_mask = flex_mask if attend is flex else additive_mask
        for name, _ in self.named_parameters():
            row_of(name)  # a parameter without initial values, optimizer and storage is a defect: here, not after a run

    @property
    def head(self) -> CastedLinear:
        """The matrix that makes logits: the token table itself, where they are tied."""
        return self.tok_emb if self.lm_head is None else self.lm_head

    def trunk(self, tokens: Tensor, last: int | None = None) -> Tensor:
        """(B, T) int -> (B, T, D): normalized output of the last block, or (B, last, D) of the last positions alone.

        Nothing but attention crosses a BOS, and with DOCUMENT_MASK not even that: a document's scores are then those
        that it has alone. Rotation needs no positions of its own for it: queries and keys meet by their distance.
        """
        starts = tokens == BOS_ID
        starts[:, 0] = True
        x = self.tok_emb.look_up(tokens).to(self.dtype)
        if self.bigram is not None:
            x = x + self.bigram(tokens, starts, self.dtype)
        if self.token_smear is not None:
            x = self.token_smear(x, starts)
        x = rms_norm(x)
        if self.smear is not None:
            x = self.smear(x, starts)
        ve = self.value_embedding(tokens, self.dtype) if self.value_embedding is not None else None
        mask = None if self.document_mask is None else self.document_mask(starts, x.dtype)
        stream, skips = Stream(x, ve, mask=mask), []
        passes = self.looped if self.looping else self.plain
        encoder = len(passes) // 2 if self.skip_weights is not None else 0
        lane = None  # the MLPs' own residual stream; x is then attention's (public pull request 1529)
        for place, (layer, loop) in enumerate(passes):
            block = self.blocks[layer]
            if lane is None and block.lane_weights is not None:
                lane = x
            if place >= encoder and skips:  # each weight belongs to the output that it scales
                x = self.add_skip(x, len(skips) - 1, skips.pop())
            if loop is not None and self.loop_vectors is not None:
                x = x + self.loop_vectors[loop].to(x.dtype)
            mixed = block.mix(x, stream)
            y, own_value = block.attend(mixed, stream)
            if last is not None and place == len(passes) - 1:  # nothing after this attention looks at other positions
                mixed, x, y = mixed[:, -last:], x[:, -last:], y[:, -last:]
                lane = None if lane is None else lane[:, -last:]
            if lane is None:
                x = add_scaled(mixed, block.attn_scale, y)
                x = add_scaled(x, block.mlp_scale, block.feed(x))
            else:
                x, lane = block.route((x, lane), y, block.feed(lane))
            if place == 0:
                stream = dataclasses.replace(stream, first_value=own_value)
            if place < encoder:
                skips.append(x)
        return rms_norm(x if lane is None else 0.5 * (x + lane))

    def add_skip(self, x: Tensor, index: int, pushed: Tensor) -> Tensor:
        """x (B, T, D) and the output that was pushed as number `index`, weighted: their sum or, gated, a blend."""
        if self.skip_gates is None:
            return add_scaled(x, self.skip_weights[index], pushed)
        skip = self.skip_weights[index].to(x.dtype) * pushed
        return skip.lerp(x, self.skip_gates[index].sigmoid().to(x.dtype))

    def unembed(self, x: Tensor) -> Tensor:
        """(B, T, D) -> softcapped logits (B, T, V) fp32."""
        return self.softcap * self.head(x).float().div_(self.softcap).tanh_()  # in place: the largest tensor of all

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) int -> (B, T, V) fp32"""
        return self.unembed(self.trunk(tokens))

    def forward(self, tokens: Tensor, targets: Tensor, temperatures: tuple[float, ...] = ()) -> Tensor:
        """Nats (B, S) fp32, unreduced, of the last S targets. tokens is (B, T) int, targets (B, S) int64, S <= T.

        Sliding windows score only their last positions: the last MLP and the head run on those. With temperatures,
        the nats are those of softmax(logits / t) for each t: (B, S, temperatures).
        """
        x = self.trunk(tokens, targets.size(1) if targets.size(1) < tokens.size(1) else None)
        logits, wanted = self.unembed(x).flatten(0, 1), targets.flatten()
        if not temperatures:
            return F.cross_entropy(logits, wanted, reduction="none").view_as(targets)
        nats = [F.cross_entropy(logits / t, wanted, reduction="none") for t in temperatures]
        return torch.stack(nats, dim=-1).view(*targets.shape, len(temperatures))


def orthogonal(w: Tensor, hp: Hyperparameters, generator: torch.Generator) -> None:
    nn.init.orthogonal_(w, generator=generator)


def normal(std: Callable[[Hyperparameters], float]) -> Callable:
    return lambda w, hp, generator: nn.init.normal_(w, std=std(hp), generator=generator)


def constant(value: float | list) -> Callable:
    """One value for all; of a list, each for its place in the last dimensions."""
    return lambda w, hp, generator: w.copy_(torch.tensor(value).expand_as(w))


class Storage(NamedTuple):
    """How the artifact holds some parameters: beside each other, in streams and tables of their own."""

    label: str
    forms: tuple[str, ...]  # what each may be held as
    bits: Callable[[Hyperparameters], int] | None = None  # what chooses among these; None: the first
    sigmas: Callable[[Hyperparameters], float] | None = None  # QUANT=sdclip and rd: deviations to the last level
    reconstructed: bool = False  # by late QAT while training, and by full GPTQ from calibration text


CODES = ("int6", "int5", "int7", "int8", "tcq5", "tcq6", "tcq7", "tcq8")  # of a grid; of a trellis
STORAGE = (  # in the artifact's order: like beside like
    Storage("attention", CODES, lambda hp: hp.attn_bits, lambda hp: hp.attn_clip_sigmas, reconstructed=True),
    Storage("attention_out", CODES, lambda hp: hp.attn_out_bits, lambda hp: hp.attn_clip_sigmas, reconstructed=True),
    Storage("mlp", CODES, lambda hp: hp.mlp_bits, lambda hp: hp.mlp_clip_sigmas, reconstructed=True),
    Storage("embedding", (*CODES, "fp16"), lambda hp: hp.embed_bits, lambda hp: hp.embed_clip_sigmas),
    Storage("head", (*CODES, "fp16"), lambda hp: hp.embed_bits, lambda hp: hp.embed_clip_sigmas),
    Storage("gate", ("int8",)),
    Storage("projection", (*CODES, "fp16"), lambda hp: hp.projection_bits, lambda hp: hp.embed_clip_sigmas),
    Storage("control", ("fp32", "fp16"), lambda hp: hp.control_bits),
)


class Row(NamedTuple):
    """All that the file knows of the parameters whose whole name matches `names`."""

    names: str  # a regular expression
    initial: Callable[[Tensor, Hyperparameters, torch.Generator], Any]
    optimizer: str  # a key of optimizer_rows
    storage: Storage


def parameter_row(names: str, initial: Callable, optimizer: str, label: str) -> Row:
    """A row of PARAMETERS; `#.` stands for a block and its number."""
    storage = next(storage for storage in STORAGE if storage.label == label)
    return Row(names.replace("#.", r"blocks\.\d+\."), initial, optimizer, storage)


# Every parameter has exactly one row. Orthogonal inputs and zero outputs: every block starts as the identity and every
# matrix has a gradient by step two.
PARAMETERS = (
    parameter_row(r"#.attn\.(q|k|v)\.weight", orthogonal, "matrix", "attention"),
    parameter_row(r"#.attn\.out\.weight", constant(0), "matrix", "attention_out"),
    parameter_row(r"#.mlp\.(up|gate)\.weight", orthogonal, "matrix", "mlp"),
    parameter_row(r"#.mlp\.down\.weight", constant(0), "matrix", "mlp"),
    parameter_row(r"tok_emb\.weight", normal(lambda hp: hp.tied_embed_init_std), "table", "embedding"),
    parameter_row(r"bigram\.table\.weight", constant(0), "table", "embedding"),
    parameter_row(r"value_embedding\.table\.weight", normal(lambda hp: 0.01), "table", "embedding"),
    parameter_row(r"lm_head\.weight", constant(0), "head", "head"),
    parameter_row(r"(bigram|value_embedding)\.proj\.weight", orthogonal, "scalar", "projection"),
    parameter_row(r"bigram\.scale", constant(0.05), "scalar", "control"),
    parameter_row(r"value_embedding\.scale", constant(0.1), "scalar", "control"),
    parameter_row(r"smear\.gate", constant(0), "scalar", "control"),
    parameter_row(r"token_smear\.(proj\.weight|strength)", constant(0), "scalar", "control"),
    parameter_row(r"skip_weights", constant(1), "scalar", "control"),
    parameter_row(r"skip_gates", constant(0), "scalar", "control"),
    parameter_row(r"loop_vectors", orthogonal, "scalar", "control"),
    parameter_row(r"#.resid_mix", constant([[1], [0]]), "scalar", "control"),  # of two streams the first alone
    # A lane keeps a little more than itself, and takes all of attention and MLP.
    parameter_row(r"#.lane_weights", constant([1.1, 1, 1]), "scalar", "control"),
    parameter_row(r"#.(attn_scale|mlp_scale)", constant(1), "scalar", "control"),
    parameter_row(r"#.attn\.q_gain", lambda w, hp, _: w.fill_(hp.qk_gain_init), "scalar", "control"),
    parameter_row(r"#.attn\.ve_scale", constant(1), "scalar", "control"),
    parameter_row(r"#.attn\.first_share", constant(0), "scalar", "control"),
    parameter_row(r"#.attn\.gate\.proj\.weight", constant(0), "scalar", "gate"),
    parameter_row(r"#.attn\.sparse_gate\.weight", constant(0), "scalar", "projection"),
    parameter_row(r"#.attn\.gate\.bias", constant(0), "scalar", "control"),
)


@functools.cache
def row_of(name: str) -> Row:
    """The only row that names a parameter; none or two is a defect of the program."""
    rows = [row for row in PARAMETERS if re.fullmatch(row.names, name)]
    if len(rows) != 1:
        raise RuntimeError(f"parameter {name} has {len(rows)} rows in PARAMETERS: {[row.names for row in rows]}")
    return rows[0]


def label_of(name: str) -> str:
    return row_of(name).storage.label


def init_weights(model: GPT, hp: Hyperparameters) -> None:
    """Initial values from SEED of a model that is still on the CPU: the same for every device and rank."""
    generator = torch.Generator().manual_seed(hp.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            row_of(name).initial(parameter, hp, generator)


def additive_mask(starts: Tensor, dtype: torch.dtype) -> Tensor:
    """starts (B, T) bool, of documents -> (B, 1, T, T): 0 where a position may see another, -inf where not."""
    document = starts.cumsum(1)
    seen = (document[:, :, None] == document[:, None, :]).tril()
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)[:, None]


def flex_mask(starts: Tensor, dtype: torch.dtype):
    """The same as blocks for flex attention, which skips those that see nothing. Outside of a compiled graph additive:
    there flex attention would hold all scores."""
    return document_blocks(starts) if torch.compiler.is_compiling() else additive_mask(starts, dtype)


def document_blocks(starts: Tensor, width: int = 128):
    """starts (B, T) bool -> BlockMask. torch's create_block_mask looks at every pair of positions for it, and cannot
    be compiled by torch 2.9; documents follow one another, so the ends of a block say whom all of it sees."""
    from torch.nn.attention.flex_attention import BlockMask

    document, length = starts.cumsum(1), starts.size(1)

    def seen(row: Tensor, _, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document[row, query] == document[row, key])

    block = torch.arange(-(-length // width), device=starts.device)
    first, last = document[:, block * width], document[:, (block * width + width - 1).clamp(max=length - 1)]
    before, itself = block[:, None] > block, block[:, None] == block
    whole = before & (first[:, None] == last[:, :, None])
    part = (itself | before & (last[:, None] == first[:, :, None])) & ~whole
    lists = []  # of the blocks that each block of queries sees: how many, and which
    for some in (part[:, None].int(), whole[:, None].int()):
        lists += [some.sum(-1).int(), some.sort(dim=-1, descending=True, stable=True).indices.int()]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=width, mask_mod=seen, seq_lengths=(length, length))


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
    """Attention under flex_mask: compiled to a kernel that skips what no position sees, else SDPA's."""
    if mask is None or isinstance(mask, Tensor):
        return sdpa(q, k, v, mask)
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1)).transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """torch's own attention in the layout of the flash kernels: q (B, T, H, K), k and v (B, T, Hkv, K); causal, or
    under an additive mask (B, 1, T, T)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    how = dict(is_causal=mask is None, enable_gqa=q.size(1) != k.size(1))
    return F.scaled_dot_product_attention(q, k, v, mask, **how).transpose(1, 2)


def matmul_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same attention as three batched products, for short contexts on CPUs with bf16 instructions.

    There, with its backward, it takes half the time of SDPA, whose kernel is made for long ones; memory grows with T².
    """
    batch, length, heads, width = q.shape
    groups = k.size(2)
    q = q.view(batch, length, groups, -1, width).permute(0, 2, 3, 1, 4).reshape(batch * groups, -1, width)
    k, v = (x.transpose(1, 2).reshape(batch * groups, length, width) for x in (k, v))
    if mask is None:
        future = torch.full((length, length), -math.inf, dtype=q.dtype, device=q.device).triu_(1)
        mask = future.repeat(heads // groups, 1).expand(batch * groups, -1, -1)
    else:
        mask = mask[:, None].expand(-1, groups, heads // groups, -1, -1).reshape(batch * groups, -1, length)
    y = torch.baddbmm(mask, q, k.mT, alpha=width**-0.5).softmax(-1) @ v
    return y.view(batch, groups, -1, length, width).permute(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


def short_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Plain products where a backward follows, and SDPA where none does: of short contexts on a CPU it takes half their
    time forward, and twice backward."""
    return (matmul_attention if torch.is_grad_enabled() else sdpa)(q, k, v, mask)


def load_flash(kernel: str) -> Callable:
    """The causal kernel of FlashAttention 3 or 2 on (B, T, H, K); raises ImportError where it is not installed."""
    if kernel == "fa3":
        from flash_attn_interface import flash_attn_func
    else:
        from flash_attn import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor, _: None = None) -> Tensor:
        y = flash_attn_func(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=True)
        return (y[0] if isinstance(y, tuple) else y).to(q.dtype)  # some FA3 versions also return the log-sum-exp

    return attend


def attention_fails(attend: Callable, hp: Hyperparameters, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a kernel does not run here, forward or backward, or None: a wheel may be built for another GPU."""
    heads, starts = (hp.num_heads, hp.num_kv_heads, hp.num_kv_heads), torch.zeros(1, 128, device=device).bool()
    q, k, v = (torch.zeros(1, 128, n, hp.head_dim, device=device, dtype=dtype, requires_grad=True) for n in heads)
    try:
        masked = torch.compile(lambda *qkv: flex(*qkv, flex_mask(starts, dtype)), dynamic=False, fullgraph=True)
        (masked if attend is flex else attend)(q, k, v).sum().backward()
        synchronize(device)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return f"does not run here ({str(error).splitlines()[0]})"
    return None


def choose_attention(hp: Hyperparameters, device: torch.device, dtype: torch.dtype) -> tuple[str, Callable]:
    """(what the log says, attend). A flash kernel asked for by name works or is a UserError; auto takes the first of
    FA3, FA2, SDPA that works on CUDA (of flex and SDPA, where documents are kept apart), and on CPU the faster of SDPA
    and plain products."""
    plain = {"sdpa": sdpa, "matmul": matmul_attention}
    if hp.attention in plain:
        return hp.attention, plain[hp.attention]
    if hp.attention == "auto" and device.type == "cpu":
        short = max(hp.train_seq_len, hp.eval_seq_len) <= 512 and dtype == torch.bfloat16
        return ("matmul (sdpa where nothing is learned)", short_attention) if short else ("sdpa", sdpa)
    reasons, kernels = [], ("flex",) if hp.document_mask else ("fa3", "fa2")
    for kernel in kernels if hp.attention == "auto" else (hp.attention,):
        if device.type != "cuda":
            reason = "needs CUDA"
        elif hp.document_mask != (kernel == "flex"):
            reason = f"needs DOCUMENT_MASK={int(kernel == 'flex')}"
        elif kernel == "flex" and hp.compile == "0":
            reason = "needs COMPILE=1"
        elif kernel == "fa3" and torch.cuda.get_device_capability(device)[0] != 9:
            reason = "needs a Hopper GPU"
        elif kernel != "flex" and dtype != torch.bfloat16:
            reason = "needs DTYPE=bf16"
        elif hp.head_dim % 8:
            reason = f"needs a head width divisible by 8, not {hp.head_dim}"
        else:
            try:
                attend = flex if kernel == "flex" else load_flash(kernel)
                if (reason := attention_fails(attend, hp, device, dtype)) is None:
                    return kernel, attend
            except ImportError as error:
                reason = f"cannot be imported ({error})"
        if hp.attention == kernel:
            raise UserError(f"ATTENTION={kernel} {reason}; use ATTENTION=auto or sdpa")
        reasons.append(f"{kernel} {reason}")
    return f"sdpa ({'; '.join(reasons)})", sdpa


# ----------------------------------------------------------------------------------------------------------------------
# Optimizers and schedule
# ----------------------------------------------------------------------------------------------------------------------


def newton_schulz(x: Tensor, steps: int) -> Tensor:
    """Nearly orthogonal factor of each matrix of x (n, rows, cols), in x's dtype (Jordan et al., Muon, 2024).

    The quintic's coefficients maximize the slope at zero; singular values land in about 0.7 … 1.2, not at 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # the first gradients of q, k, v and up are exactly zero
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Bank:
    """One contiguous (n, rows, cols) fp32 tensor that all matrices of one shape are views of, and its Muon state.

    n is padded to a multiple of the world size; padding rows have zero gradients and never move.
    """

    def __init__(self, named: dict[str, nn.Parameter], hp: Hyperparameters, ranks: Ranks, dtype: torch.dtype):
        self.parameters, self.hp, self.ranks = [*named.values()], hp, ranks
        rows, cols = self.parameters[0].shape
        device, n = self.parameters[0].device, -(-len(named) // ranks.size) * ranks.size
        self.weight = torch.zeros(n, rows, cols, device=device)
        self.gradient = torch.zeros(n, rows, cols, device=device, dtype=dtype)
        self.update = torch.zeros(n, rows, cols, device=device, dtype=dtype)
        self.mine = mine = slice(n * ranks.rank // ranks.size, n * (ranks.rank + 1) // ranks.size)
        # At world size 1 a shard is the whole bank and the collectives are the identity.
        self.update_shard = self.update[mine]
        self.gradient_shard = self.gradient if ranks.size == 1 else torch.zeros_like(self.gradient[mine])
        self.momentum = torch.zeros(self.gradient_shard.shape, device=device)
        self.step_size = math.sqrt(max(1.0, rows / cols))
        rates = [rate_multiple(name, hp) for name in named]
        self.rates = None
        if set(rates) != {1.0}:
            self.rates = torch.ones(n, 1, 1, device=device)
            self.rates[: len(rates), 0, 0] = torch.tensor(rates)
        self.name = f"{rows}x{cols}"
        for i, parameter in enumerate(self.parameters):
            self.weight[i].copy_(parameter.data)
            parameter.data = self.weight[i]

    def reduce_gradient(self):
        """Sum this shape's gradients over ranks into the owners' shards; returns a handle."""
        torch._foreach_copy_(list(self.gradient.unbind())[: len(self.parameters)], [p.grad for p in self.parameters])
        return self.ranks.start_reduce_scatter(self.gradient_shard, self.gradient)

    def orthogonalize(self, momentum: float, clip: Tensor, polar: Callable):
        """Nesterov momentum and Newton-Schulz on this rank's shard; returns the handle of the gather of all updates.

        Rows of equal norm (MuonEq-R, public pull request 1285): no output starts with a larger say than another.
        """
        gradient = self.gradient_shard.float().mul_(clip)
        self.momentum.mul_(momentum).add_(gradient)
        nesterov = gradient.add_(self.momentum, alpha=momentum)
        if self.hp.muon_row_normalize:
            nesterov = F.normalize(nesterov, dim=-1, eps=1e-7)
        self.update_shard.copy_(polar(nesterov.to(self.update.dtype), self.hp.muon_backend_steps))
        return self.ranks.start_all_gather(self.update, self.update_shard)

    def gathered_momentum(self) -> Tensor:
        """(matrices, rows, cols) fp32 gathered from all ranks, without padding."""
        gathered = torch.empty_like(self.weight) if self.ranks.size > 1 else self.momentum
        self.ranks.start_all_gather(gathered, self.momentum).wait()
        return gathered[: len(self.parameters)]

    def load_momentum(self, gathered: Tensor) -> None:
        padded = torch.zeros_like(self.weight)
        padded[: len(gathered)] = gathered
        self.momentum.copy_(padded[self.mine])

    def apply(self, lr: float, weight_decay: float) -> None:
        if self.rates is None:
            self.weight.mul_(1 - lr * weight_decay).add_(self.update, alpha=-lr * self.step_size)
        else:
            rates = lr * self.rates
            self.weight.mul_(1 - rates * weight_decay).sub_(self.update * (rates * self.step_size))


class OptimizerRow(NamedTuple):
    algorithm: str  # muon | adamw
    lr: float  # before the schedule
    weight_decay: float


def optimizer_rows(hp: Hyperparameters) -> dict[str, OptimizerRow]:
    """By the keys that PARAMETERS names."""
    table_lr = hp.tied_embed_lr if hp.tie_embeddings else hp.embed_lr
    return dict(
        matrix=OptimizerRow("muon", hp.matrix_lr, hp.muon_wd),
        table=OptimizerRow("adamw", table_lr, hp.adam_wd if hp.embed_wd < 0 else hp.embed_wd),
        scalar=OptimizerRow("adamw", hp.scalar_lr, hp.adam_wd),
        head=OptimizerRow("adamw", hp.head_lr, hp.adam_wd),
    )


def rate_multiple(name: str, hp: Hyperparameters) -> float:
    """What a matrix's learning rate is multiplied with: DECODER_LR_MULT in the second half of the layers."""
    return hp.decoder_lr_mult if int(name.split(".")[1]) >= hp.num_layers // 2 else 1.0


class Optimizers:
    """Muon for the block matrices, AdamW for everything else, each parameter as its row says.

    One step, with gradients already divided by the global token count:
      1. per bank, largest first: copy gradients in, start a reduce-scatter; meanwhile all-reduce the small gradients;
      2. one scalar sum gives the norm of the averaged gradient, hence the clip factor, which stays on the device;
      3. AdamW; then per bank Newton-Schulz on this rank's shard, its all-gather overlapping the next bank's work.
    """

    def __init__(self, model: GPT, hp: Hyperparameters, ranks: Ranks, dtype: torch.dtype, compile: bool):
        self.model, self.hp, self.ranks = model, hp, ranks
        rows = optimizer_rows(hp)
        matrices: dict[torch.Size, dict[str, nn.Parameter]] = defaultdict(dict)  # by their shape
        small: dict[str, list[nn.Parameter]] = {key: [] for key in rows}
        for name, parameter in model.named_parameters():
            key = row_of(name).optimizer
            if rows[key].algorithm == "muon":
                matrices[parameter.shape][name] = parameter
            else:
                small[key].append(parameter)
        groups = [
            dict(params=small[key], lr=row.lr, base_lr=row.lr, weight_decay=row.weight_decay)
            for key, row in rows.items()
            if small[key]
        ]
        self.banks = [Bank(named, hp, ranks, dtype) for named in matrices.values()]
        self.banks.sort(key=lambda bank: sum(p.numel() for p in bank.parameters), reverse=True)
        self.adam = torch.optim.AdamW(groups, betas=(hp.beta1, hp.beta2), eps=hp.adam_eps, fused=True)
        self.small = [p for group in groups for p in group["params"]]
        self.polar = torch.compile(newton_schulz, dynamic=False) if compile else newton_schulz

    def step(self, lr_scale: float, momentum: float) -> Tensor:
        """One update of all weights from the ranks' accumulated gradients, which are dropped; returns the norm of the
        averaged gradient before clipping, (), on the device."""
        handles = [bank.reduce_gradient() for bank in self.banks]
        small = [p for p in self.small if p.grad is not None]  # a loop that is not on yet has vectors without one
        flat = torch.cat([p.grad.flatten() for p in small])
        handles.append(self.ranks.start_sum(flat))
        for handle in handles:
            handle.wait()
        norm = self.gradient_norm(flat)
        limit = self.hp.grad_clip_norm
        clip = (limit / (norm + 1e-6)).clamp(max=1.0) if limit else torch.ones_like(norm)
        flat.mul_(clip)
        for parameter, gradient in zip(small, flat.split([p.numel() for p in small]), strict=True):
            parameter.grad = gradient.view_as(parameter)
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        self.adam.step()
        gathers = [bank.orthogonalize(momentum, clip, self.polar) for bank in self.banks]
        for bank, gather in zip(self.banks, gathers, strict=True):
            gather.wait()
            bank.apply(self.hp.matrix_lr * lr_scale, self.hp.muon_wd)
        self.model.zero_grad()
        return norm

    def gradient_norm(self, flat: Tensor) -> Tensor:
        """Norm of the averaged gradient; each entry counts on one rank. flat holds the small gradients, all summed."""
        squares = torch.stack([bank.gradient_shard.float().square().sum() for bank in self.banks]).sum()
        if self.ranks.is_main:
            squares = squares + flat.square().sum()
        return self.ranks.sum_(squares).sqrt()

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """AdamW's live state of a parameter, made where no step has been taken."""
        state = self.adam.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state |= dict(exp_avg=torch.zeros_like(parameter.data), exp_avg_sq=torch.zeros_like(parameter.data))
        return state

    def reset(self) -> None:
        """Forget every step taken: AdamW's moments and counters, and Muon's sharded momentum too."""
        self.adam.state.clear()
        for bank in self.banks:
            bank.momentum.zero_()
        self.model.zero_grad()


def lr_scale(step: int, hp: Hyperparameters, elapsed_ms: float, step_ms: float | None) -> float:
    """What multiplies all learning rates: 1, then linear down to 0 at the end of steps or of time, whichever comes
    first, but no further than MIN_LR. The decay takes WARMDOWN_ITERS steps or a share of the whole, WARMDOWN_FRAC.
    """
    left, cap_ms, scale = hp.iterations - step, 1000 * hp.max_wallclock_seconds, 1.0
    left_ms = max(0.0, cap_ms - elapsed_ms)
    if hp.warmdown_frac:
        share = min(left / hp.iterations, left_ms / cap_ms if cap_ms else 1.0)
        scale = min(1.0, share / hp.warmdown_frac)
    elif hp.warmdown_iters:
        scale = min(1.0, left / hp.warmdown_iters)
        if cap_ms and step_ms:
            scale = min(scale, left_ms / (hp.warmdown_iters * step_ms))
    return max(scale, hp.min_lr)


def muon_momentum(step: int, hp: Hyperparameters) -> float:
    """Linear from MUON_MOMENTUM_WARMUP_START to MUON_MOMENTUM."""
    share = min(1.0, step / hp.muon_momentum_warmup_steps) if hp.muon_momentum_warmup_steps else 1.0
    return (1 - share) * hp.muon_momentum_warmup_start + share * hp.muon_momentum


# ----------------------------------------------------------------------------------------------------------------------
# Weight averaging
# ----------------------------------------------------------------------------------------------------------------------

SWA_BELOW = 0.2  # learning-rate scale under which tight SWA takes snapshots


class Averages:
    """EMA and tight SWA of every parameter, fp32. What is exported: the SWA mean of two snapshots or more, else the
    EMA, else the raw weights. That order is a rule, never a choice made on validation scores."""

    def __init__(self, model: GPT, hp: Hyperparameters):
        self.hp, self.live = hp, [p.data for p in model.parameters()]
        self.ema = [w.clone() for w in self.live] if hp.ema_enabled else None
        self.swa: list[Tensor] | None = None
        self.swa_samples = 0

    @torch.no_grad()
    def update(self, step: int, scale: float) -> bool:
        """After step `step`; True when it took the first SWA snapshot."""
        if self.ema is not None:
            decay = min(self.hp.ema_decay, (1 + step) / (10 + step))  # without the ramp a short run returns its init
            torch._foreach_lerp_(self.ema, self.live, 1 - decay)
        if not self.hp.swa_enabled or scale >= SWA_BELOW or step % self.hp.swa_every:
            return False
        source = self.ema if self.hp.swa_source == "ema" else self.live
        if self.swa is None:
            self.swa = [w.clone() for w in source]
        else:
            torch._foreach_lerp_(self.swa, source, 1 / (self.swa_samples + 1))
        self.swa_samples += 1
        return self.swa_samples == 1

    def exported(self) -> tuple[str, list[Tensor]]:
        """(swa | ema | raw, weights in the order of model.parameters())."""
        if self.swa_samples >= 2:
            return "swa", self.swa
        return ("ema", self.ema) if self.ema is not None else ("raw", self.live)

    @contextlib.contextmanager
    def swapped_in(self, weights: list[Tensor]):
        """The model holds these weights inside the block, and its own again after it."""
        own = [w.clone() for w in self.live]
        torch._foreach_copy_(self.live, weights)
        try:
            yield
        finally:
            torch._foreach_copy_(self.live, own)


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------

TRAINING_PHASES = ("train", "average", "calibrate")  # what the training clock has to hold


def accumulate_gradients(forward: Callable, inputs: Tensor, targets: Tensor, rows: int, batch_tokens: int) -> Tensor:
    """Backward over micro-batches of `rows` sequences; returns this rank's part of the mean loss, ().

    Each loss is divided by the tokens of the global batch, so that gradients and losses only have to be summed.
    """
    loss = torch.zeros((), device=inputs.device)
    for x, y in zip(inputs.split(rows), targets.split(rows), strict=True):
        part = forward(x, y).sum() / batch_tokens
        part.backward()
        loss += part.detach()
    return loss


def out_of_time(hp: Hyperparameters, clock: Clock) -> bool:
    """True where another step would end beyond the cap: two steps may be unreported, and one more has to fit."""
    cap_ms = 1000 * hp.max_wallclock_seconds
    step_ms = clock.step_ms or max(clock.durations, default=0.0)
    return cap_ms > 0 and clock.elapsed_ms + clock.reserve_ms + 3 * step_ms > cap_ms


def warn_of_warmdown(hp: Hyperparameters, clock: Clock, log: Log) -> None:
    """Once the step time is known: a warmdown as long as the whole budget never trains at the full learning rate."""
    steps = hp.iterations
    if hp.max_wallclock_seconds and clock.step_ms:
        steps = min(steps, int(1000 * hp.max_wallclock_seconds / clock.step_ms))
    if hp.warmdown_iters >= steps and not hp.warmdown_frac:
        fits = max(1, int(0.4 * steps))
        log(f"warning: WARMDOWN_ITERS={hp.warmdown_iters} covers all {steps} steps; WARMDOWN_ITERS={fits} would fit")


@dataclasses.dataclass
class Switch:
    """A technique that comes on once while a run trains, and stays.

    Its graphs, in all combinations with those of the others, are warmed up before the clock; its state is a part of
    every checkpoint.
    """

    name: str
    due: Callable[[float, float], bool]  # of the learning-rate scale and the share of training that is over
    apply: Callable[[bool], None]
    figure: str  # what its line in the log ends with, a format of `scale`
    prepare: Callable[[], None] = lambda: None  # once, before it comes on
    on: bool = False

    def set(self, on: bool) -> None:
        self.on = on
        self.apply(on)

    @property
    def states(self) -> tuple[bool, ...]:
        """Those that a run will see, the first step's first."""
        return (True,) if self.due(1.0, 0.0) else (False, True)


class Trainer:
    """The trained model with everything that moves while it trains."""

    def __init__(self, run: Run):
        self.run, hp, ranks = run, run.hp, run.ranks
        self.model = run.build(hp.train_seq_len)
        init_weights(self.model, hp)
        self.model.to(ranks.device)
        # After .to(): parameters become views of banks here, and a later move would silently part them.
        self.optimizers = Optimizers(self.model, hp, ranks, run.dtype, run.compile.training)
        self.averages, self.qat = Averages(self.model, hp), QAT(self.model, hp)
        self.switches = self.switch_rows()
        self.set_switches([False] * len(self.switches))
        self.forward = compiled(self.model, run.compile.training)
        self.micro_rows = hp.micro_batch(ranks.size) // hp.train_seq_len
        self.clock, self.step = Clock(ranks, run.signals), 0
        self.saved_ms, self.resumed_at = 0.0, []
        run.log(f"model_params:{sum(p.numel() for p in self.model.parameters())}")
        accumulation = hp.train_batch_tokens // ranks.size // hp.micro_batch(ranks.size)
        run.log(f"world_size:{ranks.size} grad_accum_steps:{accumulation}")

    def switch_rows(self) -> list[Switch]:
        """Switches in time: fake quantization at a learning-rate scale, loops at a share of training."""
        hp, model = self.run.hp, self.model
        qat = Switch(
            name="qat" if hp.qat_enabled else "late_qat",
            due=lambda scale, progress: hp.qat_enabled or scale < hp.late_qat_threshold,
            apply=self.qat.set,
            figure="scale:{scale:.4f}",
            prepare=self.qat.refresh,
        )
        looping = Switch(
            name="looping",
            due=lambda scale, progress: progress >= hp.enable_looping_at,
            apply=lambda on: setattr(model, "looping", on),
            figure=f"passes:{len(model.looped)}",
        )
        wanted = ((qat, hp.qat_enabled or hp.late_qat), (looping, hp.num_loops))
        return [switch for switch, setting in wanted if setting]

    def warm_up(self) -> None:
        """Run every graph of the timed loop on synthetic tokens, then undo all of it: weights and optimizer state.

        Variants: the switches' states, in all combinations, and scoring without gradients.
        """
        run, hp, start = self.run, self.run.hp, time.perf_counter()
        generator = torch.Generator().manual_seed(0)

        def synthetic(rows: int) -> Tensor:
            shape = (2, rows, hp.train_seq_len)
            return torch.randint(hp.vocab_size, shape, generator=generator).to(run.ranks.device)

        variants = [*itertools.product(*(switch.states for switch in self.switches))]
        with self.averages.swapped_in(self.averages.live):  # its own weights: so the steps are undone
            for i in range(hp.warmup_steps):
                for variant in variants:
                    self.set_switches(variant)
                    inputs, targets = synthetic(self.micro_rows)
                    accumulate_gradients(self.forward, inputs, targets, self.micro_rows, hp.train_batch_tokens)
                    self.optimizers.step(1.0, hp.muon_momentum)
                run.log(f"warmup_step:{i + 1}/{hp.warmup_steps}")
            for variant in variants if hp.warmup_steps and run.compile.training else ():
                self.set_switches(variant)
                with torch.no_grad(), self.qat.switched(False):
                    self.forward(*synthetic(score_batch_windows(hp, run.ranks, hp.train_seq_len)))
        self.optimizers.reset()
        self.set_switches([False] * len(self.switches))
        if hp.max_wallclock_seconds:
            averaging = time.perf_counter()
            self.exported_weights()
            # Twice the time: it is measured once, and the last step must not end beyond the cap.
            self.clock.reserve_ms = 2000 * run.ranks.largest(time.perf_counter() - averaging)
            run.log(f"train_reserve:{self.clock.reserve_ms:.0f}ms for averaging")
            if hp.calibrates:
                seconds = hp.gptq_reserve_seconds or 2 * self.measure_calibration()
                self.clock.reserve_ms += 1000 * seconds
                run.log(f"train_reserve:{1000 * seconds:.0f}ms for calibration")
                run.ranks.agree(lambda: self.check_reserve(seconds))
        run.phases.seconds["warmup"] = time.perf_counter() - start

    def set_switches(self, states: Sequence[bool]) -> None:
        for switch, on in zip(self.switches, states, strict=True):
            switch.set(on)

    def check_reserve(self, seconds: float) -> None:
        """Whether calibration leaves some of the training clock. Raises UserError."""
        hp = self.run.hp
        if seconds >= hp.max_wallclock_seconds:
            raise UserError(
                f"GPTQ_CALIBRATION_TOKENS={hp.gptq_calibration_tokens} may take {seconds:.0f} s and leaves nothing of "
                f"MAX_WALLCLOCK_SECONDS={hp.max_wallclock_seconds:g} to train in; lower it"
            )

    def measure_calibration(self) -> float:
        """Seconds that calibration will take, from one batch of each rank on synthetic tokens, agreed."""
        run, length = self.run, self.run.hp.train_seq_len
        count, at_once = run.hp.gptq_calibration_tokens // length, calibration_rows(run) * run.ranks.size
        texts = np.random.default_rng(0).integers(run.hp.vocab_size, size=(min(count, at_once), length + 1))
        weights = self.exported_weights()[1]
        start = time.perf_counter()
        calibrate(run, weights, texts)
        synchronize(run.ranks.device)
        return run.ranks.largest(time.perf_counter() - start) * -(-count // at_once)

    def train_step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """One update from this rank's (sequences, T) part of the batch; returns its part of the mean loss, ()."""
        hp, clock, step = self.run.hp, self.clock, self.step
        scale = lr_scale(step, hp, clock.elapsed_ms + clock.reserve_ms, clock.step_ms)
        if (self.qat.on or hp.crown_q) and step % QAT_REFRESH_STEPS == 0:
            self.qat.refresh()
        for switch in self.switches:
            if not switch.on and switch.due(scale, self.progress()):
                switch.prepare()
                switch.set(True)
                self.run.log(f"{switch.name}:enabled step:{step} {switch.figure.format(scale=scale)}")
        loss = accumulate_gradients(self.forward, inputs, targets, self.micro_rows, hp.train_batch_tokens)
        if hp.crown_q and scale < 1:
            self.qat.penalize(hp.crown_q / self.run.ranks.size)
        norm = self.optimizers.step(scale, muon_momentum(step, hp))
        if self.averages.update(step, scale):
            self.run.log(f"swa:start step:{step}")
        clock.post(loss, norm)
        self.step += 1
        return loss

    def progress(self) -> float:
        """Share of the training loop that is over: of its steps or of its time, whichever ends first."""
        hp, clock = self.run.hp, self.clock
        time_ms = 1000 * hp.max_wallclock_seconds - clock.reserve_ms
        return max(self.step / hp.iterations, clock.elapsed_ms / max(time_ms, 1.0) if hp.max_wallclock_seconds else 0.0)

    def train(self) -> None:
        """The timed loop: until ITERATIONS, the wall-clock cap or a signal. Validation and checkpoints stop the clock.

        A failure that ends it names the checkpoint that is still good.
        """
        hp, log, clock, signals = self.run.hp, self.run.log, self.clock, self.run.signals
        loader = BatchLoader(self.run.stream, hp, self.run.ranks, log, self.step)
        bar = progress_bar(hp.iterations, "train", log, self.step)
        signals.deferred = hp.checkpoint_every > 0
        try:
            clock.resume()
            while self.step < hp.iterations and not out_of_time(hp, clock) and not clock.interrupted:
                batch = loader.next()
                clock.problem = clock.problem or loader.problem  # all ranks hear of it a step later
                self.train_step(*batch)
                bar.update()
                self.report()
            clock.pause()
            # Agreed: all ranks take part in saving.
            if signals.deferred and (clock.interrupted or self.run.ranks.largest(signals.caught)):
                self.save()
                raise Interrupted(signals.caught or signal.SIGTERM)
        except (LimitError, UserError) as error:
            error.args = (f"{error}; {signals.advice}",)
            raise
        finally:
            signals.deferred = False
            bar.close()
        if self.step < hp.iterations:
            log(f"stopping_early: wallclock_cap train_time:{clock.elapsed_ms:.0f}ms step:{self.step}/{hp.iterations}")
        if hp.num_loops and not self.model.looping:
            log("warning: training ended before its loops were switched on, and the exported model runs them")
        allocated, reserved = peak_memory_mib(self.run.ranks.device)
        log(f"peak memory allocated: {allocated} MiB reserved: {reserved} MiB")
        self.run.phases.seconds["train"] = clock.elapsed_ms / 1000

    def report(self) -> None:
        """What the log, a validation or a checkpoint is due after this step."""
        hp, log, clock = self.run.hp, self.run.log, self.clock
        if hp.train_log_every and (self.step <= 10 or self.step % hp.train_log_every == 0):
            clock.collect()
            log(f"step:{self.step}/{hp.iterations} train_loss:{clock.loss:.4f} {self.timing()}")
        if self.step == min(20, hp.iterations):
            warn_of_warmdown(hp, clock, log)
        if hp.val_loss_every and self.step % hp.val_loss_every == 0 and self.step < hp.iterations:
            clock.pause()
            self.validate_raw()
            clock.resume()
        if hp.checkpoint_every and clock.elapsed_ms - self.saved_ms >= 1000 * hp.checkpoint_every:
            clock.pause()
            self.save()
            clock.resume()

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the next step reads, live; Muon's sharded momentum gathered. Nothing is random."""
        averages, names = self.averages, {p: name for name, p in self.model.named_parameters()}
        state = {}
        for copy, weights in dict(weight=averages.live, ema=averages.ema, swa=averages.swa).items():
            if weights is not None:
                state |= {f"{copy}.{name}": w for name, w in zip(names.values(), weights, strict=True)}
        for parameter in self.optimizers.small:
            moments = self.optimizers.moments(parameter)
            state |= {f"adam.{key}.{names[parameter]}": moment for key, moment in moments.items()}
        state |= {f"row_scale.{name}": layer.row_scale for name, layer in self.qat.layers.items()}
        return state | {f"momentum.{bank.name}": bank.gathered_momentum() for bank in self.optimizers.banks}

    def save(self) -> None:
        """Write a checkpoint at a paused clock and keep the one before. A full disk does not end the run."""
        run, clock = self.run, self.clock
        with run.phases("checkpoint"):
            tensors = self.state()
            if not all(t.isfinite().all() for t in tensors.values()):  # the same on every rank
                raise LimitError(f"step {self.step} left weights that are not finite; a new run needs {LOWER_RATES}")
            self.saved_ms = clock.elapsed_ms
            path = run.folder / f"checkpoint-{self.step}.pgckpt"
            written = run.ranks.broadcast_object(self.write(path, tensors) if run.ranks.is_main else None)
        if written:  # every rank has to know what to tell its user
            run.log(f"checkpoint:written step:{self.step} bytes:{written} path:{path}")
            run.signals.resume_from(path)

    def write(self, path: Path, tensors: dict[str, Tensor]) -> int:
        """Bytes written to the main rank's disk; 0 where that failed."""
        run, clock = self.run, self.clock
        tensors["random"] = torch.get_rng_state()
        meta = dict(
            run_id=run.folder.name,
            settings=dataclasses.asdict(run.hp),
            code_sha256=hashlib.sha256(run.source).hexdigest(),
            data=[run.stream.fingerprint, run.val.fingerprint, run.val.tokenizer_sha256],
            dtype=str(run.dtype),
            compile=run.compile.training,
            step=self.step,
            loss=clock.loss,
            elapsed_ms=clock.elapsed_ms,
            durations=list(clock.durations),
            swa_samples=self.averages.swa_samples,
            switches={switch.name: switch.on for switch in self.switches},
            resumed_at=self.resumed_at,
        )
        try:
            write_atomic(path, checkpoint_parts(meta, tensors))
            size = path.stat().st_size
        except OSError as error:
            run.log(f"warning: checkpoint of step {self.step} not written: {error.strerror}; {run.signals.advice}")
            return 0
        found = find_checkpoints(run.folder)  # those after this step were given up when it was taken up
        if path in found:  # else somebody has just removed the folder
            place = found.index(path)
            remove([*found[: max(0, place - 1)], *found[place + 1 :], *run.folder.glob("*.partial")], run.log)
        return size

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up the state of a checkpoint, whatever the world size that wrote it."""
        meta, ranks = checkpoint.meta, self.run.ranks
        self.step, self.saved_ms = meta["step"], meta["elapsed_ms"]
        self.resumed_at = [*meta["resumed_at"], self.step]
        self.clock.restore(self.step, meta["loss"], meta["elapsed_ms"], meta["durations"])
        self.averages.swa_samples = meta["swa_samples"]
        if self.averages.swa_samples:
            self.averages.swa = [torch.empty_like(w) for w in self.averages.live]

        state = self.state()
        ranks.agree(lambda: self.check_state(checkpoint, state | dict(random=torch.get_rng_state())))
        self.set_switches([meta["switches"][switch.name] for switch in self.switches])
        with torch.no_grad():
            for name, live in state.items():
                ranks.broadcast_(live.copy_(checkpoint.tensors[name]) if ranks.is_main else live)
            for bank in self.optimizers.banks:
                bank.load_momentum(state[f"momentum.{bank.name}"])
        torch.set_rng_state(ranks.broadcast_object(checkpoint.tensors.get("random")))
        self.run.log(f"resume:step:{self.step} train_time:{meta['elapsed_ms']:.0f}ms from:{checkpoint.path}")

    def check_state(self, checkpoint: Checkpoint, wanted: Mapping[str, Tensor]) -> None:
        """Whether a checkpoint holds just these tensors and switches. Raises UserError."""
        found, expected = (
            {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} for tensors in (checkpoint.tensors, wanted)
        )
        switches = {switch.name for switch in self.switches}
        if self.run.ranks.is_main and (found != expected or checkpoint.meta["switches"].keys() != switches):
            raise UserError(f"{checkpoint.path} does not hold the state of this run; use another checkpoint")

    def timing(self) -> str:
        ms = self.clock.elapsed_ms
        return f"train_time:{ms:.0f}ms step_avg:{ms / max(self.step, 1):.2f}ms"

    def exported_weights(self) -> tuple[str, dict[str, Tensor]]:
        """(swa | ema | raw, fp32 weights by name on CPU): what is quantized."""
        source, weights = self.averages.exported()
        names = [name for name, _ in self.model.named_parameters()]
        return source, {name: w.float().cpu() for name, w in zip(names, weights, strict=True)}

    def validate_raw(self) -> "Score":
        with self.run.phases("validate"), self.qat.switched(False):
            raw = validate(self.run, self.forward, self.run.hp.train_seq_len, "validate")
        steps = f"step:{self.step}/{self.run.hp.iterations}"
        self.run.log(f"{steps} val_loss:{raw.loss:.4f} val_bpb:{raw.bpb:.4f} {self.timing()}")
        return raw

    def diagnose(self) -> dict[str, "Score"]:
        """Scores of the unquantized weights, for the log alone: nothing is chosen by them."""
        scores = {"raw": self.validate_raw()}
        source, _ = self.averages.exported()
        averages = {"ema": self.averages.ema, "swa": self.averages.swa if source == "swa" else None}
        for name, weights in averages.items():
            if weights is not None:
                start = time.perf_counter()
                with self.run.phases("validate"), self.qat.switched(False), self.averages.swapped_in(weights):
                    scores[name] = validate(self.run, self.forward, self.run.hp.train_seq_len, f"post_{name}")
                log_score(self.run.log, f"DIAGNOSTIC post_{name}", scores[name], start)
        return scores


# ----------------------------------------------------------------------------------------------------------------------
# Quantization
# ----------------------------------------------------------------------------------------------------------------------

CLIP_QUANTILES = (0.999, 0.9995, 0.9999, 0.99999)
Q_LIMIT = 127  # the largest code of any grid
QAT_REFRESH_STEPS = 16  # the scale search in every forward would cost about a third of a step


def storage_of(name: str, hp: Hyperparameters) -> str:
    """How a parameter is stored under these settings."""
    storage = row_of(name).storage
    if storage.bits is None:
        return storage.forms[0]
    bits = storage.bits(hp)
    return f"{'int' if bits <= 8 else 'fp'}{bits}"


def sigmas_of(name: str, hp: Hyperparameters) -> float | None:
    """Standard deviations of a row to the last level of its grid; None where no setting reaches: a gate stays int8."""
    sigmas = row_of(name).storage.sigmas
    return None if sigmas is None else sigmas(hp)


def levels(storage: str) -> int:
    """The largest code of a grid or a trellis; 0 for fp16 and fp32."""
    return (1 << int(storage[3:]) - 1) - 1 if storage[:3] in ("int", "tcq") else 0


class Stored(NamedTuple):
    """A tensor as the artifact holds it: codes of a grid (int5 … int8) or a trellis (tcq5 … tcq8) with one fp16 scale
    per row, or fp16/fp32."""

    storage: str
    data: Tensor  # int8 codes (rows, cols), or fp16/fp32 of any shape
    scale: Tensor | None  # fp16 (rows, 1)
    columns: Tensor | None = None  # of a trellis: int8 (cols,), the columns' own scales in quarters of an octave

    def dequantize(self) -> Tensor:
        """fp32, of the original shape."""
        values = self.data.float()
        if self.columns is not None:
            odd = torch.from_numpy(odd_states(self.data.numpy(), self.columns.numpy()))
            values = (values - 0.5 * values.sign() * odd) * column_scales(self.columns)
        return values if self.scale is None else values * self.scale.float()

    def size(self) -> float:
        """Bytes of its values, codes at their entropy."""
        if self.scale is None:
            return self.data.nbytes
        return entropy_bits(torch.bincount(self.data.flatten().long() + Q_LIMIT).numpy()) / 8

    def parts(self) -> dict[str, Tensor]:
        """What each stream of the payload holds of it."""
        if self.scale is None:
            return {self.storage: self.data}
        return dict(codes=self.data, fp16=self.scale, columns=self.columns)


class Grid(NamedTuple):
    """Where a matrix's weights may lie: whole multiples, up to q_max, of its rows' scales."""

    scales: Tensor  # (rows, candidates) fp32 of fp16 values: what a row may choose from
    q_max: int | Tensor  # the largest code; a tensor () where reading it would wait for the device


# Of a trellis's columns, from -128 quarters of an octave to 127; no exp2, which differs between machines.
COLUMN_SCALES = torch.tensor([math.ldexp(2 ** (k % 4 / 4), k // 4) for k in range(-128, 128)], dtype=torch.float32)


def column_scales(columns: Tensor) -> Tensor:
    """(cols,) int8 -> fp32"""
    return COLUMN_SCALES.to(columns.device)[columns.long() + 128]


def quantize_rows(w: Tensor, scale: Tensor, q_max: int) -> Tensor:
    """Codes of w (rows, cols) on the grid scale (rows, 1) * {-q_max … q_max}, as floats; rows of scale 0 become 0."""
    return torch.where(scale > 0, (w / scale).round().clamp(-q_max, q_max), 0.0)


def short_scale(scale: Tensor) -> Tensor:
    """The next scale up with three bits of mantissa, as fp32 with an fp16 value.

    Rate-distortion is flat at its optimum: steps on this ladder cost a thousandth of a bit of every weight, the other
    seven bits of mantissa would cost more in any row of less than 7,000.
    """
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp((16 * mantissa).ceil() / 16, exponent).half().float()


class Calibration(NamedTuple):
    """What quantization learns from training text, by the weights' names."""

    hessians: Mapping[str, Tensor] = {}  # of every block matrix: Σ x xᵀ (in, in) fp32 over its inputs x
    sensitivity: Mapping[str, Tensor] = {}  # of every matrix: (rows, 1) mean squares of the loss's gradient
    left: Mapping[str, float] = {}  # of every matrix that GPTQ rounds: what that leaves of rounding's error


class Quantizer(NamedTuple):
    """A choice of QUANT: where the codes of a matrix lie, before they are rounded."""

    # (weights by name, each (rows, cols) fp32; settings; calibration) -> steps by name, each (rows, candidates) fp32
    steps: Callable[[Mapping[str, Tensor], Hyperparameters, Calibration], dict[str, Tensor]]
    clips: bool = False  # beyond the last level of a storage; else a class has all levels that its weights need
    needs: tuple[str, ...] = ()  # fields of Calibration
    qat: str = ""  # the quantizer that stands in where there is no calibration, as in QAT; "": this one

    def grid(self, w: Tensor, steps: Tensor, storage: str, factor: float = 1.0) -> Grid:
        """Of w (rows, cols) with steps (rows, candidates), `factor` times as large: a fitted artifact's.

        Scales are rounded to fp16 before anything uses them. Those that clip have no floor: tiny rows keep all their
        levels. The others are so large that no row needs more than Q_LIMIT levels.
        """
        if self.clips:
            factor = max(factor, levels(storage) / Q_LIMIT)
            q_max = round(levels(storage) / factor)
            candidates = steps if q_max < Q_LIMIT else steps[:, :1]  # 255 levels need no clipping
            return Grid((factor * candidates).half().float(), q_max)
        largest = w.abs().amax(1, keepdim=True)
        scale = short_scale(torch.minimum(torch.maximum(factor * steps, largest / Q_LIMIT), 2 * largest))
        return Grid(scale, quantize_rows(largest, scale, Q_LIMIT).max())


def clip_search(weights: Mapping[str, Tensor], hp: Hyperparameters, _: Calibration) -> dict[str, Tensor]:
    """GPTQ-lite: a row chooses from the steps of its largest |w| and of four of its quantiles, in this order."""
    steps = {}
    for name, w in weights.items():
        cols = w.size(1)
        # The largest entries hold all quantiles from 0.999 up: descending order, index j is rank cols-1-j.
        top = w.abs().topk(min(cols, math.ceil((1 - CLIP_QUANTILES[0]) * (cols - 1)) + 1), dim=1).values
        clips = [top[:, 0]]
        for quantile in CLIP_QUANTILES:
            position = (1 - quantile) * (cols - 1)  # from the top, linear between entries
            low = int(position)
            clips.append(torch.lerp(top[:, low], top[:, min(low + 1, top.size(1) - 1)], position - low))
        steps[name] = torch.stack(clips, 1) / levels(storage_of(name, hp))
    return steps


def sdclip(weights: Mapping[str, Tensor], hp: Hyperparameters, _: Calibration) -> dict[str, Tensor]:
    """So many standard deviations of a row to the last level of its class's grid, which none of its weights reaches;
    the entropy coder makes use of that (public pull request 1394)."""
    shares = {name: sigmas_of(name, hp) / levels(storage_of(name, hp)) for name in weights}
    return {name: shares[name] * w.std(1, correction=0, keepdim=True) for name, w in weights.items()}


def rate_distortion(weights: Mapping[str, Tensor], hp: Hyperparameters, calibration: Calibration) -> dict[str, Tensor]:
    """With an entropy coder, rounding costs sensitivity * step²/12 a weight, and halving a step one bit, whatever the
    weights' own size. At the least cost for its bits, sensitivity * step² is the same everywhere: so it is here, with
    about the bits of sdclip's steps.

    A row counts as sensitive as itself and half as its whole matrix, as rows that the calibration text hardly reaches
    are not as insensitive as they look; a matrix that GPTQ will round, by what that leaves of rounding's error.
    """
    blended = {name: calibration.sensitivity[name] + 0.5 * calibration.sensitivity[name].mean() for name in weights}
    blended |= {name: blended[name] * left for name, left in calibration.left.items()}
    floor = 1e-6 * torch.cat(list(blended.values())).mean()
    halves = {name: 0.5 * h.clamp(min=floor).log() for name, h in blended.items()}
    level, size = 0.0, 0
    for name, step in sdclip(weights, hp, calibration).items():
        nonzero = (step > 0)[:, 0]  # rows of zeros have no say
        level += weights[name].size(1) * (step.log() + halves[name])[nonzero].sum().item()
        size += weights[name].size(1) * nonzero.sum().item()
    return {name: (level / max(size, 1) - half).exp() for name, half in halves.items()}


QUANTIZERS = {
    "clip_search": Quantizer(clip_search, clips=True),
    "sdclip": Quantizer(sdclip),
    "rd": Quantizer(rate_distortion, needs=("sensitivity",), qat="sdclip"),
}


def uncalibrated(hp: Hyperparameters) -> str:
    """The choice of QUANT where there is no calibration text."""
    return QUANTIZERS[hp.quant].qat or hp.quant


def choose_steps(weights: Mapping[str, Tensor], hp: Hyperparameters, calibration: Calibration) -> dict[str, Tensor]:
    """Steps (rows, candidates) of all weights that are stored as codes, by name; a gate's are always clip search's."""
    coded = {name: w.float() for name, w in weights.items() if levels(storage_of(name, hp))}
    chosen = {name: w for name, w in coded.items() if sigmas_of(name, hp)}
    fixed = {name: w for name, w in coded.items() if name not in chosen}
    return QUANTIZERS[hp.quant].steps(chosen, hp, calibration) | clip_search(fixed, hp, calibration)


def make_grids(
    weights: Mapping[str, Tensor], hp: Hyperparameters, steps: Mapping[str, Tensor], factor: float = 1.0
) -> dict[str, Grid]:
    """The grid of every tensor that has steps, by name, with those `factor` times as large; a gate's stays as it is.

    All of a class have one grid, so that they share their tables.
    """
    grids, q_max = {}, {}
    for name, step in steps.items():
        label, fixed = label_of(name), not sigmas_of(name, hp)
        quantizer = QUANTIZERS["clip_search" if fixed else hp.quant]
        grids[name] = quantizer.grid(weights[name].float(), step, storage_of(name, hp), 1.0 if fixed else factor)
        wider = hp.trellis_enabled and not fixed  # a walk may need the next code
        q_max[label] = max(q_max.get(label, 1), min(int(grids[name].q_max) + wider, Q_LIMIT))
    return {name: grid._replace(q_max=q_max[label_of(name)]) for name, grid in grids.items()}


def search_row_scales(w: Tensor, grid: Grid) -> Tensor:
    """(rows, 1): for each row of w (rows, cols) the scale with the least squared error of rounding to nearest."""
    if grid.scales.size(1) == 1:
        return grid.scales
    candidates = grid.scales.split(1, dim=1)
    errors = [(quantize_rows(w, scale, grid.q_max) * scale - w).square().sum(1, keepdim=True) for scale in candidates]
    return grid.scales.gather(1, torch.cat(errors, 1).argmin(1, keepdim=True))


def round_to_nearest(w: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """(scale (rows, 1), codes (rows, cols)) of w on the grid; codes are whole floats."""
    scale = search_row_scales(w, grid)
    return scale, quantize_rows(w, scale, grid.q_max)


def output_error(w: Tensor, approximation: Tensor, hessian: Tensor) -> Tensor:
    """(rows, 1): squared error of the layer's outputs over the calibration text, Σ ((w - approximation) x)²."""
    difference = w - approximation
    return (difference @ hessian * difference).sum(1, keepdim=True)


class GPTQ:
    """Rounds a matrix column by column and lets the later columns make up for each error (Frantar et al., 2022).

    hessian is (cols, cols) fp32, Σ x xᵀ of the layer's inputs. Columns go in descending order of its diagonal.

    In a trellis a column has a scale of its own, so that an error of any of them costs the outputs as much (WaterSIC,
    arXiv 2603.04956); they go in the order of these, which the decoder knows. It is then the matrix divided by them
    that is rounded, by walk_trellises.
    """

    def __init__(self, hessian: Tensor, hp: Hyperparameters):
        self.block, self.columns, diagonal = hp.gptq_block_size, None, hessian.double().diagonal()
        self.energy = diagonal.mean().item()  # of an input
        self.factorize(hessian, hp, diagonal.argsort(descending=True, stable=True))
        if hp.trellis_enabled:
            steps = torch.empty_like(diagonal)
            steps[self.order] = self.factor.diagonal().double().log2()
            self.columns = (4 * (steps - steps.mean())).round().clamp(-127, 127).to(torch.int8)
            scales = column_scales(self.columns)
            self.factorize(scales[:, None] * hessian * scales, hp, self.columns.argsort(stable=True))

    def factorize(self, hessian: Tensor, hp: Hyperparameters, order: Tensor) -> None:
        self.hessian, self.order = hessian, order
        damped, diagonal = hessian.double(), hessian.double().diagonal()
        damped = damped + torch.diag(hp.gptq_percdamp * diagonal.mean() + (diagonal == 0).double())
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[self.order][:, self.order]))
        self.factor = torch.linalg.cholesky(inverse, upper=True).float()

    @property
    def left(self) -> float:
        """The share of rounding's error of outputs that stays, for errors as independent as fine steps make them: what
        of each input the later ones do not explain."""
        unexplained = self.factor.diagonal().double().square().reciprocal()
        return unexplained.mean().item() / self.energy

    def round(self, w: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """(scale, codes) like round_to_nearest, of the scales with the least error of the layer's outputs."""
        rows, count = grid.scales.shape
        codes = self.codes(w.repeat(count, 1), grid.scales.T.reshape(-1, 1), grid.q_max).unflatten(0, (count, rows))
        candidates = zip(codes, grid.scales.split(1, dim=1), strict=True)
        errors = torch.cat([output_error(w, c * scale, self.hessian) for c, scale in candidates], 1)
        best = errors.argmin(1, keepdim=True)
        return grid.scales.gather(1, best), codes[best[:, 0], torch.arange(rows, device=w.device)]

    def codes(self, w: Tensor, scale: Tensor, q_max: int) -> Tensor:
        """Codes (rows, cols) of w on the grid of scale (rows, 1)."""
        w, cols = w[:, self.order], w.size(1)
        codes = torch.empty_like(w)
        for start in range(0, cols, self.block):
            end = min(start + self.block, cols)
            errors = torch.empty_like(w[:, start:end])
            for j in range(start, end):
                column = w[:, j : j + 1]
                codes[:, j : j + 1] = quantize_rows(column, scale, q_max)
                error = (column - codes[:, j : j + 1] * scale) / self.factor[j, j]
                w[:, j:end] -= error * self.factor[j, j:end]
                errors[:, j - start : j - start + 1] = error
            w[:, end:] -= errors @ self.factor[start:end, end:]
        return codes[:, self.order.argsort()]


# Trellis-coded quantization (Marcellin and Fischer, 1990), as the dependent quantization of videos and neural networks
# has it (Schwarz et al., 2019; ISO/IEC 15938-17): the codes of a row walk through eight states, and the parity of each
# leads to the next. In even states code k stands for k steps, in odd ones for k - sgn(k)/2, so that the walk chooses
# among points half as far apart as those of any one state: a sixth less squared error at the same entropy.
NEXT_STATE = np.array([[0, 2], [5, 7], [1, 3], [6, 4], [2, 0], [4, 6], [3, 1], [7, 5]], dtype=np.uint8)  # by parity
WAYS = np.argsort(NEXT_STATE.T.ravel(), kind="stable").reshape(8, 2)  # into each state: 8 * parity + state before it
TRELLIS_BLOCK = 16  # columns between two products with GPTQ's factor; of no effect but on time


def odd_states(codes: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(rows, cols) bool: which codes (rows, cols) int8 belong to odd states; the walk goes by columns (cols,) int8."""
    state, odd = np.zeros(len(codes), dtype=np.uint8), np.empty(codes.shape, dtype=bool)
    for column in np.argsort(columns, kind="stable"):
        odd[:, column] = state & 1
        state = NEXT_STATE[state, codes[:, column] & 1]
    return odd


def trellis_codes(w: Tensor, scale: Tensor, q_max: int, factor: Tensor | None = None) -> Tensor:
    """Codes (n, rows, cols) up to q_max of n matrices w with steps scale (n, rows), whose columns are in the order of
    the walk, on the walk with the least squared error; with GPTQ's factors (n, cols, cols) of the layers' outputs. By
    Viterbi's algorithm: the best walk to each state is kept, and with it what its errors ask of the columns to come.
    """
    (count, rows, cols), device = w.shape, w.device
    ways = torch.from_numpy(WAYS).to(device)
    half = torch.tensor([0.0, 0.5] * 4, device=device)[:, None]  # what odd states' codes lack
    parity = torch.tensor([0.0, 1.0], device=device)[:, None, None]
    largest = q_max - (q_max + parity) % 2
    # Where a row is in state 0, as those of (count, 8, rows) are counted.
    row = 8 * rows * torch.arange(count, device=device)[:, None, None] + torch.arange(rows, device=device)
    cost = torch.full((count, 8, rows), math.inf, device=device)
    cost[:, 0] = 0.0
    wanted = (w / torch.where(scale > 0, scale, 1.0)[:, :, None])[:, None].expand(-1, 8, -1, -1)  # in steps
    codes, origins = [], []
    for start in range(0, cols, TRELLIS_BLOCK):
        width = min(TRELLIS_BLOCK, cols - start)
        now, survivors = wanted[..., :width], row + rows * torch.arange(8, device=device)[:, None]
        for j in range(width):  # `now` holds errors before column j, and after it what is wanted there
            x = now[:, None, ..., j]  # (count, 1, 8, rows); below (count, 2, 8, rows), by parity
            magnitude, sign = x.abs(), torch.where(x < 0, -1.0, 1.0)
            code = 2 * ((magnitude + half - parity) / 2).round() + parity
            code = torch.minimum(torch.maximum(code, parity), largest)
            code = torch.where((code == 2) & (magnitude < 0.75), 0.0, code)  # an odd state's 2 is 1.5
            error = magnitude - code + half * code.sign()
            if factor is not None:
                error = error / factor[:, start + j, start + j, None, None, None]
            total = (cost[:, None] + error.square()).flatten(1, 2)  # (count, 16, rows), as WAYS counts them
            one, other = total[:, ways[:, 0]], total[:, ways[:, 1]]
            way, cost = torch.where(other < one, ways[:, 1:], ways[:, :1]), torch.minimum(one, other)
            origin = way % 8
            codes.append((sign * code).flatten(1, 2).gather(1, way).to(torch.int8))
            origins.append(origin.to(torch.uint8))
            if factor is not None:
                whose, error = (row + rows * origin).flatten(), (sign * error).flatten(1, 2).gather(1, way)
                now = now.flatten(0, 2).index_select(0, whose).view(count, 8, rows, width)
                survivors = survivors.flatten().index_select(0, whose).view(count, 8, rows)
                now[..., j] = error
                now[..., j + 1 :] -= error[..., None] * factor[:, None, None, start + j, start + j + 1 : start + width]
        end, wanted = start + width, wanted[..., width:]
        if factor is not None and end < cols:
            wanted = wanted.flatten(0, 2).index_select(0, survivors.flatten()).view(count, 8 * rows, -1)
            asked = factor[:, start:end, end:]
            wanted = torch.baddbmm(wanted, now.flatten(1, 2), asked, alpha=-1).view(count, 8, rows, -1)
    state, walk = cost.argmin(1, keepdim=True), torch.empty_like(w)
    for j in reversed(range(cols)):
        walk[..., j] = codes[j].gather(1, state)[:, 0]
        state = origins[j].gather(1, state).long()
    return walk


class Trellis:
    """For a matrix of which no Hessian is known: its columns one after another, each as important."""

    factor = None

    def __init__(self, cols: int):
        self.columns, self.order = torch.zeros(cols, dtype=torch.int8), torch.arange(cols)


def walk_trellises(
    weights: Mapping[str, Tensor], grids: Mapping[str, Grid], rounding: Mapping[str, GPTQ | Trellis]
) -> dict[str, Tensor]:
    """The codes of every matrix that goes into a trellis, by name; those of one shape and grid walk side by side."""
    abreast, walked = defaultdict(list), {}
    for name, rounder in rounding.items():
        if rounder.columns is not None:
            abreast[weights[name].shape, int(grids[name].q_max), rounder.factor is None].append(name)
    for (_, q_max, free), names in abreast.items():
        orders = [rounding[name].order for name in names]
        w = torch.stack([weights[name].float()[:, order] for name, order in zip(names, orders, strict=True)])
        factor = None if free else torch.stack([rounding[name].factor for name in names])
        codes = trellis_codes(w, torch.stack([grids[name].scales[:, 0] for name in names]), q_max, factor)
        walked |= {name: c[:, order.argsort()] for name, c, order in zip(names, codes, orders, strict=True)}
    return walked


def calibration_needs(hp: Hyperparameters) -> set[str]:
    """The fields of Calibration that these settings use."""
    return {*QUANTIZERS[hp.quant].needs, *(["hessians"] if hp.gptq_enabled else [])}


def calibrate(run: Run, weights: Mapping[str, Tensor], texts: np.ndarray) -> Calibration:
    """One pass over texts (n, TRAIN_SEQ_LEN + 1), summed over all ranks; what the settings do not need stays empty.

    On a copy of the model in fp32 weights: casting the live ones for calibration cost a published run 0.3 bpb. Squares
    of a few sequences' gradient estimate the Fisher information, that is the loss's curvature, of any tensor alike.
    """
    hp, ranks, device, needs = run.hp, run.ranks, run.ranks.device, calibration_needs(run.hp)
    model = run.build(hp.train_seq_len).to(device)
    model.load_state_dict(weights)
    hessians, squares, parameters = {}, {}, dict(model.named_parameters())
    if "sensitivity" in needs:
        coded = [name for name in parameters if levels(storage_of(name, hp))]
        squares = {name: torch.zeros(len(parameters[name]), 1, device=device) for name in coded}

    def accumulate(hessian: Tensor, _, inputs: tuple[Tensor]) -> None:
        x = inputs[0].detach().flatten(0, 1).float()
        hessian.addmm_(x.T, x)

    layers = reconstructed_layers(model, hp.gptq_head_enabled) if "hessians" in needs else {}
    for name, layer in layers.items():
        hessians[name] = torch.zeros(layer.weight.size(1), layer.weight.size(1), device=device)
        layer.register_forward_pre_hook(functools.partial(accumulate, hessians[name]))
    through = model.logits if model.head in layers.values() else model.trunk  # the head is a large part of a step
    mine, rows = ranks.part(texts), calibration_rows(run)
    for i in range(0, len(mine), rows):
        tokens = torch.from_numpy(mine[i : i + rows].astype(np.int64)).to(device)
        if squares:
            model.zero_grad()
            model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
        else:
            with torch.no_grad():
                through(tokens[:, :-1])
        for name, square in squares.items():
            square += parameters[name].grad.square().mean(1, keepdim=True)
    for name, hessian in hessians.items():
        if not ranks.sum_(hessian).diagonal().sum() > 0:
            raise LimitError(f"{name} saw no input in calibration; nothing was exported")
    for name, square in squares.items():
        if not ranks.sum_(square).isfinite().all():
            raise LimitError(f"{name} has no finite gradient in calibration; nothing was exported")
    return Calibration(hessians, squares)


def calibration_rows(run: Run) -> int:
    """Sequences of one calibration forward of a rank; few where gradients are squared, which sums would average out."""
    tokens = 2048 if "sensitivity" in calibration_needs(run.hp) else SCORE_TOKENS[run.ranks.device.type]
    return max(1, tokens // run.hp.train_seq_len)


def calibration_texts(run: Run) -> np.ndarray:
    """(n, TRAIN_SEQ_LEN + 1) uint16: GPTQ_CALIBRATION_TOKENS targets of the training text, evenly spaced, and what
    precedes them. Raises UserError."""
    length = run.hp.train_seq_len
    count, last = run.hp.gptq_calibration_tokens // length, max(0, len(run.stream) - length - 1)
    starts = [last * i // max(1, count - 1) for i in range(count)]
    return np.stack([run.stream.read(start, length + 1) for start in starts])


def quantize(
    weights: Mapping[str, Tensor],
    hp: Hyperparameters,
    grids: Mapping[str, Grid],
    rounding: Mapping[str, GPTQ | Trellis] = {},
) -> dict[str, Stored]:
    """All weights as the artifact holds them, on CPU, in its order (class by class). What `rounding` does not name is
    rounded to nearest.

    Raises LimitError where a storage cannot hold them.
    """
    stored, order = {}, [storage.label for storage in STORAGE]
    walked = walk_trellises(weights, grids, rounding)
    for name in sorted(weights, key=lambda name: order.index(label_of(name))):  # stable: model order in a class
        w, storage = weights[name].detach().float(), storage_of(name, hp)
        if name in grids:
            bits = max(5, 1 + int(grids[name].q_max).bit_length())  # of the largest code and a sign
            if name in walked:
                storage, columns = f"tcq{bits}", rounding[name].columns.cpu()
                scale, codes = grids[name].scales, walked[name]
            else:
                storage, columns = f"int{bits}", None
                scale, codes = (rounding[name].round if name in rounding else round_to_nearest)(w, grids[name])
            stored[name] = t = Stored(storage, codes.to(torch.int8).cpu(), scale.half().cpu(), columns)
        else:
            stored[name] = t = Stored(storage, w.half().cpu() if storage == "fp16" else w.cpu(), None)
        if not (w.isfinite().all() and t.dequantize().isfinite().all()):
            raise LimitError(
                f"{name} holds weights that are not finite or too large for {storage}; nothing was exported"
            )
    return stored


def main_grid(tensors: Mapping[str, Stored]) -> str:
    """The grid that most weights are on, for labels: that of the MLP's matrices, int5 … int8 in a trellis too."""
    return tensors["blocks.0.mlp.down.weight"].storage.replace("tcq", "int")


def reconstructed_layers(model: GPT, head: bool = False) -> dict[str, CastedLinear]:
    """The layers that QAT prepares and full GPTQ quantizes, by the names of their weights; also the head if asked."""
    layers = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, CastedLinear)}
    return {n: m for n, m in layers.items() if row_of(n).storage.reconstructed or (head and m is model.head)}


class QAT:
    """Fake quantization of every block matrix on the grid of QUANT's row, never a fitted one; switched per module."""

    def __init__(self, model: GPT, hp: Hyperparameters):
        self.on, self.hp, self.layers = False, hp, reconstructed_layers(model)
        self.quantizer = QUANTIZERS[uncalibrated(hp)]
        for name, layer in self.layers.items():
            layer.q_max = levels(storage_of(name, hp)) if self.quantizer.clips else Q_LIMIT
            layer.row_scale = torch.ones(layer.weight.size(0), 1, device=layer.weight.device)

    @torch.no_grad()
    def refresh(self) -> None:
        """Search the row scales of the present weights, outside the graph, into the buffers that it reads."""
        weights = {name: layer.weight for name, layer in self.layers.items()}
        for name, steps in self.quantizer.steps(weights, self.hp, Calibration()).items():
            grid = self.quantizer.grid(weights[name], steps, storage_of(name, self.hp))
            self.layers[name].row_scale.copy_(search_row_scales(weights[name], grid))

    @torch.no_grad()
    def penalize(self, weight: float) -> None:
        """Add the gradient of weight * Σ mean(w² δ²/12) over the matrices, δ their present quantization steps.

        CROWN-Q: δ²/12 is the variance of uniform rounding noise, w² a stand-in for the loss's curvature.
        """
        for layer in self.layers.values():
            w = layer.weight
            w.grad.addcmul_(w, layer.row_scale.square(), value=weight / (6 * w.numel()))

    def set(self, on: bool) -> None:
        """On or off with the scales as they are."""
        self.on = on
        for layer in self.layers.values():
            layer.fake_quant = on

    @contextlib.contextmanager
    def switched(self, on: bool):
        """This state inside the block, the present one after it."""
        before = self.on
        self.set(on)
        try:
            yield
        finally:
            self.set(before)


# ----------------------------------------------------------------------------------------------------------------------
# Export
# ----------------------------------------------------------------------------------------------------------------------

FIT_WINDOW = 4096  # bytes below the cap that a fitted artifact may leave
# On the steps: finer, int8 has no more levels; what is hardly ever coarser; coarser, int5 has not even one.
FIT_FACTORS = (2.0**-4, 2.0**2, 2.0**4)
FIT_ATTEMPTS = 8  # of packing; two to four do
FIT_SAMPLE = 1 << 22  # weights that a prediction rounds


class Packed(NamedTuple):
    """Weights quantized and packed, with steps `factor` times as large as QUANT has them."""

    factor: float
    tensors: dict[str, Stored]
    blob: bytes  # the artifact


class Exporter:
    """Averaged weights on their way into an artifact, on the main rank."""

    def __init__(self, run: Run, weights: Mapping[str, Tensor], calibration: Calibration):
        self.run, hp, device = run, run.hp, run.ranks.device
        hessians = calibration.hessians if hp.gptq_enabled else {}
        self.rounding = {name: GPTQ(hessian, hp) for name, hessian in hessians.items()}
        calibration = calibration._replace(left={name: rounder.left for name, rounder in self.rounding.items()})
        self.weights = {name: w.to(device) for name, w in weights.items()}
        if hp.trellis_enabled:
            free = [name for name in weights if levels(storage_of(name, hp)) and sigmas_of(name, hp)]
            self.rounding = {name: Trellis(weights[name].size(1)) for name in free} | self.rounding
            for name, rounder in self.rounding.items():  # what is quantized is the matrix without its columns' scales
                self.weights[name] = self.weights[name] / column_scales(rounder.columns.to(device))
        self.steps = choose_steps(self.weights, hp, calibration)

    def pack(self, factor: float = 1.0) -> Packed:
        run = self.run
        with run.phases("quantize"):
            grids = make_grids(self.weights, run.hp, self.steps, factor)
            tensors = quantize(self.weights, run.hp, grids, self.rounding)
        with run.phases("compress"):
            header = artifact_header("artifact", run.hp, run.dtype, run.val)
            return Packed(factor, tensors, pack_artifact(header, tensors, run.hp.compressor))

    def predict(self, factor: float) -> float:
        """Bytes of the artifact, from a sample of rows rounded to nearest: codes at the entropy of each matrix, and a
        byte for each row's scale."""
        every = max(1, sum(w.numel() for w in self.weights.values()) // FIT_SAMPLE)
        rows = {name: w[::every] if name in self.steps else w for name, w in self.weights.items()}
        steps = {name: step[::every] for name, step in self.steps.items()}
        tensors = quantize(rows, self.run.hp, make_grids(rows, self.run.hp, steps, factor))
        sizes = [t.size() * self.weights[name].numel() / t.data.numel() for name, t in tensors.items()]
        return sum(sizes) + sum(len(self.weights[name]) for name in self.steps)

    def solve(self, size: float) -> float:
        """The factor whose artifact is predicted to have so many bytes; an end of FIT_FACTORS where none does."""
        low, high = FIT_FACTORS[:2] if self.predict(FIT_FACTORS[1]) <= size else FIT_FACTORS[1:]
        while high / low > 1.0001:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.predict(middle) > size else (low, middle)
        return FIT_FACTORS[0] if low == FIT_FACTORS[0] else high

    def fit(self, room: int) -> Packed:
        """Of at most `room` bytes and, where the grids allow it, at least room - FIT_WINDOW.

        What the prediction missed in one artifact corrects it for the next. A compressor whose size jumps could defy
        that: after three artifacts that were too large and none that fits, each aims lower by much. Deterministic. (A
        secant on packed sizes alone, without predictions, packed once more in most fits.)
        """
        over, under, best, missed = 0.0, math.inf, None, 0.0  # factors known to be too large for the room, and to fit
        for attempt in range(1, FIT_ATTEMPTS + 1):
            with self.run.phases("fit"):
                margin = min(FIT_WINDOW / 2, room / 2000) * 4 ** (0 if best else max(0, attempt - 4))
                factor = self.solve(room - margin - missed)
                if over and best and not over < factor < under:
                    factor = math.sqrt(over * under)
                predicted = self.predict(factor)
            packed = self.pack(factor)
            size, fits = len(packed.blob), len(packed.blob) <= room
            line = f"fit:{attempt} factor:{factor:.6f} predicted:{predicted + missed:.0f} bytes:{size} room:{room}"
            self.run.log(line)
            missed = size - predicted
            if fits:
                under, best = factor, max(best or packed, packed, key=lambda packed: len(packed.blob))
            else:
                over = factor
            if room - FIT_WINDOW <= size <= room or factor == FIT_FACTORS[0 if fits else -1]:
                break
        return best or packed

    def report(self, packed: Packed) -> None:
        """Log every grid and, of GPTQ's matrices, the output error beside rounding's; the console gets their sums."""
        log, tensors, parts, shares = self.run.log, packed.tensors, [], []
        sizes = {name: t.size() for name, t in tensors.items()}
        grids = make_grids(self.weights, self.run.hp, self.steps, packed.factor)
        for (label, storage), names in code_groups({name: t.storage for name, t in tensors.items()}).items():
            for name in names:
                t, bits = tensors[name], 8 * sizes[name] / tensors[name].data.numel()
                line = f"grid:{name} {storage} step:{t.scale.float().median():.4g} entropy:{bits:.3f}"
                if isinstance(rounder := self.rounding.get(name), GPTQ):
                    w, hessian = self.weights[name].float(), rounder.hessian
                    scale, codes = round_to_nearest(w, grids[name])
                    plain = output_error(w, codes * scale, hessian).sum().item()
                    stored = t.dequantize() if t.columns is None else t.dequantize() / column_scales(t.columns)
                    error = output_error(w, stored.to(w.device), hessian).sum().item()
                    shares.append(error / plain if plain else 1.0)
                    line += f" output_error:{error:.6g} of_rounding:{shares[-1]:.4f}"
                log(line, console=False)
            step = torch.cat([tensors[name].scale.float() for name in names]).median()
            bits = 8 * sum(sizes[name] for name in names) / sum(tensors[name].data.numel() for name in names)
            parts.append(f"{label} {storage} step {step:.3g} entropy {bits:.3f}")
        log(f"grids: {', '.join(parts)}")
        if shares:
            middle, worst = statistics.median(shares), max(shares)
            log(f"gptq:matrices:{len(shares)} output_error_of_rounding median:{middle:.4f} worst:{worst:.4f}")

    def report_fit(self, packed: Packed, room: int) -> None:
        """How near to the cap a fitted artifact came and, where that is not within FIT_WINDOW, why."""
        log, left, (finest, _, coarsest) = self.run.log, room - len(packed.blob), FIT_FACTORS
        log(f"fit:factor:{packed.factor:.6f} left:{left}")
        if left < 0 and packed.factor < coarsest:
            log(f"fit: none of {FIT_ATTEMPTS} attempts fits ARTIFACT_CAP_BYTES, by {-left} bytes; use COMPRESSOR=ans")
        elif left < 0:
            heaviest = sorted(packed.tensors.items(), key=lambda item: -item[1].size())[:3]
            heaviest = ", ".join(f"{name} {t.size():.0f} bytes" for name, t in heaviest)
            log(f"fit: even the coarsest steps are {-left} bytes over ARTIFACT_CAP_BYTES; heaviest: {heaviest}")
        elif left > FIT_WINDOW and packed.factor == finest:
            log(f"fit: the finest steps leave {left} bytes of the cap; a larger model would fit")
        elif left > FIT_WINDOW:
            log(f"fit: {FIT_ATTEMPTS} attempts came no nearer to the cap than {left} bytes")


def export(run: Run, weights: Mapping[str, Tensor]) -> tuple[Path, bytes]:
    """Quantize, pack, write; the artifact's place and its bytes as read back from there, on every rank.

    Calibration reads training text, so its seconds belong to the training clock.
    """
    hp, path, blob, calibration = run.hp, run.folder / "artifact.pgolf", None, Calibration()
    if hp.calibrates:
        with run.phases("calibrate"):
            calibration = calibrate(run, weights, run.ranks.agree(lambda: calibration_texts(run)))
    if run.ranks.is_main:
        with run.phases("quantize"):
            exporter = Exporter(run, weights, calibration)
        room = hp.artifact_cap_bytes - len(run.source)
        packed = exporter.fit(room) if hp.fit_to_cap else exporter.pack()
        path = write_result(run, path, packed.blob)
        run.signals.advice = scored_again(path)
        exporter.report(packed)
        if hp.fit_to_cap:
            exporter.report_fit(packed, room)
        blob = path.read_bytes()
    path, blob = run.ranks.broadcast_object((path, blob))
    run.signals.advice = scored_again(path)
    return path, blob


def scored_again(path: Path) -> str:
    """What to tell whoever ends a run that has its artifact."""
    return f"the artifact is whole: EVAL_ONLY=1 ARTIFACT_PATH={path} scores it"


def save_weights(run: Run, weights: Mapping[str, Tensor]) -> None:
    """The float weights in the artifact's own format, uncompressed, for EXPORT_ONLY."""
    header = artifact_header("weights", run.hp, run.dtype, run.val)
    tensors = {name: Stored("fp32", w.float().cpu(), None) for name, w in weights.items()}
    path = write_result(run, run.folder / "weights.pgolf", pack_artifact(header, tensors, "stored"))
    run.log(f"saved weights: {path}")


# ----------------------------------------------------------------------------------------------------------------------
# Entropy coding of codes
# ----------------------------------------------------------------------------------------------------------------------

# Trained weights are not one distribution: some rows and some input columns are larger than others. A code's context is
# the sum of its row's and its column's class, both given in the file; each context of a tensor class has its own table.
# Tables hold costs in eighths of a bit, one byte for each magnitude: codes are as often negative as positive. An ANS
# coder (Duda, 2013; constriction, Bamler 2022) spends those costs to within a ten-thousandth.
COST_WEIGHTS = np.array([round(2.0 ** (40 - c / 8)) for c in range(256)], dtype=np.int64)  # none near a half
TABLE_TOTAL = 1 << 20
CLASS_STEPS = (0.0, 0.5, 0.25)  # octaves of energy between classes; 0: one class


def entropy_model(costs: np.ndarray):
    """constriction's model of symbols 0…n-1 of these costs (n,) uint8, in whole numbers: the same on every machine."""
    weights = COST_WEIGHTS[costs]
    shares = np.maximum(weights * TABLE_TOTAL // weights.sum(), 1)
    shares[shares.argmax()] += TABLE_TOTAL - shares.sum()
    return load_compressor("ans").model.Categorical(shares / TABLE_TOTAL, perfect=False)


def costs_of(counts: np.ndarray) -> np.ndarray:
    """Costs (…, n) uint8, in eighths of a bit, of symbols that occur so often."""
    share = np.maximum(counts, 1e-12) / np.maximum(counts.sum(-1, keepdims=True), 1)
    return np.clip(np.round(-8 * np.log2(share)), 0, 255).astype(np.uint8)


def mirrored(costs: np.ndarray) -> np.ndarray:
    """Costs of the codes -q…q from those of the magnitudes 0…q; a sign is a bit."""
    half = np.minimum(costs[1:].astype(int) + 8, 255).astype(np.uint8)
    return np.concatenate([half[::-1], costs[:1], half])


def entropy_bits(counts: np.ndarray) -> float:
    """Bits of that many symbols of each value at their own frequencies, over the last axis, summed."""
    totals = np.maximum(counts.sum(-1), 1)
    return float((totals * np.log2(totals)).sum() - (counts * np.log2(np.maximum(counts, 1))).sum())


def split(values: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """One part for each size."""
    return np.split(values, np.cumsum(sizes))[:-1]


def code_contexts(
    shapes: Sequence[Sequence[int]], rows: np.ndarray, columns: np.ndarray, odd: np.ndarray | None = None
) -> np.ndarray:
    """uint8 of every code of matrices of these shapes, from the classes of all their rows and of all their columns; in
    a trellis two for each sum of them, for even states and for `odd` ones (codes,) bool."""
    heights, widths = zip(*shapes, strict=True)
    sides = zip(split(rows, heights), split(columns, widths), strict=True)
    contexts = np.concatenate([(row[:, None] + column).ravel() for row, column in sides])
    return contexts if odd is None else 2 * contexts + odd


def walk_order(shapes: Sequence[Sequence[int]], columns: Sequence[np.ndarray]) -> np.ndarray:
    """int32 of every code: at which step a trellis comes to it. It goes through all rows of all matrices at once,
    column by column; columns: (cols,) int8 of each matrix."""
    steps = [np.argsort(np.argsort(part, kind="stable")).astype(np.int32) for part in columns]
    return np.concatenate([np.tile(step, height) for step, (height, _) in zip(steps, shapes, strict=True)])


def classify(
    matrices: Sequence[np.ndarray], q_max: int, odd: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cheapest of a few ways to class rows and columns, side information and tables counted.

    The result is the uint8 classes of all rows, those of all columns, and the costs of every context's magnitudes,
    (contexts, q_max + 1) uint8.
    """
    magnitudes = np.concatenate([np.abs(m, dtype=np.int16).ravel() for m in matrices]).astype(np.int64)
    shapes, energies = [m.shape for m in matrices], []
    for matrix in matrices:
        size = np.abs(matrix.astype(np.float32)) + 0.25
        row = size.mean(1)
        energies.append((row, np.full_like(row, size.mean()), (size / row[:, None]).mean(0)))
    # log2 of mean magnitude: of every row, of its whole matrix, of every column beside the rows
    by_row, by_matrix, by_column = (np.log2(np.concatenate(part)) for part in zip(*energies, strict=True))
    best, fewest = None, math.inf
    for row_step, column_step in itertools.product(CLASS_STEPS, CLASS_STEPS):
        rows = np.round((by_row if row_step else by_matrix) / (row_step or column_step or 1.0))
        columns = np.round(by_column / column_step) if column_step else np.zeros_like(by_column)
        limit = 127 if odd is None else 63
        rows, columns = (np.minimum(side - side.min(), limit).astype(np.uint8) for side in (rows, columns))
        counts = np.bincount(code_contexts(shapes, rows, columns, odd) * np.int64(q_max + 1) + magnitudes)
        counts = np.pad(counts, (0, -len(counts) % (q_max + 1))).reshape(-1, q_max + 1)
        bits = entropy_bits(counts) + entropy_bits(np.bincount(rows)) + entropy_bits(np.bincount(columns))
        bits += 4.0 * (q_max + 1) * len(counts)  # a table entry, compressed
        if bits < fewest:
            best, fewest = (rows, columns, costs_of(counts)), bits
    return best


def code_groups(storages: Mapping[str, str]) -> dict[tuple[str, str], list[str]]:
    """The names of tensors that are stored as codes, by (tensor class, storage), in the file's order."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, storage in storages.items():
        if levels(storage):
            groups.setdefault((label_of(name), storage), []).append(name)
    return groups


def encode_codes(tensors: Mapping[str, Stored]) -> tuple[bytes, bytes]:
    """(models, words) of all codes: what a decoder must know first, and the coder's words."""
    coder, models, jobs = load_compressor("ans").stack.AnsCoder(), [], []
    for (_, storage), names in code_groups({name: t.storage for name, t in tensors.items()}).items():
        matrices, q_max = [tensors[name].data.numpy() for name in names], levels(storage)
        shapes, odd = [m.shape for m in matrices], None
        if storage.startswith("tcq"):
            scales = [tensors[name].columns.numpy() for name in names]
            odd = np.concatenate([odd_states(m, part).ravel() for m, part in zip(matrices, scales, strict=True)])
        rows, columns, tables = classify(matrices, q_max, odd)
        for side in (rows, columns):
            costs = costs_of(np.bincount(side))
            models.append(bytes([len(costs) - 1]) + costs.tobytes())
            if len(costs) > 1:
                jobs.append((side.astype(np.int32), entropy_model(costs)))
        models.append(bytes([len(tables) - 1]) + tables.tobytes())
        run = contexts = code_contexts(shapes, rows, columns, odd)  # what is coded in one go
        if odd is not None:
            run = walk_order(shapes, scales) * np.int32(len(tables)) + contexts
        order, tables = np.argsort(run, kind="stable"), [entropy_model(mirrored(costs)) for costs in tables]
        starts = np.flatnonzero(np.append(True, np.diff(run[order]) != 0))
        codes = np.concatenate([m.ravel() for m in matrices])[order].astype(np.int32) + q_max
        models_of = (tables[context] for context in contexts[order[starts]])
        jobs += zip(np.split(codes, starts[1:]), models_of, strict=True)
    for symbols, model in reversed(jobs):  # a stack: the decoder meets the last first
        coder.encode_reverse(symbols, model)
    words = coder.get_compressed().astype("<u4").tobytes()
    return struct.pack("<I", len(words) // 4) + b"".join(models), words


def decode_codes(
    table: Sequence, models: memoryview, words: bytes, scales: Mapping[str, np.ndarray] = {}
) -> dict[str, np.ndarray]:
    """int8 codes by name, of a checked table and just these models and words; `scales` are those of the columns of its
    trellises. Raises ArtifactError."""
    damaged = ArtifactError("artifact is damaged: its code tables or words are not whole")
    asked = sum(math.prod(shape) for _, shape, storage in table if levels(storage))
    if asked > min(MAX_PAYLOAD_BYTES, MAX_CODES_PER_BYTE * (len(models) + len(words))):
        raise ArtifactError(f"artifact is damaged: {asked} codes are more than its words can hold")
    if len(models) < 4 or len(words) != 4 * int.from_bytes(models[:4], "little"):
        raise damaged
    try:
        coder = load_compressor("ans").stack.AnsCoder(np.frombuffer(words, dtype="<u4").astype(np.uint32))
    except ValueError:
        raise damaged from None
    reader, every_shape, codes = io.BytesIO(models[4:]), {name: shape for name, shape, _ in table}, {}

    def read_costs(symbols: int) -> np.ndarray:
        rows = int.from_bytes(reader.read(1), "little") + 1
        if len(part := reader.read(rows * symbols)) < rows * symbols:
            raise damaged
        return np.frombuffer(part, dtype=np.uint8).reshape(rows, symbols)

    def decode(costs: np.ndarray, count: int) -> np.ndarray:
        if len(costs) == 1 or count == 0:
            return np.zeros(count, dtype=np.int32)
        return coder.decode(entropy_model(costs), count)

    for (_, storage), names in code_groups({name: storage for name, _, storage in table}).items():
        shapes = [every_shape[name] for name in names]
        heights, widths = zip(*shapes, strict=True)
        rows = decode(read_costs(1)[:, 0], sum(heights)).astype(np.uint8)
        columns = decode(read_costs(1)[:, 0], sum(widths)).astype(np.uint8)
        tables, contexts = read_costs(levels(storage) + 1), code_contexts(shapes, rows, columns)
        coders = [entropy_model(mirrored(costs)) for costs in tables]
        values, trellis = np.empty(len(contexts), dtype=np.int8), storage.startswith("tcq")
        steps = [np.arange(len(contexts))]
        if trellis:
            order, state = walk_order(shapes, [scales[name] for name in names]), np.zeros(len(rows), dtype=np.uint8)
            steps = split(np.argsort(order, kind="stable"), np.bincount(order))
            row = np.arange(len(rows), dtype=np.int32).repeat(np.repeat(widths, heights))
        for places in steps:
            here = contexts[places]
            if trellis:
                states = state[row[places]]
                here = 2 * here + (states & 1)
            if here.max() >= len(coders):
                raise damaged
            counts = np.bincount(here)
            decoded = [coder.decode(coders[context], int(counts[context])) for context in np.flatnonzero(counts)]
            values[places[np.argsort(here, kind="stable")]] = np.concatenate(decoded) - levels(storage)
            if trellis:
                state[row[places]] = NEXT_STATE[states, values[places] & 1]
        for name, shape, part in zip(names, shapes, split(values, [math.prod(s) for s in shapes]), strict=True):
            codes[name] = part.reshape(shape)
    if not coder.is_empty() or reader.read(1):
        raise damaged
    return codes


# ----------------------------------------------------------------------------------------------------------------------
# Artifact
# ----------------------------------------------------------------------------------------------------------------------

# ARTIFACT, little-endian.
#   0   5  magic b"PGOLF"
#   5   1  format version
#   6   1  compressor: 0 stored, 1 lzma (raw LZMA2, dictionary from the payload's length), 2 zstd, 3 ans
#   7   1  zero
#   8   8  u64 length of the body
#   16  8  u64 length of the payload
#   24  32 SHA-256 of bytes 0…23 and the body
#   56  …  body: the compressed payload; for ans u32 its length, it as lzma has it, and the coder's u32 words
# Payload: u32 length of a compact JSON header, the header, then without padding, in the order of the header's table
#   the codes, row-major, one int8 each
#   the fp16 tensors and after them the fp16 row scales of the codes: all high bytes, then all low bytes
#   the fp32 tensors: the highest bytes of all, then the next ones, and so on
#   of each trellis the scales of its columns, one i8 each
#   for ans: no codes above, but here u32 number of words, and for each class and storage of coded tensors three groups,
#   each u8 number of rows less one and the rows: costs of row and of column classes (1 byte each), context tables
# Header: {"kind": "artifact"|"weights", "architecture": {…}, "evaluation": {…}, "tokenizer_sha256": hex,
#   "tensors": [[name, shape, "int5"|…|"tcq8"|"fp16"|"fp32"], …]}, and "transform": "caseops_…" where the text is in
#   CaseOps. Nothing in it depends on time, paths or run names.
MAGIC, FORMAT_VERSION, PREFIX_BYTES = b"PGOLF", 2, 56
MAX_PAYLOAD_BYTES, MAX_HEADER_BYTES = 1 << 30, 1 << 20
MAX_CODES_PER_BYTE = 1024  # of an entropy-coded file: a few bytes must not ask for gigabytes
COMPRESSORS = ("stored", "lzma", "zstd", "ans")
STREAMS = {"codes": "<i1", "fp16": "<f2", "fp32": "<f4", "columns": "<i1"}  # of the payload, in its order


class ArtifactError(UserError):
    """The bytes are no whole artifact of ours."""


def load_compressor(name: str):
    """The module that `name` needs, if any. A missing compressor is an error, never another compressor."""
    try:
        if name == "ans":
            import constriction

            return constriction.stream
        if name == "zstd":
            import zstandard

            return zstandard
    except ImportError:
        package = dict(ans="constriction", zstd="zstandard")[name]
        raise UserError(f"COMPRESSOR={name} needs `pip install {package}`; or use COMPRESSOR=lzma") from None
    return None


def lzma_filters(payload_bytes: int) -> list[dict]:
    """Codes are single bytes without alignment, so no position bits; the dictionary covers the payload."""
    dictionary = min(max(1 << max(payload_bytes - 1, 1).bit_length(), 1 << 12), 1 << 26)
    return [dict(id=lzma.FILTER_LZMA2, preset=9 | lzma.PRESET_EXTREME, dict_size=dictionary, lc=0, lp=0, pb=0)]


def compress(payload: bytes, name: str) -> bytes:
    if name == "lzma":
        return lzma.compress(payload, lzma.FORMAT_RAW, filters=lzma_filters(len(payload)))
    if name == "zstd":
        return load_compressor(name).ZstdCompressor(level=22).compress(payload)
    return payload


def decompress(body: bytes, name: str, size: int) -> bytes:
    """Exactly `size` bytes or an ArtifactError; never allocates more than that."""
    payload, trailing = body, b""
    try:
        if name == "lzma":
            stream = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=lzma_filters(size))
            payload, trailing = stream.decompress(body, max_length=size + 1), stream.unused_data
        elif name == "zstd":
            zstandard = load_compressor(name)
            if zstandard.frame_content_size(body) != size:
                raise ArtifactError("artifact is damaged: the compressed body declares another length")
            stream = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
            payload, trailing = stream.decompress(body), stream.unused_data
    except Exception as error:
        if not isinstance(error, (lzma.LZMAError, EOFError, MemoryError)) and type(error).__name__ != "ZstdError":
            raise
        raise ArtifactError(f"artifact is damaged: its {name} body cannot be decompressed ({error})") from None
    if len(payload) != size or trailing:
        raise ArtifactError("artifact is damaged: its body does not decompress to the declared length")
    return payload


def byte_planes(arrays: Sequence[np.ndarray], dtype: str) -> bytes:
    """The values of all arrays, their highest bytes first, then the next: compressors find no order among mantissas,
    but much among signs and exponents."""
    values = np.concatenate([np.zeros(0, dtype), *(a.astype(dtype).ravel() for a in arrays)])
    return values.view(np.uint8).reshape(-1, values.itemsize)[:, ::-1].T.tobytes()


def from_planes(data: memoryview, dtype: str) -> np.ndarray:
    """The values that byte_planes was given, in one array."""
    planes = np.frombuffer(data, np.uint8).reshape(np.dtype(dtype).itemsize, -1)
    return planes[::-1].T.copy().view(dtype)[:, 0].astype(dtype[1:])


def stream_shapes(table: Sequence) -> dict[str, dict[str, Sequence[int]]]:
    """By stream and in its order, the shapes of what it holds of the tensors of a table [[name, shape, storage], …]."""
    streams = {stream: {} for stream in STREAMS}
    for name, shape, storage in table:
        streams["codes" if levels(storage) else storage][name] = shape
        if storage.startswith("tcq"):
            streams["columns"][name] = shape[1:]
    streams["fp16"] |= {name: (rows, 1) for name, (rows, _) in streams["codes"].items()}
    return streams


def pack_artifact(header: dict, tensors: Mapping[str, Stored], compressor: str) -> bytes:
    """The file's bytes, ready to be written. `header` lacks only the tensor table."""
    table = [[name, list(t.data.shape), t.storage] for name, t in tensors.items()]
    header_bytes = json.dumps({**header, "tensors": table}, separators=(",", ":"), sort_keys=True).encode()
    parts = {name: t.parts() for name, t in tensors.items()}
    streams = {
        stream: byte_planes([parts[name][stream].numpy() for name in shapes], STREAMS[stream])
        for stream, shapes in stream_shapes(table).items()
    }
    models = words = b""
    if compressor == "ans":
        (models, words), streams["codes"] = encode_codes(tensors), b""
    payload = b"".join([struct.pack("<I", len(header_bytes)), header_bytes, *streams.values(), models])
    body = compress(payload, "lzma" if compressor == "ans" else compressor)
    if compressor == "ans":
        body = struct.pack("<I", len(body)) + body + words
    prefix = struct.pack("<5sBBBQQ", MAGIC, FORMAT_VERSION, COMPRESSORS.index(compressor), 0, len(body), len(payload))
    return prefix + hashlib.sha256(prefix + body).digest() + body


def unpack_artifact(blob: bytes) -> tuple[dict, dict[str, Stored]]:
    """(header, tensors) of pack_artifact's bytes, exactly. Raises ArtifactError for anything else; executes nothing."""
    if len(blob) < PREFIX_BYTES or blob[:5] != MAGIC:
        raise ArtifactError("not an artifact of this script (wrong magic or too short)")
    _, version, compressor, zero, body_bytes, payload_bytes = struct.unpack("<5sBBBQQ", blob[:24])
    if version != FORMAT_VERSION:
        raise ArtifactError(f"artifact has format version {version}; this script reads {FORMAT_VERSION}")
    if len(blob) != (declared := PREFIX_BYTES + body_bytes):
        raise ArtifactError(f"artifact is {len(blob)} bytes, not the {declared} it declares: truncated or padded")
    if hashlib.sha256(blob[:24] + blob[PREFIX_BYTES:]).digest() != blob[24:PREFIX_BYTES]:
        raise ArtifactError("artifact is damaged: its checksum does not match")
    if compressor >= len(COMPRESSORS) or zero or not 4 <= payload_bytes <= MAX_PAYLOAD_BYTES:
        raise ArtifactError("artifact names an unknown compressor or an impossible length")
    name, body, words = COMPRESSORS[compressor], blob[PREFIX_BYTES:], None
    if name == "ans":
        end = 4 + int.from_bytes(body[:4], "little")
        if len(body) < end or (len(body) - end) % 4:
            raise ArtifactError("artifact is damaged: its code words are not whole")
        name, body, words = "lzma", body[4:end], body[end:]
    payload = decompress(body, name, payload_bytes)
    header_bytes = int.from_bytes(payload[:4], "little")
    if header_bytes > min(MAX_HEADER_BYTES, len(payload) - 4):
        raise ArtifactError("artifact is damaged: its header is longer than the file allows")
    header = parse_header(payload[4 : 4 + header_bytes])
    return header, read_tensors(header["tensors"], memoryview(payload)[4 + header_bytes :], words)


def parse_header(text: bytes) -> dict:
    """The JSON header with its shape checked; settings in it pass the same checks as those of the environment."""
    wanted = dict(kind=str, architecture=dict, evaluation=dict, tokenizer_sha256=str, transform=str, tensors=list)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise ArtifactError("artifact is damaged: its header is no JSON") from None
    if not isinstance(header, dict) or {"transform": str} | {k: type(v) for k, v in header.items()} != wanted:
        raise ArtifactError("artifact is damaged: its header lacks a field or has one too many")
    if header["kind"] not in ("artifact", "weights"):
        raise ArtifactError("artifact is damaged: it is neither an artifact nor saved weights")
    header["architecture"] = listed_settings(header["architecture"], "model")
    header["evaluation"] = listed_settings(header["evaluation"], "evaluation", dtype=None)
    try:
        hp = Hyperparameters(**header["architecture"], **header["evaluation"])
    except UserError as error:
        raise ArtifactError(f"artifact is damaged: its settings are not valid ({error})") from None
    with torch.device("meta"):  # shapes only: nothing is allocated on a header's word
        expected = {name: list(p.shape) for name, p in GPT(hp, 2, sdpa, torch.float32).named_parameters()}
    table = header["tensors"]
    if not all(isinstance(row, list) and len(row) == 3 and isinstance(row[0], str) for row in table):
        raise ArtifactError("artifact is damaged: its tensor table is malformed")
    shapes = {name: shape for name, shape, _ in table}
    integers = all(type(n) is int for shape in shapes.values() if isinstance(shape, list) for n in shape)  # 8.0 == 8
    if len(table) != len(expected) or shapes != expected or not integers:
        raise ArtifactError("artifact is damaged: its tensors are not those of its architecture")
    for name, _, storage in table:
        if storage not in (row_of(name).storage.forms if header["kind"] == "artifact" else ("fp32",)):
            raise ArtifactError(f"artifact is damaged: {name} is stored as {storage!r}")
    return header


def listed_settings(listed: dict[str, Any], section: str, **more: Any) -> dict[str, Any]:
    """A header's settings of one section; those that came after it are off. Raises ArtifactError."""
    fields = [f for f in dataclasses.fields(Hyperparameters) if f.metadata["section"] == section]
    offs = {f.name: f.metadata["off"] for f in fields} | more
    if unknown := sorted(listed.keys() - offs):
        raise ArtifactError(f"artifact has a setting that this version does not know: {shown(unknown[0])}")
    if lacking := [name for name, off in offs.items() if off is None and name not in listed]:
        raise ArtifactError(f"artifact is damaged: its settings lack {lacking[0]}")
    return {name: listed.get(name, off) for name, off in offs.items()}


def read_tensors(table: list, data: memoryview, words: bytes | None) -> dict[str, Stored]:
    """Tensors of a checked table from the payload after the header, codes from `words` where an entropy coder wrote
    them. Lengths are compared before anything is made."""
    streams, parts, tensors = stream_shapes(table), {}, {}
    if words is not None:
        streams["codes"] = {}
    sizes = {stream: [math.prod(shape) for shape in shapes.values()] for stream, shapes in streams.items()}
    ends = [*itertools.accumulate(sum(sizes[stream]) * np.dtype(STREAMS[stream]).itemsize for stream in STREAMS)]
    if ends[-1] > len(data) or (ends[-1] < len(data) and words is None):
        raise ArtifactError("artifact is damaged: its streams are shorter or longer than its table")
    for (stream, shapes), start, end in zip(streams.items(), [0, *ends[:-1]], ends, strict=True):
        values = split(from_planes(data[start:end], STREAMS[stream]), sizes[stream])
        parts[stream] = {name: part.reshape(shapes[name]) for name, part in zip(shapes, values, strict=True)}
    if words is not None:
        parts["codes"] = decode_codes(table, data[ends[-1] :], words, parts["columns"])
    parts = {stream: {name: torch.from_numpy(a) for name, a in found.items()} for stream, found in parts.items()}
    for name, _, storage in table:
        limit = levels(storage)
        data = parts["codes" if limit else storage][name]
        scale = parts["fp16"][name] if limit else None
        if limit and (int(data.max()) > limit or int(data.min()) < -limit):
            raise ArtifactError(f"artifact is damaged: codes of {name} lie outside {storage}")
        if not (scale if limit else data).isfinite().all() or (limit and (scale < 0).any()):
            raise ArtifactError(f"artifact is damaged: {name} holds values that are not finite")
        tensors[name] = Stored(storage, data, scale, parts["columns"].get(name))
    return tensors


def artifact_header(kind: str, hp: Hyperparameters, dtype: torch.dtype, val: Validation) -> dict:
    """Everything needed to rebuild the model and to repeat its scores, and nothing else."""
    evaluation = hp.section("evaluation") | dict(dtype="bf16" if dtype == torch.bfloat16 else "fp32")
    text = dict(tokenizer_sha256=val.tokenizer_sha256) | (dict(transform=val.transform) if val.transform else {})
    return dict(kind=kind, architecture=hp.section("model"), evaluation=evaluation, **text)


def read_artifact_file(path: str, kind: str) -> tuple[bytes, dict, dict[str, Stored]]:
    """(bytes, header, tensors) of a file of this kind. Raises UserError naming the file."""
    try:
        blob = read_file(Path(path), MAGIC)
        header, tensors = unpack_artifact(blob)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ArtifactError as error:
        raise UserError(f"{path}: {error}") from None
    if header["kind"] != kind:
        use = "EXPORT_ONLY=1 WEIGHTS_PATH" if header["kind"] == "weights" else "EVAL_ONLY=1 ARTIFACT_PATH"
        raise UserError(f"{path} holds {header['kind']}; read it with {use}=…")
    return blob, header, tensors


def load_model(path: str, device: str = "auto") -> tuple[GPT, Hyperparameters, dict]:
    """(model, settings, header) of an artifact, for other programs; device as DEVICE has it. Raises UserError.

    What EVAL_ONLY scores: `model.logits(tokens)` is (B, T) int -> (B, T, V) fp32 for T up to EVAL_SEQ_LEN.
    """
    _, header, tensors = read_artifact_file(path, "artifact")
    hp = Hyperparameters(**header["architecture"], **header["evaluation"], device=device)
    place = Ranks(hp, {}).device
    dtype = activation_dtype(hp.dtype, place)
    model = GPT(hp, hp.eval_seq_len, choose_attention(hp, place, dtype)[1], dtype).to(place)
    model.load_state_dict({name: stored.dequantize() for name, stored in tensors.items()})
    return model, hp, header


# ----------------------------------------------------------------------------------------------------------------------
# Scoring
# ----------------------------------------------------------------------------------------------------------------------

# Tokens of one scoring forward of a rank: enough to fill the device; on CPU, small enough for its caches.
SCORE_TOKENS = {"cuda": 131_072, "cpu": 16_384}
BLOCKS = 64  # of a pass's scores, whose sums are in the result
EVAL_MARGIN = 0.02  # of EVAL_MAX_SECONDS: test-time training stops this much earlier


class Score(NamedTuple):
    """Totals over scored targets; nats and bytes are sums."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def bpb(self) -> float:
        """Bits per byte: the score of the challenge."""
        return self.nats / math.log(2) / self.bytes

    def as_json(self) -> dict[str, float | None]:
        """Loss and bpb; None for a score that is not finite, which JSON cannot write."""
        finite = math.isfinite(self.nats)
        return dict(val_loss=self.loss if finite else None, val_bpb=self.bpb if finite else None)


def plan_windows(n: int, context: int, stride: int) -> np.ndarray:
    """Windows (W, 3) int64 of (start, first, end): a window reads tokens start…end-1 and scores targets first…end-1.

    Target i is the token after token i. The first window scores all its targets, each next one its last `stride`; the
    last window is the last `context` tokens and scores only what is left: every target once. stride = context is plain
    evaluation without overlap.
    """
    if n <= context:
        return np.array([[0, 0, n]], dtype=np.int64)
    ends = np.append(np.arange(context, n, stride), n)
    firsts = np.append(0, ends[:-1])
    return np.stack([ends - context, firsts, ends], axis=1).astype(np.int64)


def targets_of(windows: np.ndarray) -> np.ndarray:
    """(m,) int64: the targets that windows (W, 3) score, in their order."""
    firsts, widths = windows[:, 1], windows[:, 2] - windows[:, 1]
    return np.arange(widths.sum()) + np.repeat(firsts - np.cumsum(widths) + widths, widths)


def score_batch_windows(hp: Hyperparameters, ranks: Ranks, context: int, parts: int = 0) -> int:
    """Windows of one scoring forward of one of `parts`, of one rank."""
    return max(1, min(hp.val_batch_size // (parts or ranks.size), SCORE_TOKENS[ranks.device.type]) // context)


def gather(
    tokens: np.ndarray, windows: np.ndarray, rows: int, length: int, width: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """(inputs (rows, length), targets (rows, width), which of these count): the last `width` targets of windows (n, 3),
    n <= rows, each at most `length` tokens long.

    Nothing after a window's last target is read: a shorter window is filled up with that, missing rows are the last
    window again, and neither counts. Contiguous, as in training and warm-up: other strides were another compiled graph.
    """
    starts, firsts, ends = np.pad(windows, ((0, rows - len(windows)), (0, 0)), "edge").T[:, :, None]
    index = starts + np.arange(length + 1)
    text = torch.from_numpy(tokens[np.minimum(index, ends)].astype(np.int64)).to(device)
    target = index[:, length - width : length]
    counted = (firsts <= target) & (target < ends) & (np.arange(rows)[:, None] < len(windows))
    inputs, targets = text[:, :-1].contiguous(), text[:, length - width + 1 :].contiguous()
    return inputs, targets, torch.from_numpy(counted).to(device)


@torch.no_grad()
def score(
    model: Callable,
    tokens: np.ndarray,
    windows: np.ndarray,
    stride: int,
    batch: int,
    ranks: Ranks,
    bar=None,
    temperatures: tuple[float, ...] = (),
) -> np.ndarray:
    """Nats (m,) float32 of every target of the windows (W, 3), in their order, the same on every rank; with
    temperatures (m, temperatures).

    The windows are as long as each other, and the first alone may score more than `stride` targets. Every forward has
    `batch` windows, so that a score does not depend on how many windows are asked for and no further graph is compiled.
    A window that scores at most `stride` runs the head on those alone.
    """
    widths, length = windows[:, 2] - windows[:, 1], int(windows[0, 2] - windows[0, 0])
    columns = (temperatures,) if temperatures else ()
    nats = torch.zeros(int(widths.sum()), *map(len, columns), device=ranks.device)
    mine = ranks.part(np.column_stack([windows, np.cumsum(widths)]))
    wide = mine[:, 2] - mine[:, 1] > stride  # only the stream's first window
    for group, width in ((mine[wide], length), (mine[~wide], min(stride, length))):
        for i in range(0, len(group), batch):
            part = group[i : i + batch]
            inputs, targets, counted = gather(tokens, part[:, :3], batch, length, width, ranks.device)
            place = slice(part[0, 3] - part[0, 2] + part[0, 1], part[-1, 3])
            nats[place] = model(inputs, targets, *columns)[counted]
            if bar is not None:
                bar.update(len(part))
    return ranks.sum_(nats).cpu().numpy()


def total(nats: np.ndarray, target_bytes: np.ndarray) -> Score:
    """float64 sum in stream order of (n,) float32 nats; the bytes of the same n targets."""
    if len(nats) != len(target_bytes):
        raise RuntimeError(f"{len(nats)} scores for {len(target_bytes)} targets")
    return Score(float(nats.sum(dtype=np.float64)), len(nats), int(target_bytes.sum()))


def validate(run: Run, forward: Callable, context: int, label: str) -> Score:
    """The whole validation split in windows without overlap."""
    windows = plan_windows(run.val.targets, context, context)
    batch = score_batch_windows(run.hp, run.ranks, context)
    bar = progress_bar(len(windows) // run.ranks.size, label, run.log)
    nats = score(forward, run.val.tokens, windows, context, batch, run.ranks, bar)
    bar.close()
    return total(nats, run.val.bytes)


def log_score(log: Log, label: str, result: Score, start: float, extra: str = "") -> None:
    ms = 1000 * (time.perf_counter() - start)
    log(f"{label} val_loss:{result.loss:.4f} val_bpb:{result.bpb:.4f} {extra}eval_time:{ms:.0f}ms")


# ----------------------------------------------------------------------------------------------------------------------
# Test-time training
# ----------------------------------------------------------------------------------------------------------------------


class Segment(NamedTuple):
    """Windows that are scored at one go, and then learned from. Without any, a place to learn from what was scored."""

    windows: np.ndarray  # (n, 3) like a plan's
    useful: np.ndarray = np.zeros(0, dtype=bool)  # (n,): whether anything that comes later may profit from a window
    rate: float = 0.0  # learning rate
    fresh: bool = False  # of other documents than the one before
    queue: int = 0  # of documents, to which it belongs
    cost: float = 1.0  # of learning from it, compared with others


class Plan:
    """What a pass does with a text: rounds, equally many on every rank, each the list of this rank's segments in order.

    The first `updates` rounds are learned from; `guess` is what that takes, per second of scoring, before it is
    measured. `count` is what there is of the method's `unit`, for the log.
    """

    def __init__(self, rounds: list[list[Segment]], updates: int = 0, guess: float = 0.0, count: int = 0):
        self.rounds, self.updates, self.guess, self.count = rounds, updates, guess, count
        windows = [sum(len(segment.windows) for segment in segments) for segments in rounds]
        steps = [sum(segment.cost for segment in segments if segment.useful.any()) for segments in rounds]
        self.windows, self.steps = np.cumsum([0, *windows]), np.cumsum([0, *steps])  # before each round, and in all


class Method:
    """How a pass goes through a text: the protocol, and by itself sliding windows of weights that stay as they are.

    Evaluation.score_first calls score(tokens up to a segment's end, segment, bar) and, once those are kept, learn(the
    same). Where score and gradient come from one forward, the method keeps its graph from the one to the other.
    """

    unit, adapted_params = "", 0  # what it learns from, for the log; how many numbers adapt
    apart = False  # whether each rank has segments of its own; else all go through the same ones together
    readout: "Readout | None" = None

    def __init__(self, run: Run, model: GPT, graph: Callable, stride: int):
        self.hp, self.ranks, self.compile = run.hp, run.ranks, run.compile
        self.model, self.graph, self.stride = model, graph, stride
        self.rows = score_batch_windows(run.hp, run.ranks, run.hp.eval_seq_len)  # windows of a forward

    def forward(self, inputs: Tensor, targets: Tensor, *temperatures: tuple[float, ...]) -> Tensor:
        """The model's, compiled where that pays: learning, or windows scored whole or by their last targets."""
        if torch.is_grad_enabled():
            pays = self.compile.learning
        else:
            pays = self.compile.whole if targets.size(1) == inputs.size(1) else self.compile.sliding
        return (self.graph if pays else self.model)(inputs, targets, *temperatures)

    @staticmethod
    def check(hp: Hyperparameters, targets: int) -> None:
        """Raises a UserError, before any work, where a text of so many targets is too short to learn from."""

    def plan(self, tokens: np.ndarray) -> Plan:
        """The first few windows tell how long the rest will take."""
        windows = plan_windows(len(tokens) - 1, self.hp.eval_seq_len, self.stride)
        parts = np.split(windows, [4 * self.rows * self.ranks.size])
        return Plan([[Segment(part)] for part in parts if len(part)])

    def warm_up(self, synthetic: Callable) -> None:
        """Compile every graph of the pass on synthetic(rows, length) -> (inputs, targets)."""
        inputs, targets = synthetic(self.rows, self.hp.eval_seq_len)
        columns = () if self.readout is None else (self.readout.temperatures,)
        with torch.no_grad():
            for width in {self.hp.eval_seq_len, self.stride}:
                self.forward(inputs, targets[:, -width:].contiguous(), *columns)

    def score(self, tokens: np.ndarray, segment: Segment, bar: Any) -> np.ndarray:
        """Nats (m,) float32 of the segment's targets, the network's or what a readout makes of them."""
        nats = self.network_nats(tokens, segment, bar)
        return nats if self.readout is None else self.readout(nats, tokens, int(segment.windows[0, 1]))

    def network_nats(self, tokens: np.ndarray, segment: Segment, bar: Any = None) -> np.ndarray:
        temperatures = () if self.readout is None else self.readout.temperatures
        return score(self.forward, tokens, segment.windows, self.stride, self.rows, self.ranks, bar, temperatures)

    @torch.no_grad()
    def distribution(self, tokens: np.ndarray, segment: Segment) -> np.ndarray:
        """float64 log p (V,) of the segment's last target, which is about to be scored and not read here."""
        start, _, end = segment.windows[-1]
        inputs = torch.from_numpy(tokens[None, start:end].astype(np.int64)).to(self.ranks.device)
        logits = self.model.logits(inputs)[0, -1].double()
        if self.readout is None:
            return logits.log_softmax(-1).cpu().numpy()
        nats = torch.stack([-(logits / t).log_softmax(-1) for t in self.readout.temperatures], dim=-1).cpu().numpy()
        return self.readout.distribution(nats, self.network_nats(tokens, segment), tokens, int(segment.windows[0, 1]))

    def learn(self, tokens: np.ndarray, segment: Segment) -> None:
        """Learn from a segment that has just been scored."""

    def reset(self) -> None:
        """Forget what was learned beside the model's weights."""

    def collect(self, plan: Plan, nats: list[np.ndarray], targets: int) -> np.ndarray:
        """Nats (n,) float32 of the whole text, on every rank, from those of this rank's segments."""
        return np.concatenate(nats)


class StreamTTT(Method):
    """Chunks of the stream's windows: after each, SGD or AdamW over its targets, of all weights, tables too, or the
    control tensors alone; but of nothing of the first TTT_FREEZE_BLOCKS blocks.

    A step is TTT_BATCH_SEQS sequences over all ranks and its gradient Σ token gradients / Σ tokens whatever the split,
    so every rank keeps the same weights.
    """

    unit = "chunks"

    def __init__(self, run: Run, model: GPT, graph: Callable):
        super().__init__(run, model, graph, run.hp.eval_stride)
        hp, ranks = run.hp, run.ranks
        frozen = tuple(f"blocks.{i}." for i in range(hp.ttt_freeze_blocks))
        for name, parameter in model.named_parameters():
            adapts = hp.ttt_params == "all" or label_of(name) == "control"
            parameter.requires_grad_(adapts and not name.startswith(frozen))
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.adapted_params = sum(p.numel() for p in self.parameters)
        self.optimizer = ttt_optimizer(self.parameters, hp)
        self.length = min(hp.train_seq_len, hp.eval_seq_len)
        step_rows = min(hp.ttt_batch_seqs, -(-hp.ttt_chunk_tokens // self.length))  # sequences of a step, all ranks
        self.step_rows = max(1, min(SCORE_TOKENS[ranks.device.type] // self.length, -(-step_rows // ranks.size)))
        if hp.ttt_temperature or hp.hedge_enabled:
            self.readout = Readout(hp)

    @staticmethod
    def check(hp: Hyperparameters, targets: int) -> None:
        """One chunk would be learned from by nobody: names a chunk size that works."""
        context, size = hp.eval_seq_len, hp.ttt_chunk_tokens
        windows = plan_windows(targets, context, hp.eval_stride)
        fits = (s for s in (size, max(1, targets // 4), 1) if len(plan_chunks(windows, s)) > 1)
        if (fit := next(fits, None)) is None:
            needed = f"more than one window of EVAL_SEQ_LEN={context}"
            raise UserError(f"TTT_ENABLED=1 needs {needed}; here are {targets} targets")
        if fit != size:
            raise UserError(f"TTT_CHUNK_TOKENS={size} makes one chunk of {targets} targets; use TTT_CHUNK_TOKENS={fit}")

    def plan(self, tokens: np.ndarray) -> Plan:
        hp, windows = self.hp, plan_windows(len(tokens) - 1, self.hp.eval_seq_len, self.stride)
        chunks = plan_chunks(windows, hp.ttt_chunk_tokens)
        updates = min(len(chunks) - 1, hp.ttt_max_chunks or len(chunks))  # never the last
        rounds = [[Segment(c, np.full(len(c), k < updates), ttt_lr(hp, k, updates))] for k, c in enumerate(chunks)]
        # Forward and backward cost three forwards, without the overlap of windows.
        return Plan(rounds, updates, 3 * hp.ttt_epochs * self.stride / hp.eval_seq_len, len(chunks))

    def warm_up(self, synthetic: Callable) -> None:
        super().warm_up(synthetic)
        self.forward(*synthetic(self.step_rows, self.length)).sum().backward()
        self.optimizer.zero_grad(set_to_none=True)

    def reset(self) -> None:
        self.optimizer.state.clear()
        if self.readout is not None:
            self.readout.reset()

    def learn(self, tokens: np.ndarray, segment: Segment) -> None:
        self.adapt(tokens[segment.windows[0, 1] :], segment.rate)

    def adapt(self, tokens: np.ndarray, lr: float) -> None:
        """TTT_EPOCHS passes over the targets tokens[1:], which have all been scored; tokens is (m+1,) uint16."""
        starts = np.arange(0, len(tokens) - 1, self.length)
        sequences = np.column_stack([starts, starts, np.minimum(starts + self.length, len(tokens) - 1)])
        self.optimizer.param_groups[0]["lr"] = lr
        for _ in range(self.hp.ttt_epochs):
            for i in range(0, len(sequences), self.hp.ttt_batch_seqs):
                self.step(tokens, sequences[i : i + self.hp.ttt_batch_seqs])

    def step(self, tokens: np.ndarray, sequences: np.ndarray) -> None:
        """One step on sequences (n, 3), windows that count all their targets.

        SAM (Foret et al., 2020) takes the gradient at w + rho·g/|g|, where the loss is worse.
        """
        flat = self.gradient(tokens, sequences)
        if self.hp.ttt_sam_rho:
            weights = [p.detach().clone() for p in self.parameters]
            uphill = flat * (self.hp.ttt_sam_rho / (flat.norm() + 1e-12))
            with torch.no_grad():
                torch._foreach_add_(self.parameters, self.by_parameter(uphill))
                flat = self.gradient(tokens, sequences)
                torch._foreach_copy_(self.parameters, weights)
        if self.hp.ttt_grad_clip:
            flat.mul_((self.hp.ttt_grad_clip / (flat.norm() + 1e-6)).clamp(max=1.0))
        for parameter, gradient in zip(self.parameters, self.by_parameter(flat), strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def by_parameter(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([p.numel() for p in self.parameters])
        return [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]

    @torch.enable_grad()
    def gradient(self, tokens: np.ndarray, sequences: np.ndarray) -> Tensor:
        """Gradient of the mean loss over the sequences, all adapted parameters' in one row, the same on every rank."""
        total, mine = int((sequences[:, 2] - sequences[:, 1]).sum()), self.ranks.part(sequences)
        for i in range(0, len(mine), self.step_rows):
            part, shape = mine[i : i + self.step_rows], (self.step_rows, self.length, self.length)
            inputs, targets, counted = gather(tokens, part, *shape, self.ranks.device)
            ((self.forward(inputs, targets) * counted).sum() / total).backward()
        gradients = (torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters)  # None: no share
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self.optimizer.zero_grad(set_to_none=True)
        return self.ranks.sum_(flat)


def plan_chunks(windows: np.ndarray, chunk_tokens: int) -> list[np.ndarray]:
    """Cut a window plan into the shortest runs of whole windows with at least `chunk_tokens` scored targets."""
    chunks, start, first = [], 0, 0
    for i, (_, _, end) in enumerate(windows):
        if end - first >= chunk_tokens or i == len(windows) - 1:
            chunks.append(windows[start : i + 1])
            start, first = i + 1, end
    return chunks


def ttt_lr(hp: Hyperparameters, k: int, updates: int) -> float:
    """Learning rate on chunk k: a half cosine over the chunks that are learned from, after a linear rise."""
    rise = min(1.0, (k + 1) / max(1, hp.ttt_warmup_chunks))
    return hp.ttt_lr * rise * 0.5 * (1 + math.cos(math.pi * k / max(1, updates)))


def ttt_optimizer(parameters: list[Tensor], hp: Hyperparameters) -> torch.optim.Optimizer:
    """On fp32 weights; a weight decay is decoupled from the gradient."""
    if hp.ttt_optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=hp.ttt_lr, momentum=hp.ttt_momentum, foreach=True)
    betas, decay = (hp.ttt_momentum, 0.999), hp.ttt_weight_decay
    return torch.optim.AdamW(parameters, lr=hp.ttt_lr, betas=betas, weight_decay=decay, fused=True)


def lora_hook(pairs: list[list[Tensor]], scale: float) -> Callable:
    """A forward hook that adds (x Aᵀ) Bᵀ · alpha/rank (Hu et al., 2021) to what a module makes of its input x
    (B, T, in): with an A (rank, in) and a B (out, rank) for each of its passes and each sequence of a batch."""
    turn = itertools.cycle(pairs)

    def add(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> Tensor | tuple:
        x, (a, b) = inputs[0], next(turn)
        a, b = (matrix[: len(x)].to(x.dtype).mT for matrix in (a, b))  # the shortest documents of a batch have ended
        added = scale * torch.bmm(torch.bmm(x, a), b)
        return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added

    return add


def lora_targets(model: GPT, names: Sequence[str]) -> Iterator[tuple[nn.Module, int, int]]:
    """(module, how often a forward passes through it, width of its output) of what TTT_LORA names. Attention (o) and
    the MLP get theirs beside them, from their own input (public pull request 1530)."""
    if "head" in names:
        yield model.head, 1, len(model.head.weight)
    passes = [layer for layer, _ in (model.looped if model.looping else model.plain)]
    for layer, block in enumerate(model.blocks):
        parts = dict(q=block.attn.q, k=block.attn.k, v=block.attn.v, o=block.attn, mlp=block.mlp)
        for name, module in parts.items():
            if name in names:
                yield module, passes.count(layer), len(getattr(module, "weight", block.mlp_scale))


QUEUES = 8  # of documents that hear of each other: scores are the same for every number of ranks that divides it


class DocumentLoRA(Method):
    """LoRAs on a frozen model, one set per document: each document by itself, batches of them side by side and split
    over ranks, the longest first; or, with LoRAs carried on, one after another on every rank. B starts at zero, A the
    same for every sequence: a score depends on its document, not on its place in a batch.

    Where documents do learn from others before them, through an A kept warm or through phases in which the model itself
    learns, they wait in QUEUES fixed queues, each with its own A; a rank serves whole queues. A phase begins when all
    queues have scored their share, and learns from what they have scored since the last.

    The model runs as it is, not compiled: pieces come in EVAL_SEQ_LEN / TTT_LORA_CHUNK lengths and any number of rows,
    and a graph for each, with its backward, would take more of the evaluation clock than it gives back.
    """

    unit = "documents"

    def __init__(self, run: Run, model: GPT, graph: Callable):
        super().__init__(run, model, graph, run.hp.ttt_lora_chunk)
        hp, self.apart = run.hp, run.hp.ttt_lora_reset
        self.queues = 0  # no document hears of another
        if hp.ttt_warm_start_a or hp.phased_ttt_num_phases:
            self.queues = max(run.ranks.size, QUEUES // run.ranks.size * run.ranks.size)
            if self.queues != QUEUES:
                run.log(f"ttt:queues {self.queues} on {run.ranks.size} ranks: other scores than with {QUEUES}")
        windows = score_batch_windows(hp, run.ranks, hp.eval_seq_len, self.queues)
        self.rows = windows if self.apart else 1  # documents at once
        self.phase = None
        if hp.phased_ttt_num_phases:
            how = dict(ttt_params="all", phased_ttt_num_phases=0, ttt_optimizer="sgd", ttt_weight_decay=0.0)
            how |= dict(ttt_lr=hp.global_ttt_lr, ttt_momentum=hp.global_ttt_momentum)
            self.phase = StreamTTT(run._replace(hp=dataclasses.replace(hp, **how)), model, graph)
        model.requires_grad_(False)
        device, rank, generator = run.ranks.device, hp.ttt_lora_rank, torch.Generator().manual_seed(0)
        initial = torch.randn(rank, hp.model_dim, generator=generator) / math.sqrt(hp.model_dim)
        self.initial, self.pairs = initial.to(device), {}  # (A, B) of each pass through a module
        for module, passes, width in lora_targets(model, hp.ttt_lora.split(",")):
            shapes = ((self.rows, rank, hp.model_dim), (self.rows, width, rank))
            pairs = [[torch.zeros(s, device=device, requires_grad=True) for s in shapes] for _ in range(passes)]
            self.pairs[module] = pairs
        self.parameters = [p for pairs in self.pairs.values() for p in itertools.chain(*pairs)]  # A, B, A, B, …
        self.adapted_params = sum(p.numel() for p in self.parameters) // self.rows
        self.optimizer = ttt_optimizer(self.parameters, hp)
        self.reset()

    def warm_up(self, synthetic: Callable) -> None:
        """At most the phases' graph is compiled."""
        if self.phase is not None:
            self.model.requires_grad_(True)
            self.phase.warm_up(synthetic)
            self.model.requires_grad_(False)

    def reset(self) -> None:
        self.renew()
        self.kept, self.queue = {}, None  # each queue's A, where they go on; whose they are now

    @torch.no_grad()
    def renew(self) -> None:
        """Adapters as at first."""
        for a, b in itertools.chain(*self.pairs.values()):
            a.copy_(self.initial)
            b.zero_()
        self.optimizer.state.clear()

    @contextlib.contextmanager
    def attached(self):
        """The model with its LoRAs inside the block, the plain one after it: other batches are no documents. These need
        no mask, each in windows of its own; and pieces come in hundreds of shapes, each of which cuDNN's attention
        plans anew (120 to 145 ms forward and backward on an H200), so the flash kernel has it (1 to 5 ms a layer)."""
        with contextlib.ExitStack() as hooks:
            for module, pairs in self.pairs.items():
                hook = lora_hook(pairs, self.hp.ttt_lora_alpha / self.hp.ttt_lora_rank)
                hooks.callback(module.register_forward_hook(hook).remove)
            hooks.callback(setattr, self.model, "document_mask", self.model.document_mask)
            hooks.callback(torch.backends.cuda.enable_cudnn_sdp, True)
            self.model.document_mask = None
            torch.backends.cuda.enable_cudnn_sdp(False)
            yield

    def plan(self, tokens: np.ndarray) -> Plan:
        """Shares of about as many targets, in each the turns of all queues, and a phase behind each but the last."""
        hp, ranks, documents, rounds = self.hp, self.ranks, plan_documents(tokens), []
        mine = range(ranks.rank, self.queues or ranks.size, ranks.size) if self.apart else [0]
        last = None if self.apart else len(tokens) - 1
        if hp.ttt_order == "length" and self.apart:
            documents = longest_first(documents)
        lengths, shares, waiting = documents[:, 1] - documents[:, 0], hp.phased_ttt_num_phases + 1, [0] * self.queues
        share_of = (lengths.cumsum() - lengths) * shares // lengths.sum()
        for share in range(shares):
            part = documents[share_of == share]
            for turn in itertools.zip_longest(*self.deal(part, waiting), fillvalue=part[:0]):
                planned = ((q, plan_pieces(turn[q], hp.eval_seq_len, self.stride, last)) for q in mine)
                rounds.append([piece._replace(queue=q) for q, pieces in planned for piece in pieces])
            # A piece costs a backward through each window; here each token goes thrice as far, without an overlap.
            cost = 3 * hp.ttt_epochs * lengths[share_of == share].sum() / hp.eval_seq_len / ranks.size
            rounds.append([Segment(np.zeros((0, 3), dtype=np.int64), np.ones(1, dtype=bool), cost=cost)])
        self.heard = np.zeros(len(tokens) - 1, dtype=np.int32)  # one more than each target that was scored here
        return Plan(rounds[:-1], len(rounds) - 1, count=len(documents))

    def deal(self, documents: np.ndarray, waiting: list[int]) -> list[list[np.ndarray]]:
        """Each queue's batches of documents (D, 2), the longest first in each. The next document goes to the queue with
        the least `waiting`, in targets, and is added there; without queues, the next batch to the next rank."""
        count = len(waiting) or (self.ranks.size if self.apart else 1)
        queue_of = np.arange(len(documents)) // self.rows % count
        if waiting:
            for i, (start, end) in enumerate(documents.tolist()):
                queue_of[i] = waiting.index(min(waiting))
                waiting[queue_of[i]] += end - start
        queues = (documents[queue_of == q] for q in range(count))
        return [[longest_first(queue[i : i + self.rows]) for i in range(0, len(queue), self.rows)] for queue in queues]

    def batch_of(self, tokens: np.ndarray, windows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        length = int(windows[0, 1] - windows[0, 0]) + self.stride
        return gather(tokens, windows, len(windows), length, self.stride, self.ranks.device)

    @torch.no_grad()
    def distribution(self, tokens: np.ndarray, segment: Segment) -> np.ndarray:
        self.begin(segment)
        inputs, _, counted = self.batch_of(tokens, segment.windows)
        row = int(segment.windows[:, 2].argmax())
        with self.attached():
            logits = self.model.unembed(self.model.trunk(inputs, self.stride))[row][counted[row]][-1]
        return logits.double().log_softmax(-1).cpu().numpy()

    @torch.no_grad()
    def begin(self, segment: Segment) -> None:
        """New adapters for new documents; A kept warm are those that the queue's last batch has left."""
        if segment.fresh and self.apart:
            ours = self.parameters[::2]
            if self.hp.ttt_warm_start_a:
                self.kept[self.queue] = [a.clone() for a in ours]
            self.renew()
            if segment.queue in self.kept:
                torch._foreach_copy_(ours, self.kept[segment.queue])
            self.queue = segment.queue

    def score(self, tokens: np.ndarray, segment: Segment, bar: Any) -> np.ndarray:
        """Nats (m,) float32 of the piece's targets, document by document. Their graph serves the step that follows."""
        self.losses = None  # frees the graph of a piece that was not learned from
        if len(segment.windows) == 0:
            return np.zeros(0, dtype=np.float32)
        self.begin(segment)
        inputs, targets, counted = self.batch_of(tokens, segment.windows)
        with self.attached():
            nats = self.model(inputs, targets)
        self.losses = (nats * counted).sum(1) / counted.sum(1).clamp(min=1)
        bar.update(len(segment.windows))
        if self.phase is not None:
            places = targets_of(segment.windows)
            self.heard[places] = tokens[places + 1] + np.int32(1)
        return nats.detach()[counted].cpu().numpy()

    def learn(self, tokens: np.ndarray, segment: Segment) -> None:
        """One step of the documents that go on, each on its own loss; or a phase."""
        if len(segment.windows) == 0:
            return self.learn_together()
        (self.losses * torch.from_numpy(segment.useful).to(self.losses)).sum().backward()
        if self.hp.ttt_grad_clip:
            norms = torch.stack([p.grad.flatten(1).norm(dim=1) for p in self.parameters]).norm(dim=0)
            clip = (self.hp.ttt_grad_clip / (norms + 1e-6)).clamp(max=1.0)
            for parameter in self.parameters:
                parameter.grad.mul_(clip[:, None, None])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def learn_together(self) -> None:
        """SGD of the model itself, by all ranks, on the documents that were scored since the last phase, in the text's
        order. What is scored of a document ends with the next one's BOS, so they join to a text like any other."""
        heard = self.ranks.sum_(torch.from_numpy(self.heard.copy()).to(self.ranks.device)).cpu().numpy()
        text = np.append(BOS_ID, heard[heard > 0] - 1).astype(np.uint16)
        self.heard[:] = 0
        self.model.requires_grad_(True)
        chunks = math.ceil((len(text) - 1) / self.hp.ttt_chunk_tokens)
        ends = np.linspace(0, len(text) - 1, chunks + 1, dtype=int)
        for k, (start, end) in enumerate(itertools.pairwise(ends)):
            self.phase.adapt(text[start : end + 1], ttt_lr(self.phase.hp, k, chunks))
        self.phase.reset()
        self.model.requires_grad_(False)

    def collect(self, plan: Plan, nats: list[np.ndarray], targets: int) -> np.ndarray:
        whole = np.zeros(targets, dtype=np.float32)
        for segment, scored in zip(itertools.chain(*plan.rounds), nats, strict=True):
            if len(scored):
                whole[targets_of(segment.windows)] = scored
        return self.ranks.sum_(torch.from_numpy(whole).to(self.ranks.device)).cpu().numpy() if self.apart else whole


def plan_documents(tokens: np.ndarray) -> np.ndarray:
    """(D, 2) int64 of (start, end): a document reads tokens start…end-1, from its BOS on, and scores the target after
    each. tokens is (n+1,) and starts with BOS."""
    starts = np.flatnonzero(tokens[:-1] == BOS_ID)
    return np.column_stack([starts, np.append(starts[1:], len(tokens) - 1)])


def longest_first(documents: np.ndarray) -> np.ndarray:
    """Documents (D, 2); those of one length stay in their order."""
    return documents[np.argsort(documents[:, 0] - documents[:, 1], kind="stable")]


def plan_pieces(documents: np.ndarray, context: int, chunk: int, last: int | None = None) -> Iterator[Segment]:
    """Pieces of `chunk` targets of documents (D, 2), side by side: the first of all, the second of those that go on, …

    With the longest first, a document keeps its row. A piece reads up to `context` tokens of its own document; all its
    windows begin equally far into their documents, so that one shape serves them. It is useful up to the end of its
    document, or up to target `last`.
    """
    for piece in itertools.count():
        end = (piece + 1) * chunk
        going_on = documents[documents[:, 1] - documents[:, 0] > end - chunk]
        if len(going_on) == 0:
            return
        starts, ends = going_on.T
        pieces = [starts + max(0, end - context), starts + end - chunk, np.minimum(ends, starts + end)]
        useful = pieces[2] < (ends if last is None else last)
        yield Segment(np.column_stack(pieces), useful, fresh=piece == 0, cost=float(useful.sum()))


TEMPERATURES = tuple(math.exp(j * math.log(1.25) / 8) for j in range(-8, 9))  # 0.8 … 1.25


class Counts:
    """How often each key was added, exactly: sorted runs, merged when a run is no longer much shorter than the one
    before it, so that adding and looking up cost logarithms of what is there."""

    def __init__(self):
        self.runs: list[tuple[np.ndarray, np.ndarray]] = []  # (sorted distinct keys int64, counts int64)

    def add(self, keys: np.ndarray) -> None:
        self.runs.append(np.unique(keys, return_counts=True))
        while len(self.runs) > 1 and len(self.runs[-2][0]) < 2 * len(self.runs[-1][0]):
            keys, counts = (np.concatenate(parts) for parts in zip(*self.runs[-2:], strict=True))
            distinct, place = np.unique(keys, return_inverse=True)
            self.runs[-2:] = [(distinct, np.bincount(place, counts).astype(np.int64))]

    def __call__(self, keys: np.ndarray) -> np.ndarray:
        """int64 counts of keys, in their shape."""
        asked, back = np.unique(keys, return_inverse=True)  # in order: each search begins where the last one ended
        total = np.zeros(len(asked), dtype=np.int64)
        for known, counts in self.runs:
            place = np.minimum(np.searchsorted(known, asked), len(known) - 1)
            total += np.where(known[place] == asked, counts[place], 0)
        return total[back].reshape(keys.shape)


class Readout:
    """From the network's nats at several temperatures to the scored ones; it learns from scored text alone.

    TTT_TEMPERATURE takes the temperature with the least nats on all chunks before. HEDGE_ENABLED scores a mixture
    Σ w_i p_i of the network, the network at HEDGE_TEMPERATURE and unigram, bigram and trigram of the text before the
    chunk; w_i(t) ∝ exp(eta Σ_{s<t} log p_i(x_s)) (Freund and Schapire, 1997). A mixture of distributions is a
    distribution. Each n-gram is smoothed by the shorter one: p_n(x|c) = (count(c, x) + alpha p_{n-1}(x)) / (count(c) +
    alpha), p_0 = 1/V. Exact counts: no hashing.
    """

    def __init__(self, hp: Hyperparameters):
        self.hp = hp
        self.grid = TEMPERATURES if hp.ttt_temperature else (1.0,)
        self.temperatures = self.grid + ((hp.hedge_temperature,) if hp.hedge_enabled else ())
        self.reset()

    def reset(self) -> None:
        self.nats, self.chosen, self.log_weights = np.zeros(len(self.grid)), self.grid.index(1.0), np.zeros(5)
        self.followed, self.seen = Counts(), Counts()  # (context, target); context

    def keys(self, tokens: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
        """(keys (3, m) of the 0, 1 and 2 tokens before each target, targets (m,)), from target `first` on."""
        text, vocab = tokens[max(0, first - 1) :].astype(np.int64), self.hp.vocab_size
        if first == 0:
            text = np.concatenate([[0], text])  # nothing stands before the first token
        before, last, targets = text[:-2], text[1:-1], text[2:]
        return np.stack([np.zeros_like(last), 1 + last, 1 + vocab + last * vocab + before]), targets

    def ngrams(self, contexts: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """float64 p(target | context) (m, 3) under each of the three."""
        followed, seen = self.followed(contexts * self.hp.vocab_size + targets), self.seen(contexts)
        p, alpha = [1 / self.hp.vocab_size], self.hp.hedge_alpha
        for n in range(3):
            p.append((followed[n] + alpha * p[n]) / (seen[n] + alpha))
        return np.stack(p[1:], axis=-1)

    def add(self, contexts: np.ndarray, targets: np.ndarray) -> None:
        self.followed.add(contexts * self.hp.vocab_size + targets)
        self.seen.add(contexts)

    def experts(self, columns: np.ndarray, contexts: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """float64 log p (…, 5) of targets under each expert; columns (…, temperatures) are the network's nats."""
        network = -columns[..., [self.chosen, -1]].astype(np.float64)
        return np.concatenate([network, np.log(self.ngrams(contexts, targets))], axis=-1)

    def distribution(self, every: np.ndarray, columns: np.ndarray, tokens: np.ndarray, first: int) -> np.ndarray:
        """float64 log p (V,) at the last of the targets tokens[first+1:]; every (V, temperatures) are the network's
        nats of each token there, columns (m, temperatures) those of the targets."""
        if not self.hp.hedge_enabled:
            return -every[:, self.chosen]
        contexts, targets = self.keys(tokens, first)
        known = self.experts(columns[:-1], contexts[:, :-1], targets[:-1])
        log_weights = self.log_weights + self.hp.hedge_eta * known.sum(0)
        log_p = self.experts(every, np.repeat(contexts[:, -1:], len(every), axis=1), np.arange(len(every)))
        return log_sum_exp(log_weights + log_p) - log_sum_exp(log_weights)

    def __call__(self, columns: np.ndarray, tokens: np.ndarray, first: int) -> np.ndarray:
        """Nats (m,) float32 of the targets tokens[first+1:], then learn from them. columns is (m, temperatures)."""
        nats = columns[:, self.chosen]
        if self.hp.hedge_enabled:
            contexts, targets = self.keys(tokens, first)
            log_p = self.experts(columns, contexts, targets)
            evidence = self.log_weights + self.hp.hedge_eta * np.cumsum(log_p, axis=0)
            log_weights = np.concatenate([self.log_weights[None], evidence[:-1]])
            nats = (log_sum_exp(log_weights) - log_sum_exp(log_weights + log_p)).astype(np.float32)
            self.log_weights = evidence[-1] - log_sum_exp(evidence[-1])
            self.add(contexts, targets)
        self.nats += columns[:, : len(self.grid)].sum(0, dtype=np.float64)
        self.chosen = int(self.nats.argmin())
        return nats


def log_sum_exp(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    top = x.max(-1, keepdims=True)
    return (top + np.log(np.exp(x - top).sum(-1, keepdims=True)))[..., 0]


TTT_METHODS: dict[str, type[Method]] = dict(all=StreamTTT, scales=StreamTTT, lora=DocumentLoRA)  # by TTT_PARAMS


def check_ttt(hp: Hyperparameters, targets: int) -> None:
    """Raises a UserError, before any work, where test-time training could not learn from a text of so many targets."""
    if hp.ttt_enabled:
        TTT_METHODS[hp.ttt_params].check(hp, targets)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation: the passes over the artifact that was read back, and their clock
# ----------------------------------------------------------------------------------------------------------------------


class Evaluation:
    """An artifact's model and its passes by their labels of the log; the last one is the headline.

    Every pass starts from the artifact's own weights and goes through score_first. The clock runs from reading the
    artifact to the last score, compilation included, because the challenge's 600 s do.
    """

    def __init__(self, run: Run, tensors: Mapping[str, Stored]):
        hp = run.hp
        self.run, self.tensors = run, tensors
        self.started = time.perf_counter()
        self.blocks: dict[str, list[float]] = {}  # of each pass: sums of its scores, in the order of scoring
        self.saved: dict[str, np.ndarray] = {}  # SAVE_SCORES: arrays of each pass
        self.cut: dict[str, int] | None = None  # what EVAL_MAX_SECONDS took from the last pass
        self.label, self.bar = "", progress_bar(None, "", Log(None))
        self.expected = 0.0  # seconds that the scores of a pass will take, before any is measured
        with run.phases("load"):
            model = self.model = run.build(hp.eval_seq_len).to(run.ranks.device)
            graph, grid = compiled(model, run.compile.evaluation), main_grid(tensors)
            self.passes = {f"final_{grid}_roundtrip": Method(run, model, graph, hp.eval_seq_len)}
            if hp.eval_stride:
                self.passes[f"final_{grid}_sliding_window"] = Method(run, model, graph, hp.eval_stride)
            if hp.ttt_enabled:
                self.passes["legal_ttt"] = TTT_METHODS[hp.ttt_params](run, model, graph)
            self.reset()

    def reset(self) -> None:
        """The artifact's weights, and nothing learned."""
        self.model.load_state_dict({name: stored.dequantize() for name, stored in self.tensors.items()})
        for method in self.passes.values():
            method.reset()

    def warm_up(self) -> None:
        """Compile the graphs of scoring and of TTT on synthetic tokens, before any validation token is read."""
        hp, device, generator = self.run.hp, self.run.ranks.device, torch.Generator().manual_seed(0)
        for method in self.passes.values():
            method.warm_up(lambda *shape: torch.randint(hp.vocab_size, (2, *shape), generator=generator).to(device))

    def score_all(self) -> dict[str, Score]:
        """Every pass over the validation split, in the order of the log."""
        run, hp, log, val = self.run, self.run.hp, self.run.log, self.run.val
        if run.compile.evaluation:
            with run.phases("warmup_evaluation"):
                self.warm_up()
        scores: dict[str, Score] = {}
        start = self.started
        for label, method in self.passes.items():
            self.expected, start = time.perf_counter() - start, time.perf_counter()
            plan, stride = method.plan(val.tokens), method.stride
            if plan.updates:
                if hp.eval_max_seconds and run.ranks.largest(self.elapsed() + self.expected) > hp.eval_max_seconds:
                    self.cut = dict(chunks=plan.count, adapted=0, scored=0)
                    log(f"{label}:skipped it would end beyond EVAL_MAX_SECONDS={hp.eval_max_seconds:g}")
                    break
                log(f"ttt:start {method.unit}:{plan.count} adapted_params:{method.adapted_params}")
            mine = plan.windows[-1] // (1 if method.apart else run.ranks.size)
            self.label, self.bar = label, progress_bar(int(mine), label, log)
            nats = self.run_pass(method, val.tokens, plan)
            scores[label] = total(nats, val.bytes)
            self.keep(label, method, nats)
            self.bar.close()
            log_score(log, label, scores[label], start, f"stride:{stride} " if label.endswith("window") else "")
            log(f"{label}_exact val_loss:{scores[label].loss:.8f} val_bpb:{scores[label].bpb:.8f}")
        return scores

    def run_pass(self, method: Method, tokens: np.ndarray, plan: Plan) -> np.ndarray:
        """Nats (n,) float32 of all targets of a text, on every rank; the artifact's weights are back after it."""
        self.before = dict(self.run.phases.seconds)
        self.scored = [[]]  # windows of each segment, by rounds
        self.last = None  # the text's last target, over the vocabulary
        try:
            return method.collect(plan, self.score_first(method, tokens, plan), len(tokens) - 1)
        finally:
            if method.adapted_params:
                self.reset()

    def score_first(self, method: Method, tokens: np.ndarray, plan: Plan) -> list[np.ndarray]:
        """Legal test-time training: nats (m,) float32 of each of this rank's segments, scored before anything learns
        from it.

        Each segment is scored with nothing beyond its end in reach, its scores are kept for good, and only then is it
        learned from. Nothing is scored twice, and what ends a text is never learned from.
        """
        nats = []
        for k, segments in enumerate(plan.rounds):
            learning = self.on_time(plan, k)
            self.scored.append([])
            for segment in segments:
                visible = tokens[: segment.windows[:, 2].max(initial=-1) + 1]  # later text is out of reach
                nats.append(self.score(method, visible, segment))
                if learning and segment.useful.any():
                    self.learn(method, visible, segment)
        return nats

    def score(self, method: Method, tokens: np.ndarray, segment: Segment) -> np.ndarray:
        if self.run.hp.save_scores and segment.windows[:, 2].max(initial=0) == self.run.val.targets:
            self.last = method.distribution(tokens, segment)
        self.scored[-1].append(segment.windows)
        with self.run.phases("score"):
            return method.score(tokens, segment, self.bar)

    def keep(self, label: str, method: Method, nats: np.ndarray) -> None:
        """What an audit compares of a pass over the split: what it scored, in which order, over all ranks. On the main
        rank alone: the targets of the whole split, three times as int64, are a gigabyte."""
        ranks = self.run.ranks
        scored = ranks.gather(self.scored) if method.apart else [self.scored]
        lasts = ranks.gather(self.last) if self.run.hp.save_scores else []
        if not ranks.is_main:
            return
        turns = (turn for rounds in zip(*scored, strict=True) for turn in itertools.zip_longest(*rounds))
        order = targets_of(np.concatenate([windows for turn in turns for windows in turn if windows is not None]))
        sums = [float(part.sum(dtype=np.float64)) for part in np.array_split(nats[order], BLOCKS)]
        self.blocks[label] = [round(x, 6) if math.isfinite(x) else None for x in sums]
        if self.run.hp.save_scores:
            last = next(found for found in lasts if found is not None)
            self.saved |= {f"{label}.nats": nats, f"{label}.order": order, f"{label}.last": last}

    def learn(self, method: Method, tokens: np.ndarray, segment: Segment) -> None:
        with self.run.phases("adapt"):
            method.learn(tokens, segment)

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def on_time(self, plan: Plan, k: int) -> bool:
        """Whether round k is learned from: everything has to be scored before EVAL_MAX_SECONDS. Once not, never again.

        Asked before every round and on every rank, for which the slowest answers. After the first round it says what
        the whole evaluation will take.
        """
        log, limit, seconds = self.run.log, self.run.hp.eval_max_seconds, self.run.phases.seconds
        if k:
            score_s, adapt_s = (seconds.get(name, 0.0) - self.before.get(name, 0.0) for name in ("score", "adapt"))
            to_score = score_s * (plan.windows[-1] / max(1, plan.windows[k]) - 1)
            step_s = adapt_s / max(1, plan.steps[k])
        else:
            to_score = self.expected
            step_s = plan.guess * to_score * plan.windows[1] / max(1, plan.windows[-1])
        if k == 1:
            predicted = self.elapsed() + to_score + step_s * (plan.steps[-1] - plan.steps[k])
            log(f"{self.label}:predicted evaluation_seconds:{predicted:.0f} limit:{limit:g}")
            if not plan.updates and predicted > limit > 0:
                log(f"warning: the scores will not fit EVAL_MAX_SECONDS={limit:g}; raise EVAL_STRIDE")
        if limit and k < plan.updates and self.cut is None:
            needed, rounds = to_score + step_s * (plan.steps[k + 1] - plan.steps[k]), len(plan.rounds)
            if self.run.ranks.largest(self.elapsed() + needed) > (1 - EVAL_MARGIN) * limit:
                self.cut = dict(chunks=rounds, adapted=k, scored=rounds)
                cut = f"cut adapted_chunks:{k} of:{rounds - 1} to end before EVAL_MAX_SECONDS={limit:g}"
                log(f"{self.label}:{cut}; where it is cut depends on the machine, so this score does not repeat")
        return k < plan.updates and self.cut is None


# ----------------------------------------------------------------------------------------------------------------------
# Main: what to do, its outputs, the result
# ----------------------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """What to do, decided before any work: settings and, for EVAL_ONLY and EXPORT_ONLY, what they start from."""

    hp: Hyperparameters
    blob: bytes | None = None  # EVAL_ONLY: the artifact
    tensors: dict[str, Stored] | None = None  # in it or, for EXPORT_ONLY, in the saved weights
    tokenizer_sha256: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def trains(self) -> bool:
        return self.tensors is None


def read_job(environ: Mapping[str, str]) -> Job:
    """Settings from the environment; with EVAL_ONLY or EXPORT_ONLY over those of the file. Raises UserError, also where
    one contradicts the file's architecture; one that changes its evaluation is used and named in the log."""
    modes = {"EVAL_ONLY", "ARTIFACT_PATH", "EXPORT_ONLY", "WEIGHTS_PATH"}
    mode = Hyperparameters.from_env({name: text for name, text in environ.items() if name in modes})
    if not (mode.eval_only or mode.export_only):
        return Job(Hyperparameters.from_env(environ), notes=(*unused_names(environ),))
    path, kind = (mode.artifact_path, "artifact") if mode.eval_only else (mode.weights_path, "weights")
    blob, header, tensors = read_artifact_file(path, kind)
    hp = Hyperparameters.from_env(environ, header["architecture"] | header["evaluation"])
    for name, value in header["architecture"].items():
        if getattr(hp, name) != value:
            raise UserError(f"{name.upper()}={getattr(hp, name)} contradicts {path}, made with {value}; leave it out")
    notes = unused_names(environ) + [
        f"evaluation:changed {name.upper()}={getattr(hp, name)} file:{value}"
        for name, value in header["evaluation"].items()
        if getattr(hp, name) != value
    ]
    return Job(hp, blob if mode.eval_only else None, tensors, header["tokenizer_sha256"], tuple(notes))


class Checks(Log):
    """The lines of `--check`: on the console alone, its warnings counted."""

    def __init__(self, place: Place):
        super().__init__(None)
        self.is_main, self.warnings = place.rank == 0, 0

    def __call__(self, line: str, console: bool = True) -> None:
        self.warnings += line.startswith("warning: ")
        if console and self.is_main:
            with contextlib.suppress(OSError):  # a console that is gone
                print(f"check: {line}", flush=True)


def open_outputs(
    hp: Hyperparameters, run_id: str, ranks: Ranks, goes_on: bool, checks: Checks | None
) -> tuple[Log, Path]:
    """The log and the folder of results, made on the main rank. Raises UserError where they cannot be made.

    A log of a run that left no checkpoint to go on from is set aside: a log is of one run. With `checks` nothing is
    made, and that is the log.
    """
    path, folder = output_paths(hp, run_id)
    if not ranks.is_main:
        return checks or Log(None), folder
    try:
        free, needed = check_outputs(hp, path, folder, goes_on), bytes_to_write(hp)
        if free < needed:
            raise UserError(f"OUT_DIR={hp.out_dir} has {free:,} bytes free; this run may write {needed:,}")
        if checks is not None:
            checks(f"disk free:{free} may_write:{needed}")
            return checks, folder
        for parent in (path.parent, folder):
            parent.mkdir(parents=True, exist_ok=True)
        log = Log(path)
        if not log.fresh and not goes_on:
            aside = log.set_aside()
            log(f"log:set_aside {aside} left no checkpoint to go on from")
        return log, folder
    except OSError as error:
        raise UserError(f"cannot write to OUT_DIR={hp.out_dir}: {error.strerror} ({error.filename})") from None


def check_outputs(hp: Hyperparameters, path: Path, folder: Path, goes_on: bool) -> int:
    """Bytes free for this log and folder, neither of which is made. Raises UserError, OSError where a run must not or
    cannot write there."""
    if path.exists():
        with open_locked(path) as file:  # says so if that run is still alive
            file.seek(0)
            ended = file.read().rstrip().rpartition(b"\n")[2].startswith(b"result {")
        if not hp.resume:
            raise UserError(f"RUN_ID={path.stem} has a log already; choose another or move {path} away")
        if ended and not goes_on:  # its result.json is elsewhere
            raise UserError(f"RUN_ID={path.stem} has ended already: see the end of {path}; choose another RUN_ID")
    if (folder / "result.json").exists():
        raise UserError(f"RUN_ID={path.stem} has ended already: {folder / 'result.json'}; choose another RUN_ID")
    for wanted in (path.parent, folder):
        there = next(p for p in (wanted, *wanted.absolute().parents) if p.exists())
        try:
            tempfile.TemporaryFile(dir=there).close()  # a file without a name
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(wanted)) from None
    written = [p.stat().st_size for p in (path, *find_checkpoints(folder)) if p.exists()]  # by the run that goes on
    return shutil.disk_usage(there).free + sum(written)


def count_weights(hp: Hyperparameters) -> int:
    """Of the model, without making it."""
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(hp, 2, sdpa, torch.float32).parameters())


def device_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(hp: Hyperparameters, device: torch.device) -> None:
    """Raises UserError where there is no room for the weights and what training keeps of each: the kernel would kill
    the run, and no line say why."""
    count, memory = count_weights(hp), device_memory(device)
    needed = 4 * count * (1 if hp.eval_only or hp.export_only else 2 + hp.ema_enabled)  # weights, gradients, averages
    if needed > memory:
        sizes = f"{count:,} weights take {needed >> 30} GiB at least and {device.type} has {memory >> 30}"
        raise UserError(f"{sizes}; lower MODEL_DIM, NUM_LAYERS, MLP_MULT or BIGRAM_VOCAB_SIZE")


def bytes_to_write(hp: Hyperparameters) -> int:
    """At most: artifact, log, float weights, and three checkpoints while the third is being written."""
    weights = 4 * count_weights(hp)
    artifact = 0 if hp.eval_only else min(hp.artifact_cap_bytes, weights)
    averages = hp.ema_enabled + hp.swa_enabled
    checkpoints = 3 * (3 + averages) * weights * (hp.checkpoint_every > 0)
    return (1 << 20) + artifact + weights * hp.save_weights + checkpoints


def log_run(run: Run, attention: str, notes: Sequence[str]) -> None:
    """Where and what: the first lines of the log."""
    hp, log, val, stream = run.hp, run.log, run.val, run.stream
    log(f"code_sha256:{hashlib.sha256(run.source).hexdigest()} settings_hash:{hp.settings_hash()}")
    python = sys.version.split()[0]
    log(f"torch:{torch.__version__} cuda:{torch.version.cuda} python:{python} device:{device_name(run.ranks.device)}")
    policy, spin = (os.environ.get(name, "unset") for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"))
    log(f"threads:{torch.get_num_threads()} omp_wait_policy:{policy} spin:{spin}")
    log(f"dtype:{str(run.dtype).removeprefix('torch.')} compile:{int(any(run.compile))} attention:{attention}")
    for name, value in hp.changed().items():
        log(f"setting:{name}={int(value) if isinstance(value, bool) else value}")
    for note in notes:
        log(note)
    if log.fresh:  # in the file alone; both are the same when a run goes on
        log(f"settings {json.dumps(dataclasses.asdict(hp))}", console=False)
        log(f"===== source begin bytes:{len(run.source)} =====", console=False)
        log(run.source.decode(), console=False)
        log("===== source end =====", console=False)
    log(f"seed:{hp.seed}")
    log(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={val.tokenizer_path}")
    if val.transform:
        log(f"val_bpb:transform:{val.transform} (bytes are of the text before it)")
    if stream is not None:
        log(f"train_loader:dataset:{Path(hp.data_path).name} train_shards:{len(stream.paths)}")
        of_text = f" bytes:{round(len(stream) * val.density)}" if val.density else ""
        log(f"train_loader:fingerprint:{stream.fingerprint} tokens:{len(stream)}{of_text}")
    log(f"val_loader:shards pattern={Path(hp.data_path) / 'fineweb_val_*.bin'} tokens:{val.targets}")
    log(f"val_loader:fingerprint:{val.fingerprint} bytes:{int(val.bytes.sum())}")


def write_result(run: Run, path: Path, data: bytes) -> Path:
    """Where it is: under its name or, where that fails, in the next folder that takes it. Raises UserError."""
    try:
        write_atomic(path, [data])
        return path
    except OSError as error:
        if not (kept := run.log.rescue(path.name, data)):
            raise UserError(f"cannot write {path}: {error.strerror}, nor anywhere else; {run.signals.advice}") from None
        run.log(f"warning: cannot write {path}: {error.strerror}; it is {kept}")
        return kept


def check_alike(every: Sequence[Mapping[str, Any]]) -> None:
    """Whether all ranks, by what each has, are to make the same run, wherever a host keeps it. Raises UserError."""
    for rank, theirs in enumerate(every):
        differing = [name for name, fact in every[0].items() if theirs[name] != fact]
        if names := ", ".join(name for name in differing if not name.endswith(("_path", "_dir"))):
            raise UserError(f"ranks 0 and {rank} differ in {names.upper()}; start the same run on every host")


def prepare(job: Job, ranks: Ranks, signals: Signals, checks: Checks | None = None) -> Run:
    """All that can go wrong before any work goes wrong here, on all ranks alike. With `checks` nothing is written.
    Raises UserError."""
    hp, device, source = job.hp, ranks.device, Path(__file__).read_bytes()
    dtype = activation_dtype(hp.dtype, device)
    must_compile = hp.compile == "1" or (hp.compile == "auto" and device.type == "cuda")

    def check() -> tuple[str, Callable, Validation, TokenStream | None, Checkpoint | None]:
        """What each rank does by itself: none may wait for another in here."""
        check_compiler(must_compile, device)
        attention, attend = choose_attention(hp, device, dtype)
        val = load_validation(hp)
        if job.tokenizer_sha256 not in (None, val.tokenizer_sha256):
            made = "the tokenizer that the file was made with"
            raise UserError(f"{val.tokenizer_path} is not {made}; set TOKENIZER_PATH")
        check_ttt(hp, val.targets)
        reads = job.trains or (hp.export_only and hp.calibrates)
        stream = TokenStream(find_shards(hp, "train"), hp.vocab_size) if reads else None
        check_memory(hp, device)
        return attention, attend, val, stream, find_resumed(hp, source) if ranks.is_main else None

    attention, attend, val, stream, checkpoint = ranks.agree(check)
    script, artifact = (hashlib.sha256(data or b"").hexdigest() for data in (source, job.blob))
    facts = dataclasses.asdict(hp) | dict(script=script, artifact=artifact, dtype=str(dtype))
    facts |= dict(validation=val.fingerprint, tokenizer=val.tokenizer_sha256, text=stream and stream.fingerprint)
    every = ranks.gather(facts)
    ranks.agree(lambda: check_alike(every))
    compile, notes = choose_compiled(hp, device, val.targets, ranks.size), list(job.notes)
    shared = ranks.broadcast_object(checkpoint and checkpoint._replace(tensors={}))
    if checkpoint := checkpoint or shared:
        ranks.agree(lambda: check_resumed(checkpoint, stream, val, dtype))
        signals.resume_from(checkpoint.path)
        compile = compile._replace(training=checkpoint.meta["compile"])
    if not job.trains:
        compile = compile._replace(training=False)
    if any(compile) and not must_compile:
        try:
            ranks.agree(lambda: check_compiler(True, device))
        except UserError as error:
            if checkpoint and compile.training:
                error.args = (f"{checkpoint.path} was trained compiled: {error}",)
                raise
            compile = Compiled(*[False] * 4)
            notes.append(f"warning: runs uncompiled, slower: {error}")
    if hp.compile == "auto" and any(compile):
        notes.append("compile:auto " + " ".join(f"{name}:{int(on)}" for name, on in compile._asdict().items()))
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-seed{hp.seed}-{os.urandom(2).hex()}"
    run_id = ranks.broadcast_object(hp.run_id or (checkpoint.meta["run_id"] if checkpoint else stamp))
    log, folder = ranks.agree(lambda: open_outputs(hp, run_id, ranks, checkpoint is not None, checks))
    phases, signals.log = Phases(device), log
    run = Run(hp, ranks, log, phases, dtype, attend, compile, val, stream, folder, source, signals, checkpoint)
    log_run(run, attention, notes)
    return run


TRIED_SECONDS = 0.1  # of what --check tries, by its multiplications alone; a CPU takes ten times as long in fact


def check_job(run: Run, job: Job) -> int:
    """`--check`: what the run would be, by formulas and, where seconds do for it, by a step and a slice of the
    evaluation. Returns the exit code."""
    hp, log, ranks, device = run.hp, run.log, run.ranks, run.ranks.device
    quiet = run._replace(log=Log(None), phases=Phases(device))
    ones = torch.ones(1024, 1024, device=device, dtype=run.dtype)
    flops = 4 * 2 * 1024**3 / min(seconds_of(run, lambda: [ones @ ones for _ in range(4)]) for _ in range(3))
    if device.type == "cuda" and hp.compile == "0":
        log("warning: COMPILE=0 trains and scores uncompiled")
    if ranks.is_main:
        check_size(quiet, job, log)
    if job.trains:
        tokens, needed, memory = hp.iterations * hp.train_batch_tokens, predict_memory(run), device_memory(device)
        log(f"data tokens_to_train:{tokens} of:{len(run.stream)} reads:{tokens / len(run.stream):.2f}")
        log(f"memory predicted:{needed >> 20} MiB of:{memory >> 20} MiB weights:{count_weights(hp)}")
        if needed > memory:
            log("warning: a step is predicted not to fit in memory; lower MICRO_BATCH_TOKENS")
        check_training(quiet, flops, log)
    check_evaluation(quiet, job.tensors, flops, log)
    log(f"{log.warnings} warning{'s' * (log.warnings > 1)}" if log.warnings else "ok")
    return 0


def seconds_of(run: Run, work: Callable) -> float:
    """That the slowest rank takes."""
    phases = Phases(run.ranks.device)
    with phases("work"):
        work()
    return run.ranks.largest(phases.seconds["work"])


def predict_memory(run: Run) -> int:
    """Bytes of each rank at the peak of an uncompiled step; a compiled one takes less.

    Of each weight 4 (itself), 4 (gradient) and 4 for each average; of a matrix 4 over the ranks (momentum) and twice
    the activations' size (banks of gradients and updates); of any other weight 8 (AdamW) and 4 (flat gradient). Then
    what autograd keeps of one micro-batch, counted on tensors without storage, and a quarter for what is not kept.
    """
    hp, kept = run.hp, {}
    fused = run.attend not in (matmul_attention, short_attention)  # such a kernel keeps q, k, v and its output
    attend = (lambda q, k, v, _: q * q + (k * k).sum() + (v * v).sum()) if fused else run.attend
    with torch.device("meta"):
        model = GPT(hp, hp.train_seq_len, attend, run.dtype)
        tokens = torch.zeros(hp.micro_batch(run.ranks.size) // hp.train_seq_len, hp.train_seq_len, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage()._cdata, t), id):
        model(tokens, tokens)
    matrices = sum(p.numel() for name, p in model.named_parameters() if row_of(name).optimizer == "matrix")
    others = count_weights(hp) - matrices
    fixed = 4 * (matrices + others) * (2 + hp.ema_enabled + hp.swa_enabled) + 12 * others
    fixed += matrices * 4 // run.ranks.size + matrices * 2 * run.dtype.itemsize
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    return fixed + 5 * sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own) // 4


def check_size(run: Run, job: Job, log: Log) -> None:
    """Bytes of code and artifact. The artifact is predicted as FIT_TO_CAP predicts it, by the entropy of its codes,
    of Gaussian weights (EXPORT_ONLY: of those that there are), QUANT=rd as sdclip, and no compressor's own ways."""
    hp, code, label = run.hp, len(run.source), "artifact_predicted"
    room, size = hp.artifact_cap_bytes - code, 0
    if job.blob is not None:
        label, size = "artifact", len(job.blob)
    else:
        if job.tensors:
            weights = {name: stored.dequantize() for name, stored in job.tensors.items()}
        else:
            generator, shaped = torch.Generator().manual_seed(0), run.build(2).named_parameters()
            weights = {name: torch.randn(p.shape, generator=generator) for name, p in shaped}
        simple = dataclasses.replace(hp, gptq_enabled=False, gptq_head_enabled=False, quant=uncalibrated(hp))
        exporter = Exporter(run._replace(hp=simple), weights, Calibration())
        size = round(exporter.predict(exporter.solve(room) if hp.fit_to_cap else 1.0))
    log(f"bytes code:{code} {label}:{size} cap:{hp.artifact_cap_bytes} left:{room - size}")
    if size > room:
        log(f"warning: code and {label} are {size - room} bytes over {hp.named.artifact_cap_bytes}")
    if (packed := len(lzma.compress(run.source)) * 5 // 4) < 0.9 * code:
        log(f"warning: the script counts {code} bytes, below {packed} packed: python records/submit.py pack")


def check_training(run: Run, flops: float, log: Log) -> None:
    """A step's time from synthetic tokens, before and after all that comes on while a run trains, and the steps that
    the clock holds. A CPU gets a smaller micro-batch, which makes a step seem longer."""
    hp, length, cuda = run.hp, run.hp.train_seq_len, run.ranks.device.type == "cuda"
    rows, row_s = hp.train_batch_tokens // run.ranks.size // length, 6 * count_weights(hp) * length / flops
    if row_s > 4 * TRIED_SECONDS:
        return log(f"training not measured: a step takes more than {rows * row_s:.0f} s here")
    most = min(hp.micro_batch(run.ranks.size) // length, 1 << 30 if cuda else int(TRIED_SECONDS / row_s))
    micro = max(n for n in range(1, max(1, most) + 1) if rows % n == 0)
    trainer = Trainer(run._replace(hp=dataclasses.replace(hp, warmup_steps=1, micro_batch_tokens=micro * length)))
    trainer.warm_up()
    tokens, clock, ms = torch.randint(hp.vocab_size, (micro, length)).to(run.ranks.device), trainer.clock, []
    works = [
        (rows // micro, lambda: accumulate_gradients(trainer.forward, tokens, tokens, micro, hp.train_batch_tokens)),
        (1, lambda: trainer.optimizers.step(1.0, hp.muon_momentum)),
        (1, lambda: trainer.averages.update(1, 1.0)),
    ]
    variants = [*itertools.product(*(switch.states for switch in trainer.switches))]
    for variant in dict.fromkeys((variants[0], variants[-1])):
        trainer.set_switches(variant)
        works[0][1]()  # one that is not timed
        ms.append(1000 * sum(times * seconds_of(run, work) for times, work in works))
    left_ms = 1000 * hp.max_wallclock_seconds - clock.reserve_ms if hp.max_wallclock_seconds else math.inf
    steps = [math.floor(min(hp.iterations, max(1, left_ms / m - 2))) for m in ms]  # as out_of_time leaves
    step_ms, steps = (" then ".join(map(str, figures)) for figures in ([round(m, 1) for m in ms], steps))
    log(f"training step_ms:{step_ms} steps:{steps} of:{hp.iterations} limit:{hp.max_wallclock_seconds:g}")
    clock.durations.extend(5 * ms[:1])
    warn_of_warmdown(hp, clock, log)


def check_evaluation(run: Run, tensors: Mapping[str, Stored] | None, flops: float, log: Log) -> None:
    """Seconds of the evaluation from those of a slice of the split, with a file's weights or new ones."""
    hp, val, context, limit = run.hp, run.val, run.hp.eval_seq_len, run.hp.eval_max_seconds
    lora, sliding = hp.ttt_params == "lora", context / (hp.eval_stride or context)
    epochs = 3 * hp.ttt_epochs  # of SGD, in forwards of each target
    adapting = 3 * context / hp.ttt_lora_chunk + epochs * (hp.phased_ttt_num_phases > 0) if lora else sliding + epochs
    forwards = 1 + sliding + adapting * hp.ttt_enabled
    target_s = 2 * count_weights(hp) * forwards / flops / run.ranks.size
    if 2 * context * target_s > 10 * TRIED_SECONDS:
        return log(f"evaluation not measured: it takes more than {val.targets * target_s:.0f} s here")
    n = min(val.targets, max(2 * context, int(TRIED_SECONDS / target_s)))
    chunk = 0 if lora else min(hp.ttt_chunk_tokens, n // 2)
    batch = max(1, n // 4 // (hp.eval_stride or context)) * context * run.ranks.size  # more would be padding
    less = dict(val_batch_size=min(batch, hp.val_batch_size), ttt_chunk_tokens=chunk or hp.ttt_chunk_tokens)
    less = dataclasses.replace(hp, **less, ttt_max_chunks=0, eval_max_seconds=0.0)
    run = run._replace(hp=less, val=val._replace(tokens=val.tokens[: n + 1], bytes=val.bytes[:n]))
    if tensors is None:
        init_weights(model := run.build(context), hp)
        tensors = {name: Stored("fp32", p.detach(), None) for name, p in model.named_parameters()}
    evaluation = Evaluation(run, tensors)
    evaluation.warm_up()
    ready = evaluation.elapsed() if run.compile.evaluation else 0.0
    evaluation.score_all()
    score, adapt = (run.phases.seconds.get(name, 0.0) for name in ("score", "adapt"))
    learned = min(val.targets, hp.ttt_max_chunks * hp.ttt_chunk_tokens or val.targets)
    seconds = run.ranks.largest(ready + score * val.targets / n + adapt * learned / (n - chunk))
    log(f"evaluation seconds:{seconds:.1f} limit:{limit:g} from_targets:{n} of:{val.targets}")
    if seconds > limit > 0:
        log(f"warning: the evaluation may pass EVAL_MAX_SECONDS={limit:g}; raise EVAL_STRIDE, or TTT is cut")


def check_resumed(checkpoint: Checkpoint, stream: TokenStream, val: Validation, dtype: torch.dtype) -> None:
    """Whether the run goes on with the data and arithmetic it began with. Raises UserError."""
    meta, data = checkpoint.meta, [stream.fingerprint, val.fingerprint, val.tokenizer_sha256]
    names = ("training shards", "validation shards", "tokenizer")
    for name, here, there in zip(names, data, meta["data"], strict=True):
        if here != there:
            fingerprints = f"fingerprint {there[:16]}, here {here[:16]}"
            raise UserError(f"{checkpoint.path} was made with other {name} ({fingerprints})")
    if meta["dtype"] != str(dtype):
        raise UserError(f"{checkpoint.path} was made with {meta['dtype']}, here it would be {dtype}; set DTYPE")


def run_job(run: Run, job: Job) -> int:
    """Train or take up what is there, export, read back, score. Returns the exit code."""
    hp, log, trainer, mode = run.hp, run.log, None, "train"
    facts: dict[str, Any] = dict(steps=None, train_tokens=None, exported=None)  # of the result
    if hp.eval_only:
        mode, path, blob = "eval_only", Path(hp.artifact_path), job.blob
        run.signals.advice = scored_again(path)
    elif hp.export_only:
        mode = "export_only"
        log(f"export_only: weights from {hp.weights_path}; this is no timed run")
        path, blob = export(run, {name: stored.dequantize() for name, stored in job.tensors.items()})
    else:
        trainer = Trainer(run)
        trainer.warm_up()
        if run.checkpoint is not None:
            trainer.restore(run.checkpoint)
        trainer.train()
        with run.phases("average"):
            source, weights = trainer.exported_weights()
        log(f"export_weights:{source} swa_samples:{trainer.averages.swa_samples}")
        seen = trainer.step * hp.train_batch_tokens
        facts |= dict(steps=trainer.step, train_tokens=seen, exported=source, resumed_at=trainer.resumed_at)
        facts |= dict(train_passes=seen / len(run.stream), train_bytes=round(seen * run.val.density) or None)
        if hp.save_weights and run.ranks.is_main:
            save_weights(run, weights)
        path, blob = export(run, weights)  # before any diagnostic: a run that dies later has its artifact
    tensors = job.tensors if hp.eval_only else unpack_artifact(blob)[1]
    label = f"{main_grid(tensors)}+{COMPRESSORS[blob[6]]}"
    log(f"Serialized model {label}: {len(blob)} bytes")
    log(f"Code size: {len(run.source)} bytes")
    log(f"Total submission size {label}: {len(blob) + len(run.source)} bytes")
    scores = {f"float_{name}": s for name, s in trainer.diagnose().items()} if trainer is not None else {}
    trainer = None  # frees its memory before the evaluation
    evaluation = Evaluation(run, tensors)
    evaluated = evaluation.score_all()
    facts |= dict(mode=mode, eval_seconds=run.ranks.largest(evaluation.elapsed()), eval_cut=evaluation.cut)
    facts["blocks"] = evaluation.blocks
    if hp.save_scores and run.ranks.is_main:
        np.savez(data := io.BytesIO(), bytes=run.val.bytes, **evaluation.saved)
        write_result(run, run.folder / "scores.npz", data.getvalue())
    return report_result(run, facts, scores | evaluated, path, blob)


def report_result(run: Run, facts: Mapping, scores: Mapping[str, Score], path: Path, blob: bytes) -> int:
    """The `result` line and file, and the exit code: 3 where a limit is broken."""
    hp, log, val, seconds = run.hp, run.log, run.val, run.phases.seconds
    for name, spent in seconds.items():
        log(f"phase:{name} seconds:{spent:.2f}")
    headline, stream, code, size = list(scores)[-1], run.stream, len(run.source), len(blob)
    code_sha256, artifact_sha256 = (hashlib.sha256(data).hexdigest() for data in (run.source, blob))
    result = dict(run_id=run.folder.name, **facts, seed=hp.seed, settings_hash=hp.settings_hash())
    result |= dict(code_sha256=code_sha256, artifact_sha256=artifact_sha256)
    result |= dict(train_fingerprint=stream.fingerprint if stream is not None else None)
    result |= dict(val_fingerprint=val.fingerprint, tokenizer_sha256=val.tokenizer_sha256, transform=val.transform)
    result |= dict(world_size=run.ranks.size, device=device_name(run.ranks.device), torch=torch.__version__)
    result |= dict(dtype=str(run.dtype).removeprefix("torch."), phase_seconds=seconds)
    result |= dict(train_seconds=sum(seconds.get(phase, 0.0) for phase in TRAINING_PHASES))
    result |= dict(peak_memory_mib=peak_memory_mib(run.ranks.device)[0])
    result |= dict(bytes_code=code, bytes_artifact=size, bytes_total=code + size, bytes_cap=hp.artifact_cap_bytes)
    result |= dict(scores={k: s.as_json() | dict(tokens=s.tokens, bytes=s.bytes) for k, s in scores.items()})
    result |= dict(headline=dict(label=headline) | scores[headline].as_json())
    broken, line = list(limits_broken(hp, result)), json.dumps(result)
    if run.ranks.is_main:
        file = write_result(run, run.folder / "result.json", (line + "\n").encode())
        remove([*find_checkpoints(run.folder), *run.folder.glob("*.partial")], log)
        log(f"files: log {log.path} artifact {path} result {file}")
    for message in broken:
        log(f"limit: {message}")
    log(f"result {line}")
    return 3 if broken else 0


def limits_broken(hp: Hyperparameters, result: Mapping) -> Iterator[str]:
    """What makes the exit code 3, in words."""
    size, train, evaluation = (result[name] for name in ("bytes_total", "train_seconds", "eval_seconds"))
    if size > hp.artifact_cap_bytes:
        yield f"code and artifact are {size} bytes, {size - hp.artifact_cap_bytes} over {hp.named.artifact_cap_bytes}"
    if train > hp.max_wallclock_seconds > 0:
        yield f"training and averaging took {train:.1f} s, more than {hp.named.max_wallclock_seconds}"
    if evaluation > hp.eval_max_seconds > 0:
        yield f"the evaluation took {evaluation:.1f} s, more than {hp.named.eval_max_seconds}"
    if result["headline"]["val_loss"] is None:
        yield "the headline is not finite; lower TTT_LR if the scores before it are"


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Exit code of a run with this environment."""
    ranks = None
    with Signals() as signals:
        try:
            only_checks = list(argv) == ["--check"]
            if argv and not only_checks:
                return show(argv)
            place = Place.from_env(environ)
            signals.is_main = place.rank == 0
            job = read_job(environ)
            if job.trains:
                job.hp.micro_batch(place.size)
            load_compressor(job.hp.compressor)
            with signals.waiting():
                ranks = Ranks(job.hp, environ)
            run = prepare(job, ranks, signals, Checks(place) if only_checks else None)
            code = check_job(run, job) if only_checks else run_job(run, job)
            ranks.close()
            return code
        except BaseException as error:
            signals.deferred = signals.ending = True  # one reason is enough: what comes now is ignored
            if (ended := ending(error, ranks, environ, signals.advice)) is None:
                raise
            code, line, own = ended
            signals.say(line, own)
            return code
        finally:
            signals.log.close()


def ending(
    error: BaseException, ranks: Ranks | None, environ: Mapping[str, str], advice: str
) -> tuple[int, str, bool] | None:
    """How this ends a run: the exit code, its one line, and whether that is this rank's own, or the main one says it
    for all. None: a fault of the script, which is shown as it is."""
    if isinstance(error, Interrupted):
        return error.code, f"interrupted: {error}; {advice}", False
    if isinstance(error, LimitError):
        return 3, f"limit: {error}", False
    if isinstance(error, UserError):
        # Before the ranks met, all of them read the same environment; after that, an error may be one rank's own.
        return 2, f"error: {error}", ranks is not None and not error.agreed
    if not isinstance(error, RuntimeError | MemoryError) or (ranks is None and not is_of_ranks(error)):
        return None
    if ranks is None:
        where = f"MASTER_ADDR={environ.get('MASTER_ADDR')} MASTER_PORT={environ.get('MASTER_PORT')}"
        rank, reason = int(environ.get("RANK", 0)), str(error).splitlines()[0]
        hint = "; on several hosts set GLOO_SOCKET_IFNAME to the device that joins them" * ("connectFullMesh" in reason)
        return 2, f"error: rank {rank} did not meet the others at {where}: {reason}{hint}", True
    if isinstance(cause := getattr(error, "inner_exception", None), OSError):  # of torch.compile
        return 2, f"error: torch.compile fails: {cause}; {advice}", True
    on_gpu = isinstance(error, torch.OutOfMemoryError)  # torch has no such class for the CPU
    if on_gpu or isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        names = "MICRO_BATCH_TOKENS (training), VAL_BATCH_SIZE (scoring) or TTT_BATCH_SEQS (a part of the method)"
        return 2, f"error: out of {'GPU ' * on_gpu}memory; lower {names}; {advice}", True
    if ranks.lost_peer(error):
        return 1, f"error: rank {ranks.rank} lost another rank, see its error; {advice}", True
    return None


def show(argv: Sequence[str]) -> int:
    """Print a table instead of a run. Raises UserError."""
    if argv[0] == "--inspect":
        raise UserError("--inspect has moved: python records/submit.py inspect ARTIFACT [--png]")
    if list(argv) != ["--settings"]:
        raise UserError(f"unknown argument {argv[0]}; settings are environment variables: `--settings`, `--check`")
    with contextlib.suppress(BrokenPipeError):  # `| head`: who reads has enough
        print(settings_table(), flush=True)
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:], os.environ)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # gone: flushed once more on the way out, it would change the exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if dist.is_initialized():  # after a failure: peers may wait in the group, and torn down alone it can abort or hang
        os._exit(code)
    sys.exit(code)
