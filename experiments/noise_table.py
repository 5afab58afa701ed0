"""How well `noise.py measure` finds the noise, from noisy images alone: results/noise_measured.md.

    python results/noise_table.py NAME=CLEAN.h5 ... [--xray NAME ...] [--quiet SIGMA]

Adds every noise of the paper at half, one and two times its level to clean images, and measures it. Scanner images
carry noise of their own, which a measurement rightly includes: --quiet takes it out of the clean images first
(non-local means).
Level: error of the standard deviation at the median intensity of the pixels above a tenth of the range. Correlation:
largest error up to two pixels apart.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from skimage.restoration import denoise_nl_means

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import measure
import noise
import runtime

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("sources", nargs="+", metavar="NAME=CLEAN.h5")
p.add_argument("--xray", nargs="*", default=[], help="names of those with the paper's levels for X-rays")
p.add_argument("--quiet", type=runtime.fraction, help="deviation of the clean images' own noise, to be taken out")
args = p.parse_args()
print("| images | noise | correlation | level error at 0.5, 1, 2 times | form | correlation error | blind spot |")
print("|---|---|---|---|---|---|---|")
near = slice(noise.REACH - 2, noise.REACH + 3)
for source in args.sources:
    name, path = source.split("=")
    volumes = data.read_volumes(path)
    slices = [(v, s) for v, volume in volumes.items() for s in range(len(volume))]
    count = max(1, min(48, int(4e6 / np.mean([v[0].size for v in volumes.values()]))))
    images = [
        np.asarray(volumes[v][s]) for v, s in (slices[i] for i in np.linspace(0, len(slices) - 1, count).astype(int))
    ]
    if args.quiet:
        known = dict(patch_size=5, patch_distance=6, h=0.8 * args.quiet, sigma=args.quiet, fast_mode=True)
        images = [np.maximum(denoise_nl_means(x, **known), 0) for x in images]
    values = np.concatenate([x.ravel() for x in images])
    middle = np.median(values[values > 0.1])
    levels = dict(gaussian=6 / 255, poisson=700 if name in args.xray else 200, gamma=500 if name in args.xray else 100)
    for kind, level in levels.items():
        for correlation in (0, 0.5, 1.2):
            off, apart, forms, spots = [], [], [], []
            for factor in (0.5, 1, 2):
                scaled = level * factor if kind == "gaussian" else level / factor**2
                noisy = [noise.add(x, kind, scaled, correlation, runtime.step_rng(0, s)) for s, x in enumerate(images)]
                lowest = min(x.min() for x in noisy)  # as the command does: never negative, a magnitude
                model, truth = measure.measure(noisy, magnitude=lowest >= 0), noise.known(kind, scaled, correlation)
                off.append(float(np.sqrt(noise.variance(model, middle) / noise.variance(truth, middle)) - 1))
                apart.append(np.abs(np.array(model["correlation"]) - truth["correlation"])[near, near].max())
                forms.append(model["form"])
                spots.append(model["blind_spot"])
            errors = ", ".join(f"{100 * o:+.1f} %" for o in off)
            print(
                f"| {name} | {kind} | {correlation} | {errors} | {', '.join(sorted(set(forms)))} "
                f"| {', '.join(f'{a:.3f}' for a in apart)} | {', '.join(map(str, spots))} |",
                flush=True,
            )
