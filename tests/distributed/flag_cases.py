"""What the ranks of test_flags.py run beside `cases.train`.

Training that is watched step by step, and Megatron's own parsing of a command line.
"""

import argparse
import contextlib
import importlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from tests.distributed import cases


def observe(argv: str, base: str = cases.TINY_GPT) -> dict[str, Any]:
    """Train as `cases.train`, and record every step.

    Returns:
        What `cases.train` returns, and "steps": for each step "params" and "exp_avg" before and
        after it, "grads" (what the inner optimizers were given, after clipping; None for a
        skipped step), "groups" (the group of each param, without params), "loss_scale" after it
        and "params_norm" where --log-params-norm asks for it. The lists are in the order of
        the chain's parts, their groups, and params.
    """
    from megatron.training import training

    steps: list[dict[str, Any]] = []
    train_step, params_norm = training.train_step, training.calc_params_l2_norm

    def recorded_train_step(*args: Any, **kwargs: Any) -> Any:
        chain = args[3]
        inners = [part.optimizer for part in chain.chained_optimizers if part.optimizer]
        grads: list[torch.Tensor] = []

        def record(inner: torch.optim.Optimizer, _: Any, kwargs: dict[str, Any]) -> None:
            # Clipping is done inside the step, by this factor.
            scale = kwargs.get("grad_scale", 1.0)
            grads.extend(
                param.grad * scale for group in inner.param_groups for param in group["params"]
            )

        handles = [inner.register_step_pre_hook(record) for inner in inners]
        before = _tensors(inners)
        outcome = train_step(*args, **kwargs)
        for handle in handles:
            handle.remove()
        after = _tensors(inners)
        steps.append(
            {
                "params": (before[0], after[0]),
                "exp_avg": (before[1], after[1]),
                "grads": grads or None,
                "groups": [
                    {k: v for k, v in group.items() if k != "params"}
                    for inner in inners
                    for group in inner.param_groups
                    for _ in group["params"]
                ],
                "loss_scale": float(chain.get_loss_scale()),
            }
        )
        return outcome

    def recorded_params_norm(*args: Any, **kwargs: Any) -> float:
        norm: float = params_norm(*args, **kwargs)
        steps[-1]["params_norm"] = norm
        return norm

    training.train_step = recorded_train_step
    training.calc_params_l2_norm = recorded_params_norm
    held = cases.train(argv, base=base)
    held["steps"] = steps
    return held


def train_without_plugin(argv: str) -> dict[str, Any]:
    """`cases.train` on a Megatron without the plugin."""
    utils = importlib.import_module("megatron.core.datasets.utils")
    # It runs make, which the wheel has no Makefile for: stock Megatron would exit here.
    utils.compile_helpers = lambda: None
    return cases.train(argv)


def _tensors(
    inners: Sequence[torch.optim.Optimizer],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Copies of the params and of their exp_avg, zeros where there is none yet."""
    params = [p for inner in inners for group in inner.param_groups for p in group["params"]]
    states = [i.state.get(p, {}) for i in inners for g in i.param_groups for p in g["params"]]
    return (
        [param.detach().clone() for param in params],
        [
            state["exp_avg"].clone() if "exp_avg" in state else torch.zeros_like(param)
            for param, state in zip(params, states, strict=True)
        ],
    )


def parse(argv: str, base: str = cases.TINY_GPT, world_size: int = 1) -> Any:
    """What Megatron makes of a command line: its argument namespace, for this process alone."""
    arguments = importlib.import_module("megatron.training.arguments")
    from megatron_adams.cpu_rehearsal import rehearsal_flags

    os.environ["WORLD_SIZE"] = str(world_size)
    # Flags that a rehearsal refuses are to reach Megatron here: only the base is completed.
    flags = base.split()
    batch = ["--global-batch-size", str(8 * world_size)]
    sys.argv = ["pretrain.py", *flags, *rehearsal_flags(flags), *batch, *argv.split()]
    args = arguments.parse_args()
    with contextlib.redirect_stdout(io.StringIO()):
        arguments.validate_args(args)
    return args


def refusals(commands: Sequence[str]) -> list[str | None]:
    """The ValueError that each command line ends in, None where it does not."""
    messages: list[str | None] = []
    for argv in commands:
        try:
            parse(argv)
        except ValueError as exc:
            messages.append(str(exc))
        else:
            messages.append(None)
    return messages


def parsed(commands: Sequence[str], names: Sequence[str]) -> list[dict[str, Any]]:
    """Some of the arguments that each command line ends in, and "warnings", as texts."""
    answers = []
    for argv in commands:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            args = parse(argv)
        answers.append(
            {
                **{name: getattr(args, name) for name in names},
                "types": {name: type(getattr(args, name)).__name__ for name in names},
                "warnings": [str(warning.message) for warning in caught],
            }
        )
    return answers


def theoretical_memory(argv: str, world_size: int) -> dict[str, Any]:
    """Megatron's estimate of weight and optimizer bytes on the fullest rank.

    Returns:
        "adam", "adams": with --use-distributed-optimizer; "adam_plain", "adams_plain": without;
        "printed": what `report_theoretical_memory` prints for adams, "sizes": arguments.
    """
    usage = importlib.import_module("megatron.training.theoretical_memory_usage")
    args = parse(f"--optimizer adams --use-distributed-optimizer {argv}", world_size=world_size)
    args.padded_vocab_size = args.vocab_size  # `pretrain` sets it from the tokenizer
    estimates: dict[str, Any] = {"sizes": {k: v for k, v in vars(args).items() if _is_size(v)}}
    for optimizer in ("adam", "adams"):
        args.optimizer = optimizer
        for distributed in (True, False):
            args.use_distributed_optimizer = distributed
            name = optimizer if distributed else f"{optimizer}_plain"
            estimates[name] = usage.compute_weight_and_optimizer_memory(args)
    args.use_distributed_optimizer = True
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        usage.report_theoretical_memory(args, num_microbatches=1, verbose=True)
    estimates["printed"] = printed.getvalue()
    return estimates


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def parsers() -> tuple[list[Any], list[Any]]:
    """The flags of the parser that this rank is given, and of one that Megatron builds for it."""
    from megatron.training import arguments

    add = arguments.add_megatron_arguments
    given, built = (
        add_flags(argparse.ArgumentParser(allow_abbrev=False))
        for add_flags in (add, add.__wrapped__)
    )
    return _flags_of(given), _flags_of(built)


def _flags_of(parser: argparse.ArgumentParser) -> list[Any]:
    names = ("option_strings", "dest", "nargs", "const", "default", "required", "choices", "help")
    flags = [[repr(getattr(action, name)) for name in names] for action in parser._actions]
    return [(parser.prog, len(parser._action_groups)), *flags]
