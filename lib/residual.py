"""What was removed, in units of the noise that was expected there: is it noise, and is it all of it?

    removed            mean energy of the residual, 1 for all of the noise and nothing else
    flat               the same where the output is flattest, where structure is rare: the check of the noise law
    left               share of the noise's amplitude that is still in the output there: in flat places the output and
                       the residual vary together only if both hold parts of the same noise. Needs no level
    correlation error  largest difference between its correlation and the noise's, up to 2 pixels apart
    structure          correlation of its energy (5x5 pixels) with the gradient of the output: 0 for noise
    spectrum           its largest power at any frequency, in units of the noise's at that frequency: up to 1 for noise

`gain` compares it with what a denoiser takes off from fresh noise: by what factor the noise is stronger than the model
says.

It knows no noise model: the variance at each pixel, the table of correlations and the spectrum are handed in.
"""

import numpy as np
from scipy.ndimage import gaussian_filter, uniform_filter

BANDS = 24  # of spatial frequency, from 0 to 0.5 cycles per pixel
FLAT = 0.25  # share of the pixels that counts as flat
# Between what the verdict must tell apart: results/report.md.
TOO_LITTLE, TOO_MUCH, STRUCTURE, CORRELATION = 0.45, 1.25, 0.2, 0.2
LEVEL, LEFT, SPECTRUM = (0.55, 1.3), 0.25, 2.0
UNTOUCHED = 1e-3  # share of the noise's energy below which nothing was removed
BLOCK = 8  # pixels: side of the blocks in which `gain` looks at the noise
EDGES = np.linspace(-5, 5, 41)  # of the histogram, in standard deviations


def standardized(y, x, s2):
    """(residual (H,W) in standard deviations of the noise, where there is noise (H,W) bool).

    y, x: noisy and denoised slice. s2: variance of the noise at each pixel, 0 where there is none (masked background).
    """
    noisy = s2 > 1e-3 * s2.max()
    off = np.asarray(y, np.float64) - np.asarray(x, np.float64)
    return np.where(noisy, off / np.sqrt(np.maximum(s2, 1e-12)), 0), noisy


def measure(y, x, s2, table, power):
    """The measures of the module, {name: number}, of one slice.

    y, x, s2: as of `standardized`. table: (2r+1,2r+1) correlation of the noise with the pixels up to r away. power:
    (H,W) its spectrum at unit variance on the grid of a DFT. All are 0 if there is no noise.
    """
    residual, noisy = standardized(y, x, s2)
    if not noisy.any():
        return dict.fromkeys(("removed", "correlation error", "structure", "flat", "left", "spectrum"), 0.0)
    centre = len(table) // 2
    lags = [(dy, dx) for dy in range(3) for dx in range(-2, 3) if dy or dx > 0]
    off = max(abs(correlation(residual, *lag) - table[centre + lag[0], centre + lag[1]]) for lag in lags)
    edges = np.hypot(*np.gradient(gaussian_filter(np.asarray(x, np.float64), 1)))
    local = uniform_filter(np.square(residual), 5) / np.maximum(uniform_filter(noisy.astype(float), 5), 1e-6)
    varies = np.ptp(local[noisy]) > 0 and np.ptp(edges[noisy]) > 0
    flat = noisy & (edges <= np.quantile(edges[noisy], FLAT))
    _, found, expected = spectra(residual, noisy, power)
    return {
        "removed": float(np.square(residual).sum() / noisy.sum()),
        "correlation error": float(off),
        "structure": float(np.corrcoef(local[noisy], edges[noisy])[0, 1]) if varies else 0.0,
        "flat": float(np.square(residual[flat]).mean()),
        "left": left(x, residual, s2, flat),
        "spectrum": float((found / expected).max()) if len(found) else 0.0,
    }


def correlation(residual, dy, dx):
    """Correlation of a field (H,W) with itself dy rows and dx columns away."""
    h, w = residual.shape
    a = residual[dy:, max(dx, 0) : w + min(dx, 0)]
    b = residual[: h - dy, max(-dx, 0) : w + min(-dx, 0)]
    return (a * b).sum() / max(np.sqrt(np.square(a).sum() * np.square(b).sum()), 1e-12)


def left(x, residual, s2, flat):
    """Share of the noise's amplitude in the output x, from 0 to 1, by the flat pixels.

    With a share a of the noise n left, the output varies there by a n and the residual is (1 - a) n: the slope of one
    on the other is a / (1 - a). Only what is finer than 2 pixels is compared: the coarser is the image.
    """
    fine = (np.asarray(x, np.float64) - gaussian_filter(np.asarray(x, np.float64), 2)) / np.sqrt(np.maximum(s2, 1e-12))
    r = (residual - gaussian_filter(residual, 2))[flat]
    if np.square(r).mean() < 1e-4:  # nothing was removed
        return 1.0
    slope = max((fine[flat] * r).sum() / max(np.square(r).sum(), 1e-12), 0)
    return float(slope / (1 + slope))


def spectra(residual, noisy, power):
    """(frequencies (n,) in cycles per pixel, power of the residual, power of the noise), means over rings.

    noisy: where the residual counts. power: (H,W) spectrum of the noise at unit variance. A ring of fewer than 40
    coefficients is left out: its mean would say little.
    """
    h, w = residual.shape
    window = np.outer(np.hanning(h + 2)[1:-1], np.hanning(w + 2)[1:-1]) * noisy
    found = np.abs(np.fft.fft2(residual * window)) ** 2 / max(np.square(window).sum(), 1e-12)
    radius = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w)[None])
    ring = np.minimum((radius * 2 * BANDS).astype(int), BANDS)  # the corners, beyond 0.5, are the last
    count = np.bincount(ring.ravel(), minlength=BANDS + 1)[:BANDS]
    kept = count >= 40
    rings = [np.bincount(ring.ravel(), a.ravel(), BANDS + 1)[:BANDS][kept] / count[kept] for a in (found, power)]
    return ((np.arange(BANDS) + 0.5) / (2 * BANDS))[kept], rings[0], np.maximum(rings[1], 1e-3)


