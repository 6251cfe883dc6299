"""How AdamS hands its tensors to the kernels: batches, layouts, copies for the model, scalars."""

import copy
import pickle
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._pytree import tree_map

import megatron_adams.optimizer.plan
from megatron_adams.kernels import launch, run
from megatron_adams.optimizer import AdamS
from megatron_adams.update import adams_update_

KERNELS = ["host", "foreach"]


def oracle_(param, grad, exp_avg, step, **options):
    adams_update_(
        param,
        grad,
        exp_avg,
        lr=0.01,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        weight_decay=0.1,
        step=step,
        **options,
    )


def build(params, **kwargs):
    return AdamS(params, lr=0.01, weight_decay=0.1, **kwargs)


@pytest.fixture
def calls(monkeypatch):
    """The backend and the number of tensors of each call of the kernels."""
    seen = []

    def record_run(batch, scalars, backend, table, **kind):
        run(batch, scalars, backend, table, **kind)
        seen.append((backend, len(batch.params)))

    def record_launch(table, scalars, backend, **kind):
        launch(table, scalars, backend, **kind)
        seen.append((backend, table.num_tensors))

    monkeypatch.setattr(megatron_adams.optimizer.plan, "run", record_run)
    monkeypatch.setattr(megatron_adams.optimizer.plan, "launch", record_launch)
    return seen


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_model_param_is_written_beside_its_main_param(kernel, dtype):
    main, plain = (torch.randn(1000) for _ in range(2))
    model = torch.zeros(1000, dtype=dtype)
    optimizer = build([main, plain], kernel=kernel)
    optimizer.model_params[main] = model
    expected = main.clone()
    exp_avg = torch.zeros(1000)
    for step in (1, 2):
        main.grad, plain.grad = torch.randn(1000), torch.randn(1000)
        grad = main.grad.clone()
        oracle_(expected, grad, exp_avg, step)
        optimizer.step()
        assert torch.equal(main, expected)
        assert torch.equal(model, expected.to(dtype))
        assert torch.equal(main.grad, grad)
    assert torch.equal(optimizer.state[main]["exp_avg"], exp_avg)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("grad_scale", [0.25, 0.3, torch.tensor([0.3])])
def test_grad_scale_multiplies_the_gradients_and_does_not_write_them(kernel, grad_scale):
    param = nn.Parameter(torch.randn(50))
    expected, exp_avg = param.detach().clone(), torch.zeros(50)
    optimizer = build([param], kernel=kernel)
    param.grad = torch.randn(50)
    grad = param.grad.clone()
    oracle_(expected, grad * grad_scale, exp_avg, 1)
    optimizer.step(grad_scale=grad_scale)
    assert torch.equal(param, expected)
    assert torch.equal(param.grad, grad)


@pytest.mark.parametrize("kernel", KERNELS)
def test_found_inf_leaves_everything_as_it_is(kernel):
    param = nn.Parameter(torch.randn(50))
    before = param.detach().clone()
    optimizer = build([param], kernel=kernel)
    param.grad = torch.full((50,), torch.inf)
    optimizer.step(found_inf=torch.ones(1))
    assert torch.equal(param, before)
    assert not optimizer.state[param]["exp_avg"].any()
    param.grad = torch.randn(50)
    optimizer.step(found_inf=torch.zeros(1))
    assert not torch.equal(param, before)


