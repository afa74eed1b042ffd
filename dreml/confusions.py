"""What each test query finds first: the errors, the Recall@1 of each class, and which classes are taken for which."""

import numpy as np
import pandas as pd
import torch

from dreml.runs import scored
from utils import nearest_images


def first_neighbour_table(members: list[torch.Tensor], test: pd.DataFrame) -> pd.DataFrame:
    """The queries of a test split and their nearest images, in the ensemble of all members `(M, d)`.

    `test` is test.csv. Columns: those of `nearest_images`; row (of the query in `test`), class_name, neighbour_class,
    similarity (to the first neighbour); and counted: whether another image of the query's class is in the gallery.
    """
    found = scored(nearest_images, members, test)
    table = pd.DataFrame({name: values.numpy() for name, values in found.items()})
    table["row"] = np.flatnonzero(test.is_query)
    names = test.class_name.to_numpy()
    table["class_name"] = names[table.row]
    table["neighbour_class"] = names[table.neighbour]
    table["similarity"] = np.where(table.right, table.own, table.other)
    table["counted"] = np.isfinite(table.own)
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
