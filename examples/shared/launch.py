"""Start a recipe: the command line of pretrain_gpt2/train.py, pretrain_llama2/train.py and others.

It merges the recipe's flags, checks what can be checked before any rank runs, prints the memory
plan, and becomes torchrun."""

import argparse
import json
import os
import secrets
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from shared import rehearsal
from shared.command import (
    REPOSITORY,
    WITHOUT_TRANSFORMER_ENGINE,
    Flags,
    command_line_flags,
    exit_code_of,
    num_visible_gpus,
    training_environment,
)
from shared.prepare_data import dataset_flags
from shared.recipe import (
    OPTIMIZERS,
    PRECISIONS,
    Recipe,
    check_layout,
    parse_flags,
)

# A rehearsal without --data trains on Megatron's own made-up sequences.
_MOCK_DATA: Flags = {"mock-data": True, "tokenizer-type": "NullTokenizer", "vocab-size": 512}
# Any of these after -- says where the data come from.
_DATA_FLAGS = {
    "mock-data",
    "data-path",
    "train-data-path",
    "data-args-path",
    "per-split-data-args-path",
}


@dataclass(frozen=True)
class Script:
    """The Megatron script that a recipe is for.

    Attributes:
        dataset_flags: the flags that train on a prepared folder.
        own_flags: those that Megatron's own scripts do not know; the memory plan is made without.
    """

    path: Path
    dataset_flags: Callable[[Path], Flags]
    own_flags: frozenset[str] = frozenset()


GPT = Script(REPOSITORY / "examples" / "pretrain_gpt" / "pretrain_gpt.py", dataset_flags)

# How long torchrun waits for its workers after SIGTERM: a step, and then a checkpoint.
_SHUTDOWN_TIMEOUT_S = 300


@dataclass(frozen=True)
class Nodes:
    """What torchrun's own environment variables say of the job's nodes.

    Attributes:
        num_nodes: PET_NNODES; None where it is unset, which means this machine alone.
        is_first: whether this is the node that prints and writes for all.
        ranks_per_node: PET_NPROC_PER_NODE as a number; None where it is unset.
    """

    num_nodes: int | None
    is_first: bool
    ranks_per_node: int | None

    @classmethod
    def from_environment(cls) -> "Nodes":
        """Read PET_NNODES, PET_NODE_RANK and PET_NPROC_PER_NODE.

        Raises:
            ValueError: a value is no number. A layout of Megatron's has a fixed size, so that a
                range of nodes (1:4), which torchrun takes, means nothing here.
        """
        return cls(
            num_nodes=_number_from_environment("PET_NNODES"),
            is_first=os.environ.get("PET_NODE_RANK", "0") == "0",
            ranks_per_node=_number_from_environment("PET_NPROC_PER_NODE"),
        )


def _number_from_environment(name: str) -> int | None:
    value = os.environ.get(name)
    if value is None:
        return None
    if name == "PET_NPROC_PER_NODE" and value in ("auto", "gpu") and num_visible_gpus():
        return num_visible_gpus()
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(
            f"{name}={value}: must be one positive number; set it to that, or unset it"
        )
    return int(value)


