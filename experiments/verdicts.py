"""Is the verdict without clean images right? Good and bad denoising of the built-in brain and of given volumes.

    python -m experiments.verdicts HEAD_DICOM T2W.nii.gz > table.md      # results/report.md has the table

Noise is added to slices in the middle of each volume; the network of weights/ denoises them, told the true law. Then
what it made is spoilt in a known way, or judged by a wrong law. A row: the six measures (lib/residual.py), means over
the slices, what the verdict must say, and whether it does.
"""

import sys

import numpy as np
import torch
from scipy.ndimage import gaussian_filter, median_filter

import data
import distill
import evaluate
import noise
from lib import files, runtime

NOISES = ("gaussian:6/255", "gaussian:12/255", "poisson:200", "gaussian:6/255:0.5", "gaussian:6/255:1.2")
MEASURES = ("removed", "correlation error", "structure", "flat", "left", "spectrum")
SLICES = 3


def scaled(noise_model, factor):
    """The noise model with that many times the deviation."""
    return {**noise_model, "variance": [factor**2 * v for v in noise_model["variance"]]}


def denoised(volume, y, noise_model, which):
    """The slices `which` of y (S,H,W), by the shipped network told a law."""
    f = distill.student("weights/volumes.pt", told=(noise_model, {volume: y}))
    stacks = (torch.from_numpy(data.read_around(y, s, f.context))[None] for s in which)
    return np.stack([f(stack)[0, 0].numpy() for stack in stacks])


def cases(volume, clean, kind, level, blur):
    """Yields (name of the case, what is said of it, measures) for one volume (S,H,W) in [0,1] and one noise."""
    rng, law = np.random.default_rng(0), noise.known(kind, level, blur)
    y = np.stack([noise.add(x, kind, level, blur, rng) for x in np.maximum(clean, 0)])
    which = range(len(y) // 2 - SLICES // 2, len(y) // 2 + SLICES // 2 + 1)
    noisy, good = y[which], denoised(volume, y, law, which)
    smooth = np.stack([gaussian_filter(x, 1.5) for x in good])
    lost = np.stack([median_filter(x, 7) for x in good])
    few = {
        "good": ("", good, law),
        "blurred, sigma 1.5": ("fine detail is lost", smooth, law),
        "median of 7x7": ("fine detail is lost", lost, law),
        "half of the noise put back": ("noise is left", (good + noisy) / 2, law),
        "law x 1.5": ("noise model is too high", good, scaled(law, 1.5)),
        "law x 0.6": ("noise model is too low", good, scaled(law, 0.6)),
        "told law x 1.5": ("any", denoised(volume, y, scaled(law, 1.5), which), scaled(law, 1.5)),
        "told law x 0.6": ("any", denoised(volume, y, scaled(law, 0.6), which), scaled(law, 0.6)),
    }
    for name, (must, x, model) in few.items():
        found = [evaluate.no_reference(*pair, model) for pair in zip(noisy, x)]
        yield name, must, {key: float(np.mean([one[key] for one in found])) for key in MEASURES}


def right(must, m):
    """Whether the verdict says what it must: "" is that all is well, "any" that something is not."""
    said = evaluate.verdict(m)
    well = "nothing else" in said
    return well if not must else not well if must == "any" else must in said


def main():
    volumes, problems = files.read_sources(sys.argv[1:], brain=True, slices=2 * SLICES + 3)
    print(f"| volume | noise | case | {' | '.join(MEASURES)} | must say | right |")
    print(f"|{'---|' * (len(MEASURES) + 5)}")
    for volume in volumes:
        clean, _, _ = files.normalize(volume)
        for text in NOISES:
            kind, level, blur = (*text.split(":"), "0")[:3]
            for name, must, m in cases(volume.name, clean, kind, runtime.fraction(level), float(blur)):
                numbers = " | ".join(f"{m[key]:.2f}" for key in MEASURES)
                yes = "yes" if right(must, m) else "**no**"
                print(f"| {volume.name} | {text} | {name} | {numbers} | {must or 'well'} | {yes} |", flush=True)


if __name__ == "__main__":
    main()
