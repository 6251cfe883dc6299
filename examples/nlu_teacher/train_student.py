"""Distil a teacher into a student of a named size: train_encoder.py's command line.

    train_student.py --model 17m --data FOLDER --out FOLDER -- --teacher TEACHER/checkpoints

Everything after -- goes to distil_encoder.py: --kl-weight, --hidden-weight, --temperature,
--teacher-logits, and Megatron's flags."""

import sys

import train_encoder
from shared import launch

OWN_FLAGS = train_encoder.OWN_FLAGS | {
    *("teacher", "teacher-logits", "mlm-weight", "kl-weight", "hidden-weight", "temperature")
}
SCRIPT = launch.Script(
    train_encoder.FOLDER / "distil_encoder.py", train_encoder.dataset_flags, OWN_FLAGS
)

if __name__ == "__main__":
    sys.exit(launch.main(train_encoder.RECIPE, script=SCRIPT))
