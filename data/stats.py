"""Means with intervals, and rank correlation.

Intervals are at 95%. A percentile bootstrap draws the rows of a text anew, not its tokens, since
the tokens of one row are not independent of each other.
"""

import numpy as np


def bootstrap(statistic, n, samples=1000, seed=0):
    """95% interval of `statistic(rows)` when n rows are drawn anew with replacement -> [low, high].

    `statistic` gets an (n,) integer array of row numbers and returns a float, or an array of
    statistics (low and high then have its shape).
    """
    rng = np.random.default_rng(seed)
    draws = np.array([statistic(rng.integers(0, n, n)) for _ in range(samples)])
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    return [low.tolist(), high.tolist()]


def mean_with_ci(values, rows=None, samples=1000):          # (n,...), (n,) -> mean, [low, high]
    """A mean over n values with its bootstrap interval; None, None for no values.

    rows: values with the same number belong together and are drawn together. Without it each value
    is drawn alone.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return None, None
    group = np.arange(len(values))
    if rows is not None:
        group = np.unique(np.asarray(rows), return_inverse=True)[1]
    sums = np.zeros((group.max() + 1, *values.shape[1:]))
    np.add.at(sums, group, values)
    counts = np.bincount(group)

    def mean(drawn):
        return sums[drawn].sum(0) / counts[drawn].sum()

    return values.mean(0).tolist(), bootstrap(mean, len(sums), samples)


def wilson(k, n):
    """95% interval of a share of which k of n were seen (Wilson 1927), also where all or none were;
    None for n = 0."""
    if n == 0:
        return None
    z = 1.959964
    p = k / n
    middle = p + z * z / (2 * n)
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]


def format_ci(value, interval, spec=".3f"):
    """"0.812 [0.790, 0.831]"; "n/a" where there is no value."""
    if value is None:
        return "n/a"
    low, high = interval
    return f"{value:{spec}} [{low:{spec}}, {high:{spec}}]"


def spearman(a, b):                                                     # (...,n), (...,n) -> (...)
    """Rank correlation of two tensors along the last dimension. NaN where all values are equal."""
    a = centred_ranks(a)
    b = centred_ranks(b)
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


def centred_ranks(x):                                                   # (...,n) -> (...,n)
    """Ranks less their mean; equal values share the mean of their ranks."""
    n_below = (x[..., None, :] < x[..., :, None]).sum(-1)
    n_equal = (x[..., None, :] == x[..., :, None]).sum(-1)              # itself included
    rank = n_below + (n_equal - 1) / 2
    return (rank - (x.shape[-1] - 1) / 2).cpu().double()
