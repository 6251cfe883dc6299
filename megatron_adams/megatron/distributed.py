"""Megatron's optimizers with AdamS inside: what they save and load.

They differ from Adam's by one state tensor less. `adoption.py` gives Megatron's objects these
classes. Imports megatron.core alone.
"""

import copy
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from megatron.core.optimizer import DistributedOptimizer
from megatron.core.utils import log_single_rank

from megatron_adams.checkpoint import (
    DamagedCheckpointError,
    continued_from_adam,
    contradict,
    is_adam_group,
    shifted_message,
)
from megatron_adams.megatron.fused_step import (
    FusedStepChain,
    FusedStepOptimizer,
    synchronize_steps,
)
from megatron_adams.megatron.inner import InnerAdamS, params_of
from megatron_adams.megatron.names import ADAMS, RATES
from megatron_adams.megatron.refusals import rates_refusal, refusal
from megatron_adams.megatron.versions import (
    IDENTIFIER_KEYS,
    groups_as_given,
    is_quantized,
    reset_param_sync_dispatch_state,
    set_groups,
    with_bucket_padding,
)

logger = logging.getLogger(__name__)


def init_state(optimizer: InnerAdamS, config: Any = None) -> None:
    """Allocate the state of every parameter that has none: Megatron's init_state_fn."""
    for param in params_of(optimizer):
        optimizer.initialize_state(param)


