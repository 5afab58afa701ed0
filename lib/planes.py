"""A denoiser of slices over a volume in three planes: those see other neighbours, and their errors differ.

The mean of the three is better than each where slices are not much farther apart than pixels, for three evaluations a
slice. How much the other two count is found without clean images, by Stein's estimate (`weigh`).
"""

import functools

import numpy as np
import torch

from lib import crops, training

BYTES = 16  # that a voxel takes while the other planes are looked at
LEAST = 16  # pixels along each side that networks need
BLOCK = (32, 160, 160)  # of a volume, on which the weight is found


def across(denoise, volume, axis, context, batch=4):
    """volume (S,H,W), denoised in slices across an axis (0: as it lies) with their neighbours; (n,S,H,W) float32.

    denoise: (B,2k+1,h,w) to (B,n,h,w), tensors; k: context.
    """
    turned = np.moveaxis(np.asarray(volume, np.float32), axis, 0)
    extra = [(0, 0), *((0, max(0, LEAST - n)) for n in turned.shape[1:])]
    padded = np.pad(turned, extra, "symmetric")
    made = []
    for s in range(0, len(turned), batch):
        stacks = [crops.read_around(padded, k, context) for k in range(s, min(s + batch, len(turned)))]
        made.append(denoise(torch.from_numpy(np.ascontiguousarray(stacks))).numpy())
    out = np.concatenate(made)[..., : turned.shape[1], : turned.shape[2]]
    return np.moveaxis(out, (1, 0), (0, axis + 1))


def equip(denoise, across_axis, weight, memory):
    """Gives a student (distill.py) the attributes `alone`, `beside` and `planes`.

    across_axis: an axis of the volume to the denoiser of slices across it, whose noise lies as `turned` says. alone: a
    volume (S,H,W) denoised in its own plane by one evaluation a slice. planes: how much the other planes count,
    `weight`, 0 if it sees no neighbours. beside: the mean of a volume (S,H,W) denoised in both of them, (S,H,W)
    float32, or None above `beside.most` voxels, so that it takes no more `memory`.
    """

    def beside(volume):
        if volume.size > beside.most or len(volume) < 2:
            return None
        volume = np.asarray(volume[:], np.float32)
        return sum(across(across_axis(axis), volume, axis, denoise.context)[0] for axis in (1, 2)) / 2

    denoise.alone = lambda volume: across(across_axis(0), volume, 0, denoise.context)[0]
    beside.most = memory // BYTES
    denoise.beside, denoise.planes = beside, weight if denoise.context else 0


def turned(noise_model, axis):
    """The noise model of slices across axis 1 (they hold the slice axis and columns) or 2 (the slice axis and rows).

    The correlation table (13,13) is that along the slices times that along what stays in the plane; that along the
    other axis of the old plane now goes `through` the slices.
    """
    table = np.asarray(noise_model["correlation"])
    reach = len(table) // 2
    lines = table[:, reach], table[reach]  # along axis 1, from row to row, and axis 2, from column to column
    through, kept = lines[axis - 1], lines[2 - axis]
    along = np.zeros(len(table))
    along[reach] = 1
    for k, r in enumerate(noise_model.get("through", ()), 1):
        along[[reach - k, reach + k]] = r or 0
    between = [float(through[reach + k]) for k in (1, 2)]
    return noise_model | dict(correlation=np.outer(along, kept).tolist(), through=between)


def block(volume):
    """The middle of a volume (S,H,W), at most BLOCK, float32."""
    area = tuple(slice(max(0, (n - m) // 2), (n - m) // 2 + m if n > m else n) for n, m in zip(volume.shape, BLOCK))
    return np.asarray(volume[area], np.float32)


def weigh(single, others, y, z, s2, strength=0.1):
    """Numbers of a block y (S,H,W) for `best_weight`, (4,): means over the voxels that count, and how many do.

    single, others: denoisers a and b of the block, (S,H,W) to (S,H,W). z: fresh noise of its law. s2: the variance of
    the law at each voxel, 0 where it does not hold.

    By Stein's unbiased risk estimate, the mean square error of (1 - w) a + w b is that of

        |a + w d - y|^2 - s2 + 2 z (a' + w d'),   d = b - a, and a', d' the answers to z

    whose terms in 1, w and w^2 are returned.
    """
    steps = strength * z, -strength * z
    (plus, minus), (plus_b, minus_b) = ([f(y + step) for step in steps] for f in (single, others))
    a, d = (plus + minus) / 2, (plus_b + minus_b - plus - minus) / 2
    a_, d_ = (plus - minus) / (2 * strength), (plus_b - minus_b - plus + minus) / (2 * strength)
    terms = np.square(a - y) - s2 + 2 * z * a_, 2 * (a - y) * d + 2 * z * d_, np.square(d)
    return np.array([*(np.mean(term, where=s2 > 0, dtype=np.float64) for term in terms), (s2 > 0).sum()])


def best_weight(blocks):
    """(w between 0 and 1, error at 0, error at w) of least estimated error over the blocks of `weigh`."""
    c, b, a, _ = np.average(blocks, 0, weights=np.array(blocks)[:, 3])
    w = float(np.clip(-b / max(2 * a, 1e-20), 0, 1))
    return w, float(c), float(c + w * b + w * w * a)


def find_weight(denoise, volumes, draw, variance):
    """`best_weight` over blocks of the first and the last of {name: (S,H,W)} that have enough slices; 0 if none has.

    denoise: a student (distill.py). draw: (x, generator, y) to fresh noise; variance: (x, y) to `s2` of `weigh`.
    """
    found, some = [], [v for v in volumes.values() if len(v) > 2 * denoise.context]
    for volume in some[:: max(len(some) - 1, 1)]:
        y = block(volume)
        x = denoise.alone(y)
        z = draw(x, np.random.default_rng([len(found), 1]), y)
        found.append(weigh(denoise.alone, denoise.beside, y, z, variance(x, y)))
    found = [terms for terms in found if terms[3]]
    return best_weight(found) if found else (0.0, 1.0, 1.0)


def add_weight(path, denoise, volumes, draw, variance):
    """Adds the weight of the other planes to the checkpoint of a student; arguments of `find_weight`."""
    if not denoise.noise_model or not denoise.context:
        return print(f"distill: --planes: {path} sees single images, or knows no noise: one plane", flush=True)
    weight, *errors = find_weight(denoise, volumes, draw, variance)
    training.add_to_checkpoint(path, planes=weight)
    before, after = (-10 * np.log10(max(e, 1e-12)) for e in errors)
    print(f"distill: other planes count {weight:.2f}: estimated PSNR {before:.2f} -> {after:.2f} dB", flush=True)


def whole(denoise, volume):
    """A volume (S,H,W) denoised, its other planes counting as much as the student says: (n,S,H,W) float32."""
    out, others = across(denoise, volume, 0, denoise.context), denoise.beside(volume) if denoise.planes else None
    if others is not None:
        out[0] += np.float32(denoise.planes) * (others - out[0])
    return out


def mixed(denoise, volumes):
    """`denoise` for data.write_predictions: a student whose other planes count as much as it says."""

    @functools.lru_cache(1)
    def others(name):
        return denoise.beside(volumes[name]) if denoise.planes else None

    def image(y, name, rows):
        x = denoise(y)
        if others(name) is None:
            return x
        own = x[:, :1] + denoise.planes * (torch.from_numpy(others(name)[rows, None]) - x[:, :1])
        return torch.cat([own, x[:, 1:]], 1)

    return image
