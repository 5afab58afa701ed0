"""Beyond the paper: the posterior update, which puts back what the noisy pixel itself knows.

A blind-spot network never looks at the pixel that it predicts, and what is made from its prediction (diffusion, SRDS)
knows no better. Given how far predictions err and how strong the noise is, the noisy value deserves a definite weight:

    x_hat = mu + (V - s2) / V * (y - mu)

This is the linear minimum mean-square-error estimate (LMMSE; for Gaussian noise in Laine et al. 2019, Sec. 3), with mu
the prediction, V the variance of y around it, s2 the noise variance. Its error has variance s2 (V - s2) / V.

    In    knee.h5           volumes/<name>/noisy       (S,H,W) float32, about [0,1]
          srds_out.h5       volumes/<name>/pred (std)  (S,H,W) float32; any prediction file made from knee.h5
    Out   posterior_out.h5  volumes/<name>/pred        (S,H,W) float32: x_hat
                            volumes/<name>/std         standard deviation of the error of x_hat

    python posterior.py --data knee.h5 --pred bsn_out.h5
    python posterior.py --data knee.h5 --pred srds_out.h5 --noise poisson:200 --variance spread --out posterior_out.h5

The noise model is measured in the images (default), stated, or read from a file (measure.py). V comes from

    --variance energy      energy of y - mu around the pixel, Gaussian window of 3 pixels
    --variance spectrum    the same for each spatial frequency: a local Wiener filter of y - mu, for correlated noise
    --variance predicted   the `std` of bsn.py --loss nll, the deviation of y that the network expects
    --variance spread      the `std` of srds.py --pairs K, scaled to the energy of y - mu: few DDIM steps lose variance
    --variance auto        energy for white noise, spectrum for correlated noise (default)
"""

# ---------------------------------------------------------------------------------------------------------------
# core: needs numpy and scipy alone; paste it anywhere
# ---------------------------------------------------------------------------------------------------------------
import numpy as np
from scipy.ndimage import gaussian_filter, uniform_filter
from scipy.special import ndtr


def weight(total_variance, noise_variance):
    """(V - s2) / V, the weight of the noisy value, in [0,1]; 1 where there is no noise. Arrays or numbers."""
    return np.where(
        noise_variance > 0,
        np.maximum(total_variance - noise_variance, 0) / np.maximum(total_variance, 1e-30),
        1.0,
    )


def update(mu, y, total_variance, noise_variance):
    """x_hat = mu + max(V - s2, 0) / V * (y - mu), all (...,H,W): LMMSE estimate of x (Laine et al. 2019, Sec. 3)."""
    return mu + weight(total_variance, noise_variance) * (y - mu)


def signal(mean, variance, air):
    """The signal A (H,W) of magnitude images of that mean and variance; air: their mean and variance without signal.

    The noise of coils makes dark places brighter. However many they are, E M^2 = A^2 + P with P the mean square
    without signal (Koay & Basser 2006 for one).
    """
    return np.sqrt(np.maximum(np.square(mean) + variance - air[0] ** 2 - air[1], 0))


def local_variance(residual, noise_variance, sigma=3.0, where=1.0):
    """V, the variance of y - mu, from its energy (H,W) in a Gaussian window of `sigma` pixels.

    The energy of so few pixels is uncertain, by about V / (sigma sqrt(2 pi)), and an energy below s2 does not mean that
    there is no signal. V is s2 plus the expected positive part of (energy - s2) under that uncertainty.
    where: 0 at pixels (H,W) that do not count, else 1.
    """
    share = np.maximum(gaussian_filter(where * np.ones(residual.shape), sigma), 1e-6)
    energy = gaussian_filter(where * np.square(residual), sigma) / share
    doubt = np.maximum(energy, 1e-30) / (sigma * (2 * np.pi * share) ** 0.5)
    excess = (energy - noise_variance) / doubt
    return noise_variance + doubt * (np.exp(-(excess**2) / 2) / (2 * np.pi) ** 0.5 + excess * ndtr(excess))


