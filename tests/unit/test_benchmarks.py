"""benchmarks/step.py: what it times is what it says, and nothing is left out in silence."""

import argparse
import csv
import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import contestants  # noqa: E402  (the files import each other by name)
import host  # noqa: E402
import multi_tensor_adam  # noqa: E402
import report  # noqa: E402
import step  # noqa: E402
import tune as sweep  # noqa: E402
import workloads  # noqa: E402
from report import Memory, Results, Row  # noqa: E402

from megatron_adams.kernels import Mode, compile  # noqa: E402
from megatron_adams.kernels.cache import ENVIRONMENT_VARIABLE  # noqa: E402
from megatron_adams.kernels.tuning import Tuning  # noqa: E402
from tests.kernels import emulator, sass  # noqa: E402

CPU = torch.device("cpu")
NUMEL = 40_000  # more than two chunks, and no multiple of one


@pytest.fixture(scope="module", autouse=True)
def _own_cache(kernel_cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT_VARIABLE, str(kernel_cache))
        yield


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch):
    """What is copied and overwritten would take most of the tests' time."""
    monkeypatch.setitem(contestants.COPIED_BYTES, "cpu", 2**16)
    monkeypatch.setattr(step, "evicted_bytes", lambda device: 2**16)


def bits(tensors):
    return (
        None
        if tensors is None
        else [tensor.reshape(-1).view(torch.uint8).clone() for tensor in tensors]
    )


def equal(new, old):
    return (new is None and old is None) or all(map(torch.equal, new, old))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (Mode("fp32", "fp32", "fp32", "none"), 20),
        (Mode("fp32", "bf16", "fp32", "fp32"), 22),
        (Mode("fp32", "bf16", "fp32", "remainder"), 20),
        (Mode("bf16", "bf16", "bf16", "remainder"), 14),
        (Mode("bf16", "bf16", "bf16", "none"), 10),
        (Mode("bf16", "e4m3", "fp32", "fp32"), 19),
        # Gradient, exp_avg and master, or param, are read twice.
        (Mode("bf16", "bf16", "fp16", "fp16"), 2 + 2 + 8 + (2 + 2 + 2)),
        (Mode("bf16", "bf16", "e4m3", "none"), 2 + 4 + 2 + (2 + 2 + 1)),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_bytes_per_param_are_those_of_the_design(mode, expected):
    assert contestants.bytes_per_param(mode) == expected


@pytest.mark.parametrize("mode", contestants.MODES, ids=lambda mode: mode.name)
def test_stream_passes_over_all_tensors_and_changes_no_number(mode):
    tensors = contestants.make_tensors(mode, (NUMEL,), CPU)
    if not contestants.reads_param(mode):
        tensors.params[0].view(torch.uint8).fill_(255)
    columns = ("grads", "params", "exp_avgs", "mains")
    before = {name: bits(getattr(tensors, name)) for name in columns}
    contestants.stream(tensors).step()
    if not contestants.reads_param(mode):
        # It gets the low bits of the main param, everywhere.
        (param,), (main,) = tensors.params, tensors.mains
        width = param.element_size()
        low = main.view(torch.uint8).view(NUMEL, -1)[:, :width]
        assert torch.equal(param.view(torch.uint8).view(NUMEL, width), low)
        del before["params"]
    for name, old in before.items():
        assert equal(bits(getattr(tensors, name)), old), name


@pytest.mark.parametrize("mode", contestants.MODES, ids=lambda mode: mode.name)
def test_stream_compiles_for_a_gpu(mode):
    image = contestants._stream_cubin(mode, "sm_90")
    assert b"stream_update" in image and b"stream_measure" in image


@pytest.mark.parametrize("numels", [(NUMEL,), (4800, 1777, NUMEL)], ids=["one", "list"])
@pytest.mark.parametrize("mode", contestants.MODES, ids=lambda mode: mode.name)
def test_adams_steps_in_every_mode(mode, numels):
    tensors = contestants.make_tensors(mode, numels, CPU)
    columns = ("grads", "exp_avgs", "params", "mains")
    before = {name: bits(getattr(tensors, name)) for name in columns}
    contestant = contestants.adams(tensors)
    contestant.step()
    assert contestant.num_bytes == contestants.bytes_per_param(mode) * sum(numels)
    assert equal(bits(tensors.grads), before["grads"])
    master = "params" if tensors.mains is None else "mains"
    for name in ("exp_avgs", master):
        for new, old in zip(bits(getattr(tensors, name)), before[name], strict=True):
            assert not torch.equal(new, old), name


