"""What noise is: its law, adding it to clean images (Sec. 4.1 of the paper), drawing more of it.

    gaussian   x + n, n of standard deviation `level`                  the paper: 6/255
    poisson    Poisson(level * x) / level: variance x / level          200 (MRI), 700 (X-ray)
    gamma      x * g, g ~ Gamma(level, rate level), mean 1             100 (MRI), 500 (X-ray)

Correlated noise of parameter s (0.5 or 1.2): one such noise field is blurred by a Gaussian of sigma s pixels and scaled
back to the power it had; a second one is added, and the sum divided by sqrt(2). Nothing is clipped.

A noise *model* is a plain dict:

    variance     [a, b, c]: the noise level function a + b x + c x^2 at clean intensity x
    correlation  (13,13) table of the correlation with the pixels up to 6 away, 1 in its centre
    through      [r1, r2]: correlation with the same pixel one and two slices away; None if unknown, taken for 0
    blind_spot   1, 5 or 9: the smallest hole of bsn.py that hides the correlated neighbours of a pixel
    compressed   whether the images were stored as JPEG, which no such model describes
    dark         intensity below which magnitude images have Rician or chi noise instead; 0 for other images
    air          [mean, variance] of magnitude images where there is no signal, or None
    band         [rows, columns]: cycles per pixel beyond which there is no noise (zero-filled lines), 0.5 for none
    varies       whether its level differs from place to place: the model then describes images that were divided by a
                 smooth map, `gain`

measure.py finds it in noisy images alone. Where noise is stronger in the middle than at the rim, or differs from volume
to volume, `divide` makes it alike everywhere, so that every stage can learn; `multiply` brings the results back.

    In    clean.h5    volumes/<name>/clean, or `noisy` where there is no clean: the images to add noise to
    Out   knee.h5     volumes/<name>/clean and noisy (S,H,W) float32

    python noise.py add --data clean.h5 --kind gaussian --level 6/255 --seed 0 --out knee.h5
    python noise.py divide --data knee.h5 --map map.h5 --out even.h5   # map.h5: evaluate.py --split all --noise-map-out
    python noise.py divide --data knee.h5 --map sigma.nii.gz --out even.h5            # deviation of the noise, an image
    python noise.py multiply --data even.h5 --pred even_out.h5 --like knee.h5 --out knee_out.h5
"""

# ---------------------------------------------------------------------------------------------------------------
# core: needs numpy and scipy alone; paste it anywhere
# ---------------------------------------------------------------------------------------------------------------
import numpy as np
from scipy.ndimage import gaussian_filter, maximum_filter, minimum_filter

KINDS = ("gaussian", "poisson", "gamma")
REACH = 6  # pixels: noise farther apart counts as independent
ROOT = (3.936, -10.478, 13.704, -6.182)  # 3.936 u - 10.478 u^2 ... is sqrt(u) within 5 % for u from 0.1 to 1
DARK = 1.8  # times the mean of the air: from there on, the noise of magnitudes is nearly that of bright places
SEEN = 0.065  # correlation between neighbours that a blind spot must not leave open


def white(x, kind, level, generator):
    """Noise n of a clean image x, independent from pixel to pixel, so that x + n is the noisy image.

    Args: x (..., H, W), about [0,1]; kind, level: see the module; generator: numpy Generator.
    Raises ValueError for an unknown kind, a level that is not positive, or Poisson noise of negative intensities.
    """
    if kind not in KINDS:
        raise ValueError(f"noise kind {kind!r} is not one of {', '.join(KINDS)}")
    if not 0 < level < np.inf:
        raise ValueError(f"noise level {level:g} is not positive, or not finite")
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
        power = np.mean(n**2) / max(np.mean(blurred**2), 1e-30)  # a black slice has no Poisson or Gamma noise
        blurred *= np.sqrt(power)
        n = (blurred + white(x, kind, level, generator)) / np.sqrt(2)
    return (x + n).astype(np.float32)


def known(kind, level, correlation=0):
    """The noise model of what `add` makes."""
    power = {"gaussian": level**2, "poisson": 1 / level, "gamma": 1 / level}[kind]
    table = np.zeros((8 * REACH + 1,) * 2)
    table[4 * REACH, 4 * REACH] = 1
    if correlation:
        blurred = gaussian_filter(gaussian_filter(table, correlation), correlation)
        table = (blurred / blurred.max() + table) / 2
    inner = table[3 * REACH : -3 * REACH, 3 * REACH : -3 * REACH]
    return make_noise_model([power * (k == KINDS.index(kind)) for k in range(3)], inner)


