"""Image files in and out: the same bits through an identity, the same geometry, and what must be refused."""

import gzip
import struct
import subprocess
import sys
import zlib

import h5py
import imagecodecs
import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
import torch
from conftest import ROOT, collect_refusals
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

from lib import apply, files, formats
from lib.formats import dicom as dicom_format

RNG = np.random.default_rng(0)


def stack(dtype, shape=(5, 20, 24)):
    """Numbers that use the whole range of a type."""
    if np.dtype(dtype).kind == "f":
        return RNG.normal(0, 300, shape).astype(dtype)
    limits = np.iinfo(dtype)
    values = RNG.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)
    values.flat[:2] = limits.min, limits.max
    return values


def through(folder, denoise=torch.clone):
    """Sends folder/in through a denoiser to folder/out; returns the problems."""
    jobs, problems = files.plan([folder / "in"], folder / "out")
    (folder / "work").mkdir(exist_ok=True)
    apply.denoise_files(jobs, denoise, "a test", folder / "work", problems)
    collect_refusals("\n".join(f"denoise.py: left out: {problem}" for problem in problems), folder)
    return problems


@pytest.fixture
def there(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path


def dicom(path, pixels, number=0, bits=12, inverted=False, syntax=ExplicitVRLittleEndian, **tags):
    """Slice `number` of a series, or a file with NumberOfFrames; tags: others, or None for those to leave out."""
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax == RLELossless else syntax
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.4", f"1.2.3.4.{number + 1}"
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.InstanceNumber = "1.2.3", "1.2", 100 - number
    ds.PatientName, ds.WindowCenter, ds.ImageType = "Doe^Jane", "512", ["ORIGINAL", "PRIMARY", "M"]
    ds.ImagePositionPatient, ds.ImageOrientationPatient = [0, 0, 2.0 * number], [1, 0, 0, 0, 1, 0]
    ds.Rows, ds.Columns = pixels.shape[-2:]
    ds.SamplesPerPixel, ds.PixelRepresentation = 1, int(pixels.dtype.kind == "i")
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8 * pixels.dtype.itemsize, bits, bits - 1
    ds.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    for name, value in tags.items():
        setattr(ds, name, value) if value is not None else delattr(ds, name)
    ds.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    ds["PixelData"].VR = "OW"
    if syntax == RLELossless:
        ds.compress(RLELossless)
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID
    ds.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize(
    "dtype, bits, flags",
    [
        ("u2", 12, {}),
        ("u2", 16, dict(inverted=True)),
        ("i2", 16, dict(RescaleSlope="2", RescaleIntercept="-1024")),
        ("i2", 12, dict(syntax=ImplicitVRLittleEndian)),
        ("u1", 8, {}),
        ("u2", 12, dict(syntax=RLELossless)),
    ],
)
def test_dicom_round_trip(there, dtype, bits, flags, monkeypatch):
    """Bit-equal pixels; all tags but those of a derived object; slices in order whatever the files are called."""
    shift = 8 * np.dtype(dtype).itemsize - bits
    raw = stack(dtype) >> shift
    for s in range(5):
        dicom(there / "in" / f"{(3 * s) % 5}.dcm", raw[s], s, bits, **flags)
    items, _ = formats.find([there / "in"])
    assert len(items) == 1 and np.array_equal(formats.read(items[0])[0].slices, raw)
    assert through(there) == []
    for path in sorted((there / "in").iterdir()):
        a, b = pydicom.dcmread(path), pydicom.dcmread(there / "out" / path.name)
        assert np.array_equal(a.pixel_array, b.pixel_array) and a.pixel_array.dtype == b.pixel_array.dtype
        assert list(b.ImageType) == ["DERIVED", "SECONDARY", "M"] and b.DerivationDescription == "a test"
        assert b.SOPInstanceUID == b.file_meta.MediaStorageSOPInstanceUID != a.SOPInstanceUID
        assert b.SeriesInstanceUID != a.SeriesInstanceUID and b.StudyInstanceUID == a.StudyInstanceUID
        assert b.SourceImageSequence[0].ReferencedSOPInstanceUID == a.SOPInstanceUID
        new = "ImageType SOPInstanceUID SeriesInstanceUID SeriesDescription SeriesNumber DerivationDescription"
        new = [*new.split(), "SourceImageSequence", "PixelData"]
        for element in a:
            assert element.keyword in new or b[element.tag].value == element.value
        assert {e.keyword for e in b} - {e.keyword for e in a} <= set(new)
        assert {e.tag for e in a} <= {e.tag for e in b}
        monkeypatch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.RAISE)
        str(pydicom.dcmread(there / "out" / path.name))  # every value valid for its VR
        monkeypatch.undo()
    outs = [pydicom.dcmread(p) for p in sorted((there / "out").glob("*.dcm"))]
    assert len({ds.SOPInstanceUID for ds in outs}) == 5 and len({ds.SeriesInstanceUID for ds in outs}) == 1


