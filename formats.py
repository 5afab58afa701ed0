"""Image files in and out: DICOM, NIfTI, fastMRI, M4Raw and plain HDF5, TIFF, PNG, JPEG, NumPy, the built-in brain.

Knows file formats and nothing else of this project. `find` lists what lies in files and folders without reading pixels;
`read` gives the stored numbers as they are (mapping them to [0,1] is data.py's task); `write` puts numbers back into
files of the same kind: same geometry, data type and metadata, integers rounded and saturated.

    items, problems = find(["scans/"])
    volumes = read(items[0])                                   # [Volume]; one, but for 4D NIfTI, .npz, datasets
    write(items[0], [v.slices for v in volumes], outputs(items[0], "clean/"), "method")

A file that claims more than it can hold, or more than half of this machine's memory, is refused before it is read.
"""

import contextlib
import errno
import gzip
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile, ZipFile

import numpy as np

from runtime import whole

PICTURES = (".png", ".jpg", ".jpeg", ".bmp")
KINDS = "DICOM, NIfTI, HDF5, TIFF, PNG, JPEG, BMP, .npy or .npz"
DEFLATE = 1100  # times smaller than its content: no zip, gzip or PNG can be more


class Volume(NamedTuple):
    """name: unique within its source. slices: (S,H,W) stored numbers. source: file or folder.

    inverted: black is the maximum. clean: a reference like `slices`, where the format has one (M4Raw's repetitions).
    ends: lowest and highest number of the volume that the slices are a part of; None: they are all of it.
    """

    name: str
    slices: np.ndarray
    source: str
    inverted: bool = False
    clean: np.ndarray | None = None
    ends: tuple[float, float] | None = None


class Item(NamedTuple):
    """What is read and written as one: a file, or the files of a DICOM series in the order of their slices.

    root: the folder that `files` lie in, as the user named it. key, acquisition, reference: see `find`.
    """

    kind: str
    files: tuple
    root: Path
    key: str | None = None
    reference: str | None = None


def find(sources, key=None, acquisition=None, reference=None):
    """What can be read in files and folders: ([Item], [str: what cannot be read, and why]); reads no pixels.

    Args:
        key: of the dataset in plain HDF5 files. acquisition: only HDF5 files with this attribute, such as AXT2.
        reference: "mean" or "others": M4Raw repetitions get the mean of all, or of the others, as `clean`.
    """
    import formats_dicom
    import formats_hdf5

    items, problems = [], []
    for source in map(Path, sources):
        if not source.exists():
            problems.append(f"{source} does not exist")
            continue
        files = [source]
        if source.is_dir():
            # A link that leads nowhere is listed, and found unreadable; what a run left behind is no input.
            files = sorted(p for p in source.rglob("*") if (p.is_file() or p.is_symlink()) and p.name[0] != ".")
            files = [p for p in files if "diffdenoise" not in p.relative_to(source).parts]
        root, count, dicom = (source if source.is_dir() else source.parent), len(items), []
        for path in files:
            kind = kind_of(path)
            if kind == "dicom":
                dicom.append(path)
            elif kind == "hdf5" and not formats_hdf5.wanted(path, acquisition):
                continue
            elif kind:
                items.append(Item(kind, (path,), root, key, reference))
            else:
                problems.append(f"{path} is not a {KINDS} file")
        found, bad = formats_dicom.series(dicom)
        items += [Item("dicom", files, root) for files in found]
        problems += bad
        if source.is_dir() and len(items) == count:
            problems.append(f"{source} holds no {KINDS} image")
    return items, problems


def kind_of(path):
    """dicom, nifti, numpy, hdf5, tiff or picture, by DICOM's mark or else the ending; None for anything else."""
    ending = "".join(path.suffixes[-2:]).lower() if path.suffix.lower() == ".gz" else path.suffix.lower()
    if ending in (".nii", ".npy", ".npz") or ending.endswith(".nii.gz"):
        return "nifti" if ".nii" in ending else "numpy"
    if ending in PICTURES or ending in (".tif", ".tiff", ".h5", ".hdf5"):
        return "picture" if ending in PICTURES else "tiff" if ending.startswith(".t") else "hdf5"
    try:
        with open(path, "rb") as file:
            return "dicom" if file.read(132)[128:] == b"DICM" or ending in (".dcm", ".ima") else None
    except OSError:
        return "dicom" if ending == ".dcm" else None


def read(item):
    """The Volumes of an item, in a fixed order. Raises ValueError or OSError with one reason, naming the file."""
    import formats_dicom
    import formats_hdf5

    readers = dict(dicom=formats_dicom.read, hdf5=formats_hdf5.read)
    readers |= dict(nifti=read_nifti, numpy=read_numpy, tiff=read_tiff, picture=read_picture)
    with one_reason(item, "read"):
        return readers[item.kind](item)


