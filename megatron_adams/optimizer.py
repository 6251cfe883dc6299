"""AdamS as a torch optimizer, with the constructor of TransformerEngine's FusedAdam.

Used alone in any PyTorch training loop, and by megatron_adams.megatron inside Megatron's
optimizers. Imports torch, kernels, guards.py and precision.py; it must not import Megatron,
TransformerEngine or Apex.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from functools import cached_property, wraps
from itertools import chain
from numbers import Integral, Real
from types import NoneType
from typing import Any, NamedTuple, Self, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from megatron_adams.guards import UpdateGuards
from megatron_adams.kernels import (
    BACKENDS,
    Batch,
    Fp8Scaling,
    Mode,
    PointerTable,
    Scalars,
    correction_of,
    is_dense,
    launch,
    mode_of,
    own_backend,
    run,
    select_backend,
)
from megatron_adams.precision import read_stored, write_stored_

_SWITCHES = ("bias_correction", "adam_w_mode", "maximize")
HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", *_SWITCHES)
# In the order of an error's words.
_DTYPES = dict.fromkeys((torch.float32, torch.bfloat16, torch.float16, torch.float64)).keys()
# Classes whose data is at data_ptr().
_PLAIN = {Tensor, torch.nn.Parameter}
# Below it, squares that underflow in fp32 are no longer covered by eps, and the update has no
# bound.
_MIN_EPS = 2.0**-63


class _Unsupported(NamedTuple):
    """An argument of torch's or TransformerEngine's Adam that AdamS takes at its default only."""

    default: Any
    rule: str
    remedy: str


_UNSUPPORTED = {
    "amsgrad": _Unsupported(
        False, "AdamS keeps no second moment whose maximum it could take", "leave it out"
    ),
    "differentiable": _Unsupported(
        False, "the step writes its tensors in place, without autograd", "leave it out"
    ),
    "exp_avg_sq_dtype": _Unsupported(torch.float32, "AdamS has no exp_avg_sq", "leave it out"),
    "set_grad_none": _Unsupported(
        None, "AdamS takes it at zero_grad", "call zero_grad(set_to_none=...)"
    ),
}
# TransformerEngine's and Megatron's name of fp8 is uint8.
_EXP_AVG_DTYPES = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.bfloat16,
    torch.float16: torch.float16,
    torch.float8_e4m3fn: torch.float8_e4m3fn,
    torch.uint8: torch.float8_e4m3fn,
}
# State of these dtypes is stored with a scale per tensor.
_SCALED_DTYPES = (torch.float16, torch.float8_e4m3fn)
# The attributes that say how state is stored.
_STORAGE = (
    "master_weights",
    "master_weight_dtype",
    "store_param_remainders",
    "exp_avg_dtype",
    "use_decoupled_grad",
)
_GUARDS = ("max_update_rms", "match_update_rms", "wants_update_rms")


def _not_compiled[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.disable`: Dynamo cannot trace the driver's calls.

    At the first call, as it imports Dynamo, which takes far longer than this package. Dynamo is
    imported by then: torch's Optimizer does so where one is built.
    """
    disabled: Callable[P, R] | None = None

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if disabled is None:
            disabled = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        return disabled(*args, **kwargs)

    return call


@dataclass
class _Lists:
    """Tensors of one group that a batch is made of, and which of the group they are."""

    rows: list[int] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    main_params: list[Tensor] = field(default_factory=list)
    exp_avg_scales: list[Tensor] = field(default_factory=list)
    main_scales: list[Tensor] = field(default_factory=list)
    fp8_scaling: list[Fp8Scaling] = field(default_factory=list)
    update_sums: list[Tensor] = field(default_factory=list)
    update_factors: list[Tensor] = field(default_factory=list)


class _Pass(Enum):
    """What a step launches on all of its tensors."""

    UPDATE = auto()
    UPDATE_AND_COUNT = auto()
    COUNT = auto()  # updates nothing
    UPDATE_SCALED = auto()  # by the factors of guards.py

    @property
    def counts(self) -> bool:
        return self in (_Pass.COUNT, _Pass.UPDATE_AND_COUNT)


@dataclass
class _Columns:
    """The tensors of a group's step, but for what guards.py keeps: one of each a param.

    The params without a gradient are left out. A rank's part stands for a DTensor.

    Attributes:
        params: as the group has them.
        grads: those that are plain have their values in their memory, see `_in_memory`.
        grad_kinds: their dtypes; of decoupled gradients, which torch does not compare with their
            params as it does `param.grad`, devices and shapes, too.
        written: what is written as the param: it, its bytes or the model's copy of it.
        exp_avgs: of `state[param]`.
        main_params: master weights; None where `written` is the master itself.
        scales: by the name of the state that is stored with them.
        fp8_scaling: None where `written` has none.
        is_plain: none is of a class whose data is elsewhere than at its pointer.
    """

    params: list[Tensor]
    grads: list[Tensor]
    grad_kinds: list[Any]
    written: list[Tensor]
    exp_avgs: list[Tensor]
    main_params: list[Tensor | None]
    scales: list[dict[str, Tensor]]
    fp8_scaling: list[Fp8Scaling | None]
    is_plain: bool

    @cached_property
    def grad_pointers(self) -> list[int]:
        """Where the gradients are."""
        return [*map(Tensor.data_ptr, self.grads)]

    def row(self, index: int) -> list[Tensor]:
        """The full-size tensors of one param: what is written, gradient, exp_avg, master."""
        main_param = self.main_params[index]
        row = [self.written[index], self.grads[index], self.exp_avgs[index]]
        return row if main_param is None else [*row, main_param]

    @cached_property
    def signature(self) -> list[object] | None:
        """All else that a launch depends on: while it stays the same, so do its tables.

        None: there are tensors that no table can list.
        """
        state = [*self.written, *self.exp_avgs]
        state += [main_param for main_param in self.main_params if main_param is not None]
        tensors = [*self.grads, *state]
        # Function by function, as each step asks it of what may be thousands of tensors.
        if not self.is_plain or any(map(Tensor.is_neg, state)):
            return None
        is_contiguous = all(map(Tensor.is_contiguous, tensors))
        one_element = [scale for scales in self.scales for scale in scales.values()]
        for scaling in self.fp8_scaling:
            one_element += scaling or ()
        return [
            [*map(Tensor.data_ptr, state)],
            self.grad_kinds,
            [tensor.dtype for tensor in state],
            # Of tensors without holes that are not permuted, a table has the number of elements.
            [*map(Tensor.numel, tensors)],
            None if is_contiguous else [(tensor.shape, tensor.stride()) for tensor in tensors],
            [main_param is None for main_param in self.main_params],
            [*map(Tensor.data_ptr, one_element)],
        ]


@dataclass
class _Begun:
    """A step under way: of each group its tensors and scalars, and the guards."""

    columns: Sequence[_Columns]
    scalars: Sequence[Scalars]
    guards: UpdateGuards | None