def findings(m):
    """What may be wrong by the measures of the module: [(how much, in words)]; wrong is what has more than 1.

    A noise model of a wrong level shifts all energies alike. Flat places tell the true one, and the other measures are
    judged relative to it.
    """
    flat, removed, left = max(m["flat"], 1e-3), m["removed"], m["left"]
    wrong = left <= LEFT and not LEVEL[0] <= flat <= LEVEL[1]
    share, excess = 100 * removed, m["spectrum"] / flat
    little = max(left / LEFT, 0 if wrong else min(TOO_LITTLE / max(removed, 1e-3), 9))
    less, more = (0 if left > LEFT else LEVEL[0] / flat), flat / LEVEL[1]
    lost = "fine detail is lost"
    return [
        (
            little,
            f"{share:.0f} % of the noise's energy was removed, and {100 * left:.0f} % of its amplitude is still in "
            "flat places: noise is left",
        ),
        (
            removed / TOO_MUCH / (flat if more > 1 else 1),
            f"{share:.0f} % of the noise's energy was removed: structure went with it",
        ),
        (
            m["structure"] / STRUCTURE,
            f"what was removed is stronger at edges (correlation {m['structure']:.2f}): {lost} there",
        ),
        (
            excess / SPECTRUM,
            f"what was removed has up to {excess:.1f} times the power of noise at one size of detail: {lost}",
        ),
        (
            less,
            f"flat places had {100 * flat:.0f} % of the expected noise, and none is left: the noise model is too high",
        ),
        (more, f"{100 * flat:.0f} % of the expected noise was removed from flat places: the noise model is too low"),
        (
            m["correlation error"] / CORRELATION,
            f"what was removed is not correlated as the noise is (off by {m['correlation error']:.2f})",
        ),
    ]


def rank(m):
    """How wrong the measures are, above 1 for what is wrong; 0 where nothing was removed."""
    return 0.0 if m["removed"] < UNTOUCHED else max(how_much for how_much, _ in findings(m))


def said(m):
    """What the measures mean, [words]: what is wrong, the worst first; or that nothing is."""
    if m["removed"] < UNTOUCHED:
        return ["nothing was removed: the images are as they were"]
    wrong = sorted((one for one in findings(m) if one[0] > 1), key=lambda one: -one[0])
    return [words for _, words in wrong] or ["what was removed looks like noise and nothing else"]


def verdict(m):
    """`said` in one line."""
    return "; ".join(said(m))


def in_squares(v):
    """Means over BLOCK x BLOCK pixels of (S,H,W); those at the lower and right rim may be smaller."""
    (_, h, w), ends = v.shape, np.add.reduceat
    sums = ends(ends(v.astype(np.float64), np.arange(0, h, BLOCK), 1), np.arange(0, w, BLOCK), 2)
    sides = [np.diff(np.append(np.arange(0, n, BLOCK), n)) for n in (h, w)]
    return sums / np.outer(*sides)


def texture(x):
    """Energy of the coarse detail of slices (S,H,W), hardly touched by noise that a denoiser left, as `in_squares`."""
    return in_squares(np.square(gaussian_filter(x, (0, 0.7, 0.7)) - gaussian_filter(x, (0, 3, 3))))


def gain(y, x, z, a, s2, dark=0.0, apart=None):
    """By what factor the noise around each block is stronger than the model says: smooth, about 1, (S,H/8,W/8).

    Args, all (S,H,W): y noisy; x = f(y), what a denoiser f makes of it; z fresh noise of the model, a the derivative
    of f along it (noise.directional_derivative); s2 its variance. dark: of the noise model.
    apart: how many slices lie from one of these to the next; None if they have nothing in common.

    Of noise z, f takes off z - a; of the image y it took off y - x. The ratio of their energies at high frequencies is
    the square of the gain. Its logarithm is averaged over about 1.5 blocks and 2 slices around; blocks that stand out,
    where structure was taken off, count little. Blocks without noise, and dark ones, take the gain of others.
    """
    least, same = 0.02 * s2.mean() + 1e-12, np.zeros(y.shape, bool)  # dark places of Poisson noise tell nothing
    same[:, 1:, 1:] = (y[:, 1:, 1:] == y[:, :-1, 1:]) & (y[:, 1:, 1:] == y[:, 1:, :-1])  # nor those without photons
    sigma, level = (2 / apart if apart else 0, 1.5, 1.5), np.sqrt(np.maximum(s2, least))
    taken = ((y - x) / level, (z - a) / level)
    energy = (in_squares(np.square(v - gaussian_filter(v, (0, 0.7, 0.7)))) for v in taken)
    removed, expected = (np.maximum(v, 1e-12) for v in energy)
    expected = gaussian_filter(expected, (0, 0.7, 0.7))
    keep = (in_squares(same) < 0.15) & (removed > 1e-3 * expected) & (in_squares(s2) > least)
    if dark:
        keep &= in_squares(x) > dark
    if not keep.any():
        return np.ones(removed.shape)
    ratio = np.log(removed / expected)
    share, middle = keep.astype(float), np.median(ratio[keep])
    for _ in range(6):
        smooth = gaussian_filter(share * ratio, sigma, mode="constant") + 1e-3 * middle
        smooth /= gaussian_filter(share, sigma, mode="constant") + 1e-3
        off = ratio - smooth
        share = keep / (1 + np.square(off / np.where(off > 0, 0.15, 0.3)))
    return np.exp(smooth / 2)
