"""What a step launches: each group's tensors, sorted into batches, and what is launched again.

`gather` walks over the params of a group once. What it collects answers two questions: whether the
tables of the last step still hold (`ParamTensors.signature`), and if not, what a launch takes
(`ParamTensors.batch`). Used by adams.py. Imports torch, kernels, guards.py and tensors.py.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from megatron_adams.kernels import (
    Batch,
    Fp8Scaling,
    Mode,
    PointerTable,
    Scalars,
    correction_of,
    is_dense,
    launch,
    mode_of,
    run,
)
from megatron_adams.optimizer.guards import UpdateGuards
from megatron_adams.optimizer.tensors import (
    DTYPES,
    PLAIN,
    are_plain,
    check_gradients,
    in_memory,
    local_part,
    memory_of,
)


class Pass(Enum):
    """What a step launches on all of its tensors."""

    UPDATE = auto()
    UPDATE_AND_COUNT = auto()
    COUNT = auto()  # updates nothing
    UPDATE_SCALED = auto()  # by the factors of guards.py

    @property
    def counts(self) -> bool:
        """Whether it adds the squares of the updates to the sums of guards.py."""
        return self in (Pass.COUNT, Pass.UPDATE_AND_COUNT)


T = TypeVar("T")

# What says which tensors go into one launch: its backend, and what they have in common.
Key: TypeAlias = tuple[str, Any]


class Kind(NamedTuple):
    """What the kernels of a pass over a group do besides the paper's step, as `Mode` has it."""

    is_guarded: bool
    is_nesterov: bool
    is_cautious: bool


@dataclass
class ParamTensors:
    """The tensors of a group's step: a list of each kind, with one entry for each param.

    Params without a gradient are left out. For a DTensor the lists have this rank's part. What
    guards.py keeps is not here: it belongs to the step, not to the params.

    Attributes:
        params: as the group has them.
        grads: those that are plain have their values in their memory, see `in_memory`.
        grad_kinds: their dtypes. Decoupled gradients have device and shape here, too: torch
            compares `param.grad` with its param, and does not compare these.
        written: what is written as the param: it, its bytes or the model's copy of it.
        exp_avgs: of `state[param]`.
        main_params: master weights; None where `written` is the master itself.
        scales: by the name of the state that is stored with them; empty: no state has any.
        fp8_scaling: None where `written` has none; empty: nothing has any.
        is_plain: no tensor is of a class whose data is elsewhere than at its pointer.
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

    @cached_property
    def signature(self) -> list[object] | None:
        """Everything else that a launch depends on: while it stays the same, so do its tables.

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

    def key(self, row: int, choose_backend: Callable[[torch.device, Mode], str], kind: Kind) -> Key:
        """Say which launch one param goes into: params with equal keys share one."""
        written, grad, exp_avg = self.written[row], self.grads[row], self.exp_avgs[row]
        main_param = self.main_params[row]
        main_dtype = None if main_param is None else main_param.dtype
        tensors = [written, grad, exp_avg] + ([] if main_param is None else [main_param])
        mode = mode_of(grad.dtype, written.dtype, exp_avg.dtype, main_dtype)
        device, strides = written.device, written.stride()
        if mode is None or not all(
            type(tensor) in PLAIN
            and tensor.stride() == strides
            and is_dense(tensor)
            and not tensor.is_neg()
            for tensor in tensors
        ):
            # fp64, tensors with holes or of unlike layouts, subclasses of Tensor, values that
            # are not what is in memory. Named by the dtypes, as one call takes one of each.
            return "foreach", (device, *(tensor.dtype for tensor in tensors))
        mode = mode._replace(**kind._asdict())
        return choose_backend(device, mode), (device, mode)

    def batch(self, rows: Sequence[int], what: Pass, guards: UpdateGuards | None) -> Batch:
        """Collect what one launch takes for the params of `rows`, which have one key."""
        params = [self.params[row] for row in rows]
        scales = [self.scales[row] for row in rows] if self.scales else []
        sums = guards.sums_of if guards and what.counts else {}
        factors = guards.factor_of if guards and what is Pass.UPDATE_SCALED else {}
        return Batch(
            params=[self.written[row] for row in rows],
            grads=[self.grads[row] for row in rows],
            exp_avgs=[self.exp_avgs[row] for row in rows],
            main_params=_present(self.main_params[row] for row in rows),
            exp_avg_scales=_present(each.get("exp_avg") for each in scales),
            main_scales=_present(each.get("master_param") for each in scales),
            fp8_scaling=_present(self.fp8_scaling[row] for row in rows if self.fp8_scaling),
            update_sums=_present(map(sums.get, params)),
            update_factors=_present(map(factors.get, params)),
        )


def _present(values: Iterable[T | None]) -> list[T] | None:
    """The values that are there, or None where there is none at all."""
    return [value for value in values if value is not None] or None


