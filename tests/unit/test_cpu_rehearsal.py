"""What the stand-in for torch.cuda promises; each script runs in a process of its own."""

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megatron_adams.cpu_rehearsal import STAND_INS, RehearsalError, install, rehearsal_flags
from tests.harness.forked import run_forked

NEEDED = [
    *("--distributed-backend", "gloo", "--transformer-impl", "local"),
    *("--no-gradient-accumulation-fusion", "--no-persist-layer-norm"),
    *("--no-masked-softmax-fusion", "--no-rope-fusion", "--no-gradient-reduce-div-fusion"),
]

PREAMBLE = """
import pkgutil, warnings
import torch
from megatron_adams import cpu_rehearsal
warnings.simplefilter("error")

def resolve(name):
    owner, _, attribute = name.rpartition(".")
    return getattr(pkgutil.resolve_name(owner), attribute)

def real_device(tensor):
    return tensor.device.type

originals = {name: resolve(name) for name, _, _ in cpu_rehearsal.STAND_INS}
cpu_rehearsal.install()
"""


def rehearse(script: str, **environment: str) -> None:
    """Run a script of assertions with the stand-in installed."""
    run_forked(PREAMBLE + script, **environment)


def test_every_name_is_replaced_by_an_object_of_its_own() -> None:
    rehearse("""
seen = set()
for name, original in originals.items():
    replacement = resolve(name)
    assert replacement is not original, name
    if callable(replacement):
        assert id(replacement) not in seen, name
        seen.add(id(replacement))
assert len(seen) > 60, len(seen)
""")


def test_installing_twice_is_installing_once() -> None:
    rehearse("""
first = {name: resolve(name) for name in originals}
cpu_rehearsal.install()
assert all(resolve(name) is first[name] for name in originals)
""")


def test_tensors_meant_for_a_gpu_are_made_on_the_cpu() -> None:
    rehearse("""
for device in ("cuda", "cuda:1", 0, torch.device("cuda"), torch.device("cuda", 1)):
    assert real_device(torch.empty(2, device=device)) == "cpu"
    assert real_device(torch.tensor([1.0], device=device)) == "cpu"
    assert real_device(torch.rand(2, device=device)) == "cpu"
    assert real_device(torch.zeros_like(torch.ones(2), device=device)) == "cpu"
    assert real_device(torch.ones(2).new_zeros(3, device=device)) == "cpu"
    assert real_device(torch.ones(2).to(device)) == "cpu"
    assert real_device(torch.ones(2).to(device=device, dtype=torch.bfloat16)) == "cpu"
    assert real_device(torch.ones(2).cuda(device)) == "cpu"
    with torch.device(device):
        assert real_device(torch.ones(2)) == "cpu"
assert real_device(torch.empty(2, pin_memory=True).pin_memory()) == "cpu"
assert real_device(torch.nn.Linear(2, 2).cuda().to("cuda").weight) == "cpu"
# Megatron initializes some models on the meta device.
with torch.device("meta"):
    assert real_device(torch.ones(2)) == "meta"
assert real_device(torch.empty(2, device="meta")) == "meta"
assert torch.ones(2).to(torch.float16).dtype == torch.float16
""")


def test_tensors_say_that_they_are_a_gpus() -> None:
    rehearse("""
names = {torch.float32: "Float", torch.float16: "Half", torch.bfloat16: "BFloat16"}
for dtype, name in names.items():
    assert torch.ones(2, dtype=dtype).type() == f"torch.cuda.{name}Tensor"
assert torch.nn.Parameter(torch.ones(2)).type() == "torch.cuda.FloatTensor"
assert torch.ones(2).type(torch.float16).dtype == torch.float16
assert torch.ones(2).type("torch.cuda.HalfTensor").dtype == torch.float16
assert torch.ones(2).is_cuda and not torch.ones(2, device="meta").is_cuda
""")


def test_copy_to_the_host_does_not_follow_the_live_tensor() -> None:
    rehearse("""
live = torch.zeros(3)
copies = [live.cpu(), live.to("cpu"), live.to(torch.device("cpu"), non_blocking=True)]
copies.append(live.to(device="cpu"))
live.add_(1.0)
assert all(copy.eq(0.0).all() for copy in copies)
assert live.to("cuda") is live and live.to(torch.float32) is live
""")