@contextlib.contextmanager
def one_reason(item, what):
    """Whatever goes wrong with a file becomes a ValueError or OSError that names it: libraries raise many kinds."""
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
        raise ValueError(f"{path} cannot be {what}: {type(error).__name__} {reason}"[:300]) from None


def outputs(item, folder):
    """Where `write` puts the files of an item under `folder`: the same names; JPEG, which would lose again, as PNG."""
    paths = [Path(folder) / p.relative_to(item.root) for p in item.files]
    return [p.with_name(f"{p.name}.png") if p.suffix.lower() in (".jpg", ".jpeg") else p for p in paths]


def std_path(item, paths):
    """Where `write_std` puts the uncertainty of an item whose files go to `paths`."""
    return paths[0].with_name(f"{paths[0].name}_std{'.nii' if item.kind == 'nifti' else '.tif'}")


def write(item, arrays, paths, method):
    """Writes arrays [(S,H,W)], as `read` gave them in order and units, to `paths` as files of the item's kind.

    method: a few words on how they were made, for formats that can say so. Each file takes its name when it is whole.
    """
    import formats_dicom
    import formats_hdf5

    writers = dict(dicom=formats_dicom.write, hdf5=formats_hdf5.write)
    writers |= dict(nifti=write_nifti, numpy=write_numpy, tiff=write_tiff, picture=write_picture)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    with one_reason(item, "copied"):
        writers[item.kind](item, arrays, paths, method)


def as_type(values, dtype, low=None, high=None):
    """values as dtype: integers rounded and saturated to [low, high] (default: what the type can hold)."""
    if dtype.kind not in "ui":
        return np.asarray(values).astype(dtype)
    limits = np.iinfo(dtype)
    low, high = (limits.min if low is None else low), (limits.max if high is None else high)
    out = np.empty(np.shape(values), dtype)
    flat, new = np.ravel(values), out.reshape(-1)
    for i in range(0, flat.size, 1 << 22):  # a few MiB at a time
        part = flat[i : i + (1 << 22)]
        if part.dtype.kind == "f":  # no float holds the limits of the widest types exactly: compare, then cast
            part = np.nan_to_num(np.rint(part), nan=0)
        above, below = part >= high, part <= low
        inside = np.where(above | below, 0, part).astype(dtype)
        new[i : i + len(part)] = np.where(above, dtype.type(high), np.where(below, dtype.type(low), inside))
    return out


def check_size(path, size, packed=None):
    """Refuses `size` bytes that exceed half of the memory, or what `packed` bytes of file can hold by deflation."""
    try:
        most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError):  # Windows
        most = 8 << 30
    if size > most:
        raise ValueError(f"{path} claims to hold {size / 2**30:.1f} GiB, more than half of this machine's memory")
    if packed is not None and size > DEFLATE * packed + 2**20:
        raise ValueError(f"{path} claims to hold {size} bytes in {packed}: no honest file does")


def grey(path, shape, dtype):
    """Refuses what is not one slice or a stack of slices of numbers."""
    if len(shape) not in (2, 3) or 0 in shape or np.dtype(dtype).kind not in "uif":
        raise ValueError(f"{path} holds an array of shape {tuple(shape)} and type {dtype}, not grey slices")


# ---------------------------------------------------------------------------------------------------------------
# NIfTI
# ---------------------------------------------------------------------------------------------------------------
def slice_axis(image):
    """The axis along which slices follow each other: the third, unless another has the larger voxels."""
    zooms = [float(z) for z in image.header.get_zooms()[:3]]
    widest = int(np.argmax(zooms))
    return widest if len(zooms) == 3 and zooms[widest] > 1.01 * zooms[2] else 2


def read_nifti(item):
    """One Volume for 3D data, one per time point for 4D; (z,y,x) where the third axis is that of the slices."""
    import nibabel

    path = item.files[0]
    image = nibabel.load(path)
    shape, dtype = image.shape, image.get_data_dtype()
    if len(shape) not in (2, 3, 4) or 0 in shape or dtype.kind not in "uif":
        raise ValueError(f"{path} holds an array of shape {shape} and type {dtype}, not grey slices")
    check_size(path, np.prod(shape, dtype=float) * dtype.itemsize + image.dataobj.offset, path.stat().st_size)
    raw = np.asanyarray(image.dataobj.get_unscaled())
    raw = raw.reshape(*shape[:2], shape[2] if len(shape) > 2 else 1, -1)
    raw = np.moveaxis(raw, slice_axis(image), 2)
    stem = re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.I)
    return [
        Volume(f"{stem}_t{t:03d}" if len(shape) == 4 else stem, raw[..., t].T, str(path)) for t in range(raw.shape[3])
    ]


