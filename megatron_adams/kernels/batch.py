"""What one call of `multi_tensor_adams` works on: the tensors, checked, and the scalars.

Called by the backends in this folder. Imports torch, modes.py, table.py and update.py.
"""

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from megatron_adams.kernels.modes import ALL_MODES, Mode
from megatron_adams.kernels.table import PointerTable
from megatron_adams.update import bias_correction_factor

_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e5m2: "e5m2",
}
_MAIN_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.int16: "remainder"}
_MODES = frozenset(ALL_MODES)
# The values of `Decay` in source/element.h.
_NO_DECAY, _DECOUPLED, _L2 = 0, 1, 2


class Fp8Scaling(NamedTuple):
    """The three numbers of delayed scaling of an fp8 param; each is a one-element fp32 tensor.

    Attributes:
        scale: only read; the main param is multiplied by it before it is cast.
        amax: raised to the largest magnitude of the main param.
        scale_inv: set to 1 / scale.
    """

    scale: Tensor
    amax: Tensor
    scale_inv: Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Tensors with the same index belong together; `multi_tensor_adams` describes the lists."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    main_params: Sequence[Tensor] | None = None
    exp_avg_scales: Sequence[Tensor] | None = None
    main_scales: Sequence[Tensor] | None = None
    fp8_scaling: Sequence[Fp8Scaling] | None = None
    update_sums: Sequence[Tensor] | None = None
    update_factors: Sequence[Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """The device of the first param. `check` compares the others with it."""
        return self.params[0].device

    @cached_property
    def mode(self) -> Mode:
        """The mode, from the dtypes of the first tensor of each list.

        Raises:
            ValueError: no kernel exists for these dtypes.
        """
        mode = mode_of(
            self.grads[0].dtype,
            self.params[0].dtype,
            self.exp_avgs[0].dtype,
            self.main_params[0].dtype if self.main_params is not None else None,
        )
        if mode is None:
            main = self.main_params[0].dtype if self.main_params is not None else None
            raise ValueError(
                f"grads {self.grads[0].dtype}, params {self.params[0].dtype}, exp_avgs "
                f"{self.exp_avgs[0].dtype}, main_params {main}: no kernel is for these; grads can "
                "be fp32, bf16 or fp16, and exp_avgs fp32, bf16, fp16 or float8_e4m3fn. Params can "
                "be fp32, bf16 or fp16 without main_params; bf16, fp16 or fp8 with fp32 or fp16 "
                "main_params; and bf16 with int16 remainders"
            )
        guarded = self.update_sums is not None or self.update_factors is not None
        return mode._replace(is_guarded=guarded)

    def columns(self) -> Iterator[tuple[str, Sequence[Tensor] | None]]:
        """Yield the name of each list of full-size tensors, and the list."""
        yield "grads", self.grads
        yield "params", self.params
        yield "exp_avgs", self.exp_avgs
        yield "main_params", self.main_params

    def scale_columns(self) -> Iterator[tuple[str, Sequence[Tensor] | None]]:
        """Yield the names and lists of scales, in the order of table.POINTERS."""
        fp8 = self.fp8_scaling
        for field in Fp8Scaling._fields:
            column = None if fp8 is None else [getattr(scaling, field) for scaling in fp8]
            yield f"fp8_scaling.{field}", column
        yield "exp_avg_scales", self.exp_avg_scales
        yield "main_scales", self.main_scales

    def guard_columns(self) -> Iterator[tuple[str, Sequence[Tensor] | None]]:
        """Yield the names and lists of the guards' tensors, in the order of table.POINTERS."""
        yield "update_sums", self.update_sums
        yield "update_factors", self.update_factors

    def all_columns(self) -> Iterator[tuple[str, Sequence[Tensor] | None]]:
        """Yield the names and lists of all tensors, in the order of table.POINTERS."""
        yield from self.columns()
        yield from self.scale_columns()
        yield from self.guard_columns()

    def check(self) -> None:
        """Refuse lists that do not fit together.

        Raises:
            ValueError: lengths, dtypes, devices or shapes differ; scaled state has no scales, or
                scales have no scaled state.
        """
        num_tensors = len(self.params)
        for name, column in self.all_columns():
            if column is None:
                continue
            if len(column) != num_tensors:
                raise ValueError(
                    f"{len(column)} {name} for {num_tensors} params: must be one for each"
                )
            dtypes = {tensor.dtype for tensor in column}
            if len(dtypes) > 1:
                raise ValueError(
                    f"{name} have dtypes {sorted(map(str, dtypes))}: must be one; call once for "
                    "each"
                )
            devices = {tensor.device for tensor in column}
            if devices != {self.device}:
                raise ValueError(
                    f"{name} lie on {sorted(map(str, devices))} and params[0] on {self.device}: "
                    "all must be on one device"
                )
        shapes = [param.shape for param in self.params]
        for name, column in self.columns():
            if column is not None and (other := [tensor.shape for tensor in column]) != shapes:
                index = next(i for i in range(num_tensors) if other[i] != shapes[i])
                raise ValueError(
                    f"{name}[{index}] has shape {tuple(other[index])} and its param "
                    f"{tuple(shapes[index])}: must be equal"
                )
        needed = {
            "exp_avg_scales": self.exp_avgs[0].dtype in (torch.float16, torch.float8_e4m3fn),
            "main_scales": self.main_params is not None
            and self.main_params[0].dtype == torch.float16,
        }
        is_fp8 = self.params[0].dtype.itemsize == 1
        for name, column in self.scale_columns():
            if (column is not None) != needed.get(name, is_fp8):
                found = "missing" if column is None else "given"
                raise ValueError(
                    f"{name.partition('.')[0]} {found}: fp16 and fp8 exp_avgs, fp16 main_params "
                    "and fp8 params need their scales, others have none"
                )
            if column is not None and any(
                scale.numel() != 1 or scale.dtype != torch.float32 for scale in column
            ):
                raise ValueError(f"{name}: each must have one fp32 element")
        for name, column in self.guard_columns():
            numel, dtype = (1, torch.float32) if name == "update_factors" else (2, torch.int64)
            for tensor in column or ():
                if tensor.numel() != numel or tensor.dtype != dtype or not tensor.is_contiguous():
                    raise ValueError(
                        f"{name}: one has shape {tuple(tensor.shape)} and {tensor.dtype}: each "
                        f"must have {numel} {dtype} elements, side by side"
                    )

    def check_layout(self) -> None:
        """Refuse tensors that a kernel cannot read, because it walks through memory.

        Raises:
            ValueError: the strides of tensors with one index differ or leave holes, or a tensor's
                memory does not hold its values.
        """
        for name, column in self.all_columns():
            if any(map(Tensor.is_neg, column or ())):
                raise ValueError(
                    f"{name}: one is the negative of what its memory has (is_neg()): must be what "
                    "is in memory; call .resolve_neg()"
                )
        for name, column in self.columns():
            for param, tensor in zip(self.params, column or (), strict=False):
                if tensor.stride() != param.stride() or not is_dense(tensor):
                    raise ValueError(
                        f"{name} of shape {tuple(tensor.shape)} with strides {tensor.stride()}, "
                        f"param's {param.stride()}: must be equal and without holes; use "
                        "backend='foreach'"
                    )


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill a stretch of memory, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def mode_of(
    grad: torch.dtype, param: torch.dtype, exp_avg: torch.dtype, main: torch.dtype | None
) -> Mode | None:
    """Return the mode of these dtypes, or None if no kernel exists for them."""
    mode = Mode(
        _NAMES.get(grad, "?"),
        _NAMES.get(param, "?"),
        _NAMES.get(exp_avg, "?"),
        "none" if main is None else _MAIN_NAMES.get(main, "?"),
    )
    return mode if mode in _MODES else None


@dataclass(frozen=True)
class Scalars:
    """The scalars of a step. `multi_tensor_adams` describes them."""

    lr: float | Tensor
    grad_scale: float | Tensor
    correction: float | Tensor
    found_inf: Tensor | None
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled_weight_decay: bool
    nesterov: bool = False
    cautious: bool = False

    def kernel_of(self, mode: Mode) -> Mode:
        """Return the mode with the code that these scalars ask for."""
        return mode._replace(is_nesterov=self.nesterov, is_cautious=self.cautious)

    def check(self) -> None:
        """Refuse tensors that are not scalars.

        Raises:
            ValueError: a tensor has more or fewer than one element, or found_inf is not fp32.
        """
        for name in ("lr", "grad_scale", "correction", "found_inf"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(f"{name} has {value.numel()} elements: must have one")
        found_inf = self.found_inf
        if found_inf is not None and found_inf.dtype != torch.float32:
            raise ValueError(f"found_inf is {found_inf.dtype}: must be torch.float32")

    @property
    def decay(self) -> int:
        """The kind of weight decay, a value of `Decay` in source/element.h."""
        if self.weight_decay == 0:
            return _NO_DECAY
        return _DECOUPLED if self.decoupled_weight_decay else _L2


def correction_of(
    bias_correction: bool | Tensor, beta1: float, step: int | Tensor
) -> float | Tensor:
    """Return the factor of exp_avg, for `bias_correction` as `multi_tensor_adams` takes it.

    If the step is a tensor, the factor is computed in double on its device, without a wait.
    """
    if isinstance(bias_correction, Tensor):
        return bias_correction
    if isinstance(step, Tensor):
        return bias_correction_factor(beta1, step.double()) if bias_correction else 1.0
    return bias_correction_factor(beta1, step) if bias_correction else 1.0


def update_table(batch: Batch, table: PointerTable, *, is_capturing: bool = False) -> None:
    """Make `table` describe the tensors of `batch`."""
    columns = [column for _, column in batch.all_columns()]
    table.update(columns, mode=batch.mode, device=batch.device, is_capturing=is_capturing)


def update_gradients(table: PointerTable, grads: list[int], *, is_capturing: bool = False) -> None:
    """Make `table` describe the same tensors with the gradients at other addresses."""
    table.move_gradients(grads, is_capturing=is_capturing)


Argument: TypeAlias = "ctypes._SimpleCData[Any]"


class Arguments(NamedTuple):
    """The arguments of an entry point (ADAMS_PARAMETERS in source/multi_tensor.h).

    Attributes:
        values: the arguments as ctypes; pointers are c_void_p.
        keepalive: the tensors that they point to.
    """

    values: list[Argument]
    keepalive: list[Tensor]


def kernel_arguments(table: PointerTable, scalars: Scalars) -> Arguments:
    """Build the arguments of an entry point for the tensors that `table` describes."""
    keepalive = []

    def scalar(value: float | Tensor) -> tuple[ctypes.c_float, ctypes.c_void_p]:
        if not isinstance(value, Tensor):
            return ctypes.c_float(value), ctypes.c_void_p(0)
        if value.device != table.device and "cpu" in (value.device.type, table.device.type):
            # Reading a CPU tensor waits for nothing. A kernel on the CPU has to wait for the GPU.
            return ctypes.c_float(value.item()), ctypes.c_void_p(0)
        value = value.to(table.device, torch.float32, non_blocking=True).resolve_neg()
        keepalive.append(value)
        return ctypes.c_float(0.0), ctypes.c_void_p(value.data_ptr())

    found_inf = scalars.found_inf
    if found_inf is not None:
        found_inf = found_inf.to(table.device, non_blocking=table.device.type != "cpu")
        keepalive.append(found_inf)
    values: list[Argument] = [
        ctypes.c_void_p(table.rows.data_ptr()),
        ctypes.c_int(table.num_tensors),
        ctypes.c_int(table.chunk_size),
        ctypes.c_void_p(table.amax.data_ptr()),
        *scalar(scalars.lr),
        *scalar(scalars.grad_scale),
        *scalar(scalars.correction),
        ctypes.c_void_p(0 if found_inf is None else found_inf.data_ptr()),
        ctypes.c_float(scalars.beta1),
        ctypes.c_float(1 - scalars.beta1),
        ctypes.c_float(scalars.beta2),
        ctypes.c_float(1 - scalars.beta2),
        ctypes.c_float(scalars.eps),
        ctypes.c_float(scalars.weight_decay),
        ctypes.c_int(scalars.decay),
    ]
    return Arguments(values, keepalive)
