"""Synthetic volumes that hold what medical images hold, from no patient: three-dimensional dead leaves.

Ellipsoids, boxes, shells and rods of random direction cover each other, many small and few large: their sizes follow a
power law, as in natural images (Lee, Mumford & Huang 2001). Each has a grey level, a gradient and a texture of its own;
most volumes lie in a body with black around it. A bend, a smooth shading, the slice thickness, the blur of the scanner
and sometimes its ringing come on top.

    python -m experiments.dead_leaves --out results/dead_leaves.png       # twelve of them, with and without noise
"""

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates, zoom


def rotation(rng):
    """A random rotation, (3,3)."""
    q, r = np.linalg.qr(rng.standard_normal((3, 3)))
    return (q * np.sign(np.diag(r))).astype(np.float32)


def power_law(rng, low, high, exponent=3.0):
    """A number in [low, high] with density proportional to its power -exponent."""
    k = 1 - exponent
    return (low**k + rng.random() * (high**k - low**k)) ** (1 / k)


def texture(rng, shape):
    """Pattern (S,H,W) of deviation about 1: noise of spectrum 1 / f^beta, or its level lines; repeats at its ends."""
    f = np.sqrt(sum(np.square(v) for v in np.meshgrid(*map(np.fft.fftfreq, shape), indexing="ij", sparse=True)))
    f[0, 0, 0] = 1
    folded = rng.random() < 0.5  # bright and dark bands that wind, as the folds of a brain or the beams of a bone do
    field = np.fft.ifftn(np.fft.fftn(rng.standard_normal(shape)) * f ** -rng.uniform(*(2, 3.5) if folded else (0.5, 2)))
    field = (field.real - field.real.mean()) / field.real.std()
    return (np.tanh(rng.uniform(1, 8) * np.sin(rng.uniform(2, 8) * field)) if folded else field).astype(np.float32)


def distance(kind, u, radii, wall):
    """Signed distance, in pixels and negative inside, of points (3,...) to a shape around 0; nearly, for ellipsoids."""
    if kind == "box":
        return np.max(np.abs(u) - radii[:, None, None, None], axis=0)
    far = np.sqrt(np.square(u / radii[:, None, None, None]).sum(0))
    d = (far - 1) * radii.min()
    return np.abs(d) - wall if kind == "shell" else d


def paint(volume, rng, size, thickness, textures, edge):
    """Covers a part of the volume (S,H,W) with one random shape of that size, in place; its border is `edge` wide."""
    shape = np.array(volume.shape, np.float32)
    reach = 0.6 * shape[1]
    kind = rng.choice(["ellipsoid", "ellipsoid", "box", "shell", "rod"])
    radii = np.float32(size) * rng.uniform(0.4, 1, 3).astype(np.float32)
    if kind == "rod":
        radii *= np.float32([rng.uniform(3, 20), 1, 1])
    wall = np.float32(power_law(rng, 0.5, max(0.2 * radii.min(), 0.6), 1.5))
    centre = rng.uniform(-0.1, 1.1, 3).astype(np.float32) * shape
    half = min(float(np.linalg.norm(radii) if kind == "box" else radii.max()) + 3, 2 * reach)
    box = np.array([half / thickness, half, half])
    low, high = np.maximum(centre - box, 0).astype(int), np.minimum(centre + box + 1, shape).astype(int)
    if (high <= low).any():
        return
    area = tuple(slice(a, b) for a, b in zip(low, high))
    grid = np.meshgrid(*(np.arange(a, b, dtype=np.float32) - c for a, b, c in zip(low, high, centre)), indexing="ij")
    points = np.stack([grid[0] * np.float32(thickness), grid[1], grid[2]])
    inside = np.clip(0.5 - distance(kind, np.tensordot(rotation(rng), points, 1), radii, wall) / edge, 0, 1)
    if not inside.any():
        return
    old = volume[area]
    level = rng.random() ** rng.choice([0.7, 1, 2])
    if rng.random() < 0.5:  # most structures differ little from what is around them
        level = float((old * inside).sum() / inside.sum()) + rng.normal(0, 0.08)
    slope = rng.normal(0, 0.1, 3).astype(np.float32) / reach
    new = np.float32(max(level, 0)) + np.tensordot(slope, points, 1)
    if rng.random() < 0.5:
        field, start = textures[rng.integers(len(textures))], [rng.integers(n) for n in volume.shape]
        which = np.ix_(*((np.arange(b - a) + s) % n for a, b, s, n in zip(low, high, start, volume.shape)))
        new = new + field[which] * np.float32(power_law(rng, 0.003, 0.1, 1.2))
    volume[area] = old + inside * (np.maximum(new, 0) - old)


