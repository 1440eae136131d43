"""What the ledger says: verdicts, tables, everything on one arm. Differences are in mbpb, thousandths of a bpb."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from records.experiments import ledger, noise
from records.experiments.ledger import ExperimentError
from records.experiments.plan import trains

FEWER_STEPS = {"ITERATIONS", "WARMDOWN_ITERS", "MUON_MOMENTUM_WARMUP_STEPS"}


class Rate(NamedTuple):
    """What something costs, in mbpb for each unit less of it, and the arm that it was measured with."""

    cost: float
    error: float | None
    arm: str
    amount: float  # less of it in that arm


BEYOND = 5  # times that amount a straight line says nothing


def recipes(rows: Sequence[Mapping]) -> list[str]:
    return list(dict.fromkeys(row["recipe"] for row in rows))


def settings_text(changes: Mapping) -> str:
    return " ".join(f"{name}={value}" for name, value in changes.items())


def headline(pairs: Mapping[int, tuple[Mapping, Mapping]]) -> str:
    """The score that counts: the last one that all runs of an arm and of its base have."""
    runs = [run for pair in pairs.values() for run in pair]
    common = [label for label in runs[0]["scores"] if all(label in run["scores"] for run in runs)]
    if not common:
        raise ExperimentError(f"{runs[0]['name']}: its runs and those of its base have no score in common")
    return common[-1]


def differences(pairs: Mapping[int, tuple[Mapping, Mapping]], score: str, of_base: str = "") -> dict[int, float]:
    """mbpb by seed: the arm's score less the base's (`of_base`: another score of the base)."""
    return {
        seed: 1000 * (arm["scores"][score] - base["scores"][of_base or score])
        for seed, (arm, base) in sorted(pairs.items())
        if score in arm["scores"] and (of_base or score) in base["scores"]
    }


def trained(pairs: Mapping[int, tuple[Mapping, Mapping]]) -> bool:
    row = next(iter(pairs.values()))[0]
    return trains(row["changes"], row["axis"])


def step_time(rows: Sequence[Mapping], recipe: str, name: str) -> tuple[float, float] | None:
    """(ratio of the arm's step to the base's, its deviation over rounds) as last measured; None where it was not."""
    for row in reversed(rows):
        if (row["kind"], row["recipe"], row["name"]) == ("time", recipe, name):
            ratios = [arm / base for arm, base in zip(row["arm_ms"], row["base_ms"], strict=True)]
            return statistics.median(ratios), statistics.stdev(ratios)
    return None


def verdicts(rows: Sequence[Mapping], recipe: str, score: str = "") -> dict[str, dict]:
    """Arm: its verdict, the object that `verdict --json` prints. Raises ExperimentError."""
    arms = ledger.pairs(rows, recipe)
    if not arms and recipe not in recipes(rows):
        raise ExperimentError(f"no run of {recipe} in the ledger; there are {', '.join(recipes(rows)) or 'none'}")
    scores = {name: score or headline(pairs) for name, pairs in arms.items()}
    moved = {name: found for name in arms if (found := differences(arms[name], scores[name]))}
    pool = {name: found for name, found in moved.items() if trained(arms[name]) and len(found) > 1}
    # What only quantizes or evaluates differs by far less than a training, and each in its own way: no pool.
    others = {name: [o for n, o in pool.items() if n != name] if trained(arms[name]) else [] for name in moved}
    judged = {name: noise.judge(found, others[name]) for name, found in moved.items()}
    family = [name for name in judged if judged[name].p is not None]
    corrected = dict(zip(family, noise.holm([judged[name].p for name in family]), strict=True))
    rates, said = exchange(arms, moved), {}
    for name, judgement in judged.items():
        first = next(iter(arms[name].values()))[0]
        said[name] = dict(recipe=recipe, arm=name, axis=first["axis"], changes=first["changes"], score=scores[name])
        said[name] |= dict(seeds=list(moved[name]))
        guess = unpaired(rows, recipe, scores[name]) if trained(arms[name]) else None
        said[name] |= decision(judgement, others[name], guess, corrected.get(name), len(family))
        known = {unit: rate for unit, rate in rates.items() if rate.arm != name}  # else it would pay for itself
        said[name] |= costs(arms[name], judgement.mean, known, step_time(rows, recipe, name))
    return said


def decision(
    j: noise.Judgement,
    others: Sequence[Mapping[int, float]],
    guess: noise.Noise | None,
    corrected: float | None,
    family: int,
) -> dict:
    """What the pairs say, of `family` arms that were judged; `guess`: a noise to plan with where no other is known."""
    if corrected is None:
        word = "one seed"
    elif corrected < noise.LEVEL:
        word = "better" if j.mean < 0 else "worse"
    else:
        word = "undecided"
    known, more = j.noise or (noise.pooled(others) if others else guess), None
    if known and word in ("one seed", "undecided"):
        level = noise.LEVEL / (family + (corrected is None))  # Holm's strictest
        more = noise.seeds_to_settle(j.mean, known, noise.worth(others) if others else 0.0, level)
    return dict(
        difference_mbpb=rounded(j.mean),
        standard_error_mbpb=rounded(j.error),
        interval_mbpb=None if j.low is None else [rounded(j.low), rounded(j.high)],
        noise_mbpb=j.noise and rounded(j.noise.std),
        noise_df=j.noise and rounded(j.noise.df),
        noise_of=j.noise and j.noise.source,
        p=rounded(j.p),
        p_corrected=rounded(corrected),
        arms_corrected_for=family,
        verdict=word,
        seeds_to_settle=more,
    )


def costs(
    pairs: Mapping[int, tuple[Mapping, Mapping]],
    mean: float,
    rates: Mapping[str, Rate],
    time: tuple[float, float] | None,
) -> dict:
    """What an arm takes more of, and what is left of its difference once that is paid for."""
    of = ("artifact", "code") if next(iter(pairs.values()))[0]["axis"] == "script" else ("artifact",)
    size = statistics.fmean(arm["bytes"][part] - base["bytes"][part] for arm, base in pairs.values() for part in of)
    size *= len(of)
    return dict(
        bytes=round(size),
        step_time_ratio=time and round(time[0], 4),
        step_time_std=time and round(time[1], 4),
        at_equal_time_mbpb=charged(mean, rates.get("steps"), time and 100 * (time[0] - 1)),
        at_equal_bytes_mbpb=charged(mean, rates.get("bytes"), size / 1e5),
    )


def charged(mean: float, rate: Rate | None, more: float | None) -> float | None:
    """The difference after what an arm takes more of is paid for; None where that is far beyond what was measured."""
    known = rate is not None and more is not None and abs(more) <= BEYOND * rate.amount
    return rounded(mean + rate.cost * more) if known else None


def exchange(arms: Mapping[str, Mapping], moved: Mapping[str, Mapping[int, float]]) -> dict[str, Rate]:
    """Costs measured on the base itself: `steps`, mbpb for one percent of the steps less; `bytes`, for 100 KB less.

    Steps by an arm that changes their number only, bytes by one that stores the base's weights in fewer bits; of
    several the one with the most seeds, then the nearest to the base.
    """
    found: dict[str, list[tuple]] = dict(steps=[], bytes=[])
    for name, pairs in arms.items():
        if name not in moved:
            continue
        arm, base = next(iter(pairs.values()))
        less = dict(steps=0.0, bytes=0.0)
        if arm["changes"].keys() <= FEWER_STEPS and "ITERATIONS" in arm["changes"]:
            less["steps"] = 100 * (1 - arm["steps"] / base["steps"])
        if arm["changes"] and all(setting.endswith("_BITS") for setting in arm["changes"]):
            less["bytes"] = (base["bytes"]["artifact"] - arm["bytes"]["artifact"]) / 1e5
        for unit, amount in less.items():
            if amount > 0:
                judged = noise.judge(moved[name])
                rate = Rate(judged.mean / amount, judged.error and judged.error / amount, name, amount)
                found[unit].append((-judged.n, amount, rate))
    return {unit: min(rates)[2] for unit, rates in found.items() if rates}


def rounded(x: float | None) -> float | None:
    """Four significant digits."""
    return None if x is None else float(f"{x:.4g}")


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------


def signed(x: float | None, digits: int = 1) -> str:
    return "" if x is None else f"{x:+,.{digits}f}"


def plus_minus(mean: float, error: float | None) -> str:
    return signed(mean) if error is None else f"{signed(mean)} ± {error:.1f}"


def std_interval(std: float, df: float) -> tuple[float, float]:
    """95 % interval of a deviation."""
    chdtri = noise.scipy("special").chdtri
    return std * math.sqrt(df / chdtri(df, 0.025)), std * math.sqrt(df / chdtri(df, 0.975))


def seed_noise(rows: Sequence[Mapping], recipe: str, label: str) -> noise.Noise | None:
    """How far the base's seeds lie apart, within a script; None where none has two."""
    values = [
        {seed: 1000 * row["scores"][label] for seed, row in group.items() if label in row["scores"]}
        for group in ledger.floors(rows, recipe)
    ]
    values = [group for group in values if len(group) > 1]
    return noise.pooled(values, shared=1.0) if values else None  # a seed under another script is no new one