ENCODERS = {
    pydicom.uid.JPEG2000Lossless: lambda x: imagecodecs.jpeg2k_encode(x, 0, codecformat="j2k"),
    pydicom.uid.JPEGLSLossless: imagecodecs.jpegls_encode,
    pydicom.uid.JPEGLosslessSV1: imagecodecs.ljpeg_encode,
    pydicom.uid.JPEGBaseline8Bit: imagecodecs.jpeg8_encode,
}


def compressed_dicom(path, pixels, syntax, number=0, **tags):
    """A file whose one frame (12 bits, or 8 for baseline JPEG) another program compressed."""
    dicom(path, pixels, number, 12 if pixels.dtype == np.uint16 else 8, **tags)
    ds = pydicom.dcmread(path)
    ds.PixelData = pydicom.encaps.encapsulate([ENCODERS[syntax](pixels)])
    ds.file_meta.TransferSyntaxUID = syntax
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    ds.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize("syntax", ENCODERS)
def test_compressed_dicom(there, syntax):
    """What another program compressed is decoded, and comes out uncompressed with the same pixels."""
    lossy = syntax == pydicom.uid.JPEGBaseline8Bit
    raw = stack("u1")[0] if lossy else stack("u2")[0] >> 4
    compressed_dicom(there / "in" / "a.dcm", raw, syntax)
    assert through(there) == []
    out = pydicom.dcmread(there / "out" / "a.dcm")
    assert out.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert np.array_equal(out.pixel_array, pydicom.dcmread(there / "in" / "a.dcm").pixel_array)
    assert lossy or np.array_equal(out.pixel_array, raw)


def test_dicom_multiframe_and_series(there):
    """Frames in one file; two series in a folder; a report without pixels is named; PET's slopes differ."""
    dicom(there / "in" / "cine.dcm", stack("u2") >> 4, NumberOfFrames=5, SeriesInstanceUID="1.9")
    raw = stack("u2") >> 4
    for s in range(5):
        dicom(there / "in" / f"pet{s}.dcm", raw[s], s, RescaleSlope=str(0.5 + s), RescaleIntercept="0")
    report = pydicom.Dataset()
    report.file_meta = pydicom.dataset.FileMetaDataset()
    report.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    report.file_meta.MediaStorageSOPClassUID = report.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    report.file_meta.MediaStorageSOPInstanceUID = report.SOPInstanceUID = "1.2.3.99"
    report.save_as(there / "in" / "report.dcm", enforce_file_format=True)
    items, problems = formats.find([there / "in"])
    assert sorted(len(item.files) for item in items) == [1, 5]
    assert len(problems) == 1 and "report.dcm is DICOM without an image" in problems[0]
    pet = formats.read(next(item for item in items if len(item.files) == 5))[0].slices
    np.testing.assert_allclose(pet, raw * (0.5 + np.arange(5))[:, None, None], rtol=1e-6)
    assert through(there) == problems
    for path in (there / "in").glob("[cp]*.dcm"):
        assert np.array_equal(pydicom.dcmread(path).pixel_array, pydicom.dcmread(there / "out" / path.name).pixel_array)


