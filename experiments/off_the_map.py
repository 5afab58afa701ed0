"""What denoise.py does to images unlike those that the shipped networks have learned from: is it worse than nothing?

    python -m experiments.off_the_map --out FOLDER                # instant; --effort 0.1 also tunes

Each case is a small volume, clean and noisy. The table has the PSNR before and after, by the range of the clean volume,
and what was kept: the shipped network, the tuned one, or the images as they are.
"""

import contextlib
import io
import json
from pathlib import Path

import numpy as np

import denoise
import noise
from lib import formats, runtime


def cases(seed):
    """{name: (clean, noisy)}, volumes (S,H,W) float32 in units of their own."""
    brain = formats.brain().slices[70:80].astype(np.float32) / 255
    rng = np.random.default_rng(seed)

    def noisy(x, level, correlation=0.0):
        return np.stack([noise.add(s, "gaussian", level, correlation, rng) for s in x])

    wave = np.sin(np.arange(200) * 2 * np.pi / 6) / 2 + 0.5
    stripes = np.tile(wave.astype(np.float32), (8, 200, 1))
    framed = np.pad(brain, ((0, 0), (40, 40), (40, 40)))
    inner = np.pad(np.ones_like(brain), ((0, 0), (40, 40), (40, 40)))
    hounsfield = np.where(brain > 0.02, 40 + 60 * (brain - 0.5), -1000).astype(np.float32)
    hounsfield[:, 60:70, 60:70] = 1500  # bone
    flat = np.full((8, 200, 200), 0.5, np.float32)
    found = {
        "noise of 0.45/255, 0.3 of the least trained on": (brain, noisy(brain, 0.45 / 255)),
        "noise of 160/255, 4 times the most": (brain, noisy(brain, 160 / 255)),
        "CT: Hounsfield units, noise of 20": (hounsfield, noisy(hounsfield, 20)),
        "black borders, without noise": (framed, framed + inner * (noisy(framed, 6 / 255) - framed)),
        "stripes of 6 pixels": (stripes, noisy(stripes, 12 / 255)),
        "noise alone": (flat, noisy(flat, 20 / 255)),
        "no noise": (stripes, stripes),
    }
    return {name: (x.astype(np.float32), y.astype(np.float32)) for name, (x, y) in found.items()}


def psnr(x, clean):
    mse = np.square(x - clean, dtype=np.float64).mean()
    return 10 * np.log10(max(float(np.ptp(clean)), 1.0) ** 2 / mse) if mse else np.inf


def main(argv=None):
    p = runtime.parser(__doc__)
    p.add_argument("--out", required=True, help="folder for everything")
    p.add_argument("--effort", type=float, help="tune, with so much of the default training (default: --instant)")
    p.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    args = p.parse_args(argv)
    how = ["--instant"] if args.effort is None else ["--effort", str(args.effort)]
    print("| case | noisy, dB | denoised, dB | kept | estimated, dB |\n|---|---|---|---|---|", flush=True)
    for k, (name, (clean, noisy)) in enumerate(cases(args.seed).items()):
        folder = Path(args.out) / str(k)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "noisy.npy", noisy)
        said, refused = io.StringIO(), None
        with contextlib.redirect_stdout(said):
            try:
                denoise.main([str(folder / "noisy.npy"), "--out", str(folder / "clean"), "--force", *how])
            except ValueError as error:
                refused = str(error)
        if refused:
            print(f"| {name} | {psnr(noisy, clean):.2f} | | refused: {refused} | |", flush=True)
            continue
        out = np.load(folder / "clean" / "noisy.npy")
        best = folder / "clean/diffdenoise/best.json"
        found = json.loads(best.read_text()) if best.exists() else {"paper's recipe": dict(psnr=np.nan)}
        kept = max(found, key=lambda method: found[method]["psnr"])
        offset = 20 * np.log10(
            max(float(np.ptp(clean)), 1.0) / float(np.ptp(noisy))
        )  # they are scaled by the noisy range
        estimated = found[kept]["psnr"] + offset
        row = f"{psnr(noisy, clean):.2f} | {psnr(out, clean):.2f} | {kept} | {estimated:.2f}"
        print(f"| {name} | {row} |", flush=True)


if __name__ == "__main__":
    runtime.command(main)
