"""A job's flags are found in a pasted command line, and in scripts as Megatron's examples are."""

import pytest

from megatron_adams.planning.command_line import CommandLineError, read_text, read_words

# As examples/gpt3/train_gpt3_175b_distributed.sh of Megatron-LM is made.
SCRIPT = r"""
#!/bin/bash

# Runs the "175B" parameter model

export CUDA_DEVICE_MAX_CONNECTIONS=1

GPUS_PER_NODE=8
# Change for multinode config
MASTER_ADDR=localhost
MASTER_PORT=6000
NUM_NODES=16
NODE_RANK=0
WORLD_SIZE=$(($GPUS_PER_NODE*$NUM_NODES))

CHECKPOINT_PATH=$1 #<Specify path>
VOCAB_FILE=$2/gpt2-vocab.json

DISTRIBUTED_ARGS=(
    --nproc_per_node $GPUS_PER_NODE
    --nnodes $NUM_NODES
    --master_addr $MASTER_ADDR
    --master_port $MASTER_PORT
)

GPT_MODEL_ARGS=(
    --num-layers 96     # deep
    --hidden-size $((96 * 128))
    --attention-backend auto # Can use (flash/fused/unfused/local)
)

TRAINING_ARGS=(
    --micro-batch-size 1
    --rampup-batch-size 16 16 5859375
    --init-method-std '0.006'
)
TRAINING_ARGS+=(--bf16)

DATA_ARGS=(
    --data-path $DATA_PATH
    --vocab-file $VOCAB_FILE
    --split "949,50,1"
)

torchrun ${DISTRIBUTED_ARGS[@]} pretrain_gpt.py \
    ${GPT_MODEL_ARGS[@]} \
    "${TRAINING_ARGS[@]}" \
    ${DATA_ARGS[@]} \
    --save $CHECKPOINT_PATH 2>&1 | tee log.txt
"""


def test_script_with_arrays_as_megatrons_own():
    command = read_text(SCRIPT)
    assert command.num_ranks == 128
    assert " ".join(command.flags) == (
        "--num-layers 96 --hidden-size 12288 --attention-backend auto --micro-batch-size 1 "
        "--rampup-batch-size 16 16 5859375 --init-method-std 0.006 --bf16 --split 949,50,1"
    )


@pytest.mark.parametrize(
    ("text", "flags", "num_ranks"),
    [
        ("torchrun --nproc-per-node=8 p.py --num-layers 2 --bf16", "--num-layers 2 --bf16", 8),
        (
            "python -m torch.distributed.run --nnodes 2 --nproc_per_node 4 "
            "-m megatron_adams.launch p.py --num-layers 2 --bf16",
            "--num-layers 2 --bf16",
            8,
        ),
        ("--num-layers 2 \\\n  --bf16", "--num-layers 2 --bf16", None),
        ("torchrun --nproc-per-node gpu p.py --num-layers 2 --bf16", "--num-layers 2 --bf16", None),
        ("torchrun --nnodes 1:4 p.py --num-layers 2 --bf16", "--num-layers 2 --bf16", None),
        (
            "OPTS='--num-layers 2 --bf16'\neval torchrun p.py $OPTS > log 2> errors &",
            "--num-layers 2 --bf16",
            1,
        ),
        (
            '#SBATCH --nodes=4\n#SBATCH --ntasks-per-node=8\nsrun bash -c "python -u p.py '
            '--num-layers 2 --bf16"',
            "--num-layers 2 --bf16",
            32,
        ),
        (
            "#SBATCH --nodes 4\nsrun torchrun --nnodes $SLURM_NNODES --nproc-per-node "
            "${GPUS:-8} p.py --num-layers 2 --bf16",
            "--num-layers 2 --bf16",
            32,
        ),
        ("A=1; B=$((A + 1))\nX=1 torchrun p.py --num-layers $B --bf16", "--num-layers 2 --bf16", 1),
        (
            "if [ -n $X ]; then\n  MB=4\nfi\ntorchrun p.py --num-layers 2 --bf16",
            "--num-layers 2 --bf16",
            1,
        ),
        (
            "torchrun p.py --num-layers 2 --moe-layer-freq '([0]*1+[1]*1)' --save ${X}/$(date)",
            "--num-layers 2 --moe-layer-freq ([0]*1+[1]*1)",
            1,
        ),
    ],
)
def test_flags_and_ranks_are_found(text, flags, num_ranks):
    command = read_text(text)
    assert (" ".join(command.flags), command.num_ranks) == (flags, num_ranks)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("torchrun p.py --num-layers $N --bf16", r"\$N in the value of --num-layers is not set"),
        ("torchrun p.py --num-layers ${N} --bf16", r"\$\{N\} in the value of --num-layers"),
        ("torchrun p.py --num-layers $(cat n) --bf16", "in the value of --num-layers"),
        ("torchrun p.py ${ARGS[@]} --num-layers 2 --bf16", r"\$\{ARGS\[@\]\}"),
        (
            "N=2\nif [ $X ]; then\n  N=4\nfi\ntorchrun p.py --num-layers $N --bf16",
            r"\$N in the value of --num-layers",
        ),
        ("echo hello", "no command with Megatron's flags"),
        ("", "no command with Megatron's flags"),
        (
            "torchrun a.py --num-layers 2 --bf16\ntorchrun b.py --num-layers 3 --bf16",
            "2 commands with Megatron's flags were found",
        ),
        ("ARGS=(\n  --num-layers 2\ntorchrun p.py", "has no closing parenthesis"),
        ("torchrun p.py --num-layers 2 --split '9", "close the quotes"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_remedy(text, expected):
    with pytest.raises(CommandLineError, match=expected):
        read_text(text)


def test_words_that_a_shell_has_split():
    line = "torchrun --nproc-per-node 2 p.py --num-layers 2 --bf16"
    assert read_words(line.split()) == read_text(line) == read_words([line])


def test_environment_is_not_read(monkeypatch):
    monkeypatch.setenv("N", "2")
    with pytest.raises(CommandLineError, match=r"\$N"):
        read_text("torchrun p.py --num-layers $N --bf16")
