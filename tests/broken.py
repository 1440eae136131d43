"""Runs of train_gpt.py in which something goes wrong at a chosen moment.

Started with Python or torchrun, it carries out the jobs of the variable JOBS one after the other and leaves their exit
codes in codes<RANK>; with a single job, its exit code is that of the process.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as pg


def at_call(function: Callable, number: int, fault: Callable) -> Callable:
    """The function, but its call `number` gives fault(its result, *its arguments)."""
    calls = itertools.count(1)

    @functools.wraps(function)
    def changed(*args, **kwargs):
        result = function(*args, **kwargs)
        return fault(result, *args) if next(calls) == number else result

    return changed


def spoil_loss(value: float) -> Callable:
    """Fault of accumulate_gradients: another loss, with gradients as they were."""
    return lambda loss, *_: torch.full_like(loss, value)


def spoil_gradient(name: str, value: float) -> Callable:
    """Fault of accumulate_gradients: one entry of a parameter's gradient, with the loss as it was."""

    def fault(loss, model, *_):
        dict(model.named_parameters())[name].grad.view(-1)[-1] = value
        return loss

    return fault


def shard() -> Path:
    return Path(os.environ["DATA_PATH"]) / "fineweb_train_000000.bin"


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(result, *_):
    """In the first of torchrun's starts."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
        die()
    return result


def die_with_torchrun(*_) -> None:
    """As a host dies that has one rank."""
    os.kill(os.getppid(), signal.SIGKILL)
    die()


def raise_own(*_) -> None:
    raise ZeroDivisionError("a fault of its own")


def stop_torchrun(result, *_):
    os.kill(os.getppid(), signal.SIGTERM)
    return result


def shrink(result, *_):
    os.truncate(shard(), 1024 + 2 * 100)
    return result


def remove(result, *_):
    shard().unlink()
    return result


def write_bad_token(result, *_):
    with shard().open("r+b") as file:
        file.seek(1024)
        file.write((700).to_bytes(2, "little") * ((shard().stat().st_size - 1024) // 2))
    return result


DEATHS = (die, die_once, die_with_torchrun, raise_own, stop_torchrun)
FAULTS = {f.__name__: f for f in (*DEATHS, shrink, remove, write_bad_token)}
FAULTS |= dict(nan_loss=spoil_loss(math.nan), inf_gradient=spoil_gradient("blocks.0.mlp.up.weight", math.inf))


@contextlib.contextmanager
def broken(where: str, number: int, fault: str, rank: int) -> Iterator[None]:
    """The fault at call `number` of a function or method of train_gpt, on one rank."""
    *owner, name = where.split(".")
    owner = getattr(pg, owner[0]) if owner else pg
    changed = getattr(owner, name)

    def act(*args):
        Path("fault").touch()  # when it happened
        return FAULTS[fault](*args)

    if rank == int(os.environ.get("RANK", 0)):
        changed = at_call(changed, number, act)
    with mock.patch.object(owner, name, changed):
        yield


def main() -> int:
    jobs, codes = json.loads(os.environ["JOBS"]), []
    for job in jobs:
        fault = job.pop("fault", None)
        with mock.patch.dict(os.environ, job), broken(*fault) if fault else contextlib.nullcontext():
            codes.append(pg.main([], os.environ))
        if len(jobs) > 1 and dist.is_initialized():
            dist.destroy_process_group()
    Path(f"codes{os.environ.get('RANK', 0)}").write_text(json.dumps(codes))
    return codes[0] if len(jobs) == 1 else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a process group that is left alone may abort the interpreter's way down
