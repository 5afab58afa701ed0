"""A dataset larger than memory: trains on a 50 GiB HDF5 file and prints what results/fast.md reports.

    python results/large_dataset.py [FOLDER] [GIB]          # default: a temporary folder, 50

The file is sparse: 13,107 slices of 1024x1024 of which 64, evenly spread, hold the built-in brain with Gaussian noise
of 6/255, and the others zeros that take no room on the disk. Memory is the resident maximum of the process (Linux).
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import formats
import noise

SIDE = 1024


def make(path, gib, key="noisy"):
    """The sparse dataset, or a prediction made from it; returns (bytes of its array, bytes on the disk)."""
    slices, rng = int(gib * 2**30 / 4 / SIDE**2), np.random.default_rng(0)
    brain = formats.brain().slices.astype(np.float32) / 255
    with h5py.File(path, "w") as file:
        group = file.create_group("volumes/v")
        group.attrs.update(split="train", scale=1.0, offset=0.0, source="sparse", fingerprint="sparse")
        noisy = group.create_dataset(key, (slices, SIDE, SIDE), np.float32, chunks=(1, 128, 128))
        for k, s in enumerate(np.linspace(0, slices - 1, 64).astype(int)):
            tile = np.pad(brain[k % len(brain)], [(0, 512 - n) for n in brain.shape[1:]])
            noisy[s] = noise.add(np.tile(tile, (2, 2)), "gaussian", 6 / 255 if key == "noisy" else 1e-3, 0, rng)
        test = file.create_group("volumes/test")
        test.attrs.update(split="test", scale=1.0, offset=0.0, source="brain", fingerprint="brain")
        test.create_dataset(key, data=noisy[:1, :256, :256])
    return 4 * slices * SIDE**2, 512 * os.stat(path).st_blocks


def run(folder, script, *flags):
    """(gibibytes resident at most, seconds) of a script of the project."""
    code = f"""import re, sys; sys.path[:0] = [{str(ROOT)!r}]; import {script}
{script}.main({list(map(str, flags))!r})
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])"""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True)
    return int(re.findall(r"\d+", done.stdout)[-1]) / 2**20, time.monotonic() - started


with tempfile.TemporaryDirectory(dir=(sys.argv[1:] or [None])[0]) as folder:
    size, disk = make(Path(folder) / "large.h5", float((sys.argv[2:] or [50])[0]))
    print(f"{size / 2**30:.1f} GiB of slices, {disk / 2**20:.0f} MiB on the disk", flush=True)
    make(Path(folder) / "pred.h5", float((sys.argv[2:] or [50])[0]), "pred")
    data = ["--data", "large.h5"]
    for script, flags in (
        ("bsn", [*data, "--steps", 200, "--split", "test"]),
        ("diffusion", [*data, "--cond", "pred.h5", "--steps", 200]),
        ("distill", [*data, "--target", "recorrupted", "--noise", "gaussian:6/255", "--steps", 200, "--split", "test"]),
    ):
        gib, seconds = run(folder, script, *flags)
        print(f"{script}.py: 200 training steps, {gib:.2f} GiB resident, {seconds:.0f} s", flush=True)
