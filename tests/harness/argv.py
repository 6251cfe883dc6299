"""Flags that several test modules give to Megatron, and what it prints of them."""

import re
from pathlib import Path

ADAMS = "--optimizer adams"
DISTRIBUTED = f"{ADAMS} --use-distributed-optimizer"
RESHARDABLE = f"{DISTRIBUTED} --dist-ckpt-optim-fully-reshardable"
AWARE = f"{DISTRIBUTED} --use-precision-aware-optimizer"

TP2 = "--tensor-model-parallel-size 2"
MOE = "--num-experts 4 --moe-router-topk 2 --swiglu --moe-token-dispatcher-type alltoall "
EP2 = f"{MOE} --disable-bias-linear --expert-model-parallel-size 2"

FP32_GRADS = "--accumulate-allreduce-grads-in-fp32"
# Of five steps some are clipped, and some are not.
CLIPPED = "--clip-grad 1.7"
# Sums of squares differ in their order where shards differ, and the clip coefficient with them.
UNCLIPPED = "--clip-grad 0"
# The loss scale overflows at first and grows soon: steps are skipped before the save, and a run
# that forgot its scale would skip them again.
FP16_SKIPPING = "--fp16 --initial-loss-scale 1048576 --hysteresis 1 --loss-scale-window 2"
# The loss scale grows with every step, until one overflows.
FP16_GROWING = "--fp16 --initial-loss-scale 262144 --loss-scale-window 1 --hysteresis 1"
# The loss scale stays.
FP16 = f"--fp16 {FP32_GRADS} --initial-loss-scale 1024"

# A run with a checkpoint in the middle and one at the end.
NUM_STEPS, SAVED_AT = 6, 3
STEPS = f"--train-iters {NUM_STEPS} --save-interval {SAVED_AT}"

# Each way in which a checkpoint is saved and loaded; for two ranks.
FAMILIES = {
    "dp2": DISTRIBUTED,
    "dp2_bf16_overlap": f"{DISTRIBUTED} --bf16 --overlap-grad-reduce --overlap-param-gather",
    "dp2_fp16": f"{DISTRIBUTED} {FP16_SKIPPING}",
    "dp2_bias_correction": f"{DISTRIBUTED} --adams-bias-correction",
    "tp2_bf16_fully_reshardable": f"{RESHARDABLE} --bf16 {TP2}",
    "pp2_fully_reshardable": f"{RESHARDABLE} --pipeline-model-parallel-size 2",
    "ep2": f"{DISTRIBUTED} {EP2}",
    "dp2_legacy": f"{DISTRIBUTED} --ckpt-format torch",
    "plain": ADAMS,
    "plain_bf16": f"{ADAMS} --bf16",
    "plain_legacy": f"{ADAMS} --ckpt-format torch",
}

# The precision-aware optimizer's flags, and the bytes of state that a parameter has.
MODES = {
    "remainder": ("--bf16", 6),
    "master": ("--bf16 --adams-no-param-remainders", 8),
    "remainder_m16": ("--bf16 --exp-avg-dtype bf16", 4),
    "g16_remainder_m16": ("--bf16 --main-grads-dtype bf16 --exp-avg-dtype bf16", 4),
    "remainder_m8": ("--bf16 --exp-avg-dtype fp8", 3),
    "w16_m16": ("--bf16 --main-params-dtype fp16 --exp-avg-dtype fp16", 4),
    "fp16": (f"{FP16} --exp-avg-dtype bf16", 6),
    "fp16_w16_m8": (f"{FP16} --main-params-dtype fp16 --exp-avg-dtype fp8", 3),
    "fp32_m16": ("--exp-avg-dtype bf16", 2),
}


def choose(root: Path, step: int) -> str:
    """The flag that resumes from a checkpoint in the middle; --ckpt-step has tests of its own."""
    (root / "latest_checkpointed_iteration.txt").write_text(str(step))
    return f"--load {root}"


def folder_of(root: Path, step: int) -> str:
    """The folder of one checkpoint."""
    return str(root / f"iter_{step:07d}")


def printed_arguments(log: str) -> dict[str, str]:
    """Megatron's argument dump: name -> text."""
    dump = log.partition("- arguments -")[2].partition("- end of arguments -")[0]
    return dict(re.findall(r"^ +(\w+) \.+ (.*)$", dump, re.MULTILINE))
