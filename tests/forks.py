"""Python files in processes of their own that need not import torch: forks of one that has."""

import functools
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import CodeType

import torch


@functools.lru_cache(4)
def compiled(path: Path) -> CodeType:
    return compile(path.read_text("utf-8"), path, "exec")


def forked(file: Path, args: Sequence[str], environ: Mapping[str, str], heard: Callable[[str], None]) -> int:
    """As audit.run_python: a Python file in a process of its own."""
    code = compiled(file)
    with tempfile.TemporaryFile() as out:
        if not (child := os.fork()):
            ended = 70
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
                torch.set_num_threads(1)  # those of this process are not in its fork
                sys.argv = [str(file), *args]
                os.environ.clear()
                os.environ.update(environ)
                exec(code, {"__name__": "__main__", "__file__": str(file)})
                ended = 0
            except SystemExit as error:
                ended = int(error.code or 0)
            except BaseException:
                traceback.print_exc(file=sys.stderr)
                ended = 1
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(ended)
        _, status = os.waitpid(child, 0)
        out.seek(0)
        for line in out.read().decode(errors="replace").splitlines():
            heard(line)
        return os.waitstatus_to_exitcode(status)
