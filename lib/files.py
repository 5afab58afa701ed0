"""Image files: which there are, where what is made of them goes, and what a network trains on (lib/apply.py writes).

What cannot be read becomes a line in `problems`; the rest goes on.
"""

import hashlib
import itertools
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib import formats, runtime
from lib.formats import bids as bids_names

KINDS = formats.KINDS
PIXELS = 64_000_000  # to train on, at most
FLAT = 0.5  # share of three equal neighbours from which on a volume is a label map; chest X-rays of 8 bits: up to 0.07
MAPS = re.compile(r"(?:^|[_.-])(mask|dseg|probseg|labels?|aseg|aparc|atlas|[ftz]stat\d*|T[12]map|fieldmap)\.", re.I)
WINDOW = 768  # side in pixels of what is cut out of a slice if there are more


class Job(NamedTuple):
    """item: formats.Item. paths: its output files. sides: {what: file beside them}. digest: of its input."""

    item: formats.Item
    paths: list
    sides: dict
    digest: str


def digest(paths):
    """Hash of the contents of files."""
    found = hashlib.blake2b(digest_size=16)
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
        found.update(b"\0")
    return found.hexdigest()


def plan(sources, out, key=None, acquisition=None, sides=(), bids=False, share=(0, 1)):
    """([Job], [problem]) for image files and folders; out: Path of the folder to write to.

    Args: sides: what is written beside each file, such as "std". bids: `out` gets BIDS derivatives. share: (k, n), only
    every n-th job from the k-th on; the first share has the problems that are found before.
    Raises ValueError if nothing can be denoised, or if `out` is a file, lies in an input or would replace one.
    """
    for source in map(Path, sources):
        derived = bids and source.resolve() / "derivatives" in out.resolve().parents
        if source.is_dir() and source.resolve() in (out.resolve(), *out.resolve().parents) and not derived:
            raise ValueError(f"--out {out} lies in the input {source}: give another folder")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, not a folder")
    above = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not os.access(above, os.W_OK):
        raise ValueError(f"--out {out} cannot be written, {above} is read-only: give another folder")
    items, problems = formats.find(sources, key, acquisition, bids=bids)
    if bids:
        bids_names.check(out)
    inputs = {file.resolve() for item in items for file in item.files}
    jobs, taken = [], {}
    for item in items:
        try:
            paths = [bids_names.output(item, out)] if bids else formats.outputs(item, out)
        except ValueError as error:
            problems.append(str(error))
            continue
        beside = {name: bids_names.output(item, out, name) for name in sides} if bids else {}
        beside = beside or {name: formats.side_path(item, paths, name) for name in sides}
        if bids:
            images = {"denoised": paths[0], **beside}
            beside |= {f"sidecar {name}": bids_names.sidecar(path) for name, path in images.items()}
        all_paths = [*paths, *beside.values()]
        for path in all_paths:
            if path.resolve() in inputs:
                raise ValueError(f"--out {out} would replace the input {path}: give another folder")
        twice = next((path for path in all_paths if path in taken), None)
        if twice:
            problems.append(f"{item.files[0]} would go to {twice}, as {taken[twice]} does: denoise them apart")
            continue
        taken.update(dict.fromkeys(all_paths, item.files[0]))
        jobs.append(Job(item, paths, beside, f"{item.kind} {key}"))
    if not jobs:
        raise ValueError(problems[0] if problems else f"{', '.join(map(str, sources))}: nothing there to denoise")
    if bids and share[0] == 0:
        bids_names.describe([job.item for job in jobs], out)
    problems, mine = [] if share[0] else problems, []
    for job in runtime.progress(jobs[share[0] :: share[1]], "read"):
        try:
            mine.append(job._replace(digest=f"{digest(job.item.files)} {job.digest}"))
        except OSError as error:
            problems.append(f"{error.filename} cannot be read: {error.strerror}")
    if not mine and share[1] == 1:
        raise ValueError(problems[0])
    return mine, problems


