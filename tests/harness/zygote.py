"""A process that imports Megatron once and forks the ranks of each test case from there.

    python -m tests.harness.zygote SOCKET [--without-plugin | --with-transformer-engine |
                                           --without-megatron]

Started by `cluster.Cluster`, for all workers of pytest that want the same world. Each worker
connects to SOCKET, and a fork serves it: that one reads one JSON request a line, and answers with
one line. A rank costs a fork instead of the many seconds that importing Megatron takes. None of
these processes runs a tensor operation: threads of OpenMP do not survive a fork.
"""

import argparse
import contextlib
import ctypes
import faulthandler
import functools
import gc
import importlib
import json
import linecache
import os
import pickle
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tests.harness import other_megatron

REPO = Path(__file__).resolve().parents[2]

IMPORTED_BY_EVERY_RANK = (
    "megatron.training.training",
    "megatron.core.datasets.blended_megatron_dataset_builder",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.datasets.helpers",
    "megatron.core.tokenizers.text",
    "megatron.core.tokenizers.text.models.gpt_tokenizer",
    "torch._dynamo",
)
"""Before the fork, once."""

IMPORTED_WITHOUT_MEGATRON = (
    "megatron_adams",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
)
"""The same for ranks that are not to have Megatron, nor the rehearsal's stand-ins."""

GRACE_S = 10.0
"""How long the other ranks may go on after the first one has failed."""


def import_megatron(*, register: bool, transformer_engine: bool) -> None:
    from megatron_adams import cpu_rehearsal

    cpu_rehearsal.install()
    if os.environ.get("MEGATRON_ADAMS_TEST_ANY_MEGATRON"):
        take_any_version()
    if transformer_engine:
        from tests.distributed import with_te

        with_te.import_transformer_engine()
    if register:
        import megatron_adams

        megatron_adams.register()
    else:
        from megatron.core.datasets import utils

        # Compiled in the wheel, which has no Makefile: Megatron would exit. The plugin minds it.
        utils.compile_helpers = lambda: None
    for module in IMPORTED_BY_EVERY_RANK:
        # Other versions of Megatron have them elsewhere: a rank imports those itself.
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(module)
    other_megatron.install()
    remember_help_of_flags()
    if register:
        remember_parsers()
        load_kernels()
    remember_sources()
    remember_mock_data()
    remember_entry_points()
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # The process that a save collects its results in: forked, not spawned, which would import
    # torch again for every rank (seconds). Tests of asynchronous saves do not run from here.
    filesystem_async.get_write_results_queue = functools.partial(
        filesystem_async.get_write_results_queue, mp_mode="fork"
    )


def take_any_version() -> None:
    """Let `register()` try a version that is not supported yet: to find out whether it can be."""
    from megatron_adams.megatron import hooks

    hooks.SUPPORTED_MEGATRON = ">=0"


def remember_help_of_flags() -> None:
    """Have Megatron read the help of its flags, from its sources, here and not in every rank."""
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.arguments import add_megatron_arguments

    read = ArgumentGroupFactory._get_field_docstrings
    known: dict[type, dict[str, str]] = {}

    def remembered(factory: ArgumentGroupFactory, config: type) -> dict[str, str]:
        if config not in known:
            known[config] = read(factory, config)
        return dict(known[config])

    ArgumentGroupFactory._get_field_docstrings = remembered
    add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))


# Megatron reads its flags twice in a run, the first time for --enable-ft-package alone.
PARSERS_OF_A_RUN = 2
# Flags whose defaults are read from the environment, by what they are called there.
FROM_ENVIRONMENT = {"local_rank": "LOCAL_RANK", "inprocess_active_world_size": "WORLD_SIZE"}


def remember_parsers() -> None:
    """Have the parsers of a run, with 800 flags each, built here and not in every rank."""
    from megatron.training import arguments

    arguments.add_megatron_arguments = remembered_parsers(arguments.add_megatron_arguments)


def remembered_parsers(add: Callable[..., Any]) -> Callable[..., argparse.ArgumentParser]:
    """`add_megatron_arguments`, which gives the first parsers the flags of some built now."""
    built = [add(argparse.ArgumentParser(allow_abbrev=False)) for _ in range(PARSERS_OF_A_RUN)]

    @functools.wraps(add)
    def remembered(parser: argparse.ArgumentParser) -> Any:
        if not built:
            return add(parser)
        given = vars(parser)
        own = {name: given[name] for name in ("prog", "usage", "description", "epilog")}
        given.update(vars(built.pop()), **own)
        for action in parser._actions:
            if action.dest in FROM_ENVIRONMENT:
                action.default = int(os.environ[FROM_ENVIRONMENT[action.dest]])
        return parser

    return remembered


