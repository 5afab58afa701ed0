"""Real noise: pairs of one repetition and the mean of three, as datasets of the contract: results/m4raw.json.

    python results/m4raw_pairs.py PAIRS.h5 FOLDER

PAIRS.h5 holds `noisy` and `mean3`, (n,256,256) uint8. Writes FOLDER/noisy.h5, whose `clean` is the mean of three, which
contains the noisy repetition, as in the paper; and FOLDER/others.h5, whose `clean` is (3 mean - noisy) / 2, the mean of
the other two. Neighbouring indices are neighbouring slices: the splits are contiguous blocks of 70, 10 and 20 %.
"""

import sys
from pathlib import Path

import h5py

sys.path.insert(0, str(Path(__file__).parent.parent))
import data

pairs, folder = sys.argv[1:]
Path(folder).mkdir(parents=True, exist_ok=True)
with h5py.File(pairs) as file:
    noisy, mean3 = (file[key][:].astype("f4") / 255 for key in ("noisy", "mean3"))
n = len(noisy)
splits = dict(train=(0, n * 7 // 10), val=(n * 7 // 10, n * 8 // 10), test=(n * 8 // 10, n))
for name, clean in (("noisy.h5", mean3), ("others.h5", (3 * mean3 - noisy) / 2)):
    with data.write_volumes(Path(folder) / name, "dataset", "m4raw_pairs") as add:
        for split, (first, end) in splits.items():
            y = noisy[first:end]
            attrs = dict(split=split, scale=255.0, offset=0.0, source="M4Raw", fingerprint=data.fingerprint(y))
            arrays = add(f"m4raw_{first:03d}-{end - 1:03d}", y.shape, ["noisy", "clean"], **attrs)
            for array, values in zip(arrays, (y, clean[first:end])):
                array[:] = values
