"""A denoiser over image files, written under another folder.

A file is written completely or not at all. A log (lib/record.py) has each one, with a digest of its input and the
denoiser, so that a run started again goes on after the last file. An existing file is replaced only if this same run
had begun to write it, or with `force`. What cannot be read or written becomes a line in `problems`; the rest goes on.
"""

import errno
import hashlib
import time
from typing import NamedTuple

import numpy as np
import torch

from lib import crops, files, formats, record, runtime
from lib.formats import bids as bids_names


class Denoised(NamedTuple):
    """What `denoise_volume` makes of a volume, in its own units.

    out: (S,H,W) of its type. std, noise: (S,H,W) float32, the deviation of what is left unknown and that of the
    noise, 0 where the denoiser has none. gains: (S,H/8,W/8), the `noise_map` of the denoiser, or None. samples: what
    may have been there without the noise, each (S,H,W) float32.
    """

    out: np.ndarray
    std: np.ndarray
    noise: np.ndarray
    gains: np.ndarray | None
    samples: tuple = ()


def denoise_volume(volume, denoise):
    """`Denoised` of a formats.Volume, denoised slice by slice; what is not finite stays.

    denoise: callable, a float32 tensor (1,2k+1,H,W) of a slice with k neighbours on each side, about [0,1], to
    (1,1,H,W), or (1,2,H,W) with the standard deviation. What it changes is added to the stored numbers, so that no
    change returns the same bits. Attributes, all optional: context, k. noise_map: callable, the mapped volume (S,H,W)
    to how much stronger than expected its noise is, in blocks of 8x8 pixels (S,H/8,W/8): the slices are divided by it,
    and what comes out is multiplied by it. level: callable, a denoised slice (H,W) to the deviation of its noise.
    signal: callable, a denoised slice to what is written instead of it. beside and planes: a callable, the mapped
    volume to what the denoiser makes of it in two other planes, and their weight. made: callable, the mapped volume to
    what it is denoised (S,H,W) if that is known already, else None; not with a noise_map or a standard deviation.
    samples: callable, mapped volume and what it is denoised to (n,S,H,W), `Denoised.samples`.
    Raises ValueError below 16x16 pixels, or for a single slice that needs neighbours.
    """
    low, high = files.finite_range(volume.slices)
    if min(volume.slices.shape[1:]) < 16:
        raise ValueError(f"{volume.source}: {'x'.join(map(str, volume.slices.shape[1:]))} pixels, fewer than 16x16")
    std, levels = (np.zeros(volume.slices.shape, np.float32) for _ in range(2))
    if high == low:
        return Denoised(volume.slices, std, levels, None)
    scale, offset = files.scaling(volume, low, high)
    wide = np.float64 if volume.slices.dtype.itemsize > 2 else np.float32  # for numbers that float32 does not hold
    context, count, ready = getattr(denoise, "context", 0), len(volume.slices), {}
    if context and count < 2:
        raise ValueError(f"{volume.source}: a single image, and the student sees neighbouring slices")

    def mapped(s):
        y = files.mapped(volume.slices[s], scale, offset)
        return np.nan_to_num(y, copy=False, nan=0, posinf=1, neginf=0)

    def stacked():
        return np.stack([mapped(s) / gain(s) for s in range(count)])

    gains, known, others, draw = None, None, None, getattr(denoise, "samples", None)
    noise_map, level, signal, made = (getattr(denoise, name, None) for name in ("noise_map", "level", "signal", "made"))

    def gain(s):
        return 1 if gains is None else crops.enlarge(gains[s], volume.slices.shape[1:])

    if made and volume.slices.size <= files.PIXELS // 4:  # of more, a dataset of image files has parts alone
        known = made(stacked())
    elif noise_map:
        gains = noise_map(stacked())
    weight = getattr(denoise, "planes", 0)
    if weight and known is None and volume.slices.size <= denoise.beside.most:
        others = denoise.beside(stacked())
    out = np.empty(volume.slices.shape, volume.slices.dtype)
    means = np.empty(volume.slices.shape if draw else 0, np.float32)
    for s in range(count):
        which = crops.around(s, count, context)
        ready = {k: ready[k] if k in ready else mapped(k) / gain(k) for k in which}  # each slice is mapped once
        if known is None:
            x, *deviation = denoise(torch.from_numpy(np.stack([ready[k] for k in which]))[None])[0].numpy()
        else:
            x, deviation = known[s], []
        if others is not None:
            x += weight * (others[s] - x)
        if draw:
            means[s] = x
        if level:
            levels[s] = level(x) * abs(scale) * gain(s)
        if signal:
            x = signal(x)
        change = (x - ready[s]).astype(wide) * (scale * gain(s))
        out[s] = formats.as_type(volume.slices[s] + change, out.dtype)
        if deviation:
            std[s] = deviation[0] * abs(scale) * gain(s)
    drawn = draw(stacked(), means) if draw else ()
    for sample in drawn:
        for s in range(count):
            sample[s] = volume.slices[s] + (sample[s] - mapped(s) / gain(s)).astype(wide) * (scale * gain(s))
    return Denoised(out, std, levels, gains, tuple(drawn))