@pytest.mark.parametrize(
    "damage, says",
    [
        (dict(HighBit=15), "usual order of bits"),
        (dict(BitsAllocated=1, BitsStored=1, HighBit=0), "usual order of bits"),
        (dict(BitsStored=8, HighBit=7), "more than its 8 bits"),
        (dict(SamplesPerPixel=3, PhotometricInterpretation="RGB"), "is a colour image"),
        (dict(SOPClassUID=None), "lacks the UIDs"),
    ],
)
def test_dicom_that_would_come_out_wrong_is_refused(there, damage, says):
    dicom(there / "in" / "a.dcm", stack("u2")[0] >> 4, **damage)
    (problem,) = through(there)
    assert says in problem and not (there / "out").exists()


def test_dicom_without_optional_tags(there):
    """One value as ImageType, no position, no series: still a valid derived object."""
    tags = dict(ImageType="ORIGINAL", SeriesInstanceUID=None, ImagePositionPatient=None, InstanceNumber=None)
    dicom(there / "in" / "a.dcm", stack("u2")[0] >> 4, **tags)
    assert through(there) == []
    out = pydicom.dcmread(there / "out" / "a.dcm")
    assert list(out.ImageType) == ["DERIVED", "SECONDARY"] and out.SeriesInstanceUID.is_valid


def test_integers_are_rounded_and_saturate(there):
    """A network that overshoots never wraps: 12 bits end at 4095, int16 at its ends."""
    raw = np.full((20, 24), 4000, np.uint16)
    raw[:10] = np.arange(100, 110)[:, None]
    dicom(there / "in" / "a.dcm", raw)
    np.save(there / "in" / "b.npy", raw.astype(np.int16) * 8)
    through(there, lambda y: 3 * y - 1)
    out = pydicom.dcmread(there / "out" / "a.dcm").pixel_array
    assert (out[:10] == 0).all() and (out[10:] == 4095).all()
    out = np.load(there / "out" / "b.npy")
    assert out.dtype == np.int16 and out.max() == 32767 and out.min() == 800 - 8 * 3900
    assert formats.as_type(np.array([0.5, 1.5, 2.6, np.nan, 1e30, -1e30]), np.dtype("i8")).tolist()[:4] == [0, 2, 3, 0]
    assert formats.as_type(np.array([1e30, -1e30]), np.dtype("u8")).tolist() == [2**64 - 1, 0]


@pytest.mark.parametrize("dtype", ["u1", "i2", ">i2", "u2", "i4", "f4", "f8"])
@pytest.mark.parametrize("shape, ending", [((20, 24, 5), "nii.gz"), ((20, 24, 5, 3), "nii"), ((20, 24), "nii")])
def test_nifti_round_trip(there, dtype, shape, ending):
    """The same file: header with scaling, affine and extensions, byte order, data."""
    affine = np.array([[0, -2.0, 0, 7], [1.5, 0, 0, -3], [0, 0, 4, 5], [0, 0, 0, 1]])
    values, order = stack(np.dtype(dtype).newbyteorder("="), shape), ">" if dtype.startswith(">") else "<"
    image = nibabel.Nifti1Image(values.astype(dtype), affine, nibabel.Nifti1Header(endianness=order))
    image.header.set_data_dtype(dtype)
    image.header["descrip"] = b"a scanner"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"kept"))
    path = there / "in" / f"head.{ending}"
    nibabel.save(image, path)
    raw = (gzip.decompress if ending.endswith("gz") else bytes)(path.read_bytes())
    raw = raw[:112] + struct.pack(f"{order}ff", 2.5, -7) + raw[120:]  # the slope and the intercept
    path.write_bytes(gzip.compress(raw) if ending.endswith("gz") else raw)
    assert through(there) == []
    out = (there / "out" / path.name).read_bytes()
    assert (gzip.decompress(out) if ending.endswith("gz") else out) == raw
    assert nibabel.load(there / "out" / path.name).affine.tolist() == affine.tolist()


def test_nan_stays_nan(there):
    """A masked background in a floating-point file: it stays, and harms nothing else."""
    values = stack("f4")
    values[:, :5] = np.nan
    np.save(there / "in" / "a.npy", values)
    through(there, lambda y: y + 0.01)
    out = np.load(there / "out" / "a.npy")
    assert np.isnan(out[:, :5]).all() and np.isfinite(out[:, 5:]).all() and (out[:, 5:] > values[:, 5:]).all()


