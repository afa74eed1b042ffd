"""confusions.py: first neighbours, errors, classes and confusions, one by one."""

import collections

import numpy as np
import pandas as pd
import pytest
import torch
from builders import random_embeddings
from reference import mean_cosines

from dreml.confusions import class_table, confident_errors, confusion_table, first_neighbour_table


def test_tables_are_those_of_the_similarities():
    """Queries and gallery differ. The one image of class "lone" has nothing right to find, and so is no error."""
    members = random_embeddings(3, 2, 60)
    names = np.array(["ant", "bee", "cat", "dog"])[np.arange(60) % 4]
    names[7] = "lone"
    is_query, is_gallery = np.arange(60) % 3 > 0, np.arange(60) % 7 != 1
    test = pd.DataFrame({"path": [f"{row}.png" for row in range(60)], "label": pd.factorize(names)[0]})
    test = test.assign(class_name=names, is_query=is_query, is_gallery=is_gallery)
    similarities = mean_cosines(members)
    np.fill_diagonal(similarities, -2)
    similarities[:, ~is_gallery] = -2
    first = similarities.argmax(1)
    members = [torch.from_numpy(member) for member in members]
    queries = first_neighbour_table(members, test)
    assert queries.row.tolist() == np.flatnonzero(is_query).tolist()
    assert queries.neighbour.tolist() == first[is_query].tolist()
    np.testing.assert_allclose(queries.similarity, similarities.max(1)[is_query], atol=1e-6)
    right = names == names[first]
    assert queries.right.tolist() == right[is_query].tolist() and 0 < queries.right.sum()
    assert queries.row[~queries.counted].tolist() == [7]
    only = np.arange(60) == 59
    assert not first_neighbour_table(members, test.assign(is_query=only, is_gallery=only)).right.any()

    wrong = [row for row in queries.row if not right[row] and row != 7]
    wrong.sort(key=lambda row: -similarities[row, first[row]])
    errors = confident_errors(queries)
    assert errors.row.tolist() == wrong
    table = class_table(queries)
    shares = {name: 100 * right[is_query & (names == name)].mean() for name in set(names)}
    assert dict(zip(table.class_name, table["R@1"], strict=True)) == pytest.approx(shares)
    assert table["R@1"].is_monotonic_increasing and table.queries.sum() == is_query.sum()

    times = collections.Counter((names[row], names[first[row]]) for row in wrong)
    examples = {(names[row], names[first[row]]): (f"{row}.png", f"{first[row]}.png") for row in reversed(wrong)}
    confusions = confusion_table(errors, test)
    pairs = list(dict.fromkeys((names[row], names[first[row]]) for row in wrong))  # the most similar example first
    pairs.sort(key=lambda pair: -times[pair])
    assert list(zip(confusions.class_name, confusions.neighbour_class, strict=True)) == pairs
    for each in confusions.itertuples():
        pair = (each.class_name, each.neighbour_class)
        assert each.times == times[pair] and (each.query_path, each.neighbour_path) == examples[pair]
