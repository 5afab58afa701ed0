"""What noise is: add it to clean images (Sec. 4.1 of the paper), draw more of it, have it measured in noisy ones.

    gaussian   x + n, n of standard deviation `level`                  the paper: 6/255
    poisson    Poisson(level * x) / level: variance x / level          200 (MRI), 700 (X-ray)
    gamma      x * g, g ~ Gamma(level, rate level), mean 1             100 (MRI), 500 (X-ray)

Correlated noise of parameter s (0.5 or 1.2): one such noise field is blurred by a Gaussian of sigma s pixels and scaled
back to the power it had; a second, independent field of the same kind is added, and the sum divided by sqrt(2).
Nothing is clipped.

A noise *model* is a plain dict: `variance` [a, b, c], the noise level function a + b x + c x^2 of clean intensity x;
`correlation`, a (13,13) table for offsets of up to 6 pixels, 1 in its centre; `form`, `blind_spot`: what they imply;
`compressed`: the images were stored as JPEG, so that no such model holds. measure.py makes it from noisy images alone.

    In    clean.h5    volumes/<name>/clean, or `noisy` where there is no clean: the images to add noise to
          knee.h5     volumes/<name>/noisy (S,H,W) float32: the images whose noise is measured
    Out   knee.h5     volumes/<name>/clean and noisy (S,H,W) float32;  noise.json: the measured model

    python noise.py add --data clean.h5 --kind gaussian --level 6/255 --seed 0 --out knee.h5
    python noise.py add --data clean.h5 --kind poisson --level 200 --correlation 1.2 --seed 0 --out knee_poisson.h5
    python noise.py measure --data knee.h5                               # before any training: which blind spot?
    python noise.py measure --data knee.h5 --pred bsn_out.h5 --out noise.json   # closer where the image has structure
"""

# ---------------------------------------------------------------------------------------------------------------
# core: needs numpy and scipy alone; paste it anywhere
# ---------------------------------------------------------------------------------------------------------------
import numpy as np
from scipy.ndimage import gaussian_filter

KINDS = ("gaussian", "poisson", "gamma")
REACH = 6  # pixels: noise farther apart counts as independent
SEEN = 0.065  # correlation between neighbours that a blind spot must not leave open


def white(x, kind, level, generator):
    """Noise n of a clean image x, independent from pixel to pixel, so that x + n is the noisy image.

    Args: x (..., H, W), about [0,1]; kind, level: see the module; generator: numpy Generator.
    Raises ValueError for an unknown kind, a level that is not positive, or Poisson noise of negative intensities.
    """
    if kind not in KINDS:
        raise ValueError(f"noise kind {kind!r} is not one of {', '.join(KINDS)}")
    if not level > 0:
        raise ValueError(f"noise level {level:g} is not positive")
    if kind == "gaussian":
        return generator.normal(0, level, x.shape)
    if kind == "gamma":
        return x * (generator.gamma(level, 1 / level, x.shape) - 1)
    if x.min() < 0:
        raise ValueError(f"Poisson noise needs intensities of at least 0; the lowest is {x.min():g}")
    return generator.poisson(level * x) / level - x


def add(x, kind, level, correlation=0, generator=None):
    """A noisy version of the clean image x (H,W), float32, unclipped (Sec. 4.1).

    Args: kind, level: see the module. correlation: sigma of the blur in pixels, 0 for white noise.
    generator: numpy Generator; None draws fresh noise.
    """
    generator = generator or np.random.default_rng()
    x = np.asarray(x, np.float64)
    n = white(x, kind, level, generator)
    if correlation:
        blurred = gaussian_filter(n, correlation, mode="wrap")
        blurred *= np.sqrt(
            np.mean(n**2) / max(np.mean(blurred**2), 1e-30)
        )  # a black slice has no Poisson or Gamma noise
        n = (blurred + white(x, kind, level, generator)) / np.sqrt(2)
    return (x + n).astype(np.float32)


