"""Pretrain Llama 2 with AdamS, or with AdamW: recipe.toml says with which settings.

python train.py --model NAME --data FOLDER --out FOLDER [-- more flags of Megatron's]"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.append(str(FOLDER.parent))

from shared import launch  # noqa: E402  (the folder above is on the path now)

if __name__ == "__main__":
    sys.exit(launch.main(FOLDER / "recipe.toml"))
