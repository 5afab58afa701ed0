"""DICOM series in and out, for formats.py: grouped and sorted by their headers, written back as derived objects.

Pixels are decoded by pydicom with the pylibjpeg plugins (RLE, JPEG, JPEG-LS, JPEG 2000) and stay as they are stored:
rescale slope and intercept and the window are kept as tags. Only if the slope differs within a series, as in PET, are
the slices brought to one scale, and back.
"""

import hashlib
import logging
import warnings

import numpy as np
import pydicom
from pydicom.filereader import read_file_meta_info
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

import formats
from runtime import whole

TAGS = "SeriesInstanceUID Rows Columns InstanceNumber ImagePositionPatient ImageOrientationPatient".split()
TAGS_OF_SCALE = ["RescaleSlope", "RescaleIntercept"]


def quietly(function):
    """pydicom's complaints quote the values of tags: none of them, a patient's name least of all, is for our log."""

    def quiet(*args):
        settings, log = pydicom.config.settings, logging.getLogger("pydicom")
        before = settings.reading_validation_mode, settings.writing_validation_mode, log.level
        settings.reading_validation_mode = settings.writing_validation_mode = pydicom.config.IGNORE
        log.setLevel(logging.CRITICAL)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return function(*args)
        finally:
            settings.reading_validation_mode, settings.writing_validation_mode = before[:2]
            log.setLevel(before[2])

    return quiet


@quietly
def series(paths):
    """([files of one series, sorted by position], ...), [problem]): by SeriesInstanceUID and size; reads no pixels."""
    members, problems = {}, []
    for path in paths:
        try:
            if read_file_meta_info(path).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
                problems.append(f"{path} is deflated DICOM, which is not read: it may hold any amount")
                continue
            ds = pydicom.dcmread(path, specific_tags=TAGS, stop_before_pixels=True)
            if "Rows" not in ds:
                problems.append(f"{path} is DICOM without an image")
                continue
            key = str(ds.get("SeriesInstanceUID", path.parent)), int(ds.Rows), int(ds.Columns)
            members.setdefault(key, []).append((position(ds), path))
        except Exception as error:  # pydicom raises many kinds on damaged files
            problems.append(f"{path} cannot be read as DICOM: {type(error).__name__}")
    return [tuple(path for _, path in sorted(files)) for files in members.values()], problems


def position(ds):
    """Where a slice lies along the normal of its plane (mm), or its InstanceNumber."""
    if ds.get("ImagePositionPatient") and ds.get("ImageOrientationPatient"):
        across, down = np.array(ds.ImageOrientationPatient, float).reshape(2, 3)
        return float(np.cross(across, down) @ np.array(ds.ImagePositionPatient, float))
    return float(ds.get("InstanceNumber") or 0)


