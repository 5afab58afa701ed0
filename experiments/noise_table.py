"""How well measure.py finds the noise, from noisy images alone: prints the tables of results/noise_measured.md.

    python -m experiments.noise_table NAME=CLEAN.h5 ... [--xray NAME ...] [--quiet SIGMA]

Adds every noise of the paper at half, one and two times its level to clean images, and measures it. Scanner images
carry noise of their own, which a measurement rightly includes; --quiet removes it from the clean images first, by
non-local means.
Level: error of the standard deviation at the median intensity of the pixels above a tenth of the range. Correlation:
largest error up to two pixels apart.
"""

import numpy as np
from skimage.restoration import denoise_nl_means

import data
import measure
import noise
from lib import runtime

NEAR = slice(noise.REACH - 2, noise.REACH + 3)


def read_images(path, sigma):
    """At most 48 slices of a dataset, evenly spread; sigma: deviation of the noise to remove from them, or None."""
    volumes = data.read_volumes(path)
    slices = [(name, s) for name, volume in volumes.items() for s in range(len(volume))]
    count = max(1, min(48, int(4e6 / np.mean([volume[0].size for volume in volumes.values()]))))
    chosen = np.linspace(0, len(slices) - 1, count).astype(int)
    images = [np.asarray(volumes[name][s]) for name, s in (slices[i] for i in chosen)]
    if not sigma:
        return images
    known = dict(patch_size=5, patch_distance=6, h=0.8 * sigma, sigma=sigma, fast_mode=True)
    return [np.maximum(denoise_nl_means(x, **known), 0) for x in images]


def row(name, images, kind, level, correlation):
    """A line of the table: one kind of noise, at three levels."""
    middle = np.median(np.concatenate([x[x > 0.1] for x in images]))
    off, apart, laws, spots = [], [], set(), []
    for factor in (0.5, 1, 2):
        scaled = level * factor if kind == "gaussian" else level / factor**2
        noisy = [noise.add(x, kind, scaled, correlation, runtime.step_rng(0, s)) for s, x in enumerate(images)]
        lowest = min(x.min() for x in noisy)  # images that are never negative are magnitudes, as for the command
        found, true = measure.measure(noisy, magnitude=lowest >= 0), noise.known(kind, scaled, correlation)
        off.append(float(np.sqrt(noise.variance(found, middle) / noise.variance(true, middle)) - 1))
        apart.append(np.abs(np.array(found["correlation"]) - true["correlation"])[NEAR, NEAR].max())
        laws.add(noise.form(found))
        spots.append(found["blind_spot"])
    errors, apart = ", ".join(f"{100 * o:+.1f} %" for o in off), ", ".join(f"{a:.3f}" for a in apart)
    entries = name, kind, correlation, errors, ", ".join(sorted(laws)), apart, ", ".join(map(str, spots))
    return f"| {' | '.join(map(str, entries))} |"


def main():
    p = runtime.parser(__doc__)
    p.add_argument("sources", nargs="+", metavar="NAME=CLEAN.h5")
    p.add_argument("--xray", nargs="*", default=[], help="names of those with the paper's levels for X-rays")
    p.add_argument("--quiet", type=runtime.fraction, help="deviation of the clean images' own noise, to be removed")
    args = p.parse_args()
    print("| images | noise | correlation | level error at 0.5, 1, 2 times | law | correlation error | blind spot |")
    print("|---|---|---|---|---|---|---|")
    for source in args.sources:
        name, path = source.split("=")
        images = read_images(path, args.quiet)
        levels = dict(poisson=700, gamma=500) if name in args.xray else dict(poisson=200, gamma=100)
        for kind, level in {"gaussian": 6 / 255, **levels}.items():
            for correlation in (0, 0.5, 1.2):
                print(row(name, images, kind, level, correlation), flush=True)


if __name__ == "__main__":
    main()
