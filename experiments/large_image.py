"""Large images: memory and seams. Prints what results/large_image.md reports, and draws results/seam.png.

    python results/large_image.py STUDENT.pt [SIDE]        # SIDE of the 16-bit image, 8192 by default

The image is a mosaic of the built-in brain with Gaussian noise of 6/255. Memory is the resident maximum of a process
that denoises it from file to file (Linux), less that of one that denoises a 64x64 image. The seam: a 2048x2048 image in
one piece and in the tiles of `denoise.py`, float32, and their difference.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib
import numpy as np
import tifffile
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data
import distill
import formats
import runtime

matplotlib.use("Agg")
import matplotlib.pyplot as plt

student, side = sys.argv[1], int((sys.argv[2:] or [8192])[0])


def mosaic(side):
    """(side,side) uint16 with noise."""
    slices = formats.brain().slices.astype(np.float32) / 255
    h, w = slices.shape[1:]
    rows = [
        np.concatenate([slices[(7 * i + j) % len(slices)] for j in range(side // w + 1)], 1)[:, :side]
        for i in range(side // h + 1)
    ]
    image = np.concatenate(rows)[:side]
    image += np.random.default_rng(0).standard_normal(image.shape, dtype=np.float32) * np.float32(6 / 255)
    return np.clip(image * 50000 + 6000, 0, 65535).astype(np.uint16)


def peak(side, folder):
    """(bytes resident at most, seconds) of denoise.py on one image; each in a process of its own."""
    code = f"""import re, sys; sys.path[:0] = [{str(ROOT)!r}]; import denoise
denoise.main([{str(folder / f"{side}.tif")!r}, "--out", {str(folder / "out")!r}, "--model", {student!r}])
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])"""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return 1024 * int(done.stdout.split()[-1]), time.monotonic() - started


with tempfile.TemporaryDirectory() as folder:
    for n in (64, side):
        tifffile.imwrite(Path(folder) / f"{n}.tif", mosaic(n))
    start, _ = peak(64, Path(folder))
    most, seconds = peak(side, Path(folder))
print(
    f"{side}x{side}, uint16: {(most - start) / 2**30:.2f} GiB above the {start / 2**30:.2f} GiB of the start, "
    f"{seconds:.0f} s"
)

part = torch.from_numpy(mosaic(2048).astype(np.float32) / 65535)[None, None]
model, state = runtime.restore(distill.network, student, "distill", "cpu")
model.pool_locally(state["extra"]["crop"])
sizes = {"--memory 2G": distill.tiling(state, 2 << 30), "the least": distill.tiling(state, 1)}
with torch.inference_mode():
    whole = model(part)
    tiles = {name: data.tiled(model, part, *size) for name, size in sizes.items()}
for name, tiled in tiles.items():
    difference = (tiled - whole).abs()
    print(
        f"tiles of {name}, {sizes[name][0]} pixels, {sizes[name][1]} shared: largest difference "
        f"{difference.max():.1e} of the range, mean {difference.mean():.1e}"
    )
fig, axes = plt.subplots(1, 3, figsize=(12, 4.4), dpi=80, layout="constrained")
shown = slice(300, 900)
for ax, image, title in (
    (axes[0], whole[0, 0, shown, shown], "in one piece"),
    (axes[1], tiled[0, 0, shown, shown], f"in tiles of {sizes['the least'][0]} pixels"),
):
    ax.imshow(image, cmap="gray")
    ax.set_title(title)
drawn = axes[2].imshow((tiled - whole)[0, 0, shown, shown], cmap="RdBu_r", vmin=-1e-3, vmax=1e-3)
axes[2].set_title("difference, share of the range")
fig.colorbar(drawn, ax=axes[2])
for ax in axes:
    ax.set(xticks=[], yticks=[])
fig.savefig(ROOT / "results/seam.png")
