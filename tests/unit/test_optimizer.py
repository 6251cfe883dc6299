"""AdamS as a torch optimizer: the loop around `update`, its state, checkpoints and refusals."""

import copy
import io
import pickle
from decimal import Decimal
from math import inf, nan

import numpy as np
import pytest
import torch
from torch import nn

from megatron_adams.optimizer import AdamS
from megatron_adams.update import adams_update_, exp_avg_dtype

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def tensors(*shapes, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def parameters(*shapes, **kwargs):
    return [nn.Parameter(tensor) for tensor in tensors(*shapes, **kwargs)]


def set_grads(params, seed):
    for param, grad in zip(params, tensors(*(p.shape for p in params), seed=seed), strict=True):
        param.grad = grad.to(param.dtype)


def train(optimizer, steps, first_seed=1):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for seed in range(first_seed, first_seed + steps):
        set_grads(params, seed)
        optimizer.step()


def saved(optimizer):
    """The optimizer's state after a trip through a file, as a checkpoint sees it."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_equal_state(first, second):
    for group, other in zip(first.param_groups, second.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in other.items() if k != "params"
        }
        for param, twin in zip(group["params"], other["params"], strict=True):
            assert torch.equal(param, twin)
            assert first.state[param].keys() == second.state[twin].keys() == {"exp_avg"}
            exp_avg, other_exp_avg = first.state[param]["exp_avg"], second.state[twin]["exp_avg"]
            assert exp_avg.dtype == other_exp_avg.dtype == exp_avg_dtype(param)
            assert torch.equal(exp_avg, other_exp_avg)


# The loop


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("adam_w_mode", [False, True])
def test_groups_with_overrides_follow_the_oracle(dtype, bias_correction, adam_w_mode):
    first, second, third = parameters((3, 5), (7,), (), dtype=dtype)
    overrides = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2}
    optimizer = AdamS(
        [{"params": [first]}, {"params": [second, third], **overrides}],
        lr=0.01,
        weight_decay=0.1,
        bias_correction=bias_correction,
        adam_w_mode=adam_w_mode,
    )
    inherited = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    expected = [
        (p.detach().clone(), torch.zeros(p.shape, dtype=exp_avg_dtype(p)), options)
        for p, options in [(first, inherited), (second, overrides), (third, overrides)]
    ]
    params = [first, second, third]
    for step in range(1, 6):
        set_grads(params, seed=step)
        for param, (copied, exp_avg, options) in zip(params, expected, strict=True):
            scalars = {k: v for k, v in options.items() if k != "betas"}
            adams_update_(
                copied, param.grad, exp_avg, beta1=options["betas"][0], beta2=options["betas"][1],
                step=step, bias_correction=bias_correction, decoupled_weight_decay=adam_w_mode,
                **scalars,
            )  # fmt: skip
        optimizer.step()
    for param, (copied, exp_avg, _) in zip(params, expected, strict=True):
        assert torch.equal(param, copied)
        assert torch.equal(optimizer.state[param]["exp_avg"], exp_avg)


FORMS = [{}, {"nesterov": True}, {"cautious": True}, {"nesterov": True, "cautious": True}]


@pytest.mark.parametrize("kernel", ["auto", "foreach"])
def test_each_group_has_its_own_form_of_the_update(kernel):
    params = parameters(*[(3, 5)] * len(FORMS))
    groups = [{"params": [p], **form} for p, form in zip(params, FORMS, strict=True)]
    optimizer = AdamS(groups, lr=0.01, kernel=kernel)
    copies = [(p.detach().clone(), torch.zeros(p.shape)) for p in params]
    for step in range(1, 8):
        set_grads(params, seed=step)
        if step == 5:
            # Nothing has moved since the last step: the tables are the same, the kernels are not.
            for group, form in zip(optimizer.param_groups, reversed(FORMS), strict=True):
                group.update({"nesterov": False, "cautious": False, **form})
        forms = FORMS if step < 5 else [*reversed(FORMS)]
        for param, (copied, exp_avg), form in zip(params, copies, forms, strict=True):
            adams_update_(
                copied, param.grad, exp_avg, lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8,
                weight_decay=0.0, step=step, **form,
            )  # fmt: skip
        optimizer.step()
        for param, (copied, exp_avg) in zip(params, copies, strict=True):
            assert torch.equal(param, copied)
            assert torch.equal(optimizer.state[param]["exp_avg"], exp_avg)


def test_kernels_of_each_groups_form_are_compiled_before_the_first_step(monkeypatch):
    compiled = []
    monkeypatch.setattr(AdamS, "_choose_backend", lambda _, __, mode: compiled.append(mode))
    params = parameters(*[(3,)] * len(FORMS))
    groups = [{"params": [p], **form} for p, form in zip(params, FORMS, strict=True)]
    AdamS(groups).compile_kernels()
    assert [mode.name.removeprefix("g32-p32-m32-w0") for mode in compiled] == [
        *("", "-nesterov", "-cautious", "-nesterov-cautious"),
    ]


def test_nesterov_with_bias_correction_is_refused_in_a_group_and_in_a_checkpoint():
    message = "nesterov=True with bias_correction=True: must be one of the two"
    with pytest.raises(ValueError, match=message):
        AdamS(parameters((3,)), nesterov=True, bias_correction=True)
    optimizer = AdamS(parameters((3,)), nesterov=True)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": parameters((4,)), "bias_correction": True})
    corrected = AdamS(parameters((3,)), bias_correction=True).state_dict()
    del corrected["param_groups"][0]["nesterov"]
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(corrected)


def test_checkpoint_without_the_forms_of_the_update_leaves_them_as_they_are():
    optimizer = AdamS(parameters((3,)), nesterov=True, cautious=True)
    earlier = AdamS(parameters((3,))).state_dict()
    for name in ("nesterov", "cautious"):
        del earlier["param_groups"][0][name]
    optimizer.load_state_dict(earlier)
    assert optimizer.param_groups[0]["nesterov"] is optimizer.param_groups[0]["cautious"] is True


def test_state_is_exp_avg_alone_and_lazy():
    used, unused = parameters((4,), (4,))
    optimizer = AdamS([used, unused])
    before = unused.detach().clone()
    assert len(optimizer.state) == 0
    used.grad = torch.ones(4)
    optimizer.step()
    assert {id(param) for param in optimizer.state} == {id(used)}
    assert optimizer.state[used].keys() == {"exp_avg"}
    assert torch.equal(unused, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_initialize_state_allocates_what_step_would_and_never_twice(dtype):
    (param,) = parameters((2, 3), dtype=dtype)
    optimizer = AdamS([param])
    optimizer.initialize_state(param)
    exp_avg = optimizer.state[param]["exp_avg"]
    assert torch.equal(exp_avg, torch.zeros(2, 3, dtype=exp_avg_dtype(param)))
    train(optimizer, 1)
    optimizer.initialize_state(param)
    assert optimizer.state[param]["exp_avg"] is exp_avg
    assert exp_avg.abs().sum() > 0


def test_step_advances_in_groups_that_are_empty_or_have_no_gradient():
    with_grad, without = parameters((2,), (2,))
    optimizer = AdamS([{"params": [with_grad]}, {"params": [without]}, {"params": []}])
    assert [group["step"] for group in optimizer.param_groups] == [0, 0, 0]
    with_grad.grad = torch.ones(2)
    optimizer.step()
    optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [2, 2, 2]
    assert all(type(group["step"]) is int for group in optimizer.param_groups)


def test_late_first_gradient_is_corrected_by_the_groups_step():
    early, late = parameters((1,), (1,))
    optimizer = AdamS([early, late], lr=1.0, bias_correction=True)
    for _ in range(100):
        early.grad = torch.ones(1)
        optimizer.step()
    before = late.item()
    late.grad = torch.ones(1)
    optimizer.step()
    # The paper's first step: at step 101 the correction is 1.00002.
    assert before - late.item() == pytest.approx(0.1 / 0.05**0.5, rel=1e-4)


def test_closure_runs_with_gradients_and_its_loss_is_returned():
    (param,) = parameters((3,))
    optimizer = AdamS([param], lr=0.1)
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        losses.append(loss.item())
        return loss.item()

    assert optimizer.step(closure) == losses[0]
    optimizer.step(closure)
    assert losses[1] < losses[0]
    assert optimizer.step() is None


def test_lr_tensor_and_schedulers_set_the_step_size():
    moves = {}
    for name, lr in [("float", 0.1), ("tensor", torch.tensor(0.1))]:
        param = nn.Parameter(torch.zeros(1))
        optimizer = AdamS([param], lr=lr)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        moves[name] = []
        for _ in range(3):
            before, param.grad = param.item(), torch.ones(1)
            optimizer.step()
            scheduler.step()
            moves[name].append(before - param.item())
    assert moves["float"] == pytest.approx(moves["tensor"], rel=1e-6)
    grad, m = 1.0, [0.0, 0.1, 0.19, 0.271]
    expected = [
        0.1 * 0.5**t * m[t + 1] / (0.95 * m[t] ** 2 + 0.05 * grad**2) ** 0.5 for t in range(3)
    ]
    assert moves["float"] == pytest.approx(expected, rel=1e-5)


def test_grad_scaler_unscales_and_skips_overflows():
    (param,) = parameters((4,))
    twin = nn.Parameter(param.detach().clone())
    optimizer, plain = AdamS([param]), AdamS([twin])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for overflow in (False, True, False):
        optimizer.zero_grad()
        plain.zero_grad()
        scaler.scale((param**2).sum()).backward()
        (twin**2).sum().backward()
        if overflow:
            param.grad[1] = inf
        else:
            plain.step()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 512.0
    assert_equal_state(optimizer, plain)
    assert optimizer.param_groups[0]["step"] == 2


def test_step_is_seen_by_hooks_and_profiler():
    (param,) = parameters((2,))
    optimizer = AdamS([param])
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert calls == ["pre", "post"]
    assert "Optimizer.step#AdamS.step" in {event.key for event in profile.key_averages()}


def test_step_does_not_ask_whether_there_is_a_gpu(monkeypatch):
    def ask():
        raise AssertionError("a driver is asked: with NVML, half a millisecond of each step")

    (param,) = parameters((3,))
    before = param.detach().clone()
    optimizer = AdamS([param])
    monkeypatch.setattr(torch.cuda, "is_available", ask)
    train(optimizer, 1)
    assert (param != before).all()


def test_minimizes_a_regression_in_every_dtype():
    inputs, weight = tensors((256, 8), (8, 1))
    for dtype in DTYPES:
        torch.manual_seed(0)
        model = nn.Linear(8, 1, bias=False).to(dtype)
        optimizer = AdamS(model.parameters(), lr=0.02)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=300)
        for _ in range(300):
            optimizer.zero_grad()
            ((model(inputs.to(dtype)) - (inputs @ weight).to(dtype)) ** 2).mean().backward()
            optimizer.step()
            scheduler.step()
        # bf16 stops moving where lr falls below its spacing.
        tolerance = 0.1 if dtype == torch.bfloat16 else 0.02
        assert (model.weight.detach().float() - weight.t()).abs().max() < tolerance, dtype


# Groups adopted from Megatron


# torch warns at the .grad of a non-leaf, as it does in its own optimizers.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_from_param_groups_adopts_dicts_views_and_foreign_keys():
    buffer = torch.arange(12.0)
    shard, frozen = buffer[1:6], torch.ones(3)
    leaf = nn.Parameter(torch.ones(8))
    view_of_leaf = leaf.view(-1)[2:5]  # non-leaf and requires grad, as Megatron's fp32 shards
    groups = [
        {"params": [shard, view_of_leaf], "wd_mult": 1.0, "max_lr": 0.5, "weight_decay": 0.25},
        {"params": [], "is_expert_parallel": True, "step": 7},
        {"params": [frozen]},
    ]
    optimizer = AdamS.from_param_groups(groups, lr=0.1, bias_correction=True)
    assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))
    assert groups[0] == {
        "params": [shard, view_of_leaf], "wd_mult": 1.0, "max_lr": 0.5, "weight_decay": 0.25,
        "lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "bias_correction": True,
        "adam_w_mode": True, "maximize": False, "nesterov": False, "cautious": False, "step": 0,
    }  # fmt: skip
    assert groups[1]["is_expert_parallel"] is True
    assert groups[1]["step"] == 7
    shard.grad = torch.ones(5)
    optimizer.step()
    assert groups[1]["step"] == 8
    # The shard is the buffer: 1..5 moved, by the authors' first step and by weight decay.
    moved = torch.arange(12.0) - buffer
    expected = 0.1 * (20**0.5 + 0.25 * torch.arange(1.0, 6.0))
    torch.testing.assert_close(moved[1:6], expected, rtol=1e-5, atol=1e-6)
    assert moved[0] == 0
    assert moved[6:].abs().max() == 0


def test_from_param_groups_takes_no_groups():
    optimizer = AdamS.from_param_groups([], lr=0.5)
    optimizer.step()
    assert optimizer.param_groups == []
    assert optimizer.defaults["lr"] == 0.5
    optimizer.load_state_dict(optimizer.state_dict())


def test_assigned_param_groups_are_stepped_and_reloaded():
    """What DistributedOptimizer.__init__ does (Megatron-Core 0.19.2, distrib_optimizer.py)."""
    (model_param,) = parameters((10,))
    optimizer = AdamS.from_param_groups([{"params": [model_param], "wd_mult": 1.0}])
    group = optimizer.param_groups[0]
    group["params"] = [model_param.detach().clone()[3:8]]
    optimizer.param_groups = [group]
    optimizer.load_state_dict(optimizer.state_dict())
    shard = optimizer.param_groups[0]["params"][0]
    before, shard.grad = shard.clone(), torch.ones(5)
    optimizer.step()
    assert optimizer.param_groups[0]["wd_mult"] == 1.0
    assert (shard < before).all()


def test_from_param_groups_refuses_what_the_constructor_refuses():
    (param,) = tensors((3,))
    with pytest.raises(ValueError, match=r"2 parameters, 1 of them different"):
        AdamS.from_param_groups([{"params": [param]}, {"params": [param]}])
    with pytest.raises(ValueError, match=r"eps=0"):
        AdamS.from_param_groups([{"params": [param], "eps": 0}])
    with pytest.raises(ValueError, match=r"beta2=1"):
        AdamS.from_param_groups([{"params": [param]}], betas=(0.9, 1))
    with pytest.raises(ValueError, match=r"torch.complex64"):
        AdamS.from_param_groups([{"params": [param.to(torch.complex64)]}])


# Refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lr": -1e-3}, r"^lr=-0.001: must be finite and >= 0"),
        ({"lr": nan}, r"^lr=nan: must be"),
        ({"lr": inf}, r"^lr=inf: must be"),
        ({"lr": None}, r"^lr=None: must be a number, and is a NoneType"),
        ({"lr": "1e-3"}, r"^lr='1e-3': must be a number, and is a str; give a float"),
        ({"lr": Decimal("1e-3")}, r"^lr=Decimal\('0.001'\): must be a number, and is a Decimal"),
        ({"eps": "1e-8"}, r"^eps='1e-8': must be a number, and is a str"),
        ({"weight_decay": "0.1"}, r"^weight_decay='0.1': must be a number, and is a str"),
        ({"betas": ("0.9", 0.95)}, r"^beta1='0.9': must be a number, and is a str"),
        ({"betas": (0.9, torch.tensor([0.9, 0.95]))}, r"^betas\[1\]=tensor.*one element"),
        ({"betas": (torch.tensor(1.5), 0.95)}, r"^beta1=1.5: must be in \[0, 1\)"),
        ({"lr": torch.tensor([0.1, 0.2])}, r"^lr=tensor.*one element"),
        ({"lr": torch.tensor(-1.0)}, r"^lr=-1.0: must be"),
        ({"betas": (1.0, 0.95)}, r"^beta1=1.0: must be in \[0, 1\)"),
        ({"betas": (-0.1, 0.95)}, r"^beta1=-0.1: must be in \[0, 1\)"),
        ({"betas": (nan, 0.95)}, r"^beta1=nan: must be"),
        ({"betas": (0.9, 1.0)}, r"^beta2=1.0: must be in \(0, 1\)"),
        ({"betas": (0.9, 0.0)}, r"^beta2=0.0: must be in \(0, 1\)"),
        ({"betas": (0.9, nan)}, r"^beta2=nan: must be"),
        ({"betas": 0.9}, r"^betas=0.9: must be two numbers"),
        ({"betas": (0.9, 0.95, 0.99)}, r"^betas=\(0.9, 0.95, 0.99\): must be two numbers"),
        ({"eps": 0.0}, r"^eps=0.0: must be finite and >= 2\*\*-63"),
        ({"eps": -1e-8}, r"^eps=-1e-08: must be"),
        ({"eps": 1e-50}, r"^eps=1e-50: must be"),
        ({"eps": nan}, r"^eps=nan: must be"),
        ({"eps": inf}, r"^eps=inf: must be"),
        ({"weight_decay": -0.1}, r"^weight_decay=-0.1: must be finite and >= 0"),
        ({"weight_decay": nan}, r"^weight_decay=nan: must be"),
    ],
)
def test_bad_hyperparameters_are_named_wherever_they_stand(arguments, words):
    params = parameters((2,), (2,))
    with pytest.raises(ValueError, match=words):
        AdamS(params, **arguments)
    with pytest.raises(ValueError, match=words):
        AdamS([{"params": params, **arguments}])
    optimizer = AdamS(params[:1])
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": params[1:], **arguments})
    assert len(optimizer.param_groups) == 1
    # A default that no group takes is checked all the same.
    valid = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    with pytest.raises(ValueError, match=words):
        AdamS([{"params": params, **valid}], **arguments)


def test_zero_gradients_at_the_smallest_eps_give_no_nan():
    for dtype in DTYPES:
        (param,) = parameters((3,), dtype=dtype)
        before = param.detach().clone()
        optimizer = AdamS([param], eps=2.0**-63)
        param.grad = torch.zeros_like(param)
        optimizer.step()
        assert torch.equal(param, before)


@pytest.mark.parametrize(
    ("name", "value", "default"),
    [
        ("amsgrad", True, False),
        ("differentiable", True, False),
        ("exp_avg_sq_dtype", torch.float16, torch.float32),
        ("set_grad_none", True, None),
    ],
)
def test_unsupported_arguments_are_refused_and_their_defaults_taken(name, value, default):
    params = parameters((2,))
    words = f"^{name}={value}: must be {default}, as .*; "
    with pytest.raises(ValueError, match=words):
        AdamS(params, **{name: value})
    with pytest.raises(ValueError, match=words):
        AdamS([{"params": params, name: value}])
    AdamS(params, **{name: default})
    AdamS([{"params": params, name: default}])


def test_every_argument_of_fused_adam_is_taken_at_its_default():
    """TransformerEngine 2.20, FusedAdam.__init__."""
    AdamS(
        parameters((2,)), 1e-3, (0.9, 0.95), 1e-8, 0.0, amsgrad=False, bias_correction=True,
        adam_w_mode=True, capturable=False, master_weights=False,
        master_weight_dtype=torch.float32, exp_avg_dtype=torch.float32,
        exp_avg_sq_dtype=torch.float32, use_decoupled_grad=False, store_param_remainders=False,
        set_grad_none=None,
    )  # fmt: skip


def test_sparse_gradient_is_refused_before_anything_moves():
    embedding = nn.Embedding(5, 2, sparse=True)
    (dense,) = parameters((3,))
    optimizer = AdamS([dense, *embedding.parameters()])
    before = dense.detach().clone()
    embedding(torch.tensor([1])).sum().backward()
    dense.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"gradient .*sparse_coo.*must be dense.*sparse=False"):
        optimizer.step()
    assert torch.equal(dense, before)
    assert optimizer.param_groups[0]["step"] == 0


@pytest.mark.parametrize(
    ("param", "words"),
    [
        (torch.zeros(2, dtype=torch.complex64), r"parameter .*torch.complex64.*view_as_real"),
        (torch.zeros(2, dtype=torch.int64), r"parameter .*dtype=torch.int64: must be one of"),
        (torch.eye(2).to_sparse(), r"parameter .*sparse_coo: must be dense"),
    ],
)
def test_complex_integer_and_sparse_params_are_refused(param, words):
    with pytest.raises(ValueError, match=words):
        AdamS([param])
    optimizer = AdamS(parameters((2,)))
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": [param]})
    assert len(optimizer.param_groups) == 1


def test_complex_gradient_is_refused():
    (param,) = tensors((2,))
    optimizer = AdamS.from_param_groups([{"params": [param]}])
    # As Megatron: params exchanged after construction, so that the constructor's check saw others.
    complex_param = torch.zeros(2, dtype=torch.complex64)
    complex_param.grad = torch.ones(2, dtype=torch.complex64)
    optimizer.param_groups[0]["params"] = [complex_param]
    with pytest.raises(ValueError, match=r"gradient .*torch.complex64"):
        optimizer.step()


# Checkpoints


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias_correction", [False, True])
def test_resumed_run_equals_uninterrupted_run_bit_for_bit(dtype, bias_correction):
    def build():
        first, second = parameters((5, 3), (4,), dtype=dtype)
        groups = [{"params": [first]}, {"params": [second], "weight_decay": 0.3}]
        return AdamS(groups, lr=0.01, bias_correction=bias_correction)

    uninterrupted, stopped, resumed = build(), build(), build()
    train(uninterrupted, 7)
    train(stopped, 4)
    with torch.no_grad():
        for group, other in zip(resumed.param_groups, stopped.param_groups, strict=True):
            for param, twin in zip(group["params"], other["params"], strict=True):
                param.copy_(twin)
    resumed.load_state_dict(saved(stopped))
    assert_equal_state(resumed, stopped)
    train(resumed, 3, first_seed=5)
    assert_equal_state(resumed, uninterrupted)
    assert resumed.param_groups[0]["step"] == 7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)
def test_copies_continue_alike_and_apart(dtype, duplicate):
    optimizer = AdamS(parameters((5,), dtype=dtype), lr=0.01, bias_correction=True)
    train(optimizer, 3)
    twin = duplicate(optimizer)
    before = copy.deepcopy(twin.param_groups[0]["params"][0])
    train(optimizer, 2, first_seed=4)
    assert torch.equal(before, twin.param_groups[0]["params"][0])
    train(twin, 2, first_seed=4)
    assert_equal_state(optimizer, twin)


def test_unpickled_optimizer_has_every_attribute_of_the_one_pickled():
    ours, adam = AdamS(parameters((5,))), torch.optim.AdamW(parameters((5,)))
    copies = [pickle.loads(pickle.dumps(optimizer)) for optimizer in (ours, adam)]
    # Torch leaves one of its own out.
    lost = vars(adam).keys() - vars(copies[1]).keys()
    assert vars(ours).keys() - lost == vars(copies[0]).keys()


def test_pickle_of_an_earlier_version_goes_on():
    """It names the class by the module that had it, and carries more attributes."""
    optimizer = AdamS(parameters((5,)), lr=0.01, bias_correction=True)
    train(optimizer, 2)
    named = pickle.loads(b"cmegatron_adams.optimizer\nAdamS\n.")
    assert named is AdamS
    twin = named.__new__(named)
    more = {"_plans": {}, "_guards": None, "_is_counted": False, "_begun": None}
    twin.__setstate__({**copy.deepcopy(optimizer.__getstate__()), **more})
    for each in (optimizer, twin):
        train(each, 2, first_seed=3)
    assert_equal_state(optimizer, twin)


def test_load_keeps_exp_avg_of_fp32_for_bf16_params_in_user_hooks_too():
    optimizer, other = (AdamS(parameters((5,), dtype=torch.bfloat16)) for _ in range(2))
    train(optimizer, 1)
    exp_avg = optimizer.state_dict()["state"][0]["exp_avg"]
    seen = []

    def convert(_, state_dict):
        """A pre-hook that turns a foreign state into ours runs before it is checked."""
        state = {"exp_avg": state_dict["state"][0]["momentum_buffer"]}
        return {**state_dict, "state": {0: state}}

    other.register_load_state_dict_pre_hook(convert)
    other.register_load_state_dict_post_hook(
        lambda o: seen.append(o.state[o.param_groups[0]["params"][0]]["exp_avg"])
    )
    foreign = {**optimizer.state_dict(), "state": {0: {"momentum_buffer": exp_avg.clone()}}}
    other.load_state_dict(foreign)
    assert torch.equal(seen[0], exp_avg)
    # Hooks of load_state_dict's own are gone: a second load works the same.
    other.load_state_dict(foreign)
    assert len(other._optimizer_load_state_dict_pre_hooks) == 1
    assert len(other._optimizer_load_state_dict_post_hooks) == 1


@pytest.mark.parametrize("adam", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_checkpoint_is_refused_and_nothing_loaded(adam, steps, amsgrad):
    stranger = adam(parameters((3,)), lr=0.5, amsgrad=amsgrad)
    train(stranger, steps)
    optimizer = AdamS(parameters((3,)), lr=0.25)
    train(optimizer, 1)
    before = copy.deepcopy(optimizer)
    with pytest.raises(ValueError, match=r"written by Adam .*weights only.*--no-load-optim"):
        optimizer.load_state_dict(saved(stranger))
    assert_equal_state(optimizer, before)


@pytest.mark.parametrize("key", ["exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"])
def test_unknown_state_is_refused_by_name(key):
    optimizer = AdamS(parameters((3,)))
    train(optimizer, 1)
    state_dict = saved(optimizer)
    state_dict["state"][0][key] = torch.zeros(3)
    with pytest.raises(ValueError, match=rf"the state of parameter 0 has \['{key}'\]"):
        optimizer.load_state_dict(state_dict)


def test_megatrons_step_beside_exp_avg_is_dropped():
    """DistributedOptimizer writes it into the live state where it sees neither TE nor Apex."""
    optimizer = AdamS(parameters((3,), (2,)))
    train(optimizer, 4)
    state_dict = optimizer.state_dict()
    for state in state_dict["state"].values():
        state["step"] = torch.tensor(4.0)
    for group in state_dict["param_groups"]:
        group["step"] = 4.0
    optimizer.load_state_dict(state_dict)
    assert [state.keys() for state in optimizer.state.values()] == [{"exp_avg"}] * 2
    assert optimizer.param_groups[0]["step"] == 4
    assert type(optimizer.param_groups[0]["step"]) is int


def test_step_beside_exp_avg_is_used_where_the_group_has_none():
    first, second = parameters((3,), (2,))
    optimizer = AdamS([{"params": [first]}, {"params": [second]}, {"params": []}])
    first.grad = torch.ones(3)
    for _ in range(4):
        optimizer.step()
    state_dict = saved(optimizer)
    state_dict["state"][0]["step"] = torch.tensor(4.0)
    for group in state_dict["param_groups"]:
        del group["step"]
    optimizer.load_state_dict(state_dict)
    assert [group["step"] for group in optimizer.param_groups] == [4, 4, 4]
    del state_dict["state"][0]["step"]
    with pytest.raises(ValueError, match=r"param group 0 .*no 'step'"):
        optimizer.load_state_dict(state_dict)


def test_missing_hyperparameters_keep_current_values_and_bad_ones_are_refused():
    (param,) = parameters((3,))
    optimizer = AdamS([param], bias_correction=True, eps=1e-6)
    train(optimizer, 1)
    state_dict = saved(optimizer)
    group = state_dict["param_groups"][0]
    del group["bias_correction"], group["eps"]
    group["lr"], group["foreign"] = 0.125, "kept"
    optimizer.load_state_dict(state_dict)
    loaded = optimizer.param_groups[0]
    assert (loaded["bias_correction"], loaded["eps"]) == (True, 1e-6)
    assert (loaded["lr"], loaded["foreign"]) == (0.125, "kept")
    assert "bias_correction" not in group  # the caller's dict stays as it was
    group["betas"] = (0.9, 1.5)
    with pytest.raises(ValueError, match=r"beta2=1.5"):
        optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)


def test_groups_of_transformer_engines_adam_are_refused():
    # They have the names of ours but one, and Megatron hands on no exp_avg_sq.
    optimizer = AdamS(parameters((3,)))
    train(optimizer, 1)
    state_dict = saved(optimizer)
    del state_dict["param_groups"][0]["adam_w_mode"]
    with pytest.raises(ValueError, match=r"written by Adam .*adam_w_mode"):
        optimizer.load_state_dict(state_dict)


def test_checkpoint_of_another_model_is_refused():
    optimizer = AdamS(parameters((3, 2)))
    train(optimizer, 1)
    with pytest.raises(ValueError, match=r"shape \(3, 2\) in the checkpoint: .*\(2, 3\)"):
        AdamS(parameters((2, 3))).load_state_dict(saved(optimizer))
    with pytest.raises(ValueError, match="size of optimizer's group"):
        AdamS(parameters((3, 2), (1,))).load_state_dict(saved(optimizer))
    with pytest.raises(ValueError, match="different number of parameter groups"):
        AdamS([{"params": [p]} for p in parameters((3, 2), (1,))]).load_state_dict(saved(optimizer))


def test_state_dict_names_what_is_saved_and_nothing_else():
    optimizer = AdamS(parameters((3,)))
    train(optimizer, 1)
    state_dict = optimizer.state_dict()
    assert state_dict["state"].keys() == {0}
    assert state_dict["state"][0].keys() == {"exp_avg"}
    assert state_dict["param_groups"] == [
        {
            "params": [0], "lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0,
            "bias_correction": False, "adam_w_mode": True, "maximize": False, "nesterov": False,
            "cautious": False, "step": 1,
        }
    ]  # fmt: skip
    elements = sum(s["exp_avg"].numel() for s in state_dict["state"].values())
    assert elements == 3


def plain_types(group):
    values = [value for name, value in group.items() if name not in ("params", "betas")]
    return {type(value) for value in (*values, *group["betas"])}


def test_numpy_numbers_become_pythons_and_load_with_weights_only():
    numbers = {"lr": np.float32(1e-3), "betas": [np.float64(0.9), np.float32(0.95)]}
    numbers |= {"bias_correction": np.True_, "maximize": np.False_}
    others = {"eps": np.float64(1e-8), "weight_decay": np.int64(0), "wd_mult": np.float64(2.0)}
    params = parameters((2,), (3,), (4,))
    optimizer = AdamS(params[:1], **numbers)
    optimizer.add_param_group({"params": params[1:2], **numbers, **others})
    adopted = AdamS.from_param_groups([{"params": params[2:], **numbers, **others}])
    for group in (*optimizer.param_groups, *adopted.param_groups, optimizer.defaults):
        assert plain_types(group) <= {int, float, bool}
        assert group["lr"] == np.float32(1e-3) and group["betas"] == (0.9, np.float32(0.95))
    # As schedulers that compute with NumPy set it.
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: np.float64(0.5) ** step)
    train(optimizer, 1)
    scheduler.step()
    assert type(optimizer.param_groups[0]["lr"]) is np.float64
    loaded = saved(optimizer)["param_groups"]
    assert loaded[0]["lr"] == 0.5 * np.float32(1e-3)
    for group in loaded:
        assert plain_types(group) <= {int, float, bool}


def test_tensors_as_betas_are_read_once_as_in_torch():
    betas = (torch.tensor(0.9, dtype=torch.float64), torch.tensor([0.95], dtype=torch.float64))
    with_tensors, plain = AdamS(parameters((3,)), betas=betas), AdamS(parameters((3,)))
    assert with_tensors.param_groups[0]["betas"] == (0.9, 0.95)
    with_tensors.add_param_group({"params": parameters((2,)), "betas": betas})
    assert with_tensors.param_groups[1]["betas"] == (0.9, 0.95)
    train(with_tensors, 2)
    train(plain, 2)
    assert torch.equal(
        with_tensors.param_groups[0]["params"][0], plain.param_groups[0]["params"][0]
    )
    saved_groups = saved(with_tensors)
    saved_groups["param_groups"][0]["betas"] = betas
    with_tensors.load_state_dict(saved_groups)
    assert with_tensors.param_groups[0]["betas"] == (0.9, 0.95)
