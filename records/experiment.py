"""Experiments in pairs: arms against a base, seed by seed, with the noise they have to beat.

    experiment.py run records/recipes/cpu_ablate.env "gain 5: QK_GAIN_INIT=5" --seeds 3 --data DATA
    experiment.py verdict "gain 5" --json                 one JSON line: better, worse, undecided, one seed
    experiment.py why "gain 5"                            everything on one arm
    experiment.py time records/recipes/cpu_ablate.env "gain 5: QK_GAIN_INIT=5" --data DATA      a step of each, in turn
    experiment.py table [--write]                         the tables; --write puts them into RESULTS.md and PROXY.md

Exit code: 0 done, 1 a run failed, 2 unusable input, said in one line; 130 interrupted (start it again to go on).
"""

import argparse
import json
import re
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):  # run as a file: sys.path holds records/ only
    sys.path[0] = str(ROOT)

from records.experiments import ledger, proxy, report, runner, steptime  # noqa: E402
from records.experiments.ledger import ExperimentError  # noqa: E402
from records.experiments.plan import SEEDS, Plan, plan, read_arm, read_seeds  # noqa: E402
from records.submit import Parser, entry  # noqa: E402

LEDGER = ROOT / "records" / "ledger.jsonl"
PROXY = "cpu_ablate"  # the recipe for quick looks, whose effects PROXY.md compares with published ones


def planned(args: argparse.Namespace, seeds: list[int], rows: list[dict]) -> Plan:
    arms = [read_arm(text) for text in args.arms]
    return plan(args.recipe, arms, seeds, args.data.resolve(), args.out.resolve(), rows, args)


def run(args: argparse.Namespace) -> int:
    jobs = planned(args, read_seeds(args.seeds), ledger.read(args.ledger))
    # Either signal stops the runs too, also where a shell has made this process ignore SIGINT (one in the background).
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return runner.Runner(jobs, args.ledger, args.out.resolve(), args.jobs).run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def time(args: argparse.Namespace) -> int:
    jobs = planned(args, list(SEEDS[:1]), [])
    for row in steptime.time_steps(jobs, args.out.resolve(), args.rounds, args.steps):
        ledger.append(args.ledger, row)
        ratios = [arm / base for arm, base in zip(row["arm_ms"], row["base_ms"], strict=True)]
        spread = f"{min(ratios):.4f} to {max(ratios):.4f}"
        print(f"{row['name']}: x {statistics.median(ratios):.4f} of the base's step ({spread})")
    return 0


def verdict(args: argparse.Namespace) -> int:
    said = report.verdicts(ledger.read(args.ledger), args.recipe, args.score)
    if unknown := [name for name in args.names if name not in said]:
        raise ExperimentError(f"no arm {unknown[0]!r} of {args.recipe} has run; there are {', '.join(said) or 'none'}")
    for name in args.names or said:
        v = said[name]
        if args.json:
            print(json.dumps(v))
        else:
            difference = report.plus_minus(v["difference_mbpb"], v["standard_error_mbpb"])
            more = f"; {v['seeds_to_settle']} seeds would settle it" if v["seeds_to_settle"] else ""
            print(f"{name}: {v['verdict']}, {difference} mbpb on {v['score']}, {len(v['seeds'])} seeds{more}")
    return 0


def why(args: argparse.Namespace) -> int:
    print(report.why(ledger.read(args.ledger), args.recipe, args.name), end="")
    return 0


def pages(rows: list[dict]) -> dict[Path, dict[str, str]]:
    """File: marker: the text that belongs between `<!-- marker:begin -->` and `<!-- marker:end -->`."""
    tables = {f"ledger:{recipe}": report.table(rows, recipe) for recipe in report.recipes(rows)}
    published = proxy.read_published(ROOT / "records" / "published.json")
    return {
        ROOT / "records" / "RESULTS.md": tables,
        ROOT / "records" / "PROXY.md": {"proxy": proxy.page(rows, PROXY, published)},
    }


def table(args: argparse.Namespace) -> int:
    rows = ledger.read(args.ledger)
    if not args.write:
        for recipe in report.recipes(rows):
            print(report.table(rows, recipe))
        return 0
    for path, texts in pages(rows).items():
        page = path.read_text("utf-8")
        for marker, text in texts.items():
            pattern = rf"(<!-- {marker}:begin -->\n).*?(<!-- {marker}:end -->)"
            page, found = re.subn(pattern, lambda m, text=text: f"{m[1]}\n{text}\n{m[2]}", page, flags=re.DOTALL)
            if not found:
                raise ExperimentError(f"{path.name} has no <!-- {marker}:begin --> and <!-- {marker}:end -->; add them")
        path.write_text(page, "utf-8")
        print(f"wrote {path.name}")
    return 0


def at_least(least: int):
    """A type of argument: a whole number from `least`."""

    def number(text: str) -> int:
        if int(text) < least:
            raise ValueError
        return int(text)

    return number


def add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="BASE.env", help="the base, a recipe")
    parser.add_argument(
        "arms", nargs="*", metavar="'NAME: X=1 Y=2'", help="what differs from the base, one for each arm"
    )
    parser.add_argument("--data", type=Path, required=True, help="DATA_PATH of all runs")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "experiments", help="where runs and logs go")
    parser.add_argument("--script", default=str(ROOT / "train_gpt.py"), help="what runs: a file or a commit")
    parser.add_argument("--against", default="", metavar="SCRIPT", help="what the base runs, if it is another script")
    parser.add_argument(
        "--axis", default="", choices=ledger.AXES, help="what the arms change, where their settings do not say it"
    )
    parser.add_argument("--threads", type=at_least(1), default=1, help="of each run")
    parser.add_argument("--launch", default="", help="in front of the script, as 'torchrun --nproc_per_node=8'")


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="experiment.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, call, summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        added.add_argument("--ledger", type=Path, default=LEDGER, help="default: records/ledger.jsonl")
        added.set_defaults(call=call)
        return added

    add_runs(added := command("run", run, "make what is missing of a base and its arms, every seed of each"))
    added.add_argument("--seeds", default="3", help="how many, or which (1337,42); the same for all arms")
    added.add_argument("--jobs", type=at_least(1), default=1, help="runs at a time")
    add_runs(added := command("time", time, "milliseconds of a step beside the base's; the machine must be idle"))
    added.add_argument("--rounds", type=at_least(2), default=5, help="of base and arm in turn")
    added.add_argument("--steps", type=at_least(4), default=8, help="of each run")
    added = command("verdict", verdict, "what the seeds so far say of arms")
    added.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    added.add_argument("--recipe", default=PROXY, help=f"default: {PROXY}")
    added.add_argument("--score", default="", help="default: the score that counts, the last one of a run")
    added.add_argument("--json", action="store_true", help="one line for each arm, for programs")
    added = command("why", why, "everything the ledger has on one arm")
    added.add_argument("name", metavar="NAME")
    added.add_argument("--recipe", default=PROXY, help=f"default: {PROXY}")
    added = command("table", table, "the tables of all recipes, as Markdown")
    added.add_argument("--write", action="store_true", help="put them into records/RESULTS.md and records/PROXY.md")
    return top


def main(argv: Sequence[str]) -> int:
    """Exit code of a command line."""
    args = parser().parse_args(argv)
    try:
        return args.call(args)
    except (ExperimentError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(entry(main))
