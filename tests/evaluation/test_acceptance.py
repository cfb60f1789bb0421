"""Acceptance rates and lengths on counts that can be worked out by hand."""

from __future__ import annotations

import pytest

from evaluation.acceptance import accept_length, accept_rate, depth_counts

# two images: 4 passes that draft two tokens each
DRAFTS = [{"tests": [2, 1], "accepts": [1, 1], "accepted": 2}, {"tests": [2], "accepts": [0], "accepted": 0}]


def test_depths_are_added_up() -> None:
    tests, accepts = depth_counts(DRAFTS)
    assert tests.tolist() == [4, 1]
    assert accepts.tolist() == [1, 1]
    assert accept_rate(DRAFTS) == 2 / 5


def test_the_accept_length_counts_drafts_per_pass_after_the_prefill() -> None:
    assert accept_length(DRAFTS, [3, 3]) == pytest.approx(1 + 2 / 4)


def test_nothing_drafted() -> None:
    assert accept_rate([]) is None
    assert accept_length([], []) is None
    assert accept_length([], [1]) is None