def wiener(residual, spectrum, side=8, around=5):
    """Local Wiener filter of y - mu: (the signal in it, the share of the noise variance that stays), both (H,W).

    Args:
        residual: y - mu (H,W), divided by the standard deviation of the noise.
        spectrum: callable (h, w) to the power spectrum of the noise (h,w), of mean 1.
        side: of the DFT blocks, pixels. around: the power at a frequency is the mean over around x around blocks, which
            lie a quarter of a block apart.
    """
    step, (h, w) = side // 4, residual.shape
    window = np.hanning(side + 2)[1:-1]
    window = np.outer(window, window)
    # Power of windowed noise: the DFT of its covariance times the autocorrelation of the window, on a grid that does
    # not wrap, then taken at the frequencies of a block.
    lags = np.fft.ifft2(np.abs(np.fft.fft2(window, (4 * side,) * 2)) ** 2) * np.fft.ifft2(spectrum(4 * side, 4 * side))
    noise_power = np.fft.fft2(lags).real[::4, ::4]
    noise_power = np.maximum(noise_power, 1e-3 * noise_power.mean())
    padded = np.pad(residual, [(side, side + -n % step) for n in (h, w)], mode="symmetric")
    blocks = np.lib.stride_tricks.sliding_window_view(padded, (side, side))[::step, ::step]
    waves = np.fft.fft2(blocks * window)
    power = uniform_filter(np.abs(waves) ** 2, (around, around, 0, 0))
    gain = weight(power, noise_power)
    kept = np.fft.ifft2(waves * gain).real * window
    share = (gain * noise_power).mean((2, 3), keepdims=True) / noise_power.mean()
    left = np.broadcast_to(share * window**2, kept.shape)
    out = np.zeros((3, *padded.shape))
    rows, columns = blocks.shape[:2]
    for i in range(side):  # overlap-add, one pixel of all blocks at a time
        for j in range(side):
            at = np.s_[:, i : i + rows * step : step, j : j + columns * step : step]
            out[at] += np.stack([kept[..., i, j], left[..., i, j], np.broadcast_to(window[i, j] ** 2, (rows, columns))])
    out = out[:, side : side + h, side : side + w]
    return out[0] / out[2], out[1] / out[2]


# ---------------------------------------------------------------------------------------------------------------
# predict
# ---------------------------------------------------------------------------------------------------------------
import torch

import data
import measure
import noise
from lib import runtime

FAINT = 0.02  # share of the mean noise variance below which a prediction is too dark to tell the noise by
VARIANCES = ("auto", "energy", "spectrum", "predicted", "spread")


def estimate(y, mu, noise_model, variance="auto", std=None):
    """(x_hat, its standard deviation) of one slice, all (H,W). `variance`, `std`: see the module."""
    s2, residual = noise.variance(noise_model, mu), np.asarray(y, np.float64) - mu
    faint = FAINT * s2.mean() + 1e-10  # a black background, where a prediction is not quite 0, must not outweigh all
    scale = np.sqrt(np.maximum(s2, faint))
    if variance == "auto":
        variance = "energy" if noise_model["blind_spot"] == 1 else "spectrum"
    if variance == "spectrum":
        kept, left = wiener(residual / scale, lambda h, w: noise.spectrum(noise_model, h, w))
        return np.where(s2 > 0, mu + scale * kept, y), np.sqrt(s2 * left)
    if variance == "energy":  # in units of the noise, which may change across the window
        total = s2 * local_variance(residual / scale, 1.0, where=s2 > faint)
    else:
        total = np.square(std, dtype=np.float64)
    return update(mu, y, total, s2), np.sqrt(s2 * weight(total, s2))


def predict(args):
    """Writes the posterior mean and its standard deviation for every volume of args.pred to args.out."""
    noisy, means = data.read_volumes(args.data), data.read_matching(args.pred, args.data)
    spread = data.read_matching(args.pred, args.data, "std") if args.variance in ("predicted", "spread") else None
    noise_model = measure.load_noise_model(args.noise, args.data, args.pred)
    print(measure.summary(noise_model), flush=True)

    def estimate_tile(stack):  # what `estimate` looks at lies within 32 pixels: large slices go in tiles
        y, mu, *deviation = stack[0].numpy()
        found = estimate(y, mu, noise_model, args.variance, *deviation)
        return torch.from_numpy(np.stack(found, dtype=np.float32))[None]

    made_from = dict(like=args.pred, noise=noise_model)
    with data.write_volumes(args.out, "prediction", "posterior", vars(args), **made_from) as new_volume:
        for name, mu in runtime.progress(means.items(), "posterior"):
            pred, std = new_volume(name, mu.shape, ["pred", "std"])
            factor = 1.0
            if args.variance == "spread":
                energy = np.mean([np.square(spread[name][s]).mean() for s in range(mu.shape[0])])
                factor = data.rms_difference({name: noisy[name]}, {name: mu}) / max(energy, 1e-12) ** 0.5
            for s in range(mu.shape[0]):
                stack = [noisy[name][s], mu[s], *([] if spread is None else [factor * spread[name][s]])]
                stack = torch.from_numpy(np.stack(stack))[None]
                pred[s], std[s] = data.tiled(estimate_tile, stack, 1024)[0].numpy()
    print(f"posterior: {len(means)} volumes -> {args.out}", flush=True)


# ---------------------------------------------------------------------------------------------------------------
# command
# ---------------------------------------------------------------------------------------------------------------
def main(argv=None):
    p = runtime.parser(__doc__)
    p.add_argument("--data", required=True, help="dataset (.h5)")
    p.add_argument("--pred", required=True, help="prediction file (.h5) made from it")
    p.add_argument("--noise", default="measured", help=measure.NOISE_HELP)
    p.add_argument("--variance", choices=VARIANCES, default="auto", help="where V comes from, see above (default auto)")
    p.add_argument("--out", default="posterior_out.h5", help="prediction to write (default posterior_out.h5)")
    args = p.parse_args(argv)
    runtime.check_outputs([args.data, args.pred, args.noise], [args.out])
    predict(args)


if __name__ == "__main__":
    runtime.command(main)
