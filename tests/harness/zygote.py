"""A process that imports Megatron once and forks the ranks of each test case from there.

Started by `cluster.Cluster`; reads one JSON request a line from stdin and answers with one line
on stdout. A rank costs a fork instead of the many seconds that importing Megatron takes. It runs
no tensor operation itself: threads of OpenMP do not survive a fork.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import json
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
    return {"codes": [codes[rank] for rank in sorted(codes)], "timed_out": timed_out}


def kill_group(pid: int) -> None:
    """End a rank and whatever it started (async checkpoint workers)."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an import prints is no answer
    if "--without-megatron" in sys.argv:
        for module in IMPORTED_WITHOUT_MEGATRON:
            importlib.import_module(module)
        remember_entry_points()
    else:
        import_megatron(
            register="--without-plugin" not in sys.argv,
            transformer_engine="--with-transformer-engine" in sys.argv,
        )
    # Else a collection in a rank would write to, and so copy, every page with an object.
    gc.collect()
    gc.freeze()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run_case(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
