"""The bytes that a real bf16 Megatron step moves, counted by benchmarks/traffic.py."""

READ, WRITTEN = False, True


def test_bf16_step_moves_22_bytes_a_parameter_and_the_norm_4(cluster):
    (counted,) = cluster.run("tests.distributed.traffic_cases:count", optimizer="adams").results
    # No pass of Megatron's own, and no temporary tensor; the gradients are read twice.
    assert counted["bytes"] == {
        ("norm", "main_grad", READ): 4,
        ("update", "main_grad", READ): 4,
        ("update", "main param", READ): 4,
        ("update", "main param", WRITTEN): 4,
        ("update", "exp_avg", READ): 4,
        ("update", "exp_avg", WRITTEN): 4,
        ("update", "model param", WRITTEN): 2,
    }
    assert counted["total"] == counted["derived"] == 22
    assert counted["params_are_unread"] and counted["grads_are_unwritten"]


CASE = "tests.distributed.traffic_cases:count"


def test_logging_the_update_rms_moves_no_byte_more(cluster):
    (plain,) = cluster.run(CASE, optimizer="adams").results
    (logged,) = cluster.run(CASE, optimizer="adams", more_flags="--log-interval 1").results
    assert logged["bytes"] == plain["bytes"]


def test_a_cap_or_a_target_reads_gradients_and_exp_avg_once_more(cluster):
    (plain,) = cluster.run(CASE, optimizer="adams").results
    for flags in ("--adams-max-update-rms 0.1", "--adams-match-rms 0.2"):
        (counted,) = cluster.run(CASE, optimizer="adams", more_flags=flags).results
        assert counted["bytes"] == plain["bytes"] | {
            ("update RMS", "main_grad", READ): 4,
            ("update RMS", "exp_avg", READ): 4,
        }
        assert counted["total"] == counted["derived_of_guarded"] == 30
        assert counted["params_are_unread"] and counted["grads_are_unwritten"]


def test_counter_sees_the_passes_of_stock_megatron(cluster):
    (counted,) = cluster.run("tests.distributed.traffic_cases:count", optimizer="adam").results
    moved = {
        kind: {
            (tensor, is_write): value
            for (of, tensor, is_write), value in counted["bytes"].items()
            if of == kind and tensor != "temporaries"
        }
        for kind in ("norm", "clip", "copy", "elsewhere")
    }
    assert moved == {
        "norm": {("main_grad", READ): 4},
        "clip": {("main_grad", READ): 4, ("main_grad", WRITTEN): 4},
        "copy": {("main param", READ): 4, ("model param", WRITTEN): 2},
        "elsewhere": {},
    }
    derived = counted["derived_of_fused_adam"]
    assert derived == {"norm": 4, "clip": 8, "update": 28, "copy": 6}
    assert all(sum(moved[kind].values()) == derived[kind] for kind in ("norm", "clip", "copy"))
    # torch's update makes more passes than a fused kernel over the same tensors.
    update = {
        (tensor, is_write)
        for kind, tensor, is_write in counted["bytes"]
        if kind == "update" and tensor != "temporaries"
    }
    assert update == {("main_grad", READ)} | {
        (tensor, is_write)
        for tensor in ("main param", "exp_avg", "exp_avg_sq")
        for is_write in (READ, WRITTEN)
    }
    assert not counted["grads_are_unwritten"]
