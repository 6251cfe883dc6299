"""Count the bytes per parameter that an optimizer step moves in a bf16 Megatron run, by pass.

    python benchmarks/traffic.py

The script prints two counts. The first is derived from the code: what each pass of Megatron-Core
0.19 and of TransformerEngine's FusedAdam reads and writes. The second is measured. A small GPT is
trained on the CPU, and one step is recorded: the bytes that every PyTorch operation on the
optimizer's tensors, and every launch of AdamS's kernel, reads and writes. Stock Adam is measured as
well, to show that the counter sees the passes that the fused step leaves out.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from contestants import traffic  # noqa: E402

SCRIPT = REPO / "examples" / "pretrain_gpt" / "pretrain_gpt.py"
# bf16 with fp32 gradients and main params, Megatron's default. The gradients are always clipped.
FLAGS = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 "
    "--max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 2 --train-iters 3 "
    "--lr 1e-3 --lr-decay-style constant --weight-decay 0.1 --clip-grad 0.01 "
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 4 "
    "--use-cpu-initialization --num-workers 0 --eval-iters 0 --eval-interval 1000 "
    "--attention-dropout 0 --hidden-dropout 0 --bf16 --use-distributed-optimizer"
)
# The step that is counted, from 1. The first step allocates state.
COUNTED_STEP = 2

MAIN_GRAD, MAIN_PARAM, MODEL_PARAM = "main_grad", "main param", "model param"
OTHER = "temporaries"
# Tensors that do not belong to the optimizer count as OTHER if they have more elements than this.
# Norms, scalars and tables have fewer, and do not count.
LARGEST_SCALAR = 1024
NORM, CLIP, UPDATE, COPY, ELSEWHERE = "norm", "clip", "update", "copy", "elsewhere"
RMS = "update RMS"


class Pass(NamedTuple):
    """One pass over memory, derived from the code.

    Attributes:
        kind: NORM, CLIP, RMS, UPDATE or COPY.
        function: the function that makes it.
        read, written: bytes per parameter, by tensor.
    """

    kind: str
    function: str
    read: dict[str, int]
    written: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.read.values()) + sum(self.written.values())


_NORM = Pass(NORM, "get_grad_norm_fp32 (multi_tensor_l2norm)", {MAIN_GRAD: 4}, {})
_ADAMS_TENSORS = {MAIN_PARAM: 4, "exp_avg": 4}
_ADAM_TENSORS = {**_ADAMS_TENSORS, "exp_avg_sq": 4}
FUSED_ADAM = (
    _NORM,
    Pass(
        CLIP,
        "clip_grad_by_total_norm_fp32 (multi_tensor_scale)",
        {MAIN_GRAD: 4},
        {MAIN_GRAD: 4},
    ),
    Pass(
        UPDATE,
        "FusedAdam.step (multi_tensor_adam)",
        {MAIN_GRAD: 4, **_ADAM_TENSORS},
        _ADAM_TENSORS,
    ),
    Pass(
        COPY,
        "DistributedOptimizer._copy_main_params_to_model_params",
        {MAIN_PARAM: 4},
        {MODEL_PARAM: 2},
    ),
)
ADAMS = (
    _NORM,
    Pass(
        UPDATE,
        "AdamS.step (multi_tensor_adams)",
        {MAIN_GRAD: 4, **_ADAMS_TENSORS},
        {**_ADAMS_TENSORS, MODEL_PARAM: 2},
    ),
)

# With --adams-max-update-rms or --adams-match-rms.
GUARDED_ADAMS = (
    _NORM,
    Pass(RMS, "AdamS.step (adams_rms)", {MAIN_GRAD: 4, "exp_avg": 4}, {}),
    ADAMS[1],
)


def total(passes: tuple[Pass, ...]) -> int:
    """Return the bytes per parameter of all passes except the norm, which clipping always needs."""
    return sum(each.total for each in passes if each.kind != NORM)


class Region(NamedTuple):
    """A region of the optimizer's memory: [begin, end) belongs to tensors of the kind `name`."""

    begin: int
    end: int
    name: str


class Touched(NamedTuple):
    """What bytes are counted by: the pass, the kind of tensor, and whether they are written."""

    kind: str
    tensor: str
    is_write: bool


