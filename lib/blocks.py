"""Square blocks of images, freed of their plane, and their spectra: where noise is looked for."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.fft import fft2

FLATTEST = 0.02  # share of the blocks of like intensity that are measured


def in_blocks(images, side):
    """All side x side blocks of images [(H,W)], half overlapping, (n,side,side) float32."""
    return np.concatenate(
        [sliding_window_view(x, (side, side))[:: side // 2, :: side // 2].reshape(-1, side, side) for x in images]
    ).astype(np.float32, copy=False)


def plane(side):
    """Orthonormal basis (3, side * side) of the planes over a block."""
    ramp = np.arange(side) - (side - 1) / 2
    ramp, flat = ramp / np.linalg.norm(ramp), np.ones(side) / side**0.5
    return np.stack([np.outer(flat, flat), np.outer(ramp, flat), np.outer(flat, ramp)]).reshape(3, -1)


def waves(blocks):
    """DFT of blocks freed of their plane, (n,side,side) complex, of unit power for white noise of unit variance."""
    side, basis = blocks.shape[-1], plane(blocks.shape[-1]).astype(np.float32)
    flat = blocks.reshape(len(blocks), -1)
    flat = flat - flat.mean(1, keepdims=True)
    flat -= (flat @ basis.T) @ basis
    return fft2(flat.reshape(blocks.shape)) / side  # SciPy's keeps single precision


def periodogram(blocks):
    """Power at each frequency of blocks freed of their plane, (n,side,side); of white noise: its variance."""
    found = waves(blocks)
    return np.square(found.real) + np.square(found.imag)


def expected(correlation, side):
    """What `periodogram` gives on average for noise of unit variance and this correlation: exact, (side,side)."""
    i = np.arange(side)
    table = np.zeros((4 * max(side, len(correlation) // 2) + 1,) * 2)
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


def flat_enough(power, structure, among, count, faint):
    """How many of the flattest blocks `flattest` should look at: `count`, or more if so many are flat enough.

    Enough: the structure of a prediction (n,side,side) has less than the share `faint` of the power of the noise. A
    prediction holds some of the noise, so that the very flattest of its blocks have less noise than others. The other
    arguments are those of `flattest`.
    """
    _, even = halves(power.shape[-1])
    for _ in range(2):
        most = faint * flattest(power, structure, among, count)[among].mean()
        flat = sum(int((structure[:, among & half].mean(1) < most).sum()) for half in (even, ~even)) // 2
        count = max(count, flat)
    return count


def flattest_spectrum(power, structure, bin_of, weight, faint=0.0):
    """Mean power spectrum (16,16) of the flattest blocks, each bin of intensity scaled to its own level.

    faint: of a prediction, all blocks count where its structure has less than this share of the noise's power at low
    frequencies. It holds some of the noise, so that those where it is flattest have less noise than others.
    """
    white = expected(np.ones((1, 1)), power.shape[-1])
    frequency = halves(power.shape[-1])[0]
    low, high = (frequency < 0.25) & (white > 0.05), frequency >= 0.25
    rows = []
    for k in np.unique(bin_of):
        i = np.flatnonzero(bin_of == k)
        if len(i) >= max(100, 0.01 * len(bin_of)):  # few blocks alike by chance must not decide
            count, own = max(30, int(FLATTEST * len(i))), structure[i] / weight
            if faint:
                count = flat_enough(power[i] / weight, own, low, count, faint)
            found = flattest(power[i], own, low, count) / np.maximum(white, 0.05)
            level = max((found / weight)[high].mean(), 1e-12)
            rows.append((count, len(i), level, (found / weight)[low].mean() / level, found / level))
    if not rows:
        raise ValueError("too few blocks of like intensity to measure the noise: it needs about a 160x160 image")
    *bin_facts, found = (np.array(column) for column in zip(*rows))
    out = np.tensordot(bin_trust(*bin_facts), found, 1)
    out[0, 0] = 0  # unknown: blocks have lost their mean
    return (out + np.roll(out[::-1, ::-1], (1, 1), (0, 1))) / 2


def stationary(blocks):
    """Whether the noise (2x2 checker differences) is about as strong in each quarter of a block, (n,) bool."""
    half = blocks.shape[-1] // 2 - 1
    checker = np.square(blocks[:, 1:, 1:] - blocks[:, 1:, :-1] - blocks[:, :-1, 1:] + blocks[:, :-1, :-1])
    ends = slice(0, half), slice(-half, None)
    quarters = np.stack([checker[:, a, b].mean((1, 2)) for a in ends for b in ends])
    return quarters.max(0) < 3 * quarters.min(0)


def usable(blocks):
    """Blocks without a constant area: masked, saturated or photon-free pixels carry no noise to measure. (n,) bool"""
    if not len(blocks):
        return np.zeros(0, bool)
    flat, corner = blocks.reshape(len(blocks), -1), blocks[:, :-1, :-1]
    same = (blocks[:, 1:, 1:] == corner) & (blocks[:, 1:, :-1] == corner) & (blocks[:, :-1, 1:] == corner)
    extreme = np.maximum(*((flat == m[:, None]).mean(1) for m in (flat.min(1), flat.max(1))))
    return (extreme < 0.3) & (same.mean((1, 2)) < 0.15)


def bins(x, most):
    """Which equal step of intensity each x belongs to, of at most `most`; the outermost 0.1 % are put to the ends."""
    low, high = np.quantile(x, [0.001, 0.999]) if len(x) else (0, 1)
    count = max(1, min(most, len(x) // 150))
    return np.clip((x - low) / max(high - low, 1e-12) * count, 0, count - 1).astype(int)


def bin_trust(count, size, level, ratio):
    """Weights (n,), of sum 1, of bins of intensity: those count whose flattest blocks hold the least structure.

    count: blocks measured; size: blocks in the bin; level: of their noise; ratio: power at low frequencies over that
    level; (n,) all. Bins with little noise do not count: what is measured there is something else, such as the rounding
    of black background. How much is little, the flatter bins decide: the level of others is that of their edges.
    """
    flatter = 1 / (1 + ((ratio - ratio.min()) / 0.3) ** 2)
    ratio = np.where(level > 0.25 * np.average(level, weights=flatter * size * level), ratio, np.inf)
    weight = count * np.exp(-(((ratio - ratio.min()) / 0.1) ** 2))
    return weight / weight.sum()


def shared_through(stacks, correlation, lag):
    """Correlation of the noise with the same pixel `lag` slices away, from stacks of neighbouring slices [(S,H,W)].

    Where both slices are flat, what their high frequencies have in common is noise that they share. The flattest blocks
    are looked for in the sum of the two slices, by half of the frequencies, and measured by the other half. Returns
    None if there are too few blocks to tell.
    """
    expect, (frequency, even) = np.maximum(expected(correlation, 8), 1e-6).astype(np.float32), halves(8)
    high, low = frequency >= 0.25, (frequency < 0.25) & (expect > 0.05)
    high &= expect > 0.1 * expect[high].mean()
    common, power, both, mean = [], [], [], []
    for stack in stacks:
        for s in range(len(stack) - lag):
            one, other = (in_blocks([stack[k]], 8) for k in (s, s + lag))
            keep = usable(one) & usable(other)
            one, other = one[keep], other[keep]
            a, b = waves(one), waves(other)
            shared, own = (a * b.conj()).real / expect, (np.square(np.abs(a)) + np.square(np.abs(b))) / 2 / expect
            common.append(shared)
            power.append(own)
            both.append(2 * (own + shared))
            mean.append((one + other).mean((1, 2)) / 2)
    if not mean:
        return None
    common, power, both, mean = map(np.concatenate, (common, power, both, mean))
    bin_of, rows = bins(mean, 16), []
    for k in np.unique(bin_of):
        i = np.flatnonzero(bin_of == k)
        if len(i) >= max(100, 0.01 * len(bin_of)):
            count, shared, own, structure = max(30, int(FLATTEST * len(i))), 0.0, 0.0, 0.0
            for chosen_by, measured_by in ((even, ~even), (~even, even)):
                best = i[np.argsort(both[i][:, high & chosen_by].sum(1))[:count]]
                shared += common[best][:, high & measured_by].sum()
                own += power[best][:, high & measured_by].sum()
                structure += power[best][:, low].mean()
            level = own / count / high.sum()
            rows.append((count, len(i), level, structure / 2 / max(level, 1e-12), shared / max(own, 1e-12)))
    if not rows:
        return None
    *bin_facts, found = map(np.array, zip(*rows))
    return float(bin_trust(*bin_facts) @ found)
