"""Slices with their neighbours, random crops of them, and large images in tiles. Volumes are (S,H,W), by name."""

import itertools

import numpy as np
import torch
from scipy.ndimage import gaussian_filter


def check_crop(volumes, size):
    """Raises ValueError if a volume is smaller than the crop."""
    for name, array in volumes.items():
        if min(array.shape[1:]) < size:
            h, w = array.shape[1:]
            small = f"volume {name!r} has slices of {h}x{w} pixels, smaller than --crop {size}"
            raise ValueError(f"{small}; use --crop {min(h, w)} or less")


def around(s, count, context):
    """The numbers of the 2 context + 1 slices around slice s of `count`, s itself in the middle and nowhere else.

    Beyond the ends of the volume the slice at the same distance on the other side stands in, or else the farthest one.
    It is never s itself, whose noise would be taken for that of another slice. Raises ValueError for a single slice.
    """
    if context and count < 2:
        raise ValueError("a single image has no neighbouring slices: --context 0 is for those")
    out = []
    for d in range(-context, context + 1):
        inside = [k for k in (s + d, s - d) if 0 <= k < count]
        out.append(inside[0] if inside else max((0, count - 1), key=lambda k: abs(k - s)))
    return np.array(out)


def read_around(volume, s, context, area=np.s_[:, :]):
    """The slices around slice s of a volume (S,H,W), cut to `area`: (2 context + 1,h,w), read in one piece."""
    which = around(s, volume.shape[0], context)
    first = which.min()
    return volume[(slice(first, which.max() + 1), *area)][which - first]


