"""The file contract, crops, splits and import."""

import json

import h5py
import nibabel
import numpy as np
import pydicom
import pytest
import skimage.io
from conftest import make_dataset, ok, run
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

import data
from lib import files, formats


def test_contract(made):
    """What DESIGN promises of every file: attributes, shapes, types, the same volume names, fingerprints."""
    dataset, marks = data.read_volumes(made / "knee.h5"), data.fingerprints(made / "knee.h5")
    for name, stage in [
        ("bsn_out.h5", "bsn"),
        ("srds_out.h5", "srds"),
        ("distill_out.h5", "distill"),
        ("nlm_out.h5", "nlm"),
    ]:
        attrs, volumes = data.read_attrs(made / name)
        assert attrs["format"] == "diffdenoise" and attrs["kind"] == "prediction" and attrs["stage"] == stage
        assert stage == "nlm" or {"seed", "batch"} <= attrs["args"].keys()
        assert data.fingerprints(made / name) == marks and list(attrs["inputs"]) == ["knee.h5"]
        assert {n: v["split"] for n, v in volumes.items()} == {"v0": "train", "v1": "test"}
        for volume, pred in data.read_volumes(made / name, "pred").items():
            assert pred.shape == dataset[volume].shape and pred.dtype == np.float32
    assert not list(made.glob("*.tmp*"))


def test_failed_writing_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), data.write_volumes(tmp_path / "x.h5", "dataset", "test") as add:
        add("v", (1, 16, 16), ["noisy"])
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_streaming_equals_memory(tmp_path):
    """A file that does not fit into memory gives the same crops and the same difference."""
    path = make_dataset(tmp_path / "d.h5")
    whole, streamed = data.read_volumes(path), data.read_volumes(path, memory=10)
    assert isinstance(streamed["v0"], data.Streamed) and isinstance(whole["v0"], np.ndarray)
    a, b = (data.random_crops([v], 8, 32, np.random.default_rng(3))[0] for v in (whole, streamed))
    assert a.equal(b)
    assert data.rms_difference(streamed, data.read_volumes(path, "clean", memory=10)) == pytest.approx(
        6 / 255, rel=0.05
    )


def test_crops():
    """The same crop from each file; all slices, pixels, orientations occur; the shares of processes make the batch."""
    image = np.arange(2 * 20 * 24, dtype=np.float32).reshape(2, 20, 24)
    stacks = [{"a": image[:1], "b": image[1:]}, {"a": image[:1] + 0.5, "b": image[1:] + 0.5}]
    a, b = data.random_crops(stacks, 4000, 16, np.random.default_rng(0))
    assert a.shape == (4000, 1, 16, 16) and b.equal(a + 0.5)
    assert set(np.unique(a.numpy())) == set(image.ravel())
    first = a[:, 0, 0, 1] - a[:, 0, 0, 0], a[:, 0, 1, 0] - a[:, 0, 0, 0]  # steps right and down tell the orientation
    assert {(int(x), int(y)) for x, y in zip(*first)} == {
        (s * p, t * q) for p, q in ((1, 24), (24, 1)) for s in (1, -1) for t in (1, -1)
    }
    shares = [data.random_crops(stacks[:1], 6, 16, np.random.default_rng(7), rank, 2)[0] for rank in (0, 1)]
    together = data.random_crops(stacks[:1], 6, 16, np.random.default_rng(7))[0]
    assert shares[0].equal(together[0::2]) and shares[1].equal(together[1::2])


def test_blocks_are_contiguous_and_complete():
    for count in (10, 123, 192):
        parts = data.blocks(count, [0.8, 0.1, 0.1])
        assert [p[1] for p in parts[1:]] == [p[2] for p in parts[:-1]] and parts[0][1] == 0 and parts[-1][2] == count
        assert [p[0] for p in parts] == ["train", "val", "test", "train"]


def write_dicom(path, pixels, number, inverted=False):
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
    ds.SeriesInstanceUID, ds.InstanceNumber = "1.2.3", 100 - number
    ds.ImagePositionPatient, ds.ImageOrientationPatient = [0, 0, 2.0 * number], [1, 0, 0, 0, 1, 0]
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PixelRepresentation, ds.BitsAllocated, ds.BitsStored, ds.HighBit = 1, 0, 16, 12, 11
    ds.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    ds.PixelData = pixels.astype(np.uint16).tobytes()
    ds.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize("kind", ["dicom", "monochrome1", "nii.gz", "npy", "png", "tif"])
