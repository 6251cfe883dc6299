"""`megatron-adams doctor`: is this machine fit for a job, and what to do where it is not."""

import argparse
import json
import os
import sys

_DESCRIPTION = """\
Look at this machine before a job does, and say what to do where it is not fit:

  megatron-adams doctor --expect-gpus 8 --expect-driver 580.65
  megatron-adams doctor --cpu-rehearsal
  megatron-adams doctor -- --optimizer adams --use-distributed-optimizer --bf16 ...

Versions, driver and GPUs (through NVML), the kernels that AdamS needs, and, behind --, a job's
launch flags. Exits with 0 where the machine is fit, warnings or not, with 1 where it is not, and
with 2 for wrong arguments. Makes no CUDA context and changes nothing: fit for a prolog.
"""


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "doctor",
        help="say whether this machine is fit for a job, and what to do where it is not",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] [-- launch flags]",
    )
    parser.add_argument(
        "--cpu-rehearsal",
        action="store_true",
        help="ask only for what a rehearsal on CPU processes needs",
    )
    parser.add_argument(
        "--expect-driver",
        metavar="VERSION",
        help="the driver's version, or its first parts: 580, 580.65",
    )
    parser.add_argument(
        "--expect-gpus", type=int, metavar="N", help="how many GPUs a job here has to see"
    )
    parser.add_argument(
        "--while-running",
        action="store_true",
        help="a job is on the GPUs: its processes, memory and power cap are no fault",
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="ranks of the job whose flags are given; by default $WORLD_SIZE, or the fewest that "
        "its parallel sizes allow",
    )
    parser.add_argument(
        "--quick", action="store_true", help="do not import Megatron, which takes seconds"
    )
    parser.add_argument(
        "--strict", action="store_true", help="warnings count, and what is not known"
    )
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="CHECK",
        help="a check that does not count, by its name or a pattern (gpu*.nvlink); can be given "
        "several times",
    )
    parser.add_argument("--verbose", action="store_true", help="every check of every GPU")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("flags", nargs="*", help=argparse.SUPPRESS)
    parser.set_defaults(run=lambda args: _run(args, parser))


def _run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    # Here: rich, and what asks the GPUs, would be imported by every other subcommand, too.
    from megatron_adams.doctor import Question, examine
    from megatron_adams.doctor.view import show

    try:
        world_size = _check(args)
    except ValueError as exc:
        parser.error(str(exc))
    report = examine(
        Question(
            for_gpu=not args.cpu_rehearsal,
            flags=tuple(args.flags) or None,
            world_size=world_size,
            expected_driver=args.expect_driver,
            expected_gpus=args.expect_gpus,
            is_running=args.while_running,
            imports_megatron=not args.quick,
            ignored=args.ignore,
            is_strict=args.strict,
        )
    )
    if args.json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        show(report, sys.stdout, is_verbose=args.verbose)
    return report.exit_status


def _check(args: argparse.Namespace) -> int | None:
    """Refuse arguments that contradict each other; return the world size.

    Raises:
        ValueError: naming them.
    """
    for flag, value in (("--expect-gpus", args.expect_gpus), ("--world-size", args.world_size)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} {value}: must be at least 1")
    if args.cpu_rehearsal:
        for flag, is_given in (
            ("--expect-driver", args.expect_driver is not None),
            ("--expect-gpus", args.expect_gpus is not None),
            ("--while-running", args.while_running),
        ):
            if is_given:
                raise ValueError(f"{flag} with --cpu-rehearsal: that uses no GPU; remove one")
    if args.flags and not args.flags[0].startswith("-"):
        raise ValueError(
            f"{args.flags[0]!r}: is no option; a job's launch flags, without its script, go "
            "behind --"
        )
    if args.flags and args.quick:
        raise ValueError("--quick with launch flags: Megatron judges them; remove one")
    if args.world_size is not None and not args.flags:
        raise ValueError("--world-size without launch flags: give them behind --, or remove it")
    if args.world_size is None and args.flags and (text := os.environ.get("WORLD_SIZE")):
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"WORLD_SIZE={text} in the environment: must be a number of ranks")
        return int(text)
    given: int | None = args.world_size
    return given