LAYOUTS = {
    "contiguous": (lambda: torch.randn(4, 6), "host"),
    "transposed": (lambda: torch.randn(6, 4).t(), "host"),
    "channels last": (
        lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "host",
    ),
    "with holes": (lambda: torch.randn(4, 12)[:, ::2], "foreach"),
    "scalar": (lambda: torch.randn(()), "host"),
    "empty": (lambda: torch.randn(0, 3), "host"),
    "fp64": (lambda: torch.randn(4, 6).double(), "foreach"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("contiguous_grad", [False, True])
def test_every_layout_follows_the_oracle(layout, contiguous_grad, calls):
    make, backend = LAYOUTS[layout]
    param = make()
    expected = param.clone()
    exp_avg = torch.zeros_like(param)
    optimizer = AdamS.from_param_groups([{"params": [param]}], lr=0.01, weight_decay=0.1)
    for step in (1, 2):
        grad = torch.randn(param.shape, dtype=param.dtype)
        param.grad = grad if contiguous_grad else torch.empty_like(param).copy_(grad)
        oracle_(expected, grad, exp_avg, step)
        optimizer.step()
    assert torch.equal(param, expected)
    if not contiguous_grad or layout == "contiguous":
        assert {name for name, _ in calls} == {backend}


def test_one_call_for_each_kind_of_tensors_of_a_group(calls):
    params = [nn.Parameter(torch.randn(5)) for _ in range(40)]
    params += [nn.Parameter(torch.randn(5, dtype=torch.bfloat16)) for _ in range(3)]
    params += [nn.Parameter(torch.randn(5, dtype=torch.float64)) for _ in range(2)]
    optimizer = AdamS(params)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert calls == [("host", 40), ("host", 3), ("foreach", 2)]


def test_tables_are_built_once_while_nothing_moves():
    params = [nn.Parameter(torch.randn(5)) for _ in range(4)]
    optimizer = AdamS([{"params": params[:2]}, {"params": params[2:], "lr": 0.1}])
    for param in params:
        param.grad = torch.randn_like(param)
    for _ in range(3):
        optimizer.step()
    builds = [t.num_builds for plan in optimizer._plans.values() for t in plan.tables.values()]
    assert builds == [1, 1]


def new_grad(optimizer, param):
    param.grad = torch.randn(50)


def no_grad(optimizer, param):
    param.grad = None


def new_data(optimizer, param):
    param.data = param.data.clone()


def new_exp_avg(optimizer, param):
    optimizer.state[param]["exp_avg"] = torch.randn(50)


def new_state(optimizer, param):
    optimizer.state[param] = {"exp_avg": torch.randn(50)}


def other_grad_dtype(optimizer, param):
    grad = param.grad.view(torch.bfloat16)[:50]
    param.grad = None
    param.grad_dtype = None
    param.grad = grad


def loaded(optimizer, param):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def new_model_param(optimizer, param):
    optimizer.model_params[param] = torch.zeros(50, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "move",
    [
        new_grad,
        no_grad,
        new_data,
        new_exp_avg,
        new_state,
        other_grad_dtype,
        loaded,
        new_model_param,
    ],
)
def test_tensors_that_moved_between_steps_are_followed(move):
    """What a step launches again from the step before is what is there now."""
    torch.manual_seed(0)
    moved, other = nn.Parameter(torch.randn(50)), nn.Parameter(torch.randn(20))
    optimizer = build([moved, other])
    kept = []  # so that no address is used twice
    for step in (1, 2, 3):
        kept.append([moved.data, moved.grad, optimizer.state[moved].get("exp_avg")])
        if step == 2:
            move(optimizer, moved)
        else:
            moved.grad = torch.randn(50) if moved.grad is None else moved.grad
        other.grad = torch.randn(20) if other.grad is None else other.grad
        want = []
        for param in (moved, other):
            exp_avg = optimizer.state[param].get("exp_avg", torch.zeros_like(param)).clone()
            want.append((param.detach().clone(), exp_avg))
            if param.grad is not None:
                oracle_(*want[-1][:1], param.grad, exp_avg, step)
        optimizer.step()
        for param, (expected, exp_avg) in zip((moved, other), want, strict=True):
            assert torch.equal(param, expected)
            assert torch.equal(optimizer.state[param]["exp_avg"], exp_avg)
    if move is new_model_param:
        assert torch.equal(optimizer.model_params[moved], moved.bfloat16())


def test_gradients_are_freed_between_steps():
    param = nn.Parameter(torch.randn(50))
    optimizer = build([param])
    param.grad = torch.randn(50)
    alive = weakref.ref(param.grad)
    optimizer.step()
    optimizer.zero_grad()
    assert alive() is None


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)
def test_copies_keep_their_kernel_and_write_their_own_model_params(duplicate):
    main, model = torch.randn(6), torch.zeros(6, dtype=torch.bfloat16)
    optimizer = build([main], kernel="foreach")
    optimizer.model_params[main] = model
    twin = duplicate(optimizer)
    assert twin.kernel == "foreach"
    (twin_main,) = twin.param_groups[0]["params"]
    twin_main.grad = torch.randn(6)
    twin.step()
    assert torch.equal(twin.model_params[twin_main], twin_main.bfloat16())
    assert not model.any()


def test_load_state_dict_keeps_kernel_and_model_params():
    main, model = torch.randn(6), torch.zeros(6, dtype=torch.bfloat16)
    optimizer = build([main], kernel="foreach")
    optimizer.model_params[main] = model
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.kernel == "foreach"
    assert optimizer.model_params == {main: model}


def test_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match=r"kernel='triton': must be one of \('auto', 'cuda'"):
        AdamS([torch.randn(3)], kernel="triton")


