"""Image files through a denoiser, for denoise.py: the same names come out under another folder.

Every file is written whole or not at all. What was written is noted, with a digest of the input and of the denoiser, in
files.json: started again, a run goes on after the last file. A file that is there is replaced only if this very run had
begun with it, or with `force`. What cannot be read or written becomes a line in `problems`, and the rest goes on.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import formats
import imports
import runtime


class Job(NamedTuple):
    """item: formats.Item. paths: where its files go. std: where its uncertainty goes, or None. mark: its digest."""

    item: formats.Item
    paths: list
    std: Path | None
    mark: str


def digest(paths):
    """Hash of the contents of files."""
    found = hashlib.blake2b(digest_size=16)
    for path in paths:
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                found.update(part)
        found.update(b"\0")
    return found.hexdigest()


def plan(sources, out, key=None, acquisition=None, std=False):
    """([Job], [problem]) of image files and folders. Raises ValueError if `out` is, or lies in, one of them."""
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
        deviation = formats.std_path(item, paths) if std else None
        all_paths = [*paths, *([deviation] if std else [])]
        for path in all_paths:
            if path.resolve() in inputs:
                raise ValueError(f"--out {out} would replace the input {path}: give another folder")
        twice = next((path for path in all_paths if path in taken), None)
        if twice:
            problems.append(f"{item.files[0]} would go to {twice}, as {taken[twice]} does: denoise them apart")
            continue
        try:
            jobs.append(Job(item, paths, deviation, f"{digest(item.files)} {item.kind} {key}"))
            taken.update(dict.fromkeys(all_paths, item.files[0]))
        except OSError as error:
            problems.append(str(error))
    if not jobs:
        raise ValueError(problems[0] if problems else f"{', '.join(map(str, sources))}: nothing there to denoise")
    return jobs, problems


PIXELS, WINDOW = 64_000_000, 768  # trained on, at most; where there are more, a window of so many pixels of a slice


def collect(jobs, path, problems, least, everything=False):
    """A dataset of what is trained on, everything in the train split, under numbers instead of names.

    Volumes with a side of less than `least` pixels are only taken if there are no others. What training needs does not
    grow with the folder: the jobs are taken in random order until there are PIXELS, and of a volume that has more than
    its share only a part (see `part`); `everything` takes all.
    """
    small, order = [], np.random.default_rng(0).permutation(len(jobs))
    share = np.inf if everything else PIXELS // min(max(len(jobs), 4), 100)

    def volumes():
        taken = large = 0
        for k in range(len(jobs)) if everything else order:
            try:
                _, found = read(jobs[k], problems)
            except (ValueError, OSError) as error:
                problems.append(str(error))
                continue
            for j, volume in enumerate(found):
                if taken >= PIXELS and not everything:
                    return
                low, high = finite_range(volume.slices)
                slices = part(volume.slices, share, runtime.step_rng(0, k, j))
                if slices.dtype.kind == "f":  # what is not finite gets the lowest number
                    slices = np.nan_to_num(slices, nan=low, posinf=high, neginf=low)
                if slices.min() < slices.max() and min(slices.shape[1:]) >= 16:
                    volume = volume._replace(name=f"{k:05d}-{j}", source="", slices=slices, ends=(low, high))
                    if min(slices.shape[1:]) >= least:
                        taken = slices.size + taken * large  # small ones do not count any more
                        large = True
                        yield volume
                    elif not large:
                        taken += slices.size
                        small.append(volume)
        yield from [] if large else small

    imports.write_dataset(path, volumes(), [1.0, 0, 0], {})


def part(slices, share, rng):
    """(S,H,W) if that is at most `share` pixels, else evenly spaced slices, and if one is too many, a window of one.

    The window has sides of WINDOW pixels, or more if the share allows; of some, the one that varies most.
    """
    count, (h, w) = len(slices), slices.shape[1:]
    if slices.size <= share:
        return slices
    side = max(WINDOW, int(share**0.5)) if share < h * w else max(h, w)
    most = max(1, int(share) // (min(side, h) * min(side, w)))
    slices = slices[np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))]
    # at multiples of 8, JPEG's grid stays in its place
    corners = [[8 * int(rng.integers(max(n - side, 0) // 8 + 1)) for n in (h, w)] for _ in range(8)]
    windows = [slices[:, top : top + side, left : left + side] for top, left in corners]
    return max(windows, key=lambda window: np.nan_to_num(np.nanstd(window.astype(np.float32))))


def read(job, problems):
    """(job, its volumes); of a DICOM series, what can be read: each slice that cannot becomes a problem of its own."""
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
    files, paths = zip(*good)
    job = job._replace(item=job.item._replace(files=files), paths=list(paths))
    return job, formats.read(job.item)


def finite_range(slices):
    """(lowest, highest) finite number; (0, 0) if there is none."""
    if slices.dtype.kind != "f":
        return float(slices.min()), float(slices.max())
    ends = [(float(s[good].min()), float(s[good].max())) for s in slices if (good := np.isfinite(s)).any()]
    return (min(e[0] for e in ends), max(e[1] for e in ends)) if ends else (0.0, 0.0)


def denoise_volume(volume, denoise):
    """The slices of a formats.Volume, denoised one by one, in their own units and type; what is not finite stays.

    The network's change is added to the stored numbers, so that one that changes nothing returns the same bits.
    """
    low, high = finite_range(volume.slices)
    if min(volume.slices.shape[1:]) < 16:
        raise ValueError(f"{volume.source}: {'x'.join(map(str, volume.slices.shape[1:]))} pixels, fewer than 16x16")
    if high == low:  # nothing to denoise
        return volume.slices
    scale, offset = (low - high, high) if volume.inverted else (high - low, low)
    wide = np.float64 if volume.slices.dtype.itemsize > 2 else np.float32
    out = np.empty(volume.slices.shape, volume.slices.dtype)
    for s, raw in enumerate(volume.slices):
        y = raw.astype(wide)
        y -= offset
        y /= scale
        y = np.nan_to_num(y.astype(np.float32, copy=False), copy=False, nan=0, posinf=1, neginf=0)
        x = denoise(torch.from_numpy(y)[None, None])[0, 0].numpy()
        x -= y
        x *= scale
        out[s] = formats.as_type(raw + x, out.dtype)
    return out


def run(jobs, denoise, method, folder, problems, force=False, std=None):
    """Reads, denoises and writes every job. Returns (files written, files that were there already).

    Args:
        denoise: see `denoise_volume`. method: what made it. folder: where files.json is kept.
        std: callable (job number, volumes) to the standard deviations, like the volumes; written to Job.std.
    """
    record = folder / "files.json"
    done = json.loads(record.read_text()) if record.exists() else {}
    written = kept = 0
    for k, job in enumerate(runtime.progress(jobs, "denoise")):
        paths = [*job.paths, *([job.std] if std else [])]
        entry = {"mark": f"{job.mark} {method}"}
        name = hashlib.blake2b(str([p.relative_to(folder.parent) for p in paths]).encode(), digest_size=8).hexdigest()
        if done.get(name) == {**entry, "whole": True} and all(path.exists() for path in paths):
            kept += len(job.paths)
            continue
        there = next((path for path in paths if path.exists()), None)
        if there and not force and done.get(name) != {**entry, "whole": False}:
            problems.append(f"{there} exists already, and is not of this run: --force replaces it")
            continue
        try:
            readable, volumes = read(job, problems)
            arrays = [denoise_volume(volume, denoise) for volume in volumes]
            note(record, done, name, {**entry, "whole": False})  # from here on, what stands there is ours
            formats.write(readable.item, arrays, readable.paths, method)
            if std:
                formats.write_std(readable.item, std(k, volumes), job.std)
            note(record, done, name, {**entry, "whole": readable is job})
            written += len(readable.paths)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:  # torch has no other word for "no memory"
            text = " ".join(str(error).split())[:300]
            problems.append(text if str(job.item.files[0].parent) in text else f"{job.paths[0]}: {text}")
    return written, kept


def note(record, done, name, entry):
    done[name] = entry
    with runtime.whole(record) as temporary:
        temporary.write_text(json.dumps(done, indent=1) + "\n")