def unpaired(rows: Sequence[Mapping], recipe: str, label: str) -> noise.Noise | None:
    """The noise of a difference if pairing gains nothing."""
    found = seed_noise(rows, recipe, label)
    return found and found._replace(std=found.std * math.sqrt(2), source="of the base's seeds, unpaired")


def floor_lines(rows: Sequence[Mapping], recipe: str) -> list[str]:
    """The base's own scores and how far its seeds lie apart."""
    groups = ledger.floors(rows, recipe)
    lines = [f"| {recipe}, the base | mean, bpb | deviation of a seed, mbpb | 95 % interval |", "|---|---|---|---|"]
    for label in next(iter(groups[-1].values()))["scores"]:
        found = seed_noise(rows, recipe, label)
        if found is not None:
            mean = statistics.fmean(row["scores"][label] for row in groups[-1].values())
            low, high = std_interval(found.std, found.df)
            lines.append(f"| {label} | {mean:.4f} | {found.std:.2f} | {low:.2f} … {high:.2f} |")
    for group in groups:
        script = next(iter(group.values()))["script"][:12]
        lines += ["", f"Script {script}: {len(group)} seeds, {', '.join(map(str, sorted(group)))}."]
    if len(groups) > 1:
        lines += ["", "Means are of the last script; deviations are within scripts."]
    return lines


