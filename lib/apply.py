"""A denoiser over image files, written under another folder.

A file is written completely or not at all. A log (lib/record.py) has each one, with a digest of its input and the
denoiser, so that a run started again goes on after the last file. An existing file is replaced only if this same run
had begun to write it, or with `force`. What cannot be read or written becomes a line in `problems`; the rest goes on.
"""

import errno
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
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


class Wanted(NamedTuple):
    """What else a run wants of a denoiser: callables on mapped slices (`Mapped`), or None.

    noise_map: volume (S,H,W) to how much stronger than expected its noise is, in blocks of 8x8 pixels (S,H/8,W/8): the
    slices are divided by it, and what comes out is multiplied by it. level: a denoised slice (H,W) to the deviation of
    its noise. signal: a denoised slice to what is written instead of it. made: volume to what it is denoised (S,H,W) if
    that is known already, else None; not with a noise_map or a standard deviation. samples: volume and what it is
    denoised to (n,S,H,W), `Denoised.samples`.
    """

    noise_map: Callable | None = None
    level: Callable | None = None
    signal: Callable | None = None
    made: Callable | None = None
    samples: Callable | None = None


class Run(NamedTuple):
    """How a run over files goes.

    force: replace existing files, and denoise masks and label maps. share: (k, n) of `files.plan`. stop: ends the run
    before the next file when it is no longer empty. tell: see record.teller. told: {key: value} for BIDS sidecars.
    look: called with each job, its volumes and what `denoise_volume` made of them once they are written; with the job
    alone if its files were there already.
    """

    force: bool = False
    share: tuple = (0, 1)
    stop: Sequence = ()
    tell: Callable = record.teller(None)
    told: Mapping = {}
    look: Callable = lambda *_: None


NOTHING, PLAIN = Wanted(), Run()


class Mapped:
    """The slices of a formats.Volume as denoisers see them: about [0,1], 0 where not finite, divided by `gains`.

    low, high: the finite range of its numbers. gains: (S,H/8,W/8) of `Wanted.noise_map`, or None.
    """

    def __init__(self, volume, low, high):
        self.stored, self.gains = volume.slices, None
        self.scale, self.offset = files.scaling(volume, low, high)

    def gain(self, s):
        return 1 if self.gains is None else crops.enlarge(self.gains[s], self.stored.shape[1:])

    def __getitem__(self, s):
        y = files.mapped(self.stored[s], self.scale, self.offset)
        return np.nan_to_num(y, copy=False, nan=0, posinf=1, neginf=0) / self.gain(s)

    def all(self):
        """(S,H,W) float32"""
        return np.stack([self[s] for s in range(len(self.stored))])

    def unit(self, s):
        """What 1 of slice s is in stored numbers: a number, or (H,W)."""
        return abs(self.scale) * self.gain(s)

    def restored(self, s, x, y):
        """The stored slice s with the change from y, as it is mapped, to x added: no change returns the same bits."""
        wide = np.float64 if self.stored.dtype.itemsize > 2 else np.float32  # for numbers that float32 does not hold
        return self.stored[s] + (x - y).astype(wide) * (self.scale * self.gain(s))


