"""AdamS as a torch optimizer, with the constructor of TransformerEngine's FusedAdam.

Used alone in any PyTorch training loop, and by megatron_adams.megatron inside Megatron's
optimizers. Imports torch, kernels, precision.py and the modules of this folder. It must not import
Megatron, TransformerEngine or Apex.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from itertools import chain
from typing import Any, ParamSpec, TypeVar, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from typing_extensions import Self

from megatron_adams.kernels import Mode, mode_of, own_backend, select_backend
from megatron_adams.optimizer.guards import StepGuards, UpdateGuards
from megatron_adams.optimizer.hyperparameters import (
    EXP_AVG_DTYPES,
    HYPERPARAMETERS,
    SCALED_DTYPES,
    check_capturable,
    check_guards,
    check_hyperparameters,
    check_kernel,
    check_storage,
    move_numbers_to_device,
    read_group,
    refuse_other_optimizer,
    refuse_unsupported,
    take_plain_numbers,
)
from megatron_adams.optimizer.plan import (
    ParamTensors,
    Pass,
    Plan,
    PreparedStep,
    advance,
    check_capture,
    gather,
    is_capturing,
    launch_pass,
    with_grad_scaler,
)
from megatron_adams.optimizer.tensors import (
    check_tensor,
    distributed_like,
    is_quantized,
    local_part,
    memory_of,
)
from megatron_adams.precision import read_stored, write_stored_

# The attributes that say how state is stored.
_STORAGE = (
    "master_weights",
    "master_weight_dtype",
    "store_param_remainders",
    "exp_avg_dtype",
    "use_decoupled_grad",
)
# The attributes that a copy or a pickle has, besides torch's groups and state.
_KEPT = (
    *_STORAGE,
    *("kernel", "fused", "capturable", "model_params", "whole_numels", "_scales"),
    *("max_update_rms", "match_update_rms", "wants_update_rms"),
)
# The attributes that it does not have, and what they start with. They belong to the last step
# (launches, sums) or to this process (the function that reduces over ranks).
_STARTED_WITH: dict[str, Callable[[], Any]] = {
    "_is_state_left_out": bool,
    "_plans": dict,
    "_prepared": lambda: None,
    "_step_guards": StepGuards,
    "_used_by_graphs": dict,
    "reduce_update_sums": lambda: None,
}


P = ParamSpec("P")
R = TypeVar("R")


def _not_compiled(function: Callable[P, R]) -> Callable[P, R]:
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
        eps: stops a coordinate without gradients from moving by lr forever, so it cannot be 0.
        weight_decay: decoupled (AdamW's) or, with `adam_w_mode=False`, L2.
        bias_correction: True is the authors' released form (first step 4.47 lr), False the
            paper's (0.447 lr). They agree after about 50 steps.
        adam_w_mode: decoupled weight decay.
        maximize: the objective is maximized: the step is the one of the negated gradients.
        nesterov: the numerator of an update looks ahead by one step; not in the paper, and not with
            `bias_correction`. An update is then at most 1.189 lr at (0.9, 0.95).
        cautious: an element stays, but for weight decay, where its update would move it against
            its gradient; not in the paper.
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
            L2 decay the master weights, too) before the step's own. If params are sharded and no
            DTensors, set `reduce_update_sums` and `whole_numels`.
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
            params are whole, or DTensors (FSDP2, tensor parallelism), whose sums are added up over
            their own mesh; all of its ranks then take each guarded step, and call `update_rms`.
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

    _is_state_left_out: bool
    # By the index of the group and what is launched.
    _plans: dict[tuple[int, Pass], Plan]
    # Between `begin_step` and `step`.
    _prepared: PreparedStep | None
    # param -> the name of its state -> one fp32 element, where it is stored with a scale.
    _scales: dict[Tensor, dict[str, Tensor]]
    _step_guards: StepGuards
    # By their ids, so that each is there once.
    _used_by_graphs: dict[int, object]

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
        nesterov: bool = False,
        cautious: bool = False,
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
        refuse_unsupported(
            {
                "amsgrad": amsgrad,
                "differentiable": differentiable,
                "exp_avg_sq_dtype": exp_avg_sq_dtype,
                "set_grad_none": set_grad_none,
            }
        )
        check_storage(
            exp_avg_dtype=exp_avg_dtype,
            master_weights=master_weights,
            master_weight_dtype=master_weight_dtype,
            store_param_remainders=store_param_remainders,
        )
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
            "nesterov": nesterov,
            "cautious": cautious,
        }
        check_hyperparameters(defaults)
        take_plain_numbers(defaults)
        check_kernel(kernel, foreach=foreach, fused=fused)
        self.kernel = "foreach" if foreach else kernel
        self.fused = bool(fused)
        self.capturable = capturable
        check_guards(max_update_rms, match_update_rms)
        self.max_update_rms = max_update_rms
        self.match_update_rms = match_update_rms
        self.wants_update_rms = False
        self.whole_numels = {}
        self.model_params = {}
        self._scales = {}
        self.__dict__.update({name: start() for name, start in _STARTED_WITH.items()})
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
                move_numbers_to_device(group, optimizer.param_groups)
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
                move_numbers_to_device(param_group, self.param_groups)
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse what AdamS does not do; numbers become Python's."""
        refuse_unsupported(group)
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
        check_hyperparameters(group)
        take_plain_numbers(group)
        for param in group["params"]:
            check_tensor("parameter", param)
        if self.capturable:
            check_capturable(group["params"])

    def __getstate__(self) -> dict[str, Any]:
        # torch's has the state and the groups alone.
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _KEPT}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Torch's load_state_dict calls it, too, on an optimizer that has all of them.
        for name, start in _STARTED_WITH.items():
            if name not in self.__dict__:
                self.__dict__[name] = start()
        super().__setstate__(state)

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
        for group in self.param_groups:
            for param in group["params"]:
                mode = self._mode(param, grad_dtype or param.dtype)
                if mode is None:
                    continue
                mode = mode._replace(is_nesterov=group["nesterov"], is_cautious=group["cautious"])
                for is_guarded in {self.scales_updates, self.scales_updates or counts_updates}:
                    self._choose_backend(param.device, mode._replace(is_guarded=is_guarded))

    def _choose_backend(self, device: torch.device, mode: Mode) -> str:
        """The backend for tensors of a mode on a device, compiled.

        Raises:
            ValueError: fused, and there is no kernel for the device.
        """
        kernel: str | None = self.kernel
        if self.fused and kernel == "auto":
            kernel = own_backend(device)
        if kernel is None:
            raise ValueError(
                f"fused=True for parameters on {device}: must be on a CUDA device or the CPU, for "
                "which there are kernels; leave it out"
            )
        return select_backend(device, mode, kernel)

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
        dtypes = {"exp_avg": EXP_AVG_DTYPES[self.exp_avg_dtype]}
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
                memory, _ = memory_of(param)
                state[name] = torch.zeros_like(memory, dtype=dtype)
                if dtype in SCALED_DTYPES:
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
        full = read_stored(local_part(stored), scale=scale, param=local_part(param.detach()))
        return distributed_like(full, stored)

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
        param_part, state = local_part(param), local_part(state)
        if name == "master_param" and name not in self.state[param]:
            param_part.copy_(state)
            return
        if is_quantized(state):
            state = cast(Any, state).dequantize(dtype=torch.float32)
        scale = self._scales.get(param, {}).get(name)
        write_stored_(local_part(self.state[param][name]), state, scale=scale, param=param_part)

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
            closure: evaluates the model again, with gradients enabled, and returns the loss.
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
            ValueError: a gradient is sparse or complex, a CUDA graph is being captured without
                `capturable`, or with it lr is no longer a tensor beside the params; nothing is
                updated then.
            RuntimeError: gradients or state have moved since the last step, and a CUDA graph is
                being captured.
        """
        check_capture(self.param_groups, capturable=self.capturable)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        grad_scale, found_inf = with_grad_scaler(
            grad_scale,
            found_inf,
            scaler_scale=getattr(self, "grad_scale", None),
            scaler_found_inf=getattr(self, "found_inf", None),
        )
        prepared, self._prepared = self._prepared or self._prepare(grad_scale, found_inf), None
        guards = prepared.guards
        if guards is not None and self.scales_updates:
            guards.set_factors(
                self.reduce_update_sums,
                max_rms=self.max_update_rms,
                match_rms=self.match_update_rms,
            )
            self._launch(Pass.UPDATE_SCALED, prepared)
        elif guards is not None:
            self._launch(Pass.UPDATE_AND_COUNT, prepared)
        else:
            self._launch(Pass.UPDATE, prepared)
        return loss

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
        self._prepared = self._prepare(grad_scale, found_inf)

    def _prepare(self, grad_scale: float | Tensor, found_inf: Tensor | None) -> PreparedStep:
        # All gradients are looked at before the first parameter is written.
        tensors = [self._gather(group["params"]) for group in self.param_groups]
        guards = self._guards_of_step()
        scalars = [advance(group, grad_scale, found_inf) for group in self.param_groups]
        prepared = PreparedStep(tensors, scalars, guards)
        if self.scales_updates:
            self._launch(Pass.COUNT, prepared)
        return prepared

    def _gather(self, params: list[Tensor]) -> ParamTensors:
        return gather(
            params,
            self.state,
            initialize_state=self.initialize_state,
            has_main_params=self.master_weights,
            uses_decoupled_grad=self.use_decoupled_grad,
            model_params=self.model_params,
            scales=self._scales,
        )

    def _guards_of_step(self) -> UpdateGuards | None:
        """The guards, with nothing counted, or None where a step neither counts nor scales."""
        self._step_guards.is_counted = False
        if not self.scales_updates and not self.wants_update_rms:
            return None
        known = self._step_guards.current
        guards = self._step_guards.begin(self._params(), self.whole_numels)
        if guards is not known:
            # The tables of guarded steps have the addresses of those before.
            self._plans = {k: plan for k, plan in self._plans.items() if k[1] is Pass.UPDATE}
        return guards

    def _params(self) -> list[Tensor]:
        return [*chain.from_iterable(group["params"] for group in self.param_groups)]

    def _launch(self, what: Pass, prepared: PreparedStep) -> None:
        used = launch_pass(self._plans, what, prepared, self._choose_backend)
        if is_capturing():
            # A later step outside the graph may make new ones; the graph goes on with these.
            self._used_by_graphs.update((id(each), each) for each in used)

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
        guards = self._step_guards.counted()
        return guards.rms if self.scales_updates else guards.whole_rms(self.reduce_update_sums)

    def update_sums(self) -> Tensor:
        """Return what the last step has counted on this rank; shards are not added up.

        Returns:
            (num_params, 2) int64, of `megatron_adams.update.count_squares`.
        Raises:
            ValueError: as `update_rms`.
        """
        return self._step_guards.counted().sums()

    def update_factors(self) -> Tensor:
        """Return what the updates of the last step were multiplied by, (num_params,) fp32.

        Raises:
            ValueError: as `update_rms`.
        """
        guards = self._step_guards.counted()
        if self.scales_updates:
            return guards.factors
        device = guards.sums().device
        return torch.ones(len(guards.params), dtype=torch.float32, device=device)

    @property
    def is_counted(self) -> bool:
        """Whether the last step has counted what `update_rms` returns."""
        return self._step_guards.is_counted

    def forget_update_rms(self) -> None:
        """Make `is_counted` False until the next step that counts."""
        self._step_guards.is_counted = False

    @property
    def scales_updates(self) -> bool:
        """Whether there is a cap or a target."""
        return self.max_update_rms is not None or self.match_update_rms is not None

    def _mode(self, param: Tensor, grad_dtype: torch.dtype) -> Mode | None:
        dtypes = self.state_dtypes(param)
        model_param = self.model_params.get(param)
        if model_param is not None:
            return mode_of(grad_dtype, model_param.dtype, dtypes["exp_avg"], param.dtype)
        memory, _ = memory_of(param)
        return mode_of(grad_dtype, memory.dtype, dtypes["exp_avg"], dtypes.get("master_param"))

    @contextmanager
    def state_left_out(self) -> Iterator[None]:
        """While this is active, `state_dict` returns no state and `load_state_dict` leaves it.

        Megatron saves and loads the groups this way, and the state by other functions.
        """
        self._is_state_left_out = True
        try:
            yield
        finally:
            self._is_state_left_out = False

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict, with exp_avg and master weights in full (fp32).

        What was written with one set of storage options can be loaded with any other.
        """

        def give_full_state(_: Optimizer, outgoing: dict[str, Any]) -> None:
            ids = chain.from_iterable(group["params"] for group in outgoing["param_groups"])
            param_of = dict(zip(ids, self._params(), strict=True))
            for group in outgoing["param_groups"]:
                if self.capturable:
                    group.update(lr=float(group["lr"]), step=int(group["step"]))
                # A scheduler may have set one.
                take_plain_numbers(group)
            saved = {} if self._is_state_left_out else outgoing["state"]
            outgoing["state"] = {
                index: {name: self.get_unscaled_state(param_of[index], name) for name in state}
                for index, state in saved.items()
            }

        # Before the hooks that a user may have registered.
        with self.register_state_dict_post_hook(give_full_state, prepend=True):
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, whatever the storage options of its optimizer.

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
                plain = {k for k in state if dtypes[k] not in (torch.int16, *SCALED_DTYPES)}
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
        # Not strict: torch's load_state_dict refuses groups of other sizes in its own words.
        param_of = dict(zip(saved_ids, self._params(), strict=False))
        states = {}
        for index, saved in incoming["state"].items():
            refuse_other_optimizer(
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
        last_step = max(state_steps, default=None if incoming["state"] else 0)
        return [
            read_group(
                f"param group {index}", saved, current, last_step, capturable=self.capturable
            )
            for index, (saved, current) in enumerate(
                zip(saved_groups, self.param_groups, strict=True)
            )
        ]


def _wrong_shape(what: str, tensor: Tensor, param: Tensor) -> ValueError:
    return ValueError(
        f"{what} has shape {tuple(tensor.shape)} in the checkpoint: must be the parameter's, "
        f"{tuple(param.shape)}; load it into the model that wrote it"
    )
