"""Turn text into a dataset for train.py.

python prepare_data.py --text FILE_OR_FOLDER --out FOLDER [--tokenizer FOLDER]"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from shared import prepare_data

VOCAB_SIZE = 50_257  # GPT-2's

if __name__ == "__main__":
    sys.exit(prepare_data.main(VOCAB_SIZE))
