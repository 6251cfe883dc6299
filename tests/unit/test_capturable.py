"""AdamS(capturable=True): a step that a CUDA graph replays, on a stand-in for CUDA graphs."""

import copy
import pickle
import weakref
from fractions import Fraction
from typing import Any

import pytest
import torch

from megatron_adams import AdamS
from megatron_adams.checkpoint import state_dict_from_adam
from megatron_adams.kernels import correction_of
from megatron_adams.update import bias_correction_factor
from tests.harness import cuda_graph_stand_in as stand_in
from tests.harness.capturable_runs import (
    MODES,
    RATES,
    assert_same,
    build,
    run_captured,
    run_eager,
    set_grads,
    steps_until_one,
)


@pytest.mark.parametrize("mode", MODES)
def test_replayed_steps_have_the_bits_of_eager_ones(mode: str) -> None:
    eager, captured = build(False, **MODES[mode]), build(True, **MODES[mode])
    run_eager(*eager, range(6))
    with stand_in.installed():
        graph = run_captured(*captured, range(6))
    assert graph.num_replays == 5
    assert [group["step"].item() for group in captured[1].param_groups] == [6, 6, 6]
    assert_same(captured, eager)


def test_capturable_step_outside_a_graph_has_the_same_bits() -> None:
    eager, capturable = (build(flag, **MODES["bias_correction"]) for flag in (False, True))
    run_eager(*eager, range(6))
    run_eager(*capturable, range(6))
    assert_same(capturable, eager)


def test_scalars_on_the_device_are_read_at_each_replay() -> None:
    params, optimizer = build(True)
    grad_scale, found_inf = torch.ones(1, dtype=torch.float64), torch.zeros(1)
    with stand_in.installed():
        graph = run_captured(
            params, optimizer, range(3), grad_scale=grad_scale, found_inf=found_inf
        )
        before = params[1].detach().clone()
        found_inf.fill_(1)
        graph.replay()
        assert torch.equal(params[1], before)
        assert optimizer.param_groups[0]["step"] == 4
        found_inf.fill_(0)
        grad_scale.fill_(0.5)
        exp_avg = optimizer.state[params[1]]["exp_avg"]
        expected = 0.9 * exp_avg + (1 - 0.9) * (0.5 * params[1].grad)
        graph.replay()
        torch.testing.assert_close(exp_avg, expected)


def saved_by(capturable: bool) -> tuple[list[torch.nn.Parameter], AdamS, dict[str, Any]]:
    params, optimizer = build(capturable, bias_correction=True)
    run_eager(params, optimizer, range(3))
    return params, optimizer, copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("saves", [False, True], ids=["plain", "capturable"])
@pytest.mark.parametrize("loads", [False, True], ids=["plain", "capturable"])
def test_checkpoint_has_plain_numbers_and_loads_either_way(saves: bool, loads: bool) -> None:
    params, optimizer, saved = saved_by(saves)
    for group in saved["param_groups"]:
        assert type(group["lr"]) is float and group["lr"] == RATES[2]
        assert type(group["step"]) is int and group["step"] == 3
    resumed_params, resumed = build(loads, bias_correction=True)
    for param, other in zip(resumed_params, params, strict=True):
        param.data.copy_(other)
    kept = [(group["lr"], group["step"]) for group in resumed.param_groups]
    resumed.load_state_dict(saved)
    if loads:
        # A graph that was captured before goes on with these very tensors.
        for group, (lr, step) in zip(resumed.param_groups, kept, strict=True):
            assert group["lr"] is lr and group["step"] is step
    run_eager(params, optimizer, range(3, 6))
    if loads:
        with stand_in.installed():
            run_captured(resumed_params, resumed, range(3, 6))
    else:
        run_eager(resumed_params, resumed, range(3, 6))
    assert_same((resumed_params, resumed), (params, optimizer))


@pytest.mark.parametrize("loads", [False, True], ids=["plain", "capturable"])
def test_tensors_in_a_checkpoint_are_read(loads: bool) -> None:
    """As TransformerEngine's FusedAdam(capturable=True) has them in its groups."""
    _, _, saved = saved_by(False)
    for group in saved["param_groups"]:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float32)
        group["step"] = torch.tensor([group["step"]], dtype=torch.int32)
    _, optimizer = build(loads)
    optimizer.load_state_dict(saved)
    for group in optimizer.state_dict()["param_groups"]:
        assert group["step"] == 3 and group["lr"] == pytest.approx(RATES[2], rel=1e-7)
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) == loads


