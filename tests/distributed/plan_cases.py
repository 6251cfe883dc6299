"""What the ranks of test_plan.py run: Megatron's setup, whose tensors are counted, and plans."""

import importlib
import os
import runpy
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch

from tests.distributed import cases

MEMORY = "megatron_adams.megatron.training.memory"
JOB_FLAGS = "megatron_adams.megatron.training.job_flags"


def live(argv: str, base: str = cases.TINY_GPT, num_steps: int = 0) -> dict[str, Any]:
    """Run the example's script as far as Megatron's setup, or train, and count live tensors.

    Args:
        argv, base: flags of the script.
        num_steps: 0: allocate the state as a checkpoint's load would; otherwise train.
    """
    from megatron.training import training

    if num_steps:
        held = cases.run_script(f"{argv} --train-iters {num_steps}", base)
        return _counted(held["model"], held["optimizer"])
    from megatron_adams.cpu_rehearsal import rehearsal_flags

    setup, built = training.setup_model_and_optimizer, []

    def stopping_setup(*args: Any, **kwargs: Any) -> None:
        built.extend(setup(*args, **kwargs)[:2])
        raise SystemExit(0)

    training.setup_model_and_optimizer = stopping_setup
    flags = [*base.split(), *argv.split(), "--train-iters", "1"]
    sys.argv = [str(cases.SCRIPT), *flags, *rehearsal_flags(flags)]
    try:
        runpy.run_path(str(cases.SCRIPT), run_name="__main__")
    except SystemExit as exc:
        if exc.code != 0:
            raise
    model, chain = built
    _allocate(chain)
    return _counted(model, chain)


def live_with_transformer_engine(argv: str, base: str) -> dict[str, Any]:
    """Build a model of TransformerEngine's own layers, and its FusedAdam, and count live tensors.

    They cannot run a step without kernels.
    """
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import arguments, initialize, training
    from megatron.training.argument_utils import gpt_config_from_args

    sys.argv = ["pretrain_gpt.py", *base.split(), *argv.split(), "--train-iters", "1"]
    args = arguments.parse_and_validate_args()
    args.perform_initialization = False
    initialize.initialize_megatron()
    config = gpt_config_from_args(args)
    model = config.get_builder_cls()(config).build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config=training.get_megatron_ddp_config(args),
        data_parallel_random_init=False,
    )
    modules = {type(m).__name__ for chunk in model for m in chunk.modules()}
    assert "TELayerNormColumnParallelLinear" in modules, modules
    optimizer_config, overrides = training.get_megatron_optimizer_config(args)
    chain = get_megatron_optimizer(optimizer_config, model, overrides)
    for part in chain.chained_optimizers:
        inner = part.optimizer
        for group in inner.param_groups:
            for param in group["params"]:
                # As FusedAdam.step.
                is_remainder = inner.store_param_remainders and param.dtype == torch.bfloat16
                inner.initialize_state(param, is_remainder)
    return {
        **_counted(model, chain),
        "inner": [type(part.optimizer).__module__ for part in chain.chained_optimizers],
        "shapes": [tuple(p.shape) for chunk in model for p in chunk.parameters()],
    }


def _allocate(chain: Any) -> None:
    for part in chain.chained_optimizers:
        if part.optimizer is not None:
            part.init_state_fn(part.optimizer, part.config)


def _counted(model: Sequence[Any], chain: Any) -> dict[str, Any]:
    """Bytes of this rank's tensors, each piece of memory once, found by its address."""
    buffers = [b for chunk in model for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    params = [param for chunk in model for param in chunk.parameters()]
    in_buffers = [b.param_data for b in buffers if b.param_data is not None]
    weights = {_address(tensor): tensor for tensor in (*params, *in_buffers)}
    gradients = [buffer.grad_data for buffer in buffers]
    kinds: Counter[str] = Counter()
    numel = 0
    for part in chain.chained_optimizers:
        inner = part.optimizer
        for group in inner.param_groups if inner is not None else ():
            for param in group["params"]:
                numel += param.numel()
                if _address(param) not in weights:
                    kinds["main_params"] += param.numel() * param.element_size()
                for name, tensor in inner.state[param].items():
                    if name == "step":
                        continue
                    if type(tensor).__name__ == "Float8Tensor":
                        quantizer = tensor._quantizer
                        for scale in (quantizer.scale, quantizer.amax, tensor._scale_inv):
                            kinds["scales"] += scale.numel() * scale.element_size()
                        tensor = tensor._data
                    if name == "master_param":
                        name = "remainders" if tensor.dtype == torch.int16 else "main_params"
                    kinds[name] += tensor.numel() * tensor.element_size()
                for scale in getattr(inner, "_scales", {}).get(param, {}).values():
                    kinds["scales"] += scale.numel() * scale.element_size()
    return {
        "weights": sum(tensor.untyped_storage().nbytes() for tensor in weights.values()),
        "gradients": sum(grad.untyped_storage().nbytes() for grad in gradients),
        "numel": numel,
        "optimizer": dict(kinds),
    }


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def plans(jobs: Sequence[tuple[Sequence[str], int]]) -> list[dict[str, Any]]:
    """The plans of jobs: (flags, ranks)."""
    job = importlib.import_module(f"{MEMORY}.job")
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    return [job.count(flags, num_ranks) for flags, num_ranks in jobs]


def built_shapes(flags: Sequence[str], world_size: int) -> list[tuple[int, ...]]:
    """The shapes of the params of the first rank's planned model, in their order."""
    args = importlib.import_module(JOB_FLAGS).validated(flags, world_size)
    modes, _ = importlib.import_module(f"{MEMORY}.modes").modes_of(args)
    stage = importlib.import_module(f"{MEMORY}.stage").Stage(args, modes[:1], 0)
    return [tuple(p.shape) for chunk in stage.model for p in chunk.parameters()]


def refusals(jobs: Sequence[tuple[Sequence[str], int]]) -> list[str | None]:
    """What each job is refused with, None where it is not."""
    job = importlib.import_module(f"{MEMORY}.job")
    job_flags = importlib.import_module(JOB_FLAGS)
    messages: list[str | None] = []
    for flags, num_ranks in jobs:
        try:
            with patch.object(job.Stage, "count", lambda stage, rank: {}):
                job.count(flags, num_ranks)
        except job_flags.RefusedError as exc:
            messages.append(str(exc))
        else:
            messages.append(None)
    return messages
