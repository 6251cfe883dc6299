"""The arguments and the protocols of torch's own optimizers: what a program for AdamW passes on."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import megatron_adams.kernels as kernels
from megatron_adams import AdamS
from megatron_adams.kernels import CompileError

KERNELS = ["host", "foreach"]
STORAGES = {
    "fp32": {},
    "L2": {"weight_decay": 0.1, "adam_w_mode": False},
    "remainders": {"master_weights": True, "store_param_remainders": True},
    "scaled": {"master_weights": True, "exp_avg_dtype": torch.float16},
    "matched": {"match_update_rms": 0.2, "weight_decay": 0.1},
    "bias_correction": {"bias_correction": True},
}


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in (40, 3)]


def gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]


def assert_same(mine, theirs):
    for my_group, their_group in zip(mine.param_groups, theirs.param_groups, strict=True):
        for param, twin in zip(my_group["params"], their_group["params"], strict=True):
            assert torch.equal(param, twin)
            for name in mine.state[param]:
                ours = mine.get_unscaled_state(param, name)
                assert torch.equal(ours, theirs.get_unscaled_state(twin, name)), name


# The constructor


def test_every_argument_of_torchs_adamw_is_taken_at_its_default():
    named = inspect.signature(torch.optim.AdamW.__init__).parameters
    ours = inspect.signature(AdamS.__init__).parameters
    arguments = {
        name: parameter.default
        for name, parameter in named.items()
        if parameter.default is not inspect.Parameter.empty
    }
    assert {"maximize", "foreach", "fused", "differentiable", "capturable"} <= arguments.keys()
    assert arguments.keys() <= ours.keys()
    # AdamW's other defaults are no good ones for AdamS, see its docstring.
    AdamS(parameters(), **arguments)


@pytest.mark.parametrize("fused", [None, False, True])
@pytest.mark.parametrize("foreach", [None, False])
def test_fused_and_foreach_choose_the_implementation(fused, foreach):
    optimizer = AdamS(parameters(), fused=fused, foreach=foreach)
    step_with(optimizer)
    assert backends(optimizer) == {"host"}
    optimizer = AdamS(parameters(), fused=fused if not fused else None, foreach=True)
    step_with(optimizer)
    assert backends(optimizer) == {"foreach"}


def step_with(optimizer, seed=1):
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param, grad in zip(params, gradients(params, seed), strict=True):
        param.grad = grad
    optimizer.step()


def backends(optimizer):
    return {backend for plan in optimizer._plans.values() for backend, _ in plan.tables}


@pytest.fixture
def no_compiler(monkeypatch):
    def fail(*_):
        raise CompileError("no C++ compiler")

    monkeypatch.setattr(kernels, "_load", fail)
    kernels.select_backend.cache_clear()
    yield
    kernels.select_backend.cache_clear()


def test_fused_has_no_fallback(no_compiler):
    step_with(AdamS(parameters()))
    optimizer = AdamS(parameters(), fused=True)
    before = [param.detach().clone() for param in optimizer.param_groups[0]["params"]]
    for _ in range(2):
        with pytest.raises(CompileError, match="no C\\+\\+ compiler"):
            step_with(optimizer)
    assert all(map(torch.equal, optimizer.param_groups[0]["params"], before))
    with pytest.raises(CompileError, match="no C\\+\\+ compiler"):
        optimizer.compile_kernels()


def test_fused_on_a_device_without_a_kernel_is_refused():
    optimizer = AdamS([nn.Parameter(torch.zeros(3, device="meta"))], fused=True)
    with pytest.raises(ValueError, match=r"fused=True for parameters on meta: must be on a CUDA"):
        optimizer.compile_kernels()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"fused": True, "foreach": True}, r"^fused=True, foreach=True: must be one of the two"),
        ({"fused": True, "kernel": "foreach"}, r"^fused=True with kernel='foreach': must be"),
        ({"foreach": True, "kernel": "host"}, r"^foreach=True with kernel='host': must be"),
        ({"foreach": True, "kernel": "cuda"}, r"^foreach=True with kernel='cuda': must be"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        AdamS(parameters(), **arguments)


@pytest.mark.parametrize("name", ["fused", "foreach"])
def test_implementation_of_one_group_is_refused(name):
    with pytest.raises(ValueError, match=f"^{name} in a param group: is one for all groups"):
        AdamS([{"params": parameters(), name: True}])
    # As torch's optimizers have it in their groups.
    AdamS([{"params": parameters(), name: None}], **{name: True})
    AdamS([{"params": parameters(), name: True}], **{name: True})
    AdamS([{"params": parameters(), name: False}])


# maximize


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("grad_scale", [1.0, 0.3, "tensor"])
def test_maximize_has_the_bits_of_negated_gradients(kernel, storage, grad_scale):
    if grad_scale == "tensor":
        grad_scale = torch.tensor([0.3])
    is_16_bit = STORAGES[storage].get("master_weights", False)
    dtype = torch.bfloat16 if is_16_bit else torch.float32
    up, down = (
        AdamS(parameters(dtype), lr=0.01, kernel=kernel, maximize=flag, **STORAGES[storage])
        for flag in (True, False)
    )
    for step in range(1, 4):
        params, twins = (optimizer.param_groups[0]["params"] for optimizer in (up, down))
        for param, twin, grad in zip(params, twins, gradients(params, step), strict=True):
            param.grad, twin.grad = grad, -grad
        up.step(grad_scale=grad_scale)
        down.step(grad_scale=grad_scale)
        assert all(torch.equal(p.grad, -t.grad) for p, t in zip(params, twins, strict=True))
    assert_same(up, down)


def test_maximize_is_of_a_group_and_of_its_checkpoint():
    def build(**options):
        first, second = parameters()
        return AdamS([{"params": [first]}, {"params": [second], "maximize": True}], **options)

    optimizer = build(lr=0.1)
    first, second = (group["params"][0] for group in optimizer.param_groups)
    before = [first.detach().clone(), second.detach().clone()]
    first.grad, second.grad = torch.ones(40), torch.ones(3)
    optimizer.step()
    assert (first < before[0]).all() and (second > before[1]).all()
    saved = optimizer.state_dict()
    assert [group["maximize"] for group in saved["param_groups"]] == [False, True]
    loaded = AdamS([{"params": [p]} for p in parameters()])
    loaded.load_state_dict(saved)
    assert [group["maximize"] for group in loaded.param_groups] == [False, True]
    # One that was written before there was such a key has the optimizer's.
    for group in saved["param_groups"]:
        del group["maximize"]
    loaded = AdamS([{"params": [p]} for p in parameters()], maximize=True)
    loaded.load_state_dict(saved)
    assert [group["maximize"] for group in loaded.param_groups] == [True, True]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_keep_what_was_asked_for(duplicate):
    twin = duplicate(AdamS(parameters(), fused=True, maximize=True))
    assert twin.fused and twin.param_groups[0]["maximize"]
    assert duplicate(AdamS(parameters(), foreach=True)).kernel == "foreach"


# torch.amp.GradScaler


class CountingWaits(TorchDispatchMode):
    """Counts how often the host reads a number of a tensor, and so waits for a GPU."""

    def __init__(self):
        super().__init__()
        self.num_waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_waits += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def train_with_scaler(optimizer, *, clip=None):
    """Three steps, of which the second overflows; how often the host waited in each."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0, growth_interval=1000)
    params = optimizer.param_groups[0]["params"]
    waits = []
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(sum((param**2).sum() for param in params)).backward()
        if step == 1:
            params[0].grad[1] = torch.inf
        if clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(params, clip)
        with CountingWaits() as counting:
            scaler.step(optimizer)
        waits.append(counting.num_waits)
        scaler.update()
    assert scaler.get_scale() == 500.0
    return waits


