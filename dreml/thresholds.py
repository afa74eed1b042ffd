"""Thresholds of the similarity: below which the nearest image is "none of these". docs/SEARCH.md."""

import math
import shlex

import numpy as np
import pandas as pd
import torch

from dreml.cli import InputError, one_line
from dreml.runs import SUFFIXES, Run
from utils import TIE_TOLERANCE

FARS = (0.1, 0.01, 0.001)  # false-accept rates: the share of searches for something that is not there that find it
FEWEST_ABOVE = 10  # of fewer wrong neighbours above a threshold, their number says little
COLUMNS = {"ensemble_size": int, "far": float, "threshold": float, "found": float, "queries": int, "gallery": int}


def threshold_at(others: torch.Tensor, far: float) -> float | None:
    """The similarity from which on a share `far` of wrong neighbours would count as found.

    `others` `(queries,)` is each query's similarity to the nearest image of another class; -inf counts as no query.
    Similarities are rounded to 1e-6, as in a search, and equal ones reach the threshold all or none, so that the share
    is at most `far`. None where fewer than FEWEST_ABOVE queries are expected above it.
    """
    others = torch.round(others[torch.isfinite(others)].double() * 1e6).sort(descending=True).values
    allowed = math.floor(far * len(others) + 1e-9)
    if allowed < FEWEST_ABOVE:
        return None
    return (others[allowed].item() + 1) / 1e6 if allowed < len(others) else -1.0


def threshold_table(others: torch.Tensor, own: torch.Tensor, num_gallery: int) -> pd.DataFrame:
    """thresholds.csv: a row for each ensemble size and each of FARS that enough queries can tell.

    `others` and `own` `(L, queries)`: each query's similarity to the nearest image of another class, and of its own;
    row l-1 is of the first l members. `found` is the percentage of queries whose first neighbour is of their class and
    reaches the threshold. As in Recall@K, ties count against the query: at a threshold of -1, this is the Recall@1.
    """
    rows = []
    num_queries = others.shape[1]
    for size, (of_others, of_own) in enumerate(zip(others, own, strict=True), 1):
        is_right = of_others < of_own - TIE_TOLERANCE
        rounded = torch.round(of_own.double() * 1e6)
        for far in FARS:
            threshold = threshold_at(of_others, far)
            if threshold is not None:
                found = is_right & (rounded >= round(threshold * 1e6))
                rows.append((size, far, threshold, 100 * found.double().mean().item(), num_queries, num_gallery))
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def read_threshold(run: Run, embedding: str, far: float) -> float:
    """The threshold of a run for a false-accept rate, from thresholds.csv, which evaluate.py writes.

    Raises InputError where the file, or the row, is not there.
    """
    path = run.folder / f"thresholds{SUFFIXES[embedding]}.csv"
    remedy = f"make it with: python evaluate.py {shlex.quote(str(run.folder))} --embedding {embedding}"
    try:
        table = pd.read_csv(path, usecols=list(COLUMNS), dtype=COLUMNS)
    except (ValueError, OSError) as error:
        raise InputError(f"far needs {path}, which is missing or damaged ({one_line(error)}); {remedy}") from None
    table = table[table.ensemble_size == run.num_members]
    found = table.threshold[np.isclose(table.far, far)]
    if len(found):
        return float(found.iloc[0])
    needed = math.ceil(FEWEST_ABOVE / far)
    num_queries = run.test.is_query.sum()
    reason = f": it takes {needed:,} test queries, and there are {num_queries:,}" if needed > num_queries else ""
    known = "".join(f"far {value:g}, " for value in table.far) or f"{remedy}; "
    problem = f"{path} has none for far {far:g} and ensemble size {run.num_members}"
    raise InputError(f"{problem}{reason}; what would do: {known}or a threshold of your own")