# How a param and its main param are stored in most runs.
USUAL_STORAGE = (("fp32", "none"), ("bf16", "fp32"), ("bf16", "remainder"), ("fp16", "fp32"))


def load_kernels() -> None:
    """Load the kernels of most runs. Where there is no compiler, a rank says so itself."""
    from megatron_adams.kernels import host
    from megatron_adams.kernels.compile import CompileError
    from megatron_adams.kernels.modes import Mode

    with contextlib.suppress(CompileError):
        for param, main in USUAL_STORAGE:
            for is_guarded in (False, True):
                host.load(Mode("fp32", param, "fp32", main, is_guarded))


# Where torch.manual_seed is called from, and what it calls.
IN_STACKS = (
    *("megatron.training.initialize", "megatron.training.training", "torch._compile"),
    *("torch._dynamo.eval_frame", "torch.distributed.c10d_logger", "torch.mtia"),
    *("torch.random", "torch.xpu", "torch.xpu.random"),
)


def remember_sources() -> None:
    """Read what torch quotes in every rank: it writes down the stack for devices to come."""
    for name in IN_STACKS:
        linecache.getlines(str(sys.modules[name].__file__))


def remember_mock_data() -> None:
    """Have the sets of --mock-data cut into samples and shuffled here: two million samples each."""
    from megatron.core.datasets import gpt_dataset, helpers
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )

    gpt_dataset._build_shuffle_index = remembered_shuffles(gpt_dataset._build_shuffle_index)
    helpers.build_sample_idx = remembered_samples(helpers.build_sample_idx)
    # As of the runs with cases.TINY_GPT and of the recipes' rehearsals; ranks make others.
    for sequence_length, split in ((32, "1,1,1"), (64, "1,1,1")):
        config = gpt_dataset.GPTDatasetConfig(
            random_seed=1234,
            sequence_length=sequence_length,
            split=split,
            tokenizer=SimpleNamespace(vocab_size=128, eod=127, pad=127, unique_identifiers={}),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            mid_level_dataset_surplus=0.005,
        )
        BlendedMegatronDatasetBuilder(
            gpt_dataset.MockGPTDataset, [8, 8, 8], lambda: True, config
        ).build()