@pytest.mark.parametrize("was_captured", [False, True], ids=["torch", "fused_adam_capturable"])
def test_goes_on_from_adam(was_captured: bool) -> None:
    params, _ = build(False)
    adam = torch.optim.AdamW(params, lr=7e-4)
    for step in range(3):
        set_grads(params, step)
        adam.step()
    saved = adam.state_dict()
    if was_captured:
        # As TransformerEngine's has them: the step in the group, and tensors.
        for state in saved["state"].values():
            del state["step"]
        for group in saved["param_groups"]:
            group |= {"lr": torch.tensor(group["lr"]), "step": torch.tensor([3], dtype=torch.int32)}
    optimizer = AdamS(params, capturable=True)
    optimizer.load_state_dict(state_dict_from_adam(saved, adam_w_mode=True))
    assert isinstance(optimizer.param_groups[0]["step"], torch.Tensor)
    (group,) = optimizer.state_dict()["param_groups"]
    assert group["step"] == 3 and group["lr"] == pytest.approx(7e-4, rel=1e-7)
    for param in params:
        assert torch.equal(optimizer.state[param]["exp_avg"], adam.state[param]["exp_avg"])


def test_load_that_fails_leaves_lr_and_step() -> None:
    _, _, saved = saved_by(False)
    saved["param_groups"][2]["lr"] = -1.0
    _, optimizer = build(True, lr=5e-4)
    with pytest.raises(ValueError, match=r"lr=-1\.0"):
        optimizer.load_state_dict(saved)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [5e-4] * 3
    assert [int(group["step"]) for group in optimizer.param_groups] == [0] * 3


def test_groups_have_learning_rates_of_their_own() -> None:
    _, optimizer = build(True, lr=5e-4)
    optimizer.param_groups[0]["lr"].fill_(1e-3)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [1e-3, 5e-4, 5e-4]
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 2e-4})
    assert float(optimizer.param_groups[3]["lr"]) == 2e-4
    assert int(optimizer.param_groups[3]["step"]) == 0


def test_pickled_optimizer_stays_capturable() -> None:
    _, optimizer = build(True)
    other = pickle.loads(pickle.dumps(optimizer))
    assert other.capturable and isinstance(other.param_groups[0]["step"], torch.Tensor)
    other.step()


