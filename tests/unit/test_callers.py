"""How a hook finds out whether a call concerns adams, and what it does where it cannot tell."""

from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_adams.megatron.callers import (
    asks_for_adams,
    bound,
    global_arguments,
    is_adams,
    saves_as_adams,
)
from megatron_adams.megatron.distributed import AdamSChainedOptimizer

ADAMS = SimpleNamespace(optimizer="adams")


def save(iteration: int, model: Any, optimizer: Any = None) -> None: ...


def test_call_is_bound_with_the_functions_defaults() -> None:
    assert bound(save, (1,), {"model": "m"}) == {"iteration": 1, "model": "m", "optimizer": None}


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1, 2, 3, 4), {}), ((1, 2), {"x": 3})])
def test_call_that_does_not_fit_is_left_to_the_function(args: Any, kwargs: Any) -> None:
    """Its own error then says what is wrong."""
    assert bound(save, args, kwargs) == {}


def test_optimizer_of_a_module_tells_by_its_configuration() -> None:
    """A MIMO model's optimizer is of another class, on ranks without a module, too."""
    assert is_adams(AdamSChainedOptimizer([])) and saves_as_adams(AdamSChainedOptimizer([]))
    for config, expected in ((ADAMS, True), (SimpleNamespace(optimizer="adam"), False)):
        mimo = SimpleNamespace(config=config)
        assert not is_adams(mimo)
        assert saves_as_adams(mimo) is expected


@pytest.mark.parametrize("thing", [None, SimpleNamespace(), SimpleNamespace(optimizer="adam")])
def test_what_has_no_optimizers_name_does_not_ask(thing: Any) -> None:
    assert not asks_for_adams(thing)
    assert not saves_as_adams(thing)


def test_arguments_that_are_not_set_are_empty() -> None:
    def unset() -> Any:
        raise AssertionError("args is not initialized.")

    assert global_arguments(unset) == global_arguments(lambda: None) == Namespace()
    assert global_arguments(lambda: ADAMS) is ADAMS