def make_noise_model(
    variance, correlation, compressed=False, through=(0.0, 0.0), dark=0.0, air=None, band=(0.5, 0.5), varies=False
):
    """A noise model from its numbers; adds the blind spot that hides the correlated neighbours of a pixel.

    variance: [a, b, c]. correlation: (13,13). through: correlation one and two slices away. The others: see the module.
    """
    correlation, offset = np.asarray(correlation), np.abs(np.arange(-REACH, REACH + 1))
    distance = offset[:, None] + offset[None]  # the hole of bsn.py is a diamond
    beyond = [np.abs(correlation)[(distance > radius) & (distance <= 4)].max() for radius in (0, 2)]
    return dict(
        variance=[float(v) for v in variance],
        correlation=np.round(correlation, 5).tolist(),
        through=[r if r is None else round(float(r), 5) for r in through],
        blind_spot=1 if compressed or beyond[0] < SEEN else 5 if beyond[1] < SEEN else 9,
        compressed=bool(compressed),
        dark=round(float(dark), 5),
        air=air and [float(v) for v in air],
        band=[float(v) for v in band],
        varies=bool(varies),
    )


def form(noise_model):
    """Of which form a noise model is: "gaussian", "poisson-gaussian" or "gamma"."""
    _, b, c = noise_model["variance"]
    return "gamma" if c else "poisson-gaussian" if b else "gaussian"


def variance(noise_model, x):
    """Variance of the noise at clean intensity x >= 0, like x; that of magnitudes falls towards that of the air."""
    (a, b, c), air = noise_model["variance"], noise_model.get("air")
    x = np.maximum(x, 0)
    s2 = a + b * x + c * x**2
    return air[1] + np.clip((x / air[0] - 1) / (DARK - 1), 0, 1) * (s2 - air[1]) if air else s2


def bright(noise_model, y):
    """Mask like y (...,H,W): where these noisy images, smoothed, are above `dark`, and so the noise model holds."""
    dark = noise_model.get("dark")
    return gaussian_filter(y, 1.5, axes=(-2, -1)) > dark if dark else np.ones(y.shape, bool)


def symmetries(noise_model):
    """How many flips and quarter turns of an image leave its noise as it is.

    8: all. 4: flips alone, as rows and columns differ. 2: a half turn, as the two diagonals differ. 8 for None.
    """
    noise_model = noise_model or known("gaussian", 1.0)
    table = np.asarray(noise_model["correlation"])
    if np.ptp(table - table[:, ::-1]) >= 0.2:
        return 2
    return 8 if np.ptp(table - table.T) < 0.2 and np.ptp(noise_model.get("band", [0.5])) < 0.05 else 4


