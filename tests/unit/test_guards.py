"""AdamS's update RMS, its cap and its target, against float64 NumPy and against a step without."""

import copy
import pickle

import numpy as np
import pytest
import torch

from megatron_adams import kernels
from megatron_adams.optimizer import AdamS

KERNELS = ["host", "foreach"]
LR, BETA1, BETA2, EPS, DECAY = 0.01, 0.9, 0.95, 1e-8, 0.1
SIZES = ((300, 70), (17,), (1,), (5000,))


def params_and_grads(steps=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(size, generator=generator) for size in SIZES]
    # Unlike RMS: an exp_avg of one sign makes large updates.
    offsets = (0.0, 3.0, 0.0, 0.3)
    grads = [
        [torch.randn(size, generator=generator) + o for size, o in zip(SIZES, offsets, strict=True)]
        for _ in range(steps)
    ]
    return params, grads


def build(params, **kwargs):
    return AdamS(params, lr=LR, weight_decay=DECAY, **kwargs)


def run_steps(optimizer, params, grads, **kwargs):
    for step_grads in grads:
        for param, grad in zip(params, step_grads, strict=True):
            param.grad = grad.clone()
        optimizer.step(**kwargs)


def reference(params, grads, factor_of=lambda rms: 1.0):
    """The steps in float64; the params after them, and the RMS of each in the last one."""
    p = [param.double().numpy().copy() for param in params]
    m = [np.zeros_like(x) for x in p]
    for step_grads in grads:
        rms = []
        for i, grad in enumerate(step_grads):
            g = grad.double().numpy()
            v = BETA2 * m[i] ** 2 + (1 - BETA2) * g**2
            m[i] = BETA1 * m[i] + (1 - BETA1) * g
            u = m[i] / (np.sqrt(v) + EPS)
            rms.append(np.sqrt(np.mean(u**2)))
            p[i] -= LR * (u * factor_of(rms[-1]) + DECAY * p[i])
    return p, rms


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("guard", "factor_of"),
    [
        ({"max_update_rms": 0.71}, lambda rms: min(1, 0.71 / rms)),
        ({"match_update_rms": 0.25}, lambda rms: 0.25 / rms),
        ({}, lambda rms: 1.0),
    ],
    ids=["cap", "match", "log"],
)
def test_steps_are_those_of_float64(kernel, guard, factor_of):
    params, grads = params_and_grads(steps=5)
    want, rms = reference(params, grads, factor_of)
    optimizer = build(params, kernel=kernel, **guard)
    optimizer.wants_update_rms = not guard
    run_steps(optimizer, params, grads)
    for param, expected in zip(params, want, strict=True):
        np.testing.assert_allclose(param.numpy(), expected, atol=1e-6, rtol=1e-6)
    # The resolution of a mean square is 2^-21.
    np.testing.assert_allclose(optimizer.update_rms().numpy(), rms, rtol=2e-5)
    factors = optimizer.update_factors().numpy()
    np.testing.assert_allclose(factors, [factor_of(x) for x in rms], rtol=2e-5)
    if "max_update_rms" in guard:
        assert 0 < (factors < 1).sum() < len(factors), "a cap for some of them"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "storage",
    [
        {},
        {"master_weights": True, "store_param_remainders": True, "exp_avg_dtype": torch.bfloat16},
        {
            "master_weights": True,
            "master_weight_dtype": torch.float16,
            "exp_avg_dtype": torch.float16,
        },
    ],
    ids=["fp32", "remainders", "scaled"],
)
def test_counting_and_a_cap_that_never_bites_change_no_bit(kernel, storage):
    dtype = torch.bfloat16 if storage else torch.float32
    results = []
    for guard in (None, "max_update_rms", "wants_update_rms"):
        params, grads = params_and_grads(steps=3)
        params = [param.to(dtype) for param in params]
        options = {guard: 50.0} if guard == "max_update_rms" else {}
        optimizer = build(params, kernel=kernel, **storage, **options)
        optimizer.wants_update_rms = guard == "wants_update_rms"
        run_steps(optimizer, params, [[g.to(dtype) for g in step] for step in grads])
        if guard is not None:
            assert (optimizer.update_rms() > 0.1).all()
        state = [optimizer.get_unscaled_state(param, "exp_avg") for param in params]
        main = [optimizer.get_unscaled_state(param, "master_param") for param in params]
        results.append([*params, *state, *main])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("storage", [{}, {"exp_avg_dtype": torch.float16}])