def test_cpu_generator_is_not_moved_by_what_a_gpus_would_be() -> None:
    rehearse("""
torch.manual_seed(1)
before = torch.get_rng_state()
for make in (torch.rand, torch.randn):
    make(3, device="cuda")
torch.randint(9, (3,), device="cuda"), torch.randperm(3, device=0)
torch.nn.functional.dropout(torch.ones(5), 0.5), torch.nn.Dropout(0.1)(torch.ones(5))
loader = torch.utils.data.DataLoader(list(range(8)), shuffle=True, pin_memory=True)
order = [int(item) for item in loader]
# A shuffled loader is not frozen, and is seeded.
assert [int(item) for item in loader] != order
assert torch.equal(torch.get_rng_state(), before)
torch.rand(3)
assert not torch.equal(torch.get_rng_state(), before)
torch.manual_seed(1)
assert [int(item) for item in loader] == order
""")


def test_gpu_random_state_restores_every_kind_of_draw() -> None:
    rehearse("""
def draws():
    return torch.cat([
        torch.rand(3, device="cuda"),
        torch.nn.functional.dropout(torch.ones(9), 0.5),
        torch.empty(3).normal_(),
    ])

torch.cuda.manual_seed(7)
state = torch.cuda.get_rng_state()
first, second = draws(), draws()
assert not torch.equal(first, second)
torch.cuda.set_rng_state(state)
assert torch.equal(draws(), first)
torch.cuda.manual_seed(7)
assert torch.equal(draws(), first)
torch.manual_seed(8)
assert not torch.equal(draws(), first)
""")


def test_dropout_keeps_its_rate_its_scale_and_its_gradient() -> None:
    rehearse("""
ones = torch.ones(100_000, requires_grad=True)
dropped = torch.nn.functional.dropout(ones, 0.25)
kept = dropped != 0
assert abs(kept.float().mean() - 0.75) < 0.01
assert torch.allclose(dropped[kept], torch.tensor(1 / 0.75))
dropped.sum().backward()
assert torch.equal(ones.grad, dropped)
assert torch.equal(torch.nn.functional.dropout(ones, 0.25, training=False), ones)
assert torch.nn.functional.dropout(ones, 1.0).eq(0).all()
""")


def test_each_local_rank_has_a_device() -> None:
    rehearse(
        """
assert torch.cuda.is_available() and torch.cuda.device_count() == 4
torch.cuda.set_device(3)
assert torch.cuda.current_device() == 3
torch.cuda.set_device("cuda:2")
assert torch.cuda.current_device() == 2
try:
    torch.cuda.set_device(4)
except RuntimeError as error:
    assert "device 4" in str(error)
else:
    raise AssertionError("there is no device 4")
""",
        LOCAL_WORLD_SIZE="4",
        WORLD_SIZE="16",
    )


def test_streams_and_events_run_in_order() -> None:
    rehearse("""
stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
event.record()
with torch.cuda.stream(stream):
    stream.wait_stream(torch.cuda.current_stream())
end = stream.record_event()
stream.wait_event(event)
torch.cuda.synchronize()
assert stream.query() and end.query() and event.elapsed_time(end) >= 0.0
assert torch.cuda.memory_allocated() == 0 and torch.cuda.max_memory_reserved() == 0
""")


def test_nothing_is_compiled() -> None:
    rehearse("""
import os, sys
double = lambda x: 2 * x
assert torch.compile(double) is double and torch.compile(mode="reduce-overhead")(double) is double
assert "torch._inductor.compile_fx" not in sys.modules
# Spawned processes, and code that calls Dynamo itself.
assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
""")


def test_rng_trackers_warning_alone_is_silenced() -> None:
    message = "CPU RNG state changed within GPU RNG context"
    megatron = find_spec("megatron.core")
    assert megatron is not None and megatron.origin is not None
    source = Path(megatron.origin).parent / "tensor_parallel" / "random.py"
    assert f"warning('{message}')" in source.read_text()
    rehearse(f"""
import logging
messages = []
logger = logging.getLogger("megatron.core.tensor_parallel.random")
logger.addHandler(type("Messages", (logging.Handler,), {{
    "emit": lambda self, record: messages.append(record.getMessage())
}})())
logger.warning({message!r})
logger.warning("another warning")
assert messages == ["another warning"], messages
""")


@pytest.fixture
def untouched_torch() -> Iterator[None]:
    """Fail where a refused installation has left a stand-in behind."""
    before = (torch.rand, torch.Tensor.to, torch.cuda.get_rng_state)
    yield
    assert before == (torch.rand, torch.Tensor.to, torch.cuda.get_rng_state)


@pytest.mark.usefixtures("untouched_torch")
def test_refuses_where_a_gpu_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(RehearsalError, match=r"8 GPU\(s\) visible.*--force-cpu-rehearsal"):
        install()


def test_can_be_forced_where_a_gpu_is_visible() -> None:
    script = PREAMBLE.replace(
        "cpu_rehearsal.install()",
        "torch.cuda.is_available = lambda: True\ncpu_rehearsal.install(force=True)",
    )
    script += "assert real_device(torch.ones(2, device='cuda')) == 'cpu'"
    run_forked(script)


