"""inner.py: what Megatron's side calls is there in both classes that stand in Adam's place."""

import inspect

import pytest
import torch

from megatron_adams import AdamS
from megatron_adams.megatron.inner import InnerAdamS
from megatron_adams.megatron.offload import HybridAdamS

# Of the attributes, HybridAdamS sets most in its constructor, which needs a GPU's streams.
METHODS = [name for name, value in vars(InnerAdamS).items() if inspect.isfunction(value)]
METHODS = [name for name in METHODS if not name.startswith("_")]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", [AdamS, HybridAdamS])
def test_method_takes_the_arguments_that_the_protocol_names(kind: type, name: str) -> None:
    wanted = inspect.signature(getattr(InnerAdamS, name)).parameters
    given = inspect.signature(getattr(kind, name)).parameters
    assert list(wanted) == list(given)
    assert [each.default for each in wanted.values()] == [each.default for each in given.values()]


def test_attributes_of_the_protocol_are_those_of_adams() -> None:
    optimizer = AdamS([torch.zeros(1)])
    assert {*METHODS} >= {"state_dtypes", "compile_kernels", "update_sums"}
    assert not [name for name in InnerAdamS.__protocol_attrs__ if not hasattr(optimizer, name)]
