"""Real noise: all pairs of one repetition and the mean of three, as datasets of the contract: results/m4raw.json.

    python results/m4raw_pairs.py PAIRS.h5 FOLDER

PAIRS.h5 holds `noisy` and `mean3`, (n,256,256) uint8. Writes FOLDER/noisy.h5, whose `clean` is the mean of three, which
contains the noisy repetition, as in the paper; and FOLDER/others.h5, whose `clean` is the mean of the other two.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from reproduce_data import pairs

source, folder = sys.argv[1:]
Path(folder).mkdir(parents=True, exist_ok=True)
for name, reference in (("noisy.h5", "mean"), ("others.h5", "others")):
    pairs(source, Path(folder) / name, reference=reference)
