"""From image files to what a network trains on, and a denoiser over image files, written under another folder.

A file is written completely or not at all. files.json records each one, with a digest of its input and the denoiser, so
that a run started again goes on after the last file. An existing file is replaced only if this same run had begun to
write it, or with `force`. What cannot be read or written becomes a line in `problems`, and the rest goes on.
"""

import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lib import crops, formats, runtime

KINDS = formats.KINDS
PIXELS = 64_000_000  # to train on, at most
FLAT = 0.5  # share of three equal neighbours from which on a volume is a label map; chest X-rays of 8 bits: up to 0.07
MAPS = re.compile(r"(?:^|[_.-])(mask|dseg|probseg|labels?|aseg|aparc|atlas|[ftz]stat\d*|T[12]map|fieldmap)\.", re.I)
WINDOW = 768  # side in pixels of what is cut out of a slice if there are more


class Job(NamedTuple):
    """item: formats.Item. paths: its output files. std: the file for its uncertainty, or None. digest: of its input."""

    item: formats.Item
    paths: list
    std: Path | None
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


def plan(sources, out, key=None, acquisition=None, std=False):
    """([Job], [problem]) for image files and folders; out: Path of the folder to write to; std: also the uncertainty.

    Raises ValueError if nothing can be denoised, or if `out` is a file, lies in an input or would replace one.
    """
    for source in map(Path, sources):
        if source.is_dir() and source.resolve() in (out.resolve(), *out.resolve().parents):
            raise ValueError(f"--out {out} lies in the input {source}: give another folder")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, not a folder")
    items, problems = formats.find(sources, key, acquisition)
    inputs = {file.resolve() for item in items for file in item.files}
    jobs, taken = [], {}
    for item in items:
        paths = formats.outputs(item, out)
        std_path = formats.std_path(item, paths) if std else None
        all_paths = [*paths, *([std_path] if std else [])]
        for path in all_paths:
            if path.resolve() in inputs:
                raise ValueError(f"--out {out} would replace the input {path}: give another folder")
        twice = next((path for path in all_paths if path in taken), None)
        if twice:
            problems.append(f"{item.files[0]} would go to {twice}, as {taken[twice]} does: denoise them apart")
            continue
        try:
            jobs.append(Job(item, paths, std_path, f"{digest(item.files)} {item.kind} {key}"))
            taken.update(dict.fromkeys(all_paths, item.files[0]))
        except OSError as error:
            problems.append(str(error))
    if not jobs:
        raise ValueError(problems[0] if problems else f"{', '.join(map(str, sources))}: nothing there to denoise")
    return jobs, problems


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
        values[s] = (raw[s].astype(np.float64) - offset) / scale
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