def known(kind, level, correlation=0):
    """The model of the noise that `add` makes."""
    power = {"gaussian": level**2, "poisson": 1 / level, "gamma": 1 / level}[kind]
    table = np.zeros((8 * REACH + 1,) * 2)
    table[4 * REACH, 4 * REACH] = 1
    if correlation:
        blurred = gaussian_filter(gaussian_filter(table, correlation), correlation)
        table = (blurred / blurred.max() + table) / 2
    return described(
        [power * (k == KINDS.index(kind)) for k in range(3)], table[3 * REACH : -3 * REACH, 3 * REACH : -3 * REACH]
    )


def described(coefficients, correlation, compressed=False):
    """A model from its numbers: adds the form's name and the blind spot that hides a pixel's correlated neighbours."""
    form = "gamma" if coefficients[2] else "poisson-gaussian" if coefficients[1] else "gaussian"
    offset = np.abs(np.arange(-REACH, REACH + 1))
    distance = offset[:, None] + offset[None]  # the hole of bsn.py is a diamond
    beyond = [np.abs(correlation)[(distance > radius) & (distance <= 4)].max() for radius in (0, 2)]
    blind_spot = 1 if beyond[0] < SEEN else 5 if beyond[1] < SEEN else 9
    return dict(
        form=form,
        variance=[float(v) for v in coefficients],
        correlation=np.round(correlation, 5).tolist(),
        blind_spot=blind_spot,
        compressed=bool(compressed),
    )


def variance(model, x):
    """Variance of the noise at clean intensity x: an array like x. Estimates of x below 0 count as 0."""
    a, b, c = model["variance"]
    x = np.maximum(x, 0)
    return a + b * x + c * x**2


