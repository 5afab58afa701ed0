"""DICOM series: grouped and sorted by their headers, written back as derived objects.

pydicom decodes the pixels with the pylibjpeg plugins (RLE, JPEG, JPEG-LS, JPEG 2000). They stay as they are stored:
rescale slope, intercept and window are kept as tags. Only if the slope differs within a series, as in PET, are the
slices brought to one scale for reading, and back for writing.
"""

import contextlib
import hashlib
import logging
import warnings

import numpy as np
import pydicom
from pydicom.filereader import read_file_meta_info

from lib.formats.common import Volume, as_type, check_grey, check_size
from lib.runtime import atomic_write

TAGS = "SeriesInstanceUID Rows Columns InstanceNumber ImagePositionPatient ImageOrientationPatient".split()
SERIES = 1000  # is added to the number of a series; an integer string (IS) has 32 bits
TAGS_OF_SCALE = ["RescaleSlope", "RescaleIntercept"]


@contextlib.contextmanager
def quiet():
    """Silences pydicom: its warnings quote tags, such as the patient's name, which must not get into our log."""
    settings, log = pydicom.config.settings, logging.getLogger("pydicom")
    before = settings.reading_validation_mode, settings.writing_validation_mode, log.level
    settings.reading_validation_mode = settings.writing_validation_mode = pydicom.config.IGNORE
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        settings.reading_validation_mode, settings.writing_validation_mode = before[:2]
        log.setLevel(before[2])


@quiet()
def series(paths):
    """Groups files by SeriesInstanceUID, image size and orientation, without reading pixels.

    Returns ([tuple of the files of one series, sorted by `position`], [str: which file is left out, and why]).
    """
    members, problems = {}, []
    for path in paths:
        try:
            if read_file_meta_info(path).get("TransferSyntaxUID") == pydicom.uid.DeflatedExplicitVRLittleEndian:
                problems.append(f"{path} is deflated DICOM, which is not read: it may hold any amount")
                continue
            ds = pydicom.dcmread(path, specific_tags=TAGS, stop_before_pixels=True)
            if "Rows" not in ds:
                problems.append(f"{path} is DICOM without an image")
                continue
            turned = [round(float(v), 2) for v in ds.get("ImageOrientationPatient") or ()]  # a localizer has three
            key = str(ds.get("SeriesInstanceUID", path.parent)), int(ds.Rows), int(ds.Columns), *turned
            members.setdefault(key, []).append((position(ds), path))
        except Exception as error:  # pydicom raises many kinds on damaged files
            problems.append(f"{path} cannot be read as DICOM: {type(error).__name__}")
    return [tuple(path for _, path in sorted(files)) for files in members.values()], problems


def position(ds):
    """The coordinate of a slice along the normal of its plane (mm), or else its InstanceNumber."""
    if ds.get("ImagePositionPatient") and ds.get("ImageOrientationPatient"):
        across, down = np.array(ds.ImageOrientationPatient, float).reshape(2, 3)
        return float(np.cross(across, down) @ np.array(ds.ImagePositionPatient, float))
    return float(ds.get("InstanceNumber") or 0)


