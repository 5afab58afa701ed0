"""Image files through a denoiser, for denoise.py: the same names come out under another folder.

Every file is written whole or not at all. What was written is noted, with a digest of the input and of the denoiser, in
files.json: started again, a run goes on after the last file, and no file that it did not write itself is touched
without `force`. What cannot be read or written becomes a line in `problems`, and the rest goes on.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import data
import formats
import runtime


class Job(NamedTuple):
    """item: formats.Item. paths: where its files go. mark: digest of what they hold now."""

    item: formats.Item
    paths: list
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


def plan(sources, out, key=None, acquisition=None):
    """([Job], [problem]) of image files and folders. Raises ValueError if `out` is, or lies in, one of them."""
    for source in map(Path, sources):
        if source.is_dir() and source.resolve() in (out.resolve(), *out.resolve().parents):
            raise ValueError(f"--out {out} lies in the input {source}: give another folder")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, not a folder")
    items, problems = formats.find(sources, key, acquisition)
    jobs, taken = [], {}
    for item in items:
        paths = formats.outputs(item, out)
        for path, file in zip(paths, item.files):
            if path.exists() and path.samefile(file):
                raise ValueError(f"--out {out} would replace the input {file}: give another folder")
        twice = next((path for path in paths if path in taken), None)
        if twice:
            problems.append(f"{item.files[0]} would go to {twice}, as {taken[twice]} does: denoise them apart")
            continue
        try:
            jobs.append(Job(item, paths, digest(item.files)))
            taken.update(zip(paths, item.files))
        except OSError as error:
            problems.append(str(error))
    return jobs, problems


def collect(jobs, path, problems):
    """A dataset of all that can be trained on, everything in the train split, under numbers instead of names."""

    def volumes():
        for k, job in enumerate(jobs):
            try:
                _, found = read(job, problems)
            except (ValueError, OSError) as error:
                problems.append(str(error))
                continue
            for j, volume in enumerate(found):
                low, high, slices = finite_range(volume.slices)
                if high > low and min(slices.shape[1:]) >= 16:
                    yield volume._replace(name=f"{k:05d}-{j}", source="", slices=slices)

    data.write_dataset(path, volumes(), [1.0, 0, 0], {})


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
    """(lowest, highest, slices with the lowest number in place of what is not finite)."""
    if slices.dtype.kind != "f":
        return float(slices.min()), float(slices.max()), slices
    good = np.isfinite(slices)
    if not good.any():
        return 0.0, 0.0, slices
    low, high = (float(end(slices, where=good, initial=slices[good][0])) for end in (np.min, np.max))
    return low, high, slices if good.all() else np.where(good, slices, slices.dtype.type(low))


def denoise_volume(volume, denoise):
    """The slices of a formats.Volume, denoised one by one, in their own units and type; what is not finite stays.

    The network's change is added to the stored numbers, so that one that changes nothing returns the same bits.
    """
    low, high, _ = finite_range(volume.slices)
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


def run(jobs, denoise, method, record, problems, force=False, std=None):
    """Reads, denoises and writes every job. Returns (files written, files that were there already).

    Args:
        denoise: see `denoise_volume`. method: what made it: a change makes all files anew. record: files.json.
        std: callable (job number, volumes) to the standard deviations, like the volumes; written beside the images.
    """
    done = json.loads(record.read_text()) if record.exists() else {}
    written = kept = 0
    for k, job in enumerate(runtime.progress(jobs, "denoise")):
        name, mark = str(job.paths[0]), f"{job.mark} {method}{' std' if std else ''}"
        ours = done.get(name, {})
        if ours == {"mark": mark, "whole": True} and all(path.exists() for path in job.paths):
            kept += len(job.paths)
            continue
        there = next((path for path in job.paths if path.exists()), None)
        if there and not ours and not force:
            problems.append(f"{there} exists already: --force replaces it")
            continue
        try:
            readable, volumes = read(job, problems)
            arrays = [denoise_volume(volume, denoise) for volume in volumes]
            note(record, done, name, mark, False)  # from here on, what stands there is ours
            formats.write(readable.item, arrays, readable.paths, method)
            if std:
                formats.write_std(readable.item, std(k, volumes), job.paths[0])
            note(record, done, name, mark, True)
            written += len(readable.paths)
        except (ValueError, OSError) as error:
            text = " ".join(str(error).split())
            problems.append(text if str(job.item.files[0].parent) in text else f"{name}: {text}")
    return written, kept


def note(record, done, name, mark, whole):
    done[name] = dict(mark=mark, whole=whole)
    with runtime.whole(record) as temporary:
        temporary.write_text(json.dumps(done, indent=1) + "\n")
