"""Whether effects measured here carry over: published effects beside ours, their signs and their order (PROXY.md).

`published.json` is a list of {technique, effect_mbpb, low, high, evidence, source, links, here, note}, negative being
better. `here` names what measures it in the ledger: `arm`; `removes`, where the arm takes away what the technique adds;
`score` and `of_base`, where the technique is the difference of two passes; `other_change`, where the arm is not the
same change, in words: such a row is shown and does not count. null: nothing here measures it yet.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from records.experiments import ledger, noise, report

EVIDENCE = ("isolated", "logs", "claim", "bundle")  # from the strongest to the weakest


class Effect(NamedTuple):
    """What adding a technique does here."""

    judged: noise.Judgement
    verdict: str  # for the technique: better, worse, undecided, one seed


def effect_here(rows: Sequence[Mapping], recipe: str, here: Mapping, said: Mapping[str, Mapping]) -> Effect | None:
    """None where the ledger has no such runs."""
    if here["arm"] == "base":  # two passes of the same runs
        runs = {seed: (row, row) for group in ledger.floors(rows, recipe) for seed, row in group.items()}
    else:
        runs = ledger.pairs(rows, recipe).get(here["arm"], {})
    if not runs:
        return None
    score = here.get("score") or report.headline(runs)
    found = report.differences(runs, score, here.get("of_base", ""))
    sign = -1 if here.get("removes") else 1
    if not found:
        return None
    v = said.get(here["arm"])
    if v is None or here.get("of_base"):
        judged = noise.judge({seed: sign * d for seed, d in found.items()})
        p = 1.0 if judged.p is None else judged.p
        word = (
            "one seed"
            if judged.n < 2
            else "undecided"
            if p >= noise.LEVEL
            else "better"
            if judged.mean < 0
            else "worse"
        )
        return Effect(judged, word)
    judged = noise.Judgement(
        len(found), sign * v["difference_mbpb"], v["standard_error_mbpb"], None, None, None, v["p"]
    )
    word = {"better": "worse", "worse": "better"}.get(v["verdict"], v["verdict"]) if sign < 0 else v["verdict"]
    return Effect(judged, word)


def agreement(published: Mapping, effect: Effect) -> str:
    """In sign: yes, no, or why it says nothing."""
    if "other_change" in published["here"]:
        return "not the same change"
    if published["low"] < 0 < published["high"]:
        return "published: either sign"
    return "yes" if (effect.judged.mean < 0) == (published["effect_mbpb"] < 0) else "**no**"


def page(rows: Sequence[Mapping], recipe: str, published: Sequence[Mapping]) -> str:
    """PROXY.md between its markers."""
    said = report.verdicts(rows, recipe)
    lines = ["| technique | published, mbpb | evidence | here, mbpb | seeds | verdict here | same sign | links |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    compared: list[tuple[str, float, float, str, str]] = []
    missing = []
    for row in published:
        links = ", ".join(f"[#{link.rsplit('/', 1)[1]}]({link})" for link in row["links"])
        effect = effect_here(rows, recipe, row["here"], said) if row["here"] else None
        spread = f"{row['effect_mbpb']:+.1f} ({row['low']:+.1f} … {row['high']:+.1f})"
        evidence = f"{row['evidence']}: {row['source']}" + (f"; {row['note']}" if row["note"] else "")
        if effect is None:
            missing.append(f"| {row['technique']} | {spread} | {evidence} | {links} |")
            continue
        same = agreement(row, effect)
        if same in ("yes", "**no**"):
            compared.append((row["technique"], row["effect_mbpb"], effect.judged.mean, effect.verdict, row["evidence"]))
        if other := row["here"].get("other_change"):
            same += f": {other}"
        here = report.plus_minus(effect.judged.mean, effect.judged.error)
        cells = [row["technique"], spread, evidence, here, str(effect.judged.n)]
        lines.append(f"| {' | '.join([*cells, effect.verdict, same, links])} |")
    lines += ["", *summary(compared)]
    lines += ["", "Published, and not measured here yet:", "", "| technique | published, mbpb | evidence | links |"]
    lines += ["|---|---|---|---|", *missing]
    return "\n".join(lines) + "\n"


def summary(compared: Sequence[tuple[str, float, float, str, str]]) -> list[str]:
    """How far signs and order agree, with the uncertainty of so few techniques."""
    stats = noise.scipy("stats")
    lines = []
    groups = {
        "All comparable rows": compared,
        "Without bundles, whose figure is not one technique's": [row for row in compared if row[4] != "bundle"],
        "Those with a verdict here": [row for row in compared if row[3] in ("better", "worse")],
    }
    for what, rows in groups.items():
        if not rows:
            lines.append(f"- {what}: none.")
            continue
        same = sum((there < 0) == (here < 0) for _, there, here, *_ in rows)
        low, high = stats.binomtest(same, len(rows)).proportion_ci()
        line = f"- {what}: the sign agrees in {same} of {len(rows)} (95 % interval {low:.0%} to {high:.0%})"
        if len(rows) > 3:
            order = stats.spearmanr([row[1] for row in rows], [row[2] for row in rows])
            line += f"; Spearman's rank correlation {order.statistic:+.2f} (p {order.pvalue:.2f})"
        lines.append(line + ".")
        if opposite := [name for name, there, here, *_ in rows if (there < 0) != (here < 0)]:
            lines.append(f"  Opposite here: {', '.join(opposite)}.")
    return lines


def read_published(path: Path) -> list[dict]:
    return json.loads(path.read_text("utf-8"))
