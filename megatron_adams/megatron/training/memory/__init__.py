"""The bytes of each rank of a job, from Megatron's own buffers and optimizers, without memory.

`megatron-adams plan` runs this in a process of its own (planning/worker.py): it validates a job's
flags, enters the job as one of its ranks over torch's fake process groups, and builds Megatron's
model, DDP buffers and optimizers of fake tensors, which have shapes, dtypes and storages, and no
memory. torch.cuda's stand-in has to be installed, the plugin be registered, and TransformerEngine
and Apex be hidden, so that the same is built everywhere.

`job.count` is what is called. Below it, `stage.py` has what the ranks of a pipeline stage hold,
`rank.py` builds one of them, `tallies.py` counts its bytes, and `modes.py` has the ways to keep the
optimizer's state.
"""
