"""What each test query finds first: the errors, the Recall@1 of each class, and which classes are taken for which."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from dreml.runs import TestSplit, scored
from utils import first_neighbours, unmatched_queries


def first_neighbour_table(members: Sequence[torch.Tensor], test: pd.DataFrame) -> pd.DataFrame:
    """The queries of a test split and their first neighbours, in the ensemble of all members `(M, d)`.

    `test` is test.csv. Columns: row and neighbour (rows of `test`), similarity, class_name, neighbour_class, counted:
    whether another image of the query's class is in the gallery; and right. Queries that do not count are not right.
    """
    split = TestSplit.from_arrays(test.label, test.is_query, test.is_gallery)
    neighbours, similarities = scored(first_neighbours, members, split)
    table = pd.DataFrame({"row": np.flatnonzero(test.is_query), "neighbour": neighbours.numpy()})
    table["similarity"] = similarities.numpy()
    names = test.class_name.to_numpy()
    table["class_name"] = names[table.row]
    table["neighbour_class"] = names[table.neighbour]
    table["counted"] = ~unmatched_queries(*split)[split.is_query].numpy()
    labels = test.label.to_numpy()
    table["right"] = (labels[table.row] == labels[table.neighbour]) & table.counted
    return table


def confident_errors(queries: pd.DataFrame) -> pd.DataFrame:
    """The rows of `first_neighbour_table` with a wrong neighbour, the most similar first."""
    wrong = queries[~queries.right & queries.counted]
    return wrong.sort_values("similarity", ascending=False, kind="stable")


def class_table(queries: pd.DataFrame) -> pd.DataFrame:
    """classes.csv, from `first_neighbour_table`: R@1 of each class in percent, worst first."""
    of_class = queries.groupby("class_name").right
    table = pd.DataFrame({"queries": of_class.size(), "R@1": 100 * of_class.mean()}).reset_index()
    return table.sort_values(["R@1", "queries", "class_name"], ascending=[True, False, True])


def confusion_table(errors: pd.DataFrame, test: pd.DataFrame) -> pd.DataFrame:
    """confusions.csv, from `confident_errors`: how often each class is taken for another one, most often first.

    The paths are those of the most similar example.
    """
    of_pair = errors.groupby(["class_name", "neighbour_class"], sort=False)
    table = of_pair.size().rename("times").reset_index()
    examples = of_pair.first()
    table["query_path"] = test.path[examples.row].to_numpy()
    table["neighbour_path"] = test.path[examples.neighbour].to_numpy()
    return table.sort_values("times", ascending=False, kind="stable")
