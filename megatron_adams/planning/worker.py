"""The process in which a plan is computed: python -m megatron_adams.planning.worker.

Reads one JSON request from stdin, {"flags": [...], "num_ranks": N}, and writes JSON lines to
stdout: {"progress": text} and, last, {"plan": ...} or {"refused": text}. What Megatron prints goes
to stderr. torch.cuda is the rehearsal's stand-in here, and the process groups are fake, so none
of it is in the process that asked.
"""

import json
import logging
import os
import sys
import warnings


def main() -> int:
    """Answer one request; return the exit code."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.load(sys.stdin)

    def answer(**fields: object) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.WARNING)
    answer(progress="importing Megatron")
    from megatron_adams import cpu_rehearsal

    # What is built shall not depend on whether they are installed.
    for name in ("transformer_engine", "apex"):
        sys.modules[name] = None  # type: ignore[assignment]
    cpu_rehearsal.install(force=True)
    import megatron_adams

    megatron_adams.register()
    from megatron_adams.megatron.training import job_flags
    from megatron_adams.megatron.training.memory import job

    try:
        plan = job.count(
            request["flags"], request["num_ranks"], report=lambda line: answer(progress=line)
        )
    except job_flags.RefusedError as exc:
        answer(refused=str(exc))
        return 2
    answer(plan=plan)
    return 0


if __name__ == "__main__":
    sys.exit(main())