def test_a_script_that_fails_fails_its_test() -> None:
    with pytest.raises(AssertionError, match="assert real_device"):
        rehearse("assert real_device(torch.ones(2)) == 'cuda'")
    with pytest.raises(AssertionError, match="exit code 3"):
        rehearse("import os; os._exit(3)")


@pytest.mark.usefixtures("untouched_torch")
def test_refuses_after_megatron_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "megatron.core", torch)
    with pytest.raises(RehearsalError, match=r"megatron\.core is already imported"):
        install()


@pytest.mark.parametrize("stand_in", STAND_INS, ids=lambda stand_in: stand_in.name)
def test_the_code_that_needs_a_name_exists(stand_in: tuple[str, object, str]) -> None:
    """Each `file:symbol` of the table is in the installed Megatron or torch, symbol included."""
    megatron = find_spec("megatron.core")
    assert megatron is not None and megatron.origin is not None
    roots = {"torch": Path(torch.__file__).parents[1], "megatron": Path(megatron.origin).parents[1]}
    for place in stand_in[2].split(", "):
        path, _, symbol = place.partition(":")
        file = roots["torch" if path.startswith("torch/") else "megatron"] / path
        assert file.is_file(), place
        assert symbol in file.read_text(), place


def test_needed_flags_are_added_where_they_lack() -> None:
    assert rehearsal_flags([]) == NEEDED
    assert rehearsal_flags(NEEDED) == []
    # argparse takes the last of two values, so the cluster's may stay in front.
    cluster = ["--distributed-backend", "nccl", "--transformer-impl=transformer_engine"]
    assert rehearsal_flags([*cluster, *NEEDED[4:]]) == NEEDED[:4]
    assert rehearsal_flags(["--distributed-backend=gloo", *NEEDED[2:]]) == []


@pytest.mark.parametrize(
    "flags",
    [
        ["--fp8-format", "hybrid"],
        ["--fp8-format=e4m3"],
        ["--tp-comm-overlap"],
        ["--sequence-parallel"],
        ["--context-parallel-size", "2"],
        ["--attention-backend", "flash"],
        ["--cuda-graph-impl", "local"],
        ["--use-flash-attn"],
        ["--pipeline-model-parallel-comm-backend", "nccl"],
    ],
)
def test_flags_that_cannot_be_rehearsed_are_refused_by_name(flags: list[str]) -> None:
    shown = " ".join(flags).replace("=", " ")
    with pytest.raises(RehearsalError, match=f"^{shown} cannot be rehearsed on CPUs: .*\\."):
        rehearsal_flags(["--num-layers", "2", *flags, "--bf16"])


@pytest.mark.parametrize("optimizer", [[], ["--optimizer", "adam"], ["--optimizer=sgd"]])
def test_offload_is_rehearsed_with_adams_alone(optimizer: list[str]) -> None:
    with pytest.raises(RehearsalError, match=r"^--optimizer-cpu-offload cannot be rehearsed on"):
        rehearsal_flags(["--optimizer-cpu-offload", *optimizer])
    assert rehearsal_flags(["--optimizer-cpu-offload", "--optimizer", "adams"]) == NEEDED
    assert rehearsal_flags(["--optimizer=adams", "--optimizer-cpu-offload"]) == NEEDED


@pytest.mark.parametrize("optimizer", [[], ["--optimizer", "adam"]])
def test_sharded_fsdp_is_saved_in_a_rehearsal_with_adams_alone(optimizer: list[str]) -> None:
    sharded = ["--use-megatron-fsdp", "--data-parallel-sharding-strategy", "optim"]
    with pytest.raises(RehearsalError, match=r"^--save with --use-megatron-fsdp cannot be rehears"):
        rehearsal_flags([*sharded, "--save", "here", *optimizer])
    assert rehearsal_flags([*sharded, *optimizer]) == NEEDED
    assert rehearsal_flags([*sharded, "--save", "here", "--optimizer", "adams"]) == NEEDED
    assert rehearsal_flags(["--use-megatron-fsdp", "--save", "here", *optimizer]) == NEEDED


def test_all_refused_flags_are_named_at_once() -> None:
    with pytest.raises(RehearsalError, match=r"--sequence-parallel .* --fp8-format hybrid "):
        rehearsal_flags(["--fp8-format", "hybrid", "--sequence-parallel"])


def test_values_that_a_rehearsal_has_anyway_are_accepted() -> None:
    accepted = ["--context-parallel-size", "1", "--attention-backend", "auto"]
    accepted += ["--cuda-graph-impl=none", "--moe-token-dispatcher-type", "alltoall"]
    assert rehearsal_flags(accepted) == NEEDED