def test_kernel_of_another_device_is_refused_before_the_first_step():
    optimizer = AdamS([torch.randn(3)], kernel="cuda")
    with pytest.raises(ValueError, match=r"kernel='cuda' for tensors on cpu: must be 'host'"):
        optimizer.compile_kernels()


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_dtensors_take_the_kernel_on_their_local_part(mesh, calls):
    local = torch.randn(6, 4)
    param = nn.Parameter(distribute_tensor(local.clone(), mesh, [Shard(0)]))
    optimizer = build([param])
    expected, exp_avg = local.clone(), torch.zeros_like(local)
    for step in (1, 2):
        grad = torch.randn(6, 4)
        param.grad = distribute_tensor(grad.clone(), mesh, [Shard(0)])
        oracle_(expected, grad, exp_avg, step)
        optimizer.step()
    assert torch.equal(param.to_local(), expected)
    assert calls == [("host", 1)] * 2


# Memory that is not the value


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_behind_conj_moves_the_param_the_right_way(kernel):
    """Autograd's own gradient here is a view of its negative, marked by is_neg()."""
    param = nn.Parameter(torch.tensor(2.0))
    expected, exp_avg = param.detach().clone(), torch.zeros(())
    optimizer = build([param], kernel=kernel)
    for step in (1, 2, 3):
        param.grad = None
        (torch.complex(torch.zeros(()), param).conj() * (1 + 1j)).real.sum().backward()
        assert param.grad.is_neg() and param.grad.item() == 1
        oracle_(expected, torch.ones(()), exp_avg, step)
        optimizer.step()
    assert torch.equal(param, expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["grad", "decoupled_grad"])
def test_lazily_negated_gradient_of_an_imaginary_part(kernel, name):
    param = nn.Parameter(torch.tensor(0.0))
    setattr(param, name, torch.tensor(3 + 4j).conj().imag)
    AdamS([param], lr=0.1, kernel=kernel, use_decoupled_grad=name == "decoupled_grad").step()
    assert param.item() == pytest.approx(0.0447, abs=1e-4)


def negated(tensor):
    """The same values, as a view of their negatives."""
    view = torch._neg_view(-tensor)
    assert view.is_neg() and torch.equal(view, tensor)
    return view


def test_negated_gradients_are_kept_from_begin_step_to_step():
    param = nn.Parameter(torch.randn(50))
    expected, exp_avg = param.detach().clone(), torch.zeros(50)
    optimizer = build([param], max_update_rms=0.1)
    grad = torch.randn(50)
    param.grad = negated(grad)
    optimizer.begin_step()
    torch.full((50,), torch.nan)  # takes memory that was freed
    optimizer.step()
    oracle_(expected, grad, exp_avg, 1, update_factor=optimizer.update_factors()[0])
    assert torch.equal(param, expected)


@pytest.mark.parametrize("which", ["param", "exp_avg", "master_param", "model_param"])
def test_negated_tensors_that_are_written_are_written_as_torch_writes_them(which, calls):
    dtype = torch.bfloat16 if which == "master_param" else torch.float32
    param = torch.randn(50).to(dtype)
    main, exp_avg = param.float(), torch.randn(50)
    grad = torch.randn(50).to(dtype)
    optimizer = build([param], master_weights=which == "master_param")
    optimizer.initialize_state(param)
    state = optimizer.state[param]
    state["exp_avg"].copy_(exp_avg)
    if which == "param":
        param.data = negated(param)
    elif which == "model_param":
        optimizer.model_params[param] = negated(torch.zeros(50).bfloat16())
    else:
        state[which] = negated(state[which])
    param.grad = grad
    for step in (1, 2):
        oracle_(main, grad, exp_avg, step)
        optimizer.step()
    assert torch.equal(param, main.to(dtype))
    assert torch.equal(state["exp_avg"], exp_avg)
    if which == "model_param":
        assert torch.equal(optimizer.model_params[param], main.bfloat16())
    assert [backend for backend, _ in calls] == ["foreach", "foreach"]


