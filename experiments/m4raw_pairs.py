"""Real noise: all pairs of one repetition and the mean of three, as two datasets.

python -m experiments.m4raw_pairs PAIRS.h5 FOLDER

In    PAIRS.h5            `noisy` and `mean3` (n,256,256) uint8
Out   FOLDER/noisy.h5     `clean` is the mean of three, which contains the noisy repetition, as in the paper
      FOLDER/others.h5    `clean` is the mean of the other two
"""

import sys
from pathlib import Path

from experiments.reproduce_data import pairs

if __name__ == "__main__":
    source, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    pairs(source, folder / "noisy.h5", reference="mean")
    pairs(source, folder / "others.h5", reference="others")