def arm_lines(rows: Sequence[Mapping], recipe: str) -> list[str]:
    """One row for each arm, in the order of the ledger, and what the verdicts rest on."""
    said = verdicts(rows, recipe)
    if not said:
        return []
    timed = any(v["step_time_ratio"] for v in said.values())
    names = ["arm", "axis", "seeds", "score", "difference", "95 % interval", "p, corrected", "verdict", "sliding"]
    names += ["bytes", "at equal bytes"] + ["step time", "at equal time"] * timed
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    arms = ledger.pairs(rows, recipe)
    for name, v in said.items():
        sliding = differences(arms[name], "sliding_window")
        interval = v["interval_mbpb"]
        word = v["verdict"]
        if word in ("undecided", "one seed") and v["seeds_to_settle"]:
            word += f", {v['seeds_to_settle']} would settle it"
        cells = [
            f"{name}: `{settings_text(v['changes'])}`" if v["changes"] else name,
            v["axis"],
            str(len(v["seeds"])),
            v["score"],
            plus_minus(v["difference_mbpb"], v["standard_error_mbpb"]),
            f"{signed(interval[0])} … {signed(interval[1])}" if interval else "",
            "" if v["p_corrected"] is None else f"{v['p_corrected']:.2g}",
            word,
            signed(statistics.fmean(sliding.values())) if sliding else "",
            signed(v["bytes"], 0),
            signed(v["at_equal_bytes_mbpb"]),
        ]
        if timed:
            ratio = v["step_time_ratio"]
            time = f"{100 * (ratio - 1):+.1f} ± {100 * v['step_time_std']:.1f} %" if ratio else ""
            cells += [time, signed(v["at_equal_time_mbpb"])]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *basis(rows, recipe, said)]


