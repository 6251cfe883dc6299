"""Megatron's flags in a rehearsal: which are added, and which cannot be rehearsed.

Imports the standard library alone.
"""

from collections.abc import Sequence


class RehearsalError(ValueError):
    """What the user asked for cannot be rehearsed; the message says what to do."""


# Megatron's own layers run, without TransformerEngine's and Apex's kernels. Of two values the last
# wins in argparse, so a value is added where the command has another one.
_NEEDED_FLAGS = (
    ("--distributed-backend", "gloo"),
    ("--transformer-impl", "local"),
    ("--no-gradient-accumulation-fusion", None),
    ("--no-persist-layer-norm", None),
    ("--no-masked-softmax-fusion", None),
    ("--no-rope-fusion", None),
    # Megatron-FSDP would have NCCL scale gradients while it sums them.
    ("--no-gradient-reduce-div-fusion", None),
)

_LOCAL_LAYERS = "Megatron's local layers need TransformerEngine or Apex for it"
_TE_KERNELS = "it selects TransformerEngine's or other GPU kernels"
_CUDA_GRAPHS = "there is no CUDA graph to capture"
_NCCL = "it needs NCCL, and gloo runs instead"
_PROFILES_GPU = "it records what a GPU does"

# Flag -> why it cannot be rehearsed: without a GPU Megatron 0.19.2 fails on it, or ignores it.
REFUSED_FLAGS = {
    "--sequence-parallel": _LOCAL_LAYERS,
    "--context-parallel-size": _LOCAL_LAYERS,
    "--fp8-format": _TE_KERNELS,
    "--fp4-format": _TE_KERNELS,
    "--tp-comm-overlap": _TE_KERNELS,
    "--use-flash-attn": _TE_KERNELS,
    "--attention-backend": _TE_KERNELS,
    "--cross-entropy-fusion-impl": _TE_KERNELS,
    "--delay-wgrad-compute": _TE_KERNELS,
    "--overlap-moe-expert-parallel-comm": _TE_KERNELS,
    "--moe-grouped-gemm": _TE_KERNELS,
    "--moe-permute-fusion": _TE_KERNELS,
    "--moe-router-fusion": _TE_KERNELS,
    "--moe-token-dispatcher-type": _TE_KERNELS,
    "--moe-enable-deepep": _TE_KERNELS,
    "--use-transformer-engine-op-fuser": _TE_KERNELS,
    "--use-te-activation-func": _TE_KERNELS,
    "--fused-residual-rmsnorm": _TE_KERNELS,
    "--batch-invariant-mode": _TE_KERNELS,
    "--cpu-offloading-num-layers": _TE_KERNELS,
    "--fine-grained-activation-offloading": _TE_KERNELS,
    "--enable-cuda-graph": _CUDA_GRAPHS,
    "--external-cuda-graph": _CUDA_GRAPHS,
    "--cuda-graph-impl": _CUDA_GRAPHS,
    "--optimizer-cuda-graph": _CUDA_GRAPHS,
    "--pipeline-model-parallel-comm-backend": _NCCL,
    "--use-nccl-ub": _NCCL,
    "--use-sharp": _NCCL,
    "--profile": _PROFILES_GPU,
    "--record-memory-history": _PROFILES_GPU,
    "--log-energy": _PROFILES_GPU,
}
# Values of these flags that mean what a rehearsal does anyway.
_ACCEPTED_VALUES = {
    "--context-parallel-size": ("1",),
    "--attention-backend": ("auto", "local", "unfused"),
    "--cross-entropy-fusion-impl": ("native",),
    "--moe-token-dispatcher-type": ("allgather", "alltoall"),
    "--cpu-offloading-num-layers": ("0",),
    "--cuda-graph-impl": ("none",),
}


def rehearsal_flags(argv: Sequence[str]) -> list[str]:
    """Return Megatron's flags that a run on CPUs needs and the command lacks, to append to it.

    Args:
        argv: the script's arguments.

    Raises:
        RehearsalError: flags that cannot be rehearsed, with one sentence for each.
    """
    given = _flags_with_values(argv)
    refused = [
        f"{' '.join([flag, *given[flag]])} cannot be rehearsed on CPUs: {reason}."
        for flag, reason in REFUSED_FLAGS.items()
        if flag in given and " ".join(given[flag]) not in _ACCEPTED_VALUES.get(flag, ())
    ]
    if refused:
        raise RehearsalError(" ".join([*refused, "Leave them out of the rehearsal."]))
    # The last of two values is argparse's.
    if "--optimizer-cpu-offload" in given and given.get("--optimizer", [])[-1:] != ["adams"]:
        raise RehearsalError(
            "--optimizer-cpu-offload cannot be rehearsed on CPUs but with --optimizer adams: "
            "Megatron tells its own sub-optimizers' params by their device, which is one here. "
            "Leave it out of the rehearsal."
        )
    strategy = given.get("--data-parallel-sharding-strategy", ["no_shard"])
    if {"--use-megatron-fsdp", "--save"} <= given.keys() and strategy[-1:] != ["no_shard"]:
        _refuse_to_save_torch_adam(given.get("--optimizer", []))
    added: list[str] = []
    for flag, value in _NEEDED_FLAGS:
        if value is None and flag not in given:
            added.append(flag)
        elif value is not None and given.get(flag) != [value]:
            added += [flag, value]
    return added


def _refuse_to_save_torch_adam(optimizer: Sequence[str]) -> None:
    if optimizer[-1:] != ["adams"]:
        raise RehearsalError(
            "--save with --use-megatron-fsdp cannot be rehearsed on CPUs but with --optimizer "
            "adams: torch's Adam has no state where a rank has no part of a param, and Megatron's "
            "save waits for it forever. Leave --save out of the rehearsal."
        )


def _flags_with_values(argv: Sequence[str]) -> dict[str, list[str]]:
    """Each flag and its last values: `--flag value`, `--flag=value`, `--flag a b`, `--flag`."""
    given: dict[str, list[str]] = {}
    flag = ""
    for arg in argv:
        if arg.startswith("--"):
            flag, equals, value = arg.partition("=")
            given[flag] = [value] if equals else []
        elif flag:
            given[flag].append(arg)
    return given
