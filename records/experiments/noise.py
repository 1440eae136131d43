"""What differences in pairs say: a pair is a run of an arm and one of its base with the same seed.

The differences are taken as independent over seeds and normal. Three of them have a t interval so wide that it decides
almost nothing, so the noise is pooled over all arms of a recipe. These share the runs of the base, so their deviations
are no independent measurements of the noise: it has fewer degrees of freedom than their number, and is given what it is
worth (Satterthwaite). An arm may change the noise: one that varies more than the others (an F test says so, at a level
that errs on the side of caution) has to hold against its own deviation too. With three seeds an effect of 2.5 noises
is found with probability 0.8, where the arm's own t interval needs 3.3. The price: an arm without effect that is two to
five times as noisy as the others gets a verdict in 7 to 9 % of the cases, not in 5 (12 to 29 % by the pool alone).
"""

import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from records.experiments.ledger import ExperimentError

LEVEL = 0.05  # two-sided, after Holm's correction
NOISIER = 0.2  # level at which an arm counts as noisier than the others
POWER = 0.8  # probability of a verdict that the number of seeds is worked out for
MAX_SEEDS = 256
SHARED = 0.5  # correlation of two arms' differences at one seed: half of each is the run of the base
DRAWS = 2000  # of the noise, for the power


class Noise(NamedTuple):
    """The deviation of one paired difference."""

    std: float
    df: float
    source: str


class Judgement(NamedTuple):
    """What the seeds of one arm say. All but n and mean is None with one seed."""

    n: int
    mean: float
    error: float | None  # standard error of the mean
    noise: Noise | None
    low: float | None  # interval of 1 - LEVEL for this arm alone
    high: float | None
    p: float | None


def scipy(module: str):
    """scipy.<module>, imported where it is used. Raises ExperimentError."""
    try:
        return importlib.import_module(f"scipy.{module}")
    except ImportError:
        raise ExperimentError("the t distribution needs scipy: pip install -r requirements-records.txt") from None


def squares(values: Iterable[float]) -> float:
    """Sum of squared deviations from the mean."""
    values = list(values)
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values)


def worth(arms: Sequence[Mapping[int, float]], shared: float = SHARED) -> float:
    """Degrees of freedom of a chi-square with the variance that the pooled sum of squares has.

    Two arms' sums of squares have the covariance 2 r^2 trace(C_k C_l), C centring over the seeds of each on those of
    both; r is the correlation of their differences.
    """
    spread = 0.0
    for i, a in enumerate(arms):
        for j, b in enumerate(arms):
            m, k, n = len(a.keys() & b.keys()), len(a), len(b)
            spread += (1 if i == j else shared**2) * (m - m / k - m / n + m * m / (k * n))
    return sum(len(arm) - 1 for arm in arms) ** 2 / spread


def pooled(arms: Sequence[Mapping[int, float]], shared: float = SHARED) -> Noise:
    """Noise from the differences (seed: difference) of arms with at least two seeds each."""
    total = math.fsum(squares(arm.values()) for arm in arms)
    std = math.sqrt(total / sum(len(arm) - 1 for arm in arms))
    return Noise(std, worth(arms, shared), f"pooled over {len(arms)} arms" if len(arms) > 1 else "its own")


def judge(arm: Mapping[int, float], others: Sequence[Mapping[int, float]] = ()) -> Judgement:
    """One arm's differences (seed: difference) against the noise of its own and of `others` together."""
    n, mean = len(arm), math.fsum(arm.values()) / len(arm)
    if n < 2:
        return Judgement(n, mean, None, None, None, None, None)
    others = [other for other in others if len(other) > 1]
    special, noises = scipy("special"), [pooled([arm, *others])]
    if others:
        own, rest = pooled([arm]), pooled(others)
        if own.std**2 > rest.std**2 * special.fdtri(own.df, rest.df, 1 - NOISIER):
            noises.append(own)

    def half(noise: Noise) -> float:
        return float(special.stdtrit(noise.df, 1 - LEVEL / 2)) * noise.std / math.sqrt(n)

    def p(noise: Noise) -> float:
        if not noise.std:
            return 1.0 if not mean else 0.0
        return 2 * float(special.stdtr(noise.df, -abs(mean) / noise.std * math.sqrt(n)))

    noise, reach = max(noises, key=p), max(map(half, noises))
    return Judgement(n, mean, noise.std / math.sqrt(n), noise, mean - reach, mean + reach, p(noise))


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for their number: the chance of any false verdict among them stays below the level."""
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = largest
    return corrected


def power(effect: float, noise: float, n: int, df: float, level: float = LEVEL) -> float:
    """Probability that `judge` finds an effect with n seeds at this level, if all arms have this noise and the pool of
    the other arms is worth `df` degrees of freedom (0: there is none). By draws of the two variances."""
    import numpy as np

    special, random, v = scipy("special"), np.random.default_rng(0), n - 1
    own = random.chisquare(v, DRAWS) / v
    threshold = strict = special.stdtrit(v, 1 - level / 2) * np.sqrt(own)
    if df:
        rest = random.chisquare(df, DRAWS) / df
        loose = special.stdtrit(df + v, 1 - level / 2) * np.sqrt((df * rest + v * own) / (df + v))
        noisier = own > rest * special.fdtri(v, df, 1 - NOISIER)
        threshold = np.where(noisier, np.maximum(loose, strict), loose)
    shift = abs(effect) / noise * math.sqrt(n)
    return float(np.mean(special.ndtr(shift - threshold) + special.ndtr(-threshold - shift)))


def seeds_to_settle(effect: float, noise: Noise, df: float, level: float = LEVEL) -> int | None:
    """The number of seeds, at least two, that finds this effect with probability POWER; None if MAX_SEEDS do not."""
    if not effect or power(effect, noise.std, MAX_SEEDS, df, level) < POWER:
        return None
    low, high = 2, MAX_SEEDS
    while low < high:
        middle = (low + high) // 2
        enough = power(effect, noise.std, middle, df, level) >= POWER
        low, high = (low, middle) if enough else (middle + 1, high)
    return low