def basis(rows: Sequence[Mapping], recipe: str, said: Mapping[str, Mapping]) -> list[str]:
    """What verdicts rest on: noise, correction, exchange rates."""
    arms = ledger.pairs(rows, recipe)
    pool = [differences(arms[n], said[n]["score"]) for n in said if trained(arms[n]) and len(said[n]["seeds"]) > 1]
    lines = []
    if pool:
        shared = noise.pooled(pool)
        over = f"{len(pool)} arm{'s' * (len(pool) > 1)}"
        lines.append(
            f"Noise of one paired difference between trainings: {shared.std:.2f} mbpb, over {over}, "
            f"worth {shared.df:.1f} degrees of freedom."
        )
    elif guess := unpaired(rows, recipe, next(iter(said.values()))["score"]):
        lines.append(
            "No arm that trains has two seeds yet, so the noise of a pair is not known; what would settle an arm is "
            f"reckoned with {guess.std:.2f} mbpb, as if pairing gained nothing ({guess.df:.1f} degrees of freedom)."
        )
    tests = max(v["arms_corrected_for"] for v in said.values())
    lines.append(f"p is corrected for {tests} arms with two seeds or more (Holm); intervals are each arm's alone.")
    moved = {name: differences(arms[name], v["score"]) for name, v in said.items()}
    for unit, rate in exchange(arms, moved).items():
        what = "one percent of the steps" if unit == "steps" else "100 KB of the artifact"
        error = "one seed" if rate.error is None else f"± {rate.error:.2f}"
        lines.append(f"Exchange rate: {what} less costs {rate.cost:.2f} mbpb ({error}; measured by `{rate.arm}`).")
    return lines


def table(rows: Sequence[Mapping], recipe: str) -> str:
    """Markdown of one recipe."""
    return "\n".join([*floor_lines(rows, recipe), "", *arm_lines(rows, recipe)]).rstrip() + "\n"


def why(rows: Sequence[Mapping], recipe: str, name: str) -> str:
    """Everything on one arm. Raises ExperimentError."""
    arms = ledger.pairs(rows, recipe)
    if name not in arms:
        raise ExperimentError(f"no arm {name!r} of {recipe}; there are {', '.join(arms) or 'none'}")
    v, pairs = verdicts(rows, recipe)[name], arms[name]
    first = next(iter(pairs.values()))[0]
    lines = [f"{recipe} / {name} [{v['axis']}]: {settings_text(v['changes']) or 'another script'}"]
    lines.append(f"verdict on {v['score']}: {v['verdict']}")
    if v["p"] is not None:
        low, high = v["interval_mbpb"]
        lines += [
            f"  {plus_minus(v['difference_mbpb'], v['standard_error_mbpb'])} mbpb, interval {low:+.2f} to {high:+.2f}",
            f"  noise {v['noise_mbpb']:.2f} mbpb, {v['noise_of']}, {v['noise_df']:g} degrees of freedom",
            f"  p {v['p']:.3g}, corrected for {v['arms_corrected_for']} arms {v['p_corrected']:.3g}",
        ]
    if v["verdict"] in ("one seed", "undecided"):
        more, told = v["seeds_to_settle"], "if the difference and the noise are what they look like"
        lines.append(
            f"  {more} seeds would settle it, {told}" if more else "  how many seeds would settle it is not known"
        )
    lines += [f"bytes {signed(v['bytes'], 0)}; at equal bytes {signed(v['at_equal_bytes_mbpb']) or 'not known'} mbpb"]
    if v["step_time_ratio"]:
        time = f"step time x {v['step_time_ratio']:.3f} ± {v['step_time_std']:.3f}"
        lines.append(f"{time}; at equal time {signed(v['at_equal_time_mbpb']) or 'not known'} mbpb")
    for seed, (arm, base) in sorted(pairs.items()):
        lines.append(f"seed {seed}, script {arm['script'][:12]} (base {base['script'][:12]}), {arm['machine']}:")
        for label in arm["scores"]:
            if label in base["scores"]:
                a, b = arm["scores"][label], base["scores"][label]
                lines.append(f"  {label:16} {a:.6f} against {b:.6f}: {1000 * (a - b):+.2f} mbpb")
    for row in rows:
        if (row["recipe"], row["name"]) == (recipe, name) and row["kind"] == "run":
            if "failed" in row:
                lines.append(f"seed {row['seed']}, script {row['script'][:12]} failed: {row['failed']}")
            elif not any(row is arm for arm, _ in pairs.values()):
                lines.append(
                    f"seed {row['seed']}, script {row['script'][:12]}: not counted (another script, or no base)"
                )
    lines.append("settings: " + settings_text(first["settings"]))
    return "\n".join(lines) + "\n"