@dataclass(frozen=True)
class Job:
    """A job that is ready to start.

    Attributes:
        job_flags: what it is trained with at its full size.
        flags: what it is started with: the same, or a rehearsal's.
        notes: what was changed, for the terminal.
        num_ranks: over all nodes.
    """

    script: Script
    job_flags: Flags
    flags: Flags
    notes: list[str]
    nodes: Nodes
    num_ranks: int
    ranks_per_node: int
    out: Path
    is_rehearsal: bool

    def command(self) -> list[str]:
        """Return the torchrun command."""
        words = [sys.executable, "-m", "torch.distributed.run"]
        if self.nodes.num_nodes is None:
            words.append("--standalone")
        if self.nodes.ranks_per_node is None:
            words += ["--nproc-per-node", str(self.ranks_per_node)]
        # Every rank's output goes to a file of its own and to the terminal.
        words += ["--log-dir", str(self.out / "logs"), "--tee", "3"]
        words += ["-m", "megatron_adams.launch"]
        # Asked for by name, so that a GPU of this machine is no reason to refuse.
        words += ["--force-cpu-rehearsal"] if self.is_rehearsal else []
        return [*words, str(self.script.path), *command_line_flags(self.flags)]

    def environment(self) -> dict[str, str]:
        """Return the environment of the torchrun command."""
        environment = {
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_SHUTDOWN_TIMEOUT_S),
            "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[${rank}] ",
            # torch 2.14 keeps one store for all restarts (PET_MAX_RESTARTS). The ranks of a restart
            # then find the addresses of the dead ones in it, and cannot connect.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            **training_environment(self.ranks_per_node),
        }
        if "wandb-project" in self.flags:
            # A resumed job goes on in the same W&B run.
            environment.setdefault("WANDB_RUN_ID", _wandb_run_id(self.out))
            environment.setdefault("WANDB_RESUME", "allow")
        return environment

    def printed(self) -> str:
        """Return the command as a line for a shell, with what it needs of the environment."""
        names = ("PYTHONPATH", "OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "PYTHONUNBUFFERED")
        environment = self.environment()
        names += ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE")
        names += ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE",)
        names += tuple(sorted(name for name in environment if name.startswith(("PET_", "WANDB_R"))))
        settings = [f"{name}={environment[name]}" for name in names]
        return shlex.join(["env", *settings, *self.command()])


def _wandb_run_id(out: Path) -> str:
    """Return the W&B run of a folder, the same for every start and on every node."""
    path = out / "wandb_run_id.txt"
    out.mkdir(parents=True, exist_ok=True)
    mine = out / f".wandb_run_id-{secrets.token_hex(8)}"
    mine.write_text(secrets.token_hex(8))
    try:
        os.link(mine, path)  # fails where another node was first
    except FileExistsError:
        pass
    finally:
        mine.unlink()
    return path.read_text()


def parser(recipe: Recipe) -> argparse.ArgumentParser:
    """Return the command line's parser: everything before `--`."""
    arguments = argparse.ArgumentParser(
        usage="%(prog)s --model NAME (--data FOLDER | --cpu-rehearsal) --out FOLDER [options] "
        "[-- Megatron's flags]",
        description=f"Train a model of {recipe.path.parent.name}/{recipe.path.name} with AdamS, or "
        "with AdamW. Goes on from the last checkpoint in --out, if there is one.",
        epilog="Flags of Megatron after -- win over the recipe's. On several nodes, start it on "
        "each, with torchrun's environment variables: PET_NNODES, PET_NODE_RANK, PET_RDZV_BACKEND, "
        "PET_RDZV_ENDPOINT, PET_RDZV_ID, or PET_MASTER_ADDR and PET_MASTER_PORT. "
        "PET_NPROC_PER_NODE is the number of ranks on a node; default: one for each GPU.",
    )
    arguments.add_argument("--model", required=True, choices=list(recipe.models), help="its size")
    arguments.add_argument(
        "--optimizer", default="adams", choices=OPTIMIZERS, help="default: %(default)s"
    )
    arguments.add_argument(
        "--precision",
        default="bf16",
        choices=PRECISIONS,
        help="default: %(default)s; fp8 needs TransformerEngine and has not been run on a GPU",
    )
    arguments.add_argument("--data", type=Path, help="a folder that prepare_data.py has made")
    arguments.add_argument(
        "--out",
        type=Path,
        help="where checkpoints, TensorBoard's files and logs go; a folder with a checkpoint is "
        "resumed; default: runs/RECIPE-MODEL-OPTIMIZER-PRECISION",
    )
    arguments.add_argument(
        "--cpu-rehearsal",
        action="store_true",
        help="run the same parallel layout on CPU processes, with a model and batches so small "
        "that it takes a minute; without --data on made-up sequences",
    )
    arguments.add_argument(
        "--wandb-project",
        default=os.environ.get("WANDB_PROJECT"),
        help="log to this W&B project, too; default: $WANDB_PROJECT. WANDB_MODE=offline works",
    )
    arguments.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="FLAG",
        help="leave a flag of the recipe out (overlap-param-gather, for one); may be repeated",
    )
    arguments.add_argument(
        "--no-plan", action="store_true", help="do not compute the memory plan before the start"
    )
    arguments.add_argument(
        "--print", action="store_true", help="print the torchrun command line and exit"
    )
    return arguments