@dataclass
class _Plan:
    """What a group's last step launched, to be launched again while no tensor has moved.

    Attributes:
        signature: of its tensors; None: it has no tables for all of them.
        tables: by backend and kind of tensors.
        rows: likewise, which of the group's tensors a table lists.
    """

    signature: list[object] | None = None
    tables: dict[tuple[str, Any], PointerTable] = field(default_factory=dict)
    rows: dict[tuple[str, Any], list[int]] = field(default_factory=dict)


class AdamS(Optimizer):
    """AdamS: the normalizer is made of the momentum and the gradient, so exp_avg is the only state.

    The formula, and its source, are in `megatron_adams.update.adams_update_`. Not the AdamS of
    `pytorch_optimizer`, which keeps exp_avg_sq.

    State: `state[param]` is `{"exp_avg": tensor}`, zeros from the first step that sees a gradient,
    and with `master_weights` also `"master_param"` for 16-bit params, in the dtypes of
    `state_dtypes`; `get_unscaled_state` gives them in full. `group["step"]` is an int, the count of
    `step()` calls since the group was added. It is the t of the bias correction, also for a param
    whose first gradient comes late: such a param starts with the small step of the paper's form.

    CUDA graphs: with `capturable`, `group["lr"]` and `group["step"]` are tensors with one element
    on the params' device, fp64 and int64, that keep their place, also in `load_state_dict`; a
    captured `step` counts on, and reads the rate that `group["lr"].fill_(...)` has set. All else
    is what it was at the capture: other hyperparameters, a `grad_scale` that is a number, and
    where the tensors are. So take one step before the capture, with the gradients where they are
    to stay. `state_dict` has plain numbers, and loads with and without `capturable`. The bits are
    those of a step without it (fp64 params with bias correction: to an ulp of the correction).

    Args:
        params: parameters, named parameters, or group dicts, as torch's optimizers take them;
            fp32, bf16, fp16 or fp64. Without master weights, small updates of bf16 and fp16
            params are lost to rounding. With them also TransformerEngine's quantized tensors:
            with delayed scaling the step itself writes their bytes, amax and scale_inv, others
            are quantized from their master weights after it.
        lr: learning rate, a float or a tensor with one element.
        betas: beta1 in [0, 1), beta2 in (0, 1). An update is at most `update_bound(...)` times
            lr: 1.026 at (0.9, 0.95), 3.29 at (0.9, 0.999), so AdamW's 0.999 is no good default
            here. Tensors with one element are read once, as in torch.
        eps: keeps a coordinate that has no gradients from moving by lr for ever, so it cannot be 0.
        weight_decay: decoupled (AdamW's) or, with `adam_w_mode=False`, L2.
        bias_correction: True is the authors' released form (first step 4.47 lr), False the
            paper's (0.447 lr). They agree after about 50 steps.
        adam_w_mode: decoupled weight decay.
        maximize: the objective is maximized: the step is the one of the negated gradients.
        foreach, fused: torch's arguments. `foreach=True` is `kernel="foreach"`. `fused=True` is the
            kernel of the params' device, "cuda" or "host", by its name: where it cannot be had
            that is an error; GradScaler then leaves unscaling and skipping to `step`, see there.
            None and False leave the choice to `kernel`; all implementations give the same bits.
        kernel: which implementation of `megatron_adams.kernels` runs: "auto", the one of the
            params' device, or foreach where it cannot be compiled; or "cuda", "host", "foreach".
        capturable: `step` can be captured into a CUDA graph, see above; each group's params lie on
            one device, and none is quantized.
        max_update_rms: cap. Where the RMS of a param's update, before lr and weight decay, is
            larger, the update is scaled down to it. None: no cap.
        match_update_rms: every param's update is scaled to this RMS. At most one of the two is
            given; each costs a pass that reads gradient and exp_avg (8 bytes a param in fp32; with
            L2 decay the master weights, too) before the step's own. Of a param that is sharded, the
            owner gives `reduce_update_sums` and `whole_numels`.
        master_weights: whether the optimizer keeps master weights of 16-bit params, as FusedAdam.
        master_weight_dtype: dtype of the master weights, as FusedAdam: fp32 or fp16.
        exp_avg_dtype: dtype of exp_avg, as FusedAdam: fp32, bf16, fp16 or e4m3 (also as uint8).
        use_decoupled_grad: whether gradients are in `param.decoupled_grad`, as FusedAdam.
        store_param_remainders: whether fp32 master weights of bf16 params are kept as the 16 bits
            that the params lack, as FusedAdam.
        amsgrad, differentiable, exp_avg_sq_dtype, set_grad_none: torch's and FusedAdam's; at their
            defaults only.

    Attributes:
        model_params: main param -> the model's bf16 or fp16 copy of it, of the same shape; `step`
            writes the copy in the same pass. Empty, unless the owner of both fills it, as
            Megatron's distributed optimizer does.
        max_update_rms: as given.
        match_update_rms: as given.
        wants_update_rms: set before a step, have it count what `update_rms` returns after it; no
            extra pass over memory, and no other bits.
        reduce_update_sums: a function that is called with this rank's sums, (num_params, 2) int64
            in the order of the groups' params. It must turn them, in place, into the sums of whole
            params: an all-reduce over the ranks that hold shards. It is called once in each guarded
            step, also where there are no params, and by `update_rms` after other steps. None: the
            params are whole.
        whole_numels: param -> how many elements its whole has, where it is a shard.
        master_weights: as given. It is read at each step, and may be set as long as there is no
            state, as Megatron-FSDP does.
        use_decoupled_grad: as given. It is read at each step, and may be set as long as there is
            no state, as Megatron-FSDP does.
        master_weight_dtype: as given.
        store_param_remainders: as given.
        exp_avg_dtype: as given.
        capturable: as given.
        fused: as given.

    Raises:
        ValueError: a hyperparameter outside its range, an argument that is not supported, or a
            parameter that is complex, sparse or not floating.
    """

    model_params: dict[Tensor, Tensor]
    reduce_update_sums: Callable[[Tensor], None] | None
    whole_numels: dict[Tensor, int]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = False,
        adam_w_mode: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        kernel: str = "auto",
        max_update_rms: float | None = None,
        match_update_rms: float | None = None,
        amsgrad: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        set_grad_none: bool | None = None,
    ) -> None:
        _refuse_unsupported(
            {
                "amsgrad": amsgrad,
                "differentiable": differentiable,
                "exp_avg_sq_dtype": exp_avg_sq_dtype,
                "set_grad_none": set_grad_none,
            }
        )
        if exp_avg_dtype not in _EXP_AVG_DTYPES:
            raise ValueError(
                f"exp_avg_dtype={exp_avg_dtype}: must be one of "
                f"{', '.join(str(dtype) for dtype in _EXP_AVG_DTYPES)}"
            )
        _check_master_weights(master_weights, master_weight_dtype, store_param_remainders)
        self.exp_avg_dtype = exp_avg_dtype
        self.master_weights = master_weights
        self.master_weight_dtype = master_weight_dtype
        self.store_param_remainders = store_param_remainders
        self.use_decoupled_grad = use_decoupled_grad
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "adam_w_mode": adam_w_mode,
            "maximize": maximize,
        }
        _check_hyperparameters(defaults)
        _take_plain_numbers(defaults)
        _check_kernel(kernel, foreach=foreach, fused=fused)
        self.kernel = "foreach" if foreach else kernel
        self.fused = bool(fused)
        self.capturable = capturable
        check_guards(max_update_rms, match_update_rms)
        self.max_update_rms = max_update_rms
        self.match_update_rms = match_update_rms
        self.wants_update_rms = False
        self.reduce_update_sums = None
        self.whole_numels = {}
        self._guards: UpdateGuards | None = None
        self._is_counted = False
        # Between `begin_step` and `step`.
        self._begun: _Begun | None = None
        self.model_params = {}
        # param -> the name of its state -> one fp32 element, where it is stored with a scale.
        self._scales: dict[Tensor, dict[str, Tensor]] = {}
        self._is_state_left_out = False
        # By the index of the group and what is launched.
        self._plans: dict[tuple[int, _Pass], _Plan] = {}
        # By their ids, so that each is there once.
        self._used_by_graphs: dict[int, object] = {}
        super().__init__(params, defaults)

    @classmethod
    def from_param_groups(cls, param_groups: Iterable[dict[str, Any]], **kwargs: Any) -> Self:
        """Build an optimizer that adopts `param_groups` as they are, for Megatron.

        The constructor refuses non-leaf tensors and an empty list; Megatron has both
        (data-parallel shards are views, and a rank can own no parameter). The dicts become this
        optimizer's groups themselves: keys of others (Megatron's wd_mult, max_lr, ...) stay,
        missing hyperparameters are filled in from `kwargs`.

        Args:
            param_groups: dicts with "params", a list of tensors; any number of them, none included.
            kwargs: the constructor's arguments after `params`.

        Raises:
            ValueError: as the constructor, or a tensor stands in two places.
        """
        optimizer = cls([{"params": []}], **kwargs)
        optimizer.param_groups = list(param_groups)
        for group in optimizer.param_groups:
            for name in HYPERPARAMETERS:
                group.setdefault(name, optimizer.defaults[name])
            group.setdefault("step", 0)
            optimizer._check_group(group)
            if optimizer.capturable:
                optimizer._move_numbers_to_device(group)
        params = [id(param) for group in optimizer.param_groups for param in group["params"]]
        if len(params) != len(set(params)):
            raise ValueError(
                f"{len(params)} parameters, {len(set(params))} of them different: each must be in "
                "one place of one group, or it is updated more than once a step"
            )
        return optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; hyperparameters that it lacks come from the defaults, its step starts at 0.

        Raises:
            ValueError: as the constructor; the group is then not added.
        """
        super().add_param_group(param_group)
        param_group.setdefault("step", 0)
        try:
            self._check_group(param_group)
            if self.capturable:
                self._move_numbers_to_device(param_group)
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse what AdamS does not do; numbers become Python's."""
        _refuse_unsupported(group)
        own = sorted(set(_STORAGE) & group.keys())
        mine = {
            "capturable": self.capturable,
            "foreach": self.kernel == "foreach",
            "fused": self.fused,
        }
        own += [name for name, value in mine.items() if group.get(name) not in (None, value)]
        if own:
            raise ValueError(
                f"{own[0]} in a param group: is one for all groups; give it to AdamS itself"
            )
        _check_hyperparameters(group)
        _take_plain_numbers(group)
        for param in group["params"]:
            _check_tensor("parameter", param)
        if self.capturable:
            _check_capturable(group["params"])

    def _move_numbers_to_device(self, group: dict[str, Any]) -> None:
        """Make a group's lr and step what a CUDA graph finds again: tensors on its device.

        Raises:
            ValueError: lr is a tensor on another device.
        """
        params = chain(group["params"], *(other["params"] for other in self.param_groups))
        if (param := next(params, None)) is not None:
            device = param.device
        else:
            # A dp rank that owns no parameter counts on the device as the others do.
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            device = torch.empty(0, dtype=torch.int64, device=device).device
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.device != device:
            raise ValueError(
                f"lr is a tensor on {lr.device} with capturable=True: must be on {device}, where "
                "the parameters are; give it as a number, or move it"
            )
        # Not fp32: a scheduler's rate is in a checkpoint what it is without a graph.
        if not isinstance(lr, Tensor):
            group["lr"] = torch.tensor(float(lr), dtype=torch.float64, device=device)
        group["step"] = torch.tensor(int(group["step"]), dtype=torch.int64, device=device)

    def __getstate__(self) -> dict[str, Any]:
        # torch's has the state and the groups alone.
        names = ("kernel", "fused", "capturable", "model_params", "whole_numels", "_scales")
        own = {name: getattr(self, name) for name in (*names, *_STORAGE, *_GUARDS)}
        fresh = {
            "_is_state_left_out": False,
            "_plans": {},
            "_used_by_graphs": {},
            "_guards": None,
            "_is_counted": False,
            "_begun": None,
            # Of the processes that this one belongs to.
            "reduce_update_sums": None,
        }
        return {**super().__getstate__(), **own, **fresh}

    def compile_kernels(
        self, grad_dtype: torch.dtype | None = None, *, counts_updates: bool = False
    ) -> None:
        """Compile, before the first step, what it needs.

        Args:
            grad_dtype: what the gradients will be; None: as their params.
            counts_updates: some steps will have `wants_update_rms`: also the kernel that counts.
        Raises:
            CompileError: the backend asked for by name has no compiler, or it fails.
            ValueError: that backend is another device's.
        """
        for param in chain.from_iterable(group["params"] for group in self.param_groups):
            mode = self._mode(param, grad_dtype or param.dtype)
            if mode is None:
                continue
            for is_guarded in {self.scales_updates, self.scales_updates or counts_updates}:
                guarded_mode = mode._replace(is_guarded=is_guarded)
                select_backend(param.device, guarded_mode, self._kernel_on(param.device))

    def _kernel_on(self, device: torch.device) -> str:
        """What `select_backend` is asked for.

        Raises:
            ValueError: fused, and there is no kernel for the device.
        """
        if not self.fused or self.kernel != "auto":
            return self.kernel
        own = own_backend(device)
        if own is None:
            raise ValueError(
                f"fused=True for parameters on {device}: must be on a CUDA device or the CPU, for "
                "which there are kernels; leave it out"
            )
        return own

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler leaves it to `step` to unscale, and to skip.

        As in torch, with `fused` alone: others refuse to clip gradients that are still scaled
        (Lightning). Not with bias correction, which counts steps: GradScaler waits, and calls no
        step that is skipped. It knows of no decoupled gradients.
        """
        return (
            self.fused
            and not self.use_decoupled_grad
            and not any(group["bias_correction"] for group in self.param_groups)
        )

    def state_dtypes(self, param: Tensor) -> dict[str, torch.dtype]:
        """The dtypes in which the state of a param is stored, by the names in `state[param]`.

        torch.int16 are remainders, see `store_param_remainders`; a quantized param has none.

        Raises:
            ValueError: a quantized param without master weights.
        """
        if param.dtype == torch.float64:
            return {"exp_avg": torch.float64}
        dtypes = {"exp_avg": _EXP_AVG_DTYPES[self.exp_avg_dtype]}
        # The dtype of a quantized tensor is the one that it pretends to have.
        quantized = is_quantized(param)
        if self.master_weights and (quantized or param.dtype != torch.float32):
            is_bf16 = param.dtype == torch.bfloat16 and not quantized
            is_remainder = self.store_param_remainders and is_bf16
            dtypes["master_param"] = torch.int16 if is_remainder else self.master_weight_dtype
        elif quantized:
            raise ValueError(
                f"quantized parameter of shape {tuple(param.shape)} without master weights: its "
                "updates would be lost to rounding; add master_weights=True"
            )
        return dtypes

    def initialize_state(self, param: Tensor) -> None:
        """Allocate `state[param]` where `step` has not done so yet: master weights, and zeros."""
        state = self.state[param]
        # Before anything else: each step asks, of each of what may be thousands of params.
        if "exp_avg" in state and ("master_param" in state or not self.master_weights):
            return
        with torch.no_grad():
            for name, dtype in self.state_dtypes(param).items():
                if name in state:
                    continue
                memory, _ = _memory(param)
                state[name] = torch.zeros_like(memory, dtype=dtype)
                if dtype in _SCALED_DTYPES:
                    scales = self._scales.setdefault(param, {})
                    scales[name] = torch.ones((), dtype=torch.float32, device=param.device)
                if name == "master_param":
                    self.set_scaled_state(param, name, param)

    @torch.no_grad()
    def get_unscaled_state(self, param: Tensor, name: str) -> Tensor:
        """Return the state of a param in full, whatever it is stored in.

        Args:
            param: one that has state.
            name: "exp_avg", or "master_param": a param without master weights is its own.
        Returns:
            param's shape, fp32 (fp64 for fp64 params); not a copy where it is stored in that dtype.
        """
        if name == "master_param" and name not in self.state[param]:
            return param.detach()
        scale = self._scales.get(param, {}).get(name)
        stored = self.state[param][name]
        full = read_stored(_local(stored), scale=scale, param=_local(param.detach()))
        return _distributed(full, stored)

    @torch.no_grad()
    def set_scaled_state(self, param: Tensor, name: str, state: Tensor) -> None:
        """Store what `get_unscaled_state` returned, in the dtype that this optimizer keeps it in.

        With `store_param_remainders`, "master_param" writes the param as well, its other half.

        Args:
            param, name: as `get_unscaled_state`.
            state: param's shape, floating.
        Raises:
            ValueError: another shape.
        """
        if state.shape != param.shape:
            raise _wrong_shape(name, state, param)
        self.initialize_state(param)
        param_part, state = _local(param), _local(state)
        if name == "master_param" and name not in self.state[param]:
            param_part.copy_(state)
            return
        if is_quantized(state):
            state = cast(Any, state).dequantize(dtype=torch.float32)
        scale = self._scales.get(param, {}).get(name)
        write_stored_(_local(self.state[param][name]), state, scale=scale, param=param_part)

    @overload
    def step(
        self,
        closure: None = None,
        *,
        grad_scale: float | Tensor = 1.0,
        found_inf: Tensor | None = None,
    ) -> None: ...

    @overload
    def step(
        self,
        closure: Callable[[], float],
        *,
        grad_scale: float | Tensor = 1.0,
        found_inf: Tensor | None = None,
    ) -> float: ...

    @_not_compiled
    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        grad_scale: float | Tensor = 1.0,
        found_inf: Tensor | None = None,
    ) -> float | None:
        """Update every parameter that has a gradient; gradients are only read.

        Args:
            closure: evaluates the model anew, with gradients enabled, and returns the loss.
            grad_scale: what the gradients are multiplied by, in fp32: the inverse of a loss scale,
                a clip coefficient, or their product. A number or a one-element tensor.
            found_inf: one fp32 element; where it is not 0 no tensor is written. Nobody waits for
                it, unless the params are on the CPU and it is not, so group["step"] counts this
                step too. The foreach backend does wait for it: not in a CUDA graph.

        With `fused`, torch.amp.GradScaler sets the attributes `grad_scale`, by which gradients are
        divided here, and `found_inf` for the time of the call: nobody waits for the GPU then.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: a gradient is sparse or complex, an update RMS is asked for of params that
                are sharded by DTensor, a CUDA graph is being captured without `capturable`, or with
                it lr is no longer a tensor beside the params; nothing is updated then.
            RuntimeError: gradients or state have moved since the last step, and a CUDA graph is
                being captured.
        """
        self._check_capture()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        grad_scale, found_inf = self._with_grad_scaler(grad_scale, found_inf)
        begun, self._begun = self._begun or self._begin(grad_scale, found_inf), None
        guards = begun.guards
        if guards is not None and self.scales_updates:
            guards.set_factors(
                self.reduce_update_sums,
                max_rms=self.max_update_rms,
                match_rms=self.match_update_rms,
            )
            self._launch(_Pass.UPDATE_SCALED, begun)
        elif guards is not None:
            self._launch(_Pass.UPDATE_AND_COUNT, begun)
        else:
            self._launch(_Pass.UPDATE, begun)
        return loss

    def _with_grad_scaler(
        self, grad_scale: float | Tensor, found_inf: Tensor | None
    ) -> tuple[float | Tensor, Tensor | None]:
        """The scalars of a step with what torch.amp.GradScaler has set, if it calls the step."""
        its_scale = getattr(self, "grad_scale", None)
        if isinstance(its_scale, Tensor):
            # As its unscale_ has it: rounded once, whatever the scale is.
            inverse = its_scale.double().reciprocal().float()
            is_one = not isinstance(grad_scale, Tensor) and grad_scale == 1.0
            grad_scale = inverse if is_one else inverse * grad_scale
        its_found_inf = getattr(self, "found_inf", None)
        # Of an optimizer without gradients it is the int 0.
        if isinstance(its_found_inf, Tensor):
            found_inf = its_found_inf if found_inf is None else its_found_inf + found_inf
        return grad_scale, found_inf

    @_not_compiled
    @torch.no_grad()
    def begin_step(
        self, *, grad_scale: float | Tensor = 1.0, found_inf: Tensor | None = None
    ) -> None:
        """Do the part of a step that writes no param: where it is guarded, count its updates.

        For the owner of several optimizers of which none may go on before all have counted.
        `step`, called next and with nothing changed, goes on from here.

        Args:
            grad_scale, found_inf: as `step`.
        Raises:
            ValueError, RuntimeError: as `step`.
        """
        self._begun = self._begin(grad_scale, found_inf)

    def _begin(self, grad_scale: float | Tensor, found_inf: Tensor | None) -> _Begun:
        # All gradients are looked at before the first parameter is written.
        columns = [self._columns(group) for group in self.param_groups]
        guards = self._guards_of_step()
        scalars = [self._advance(group, grad_scale, found_inf) for group in self.param_groups]
        begun = _Begun(columns, scalars, guards)
        if self.scales_updates:
            self._launch(_Pass.COUNT, begun)
        return begun

    def update_rms(self) -> Tensor:
        """Return the RMS of each param's update in the last step, before any factor.

        Before lr and weight decay, of whole params. Where the last step was counted for
        `wants_update_rms` alone, this calls `reduce_update_sums`: on all ranks, then.

        Returns:
            (num_params,) fp32, in the order of the groups' params; NaN where an element was not
            finite, 0 where a param had no gradient or the step was skipped by found_inf.
        Raises:
            ValueError: the last step did not count.
        """
        guards = self._counted()
        return guards.rms if self.scales_updates else guards.whole_rms(self.reduce_update_sums)

    def update_sums(self) -> Tensor:
        """What the last step has counted of the params that are here, as they are here.

        Returns:
            (num_params, 2) int64, of `megatron_adams.update.count_squares`.
        Raises:
            ValueError: as `update_rms`.
        """
        return self._counted().sums()

    def update_factors(self) -> Tensor:
        """What the updates of the last step were multiplied by, (num_params,) fp32.

        Raises:
            ValueError: as `update_rms`.
        """
        guards = self._counted()
        if self.scales_updates:
            return guards.factors
        device = guards.sums().device
        return torch.ones(len(guards.params), dtype=torch.float32, device=device)

    @property
    def is_counted(self) -> bool:
        """Whether the last step has counted what `update_rms` returns."""
        return self._is_counted

    def forget_update_rms(self) -> None:
        """Have `is_counted` say no until the next step that counts."""
        self._is_counted = False

    @property
    def scales_updates(self) -> bool:
        """Whether there is a cap or a target."""
        return self.max_update_rms is not None or self.match_update_rms is not None

    def _counted(self) -> UpdateGuards:
        if self._guards is None or not self._is_counted:
            raise ValueError(
                "the update RMS of a step that did not count it: set wants_update_rms = True "
                "before the step"
            )
        return self._guards

    def _guards_of_step(self) -> UpdateGuards | None:
        """The guards, with nothing counted, or None where a step neither counts nor scales."""
        self._is_counted = False
        if not self.scales_updates and not self.wants_update_rms:
            return None
        params = list(chain.from_iterable(group["params"] for group in self.param_groups))
        known = self._guards
        if known is None or [*map(id, known.params)] != [*map(id, params)]:
            if self.reduce_update_sums is None and any(_local(p) is not p for p in params):
                raise ValueError(
                    "the update RMS of params that are sharded by DTensor: a rank knows its own "
                    "shards alone; give reduce_update_sums and whole_numels, or leave out "
                    "max_update_rms, match_update_rms and wants_update_rms"
                )
            devices = [_local(param).device for param in params]
            self._guards = known = UpdateGuards(params, devices, self.whole_numels)
            # Their tables have the addresses of those before.
            self._plans = {k: plan for k, plan in self._plans.items() if k[1] is _Pass.UPDATE}
        known.clear()
        self._is_counted = True
        return known

    def _advance(
        self, group: dict[str, Any], grad_scale: float | Tensor, found_inf: Tensor | None
    ) -> Scalars:
        """Count a group's step; return its scalars."""
        # Before skipping what has no gradients: a group can be empty on some dp ranks, and step
        # would differ between ranks on resume.
        group["step"] += 1
        beta1, beta2 = group["betas"]
        if group["maximize"]:
            grad_scale = -grad_scale
        return Scalars(
            lr=group["lr"],
            grad_scale=grad_scale,
            correction=correction_of(group["bias_correction"], beta1, group["step"]),
            found_inf=found_inf,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled_weight_decay=group["adam_w_mode"],
        )

    def _launch(self, what: _Pass, begun: _Begun) -> None:
        """Launch a pass over the tensors of all groups."""
        only_count = what is _Pass.COUNT
        used: list[object] = [begun.guards]
        for index, columns in enumerate(begun.columns):
            scalars = begun.scalars[index]
            plan = self._plans.setdefault((index, what), _Plan())
            signature = columns.signature
            if signature is not None and signature == plan.signature:
                pointers = columns.grad_pointers
                for key, table in plan.tables.items():
                    rows = plan.rows[key]
                    grads = pointers if len(rows) == len(pointers) else [pointers[i] for i in rows]
                    launch(table, scalars, key[0], grads=grads, only_count=only_count)
                    used += (table.rows, table.amax)
                continue
            # None until all is launched: a step that fails half way has no tables for the rest.
            plan.signature, plan.rows = None, {}
            tables, plan.tables = plan.tables, {}
            is_foreach = False
            for key, rows, batch in self._batches(columns, what):
                backend, _ = key
                table = plan.tables[key] = tables.get(key) or PointerTable()
                plan.rows[key] = rows
                run(batch, scalars, backend, table, only_count=only_count)
                used += (table.rows, table.amax)
                is_foreach = is_foreach or backend == "foreach"
            plan.signature = None if is_foreach else signature
        if _is_capturing():
            # A later step outside the graph may make new ones; the graph goes on with these.
            self._used_by_graphs.update((id(each), each) for each in used)

    def _check_capture(self) -> None:
        """Refuse a capture that would repeat one step's numbers for ever."""
        if not self.capturable:
            if _is_capturing():
                raise ValueError(
                    "AdamS with capturable=False inside a CUDA graph, which would repeat this "
                    "step's learning rate and count: must be True; build it so, or step outside "
                    "the graph"
                )
            return
        for group in self.param_groups:
            if not isinstance(group["lr"], Tensor):
                raise ValueError(
                    f"lr={group['lr']} with capturable=True: must stay the tensor that it was, "
                    "which a CUDA graph reads; set it by group['lr'].fill_(...)"
                )
            if group["params"] and group["lr"].device != group["params"][0].device:
                raise ValueError(
                    f"lr on {group['lr'].device} with capturable=True: must be on "
                    f"{group['params'][0].device}, where the parameters are; build AdamS after the "
                    "model was moved"
                )

    def _columns(self, group: Mapping[str, Any]) -> _Columns:
        """Collect the tensors of a group's step; state that is missing is allocated.

        Raises:
            ValueError: a gradient is sparse or complex.
        """
        # A list of each kind at a time: a step does nothing else for a tensor that has not moved.
        params: list[Tensor] = group["params"]
        found = (
            [self._grad(p) for p in params] if self.use_decoupled_grad else [p.grad for p in params]
        )
        grads = [grad for grad in found if grad is not None]
        if len(grads) != len(params):
            params = [p for p, grad in zip(params, found, strict=True) if grad is not None]
        dtypes = [grad.dtype for grad in grads]
        if not {*dtypes} <= _DTYPES:
            _check_gradients(grads)
        kinds: list[Any] = dtypes
        if self.use_decoupled_grad:
            kinds = [(grad.dtype, grad.device, grad.shape) for grad in grads]
        states = [self.state[param] for param in params]
        has_masters = self.master_weights
        for param, state in zip(params, states, strict=True):
            if "exp_avg" not in state or (has_masters and "master_param" not in state):
                self.initialize_state(param)
        exp_avgs = [state["exp_avg"] for state in states]
        main_params = [state.get("master_param") for state in states]
        written, fp8_scaling = params, []
        is_plain = _are_plain(params, grads, exp_avgs, main_params)
        if not is_plain:
            _check_gradients(grads)
            grads, exp_avgs = [*map(_local, grads)], [*map(_local, exp_avgs)]
            main_params = [main if main is None else _local(main) for main in main_params]
            memory = [_memory(_local(param)) for param in params]
            written, fp8_scaling = [m for m, _ in memory], [scaling for _, scaling in memory]
        if self.model_params:
            # The param is the master weight of the model's copy.
            copies = [self.model_params.get(param) for param in params]
            main_params = [
                main if copy is None else param
                for param, copy, main in zip(written, copies, main_params, strict=True)
            ]
            written = [
                param if copy is None else copy for param, copy in zip(written, copies, strict=True)
            ]
        if not is_plain or self.model_params:
            is_plain = _are_plain(written, grads, exp_avgs, main_params)
        scales = [self._scales.get(param, {}) for param in params] if self._scales else []
        columns = _Columns(
            params, grads, kinds, written, exp_avgs, main_params, scales, fp8_scaling, is_plain
        )
        if is_plain:
            try:
                may_lack_memory = any(map(Tensor.is_neg, grads)) or 0 in columns.grad_pointers
            except RuntimeError:
                # A sparse tensor has no pointer.
                _check_gradients(grads)
                raise
            if not may_lack_memory:
                return columns
        return replace(columns, grads=[*map(_in_memory, grads)])

    def _batches(
        self, columns: _Columns, what: _Pass
    ) -> Iterator[tuple[tuple[str, Any], list[int], Batch]]:
        """Sort a group's tensors into what one launch takes, with its backend and a key."""
        batches: dict[tuple[str, Any], _Lists] = {}
        for index, param in enumerate(columns.params):
            tensors = columns.row(index)
            written, grad, exp_avg, *main_params = tensors
            main_dtype = main_params[0].dtype if main_params else None
            mode = mode_of(grad.dtype, written.dtype, exp_avg.dtype, main_dtype)
            if mode is not None:
                mode = mode._replace(is_guarded=what is not _Pass.UPDATE)
            device = written.device
            key: tuple[str, Any]
            if mode is None or not all(
                type(tensor) in _PLAIN
                and tensor.stride() == written.stride()
                and is_dense(tensor)
                and not tensor.is_neg()
                for tensor in tensors
            ):
                # fp64, tensors with holes or of unlike layouts, subclasses of Tensor, values that
                # are not what is in memory. Named by the dtypes, as one call takes one of each.
                key = "foreach", (device, *(tensor.dtype for tensor in tensors))
            else:
                backend = select_backend(device, mode, self._kernel_on(device))
                key = backend, (device, mode)
            lists = batches.setdefault(key, _Lists())
            lists.rows.append(index)
            for column, tensor in zip(
                (lists.params, lists.grads, lists.exp_avgs, lists.main_params),
                tensors,
                strict=False,
            ):
                column.append(tensor)
            scales = columns.scales[index] if columns.scales else {}
            if "exp_avg" in scales:
                lists.exp_avg_scales.append(scales["exp_avg"])
            if "master_param" in scales:
                lists.main_scales.append(scales["master_param"])
            if columns.fp8_scaling and (scaling := columns.fp8_scaling[index]) is not None:
                lists.fp8_scaling.append(scaling)
            if self._guards is not None and what.counts:
                lists.update_sums.append(self._guards.sums_of[param])
            if self._guards is not None and what is _Pass.UPDATE_SCALED:
                lists.update_factors.append(self._guards.factor_of[param])
        for key, lists in batches.items():
            batch = Batch(
                lists.params,
                lists.grads,
                lists.exp_avgs,
                lists.main_params or None,
                lists.exp_avg_scales or None,
                lists.main_scales or None,
                lists.fp8_scaling or None,
                lists.update_sums or None,
                lists.update_factors or None,
            )
            yield key, lists.rows, batch

    def _grad(self, param: Tensor) -> Tensor | None:
        if self.use_decoupled_grad:
            return getattr(param, "decoupled_grad", None)
        return param.grad

    def _mode(self, param: Tensor, grad_dtype: torch.dtype) -> Mode | None:
        dtypes = self.state_dtypes(param)
        model_param = self.model_params.get(param)
        if model_param is not None:
            return mode_of(grad_dtype, model_param.dtype, dtypes["exp_avg"], param.dtype)
        memory, _ = _memory(param)
        return mode_of(grad_dtype, memory.dtype, dtypes["exp_avg"], dtypes.get("master_param"))

    @contextmanager
    def state_left_out(self) -> Iterator[None]:
        """Have `state_dict` return no state, and `load_state_dict` keep the state as it is.

        For Megatron, which saves and loads the groups so, and the state by other functions.
        """
        self._is_state_left_out = True
        try:
            yield
        finally:
            self._is_state_left_out = False

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with exp_avg and master weights in full (fp32), whatever they are stored in.

        So that what was written with one set of storage options can be loaded with any other.
        """

        def give_full_state(_: Optimizer, outgoing: dict[str, Any]) -> None:
            ids = chain.from_iterable(group["params"] for group in outgoing["param_groups"])
            params = chain.from_iterable(group["params"] for group in self.param_groups)
            param_of = dict(zip(ids, params, strict=True))
            for group in outgoing["param_groups"]:
                if self.capturable:
                    group.update(lr=float(group["lr"]), step=int(group["step"]))
                # A scheduler may have set one.
                _take_plain_numbers(group)
            saved = {} if self._is_state_left_out else outgoing["state"]
            outgoing["state"] = {
                index: {name: self.get_unscaled_state(param_of[index], name) for name in state}
                for index, state in saved.items()
            }

        # Before the hooks that a user may have registered.
        with self.register_state_dict_post_hook(give_full_state, prepend=True):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, of an optimizer with these storage options or others.

        Hyperparameters that a group of the checkpoint lacks keep their current values, but for
        adam_w_mode: no group of another optimizer has it, and every one of AdamS's. A "step"
        beside exp_avg (Megatron's DistributedOptimizer writes one) is used where the group has
        none, and dropped. Master weights that the checkpoint lacks are taken from the params. As in
        torch, a tensor whose device and dtype fit is taken over, not copied.

        Raises:
            ValueError: another optimizer wrote it, or groups, shapes or hyperparameters do not
                fit, or it has master weights, and none are kept here; nothing is loaded then.
        """
        states: dict[Tensor, dict[str, Tensor]] = {}
        state_now = dict(self.state)
        numbers_now = [(group["lr"], group["step"]) for group in self.param_groups]

        def take_state(_: Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
            states.update(self._read_state(incoming))
            return {**incoming, "state": {}, "param_groups": self._read_groups(incoming)}

        def put_state(_: Optimizer) -> None:
            if self.capturable:
                # Where a graph that was captured before looks for them.
                for group, (lr, step) in zip(self.param_groups, numbers_now, strict=True):
                    group.update(lr=lr.fill_(group["lr"]), step=step.fill_(group["step"]))
            if self._is_state_left_out:
                self.state.update(state_now)
                return
            self._scales.clear()
            for param, state in states.items():
                dtypes = self.state_dtypes(param)
                plain = {k for k in state if dtypes[k] not in (torch.int16, *_SCALED_DTYPES)}
                for name in plain:
                    full = state[name].to(param.device, dtypes[name]).resolve_neg()
                    self.state[param][name] = full
                self.initialize_state(param)
                for name in state.keys() - plain:
                    self.set_scaled_state(param, name, state[name])

        # The state goes around torch's load_state_dict, which would round exp_avg to the param's
        # dtype. After the hooks that a user may have registered to convert a checkpoint, and
        # before those that read it.
        with (
            self.register_load_state_dict_pre_hook(take_state),
            self.register_load_state_dict_post_hook(put_state, prepend=True),
        ):
            super().load_state_dict(state_dict)

    def _read_state(self, incoming: Mapping[str, Any]) -> dict[Tensor, dict[str, Tensor]]:
        """Return the state of each param in a checkpoint, checked."""
        saved_ids = chain.from_iterable(group["params"] for group in incoming["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        # Not strict: torch's load_state_dict refuses groups of other sizes in its own words.
        param_of = dict(zip(saved_ids, params, strict=False))
        states = {}
        for index, saved in incoming["state"].items():
            _refuse_other_optimizer(
                f"the state of parameter {index}", set(saved), {"exp_avg", "master_param", "step"}
            )
            if "exp_avg" not in saved or index not in param_of:
                continue
            param = param_of[index]
            state = {name: tensor for name, tensor in saved.items() if name != "step"}
            if "master_param" in state and "master_param" not in self.state_dtypes(param):
                raise ValueError(
                    f"the checkpoint has master weights of parameter {index}, and this optimizer "
                    f"keeps none of a {param.dtype} parameter: build it with master_weights=True, "
                    "for the bf16 or fp16 parameters that wrote it"
                )
            for name, tensor in state.items():
                if tensor.shape != param.shape:
                    raise _wrong_shape(f"{name} of parameter {index}", tensor, param)
            states[param] = state
        return states

    def _read_groups(self, incoming: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return a checkpoint's param groups, completed and checked."""
        saved_groups: list[dict[str, Any]] = incoming["param_groups"]
        if len(saved_groups) != len(self.param_groups):
            return saved_groups  # torch's load_state_dict refuses them
        state_steps = [
            int(state["step"]) for state in incoming["state"].values() if "step" in state
        ]
        groups = []
        for index, (saved, current) in enumerate(zip(saved_groups, self.param_groups, strict=True)):
            # Adam's state is empty before its first step, and Megatron passes exp_avg alone; its
            # groups show it nevertheless: torch's have amsgrad, and no Adam's have adam_w_mode.
            _refuse_other_optimizer(f"param group {index}", {"amsgrad"} & set(saved), set(current))
            if "adam_w_mode" not in saved:
                raise _written_by_another(f"param group {index} has no 'adam_w_mode'")
            group = {**{name: current[name] for name in HYPERPARAMETERS}, **saved}
            if "step" not in group:
                if incoming["state"] and not state_steps:
                    raise ValueError(
                        f"param group {index} of the checkpoint has state and no 'step': must be "
                        "the number of steps taken; set it before loading"
                    )
                group["step"] = max(state_steps, default=0)
            group["step"] = int(group["step"])
            _check_hyperparameters(group)
            _take_plain_numbers(group)
            # TransformerEngine's FusedAdam saves a tensor with capturable=True.
            if isinstance(group["lr"], Tensor) and (
                self.capturable or not isinstance(current["lr"], Tensor)
            ):
                group["lr"] = group["lr"].item()
            groups.append(group)
        return groups


def _is_capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    # Not is_available, which asks the driver each time: under PYTORCH_NVML_BASED_CUDA_CHECK, which
    # DeepSpeed sets, half a millisecond. Nothing is captured before torch has initialized CUDA.
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()


def check_guards(max_update_rms: float | None, match_update_rms: float | None) -> None:
    """Refuse bounds of the update RMS that are none.

    Raises:
        ValueError: one is not a finite number above 0, or both are given.
    """
    for name, value in (
        ("max_update_rms", max_update_rms),
        ("match_update_rms", match_update_rms),
    ):
        if value is not None:
            words = "finite and > 0; leave it out for updates as they are"
            _check_number(name, value, lambda x: 0 < x < math.inf, words)
    if max_update_rms is not None and match_update_rms is not None:
        raise ValueError(
            f"max_update_rms={max_update_rms}, match_update_rms={match_update_rms}: must be one of "
            "the two, as an update that is matched has that RMS already; leave one out"
        )


def is_quantized(tensor: Tensor) -> bool:
    """Whether it is one of TransformerEngine's quantized tensors, of any recipe."""
    # Whoever made one has imported the module.
    module = sys.modules.get("transformer_engine.pytorch.quantized_tensor")
    return module is not None and isinstance(tensor, module.QuantizedTensor)


def fp8_memory(tensor: Tensor) -> tuple[Tensor, Fp8Scaling] | None:
    """What a Float8Tensor of TransformerEngine (2.20) with delayed scaling consists of.

    Returns:
        Its bytes, as a plain fp8 tensor of the same shape, and its scaling, all of which share
        their memory with it; None for any other tensor.
    """
    module = sys.modules.get("transformer_engine.pytorch.tensor.float8_tensor")
    if module is None or not isinstance(tensor, module.Float8Tensor):
        return None
    quantizer = tensor._quantizer
    if not isinstance(quantizer, module.Float8Quantizer):
        return None
    is_e5m2 = quantizer.dtype.name == "kFloat8E5M2"
    data = tensor._data.view(torch.float8_e5m2 if is_e5m2 else torch.float8_e4m3fn)
    return data, Fp8Scaling(quantizer.scale, quantizer.amax, tensor._scale_inv)


def _memory(param: Tensor) -> tuple[Tensor, Fp8Scaling | None]:
    """The tensor that a kernel writes as the param, and its scaling where it is fp8."""
    return fp8_memory(param) or (param, None)


def _local(tensor: Tensor) -> Tensor:
    """A rank's part of a DTensor, as FSDP2 has them; any other tensor as it is."""
    if type(tensor) is Tensor:
        return tensor
    # Whoever made a DTensor has imported the module, which takes long.
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None and isinstance(tensor, module.DTensor):
        return cast(Tensor, tensor.to_local())
    return tensor


def _are_plain(*columns: Iterable[Tensor | None]) -> bool:
    """Whether the data of all tensors is at their pointers; None stands for no tensor."""
    kinds: set[type] = set()
    for column in columns:
        kinds.update(map(type, column))
    return kinds - {NoneType} <= _PLAIN


def _in_memory(grad: Tensor) -> Tensor:
    """The gradient; a copy where its memory has not its value.

    Torch negates lazily: the gradient of what went through `conj` can be a view of its negative,
    with a mark. A zero of forward-mode AD has no memory.
    """
    if type(grad) not in _PLAIN:
        return grad
    return grad.clone() if grad._is_zerotensor() else grad.resolve_neg()


def _distributed(local: Tensor, like: Tensor) -> Tensor:
    """A DTensor of this rank's part, if `like` is one, of the same shape and placement."""
    part = _local(like)
    if part is like:
        return local
    if local is part:
        return like
    source = cast(Any, like)
    return cast(
        Tensor,
        type(source).from_local(
            local,
            source.device_mesh,
            source.placements,
            run_check=False,
            shape=source.shape,
            stride=source.stride(),
        ),
    )


def _wrong_shape(what: str, tensor: Tensor, param: Tensor) -> ValueError:
    return ValueError(
        f"{what} has shape {tuple(tensor.shape)} in the checkpoint: must be the parameter's, "
        f"{tuple(param.shape)}; load it into the model that wrote it"
    )


def _check_master_weights(is_kept: bool, dtype: torch.dtype, as_remainders: bool) -> None:
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(
            f"master_weight_dtype={dtype}: must be torch.float32 or torch.float16; with fp32, "
            "store_param_remainders=True keeps the same 16 bits and loses nothing"
        )
    if not is_kept and (as_remainders or dtype != torch.float32):
        raise ValueError(
            f"master_weight_dtype={dtype}, store_param_remainders={as_remainders} without master "
            "weights: must be torch.float32 and False; add master_weights=True"
        )
    if as_remainders and dtype != torch.float32:
        raise ValueError(
            f"store_param_remainders=True with master_weight_dtype={dtype}: must be torch.float32, "
            "as a remainder is the lower half of an fp32 number; leave one of them out"
        )


def _refuse_unsupported(options: Mapping[str, Any]) -> None:
    for name, (default, rule, remedy) in _UNSUPPORTED.items():
        if options.get(name, default) != default:
            raise ValueError(f"{name}={options[name]}: must be {default}, as {rule}; {remedy}")


def _refuse_other_optimizer(where: str, keys: set[str], known: set[str]) -> None:
    if unknown := sorted(keys - known):
        raise _written_by_another(f"{where} has {unknown}")


def _written_by_another(evidence: str) -> ValueError:
    return ValueError(
        f"this checkpoint was written by Adam or another optimizer: {evidence}, and "
        "AdamS keeps exp_avg alone; go on from Adam's momentum (Megatron: --adams-from-adam; "
        "elsewhere: megatron_adams.checkpoint.state_dict_from_adam), or load the model's weights "
        "only and let the optimizer start anew (Megatron: --no-load-optim, or --finetune)"
    )


def _check_kernel(kernel: str, *, foreach: bool | None, fused: bool | None) -> None:
    """Refuse a choice of the implementation that says two things.

    Raises:
        ValueError: an unknown kernel, or arguments that contradict each other.
    """
    if kernel not in ("auto", *BACKENDS):
        raise ValueError(f"kernel={kernel!r}: must be one of {('auto', *BACKENDS)}")
    if fused and foreach:
        raise ValueError(
            "fused=True, foreach=True: must be one of the two, as in torch; leave one out"
        )
    if fused and kernel == "foreach":
        raise ValueError(
            "fused=True with kernel='foreach': must be 'auto', 'cuda' or 'host'; leave one out"
        )
    if foreach and kernel not in ("auto", "foreach"):
        raise ValueError(f"foreach=True with kernel={kernel!r}: must be 'foreach'; leave one out")


def _check_capturable(params: Iterable[Tensor]) -> None:
    devices = {param.device for param in params}
    if len(devices) > 1:
        raise ValueError(
            f"capturable=True with parameters of one group on {sorted(map(str, devices))}: must "
            "be on one device, as the group's lr is; give each device a group of its own"
        )
    if any(map(is_quantized, params)):
        raise ValueError(
            "capturable=True with quantized parameters: must be floating ones, as with FusedAdam; "
            "step outside the CUDA graph"
        )


def _check_hyperparameters(group: Mapping[str, Any]) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr={lr}: a tensor must have one element")
        lr = lr.item()
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas={betas}: must be two numbers, (beta1, beta2)")
    for index, beta in enumerate(betas):
        if isinstance(beta, Tensor) and beta.numel() != 1:
            raise ValueError(f"betas[{index}]={beta}: a tensor must have one element")
    beta1, beta2 = map(_plain_number, betas)
    _check_number("lr", lr, lambda x: 0 <= x < math.inf, "finite and >= 0")
    _check_number("beta1", beta1, lambda x: 0 <= x < 1, "in [0, 1)")
    _check_number(
        "beta2", beta2, lambda x: 0 < x < 1, "in (0, 1): at 0 and 1 the update has no bound"
    )
    _check_number(
        "eps",
        group["eps"],
        lambda x: _MIN_EPS <= x < math.inf,
        "finite and >= 2**-63 = 1.1e-19: a coordinate without gradients ends at 0 / (0 + eps)",
    )
    _check_number(
        "weight_decay", group["weight_decay"], lambda x: 0 <= x < math.inf, "finite and >= 0"
    )


def _check_number(name: str, value: object, rule: Callable[[float], bool], words: str) -> None:
    if not isinstance(value, Real):
        raise ValueError(
            f"{name}={value!r}: must be a number, and is a {type(value).__name__}; give a float"
        )
    # A rule says what is right, not what is wrong: NaN satisfies none.
    if not rule(float(value)):
        raise ValueError(f"{name}={value}: must be {words}")


def _take_plain_numbers(group: dict[str, Any]) -> None:
    """Make Python's numbers and bools of others (NumPy's), which torch.load would refuse to load.

    Betas become a tuple of numbers; as in torch, their tensors are read once. lr and step may be
    tensors.
    """
    for name, value in group.items():
        if name != "params" and not isinstance(value, Tensor):
            group[name] = bool(value) if name in _SWITCHES else _plain_number(value)
    if "betas" in group:
        group["betas"] = tuple(map(_plain_number, group["betas"]))


def _plain_number(value: Any) -> Any:
    """The int or float of a number of another type or of a tensor; anything else as it is."""
    if isinstance(value, Tensor):
        return value.item()
    kind: type = type(value)
    if not isinstance(value, Real) or kind in (bool, int, float):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _check_gradients(grads: Iterable[Tensor]) -> None:
    for grad in grads:
        _check_tensor("gradient", grad)


def _check_tensor(what: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise ValueError(
            f"{what} of shape {tuple(tensor.shape)} has layout={tensor.layout}: must be dense; "
            "build an embedding with sparse=False, or call .to_dense()"
        )
    if tensor.dtype not in _DTYPES:
        raise ValueError(
            f"{what} of shape {tuple(tensor.shape)} has dtype={tensor.dtype}: must be one of "
            f"{', '.join(str(dtype) for dtype in _DTYPES)}; a complex one can be optimized "
            "through torch.view_as_real"
        )
