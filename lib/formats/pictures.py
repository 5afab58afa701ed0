"""TIFF, PNG, JPEG, BMP and NumPy files."""

from zipfile import BadZipFile, ZipFile

import numpy as np
import tifffile
from PIL import Image

from lib.formats.common import Volume, as_type, check_grey, check_size
from lib.runtime import atomic_write

LOSSLESS = (1, 5, 8, 32773, 32946, 50000)  # TIFF: none, LZW, deflate, PackBits, deflate again, zstd


def read(item):
    """The Volumes of a TIFF, picture or NumPy item."""
    return {"tiff": read_tiff, "picture": read_picture, "numpy": read_numpy}[item.kind](item)


def write(item, arrays, paths, method):
    """Writes new numbers to a file of the same kind; none of these formats has a place for `method`."""
    {"tiff": write_tiff, "picture": write_picture, "numpy": write_numpy}[item.kind](item.files[0], arrays, paths[0])


def write_side(item, arrays, path, what):
    """Writes numbers of any kind as a float32 TIFF stack; of arrays that differ in size, only the first."""
    values = np.concatenate(arrays) if len({a.shape[1:] for a in arrays}) == 1 else arrays[0]
    with atomic_write(path) as temporary:
        tifffile.imwrite(temporary, values.astype(np.float32), photometric="minisblack")


def one_channel(path, image, channels):
    """The grey image (...,H,W) of one that has 1 channel, 3 equal ones, or transparency besides; refuses colour."""
    if image.ndim > 2 and channels > 1:
        if channels > 2 and np.any(image[..., :1] != image[..., 1:3]):
            raise ValueError(f"{path} is a colour image; only one channel can be denoised")
        image = image[..., 0]
    image = image.astype(np.uint8) if image.dtype == bool else image
    check_grey(path, image.shape[-3:], image.dtype)
    return image


def read_tiff(item):
    """One Volume: the pages of the only series; inverted if its photometric interpretation is MINISWHITE."""
    path = item.files[0]
    with tifffile.TiffFile(path) as file:
        count = len(file.series)
        if count != 1 or len(file.series[0].levels) > 1:
            raise ValueError(f"{path} holds {count} series of images, or a pyramid; only one can be denoised")
        series, page = file.series[0], file.pages.first
        check_size(path, series.nbytes, 4 * path.stat().st_size if page.compression in (1, 5, 8, 32946) else None)
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE:
            raise ValueError(f"{path} is a colour image; only one channel can be denoised")
        image = one_channel(path, series.asarray(), page.samplesperpixel)
        inverted = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
    return [Volume(path.stem, image.reshape(-1, *image.shape[-2:]), str(path), inverted)]


def write_tiff(source, arrays, path):
    """Keeps type, photometric interpretation, lossless compression, resolution, orientation and description."""
    with tifffile.TiffFile(source) as file:
        page, shape, dtype = file.pages.first, file.series[0].shape, file.series[0].dtype
        tags, big, order = page.tags, file.is_bigtiff, file.byteorder
        kept = dict(compression=page.compression) if page.compression in LOSSLESS else {}
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
    with atomic_write(path) as temporary:
        flags = dict(photometric=photometric, metadata=None, bigtiff=big, byteorder=order)
        tifffile.imwrite(temporary, values, software="DiffDenoise", **flags, **kept)


def open_picture(path):
    """(array (H,W) or (H,W,channels), what else PIL's `save` is to write) of a PNG, JPEG or BMP file."""
    Image.MAX_IMAGE_PIXELS = None  # check_size is more exact
    with Image.open(path) as file:
        check_size(path, 2.0 * np.prod(file.size, dtype=float) * len(file.getbands()), 2 * path.stat().st_size)
        if file.mode not in ("1", "L", "LA", "I;16", "RGB", "RGBA", "P"):
            raise ValueError(f"{path} is stored as {file.mode}; only grey images can be denoised")
        header = path.open("rb").read(26)
        if file.format == "PNG" and header[24] == 16 and header[25] != 0:  # PIL would read them as 8 bits
            raise ValueError(f"{path} has 16 bits in more than one channel; only one channel can be denoised")
        kept = {name: file.info[name] for name in ("dpi", "exif", "icc_profile") if name in file.info}
        if file.mode in "1L" and "transparency" in file.info:
            kept["transparency"] = file.info["transparency"]
        mode = {"1": "L", "P": "RGBA" if "transparency" in file.info else "RGB"}.get(file.mode)
        return np.asarray(file.convert(mode) if mode else file), kept