def write_nifti(item, arrays, paths, method):
    """The header as it was, byte for byte, and other numbers behind it."""
    import nibabel
    from nibabel.openers import ImageOpener

    path = item.files[0]
    image = nibabel.load(path)
    shape, dtype, axis = image.shape, image.get_data_dtype(), slice_axis(image)
    start = int(image.dataobj.offset)
    data = np.stack([np.moveaxis(as_type(a.T, dtype), 2, axis) for a in arrays], axis=-1).reshape(shape)
    with ImageOpener(str(path), "rb") as file:
        header = file.read(start)
    with whole(paths[0]) as temporary, open(temporary, "wb") as plain:
        packed = path.suffix.lower() == ".gz"
        file = gzip.GzipFile("", "wb", 6, plain, mtime=0) if packed else plain  # no name, no time: the same bytes again
        file.write(header)
        file.write(data.astype(dtype).tobytes(order="F"))
        if packed:
            file.close()


# ---------------------------------------------------------------------------------------------------------------
# TIFF, PNG, JPEG, BMP
# ---------------------------------------------------------------------------------------------------------------
def read_tiff(item):
    """One Volume: the pages of the first series; MINISWHITE counts as inverted."""
    import tifffile

    path = item.files[0]
    with tifffile.TiffFile(path) as file:
        if len(file.series) != 1 or len(file.series[0].levels) > 1:
            raise ValueError(
                f"{path} holds {len(file.series)} series of images, or a pyramid; only one can be denoised"
            )
        series, page = file.series[0], file.pages.first
        check_size(path, series.nbytes, 4 * path.stat().st_size if page.compression in (1, 5, 8, 32946) else None)
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
            raise ValueError(f"{path} is a colour image; only one channel can be denoised")
        image = one_channel(path, series.asarray(), page.samplesperpixel)
        inverted = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
    return [Volume(path.stem, image.reshape(-1, *image.shape[-2:]), str(path), inverted)]


def write_tiff(item, arrays, paths, method):
    """Type, photometric meaning, lossless compression, resolution and description of the original."""
    import tifffile

    with tifffile.TiffFile(item.files[0]) as file:
        page, shape, dtype = file.pages.first, file.series[0].shape, file.series[0].dtype
        tags, big, order = page.tags, file.is_bigtiff, file.byteorder
        kept = dict(compression=page.compression) if page.compression in (1, 5, 8, 32773, 32946, 50000) else {}
        resolution = [tags[name].value for name in ("XResolution", "YResolution") if name in tags]
        if len(resolution) == 2:
            unit = tags["ResolutionUnit"].value if "ResolutionUnit" in tags else 2
            kept |= dict(resolution=[n / max(d, 1) for n, d in resolution], resolutionunit=unit)
        if "ImageDescription" in tags:
            kept["description"] = str(tags["ImageDescription"].value).encode()
        if "Orientation" in tags:
            kept["extratags"] = [(274, 3, 1, int(tags["Orientation"].value), True)]
        photometric = "miniswhite" if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE else "minisblack"
    values = as_type(arrays[0], dtype)
    values = values.reshape(shape) if values.size == np.prod(shape) else values
    with whole(paths[0]) as temporary:
        flags = dict(photometric=photometric, metadata=None, bigtiff=big, byteorder=order)
        tifffile.imwrite(temporary, values, software="DiffDenoise", **flags, **kept)


