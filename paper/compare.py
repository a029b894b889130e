"""How sure a difference between two systems is, and which users and items it comes from.

Everything here works on what finetune.py --per-user writes: each user's test metrics, and where
each test interaction is ranked. A system's runs differ in the seed and, where the split is ours,
in the split. So a user may be tested in one run and not in another.
"""
from typing import NamedTuple

import numpy as np


def user_table(runs, user_ids, metric):
    """float64 [n_runs, n_users]: the metric of every user; NaN where a run does not test the user.

    runs: a dict for each run, as write_per_user has written it; user_ids: those of all users.
    """
    row_of = {name: row for row, name in enumerate(user_ids.tolist())}
    table = np.full((len(runs), len(user_ids)), np.nan)
    for values, of_run in zip(table, runs):
        rows = [row_of[name] for name in of_run["user_ids"].tolist()]
        values[rows] = of_run[metric]
    return table


class Difference(NamedTuple):
    """The difference of two means of a metric."""
    mean: float
    error: float     # its standard error
    p: float         # two-sided
    smallest: float  # the smallest mean for which p would be below .05


def paired_bootstrap(ours, other, n_draws=4000):
    """Difference of two user_tables of the same runs: mean over users, then over runs.

    Users are drawn with replacement: the same users for both systems, each with all of its runs.
    Each draw gets normal noise. Its variance is what the runs' means vary by beyond what their
    users explain. Three runs hardly tell that variance, so each draw takes a value of its own that
    could be the true one. With one run it is not known at all, and the noise is left out. p: twice
    the share of draws of the rarer sign.
    """
    gap = ours - other                                                       # [n_runs, n_users]
    gap = gap[:, ~np.isnan(gap).all(0)]
    is_tested = ~np.isnan(gap)
    gap = np.where(is_tested, gap, 0)
    n_runs, n_users = gap.shape
    rng = np.random.default_rng(0)
    draws = []
    chunk = max(1, 1_000_000 // n_users)
    for start in range(0, n_draws, chunk):
        n = min(chunk, n_draws - start)
        # How often each draw has each user. A draw's users are shifted to numbers of its own, so
        # that one bincount counts all draws.
        drawn = rng.integers(n_users, size=(n, n_users))
        drawn += n_users * np.arange(n, dtype=np.int64)[:, None]
        weight = np.bincount(drawn.ravel(), minlength=n * n_users).reshape(n, n_users)
        means = weight @ gap.T / np.maximum(weight @ is_tested.T, 1)              # [n, n_runs]
        draws.append(means.mean(1))
    draws = np.concatenate(draws)
    variance = draws.var()
    if n_runs > 1:
        of_runs, of_users = run_variances(gap, is_tested)
        variance += max(0, of_runs - of_users) / n_runs
        # The sample variance of n means is the true one times chi-square(n - 1) / (n - 1).
        true_one = of_runs * (n_runs - 1) / rng.chisquare(n_runs - 1, size=n_draws)
        beyond_users = np.maximum(0, true_one - of_users)
        draws += rng.normal(size=n_draws) * np.sqrt(beyond_users / n_runs)
    mean = (gap.sum(1) / is_tested.sum(1)).mean()
    n_other_sign = min(np.sum(draws <= 0), np.sum(draws >= 0))
    p = min(1, 2 * (1 + n_other_sign) / (1 + n_draws))
    low, high = np.quantile(draws, (0.025, 0.975))
    return Difference(float(mean), float(np.sqrt(variance)), float(p), float(high - low) / 2)


def run_variances(gap, is_tested):
    """(variance of the runs' means, the part of it that users bring), by a two-way analysis.

    gap [n_runs, n_users], 0 where not tested. A user's gap differs from run to run. So the runs'
    means differ even if no run is better than another: that is the users' part.
    """
    n_tested = is_tested.sum(1)
    of_run = gap.sum(1) / n_tested                                                  # [n_runs]
    of_user = gap.sum(0) / is_tested.sum(0)                                        # [n_users]
    residual = np.where(is_tested, gap - of_user - (of_run - of_run.mean())[:, None], 0)
    freedom = max(1, n_tested.sum() - gap.shape[1] - len(gap) + 1)
    of_users = (residual ** 2).sum() / freedom * (1 / n_tested).mean()
    return of_run.var(ddof=1), of_users


# --- Who gains ----------------------------------------------------------------------------

USER_BINS = (0, 3, 6, 11, 21, np.inf)     # by a user's training interactions
ITEM_BINS = (0, 1, 5, 20, 100, np.inf)    # by an item's


class Bins(NamedTuple):
    names: list         # as "3-5"
    means: np.ndarray   # float [n_bins], NaN where there is nothing
    counts: np.ndarray  # int [n_bins]


def bin_names(edges):
    """As ("0-2", ..., "21+")."""
    names = []
    for low, high in zip(edges, edges[1:]):
        if high == np.inf:
            names.append(f"{low}+")
        else:
            names.append(str(low) if high == low + 1 else f"{low}-{high - 1}")
    return names


def by_user(runs, edges=USER_BINS):
    """Bins of Recall@20 by a user's training interactions; the users of all runs together."""
    degree = np.concatenate([of_run["train"] for of_run in runs])
    value = np.concatenate([of_run["recall@20"] for of_run in runs])
    return in_bins(degree, value, edges)


def by_item(runs, edges=ITEM_BINS):
    """Bins of the share of test interactions ranked among the first 20, over all runs.

    They are binned by the training interactions of their items.
    """
    degree = np.concatenate([of_run["item_train"] for of_run in runs])
    place = np.concatenate([of_run["rank"] for of_run in runs])
    return in_bins(degree, (place > 0) & (place <= 20), edges)


def in_bins(degree, value, edges):
    which = np.digitize(degree, edges) - 1
    counts = np.bincount(which, minlength=len(edges) - 1)
    sums = np.bincount(which, weights=value, minlength=len(edges) - 1)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return Bins(bin_names(edges), means, counts)