def gather(
    params: list[Tensor],
    state: Mapping[Tensor, dict[str, Tensor]],
    *,
    initialize_state: Callable[[Tensor], None],
    has_main_params: bool,
    uses_decoupled_grad: bool,
    model_params: Mapping[Tensor, Tensor],
    scales: Mapping[Tensor, dict[str, Tensor]],
) -> ParamTensors:
    """Collect the tensors of a group's step; state that is missing is allocated.

    Args:
        params: of the group, with gradients or without.
        state: param -> its state.
        initialize_state: allocates the state of a param.
        has_main_params: 16-bit params have master weights in their state.
        uses_decoupled_grad: gradients are in `param.decoupled_grad`.
        model_params, scales: as AdamS has them.
    Raises:
        ValueError: a gradient is sparse or complex.
    """
    # A list of each kind at a time: a step does nothing else for a tensor that has not moved.
    params, grads = _with_gradients(params, uses_decoupled_grad=uses_decoupled_grad)
    kinds: list[Any] = [grad.dtype for grad in grads]
    if not {*kinds} <= DTYPES:
        check_gradients(grads)
    if uses_decoupled_grad:
        kinds = [(grad.dtype, grad.device, grad.shape) for grad in grads]
    states = [state[param] for param in params]
    for param, own in zip(params, states, strict=True):
        if "exp_avg" not in own or (has_main_params and "master_param" not in own):
            initialize_state(param)
    exp_avgs = [own["exp_avg"] for own in states]
    main_params = [own.get("master_param") for own in states]
    written: list[Tensor] = params
    fp8_scaling: list[Fp8Scaling | None] = []
    is_plain = are_plain(params, grads, exp_avgs, main_params)
    if not is_plain:
        check_gradients(grads)
        grads, exp_avgs = [*map(local_part, grads)], [*map(local_part, exp_avgs)]
        main_params = [main if main is None else local_part(main) for main in main_params]
        memory = [memory_of(local_part(param)) for param in params]
        written, fp8_scaling = [m for m, _ in memory], [scaling for _, scaling in memory]
    if model_params:
        # The param is the master weight of the model's copy.
        copies = [model_params.get(param) for param in params]
        pairs = [*zip(written, copies, strict=True)]
        main_params = [
            main if copy is None else param
            for (param, copy), main in zip(pairs, main_params, strict=True)
        ]
        written = [param if copy is None else copy for param, copy in pairs]
    if not is_plain or model_params:
        is_plain = are_plain(written, grads, exp_avgs, main_params)
    tensors = ParamTensors(
        params=params,
        grads=grads,
        grad_kinds=kinds,
        written=written,
        exp_avgs=exp_avgs,
        main_params=main_params,
        scales=[scales.get(param, {}) for param in params] if scales else [],
        fp8_scaling=fp8_scaling,
        is_plain=is_plain,
    )
    if _are_gradients_in_memory(tensors):
        return tensors
    return replace(tensors, grads=[*map(in_memory, grads)])


