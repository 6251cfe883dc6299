"""Pretrain Llama 2 with AdamS, or with AdamW: recipe.toml says with which settings.

python train.py --model NAME --data FOLDER --out FOLDER [-- more flags of Megatron's]"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from shared import launch

RECIPE = Path(__file__).resolve().with_name("recipe.toml")

if __name__ == "__main__":
    sys.exit(launch.main(RECIPE))
