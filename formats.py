"""Image files in: DICOM series, NIfTI, PNG, JPEG, TIFF, NumPy, and the built-in brain, as stacks of slices.

Knows file formats and nothing else of this project. Each reader yields `Volume`s with the stored numbers as they are;
mapping them to [0,1] is data.py's task.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

PICTURES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}


class Volume(NamedTuple):
    """name: unique within its source. slices: (S,H,W) array. source: file or folder. inverted: black is the maximum."""

    name: str
    slices: np.ndarray
    source: str
    inverted: bool = False


def volumes(source):
    """Yields every Volume of a file or folder, in the order of their names.

    Raises:
        ValueError: nothing there can be read, with the reason.
    """
    source = Path(source)
    if not source.exists():
        raise ValueError(f"{source} does not exist")
    files = (
        sorted(p for p in source.rglob("*") if p.is_file() and not p.name.startswith("."))
        if source.is_dir()
        else [source]
    )
    dicom, found = [p for p in files if is_dicom(p)], 0
    known = set(dicom)
    for volume in read_dicom(dicom):
        found += 1
        yield volume
    for path in files:
        kind = "".join(path.suffixes[-2:]).lower() if path.suffix == ".gz" else path.suffix.lower()
        if path in known:
            continue
        if kind in (".nii", ".nii.gz"):
            found_here = read_nifti(path)
        elif kind == ".npy":
            found_here = read_numpy(path)
        elif kind in PICTURES:
            found_here = read_picture(path)
        elif source.is_dir():
            continue  # something else that lies in the folder
        else:
            raise ValueError(f"{path}: not a DICOM, NIfTI, PNG, JPEG, TIFF or .npy file")
        for volume in found_here:
            found += 1
            yield volume
    if not found:
        raise ValueError(f"{source} holds no DICOM, NIfTI, PNG, JPEG, TIFF or .npy image")


def brain():
    """The MNI152 T1 template at 1 mm that nilearn's wheel ships: the axial slices that hold brain, nose up.

    (123,233,197) uint8. Averaged over 152 heads, so free of noise and smooth. Nothing is downloaded.
    """
    import nibabel

    spec = find_spec("nilearn")
    if spec is None:
        raise ValueError("the built-in brain needs the package nilearn: pip install nilearn")
    path = Path(spec.origin).parent / "datasets" / "data" / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    head = np.asanyarray(nibabel.load(path).dataobj).transpose(2, 1, 0)[:, ::-1]
    holds_brain = (head > 0.1 * head.max()).mean((1, 2)) > 0.1
    return Volume("brain", np.ascontiguousarray(head[holds_brain]), "MNI152 T1 1 mm template (nilearn)")


def is_dicom(path):
    """Whether a file has DICOM's mark, or its ending."""
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM" or path.suffix.lower() == ".dcm"
    except OSError:
        return False


def read_dicom(paths):
    """Yields a Volume per series, its slices sorted by position; numbers as stored (no rescaling, no window)."""
    import pydicom

    series = {}
    for path in paths:
        try:
            ds = pydicom.dcmread(path)
            if "Rows" not in ds:  # a DICOMDIR or a report, not an image
                continue
            series.setdefault(str(ds.get("SeriesInstanceUID", path.parent)), []).append((slice_position(ds), path, ds))
        except Exception as error:  # pydicom raises many kinds on damaged files
            raise ValueError(f"{path} cannot be read as DICOM: {error}") from None
    for number, members in enumerate(series.values()):
        members.sort(key=lambda m: m[:2])
        try:
            slices = [ds.pixel_array for _, _, ds in members]
        except Exception as error:
            raise ValueError(f"{members[0][1]} holds pixels that cannot be decoded: {error}") from None
        if len({(s.shape, ds.get("SamplesPerPixel", 1)) for s, (_, _, ds) in zip(slices, members)}) > 1:
            raise ValueError(f"the slices of the series of {members[0][1]} differ in size")
        ds = members[0][2]
        if ds.get("SamplesPerPixel", 1) != 1:
            raise ValueError(f"{members[0][1]} is a colour image; only one channel can be denoised")
        stack = np.concatenate([s.reshape(-1, *s.shape[-2:]) for s in slices])
        folder = members[0][1].parent
        inverted = ds.get("PhotometricInterpretation") == "MONOCHROME1"
        yield Volume(f"{folder.name or 'series'}_{number}", stack, str(folder), inverted)


def slice_position(ds):
    """Where a slice lies along the normal of its plane (mm), or its InstanceNumber."""
    if "ImagePositionPatient" in ds and "ImageOrientationPatient" in ds:
        across, down = np.array(ds.ImageOrientationPatient, float).reshape(2, 3)
        return float(np.cross(across, down) @ np.array(ds.ImagePositionPatient, float))
    return float(ds.get("InstanceNumber") or 0)


def read_nifti(path):
    """Yields one Volume for 3D data and one per time point for 4D; slices run along the third axis, (z,y,x)."""
    import nibabel

    try:
        image = np.asanyarray(nibabel.load(path).dataobj)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as NIfTI: {error}") from None
    if image.ndim not in (2, 3, 4) or image.dtype.names:
        raise ValueError(f"{path} holds an array of shape {image.shape} and type {image.dtype}, not grey slices")
    image = image[:, :, None] if image.ndim == 2 else image
    stem = path.name.removesuffix(".gz").removesuffix(".nii")
    for t in range(image.shape[3] if image.ndim == 4 else 1):
        yield Volume(
            f"{stem}_t{t:03d}" if image.ndim == 4 else stem, image.reshape(*image.shape[:3], -1)[..., t].T, str(path)
        )


def read_numpy(path):
    """Yields one Volume from a .npy file of shape (H,W) or (S,H,W)."""
    try:
        image = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as .npy: {error}") from None
    if not isinstance(image, np.ndarray):
        raise ValueError(f"{path} is an archive of arrays, not one array")
    yield from stack(path, image)


def read_picture(path):
    """Yields one Volume from a PNG, JPEG or TIFF file; a TIFF may hold a stack of pages."""
    import skimage.io

    try:
        image = skimage.io.imread(path)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from None
    if image.ndim == 3 and (image.shape[-1] in (3, 4) or path.suffix.lower() not in (".tif", ".tiff")):
        if image.shape[-1] > 2 and np.ptp(image[..., :3].astype(float), axis=-1).any():
            raise ValueError(f"{path} is a colour image; only one channel can be denoised")
        image = image[..., 0]
    yield from stack(path, image)


def stack(path, image):
    if image.ndim not in (2, 3) or image.dtype.kind not in "uif":
        raise ValueError(f"{path} holds an array of shape {image.shape} and type {image.dtype}, not grey slices")
    yield Volume(path.stem, image.reshape(-1, *image.shape[-2:]), str(path))