def read_picture(item):
    """One Volume of one slice, 8 or 16 bits; an image of 1 bit is read as 8."""
    path = item.files[0]
    image, _ = open_picture(path)
    image = one_channel(path, image, image.shape[2] if image.ndim == 3 else 1)
    return [Volume(path.stem, image[None], str(path))]


def write_picture(source, arrays, path):
    """8 or 16 bits and the channels as before; keeps, except in BMP, resolution, orientation and transparency."""
    before, kept = open_picture(source)
    values = as_type(arrays[0][0], before.dtype)
    if before.ndim == 3:
        colours = before.shape[2] - 1 if before.shape[2] in (2, 4) else before.shape[2]
        values = np.concatenate([np.repeat(values[..., None], colours, 2), before[..., colours:]], axis=2)
    kind = "BMP" if path.suffix.lower() == ".bmp" else "PNG"
    with atomic_write(path) as temporary:
        Image.fromarray(values).save(temporary, kind, **(kept if kind == "PNG" else {}))


def read_numpy(item):
    """One Volume of a .npy file (H,W) or (S,H,W), mapped into memory; one for each image of a .npz archive."""
    path = item.files[0]
    if path.suffix.lower() == ".npy":
        return [numpy_volume(path, path.stem, np.load(path, mmap_mode="r", allow_pickle=False))]
    try:
        with ZipFile(path) as archive:
            for member in archive.infolist():
                check_member(path, archive, member)
        with np.load(path, allow_pickle=False) as arrays:
            images = images_among({name: arrays[name] for name in arrays.files})
        if not images:
            raise ValueError(f"{path} holds no array of two or three dimensions")
        return [numpy_volume(path, f"{path.stem}_{name}", image) for name, image in images.items()]
    except BadZipFile as error:
        raise ValueError(f"{path} cannot be read as .npz: {error}") from None


def images_among(arrays):
    """Those of {name: array} that are slices, or stacks of them: from 16x16 pixels up if any is, else of any size."""
    flat = {name: x for name, x in arrays.items() if x.ndim in (2, 3)}
    return {name: x for name, x in flat.items() if min(x.shape[-2:]) >= 16} or flat


def check_member(path, archive, member):
    """Raises ValueError if an array of a .npz archive claims a size that it cannot have."""
    check_size(path, member.file_size, member.compress_size)
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        shape, _, dtype = getattr(np.lib.format, f"read_array_header_{version[0]}_0")(file)
    if dtype.hasobject or np.prod(shape, dtype=float) * dtype.itemsize > member.file_size:
        raise ValueError(f"{path}: {member.filename} claims the shape {shape}, which it cannot hold")


def numpy_volume(path, name, array):
    check_grey(path, array.shape, array.dtype)
    return Volume(name, array.reshape(-1, *array.shape[-2:]), str(path))


def write_numpy(source, arrays, path):
    """Keeps type, shape, and those arrays of an archive that are not images."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        if source.suffix.lower() == ".npy":
            like = np.load(source, mmap_mode="r", allow_pickle=False)
            np.save(file, as_type(arrays[0], like.dtype).reshape(like.shape))
        else:
            with np.load(source, allow_pickle=False) as like:
                out = {name: like[name] for name in like.files}
            images = images_among(out)
            out |= {name: as_type(a, x.dtype).reshape(x.shape) for (name, x), a in zip(images.items(), arrays)}
            np.savez_compressed(file, **out)
