"""Cases that a run leaves out, unless it is told --full; see tests/conftest.py."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest
from _pytest.mark.structures import ParameterSet


def thinned(cases: Iterable[Any], *, full: Collection[Any]) -> list[ParameterSet]:
    """Return the cases for `pytest.mark.parametrize`, with those in `full` marked `full`.

    Args:
        cases: names, or tuples of the values of several parameters.
        full: those of them that others cover in part. tests/README.md says by which.
    Raises:
        ValueError: one of `full` is no case.
    """
    cases = list(cases)
    if unknown := [case for case in full if case not in cases]:
        raise ValueError(f"full={unknown}: must be among the cases {cases}; correct the name")
    return [
        pytest.param(
            *(case if type(case) is tuple else (case,)),
            marks=(pytest.mark.full,) if case in full else (),
        )
        for case in cases
    ]
