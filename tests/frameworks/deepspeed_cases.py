"""What the ranks of test_deepspeed.py run: AdamS as the optimizer that DeepSpeed is given."""

from pathlib import Path
from typing import Any

import deepspeed
from torch import Tensor, nn

from megatron_adams import AdamS
from tests.frameworks.fsdp2_cases import NUM_STEPS, OPTIONS, batch_of, build_model, train

# Collectives over gloo: DeepSpeed would compile its own ones for shared memory.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

UNTESTED = {"zero_allow_untested_optimizer": True}
OFFLOADED = {"zero_force_ds_cpu_optimizer": False}


def config(stage: int, *, offloaded: bool = False, bf16: bool = False) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if offloaded:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": zero,
        "bf16": {"enabled": bf16},
        **UNTESTED,
        **(OFFLOADED if offloaded else {}),
    }


def build_engine(settings: dict[str, Any], *, seed: int = 0) -> Any:
    model = build_model(seed)
    optimizer = AdamS(model.parameters(), **OPTIONS)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, dist_init_required=False
    )
    return engine


def run(engine: Any, steps: range) -> None:
    for step in steps:
        batch = batch_of(step).to(next(engine.module.parameters()).dtype)
        loss = engine(batch).square().mean()
        engine.backward(loss)
        engine.step()


def weights(model: nn.Module) -> list[Tensor]:
    params = [*model.parameters()]
    with deepspeed.zero.GatheredParameters(params):
        return [param.detach().clone() for param in params]


def unsharded() -> list[Tensor]:
    """The weights of a plain loop without DeepSpeed."""
    model = build_model()
    train(model, AdamS(model.parameters(), **OPTIONS), range(NUM_STEPS))
    return weights(model)


def train_and_resume(folder: str) -> dict[str, Any]:
    """Train with each setting, then again from a checkpoint of half of the steps.

    Returns:
        "plain": the weights of `unsharded`; and by the setting's name: "whole", "resumed": the
        weights of both runs, "inner": the class of the optimizer that DeepSpeed steps.
    """
    deepspeed.init_distributed("gloo", verbose=False)
    settings = {f"zero{stage}": config(stage) for stage in range(4)}
    settings |= {f"zero{stage}_offloaded": config(stage, offloaded=True) for stage in (2, 3)}
    settings |= {f"zero{stage}_bf16": config(stage, bf16=True) for stage in (1, 3)}
    found: dict[str, Any] = {"plain": unsharded()}
    for name, setting in settings.items():
        engine = build_engine(setting)
        run(engine, range(NUM_STEPS // 2))
        place = str(Path(folder, name))
        engine.save_checkpoint(place)
        run(engine, range(NUM_STEPS // 2, NUM_STEPS))
        again = build_engine(setting, seed=9)
        again.load_checkpoint(place)
        run(again, range(NUM_STEPS // 2, NUM_STEPS))
        # Stage 0 in fp32 has no wrapper.
        inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        found[name] = {
            "whole": weights(engine.module),
            "resumed": weights(again.module),
            "inner": type(inner).__name__,
        }
    return found


def refused() -> list[str]:
    """DeepSpeed's errors where each of the two flags, and a name in its config, is wrong."""
    deepspeed.init_distributed("gloo", verbose=False)
    without_first = {k: v for k, v in config(1).items() if k not in UNTESTED}
    without_second = {k: v for k, v in config(2, offloaded=True).items() if k not in OFFLOADED}
    return [_error_of(settings) for settings in (without_first, without_second)]


def _error_of(settings: dict[str, Any]) -> str:
    try:
        build_engine(settings)
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}"
    return "none"
