#!/usr/bin/env python3
"""What a training step of recipes keeps for its backward: as it is, and if each block were computed anew there.

    python tests/memory.py                                  pr714, frontier and gpu1
    python tests/memory.py records/recipes/cpu_mini.env     any recipe

By predict_memory of train_gpt.py, on tensors without storage: nothing is run, and any machine gives the same figures.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

import torch  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import train_gpt as pg  # noqa: E402
from records.experiments.plan import read_recipe  # noqa: E402

RECIPES = {"pr714": 8, "frontier": 8, "gpu1": 1}  # GPUs that each is for


@contextlib.contextmanager
def recomputing(spared: int | None = None) -> Iterator[None]:
    """Inside, attention and MLP of every block keep their inputs alone, and are computed again in the backward.

    spared: the layer of a block that keeps all of it.
    """

    def again(method: Callable) -> Callable:
        @functools.wraps(method)
        def called(block: pg.Block, x: torch.Tensor, *streams: pg.Stream):
            if block.layer == spared:
                return method(block, x, *streams)
            names = [f.name for f in dataclasses.fields(pg.Stream)]
            parts = [getattr(stream, name) for stream in streams for name in names]  # so that they count as kept

            def work(x: torch.Tensor, *parts: torch.Tensor | None):
                return method(block, x, *([pg.Stream(*parts)] if parts else []))

            return checkpoint(work, x, *parts, use_reentrant=False, preserve_rng_state=False)

        return called

    def numbered(init: Callable) -> Callable:
        def made(block: pg.Block, hp: pg.Hyperparameters, layer: int, *more) -> None:
            init(block, hp, layer, *more)
            block.layer = layer

        return made

    with contextlib.ExitStack() as patches:
        for name, wrap in (("attend", again), ("feed", again), ("__init__", numbered)):
            patches.enter_context(mock.patch.object(pg.Block, name, wrap(getattr(pg.Block, name))))
        yield


class Kept(NamedTuple):
    """Bytes."""

    as_it_is: float  # activations of one micro-batch
    recomputed: float  # inputs of each half block, and the inside of the largest block
    peak: float  # of an uncompiled step, with weights, gradients and optimizer

    @classmethod
    def of(cls, hp: pg.Hyperparameters, gpus: int) -> "Kept":
        tokens = hp.micro_batch(gpus)

        def predicted(batches: int) -> int:
            """With a micro-batch of so many as the run's."""
            rules = dataclasses.replace(
                hp, train_batch_tokens=tokens * batches * gpus, micro_batch_tokens=tokens * batches
            )
            ranks = SimpleNamespace(size=gpus)
            return pg.predict_memory(SimpleNamespace(hp=rules, attend=pg.sdpa, dtype=torch.bfloat16, ranks=ranks))

        def activations() -> float:
            """What grows with the micro-batch, without the quarter on top for what is not kept."""
            return (predicted(2) - predicted(1)) / 1.25

        as_it_is, passes = activations(), [layer for layer, _ in pg.layer_passes(hp, hp.num_loops)]
        with recomputing():
            inputs = activations()
        insides = []
        for layer in range(hp.num_layers):
            with recomputing(spared=layer):
                insides.append((activations() - inputs) / passes.count(layer))
        return cls(as_it_is, inputs + max(insides), predicted(1))


def main(paths: Sequence[str]) -> None:
    recipes = [Path(path) for path in paths] or [ROOT / "records" / "recipes" / f"{name}.env" for name in RECIPES]
    print(f"{'recipe':<12}{'GPUs':>6}{'tokens':>9}{'as it is':>11}{'recomputed':>12}{'peak as it is':>15}   GiB")
    for recipe in recipes:
        hp, gpus = pg.Hyperparameters.from_env(read_recipe(recipe)), RECIPES.get(recipe.stem, 1)
        kept = Kept.of(hp, gpus)
        figures = "".join(f"{n / 2**30:>{width}.1f}" for n, width in zip(kept, (11, 12, 15), strict=True))
        print(f"{recipe.stem:<12}{gpus:>6}{hp.micro_batch(gpus):>9}{figures}")


if __name__ == "__main__":
    main(sys.argv[1:])