def test_nifti_slices_lie_across_the_thick_axis(there):
    """A sagittal stack of few thick slices along x: the slices are the (z,y) planes; back, the bits are the same."""
    values = stack("i2", (12, 40, 30))
    nibabel.save(nibabel.Nifti1Image(values, np.diag([4.0, 1, 1, 1])), there / "in" / "a.nii")
    items, _ = formats.find([there / "in"])
    assert formats.read(items[0])[0].slices.shape == (12, 30, 40)
    assert through(there) == []
    assert (there / "in/a.nii").read_bytes() == (there / "out/a.nii").read_bytes()


def test_std_beside_the_image(there):
    """In the units of the NIfTI file, scaling included; a TIFF stack beside anything else."""
    image = nibabel.Nifti1Image(stack("i2", (20, 24, 5)), np.diag([1.0, 1, 1, 1]))
    nibabel.save(image, there / "in" / "a.nii")
    raw = bytearray((there / "in/a.nii").read_bytes())
    raw[112:120] = struct.pack("<ff", 2.5, -7)
    (there / "in/a.nii").write_bytes(raw)
    np.save(there / "in/b.npy", stack("u2"))
    jobs, problems = files.plan([there / "in"], there / "out", sides=["std"])
    (there / "work").mkdir()

    def denoise(y):
        return torch.cat([y, torch.full_like(y, 0.5)], 1)

    apply.denoise_files(jobs, denoise, "a test", there / "work", problems)
    out, half = nibabel.load(there / "out/a.nii_std.nii"), [float(np.ptp(np.load(there / "in/b.npy"))) / 2]
    assert not problems and out.shape == image.shape and np.allclose(out.get_fdata(), 1.25 * 65535)
    assert np.allclose(tifffile.imread(there / "out/b.npy_std.tif"), half)


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "f4"])
@pytest.mark.parametrize("flags", [{}, dict(compression="zlib", photometric="miniswhite"), dict(compression="lzw")])
def test_tiff_round_trip(there, dtype, flags):
    flags = dict(photometric="minisblack", description="kept", metadata=None) | flags
    tifffile.imwrite(there / "in" / "a.tif", stack(dtype), resolution=(300, 150), resolutionunit="CENTIMETER", **flags)
    assert through(there) == []
    with tifffile.TiffFile(there / "in" / "a.tif") as a, tifffile.TiffFile(there / "out" / "a.tif") as b:
        assert np.array_equal(a.asarray(), b.asarray()) and a.asarray().dtype == b.asarray().dtype
        for name in "XResolution YResolution ResolutionUnit ImageDescription PhotometricInterpretation".split():
            assert a.pages[0].tags[name].value == b.pages[0].tags[name].value
        assert a.pages[0].compression == b.pages[0].compression


def test_several_series_in_one_tiff_are_refused(there):
    with tifffile.TiffWriter(there / "in" / "a.tif") as file:
        file.write(stack("u1", (20, 20)))
        file.write(stack("u1", (30, 30)))
    assert "holds 2 series" in through(there)[0]


def test_ome_tiff_description(there):
    tifffile.imwrite(there / "in" / "a.ome.tif", stack("u2"), metadata={"axes": "ZYX", "PhysicalSizeXUnit": "µm"})
    assert through(there) == []
    with tifffile.TiffFile(there / "in" / "a.ome.tif") as a, tifffile.TiffFile(there / "out" / "a.ome.tif") as b:
        assert a.ome_metadata == b.ome_metadata and np.array_equal(a.asarray(), b.asarray())


def test_colour_in_disguise_is_refused(there):
    """Palettes of colours, CMYK, colour at 16 bits."""
    grey = stack("u1")[0]
    palette = Image.fromarray(grey % 4).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    palette.save(there / "in" / "a.png")
    Image.fromarray(np.stack([grey] * 4, -1), "CMYK").save(there / "in" / "b.jpg")
    (there / "in" / "c.png").write_bytes(imagecodecs.png_encode(stack("u2", (20, 24, 3))))
    problems = through(there)
    assert len(problems) == 3 and not (there / "out").exists(), problems


