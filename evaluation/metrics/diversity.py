"""Diversity of a run's images, on the features of a distance: what a decoder that narrows its samples loses.

# N images, M reference images, D feature width, K neighbours
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from evaluation.run_folder import Id
from evaluation.score import MetricInfo

NEAREST = 5  # K of Naeem et al. 2020
FEWEST_COUNTED = 500  # images of which a share has a standard error of up to 2.2 %
FEWEST_OF_PROMPTS = 32  # images below which the distances of single prompts decide their mean
BLOCK = 512  # rows of distances held at once

WHY = "whose shares have standard errors above 2 %"
NUMBERS = (
    *(
        MetricInfo(
            name=name, title=name, digits=3, higher_is_better=True, fewest=FEWEST_COUNTED,
            fewest_why=WHY, biased=True, detail=True,
        )
        for name in ("precision", "recall", "density", "coverage")
    ),
    MetricInfo(
        name="prompt_distance", title="distance within prompts", digits=3, per_image="prompt_distance",
        fewest=FEWEST_OF_PROMPTS, fewest_why="whose mean a few prompts decide", detail=True,
    ),
)  # fmt: skip


def distances(a: np.ndarray, b: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the Euclidean distances of features in blocks of rows: [N, D], [M, D] -> [<=BLOCK, M] each, in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    squares = (b**2).sum(1)
    for start in range(0, len(a), BLOCK):
        rows = a[start : start + BLOCK]
        yield np.sqrt(np.maximum((rows**2).sum(1)[:, None] - 2 * rows @ b.T + squares, 0))


def radii(features: np.ndarray, nearest: int = NEAREST) -> np.ndarray:
    """Return the distance of each feature to its K-th nearest other one: [N, D] -> [N]."""
    return np.concatenate([np.partition(block, nearest, 1)[:, nearest] for block in _without_self(features)])


def _without_self(features: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the distances of features among each other, exactly 0 to themselves."""
    for number, block in enumerate(distances(features, features)):
        rows = np.arange(len(block))
        block[rows, number * BLOCK + rows] = 0  # rounding leaves more
        yield block


def prdc(features: np.ndarray, reference: np.ndarray, nearest: int = NEAREST) -> dict[str, float]:
    """Compute precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    [N, D], [M, D], both more than K. A ball is around a feature and reaches to its K-th nearest neighbour of its own set.
    precision: share of images in a ball of the reference; recall: the reverse; density: balls of the reference that an
    image is in, over K; coverage: share of the reference's balls with an image inside.
    """
    theirs, ours = radii(reference, nearest), radii(features, nearest)
    inside = np.zeros(len(features))  # balls of the reference that each image is in
    covered = recalled = 0
    for start, block in zip(range(0, len(reference), BLOCK), distances(reference, features), strict=True):
        near = block < theirs[start : start + BLOCK, None]  # [m, N]
        inside += near.sum(0)
        covered += int(near.any(1).sum())
        recalled += int((block < ours).any(1).sum())
    return {
        "precision": float((inside > 0).mean()),
        "recall": recalled / len(reference),
        "density": float(inside.mean() / nearest),
        "coverage": covered / len(reference),
    }


def balanced(reference: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Return at most `count` features of a reference, a fixed random choice: [M, D] -> [m, D].

    With more references than images even a perfect run would cover few of their balls.
    """
    if len(reference) <= count:
        return reference
    return reference[np.sort(np.random.default_rng(seed).choice(len(reference), count, replace=False))]


def prompt_distances(features: np.ndarray, ids: Sequence[Id]) -> dict[Id, float]:
    """Return each image's mean distance to the other images of its prompt: [N, D] -> {id: distance}; {} for single ones."""
    members: dict[int, list[int]] = {}
    for row, (prompt, _) in enumerate(ids):
        members.setdefault(prompt, []).append(row)
    found: dict[Id, float] = {}
    for rows in members.values():
        if len(rows) > 1:
            between = np.concatenate(list(_without_self(features[rows])))
            found |= {ids[row]: float(line.sum() / (len(rows) - 1)) for row, line in zip(rows, between, strict=True)}
    return found


def diversity(
    features: np.ndarray, reference: np.ndarray | None, ids: Sequence[Id], seed: int = 0
) -> tuple[dict[str, float], Mapping[str, Mapping[Id, float]]]:
    """Return the numbers that these images allow, and the values of single images.

    Without features of a reference, or with K images or fewer, there is no precision; with one image per prompt there is no
    distance within prompts, whose mean is over prompts; nor where the run is large enough and few of its images share one.
    """
    out: dict[str, float] = {}
    if reference is not None and min(len(features), len(reference)) > NEAREST:
        out |= prdc(features, balanced(reference, len(features), seed))
    if not (within := prompt_distances(features, ids)):
        return out, {}
    prompts: dict[int, list[float]] = {}
    for (prompt, _), distance in within.items():
        prompts.setdefault(prompt, []).append(distance)
    # that the run is large says nothing where few of its images share a prompt
    if len(within) >= FEWEST_OF_PROMPTS or len(ids) < FEWEST_OF_PROMPTS:
        out["prompt_distance"] = float(np.mean([np.mean(values) for values in prompts.values()]))
    return out, {"prompt_distance": within}
