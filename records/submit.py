"""The tool around a record: from the logs of its runs to a folder that checks itself.

    python records/submit.py COMMAND ...        (or: python -m records.submit COMMAND ...)

It needs no network, no torch but for `inspect` and to run what it packs or checks, and for most commands only the
standard library: the others name what they miss of requirements-records.txt. Exit code: 0 fine, 1 something failed, 2
unusable input, said in one line.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

if __package__ in (None, ""):  # run as a file: sys.path holds records/ only
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


class Command(NamedTuple):
    module: str  # of records.submission: add_arguments(parser) and run(args) -> exit code
    summary: str
    description: str


COMMANDS = {
    "new": Command(
        "folder",
        "make a record folder from the logs of one configuration",
        """\
Makes records/track_<track>/<date>_<NAME>/ from logs, one per seed: the script that ran, train_seed<N>.log,
submission.json and a README, with every figure taken from the logs. Refuses logs that differ in more than seed, run
id and paths.

  submit.py new XSA4 logs/seed1337.txt logs/seed42.txt logs/seed2025.txt --author "Ada" --blurb "XSA on four layers"
""",
    ),
    "check": Command(
        "check",
        "check record folders, one's own or anybody's",
        """\
Checks files, JSON, figures against logs, headline, sizes, clocks, seeds, statistics and static legality of record
folders: one line per check and finding: pass, warn, FAIL, skip where nothing could be examined, or note. A folder
passes (exit code 0) if nothing failed and nothing was skipped that the challenge requires. Of several experiments in
a folder, the one is judged whose score its JSON or README declares. Executes nothing of a folder unless --run is given.

  submit.py check records/track_10min_16mb/2026-04-27_XSA4
  submit.py check records/track_10min_16mb/* --json
  submit.py check records/track_10min_16mb/2026-04-27_XSA4 --against origin/main
""",
    ),
    "pack": Command(
        "pack",
        "write a script as a self-extracting, compressed one",
        """\
Strips comments, docstrings and annotations (names stay), compresses, and writes a script that unpacks itself: the code
bytes that count against the cap. The same input gives the same bytes.

  submit.py pack train_gpt.py -o packed.py
  submit.py pack train_gpt.py --prove
""",
    ),
    "compare": Command(
        "compare",
        "whether runs A are better than runs B: means, Welch's test, seeds still needed",
        """\
Compares the headline scores of two sets of runs. A is the candidate, B what it has to beat; each is given as logs or
as record folders, and counts with the score that it declares itself. Says mean, standard deviation and number of seeds
of both sides, the difference in nats and bpb, and whether A meets the two rules of acceptance in use:

  0.005 nats  one-sided Welch test at p < 0.01 against "A is better by 0.005 nats per token or less"
  frontier    one-sided Welch test at p < 0.25 against "A is not better"

  submit.py compare logs/new_seed*.txt -- logs/old_seed*.txt
  submit.py compare records/track_10min_16mb/NEW -- records/track_10min_16mb/OLD --json
""",
    ),
    "board": Command(
        "board",
        "the leaderboard: Markdown into records/README.md, and one offline HTML page",
        """\
Ranks all record folders: the table goes between the markers of records/README.md. With folders or logs named it ranks
those, and prints the table unless --readme names a file for it. --html writes one page that needs no network: sortable
table, training curves, score against bytes and time, settings of two runs side by side.

  submit.py board
  submit.py board records logs --html board.html
""",
    ),
    "inspect": Command(
        "inspect",
        "where an artifact's bytes go: table and picture",
        """\
Prints the parts of an artifact, the largest first: weights, bits per weight, entropy of the codes, bytes. Needs what
train_gpt.py needs (torch); --png needs matplotlib too.

  submit.py inspect runs/ID/artifact.pgolf --png
""",
    ),
    "plot": Command(
        "plot",
        "loss and bpb curves of logs as a PNG",
        """\
Curves of training and validation loss with the events of the runs (late QAT, SWA, stop) and their scores.

  submit.py plot logs/seed1337.txt logs/seed42.txt -o curves.png
""",
    ),
    "watch": Command(
        "watch",
        "follow a running log: curve, speed, time left, projected finish",
        """\
Follows a log that is being written, in the terminal, or as plain lines where there is none. Ctrl-C ends it.

  submit.py watch logs/run.txt
  submit.py watch logs/run.txt --like logs/earlier_seed1337.txt
""",
    ),
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join([__doc__.strip(), "", *lines, "", "`submit.py COMMAND --help` says more about one of them."])


def main(argv: Sequence[str]) -> int:
    """Exit code of a command line. A command's module is imported when it is called, and no other."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        print(f"error: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    try:
        module = importlib.import_module(f"records.submission.{command.module}")
    except ModuleNotFoundError as error:  # torch, numpy: of train_gpt.py, which `inspect` imports
        print(f"error: {name} needs {error.name}: pip install -r requirements.txt", file=sys.stderr)
        return 2
    parser = Parser(f"submit.py {name}", description=command.description, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    module.add_arguments(parser)
    # argparse drops a `--`; here it separates the sides of a comparison.
    rest = ["--versus" if name == "compare" and word == "--" else word for word in rest]
    return module.run(parser.parse_args(rest))


def entry(main: Callable[[Sequence[str]], int] = main) -> int:
    """Exit code of this process's command line."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `submit.py ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(entry())