def test_loaded_state_is_what_is_in_memory():
    param = nn.Parameter(torch.randn(50))
    optimizer = build([param])
    param.grad = torch.randn(50)
    optimizer.step()
    saved = optimizer.state_dict()
    exp_avg = saved["state"][0]["exp_avg"].clone()
    saved["state"][0]["exp_avg"] = negated(exp_avg)
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[param]["exp_avg"], exp_avg)
    assert not optimizer.state[param]["exp_avg"].is_neg()


@pytest.mark.parametrize("kernel", KERNELS)
def test_lr_on_the_device_may_be_negated(kernel):
    moves = []
    for lr in (torch.tensor(0.1), negated(torch.tensor(0.1))):
        param = nn.Parameter(torch.zeros(3))
        param.grad = torch.ones(3)
        AdamS([param], lr=lr, kernel=kernel).step()
        moves.append(param.detach())
    assert torch.equal(*moves) and moves[0].max() < 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_zero_gradient_without_memory_is_zero(kernel):
    param = nn.Parameter(torch.randn(5))
    expected, exp_avg = param.detach().clone(), torch.randn(5)
    optimizer = build([param], kernel=kernel)
    optimizer.initialize_state(param)
    optimizer.state[param]["exp_avg"].copy_(exp_avg)
    param.grad = torch._efficientzerotensor(5)
    assert param.grad.data_ptr() == 0
    oracle_(expected, torch.zeros(5), exp_avg, 1)
    optimizer.step()
    assert torch.equal(param, expected)


# Plans of the step before


@pytest.mark.parametrize("changed", ["grad", "param", "exp_avg", "model_param"])
def test_other_strides_at_the_same_address_are_followed(changed):
    """As where the allocator gives a gradient of another layout the place of the last one."""
    shape = (2, 3, 4, 5)
    channels_last = {"memory_format": torch.channels_last}
    layouts = [torch.zeros(shape).to(**channels_last).stride(), torch.zeros(shape).stride()]
    param = torch.randn(shape).to(**channels_last)
    param.grad = torch.randn(shape).to(**channels_last)
    optimizer = build([param])
    optimizer.initialize_state(param)
    tensors = {"param": param, "grad": param.grad, "exp_avg": optimizer.state[param]["exp_avg"]}
    if changed == "model_param":
        tensors[changed] = torch.zeros(shape).bfloat16().to(**channels_last)
        optimizer.model_params[param] = tensors[changed]
    permuted = (60, 20, 1, 4)  # dense, and not contiguous either
    for step, strides in enumerate((layouts[0], permuted, layouts[1], layouts[0]), 1):
        place = tensors[changed].data_ptr()
        tensors[changed].as_strided_(shape, strides)
        assert tensors[changed].data_ptr() == place
        expected, exp_avg = param.clone(), tensors["exp_avg"].clone()
        oracle_(expected, param.grad, exp_avg, step)
        optimizer.step()
        assert torch.equal(param, expected)
        assert torch.equal(tensors["exp_avg"], exp_avg)
        if changed == "model_param":
            assert torch.equal(tensors[changed], expected.bfloat16())


def test_other_dtypes_and_sizes_at_the_same_address_are_followed():
    param, memory = torch.randn(40), torch.zeros(40)
    optimizer = build([param])
    for step, (dtype, size) in enumerate(
        ((torch.float32, 40), (torch.bfloat16, 40), (torch.float16, 40), (torch.float32, 20)), 1
    ):
        param.data = param.data[:size]
        optimizer.state[param] = {"exp_avg": memory.view(dtype)[:size]}
        param.grad = torch.randn(size)
        if dtype == torch.float16:
            optimizer.state.pop(param)
        expected = param.clone()
        exp_avg = optimizer.state[param].get("exp_avg", torch.zeros(size)).float()
        oracle_(expected, param.grad, exp_avg.clone(), step)
        optimizer.step()
        assert torch.equal(param, expected)


