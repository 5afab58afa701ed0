"""The noise measured in noisy images alone: how strong at which intensity, how correlated, and whether JPEG erased it.

Where an image is flat, what is left is noise; between repeats of one image, what differs. The flattest blocks are found
by half of the frequencies of their DFT (row + column even) and measured by the other half, and the reverse. The noise
of the two halves is independent, so that choosing the quietest blocks does not make the noise look quieter.

    In    knee.h5       volumes/<name>/noisy  (S,H,W) float32, about [0,1]
          bsn_out.h5    volumes/<name>/pred   (S,H,W) float32, optional: it tells where the images are flat
    Out   noise.json    the noise model, a dict that noise.py describes; also printed

    python measure.py --data knee.h5                                     # before any training: which blind spot?
    python measure.py --data knee.h5 --pred bsn_out.h5 --out noise.json  # closer where the image has structure

Every `--noise` of the other programs is read here (`load_noise_model`): measured, stated, or from such a file.
"""

# ---------------------------------------------------------------------------------------------------------------
# core: needs the core of noise.py, lib/blocks.py, numpy and scipy; paste it below these
# ---------------------------------------------------------------------------------------------------------------
import itertools

import numpy as np
from scipy.ndimage import gaussian_filter, uniform_filter
from scipy.optimize import nnls

from lib.blocks import bins, expected, flattest, flattest_spectrum, halves, in_blocks, periodogram, stationary, usable
from noise import DARK, REACH, make_noise_model, sample, variance

FAINT = 0.05  # share of the noise's power that the structure of a prediction may have where the noise is measured


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
    keep[keep] = stationary(blocks[keep])
    if not keep.any():
        raise ValueError("no 16x16 pixels of the images have noise that is alike all over: its level cannot be told")
    blocks, guide = blocks[keep], None if means is None else in_blocks(means, 16)[keep]
    power = periodogram(blocks)
    structure = power if means is None else periodogram(guide)
    bin_of = bins((blocks if means is None else guide).mean((1, 2)), 16)
    weight, high = np.ones((16, 16)), halves(16)[0] >= 0.25
    for _ in range(3):
        found = flattest_spectrum(power, structure, bin_of, weight, 0.0 if means is None else FAINT)
        weight = np.maximum(found, 0.02 * found.mean())
        weight /= weight[high].mean()
    measured = correlation_of(found)
    # Blocks are small and have lost their planes: run the same on synthetic noise, and take off what it errs by.
    table, generator = measured, np.random.default_rng(0)
    for _ in range(2):
        synthetic = sample(dict(variance=[1, 0, 0], correlation=table), np.zeros((4, 512, 512), np.float32), generator)
        blocks = in_blocks(synthetic, 16)
        power = periodogram(blocks[stationary(blocks)])
        # A prediction's structure is nearly free of the block's noise: so is a choice that does not look at it.
        structure = power if means is None else generator.random(power.shape)
        found = flattest_spectrum(power, structure, np.zeros(len(power), int), weight)
        table = table + measured - correlation_of(found)
    # The outermost ring shows how far entries that should be 0 are off: shrink what does not stand out (Stein).
    offset = np.abs(np.arange(-REACH, REACH + 1))
    doubt = np.sqrt(np.square(table[np.maximum.outer(offset, offset) >= REACH - 1]).mean())
    table = table * np.maximum(1 - np.square(2.5 * doubt) / np.maximum(np.square(table), 1e-12), 0)
    table[REACH, REACH] = 1
    return table


def level_of(flat, typical):
    """Level of the noise in the spectrum of the flattest blocks, given that of all blocks of like intensity; (n,) both.

    Even the flattest blocks hold some structure where tissue is nowhere flat. Its spectrum is steep, as the difference
    of the two spectra shows; that of the noise, over what its correlation explains, is level: flat = level + k *
    (typical - flat), k the slope of a regression less one standard error, between 0 and 1. At most a third is taken
    off: where structure is more, the noise is not known.
    """
    excess, weight = np.maximum(typical - flat, 0), 1 / np.maximum(typical, 1e-12) ** 2
    mean, middle = np.average(flat, weights=weight), np.average(excess, weights=weight)
    spread = max((weight * (excess - middle) ** 2).sum(), 1e-30)
    k = (weight * (excess - middle) * flat).sum() / spread
    error = np.sqrt((weight * (flat - mean - k * (excess - middle)) ** 2).mean() / spread)  # of k
    return mean - min(np.clip(k - error, 0, 1) * middle, mean / 3)


