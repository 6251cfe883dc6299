"""`megatron-adams plan`: what a job takes of each GPU's memory, from its launch flags."""

import argparse
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_adams.commands.terminal import fail
from megatron_adams.planning import PlanError, compute
from megatron_adams.planning.chart import draw
from megatron_adams.planning.command_line import Command, read_text, read_words
from megatron_adams.planning.gpus import GIB, Gpu, known_names, named
from megatron_adams.planning.models import MODELS, batch_size, model_flags
from megatron_adams.planning.results import Plan

_DESCRIPTION = """\
Show what a job takes of each GPU's memory, with AdamW and with AdamS, from Megatron's flags:

  megatron-adams plan --model llama2-13b --tp 2 --pp 2 --dp 64 --gpu h100
  megatron-adams plan --script pretrain.sh
  megatron-adams plan -- torchrun --nnodes 32 --nproc-per-node 8 pretrain_gpt.py --num-layers ...

Weights, gradients and optimizer state are counted in Megatron's own buffers and optimizers, which
are built without memory. Needs no GPU and no network.
"""

# Short form -> Megatron's flag.
_SIZES = {
    "tp": "--tensor-model-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "cp": "--context-parallel-size",
    "ep": "--expert-model-parallel-size",
}


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "plan",
        help="show what a job takes of each GPU's memory",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="megatron-adams plan [options] [-- Megatron's launch flags]",
    )
    parser.add_argument(
        "--model", metavar="NAME", help=f"a model's flags by its name: {', '.join(MODELS)}"
    )
    parser.add_argument(
        "--script",
        metavar="FILE",
        help="a script that holds the command line; - reads it from standard input",
    )
    for name, flag in _SIZES.items():
        parser.add_argument(f"--{name}", type=_size, metavar="N", help=f"Megatron's {flag}")
    parser.add_argument(
        "--dp", type=_size, metavar="N", help="data-parallel size; gives the number of ranks"
    )
    parser.add_argument("--world-size", type=_size, metavar="N", help="ranks of the job")
    parser.add_argument("--nodes", type=_size, metavar="N", help="nodes of --gpus-per-node GPUs")
    parser.add_argument("--gpus-per-node", type=_size, metavar="N", default=8, help="by default 8")
    parser.add_argument(
        "--gpu", metavar="NAME", help=f"whether it fits: {', '.join(known_names())}"
    )
    parser.add_argument(
        "--gpu-memory-gib", type=_number, metavar="X", help="of another GPU, or less of a known one"
    )
    parser.add_argument(
        "--gpu-bandwidth", type=_number, metavar="X", help="of its memory, in GB/s, for the step"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes, for every rank")
    parser.add_argument(
        "--chart", type=Path, metavar="FILE", help="draw a picture, for example plan.png"
    )
    parser.add_argument("flags", nargs="*", metavar="flags", help=argparse.SUPPRESS)
    parser.set_defaults(run=lambda args: _run(args, parser))


def _size(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number from 1")
    return int(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be a number above 0")
    return value


def _run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    try:
        gpu = _gpu(args)
        flags, num_ranks = _job(args)
    except (ValueError, OSError) as exc:
        parser.error(str(exc))
    if not args.json:
        # Now, and not after the seconds that the plan takes, is said that it is missing.
        importlib.import_module("rich")
    try:
        plan = compute(flags, num_ranks, report=_progress())
    except PlanError as exc:
        if exc.is_refusal:
            parser.error(str(exc))
        return fail(str(exc))
    finally:
        _clear()
    if args.chart is not None:
        try:
            draw(plan, gpu, args.chart)
        except (ValueError, OSError) as exc:
            return fail(str(exc))
        print(f"{args.chart} written", file=sys.stderr)
    if args.json:
        print(json.dumps(plan.to_json(gpu), indent=2))
    else:
        _print_tables(plan, gpu)
    return 0


def _print_tables(plan: Plan, gpu: Gpu | None) -> None:
    # Here: rich would be imported by every other subcommand, too.
    from rich.console import Console

    from megatron_adams.planning.report import print_report

    # Where it is no terminal there is no width to keep to, and the tables are not to be cut.
    width = None if sys.stdout.isatty() else 100
    print_report(plan, gpu, Console(width=width, highlight=False))


def _progress() -> Callable[[str], None]:
    """Show progress on stderr: on a terminal in one line, elsewhere not at all."""

    def report(line: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{line} ...", end="", file=sys.stderr, flush=True)

    return report


def _clear() -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _gpu(args: argparse.Namespace) -> Gpu | None:
    """The GPU to compare with.

    Raises:
        ValueError: its name is not known.
    """
    known = named(args.gpu) if args.gpu else None
    if known is None and args.gpu_memory_gib is None:
        if args.gpu_bandwidth is not None:
            raise ValueError(
                f"--gpu-bandwidth {args.gpu_bandwidth:g} without a GPU: add --gpu or "
                f"--gpu-memory-gib"
            )
        return None
    memory_bytes = known.memory_bytes if known else 0
    if args.gpu_memory_gib is not None:
        memory_bytes = round(args.gpu_memory_gib * GIB)
    bandwidth_gb_s = args.gpu_bandwidth or (known.bandwidth_gb_s if known else None)
    return Gpu(known.name if known else "GPU", memory_bytes, bandwidth_gb_s)


def _job(args: argparse.Namespace) -> tuple[list[str], int]:
    """The training script's flags, later ones winning, and the number of ranks.

    Raises:
        ValueError: there are none, or sizes contradict each other.
    """
    flags: list[str] = []
    found = Command((), None)
    if args.model is not None:
        flags += model_flags(args.model)
    if args.script is not None:
        text = sys.stdin.read() if args.script == "-" else Path(args.script).read_text("utf-8")
        found = read_text(text)
        flags += found.flags
    for name, flag in _SIZES.items():
        if (size := getattr(args, name)) is not None:
            flags += [flag, str(size)]
    if args.flags:
        pasted = read_words(args.flags)
        flags += pasted.flags
        found = Command((), pasted.num_ranks or found.num_ranks)
    if not flags:
        raise ValueError(
            "there is nothing to plan: name a model with --model, a script with --script, or give "
            "Megatron's flags after --"
        )
    num_ranks = _num_ranks(args, flags, found)
    if args.model is not None:
        flags += _flags_of_layout(args.model, flags, num_ranks)
    return flags, num_ranks


def _flags_of_layout(model: str, flags: Sequence[str], num_ranks: int) -> list[str]:
    """What a named model's flags lack for their layout, where they do not have it yet."""
    more = []
    sizes = _sizes(flags)
    if sizes["tp"] > 1 and "--sequence-parallel" not in flags:
        more.append("--sequence-parallel")
    dp_size = num_ranks // (sizes["tp"] * sizes["pp"] * sizes["cp"])
    micro_batch_size = _last(flags, "--micro-batch-size") or 1
    if _last(flags, "--global-batch-size") is None and dp_size:
        batch = batch_size(model, dp_size * micro_batch_size)
        more += ["--global-batch-size", str(batch)]
    return more


def _sizes(flags: Sequence[str]) -> dict[str, int]:
    """The parallel sizes in Megatron's flags, the last of each; 1 where there is none."""
    return {name: _last(flags, flag) or 1 for name, flag in _SIZES.items()}


def _last(flags: Sequence[str], flag: str) -> int | None:
    """The last number that a flag is given; None where there is none."""
    words = [part for word in flags for part in word.split("=", 1)]
    values = [value for word, value in itertools.pairwise(words) if word == flag]
    numbers = [int(value) for value in values if value.isdigit()]
    return numbers[-1] if numbers else None


def _num_ranks(args: argparse.Namespace, flags: Sequence[str], found: Command) -> int:
    sizes = _sizes(flags)
    given: dict[str, int] = {}
    if args.dp is not None:
        given[f"--dp {args.dp}"] = args.dp * sizes["tp"] * sizes["pp"] * sizes["cp"]
    if args.world_size is not None:
        given[f"--world-size {args.world_size}"] = args.world_size
    if args.nodes is not None:
        given[f"--nodes {args.nodes}"] = args.nodes * args.gpus_per_node
    if len(set(given.values())) > 1:
        words = " and ".join(f"{option} ({ranks} ranks)" for option, ranks in given.items())
        raise ValueError(f"{words} contradict each other: give one of them")
    for num_ranks in given.values():
        return num_ranks
    if found.num_ranks is not None:
        return found.num_ranks
    if args.model is not None:
        return sizes["tp"] * sizes["pp"] * sizes["cp"]
    raise ValueError(
        "the number of ranks is not known: add --dp, --nodes or --world-size, or torchrun's "
        "--nnodes and --nproc-per-node as numbers"
    )