def make_job(recipe: Recipe, args: argparse.Namespace, extra: Flags, script: Script = GPT) -> Job:
    """Merge the flags of a job and check them.

    Args:
        extra: Megatron's flags of the user's.

    Raises:
        ValueError: the job cannot be started as asked for.
    """
    nodes = Nodes.from_environment()
    has_te = find_spec("transformer_engine") is not None
    num_gpus = 0 if args.cpu_rehearsal else num_visible_gpus()
    if not args.cpu_rehearsal and not num_gpus and nodes.ranks_per_node is None:
        raise ValueError(
            "no GPU is visible: give --cpu-rehearsal to try the job on CPU processes; to --print a "
            "cluster's command line, set PET_NPROC_PER_NODE to the GPUs of its nodes"
        )
    on_cluster = args.print and not num_gpus  # printed here, run elsewhere: as where TE is
    job_te = has_te or on_cluster or args.cpu_rehearsal
    if args.precision == "fp8" and not job_te:
        raise ValueError(
            "--precision fp8: needs TransformerEngine, which is not installed here; "
            "pip install 'megatron-adams[te]', or use NVIDIA's PyTorch container"
        )

    job_flags = recipe.flags(args.model, args.optimizer, args.precision, transformer_engine=job_te)
    for name in (flag.removeprefix("--") for flag in args.without):
        if name not in job_flags:
            raise ValueError(f"--without {name}: the recipe of {args.model} has no such flag")
        del job_flags[name]
    if args.data is not None:
        job_flags |= script.dataset_flags(args.data)
    elif args.cpu_rehearsal and not _DATA_FLAGS & extra.keys():
        job_flags |= _MOCK_DATA
    elif not _DATA_FLAGS & extra.keys():
        raise ValueError(
            "--data is missing: give a folder that prepare_data.py has made, or Megatron's flags "
            "for your own data, as -- --data-path PREFIX --tokenizer-type ..."
        )
    out = (args.out or _default_out(recipe, args)).resolve()
    job_flags |= _output_flags(out, recipe, args)
    job_flags |= extra

    flags, notes = job_flags, []
    ranks_per_node = nodes.ranks_per_node or num_gpus
    if args.cpu_rehearsal:
        ranks_per_node = nodes.ranks_per_node or rehearsal.num_ranks(job_flags)
        # What only TransformerEngine's layers have. What the user asks for stays: the launcher says
        # in a sentence where it cannot be rehearsed.
        absent = recipe.transformer_engine.keys() | recipe.precision["fp8"].keys()
        absent -= recipe.precision["bf16"].keys() | extra.keys()
        small = rehearsal.shrink(job_flags, ranks_per_node * (nodes.num_nodes or 1))
        small = {name: value for name, value in small.items() if name not in extra}
        flags = {name: value for name, value in job_flags.items() if name not in absent}
        flags |= WITHOUT_TRANSFORMER_ENGINE | small
        notes = rehearsal.describe(job_flags, small, [flag for flag in job_flags if flag in absent])
    elif not has_te and not on_cluster:
        notes.append(
            "TransformerEngine is not installed: Megatron's own layers run, which are slower and "
            "need more memory"
            + "".join(f"; left out: --{name}" for name in recipe.transformer_engine)
        )
    num_ranks = ranks_per_node * (nodes.num_nodes or 1)
    check_layout(flags, num_ranks)
    return Job(
        script=script,
        job_flags=job_flags,
        flags=flags,
        notes=notes,
        nodes=nodes,
        num_ranks=num_ranks,
        ranks_per_node=ranks_per_node,
        out=out,
        is_rehearsal=args.cpu_rehearsal,
    )


