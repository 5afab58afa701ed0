"""Images to datasets: maps what formats.py reads to about [0,1], splits it, and writes a file of data.py's contract.

In    formats.Volumes
Out   knee.h5    volumes/<name>/noisy (and clean) (S,H,W) float32, with split, scale, offset, source, fingerprint

python data.py import scans/ --out knee.h5          # the command is data.py's
"""

import itertools

import numpy as np

import formats
from data import SPLITS, fingerprint, finite, write_volumes


def blocks(count, shares):
    """Splits `count` consecutive slices into contiguous blocks: [(split, first, end)], val and test in the middle.

    The middle of a volume is the most like the rest of it; its ends often hold little but background.
    """
    val, test = at_least_one(count, shares)
    test = test if shares[0] else count - val
    first = (count - val - test) // 2 if val + test else 0
    edges = [("train", 0, first), ("val", first, first + val), ("test", first + val, first + val + test)]
    return [b for b in [*edges, ("train", first + val + test, count)] if b[1] < b[2]]


def at_least_one(count, shares):
    """How many of `count` things are for val and test: at least one each, unless there are fewer than three in all."""
    return [max(1, round(count * share)) if share and (count >= 3 or share == 1) else 0 for share in shares[1:]]


def shares_of(split):
    """(train, val, test) shares of --split."""
    if split in SPLITS:
        return [float(split == s) for s in SPLITS]
    try:
        shares = [float(s) for s in split.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"--split {split}: give train, val, test, or three shares that sum to 1, such as 0.8,0.1,0.1")
    return shares


def normalised(volume):
    """(values (S,H,W) float32, scale, offset) of a formats.Volume, mapped to [0,1] by its minimum and maximum."""
    raw = finite(volume.slices, volume.source)
    low, high = volume.ends or (float(raw.min()), float(raw.max()))
    if low == high:
        raise ValueError(f"{volume.source}: volume {volume.name!r} is constant ({low:g}): there is nothing to denoise")
    scale, offset = (low - high, high) if volume.inverted else (high - low, low)
    values = np.empty(raw.shape, np.float32)
    for s in range(len(raw)):
        values[s] = (raw[s].astype(np.float64) - offset) / scale
    return values, scale, offset


def import_images(args):
    """Reads image files, maps each volume linearly to [0,1] by its own minimum and maximum, splits, writes."""
    if not args.sources and not args.source:
        raise ValueError("name files or folders to import, or --source brain")
    shares = shares_of(args.split)
    items, problems = formats.find(args.sources, args.key, args.acquisition, args.reference)
    if problems and not items and not args.source:
        raise ValueError(problems[0])
    for problem in problems:
        print(f"left out: {problem}", flush=True)
    volumes = itertools.chain.from_iterable(formats.read(item) for item in items)
    volumes = itertools.chain(volumes, [formats.brain()] * (args.source == "brain"))
    write_dataset(args.out, volumes, shares, vars(args), args.patch)


def write_dataset(path, volumes, shares, args, patch=None):
    """A dataset file of formats.Volumes, one in memory at a time once there are ten.

    Whole volumes are shared out where there are ten or more, or nothing to divide in one; else blocks of slices.
    """
    few = list(itertools.islice(volumes, 10))
    if not few:
        raise ValueError("no image that can be trained on: damaged, constant, or smaller than 16x16")
    whole = len(few) == 10 or min(len(v.slices) for v in few) < 10
    names, groups = set(), []
    with write_volumes(path, "dataset", "import", args) as add:
        for volume in itertools.chain(few, volumes):
            name, number = volume.name.replace("/", "_"), 2
            while name in names:
                name, number = f"{volume.name}-{number}", number + 1
            names.add(name)
            values, scale, offset = normalised(volume)
            keys, arrays = ["noisy"], [values]
            if volume.clean is not None:
                keys, arrays = ["noisy", "clean"], [values, ((volume.clean - offset) / scale).astype(np.float32)]
            parts = [("train", 0, len(values))] if whole else blocks(len(values), shares)
            for split, first, end in parts:
                part = name if len(parts) == 1 else f"{name}_{first:03d}-{end - 1:03d}"
                stacks = [patches(a[first:end], patch) for a in arrays]
                kept = dict(split=split, scale=scale, offset=offset, source=volume.source)
                written = add(part, stacks[0].shape, keys, **kept, fingerprint=fingerprint(stacks[0]))
                for array, stack in zip(written, stacks):
                    array[:] = stack
                groups.append(written[0].parent)
        if whole:  # only now is it known how many there are
            val, test = at_least_one(len(groups), shares)
            of_volume = [s for s, n in zip(SPLITS, (len(groups) - val - test, val, test)) for _ in range(n)]
            for group, split in zip(groups, of_volume):
                group.attrs["split"] = split


def patches(slices, size):
    """The centred grid of whole size x size patches of each slice, as more slices; a side below `size` stays whole."""
    if size is None:
        return slices
    (h, w), (ph, pw) = slices.shape[1:], (min(size, n) for n in slices.shape[1:])
    y, x = (h % ph) // 2, (w % pw) // 2
    grid = slices[:, y : y + h // ph * ph, x : x + w // pw * pw].reshape(len(slices), h // ph, ph, w // pw, pw)
    return grid.transpose(0, 1, 3, 2, 4).reshape(-1, ph, pw)
