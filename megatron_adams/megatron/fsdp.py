"""AdamS under Megatron-FSDP, which keeps params, main params and gradients itself.

The inner optimizer's params are Megatron-FSDP's main params (no_shard in one dtype: the params), as
DTensors: of each a rank holds some rows, all of them, or none. exp_avg is a DTensor of the same
placement. Without FSDP, DistributedOptimizer has buffers, shards and main params; here it has
none. What contradicts it is refused in refusals.py.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.optimizer import DistributedOptimizer
from megatron.core.utils import log_single_rank
from torch import Tensor

from megatron_adams.checkpoint import continued_from_adam
from megatron_adams.megatron.names import RATES
from megatron_adams.megatron.refusals import rates_refusal
from megatron_adams.optimizer import HYPERPARAMETERS, AdamS, local_part

logger = logging.getLogger(__name__)

# The entries of a param group that are the run's own when it goes on from Adam, and Adam's step.
_NOT_FROM_ADAM = (*HYPERPARAMETERS, "step", *RATES)


class AdamSFsdpOptimizer(DistributedOptimizer):
    """Megatron's DistributedOptimizer (0.19) with Megatron-FSDP, around AdamS.

    It gets its class by assignment, so that there is no constructor. A checkpoint has exp_avg of
    every param in full (fp32), whatever it is kept in, so that it can be loaded into any precision.
    """

    optimizer: AdamS
    optimizer_state_keys = ("exp_avg",)

    # Set while Adam's state is loaded, see take_from_adam.
    _adam_step_key: str | None = None

    def prepare_inner(self) -> None:
        """Make the inner optimizer step the main params, which Megatron-FSDP keeps.

        As upstream does with FusedAdam for the precision-aware optimizer, once it is built.
        """
        self.optimizer.master_weights = False
        self.optimizer.store_param_remainders = False
        self.optimizer.master_weight_dtype = torch.float32
        self.optimizer.use_decoupled_grad = self.config.use_precision_aware_optimizer

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's, this rank's part of it; `load_state_dict` takes it."""
        if self.is_stub_optimizer:
            return {}
        return self.optimizer.state_dict()

    def take_from_adam(self, step_key: str | None) -> None:
        """Say whether the checkpoint that is loaded next is Adam's.

        Args:
            step_key: where it has the steps of the params, "param_to_group_meta" or "state"; None:
                it is adams's own.
        """
        self._adam_step_key = step_key

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As upstream, from Adam's state, too; of a stub, which has nothing to load."""
        if self.is_stub_optimizer:
            return
        step_key, self._adam_step_key = self._adam_step_key, None
        if step_key is not None:
            state_dict = self._from_adam(state_dict, step_key)
        elif (
            "param_to_group_meta" in state_dict
            and not self.config.use_checkpoint_opt_param_scheduler
        ):
            metas = self._with_own_rates(state_dict["param_to_group_meta"])
            state_dict = {**state_dict, "param_to_group_meta": metas}
        super().load_state_dict(state_dict)

    def _with_own_rates(self, saved: dict[str, Any]) -> dict[str, Any]:
        """What the param groups of a checkpoint say of each param, with the run's learning rates.

        Raises:
            ValueError: they are others, and --override-opt_param-scheduler is not given.
        """
        own = self._param_groups_to_param2group_meta(self.optimizer.param_groups)
        metas = dict(saved)
        for name in own.keys() & saved.keys():
            rates = {key: own[name][key] for key in RATES if key in own[name]}
            if any(saved[name].get(key) != rate for key, rate in rates.items()):
                if not self.config.override_opt_param_scheduler:
                    raise rates_refusal(own[name], saved[name])
                metas[name] = {**saved[name], **rates}
        return metas

    def _from_adam(self, state_dict: dict[str, Any], step_key: str) -> dict[str, Any]:
        """What was loaded into Adam's part of `sharded_param_state_fsdp_dtensor`, as adams's."""
        state = {name: dict(of_param) for name, of_param in state_dict["state"].items()}
        loaded = {"state": state, "param_to_group_meta": state_dict["param_to_group_meta"]}
        steps = {name: int(of_param.pop("step")) for name, of_param in loaded[step_key].items()}
        own = self._param_groups_to_param2group_meta(self.optimizer.param_groups)
        metas = {
            name: {**own[name], **meta, "step": steps[name]}
            for name, meta in loaded["param_to_group_meta"].items()
        }
        message = continued_from_adam(len(state), len(own), max(steps.values(), default=0))
        log_single_rank(logger, logging.INFO, message)
        return {"state": state, "param_to_group_meta": metas}

    def sharded_param_state_fsdp_dtensor(self, is_loading: bool = False) -> dict[str, Any]:
        """exp_avg of all params as DTensors, and what the param groups say of each param, by name.

        Before a load, upstream allocates Adam's state with a step with zero gradients, which also
        decays the weights. For a save, it takes only the state that is there: with torch's Adam, a
        rank that owns no part of a param has none of it, and the other ranks hang.
        """
        state: dict[str, Any] = {}
        for param in self.get_parameters():
            self.optimizer.initialize_state(param)
            exp_avg = self.optimizer.get_unscaled_state(param, "exp_avg")
            state[self._param_name(param)] = {"exp_avg": exp_avg}
        metas = self._param_groups_to_param2group_meta(self.optimizer.param_groups)
        if is_loading and self._adam_step_key is not None:
            # Hyperparameters and rates are those of this run, as without Megatron-FSDP.
            metas = {
                name: {key: value for key, value in meta.items() if key not in _NOT_FROM_ADAM}
                for name, meta in metas.items()
            }
            for name in state:
                if self._adam_step_key == "state":
                    state[name]["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
                else:
                    metas[name]["step"] = 0
        return {"state": state, "param_to_group_meta": metas}

    def _copy_model_params_to_main_params(self, state_dict: Any = None) -> None:
        """Nothing to do: what Megatron-FSDP loads as the model are the main params.

        Upstream raises, so that it cannot load weights alone (--finetune, --no-load-optim).
        """

    def _collect_main_grad_data_for_unscaling(self) -> list[Tensor]:
        """This rank's gradients; upstream fails where it has no part of some param."""
        name = "decoupled_grad" if self.optimizer.use_decoupled_grad else "grad"
        grads = [getattr(param, name, None) for param in self.get_parameters()]
        return [local_part(grad) for grad in grads if grad is not None]

    def grad_dtype(self) -> torch.dtype | None:
        """What the gradients will be, None: as their params."""
        if not self.optimizer.use_decoupled_grad:
            return None
        model_dtype = torch.bfloat16 if self.config.bf16 else torch.float32
        return self.ddp_config.megatron_fsdp_main_grads_dtype or model_dtype

    def describe_passes(self) -> str:
        """Say which of Megatron's passes the step takes over: none."""
        strategy = self.ddp_config.data_parallel_sharding_strategy
        return (
            f"gradients are clipped and unscaled, and model params are written, by Megatron-FSDP "
            f"({strategy})"
        )


def wrap_handle_swiglu_in_state_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    """Split exp_avg of gated layers alone: upstream splits exp_avg and exp_avg_sq, by name."""

    def handle_swiglu_in_state_dict(
        model: Any, model_state_dict: Any, optimizer_state_dict: dict[str, Any] | None
    ) -> tuple[Any, Any]:
        state: dict[str, Any] = (optimizer_state_dict or {}).get("state", {})
        is_adams = state and all(
            "exp_avg" in of_param and "exp_avg_sq" not in of_param for of_param in state.values()
        )
        if optimizer_state_dict is None or not is_adams:
            return original(model, model_state_dict, optimizer_state_dict)
        shown = {
            name: {**of_param, "exp_avg_sq": of_param["exp_avg"]}
            for name, of_param in state.items()
        }
        model_state_dict, split = original(
            model, model_state_dict, {**optimizer_state_dict, "state": shown}
        )
        for of_param in split["state"].values():
            del of_param["exp_avg_sq"]
        return model_state_dict, split

    return handle_swiglu_in_state_dict
