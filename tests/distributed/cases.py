"""What the ranks of the distributed tests run: an unmodified Megatron script, and what it left.

Each function is one rank's part; `Cluster.run` forks the ranks and collects what they return.
"""

import functools
import runpy
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_adams.optimizer import AdamS

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "pretrain_gpt" / "pretrain_gpt.py"

TINY_GPT = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 "
    "--max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 8 "
    "--lr 1e-3 --lr-decay-style constant --weight-decay 0.1 --clip-grad 1.0 "
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 4 "
    "--use-cpu-initialization --save-interval 1000 --log-interval 1 --num-workers 0 "
    "--eval-iters 0 --eval-interval 1000 "
    "--attention-dropout 0 --hidden-dropout 0 --dist-ckpt-strictness raise_unexpected "
)


def train(argv: str, base: str = TINY_GPT, record_grads: bool = False) -> dict[str, Any]:
    """Run the example's pretraining script and return what the optimizer did and holds.

    Returns:
        "losses" (last pipeline stage), "grad_norms", "num_zeros": a list of floats, one a step;
        "model": name -> the rank's model parameters;
        "parts": for every Megatron optimizer of the chain, see `describe`;
        "recorded", with `record_grads`: see `record_steps`.
    """
    held = run_script(argv, base, record_grads)
    model, optimizer = held.pop("model"), held.pop("optimizer")
    if record_grads:
        held["recorded"]["end"] = snapshot(optimizer.optimizer)
    named = [
        (f"{index}.{name}", param)
        for index, chunk in enumerate(model)
        for name, param in chunk.named_parameters()
    ]
    held["model"] = {name: param.detach().clone() for name, param in named}
    names = {id(param): name for name, param in named}
    held["parts"] = [describe(part, names) for part in optimizer.chained_optimizers]
    return held


def run_script(argv: str, base: str = TINY_GPT, record_grads: bool = False) -> dict[str, Any]:
    """Run the example's pretraining script.

    Returns:
        As `train`, with Megatron's "model", a list of chunks, and "optimizer" themselves.
    """
    from megatron.training import training

    from megatron_adams.cpu_rehearsal import rehearsal_flags

    held: dict[str, Any] = {"losses": [], "grad_norms": [], "num_zeros": [], "skipped": []}
    setup, train_step = training.setup_model_and_optimizer, training.train_step

    def recorded_setup(*args: Any, **kwargs: Any) -> Any:
        held["model"], held["optimizer"], _ = built = setup(*args, **kwargs)
        if record_grads:
            held["recorded"] = record_steps(held["optimizer"].optimizer)
        return built

    # In a patched tree the plugin wraps this one, and looks at its signature.
    @functools.wraps(train_step)
    def recorded_train_step(*args: Any, **kwargs: Any) -> Any:
        outcome = train_step(*args, **kwargs)
        losses, skipped, grad_norm, num_zeros = (outcome[i] for i in (0, 1, 5, 6))
        held["losses"] += [float(loss) for loss in losses.values()]
        held["skipped"].append(skipped)
        held["grad_norms"].append(grad_norm)
        held["num_zeros"].append(num_zeros)
        return outcome

    training.setup_model_and_optimizer = recorded_setup
    training.train_step = recorded_train_step
    flags = [*base.split(), *argv.split()]
    sys.argv = [str(SCRIPT), *flags, *rehearsal_flags(flags)]
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as exc:  # --exit-interval
        if exc.code not in (None, 0):
            raise
    return held


def snapshot(inner: torch.optim.Optimizer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Copies of each param and its exp_avg, in the order of the groups."""
    return [
        (param.detach().clone(), inner.state[param]["exp_avg"].clone())
        for group in inner.param_groups
        for param in group["params"]
    ]


def record_steps(inner: torch.optim.Optimizer) -> dict[str, Any]:
    """Record what the inner optimizer is given from now on.

    Returns:
        "start": see `snapshot`; "steps": for every step and param, in the same order, the
        group's hyperparameters and the gradient, unscaled and clipped.
    """
    recorded: dict[str, Any] = {"start": snapshot(inner), "steps": []}

    def record(optimizer: torch.optim.Optimizer, _: Any, kwargs: dict[str, Any]) -> None:
        # Clipping is done inside the step, by this factor.
        scale = kwargs.get("grad_scale", 1.0)
        recorded["steps"].append(
            [
                ({k: v for k, v in group.items() if k != "params"}, param.grad * scale)
                for group in optimizer.param_groups
                for param in group["params"]
            ]
        )

    inner.register_step_pre_hook(record)
    return recorded


def describe(part: Any, names: dict[int, str]) -> dict[str, Any]:
    """What one of Megatron's optimizers holds on this rank.

    Returns:
        "classes": the Megatron optimizer's and the inner one's; "groups": its param groups
        without params; "shards": for every param of the inner optimizer "param", the "state"
        tensors by key (in fp8: as uint8), of AdamS also "main_param" and "exp_avg" in full, and
        "bytes_per_param" of all state.
    """
    from megatron_adams.megatron.offload import HybridAdamS

    inner = part.optimizer
    described: dict[str, Any] = {
        "classes": (type(part).__name__, type(inner).__name__),
        "config": part.config.optimizer,
        "groups": [],
        "shards": [],
    }
    if inner is None:
        return described
    for group in inner.param_groups:
        described["groups"].append({k: v for k, v in group.items() if k != "params"})
        for param in group["params"]:
            state = inner.state.get(param, {})
            shard: dict[str, Any] = {
                "param": param.detach().clone(),
                # Megatron allows no fp8 tensor to be unpickled.
                "state": {
                    k: (v.view(torch.uint8) if v.dtype.itemsize == 1 else v).clone()
                    for k, v in state.items()
                },
            }
            if isinstance(inner, (AdamS, HybridAdamS)) and state:
                shard["main_param"] = inner.get_unscaled_state(param, "master_param").clone()
                shard["exp_avg"] = inner.get_unscaled_state(param, "exp_avg").clone()
                shard["bytes_per_param"] = sum(v.dtype.itemsize for v in state.values())
            described["shards"].append(shard)
    return described


def load_plain(checkpoint: str) -> dict[str, torch.Tensor]:
    """Every tensor of a torch_dist checkpoint at its global shape, by key; run on one rank."""
    from megatron.core import dist_checkpointing

    torch.distributed.init_process_group("gloo")
    tensors = dist_checkpointing.load_plain_tensors(checkpoint)
    return {key: value.clone() for key, value in tensors.items() if torch.is_tensor(value)}