def read_pixels(path):
    """(dataset, stored numbers (S,H,W)) of one file. Raises ValueError if they could not be written back correctly."""
    try:
        ds = pydicom.dcmread(path)
        syntax = ds.file_meta.TransferSyntaxUID
        frames, allocated = int(ds.get("NumberOfFrames") or 1), int(ds.BitsAllocated)
        size = float(ds.Rows) * ds.Columns * frames * ds.get("SamplesPerPixel", 1) * allocated / 8
        packed = allocated not in (8, 16, 32) or ds.get("HighBit", ds.BitsStored - 1) != ds.BitsStored - 1
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read as DICOM: {type(error).__name__}") from None
    check_size(path, size)
    if "PixelData" not in ds or packed or syntax == pydicom.uid.ExplicitVRBigEndian:
        raise ValueError(f"{path} holds no integer pixels in the usual order of bits and bytes")
    if "SOPClassUID" not in ds or "SOPInstanceUID" not in ds:
        raise ValueError(f"{path} lacks the UIDs of a DICOM object")
    if ds.get("SamplesPerPixel", 1) != 1 or ds.get("PhotometricInterpretation") == "PALETTE COLOR":
        raise ValueError(f"{path} is a colour image; only one channel can be denoised")
    try:
        stored = ds.pixel_array
    except (OSError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a decoder written in Rust is not an Exception
        raise ValueError(f"{path} holds pixels that cannot be decoded: {type(error).__name__}") from None
    if not syntax.is_compressed:  # pydicom drops the bits above BitsStored, and writing back would lose them
        raw = np.frombuffer(ds.PixelData, stored.dtype.newbyteorder("<"), stored.size)
        if not np.array_equal(raw, stored.ravel()):
            raise ValueError(f"{path} holds numbers of more than its {ds.BitsStored} bits")
    stored = stored.reshape(-1, *stored.shape[-2:])
    check_grey(path, stored.shape, stored.dtype)
    return ds, stored


def scaling(ds):
    """(rescale slope, rescale intercept)"""
    return float(ds.get("RescaleSlope") or 1), float(ds.get("RescaleIntercept") or 0)


@quiet()
def read(item):
    """One Volume: the frames of all files of a series, one after the other; float32 if their scaling differs.

    Padding, which may be far outside the range of the image, becomes the lowest number that is none.
    """
    stacks, masks, scales, places, size, folder = [], [], [], [], 0, item.files[0].parent
    for path in item.files:
        ds, stored = read_pixels(path)
        stacks.append(stored)
        masks.append(padding(ds, stored))
        scales.append(scaling(ds))
        places.append(position(ds))
        size += stored.nbytes
        check_size(folder, 2 * size)
    if len(set(scales)) > 1:
        stacks = [(x * slope + intercept).astype(np.float32) for x, (slope, intercept) in zip(stacks, scales)]
    inverted = ds.get("PhotometricInterpretation") == "MONOCHROME1"
    slices, outside = np.concatenate(stacks), np.concatenate(masks)
    if outside.any():
        slices[outside] = slices[~outside].min() if not outside.all() else 0
    lies = geometry(ds, places) if len(places) == len(slices) else ((), "")
    outside = outside if outside.any() else None
    return [Volume(folder.name or "series", slices, str(folder), inverted, None, None, "", *lies, outside=outside)]


def padding_ends(ds, dtype):
    """(lowest, highest) stored number that marks what lies outside the field of view; (1, 0) if none does."""
    if ds.get("PixelPaddingValue") is None:
        return 1, 0
    ends = (ds.PixelPaddingValue, ds.get("PixelPaddingRangeLimit", ds.PixelPaddingValue))
    return tuple(sorted(int(v) for v in np.array([int(v) for v in ends]).astype(dtype)))  # 63536 is -2000 in 16 bits


def padding(ds, stored):
    """Where stored numbers (S,H,W) lie outside the field of view; bool."""
    low, high = padding_ends(ds, stored.dtype)
    return (stored >= low) & (stored <= high)


def geometry(ds, places):
    """(spacing, axes) as of Volume, by the header of one slice and the `position` of each; ((), "") if it is silent."""
    try:
        across, down = np.array(ds.ImageOrientationPatient, float).reshape(2, 3)
        apart = float(np.median(np.diff(places))) if len(places) > 1 else 1.0
        spacing = (apart, *(float(mm) for mm in ds.PixelSpacing))
        sides = [np.argmax(np.abs(v)) for v in (np.cross(across, down), down, across)]
        signs = [v[k] > 0 for v, k in zip((np.cross(across, down), down, across), sides)]
        axes = "".join(("RL"[up], "AP"[up], "IS"[up])[k] for k, up in zip(sides, signs))
    except (AttributeError, TypeError, ValueError):
        return (), ""
    return (spacing, axes) if min(spacing) > 0 and len(set(sides)) == 3 else ((), "")


@quiet()
def write(item, arrays, paths, method):
    """Writes new derived objects, uncompressed: other pixels, UIDs and origin, every other tag as it was.

    The tags follow the standard (PS3.3, C.7.6.1.1.2 and C.12.1). Equal inputs, pixels and `method` give equal files.
    """
    one_scale = len({scaling(pydicom.dcmread(path, specific_tags=TAGS_OF_SCALE)) for path in item.files}) == 1
    first = 0
    for source, path in zip(item.files, paths):
        ds, before = read_pixels(source)
        values = arrays[0][first : first + len(before)]
        first += len(before)
        if not one_scale:
            slope, intercept = scaling(ds)
            values = (values - intercept) / slope
        bits = int(ds.get("BitsStored") or ds.BitsAllocated)
        low = -(1 << bits - 1) if before.dtype.kind == "i" else 0
        new = as_type(values, before.dtype, low, low + (1 << bits) - 1)
        (first_pad, last_pad), outside = padding_ends(ds, before.dtype), padding(ds, before)
        beside = last_pad + 1 if last_pad < low + (1 << bits) - 1 else first_pad - 1  # what is inside stays so
        new = np.where(outside, before, np.where(padding(ds, new), beside, new)).astype(before.dtype)
        derive(ds, new, method, source)
        with atomic_write(path) as temporary:
            ds.save_as(temporary, enforce_file_format=True)


def derive(ds, new, method, path):
    """Turns `ds`, the dataset read from `path`, into a derived image with the pixels `new`."""
    raw = new.astype(new.dtype.newbyteorder("<")).tobytes()
    ds.PixelData = raw + b"\0" * (len(raw) % 2)
    ds["PixelData"].VR = "OB" if ds.BitsAllocated <= 8 else "OW"
    ds["PixelData"].is_undefined_length = False
    for name in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"):  # only compressed frames have them
        if name in ds:
            del ds[name]
    for name, value in (("SmallestImagePixelValue", new.min()), ("LargestImagePixelValue", new.max())):
        if name in ds:
            ds[name].value = int(value)
    source, purpose = pydicom.Dataset(), pydicom.Dataset()
    source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = ds.get("SOPClassUID"), ds.get("SOPInstanceUID")
    purpose.CodeValue, purpose.CodingSchemeDesignator = "121322", "DCM"
    purpose.CodeMeaning = "Source image for image processing operation"
    source.PurposeOfReferenceCodeSequence = [purpose]
    ds.SourceImageSequence = [source]
    values = ds.get("ImageType") or []
    ds.ImageType = ["DERIVED", "SECONDARY", *([] if isinstance(values, str) else list(values)[2:])]
    ds.DerivationDescription = method[:1024]
    ds.SOPInstanceUID = new_uid(ds.get("SOPInstanceUID"), method, raw)
    ds.SeriesInstanceUID = new_uid(ds.get("SeriesInstanceUID") or path.parent, method)
    ds.SeriesDescription = f"{str(ds.get('SeriesDescription') or '')[:55].rstrip()} denoised".lstrip()  # 64 characters
    try:
        number = int(ds.get("SeriesNumber") or 0)
    except (ValueError, TypeError):  # no number, or several
        number = 0
    ds.SeriesNumber = number + (SERIES if number < 2**31 - SERIES else -SERIES)
    meta = ds.file_meta
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ds.get("SOPClassUID"), ds.SOPInstanceUID
    if meta.get("TransferSyntaxUID") != pydicom.uid.ImplicitVRLittleEndian:
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian


def new_uid(*sources):
    """A UID made from a hash of `sources` (PS3.5, B.2: 2.25 and an integer of up to 128 bits)."""
    digest = hashlib.blake2b(digest_size=16)
    for source in sources:
        digest.update((source if isinstance(source, bytes) else str(source).encode()) + b"\0")
    return f"2.25.{int.from_bytes(digest.digest(), 'big')}"
