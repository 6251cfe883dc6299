"""The bytes of weights, gradients and optimizer state of one rank, by kind."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from megatron_adams.optimizer import AdamS

MAIN_PARAMS, REMAINDERS, SCALES = "main_params", "remainders", "scales"
EXP_AVG_SQ = "exp_avg_sq"


def num_bytes(tensor: torch.Tensor) -> int:
    """Bytes of the elements."""
    return tensor.numel() * tensor.element_size()


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _model_tensors(model: Sequence[Any]) -> list[torch.Tensor]:
    """What holds the model's weights: DDP's param buffers, and the params outside of them."""
    buffers = [
        buffer.param_data
        for chunk in model
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        if buffer.param_data is not None
    ]
    held = {_storage(buffer) for buffer in buffers}
    others = {}
    for chunk in model:
        for param in chunk.parameters():
            if _storage(param) not in held:
                others[_storage(param)] = param
    return [*buffers, *others.values()]


def weight_bytes(model: Sequence[Any]) -> int:
    """Bytes of the model params of this rank, with the padding of the buckets."""
    return sum(num_bytes(tensor) for tensor in _model_tensors(model))


def gradient_bytes(model: Sequence[Any]) -> int:
    """Bytes of main_grad of this rank: DDP's gradient buffers, with the padding of the buckets."""
    total = 0
    for chunk in model:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            total += num_bytes(buffer.grad_data)
            total += sum(num_bytes(grad) for grad in buffer.extra_main_grads)
    return total


@dataclasses.dataclass
class Tally:
    """What a rank's optimizers hold of model params of one width.

    Attributes:
        numel: elements of the inner optimizers' params.
        num_tensors: how many there are.
        kinds: bytes by kind of state.
    """

    numel: int = 0
    num_tensors: int = 0
    kinds: Counter[str] = dataclasses.field(default_factory=Counter)


def optimizer_tallies(chain: Any, model: Sequence[Any], params_itemsize: int) -> dict[int, Tally]:
    """Count the tensors that the optimizers of this rank hold, by the width of the model params.

    A param that lies in the model's memory, or in a checkpoint's, is not counted as main param.
    torch's Adam has a `step` tensor a param, which lies on the CPU: it is not counted.

    Args:
        chain: what `get_megatron_optimizer` returned, with state.
        params_itemsize: bytes of a model param that has an fp32 main param.
    """
    models = {_storage(tensor) for tensor in _model_tensors(model)}
    tallies: dict[int, Tally] = {}
    for part in chain.chained_optimizers:
        inner = part.optimizer
        if inner is None:
            continue
        for group in inner.param_groups:
            for param in group["params"]:
                is_own = _storage(param) not in models
                width = params_itemsize if is_own else param.element_size()
                tally = tallies.setdefault(width, Tally())
                tally.numel += param.numel()
                tally.num_tensors += 1
                if is_own:
                    tally.kinds[MAIN_PARAMS] += num_bytes(param)
                for name, tensor in inner.state.get(param, {}).items():
                    if name == "master_param":
                        is_remainder = tensor.dtype == torch.int16
                        tally.kinds[REMAINDERS if is_remainder else MAIN_PARAMS] += num_bytes(
                            tensor
                        )
                    elif name != "step":
                        tally.kinds[name] += num_bytes(tensor)
                if isinstance(inner, AdamS):
                    scales = inner._scales.get(param, {}).values()
                    if scales:
                        tally.kinds[SCALES] += sum(map(num_bytes, scales))
    return tallies


def as_adam(tallies: dict[int, Tally], settings: dict[str, Any]) -> dict[int, Tally]:
    """What TransformerEngine's FusedAdam holds where AdamS holds `tallies`, precision-aware.

    FusedAdam (TransformerEngine 2.20, pytorch/optimizers/fused_adam.py, _initialize_state) has an
    fp32 scale for each state tensor whose dtype is not fp32. A Float8Tensor has a scale of its own,
    its inverse, and an amax.
    """
    states = [settings["exp_avg_dtype"], settings.get("exp_avg_sq_dtype", torch.float32)]
    per_state = sum(4 * (d != torch.float32) + 12 * (d == torch.uint8) for d in states)
    counted = {}
    for width, tally in tallies.items():
        kinds = Counter(tally.kinds)
        kinds[EXP_AVG_SQ] = tally.numel * states[1].itemsize
        # fp16 main params are the inner optimizer's, whatever the recipe of fp8 is.
        has_scaled_main = width < 4 and settings["main_params_dtype"] != torch.float32
        kinds[SCALES] = tally.num_tensors * (per_state + 4 * has_scaled_main)
        counted[width] = Tally(tally.numel, tally.num_tensors, +kinds)
    return counted


@dataclasses.dataclass(frozen=True)
class Rates:
    """Bytes of the optimizer an element and a tensor of model params of one width, by kind."""

    per_element: dict[str, int]
    per_tensor: dict[str, int]

    @classmethod
    def of(cls, tally: Tally) -> "Rates":
        """The rates of a tally. They are whole numbers, as a kind has one dtype."""
        per_element: dict[str, int] = {}
        per_tensor: dict[str, int] = {}
        for kind, size in tally.kinds.items():
            is_scale = kind == SCALES
            rate, rest = divmod(size, tally.num_tensors if is_scale else tally.numel)
            assert rest == 0, (kind, size, tally)
            (per_tensor if is_scale else per_element)[kind] = rate
        return cls(per_element, per_tensor)

    def bytes_of(self, numel: int, num_tensors: int) -> Counter[str]:
        """Bytes by kind."""
        counted = Counter({kind: rate * numel for kind, rate in self.per_element.items()})
        counted.update({kind: rate * num_tensors for kind, rate in self.per_tensor.items()})
        return counted
