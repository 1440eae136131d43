"""Small builders that several test files share."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train_gpt as pg

TINY = dict(
    device="cpu",
    dtype="fp32",
    compile="0",
    attention="sdpa",
    vocab_size=48,
    num_layers=3,
    model_dim=24,
    num_heads=4,
    num_kv_heads=2,
    mlp_mult=2.0,
    rope_dims=4,
    xsa_last_n=1,
    bigram_vocab_size=37,
    bigram_dim=8,
    ve_dim=8,
    ve_layers="1,2",
    train_seq_len=16,
    train_batch_tokens=64,
    iterations=8,
    max_wallclock_seconds=0.0,
    warmdown_iters=4,
    warmup_steps=0,
    eval_seq_len=16,
    swa_enabled=True,
    eval_stride=4,
    val_batch_size=64,
    ttt_chunk_tokens=24,
    ttt_epochs=2,
    ttt_batch_seqs=2,
    ttt_lr=0.05,
)


def tiny_hp(**changes: Any) -> pg.Hyperparameters:
    """Settings of a model of three narrow layers with every technique on."""
    return pg.Hyperparameters(**{**TINY, **changes})


def single_rank(hp: pg.Hyperparameters | None = None) -> pg.Ranks:
    """One process without torchrun."""
    return pg.Ranks(hp or tiny_hp(), {})


def randomize(model: torch.nn.Module, seed: int = 0, std: float = 0.3) -> torch.nn.Module:
    """Give every parameter ordinary random values: a fresh model has zero outputs, which hides most mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            spread = std if p.dim() < 2 or "resid_mix" in name else 1 / math.sqrt(p.size(-1))
            centre = 1.0 if name.endswith(("scale", "q_gain", "resid_mix", "skip_weights")) else 0.0
            p.copy_(centre + spread * torch.randn(p.shape, generator=generator))
    return model


def build_model(
    hp: pg.Hyperparameters | None = None,
    context: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int | None = 0,
) -> pg.GPT:
    """A GPT with random weights for TRAIN_SEQ_LEN or `context`; seed None: as init_weights leaves it."""
    hp = hp or tiny_hp()
    model = pg.GPT(hp, context or hp.train_seq_len, pg.sdpa, dtype)
    if seed is None:
        pg.init_weights(model, hp)
        return model
    return randomize(model, seed)


def random_tokens(n: int, vocab_size: int = 48, seed: int = 0, document: int = 11) -> np.ndarray:
    """(n,) uint16 that start with BOS and have one about every `document` tokens; no other control token."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, vocab_size, n).astype(np.uint16)
    tokens[rng.random(n) < 1 / document] = pg.BOS_ID
    tokens[0] = pg.BOS_ID
    return tokens


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Lines(list):
    """A log that only remembers."""

    path = None

    def __call__(self, line: str, console: bool = True) -> None:
        self.append(line)


def make_run(hp: pg.Hyperparameters, stream: Any = None, tokens: np.ndarray | None = None) -> pg.Run:
    """A run of one process without files; tokens (n+1,) is its validation text, one byte a target."""
    ranks, tokens = single_rank(hp), random_tokens(300, seed=2) if tokens is None else tokens
    return pg.Run(
        hp=hp,
        ranks=ranks,
        log=Lines(),
        phases=pg.Phases(ranks.device),
        dtype=pg.activation_dtype(hp.dtype, ranks.device),
        attend=pg.sdpa,
        compile=pg.Compiled(*[hp.compile == "1"] * 4),
        val=pg.Validation(tokens, np.ones(len(tokens) - 1, np.int64), "", Path(), "0" * 64),
        stream=stream,
        folder=Path(),
        source=b"",
        signals=pg.Signals(),
        checkpoint=None,
    )


def scores_of(evaluation: pg.Evaluation, label: str = "legal_ttt") -> np.ndarray:
    """Nats (n,) of one pass over the evaluation's text."""
    method, tokens = evaluation.passes[label], evaluation.run.val.tokens
    return evaluation.run_pass(method, tokens, method.plan(tokens))


def quantize(weights: dict[str, torch.Tensor], hp: pg.Hyperparameters) -> dict[str, pg.Stored]:
    """As a run with these settings stores them, but without calibration."""
    return pg.quantize(weights, hp, pg.make_grids(weights, hp, pg.choose_steps(weights, hp, pg.Calibration())))
