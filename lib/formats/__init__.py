"""Reads and writes image files: DICOM, NIfTI, fastMRI, M4Raw and plain HDF5, TIFF, PNG, JPEG, BMP and NumPy.

Knows file formats and nothing else of this project. `find` lists the images in files and folders; it reads no pixels.
`read` returns the stored numbers unchanged (lib/files.py maps them to [0,1]). `write` puts numbers into files of the
same kind, with the same geometry, data type and metadata; integers are rounded and saturate.

    items, problems = find(["scans/"])
    volumes = read(items[0])                                   # [Volume]; several for 4D NIfTI, .npz and datasets
    write(items[0], [v.slices for v in volumes], outputs(items[0], "clean/"), "method")

A file that claims more data than it can hold, or more than half of this machine's memory, is refused before it is read.
"""

import contextlib
import errno
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from lib.formats.bids import is_raw
from lib.formats.common import Item, Volume
from lib.formats.common import as_type as as_type  # for those who use this package

KINDS = "DICOM, NIfTI, HDF5, TIFF, PNG, JPEG, BMP, .npy or .npz"
ENDINGS = {".nii": "nifti", ".nii.gz": "nifti", ".npy": "numpy", ".npz": "numpy", ".h5": "hdf5", ".hdf5": "hdf5"}
ENDINGS |= {".tif": "tiff", ".tiff": "tiff", **dict.fromkeys((".png", ".jpg", ".jpeg", ".bmp"), "picture")}


def module_of(kind):
    """The module for files of a kind. It is imported on first use: the libraries behind it take long to load."""
    if kind == "dicom":
        from lib.formats import dicom as module
    elif kind == "nifti":
        from lib.formats import nifti as module
    elif kind == "hdf5":
        from lib.formats import hdf5 as module
    else:
        from lib.formats import pictures as module
    return module


def find(sources, key=None, acquisition=None, reference=None, bids=False):
    """The images in files and folders: ([Item], [str: which file cannot be read, and why]); reads no pixels.

    Args:
        key: name of the dataset in plain HDF5 files.
        acquisition: of the HDF5 files, take only those with this attribute, such as AXT2.
        reference: "mean" or "others": M4Raw repetitions get the mean of all, or of the others, as `clean`.
        bids: folders are BIDS datasets: what is no image belongs there, and what is derived is no input.
    """
    items, problems = [], []
    for source in map(Path, sources):
        if not source.exists():
            problems.append(f"{source} does not exist")
            continue
        files = [source]
        if source.is_dir():
            # A broken link is listed, to be reported as unreadable; hidden files and our own work folder are no input.
            files = sorted(p for p in source.rglob("*") if (p.is_file() or p.is_symlink()) and p.name[0] != ".")
            files = [p for p in files if "diffdenoise" not in p.relative_to(source).parts]
            files = [p for p in files if not bids or (kind_of(p) and is_raw(p, source))]
        root, count, dicom_files = (source if source.is_dir() else source.parent), len(items), []
        for path in files:
            kind = kind_of(path)
            if kind == "dicom":
                dicom_files.append(path)
            elif kind == "hdf5" and acquisition is not None and not module_of(kind).has_acquisition(path, acquisition):
                continue
            elif kind:
                items.append(Item(kind, (path,), root, key, reference))
            else:
                problems.append(f"{path} is not a {KINDS} file")
        if dicom_files:
            found, unreadable = module_of("dicom").series(dicom_files)
            items += [Item("dicom", of_series, root) for of_series in found]
            problems += unreadable
        if source.is_dir() and len(items) == count:
            problems.append(f"{source} holds no {KINDS} image")
    return items, problems


def kind_of(path):
    """dicom, nifti, numpy, hdf5, tiff or picture, by the ending or else by DICOM's mark; None for any other file."""
    ending = "".join(path.suffixes[-2:]).lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    if ending in ENDINGS:
        return ENDINGS[ending]
    try:
        with open(path, "rb") as file:
            return "dicom" if file.read(132)[128:] == b"DICM" or ending in (".dcm", ".ima") else None
    except OSError:
        return "dicom" if ending == ".dcm" else None


@contextlib.contextmanager
def one_reason(item, action):
    """Turns any error of the block into a ValueError or OSError that names the file: libraries raise many kinds.

    action: what could not be done, such as "read".
    """
    path = item.files[0]
    try:
        yield
    except (ValueError, PermissionError) as error:
        if str(path.parent) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from None
    except MemoryError:
        raise ValueError(f"{path} needs more memory than there is") from None
    except Exception as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        reason = (str(error).splitlines() or [""])[0]  # pydicom's next lines are a traceback
        raise ValueError(f"{path} cannot be {action}: {type(error).__name__} {reason}"[:300]) from None


@contextlib.contextmanager
def room(path, arrays):
    """Turns an error of the block into OSError with ENOSPC if the disk of `path` is full: some libraries do not say."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        known = getattr(error, "errno", None) is not None
        if known or shutil.disk_usage(path.parent).free >= sum(array.nbytes for array in arrays):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None


def read(item):
    """The Volumes of an item, always in the same order. Raises ValueError or OSError that names the file."""
    with one_reason(item, "read"):
        return module_of(item.kind).read(item)


def write(item, arrays, paths, method):
    """Writes arrays [(S,H,W)], in the order and units of `read`, to `paths` as files of the item's kind.

    method: how they were made, in a few words, for formats that can say so. A file that cannot be written completely is
    not written at all. Raises ValueError or OSError that names the file.
    """
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    with room(paths[0], arrays), one_reason(item, "copied"):
        module_of(item.kind).write(item, arrays, paths, method)


def outputs(item, folder):
    """The paths under `folder` for `write`: the names of the inputs; JPEG, which would lose again, becomes PNG."""
    paths = [Path(folder) / p.relative_to(item.root) for p in item.files]
    return [p.with_name(f"{p.name}.png") if p.suffix.lower() in (".jpg", ".jpeg") else p for p in paths]


def side_path(item, paths, name):
    """The path for `write_side`, beside the files `paths` of an item. name: what it holds, such as "std"."""
    return paths[0].with_name(f"{paths[0].name}_{name}{'.nii' if item.kind == 'nifti' else '.tif'}")


def write_side(item, arrays, path, what="deviation"):
    """Writes numbers [(S,H,W)], in the order and units of `read`, to `side_path` as float32.

    As NIfTI for NIfTI, in the units that viewers show; else as TIFF, in stored numbers. what: they are, "deviation",
    "difference" or "image": the scale factor of a NIfTI may be negative, and adds a constant to images alone.
    """
    with room(path, arrays):
        module_of("nifti" if item.kind == "nifti" else "tiff").write_side(item, arrays, path, what)


def brain():
    """The built-in brain, a Volume (123,233,197) uint8: the MNI152 T1 template at 1 mm from nilearn's wheel.

    The axial slices that hold brain, nose up. It is an average of 152 heads and therefore smooth and free of noise.
    Nothing is downloaded. Raises ValueError if nilearn is not installed.
    """
    import nibabel

    spec = find_spec("nilearn")
    if spec is None:
        raise ValueError("the built-in brain needs the package nilearn: pip install nilearn")
    path = Path(spec.origin).parent / "datasets" / "data" / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    head = np.asanyarray(nibabel.load(path).dataobj).transpose(2, 1, 0)[:, ::-1]
    holds_brain = (head > 0.1 * head.max()).mean((1, 2)) > 0.1
    return Volume("brain", np.ascontiguousarray(head[holds_brain]), "MNI152 T1 1 mm template (nilearn)")