def test_import(tmp_path, kind):
    """Each format in; original = value * scale + offset gives the stored numbers back, slices in order."""
    raw = np.random.default_rng(0).integers(0, 4000, (12, 20, 24)).astype(np.uint16)
    scans = tmp_path / "scans"
    scans.mkdir()
    if kind in ("dicom", "monochrome1"):
        for s in range(12):
            write_dicom(scans / f"{(7 * s) % 12:02d}.dcm", raw[s], s, kind == "monochrome1")
        (scans / "notes.txt").write_text("not an image")
    elif kind == "nii.gz":
        nibabel.save(nibabel.Nifti1Image(raw.T, np.eye(4)), scans / "head.nii.gz")
    elif kind == "npy":
        np.save(scans / "head.npy", raw)
    elif kind == "tif":
        skimage.io.imsave(scans / "head.tif", raw)
    else:
        for s in range(12):
            skimage.io.imsave(scans / f"{s:02d}.png", raw[s])
    done = run("data", "import", "scans", "--out", "x.h5", cwd=tmp_path)
    other = kind in ("dicom", "monochrome1")
    assert done.returncode == other and ("notes.txt is not a" in done.stderr) == other
    _, attrs = data.read_attrs(tmp_path / "x.h5")
    volumes = data.read_volumes(tmp_path / "x.h5")
    back = np.concatenate([volumes[n] * attrs[n]["scale"] + attrs[n]["offset"] for n in sorted(volumes)])
    np.testing.assert_allclose(back, raw, atol=0.01)
    everything = np.concatenate([v.ravel() for v in volumes.values()])
    assert everything.min() == 0 and everything.max() == 1
    assert {a["split"] for a in attrs.values()} == {"train", "val", "test"}
    if kind == "monochrome1":
        assert all(a["scale"] < 0 for a in attrs.values())


def test_built_in_brain():
    brain = formats.brain()
    assert brain.slices.shape == (123, 233, 197) and brain.slices.dtype == np.uint8
    assert ((brain.slices > 25).mean((1, 2)) > 0.1).all()


def test_split_shares():
    assert data.blocks(15, [0, 0.5, 0.5]) == [("val", 0, 8), ("test", 8, 15)]
    assert data.blocks(15, [1.0, 0, 0]) == [("train", 0, 15)]


def test_patches_are_the_centred_grid():
    image = np.arange(320 * 320, dtype=np.float32).reshape(1, 320, 320)
    assert np.array_equal(files.patches(image, 300)[0], image[0, 10:310, 10:310])  # fastMRI: the centre crop
    assert files.patches(np.zeros((2, 650, 320)), 300).shape == (4, 300, 300)
    assert files.patches(np.zeros((1, 256, 320)), 300).shape == (1, 256, 300)  # no pixel is made up


def test_show(made):
    printed = ok("data", "show", "bsn_out.h5", cwd=made).stdout
    assert "v0: pred (3, 48, 40), split train" in printed


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda p: p.unlink(), "does not exist"),
        (lambda p: p.write_bytes(b"not HDF5 at all"), "not an HDF5 file"),
        (lambda p: p.write_bytes(p.read_bytes()[:-3000]), "cannot be read, it may be incomplete"),
        (lambda p: edit(p, lambda f: f.pop("volumes")), "has no volumes"),
        (lambda p: edit(p, lambda f: f["volumes/v0"].pop("noisy")), "has no 'noisy', only ['clean']"),
        (
            lambda p: edit(p, lambda f: f["volumes/v0/noisy"].__setitem__((0, 3, 4), np.nan)),
            "holds 1 values that are NaN or infinite",
        ),
        (
            lambda p: edit(p, lambda f: f["volumes/v0/noisy"].__setitem__((0, 3), np.inf)),
            "holds 40 values that are NaN or infinite",
        ),
        (lambda p: replace(p, np.zeros((0, 48, 40), "f4")), "(0, 48, 40)"),
        (lambda p: replace(p, np.full((3, 48, 40), 0.25, "f4")), "is constant (0.25)"),
        (lambda p: replace(p, np.zeros((48, 40), "f4")), "not (slices, height, width)"),
        (
            lambda p: replace(p, np.random.default_rng(0).random((3, 12, 40)).astype("f4")),
            "12x40 pixels are smaller than 16x16",
        ),
        (
            lambda p: replace(p, np.random.default_rng(0).random((3, 30, 40)).astype("f4")),
            "30x40 pixels, smaller than --crop 32; use --crop 30",
        ),
    ],
)
def test_wrong_datasets_are_refused(tmp_path, damage, says):
    """One line, exit code 2, nothing written."""
    path = make_dataset(tmp_path / "knee.h5")
    damage(path)
    before = {p.name for p in tmp_path.iterdir()}
    refuse(run("bsn", "--data", "knee.h5", "--crop", 32, "--steps", 1, cwd=tmp_path), says)
    assert {p.name for p in tmp_path.iterdir()} == before


