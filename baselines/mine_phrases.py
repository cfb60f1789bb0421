"""Mine the library of decoder=sjd-phrases from the tokens of a run.

python -m baselines.mine_phrases runs/tiny-ar-... phrases.npy --vocabulary 512
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from baselines.joint_runs import mine_run
from sjd2.errors import UserError


def main() -> None:
    """Write the most frequent pairs of neighbouring codes as .npy [n, 2]."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run, whose tokens/ are read")
    parser.add_argument("file", type=Path, help="where the library is written")
    parser.add_argument("--vocabulary", type=int, required=True, help="codes of the model; ids beyond are row ends")
    parser.add_argument("--count", type=int, default=4000, help="pairs to keep")
    settings = parser.parse_args()
    try:
        pairs = mine_run(settings.run, settings.vocabulary, settings.count)
    except UserError as error:
        parser.exit(1, f"error: {error}\n")
    try:
        with settings.file.open("wb") as file:  # np.save by itself would add .npy to the name
            np.save(file, pairs)
    except OSError as error:
        parser.exit(1, f"error: {settings.file} cannot be written: {error.strerror}.\n")
    print(f"{len(pairs)} pairs in {settings.file}")


if __name__ == "__main__":
    main()
