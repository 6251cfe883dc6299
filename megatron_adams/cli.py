"""The command `megatron-adams`, also `python -m megatron_adams.cli`.

    megatron-adams precompile --arch sm_90 --cache-dir /opt/megatron-adams
    megatron-adams convert /checkpoints/adamw /checkpoints/adams
    megatron-adams plan --model llama2-13b --tp 2 --pp 2 --dp 64
    megatron-adams doctor --expect-gpus 8
    megatron-adams tune -- torchrun ... -m megatron_adams.launch pretrain_gpt.py ...

It must not import Megatron at its top, and needs no GPU.
"""

import argparse
import sys
from collections.abc import Sequence

from megatron_adams.commands import convert, doctor, plan, precompile, tune
from megatron_adams.commands.terminal import fail

_COMMANDS = (plan, doctor, precompile, convert, tune)
# What the extra `tools` brings.
_TOOLS = ("packaging", "rich")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code: 1 if it fails, 2 (SystemExit) for wrong arguments.

    Args:
        argv: by default sys.argv[1:].
    """
    parser = argparse.ArgumentParser(prog="megatron-adams", description="Tools of megatron-adams.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in _COMMANDS:
        command.add_to(commands)
    args = parser.parse_args(argv)
    try:
        exit_code: int = args.run(args)
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] not in _TOOLS:
            raise
        return fail(f"{args.command} needs {exc.name}: pip install 'megatron-adams[tools]'")
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