def edit(path, change):
    with h5py.File(path, "r+") as f:
        change(f)


def replace(path, array):
    def change(f):
        del f["volumes/v0/noisy"]
        f["volumes/v0/noisy"] = array
        f["volumes/v0"].attrs["fingerprint"] = data.fingerprint(array) if array.ndim == 3 else ""

    edit(path, change)


def refuse(done, says):
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert says in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.fixture
def other(made, tmp_path):
    """Copies of the made files beside a dataset of other noise, and one of other sizes."""
    for name in ("knee.h5", "bsn_out.h5", "diffusion.pt", "bsn.pt"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    make_dataset(tmp_path / "other.h5", seed=1)
    make_dataset(tmp_path / "sizes.h5", sizes=((3, 48, 48), (2, 37, 53)))
    return tmp_path


@pytest.mark.parametrize(
    "script, flags, says",
    [
        (
            "diffusion",
            ["--data", "other.h5", "--cond", "bsn_out.h5"],
            "bsn_out.h5 was not made from other.h5 but from knee.h5: volume 'v0'",
        ),
        (
            "diffusion",
            ["--data", "sizes.h5", "--cond", "bsn_out.h5"],
            "is (3, 48, 40) in bsn_out.h5 but (3, 48, 48) in sizes.h5",
        ),
        ("distill", ["--data", "other.h5", "--target", "bsn_out.h5"], "was not made from other.h5"),
        ("distill", ["--data", "knee.h5"], "--target is needed"),
        ("evaluate", ["--data", "other.h5", "--pred", "bsn_out.h5"], "was not made from other.h5"),
        (
            "evaluate",
            ["--data", "knee.h5", "--pred", "a=bsn_out.h5", "--json", "bsn_out.h5"],
            "would replace the input",
        ),
        ("evaluate", ["--data", "knee.h5", "--model", "bsn.pt"], "--model is for --no-reference"),
        ("denoise", ["--data", "knee.h5", "--out", ".", "--instant"], "is the folder of the input knee.h5"),
        ("denoise", ["knee.h5", "--out", "n", "--model", "bsn.pt", "--rounds", "2"], "--rounds: for training"),
        ("data", ["import", "bsn_out.h5", "--out", "n.h5"], "it is a prediction file"),
        (
            "measure",
            ["--data", "knee.h5", "--pred", "part.h5"],
            "part.h5 holds no volume that knee.h5",
        ),
        ("noise", ["divide", "--data", "knee.h5", "--map", "part.h5", "--out", "n.h5"], "of the 2 volumes of knee.h5"),
        ("posterior", ["--data", "knee.h5", "--pred", "bsn_out.h5", "--noise", "knee.h5"], "is not a noise model"),
        ("diffusion", ["--data", "knee.h5", "--cond", "nothing.h5"], "nothing.h5 does not exist"),
        ("diffusion", ["--data", "knee.h5", "--cond", "other.h5"], "was not made from"),
        ("srds", ["--cond", "bsn_out.h5", "--model", "bsn.pt"], "bsn.pt is a checkpoint of bsn, not of diffusion"),
        ("srds", ["--cond", "bsn_out.h5", "--model", "code.pt"], "code.pt is not a whole checkpoint"),
        ("srds", ["--cond", "bsn_out.h5", "--model", "half.pt"], "half.pt is not a whole checkpoint"),
        ("srds", ["--cond", "bsn_out.h5", "--steps", "5000"], "5000 sampling steps"),
        ("srds", ["--cond", "bsn_out.h5", "--out", "bsn_out.h5"], "would replace the input bsn_out.h5"),
        ("bsn", ["--data", "knee.h5", "--out", "no/such/folder.h5"], "the folder of no/such/folder.h5 does not exist"),
        ("bsn", ["--data", "knee.h5", "--device", "cuda:7"], "--device cuda:7"),
        (
            "noise",
            ["add", "--data", "knee.h5", "--kind", "gaussian", "--level", "-1", "--out", "n.h5"],
            "is not positive",
        ),
        ("data", ["import", "empty", "--out", "n.h5"], "holds no DICOM"),
        ("data", ["import", "colour.tif", "--out", "n.h5"], "is a colour image"),
        ("data", ["import", "hollow.npy", "--out", "n.h5"], "hollow.npy cannot be read"),
        ("diffusion", ["--data", "knee.h5", "--cond", "nan.h5"], "'pred' holds 40 values that are NaN or infinite"),
        ("noise", ["add", "--data", "bsn_out.h5", "--level", "0.1", "--out", "n.h5"], "has no 'noisy', only ['pred']"),
        ("bsn", ["--data", "knee.h5", "--blind-spot", "3"], "invalid choice"),
        ("bsn", ["--data", "knee.h5", "--crop", "8"], "--crop 8 is too small"),
        ("bsn", ["--data", "knee.h5", "--crop", "32", "--width", "15"], "width 15 is odd"),
        ("bsn", ["--data", "knee.h5", "--model", "same", "--out", "same"], "need names of their own"),
        ("bsn", ["--data", "knee.h5", "--predict", "--out", "bsn.pt"], "would replace the input bsn.pt"),
        ("evaluate", ["--data", "knee.h5", "--pred", "bsn_out.h5", "bsn_out.h5"], "two methods are named 'bsn'"),
        ("data", ["import", "code.pt", "--out", "n.h5"], "not a DICOM"),
    ],
)
def test_wrong_use_is_refused(other, script, flags, says):
    (other / "empty").mkdir()
    skimage.io.imsave(other / "colour.tif", np.random.default_rng(0).integers(0, 255, (20, 24, 3)).astype(np.uint8))
    (other / "hollow.npy").write_bytes(b"")
    (other / "nan.h5").write_bytes((other / "bsn_out.h5").read_bytes())
    edit(other / "nan.h5", lambda f: f["volumes/v0/pred"].__setitem__((0, 3), np.nan))
    (other / "part.h5").write_bytes((other / "bsn_out.h5").read_bytes())
    edit(other / "part.h5", lambda f: (f.copy("volumes/v1/pred", "volumes/v1/gain"), f["volumes"].__delitem__("v0")))
    (other / "half.pt").write_bytes((other / "bsn.pt").read_bytes()[:2000])
    (other / "code.pt").write_bytes(b"cposix\nsystem\n(S'touch hacked'\ntR.")  # a pickle that would run a command
    before = {p.name for p in other.iterdir()}
    refuse(run(script, *flags, cwd=other), says)
    assert {p.name for p in other.iterdir()} == before


def test_self_supervised_stages_never_open_clean(made, tmp_path):
    """The same bits with `clean` deleted, and with NaN in its place."""
    from conftest import TINY

    runs = {}
    for kind in ("with", "without", "nan"):
        folder = tmp_path / kind
        folder.mkdir()
        make_dataset(folder / "knee.h5", clean=kind != "without")
        if kind == "nan":
            edit(
                folder / "knee.h5",
                lambda f: [
                    f[f"volumes/{v}/clean"].write_direct(np.full(f[f"volumes/{v}/clean"].shape, np.nan, "f4"))
                    for v in ("v0", "v1")
                ],
            )
        ok("bsn", "--data", "knee.h5", *TINY["bsn"], cwd=folder)
        ok("diffusion", "--data", "knee.h5", "--cond", "bsn_out.h5", *TINY["diffusion"], cwd=folder)
        ok("srds", "--cond", "bsn_out.h5", "--steps", 2, cwd=folder)
        ok("distill", "--data", "knee.h5", "--target", "srds_out.h5", *TINY["distill"], cwd=folder)
        known = ["--data", "knee.h5", "--pred", "bsn_out.h5", "--noise", "gaussian:6/255"]
        ok("posterior", *known, cwd=folder)
        recorrupted = ["--target", "recorrupted", "--out", "recorrupted_out.h5", "--model", "r.pt"]
        ok("distill", *known, *recorrupted, *TINY["distill"], cwd=folder)
        runs[kind] = [
            data.fingerprint(a)
            for f in ("bsn_out.h5", "srds_out.h5", "distill_out.h5", "posterior_out.h5", "recorrupted_out.h5")
            for a in data.read_volumes(folder / f, "pred").values()
        ]
    assert runs["with"] == runs["without"] == runs["nan"]


def test_logs_are_json(made):
    for stage in ("bsn", "diffusion", "student"):
        lines = [json.loads(line) for line in (made / f"{stage}.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == 4 and np.isfinite(lines[-1]["loss"])
