"""What all commands share: what cannot be used is said in one `error:` line, and the exit code is 2."""

import argparse
import functools
import sys
from collections.abc import Callable


class Unusable(Exception):
    """Input that cannot be used: one line for the user."""


def clean_text(text: str, limit: int = 300) -> str:
    """Foreign text for a terminal: one line, nothing that is not printable."""
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text[:limit]
    )
    return shown + "..." * (len(text) > limit)


def command(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """A command that may raise Unusable, or OSError with the name of a file."""

    @functools.wraps(run)
    def carried_out(args: argparse.Namespace) -> int:
        try:
            return run(args)
        except BrokenPipeError:  # nobody reads on: no fault of the input
            raise
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        except Unusable as error:
            problem = str(error)
        print(f"error: {clean_text(problem, 2000)}", file=sys.stderr)
        return 2

    return carried_out