class AdamSDistributedOptimizer(FusedStepOptimizer):
    """Megatron's DistributedOptimizer (0.19) with `exp_avg` as the only state of a shard.

    The precision-aware optimizer keeps main params there, too. A checkpoint has both in full
    (fp32), in whatever dtypes they are kept, so that it can be loaded into any precision.
    """

    # Set while Adam's state is loaded: the params that have not got theirs.
    _params_to_restore: set[Any] | None = None
    # Set while a fully_reshardable state dict is built, see get_parameter_state_dp_zero.
    _keep_bucket_padding = False

    def state_dict(self) -> dict[str, Any]:
        """Everything but tensors.

        Upstream reads the step from where the installed Adam keeps it (torch: in each
        parameter's state; TransformerEngine and Apex: in the group). AdamS keeps it in the
        group in all worlds, so that a checkpoint of one loads in the other.
        """
        if self.is_stub_optimizer:
            return {}
        with self.optimizer.state_left_out():
            groups = self.optimizer.state_dict()["param_groups"]
        synchronize_steps(groups)
        state_dict: dict[str, Any] = {
            "optimizer": {"param_groups": [_without(group, "params") for group in groups]}
        }
        if self.grad_scaler:
            state_dict["grad_scaler"] = self.grad_scaler.state_dict()
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load, after pairing every current param group with a saved one."""
        if self.is_stub_optimizer:
            return
        saved = state_dict["optimizer"]["param_groups"]
        groups = match_param_groups(
            self.optimizer.param_groups,
            saved,
            takes_own_rates=self.config.override_opt_param_scheduler,
        )
        # A checkpoint of another program's can have counts that differ.
        synchronize_steps(groups)
        self._params_to_restore = None
        if self.config.adams_from_adam and any(map(is_adam_group, saved)):
            self._params_to_restore = set(self.model_param_group_index_map)
        # Upstream would allocate it as FusedAdam has it.
        init_state(self.optimizer)
        with self.optimizer.state_left_out():
            super().load_state_dict({**state_dict, "optimizer": {"param_groups": groups}})
        set_groups(self.optimizer, groups)
        if "param_state" in state_dict:
            self._finish_loading()

    def load_parameter_state(self, *args: Any, **kwargs: Any) -> None:
        """Load the second file of a legacy checkpoint, as upstream does."""
        super().load_parameter_state(*args, **kwargs)
        if not self.is_stub_optimizer:
            self._finish_loading()

    def _finish_loading(self) -> None:
        self._gather_params_of_remainders()
        if self._params_to_restore is None:
            return
        assert not self._params_to_restore, "Megatron has not set the state of every param"
        self._params_to_restore = None
        num_params = len(self.model_param_group_index_map)
        step = max((group["step"] for group in self.optimizer.param_groups), default=0)
        log_single_rank(logger, logging.INFO, continued_from_adam(num_params, num_params, step))

    def _gather_params_of_remainders(self) -> None:
        """Give all dp ranks the params that loading remainders has written on one.

        The params of the checkpoint are rounded otherwise where a main param lies half way between
        two bf16 numbers, if it was saved with fp32 main params.
        """
        if self.has_main_params_inside() and self.optimizer.store_param_remainders:
            for model_chunk in self.model_chunks:
                model_chunk.start_param_sync(force_sync=True)
                # The forward pass does not count on it.
                reset_param_sync_dispatch_state(model_chunk)

    def offload_to_cpu(self) -> None:
        """Move state and main params to the CPU; `restore_from_cpu` brings them back.

        Inner params that are parts of the model's own (all of them where the optimizer keeps the
        main params) stay: they take no memory, and upstream (optimizer.py, 0.19) would cut them
        off, so that steps no longer reach the model.
        """
        if self.is_stub_optimizer:
            return
        groups = (*self.shard_float16_groups, *self.shard_fp32_groups)
        parts = [(param, param.data) for group in groups for param in group]
        super().offload_to_cpu()
        for param, data in parts:
            param.data = data

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """A stub, which a rank without trainable parameters has, has nothing to save."""
        if self.is_stub_optimizer:
            return {}
        return super().sharded_state_dict(*args, **kwargs)

    def _get_main_param_and_optimizer_states(self, model_param: torch.nn.Parameter) -> Any:
        """A param's tensors for a checkpoint, in full; not copies where they are kept so."""
        param = self._inner_param(model_param)
        # A save may come before the first step.
        self.optimizer.initialize_state(param)
        return {
            "param": self.optimizer.get_unscaled_state(param, "master_param"),
            "exp_avg": self.optimizer.get_unscaled_state(param, "exp_avg"),
        }

    def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: Any) -> None:
        if self._params_to_restore is not None:
            # Before the main param is set, which writes the weights where it is remainders.
            self._check_taken_from_adam(model_param, tensors)
            self._params_to_restore.discard(model_param)
        param = self._inner_param(model_param)
        self.optimizer.set_scaled_state(param, "master_param", tensors["param"])
        self.optimizer.set_scaled_state(param, "exp_avg", tensors["exp_avg"])

    def _check_taken_from_adam(self, model_param: Any, tensors: Any) -> None:
        """Raise unless what Adam has saved of a param is there, and is that param's.

        Megatron has loaded the model's weights already.

        Raises:
            ValueError: a tensor is missing.
            DamagedCheckpointError: the main params are not those of the weights.
        """
        if missing := {"param", "exp_avg"} - tensors.keys():
            raise refusal(
                "--adams-from-adam",
                f"the checkpoint has no {' and no '.join(sorted(missing))} of "
                f"{self._name_of(model_param)}, which {ADAMS} would start anew",
                "train the params of the run that saved it, or load the weights alone with "
                "--no-load-optim",
            )
        if is_quantized(self, model_param):
            return
        shard = self._get_model_param_range_map(model_param)["param"]
        weights = model_param.detach().view(-1)[shard.start : shard.end]
        if contradict(weights, tensors["param"]):
            words = shifted_message(self._name_of(model_param))
            raise DamagedCheckpointError(f"--adams-from-adam: {words}")

    def _name_of(self, model_param: Any) -> str:
        named = (pair for chunk in self.model_chunks for pair in chunk.named_parameters())
        return next(name for name, param in named if param is model_param)

    @torch.no_grad()
    def _copy_model_params_to_main_params(self, state_dict: Any = None) -> None:
        """Copy as Megatron does, and also where the inner optimizer keeps the main params.

        Megatron leaves that to FusedAdam's first step, which is too late where there is state
        already, or where the params of `state_dict` are more exact than the model's.
        """
        if not self.has_main_params_inside() or self.is_stub_optimizer:
            super()._copy_model_params_to_main_params(state_dict=state_dict)
            return
        sources: dict[Any, torch.Tensor] = {}
        if state_dict is not None:
            sources = self._build_model_param_to_state_dict_param_map(state_dict)
        for model_param in self.model_param_group_index_map:
            shard = self._get_model_param_range_map(model_param)["param"]
            source = sources.get(model_param, model_param).detach()
            self.optimizer.set_scaled_state(
                self._inner_param(model_param),
                "master_param",
                source.view(-1)[shard.start : shard.end],
            )

    def _inner_param(self, model_param: torch.nn.Parameter) -> torch.Tensor:
        """This rank's shard of a param, as the inner optimizer has it."""
        group, order = self.model_param_group_index_map[model_param]
        return self.optimizer.param_groups[group]["params"][order]

    def sharded_param_state_fully_reshardable(self, *args: Any, **kwargs: Any) -> Any:
        """Call upstream's method with tensors in the layout that it slices them by."""
        self._keep_bucket_padding = True
        try:
            return super().sharded_param_state_fully_reshardable(*args, **kwargs)
        finally:
            self._keep_bucket_padding = False

    def get_parameter_state_dp_zero(self, *args: Any, **kwargs: Any) -> Any:
        """The gathered state, for fully_reshardable with the padding between buckets.

        Upstream drops that padding, which the legacy format expects, but up to 0.19 slices a
        fully_reshardable save by `param_index_map`, which counts it: behind a padded bucket
        every parameter would be saved shifted.
        """
        state = super().get_parameter_state_dp_zero(*args, **kwargs)
        if state is not None and self._keep_bucket_padding:
            for gbuf_idx, buffer in enumerate(self.buffers):
                for world_tensors in state[gbuf_idx].values():
                    keys = ("param", *self.optimizer_state_keys)
                    with_bucket_padding(world_tensors, keys, buffer)
        return state

    def sharded_param_state_dp_reshardable(self, *args: Any, **kwargs: Any) -> Any:
        """Extend upstream's method to ranks whose part of a bucket holds no parameter."""
        state = super().sharded_param_state_dp_reshardable(*args, **kwargs)
        for buckets in self._buckets_of(state):
            for entries in buckets:
                # Its tensors go, and the entry stays: dist_checkpointing drops empty lists.
                entries[:] = [
                    {"padding": entry["padding"]} if _is_placeholder(entry) else entry
                    for entry in entries
                ]
        return state

    def get_parameter_state_dp_reshardable(self) -> Any:
        """Call upstream's method, with a padding entry of size 0 for an empty list.

        A small bucket that is padded to a multiple of the dp size ends in shards of padding
        alone; upstream asserts that there is none ("empty bucket encountered").
        """
        state = super().get_parameter_state_dp_reshardable()
        for buckets in self._buckets_of(state):
            for entries in buckets:
                if not entries:
                    device = torch.cuda.current_device()
                    nothing = torch.empty(0, dtype=torch.float32, device=device)
                    keys = ("param", *self.optimizer_state_keys)
                    entries.append(
                        {
                            **dict.fromkeys(keys, nothing),
                            "gbuf_local_start": 0,
                            "gbuf_local_end": 0,
                            "padding": True,
                        }
                    )
        return state

    def _buckets_of(self, state: dict[Any, Any]) -> Iterable[list[list[dict[str, Any]]]]:
        for gbuf_idx in range(len(self.gbuf_ranges)):
            yield from state[gbuf_idx].values()


