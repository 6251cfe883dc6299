"""What the ranks of the checkpoint tests run, see cases.py."""

from typing import Any

import torch

from tests.distributed import cases


def capture_setup() -> list[Any]:
    """Have Megatron's (model, optimizer, scheduler) put into the returned list once built."""
    from megatron.training import training

    captured: list[Any] = []
    setup = training.setup_model_and_optimizer

    def capturing_setup(*args: Any, **kwargs: Any) -> Any:
        built = setup(*args, **kwargs)
        captured.extend(built)
        return built

    training.setup_model_and_optimizer = capturing_setup
    return captured


def train_and_place(argv: str) -> list[dict[str, Any]]:
    """Train, then say where each main-parameter shard of this rank belongs in the whole model.

    Independent of the optimizer's checkpoint code: the place of a parameter in the model comes
    from the model's own sharded_state_dict, the place of a shard in the parameter from the range
    that Megatron copies main params to model params by.

    Returns:
        For each shard "key", "global_shape", "global_offset" (with leading axes for stacked
        layers), "local_shape", "start" (in the flattened local parameter), and the tensors
        "param" and "exp_avg".
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.utils import unwrap_model
    from megatron.training import training

    placements: dict[int, Any] = {}
    captured = capture_setup()
    step = training.train_step

    def step_after_placing(*args: Any, **kwargs: Any) -> Any:
        if not placements:
            for chunk in unwrap_model(captured[0]):
                for sharded in nested_values(chunk.sharded_state_dict()):
                    placements[id(getattr(sharded, "data", None))] = sharded
        return step(*args, **kwargs)

    training.train_step = step_after_placing
    cases.train(argv)
    model, chain, _ = captured
    shards = []
    for part in chain.chained_optimizers:
        for param, (group, order) in part.model_param_group_index_map.items():
            main_param = part.optimizer.param_groups[group]["params"][order]
            sharded = placements[id(param)]
            shards.append(
                {
                    "key": sharded.key,
                    "global_shape": sharded.global_shape,
                    "global_offset": sharded.global_offset,
                    "local_shape": sharded.local_shape,
                    "start": part._get_model_param_range_map(param)["param"].start,
                    "param": main_param.detach().clone(),
                    "exp_avg": part.optimizer.state[main_param]["exp_avg"].clone(),
                }
            )
    return shards


def read_common(checkpoint: str) -> dict[str, Any]:
    """The part of a torch_dist checkpoint that is not tensors, and all its keys; on one rank."""
    from megatron.core import dist_checkpointing

    torch.distributed.init_process_group("gloo")
    common = dist_checkpointing.load_common_state_dict(checkpoint)
    common["keys"] = sorted(dist_checkpointing.load_tensors_metadata(checkpoint))
    return common