def test_picture_round_trip(there):
    """8 and 16 bits, grey stored as colour, transparency, resolution; JPEG comes out as PNG of the same pixels."""
    Image.fromarray(stack("u1")[0]).save(there / "in" / "a.png", dpi=(200, 200))
    Image.fromarray(stack("u2")[0]).save(there / "in" / "b.png")
    grey = stack("u1")[0]
    Image.fromarray(np.stack([grey, grey, grey, 255 - grey], -1)).save(there / "in" / "c.png")
    Image.fromarray(np.stack([grey, 255 - grey], -1)).save(there / "in" / "d.png")
    Image.fromarray(grey).save(there / "in" / "e.jpg")
    Image.fromarray(grey).save(there / "in" / "f.bmp")
    assert through(there) == []
    for path in (there / "in").iterdir():
        a, b = Image.open(path), Image.open(there / "out" / path.name.replace(".jpg", ".jpg.png"))
        assert a.mode == b.mode and a.info.get("dpi") == b.info.get("dpi")
        assert np.array_equal(np.asarray(a), np.asarray(b))


def test_numpy_round_trip(there):
    """Each array of an archive is an image of its own."""
    a, b = stack("u2"), stack("f8", (40, 30))
    np.save(there / "in" / "a.npy", a)
    np.save(there / "in" / "fortran.npy", np.asfortranarray(a))
    np.savez(there / "in" / "c.npz", a=a, affine=np.eye(4), b=b, spacing=np.ones(3))
    assert through(there) == []
    assert np.array_equal(np.load(there / "out" / "a.npy"), a)
    assert np.array_equal(np.load(there / "out" / "fortran.npy"), a)
    with np.load(there / "out" / "c.npz") as out:
        assert np.array_equal(out["a"], a) and np.array_equal(out["b"], b) and out["b"].dtype == np.float64
        assert out["spacing"].tolist() == [1, 1, 1] and np.array_equal(out["affine"], np.eye(4))


def fastmri(path, images, acquisition="AXT2", kspace=None):
    with h5py.File(path, "w") as file:
        file.attrs["acquisition"], file.attrs["max"] = acquisition, 1.0
        size = "<reconSpace><matrixSize><x>16</x><y>20</y><z>1</z></matrixSize></reconSpace>"
        file["ismrmrd_header"] = f"<h><encoding>{size}</encoding></h>"
        if images is not None:
            file["reconstruction_rss"] = images
        if kspace is not None:
            file["kspace"] = kspace


def test_fastmri_and_m4raw(there):
    """Reconstructions, k-space alone, acquisitions, and the mean of M4Raw's repetitions as the reference."""
    images = np.abs(stack("f4")) * 1e-6
    fastmri(there / "in" / "file_brain_AXT2_1.h5", images)
    fastmri(there / "in" / "file_brain_AXT1_1.h5", images, "AXT1")
    with h5py.File(there / "in" / "file_brain_AXT1_1.h5", "a") as file:
        file["reconstruction_esc"] = images + 1
    assert [v.slices.mean() > 0.5 for v in formats.read(formats.find([there / "in"])[0][0])] == [False, True]
    coils = RNG.normal(size=(2, 3, 40, 32)) + 1j * RNG.normal(size=(2, 3, 40, 32))
    kspace = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(coils, (-2, -1)), norm="ortho"), (-2, -1))
    fastmri(there / "in" / "raw.h5", None, kspace=kspace.astype(np.complex64))
    assert len(formats.find([there / "in"], acquisition="AXT2")[0]) == 2
    assert through(there) == []
    with h5py.File(there / "out" / "file_brain_AXT2_1.h5") as out:
        assert np.array_equal(out["reconstruction_rss"], images) and out.attrs["acquisition"] == "AXT2"
    with h5py.File(there / "out" / "raw.h5") as out:
        rss = np.sqrt((np.abs(coils) ** 2).sum(1))[:, 12:28, 6:26]
        np.testing.assert_allclose(out["reconstruction_rss"], rss, rtol=1e-4)
        assert "kspace" not in out
    scans = there / "m4raw"
    scans.mkdir()
    repetitions = np.abs(RNG.normal(size=(3, 4, 20, 24))).astype("f4")
    for r in range(3):
        fastmri(scans / f"2022061003_T10{r + 1}.h5", repetitions[r])
    for reference, mean in (("mean", repetitions.mean(0)), ("others", repetitions[1:].mean(0))):
        items, _ = formats.find([scans], reference=reference)
        volume = formats.read(items[0])[0]
        np.testing.assert_allclose(volume.clean, mean, rtol=1e-6)
        assert np.array_equal(volume.slices, repetitions[0])


