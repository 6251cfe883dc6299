"""Megatron's GPT layers as shapes: the params that a job's layers have, in their order.

`memory/rank.py` builds models of them to count bytes. The layers of --transformer-impl
transformer_engine need TransformerEngine, a GPU or both to be built; the modules here have their
params alone (TransformerEngine 2.20, module/layernorm_linear.py, grouped_linear.py): the same
shapes in the same order, which decides where Megatron's buckets end. Nothing here can run a
forward pass.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.models import backends
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt import gpt_layer_specs, moe_module_specs
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import transformer_block
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import (
    GroupedMLPSubmodules,
    SequentialMLP,
    TEGroupedMLP,
)
from megatron.core.utils import divide


def _param(config: Any, *shape: int) -> torch.nn.Parameter:
    device = torch.device("cuda", torch.cuda.current_device())
    return torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))


class Norm(torch.nn.Module):
    """LayerNorm or RMSNorm: weight, and bias of LayerNorm, each (hidden_size,)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.weight = _param(config, hidden_size)
        if config.normalization == "LayerNorm":
            self.bias = _param(config, hidden_size)


class Attention(torch.nn.Module):
    """Scaled dot products: no params."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


class NormAndColumnParallelLinear(ColumnParallelLinear):
    """TransformerEngine's LayerNormLinear: the norm's params come before the linear layer's."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        linear = list(self._parameters.items())
        self._parameters.clear()
        self.layer_norm_weight = _param(config, input_size)
        if config.normalization == "LayerNorm":
            self.layer_norm_bias = _param(config, input_size)
        for name, param in linear:
            self.register_parameter(name, param)


class DuplicatedLinear(torch.nn.Module):
    """A linear layer that each tp rank has whole: weight (output_size, input_size), bias."""

    def __init__(
        self, input_size: int, output_size: int, *, config: Any, bias: bool, **_: Any
    ) -> None:
        super().__init__()
        self.weight = _param(config, output_size, input_size)
        if bias:
            self.bias = _param(config, output_size)


class _GroupedLinear(torch.nn.Module):
    """TransformerEngine's GroupedLinear: all experts' weights, then all their biases.

    Attributes:
        split_dim: the dimension of (output_size, input_size) that the expert tp ranks share out.
    """

    split_dim: int

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        bias: bool,
        pg_collection: Any,
        **_: Any,
    ) -> None:
        super().__init__()
        weight = [output_size, input_size]
        weight[self.split_dim] = divide(weight[self.split_dim], pg_collection.expt_tp.size())
        # megatron/core/extensions/transformer_engine.py, TEGroupedLinear, 0.19.
        sizes = config.expert_tensor_parallel_size, config.tensor_model_parallel_size
        is_expert_parallel = config.expert_model_parallel_size > 1 or sizes[0] != sizes[1]
        for kind, shape in (("weight", weight), *([("bias", weight[:1])] if bias else [])):
            for index in range(num_gemms):
                param = _param(config, *shape)
                param.allreduce = not is_expert_parallel  # type: ignore[attr-defined]
                self.register_parameter(f"{kind}{index}", param)


class GroupedColumnParallelLinear(_GroupedLinear):
    """Each expert's weight is (output_size / etp, input_size)."""

    split_dim = 0


class GroupedRowParallelLinear(_GroupedLinear):
    """Each expert's weight is (output_size, input_size / etp)."""

    split_dim = 1


class LocalShapes(BackendSpecProvider):
    """In the place of Megatron's LocalSpecProvider."""

    def column_parallel_linear(self) -> type:
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return RowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return False

    def column_parallel_layer_norm_linear(self) -> type | None:
        return None

    def layer_norm(self, **_: bool) -> type:
        return Norm

    def core_attention(self) -> type:
        return Attention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        return partial(SequentialMLP, submodules=mlp)

    def activation_func(self) -> None:
        return None


class TransformerEngineShapes(LocalShapes):
    """In the place of Megatron's TESpecProvider."""

    def linear(self) -> type:
        return DuplicatedLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return NormAndColumnParallelLinear

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        if not moe_use_grouped_gemm:
            return super().grouped_mlp_modules(moe_use_grouped_gemm)
        experts = GroupedMLPSubmodules(
            linear_fc1=GroupedColumnParallelLinear, linear_fc2=GroupedRowParallelLinear
        )
        return partial(TEGroupedMLP, submodules=experts)


@contextmanager
def built_of_shapes() -> Iterator[None]:
    """Have Megatron's layer specs name the modules above."""
    with ExitStack() as stack:
        for module, name, value in (
            (gpt_layer_specs, "TESpecProvider", TransformerEngineShapes),
            (gpt_layer_specs, "LocalSpecProvider", LocalShapes),
            (gpt_layer_specs, "TENorm", Norm),
            (gpt_layer_specs, "LNImpl", Norm),
            (moe_module_specs, "TESpecProvider", TransformerEngineShapes),
            (moe_module_specs, "LocalSpecProvider", LocalShapes),
            (backends, "LNImpl", Norm),
            (transformer_block, "LayerNormImpl", Norm),
        ):
            stack.enter_context(patch.object(module, name, value))
        yield
