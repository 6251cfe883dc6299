#!/usr/bin/env bash
# One node's part of a job: common.sh starts it with srun, one task a node, in the container where
# there is one. Usage: node.sh doctor|train COMMAND...
name=$1
shift

if [[ $name == train ]]; then
  export PET_NODE_RANK=$SLURM_NODEID
  # The first node hosts the rendezvous. torchrun would find out by comparing host names.
  export PET_RDZV_CONF=is_host=$((SLURM_NODEID == 0))
  exec "$@"
fi

# The last line is for common.sh, which shows the logs of the nodes that are not fit.
"$@"
status=$?
if ((status)); then
  echo "node $SLURMD_NODENAME: NOT FIT"
else
  echo "node $SLURMD_NODENAME: fit"
fi
exit "$status"
