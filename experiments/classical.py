"""Denoisers without training, from packages of their own, on the same files as the stages.

    In    knee.h5        volumes/<name>/noisy  (S,H,W) float32, about [0,1]
    Out   bm4d_out.h5    volumes/<name>/pred   (S,H,W) float32

    python -m experiments.classical --data knee.h5 --method bm4d --noise gaussian:6/255 --split test
    python -m experiments.classical --data knee.h5 --method bm3d --noise measured

    bm3d     slice by slice, block matching and 3D filtering (Dabov et al. 2007; `bm3d`, research licence)
    bm4d     the volume, the same with cubes (Maggioni et al. 2013; `bm4d`, research licence)
    dipy     the volume, non-local means (Descoteaux et al. 2008; `dipy`: its method "classic", blocks of radius 5)
    ants     the volume, adaptive non-local means (Manjon et al. 2010; `antspyx`: denoise_image as it comes)

BM3D and BM4D are told the noise model: its level and its power spectrum; dipy is told its level, and ants finds it by
itself. dipy's own default, "blockwise" (1.12), left T2-weighted slices worse than they came; ANTs for "Rician" noise,
its default, was a dB better on Gaussian noise than for "Gaussian". Noise that depends on intensity is made uniform
first and the result transformed back: Poisson noise by Anscombe's transform with its exact unbiased inverse (Makitalo &
Foi 2011, closed form), other models by the integral of 1 / standard deviation. Install the packages with
`pip install -r experiments/requirements.txt`; each is imported only when it is used.
"""

import importlib

import numpy as np

import data
import measure
import noise
from lib import runtime

METHODS = {"bm3d": "bm3d", "bm4d": "bm4d", "dipy": "dipy.denoise.nlmeans", "ants": "ants"}
MARGIN = 6  # voxels of mirrored image around it for dipy, which leaves the borders as they are


def load(method):
    """The module of a method's package; raises ValueError with one line if it is not installed, or cannot run here."""
    how = "pip install -r experiments/requirements.txt, in an environment of their own"
    if method in ("bm3d", "bm4d") and not hasattr(np, "trapz"):
        raise ValueError(f"--method {method} needs NumPy before 2.4, not {np.__version__}: {how}")
    try:
        return importlib.import_module(METHODS[method])
    except ImportError as error:
        raise ValueError(f"--method {method} needs a package of its own ({error}): {how}") from None


def stabilize(noise_model):
    """(forward, inverse) to and from intensities at which the noise has unit variance, for arrays of any shape."""
    a, b, c = noise_model["variance"]
    if b == c == 0:
        return (lambda y: y / a**0.5), (lambda z: z * a**0.5)
    if a == c == 0:  # Poisson(x / b) b

        def inverse(z):
            z = np.maximum(z, 1.5**0.5)  # what no photons at all give: below, the closed form grows without bound
            x = z**2 / 4 + 1.5**0.5 / (4 * z) - 11 / (8 * z**2) + 5 * 1.5**0.5 / (8 * z**3) - 1 / 8
            return b * np.maximum(x, 0)

        return (lambda y: 2 * np.sqrt(np.maximum(y / b + 3 / 8, 0))), inverse
    grid = np.linspace(-0.2, 2, 20001)
    level = np.sqrt(np.maximum(noise.variance(noise_model, grid), 1e-3 * noise.variance(noise_model, 0.5)))
    table = np.append(0, np.cumsum((1 / level[1:] + 1 / level[:-1]) / 2) * (grid[1] - grid[0]))
    return (lambda y: np.interp(y, grid, table)), (lambda z: np.interp(z, table, grid))


def denoise_volume(method, volume, noise_model):
    """volume (S,H,W), about [0,1], denoised by `method`, which is told the noise model; (S,H,W) float32.

    Raises ValueError if the package is not installed, or a volume is too small for its blocks.
    """
    package = load(method)
    y = np.asarray(volume, np.float64)
    count = len(y)
    if method == "bm4d" and count < 8:  # its cubes are that thick: mirrored slices fill up
        if count < 5:
            raise ValueError(f"bm4d needs volumes of at least 5 slices, not {count}")
        y = np.pad(y, ((0, 8 - count), (0, 0), (0, 0)), "reflect")
    forward, inverse = stabilize(noise_model)
    z, white = forward(y), np.count_nonzero(noise_model["correlation"]) == 1
    power = noise.spectrum(noise_model, *y.shape[1:]) * y[0].size  # their unit: |DFT|^2 of the noise
    if method == "bm3d":
        out = np.stack([package.bm3d(image, 1.0 if white else power) for image in z])
    elif method == "dipy":
        padded, inner = np.pad(z, MARGIN, "symmetric"), np.s_[MARGIN:-MARGIN,] * 3
        flags = dict(patch_radius=1, block_radius=5, rician=False, method="classic", num_threads=1)
        out = package.nlmeans(padded.T, sigma=1.0, mask=np.ones(padded.T.shape), **flags).T[inner]
    elif method == "ants":
        out = package.denoise_image(package.from_numpy(z.T.astype(np.float32))).numpy().T
    else:
        out = package.bm4d(z, 1.0 if white else np.broadcast_to(power * len(y), y.shape).copy())
    return inverse(np.asarray(out).reshape(y.shape))[:count].astype(np.float32)


def main(argv=None):
    p = runtime.parser(__doc__)
    p.add_argument("--data", required=True, help="dataset (.h5)")
    p.add_argument("--method", choices=METHODS, required=True, help="see above")
    p.add_argument("--noise", default="measured", help=measure.NOISE_HELP)
    p.add_argument("--split", choices=(*data.SPLITS, "all"), default="all", help="only this split (default all)")
    p.add_argument("--out", default="METHOD_out.h5", help="prediction to write (default METHOD_out.h5)")
    args = p.parse_args(argv)
    args.out = args.out.replace("METHOD", args.method)
    runtime.check_outputs([args.data, args.noise], [args.out])
    load(args.method)
    noise_model, noisy = measure.load_noise_model(args.noise, args.data), data.read_volumes(args.data, split=args.split)
    with data.write_volumes(args.out, "prediction", args.method, vars(args), like=args.data, noise=noise_model) as add:
        for name, volume in runtime.progress(noisy.items(), args.method):
            (pred,) = add(name, volume.shape, ["pred"])
            pred[:] = denoise_volume(args.method, np.asarray(volume[:]), noise_model)
    print(f"{args.method}: {len(noisy)} volumes -> {args.out}", flush=True)


if __name__ == "__main__":
    runtime.command(main)
