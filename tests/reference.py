"""Slow, obvious implementations that the tests compare with."""

import numpy as np


def slow_ranks(
    parts: list[np.ndarray], labels: np.ndarray, is_query: np.ndarray, is_gallery: np.ndarray
) -> list[list[list[int]]]:
    """The definition in docs/METHOD.md, one query at a time, in float64.

    For every ensemble size and query: how many images of other classes come before each of its own class, the most
    similar first.
    """
    sizes = []
    similarity = np.zeros((len(labels), len(labels)))
    for size, part in enumerate(parts, 1):
        lengths = np.linalg.norm(part.astype(np.float64), axis=1, keepdims=True)
        unit = part / np.where(lengths > 0, lengths, 1)
        similarity += unit @ unit.T
        queries = []
        for query in np.flatnonzero(is_query):
            gallery = [i for i in np.flatnonzero(is_gallery) if i != query]
            own = sorted((similarity[query, i] for i in gallery if labels[i] == labels[query]), reverse=True)
            others = np.array([similarity[query, i] for i in gallery if labels[i] != labels[query]])
            queries.append([int((others >= value - 1e-6 * size).sum()) for value in own])
        sizes.append(queries)
    return sizes


def slow_recall(
    parts: list[np.ndarray],
    labels: np.ndarray,
    ks: list[int],
    is_query: np.ndarray | None = None,
    is_gallery: np.ndarray | None = None,
) -> np.ndarray:
    every = np.ones(len(labels), bool)
    ranks = slow_ranks(
        parts, labels, every if is_query is None else is_query, every if is_gallery is None else is_gallery
    )
    return np.array([[np.mean([bool(r) and r[0] < k for r in queries]) for k in ks] for queries in ranks])


def slow_map(
    parts: list[np.ndarray], labels: np.ndarray, is_query: np.ndarray, is_gallery: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """mAP@R and R-Precision from a list of hits and misses at each of the R first positions."""
    rows = []
    for queries in slow_ranks(parts, labels, is_query, is_gallery):
        scores = []
        for ranks in filter(len, queries):
            hits = np.zeros(len(ranks))
            for number, rank in enumerate(ranks):
                if number + rank < len(hits):
                    hits[number + rank] = 1
            precision = [hits[: position + 1].mean() for position in range(len(hits))]
            scores.append(((precision * hits).mean(), hits.mean()))
        rows.append(np.mean(scores, axis=0) if scores else (np.nan, np.nan))
    return tuple(np.array(rows).T)


def slow_best_similarities(
    parts: list[np.ndarray], labels: np.ndarray, is_query: np.ndarray, is_gallery: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Each query's best mean cosine to an image of another class, and to another image of its own; -inf if none."""
    similarity = np.zeros((len(labels), len(labels)))
    for part in parts:
        lengths = np.linalg.norm(part.astype(np.float64), axis=1, keepdims=True)
        unit = part / np.where(lengths > 0, lengths, 1)
        similarity += unit @ unit.T / len(parts)
    pairs = []
    for query in np.flatnonzero(is_query):
        gallery = [i for i in np.flatnonzero(is_gallery) if i != query]
        values = [(labels[i] == labels[query], similarity[query, i]) for i in gallery]
        pairs.append([max((value for own, value in values if own == wanted), default=-np.inf) for wanted in (0, 1)])
    return tuple(np.array(pairs).T)


def mean_cosines(members: list[np.ndarray], others: list[np.ndarray] | None = None) -> np.ndarray:
    """The similarity of every image with every other: the mean of the members' cosines, in float64."""
    total = 0
    for rows, other_rows in zip(members, others or members, strict=True):
        unit, other = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (rows, other_rows))
        total = total + unit.astype(float) @ other.astype(float).T
    return total / len(members)
