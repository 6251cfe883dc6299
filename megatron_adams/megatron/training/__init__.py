"""What needs megatron.training: the command line, the log, checkpoints of `pretrain`.

Nothing else here imports megatron.training, so that megatron.core alone is enough for the rest.
`register()` wraps these modules' functions of Megatron where megatron.training is installed.
"""
