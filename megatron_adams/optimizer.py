"""AdamS as a torch optimizer, with the constructor of TransformerEngine's FusedAdam.

Used alone in any PyTorch training loop, and by megatron_adams.megatron inside Megatron's
optimizers. Imports torch, kernels and update.py; it must not import Megatron, TransformerEngine or
Apex.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from numbers import Real
from typing import Any, NamedTuple, Self, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from megatron_adams.kernels import (
    BACKENDS,
    Batch,
    Mode,
    PointerTable,
    Scalars,
    correction_of,
    is_dense,
    launch,
    mode_of,
    run,
    select_backend,
)
from megatron_adams.update import exp_avg_dtype

HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", "bias_correction", "adam_w_mode")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Below it, squares that underflow in fp32 are no longer covered by eps, and the update has no
# bound.
_MIN_EPS = 2.0**-63


class _Unsupported(NamedTuple):
    """A FusedAdam argument that AdamS takes at its default value only."""

    default: Any
    rule: str
    remedy: str


_UNSUPPORTED = {
    "amsgrad": _Unsupported(
        False, "AdamS keeps no second moment whose maximum it could take", "leave it out"
    ),
    "capturable": _Unsupported(
        False, "AdamS does not run inside a CUDA graph", "step outside the graph"
    ),
    "master_weights": _Unsupported(
        False, "AdamS keeps no master weights", "give it fp32 parameters, as Megatron does"
    ),
    "master_weight_dtype": _Unsupported(
        torch.float32, "AdamS keeps no master weights", "give it fp32 parameters, as Megatron does"
    ),
    "exp_avg_dtype": _Unsupported(
        torch.float32, "exp_avg is fp32 (fp64 for fp64 parameters)", "leave it out"
    ),
    "exp_avg_sq_dtype": _Unsupported(torch.float32, "AdamS has no exp_avg_sq", "leave it out"),
    "use_decoupled_grad": _Unsupported(
        False, "AdamS reads param.grad", "put the gradient there, in any floating dtype"
    ),
    "store_param_remainders": _Unsupported(
        False, "AdamS keeps no master weights", "give it fp32 parameters, as Megatron does"
    ),
    "set_grad_none": _Unsupported(
        None, "AdamS takes it at zero_grad", "call zero_grad(set_to_none=...)"
    ),
}


@dataclass
class _Lists:
    """Tensors of one group that a batch is made of."""

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    main_params: list[Tensor] = field(default_factory=list)


@dataclass
class _Plan:
    """What a group's last step launched, to be launched again while no tensor has moved.

    Attributes:
        signature: where its tensors were; None: it has no tables for all of them.
        tables: by backend and kind of tensors.
    """

    signature: list[object] | None = None
    tables: dict[tuple[str, Any], PointerTable] = field(default_factory=dict)


class AdamS(Optimizer):
    """AdamS: the normalizer is made of the momentum and the gradient, so exp_avg is the only state.

    The formula, and its source, are in `megatron_adams.update.adams_update_`. Not the AdamS of
    `pytorch_optimizer`, which keeps exp_avg_sq.

    State: `state[param]` is `{"exp_avg": tensor}`, fp32 (fp64 for fp64 params), zeros from the
    first step that sees a gradient; `group["step"]` is an int, the count of `step()` calls since
    the group was added. It is the t of the bias correction, also for a param whose first gradient
    comes late: such a param starts with the small step of the paper's form.

    Args:
        params: parameters, named parameters, or group dicts, as torch's optimizers take them;
            fp32, bf16, fp16 or fp64. Without fp32 master weights, small updates of bf16 and fp16
            params are lost to rounding.
        lr: learning rate, a float or a tensor with one element.
        betas: beta1 in [0, 1), beta2 in (0, 1). An update is at most `update_bound(...)` times
            lr: 1.026 at (0.9, 0.95), 3.29 at (0.9, 0.999), so AdamW's 0.999 is no good default
            here.
        eps: keeps a coordinate that has no gradients from moving by lr for ever, so it cannot be 0.
        weight_decay: decoupled (AdamW's) or, with `adam_w_mode=False`, L2.
        bias_correction: True is the authors' released form (first step 4.47 lr), False the
            paper's (0.447 lr). They agree after about 50 steps.
        adam_w_mode: decoupled weight decay.
        kernel: which implementation of `megatron_adams.kernels` runs: "auto", the one of the
            params' device; or "cuda", "host", "foreach".
        amsgrad, capturable, master_weights, master_weight_dtype, exp_avg_dtype, exp_avg_sq_dtype,
        use_decoupled_grad, store_param_remainders, set_grad_none: FusedAdam's; at their defaults
        only.

    Attributes:
        model_params: main param -> the model's bf16 or fp16 copy of it, of the same shape; `step`
            writes the copy in the same pass. Empty, unless the owner of both fills it, as
            Megatron's distributed optimizer does.

    Raises:
        ValueError: a hyperparameter outside its range, an argument that is not supported, or a
            parameter that is complex, sparse or not floating.
    """

    model_params: dict[Tensor, Tensor]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = False,
        adam_w_mode: bool = True,
        kernel: str = "auto",
        amsgrad: bool = False,
        capturable: bool = False,
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
                "capturable": capturable,
                "master_weights": master_weights,
                "master_weight_dtype": master_weight_dtype,
                "exp_avg_dtype": exp_avg_dtype,
                "exp_avg_sq_dtype": exp_avg_sq_dtype,
                "use_decoupled_grad": use_decoupled_grad,
                "store_param_remainders": store_param_remainders,
                "set_grad_none": set_grad_none,
            }
        )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "adam_w_mode": adam_w_mode,
        }
        _check_hyperparameters(defaults)
        if kernel not in ("auto", *BACKENDS):
            raise ValueError(f"kernel={kernel!r}: must be one of {('auto', *BACKENDS)}")
        self.kernel = kernel
        self.model_params = {}
        # By the index of the group.
        self._plans: dict[int, _Plan] = {}
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
            _check_group(group)
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
            _check_group(param_group)
        except ValueError:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        # torch's has the state and the groups alone.
        own = {"kernel": self.kernel, "model_params": self.model_params, "_plans": {}}
        return {**super().__getstate__(), **own}

    def compile_kernels(self) -> None:
        """Compile, before the first step, what it needs if gradients have their params' dtypes.

        Raises:
            CompileError: the backend asked for by name has no compiler, or it fails.
            ValueError: that backend is another device's.
        """
        for param in chain.from_iterable(group["params"] for group in self.param_groups):
            mode = self._mode(param, param.dtype)
            if mode is not None:
                select_backend(param.device, mode, self.kernel)

    def initialize_state(self, param: Tensor) -> None:
        """Allocate `state[param]`, zeros, where `step` has not done so yet."""
        state = self.state[param]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(param, dtype=exp_avg_dtype(param))

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
            found_inf: one fp32 element on the params' device; where it is not 0 no tensor is
                written. Nobody waits for it, so group["step"] counts this step too.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: a gradient is sparse or complex; nothing is updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        # All gradients are looked at before the first parameter is written.
        signatures = [self._signature(group) for group in self.param_groups]
        for index, (group, signature) in enumerate(zip(self.param_groups, signatures, strict=True)):
            # Advance step before skipping what has no gradients: a group can be empty on some dp
            # ranks, and step would differ between ranks on resume.
            group["step"] += 1
            beta1, beta2 = group["betas"]
            scalars = Scalars(
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
            plan = self._plans.setdefault(index, _Plan())
            if signature is not None and signature == plan.signature:
                for (backend, _), table in plan.tables.items():
                    launch(table, scalars, backend)
                continue
            plan.signature, tables, plan.tables = signature, plan.tables, {}
            for key, batch in self._batches(group):
                backend, _ = key
                table = plan.tables[key] = tables.get(key) or PointerTable()
                run(batch, scalars, backend, table)
                if backend == "foreach":
                    plan.signature = None
        return loss

    def _signature(self, group: Mapping[str, Any]) -> list[object] | None:
        """Return where a group's tensors are: while it stays the same, so do the tables of them.

        None: there are subclasses of Tensor, whose data is elsewhere.

        Raises:
            ValueError: a gradient is sparse or complex.
        """
        signature: list[object] = []
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            _check_tensor("gradient", grad)
            self.initialize_state(param)
            exp_avg = self.state[param]["exp_avg"]
            if not type(grad) is type(exp_avg) is Tensor:
                return None
            model_param = self.model_params.get(param) if self.model_params else None
            signature.append(
                (
                    param.shape,
                    param.data_ptr(),
                    grad.data_ptr(),
                    grad.dtype,
                    grad.is_contiguous(),
                    exp_avg.data_ptr(),
                    0 if model_param is None else model_param.data_ptr(),
                )
            )
        return signature

    def _batches(self, group: Mapping[str, Any]) -> Iterator[tuple[tuple[str, Any], Batch]]:
        """Sort a group's tensors into what one launch takes, with its backend and a key."""
        batches: dict[tuple[str, Any], _Lists] = {}
        for param in group["params"]:
            if param.grad is None:
                continue
            self.initialize_state(param)
            tensors = [param, param.grad, self.state[param]["exp_avg"]]
            if param in self.model_params:
                tensors.append(self.model_params[param])
            tensors = [_local(tensor) for tensor in tensors]
            main, grad, exp_avg, *model = tensors
            mode = self._mode(param, grad.dtype)
            key: tuple[str, Any]
            if mode is None or not all(
                type(tensor) in (Tensor, torch.nn.Parameter)
                and tensor.stride() == main.stride()
                and is_dense(tensor)
                for tensor in tensors
            ):
                # fp64, tensors with holes or of unlike layouts, subclasses of Tensor. Named by the
                # dtypes, as one call takes one of each.
                key = "foreach", (main.device, *(tensor.dtype for tensor in tensors))
            else:
                key = select_backend(main.device, mode, self.kernel), (main.device, mode)
            lists = batches.setdefault(key, _Lists())
            lists.params.append(model[0] if model else main)
            lists.grads.append(grad)
            lists.exp_avgs.append(exp_avg)
            if model:
                lists.main_params.append(main)
        for key, lists in batches.items():
            yield key, Batch(lists.params, lists.grads, lists.exp_avgs, lists.main_params or None)

    def _mode(self, param: Tensor, grad_dtype: torch.dtype) -> Mode | None:
        model_param = self.model_params.get(param)
        if model_param is None:
            return mode_of(grad_dtype, param.dtype, exp_avg_dtype(param), None)
        return mode_of(grad_dtype, model_param.dtype, exp_avg_dtype(param), param.dtype)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; exp_avg keeps its dtype, and its bits.

        Hyperparameters that a group of the checkpoint lacks keep their current values, but for
        adam_w_mode: no group of another optimizer has it, and every one of AdamS's. A "step"
        beside exp_avg (Megatron's DistributedOptimizer writes one) is used where the group has
        none, and dropped. As in torch, a tensor whose device and dtype fit is taken over, not
        copied.

        Raises:
            ValueError: another optimizer wrote it, or groups, shapes or hyperparameters do not
                fit; nothing is loaded then.
        """
        exp_avgs: dict[Tensor, Tensor] = {}

        def take_state(_: Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
            exp_avgs.update(self._read_state(incoming))
            return {**incoming, "state": {}, "param_groups": self._read_groups(incoming)}

        def put_state(_: Optimizer) -> None:
            for param, exp_avg in exp_avgs.items():
                self.state[param]["exp_avg"] = exp_avg

        # The state goes around torch's load_state_dict, which would round exp_avg to the param's
        # dtype. After the hooks that a user may have registered to convert a checkpoint, and
        # before those that read it.
        with (
            self.register_load_state_dict_pre_hook(take_state),
            self.register_load_state_dict_post_hook(put_state, prepend=True),
        ):
            super().load_state_dict(state_dict)

    def _read_state(self, incoming: Mapping[str, Any]) -> dict[Tensor, Tensor]:
        """Return the exp_avg of each param in a checkpoint, on the param's device."""
        saved_ids = chain.from_iterable(group["params"] for group in incoming["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        # Not strict: torch's load_state_dict refuses groups of other sizes in its own words.
        param_of = dict(zip(saved_ids, params, strict=False))
        exp_avgs = {}
        for index, state in incoming["state"].items():
            _refuse_other_optimizer(
                f"the state of parameter {index}", set(state), {"exp_avg", "step"}
            )
            if "exp_avg" not in state or index not in param_of:
                continue
            param, exp_avg = param_of[index], state["exp_avg"]
            if exp_avg.shape != param.shape:
                raise ValueError(
                    f"exp_avg of parameter {index} has shape {tuple(exp_avg.shape)} in the "
                    f"checkpoint: must be the parameter's, {tuple(param.shape)}; load it into the "
                    "model that wrote it"
                )
            exp_avgs[param] = exp_avg.to(device=param.device, dtype=exp_avg_dtype(param))
        return exp_avgs

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
            groups.append(group)
        return groups


def _local(tensor: Tensor) -> Tensor:
    """A rank's part of a DTensor, as FSDP2 has them; any other tensor as it is."""
    # Whoever made a DTensor has imported the module, which takes long.
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None and isinstance(tensor, module.DTensor):
        return cast(Tensor, tensor.to_local())
    return tensor


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
        "AdamS keeps exp_avg alone; load the model's weights only and let the optimizer start "
        "anew (Megatron: --no-load-optim, or --finetune)"
    )


def _check_group(group: Mapping[str, Any]) -> None:
    _refuse_unsupported(group)
    _check_hyperparameters(group)
    for param in group["params"]:
        _check_tensor("parameter", param)


def _check_hyperparameters(group: Mapping[str, Any]) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr={lr}: a tensor must have one element")
        lr = lr.item()
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas={betas}: must be two numbers, (beta1, beta2)")
    beta1, beta2 = betas
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
    # A rule says what is right, not what is wrong: NaN satisfies none.
    if not isinstance(value, Real) or not rule(float(value)):
        raise ValueError(f"{name}={value}: must be {words}")


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
