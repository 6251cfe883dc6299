#!/usr/bin/env bash
# One node's part of a job: common.sh starts it with srun, once a node, in the container where there is
# one. Usage: node.sh doctor|train COMMAND...
name=$1
shift

if [[ $name == doctor ]]; then
  # The last line is for common.sh, which shows the logs of the nodes that are not fit.
  "$@"
  status=$?
  ((status == 0)) && echo "node $SLURMD_NODENAME: fit" || echo "node $SLURMD_NODENAME: NOT FIT"
  exit "$status"
fi

# Slurm sends SIGTERM to every process of a step. All but Megatron's ranks ignore it from here on:
# torchrun has to outlive the checkpoint that its ranks save, and so have their helper processes.
trap '' TERM
export PET_NODE_RANK=$SLURM_NODEID
# The first node hosts the rendezvous. torchrun would find out by comparing host names.
export PET_RDZV_CONF=is_host=$((SLURM_NODEID == 0))
exec "$@"
