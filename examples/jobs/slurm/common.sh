# shellcheck shell=bash
# What a training job does on Slurm, in a container or not: pretrain.sbatch and pretrain-pyxis.sbatch
# source this file, and call `run_job` with what `python` has to run on each node.
#
#   1. `megatron-adams doctor` on each node. A node that is not fit stops the job, and is named.
#   2. The training, one torchrun a node, which meet as the exported PET_* variables say.
#   3. The end: done; or to the queue again, because the job was asked to stop or has crashed.
#
# A job is asked to stop by preemption (Slurm sends SIGTERM to all its steps) and ahead of its time limit
# (Slurm sends SIGUSR1 to this script, which sends SIGTERM to the steps). Megatron saves a checkpoint
# when it gets SIGTERM (--exit-signal-handler), and the next start loads it (--load).
#
# Variables that change it:
#   JOB_PYTHON       the Python to run; default: python
#   JOB_LOGS         folder for logs, on a file system that all nodes share; default: slurm-<job id>
#   JOB_MAX_CRASHES  a job that has crashed this often stays down; default: 3
#   MASTER_ADDR      the first node's name or address, where its name does not resolve
#   PET_NPROC_PER_NODE, PET_MAX_RESTARTS  torchrun's; default: the node's GPUs, and 0

set -u

JOB_PYTHON=${JOB_PYTHON:-python}
JOB_LOGS=${JOB_LOGS:-$SLURM_SUBMIT_DIR/slurm-$SLURM_JOB_ID}
JOB_MAX_CRASHES=${JOB_MAX_CRASHES:-3}

restart=${SLURM_RESTART_COUNT:-0}
asked_to_stop=
slurm_files=$SLURM_SUBMIT_DIR/examples/jobs/slurm

say() { echo "$(date +%FT%T) job $SLURM_JOB_ID, restart $restart: $*"; }

# Ask the training for a checkpoint and its end. A signal that comes before Megatron listens is
# ignored (node.sh), hence more than one.
stop_steps() {
  asked_to_stop="its time limit is near"
  say "$asked_to_stop: asking for a checkpoint"
  while kill -0 $$ 2>/dev/null; do # until this script ends: a next start is not to be signalled
    scancel --signal=TERM "$SLURM_JOB_ID" # its steps, not this script
    sleep 10
  done &
}
trap stop_steps USR1

# Run a command as one task on each node, with its output in a file a node; returns the highest exit
# status. srun is in the background, because bash runs a trap only between commands, or in `wait`.
on_each_node() { # on_each_node NAME SRUN_FLAG... -- COMMAND...
  local name=$1 status srun_pid flags=()
  while shift && [[ $1 != -- ]]; do flags+=("$1"); done
  shift
  # A task may use all of its node's CPUs: torchrun's processes inherit them.
  srun --nodes="$SLURM_NNODES" --ntasks-per-node=1 --cpu-bind=none --output="$logs/$name.%n.%N.log" \
    "${flags[@]}" "${container[@]}" bash "$slurm_files/node.sh" "$name" "$@" &
  srun_pid=$!
  while :; do
    wait "$srun_pid"
    status=$?
    kill -0 "$srun_pid" 2>/dev/null || return "$status"
  done
}

# True where Slurm itself is ending this start: cancelled, out of time, being requeued. The script then
# has nothing to decide: what it does would undo a scancel.
slurm_has_decided() { [[ $job != *" JobState=RUNNING "* ]]; }

requeue() {
  say "$1: to the queue again"
  scontrol requeue "$SLURM_JOB_ID" || exit 1
  exit 0
}

# End this start of the job, by why its step ended. torchrun's exit status alone does not tell:
# it is 1 for a crash, and in some versions also after a checkpoint that SIGTERM asked for.
end_job() { # end_job STATUS WHAT_FAILED
  local status=$1 what=$2 job crashes
  job=" $(scontrol --oneliner show job "$SLURM_JOB_ID") " || exit "$status"
  if slurm_has_decided; then
    say "ended by Slurm"
    exit "$status"
  fi
  # Slurm says nothing of it, or None, where no preemption has begun.
  [[ $job != *" PreemptTime="[0-9]* ]] || asked_to_stop="it is preempted"
  [[ -z $asked_to_stop ]] || requeue "$asked_to_stop"
  if ((status == 0)); then
    say "done"
    exit 0
  fi
  say "$what, exit status $status; logs: $logs"
  [[ $what == crash ]] || exit "$status"
  echo "restart $restart: exit status $status" >>"$JOB_LOGS/crashes"
  crashes=$(wc -l <"$JOB_LOGS/crashes")
  ((crashes < JOB_MAX_CRASHES)) || {
    say "crash $crashes of $JOB_MAX_CRASHES (JOB_MAX_CRASHES): it stays down"
    exit "$status"
  }
  requeue "crash $crashes of $JOB_MAX_CRASHES"
}

run_job() {
  (($#)) || {
    say "nothing to run: give the script and its flags after the .sbatch file" >&2
    exit 2
  }
  logs=$JOB_LOGS/restart-$restart
  mkdir -p "$logs" || exit 2
  say "on $SLURM_JOB_NODELIST; logs: $logs"

  local rehearsal=()
  [[ " $* " != *" --cpu-rehearsal "* ]] || rehearsal=(--cpu-rehearsal)
  on_each_node doctor -- "$JOB_PYTHON" -m megatron_adams.cli doctor "${rehearsal[@]}" || {
    local status=$? log
    for log in "$logs"/doctor.*.log; do
      [[ $(tail -n 1 "$log") == *": fit" ]] || { echo "--- $log:" && cat "$log"; }
    done
    end_job "$status" "a node is not fit for the job: have it drained, or leave it out with --exclude"
  }

  local first_node
  first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  export PET_NNODES=$SLURM_NNODES
  export PET_NPROC_PER_NODE=${PET_NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
  export PET_MAX_RESTARTS=${PET_MAX_RESTARTS:-0}
  export PET_RDZV_BACKEND=c10d
  # A port of each job's own, below those that Linux hands out by itself.
  export PET_RDZV_ENDPOINT=${MASTER_ADDR:-$first_node}:$((15000 + SLURM_JOB_ID % 15000))
  export PET_RDZV_ID=$SLURM_JOB_ID-$restart
  # SIGTERM is Megatron's to handle. torchrun would give its processes 30 s, and then kill them.
  export PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT
  # A node that is lost takes the others with it; they would wait for it until their timeouts.
  on_each_node train --kill-on-bad-exit=1 -- "$JOB_PYTHON" "$@"
  end_job $? crash
}