def pixels(path):
    """(dataset, stored numbers (S,H,W)) of one file, or ValueError."""
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
    formats.check_size(path, size)
    if "PixelData" not in ds or packed or syntax == ExplicitVRBigEndian:
        raise ValueError(f"{path} holds no integer pixels in the usual order of bits and bytes")
    if "SOPClassUID" not in ds or "SOPInstanceUID" not in ds:
        raise ValueError(f"{path} lacks the UIDs of a DICOM object")
    if ds.get("SamplesPerPixel", 1) != 1 or ds.get("PhotometricInterpretation") == "PALETTE COLOR":
        raise ValueError(f"{path} is a colour image; only one channel can be denoised")
    try:
        stored = ds.pixel_array
    except (OSError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a decoder written in Rust is no Exception
        raise ValueError(f"{path} holds pixels that cannot be decoded: {type(error).__name__}") from None
    if not syntax.is_compressed and not np.array_equal(
        np.frombuffer(ds.PixelData, stored.dtype.newbyteorder("<"), stored.size), stored.ravel()
    ):
        raise ValueError(f"{path} holds numbers of more than its {ds.BitsStored} bits")
    stored = stored.reshape(-1, *stored.shape[-2:])
    formats.grey(path, stored.shape, stored.dtype)
    return ds, stored


def scaling(ds):
    return float(ds.get("RescaleSlope") or 1), float(ds.get("RescaleIntercept") or 0)


@quietly
def read(item):
    """One Volume: the files of a series, their frames one after the other."""
    stacks, scales, size, folder = [], [], 0, item.files[0].parent
    for path in item.files:
        ds, stored = pixels(path)
        stacks.append(stored)
        scales.append(scaling(ds))
        size += stored.nbytes
        formats.check_size(folder, 2 * size)
    if len(set(scales)) > 1:
        stacks = [(x * slope + intercept).astype(np.float32) for x, (slope, intercept) in zip(stacks, scales)]
    inverted = ds.get("PhotometricInterpretation") == "MONOCHROME1"
    return [formats.Volume(folder.name or "series", np.concatenate(stacks), str(folder), inverted)]


@quietly
def write(item, arrays, paths, method):
    """New derived objects: other pixels, UIDs and origin; every other tag as it was (PS3.3, C.7.6.1.1.2 and C.12.1).

    Uncompressed. The UIDs follow from the original ones and `method`: the same again give the same files.
    """
    one_scale = len({scaling(pydicom.dcmread(path, specific_tags=TAGS_OF_SCALE)) for path in item.files}) == 1
    first = 0
    for source, path in zip(item.files, paths):
        ds, before = pixels(source)
        values = arrays[0][first : first + len(before)]
        first += len(before)
        if not one_scale:
            slope, intercept = scaling(ds)
            values = (values - intercept) / slope
        bits = int(ds.get("BitsStored") or ds.BitsAllocated)
        signed = before.dtype.kind == "i"
        limits = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
        new = formats.as_type(values, before.dtype, *limits)
        padding = ds.get("PixelPaddingValue")
        if padding is not None:
            ends = sorted((padding, ds.get("PixelPaddingRangeLimit", padding)))
            new = np.where((before >= ends[0]) & (before <= ends[1]), before, new)
        derive(ds, new, method, source)
        with whole(path) as temporary:
            ds.save_as(temporary, enforce_file_format=True)


def derive(ds, new, method, path):
    """Puts pixels into the dataset of `path`, and the tags that tell a derived image from its source."""
    raw = new.astype(new.dtype.newbyteorder("<")).tobytes()
    ds.PixelData = raw + b"\0" * (len(raw) % 2)
    ds["PixelData"].VR = "OB" if ds.BitsAllocated <= 8 else "OW"
    ds["PixelData"].is_undefined_length = False
    for name in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"):  # of compressed frames
        if name in ds:
            del ds[name]
    for name, value in (("SmallestImagePixelValue", new.min()), ("LargestImagePixelValue", new.max())):
        if name in ds:
            ds[name].value = int(value)
    source = pydicom.Dataset()
    source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = ds.get("SOPClassUID"), ds.get("SOPInstanceUID")
    purpose = pydicom.Dataset()
    purpose.CodeValue, purpose.CodingSchemeDesignator = "121322", "DCM"
    purpose.CodeMeaning = "Source image for image processing operation"
    source.PurposeOfReferenceCodeSequence = [purpose]
    ds.SourceImageSequence = [source]
    values = ds.get("ImageType") or []
    ds.ImageType = ["DERIVED", "SECONDARY", *([] if isinstance(values, str) else list(values)[2:])]
    ds.DerivationDescription = method[:1024]
    ds.SOPInstanceUID = new_uid(ds.get("SOPInstanceUID"), method, raw)
    ds.SeriesInstanceUID = new_uid(ds.get("SeriesInstanceUID") or path.parent, method)
    meta = ds.file_meta
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ds.get("SOPClassUID"), ds.SOPInstanceUID
    if meta.get("TransferSyntaxUID") != ImplicitVRLittleEndian:
        meta.TransferSyntaxUID = ExplicitVRLittleEndian


def new_uid(*sources):
    """A UID (PS3.5, B.2: 2.25 and an integer of up to 128 bits) that is always the same for the same sources."""
    digest = hashlib.blake2b(digest_size=16)
    for source in sources:
        digest.update(source if isinstance(source, bytes) else str(source).encode())
        digest.update(b"\0")
    return f"2.25.{int.from_bytes(digest.digest(), 'big')}"