def test_plain_hdf5(there):
    """The only image, or the one named; nothing else of the file changes; links out of it are not followed."""
    images = stack("i2")
    with h5py.File(there / "in" / "a.h5", "w") as file:
        file["deep/images"], file["age"] = images, 42
        file["deep"].attrs["unit"] = "mm"
    assert through(there) == []
    with h5py.File(there / "out" / "a.h5") as out:
        assert np.array_equal(out["deep/images"], images) and out["age"][()] == 42 and out["deep"].attrs["unit"] == "mm"
    with h5py.File(there / "in" / "twice.h5", "w") as file:
        file["a"] = stack("f4")
        file["b"], file["c"] = file["a"], h5py.SoftLink("/a")
    with h5py.File(there / "in" / "b.h5", "w") as file:
        file["x"], file["y"] = images, images
    with h5py.File(there / "in" / "c.h5", "w") as file:
        file["x"] = h5py.ExternalLink(str(there / "in" / "a.h5"), "deep/images")
    problems = through(there)
    assert "name one with --key" in problems[0] and "0 datasets" in problems[1]
    with h5py.File(there / "out" / "twice.h5") as out:
        assert out["a"] == out["b"] == out["c"] and len(out) == 3
    items, _ = formats.find([there / "in" / "b.h5"], key="y")
    assert np.array_equal(formats.read(items[0])[0].slices, images)
    items, _ = formats.find([there / "in" / "c.h5"], key="x")
    with pytest.raises(ValueError, match="lies in another file"):
        formats.read(items[0])


def test_bombs_are_refused_before_memory_is_taken(there):
    """Headers that claim more than the file can hold, in every format that can lie."""
    folder = there / "in"
    header = nibabel.Nifti1Header()
    header.set_data_shape((30000, 30000, 300))
    header.set_data_dtype(np.int16)
    (folder / "a.nii.gz").write_bytes(gzip.compress(header.binaryblock + b"\0" * 1000))
    with open(folder / "b.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, dict(descr="<f8", fortran_order=False, shape=(10**5, 10**5, 100)))
    np.savez_compressed(folder / "c.npz", x=np.zeros((1000, 1000)))
    with h5py.File(folder / "d.h5", "w") as file:
        file.create_dataset("x", (10**4, 10**4, 10**4), "f8", chunks=(1, 100, 100))
    png = bytearray(imagecodecs.png_encode(np.zeros((20, 24), np.uint8)))
    png[16:24] = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    png[29:33] = struct.pack(">I", zlib.crc32(bytes(png[12:29])))
    (folder / "e.png").write_bytes(png)
    lie = dict(Rows=65535, Columns=65535, NumberOfFrames=100000)
    dicom(folder / "f.dcm", np.zeros((20, 24), np.uint16), **lie)
    problems = through(there)
    assert len(problems) == 5, problems
    assert sum("claims to hold" in problem for problem in problems) == 4  # .npy is mapped, never read beyond its end
    assert sorted(p.name for p in (there / "out").iterdir()) == ["c.npz"]


def test_uids_are_valid_and_reproducible():
    a, b = (dicom_format.new_uid("1.2.3", b"pixels") for _ in range(2))
    assert a == b != dicom_format.new_uid("1.2.4", b"pixels") and pydicom.uid.UID(a).is_valid


def test_libraries_are_loaded_when_a_file_is_read(there):
    """The import loads none of them, and a file only those of its format."""
    fastmri(there / "in" / "a.h5", stack("f4"))
    read = f"formats.read(formats.find([{str(there / 'in')!r}])[0][0])"
    for code, loaded in (("pass", set()), (read, {"h5py"})):
        code = f"import sys; from lib import files, formats; {code}; print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert {"pydicom", "nibabel", "tifffile", "PIL", "h5py", "imagecodecs"} & set(done.stdout.split()) == loaded
