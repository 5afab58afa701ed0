"""Large images: memory and seams. Prints what results/large_image.md reports, and draws results/seam.png.

    python -m experiments.large_image STUDENT.pt                  # a 16-bit image of 8192x8192 pixels
    python -m experiments.large_image STUDENT.pt --side 4096 --figure seam.png

The image is a mosaic of the built-in brain with Gaussian noise of 6/255. Memory is the resident maximum of a process
that denoises it from file to file (Linux), less that of one that denoises a 64x64 image. For the seam, a 2048x2048
image is denoised in one piece and in the tiles of `denoise.py`, in float32, and the two are subtracted.
"""

import tempfile
from pathlib import Path

import numpy as np
import tifffile
import torch
from matplotlib.figure import Figure

import data
import distill
from experiments.resources import peak_of_command
from lib import formats, runtime, training


def mosaic(side):
    """(side,side) uint16 with noise."""
    slices = formats.brain().slices.astype(np.float32) / 255
    h, w = slices.shape[1:]
    rows = [[slices[(7 * i + j) % len(slices)] for j in range(side // w + 1)] for i in range(side // h + 1)]
    image = np.block(rows)[:side, :side]
    image += np.random.default_rng(0).standard_normal(image.shape, dtype=np.float32) * np.float32(6 / 255)
    return np.clip(image * 50000 + 6000, 0, 65535).astype(np.uint16)


def report_memory(student, side):
    """Prints what denoise.py needs for one large image, each image in a process of its own."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for n in (64, side):
            tifffile.imwrite(Path(folder) / f"{n}.tif", mosaic(n))
            flags = [Path(folder) / f"{n}.tif", "--out", Path(folder) / "out", "--model", student]
            found.append(peak_of_command("denoise", flags))
    (start, _), (most, seconds) = found
    print(f"{side}x{side}, uint16: {most - start:.2f} GiB above the {start:.2f} GiB of the start, {seconds:.0f} s")


@torch.inference_mode()
def report_seams(student, out):
    """Prints and draws how much tiles differ from one piece. Raises ValueError if the student needs several slices."""
    noisy = torch.from_numpy(mosaic(2048).astype(np.float32) / 65535)[None, None]
    network, checkpoint = training.load_network(distill.build_network, student, "distill", "cpu")
    if checkpoint["model_args"].get("context"):
        raise ValueError(f"{student} sees neighbouring slices, which one image has not: train it with --context 0")
    network.pool_locally(checkpoint["extra"]["crop"])
    one_piece = network(noisy)
    for name, memory in (("--memory 2G", 2 << 30), ("the least", 1)):
        per_pixel = distill.BYTES[type(network)] * checkpoint["model_args"]["width"]
        side, overlap = data.tiling(per_pixel, checkpoint["extra"]["crop"], memory)
        difference = data.tiled(network, noisy, side, overlap) - one_piece
        differs = f"largest difference {difference.abs().max():.1e} of the range, mean {difference.abs().mean():.1e}"
        print(f"tiles of {name}, {side} pixels, {overlap} shared: {differs}")
    fig = Figure(figsize=(12, 4.4), dpi=80, layout="constrained")
    axes, shown = fig.subplots(1, 3), np.s_[0, 0, 300:900, 300:900]
    axes[0].imshow(one_piece[shown], cmap="gray")
    axes[1].imshow((one_piece + difference)[shown], cmap="gray")
    drawn = axes[2].imshow(difference[shown], cmap="RdBu_r", vmin=-1e-3, vmax=1e-3)
    fig.colorbar(drawn, ax=axes[2])
    for ax, title in zip(axes, ("in one piece", f"in tiles of {side} pixels", "difference, share of the range")):
        ax.set(xticks=[], yticks=[], title=title)
    fig.savefig(out)


def main():
    p = runtime.parser(__doc__)
    p.add_argument("student", metavar="STUDENT.pt")
    p.add_argument("--side", type=int, default=8192, help="of the 16-bit image, pixels (default 8192)")
    p.add_argument("--figure", default="results/seam.png", help="to draw (default results/seam.png)")
    args = p.parse_args()
    report_seams(args.student, args.figure)
    report_memory(args.student, args.side)


if __name__ == "__main__":
    runtime.command(main)