def spectrum(model, h, w):
    """Power spectrum (h,w) of the noise at unit variance, on the grid of a DFT of h x w pixels; its mean is 1."""
    table = np.zeros((h, w))
    reach = [min(REACH, (n - 1) // 2) for n in (h, w)]
    inner = np.asarray(model["correlation"])[tuple(slice(REACH - r, REACH + r + 1) for r in reach)]
    table[np.ix_(*(np.arange(-r, r + 1) for r in reach))] = inner
    power = np.maximum(np.fft.fft2(table).real, 0)
    return power / power.mean()


def sample(model, x, generator, y=None):
    """Noise of the model for clean images x (...,H,W): what the scanner might have added. Same shape, float32.

    y: the noisy images. Noise cannot be stronger than what varies: where y varies with less than half the energy that
    the model expects (a masked background, or one that a fitted curve overestimates), the noise has that energy.
    """
    n = generator.standard_normal(x.shape, dtype=np.float32)
    if np.count_nonzero(model["correlation"]) > 1:
        n = np.fft.ifft2(np.fft.fft2(n) * np.sqrt(spectrum(model, *x.shape[-2:]))).real
    s2 = variance(model, x)
    if y is not None:
        sigma = [0] * (x.ndim - 2) + [4, 4]
        energy = gaussian_filter(np.square(y), sigma) - np.square(gaussian_filter(y, sigma))
        s2 = np.where(energy < s2 / 2, np.maximum(energy, 0), s2)
    return (n * np.sqrt(s2)).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------
# command
# ---------------------------------------------------------------------------------------------------------------
import argparse
import json
from pathlib import Path

import data
import runtime


def given(text, path=None, pred=None):
    """The model that --noise names: `measured` in the dataset `path`, kind:level[:correlation], or a JSON file."""
    if text == "measured":
        import measure  # it stands on this file

        return measure.measure_file(path, pred)
    kind, _, numbers = text.partition(":")
    if kind in KINDS:
        level, _, correlation = numbers.partition(":")
        try:
            level, correlation = runtime.fraction(level), float(correlation or 0)
        except (ValueError, argparse.ArgumentTypeError):
            level, correlation = 0, 0
        if not 0 < level < np.inf or not 0 <= correlation <= REACH:
            raise ValueError(f"--noise {text}: give kind:level or kind:level:correlation, such as gaussian:6/255:1.2")
        return known(kind, level, correlation)
    if not Path(text).is_file():
        raise ValueError(f"--noise {text}: neither measured, nor one of {', '.join(KINDS)}:level, nor a file")
    try:
        model = json.loads(Path(text).read_text())
        coefficients = np.array(model["variance"], float)
        table = np.array(model["correlation"], float)
        if coefficients.shape != (3,) or table.shape != (2 * REACH + 1,) * 2:
            raise ValueError(f"shapes {coefficients.shape} and {table.shape}")
        if not (0 <= coefficients).all() or not 0 < coefficients.sum() < np.inf:
            raise ValueError(f"variance {coefficients}")
        if not np.isfinite(table).all() or not np.isclose(table[REACH, REACH], 1):
            raise ValueError("correlation that is not 1 in the centre, or not finite")
        return described(coefficients, table, model.get("compressed", False))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{text} is not a noise model of `noise.py measure`: {error!r}") from None


def summary(model):
    """What a model says, in a few lines."""
    table, (a, b, c) = np.array(model["correlation"]), model["variance"]
    at = lambda dy, dx: f"{table[REACH + dy, REACH + dx]:+.3f}"  # noqa: E731
    erased = "stored as JPEG, which erases noise where images are flat: the level is too low, and no model holds\n"
    return (
        f"{model['form']}: variance {a:.3g} + {b:.3g} x + {c:.3g} x^2 at intensity x; standard deviation "
        f"{a**0.5:.4f} at 0, {(a + b / 2 + c / 4) ** 0.5:.4f} at 0.5, {(a + b + c) ** 0.5:.4f} at 1\n"
        f"correlation with the pixel 1, 2, 3 along the rows {' '.join(at(0, k) for k in (1, 2, 3))}, "
        f"the columns {' '.join(at(k, 0) for k in (1, 2, 3))}, the diagonals {at(1, 1)} {at(1, -1)}\n"
        f"{erased if model['compressed'] else ''}blind spot to use: {model['blind_spot']}"
    )


def main(argv=None):
    p = runtime.parser(__doc__)
    commands = p.add_subparsers(required=True, dest="command")
    q = commands.add_parser("add", help="clean images to a noisy dataset")
    q.add_argument("--data", required=True, help="dataset (.h5) of clean images")
    q.add_argument("--kind", choices=KINDS, default="gaussian")
    q.add_argument(
        "--level",
        type=runtime.fraction,
        required=True,
        help="Gaussian: standard deviation, share of the range, "
        "such as 6/255; Poisson: photons at intensity 1; Gamma: concentration",
    )
    q.add_argument("--correlation", type=float, default=0, help="sigma of the blur in pixels, 0: white (default 0)")
    q.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    q.add_argument("--out", required=True, help="dataset to write (.h5)")
    q = commands.add_parser("measure", help="the noise of noisy images")
    q.add_argument("--data", required=True, help="dataset (.h5) of noisy images")
    q.add_argument("--pred", help="prediction file (.h5) made from it: tells where the images are flat")
    q.add_argument("--out", help="write the model (.json), for --noise of other stages")
    args = p.parse_args(argv)
    runtime.check_outputs([args.data, getattr(args, "pred", None)], [args.out] if args.out else [])
    if args.command == "add":
        return add_to_file(args)
    model = given("measured", args.data, args.pred)
    print(summary(model))
    if args.out:
        with runtime.whole(args.out) as temporary:
            temporary.write_text(json.dumps(model) + "\n")


def add_to_file(args):
    """Adds noise once, to `clean` where a volume has it and else to `noisy`, and stores both."""
    if args.correlation < 0:
        raise ValueError(f"--correlation {args.correlation:g} is negative")
    with data.open_file(args.data) as file:  # `clean` where a volume has it
        keys = {name: "clean" if "clean" in group else "noisy" for name, group in file["volumes"].items()}
    clean = {}
    for key in sorted(set(keys.values())):
        clean.update(data.read_volumes(args.data, key, names=[name for name in keys if keys[name] == key]))
    made = dict(kind=args.kind, level=args.level, correlation=args.correlation)
    with data.write_volumes(args.out, "dataset", "noise", vars(args), like=args.data, noise=made) as new_volume:
        for v, (name, x) in enumerate(sorted(clean.items())):
            kept, noisy = new_volume(name, x.shape, ["clean", "noisy"])
            for s in range(x.shape[0]):
                kept[s] = x[s]
                noisy[s] = add(x[s], args.kind, args.level, args.correlation, runtime.step_rng(args.seed, v, s))
            noisy.parent.attrs["fingerprint"] = data.fingerprint(noisy)


if __name__ == "__main__":
    runtime.command(main)
