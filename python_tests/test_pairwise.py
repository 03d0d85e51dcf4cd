"""What the quick run keeps of a parametrised test."""

import itertools
from types import SimpleNamespace

import pairwise
import pytest
from conftest import quick

A = [object() for _ in range(7)]
B = [[], [0]]  # cannot be hashed
C = [1.5, 2.5, 3.5]


def grid(**values):
    return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ({}, 1),
        ({"a": A}, 7),
        ({"a": A, "c": C}, 21),
        ({"a": A, "b": B, "c": C}, 21),
        ({"a": A, "b": B, "c": C, "d": B}, 21),
    ],
)
def test_every_pair_of_values_is_kept_in_few_cases(values, count):
    """No fewer than the two longest lists have pairs, and not many more."""
    cases = grid(**values)
    kept = pairwise.kept(cases)
    assert kept == sorted(set(kept)) and count <= len(kept) <= 1.2 * count
    assert set.union(*(pairwise.pairs(cases[index]) for index in kept)) == set.union(
        *map(pairwise.pairs, cases)
    )


def test_a_grid_with_holes_keeps_all_of_its_pairs():
    cases = [c for c in grid(a=A, b=B, c=C) if c["a"] is not A[0] or c["c"] == 2.5]
    met = [pairwise.pairs(cases[index]) for index in pairwise.kept(cases)]
    assert set.union(*met) == set.union(*map(pairwise.pairs, cases))


def test_nothing_is_kept_of_nothing():
    assert pairwise.kept([]) == []


class Item:
    """As much of a collected test as the choice looks at."""

    def __init__(self, nodeid, params, *marks):
        self.nodeid, self.callspec = nodeid, SimpleNamespace(params=params)
        self.own_markers = [mark.mark for mark in marks]

    def iter_markers(self, name):
        return iter(mark for mark in self.own_markers if mark.name == name)

    def get_closest_marker(self, name):
        return next(self.iter_markers(name), None)


def test_what_is_slow_stays_out_and_what_is_skipped_stands_for_nothing():
    skip = pytest.mark.skipif(True, reason="not here")
    runs = pytest.mark.skipif(False, reason="here")
    grid_items = [
        Item(f"t.py::test[{n}]", case, skip if case["b"] is B[0] else runs)
        for n, case in enumerate(grid(a=A, b=B, c=C))
    ]
    slow = Item("t.py::test_slow", {}, pytest.mark.slow)
    other = Item("t.py::test_other", {})
    chosen = quick([slow, *grid_items, other])
    assert slow not in chosen and other in chosen
    kept = [item.callspec.params for item in chosen if item in grid_items]
    assert [case["b"] for case in kept].count(B[0]) == 1
    met = {(id(case["a"]), id(case["c"])) for case in kept if case["b"] is B[1]}
    assert len(met) == len(A) * len(C)