def _with_gradients(
    params: list[Tensor], *, uses_decoupled_grad: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the params that have a gradient, and their gradients."""
    if uses_decoupled_grad:
        found: list[Tensor | None] = [getattr(param, "decoupled_grad", None) for param in params]
    else:
        found = [param.grad for param in params]
    grads = [grad for grad in found if grad is not None]
    if len(grads) != len(params):
        params = [p for p, grad in zip(params, found, strict=True) if grad is not None]
    return params, grads


def _are_gradients_in_memory(tensors: ParamTensors) -> bool:
    """Whether `in_memory` would return each gradient as it is."""
    if not tensors.is_plain:
        return False
    try:
        return not any(map(Tensor.is_neg, tensors.grads)) and 0 not in tensors.grad_pointers
    except RuntimeError:
        # A sparse tensor has no pointer.
        check_gradients(tensors.grads)
        raise


def advance(group: dict[str, Any], grad_scale: float | Tensor, found_inf: Tensor | None) -> Scalars:
    """Count a group's step; return its scalars."""
    # Before skipping what has no gradients: a group can be empty on some dp ranks, and step
    # would differ between ranks on resume.
    group["step"] += 1
    beta1, beta2 = group["betas"]
    return Scalars(
        lr=group["lr"],
        grad_scale=-grad_scale if group["maximize"] else grad_scale,
        correction=correction_of(group["bias_correction"], beta1, group["step"]),
        found_inf=found_inf,
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        decoupled_weight_decay=group["adam_w_mode"],
        nesterov=group["nesterov"],
        cautious=group["cautious"],
    )


@dataclass
class PreparedStep:
    """A step of which nothing is written yet.

    Attributes:
        tensors: of each group.
        scalars: of each group.
        guards: None where the step neither counts nor scales.
    """

    tensors: Sequence[ParamTensors]
    scalars: Sequence[Scalars]
    guards: UpdateGuards | None


@dataclass
class Plan:
    """What a group's last step launched, to be launched again while no tensor has moved.

    Attributes:
        signature: of its tensors; None: it has no tables for all of them.
        kind: of its kernels.
        tables: of each launch.
        rows: which params of `ParamTensors` the table of a launch lists.
    """

    signature: list[object] | None = None
    kind: Kind | None = None
    tables: dict[Key, PointerTable] = field(default_factory=dict)
    rows: dict[Key, list[int]] = field(default_factory=dict)


def launch_pass(
    plans: dict[tuple[int, Pass], Plan],
    what: Pass,
    step: PreparedStep,
    choose_backend: Callable[[torch.device, Mode], str],
) -> list[object]:
    """Launch a pass over the tensors of all groups.

    Args:
        plans: by the index of the group and the pass; brought up to date.
        what: the pass.
        step: its tensors, scalars and guards.
        choose_backend: names the backend for tensors on a device in a mode.
    Returns:
        Whatever the kernels read that only the plans and the guards keep alive.
    """
    only_count = what is Pass.COUNT
    used: list[object] = [step.guards]
    for index, (tensors, scalars) in enumerate(zip(step.tensors, step.scalars, strict=True)):
        plan = plans.setdefault((index, what), Plan())
        signature = tensors.signature
        kind = Kind(what is not Pass.UPDATE, scalars.nesterov, scalars.cautious)
        if signature is not None and (signature, kind) == (plan.signature, plan.kind):
            pointers = tensors.grad_pointers
            for key, table in plan.tables.items():
                rows = plan.rows[key]
                grads = pointers if len(rows) == len(pointers) else [pointers[i] for i in rows]
                launch(table, scalars, key[0], grads=grads, only_count=only_count)
                used += (table.rows, table.amax)
            continue
        # None until all is launched: a step that fails half way has no tables for the rest.
        plan.signature, plan.kind = None, kind
        tables, plan.tables = plan.tables, {}
        plan.rows = _sort(tensors, choose_backend, kind)
        for key, rows in plan.rows.items():
            table = plan.tables[key] = tables.get(key) or PointerTable()
            batch = tensors.batch(rows, what, step.guards)
            run(batch, scalars, key[0], table, only_count=only_count)
            used += (table.rows, table.amax)
        is_foreach = any(backend == "foreach" for backend, _ in plan.rows)
        plan.signature = None if is_foreach else signature
    return used


def _sort(
    tensors: ParamTensors, choose_backend: Callable[[torch.device, Mode], str], kind: Kind
) -> dict[Key, list[int]]:
    """Sort a group's params into launches."""
    rows: dict[Key, list[int]] = {}
    for row in range(len(tensors.params)):
        rows.setdefault(tensors.key(row, choose_backend, kind), []).append(row)
    return rows


def with_grad_scaler(
    grad_scale: float | Tensor,
    found_inf: Tensor | None,
    *,
    scaler_scale: Any,
    scaler_found_inf: Any,
) -> tuple[float | Tensor, Tensor | None]:
    """The scalars of a step with what torch.amp.GradScaler has set on the optimizer, if it has.

    Args:
        grad_scale, found_inf: as given to the step.
        scaler_scale: the loss scale, by which gradients are divided; anything else than a tensor
            is none.
        scaler_found_inf: anything else than a tensor is none, too; GradScaler gives an optimizer
            without gradients the int 0.
    """
    if isinstance(scaler_scale, Tensor):
        # As its unscale_ has it: rounded once, whatever the scale is.
        inverse = scaler_scale.double().reciprocal().float()
        is_one = not isinstance(grad_scale, Tensor) and grad_scale == 1.0
        grad_scale = inverse if is_one else inverse * grad_scale
    if isinstance(scaler_found_inf, Tensor):
        found_inf = scaler_found_inf if found_inf is None else scaler_found_inf + found_inf
    return grad_scale, found_inf


def is_capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    # Not is_available, which asks the driver each time: under PYTORCH_NVML_BASED_CUDA_CHECK, which
    # DeepSpeed sets, half a millisecond. Nothing is captured before torch has initialized CUDA.
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()


def check_capture(groups: Iterable[Mapping[str, Any]], *, capturable: bool) -> None:
    """Refuse a capture that would repeat one step's numbers forever.

    Raises:
        ValueError: the stream is being captured without `capturable`; or, with it, the learning
            rate is no tensor on the device of the params.
    """
    if not capturable:
        if is_capturing():
            raise ValueError(
                "AdamS with capturable=False inside a CUDA graph, which would repeat this "
                "step's learning rate and count: must be True; build it so, or step outside "
                "the graph"
            )
        return
    for group in groups:
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
