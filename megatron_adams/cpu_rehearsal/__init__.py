"""A stand-in for torch.cuda: real Megatron-Core on CPU processes over gloo.

It is for trying the exact parallel layout of a cluster job, shrunk, before queueing it: the same
script and flags build the same process groups, shards, buckets, pipeline schedules and
checkpoints. It does not model speed, GPU memory, NCCL, TransformerEngine and FP8 kernels, the
asynchrony of streams, nor a GPU's numerics bit for bit.

`launch.py --cpu-rehearsal` and the tests call `install()` before anything imports Megatron, which
this package never does.
"""

from megatron_adams.cpu_rehearsal.flags import RehearsalError, rehearsal_flags
from megatron_adams.cpu_rehearsal.stand_ins import STAND_INS, StandIn, install

__all__ = ["STAND_INS", "RehearsalError", "StandIn", "install", "rehearsal_flags"]
