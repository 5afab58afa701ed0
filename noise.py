"""What noise is: add it to clean images (Sec. 4.1 of the paper), measure it from noisy ones, draw more of it.

    gaussian   x + n, n of standard deviation `level`                  the paper: 6/255
    poisson    Poisson(level * x) / level: variance x / level          200 (MRI), 700 (X-ray)
    gamma      x * g, g ~ Gamma(level, rate level), mean 1             100 (MRI), 500 (X-ray)

Correlated noise of parameter s (0.5 or 1.2): one such noise field is blurred by a Gaussian of sigma s pixels and scaled
back to the power it had; a second, independent field of the same kind is added, and the sum divided by sqrt(2).
Nothing is clipped.

A noise *model* is a plain dict: `variance` [a, b, c], the noise level function a + b x + c x^2 of clean intensity x;
`correlation`, a (13,13) table for offsets of up to 6 pixels, 1 in its centre; `form`, `blind_spot`: what they imply.

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
import itertools

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.ndimage import gaussian_filter
from scipy.optimize import nnls

KINDS = ("gaussian", "poisson", "gamma")
REACH = 6  # pixels: noise farther apart counts as independent


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


def described(coefficients, correlation):
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


def sample(model, x, generator):
    """Noise of the model for clean images x (...,H,W): what the scanner might have added. Same shape, float32."""
    n = generator.standard_normal(x.shape, dtype=np.float32)
    if np.count_nonzero(model["correlation"]) > 1:
        n = np.fft.ifft2(np.fft.fft2(n) * np.sqrt(spectrum(model, *x.shape[-2:]))).real
    return (n * np.sqrt(variance(model, x))).astype(np.float32)


# Measuring. Nothing tells noise from structure but this: somewhere the image is flat. The flattest blocks are looked
# for by half of the frequencies of their DFT (row + column even) and measured by the other half, and the reverse: the
# noise of the two halves is independent, so that choosing the quietest blocks does not make the noise look quieter.
FLATTEST = 0.02  # share of the blocks of like intensity that are measured
SEEN = 0.065  # correlation between neighbours that a blind spot must not leave open


def in_blocks(images, side):
    """All side x side blocks of images [(H,W)], half overlapping, (n,side,side) float64."""
    return np.concatenate(
        [sliding_window_view(x, (side, side))[:: side // 2, :: side // 2].reshape(-1, side, side) for x in images]
    ).astype(np.float64)


def plane(side):
    """Orthonormal basis (3, side * side) of the planes over a block."""
    ramp = np.arange(side) - (side - 1) / 2
    ramp, flat = ramp / np.linalg.norm(ramp), np.ones(side) / side**0.5
    return np.stack([np.outer(flat, flat), np.outer(ramp, flat), np.outer(flat, ramp)]).reshape(3, -1)


def periodogram(blocks):
    """Power at each frequency of blocks freed of their plane, (n,side,side); of white noise: its variance."""
    side, basis = blocks.shape[-1], plane(blocks.shape[-1])
    flat = blocks.reshape(len(blocks), -1)
    flat = flat - (flat @ basis.T) @ basis
    return (np.abs(np.fft.fft2(flat.reshape(blocks.shape))) ** 2 / side**2).astype(np.float32)


def expected(correlation, side):
    """What `periodogram` gives on average for noise of unit variance and this correlation: exact, (side,side)."""
    i = np.arange(side)
    table = np.zeros((4 * max(side, REACH) + 1,) * 2)
    middle, reach = len(table) // 2, len(correlation) // 2
    table[middle - reach : middle + reach + 1, middle - reach : middle + reach + 1] = correlation
    apart = middle + i[:, None] - i[None]
    covariance = table[apart[:, None, :, None], apart[None, :, None, :]].reshape(side**2, side**2)
    free = np.eye(side**2) - plane(side).T @ plane(side)
    wave = np.exp(-2j * np.pi * np.outer(i, i) / side)
    wave = np.einsum("ka,lb->klab", wave, wave).reshape(side**2, side**2) @ free
    return np.einsum("kj,kj->k", wave @ covariance, wave.conj()).real.reshape(side, side) / side**2


def halves(side):
    """(frequency in cycles per pixel, the half with row + column even), both (side,side)."""
    k = np.minimum(np.arange(side), side - np.arange(side)) / side
    return np.hypot(k[:, None], k), np.add.outer(np.arange(side), np.arange(side)) % 2 == 0


def flattest(power, structure, among, count):
    """Mean of `power` over the `count` flattest blocks; each half of the frequencies chosen by the other.

    power, structure: (n,side,side); `structure` tells how flat a block is, at the frequencies `among` (side,side).
    """
    _, even = halves(power.shape[-1])
    out = np.zeros(power.shape[1:])
    for own in (even, ~even):
        order = np.argsort(structure[:, among & own].sum(1))[:count]
        out = np.where(own, out, power[order].mean(0))
    return out


def alike_all_over(blocks):
    """Whether the noise (2x2 checker differences) is about as strong in each quarter of a block, (n,) bool."""
    half = blocks.shape[-1] // 2 - 1
    checker = np.square(blocks[:, 1:, 1:] - blocks[:, 1:, :-1] - blocks[:, :-1, 1:] + blocks[:, :-1, :-1])
    ends = slice(0, half), slice(-half, None)
    quarters = np.stack([checker[:, a, b].mean((1, 2)) for a in ends for b in ends])
    return quarters.max(0) < 3 * quarters.min(0)


def usable(blocks):
    """Blocks without a constant area: masked, saturated or photon-free pixels carry no noise to measure. (n,) bool"""
    flat = blocks.reshape(len(blocks), -1)
    return np.maximum(*((flat == m[:, None]).mean(1) for m in (flat.min(1), flat.max(1)))) < 0.3


def bins(x, most):
    """Which equal step of intensity each x belongs to, of at most `most`; the outermost 0.1 % are put to the ends."""
    low, high = np.quantile(x, [0.001, 0.999]) if len(x) else (0, 1)
    count = max(1, min(most, len(x) // 150))
    return np.clip((x - low) / max(high - low, 1e-12) * count, 0, count - 1).astype(int)


def shape(power, structure, bin_of, weight):
    """Mean power spectrum (16,16) of the flattest blocks, each bin of intensity scaled to its own level.

    Bins with the least structure count: power at low frequencies, over the noise found at the high ones. Those with
    little noise do not: what is measured there is something else, such as the rounding of black background.
    """
    white = expected(np.ones((1, 1)), power.shape[-1])
    frequency, _ = halves(power.shape[-1])
    low, high = (frequency < 0.25) & (white > 0.05), frequency >= 0.25
    rows = []
    for k in np.unique(bin_of):
        i = np.flatnonzero(bin_of == k)
        if len(i) >= max(100, 0.01 * len(bin_of)):  # few blocks alike by chance must not decide
            count = max(30, int(FLATTEST * len(i)))
            found = flattest(power[i], structure[i] / weight, low, count) / np.maximum(white, 0.05)
            level = max((found / weight)[high].mean(), 1e-12)
            rows.append((count, len(i), level, (found / weight)[low].mean() / level, found / level))
    if not rows:
        raise ValueError("too few blocks of like intensity to measure the noise: it needs about a 160x160 image")
    count, size, level, ratio, found = (np.array(column) for column in zip(*rows))
    ratio = np.where(level > 0.25 * np.average(level, weights=size * level), ratio, np.inf)
    share = count * np.exp(-(((ratio - ratio.min()) / 0.1) ** 2))
    out = np.tensordot(share / share.sum(), found, 1)
    out[0, 0] = 0  # unknown: blocks have lost their mean
    return (out + np.roll(out[::-1, ::-1], (1, 1), (0, 1))) / 2


def correlation_of(power):
    """(13,13) correlation from a (16,16) spectrum whose value at 0 is unknown: noise at the reach is independent."""
    side = len(power)
    table, apart = np.fft.ifft2(power).real, np.minimum(np.arange(side), side - np.arange(side))
    table -= table[np.maximum.outer(apart, apart) >= REACH - 1].mean()
    table /= np.outer(1 - apart / side, 1 - apart / side)
    table = table[np.ix_(*2 * (np.arange(-REACH, REACH + 1),))]
    return table / table[REACH, REACH]


def measure_correlation(images, means=None):
    """Correlation table (13,13) of the noise in images; `means`, predictions of them, tell where they are flat."""
    blocks = in_blocks(images, 16)
    keep = usable(blocks)
    keep[keep] = alike_all_over(blocks[keep])
    blocks, guide = blocks[keep], None if means is None else in_blocks(means, 16)[keep]
    power = periodogram(blocks)
    structure = power if means is None else periodogram(guide)
    bin_of = bins((blocks if means is None else guide).mean((1, 2)), 16)
    weight, high = np.ones((16, 16)), halves(16)[0] >= 0.25
    for _ in range(3):
        found = shape(power, structure, bin_of, weight)
        weight = np.maximum(found, 0.02 * found.mean())
        weight /= weight[high].mean()
    measured = correlation_of(found)
    # Blocks are small and have lost their planes: run the same on synthetic noise, and take off what it errs by.
    table, generator = measured, np.random.default_rng(0)
    for _ in range(2):
        synthetic = sample(dict(variance=[1, 0, 0], correlation=table), np.zeros((4, 512, 512), np.float32), generator)
        blocks = in_blocks(synthetic, 16)
        power = periodogram(blocks[alike_all_over(blocks)])
        # A prediction's structure is nearly free of the block's noise: so is a choice that does not look at it.
        structure = power if means is None else generator.random(power.shape)
        table = table + measured - correlation_of(shape(power, structure, np.zeros(len(power), int), weight))
    # The outermost ring shows how far entries that should be 0 are off: shrink what does not stand out (Stein).
    offset = np.abs(np.arange(-REACH, REACH + 1))
    doubt = np.sqrt(np.square(table[np.maximum.outer(offset, offset) >= REACH - 1]).mean())
    table = table * np.maximum(1 - np.square(2.5 * doubt) / np.maximum(np.square(table), 1e-12), 0)
    table[REACH, REACH] = 1
    return table


def measure_levels(images, correlation, means=None):
    """Noise level function as points (intensity, variance, blocks, disorder), each (n,), at the high frequencies."""
    blocks = in_blocks(images, 8)
    keep = usable(blocks)
    blocks, guide = blocks[keep], None if means is None else in_blocks(means, 8)[keep]
    expect, frequency = expected(correlation, 8), halves(8)[0]
    high = frequency >= 0.25
    high &= expect > 0.1 * expect[high].mean()
    power = periodogram(blocks) / np.maximum(expect, 1e-6)
    structure, among = (power, high) if means is None else (periodogram(guide), expected(np.ones((1, 1)), 8) > 0.05)
    mean = (blocks if means is None else guide).mean((1, 2))
    bin_of, points = bins(mean, 24), []
    for k in np.unique(bin_of):
        i = np.flatnonzero(bin_of == k)
        if len(i) >= 100:
            count = max(20, int(0.05 * len(i)))
            found = flattest(power[i], structure[i], among, count)[high].mean()
            chosen = i[np.argsort(structure[i][:, among].sum(1))[:count]]
            disorder = np.median(power[i][:, high].mean(1)) / max(found, 1e-12)  # 1 where all blocks are flat
            points.append((mean[chosen].mean(), found, count, disorder))
    if not points:
        raise ValueError("too few blocks of like intensity to measure the noise: it needs about an 80x80 image")
    return np.array(points).T


def fit_levels(intensity, level, blocks, disorder):
    """Coefficients [a, b, c] >= 0 of the noise level function a + b x + c x^2, of the form that the points choose.

    Gaussian a, Poisson b x, Gamma c x^2, the last two perhaps over a Gaussian floor. Structure only ever adds: the
    curve is the one that most points lie on and hardly any below, found by trying all that pass through points.
    """
    keep = level > 1e-4 * level.max()
    intensity, level, blocks, disorder = (v[keep] for v in (np.maximum(intensity, 0), level, blocks, disorder))
    trust = np.sqrt(blocks) / disorder
    trust = np.minimum(trust / trust.sum(), 0.25)  # a large background must not decide alone
    x = intensity[:, None] ** np.arange(3)

    def above(coefficients):  # how far the points lie above the curve, in tolerances of 8 %
        return (level / np.maximum(x @ coefficients, 1e-12) - 1) / 0.08

    def solve(powers, points, weight=1.0):
        coefficients, scale = np.zeros(3), weight / level[points]
        coefficients[powers] = nnls(x[points][:, powers] * scale[:, None], level[points] * scale)[0]
        return coefficients

    best = (np.inf,)
    for powers in ([0], [1], [2], [0, 1], [0, 2]):
        for points in itertools.combinations(range(len(level)), len(powers)):
            coefficients = solve(powers, list(points))
            off = above(coefficients)
            cost = np.where(off > 0, off**2 / (1 + off**2), np.minimum(4 * off**2, 9))
            best = min(
                best, (trust @ cost / trust.sum() + 0.08 * len(powers), powers, coefficients), key=lambda t: t[0]
            )
    _, powers, coefficients = best
    for _ in range(5):
        weight = np.sqrt(trust) / (1 + above(coefficients) ** 2)
        coefficients = solve(powers, np.arange(len(level)), weight)
    return coefficients


def measure(images, means=None, magnitude=False):
    """The model of the noise in images [(H,W)], from them alone, or better with predictions `means` of the same shapes.

    Structure only ever adds, so that of the two models, with and without the predictions, the quieter one is returned.

    magnitude: the images are magnitudes (never negative): near black their noise is Rician, and is left out.
    Raises ValueError if they are too small or too few.
    """
    models = []
    for guide in [None] if means is None else [None, means]:
        correlation = measure_correlation(images, guide)
        points = measure_levels(images, correlation, guide)
        if magnitude:
            above = points[0] > 3 * np.sqrt(points[1])
            points = points[:, above] if above.any() else points
        models.append(described(fit_levels(*points), correlation))
    return min(models, key=lambda model: np.mean([variance(model, image).mean() for image in images]))


# ---------------------------------------------------------------------------------------------------------------
# command
# ---------------------------------------------------------------------------------------------------------------
import argparse
import json
from pathlib import Path

import data
import runtime

PIXELS = 8_000_000  # as many as measuring looks at, evenly spread over all slices


def measure_file(path, pred=None):
    """The model of the noise in the train split of a dataset file (all of it, if there is none); `pred`, a prediction
    file made from it, helps."""
    splits = {attrs.get("split", "train") for attrs in data.read_attrs(path)[1].values()}
    volumes = data.read_volumes(path, "noisy", "train" if "train" in splits else None)
    means = data.read_matching(pred, path) if pred else None
    volumes = {name: v for name, v in volumes.items() if means is None or name in means}
    slices = [(name, s) for name, v in volumes.items() for s in range(v.shape[0])]
    per_slice = np.mean([np.prod(v.shape[1:]) for v in volumes.values()])
    count = min(len(slices), max(1, int(PIXELS / per_slice)))
    slices = [slices[i] for i in np.unique(np.linspace(0, len(slices) - 1, count).round().astype(int))]
    images = [np.asarray(volumes[name][s]) for name, s in slices]
    attrs = data.read_attrs(path)[1]
    lowest = min(
        float(end) * attrs[name].get("scale", 1) + attrs[name].get("offset", 0)
        for image, (name, _) in zip(images, slices)
        for end in (image.min(), image.max())  # an inverted volume has a negative scale
    )
    means = None if means is None else [np.asarray(means[name][s]) for name, s in slices]
    return measure(images, means, magnitude=bool(lowest >= 0))


def given(text, path=None, pred=None):
    """The model that --noise names: `measured` in the dataset `path`, kind:level[:correlation], or a JSON file."""
    if text == "measured":
        return measure_file(path, pred)
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
        return described(coefficients, table)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{text} is not a noise model of `noise.py measure`: {error!r}") from None


def summary(model):
    """What a model says, in a few lines."""
    table, (a, b, c) = np.array(model["correlation"]), model["variance"]
    at = lambda dy, dx: f"{table[REACH + dy, REACH + dx]:+.3f}"  # noqa: E731
    return (
        f"{model['form']}: variance {a:.3g} + {b:.3g} x + {c:.3g} x^2 at intensity x; standard deviation "
        f"{a**0.5:.4f} at 0, {(a + b / 2 + c / 4) ** 0.5:.4f} at 0.5, {(a + b + c) ** 0.5:.4f} at 1\n"
        f"correlation with the pixel 1, 2, 3 along the rows {' '.join(at(0, k) for k in (1, 2, 3))}, "
        f"the columns {' '.join(at(k, 0) for k in (1, 2, 3))}, the diagonals {at(1, 1)} {at(1, -1)}\n"
        f"blind spot to use: {model['blind_spot']}"
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
    model = measure_file(args.data, args.pred)
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
