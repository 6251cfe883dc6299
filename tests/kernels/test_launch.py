"""The launch path: table, arguments, dispatch, and what a CUDA graph asks of them."""

import ctypes
import re
from dataclasses import replace

import pytest
import torch

from megatron_adams.kernels import PointerTable, cuda
from megatron_adams.kernels.batch import kernel_arguments
from megatron_adams.kernels.table import CHUNK, POINTERS
from tests.kernels import batteries
from tests.kernels.batteries import Subject
from tests.kernels.checks import SCALARS, differences, expected, make_batch, scalar_cases
from tests.kernels.emulator import SOURCE
from tests.kernels.test_backends import REPRESENTATIVES

SUBJECT = Subject()


@torch.no_grad()
def test_a_step_launches_each_entry_point_once_and_keeps_its_table():
    batteries.check_launches(SUBJECT, (REPRESENTATIVES[0], REPRESENTATIVES[4]))


@pytest.mark.parametrize("mode", REPRESENTATIVES, ids=lambda mode: mode.name)
@torch.no_grad()
def test_a_replay_reads_the_scalars_on_the_device(mode):
    batteries.check_replay(SUBJECT, mode)


@torch.no_grad()
def test_gradients_that_moved_are_read_where_they_are_and_the_old_table_stays():
    batch = make_batch(REPRESENTATIVES[0], (3, CHUNK + 5))
    scalars, driver, table = scalar_cases()["decoupled"], SUBJECT.driver(), PointerTable()
    cuda.run(batch, scalars, table, driver)
    old_rows, copy_of_old = table.rows, table.rows.clone()
    moved = replace(batch, grads=[2 * grad for grad in batch.grads])
    grads = [grad.data_ptr() for grad in moved.grads]
    for _ in range(2):
        want = expected(moved, scalars)
        cuda.repeat(table, scalars, driver, grads=grads)
        assert not differences(moved, want)
    assert torch.equal(old_rows, copy_of_old)
    assert table.num_builds == 1
    # What `run` is told of the tensors is what the table has of them.
    cuda.run(moved, scalars, table, driver)
    assert table.num_builds == 1
    cuda.run(batch, scalars, table, driver)
    assert table.num_builds == 2


@torch.no_grad()
def test_gradients_that_moved_are_refused_in_a_capture_and_others_are_not():
    batch = make_batch(REPRESENTATIVES[0], (3, 40))
    table, recording = PointerTable(), SUBJECT.driver(is_recording=True)
    cuda.run(batch, SCALARS, table, SUBJECT.driver())
    grads = [grad.data_ptr() for grad in batch.grads]
    cuda.repeat(table, SCALARS, recording, grads=grads)
    with pytest.raises(RuntimeError, match="Take one step with the same tensors before"):
        cuda.repeat(table, SCALARS, recording, grads=[grads[0], grads[1] + 4])
    assert table.grads == grads
    assert len(recording.launches) == 1


@torch.no_grad()
def test_arguments_are_the_kernels_parameters_in_their_order():
    text = (SOURCE / "multi_tensor.h").read_text()
    macro = re.search(r"#define ADAMS_PARAMETERS((?:.*\\\n)*.*)", text)[1].replace("\\\n", "")
    parameters = [parameter.strip() for parameter in macro.split(",")]
    batch = make_batch(REPRESENTATIVES[0], (3,))
    scalars = replace(
        scalar_cases()["device_scalars"], lr=0.5, beta1=0.25, beta2=0.125, weight_decay=0.75
    )
    driver, table = SUBJECT.driver(), PointerTable()
    cuda.run(batch, scalars, table, driver)
    arguments = driver.launches[0].arguments
    assert len(arguments) == len(parameters)
    values = {}
    for argument, parameter in zip(arguments, parameters, strict=True):
        kind, name = re.fullmatch(r"(.*?)(\w+)", parameter).groups()
        want = ctypes.c_void_p if "*" in kind else getattr(ctypes, f"c_{kind.strip()}")
        assert type(argument) is want, parameter
        values[name] = argument.value
    assert values == {
        "table": table.rows.data_ptr(),
        "num_tensors": 1,
        "chunk_size": table.chunk_size,
        "amax": table.amax.data_ptr(),
        "lr": 0.5,
        "lr_pointer": None,
        "grad_scale": 0.0,
        "grad_scale_pointer": scalars.grad_scale.data_ptr(),
        "correction": 0.0,
        "correction_pointer": scalars.correction.data_ptr(),
        "found_inf": scalars.found_inf.data_ptr(),
        "beta1": 0.25,
        "one_minus_beta1": 0.75,
        "beta2": 0.125,
        "one_minus_beta2": 0.875,
        "eps": ctypes.c_float(1e-8).value,
        "weight_decay": 0.75,
        "decay": 1,
    }


@pytest.mark.parametrize(
    ("weight_decay", "decoupled", "decay"), [(0.0, True, 0), (0.0, False, 0), (0.1, False, 2)]
)
def test_decay_is_the_enumerator_of_the_kernel(weight_decay, decoupled, decay):
    scalars = replace(SCALARS, weight_decay=weight_decay, decoupled_weight_decay=decoupled)
    assert scalars.decay == decay
    assert (
        "enum Decay { NO_DECAY = 0, DECOUPLED = 1, L2 = 2 };" in (SOURCE / "element.h").read_text()
    )


def test_fields_of_the_table_are_those_of_the_sources():
    shared = (SOURCE / "multi_tensor.h").read_text()
    fields = re.search(r"enum Field \{(.*?)\}", shared, re.DOTALL)[1]
    names = re.findall(r"^\s+(\w+)", fields, re.MULTILINE)
    assert tuple(name.lower() for name in names[2:-1]) == POINTERS
    assert names[:2] == ["NUMEL", "CHUNK_END"] and names[-1] == "NUM_FIELDS"


def test_a_tensor_on_the_cpu_is_read_at_once_where_the_batch_is_elsewhere():
    table = PointerTable()
    table.device = torch.device("meta")
    arguments = kernel_arguments(table, replace(SCALARS, lr=torch.tensor([0.5])))
    assert [value.value for value in arguments.values[4:6]] == [0.5, None]
    assert arguments.keepalive == []