@pytest.mark.parametrize("numels", [(NUMEL,), (4800, 1777, NUMEL)], ids=["one", "list"])
def test_peers_with_master_weights_write_the_model_params(numels):
    tensors = contestants.make_tensors(contestants.MIXED, numels, CPU)
    for peer in contestants.peers_of(tensors, {}):
        for param in tensors.params:
            param.fill_(float("nan"))
        peer.step()
        for param, main in zip(tensors.params, tensors.mains, strict=True):
            assert torch.equal(param, main.bfloat16()), peer.name
        assert peer.num_bytes == (26 if "Lion" in peer.name else 34) * sum(numels)


@pytest.mark.parametrize("mode", contestants.MODES, ids=lambda mode: mode.name)
def test_other_constants_give_the_step_of_the_product(mode):
    tuning = Tuning(group=4, block=128)
    results = []
    for make in (
        contestants.adams,
        lambda tensors: contestants.adams_kernel("default", tensors),
        lambda tensors: contestants.adams_kernel("tuned", tensors, tuning, 1024),
    ):
        tensors = contestants.make_tensors(mode, (3000, 17), CPU)
        make(tensors).step()
        columns = (tensors.params, tensors.exp_avgs, tensors.mains, tensors.exp_avg_scales)
        results.append([one for column in columns for one in bits(column) or ()])
    assert equal(results[1], results[0])
    assert equal(results[2], results[0])


def test_copy_reads_and_writes_what_it_says():
    contestant = contestants.copy(CPU, 2**16)
    target, (source,) = contestant.step.func.__self__, contestant.step.args
    assert not torch.equal(target, source)
    contestant.step()
    assert torch.equal(target, source)
    assert contestant.num_bytes == 2 * source.numel() * source.element_size() == 2 * 2**16


