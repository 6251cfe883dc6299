"""A learning rate for AdamS, from AdamW's and the size of both optimizers' updates.

rule.py has the rule, its source and how well it did; job_log.py reads the sizes from a job's log,
and trial.py runs a job for some steps to have one. Called by `megatron-adams tune`. Imports the
standard library alone.
"""

from megatron_adams.tuning.job_log import UpdateSizes, read_sizes
from megatron_adams.tuning.rule import TuneError, suggest
from megatron_adams.tuning.trial import Trial, trial_of

__all__ = ["Trial", "TuneError", "UpdateSizes", "read_sizes", "suggest", "trial_of"]