def remembered_shuffles(build: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """A builder of shuffles that builds each once, and leaves the generator as if it had drawn."""
    known: dict[tuple[Any, ...], tuple[np.ndarray, Any]] = {}

    def remembered(num_samples: int, size: int, random: np.random.RandomState) -> np.ndarray:
        name, keys, *position = random.get_state()
        key = (num_samples, size, name, keys.tobytes(), *position)
        if key not in known:
            index = build(num_samples, size, random)
            index.flags.writeable = False
            known[key] = index, random.get_state()
        index, after = known[key]
        random.set_state(after)
        return index

    return remembered


def remembered_samples(build: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """A builder of samples, which are places in documents, that builds each set's once."""
    known: dict[tuple[Any, ...], np.ndarray] = {}

    def remembered(sizes: np.ndarray, documents: np.ndarray, *how: Any) -> np.ndarray:
        key = (sizes.tobytes(), documents.tobytes(), *how)
        if key not in known:
            known[key] = build(sizes, documents, *how)
            known[key].flags.writeable = False
        return known[key]

    return remembered


def remember_entry_points() -> None:
    """PyTorch looks for other backends in the metadata of every package, in every rank."""
    remembered: Any = functools.cache(metadata.entry_points)
    remembered(group="torch.distributed.backends")
    metadata.entry_points = remembered


def free_port() -> int:
    """Below the range that outgoing connections take theirs from: it stays free until used."""
    while True:
        port = random.randrange(10000, 30000)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def run_rank(request: dict[str, Any], rank: int, port: int, folder: Path) -> None:
    """In the forked child: run the case's function as one rank, leave its result in a file."""
    os.setpgid(0, 0)
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # wandb, which Megatron imports, writes through callbacks of its own into the one from before.
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    num_ranks = request["num_ranks"]
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        **request["variables"],
    )
    code = 1
    try:
        module, function = request["case"].split(":")
        result = getattr(importlib.import_module(module), function)(**request["kwargs"])
        (folder / f"rank{rank}.pkl").write_bytes(pickle.dumps(result))
        code = 0
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
        if exc.code is not None and not isinstance(exc.code, int):
            print(exc.code, file=sys.stderr)
        if code == 0:
            (folder / f"rank{rank}.pkl").write_bytes(pickle.dumps(None))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_case(request: dict[str, Any]) -> dict[str, Any]:
    started = os.times()
    folder = Path(request["folder"])
    port = free_port()
    pids = {}
    for rank in range(request["num_ranks"]):
        pid = os.fork()
        if pid == 0:
            run_rank(request, rank, port, folder)
        pids[pid] = rank
    # torchrun's agent makes the store, too: ranks that come before rank 0 would wait and try again.
    # It has a thread, so it is made after the fork.
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    codes: dict[int, int] = {}
    deadline = time.monotonic() + request["timeout_s"]
    timed_out = False
    while len(codes) < len(pids):
        for pid, rank in pids.items():
            if rank in codes:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[rank] = os.waitstatus_to_exitcode(status)
                if codes[rank] != 0:
                    # What it forked has copies of its connections: the other ranks would not
                    # see that it is gone.
                    kill_group(pid)
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if time.monotonic() > deadline:
            timed_out = all(code == 0 for code in codes.values())
            break
        time.sleep(0.01)
    for pid, rank in pids.items():
        kill_group(pid)
        if rank not in codes:
            codes[rank] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    del store
    # Of this process, and of the ranks, which have ended.
    cpu_s = sum(os.times()[:4]) - sum(started[:4])
    codes_of_ranks = [codes[rank] for rank in sorted(codes)]
    return {"codes": codes_of_ranks, "timed_out": timed_out, "cpu_s": cpu_s}


def kill_group(pid: int) -> None:
    """End a rank and whatever it started (async checkpoint workers)."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


PAGE_BYTES = 2**21
"""The size of a large page. A small one has 4096 bytes."""

MADV_COLLAPSE = 25
"""Linux has it since 6.1. Python 3.12's mmap does not name it."""


def collapse_pages() -> None:
    """Have large pages in place of small ones: a fork copies an entry for each, an exit frees it.

    Half a gigabyte has 130,000 small ones. Where the kernel cannot do it, they stay small.
    """
    madvise = ctypes.CDLL(None).madvise
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, access, _, _, inode, *_ = line.split()
        start, stop = (int(address, 16) for address in addresses.split("-"))
        start, stop = -(-start // PAGE_BYTES) * PAGE_BYTES, stop // PAGE_BYTES * PAGE_BYTES
        if access == "rw-p" and inode == "0" and start < stop:
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_COLLAPSE)


def serve(path: Path) -> None:
    """Serve each worker that connects, until the last one has gone, or nobody has come."""
    starter = os.getppid()
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(path.parent)  # the address of a socket has at most 108 bytes
        # Under another name first: a worker that finds it can connect.
        listener.bind(f"{path.name}.new")
        listener.listen()
        Path(f"{path.name}.new").rename(path.name)
        os.chdir(REPO)
        listener.settimeout(0.5)
        servants: set[int] = set()
        has_served = False
        while servants or (not has_served and os.getppid() == starter):
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                has_served = True
                with connection:
                    servants.add(fork_servant(connection))
            servants = {pid for pid in servants if os.waitpid(pid, os.WNOHANG) == (0, 0)}


def fork_servant(connection: socket.socket) -> int:
    """Fork the process that runs one worker's cases, one after the other; return its ID."""
    pid = os.fork()
    if pid == 0:
        # A write to a page that it shares with the zygote makes small pages of it: it gets its own.
        collapse_pages()
        connection.setblocking(True)
        try:
            with connection.makefile("rw") as lines:
                print("ready", file=lines, flush=True)
                for line in lines:
                    print(json.dumps(run_case(json.loads(line))), file=lines, flush=True)
        except BaseException:
            # Whatever it is, this fork must not go on as the zygote. The worker sees that the
            # connection ends, and fails with this log.
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(0)
    return pid


def main() -> None:
    path, *flags = sys.argv[1:]
    if "--without-megatron" in flags:
        for module in IMPORTED_WITHOUT_MEGATRON:
            importlib.import_module(module)
        remember_entry_points()
    else:
        import_megatron(
            register="--without-plugin" not in flags,
            transformer_engine="--with-transformer-engine" in flags,
        )
    # A rank that a signal ends says where it was: to descriptor 2, which is its log by then.
    faulthandler.enable()
    # Else a collection in a rank would write to, and so copy, every page with an object.
    gc.collect()
    gc.freeze()
    collapse_pages()
    serve(Path(path))


if __name__ == "__main__":
    main()
