"""NIfTI files: the stored numbers in, and out again behind the header of the original, byte for byte."""

import gzip
import re

import nibabel
import numpy as np
from nibabel.openers import ImageOpener

from lib.formats.common import Volume, as_type, check_grey, check_size
from lib.runtime import atomic_write

INTENTS = {1001: "map of estimates", 1002: "label map", 1003: "label map", 1005: "matrix", 1007: "vector field"}


def slice_axis(image):
    """The axis along which the slices follow each other: the third, unless the voxels are longer along another."""
    zooms = [float(z) for z in image.header.get_zooms()[:3]]
    widest = int(np.argmax(zooms))
    return widest if len(zooms) == 3 and zooms[widest] > 1.01 * zooms[2] else 2


def from_volumes(arrays, image):
    """The arrays [(S,H,W)] of the time points, put together in the axes and shape of a nibabel image."""
    return np.stack([np.moveaxis(a.T, 2, slice_axis(image)) for a in arrays], axis=-1).reshape(image.shape)


def read(item):
    """One Volume for 3D data, one per time point for 4D; (z,y,x) if the slices follow each other along the third axis.

    Only the stored numbers are read; the scale factors of the header are not applied.
    """
    path = item.files[0]
    image = nibabel.load(path)
    shape, dtype = image.shape, image.get_data_dtype()
    check_grey(path, shape, dtype, (2, 3, 4))
    check_size(path, np.prod(shape, dtype=float) * dtype.itemsize + image.dataobj.offset, path.stat().st_size)
    raw = np.asanyarray(image.dataobj.get_unscaled())
    raw = raw.reshape(*shape[:2], shape[2] if len(shape) > 2 else 1, -1)
    raw = np.moveaxis(raw, slice_axis(image), 2)
    stem = re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.I)
    names = [f"{stem}_t{t:03d}" if len(shape) == 4 else stem for t in range(raw.shape[3])]
    declared = declared_as(int(image.header["intent_code"]) if "intent_code" in image.header else 0)
    lies = geometry(image)
    return [Volume(name, raw[..., t].T, str(path), False, None, None, declared, *lies) for t, name in enumerate(names)]


def geometry(image):
    """(spacing, axes) as of Volume, by the header; ((), "") for a single image."""
    if len(image.shape) < 3:
        return (), ""
    order = [k for k in range(3) if k != slice_axis(image)] + [slice_axis(image)]
    zooms, codes = image.header.get_zooms(), nibabel.aff2axcodes(image.affine)
    known = all(zooms[k] > 0 and codes[k] for k in order)
    return (tuple(float(zooms[k]) for k in order[::-1]), "".join(codes[k] for k in order[::-1])) if known else ((), "")


def declared_as(intent):
    """What an intent code of NIfTI-1 says a file to be, if that is no image to denoise: in words, or ""."""
    return "map of a statistic" if 2 <= intent <= 24 else INTENTS.get(intent, "")


def write(item, arrays, paths, method):
    """Copies the header and its extensions, and writes the new numbers after them."""
    path = item.files[0]
    image = nibabel.load(path)
    dtype = image.get_data_dtype()
    data = from_volumes([as_type(a, dtype) for a in arrays], image)
    with ImageOpener(str(path), "rb") as file:
        header = file.read(int(image.dataobj.offset))
    with atomic_write(paths[0]) as temporary, open(temporary, "wb") as plain:
        packed = path.suffix.lower() == ".gz"
        file = gzip.GzipFile("", "wb", 6, plain, mtime=0) if packed else plain  # no name or time: the same bytes again
        file.write(header)
        file.write(data.astype(dtype).tobytes(order="F"))
        if packed:
            file.close()


def write_side(item, arrays, path, what):
    """Writes a deviation, difference or image (`what`) as float32, scaled as the header says: in units viewers show."""
    like = nibabel.load(item.files[0])
    slope, constant = like.dataobj.slope, like.dataobj.inter if what == "image" else 0
    values = from_volumes(arrays, like) * (abs(slope) if what == "deviation" else slope) + constant
    header = like.header.copy()
    header.set_data_dtype(np.float32)
    header.set_slope_inter(1, 0)
    raw = type(like)(values.astype(np.float32), like.affine, header).to_bytes()
    with atomic_write(path) as temporary:
        temporary.write_bytes(gzip.compress(raw, 6, mtime=0) if path.suffix.lower() == ".gz" else raw)
