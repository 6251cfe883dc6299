"""What Megatron, with AdamS registered, says of a command line, before a job has it.

Called by the doctor in a process of its own, which has no GPU: Megatron reads and validates the
arguments as at a job's start, and what it refuses, or AdamS, is passed on in its own words.
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import math
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import megatron.core

from megatron_adams.megatron.hooks import SUPPORTED_MEGATRON, UnsupportedMegatronError
from megatron_adams.megatron.names import dtype_name
from megatron_adams.megatron.register import register

# What the doctor chooses the kernels by, and says of the job.
_FLAGS = (
    "optimizer",
    "bf16",
    "fp16",
    "use_distributed_optimizer",
    "use_precision_aware_optimizer",
    "optimizer_cpu_offload",
    "optimizer_offload_fraction",
    "use_megatron_fsdp",
    "fp8_param_gather",
    "fp8_recipe",
    "transformer_impl",
    "adams_kernel",
    "adams_match_rms",
    "adams_max_update_rms",
    "adams_no_param_remainders",
)
_DTYPES = (
    "main_grads_dtype",
    "main_params_dtype",
    "exp_avg_dtype",
    "megatron_fsdp_main_params_dtype",
    "megatron_fsdp_main_grads_dtype",
)


def check_megatron() -> dict[str, Any]:
    """Import Megatron as a job does, and register AdamS.

    Returns:
        "version"; "supported": the range of versions; "refused": why AdamS cannot be registered,
        None where it was;
        "transformer_engine", "apex": "imported", "missing", or why it cannot be imported.
    """
    refused = None
    try:
        register()
    except (UnsupportedMegatronError, ImportError) as exc:
        refused = str(exc)
    return {
        "version": megatron.core.__version__,
        "supported": SUPPORTED_MEGATRON,
        "refused": refused,
        "transformer_engine": _state_of("transformer_engine.pytorch"),
        "apex": _state_of("apex"),
    }


def _state_of(module: str) -> str:
    """Megatron goes on in silence where one that is installed cannot be imported."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return "missing"
    try:
        importlib.import_module(module)
    except Exception as exc:  # libraries that do not load raise what they like
        return f"{type(exc).__name__}: {exc}"
    return "imported"


def check_flags(argv: Sequence[str], world_size: int | None) -> dict[str, Any]:
    """Parse and validate Megatron's flags; call `check_megatron` before.

    Args:
        argv: a script's arguments.
        world_size: of the job; None: the smallest that its parallel sizes allow.
    Returns:
        "refused": the message that a job would end with, None where it would start; "unknown":
        what Megatron does not know, which the script may; "warnings"; "world_size"; "arguments":
        some of them, as Megatron has completed them, {} where it refuses.
    """
    arguments = importlib.import_module("megatron.training.arguments")
    parsers: list[argparse.ArgumentParser] = []

    def keep(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parsers.append(parser)
        return parser

    answer: dict[str, Any] = {"refused": None, "unknown": [], "warnings": [], "arguments": {}}
    answer["world_size"] = world_size
    sys.argv = ["doctor", *argv]
    errors = io.StringIO()
    with (
        warnings.catch_warnings(record=True) as caught,
        contextlib.redirect_stderr(errors),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("always")
        try:
            args = arguments.parse_args(keep, ignore_unknown_args=True)
            answer["unknown"] = parsers[0].parse_known_args([*argv])[1]
            answer["world_size"] = args.world_size = world_size or smallest_world_size(args)
            arguments.validate_args(args)
        except SystemExit:
            # argparse: the usage, and then the error.
            lines = errors.getvalue().strip().splitlines() or ["Megatron has ended without a word"]
            answer["refused"] = lines[-1].partition("error: ")[2] or lines[-1]
        except Exception as exc:  # Megatron refuses with assertions and whatever else
            answer["refused"] = _words_of(exc)
        else:
            answer["arguments"] = {
                **{name: getattr(args, name, None) for name in _FLAGS},
                **{name: _name(getattr(args, name, None)) for name in _DTYPES},
            }
    own = [str(each.message) for each in caught if "--optimizer adams" in str(each.message)]
    answer["warnings"] = own
    return answer


def smallest_world_size(args: argparse.Namespace) -> int:
    """The fewest ranks that the parallel sizes allow."""
    dense = args.tensor_model_parallel_size * args.context_parallel_size
    expert_tp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    experts = expert_tp * args.expert_model_parallel_size
    stage = math.lcm(dense, experts) * args.num_distributed_optimizer_instances
    return int(args.pipeline_model_parallel_size * stage)


def _name(dtype: Any) -> str | None:
    return None if dtype is None else dtype_name(dtype)


def _words_of(exc: Exception) -> str:
    """An exception's message; where an assertion has none, what it asserts."""
    if str(exc):
        return " ".join(str(exc).split())
    frame = traceback.extract_tb(exc.__traceback__)[-1]
    return f"{type(exc).__name__}: {frame.line}"
