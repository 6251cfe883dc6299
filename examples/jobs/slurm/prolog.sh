#!/usr/bin/env bash
# A Prolog for slurm.conf: on every node, before any job with GPUs. Copy it to all nodes, and set
#
#   Prolog=/etc/slurm/megatron-adams-prolog.sh
#   PrologFlags=Alloc
#
# Where it fails, Slurm drains the node ("Prolog error") and requeues the job, held unless
# SchedulerParameters has nohold_on_prolog_fail. It runs as root, and without the user's environment:
# MEGATRON_ADAMS_PYTHON is a Python that all nodes have, with megatron-adams in it. Root's folder of
# compiled kernels is not the job's, so that the doctor is told not to look there. Nodes that several
# jobs share need --while-running, too: the others' processes on the GPUs are no fault.
[[ -n ${SLURM_JOB_GPUS:-} ]] || exit 0

report=$("${MEGATRON_ADAMS_PYTHON:-/opt/megatron-adams/bin/python}" -m megatron_adams.cli doctor \
  --quick --ignore 'kernel.*' 2>&1) && exit 0
# slurmd notes that a prolog has failed, but not why.
logger --tag megatron-adams-prolog "node ${SLURMD_NODENAME:-$HOSTNAME} is not fit: $report"
exit 1