@pytest.mark.parametrize("options", [{}, {"match_update_rms": 0.2}], ids=["plain", "matched"])
def test_gradients_at_other_addresses_are_followed_in_the_same_table(options, monkeypatch):
    """Their row of the table alone is written."""

    def not_again(*_, **__):
        raise AssertionError("the tensors are sorted into batches again")

    params = [nn.Parameter(torch.randn(5)) for _ in range(4)]
    params += [nn.Parameter(torch.randn(5).bfloat16()) for _ in range(3)]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer, other = build(params, **options), build(twins, kernel="foreach", **options)
    for step in range(4):
        kept = [param.grad for param in params]  # so that no address is used twice
        for param, twin in zip(params, twins, strict=True):
            param.grad, twin.grad = (torch.randn_like(param), None)
            twin.grad = param.grad.clone()
        if step == 1:
            monkeypatch.setattr(megatron_adams.optimizer.plan, "run", not_again)
        with monkeypatch.context() as patch:
            patch.setattr(megatron_adams.optimizer.plan, "run", run)
            other.step()
        if step == 2:  # some stay where they are
            params[0].grad = kept[0].copy_(params[0].grad)
        optimizer.step()
        for param, twin in zip(params, twins, strict=True):
            assert torch.equal(param, twin)
            assert torch.equal(optimizer.state[param]["exp_avg"], other.state[twin]["exp_avg"])
    builds = {t.num_builds for plan in optimizer._plans.values() for t in plan.tables.values()}
    assert builds == {1}


def test_step_that_failed_half_way_is_whole_when_it_is_taken_again(monkeypatch):
    fp32, bf16 = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5).bfloat16())
    optimizer = build([fp32, bf16])
    fp32.grad, bf16.grad = torch.randn(5), torch.randn(5).bfloat16()

    def fail_for_bf16(batch, *rest, **kind):
        if batch.params[0].dtype == torch.bfloat16:
            raise RuntimeError("out of memory")
        run(batch, *rest, **kind)

    with monkeypatch.context() as patch:
        patch.setattr(megatron_adams.optimizer.plan, "run", fail_for_bf16)
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step()
    before = bf16.detach().clone()
    optimizer.step()
    assert not torch.equal(bf16, before)


class Wrapper(torch.Tensor):
    """A tensor whose data is in another one, as quantization libraries have them."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def unwrapped(x):
            return x.inner if isinstance(x, cls) else x

        return func(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs or {}))


@pytest.mark.parametrize("which", ["grad", "exp_avg"])
def test_tensors_without_a_pointer_take_torchs_operations_and_others_the_kernel(which, calls):
    params = [torch.randn(6) for _ in range(4)]
    grads = [torch.randn(6), torch.randn(6), negated(torch.randn(6)), torch._efficientzerotensor(6)]
    expected = [param.clone() for param in params]
    exp_avgs = [torch.zeros(6) for _ in params]
    optimizer = build(params)
    for param, grad in zip(params, grads, strict=True):
        optimizer.initialize_state(param)
        param.grad = grad
    if which == "exp_avg":
        optimizer.state[params[0]]["exp_avg"] = Wrapper(torch.zeros(6))
    else:
        params[0].grad = None
        optimizer.use_decoupled_grad = True
        for param, grad in zip(params, [Wrapper(grads[0]), *grads[1:]], strict=True):
            param.decoupled_grad = grad
    for step in (1, 2):
        for param, grad, exp_avg in zip(expected, grads, exp_avgs, strict=True):
            oracle_(param, grad + 0, exp_avg, step)
        optimizer.step()
    assert all(map(torch.equal, params, expected))
    assert sorted(calls[:2]) == [("foreach", 1), ("host", 3)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("other", "words"),
    [(torch.ones(3, 2), "has shape"), (torch.ones(2, 3, device="meta"), "lie on")],
)
def test_decoupled_gradient_that_does_not_fit_is_refused_at_any_step(kernel, other, words):
    param = nn.Parameter(torch.zeros(2, 3))
    optimizer = AdamS([param], lr=0.1, kernel=kernel, use_decoupled_grad=True)
    param.decoupled_grad = torch.ones(2, 3)
    optimizer.step()
    before = param.detach().clone()
    param.decoupled_grad = other
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert torch.equal(param, before)