@pytest.mark.parametrize("clip", [None, 0.5])
def test_fused_step_unscales_and_skips_for_grad_scaler_without_a_wait(clip):
    fused, waiting = AdamS(parameters(), lr=0.1, fused=True), AdamS(parameters(), lr=0.1)
    assert train_with_scaler(fused, clip=clip) == [0, 0, 0]
    assert min(train_with_scaler(waiting, clip=clip)) > 0
    assert_same(fused, waiting)
    assert not hasattr(fused, "grad_scale") and not hasattr(fused, "found_inf")


def test_clip_coefficient_and_grad_scalers_scale_are_multiplied():
    plain, fused = AdamS(parameters(), lr=0.1), AdamS(parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))  # it has a scale from here on
    params, twins = (optimizer.param_groups[0]["params"] for optimizer in (fused, plain))
    for param, twin, grad in zip(params, twins, gradients(params, 1), strict=True):
        param.grad, twin.grad = 1024 * grad, grad
    scaler.step(fused, grad_scale=0.25)
    plain.step(grad_scale=0.25)
    assert_same(fused, plain)


def test_bias_correction_does_not_count_steps_that_grad_scaler_skips():
    options = {"lr": 0.1, "bias_correction": True}
    fused, waiting = AdamS(parameters(), fused=True, **options), AdamS(parameters(), **options)
    train_with_scaler(fused)
    train_with_scaler(waiting)
    assert_same(fused, waiting)
    assert fused.param_groups[0]["step"] == 2


def test_grad_scaler_with_an_optimizer_that_has_no_gradients():
    optimizer = AdamS(parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert optimizer.param_groups[0]["step"] == 1


# torch.compile


@pytest.mark.parametrize("is_first_step", [True, False])
def test_compiled_step_is_not_traced(is_first_step, recwarn):
    torch._dynamo.reset()
    compiled, eager = AdamS(parameters(), lr=0.1), AdamS(parameters(), lr=0.1)
    for optimizer in (compiled, eager):
        if not is_first_step:
            step_with(optimizer)
    counter = CompileCounter()
    step = torch.compile(compiled.step, backend=counter)
    for seed in (2, 3):
        for optimizer, take in ((compiled, step), (eager, eager.step)):
            params = optimizer.param_groups[0]["params"]
            for param, grad in zip(params, gradients(params, seed), strict=True):
                param.grad = grad
            take()
    assert_same(compiled, eager)
    assert counter.op_count == 0
    assert not [w for w in recwarn if "functools" in str(w.message) or "Dynamo" in str(w.message)]


def test_step_of_a_compiled_training_step_is_left_out_of_its_graphs():
    torch._dynamo.reset()
    compiled, eager = AdamS(parameters(), lr=0.1), AdamS(parameters(), lr=0.1)

    def train(optimizer):
        params = optimizer.param_groups[0]["params"]
        loss = sum((param**2).sum() for param in params)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    counter = CompileCounter()
    fast = torch.compile(train, backend=counter)
    for _ in range(2):
        fast(compiled)
        train(eager)
    assert_same(compiled, eager)
    assert 0 < counter.op_count < 20
