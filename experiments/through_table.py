"""How well measure.py finds the correlation of noise through the slices: results/noise_through.md.

    python -m experiments.through_table NAME=CLEAN.h5 ... > results/noise_through.md

Adds noise to the middle 40 slices of clean volumes, blurred through them by 0, 0.5 and 1 slices, and measures how it is
correlated one and two slices away. A Gaussian blur of 0.5 is that of interpolated volumes, 1 that of overlapping CT.
"""

import argparse

import numpy as np
from scipy.ndimage import gaussian_filter1d

import data
import measure
import noise
from lib import blocks, runtime

CASES = (("gaussian", 6 / 255, 0), ("gaussian", 6 / 255, 1.2), ("poisson", 200, 0))
SLICES = 40


def noisy_volume(x, law, blur, rng):
    """(x with noise, [r1, r2] of that noise); x (S,H,W) clean, law: a noise model, blur: in slices."""
    n = rng.standard_normal(x.shape, dtype=np.float32)
    if np.count_nonzero(law["correlation"]) > 1:
        n = np.fft.ifft2(np.fft.fft2(n) * np.sqrt(noise.spectrum(law, *x.shape[1:]))).real
    n = gaussian_filter1d(n, blur, axis=0) if blur else n
    n /= n.std()
    y = (x + n * np.sqrt(noise.variance(law, x))).astype(np.float32)
    return y, [float(np.mean(n[lag:] * n[:-lag])) for lag in (1, 2)]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("sources", nargs="+", metavar="NAME=CLEAN.h5")
    args = p.parse_args(argv)
    print("| images | noise | correlation | blur | one slice away: true, found | two slices away: true, found |")
    print("|---|---|---|---|---|---|")
    worst = [0.0, 0.0]
    for source in args.sources:
        name, path = source.split("=")
        x = np.concatenate([np.asarray(v[:]) for v in in_order(path)])
        x = x[max(0, len(x) // 2 - SLICES // 2) :][:SLICES]
        for kind, level, correlation in CASES:
            law = noise.known(kind, level, correlation)
            for blur in (0, 0.5, 1):
                y, true = noisy_volume(x, law, blur, runtime.step_rng(0))
                table = measure.measure_correlation(list(y[::5]))
                found = [blocks.shared_through([y], table, lag) for lag in (1, 2)]
                worst = [max(w, abs(f - t)) for w, f, t in zip(worst, found, true)]
                numbers = " | ".join(f"{t:+.3f}, {f:+.3f}" for t, f in zip(true, found))
                print(f"| {name} | {kind} | {correlation} | {blur} | {numbers} |", flush=True)
    print(f"\nLargest error: {worst[0]:.3f} one slice away, {worst[1]:.3f} two.")


def in_order(path):
    """The volumes of a dataset in the order of their names: the blocks of slices that `data.py import` made."""
    volumes = data.read_volumes(path)
    return [volumes[name] for name in sorted(volumes)]


if __name__ == "__main__":
    runtime.command(main)