class TestAdamInApexShape:
    @pytest.fixture(scope="class")
    def launch(self, tmp_path_factory):
        """The kernel compiled by g++, executed by the tests' emulator."""
        source = multi_tensor_adam.SOURCE.read_text()
        text = f"{emulator._SHIM.read_text()}\n{source}\nEMULATED(multi_tensor_adam)\n"
        path = tmp_path_factory.mktemp("apex") / "kernel.so"
        command = ["g++", *emulator.FLAGS, "-x", "c++", "-", "-o", str(path)]
        subprocess.run(command, input=text, text=True, check=True)
        library = ctypes.CDLL(str(path))
        address = ctypes.c_void_p.in_dll(library, "emulated_multi_tensor_adam").value
        function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, multi_tensor_adam.Arguments)
        run = function(address)
        warps, lanes = range(multi_tensor_adam.THREADS // 32), range(32)

        def launch(num_blocks, arguments):
            grid = emulator._Grid(
                (ctypes.c_longlong * num_blocks)(*range(num_blocks)),
                num_blocks,
                (ctypes.c_int * len(warps))(*warps),
                len(warps),
                (ctypes.c_int * len(lanes))(*lanes),
            )
            assert run(ctypes.addressof(grid), arguments) == 0

        return launch

    def test_it_is_torch_adamw(self, launch):
        multi_tensor_adam.check(CPU, launch)

    def test_one_that_computes_something_else_is_found(self, launch):
        def wrong(num_blocks, arguments):
            arguments.beta2 = 0.94
            launch(num_blocks, arguments)

        with pytest.raises(RuntimeError, match="differs from torch's AdamW"):
            multi_tensor_adam.check(CPU, wrong)

    def test_a_launch_takes_320_blocks_and_36_tensors(self):
        chunk = multi_tensor_adam.CHUNK
        numels = [330 * chunk + 1, *(40 * [5]), 0, chunk]
        # Only where they lie is asked for.
        tensors = [4 * [torch.empty(0, device="meta").expand(0).new_empty(n)] for n in numels]
        launches = multi_tensor_adam.pack(tensors)
        assert [num_blocks for num_blocks, _ in launches] == [320, 11 + 35, 5 + 1]
        seen = []
        for num_blocks, arguments in launches:
            for block in range(num_blocks):
                slot = arguments.tensor_of_block[block]
                assert slot < multi_tensor_adam.MAX_TENSORS
                seen.append((arguments.numel[slot], arguments.chunk_of_block[block]))
        expected = [(n, chunk_) for n in numels for chunk_ in range(-(-n // chunk))]
        assert seen == expected

    def test_its_arguments_fit_a_launch(self):
        assert ctypes.sizeof(multi_tensor_adam.Arguments) < 4096

    @pytest.mark.skipif(sass.cuobjdump() is None, reason="no triton, whose wheel has cuobjdump")
    def test_its_machine_code_has_the_accesses_and_spills_nothing(self):
        image = multi_tensor_adam.cubin("sm_90")
        used = sass.resources(image)["multi_tensor_adam"]
        assert (used.stack, used.local) == (0, 0)
        # Two blocks of 512 threads, at least.
        assert used.registers <= 64
        found = sass.instructions(image, "multi_tensor_adam")
        # Four elements of four lists, and of three; each by an access of 32 bits.
        accesses = {name: n for name, n in found.items() if name.startswith(("LDG", "STG"))}
        assert accesses == {"LDG.E": 16, "STG.E": 12}
        assert not {name.split(".")[0] for name in found} & {"LD", "ST", "LDL", "STL"}


def test_lists_are_those_of_the_models():
    gpt2, many, llama = workloads.LISTS
    # 124,439,808: the parameters of the published model.
    assert (len(gpt2.numels), gpt2.numel) == (148, 124_439_808)
    assert set(many.numels) == {65536} and len(many.numels) == 1000
    assert len(llama.numels) == 291
    # Uncut, 8,030,261,248: the parameters of Llama 3 8B.
    whole = workloads.llama_shard_numels(tensor_parallel=1, data_parallel=1)
    assert sum(whole) == 8_030_261_248
    norms = 65 * 4096
    assert llama.numel == ((8_030_261_248 - norms) // 8 + norms) // 64


def test_more_is_written_between_steps_than_the_caches_hold(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(step, "_CPU_CACHES", tmp_path)
    assert step.evicted_bytes(CPU) == 2**28  # nothing is known of them
    for index, size in enumerate(("48K", "491520K", "2048K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert step.evicted_bytes(CPU) == 2 * 480 * 2**20
    assert step.evicted_bytes(torch.device("cuda")) == 2**28


def test_run_measures_every_contestant_and_names_what_it_cannot(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # importing it fails
    modes = [contestants.FP32.name, contestants.BF16_REMAINDER.name]
    args = ["--device", "cpu", "--out", str(tmp_path), "--sizes", "16k", "32k", "--rounds", "2"]
    step.main([*args, "--modes", *modes])
    results = report.read(tmp_path / "step.json")
    torch_adamw = ["torch AdamW, fused", "torch AdamW, foreach"]
    assert [(row.workload, row.numel, row.mode, row.name) for row in results.rows] == [
        (workload, numel, mode, name)
        for workload, numel in (("16k", 16_000), ("32k", 32_000))
        for mode, names in zip(modes, (torch_adamw, [report.REFERENCE]), strict=True)
        for name in ("copy", "AdamS", "stream", *names)
    ]
    assert all(len(row.times_s) == 2 and min(row.times_s) > 0 for row in results.rows)
    assert all(row.wall_s > 0 for row in results.rows)
    assert set(results.missing) == {
        peer.name for peer in contestants.PEERS if peer.package != "torch"
    }
    assert "not installed" in results.missing["DeepSpeedCPUAdam"]
    assert results.missing["Apex FusedAdam"] == "does not run on cpu"
    printed = capsys.readouterr().out
    for name in results.missing:
        assert f"{name}: not measured" in printed
    assert (tmp_path / "step.md").read_text() in printed
    assert len(list(csv.reader((tmp_path / "step.csv").open()))) == 1 + len(results.rows)
    assert (tmp_path / "step.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "step.json").read_text())["facts"]["rounds"] == "2"


def test_gpu_suite_runs_to_its_end_and_has_what_a_gpu_is_asked(tmp_path):
    args = ["--device", "cpu", "--suite", "gpu", "--shrink", "100000", "--rounds", "2"]
    step.main([*args, "--out", str(tmp_path)])
    results = report.read(tmp_path / "step.json")
    asked = list(step._gpu_suite())
    assert len(list(results.groups())) == len(asked)
    sizes = {group.workloads[0].name: set() for group in asked}
    for group in asked:
        sizes[group.workloads[0].name].add(group.mode)
        # Slow, or in need of much memory.
        if group.workloads[0].name == "1G":
            assert contestants.FOREACH in group.without
        assert not {contestants.FUSED, contestants.APEX_SHAPE} & group.without
    plain = {contestants.FP32, contestants.MIXED}
    large = plain | {
        *(contestants.REMAINDER, contestants.BF16_REMAINDER, contestants.BF16),
        contestants.FP8_PARAMS,
    }
    assert sizes == {
        "1G": large,
        "100M": large | {contestants.FP16_STATE},
        "1M": plain,
        **{workload.name: plain for workload in workloads.LISTS},
    }


def test_forms_are_compared_with_each_other_alone(tmp_path):
    args = ["--device", "cpu", "--suite", "forms", "--shrink", "1000000", "--rounds", "2"]
    step.main([*args, "--out", str(tmp_path)])
    results = report.read(tmp_path / "forms.json")
    groups = list(results.groups())
    assert len(groups) == len(list(step._forms_suite())) == 4
    for group in groups:
        assert set(group) == {contestants.COPY, contestants.ADAMS, *contestants.FORMS}


def test_each_form_is_the_optimizer_of_its_name():
    tensors = contestants.make_tensors(contestants.FP32, [64], torch.device("cpu"))
    before = tensors.params[0].clone()
    steps = {}
    for name in (contestants.ADAMS, *contestants.FORMS):
        exp_avg = tensors.exp_avgs[0].clone()
        contestants.adams(tensors, name).step()
        steps[name] = tensors.params[0] - before
        tensors.params[0].copy_(before)
        tensors.exp_avgs[0].copy_(exp_avg)
    plain, cautious, nesterov = steps.values()
    assert not plain.equal(nesterov)
    held = plain != cautious
    assert held.any() and not held.all()


def test_what_does_not_fit_is_said_and_the_next_size_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "_LARGE", tuple(map(workloads.one_tensor, (64_000, 32_000, 16_000))))
    # Of 64,000 elements, what is shared takes 12 bytes and fused state 8.
    monkeypatch.setattr(step, "free_bytes", lambda device: 20 * 32_000)
    monkeypatch.setattr(
        step, "groups_of", lambda args: [step.Group(contestants.FP32, step._LARGE, step._SHORT)]
    )
    step.main(["--device", "cpu", "--rounds", "2", "--out", str(tmp_path)])
    results = report.read(tmp_path / "step.json")
    assert {row.workload for row in results.rows} == {"32k"}
    assert results.missing["64k, g32-p32-m32-w0"] == "needs 0.00128 GB, and 0.00064 are free"


def test_what_was_measured_is_written_after_each_group(tmp_path, monkeypatch):
    rows = []
    measure = step.measure

    def measured(*arguments):
        path = tmp_path / "step.json"
        rows.append(len(report.read(path).rows) if path.exists() else 0)
        return measure(*arguments)

    monkeypatch.setattr(step, "measure", measured)
    args = ["--device", "cpu", "--sizes", "64", "128", "--modes", contestants.REMAINDER.name]
    step.main([*args, "--rounds", "2", "--out", str(tmp_path)])
    # copy, AdamS, stream, and AdamS on fp32 tensors.
    assert rows == [0, 4]
    assert len(report.read(tmp_path / "step.json").rows) == 8


def test_a_run_out_of_time_names_what_it_leaves_out(tmp_path):
    args = ["--device", "cpu", "--sizes", "64", "128", "--modes", contestants.BF16.name]
    session = step.Session(step.parse_args([*args, "--seconds", "0", "--out", str(tmp_path)]))
    session.run()
    assert session.results.missing == {
        f"{size}, {contestants.BF16.name}": "the 0 seconds were over" for size in (64, 128)
    }


def test_on_a_gpu_no_dirty_line_is_left_when_the_clock_starts(monkeypatch):
    calls = []

    class Evictor:
        def add_(self, one):
            calls.append("write")

        def sum(self):
            calls.append("read")

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.name = ("begin", "end")[len([c for c in calls if c == "event"]) % 2]
            calls.append("event")

        def record(self):
            calls.append(self.name)

        def synchronize(self):
            calls.append("wait")

        def elapsed_time(self, end):
            assert (self.name, end.name) == ("begin", "end")
            return 2.5  # ms

    clock = step.Clock(CPU, 64)
    clock._evictor = Evictor()
    clock.evict()
    assert calls == ["write"]

    clock._is_cuda = True
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda clocks: calls.append(clocks))
    calls.clear()
    taken = clock.time(lambda: calls.append("step"), head_start_s=0.003)
    assert taken.device_s == 0.0025 and 0 < taken.host_s < 0.1
    # A GPU of up to 2 GHz waits for the 3 ms in which the step is queued.
    waits = 6_000_000
    assert [call for call in calls if call != "event"] == [
        *("write", "read", waits, "begin", "step", "end", "wait")
    ]


def test_peer_that_fails_is_named_and_the_others_go_on(monkeypatch):
    def fail(tensors):
        raise RuntimeError("no such operator\nand a long trace")

    broken = contestants.Peer("broken", ("cpu",), "torch", (contestants.FP32,), fail, 2)
    monkeypatch.setattr(contestants, "PEERS", (broken, contestants.PEERS[0]))
    missing = {}
    tensors = contestants.make_tensors(contestants.FP32, (64,), CPU)
    names = [peer.name for peer in contestants.peers_of(tensors, missing)]
    assert names == ["torch AdamW, fused"]
    assert missing == {"broken in g32-p32-m32-w0": "failed (RuntimeError: no such operator)"}


def test_contestants_take_turns_and_warm_up_is_not_counted():
    order, head_starts = [], []
    pair = [contestants.Contestant(name, lambda n=name: order.append(n), 1) for name in "ab"]

    class Clock:
        def time(self, run, *, head_start_s):
            run()
            head_starts.append((order[-1], head_start_s))
            return step.Time(float(len(order)), {"a": 0.003, "b": 0.5}[order[-1]])

    times = step.measure(pair, Clock(), 3)
    rounds = ["".join(order[index : index + 2]) for index in range(0, 10, 2)]
    assert set(rounds) == {"ab", "ba"}
    for name in "ab":
        counted = [index + 1.0 for index, run in enumerate(order) if run == name and index >= 4]
        assert times[name] == counted and len(counted) == 3
    # The device waits longer than Python took the time before; not for ever.
    assert [s for name, s in head_starts[2:] if name == "a"] == 4 * [pytest.approx(0.0062)]
    assert [s for name, s in head_starts[2:] if name == "b"] == 4 * [0.1]


def row(name, times_s, num_bytes=10_000, workload="1k", numel=1000, mode="m"):
    return Row(workload, numel, mode, name, num_bytes, times_s, 2e-6)


def test_table_relates_times_round_by_round():
    rows = [
        row("AdamS", [1e-6, 2e-6, 30e-6]),
        row("stream", [1e-6, 1e-6, 10e-6]),
        row("copy", [1e-6, 1e-6, 10e-6], num_bytes=40_000),
        row(report.REFERENCE, [2e-6, 4e-6, 60e-6], num_bytes=20_000),
    ]
    first, second, third, fourth = (
        dict(zip(report.COLUMNS, cells, strict=True))
        for cells in report.table(Results({}, {}, rows, []))
    )
    assert first["ms"] == "0.002" and first["GB/s"] == "5.0" and first["bytes/param"] == "10"
    assert first["time / stream"] == "2.000" and first["time / AdamS"] == "1.000"
    assert first["time / fp32 AdamS"] == "0.500" and first["bytes / fp32 AdamS"] == "0.500"
    # A fourth of the bytes in twice the time.
    assert first["% of copy"] == "12.5%" and first["back to back, ms"] == "0.002"
    assert second["% of copy"] == "25.0%" and third["% of copy"] == "100.0%"
    assert third["bytes/param"] == third["time / AdamS"] == ""
    for other in (second, third, fourth):
        assert other["time / fp32 AdamS"] == other["bytes / fp32 AdamS"] == ""


def test_page_of_a_gpu_has_all_that_came_back(tmp_path):
    def results(names, memory=()):
        rows = [
            row(name, [1e-3, 1.1e-3], 10**9, *workload, mode)
            for workload in (("1G", 10**9), ("GPT-2", 124 * 10**6), ("1M", 10**6))
            for mode in ("g32-p32-m32-w0", "gb16-pb16-mb16-w0")
            for name in names
        ]
        facts = {"device": "NVIDIA H100 80GB HBM3"}
        return Results(facts, {"Apex FusedAdam": "not installed"}, rows, list(memory))

    memory = [Memory("GPT-2", 1000, "AdamS", 4000, 4400)]
    report.write_json(results(("copy", "AdamS", "stream"), memory), tmp_path)
    page = report.write_gpu(tmp_path, tmp_path / "out")
    assert page == tmp_path / "out/gpu-h100-80gb-hbm3.md"
    text = page.read_text()
    assert "Apex FusedAdam: not measured, not installed" in text
    assert "| GPT-2 | AdamS | 4.00 | 4.40 | 0.0 |" in text
    assert "sweep" not in text.partition("\n## ")[2]
    assert "](gpu-h100-80gb-hbm3.png)" in text
    assert page.with_suffix(".png").stat().st_size > 10_000

    report.write_json(results(("copy", "AdamS", "AdamS, tuned")), tmp_path, "confirm")
    (tmp_path / "best.json").write_text('{"g32-p32-m32-w0": {"group": 4}, "x": {}}')
    cells = ["g32-p32-m32-w0", "250M", "group=4", "40", "0", "1.5", "0.1%", "93%", "0.97", "equal"]
    lines = [",".join(report.SWEEP_COLUMNS), ",".join(cells)]
    (tmp_path / "sweep.csv").write_text("\n".join(lines) + "\n")
    text = report.write_gpu(tmp_path, tmp_path / "out").read_text()
    assert "| 1G | g32-p32-m32-w0 | 1.050 | 1.050 |" in text
    assert "- g32-p32-m32-w0: group 4\n- x: as they are\n" in text
    assert f"| {' | '.join(cells)} |" in text


@pytest.mark.parametrize(("text", "numel"), [("64", 64), ("1M", 10**6), ("16k", 16_000)])
def test_sizes(text, numel):
    assert step.parse_size(text) == numel


@pytest.mark.parametrize("text", ["0", "17", "-16"])
def test_sizes_that_are_no_vectors_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="multiple of 16"):
        step.parse_size(text)


def test_unknown_mode_is_refused_with_the_known_ones():
    with pytest.raises(argparse.ArgumentTypeError, match="g32-pb16-m32-w32"):
        step.parse_mode("g32")


def test_constants_for_a_size_are_those_of_the_next_larger_one():
    name = contestants.FP32.name
    best = {
        name: {"group": 4, "chunk": 65536},
        f"{name} up to 1M": {"chunk": 2048},
        f"{name} up to 20M": {"chunk": None},
    }

    def knobs(numel):
        return step.knobs_for(best, contestants.FP32, workloads.one_tensor(numel))

    assert knobs(10**6) == {"group": 4, "chunk": 2048}
    assert knobs(15 * 10**6) == {"group": 4, "chunk": None}
    assert knobs(10**9) == {"group": 4, "chunk": 65536}


def test_confirmation_measures_the_product_beside_the_winners(tmp_path):
    name = contestants.FP32.name
    tuning = tmp_path / "best.json"
    tuning.write_text(json.dumps({name: {"group": 4, "block": 128}}))
    args = ["--device", "cpu", "--suite", "confirm", "--tuning", str(tuning), "--rounds", "2"]
    step.main([*args, "--shrink", "1000000", "--out", str(tmp_path)])
    results = report.read(tmp_path / "confirm.json")
    assert [[*group] for group in results.groups()] == 5 * [["copy", "AdamS", "AdamS, tuned"]]
    assert "emulator" in results.facts["kernel"]


@pytest.mark.parametrize("args", [["--suite", "confirm"], ["--tuning", "best.json"]])
def test_confirmation_without_its_constants_is_refused(args, capsys):
    with pytest.raises(SystemExit):
        step.parse_args(args)
    assert "must be given together" in capsys.readouterr().err


class TestSweep:
    @pytest.fixture(autouse=True)
    def _default(self, monkeypatch):
        """A sweep that does not start from the product's constants, whatever they are now."""
        monkeypatch.setattr(sweep, "tuning_of", lambda mode: Tuning())

    @pytest.fixture
    def args(self, tmp_path):
        text = f"--device cpu --out {tmp_path} --numel 4000 --small 1600 --checked 800"
        return [*text.split(), "--modes", contestants.FP8_PARAMS.name, "--seconds", "100"]

    @pytest.fixture
    def times(self, monkeypatch):
        """Makes the time of a launch what the constants in its name say, by factors."""
        factors = {"copy": 1.0}

        def time_one(self, contestant):
            contestant.step()
            seconds = 1e-3
            for words, factor in factors.items():
                seconds *= factor if words in contestant.name else 1.0
            return seconds

        monkeypatch.setattr(sweep.Sweep, "_time_one", time_one)
        return factors

    def test_it_runs_to_its_end_and_writes_variants_and_winners(
        self, args, times, tmp_path, capsys
    ):
        times |= {"group=8": 0.9, "block=128": 0.8, "block=512": 1.1, "chunk=1024": 0.7}
        sweep.main([*args, "--knobs", "group", "block", "chunk"])
        rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
        assert {row["bits"] for row in rows} == {"equal"}
        ratios = {(row["parameters"], row["knobs"]): float(row["ratio to default"]) for row in rows}
        assert len(ratios) == len(rows)
        # The default, the base, one constant at a time, and then the best two of each; no chunk of
        # more than all elements.
        assert ratios == {
            ("4k", "default"): 1.0,
            ("4k", "group=4"): 1.0,
            ("4k", "group=8"): 0.9,
            ("4k", "group=4 block=128"): 0.8,
            ("4k", "group=4 block=512"): 1.1,
            ("4k", "group=8 block=128"): 0.72,
            ("1.6k", "default"): 1.0,
            ("1.6k", "group=8 block=128"): 0.72,
            ("1.6k", "group=8 block=128 chunk=1024"): 0.504,
        }
        name = contestants.FP8_PARAMS.name
        assert json.loads((tmp_path / "best.json").read_text()) == {
            name: {"group": 8, "block": 128},
            f"{name} up to 1.6k": {"chunk": 1024},
        }
        assert report.sweep_table(rows) in capsys.readouterr().out

    def test_a_variant_with_other_bits_is_named_and_not_timed(self, args, tmp_path, monkeypatch):
        # No access moves two bytes: NVRTC refuses this, and g++ makes something else of it.
        monkeypatch.setitem(sweep.KNOBS, "group", (4, 2))
        sweep.main([*args, "--knobs", "group"])
        rows = {row["knobs"]: row for row in csv.DictReader((tmp_path / "sweep.csv").open())}
        assert rows["group=2"]["bits"] == "differ in tensors 0 1 2" and not rows["group=2"]["ms"]
        assert rows["group=4"]["bits"] == "equal" and rows["group=4"]["ms"]

    def test_a_variant_that_does_not_compile_is_named(self, args, tmp_path, monkeypatch):
        make_driver = sweep.make_driver

        def refusing(device, mode, tuning):
            if tuning.group == 8:
                raise compile.CompileError("NVRTC for sm_90:\nno such access")
            return make_driver(device, mode, tuning)

        monkeypatch.setattr(sweep, "make_driver", refusing)
        sweep.main([*args, "--knobs", "group"])
        rows = {row["knobs"]: row for row in csv.DictReader((tmp_path / "sweep.csv").open())}
        assert rows["group=8"]["bits"] == "does not compile: no such access"
        assert not rows["group=8"]["ms"] and rows["group=4"]["ms"]

    def test_equal_machine_code_is_timed_once_and_combined_all_the_same(
        self, args, times, tmp_path, monkeypatch
    ):
        times["block=128"] = 0.8
        compile_one = sweep.Sweep._compile_one

        def as_fp32_would(self, mode, tuning):
            # There, a group of 4 is 16 bytes of the narrowest, and nothing is converted.
            compile_one(self, mode, tuning)
            return str(tuning._replace(group=0, hardware_conversions=False))

        monkeypatch.setattr(sweep.Sweep, "_compile_one", as_fp32_would)
        sweep.main([*args, "--knobs", "group", "hardware_conversions", "unroll", "block"])
        rows = [row["knobs"] for row in csv.DictReader((tmp_path / "sweep.csv").open())]
        # Neither group=4 nor hardware_conversions=True is another kernel: nobody hears of them.
        assert {*rows} == {
            *("default", "unroll=2", "unroll=4", "block=128", "block=512", "unroll=2 block=128")
        }
        assert len(rows) == 6

    def test_it_stops_in_time_with_what_it_has(self, args, tmp_path, capsys):
        sweep.main([*args, "--seconds", "0"])
        assert "stopped after 0 s" in capsys.readouterr().out
        assert json.loads((tmp_path / "best.json").read_text()) == {}
        assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 1

    def test_knobs_are_the_fields_of_a_tuning_and_start_from_the_base(self):
        assert {*sweep.KNOBS} == {*Tuning._fields, "chunk"}
        for knob, values in sweep.KNOBS.items():
            assert {**Tuning()._asdict(), "chunk": None, **sweep.BASE}[knob] == values[0]
        singles = 2 + sum(len(values) - 1 for values in sweep.KNOBS.values())
        assert singles + sweep.MAX_COMBINATIONS <= 42

    def trial(self, variant, *ratios):
        trial = sweep.Trial(contestants.FP32, 1000, variant, "equal")
        trial.ratios, trial.times_s = list(ratios), [0.01 * ratio for ratio in ratios]
        return trial

    def test_winner_beats_the_noise_and_changes_least(self):
        default = sweep.default_of(contestants.FP32)
        one, two = (
            sweep.Variant(Tuning(**knobs)) for knobs in ({"block": 128}, {"block": 128, "group": 8})
        )
        # From one to the next: quartiles 1% apart, however far it drifts.
        noisy = self.trial(default, 1.0, 1.0, 1.0, 1.0, 1.0, 1.01, 1.02, 1.03, 1.04)
        noisy.ratios = [1.0]
        assert sweep.winner([noisy, self.trial(one, 0.995, 0.995)], default) == default
        faster = [noisy, self.trial(two, 0.950, 0.950), self.trial(one, 0.955, 0.955)]
        assert sweep.winner(faster, default) == one
        faster = [noisy, self.trial(two, 0.920, 0.920), self.trial(one, 0.955, 0.955)]
        assert sweep.winner(faster, default) == two
        assert sweep.winner(faster[1:], default) == default

    def test_bits_are_equal_but_for_the_payloads_of_nans(self):
        def floats(*words):
            return torch.tensor(words, dtype=torch.int32).view(torch.float32)

        nan, other_nan, zero, negative_zero = 0x7FC00000, 0x7FC00001, 0, -(2**31)
        assert sweep.same_bits(floats(nan, 5), floats(other_nan, 5))
        assert not sweep.same_bits(floats(zero), floats(negative_zero))
        assert not sweep.same_bits(floats(nan), floats(zero))
        assert not sweep.same_bits(floats(6), floats(5))
        for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
            one, other = torch.ones(1).to(dtype), torch.full((1,), -1.0).to(dtype)
            assert sweep.same_bits(one, one.clone()) and not sweep.same_bits(one, other)
        low = torch.ones(1, dtype=torch.int16)
        assert not sweep.same_bits(low, low + 1)

    @pytest.mark.parametrize("mode", sweep.MODES, ids=lambda mode: mode.name)
    def test_inputs_have_every_kind_of_number_and_of_address(self, mode):
        tensors = sweep.awkward_tensors(mode, CPU, 3000)
        again = sweep.awkward_tensors(mode, CPU, 3000)
        for column, same in zip(tensors.batch().columns(), again.batch().columns(), strict=True):
            if column[1] is None:
                continue
            assert equal(bits(column[1]), bits(same[1]))
            assert column[1][3].data_ptr() % 16 != 0
            assert all(t.data_ptr() % 16 == 0 for t in column[1][:3])
            if column[1][2].dtype.is_floating_point:
                assert column[1][2].float().isnan().any()
                sizes = column[1][1].float().abs()
                assert sizes.max() > 1e4 * sizes.median()
        assert [param.numel() for param in tensors.params] == [3000, 1001, 1001, 1001, 17, 1]


class TestHost:
    def test_gradients_move_or_stay_as_the_case_says(self, monkeypatch):
        subject = host.Subject("AdamS", 3, CPU)

        def addresses():
            return [param.grad.data_ptr() for param in subject._params]

        first = addresses()
        subject.time_s(moves=False)
        assert addresses() == first
        subject.time_s(moves=True)
        assert not set(addresses()) & set(first)

    def test_every_optimizer_is_timed_both_ways_and_written(self, tmp_path, capsys):
        threads = torch.get_num_threads()
        out = tmp_path / "results/host.md"
        try:
            host.main(["--tensors", "2", "5", "--rounds", "3", "--out", str(out)])
        finally:
            torch.set_num_threads(threads)
        text = out.read_text()
        assert text in capsys.readouterr().out
        rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
        assert [(row[0].strip("| "), row[1]) for row in rows] == [
            (number, name) for number in ("2", "5") for name in host.OPTIMIZERS
        ]
        assert all(float(row[2]) > 0 and float(row[4]) > 0 for row in rows)

    def test_all_cases_take_turns_and_warm_up_is_not_counted(self, monkeypatch):
        order = []
        monkeypatch.setattr(
            host.Subject, "time_s", lambda self, *, moves: order.append((self, moves)) or len(order)
        )
        times = host.measure([1], 4, CPU)
        num_cases = 2 * len(host.OPTIMIZERS)
        assert len(order) == num_cases * (4 + host.WARM_UP_ROUNDS)
        rounds = [order[i : i + num_cases] for i in range(0, len(order), num_cases)]
        assert all(len({*one}) == num_cases for one in rounds)
        assert rounds[0] != rounds[1]
        assert all(len(seconds) == 4 for seconds in times.values())
        assert min(map(min, times.values())) > num_cases * host.WARM_UP_ROUNDS