def smooth_field(rng, shape, deviation):
    """A random field (S,H,W) of that deviation that changes over about a third of the sides."""
    coarse = rng.normal(0, deviation, (2, 4, 4))
    return zoom(coarse, [n / m for n, m in zip(shape, coarse.shape)], order=1).astype(np.float32)


def warped(volume, rng):
    """The volume (S,H,W) with its planes bent: straight edges become curves."""
    grid = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in volume.shape), indexing="ij", sparse=True)
    amount = rng.uniform(2, 10)
    bent = [grid[0] + 0 * volume, *(g + smooth_field(rng, volume.shape, amount) for g in grid[1:])]
    return map_coordinates(volume, bent, order=1, mode="mirror")


def body(rng, shape, thickness):
    """(S,H,W) from 0 to 1: where there is a body, an ellipsoid with a soft border; what is around it is black."""
    grid = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)
    centre, radii = rng.uniform(0.2, 0.8, 3) * shape, rng.uniform(0.3, 0.8, 3) * shape[1]
    radii[0] = max(radii[0] / thickness, shape[0])
    far = np.sqrt(sum(np.square((g - c) / r) for g, c, r in zip(grid, centre, radii)))
    return np.clip(0.5 - (far - 1) * radii.min() / rng.uniform(1, 3), 0, 1).astype(np.float32)


def dead_leaves(rng, slices=7, side=128):
    """A random volume (slices,side,side) float32 in [0,1]. rng: numpy Generator; the same one makes the same volume."""
    thickness = rng.choice([1, 1, rng.uniform(1, 6)])  # of the slices, pixels
    shape = (slices, side, side)
    volume = np.full(shape, rng.choice([0, rng.random()]), np.float32)
    textures = [texture(rng, shape) for _ in range(3)]
    edge = rng.uniform(1, 2.5)
    exponent, count = rng.uniform(1.2, 2.8), int(power_law(rng, 60, 400, 1.01))
    sizes = [power_law(rng, 1.2, 0.6 * side, exponent) for _ in range(count)]
    sizes = [*rng.uniform(0.1, 0.6, 15) * side, *sizes]  # no place is left bare
    for size in sorted(sizes, reverse=True) if rng.random() < 0.5 else sizes:
        paint(volume, rng, size, thickness, textures, edge)
    if rng.random() < 0.5:
        volume = warped(volume, rng)
    if rng.random() < 0.4:
        volume *= np.exp(smooth_field(rng, shape, rng.uniform(0.1, 0.4)))
    if rng.random() < 0.6:
        volume *= body(rng, shape, thickness)
    volume = gaussian_filter(volume, (0, *2 * (rng.choice([0, rng.uniform(0, 1.0)]),)))
    if rng.random() < 0.3:
        volume = zero_filled(volume, rng.uniform(0.6, 1))
    volume -= volume.min()
    if rng.random() < 0.2:
        volume *= body(rng, shape, thickness) > 0.5  # a border of no width, as of a skull-stripped head
    return volume / max(float(volume.max()), 1e-3)


def zero_filled(volume, share):
    """The volume (S,H,W) from that share of its spatial frequencies along rows and columns, as scanners fill up."""
    keep = [np.abs(np.fft.fftfreq(n)) <= share / 2 for n in volume.shape[1:]]
    return np.fft.ifft2(np.fft.fft2(volume) * np.outer(*keep)).real.astype(np.float32)


def main(argv=None):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from lib import runtime

    p = runtime.parser(__doc__)
    p.add_argument("--seed", type=int, default=0, help="default 0")
    p.add_argument("--out", required=True, help="figure to write (.png)")
    args = p.parse_args(argv)
    _, axes = plt.subplots(2, 6, figsize=(12, 4.1), layout="constrained")
    for k, ax in enumerate(axes.flat):
        x = dead_leaves(runtime.step_rng(args.seed, k))[3]
        if k >= 6:
            x = x + runtime.step_rng(args.seed, k, 1).normal(0, 12 / 255, x.shape)
        ax.imshow(x, vmin=0, vmax=1, cmap="gray")
        ax.axis("off")
    plt.savefig(args.out, dpi=80)


if __name__ == "__main__":
    from lib import runtime

    runtime.command(main)