def _default_out(recipe: Recipe, args: argparse.Namespace) -> Path:
    name = f"{recipe.path.parent.name}-{args.model}-{args.optimizer}-{args.precision}"
    return REPOSITORY / "runs" / (f"{name}-rehearsal" if args.cpu_rehearsal else name)


def _output_flags(out: Path, recipe: Recipe, args: argparse.Namespace) -> Flags:
    flags: Flags = {
        # Megatron says when the folder has no checkpoint, and starts from the beginning.
        "save": out / "checkpoints",
        "load": out / "checkpoints",
        "tensorboard-dir": out / "tensorboard",
        "data-cache-path": out / "data_index",
    }
    if args.wandb_project:
        flags["wandb-project"] = args.wandb_project
        flags["wandb-exp-name"] = out.name
        flags["wandb-save-dir"] = out
    return flags


def claim_folder(job: Job, recipe: Recipe, args: argparse.Namespace) -> None:
    """Write into the job's folder what is trained there, or compare.

    Raises:
        ValueError: another model, optimizer or precision was trained there.
    """
    record = {
        "recipe": recipe.path.parent.name,
        "model": args.model,
        "optimizer": args.optimizer,
        "precision": args.precision,
        "cpu_rehearsal": args.cpu_rehearsal,
    }
    path = job.out / "job.json"
    if path.exists():
        found = json.loads(path.read_text())
        differing = [name for name in record if found.get(name) != record[name]]
        if differing:
            difference = ", ".join(f"{name} {found.get(name)}" for name in differing)
            asked = ", ".join(f"{name} {record[name]}" for name in differing)
            raise ValueError(
                f"--out {job.out}: holds a job with {difference}, and {asked} is asked for; "
                "give another --out, or remove this one"
            )
    if job.nodes.is_first:
        job.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n")
        (job.out / "command.sh").write_text(job.printed() + "\n")


def memory_plan(flags: Flags, num_ranks: int) -> str:
    """Return the memory plan of a job, or why there is none: it is a help, not a condition."""
    try:
        from megatron_adams.planning import summary

        return summary(command_line_flags(flags), num_ranks=num_ranks)
    except Exception as exc:
        return f"There is no memory plan ({type(exc).__name__}: {exc}). Training starts without it."


def start(recipe: Recipe, args: argparse.Namespace, extra: Flags, script: Script = GPT) -> None:
    """Print the job's command line, or become it; returns in the first case alone.

    Raises:
        ValueError: the job cannot be started as asked for.
    """
    job = make_job(recipe, args, extra, script)
    if args.print:
        print(job.printed())
        return
    claim_folder(job, recipe, args)
    if job.nodes.is_first:
        for note in job.notes:
            print(note)
        if not args.no_plan:
            known = {k: v for k, v in job.job_flags.items() if k not in script.own_flags}
            print(memory_plan(known, job.num_ranks))
        print(f"Starting {job.num_ranks} ranks; everything goes to {job.out}", flush=True)
    command = job.command()
    os.execve(command[0], command, job.environment())


def main(recipe_path: Path, argv: Sequence[str] | None = None, script: Script = GPT) -> int:
    """Start a job from the command line; 2 for what the user has to change."""
    argv = list(sys.argv[1:] if argv is None else argv)

    def program() -> None:
        recipe = Recipe.load(recipe_path)
        own, extra = argv, []
        if "--" in argv:
            end = argv.index("--")
            own, extra = argv[:end], argv[end + 1 :]
        start(recipe, parser(recipe).parse_args(own), parse_flags(extra), script)

    return exit_code_of(program)