def entry(job, folder):
    """(all files that a job writes, its name in the log in `folder`)."""
    paths = [*job.paths, *job.sides.values()]
    name = str([path.relative_to(folder.parent) for path in paths])
    return paths, hashlib.blake2b(name.encode(), digest_size=8).hexdigest()


def check_room(jobs, folder, force=False):
    """Raises ValueError if every job would be left out because files are there already that no such run wrote."""
    done, taken = record.read(folder), []
    for job in [] if force else jobs:
        paths, name = entry(job, folder)
        taken += [path for path in paths if path.exists() and name not in done][:1]
    if taken and len(taken) == len(jobs):
        raise ValueError(f"{taken[0]} exists already, and is not of this run: --force replaces it")


def denoise_files(
    jobs, denoise, method, folder, problems, force=False, share=(0, 1), stop=(), tell=None, told=None, look=None
):
    """Reads, denoises and writes every job. Returns (number of files written, number that were there already).

    Args:
        denoise: see `denoise_volume`; gives what the sides of a job ask for. method: a text that identifies it.
        folder: Path, for the log. problems: list to which a line is added for each file that is left out, as for those
        that are not tried once the disk is full. force: replace existing files. share: of `plan`. stop: ends the run
        before the next file when it is no longer empty. tell: see record.teller. told: {key: value} for BIDS sidecars.
        look: called with each job, its volumes and what `denoise_volume` made of them once they are written; with the
        job alone if its files were there already.
    """
    done, tell = record.read(folder), tell or record.teller(None)
    written = kept = 0
    for k, job in enumerate(runtime.progress(jobs, "denoise")):
        if stop:
            break
        began, mark, (paths, name) = time.monotonic(), f"{job.digest} {method}", entry(job, folder)
        state = done.get(name, {})
        whole = state.get("whole") if state.get("mark") == mark else None  # None: this run has not begun it
        if whole and all(path.exists() for path in paths):
            kept += len(job.paths)
            tell_files(tell, job, "kept")
            if look:
                look(job)
            continue
        existing, there = next((path for path in paths if path.exists()), None), False
        try:
            if existing and not force and whole is not False:
                raise FileExistsError(f"{existing} exists already, and is not of this run: --force replaces it")
            readable, volumes = files.read(job, problems, force)
            made = [denoise_volume(volume, denoise) for volume in volumes]
            record.add(folder, share, done, name, mark, whole=False)  # from here on, what is at `paths` is ours
            formats.write(readable.item, [one.out for one in made], readable.paths, method)
            there = True
            write_sides(readable, volumes, made, folder.parent, told or {})
            record.add(folder, share, done, name, mark, whole=readable.item == job.item)
            written += len(readable.paths)
            tell_files(tell, readable, "written", began=began)
            if look:
                look(job, volumes, made)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:  # RuntimeError: torch lacks memory
            text = " ".join(str(error).split())[:300]
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
            if full:
                text = f"{job.paths[0]}: {error.strerror}; {len(jobs) - k} left to do: make room, then run this again"
            text = f"{job.paths[0]} is written, but not all that belongs beside it: {text}" if there else text
            named = any(str(path.parent) in text for path in (job.item.files[0], *paths))
            problems.append(text if named else f"{job.paths[0]}: {text}")
            tell_files(tell, job, "left out", problems[-1], began=began)
            if full:
                break
    return written, kept


def write_sides(job, volumes, made, root, told):
    """Writes what stands beside the files of a job, which are written; made: of `denoise_volume`.

    "removed" is what was read less what the written files hold; "sidecar <what>" is the JSON of BIDS, with `told`, for
    a dataset in the folder `root`.
    """
    for name, path in job.sides.items():
        if name.startswith("sidecar "):
            bids_names.write_sidecar(job.item, path, root, name.partition(" ")[2], told)
        elif name.startswith("sample"):  # of a constant volume there is one alone
            arrays = [one.samples[int(name[6:]) - 1] if one.samples else one.out for one in made]
            formats.write_side(job.item, arrays, path, "image")
        elif name == "removed":
            after = formats.read(job.item._replace(files=tuple(job.paths)))
            changed = [difference(a.slices, b.slices, a.outside) for a, b in zip(volumes, after)]
            formats.write_side(job.item, changed, path, "difference")
        else:
            formats.write_side(job.item, [getattr(one, name) for one in made], path)


def difference(a, b, outside=None):
    """a - b (S,H,W) as float32, computed in double precision; 0 where it is not finite, and `outside`."""
    out = np.empty(a.shape, np.float32)
    with np.errstate(invalid="ignore"):
        for s in range(len(a)):
            out[s] = np.nan_to_num(a[s].astype(np.float64) - b[s], nan=0, posinf=0, neginf=0)
    if outside is not None:
        out[outside] = 0
    return out


def tell_files(tell, job, status, reason=None, began=None):
    """Tells of each file of a job; what stands beside them belongs to the first."""
    for k, (file, path) in enumerate(zip(job.item.files, job.paths)):
        outputs = [path, *([] if k else job.sides.values())]
        tell(file, status, reason, [] if reason else outputs, began)