def measure_levels(images, correlation, means=None, ends=(0.5, 0.5)):
    """Noise level function as points (intensity, variance, blocks, disorder), each (n,), at the high frequencies.

    correlation: table (13,13) of the noise. ends: its `band`.
    """
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
    lost = 1.0
    if means is None and min(ends) < 0.5:  # its halves are not independent: synthetic noise says what that costs
        law = dict(variance=[1, 0, 0], correlation=correlation, band=ends)
        synthetic = in_blocks(sample(law, np.zeros((4, 512, 512), np.float32), np.random.default_rng(0)), 8)
        synthetic = periodogram(synthetic) / np.maximum(expect, 1e-6)
        lost = min(1.0, flattest(synthetic, synthetic, high, len(synthetic) // 20)[high].mean())
    for k in np.unique(bin_of):
        i = np.flatnonzero(bin_of == k)
        if len(i) >= 100:
            count = max(20, int(0.05 * len(i)))
            flat = flattest(power[i], structure[i], among, count)[high] / lost
            found = level_of(flat, power[i][:, high].mean(0))
            chosen = i[np.argsort(structure[i][:, among].sum(1))[:count]]
            disorder = np.median(power[i][:, high].mean(1)) / max(found, 1e-12)  # 1 where all blocks are flat
            disorder *= flat.mean() / max(found, 1e-12)  # and nothing was taken off
            points.append((mean[chosen].mean(), found, count, disorder))
    if not points:
        raise ValueError("too few blocks of like intensity to measure the noise: it needs about an 80x80 image")
    return np.array(points).T


def fit_levels(intensity, level, blocks, disorder):
    """Coefficients [a, b, c] >= 0 of the noise level function a + b x + c x^2, of the form that the points choose.

    Gaussian a, Poisson b x, Gamma c x^2, the last two perhaps over a Gaussian floor. Structure only ever adds: the
    curve is the one that most points lie on and hardly any below, found by trying all that pass through points. A point
    above it costs as the logarithm of the excess (Cauchy's loss), so that a curve far below the dark points cannot win
    by the bright ones, where lungs have texture in even their flattest blocks.
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
            cost = np.where(off > 0, 0.3 * np.log1p(off**2), np.minimum(4 * off**2, 4))
            total = trust @ cost / trust.sum() + 0.3 * len(powers)
            if total < best[0]:
                best = total, powers, coefficients
    _, powers, coefficients = best
    for _ in range(5):
        weight = np.sqrt(trust) / (1 + above(coefficients) ** 2)
        coefficients = solve(powers, np.arange(len(level)), weight)
    return coefficients


def around(image):
    """Mean and deviation (by 2x2 checker differences, which structure hardly moves) over 15x15 pixels, both (H,W)."""
    checker = np.zeros(image.shape)
    checker[1:, 1:] = np.square(image[1:, 1:] - image[1:, :-1] - image[:-1, 1:] + image[:-1, :-1]) / 4
    return uniform_filter(image.astype(np.float64), 15), np.sqrt(np.maximum(uniform_filter(checker, 15), 0))


def without_air(images):
    """(magnitude images with 0 where there is no signal, [mean, variance] there, or None if there is no such place).

    Without signal, the mean is 1.9 standard deviations of the noise (Rayleigh, one coil) to 8 (chi, 16 coils): the
    darkest places say how many. Where it is not much more there is hardly a signal, and the noise is weaker.
    """
    found = [around(image) for image in images]
    mean, deviation = (np.concatenate([f[k].ravel() for f in found]) for k in (0, 1))
    varied = deviation > 1e-3 * deviation.mean()
    low = np.quantile(mean[varied], 0.02) if varied.any() else 0.0
    for _ in range(3):
        alike = varied & (np.abs(mean - low) <= 0.25 * low)
        low = np.median(mean[alike]) if alike.any() else 0.0
    if not alike.any() or not 1.2 < (ratio := np.median(mean[alike] / deviation[alike])) < 12:
        return images, None
    air = [(m < 1.3 * ratio * d) & (m < 4 * low) for m, d in found]
    if np.mean([a.mean() for a in air]) > 0.98:  # nothing but noise, or as good as: all of it is to be measured
        return images, None
    typical = (np.median(v[np.concatenate([a.ravel() for a in air]) & varied]) for v in (mean, deviation**2))
    return [np.where(a, 0, image) for a, image in zip(air, images)], list(map(float, typical))


def band(images, dark=0.0):
    """[rows, columns]: the highest frequency along each axis that images [(H,W)] hold, cycles per pixel; 0.5 for all.

    Zero-filled lines of k-space hold neither image nor noise: there the power falls at once. To draw noise there would
    be wrong, and a network that learns by recorruption would find it out. dark: of the noise model, not looked at.
    """
    found = []
    for axis in (0, 1):
        power, grid = 0, np.linspace(0, 0.5, 129)
        for image in images:
            weight = gaussian_filter((gaussian_filter(image, 3) > dark).astype(np.float64), 4)
            lines = np.square(np.abs(np.fft.rfft((image - gaussian_filter(image, 1)) * weight, axis=axis))).mean(
                1 - axis
            )
            power = power + np.interp(grid, np.linspace(0, 0.5, len(lines)), lines)
        fall = np.maximum(power[46:-4], 1e-30) / np.maximum(power[50:], 1e-30)
        k = 48 + int(fall.argmax())
        empty = fall.max() > 4 and power[k + 2 :].max() < 0.25 * power[k - 8 : k - 2].min()
        found.append(float(grid[k]) if empty else 0.5)
    return found


def white_within(ends, table):
    """The correlation (13,13) of noise that is white within a `band` and absent beyond, if `table` is like that.

    Such is the noise of receivers when lines of k-space are zero-filled. The ends of the band are known well, while the
    table, measured, is off by some hundredths: structure is nowhere quite absent.
    """
    row, column = (np.sinc(2 * end * np.arange(-REACH, REACH + 1)) for end in ends)
    white = np.outer(row, column)
    return white if min(ends) < 0.5 and np.abs(white - table).max() < 0.15 else table


def measure(images, means=None, magnitude=False):
    """The noise model of images [(H,W)], from them alone, or better with predictions `means` of the same shapes.

    The correlation is the lesser of two, with and without the predictions, since structure only ever adds; the levels
    are fitted to the points of both. magnitude: the images are never negative, so that they may be
    magnitudes, whose dark places are left out. Raises ValueError if they are too small or too few.
    """
    points, guides = [], [None] if means is None else [None, means]
    whole, (images, air) = images, without_air(images) if magnitude else (images, None)
    dark = DARK * air[0] if air else 0.0
    ends = band(whole, dark or -np.inf)

    def loud(model):
        return np.mean([variance(model, image).mean() for image in images])

    tables = [measure_correlation(images, guide) for guide in guides]
    for guide, table in zip(guides, tables):
        found = measure_levels(images, white_within(ends, table), guide, ends)
        above = found[0] > np.maximum(3 * np.sqrt(found[1]), dark)
        points.append(found[:, above] if magnitude and above.any() else found)
    level = fit_levels(*np.concatenate(points, 1))
    model = make_noise_model(level, white_within(ends, min(tables, key=lambda table: np.abs(table).sum())))
    if air and loud(model) > 4 * variance(model, np.array(air[0])):
        # Poisson or Gamma noise, whose dark places look like the air of several coils: with and without them
        return min(model | dict(band=band(whole)), measure(whole, means), key=loud)
    dark = max(dark, 3 * level[0] ** 0.5) if magnitude else 0.0
    return model | dict(air=air, dark=dark, band=ends)


# ---------------------------------------------------------------------------------------------------------------
# files
# ---------------------------------------------------------------------------------------------------------------
import json

import data
import noise
from lib import blocks, jpeg, runtime

NOISE_HELP = (
    "measured; kind:level[:correlation] such as gaussian:6/255, poisson:200, gamma:100:1.2; "
    "or a file of measure.py (default measured)"
)
PIXELS = 4_000_000  # as many as measuring looks at, evenly spread over all slices
SAME = 0.9  # how alike the details of repeats are, at least
INDEPENDENT = 0.1  # correlation through the slices up to which they count as independent: it is known to about 0.05


def summary(noise_model):
    """What a noise model says, in a few lines."""
    table, (a, b, c) = np.array(noise_model["correlation"]), noise_model["variance"]

    def at(dy, dx):
        return f"{table[noise.REACH + dy, noise.REACH + dx]:+.3f}"

    erased = "stored as JPEG, which erases noise where images are flat: the level is too low, and no model holds\n"
    varies = "not alike everywhere: of images divided by a map of it\n" if noise_model.get("varies") else ""
    ends = noise_model.get("band", [0.5])
    filled = f"no noise beyond {ends} cycles per pixel along rows and columns: zero-filled\n" if min(ends) < 0.5 else ""
    through = " ".join("unknown" if r is None else f"{r:+.3f}" for r in noise_model.get("through", [None, None]))
    return (
        f"{noise.form(noise_model)}: variance {a:.3g} + {b:.3g} x + {c:.3g} x^2 at intensity x; standard deviation "
        f"{a**0.5:.4f} at 0, {(a + b / 2 + c / 4) ** 0.5:.4f} at 0.5, {(a + b + c) ** 0.5:.4f} at 1\n"
        f"correlation with the pixel 1, 2, 3 along the rows {' '.join(at(0, k) for k in (1, 2, 3))}, "
        f"the columns {' '.join(at(k, 0) for k in (1, 2, 3))}, the diagonals {at(1, 1)} {at(1, -1)}\n"
        f"correlation one and two slices away {through}\n"
        f"{varies}{filled}{erased if noise_model['compressed'] else ''}blind spot to use: {noise_model['blind_spot']}"
    )


def measure_file(path, pred=None):
    """The noise model of a dataset file, from its train split or, if there is none, from all of it.

    pred: a prediction file made from it; it helps to tell where the images are flat. Raises ValueError as `measure`.
    """
    attrs, volumes = data.read_attrs(path)[1], data.read_volumes(path, "noisy", data.to_learn_from(path))
    means = data.read_matching(pred, path) if pred else None
    volumes = {name: v for name, v in volumes.items() if means is None or name in means}
    if not volumes:
        raise ValueError(f"{pred} holds no volume that {path} has to learn from")
    slices = [(name, s) for name, v in volumes.items() for s in range(v.shape[0])]
    per_slice = np.mean([np.prod(v.shape[1:]) for v in volumes.values()])
    slices = [slices[i] for i in data.evenly(len(slices), max(1, int(PIXELS / per_slice)))]
    images = [np.asarray(volumes[name][s]) for name, s in slices]
    lows = []
    for image, (name, _) in zip(images, slices):  # an inverted volume has a negative scale
        lows += [end * attrs[name].get("scale", 1) + attrs[name].get("offset", 0) for end in (image.min(), image.max())]
    noise_model = measure(images, means and [np.asarray(means[n][s]) for n, s in slices], magnitude=min(lows) >= 0)
    with data.open_file(path) as file:
        varies = any("gain" in group for group in file["volumes"].values())
    gains = data.read_volumes(path, "gain", names=list(volumes)) if varies else {}
    stacks, repeats = list(volumes.values()), differences(volumes, attrs, gains)
    if repeats and (known := of_repeats(*repeats, noise_model)) != noise_model:
        noise_model, stacks = known, repeats[0]
    erased = bool(jpeg.jump(images) > jpeg.JUMP)  # the smallest hole then: with 9, M4Raw came out worse than it was
    found = dict(through=through_slices(stacks, np.array(noise_model["correlation"])), varies=varies, compressed=erased)
    return noise_model | found | (dict(blind_spot=1) if erased else {})


def differences(volumes, attrs, gains):
    """What differs between repeats of one image: ([noise (S,H,W)], [mean (S,H,W)]) in the units of `volumes`, or None.

    Repeats have the same details, and follow each other, or a volume lies between (labels and controls). Half of the
    pairs must be alike: one filtered copy does not decide. gains: the maps that divided the volumes.
    """
    names, best = list(volumes), None
    units = {n: (attrs[n].get("scale", 1), attrs[n].get("offset", 0), np.asarray(gains.get(n, [1])[:])) for n in names}
    count = max(2, int(PIXELS / np.mean([np.prod(v.shape) for v in volumes.values()])))
    for lag in (1, 2):
        pairs, found = [(a, b) for a, b in zip(names, names[lag:]) if volumes[a].shape == volumes[b].shape], []
        pairs = pairs[:: max(1, len(pairs) // count)]
        for pair in pairs:
            one, other = (volumes[n][:] * units[n][2] * units[n][0] + units[n][1] for n in pair)
            scale, offset, gain = units[pair[0]]
            if data.likeness(np.stack([v[len(v) // 2] for v in (one, other)])) > SAME:
                mean = ((one + other) / 2 - offset) / scale / gain
                found.append([v.astype(np.float32) for v in ((one - other) / 2**0.5 / scale / gain, mean)])
        size = np.mean([np.square(d).mean() for d, _ in found]) if 2 * len(found) > len(pairs) else np.inf
        best = (size, *zip(*found)) if size < (best[0] if best else np.inf) else best
    return best and best[1:]


def of_repeats(change, means, spatial):
    """The noise model by what differs between repeats if it is clearly lower (motion adds to it), else `spatial`."""
    change, means = ([image for stack in stacks for image in stack] for stacks in (change, means))
    change = [np.where(noise.bright(spatial, m), d, 0) for d, m in zip(change, means)]  # but for dark magnitudes
    most = 0.8 * np.mean([variance(spatial, m).mean() for m in means])
    if np.mean([np.square(d).mean() for d in change]) < most / 100:  # copies
        return spatial
    try:
        correlation = measure_correlation(change, means)
        model = make_noise_model(fit_levels(*measure_levels(change, correlation, means)), correlation)
    except ValueError:  # nothing in them is alike all over
        return spatial
    less = spatial | {key: model[key] for key in ("variance", "correlation", "blind_spot")}
    return less if np.mean([variance(less, m).mean() for m in means]) < most else spatial


def through_slices(volumes, correlation):
    """[r1, r2]: correlation of the noise one and two slices away in volumes [(S,H,W)]; zeros if they are independent.

    None for what cannot be told, because no volume has three slices or there are too few flat places in them.
    """
    every = [(v, s) for v in volumes for s in range(0, v.shape[0] - 2, 4)]
    if not every:
        return [None, None]
    voxels = np.mean([min(4, v.shape[0] - s) * np.prod(v.shape[1:]) for v, s in every])
    some = data.evenly(len(every), max(1, int(PIXELS / 2 / voxels)))
    stacks = [np.asarray(v[s : s + 4]) for v, s in (every[i] for i in some)]
    found = [blocks.shared_through(stacks, correlation, lag) for lag in (1, 2)]
    known = [r for r in found if r is not None]
    return [r and round(r, 5) for r in found] if not known or max(map(abs, known)) > INDEPENDENT else [0.0, 0.0]


def load_noise_model(text, path=None, pred=None):
    """The noise model that --noise names: `measured` in the dataset `path`, kind:level[:correlation], or a JSON file.

    pred: see `measure_file`. Raises ValueError for anything else, in one line.
    """
    if text in (None, "measured"):
        return measure_file(path, pred)
    return noise.parse_noise_model(text)


# ---------------------------------------------------------------------------------------------------------------
# command
# ---------------------------------------------------------------------------------------------------------------
def main(argv=None):
    p = runtime.parser(__doc__)
    p.add_argument("--data", required=True, help="dataset (.h5) of noisy images")
    p.add_argument("--pred", help="prediction file (.h5) made from it: tells where the images are flat")
    p.add_argument("--out", help="write the noise model (.json), for --noise of other stages")
    args = p.parse_args(argv)
    runtime.check_outputs([args.data, args.pred], [args.out] if args.out else [])
    noise_model = measure_file(args.data, args.pred)
    print(summary(noise_model))
    if args.out:
        with runtime.atomic_write(args.out) as temporary:
            temporary.write_text(json.dumps(noise_model) + "\n")


if __name__ == "__main__":
    runtime.command(main)