class TrafficCounter(TorchDispatchMode):
    """Counts the bytes of PyTorch operations and of AdamS's kernel, by pass and tensor.

    An operation reads each argument once, and writes each result and each mutated argument once. A
    view moves nothing. Collectives are left out, because they are not passes over memory.

    Args:
        regions: the regions of the optimizer's tensors.
    """

    def __init__(self, regions: list[Region]) -> None:
        super().__init__()
        self.bytes: Counter[Touched] = Counter()
        self.kind = ELSEWHERE
        self._regions = regions

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view or not _moves_memory(func):
            return result
        mutated: set[int] = set()
        values = [*args, *_named(func, args, kwargs)]
        for argument, value in zip(func._schema.arguments, values, strict=True):
            is_mutated = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_leaves(value):
                if not isinstance(tensor, Tensor):
                    continue
                if is_mutated:
                    mutated.add(tensor.data_ptr())
                    self._add(tensor.data_ptr(), _num_bytes(tensor), is_write=True)
                if not (is_mutated and _overwrites(func, argument)):
                    self._add(tensor.data_ptr(), _num_bytes(tensor), is_write=False)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.data_ptr() not in mutated:
                self._add(tensor.data_ptr(), _num_bytes(tensor), is_write=True)
        return result

    def add_launch(self, table: Any, *, only_count: bool) -> None:
        """Count a launch of AdamS's kernel for the tensors that a `PointerTable` lists.

        Args:
            only_count: whether adams_rms is launched. It reads gradients and exp_avg, and writes
                none of these tensors (tests/kernels/test_guards.py).
        """
        read, written = traffic(table.mode)
        if only_count:
            read = {**read, "params": 0, "main_params": 0}
            written = dict.fromkeys(written, 0)
        sizes, _, *pointers = table.rows[:6].tolist()
        columns = ("grads", "params", "exp_avgs", "main_params")
        for column, addresses in zip(columns, pointers, strict=True):
            for numel, address in zip(sizes, addresses, strict=True):
                self._add(address, numel * read[column], is_write=False)
                self._add(address, numel * written[column], is_write=True)

    def _add(self, address: int, num_bytes: int, *, is_write: bool) -> None:
        name = next((r.name for r in self._regions if r.begin <= address < r.end), None)
        if name is None and num_bytes <= LARGEST_SCALAR * 4:
            return
        if num_bytes:
            self.bytes[Touched(self.kind, name or OTHER, is_write)] += num_bytes

    @contextmanager
    def in_pass(self, kind: str) -> Iterator[None]:
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def marking(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its operations count for this pass."""

        def marked(*args: Any, **kwargs: Any) -> Any:
            with self.in_pass(kind):
                return function(*args, **kwargs)

        return marked


def _moves_memory(func: Any) -> bool:
    name = func._schema.name
    return not name.startswith(("c10d::", "aten::empty", "aten::new_empty"))


def _named(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    return [kwargs.get(argument.name) for argument in func._schema.arguments[len(args) :]]


def _overwrites(func: Any, argument: Any) -> bool:
    """Whether a mutated argument is only written, not read."""
    return argument.is_out or func._schema.name in (
        "aten::copy_",
        "aten::_foreach_copy_",
        "aten::zero_",
        "aten::fill_",
    )


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Count(NamedTuple):
    """What one step moved.

    Attributes:
        bytes_per_param: the bytes by `Touched`.
        params_are_unread: whether model params that were set to NaN before the step are the rounded
            main params after it.
        grads_are_unwritten: whether the step left the gradients the same, bit for bit.
    """

    bytes_per_param: dict[Touched, float]
    params_are_unread: bool
    grads_are_unwritten: bool

    def total(self, *kinds: str) -> float:
        """Return the bytes per parameter of the optimizer's tensors that these passes move."""
        return sum(
            value
            for key, value in self.bytes_per_param.items()
            if key.kind in kinds and key.tensor != OTHER
        )


def count_step(optimizer: str, flags: str = FLAGS) -> Count:
    """Train for three steps in this process, as Megatron's only rank, and count the second step.

    The stand-in for torch.cuda must be installed, and the plugin registered, before.
    """
    from megatron.core.optimizer import optimizer as megatron_optimizer
    from megatron.training import training

    from megatron_adams.cpu_rehearsal import rehearsal_flags

    counts: list[Count] = []
    setup = training.setup_model_and_optimizer

    def watched_setup(*args: Any, **kwargs: Any) -> Any:
        built = setup(*args, **kwargs)
        chain = built[1]
        step, num_steps = chain.step, 0

        def watched_step() -> Any:
            nonlocal num_steps
            num_steps += 1
            if num_steps != COUNTED_STEP:
                return step()
            outcome, count = _counted(chain, step, megatron_optimizer)
            counts.append(count)
            return outcome

        chain.step = watched_step
        return built

    training.setup_model_and_optimizer = watched_setup
    argv = [*flags.split(), "--optimizer", optimizer]
    sys.argv = [str(SCRIPT), *argv, *rehearsal_flags(argv)]
    runpy.run_path(str(SCRIPT), run_name="__main__")
    (count,) = counts
    return count


def _counted(chain: Any, step: Callable[[], Any], megatron_optimizer: Any) -> tuple[Any, Count]:
    from megatron_adams.kernels import host

    (part,) = chain.chained_optimizers
    main_params = [param for group in part.optimizer.param_groups for param in group["params"]]
    regions = [
        *_regions(MAIN_GRAD, [buffer.grad_data for buffer in part.buffers]),
        *_regions(MODEL_PARAM, [buffer.param_data for buffer in part.buffers]),
        *_regions(MAIN_PARAM, main_params),
    ]
    for param in main_params:
        for name, state in part.optimizer.state[param].items():
            if isinstance(state, Tensor) and state.numel() == param.numel():
                regions += _regions(name, [state])
    counter = TrafficCounter(regions)
    launch = host.launch

    def counted_launch(table: Any, scalars: Any, *, only_count: bool) -> None:
        with counter.in_pass(RMS if only_count else counter.kind):
            counter.add_launch(table, only_count=only_count)
        # What it does with the table and the scalars does not count as traffic of tensors.
        launch(table, scalars, only_count=only_count)

    with _replaced(
        (megatron_optimizer, "get_grad_norm_fp32", NORM),
        (megatron_optimizer, "clip_grad_by_total_norm_fp32", CLIP),
        (part.optimizer, "step", UPDATE),
        (part, "_copy_main_params_to_model_params", COPY),
        counter=counter,
    ):
        host.launch = counted_launch
        grads_before = [buffer.grad_data.clone() for buffer in part.buffers]
        for buffer in part.buffers:
            buffer.param_data.fill_(float("nan"))
        try:
            with counter:
                outcome = step()
        finally:
            host.launch = launch
    num_params = sum(param.numel() for param in main_params)
    return outcome, Count(
        {key: value / num_params for key, value in sorted(counter.bytes.items())},
        params_are_unread=all(
            torch.equal(model_param, main_param.to(model_param.dtype))
            for model_param, main_param in _model_and_main(part)
        ),
        grads_are_unwritten=all(
            torch.equal(before, buffer.grad_data)
            for before, buffer in zip(grads_before, part.buffers, strict=True)
        ),
    )


def _regions(name: str, tensors: list[Tensor]) -> list[Region]:
    return [Region(t.data_ptr(), t.data_ptr() + _num_bytes(t), name) for t in tensors]


def _model_and_main(part: Any) -> Iterator[tuple[Tensor, Tensor]]:
    for model_group, main_group in zip(
        part.model_float16_groups, part.shard_fp32_from_float16_groups, strict=True
    ):
        for model_param, main_param in zip(model_group, main_group, strict=True):
            shard = part._get_model_param_range_map(model_param)["param"]
            yield model_param.detach().view(-1)[shard.start : shard.end], main_param


@contextmanager
def _replaced(*functions: tuple[Any, str, str], counter: TrafficCounter) -> Iterator[None]:
    """Wrap functions, given as (owner, name, pass), so that the counter knows the pass."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in functions]
    for owner, name, kind in functions:
        setattr(owner, name, counter.marking(kind, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def _count_in_new_process(optimizer: str) -> Count:
    """Count in a new process, because Megatron can be started only once in a process."""
    environment = {
        **os.environ,
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "CUDA_VISIBLE_DEVICES": ""},
    }
    command = [sys.executable, __file__, "--count", optimizer]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the run with {optimizer} failed:\n{done.stdout}\n{done.stderr}")
    data = json.loads(done.stdout.splitlines()[-1])
    return Count({Touched(*key): value for key, value in data[0]}, *data[1:])


def _print_count(optimizer: str) -> None:
    from megatron_adams import cpu_rehearsal, register

    cpu_rehearsal.install(force=True)
    register()
    count = count_step(optimizer)
    print(json.dumps([list(count.bytes_per_param.items()), *count[1:]]))


def derived_table() -> str:
    lines = ["| step | pass | reads | writes | bytes |", "| --- | --- | --- | --- | ---: |"]
    for name, passes in (("FusedAdam", FUSED_ADAM), ("AdamS", ADAMS)):
        lines += [
            f"| {name} | {p.function} | {_words(p.read)} | {_words(p.written)} | {p.total} |"
            for p in passes
        ]
        lines.append(f"| {name} | **all but the norm** | | | **{total(passes)}** |")
    return "\n".join(lines)


def _words(side: dict[str, int]) -> str:
    return ", ".join(f"{name} {num_bytes}" for name, num_bytes in side.items())


def measured_table(counts: dict[str, Count]) -> str:
    lines = ["| step | pass | tensor | read | written |", "| --- | --- | --- | ---: | ---: |"]
    for optimizer, count in counts.items():
        rows = dict.fromkeys((key.kind, key.tensor) for key in count.bytes_per_param)
        for kind in (NORM, CLIP, UPDATE, COPY, ELSEWHERE):
            for tensor in (t for k, t in rows if k == kind):
                read, written = (
                    count.bytes_per_param.get(Touched(kind, tensor, is_write), 0)
                    for is_write in (False, True)
                )
                lines.append(f"| {optimizer} | {kind} | {tensor} | {read:.4g} | {written:.4g} |")
        moved = count.total(CLIP, UPDATE, COPY, ELSEWHERE)
        lines.append(f"| {optimizer} | **all but the norm** | | **{moved:.4g}** | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", choices=("adams", "adam"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.count:
        _print_count(args.count)
        return
    print("Bytes a parameter, from the code (--bf16, --use-distributed-optimizer, --clip-grad):\n")
    print(derived_table())
    print("\nBytes a parameter, counted in a step of Megatron-Core on the CPU:\n")
    counts = {optimizer: _count_in_new_process(optimizer) for optimizer in ("adams", "adam")}
    print(measured_table(counts))
    print(
        "\nadam is torch's here, operation by operation: its update has temporaries and more passes"
        " than FusedAdam's; clip and copy are the same."
    )


if __name__ == "__main__":
    main()