class AdamSChainedOptimizer(FusedStepChain):
    """Megatron's ChainedOptimizer (0.19), which also loads a chain of another length.

    With expert parallelism the experts have an optimizer of their own, without it they do not:
    a checkpoint that crosses from one to the other has its parts put together or taken apart.
    """

    def load_state_dict(self, state_dict: Any) -> None:
        if isinstance(state_dict, dict) and not self.is_stub_optimizer:
            state_dict = regroup_parts(state_dict, len(self.chained_optimizers))
        is_one = len(self.chained_optimizers) == 1
        states = [state_dict] if is_one else _in_order(state_dict)
        paired = [
            part
            for part, state in zip(self.chained_optimizers, states, strict=False)
            if part.optimizer is not None and not isinstance(part, DistributedOptimizer)
            if _match_groups_of(part, state)
        ]
        with groups_as_given(paired):
            super().load_state_dict(state_dict)


def _in_order(state_dict: Any) -> list[Any]:
    """The parts of a chain's state dict: a list, or a dict by number."""
    return _numbered_parts(state_dict) if isinstance(state_dict, dict) else state_dict


def _match_groups_of(part: Any, state: dict[str, Any]) -> bool:
    """Prepare a state dict for an optimizer that is no distributed one, which pairs groups, too.

    Megatron's pairing wants equal learning rates and tells of others by the key of a dict.

    Returns:
        Whether the saved groups are in the order of the current ones: not if their numbers differ.
    """
    saved = state.get("optimizer", state).get("param_groups", ())
    current = part.optimizer.param_groups
    if len(saved) != len(current):
        return False  # Megatron's to say.
    takes_own_rates = part.config.override_opt_param_scheduler
    matched = match_param_groups(current, saved, takes_own_rates=takes_own_rates)
    params = [group["params"] for group in saved]
    saved[:] = [{**group, "params": own} for group, own in zip(matched, params, strict=True)]
    return True


