"""The real TransformerEngine: quantized params in the step, and FP8 training of a small GPT.

tests/distributed/test_transformer_engine.py shows the plugin's part with a stand-in.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformer_engine", reason="not run: TransformerEngine is not installed")

from tests.kernels.quantized import STEPS, check_steps, take_steps

ROOT = Path(__file__).parents[2]
# The first architecture with kernels for a recipe, as (major, minor).
NEEDED = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}


def skip_without(recipe):
    if torch.cuda.get_device_capability() < NEEDED[recipe]:
        pytest.skip(f"not run: {recipe} needs a GPU of compute capability {NEEDED[recipe]}")


@pytest.mark.parametrize("kind", STEPS)
def test_step_quantizes_its_master_weights(kind):
    recipe = STEPS[kind]["recipe"]
    skip_without(recipe)
    check_steps(take_steps(**STEPS[kind], device="cuda"), recipe)


GPT = (
    "--num-layers 2 --hidden-size 128 --num-attention-heads 4 --seq-length 64 --bf16 "
    "--max-position-embeddings 64 --micro-batch-size 4 --global-batch-size 8 --lr 1e-3 "
    "--lr-decay-style constant --weight-decay 0.1 --clip-grad 1.0 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 32 "
    "--log-interval 1 --eval-iters 0 --eval-interval 1000 --save-interval 10 --num-workers 0 "
    "--attention-dropout 0 --hidden-dropout 0 --transformer-impl transformer_engine "
    "--optimizer adams --use-distributed-optimizer --train-iters 20"
)
AWARE = "--use-precision-aware-optimizer --exp-avg-dtype bf16"
FP8 = "--fp8-format hybrid --fp8-param-gather"
RUNS = {
    "delayed": f"{FP8} --fp8-recipe delayed",
    "delayed_aware": f"{FP8} --fp8-recipe delayed {AWARE}",
    "tensorwise": f"{FP8} --fp8-recipe tensorwise",
    "blockwise_aware": f"{FP8} --fp8-recipe blockwise {AWARE}",
    "mxfp8": f"{FP8} --fp8-recipe mxfp8 --reuse-grad-buf-for-mxfp8-param-ag --overlap-grad-reduce "
    "--overlap-param-gather",
}


def losses_of(flags):
    """Return the loss of each step of a run on one GPU, from Megatron's log."""
    script = ROOT / "examples" / "pretrain_gpt" / "pretrain_gpt.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["-m", "megatron_adams.launch", str(script), *GPT.split(), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if "lm loss:" in line]
    return [float(line.partition("lm loss:")[2].split()[0]) for line in lines]


@pytest.mark.parametrize("kind", RUNS)
def test_fp8_run_follows_the_bf16_run_and_resumes(kind, tmp_path):
    pytest.importorskip("megatron.core", reason="not run: Megatron-Core is not installed")
    skip_without(kind.split("_")[0])
    losses = losses_of(f"{RUNS[kind]} --save {tmp_path}")
    assert len(losses) == 20 and losses[-1] < losses[0]
    # The tolerance is the noise of FP8.
    assert losses[-5:] == pytest.approx(losses_of("")[-5:], abs=0.1)
    resumed = losses_of(f"{RUNS[kind]} --load {tmp_path} --ckpt-step 10")
    # The first logged loss after a resume can be a mean over two steps.
    assert resumed[2:] == pytest.approx(losses[12:], abs=0.02)
