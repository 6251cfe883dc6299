# shellcheck shell=bash
# What a training job does on Slurm, in a container or not: pretrain.sbatch and pretrain-pyxis.sbatch
# source this file, and call `run_job` with what `python` has to run on each node.
#
#   1. `megatron-adams doctor` on each node. A node that is not fit stops the job, and is named.
#   2. The training, one torchrun a node, which meet as the exported PET_* variables say.
#   3. The end: done; or to the queue again, because the job was asked to stop or has crashed.
#
# A job is asked to stop by preemption (Slurm sends SIGTERM to its steps) and ahead of its time limit
# (Slurm sends SIGUSR1 to this script, which sends SIGTERM to the steps). Megatron saves a checkpoint
# when it gets SIGTERM (--exit-signal-handler), and the next start loads it (--load).
#
# Variables that change it:
#   JOB_PYTHON       the Python to run; default: python
#   JOB_LOGS         folder for logs, on a file system that all nodes share; default: slurm-<job id>
#   JOB_MAX_CRASHES  a job that has crashed this often stays down; default: 3
#   JOB_DOCTOR_FLAGS more flags for the doctor, as "--expect-driver 580 --strict"
#   MASTER_ADDR      the first node's address, where the other nodes cannot resolve its name
#   PET_NPROC_PER_NODE, PET_MAX_RESTARTS, PET_SHUTDOWN_TIMEOUT   torchrun's; default: the GPUs of a
#                    node, 0, and 600 s from SIGTERM to SIGKILL

set -u

JOB_PYTHON=${JOB_PYTHON:-python}
JOB_LOGS=${JOB_LOGS:-$SLURM_SUBMIT_DIR/slurm-$SLURM_JOB_ID}
JOB_MAX_CRASHES=${JOB_MAX_CRASHES:-3}

restart=${SLURM_RESTART_COUNT:-0}
logs=$JOB_LOGS/restart-$restart
asked_to_stop=

say() { echo "$(date +%FT%T) job $SLURM_JOB_ID, restart $restart: $*"; }

# Once: a second SIGTERM ends torchrun, which waits for its ranks' checkpoint.
stop_steps() {
  asked_to_stop="its time limit is near"
  say "$asked_to_stop: SIGTERM to its steps"
  scancel --signal=TERM "$SLURM_JOB_ID" # not to this script, which --batch would do
}
trap stop_steps USR1

# Run a command as one task on each node, each with its output in a file; returns the highest exit
# status. srun is in the background, because bash runs a trap only between commands, or in `wait`.
on_each_node() { # on_each_node NAME COMMAND...
  local name=$1 status srun_pid
  # No CPU binding: torchrun's processes may use all CPUs of their node.
  # shellcheck disable=SC2154  # the .sbatch file sets `container`
  srun --nodes="$SLURM_NNODES" --ntasks-per-node=1 --cpu-bind=none --output="$logs/$name.%n.%N.log" \
    "${container[@]}" bash "$SLURM_SUBMIT_DIR/examples/jobs/slurm/node.sh" "$@" &
  srun_pid=$!
  while :; do
    wait "$srun_pid"
    status=$?
    kill -0 "$srun_pid" 2>/dev/null || return "$status"
  done
}

requeue() { # requeue WHY
  say "$1: to the queue again"
  scontrol requeue "$SLURM_JOB_ID" || exit 1
  exit 0
}

# End this start of the job, by why its last step ended. The step's exit status does not tell:
# torchrun's is 1 for a crash, and also after a checkpoint that SIGTERM has asked for.
end_job() { # end_job STATUS WHAT_FAILED
  local status=$1 what=$2 job crashes
  job=" $(scontrol --oneliner show job "$SLURM_JOB_ID") " || exit "$status"
  if [[ $job != *" JobState=RUNNING "* ]]; then
    say "Slurm is ending it" # cancelled, or requeued already: another requeue would undo a scancel
    exit "$status"
  fi
  # Where no preemption has begun, Slurm says None or nothing.
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
  ((crashes >= JOB_MAX_CRASHES)) || requeue "crash $crashes of $JOB_MAX_CRASHES"
  say "crash $crashes of $JOB_MAX_CRASHES (JOB_MAX_CRASHES): it stays down"
  exit "$status"
}

run_job() { # run_job SCRIPT FLAG...
  (($#)) || {
    say "nothing to run: give the script and its flags after the .sbatch file" >&2
    exit 2
  }
  mkdir -p "$logs" || exit 2
  say "on $SLURM_JOB_NODELIST; logs: $logs"

  local doctor=(doctor) more status log
  if [[ " $* " == *" --cpu-rehearsal "* ]]; then
    doctor+=(--cpu-rehearsal)
  elif [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
    doctor+=(--expect-gpus "$SLURM_GPUS_ON_NODE")
  fi
  read -ra more <<<"${JOB_DOCTOR_FLAGS:-}"
  on_each_node doctor "$JOB_PYTHON" -m megatron_adams.cli "${doctor[@]}" "${more[@]}"
  status=$?
  if ((status)); then
    for log in "$logs"/doctor.*.log; do
      [[ $(tail -n 1 "$log") == *": fit" ]] || cat "$log"
    done
    end_job "$status" "a node is not fit: repair or drain it, or leave it out with --exclude"
  fi
  [[ -z $asked_to_stop ]] || end_job 0 "" # there was no training yet that SIGTERM could reach

  local first_node
  first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  export PET_NNODES=$SLURM_NNODES
  export PET_NPROC_PER_NODE=${PET_NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
  export PET_MAX_RESTARTS=${PET_MAX_RESTARTS:-0}
  export PET_RDZV_BACKEND=c10d
  # A port of each job's own, below those that Linux hands out by itself.
  export PET_RDZV_ENDPOINT=${MASTER_ADDR:-$first_node}:$((15000 + SLURM_JOB_ID % 15000))
  export PET_RDZV_ID=$SLURM_JOB_ID-$restart
  # torch 2.14 keeps one store for all restarts (PET_MAX_RESTARTS): the ranks of a restart then find
  # the addresses of the dead ones in it, and time out. This gives each restart a store of its own.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
  # torchrun's own 30 s would end many a checkpoint.
  export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-600}
  # After one node's end the others have two minutes: their ranks would wait for it much longer.
  SLURM_WAIT=120 on_each_node train "$JOB_PYTHON" "$@"
  end_job $? crash
}
