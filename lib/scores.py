"""PSNR, SSIM and noise leak of images whose clean version is known, and the table of them."""

import itertools

import numpy as np
from scipy.stats import wilcoxon
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

PROTOCOL = "PSNR (dB) and SSIM: scikit-image, data_range 1, 7x7 window, per slice, not clipped; mean ± sd over slices."


def psnr_ssim(x, clean):
    """(PSNR in dB, SSIM) of one slice x (H,W) against the clean one; range 1, no clipping."""
    return peak_signal_noise_ratio(clean, x, data_range=1.0), structural_similarity(clean, x, data_range=1.0)


def leak(x, clean, noisy):
    """Share of the noise that is left in x: <x - clean, n> / <n, n>, n = noisy - clean. Arrays of any equal shape."""
    n = np.asarray(noisy, np.float64) - clean
    return float(((x - clean) * n).sum() / (n * n).sum())


def summary(slices):
    """The measures of one method as plain numbers."""
    p, s = slices["psnr"], slices["ssim"]
    return dict(psnr=p.mean(), psnr_sd=p.std(), ssim=s.mean(), ssim_sd=s.std(), leak=slices["leak"].mean(), n=len(p))


def markdown(methods):
    """The table of {method: per-slice measures}, with the protocol, and the pairs that the slices cannot tell apart."""
    lines = ["| method | PSNR | SSIM | leak |", "|---|---|---|---|"]
    for name, slices in methods.items():
        m = summary(slices)
        psnr, ssim = (f"{m[k]:.{d}f} ± {m[k + '_sd']:.{d}f}" for k, d in (("psnr", 2), ("ssim", 4)))
        lines.append(f"| {name} | {psnr} | {ssim} | {m['leak']:.3f} |")
    n = len(next(iter(methods.values()))["psnr"])
    lines += ["", f"{n} slices. {PROTOCOL}"]
    if len(methods) > 1:
        pairs = comparisons(methods)
        told = [f"{a} / {b} p = {p:.2g}" for (a, b), p in pairs.items() if p >= 0.001]
        if len(told) < len(pairs):
            told.append("all other pairs p < 0.001" if told else "all pairs p < 0.001")
        lines.append(f"Paired Wilcoxon test of PSNR, two-sided: {'; '.join(told)}.")
    return "\n".join(lines)


def comparisons(methods):
    """{(method, method): p} of the paired Wilcoxon test on the PSNR of each slice."""
    gaps = {(a, b): methods[a]["psnr"] - methods[b]["psnr"] for a, b in itertools.combinations(methods, 2)}
    return {pair: float(wilcoxon(gap).pvalue) if np.any(gap) else 1.0 for pair, gap in gaps.items()}