def read_sources(sources, key=None, acquisition=None, reference=None, brain=False, slices=None):
    """(iterator over the Volumes of image files and folders, [problem]); brain: the built-in brain comes last.

    key, acquisition, reference: as of `formats.find`. slices: as of `middle`. Raises ValueError if there is nothing to
    read.
    """
    items, problems = formats.find(sources, key, acquisition, reference)
    if not items and not brain:
        raise ValueError(problems[0] if problems else "name files or folders to import, or --source brain")
    volumes = itertools.chain.from_iterable(formats.read(item) for item in items)
    volumes = itertools.chain(volumes, [formats.brain()] if brain else [])
    return (middle(volume, slices) for volume in volumes), problems


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
            for r, slices in enumerate(training_runs(volume.slices, share, runtime.step_rng(0, k, j))):
                if slices.dtype.kind == "f":
                    slices = np.nan_to_num(slices, nan=low, posinf=high, neginf=low)
                if slices.min() == slices.max() or min(slices.shape[1:]) < 16:
                    continue
                name = f"{k:05d}-{j}" + (f"-{r}" if r else "")
                volume = volume._replace(name=name, source="", slices=slices, ends=(low, high))
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
    """What to train on of (S,H,W): [(s,h,w)], all if that is at most `share` pixels, else evenly spaced runs of slices.

    A run has 5 to 8 neighbouring slices, if the volume has them: neighbours are worth more than other volumes. If one
    slice is too many, each has a window: of eight at random places, the one that varies most. Its sides have WINDOW
    pixels, or more if the share allows.
    """
    count, (h, w) = len(slices), slices.shape[1:]
    if slices.size <= share:
        return [slices]
    side = max(WINDOW, int(share**0.5)) if share < h * w else max(h, w)
    most = max(1, int(share) // (min(side, h) * min(side, w)))
    length = min(count, max(5, min(most, 8)))
    starts = np.unique(np.linspace(0, count - length, max(1, most // length)).round().astype(int))
    runs = [slices[first : first + length] for first in starts]
    # corners at multiples of 8, so that the 8x8 blocks of a JPEG start at the edge of the window
    corners = [[8 * int(rng.integers(max(n - side, 0) // 8 + 1)) for n in (h, w)] for _ in range(8)]
    return [max((run[:, top : top + side, left : left + side] for top, left in corners), key=spread) for run in runs]


def spread(slices):
    return np.nan_to_num(np.nanstd(slices.astype(np.float32)))


def denoise_volume(volume, denoise):
    """(slices, std) of a formats.Volume, denoised one by one, in their own units and type; what is not finite stays.

    denoise: callable, a float32 tensor (1,2k+1,H,W) of a slice with k neighbours on each side, about [0,1], to
    (1,1,H,W), or (1,2,H,W) with the standard deviation; its attribute `context` is k (0 without one). What it changes
    is added to the stored numbers, so that no change returns the same bits. std: (S,H,W) float32, 0 if there is none.
    Raises ValueError below 16x16 pixels, or for a single slice that needs neighbours.
    """
    low, high = finite_range(volume.slices)
    if min(volume.slices.shape[1:]) < 16:
        raise ValueError(f"{volume.source}: {'x'.join(map(str, volume.slices.shape[1:]))} pixels, fewer than 16x16")
    std = np.zeros(volume.slices.shape, np.float32)
    if high == low:
        return volume.slices, std
    scale, offset = scaling(volume, low, high)
    wide = np.float64 if volume.slices.dtype.itemsize > 2 else np.float32
    context, count, ready = getattr(denoise, "context", 0), len(volume.slices), {}
    if context and count < 2:
        raise ValueError(f"{volume.source}: a single image, and the student sees neighbouring slices")

    def mapped(s):
        y = volume.slices[s].astype(wide)
        y -= offset
        y /= scale
        return np.nan_to_num(y.astype(np.float32, copy=False), copy=False, nan=0, posinf=1, neginf=0)

    out = np.empty(volume.slices.shape, volume.slices.dtype)
    for s in range(count):
        which = crops.around(s, count, context)
        ready = {k: ready[k] if k in ready else mapped(k) for k in which}  # each slice is mapped once
        x, *deviation = denoise(torch.from_numpy(np.stack([ready[k] for k in which]))[None])[0].numpy()
        x -= ready[s]
        x *= scale
        out[s] = formats.as_type(volume.slices[s] + x, out.dtype)
        if deviation:
            std[s] = deviation[0] * abs(scale)
    return out, std


def denoise_files(jobs, denoise, method, folder, problems, force=False, std=False, look=None):
    """Reads, denoises and writes every job. Returns (number of files written, number that were there already).

    Args:
        denoise: see `denoise_volume`. method: a text that identifies it. folder: Path, for files.json.
        problems: list to which a line is added for each file that is left out. force: replace existing files.
        std: whether to write the standard deviations, which denoise then gives, to Job.std.
        look: called with each job, its volumes and the denoised slices, once they are written; with the job alone if
        they were there already.
    """
    record = folder / "files.json"
    done = json.loads(record.read_text()) if record.exists() else {}
    written = kept = 0
    for job in runtime.progress(jobs, "denoise"):
        paths = [*job.paths, *([job.std] if std else [])]
        entry = {"mark": f"{job.digest} {method}"}
        name = hashlib.blake2b(str([p.relative_to(folder.parent) for p in paths]).encode(), digest_size=8).hexdigest()
        if done.get(name) == {**entry, "whole": True} and all(path.exists() for path in paths):
            kept += len(job.paths)
            if look:
                look(job)
            continue
        existing = next((path for path in paths if path.exists()), None)
        if existing and not force and done.get(name) != {**entry, "whole": False}:
            problems.append(f"{existing} exists already, and is not of this run: --force replaces it")
            continue
        try:
            readable, volumes = read(job, problems, force)
            arrays, deviations = zip(*(denoise_volume(volume, denoise) for volume in volumes))
            record_state(record, done, name, {**entry, "whole": False})  # from here on, what is at `paths` is ours
            formats.write(readable.item, arrays, readable.paths, method)
            if std:
                formats.write_std(readable.item, deviations, job.std)
            record_state(record, done, name, {**entry, "whole": readable is job})
            written += len(readable.paths)
            if look:
                look(job, volumes, arrays)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:  # RuntimeError: torch lacks memory
            text = " ".join(str(error).split())[:300]
            problems.append(text if str(job.item.files[0].parent) in text else f"{job.paths[0]}: {text}")
    return written, kept


def record_state(record, done, name, state):
    """Sets done[name] to the state of a job, and writes `done` to the file `record`."""
    done[name] = state
    with runtime.atomic_write(record) as temporary:
        temporary.write_text(json.dumps(done, indent=1) + "\n")
