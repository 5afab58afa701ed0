"""A dataset larger than memory: trains on a 50 GiB HDF5 file and prints what results/fast.md reports.

    python -m experiments.large_dataset                              # in a temporary folder
    python -m experiments.large_dataset --folder /scratch --gib 5

The file is sparse: of 13,107 slices of 1024x1024, 64 that are evenly spread hold the built-in brain with Gaussian noise
of 6/255, and the others zeros that take no room on the disk. Memory is the resident maximum of the process (Linux).
"""

import os
import tempfile
from pathlib import Path

import h5py
import numpy as np

import noise
from experiments.resources import peak_of_command
from lib import formats, runtime

SIDE, LEVEL = 1024, 6 / 255


def make(path, gib, key="noisy"):
    """Writes the sparse dataset, or a prediction made from it. Returns (bytes of its array, bytes on the disk)."""
    slices, rng = int(gib * 2**30 / 4 / SIDE**2), np.random.default_rng(0)
    brain = formats.brain().slices.astype(np.float32) / 255
    with h5py.File(path, "w") as file:
        group = file.create_group("volumes/v")
        group.attrs.update(split="train", scale=1.0, offset=0.0, source="sparse", fingerprint="sparse")
        array = group.create_dataset(key, (slices, SIDE, SIDE), np.float32, chunks=(1, 128, 128))
        for k, s in enumerate(np.linspace(0, slices - 1, 64).astype(int)):
            tile = np.pad(brain[k % len(brain)], [(0, 512 - n) for n in brain.shape[1:]])
            array[s] = noise.add(np.tile(tile, (2, 2)), "gaussian", LEVEL if key == "noisy" else 1e-3, 0, rng)
        test = file.create_group("volumes/test")
        test.attrs.update(split="test", scale=1.0, offset=0.0, source="brain", fingerprint="brain")
        test.create_dataset(key, data=array[:1, :256, :256])
    return 4 * slices * SIDE**2, 512 * os.stat(path).st_blocks


def main():
    p = runtime.parser(__doc__)
    p.add_argument("--folder", help="for the files, which are deleted at the end (default: a temporary one)")
    p.add_argument("--gib", type=float, default=50, help="size of the dataset (default 50)")
    args = p.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        size, disk = make(Path(folder) / "large.h5", args.gib)
        print(f"{size / 2**30:.1f} GiB of slices, {disk / 2**20:.0f} MiB on the disk", flush=True)
        make(Path(folder) / "pred.h5", args.gib, "pred")
        data, short = ["--data", "large.h5"], ["--steps", 200]
        target = ["--target", "recorrupted", "--noise", f"gaussian:{LEVEL}"]
        test = ["--split", "test"]
        for module, *flags in (("bsn", *test), ("diffusion", "--cond", "pred.h5"), ("distill", *target, *test)):
            gib, seconds = peak_of_command(module, [*data, *short, *flags], folder)
            print(f"{module}.py: 200 training steps, {gib:.2f} GiB resident, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