def regroup_parts(state_dict: dict[Any, Any], num_parts: int) -> dict[Any, Any]:
    """Give a loaded state dict as many parts as the current chain has.

    Args:
        state_dict: of one part, {"optimizer": ..., "param_state": ...} (of Megatron's
            FP32Optimizer {"param_groups": ..., "state": ...}), or of several, {0: part, 1: part};
            its "param_state" already has the current structure, because dist_checkpointing loads
            what the current chain asked for.
        num_parts: length of the current chain.
    Raises:
        ValueError: the state has another structure and is not of the fully_reshardable kind.
    """
    is_single = "optimizer" in state_dict or "param_groups" in state_dict
    saved = [state_dict] if is_single else _numbered_parts(state_dict)
    if len(saved) == num_parts:
        return state_dict
    kinds = {part.get("param_state_sharding_type") for part in saved}
    if kinds != {"fully_reshardable"}:
        raise ValueError(
            f"this checkpoint holds {len(saved)} optimizers and the run builds {num_parts} (its "
            f"expert parallel size differs): only fully_reshardable checkpoints can be loaded "
            f"across; save with --dist-ckpt-optim-fully-reshardable, or load with "
            f"--no-load-optim"
        )
    groups = [group for part in saved for group in part["optimizer"]["param_groups"]]
    common = {k: saved[0][k] for k in ("grad_scaler", "param_state_sharding_type") if k in saved[0]}
    tensors = [state_dict] if num_parts == 1 else _numbered_parts(state_dict)
    parts = [
        {
            **common,
            "optimizer": {"param_groups": copy.deepcopy(groups)},
            "param_state": part["param_state"],
        }
        for part in tensors
    ]
    return parts[0] if num_parts == 1 else dict(enumerate(parts))


def _numbered_parts(state_dict: dict[Any, Any]) -> list[dict[str, Any]]:
    return [state_dict[key] for key in sorted(k for k in state_dict if isinstance(k, int))]


def match_param_groups(
    current: Sequence[dict[str, Any]],
    saved: Sequence[dict[str, Any]],
    *,
    takes_own_rates: bool = False,
) -> list[dict[str, Any]]:
    """Find for every current param group the saved one that it continues.

    Groups are the same if their `IDENTIFIER_KEYS` are; failing that, if they
    are the same but for `is_expert_parallel`, which changes with the expert parallel size; failing
    that, for Adam's groups, or with `takes_own_rates`, if they are the same but for that and the
    learning rates too.

    Args:
        current, saved: the run's groups, and the checkpoint's.
        takes_own_rates: a checkpoint of other learning rates may be loaded.
    Returns:
        Copies of saved groups, in the order of `current`, with its `is_expert_parallel` and rates.
    Raises:
        ValueError: a current group has no counterpart, or one at other learning rates.
    """

    def identity(group: dict[str, Any], keys: Iterable[str]) -> tuple[Any, ...]:
        return tuple(group.get(key, group.get(f"pre_{key}")) for key in keys)

    all_keys = IDENTIFIER_KEYS
    dense_keys = tuple(key for key in all_keys if key != "is_expert_parallel")
    # The two optimizers want different learning rates, and the scheduler sets them once it is
    # loaded: of groups that differ in nothing else any one will do.
    rateless_keys = tuple(key for key in dense_keys if key not in RATES)
    exact = {identity(group, all_keys): group for group in saved}
    either = {identity(group, dense_keys): group for group in reversed(saved)}
    rateless = {identity(group, rateless_keys): group for group in reversed(saved)}
    matched = []
    for group in current:
        found = exact.get(identity(group, all_keys)) or either.get(identity(group, dense_keys))
        if found is None:
            found = rateless.get(identity(group, rateless_keys))
            if found is not None and not (takes_own_rates or is_adam_group(found)):
                raise rates_refusal(group, found)
        if found is None:
            wanted = dict(zip(all_keys, identity(group, all_keys), strict=True))
            known = [dict(zip(all_keys, key, strict=True)) for key in exact]
            raise ValueError(
                f"the checkpoint has no param group with {wanted}; it has {known}. Start with "
                f"the weight decay settings that it was saved with, or load with --no-load-optim"
            )
        own = {key: group[key] for key in ("is_expert_parallel", *RATES) if key in group}
        matched.append({**found, **own})
    return matched


def _is_placeholder(entry: dict[str, Any]) -> bool:
    return bool(entry["param"].data.numel() == 0)


def _without(group: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k != key}