def test_kernels_give_the_same_bits(storage):
    results = []
    for kernel in KERNELS:
        params, grads = params_and_grads(steps=3)
        optimizer = build(params, kernel=kernel, match_update_rms=0.2, **storage)
        run_steps(optimizer, params, grads, grad_scale=0.3)
        results.append([*params, optimizer.update_rms(), optimizer.update_sums()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_counted_is_of_the_last_step_and_of_no_other():
    params, grads = params_and_grads(steps=3)
    optimizer = build(params)
    with pytest.raises(ValueError, match="set wants_update_rms = True before"):
        optimizer.update_rms()
    optimizer.wants_update_rms = True
    run_steps(optimizer, params, grads[:2])
    _, rms = reference(params_and_grads(steps=3)[0], grads[:2])
    np.testing.assert_allclose(optimizer.update_rms().numpy(), rms, rtol=2e-5)
    optimizer.wants_update_rms = False
    run_steps(optimizer, params, grads[2:])
    for read in (optimizer.update_rms, optimizer.update_sums, optimizer.update_factors):
        with pytest.raises(ValueError, match="did not count"):
            read()


@pytest.mark.parametrize("kernel", KERNELS)
def test_params_without_gradients_and_skipped_steps_have_no_rms(kernel):
    for guard in ({"match_update_rms": 0.1}, {}):
        params, (grads,) = params_and_grads()
        optimizer = build(params, kernel=kernel, **guard)
        optimizer.wants_update_rms = True
        before = [param.clone() for param in params]
        params[0].grad, params[3].grad = grads[0].clone(), grads[3].clone()
        optimizer.step(found_inf=torch.ones(1))
        assert optimizer.update_rms().tolist() == [0, 0, 0, 0]
        assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
        optimizer.step()
        assert (optimizer.update_rms() > 0).tolist() == [True, False, False, True]


def test_a_nan_in_one_param_leaves_the_others_as_they_are():
    params, (grads,) = params_and_grads()
    grads[1][3] = float("nan")
    optimizer = build(params, max_update_rms=0.3)
    run_steps(optimizer, params, [grads])
    assert optimizer.update_rms().isnan().tolist() == [False, True, False, False]
    assert optimizer.update_factors()[1] == 1
    assert params[1].isnan().sum() == 1
    assert all(params[i].isfinite().all() for i in (0, 2, 3))


@pytest.mark.parametrize("guard", [{"match_update_rms": 0.2}, {}])
def test_shards_have_the_bits_of_the_whole_where_their_owner_adds_up_the_sums(guard):
    params, grads = params_and_grads(steps=3)
    optimizer = build(params, **guard)
    optimizer.wants_update_rms = True
    run_steps(optimizer, params, grads)
    whole = [param.view(-1) for param in params]
    rms = optimizer.update_rms()

    # As two ranks: the second has the end of the first param, and all of the last.
    params, grads = params_and_grads(steps=3)
    cut = 12_345
    shards = [
        [params[0].view(-1)[:cut], params[1], params[2]],
        [params[0].view(-1)[cut:], params[3]],
    ]
    parts = [
        [[g[0].view(-1)[:cut], g[1], g[2]] for g in grads],
        [[g[0].view(-1)[cut:], g[3]] for g in grads],
    ]
    optimizers = [build(part, **guard) for part in shards]
    for optimizer, part in zip(optimizers, shards, strict=True):
        optimizer.wants_update_rms = True
        optimizer.whole_numels = {part[0]: params[0].numel()}

    def other_rank_counts(sums):
        # The other rank's, at the same step.
        clone = copy.deepcopy(optimizers[1])
        clone.max_update_rms = clone.match_update_rms = None
        clone.wants_update_rms = True
        for param, grad in zip(clone.param_groups[0]["params"], parts[1][step], strict=True):
            param.grad = grad.clone()
        clone.step()
        sums[0] += clone.update_sums()[0]

    calls = []
    for step in range(3):
        optimizers[0].reduce_update_sums = lambda sums: (calls.append(1), other_rank_counts(sums))
        for param, grad in zip(shards[0], parts[0][step], strict=True):
            param.grad = grad.clone()
        before = copy.deepcopy(optimizers[0])
        optimizers[0].step()
        rms_of_first = optimizers[0].update_rms()

        def first_rank_counts(sums, before=before, step=step):
            before.max_update_rms = before.match_update_rms = None
            before.wants_update_rms = True
            for param, grad in zip(before.param_groups[0]["params"], parts[0][step], strict=True):
                param.grad = grad.clone()
            before.step()
            sums[0] += before.update_sums()[0]

        optimizers[1].reduce_update_sums = first_rank_counts
        for param, grad in zip(shards[1], parts[1][step], strict=True):
            param.grad = grad.clone()
        optimizers[1].step()
    assert len(calls) == 3, "once a step"
    for param, expected in zip(params, whole, strict=True):
        assert torch.equal(param.view(-1), expected)
    assert torch.equal(rms_of_first, rms[:3])


def test_reduction_is_called_where_there_are_no_params():
    for guard in ({"max_update_rms": 1.0}, {}):
        optimizer = AdamS.from_param_groups([{"params": []}], **guard)
        optimizer.wants_update_rms = True
        shapes = []
        optimizer.reduce_update_sums = lambda sums, shapes=shapes: shapes.append(sums.shape)
        optimizer.step()
        assert optimizer.update_rms().shape == optimizer.update_factors().shape == (0,)
        assert shapes == [(0, 2)]


def test_guards_are_no_state_and_a_resumed_run_has_the_same_bits():
    params, grads = params_and_grads(steps=4)
    optimizer = build(params, match_update_rms=0.2)
    run_steps(optimizer, params, grads[:2])
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"][0].keys() == {"exp_avg"}
    assert saved["param_groups"][0].keys() == build(params).state_dict()["param_groups"][0].keys()
    resumed = [param.clone() for param in params]
    run_steps(optimizer, params, grads[2:])
    other = build(resumed, match_update_rms=0.2)
    other.load_state_dict(saved)
    run_steps(other, resumed, grads[2:])
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))


