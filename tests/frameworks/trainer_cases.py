"""What test_trainers.py runs in a process of its own, as these packages are not installed."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_adams import AdamS
from tests.frameworks.fsdp2_cases import (
    NUM_STEPS,
    OPTIONS,
    batch_of,
    build_model,
    differences,
    train,
)


def lightning(folder: str) -> dict[str, Any]:
    """Train by Lightning's Trainer, in one go and resumed, and by a plain loop.

    Returns:
        The names of the weights that differ from the plain loop's, for "whole", "resumed"; "step":
        AdamS's count after the resumed run.
    """
    import pytorch_lightning

    class Module(pytorch_lightning.LightningModule):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.model = build_model(seed)

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            return self.model(batch_of(self.global_step)).square().mean()

        def configure_optimizers(self) -> AdamS:
            return AdamS(self.parameters(), **OPTIONS)

    def fit(module: Any, num_epochs: int, checkpoint: str | None = None) -> Any:
        trainer = pytorch_lightning.Trainer(
            accelerator="cpu",
            max_epochs=num_epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = torch.utils.data.DataLoader(range(NUM_STEPS // 2))
        trainer.fit(module, loader, ckpt_path=checkpoint)
        return trainer

    plain = build_model()
    train(plain, AdamS(plain.parameters(), **OPTIONS), range(NUM_STEPS))
    whole, stopped, resumed = Module(0), Module(0), Module(9)
    fit(whole, 2)
    saved = str(Path(folder, "half.ckpt"))
    fit(stopped, 1).save_checkpoint(saved)
    trainer = fit(resumed, 2, saved)
    return {
        "whole": _different(whole.model, plain),
        "resumed": _different(resumed.model, plain),
        "step": trainer.optimizers[0].param_groups[0]["step"],
    }


def torchtitan(implementation: str) -> dict[str, Any]:
    """Build AdamS by torchtitan's container, as docs/outside-megatron.md says, and train.

    Args:
        implementation: torchtitan's.
    Returns:
        "different": names of the weights that differ from a plain loop's; "classes": of the
        optimizers in the container; "groups": their groups, without params; "reloaded": names of
        the states that another container has otherwise once it has loaded this one's.
    """
    from dataclasses import dataclass

    from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

    class WithAdamS(OptimizersContainer):
        @dataclass(kw_only=True, slots=True)
        class Config(OptimizersContainer.Config):
            pass

        @staticmethod
        def _resolve_optimizer_factory(name: str) -> Any:
            if name == "AdamS":
                return AdamS
            return OptimizersContainer._resolve_optimizer_factory(name)

    config = WithAdamS.Config(
        implementation=implementation,
        param_groups=[
            ParamGroupConfig(pattern="bias", optimizer_name="AdamS", optimizer_kwargs=OPTIONS),
            ParamGroupConfig(pattern=".*", optimizer_name="AdamS", optimizer_kwargs=OPTIONS),
        ],
        optimizer_factory_kwargs_by_name={"AdamS": {implementation: True}}
        if implementation != "for-loop"
        else {},
    )
    model, other = build_model(), build_model(9)
    container, second = (config.build(model_parts=[each]) for each in (model, other))
    train(model, container, range(NUM_STEPS))
    plain = build_model()
    train(plain, AdamS(plain.parameters(), **OPTIONS), range(NUM_STEPS))
    second.load_state_dict(container.state_dict())
    return {
        "different": _different(model, plain),
        "classes": [type(each).__name__ for each in container.optimizers],
        "groups": [
            {key: value for key, value in group.items() if "param" not in key}
            for each in container.optimizers
            for group in each.param_groups
        ],
        "reloaded": differences(_states(container), _states(second)),
    }


def _states(container: Any) -> dict[str, Tensor]:
    return {
        f"{index}": state["exp_avg"]
        for index, state in enumerate(container.optimizers[0].state.values())
    }


def _different(first: nn.Module, second: nn.Module) -> list[str]:
    return differences(dict(first.named_parameters()), dict(second.named_parameters()))
