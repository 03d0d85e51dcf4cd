"""Which cases of a parametrised test the quick run keeps: enough for every pair of values."""

import itertools
from collections.abc import Mapping, Sequence


def pairs(case: Mapping[str, object]) -> set[frozenset[tuple[str, int]]]:
    """Every two of a case's parameters with their values; a single parameter stands alone. Values
    are told apart by identity: the cases of a grid share them, and some cannot be hashed."""
    values = [(name, id(value)) for name, value in case.items()]
    return set(map(frozenset, itertools.combinations(values, min(2, len(values)))))


def kept(cases: Sequence[Mapping[str, object]]) -> list[int]:
    """Indices of cases that together hold each pair that any of them holds: greedily, those first
    that bring the most new ones."""
    left = [pairs(case) for case in cases]
    met: set[frozenset[tuple[str, int]]] = set()
    chosen: list[int] = []
    for wanted in range(max(map(len, left), default=0), 0, -1):
        for index, held in enumerate(left):
            if len(held - met) == wanted:
                met |= held
                chosen.append(index)
    return sorted(chosen)