def test_params_that_come_later_are_guarded_too():
    params, (grads,) = params_and_grads()
    optimizer = build(params[:2], match_update_rms=0.2)
    run_steps(optimizer, params[:2], [grads[:2]])
    optimizer.add_param_group({"params": params[2:]})
    for param, grad in zip(params[2:], grads[2:], strict=True):
        param.grad = grad
    # No tensor of the first group has moved, but what its updates are counted in has.
    optimizer.step()
    assert (optimizer.update_rms() > 0).all()
    assert optimizer.update_factors().numpy() == pytest.approx(0.2 / optimizer.update_rms().numpy())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_guarded(copied):
    params, grads = params_and_grads(steps=2)
    optimizer = build(params, max_update_rms=0.4)
    optimizer.reduce_update_sums = lambda sums: None
    run_steps(optimizer, params, grads[:1])
    other = copied(optimizer)
    assert other.reduce_update_sums is None and other.max_update_rms == 0.4
    run_steps(optimizer, params, grads[1:])
    run_steps(other, other.param_groups[0]["params"], grads[1:])
    for a, b in zip(params, other.param_groups[0]["params"], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["max_update_rms", "match_update_rms"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_bounds_that_are_none_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}: must be finite and > 0; leave it out"):
        build([torch.zeros(1)], **{name: value})


@pytest.mark.parametrize("name", ["max_update_rms", "match_update_rms"])
def test_bounds_that_are_no_numbers_are_refused_by_their_type(name):
    with pytest.raises(ValueError, match=f"{name}='0.2': must be a number, and is a str"):
        build([torch.zeros(1)], **{name: "0.2"})


def test_cap_and_target_together_are_refused():
    message = "max_update_rms=1.0, match_update_rms=0.2: must be one of the two.*leave one out"
    with pytest.raises(ValueError, match=message):
        build([torch.zeros(1)], max_update_rms=1.0, match_update_rms=0.2)


def test_guarded_kernels_are_compiled_before_the_first_step(monkeypatch):
    import megatron_adams.optimizer.adams as module

    asked = []
    monkeypatch.setattr(module, "select_backend", lambda _, mode, __: asked.append(mode.name))
    build([torch.zeros(1)]).compile_kernels()
    build([torch.zeros(1)], max_update_rms=1.0).compile_kernels()
    assert asked == ["g32-p32-m32-w0", "g32-p32-m32-w0-rms"]


def test_kernels_of_steps_that_count_are_compiled_before_the_first_too():
    kernels.select_backend.cache_clear()
    for options in ({}, {"match_update_rms": 0.2}):
        param = torch.zeros(3)
        optimizer = build([param], **options)
        optimizer.compile_kernels(counts_updates=True)
        num_compiled = kernels.select_backend.cache_info().misses
        param.grad = torch.ones(3)
        for wants in (False, True):
            optimizer.wants_update_rms = wants
            optimizer.step()
        assert kernels.select_backend.cache_info().misses == num_compiled


def test_fp64_params_are_capped():
    param = torch.ones(10, dtype=torch.float64)
    optimizer = build([param], match_update_rms=0.5)
    param.grad = torch.ones_like(param)
    optimizer.step()
    # The first update is 0.447 everywhere.
    np.testing.assert_allclose(param.numpy(), 1 - LR * (0.5 + DECAY), rtol=1e-6)