def spectrum(noise_model, h, w):
    """Power spectrum (h,w) of the noise at unit variance, on the grid of a DFT of h x w pixels; its mean is 1.

    The table is cut off at REACH, which blurs the edge of a `band`: what the cut makes of a flat band is divided out.
    """
    table = np.zeros((h, w))
    reach = [min(REACH, (n - 1) // 2) for n in (h, w)]
    inner = np.asarray(noise_model["correlation"])[tuple(slice(REACH - r, REACH + r + 1) for r in reach)]
    table[np.ix_(*(np.arange(-r, r + 1) for r in reach))] = inner
    power = np.maximum(np.fft.fft2(table).real, 0)
    for axis, (n, r, end) in enumerate(zip((h, w), reach, noise_model.get("band", (0.5, 0.5)))):
        frequency, lag = np.fft.fftfreq(n), np.arange(-r, r + 1)
        seen = np.cos(2 * np.pi * np.outer(frequency, lag)) @ np.sinc(2 * end * lag)
        inside = (np.abs(frequency) <= end) / np.maximum(seen, 0.3 * seen.max())
        power *= inside[:, None] if axis == 0 else inside
    return power / power.mean()


def mix_through(white, through):
    """Independent fields (S,H,W) to fields whose correlation one and two slices apart is `through`, [r1, r2].

    A band matrix of 1, r1, r2 need not be a covariance (positive semidefinite): the nearest one that is, is used.
    """
    apart = np.abs(np.subtract.outer(*2 * (np.arange(len(white)),)))
    table = np.array([1.0, *(r or 0.0 for r in through), 0.0])[np.minimum(apart, 3)]
    values, vectors = np.linalg.eigh(table)
    table = (vectors * np.maximum(values, 0)) @ vectors.T
    scale = np.sqrt(np.diag(table))
    values, vectors = np.linalg.eigh(table / np.outer(scale, scale))
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    return np.tensordot(root.astype(white.dtype), white, 1)


def constant(y):
    """Where noisy images y (...,H,W) are one value over 3x3 pixels: masked or saturated, and so without noise; bool."""
    same = minimum_filter(y, 3, axes=(-2, -1)) == maximum_filter(y, 3, axes=(-2, -1))
    return maximum_filter(same, 3, axes=(-2, -1))


def local_variance(noise_model, x, y=None):
    """Variance of the noise of clean images x (...,H,W), like x; y: the noisy images, if there are any.

    Noise cannot be stronger than what varies: there is none where y is `constant`, and where y varies with less than
    half the energy that the model expects (its level was overestimated), that energy limits the noise.
    """
    s2 = variance(noise_model, x)
    if y is None:
        return s2
    noisy = ~constant(y)
    share, mean, square = (gaussian_filter((noisy * y**k).astype(y.dtype), 4, axes=(-2, -1)) for k in (0, 1, 2))
    share = np.maximum(share, 1e-6)
    energy = square / share - np.square(mean / share)
    return noisy * np.where(energy < s2 / 2, np.maximum(energy, 0), s2)


def sample(noise_model, x, generator, y=None):
    """Noise for clean images x (...,H,W): what the scanner might have added. Same shape, float32.

    A stack (S,H,W) of neighbouring slices gets noise that is correlated through them as the model says. y: the noisy
    images, if there are any, for `local_variance`.
    """
    n = generator.standard_normal(x.shape, dtype=np.float32)
    if x.ndim == 3 and any(noise_model.get("through", ())):
        n = mix_through(n, noise_model["through"])
    if np.count_nonzero(noise_model["correlation"]) > 1 or min(noise_model.get("band", [0.5])) < 0.5:
        n = np.fft.ifft2(np.fft.fft2(n) * np.sqrt(spectrum(noise_model, *x.shape[-2:]))).real
    return (n * np.sqrt(local_variance(noise_model, x, y))).astype(np.float32)


def sample_like(noise_model, y, prediction, generators):
    """Fresh noise for noisy crops y (B,S,H,W), a torch tensor like them; generators: one for each crop.

    The intensities that it depends on are those of `prediction`, or else of the smoothed noisy images.
    """
    means = gaussian_filter(y.numpy(), (0, 0, 1.5, 1.5)) if prediction is None else prediction.numpy()
    drawn = [sample(noise_model, mean, rng, crop) for mean, rng, crop in zip(means, generators, y.numpy())]
    return y.new_tensor(np.stack(drawn))


def directional_derivative(noise_model, denoise, y, x, generators, strength=0.1):
    """(z, a): fresh noise z of the model on the slices y, and the derivative of a denoiser along it; (B,1,H,W) both.

        a = (f(y + e z) - f(y - e z)) / 2e

    The mean of z a is what Stein's estimate of the error (evaluate.py) and `deviation` need. Args: denoise f:
    (B,2k+1,H,W) to (B,1,H,W). y: slices with their neighbours; where the noise goes through them, so does z. x: f(y),
    whose intensities the noise depends on. strength e: 0.3 is 0.15 dB off for our networks, 0.1 and 0.05 agree.
    """
    joint, own = any(noise_model.get("through", ())), y.shape[1] // 2
    z = sample_like(noise_model, *((y, None) if joint else (y[:, own, None], x)), generators)
    added = y.new_zeros(y.shape)
    added[:, slice(None) if joint else slice(own, own + 1)] = strength * z
    return z[:, z.shape[1] // 2, None], (denoise(y + added) - denoise(y - added)) / (2 * strength)


def deviation(noise_model, denoise, y, x, generators, probes=4, sigma=2.0):
    """Standard deviation of what is left unknown of the clean image at each pixel, (B,1,H,W).

    x: denoise(y), or its mean over symmetries, whose divergence is taken to be the same.

    Second-order Tweedie (Manor & Michaeli 2024): for the posterior mean f, Cov(x | y) = C df/dy, C that of the noise.
    Its diagonal is the mean of z a (`directional_derivative`), over some probes and a window of `sigma` pixels; it is
    scaled so that its mean is Stein's estimate of the error, which holds for any f.
    """
    own, x_own = y[:, y.shape[1] // 2, None].numpy(), x.numpy()
    s2 = local_variance(noise_model, x_own, own)
    seen = noise_model, denoise, y, x, generators
    found = [z * a for z, a in (directional_derivative(*seen) for _ in range(probes))]
    known = (sum(found) / probes).numpy()
    mse = (np.square(x_own - own) - s2 + 2 * known).mean((1, 2, 3), keepdims=True)
    scale = np.clip(mse / np.maximum(known.mean((1, 2, 3), keepdims=True), 1e-12), 0.5, 2)
    power = scale * gaussian_filter(known, (0, 0, sigma, sigma))
    return y.new_tensor(np.sqrt(np.maximum(power, 0.002 * s2)))


def posterior_samples(noise_model, f, y, x, generator, count, strength=0.1):
    """`count` volumes that may have been y before the noise, (count,S,H,W) float32, in pairs x + r and x - r.

    Args: f: denoiser of a whole volume, (S,H,W) to (S,H,W) arrays; y: noisy; x: f(y), or a better
    mean, as over symmetries or planes. The mean of each pair is x.

    They are drawn from the Gaussian with mean x and covariance J C, the posterior's by second-order Tweedie
    (`deviation`), with J the derivative of f and C the covariance of the noise. sqrt(J) z, for noise z, has it; the
    square root is a polynomial in J (as in Chow & Saad 2014), and J v = (f(y + e v) - f(y - e v)) / 2e.
    """
    out = []
    while len(out) < count:
        z = v = sample(noise_model, x, generator, y)
        r, known = 0, None
        for coefficient in ROOT:
            v = (f(y + strength * v) - f(y - strength * v)) / (2 * strength)
            known = np.mean(z * v, dtype=np.float64) if known is None else known
            r = r + coefficient * v
        r = r * np.float32(np.sqrt(max(known, 0) / max(np.mean(r * r, dtype=np.float64), 1e-20)))
        out += [x + r, x - r]
    return np.stack(out[:count]).astype(np.float32)


def facts(noise_model, volumes):
    """What distill.ToldResUNet is told, (9,): variance [a, b, c], deviation over all of {name: (S,H,W)}, correlations.

    The correlations are those with the pixel 1 along rows, columns and diagonals, 2 along rows and columns, and one
    slice away.
    """
    spread = {name: np.unique(np.linspace(0, v.shape[0] - 1, 8).astype(int)) for name, v in volumes.items()}
    level = np.mean([variance(noise_model, volumes[name][s]).mean() for name in spread for s in spread[name]]) ** 0.5
    r, at = np.asarray(noise_model["correlation"]), REACH
    beside = [r[at, at + 1], r[at + 1, at], (r[at + 1, at + 1] + r[at + 1, at - 1]) / 2]
    beside += [(r[at, at + 2] + r[at + 2, at]) / 2, noise_model.get("through", [0])[0] or 0]
    return np.array([*noise_model["variance"], level, *beside])


# ---------------------------------------------------------------------------------------------------------------
# command
# ---------------------------------------------------------------------------------------------------------------
import argparse
import json
from pathlib import Path

import data
from lib import runtime


def parse_noise_model(text):
    """The noise model of kind:level[:correlation], of `none`, or of a JSON file of measure.py. Raises ValueError."""
    if text == "none":
        return make_noise_model([0, 0, 0], known("gaussian", 1)["correlation"])
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
        found = json.loads(Path(text).read_text())
        coefficients, table = (np.array(found[key], float) for key in ("variance", "correlation"))
        if coefficients.shape != (3,) or table.shape != (2 * REACH + 1,) * 2:
            raise ValueError(f"shapes {coefficients.shape} and {table.shape}")
        if not (0 <= coefficients).all() or not 0 < coefficients.sum() < np.inf:
            raise ValueError(f"variance {coefficients}")
        if not np.isfinite(table).all() or not np.isclose(table[REACH, REACH], 1):
            raise ValueError("correlation that is not 1 in the centre, or not finite")
        through = found.get("through", [0.0, 0.0])
        if len(through) != 2 or any(r is not None and not abs(r) <= 1 for r in through):
            raise ValueError(f"through {through}")
        flags = {name: found.get(name, False) for name in ("compressed", "dark", "air", "varies")}
        return make_noise_model(coefficients, table, through=through, band=found.get("band", (0.5, 0.5)), **flags)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{text} is not a noise model of measure.py: {str(error)[:100]!r}") from None


def add_to_file(args):
    """Adds noise once, to `clean` where a volume has it and else to `noisy`, and stores both."""
    if not 0 <= args.correlation <= REACH:
        raise ValueError(f"--correlation {args.correlation:g} is not between 0 and {REACH} pixels")
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


def divide(args):
    """Divides the images by the map of their noise: from then on it is alike everywhere. The map stays with them."""
    noisy, gains = data.read_volumes(args.data), data.read_map(args.map, args.data)
    if len(gains) < len(noisy):
        some = f"{args.map} has the map of {len(gains)} of the {len(noisy)} volumes of {args.data}"
        raise ValueError(f"{some}: evaluate.py --split all --noise-map-out makes all")
    with data.open_file(args.data) as file:
        clean = [name for name in gains if "clean" in file["volumes"][name]]
    clean = data.read_volumes(args.data, "clean", names=clean) if clean else {}
    with data.write_volumes(args.out, "dataset", "noise", vars(args), like=args.data) as new_volume:
        for name, gain in gains.items():
            keys = ["gain", "noisy", *(["clean"] if name in clean else [])]
            kept, *divided = new_volume(name, gain.shape, keys)
            for s in range(gain.shape[0]):
                kept[s] = gain[s]
                for array, source in zip(divided, (noisy, clean)):
                    array[s] = source[name][s] / kept[s]
            divided[0].parent.attrs["fingerprint"] = data.fingerprint(divided[0])
    print(f"noise: {len(gains)} volumes, divided by {args.map} -> {args.out}", flush=True)


def multiply(args):
    """Multiplies a prediction of divided images by their map: a prediction of the images as they were."""
    gains, attrs = data.read_volumes(args.data, "gain"), data.read_attrs(args.pred)[0]
    pred = data.read_matching(args.pred, args.data)
    made = args.out, "prediction", attrs["stage"], vars(args), args.like, attrs["noise"]
    with data.write_volumes(*made) as new_volume:
        for name, x in pred.items():
            (out,) = new_volume(name, x.shape, ["pred"])
            for s in range(x.shape[0]):
                out[s] = x[s] * gains[name][s]
    print(f"noise: {len(pred)} volumes -> {args.out}", flush=True)


def main(argv=None):
    p = runtime.parser(__doc__)
    commands = p.add_subparsers(required=True)
    q = commands.add_parser("divide", help="makes the noise alike everywhere")
    q.add_argument("--data", required=True, help="dataset (.h5) of noisy images")
    q.add_argument("--map", required=True, help="file (.h5) of evaluate.py --noise-map-out, or an image of the level")
    q.add_argument("--out", required=True, help="dataset to write (.h5)")
    q.set_defaults(command=divide)
    q = commands.add_parser("multiply", help="brings a prediction of divided images back")
    q.add_argument("--data", required=True, help="dataset (.h5) that `divide` wrote")
    q.add_argument("--pred", required=True, help="prediction file (.h5) made from it")
    q.add_argument("--like", required=True, help="dataset (.h5) from which `divide` made it")
    q.add_argument("--out", required=True, help="prediction to write (.h5)")
    q.set_defaults(command=multiply)
    q = commands.add_parser("add", help="clean images to a noisy dataset")
    q.set_defaults(command=add_to_file)
    q.add_argument("--data", required=True, help="dataset (.h5) of clean images")
    q.add_argument("--kind", choices=KINDS, default="gaussian", help="default gaussian")
    level = "Gaussian: standard deviation, share of the range, such as 6/255; Poisson: photons at intensity 1; "
    q.add_argument("--level", type=runtime.fraction, required=True, help=f"{level}Gamma: concentration")
    q.add_argument("--correlation", type=float, default=0, help="sigma of the blur in pixels, 0: white (default 0)")
    q.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    q.add_argument("--out", required=True, help="dataset to write (.h5)")
    args = p.parse_args(argv)
    command = args.__dict__.pop("command")
    runtime.check_outputs([v for k, v in vars(args).items() if k in ("data", "map", "pred", "like")], [args.out])
    command(args)


if __name__ == "__main__":
    runtime.command(main)
