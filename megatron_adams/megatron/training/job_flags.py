"""A job's flags as `megatron-adams plan` takes them: validated by Megatron, without its machine.

What Megatron refuses is refused here with its own words, and what the plan cannot count with a
remedy. Used by memory/.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import megatron.core
import megatron.training
from packaging.version import Version

import megatron_adams
from megatron_adams.megatron.names import ADAMS, flag_of

# What Megatron takes for the installed TransformerEngine where it asks for its version: a job's
# flags may need it, and the process that plans hides it.
_TRANSFORMER_ENGINE = Version("2.20")
# Where the rules are that a job's flags can break.
_RULES = (*megatron.core.__path__, *megatron.training.__path__, *megatron_adams.__path__)


class RefusedError(ValueError):
    """The flags make no job that can be planned; the message says what to change."""


# Flag -> argument, whether it is given, and why it is not planned.
_NOT_PLANNED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "--use-megatron-fsdp",
        lambda args: args.use_megatron_fsdp,
        "plan counts the buffers of Megatron's DDP; plan with --use-distributed-optimizer",
    ),
    (
        "--use-torch-fsdp2",
        lambda args: args.use_torch_fsdp2,
        "plan counts the buffers of Megatron's DDP; plan with --use-distributed-optimizer",
    ),
    (
        "--optimizer-cpu-offload",
        lambda args: args.optimizer_cpu_offload,
        "plan counts state on the GPU alone; leave it out to see how much there is to offload",
    ),
    (
        "--tensor-parallel-num-weight-shards",
        lambda args: any(
            getattr(args, name, 1) > 1
            for name in ("gtp_weight_remat_size", "expert_gtp_weight_remat_size")
        ),
        "its params are TransformerEngine's; plan without it",
    ),
    (
        "--use-checkpoint-args",
        lambda args: args.use_checkpoint_args,
        "plan reads no checkpoint; give the model's flags instead",
    ),
    (
        "--spec",
        lambda args: args.spec is not None,
        "plan knows Megatron's own GPT layers; leave it out if the params have the same shapes",
    ),
    (
        "--hybrid-layer-pattern",
        lambda args: getattr(args, "hybrid_layer_pattern", None) is not None,
        "plan builds GPT models, no hybrid ones; the flags of a GPT of the same size come close",
    ),
    (
        "--experimental-attention-variant",
        lambda args: args.experimental_attention_variant is not None,
        "its layers need TransformerEngine; plan without it",
    ),
    (
        "--moe-latent-size",
        lambda args: args.moe_latent_size is not None,
        "its layers need TransformerEngine; plan without it",
    ),
    (
        "--heterogeneous-layers-config-path",
        lambda args: args.heterogeneous_layers_config_path is not None,
        "plan builds models of like layers; plan without it",
    ),
    (
        "--softmax-type",
        lambda args: args.softmax_type == "learnable",
        "its params are TransformerEngine's; plan with --softmax-type vanilla, which has one "
        "param a head less",
    ),
)
# What a model cannot do without, in Megatron's order.
_REQUIRED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "max_position_embeddings",
    "micro_batch_size",
)


class _ParserError(Exception):
    """What argparse prints before it exits."""


def validated(flags: Sequence[str], num_ranks: int) -> argparse.Namespace:
    """Return Megatron's arguments of a job, parsed and validated by Megatron and the plugin.

    Args:
        flags: of the training script.
        num_ranks: processes of the job.

    Raises:
        RefusedError: Megatron, the plugin or `plan` does not take these flags.
    """
    from megatron.training import arguments

    os.environ.update(RANK="0", WORLD_SIZE=str(num_ranks))

    # Megatron reads the file while it parses.
    if any(flag.partition("=")[0] == "--yaml-cfg" for flag in flags):
        raise RefusedError(
            "--yaml-cfg is not planned: plan reads flags alone; give them on the command line"
        )

    def error(_: argparse.ArgumentParser, message: str) -> None:
        raise _ParserError(message)

    with (
        patch.object(sys, "argv", ["pretrain_gpt.py", *flags]),
        patch.object(argparse.ArgumentParser, "error", error),
    ):
        try:
            args = arguments.parse_args()
        except _ParserError as exc:
            raise RefusedError(
                f"Megatron {megatron.core.__version__} does not take these flags: {exc}; correct "
                f"them, and leave out what is the script's own"
            ) from exc
        except SystemExit as exc:
            raise RefusedError("--help: plan takes the flags of a job; leave it out") from exc
    _check_before(args, num_ranks)
    with refusals():
        arguments.validate_args(args)
    # Validation sets some of the sizes.
    _check_planned(args)
    _set_vocab_size(args)
    return args


def _check_planned(args: argparse.Namespace) -> None:
    for flag, is_given, remedy in _NOT_PLANNED:
        if is_given(args):
            raise RefusedError(f"{flag} is not planned: {remedy}")


def _check_before(args: argparse.Namespace, num_ranks: int) -> None:
    """Refuse, in words that say what to do, what Megatron's validation would refuse first."""
    _check_planned(args)
    missing = [flag_of(name) for name in _REQUIRED if getattr(args, name) is None]
    if missing:
        raise RefusedError(
            f"{', '.join(missing)} missing: the flags must describe a model; add them, or name a "
            f"model with --model"
        )
    if args.optimizer not in ("adam", ADAMS):
        raise RefusedError(
            f"--optimizer {args.optimizer} is not planned: plan compares adam and {ADAMS}; give "
            f"one of them"
        )
    sizes = {
        "--tensor-model-parallel-size": args.tensor_model_parallel_size,
        "--pipeline-model-parallel-size": args.pipeline_model_parallel_size,
        "--context-parallel-size": args.context_parallel_size,
    }
    product = 1
    for flag, size in sizes.items():
        if size < 1:
            raise RefusedError(f"{flag} {size}: must be at least 1")
        product *= size
    if num_ranks % product:
        words = " x ".join(f"{flag} {size}" for flag, size in sizes.items() if size > 1)
        raise RefusedError(
            f"{num_ranks} ranks do not divide into {words}: the number of ranks must be a "
            f"multiple of {product}; change the sizes, or the ranks with --dp, --world-size or "
            f"torchrun's --nnodes and --nproc-per-node"
        )


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what Megatron raises for flags that contradict each other into a RefusedError."""
    known = patch.object(megatron.core.utils, "_te_version", _TRANSFORMER_ENGINE)
    try:
        with known:
            yield
    except RefusedError:
        raise
    except (AssertionError, ValueError, RuntimeError, ImportError, SystemExit) as exc:
        where = traceback.extract_tb(exc.__traceback__)[-1]
        if not any(Path(where.filename).is_relative_to(folder) for folder in _RULES):
            raise
        message = " ".join(str(exc).split())
        if not message or isinstance(exc, SystemExit):
            message = f"{where.line} ({Path(where.filename).name}, line {where.lineno})"
        raise RefusedError(
            f"Megatron {megatron.core.__version__} refuses these flags: {message.rstrip('.')}; "
            f"change them and plan again"
        ) from exc


def _set_vocab_size(args: argparse.Namespace) -> None:
    """Have the padded size of the vocabulary, as a run takes it: from its tokenizer, or given."""
    from megatron.core.tokenizers.utils.build_tokenizer import (
        build_tokenizer,
        vocab_size_with_padding,
    )

    if getattr(args, "padded_vocab_size", None) is not None:
        return
    files = [args.tokenizer_model, args.vocab_file]
    if str(args.tokenizer_type).startswith("Null") or any(f and Path(f).exists() for f in files):
        try:
            build_tokenizer(args)
        except Exception as exc:
            if args.vocab_size is None:
                words = " ".join(str(exc).split())
                raise RefusedError(
                    f"the tokenizer cannot be read: {words}; add --vocab-size"
                ) from exc
    if args.padded_vocab_size is None:
        if args.vocab_size is None:
            raise RefusedError(
                "the size of the vocabulary is not known: the tokenizer's files are not on this "
                "machine; add --vocab-size (GPT-2's is 50257, Llama-2's 32000)"
            )
        args.padded_vocab_size = vocab_size_with_padding(args.vocab_size, args)