def open_picture(path):
    """(array (H,W) or (H,W,channels), what else `save` should write) of a PNG, JPEG or BMP file."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # check_size knows better
    with Image.open(path) as file:
        check_size(path, 2.0 * np.prod(file.size, dtype=float) * len(file.getbands()), 2 * path.stat().st_size)
        if file.mode not in ("1", "L", "LA", "I;16", "RGB", "RGBA", "P"):
            raise ValueError(f"{path} is stored as {file.mode}; only grey images can be denoised")
        header = path.open("rb").read(26)
        if file.format == "PNG" and header[24] == 16 and header[25] != 0:
            raise ValueError(f"{path} has 16 bits in more than one channel; only one channel can be denoised")
        kept = {name: file.info[name] for name in ("dpi", "exif", "icc_profile") if name in file.info}
        if file.mode in "1L" and "transparency" in file.info:
            kept["transparency"] = file.info["transparency"]
        mode = {"1": "L", "P": "RGBA" if "transparency" in file.info else "RGB"}.get(file.mode)
        return np.asarray(file.convert(mode) if mode else file), kept


def read_picture(item):
    """One Volume from a PNG, JPEG or BMP file; 1 bit counts as 8."""
    path = item.files[0]
    image, _ = open_picture(path)
    image = one_channel(path, image, image.shape[2] if image.ndim == 3 else 1)
    return [Volume(path.stem, image[None], str(path))]


def write_picture(item, arrays, paths, method):
    """8 or 16 bits as before; resolution, orientation and transparency kept."""
    from PIL import Image

    before, kept = open_picture(item.files[0])
    values = as_type(arrays[0][0], before.dtype)
    if before.ndim == 3:
        colours = before.shape[2] - 1 if before.shape[2] in (2, 4) else before.shape[2]
        values = np.concatenate([np.repeat(values[..., None], colours, 2), before[..., colours:]], axis=2)
    kind = "BMP" if paths[0].suffix.lower() == ".bmp" else "PNG"
    with whole(paths[0]) as temporary:
        Image.fromarray(values).save(temporary, kind, **(kept if kind == "PNG" else {}))


def one_channel(path, image, channels):
    """The grey image of one that has 3 equal channels, perhaps with transparency; refuses colour."""
    if image.ndim > 2 and channels > 1:
        if channels > 2 and np.any(image[..., :1] != image[..., 1:3]):
            raise ValueError(f"{path} is a colour image; only one channel can be denoised")
        image = image[..., 0]
    image = image.astype(np.uint8) if image.dtype == bool else image
    grey(path, image.shape[-3:], image.dtype)
    return image


# ---------------------------------------------------------------------------------------------------------------
# NumPy
# ---------------------------------------------------------------------------------------------------------------
def read_numpy(item):
    """One Volume from a .npy file of shape (H,W) or (S,H,W); one for each such array of a .npz archive, which keeps the
    rest as it is."""
    path = item.files[0]
    if path.suffix.lower() == ".npy":
        return [numpy_volume(path, path.stem, np.load(path, mmap_mode="r", allow_pickle=False))]
    try:
        with ZipFile(path) as archive:
            for member in archive.infolist():
                check_size(path, member.file_size, member.compress_size)
                with archive.open(member) as file:
                    version = np.lib.format.read_magic(file)
                    header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")(file)
                    if header[2].hasobject or np.prod(header[0], dtype=float) * header[2].itemsize > member.file_size:
                        raise ValueError(
                            f"{path}: {member.filename} claims the shape {header[0]}, which it cannot hold"
                        )
        with np.load(path, allow_pickle=False) as arrays:
            images = {name: arrays[name] for name in arrays.files if arrays[name].ndim in (2, 3)}
        if not images:
            raise ValueError(f"{path} holds no array of two or three dimensions")
        return [numpy_volume(path, f"{path.stem}_{name}", image) for name, image in images.items()]
    except BadZipFile as error:
        raise ValueError(f"{path} cannot be read as .npz: {error}") from None


def numpy_volume(path, name, array):
    grey(path, array.shape, array.dtype)
    return Volume(name, array.reshape(-1, *array.shape[-2:]), str(path))


def write_numpy(item, arrays, paths, method):
    path = item.files[0]
    with whole(paths[0]) as temporary, open(temporary, "wb") as file:
        if path.suffix.lower() == ".npy":
            like = np.load(path, mmap_mode="r", allow_pickle=False)
            np.save(file, as_type(arrays[0], like.dtype).reshape(like.shape))
        else:
            with np.load(path, allow_pickle=False) as like:
                out = {name: like[name] for name in like.files}
            images = [name for name, x in out.items() if x.ndim in (2, 3)]
            out |= {name: as_type(a, out[name].dtype).reshape(out[name].shape) for name, a in zip(images, arrays)}
            np.savez_compressed(file, **out)


def write_std(item, arrays, path):
    """Writes standard deviations, [(S,H,W)] like what `read` gave, to `std_path`: float32, NIfTI for NIfTI, else TIFF.

    In the units that a viewer shows for NIfTI, in stored numbers otherwise.
    """
    if item.kind == "nifti":
        import nibabel

        like = nibabel.load(item.files[0])
        slope, axis = like.dataobj.slope, slice_axis(like)
        values = np.stack([np.moveaxis(a.T, 2, axis) for a in arrays], axis=-1).reshape(like.shape) * abs(slope)
        header = like.header.copy()
        header.set_data_dtype(np.float32)
        header.set_slope_inter(1, 0)
        with whole(path) as temporary:
            temporary.write_bytes(type(like)(values.astype(np.float32), like.affine, header).to_bytes())
    else:
        import tifffile

        values = np.concatenate(arrays) if len({a.shape[1:] for a in arrays}) == 1 else arrays[0]
        with whole(path) as temporary:
            tifffile.imwrite(temporary, values.astype(np.float32), photometric="minisblack")


# ---------------------------------------------------------------------------------------------------------------
# the built-in brain
# ---------------------------------------------------------------------------------------------------------------
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