def no_image(volume):
    """Why a formats.Volume is nothing to denoise, in words: a label map, a mask, a map of something; "" for an image.

    By its header; by its name, if that ends as BIDS and FreeSurfer name such files; by its values: images have noise,
    so that seldom three neighbours outside of the background are equal (in the middle of at most 8 slices).
    """
    if volume.declared:
        return f"its header calls it a {volume.declared}"
    name = MAPS.search(Path(volume.source).name)
    if name:
        return f"its name says {name[1]}"
    middle = tuple(slice(max(n - WINDOW, 0) // 2, max(n - WINDOW, 0) // 2 + WINDOW) for n in volume.slices.shape[1:])
    some = volume.slices[(np.unique(np.linspace(0, len(volume.slices) - 1, 8).round().astype(int)), *middle)]
    values, counts = np.unique(some, return_counts=True)
    if len(values) == 2:
        return "it has only two values: a mask"
    inner = some[:, :-1, :-1]
    alike = (inner == some[:, 1:, :-1]) & (inner == some[:, :-1, 1:])
    rest = inner != values[counts.argmax()]
    share = alike[rest].mean() if rest.any() else 0.0
    return f"{100 * share:.0f} % of it has the value of its neighbours: a label map" if share > FLAT else ""


def read(job, problems, force=False):
    """(job, [Volume]). Slices of a DICOM series that cannot be read become problems and are missing in both.

    Raises ValueError or OSError if nothing of the job can be read, or if it is no image (`no_image`), unless `force`.
    """
    job, volumes = read_all(job, problems)
    why = "" if force else next(filter(None, map(no_image, volumes)), "")
    if why:
        raise ValueError(f"{volumes[0].source} is left alone, {why}; --force denoises it")
    return job, volumes


def read_all(job, problems):
    """`read` of whatever it is."""
    try:
        return job, formats.read(job.item)
    except (ValueError, OSError):
        if len(job.item.files) == 1:
            raise
    good = []
    for pair in zip(job.item.files, job.paths):
        try:
            formats.read(job.item._replace(files=pair[:1]))
            good.append(pair)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if not good:
        raise ValueError(f"{job.item.files[0].parent}: no slice of a series can be read")
    readable, paths = zip(*good)
    job = job._replace(item=job.item._replace(files=readable), paths=list(paths))
    return job, formats.read(job.item)


def check_finite(array, title):
    """Returns the array; raises ValueError if it holds NaN or infinite values. title: how the error names it."""
    bad = array.size - np.count_nonzero(np.isfinite(array))
    if bad:
        raise ValueError(f"{title} holds {bad} values that are NaN or infinite")
    return array


def finite_range(slices):
    """(lowest, highest) finite number of (S,H,W); (0, 0) if there is none."""
    if slices.dtype.kind != "f":
        return float(slices.min()), float(slices.max())
    finite = (s[np.isfinite(s)] for s in slices)  # one slice at a time in memory
    ends = [(float(s.min()), float(s.max())) for s in finite if s.size]
    return (min(low for low, _ in ends), max(high for _, high in ends)) if ends else (0.0, 0.0)


def scaling(volume, low, high):
    """(scale, offset) with which (number - offset) / scale is 0 at the black end of [low, high] and 1 at the other."""
    return (low - high, high) if volume.inverted else (high - low, low)


def mapped(raw, scale, offset):
    """(number - offset) / scale as float32, computed in double precision for numbers that single does not hold."""
    values = raw.astype(np.float64 if raw.dtype.itemsize > 2 else np.float32)
    values -= offset
    values /= scale
    return values.astype(np.float32, copy=False)


def normalize(volume):
    """(values (S,H,W) float32, scale, offset): a formats.Volume, mapped linearly so that its `ends` become 0 and 1.

    Stored number = value * scale + offset. Raises ValueError if the volume is constant or holds NaN or infinite values.
    """
    raw = check_finite(volume.slices, volume.source)
    low, high = volume.ends or (float(raw.min()), float(raw.max()))
    if low == high:
        raise ValueError(f"{volume.source}: volume {volume.name!r} is constant ({low:g}): there is nothing to denoise")
    scale, offset = scaling(volume, low, high)
    values = np.empty(raw.shape, np.float32)
    for s in range(len(raw)):
        values[s] = mapped(raw[s], scale, offset)
    return values, scale, offset


def patches(slices, size):
    """Cuts slices (S,H,W) into a centred grid of size x size patches (N,size,size); a shorter side stays as it is."""
    if size is None:
        return slices
    (h, w), (ph, pw) = slices.shape[1:], (min(size, n) for n in slices.shape[1:])
    y, x = (h % ph) // 2, (w % pw) // 2
    grid = slices[:, y : y + h // ph * ph, x : x + w // pw * pw].reshape(len(slices), h // ph, ph, w // pw, pw)
    return grid.transpose(0, 1, 3, 2, 4).reshape(-1, ph, pw)


def middle(volume, slices):
    """A formats.Volume with only that many slices, those in its middle; None for all. Grey levels stay as they were."""
    count = len(volume.slices)
    if slices is None or slices >= count:
        return volume
    kept = slice((count - slices) // 2, (count - slices) // 2 + slices)
    clean = None if volume.clean is None else volume.clean[kept]
    return volume._replace(slices=volume.slices[kept], clean=clean, ends=finite_range(volume.slices))


def read_sources(sources, key=None, acquisition=None, reference=None, brain=False, slices=None, written=None):
    """(iterator over the Volumes of image files and folders, [problem]); brain: the built-in brain comes last.

    What cannot be read, or be in a dataset, is left out, and a line is added to the problems when its turn comes.

    key, acquisition, reference: as of `formats.find`. slices: as of `middle`. written: a file that is no source, as it
    is written. Raises ValueError if there is nothing to read.
    """
    items, problems = formats.find(sources, key, acquisition, reference)
    items = [item for item in items if not written or Path(written).resolve() not in map(Path.resolve, item.files)]
    if not items and not brain:
        raise ValueError(problems[0] if problems else "name files or folders to import, or --source brain")
    found = itertools.chain.from_iterable(usable(item, problems) for item in items)
    volumes = itertools.chain(found, [formats.brain()] if brain else [])
    return (middle(volume, slices) for volume in volumes), problems


def usable(item, problems):
    """Yields the volumes of a formats.Item that a dataset can hold; a problem says why another, or all, cannot be."""
    try:
        volumes = formats.read(item)
    except (ValueError, OSError) as error:
        problems.append(str(error))
        return
    for volume in volumes:
        try:
            h, w = volume.slices.shape[1:]
            if min(h, w) < 16:
                raise ValueError(f"{volume.source}: slices of {h}x{w} pixels are smaller than 16x16")
            check_finite(volume.slices, volume.source)
            normalize(volume._replace(slices=volume.slices[:1], ends=finite_range(volume.slices)))  # not constant
        except ValueError as error:
            problems.append(str(error))
        else:
            yield volume


def training_volumes(jobs, problems, least, force=False):
    """Yields what to train on: formats.Volumes named <job>-<volume> by number, with finite slices and their `ends`.

    Volumes with a side of less than `least` pixels are only taken if there are no others. So that training needs no
    more memory for a larger folder, the jobs are taken in random order until there are PIXELS, and of a volume that has
    more than its share only `training_runs`. What cannot be read, or is no image (unless `force`), becomes a problem.
    """
    share = PIXELS // min(max(len(jobs), 4), 100)
    small, taken, large = [], 0, False  # large: whether there was a volume of at least `least` pixels
    for k in np.random.default_rng(0).permutation(len(jobs)):
        try:
            _, found = read(jobs[k], problems, force)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        for j, volume in enumerate(found):
            if taken >= PIXELS:
                yield from [] if large else small
                return
            low, high = finite_range(volume.slices)
            whole = volume.slices
            for r, area in enumerate(training_runs(whole, share, runtime.step_rng(0, k, j))):
                slices, place = whole[area], tuple(axis.start for axis in area)
                if slices.dtype.kind == "f":
                    slices = np.nan_to_num(slices, nan=low, posinf=high, neginf=low)
                if slices.min() == slices.max() or min(slices.shape[1:]) < 16:
                    continue
                name = f"{k:05d}-{j:04d}" + (f"-{r}" if r else "")
                cut = dict(slices=slices, ends=(low, high), place=place, whole=whole.shape)
                volume = volume._replace(name=name, source="", **cut)
                if min(slices.shape[1:]) >= least:
                    taken = slices.size + taken * large  # the small ones before the first large one do not count
                    large = True
                    yield volume
                elif not large:
                    taken += slices.size
                    small.append(volume)
    if not large:
        yield from small


def training_runs(slices, share, rng):
    """What to train on of (S,H,W), as areas [(slice,) * 3]: all if that is at most `share` pixels, else evenly spaced
    runs of slices.

    A run has 5 to 8 neighbouring slices, if the volume has them: neighbours are worth more than other volumes. If one
    slice is too many, each has a window: of eight at random places, the one that varies most. Its sides have WINDOW
    pixels, or more if the share allows.
    """
    count, (h, w) = len(slices), slices.shape[1:]
    if slices.size <= share:
        return [tuple(slice(0, n) for n in slices.shape)]
    side = max(WINDOW, int(share**0.5)) if share < h * w else max(h, w)
    most = max(1, int(share) // (min(side, h) * min(side, w)))
    length = min(count, max(5, min(most, 8)))
    starts = np.unique(np.linspace(0, count - length, max(1, most // length)).round().astype(int))
    # corners at multiples of 8, so that the 8x8 blocks of a JPEG start at the edge of the window
    corners = [[8 * int(rng.integers(max(n - side, 0) // 8 + 1)) for n in (h, w)] for _ in range(8)]

    def spread(area):
        return np.nan_to_num(np.nanstd(slices[area].astype(np.float32)))

    windows = [(slice(top, top + side), slice(left, left + side)) for top, left in corners]
    return [max(((slice(s, s + length), *window) for window in windows), key=spread) for s in starts]


def given_map(path):
    """The map of the noise's standard deviation in an image file: callable, shape (S,H,W) of the images it is for.

    That returns by what factor the noise is stronger than in the mean, in blocks (S,H/8,W/8), and raises ValueError if
    the map has another shape. Raises ValueError if no deviation is positive.
    """
    items, problems = formats.find([path])
    if not items:
        raise ValueError(f"noise map {path}: {problems[0] if problems else 'no image'}")
    volume = formats.read(items[0])[0]
    sigma = np.nan_to_num(volume.slices.astype(np.float32), posinf=0, neginf=0)
    if not sigma.max() > 0:
        raise ValueError(f"noise map {path}: no deviation is above 0")
    factor = np.where(sigma > 0, sigma / sigma[sigma > 0].mean(), 1)
    factor = np.pad(factor, [(0, 0), *((0, -n % 8) for n in sigma.shape[1:])], "edge")
    blocks = factor.reshape(len(sigma), factor.shape[1] // 8, 8, -1, 8).mean((2, 4))

    def gains(shape):
        if tuple(shape) != sigma.shape:
            shapes = ("x".join(map(str, some)) for some in (sigma.shape, shape))
            raise ValueError("noise map {} is {}, the images are {}".format(path, *shapes))
        return blocks

    return gains
