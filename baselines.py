"""Rivals: denoisers to compare with, on the same file contract. Non-local means needs no training at all.

    In    knee.h5      volumes/<name>/noisy  (S,H,W) float32, about [0,1]
    Out   nlm_out.h5   volumes/<name>/pred   (S,H,W) float32

    python baselines.py --data knee.h5 --sigma 6/255 --out nlm_out.h5          # noise level known
    python baselines.py --data knee.h5 --out nlm_out.h5                        # level estimated, slice by slice
    python baselines.py --data knee.h5 --noise measured --out nlm_out.h5       # level measured by noise.py

Non-local means (Buades et al. 2005) is scikit-image's, fast mode, patch 5, distance 6, h = 0.8 sigma as its
documentation advises. An unknown level is scikit-image's wavelet estimate, which takes the noise to be white.
"""

from skimage.restoration import denoise_nl_means, estimate_sigma

import data
import noise
import runtime


def non_local_means(y, sigma=None):
    """Denoises one slice y (H,W), about [0,1]; sigma is the noise's standard deviation, None to estimate it."""
    sigma = float(estimate_sigma(y)) if sigma is None else sigma
    return denoise_nl_means(y, patch_size=5, patch_distance=6, h=0.8 * sigma, sigma=sigma, fast_mode=True)


def main(argv=None):
    p = runtime.parser(__doc__)
    p.add_argument("--data", required=True, help="dataset (.h5)")
    p.add_argument("--sigma", type=runtime.fraction, help="standard deviation of the noise (default: estimated)")
    p.add_argument("--noise", help="take sigma, slice by slice, from this noise model, as in posterior.py")
    p.add_argument(
        "--split", choices=(*data.SPLITS, "all"), default="all", help="denoise only this split (default all)"
    )
    p.add_argument("--out", default="nlm_out.h5", help="prediction to write (default nlm_out.h5)")
    args = p.parse_args(argv)
    runtime.check_outputs([args.data, args.noise], [args.out])
    model = noise.given(args.noise, args.data) if args.noise else None
    with data.write_volumes(args.out, "prediction", "nlm", vars(args), like=args.data) as new_volume:
        for name, volume in runtime.progress(data.read_volumes(args.data, "noisy", args.split).items(), "nlm"):
            (pred,) = new_volume(name, volume.shape, ["pred"])
            for s in range(volume.shape[0]):
                sigma = noise.variance(model, volume[s]).mean() ** 0.5 if model else args.sigma
                pred[s] = non_local_means(volume[s], sigma)
    print(f"nlm: -> {args.out}", flush=True)


if __name__ == "__main__":
    runtime.command(main)