def denoise_volume(volume, denoise, wanted=NOTHING):
    """`Denoised` of a formats.Volume, denoised slice by slice; what is not finite stays.

    denoise: callable, a float32 tensor (1,2k+1,H,W) of a slice with k neighbours on each side, about [0,1], to
    (1,1,H,W), or (1,2,H,W) with the standard deviation. Attributes, all optional: context, k; beside and planes: a
    callable, the mapped volume to what the denoiser makes of it in two other planes, and their weight.
    Raises ValueError below 16x16 pixels, or for a single slice that needs neighbours.
    """
    shape, context = volume.slices.shape, getattr(denoise, "context", 0)
    low, high = files.finite_range(volume.slices)
    if min(shape[1:]) < 16:
        raise ValueError(f"{volume.source}: {'x'.join(map(str, shape[1:]))} pixels, fewer than 16x16")
    std, levels = (np.zeros(shape, np.float32) for _ in range(2))
    if high == low:
        return Denoised(volume.slices, std, levels, None)
    if context and len(volume.slices) < 2:
        raise ValueError(f"{volume.source}: a single image, and the student sees neighbouring slices")
    mapped, known, others = Mapped(volume, low, high), None, None
    if wanted.made and volume.slices.size <= files.PIXELS // 4:  # of more, a dataset of image files has parts alone
        known = wanted.made(mapped.all())
    elif wanted.noise_map:
        mapped.gains = wanted.noise_map(mapped.all())
    weight = getattr(denoise, "planes", 0)
    if weight and known is None and volume.slices.size <= denoise.beside.most:
        others = denoise.beside(mapped.all())
    out, ready = np.empty(shape, volume.slices.dtype), {}
    means = np.empty(shape if wanted.samples else 0, np.float32)
    for s in range(len(out)):
        which = crops.around(s, len(out), context)
        ready = {k: ready[k] if k in ready else mapped[k] for k in which}  # each slice is mapped once
        if known is None:
            x, *deviation = denoise(torch.from_numpy(np.stack([ready[k] for k in which]))[None])[0].numpy()
        else:
            x, deviation = known[s], []
        if others is not None:
            x += weight * (others[s] - x)
        if wanted.samples:
            means[s] = x
        if wanted.level:
            levels[s] = wanted.level(x) * mapped.unit(s)
        if deviation:
            std[s] = deviation[0] * mapped.unit(s)
        out[s] = formats.as_type(mapped.restored(s, wanted.signal(x) if wanted.signal else x, ready[s]), out.dtype)
    samples = wanted.samples(mapped.all(), means) if wanted.samples else ()
    for sample in samples:
        for s in range(len(out)):
            sample[s] = mapped.restored(s, sample[s], mapped[s])
    return Denoised(out, std, levels, mapped.gains, tuple(samples))


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


def denoise_files(jobs, denoise, method, folder, problems, wanted=NOTHING, run=PLAIN):
    """Reads, denoises and writes every job. Returns (number of files written, number that were there already).

    denoise, wanted: see `denoise_volume`; what the sides of a job ask for. method: a text that identifies them. folder:
    Path, for the log. problems: list to which a line is added for each file that is left out; once the disk is full,
    one for all that are left.
    """
    done, written, kept = record.read(folder), 0, 0
    for k, job in enumerate(runtime.progress(jobs, "denoise")):
        if run.stop:
            break
        began, mark, (paths, name) = time.monotonic(), f"{job.digest} {method}", entry(job, folder)
        state = done.get(name, {})
        whole = state.get("whole") if state.get("mark") == mark else None  # None: this run has not begun it
        if whole and all(path.exists() for path in paths):
            kept += len(job.paths)
            tell_files(run.tell, job, "kept")
            run.look(job)
            continue
        existing, there = next((path for path in paths if path.exists()), None), False
        try:
            if existing and not run.force and whole is not False:
                raise FileExistsError(f"{existing} exists already, and is not of this run: --force replaces it")
            readable, volumes = files.read(job, problems, run.force)
            made = [denoise_volume(volume, denoise, wanted) for volume in volumes]
            record.add(folder, run.share, done, name, mark, whole=False)  # from here on, what is at `paths` is ours
            formats.write(readable.item, [one.out for one in made], readable.paths, method)
            there = True
            write_sides(readable, volumes, made, folder.parent, run.told)
            record.add(folder, run.share, done, name, mark, whole=readable.item == job.item)
            written += len(readable.paths)
            tell_files(run.tell, readable, "written", began=began)
            run.look(job, volumes, made)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:  # RuntimeError: torch lacks memory
            text = " ".join(str(error).split())[:300]
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
            if full:
                text = f"{job.paths[0]}: {error.strerror}; {len(jobs) - k} left to do: make room, then run this again"
            text = f"{job.paths[0]} is written, but not all that belongs beside it: {text}" if there else text
            named = any(str(path.parent) in text for path in (job.item.files[0], *paths))
            problems.append(text if named else f"{job.paths[0]}: {text}")
            tell_files(run.tell, job, "left out", problems[-1], began=began)
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
