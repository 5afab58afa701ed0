"""What the file formats share: the types Volume and Item, casts to integer types, checks of what a file claims."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

DEFLATE = 1100  # no zip, gzip or PNG file is more than this many times smaller than its content


class Volume(NamedTuple):
    """Slices that belong together, as numbers stored in a file.

    name: unique within its source. slices: (S,H,W) stored numbers. source: the file or folder. inverted: whether the
    highest number means black. clean: a reference like `slices`, from M4Raw's repetitions, or None. ends: lowest and
    highest number of the volume from which the slices were cut, or None if they are all of it. declared: what the
    header says that it is, if that is no image, such as "statistic". spacing: mm between slices, rows and columns, or
    (). axes: the sides of the patient towards which slices, rows and columns follow each other, such as "SPL", or "".
    whole, place: the shape of the volume from which the slices were cut and the corner where they lay in it, or ().
    outside: bool (S,H,W) as they were read, what lies outside the field of view (DICOM padding), or None.
    """

    name: str
    slices: np.ndarray
    source: str
    inverted: bool = False
    clean: np.ndarray | None = None
    ends: tuple[float, float] | None = None
    declared: str = ""
    spacing: tuple = ()
    axes: str = ""
    whole: tuple = ()
    place: tuple = ()
    outside: np.ndarray | None = None


class Item(NamedTuple):
    """What is read and written at once: one file, or the files of a DICOM series in the order of their slices.

    kind: see formats.kind_of. root: folder that holds `files`, as the user named it. key, reference: see formats.find.
    """

    kind: str
    files: tuple
    root: Path
    key: str | None = None
    reference: str | None = None


def as_type(values, dtype, low=None, high=None):
    """values as dtype: integers are rounded and saturate at [low, high] (default: the limits of the type); NaN is 0."""
    if dtype.kind not in "ui":
        return np.asarray(values).astype(dtype)
    limits = np.iinfo(dtype)
    low, high = (limits.min if low is None else low), (limits.max if high is None else high)
    out = np.empty(np.shape(values), dtype)
    flat, new = np.ravel(values), out.reshape(-1)
    for i in range(0, flat.size, 1 << 22):  # in chunks, so that the temporary arrays stay small
        chunk = flat[i : i + (1 << 22)]
        if chunk.dtype.kind == "f":
            chunk = np.nan_to_num(np.rint(chunk), nan=0)
        above, below = chunk >= high, chunk <= low  # compared before the cast: no float holds the limits of int64
        inside = np.where(above | below, 0, chunk).astype(dtype)
        new[i : i + len(chunk)] = np.where(above, dtype.type(high), np.where(below, dtype.type(low), inside))
    return out


def check_size(path, size, packed=None):
    """Raises ValueError if `size` bytes exceed half of the memory, or what `packed` bytes of a file can inflate to."""
    try:
        most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError):  # Windows
        most = 8 << 30
    if size > most:
        raise ValueError(f"{path} claims to hold {size / 2**30:.1f} GiB, more than half of this machine's memory")
    if packed is not None and size > DEFLATE * packed + 2**20:
        raise ValueError(f"{path} claims to hold {size} bytes in {packed}: no honest file does")


def check_grey(path, shape, dtype, dimensions=(2, 3)):
    """Raises ValueError if an array is not one slice or a stack of slices of real numbers."""
    if len(shape) not in dimensions or 0 in shape or np.dtype(dtype).kind not in "uif":
        raise ValueError(f"{path} holds an array of shape {tuple(shape)} and type {dtype}, not grey slices")