def test_graph_goes_on_after_a_step_with_other_gradients() -> None:
    """That step writes new tables; those of the graph stay."""
    params, optimizer = build(True, weight_decay=0.1)
    with stand_in.installed():
        graph = run_captured(params, optimizer, range(2))
    rows = [weakref.ref(t.rows) for plan in optimizer._plans.values() for t in plan.tables.values()]
    captured_grads = [param.grad for param in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert rows and all(ref() is not None for ref in rows)
    expected = copy.deepcopy((params, optimizer))
    for param, grad in zip(params, captured_grads, strict=True):
        param.grad = grad
    for param, grad in zip(expected[0], captured_grads, strict=True):
        param.grad = grad.clone()
    expected[1].step()
    graph.replay()
    assert_same((params, optimizer), expected)


def test_what_graphs_use_is_kept_once() -> None:
    params, optimizer = build(True)
    set_grads(params, 0)
    optimizer.step()
    with stand_in.installed():
        for _ in range(3):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                optimizer.step()
    tables = [table for plan in optimizer._plans.values() for table in plan.tables.values()]
    kept = {id(each) for each in optimizer._used_by_graphs.values() if each is not None}
    assert kept == {id(tensor) for table in tables for tensor in (table.rows, table.amax)}


def test_torch_scheduler_sets_the_tensor() -> None:
    params, optimizer = build(True, lr=1e-3)
    lr = optimizer.param_groups[0]["lr"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    set_grads(params, 0)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is lr and float(lr) == 5e-4


# --- refusals ----------------------------------------------------------------------------------


def test_step_without_capturable_is_not_captured() -> None:
    params, optimizer = build(False)
    set_grads(params, 0)
    optimizer.step()
    with (
        stand_in.installed(),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
        pytest.raises(ValueError, match=r"capturable=False inside a CUDA graph.*must be True"),
    ):
        optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1


def test_number_in_the_place_of_lr_is_refused() -> None:
    params, optimizer = build(True)
    set_grads(params, 0)
    optimizer.param_groups[2]["lr"] = 1e-3
    with pytest.raises(ValueError, match=r"lr=0.001 with capturable=True: must stay the tensor"):
        optimizer.step()
    assert optimizer.param_groups[0]["step"] == 0


def test_lr_that_is_not_beside_the_params_is_refused_at_the_step() -> None:
    """As where a model was moved to the GPU after its optimizer was built."""
    _, optimizer = build(True)
    optimizer.param_groups[2]["lr"] = torch.zeros((), device="meta")
    with pytest.raises(ValueError, match="lr on meta with capturable=True: must be on cpu, where"):
        optimizer.step()


@pytest.mark.parametrize("captures", ["first_step", "moved_gradient"])
def test_table_is_not_written_during_a_capture(captures: str) -> None:
    params, optimizer = build(True)
    set_grads(params, 0)
    if captures == "moved_gradient":
        optimizer.step()
        params[1].grad = params[1].grad.clone()
    else:
        for param in params:
            optimizer.initialize_state(param)
    with (
        stand_in.installed(),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
        pytest.raises(RuntimeError, match="Take one step with the same tensors before"),
    ):
        optimizer.step()


def test_a_host_sync_ends_the_capture() -> None:
    """The stand-in sees what it is for."""
    tensor = torch.ones(1)
    for sync in (
        lambda: tensor.item(),
        lambda: bool(tensor > 0),
        lambda: torch.tensor([1.0]),
        lambda: tensor.nonzero(),
        lambda: tensor.tolist(),
        lambda: tensor.cpu(),
        lambda: torch.cuda.synchronize(),
    ):
        with (
            stand_in.installed(),
            pytest.raises(stand_in.HostSyncError),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            sync()


def test_a_capture_carries_nothing_out_and_a_replay_runs_no_python() -> None:
    calls = []
    x, y = torch.ones(3), torch.ones(1)
    with stand_in.installed():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls.append(None)
            z = x * 2
            x.add_(1)
            y.copy_(z.sum())
        assert x.tolist() == [1, 1, 1] and y.tolist() == [1] and z.isnan().all()
        graph.replay()
        graph.replay()
    assert x.tolist() == [3, 3, 3] and z.tolist() == [4, 4, 4] and y.tolist() == [12]
    assert len(calls) == 1


def test_quantized_params_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_adams.optimizer.is_quantized", lambda tensor: True)
    with pytest.raises(ValueError, match="capturable=True with quantized parameters: must be"):
        AdamS([torch.nn.Parameter(torch.zeros(2))], capturable=True, master_weights=True)


def test_lr_on_another_device_is_refused() -> None:
    lr = torch.zeros((), device="meta")
    with pytest.raises(ValueError, match="lr is a tensor on meta with capturable=True: must be on"):
        AdamS._move_numbers_to_device(build(True)[1], {"params": [torch.zeros(1)], "lr": lr})


def test_params_of_a_group_on_two_devices_are_refused() -> None:
    params = [torch.nn.Parameter(torch.zeros(2, device=device)) for device in ("cpu", "meta")]
    with pytest.raises(ValueError, match=r"parameters of one group on \['cpu', 'meta'\]"):
        AdamS(params, capturable=True)


def test_capturable_is_one_for_all_groups() -> None:
    group = {"params": [torch.nn.Parameter(torch.zeros(2))], "capturable": True}
    with pytest.raises(ValueError, match="capturable in a param group: is one for all groups"):
        AdamS([group])
    AdamS([{**group, "capturable": False}])
    AdamS([group], capturable=True)


# --- the correction ----------------------------------------------------------------------------


@pytest.mark.parametrize("beta1", [0.5, 0.8, 0.9, 0.95, 0.98, 0.99])
def test_correction_on_the_device_has_the_bits_of_the_hosts(beta1: float) -> None:
    steps = steps_until_one(beta1)
    on_host = torch.tensor([bias_correction_factor(beta1, step) for step in steps])
    on_device = [correction_of(True, beta1, torch.tensor(step)) for step in steps]
    assert torch.equal(torch.stack(on_device).float(), on_host)
    assert on_host[0] > 1 and on_host[-1] == 1


@pytest.mark.parametrize("beta1", [0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999])
def test_correction_is_far_enough_from_where_fp32_rounds_the_other_way(beta1: float) -> None:
    """So that another device's pow, some ulps off in double, gives the same fp32 number."""
    below, above = [], []
    for step in steps_until_one(beta1):
        power = Fraction(beta1**step)
        exact = 1 / (1 - power)
        # 4 ulps of pow, and one of each operation after it.
        error = exact * exact * power * Fraction(4, 2**52) + exact * Fraction(2, 2**52)
        below.append(float(exact - error))
        above.append(float(exact + error))
    assert torch.equal(torch.tensor(below), torch.tensor(above))
    assert below[0] < above[0]
