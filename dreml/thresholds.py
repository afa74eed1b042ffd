"""Thresholds of the similarity: below which the nearest image is "none of these". docs/SEARCH.md."""

import math

import numpy as np
import pandas as pd

FARS = (0.1, 0.01, 0.001)  # false-accept rates: the share of searches for something that is not there that find it
FEWEST_ABOVE = 10  # of fewer wrong neighbours above a threshold, their number says little
COLUMNS = ["far", "threshold", "found", "queries", "gallery"]


def threshold_at(queries: pd.DataFrame, far: float) -> float | None:
    """The similarity from which on a share `far` of wrong neighbours would count as found.

    `queries` is a `first_neighbour_table`; those without an image of another class do not count. Similarities are
    rounded to 1e-6, as in a search, and equal ones reach the threshold all or none, so that the share is at most `far`.
    None where fewer than FEWEST_ABOVE queries are expected above it.
    """
    others = np.sort(rounded(queries.other[np.isfinite(queries.other)]))[::-1]
    allowed = math.floor(far * len(others) + 1e-9)
    if allowed < FEWEST_ABOVE:
        return None
    return float(others[allowed] + 1) / 1e6 if allowed < len(others) else -1.0


def rounded(similarities: pd.Series) -> np.ndarray:
    """Similarities in millionths, whole numbers as float64."""
    return np.round(similarities.to_numpy(np.float64) * 1e6)


def threshold_table(queries: pd.DataFrame, num_gallery: int) -> pd.DataFrame:
    """thresholds.csv, from `first_neighbour_table`: a row for each of FARS that enough queries can tell.

    `found` is the percentage of queries whose first neighbour is of their class and reaches the threshold. As in
    Recall@K, ties count against the query: at a threshold of -1, this is the Recall@1.
    """
    rows = []
    for far in FARS:
        threshold = threshold_at(queries, far)
        if threshold is not None:
            is_found = queries.right & (rounded(queries.own) >= round(threshold * 1e6))
            rows.append((far, threshold, 100 * is_found.mean(), len(queries), num_gallery))
    return pd.DataFrame(rows, columns=COLUMNS)