def evenly(count, most):
    """At most so many of the numbers 0 to count - 1, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def likeness(volume):
    """How alike neighbouring slices of a volume (S,H,W) are: correlation of their details, 1 for equal ones.

    Details are differences of Gaussians (1.5 and 4 pixels), which leave out most of the noise and what all images of a
    body part have in common. Measured: heads 0.71 to 0.95, unrelated X-rays and shuffled slices 0.00. At most 64 pairs.
    """
    common, one, other = details(volume)
    return float(common / max(one * other, 1e-30) ** 0.5)


def details(volume):
    """Mean products (3,) of the details of neighbouring slices, with each other and with themselves: see `likeness`."""
    products, pairs = np.zeros(3), np.unique(np.linspace(0, volume.shape[0] - 2, 64).astype(int))
    for s in pairs:
        pair = np.asarray(volume[s : s + 2], np.float32)
        detail = gaussian_filter(pair, (0, 1.5, 1.5)) - gaussian_filter(pair, (0, 4, 4))
        one, other = detail[:, ::3, ::3]
        products += (one * other).mean(), (one * one).mean(), (other * other).mean()
    return products / len(pairs)


def least_likeness(volumes):
    """The least `likeness` of some volumes, but for those with hardly any detail, such as runs of slices in air."""
    found = np.array([details(volume) for volume in volumes])
    energy = np.sqrt(found[:, 1] * found[:, 2])
    return float((found[:, 0] / np.maximum(energy, 1e-15))[energy >= 0.1 * energy.max()].min())


def random_crops(stacks, batch, size, rng, rank=0, world=1, contexts=None, symmetries=8):
    """The same random crops, with the same one of the eight flips and rotations each, from several sets of volumes.

    Args:
        stacks: list of {name: (S,H,W)} with equal shapes; the names of the first count. batch: crops in all.
        size: pixels. rng: numpy Generator. rank, world: take only every world-th crop of the batch.
        contexts: for each of the stacks, how many neighbouring slices on each side come along (default none); they are
            mirrored at the ends of a volume, and in half of the crops their order is reversed.
        symmetries: 8; 4 for flips alone, so that rows stay rows; 2 for half turns (noise.symmetries).
    Returns a list of float32 tensors (batch / world, 2 context + 1, size, size). Every slice is equally likely.

    All indices are drawn at once; the pixels are copied once, from views, which serves arrays on disk as well.
    """
    names = list(stacks[0])
    ends = np.cumsum([stacks[0][name].shape[0] for name in names])
    which = rng.integers(ends[-1], size=batch)
    corner, turn = rng.random((batch, 2)), rng.integers(8, size=batch)
    contexts = contexts or [0] * len(stacks)
    upside = rng.integers(2, size=batch) if any(contexts) else np.zeros(batch, int)
    mine = range(rank, batch, world)
    out = [np.empty((len(mine), 2 * context + 1, size, size), np.float32) for context in contexts]
    for row, j in enumerate(mine):
        v = int(np.searchsorted(ends, which[j], side="right"))
        name, s = names[v], int(which[j] - (ends[v - 1] if v else 0))
        h, w = stacks[0][name].shape[1:]
        y, x = int(corner[j, 0] * (h - size + 1)), int(corner[j, 1] * (w - size + 1))
        for stack, context, crops in zip(stacks, contexts, out):
            crop = read_around(stack[name], s, context, np.s_[y : y + size, x : x + size])
            crop = crop.swapaxes(1, 2) if symmetries == 8 and turn[j] & 1 else crop
            rows, columns = turn[j] & 2, turn[j] & (2 if symmetries == 2 else 4)
            crops[row] = crop[:: -1 if upside[j] else 1, :: -1 if rows else 1, :: -1 if columns else 1]
    return [torch.from_numpy(crops) for crops in out]


def mean_over_symmetries(function, y, symmetries=8):
    """Mean of function(y) over 8, 4 or 2 flips and turns of y (B,C,H,W), each undone (noise.symmetries); (B,n,H,W)."""
    total = 0
    for turned in (y, y.transpose(2, 3))[: 2 if symmetries == 8 else 1]:
        for flips in ((), (2, 3), (2,), (3,))[: min(symmetries, 4)]:
            out = function(turned.flip(flips)).flip(flips)
            total = total + (out if turned is y else out.transpose(2, 3))
    return total / symmetries


def rms_difference(a, b):
    """Root mean square of a - b over all slices of two sets of volumes of equal shapes."""
    squares = count = 0.0
    for name, volume in a.items():
        for s in range(volume.shape[0]):
            squares += float(np.square(volume[s] - b[name][s], dtype=np.float64).sum())
            count += volume[s].size
    return (squares / count) ** 0.5


def enlarge(blocks, shape):
    """Means over blocks of 8x8 pixels (h/8,w/8) as a smooth image of `shape` (h,w), float32, linear between centres."""
    for axis, n in enumerate(shape):
        at = np.clip((np.arange(n) - 3.5) / 8, 0, blocks.shape[axis] - 1)
        low = np.minimum(at.astype(int), max(blocks.shape[axis] - 2, 0))
        high = np.minimum(low + 1, blocks.shape[axis] - 1)
        part = (at - low).reshape(-1, *[1] * (1 - axis))
        blocks = blocks.take(low, axis) * (1 - part) + blocks.take(high, axis) * part
    return blocks.astype(np.float32)


def tiling(bytes_per_pixel, crop, memory):
    """(side, overlap) of tiles in pixels, multiples of 32, such that a network takes a third of `memory` bytes.

    The overlap is two training crops: NAFNet's attention reaches 1.5 crops, and the features beyond. The side is at
    least 2 overlap + 128, whatever the memory.
    """
    overlap = -(-2 * crop // 32) * 32
    return max(2 * overlap + 128, int((memory / 3 / bytes_per_pixel) ** 0.5) // 32 * 32), overlap


def tiled(function, y, side, overlap=160):
    """function(y) of y (B,C,H,W), at most side x side pixels at a time: in overlapping tiles, for images too large.

    function: (B,C,h,w) to (B,n,h,w). At each edge of a tile, which misses its surroundings, a quarter of the overlap is
    dropped; across the middle half one tile fades into the next. Tiles begin at multiples of side - overlap: choose
    them so that the network's lowest resolution divides these.
    """
    h, w = y.shape[-2:]
    together = max(1, side**2 // (min(h, side) * min(w, side)))
    if len(y) > together:
        return torch.cat([tiled(function, part, side, overlap) for part in y.split(together)])
    if max(h, w) <= side:
        return function(y)
    out = None
    for (top, rows), (left, columns) in itertools.product(fades(h, side, overlap), fades(w, side, overlap)):
        area = np.s_[..., top : top + len(rows), left : left + len(columns)]
        piece = function(y[area])
        out = y.new_zeros(*piece.shape[:2], h, w) if out is None else out
        out[area] += piece * (rows[:, None] * columns)
    return out


def fades(n, side, overlap):
    """The tiles along an axis of n pixels: [(start, weights (up to side,))]; the weights of each pixel sum to 1."""
    out = []
    for start in range(0, max(n - overlap, 1), side - overlap):
        size = min(side, n - start)
        rise = ((torch.arange(size) + 0.5 - overlap / 4) / (overlap / 2)).clamp(0, 1)
        first, last = start == 0, start + size == n  # the edge of the image is no edge of a tile
        out.append((start, torch.ones(size) if first and last else rise.flip(0) if first else rise))
        if not first and not last:
            out[-1] = (start, torch.minimum(rise, rise.flip(0)))
    return out
